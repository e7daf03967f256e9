//! The oracles themselves: that the servers demand what they are said to demand, and that the driver finds the failure
//! this project is about where it is known to be. No Counterfoil here.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::Duration;

use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::message::qtype;
use counterfoil_tests::netns;
use counterfoil_tests::process;
use counterfoil_tests::servers::{LeakyFront, Recursor, TlvOracle, Told, Unbound, ZONE};
use counterfoil_tests::sockets::Sampler;
use ppp::v2::{Builder, Command, Protocol, Version};

/// dnsdist 1.7.3 in front of the Recursor (128 TCP clients), another TLV on each query of one client connection: it
/// keeps a socket for every answer and hangs when the Recursor takes no more.
#[test]
fn the_driver_finds_the_leak_of_dnsdist() {
    let recursor = Recursor::start(false);
    let front = LeakyFront::start(recursor.address);
    let sampler = Sampler::start(front.process.pid(), recursor.address.port());
    let mut client = Client::connect(front.address, None);
    let load = Load { count: 10_000, stall: Duration::from_secs(3), ..Load::default() };
    let outcome = load.run(&mut client);
    let observed = sampler.finish();
    assert!(outcome.ended.is_some() && !outcome.missing.is_empty(), "it hangs: {outcome:?}");
    // 129; on a slow machine another 128 for each time that the Recursor has given up clients that were idle for 2 s.
    assert!((100..1000).contains(&outcome.answered), "after about 129 answers: {outcome:?}");
    assert!(observed.most >= 100, "it piles up sockets: {observed:?}");
}

/// `kdig +tcp +proxy` is answered and its address is logged; without the header the server closes.
#[test]
fn unbound_demands_the_header() {
    let mut unbound = Unbound::start(true);
    let port = unbound.address.port().to_string();
    let name = format!("direct.{ZONE}");
    let common = ["@127.0.0.1", "-p", &port, "+tcp", "+retry=0", "+timeout=3", name.as_str(), "A"];
    let with = [&common[..], &["+proxy=192.0.2.77#4444-127.0.0.1#53"]].concat();
    let (ok, output) = process::run("kdig", &with, Duration::from_secs(20));
    assert!(ok && output.contains("NOERROR") && output.contains("192.0.2.53"), "{output}");
    assert_eq!(unbound.logged_client(&name).to_string(), "192.0.2.77");
    let (_, output) = process::run("kdig", &common, Duration::from_secs(20));
    assert!(!output.contains("NOERROR"), "no answer without a header: {output}");
}

/// A header with port 0 and two TLVs, made by another encoder than the program's.
fn header() -> Vec<u8> {
    let addresses = (([192, 0, 2, 78], 0).into(), ([127, 0, 0, 1], 53).into());
    let addresses: (std::net::SocketAddr, std::net::SocketAddr) = addresses;
    let builder = Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses);
    let builder = builder.write_tlv(0xe0_u8, b"tenant-42").unwrap().write_tlv(0xea_u8, b"\x01\xffz").unwrap();
    builder.build().unwrap()
}

/// The dnsdist oracle and the Recursor tell the source and the TLVs as they were sent.
#[test]
fn the_tlv_oracles_tell_the_truth() {
    let oracle = TlvOracle::start();
    let mut client = Client::connect(oracle.address, None);
    client.send_raw(&header()).unwrap();
    let told = Told::read(&client.exchange(1, &format!("tlv.{ZONE}"), qtype::TXT));
    assert_eq!(told.source, "192.0.2.78:0");
    assert_eq!(told.destination, "127.0.0.1:53");
    assert_eq!(told.tlvs, ["e0=tenant-42", "ea=\u{1}\u{fffd}z"]);

    let mut recursor = Recursor::start(true);
    let mut client = Client::connect(recursor.address, None);
    client.send_raw(&header()).unwrap();
    client.exchange(1, &format!("tlv.{ZONE}"), qtype::A);
    let seen = recursor.seen(&format!("tlv.{ZONE}"));
    assert_eq!(seen.source, "192.0.2.78");
    assert_eq!(seen.tlvs, ["e0=tenant-42", "ea=\u{1}\u{fffd}z"]);
}

/// The network of the soak: Unbound in one namespace, a client in the other.
#[test]
fn unbound_answers_between_two_namespaces() {
    let (near, far) = netns::pair();
    let unbound = Unbound::start_in(&far, far.address);
    near.run(|| {
        let mut client = Client::connect(unbound.address, None);
        client.send_raw(&header()).unwrap();
        Load { count: 10, ..Load::default() }.run(&mut client).assert_all_answered(10);
    });
}

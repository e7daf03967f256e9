//! Real programs in front of a listener that speak for their clients by PROXY headers: dnsdist, HAProxy, kdig.
#![expect(clippy::expect_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::message::qtype;
use counterfoil_tests::process;
use counterfoil_tests::servers::{Haproxy, LeakyFront, TlvOracle, Told, Unbound, ZONE};

const SOON: Duration = Duration::from_secs(10);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend)
        .set("connections", "idle_timeout", "\"300ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .identity("connection")
        .accept_proxy(&["127.0.0.1"])
}

/// dnsdist 1.7.3 with another TLV on each query: each of its connections to us has a header of its own, and each of ours
/// says the same to the server behind us.
#[test]
fn dnsdist_in_front_and_behind() {
    let oracle = TlvOracle::start();
    let counterfoil = Counterfoil::start(&config(oracle.address).tlv(0xe1, "{incoming:0xE0}!"));
    let front = LeakyFront::start(counterfoil.address);
    let mut client = Client::connect(front.address, Some("127.0.0.9".parse().expect("an address")));
    for n in 0..20 {
        let told = Told::read(&client.exchange(n, &format!("label-{n}.{ZONE}"), qtype::TXT));
        assert_eq!(told.source, client.local_addr().to_string());
        assert_eq!(told.destination, front.address.to_string());
        assert_eq!(told.tlvs, [format!("e0=label-{n}"), format!("e1=label-{n}!")]);
    }
    drop((client, front));
    counterfoil.assert_quiescent();
}

/// HAProxy 2.6 with version 1, version 2, and version 2 with its TLVs for a checksum and a unique ID.
#[test]
fn haproxy_in_front() {
    let oracle = TlvOracle::start();
    for options in ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"] {
        let counterfoil = Counterfoil::start(&config(oracle.address));
        let front = Haproxy::start(counterfoil.address, options);
        let mut clients: Vec<Client> = ["127.0.0.7", "127.0.0.7", "127.0.0.8"]
            .map(|source| Client::connect(front.address, Some(source.parse().expect("an address"))))
            .into();
        for round in 0..3 {
            for client in &mut clients {
                let own = client.local_addr();
                let told = Told::read(&client.exchange(round, &format!("haproxy.{ZONE}"), qtype::TXT));
                assert_eq!((told.source, told.destination), (own.to_string(), front.address.to_string()), "{options}");
                // The unique ID is the client's address and port in hexadecimal; the checksum was true of that header only.
                let SocketAddr::V4(own) = own else { unreachable!("127.0.0.0/8") };
                let id = format!("05={:08X}{:04X}", own.ip().to_bits(), own.port());
                let expected = if options.contains("unique-id") { vec![id] } else { Vec::new() };
                assert_eq!(told.tlvs, expected, "{options}");
            }
        }
        // Every client owns one connection.
        assert_eq!(counterfoil.metrics().sum("backend_connections_opened_total", &[]), 3.0);
        drop((clients, front));
        counterfoil.assert_quiescent();
    }
}

/// Its health checks say LOCAL, and are nobody's queries.
#[test]
fn haproxy_checks_with_local() {
    let unbound = Unbound::start(false);
    let counterfoil = Counterfoil::start(&config(unbound.address));
    let front = Haproxy::start(counterfoil.address, "send-proxy-v2 check check-send-proxy inter 50ms fall 1 rise 1");
    counterfoil.wait_metrics("some checks", SOON, |metrics| metrics.sum("client_connections_closed_total", &[]) >= 5.0);
    let mut client = Client::connect(front.address, None);
    Load { count: 100, in_flight: 10, ..Load::default() }.run(&mut client).assert_all_answered(100);
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("client_connections_refused_total", &[]), 0.0);
    assert_eq!(metrics.sum("queries_total", &[]), 100.0);
    drop((client, front));
    counterfoil.assert_quiescent();
}

/// HAProxy that was not told to send a header is turned away, so its client learns at once.
#[test]
fn haproxy_without_a_header_is_refused() {
    let unbound = Unbound::start(false);
    let counterfoil = Counterfoil::start(&config(unbound.address));
    let front = Haproxy::start(counterfoil.address, "");
    let mut client = Client::connect(front.address, None);
    client.ask(1, &format!("plain.{ZONE}"), qtype::A);
    let received = client.receive(SOON);
    assert!(matches!(received, Received::Closed | Received::Reset), "{received:?}");
    drop((client, front));
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("client_connections_refused_total", &[("reason", "proxy_missing")]), 1.0);
}

/// `kdig +tcp +proxy` in front, Unbound behind logs the address that kdig made up.
#[test]
fn kdig_with_a_header() {
    let mut unbound = Unbound::start(true);
    let counterfoil = Counterfoil::start(&config(unbound.address));
    let port = counterfoil.address.port().to_string();
    let name = format!("kdig.{ZONE}");
    let common = ["@127.0.0.1", "-p", &port, "+tcp", "+retry=0", "+timeout=3", &name, "A"];
    let with = [&common[..], &["+proxy=192.0.2.77#4444-127.0.0.1#53"]].concat();
    let (ok, output) = process::run("kdig", &with, Duration::from_secs(20));
    assert!(ok && output.contains("NOERROR") && output.contains("192.0.2.53"), "{output}");
    assert_eq!(unbound.logged_client(&name).to_string(), "192.0.2.77");
    let (_, output) = process::run("kdig", &common, Duration::from_secs(20));
    assert!(!output.contains("NOERROR"), "no answer without a header: {output}");
    counterfoil.assert_quiescent();
}

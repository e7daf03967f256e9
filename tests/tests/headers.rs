//! What a backend reads before the first query, octet by octet.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::net::{Ipv6Addr, SocketAddr};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).set("connections", "idle_timeout", "\"500ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    )
}

#[test]
fn a_header_comes_once_and_first_and_says_what_is_true() {
    let (backend, headers) = FakeBackend::recording();
    let config = config(backend.address).identity("connection").tlv(0xe1, "a").tlv(0xe0, "{qname}").tlv(0xe1, "b");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client_from("127.0.0.9");
    for id in 0..5 {
        client.exchange(id, "same.example.test", qtype::A);
    }
    let recorded = headers.lock().unwrap().clone();
    let [header] = recorded.as_slice() else { panic!("one connection: {recorded:?}") };
    assert_eq!(header.source, Some(client.local_addr()));
    assert_eq!(header.destination, Some(counterfoil.address));
    let tlvs: Vec<_> = header.tlvs.iter().map(|(kind, value)| (*kind, String::from_utf8_lossy(value))).collect();
    let [(0xe1, first), (0xe0, second), (0xe1, third)] = tlvs.as_slice() else { panic!("in their order: {tlvs:?}") };
    assert_eq!((first.as_ref(), second.trim_end_matches('.'), third.as_ref()), ("a", "same.example.test", "b"));
    // Version 2, PROXY, TCP over IPv4, and the length of what follows.
    assert_eq!(header.bytes[12..14], [0x21, 0x11]);
    assert_eq!(usize::from(u16::from_be_bytes([header.bytes[14], header.bytes[15]])), header.bytes.len() - 16);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn clients_over_ipv6_are_named_by_their_addresses() {
    let loopback = Ipv6Addr::LOCALHOST;
    for (identity, port_and_address) in [("connection", true), ("address", false), ("subnet", false)] {
        let (backend, headers) = FakeBackend::recording();
        let config = config(backend.address).identity(identity).listen(SocketAddr::from((loopback, 0)));
        let counterfoil = Counterfoil::start(&config);
        let mut client = Client::connect(counterfoil.address, None);
        client.exchange(1, "six.example.test", qtype::A);
        let recorded = headers.lock().unwrap().clone();
        let expected = match identity {
            "connection" => client.local_addr(),
            "address" => SocketAddr::from((loopback, 0)),
            // ::1 in a /56.
            _ => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        assert_eq!(recorded[0].source, Some(expected), "{identity}");
        assert!(!port_and_address || recorded[0].destination == Some(counterfoil.address), "{recorded:?}");
        assert_eq!(recorded[0].bytes[12..14], [0x21, 0x21]);
        drop(client);
        counterfoil.assert_quiescent();
    }
}

#[test]
fn without_proxy_protocol_the_query_comes_first() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    Load { count: 10, in_flight: 3, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(10);
    counterfoil.assert_quiescent();
    assert_eq!((backend.accepted(), backend.queries()), (1, 10));
}

/// A header that would be too long for the backend fails its query and nothing else.
#[test]
fn a_header_over_the_limit_fails_its_query_alone() {
    let (backend, headers) = FakeBackend::recording();
    let config = config(backend.address).identity("address").tlv(0xe0, "{qname}").set(
        "pool.proxy_protocol",
        "max_header",
        "\"80B\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let short = "short.example.test";
    let long = format!("{}.{}.example.test", "l".repeat(50), "m".repeat(50));
    for (id, name, expected) in
        [(1, short, rcode::NOERROR), (2, long.as_str(), rcode::SERVFAIL), (3, short, rcode::NOERROR)]
    {
        assert_eq!(message::response_code(&client.exchange(id, name, qtype::A)), expected, "{name}");
    }
    drop(client);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("queries_failed_total", &[("reason", "header_too_long")]), 1.0);
    let longest = headers.lock().unwrap().iter().map(|header| header.bytes.len()).max();
    assert!(longest <= Some(80), "{longest:?}");
}

/// Connections are kept apart by their headers: a query never travels under another's.
#[test]
fn every_query_travels_under_its_own_header() {
    let backend = FakeBackend::start(|connection| {
        let Some(header) = connection.header() else { return };
        while let Some(query) = connection.query() {
            let name = message::question_name(&query).unwrap();
            let label = name.split('.').next().unwrap();
            assert_eq!(header.tlvs, [(0xe0, label.as_bytes().to_vec())], "a query for {name}");
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let config = config(backend.address).identity("address").tlv(0xe0, "{qname_label:1}").set("server", "workers", "2");
    let counterfoil = Counterfoil::start(&config);
    std::thread::scope(|scope| {
        for number in 0..10 {
            let counterfoil = &counterfoil;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(number);
                let sets: Vec<u32> = (0..500).map(|_| random.u32(0..12)).collect();
                let name = |n: usize| format!("set{}.n{n}.c{number}.example.test", sets[n]);
                let load = Load { count: sets.len(), in_flight: 7, name: &name, ..Load::default() };
                load.run(&mut counterfoil.client()).assert_all_answered(sets.len());
            });
        }
    });
    counterfoil.assert_quiescent();
    // Dropping the backend reports what its scripts asserted.
    drop(backend);
}

//! PROXY headers in front of TLS and inside it, from scripted load balancers and from real ones.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::Duration;

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Tls};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::proxy_header::{v1, v2};
use counterfoil_tests::servers::{Haproxy, LeakyFront, TlvOracle, Told, ZONE};

const SOON: Duration = Duration::from_secs(10);
const NAME: &str = "dns.example";
const CLIENT: &str = "203.0.113.7:4242";
const SERVICE: &str = "198.51.100.1:853";
/// What Counterfoil says of a client that speaks TLS 1.3 as these do.
const SSL: &str = "20=\u{1}\0\0\0\u{1}!\0\u{7}TLSv1.3#\0\u{16}TLS_AES_256_GCM_SHA384";

/// A DoT listener that trusts 127.0.0.1 to speak for others, before TLS or inside.
fn config(backend: SocketAddr, authority: &Authority, outside: bool) -> Config {
    Config::new(backend)
        .set("connections", "idle_timeout", "\"300ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .identity("connection")
        .set("pool.proxy_protocol", "advertise_tls", true)
        .accept_proxy(&["127.0.0.1"])
        .set("listener.accept_proxy", "outside_tls", outside)
        .tls(&authority.issue("dns", &[NAME]))
}

fn tls(authority: &Authority) -> Tls {
    Tls::new(&authority.ca, NAME)
}

/// Six queries on one connection with one header: each is forwarded with the same addresses and TLVs, and with what was
/// agreed on over TLS (dnsdist's behaviours 11 and 12).
#[test]
fn one_header_outside_or_inside_and_six_queries() {
    let oracle = TlvOracle::start();
    let authority = Authority::new();
    for outside in [true, false] {
        let counterfoil = Counterfoil::start(&config(oracle.address, &authority, outside).tlv(0xe0, "{sni}"));
        let header = v2(CLIENT, SERVICE, &[(0xe2, b"one"), (0xe3, b"")]);
        let mut client = counterfoil.client();
        if outside {
            client.send_raw(&header).unwrap();
        }
        let mut client = client.over_tls(&tls(&authority)).expect("a handshake");
        if !outside {
            client.send_raw(&header).unwrap();
        }
        for id in 0..6 {
            let told = Told::read(&client.exchange(id, &format!("six-{id}.{ZONE}"), qtype::TXT));
            assert_eq!((told.source.as_str(), told.destination.as_str()), (CLIENT, SERVICE));
            assert_eq!(told.tlvs, ["02=dns.example", SSL, "e0=dns.example", "e2=one", "e3="], "outside: {outside}");
        }
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("backend_connections_opened_total", &[]), 1.0);
        assert_eq!(metrics.sum("client_connections_pending", &[]), 0.0);
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// What the load balancer says of its client's TLS is true of the client; that of its own connection is not added.
#[test]
fn what_the_header_says_of_tls_goes_first() {
    let oracle = TlvOracle::start();
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(oracle.address, &authority, false));
    let mut client = Client::connect_tls(counterfoil.address, None, &tls(&authority));
    let theirs = b"\x01\0\0\0\0\x21\0\x07TLSv1.2";
    client.send_raw(&v2(CLIENT, SERVICE, &[(0x20, theirs), (0x02, b"theirs.example")])).unwrap();
    let told = Told::read(&client.exchange(1, &format!("theirs.{ZONE}"), qtype::TXT));
    assert_eq!(told.tlvs, ["02=theirs.example", "20=\u{1}\0\0\0\0!\0\u{7}TLSv1.2"]);
    drop(client);
    counterfoil.assert_quiescent();
}

/// Header, handshake and queries in one write each, or octet by octet, in both layouts and both versions of PROXY.
#[test]
fn headers_are_cut_anywhere() {
    let backend = FakeBackend::answering(true);
    let authority = Authority::new();
    for outside in [true, false] {
        let counterfoil = Counterfoil::start(&config(backend.address, &authority, outside));
        for header in [v2(CLIENT, SERVICE, &[(0xe2, b"one")]), v1(CLIENT, SERVICE)] {
            let mut client = counterfoil.client();
            let mut octets = header.iter();
            if outside {
                octets.by_ref().for_each(|octet| client.send_raw(&[*octet]).unwrap());
            }
            let mut client = client.over_tls(&tls(&authority)).expect("a handshake");
            octets.for_each(|octet| client.send_raw(&[*octet]).unwrap());
            client.exchange(1, "cut.example.test", qtype::A);
        }
        if !outside {
            // The header and two queries in one record.
            let mut client = Client::connect_tls(counterfoil.address, None, &tls(&authority));
            let mut all = v2(CLIENT, SERVICE, &[]);
            for id in [1, 2] {
                all.extend_from_slice(&message::framed(&message::query(id, "whole.example.test", qtype::A)));
            }
            client.send_raw(&all).unwrap();
            client.receive(SOON).message();
            client.receive(SOON).message();
        }
        counterfoil.assert_quiescent();
    }
}

/// The header and the first message of TLS arrive as one segment.
#[test]
fn a_header_and_the_hello_behind_it_in_one_write() {
    let backend = FakeBackend::answering(true);
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(backend.address, &authority, true));
    let mut client = counterfoil.client();
    let mut octets = v2(CLIENT, SERVICE, &[]);
    octets.extend_from_slice(&tls(&authority).hello());
    client.send_raw(&octets).unwrap();
    // A record of the handshake comes back: the hello was read. Nobody can go on with it here.
    let first = client.read_once(SOON);
    assert_eq!(first[..2], [22, 3]);
    drop(client);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("tls_handshake_failures_total", &[("reason", "closed")]), 1.0);
}

/// A header where none may be, and none where one must be.
#[test]
fn headers_in_the_wrong_place_are_refused() {
    let backend = FakeBackend::answering(true);
    let authority = Authority::new();
    let header = v2(CLIENT, SERVICE, &[]);
    let refused = |counterfoil: &Counterfoil, reason: &str, count: f64| {
        counterfoil.wait_metrics(reason, SOON, |metrics| {
            let of = |name: &str| metrics.sum(name, &[("reason", reason)]);
            of("client_connections_refused_total") + of("client_connections_closed_total") == count
        });
    };
    // Outside is expected: inside alone, and a second one inside; and from a peer that is not trusted.
    let counterfoil = Counterfoil::start(&config(backend.address, &authority, true));
    assert!(counterfoil.client().over_tls(&tls(&authority)).is_err());
    refused(&counterfoil, "proxy_missing", 1.0);
    let mut client = counterfoil.client();
    client.send_raw(&header).unwrap();
    let mut client = client.over_tls(&tls(&authority)).expect("a handshake");
    client.send_raw(&header).unwrap();
    client.assert_closed(SOON);
    refused(&counterfoil, "proxy_untrusted", 1.0);
    let mut other = counterfoil.client_from("127.0.0.2");
    other.send_raw(&header).unwrap();
    assert!(other.over_tls(&tls(&authority)).is_err());
    refused(&counterfoil, "proxy_untrusted", 2.0);
    let mut plain = Client::connect_tls(counterfoil.address, Some([127, 0, 0, 2].into()), &tls(&authority));
    plain.exchange(1, "own.example.test", qtype::A);
    drop(plain);
    counterfoil.assert_quiescent();

    // Inside is expected: outside alone, and a query at once.
    let counterfoil = Counterfoil::start(&config(backend.address, &authority, false));
    let mut client = counterfoil.client();
    client.send_raw(&header).unwrap();
    assert!(client.over_tls(&tls(&authority)).is_err());
    refused(&counterfoil, "proxy_untrusted", 1.0);
    let mut client = Client::connect_tls(counterfoil.address, None, &tls(&authority));
    client.ask(1, "early.example.test", qtype::A);
    client.assert_ended(SOON);
    refused(&counterfoil, "proxy_missing", 1.0);
    counterfoil.assert_quiescent();
    assert_eq!(backend.queries(), 1);
}

/// HAProxy 2.6 speaks PROXY before TLS.
#[test]
fn haproxy_in_front() {
    let oracle = TlvOracle::start();
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(oracle.address, &authority, true));
    let ca = authority.ca.display();
    let options = format!(
        "send-proxy-v2 proxy-v2-options crc32c ssl verify required ca-file {ca} sni str({NAME}) verifyhost {NAME} alpn dot"
    );
    let front = Haproxy::start(counterfoil.address, &options);
    for source in ["127.0.0.7", "127.0.0.8", "127.0.0.7"] {
        let mut client = Client::connect(front.address, Some(source.parse().expect("an address")));
        for round in 0..3 {
            let own = client.local_addr();
            let told = Told::read(&client.exchange(round, &format!("haproxy.{ZONE}"), qtype::TXT));
            assert_eq!((told.source, told.destination), (own.to_string(), front.address.to_string()));
            assert_eq!(told.tlvs, ["01=dot", "02=dns.example", SSL]);
        }
    }
    drop(front);
    counterfoil.assert_quiescent();
    // Its second and third connection go on with the session of the first.
    let metrics = counterfoil.metrics();
    let sessions = |session| metrics.sum("tls_sessions_total", &[("session", session)]);
    assert_eq!(sessions("new") + sessions("resumed"), 3.0);
    assert!(sessions("resumed") >= 1.0);
}

/// dnsdist 1.7.3 speaks it inside.
#[test]
fn dnsdist_in_front() {
    let oracle = TlvOracle::start();
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(oracle.address, &authority, false).tlv(0xe1, "{incoming:0xE0}!"));
    let front = LeakyFront::over_tls(counterfoil.address, &authority.ca, NAME);
    let mut client = Client::connect(front.address, Some("127.0.0.9".parse().expect("an address")));
    for n in 0..10 {
        let told = Told::read(&client.exchange(n, &format!("label-{n}.{ZONE}"), qtype::TXT));
        assert_eq!(told.source, client.local_addr().to_string());
        assert_eq!(told.destination, front.address.to_string());
        assert!(
            told.tlvs.contains(&format!("e0=label-{n}")) && told.tlvs.contains(&format!("e1=label-{n}!")),
            "{told:?}"
        );
    }
    drop((client, front));
    counterfoil.assert_quiescent();
}

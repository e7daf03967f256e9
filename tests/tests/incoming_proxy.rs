//! PROXY headers in front of a listener: from whom, of which form, and what becomes of the client that they name.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::proxy_header::{raw, v1, v2};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(5);
/// The client that headers name.
const CLIENT: &str = "192.0.2.7:4007";
/// Where it went to.
const SERVICE: &str = "198.51.100.53:53";
/// The peer that is trusted; clients of tests connect from 127.0.0.1 unless they say otherwise.
const TRUSTED: &str = "127.0.0.2";

fn config(backend: SocketAddr) -> Config {
    Config::new(backend)
        .set("connections", "idle_timeout", "\"300ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .accept_proxy(&["127.0.0.2", "127.0.3.0/24"])
}

#[test]
fn both_versions_name_the_client() {
    let backend = FakeBackend::telling();
    let counterfoil = Counterfoil::start(&config(backend.address).identity("connection"));
    for (header, expected) in [
        (v2(CLIENT, SERVICE, &[]), format!("{CLIENT} {SERVICE}")),
        (v1(CLIENT, SERVICE), format!("{CLIENT} {SERVICE}")),
        (v2("[2001:db8::7]:4007", "[2001:db8::53]:53", &[]), "[2001:db8::7]:4007 [2001:db8::53]:53".to_owned()),
        (v1("[2001:db8::7]:4007", "[2001:db8::53]:53"), "[2001:db8::7]:4007 [2001:db8::53]:53".to_owned()),
    ] {
        let mut client = counterfoil.client_behind(TRUSTED, &header);
        // More than one query on the connection: the header counts for all of them.
        assert_eq!(client.told(), expected);
        assert_eq!(client.told(), expected);
    }
    counterfoil.assert_quiescent();
    assert_eq!(backend.accepted(), 4);
}

#[test]
fn local_and_unknown_leave_the_connection_s_own_address() {
    let backend = FakeBackend::telling();
    let counterfoil = Counterfoil::start(&config(backend.address).identity("connection"));
    let with_tlv = [&[9; 12][..], b"\xe0\0\x01x"].concat();
    for header in [
        raw(0x20, 0x00, b""),
        raw(0x20, 0x11, &with_tlv),
        raw(0x20, 0x11, b"short"),
        raw(0x21, 0x00, b"anything"),
        raw(0x21, 0x31, &[b'x'; 216]),
        b"PROXY UNKNOWN\r\n".to_vec(),
        b"PROXY UNKNOWN ffff:: ::1 65535 65535\r\n".to_vec(),
    ] {
        let mut client = counterfoil.client_behind(TRUSTED, &header);
        let expected = format!("{} {}", client.local_addr(), counterfoil.address);
        assert_eq!(client.told(), expected, "{header:02x?}");
    }
    counterfoil.assert_quiescent();
}

/// One octet at a time, header and queries alike.
#[test]
fn a_header_octet_by_octet() {
    let backend = FakeBackend::telling();
    let counterfoil = Counterfoil::start(&config(backend.address).identity("connection"));
    for header in [v2(CLIENT, SERVICE, &[(0xe0, b"one")]), v1(CLIENT, SERVICE)] {
        let mut client = counterfoil.client_from(TRUSTED);
        let query = message::framed(&message::query(1, "told.example.test", qtype::TXT));
        for octet in [header, query].concat() {
            client.send_raw(&[octet]).unwrap();
        }
        let answer = client.receive(SOON).message();
        assert!(message::texts(&answer).concat().starts_with(CLIENT));
    }
    counterfoil.assert_quiescent();
}

/// Header and three queries, cut in two anywhere: no octet behind the header is lost.
#[test]
fn header_and_queries_cut_anywhere() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let queries: Vec<u8> =
        (1..=3).flat_map(|id| message::framed(&message::query(id, &format!("n{id}.example.test"), qtype::A))).collect();
    for header in [v2(CLIENT, SERVICE, &[(0xe0, b"x")]), v1(CLIENT, SERVICE)] {
        let all = [header, queries.clone()].concat();
        let cuts: Vec<usize> = (0..=all.len()).collect();
        for cuts in cuts.chunks(50) {
            // The first part is read by itself while the other connections are made.
            let mut clients: Vec<Client> =
                cuts.iter().map(|cut| counterfoil.client_behind(TRUSTED, &all[..*cut])).collect();
            for (client, cut) in clients.iter_mut().zip(cuts) {
                client.send_raw(&all[*cut..]).unwrap();
            }
            for (client, cut) in clients.iter_mut().zip(cuts) {
                let mut ids = [0; 3].map(|_: u16| message::id(&client.receive(SOON).message()));
                ids.sort_unstable();
                assert_eq!(ids, [1, 2, 3], "cut at {cut}");
            }
        }
    }
    counterfoil.assert_quiescent();
}

/// Cut short at every octet: by FIN, or by silence until the timeout.
#[test]
fn a_truncated_header_is_refused() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address).set("listener", "max_connections_per_client", 1000).set(
        "listener.accept_proxy",
        "timeout",
        "\"700ms\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let (mut closed, mut late) = (0.0, 0.0);
    for header in [v2(CLIENT, SERVICE, &[(0xe0, b"one")]), v1(CLIENT, SERVICE)] {
        let start = Instant::now();
        let mut silent: Vec<Client> =
            (0..header.len()).map(|cut| counterfoil.client_behind(TRUSTED, &header[..cut])).collect();
        let mut finished: Vec<Client> =
            (0..header.len()).map(|cut| counterfoil.client_behind(TRUSTED, &header[..cut])).collect();
        finished.iter().for_each(Client::finish_sending);
        finished.iter_mut().for_each(|client| client.assert_closed(SOON));
        silent.iter_mut().for_each(|client| client.assert_closed(SOON));
        let taken = start.elapsed();
        assert!(taken >= Duration::from_millis(700) && taken < SOON, "{taken:?}");
        closed += finished.len() as f64;
        late += silent.len() as f64;
        assert_eq!((counterfoil.refused("proxy_closed"), counterfoil.refused("proxy_timeout")), (closed, late));
    }
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("client_connections_opened_total", &[]), 0.0);
    assert_eq!(backend.accepted(), 0);
}

/// A header that trickles in does not get more time for each octet.
#[test]
fn a_late_header_is_refused() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener.accept_proxy", "timeout", "\"500ms\""));
    let header = v2(CLIENT, SERVICE, &[(0xe0, &[b'x'; 200])]);
    let mut client = counterfoil.client_from(TRUSTED);
    let start = Instant::now();
    // That would take more than 4 s.
    let ended = client.drip(&header, Duration::from_millis(20));
    let taken = start.elapsed();
    assert!(matches!(ended, Received::Closed | Received::Reset), "{ended:?}");
    assert!(taken >= Duration::from_millis(450) && taken < Duration::from_millis(2500), "{taken:?}");
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.refused("proxy_timeout"), 1.0);
}

/// Whoever has not said for whom it speaks takes a place all the same: gauges show it. Half of the places at most: the
/// others are for clients who are known.
#[test]
fn connections_that_wait_for_their_header_are_counted() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address).set("listener.accept_proxy", "timeout", "\"60s\"");
    let counterfoil = Counterfoil::start(&config.set("listener", "max_connections", 6));
    let known: Vec<Client> = (0..3).map(|_| counterfoil.client_behind(TRUSTED, &v2(CLIENT, SERVICE, &[]))).collect();
    let mut clients: Vec<Client> = (0..3).map(|_| counterfoil.client_from(TRUSTED)).collect();
    let wait = |pending: f64, open: f64| {
        counterfoil.wait_metrics(&format!("{pending} wait, {open} are open"), SOON, |metrics| {
            metrics.sum("client_connections_pending", &[("listener", "dns"), ("stage", "proxy_header")]) == pending
                && metrics.sum("client_connections", &[]) == open
                && metrics.sum("listener_connections", &[]) == pending + open
        })
    };
    let metrics = wait(3.0, 3.0);
    assert_eq!(metrics.sum("listener_connections_limit", &[("listener", "dns")]), 6.0);
    counterfoil.client_from(TRUSTED).assert_closed(SOON);
    assert_eq!(counterfoil.refused("per_listener"), 1.0);
    clients[0].send_raw(&v2(CLIENT, SERVICE, &[])).unwrap();
    wait(2.0, 4.0);
    drop((known, clients));
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.refused("proxy_closed"), 2.0);
}

#[test]
fn malformed_headers_are_refused() {
    let backend = FakeBackend::answering(false);
    let mut counterfoil = Counterfoil::start(&config(backend.address));
    let with = |tlvs: &[u8]| raw(0x21, 0x11, &[&[9; 12][..], tlvs].concat());
    let malformed = [
        raw(0x11, 0x11, &[9; 12]),
        raw(0x22, 0x11, &[9; 12]),
        raw(0x2f, 0x11, &[9; 12]),
        raw(0x21, 0x41, &[9; 12]),
        raw(0x21, 0x13, &[9; 12]),
        raw(0x21, 0x11, &[9; 11]),
        raw(0x21, 0x21, &[9; 35]),
        with(b"\xe0"),
        with(b"\xe0\0\x02x"),
        with(b"\x03\0\x04\0\0\0\0"),
        with(b"\x03\0\x02\0\0"),
        // Longer than `max_header`, by what it says and before it has come.
        raw(0x21, 0x11, &[9; 521]),
        raw(0x21, 0x11, &[9; 65_535])[..16].to_vec(),
        b"PROXY TCP4 192.0.2.7 198.51.100.53 4007\r\n".to_vec(),
        b"PROXY TCP4 2001:db8::7 2001:db8::53 4007 53\r\n".to_vec(),
        b"PROXY TCP4 192.0.2.7 198.51.100.53 04007 53\r\n".to_vec(),
        b"PROXY UDP4 192.0.2.7 198.51.100.53 4007 53\r\n".to_vec(),
        format!("PROXY UNKNOWN {}\r\n", "x".repeat(107)).into_bytes(),
    ];
    for header in &malformed {
        counterfoil.client_behind(TRUSTED, header).assert_closed(SOON);
    }
    assert_eq!(counterfoil.refused("proxy_invalid"), malformed.len() as f64);
    counterfoil.process.wait_for_line(SOON, "a warning that names the peer", |line| {
        (line.contains("proxy_invalid") && line.contains("127.0.0.2")).then_some(())
    });
    // The longest that is allowed.
    let mut payload = [9; 520];
    payload[12..15].copy_from_slice(&[0xe0, 1, 249]);
    let mut client = counterfoil.client_behind(TRUSTED, &raw(0x21, 0x11, &payload));
    client.exchange(1, "longest.example.test", qtype::A);
    drop(client);
    counterfoil.assert_quiescent();
}

/// As many TLVs as a header can hold, and garbage of that length: refused at once, whatever `max_header` allows.
#[test]
fn the_longest_headers_cost_little() {
    // Tells the length of the first TLV.
    let backend = FakeBackend::start(|connection| {
        let Some(header) = connection.header() else { return };
        let told = header.tlvs[0].1.len().to_string();
        while let Some(query) = connection.query() {
            connection.send(&message::text_answer_to(&query, &told));
        }
    });
    let config = config(backend.address)
        .set("listener.accept_proxy", "max_header", "\"65551B\"")
        .set("pool.proxy_protocol", "max_header", "\"65551B\"")
        .identity("connection");
    let counterfoil = Counterfoil::start(&config);
    let empty_tlvs = [&[9; 12][..], &b"\xe0\0\0".repeat(21_841)].concat();
    let start = Instant::now();
    for header in [raw(0x21, 0x11, &empty_tlvs), raw(0x21, 0x11, &[0xff; 65_535])] {
        counterfoil.client_behind(TRUSTED, &header).assert_closed(SOON);
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(counterfoil.refused("proxy_invalid"), 2.0);
    // One TLV that fills it is passed on whole.
    let long = vec![b'x'; 65_520];
    let mut client = counterfoil.client_behind(TRUSTED, &v2(CLIENT, SERVICE, &[(0xe0, &long)]));
    assert_eq!(client.told(), "65520");
    drop(client);
    counterfoil.assert_quiescent();
}

/// Nothing inside a TLV is read: one that lies about what it holds is its receiver's business.
#[test]
fn tlvs_are_passed_on_unread() {
    let backend = FakeBackend::telling();
    let counterfoil = Counterfoil::start(&config(backend.address).identity("connection"));
    // An SSL TLV whose inner one says that it has 255 octets.
    let lying = b"\x01\0\0\0\0\x21\0\xffTLS";
    let mut client = counterfoil.client_behind(TRUSTED, &v2(CLIENT, SERVICE, &[(0x20, lying), (0x02, b"\xff\0")]));
    let told = client.told();
    let expected = format!("{CLIENT} {SERVICE} 20={} 02={}", String::from_utf8_lossy(lying), "\u{fffd}\0");
    assert_eq!(told, expected);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn from_a_trusted_peer_a_header_is_required() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    for peer in [TRUSTED, "127.0.3.9"] {
        let mut client = counterfoil.client_from(peer);
        client.ask(1, "no-header.example.test", qtype::A);
        client.assert_closed(SOON);
    }
    assert_eq!(counterfoil.refused("proxy_missing"), 2.0);
    assert_eq!(backend.accepted(), 0);
    counterfoil.assert_quiescent();
}

#[test]
fn from_others_a_header_is_refused() {
    let backend = FakeBackend::answering(false);
    // With the table and without.
    let configs = [config(backend.address), Config::new(backend.address).set("connections", "idle_timeout", "\"1s\"")];
    for config in configs {
        let counterfoil = Counterfoil::start(&config);
        for header in [v2(CLIENT, SERVICE, &[]), v1(CLIENT, SERVICE), raw(0x20, 0, b"")] {
            let mut client = counterfoil.client();
            client.send_raw(&header).unwrap();
            client.assert_closed(SOON);
        }
        let untrusted = [("reason", "proxy_untrusted")];
        counterfoil.wait_metrics("three are closed", SOON, |metrics| {
            metrics.sum("client_connections_closed_total", &untrusted) == 3.0
        });
        counterfoil.client().exchange(1, "plain.example.test", qtype::A);
        counterfoil.assert_quiescent();
    }
    assert_eq!(backend.queries(), 2);
}

/// A client of the load balancer that sends a header of its own gets no further.
#[test]
fn a_second_header_is_refused() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let forged = v2("203.0.113.1:1", SERVICE, &[]);
    for header in [v2(CLIENT, SERVICE, &[]), v1(CLIENT, SERVICE)] {
        counterfoil.client_behind(TRUSTED, &[header, forged.clone()].concat()).assert_closed(SOON);
    }
    let untrusted = [("reason", "proxy_untrusted")];
    counterfoil.wait_metrics("both are closed", SOON, |metrics| {
        metrics.sum("client_connections_closed_total", &untrusted) == 2.0
    });
    counterfoil.assert_quiescent();
}

#[test]
fn limits_count_the_address_behind() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address).set("listener", "max_connections_per_client", 2);
    let counterfoil = Counterfoil::start(&config);
    let client_at = |address: &str| counterfoil.client_behind(TRUSTED, &v2(&format!("{address}:4000"), SERVICE, &[]));
    let mut clients: Vec<Client> = ["192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.2"].map(client_at).into();
    for client in &mut clients {
        client.exchange(1, "limits.example.test", qtype::A);
    }
    client_at("192.0.2.1").assert_closed(SOON);
    client_at("192.0.2.2").assert_closed(SOON);
    assert_eq!(counterfoil.refused("per_client"), 2.0);
    clients.push(client_at("192.0.2.3"));
    clients[4].exchange(1, "limits.example.test", qtype::A);
    drop(clients);
    counterfoil.assert_quiescent();
}

/// Who waits for a header counts in total.
#[test]
fn the_total_counts_who_has_not_said_yet() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("server", "max_connections", 4));
    let known = [1, 2].map(|_| counterfoil.client_behind(TRUSTED, &v2(CLIENT, SERVICE, &[])));
    let waiting = [1, 2].map(|_| counterfoil.client_from(TRUSTED));
    counterfoil.client().assert_closed(SOON);
    assert!(counterfoil.refused("max_connections") >= 1.0);
    drop(waiting);
    wait::until("both are gone", SOON, || counterfoil.refused("proxy_closed") == 2.0);
    drop(known);
    counterfoil.client().exchange(1, "room.example.test", qtype::A);
    counterfoil.assert_quiescent();
}

#[test]
fn tlvs_are_passed_on_and_used_in_templates() {
    let backend = FakeBackend::telling();
    let tlvs: &[(u8, &[u8])] = &[(0xe1, b"tenant"), (0xe0, b"second"), (0xe1, b"again"), (0x05, b"unique")];
    let header = v2(CLIENT, SERVICE, tlvs);
    let config = |identity: &str| {
        config(backend.address).identity(identity).tlv(0xe2, "{incoming:0xE1}-{incoming:0xE9}").tlv(0xe3, "{client_ip}")
    };
    let of = |config: &Config| {
        let counterfoil = Counterfoil::start(config);
        let both = (counterfoil.client_behind(TRUSTED, &header).told(), counterfoil.client().told());
        counterfoil.assert_quiescent();
        both
    };
    let passed = "e1=tenant e0=second e1=again";
    let own = "e2=tenant- e3=192.0.2.7";
    let none = "e2=- e3=127.0.0.1";
    let (told, alone) = of(&config("connection"));
    assert_eq!(told, format!("{CLIENT} {SERVICE} {passed} 05=unique {own}"));
    assert!(alone.ends_with(none), "{alone}");
    let (told, alone) = of(&config("address"));
    assert!(told.starts_with("192.0.2.7:0 ") && told.ends_with(&format!(" {passed} {own}")), "{told}");
    assert!(alone.ends_with(none), "{alone}");
    let (told, _) = of(&config("connection").set("pool.proxy_protocol", "pass_incoming_tlvs", "false"));
    assert_eq!(told, format!("{CLIENT} {SERVICE} {own}"));
}

/// Clients of one address and with the same TLVs share, whatever connection they come by; others do not.
#[test]
fn identities_are_those_of_the_client_behind() {
    let backend = FakeBackend::telling();
    let counterfoil = Counterfoil::start(&config(backend.address).identity("address"));
    let mut clients: Vec<Client> = Vec::new();
    for (client, tlv) in [("192.0.2.1:1", "a"), ("192.0.2.1:2", "a"), ("192.0.2.1:3", "b"), ("192.0.2.2:1", "a")] {
        let mut client = counterfoil.client_behind(TRUSTED, &v2(client, SERVICE, &[(0xe0, tlv.as_bytes())]));
        client.told();
        clients.push(client);
    }
    assert_eq!(counterfoil.metrics().sum("backend_connections_opened_total", &[]), 3.0);
    drop(clients);
    counterfoil.assert_quiescent();
}

/// A header that is under way when the process drains still arrives, and what comes with it is answered; nobody who stays
/// silent keeps the process from ending.
#[test]
fn draining_waits_for_headers_but_not_long() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address).set("server", "drain_timeout", "\"4s\"").set(
        "listener.accept_proxy",
        "timeout",
        "\"1h\"",
    );
    let mut counterfoil = Counterfoil::start(&config);
    let header = v2(CLIENT, SERVICE, &[]);
    let _silent = counterfoil.client_from(TRUSTED);
    let mut client = counterfoil.client_behind(TRUSTED, &header[..20]);
    counterfoil.client().exchange(1, "before.example.test", qtype::A);
    counterfoil.process.signal(rustix::process::Signal::TERM);
    counterfoil.process.wait_for_line(SOON, "that it drains", |line| line.contains("draining").then_some(()));
    let query = message::framed(&message::query(1, "late.example.test", qtype::A));
    client.send_raw(&[&header[20..], &query].concat()).unwrap();
    client.receive(SOON).message();
    assert!(counterfoil.process.wait_exit(Duration::from_secs(8)).success());
}

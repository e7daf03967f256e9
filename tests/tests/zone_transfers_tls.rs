//! Zone transfers over TLS (RFC 9103), towards clients and towards backends: the same as without TLS.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Received, Tls};
use counterfoil_tests::fake_backend::{FakeBackend, server_config, tls_versions};
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::servers::Knot;
use counterfoil_tests::zone::Rr::{Soa, Text};
use counterfoil_tests::zone::{self, fetch, kdig, kdig_over_tls, without_ids};

const SOON: Duration = Duration::from_secs(10);
const NAME: &str = "primary.example";
const SERIAL: u32 = 9;
/// So many that a transfer takes dozens of messages.
const HOSTS: usize = 6000;

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon().set("pool", "query_timeout", "\"5s\"")
}

fn ended(counterfoil: &Counterfoil, outcome: &str) -> f64 {
    counterfoil.metrics().sum("transfers_total", &[("outcome", outcome)])
}

/// The same octets over TLS as directly without it, and what kdig prints of them, signed and not.
#[test]
fn knot_to_clients_over_tls() {
    let mut primary = Knot::start(100, HOSTS);
    primary.load(101, HOSTS + 2000);
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(primary.address).tls(&authority.issue("dns", &[NAME])));
    for versions in tls_versions() {
        let tls = Tls::with_versions(&authority.ca, NAME, &[versions]).offering(&["dot"]);
        let mut through = Client::connect_tls(counterfoil.address, None, &tls);
        let mut direct = Client::connect(primary.address, Some([127, 0, 0, 3].into()));
        for (since, soas) in [(None, 2), (Some(100), 4), (Some(101), 1)] {
            let query = zone::query(1, since);
            let expected = without_ids(fetch(&mut direct, &query, soas));
            assert!(
                without_ids(fetch(&mut through, &query, soas)) == expected,
                "{since:?}: not what the primary sends"
            );
        }
        through.exchange(2, &format!("host1.{}", zone::NAME), qtype::A);
    }
    for what in ["AXFR", "IXFR=100", "IXFR=101"] {
        let printed = kdig_over_tls(counterfoil.address, "127.0.0.1", what, &authority.ca, NAME);
        assert_eq!(printed, kdig(primary.address, "127.0.0.3", what, false), "{what}");
    }
    assert_eq!((ended(&counterfoil, "complete"), ended(&counterfoil, "up_to_date")), (6.0, 3.0));
    counterfoil.assert_quiescent();
}

/// 100 MB from a primary that speaks TLS, to a client that reads nothing, then all, with TLS and without: the primary is
/// stopped, memory is bounded, and nobody else waits.
#[test]
fn a_slow_reader_of_a_primary_over_tls() {
    const COUNT: usize = 2000;
    let authority = Authority::new();
    let server = server_config(&authority.issue("primary", &[NAME]), rustls::ALL_VERSIONS);
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let backend = FakeBackend::start(move |connection| {
        if !connection.secure(&server) {
            return;
        }
        while let Some(query) = connection.query() {
            if message::question_name(&query).as_deref() != Some(zone::NAME) {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                continue;
            }
            connection.send(&zone::message(&query, &[Soa(SERIAL)]));
            let text = zone::message(&query, &[Text(50_000)]);
            for _ in 0..COUNT {
                connection.send(&text);
                count.fetch_add(1, Ordering::Relaxed);
            }
            connection.send(&zone::message(&query, &[Soa(SERIAL)]));
        }
    });
    let tls = Tls::new(&authority.ca, NAME);
    for over_tls in [false, true] {
        sent.store(0, Ordering::Relaxed);
        let mut config = config(backend.address).dot(NAME, &authority.ca).set("listener", "write_timeout", "\"60s\"");
        if over_tls {
            config = config.tls(&authority.issue("dns", &[NAME]));
        }
        let counterfoil = Counterfoil::start(&config);
        let connect = || match over_tls {
            true => Client::connect_tls(counterfoil.address, None, &tls),
            false => counterfoil.client(),
        };
        connect().assert_served();
        let before = counterfoil.process.resident_bytes();
        let mut slow = connect();
        slow.send_raw(&message::framed(&zone::query(1, None))).unwrap();
        counterfoil.wait_metrics("the transfer waits", SOON, |metrics| {
            metrics.sum("backend_connections", &[("state", "paused")]) == 1.0
        });
        for _ in 0..50 {
            connect().assert_served();
        }
        assert!(sent.load(Ordering::Relaxed) < COUNT, "the primary was not stopped");
        let query = zone::query(1, None);
        let text = zone::message(&query, &[Text(50_000)]);
        let mut most = 0;
        for number in 0..COUNT + 2 {
            let answer = slow.receive(SOON).message();
            assert!(number == 0 || number == COUNT + 1 || answer == text, "message {number}");
            if number % 100 == 0 {
                most = most.max(counterfoil.process.resident_bytes());
            }
        }
        assert!(most < before + 8 * 1024 * 1024, "TLS {over_tls}: {before} octets before, {most} at most");
        slow.assert_served();
        assert_eq!(ended(&counterfoil, "complete"), 1.0);
        drop(slow);
        counterfoil.assert_quiescent();
    }
}

/// A primary over TLS that ends, with a reset, or with close_notify, or without it, in the middle of a transfer: what came
/// is delivered, then the client's connection ends.
#[test]
fn a_transfer_over_tls_that_breaks_off() {
    const MESSAGES: usize = 20;
    let authority = Authority::new();
    let server = server_config(&authority.issue("primary", &[NAME]), rustls::ALL_VERSIONS);
    let backend = FakeBackend::start(move |connection| {
        if !connection.secure(&server) {
            return;
        }
        let Some(query) = connection.query() else { return };
        connection.send(&zone::message(&query, &[Soa(SERIAL)]));
        for octets in 1..MESSAGES {
            connection.send(&zone::message(&query, &[Text(octets)]));
        }
        // A reset throws away what is not read yet.
        let _ = connection.query_within(Duration::from_millis(300));
        match connection.number % 3 {
            0 => {
                connection.tls().send_close_notify();
                connection.flush_tls();
            }
            1 => connection.reset(),
            _ => {}
        }
    });
    let counterfoil =
        Counterfoil::start(&config(backend.address).dot(NAME, &authority.ca).tls(&authority.issue("dns", &[NAME])));
    let tls = Tls::new(&authority.ca, NAME);
    for number in 1..=3 {
        let mut client = Client::connect_tls(counterfoil.address, None, &tls);
        let query = zone::query(1, None);
        client.send_raw(&message::framed(&query)).unwrap();
        assert_eq!(client.receive(SOON).message(), zone::message(&query, &[Soa(SERIAL)]));
        for octets in 1..MESSAGES {
            assert_eq!(client.receive(SOON).message(), zone::message(&query, &[Text(octets)]));
        }
        let end = client.receive(SOON);
        assert!(matches!(end, Received::Closed), "{end:?}");
        assert_eq!((ended(&counterfoil, "broken"), backend.accepted()), (f64::from(number), number as usize));
    }
    counterfoil.assert_quiescent();
}

//! Spare connections: connected before they are needed, with real servers and with one that does not like them.

use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message;
use counterfoil_tests::servers::{Recursor, Unbound};

const SOON: Duration = Duration::from_secs(10);

fn config(backend: std::net::SocketAddr) -> Config {
    Config::new(backend).set("connections", "spares_per_backend", 3).settles_soon()
}

/// Each client has its own header, so each needs a connection of its own: all but the first get one that was ready.
#[test]
fn clients_get_connections_that_were_ready() {
    let mut recursor = Recursor::start(true);
    let counterfoil = Counterfoil::start(&config(recursor.address).identity("connection").tlv(0xe0, "{qname_label:1}"));
    for n in 0..50 {
        let name = |_| format!("n{n}.example.test");
        let mut client = counterfoil.client_from(&format!("127.0.0.{}", 2 + n));
        Load { name: &name, ..Load::default() }.run(&mut client).assert_all_answered(1);
        let seen = recursor.seen(&name(0));
        assert_eq!((seen.source, seen.tlvs), (format!("127.0.0.{}", 2 + n), vec![format!("e0=n{n}")]));
    }
    let metrics = counterfoil.metrics();
    assert!(metrics.sum("pool_acquire_total", &[("result", "spare")]) >= 45.0);
    assert_eq!(metrics.sum("pool_retries_total", &[]), 0.0);
    counterfoil.assert_quiescent();
}

/// Idle within their timeout they are no finding, and beyond it they are gone.
#[test]
fn the_watchdog_knows_them() {
    let unbound = Unbound::start(false);
    let config = config(unbound.address)
        .identity("address")
        .set("connections", "spare_idle_timeout", "\"4s\"")
        .set("watchdog", "interval", "\"100ms\"")
        .set("watchdog", "grace", "\"300ms\"")
        .set("watchdog", "reap", "\"on\"");
    let counterfoil = Counterfoil::start(&config);
    Load::default().run(&mut counterfoil.client()).assert_all_answered(1);
    let spare = [("kind", "spare")];
    counterfoil.wait_metrics("three are ready", SOON, |metrics| metrics.sum("backend_connections", &spare) == 3.0);
    let sweeps = counterfoil.metrics().sum("watchdog_sweeps_total", &[]);
    counterfoil.wait_metrics("twenty sweeps", SOON, |metrics| {
        assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0);
        metrics.sum("watchdog_sweeps_total", &[]) >= sweeps + 20.0
    });
    counterfoil.wait_metrics("they go", SOON, |metrics| metrics.sum("backend_connections", &[]) == 0.0);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("reaped_total", &[]), 0.0);
}

/// It closes every connection on which nothing comes within 20 ms.
#[test]
fn a_backend_that_closes_what_is_idle_is_not_stormed_and_no_query_suffers() {
    let backend = FakeBackend::start(|connection| {
        let mut patience = Duration::from_millis(20);
        while let Ok(Some(query)) = connection.query_within(patience) {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            patience = Duration::from_secs(20);
        }
    });
    let config = config(backend.address).backend_key("max_in_flight", 1).set("connections", "max_idle_per_backend", 0);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let outcome = Load { count: 80, rate: Some(20.0), ..Load::default() }.run(&mut client);
    outcome.assert_all_answered(80);
    let metrics = counterfoil.metrics();
    let opened = |kind: &str| metrics.sum("backend_connections_opened_total", &[("kind", kind)]);
    assert!(opened("shared") + opened("spare") >= 80.0, "each query needed a connection");
    let unused = opened("spare") - metrics.sum("pool_acquire_total", &[("result", "spare")]);
    // Without holding back it would be 240: queries come further apart than it waits.
    assert!(unused <= 40.0, "{unused} spare connections were closed unused in {:?}", outcome.elapsed);
    drop(client);
    counterfoil.assert_quiescent();
    assert!(backend.accepted() > 0);
}

#[test]
fn they_stay_below_the_limit_of_the_backend() {
    let backend = FakeBackend::answering(true);
    let config = config(backend.address).identity("connection").backend_key("max_connections", 5);
    let counterfoil = Counterfoil::start(&config);
    let mut clients: Vec<_> = (0..5).map(|_| counterfoil.client()).collect();
    for client in &mut clients {
        Load { count: 3, ..Load::default() }.run(client).assert_all_answered(3);
    }
    assert!(backend.most_open() <= 5, "{}", backend.most_open());
    drop(clients);
    counterfoil.assert_quiescent();
    let (ok, shown) = counterfoil.ctl(&["show", "backends"], SOON);
    assert!(ok, "{shown}");
}

/// No handshake comes about for those that were opened in advance: seen without a write, and nobody waits for one.
#[test]
fn spare_connections_that_are_refused_are_seen() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address).backend_key("max_in_flight", 1).set("connections", "idle_timeout", "\"20s\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    Load { count: 2, ..Load::default() }.run(&mut client).assert_all_answered(2);
    counterfoil.wait_metrics("the spare ones have gone", SOON, |metrics| {
        metrics.sum("backend_connections", &[("kind", "spare")]) == 0.0
    });
    backend.refuse();
    // The open connection takes one of two at a time, so another one is needed.
    let outcome = Load { count: 20, in_flight: 2, ..Load::default() }.run(&mut client);
    assert_eq!(outcome.answered + outcome.failed.values().sum::<usize>(), 20, "{outcome:?}");
    assert!(outcome.answered >= 1, "those on the open connection: {outcome:?}");
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("backend_connections", &[("state", "connecting")]), 0.0);
    assert!(metrics.sum("backend_connect_failures_total", &[]) >= 2.0);
}

//! `[connections]`: how long backend connections live, how many stay, how many a client may open.

use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(5);

/// Asks one query after the other for so long; all must be answered. How many there were.
fn ask_for(client: &mut Client, time: Duration) -> usize {
    let start = Instant::now();
    let mut asked = 0;
    while start.elapsed() < time {
        Load::default().run(client).assert_all_answered(1);
        asked += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    asked
}

/// An old connection is replaced, in use or not, and no query is lost with it.
#[test]
fn max_age_replaces_connections_without_loss() {
    for (identity, reason) in [("connection", "owned"), ("address", "keyed")] {
        let backend = FakeBackend::answering(true);
        let config = Config::new(backend.address).identity(identity).set("connections", "max_age", "\"500ms\"").set(
            "connections",
            "cleanup_interval",
            "\"50ms\"",
        );
        let counterfoil = Counterfoil::start(&config.set("connections", "idle_timeout", "\"2s\""));
        let mut client = counterfoil.client();
        ask_for(&mut client, Duration::from_millis(2500));
        assert!((3..=8).contains(&backend.accepted()), "{identity}: {} connections in 2.5 s", backend.accepted());
        let metrics = counterfoil.metrics();
        assert!(metrics.sum("backend_connections_closed_total", &[("reason", "max_age")]) >= 2.0);
        assert_eq!(metrics.sum("backend_connections_opened_total", &[("kind", reason)]), backend.accepted() as f64);
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// Every kind is walked: an owned connection goes when it is idle, though its client stays; and so does a keyed one.
#[test]
fn idle_timeout_holds_for_every_kind() {
    for (identity, kind) in [(None, "shared"), (Some("address"), "keyed"), (Some("connection"), "owned")] {
        let backend = FakeBackend::answering(identity.is_some());
        let config = Config::new(backend.address).set("connections", "idle_timeout", "\"400ms\"").set(
            "connections",
            "cleanup_interval",
            "\"50ms\"",
        );
        let counterfoil = Counterfoil::start(&identity.into_iter().fold(config, Config::identity));
        let mut client = counterfoil.client();
        Load::default().run(&mut client).assert_all_answered(1);
        let asked = Instant::now();
        wait::until("the idle connection goes", SOON, || counterfoil.backend_sockets(backend.address).is_empty());
        let lived = asked.elapsed();
        assert!(lived >= Duration::from_millis(300) && lived < Duration::from_secs(2), "{kind}: {lived:?}");
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("client_connections", &[]), 1.0, "its client is still there");
        assert_eq!(metrics.sum("backend_connections_opened_total", &[("kind", kind)]), 1.0);
        assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "idle_timeout")]), 1.0);
        Load::default().run(&mut client).assert_all_answered(1);
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// What a client owned goes with it at once.
#[test]
fn owned_connections_end_with_their_client() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("connection").tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let name = |n: usize| format!("set{}.example.test", n % 4);
    Load { count: 40, name: &name, ..Load::default() }.run(&mut client).assert_all_answered(40);
    assert_eq!(counterfoil.backend_sockets(backend.address).len(), 4);
    drop(client);
    wait::until("all four are gone", Duration::from_secs(1), || {
        counterfoil.backend_sockets(backend.address).is_empty()
    });
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("backend_connections_closed_total", &[("reason", "owner_gone")]), 4.0);
}

#[test]
fn max_idle_per_backend_holds() {
    const IDLE: usize = 3;
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address)
        .identity("address")
        .tlv(0xe0, "{qname_label:1}")
        .set("connections", "max_idle_per_backend", IDLE)
        .set("connections", "idle_timeout", "\"3s\"")
        .set("connections", "cleanup_interval", "\"50ms\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let name = |n: usize| format!("set{n}.example.test");
    Load { count: 20, in_flight: 20, name: &name, ..Load::default() }.run(&mut client).assert_all_answered(20);
    wait::until("no more than may be idle", SOON, || counterfoil.backend_sockets(backend.address).len() == IDLE);
    assert_eq!(counterfoil.metrics().sum("backend_connections_closed_total", &[("reason", "excess_idle")]), 17.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// A client that needs a connection per query gets so many a second, and others get theirs.
#[test]
fn max_opens_per_client_holds() {
    const OPENS: usize = 10;
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("connection").tlv(0xe0, "{uuid}").set(
        "connections",
        "max_opens_per_client",
        OPENS,
    );
    let counterfoil = Counterfoil::start(&config);
    let mut greedy = counterfoil.client_from("127.0.0.2");
    let outcome = Load { count: 100, in_flight: 5, ..Load::default() }.run(&mut greedy);
    assert!(outcome.ended.is_none() && outcome.foreign.is_empty(), "{outcome:?}");
    // The limit is per second, and the burst may fall into two of them, or more on a slow machine.
    let most = OPENS * (2 + outcome.elapsed.as_secs() as usize);
    assert!((OPENS..=most).contains(&outcome.answered), "{outcome:?}");
    assert_eq!(outcome.answered, backend.accepted());
    Load { count: 5, ..Load::default() }.run(&mut counterfoil.client_from("127.0.0.3")).assert_all_answered(5);
    drop(greedy);
    counterfoil.assert_quiescent();
}

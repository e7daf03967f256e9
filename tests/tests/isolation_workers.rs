//! Workers share a backend's places: what is busy in one makes way for what waits in another.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::servers::{Unbound, ZONE};

/// So many single queries, each over a connection of its own: with two workers, some come to each.
const SINGLES: u8 = 24;

/// An attacker keeps a backend's places busy from one connection or a few, which are some worker's; others ask once each.
fn single_queries(setting: Setting, backend: SocketAddr, places: usize, busy: u8, served: &AtomicUsize) {
    let scene = Scene::new(setting);
    let config = scene.config(backend).set("server", "workers", 2).backend_key("max_connections", places);
    let counterfoil = Counterfoil::start(&config);
    let sources = (1..=busy).map(|number| IpAddr::from(Ipv4Addr::new(127, 2, 0, number)));
    // More than fits on a connection: none of the attacker's is idle for a moment.
    let flood = scene.flood(&counterfoil, sources, 64, "flood");
    let begun = |metrics: &counterfoil_tests::metrics::Metrics| metrics.sum("answers_total", &[]) > 100.0;
    counterfoil.wait_metrics("the flood is served", Duration::from_secs(20), begun);
    let mut longest = 0;
    for number in 0..SINGLES {
        let mut client = scene.connect(counterfoil.address, IpAddr::from(Ipv4Addr::new(127, 1, 0, 1)));
        let before = served.load(Ordering::SeqCst);
        let answer = client.exchange(1, &format!("single{number}.{ZONE}"), qtype::A);
        longest = longest.max(served.load(Ordering::SeqCst) - before);
        assert_eq!(message::response_code(&answer), rcode::NOERROR, "{setting:?}: query {number}");
    }
    drop(flood);
    // A turn and what is in flight at its end, for each that has a place; as much again while a thread is not scheduled.
    assert!(longest <= 2 * places * (16 + 2 * 32), "{setting:?}: {longest}");
    counterfoil.assert_quiescent();
}

fn one_place(setting: Setting) {
    let served = Arc::new(AtomicUsize::new(0));
    let (counter, has_header) = (Arc::clone(&served), setting.identity.is_some());
    let backend = FakeBackend::start(move |connection| {
        if has_header && connection.header().is_none() {
            return;
        }
        while let Some(query) = connection.query() {
            // So much at a time that an idle moment is rare.
            std::thread::sleep(Duration::from_millis(1));
            counter.fetch_add(1, Ordering::SeqCst);
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    single_queries(setting, backend.address, 1, 1, &served);
}

#[test]
fn a_worker_that_has_the_one_place_busy_gives_it_up_in_turn() {
    one_place(Setting::SHARED);
    one_place(Setting::identity("connection"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_a_worker_that_has_the_one_place_busy_gives_it_up_in_turn() {
    Setting::all().for_each(one_place);
}

/// Unbound's default of ten places, with more busy clients than that.
#[test]
fn unbounds_ten_places_are_shared_between_workers() {
    let unbound = Unbound::start(false);
    single_queries(Setting::identity("connection"), unbound.address, 10, 12, &AtomicUsize::new(0));
}

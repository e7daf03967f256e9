//! The queue at a cap, and a backend's places: turns go by client.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::fake_backend::{Connection, FakeBackend};
use counterfoil_tests::isolation::{Neighbours, Scene, Setting};
use counterfoil_tests::message;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(20);

/// Good clients.
const NEIGHBOURS: u8 = 4;

/// What each of them is to be answered while the attack goes on.
const ANSWERS: usize = 30;

/// The one address that the attacker has.
const ATTACKER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 66));

/// Answers in order, and counts what it has served of the names that the attacker asks for, each of which takes its time:
/// so many milliseconds, and up to as many more, which differ from one to the next.
fn serve(connection: &mut Connection, has_header: bool, served: &AtomicUsize, slow: u64) {
    if has_header && connection.header().is_none() {
        return;
    }
    while let Some(query) = connection.query() {
        if message::question_name(&query).is_some_and(|name| name.starts_with("flood")) {
            let more = query.iter().fold(0, |hash: u64, octet| hash.wrapping_mul(31).wrapping_add(u64::from(*octet)));
            std::thread::sleep(Duration::from_millis(slow + more % (slow + 1)));
            served.fetch_add(1, Ordering::SeqCst);
        }
        connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
    }
}

/// All neighbours have been answered often enough.
#[track_caller]
fn wait_for_answers(neighbours: &Neighbours) {
    let enough = usize::from(NEIGHBOURS) * ANSWERS;
    let answered = || neighbours.answered() >= enough;
    wait::until("the neighbours have been answered", 3 * SOON, answered);
}

/// 14 connections of one address, each with 150 queries in flight, at a backend with two places: more than may wait.
fn a_flood_from_one_address(setting: Setting) {
    let scene = Scene::new(setting);
    let served = Arc::new(AtomicUsize::new(0));
    let (counter, has_header) = (Arc::clone(&served), scene.has_header());
    let backend = FakeBackend::start(move |connection| serve(connection, has_header, &counter, 1));
    let config = scene
        .config(backend.address)
        .set("listener", "max_in_flight", 150)
        .backend_key("max_connections", 2)
        // Under `connection` each neighbour needs a place of its own, and there are two.
        .set("connections", "max_wait", "\"4s\"");
    let counterfoil = Counterfoil::start(&config);
    let flood = scene.flood(&counterfoil, [ATTACKER; 14], 150, "flood");
    counterfoil.wait_metrics("the queue is full", SOON, |metrics| {
        metrics.sum("queries_failed_total", &[("reason", "no_capacity")]) > 0.0
    });
    let neighbours = scene.neighbours(&counterfoil, NEIGHBOURS, &served);
    wait_for_answers(&neighbours);
    let wait = neighbours.finish();
    drop(flood);
    assert_eq!(wait.failed, 0, "{setting:?}: {wait:?}");
    // What is in flight on both connections, for each of those who take turns with the attacker, twice.
    assert!(wait.longest <= 2 * 2 * 32 * usize::from(NEIGHBOURS + 1), "{setting:?}: {wait:?}");
    counterfoil.assert_quiescent();
}

#[test]
fn one_address_with_many_connections_has_one_turn() {
    a_flood_from_one_address(Setting::SHARED);
    a_flood_from_one_address(Setting::identity("connection"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_one_address_with_many_connections_has_one_turn() {
    Setting::all().for_each(a_flood_from_one_address);
}

/// One address asks for slow names, each of which takes a connection of its own, and has all places but those of the others.
fn slow_names_from_one_address(setting: Setting) {
    const PLACES: usize = 32;
    let scene = Scene::new(setting);
    let served = Arc::new(AtomicUsize::new(0));
    let (counter, has_header) = (Arc::clone(&served), scene.has_header());
    let backend = FakeBackend::start(move |connection| serve(connection, has_header, &counter, 700));
    let config = scene
        .config(backend.address)
        .tlv(0xe0, "{qname_label:1}")
        .set("connections", "max_owned_per_client", 64)
        .backend_key("max_connections", PLACES);
    let counterfoil = Counterfoil::start(&config);
    let flood = scene.flood(&counterfoil, [ATTACKER; 20], 20, "flood");
    counterfoil.wait_metrics("all places are taken", SOON, |metrics| metrics.sum("queries_waiting", &[]) > 0.0);
    let neighbours = scene.neighbours(&counterfoil, NEIGHBOURS, &served);
    wait_for_answers(&neighbours);
    let wait = neighbours.finish();
    drop(flood);
    assert_eq!(wait.failed, 0, "{setting:?}: {wait:?}");
    // Each gets one of the places that come free next, and keeps it; as much again while threads are not scheduled. By
    // connection it would be the turn of all the attacker's before.
    assert!(wait.longest <= 3 * usize::from(NEIGHBOURS), "{setting:?}: {wait:?}");
    counterfoil.assert_quiescent();
}

#[test]
fn slow_names_of_one_address_leave_others_the_next_place() {
    slow_names_from_one_address(Setting::identity("address"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_slow_names_of_one_address_leave_others_the_next_place() {
    Setting::all().filter(|setting| setting.identity.is_some()).for_each(slow_names_from_one_address);
}

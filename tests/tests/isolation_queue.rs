//! The queue at a cap, and a backend's places: turns go by client.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::fake_backend::{Connection, FakeBackend};
use counterfoil_tests::isolation::{Neighbours, Scene, Setting};
use counterfoil_tests::message::{self, qtype, rcode};
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

/// Until it is open, nothing that is held is answered.
#[derive(Default)]
struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
    /// Queries that have come to it.
    held: AtomicUsize,
}

impl Gate {
    fn open(&self) {
        *self.is_open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    fn pass(&self) {
        self.held.fetch_add(1, Ordering::SeqCst);
        let is_open = self.is_open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(is_open, |is_open| !*is_open));
    }
}

/// Opens a gate when a test ends, however that is: a backend waits for what it has to answer.
struct Opens<'a>(&'a Gate);

impl Drop for Opens<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// One address asks for names, each of which takes a connection of its own, and none of which is answered. Beside it, and
/// beside a client that was there before, those who come anew are served while nothing comes free.
fn names_that_are_not_answered(setting: Setting) {
    const PLACES: usize = 32;
    let scene = Scene::new(setting);
    let gate = Arc::new(Gate::default());
    let at_gate = Arc::clone(&gate);
    let backend = FakeBackend::start(move |connection| {
        if connection.header().is_none() {
            return;
        }
        while let Some(query) = connection.query() {
            if message::question_name(&query).is_some_and(|name| name.starts_with("flood") || name.starts_with("held"))
            {
                at_gate.pass();
            }
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let opens = Opens(&gate);
    let config = scene
        .config(backend.address)
        .tlv(0xe0, "{qname_label:1}")
        .set("pool", "query_timeout", "\"60s\"")
        .set("connections", "max_wait", "\"60s\"")
        .set("connections", "max_owned_per_client", 64)
        .backend_key("max_connections", PLACES);
    let counterfoil = Counterfoil::start(&config);
    let client = |number| scene.connect(counterfoil.address, IpAddr::V4(Ipv4Addr::new(127, 1, 0, number)));
    let mut clients = vec![client(1)];
    clients[0].ask(1, "held1.example.test", qtype::A);
    wait::until("somebody else has a place", SOON, || gate.held.load(Ordering::SeqCst) == 1);
    let flood = scene.flood(&counterfoil, [ATTACKER; 4], 100, "flood");
    // What it does not get waits: with 24 places there are fewer than 24 / 4 + 1 left.
    let waits = |metrics: &counterfoil_tests::metrics::Metrics| metrics.sum("queries_waiting", &[]) >= 400.0 - 24.0;
    counterfoil.wait_metrics("the flood waits", SOON, waits);
    wait::until("the flood has its share", SOON, || gate.held.load(Ordering::SeqCst) == 1 + 24);
    // Each has an address of its own, and keeps its place.
    for number in 2..=8 {
        let mut client = client(number);
        client.ask(1, &format!("held{number}.example.test"), qtype::A);
        let held = 24 + usize::from(number);
        wait::until("a client has a place at once", SOON, || gate.held.load(Ordering::SeqCst) == held);
        clients.push(client);
    }
    assert_eq!(counterfoil.metrics().sum("queries_waiting", &[]), 400.0 - 24.0, "{setting:?}: nothing came free");
    drop(opens);
    for client in &mut clients {
        let answer = client.receive(SOON).message();
        assert_eq!(message::response_code(&answer), rcode::NOERROR, "{setting:?}");
    }
    drop(flood);
    drop(clients);
    counterfoil.assert_quiescent();
}

#[test]
fn names_of_one_address_that_are_not_answered_leave_places_for_others() {
    names_that_are_not_answered(Setting::identity("address"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_names_of_one_address_that_are_not_answered_leave_places_for_others() {
    Setting::all().filter(|setting| setting.identity.is_some()).for_each(names_that_are_not_answered);
}

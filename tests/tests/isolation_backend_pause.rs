//! The pauses in which a backend is given no new connections: clients that it turns away, and shortages of this host, cost
//! others no answer, see docs/isolation.md.
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Received};
use counterfoil_tests::failing::Failing;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::servers::Recursor;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(20);

/// So many clients are turned away, in so many rounds; the neighbours are inside.
fn turned_away(setting: Setting, clients: u8, rounds: u16) {
    let scene = Scene::new(setting);
    let recursor = Recursor::start_for(false, "127.1.0.0/16");
    let counterfoil = Counterfoil::start(&scene.config(recursor.address));
    let served = Arc::new(AtomicUsize::new(0));
    let neighbours = scene.neighbours(&counterfoil, 1, &served);
    let source = |number| IpAddr::from(Ipv4Addr::new(127, 3, 0, number));
    let mut outside: Vec<Client> =
        (1..=clients).map(|number| scene.connect(counterfoil.address, source(number))).collect();
    for round in 0..rounds {
        let before = neighbours.answered();
        // One after the other: each is a failure of its own.
        for client in &mut outside {
            let answer = client.exchange(round, "n.example.test", qtype::A);
            assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
            served.fetch_add(1, Ordering::SeqCst);
        }
        // A client that comes new is inside as well: it needs a connection of its own, and gets one.
        let mut new = scene.connect(counterfoil.address, IpAddr::from(Ipv4Addr::new(127, 1, 1, round as u8)));
        let answer = new.exchange(1, "new.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::NOERROR, "{setting:?}, round {round}");
        wait::until("the neighbour is served", SOON, || neighbours.answered() >= before + 5);
    }
    let wait = neighbours.finish();
    println!("{setting:?}, {clients} turned away: {wait:?}");
    assert_eq!(wait.failed, 0, "{setting:?}, {clients} turned away: {wait:?}");
    assert!(wait.longest <= 2 * usize::from(clients), "{wait:?}: two rounds at most");
    drop(outside);
    counterfoil.assert_quiescent();
}

#[test]
fn however_many_a_backend_turns_away_who_is_answered_goes_on() {
    for clients in [25, 200] {
        turned_away(Setting::identity("connection"), clients, 12);
    }
}

#[test]
#[ignore = "soak"]
fn soak_isolation_of_clients_that_are_turned_away() {
    // Only where the backend knows the client.
    let knows = |setting: &Setting| matches!(setting.identity, Some("connection" | "address" | "subnet"));
    // (127.3.0.0/24 is one network, and one client to the backend.)
    Setting::all().filter(knows).for_each(|setting| turned_away(setting, 200, 12));
}

/// No descriptor for a connection to a backend: whoever needs one waits as at a cap, the backend is not blamed, and as soon
/// as there is one it is used.
#[test]
fn a_shortage_of_this_host_is_not_the_backends() {
    for error in ["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EADDRNOTAVAIL", "EAGAIN"] {
        let call = if error.starts_with("EA") { "connect" } else { "socket" };
        let backend = FakeBackend::answering(true);
        let config = Scene::new(Setting::identity("connection")).config(backend.address);
        let config = config
            .set("connections", "max_wait", "\"20s\"")
            .set("connections", "idle_timeout", "\"30s\"")
            .set("pool", "query_timeout", "\"20s\"")
            .backend_key("health.mode", "\"lazy\"")
            .backend_key("health.fall", 1);
        let counterfoil = Counterfoil::start(&config);
        let mut settled = counterfoil.client();
        settled.assert_served();
        let failing = Failing::every(counterfoil.pid(), "worker-0", &[call], error);
        let mut waiting: Vec<Client> = (0..20).map(|_| counterfoil.client()).collect();
        waiting.iter_mut().for_each(|client| client.ask(1, "n.example.test", qtype::A));
        counterfoil
            .wait_metrics("it was tried in vain", SOON, |metrics| metrics.sum("backend_shortages_total", &[]) >= 10.0);
        settled.assert_served();
        for client in &mut waiting {
            assert_eq!(client.receive(Duration::from_millis(1)), Received::Nothing, "{error}");
        }
        let failed = failing.end();
        for client in &mut waiting {
            assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::NOERROR, "{error}: {failed:?}");
        }
        let metrics = counterfoil.metrics();
        let booked = ["backend_connect_failures_total", "queries_failed_total", "backend_health_checks_total"];
        assert_eq!(booked.map(|name| metrics.sum(name, &[])), [0.0; 3], "{error}: nothing of it is the backend's");
        drop((settled, waiting));
        counterfoil.assert_quiescent();
    }
}

//! Bugs that other programs had with connections, descriptors, counters and memory that never came back: none of them is
//! here. docs/regressions.md tells what happened there.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::{Connection, FakeBackend};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::sockets::{self, Sampler};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend)
        .set("connections", "idle_timeout", "\"500ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .set("pool", "query_timeout", "\"1s\"")
        .set("pool", "retries", 0)
}

/// The leftmost label of the question.
fn label(query: &[u8]) -> String {
    message::question_name(query).unwrap().split('.').next().unwrap().to_owned()
}

fn answer(connection: &mut Connection, query: &[u8]) {
    connection.send(&message::answer_to(query, [192, 0, 2, 53]));
}

/// CVE-2022-0396 (BIND): clients that have sent FIN, after queries that nobody answers or in the middle of a message, are
/// not held in CLOSE_WAIT.
#[test]
fn cve_2022_0396_no_client_stays_in_close_wait() {
    let backend = FakeBackend::start(|connection| connection.wait_closed());
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "message_timeout", "\"1s\""));
    let mut clients: Vec<Client> = (0..40).map(|_| counterfoil.client()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        let query = message::framed(&message::query(1, &format!("n{n}.example.test"), qtype::A));
        match n % 4 {
            0 => client.send_raw(&query).unwrap(),
            1 => client.send_raw(&[&query[..], &query[..7]].concat()).unwrap(),
            2 => client.send_raw(&query[..1]).unwrap(),
            _ => client.send_raw(&query.repeat(50)).unwrap(),
        }
        client.finish_sending();
    }
    for (n, client) in clients.iter_mut().enumerate() {
        let answers = [1, 1, 0, 50][n % 4];
        for _ in 0..answers {
            assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::SERVFAIL);
        }
        client.assert_closed(SOON);
    }
    let held = |client: &Client| !sockets::towards(counterfoil.pid(), client.local_addr().port()).is_empty();
    wait::until("none is held", SOON, || !clients.iter().any(held));
    counterfoil.assert_quiescent();
}

/// sqlx #4349, dnsdist 8f43e65efe, HAProxy 5f713c03b: a place under a limit comes back however its connection ends: closed,
/// reset, silent, in breach of the protocol, in the middle of an answer, with its client, or never opened.
#[test]
fn sqlx_4349_places_come_back_however_a_connection_ends() {
    let backend = FakeBackend::start(|connection| {
        let Some(_) = connection.header() else { return };
        while let Some(query) = connection.query() {
            match label(&query).as_str() {
                "closes" => return,
                "resets" => return connection.reset(),
                "silent" => return connection.wait_closed(),
                "half" => return connection.send_raw(&[0, 100, query[0], query[1]]),
                "breaches" => connection.send(&query),
                _ => answer(connection, &query),
            }
        }
    });
    let config = config(backend.address)
        .identity("connection")
        .set("connections", "max_wait", "\"5s\"")
        .set("pool", "query_timeout", "\"5s\"")
        .backend_key("max_connections", 2);
    let counterfoil = Counterfoil::start(&config);
    for mode in ["closes", "resets", "silent", "half", "breaches", "leaves"] {
        for _ in 0..3 {
            let mut clients = [counterfoil.client(), counterfoil.client()];
            for client in &mut clients {
                client.ask(1, &format!("{mode}.example.test"), qtype::A);
            }
            if mode != "silent" && mode != "leaves" {
                for client in &mut clients {
                    assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::SERVFAIL, "{mode}");
                }
            }
            // Those of silent backends are given up with their clients.
            clients.into_iter().for_each(Client::reset);
            // Both places are there again.
            let mut clients = [counterfoil.client(), counterfoil.client()];
            for client in &mut clients {
                let answer = client.exchange(2, "works.example.test", qtype::A);
                assert_eq!(message::response_code(&answer), rcode::NOERROR, "after {mode}");
            }
        }
    }
    backend.refuse();
    for _ in 0..5 {
        let answer = counterfoil.client().exchange(3, "refused.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    }
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!((metrics.sum("total_connections", &[]), metrics.sum("backend_connections", &[])), (0.0, 0.0));
}

/// dnsdist b64d86f9e9: clients leave, then the backend that worked for them closes. Its count of unanswered queries is zero
/// again: it gets its share.
#[test]
fn dnsdist_b64d86f9e9_counts_are_right_when_client_and_backend_both_leave() {
    let close = Arc::new(AtomicBool::new(false));
    let closes = Arc::clone(&close);
    let dies = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            if label(&query) == "held" {
                wait::poll(SOON, || closes.load(Ordering::SeqCst).then_some(()));
                return;
            }
            answer(connection, &query);
        }
    });
    let lives = FakeBackend::answering(false);
    let config = config(dies.address)
        .backend(lives.address, &[])
        .set("pool", "query_timeout", "\"20s\"")
        .backend_key("max_in_flight", 4);
    let counterfoil = Counterfoil::start(&config);
    let mut clients: Vec<Client> = (0..40).map(|_| counterfoil.client()).collect();
    for client in &mut clients {
        client.ask(1, "held.example.test", qtype::A);
    }
    // Half of them went to the other one, and are answered.
    counterfoil.wait_metrics("all are sent", SOON, |m| m.sum("backend_queries_total", &[]) == 40.0);
    wait::until("some are held", SOON, || dies.open() > 1);
    clients.into_iter().for_each(Client::reset);
    counterfoil.wait_metrics("they have left", SOON, |m| m.sum("client_connections", &[]) == 0.0);
    close.store(true, Ordering::SeqCst);
    wait::until("the backend has closed", SOON, || dies.open() == 0);
    counterfoil
        .wait_metrics("that is seen", SOON, |m| m.sum("backend_connections", &[("backend", "backend-0")]) == 0.0);
    let before = [dies.queries(), lives.queries()];
    Load { count: 100, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(100);
    let share = [dies.queries() - before[0], lives.queries() - before[1]];
    assert!(share.iter().all(|share| (40..=60).contains(share)), "{share:?}");
    counterfoil.assert_quiescent();
}

/// HAProxy 87b96cf3a, 3aab17bd5, 9481cef94: connections change hands all the time, from spare to owned, from one client's
/// header to another's, from idle to closed for somebody else's sake. The limits hold, nothing is counted twice or not at
/// all, and no connection is used by the wrong one.
#[test]
fn haproxy_87b96cf3a_counts_hold_when_connections_change_hands() {
    let backend = FakeBackend::start(|connection| {
        let Some(header) = connection.header() else { return };
        while let Some(query) = connection.query() {
            assert_eq!(header.tlvs, [(0xe0, label(&query).into_bytes())]);
            answer(connection, &query);
        }
    });
    let config = config(backend.address)
        .identity("connection")
        .tlv(0xe0, "{qname_label:1}")
        .set("connections", "spares_per_backend", 2)
        .set("connections", "max_owned_per_client", 2)
        .set("connections", "max_total", 8)
        .set("connections", "max_wait", "\"5s\"")
        .set("pool", "query_timeout", "\"8s\"")
        .backend_key("max_connections", 6);
    let counterfoil = Counterfoil::start(&config);
    let sampler = Sampler::start(counterfoil.pid(), backend.address.port());
    std::thread::scope(|scope| {
        for thread in 0..6_u64 {
            let counterfoil = &counterfoil;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(thread);
                for _ in 0..12 {
                    let mut client = counterfoil.client();
                    let sets = random.usize(1..5);
                    let name = |n: usize| format!("set{}.n{n}.c{thread}.example.test", n % sets);
                    let load = Load { count: 15, in_flight: random.usize(1..4), name: &name, ..Load::default() };
                    load.run(&mut client).assert_all_answered(15);
                    if random.bool() {
                        client.ask(99, "set0.left.example.test", qtype::A);
                        client.reset();
                    }
                }
            });
        }
    });
    let observed = sampler.finish();
    assert!(observed.most <= 6, "{observed:?}");
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("total_connections", &[]), 0.0);
}

/// CVE-2026-33594 (dnsdist): queries for a backend that can't keep up do not pile up. What waits is bounded, each gets its
/// end in time, and memory stays where it is.
#[test]
fn cve_2026_33594_queries_for_an_overloaded_backend_do_not_pile_up() {
    const CLIENTS: usize = 20;
    const QUERIES: u16 = 400;
    let backend = FakeBackend::start(|connection| connection.wait_closed());
    let config = config(backend.address)
        .set("connections", "max_waiting", 50)
        .set("connections", "max_wait", "\"300ms\"")
        .backend_key("max_connections", 2)
        .backend_key("max_in_flight", 10);
    let counterfoil = Counterfoil::start(&config);
    let before = counterfoil.process.resident_bytes();
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| counterfoil.client()).collect();
    for client in &mut clients {
        let queries: Vec<u8> =
            (0..QUERIES).flat_map(|id| message::framed(&message::query(id, "slow.example.test", qtype::A))).collect();
        client.send_raw(&queries).unwrap();
    }
    let mut most = 0.0_f64;
    for client in &mut clients {
        for _ in 0..QUERIES {
            assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::SERVFAIL);
        }
        let metrics = counterfoil.metrics();
        most = most.max(metrics.sum("queries_waiting", &[]));
        assert!(metrics.sum("backend_connections", &[]) <= 2.0);
    }
    assert!(most <= 50.0, "{most} wait");
    let grown = counterfoil.process.resident_bytes().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} octets of memory");
    drop(clients);
    counterfoil.assert_quiescent();
}

/// CVE-2024-33655 (DNSBomb): answers are not saved up and let go at once. Each is passed on when it comes, and a query that
/// waits for longer than `max_wait` has had its answer by then.
#[test]
fn cve_2024_33655_answers_are_not_saved_up() {
    let go = Arc::new(AtomicBool::new(false));
    let gone = Arc::clone(&go);
    let backend = FakeBackend::start(move |connection| {
        let mut held: Vec<Vec<u8>> = Vec::new();
        while let Some(query) = connection.query() {
            if label(&query) == "slow" {
                held.push(query);
            } else {
                answer(connection, &query);
            }
            if held.len() == 50 {
                wait::poll(SOON, || gone.load(Ordering::SeqCst).then_some(()));
                for query in held.drain(..) {
                    answer(connection, &query);
                }
            }
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).backend_key("max_in_flight", 100));
    let mut client = counterfoil.client();
    for id in 0..49 {
        client.ask(id, "slow.example.test", qtype::A);
    }
    for id in 100..110 {
        client.ask(id, "fast.example.test", qtype::A);
        assert_eq!(message::id(&client.receive(SOON).message()), id, "at once, not with the slow ones");
    }
    client.ask(49, "slow.example.test", qtype::A);
    for _ in 0..50 {
        assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::SERVFAIL, "at its timeout");
    }
    go.store(true, Ordering::SeqCst);
    // All 50 come from the backend in one burst, and go to nobody.
    client.exchange(200, "fast.example.test", qtype::A);
    assert_eq!(client.receive(Duration::from_millis(50)), Received::Nothing);
    drop(client);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("answers_total", &[]), 11.0);
}

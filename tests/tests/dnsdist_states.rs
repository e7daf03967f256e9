//! More of what dnsdist's own tests ask, mostly of the state machine of its TCP connections, asked of this program from
//! outside: whoever is slow, blocked or gone at an awkward moment. docs/dnsdist.md has all behaviours.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);
const FORMERR: u8 = 1;

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon().set("pool", "query_timeout", "\"2s\"")
}

/// Answers of 64 KiB to all names but `silent`, which gets none.
fn large() -> FakeBackend {
    FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            if message::question_name(&query).is_none_or(|name| name.starts_with("silent")) {
                continue;
            }
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            answer.resize(65_535, 0);
            connection.send(&answer);
        }
    })
}

/// `TestRestartProxyProtocolThenNot`: a query that was with a backend that wants a header is asked again of one that wants
/// none, and none is left in front of it. (Here a reload has changed the pool meanwhile.)
#[test]
fn restart_proxy_protocol_then_not() {
    let close = Arc::new(AtomicBool::new(false));
    let closes = Arc::clone(&close);
    let with_header = FakeBackend::start(move |connection| {
        if connection.header().is_some() && connection.query().is_some() {
            wait::poll(SOON, || closes.load(Ordering::SeqCst).then_some(()));
        }
    });
    let without = FakeBackend::start(|connection| {
        let Some(read) = connection.read_once() else { return };
        assert_eq!(read[..2], (read.len() as u16 - 2).to_be_bytes(), "a query comes first");
        connection.send(&message::answer_to(&read[2..], [192, 0, 2, 53]));
        connection.wait_closed();
    });
    let counterfoil = Counterfoil::start(&config(with_header.address).identity("connection").tlv(0xe0, "{qname}"));
    let mut client = counterfoil.client();
    client.ask(7, "restarted.example.test", qtype::A);
    wait::until("the first backend has it", SOON, || with_header.queries() == 1);
    counterfoil.rewrite_with(&config(without.address));
    let (reloaded, output) = counterfoil.ctl(&["reload"], SOON);
    assert!(reloaded, "{output}");
    close.store(true, Ordering::SeqCst);
    let answer = client.receive(SOON).message();
    assert_eq!((message::id(&answer), message::response_code(&answer)), (7, rcode::NOERROR));
    assert_eq!(counterfoil.metrics().sum("pool_retries_total", &[]), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// "Client write blocked with queries in flight, then a timeout of the backend": it gets all that came before and the
/// SERVFAIL, once it reads again.
#[test]
fn client_blocked_and_backend_timeout() {
    let backend = large();
    let config = config(backend.address)
        .set("listener", "max_pending_answers", "\"64MiB\"")
        .set("listener", "max_in_flight", 1000)
        .set("listener", "write_timeout", "\"1m\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    client.ask(500, "silent.example.test", qtype::A);
    for id in 0..400 {
        client.ask(id, "large.example.test", qtype::A);
    }
    let timeout = [("reason", "timeout")];
    counterfoil.wait_metrics("the backend's timeout", SOON, |m| m.sum("queries_failed_total", &timeout) == 1.0);
    let (mut answered, mut failed) = (0, 0);
    for _ in 0..401 {
        let answer = client.receive(SOON).message();
        match (message::id(&answer), message::response_code(&answer)) {
            (500, rcode::SERVFAIL) => failed += 1,
            (..400, rcode::NOERROR) => answered += 1,
            other => assert_eq!(other, (0, 0), "neither"),
        }
    }
    assert_eq!((answered, failed), (400, 1));
    client.exchange(1, "still-there.example.test", qtype::A);
    drop(client);
    counterfoil.assert_quiescent();
}

/// "Client closes while the first response is being sent": nothing of it is left, and what the others have is untouched.
#[test]
fn client_closes_while_an_answer_is_being_sent() {
    let backend = large();
    let config = config(backend.address).set("listener", "max_pending_answers", "\"64MiB\"");
    let counterfoil = Counterfoil::start(&config);
    let mut stays = counterfoil.client();
    for _ in 0..10 {
        let mut leaves = counterfoil.client();
        for id in 0..100 {
            leaves.ask(id, "large.example.test", qtype::A);
        }
        // Some of the first answer has come, far from all of the last.
        assert!(!leaves.read_once(SOON).is_empty());
        leaves.reset();
        assert_eq!(stays.exchange(1, "stays.example.test", qtype::A).len(), 65_535);
    }
    // 100 in flight take four connections of 32. They stay, though they may still be busy with what nobody waits for.
    assert!(backend.accepted() < 20, "{}", backend.accepted());
    drop(stays);
    counterfoil.assert_quiescent();
}

/// "10,000 self-generated answers, pipelined", and 101 forwarded ones on the same connection. Who sends only what is not
/// forwarded is let go after 32 such messages, so each 32nd is a good one.
#[test]
fn ten_thousand_own_answers_pipelined() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let is_good = |id: u16| id % 32 == 31;
    let burst: Vec<u8> = (0..10_000_u16)
        .flat_map(|id| {
            let mut query = message::query(id, "broken.example.test", qtype::A);
            if !is_good(id) {
                query.truncate(20);
            }
            message::framed(&query)
        })
        .collect();
    let mut writer = client.clone_for_writing();
    let sending = std::thread::spawn(move || writer.send_raw(&burst));
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..10_000 {
        let answer = client.receive(SOON).message();
        let id = message::id(&answer);
        let expected = if is_good(id) { rcode::NOERROR } else { FORMERR };
        assert_eq!(message::response_code(&answer), expected, "{id}");
        assert!(answered.insert(id), "{id} twice");
    }
    sending.join().unwrap().unwrap();
    Load { count: 101, ..Load::default() }.run(&mut client).assert_all_answered(101);
    assert_eq!(backend.queries(), 101 + (0..10_000).filter(|id| is_good(*id)).count());
    drop(client);
    counterfoil.assert_quiescent();
}

/// "Query 2 is dropped while query 1 is in flight": the backend never answers it; the first is answered all the same, and
/// an answer that comes too late harms nobody.
#[test]
fn a_dropped_query_beside_one_in_flight() {
    let backend = FakeBackend::start(|connection| {
        let (Some(first), Some(dropped)) = (connection.query(), connection.query()) else { return };
        connection.send(&message::answer_to(&first, [192, 0, 2, 1]));
        let Some(third) = connection.query() else { return };
        connection.send(&message::answer_to(&dropped, [192, 0, 2, 66]));
        connection.send(&message::answer_to(&third, [192, 0, 2, 3]));
        connection.wait_closed();
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "query_timeout", "\"500ms\""));
    let mut client = counterfoil.client();
    client.ask(1, "first.example.test", qtype::A);
    client.ask(2, "dropped.example.test", qtype::A);
    assert_eq!(client.receive(SOON).message().last(), Some(&1));
    let failed = client.receive(SOON).message();
    assert_eq!((message::id(&failed), message::response_code(&failed)), (2, rcode::SERVFAIL));
    // With its ID and its name: it is not the late answer that comes back.
    client.ask(2, "dropped.example.test", qtype::A);
    assert_eq!(client.receive(SOON).message().last(), Some(&3));
    assert_eq!(client.receive(Duration::from_millis(50)), Received::Nothing);
    drop(client);
    counterfoil.assert_quiescent();
}

/// `TestHealthCheckCustomName`, and that a check is a query like any other: its own ID each time, RD, class IN.
#[test]
fn health_check_custom_name() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            seen.lock().unwrap().push(query);
        }
    });
    let keys = [
        ("health.mode", "\"auto\""),
        ("health.interval", "\"50ms\""),
        ("health.name", "\"powerdns-tools.powerdns.com.\""),
    ];
    let counterfoil =
        Counterfoil::start(&Config::default().set("server", "workers", 1).backend(backend.address, &keys));
    wait::until("five checks", SOON, || asked.lock().unwrap().len() >= 5);
    for query in asked.lock().unwrap().iter() {
        let expected = message::query(message::id(query), "powerdns-tools.powerdns.com", qtype::A);
        assert_eq!(*query, expected);
    }
    let mut client: Client = counterfoil.client();
    client.exchange(1, "up.example.test", qtype::A);
}

/// `test-dnsdist-connections-cache`: another backend, another connection; each finds its own again.
#[test]
fn connections_cache_of_other_backends() {
    let backends = [FakeBackend::answering(false), FakeBackend::answering(false), FakeBackend::answering(false)];
    let config =
        backends[1..].iter().fold(config(backends[0].address), |config, other| config.backend(other.address, &[]));
    let counterfoil = Counterfoil::start(&config.set("pool", "policy", "\"round-robin\""));
    let mut client = counterfoil.client();
    Load { count: 60, ..Load::default() }.run(&mut client).assert_all_answered(60);
    for backend in &backends {
        assert_eq!((backend.accepted(), backend.queries()), (1, 20));
    }
    drop(client);
    counterfoil.assert_quiescent();
}

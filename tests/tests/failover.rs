//! Slow and dead backends: who gets the query instead, what the client is told, and that nobody is stormed.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::netns;
use counterfoil_tests::process::nobody;
use counterfoil_tests::servers::Unbound;

const SOON: Duration = Duration::from_secs(5);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon().set("pool", "query_timeout", "\"2s\"")
}

/// Even without retries, and even for what must not be asked twice: nothing was sent to those that refused.
#[test]
fn a_query_finds_the_one_backend_of_four_that_lives() {
    let good = FakeBackend::answering(true);
    let config = config(nobody())
        .backend(nobody(), &[])
        .backend(nobody(), &[])
        .backend(good.address, &[])
        .identity("address")
        .set("pool", "retries", 0)
        .set("pool", "policy", "\"first-available\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    Load { count: 50, ..Load::default() }.run(&mut client).assert_all_answered(50);
    let mut update = message::query(7, "example.test", 6);
    update[2] = 5 << 3;
    client.send_raw(&message::framed(&update)).unwrap();
    assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::NOERROR);
    assert_eq!(counterfoil.metrics().sum("pool_retries_total", &[]), 0.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// SYNs that nobody answers: after `connect_timeout` the query goes to the other backend.
#[test]
fn a_backend_that_is_not_there_costs_a_connect_timeout() {
    let (near, far) = netns::pair();
    let unbound = Unbound::start_in(&far, far.address);
    // In the network, and nobody's.
    let absent = SocketAddr::from((Ipv4Addr::from(u32::from(far.address) + 1), 53));
    let keys = [("connect_timeout", "\"300ms\"")];
    let config = config(absent)
        .backend_key("connect_timeout", "\"300ms\"")
        .backend(unbound.address, &keys)
        .identity("connection")
        .set("pool", "policy", "\"first-available\"")
        .set("pool", "query_timeout", "\"5s\"");
    let counterfoil = Counterfoil::start_with(&config, Options { namespace: Some(&near), ..Options::default() });
    near.run(|| {
        let mut client = Client::connect(counterfoil.address, None);
        let outcome = Load { count: 10, ..Load::default() }.run(&mut client);
        outcome.assert_all_answered(10);
        assert!(outcome.slowest >= Duration::from_millis(250), "{:?}", outcome.slowest);
        let failed = counterfoil.metrics().sum("backend_connect_failures_total", &[("backend", "backend-0")]);
        assert!((1.0..=4.0).contains(&failed), "{failed}");
        drop(client);
        counterfoil.assert_quiescent();
    });
}

/// Answers that were there before are delivered, then the connection ends; nothing of ours is in it.
#[test]
fn on_failure_close_ends_the_clients_connection() {
    let backend = FakeBackend::start(|connection| {
        // The second one is asked again, once, as the end of the connection may have crossed it.
        while let Some(query) = connection.query() {
            if message::question_name(&query).is_some_and(|name| name.starts_with("second")) {
                return;
            }
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let config = config(backend.address).set("pool", "on_failure", "\"close\"").set("pool", "retries", 0);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    client.exchange(1, "first.example.test", qtype::A);
    client.ask(2, "second.example.test", qtype::A);
    let received = client.receive(SOON);
    assert!(matches!(received, Received::Closed | Received::Reset), "{received:?}");
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("queries_failed_total", &[("reason", "backend_closed")]), 1.0);
    assert_eq!(metrics.sum("client_connections_closed_total", &[("reason", "query_failed")]), 1.0);
}

/// Asks for 3 s, each query at once after the last; the queries and how long it took.
fn hammer(counterfoil: &Counterfoil) -> (u16, Duration) {
    let (start, mut id) = (Instant::now(), 0);
    let mut client = counterfoil.client();
    while start.elapsed() < Duration::from_secs(3) {
        id += 1;
        let answer = client.exchange(id, "n.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    }
    (id, start.elapsed())
}

/// At most ten attempts a second: the first few, then fewer and fewer.
#[test]
fn a_backend_that_refuses_is_left_alone() {
    let counterfoil = Counterfoil::start(&config(nobody()).identity("address"));
    let (queries, taken) = hammer(&counterfoil);
    let attempts = counterfoil.metrics().sum("backend_connect_failures_total", &[]);
    assert!(attempts >= 4.0 && attempts <= 10.0 * taken.as_secs_f64(), "{attempts} attempts in {taken:?}");
    assert!(f64::from(queries) > 5.0 * attempts, "{queries} queries");
    counterfoil.assert_quiescent();
}

/// It takes connections and does not want what comes over them: seen by its own reason, and not stormed.
#[test]
fn a_backend_that_rejects_the_header_is_told_from_others_and_left_alone() {
    let backend = FakeBackend::start(|connection| {
        connection.header();
    });
    let mut counterfoil = Counterfoil::start(&config(backend.address).identity("connection"));
    let (queries, taken) = hammer(&counterfoil);
    let attempts = backend.accepted() as f64;
    assert!(attempts >= 4.0 && attempts <= 10.0 * taken.as_secs_f64(), "{attempts} attempts in {taken:?}");
    assert!(f64::from(queries) > 5.0 * attempts, "{queries} queries");
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "unanswered")]), attempts);
    let said = counterfoil.process.find_line(SOON, |line| line.contains("PROXY header").then_some(()));
    assert!(said.is_some(), "the log names the suspicion");
}

/// Its window closes; after `write_timeout` the connection goes, with all that was on it.
#[test]
fn a_backend_that_does_not_read_is_given_up_after_write_timeout() {
    let deaf = FakeBackend::start(|connection| connection.wait_without_reading());
    let config = config(deaf.address)
        .backend_key("write_timeout", "\"300ms\"")
        .backend_key("max_in_flight", 65536)
        .set("listener", "max_in_flight", 65536)
        .set("pool", "query_timeout", "\"30s\"")
        .set("pool", "retries", 0);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let mut writer = client.clone_for_writing();
    let label = "x".repeat(60);
    let sender = std::thread::spawn(move || {
        for id in 0..60_000u16 {
            let query = message::query(id, &format!("{label}.{label}.{label}.example.test"), qtype::A);
            if writer.send_raw(&message::framed(&query)).is_err() {
                return;
            }
        }
    });
    let answer = client.receive(Duration::from_secs(20)).message();
    assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    let metrics = counterfoil.metrics();
    assert!(metrics.sum("backend_connections_closed_total", &[("reason", "write_timeout")]) >= 1.0);
    client.reset();
    sender.join().unwrap();
    counterfoil.assert_quiescent();
}

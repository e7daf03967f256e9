//! What the log says of connections, and what it does not: names.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, field, message};
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);

/// The lines, as objects.
fn lines(counterfoil: &Counterfoil) -> Vec<Value> {
    counterfoil.process.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Each line about a connection has its number: that of the client's in `session`, the backend's cookie in `conn`.
#[test]
fn each_line_of_a_connection_has_its_number() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("connection").set("server", "log", "\"counterfoil=debug\"");
    let config = config.tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start(&config);
    let mut clients = [counterfoil.client(), counterfoil.client()];
    for client in &mut clients {
        Load { count: 3, ..Load::default() }.run(client).assert_all_answered(3);
    }
    // Too short for a message.
    clients[0].send_raw(&[0, 1, 0]).unwrap();
    drop(clients);
    counterfoil.assert_quiescent();
    let mut seen = std::collections::BTreeMap::new();
    for line in lines(&counterfoil) {
        let target = line["target"].as_str().unwrap();
        let said = line["fields"]["message"].as_str().unwrap().to_owned();
        let of_client = target.starts_with("counterfoil::client") || target.starts_with("counterfoil::worker");
        if of_client && said != "accept" {
            assert!(line["fields"]["session"].is_u64(), "{line}");
        }
        if target.starts_with("counterfoil::backend::conn") {
            assert!(line["fields"]["conn"].is_u64(), "{line}");
        }
        *seen.entry(said).or_insert(0) += 1;
    }
    let count = |said: &str| seen.get(said).copied().unwrap_or(0);
    for (said, times) in [
        ("client connection opened", 2),
        ("client connection closed", 2),
        ("backend connection opened", 6),
        ("backend connection closed", 6),
        ("malformed message", 1),
    ] {
        assert_eq!(count(said), times, "{said}: {seen:?}");
    }
}

/// A backend that refuses is said, not for each of thousands of attempts, and how many lines were held back is said, too.
/// No line has a name that was asked for.
#[test]
fn a_storm_of_trouble_is_held_back_and_counted_and_no_name_is_told() {
    const LIMIT: usize = 100;
    // Closes each connection with an answer that is none.
    let backend = FakeBackend::start(|connection| {
        if connection.query().is_some() {
            connection.send(&[0; 12]);
        }
    });
    let config = Config::new(backend.address).set("pool", "retries", 0).backend_key("max_in_flight", 1);
    let mut counterfoil = Counterfoil::start(&config);
    let began = Instant::now();
    let mut client = counterfoil.client();
    let name = |n: usize| format!("n{n}.secret.example.test");
    let outcome = Load { count: 1000, in_flight: 20, name: &name, ..Load::default() }.run(&mut client);
    assert_eq!(outcome.failed.values().sum::<usize>(), 1000, "{outcome:?}");
    let told = counterfoil.process.wait_for_line(SOON, "that lines were held back", |line| {
        message(line, "log lines held back")
            .filter(|fields| fields["place"].as_str().unwrap().contains("worker::shell"))
    });
    let written = lines(&counterfoil).iter().filter(|line| line["fields"]["message"] == "backend connection").count();
    let allowed = LIMIT + (began.elapsed().as_secs_f64() * 10.0) as usize + 1;
    assert!((LIMIT..=allowed).contains(&written), "{written} lines, {allowed} allowed");
    assert!(told["lines"].as_u64().unwrap() >= 1000 - allowed as u64, "{told}");
    assert!(!counterfoil.process.lines().iter().any(|line| line.contains("secret")), "{}", counterfoil.process.tail());
    drop(client);
    counterfoil.assert_quiescent();
}

/// A reload changes what is logged.
#[test]
fn the_filter_can_be_reloaded() {
    let backend = FakeBackend::answering(false);
    let config = |log: &str| Config::new(backend.address).set("server", "log", format!("\"{log}\""));
    let mut counterfoil = Counterfoil::start(&config("info"));
    let opened = |line: &str| message(line, "client connection opened");
    drop(counterfoil.client());
    counterfoil.rewrite_with(&config("info,counterfoil::worker=debug"));
    let (ok, output) = counterfoil.ctl(&["reload"], SOON);
    assert!(ok, "{output}");
    assert!(counterfoil.process.find_line(Duration::ZERO, opened).is_none(), "not asked for before");
    let client = counterfoil.client();
    counterfoil.process.wait_for_line(SOON, "a client", opened);
    drop(client);
}

/// What a configuration will cost is said at the start as it is by `check-config`.
#[test]
fn warnings_of_the_configuration_are_logged_at_the_start() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("address").tlv(0xe0, "{uuid}");
    let mut counterfoil = Counterfoil::start(&config);
    let note = |line: &str| message(line, "configuration").and_then(|fields| field(&fields, "note"));
    let said = counterfoil.process.wait_for_line(SOON, "what it will cost", note);
    assert_eq!(said, "key `pool.proxy_protocol.tlv`: `{uuid}` differs per query: every query opens a connection");
}

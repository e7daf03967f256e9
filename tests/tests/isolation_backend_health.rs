//! The health of a backend: whether it is up is not decided by a check that finds no place beside those who are served.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::metrics::Metrics;
use counterfoil_tests::servers::Unbound;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(15);
const LATER: Duration = Duration::from_secs(60);

/// What checks ask for.
const CHECKED: &str = "alive.example.test";

/// Checks every 100 ms, which have so long.
fn checked(config: Config, mode: &str, timeout: &str) -> Config {
    config
        .backend_key("health.mode", format!("\"{mode}\""))
        .backend_key("health.interval", "\"100ms\"")
        .backend_key("health.timeout", format!("\"{timeout}\""))
        .backend_key("health.name", format!("\"{CHECKED}\""))
}

fn checks(metrics: &Metrics, result: &str) -> f64 {
    metrics.sum("backend_health_checks_total", &[("result", result)])
}

fn downs(metrics: &Metrics) -> f64 {
    metrics.sum("backend_health_changes_total", &[("to", "down")])
}

/// Unbound takes ten TCP clients. Twelve, of whom each has a connection of its own, leave none for a check.
fn is_never_down(setting: Setting) {
    const CLIENTS: u8 = 12;
    let unbound = Unbound::start(false);
    let scene = Scene::new(setting);
    let counterfoil = Counterfoil::start(&checked(scene.config(unbound.address), "auto", "500ms"));
    counterfoil.wait_metrics("the first check passes", SOON, |metrics| checks(metrics, "passed") >= 1.0);
    let neighbours = scene.neighbours(&counterfoil, CLIENTS, &Arc::default());
    // As many checks as it takes to go down ten times.
    let all = |metrics: &Metrics| metrics.sum("backend_health_checks_total", &[]);
    let metrics = counterfoil.wait_metrics("thirty checks", LATER, |metrics| all(metrics) >= 30.0);
    assert_eq!((downs(&metrics), checks(&metrics, "failed")), (0.0, 0.0));
    let wait = neighbours.finish();
    assert_eq!(wait.failed, 0, "{wait:?}");
    counterfoil.assert_quiescent();
}

#[test]
fn a_backend_that_serves_as_many_as_it_takes_is_not_down() {
    is_never_down(Setting::identity("connection"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_backend_health() {
    // Without a header all share one connection, and there is always a place.
    Setting::all().filter(|setting| setting.identity.is_some()).for_each(is_never_down);
}

/// It would be refused as a check's answer, so it is no evidence either.
#[test]
fn servfail_to_others_is_no_evidence() {
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&is_over);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            if message::question_name(&query).unwrap() != CHECKED {
                answer[3] |= rcode::SERVFAIL;
            } else if !over.load(Ordering::SeqCst) {
                continue;
            }
            connection.send(&answer);
        }
    });
    let counterfoil = Counterfoil::start(&checked(Config::new(backend.address).settles_soon(), "auto", "500ms"));
    let mut client = counterfoil.client();
    let mut id = 0;
    counterfoil.wait_metrics("it is down", SOON, |metrics| {
        id += 1;
        client.exchange(id, "n.example.test", qtype::A);
        downs(metrics) > 0.0
    });
    assert_eq!(checks(&counterfoil.metrics(), "contradicted"), 0.0);
    drop(client);
    is_over.store(true, Ordering::SeqCst);
    counterfoil.assert_quiescent();
}

/// The check was answered, and the answer says that the name cannot be resolved: that is the word of the backend.
#[test]
fn servfail_to_a_check_stands_against_good_answers() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            if message::question_name(&query).unwrap() == CHECKED {
                answer[3] |= rcode::SERVFAIL;
            }
            connection.send(&answer);
        }
    });
    let counterfoil = Counterfoil::start(&checked(Config::new(backend.address).settles_soon(), "auto", "500ms"));
    let mut client = counterfoil.client();
    let mut id = 0;
    counterfoil.wait_metrics("it is down", SOON, |metrics| {
        id += 1;
        client.exchange(id, "n.example.test", qtype::A);
        downs(metrics) > 0.0
    });
    drop(client);
    counterfoil.assert_quiescent();
}

/// Under `lazy` a check comes after failures. What is answered meanwhile speaks for the backend all the same.
#[test]
fn answers_during_a_lazy_check_are_evidence() {
    let is_checked = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&is_checked);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            let name = message::question_name(&query).unwrap();
            seen.fetch_or(name == CHECKED, Ordering::SeqCst);
            if name.starts_with("good") {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        }
    });
    let config = checked(Config::new(backend.address).settles_soon(), "lazy", "5s").backend_key("health.fall", 2).set(
        "pool",
        "query_timeout",
        "\"300ms\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    for id in 0..2 {
        let answer = client.exchange(id, "lost.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    }
    wait::until("it is checked", SOON, || is_checked.load(Ordering::SeqCst));
    let answer = client.exchange(9, "good.example.test", qtype::A);
    assert_eq!(message::response_code(&answer), rcode::NOERROR);
    let metrics = counterfoil.wait_metrics("the check is over", SOON, |metrics| checks(metrics, "contradicted") == 1.0);
    assert_eq!((downs(&metrics), checks(&metrics, "failed")), (0.0, 0.0));
    drop(client);
    counterfoil.assert_quiescent();
}

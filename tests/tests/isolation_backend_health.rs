//! The health of a backend: whether it is up is not decided by a check that finds no place beside those who are served.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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

fn flag() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(false))
}

fn checks(metrics: &Metrics, result: &str) -> f64 {
    metrics.sum("backend_health_checks_total", &[("result", result)])
}

fn downs(metrics: &Metrics) -> f64 {
    metrics.sum("backend_health_changes_total", &[("to", "down")])
}

/// Unbound takes ten TCP clients. More, of whom each has a connection of its own, leave none for a check.
fn is_never_down(setting: Setting, clients: u8) {
    let unbound = Unbound::start(false);
    let scene = Scene::new(setting);
    let counterfoil = Counterfoil::start(&checked(scene.config(unbound.address), "auto", "500ms"));
    counterfoil.wait_metrics("the first check passes", SOON, |metrics| checks(metrics, "passed") >= 1.0);
    let neighbours = scene.neighbours(&counterfoil, clients, &Arc::default());
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
    is_never_down(Setting::identity("connection"), 12);
}

/// Those whose connections it does not take wait here and have their turn there: it is found out how many it takes.
#[test]
fn three_times_as_many_as_a_backend_takes_are_all_served() {
    is_never_down(Setting::identity("connection"), 30);
}

#[test]
#[ignore = "soak"]
fn soak_isolation_backend_health() {
    // Without a header all share one connection, and there is always a place.
    Setting::all().filter(|setting| setting.identity.is_some()).for_each(|setting| is_never_down(setting, 30));
}

/// It would be refused as a check's answer, so it is no evidence either.
#[test]
fn servfail_to_others_is_no_evidence() {
    let is_over = flag();
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
    let (is_broken, is_over, others) = (flag(), flag(), Arc::new(AtomicUsize::new(0)));
    let (broken, over, answered) = (Arc::clone(&is_broken), Arc::clone(&is_over), Arc::clone(&others));
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            if message::question_name(&query).unwrap() != CHECKED {
                answered.fetch_add(1, Ordering::SeqCst);
            } else if broken.load(Ordering::SeqCst) {
                // Somebody else is answered first. The first one may have been asked before the check.
                let before = answered.load(Ordering::SeqCst);
                let is_due = || over.load(Ordering::SeqCst) || answered.load(Ordering::SeqCst) > before + 1;
                wait::until("others are answered", SOON, is_due);
                answer[3] |= rcode::SERVFAIL;
            }
            connection.send(&answer);
        }
    });
    let counterfoil = Counterfoil::start(&checked(Config::new(backend.address).settles_soon(), "auto", "20s"));
    counterfoil.wait_metrics("a check passes", SOON, |metrics| checks(metrics, "passed") >= 1.0);
    is_broken.store(true, Ordering::SeqCst);
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
    is_broken.store(false, Ordering::SeqCst);
    counterfoil.assert_quiescent();
}

/// Under `lazy` a check comes after failures. What is answered meanwhile speaks for the backend all the same.
#[test]
fn answers_during_a_lazy_check_are_evidence() {
    let is_checked = flag();
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

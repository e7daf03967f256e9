//! The alert rules: by promtool, and by a real Prometheus that scrapes the running program.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::json;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::process;
use counterfoil_tests::servers::Prometheus;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(20);

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/prometheus").join(name)
}

fn promtool(arguments: &[&str], name: &str) {
    let path = file(name).display().to_string();
    let arguments: Vec<&str> = arguments.iter().copied().chain([path.as_str()]).collect();
    let (ok, output) = process::run("promtool", &arguments, SOON);
    assert!(ok, "promtool {arguments:?}:\n{output}");
}

#[test]
fn promtool_accepts_the_rules_and_their_tests_pass() {
    promtool(&["check", "rules"], "alerts.yml");
    promtool(&["test", "rules"], "alerts_test.yml");
}

/// The words that follow `marker`, up to a character that no name has.
fn names_after<'a>(text: &'a str, marker: &str) -> Vec<&'a str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(marker)
        .skip(1)
        .map(|rest| &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())])
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn each_alert_has_a_firing_and_a_quiet_case() {
    let rules = std::fs::read_to_string(file("alerts.yml")).unwrap();
    let tests = std::fs::read_to_string(file("alerts_test.yml")).unwrap();
    let mut quiet = BTreeSet::new();
    let mut firing = BTreeSet::new();
    for case in tests.split("eval_time:").skip(1) {
        let name = names_after(case, "alertname: ")[0];
        if case.contains("exp_alerts: []") {
            quiet.insert(name)
        } else {
            firing.insert(name)
        };
    }
    let alerts: BTreeSet<&str> = names_after(&rules, "- alert: ").into_iter().collect();
    assert!(alerts.len() >= 6, "{alerts:?}");
    assert_eq!(quiet, alerts);
    assert_eq!(firing, alerts);
    for class in ["orphan", "ghost", "zombie", "hoard"] {
        assert!(rules.contains(&format!("class=\"{class}\"")), "{class}");
    }
}

/// A worker hangs while its backend closes: both are real, last for a while, and reach a real Prometheus as alerts.
#[test]
fn a_real_prometheus_scrapes_without_error_and_raises_the_alerts() {
    const HANG: Duration = Duration::from_secs(15);
    let close = Arc::new((Mutex::new(false), Condvar::new()));
    let signal = Arc::clone(&close);
    let backend = FakeBackend::start(move |connection| {
        if connection.header().is_none() {
            return;
        }
        let Some(query) = connection.query() else { return };
        connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        let closing = signal.0.lock().unwrap();
        let _closing = signal.1.wait_timeout_while(closing, Duration::from_secs(60), |closing| !*closing).unwrap();
    });
    let config = Config::new(backend.address).identity("connection").set("watchdog", "reap", "\"on\"");
    let counterfoil = Counterfoil::start(&config);
    let rules = std::fs::read_to_string(file("alerts.yml")).unwrap();
    let exposition = counterfoil.metrics();
    for name in names_after(&rules, "counterfoil_").into_iter().collect::<BTreeSet<_>>() {
        assert!(exposition.has(name), "alerts.yml uses counterfoil_{name}, which does not exist");
    }

    let prometheus = Prometheus::start(counterfoil.admin.expect("an admin address"), Some(&file("alerts.yml")));
    wait::until("the target was scraped", SOON, || prometheus.target().0 != "unknown");
    assert_eq!(prometheus.target(), ("up".to_owned(), String::new()));
    assert_eq!(prometheus.query("count(counterfoil_discrepancy_sockets{class=\"zombie\"})"), [3.0]);
    let mut client = counterfoil.client();
    client.exchange(1, "before.example.test", qtype::A);
    assert!(prometheus.alerts("pending").is_empty() && prometheus.alerts("firing").is_empty());

    let hang = json!({"cmd": "hang", "worker": 0, "millis": HANG.as_millis() as u64});
    let events = counterfoil.admin(&hang, SOON);
    assert!(events.last().is_some_and(|event| event["ok"] == true), "{events:?}");
    *close.0.lock().unwrap() = true;
    close.1.notify_all();
    wait::until("both alerts are pending", HANG, || {
        let pending = prometheus.alerts("pending");
        ["CounterfoilWorkerStalled", "CounterfoilZombieConnections"]
            .iter()
            .all(|name| pending.iter().any(|pending| pending == name))
    });
    wait::until("they are over when the worker is back", HANG + SOON, || prometheus.alerts("pending").is_empty());

    let groups = prometheus.api("/api/v1/rules")["groups"].take();
    let evaluated: Vec<_> = groups[0]["rules"].as_array().unwrap().iter().map(|rule| &rule["health"]).collect();
    assert!(!evaluated.is_empty() && evaluated.iter().all(|health| *health == "ok"), "{groups}");
    assert_eq!(prometheus.target(), ("up".to_owned(), String::new()));
    assert_eq!(prometheus.query("min_over_time(up[1m])"), [1.0], "no scrape failed");
}

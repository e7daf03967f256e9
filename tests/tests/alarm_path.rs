//! The whole path of an alarm: a drill leaks, the watchdog finds it, Prometheus scrapes and evaluates the shipped rules,
//! Alertmanager notifies a webhook; the reaper ends it, and the webhook hears that it is over. Or the reaper can't, and
//! the webhook hears that.
#![expect(clippy::expect_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options, field, message};
use counterfoil_tests::drill::Drilled;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::qtype;
use counterfoil_tests::servers::{Alertmanager, Notified, Prometheus};
use counterfoil_tests::tempdir::TempDir;
use counterfoil_tests::wait;

/// For one step between two programs, on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// The classes, their alerts, and the outcome of their reaping.
const DRILLS: [(&str, &str, &str); 7] = [
    ("zombie", "CounterfoilZombieConnections", "released"),
    ("orphan", "CounterfoilOrphanSockets", "severed"),
    ("ghost", "CounterfoilGhostConnections", "released"),
    ("hoard", "CounterfoilHoardedConnections", "released"),
    ("stuck", "CounterfoilStuckConnections", "released"),
    ("embryo", "CounterfoilEmbryoConnections", "released"),
    ("lingering", "CounterfoilLingeringConnections", "released"),
];

/// Raised by what the reaper did, whatever the class.
const REAPED: &str = "CounterfoilConnectionsReaped";

fn shipped(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/prometheus").join(name)
}

/// The shipped alerts; those on findings without their `for:`, since a drill is over before that.
fn impatient() -> String {
    let alerts = std::fs::read_to_string(shipped("alerts.yml")).expect("the alerts");
    let (findings, others) = alerts.split_once("  - name: counterfoil-growth").expect("the group after the findings");
    assert_eq!(findings.matches("for: 1m").count(), 7, "one for each class");
    format!("{}  - name: counterfoil-growth{others}", findings.replace("for: 1m", "for: 0s"))
}

#[test]
fn a_drilled_leak_reaches_the_receiver_and_so_does_its_end() {
    let begin = Instant::now();
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address)
        .identity("connection")
        .set("watchdog", "reap", "\"on\"")
        .set("watchdog", "interval", "\"1500ms\"")
        .set("watchdog", "sweeps", "2")
        .set("watchdog", "grace", "\"1s\"");
    let counterfoil = Counterfoil::start(&config);
    let dir = TempDir::new("rules");
    let rules = [shipped("rules.yml"), dir.write("alerts.yml", &impatient())];
    let alertmanager = Alertmanager::start();
    let prometheus = Prometheus::start(counterfoil.admin.expect("an address"), &rules, Some(alertmanager.address));
    wait::until("reapings are scraped, so that their increase is seen", SOON, || {
        !prometheus.query("counterfoil_reaped_total").is_empty()
    });
    let mut client = counterfoil.client();
    println!("{:>5.1} s  everything runs", begin.elapsed().as_secs_f64());

    let webhook = &alertmanager.webhook;
    client.exchange(1, "healthy.example.test", qtype::A);
    let start = Instant::now();
    let drilled = Drilled::all(&counterfoil, &DRILLS.map(|(class, ..)| (class, false)));
    client.exchange(2, "healthy.example.test", qtype::A);
    for (drilled, (class, alert, outcome)) in drilled.iter().zip(DRILLS) {
        assert!(drilled.succeeded(), "{drilled:#?}");
        let is = |notified: &Notified, status: &str| {
            notified.name == alert
                && notified.status == status
                && (notified.label("backend"), notified.label("class")) == ("drill", class)
        };
        let firing = webhook.wait_for(&format!("{alert} fires"), SOON, |notified| is(notified, "firing"));
        let resolved = webhook.wait_for(&format!("{alert} is over"), SOON, |notified| is(notified, "resolved"));
        let reaped = webhook.wait_for(&format!("{REAPED} of {class}"), SOON, |notified| {
            notified.name == REAPED && notified.label("class") == class && notified.label("outcome") == outcome
        });
        assert!(firing.at < resolved.at, "{firing:?} {resolved:?}");
        assert_eq!(firing.label("severity"), "warning");
        let annotation = |name: &str| firing.alert["annotations"][name].as_str().unwrap_or_default();
        assert!(annotation("description").contains("drill"), "{firing:?}");
        assert_eq!(annotation("runbook_url"), format!("docs/runbooks/{alert}.md"));
        let after = |notified: &Notified| notified.at.duration_since(start).as_secs_f64();
        println!(
            "{class}: fired after {:.1} s, reaping known after {:.1} s, resolved after {:.1} s",
            after(&firing),
            after(&reaped),
            after(&resolved),
        );
    }
    // No false alarm beside them, and the healthy connection is the one from the beginning.
    let names: BTreeSet<String> = webhook.alerts().into_iter().map(|notified| notified.name).collect();
    let expected: BTreeSet<String> = DRILLS.iter().map(|drill| drill.1).chain([REAPED]).map(str::to_owned).collect();
    assert_eq!(names, expected, "{:#?}", webhook.alerts());
    assert_eq!(backend.accepted(), 1);
    println!("{:>5.1} s  done", begin.elapsed().as_secs_f64());
    drop(client);
    counterfoil.assert_quiescent();
}

/// Without CAP_NET_ADMIN nobody can sever: neither an orphan, nor what its owner does not close. It is said in the log, in
/// the metric, and by the alert.
#[test]
fn a_reaping_without_effect_reaches_the_receiver() {
    const ALERT: &str = "CounterfoilReaperIneffective";
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).set("watchdog", "reap", "\"on\"");
    let capabilities = Some(&["bpf", "perfmon"][..]);
    let counterfoil = Counterfoil::start_with(&config, Options { capabilities, ..Options::default() });
    let alertmanager = Alertmanager::start();
    let rules = [shipped("rules.yml"), shipped("alerts.yml")];
    let prometheus = Prometheus::start(counterfoil.admin.expect("an address"), &rules, Some(alertmanager.address));
    wait::until("reapings are scraped, so that their increase is seen", SOON, || {
        !prometheus.query("counterfoil_reaped_total").is_empty()
    });
    for drilled in Drilled::all(&counterfoil, &[("orphan", false), ("hoard", true)]) {
        assert!(!drilled.succeeded(), "{drilled:#?}");
        assert_eq!(drilled.text("reaping", "rung"), "sock_destroy", "{drilled:#?}");
        assert_eq!(drilled.text("outcome", "outcome"), "ineffective", "{drilled:#?}");
        let labels = [("class", drilled.class), ("outcome", "ineffective")];
        assert_eq!(counterfoil.metrics().sum("reaped_total", &labels), 1.0, "{drilled:#?}");
        let lines = counterfoil.process.lines();
        let line = lines.iter().filter_map(|line| message(line, "reaped")).find(|line| line["class"] == drilled.class);
        let line = line.expect("a line in the log");
        assert_eq!(field(&line, "outcome").as_deref(), Some("ineffective"), "{line}");
        let why = "SOCK_DESTROY: CAP_NET_ADMIN is missing; grant it to the process (systemd: `AmbientCapabilities=";
        assert!(field(&line, "note").is_some_and(|note| note.starts_with(why)), "{line}");
        let firing = alertmanager.webhook.wait_for(&format!("{ALERT} of {}", drilled.class), SOON, |notified| {
            notified.name == ALERT && notified.status == "firing" && notified.label("class") == drilled.class
        });
        assert_eq!(firing.label("severity"), "critical");
    }
    counterfoil.assert_quiescent();
}

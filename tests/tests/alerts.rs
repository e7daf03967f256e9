//! The alert rules: by promtool, and by a real Prometheus that scrapes the running program.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use counterfoil::config::Class;
use serde_json::json;

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::metrics;
use counterfoil_tests::process;
use counterfoil_tests::servers::Prometheus;
use counterfoil_tests::wait;
use counterfoil_tests::watch::Watch;

const SOON: Duration = Duration::from_secs(60);

fn root(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

fn file(name: &str) -> PathBuf {
    root("deploy/prometheus").join(name)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The files below a directory of the source tree, sorted.
fn files(directory: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root(directory)).unwrap_or_else(|e| panic!("{directory}: {e}"));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{directory}");
    files
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).unwrap()
}

fn promtool(what: &str, path: &Path) {
    let (ok, output) = process::run("promtool", &[what, "rules", &path.display().to_string()], SOON);
    assert!(ok, "promtool {what} rules {}:\n{output}", path.display());
}

#[test]
fn promtool_accepts_the_rules_and_their_tests_pass() {
    promtool("check", &file("rules.yml"));
    promtool("check", &file("alerts.yml"));
    for tests in files("deploy/prometheus/tests") {
        promtool("test", &tests);
    }
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

/// The alerts, by name: their text in the file.
fn alerts(rules: &str) -> BTreeMap<&str, &str> {
    let texts = rules.split("- alert: ").skip(1);
    let alerts: BTreeMap<_, _> = texts.map(|text| text.split_once('\n').unwrap()).collect();
    assert!(alerts.len() >= 20, "{:?}", alerts.keys());
    alerts
}

#[test]
fn each_alert_has_a_firing_and_a_quiet_case() {
    let rules = read(&file("alerts.yml"));
    let tests: Vec<String> = files("deploy/prometheus/tests").iter().map(|path| read(path)).collect();
    let mut quiet = BTreeSet::new();
    let mut firing = BTreeSet::new();
    for case in tests.iter().flat_map(|text| text.split("eval_time:").skip(1)) {
        let name = names_after(case, "alertname: ")[0];
        if case.contains("exp_alerts: []") {
            quiet.insert(name)
        } else {
            firing.insert(name)
        };
    }
    let alerts: BTreeSet<&str> = alerts(&rules).into_keys().collect();
    assert_eq!(quiet, alerts);
    assert_eq!(firing, alerts);
}

/// What users of Prometheus' mixins expect of an alert.
#[test]
fn each_alert_says_what_it_is_how_urgent_and_where_to_read_on() {
    let rules = read(&file("alerts.yml"));
    for (name, alert) in alerts(&rules) {
        assert!(name.starts_with("Counterfoil"), "{name}");
        let (_, labels) = alert.split_once("labels:").unwrap();
        let severity = names_after(labels, "severity: ")[0];
        assert!(["critical", "warning", "info"].contains(&severity), "{name}: {severity}");
        let line = |key: &str| labels.lines().find_map(|line| line.trim().strip_prefix(key)).map(str::trim);
        let summary = line("summary:").unwrap();
        assert!(summary.ends_with('.') && !summary.contains("{{"), "{name}: a static sentence, not {summary:?}");
        let (_, description) = labels.split_once("description: >-").unwrap();
        let (description, _) = description.split_once("runbook_url:").unwrap();
        assert!(description.contains("{{ $labels.instance }}"), "{name}: which instance? {description:?}");
        assert_eq!(line("runbook_url:"), Some(format!("docs/runbooks/{name}.md").as_str()));
    }
    for class in Class::ALL {
        assert_eq!(rules.matches(&format!("class=\"{}\"}} > 0", class.name())).count(), 1, "{}", class.name());
    }
}

/// A page for each alert, an alert for each page, and nothing in a page that is not there.
#[test]
fn each_alert_has_a_runbook_and_each_runbook_an_alert() {
    let rules = read(&file("alerts.yml"));
    let pages = files("docs/runbooks");
    let alerts: Vec<&str> = alerts(&rules).into_keys().collect();
    assert_eq!(pages.iter().map(|page| stem(page)).collect::<Vec<_>>(), alerts);
    let tests: Vec<PathBuf> = files("deploy/prometheus/tests");
    for page in &pages {
        let (name, text) = (stem(page), read(page));
        let headings: Vec<&str> = text.lines().filter(|line| line.starts_with('#')).collect();
        let title = format!("# {name}");
        assert_eq!(headings, [title.as_str(), "## Meaning", "## Cause", "## What to do", "## Trying it"]);
        for class in names_after(&text, "counterfoil drill ") {
            let known = class == "CLASS" || Class::ALL.into_iter().any(|known| known.name() == class);
            assert!(known, "{name}: no drill for {class}");
        }
        for what in names_after(&text, "counterfoil ctl show ") {
            assert!(["backends", "leaks", "tlvs", "clients", "view"].contains(&what), "{name}: {what} cannot be shown");
        }
        for test in names_after(&text, "deploy/prometheus/tests/") {
            assert!(tests.iter().any(|path| stem(path) == test), "{name}: {test}");
            let case = format!("alertname: {name}");
            assert!(read(&file("tests").join(test).with_extension("yml")).contains(&case), "{name} is not in {test}");
        }
        for link in names_after(&text, "](") {
            assert!(alerts.contains(&link), "{name}: {link}");
        }
    }
}

/// Every metric that `text` names exists, and every recording rule.
fn assert_names_exist(what: &str, text: &str, exposition: &str) {
    let recorded = read(&file("rules.yml"));
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    for word in words.map(|word| word.trim_end_matches(':')).collect::<BTreeSet<_>>() {
        if word.contains("counterfoil") && word.contains(':') {
            assert!(recorded.contains(&format!("record: {word}\n")), "{what} uses {word}, which nothing records");
        } else if word.starts_with("counterfoil_") || word.starts_with("process_") {
            let series = [format!("\n{word}{{"), format!("\n{word} "), format!("\n{word}_bucket{{")];
            assert!(
                series.iter().any(|series| exposition.contains(series)),
                "{what} uses {word}, which does not exist"
            );
        }
    }
}

/// What a watch beside the program exposes.
fn of_a_watch(counterfoil: &Counterfoil, backend: SocketAddr) -> String {
    let (pid, admin) = (counterfoil.pid(), counterfoil.admin.expect("an admin address"));
    let watch = Watch::start(&format!(
        "--pid {pid} --backend {backend} --userspace-metric http://{admin}/metrics counterfoil_total_connections"
    ));
    watch.wait_metrics("both halves are there", SOON, |metrics| {
        metrics.has("watched_open_fds") && metrics.has("userspace_excess_connections")
    });
    metrics::get(watch.address, "/metrics").unwrap_or_else(|e| panic!("{e}")).1
}

/// What a forwarder with a listener over TLS exposes.
fn of_a_listener_over_tls(backend: SocketAddr) -> String {
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&Config::new(backend).tls(&authority.issue("dns", &["dns.example"])));
    metrics::get(counterfoil.admin.expect("an admin address"), "/metrics").unwrap_or_else(|e| panic!("{e}")).1
}

/// A worker hangs while its backend closes: both are real, last for a while, and reach a real Prometheus as alerts.
#[test]
fn a_real_prometheus_scrapes_without_error_and_raises_the_alerts() {
    const HANG: Duration = Duration::from_secs(20);
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
    let config = Config::new(backend.address).identity("connection").set("watchdog", "reap", "\"on\"").set(
        "listener",
        "max_connections",
        100,
    );
    let counterfoil = Counterfoil::start(&config);
    let rules = [file("rules.yml"), file("alerts.yml")];
    let admin = counterfoil.admin.expect("an admin address");
    let (_, mut exposition) = metrics::get(admin, "/metrics").unwrap_or_else(|e| panic!("{e}"));
    exposition.push_str(&of_a_watch(&counterfoil, backend.address));
    exposition.push_str(&of_a_listener_over_tls(backend.address));
    for path in rules.iter().chain(&files("docs/runbooks")) {
        assert_names_exist(stem(path), &read(path), &exposition);
    }

    let prometheus = Prometheus::start(admin, &rules, None);
    wait::until("the target was scraped", SOON, || prometheus.target().0 != "unknown");
    assert_eq!(prometheus.target(), ("up".to_owned(), String::new()));
    assert_eq!(prometheus.query("count(counterfoil_discrepancy_sockets{class=\"zombie\"})"), [3.0]);
    let mut client = counterfoil.client();
    client.exchange(1, "before.example.test", qtype::A);
    // One connection, one place, one port; and a limit for each.
    let used = |resource: &str| prometheus.query(&format!("counterfoil:resource_used{{resource=\"{resource}\"}}"));
    wait::until("use of all resources is recorded", SOON, || {
        ["ports", "backend_connections", "total_connections", "client_connections", "listener_connections"]
            .iter()
            .all(|it| used(it) == [1.0])
    });
    assert!(used("descriptors")[0] > 10.0, "{:?}", used("descriptors"));
    let limits = prometheus.query("counterfoil:resource_limit > counterfoil:resource_used");
    assert_eq!(limits.len(), 6, "{limits:?}");
    assert!(prometheus.alerts("pending").is_empty() && prometheus.alerts("firing").is_empty());

    let hang = json!({"cmd": "hang", "worker": 0, "millis": HANG.as_millis() as u64});
    let events = counterfoil.admin(&hang, SOON);
    assert!(events.last().is_some_and(|event| event["ok"] == true), "{events:?}");
    // Sent is not begun: a worker that still runs would see the backend close.
    counterfoil.wait_metrics("the worker hangs", HANG, |metrics| metrics.sum("worker_stalled", &[]) == 1.0);
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
    let groups = groups.as_array().unwrap();
    let rules: Vec<_> = groups.iter().flat_map(|group| group["rules"].as_array().unwrap()).collect();
    assert!(rules.len() > 30 && rules.iter().all(|rule| rule["health"] == "ok"), "{groups:?}");
    assert_eq!(prometheus.target(), ("up".to_owned(), String::new()));
    assert_eq!(prometheus.query("min_over_time(up[1m])"), [1.0], "no scrape failed");
}

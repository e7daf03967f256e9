//! A witness of the kernel view lies, and is named: in a metric, in the log, and to the operator. While it is eBPF, nothing
//! is reaped.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::time::Duration;

use serde_json::{Value, json};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{self, Counterfoil};
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::metrics::Metrics;
use counterfoil_tests::wait;

const DEADLINE: Duration = Duration::from_secs(20);
const WITNESSES: [&str; 3] = ["ebpf", "sock_diag", "proc_fd"];
const CONNECTIONS: usize = 3;
/// What the log says of one that is named.
const NAMED: &str = "one of the kernel view's witnesses is wrong";

/// A program that compares often, with some connections in use.
struct Scene {
    counterfoil: Counterfoil,
    clients: Vec<Client>,
    _backend: FakeBackend,
}

impl Scene {
    fn new() -> Self {
        let backend = FakeBackend::answering(true);
        let config = Config::new(backend.address)
            .identity("connection")
            .set("watchdog", "reap", "\"on\"")
            .set("watchdog", "interval", "\"200ms\"")
            .set("watchdog", "grace", "\"200ms\"")
            .set("watchdog", "crosscheck_interval", "\"200ms\"")
            .set("listener", "idle_timeout", "\"60s\"");
        let counterfoil = Counterfoil::start(&config);
        let mut clients: Vec<Client> = (0..CONNECTIONS).map(|_| counterfoil.client()).collect();
        clients.iter_mut().for_each(|client| Load::default().run(client).assert_all_answered(1));
        let scene = Self { counterfoil, clients, _backend: backend };
        scene.view_when("they agree", |view| view["crosscheck"]["view"].as_u64() == Some(CONNECTIONS as u64));
        scene.assert_named(&scene.counterfoil.metrics(), "nobody");
        scene
    }

    fn lie(&self, witness: Option<&str>) {
        let events = self.counterfoil.admin(&json!({"cmd": "lie", "witness": witness}), DEADLINE);
        assert!(events.iter().any(|event| event["ok"] == true), "{events:?}");
    }

    /// What `ctl show view` says as soon as it satisfies the condition.
    fn view_when(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let mut last = Vec::new();
        let view = wait::poll(DEADLINE, || {
            last = self.counterfoil.admin(&json!({"cmd": "show", "what": "view"}), DEADLINE);
            last.iter().find(|event| event["event"] == "view" && condition(event)).cloned()
        });
        view.unwrap_or_else(|| panic!("{what}: {last:?}\n{}", self.counterfoil.process.tail()))
    }

    /// Sweeps by the watchdog until it has made `count` more.
    fn sweeps(&self, count: f64) -> Metrics {
        let now = self.counterfoil.metrics().sum("watchdog_sweeps_total", &[]);
        self.counterfoil
            .wait_metrics("more sweeps", DEADLINE, |metrics| metrics.sum("watchdog_sweeps_total", &[]) >= now + count)
    }

    fn assert_named(&self, metrics: &Metrics, liar: &str) {
        for witness in WITNESSES {
            let count = metrics.value("kernel_witness_disagreements_total", &[("witness", witness)]);
            assert_eq!(count > 0.0, witness == liar, "{witness}: {count}\n{}", self.counterfoil.process.tail());
        }
    }

    fn rests(mut self) {
        self.clients.clear();
        self.counterfoil.assert_quiescent();
    }
}

fn lies(liar: &str) {
    let mut scene = Scene::new();
    scene.lie(Some(liar));
    let view = scene.view_when("the liar is named", |view| view["crosscheck"]["liar"] == liar);
    println!("{}", view["crosscheck"]);
    let disagreement = view["crosscheck"]["disagreement"].as_str().unwrap();
    assert!(
        disagreement.contains(&format!("{liar} contradicts the two others about {CONNECTIONS} ")),
        "{disagreement}"
    );
    let metrics = scene.counterfoil.wait_metrics("the metric names it", DEADLINE, |metrics| {
        metrics.sum("kernel_witness_disagreements_total", &[]) > 0.0
    });
    scene.assert_named(&metrics, liar);
    let logged = scene.counterfoil.process.find_line(DEADLINE, |line| counterfoil::message(line, NAMED)).unwrap();
    assert_eq!(counterfoil::field(&logged, "liar").as_deref(), Some(liar));

    // Enough for a finding, and for what the reaper does about it.
    let metrics = scene.sweeps(15.0);
    let uncertain = metrics.value("kernel_view_uncertain", &[]);
    assert_eq!(metrics.sum("reaped_total", &[]), 0.0, "{}", scene.counterfoil.process.tail());
    if liar == "ebpf" {
        assert_eq!(uncertain, 1.0, "two against the view");
        let lines = scene.counterfoil.process.lines();
        let said = lines.iter().filter(|line| line.contains("the kernel view is uncertain")).count();
        assert!((1..=4).contains(&said), "{said} lines in fifteen sweeps: it says so once, and then only what changes");
        // It hides all connections: each looks like a ghost, and is left alone.
        let ghosts = metrics.sum("discrepancy_sockets", &[("class", "ghost")]);
        assert_eq!(ghosts, CONNECTIONS as f64, "{}", scene.counterfoil.process.tail());
    } else {
        assert_eq!(uncertain, 0.0, "two agree, and the view is one of them");
        assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0);
    }

    scene.lie(None);
    scene.view_when("they agree again", |view| {
        view["crosscheck"]["liar"].is_null()
            && view["crosscheck"]["disagreement"].is_null()
            && view["uncertain"].is_null()
    });
    let metrics = scene.sweeps(3.0);
    assert_eq!(metrics.value("kernel_view_uncertain", &[]), 0.0);
    assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0);
    scene.assert_named(&metrics, liar);
    scene.rests();
}

#[test]
fn ebpf_lies() {
    lies("ebpf");
}

#[test]
fn sock_diag_lies() {
    lies("sock_diag");
}

#[test]
fn proc_fd_lies() {
    lies("proc_fd");
}

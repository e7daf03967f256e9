//! The fire alarm's test button, for every class; and a worker that hangs, of which nothing may be reaped.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::sockets::State;
use counterfoil_tests::wait;

/// What must hold between the moment that a class's condition holds and its finding.
const DETECTED_WITHIN: Duration = Duration::from_secs(5);

/// `[connections] idle_timeout` and `cleanup_interval` here: a hoard is one only when idle for longer than both.
const IDLE: Duration = Duration::from_secs(2);
const CLEANUP: Duration = Duration::from_secs(1);
/// The program's default `[watchdog] grace`.
const GRACE: Duration = Duration::from_secs(3);

/// How much longer it may take where `cargo xtask kernels` runs this, on a processor that is emulated: to start the
/// program that asks for the drill takes up to two seconds there, and they count here.
fn slack() -> Duration {
    let processor = std::fs::read_to_string("/proc/cpuinfo").expect("every Linux has it");
    if processor.contains("QEMU TCG CPU") { DETECTED_WITHIN } else { Duration::ZERO }
}

/// Asks over `client` until told to stop: a healthy connection in use. How many were answered.
fn keep_asking(client: &mut Client, stop: &AtomicBool) -> usize {
    let mut answered = 0;
    while !stop.load(Ordering::Relaxed) {
        Load::default().run(client).assert_all_answered(1);
        answered += 1;
        std::thread::sleep(Duration::from_millis(100));
    }
    answered
}

/// Runs one drill with reaping on; `condition` is how long after the leak was made the class's condition holds.
fn drill(class: &str, condition: Duration) {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address)
        .identity("connection")
        .set("watchdog", "reap", "\"on\"")
        .set("connections", "idle_timeout", format!("\"{}s\"", IDLE.as_secs()))
        .set("connections", "cleanup_interval", format!("\"{}s\"", CLEANUP.as_secs()));
    let counterfoil = Counterfoil::start(&config);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let healthy = scope.spawn(|| {
            let mut client = counterfoil.client();
            keep_asking(&mut client, &stop)
        });
        wait::until("the healthy connection is open", DETECTED_WITHIN, || backend.open() == 1);
        let labels = [("class", class)];
        let within = condition + DETECTED_WITHIN + slack();
        let start = Instant::now();
        let run = scope.spawn(|| counterfoil.drill(class, Duration::from_secs(60)));
        let found = wait::poll(within + Duration::from_secs(1), || {
            (counterfoil.metrics().sum("discrepancy_sockets", &labels) > 0.0).then(|| start.elapsed())
        });
        let (ok, output) = run.join().expect("the drill ends");
        stop.store(true, Ordering::Relaxed);
        println!("{class}: found after {found:?}\n{output}");
        assert!(ok, "{class}: {output}");
        let found = found.unwrap_or_else(|| panic!("{class} was not found: {output}\n{}", counterfoil.process.tail()));
        assert!(found <= within, "{class} was found after {found:?}");
        let metrics = counterfoil.wait_metrics("the finding is gone", DETECTED_WITHIN, |metrics| {
            metrics.sum("reaped_total", &labels) >= 1.0 && metrics.sum("discrepancy_sockets", &labels) == 0.0
        });
        for outcome in ["ineffective", "dry_run"] {
            assert_eq!(metrics.sum("reaped_total", &[("outcome", outcome)]), 0.0, "{class}");
        }
        // One leak, one reaping: the healthy connection is still the first and only one.
        assert_eq!(metrics.sum("reaped_total", &[]), 1.0, "{class}");
        assert!(healthy.join().expect("the healthy client was served") > 10);
        assert_eq!(backend.accepted(), 1, "{class}: the healthy connection lived on");
    });
    counterfoil.assert_quiescent();
}

#[test]
fn orphan() {
    drill("orphan", Duration::ZERO);
}

#[test]
fn ghost() {
    drill("ghost", Duration::ZERO);
}

#[test]
fn zombie() {
    drill("zombie", Duration::ZERO);
}

#[test]
fn hoard() {
    drill("hoard", IDLE + CLEANUP + GRACE);
}

/// By default the watchdog says what it would do, and does nothing.
#[test]
fn in_dry_run_nothing_is_touched() {
    let backend = FakeBackend::answering(true);
    let counterfoil = Counterfoil::start(&Config::new(backend.address).identity("connection"));
    std::thread::scope(|scope| {
        let run = scope.spawn(|| counterfoil.drill("zombie", Duration::from_secs(60)));
        let dry = [("class", "zombie"), ("outcome", "dry_run")];
        counterfoil.wait_metrics("a dry-run reaping", Duration::from_secs(10), |metrics| {
            metrics.sum("reaped_total", &dry) >= 1.0
        });
        let (_, output) = run.join().expect("the drill ends");
        println!("{output}");
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("reaped_total", &[]), metrics.sum("reaped_total", &dry));
    });
}

/// A worker hangs while its backend closes: zombies pile up that the worker cannot see. It is reported, nothing is
/// reaped, and when the worker is back all is well again.
#[test]
fn a_hanging_worker_is_reported_and_nothing_of_it_is_reaped() {
    const HANG: Duration = Duration::from_secs(12);
    const CLIENTS: usize = 5;
    let close = Arc::new((Mutex::new(false), std::sync::Condvar::new()));
    let signal = Arc::clone(&close);
    let backend = FakeBackend::start(move |connection| {
        if connection.header().is_none() {
            return;
        }
        let Some(query) = connection.query() else { return };
        connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        let closing = signal.0.lock().unwrap();
        let _closing = signal.1.wait_timeout_while(closing, Duration::from_secs(30), |closing| !*closing).unwrap();
    });
    let config = Config::new(backend.address).identity("connection").set("watchdog", "reap", "\"on\"").set(
        "listener",
        "idle_timeout",
        "\"60s\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| counterfoil.client()).collect();
    for client in &mut clients {
        client.exchange(1, "before.example.test", qtype::A);
    }
    let start = Instant::now();
    let command = json!({"cmd": "hang", "worker": 0, "millis": HANG.as_millis() as u64});
    let events = counterfoil.admin(&command, DETECTED_WITHIN);
    assert!(events.last().is_some_and(|event| event["ok"] == true), "{events:?}");
    *close.0.lock().unwrap() = true;
    close.1.notify_all();
    let worker = [("worker", "0")];
    counterfoil.wait_metrics("the stalled worker is reported", DETECTED_WITHIN, |metrics| {
        metrics.sum("worker_stalled", &worker) == 1.0
    });
    println!("reported after {:?}", start.elapsed());
    let states = || counterfoil.backend_sockets(backend.address).iter().map(|s| s.state).collect::<Vec<_>>();
    let all_wait = [State::CloseWait; CLIENTS];
    // Long past grace and sweeps they are all still there, and untouched.
    while start.elapsed() < HANG - Duration::from_secs(2) {
        assert_eq!(states(), all_wait);
        assert_eq!(counterfoil.metrics().sum("reaped_total", &[]), 0.0);
        std::thread::sleep(Duration::from_millis(200));
    }
    counterfoil.wait_metrics("the worker is back", HANG, |metrics| metrics.sum("worker_stalled", &worker) == 0.0);
    wait::until("it closed what the backend closed", DETECTED_WITHIN, || states().is_empty());
    assert_eq!(counterfoil.metrics().sum("reaped_total", &[]), 0.0);
    *close.0.lock().unwrap() = false;
    for client in &mut clients {
        client.exchange(2, "after.example.test", qtype::A);
    }
    drop(clients);
    *close.0.lock().unwrap() = true;
    close.1.notify_all();
    counterfoil.assert_quiescent();
}

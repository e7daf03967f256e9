//! The fire alarm's test button, for every class; and a worker that hangs, of which nothing may be reaped.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, field, message};
use counterfoil_tests::drill::Drilled;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{answer_to, qtype};
use counterfoil_tests::metrics::Metrics;
use counterfoil_tests::sockets::State;
use counterfoil_tests::wait;

/// So many sweeps in a row see a leak until it is a finding: they are a second apart or more, and it takes three of them and
/// three seconds. This is what bounds how long it takes, on a machine that has time.
const FOUND_IN_SWEEPS: u64 = 4;

/// For one step, on a busy machine or where `cargo xtask kernels` runs this, on a processor that is emulated.
const SOON: Duration = Duration::from_secs(60);

/// Whether it is emulated: too slow to scrape an alarm before what it is about is reaped.
fn is_emulated() -> bool {
    let processor = std::fs::read_to_string("/proc/cpuinfo").expect("every Linux has it");
    processor.contains("QEMU TCG CPU")
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

/// Runs these drills at once with reaping on, beside a healthy connection, and checks what each came to: class, deaf,
/// the last rung of the ladder, and the outcome.
fn drill(expected: &[(&'static str, bool, &str, &str)]) {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("connection").set("watchdog", "reap", "\"on\"");
    let counterfoil = Counterfoil::start(&config);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let healthy = scope.spawn(|| {
            let mut client = counterfoil.client();
            keep_asking(&mut client, &stop)
        });
        wait::until("the healthy connection is open", SOON, || backend.open() == 1);
        let drills: Vec<_> = expected.iter().map(|(class, deaf, ..)| (*class, *deaf)).collect();
        let drilled = Drilled::all(&counterfoil, &drills);
        stop.store(true, Ordering::Relaxed);
        for (drilled, (class, _, rung, outcome)) in drilled.iter().zip(expected) {
            assert!(drilled.succeeded(), "{drilled:#?}");
            let (detection, reaping) = (drilled.detection(), drilled.reaping());
            // The drill's own step may come later.
            let sweeps = logged(&counterfoil, "finding", drilled)["sweeps"].as_u64().expect("a number");
            println!(
                "{class}: found after {detection:?}, in {sweeps} sweeps, {outcome} by {rung} after another {reaping:?}"
            );
            let alarm = drilled.step("alarm")["value"].as_f64();
            assert!(alarm >= Some(1.0) || is_emulated(), "{drilled:#?}");
            assert!(sweeps <= FOUND_IN_SWEEPS, "{class} was found in {sweeps} sweeps");
            assert_eq!((drilled.text("reaping", "rung"), drilled.text("outcome", "outcome")), (*rung, *outcome));
            // What is severed is still held: an orphan as before, the others as a connection that is closed.
            let remains = drilled.events.iter().find(|event| event["event"] == "remains");
            let wanted = match (*class, *outcome) {
                ("orphan", "severed") => Some("orphan"),
                (_, "severed") => Some("zombie"),
                _ => None,
            };
            assert_eq!(remains.and_then(|remains| remains["class"].as_str()), wanted, "{drilled:#?}");
            assert_recorded(&counterfoil, drilled);
        }
        let metrics = counterfoil
            .wait_metrics("the findings are gone", SOON, |metrics| metrics.sum("discrepancy_sockets", &[]) == 0.0);
        for (class, _, _, outcome) in expected {
            assert_eq!(metrics.sum("reaped_total", &[("class", class), ("outcome", outcome)]), 1.0, "{class}");
        }
        // One leak, one reaping: the healthy connection is still the first and only one.
        assert_eq!(metrics.sum("reaped_total", &[]), expected.len() as f64);
        assert!(healthy.join().expect("the healthy client was served") > 10);
        assert_eq!(backend.accepted(), 1, "the healthy connection lived on");
    });
    counterfoil.assert_quiescent();
}

/// The fields of the log's line with this message about what a drill has leaked.
fn logged(counterfoil: &Counterfoil, wanted: &str, drilled: &Drilled) -> serde_json::Value {
    let lines = counterfoil.process.lines();
    let line = lines.iter().filter_map(|line| message(line, wanted)).find(|line| line["cookie"] == drilled.cookie());
    line.unwrap_or_else(|| panic!("{drilled:#?}: {}", counterfoil.process.tail()))
}

/// The log's line of a drill's reaping, and what `ctl show leaks` has of it.
fn assert_recorded(counterfoil: &Counterfoil, drilled: &Drilled) {
    let line = logged(counterfoil, "reaped", drilled);
    let (ok, shown) = counterfoil.ctl(&["show", "leaks", "-o", "json"], SOON);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap_or_else(|e| panic!("{ok} {e}: {shown}"));
    let reaps = shown["reaps"].as_array().expect("a list");
    let record = reaps.iter().find(|reap| reap["cookie"] == drilled.cookie()).expect("it is remembered");
    for field in ["class", "backend", "rung", "outcome", "note", "ordered", "sweeps", "tlv_types", "evidence"] {
        assert_eq!(line[field], record[field], "{field}: {line} {record}");
    }
    assert_eq!((&line["class"], &line["backend"]), (&drilled.class.into(), &"drill".into()));
    let ghost = drilled.class == "ghost";
    let ends = |of: &serde_json::Value| [of["local"].clone(), of["remote"].clone()];
    let leaked = drilled.step("leaked");
    // A ghost has no socket, and so no ends.
    assert_eq!(ends(&line), if ghost { ["".into(), "".into()] } else { ends(leaked) }, "{line}");
    assert_eq!(ends(record), if ghost { [().into(), ().into()] } else { ends(leaked) }, "{record}");
    let evidence = field(&line, "evidence").expect("text");
    assert!(evidence.starts_with("kernel: ") && evidence.contains("; ledger: "), "{line}");
    let changes = field(&line, "changes").expect("text");
    assert!(changes.split(", ").all(|change| change.contains(" s ago ") && change.contains('/')), "{line}");
    let number = |field: &str| line[field].as_f64().expect("a number");
    assert!(number("since_seconds") >= 3.0 && number("sweeps") >= 3.0, "{line}");
    assert!(number("age_seconds") >= number("since_seconds") || ghost, "{line}");
    assert!(!record["changes"].as_array().expect("a list").is_empty(), "{record}");
}

/// The first rung is enough for each of them: the owner is asked. Nobody owns an orphan, and nobody holds a ghost.
#[test]
fn each_class_is_found_and_reaped() {
    drill(&[
        ("orphan", false, "sock_destroy", "severed"),
        ("ghost", false, "retire_row", "released"),
        ("zombie", false, "ask_owner", "released"),
        ("hoard", false, "ask_owner", "released"),
        ("stuck", false, "ask_owner", "released"),
        ("embryo", false, "ask_owner", "released"),
        ("lingering", false, "ask_owner", "released"),
    ]);
}

/// Where the owner does nothing, `shutdown(2)` ends what needs nobody's consent any more: the backend has closed, or has
/// never answered. The others wait for their backend's FIN, until SOCK_DESTROY.
#[test]
fn a_deaf_owner_is_climbed_past() {
    drill(&[
        ("zombie", true, "shutdown", "severed"),
        ("embryo", true, "shutdown", "severed"),
        ("hoard", true, "sock_destroy", "severed"),
        ("stuck", true, "sock_destroy", "severed"),
        ("lingering", true, "sock_destroy", "severed"),
    ]);
}

/// A worker whose clean-up has ended keeps a client's connection for ever, as a bug would: the reaper asks it, and its
/// log line says whose connection it was.
#[test]
fn a_neglected_connection_is_reaped_by_its_worker() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address)
        .identity("connection")
        .tlv(0xe0, "x")
        .tlv(0xea, "y")
        .set("listener", "idle_timeout", "\"60s\"")
        .set("pool", "query_timeout", "\"1s\"")
        .settles_soon()
        .set("watchdog", "reap", "\"on\"");
    let mut counterfoil = Counterfoil::start(&config);
    let neglect = counterfoil.admin(&json!({"cmd": "neglect", "worker": 0}), SOON);
    assert!(neglect.last().is_some_and(|event| event["ok"] == true), "{neglect:?}");
    let mut client = counterfoil.client();
    client.exchange(1, "first.example.test", qtype::A);
    let line = counterfoil.process.wait_for_line(SOON, "the reaping", |line| message(line, "reaped"));
    println!("{line}");
    let text = |name: &str| field(&line, name).unwrap_or_default();
    assert_eq!((text("class"), text("backend")), ("hoard".to_owned(), "backend-0".to_owned()));
    assert_eq!((text("rung"), text("outcome")), ("ask_owner".to_owned(), "released".to_owned()));
    assert_eq!((text("tlv_types"), text("remote")), ("0xE0,0xEA".to_owned(), backend.address.to_string()));
    assert_eq!((&line["owner"], &line["ordered"]), (&1.into(), &false.into()));
    assert!(text("evidence").contains("kernel: established") && text("evidence").contains("ledger: owned idle"));
    assert!(text("changes").contains("established/idle"), "{line}");
    // The client notices nothing: its next query goes over a new connection.
    client.exchange(2, "second.example.test", qtype::A);
    assert_eq!(backend.accepted(), 2);
    drop(client);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("reaped_total", &[("class", "hoard"), ("outcome", "released")]), 1.0);
}

/// In dry run the watchdog says what it would do, and does nothing.
#[test]
fn in_dry_run_nothing_is_touched() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("connection").set("watchdog", "reap", "\"dry-run\"");
    let counterfoil = Counterfoil::start(&config);
    std::thread::scope(|scope| {
        let run = scope.spawn(|| counterfoil.drill("zombie", SOON));
        let dry = [("class", "zombie"), ("outcome", "dry_run")];
        counterfoil.wait_metrics("a dry-run reaping", SOON, |metrics| metrics.sum("reaped_total", &dry) >= 1.0);
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
    // Grace and sweeps together, with an interval of a second.
    const SWEEPS: f64 = 4.0;
    let close = Arc::new((Mutex::new(false), std::sync::Condvar::new()));
    let signal = Arc::clone(&close);
    let backend = FakeBackend::start(move |connection| {
        if connection.header().is_none() {
            return;
        }
        let Some(query) = connection.query() else { return };
        connection.send(&answer_to(&query, [192, 0, 2, 53]));
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
    let events = counterfoil.admin(&command, SOON);
    assert!(events.last().is_some_and(|event| event["ok"] == true), "{events:?}");
    *close.0.lock().unwrap() = true;
    close.1.notify_all();
    let worker = [("worker", "0")];
    counterfoil
        .wait_metrics("the stalled worker is reported", SOON, |metrics| metrics.sum("worker_stalled", &worker) == 1.0);
    println!("reported after {:?}", start.elapsed());
    let states = || counterfoil.backend_sockets(backend.address).iter().map(|s| s.state).collect::<Vec<_>>();
    let all_wait = [State::CloseWait; CLIENTS];
    // Each connection of the backend's is closed by a thread of its own.
    wait::until("the backend has closed all of them", SOON, || states() == all_wait);
    // Long past grace and sweeps they are all still there, and untouched.
    let sweeps = |metrics: &Metrics| metrics.sum("watchdog_sweeps_total", &[]);
    let (first, mut last) = (counterfoil.metrics(), None);
    loop {
        let (seen, metrics) = (states(), counterfoil.metrics());
        // Only what was seen before this moment was surely seen while it hung.
        if start.elapsed() >= HANG {
            break;
        }
        assert_eq!(seen, all_wait);
        assert_eq!(metrics.sum("reaped_total", &[]), 0.0);
        last = Some(metrics);
        std::thread::sleep(Duration::from_millis(200));
    }
    let swept = sweeps(&last.expect("it was looked at while it hung")) - sweeps(&first);
    assert!(swept > SWEEPS, "only {swept} sweeps while it hung");
    counterfoil.wait_metrics("the worker is back", HANG, |metrics| metrics.sum("worker_stalled", &worker) == 0.0);
    wait::until("it closed what the backend closed", SOON, || states().is_empty());
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

//! A thousand drills under load: how long each class takes to be found and to be reaped, and that nothing else is touched.
#![expect(clippy::expect_used, reason = "tests panic")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::drill::{CLASSES, Drilled};
use counterfoil_tests::load::tool::{Tool, load};

const LOADGEN: &str = env!("CARGO_BIN_EXE_loadgen");
const ANSWERER: &str = env!("CARGO_BIN_EXE_answerer");

const DRILLS: usize = 1000;
/// Fewer than may run at once: one that was just over is still being cleared away.
const AT_ONCE: usize = 28;

/// The program's default `[watchdog] interval`.
const SWEEP: Duration = Duration::from_secs(1);

/// Runs the load generator again and again until told to stop. How many queries were answered: all.
fn keep_asking(target: &str, arguments: &[&str], stop: &AtomicBool) -> u64 {
    let mut answers = 0;
    while !stop.load(Ordering::Relaxed) {
        let (well, result) = load(LOADGEN, target, &[&["--seconds=10", "--clients=20"], arguments].concat());
        assert!(well, "{arguments:?}: {result}");
        answers += result["answers"].as_u64().expect("a number");
    }
    answers
}

/// Runs [`DRILLS`] drills, [`AT_ONCE`] at once, the classes in turn.
fn drill(counterfoil: &Counterfoil) -> Vec<Drilled> {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let run = || {
            let mut drilled = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= DRILLS {
                    return drilled;
                }
                // Otherwise each begins right after the sweep that ended the one before, and all wait as long for the next.
                std::thread::sleep(SWEEP.mul_f64(fastrand::f64()));
                drilled.push(Drilled::run(counterfoil, CLASSES[number % CLASSES.len()], false));
            }
        };
        let running: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(run)).collect();
        running.into_iter().flat_map(|drills| drills.join().expect("the drills end")).collect()
    })
}

/// The quantile of a sorted list, and the longest.
fn quantiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |quantile: f64| times[((times.len() - 1) as f64 * quantile).round() as usize].as_secs_f64();
    format!("p50 {:.2} s, p99 {:.2} s, max {:.2} s", at(0.5), at(0.99), at(1.0))
}

#[test]
#[ignore = "soak"]
fn soak_drills_a_thousand() {
    let with_header = Tool::start(ANSWERER, &["--proxy", "--check-port", "--check-label"]);
    let without_header = Tool::start(ANSWERER, &[]);
    let address = |tool: &Tool| tool.address.parse().expect("an address");
    let config = Config::new(address(&with_header))
        .identity("connection")
        .tlv(0xe0, "{qname_label:1}")
        .listener_without_header("plain", address(&without_header))
        .set("server", "workers", 2)
        .set("connections", "idle_timeout", "\"5s\"")
        .set("watchdog", "reap", "\"on\"");
    let counterfoil = Counterfoil::start(&config);
    let own = counterfoil.listener("dns").to_string();
    let shared = counterfoil.listener("plain").to_string();
    let (begin, stop) = (Instant::now(), AtomicBool::new(false));
    let (drills, answers) = std::thread::scope(|scope| {
        let loads = [
            (&shared, ["--rate=1500", "--names=unique"]),
            (&own, ["--rate=500", "--names=constant"]),
            (&own, ["--rate=500", "--names=unique"]),
        ];
        let loads = loads.map(|(target, arguments)| {
            let stop = &stop;
            scope.spawn(move || keep_asking(target, &arguments, stop))
        });
        let drills = drill(&counterfoil);
        stop.store(true, Ordering::Relaxed);
        (drills, loads.map(|load| load.join().expect("every query is answered")).into_iter().sum::<u64>())
    });
    println!("{} drills and {answers} queries in {:.0} s", drills.len(), begin.elapsed().as_secs_f64());

    let mut by_class: BTreeMap<&str, Vec<&Drilled>> = BTreeMap::new();
    for drilled in &drills {
        assert!(drilled.succeeded(), "{drilled:#?}\n{}", counterfoil.process.tail());
        let outcome = if drilled.class == "orphan" { "severed" } else { "released" };
        assert_eq!(drilled.text("outcome", "outcome"), outcome, "{drilled:#?}");
        by_class.entry(drilled.class).or_default().push(drilled);
    }
    for (class, drills) in &by_class {
        let mut rungs: BTreeMap<&str, usize> = BTreeMap::new();
        for drilled in drills {
            *rungs.entry(drilled.text("reaping", "rung")).or_default() += 1;
        }
        println!("{class:>9}: {} drills, by {rungs:?}", drills.len());
        println!("           found  {}", quantiles(drills.iter().map(|drilled| drilled.detection()).collect()));
        println!("           reaped {}", quantiles(drills.iter().map(|drilled| drilled.reaping()).collect()));
    }

    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    for kind in ["shared", "owned", "one_shot"] {
        let labels = [("kind", kind), ("backend", "drill")];
        let opened = metrics.sum("backend_connections_opened_total", &[("kind", kind)])
            - metrics.sum("backend_connections_opened_total", &labels);
        println!("{kind}: {opened} connections");
        assert!(opened > 0.0, "the load opens none of this kind");
    }
    // Every leak was reaped, and nothing else; every query was answered by a backend.
    for class in CLASSES {
        let outcome = if class == "orphan" { "severed" } else { "released" };
        let reaped = metrics.sum("reaped_total", &[("class", class), ("outcome", outcome)]);
        assert_eq!(reaped, by_class[class].len() as f64, "{class}");
    }
    assert_eq!(metrics.sum("reaped_total", &[]), DRILLS as f64);
    assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0);
    assert_eq!((metrics.sum("answers_total", &[]), metrics.sum("queries_failed_total", &[])), (answers as f64, 0.0));
    let (ok, shown) = counterfoil.ctl(&["show", "leaks", "-o", "json"], Duration::from_secs(30));
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert!(ok && shown["reaps"].as_array().is_some_and(|reaps| reaps.len() == DRILLS), "all are remembered");
}

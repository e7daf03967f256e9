//! Start, end, and what an operator sees of it.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{self, Counterfoil};
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::holding::Holding;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::metrics;
use counterfoil_tests::process::{self, Process};
use counterfoil_tests::servers::Prometheus;
use counterfoil_tests::tempdir::TempDir;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(5);

#[test]
fn sigterm_drains_loses_nothing_and_exits_0() {
    const IN_FLIGHT: usize = 20;
    let holding = Holding::start();
    let config = Config::new(holding.backend.address).set("server", "drain_timeout", "\"5s\"");
    let mut counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let mut idle = counterfoil.client();
    for id in 0..IN_FLIGHT {
        client.ask(id as u16, &format!("held{id}.example.test"), qtype::A);
    }
    wait::until("all queries are at the backend", SOON, || holding.backend.queries() == IN_FLIGHT);
    counterfoil.process.signal(rustix::process::Signal::TERM);
    wait::until("nobody is accepted any more", SOON, || match Client::try_connect(counterfoil.address, None) {
        Err(_) => true,
        Ok(mut late) => late.receive(Duration::from_millis(10)) != Received::Nothing,
    });
    assert!(counterfoil.process.exited().is_none(), "it waits for what is in flight");
    holding.release();
    for _ in 0..IN_FLIGHT {
        client.receive(SOON).message();
    }
    assert_eq!(client.receive(Duration::from_secs(10)), Received::Closed);
    assert_eq!(idle.receive(Duration::from_secs(10)), Received::Closed);
    let status = counterfoil.process.wait_exit(Duration::from_secs(10));
    assert_eq!(status.code(), Some(0), "{}", counterfoil.process.tail());
}

/// Clients that keep asking while it drains: each query is answered or was never taken.
#[test]
fn sigterm_under_load_loses_nothing() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("address").set("server", "workers", "2").set(
        "server",
        "drain_timeout",
        "\"2s\"",
    );
    let mut counterfoil = Counterfoil::start(&config);
    let address = counterfoil.address;
    let clients: Vec<_> = (0..8)
        .map(|number| {
            std::thread::spawn(move || {
                let mut client = Client::connect(address, None);
                let name = |n: usize| format!("c{number}-{n}.example.test");
                Load { count: 1_000_000, in_flight: 5, name: &name, ..Load::default() }.run(&mut client)
            })
        })
        .collect();
    wait::until("load runs", SOON, || backend.queries() > 1000);
    let status = counterfoil.terminate(Duration::from_secs(15));
    assert_eq!(status.code(), Some(0), "{}", counterfoil.process.tail());
    for client in clients {
        let outcome = client.join().unwrap();
        assert!(outcome.foreign.is_empty() && outcome.failed.is_empty(), "{outcome:?}");
        assert!(outcome.ended.is_some(), "{outcome:?}");
        // Queries that came after the last answer was on its way were never taken; all that were taken are answered.
        assert_eq!(outcome.missing, (outcome.answered..outcome.sent).collect::<Vec<_>>(), "{outcome:?}");
        assert!(outcome.sent - outcome.answered <= 5);
    }
}

/// A client that is slow to read, and asks on while the process drains, gets all its answers within the time to drain.
#[test]
fn sigterm_delivers_to_a_slow_client() {
    // Their 5.7 MB are more than the kernel keeps, so some are owed to the client when the signal comes: one that is owed
    // nothing may be let go at any moment from then on.
    const COUNT: u16 = 95;
    let backend = FakeBackend::answering_at_length(60_000);
    let config = Config::new(backend.address).set("server", "drain_timeout", "\"8s\"");
    let mut counterfoil = Counterfoil::start(&config.set("listener", "max_pending_answers", "\"16MiB\""));
    let mut client = counterfoil.client();
    for id in 0..COUNT {
        client.ask(id, "large.example.test", qtype::A);
    }
    counterfoil.wait_metrics("all are answered", SOON, |metrics| metrics.sum("answers_total", &[]) == f64::from(COUNT));
    counterfoil.process.signal(rustix::process::Signal::TERM);
    let start = Instant::now();
    let mut sent = COUNT;
    while start.elapsed() < Duration::from_secs(1) {
        client.ask(sent, "more.example.test", qtype::A);
        sent += 1;
        std::thread::sleep(Duration::from_millis(10));
    }
    let delivered: BTreeSet<u16> = (0..sent).map(|_| message::id(&client.receive(SOON).message())).collect();
    assert_eq!(delivered, (0..sent).collect());
    assert_eq!(client.receive(Duration::from_secs(20)), Received::Closed);
    let status = counterfoil.process.wait_exit(Duration::from_secs(20));
    assert_eq!(status.code(), Some(0), "{}", counterfoil.process.tail());
}

#[test]
fn idle_and_drained_it_ends_at_once() {
    let backend = FakeBackend::answering(false);
    let mut counterfoil = Counterfoil::start(&Config::new(backend.address));
    Load::default().run(&mut counterfoil.client()).assert_all_answered(1);
    let start = Instant::now();
    assert_eq!(counterfoil.terminate(SOON).code(), Some(0), "{}", counterfoil.process.tail());
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    wait::until("its backend connection is closed", SOON, || backend.open() == 0);
}

#[test]
fn health_pages_and_metrics_answer() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&Config::new(backend.address));
    let admin = counterfoil.admin.expect("an admin address");
    for page in ["/healthz", "/readyz"] {
        let (head, _) = metrics::get(admin, page).unwrap();
        assert!(head.contains(" 200 "), "{page}: {head}");
    }
    let (head, _) = metrics::get(admin, "/nothing-here").unwrap();
    assert!(head.contains(" 404 "), "{head}");
    Load { count: 5, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(5);
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.value("queries_total", &[("listener", "dns")]), 5.0);
    assert_eq!(metrics.value("answers_total", &[("listener", "dns")]), 5.0);
    assert_eq!(metrics.value("query_duration_seconds_count", &[("pool", "resolvers")]), 5.0);
    assert_eq!(metrics.sum("backend_connections", &[("backend", "backend-0"), ("kind", "shared")]), 1.0);
    assert_eq!(metrics.sum("backend_queries_total", &[("backend", "backend-0")]), 5.0);
    for name in
        ["build_info", "kernel_view_info", "watchdog_last_success_timestamp_seconds", "backend_connections_limit"]
    {
        assert!(metrics.has(name), "{name}");
    }
    counterfoil.wait_metrics("the kernel shows the connection, too", SOON, |metrics| {
        metrics.sum("kernel_backend_sockets", &[("backend", "backend-0")]) == 1.0
    });
}

#[test]
fn prometheus_scrapes_without_error() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&Config::new(backend.address));
    Load { count: 5, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(5);
    let prometheus = Prometheus::start(counterfoil.admin.expect("an admin address"), &[], None);
    wait::until("the target was scraped", Duration::from_secs(10), || prometheus.target().0 != "unknown");
    assert_eq!(prometheus.target(), ("up".to_owned(), String::new()));
    for expression in ["counterfoil_answers_total", "sum(counterfoil_query_duration_seconds_bucket{le=\"+Inf\"})"] {
        // A scrape can be asked for a moment after it was taken.
        wait::until(expression, Duration::from_secs(10), || prometheus.query(expression) == [5.0]);
    }
    assert_eq!(prometheus.target(), ("up".to_owned(), String::new()));
}

#[test]
fn a_bad_configuration_is_refused_with_file_line_and_key() {
    let dir = TempDir::new("config");
    let program = counterfoil::program().display().to_string();
    let good = Config::new(SocketAddr::from(([127, 0, 0, 1], 53))).text("");
    let checks = [
        (good.replace("workers", "werkers"), "werkers", 2),
        (good.replace("workers = 1", "workers = \"one\""), "workers", 2),
        (format!("{good}max_wurst = 1\n"), "max_wurst", good.lines().count() + 1),
        (good.replace("[connections]", "[connections]\nspares_per_backend = -3"), "spares_per_backend", {
            good.lines().position(|line| line == "[connections]").unwrap() + 2
        }),
    ];
    for (number, (text, key, line)) in checks.into_iter().enumerate() {
        let file = dir.write(&format!("bad-{number}.toml"), &text).display().to_string();
        for command in [vec!["check-config", &file], vec!["run", "--config", &file]] {
            let mut process = Process::start("counterfoil", &program, &command);
            let status = process.wait_exit(Duration::from_secs(10));
            process.stop();
            let output = process.lines().join("\n");
            assert_eq!(status.code(), Some(64), "{command:?}: {output}");
            assert!(
                output.contains(&format!("error: {file}:{line}:")) && output.contains(key),
                "{command:?}: {output}"
            );
        }
    }
    let file = dir.write("good.toml", &good).display().to_string();
    let (ok, output) = process::run(&program, &["check-config", &file], Duration::from_secs(10));
    assert!(ok, "{output}");
}

/// Without a configuration: the demo, and the three commands that it prints work as printed.
#[test]
fn the_demo_prints_commands_that_work() {
    let program = counterfoil::program().display().to_string();
    let mut demo = Process::start("demo", &program, &["run", "--log-format", "json"]);
    demo.wait_for_line(Duration::from_secs(30), "that it is ready", |line| counterfoil::message(line, "ready"));
    let commands = || -> Vec<String> {
        let lines = demo.lines().into_iter().map(|line| line.trim_start().to_owned());
        lines.filter(|line| line.starts_with(&program)).collect()
    };
    wait::until("three commands on stdout", SOON, || commands().len() == 3);
    for command in commands() {
        let (ok, output) = process::run("sh", &["-c", &command], Duration::from_secs(60));
        println!("$ {command}\n{output}");
        assert!(ok, "{command}: {output}");
    }
    demo.signal(rustix::process::Signal::TERM);
    assert_eq!(demo.wait_exit(Duration::from_secs(40)).code(), Some(0), "{}", demo.tail());
}

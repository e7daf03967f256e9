//! Start, end, and what an operator sees of it.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
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

/// A load balancer has the time to take it out: not ready any more, it still serves and accepts for `drain_delay`. Whoever asks
/// for the end again cuts that short.
#[test]
fn sigterm_is_announced_before_clients_are_refused() {
    let backend = FakeBackend::answering(false);
    let config = Config::new(backend.address).settles_soon().set("server", "drain_delay", "\"10m\"");
    for by_order in [false, true] {
        let mut counterfoil = Counterfoil::start(&config);
        let mut early = counterfoil.client();
        let _order = by_order.then(|| counterfoil.begin(&serde_json::json!({"cmd": "drain"})));
        if !by_order {
            counterfoil.process.signal(rustix::process::Signal::TERM);
        }
        let unready = || metrics::get(counterfoil.admin.unwrap(), "/readyz").unwrap();
        wait::until("it is not ready any more", SOON, || unready().0.contains(" 503 "));
        assert_eq!(unready().1, "not serving\n");
        let (head, _) = metrics::get(counterfoil.admin.unwrap(), "/healthz").unwrap();
        assert!(head.contains(" 200 "), "{head}");
        for _ in 0..20 {
            Load::default().run(&mut counterfoil.client()).assert_all_answered(1);
        }
        Load::default().run(&mut early).assert_all_answered(1);
        let (ok, said) = counterfoil.ctl(&["reload"], SOON);
        assert!(!ok && said.contains("the process drains"), "{said}");
        if by_order {
            // The service manager's, which follows `ctl drain`: it says nothing new.
            counterfoil.process.signal(rustix::process::Signal::TERM);
            let mut late = counterfoil.client();
            Load::default().run(&mut late).assert_all_answered(1);
        }
        assert!(counterfoil.process.exited().is_none());
        drop(early);
        let status = counterfoil.terminate(SOON);
        assert_eq!(status.code(), Some(0), "{}", counterfoil.process.tail());
        let said =
            |what: &str| counterfoil.process.lines().iter().any(|line| counterfoil::message(line, what).is_some());
        assert!(said("drain_delay is cut short") && said("drained"), "{}", counterfoil.process.tail());
    }
}

/// Two processes never share the clients of a listener, and one that cannot start never has one.
#[test]
fn a_port_that_another_process_has_is_an_error_that_names_it() {
    let backend = FakeBackend::answering(false);
    let config = Config::new(backend.address).settles_soon().set("server", "workers", 2);
    let first = Counterfoil::start(&config);
    let dir = TempDir::new("second");
    let program = counterfoil::program().display().to_string();
    let run = |text: &str| {
        let file = dir.write("counterfoil.toml", text).display().to_string();
        process::run(&program, &["run", "--config", &file], SOON)
    };
    let socket = dir.path().join("admin.sock").display().to_string();
    let wildcard = SocketAddr::from(([0, 0, 0, 0], first.address.port()));
    for address in [first.address, wildcard] {
        let (ok, said) = run(&config.clone().listen(address).text(&socket));
        let holder = format!("listener `dns` cannot listen on {address}: process {} (", first.pid());
        assert!(!ok && said.contains(&holder) && said.contains("listens there already"), "{said}");
    }
    // It fails for another reason, behind a listener that is its own: who connects meanwhile is refused, never reset.
    let taken = format!("\"{}\"", first.admin.unwrap());
    // Nobody else's, and no address from which somebody could meet himself.
    let free = SocketAddr::from(([127, 77, 0, 1], process::free_port()));
    let failing = config.clone().listen(free).set("admin", "http", taken).text(&socket);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let refused =
                    Client::try_connect(free, Some(IpAddr::from([127, 77, 0, 2]))).err().map(|error| error.kind());
                assert_eq!(refused, Some(std::io::ErrorKind::ConnectionRefused), "it was let in");
            }
        });
        for _ in 0..5 {
            let (ok, said) = run(&failing);
            assert!(!ok && said.contains("admin.http"), "{said}");
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        client.join().unwrap();
    });
    for _ in 0..20 {
        Load::default().run(&mut first.client()).assert_all_answered(1);
    }
    first.assert_quiescent();
}

/// SIGHUP is caught before the configuration is read, and then fulfilled; SIGTERM is obeyed before a client is served.
#[test]
fn a_signal_in_the_first_moments_is_fulfilled() {
    let backend = FakeBackend::answering(false);
    let dir = TempDir::new("early");
    let socket = dir.path().join("admin.sock").display().to_string();
    // Long enough to be read for a while.
    let text = Config::new(backend.address).text(&socket) + &"# nothing\n".repeat(90_000);
    let file = dir.write("counterfoil.toml", &text).display().to_string();
    let program = counterfoil::program().display().to_string();
    let started = || Process::start("counterfoil", &program, &["run", "--config", &file, "--log-format", "json"]);
    // When it has caught SIGHUP; and whether it had said nothing then, as it does when it has opened the kernel view.
    let caught = |process: &Process| {
        let status = format!("/proc/{}/status", process.pid());
        wait::until("SIGHUP is caught", SOON, || {
            let status = std::fs::read_to_string(&status).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim().to_owned();
            u64::from_str_radix(&caught, 16).unwrap() & 1 == 1
        });
        process.lines().is_empty()
    };
    // A machine that is busy may let it run on before this looks.
    let early = (0..5).any(|_| {
        let mut process = started();
        let early = caught(&process);
        process.signal(rustix::process::Signal::HUP);
        for what in ["ready", "reloaded"] {
            process.wait_for_line(SOON, what, |line| counterfoil::message(line, what));
        }
        process.signal(rustix::process::Signal::TERM);
        assert_eq!(process.wait_exit(SOON).code(), Some(0), "{}", process.tail());
        early
    });
    assert!(early, "signals are caught before anything is opened");
    let mut process = started();
    caught(&process);
    process.signal(rustix::process::Signal::TERM);
    assert_eq!(process.wait_exit(SOON).code(), Some(0), "{}", process.tail());
}

/// What Kubernetes and systemd wait for before they kill is no shorter than what the program may take.
#[test]
fn the_time_to_end_fits_what_is_deployed() {
    const BEHIND: u64 = 6;
    let seconds = |text: &str, key: &str| -> u64 {
        let line = text.lines().map(str::trim).find_map(|line| line.strip_prefix(key));
        let value = line.unwrap_or_else(|| panic!("{key} is missing")).trim().trim_matches('"');
        value.trim_end_matches('s').parse().unwrap_or_else(|e| panic!("{key} {value:?}: {e}"))
    };
    let manifest = include_str!("../../deploy/kubernetes/counterfoil.yml");
    let needed = seconds(manifest, "drain_delay =") + seconds(manifest, "drain_timeout =") + BEHIND;
    assert!(seconds(manifest, "drain_delay =") >= 5, "time for the endpoint to be taken away");
    assert!(seconds(manifest, "terminationGracePeriodSeconds:") >= needed, "{needed}");
    let unit = include_str!("../../deploy/systemd/counterfoil.service");
    let default = counterfoil_defaults();
    let needed = default.0.as_secs() + default.1.as_secs() + BEHIND;
    assert!(seconds(unit, "TimeoutStopSec=") >= needed, "{needed}");
    let readme = include_str!("../../README.md");
    assert!(readme.contains(&format!("`drain_delay` + `drain_timeout` + {BEHIND} s")), "the README names the sum");
    // The manifest's configuration is one.
    let dir = TempDir::new("manifest");
    let (_, data) = manifest.split_once("counterfoil.toml: |\n").unwrap();
    let lines = data.lines().take_while(|line| line.is_empty() || line.starts_with("    "));
    let text: Vec<&str> = lines.map(|line| line.trim_start_matches("    ")).collect();
    let file = dir.write("counterfoil.toml", &text.join("\n")).display().to_string();
    let program = counterfoil::program().display().to_string();
    let (ok, said) = process::run(&program, &["check-config", &file], SOON);
    assert!(ok, "{said}");
}

/// `drain_delay` and `drain_timeout` where the configuration says nothing.
fn counterfoil_defaults() -> (Duration, Duration) {
    let server = ::counterfoil::config::from_str("f", &Config::new(SocketAddr::from(([127, 0, 0, 1], 53))).text("/s"));
    let server = server.unwrap().server;
    (server.drain_delay, server.drain_timeout)
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

//! Never a false reap: connections of every kind at full load, with reaping on, in a process that is stopped, starved and
//! has its wall clock set. None is reaped, and none is even a finding.
#![expect(clippy::expect_used, reason = "tests panic")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use serde_json::json;
use socket2::{Domain, Socket, Type};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, message as log_message};
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::load::tool::Tool;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::metrics::Metrics;
use counterfoil_tests::troubles::Troubles;

const LOADGEN: &str = env!("CARGO_BIN_EXE_loadgen");
const ANSWERER: &str = env!("CARGO_BIN_EXE_answerer");

/// `[connections] idle_timeout`, `[pool] query_timeout` and what is just below them.
const TIMEOUT: Duration = Duration::from_secs(2);
const JUST_BELOW: Duration = Duration::from_millis(1800);

/// Threads of clients that do as they please, beside those that only load.
const CLIENTS: u64 = 12;

/// One run.
struct Run {
    identity: &'static str,
    /// `[watchdog]` far below its defaults, so that a race would show.
    harsh: bool,
    /// Backend connections, from open to close.
    lifetimes: f64,
    /// How long the whole process is stopped, in the middle of the load, and how often.
    stop: Duration,
    stops: u32,
    /// How long one of the two workers hangs, at the end.
    hang: Duration,
    /// Sets the wall clock of this machine back and forth, for some milliseconds each time.
    steps_clock: bool,
}

impl Run {
    fn config(&self, backends: &[SocketAddr]) -> Config {
        let sources: Vec<String> = (1..=40).map(|n| format!("\"127.0.3.{n}\"")).collect();
        let sources = format!("[{}]", sources.join(", "));
        let mut config = Config::new(backends[0]).backend_key("source", &sources);
        for backend in &backends[1..] {
            let keys = [("source", sources.as_str()), ("max_in_flight", "8"), ("connect_timeout", "\"1500ms\"")];
            config = config.backend(*backend, &keys);
        }
        for (section, key, value) in [
            ("server", "workers", "2"),
            ("listener", "max_connections_per_client", "2000"),
            ("listener", "idle_timeout", "\"60s\""),
            ("listener", "message_timeout", "\"60s\""),
            ("pool", "query_timeout", "\"2s\""),
            ("connections", "idle_timeout", "\"2s\""),
            ("connections", "max_age", "\"20s\""),
            ("connections", "cleanup_interval", "\"500ms\""),
            ("kernel", "view", "\"ebpf\""),
            ("watchdog", "reap", "\"on\""),
        ] {
            config = config.set(section, key, value);
        }
        if self.harsh {
            config = config.set("watchdog", "interval", "\"200ms\"").set("watchdog", "grace", "\"1s\"");
        }
        config.identity(self.identity).tlv(0xe0, "{qname_label:1}")
    }

    fn run(&self) {
        let answerer = Tool::start(ANSWERER, &["--proxy"]);
        let troubles = Troubles::start(JUST_BELOW);
        let fast: SocketAddr = answerer.address.parse().expect("an address");
        let backends: Vec<SocketAddr> = [fast].into_iter().chain(troubles.addresses()).collect();
        let mut counterfoil = Counterfoil::start(&self.config(&backends));
        let (stop, seen) = (AtomicBool::new(false), Mutex::new(Seen::default()));
        let (address, admin) = (counterfoil.address, counterfoil.admin.expect("an admin address"));
        let start = Instant::now();
        std::thread::scope(|scope| {
            // Whatever happens here, the threads end.
            let ends = Ends(&stop);
            for _ in 0..2 {
                scope.spawn(|| load(address, &stop));
            }
            for number in 0..CLIENTS {
                let stop = &stop;
                scope.spawn(move || visits(address, number, stop));
            }
            scope.spawn(|| watch(admin, &stop, &seen));
            for round in 1..=self.stops {
                self.reach(&counterfoil, self.lifetimes * f64::from(round) / f64::from(self.stops + 1));
                if self.steps_clock {
                    step_the_clock();
                }
                counterfoil.process.signal(Signal::STOP);
                std::thread::sleep(self.stop);
                counterfoil.process.signal(Signal::CONT);
            }
            self.reach(&counterfoil, self.lifetimes);
            self.assert_nothing_was_found(&counterfoil);
            for hang in [Duration::from_millis(900), self.hang] {
                let command = json!({"cmd": "hang", "worker": 0, "millis": hang.as_millis() as u64});
                counterfoil.admin(&command, TIMEOUT * 5);
                std::thread::sleep(hang + TIMEOUT);
            }
            drop(ends);
        });
        let loaded = start.elapsed();
        // The slow one still answers, one by one, what was asked and given up long ago, and each answer is a byte that
        // keeps its connection from being idle.
        drop(troubles);
        counterfoil.assert_quiescent();
        self.report(&counterfoil, loaded, &seen.into_inner().expect("no thread panicked"));
    }

    /// Waits until so many backend connections were opened.
    fn reach(&self, counterfoil: &Counterfoil, lifetimes: f64) {
        let deadline = Duration::from_secs_f64(60.0 + self.lifetimes / 500.0);
        counterfoil.wait_metrics("connections are opened and closed", deadline, |metrics| {
            metrics.sum("backend_connections_opened_total", &[]) >= lifetimes
        });
    }

    fn assert_nothing_was_found(&self, counterfoil: &Counterfoil) {
        let found = said(counterfoil, "finding");
        assert!(found.is_empty(), "{}: {} findings: {:#?}", self.identity, found.len(), &found[..found.len().min(3)]);
    }

    fn report(&self, counterfoil: &Counterfoil, loaded: Duration, seen: &Seen) {
        let metrics = counterfoil.metrics();
        let opened = metrics.sum("backend_connections_opened_total", &[]);
        println!(
            "{}: {opened} lifetimes in {loaded:?}, {} queries, {} answered, {} failed, {} abandoned; {seen:?}",
            self.identity,
            metrics.sum("queries_total", &[]),
            metrics.sum("answers_total", &[]),
            metrics.sum("queries_failed_total", &[]),
            metrics.sum("queries_abandoned_total", &[]),
        );
        for (name, label) in
            [("backend_connections_opened_total", "kind"), ("backend_connections_closed_total", "reason")]
        {
            println!("  by {label}: {:?}", by(&metrics, name, label));
        }
        // While a worker hangs, what its backends close is a zombie until it is back: found, and left alone.
        let found = said(counterfoil, "finding");
        let free: Vec<_> = found.iter().filter(|finding| finding["held_back"].is_null()).collect();
        println!("  {} findings while a worker hung, all held back", found.len());
        assert!(free.is_empty(), "{}: {} of {} findings: {:#?}", self.identity, free.len(), found.len(), free[0]);
        for word in ["reaped", "would be reaped", "reaping withdrawn"] {
            let lines = said(counterfoil, word);
            assert!(lines.is_empty(), "{}: {} lines {word:?}, such as {:#?}", self.identity, lines.len(), lines[0]);
        }
        assert_eq!(metrics.sum("reaped_total", &[]), 0.0);
        assert_eq!(seen.reaped, 0.0);
        assert!(seen.scrapes > 20, "{seen:?}");
        assert!(opened >= self.lifetimes, "{opened}");
        let kinds = by(&metrics, "backend_connections_opened_total", "kind");
        let expected: &[&str] = if self.identity == "address" { &["keyed"] } else { &["owned", "one_shot"] };
        assert!(expected.iter().all(|kind| kinds.get(*kind).is_some_and(|count| *count > 500.0)), "{kinds:?}");
        let reasons = by(&metrics, "backend_connections_closed_total", "reason");
        let expected = ["peer_closed", "unanswered", "connect_failed", "connect_timeout", "idle_timeout"];
        assert!(expected.iter().all(|reason| reasons.contains_key(*reason)), "{reasons:?}");
        assert!(!reasons.contains_key("reaped"), "{reasons:?}");
    }
}

/// Sets the flag when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What was scraped.
#[derive(Debug, Default)]
struct Seen {
    scrapes: usize,
    most_findings: f64,
    reaped: f64,
    most_sockets: f64,
    uncertain: usize,
}

/// Scrapes until the end. A process that is stopped does not answer.
fn watch(admin: SocketAddr, stop: &AtomicBool, seen: &Mutex<Seen>) {
    while !stop.load(Ordering::Relaxed) {
        if let (Ok(metrics), Ok(mut seen)) = (Metrics::fetch(admin), seen.lock()) {
            seen.scrapes += 1;
            seen.most_findings = seen.most_findings.max(metrics.sum("discrepancy_sockets", &[]));
            seen.reaped = seen.reaped.max(metrics.sum("reaped_total", &[]));
            seen.most_sockets = seen.most_sockets.max(metrics.sum("kernel_backend_sockets", &[]));
            seen.uncertain += usize::from(metrics.sum("kernel_view_uncertain", &[]) > 0.0);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The fields of all log lines with this message.
fn said(counterfoil: &Counterfoil, wanted: &str) -> Vec<serde_json::Value> {
    counterfoil.process.lines().iter().filter_map(|line| log_message(line, wanted)).collect()
}

fn by(metrics: &Metrics, name: &str, label: &str) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for sample in metrics.samples(name, &[]).filter(|sample| sample.value > 0.0) {
        *sums.entry(sample.labels[label].clone()).or_default() += sample.value;
    }
    sums
}

/// Another header with every query, as fast as they are answered.
fn load(address: SocketAddr, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let target = address.to_string();
        let arguments = [target.as_str(), "--clients=40", "--in-flight=4", "--count=4000", "--seconds=60"];
        // What the moody backends fail is counted as wrong: how the queries ended, the metrics say.
        let ended = Command::new(LOADGEN).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(ended.is_ok(), "{ended:?}");
    }
}

/// Client connections of all sorts, one after another.
fn visits(address: SocketAddr, number: u64, stop: &AtomicBool) {
    let mut random = fastrand::Rng::with_seed(number);
    for visit in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let source = IpAddr::V4(Ipv4Addr::new(127, 0, 4, random.u8(1..60)));
        let Ok(mut client) = Client::try_connect(address, Some(source)) else { continue };
        let sets = random.usize(1..6);
        let name = |n: usize| format!("s{}.v{visit}-{n}.{}.example.test", n % sets, "x".repeat(60));
        match random.u8(..) {
            // Many queries, few headers.
            0..100 => {
                let (count, in_flight) = (random.usize(20..400), random.usize(1..32));
                Load { count, in_flight, name: &name, stall: TIMEOUT * 2, ..Load::default() }.run(&mut client);
            }
            // Idle for almost as long as may be, or a bit longer.
            100..160 => {
                for n in 0..3 {
                    ask(&mut client, n, &name);
                    client.receive(TIMEOUT * 2);
                    std::thread::sleep(if random.u8(..) < 200 { JUST_BELOW } else { TIMEOUT + TIMEOUT / 2 });
                }
            }
            // Leaves with queries in flight.
            160..210 => {
                (0..random.usize(1..20)).for_each(|n| ask(&mut client, n, &name));
                std::thread::sleep(Duration::from_millis(random.u64(0..1500)));
                if random.bool() {
                    client.reset();
                }
            }
            // Half-closed: asks, says that this was all, and reads to the end.
            210..235 => {
                (0..20).for_each(|n| ask(&mut client, n, &name));
                client.finish_sending();
                while matches!(client.receive(TIMEOUT * 2), Received::Message(_)) {}
            }
            // Does not read: its window closes.
            _ => closed_window(address, &name),
        }
    }
}

fn ask(client: &mut Client, n: usize, name: &dyn Fn(usize) -> String) {
    let query = message::query(u16::try_from(n).unwrap_or(0), &name(n), qtype::A);
    // It may be gone: then its queries are abandoned.
    let _ = client.send_raw(&message::framed(&query));
}

/// Asks and does not read for a while, with the smallest receive buffer that the kernel allows.
fn closed_window(address: SocketAddr, name: &dyn Fn(usize) -> String) {
    use std::io::Write as _;
    let queries: Vec<u8> = (0..2000)
        .flat_map(|n| message::framed(&message::query(u16::try_from(n).unwrap_or(0), &name(n), qtype::A)))
        .collect();
    let ask = || -> std::io::Result<()> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_recv_buffer_size(1)?;
        socket.connect_timeout(&address.into(), TIMEOUT)?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        let mut stream = std::net::TcpStream::from(socket);
        stream.write_all(&queries)?;
        std::thread::sleep(JUST_BELOW);
        Ok(())
    };
    // Whether it took all of them or closed the connection: it is no healthy client.
    let _ = ask();
}

/// Sets the wall clock an hour back and forth, for some milliseconds: long enough for worker and watchdog to look at
/// it, too short for anything else on this machine.
fn step_the_clock() {
    const HOUR: i64 = 3600;
    for hours in [-1, 1].repeat(10) {
        let (wall, mono) = (clock_gettime(ClockId::Realtime), clock_gettime(ClockId::Monotonic));
        let moved = Timespec { tv_sec: wall.tv_sec + hours * HOUR, ..wall };
        clock_settime(ClockId::Realtime, moved).expect("root may set the clock");
        std::thread::sleep(Duration::from_millis(if hours < 0 { 3 } else { 1 }));
        let passed = clock_gettime(ClockId::Monotonic) - mono;
        clock_settime(ClockId::Realtime, wall + passed).expect("root may set the clock");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const CI: Run = Run {
    identity: "connection",
    harsh: true,
    lifetimes: 10_000.0,
    stop: Duration::from_secs(5),
    stops: 2,
    hang: Duration::from_secs(5),
    steps_clock: false,
};

#[test]
fn owned_and_one_shot_connections_with_a_harsh_watchdog() {
    CI.run();
}

#[test]
fn keyed_connections_with_the_watchdogs_defaults() {
    Run { identity: "address", harsh: false, ..CI }.run();
}

#[test]
#[ignore = "soak"]
fn soak_healthy_a_million_lifetimes() {
    for (identity, harsh) in [("connection", true), ("address", false)] {
        let (stop, hang) = (Duration::from_secs(30), Duration::from_secs(12));
        Run { identity, harsh, lifetimes: 500_000.0, stop, stops: 2, hang, steps_clock: true }.run();
    }
}

//! The kernel has no memory for what it is asked: a fault of the host, named by its row in docs/faults.md.
//!
//! The system calls of one thread fail as the kernel has them fail then. Each of the program's threads is tried by itself, so
//! that the others can say meanwhile how it goes.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, message as logged};
use counterfoil_tests::driver::{Client, Received};
use counterfoil_tests::failing::Failing;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);

/// How long memory is missing at a time.
const SPELL: Duration = Duration::from_secs(2);

/// Each client has backend connections of its own, and a watchdog that finds what is wrong for a second, and reaps it.
fn config(backend: SocketAddr) -> Config {
    Config::new(backend)
        .settles_soon()
        .identity("connection")
        .set("pool", "query_timeout", "\"2s\"")
        .set("listener", "max_connections_per_client", 1000)
        .set("watchdog", "interval", "\"100ms\"")
        .set("watchdog", "grace", "\"1s\"")
        .set("watchdog", "crosscheck_interval", "\"1s\"")
        .set("watchdog", "reap", "\"on\"")
}

/// All is over, and at no time anything was taken for a leak.
fn assert_ended_well(mut counterfoil: Counterfoil, backend: &FakeBackend) {
    counterfoil.assert_quiescent();
    assert!(counterfoil.process.exited().is_none());
    assert!(counterfoil.backend_sockets(backend.address).is_empty());
    wait::until("the backend's connections are closed", SOON, || backend.open() == 0);
    let metrics = counterfoil.metrics();
    for name in ["reaped_total", "discrepancy_sockets", "kernel_view_uncertain", "worker_stalled"] {
        assert_eq!(metrics.sum(name, &[]), 0.0, "{name}");
    }
    let found = counterfoil.process.lines().into_iter().find(|line| logged(line, "finding").is_some());
    assert!(found.is_none(), "{found:?}");
}

/// No more than so many in a spell of this length.
fn assert_calm(calls: &BTreeMap<String, usize>, call: &str, spell: Duration, per_second: f64) {
    let (most, made) = (10.0 + spell.as_secs_f64() * per_second, calls.get(call).copied().unwrap_or(0));
    assert!(made > 0, "{call} was not even tried: {calls:?}");
    assert!((made as f64) < most, "a storm of {call} in {spell:?}: {calls:?}");
}

/// No memory for a socket, neither for clients nor for backends: clients that are there are served over the connections that
/// they have, what needs a new one gets SERVFAIL without a storm, and new clients wait until there is memory again.
#[test]
fn f49_no_memory_for_sockets() {
    const NEW: usize = 20;
    let backend = FakeBackend::answering(true);
    // Those who wait must not make those who are served wait for so long that their connections are closed as idle.
    let counterfoil = Counterfoil::start(&config(backend.address).set("connections", "max_wait", "\"50ms\""));
    for error in ["ENOMEM", "ENOBUFS"] {
        let (mut settled, mut unsettled) = (counterfoil.client(), counterfoil.client());
        settled.assert_served();
        counterfoil.wait_metrics("both are there", SOON, |metrics| metrics.sum("client_connections", &[]) == 2.0);
        let failures = counterfoil.metrics().sum("client_accept_failures_total", &[]);
        let (cpu, start) = (counterfoil.process.cpu_time(), Instant::now());
        let failing = Failing::every(counterfoil.pid(), "worker-0", &["accept4", "socket", "connect"], error);
        // The kernel has them in its queue.
        let mut new: Vec<Client> = (0..NEW).map(|_| counterfoil.client()).collect();
        new.iter_mut().for_each(|client| client.ask(1, "new.example.test", qtype::A));
        let mut refused = 0;
        while start.elapsed() < SPELL {
            settled.assert_served();
            let answer = unsettled.exchange(refused, "unsettled.example.test", qtype::A);
            assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
            refused += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
        for client in &mut new {
            assert_eq!(client.receive(Duration::from_millis(1)), Received::Nothing);
        }
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("client_connections", &[]), 2.0, "nobody new came in");
        assert!(metrics.sum("client_accept_failures_total", &[]) > failures);
        let (spent, spell) = (counterfoil.process.cpu_time() - cpu, start.elapsed());
        let failed = failing.end();
        println!("{error}: {refused} queries refused, {failed:?} in {spell:?}, {spent:?} of CPU time");
        assert!(spent < spell / 2, "{spent:?} of CPU time in {spell:?}");
        // Twice at each rest of 50 ms; and one each 20 ms for all that wait for a connection to the backend.
        assert_calm(&failed, "accept4", spell, 50.0);
        assert_calm(&failed, "socket", spell, 60.0);
        for client in &mut new {
            let answer = client.receive(SOON).message();
            // The first ones may come before the backend is tried again.
            assert!([rcode::NOERROR, rcode::SERVFAIL].contains(&message::response_code(&answer)));
        }
        for client in new.iter_mut().chain([&mut settled, &mut unsettled]) {
            wait::until("all are served again", SOON, || {
                let answer = client.exchange(2, "again.example.test", qtype::A);
                message::response_code(&answer) == rcode::NOERROR
            });
        }
        drop((new, settled, unsettled));
        counterfoil.assert_quiescent();
    }
    assert_ended_well(counterfoil, &backend);
}

/// Whichever call of a worker it is that fails, from a client's coming to its leaving: that client is served or closed, and
/// the next one is served.
#[test]
fn f49_each_call_of_a_worker_fails_once() {
    const CALLS: [&str; 12] = [
        "accept4",
        "socket",
        "connect",
        "bind",
        "epoll_ctl",
        "setsockopt",
        "getsockopt",
        "getsockname",
        "getpeername",
        "sendto",
        "recvfrom",
        "shutdown",
    ];
    /// Of one call for one client.
    const MOST: usize = 40;
    let backend = FakeBackend::answering(true);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut seen = Vec::new();
    for call in CALLS {
        let mut rounds = 0;
        loop {
            rounds += 1;
            assert!(rounds < MOST, "{call}: {seen:?}");
            let failing = Failing::nth(counterfoil.pid(), "worker-0", call, rounds, "ENOMEM");
            let mut client = counterfoil.client();
            // It may have been closed already.
            let _ = client.send_raw(&message::framed(&message::query(1, "n.example.test", qtype::A)));
            let came = match client.receive(SOON) {
                Received::Message(answer) => match message::response_code(&answer) {
                    rcode::NOERROR => "served",
                    rcode::SERVFAIL => "servfail",
                    code => panic!("RCODE {code}"),
                },
                Received::Closed | Received::Reset => "closed",
                other => panic!("{call}, time {rounds}: {other:?}"),
            };
            drop(client);
            counterfoil.assert_quiescent();
            let failed = failing.end();
            if failed.is_empty() {
                assert_eq!(came, "served", "nothing failed");
                break;
            }
            seen.push((call, came));
            counterfoil.client().assert_served();
        }
    }
    println!("{seen:?}");
    for call in ["accept4", "socket", "connect", "epoll_ctl", "sendto", "recvfrom"] {
        assert!(seen.iter().any(|(failed, _)| *failed == call), "{call} is not made any more");
    }
    let count = |wanted| seen.iter().filter(|(_, came)| *came == wanted).count();
    // Most can be tried again, with a backend or with the next thing to be done.
    assert!(count("closed") > 0 && count("served") > count("closed"), "{seen:?}");
    assert_ended_well(counterfoil, &backend);
}

/// The watchdog cannot read a view, or not all of a witness: it says that it is uncertain, finds no leak that is none, is in
/// nobody's way, and is as good as before afterwards.
#[test]
fn f49_the_watchdog_without_memory() {
    /// The view needs the first three; the others are the witnesses', of whom one may be missing.
    const CALLS: [&str; 7] = ["bpf", "read", "openat", "getdents64", "getsockopt", "sendto", "recvfrom"];
    /// In so many sweeps there is a cross-check.
    const SWEEPS: f64 = 5.0;
    let backend = FakeBackend::answering(true);
    let counterfoil = Counterfoil::start(&config(backend.address).set("watchdog", "crosscheck_interval", "\"300ms\""));
    let speechless = || counterfoil.process.lines().iter().filter(|line| line.contains("cannot witness")).count();
    let mut client = counterfoil.client();
    client.assert_served();
    let all: [&[&str]; 1] = [&CALLS];
    let mut failures = BTreeMap::new();
    let sets = CALLS.iter().map(std::slice::from_ref).chain(all);
    for calls in sets {
        let sweeps = counterfoil.metrics().sum("watchdog_sweeps_total", &[]);
        let failing = Failing::every(counterfoil.pid(), "watchdog", calls, "ENOMEM");
        let mut uncertain = false;
        counterfoil.wait_metrics("it sweeps on", SOON, |metrics| {
            client.assert_served();
            assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0, "{calls:?}");
            uncertain |= metrics.sum("kernel_view_uncertain", &[]) == 1.0;
            metrics.sum("watchdog_sweeps_total", &[]) >= sweeps + SWEEPS
        });
        let failed = failing.end();
        println!("{calls:?}: uncertain {uncertain}, {failed:?}");
        assert_eq!(uncertain, CALLS[..3].iter().any(|call| failed.contains_key(*call)), "{calls:?}");
        failures.extend(failed);
        counterfoil.wait_metrics("the view is whole again", SOON, |metrics| {
            let sockets = metrics.sum("kernel_backend_sockets", &[]) == metrics.sum("backend_connections", &[]);
            metrics.sum("kernel_view_uncertain", &[]) == 0.0 && sockets
        });
        let (whole, before) = (counterfoil.metrics().sum("watchdog_sweeps_total", &[]), speechless());
        counterfoil.wait_metrics("the witnesses are asked again", SOON, |metrics| {
            client.assert_served();
            metrics.sum("watchdog_sweeps_total", &[]) >= whole + SWEEPS
        });
        assert_eq!(speechless(), before, "{calls:?}: a witness is lost");
    }
    assert_eq!(failures.len(), CALLS.len(), "not made any more: {failures:?}");
    drop(client);
    counterfoil.assert_quiescent();
    let found = counterfoil.process.lines().into_iter().find(|line| logged(line, "finding").is_some());
    assert!(found.is_none(), "{found:?}");
    let (ok, report) = counterfoil.drill("zombie", Duration::from_secs(30));
    assert!(ok, "it does not find a leak any more:\n{report}");
    counterfoil.assert_quiescent();
}

/// A health check that gets no socket says nothing of the backend, which goes on being asked over the connections that are
/// there.
#[test]
fn f49_no_memory_for_health_checks() {
    let backend = FakeBackend::answering(true);
    let config = config(backend.address)
        .backend_key("health.mode", "\"auto\"")
        .backend_key("health.interval", "\"100ms\"")
        .backend_key("health.fall", 1);
    let counterfoil = Counterfoil::start(&config);
    counterfoil.wait_metrics("it is up", SOON, |metrics| metrics.sum("backend_up", &[]) == 1.0);
    let mut client = counterfoil.client();
    client.assert_served();
    for call in ["socket", "connect", "epoll_ctl"] {
        let checks = |metrics: &counterfoil_tests::metrics::Metrics, result| {
            metrics.sum("backend_health_checks_total", &[("result", result)])
        };
        let before = counterfoil.metrics();
        let failing = Failing::every(counterfoil.pid(), "health", &[call], "ENOMEM");
        counterfoil.wait_metrics("checks are skipped", SOON, |metrics| {
            client.assert_served();
            checks(metrics, "skipped") >= checks(&before, "skipped") + 5.0
        });
        let during = counterfoil.metrics();
        assert_eq!((during.sum("backend_up", &[]), checks(&during, "failed")), (1.0, 0.0), "{call}");
        assert!(!failing.end().is_empty());
        let passed = checks(&counterfoil.metrics(), "passed");
        counterfoil.wait_metrics("checks pass again", SOON, |metrics| checks(metrics, "passed") > passed);
    }
    drop(client);
    // It goes on checking, so there is a connection now and then; at its end there is none.
    let mut counterfoil = counterfoil;
    assert!(counterfoil.terminate(SOON).success());
    wait::until("the backend's connections are closed", SOON, || backend.open() == 0);
}

/// The admin side cannot accept anybody: who comes waits, without a spin, and clients notice nothing.
#[test]
fn f49_no_memory_for_the_admin_side() {
    let backend = FakeBackend::answering(true);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let failing = Failing::every(counterfoil.pid(), "admin", &["accept4"], "ENOMEM");
    let (cpu, start) = (counterfoil.process.cpu_time(), Instant::now());
    let mut scrape = TcpStream::connect(counterfoil.admin.unwrap()).unwrap();
    scrape.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    scrape.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    while start.elapsed() < SPELL {
        client.assert_served();
        assert!(scrape.read(&mut [0]).is_err(), "nobody has accepted it");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (spent, spell) = (counterfoil.process.cpu_time() - cpu, start.elapsed());
    let failed = failing.end();
    println!("{failed:?} in {spell:?}, {spent:?} of CPU time");
    assert_calm(&failed, "accept4", spell, 10.0);
    assert!(spent < spell / 2, "{spent:?} of CPU time in {spell:?}");
    scrape.set_read_timeout(Some(SOON)).unwrap();
    let mut answer = String::new();
    scrape.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(client);
    assert_ended_well(counterfoil, &backend);
}

//! Health checks: real servers that stop and go on, scripted ones for the rest.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{self as log, Counterfoil, Options};
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::metrics;
use counterfoil_tests::netns;
use counterfoil_tests::process;
use counterfoil_tests::servers::{Recursor, Unbound};
use counterfoil_tests::sockets;
use counterfoil_tests::wait;
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(15);

/// Checks every 100 ms for a name that the servers of the tests know.
const KEYS: [(&str, &str); 4] = [
    ("health.mode", "\"auto\""),
    ("health.interval", "\"100ms\""),
    ("health.timeout", "\"500ms\""),
    ("health.name", "\"alive.example.test\""),
];

fn config(backend: SocketAddr) -> Config {
    let config = Config::new(backend).settles_soon();
    KEYS.iter().fold(config, |config, (key, value)| config.backend_key(key, value))
}

fn wait_up(counterfoil: &Counterfoil, backend: &str, up: bool) {
    let labels = [("backend", backend)];
    let what = format!("{backend} is {}", if up { "up" } else { "down" });
    counterfoil.wait_metrics(&what, SOON, |metrics| metrics.value("backend_up", &labels) == f64::from(u8::from(up)));
}

fn ready(counterfoil: &Counterfoil) -> bool {
    let (head, _) = metrics::get(counterfoil.admin.unwrap(), "/readyz").unwrap();
    head.contains(" 200 ")
}

/// What `ctl show backends` says of the first backend.
fn shown(counterfoil: &Counterfoil) -> (String, String) {
    let (ok, output) = counterfoil.ctl(&["-o", "json", "show", "backends"], SOON);
    assert!(ok, "{output}");
    let shown: serde_json::Value = serde_json::from_str(&output).unwrap();
    let field = |name: &str| shown["backends"][0][name].as_str().unwrap().to_owned();
    (field("health"), field("state"))
}

/// A check has `health.timeout` for all of it, connecting included, however short `connect_timeout` is. The watchdog leaves
/// it alone until then: broken off, it would not count as failed, and its backend would never go down.
#[test]
fn a_check_that_nobody_answers_ends_by_its_own_timeout() {
    let (near, far) = netns::pair();
    // In the network, and nobody's; a neighbour that is known, so that the SYN is sent.
    let absent = SocketAddr::from((Ipv4Addr::from(u32::from(far.address) + 1), 53));
    near.ip(&format!("neighbour add {} lladdr 02:00:00:00:00:09 dev veth0", absent.ip()));
    let config = Config::new(absent)
        .settles_soon()
        .backend_key("connect_timeout", "\"100ms\"")
        .backend_key("health.mode", "\"auto\"")
        .backend_key("health.timeout", "\"3s\"")
        .set("watchdog", "reap", "\"on\"")
        .set("watchdog", "interval", "\"100ms\"")
        .set("watchdog", "grace", "\"300ms\"");
    let counterfoil = Counterfoil::start_with(&config, Options { namespace: Some(&near), ..Options::default() });
    near.run(|| {
        let failed = [("backend", "backend-0"), ("result", "failed")];
        let metrics = counterfoil.wait_metrics("a check has failed", SOON, |metrics| {
            metrics.sum("backend_health_checks_total", &failed) >= 1.0
        });
        assert_eq!(metrics.sum("reaped_total", &[]), 0.0);
    });
}

#[test]
fn a_server_that_hangs_goes_down_and_comes_up_again() {
    let mut unbound = Unbound::start(false);
    let mut counterfoil = Counterfoil::start(&config(unbound.address).identity("address"));
    wait_up(&counterfoil, "backend-0", true);
    assert!(ready(&counterfoil));
    assert_eq!(shown(&counterfoil), ("auto".to_owned(), "up".to_owned()));
    unbound.process.signal(Signal::STOP);
    wait_up(&counterfoil, "backend-0", false);
    assert!(!ready(&counterfoil));
    assert_eq!(shown(&counterfoil), ("auto".to_owned(), "down".to_owned()));
    let mut client = counterfoil.client();
    let refused = client.exchange(1, "n.example.test", qtype::A);
    assert_eq!(message::response_code(&refused), rcode::SERVFAIL, "no backend is up, and nobody waits for one");
    assert_eq!(counterfoil.metrics().sum("queries_failed_total", &[("reason", "no_backend")]), 1.0);
    unbound.process.signal(Signal::CONT);
    wait_up(&counterfoil, "backend-0", true);
    Load { count: 20, ..Load::default() }.run(&mut client).assert_all_answered(20);
    let metrics = counterfoil.metrics();
    for (to, count) in [("down", 1.0), ("up", 2.0)] {
        assert_eq!(metrics.value("backend_health_changes_total", &[("backend", "backend-0"), ("to", to)]), count);
    }
    assert!(metrics.sum("backend_health_checks_total", &[("result", "failed")]) >= 3.0);
    // Each change is one line.
    for (said, level, times) in [("backend is up", "INFO", 2), ("backend is down", "WARN", 1)] {
        counterfoil.process.wait_for_line(SOON, said, |line| log::message(line, said));
        let lines: Vec<_> =
            counterfoil.process.lines().into_iter().filter(|l| log::message(l, said).is_some()).collect();
        assert_eq!(lines.len(), times, "{lines:?}");
        let fields = log::message(&lines[0], said).unwrap();
        assert!(lines[0].contains(level) && fields["backend"] == "backend-0", "{lines:?}");
        assert_eq!(fields["address"], unbound.address.to_string());
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// One dead pool takes nothing from the others, and is not hidden.
#[test]
fn a_dead_pool_beside_a_healthy_one_is_named_and_does_not_end_readiness() {
    let mut unbound = Unbound::start(false);
    let healthy = FakeBackend::answering(false);
    let config = config(unbound.address).identity("address").listener_without_header("other", healthy.address);
    let counterfoil = Counterfoil::start(&config);
    let ask = |query: &str| {
        let (head, body) = metrics::get(counterfoil.admin.unwrap(), &format!("/readyz{query}")).unwrap();
        (head.split(' ').nth(1).unwrap().parse::<u16>().unwrap(), body)
    };
    let pool = "pool resolvers: no backend is known to be up\n";
    let listener = "listener dns: cannot be served, its pool is resolvers\n";
    let ready = || (200, "ready\n".to_owned());
    wait_up(&counterfoil, "backend-0", true);
    for query in ["", "?listener=dns", "?listener=other", "?pool=resolvers", "?pool=other"] {
        assert_eq!(ask(query), ready(), "{query}");
    }
    unbound.process.signal(Signal::STOP);
    wait_up(&counterfoil, "backend-0", false);
    assert_eq!(ask(""), (200, format!("ready\n{listener}{pool}")));
    assert_eq!(ask("?listener=dns"), (503, format!("not ready\n{listener}{pool}")));
    assert_eq!(ask("?pool=resolvers"), (503, format!("not ready\n{pool}")));
    assert_eq!((ask("?listener=other"), ask("?pool=other")), (ready(), ready()));
    assert_eq!((ask("?listener=resolvers").0, ask("?pool=dns").0, ask("?pool=").0), (404, 404, 404));
    assert_eq!((ask("?all").0, ask("?backend=backend-0").0), (400, 400));
    let up = |pool: &str| counterfoil.metrics().value("pool_up", &[("pool", pool)]);
    assert_eq!((up("resolvers"), up("other")), (0.0, 1.0));
    unbound.process.signal(Signal::CONT);
    wait_up(&counterfoil, "backend-0", true);
    assert_eq!(ask(""), ready());
    counterfoil.assert_quiescent();
}

/// Both demand a header, and take LOCAL.
#[test]
fn queries_go_to_the_other_server_while_one_is_down() {
    let (mut unbound, recursor) = (Unbound::start(false), Recursor::start(false));
    let config = config(unbound.address).backend(recursor.address, &KEYS).identity("connection");
    let counterfoil = Counterfoil::start(&config.set("pool", "policy", "\"round-robin\""));
    wait_up(&counterfoil, "backend-0", true);
    wait_up(&counterfoil, "backend-1", true);
    unbound.process.signal(Signal::STOP);
    wait_up(&counterfoil, "backend-0", false);
    for _ in 0..10 {
        let mut client = counterfoil.client();
        let outcome = Load { count: 20, in_flight: 4, ..Load::default() }.run(&mut client);
        outcome.assert_all_answered(20);
        assert!(outcome.slowest < Duration::from_secs(2), "none waited for the other: {:?}", outcome.slowest);
    }
    assert_eq!(counterfoil.metrics().sum("backend_queries_total", &[("backend", "backend-0")]), 0.0);
    assert!(ready(&counterfoil), "one of two is up");
    unbound.process.signal(Signal::CONT);
    wait_up(&counterfoil, "backend-0", true);
    for _ in 0..4 {
        Load { count: 5, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(5);
    }
    assert!(counterfoil.metrics().sum("backend_queries_total", &[("backend", "backend-0")]) >= 5.0);
    counterfoil.assert_quiescent();
}

/// A check that has the last place under a limit gives it back to who waits.
#[test]
fn who_waits_for_the_place_of_a_check_gets_it_when_the_check_is_over() {
    let checks = Arc::new(AtomicUsize::new(0));
    let backend = {
        let checks = Arc::clone(&checks);
        FakeBackend::start(move |connection| {
            while let Some(query) = connection.query() {
                if message::question_name(&query).is_some_and(|name| name.starts_with("alive")) {
                    checks.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(300));
                }
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        })
    };
    let keys = [
        ("health.mode", "\"auto\""),
        ("health.name", "\"alive.example.test\""),
        ("health.interval", "\"500ms\""),
        ("max_connections", "1"),
    ];
    let config = Config::new(backend.address).settles_soon();
    let counterfoil =
        Counterfoil::start(&keys.iter().fold(config, |config, (key, value)| config.backend_key(key, value)));
    wait_up(&counterfoil, "backend-0", true);
    let before = checks.load(Ordering::SeqCst);
    wait::until("another check is under way", SOON, || checks.load(Ordering::SeqCst) > before);
    let mut client = counterfoil.client();
    let answer = client.exchange(1, "n.example.test", qtype::A);
    assert_eq!(message::response_code(&answer), rcode::NOERROR);
    let waited = counterfoil.metrics().sum("pool_acquire_total", &[("result", "wait")]);
    assert_eq!(waited, 1.0, "it came while the check went on");
    drop(client);
    counterfoil.assert_quiescent();
}

/// Every check's connection is in the ledger like all others, is closed by us without TIME_WAIT, and counts.
#[test]
fn checks_are_connections_like_all_others() {
    let recursor = Recursor::start(false);
    let counterfoil = Counterfoil::start(&config(recursor.address).identity("address"));
    let kind = [("kind", "check")];
    let metrics = counterfoil
        .wait_metrics("thirty checks", SOON, |metrics| metrics.sum("backend_connections_opened_total", &kind) >= 30.0);
    let checked = metrics.sum("backend_connections_closed_total", &[("reason", "checked")]);
    let passed = metrics.sum("backend_health_checks_total", &[("result", "passed")]);
    assert!(checked >= 29.0 && (checked - passed).abs() <= 1.0, "{checked} closed, {passed} passed");
    assert_eq!(
        metrics.sum("backend_connections_opened_total", &[]),
        metrics.sum("backend_connections_opened_total", &kind)
    );
    assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0);
    assert!(sockets::time_wait_towards(counterfoil.pid(), recursor.address.port()) < 5);
    counterfoil.assert_quiescent();
}

#[test]
fn who_refuses_the_first_check_gets_no_query() {
    let nobody = process::nobody();
    let good = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(nobody).backend(good.address, &KEYS));
    wait_up(&counterfoil, "backend-1", true);
    wait_up(&counterfoil, "backend-0", false);
    Load { count: 50, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(50);
    assert_eq!(counterfoil.metrics().sum("backend_queries_total", &[("backend", "backend-0")]), 0.0);
    counterfoil.assert_quiescent();
}

#[test]
fn forced_states_are_never_checked() {
    let (up, down) = (FakeBackend::answering(false), FakeBackend::answering(false));
    let config = Config::new(up.address).backend(down.address, &[("health.mode", "\"down\"")]);
    let counterfoil = Counterfoil::start(&config.set("connections", "idle_timeout", "\"1s\""));
    Load { count: 50, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(50);
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.value("backend_up", &[("backend", "backend-0")]), 1.0);
    assert_eq!(metrics.value("backend_up", &[("backend", "backend-1")]), 0.0);
    assert_eq!(metrics.sum("backend_health_checks_total", &[]), 0.0);
    assert_eq!(down.accepted(), 0);
    counterfoil.assert_quiescent();
}

/// Whatever happens to its queries.
#[test]
fn forced_up_stays_up() {
    let counterfoil = Counterfoil::start(&Config::new(process::nobody()));
    let mut client = counterfoil.client();
    for id in 0..20 {
        let answer = client.exchange(id, "n.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    }
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.value("backend_up", &[("backend", "backend-0")]), 1.0);
    assert_eq!(metrics.sum("backend_health_changes_total", &[]), 0.0);
    assert_eq!(metrics.sum("queries_failed_total", &[("reason", "no_backend")]), 0.0, "it was tried");
    assert!(ready(&counterfoil));
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn servfail_and_wrong_answers_are_no_sign_of_health() {
    let spoil: [fn(&mut Vec<u8>); 3] = [|answer| answer[3] |= 2, |answer| answer[0] ^= 1, |answer| answer[2] &= 0x7f];
    for spoil in spoil {
        let backend = FakeBackend::start(move |connection| {
            while let Some(query) = connection.query() {
                let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
                spoil(&mut answer);
                connection.send(&answer);
            }
        });
        let counterfoil = Counterfoil::start(&config(backend.address));
        wait_up(&counterfoil, "backend-0", false);
        assert_eq!(counterfoil.metrics().sum("backend_health_checks_total", &[("result", "passed")]), 0.0);
        counterfoil.assert_quiescent();
    }
}

/// Three that fail, and one that passes between them, change nothing; the fourth in a row does. The same upwards.
#[test]
fn rise_and_fall_are_counted_in_a_row() {
    const PASSES: &str = "P FFFP FFFP FFF F PPFPPF PP P";
    let allowed = Arc::new(AtomicUsize::new(0));
    let limit = Arc::clone(&allowed);
    let passes: Vec<bool> = PASSES.chars().filter(|check| *check != ' ').map(|check| check == 'P').collect();
    let backend = FakeBackend::start(move |connection| {
        // Each check waits until the test has looked at what the one before has changed.
        let _ = wait::poll(SOON, || (connection.number < limit.load(Ordering::SeqCst)).then_some(()));
        let Some(query) = connection.query() else { return };
        if passes.get(connection.number) == Some(&true) {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            connection.wait_closed();
        }
    });
    let config = Config::new(backend.address)
        .backend_key("health.mode", "\"auto\"")
        .backend_key("health.rise", 3)
        .backend_key("health.fall", 4)
        .backend_key("health.interval", "\"20ms\"")
        .backend_key("health.timeout", "\"1m\"");
    let counterfoil = Counterfoil::start(&config);
    let mut checks = 0;
    for (stage, up) in PASSES.split(' ').zip([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]) {
        checks += stage.len();
        allowed.store(checks, Ordering::SeqCst);
        let metrics = counterfoil.wait_metrics("the checks of a stage", SOON, |metrics| {
            metrics.sum("backend_health_checks_total", &[]) == checks as f64
        });
        assert_eq!(metrics.value("backend_up", &[("backend", "backend-0")]), up, "after {checks} of {PASSES:?}");
    }
    let metrics = counterfoil.metrics();
    let changes = |to| metrics.value("backend_health_changes_total", &[("backend", "backend-0"), ("to", to)]);
    assert_eq!((changes("up"), changes("down")), (2.0, 1.0));
    allowed.store(usize::MAX, Ordering::SeqCst);
    counterfoil.assert_quiescent();
}

/// None sent until failures pass the threshold, then down, then it recovers, and the checks end.
#[test]
fn lazy_checks_begin_with_failures_and_end_with_a_pass() {
    let works = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&works);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            if !switch.load(Ordering::SeqCst) {
                return;
            }
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let config = config(backend.address).backend_key("health.mode", "\"lazy\"");
    let counterfoil = Counterfoil::start(&config.set("pool", "retries", 0));
    let checks = |counterfoil: &Counterfoil| counterfoil.metrics().sum("backend_health_checks_total", &[]);
    let mut client = counterfoil.client();
    Load { count: 50, ..Load::default() }.run(&mut client).assert_all_answered(50);
    assert!(ready(&counterfoil));
    assert_eq!(checks(&counterfoil), 0.0, "nothing failed");
    works.store(false, Ordering::SeqCst);
    let mut id = 0;
    counterfoil.wait_metrics("it is down", SOON, |metrics| {
        id += 1;
        let answer = client.exchange(id, "n.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
        metrics.value("backend_up", &[("backend", "backend-0")]) == 0.0
    });
    assert!(id > 3, "{id} queries");
    assert!(checks(&counterfoil) >= 3.0);
    works.store(true, Ordering::SeqCst);
    wait_up(&counterfoil, "backend-0", true);
    let after = checks(&counterfoil);
    Load { count: 50, ..Load::default() }.run(&mut client).assert_all_answered(50);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(checks(&counterfoil), after, "five intervals later");
    drop(client);
    counterfoil.assert_quiescent();
}

/// At the limit of the backend a check waits for an idle connection to make room.
#[test]
fn a_check_finds_a_place_at_the_limit() {
    let unbound = Unbound::start(false);
    let config = config(unbound.address).identity("connection").backend_key("max_connections", 1);
    let counterfoil = Counterfoil::start(&config.set("connections", "idle_timeout", "\"60s\""));
    wait_up(&counterfoil, "backend-0", true);
    let mut client = counterfoil.client();
    for id in 0..20 {
        let answer = client.exchange(id, "n.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::NOERROR);
    }
    let passed = [("result", "passed")];
    let before = counterfoil.metrics().sum("backend_health_checks_total", &passed);
    counterfoil
        .wait_metrics("a check passes", SOON, |metrics| metrics.sum("backend_health_checks_total", &passed) > before);
    drop(client);
    counterfoil.assert_quiescent();
}

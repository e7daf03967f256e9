//! Another configuration for the running program, by `ctl reload` and by SIGHUP.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, field, message};
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self as dns, qtype};
use counterfoil_tests::metrics::Metrics;
use counterfoil_tests::wait;
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(10);

#[track_caller]
fn reload(counterfoil: &Counterfoil) -> String {
    let (ok, output) = counterfoil.ctl(&["reload"], Duration::from_secs(30));
    assert!(ok, "{output}\n{}", counterfoil.process.tail());
    output
}

/// Names and values of all counters, histograms' buckets too.
fn counters(metrics: &Metrics) -> BTreeMap<String, f64> {
    let names = [
        "queries_total",
        "answers_total",
        "client_connections_opened_total",
        "backend_queries_total",
        "backend_connections_opened_total",
        "backend_connections_closed_total",
        "backend_connections_reused_total",
        "pool_acquire_total",
        "query_duration_seconds_count",
        "watchdog_sweeps_total",
        "reaped_total",
    ];
    names
        .iter()
        .flat_map(|name| {
            metrics.samples(name, &[]).map(move |sample| (format!("{name}{:?}", sample.labels), sample.value))
        })
        .collect()
}

/// Four configurations with these backends; their TLVs begin with A to D.
fn configurations([x, y, z]: [SocketAddr; 3]) -> [Config; 4] {
    let base = |first| {
        let config = Config::new(first).set("server", "workers", 2).set("connections", "idle_timeout", "\"1s\"");
        config.set("watchdog", "interval", "\"200ms\"").set("watchdog", "grace", "\"1s\"")
    };
    let a = base(x).identity("connection").tlv(0xe0, "A{qname_label:2}");
    let b = base(x)
        .set("connections", "spares_per_backend", 2)
        .backend(y, &[])
        .identity("address")
        .tlv(0xe0, "B")
        .backend_key("max_in_flight", 4);
    // The first backend has another address, and the pool another name.
    let c =
        base(y).backend(z, &[]).identity("subnet").tlv(0xe0, "C{qname_label:1}").set("pool", "query_timeout", "\"4s\"");
    // Every query opens a connection.
    let d = base(z).identity("connection").tlv(0xe0, "D{uuid}").backend_key("max_connections", 40);
    let d = d.set("connections", "max_total", 30).set("pool", "query_timeout", "\"9s\"").set(
        "listener",
        "max_in_flight",
        50,
    );
    [a, b, c, d]
}

/// Asks on one connection after the other. How many queries, and what was wrong.
fn ask_until(over: &AtomicBool, server: SocketAddr, number: usize) -> (usize, Vec<String>) {
    let (mut sent, mut wrong) = (0, Vec::new());
    while !over.load(Ordering::Relaxed) {
        let name = |n: usize| format!("q{}.c{}.example.test", n % 5, number * 3 + n % 3);
        let load = Load { count: 400, in_flight: 10, rate: Some(400.0), name: &name, ..Load::default() };
        let outcome = load.run(&mut Client::connect(server, None));
        sent += outcome.sent;
        if outcome.answered != outcome.sent || !outcome.foreign.is_empty() {
            wrong.push(format!("{outcome:?}"));
        }
    }
    (sent, wrong)
}

/// The load goes on while backends, addresses, pools, TLVs, identities, caps and timeouts change 20 times. Every query is
/// answered, by a backend and with a header of one configuration, and nothing is left behind.
#[test]
fn twenty_reloads_under_load_lose_nothing() {
    const RELOADS: usize = 20;
    /// Which TLVs (they begin with the configuration's letter) a backend may see.
    const ALLOWED: [&str; 3] = ["AB", "BC", "CD"];
    let wrong: Arc<Mutex<Vec<String>>> = Arc::default();
    let backends: Vec<FakeBackend> = ALLOWED
        .iter()
        .map(|allowed| {
            let wrong = Arc::clone(&wrong);
            FakeBackend::start(move |connection| {
                let Some(header) = connection.header() else { return };
                let said = String::from_utf8_lossy(&header.tlvs[0].1).into_owned();
                if !said.chars().next().is_some_and(|letter| allowed.contains(letter)) {
                    wrong.lock().unwrap().push(format!("{said:?} came to the backend of {allowed}"));
                }
                while let Some(query) = connection.query() {
                    connection.send(&dns::answer_to(&query, [192, 0, 2, 53]));
                }
            })
        })
        .collect();
    let [a, b, c, d] = configurations([0, 1, 2].map(|at: usize| backends[at].address));
    let counterfoil = Counterfoil::start(&a);
    let socket = counterfoil.socket().display().to_string();
    let texts = [
        b.text(&socket),
        c.text(&socket).replace("\"resolvers\"", "\"others\""),
        d.text(&socket).replace("\"backend-0\"", "\"last\""),
        a.text(&socket),
    ];
    let over = AtomicBool::new(false);
    let address = counterfoil.address;
    let (asked, outcomes) = std::thread::scope(|scope| {
        let over = &over;
        let clients: Vec<_> = (0..6).map(|number| scope.spawn(move || ask_until(over, address, number))).collect();
        let mut before = counters(&counterfoil.metrics());
        for turn in 0..RELOADS {
            let queries = counterfoil.metrics().sum("answers_total", &[]);
            counterfoil.wait_metrics("load runs", SOON, |metrics| metrics.sum("answers_total", &[]) > queries + 200.0);
            counterfoil.rewrite(&texts[turn % texts.len()]);
            reload(&counterfoil);
            let now = counters(&counterfoil.metrics());
            for (name, value) in &before {
                assert!(now.get(name).is_some_and(|now| now >= value), "{name} was {value}, is {:?}", now.get(name));
            }
            before = now;
        }
        over.store(true, Ordering::Relaxed);
        let outcomes: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        (outcomes.iter().map(|(sent, _)| sent).sum::<usize>(), outcomes)
    });
    let lost: Vec<_> = outcomes.into_iter().flat_map(|(_, wrong)| wrong).collect();
    assert!(lost.is_empty(), "{lost:#?}\n{}", counterfoil.process.tail());
    assert_eq!(*wrong.lock().unwrap(), Vec::<String>::new());
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    println!("{asked} queries; {} retries", metrics.sum("pool_retries_total", &[]));
    assert_eq!(metrics.sum("answers_total", &[]), asked as f64);
    assert_eq!(metrics.sum("config_reloads_total", &[]), RELOADS as f64);
    assert_eq!(metrics.sum("config_reload_failures_total", &[]), 0.0);
    assert!(metrics.sum("backend_connections_closed_total", &[("reason", "reconfigured")]) > 0.0);
    assert_eq!(metrics.sum("reaped_total", &[]), 0.0, "{}", counterfoil.process.tail());
    let found = counterfoil.process.lines().into_iter().find(|line| message(line, "finding").is_some());
    assert!(found.is_none(), "{found:?}");
    for backend in &backends {
        wait::until("its connections are closed", SOON, || backend.open() == 0);
        assert!(backend.queries() > 200);
    }
}

/// What is in flight is answered by the old backend, over the old connection, which then closes; new queries go to the
/// new one meanwhile.
#[test]
fn queries_in_flight_finish_where_they_are() {
    const IN_FLIGHT: u16 = 20;
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let old = FakeBackend::start(move |connection| {
        let queries: Vec<_> = (0..IN_FLIGHT).map_while(|_| connection.query()).collect();
        let _ = released.lock().unwrap().recv_timeout(Duration::from_secs(20));
        for query in &queries {
            connection.send(&dns::answer_to(query, [192, 0, 2, 53]));
        }
        connection.wait_closed();
    });
    let new = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&Config::new(old.address));
    let mut client = counterfoil.client();
    for id in 0..IN_FLIGHT {
        client.ask(id, &format!("n{id}.example.test"), qtype::A);
    }
    wait::until("all queries are at the backend", SOON, || old.queries() == usize::from(IN_FLIGHT));
    counterfoil.rewrite_with(&Config::new(new.address).set("connections", "idle_timeout", "\"1s\""));
    reload(&counterfoil);
    client.exchange(1000, "new.example.test", qtype::A);
    assert_eq!((new.queries(), old.open()), (1, 1), "the old connection is still there");
    release.send(()).unwrap();
    for _ in 0..IN_FLIGHT {
        assert!(dns::id(&client.receive(SOON).message()) < IN_FLIGHT);
    }
    wait::until("the old connection is closed", SOON, || old.open() == 0);
    drop(client);
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    let closed = [("backend", "backend-0"), ("reason", "reconfigured")];
    assert_eq!(metrics.sum("backend_connections_closed_total", &closed), 1.0);
    assert_eq!(metrics.sum("queries_failed_total", &[]), 0.0);
}

/// Queries that wait at the cap of a backend that is gone are answered by the one that is there now.
#[test]
fn queries_that_wait_go_to_the_new_backend() {
    let silent = FakeBackend::start(|connection| while connection.query().is_some() {});
    let new = FakeBackend::answering(false);
    let one = |backend: &FakeBackend, limit: usize| {
        let config = Config::new(backend.address).set("connections", "max_wait", "\"20s\"");
        let config = config.set("pool", "query_timeout", "\"20s\"").set("connections", "idle_timeout", "\"1s\"");
        config.backend_key("max_in_flight", 1).backend_key("max_connections", limit)
    };
    let counterfoil = Counterfoil::start(&one(&silent, 1));
    let mut client = counterfoil.client();
    for id in 0..10 {
        client.ask(id, &format!("n{id}.example.test"), qtype::A);
    }
    counterfoil.wait_metrics("nine wait", SOON, |metrics| metrics.sum("queries_waiting", &[]) == 9.0);
    counterfoil
        .rewrite(&one(&new, 4).text(&counterfoil.socket().display().to_string()).replace("\"backend-0\"", "\"b\""));
    reload(&counterfoil);
    for _ in 0..9 {
        assert!((1..10).contains(&dns::id(&client.receive(SOON).message())));
    }
    assert_eq!(client.receive(Duration::from_millis(100)), Received::Nothing, "the first one is where it was");
    client.reset();
    counterfoil.assert_quiescent();
}

/// A lower cap is kept soon, by closing what is idle; shorter timeouts count for the connections that are there.
#[test]
fn lower_limits_count_at_once() {
    let backend = FakeBackend::answering(true);
    let config = |connections: usize, idle: &str| {
        let config = Config::new(backend.address).identity("connection").backend_key("max_connections", connections);
        config.set("listener", "idle_timeout", format!("\"{idle}\""))
    };
    let counterfoil = Counterfoil::start(&config(20, "60s"));
    let mut clients: Vec<Client> = (0..10).map(|_| counterfoil.client()).collect();
    for client in &mut clients {
        Load::default().run(client).assert_all_answered(1);
    }
    assert_eq!(counterfoil.backend_sockets(backend.address).len(), 10);
    counterfoil.rewrite_with(&config(3, "60s"));
    reload(&counterfoil);
    wait::until("the cap is kept", SOON, || counterfoil.backend_sockets(backend.address).len() == 3);
    for client in &mut clients {
        Load::default().run(client).assert_all_answered(1);
    }
    assert!(counterfoil.backend_sockets(backend.address).len() <= 3);
    counterfoil.rewrite_with(&config(3, "500ms"));
    reload(&counterfoil);
    for client in &mut clients {
        assert_eq!(client.receive(SOON), Received::Closed);
    }
    counterfoil.assert_quiescent();
}

/// What is wrong is said with its place, by the command, in the log and in a metric; nothing changes.
#[test]
fn a_bad_configuration_changes_nothing() {
    let backend = FakeBackend::answering(false);
    let config = Config::new(backend.address).set("connections", "idle_timeout", "\"1s\"");
    let mut counterfoil = Counterfoil::start(&config);
    let good = config.text(&counterfoil.socket().display().to_string());
    let mut client = counterfoil.client();
    Load::default().run(&mut client).assert_all_answered(1);
    let listener = "[[listener]]\nname = \"more\"\naddress = \"127.0.0.1:1\"\npool = \"resolvers\"\n[[pool]]";
    let checks = [
        (good.replace("[kernel]", "[kernle]"), "kernle"),
        (good.replace("workers = 1", "workers = \"one\""), "counterfoil.toml:2:"),
        (
            good.replace("workers = 1", "workers = 2"),
            "counterfoil.toml:2:11: key `server.workers`: a change from 1 to 2 takes",
        ),
        (good.replace("[[pool]]", listener), "key `listener[1].name`: listener `more` is new: it takes a restart"),
        (good.replace("name = \"dns\"", "name = \"sdn\""), "key `listener`: listener `dns` is gone"),
        (good.replace("http = \"127.0.0.1:0\"", "http = \"127.0.0.1:2\""), "key `admin.http`: a change from"),
        ("pool = {".to_owned(), "counterfoil.toml:1:"),
        // Half of it is good: nothing of it counts.
        (
            good.replace("127.0.0.1:0", "127.0.0.1:1").replace("idle_timeout = \"1s\"", "idle_timeout = \"0.5\""),
            "idle_timeout",
        ),
    ];
    for (number, (text, wanted)) in checks.iter().enumerate() {
        assert_ne!(*text, good, "{wanted}");
        counterfoil.rewrite(text);
        let (ok, output) = counterfoil.ctl(&["reload"], SOON);
        assert!(!ok && output.contains(wanted) && output.contains("refused, nothing is changed"), "{wanted}: {output}");
        let refused = "configuration refused, nothing is changed";
        counterfoil.process.wait_for_line(SOON, wanted, |line| {
            field(&message(line, refused)?, "error").filter(|error| error.contains(wanted))
        });
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("config_reload_failures_total", &[]), (number + 1) as f64);
        Load::default().run(&mut client).assert_all_answered(1);
    }
    assert_eq!(backend.accepted(), 1, "over the connection that was there all the time");
    counterfoil.rewrite(&good);
    reload(&counterfoil);
    Load::default().run(&mut client).assert_all_answered(1);
    assert_eq!(backend.accepted(), 1, "nothing has changed for it");
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn sighup_reloads_too() {
    let (old, new) = (FakeBackend::answering(false), FakeBackend::answering(false));
    let mut counterfoil = Counterfoil::start(&Config::new(old.address));
    let mut client = counterfoil.client();
    Load::default().run(&mut client).assert_all_answered(1);
    counterfoil.rewrite_with(&Config::new(new.address).set("connections", "idle_timeout", "\"1s\""));
    counterfoil.process.signal(Signal::HUP);
    counterfoil.process.wait_for_line(SOON, "that it has reloaded", |line| message(line, "reloaded"));
    Load::default().run(&mut client).assert_all_answered(1);
    assert_eq!((old.queries(), new.queries()), (1, 1));
    wait::until("the old connection is closed", SOON, || old.open() == 0);
    counterfoil.rewrite("?");
    counterfoil.process.signal(Signal::HUP);
    counterfoil.wait_metrics("the failure is counted", SOON, |metrics| {
        metrics.sum("config_reload_failures_total", &[]) == 1.0
    });
    Load::default().run(&mut client).assert_all_answered(1);
    assert_eq!(new.queries(), 2);
    drop(client);
    counterfoil.assert_quiescent();
}

/// Checks begin with the configuration that has them and end with it; a backend that goes on keeps its state.
#[test]
fn health_checks_follow() {
    const AUTO: [(&str, &str); 2] = [("health.mode", "\"auto\""), ("health.interval", "\"100ms\"")];
    let (first, second) = (FakeBackend::answering(false), FakeBackend::answering(false));
    let one = |backend: &FakeBackend| Config::default().set("server", "workers", 1).backend(backend.address, &AUTO);
    let counterfoil = Counterfoil::start(&one(&first));
    let up = |metrics: &Metrics, backend: &str| metrics.sum("backend_up", &[("backend", backend)]) == 1.0;
    counterfoil.wait_metrics("it is up", SOON, |metrics| up(metrics, "backend-0"));
    // One more.
    counterfoil.rewrite_with(&one(&first).backend(second.address, &AUTO));
    reload(&counterfoil);
    assert!(up(&counterfoil.metrics(), "backend-0"), "nothing has changed for it");
    counterfoil.wait_metrics("the other one is up", SOON, |metrics| up(metrics, "backend-1"));
    // The first name has the second address, and the first backend nobody any more.
    counterfoil.rewrite_with(&one(&second));
    reload(&counterfoil);
    let (checked, other) = (first.accepted(), second.accepted());
    wait::until("the checks go on there", SOON, || second.accepted() > other + 5);
    assert_eq!(first.accepted(), checked, "it is not checked any more");
    let metrics = counterfoil.metrics();
    assert!(up(&metrics, "backend-0"));
    assert!(metrics.samples("backend_up", &[("backend", "backend-1")]).next().is_none(), "nobody knows");
    assert!(metrics.sum("backend_health_checks_total", &[("backend", "backend-1"), ("result", "passed")]) > 0.0);
    assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0);
}

/// CAP_NET_ADMIN, by which orphans are severed, is kept from the start or never: only who began without it is told so.
#[test]
fn a_reaper_that_is_switched_on_again_can_sever_what_it_could_before() {
    let backend = FakeBackend::answering(false);
    let config = |reap: &str| {
        let config = Config::new(backend.address).settles_soon().set("watchdog", "reap", format!("{reap:?}"));
        config.set("watchdog", "interval", "\"100ms\"").set("watchdog", "grace", "\"300ms\"")
    };
    let switch = |counterfoil: &Counterfoil, reap: &str| {
        counterfoil.rewrite_with(&config(reap));
        reload(counterfoil).contains("CAP_NET_ADMIN, which was given up")
    };
    let counterfoil = Counterfoil::start(&config("on"));
    assert!(!switch(&counterfoil, "off") && !switch(&counterfoil, "on"), "it has it still");
    let (ok, said) = counterfoil.drill("orphan", Duration::from_secs(30));
    assert!(ok && said.contains("severed"), "{said}");
    counterfoil.assert_quiescent();

    let counterfoil = Counterfoil::start(&config("off"));
    assert!(switch(&counterfoil, "on"));
    counterfoil.assert_quiescent();
}

/// However many names come and go, what is shown and what they are numbered by stays bounded; a name that comes back in time
/// counts on, and one that was forgotten begins anew.
#[test]
fn names_that_went_are_forgotten() {
    /// As docs/ctl.md says.
    const KEPT: usize = 100;
    let backend = FakeBackend::answering(false);
    let config = Config::new(backend.address).settles_soon();
    let counterfoil = Counterfoil::start(&config);
    let name = |round: usize| format!("round-{round}");
    let take = |round: usize| {
        let text = config.text(&counterfoil.socket().display().to_string());
        let names = |text: String, of: &str| text.replace(&format!("\"{of}\""), &format!("\"{}\"", name(round)));
        counterfoil.rewrite(&names(names(text, "backend-0"), "resolvers"));
        let events = counterfoil.admin(&serde_json::json!({"cmd": "reload"}), Duration::from_secs(30));
        assert_eq!(events.last().unwrap()["ok"], true, "{events:?}");
    };
    let ask = |count| Load { count, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(count);
    let shown = |metrics: &Metrics, of: &str, label: &str| -> Vec<String> {
        metrics.samples(of, &[]).map(|sample| sample.labels[label].clone()).collect()
    };
    // Neither the first names nor those that take their numbers later are idle.
    for round in 0..KEPT + 30 {
        take(round);
        if !(3..=KEPT).contains(&round) {
            ask(3);
        }
    }
    let last = KEPT + 29;
    let bounded = |metrics: &Metrics| {
        // Those that went, the one in force and, of backends, the drill's peer.
        shown(metrics, "backend_queries_total", "backend").len() <= KEPT + 2
            && shown(metrics, "pool_retries_total", "pool").len() <= KEPT + 1
    };
    let metrics = counterfoil.wait_metrics("the oldest names are forgotten", SOON, bounded);
    let queries = |metrics: &Metrics, round: usize| metrics.sum("backend_queries_total", &[("backend", &name(round))]);
    for gone in ["backend-0", "round-0", "round-2"] {
        assert!(!shown(&metrics, "backend_connections_opened_total", "backend").contains(&gone.to_owned()), "{gone}");
    }
    assert_eq!((queries(&metrics, last), queries(&metrics, last - 1)), (3.0, 3.0), "the last ones are kept");
    let (ok, listed) = counterfoil.ctl(&["show", "backends"], SOON);
    assert!(ok && listed.contains(&name(last)) && !listed.contains("round-0 "), "{listed}");
    // One is forgotten and comes back, one was kept.
    take(0);
    ask(1);
    assert_eq!(queries(&counterfoil.metrics(), 0), 1.0, "anew");
    take(last - 1);
    ask(1);
    let metrics = counterfoil.metrics();
    assert_eq!(queries(&metrics, last - 1), 4.0, "it counts on");
    let pool = [("pool", &*name(last - 1))];
    assert_eq!(metrics.value("query_duration_seconds_count", &pool), 4.0);
    counterfoil.wait_metrics("no more than before", SOON, bounded);
    counterfoil.assert_quiescent();
}

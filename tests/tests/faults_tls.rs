//! F42 of docs/faults.md: what goes wrong with TLS towards backends, each ending with nothing left.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::{Connection, FakeBackend, server_config};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::wait;
use rustls::{HandshakeKind, ServerConfig};

const SOON: Duration = Duration::from_secs(5);
const NAME: &str = "dot.example.test";

fn config(backend: SocketAddr, authority: &Authority) -> Config {
    Config::new(backend).dot(NAME, &authority.ca).settles_soon().set("pool", "query_timeout", "\"3s\"")
}

fn closed_for(counterfoil: &Counterfoil, reason: &str) -> f64 {
    counterfoil.metrics().sum("backend_connections_closed_total", &[("reason", reason)])
}

fn server(authority: &Authority, names: &[&str]) -> Arc<ServerConfig> {
    server_config(&authority.issue("server", names), rustls::ALL_VERSIONS)
}

/// The first connection does `fault` after it has read a query; all others answer.
fn faulty(server: &Arc<ServerConfig>, fault: impl Fn(&mut Connection, &[u8]) + Send + Sync + 'static) -> FakeBackend {
    let server = Arc::clone(server);
    FakeBackend::start(move |connection| {
        if !connection.secure(&server) {
            return;
        }
        if connection.number > 0 {
            return connection.answer_all();
        }
        if let Some(query) = connection.query() {
            fault(connection, &query);
            // The forwarder must end it.
            connection.wait_closed();
        }
    })
}

/// The query is answered, over a second connection, and the first one was closed for `reason`.
#[track_caller]
fn expect_retried(authority: &Authority, backend: &FakeBackend, reason: &str) {
    let counterfoil = Counterfoil::start(&config(backend.address, authority));
    let mut client = counterfoil.client();
    let answer = client.exchange(1, "n.example.test", qtype::A);
    assert_eq!((message::response_code(&answer), answer.last()), (rcode::NOERROR, Some(&53)), "{answer:02x?}");
    assert_eq!(backend.accepted(), 2);
    wait::until("the first connection is over", SOON, || backend.open() == 1);
    assert_eq!(closed_for(&counterfoil, reason), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn f42_the_certificate_changes_under_way() {
    let authority = Authority::new();
    let (right, wrong) = (server(&authority, &[NAME]), server(&authority, &["other.example.test"]));
    let now = Arc::new(Mutex::new(Arc::clone(&right)));
    let shown = Arc::clone(&now);
    let backend = FakeBackend::start(move |connection| {
        let server = Arc::clone(&shown.lock().unwrap());
        if connection.secure(&server) {
            connection.answer_all();
        }
    });
    // One connection for each name.
    let config = config(backend.address, &authority).set("connections", "idle_timeout", "\"30s\"");
    let config = config.backend_key("max_in_flight", 1);
    let counterfoil = Counterfoil::start(&config);
    let mut first = counterfoil.client();
    first.exchange(1, "n.example.test", qtype::A);
    *now.lock().unwrap() = wrong;
    for id in 0..10 {
        let answer = first.exchange(id, "n.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::NOERROR, "the connection that is there is good");
    }
    let outcome = Load { count: 40, in_flight: 4, ..Load::default() }.run(&mut first);
    assert!(outcome.failed.contains_key(&rcode::SERVFAIL) && outcome.foreign.is_empty(), "{outcome:?}");
    assert!(outcome.answered >= 1, "by the old connection: {outcome:?}");
    let refused = closed_for(&counterfoil, "certificate_refused");
    assert!((1.0..12.0).contains(&refused), "no storm: {refused}");
    let queries = backend.queries();
    assert_eq!(queries, 11 + outcome.answered, "no other query has left");
    *now.lock().unwrap() = right;
    wait::until("it is well again", SOON, || {
        Load { count: 40, in_flight: 4, ..Load::default() }.run(&mut first).answered == 40
    });
    drop(first);
    // Now they may be idle for a second only.
    counterfoil.rewrite_with(&config.settles_soon());
    let (reloaded, output) = counterfoil.ctl(&["reload"], SOON);
    assert!(reloaded, "{output}");
    counterfoil.assert_quiescent();
}

#[test]
fn f42_close_notify_alone() {
    let authority = Authority::new();
    let backend = faulty(&server(&authority, &[NAME]), |connection, _| {
        connection.tls().send_close_notify();
        connection.flush_tls();
    });
    // It has answered nothing.
    expect_retried(&authority, &backend, "unanswered");
}

#[test]
fn f42_a_flood_of_key_updates() {
    let authority = Authority::new();
    let backend = faulty(&server(&authority, &[NAME]), |connection, _| {
        for _ in 0..1000 {
            connection.tls().refresh_traffic_keys().unwrap();
            connection.flush_tls();
        }
    });
    expect_retried(&authority, &backend, "protocol_violation");
}

/// Too long, not encrypted, encrypted by somebody else: with an answer in it or not, nothing of it is delivered.
#[test]
fn f42_records_that_are_none() {
    let authority = Authority::new();
    type Fault = fn(&mut Connection, &[u8]);
    let oversize: Fault = |connection, _| {
        connection.send_in_clear(b"\x17\x03\x03\xff\xff");
        connection.send_in_clear(&[0; 0xffff]);
    };
    let clear: Fault = |connection, query| {
        connection.send_in_clear(&message::framed(&message::answer_to(query, [192, 0, 2, 66])));
    };
    let forged: Fault = |connection, query| {
        let answer = message::framed(&message::answer_to(query, [192, 0, 2, 66]));
        connection.send_in_clear(&[0x17, 3, 3, 0, answer.len() as u8]);
        connection.send_in_clear(&answer);
    };
    let nothing: Fault = |connection, _| connection.send_in_clear(b"\x17\x03\x03\0\0");
    for fault in [oversize, clear, forged, nothing] {
        let backend = faulty(&server(&authority, &[NAME]), fault);
        expect_retried(&authority, &backend, "protocol_violation");
    }
}

#[test]
fn f42_half_an_answer() {
    let authority = Authority::new();
    for notify in [true, false] {
        let backend = faulty(&server(&authority, &[NAME]), move |connection, query| {
            let answer = message::framed(&message::answer_to(query, [192, 0, 2, 66]));
            connection.send_raw(&answer[..answer.len() / 2]);
            if notify {
                connection.tls().send_close_notify();
                connection.flush_tls();
            }
            connection.close();
        });
        let counterfoil = Counterfoil::start(&config(backend.address, &authority));
        let mut client = counterfoil.client();
        let answer = client.exchange(1, "n.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
        assert_eq!(backend.accepted(), 1, "an answer had begun");
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// Both backends would take the other's sessions, and so would the backend under its other name (HAProxy's bug
/// 5702009c8).
#[test]
fn f42_a_session_belongs_to_one_backend_and_one_name() {
    const OTHER: &str = "other.example.test";
    let authority = Authority::new();
    let server = server(&authority, &[NAME, OTHER]);
    let seen: Arc<Mutex<Vec<(usize, String, bool)>>> = Arc::default();
    let backends = [0, 1].map(|index| {
        let (server, seen) = (Arc::clone(&server), Arc::clone(&seen));
        FakeBackend::start(move |connection| {
            if !connection.secure(&server) {
                return;
            }
            let Some(query) = connection.query() else { return };
            let tls = connection.tls();
            let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
            let name = tls.server_name().unwrap().to_owned();
            seen.lock().unwrap().push((index, name, resumed));
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        })
    });
    let ca = format!("{:?}", authority.ca.display().to_string());
    let name = |name: &str| format!("{name:?}");
    let config = config(backends[0].address, &authority).set("pool", "policy", "\"round-robin\"");
    let named = |second: &str| {
        config.clone().backend(backends[1].address, &[("tls.server_name", &name(second)), ("tls.ca", &ca)])
    };
    let counterfoil = Counterfoil::start(&named(NAME));
    let mut client = counterfoil.client();
    Load { count: 20, ..Load::default() }.run(&mut client).assert_all_answered(20);
    counterfoil.rewrite_with(&named(OTHER));
    let (done, said) = counterfoil.ctl(&["reload"], SOON);
    assert!(done, "{said}");
    Load { count: 20, ..Load::default() }.run(&mut client).assert_all_answered(20);
    drop(client);
    counterfoil.assert_quiescent();
    let seen = seen.lock().unwrap();
    for of in [(0, NAME), (1, NAME), (1, OTHER)] {
        let resumed: Vec<bool> = seen.iter().filter(|it| (it.0, it.1.as_str()) == of).map(|it| it.2).collect();
        assert!(!resumed[0] && resumed[1..].iter().all(|resumed| *resumed), "{of:?}: {seen:?}");
    }
    let of_both: Vec<bool> = seen.iter().filter(|it| it.0 == 0).map(|it| it.2).collect();
    assert_eq!((of_both.len(), of_both.iter().filter(|resumed| !*resumed).count()), (20, 1), "kept over the reload");
}

/// A handshake counts as connecting: it ends with `connect_timeout`, or when its only query is given up. Until then the
/// watchdog has nothing to find, on spare connections neither, though the kernel says that they are established.
#[test]
fn f42_a_handshake_without_end() {
    let authority = Authority::new();
    let layouts = [(false, true), (true, false), (true, true)];
    for (query_timeout, (proxy, outside)) in ["500ms", "5s"].into_iter().flat_map(|it| layouts.map(|of| (it, of))) {
        let backend = FakeBackend::start(|connection| connection.wait_closed());
        let mut config = config(backend.address, &authority)
            .set("pool", "query_timeout", format!("{query_timeout:?}"))
            .set("connections", "spares_per_backend", 2)
            .set("connections", "idle_timeout", "\"300ms\"")
            .set("connections", "spare_idle_timeout", "\"200ms\"")
            .set("watchdog", "interval", "\"50ms\"")
            .set("watchdog", "grace", "\"100ms\"")
            .backend_key("connect_timeout", "\"1500ms\"")
            .backend_key("tls.proxy_outside_tls", outside);
        if proxy {
            config = config.identity("address").tlv(0xe0, "{uuid}");
        }
        let counterfoil = Counterfoil::start(&config);
        let mut client = counterfoil.client();
        let answer = client.exchange(1, "n.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
        drop(client);
        counterfoil.wait_metrics("all is over", SOON, |metrics| {
            assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0, "{}", counterfoil.process.tail());
            metrics.sum("backend_connections", &[]) == 0.0
        });
        counterfoil.assert_quiescent();
        let in_advance = !(proxy && outside);
        let expected = if query_timeout == "5s" || in_advance { "connect_timeout" } else { "unresponsive" };
        assert!(closed_for(&counterfoil, expected) >= 1.0, "{query_timeout} {proxy} {outside}");
        assert_eq!(counterfoil.metrics().sum("reaped_total", &[]), 0.0);
    }
}

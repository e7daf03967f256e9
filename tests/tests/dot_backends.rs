//! DNS over TLS to backends: real servers and scripted ones, who is authenticated and what leaves when, and where the
//! PROXY header goes. What goes wrong with TLS is in `faults_tls.rs`.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::certificates::{Authority, Certificate};
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::{FakeBackend, server_config, tls_versions};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::metrics::Metrics;
use counterfoil_tests::servers::{TlvOracle, Told, Unbound};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(5);
const NAME: &str = "dot.example.test";

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon().set("pool", "query_timeout", "\"3s\"")
}

fn load(client: &mut Client, count: usize) {
    Load { count, in_flight: 5, ..Load::default() }.run(client).assert_all_answered(count);
}

fn handshakes(metrics: &Metrics, kind: &str) -> f64 {
    metrics.sum("backend_tls_handshakes_total", &[("kind", kind)])
}

#[track_caller]
fn closed_for(counterfoil: &Counterfoil, reason: &str) -> f64 {
    counterfoil.metrics().sum("backend_connections_closed_total", &[("reason", reason)])
}

#[test]
fn unbound_over_tls() {
    let authority = Authority::new();
    let unbound = Unbound::start_dot(&authority.issue("unbound", &[NAME]), false);
    let counterfoil = Counterfoil::start(&config(unbound.address).dot(NAME, &authority.ca));
    let mut client = counterfoil.client();
    load(&mut client, 300);
    drop(client);
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert!(handshakes(&metrics, "full") >= 1.0);
    assert_eq!(
        handshakes(&metrics, "full") + handshakes(&metrics, "resumed"),
        metrics.sum("backend_connections_opened_total", &[])
    );
}

/// Unbound's certificate may be for an address, too.
#[test]
fn unbound_by_its_address() {
    let authority = Authority::new();
    let unbound = Unbound::start_dot(&authority.issue("unbound", &["127.0.0.1"]), false);
    let counterfoil = Counterfoil::start(&config(unbound.address).dot("127.0.0.1", &authority.ca));
    let mut client = counterfoil.client();
    load(&mut client, 20);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn unbound_with_a_proxy_header() {
    let authority = Authority::new();
    let mut unbound = Unbound::start_dot(&authority.issue("unbound", &[NAME]), true);
    let config = config(unbound.address).dot(NAME, &authority.ca).identity("address");
    let counterfoil = Counterfoil::start(&config.backend_key("tls.proxy_outside_tls", UNBOUND_OUTSIDE));
    let mut client = counterfoil.client_from("127.0.0.9");
    client.exchange(1, "n1.example.test", qtype::A);
    assert_eq!(unbound.logged_client("n1.example.test"), IpAddr::from([127, 0, 0, 9]));
    load(&mut client, 50);
    drop(client);
    counterfoil.assert_quiescent();
}

/// Where Unbound 1.17 looks for the header.
const UNBOUND_OUTSIDE: bool = false;

#[test]
fn dnsdist_with_the_header_inside() {
    let authority = Authority::new();
    let oracle = TlvOracle::start_dot(&authority.issue("dnsdist", &[NAME]));
    let config = config(oracle.address).dot(NAME, &authority.ca).identity("connection").tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start(&config.backend_key("tls.proxy_outside_tls", false));
    let mut client = counterfoil.client();
    for id in 0..12 {
        let told = Told::read(&client.exchange(id, &format!("n{}.example.test", id % 3), qtype::TXT));
        assert_eq!(told.source, client.local_addr().to_string());
        assert_eq!(told.tlvs, [format!("e0=n{}", id % 3)]);
    }
    drop(client);
    counterfoil.assert_quiescent();
    assert!(counterfoil.metrics().sum("backend_connections_reused_total", &[]) >= 9.0);
}

/// What a scripted backend saw of its clients.
type Seen = Arc<Mutex<Vec<(Option<String>, Option<Vec<u8>>, bool)>>>;

/// dnsdist's behaviour 57: the backend that speaks TLS is the one that is asked, by its name, over `dot`.
#[test]
fn queries_leave_over_tls_only() {
    let authority = Authority::new();
    for version in tls_versions() {
        let server = server_config(&authority.issue("server", &[NAME]), &[version]);
        let seen = Seen::default();
        let log = Arc::clone(&seen);
        let backend = FakeBackend::start(move |connection| {
            if !connection.secure(&server) {
                return;
            }
            let tls = connection.tls();
            let resumed = tls.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
            let agreed = (tls.server_name().map(str::to_owned), tls.alpn_protocol().map(<[u8]>::to_vec), resumed);
            log.lock().unwrap().push(agreed);
            connection.answer_all();
        });
        let counterfoil = Counterfoil::start(&config(backend.address).dot(NAME, &authority.ca));
        for _ in 0..2 {
            let mut client = counterfoil.client();
            load(&mut client, 100);
            drop(client);
            counterfoil.assert_quiescent();
        }
        let seen = seen.lock().unwrap();
        assert!(seen.len() >= 2, "{seen:?}");
        for (name, protocol, _) in seen.iter() {
            assert_eq!((name.as_deref(), protocol.as_deref()), (Some(NAME), Some(&b"dot"[..])));
        }
        // RFC 7858 section 3.4: sessions SHOULD be resumed.
        assert!(!seen.first().unwrap().2 && seen.last().unwrap().2, "{version:?}: {seen:?}");
        let resumed = seen.iter().filter(|(.., resumed)| *resumed).count();
        assert_eq!(handshakes(&counterfoil.metrics(), "resumed"), resumed as f64);
    }
}

/// Keyed, owned and one-shot connections, with the header on either side of the handshake.
#[test]
fn the_header_goes_before_the_handshake_or_inside() {
    let authority = Authority::new();
    let server = server_config(&authority.issue("server", &[NAME]), rustls::ALL_VERSIONS);
    for outside in [true, false] {
        for (identity, tlv) in
            [("address", "{qname_label:1}"), ("connection", "{qname_label:1}"), ("address", "{uuid}")]
        {
            let server = Arc::clone(&server);
            let backend = FakeBackend::start(move |connection| {
                if !outside && !connection.secure(&server) {
                    return;
                }
                let Some(header) = connection.header() else { return };
                if outside {
                    let next = connection.received().first().copied();
                    assert!(next.is_none_or(|octet| octet == 22), "ClientHello comes behind it, not {next:?}");
                    if !connection.secure(&server) {
                        return;
                    }
                }
                let told = header.source.unwrap().ip().to_string();
                while let Some(query) = connection.query() {
                    connection.send(&message::text_answer_to(&query, &told));
                }
            });
            let config = config(backend.address).dot(NAME, &authority.ca).identity(identity).tlv(0xe0, tlv);
            let counterfoil = Counterfoil::start(&config.backend_key("tls.proxy_outside_tls", outside));
            let mut client = counterfoil.client_from("127.0.0.8");
            for id in 0..10 {
                let answer = client.exchange(id, &format!("n{}.example.test", id % 2), qtype::TXT);
                assert_eq!(message::texts(&answer), ["127.0.0.8"], "{identity}, outside: {outside}");
            }
            drop(client);
            counterfoil.assert_quiescent();
        }
    }
}

/// A certificate that is not to be accepted, and what the log says of it.
struct Refused {
    what: &'static str,
    certificate: Certificate,
    words: &'static str,
}

fn refused(authority: &Authority, other: &Authority) -> Vec<Refused> {
    let refused = |what, certificate, words| Refused { what, certificate, words };
    vec![
        refused("another name", authority.issue("name", &["other.example.test"]), "other.example.test"),
        refused("expired", authority.issue_expired("expired", &[NAME]), "it expired"),
        refused(
            "one behind it has expired",
            authority.issue_below_expired("between", &[NAME]),
            "certificate 2 (\\\"between\\\"), which the backend sends behind its own, expired",
        ),
        refused(
            "that of an authority",
            authority.issue_for_authority("authority", &[NAME]),
            "it is that of an authority (CA:TRUE): issue it with CA:FALSE",
        ),
        refused("another authority", other.issue("issuer", &[NAME]), "its issuer is not one of those that are trusted"),
        refused(
            "signed by itself",
            other.issue_self_signed("own", &[NAME]),
            "its issuer is not one of those that are trusted",
        ),
    ]
}

/// dnsdist's behaviour 58, and more than the wrong name: no answer, and the backend sees no query.
#[test]
fn who_is_not_authenticated_gets_no_query() {
    let (authority, other) = (Authority::new(), Authority::new());
    for Refused { what, certificate, words } in refused(&authority, &other) {
        for version in tls_versions() {
            let backend = FakeBackend::answering_dot(&server_config(&certificate, &[version]));
            let counterfoil = Counterfoil::start(&config(backend.address).dot(NAME, &authority.ca));
            let mut client = counterfoil.client();
            for id in 0..30 {
                let answer = client.exchange(id, "secret.example.test", qtype::A);
                assert_eq!(message::response_code(&answer), rcode::SERVFAIL, "{what}");
            }
            drop(client);
            counterfoil.assert_quiescent();
            assert_eq!(backend.queries(), 0, "{what}");
            assert!(backend.accepted() <= 12, "{what}: {} attempts for 30 queries", backend.accepted());
            let refused = closed_for(&counterfoil, "certificate_refused");
            assert!(refused >= 1.0 && refused == backend.accepted() as f64, "{what}: {refused}");
            assert_eq!(counterfoil.metrics().sum("backend_connect_failures_total", &[]), refused);
            let line = counterfoil.process.lines().into_iter().find(|line| line.contains("certificate refused"));
            let line = line.unwrap_or_else(|| panic!("{what}: {}", counterfoil.process.tail()));
            for word in [NAME, words, &backend.address.to_string()] {
                assert!(line.contains(word), "{what}: {word:?} is not in {line}");
            }
        }
    }
}

/// Whatever a backend does instead of TLS, no octet of a query leaves (RFC 8310 section 5).
#[test]
fn nothing_is_said_in_clear() {
    let authority = Authority::new();
    let replies: [&[u8]; 4] = [
        b"",
        b"\0\x0c\0\x01\x81\x82\0\0\0\0\0\0\0\0",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        // The alert handshake_failure.
        b"\x15\x03\x03\0\x02\x02\x28",
    ];
    for reply in replies {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&heard);
        let backend = FakeBackend::start(move |connection| {
            let _ = connection.query_within(Duration::from_millis(200));
            log.lock().unwrap().extend_from_slice(connection.received());
            connection.send_in_clear(reply);
            connection.close();
        });
        let counterfoil = Counterfoil::start(&config(backend.address).dot(NAME, &authority.ca));
        let mut client = counterfoil.client();
        let answer = client.exchange(1, "secret.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
        drop(client);
        counterfoil.assert_quiescent();
        let heard = heard.lock().unwrap();
        assert_eq!(heard.first(), Some(&22), "ClientHello");
        assert!(!heard.windows(6).any(|octets| octets == b"secret"));
        assert!(closed_for(&counterfoil, "handshake_failed") >= 1.0);
    }
}

#[test]
fn another_backend_answers_instead() {
    let authority = Authority::new();
    let wrong = server_config(&authority.issue("wrong", &["wrong.example.test"]), rustls::ALL_VERSIONS);
    let right = server_config(&authority.issue("right", &[NAME]), rustls::ALL_VERSIONS);
    let (bad, good) = (FakeBackend::answering_dot(&wrong), FakeBackend::answering_dot(&right));
    let ca = format!("{:?}", authority.ca.display().to_string());
    let name = format!("{NAME:?}");
    let config = config(bad.address).dot(NAME, &authority.ca);
    let config = config.backend(good.address, &[("tls.server_name", &name), ("tls.ca", &ca)]);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    load(&mut client, 200);
    drop(client);
    counterfoil.assert_quiescent();
    assert_eq!((bad.queries(), good.queries()), (0, 200));
}

/// RFC 7858 section 3.4 (D-03): an idle connection may end at any time, with `close_notify` or without.
#[test]
fn an_idle_connection_that_the_backend_closes() {
    let authority = Authority::new();
    let server = server_config(&authority.issue("server", &[NAME]), rustls::ALL_VERSIONS);
    for notify in [true, false] {
        let server = Arc::clone(&server);
        let backend = FakeBackend::start(move |connection| {
            if !connection.secure(&server) {
                return;
            }
            // After some queries it goes, as the next one comes.
            for _ in 0..3 {
                let Some(query) = connection.query() else { return };
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
            if notify {
                connection.tls().send_close_notify();
                connection.flush_tls();
            }
        });
        let counterfoil = Counterfoil::start(&config(backend.address).dot(NAME, &authority.ca));
        let mut client = counterfoil.client();
        Load { count: 60, ..Load::default() }.run(&mut client).assert_all_answered(60);
        drop(client);
        counterfoil.assert_quiescent();
        assert_eq!(backend.queries(), 60);
        assert!(closed_for(&counterfoil, "peer_closed") >= 15.0);
        assert!(handshakes(&counterfoil.metrics(), "resumed") >= 15.0, "they go on where they were");
    }
}

/// Spare connections have their handshake behind them, unless the header comes first: then nothing is sent on them.
/// A backend that answers all over TLS, with the PROXY header before the handshake or inside, or none.
fn answering(server: Arc<rustls::ServerConfig>, proxy: bool, outside: bool) -> FakeBackend {
    FakeBackend::start(move |connection| {
        if proxy && outside && connection.header().is_none() {
            return;
        }
        if !connection.secure(&server) || (proxy && !outside && connection.header().is_none()) {
            return;
        }
        connection.answer_all();
    })
}

#[test]
fn spare_connections() {
    let authority = Authority::new();
    let server = server_config(&authority.issue("server", &[NAME]), rustls::ALL_VERSIONS);
    for (proxy, outside) in [(false, true), (true, false), (true, true)] {
        let in_advance = !(proxy && outside);
        let backend = answering(Arc::clone(&server), proxy, outside);
        let mut config = config(backend.address)
            .dot(NAME, &authority.ca)
            .backend_key("tls.proxy_outside_tls", outside)
            .set("connections", "spares_per_backend", 2)
            .set("connections", "spare_idle_timeout", "\"30s\"")
            .set("connections", "idle_timeout", "\"30s\"");
        config = if proxy { config.identity("connection") } else { config.backend_key("max_in_flight", 1) };
        let counterfoil = Counterfoil::start(&config);
        let mut clients: Vec<Client> = (0..6).map(|_| counterfoil.client()).collect();
        let idle_spares = [("kind", "spare"), ("state", "idle")];
        for client in &mut clients {
            client.exchange(1, "n.example.test", qtype::A);
            let metrics = counterfoil
                .wait_metrics("two spares", SOON, |metrics| metrics.sum("backend_connections", &idle_spares) == 2.0);
            let shaken = handshakes(&metrics, "full") + handshakes(&metrics, "resumed");
            let opened = metrics.sum("backend_connections_opened_total", &[]);
            assert_eq!(shaken, if in_advance { opened } else { opened - 2.0 }, "{proxy} {outside}");
        }
        if proxy {
            let spares = counterfoil.metrics().sum("pool_acquire_total", &[("result", "spare")]);
            assert_eq!(spares, 5.0, "all but the first query had one");
        }
        drop(clients);
        drop(counterfoil);
    }
}

#[test]
fn health_checks_go_over_tls() {
    let authority = Authority::new();
    let server = server_config(&authority.issue("server", &[NAME]), rustls::ALL_VERSIONS);
    for (proxy, outside) in [(false, true), (true, true), (true, false)] {
        let backend = answering(Arc::clone(&server), proxy, outside);
        let up = |name: &str| {
            let config = config(backend.address).dot(name, &authority.ca).backend_key("tls.proxy_outside_tls", outside);
            let config = config.backend_key("health.mode", "\"auto\"").backend_key("health.interval", "\"50ms\"");
            let counterfoil = Counterfoil::start(&if proxy { config.identity("address") } else { config });
            let results = ["passed", "failed"];
            let checks = |metrics: &Metrics, result| metrics.sum("backend_health_checks_total", &[("result", result)]);
            let metrics = counterfoil.wait_metrics("three checks", SOON, |metrics| {
                results.iter().map(|result| checks(metrics, result)).sum::<f64>() >= 3.0
            });
            let line = counterfoil.process.lines().into_iter().find(|line| line.contains("backend is down"));
            let words = line.is_some_and(|line| line.contains("certificate refused") && line.contains(name));
            (metrics.sum("backend_up", &[]), results.map(|result| checks(&metrics, result) > 0.0), words)
        };
        assert_eq!(up(NAME), (1.0, [true, false], false), "{proxy} {outside}");
        let before = backend.queries();
        assert_eq!(up("other.example.test"), (0.0, [false, true], true), "{proxy} {outside}");
        assert_eq!(backend.queries(), before);
    }
}

/// None until queries fail; then they go over TLS, too, until one passes.
#[test]
fn lazy_health_checks_go_over_tls() {
    let authority = Authority::new();
    let server = server_config(&authority.issue("server", &[NAME]), rustls::ALL_VERSIONS);
    let works = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&works);
    let backend = FakeBackend::start(move |connection| {
        if !connection.secure(&server) {
            return;
        }
        while let Some(query) = connection.query() {
            if !switch.load(Ordering::SeqCst) {
                return;
            }
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let config = config(backend.address).dot(NAME, &authority.ca).set("pool", "retries", 0);
    let config = config.backend_key("health.mode", "\"lazy\"").backend_key("health.interval", "\"50ms\"");
    let counterfoil = Counterfoil::start(&config);
    let checks = |metrics: &Metrics| metrics.sum("backend_health_checks_total", &[]);
    let mut client = counterfoil.client();
    load(&mut client, 10);
    assert_eq!(checks(&counterfoil.metrics()), 0.0, "nothing failed");
    works.store(false, Ordering::SeqCst);
    counterfoil.wait_metrics("it is down", SOON, |metrics| {
        client.exchange(1, "n.example.test", qtype::A);
        metrics.sum("backend_up", &[]) == 0.0
    });
    works.store(true, Ordering::SeqCst);
    let metrics = counterfoil.wait_metrics("it is up", SOON, |metrics| metrics.sum("backend_up", &[]) == 1.0);
    let passed = [("result", "passed")];
    assert_eq!(metrics.sum("backend_health_checks_total", &passed), 1.0, "then they end");
    // The worker may still leave it alone for a moment, for the connections that died.
    wait::until("it is asked again", SOON, || {
        message::response_code(&client.exchange(2, "n.example.test", qtype::A)) == rcode::NOERROR
    });
    load(&mut client, 10);
    drop(client);
    counterfoil.assert_quiescent();
}

/// A reload reads the file again: those whom it trusts no more get no query, and a file that cannot be used changes nothing.
#[test]
fn a_reload_reads_the_issuers_again() {
    let (authority, other) = (Authority::new(), Authority::new());
    let server = server_config(&authority.issue("server", &[NAME]), rustls::ALL_VERSIONS);
    let backend = FakeBackend::answering_dot(&server);
    let ca = authority.write("trusted.pem", &std::fs::read_to_string(&authority.ca).unwrap());
    let counterfoil =
        Counterfoil::start(&config(backend.address).dot(NAME, &ca).set("connections", "idle_timeout", "\"30s\""));
    let mut client = counterfoil.client();
    // One at a time: this backend answers so, and with more in flight it would be given more connections.
    let ten =
        |client: &mut Client| Load { count: 10, in_flight: 1, ..Load::default() }.run(client).assert_all_answered(10);
    ten(&mut client);
    let reload = || counterfoil.ctl(&["reload"], SOON);
    let answered = |client: &mut Client| message::response_code(&client.exchange(1, "n.example.test", qtype::A));

    let (done, said) = reload();
    assert!(done, "{said}");
    ten(&mut client);
    assert_eq!(backend.accepted(), 1, "nothing has changed");

    std::fs::write(&ca, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let (done, said) = reload();
    assert!(!done && said.contains("pool.backend.tls.ca") && said.contains("trusted.pem"), "{said}");
    assert_eq!(answered(&mut client), rcode::NOERROR);
    assert_eq!(backend.accepted(), 1);

    std::fs::copy(&other.ca, &ca).unwrap();
    let (done, said) = reload();
    assert!(done, "{said}");
    assert_eq!(answered(&mut client), rcode::SERVFAIL, "its issuer is not trusted any more");
    assert!(closed_for(&counterfoil, "reconfigured") >= 1.0);

    std::fs::copy(&authority.ca, &ca).unwrap();
    let (done, said) = reload();
    assert!(done, "{said}");
    wait::until("it is asked again", SOON, || answered(&mut client) == rcode::NOERROR);
    let full = handshakes(&counterfoil.metrics(), "full");
    assert_eq!(full, 2.0, "a session is not resumed by other settings");
}

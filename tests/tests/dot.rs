//! DNS over TLS towards clients (RFC 7858, RFC 8310): real ones, and what the standards ask for.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::Duration;

use counterfoil_tests::certificates::{Authority, Certificate};
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received, Tls};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::process;
use counterfoil_tests::servers::{TlvOracle, Told, Unbound, ZONE};
use counterfoil_tests::tempdir::TempDir;
use counterfoil_tests::wait;
use rustls::version::{TLS12, TLS13};
use rustls::{AlertDescription, ProtocolVersion};

const SOON: Duration = Duration::from_secs(10);
const NAME: &str = "dns.example";

fn config(backend: SocketAddr, certificate: &Certificate) -> Config {
    Config::new(backend)
        .set("connections", "idle_timeout", "\"300ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .tls(certificate)
}

/// The alert that the server has answered the handshake with.
#[track_caller]
fn alert(refused: std::io::Result<Client>) -> AlertDescription {
    let error = refused.expect_err("a handshake that fails");
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        _ => panic_with(&error),
    }
}

#[track_caller]
fn panic_with(error: &std::io::Error) -> AlertDescription {
    unreachable!("not an alert: {error}")
}

fn failures(counterfoil: &Counterfoil, reason: &str) -> f64 {
    counterfoil.metrics().sum("tls_handshake_failures_total", &[("reason", reason)])
}

/// kdig without validation, with the right name and authority, and with wrong ones: then it does not ask.
#[test]
fn kdig_over_tls() {
    let unbound = Unbound::start(false);
    let authority = Authority::new();
    let counterfoil =
        Counterfoil::start(&config(unbound.address, &authority.issue("dns", &[NAME])).identity("address"));
    let port = counterfoil.address.port().to_string();
    let name = format!("kdig.{ZONE}");
    let ca = format!("+tls-ca={}", authority.ca.display());
    let other = format!("+tls-ca={}", Authority::new().ca.display());
    let ask = |options: &[&str]| {
        let common = ["@127.0.0.1", "-p", &port, "+tls", "+retry=0", "+timeout=5", &name, "A"];
        process::run("kdig", &[&common[..], options].concat(), Duration::from_secs(30))
    };
    for options in [&[][..], &[&ca, "+tls-hostname=dns.example"], &[&ca, "+tls-hostname=dns.example", "+keepopen"]] {
        let (ok, output) = ask(options);
        assert!(ok && output.contains("NOERROR") && output.contains("192.0.2.53"), "{options:?}: {output}");
        assert!(output.contains("(TLS1.3)"), "{output}");
    }
    for options in [[ca.as_str(), "+tls-hostname=other.example"], [&other, "+tls-hostname=dns.example"]] {
        let (_, output) = ask(&options);
        assert!(!output.contains("NOERROR"), "{options:?}: {output}");
    }
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("queries_total", &[]), 3.0);
    assert_eq!(metrics.sum("tls_sessions_total", &[("version", "1.3"), ("session", "new")]), 3.0);
}

/// Ten connections of dnsperf, twenty thousand queries, none lost.
#[test]
fn dnsperf_over_tls_loses_nothing() {
    let unbound = Unbound::start(false);
    let authority = Authority::new();
    let config = config(unbound.address, &authority.issue("dns", &[NAME])).set("server", "workers", 2);
    let counterfoil = Counterfoil::start(&config.identity("address"));
    let dir = TempDir::new("dnsperf");
    let names: String = (0..500).map(|n| format!("n{n}.{ZONE} A\n")).collect();
    let file = dir.write("names", &names).display().to_string();
    let port = counterfoil.address.port().to_string();
    let args =
        ["-m", "dot", "-s", "127.0.0.1", "-p", &port, "-d", &file, "-c", "10", "-q", "100", "-n", "40", "-t", "30"];
    let (ok, output) = process::run("dnsperf", &args, Duration::from_secs(90));
    assert!(ok && output.contains("Queries completed:    20000 (100.00%)"), "{output}");
    assert!(output.contains("NOERROR 20000 (100.00%)"), "{output}");
    counterfoil.assert_quiescent();
}

#[test]
fn both_versions_are_spoken_and_what_is_agreed_on_is_passed_on() {
    let oracle = TlvOracle::start();
    let authority = Authority::new();
    let config = config(oracle.address, &authority.issue("dns", &[NAME, "other.example"]))
        .identity("connection")
        .set("pool.proxy_protocol", "advertise_tls", true)
        .tlv(0xe0, "[{sni}]");
    let counterfoil = Counterfoil::start(&config);
    let ssl = |version: &str, cipher: &str| {
        let lengths = [8 - 1, cipher.len() as u8];
        format!("20=\u{1}\0\0\0\u{1}!\0{}{version}#\0{}{cipher}", lengths[0] as char, lengths[1] as char)
    };
    for (versions, alpn, name, expected) in [
        (&TLS13, &["dot"][..], NAME, ssl("TLSv1.3", "TLS_AES_256_GCM_SHA384")),
        (&TLS12, &[], "other.example", ssl("TLSv1.2", "ECDHE-ECDSA-AES256-GCM-SHA384")),
        (&TLS13, &["h2", "dot"], NAME, ssl("TLSv1.3", "TLS_AES_256_GCM_SHA384")),
    ] {
        let tls = Tls::with_versions(&authority.ca, name, &[versions]).offering(alpn);
        let mut client = Client::connect_tls(counterfoil.address, None, &tls);
        assert_eq!(client.tls().alpn_protocol(), alpn.contains(&"dot").then_some(&b"dot"[..]));
        let told = Told::read(&client.exchange(1, &format!("told.{ZONE}"), qtype::TXT));
        assert_eq!(told.source, client.local_addr().to_string());
        let mut tlvs = vec![format!("02={name}"), expected, format!("e0=[{name}]")];
        if !alpn.is_empty() {
            tlvs.insert(0, "01=dot".to_owned());
        }
        assert_eq!(told.tlvs, tlvs);
    }
    counterfoil.assert_quiescent();
}

/// Who offers other protocols only is told so (RFC 7301 section 3.2).
#[test]
fn clients_of_other_protocols_are_refused() {
    let backend = FakeBackend::answering(false);
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(backend.address, &authority.issue("dns", &[NAME])));
    for versions in [&TLS12, &TLS13] {
        let tls = Tls::with_versions(&authority.ca, NAME, &[versions]).offering(&["h2", "http/1.1"]);
        assert_eq!(alert(counterfoil.client().over_tls(&tls)), AlertDescription::NoApplicationProtocol);
    }
    counterfoil.assert_quiescent();
    assert_eq!((failures(&counterfoil, "alpn"), counterfoil.refused("tls_handshake")), (2.0, 2.0));
    assert_eq!(backend.accepted(), 0);
}

/// Not below TLS 1.2 (RFC 8310 section 9): the hello of a client that has no more than 1.1.
#[test]
fn tls_1_1_is_refused() {
    let backend = FakeBackend::answering(false);
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(backend.address, &authority.issue("dns", &[NAME])));
    let mut hello = vec![3, 2];
    hello.extend_from_slice(&[7; 32]);
    // No session, two suites, no compression; curves and signatures.
    hello.extend_from_slice(&[0, 0, 4, 0xc0, 0x09, 0xc0, 0x2b, 1, 0]);
    hello.extend_from_slice(&[0, 18, 0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 6, 0, 4, 4, 3, 2, 3]);
    let mut record = vec![22, 3, 1, 0, (hello.len() + 4) as u8, 1, 0, 0, hello.len() as u8];
    record.extend_from_slice(&hello);
    let mut client = counterfoil.client();
    client.send_raw(&record).unwrap();
    // An alert, fatal, protocol_version (RFC 5246 section 7.2), and then the end.
    client.expect_raw(&[21, 3, 3, 0, 2, 2, 70]);
    client.assert_closed(SOON);
    counterfoil.assert_quiescent();
    assert_eq!(failures(&counterfoil, "version"), 1.0);
}

/// D-01: a query in the clear gets no answer on a port for TLS, neither at once nor after a handshake that failed.
#[test]
fn nothing_in_the_clear_is_answered() {
    let backend = FakeBackend::answering(false);
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(backend.address, &authority.issue("dns", &[NAME])));
    for junk in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[22, 3, 1, 0, 3, 1, 0, 0]] {
        let mut client = counterfoil.client();
        client.send_raw(junk).unwrap();
        // The server may have closed already.
        let _ = client.send_raw(&message::framed(&message::query(1, "clear.example.test", qtype::A)));
        let mut answer = Vec::new();
        let end = client.read_to_end(&mut answer, SOON);
        assert!(matches!(end, Received::Closed | Received::Reset), "{end:?}");
        // At most an alert.
        assert!(answer.is_empty() || answer[0] == 21, "{answer:02x?}");
    }
    counterfoil.assert_quiescent();
    assert!(failures(&counterfoil, "not_tls") >= 2.0);
    assert_eq!((backend.accepted(), counterfoil.metrics().sum("queries_total", &[])), (0, 0.0));
}

/// Sessions go on with a ticket, at any worker, in both versions; the tickets outlive a reload.
#[test]
fn sessions_are_resumed_at_every_worker() {
    let backend = FakeBackend::answering(false);
    let authority = Authority::new();
    let config = config(backend.address, &authority.issue("dns", &[NAME])).set("server", "workers", 2);
    let counterfoil = Counterfoil::start(&config);
    for versions in [&TLS12, &TLS13] {
        let tls = Tls::with_versions(&authority.ca, NAME, &[versions]);
        for n in 0..12u16 {
            let mut client = Client::connect_tls(counterfoil.address, None, &tls);
            // The tickets of TLS 1.3 come after the handshake, before the first answer.
            client.exchange(n, "resumed.example.test", qtype::A);
            let kind = client.tls().handshake_kind().expect("a handshake");
            let expected = if n == 0 { rustls::HandshakeKind::Full } else { rustls::HandshakeKind::Resumed };
            assert_eq!(kind, expected, "{n} {:?}", client.tls().protocol_version());
            if n == 6 {
                let (ok, said) = counterfoil.ctl(&["reload"], SOON);
                assert!(ok, "{said}");
            }
        }
    }
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    for version in ["1.2", "1.3"] {
        let sessions = |session| metrics.sum("tls_sessions_total", &[("version", version), ("session", session)]);
        assert_eq!((sessions("new"), sessions("resumed")), (1.0, 11.0), "{version}");
    }
}

/// A renewed certificate is shown from the reload on; open connections go on; one that is wrong changes nothing.
#[test]
fn certificates_are_reloaded() {
    let backend = FakeBackend::answering(false);
    let authority = Authority::new();
    let certificate = authority.issue("dns", &[NAME]);
    let counterfoil = Counterfoil::start(&config(backend.address, &certificate));
    let shown = |client: &mut Client| client.tls().peer_certificates().expect("a certificate")[0].to_vec();
    let fresh = || Client::connect_tls(counterfoil.address, None, &Tls::new(&authority.ca, NAME));
    let mut open = fresh();
    let first = shown(&mut open);
    let key = std::fs::read_to_string(&certificate.key).unwrap();

    authority.issue("dns", &[NAME]);
    assert_eq!(shown(&mut fresh()), first, "nobody has asked for it yet");
    let (ok, said) = counterfoil.ctl(&["reload"], SOON);
    assert!(ok, "{said}");
    let second = shown(&mut fresh());
    assert_ne!(second, first);
    open.exchange(1, "open.example.test", qtype::A);

    // The key of the first certificate beside the second one; then no file at all, by SIGHUP.
    authority.write("dns.key", &key);
    let (ok, said) = counterfoil.ctl(&["reload"], SOON);
    assert!(!ok && said.contains("key `listener.tls.key`") && said.contains("dns.key"), "{said}");
    std::fs::remove_file(&certificate.certificate).unwrap();
    let pid = rustix::process::Pid::from_raw(counterfoil.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    counterfoil
        .wait_metrics("both are refused", SOON, |metrics| metrics.sum("config_reload_failures_total", &[]) == 2.0);
    assert_eq!(shown(&mut fresh()), second);
    open.exchange(2, "open.example.test", qtype::A);

    authority.issue("dns", &[NAME]);
    let (ok, said) = counterfoil.ctl(&["reload"], SOON);
    assert!(ok, "{said}");
    assert_ne!(shown(&mut fresh()), second);
    drop(open);
    counterfoil.assert_quiescent();
}

/// Operators see when the certificate ends that clients are shown: that of the last reload, whatever the file holds.
#[test]
fn the_end_of_the_certificate_is_a_metric() {
    let backend = FakeBackend::answering(false);
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(backend.address, &authority.issue_expired("dns", &[NAME])));
    let labels = [("listener", "dns")];
    let ends = || counterfoil.metrics().value("tls_certificate_not_after_timestamp_seconds", &labels);
    let end_of_2000 = 978_220_800.0;
    assert_eq!(ends(), end_of_2000);
    let warning = |line: &String| line.contains("`listener.tls.certificate`") && line.contains(" is over since ");
    assert!(counterfoil.process.lines().iter().any(warning), "{}", counterfoil.process.tail());
    authority.issue("dns", &[NAME]);
    assert_eq!(ends(), end_of_2000, "nobody has asked for it yet");
    let (ok, said) = counterfoil.ctl(&["reload"], SOON);
    assert!(ok, "{said}");
    // The authority of the tests gives them until the year 4096.
    assert_eq!(ends(), 67_090_118_400.0);
    counterfoil.assert_quiescent();
}

/// `ctl show clients` has the version of TLS of whoever owns connections, also where one was connected in advance.
#[test]
fn who_came_over_tls_is_shown() {
    let backend = FakeBackend::answering(true);
    let authority = Authority::new();
    let config = config(backend.address, &authority.issue("dns", &[NAME]))
        .identity("connection")
        .set("connections", "idle_timeout", "\"10s\"")
        .set("connections", "spares_per_backend", 1);
    let counterfoil = Counterfoil::start(&config);
    let mut clients = [&TLS12, &TLS13].map(|version| {
        Client::connect_tls(counterfoil.address, None, &Tls::with_versions(&authority.ca, NAME, &[version]))
    });
    for client in &mut clients {
        client.exchange(1, "shown.example.test", qtype::A);
    }
    let (ok, output) = counterfoil.ctl(&["-o", "json", "show", "clients"], SOON);
    let shown: serde_json::Value = serde_json::from_str(&output).unwrap();
    let versions: Vec<_> = shown["clients"].as_array().unwrap().iter().map(|client| client["tls"].clone()).collect();
    assert!(ok && versions == ["1.2", "1.3"], "{output}");
    drop(clients);
    counterfoil.assert_quiescent();
}

/// A client that ends its side with close_notify gets every answer, and then the server's close_notify.
#[test]
fn close_notify_ends_the_queries_and_not_the_answers() {
    let backend = FakeBackend::start(|connection| {
        let mut held = Vec::new();
        while held.len() < 5
            && let Some(query) = connection.query()
        {
            held.push(query);
        }
        for query in &held {
            connection.send(&message::answer_to(query, [192, 0, 2, 53]));
        }
        connection.query();
    });
    let authority = Authority::new();
    // This backend waits for all five on one connection.
    let config = config(backend.address, &authority.issue("dns", &[NAME])).backend_key("max_connections", 1);
    let counterfoil = Counterfoil::start(&config);
    for versions in [&TLS12, &TLS13] {
        let tls = Tls::with_versions(&authority.ca, NAME, &[versions]);
        let mut client = Client::connect_tls(counterfoil.address, None, &tls);
        for id in 0..5 {
            client.ask(id, "half.example.test", qtype::A);
        }
        client.close_notify();
        for _ in 0..5 {
            assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::NOERROR);
        }
        assert_eq!(client.receive(SOON), Received::Closed);
        counterfoil.assert_quiescent();
    }
    let reason = [("reason", "client_closed")];
    assert_eq!(counterfoil.metrics().sum("client_connections_closed_total", &reason), 2.0);
}

/// Behaviour 44: a long message in records of all sorts, its length cut in two.
#[test]
fn messages_are_cut_anywhere() {
    let backend = FakeBackend::start(|connection| {
        while let Some(mut query) = connection.query() {
            query[2] |= 0x80;
            connection.send(&query);
        }
    });
    let authority = Authority::new();
    let counterfoil = Counterfoil::start(&config(backend.address, &authority.issue("dns", &[NAME])));
    let mut client = Client::connect_tls(counterfoil.address, None, &Tls::new(&authority.ca, NAME));
    let mut long = message::query(9, "long.example.test", qtype::A);
    long.resize(7680, 7);
    let octets = message::framed(&long);
    for cuts in [vec![1, 2, 3000, 7682], (1..100).chain([7682]).collect(), vec![7682]] {
        let mut start = 0;
        for cut in cuts {
            client.send_raw(&octets[start..cut]).unwrap();
            start = cut;
        }
        let mut answer = client.receive(SOON).message();
        answer[2] &= 0x7f;
        assert!(answer == long, "not the octets that were sent");
    }
    // The longest that there is takes five records each way.
    let mut longest = message::query(10, "longest.example.test", qtype::A);
    longest.resize(65_535, 9);
    client.send_raw(&message::framed(&longest)).unwrap();
    longest[2] |= 0x80;
    assert!(client.receive(SOON).message() == longest, "not the octets that were sent");
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn many_clients_and_many_queries() {
    let backend = FakeBackend::answering(true);
    let authority = Authority::new();
    let config = config(backend.address, &authority.issue("dns", &[NAME])).set("server", "workers", 2);
    let counterfoil = Counterfoil::start(&config.identity("address"));
    let tls = Tls::new(&authority.ca, NAME).offering(&["dot"]);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut client = Client::connect_tls(counterfoil.address, None, &tls);
                Load { count: 3000, in_flight: 100, ..Load::default() }.run(&mut client).assert_all_answered(3000);
                assert_eq!(client.tls().protocol_version(), Some(ProtocolVersion::TLSv1_3));
            });
        }
    });
    wait::until("the clients are gone", SOON, || counterfoil.metrics().sum("client_connections", &[]) == 0.0);
    counterfoil.assert_quiescent();
}

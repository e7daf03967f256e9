//! Real clients through Counterfoil to real servers that demand PROXY v2: every query answered, and the servers see
//! what each `identity` promises.
#![expect(clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::message::qtype;
use counterfoil_tests::process;
use counterfoil_tests::servers::{Recursor, TlvOracle, Told, Unbound, ZONE};
use counterfoil_tests::tempdir::TempDir;

/// Idle connections go soon, so that every test can wait for rest.
fn config(backend: SocketAddr) -> Config {
    Config::new(backend).set("connections", "idle_timeout", "\"300ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    )
}

#[test]
fn kdig_through_counterfoil_is_answered() {
    let unbound = Unbound::start(false);
    let counterfoil = Counterfoil::start(&config(unbound.address).identity("connection"));
    let port = counterfoil.address.port().to_string();
    let name = format!("kdig.{ZONE}");
    for _ in 0..10 {
        let args = ["@127.0.0.1", "-p", &port, "+tcp", "+retry=0", "+timeout=5", &name, "A"];
        let (ok, output) = process::run("kdig", &args, Duration::from_secs(20));
        assert!(ok && output.contains("NOERROR") && output.contains("192.0.2.53"), "{output}");
    }
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.value("answers_total", &[("listener", "dns")]), 10.0);
    assert_eq!(metrics.value("client_connections_opened_total", &[("listener", "dns")]), 10.0);
}

#[test]
fn dnsperf_over_tcp_loses_nothing() {
    const QUERIES: usize = 10_000;
    let unbound = Unbound::start(false);
    let counterfoil = Counterfoil::start(&config(unbound.address).identity("connection").set("server", "workers", "2"));
    let dir = TempDir::new("dnsperf");
    let names: String = (0..QUERIES).map(|n| format!("n{n}.{ZONE} A\n")).collect();
    let data = dir.write("queries", &names).display().to_string();
    let port = counterfoil.address.port().to_string();
    // Unbound takes 10 TCP clients, and each client connection owns one connection to it.
    let args = ["-s", "127.0.0.1", "-p", &port, "-m", "tcp", "-c", "8", "-n", "1", "-d", &data];
    let (ok, output) = process::run("dnsperf", &args, Duration::from_secs(60));
    let figure = |what: &str| -> usize {
        let line = output.lines().find_map(|line| line.trim().strip_prefix(what)).unwrap_or_else(|| panic!("{output}"));
        line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{output}"))
    };
    assert!(ok, "{output}");
    assert_eq!(figure("Queries sent:"), QUERIES, "{output}");
    assert_eq!(figure("Queries completed:"), QUERIES, "{output}");
    assert_eq!(figure("Queries lost:"), 0, "{output}");
    assert!(output.contains("NOERROR 10000 (100.00%)"), "{output}");
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("answers_total", &[]), QUERIES as f64);
}

#[test]
fn unbound_logs_the_addresses_of_the_clients() {
    let mut unbound = Unbound::start(true);
    let counterfoil = Counterfoil::start(&config(unbound.address).identity("connection"));
    for source in ["127.0.0.2", "127.0.0.3", "127.1.2.3"] {
        let name = format!("from-{}.{ZONE}", source.replace('.', "-"));
        counterfoil.client_from(source).exchange(7, &name, qtype::A);
        assert_eq!(unbound.logged_client(&name).to_string(), source);
    }
    counterfoil.assert_quiescent();
}

/// What a backend sees of a client at 127.0.0.2 whose port is `port`.
fn expected_source(identity: &str, port: u16) -> SocketAddr {
    let text = match identity {
        "connection" => format!("127.0.0.2:{port}"),
        "address" => "127.0.0.2:0".to_owned(),
        "subnet" => "127.0.0.0:0".to_owned(),
        // The forwarder's own side of the connection to a backend on 127.0.0.1.
        _ => "127.0.0.1:0".to_owned(),
    };
    text.parse().expect("an address")
}

const IDENTITIES: [&str; 4] = ["connection", "address", "subnet", "forwarder"];

#[test]
fn every_identity_against_unbound() {
    for identity in IDENTITIES {
        let mut unbound = Unbound::start(true);
        let counterfoil = Counterfoil::start(&config(unbound.address).identity(identity).tlv(0xe0, "{qname_label:1}"));
        let name = format!("{identity}.{ZONE}");
        let mut client = counterfoil.client_from("127.0.0.2");
        client.exchange(1, &name, qtype::A);
        assert_eq!(unbound.logged_client(&name), expected_source(identity, 0).ip(), "{identity}");
        drop(client);
        counterfoil.assert_quiescent();
    }
}

#[test]
fn every_identity_against_the_recursor() {
    let mut recursor = Recursor::start(true);
    for identity in IDENTITIES {
        let config = config(recursor.address)
            .identity(identity)
            .tlv(0xe1, "tenant-42")
            .tlv(0xe0, "{qname_label:1}")
            .tlv(0xe2, "{listener}");
        let counterfoil = Counterfoil::start(&config);
        let mut client = counterfoil.client_from("127.0.0.2");
        // Two queries with other TLVs on one client connection.
        for label in ["one", "two"] {
            let label = format!("{label}-{identity}");
            let name = format!("{label}.{ZONE}");
            client.exchange(1, &name, qtype::A);
            let seen = recursor.seen(&name);
            assert_eq!(seen.source, expected_source(identity, 0).ip().to_string(), "{identity}");
            assert_eq!(seen.tlvs, ["e1=tenant-42".to_owned(), format!("e0={label}"), "e2=dns".to_owned()]);
        }
        drop(client);
        counterfoil.assert_quiescent();
    }
}

#[test]
fn every_identity_against_dnsdist() {
    let oracle = TlvOracle::start();
    for identity in IDENTITIES {
        let config = config(oracle.address)
            .identity(identity)
            .tlv(0xe0, "{qname_label:1}")
            .tlv(0xe1, "<{qtype}>")
            .tlv(0xe2, "hex:017f")
            .tlv(0xe3, "{{{qname_label:2}}}");
        let counterfoil = Counterfoil::start(&config);
        let mut client = counterfoil.client_from("127.0.0.2");
        for (id, label) in ["one", "two", "one"].into_iter().enumerate() {
            let id = u16::try_from(id).expect("three queries");
            let told = Told::read(&client.exchange(id, &format!("{label}.{ZONE}"), qtype::TXT));
            let source = expected_source(identity, client.local_addr().port());
            assert_eq!(told.source, source.to_string(), "{identity}");
            let label = format!("e0={label}");
            assert_eq!(told.tlvs, [label.as_str(), "e1=<TXT>", "e2=\u{1}\u{7f}", "e3={example}"], "{identity}");
        }
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// A TLV with the client's own address and port, where the header has them too.
#[test]
fn the_tlv_of_a_client_is_its_own() {
    let oracle = TlvOracle::start();
    let config = Config::new(oracle.address).identity("connection").tlv(0xe0, "{client_ip}#{client_port}");
    let counterfoil = Counterfoil::start(&config);
    let mut clients: Vec<Client> = ["127.0.0.2", "127.0.0.2", "127.0.0.3"].map(|s| counterfoil.client_from(s)).into();
    for round in 0..3 {
        for client in &mut clients {
            let told = Told::read(&client.exchange(round, &format!("own.{ZONE}"), qtype::TXT));
            let own = client.local_addr();
            assert_eq!(told.source, own.to_string());
            assert_eq!(told.tlvs, [format!("e0={}#{}", own.ip(), own.port())]);
        }
    }
    // Every client owns one connection, used again in each round.
    assert_eq!(counterfoil.metrics().sum("backend_connections_opened_total", &[]), 3.0);
    drop(clients);
    counterfoil.assert_quiescent();
}

/// Who shares a connection, for each identity: the table in section 3 of the design, counted.
#[test]
fn identities_share_as_they_promise() {
    let recursor = Recursor::start(false);
    for (identity, connections) in [("connection", 4.0), ("address", 3.0), ("subnet", 2.0), ("forwarder", 1.0)] {
        let config = Config::new(recursor.address).settles_soon().identity(identity).tlv(0xe0, "same-for-all");
        let counterfoil = Counterfoil::start(&config);
        let mut clients: Vec<Client> =
            ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.1.2"].map(|s| counterfoil.client_from(s)).into();
        for client in &mut clients {
            Load { count: 5, ..Load::default() }.run(client).assert_all_answered(5);
        }
        let opened = counterfoil.metrics().sum("backend_connections_opened_total", &[]);
        assert_eq!(opened, connections, "{identity}");
        drop(clients);
        counterfoil.assert_quiescent();
    }
}

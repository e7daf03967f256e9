//! The benchmark's tools judge right: all is well between themselves, and nothing that a proxy could do wrong passes.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;

use counterfoil_tests::load::message;
use counterfoil_tests::load::tool::{self, Tool};
use serde_json::Value;

const LOADGEN: &str = env!("CARGO_BIN_EXE_loadgen");
const RELAY: &str = env!("CARGO_BIN_EXE_relay");
const ANSWERER: &str = env!("CARGO_BIN_EXE_answerer");

/// 3,000 queries through a relay: how it went, and the backend's counts.
fn through_relay(mode: &str, checks: &[&str], arguments: &[&str]) -> (bool, Value, Value) {
    let mut answerer = Tool::start(ANSWERER, checks);
    let relay = Tool::start(RELAY, &[&answerer.address, "--mode", mode]);
    let (well, result) =
        tool::load(LOADGEN, &relay.address, &[&["--count=3000", "--seconds=60", "--patience=1"], arguments].concat());
    (well, result, answerer.counts())
}

#[test]
fn every_query_is_answered_through_every_kind_of_relay() {
    let port = ["--proxy", "--check-port"];
    let label = ["--proxy", "--check-port", "--check-label"];
    for (mode, checks, arguments, connections) in [
        ("copy", &[][..], &["--clients=10", "--in-flight=20"][..], 10..=10),
        ("proxy", &port, &["--clients=10", "--in-flight=20"], 10..=10),
        // The last connection of each client may have fewer than its three queries.
        ("proxy", &port, &["--clients=10", "--per-connection=3", "--sources=20"], 1000..=1010),
        ("proxy", &port, &["--clients=10", "--rate=30000"], 10..=10),
        ("per-query", &label, &["--clients=1"], 3000..=3000),
        ("per-query", &label, &["--clients=10", "--in-flight=5", "--names=zipf:9"], 3000..=3000),
    ] {
        let (well, result, counts) = through_relay(mode, checks, arguments);
        assert!(well, "{mode} {arguments:?}: {result} {counts}");
        assert_eq!(result["answers"], 3000, "{mode} {arguments:?}");
        assert!(connections.contains(&counts["opened"].as_u64().unwrap()), "{mode} {arguments:?}: {counts}");
        assert_eq!(counts["faults"], 0, "{mode} {arguments:?}: {counts}");
    }
}

#[test]
fn the_answerer_notices_headers_that_do_not_belong_to_their_queries() {
    for (mode, checks, fault) in [
        ("copy", &["--proxy"][..], "no PROXY v2 signature"),
        ("proxy", &["--proxy", "--check-label"], "header without TLV 0xE0"),
    ] {
        let (well, result, counts) = through_relay(mode, checks, &["--clients=2"]);
        assert!(!well, "{result}");
        assert_eq!(counts["first_fault"], fault, "{counts}");
    }
}

#[test]
fn a_connection_shared_by_two_clients_is_noticed() {
    let mut answerer = Tool::start(ANSWERER, &["--proxy", "--check-port"]);
    let mut stream = TcpStream::connect(&answerer.address).unwrap();
    let mut octets = Vec::new();
    let (own, backend) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
    let v4 = |address: std::net::SocketAddr| std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, address.port());
    counterfoil_tests::load::proxy_header::push(&mut octets, v4(own), v4(backend), None);
    message::push_query(&mut octets, 1, &message::label(own.port(), 1));
    message::push_query(&mut octets, 2, &message::label(own.port() ^ 1, 1));
    stream.write_all(&octets).unwrap();
    // It closes the connection, with or without the first answer.
    let _ = stream.read_to_end(&mut Vec::new());
    assert_eq!(answerer.counts()["first_fault"], "query of another client than its PROXY header says");
}

type Fault = fn(Vec<u8>) -> Vec<u8>;

/// A server that does to the hundredth answer of each connection what `fault` says.
fn faulty(fault: Fault) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || serve(stream.unwrap(), fault));
        }
    });
    address
}

fn serve(mut stream: TcpStream, fault: Fault) {
    let mut query = [0; 2 + message::QUERY_LEN];
    let mut number = 0;
    while stream.read_exact(&mut query).is_ok() {
        number += 1;
        let mut answer = Vec::new();
        message::push_answer(&mut answer, &query[2..]).unwrap();
        let answer = if number == 100 { fault(answer) } else { answer };
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

#[test]
fn one_fault_in_many_answers_fails_the_load() {
    let cases: [(&str, Fault); 5] = [
        ("unexpected", |mut answer| {
            answer[3] ^= 0x10;
            answer
        }),
        ("wrong", |mut answer| {
            answer[20] ^= 1;
            answer
        }),
        ("wrong", |mut answer| {
            answer[5] |= 2;
            answer
        }),
        ("unexpected", |answer| answer.repeat(2)),
        ("missing", |_| Vec::new()),
    ];
    for (kind, fault) in cases {
        let target = faulty(fault);
        let (well, result) = tool::load(
            LOADGEN,
            &target,
            &["--clients=1", "--in-flight=4", "--count=1000", "--seconds=60", "--patience=0.2"],
        );
        assert!(!well, "{result}");
        assert!(result[kind].as_u64().unwrap() > 0, "{kind}: {result}");
    }
}

#[test]
fn a_connection_that_the_server_ends_fails_the_load() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || drop(listener.accept().unwrap()));
    let (well, result) = tool::load(LOADGEN, &target, &["--clients=1", "--count=10", "--patience=0.2"]);
    server.join().unwrap();
    assert!(!well);
    assert_eq!((&result["closed"], &result["missing"]), (&1.into(), &1.into()), "{result}");
}

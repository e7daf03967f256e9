//! The load generator over TLS, against other implementations of it: it counts the handshakes that were made, and fails
//! unless they are those that were asked for.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::thread;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::load::message;
use counterfoil_tests::load::tool::{self, Tool};
use counterfoil_tests::servers::{DotFront, Haproxy};
use counterfoil_tests::tempdir::TempDir;
use serde_json::{Value, json};

const LOADGEN: &str = env!("CARGO_BIN_EXE_loadgen");
const ANSWERER: &str = env!("CARGO_BIN_EXE_answerer");
const CERTIFICATE: &str = env!("CARGO_BIN_EXE_certificate");

/// A directory with `certificate.pem`, `key.pem` and `both.pem`.
fn certificate() -> TempDir {
    let directory = TempDir::new("load-tls");
    let status = std::process::Command::new(CERTIFICATE).arg(directory.path()).status().unwrap();
    assert!(status.success(), "{status}");
    directory
}

/// The path of a file in it.
fn file(directory: &TempDir, name: &str) -> String {
    directory.path().join(name).display().to_string()
}

/// The `bind` options of an HAProxy that speaks DoT.
fn bind(directory: &TempDir) -> String {
    format!("ssl crt {} alpn dot", file(directory, "both.pem"))
}

fn load(target: SocketAddr, certificate: &TempDir, arguments: &[&str]) -> (bool, Value) {
    let certificate = file(certificate, "certificate.pem");
    let common = ["--tls", &certificate, "--clients=4", "--seconds=60", "--patience=5"];
    tool::load(LOADGEN, &target.to_string(), &[&common, arguments].concat())
}

/// New, resumed and long connections, each of which must be answered rightly and be what it was meant to be. Returns how
/// many of 200 were new, from 4 clients that resume what they can.
fn every_kind_of_handshake(target: SocketAddr, certificate: &TempDir) -> u64 {
    for (arguments, new) in [(["--count=2000", "--in-flight=20"], 4), (["--count=200", "--per-connection=1"], 200)] {
        let (well, result) = load(target, certificate, &arguments);
        assert!(well, "{arguments:?}: {result}");
        assert_eq!(result["handshakes"], json!({ "new": new, "resumed": 0 }), "{arguments:?}: {result}");
    }
    let (well, result) = load(target, certificate, &["--count=200", "--per-connection=1", "--resume"]);
    assert!(well, "{result}");
    let (new, resumed) = (&result["handshakes"]["new"], &result["handshakes"]["resumed"]);
    let (new, resumed) = (new.as_u64().unwrap(), resumed.as_u64().unwrap());
    assert_eq!(new + resumed, 200, "{result}");
    new
}

#[test]
fn every_kind_of_handshake_with_the_answerer() {
    let certificate = certificate();
    let mut answerer = Tool::start(ANSWERER, &["--tls", &certificate.path().display().to_string()]);
    assert_eq!(every_kind_of_handshake(answerer.address.parse().unwrap(), &certificate), 4);
    let counts = answerer.counts();
    assert_eq!((&counts["answers"], &counts["faults"]), (&2400.into(), &0.into()), "{counts}");
}

#[test]
fn every_kind_of_handshake_with_haproxy() {
    let (certificate, answerer) = (certificate(), Tool::start(ANSWERER, &[]));
    let haproxy = Haproxy::bound(answerer.address.parse().unwrap(), "", &bind(&certificate));
    assert_eq!(every_kind_of_handshake(haproxy.address, &certificate), 4);
}

#[test]
fn every_kind_of_handshake_with_dnsdist() {
    let (certificate, answerer) = (certificate(), Tool::start(ANSWERER, &[]));
    let backend = answerer.address.parse().unwrap();
    let dnsdist = DotFront::start(backend, &file(&certificate, "certificate.pem"), &file(&certificate, "key.pem"));
    // A full handshake leaves two tickets, a resumed one none: of a client's connections the first, fourth, ... are new.
    let new = every_kind_of_handshake(dnsdist.address, &certificate);
    assert!((67..=70).contains(&new), "{new} of 200 were new");
}

#[test]
fn every_kind_of_handshake_with_counterfoil() {
    let (certificate, answerer) = (certificate(), Tool::start(ANSWERER, &[]));
    let config = Config::new(answerer.address.parse().unwrap())
        // A session that one worker made is resumed at the other.
        .set("server", "workers", "2")
        .set("connections", "idle_timeout", "\"1s\"")
        .set("listener.tls", "certificate", format!("{:?}", file(&certificate, "certificate.pem")))
        .set("listener.tls", "key", format!("{:?}", file(&certificate, "key.pem")));
    let counterfoil = Counterfoil::start(&config);
    assert_eq!(every_kind_of_handshake(counterfoil.address, &certificate), 4);
    counterfoil.assert_quiescent();
}

#[test]
fn a_handshake_of_the_wrong_kind_fails_the_load() {
    let (certificate, answerer) = (certificate(), Tool::start(ANSWERER, &[]));
    // It gives tickets to sessions that it does not keep.
    let haproxy = Haproxy::bound(
        answerer.address.parse().unwrap(),
        "tune.ssl.cachesize 0",
        &format!("{} no-tls-tickets", bind(&certificate)),
    );
    let (well, result) = load(haproxy.address, &certificate, &["--count=200", "--per-connection=1", "--resume"]);
    assert!(!well, "{result}");
    assert_eq!(result["first_fault"], "TLS: the handshake was Full instead of Resumed", "{result}");
    assert_eq!(result["handshakes"], json!({ "new": 4, "resumed": 0 }), "{result}");
}

#[test]
fn a_server_that_is_not_the_right_one_fails_the_load() {
    let (own, other, answerer) = (certificate(), certificate(), Tool::start(ANSWERER, &[]));
    let backend = answerer.address.parse().unwrap();
    let haproxy = Haproxy::bound(backend, "", &bind(&own));
    let without_alpn = Haproxy::bound(backend, "", &format!("ssl crt {}", file(&own, "both.pem")));
    for (target, certificate, fault) in [
        (haproxy.address, &other, "TLS: invalid peer certificate: ApplicationVerificationFailure"),
        (without_alpn.address, &own, "TLS: the server has not chosen ALPN dot"),
    ] {
        let (well, result) = load(target, certificate, &["--count=20"]);
        assert!(!well, "{result}");
        assert_eq!(result["first_fault"], fault, "{result}");
    }
}

#[test]
fn one_wrong_answer_in_many_fails_the_load() {
    let certificate = certificate();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let backend = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut query = [0; 2 + message::QUERY_LEN];
                for number in 1.. {
                    let mut answer = Vec::new();
                    if stream.read_exact(&mut query).is_err() {
                        return;
                    }
                    message::push_answer(&mut answer, &query[2..]).unwrap();
                    // The last octet of the address.
                    *answer.last_mut().unwrap() ^= u8::from(number == 100);
                    if stream.write_all(&answer).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let haproxy = Haproxy::bound(backend, "", &bind(&certificate));
    let (well, result) = load(haproxy.address, &certificate, &["--count=1000"]);
    assert!(!well, "{result}");
    assert_eq!((&result["wrong"], &result["answers"]), (&4.into(), &996.into()), "{result}");
}

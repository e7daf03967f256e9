//! Bugs that other programs had in TLS handshakes: none of them is here. docs/regressions.md tells what happened there.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Tls};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::qtype;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

const SOON: Duration = Duration::from_secs(10);
const NAME: &str = "dns.example";
/// Octets of a record's header (RFC 8446 section 5.1).
const RECORD: usize = 5;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

fn start(authority: &Authority, backend: &FakeBackend) -> Counterfoil {
    let config = Config::new(backend.address)
        .set("connections", "idle_timeout", "\"300ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .tls(&authority.issue("dns", &[NAME]));
    Counterfoil::start(&config)
}

/// A ClientHello as rustls writes it: one record.
fn hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), NAME.try_into().unwrap()).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    assert_eq!(usize::from(u16::from_be_bytes([hello[3], hello[4]])), hello.len() - RECORD, "one record");
    hello
}

#[track_caller]
fn expect_served(counterfoil: &Counterfoil, authority: &Authority) {
    let tls = Tls::new(&authority.ca, NAME);
    Client::connect_tls(counterfoil.address, None, &tls).exchange(1, "served.example.test", qtype::A);
}

/// CVE-2024-11738 (rustls): a ClientHello in many records, together and each by itself.
#[test]
fn cve_2024_11738_a_client_hello_in_many_records() {
    let (authority, backend) = (Authority::new(), FakeBackend::answering(false));
    let counterfoil = start(&authority, &backend);
    for size in [1, 2, 3, 4, 5, 37, 100, 200] {
        for apart in [false, true] {
            let records: Vec<Vec<u8>> = hello()[RECORD..]
                .chunks(size)
                .map(|part| [&[HANDSHAKE, 3, 1, 0, part.len() as u8], part].concat())
                .collect();
            let mut client = counterfoil.client();
            if apart {
                records.iter().for_each(|record| client.send_raw(record).unwrap());
            } else {
                client.send_raw(&records.concat()).unwrap();
            }
            // The ServerHello.
            assert_eq!(client.read_once(SOON)[0], HANDSHAKE, "{size} octets each");
            client.reset();
        }
    }
    expect_served(&counterfoil, &authority);
    counterfoil.assert_quiescent();
}

/// CVE-2024-32650 (rustls): close_notify in the middle of a handshake ends it, at once and without a spin.
#[test]
fn cve_2024_32650_close_notify_in_the_handshake() {
    let (authority, backend) = (Authority::new(), FakeBackend::answering(false));
    let counterfoil = start(&authority, &backend);
    let before = counterfoil.process.cpu_time();
    let start = Instant::now();
    let mut clients: Vec<Client> = (0..20).map(|_| counterfoil.client()).collect();
    for client in &mut clients {
        // A warning, close_notify.
        client.send_raw(&[&hello()[..], &[ALERT, 3, 3, 0, 2, 1, 0]].concat()).unwrap();
    }
    for client in &mut clients {
        let mut flight = Vec::new();
        client.read_to_end(&mut flight, SOON);
    }
    let (taken, spent) = (start.elapsed(), counterfoil.process.cpu_time().saturating_sub(before));
    assert!(taken < Duration::from_secs(8) && spent < Duration::from_secs(2), "{taken:?}, {spent:?} of CPU");
    expect_served(&counterfoil, &authority);
    counterfoil.assert_quiescent();
}

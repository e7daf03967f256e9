//! What each connection's header has beside the client: an ID, a checksum; and TLVs from EDNS options.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::HashSet;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Load, Received};
use counterfoil_tests::fake_backend::{FakeBackend, Header};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::servers::{Recursor, Unbound};

const SOON: Duration = Duration::from_secs(5);
const CRC32C: u8 = 3;
const UNIQUE_ID: u8 = 5;

fn value(header: &Header, kind: u8) -> Option<&[u8]> {
    header.tlvs.iter().find(|(of, _)| *of == kind).map(|(_, value)| value.as_slice())
}

fn settle(config: Config) -> Config {
    config.settles_soon()
}

/// Bit by bit, as the specification has it; the program does it with a table.
fn crc32c(octets: &[u8]) -> u32 {
    !octets.iter().fold(u32::MAX, |crc, octet| {
        (0..8).fold(crc ^ u32::from(*octet), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

#[test]
fn each_connection_has_its_own_id_and_who_shares_it_does_not_change() {
    let (backend, headers) = FakeBackend::recording();
    let config = Config::new(backend.address)
        .identity("address")
        .tlv(0xe0, "{unique_id}")
        .set("pool.proxy_protocol", "unique_id", true)
        .set("pool.proxy_protocol", "crc32c", true);
    let counterfoil = Counterfoil::start(&settle(config));
    for n in 0..20 {
        // Four addresses, five connections of clients from each.
        let mut client = counterfoil.client_from(&format!("127.0.0.{}", 2 + n % 4));
        Load { count: 3, ..Load::default() }.run(&mut client).assert_all_answered(3);
    }
    let headers = headers.lock().unwrap().clone();
    assert_eq!(headers.len(), 4, "one connection for each address");
    let ids: HashSet<&[u8]> = headers.iter().map(|header| value(header, UNIQUE_ID).unwrap()).collect();
    assert_eq!(ids.len(), 4);
    for header in &headers {
        let id = value(header, UNIQUE_ID).unwrap();
        assert_eq!(id.len(), 36, "a UUID");
        assert_eq!(value(header, 0xe0), Some(id));
        let (kind, checksum) = header.tlvs.last().unwrap();
        assert_eq!(*kind, CRC32C);
        let mut bytes = header.bytes.clone();
        let end = bytes.len() - 4;
        bytes[end..].fill(0);
        assert_eq!(crc32c(&bytes).to_be_bytes(), **checksum);
    }
    counterfoil.assert_quiescent();
}

/// Real servers take such headers; the Recursor tells what it saw.
#[test]
fn servers_take_sealed_headers() {
    let (unbound, mut recursor) = (Unbound::start(false), Recursor::start(true));
    let config = Config::new(unbound.address)
        .backend(recursor.address, &[])
        .identity("connection")
        .set("pool", "policy", "\"round-robin\"")
        .set("pool.proxy_protocol", "unique_id", true)
        .set("pool.proxy_protocol", "crc32c", true);
    let counterfoil = Counterfoil::start(&settle(config));
    for n in 0..4 {
        let name = |_| format!("sealed{n}.example.test");
        Load { name: &name, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(1);
    }
    // The second and the fourth client came to it.
    let seen = recursor.seen("sealed1.example.test");
    assert!(seen.tlvs.iter().any(|tlv| tlv.starts_with("05=") && tlv.len() == 3 + 36), "{seen:?}");
    counterfoil.assert_quiescent();
}

/// Queries with the same option share a connection; what has none gets an empty value.
#[test]
fn an_edns_option_becomes_a_tlv() {
    let (backend, headers) = FakeBackend::recording();
    let config = Config::new(backend.address).identity("address").tlv(0xe0, "{edns:65001}");
    let counterfoil = Counterfoil::start(&settle(config));
    let mut client = counterfoil.client();
    for (id, option) in [(1, Some(&b"tenant-1"[..])), (2, Some(b"tenant-2")), (3, Some(b"tenant-1")), (4, None)] {
        let mut query = message::query(id, "n.example.test", qtype::A);
        query[11] = u8::from(option.is_some());
        if let Some(option) = option {
            query.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 4 + option.len() as u8]);
            query.extend_from_slice(&[0xfd, 0xe9, 0, option.len() as u8]);
            query.extend_from_slice(option);
        }
        client.send_raw(&message::framed(&query)).unwrap();
        assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::NOERROR);
    }
    let headers = headers.lock().unwrap().clone();
    let values: Vec<_> = headers.iter().map(|header| value(header, 0xe0).unwrap().to_vec()).collect();
    assert_eq!(values, [&b"tenant-1"[..], b"tenant-2", b""]);
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("pool_distinct_headers", &[]), 3.0);
    assert_eq!(metrics.sum("pool_acquire_total", &[("result", "hit")]), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// The same headers count once, whatever worker and client they belong to.
#[test]
fn different_headers_are_estimated_over_all_workers() {
    let (backend, _) = FakeBackend::recording();
    let config = Config::new(backend.address).identity("forwarder").tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start(&settle(config.set("server", "workers", 2)));
    for _ in 0..6 {
        let name = |n: usize| format!("n{}.example.test", n % 40);
        Load { count: 80, name: &name, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(80);
    }
    let estimate = counterfoil.metrics().sum("pool_distinct_headers", &[]);
    assert!((38.0..=42.0).contains(&estimate), "{estimate}");
    counterfoil.assert_quiescent();
}

/// With the seal it would be longer than allowed: a query that needs it fails, and the next one lives.
#[test]
fn the_limit_counts_the_seal() {
    let (backend, headers) = FakeBackend::recording();
    let config = Config::new(backend.address)
        .identity("address")
        .tlv(0xe0, "{qname}")
        .set("pool.proxy_protocol", "max_header", "\"100B\"")
        .set("pool.proxy_protocol", "unique_id", true);
    let counterfoil = Counterfoil::start(&settle(config));
    let mut client = counterfoil.client();
    // 16 + 12 + 3 + 30 + 39 is the limit.
    for (id, length, code) in [(1, 30, rcode::NOERROR), (2, 31, rcode::SERVFAIL), (3, 29, rcode::NOERROR)] {
        let name = format!("{}.example.test", "x".repeat(length - 13));
        client.ask(id, &name, qtype::A);
        let Received::Message(answer) = client.receive(SOON) else { unreachable!("no answer to {length}") };
        assert_eq!(message::response_code(&answer), code, "{length}");
    }
    let longest = headers.lock().unwrap().iter().map(|header| header.bytes.len()).max();
    assert_eq!(longest, Some(100));
    drop(client);
    counterfoil.assert_quiescent();
}

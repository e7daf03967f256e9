//! The PROXY protocol by the letter, towards backends and in front of a listener. A test's name begins with the section of
//! the specification whose rule it holds; docs/standards.md has all rules.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::{FakeBackend, Header};
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::proxy_header::{raw, v1, v2};

const SOON: Duration = Duration::from_secs(5);
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const CLIENT: &str = "192.0.2.7:4007";
const SERVICE: &str = "198.51.100.53:53";

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).set("connections", "idle_timeout", "\"300ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    )
}

/// The whole header is the first thing sent, in one write, which has the first query, too; for every identity, and however
/// long the header is.
#[test]
fn section_2_the_header_is_written_at_once_and_first() {
    let backend = FakeBackend::start(|connection| {
        let Some(read) = connection.read_once() else { return };
        assert_eq!(&read[..SIGNATURE.len()], SIGNATURE);
        let header = 16 + usize::from(u16::from_be_bytes([read[14], read[15]]));
        let rest = read.get(header..).unwrap_or_else(|| panic!("{} octets of a header of {header}", read.len()));
        if let Some((length, query)) = rest.split_first_chunk::<2>() {
            assert_eq!(usize::from(u16::from_be_bytes(*length)), query.len(), "the first query, whole");
            connection.send(&message::answer_to(query, [192, 0, 2, 53]));
        }
        while let Some(query) = connection.query() {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let long = "l".repeat(400);
    for (identity, tlv) in [("connection", "short"), ("address", &long), ("subnet", "{uuid}"), ("forwarder", "{qname}")]
    {
        let counterfoil = Counterfoil::start(&config(backend.address).identity(identity).tlv(0xe0, tlv));
        for _ in 0..5 {
            Load { count: 3, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(3);
        }
        counterfoil.assert_quiescent();
    }
}

/// By default no header is longer than 512 octets: it fits the first segment of any path (536 octets), whatever the TLVs.
#[test]
fn section_2_headers_fit_the_smallest_segment() {
    let (backend, headers) = FakeBackend::recording();
    let counterfoil = Counterfoil::start(&config(backend.address).identity("connection").tlv(0xe0, "{qname}{qname}"));
    let mut client = counterfoil.client();
    for (id, length) in (1..).zip([1, 20, 40, 57, 58, 60]) {
        let label = "n".repeat(length);
        client.ask(id, &format!("{label}.{label}.{label}.{label}.test"), qtype::A);
        client.receive(SOON).message();
    }
    drop(client);
    counterfoil.assert_quiescent();
    let lengths: Vec<usize> = headers.lock().unwrap().iter().map(|header| header.bytes.len()).collect();
    // 28 octets of addresses, 3 before the value, and twice the name as text.
    assert_eq!(lengths, [8, 84, 164, 232, 236].map(|name| 31 + 2 * (name + 4)), "the sixth would be one of 519");
    assert_eq!(counterfoil.metrics().sum("queries_failed_total", &[("reason", "header_too_long")]), 1.0);
}

/// Whether the listener takes a header, as a client sees it.
fn is_taken(counterfoil: &Counterfoil, header: &[u8]) -> bool {
    let mut client = counterfoil.client();
    client.send_raw(header).unwrap();
    client.send_raw(&message::framed(&message::query(1, "taken.example.test", qtype::A))).is_ok()
        && matches!(client.receive(SOON), counterfoil_tests::driver::Received::Message(_))
}

/// Of the 256 values of octet 13 two are valid: version 2 with LOCAL and with PROXY.
#[test]
fn section_2_2_every_version_and_command() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).accept_proxy(&["127.0.0.1"]));
    let taken: Vec<u8> = (0..=255).filter(|octet| is_taken(&counterfoil, &raw(*octet, 0x11, &[9; 12]))).collect();
    assert_eq!(taken, [0x20, 0x21]);
    counterfoil.assert_quiescent();
}

/// Of octet 14: families 0 to 3 and transports 0 to 2. Whatever is in there, LOCAL is taken, and its length skipped.
#[test]
fn section_2_2_every_family_and_transport() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).accept_proxy(&["127.0.0.1"]));
    // Room for the addresses of each family; what is left of it are empty TLVs.
    let taken: Vec<u8> = (0..=255).filter(|octet| is_taken(&counterfoil, &raw(0x21, *octet, &[0; 216]))).collect();
    let valid: Vec<u8> = (0..=255).filter(|octet| octet >> 4 <= 3 && octet & 0x0f <= 2).collect();
    assert_eq!(taken, valid);
    for length in [0, 1, 11, 12, 100, 500] {
        for family in [0x00, 0x11, 0x21, 0x31] {
            assert!(is_taken(&counterfoil, &raw(0x20, family, &vec![0xff; length])), "{family:#x}, {length} octets");
        }
    }
    counterfoil.assert_quiescent();
}

/// Addresses that do not fit into the length, and TLVs that do not end with it, make no header.
#[test]
fn section_2_2_lengths_that_cut_something_off() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).accept_proxy(&["127.0.0.1"]));
    for (family, addresses) in [(0x11, 12), (0x21, 36), (0x31, 216)] {
        for length in (0..addresses + 12).rev().step_by(if addresses > 100 { 7 } else { 1 }) {
            // Zeros behind the addresses: empty TLVs of three octets each.
            let fits = length >= addresses && (length - addresses) % 3 == 0;
            let header = raw(0x21, family, &vec![0; length]);
            assert_eq!(is_taken(&counterfoil, &header), fits, "{family:#x}, {length} octets");
        }
    }
    counterfoil.assert_quiescent();
}

/// NOOP is padding; UNIQUE_ID has at most 128 octets; types that nobody knows are passed on as they are.
#[test]
fn section_2_2_4_types_of_tlvs() {
    let (backend, headers) = FakeBackend::recording();
    let config = config(backend.address).identity("connection").accept_proxy(&["127.0.0.1"]);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let tlvs: &[(u8, &[u8])] = &[
        (0x04, b""),
        (0xff, b"reserved"),
        (0x04, b"padding"),
        (0x30, b"netns"),
        (0x02, "\u{e9}.example".as_bytes()),
        (0xf0, b""),
        (0x05, &[7; 128]),
        (0x28, &[0; 200]),
        (0xff, b"again"),
    ];
    client.send_raw(&v2(CLIENT, SERVICE, tlvs)).unwrap();
    client.exchange(1, "types.example.test", qtype::A);
    let passed: Vec<(u8, Vec<u8>)> =
        tlvs.iter().filter(|(kind, _)| *kind != 4).map(|(kind, value)| (*kind, value.to_vec())).collect();
    assert_eq!(headers.lock().unwrap()[0].tlvs, passed);
    assert!(!is_taken(&counterfoil, &v2(CLIENT, SERVICE, &[(0x05, &[7; 129])])));
    drop(client);
    counterfoil.assert_quiescent();
}

/// A line of version 1 has at most 107 octets with its CRLF, numbers without leading zeros, one space each.
#[test]
fn section_2_1_lines_of_version_1() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).accept_proxy(&["127.0.0.1"]));
    let unknown = |length: usize| [b"PROXY UNKNOWN ", "x".repeat(length - 16).as_bytes(), b"\r\n"].concat();
    let longest = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
    let full = format!("PROXY TCP6 {longest} {longest} 65535 65535\r\n").into_bytes();
    assert_eq!((unknown(107).len(), full.len()), (107, 104));
    for line in [&v1(CLIENT, SERVICE), &full, &unknown(107), &b"PROXY UNKNOWN\r\n".to_vec()] {
        assert!(is_taken(&counterfoil, line), "{}", String::from_utf8_lossy(line));
    }
    for line in [
        "PROXY TCP4 192.0.2.7 198.51.100.53 4007 53\n",
        "PROXY TCP4 192.0.2.7  198.51.100.53 4007 53\r\n",
        "PROXY TCP4 192.0.2.7 198.51.100.53 4007 053\r\n",
        "PROXY TCP4 192.0.2.07 198.51.100.53 4007 53\r\n",
        "PROXY TCP4 192.0.2.7 198.51.100.53 65536 53\r\n",
        "PROXY TCP4 192.0.2.7 198.51.100.53 4007 53 \r\n",
        "PROXY TCP4 ::1 ::2 4007 53\r\n",
        "PROXY TCP6 192.0.2.7 198.51.100.53 4007 53\r\n",
        "PROXY UNIX 192.0.2.7 198.51.100.53 4007 53\r\n",
        "proxy TCP4 192.0.2.7 198.51.100.53 4007 53\r\n",
    ] {
        assert!(!is_taken(&counterfoil, line.as_bytes()), "{line:?}");
    }
    assert!(!is_taken(&counterfoil, &unknown(108)));
    counterfoil.assert_quiescent();
}

/// Connections that the program opens for itself, health checks, say LOCAL and speak for nobody; those for clients PROXY.
#[test]
fn section_2_2_health_checks_are_local() {
    let (backend, headers) = FakeBackend::recording();
    let config = Config::default()
        .set("server", "workers", 1)
        .backend(backend.address, &[("health.mode", "\"auto\""), ("health.interval", "\"50ms\"")])
        .set("connections", "idle_timeout", "\"300ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .identity("connection")
        .tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start(&config);
    let checked = [("kind", "check")];
    counterfoil.wait_metrics("some checks", SOON, |metrics| {
        metrics.sum("backend_connections_closed_total", &[]) >= 3.0
            && metrics.sum("backend_connections_opened_total", &checked) >= 3.0
    });
    let mut client: Client = counterfoil.client();
    client.exchange(1, "client.example.test", qtype::A);
    let headers = headers.lock().unwrap();
    let (own, of_clients): (Vec<&Header>, Vec<_>) = headers.iter().partition(|header| header.bytes[12] == 0x20);
    assert!(own.len() >= 3 && own.iter().all(|header| header.source.is_none() && header.tlvs.is_empty()), "{own:?}");
    let [header] = of_clients.as_slice() else { panic!("{of_clients:?}") };
    assert_eq!((header.bytes[12], header.source), (0x21, Some(client.local_addr())));
}

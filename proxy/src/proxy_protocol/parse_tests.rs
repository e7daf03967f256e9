#![expect(clippy::expect_used, reason = "tests panic")]

use super::*;
use crate::proxy_protocol::SIGNATURE;
use crate::proxy_protocol::encode::HeaderWriter;
use proptest::collection::vec;
use proptest::prelude::*;

fn header(version_command: u8, family: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = SIGNATURE.to_vec();
    bytes.extend_from_slice(&[version_command, family]);
    bytes.extend_from_slice(&u16::try_from(payload.len()).expect("fits").to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn with_tlvs(tlvs: &[u8]) -> Vec<u8> {
    let mut payload = vec![192, 0, 2, 1, 198, 51, 100, 2, 0x0f, 0xa0, 0, 53];
    payload.extend_from_slice(tlvs);
    header(0x21, 0x11, &payload)
}

fn invalid(bytes: &[u8]) -> Invalid {
    match parse(bytes, 65551) {
        Err(ParseError::Invalid(reason)) => reason,
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn a_header_with_a_query_behind_it() {
    let mut bytes = with_tlvs(b"\xe0\0\x03one\x04\0\x01x\xe0\0\0");
    let len = bytes.len();
    bytes.extend_from_slice(b"payload that looks like a TLV");
    let parsed = parse(&bytes, 536).expect("valid");
    assert_eq!(parsed.command, Command::Proxy);
    assert_eq!(parsed.source, "192.0.2.1:4000".parse().ok());
    assert_eq!(parsed.destination, "198.51.100.2:53".parse().ok());
    assert_eq!(parsed.tlvs, [(0xe0, b"one".to_vec()), (0xe0, Vec::new())]);
    assert_eq!(parsed.len, len);
}

#[test]
fn every_prefix_needs_more() {
    let bytes = with_tlvs(b"\xe0\0\x03one");
    for cut in 0..bytes.len() {
        assert_eq!(parse(&bytes[..cut], 536), Err(ParseError::NeedMore), "{cut}");
    }
}

#[test]
fn wrong_octets_are_named_as_soon_as_they_are_there() {
    assert_eq!(invalid(b"\r\n\r\n\0\r\nQUIX"), Invalid::Signature);
    assert_eq!(invalid(b"P"), Invalid::Signature);
    assert_eq!(invalid(&header(0x11, 0x11, &[0; 12])), Invalid::Version(1));
    assert_eq!(invalid(&header(0x31, 0x11, &[0; 12])), Invalid::Version(3));
    for command in 2..16 {
        assert_eq!(invalid(&header(0x20 | command, 0x11, &[0; 12])), Invalid::Command(command));
    }
    for family in 4..16 {
        assert_eq!(invalid(&header(0x21, family << 4 | 1, &[0; 12])), Invalid::Family(family));
    }
    for transport in 3..16 {
        assert_eq!(invalid(&header(0x21, 0x10 | transport, &[0; 12])), Invalid::Transport(transport));
    }
    assert_eq!(invalid(&header(0x21, 0x11, &[0; 11])), Invalid::Addresses(11));
    assert_eq!(invalid(&header(0x21, 0x21, &[0; 35])), Invalid::Addresses(35));
    assert_eq!(invalid(&header(0x21, 0x31, &[0; 215])), Invalid::Addresses(215));
}

#[test]
fn the_limit_is_that_of_the_whole_header() {
    let bytes = with_tlvs(&[]);
    assert!(parse(&bytes, 28).is_ok());
    let too_long = Err(ParseError::Invalid(Invalid::TooLong { len: 28, max: 27 }));
    assert_eq!(parse(&bytes, 27), too_long);
    assert_eq!(parse(&bytes[..16], 27), too_long);
    let local = header(0x20, 0x11, &[0; 4]);
    assert_eq!(parse(&local, 19), Err(ParseError::Invalid(Invalid::TooLong { len: 20, max: 19 })));
}

#[test]
fn tlvs_must_fill_the_header_exactly() {
    for tlvs in [&b"\xe0"[..], b"\xe0\0", b"\xe0\0\x01", b"\xe0\0\0\xe0", b"\xe0\xff\xffx", b"\xe0\0\x02ab\xe1\0\x09c"]
    {
        assert_eq!(invalid(&with_tlvs(tlvs)), Invalid::TlvBounds, "{tlvs:?}");
    }
}

#[test]
fn too_many_tlvs() {
    let of = |count| with_tlvs(&b"\xe0\0\0".repeat(count));
    assert_eq!(parse(&of(MAX_TLVS), 65551).map(|parsed| parsed.tlvs.len()), Ok(MAX_TLVS));
    assert_eq!(invalid(&of(MAX_TLVS + 1)), Invalid::TooManyTlvs);
    assert_eq!(invalid(&of(21_841)), Invalid::TooManyTlvs);
}

#[test]
fn local_skips_its_payload() {
    let local = |family, payload: &[u8]| parse(&header(0x20, family, payload), 536).expect("valid");
    for (family, payload) in [
        (0x00, &b""[..]),
        (0x00, b"anything"),
        (0x11, b""),
        (0x11, b"short"),
        (0x11, &[1; 12]),
        (0x11, &[0xff; 19]),
        (0x21, &[0; 36]),
    ] {
        let parsed = local(family, payload);
        assert_eq!((parsed.command, parsed.source, parsed.destination), (Command::Local, None, None));
        assert_eq!(parsed.len, 16 + payload.len());
        assert!(parsed.tlvs.is_empty());
    }
    let mut payload = vec![0; 12];
    payload.extend_from_slice(b"\xe0\0\x01x");
    assert_eq!(local(0x11, &payload).tlvs, [(0xe0, b"x".to_vec())]);
    assert_eq!(parse(&header(0x20, 0x11, b"short")[..18], 536), Err(ParseError::NeedMore));
}

#[test]
fn families_without_a_socket_address() {
    for (family, payload) in [(0x00, vec![]), (0x01, vec![9; 20]), (0x31, vec![0; 216])] {
        let parsed = parse(&header(0x21, family, &payload), 536).expect("valid");
        assert_eq!((parsed.command, parsed.source, parsed.destination), (Command::Proxy, None, None));
        assert_eq!(parsed.len, 16 + payload.len());
    }
}

#[test]
fn crc32c_of_the_check_string() {
    // The check value of CRC-32/ISCSI in the catalogue of parametrised CRC algorithms.
    assert_eq!(crc32c(b"123456789".iter().copied()), 0xe306_9283);
}

#[test]
fn checksums_are_checked() {
    let mut bytes = with_tlvs(b"\xe0\0\x01x\x03\0\x04\0\0\0\0\xe1\0\0");
    let at = bytes.len() - 7;
    let crc = crc32c(bytes.iter().copied());
    bytes[at..at + 4].copy_from_slice(&crc.to_be_bytes());
    assert_eq!(parse(&bytes, 536).map(|parsed| parsed.tlvs.len()), Ok(3));
    for index in 16..bytes.len() - 3 {
        // Types and lengths of TLVs aside, which break the structure instead.
        if !(28..31).contains(&index) && !(32..35).contains(&index) {
            let mut wrong = bytes.clone();
            wrong[index] ^= 1;
            assert_eq!(invalid(&wrong), Invalid::Checksum, "{index}");
        }
    }
    assert_eq!(invalid(&with_tlvs(b"\x03\0\x03abc")), Invalid::Checksum);
    assert_eq!(invalid(&with_tlvs(&b"\x03\0\x04\0\0\0\0".repeat(2))), Invalid::Checksum);
}

#[test]
fn a_unique_id_has_128_octets_at_most() {
    let of = |length: u8| {
        let mut tlv = vec![0x05, 0, length];
        tlv.extend(std::iter::repeat_n(b'x', usize::from(length)));
        with_tlvs(&tlv)
    };
    assert!(parse(&of(128), 536).is_ok());
    assert_eq!(invalid(&of(129)), Invalid::UniqueId(129));
}

proptest! {
    #[test]
    fn what_was_encoded_reads_back_and_no_prefix_does(
        source in any::<SocketAddr>(),
        destination in any::<SocketAddr>(),
        tlvs in vec((0xe0u8..0xf0, vec(any::<u8>(), 0..30)), 0..5),
        after in vec(any::<u8>(), 0..20),
    ) {
        let mut raw = Vec::new();
        for (kind, value) in &tlvs {
            raw.extend_from_slice(&[*kind, 0, u8::try_from(value.len()).expect("short")]);
            raw.extend_from_slice(value);
        }
        let mut bytes = Vec::new();
        let len = HeaderWriter::proxy(&mut bytes, source, destination).raw_tlvs(&raw).finish(536).expect("fits");
        bytes.extend_from_slice(&after);
        let parsed = parse(&bytes, 536).expect("valid");
        prop_assert_eq!(parsed.source.map(|s| (s.ip().to_canonical(), s.port())), Some((source.ip().to_canonical(), source.port())));
        prop_assert_eq!(parsed.destination.map(|d| d.port()), Some(destination.port()));
        prop_assert_eq!(&parsed.tlvs, &tlvs);
        prop_assert_eq!(parsed.len, len);
        for cut in 0..len {
            prop_assert_eq!(parse(&bytes[..cut], 536), Err(ParseError::NeedMore));
        }
    }

    #[test]
    fn arbitrary_bytes(bytes in vec(any::<u8>(), 0..80), signed in any::<bool>()) {
        let mut input = if signed { SIGNATURE.to_vec() } else { Vec::new() };
        input.extend_from_slice(&bytes);
        crate::fuzzing::proxy_in(&input);
    }

    /// Lines that are right, or nearly.
    #[test]
    fn arbitrary_lines(
        protocol in "TCP4 |TCP6 |UNKNOWN ?|[A-Z4 ]{0,6}",
        words in vec(prop_oneof![
            any::<std::net::Ipv4Addr>().prop_map(|ip| ip.to_string()),
            any::<std::net::Ipv6Addr>().prop_map(|ip| ip.to_string()),
            any::<u16>().prop_map(|port| port.to_string()),
            "[0-9a-f:.+ -]{0,8}",
        ], 0..6),
        end in "(\r\n|\n|\r|)",
        after in vec(any::<u8>(), 0..20),
    ) {
        let mut line = format!("PROXY {protocol}{}{end}", words.join(" ")).into_bytes();
        line.extend_from_slice(&after);
        crate::fuzzing::proxy_in(&line);
    }
}

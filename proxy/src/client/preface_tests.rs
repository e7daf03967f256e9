#![expect(clippy::expect_used, clippy::panic, reason = "tests panic")]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::proxy_protocol::encode::HeaderWriter;

const QUERY: &[u8] = b"\0\x1d\0\x01\x01\0\0\x01\0\0\0\0\0\0\x03www\x07example\0\0\x01\0\x01";

fn v2(tlvs: &[u8]) -> Vec<u8> {
    let mut header = Vec::new();
    let ends = ("192.0.2.1:4000".parse().expect("an address"), "198.51.100.2:53".parse().expect("an address"));
    HeaderWriter::proxy(&mut header, ends.0, ends.1).raw_tlvs(tlvs).finish(536).expect("fits");
    header
}

fn done(header: &[u8]) -> Introduced {
    match Preface::new(536).take(header) {
        Progress::Done(introduced) => introduced,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_header_and_two_queries_split_anywhere() {
    let tlvs = b"\xe0\0\x03one\xe1\0\0";
    for header in [v2(tlvs), b"PROXY TCP4 192.0.2.1 198.51.100.2 4000 53\r\n".to_vec()] {
        let all = [&header, QUERY, QUERY].concat();
        for cut in 0..=all.len() {
            let mut preface = Preface::new(536);
            let mut progress = preface.take(&all[..cut]);
            let mut behind = &all[cut..];
            if cut < header.len() {
                assert_eq!(progress, Progress::NeedMore, "{cut}");
                progress = preface.take(behind);
                behind = &[];
            }
            let Progress::Done(introduced) = progress else { panic!("{progress:?} at {cut}") };
            let ends = introduced.ends.expect("a header with addresses");
            assert_eq!((ends.0.to_string(), ends.1.to_string()), ("192.0.2.1:4000".into(), "198.51.100.2:53".into()));
            assert_eq!([&introduced.rest, behind].concat(), [QUERY, QUERY].concat(), "{cut}");
        }
    }
    assert_eq!(*done(&v2(tlvs)).tlvs, *tlvs);
}

#[test]
fn the_connection_s_own_addresses_stay() {
    let of = |version_command, family, payload: &[u8]| {
        let length = u16::try_from(payload.len()).expect("short").to_be_bytes();
        [&SIGNATURE[..], &[version_command, family], &length, payload, QUERY].concat()
    };
    let with_tlv = [&[9; 12][..], b"\xe0\0\x01x"].concat();
    for header in [
        of(0x20, 0x00, b""),
        of(0x20, 0x11, &with_tlv),
        of(0x20, 0x11, b"short"),
        of(0x21, 0x00, b"anything"),
        [b"PROXY UNKNOWN\r\n", QUERY].concat(),
        [b"PROXY UNKNOWN ::1 ::1 1 1\r\n", QUERY].concat(),
    ] {
        let introduced = done(&header);
        assert_eq!((introduced.ends, introduced.rest.as_slice()), (None, QUERY), "{header:02x?}");
        assert!(introduced.tlvs.is_empty(), "nothing of LOCAL's payload is passed on");
    }
}

#[test]
fn a_checksum_is_checked_and_not_kept() {
    let mut header = v2(b"\xe0\0\x01x\x03\0\x04\0\0\0\0\x04\0\x02ab");
    assert_eq!(Preface::new(536).take(&header), Progress::Refuse(Invalid::Checksum));
    // Of these 44 octets with the checksum taken as zero.
    let at = header.len() - 9;
    let checksum = crate::proxy_protocol::parse::crc32c(header.iter().copied());
    header[at..at + 4].copy_from_slice(&checksum.to_be_bytes());
    assert_eq!(*done(&header).tlvs, *b"\xe0\0\x01x");
}

#[test]
fn nothing_is_guessed() {
    for first in [QUERY, b"\0", b"GET / HTTP/1.0\r\n", b"\x16\x03\x01"] {
        assert_eq!(Preface::new(536).take(first), Progress::Refuse(Invalid::Signature), "{first:02x?}");
    }
    let mut long = v2(&[]);
    long[14..16].copy_from_slice(&[0xff, 0xff]);
    assert_eq!(
        Preface::new(536).take(&long[..16]),
        Progress::Refuse(Invalid::TooLong { len: 65_551, max: 536 }),
        "before it has come"
    );
}

#[test]
fn headers_where_none_may_be_are_known() {
    assert!(is_header(&v2(&[])) && is_header(b"PROXY TCP4"));
    assert!(!is_header(&SIGNATURE[..11]) && !is_header(b"PROXY") && !is_header(QUERY) && !is_header(b""));
}

proptest! {
    /// Octet by octet or in any pieces: the same as all at once, and nothing gets lost.
    #[test]
    fn pieces_do_not_matter(
        header in prop_oneof![
            vec(any::<u8>(), 0..40).prop_map(|tail| [&SIGNATURE[..], &[0x21, 0x11, 0, 20], &tail].concat()),
            vec((0xe0u8..0xf0, vec(any::<u8>(), 0..20)), 0..4).prop_map(|tlvs| {
                let mut raw = Vec::new();
                tlvs.iter().for_each(|(kind, value)| tlv::push(&mut raw, *kind, value));
                [v2(&raw), QUERY.to_vec()].concat()
            }),
            "PROXY (TCP4|TCP6|UNKNOWN) [0-9.: ]{0,30}\r\n.{0,9}".prop_map(String::into_bytes),
            vec(any::<u8>(), 0..40),
        ],
        sizes in vec(1..9usize, 1..100),
    ) {
        let whole = Preface::new(536).take(&header);
        let mut preface = Preface::new(536);
        let (mut rest, mut sizes, mut progress) = (header.as_slice(), sizes.iter().cycle(), Progress::NeedMore);
        while progress == Progress::NeedMore && !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(*sizes.next().unwrap_or(&1)));
            progress = preface.take(piece);
            rest = after;
        }
        match (whole, progress) {
            (Progress::Done(whole), Progress::Done(pieces)) => {
                prop_assert_eq!((whole.ends, whole.tlvs), (pieces.ends, pieces.tlvs));
                prop_assert_eq!(whole.rest, [pieces.rest.as_slice(), rest].concat());
            }
            (Progress::Refuse(_), Progress::Refuse(_)) => {}
            (whole, pieces) => prop_assert_eq!(whole, pieces),
        }
    }
}

/// Record, message and version of a ClientHello of TLS, and the first octets of its random.
fn hello(version: [u8; 2]) -> Vec<u8> {
    [&[22, 3, 1, 0, 50, 1, 0, 0, 46][..], &version, &[7; 4]].concat()
}

#[test]
fn what_a_client_begins_with_is_told_as_soon_as_it_can_be() {
    let v1 = b"PROXY TCP4 192.0.2.1 198.51.100.2 4000 53\r\n".to_vec();
    let cases = [
        (v2(&[]), SIGNATURE.len(), Opening::Header),
        (v1, parse_v1::PREFIX.len(), Opening::Header),
        (hello([3, 0]), 11, Opening::OldHello),
        (hello([3, 1]), 11, Opening::OldHello),
        (hello([3, 2]), 11, Opening::OldHello),
        (hello([3, 3]), 11, Opening::Other),
        (QUERY.to_vec(), 1, Opening::Other),
        // Not the beginning of a header after all.
        (b"POST / HTTP/1.1\r\n".to_vec(), 2, Opening::Other),
        (b"\r\n\r\n\0\r\nQUIT?".to_vec(), 12, Opening::Other),
        // Another message than a hello, as the first one of a handshake.
        ([22, 3, 1, 0, 50, 2, 0, 0, 46, 3, 1].to_vec(), 11, Opening::Other),
    ];
    for (bytes, enough, expected) in cases {
        for end in 0..=bytes.len() {
            let told = (end >= enough).then_some(expected);
            assert_eq!(opening(&bytes[..end]), told, "{end} octets of {bytes:02x?}");
        }
    }
}

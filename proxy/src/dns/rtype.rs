//! Names of record types, as the IANA registry "DNS Parameters" has them.

use std::io::Write as _;

/// QTYPE of an incremental zone transfer (RFC 1995).
pub const IXFR: u16 = 251;
/// QTYPE of a full zone transfer (RFC 5936).
pub const AXFR: u16 = 252;

/// Sorted by number: [`mnemonic`] searches it by halves.
const NAMES: &[(u16, &str)] = &[
    (1, "A"),
    (2, "NS"),
    (5, "CNAME"),
    (6, "SOA"),
    (10, "NULL"),
    (12, "PTR"),
    (13, "HINFO"),
    (15, "MX"),
    (16, "TXT"),
    (17, "RP"),
    (18, "AFSDB"),
    (24, "SIG"),
    (25, "KEY"),
    (28, "AAAA"),
    (29, "LOC"),
    (33, "SRV"),
    (35, "NAPTR"),
    (36, "KX"),
    (37, "CERT"),
    (39, "DNAME"),
    (41, "OPT"),
    (42, "APL"),
    (43, "DS"),
    (44, "SSHFP"),
    (45, "IPSECKEY"),
    (46, "RRSIG"),
    (47, "NSEC"),
    (48, "DNSKEY"),
    (49, "DHCID"),
    (50, "NSEC3"),
    (51, "NSEC3PARAM"),
    (52, "TLSA"),
    (53, "SMIMEA"),
    (55, "HIP"),
    (59, "CDS"),
    (60, "CDNSKEY"),
    (61, "OPENPGPKEY"),
    (62, "CSYNC"),
    (63, "ZONEMD"),
    (64, "SVCB"),
    (65, "HTTPS"),
    (99, "SPF"),
    (108, "EUI48"),
    (109, "EUI64"),
    (249, "TKEY"),
    (250, "TSIG"),
    (251, "IXFR"),
    (252, "AXFR"),
    (255, "ANY"),
    (256, "URI"),
    (257, "CAA"),
];

/// The mnemonic of a type; `None` for a type without one here.
pub fn mnemonic(rtype: u16) -> Option<&'static str> {
    let at = NAMES.binary_search_by_key(&rtype, |(number, _)| *number).ok()?;
    NAMES.get(at).map(|(_, name)| *name)
}

/// The number of a type given by mnemonic or as `TYPE65` (RFC 3597, section 5), in either case.
pub fn parse(text: &str) -> Option<u16> {
    if let Some((number, _)) = NAMES.iter().find(|(_, name)| name.eq_ignore_ascii_case(text)) {
        return Some(*number);
    }
    let (head, digits) = text.split_at_checked(4)?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    if head.eq_ignore_ascii_case("TYPE") && plain { digits.parse().ok() } else { None }
}

/// Appends the mnemonic, or `TYPE65535` for a type without one (RFC 3597, section 5).
pub fn write(rtype: u16, out: &mut Vec<u8>) {
    match mnemonic(rtype) {
        Some(name) => out.extend_from_slice(name.as_bytes()),
        // Writing to a Vec cannot fail.
        None => drop(write!(out, "TYPE{rtype}")),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use super::*;
    use hickory_proto::rr::RecordType;

    #[test]
    fn every_type_reads_back() {
        for rtype in 0..=u16::MAX {
            let mut text = Vec::new();
            write(rtype, &mut text);
            assert_eq!(parse(std::str::from_utf8(&text).expect("ASCII")), Some(rtype));
        }
    }

    #[test]
    fn the_table_is_sorted_and_agrees_with_hickory() {
        assert!(NAMES.is_sorted_by(|a, b| a.0 < b.0));
        let mut both = 0;
        for (number, name) in NAMES {
            let theirs = RecordType::from(*number);
            if !matches!(theirs, RecordType::Unknown(_)) {
                assert_eq!(theirs.to_string(), *name);
                both += 1;
            }
        }
        assert!(both > 30, "only {both} types are known to both");
    }

    #[test]
    fn what_is_no_type_is_refused() {
        for text in ["", "TYPE", "TYPE65536", "TYPE-1", "TYPE+1", "WHAT", "TXTT", "TYP\u{e9}1"] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse("aaaa"), Some(28));
        assert_eq!(parse("type65280"), Some(65280));
    }
}

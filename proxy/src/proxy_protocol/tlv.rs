//! TLVs as a header holds them: type, two octets of length, value; one after the other.

use super::{TLV_OVERHEAD, tlv_type};

/// Appends a TLV. A value above 65,535 octets is cut off; none that was received has more.
pub fn push(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
    out.push(kind);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(value.get(..usize::from(length)).unwrap_or_default());
}

/// Type and value of each TLV. Ends before one that is not whole.
pub fn iter(tlvs: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = tlvs;
    std::iter::from_fn(move || {
        let [kind, high, low, after @ ..] = rest else { return None };
        let (value, after) = after.split_at_checked(usize::from(u16::from_be_bytes([*high, *low])))?;
        rest = after;
        Some((*kind, value))
    })
}

/// The TLVs of a client's header that may be passed on, in order. CRC32C is of that header and true of no other. A
/// UNIQUE_ID names the client's connection: `per_connection` says whether the header that it is passed on with does, too.
pub fn passable(tlvs: &[u8], per_connection: bool) -> impl Iterator<Item = &[u8]> {
    let mut at = 0;
    iter(tlvs).filter_map(move |(kind, value)| {
        let start = at;
        at += TLV_OVERHEAD + value.len();
        let passed = match kind {
            tlv_type::CRC32C | tlv_type::NOOP => false,
            tlv_type::UNIQUE_ID => per_connection,
            _ => true,
        };
        tlvs.get(start..at).filter(|_| passed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_pushed_is_walked() {
        let mut tlvs = Vec::new();
        push(&mut tlvs, 0xe0, b"one");
        push(&mut tlvs, 0xe0, b"");
        push(&mut tlvs, 0x05, &[7; 300]);
        let walked: Vec<_> = iter(&tlvs).collect();
        assert_eq!(walked, [(0xe0, &b"one"[..]), (0xe0, b""), (0x05, &[7; 300])]);
        for cut in 0..tlvs.len() {
            assert!(iter(&tlvs[..cut]).count() < 3, "{cut}");
        }
    }

    #[test]
    fn a_checksum_is_never_passed_on_and_a_unique_id_only_with_its_connection() {
        let mut tlvs = Vec::new();
        for kind in [0xe1, tlv_type::CRC32C, tlv_type::UNIQUE_ID, tlv_type::NOOP, 0xe0] {
            push(&mut tlvs, kind, b"x");
        }
        let kinds = |per_connection| -> Vec<u8> { passable(&tlvs, per_connection).map(|tlv| tlv[0]).collect() };
        assert_eq!(kinds(true), [0xe1, tlv_type::UNIQUE_ID, 0xe0]);
        assert_eq!(kinds(false), [0xe1, 0xe0]);
        assert!(passable(&tlvs, false).all(|tlv| tlv[1..] == *b"\0\x01x"));
    }
}

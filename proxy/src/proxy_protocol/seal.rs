//! What is added to a header when a connection is opened with it: all that belongs to this connection and not to the
//! query, and so takes no part in the question who may share the connection.

use super::crc32c::crc32c;
use super::template::TlvSet;
use super::{FIXED_LEN, TLV_OVERHEAD, tlv_type};

/// Octets of an identifier: a UUID as text.
pub const ID_LEN: usize = 36;

/// Octets of the value of CRC32C.
const CRC_LEN: usize = 4;

/// What a pool's headers get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seal {
    /// A TLV UNIQUE_ID (section 2.2.5).
    pub unique_id: bool,
    /// A TLV CRC32C, the last one (section 2.2.3).
    pub crc32c: bool,
}

impl Seal {
    /// Octets that it adds.
    pub fn len(self) -> usize {
        let unique_id = if self.unique_id { TLV_OVERHEAD + ID_LEN } else { 0 };
        unique_id + if self.crc32c { TLV_OVERHEAD + CRC_LEN } else { 0 }
    }

    /// Whether a header stays as it is. One with `{unique_id}` in its TLVs does not.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Completes the header that `out` holds from `start` on, whose last TLVs are those of `set`, for a connection of
    /// this identifier. The header has room for [`Self::len`] more octets: its limit was chosen so.
    pub fn apply(self, out: &mut Vec<u8>, start: usize, set: &TlvSet, id: &[u8; ID_LEN]) {
        set.fill_in_ids(out, start, id);
        if self.unique_id {
            out.extend_from_slice(&[tlv_type::UNIQUE_ID, 0, ID_LEN as u8]);
            out.extend_from_slice(id);
        }
        if self.crc32c {
            out.extend_from_slice(&[tlv_type::CRC32C, 0, CRC_LEN as u8, 0, 0, 0, 0]);
        }
        let Some(header) = out.get_mut(start..) else { return };
        let length = u16::try_from(header.len().saturating_sub(FIXED_LEN)).unwrap_or(u16::MAX);
        if let Some(field) = header.get_mut(FIXED_LEN - 2..FIXED_LEN) {
            field.copy_from_slice(&length.to_be_bytes());
        }
        if self.crc32c {
            let checksum = crc32c(header.iter().copied());
            if let Some(value) = header.last_chunk_mut::<CRC_LEN>() {
                *value = checksum.to_be_bytes();
            }
        }
    }
}

/// An identifier from random bits: a UUID of version 4 as text.
pub fn identifier(random: u128) -> [u8; ID_LEN] {
    let mut text = [0; ID_LEN];
    uuid::Builder::from_random_bytes(random.to_be_bytes()).into_uuid().hyphenated().encode_lower(&mut text);
    text
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use crate::proxy_protocol::IPV6_ADDRESSES;
    use crate::proxy_protocol::encode::HeaderWriter;
    use crate::proxy_protocol::parse::parse;
    use crate::proxy_protocol::template::Context;
    use proptest::prelude::*;

    fn header(set: &TlvSet, incoming: &[u8]) -> Vec<u8> {
        let mut out = b"before".to_vec();
        let client = "192.0.2.1:4000".parse().unwrap();
        let context = Context { client, listener: "dns", question: None, incoming: &[], sni: "", random: 0 };
        let writer = HeaderWriter::proxy(&mut out, client, "[2001:db8::1]:53".parse().unwrap());
        writer.raw_tlvs(incoming).tlvs(set, &context).finish(512).unwrap();
        out
    }

    fn set(values: &[&str]) -> TlvSet {
        let mut set = TlvSet::default();
        for (kind, value) in (0xe0..).zip(values) {
            set.push(kind, value.parse().unwrap()).unwrap();
        }
        set
    }

    #[test]
    fn identifiers_are_filled_in_where_the_set_has_them_and_nowhere_else() {
        let set = set(&["x", "{unique_id}", "{listener}", "{unique_id}"]);
        let mut out = header(&set, b"\xe1\0\x02in");
        let id = identifier(7);
        Seal { unique_id: true, crc32c: true }.apply(&mut out, 6, &set, &id);
        assert_eq!(&out[..6], b"before");
        let parsed = parse(&out[6..], 512).unwrap();
        assert_eq!(parsed.len, out.len() - 6, "and the checksum is right, or it would not be read");
        let tlvs: Vec<(u8, &[u8])> = parsed.tlvs.iter().map(|(kind, value)| (*kind, value.as_slice())).collect();
        assert_eq!(
            tlvs[..6],
            [(0xe1, &b"in"[..]), (0xe0, b"x"), (0xe1, &id), (0xe2, b"dns"), (0xe3, &id), (0x05, &id)]
        );
        assert_eq!((tlvs[6].0, tlvs[6].1.len()), (0x03, 4));
        assert_eq!(id, *b"00000000-0000-4000-8000-000000000007");
    }

    proptest! {
        /// Whatever the header, it is valid and as much longer as was said; and a wrong bit in the addresses is found.
        #[test]
        fn sealed_headers_are_read(unique_id: bool, crc32c: bool, value in "[a-z]{0,60}", at: usize, bit in 0..8u8) {
            let set = set(&[&value, "{unique_id}"]);
            let mut out = header(&set, &[]);
            let seal = Seal { unique_id, crc32c };
            let before = out.len();
            seal.apply(&mut out, 6, &set, &identifier(u128::MAX));
            prop_assert_eq!(out.len(), before + seal.len());
            let parsed = parse(&out[6..], 512);
            prop_assert_eq!(parsed.map(|parsed| parsed.len), Ok(out.len() - 6));
            if crc32c {
                let at = 6 + FIXED_LEN + at % IPV6_ADDRESSES;
                out[at] ^= 1 << bit;
                prop_assert!(parse(&out[6..], 512).is_err());
            }
        }
    }
}

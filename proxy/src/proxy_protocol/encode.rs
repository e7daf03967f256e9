//! The encoder for PROXY v2 headers, into a buffer of the caller that is used again and again.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use thiserror::Error;

use super::template::{Context, TlvSet};
use super::{FIXED_LEN, MAX_LEN, SIGNATURE};

const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
const UNSPEC: u8 = 0x00;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// Why a header was not written. The buffer is then as it was before.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum EncodeError {
    /// Longer than the configured maximum.
    #[error("a PROXY header of {len} octets is longer than the {max} allowed")]
    TooLong {
        /// Octets of the whole header.
        len: usize,
        /// The configured maximum, or the protocol's own.
        max: usize,
    },
}

/// A header being written at the end of a buffer. Only [`HeaderWriter::finish`] makes it a valid one.
#[derive(Debug)]
#[must_use = "the length is written by finish()"]
pub struct HeaderWriter<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> HeaderWriter<'a> {
    /// A PROXY command for TCP from `source` to `destination`. If one of them is IPv4 and the other IPv6, the IPv4
    /// address is mapped into IPv6 (RFC 4291, section 2.5.5.2), since a header has one family.
    pub fn proxy(out: &'a mut Vec<u8>, source: SocketAddr, destination: SocketAddr) -> Self {
        match (source.ip(), destination.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let writer = Self::start(out, PROXY, TCP_OVER_IPV4);
                writer.out.extend_from_slice(&from.octets());
                writer.out.extend_from_slice(&to.octets());
                writer.ports(source, destination)
            }
            (from, to) => {
                let writer = Self::start(out, PROXY, TCP_OVER_IPV6);
                writer.out.extend_from_slice(&mapped(from).octets());
                writer.out.extend_from_slice(&mapped(to).octets());
                writer.ports(source, destination)
            }
        }
    }

    /// A LOCAL command: the connection is the forwarder's own (health checks). A receiver may ignore its TLVs.
    pub fn local(out: &'a mut Vec<u8>) -> Self {
        Self::start(out, LOCAL, UNSPEC)
    }

    fn start(out: &'a mut Vec<u8>, command: u8, family: u8) -> Self {
        let start = out.len();
        out.extend_from_slice(&SIGNATURE);
        out.extend_from_slice(&[command, family, 0, 0]);
        Self { out, start }
    }

    fn ports(self, source: SocketAddr, destination: SocketAddr) -> Self {
        self.out.extend_from_slice(&source.port().to_be_bytes());
        self.out.extend_from_slice(&destination.port().to_be_bytes());
        self
    }

    /// Appends TLVs that are encoded already, type and length included.
    pub fn raw_tlvs(self, tlvs: &[u8]) -> Self {
        self.out.extend_from_slice(tlvs);
        self
    }

    /// Appends the TLVs of a pool, rendered for one query.
    pub fn tlvs(self, set: &TlvSet, context: &Context<'_>) -> Self {
        set.render(context, self.out);
        self
    }

    /// Writes the length. Returns the octets of the whole header.
    ///
    /// # Errors
    ///
    /// If the header has more than `max` octets, or more than the protocol can express. Nothing is written then.
    pub fn finish(self, max: usize) -> Result<usize, EncodeError> {
        let len = self.out.len() - self.start;
        let max = max.min(MAX_LEN);
        let length = len.checked_sub(FIXED_LEN).and_then(|length| u16::try_from(length).ok());
        let at = self.start + FIXED_LEN - 2..self.start + FIXED_LEN;
        match (length, self.out.get_mut(at)) {
            (Some(length), Some(field)) if len <= max => {
                field.copy_from_slice(&length.to_be_bytes());
                Ok(len)
            }
            _ => {
                self.out.truncate(self.start);
                Err(EncodeError::TooLong { len, max })
            }
        }
    }
}

fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn ipv4_as_in_the_specification() {
        let mut out = b"before".to_vec();
        let len = HeaderWriter::proxy(&mut out, addr("192.0.2.1:4000"), addr("198.51.100.2:53"))
            .raw_tlvs(&[0xe0, 0, 1, b'x'])
            .finish(512);
        assert_eq!(len, Ok(32));
        assert_eq!(
            out,
            b"before\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x10\xc0\0\x02\x01\xc6\x33\x64\x02\x0f\xa0\0\x35\xe0\0\x01x"
        );
    }

    #[test]
    fn mixed_families_become_ipv6() {
        let mut out = Vec::new();
        HeaderWriter::proxy(&mut out, addr("192.0.2.1:1"), addr("[2001:db8::1]:53")).finish(512).expect("fits");
        assert_eq!(out[13], TCP_OVER_IPV6);
        assert_eq!(out[16..32], *b"\0\0\0\0\0\0\0\0\0\0\xff\xff\xc0\0\x02\x01");
        assert_eq!(out.len(), 52);
    }

    #[test]
    fn local_has_no_addresses() {
        let mut out = Vec::new();
        assert_eq!(HeaderWriter::local(&mut out).finish(512), Ok(16));
        assert_eq!(out, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    }

    #[test]
    fn too_long_leaves_the_buffer_alone() {
        let mut out = b"before".to_vec();
        let (a, b) = (addr("192.0.2.1:1"), addr("192.0.2.2:2"));
        let exact = HeaderWriter::proxy(&mut out, a, b).raw_tlvs(&[0; 4]).finish(32);
        assert_eq!(exact, Ok(32));
        out.truncate(6);
        let over = HeaderWriter::proxy(&mut out, a, b).raw_tlvs(&[0; 5]).finish(32);
        assert_eq!(over, Err(EncodeError::TooLong { len: 33, max: 32 }));
        let wire = HeaderWriter::local(&mut out).raw_tlvs(&vec![0; 65536]).finish(usize::MAX);
        assert_eq!(wire, Err(EncodeError::TooLong { len: 65552, max: MAX_LEN }));
        assert_eq!(out, b"before");
        assert_eq!(HeaderWriter::local(&mut out).raw_tlvs(&vec![0; 65535]).finish(usize::MAX), Ok(MAX_LEN));
    }

    #[test]
    fn a_buffer_with_room_is_not_reallocated() {
        let mut out = Vec::with_capacity(64);
        let place = out.as_ptr();
        for _ in 0..100 {
            out.clear();
            HeaderWriter::proxy(&mut out, addr("[::1]:1"), addr("[::1]:2"))
                .raw_tlvs(&[0; 12])
                .finish(64)
                .expect("fits");
        }
        assert_eq!((out.len(), out.as_ptr()), (64, place));
    }

    proptest! {
        #[test]
        fn the_same_octets_as_ppp(
            source in any::<SocketAddr>(),
            destination in any::<SocketAddr>(),
            tlvs in vec((any::<u8>(), vec(any::<u8>(), 0..40)), 0..6),
        ) {
            crate::fuzzing::header_against_ppp(source, destination, &tlvs);
        }
    }
}

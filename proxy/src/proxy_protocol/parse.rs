//! Reading PROXY headers: version 2 by the `ppp` crate and stricter than it where the specification is, version 1 by
//! [`parse_v1`].
//!
//! Incremental: call again with more bytes until the answer is something other than [`ParseError::NeedMore`]. Whether
//! the peer is allowed to send a header, and how long it may take, is the caller's business.

use std::net::SocketAddr;

use ppp::v2::{Addresses, Command as PppCommand, Header, ParseError as PppError, TypeLengthValues};
use thiserror::Error;

pub(crate) use super::crc32c::crc32c;
use super::parse_v1::parse_v1;
use super::{FIXED_LEN, tlv_type};

/// TLVs in one header. A header of 64 KiB could hold 21,845 empty ones; nobody has a use for so many.
pub const MAX_TLVS: usize = 256;

/// Octets of the longest UNIQUE_ID (section 2.2.5).
const MAX_UNIQUE_ID: usize = 128;

/// What the sender says of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The sender's own connection, a health check for instance: the real endpoints are the true ones.
    Local,
    /// A connection on behalf of the endpoints in the header.
    Proxy,
}

/// A whole, valid header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// LOCAL or PROXY; version 1 has PROXY only.
    pub command: Command,
    /// Where the connection comes from; `None` for LOCAL, for the families UNSPEC and UNIX, and for UNKNOWN of
    /// version 1.
    pub source: Option<SocketAddr>,
    /// Where it went to; `None` when `source` is.
    pub destination: Option<SocketAddr>,
    /// Type and value of each TLV in order, repeated types included, NOOP left out. Empty for the family UNSPEC,
    /// where nothing says where TLVs would begin.
    pub tlvs: Vec<(u8, Vec<u8>)>,
    /// Octets of the header. What follows belongs to the connection.
    pub len: usize,
}

/// Why there is no header yet, or never will be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ParseError {
    /// All is well so far, but the header is not complete.
    #[error("the PROXY header is not complete")]
    NeedMore,
    /// The connection must be closed (section 2: "must not try to guess").
    #[error("not a valid PROXY header: {0}")]
    Invalid(Invalid),
}

impl From<Invalid> for ParseError {
    fn from(invalid: Invalid) -> Self {
        Self::Invalid(invalid)
    }
}

/// What is wrong with a header.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Invalid {
    /// The first octets are not those of a header.
    #[error("no signature")]
    Signature,
    /// A version other than 2, in the high four bits of octet 13.
    #[error("version {0}")]
    Version(u8),
    /// A command other than LOCAL and PROXY, in the low four bits of octet 13.
    #[error("command {0}")]
    Command(u8),
    /// An address family above 3, in the high four bits of octet 14.
    #[error("address family {0}")]
    Family(u8),
    /// A transport above 2, in the low four bits of octet 14.
    #[error("transport {0}")]
    Transport(u8),
    /// The header is longer than the receiver takes.
    #[error("{len} octets, {max} are allowed")]
    TooLong {
        /// Octets that the header announces for itself.
        len: usize,
        /// The receiver's limit.
        max: usize,
    },
    /// The header ends inside its addresses.
    #[error("{0} octets of payload cannot hold the addresses")]
    Addresses(usize),
    /// The last TLV does not end where the header does.
    #[error("a TLV does not end inside the header")]
    TlvBounds,
    /// More than [`MAX_TLVS`].
    #[error("more than {MAX_TLVS} TLVs")]
    TooManyTlvs,
    /// A CRC32C that is not four octets, is there twice, or is not that of the header (section 2.2.3).
    #[error("a wrong checksum")]
    Checksum,
    /// A line of version 1 that is none.
    #[error("version 1: {0}")]
    Line(&'static str),
    /// A UNIQUE_ID above 128 octets.
    #[error("a UNIQUE_ID of {0} octets, 128 are allowed")]
    UniqueId(usize),
}

/// Reads the header of version 1 or 2 that `bytes` begins with, of at most `max` octets.
///
/// # Errors
///
/// See [`parse`].
pub fn parse_any(bytes: &[u8], max: usize) -> Result<Parsed, ParseError> {
    match bytes.first() {
        Some(b'P') => parse_v1(bytes, max),
        _ => parse(bytes, max),
    }
}

/// Reads the header of version 2 that `bytes` begins with, of at most `max` octets.
///
/// # Errors
///
/// [`ParseError::NeedMore`] while `bytes` is a proper beginning of a header, else [`ParseError::Invalid`], as early as
/// it can be known.
pub fn parse(bytes: &[u8], max: usize) -> Result<Parsed, ParseError> {
    if let Some([high, low]) = bytes.get(FIXED_LEN - 2..).and_then(<[u8]>::first_chunk) {
        let len = FIXED_LEN + usize::from(u16::from_be_bytes([*high, *low]));
        // `ppp` says first what is wrong with the octets before the length.
        if len > max && matches!(Header::try_from(bytes), Ok(_) | Err(PppError::Partial(..))) {
            return Err(Invalid::TooLong { len, max }.into());
        }
    }
    let header = match Header::try_from(bytes) {
        Ok(header) => header,
        Err(PppError::InvalidAddresses(..)) if is_local(bytes) => return parse_short_local(bytes, max),
        Err(error) => return Err(translate(error)),
    };
    let tlvs = match header.command {
        PppCommand::Proxy => tlvs(&header)?,
        // The payload of LOCAL is to be skipped (section 2.2), so nothing in it can be wrong.
        PppCommand::Local => tlvs(&header).unwrap_or_default(),
    };
    let (source, destination) = match (header.command, header.addresses) {
        (PppCommand::Proxy, Addresses::IPv4(ip)) => (
            Some((ip.source_address, ip.source_port).into()),
            Some((ip.destination_address, ip.destination_port).into()),
        ),
        (PppCommand::Proxy, Addresses::IPv6(ip)) => (
            Some((ip.source_address, ip.source_port).into()),
            Some((ip.destination_address, ip.destination_port).into()),
        ),
        _ => (None, None),
    };
    let command = match header.command {
        PppCommand::Local => Command::Local,
        PppCommand::Proxy => Command::Proxy,
    };
    Ok(Parsed { command, source, destination, tlvs, len: header.len() })
}

fn is_local(bytes: &[u8]) -> bool {
    bytes.get(12).is_some_and(|octet| octet & 0x0f == 0)
}

/// LOCAL with a payload that is too short for the addresses of its family. The payload is skipped unread, whatever
/// it is (section 2.2: "the receiver must accept this connection as valid and must use the real connection endpoints").
fn parse_short_local(bytes: &[u8], max: usize) -> Result<Parsed, ParseError> {
    let length = bytes.get(FIXED_LEN - 2..).and_then(<[u8]>::first_chunk::<2>).ok_or(ParseError::NeedMore)?;
    let len = FIXED_LEN + usize::from(u16::from_be_bytes(*length));
    if len > max {
        return Err(Invalid::TooLong { len, max }.into());
    }
    if bytes.len() < len {
        return Err(ParseError::NeedMore);
    }
    Ok(Parsed { command: Command::Local, source: None, destination: None, tlvs: Vec::new(), len })
}

/// All TLVs of the header, checked to its end: `ppp` would report a broken one only on reaching it.
fn tlvs(header: &Header<'_>) -> Result<Vec<(u8, Vec<u8>)>, Invalid> {
    let mut tlvs = Vec::new();
    let mut checksum = None;
    for (count, tlv) in TypeLengthValues::from(header.tlv_bytes()).enumerate() {
        let tlv = tlv.map_err(|_| Invalid::TlvBounds)?;
        if count == MAX_TLVS {
            return Err(Invalid::TooManyTlvs);
        }
        match tlv.kind {
            tlv_type::NOOP => continue,
            tlv_type::CRC32C => {
                let value = tlv.value.as_array::<4>().ok_or(Invalid::Checksum)?;
                if checksum.replace(u32::from_be_bytes(*value)).is_some() {
                    return Err(Invalid::Checksum);
                }
            }
            tlv_type::UNIQUE_ID if tlv.len() > MAX_UNIQUE_ID => return Err(Invalid::UniqueId(tlv.len())),
            _ => {}
        }
        tlvs.push((tlv.kind, tlv.value.into_owned()));
    }
    match checksum {
        Some(sent) if sent != checksum_of(header) => Err(Invalid::Checksum),
        _ => Ok(tlvs),
    }
}

/// CRC32C of the header with the value of its CRC32C TLV taken as zero.
fn checksum_of(header: &Header<'_>) -> u32 {
    let bytes = header.as_bytes();
    let mut at = bytes.len() - header.tlv_bytes().len();
    let mut zeroed = 0..0;
    for tlv in header.tlvs().flatten() {
        let value = at + super::TLV_OVERHEAD;
        if tlv.kind == tlv_type::CRC32C {
            zeroed = value..value + tlv.len();
        }
        at = value + tlv.len();
    }
    let octets = bytes.iter().enumerate().map(|(index, octet)| if zeroed.contains(&index) { 0 } else { *octet });
    crc32c(octets)
}

fn translate(error: PppError) -> ParseError {
    match error {
        PppError::Incomplete(_) | PppError::Partial(..) => return ParseError::NeedMore,
        PppError::Prefix => Invalid::Signature,
        PppError::Version(bits) => Invalid::Version(bits >> 4),
        PppError::Command(bits) => Invalid::Command(bits),
        PppError::AddressFamily(bits) => Invalid::Family(bits >> 4),
        PppError::Protocol(bits) => Invalid::Transport(bits),
        PppError::InvalidAddresses(length, _) => Invalid::Addresses(length),
        PppError::InvalidTLV(..) | PppError::Leftovers(_) => Invalid::TlvBounds,
    }
    .into()
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;

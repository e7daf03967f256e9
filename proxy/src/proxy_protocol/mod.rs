//! PROXY protocol, as HAProxy's `proxy-protocol.txt` defines it: version 2 (sections 2 and 2.2) in both directions,
//! version 1 (section 2.1) from clients.
//!
//! [`encode`] writes the header that opens a backend connection, with the endpoints that [`identity`] chooses and
//! the TLVs that [`template`] renders, and that [`seal`] completes for the connection: the hot path, without allocation once the caller's buffer is large enough.
//! [`parse`] reads headers of version 2, with the `ppp` crate, and [`parse_v1`] those of version 1. [`tlv`] walks TLVs
//! as they were received.

pub mod client_tls;
mod crc32c;
pub mod encode;
pub mod identity;
pub mod parse;
pub mod parse_v1;
pub mod seal;
pub mod template;
pub mod tlv;

/// The 12 octets that every version 2 header starts with.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Octets before the addresses: signature, version and command, family and transport, length.
pub const FIXED_LEN: usize = 16;

/// Octets of the longest header: the length field counts what follows the first 16.
pub const MAX_LEN: usize = FIXED_LEN + u16::MAX as usize;

/// Octets of source and destination of an IPv4 header, address and port each.
pub const IPV4_ADDRESSES: usize = 12;

/// The same of an IPv6 header.
pub const IPV6_ADDRESSES: usize = 36;

/// Octets before the value of a TLV: type and length.
pub const TLV_OVERHEAD: usize = 3;

/// Types of TLVs (section 2.2).
pub mod tlv_type {
    /// The application protocol of the client's connection.
    pub const ALPN: u8 = 0x01;
    /// The name of the server that the client asked for.
    pub const AUTHORITY: u8 = 0x02;
    /// CRC32C of the whole header.
    pub const CRC32C: u8 = 0x03;
    /// Padding, to be ignored.
    pub const NOOP: u8 = 0x04;
    /// Identifier of the connection, at most 128 octets.
    pub const UNIQUE_ID: u8 = 0x05;
    /// TLS parameters of the client's connection.
    pub const SSL: u8 = 0x20;
    /// Inside SSL: the version.
    pub const SSL_VERSION: u8 = 0x21;
    /// Inside SSL: the cipher suite.
    pub const SSL_CIPHER: u8 = 0x23;
    /// First of the types for private use, up to 0xEF.
    pub const CUSTOM_MIN: u8 = 0xe0;
    /// First of the types reserved for later versions, up to 0xFF.
    pub const FUTURE_MIN: u8 = 0xf8;
}

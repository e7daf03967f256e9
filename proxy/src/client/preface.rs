//! What comes before the first message from a peer that is trusted to speak for others: a PROXY header. A pure state
//! machine (I13); the task in `introduction.rs` carries bytes to it and keeps the time.

use std::net::SocketAddr;

use crate::proxy_protocol::parse::{Command, Invalid, ParseError, Parsed, parse_any};
use crate::proxy_protocol::{SIGNATURE, parse_v1, tlv, tlv_type};

/// A header that is not complete yet.
#[derive(Debug)]
pub struct Preface {
    max_header: usize,
    received: Vec<u8>,
}

/// What some more octets made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The header is not complete.
    NeedMore,
    /// The header is complete.
    Done(Introduced),
    /// The connection must be closed: there is no header, or not one that can be accepted. Nothing is guessed (section 2
    /// of the specification).
    Refuse(Invalid),
}

/// A client behind a trusted peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduced {
    /// Source and destination of the header; none: the connection's own are the true ones (LOCAL, UNSPEC, UNKNOWN).
    pub ends: Option<(SocketAddr, SocketAddr)>,
    /// The TLVs as a header holds them, CRC32C and NOOP left out. None of LOCAL, whose payload is to be ignored.
    pub tlvs: Box<[u8]>,
    /// What came behind the header: the first messages, or a part of one.
    pub rest: Vec<u8>,
}

impl Preface {
    /// Nothing has come yet. A header may have `max_header` octets.
    pub fn new(max_header: usize) -> Self {
        Self { max_header, received: Vec::new() }
    }

    /// More octets came. To be called until it returns something other than [`Progress::NeedMore`].
    pub fn take(&mut self, bytes: &[u8]) -> Progress {
        self.received.extend_from_slice(bytes);
        match parse_any(&self.received, self.max_header) {
            Ok(parsed) => Progress::Done(introduce(&parsed, std::mem::take(&mut self.received))),
            Err(ParseError::NeedMore) => Progress::NeedMore,
            Err(ParseError::Invalid(reason)) => Progress::Refuse(reason),
        }
    }
}

fn introduce(parsed: &Parsed, mut received: Vec<u8>) -> Introduced {
    received.drain(..parsed.len);
    received.shrink_to_fit();
    let mut tlvs = Vec::new();
    if parsed.command == Command::Proxy {
        for (kind, value) in parsed.tlvs.iter().filter(|(kind, _)| *kind != tlv_type::CRC32C) {
            tlv::push(&mut tlvs, *kind, value);
        }
    }
    Introduced { ends: parsed.source.zip(parsed.destination), tlvs: tlvs.into_boxed_slice(), rest: received }
}

/// Whether octets with which a client begins are a PROXY header's and cannot be a query's: read as a message, that of
/// version 2 has 2,641 questions or more, that of version 1 an opcode that nobody has assigned. False as long as
/// it cannot be told.
pub fn is_header(bytes: &[u8]) -> bool {
    bytes.starts_with(&SIGNATURE) || bytes.starts_with(parse_v1::PREFIX)
}

/// What a client begins with where TLS is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// A PROXY header, which is no beginning of TLS: its versions begin with CR and with "P".
    Header,
    /// A ClientHello of TLS 1.1 or older (RFC 2246 and RFC 4346, both section 7.4.1.2). Later versions have 3.3 in
    /// this place, and an extension for the rest (RFC 8446 section 4.1.2).
    OldHello,
    /// Anything else: TLS finds out.
    Other,
}

/// What these first octets are the beginning of; none as long as it cannot be told.
pub fn opening(bytes: &[u8]) -> Option<Opening> {
    /// The type of a record that carries a handshake (RFC 8446 section 5.1), and of the handshake's message.
    const HANDSHAKE: u8 = 22;
    const CLIENT_HELLO: u8 = 1;
    /// The version that a ClientHello of TLS 1.2 and 1.3 begins with.
    const TLS12: [u8; 2] = [3, 3];
    match bytes {
        bytes if is_header(bytes) => Some(Opening::Header),
        // Type, version and length of the record, type and length of the message, version of the client.
        [HANDSHAKE, _, _, _, _, CLIENT_HELLO, _, _, _, major, minor, ..] => {
            Some(if [*major, *minor] < TLS12 { Opening::OldHello } else { Opening::Other })
        }
        [HANDSHAKE, ..] if bytes.len() < 11 => None,
        bytes if SIGNATURE.starts_with(bytes) || parse_v1::PREFIX.starts_with(bytes) => None,
        _ => Some(Opening::Other),
    }
}

#[cfg(test)]
#[path = "preface_tests.rs"]
mod tests;

//! A look at the header and the first question of a message, in place.
//!
//! Nothing behind the question is read, so that unknown flags, types, classes and options pass (RFC 5625, section 4).

use std::fmt;

use thiserror::Error;

use super::frame::MIN_MESSAGE;
use super::opt;
use super::records::{Piece, piece};

/// Opcode of a standard query (RFC 1035); the only one that may be sent a second time (RFC 7766, section 6.2.4).
pub const OPCODE_QUERY: u8 = 0;
/// Opcode of a change notification (RFC 1996).
pub const OPCODE_NOTIFY: u8 = 4;
/// Opcode of a dynamic update (RFC 2136).
pub const OPCODE_UPDATE: u8 = 5;
/// Opcode of DNS Stateful Operations (RFC 8490). A pooled forwarder must not forward it (section 9.4).
pub const OPCODE_DSO: u8 = 6;
/// RCODE of an answer that says that the server cannot serve (RFC 1035 section 4.1.1).
pub const RCODE_SERVFAIL: u8 = 2;

/// Octets of the longest name on the wire, the root's zero included (RFC 1035, section 2.3.4).
pub const MAX_NAME: usize = 255;
/// Octets of the longest label (RFC 1035, section 2.3.4). A larger length octet is a compression pointer or reserved.
pub const MAX_LABEL: u8 = 63;
/// Octets of the longest name in presentation format: every octet of the labels escaped, and the dots between them.
pub const MAX_NAME_TEXT: usize = 4 * MAX_NAME;

/// Octets of QTYPE and QCLASS together.
pub(super) const TYPE_AND_CLASS: usize = 4;

/// The header of a message, without the counts that a forwarder has no use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// Message ID.
    pub id: u16,
    /// Set in a response.
    pub qr: bool,
    /// Operation, 0 to 15.
    pub opcode: u8,
    /// Truncated.
    pub tc: bool,
    /// Recursion desired.
    pub rd: bool,
    /// Response code without its extension in OPT, 0 to 15.
    pub rcode: u8,
    /// Entries in the question section. Not more than a claim until the section was read.
    pub qdcount: u16,
}

/// The first question of a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Question<'a> {
    /// QNAME as it was sent, uncompressed, its closing zero included.
    pub name_wire: &'a [u8],
    /// QTYPE.
    pub qtype: u16,
    /// QCLASS.
    pub qclass: u16,
    /// Where the question ends, in octets from the start of the message.
    pub end: usize,
    /// All of the message.
    message: &'a [u8],
}

/// Why the first question cannot be read.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum QuestionError {
    /// The message ends inside the question.
    #[error("the message ends inside its question")]
    Truncated,
    /// QNAME has more than 255 octets (RFC 1035, section 2.3.4).
    #[error("the name in the question has more than 255 octets")]
    NameTooLong,
    /// A compression pointer. Before the first question there are no names, so it could point into the header only
    /// (RFC 1035, section 4.1.4: "a prior occurrence of the same name").
    #[error("the first question holds a compression pointer, which has no name to point to")]
    Pointer,
    /// A length octet of the reserved kinds 0x40 and 0x80 (RFC 6891, section 5).
    #[error("the name in the question holds a label of reserved kind {0:#04x}")]
    ReservedLabel(u8),
}

/// Reads the header. `None` if `message` is shorter than 12 octets, which [`super::frame`] never yields.
pub fn peek(message: &[u8]) -> Option<Peek> {
    let header = message.first_chunk::<MIN_MESSAGE>()?;
    Some(Peek {
        id: u16::from_be_bytes([header[0], header[1]]),
        qr: header[2] & 0x80 != 0,
        opcode: (header[2] >> 3) & 0x0f,
        tc: header[2] & 0x02 != 0,
        rd: header[2] & 0x01 != 0,
        rcode: header[3] & 0x0f,
        qdcount: u16::from_be_bytes([header[4], header[5]]),
    })
}

/// Reads the first question. `None` if the message has none (QDCOUNT 0, or no whole header).
///
/// # Errors
///
/// See [`QuestionError`]. The rest of the message may still be well formed.
pub fn first_question(message: &[u8]) -> Option<Result<Question<'_>, QuestionError>> {
    (peek(message)?.qdcount > 0).then(|| read_question(message))
}

fn read_question(message: &[u8]) -> Result<Question<'_>, QuestionError> {
    let mut at = MIN_MESSAGE;
    loop {
        match piece(message, at).ok_or(QuestionError::Truncated)? {
            Piece::Root => break,
            Piece::Label(size) => at += size,
            Piece::Pointer(_) => return Err(QuestionError::Pointer),
            Piece::Reserved(kind) => return Err(QuestionError::ReservedLabel(kind)),
        }
        // The closing zero still has to fit.
        if at - MIN_MESSAGE >= MAX_NAME {
            return Err(QuestionError::NameTooLong);
        }
    }
    let name_end = at + 1;
    let end = name_end + TYPE_AND_CLASS;
    let name_wire = message.get(MIN_MESSAGE..name_end).ok_or(QuestionError::Truncated)?;
    match message.get(name_end..end) {
        Some(&[t1, t0, c1, c0]) => {
            let (qtype, qclass) = (u16::from_be_bytes([t1, t0]), u16::from_be_bytes([c1, c0]));
            Ok(Question { name_wire, qtype, qclass, end, message })
        }
        _ => Err(QuestionError::Truncated),
    }
}

/// Whether `answer` answers the question of `query`: RFC 7766, section 7 and RFC 5452, section 9.1.
///
/// Where the answer has a question it must be the query's: QNAME without regard to ASCII case (RFC 4343), QTYPE,
/// QCLASS and QDCOUNT. An answer without a question matches: later messages of a zone transfer have none (RFC 5936,
/// section 2.2.2), nor has an error for a query that could not be read. A question that cannot be read passes only with
/// an opcode other than QUERY, and whoever refuses that sends it back as it was, or the header alone. IDs and QR are not
/// looked at.
pub fn question_matches(query: &[u8], answer: &[u8]) -> bool {
    let (Some(asked), Some(answered)) = (peek(query), peek(answer)) else { return false };
    if answered.qdcount == 0 {
        return true;
    }
    if asked.qdcount != answered.qdcount {
        return false;
    }
    let Ok(asked) = read_question(query) else {
        let asked = query.get(MIN_MESSAGE..).unwrap_or_default();
        return asked.starts_with(answer.get(MIN_MESSAGE..).unwrap_or_default());
    };
    // Nearly always the very octets come back.
    let section = MIN_MESSAGE..asked.end;
    if query.get(section.clone()) == answer.get(section) {
        return true;
    }
    read_question(answer).is_ok_and(|answered| asked.matches(&answered))
}

/// Overwrites the message ID. Does nothing to a message of less than two octets.
pub fn set_id(message: &mut [u8], id: u16) {
    if let Some(octets) = message.first_chunk_mut::<2>() {
        *octets = id.to_be_bytes();
    }
}

impl<'a> Question<'a> {
    /// The same name (ASCII case aside), type and class.
    pub fn matches(&self, other: &Question<'_>) -> bool {
        // The length octets take part in the comparison; being below 64 they are not letters.
        self.qtype == other.qtype && self.qclass == other.qclass && self.name_wire.eq_ignore_ascii_case(other.name_wire)
    }

    /// The value of the first EDNS option of this code in the query's OPT record (RFC 6891, section 6.1.2).
    pub fn edns_option(&self, code: u16) -> Option<&'a [u8]> {
        opt::value(self.message, code)
    }

    /// The labels from left to right, without the root.
    pub fn labels(&self) -> Labels<'a> {
        Labels { rest: self.name_wire }
    }

    /// The octets of label `n`, counted from 1 at the left; `None` if the name has fewer.
    pub fn label(&self, n: usize) -> Option<&'a [u8]> {
        self.labels().nth(n.checked_sub(1)?)
    }

    /// Appends the name in presentation format: case as sent, no dot at the end (the root is `.`), `\.` and `\\` for
    /// these octets inside a label, `\DDD` for all that is not printable ASCII (RFC 1035, section 5.1).
    /// At most [`MAX_NAME_TEXT`] octets.
    pub fn write_name(&self, out: &mut Vec<u8>) {
        let mut empty = true;
        for label in self.labels() {
            if !empty {
                out.push(b'.');
            }
            empty = false;
            for &octet in label {
                match octet {
                    b'.' | b'\\' => out.extend_from_slice(&[b'\\', octet]),
                    b'!'..=b'~' => out.push(octet),
                    _ => {
                        let digit = |by: u8| b'0' + octet / by % 10;
                        out.extend_from_slice(&[b'\\', digit(100), digit(10), digit(1)]);
                    }
                }
            }
        }
        if empty {
            out.push(b'.');
        }
    }
}

impl fmt::Debug for Question<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = Vec::new();
        self.write_name(&mut name);
        let name = String::from_utf8_lossy(&name);
        write!(f, "Question({name} TYPE{} CLASS{}, end {})", self.qtype, self.qclass, self.end)
    }
}

/// The labels of a name, from left to right. Made by [`Question::labels`].
#[derive(Clone, Debug)]
pub struct Labels<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Labels<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (&length, rest) = self.rest.split_first()?;
        if length == 0 {
            return None;
        }
        let (label, rest) = rest.split_at_checked(usize::from(length))?;
        self.rest = rest;
        Some(label)
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;

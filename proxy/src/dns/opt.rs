//! The OPT record of a whole message, for those who change what is in it.
//!
//! Only a message of which every octet is understood has one here. Names are not followed and nothing is decoded, so a
//! change keeps every other octet as it was sent (RFC 6891, section 6.2.6; RFC 5625, section 4).

use std::ops::Range;

use super::edns::{FIXED, OPT, name_len};
use super::frame::MIN_MESSAGE;
use super::message::TYPE_AND_CLASS;

/// Type of the record that signs a transaction by a shared key (RFC 8945, section 4.2).
const TSIG: u16 = 250;
/// Type of the record that signs a transaction by a public key, if it covers type 0 (RFC 2931, section 3).
const SIG: u16 = 24;
/// Octets of an option's code and length (RFC 6891, section 6.1.2).
pub(super) const OPTION_HEAD: usize = 4;

/// Where the one OPT record of a message is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Opt {
    /// Its data, the options. The two octets of RDLENGTH stand before it.
    pub(super) data: Range<usize>,
    /// Nothing comes after it, so nothing moves if its data become longer or shorter, and no compression pointer
    /// (RFC 1035, section 4.1.4) leads astray.
    pub(super) is_last: bool,
}

/// An option in an OPT record's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EdnsOption {
    pub(super) code: u16,
    /// Its value, from the start of the message.
    pub(super) value: Range<usize>,
}

/// The OPT record of `message`. None if there is no such record, or more than one, or one that is not in the additional
/// section; if the message is signed (TSIG, SIG(0)); if any part of it cannot be read, or octets follow the last record.
/// Such a message is nobody's to change.
pub(super) fn find(message: &[u8]) -> Option<Opt> {
    let header = message.first_chunk::<MIN_MESSAGE>()?;
    let count = |at: usize| usize::from(u16::from_be_bytes([header[at], header[at + 1]]));
    let mut at = MIN_MESSAGE;
    for _ in 0..count(4) {
        at += name_len(message.get(at..)?)? + TYPE_AND_CLASS;
    }
    let additional = count(6) + count(8);
    let mut found = None;
    for index in 0..additional + count(10) {
        let rest = message.get(at..)?;
        let name = name_len(rest)?;
        let fixed = rest.get(name..)?.first_chunk::<FIXED>()?;
        let start = at + name + FIXED;
        let end = start + usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        let data = message.get(start..end)?;
        match u16::from_be_bytes([fixed[0], fixed[1]]) {
            OPT if index < additional || name != 1 || found.is_some() => return None,
            OPT => found = Some(start..end),
            TSIG => return None,
            SIG if data.starts_with(&[0, 0]) => return None,
            _ => {}
        }
        at = end;
    }
    let data = found.filter(|_| at == message.len())?;
    let mut option = data.start;
    while option < data.end {
        option = option_at(message, option, data.end)?.value.end;
    }
    Some(Opt { is_last: data.end == at, data })
}

/// The option that begins at `at`. None if there is no whole one before `end`, where the OPT record's data end.
pub(super) fn option_at(message: &[u8], at: usize, end: usize) -> Option<EdnsOption> {
    let head = message.get(at..end)?.first_chunk::<OPTION_HEAD>()?;
    let start = at + OPTION_HEAD;
    let value = start..start + usize::from(u16::from_be_bytes([head[2], head[3]]));
    (value.end <= end).then(|| EdnsOption { code: u16::from_be_bytes([head[0], head[1]]), value })
}

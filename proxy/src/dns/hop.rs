//! EDNS options that speak of one connection, so that each ends at its hop (RFC 6891, section 6.2.6).
//!
//! edns-tcp-keepalive (RFC 7828), in which a server says for how long it keeps a connection that is idle: the client's is
//! taken out of its query, and a backend's value replaced in the answer. Padding (RFC 7830), which hides from who listens to
//! an encrypted connection how long a message is: the answer to a query that has it is padded for the client's connection.
//!
//! Messages that are signed, or that cannot be understood to their last octet, are left alone ([`opt::find`]). Nothing is
//! decoded and encoded again.

use std::time::Duration;

use super::frame::{MAX_MESSAGE, PREFIX_LEN};
use super::opt::{self, OPTION_HEAD, Untouchable};

/// The code of edns-tcp-keepalive (RFC 7828, section 3.1).
pub(crate) const KEEPALIVE: u16 = 11;
/// The code of Padding (RFC 7830, section 3).
pub(crate) const PADDING: u16 = 12;
/// The unit of TIMEOUT (RFC 7828, section 3.1).
pub(crate) const TIMEOUT_UNIT: Duration = Duration::from_millis(100);
/// Octets of TIMEOUT.
const TIMEOUT: usize = 2;
/// Answers are padded to a multiple of so many octets (RFC 8467, section 4.1).
pub(crate) const BLOCK: usize = 468;

/// What is looked at on a client's connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scope {
    /// edns-tcp-keepalive: `listener.edns_tcp_keepalive`.
    pub(crate) keepalive: bool,
    /// Padding: the connection is encrypted (RFC 7830, section 6: it must not be used on others).
    pub(crate) padding: bool,
}

/// What is to be done with the answer to a query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Treatment {
    pub(crate) keepalive: Keepalive,
    /// The answer is padded, whatever padding the backend has put into it.
    pub(crate) pads: bool,
}

/// What is to be done with edns-tcp-keepalive in an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Keepalive {
    /// It passes as it is.
    #[default]
    Pass,
    /// If the backend tells a time, it is taken out: the query had no OPT record, so the client is to be told none (RFC 7828,
    /// section 3.3.2).
    TakeOut,
    /// If the backend tells a time, it is replaced: section 3.3.2 allows to tell one to whoever sends an OPT record.
    Replace,
    /// The client has asked: it is told the time.
    Tell,
}

/// The option edns-tcp-keepalive in a query has a value. Clients must not send one (RFC 7828, section 3.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HasValue;

/// What a query asks for.
///
/// # Errors
/// edns-tcp-keepalive is there, but not empty: that is a format error.
pub(crate) fn asked(query: &[u8], scope: Scope) -> Result<Treatment, HasValue> {
    let mut treatment = Treatment::default();
    if scope == Scope::default() {
        return Ok(treatment);
    }
    let opt = match opt::find(query) {
        Err(Untouchable) => return Ok(treatment),
        Ok(opt) => opt,
    };
    if scope.keepalive {
        treatment.keepalive = if opt.is_some() { Keepalive::Replace } else { Keepalive::TakeOut };
    }
    let Some(opt) = opt else { return Ok(treatment) };
    let mut at = opt.data.start;
    while let Some(option) = opt::option_at(query, at, opt.data.end) {
        at = option.value.end;
        match option.code {
            KEEPALIVE if scope.keepalive && !option.value.is_empty() => return Err(HasValue),
            KEEPALIVE if scope.keepalive => treatment.keepalive = Keepalive::Tell,
            PADDING => treatment.pads = scope.padding,
            _ => {}
        }
    }
    Ok(treatment)
}

/// Takes edns-tcp-keepalive out of a query, where that moves no other record: OPT is the last one, as all clients send it.
pub(crate) fn take_out(query: &mut Vec<u8>) {
    let Ok(Some(opt)) = opt::find(query) else { return };
    if !opt.is_last {
        return;
    }
    let (mut at, mut kept) = (opt.data.start, opt.data.start);
    while let Some(option) = opt::option_at(query, at, opt.data.end) {
        let whole = at..option.value.end;
        at = whole.end;
        if option.code != KEEPALIVE {
            query.copy_within(whole.clone(), kept);
            kept += whole.len();
        }
    }
    query.truncate(kept);
    set_length(query, opt.data.start, kept - opt.data.start);
}

/// Treats the answer at the end of `out`, which begins with its length at `start`. The value of edns-tcp-keepalive that the
/// backend told, if it told one and somebody looks.
///
/// A value that is there becomes `timeout` (100 ms), wherever it is. All else is done only to an OPT record that is the last
/// record, and as long as the answer stays within 65,535 octets: the value is added with [`Keepalive::Tell`] if it is
/// missing, the option taken out with [`Keepalive::TakeOut`], and the answer padded.
pub(crate) fn treat(out: &mut Vec<u8>, start: usize, timeout: u16, treatment: Treatment) -> Option<u16> {
    let begin = start + PREFIX_LEN;
    let answer = out.get_mut(begin..)?;
    let opt = opt::find(answer).ok()??;
    let (mut theirs, mut is_missing) = (None, treatment.keepalive == Keepalive::Tell);
    let (mut at, mut kept) = (opt.data.start, opt.data.start);
    while let Some(option) = opt::option_at(answer, at, opt.data.end) {
        let whole = at..option.value.end;
        at = whole.end;
        let mut goes = opt.is_last && option.code == PADDING && treatment.pads;
        if option.code == KEEPALIVE && treatment.keepalive != Keepalive::Pass {
            is_missing = false;
            goes = opt.is_last && treatment.keepalive == Keepalive::TakeOut;
            let value = answer.get_mut(option.value).and_then(|value| <&mut [u8; TIMEOUT]>::try_from(value).ok());
            if let Some(value) = value {
                theirs.get_or_insert(u16::from_be_bytes(*value));
                *value = timeout.to_be_bytes();
            }
        }
        if !goes {
            if kept < whole.start {
                answer.copy_within(whole.clone(), kept);
            }
            kept += whole.len();
        }
    }
    if opt.is_last {
        out.truncate(begin + kept);
        if is_missing && kept + OPTION_HEAD + TIMEOUT <= MAX_MESSAGE {
            push_head(out, KEEPALIVE, TIMEOUT);
            out.extend_from_slice(&timeout.to_be_bytes());
        }
        if treatment.pads {
            pad(out, begin);
        }
        let length = out.len() - begin;
        set_length(out, begin + opt.data.start, length - opt.data.start);
        set_length(out, begin, length);
    }
    theirs
}

/// Pads the message that begins there to a multiple of [`BLOCK`], or as far as it goes, with zeros (RFC 7830, section 3).
fn pad(out: &mut Vec<u8>, begin: usize) {
    let unpadded = out.len() - begin + OPTION_HEAD;
    let padded = unpadded.next_multiple_of(BLOCK).min(MAX_MESSAGE);
    if let Some(padding) = padded.checked_sub(unpadded) {
        push_head(out, PADDING, padding);
        out.resize(begin + padded, 0);
    }
}

/// Code and length of an option whose value follows.
fn push_head(out: &mut Vec<u8>, code: u16, length: usize) {
    out.extend_from_slice(&code.to_be_bytes());
    // No longer than a message.
    out.extend_from_slice(&(length as u16).to_be_bytes());
}

/// Writes the two octets of a length that stand before `start`.
fn set_length(octets: &mut [u8], start: usize, length: usize) {
    // No longer than a message.
    let length = (length as u16).to_be_bytes();
    if let Some(field) = start.checked_sub(length.len()).and_then(|at| octets.get_mut(at..start)) {
        field.copy_from_slice(&length);
    }
}

#[cfg(test)]
#[path = "hop_tests.rs"]
mod tests;

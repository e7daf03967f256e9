//! edns-tcp-keepalive (RFC 7828): the option in which a server says for how long it keeps a connection that is idle.
//!
//! It speaks of one connection, so it ends at each hop (section 3; RFC 6891, section 6.2.6): the client's is taken out of
//! its query, and a backend's value is replaced in the answer. Messages that are signed, or that cannot be understood to
//! their last octet, are left alone ([`opt::find`]). Nothing is decoded and encoded again.

use std::time::Duration;

use super::frame::{MAX_MESSAGE, PREFIX_LEN};
use super::opt;

/// The option's code (section 3.1).
pub(crate) const CODE: u16 = 11;
/// The unit of TIMEOUT (section 3.1).
pub(crate) const TIMEOUT_UNIT: Duration = Duration::from_millis(100);
/// Octets of TIMEOUT.
const TIMEOUT: usize = 2;
/// Octets of the option with its TIMEOUT.
const OPTION: usize = opt::OPTION_HEAD + TIMEOUT;

/// What is to be done with the answer to a query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// It passes as it is.
    #[default]
    Pass,
    /// If the backend tells a time, it is replaced: section 3.3.2 allows to tell one to whoever sends an OPT record.
    Replace,
    /// The client has asked: it is told the time.
    Tell,
}

/// The option in a query has a value. Clients must not send one (section 3.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HasValue;

/// What a query asks for.
///
/// # Errors
/// The option is there, but not empty: that is a format error.
pub(crate) fn asked(query: &[u8]) -> Result<Treatment, HasValue> {
    let Some(opt) = opt::find(query) else { return Ok(Treatment::Pass) };
    let mut treatment = Treatment::Replace;
    let mut at = opt.data.start;
    while let Some(option) = opt::option_at(query, at, opt.data.end) {
        at = option.value.end;
        if option.code == CODE {
            if !option.value.is_empty() {
                return Err(HasValue);
            }
            treatment = Treatment::Tell;
        }
    }
    Ok(treatment)
}

/// Takes the option out of a query, where that moves no other record: OPT is the last one, as all clients send it.
pub(crate) fn take_out(query: &mut Vec<u8>) {
    let Some(opt) = opt::find(query).filter(|opt| opt.is_last) else { return };
    let (mut at, mut kept) = (opt.data.start, opt.data.start);
    while let Some(option) = opt::option_at(query, at, opt.data.end) {
        let whole = at..option.value.end;
        at = whole.end;
        if option.code != CODE {
            query.copy_within(whole.clone(), kept);
            kept += whole.len();
        }
    }
    query.truncate(kept);
    set_length(query, opt.data.start, kept - opt.data.start);
}

/// Puts `timeout` (100 ms) into the answer at the end of `out`, which begins with its length at `start`. The value that the
/// backend told, if it told one.
///
/// A value that is there is overwritten, wherever it is. With [`Treatment::Tell`] the option is added if it is missing, to
/// an OPT record that is the last record, as long as the answer stays within 65,535 octets.
pub(crate) fn tell(out: &mut Vec<u8>, start: usize, timeout: u16, treatment: Treatment) -> Option<u16> {
    let begin = start + PREFIX_LEN;
    let answer = out.get_mut(begin..)?;
    let length = answer.len();
    let opt = opt::find(answer)?;
    let mut theirs = None;
    let mut is_missing = true;
    let mut at = opt.data.start;
    while let Some(option) = opt::option_at(answer, at, opt.data.end) {
        at = option.value.end;
        if option.code != CODE {
            continue;
        }
        is_missing = false;
        if let Some(value) = answer.get_mut(option.value).and_then(|value| <&mut [u8; TIMEOUT]>::try_from(value).ok()) {
            theirs.get_or_insert(u16::from_be_bytes(*value));
            *value = timeout.to_be_bytes();
        }
    }
    if is_missing && treatment == Treatment::Tell && opt.is_last && length + OPTION <= MAX_MESSAGE {
        for field in [CODE, TIMEOUT as u16, timeout] {
            out.extend_from_slice(&field.to_be_bytes());
        }
        set_length(out, begin + opt.data.start, opt.data.len() + OPTION);
        set_length(out, begin, length + OPTION);
    }
    theirs
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
#[path = "keepalive_tests.rs"]
mod tests;

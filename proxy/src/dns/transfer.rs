//! Zone transfers: what a query asks for, and where the stream of messages that answers it ends.
//!
//! Nothing but the records tells that a transfer is over. A full one (AXFR, RFC 5936, section 2.2) begins and ends with
//! the zone's SOA. An incremental one (IXFR, RFC 1995, section 4) is one SOA if the client is up to date, else either a
//! full one or, after the SOA of the newest version, sequences of deletions and additions, each half led by a SOA; the
//! newest SOA in the place of another sequence ends it. An error code ends either (RFC 5936, section 2.2).
//!
//! A pure state machine without allocation. Names are skipped, not followed, but for the owner of a SOA; other record
//! data is not read. Records behind the answer section, such as TSIG, are not looked at.

use thiserror::Error;

use super::edns::FIXED;
use super::frame::MIN_MESSAGE;
use super::message::{MAX_LABEL, MAX_NAME, Question, peek};
use super::rtype::{AXFR, IXFR};

/// TYPE of the record that frames a transfer (RFC 1035, section 3.3.13).
const SOA: u16 = 6;
/// QCLASS of any class (RFC 1035, section 3.2.5).
const ANY_CLASS: u16 = 255;
/// Octets of SERIAL, REFRESH, RETRY, EXPIRE and MINIMUM together (RFC 1035, section 3.3.13).
const SOA_NUMBERS: usize = 20;

/// What a transfer's query asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The whole zone.
    Axfr,
    /// What has changed since the version with this serial.
    Ixfr {
        /// SERIAL of the SOA in the query's authority section (RFC 1995, section 3).
        serial: u32,
    },
}

/// Why a transfer's query cannot be understood, so that nobody could tell where its answer ends.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    /// RFC 5936, section 2.1.1.
    #[error("a zone transfer with {0} questions")]
    Questions(u16),
    /// RFC 1995, section 3.
    #[error("an IXFR query without a SOA of its zone that can be read")]
    Soa,
}

/// How a stream ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The zone, or the changes, are complete.
    Complete,
    /// One SOA: the client has the newest version, or a newer one.
    UpToDate,
    /// An error code, or a first message without records.
    Declined,
}

/// What a message did to its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// More messages must come.
    More,
    /// It was the last one.
    Done(End),
}

/// Why a message cannot belong to a transfer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum StreamError {
    /// Its sections cannot be read up to the last answer.
    #[error("a message of a zone transfer whose records cannot be read")]
    Unreadable,
    /// RFC 5936, section 2.2: the first message begins with the zone's SOA.
    #[error("a zone transfer that does not begin with the SOA of its zone")]
    NoSoa,
}

/// Whether a question of opcode QUERY with this type asks for a zone transfer.
pub fn is_transfer(qtype: u16) -> bool {
    matches!(qtype, AXFR | IXFR)
}

/// What `query`, whose first question is this, asks for. For types that [`is_transfer`] says are transfers.
///
/// # Errors
///
/// If the query has several questions, or, for IXFR, no SOA that can be read.
pub fn request(query: &[u8], question: &Question<'_>) -> Result<Request, RequestError> {
    let counts = Counts::read(query).unwrap_or_default();
    if counts.questions != 1 {
        return Err(RequestError::Questions(counts.questions));
    }
    if question.qtype != IXFR {
        return Ok(Request::Axfr);
    }
    let mut at = question.end;
    for number in 0..u32::from(counts.answers) + u32::from(counts.authorities) {
        let record = Record::read(query, at).ok_or(RequestError::Soa)?;
        if number >= u32::from(counts.answers) && record.is_soa_of(question) {
            return Ok(Request::Ixfr { serial: record.serial().ok_or(RequestError::Soa)? });
        }
        at = record.end;
    }
    Err(RequestError::Soa)
}

/// The messages that answer one query, as far as they have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    request: Request,
    state: State,
    /// The serial of the newest version: that of the first SOA.
    newest: u32,
    messages: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No record has come.
    Start,
    /// Of an IXFR, the first SOA.
    First,
    /// A full transfer: the next SOA is its end.
    Whole,
    /// Among the records to delete.
    Deleting,
    /// Among the records to add.
    Adding,
}

impl Stream {
    /// Nothing has come yet.
    pub fn new(request: Request) -> Self {
        Self { request, state: State::Start, newest: 0, messages: 0 }
    }

    /// What was asked for.
    pub fn request(&self) -> Request {
        self.request
    }

    /// Messages that have come.
    pub fn messages(&self) -> u64 {
        self.messages
    }

    /// The next message of the answer to `question`. It is not looked at whether its ID and question are right.
    ///
    /// # Errors
    ///
    /// See [`StreamError`]. The message does not count; the stream must not be used further.
    pub fn message(&mut self, question: &Question<'_>, message: &[u8]) -> Result<Step, StreamError> {
        let (Some(header), Some(counts)) = (peek(message), Counts::read(message)) else {
            return Err(StreamError::Unreadable);
        };
        let is_first = self.messages == 0;
        if header.rcode != 0 || (is_first && counts.answers == 0) {
            self.messages += 1;
            return Ok(Step::Done(End::Declined));
        }
        let mut at = MIN_MESSAGE;
        for _ in 0..counts.questions {
            at = skip_name(message, at).ok_or(StreamError::Unreadable)? + 4;
        }
        for _ in 0..counts.answers {
            let record = Record::read(message, at).ok_or(StreamError::Unreadable)?;
            at = record.end;
            let soa = match record.is_soa_of(question) {
                true => Some(record.serial().ok_or(StreamError::Unreadable)?),
                false => None,
            };
            if self.record(soa)? {
                // What follows in this message cannot be told from it.
                self.messages += 1;
                return Ok(Step::Done(End::Complete));
            }
        }
        self.messages += 1;
        if is_first
            && counts.answers == 1
            && let Request::Ixfr { serial } = self.request
            && at_most(self.newest, serial)
        {
            return Ok(Step::Done(End::UpToDate));
        }
        Ok(Step::More)
    }

    /// The next record: the serial if it is a SOA of the zone. True if it was the last one.
    fn record(&mut self, soa: Option<u32>) -> Result<bool, StreamError> {
        self.state = match (self.state, soa) {
            (State::Start, None) => return Err(StreamError::NoSoa),
            (State::Start, Some(serial)) => {
                self.newest = serial;
                if self.request == Request::Axfr { State::Whole } else { State::First }
            }
            (State::First, None) => State::Whole,
            (State::First, Some(serial)) if serial != self.newest => State::Deleting,
            (State::Deleting, Some(_)) => State::Adding,
            (State::Adding, Some(serial)) if serial != self.newest => State::Deleting,
            (State::First | State::Whole | State::Adding, Some(_)) => return Ok(true),
            (State::Whole | State::Deleting | State::Adding, None) => self.state,
        };
        Ok(false)
    }
}

/// `a` <= `b` in the arithmetic of serials (RFC 1982, section 3.2). False where the two cannot be compared.
fn at_most(a: u32, b: u32) -> bool {
    b.wrapping_sub(a) < 1 << 31
}

/// What a header says of the sections (RFC 1035, section 4.1.1).
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    questions: u16,
    answers: u16,
    authorities: u16,
}

impl Counts {
    fn read(message: &[u8]) -> Option<Self> {
        let [_, _, _, _, q1, q0, a1, a0, n1, n0, ..] = message.first_chunk::<MIN_MESSAGE>()?;
        let number = |high: &u8, low: &u8| u16::from_be_bytes([*high, *low]);
        Some(Self { questions: number(q1, q0), answers: number(a1, a0), authorities: number(n1, n0) })
    }
}

/// A record's place in its message.
#[derive(Clone, Copy, Debug)]
struct Record<'a> {
    message: &'a [u8],
    owner: usize,
    rtype: u16,
    class: u16,
    data: usize,
    end: usize,
}

impl<'a> Record<'a> {
    /// The one that begins at `at`, if all of it is there.
    fn read(message: &'a [u8], at: usize) -> Option<Self> {
        let fixed = skip_name(message, at)?;
        let [t1, t0, c1, c0, _, _, _, _, l1, l0] = *message.get(fixed..)?.first_chunk::<FIXED>()?;
        let data = fixed + FIXED;
        let end = data + usize::from(u16::from_be_bytes([l1, l0]));
        let (rtype, class) = (u16::from_be_bytes([t1, t0]), u16::from_be_bytes([c1, c0]));
        (end <= message.len()).then_some(Self { message, owner: at, rtype, class, data, end })
    }

    fn is_soa_of(&self, zone: &Question<'_>) -> bool {
        self.rtype == SOA
            && (self.class == zone.qclass || zone.qclass == ANY_CLASS)
            && is_name(self.message, self.owner, zone.name_wire)
    }

    /// SERIAL of a SOA, behind its two names. `None` if its data are not those of a SOA.
    fn serial(&self) -> Option<u32> {
        let numbers = skip_name(self.message, skip_name(self.message, self.data)?)?;
        if numbers + SOA_NUMBERS != self.end {
            return None;
        }
        Some(u32::from_be_bytes(*self.message.get(numbers..)?.first_chunk()?))
    }
}

/// Where the name at `at` ends. A pointer ends it and is not followed.
fn skip_name(message: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    // The closing zero, or the pointer's target, still has to fit.
    while at - start < MAX_NAME {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=MAX_LABEL => at += 1 + usize::from(length),
            0xc0.. => return (at + 2 <= message.len()).then_some(at + 2),
            _ => return None,
        }
    }
    None
}

/// Whether the name at `at` is `wire`, which is uncompressed, ASCII case aside (RFC 4343). Each pointer must lead before
/// what was read so far (RFC 1035, section 4.1.4: a prior occurrence), so this ends.
fn is_name(message: &[u8], start: usize, wire: &[u8]) -> bool {
    let (mut at, mut before, mut rest) = (start, start, wire);
    loop {
        let Some(&length) = message.get(at) else { return false };
        match length {
            0 => return rest == [0],
            1..=MAX_LABEL => {
                let size = 1 + usize::from(length);
                let (Some(label), Some((wanted, tail))) = (message.get(at..at + size), rest.split_at_checked(size))
                else {
                    return false;
                };
                // The length octets take part; being below 64 they are not letters.
                if !label.eq_ignore_ascii_case(wanted) {
                    return false;
                }
                (at, rest) = (at + size, tail);
            }
            0xc0.. => {
                let Some(&low) = message.get(at + 1) else { return false };
                let target = usize::from(u16::from_be_bytes([length & 0x3f, low]));
                if target >= before {
                    return false;
                }
                (at, before) = (target, target);
            }
            _ => return false,
        }
    }
}

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;

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

use super::message::{Question, peek};
use super::records::{Record, Records, Section, Steps, counts, name_end};
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
    let [questions, ..] = counts(query).unwrap_or_default();
    if questions != 1 {
        return Err(RequestError::Questions(questions));
    }
    if question.qtype != IXFR {
        return Ok(Request::Axfr);
    }
    let mut steps = Steps::of(query);
    for record in Records::of(query).ok_or(RequestError::Soa)? {
        let record = record.filter(|record| record.section != Section::Additional).ok_or(RequestError::Soa)?;
        if record.section == Section::Authority && is_soa_of(question, query, &record, &mut steps) {
            return Ok(Request::Ixfr { serial: serial(query, &record).ok_or(RequestError::Soa)? });
        }
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
        let (Some(header), Some([_, answers, ..])) = (peek(message), counts(message)) else {
            return Err(StreamError::Unreadable);
        };
        let is_first = self.messages == 0;
        if header.rcode != 0 || (is_first && answers == 0) {
            self.messages += 1;
            return Ok(Step::Done(End::Declined));
        }
        let mut steps = Steps::of(message);
        for record in Records::of(message).ok_or(StreamError::Unreadable)?.take(usize::from(answers)) {
            let record = record.ok_or(StreamError::Unreadable)?;
            let soa = match is_soa_of(question, message, &record, &mut steps) {
                true => Some(serial(message, &record).ok_or(StreamError::Unreadable)?),
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
            && answers == 1
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

fn is_soa_of(zone: &Question<'_>, message: &[u8], record: &Record, steps: &mut Steps) -> bool {
    record.rtype == SOA
        && (record.class == zone.qclass || zone.qclass == ANY_CLASS)
        && is_name(message, record.owner.start, zone.name_wire, steps)
}

/// SERIAL of a SOA, behind its two names. `None` if its data are not those of a SOA.
fn serial(message: &[u8], soa: &Record) -> Option<u32> {
    let numbers = name_end(message, name_end(message, soa.data.start)?)?;
    if numbers + SOA_NUMBERS != soa.data.end {
        return None;
    }
    Some(u32::from_be_bytes(*message.get(numbers..)?.first_chunk()?))
}

/// Whether the name at `start` is `wire`, which is uncompressed, ASCII case aside (RFC 4343).
fn is_name(message: &[u8], start: usize, wire: &[u8], steps: &mut Steps) -> bool {
    let mut rest = wire;
    let is_followed = steps.follow(message, start, |label| {
        let Some((wanted, tail)) = rest.split_at_checked(label.len()) else { return false };
        rest = tail;
        // The length octets take part; being below 64 they are not letters.
        label.eq_ignore_ascii_case(wanted)
    });
    is_followed && rest == [0]
}

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;

//! The records of a message and the names in front of them, walked in place: the one walk that everything here shares.
//!
//! A name is skipped, not followed: a compression pointer ends it (RFC 1035, section 4.1.4). Where a name must be followed,
//! all names of a message together take no more steps than a few for each of its octets ([`Steps`]). So the work for a
//! message grows with its octets and no faster, whatever it holds: the fuzz targets count.

use std::ops::Range;

use super::frame::MIN_MESSAGE;
use super::message::{MAX_LABEL, MAX_NAME, Question, TYPE_AND_CLASS};

/// Type of the OPT record (RFC 6891, section 6.1.1).
pub(super) const OPT: u16 = 41;
/// Octets of a record between its name and its data: TYPE, CLASS, TTL, RDLENGTH (RFC 1035, section 4.1.3).
const FIXED: usize = 10;
/// Pointers that are followed for one name. PowerDNS closes the connection on which one has more; a name without two
/// pointers in a row seldom has ten.
const MAX_HOPS: usize = 100;

/// What stands at a place in a name (RFC 1035, section 4.1.4).
pub(super) enum Piece {
    /// The root: the name ends.
    Root,
    /// A label of so many octets, its length octet included.
    Label(usize),
    /// The name goes on at this place, and ends here.
    Pointer(usize),
    /// A length octet of the reserved kinds 0x40 and 0x80 (RFC 6891, section 5).
    Reserved(u8),
}

/// What stands at `at`, where a name begins or goes on. None if the message ends there.
pub(super) fn piece(message: &[u8], at: usize) -> Option<Piece> {
    work::count(1);
    Some(match *message.get(at)? {
        0 => Piece::Root,
        length @ 1..=MAX_LABEL => Piece::Label(1 + usize::from(length)),
        high @ 0xc0.. => Piece::Pointer(usize::from(u16::from_be_bytes([high & 0x3f, *message.get(at + 1)?]))),
        length => Piece::Reserved(length & 0xc0),
    })
}

/// Where the name at `start` ends, with its root or a pointer. The pointer is not followed.
pub(super) fn name_end(message: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    // The root, or the pointer, still has to fit.
    while at - start < MAX_NAME {
        match piece(message, at)? {
            Piece::Root => return Some(at + 1),
            Piece::Label(size) => at += size,
            Piece::Pointer(_) => return Some(at + 2),
            Piece::Reserved(_) => return None,
        }
    }
    None
}

/// Steps that are left for following the names of one message: labels and pointers. Four for each octet: a record has 11 at
/// least, and names of more than 40 labels in each of them are nobody's.
pub(super) struct Steps(usize);

impl Steps {
    pub(super) fn of(message: &[u8]) -> Self {
        Self(4 * message.len())
    }

    /// Follows the name at `start`, and shows each of its labels with its length octet. Whether it is a name: its pointers
    /// lead to a prior place in the message (RFC 1035, section 4.1.4), each before the last one, and `label` likes its
    /// labels.
    pub(super) fn follow(&mut self, message: &[u8], start: usize, mut label: impl FnMut(&[u8]) -> bool) -> bool {
        let (mut at, mut before, mut octets, mut hops) = (start, start, 0, 0);
        while self.0 > 0 {
            self.0 -= 1;
            match piece(message, at) {
                Some(Piece::Root) => return true,
                Some(Piece::Label(size)) => {
                    octets += size;
                    // The root still has to fit.
                    if octets >= MAX_NAME || !message.get(at..at + size).is_some_and(&mut label) {
                        return false;
                    }
                    at += size;
                }
                Some(Piece::Pointer(target)) if hops < MAX_HOPS && (MIN_MESSAGE..before).contains(&target) => {
                    hops += 1;
                    (at, before) = (target, target);
                }
                _ => return false,
            }
        }
        false
    }
}

/// A part of a message that holds records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Answer,
    Authority,
    Additional,
}

/// A record's place in its message.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) section: Section,
    /// Where its owner begins, and ends.
    pub(super) owner: Range<usize>,
    pub(super) rtype: u16,
    pub(super) class: u16,
    pub(super) ttl: u32,
    pub(super) data: Range<usize>,
}

impl Record {
    /// The one that begins at `at`, if all of it is there.
    fn read(message: &[u8], at: usize, section: Section) -> Option<Self> {
        let fixed = name_end(message, at)?;
        let [t1, t0, c1, c0, ttl @ .., l1, l0] = *message.get(fixed..)?.first_chunk::<FIXED>()?;
        let start = fixed + FIXED;
        let data = start..start + usize::from(u16::from_be_bytes([l1, l0]));
        let (rtype, class) = (u16::from_be_bytes([t1, t0]), u16::from_be_bytes([c1, c0]));
        let record = Self { section, owner: at..fixed, rtype, class, ttl: u32::from_be_bytes(ttl), data };
        (record.data.end <= message.len()).then_some(record)
    }
}

/// The records that the header of a message announces, in order. None stands for one that cannot be read; it is the last.
/// Each has 11 octets at least, so this ends with the message, whatever its header says.
#[derive(Clone, Debug)]
pub(super) struct Records<'a> {
    message: &'a [u8],
    /// Where the next one begins, or the octets behind the last one.
    at: usize,
    left: [u16; 3],
}

impl<'a> Records<'a> {
    /// Those of `message`, which begin at `at`.
    fn from(message: &'a [u8], at: usize) -> Option<Self> {
        let [_, answers, authorities, additional] = counts(message)?;
        Some(Self { message, at, left: [answers, authorities, additional] })
    }

    /// Those of `message`. None if its questions cannot be read.
    pub(super) fn of(message: &'a [u8]) -> Option<Self> {
        let [questions, ..] = counts(message)?;
        let end = (0..questions).try_fold(MIN_MESSAGE, |at, _| end_of_question(message, at))?;
        Self::from(message, end)
    }

    /// Where the next record begins; once all are read, where the last one ends.
    pub(super) fn at(&self) -> usize {
        self.at
    }
}

impl Iterator for Records<'_> {
    type Item = Option<Record>;

    fn next(&mut self) -> Option<Option<Record>> {
        let sections = [Section::Answer, Section::Authority, Section::Additional];
        let (section, left) = sections.into_iter().zip(&mut self.left).find(|(_, left)| **left > 0)?;
        *left -= 1;
        let record = Record::read(self.message, self.at, section);
        match &record {
            Some(record) => self.at = record.data.end,
            None => self.left = [0; 3],
        }
        Some(record)
    }
}

/// QDCOUNT, ANCOUNT, NSCOUNT and ARCOUNT (RFC 1035, section 4.1.1).
pub(super) fn counts(message: &[u8]) -> Option<[u16; 4]> {
    let [_, _, _, _, counts @ ..] = message.first_chunk::<MIN_MESSAGE>()?;
    let (counts, _) = counts.as_chunks::<2>();
    counts.as_array().map(|counts| counts.map(u16::from_be_bytes))
}

fn end_of_question(message: &[u8], at: usize) -> Option<usize> {
    let end = name_end(message, at)? + TYPE_AND_CLASS;
    (end <= message.len()).then_some(end)
}

/// Whether a message that a client sends can be walked through, from its first question to its last record: all questions
/// and records that its header announces are there, each with a name. Octets behind the last one do not matter, nor what is
/// in the records. `first` is the message's first question, if it has been read already.
///
/// A server may close the connection on which a message comes that it cannot read (PowerDNS Recursor does), and with it go
/// the queries of everybody who shares it. So such a message is answered before it gets there.
pub(crate) fn are_readable(message: &[u8], first: Option<&Question<'_>>) -> bool {
    let Some([questions, ..]) = counts(message) else { return false };
    let (start, read) = first.map_or((MIN_MESSAGE, 0), |first| (first.end, 1));
    let mut steps = Steps::of(message);
    let mut is_name = |at| steps.follow(message, at, |_| true);
    let behind = (read..questions).try_fold(start, |at, _| end_of_question(message, at).filter(|_| is_name(at)));
    let records = behind.and_then(|at| Records::from(message, at));
    records.is_some_and(|mut records| records.all(|record| record.is_some_and(|record| is_name(record.owner.start))))
}

/// What the fuzz targets count.
pub(crate) mod work {
    #[cfg(any(test, fuzzing))]
    thread_local! {
        static DONE: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    }

    /// So many steps were done: pieces of names and options read, octets compared.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn count(steps: usize) {
        DONE.set(DONE.get() + steps);
    }

    /// Nobody counts.
    #[cfg(not(any(test, fuzzing)))]
    pub(crate) const fn count(_: usize) {}

    /// The steps that this takes.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn of<T>(work: impl FnOnce() -> T) -> usize {
        let before = DONE.get();
        work();
        DONE.get() - before
    }
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;

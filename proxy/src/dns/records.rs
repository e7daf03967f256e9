//! Whether the records of a query can be walked through to the last one.
//!
//! A server may close the connection on which a message comes that it cannot read (PowerDNS Recursor does), and with it go
//! the queries of everybody who shares it. So such a query is answered before it gets there. What is in the records is not
//! looked at.

use super::frame::MIN_MESSAGE;
use super::message::{MAX_LABEL, MAX_NAME, Question};

/// Octets of TYPE, CLASS, TTL and RDLENGTH together (RFC 1035, section 4.1.3).
const FIXED: usize = 10;

/// Whether all records that the header of `message` announces are there behind its only question, each with an owner that
/// is a name. Octets behind the last one do not matter.
pub(crate) fn are_readable(message: &[u8], question: &Question<'_>) -> bool {
    let (before, additional) = question.records;
    let mut records = 0..before + u32::from(additional);
    // A record has 11 octets at least, so this ends with the message, whatever its header says.
    records.try_fold(question.end, |at, _| end_of_record(message, at)).is_some()
}

fn end_of_record(message: &[u8], at: usize) -> Option<usize> {
    let fixed = end_of_name(message, at)?;
    let [.., high, low] = *message.get(fixed..)?.first_chunk::<FIXED>()?;
    let end = fixed + FIXED + usize::from(u16::from_be_bytes([high, low]));
    (end <= message.len()).then_some(end)
}

/// Pointers must lead to a prior place in the message (RFC 1035, section 4.1.4), each before the last one, so this ends.
fn end_of_name(message: &[u8], start: usize) -> Option<usize> {
    let (mut at, mut before, mut octets, mut end) = (start, start, 0, None);
    loop {
        match *message.get(at)? {
            0 => return Some(end.unwrap_or(at + 1)),
            length @ 1..=MAX_LABEL => {
                let label = 1 + usize::from(length);
                (at, octets) = (at + label, octets + label);
                // The closing zero still has to fit.
                if octets >= MAX_NAME {
                    return None;
                }
            }
            high @ 0xc0.. => {
                let target = usize::from(u16::from_be_bytes([high & 0x3f, *message.get(at + 1)?]));
                if !(MIN_MESSAGE..before).contains(&target) {
                    return None;
                }
                end = end.or(Some(at + 2));
                (at, before) = (target, target);
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use proptest::prelude::*;

    use super::*;
    use crate::dns::message::first_question;

    /// A query for `a.` with so many records announced in each section, and these octets behind the question.
    fn query(counts: [u8; 3], records: &[u8]) -> Vec<u8> {
        let [answers, authorities, additional] = counts;
        let mut query = vec![0, 1, 1, 0, 0, 1, 0, answers, 0, authorities, 0, additional];
        query.extend_from_slice(b"\x01a\0\0\x01\0\x01");
        query.extend_from_slice(records);
        query
    }

    fn readable(counts: [u8; 3], records: &[u8]) -> bool {
        let query = query(counts, records);
        let question = first_question(&query).expect("a question").expect("that can be read");
        are_readable(&query, &question)
    }

    const OPT: &[u8] = b"\0\0\x29\x04\xd0\0\0\0\0\0\x04abcd";

    #[test]
    fn all_that_is_announced_must_be_there() {
        assert!(readable([0; 3], b"") && readable([0; 3], b"octets behind it"));
        assert!(readable([0, 0, 1], OPT) && readable([0, 0, 1], &[OPT, b"more"].concat()));
        let three = [b"\xc0\x0c", &OPT[1..], b"\x01b\xc0\x0c", &OPT[1..], OPT].concat();
        assert!(readable([1; 3], &three) && readable([3, 0, 0], &three) && !readable([2, 1, 1], &three));
        for cut in 0..OPT.len() {
            assert!(!readable([0, 0, 1], &OPT[..cut]), "{cut}");
        }
    }

    #[test]
    fn owners_must_be_names() {
        let owner = |name: &[u8]| readable([0, 0, 1], &[name, &OPT[1..]].concat());
        let label = [&[63][..], &[b'x'; 63]].concat();
        let name = |last: usize| [&label.repeat(3)[..], &[last as u8], &vec![b'x'; last], b"\0"].concat();
        assert!(owner(&name(61)) && !owner(&name(62)), "255 octets");
        // Into the header, to itself, beyond itself.
        for pointer in [b"\xc0\x00", b"\xc0\x0b", b"\xc0\x13", b"\xc0\x14", b"\xff\xff"] {
            assert!(!owner(pointer), "{pointer:02x?}");
        }
        assert!(owner(b"\xc0\x0c") && owner(b"\xc0\x0e") && !owner(b"\x41x\0") && !owner(b"\x80"));
        assert!(!owner(b"\x01b\xc0\x13"), "round and round");
    }

    proptest! {
        #[test]
        fn any_octets_are_walked_without_a_panic(
            counts in prop::array::uniform3(0..4u8),
            records in prop::collection::vec(prop_oneof![Just(0), Just(0xc0), any::<u8>()], 0..80),
        ) {
            if readable(counts, &records) {
                prop_assert!(records.len() >= 11 * counts.iter().map(|count| usize::from(*count)).sum::<usize>());
            }
        }
    }
}

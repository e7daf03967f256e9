//! Whether a message that a client sends can be walked through, from its first question to its last record.
//!
//! A server may close the connection on which a message comes that it cannot read (PowerDNS Recursor does), and with it go
//! the queries of everybody who shares it. So such a message is answered before it gets there. What is in the records is not
//! looked at.

use super::edns::FIXED;
use super::frame::MIN_MESSAGE;
use super::message::{MAX_LABEL, MAX_NAME, Question, TYPE_AND_CLASS};

/// Whether all questions and records that the header announces are there, each with a name. Octets behind the last one do
/// not matter. `first` is the message's first question, if it has been read already.
pub(crate) fn are_readable(message: &[u8], first: Option<&Question<'_>>) -> bool {
    let Some([_, _, _, _, counts @ ..]) = message.first_chunk::<MIN_MESSAGE>() else { return false };
    let (counts, _) = counts.as_chunks::<2>();
    let [questions, records @ ..] = counts else { return false };
    let (start, read) = first.map_or((MIN_MESSAGE, 0), |first| (first.end, 1));
    let mut questions = read..u16::from_be_bytes(*questions);
    let mut records = 0..records.iter().map(|count| u32::from(u16::from_be_bytes(*count))).sum();
    // Each has some octets, so this ends with the message, whatever its header says.
    let behind = questions.try_fold(start, |at, _| end_of_question(message, at));
    behind.and_then(|at| records.try_fold(at, |at, _: u32| end_of_record(message, at))).is_some()
}

fn end_of_question(message: &[u8], at: usize) -> Option<usize> {
    let end = end_of_name(message, at)? + TYPE_AND_CLASS;
    (end <= message.len()).then_some(end)
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
    use proptest::prelude::*;

    use super::super::message::first_question;
    use super::MIN_MESSAGE;

    /// A query for `a.` with so many records announced in each section, and these octets behind the question.
    fn query(counts: [u8; 3], records: &[u8]) -> Vec<u8> {
        let [answers, authorities, additional] = counts;
        let mut query = vec![0, 1, 1, 0, 0, 1, 0, answers, 0, authorities, 0, additional];
        query.extend_from_slice(b"\x01a\0\0\x01\0\x01");
        query.extend_from_slice(records);
        query
    }

    /// Whether or not the first question has been read before.
    fn are_readable(message: &[u8]) -> bool {
        let first = first_question(message).and_then(Result::ok);
        let readable = super::are_readable(message, None);
        assert_eq!(super::are_readable(message, first.as_ref()), readable, "{message:02x?}");
        readable
    }

    fn readable(counts: [u8; 3], records: &[u8]) -> bool {
        are_readable(&query(counts, records))
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
    fn there_may_be_any_number_of_questions() {
        let with = |count: u8, octets: &[u8]| {
            let mut message = [&query([0, 0, 1], b"")[..MIN_MESSAGE], octets].concat();
            message[5] = count;
            are_readable(&message)
        };
        let question = b"\x01a\0\0\x01\0\x01";
        assert!(with(0, OPT) && with(1, &[question, OPT].concat()) && with(2, &[question, question, OPT].concat()));
        assert!(!with(0, b"") && !with(2, &[question, OPT].concat()) && !with(1, &question[..6]));
        assert!(!with(1, b"\xc0\x0c\0\x01\0\x01") && !are_readable(&[0; 11]) && are_readable(&[0; 12]));
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

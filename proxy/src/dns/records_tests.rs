//! Messages that can be walked through, by example; and the work that a walk takes, for the worst that can be sent.

use proptest::prelude::*;

use super::super::message::first_question;
use super::super::{synth, transfer};
use super::{MAX_HOPS, MIN_MESSAGE, work};

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

/// A query of up to 65,535 octets: a record whose data are `chain`, and then as many as fit whose owner is `owner`, given
/// where the chain begins. Each of those has this type and these data.
fn at_length(chain: &[u8], owner: impl Fn(usize) -> Vec<u8>, rtype: u16, data: &[u8]) -> Vec<u8> {
    let fixed = |rtype: u16, length: usize| {
        [&rtype.to_be_bytes()[..], &[0, 1, 0, 0, 0, 0], &(length as u16).to_be_bytes()].concat()
    };
    // An IXFR, so that those who look at SOAs look.
    let mut message = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, 251, 0, 1];
    message.push(0);
    message.extend(fixed(65_280, chain.len()));
    let begins = message.len();
    message.extend_from_slice(chain);
    let one = [&owner(begins)[..], &fixed(rtype, data.len()), data].concat();
    let count = (65_535 - message.len()) / one.len();
    message.extend(one.repeat(count));
    // In the authority section.
    message[8..10].copy_from_slice(&(count as u16 + 1).to_be_bytes());
    message
}

/// So many pointers, each to the one before, the first to a root. As many octets in all as there is room for them.
fn pointers(count: usize) -> Vec<u8> {
    let begins = 19 + 11;
    let mut chain = vec![0];
    for number in 0..count {
        let last = begins + if number == 0 { 0 } else { 1 + 2 * (number - 1) };
        chain.extend_from_slice(&(0xc000 | last as u16).to_be_bytes());
    }
    chain
}

/// A pointer to the last one of these.
fn to_the_last(count: usize) -> impl Fn(usize) -> Vec<u8> {
    move |begins| (0xc000 | (begins + 2 * count - 1) as u16).to_be_bytes().to_vec()
}

#[test]
fn a_name_has_a_hundred_pointers_at_most() {
    let with = |count: usize| super::are_readable(&at_length(&pointers(count), to_the_last(count), 1, b"")[..], None);
    // The last pointer is the owner's.
    assert!(!with(MAX_HOPS));
    let few = |count: usize| {
        let mut message = at_length(&pointers(count), to_the_last(count), 1, b"");
        message[8..10].copy_from_slice(&[0, 2]);
        are_readable(&message)
    };
    assert!(few(1) && few(MAX_HOPS - 1) && !few(MAX_HOPS) && !few(8_000));
}

/// All in all, no more pointers and labels are followed than a few for each octet.
#[test]
fn following_names_ends_with_the_steps_of_the_message() {
    assert!(super::are_readable(&at_length(&pointers(40), to_the_last(40), 1, b""), None));
    assert!(!super::are_readable(&at_length(&pointers(80), to_the_last(80), 1, b""), None));
    // Names of as many labels as there can be.
    let long = [b"\x01x".repeat(127), vec![0]].concat();
    let to_the_first = |begins: usize| (0xc000 | begins as u16).to_be_bytes().to_vec();
    assert!(!super::are_readable(&at_length(&long, to_the_first, 1, b""), None));
    let name = [b"\x01x".repeat(34), vec![0]].concat();
    assert!(super::are_readable(&at_length(&name, to_the_first, 1, b""), None), "all the names of ip6.arpa");
}

/// The worst that a client can send costs a few steps for each octet, whoever walks through it.
#[test]
fn work_grows_with_the_octets_and_no_faster() {
    let long = [b"\x01a".repeat(127), vec![0]].concat();
    let to_the_first = |begins: usize| (0xc000 | begins as u16).to_be_bytes().to_vec();
    let soa = [&[0, 0][..], &[0; 20]].concat();
    let all = [
        at_length(&pointers(8_176), to_the_last(8_176), 65_280, b""),
        at_length(&pointers(99), to_the_last(99), 6, &soa),
        at_length(&pointers(40), to_the_last(40), 6, b""),
        at_length(&long, to_the_first, 6, &soa),
        at_length(&[0], |_| b"\0".to_vec(), 41, b""),
        at_length(&[0], |_| [[1, b'x'].repeat(127), vec![0]].concat(), 1, b""),
    ];
    for (number, message) in all.iter().enumerate() {
        crate::fuzzing::question(message);
        crate::fuzzing::hop(message);
        let question = first_question(message).and_then(Result::ok);
        let walk = work::of(|| super::are_readable(message, question.as_ref()));
        let own = work::of(|| synth::servfail(message));
        let ixfr = question.map_or(0, |question| work::of(|| transfer::request(message, &question)));
        println!("{number}: {} octets, {walk} steps to walk, {own} to answer, {ixfr} as IXFR", message.len());
        let bound = 6 * message.len();
        assert!(walk <= bound && own <= bound && ixfr <= bound, "{number}");
    }
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

#![expect(clippy::unwrap_used, reason = "tests panic")]

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::rdata::{A, CNAME, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::dns::frame::append;

const PASS: Treatment = Treatment { keepalive: Keepalive::Pass, pads: false };
const TAKE_OUT: Treatment = Treatment { keepalive: Keepalive::TakeOut, pads: false };
const REPLACE: Treatment = Treatment { keepalive: Keepalive::Replace, pads: false };
const TELL: Treatment = Treatment { keepalive: Keepalive::Tell, pads: false };
const PAD: Treatment = Treatment { keepalive: Keepalive::Pass, pads: true };

/// `www.example. A`, with these counts and behind it these records.
fn message(counts: [u8; 3], records: &[&[u8]]) -> Vec<u8> {
    let [an, ns, ar] = counts;
    let head = [0xbe, 0xef, 1, 0, 0, 1, 0, an, 0, ns, 0, ar];
    [&head[..], b"\x03www\x07example\0\0\x01\0\x01", &records.concat()].concat()
}

fn record(kind: u16, data: &[u8]) -> Vec<u8> {
    [&[0][..], &kind.to_be_bytes(), &[4, 208, 0, 0, 0x80, 0], &(data.len() as u16).to_be_bytes(), data].concat()
}

fn opt(options: &[(u16, &[u8])]) -> Vec<u8> {
    let option =
        |(code, value): &(u16, &[u8])| [&code.to_be_bytes()[..], &(value.len() as u16).to_be_bytes(), value].concat();
    record(41, &options.iter().flat_map(option).collect::<Vec<_>>())
}

fn asked(query: &[u8]) -> Result<Treatment, HasValue> {
    super::asked(query, Scope { keepalive: true, padding: false })
}

fn taken(mut query: Vec<u8>) -> Vec<u8> {
    take_out(&mut query);
    query
}

/// What `treat` makes of an answer, and the backend's value.
fn told(answer: &[u8], timeout: u16, treatment: Treatment) -> (Vec<u8>, Option<u16>) {
    let mut out = Vec::new();
    assert!(append(&mut out, answer));
    let theirs = treat(&mut out, 0, timeout, treatment);
    assert_eq!(usize::from(u16::from_be_bytes([out[0], out[1]])), out.len() - 2);
    (out.split_off(2), theirs)
}

#[test]
fn rfc7828_3_2_1_a_query_asks_with_an_empty_option() {
    let asked_with = |options: &[(u16, &[u8])]| asked(&message([0, 0, 1], &[&opt(options)]));
    assert_eq!(asked_with(&[(11, b"")]), Ok(TELL));
    assert_eq!(asked_with(&[(10, b"cookies!"), (11, b""), (12, b"\0")]), Ok(TELL));
    assert_eq!(asked_with(&[]), Ok(REPLACE));
    assert_eq!(asked_with(&[(10, b"cookies!")]), Ok(REPLACE));
    assert_eq!(asked(&message([0; 3], &[])), Ok(TAKE_OUT), "no OPT record");
    for value in [&b"\0"[..], b"\0\x64", b"\0\x64\0"] {
        assert_eq!(asked_with(&[(11, value)]), Err(HasValue));
        assert_eq!(asked_with(&[(11, b""), (11, value)]), Err(HasValue));
    }
}

#[test]
fn what_is_taken_out_of_a_query_is_that_option_alone() {
    let query = |options: &[(u16, &[u8])]| message([0, 0, 1], &[&opt(options)]);
    assert_eq!(taken(query(&[(11, b"")])), query(&[]));
    let others: &[(u16, &[u8])] = &[(10, b"cookies!"), (12, b"\0\0")];
    assert_eq!(taken(query(&[others[0], (11, b""), others[1], (11, b"")])), query(others));
    assert_eq!(taken(query(others)), query(others));
}

#[test]
fn an_answer_is_told_the_time() {
    let answer = |options: &[(u16, &[u8])]| message([0, 0, 1], &[&opt(options)]);
    assert_eq!(told(&answer(&[]), 0x0102, TELL), (answer(&[(11, b"\x01\x02")]), None));
    assert_eq!(told(&answer(&[(3, b"id")]), 100, TELL), (answer(&[(3, b"id"), (11, b"\0\x64")]), None));
    assert_eq!(told(&answer(&[]), 100, REPLACE), (answer(&[]), None), "it did not ask");
    for treatment in [REPLACE, TELL] {
        let (mine, theirs) = told(&answer(&[(11, b"\x0f\xff"), (3, b"id")]), 100, treatment);
        assert_eq!((mine, theirs), (answer(&[(11, b"\0\x64"), (3, b"id")]), Some(0xfff)));
    }
    let without = message([0; 3], &[]);
    assert_eq!(told(&without, 100, TELL), (without, None), "no OPT record, so it is not told");
}

/// RFC 7828 section 3: never on signed messages; RFC 8945 section 5.5 forbids to change them.
#[test]
fn rfc8945_5_5_signed_messages_are_nobody_s_to_change() {
    let asks = opt(&[(11, b"")]);
    let tsig = record(250, b"\0");
    let sig0 = record(24, &[0; 20]);
    for signature in [&tsig, &sig0] {
        let signed = message([0, 0, 2], &[&asks, signature]);
        assert_eq!(asked(&signed), Ok(PASS));
        assert_eq!(taken(signed.clone()), signed);
        let answer = message([0, 0, 2], &[&opt(&[(11, b"\0\x01")]), signature]);
        for treatment in [TELL, TAKE_OUT, PAD] {
            assert_eq!(told(&answer, 100, treatment), (answer.clone(), None));
        }
    }
    // A SIG record that covers a type is data like any other.
    let data = message([0, 0, 2], &[&record(24, &[1; 20]), &asks]);
    assert_eq!(asked(&data), Ok(TELL));
}

#[test]
fn what_is_not_understood_to_its_last_octet_passes() {
    let asks = opt(&[(11, b"")]);
    let mut claims_more = message([0, 0, 2], &[&asks]);
    let mut trailing = message([0, 0, 1], &[&asks]);
    trailing.push(0);
    let twice = message([0, 0, 2], &[&asks, &asks]);
    let in_answer = message([1, 0, 0], &[&asks]);
    let in_authority = message([0, 1, 0], &[&asks]);
    let overlong = message([0, 0, 1], &[&record(41, b"\0\x0b\0\x01")]);
    let half = message([0, 0, 1], &[&record(41, b"\0\x0b\0")]);
    for odd in [&mut claims_more, &mut trailing, &mut twice.clone(), &mut in_answer.clone()] {
        assert_eq!(asked(odd), Ok(PASS), "{odd:02x?}");
    }
    for odd in [claims_more, trailing, twice, in_answer, in_authority, overlong, half] {
        assert_eq!(asked(&odd), Ok(PASS), "{odd:02x?}");
        assert_eq!(taken(odd.clone()), odd);
        assert_eq!(told(&odd, 100, TELL), (odd, None));
    }
    let whole = message([0, 0, 1], &[&asks]);
    for end in 0..whole.len() {
        assert_eq!(asked(&whole[..end]), Ok(PASS), "cut at {end}");
    }
}

/// A record behind OPT may hold a pointer to a place behind OPT: nothing is moved there.
#[test]
fn an_opt_record_that_is_not_the_last_one_keeps_its_length() {
    let address = record(1, &[192, 0, 2, 1]);
    let query = message([0, 0, 2], &[&opt(&[(11, b"")]), &address]);
    assert_eq!(asked(&query), Ok(TELL));
    assert_eq!(taken(query.clone()), query);
    let answer = |value| message([0, 0, 2], &[&opt(&[(11, value)]), &address]);
    assert_eq!(told(&answer(b"\0\x01"), 0x0203, TELL), (answer(b"\x02\x03"), Some(1)));
    let without = message([0, 0, 2], &[&opt(&[]), &address]);
    assert_eq!(told(&without, 100, TELL), (without, None));
}

#[test]
fn no_answer_grows_past_65_535_octets() {
    let answer = |filling: usize| message([0, 0, 2], &[&record(10, &vec![0; filling]), &opt(&[])]);
    let rest = MAX_MESSAGE - answer(0).len();
    assert_eq!(told(&answer(rest - 6), 100, TELL).0.len(), MAX_MESSAGE);
    for filling in rest - 5..=rest {
        let full = answer(filling);
        assert_eq!(told(&full, 100, TELL), (full, None));
    }
}

/// RFC 7828 section 3.3.2: whoever sends no OPT record is told no time, though a backend should volunteer one.
#[test]
fn rfc7828_3_3_2_what_a_backend_volunteers_is_taken_out() {
    let answer = |options: &[(u16, &[u8])]| message([0, 0, 1], &[&opt(options)]);
    assert_eq!(told(&answer(&[(11, b"\x0f\xff")]), 100, TAKE_OUT), (answer(&[]), Some(0xfff)));
    let (others, all) = ([(3, &b"id"[..]), (12, b"")], [(3, &b"id"[..]), (11, b"\0\x01"), (12, b"")]);
    assert_eq!(told(&answer(&all), 100, TAKE_OUT), (answer(&others), Some(1)));
    assert_eq!(told(&answer(&others), 100, TAKE_OUT), (answer(&others), None));
    // Where that would move a record it is our own time.
    let address = record(1, &[192, 0, 2, 1]);
    let before = |value| message([0, 0, 2], &[&opt(&[(11, value)]), &address]);
    assert_eq!(told(&before(b"\0\x01"), 0x0203, TAKE_OUT), (before(b"\x02\x03"), Some(1)));
}

/// RFC 7830 section 4: an answer to a query with Padding is padded, to blocks of RFC 8467 section 4.1.
#[test]
fn rfc7830_4_answers_are_padded_to_blocks_if_the_query_asks_for_it() {
    let query = |options: &[(u16, &[u8])]| message([0, 0, 1], &[&opt(options)]);
    for (scope, pads) in [(Scope { keepalive: false, padding: true }, true), (Scope::default(), false)] {
        assert_eq!(super::asked(&query(&[(12, b"")]), scope).map(|treatment| treatment.pads), Ok(pads));
        assert_eq!(super::asked(&query(&[(10, b"cookies!")]), scope), Ok(PASS));
        assert_eq!(super::asked(&message([0; 3], &[]), scope), Ok(PASS));
    }
    let answer = |filling: usize| message([0, 0, 2], &[&record(10, &vec![7; filling]), &opt(&[])]);
    let head = answer(0).len();
    for (filling, octets) in [(0, 468), (464 - head, 468), (465 - head, 936), (468 - head, 936), (60_000, 60_372)] {
        let (padded, _) = told(&answer(filling), 0, PAD);
        assert_eq!(padded.len(), octets, "{filling}");
        let padding = octets - answer(filling).len() - 4;
        let mut whole = answer(filling);
        whole.truncate(whole.len() - 2);
        whole.extend_from_slice(&((padding + 4) as u16).to_be_bytes());
        whole.extend_from_slice(&[0, 12]);
        whole.extend_from_slice(&(padding as u16).to_be_bytes());
        whole.resize(octets, 0);
        assert_eq!(padded, whole, "nothing else changes");
    }
    // The backend's own padding was for another connection.
    let theirs = message([0, 0, 1], &[&opt(&[(3, b"id"), (12, &[9; 300]), (15, b"\0\x16")])]);
    let ours = told(&theirs, 0, PAD).0;
    assert_eq!(ours.len(), 468);
    assert!(!ours.contains(&9), "{ours:02x?}");
    let told_too = told(&theirs, 100, Treatment { keepalive: Keepalive::Tell, pads: true }).0;
    assert!(told_too.len() == 468 && told_too != ours);
}

/// RFC 7830 section 4: no more than fits.
#[test]
fn rfc7830_4_padding_ends_at_65_535_octets() {
    let answer = |filling: usize| message([0, 0, 2], &[&record(10, &vec![7; filling]), &opt(&[])]);
    let head = answer(0).len();
    for (octets, padded) in [(65_516, 65_520), (65_517, 65_535), (65_531, 65_535), (65_532, 65_532), (65_535, 65_535)] {
        assert_eq!(told(&answer(octets - head), 0, PAD).0.len(), padded, "{octets}");
    }
}

prop_compose! {
    /// A message as hickory writes it, names compressed, with an OPT record.
    fn written()(
        opcode in 0u8..16,
        answers in vec(("[a-z]{1,9}", any::<[u8; 4]>()), 0..5),
        texts in vec("[ -~]{0,30}", 0..3),
        options in vec((prop_oneof![Just(11u16), Just(12), 10..14u16, 65001..65003u16], vec(any::<u8>(), 0..4)), 0..6),
        edns: bool,
    ) -> Vec<u8> {
        let zone = Name::from_ascii("Zone.Example.").unwrap();
        let mut message = Message::new(7, MessageType::Response, OpCode::from_u8(opcode));
        message.add_query(Query::query(zone.clone(), RecordType::A));
        for (label, address) in answers {
            let owner = zone.prepend_label(label).unwrap();
            message.add_answer(Record::from_rdata(zone.clone(), 60, RData::CNAME(CNAME(owner.clone()))));
            message.add_additional(Record::from_rdata(owner, 60, RData::A(A(address.into()))));
        }
        for text in texts {
            message.add_authority(Record::from_rdata(zone.clone(), 60, RData::TXT(TXT::new(vec![text]))));
        }
        if edns {
            let mut edns = Edns::new();
            options.into_iter().for_each(|(code, value)| edns.options_mut().insert(EdnsOption::Unknown(code, value)));
            message.edns = Some(edns);
        }
        message.to_vec().unwrap()
    }
}

proptest! {
    #[test]
    fn hickory_reads_the_same_before_and_after(message in written()) {
        crate::fuzzing::hop(&message);
    }

    #[test]
    fn any_octets_and_any_cut_are_left_in_one_piece(message in written(), cut: prop::sample::Index, octet: u8) {
        let mut message = message;
        let at = cut.index(message.len());
        crate::fuzzing::hop(&message[..at]);
        message[at] = octet;
        crate::fuzzing::hop(&message);
    }
}

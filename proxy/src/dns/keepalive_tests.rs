#![expect(clippy::unwrap_used, reason = "tests panic")]

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::rdata::{A, CNAME, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::dns::frame::append;

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

fn taken(mut query: Vec<u8>) -> Vec<u8> {
    take_out(&mut query);
    query
}

/// What `tell` makes of an answer, and the backend's value.
fn told(answer: &[u8], timeout: u16, treatment: Treatment) -> (Vec<u8>, Option<u16>) {
    let mut out = Vec::new();
    assert!(append(&mut out, answer));
    let theirs = tell(&mut out, 0, timeout, treatment);
    assert_eq!(usize::from(u16::from_be_bytes([out[0], out[1]])), out.len() - 2);
    (out.split_off(2), theirs)
}

#[test]
fn rfc7828_3_2_1_a_query_asks_with_an_empty_option() {
    let asked_with = |options: &[(u16, &[u8])]| asked(&message([0, 0, 1], &[&opt(options)]));
    assert_eq!(asked_with(&[(11, b"")]), Ok(Treatment::Tell));
    assert_eq!(asked_with(&[(10, b"cookies!"), (11, b""), (12, b"\0")]), Ok(Treatment::Tell));
    assert_eq!(asked_with(&[]), Ok(Treatment::Replace));
    assert_eq!(asked_with(&[(10, b"cookies!")]), Ok(Treatment::Replace));
    assert_eq!(asked(&message([0; 3], &[])), Ok(Treatment::Pass), "no OPT record");
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
    assert_eq!(told(&answer(&[]), 0x0102, Treatment::Tell), (answer(&[(11, b"\x01\x02")]), None));
    assert_eq!(told(&answer(&[(3, b"id")]), 100, Treatment::Tell), (answer(&[(3, b"id"), (11, b"\0\x64")]), None));
    assert_eq!(told(&answer(&[]), 100, Treatment::Replace), (answer(&[]), None), "it did not ask");
    for treatment in [Treatment::Replace, Treatment::Tell] {
        let (mine, theirs) = told(&answer(&[(11, b"\x0f\xff"), (3, b"id")]), 100, treatment);
        assert_eq!((mine, theirs), (answer(&[(11, b"\0\x64"), (3, b"id")]), Some(0xfff)));
    }
    let without = message([0; 3], &[]);
    assert_eq!(told(&without, 100, Treatment::Tell), (without, None), "no OPT record, so it is not told");
}

/// RFC 7828 section 3: never on signed messages; RFC 8945 section 5.5 forbids to change them.
#[test]
fn rfc8945_5_5_signed_messages_are_nobody_s_to_change() {
    let asks = opt(&[(11, b"")]);
    let tsig = record(250, b"\0");
    let sig0 = record(24, &[0; 20]);
    for signature in [&tsig, &sig0] {
        let signed = message([0, 0, 2], &[&asks, signature]);
        assert_eq!(asked(&signed), Ok(Treatment::Pass));
        assert_eq!(taken(signed.clone()), signed);
        let answer = message([0, 0, 2], &[&opt(&[(11, b"\0\x01")]), signature]);
        assert_eq!(told(&answer, 100, Treatment::Tell), (answer, None));
    }
    // A SIG record that covers a type is data like any other.
    let data = message([0, 0, 2], &[&record(24, &[1; 20]), &asks]);
    assert_eq!(asked(&data), Ok(Treatment::Tell));
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
        assert_eq!(asked(odd), Ok(Treatment::Pass), "{odd:02x?}");
    }
    for odd in [claims_more, trailing, twice, in_answer, in_authority, overlong, half] {
        assert_eq!(asked(&odd), Ok(Treatment::Pass), "{odd:02x?}");
        assert_eq!(taken(odd.clone()), odd);
        assert_eq!(told(&odd, 100, Treatment::Tell), (odd, None));
    }
    let whole = message([0, 0, 1], &[&asks]);
    for end in 0..whole.len() {
        assert_eq!(asked(&whole[..end]), Ok(Treatment::Pass), "cut at {end}");
    }
}

/// A record behind OPT may hold a pointer to a place behind OPT: nothing is moved there.
#[test]
fn an_opt_record_that_is_not_the_last_one_keeps_its_length() {
    let address = record(1, &[192, 0, 2, 1]);
    let query = message([0, 0, 2], &[&opt(&[(11, b"")]), &address]);
    assert_eq!(asked(&query), Ok(Treatment::Tell));
    assert_eq!(taken(query.clone()), query);
    let answer = |value| message([0, 0, 2], &[&opt(&[(11, value)]), &address]);
    assert_eq!(told(&answer(b"\0\x01"), 0x0203, Treatment::Tell), (answer(b"\x02\x03"), Some(1)));
    let without = message([0, 0, 2], &[&opt(&[]), &address]);
    assert_eq!(told(&without, 100, Treatment::Tell), (without, None));
}

#[test]
fn no_answer_grows_past_65_535_octets() {
    let answer = |filling: usize| message([0, 0, 2], &[&record(10, &vec![0; filling]), &opt(&[])]);
    let rest = MAX_MESSAGE - answer(0).len();
    assert_eq!(told(&answer(rest - 6), 100, Treatment::Tell).0.len(), MAX_MESSAGE);
    for filling in rest - 5..=rest {
        let full = answer(filling);
        assert_eq!(told(&full, 100, Treatment::Tell), (full, None));
    }
}

prop_compose! {
    /// A message as hickory writes it, names compressed, with an OPT record.
    fn written()(
        opcode in 0u8..16,
        answers in vec(("[a-z]{1,9}", any::<[u8; 4]>()), 0..5),
        texts in vec("[ -~]{0,30}", 0..3),
        options in vec((prop_oneof![Just(11u16), 10..14u16, 65001..65003u16], vec(any::<u8>(), 0..4)), 0..6),
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
        crate::fuzzing::keepalive(&message);
    }

    #[test]
    fn any_octets_and_any_cut_are_left_in_one_piece(message in written(), cut: prop::sample::Index, octet: u8) {
        let mut message = message;
        let at = cut.index(message.len());
        crate::fuzzing::keepalive(&message[..at]);
        message[at] = octet;
        crate::fuzzing::keepalive(&message);
    }
}

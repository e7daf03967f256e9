//! The end of zone transfers, by example and against the model of the fuzz target.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use proptest::prelude::*;

use super::*;
use crate::dns::message::first_question;

const ZONE: &[u8] = b"\x04zone\x07example\x00";

fn query(qtype: u16, questions: u8, authority: &[u8]) -> Vec<u8> {
    let mut query = vec![0, 7, 0, 0, 0, questions, 0, 0, 0, u8::from(!authority.is_empty()), 0, 0];
    for _ in 0..questions {
        query.extend_from_slice(ZONE);
        query.extend_from_slice(&qtype.to_be_bytes());
        query.extend_from_slice(&[0, 1]);
    }
    query.extend_from_slice(authority);
    query
}

fn asked(query: &[u8]) -> Result<Request, RequestError> {
    request(query, &first_question(query).unwrap().unwrap())
}

fn record(owner: &[u8], rtype: u16, data: &[u8]) -> Vec<u8> {
    let mut record = owner.to_vec();
    record.extend_from_slice(&rtype.to_be_bytes());
    record.extend_from_slice(&[0, 1, 0, 0, 0, 60]);
    record.extend_from_slice(&(data.len() as u16).to_be_bytes());
    record.extend_from_slice(data);
    record
}

/// A SOA of the zone whose names are compressed.
fn soa(serial: u32) -> Vec<u8> {
    let mut data = b"\x02ns\xc0\x0c\x01h\xc0\x0c".to_vec();
    data.extend_from_slice(&serial.to_be_bytes());
    data.extend_from_slice(&[0; 16]);
    record(b"\xc0\x0c", SOA, &data)
}

fn host() -> Vec<u8> {
    record(b"\x01a\xc0\x0c", 1, &[192, 0, 2, 1])
}

fn answer(records: &[Vec<u8>]) -> Vec<u8> {
    let mut answer = query(AXFR, 1, &[]);
    (answer[2], answer[7]) = (0x84, u8::try_from(records.len()).unwrap());
    answer.extend(records.concat());
    answer
}

/// What each message does; after the first that does not want more, none is looked at.
fn run(request: Request, messages: &[Vec<u8>]) -> Vec<Result<Step, StreamError>> {
    let query = query(AXFR, 1, &[]);
    let question = first_question(&query).unwrap().unwrap();
    let mut stream = Stream::new(request);
    messages.iter().map(|message| stream.message(&question, message)).collect()
}

const MORE: Result<Step, StreamError> = Ok(Step::More);
const COMPLETE: Result<Step, StreamError> = Ok(Step::Done(End::Complete));
const UP_TO_DATE: Result<Step, StreamError> = Ok(Step::Done(End::UpToDate));
const DECLINED: Result<Step, StreamError> = Ok(Step::Done(End::Declined));
const SINCE_3: Request = Request::Ixfr { serial: 3 };

/// RFC 5936 section 2.2: from SOA to SOA, in as many messages as the server likes.
#[test]
fn a_full_transfer_ends_with_its_second_soa() {
    let axfr = Request::Axfr;
    assert_eq!(run(axfr, &[answer(&[soa(9), host(), soa(9)])]), [COMPLETE]);
    let one_record_each = [soa(9), host(), host(), soa(9)].map(|record| answer(&[record]));
    assert_eq!(run(axfr, &one_record_each), [MORE, MORE, MORE, COMPLETE]);
    assert_eq!(run(axfr, &[answer(&[soa(9)]), answer(&[]), answer(&[soa(9), host()])]), [MORE, MORE, COMPLETE]);
    assert_eq!(run(axfr, &[answer(&[host(), soa(9)])]), [Err(StreamError::NoSoa)]);
}

/// Only the zone's own SOA counts: not one of its parent, of a child, or of another class.
#[test]
fn a_soa_of_another_name_ends_nothing() {
    let data = &soa(9)[12..];
    for owner in [&b"\x00"[..], b"\xc0\x11", b"\x01x\xc0\x0c", b"\x04zonf\xc0\x11", b"\x05zonee\xc0\x11", b"\xc0\x0e"] {
        let foreign = record(owner, SOA, data);
        assert_eq!(run(Request::Axfr, &[answer(&[soa(9), foreign.clone()])]), [MORE], "{owner:x?}");
        assert_eq!(run(Request::Axfr, &[answer(&[foreign])]), [Err(StreamError::NoSoa)], "{owner:x?}");
    }
    let mut chaos = soa(9);
    chaos[5] = 3;
    assert_eq!(run(Request::Axfr, &[answer(&[soa(9), chaos])]), [MORE]);
    for owner in [&b"\x04ZONE\x07eXample\x00"[..], b"\x04zone\xc0\x11"] {
        assert_eq!(run(Request::Axfr, &[answer(&[soa(9), record(owner, SOA, data)])]), [COMPLETE], "{owner:x?}");
    }
}

/// RFC 1995 section 4.
#[test]
fn an_incremental_transfer_ends_with_the_newest_soa_in_the_place_of_a_sequence() {
    let sequences = [soa(9), soa(3), host(), soa(5), host(), soa(5), soa(9), host(), soa(9)];
    assert_eq!(run(SINCE_3, &[answer(&sequences)]), [COMPLETE]);
    let split = sequences.map(|record| answer(&[record]));
    let steps = run(SINCE_3, &split);
    assert_eq!((steps[..8].to_vec(), steps[8]), (vec![MORE; 8], COMPLETE));
    // In the manner of AXFR, and of a zone without any other record.
    assert_eq!(run(SINCE_3, &[answer(&[soa(9), host()]), answer(&[host(), soa(9)])]), [MORE, COMPLETE]);
    assert_eq!(run(SINCE_3, &[answer(&[soa(9), soa(9)])]), [COMPLETE]);
    // Two SOAs that are the begin of a sequence.
    assert_eq!(run(SINCE_3, &[answer(&[soa(9), soa(3)])]), [MORE]);
}

/// RFC 1995 section 2 and RFC 1982 section 3.2.
#[test]
fn one_soa_says_that_the_client_is_up_to_date() {
    let alone = |serial, newest| run(Request::Ixfr { serial }, &[answer(&[soa(newest)])])[0];
    assert_eq!((alone(9, 9), alone(9, 8), alone(9, 10)), (UP_TO_DATE, UP_TO_DATE, MORE));
    assert_eq!((alone(2, u32::MAX), alone(u32::MAX, 2)), (UP_TO_DATE, MORE), "past zero");
    assert_eq!((alone(0, 1 << 31), alone(1 << 31, 0)), (MORE, MORE), "neither is the greater one");
    assert_eq!(run(Request::Axfr, &[answer(&[soa(9)])]), [MORE]);
    // Only if nothing else is there.
    assert_eq!(run(Request::Ixfr { serial: 9 }, &[answer(&[soa(9), host()])]), [MORE]);
}

#[test]
fn an_error_or_nothing_at_all_is_the_end() {
    let mut refused = answer(&[]);
    refused[3] = 5;
    assert_eq!(run(SINCE_3, &[refused.clone()]), [DECLINED]);
    assert_eq!(run(Request::Axfr, &[answer(&[soa(9), host()]), refused]), [MORE, DECLINED]);
    assert_eq!(run(Request::Axfr, &[answer(&[])]), [DECLINED]);
    // Without a question: an error to a query that could not be read (RFC 5936 section 2.2.2).
    let bare = vec![0, 7, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(run(Request::Axfr, &[bare]), [DECLINED]);
}

#[test]
fn what_cannot_be_read_is_an_error_at_every_cut() {
    let whole = answer(&[soa(9), host(), soa(9)]);
    let end = whole.len();
    for cut in 0..end {
        assert_eq!(run(Request::Axfr, &[whole[..cut].to_vec()]), [Err(StreamError::Unreadable)], "{cut}");
    }
    // Behind the answers nothing is read (TSIG, OPT, or whatever).
    assert_eq!(run(Request::Axfr, &[[whole, vec![0xff; 9]].concat()]), [COMPLETE]);
    let long_data = record(b"\xc0\x0c", SOA, &[&soa(9)[12..], &[0]].concat());
    assert_eq!(run(Request::Axfr, &[answer(&[long_data])]), [Err(StreamError::Unreadable)]);
    let reserved = record(b"\x80", SOA, &soa(9)[12..]);
    assert_eq!(run(Request::Axfr, &[answer(&[reserved])]), [Err(StreamError::Unreadable)]);
    // A pointer to itself is skipped like any; the name is not the zone's.
    let loops = record(&[0xc0, u8::try_from(query(AXFR, 1, &[]).len()).unwrap()], SOA, &soa(9)[12..]);
    assert_eq!(run(Request::Axfr, &[answer(&[loops])]), [Err(StreamError::NoSoa)]);
}

/// RFC 1995 section 3; CVE-2026-40209 is what became of dnsdist when it could not read the SOA.
#[test]
fn a_query_says_what_it_asks_for() {
    assert_eq!(asked(&query(AXFR, 1, &[])), Ok(Request::Axfr));
    assert_eq!(asked(&query(AXFR, 2, &[])), Err(RequestError::Questions(2)));
    let good = query(IXFR, 1, &soa(0xdead_beef));
    assert_eq!(asked(&good), Ok(Request::Ixfr { serial: 0xdead_beef }));
    assert_eq!(asked(&query(IXFR, 1, &[])), Err(RequestError::Soa));
    for cut in query(IXFR, 1, &[]).len()..good.len() {
        assert_eq!(asked(&good[..cut]), Err(RequestError::Soa), "{cut}");
    }
    for other in [host(), record(b"\x00", SOA, &soa(1)[12..]), record(b"\xc0\x0c", SOA, &[0; 5])] {
        assert_eq!(asked(&query(IXFR, 1, &other)), Err(RequestError::Soa));
    }
}

proptest! {
    #[test]
    fn agrees_with_the_model(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        crate::fuzzing::transfer(&bytes);
    }

    /// Few serials, and nearly only records: longer streams, and more that end.
    #[test]
    fn agrees_with_the_model_on_long_streams(
        request in prop_oneof![Just(vec![0]), (0..4u8).prop_map(|serial| vec![255, serial])],
        steps in prop::collection::vec(
            prop_oneof![
                3 => (0..4u8, 0..4u8).prop_map(|(form, serial)| vec![1 | form << 3, serial]),
                3 => (0..32u8).prop_map(|form| vec![5 | form << 3]),
                1 => (0..2u8).prop_map(|form| vec![3 | form << 3]),
                2 => Just(vec![0]),
            ],
            0..60,
        ),
    ) {
        crate::fuzzing::transfer(&[request, steps.concat()].concat());
    }
}

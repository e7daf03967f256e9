#![expect(clippy::expect_used, reason = "tests panic")]

use super::*;
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{DNSClass, Name, RecordType};
use proptest::collection::vec;
use proptest::prelude::*;

/// Names of any octets, of at most 255 octets on the wire.
fn labels() -> impl Strategy<Value = Vec<Vec<u8>>> {
    vec(vec(any::<u8>(), 1..=63), 0..8).prop_map(|mut labels| {
        while labels.iter().map(|label| label.len() + 1).sum::<usize>() >= MAX_NAME {
            labels.pop();
        }
        labels
    })
}

fn name(labels: &[Vec<u8>]) -> Name {
    let mut name = Name::root();
    for label in labels {
        name = name.append_label(label.as_slice()).expect("a valid label");
    }
    name.set_fqdn(true);
    name
}

fn message(id: u16, kind: MessageType, labels: &[Vec<u8>], qtype: u16, qclass: u16) -> Vec<u8> {
    let mut message = Message::new(id, kind, OpCode::Query);
    let mut query = Query::query(name(labels), RecordType::from(qtype));
    query.set_query_class(DNSClass::from(qclass));
    message.add_query(query);
    message.to_vec().expect("a message of one question")
}

fn header(qdcount: u16) -> Vec<u8> {
    let mut bytes = vec![0xab, 0xcd, 0x01, 0x00];
    bytes.extend_from_slice(&qdcount.to_be_bytes());
    bytes.extend_from_slice(&[0; 6]);
    bytes
}

fn question_after(qdcount: u16, section: &[u8]) -> Option<Result<(Vec<u8>, usize), QuestionError>> {
    let mut bytes = header(qdcount);
    bytes.extend_from_slice(section);
    first_question(&bytes).map(|result| result.map(|q| (q.name_wire.to_vec(), q.end)))
}

#[test]
fn a_message_without_question_has_none() {
    assert_eq!(question_after(0, b"\x01a\0\0\x01\0\x01"), None);
    assert_eq!(first_question(&[0; 11]), None);
    assert_eq!(peek(&[0; 11]), None);
}

#[test]
fn malformed_questions_are_named() {
    use QuestionError::*;
    for (section, error) in [
        (&b""[..], Truncated),
        (b"\x03ab", Truncated),
        (b"\x02ab", Truncated),
        (b"\x02ab\0\0\x01\0", Truncated),
        (b"\xc0\x0c\0\x01\0\x01", Pointer),
        (b"\x02ab\xc0\x00\0\x01\0\x01", Pointer),
        (b"\x40ab\0\0\x01\0\x01", ReservedLabel(0x40)),
        (b"\x81ab\0\0\x01\0\x01", ReservedLabel(0x80)),
    ] {
        assert_eq!(question_after(1, section), Some(Err(error)), "{section:?}");
    }
}

#[test]
fn a_name_of_255_octets_passes_and_256_do_not() {
    let build = |last: u8| {
        let mut section = Vec::new();
        for length in [63, 63, 63, last] {
            section.push(length);
            section.extend(std::iter::repeat_n(b'x', usize::from(length)));
        }
        section.extend_from_slice(b"\0\0\x01\0\x01");
        section
    };
    let longest = question_after(1, &build(61)).expect("a question").expect("valid");
    assert_eq!(longest.0.len(), MAX_NAME);
    assert_eq!(longest.1, MIN_MESSAGE + MAX_NAME + 4);
    assert_eq!(question_after(1, &build(62)), Some(Err(QuestionError::NameTooLong)));
}

#[test]
fn presentation_format() {
    let text = |section: &[u8]| {
        let mut bytes = header(1);
        bytes.extend_from_slice(section);
        let mut out = Vec::new();
        first_question(&bytes).expect("a question").expect("valid").write_name(&mut out);
        String::from_utf8(out).expect("ASCII")
    };
    assert_eq!(text(b"\0\0\x01\0\x01"), ".");
    assert_eq!(text(b"\x03WwW\x07example\0\0\x01\0\x01"), "WwW.example");
    assert_eq!(text(b"\x05a.b\\ \x02\x07\xff\0\0\x01\0\x01"), r"a\.b\\\032.\007\255");
}

#[test]
fn labels_count_from_one() {
    let mut bytes = header(1);
    bytes.extend_from_slice(b"\x03www\x07example\0\0\x01\0\x01");
    let question = first_question(&bytes).expect("a question").expect("valid");
    assert_eq!(question.label(0), None);
    assert_eq!(question.label(1), Some(&b"www"[..]));
    assert_eq!(question.label(2), Some(&b"example"[..]));
    assert_eq!(question.label(3), None);
    assert_eq!(question.label(usize::MAX), None);
}

/// Servers that refuse an opcode send the message back without having read it, or its header.
#[test]
fn a_question_that_cannot_be_read_comes_back_as_it_was() {
    let mut query = header(1);
    query[2] = 2 << 3;
    query.extend_from_slice(b"\xc0\x0c\0\x01\0\x01");
    let mut answer = query.clone();
    (answer[2], answer[3]) = (query[2] | 0x80, 4);
    assert!(question_matches(&query, &answer) && question_matches(&query, &answer[..12]));
    for other in [message(1, MessageType::Response, &[b"a".to_vec()], 1, 1), [&answer[..], b"x"].concat()] {
        assert!(!question_matches(&query, &other));
    }
    answer[17] = 2;
    assert!(!question_matches(&query, &answer));
}

#[test]
fn an_answer_without_question_matches_and_a_second_question_does_not() {
    let query = message(1, MessageType::Query, &[b"a".to_vec()], 1, 1);
    assert!(question_matches(&query, &header(0)));
    let mut two = query.clone();
    two[5] = 2;
    two.extend_from_slice(b"\x01b\0\0\x01\0\x01");
    assert!(!question_matches(&query, &two));
    assert!(!question_matches(&header(0), &query));
    assert!(!question_matches(&query, &query[..11]));
}

#[test]
fn type_and_class_compare_exactly() {
    // 0x0041 and 0x0061 differ by the bit that tells 'A' from 'a'.
    let query = message(1, MessageType::Query, &[b"a".to_vec()], 0x41, 1);
    assert!(!question_matches(&query, &message(1, MessageType::Response, &[b"a".to_vec()], 0x61, 1)));
    let query = message(1, MessageType::Query, &[b"a".to_vec()], 1, 0x41);
    assert!(!question_matches(&query, &message(1, MessageType::Response, &[b"a".to_vec()], 1, 0x61)));
}

#[test]
fn set_id_touches_two_octets() {
    let mut bytes = header(1);
    set_id(&mut bytes, 0x1234);
    assert_eq!(bytes[..2], [0x12, 0x34]);
    assert_eq!(bytes[2..], header(1)[2..]);
    set_id(&mut [7], 1);
}

proptest! {
    #[test]
    fn peek_agrees_with_hickory(bytes in vec(any::<u8>(), 12..40)) {
        use hickory_proto::op::Header;
        use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
        let ours = peek(&bytes).expect("12 octets");
        let theirs = Header::read(&mut BinDecoder::new(&bytes)).expect("12 octets");
        prop_assert_eq!(ours.id, theirs.id);
        prop_assert_eq!(ours.qr, theirs.message_type == MessageType::Response);
        prop_assert_eq!(ours.opcode, u8::from(theirs.op_code));
        prop_assert_eq!(ours.tc, theirs.truncation);
        prop_assert_eq!(ours.rd, theirs.recursion_desired);
        prop_assert_eq!(ours.rcode, theirs.response_code.low());
        prop_assert_eq!(ours.qdcount, theirs.counts.queries);
    }

    #[test]
    fn questions_agree_with_hickory(
        id in any::<u16>(),
        labels in labels(),
        qtype in any::<u16>(),
        qclass in any::<u16>(),
        trailing in vec(any::<u8>(), 0..20),
    ) {
        let mut bytes = message(id, MessageType::Query, &labels, qtype, qclass);
        let end = bytes.len();
        bytes.extend_from_slice(&trailing);
        let question = first_question(&bytes).expect("a question").expect("valid");
        prop_assert_eq!(question.qtype, qtype);
        prop_assert_eq!(question.qclass, qclass);
        prop_assert_eq!(question.end, end);
        prop_assert_eq!(question.labels().collect::<Vec<_>>(), labels.iter().map(Vec::as_slice).collect::<Vec<_>>());
        prop_assert_eq!(question.label(2), labels.get(1).map(Vec::as_slice));
        let mut text = Vec::new();
        question.write_name(&mut text);
        prop_assert!(text.len() <= MAX_NAME_TEXT);
        prop_assert!(text.iter().all(|octet| (b'!'..=b'~').contains(octet)));
    }

    #[test]
    fn arbitrary_bytes_agree_with_hickory(bytes in vec(any::<u8>(), 0..600), small in any::<bool>()) {
        let mut bytes = bytes;
        // Half of the cases get length octets that are likely to form names.
        if small {
            bytes.iter_mut().skip(12).for_each(|octet| *octet %= 5);
        }
        crate::fuzzing::question(&bytes);
    }

    #[test]
    fn matching_agrees_with_hickory(
        labels in labels(),
        other in labels(),
        case in any::<u64>(),
        qtypes in (1u16..3, 1u16..3),
        qclasses in (1u16..3, 1u16..3),
        same in any::<bool>(),
    ) {
        let other: Vec<Vec<u8>> = if same { labels.clone() } else { other };
        let flipped: Vec<Vec<u8>> = other
            .iter()
            .map(|label| {
                let flip = |(i, octet): (usize, &u8)| match (case >> (i % 64)) & 1 {
                    1 if octet.is_ascii_alphabetic() => octet ^ 0x20,
                    _ => *octet,
                };
                label.iter().enumerate().map(flip).collect()
            })
            .collect();
        let query = message(1, MessageType::Query, &labels, qtypes.0, qclasses.0);
        let answer = message(2, MessageType::Response, &flipped, qtypes.1, qclasses.1);
        let theirs = Message::from_vec(&query).expect("valid").queries == Message::from_vec(&answer).expect("valid").queries;
        prop_assert_eq!(question_matches(&query, &answer), theirs);
    }
}

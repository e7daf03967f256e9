//! The answers that the forwarder gives itself, built by `hickory-proto`.
//!
//! Everything else passes unchanged; these are the exception. They copy ID, opcode, RD, CD and the question, and
//! carry an OPT record only if the query had one (RFC 6891, sections 6.1.1 and 7).

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use super::frame::MIN_MESSAGE;
use super::message::{first_question, peek};

/// The UDP payload size in our OPT record. Meaningless over TCP, but it has to be something (RFC 6891, section 6.2.3);
/// 1232 octets is what DNS Flag Day 2020 recommends.
const UDP_PAYLOAD: u16 = 1232;

/// The backend failed, or there was no time or room to ask it.
pub fn servfail(query: &[u8]) -> Vec<u8> {
    error_response(query, ResponseCode::ServFail)
}

/// The query cannot be read, or has more than one question (RFC 9619).
pub fn formerr(query: &[u8]) -> Vec<u8> {
    error_response(query, ResponseCode::FormErr)
}

/// The opcode is not forwarded: DSO, for one (RFC 8490, section 9.4).
pub fn notimp(query: &[u8]) -> Vec<u8> {
    error_response(query, ResponseCode::NotImp)
}

/// The query is refused by policy.
pub fn refused(query: &[u8]) -> Vec<u8> {
    error_response(query, ResponseCode::Refused)
}

/// An answer to `query` with `rcode` and no records.
///
/// Works with any octets. If what follows the question cannot be read, the answer has no OPT record; if the question
/// cannot be read either, or there are several, it has no question. Octets that are missing from the header count as
/// zero (`frame` lets no such message through).
pub fn error_response(query: &[u8], rcode: ResponseCode) -> Vec<u8> {
    let mut header = [0; MIN_MESSAGE];
    for (to, from) in header.iter_mut().zip(query) {
        *to = *from;
    }
    let id = u16::from_be_bytes([header[0], header[1]]);
    let mut answer = Message::new(id, MessageType::Response, OpCode::from_u8((header[2] >> 3) & 0x0f));
    answer.metadata.recursion_desired = header[2] & 0x01 != 0;
    answer.metadata.checking_disabled = header[3] & 0x10 != 0;
    answer.metadata.response_code = rcode;
    if let Some(question) = only_question(query) {
        answer.add_query(question);
    }
    if let Some(theirs) = edns(query) {
        let mut ours = Edns::new();
        ours.set_max_payload(UDP_PAYLOAD);
        // RFC 3225, section 3: the DO bit is copied.
        ours.set_dnssec_ok(theirs.flags().dnssec_ok);
        answer.edns = Some(ours);
    }
    // A header, a question that was just decoded and an empty OPT record have no reason to fail to encode; should
    // they, a bare header still answers.
    answer.to_vec().unwrap_or_else(|_| bare(header, rcode))
}

/// The OPT record of `query`, if all of it can be read. A message that claims many questions is not even tried: hickory
/// would reserve memory for all of them.
fn edns(query: &[u8]) -> Option<Edns> {
    if peek(query)?.qdcount > 1 {
        return None;
    }
    Message::from_vec(query).ok()?.edns
}

fn only_question(query: &[u8]) -> Option<Query> {
    if peek(query)?.qdcount != 1 {
        return None;
    }
    let end = first_question(query)?.ok()?.end;
    let section = query.get(MIN_MESSAGE..end)?;
    Query::read(&mut BinDecoder::new(section)).ok()
}

/// The header of `query` turned into that of an answer, all counts zero.
fn bare(header: [u8; MIN_MESSAGE], rcode: ResponseCode) -> Vec<u8> {
    let mut answer = vec![0; MIN_MESSAGE];
    answer[..2].copy_from_slice(&header[..2]);
    answer[2] = 0x80 | (header[2] & 0x79);
    answer[3] = (header[3] & 0x10) | rcode.low();
    answer
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use super::*;
    use crate::dns::message::question_matches;
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    fn query(opcode: OpCode, edns: bool) -> Message {
        let mut query = Message::new(0xbeef, MessageType::Query, opcode);
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(Name::from_ascii("wHo.Example.").expect("a name"), RecordType::AAAA));
        if edns {
            let mut edns = Edns::new();
            edns.set_dnssec_ok(true);
            query.edns = Some(edns);
        }
        query
    }

    #[test]
    fn servfail_copies_what_rfc_6891_and_1035_ask_for() {
        for edns in [false, true] {
            let query = query(OpCode::Query, edns);
            let bytes = query.to_vec().expect("valid");
            let raw = servfail(&bytes);
            let answer = Message::from_vec(&raw).expect("valid");
            assert_eq!(answer.id, 0xbeef);
            assert_eq!(answer.message_type, MessageType::Response);
            assert_eq!(answer.op_code, OpCode::Query);
            assert_eq!(answer.response_code, ResponseCode::ServFail);
            assert!(answer.recursion_desired && !answer.authoritative && !answer.truncation);
            assert!(answer.answers.is_empty() && answer.authorities.is_empty() && answer.additionals.is_empty());
            assert_eq!(answer.edns.is_some(), edns);
            assert_eq!(answer.edns.is_some_and(|opt| opt.flags().dnssec_ok), edns);
            // The case of the name too, for clients that use it as a nonce.
            let end = first_question(&bytes).expect("a question").expect("valid").end;
            assert_eq!(raw[12..end], bytes[12..end]);
        }
    }

    #[test]
    fn other_opcodes_and_codes_are_kept() {
        for (opcode, number) in [(OpCode::Notify, 4), (OpCode::Update, 5), (OpCode::Unknown(6), 6)] {
            let raw = notimp(&query(opcode, false).to_vec().expect("valid"));
            let peek = peek(&raw).expect("a header");
            assert_eq!((peek.opcode, peek.rcode, peek.qr), (number, 4, true));
        }
        let query = query(OpCode::Query, false).to_vec().expect("valid");
        assert_eq!(peek(&formerr(&query)).map(|peek| peek.rcode), Some(1));
        assert_eq!(peek(&refused(&query)).map(|peek| peek.rcode), Some(5));
    }

    #[test]
    fn an_unreadable_remainder_leaves_the_question() {
        let mut bytes = query(OpCode::Query, false).to_vec().expect("valid");
        bytes[11] = 3; // ARCOUNT, but no records
        bytes.extend_from_slice(&[0xc0, 0xff]);
        let answer = Message::from_vec(&servfail(&bytes)).expect("valid");
        assert_eq!(answer.queries.len(), 1);
        assert!(answer.edns.is_none());
    }

    #[test]
    fn the_bare_header_is_an_answer() {
        let raw = bare(*b"\xab\xcd\x7f\xff\0\x01\0\x02\0\x03\0\x04", ResponseCode::ServFail);
        assert_eq!(raw, b"\xab\xcd\xf9\x12\0\0\0\0\0\0\0\0");
    }

    proptest! {
        #[test]
        fn any_octets_get_a_valid_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200), one in any::<bool>()) {
            let mut bytes = bytes;
            if one && bytes.len() >= 12 {
                bytes[4..6].copy_from_slice(&[0, 1]);
                bytes.iter_mut().skip(12).for_each(|octet| *octet %= 5);
            }
            let raw = servfail(&bytes);
            let answer = Message::from_vec(&raw).expect("our answers can be read");
            prop_assert_eq!(answer.response_code, ResponseCode::ServFail);
            if let Some(asked) = peek(&bytes) {
                let answered = peek(&raw).expect("a header");
                prop_assert_eq!((answered.id, answered.opcode, answered.rd), (asked.id, asked.opcode, asked.rd));
                prop_assert!(answered.qr);
                prop_assert!(question_matches(&bytes, &raw));
            }
        }
    }
}

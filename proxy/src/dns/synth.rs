//! The answers that the forwarder gives itself.
//!
//! Everything else passes unchanged; these are the exception. They copy ID, opcode, RD, CD and the question, and carry an
//! OPT record only if the query had one (RFC 6891, sections 6.1.1 and 7), with an extended error (RFC 8914) in it. Of the
//! query no more is decoded: what is behind its question is walked through, for the OPT record.

use super::frame::MIN_MESSAGE;
use super::message::{first_question, peek};
use super::opt::{self, OPTION_HEAD};
use super::records::OPT;

/// The UDP payload size in our OPT record. Meaningless over TCP, but it has to be something (RFC 6891, section 6.2.3);
/// 1232 octets is what DNS Flag Day 2020 recommends.
const UDP_PAYLOAD: u16 = 1232;
/// The code of the option with an extended error (RFC 8914, section 2).
const EDE: u16 = 15;
/// Octets of INFO-CODE (RFC 8914, section 2).
const INFO_CODE: usize = 2;
/// QR in the third octet of a header (RFC 1035, section 4.1.1).
const QR: u8 = 0x80;
/// OPCODE and RD in the third octet of a header.
const OPCODE_AND_RD: u8 = 0x79;
/// CD in the fourth octet of a header (RFC 4035, section 3.2.2).
const CD: u8 = 0x10;

/// The response codes of our own answers (RFC 1035, section 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Rcode {
    /// The query cannot be read, or has more than one question (RFC 9619).
    FormErr = 1,
    /// The backend failed, or there was no time or room to ask it.
    ServFail = 2,
    /// The opcode is not forwarded: DSO, for one (RFC 8490, section 9.4).
    NotImp = 4,
    /// The query is refused by policy.
    Refused = 5,
}

/// The extended errors of our own answers (RFC 8914, section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum InfoCode {
    /// No other code fits; the text says what it is.
    Other = 0,
    /// The server cannot answer now, and may soon.
    NotReady = 14,
    /// The client may not ask this.
    Prohibited = 18,
    /// The operation is not supported.
    NotSupported = 21,
    /// None of those who could answer can be reached.
    NoReachableAuthority = 22,
    /// Communication with another server failed.
    NetworkError = 23,
}

impl InfoCode {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Other,
        Self::NotReady,
        Self::Prohibited,
        Self::NotSupported,
        Self::NoReachableAuthority,
        Self::NetworkError,
    ];

    /// Where it is in [`ALL`](Self::ALL).
    pub fn index(self) -> usize {
        // All of them are there.
        Self::ALL.iter().position(|code| *code == self).unwrap_or_default()
    }

    /// The label in metrics: the number, as tools for DNS show it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Other => "0",
            Self::NotReady => "14",
            Self::Prohibited => "18",
            Self::NotSupported => "21",
            Self::NoReachableAuthority => "22",
            Self::NetworkError => "23",
        }
    }
}

/// An extended error (RFC 8914, section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedError {
    /// INFO-CODE.
    pub code: InfoCode,
    /// EXTRA-TEXT, for people. It names nobody.
    pub text: &'static str,
}

/// An answer of our own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnAnswer {
    /// The message.
    pub message: Vec<u8>,
    /// The extended error that is in it; none if the query had no OPT record.
    pub error: Option<InfoCode>,
}

/// An answer with SERVFAIL, without more.
pub fn servfail(query: &[u8]) -> Vec<u8> {
    answer(query, Rcode::ServFail, None).message
}

/// An answer with FORMERR, without more.
pub fn formerr(query: &[u8]) -> Vec<u8> {
    answer(query, Rcode::FormErr, None).message
}

/// An answer with NOTIMP, without more.
pub fn notimp(query: &[u8]) -> Vec<u8> {
    answer(query, Rcode::NotImp, None).message
}

/// An answer with REFUSED, without more.
pub fn refused(query: &[u8]) -> Vec<u8> {
    answer(query, Rcode::Refused, None).message
}

/// An answer to `query` with this code and no records.
///
/// Works with any octets. If what follows the question cannot be read, the answer has no OPT record; if the question
/// cannot be read either, or there are several, it has no question. Octets that are missing from the header count as
/// zero (`frame` lets no such message through).
pub fn answer(query: &[u8], rcode: Rcode, error: Option<ExtendedError>) -> OwnAnswer {
    let mut header = [0; MIN_MESSAGE];
    for (to, from) in header.iter_mut().zip(query) {
        *to = *from;
    }
    let question = only_question(query);
    let opt = opt::of_query(query);
    let [id1, id0, flags, more, ..] = header;
    let mut message = vec![id1, id0, QR | flags & OPCODE_AND_RD, more & CD | rcode as u8];
    message.extend_from_slice(&[0, u8::from(question.is_some()), 0, 0, 0, 0, 0, u8::from(opt.is_some())]);
    message.extend_from_slice(question.unwrap_or_default());
    let error = error.filter(|_| opt.is_some());
    if let Some(opt) = opt {
        // RFC 3225, section 3: the DO bit is copied. Extended RCODE and version are 0.
        let flags = if opt.dnssec_ok { [0, 0, 0x80, 0] } else { [0; 4] };
        let option = error.map(|error| (EDE, INFO_CODE + error.text.len()));
        // Our texts are short.
        let length = option.map_or(0, |(_, length)| OPTION_HEAD + length) as u16;
        message.push(0);
        message.extend([OPT, UDP_PAYLOAD].into_iter().flat_map(u16::to_be_bytes));
        message.extend_from_slice(&flags);
        message.extend_from_slice(&length.to_be_bytes());
        if let (Some((code, length)), Some(error)) = (option, error) {
            message.extend([code, length as u16, error.code as u16].into_iter().flat_map(u16::to_be_bytes));
            message.extend_from_slice(error.text.as_bytes());
        }
    }
    OwnAnswer { message, error: error.map(|error| error.code) }
}

/// The question section of `query`, if it is one question that can be read.
fn only_question(query: &[u8]) -> Option<&[u8]> {
    if peek(query)?.qdcount != 1 {
        return None;
    }
    let end = first_question(query)?.ok()?.end;
    query.get(MIN_MESSAGE..end)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use super::*;
    use crate::close::FailReason;
    use crate::dns::message::question_matches;
    use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
    use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
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
            assert_eq!(answer.edns.is_some_and(|opt| opt.flags().dnssec_ok && opt.version() == 0), edns);
            // The case of the name too, for clients that use it as a nonce.
            let end = first_question(&bytes).expect("a question").expect("valid").end;
            assert_eq!(raw[12..end], bytes[12..end]);
        }
    }

    /// Each failure has a code and a text, which hickory reads, and the query's OPT record decides whether they are told.
    #[test]
    fn rfc8914_2_each_failure_has_an_extended_error_if_the_query_has_an_opt_record() {
        for reason in FailReason::ALL {
            let (rcode, error) = reason.answer();
            for edns in [false, true] {
                let query = query(OpCode::Query, edns).to_vec().expect("valid");
                let own = answer(&query, rcode, Some(error));
                assert_eq!(own.error, edns.then_some(error.code), "{reason:?}");
                let read = Message::from_vec(&own.message).expect("valid");
                assert_eq!(read.response_code.low(), rcode as u8);
                let told = read.edns.and_then(|edns| edns.option(EdnsCode::Unknown(EDE)).cloned());
                let value = [&(error.code as u16).to_be_bytes()[..], error.text.as_bytes()].concat();
                assert_eq!(told, edns.then_some(EdnsOption::Unknown(EDE, value)), "{reason:?}");
                assert!(own.message.len() < query.len() + 100 && !error.text.is_empty());
            }
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
    fn a_bare_header_is_answered_by_a_bare_header() {
        let raw = servfail(b"\xab\xcd\x7f\xff\0\x01\0\x02\0\x03\0\x04");
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

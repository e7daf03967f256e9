//! DNS messages as bytes: queries that the tests send, and the parts of answers that they check.

use hickory_proto::op::Message;
use hickory_proto::rr::RData;
use hickory_proto::serialize::binary::BinDecodable;

/// Octets of a DNS header (RFC 1035 section 4.1.1).
pub const HEADER_LEN: usize = 12;

/// Query types the tests use.
pub mod qtype {
    /// Host address.
    pub const A: u16 = 1;
    /// Text.
    pub const TXT: u16 = 16;
}

/// Response codes the tests look at.
pub mod rcode {
    /// No error.
    pub const NOERROR: u8 = 0;
    /// Server failure.
    pub const SERVFAIL: u8 = 2;
}

/// Type and class that end a question of class IN.
fn question(name: &str, qtype: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + 6);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        let len = u8::try_from(label.len()).ok().filter(|len| *len < 64).expect("a label has at most 63 octets");
        bytes.push(len);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend_from_slice(&qtype.to_be_bytes());
    bytes.extend_from_slice(&1_u16.to_be_bytes());
    bytes
}

/// A query with recursion desired, without the length prefix.
///
/// # Panics
/// If a label of `name` is too long.
pub fn query(id: u16, name: &str, qtype: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + name.len() + 6);
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes.extend_from_slice(&[0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0]);
    bytes.extend_from_slice(&question(name, qtype));
    bytes
}

/// Puts the two length octets in front (RFC 1035 section 4.2.2).
///
/// # Panics
/// If the message is longer than 65,535 octets.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).expect("a message fits its length prefix");
    let mut bytes = Vec::with_capacity(message.len() + 2);
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(message);
    bytes
}

/// The message ID.
///
/// # Panics
/// If there is no whole header.
pub fn id(message: &[u8]) -> u16 {
    u16::from_be_bytes([message[0], message[1]])
}

/// Is it a response?
///
/// # Panics
/// If there is no whole header.
pub fn is_response(message: &[u8]) -> bool {
    message[2] & 0x80 != 0
}

/// The response code (without EDNS extension).
///
/// # Panics
/// If there is no whole header.
pub fn response_code(message: &[u8]) -> u8 {
    message[3] & 0x0f
}

/// Does `answer` repeat the question of `query` octet by octet?
pub fn same_question(query: &[u8], answer: &[u8]) -> bool {
    let question = &query[HEADER_LEN..];
    answer.len() >= query.len()
        && answer[4..6] == query[4..6]
        && answer[HEADER_LEN..query.len()].eq_ignore_ascii_case(question)
}

/// The question's name as text, in lower case, without the final dot. For messages whose question is not compressed.
pub fn question_name(message: &[u8]) -> Option<String> {
    let mut labels = Vec::new();
    let mut rest = message.get(HEADER_LEN..)?;
    loop {
        let (len, tail) = rest.split_first()?;
        if *len == 0 {
            return Some(labels.join("."));
        }
        let (label, tail) = tail.split_at_checked(usize::from(*len))?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        rest = tail;
    }
}

/// An answer to `query` with one A record, as a server would send it.
pub fn answer_to(query: &[u8], address: [u8; 4]) -> Vec<u8> {
    let mut bytes = query.to_vec();
    bytes[2] |= 0x80;
    bytes[3] = 0x80;
    bytes[7] = 1;
    bytes.extend_from_slice(&[0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    bytes.extend_from_slice(&address);
    bytes
}

/// An answer to `query` with one TXT record.
///
/// # Panics
/// If the text is longer than 255 octets.
pub fn text_answer_to(query: &[u8], text: &str) -> Vec<u8> {
    let mut bytes = query.to_vec();
    bytes[2] |= 0x80;
    bytes[3] = 0x80;
    bytes[7] = 1;
    let len = u8::try_from(text.len()).expect("one character string");
    bytes.extend_from_slice(&[0xc0, 0x0c, 0, 16, 0, 1, 0, 0, 0, 60]);
    bytes.extend_from_slice(&(u16::from(len) + 1).to_be_bytes());
    bytes.push(len);
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// All character strings of all TXT records in the answer section.
///
/// # Panics
/// If the message does not parse.
pub fn texts(message: &[u8]) -> Vec<String> {
    let parsed = Message::from_bytes(message).unwrap_or_else(|e| panic!("{e}: {message:02x?}"));
    let records = parsed.answers.iter().filter_map(|record| match &record.data {
        RData::TXT(txt) => Some(&txt.txt_data),
        _ => None,
    });
    records.flatten().map(|text| String::from_utf8_lossy(text).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_parses_and_its_answer_repeats_the_question() {
        let query = query(0x1234, "n1.Example.test.", qtype::A);
        let parsed = Message::from_bytes(&query).unwrap();
        assert_eq!(parsed.queries[0].name().to_ascii(), "n1.Example.test.");
        let answer = answer_to(&query, [192, 0, 2, 1]);
        assert_eq!(Message::from_bytes(&answer).unwrap().answers.len(), 1);
        assert!(is_response(&answer) && same_question(&query, &answer));
        assert_eq!(question_name(&answer).as_deref(), Some("n1.example.test"));
        let other = answer_to(&super::query(0x1234, "n2.example.test.", qtype::A), [192, 0, 2, 1]);
        assert!(!same_question(&query, &other));
    }
}

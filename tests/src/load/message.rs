//! The one query shape of the benchmarks and its answer: `LABEL.example.test. A`, 47 octets, answered by 63.

/// Octets of the first label. It tells queries apart and carries what the answerer checks the PROXY header against.
pub const LABEL_LEN: usize = 16;
/// Octets of a query, without its length prefix.
pub const QUERY_LEN: usize = HEADER_LEN + 1 + LABEL_LEN + QUERY_TAIL.len();
/// Octets of an answer, without its length prefix.
pub const ANSWER_LEN: usize = QUERY_LEN + ANSWER_RECORD.len();
/// Where the first label of any query begins.
pub const LABEL_AT: usize = HEADER_LEN + 1;

const HEADER_LEN: usize = 12;
/// RD set, one question.
const QUERY_HEADER: [u8; 10] = [0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
/// QR, RD and RA set, NOERROR, one question and one answer.
const ANSWER_HEADER: [u8; 10] = [0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
const QUERY_TAIL: &[u8; 18] = b"\x07example\x04test\x00\x00\x01\x00\x01";
/// A compressed A record: name at offset 12, class IN, 60 seconds, 192.0.2.1.
const ANSWER_RECORD: [u8; 16] = [0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1];

/// A first label: 16 lower-case hexadecimal digits, the client's port in the first four.
pub type Label = [u8; LABEL_LEN];

/// The label of query `sequence` (48 bits) of the client at `port`.
#[must_use]
pub fn label(port: u16, sequence: u64) -> Label {
    let mut rest = (u64::from(port) << 48) | (sequence & 0xFFFF_FFFF_FFFF);
    let mut digits = [0; LABEL_LEN];
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(rest & 15) as usize];
        rest >>= 4;
    }
    digits
}

/// Appends a query with its length prefix (RFC 1035 section 4.2.2).
pub fn push_query(out: &mut Vec<u8>, id: u16, label: &Label) {
    let mut query = [0; 2 + QUERY_LEN];
    query[..2].copy_from_slice(&(QUERY_LEN as u16).to_be_bytes());
    query[2..4].copy_from_slice(&id.to_be_bytes());
    query[4..14].copy_from_slice(&QUERY_HEADER);
    query[14] = LABEL_LEN as u8;
    query[15..15 + LABEL_LEN].copy_from_slice(label);
    query[15 + LABEL_LEN..].copy_from_slice(QUERY_TAIL);
    out.extend_from_slice(&query);
}

/// Appends the answer to `query` with its length prefix.
///
/// # Errors
/// Says what is wrong with a message that is not a query with exactly one question.
pub fn push_answer(out: &mut Vec<u8>, query: &[u8]) -> Result<(), &'static str> {
    let end = question_end(query)?;
    let length = (end + ANSWER_RECORD.len()) as u16;
    out.extend_from_slice(&length.to_be_bytes());
    let start = out.len();
    out.extend_from_slice(&query[..end]);
    out[start + 2..start + HEADER_LEN].copy_from_slice(&ANSWER_HEADER);
    out.extend_from_slice(&ANSWER_RECORD);
    Ok(())
}

/// Appends the answer of a server that knows no other opcode than QUERY: a header alone, NOTIMP.
pub fn push_not_implemented(out: &mut Vec<u8>, query: &[u8]) {
    let Some([high, low, flags, ..]) = query.first_chunk::<HEADER_LEN>() else { return };
    out.extend_from_slice(&[0, HEADER_LEN as u8, *high, *low, flags | 0x80, 4]);
    out.extend_from_slice(&[0; 8]);
}

/// Makes the message at the end of `out`, which begins with its length prefix at `start`, so many octets long: zeros
/// follow its last record.
pub fn lengthen(out: &mut Vec<u8>, start: usize, octets: u16) {
    if let Some(prefix) = out.get_mut(start..start + 2) {
        prefix.copy_from_slice(&octets.to_be_bytes());
        out.resize(start + 2 + usize::from(octets), 0);
    }
}

/// The ID of a message.
#[must_use]
pub fn id(message: &[u8]) -> Option<u16> {
    message.first_chunk().map(|octets| u16::from_be_bytes(*octets))
}

/// The first label of a query, if it has the shape that [`push_query`] gives it.
#[must_use]
pub fn first_label(query: &[u8]) -> Option<&Label> {
    if query.get(HEADER_LEN).copied() == Some(LABEL_LEN as u8) { query.get(LABEL_AT..)?.first_chunk() } else { None }
}

/// Compares an answer octet by octet, ID apart, with the only right answer to the query for `label`.
///
/// # Errors
/// Names the first part that differs.
pub fn check_answer(answer: &[u8], label: &Label) -> Result<(), &'static str> {
    let tail = LABEL_AT + LABEL_LEN;
    if answer.len() != ANSWER_LEN {
        // A refusal by the proxy itself is short too: its code says more than its length.
        return Err(if answer.get(3).is_some_and(|flags| flags & 15 != 0) { "error code" } else { "length" });
    }
    if answer[2..HEADER_LEN] != ANSWER_HEADER {
        Err("header")
    } else if answer[HEADER_LEN] != LABEL_LEN as u8 || answer[LABEL_AT..tail] != *label {
        Err("question of another query")
    } else if answer[tail..tail + QUERY_TAIL.len()] != *QUERY_TAIL {
        Err("question")
    } else if answer[tail + QUERY_TAIL.len()..] != ANSWER_RECORD {
        Err("answer record")
    } else {
        Ok(())
    }
}

/// The offset behind the question of a query with exactly one.
fn question_end(query: &[u8]) -> Result<usize, &'static str> {
    let header: &[u8; HEADER_LEN] = query.first_chunk().ok_or("message shorter than a header")?;
    if header[2] & 0x80 != 0 {
        return Err("a response instead of a query");
    }
    if header[4..6] != [0, 1] {
        return Err("not one question");
    }
    let mut at = HEADER_LEN;
    loop {
        match query.get(at) {
            None => return Err("name beyond the end of the message"),
            Some(0) => break,
            Some(length @ 1..=63) => at += 1 + usize::from(*length),
            Some(_) => return Err("compressed name in a question"),
        }
    }
    let end = at + 5;
    if end > query.len() { Err("question beyond the end of the message") } else { Ok(end) }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use hickory_proto::op::Message;
    use hickory_proto::rr::RecordType;

    #[test]
    fn query_and_answer_have_the_sizes_of_the_benchmark() {
        assert_eq!((QUERY_LEN, ANSWER_LEN), (47, 63));
    }

    #[test]
    fn another_implementation_reads_the_query_and_the_answer() {
        let mut query = Vec::new();
        push_query(&mut query, 4711, &label(0xBEEF, 42));
        assert_eq!(query[..2], [0, 47]);
        let parsed = Message::from_vec(&query[2..]).unwrap();
        assert_eq!(parsed.id, 4711);
        assert_eq!(parsed.queries[0].name().to_string(), "beef00000000002a.example.test.");
        assert_eq!(parsed.queries[0].query_type(), RecordType::A);

        let mut answer = Vec::new();
        push_answer(&mut answer, &query[2..]).unwrap();
        assert_eq!(answer[..2], [0, 63]);
        let parsed = Message::from_vec(&answer[2..]).unwrap();
        assert_eq!((parsed.id, parsed.answers.len()), (4711, 1));
        assert_eq!(parsed.answers[0].data.to_string(), "192.0.2.1");
        check_answer(&answer[2..], &label(0xBEEF, 42)).unwrap();
    }

    #[test]
    fn every_octet_of_an_answer_counts() {
        let (mut query, mut answer) = (Vec::new(), Vec::new());
        push_query(&mut query, 1, &label(1, 1));
        push_answer(&mut answer, &query[2..]).unwrap();
        let answer = &mut answer[2..];
        for at in 2..answer.len() {
            answer[at] ^= 1;
            assert!(check_answer(answer, &label(1, 1)).is_err(), "octet {at} is not checked");
            answer[at] ^= 1;
        }
        assert_eq!(check_answer(&answer[..62], &label(1, 1)), Err("length"));
        assert_eq!(check_answer(&[0, 1, 0x81, 0x82], &label(1, 1)), Err("error code"));
        assert_eq!(check_answer(answer, &label(1, 2)), Err("question of another query"));
    }

    #[test]
    fn no_prefix_of_a_query_is_answered() {
        let mut query = Vec::new();
        push_query(&mut query, 1, &label(1, 1));
        for length in 0..QUERY_LEN {
            assert!(push_answer(&mut Vec::new(), &query[2..2 + length]).is_err(), "{length} octets");
        }
    }
}

//! edns-tcp-keepalive is taken out of queries and told in answers, and nothing else about them changes.

use hickory_proto::op::Message;
use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};

use crate::dns::frame::{MAX_MESSAGE, append};
use crate::dns::keepalive::{CODE, Treatment, asked, take_out, tell};

/// The time that is told.
const TIMEOUT: u16 = 0x1234;

/// Any octets as a query and as an answer, beside what hickory reads in them.
pub fn keepalive(bytes: &[u8]) {
    if bytes.len() > MAX_MESSAGE {
        return;
    }
    let treatment = asked(bytes);
    let mut query = bytes.to_vec();
    take_out(&mut query);
    if treatment == Ok(Treatment::Pass) {
        assert_eq!(query, bytes);
    }
    if query.len() < bytes.len() {
        assert_ne!(treatment, Ok(Treatment::Replace), "what is not there is not taken out");
        assert_eq!(asked(&query), Ok(Treatment::Replace), "nothing of it is left");
    }
    compare(bytes, &query);
    for treatment in [Treatment::Replace, Treatment::Tell] {
        answer(bytes, treatment);
    }
}

fn answer(bytes: &[u8], treatment: Treatment) {
    // Behind another answer.
    let mut before = vec![0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
    let start = before.len();
    assert!(append(&mut before, bytes));
    let mut after = before.clone();
    let theirs = tell(&mut after, start, TIMEOUT, treatment);
    assert_eq!(after[..start], before[..start]);
    let (length, told) = after[start..].split_at(2);
    assert_eq!(usize::from(u16::from_be_bytes([length[0], length[1]])), told.len());
    let added = told.len() - bytes.len();
    assert!(added == 0 || (added == 6 && treatment == Treatment::Tell && theirs.is_none()));
    if after != before {
        let mut again = after.clone();
        assert_eq!(tell(&mut again, start, TIMEOUT, treatment), Some(TIMEOUT));
        assert_eq!(again, after);
    }
    compare(bytes, told);
    let Ok(read) = Message::from_vec(told) else { return };
    if added > 0 || theirs.is_some() {
        let value = EdnsOption::Unknown(CODE, TIMEOUT.to_be_bytes().to_vec());
        let edns = read.edns.expect("an OPT record");
        assert!(edns.options().get_all(EdnsCode::Keepalive).contains(&&value));
    }
}

/// What hickory reads is the same but for the option; signed messages are the same to the last octet.
fn compare(before: &[u8], after: &[u8]) {
    let Ok(mut was) = Message::from_vec(before) else { return };
    let mut is = Message::from_vec(after).expect("it can be read as before");
    if was.signature.is_some() || was.edns.is_none() {
        assert_eq!(before, after);
    }
    for message in [&mut was, &mut is] {
        if let Some(edns) = &mut message.edns {
            edns.options_mut().remove(EdnsCode::Keepalive);
        }
    }
    assert_eq!(was, is);
}

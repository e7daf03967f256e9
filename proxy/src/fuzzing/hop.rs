//! The EDNS options that end at each hop: edns-tcp-keepalive is taken out of queries and told in answers, answers are padded,
//! and nothing else about them changes.

use hickory_proto::op::Message;
use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};

use super::LINEAR;
use crate::dns::frame::{MAX_MESSAGE, append};
use crate::dns::hop::{BLOCK, KEEPALIVE, Keepalive, Scope, Treatment, asked, take_out, treat};
use crate::dns::records::work;

/// The time that is told.
const TIMEOUT: u16 = 0x1234;

/// Any octets as a query and as an answer, beside what hickory reads in them.
pub fn hop(bytes: &[u8]) {
    if bytes.len() > MAX_MESSAGE {
        return;
    }
    let clear = asked(bytes, Scope::default());
    assert_eq!(clear, Ok(Treatment::default()), "nothing is looked at");
    for padding in [false, true] {
        query(bytes, Scope { keepalive: true, padding });
    }
    for keepalive in [Keepalive::Pass, Keepalive::TakeOut, Keepalive::Replace, Keepalive::Tell] {
        for pads in [false, true] {
            answer(bytes, Treatment { keepalive, pads });
        }
    }
}

fn query(bytes: &[u8], scope: Scope) {
    let treatment = asked(bytes, scope);
    assert!(!treatment.is_ok_and(|treatment| treatment.pads) || scope.padding);
    let keepalive = treatment.map(|treatment| treatment.keepalive);
    let mut query = bytes.to_vec();
    assert!(work::of(|| take_out(&mut query)) <= LINEAR.of(bytes));
    if matches!(keepalive, Ok(Keepalive::Pass | Keepalive::TakeOut)) {
        assert_eq!(query, bytes);
    }
    if query.len() < bytes.len() {
        assert_ne!(keepalive, Ok(Keepalive::Replace), "what is not there is not taken out");
        let again = asked(&query, scope).map(|treatment| treatment.keepalive);
        assert_eq!(again, Ok(Keepalive::Replace), "nothing of it is left");
    }
    compare(bytes, &query, &[EdnsCode::Keepalive]);
}

fn answer(bytes: &[u8], treatment: Treatment) {
    // Behind another answer.
    let mut before = vec![0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
    let start = before.len();
    assert!(append(&mut before, bytes));
    let mut after = before.clone();
    let mut theirs = None;
    let steps = work::of(|| theirs = treat(&mut after, start, TIMEOUT, treatment));
    assert!(steps <= LINEAR.of(bytes), "{steps}");
    assert_eq!(after[..start], before[..start]);
    let (length, told) = after[start..].split_at(2);
    assert_eq!(usize::from(u16::from_be_bytes([length[0], length[1]])), told.len());
    match treatment {
        Treatment { keepalive: Keepalive::Pass, pads: false } => assert_eq!(told, bytes),
        Treatment { keepalive: Keepalive::TakeOut, pads: false } => assert!(told.len() <= bytes.len()),
        Treatment { pads: false, .. } => {
            let added = told.len() - bytes.len();
            assert!(added == 0 || (added == 6 && treatment.keepalive == Keepalive::Tell && theirs.is_none()));
        }
        Treatment { pads: true, .. } => assert!(told.len() < bytes.len() + BLOCK + 10),
    }
    let mut again = after.clone();
    let theirs_again = treat(&mut again, start, TIMEOUT, treatment);
    if told.len() != bytes.len() || theirs.is_some() {
        assert_eq!(again, after, "once is enough");
        let is_told = matches!(treatment.keepalive, Keepalive::Replace | Keepalive::Tell) && theirs.is_some();
        assert!(!is_told || theirs_again == Some(TIMEOUT));
    }
    let untouched = [EdnsCode::Keepalive, EdnsCode::Padding];
    let changed = match treatment {
        Treatment { keepalive: Keepalive::Pass, pads: true } => &untouched[1..],
        Treatment { pads: true, .. } => &untouched[..],
        Treatment { pads: false, .. } => &untouched[..1],
    };
    compare(bytes, told, changed);
    let Ok(read) = Message::from_vec(told) else { return };
    let Some(edns) = read.edns else { return };
    if treatment.keepalive == Keepalive::Tell && told.len() > bytes.len() && !treatment.pads {
        let value = EdnsOption::Unknown(KEEPALIVE, TIMEOUT.to_be_bytes().to_vec());
        assert!(edns.options().get_all(EdnsCode::Keepalive).contains(&&value));
    }
    if treatment.pads && told != bytes {
        let padding = edns.options().get_all(EdnsCode::Padding).len();
        let is_full = told.len().is_multiple_of(BLOCK) || told.len() == MAX_MESSAGE;
        let has_no_room = padding == 0 && told.len() + 4 > MAX_MESSAGE;
        // Where OPT is not last, no more than a value is replaced.
        assert!(is_full && padding == 1 || has_no_room || told.len() == bytes.len(), "{} octets", told.len());
    }
}

/// What hickory reads is the same but for these options; signed messages are the same to the last octet.
fn compare(before: &[u8], after: &[u8], changed: &[EdnsCode]) {
    let Ok(mut was) = Message::from_vec(before) else { return };
    let mut is = Message::from_vec(after).expect("it can be read as before");
    if was.signature.is_some() || was.edns.is_none() {
        assert_eq!(before, after);
    }
    for message in [&mut was, &mut is] {
        if let Some(edns) = &mut message.edns {
            changed.iter().for_each(|code| edns.options_mut().remove(*code));
        }
    }
    assert_eq!(was, is);
}

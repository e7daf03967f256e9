//! The end of zone transfers: against a naive model that sees all records at once, and against what hickory reads.

use hickory_proto::op::Message;
use hickory_proto::rr::{RData, Record, RecordType};

use super::Script;
use crate::dns::message::{Question, first_question};
use crate::dns::rtype::{AXFR, IXFR};
use crate::dns::transfer::{End, Request, RequestError, Step, Stream, StreamError, is_transfer, request};

/// A record as the model sees it: a SOA of the zone with its serial, or anything else.
type Soa = Option<u32>;

/// The zone of all streams, as a question has it.
const ZONE: &[u8] = b"\x04zone\x07example\x00";

/// A message of a stream, as it goes over the wire and as the model sees it.
#[derive(Default)]
struct Part {
    rcode: u8,
    with_question: bool,
    answers: Vec<u8>,
    records: Vec<Soa>,
}

impl Part {
    fn message(&self) -> Vec<u8> {
        let mut message = vec![0, 7, 0x84, self.rcode, 0, u8::from(self.with_question)];
        message.extend_from_slice(&(self.records.len() as u16).to_be_bytes());
        // What follows the answers is not looked at.
        message.extend_from_slice(&[0, 0, 0, 9]);
        if self.with_question {
            message.extend_from_slice(&question(IXFR));
        }
        message.extend_from_slice(&self.answers);
        message
    }

    /// A record whose owner is written in one of four ways, and counts as this for the model.
    fn record(&mut self, form: u8, rtype: u16, data: &[u8], counts_as: Soa) {
        match form % 4 {
            // The pointer leads to the question's name.
            0 if self.with_question => self.answers.extend_from_slice(&[0xc0, 12]),
            1 => self.answers.extend_from_slice(&ZONE.to_ascii_uppercase()),
            2 if self.with_question => self.answers.extend_from_slice(b"\x04Zone\xc0\x11"),
            _ => self.answers.extend_from_slice(ZONE),
        }
        self.fixed(rtype, data, counts_as);
    }

    fn fixed(&mut self, rtype: u16, data: &[u8], counts_as: Soa) {
        self.answers.extend_from_slice(&rtype.to_be_bytes());
        self.answers.extend_from_slice(&[0, 1, 0, 0, 0, 60]);
        self.answers.extend_from_slice(&(data.len() as u16).to_be_bytes());
        self.answers.extend_from_slice(data);
        self.records.push(counts_as);
    }
}

fn question(qtype: u16) -> Vec<u8> {
    [ZONE, &qtype.to_be_bytes(), &[0, 1]].concat()
}

fn soa(serial: u32) -> Vec<u8> {
    let mut data = b"\x02ns\x00\x01h\x00".to_vec();
    data.extend_from_slice(&serial.to_be_bytes());
    data.extend_from_slice(&[0; 16]);
    data
}

/// Small numbers and, by the sign, those just below 2^32.
fn serial(octet: u8) -> u32 {
    i32::from(octet as i8) as u32
}

/// What the last of these messages does to the stream, all records in one row.
fn expected(request: Request, parts: &[Part]) -> Result<Step, StreamError> {
    let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(Step::More) };
    if last.rcode != 0 || first.records.is_empty() {
        return Ok(Step::Done(End::Declined));
    }
    let all: Vec<Soa> = parts.iter().flat_map(|part| &part.records).copied().collect();
    let serials: Vec<u32> = all.iter().copied().flatten().collect();
    let Some(newest) = all.first().copied().flatten() else { return Err(StreamError::NoSoa) };
    let is_incremental = request != Request::Axfr && all.get(1).is_some_and(Option::is_some);
    let complete = if is_incremental {
        // Every other SOA from the second on stands where a sequence begins, or where all of them end.
        serials.iter().skip(1).step_by(2).any(|serial| *serial == newest)
    } else {
        serials.len() > 1
    };
    let is_newest = |client: u32| (i64::from(client) - i64::from(newest)).rem_euclid(1 << 32) < 1 << 31;
    match request {
        _ if complete => Ok(Step::Done(End::Complete)),
        Request::Ixfr { serial } if parts.len() == 1 && all.len() == 1 && is_newest(serial) => {
            Ok(Step::Done(End::UpToDate))
        }
        _ => Ok(Step::More),
    }
}

/// Any stream that keeps to the form of messages ends where the model says; any bytes are read as hickory reads them.
pub fn transfer(bytes: &[u8]) {
    by_model(bytes);
    by_hickory(bytes);
}

fn by_model(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let request = match script.octet() {
        None | Some(0..=127) => Request::Axfr,
        Some(_) => Request::Ixfr { serial: serial(script.octet().unwrap_or(0)) },
    };
    let wire =
        [&[0; 5][..], &[1, 0, 0, 0, 0, 0, 0], &question(if request == Request::Axfr { AXFR } else { IXFR })].concat();
    let question = first_question(&wire).expect("a question").expect("a good one");
    let (mut stream, mut parts) = (Stream::new(request), Vec::new());
    loop {
        let (part, is_last) = next_part(&mut script, parts.is_empty());
        let message = part.message();
        parts.push(part);
        let expected = expected(request, &parts);
        let before = stream.messages();
        assert_eq!(stream.message(&question, &message), expected, "message {before}");
        assert_eq!(stream.messages(), before + u64::from(expected.is_ok()));
        if expected != Ok(Step::More) || is_last {
            return;
        }
    }
}

fn next_part(script: &mut Script<'_>, is_first: bool) -> (Part, bool) {
    let mut part = Part { with_question: is_first, ..Part::default() };
    while let Some(octet) = script.octet() {
        let form = octet >> 3;
        match octet & 7 {
            0 => return (part, false),
            1 | 2 => {
                let serial = serial(script.octet().unwrap_or(0));
                part.record(form, 6, &soa(serial), Some(serial));
            }
            // A SOA of another name, and one of which ours is the end.
            3 => {
                part.answers.extend_from_slice(if form & 1 == 0 { b"\x00" } else { b"\x01x\x04zone\x07example\x00" });
                part.fixed(6, &soa(1), None);
            }
            4 if form == 31 => part.rcode = 5,
            4 if part.answers.is_empty() && form & 1 == 1 => part.with_question = !part.with_question,
            _ => part.record(form, 1, &[192, 0, 2, form], None),
        }
        if part.answers.len() > 60_000 {
            break;
        }
    }
    (part, true)
}

fn by_hickory(bytes: &[u8]) {
    let Some(Ok(question)) = first_question(bytes) else { return };
    if is_transfer(question.qtype) {
        let ours = request(bytes, &question);
        if let Ok(theirs) = Message::from_vec(bytes) {
            assert_eq!(ours, request_by(&theirs, &question));
        }
    }
    for asked in [Request::Axfr, Request::Ixfr { serial: 5 }] {
        let mut stream = Stream::new(asked);
        let ours = stream.message(&question, bytes);
        let Ok(theirs) = Message::from_vec(bytes) else { continue };
        let Some(records) = theirs.answers.iter().map(|record| seen(record, &theirs)).collect() else { continue };
        let part = Part { rcode: bytes[3] & 15, records, ..Part::default() };
        assert_eq!(ours, expected(asked, &[part]));
    }
}

/// What hickory has for a SOA of the zone; none if it is a SOA without its data.
fn seen(record: &Record, message: &Message) -> Option<Soa> {
    let question = message.queries.first()?;
    let any = u16::from(question.query_class()) == 255;
    let ours = record.name == *question.name() && (any || record.dns_class == question.query_class());
    match &record.data {
        RData::SOA(soa) if ours => Some(Some(soa.serial)),
        _ if ours && record.record_type() == RecordType::SOA => None,
        _ => Some(None),
    }
}

fn request_by(message: &Message, question: &Question<'_>) -> Result<Request, RequestError> {
    if message.queries.len() != 1 {
        return Err(RequestError::Questions(message.queries.len() as u16));
    }
    if question.qtype == AXFR {
        return Ok(Request::Axfr);
    }
    for record in &message.authorities {
        match seen(record, message) {
            Some(None) => {}
            Some(Some(serial)) => return Ok(Request::Ixfr { serial }),
            None => return Err(RequestError::Soa),
        }
    }
    Err(RequestError::Soa)
}

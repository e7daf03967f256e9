//! What the responder answers. It is authoritative for `counterfoil.` and refuses the rest.
//!
//! | question | answer |
//! |---|---|
//! | `whoami.counterfoil. TXT` | strings on the connection that the query came on |
//! | any other name below `counterfoil.`, TXT | `qname=` with the name as it was asked, then the same strings |
//! | any name below `counterfoil.`, A | 192.0.2.1 |
//! | `counterfoil. SOA` | the SOA record |
//! | any other type in the zone | no data, with the SOA record |
//!
//! The strings: `source=IP:PORT` and `destination=IP:PORT` of the PROXY header, or of the connection itself if there is
//! none or its command is LOCAL; `command=PROXY`, `LOCAL` or `none`; `tlv=0xE0:VALUE` per TLV in order, as text if all
//! of it is printable ASCII, else as `hex:` and digits, the end of a long one replaced by `...`; `connection=N` and
//! `query=N`, counted from 1.

use std::fmt::Write as _;
use std::net::SocketAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::dns::message::{OPCODE_QUERY, first_question, peek};
use crate::dns::synth;
use crate::proxy_protocol::parse::{Command, Parsed};

/// Octets of the longest string in a TXT record (RFC 1035, section 3.3).
const MAX_STRING: usize = 255;

/// Octets of a query above which an answer could become too long to send.
const MAX_QUERY: usize = 4096;

/// A connection and a query on it, as the responder sees them.
#[derive(Clone, Debug)]
pub struct Received {
    /// The PROXY header, if there was one.
    pub header: Option<Parsed>,
    /// The other end of the connection.
    pub peer: SocketAddr,
    /// Our end of the connection.
    pub local: SocketAddr,
    /// Serial number of the connection, from 1.
    pub connection: u64,
    /// Serial number of the query on the connection, from 1.
    pub query: u64,
}

/// The answer to one message: always one, of at most 65,535 octets.
pub fn answer(message: &[u8], received: &Received) -> Vec<u8> {
    let Some(header) = peek(message) else { return synth::formerr(message) };
    if header.opcode != OPCODE_QUERY {
        return synth::notimp(message);
    }
    let Some(Ok(question)) = first_question(message) else { return synth::formerr(message) };
    if header.qr || header.qdcount != 1 || message.len() > MAX_QUERY {
        return synth::formerr(message);
    }
    let Ok(query) = Message::from_vec(message) else { return synth::formerr(message) };
    let [asked] = query.queries.as_slice() else { return synth::formerr(message) };
    if !in_zone(asked) {
        return synth::refused(message);
    }
    let mut reply = reply_to(&query, asked);
    let name = asked.name().clone();
    let apex = name.num_labels() == 1;
    match asked.query_type() {
        RecordType::TXT if !apex => {
            let mut strings = strings(received);
            if !question.label(1).is_some_and(|label| label.eq_ignore_ascii_case(b"whoami") && name.num_labels() == 2) {
                let mut qname = b"qname=".to_vec();
                question.write_name(&mut qname);
                strings.insert(0, shortened(String::from_utf8_lossy(&qname).into_owned()));
            }
            reply.add_answer(Record::from_rdata(name, 0, RData::TXT(TXT::new(strings))));
        }
        RecordType::A if !apex => {
            reply.add_answer(Record::from_rdata(name, 0, RData::A(A::new(192, 0, 2, 1))));
        }
        RecordType::SOA if apex => {
            reply.add_answer(soa());
        }
        _ => {
            reply.add_authority(soa());
        }
    }
    reply.to_vec().unwrap_or_else(|_| synth::servfail(message))
}

fn in_zone(asked: &Query) -> bool {
    let last = asked.name().iter().next_back();
    asked.query_class() == DNSClass::IN && last.is_some_and(|label| label.eq_ignore_ascii_case(b"counterfoil"))
}

fn reply_to(query: &Message, asked: &Query) -> Message {
    let mut reply = Message::new(query.id, MessageType::Response, OpCode::Query);
    reply.metadata.recursion_desired = query.recursion_desired;
    reply.metadata.checking_disabled = query.checking_disabled;
    reply.metadata.authoritative = true;
    reply.metadata.response_code = ResponseCode::NoError;
    reply.add_query(asked.clone());
    // RFC 6891, section 6.1.1: an OPT record if and only if the query had one.
    reply.edns = query.edns.is_some().then(Edns::new);
    reply
}

fn soa() -> Record {
    let zone = Name::from_labels([b"counterfoil".as_slice()]).unwrap_or_default();
    let mut record =
        Record::from_rdata(zone.clone(), 0, RData::SOA(SOA::new(zone.clone(), zone, 1, 3600, 600, 86_400, 0)));
    record.dns_class = DNSClass::IN;
    record
}

fn strings(received: &Received) -> Vec<String> {
    let header = received.header.as_ref();
    let source = header.and_then(|header| header.source).unwrap_or(received.peer);
    let destination = header.and_then(|header| header.destination).unwrap_or(received.local);
    let command = match header.map(|header| header.command) {
        Some(Command::Proxy) => "PROXY",
        Some(Command::Local) => "LOCAL",
        None => "none",
    };
    let mut strings =
        vec![format!("source={source}"), format!("destination={destination}"), format!("command={command}")];
    for (kind, value) in header.map(|header| header.tlvs.as_slice()).unwrap_or_default() {
        strings.push(shortened(format!("tlv={kind:#04X}:{}", readable(value))));
    }
    strings.push(format!("connection={}", received.connection));
    strings.push(format!("query={}", received.query));
    strings
}

fn readable(value: &[u8]) -> String {
    match std::str::from_utf8(value) {
        Ok(text) if text.bytes().all(|octet| (b' '..=b'~').contains(&octet)) => text.to_owned(),
        _ => value.iter().fold("hex:".to_owned(), |mut text, octet| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{octet:02x}");
            text
        }),
    }
}

/// `text`, which is ASCII, cut to what a string of a TXT record can hold.
fn shortened(mut text: String) -> String {
    if text.len() > MAX_STRING {
        text.truncate(MAX_STRING - 3);
        text.push_str("...");
    }
    text
}

#[cfg(test)]
#[path = "zone_tests.rs"]
mod tests;

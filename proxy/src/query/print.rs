//! Printing of an answer, in the manner of `kdig`.

use std::io::{self, Write};

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::{RData, Record};
use hickory_proto::serialize::binary::{BinEncodable as _, BinEncoder};

use super::Answer;
use crate::dns::rtype;

pub(super) fn answer(answer: &Answer, out: &mut impl Write) -> io::Result<()> {
    header(&answer.message, out)?;
    if !answer.message.queries.is_empty() {
        writeln!(out, "\n;; QUESTION SECTION:")?;
    }
    for query in &answer.message.queries {
        let class = query.query_class();
        writeln!(out, ";; {}\t\t{class}\t{}", query.name(), type_name(u16::from(query.query_type())))?;
    }
    section("ANSWER", &answer.message.answers, out)?;
    section("AUTHORITY", &answer.message.authorities, out)?;
    section("ADDITIONAL", &answer.message.additionals, out)?;
    let Answer { octets, server, took, .. } = answer;
    writeln!(out, "\n;; Received {octets} B")?;
    writeln!(out, ";; From {}@{}(TCP) in {:.1} ms", server.ip(), server.port(), took.as_secs_f64() * 1000.0)?;
    out.flush()
}

fn header(message: &Message, out: &mut impl Write) -> io::Result<()> {
    let status = status(message.response_code);
    writeln!(out, ";; ->>HEADER<<- opcode: {}; status: {status}; id: {}", message.op_code, message.id)?;
    let flags = [
        (message.message_type == MessageType::Response, " qr"),
        (message.authoritative, " aa"),
        (message.truncation, " tc"),
        (message.recursion_desired, " rd"),
        (message.recursion_available, " ra"),
        (message.authentic_data, " ad"),
        (message.checking_disabled, " cd"),
    ];
    write!(out, ";; Flags:")?;
    for (_, name) in flags.iter().filter(|(set, _)| *set) {
        write!(out, "{name}")?;
    }
    let additionals = message.additionals.len() + usize::from(message.edns.is_some());
    writeln!(
        out,
        "; QUERY: {}; ANSWER: {}; AUTHORITY: {}; ADDITIONAL: {additionals}",
        message.queries.len(),
        message.answers.len(),
        message.authorities.len(),
    )?;
    if let Some(edns) = &message.edns {
        let (version, size) = (edns.version(), edns.max_payload());
        writeln!(out, "\n;; EDNS PSEUDOSECTION:\n;; Version: {version}; UDP size: {size} B; ext-rcode: {status}")?;
    }
    Ok(())
}

fn section(title: &str, records: &[Record], out: &mut impl Write) -> io::Result<()> {
    if !records.is_empty() {
        writeln!(out, "\n;; {title} SECTION:")?;
    }
    for record in records {
        let rtype = type_name(u16::from(record.record_type()));
        writeln!(out, "{}\t{}\t{}\t{rtype}\t{}", record.name, record.ttl, record.dns_class, rdata(record))?;
    }
    Ok(())
}

/// The data of a record in presentation format. Types whose text `hickory-proto` does not write as RFC 1035 and its
/// successors have it are given as octets (RFC 3597, section 5).
fn rdata(record: &Record) -> String {
    match &record.data {
        RData::TXT(txt) => txt.txt_data.iter().map(|string| quoted(string)).collect::<Vec<_>>().join(" "),
        data @ (RData::A(_)
        | RData::AAAA(_)
        | RData::CNAME(_)
        | RData::NS(_)
        | RData::PTR(_)
        | RData::MX(_)
        | RData::SOA(_)
        | RData::SRV(_)) => data.to_string(),
        data => octets(data),
    }
}

/// A character string in quotes (RFC 1035, section 5.1).
fn quoted(string: &[u8]) -> String {
    let mut text = String::from("\"");
    for &octet in string {
        match octet {
            b'"' | b'\\' => text.extend(['\\', char::from(octet)]),
            b' '..=b'~' => text.push(char::from(octet)),
            _ => text.push_str(&format!("\\{octet:03}")),
        }
    }
    text.push('"');
    text
}

fn octets(data: &RData) -> String {
    let mut bytes = Vec::new();
    if let Err(error) = data.emit(&mut BinEncoder::new(&mut bytes)) {
        return format!("; {error}");
    }
    let digits: String = bytes.iter().map(|octet| format!("{octet:02X}")).collect();
    format!("\\# {} {digits}", bytes.len()).trim_end().to_owned()
}

fn type_name(number: u16) -> String {
    rtype::mnemonic(number).map_or_else(|| format!("TYPE{number}"), str::to_owned)
}

/// The name of a response code in the IANA registry "DNS RCODEs".
fn status(code: ResponseCode) -> String {
    let name = match u16::from(code) {
        0 => "NOERROR",
        1 => "FORMERR",
        2 => "SERVFAIL",
        3 => "NXDOMAIN",
        4 => "NOTIMPL",
        5 => "REFUSED",
        6 => "YXDOMAIN",
        7 => "YXRRSET",
        8 => "NXRRSET",
        9 => "NOTAUTH",
        10 => "NOTZONE",
        11 => "DSOTYPENI",
        16 => "BADVERS",
        23 => "BADCOOKIE",
        other => return format!("RCODE{other}"),
    };
    name.to_owned()
}

//! What goes over the wire: framing, questions, PROXY headers in and out, TLV templates.

use std::net::{IpAddr, SocketAddr};

use hickory_proto::op::{Message, Query};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use super::LINEAR;
use crate::client::preface::{Preface, Progress};
use crate::dns::frame::{Frames, MIN_MESSAGE, PREFIX_LEN, needed};
use crate::dns::hop::{self, Scope};
use crate::dns::message::{MAX_NAME, QuestionError, first_question, peek, question_matches};
use crate::dns::records::{self, work};
use crate::dns::synth;
use crate::dns::transfer::{self, Request, Stream};
use crate::proxy_protocol::encode::{EncodeError, HeaderWriter};
use crate::proxy_protocol::parse::{Command, ParseError, Parsed, parse, parse_any};
use crate::proxy_protocol::parse_v1::{MAX_LINE, parse_v1};
use crate::proxy_protocol::template::{Class, Context, Template, TemplateError};
use crate::proxy_protocol::{FIXED_LEN, MAX_LEN};

/// Frames stay in bounds, and a stream cut in two anywhere gives the frames of the whole.
pub fn frame(bytes: &[u8]) {
    let mut whole = Frames::new(bytes);
    let expected: Vec<_> = whole.by_ref().collect();
    let taken: usize = expected.iter().flatten().map(|message| message.len() + PREFIX_LEN).sum();
    assert_eq!(whole.consumed(), taken);
    assert_eq!(whole.rest(), &bytes[taken..]);
    assert!(expected.iter().flatten().all(|message| message.len() >= MIN_MESSAGE));
    if !matches!(expected.last(), Some(Err(_))) {
        assert!(needed(whole.rest()).is_none_or(|needed| needed > whole.rest().len()));
    }
    // The first octet chooses where to cut.
    let cut = bytes.first().map_or(0, |octet| usize::from(*octet) % (bytes.len() + 1));
    let mut head = Frames::new(&bytes[..cut]);
    let mut seen: Vec<_> = head.by_ref().collect();
    if !matches!(seen.last(), Some(Err(_))) {
        seen.extend(Frames::new(&bytes[head.consumed()..]));
    }
    assert_eq!(seen, expected);
}

/// Where hickory reads a first question, so do we, and the same; our own answers can be read and answer the query.
pub fn question(bytes: &[u8]) {
    let Some(header) = peek(bytes) else {
        assert!(bytes.len() < MIN_MESSAGE && first_question(bytes).is_none());
        return;
    };
    let ours = first_question(bytes);
    assert_eq!(ours.is_some(), header.qdcount > 0);
    let mut decoder = BinDecoder::new(bytes);
    decoder.read_slice(MIN_MESSAGE).expect("a header is there");
    let theirs = Query::read(&mut decoder);
    match (ours, theirs) {
        (Some(Ok(ours)), Ok(theirs)) => {
            assert!(ours.name_wire.len() <= MAX_NAME);
            assert_eq!(ours.qtype, u16::from(theirs.query_type()));
            assert_eq!(ours.qclass, u16::from(theirs.query_class()));
            assert_eq!(ours.end, decoder.index());
            assert!(ours.labels().eq(theirs.name().iter()));
        }
        (Some(Ok(ours)), Err(theirs)) => panic!("we read {ours:?}, hickory says {theirs}"),
        // Hickory follows a pointer into the header. We refuse it on purpose.
        (Some(Err(QuestionError::Pointer)), Ok(_)) => {}
        (Some(Err(ours)), Ok(theirs)) => panic!("hickory reads {theirs}, we say {ours}"),
        (Some(Err(_)), Err(_)) | (None, _) => {}
    }
    let answer = synth::servfail(bytes);
    assert!(Message::from_vec(&answer).is_ok());
    assert!(question_matches(bytes, &answer));
    walks(bytes);
}

/// All that is done with a message before it is forwarded, or answered, takes steps in proportion to its octets.
fn walks(bytes: &[u8]) {
    let question = first_question(bytes).and_then(Result::ok);
    let readable = work::of(|| records::are_readable(bytes, question.as_ref()));
    let answered = work::of(|| synth::servfail(bytes));
    let matched = work::of(|| question_matches(bytes, bytes));
    let scope = Scope { keepalive: true, padding: true };
    let asked = work::of(|| hop::asked(bytes, scope));
    let of_question = question.map_or(0, |question| {
        let request = || transfer::request(bytes, &question);
        let stream = || Stream::new(Request::Axfr).message(&question, bytes);
        work::of(request).max(work::of(stream)).max(work::of(|| question.edns_option(65001)))
    });
    for steps in [readable, answered, matched, asked, of_question] {
        assert!(steps <= LINEAR.of(bytes), "{steps} steps for {} octets", bytes.len());
    }
}

/// A header for endpoints and TLVs taken from `bytes` is octet by octet what `ppp` builds.
pub fn header_out(bytes: &[u8]) {
    let Some((ends, mut rest)) = bytes.split_at_checked(37) else { return };
    let address = |bytes: &[u8], short: bool| -> SocketAddr {
        let octets: [u8; 16] = bytes[..16].try_into().expect("16 octets");
        let port = u16::from_be_bytes([bytes[16], bytes[17]]);
        let [a, b, c, d, ..] = octets;
        if short { SocketAddr::from(([a, b, c, d], port)) } else { SocketAddr::from((octets, port)) }
    };
    let [flags, ends @ ..] = ends else { return };
    let source = address(&ends[..18], flags & 1 == 1);
    let destination = address(&ends[18..], flags & 2 == 2);
    let mut tlvs = Vec::new();
    while let [kind, length, after @ ..] = rest {
        let (value, after) = after.split_at(after.len().min(usize::from(*length)));
        tlvs.push((*kind, value.to_vec()));
        rest = after;
    }
    header_against_ppp(source, destination, &tlvs);
}

/// See [`header_out`].
pub fn header_against_ppp(source: SocketAddr, destination: SocketAddr, tlvs: &[(u8, Vec<u8>)]) {
    use ppp::v2::{Builder, Command as PppCommand, Protocol, Version};
    let mut raw = Vec::new();
    for (kind, value) in tlvs {
        raw.push(*kind);
        raw.extend_from_slice(&u16::try_from(value.len()).expect("at most 255 octets").to_be_bytes());
        raw.extend_from_slice(value);
    }
    let mut ours = Vec::new();
    let written = HeaderWriter::proxy(&mut ours, source, destination).raw_tlvs(&raw).finish(MAX_LEN);
    // `ppp` turns mixed families into UNSPEC, so it gets them mapped.
    let mapped = |end: SocketAddr| match end.ip() {
        IpAddr::V4(ip) => SocketAddr::from((ip.to_ipv6_mapped(), end.port())),
        IpAddr::V6(_) => end,
    };
    let ends = if source.is_ipv4() == destination.is_ipv4() {
        (source, destination)
    } else {
        (mapped(source), mapped(destination))
    };
    let theirs = Builder::with_addresses(Version::Two | PppCommand::Proxy, Protocol::Stream, ends)
        .write_payload(raw.as_slice())
        .and_then(Builder::build);
    match (written, theirs) {
        (Ok(len), Ok(theirs)) => {
            assert_eq!(len, ours.len());
            assert_eq!(ours, theirs);
        }
        (Err(EncodeError::TooLong { len, .. }), _) => {
            assert!(len > MAX_LEN && ours.is_empty());
        }
        (Ok(_), Err(theirs)) => panic!("ppp says {theirs}"),
    }
}

/// A header is read at its end and not before, stays in bounds, and agrees with `ppp`.
pub fn proxy_in(bytes: &[u8]) {
    header_in(bytes, parse);
    header_in(bytes, parse_any);
    line_against_ppp(bytes);
    preface(bytes);
}

fn header_in(bytes: &[u8], parse: fn(&[u8], usize) -> Result<Parsed, ParseError>) {
    let result = parse(bytes, MAX_LEN);
    match &result {
        Ok(parsed) => {
            assert!((MIN_LINE..=bytes.len()).contains(&parsed.len));
            assert_eq!(parsed.source.is_some(), parsed.destination.is_some());
            assert!(parsed.command == Command::Proxy || parsed.source.is_none());
            let values: usize = parsed.tlvs.iter().map(|(_, value)| value.len() + 3).sum();
            assert!(values <= parsed.len.saturating_sub(FIXED_LEN));
            assert_eq!(parse(&bytes[..parsed.len], parsed.len), result);
            assert_eq!(parse(&bytes[..parsed.len - 1], MAX_LEN), Err(ParseError::NeedMore));
            assert!(matches!(parse(bytes, parsed.len - 1), Err(ParseError::Invalid(_))));
        }
        Err(ParseError::NeedMore) => assert!(bytes.len() < MAX_LEN),
        Err(ParseError::Invalid(_)) => {
            // More bytes never make it valid.
            let mut longer = bytes.to_vec();
            longer.push(0);
            assert!(matches!(parse(&longer, MAX_LEN), Err(ParseError::Invalid(_))));
        }
    }
}

/// `PROXY UNKNOWN` and CR LF.
const MIN_LINE: usize = 15;

/// Lines of version 1: what we take, `ppp` reads as the same; what it takes and we do not is known.
fn line_against_ppp(bytes: &[u8]) {
    use ppp::v1::{Addresses, Header};
    // Behind UNKNOWN it takes a LF for the end.
    let theirs = Header::try_from(bytes).ok().filter(|theirs| theirs.header.ends_with("\r\n"));
    match (parse_v1(bytes, MAX_LINE), theirs) {
        (Ok(ours), Some(theirs)) => {
            let ends: Option<(SocketAddr, SocketAddr)> = match theirs.addresses {
                Addresses::Unknown => None,
                Addresses::Tcp4(ip) => Some((
                    (ip.source_address, ip.source_port).into(),
                    (ip.destination_address, ip.destination_port).into(),
                )),
                Addresses::Tcp6(ip) => Some((
                    (ip.source_address, ip.source_port).into(),
                    (ip.destination_address, ip.destination_port).into(),
                )),
            };
            assert_eq!(ours.source.zip(ours.destination), ends);
            assert_eq!(ours.len, theirs.header.len());
        }
        // Behind UNKNOWN anything may stand (section 2.1); `ppp` wants text, and few words.
        (Ok(ours), None) => assert!(ours.source.is_none(), "ppp does not read {:?}", bytes.get(..ours.len)),
        // `ppp` reads ports with a sign.
        (Err(_), Some(theirs)) => assert!(theirs.header.contains('+'), "ppp reads {theirs:?}"),
        (Err(_), None) => {}
    }
}

/// In two pieces, cut where the first octet says, the preface comes to what it comes to in one; no octet gets lost.
fn preface(bytes: &[u8]) {
    let whole = Preface::new(MAX_LEN).take(bytes);
    let cut = bytes.last().map_or(0, |octet| usize::from(*octet) % (bytes.len() + 1));
    let (head, tail) = bytes.split_at(cut);
    let mut cut = Preface::new(MAX_LEN);
    match (cut.take(head), whole) {
        (Progress::NeedMore, whole) => match (cut.take(tail), whole) {
            (Progress::Refuse(_), Progress::Refuse(_)) => {}
            (in_two, whole) => assert_eq!(in_two, whole),
        },
        (Progress::Done(in_two), Progress::Done(whole)) => {
            assert_eq!([in_two.rest.as_slice(), tail].concat(), whole.rest);
            assert_eq!((in_two.ends, in_two.tlvs), (whole.ends, whole.tlvs));
        }
        (in_two, whole) => assert!(matches!((in_two, whole), (Progress::Refuse(_), Progress::Refuse(_)))),
    }
}

/// A template is refused at a place that is in it, or renders without panic, and of a class that tells the truth.
pub fn template(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let template = match text.parse::<Template>() {
        Ok(template) => template,
        Err(error @ TemplateError { .. }) => {
            assert!((1..=text.chars().count()).contains(&error.at), "{error} in {text:?}");
            return;
        }
    };
    let query = b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x03www\x07example\0\0\x41\0\x01";
    let context = |client: [u8; 4], question, random| Context {
        client: SocketAddr::from((client, u16::from(client[3]))),
        listener: "dns",
        question,
        incoming: b"\xe1\0\x01x",
        sni: if client[3] == 1 { "dns.example" } else { "" },
        random,
    };
    let render = |context| {
        let mut out = Vec::new();
        template.render(&context, &mut out);
        out
    };
    let question = first_question(query).and_then(Result::ok);
    let base = render(context([192, 0, 2, 1], question, 1));
    if template.class() < Class::PerClient {
        assert_eq!(render(context([198, 51, 100, 9], None, 2)), base);
    } else if template.class() < Class::PerQuery {
        assert_eq!(render(context([192, 0, 2, 1], None, 2)), base);
    } else if template.class() == Class::Unique {
        assert_ne!(render(context([192, 0, 2, 1], question, 2)), base);
    }
}

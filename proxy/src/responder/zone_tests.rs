#![expect(clippy::expect_used, reason = "tests panic")]

use super::*;
use crate::dns::message::question_matches;
use proptest::prelude::*;

fn received(tlvs: &[(u8, &[u8])]) -> Received {
    Received {
        header: Some(Parsed {
            command: Command::Proxy,
            source: "192.0.2.1:4000".parse().ok(),
            destination: "[2001:db8::1]:53".parse().ok(),
            tlvs: tlvs.iter().map(|(kind, value)| (*kind, value.to_vec())).collect(),
            len: 28,
        }),
        peer: "127.0.0.1:5".parse().expect("an address"),
        local: "127.0.0.1:6".parse().expect("an address"),
        connection: 7,
        query: 9,
    }
}

fn ask(name: &str, rtype: RecordType, received: &Received) -> Message {
    let mut query = Message::new(0x4242, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).expect("a name"), rtype));
    let bytes = query.to_vec().expect("valid");
    let raw = answer(&bytes, received);
    assert!(question_matches(&bytes, &raw));
    let reply = Message::from_vec(&raw).expect("valid");
    assert_eq!((reply.id, reply.message_type, reply.recursion_desired), (0x4242, MessageType::Response, true));
    reply
}

fn txt(reply: &Message) -> Vec<String> {
    let [Record { data: RData::TXT(txt), .. }] = reply.answers.as_slice() else { return Vec::new() };
    txt.txt_data.iter().map(|string| String::from_utf8_lossy(string).into_owned()).collect()
}

#[test]
fn whoami_tells_the_header() {
    let received = received(&[(0xe0, b"dns"), (0xe1, b"\0\xff"), (0x05, b"")]);
    let reply = ask("WhoAmI.Counterfoil.", RecordType::TXT, &received);
    assert!(reply.authoritative);
    assert_eq!(
        txt(&reply),
        [
            "source=192.0.2.1:4000",
            "destination=[2001:db8::1]:53",
            "command=PROXY",
            "tlv=0xE0:dns",
            "tlv=0xE1:hex:00ff",
            "tlv=0x05:",
            "connection=7",
            "query=9"
        ]
    );
}

#[test]
fn without_a_header_and_with_local_the_connection_itself_is_told() {
    let mut received = received(&[]);
    received.header =
        received.header.map(|header| Parsed { command: Command::Local, source: None, destination: None, ..header });
    let strings = txt(&ask("whoami.counterfoil.", RecordType::TXT, &received));
    assert_eq!(strings[..3], ["source=127.0.0.1:5", "destination=127.0.0.1:6", "command=LOCAL"]);
    received.header = None;
    let strings = txt(&ask("whoami.counterfoil.", RecordType::TXT, &received));
    assert_eq!(strings[2], "command=none");
}

#[test]
fn other_names_are_returned_as_asked() {
    let received = received(&[]);
    for (name, string) in [
        ("NonCe-1.a.counterfoil.", "qname=NonCe-1.a.counterfoil"),
        ("whoami.a.counterfoil.", "qname=whoami.a.counterfoil"),
        (r"a\.b.counterfoil.", r"qname=a\.b.counterfoil"),
    ] {
        let strings = txt(&ask(name, RecordType::TXT, &received));
        assert_eq!(strings.first().map(String::as_str), Some(string));
        assert_eq!(strings.last().map(String::as_str), Some("query=9"));
    }
}

#[test]
fn addresses_soa_no_data_and_refusal() {
    let received = received(&[]);
    let a = ask("x.counterfoil.", RecordType::A, &received);
    assert!(matches!(a.answers.as_slice(), [Record { data: RData::A(ip), .. }] if ip.to_string() == "192.0.2.1"));
    let soa = ask("counterfoil.", RecordType::SOA, &received);
    assert_eq!(soa.answers.iter().map(|record| record.name.to_string()).collect::<Vec<_>>(), ["counterfoil."]);
    for (name, rtype) in [("x.counterfoil.", RecordType::AAAA), ("counterfoil.", RecordType::TXT)] {
        let empty = ask(name, rtype, &received);
        assert_eq!((empty.response_code, empty.answers.len(), empty.authorities.len()), (ResponseCode::NoError, 0, 1));
    }
    for name in ["counterfoil.example.", "xcounterfoil.", "."] {
        assert_eq!(ask(name, RecordType::TXT, &received).response_code, ResponseCode::Refused, "{name}");
    }
}

#[test]
fn opt_is_answered_with_opt() {
    for edns in [None, Some(Edns::new())] {
        let mut query = Message::new(1, MessageType::Query, OpCode::Query);
        query.add_query(Query::query(Name::from_ascii("x.counterfoil.").expect("a name"), RecordType::TXT));
        query.edns = edns;
        let reply = Message::from_vec(&answer(&query.to_vec().expect("valid"), &received(&[]))).expect("valid");
        assert_eq!(reply.edns.is_some(), query.edns.is_some());
    }
}

#[test]
fn long_values_are_cut() {
    let value = [b'x'; 300];
    let strings = txt(&ask("whoami.counterfoil.", RecordType::TXT, &received(&[(0xe0, &value)])));
    assert_eq!(strings[3].len(), MAX_STRING);
    assert!(strings[3].ends_with("xxx..."));
}

#[test]
fn what_is_no_query_is_told_so() {
    let received = received(&[]);
    let rcode = |bytes: &[u8]| peek(&answer(bytes, &received)).map(|peek| peek.rcode);
    let query = b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x01x\x0bcounterfoil\0\0\x10\0\x01";
    assert_eq!(rcode(query), Some(0));
    for (index, octet, expected) in [
        (2, 0x81, 1), // QR set
        (2, 0x31, 4), // DSO
        (5, 0, 1),    // no question
        (5, 2, 1),    // two, of which one is there
        (7, 1, 1),    // an answer record that is not there
        (12, 0xc0, 1),
        (30, 3, 5), // class CHAOS
    ] {
        let mut wrong = query.to_vec();
        wrong[index] = octet;
        assert_eq!(rcode(&wrong), Some(expected), "{index}");
    }
}

proptest! {
    #[test]
    fn any_message_gets_an_answer_that_fits(
        bytes in proptest::collection::vec(any::<u8>(), 12..300),
        tlvs in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..300)), 0..20),
    ) {
        let tlvs: Vec<(u8, &[u8])> = tlvs.iter().map(|(kind, value)| (*kind, value.as_slice())).collect();
        let received = received(&tlvs);
        let raw = answer(&bytes, &received);
        prop_assert!((12..=65_535).contains(&raw.len()));
        prop_assert!(Message::from_vec(&raw).is_ok());
        let whoami = ask("whoami.counterfoil.", RecordType::TXT, &received);
        prop_assert_eq!(txt(&whoami).len(), 5 + tlvs.len());
    }
}

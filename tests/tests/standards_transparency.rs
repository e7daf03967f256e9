//! What a forwarder leaves alone, by the letter: flags, types, EDNS, signatures, octets that it does not know; and what it
//! says itself. A test's name begins with the RFC and the section of the rule that it holds; docs/standards.md has all
//! rules.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};

const SOON: Duration = Duration::from_secs(5);
const FORMERR: u8 = 1;
const NOTIMP: u8 = 4;
/// AXFR and IXFR, whose answers are many messages.
const TRANSFERS: [u16; 2] = [251, 252];

/// Client, forwarder and a backend whose answers, but for their IDs, are told it beforehand.
struct Path {
    client: Client,
    counterfoil: Counterfoil,
    backend: FakeBackend,
    told: Arc<Mutex<Told>>,
}

#[derive(Default)]
struct Told {
    /// The answer to the next query.
    answer: Vec<u8>,
    /// The last query that came.
    query: Vec<u8>,
}

impl Path {
    fn new() -> Self {
        Self::with(|config| config, false)
    }

    /// The connection to the backend is the client's own.
    fn owned() -> Self {
        Self::with(|config| config.identity("connection"), true)
    }

    fn with(change: impl FnOnce(Config) -> Config, header: bool) -> Self {
        let told = Arc::new(Mutex::new(Told::default()));
        let shared = Arc::clone(&told);
        let backend = FakeBackend::start(move |connection| {
            if header && connection.header().is_none() {
                return;
            }
            while let Some(query) = connection.query() {
                let mut told = shared.lock().unwrap();
                let answer = [&query[..2], &told.answer[2..]].concat();
                told.query = query;
                drop(told);
                connection.send(&answer);
            }
        });
        let config = Config::new(backend.address).set("connections", "idle_timeout", "\"300ms\"").set(
            "connections",
            "cleanup_interval",
            "\"100ms\"",
        );
        let counterfoil = Counterfoil::start(&change(config));
        Self { client: counterfoil.client(), counterfoil, backend, told }
    }

    /// Query and answer arrive octet for octet, but for the ID of the backend's connection.
    #[track_caller]
    fn carries(&mut self, what: &str, query: &[u8], answer: &[u8]) {
        self.told.lock().unwrap().answer = answer.to_vec();
        self.client.send_raw(&message::framed(query)).unwrap();
        let received = self.client.receive(SOON).message();
        assert_eq!(received[..2], query[..2], "{what}: the client's ID");
        assert!(received[2..] == answer[2..], "{what}: {answer:02x?} came as {received:02x?}");
        let seen = self.told.lock().unwrap().query.clone();
        assert!(seen[2..] == query[2..], "{what}: {query:02x?} came as {seen:02x?}");
    }

    /// The same with an answer that is the query with QR set.
    #[track_caller]
    fn echoes(&mut self, what: &str, query: &[u8]) {
        self.carries(what, query, &as_answer(query));
    }

    #[track_caller]
    fn end(self) {
        drop(self.client);
        self.counterfoil.assert_quiescent();
        let violations = [("reason", "protocol_violation")];
        assert_eq!(self.counterfoil.metrics().sum("backend_connections_closed_total", &violations), 0.0);
        // Messages that are no plain question have a connection of their own.
        assert!(self.backend.accepted() <= 2, "{}", self.backend.accepted());
    }
}

fn as_answer(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer
}

fn plain() -> Vec<u8> {
    message::query(0xbeef, "Plain.Example.test", qtype::A)
}

/// A record: owner, type, class, TTL, data.
fn record(owner: &[u8], kind: u16, class: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).unwrap();
    [owner, &kind.to_be_bytes(), &class.to_be_bytes(), &ttl.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn opt(version_and_flags: u32, options: &[u8]) -> Vec<u8> {
    record(&[0], 41, 1232, version_and_flags, options)
}

/// A message with more records in its additional section.
fn with_additional(mut message: Vec<u8>, records: &[Vec<u8>]) -> Vec<u8> {
    message[11] += records.len() as u8;
    message.extend_from_slice(&records.concat());
    message
}

/// Every combination of AA, TC, RD, RA, the reserved bit, AD, CD and RCODE, in queries and in answers.
#[test]
fn rfc5625_4_1_all_flags_pass() {
    let mut path = Path::new();
    for high in 0..8_u8 {
        for low in 0..=255_u8 {
            let mut query = plain();
            (query[2], query[3]) = (high, low);
            path.echoes("flags", &query);
        }
    }
    path.end();
}

/// Every opcode but DSO's, which is never forwarded.
#[test]
fn rfc5625_4_1_all_opcodes_pass() {
    let mut path = Path::new();
    for opcode in (0..16_u8).filter(|opcode| *opcode != 6) {
        let mut query = plain();
        query[2] = opcode << 3;
        path.echoes("an opcode", &query);
    }
    path.end();
}

/// Names are compressed or not, also in the records of queries and updates; nothing is compressed anew or spelled out.
#[test]
fn rfc5625_4_2_compressed_names_pass() {
    let mut path = Path::new();
    let with_records = |opcode: u8, authority: &[u8]| {
        let mut query = message::query(7, "zone.example.test", 6);
        (query[2], query[9]) = (opcode << 3, 1);
        [&query[..], authority].concat()
    };
    for owner in [&b"\xc0\x0c"[..], b"\x03www\xc0\x0c", b"\x04zone\x07example\x04test\0", b"\x04zone\xc0\x11"] {
        let address = record(owner, 1, 1, 60, &[192, 0, 2, 1]);
        path.echoes("a query with an authority section", &with_records(0, &address));
        path.echoes("an update", &with_records(5, &address));
    }
    // Pointers to pointers, and names in data that point back.
    let mut answer = as_answer(&message::query(7, "zone.example.test", 6));
    (answer[7], answer[9]) = (1, 2);
    answer.extend_from_slice(&record(b"\xc0\x0c", 5, 1, 60, b"\x01a\xc0\x0c"));
    answer.extend_from_slice(&record(b"\xc0\x2f", 2, 1, 60, b"\x02ns\xc0\x11"));
    answer.extend_from_slice(&record(b"\xc0\x0c", 2, 1, 60, b"\xc0\x3f"));
    path.carries("an answer", &message::query(7, "zone.example.test", 6), &answer);
    path.end();
}

/// In the first name of a message there is nothing yet that a pointer could point to (RFC 1035, section 4.1.4), so such a
/// question, or one with a label of a reserved kind, can't be read and is not forwarded.
#[test]
fn rfc1035_4_1_4_a_pointer_in_the_question_is_formerr() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&Config::new(backend.address));
    let mut client = counterfoil.client();
    for name in [&b"\xc0\x0c"[..], b"\x01a\xc0\x0c", b"\xc0\x00", b"\x41a\0", b"\x80\0"] {
        let query = [&plain()[..12], name, &[0, 1, 0, 1]].concat();
        client.send_raw(&message::framed(&query)).unwrap();
        let answer = client.receive(SOON).message();
        assert_eq!((message::id(&answer), message::response_code(&answer)), (0xbeef, FORMERR), "{name:02x?}");
    }
    assert_eq!(backend.accepted(), 0);
}

/// QTYPE and QCLASS decide nothing, but for zone transfers.
#[test]
fn rfc5625_4_3_all_types_and_classes_pass() {
    let mut path = Path::new();
    let some = || (0..300_u16).chain((300..65_500).step_by(509)).chain(65_280..=65_535);
    for kind in some().filter(|kind| !TRANSFERS.contains(kind)) {
        path.echoes("a type", &message::query(1, "type.example.test", kind));
    }
    for class in some() {
        let mut query = message::query(1, "class.example.test", qtype::A);
        let end = query.len();
        query[end - 2..].copy_from_slice(&class.to_be_bytes());
        path.echoes("a class", &query);
    }
    path.end();
}

/// Records of unknown types and classes are octets.
#[test]
fn rfc3597_3_unknown_records_pass() {
    let mut path = Path::new();
    for (kind, class) in [(65_280, 1), (0, 0), (65_535, 65_535), (1, 254)] {
        let mut answer = as_answer(&plain());
        answer[7] = 1;
        answer.extend_from_slice(&record(b"\xc0\x0c", kind, class, u32::MAX, b"\xc0\x0c\xff\0\x3f"));
        path.carries("an unknown record", &plain(), &answer);
    }
    path.end();
}

/// The name comes back with the case that it was asked with: 0x20 and other nonces work.
#[test]
fn rfc4343_4_1_case_is_kept() {
    let mut path = Path::new();
    for name in ["pLaIn.ExAmPlE.tEsT", "PLAIN.EXAMPLE.TEST", "\u{1}\u{7f}.example.test"] {
        path.echoes(name, &message::query(2, name, qtype::A));
    }
    path.end();
}

/// OPT passes in both directions: unknown options, flags and versions, sizes, more than one OPT (which is the backend's to
/// refuse), BADVERS and other extended codes.
#[test]
fn rfc6891_6_2_6_opt_is_not_touched() {
    let mut path = Path::new();
    let options = b"\0\x0c\0\x04\0\0\0\0\xfd\xe9\0\x03abc\0\x08\0\x08\0\x01\x18\0\xc0\0\x02\0\0\x03\0\0";
    for (what, opts) in [
        ("none", vec![]),
        ("no options", vec![opt(0, b"")]),
        ("DO", vec![opt(0x8000, b"")]),
        ("all flags", vec![opt(0xffff, b"")]),
        ("version 1", vec![opt(0x0001_0000, b"")]),
        ("version 255", vec![opt(0x00ff_0000, options)]),
        ("options", vec![opt(0x8000, options)]),
        ("an option that lies about its length", vec![opt(0, b"\0\x0a\0\xffshort")]),
        ("keepalive", vec![opt(0, b"\0\x0b\0\0")]),
        ("keepalive with a timeout", vec![opt(0, b"\0\x0b\0\x02\0\x64")]),
        ("two", vec![opt(0, b""), opt(0x8000, options)]),
        ("behind another record", vec![record(b"\xc0\x0c", 1, 1, 1, b"addr"), opt(0, options)]),
        ("with another owner", vec![record(b"\x01a\0", 41, 512, 0, options)]),
    ] {
        path.echoes(what, &with_additional(plain(), &opts));
    }
    let query = with_additional(plain(), &[opt(0x0001_0000, b"")]);
    // BADVERS is 16: 1 in the upper eight bits, 0 in the header.
    path.carries("BADVERS", &query, &with_additional(as_answer(&plain()), &[opt(0x0100_0000, b"")]));
    path.carries("all of the extended code", &query, &with_additional(as_answer(&plain()), &[opt(0xff00_0000, b"")]));
    // Not ours to judge, either: an answer has OPT though the query had none, and the other way round.
    path.carries("unasked", &plain(), &with_additional(as_answer(&plain()), &[opt(0, options)]));
    path.carries("left out", &query, &as_answer(&plain()));
    path.end();
}

/// A message signed with a key that is not ours: all of it passes, and the client gets its ID back, which the signature
/// covers as Original ID (section 4.3.2).
#[test]
fn rfc8945_5_5_signed_messages_pass() {
    let mut path = Path::new();
    let tsig = |id: u16, owner: &[u8]| {
        let id = id.to_be_bytes();
        let data = [
            &b"\x0bhmac-sha256\0\0\0\x65\x4f\x1a\x2b\x01\x2c\0\x20"[..],
            &[0xab; 32],
            &id,
            b"\0\0\0\0", // No error, no other data.
        ]
        .concat();
        record(owner, 250, 255, 0, &data)
    };
    for id in [0, 1, 0x1234, 0xffff] {
        for owner in [&b"\x03key\x07example\0"[..], b"\x03KEY\xc0\x13"] {
            let query = message::query(id, "signed.example.test", qtype::A);
            let signed = with_additional(query.clone(), &[opt(0x8000, b""), tsig(id, owner)]);
            path.echoes("TSIG", &signed);
            // An answer with another Original ID than the query's is the client's to refuse.
            path.carries("TSIG", &signed, &with_additional(as_answer(&query), &[tsig(!id, owner)]));
        }
    }
    // SIG(0), RFC 2931: type SIG, covering type 0.
    let signature = record(&[0], 24, 255, 0, &[&[0; 18][..], b"\x03key\0", &[0xcd; 64]].concat());
    path.echoes("SIG(0)", &with_additional(plain(), &[signature]));
    path.end();
}

/// COOKIE passes, right or not, and so does a query for a cookie, which has no question.
#[test]
fn rfc7873_5_4_cookies_pass() {
    let mut path = Path::new();
    let cookie = |value: &[u8]| opt(0, &[&[0, 10, 0, value.len() as u8][..], value].concat());
    for length in [0, 7, 8, 9, 16, 24, 40, 41] {
        path.echoes("a cookie", &with_additional(plain(), &[cookie(&vec![0xc0; length])]));
    }
    let mut question_less = plain();
    question_less.truncate(12);
    question_less[5] = 0;
    path.echoes("a query without a question", &with_additional(question_less.clone(), &[cookie(b"12345678")]));
    // BADCOOKIE is 23: 1 in the upper eight bits, 7 in the header.
    let mut refused = as_answer(&question_less);
    refused[3] = 7;
    let refused = with_additional(refused, &[record(&[0], 41, 1232, 0x0100_0000, b"\0\x0a\0\x0812345678")]);
    path.carries("BADCOOKIE", &with_additional(question_less, &[cookie(b"12345678")]), &refused);
    path.end();
}

/// Octets behind the last record, records that are announced and missing, and the longest message: forwarded as they came,
/// unless a server could close a connection for it on which others ask.
#[test]
fn rfc5625_3_octets_that_belong_nowhere_pass() {
    let mut path = Path::new();
    path.echoes("trailing octets", &[&plain()[..], b"GET / HTTP/1.1\r\n\r\n"].concat());
    path.echoes("a query behind the query", &[plain(), message::framed(&plain())].concat());
    path.echoes("trailing octets behind OPT", &[with_additional(plain(), &[opt(0, b"")]), vec![0; 100]].concat());
    let mut longest = plain();
    longest.resize(65_535, 0xa5);
    path.echoes("the longest", &longest);
    path.end();
    let mut path = Path::owned();
    let mut missing = plain();
    missing[6..12].copy_from_slice(&[0xff; 6]);
    path.echoes("records that are not there", &missing);
    path.end();
}

/// What the program says itself: ID, opcode, RD, CD and question of the query, whole and with its case; no records; OPT if
/// the query had one, with its DO bit; never TSIG.
#[test]
fn rfc6891_7_own_answers_have_opt_only_if_the_query_had_one() {
    let backend = FakeBackend::start(|connection| {
        connection.query();
    });
    let config = Config::new(backend.address).set("pool", "retries", 0);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    // Algorithm, time, fudge, no MAC, Original ID, error, no other data: all zero.
    let tsig = record(b"\x03key\0", 250, 255, 0, &[0; 17]);
    for (extra, opt_expected) in [
        (vec![], None),
        (vec![opt(0, b"\0\x0a\0\x0812345678")], Some(0)),
        (vec![opt(0x8000, b"")], Some(0x80)),
        (vec![opt(0x00ff_7fff, b"")], Some(0)),
        (vec![opt(0x8000, b""), tsig], Some(0x80)),
    ] {
        // UPDATE and NOTIFY fail like queries; DSO is refused.
        for (opcode, code) in [(0, rcode::SERVFAIL), (4, rcode::SERVFAIL), (5, rcode::SERVFAIL), (6, NOTIMP)] {
            for flags in [[0, 0], [1, 0x10], [7, 0xf0]] {
                let mut query = with_additional(plain(), &extra);
                (query[2], query[3]) = (opcode << 3 | flags[0], flags[1]);
                client.send_raw(&message::framed(&query)).unwrap();
                let answer = client.receive(SOON).message();
                // AA, TC, RA, the reserved bit and AD are not copied.
                assert_eq!(answer[..2], query[..2]);
                assert_eq!((answer[2], answer[3]), (0x80 | opcode << 3 | flags[0] & 1, flags[1] & 0x10 | code));
                let question = plain().len();
                assert_eq!(answer[12..question], query[12..question]);
                let records = u8::from(opt_expected.is_some());
                assert_eq!(answer[4..12], [0, 1, 0, 0, 0, 0, 0, records], "{query:02x?}: {answer:02x?}");
                match opt_expected {
                    None => assert_eq!(answer.len(), question),
                    Some(high_flags) => {
                        // Root, OPT, any size, code and version 0, DO, and an extended error (RFC 8914) alone.
                        let opt = &answer[question..];
                        assert_eq!((&opt[..3], &opt[5..9]), (&[0, 0, 41][..], &[0, 0, high_flags, 0][..]));
                        let option = usize::from(u16::from_be_bytes([opt[13], opt[14]]));
                        assert_eq!((&opt[11..13], opt.len()), (&[0, 15][..], 15 + option));
                    }
                }
            }
        }
    }
}

//! What the forwarder itself says and does by EDNS: extended errors in its own answers, padding over TLS, and nothing of a
//! backend's that the client did not ask for. A test's name begins with the RFC and the section of the rule that it holds;
//! docs/standards.md has all rules.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::servers::{Unbound, ZONE};

const SOON: Duration = Duration::from_secs(10);
const FORMERR: u8 = 1;
const NOTIMP: u8 = 4;
const KEEPALIVE: u16 = 11;
const PADDING: u16 = 12;
const EDE: u16 = 15;
/// Octets to a multiple of which an answer is padded (RFC 8467 section 4.1).
const BLOCK: usize = 468;

/// An OPT record with this option in it, if any.
fn opt(option: Option<(u16, &[u8])>) -> Vec<u8> {
    let option = option.map_or(Vec::new(), |(code, value)| {
        [&code.to_be_bytes()[..], &u16::try_from(value.len()).unwrap().to_be_bytes(), value].concat()
    });
    let length = u16::try_from(option.len()).unwrap().to_be_bytes();
    [&[0, 0, 41, 4, 208, 0, 0, 0x80, 0][..], &length, &option].concat()
}

/// The message with one more record.
fn with(mut message: Vec<u8>, record: &[u8]) -> Vec<u8> {
    message[11] += 1;
    message.extend_from_slice(record);
    message
}

fn query(name: &str) -> Vec<u8> {
    message::query(7, name, qtype::A)
}

fn asking(name: &str, option: Option<(u16, &[u8])>) -> Vec<u8> {
    with(query(name), &opt(option))
}

#[track_caller]
fn exchange(client: &mut Client, message: &[u8]) -> Vec<u8> {
    client.send_raw(&message::framed(message)).unwrap();
    client.receive(SOON).message()
}

/// INFO-CODE and EXTRA-TEXT of an answer without padding, whose OPT record is the last record.
fn extended_error(answer: &[u8], query: &[u8]) -> Option<(u16, String)> {
    // OPT stands right behind the question, where the query's has to be.
    let question = query.iter().skip(12).position(|octet| *octet == 0).unwrap() + 12 + 5;
    let options = if answer[5] == 1 { question } else { 12 } + 11;
    let [_, _, _, _, high, low, text @ ..] = answer.get(options..)? else { return None };
    let [c1, c0, ..] = answer[options..] else { return None };
    assert_eq!(u16::from_be_bytes([c1, c0]), EDE, "{answer:02x?}");
    Some((u16::from_be_bytes([*high, *low]), String::from_utf8(text.to_vec()).unwrap()))
}

/// Each own answer says why, to whom knows EDNS.
#[test]
fn rfc8914_2_own_answers_say_why() {
    // Nobody listens there.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let silent = FakeBackend::start(|connection| while connection.query().is_some() {});
    let closes = FakeBackend::start(|connection| drop(connection.query()));
    let other = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            answer[13] ^= 1;
            connection.send(&answer);
        }
    });
    for (backend, code) in [(nobody, 22), (silent.address, 23), (closes.address, 23), (other.address, 23)] {
        let config = Config::new(backend).settles_soon().set("pool", "query_timeout", "\"500ms\"");
        let counterfoil = Counterfoil::start(&config);
        let mut client = counterfoil.client();
        let asked = asking("why.example.test", None);
        let answer = exchange(&mut client, &asked);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
        let (told, text) = extended_error(&answer, &asked).unwrap();
        assert!(told == code && text.len() > 10, "{told} {text:?}, {code}");
        // RFC 6891 section 7: who sends none gets none.
        let plain = query("why.example.test");
        let answer = exchange(&mut client, &plain);
        assert_eq!((message::response_code(&answer), answer.len()), (rcode::SERVFAIL, plain.len()));
        drop(client);
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("edns_errors_total", &[("edns_error", &code.to_string())]), 1.0);
        assert_eq!(metrics.sum("edns_errors_total", &[]), 1.0);
        counterfoil.assert_quiescent();
    }
}

/// DSO, and what cannot be read, where there is an OPT record that can.
#[test]
fn rfc8914_4_22_what_is_not_forwarded_says_why() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&Config::new(backend.address).settles_soon());
    let mut client = counterfoil.client();
    let asked = asking("odd.example.test", None);
    let mut dso = asked.clone();
    dso[2] = 6 << 3;
    let answer = exchange(&mut client, &dso);
    assert_eq!((message::response_code(&answer), extended_error(&answer, &dso).unwrap().0), (NOTIMP, 21));
    // Two questions.
    let plain = query("odd.example.test");
    let mut two = with([&plain[..], &plain[12..]].concat(), &opt(None));
    two[5] = 2;
    let answer = exchange(&mut client, &two);
    assert_eq!((message::response_code(&answer), extended_error(&answer, &two).unwrap().0), (FORMERR, 0));
    // A record is missing: then nobody can say that there is an OPT record.
    let mut missing = asked.clone();
    missing[11] = 2;
    let answer = exchange(&mut client, &missing);
    assert_eq!((message::response_code(&answer), answer.len()), (FORMERR, plain.len()));
    drop(client);
    assert_eq!(counterfoil.metrics().sum("edns_errors_total", &[]), 2.0);
    counterfoil.assert_quiescent();
}

fn from(number: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, number))
}

/// With Unbound behind it, which knows nothing of how the client comes.
#[test]
fn rfc7830_4_answers_are_padded_over_tls_if_the_query_asks_for_it() {
    let unbound = Unbound::start(false);
    let everybody = Setting::identity("forwarder");
    for setting in [everybody, everybody.over_tls()] {
        let scene = Scene::new(setting);
        let counterfoil = Counterfoil::start(&scene.config(unbound.address));
        let mut client = scene.connect(counterfoil.address, from(1));
        let mut lengths = Vec::new();
        for length in [1, 30, 60] {
            let name = format!("{}.{ZONE}", "p".repeat(length));
            let unpadded = exchange(&mut client, &asking(&name, None));
            let padded = exchange(&mut client, &asking(&name, Some((PADDING, &[0; 40]))));
            assert_eq!(message::response_code(&padded), rcode::NOERROR);
            assert!(!unpadded.len().is_multiple_of(BLOCK), "nobody has asked for it");
            lengths.push(padded.len());
        }
        println!("{setting:?}: {lengths:?} octets");
        let all_alike = lengths.iter().all(|length| *length == BLOCK);
        assert_eq!(all_alike, setting.tls, "{setting:?}: section 6: never in clear text; {lengths:?}");
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// Answers with these records behind them, whatever is asked.
fn answering(records: Vec<Vec<u8>>) -> FakeBackend {
    FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            let question = query.iter().skip(12).position(|octet| *octet == 0).unwrap() + 12 + 5;
            let mut plain = query[..question].to_vec();
            plain[10..12].fill(0);
            let answer = message::answer_to(&plain, [192, 0, 2, 53]);
            connection.send(&records.iter().fold(answer, |answer, record| with(answer, record)));
        }
    })
}

/// The padding of a backend is for its own connection: it is replaced. What is signed is nobody's to change, and our own
/// answers are padded, too.
#[test]
fn rfc8467_4_1_padding_is_hop_by_hop_and_signed_messages_pass() {
    let padded_by_the_backend = opt(Some((PADDING, &[9; 100])));
    let signature = b"\x03key\0\0\xfa\0\xff\0\0\0\0\0\x04mac!";
    let scene = Scene::new(Setting::SHARED.over_tls());
    let asked = asking("hop.example.test", Some((PADDING, b"")));
    let alone = query("hop.example.test").len() + 16;

    let backend = answering(vec![padded_by_the_backend.clone()]);
    let counterfoil = Counterfoil::start(&scene.config(backend.address));
    let mut client = scene.connect(counterfoil.address, from(1));
    let answer = exchange(&mut client, &asked);
    assert_eq!(answer.len(), BLOCK);
    assert!(answer[alone + 15..].iter().all(|octet| *octet == 0), "{answer:02x?}");
    let unasked = exchange(&mut client, &asking("hop.example.test", None));
    assert_eq!(unasked[alone..], padded_by_the_backend, "it passes where nobody asks");
    drop(client);
    counterfoil.assert_quiescent();

    let backend = answering(vec![padded_by_the_backend.clone(), signature.to_vec()]);
    let counterfoil = Counterfoil::start(&scene.config(backend.address));
    let mut client = scene.connect(counterfoil.address, from(1));
    let signed = [&padded_by_the_backend[..], signature].concat();
    for query in [with(asked.clone(), signature), asked.clone()] {
        assert_eq!(exchange(&mut client, &query)[alone..], signed);
    }
    drop(client);
    counterfoil.assert_quiescent();

    let nobody: SocketAddr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let counterfoil = Counterfoil::start(&scene.config(nobody));
    let mut client = scene.connect(counterfoil.address, from(1));
    let answer = exchange(&mut client, &asked);
    assert_eq!((message::response_code(&answer), answer.len()), (rcode::SERVFAIL, BLOCK));
    drop(client);
    counterfoil.assert_quiescent();
}

/// A backend that tells a time to whom has no EDNS.
#[test]
fn rfc7828_3_3_2_a_time_that_a_backend_volunteers_is_taken_out() {
    let backend = answering(vec![opt(Some((KEEPALIVE, &[0, 1])))]);
    let config = Config::new(backend.address).settles_soon().set("listener", "edns_tcp_keepalive", "true");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let plain = query("told.example.test");
    let answer = exchange(&mut client, &plain);
    assert_eq!(answer, with(message::answer_to(&plain, [192, 0, 2, 53]), &opt(None)));
    drop(client);
    counterfoil.assert_quiescent();
}

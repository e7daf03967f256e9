//! Messages that are no plain queries: what the RFCs ask of a forwarder that they pass through. Each test is named after the
//! section that it holds.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::servers::{Recursor, Unbound};

const SOON: Duration = Duration::from_secs(5);
const FORMERR: u8 = 1;
const NOTIMP: u8 = 4;
const DSO: u8 = 6;
/// IQUERY, STATUS, NOTIFY, UPDATE, and one that nobody has assigned.
const NOT_QUERY: [u8; 5] = [1, 2, 4, 5, 9];

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).set("connections", "idle_timeout", "\"300ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    )
}

/// A query with another opcode.
fn with_opcode(id: u16, opcode: u8) -> Vec<u8> {
    let mut query = message::query(id, "zone.example.test", qtype::A);
    query[2] = opcode << 3;
    query
}

fn opcode(message: &[u8]) -> u8 {
    (message[2] >> 3) & 0xf
}

/// A DSO message with a Keepalive TLV; all counts are zero.
fn dso(id: u16, flags: u8) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    let header = [high, low, flags | (DSO << 3), 0, 0, 0, 0, 0, 0, 0, 0, 0];
    [&header[..], &[0, 1, 0, 8, 0, 0, 0x3a, 0x98, 0, 0, 0x3a, 0x98]].concat()
}

/// A QUERY without a question, with an OPT record that holds a client cookie if it has one.
fn without_question(id: u16, cookie: bool) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    let mut query = vec![high, low, 0, 0, 0, 0, 0, 0, 0, 0, 0, u8::from(cookie)];
    if cookie {
        query.extend_from_slice(b"\0\0\x29\x04\xd0\0\0\0\0\0\x0c\0\x0a\0\x08cookies!");
    }
    query
}

#[track_caller]
fn exchange(client: &mut Client, message: &[u8]) -> Vec<u8> {
    client.send_raw(&message::framed(message)).unwrap();
    let answer = client.receive(SOON).message();
    assert!(message::is_response(&answer) && message::id(&answer) == message::id(message), "{answer:02x?}");
    answer
}

#[test]
fn rfc8490_9_4_a_dso_request_is_answered_notimp_with_all_counts_zero() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    for id in [1, 0x1234, u16::MAX] {
        let answer = exchange(&mut client, &dso(id, 0));
        assert_eq!((opcode(&answer), message::response_code(&answer)), (DSO, NOTIMP));
        assert_eq!((answer.len(), &answer[4..]), (12, &[0; 8][..]), "{answer:02x?}");
    }
    assert_eq!(backend.accepted(), 0, "nothing was opened for it");
    client.exchange(9, "the-connection.example.test", qtype::A);
    drop(client);
    counterfoil.assert_quiescent();
}

/// A message that wants no answer (ID 0) and a response mean something in a session only, and there is none.
#[test]
fn rfc8490_5_1_a_dso_message_without_a_session_gets_no_answer_and_a_reset() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    for unasked in [dso(0, 0), dso(0, 0x80), dso(7, 0x80)] {
        let mut client = counterfoil.client();
        client.send_raw(&message::framed(&unasked)).unwrap();
        assert_eq!(client.receive(SOON), Received::Reset);
    }
    counterfoil.assert_quiescent();
    let closed = counterfoil.metrics().sum("client_connections_closed_total", &[("reason", "no_dso_session")]);
    assert_eq!(closed, 3.0);
    assert_eq!(backend.accepted(), 0);
}

/// Retry Delay and its like from a backend, and a DSO response with the very ID of a query that is in flight.
#[test]
fn rfc8490_5_4_1_a_dso_message_of_a_backend_reaches_no_client() {
    for kind in 0..3 {
        let backend = FakeBackend::start(move |connection| {
            let Some(query) = connection.query() else { return };
            if connection.number > 0 {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                connection.wait_closed();
                return;
            }
            let unasked = match kind {
                0 => dso(0, 0),
                1 => dso(message::id(&query), 0),
                _ => dso(message::id(&query), 0x80),
            };
            connection.send(&unasked);
            connection.wait_closed();
        });
        let counterfoil = Counterfoil::start(&config(backend.address));
        let mut client = counterfoil.client();
        let answer = client.exchange(1, "asked.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::NOERROR);
        assert_eq!(client.receive(Duration::from_millis(50)), Received::Nothing);
        assert_eq!(backend.accepted(), 2, "asked again on another connection");
        drop(client);
        counterfoil.assert_quiescent();
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "protocol_violation")]), 1.0);
    }
}

#[test]
fn rfc9619_4_more_than_one_question_is_a_format_error() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    for (id, count) in [(1, 2_u16), (2, 3), (3, u16::MAX)] {
        let mut query = message::query(id, "two.example.test", qtype::A);
        query[4..6].copy_from_slice(&count.to_be_bytes());
        query.extend_from_within(12..);
        let answer = exchange(&mut client, &query);
        assert_eq!((opcode(&answer), message::response_code(&answer)), (0, FORMERR));
        assert_eq!(answer[4..], [0; 8], "without a question and records");
    }
    assert_eq!(backend.accepted(), 0);
    // The rule is for QUERY alone.
    let mut update = with_opcode(4, 5);
    update[5] = 2;
    update.extend_from_within(12..);
    exchange(&mut client, &update);
    assert_eq!(backend.queries(), 1);
    drop(client);
    counterfoil.assert_quiescent();
}

/// PowerDNS Recursor closes the connection on which it meets what it cannot read, and with it goes what others have asked. So
/// that never gets there, unless the connection is the client's own.
#[test]
fn rfc5625_3_a_query_that_would_end_a_shared_connection_is_a_format_error() {
    let recursor = Recursor::start(false);
    let counterfoil = Counterfoil::start(&config(recursor.address).identity("forwarder"));
    let mut client = counterfoil.client();
    client.assert_served();
    let plain = message::query(7, "odd.example.test", qtype::A);
    let cut_off = [&plain[..], b"\0\0\x29\x04\xd0\0\0\0\0\0\x09"].concat();
    let reserved = [&plain[..], b"\x41"].concat();
    let forward = [&plain[..], b"\xc0\xff\0\x01\0\x01\0\0\0\0\0\0"].concat();
    for (count, query) in
        [(7, &plain), (9, &cut_off), (11, &reserved), (11, &forward), (11, &without_question(7, false))]
    {
        for number in [0, 2, 4, 5] {
            let mut query = query.clone();
            (query[2], query[count]) = (number << 3, 1);
            let answer = exchange(&mut client, &query);
            assert_eq!((opcode(&answer), message::response_code(&answer)), (number, FORMERR), "{query:02x?}");
            client.assert_served();
        }
    }
    assert_eq!(counterfoil.metrics().sum("backend_connections_opened_total", &[]), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// Unbound sends what it refuses for its opcode back as it was. That is an answer, however odd its question, and no reason to
/// close the connection.
#[test]
fn rfc5625_4_1_an_opcode_is_refused_with_a_question_that_nobody_can_read() {
    let unbound = Unbound::start(false);
    let counterfoil = Counterfoil::start(&config(unbound.address).identity("connection"));
    let mut client = counterfoil.client();
    client.assert_served();
    for number in [1, 2, 5, 9] {
        let mut query = with_opcode(7, number);
        query.truncate(12);
        query.extend_from_slice(b"\xc0\x0c\0\x01\0\x01");
        let answer = exchange(&mut client, &query);
        assert_eq!((opcode(&answer), message::response_code(&answer)), (number, NOTIMP));
        client.assert_served();
    }
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("backend_connections_opened_total", &[]), 1.0);
    assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "protocol_violation")]), 0.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// It asks for a server cookie, or for nothing; RFC 9619 section 4 forbids middleboxes to call it malformed.
#[test]
fn rfc7873_5_4_a_query_without_a_question_is_forwarded_and_its_answer_comes_back() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&seen);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            let mut answer = query.clone();
            answer[2] |= 0x80;
            record.lock().unwrap().push(query);
            connection.send(&answer);
        }
    });
    for config in [config(backend.address), config(backend.address).set("pool", "policy", "\"consistent-hash\"")] {
        let counterfoil = Counterfoil::start(&config);
        let mut client = counterfoil.client();
        for cookie in [true, false] {
            let query = without_question(7, cookie);
            let answer = exchange(&mut client, &query);
            assert_eq!(answer[3..], query[3..], "to the last octet");
            let arrived = seen.lock().unwrap().pop().unwrap();
            assert_eq!(arrived[2..], query[2..], "to the last octet");
        }
        drop(client);
        counterfoil.assert_quiescent();
    }
}

#[test]
fn rfc7873_5_4_unbound_answers_a_query_without_a_question() {
    let unbound = Unbound::start(false);
    let counterfoil = Counterfoil::start(&config(unbound.address).identity("connection"));
    let mut client = counterfoil.client();
    for cookie in [true, false] {
        let answer = exchange(&mut client, &without_question(7, cookie));
        assert_eq!(answer[4..6], [0, 0], "no question in {answer:02x?}");
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// An answer that has a question where the query had none answers something else.
#[test]
fn rfc7766_7_an_answer_with_a_question_does_not_answer_a_query_without_one() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::query(message::id(&query), "another.example.test", qtype::A);
            answer[2] |= 0x80;
            connection.send(&answer);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let answer = exchange(&mut client, &without_question(7, true));
    assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    assert_eq!(answer[4..6], [0, 0], "it is our own");
    drop(client);
    counterfoil.assert_quiescent();
}

/// The backends read each message and close. A question is asked again; everything else was seen exactly once.
#[test]
fn rfc7766_6_2_4_only_a_question_is_asked_again_when_a_backend_dies() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let dying = || {
        let seen = Arc::clone(&seen);
        FakeBackend::start(move |connection| {
            if let Some(query) = connection.query() {
                seen.lock().unwrap().push(opcode(&query));
            }
        })
    };
    let (one, other) = (dying(), dying());
    for on_failure in ["servfail", "close"] {
        let config = config(one.address).backend(other.address, &[]).set("pool", "retries", 3).set(
            "pool",
            "on_failure",
            format!("\"{on_failure}\""),
        );
        for number in [0].into_iter().chain(NOT_QUERY) {
            // Each time afresh: a backend that has failed too often would be left alone.
            let counterfoil = Counterfoil::start(&config);
            let mut client = counterfoil.client();
            client.send_raw(&message::framed(&with_opcode(40, number))).unwrap();
            match client.receive(SOON) {
                Received::Message(answer) if on_failure == "servfail" => {
                    assert_eq!((opcode(&answer), message::response_code(&answer)), (number, rcode::SERVFAIL));
                    assert_eq!(message::id(&answer), 40);
                }
                Received::Closed | Received::Reset if on_failure == "close" => {}
                other => panic!("{on_failure}, opcode {number}: {other:?}"),
            }
            let times = if number == 0 { 4 } else { 1 };
            assert_eq!(std::mem::take(&mut *seen.lock().unwrap()), vec![number; times], "by both backends together");
            drop(client);
            counterfoil.assert_quiescent();
        }
    }
}

/// What could not be sent at all goes to another backend, whatever it is, and to no more than that one.
#[test]
fn rfc7766_6_2_4_what_was_not_sent_may_go_elsewhere_once() {
    let dead = FakeBackend::answering(false);
    dead.refuse();
    let alive = FakeBackend::answering(false);
    let config = config(dead.address).backend(alive.address, &[]).set("pool", "policy", "\"first-available\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    for (count, number) in NOT_QUERY.into_iter().enumerate() {
        let answer = exchange(&mut client, &with_opcode(7, number));
        assert_eq!((opcode(&answer), message::response_code(&answer)), (number, rcode::NOERROR));
        assert_eq!(alive.queries(), count + 1);
    }
    drop(client);
    counterfoil.assert_quiescent();
}

//! DNS over TCP by the letter: framing, pipelining, order, matching, and how connections end. A test's name begins with
//! the RFC and the section of the rule that it holds; docs/standards.md has all rules.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(5);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon()
}

/// A length below that of a header is no message. No octet of what follows is taken for one, from neither side.
#[test]
fn rfc1035_4_2_2_lengths_without_room_for_a_header() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            match message::question_name(&query).unwrap().strip_prefix("length").and_then(|rest| rest.split_once('.')) {
                // An answer that could be read, if the length before it meant nothing.
                Some((length, _)) => connection.send_raw(
                    &[
                        &[0, length.parse().unwrap()][..],
                        &message::framed(&message::answer_to(&query, [192, 0, 2, 66])),
                    ]
                    .concat(),
                ),
                None => connection.send(&message::answer_to(&query, [192, 0, 2, 53])),
            }
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "retries", 0));
    for length in 0..12_u8 {
        let mut client = counterfoil.client();
        let failed = client.exchange(1, &format!("length{length}.example.test"), qtype::A);
        assert_eq!(message::response_code(&failed), rcode::SERVFAIL, "{length}");
        client.assert_served();
        let query = message::framed(&message::query(2, "behind.example.test", qtype::A));
        client.send_raw(&[&[0, length][..], &query].concat()).unwrap();
        client.assert_closed(SOON);
    }
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("client_connections_closed_total", &[("reason", "malformed")]), 12.0);
    assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "protocol_violation")]), 12.0);
    assert_eq!(backend.queries(), 24, "none of those behind a wrong length");
}

/// No client connection is closed because the first read does not hold all of a message.
#[test]
fn rfc7766_8_a_query_split_at_every_octet() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let query = message::framed(&message::query(9, "split.example.test", qtype::A));
    let mut other = counterfoil.client();
    let cuts: Vec<usize> = (1..query.len()).collect();
    for cuts in cuts.chunks(20) {
        let mut clients: Vec<Client> = cuts.iter().map(|_| counterfoil.client()).collect();
        for (client, cut) in clients.iter_mut().zip(cuts) {
            client.send_raw(&query[..*cut]).unwrap();
        }
        // When the worker answers somebody else, it has read the first parts.
        other.assert_served();
        for (client, cut) in clients.iter_mut().zip(cuts) {
            client.send_raw(&query[*cut..]).unwrap();
        }
        for (client, cut) in clients.iter_mut().zip(cuts) {
            let answer = client.receive(SOON).message();
            assert!(message::id(&answer) == 9 && message::same_question(&query[2..], &answer), "cut at {cut}");
        }
    }
    drop(other);
    counterfoil.assert_quiescent();
}

/// The same of what backends send: the first part is there, and read, long before the rest.
#[test]
fn rfc7766_8_an_answer_split_at_every_octet() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let backend = FakeBackend::start(move |connection| {
        for cut in 1.. {
            let Some(query) = connection.query() else { return };
            let answer = message::framed(&message::answer_to(&query, [192, 0, 2, 53]));
            let Some((first, rest)) = answer.split_at_checked(cut).filter(|(_, rest)| !rest.is_empty()) else { return };
            connection.send_raw(first);
            count.fetch_add(1, Ordering::SeqCst);
            // The worker that sends the next query has read what was there before.
            let Some(next) = connection.query() else { return };
            connection.send_raw(&[rest, &message::framed(&message::answer_to(&next, [192, 0, 2, 54]))].concat());
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let name = "split.example.test";
    let length = message::framed(&message::answer_to(&message::query(0, name, qtype::A), [0; 4])).len();
    for cut in 1..length {
        client.ask(1, name, qtype::A);
        wait::until("the first part is sent", SOON, || sent.load(Ordering::SeqCst) == cut);
        client.ask(2, "next.example.test", qtype::A);
        for (id, name, last) in [(1, name, 53), (2, "next.example.test", 54)] {
            let answer = client.receive(SOON).message();
            assert_eq!((message::id(&answer), answer.last()), (id, Some(&last)), "cut at {cut}");
            assert_eq!(message::question_name(&answer).as_deref(), Some(name));
        }
    }
    assert_eq!(backend.accepted(), 1);
    drop(client);
    counterfoil.assert_quiescent();
}

/// Length and message are handed to TCP together, both ways: whoever waits in read(2) gets all of a message by one read.
#[test]
fn rfc7766_8_length_and_message_are_written_at_once() {
    fn assert_whole(read: &[u8]) {
        assert_eq!(usize::from(u16::from_be_bytes([read[0], read[1]])) + 2, read.len(), "{} octets read", read.len());
    }
    let backend = FakeBackend::start(|connection| {
        while let Some(read) = connection.read_once() {
            assert_whole(&read);
            connection.send(&message::answer_to(&read[2..], [192, 0, 2, 53]));
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    for id in 0..200 {
        client.ask(id, "at-once.example.test", qtype::A);
        assert_whole(&client.read_once(SOON));
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// No message ID is used for two queries in flight on one connection, whatever IDs the clients use.
#[test]
fn rfc7766_6_2_1_no_id_is_in_flight_twice() {
    const COUNT: usize = 2000;
    let backend = FakeBackend::start(|connection| {
        let queries: Vec<_> = (0..COUNT).map_while(|_| connection.query()).collect();
        let ids: BTreeSet<u16> = queries.iter().map(|query| message::id(query)).collect();
        assert_eq!(ids.len(), queries.len());
        for query in &queries {
            connection.send(&message::answer_to(query, [192, 0, 2, 53]));
        }
        connection.wait_closed();
    });
    let config = config(backend.address).set("listener", "max_in_flight", COUNT).backend_key("max_in_flight", COUNT);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    for n in 0..COUNT {
        client.ask(7, &format!("n{n}.example.test"), qtype::A);
    }
    let names: BTreeSet<_> = (0..COUNT)
        .map(|_| {
            let answer = client.receive(SOON).message();
            assert_eq!(message::id(&answer), 7);
            message::question_name(&answer).unwrap()
        })
        .collect();
    assert_eq!((names.len(), backend.accepted()), (COUNT, 1));
    drop(client);
    counterfoil.assert_quiescent();
}

/// Permutation number `n` of `items`.
fn permuted<T>(mut items: Vec<T>, mut n: usize) -> Vec<T> {
    let mut permuted = Vec::new();
    while !items.is_empty() {
        let at = n % items.len();
        n /= items.len();
        permuted.push(items.remove(at));
    }
    permuted
}

/// Four queries in flight, their answers in each of the 24 orders: each is passed on at once and is that of its query.
#[test]
fn rfc7766_7_answers_come_in_any_order() {
    let backend = FakeBackend::start(|connection| {
        for round in 0.. {
            let queries: Vec<_> = (0..4).map_while(|_| connection.query()).collect();
            if queries.len() < 4 {
                return;
            }
            for query in permuted(queries, round) {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        }
    });
    // All four on one connection, however busy the machine is.
    let counterfoil = Counterfoil::start(&config(backend.address).backend_key("max_connections", 1));
    let mut client = counterfoil.client();
    for round in 0..24 {
        for id in 0..4 {
            client.ask(id, &format!("n{id}.example.test"), qtype::A);
        }
        let order: Vec<u16> = (0..4)
            .map(|_| {
                let answer = client.receive(SOON).message();
                let id = message::id(&answer);
                assert_eq!(message::question_name(&answer), Some(format!("n{id}.example.test")));
                id
            })
            .collect();
        assert_eq!(order, permuted((0..4).collect(), round));
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// An answer is its query's if the ID is, and, where it has a question, name, type and class are, too (case aside). The
/// name and the type: `backend_faults::what_was_not_asked_is_never_delivered`.
#[test]
fn rfc7766_7_id_and_question_are_matched() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            let name = message::question_name(&query).unwrap();
            match name.split('.').next().unwrap() {
                "class" => answer[query.len() - 1] = 3,
                "two" => {
                    // The question twice.
                    answer = [&query[..], &query[12..]].concat();
                    (answer[2], answer[5]) = (0x80, 2);
                }
                "none" => {
                    answer.truncate(12);
                    (answer[3], answer[5], answer[7]) = (0x05, 0, 0);
                }
                "case" => answer[12..query.len() - 4].make_ascii_uppercase(),
                _ => {}
            }
            connection.send(&answer);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    for (what, code, violations) in
        [("class", 2, 1.0), ("two", 2, 2.0), ("none", 5, 2.0), ("case", 0, 2.0), ("plain", 0, 2.0)]
    {
        client.ask(3, &format!("{what}.example.test"), qtype::A);
        let answer = client.receive(SOON).message();
        assert_eq!((message::id(&answer), message::response_code(&answer)), (3, code), "{what}: {answer:02x?}");
        let reason = [("reason", "protocol_violation")];
        counterfoil
            .wait_metrics(what, SOON, |metrics| metrics.sum("backend_connections_closed_total", &reason) == violations);
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// Octets that never become a message do not put off the end of an idle connection.
#[test]
fn rfc7766_6_2_3_only_whole_messages_reset_the_idle_timeout() {
    let backend = FakeBackend::answering(false);
    let config =
        config(backend.address).set("listener", "idle_timeout", "\"1s\"").set("listener", "message_timeout", "\"1m\"");
    let counterfoil = Counterfoil::start(&config);
    // Whole messages do.
    let mut client = counterfoil.client();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1500) {
        client.assert_served();
        assert_eq!(client.receive(Duration::from_millis(250)), Received::Nothing);
    }
    let start = Instant::now();
    let ended = wait::poll(SOON, || {
        let sent = client.send_raw(&[1]).is_ok();
        let received = client.receive(Duration::from_millis(50));
        (!sent || received != Received::Nothing).then_some(received)
    });
    let taken = start.elapsed();
    assert!(ended.is_some() && taken < Duration::from_secs(3), "{ended:?} after {taken:?}");
    drop(client);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("client_connections_closed_total", &[("reason", "idle_timeout")]), 1.0);
}

/// What a server would do twice is not asked twice: NOTIFY, UPDATE and what is unknown get SERVFAIL, with their opcode.
#[test]
fn rfc7766_6_2_4_only_queries_are_asked_again() {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            if message::question_name(&query).unwrap().starts_with("dies") {
                count.fetch_add(1, Ordering::SeqCst);
                return;
            }
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    // A question twice: once because the connection's end may only have crossed it, and once as the one retry.
    for (opcode, times) in [(0, 3), (4, 1), (5, 1), (2, 1), (15, 1)] {
        client.assert_served();
        let mut query = message::query(1, "dies.example.test", qtype::A);
        query[2] = opcode << 3 | 1;
        client.send_raw(&message::framed(&query)).unwrap();
        let answer = client.receive(SOON).message();
        assert_eq!((message::id(&answer), message::response_code(&answer)), (1, rcode::SERVFAIL), "{opcode}");
        assert_eq!(answer[2], 0x81 | opcode << 3, "an answer of this opcode");
        assert_eq!(seen.swap(0, Ordering::SeqCst), times, "opcode {opcode}");
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// Its answers come and go nowhere; those who stay get theirs over the same connection.
#[test]
fn rfc7766_6_2_4_nothing_is_sent_to_a_client_that_left() {
    let backend = FakeBackend::start(|connection| {
        let mut queries: Vec<_> = (0..6).map_while(|_| connection.query()).collect();
        // The last one is of the client that stays; its answer comes last.
        for query in queries.drain(..) {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
        connection.wait_closed();
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut leaves = counterfoil.client();
    for id in 0..5 {
        leaves.ask(id, "left.example.test", qtype::A);
    }
    wait::until("the queries are there", SOON, || backend.queries() == 5);
    leaves.reset();
    counterfoil.wait_metrics("they are abandoned", SOON, |m| m.sum("queries_abandoned_total", &[]) == 5.0);
    let mut stays = counterfoil.client();
    stays.assert_served();
    assert_eq!((counterfoil.metrics().sum("answers_total", &[]), backend.accepted()), (1.0, 1));
    drop(stays);
    counterfoil.assert_quiescent();
}

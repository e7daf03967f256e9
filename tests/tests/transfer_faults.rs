//! Zone transfers that no real primary would send, and clients that do not read them. What dnsdist's own tests ask of
//! transfers (`test_AXFR.py`) is named after them.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Received};
use counterfoil_tests::fake_backend::{Connection, FakeBackend};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::wait;
use counterfoil_tests::zone::Rr::{Soa, Text};
use counterfoil_tests::zone::{self, Rr, fetch, without_ids};

const SOON: Duration = Duration::from_secs(10);
const FORMERR: u8 = 1;
const SERIAL: u32 = 9;

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon().set("pool", "query_timeout", "\"2s\"")
}

fn is_transfer(query: &[u8]) -> bool {
    message::question_name(query).as_deref() == Some(zone::NAME)
}

/// Answers each transfer with these messages and then waits, or closes; other queries as usual.
fn primary(messages: &'static [&'static [Rr]], closes: bool) -> FakeBackend {
    FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            if !is_transfer(&query) {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                continue;
            }
            for records in messages {
                connection.send(&zone::message(&query, records));
            }
            if closes {
                return;
            }
        }
    })
}

fn ask(client: &mut Client, query: &[u8]) {
    client.send_raw(&message::framed(query)).unwrap();
}

/// What came until nothing came for a while, or the end; and whether it was the end.
fn all_that_comes(client: &mut Client) -> (Vec<Vec<u8>>, bool) {
    let mut messages = Vec::new();
    loop {
        match client.receive(SOON) {
            Received::Message(message) => messages.push(message),
            Received::Nothing => return (messages, false),
            Received::Closed | Received::Reset | Received::Cut => return (messages, true),
        }
    }
}

fn ended(counterfoil: &Counterfoil, outcome: &str) -> f64 {
    counterfoil.metrics().sum("transfers_total", &[("outcome", outcome)])
}

/// `testOneMessageAXFR`, `testFourMessageAXFR`, and messages after the end, which go to nobody: the connection is used on.
#[test]
fn one_message_and_four_message_axfr_and_what_trails() {
    const ONE: &[&[Rr]] = &[&[Soa(SERIAL), Text(9), Soa(SERIAL)]];
    const FOUR: &[&[Rr]] = &[&[Soa(SERIAL)], &[Text(9)], &[Text(8), Text(7)], &[Soa(SERIAL)]];
    const TRAILED: &[&[Rr]] = &[&[Soa(SERIAL), Text(9)], &[Soa(SERIAL)], &[Text(8)], &[Soa(SERIAL)]];
    for (messages, count) in [(ONE, 1), (FOUR, 4), (TRAILED, 2)] {
        for closes in [false, true] {
            let backend = primary(messages, closes);
            let counterfoil = Counterfoil::start(&config(backend.address));
            let mut client = counterfoil.client();
            let query = zone::query(1, None);
            let got = fetch(&mut client, &query, 2);
            assert_eq!(got.len(), count);
            let sent = messages[..count].iter().map(|records| zone::message(&query, records)).collect();
            assert_eq!(without_ids(got), without_ids(sent), "octet by octet");
            client.assert_served();
            assert_eq!((ended(&counterfoil, "complete"), backend.accepted()), (1.0, 2));
            drop(client);
            counterfoil.assert_quiescent();
        }
    }
}

/// `testOneNoSOAAXFR`: dnsdist passes it on. To us it is no zone transfer, and as nothing was passed on, SERVFAIL.
#[test]
fn one_message_without_soa_axfr() {
    let backend = primary(&[&[Text(9), Text(8)]], false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    ask(&mut client, &zone::query(1, None));
    let answer = client.receive(SOON).message();
    assert_eq!((message::id(&answer), message::response_code(&answer)), (1, rcode::SERVFAIL));
    client.assert_served();
    assert_eq!(ended(&counterfoil, "failed"), 1.0);
    assert_eq!(counterfoil.metrics().sum("queries_failed_total", &[("reason", "bad_answer")]), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// `testFourNoFinalSOAAXFR`, `test_InterruptedAXFR`, two SOAs that only begin a sequence, a message that cannot be read, one
/// with another ID, and a backend that says nothing more: what came is delivered, then the client's connection ends. It is
/// not tried again.
#[test]
fn no_final_soa_and_interrupted_transfers() {
    const FULL: &[&[Rr]] = &[&[Soa(SERIAL)], &[Text(9)], &[Text(8), Text(7)], &[Text(1)]];
    const TWO_SOAS: &[&[Rr]] = &[&[Soa(SERIAL), Soa(3)]];
    type Ending = fn(&mut Connection, &[u8]);
    let endings: [(&str, Ending); 5] = [
        ("closed", |_, _| {}),
        ("reset", |connection, _| connection.reset()),
        ("unreadable", |connection, query| {
            let mut cut = zone::message(query, &[Text(9)]);
            cut.pop();
            connection.send(&cut);
            connection.wait_closed();
        }),
        ("half a message", |connection, query| {
            let message = message::framed(&zone::message(query, &[Text(9)]));
            connection.send_raw(&message[..message.len() / 2]);
        }),
        ("silent", |connection, _| connection.wait_closed()),
    ];
    for (since, messages) in [(None, FULL), (Some(3), FULL), (Some(3), TWO_SOAS)] {
        // Each connection has an ending of its own, in turn.
        let backend = FakeBackend::start(move |connection| {
            let (what, ending) = endings[connection.number % endings.len()];
            let Some(query) = connection.query() else { return };
            for records in messages {
                connection.send(&zone::message(&query, records));
            }
            // A reset throws away what is not read yet: the messages are on their way to the client.
            let _ = connection.query_within(Duration::from_millis(if what == "reset" { 300 } else { 0 }));
            ending(connection, &query);
        });
        let counterfoil = Counterfoil::start(&config(backend.address));
        for (number, (what, _)) in endings.iter().enumerate() {
            let mut client = counterfoil.client();
            ask(&mut client, &zone::query(1, since));
            let (got, closed) = all_that_comes(&mut client);
            assert_eq!((got.len(), closed), (messages.len(), true), "{what}");
            let so_far = (number + 1) as f64;
            let metrics = counterfoil.metrics();
            assert_eq!((ended(&counterfoil, "broken"), backend.accepted()), (so_far, number + 1), "{what}");
            let reason = [("reason", "transfer_broken")];
            assert_eq!(metrics.sum("client_connections_closed_total", &reason), so_far, "{what}");
            assert_eq!(metrics.sum("queries_failed_total", &[]), so_far, "{what}");
        }
        counterfoil.assert_quiescent();
    }
}

/// IXFR as RFC 1995 has it, one record a message or all in one, in the manner of AXFR, and up to date: the end is found, and
/// what trails goes to nobody.
#[test]
fn ixfr_ends() {
    const SEQUENCES: &[&[Rr]] = &[
        &[Soa(SERIAL)],
        &[Soa(3)],
        &[Text(1)],
        &[Soa(5)],
        &[Text(2)],
        &[Soa(5), Text(3), Soa(SERIAL)],
        &[Text(4)],
        &[Soa(SERIAL)],
        &[Text(9)],
    ];
    const ONE_MESSAGE: &[&[Rr]] = &[&[Soa(SERIAL), Soa(3), Text(1), Soa(SERIAL), Text(2), Soa(SERIAL)], &[Soa(SERIAL)]];
    const FULL: &[&[Rr]] = &[&[Soa(SERIAL)], &[Text(1)], &[Text(2), Soa(SERIAL)], &[Text(9)]];
    const EMPTY_ZONE: &[&[Rr]] = &[&[Soa(SERIAL), Soa(SERIAL)], &[Text(9)]];
    const UP_TO_DATE: &[&[Rr]] = &[&[Soa(3)], &[Text(9)]];
    const OLDER: &[&[Rr]] = &[&[Soa(2)], &[Soa(2)]];
    const NOTHING: &[&[Rr]] = &[&[], &[Soa(3)]];
    for (messages, count) in
        [(SEQUENCES, 8), (ONE_MESSAGE, 1), (FULL, 3), (EMPTY_ZONE, 1), (UP_TO_DATE, 1), (OLDER, 1), (NOTHING, 1)]
    {
        let backend = primary(messages, false);
        let counterfoil = Counterfoil::start(&config(backend.address));
        let mut client = counterfoil.client();
        ask(&mut client, &zone::query(1, Some(3)));
        for number in 0..count {
            let answer = client.receive(SOON).message();
            assert_eq!(message::id(&answer), 1, "{messages:?}: {number}");
        }
        // The next that comes is the answer to this.
        client.assert_served();
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// CVE-2026-40209: an IXFR whose SOA cannot be read left dnsdist's connection to the backend stuck. Here none is opened.
#[test]
fn an_ixfr_whose_soa_cannot_be_read_holds_no_connection() {
    let backend = primary(&[&[Soa(SERIAL)]], false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    let good = zone::query(1, Some(3));
    let mut broken: Vec<Vec<u8>> = (zone::query(1, None).len()..good.len()).map(|cut| good[..cut].to_vec()).collect();
    let mut without = good.clone();
    without[9] = 0;
    let mut long_data = good.clone();
    let at = long_data.len() - 23;
    long_data[at] = 0xff;
    broken.extend([without, long_data]);
    // Who sends nothing else is let go: each is another client.
    for query in &broken {
        let mut client = counterfoil.client();
        ask(&mut client, query);
        assert_eq!(message::response_code(&client.receive(SOON).message()), FORMERR, "{query:02x?}");
    }
    assert_eq!(backend.accepted(), 0);
    let failed = counterfoil.metrics().sum("queries_failed_total", &[("reason", "malformed")]);
    assert_eq!(failed, broken.len() as f64);
    let mut client = counterfoil.client();
    client.assert_served();
    drop(client);
    counterfoil.assert_quiescent();
}

/// Amid queries, three transfers in one write, with a header and without: each stream whole and in order, all queries
/// answered, one connection for each transfer.
#[test]
fn transfers_among_queries() {
    const MESSAGES: usize = 40;
    for identity in [None, Some("connection"), Some("address")] {
        let backend = FakeBackend::start(move |connection| {
            if identity.is_some() && connection.header().is_none() {
                return;
            }
            while let Some(query) = connection.query() {
                if !is_transfer(&query) {
                    connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                    continue;
                }
                for number in 0..=MESSAGES {
                    let is_end = number == 0 || number == MESSAGES;
                    connection.send(&zone::message(&query, &[if is_end { Soa(SERIAL) } else { Text(number) }]));
                }
            }
        });
        let mut config = config(backend.address);
        if let Some(identity) = identity {
            config = config.identity(identity);
        }
        let counterfoil = Counterfoil::start(&config);
        let mut client = counterfoil.client();
        let mut burst = Vec::new();
        for id in 0..60_u16 {
            let query = match id % 20 {
                7 => zone::query(id, None),
                _ => message::query(id, &format!("n{id}.example.test"), qtype::A),
            };
            burst.extend(message::framed(&query));
        }
        client.send_raw(&burst).unwrap();
        let mut streams: BTreeMap<u16, usize> = BTreeMap::new();
        let mut answered = 0;
        while answered < 57 || streams.len() < 3 || streams.values().any(|messages| *messages <= MESSAGES) {
            let answer = client.receive(SOON).message();
            let id = message::id(&answer);
            if !is_transfer(&answer) {
                assert_eq!(message::question_name(&answer), Some(format!("n{id}.example.test")));
                answered += 1;
                continue;
            }
            let number = streams.entry(id).or_default();
            let query = zone::query(id, None);
            let is_end = *number == 0 || *number == MESSAGES;
            let expected = zone::message(&query, &[if is_end { Soa(SERIAL) } else { Text(*number) }]);
            assert_eq!(answer, expected, "message {number} of {id}");
            *number += 1;
        }
        assert_eq!(streams.len(), 3);
        assert_eq!((ended(&counterfoil, "complete"), answered), (3.0, 57));
        client.assert_served();
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// RFC 9103 section 6.3.3: beyond the limit SERVFAIL, and queries go on.
#[test]
fn too_many_transfers_at_once() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            if is_transfer(&query) {
                connection.send(&zone::message(&query, &[Soa(SERIAL)]));
            } else {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        }
    });
    let config =
        config(backend.address).set("connections", "max_owned_per_client", 4).set("pool", "query_timeout", "\"30s\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    for id in 0..5 {
        ask(&mut client, &zone::query(id, None));
    }
    let mut codes = BTreeMap::new();
    for _ in 0..5 {
        *codes.entry(message::response_code(&client.receive(SOON).message())).or_insert(0) += 1;
    }
    assert_eq!(codes, BTreeMap::from([(rcode::NOERROR, 3), (rcode::SERVFAIL, 2)]));
    client.assert_served();
    // To say only that no more queries come would be no reason to end what was asked for.
    client.reset();
    counterfoil.assert_quiescent();
    assert_eq!(ended(&counterfoil, "abandoned"), 3.0);
}

/// A client that leaves in the middle ends its transfer's connection at once: nobody reads the rest.
#[test]
fn a_client_that_leaves_ends_its_transfer() {
    let backend = FakeBackend::start(|connection| {
        let Some(query) = connection.query() else { return };
        connection.send(&zone::message(&query, &[Soa(SERIAL)]));
        // Without end: only that the connection is closed ends the script.
        while connection.query_within(Duration::from_millis(1)).is_err() {
            connection.send(&zone::message(&query, &[Text(1000)]));
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    for reset in [false, true] {
        let mut client = counterfoil.client();
        ask(&mut client, &zone::query(1, None));
        for _ in 0..100 {
            client.receive(SOON).message();
        }
        if reset {
            client.reset();
        } else {
            drop(client);
        }
        wait::until("the transfer's connection is closed", SOON, || backend.open() == 0);
    }
    assert_eq!(ended(&counterfoil, "abandoned"), 2.0);
    counterfoil.assert_quiescent();
}

/// A stream of so many messages of this size, SOA first and last; how many were sent is counted.
fn endless(count: usize, octets: usize, sent: Arc<AtomicUsize>) -> FakeBackend {
    FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            if !is_transfer(&query) {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                continue;
            }
            connection.send(&zone::message(&query, &[Soa(SERIAL)]));
            let framed = message::framed(&zone::message(&query, &[Text(octets)]));
            for _ in 0..count {
                connection.send_raw(&framed);
                sent.fetch_add(1, Ordering::Relaxed);
            }
            connection.send(&zone::message(&query, &[Soa(SERIAL)]));
        }
    })
}

/// 200 MB for a client that reads nothing, then all: little memory, and nobody else waits.
#[test]
fn a_slow_reader_costs_little_memory_and_nobody_else() {
    const COUNT: usize = 4000;
    let sent = Arc::new(AtomicUsize::new(0));
    let backend = endless(COUNT, 50_000, Arc::clone(&sent));
    let config = config(backend.address).set("listener", "write_timeout", "\"60s\"");
    let counterfoil = Counterfoil::start(&config);
    counterfoil.client().assert_served();
    let before = counterfoil.process.resident_bytes();
    let mut slow = counterfoil.client();
    ask(&mut slow, &zone::query(1, None));
    let paused = [("state", "paused")];
    counterfoil.wait_metrics("the transfer waits", SOON, |metrics| metrics.sum("backend_connections", &paused) == 1.0);
    for _ in 0..200 {
        counterfoil.client().assert_served();
    }
    assert!(sent.load(Ordering::Relaxed) < COUNT, "the backend was not stopped");
    let mut most = 0;
    let mut messages = 0;
    while messages < COUNT + 2 {
        slow.receive(SOON).message();
        messages += 1;
        if messages % 100 == 0 {
            most = most.max(counterfoil.process.resident_bytes());
        }
    }
    println!("{} KiB more for {} MB", most.saturating_sub(before) / 1024, COUNT * 50_000 / 1_000_000);
    assert!(most < before + 8 * 1024 * 1024, "{before} octets before, {most} at most");
    assert_eq!(ended(&counterfoil, "complete"), 1.0);
    drop(slow);
    counterfoil.assert_quiescent();
}

fn many_messages(count: usize) {
    let backend = endless(count, 40, Arc::default());
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let before = counterfoil.process.resident_bytes();
    ask(&mut client, &zone::query(1, None));
    for number in 0..count + 2 {
        let answer = client.receive(SOON).message();
        assert_eq!(message::id(&answer), 1, "{number}");
    }
    client.assert_served();
    assert!(counterfoil.process.resident_bytes() < before + 8 * 1024 * 1024);
    assert_eq!(counterfoil.metrics().sum("transfer_messages_total", &[]), (count + 2) as f64);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn fifty_thousand_messages() {
    many_messages(50_000);
}

#[test]
#[ignore = "soak"]
fn soak_transfers_a_million_messages() {
    many_messages(1_000_000);
}

/// F59: the backend has sent all it had and closed, and the client takes its time. Both views have a socket in CLOSE_WAIT
/// with a query in flight, far beyond the watchdog's patience, and it is no finding.
#[test]
fn a_transfer_that_waits_for_its_client_is_no_leak() {
    let stop = Arc::new(AtomicBool::new(false));
    let enough = Arc::clone(&stop);
    let asked = Arc::new(Mutex::new(0));
    let count = Arc::clone(&asked);
    let backend = FakeBackend::start(move |connection| {
        let Some(query) = connection.query() else { return };
        connection.send(&zone::message(&query, &[Soa(SERIAL)]));
        let mut messages = 2;
        // Until nobody reads any more; then the rest, which the kernel has room for: eight messages. So slowly that it is
        // noticed before they are sent.
        while !enough.load(Ordering::SeqCst) {
            connection.send(&zone::message(&query, &[Text(16_000)]));
            messages += 1;
            let _ = connection.query_within(Duration::from_millis(20));
        }
        connection.send(&zone::message(&query, &[Soa(SERIAL)]));
        *count.lock().unwrap() = messages;
    });
    let config = config(backend.address)
        .set("listener", "write_timeout", "\"30s\"")
        .set("watchdog", "interval", "\"100ms\"")
        .set("watchdog", "grace", "\"300ms\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    ask(&mut client, &zone::query(1, None));
    counterfoil.wait_metrics("the transfer waits", SOON * 3, |metrics| {
        metrics.sum("backend_connections", &[("state", "paused")]) == 1.0
    });
    stop.store(true, Ordering::SeqCst);
    wait::until("the backend has closed", SOON, || backend.open() == 0);
    counterfoil.wait_metrics("the kernel knows", SOON, |metrics| {
        metrics.sum("kernel_backend_sockets", &[("tcp_state", "close_wait")]) == 1.0
    });
    let sweeps = || counterfoil.metrics().sum("watchdog_sweeps_total", &[]);
    let enough = sweeps() + 40.0;
    while sweeps() < enough {
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0, "{}", counterfoil.process.tail());
        assert_eq!(metrics.sum("reaped_total", &[]), 0.0);
    }
    let expected = *asked.lock().unwrap();
    for number in 0..expected {
        assert_eq!(message::id(&client.receive(SOON).message()), 1, "{number} of {expected}");
    }
    assert_eq!(ended(&counterfoil, "complete"), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("reaped_total", &[]), 0.0);
}

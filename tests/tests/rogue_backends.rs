//! Backends that break off, answer too much, or answer more than the client takes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};

const SOON: Duration = Duration::from_secs(5);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon().set("pool", "query_timeout", "\"2s\"")
}

/// A reset or FIN in the middle of an answer while others are outstanding: that one fails, the others are asked again,
/// and no part of the broken answer reaches anybody.
#[test]
fn a_connection_that_breaks_in_the_middle_of_an_answer() {
    for reset in [false, true] {
        let backend = FakeBackend::start(move |connection| {
            if connection.number > 0 {
                while let Some(query) = connection.query() {
                    connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                }
                return;
            }
            let queries: Vec<_> = (0..5).map_while(|_| connection.query()).collect();
            let broken = message::framed(&message::answer_to(&queries[2], [192, 0, 2, 66]));
            connection.send_raw(&broken[..broken.len() - 3]);
            if reset {
                // What was sent must not be thrown away with the reset.
                std::thread::sleep(Duration::from_millis(100));
                connection.reset();
            }
        });
        let counterfoil = Counterfoil::start(&config(backend.address));
        let mut client = counterfoil.client();
        for id in 0..5 {
            client.ask(id, &format!("n{id}.example.test"), qtype::A);
        }
        let codes: HashMap<u16, u8> = (0..5)
            .map(|_| client.receive(SOON).message())
            .map(|answer| (message::id(&answer), message::response_code(&answer)))
            .collect();
        for id in 0..5 {
            let expected = if id == 2 { rcode::SERVFAIL } else { rcode::NOERROR };
            assert_eq!(codes[&id], expected, "{codes:?}");
        }
        assert_eq!(client.receive(Duration::from_millis(50)), Received::Nothing);
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// The backend closes idle connections in the very moment in which queries come: no client ever sees that.
#[test]
fn a_fin_that_crosses_a_query_is_never_seen_by_the_client() {
    let backend = FakeBackend::start(|connection| {
        let mut count = 0;
        // Closes after three answers, while the next query is on its way.
        while let Some(query) = connection.query() {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            count += 1;
            if count == 3 {
                return;
            }
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    Load { count: 600, ..Load::default() }.run(&mut client).assert_all_answered(600);
    assert!(backend.accepted() >= 200);
    drop(client);
    counterfoil.assert_quiescent();
}

/// Valid answers that nobody asked for, one after the other: the first one ends the connection.
#[test]
fn a_flood_of_unsolicited_answers_ends_the_connection_and_costs_no_memory() {
    let backend = FakeBackend::start(|connection| {
        let Some(query) = connection.query() else { return };
        let mut flood = Vec::new();
        let mut answer = message::answer_to(&query, [192, 0, 2, 66]);
        answer[0] ^= 0xff;
        answer.resize(60_000, 0);
        while flood.len() < 4 << 20 {
            flood.extend_from_slice(&message::framed(&answer));
        }
        // 1 GiB, or until the forwarder has had enough.
        for _ in 0..256 {
            connection.send_raw(&flood);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "retries", 0));
    let before = counterfoil.process.resident_bytes();
    let mut client = counterfoil.client();
    let answer = client.exchange(1, "flood.example.test", qtype::A);
    assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    counterfoil.wait_metrics("the connection is closed", SOON, |metrics| {
        metrics.sum("backend_connections_closed_total", &[("reason", "protocol_violation")]) >= 1.0
    });
    let after = counterfoil.process.resident_bytes();
    assert!(after < before + (16 << 20), "{before} -> {after}");
    drop(client);
    counterfoil.assert_quiescent();
}

/// Answers of 64 KiB for a client that does not read: what is kept for it is bounded by `max_pending_answers`, and nobody
/// else waits.
#[test]
fn large_answers_for_a_client_that_does_not_read() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            if message::question_name(&query).is_none_or(|name| !name.starts_with("short.")) {
                answer.resize(65_535, 0);
            }
            connection.send(&answer);
        }
    });
    let config = config(backend.address).set("listener", "write_timeout", "\"2s\"");
    let counterfoil = Counterfoil::start(&config);
    let before = counterfoil.process.resident_bytes();
    let mut deaf = counterfoil.client();
    // Nobody knows better than that its answers are short.
    deaf.exchange(0, "short.example.test", qtype::A);
    for id in 0..500 {
        deaf.ask(id, &format!("n{id}.example.test"), qtype::A);
    }
    let mut other = counterfoil.client();
    for id in 0..20 {
        assert_eq!(other.exchange(id, "n.example.test", qtype::A).len(), 65_535);
    }
    let grown = counterfoil.process.resident_bytes().saturating_sub(before);
    println!("{} KiB more than at the start", grown >> 10);
    // 32 MB of answers were asked for, 100 at a time, which have 6.5 MB. One that comes when the 256 KiB are full is
    // not kept.
    assert!(grown < 6 << 20, "{grown} octets of memory");
    assert!(counterfoil.metrics().sum("queries_failed_total", &[("reason", "client_slow")]) > 0.0);
    counterfoil.wait_metrics("the client that does not read is closed", SOON, |metrics| {
        metrics.sum("client_connections_closed_total", &[("reason", "write_timeout")]) == 1.0
    });
    drop((deaf, other));
    counterfoil.assert_quiescent();
}

/// 60 MB for a client that reads slowly, but all the time: it gets everything, and what it has read takes no memory.
#[test]
fn long_answers_for_a_client_that_reads_slowly() {
    const COUNT: usize = 1000;
    let backend = FakeBackend::answering_at_length(60_000);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "max_pending_answers", "\"4MiB\""));
    let before = counterfoil.process.resident_bytes();
    let mut client = counterfoil.client();
    let mut writer = client.clone_for_writing();
    // Few enough at first that their answers fit; from then on the program sees how long they are.
    for id in 0..10 {
        client.ask(id, "long.example.test", qtype::A);
    }
    let asking =
        std::thread::spawn(move || (10..COUNT as u16).for_each(|id| writer.ask(id, "long.example.test", qtype::A)));
    let mut most = 0;
    for received in 0..COUNT {
        let answer = client.receive(SOON).message();
        assert_eq!((answer.len(), message::response_code(&answer)), (60_000, rcode::NOERROR), "answer {received}");
        std::thread::sleep(Duration::from_millis(1));
        if received % 20 == 0 {
            most = counterfoil.process.resident_bytes().max(most);
        }
    }
    assert!(asking.join().is_ok(), "all were sent");
    println!("{} KiB more than at the start", most.saturating_sub(before) >> 10);
    assert!(most < before + (24 << 20), "{before} -> {most}");
    drop(client);
    counterfoil.assert_quiescent();
}

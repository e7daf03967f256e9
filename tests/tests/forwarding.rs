//! What goes in comes out: pipelining, order, identifiers, octets.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn pipelined_queries_are_answered_in_the_order_of_the_answers() {
    const COUNT: usize = 10;
    // Waits for all, then answers backwards.
    let backend = FakeBackend::start(|connection| {
        let mut queries: Vec<_> = (0..COUNT).map_while(|_| connection.query()).collect();
        queries.reverse();
        for query in &queries {
            connection.send(&message::answer_to(query, [192, 0, 2, 53]));
        }
        connection.wait_closed();
    });
    let counterfoil = Counterfoil::start(&Config::new(backend.address).settles_soon());
    let mut client = counterfoil.client();
    let name = |id: usize| format!("n{id}.example.test");
    for id in 0..COUNT {
        client.ask(id as u16, &name(id), qtype::A);
    }
    for id in (0..COUNT).rev() {
        let answer = client.receive(SOON).message();
        assert_eq!(usize::from(message::id(&answer)), id);
        assert_eq!(message::question_name(&answer), Some(name(id)));
    }
    assert_eq!(backend.accepted(), 1, "pipelined towards the backend, too");
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn two_queries_with_one_id_get_one_answer_each() {
    let backend = FakeBackend::start(|connection| {
        let (Some(first), Some(second)) = (connection.query(), connection.query()) else { return };
        assert_ne!(message::id(&first), message::id(&second), "the forwarder's own IDs are distinct");
        connection.send(&message::answer_to(&second, [192, 0, 2, 2]));
        connection.send(&message::answer_to(&first, [192, 0, 2, 1]));
        connection.wait_closed();
    });
    let counterfoil = Counterfoil::start(&Config::new(backend.address).settles_soon());
    let mut client = counterfoil.client();
    client.ask(1, "first.example.test", qtype::A);
    client.ask(1, "second.example.test", qtype::A);
    for (name, last) in [("second.example.test", 2), ("first.example.test", 1)] {
        let answer = client.receive(SOON).message();
        assert_eq!(message::id(&answer), 1);
        assert_eq!(message::question_name(&answer).as_deref(), Some(name));
        assert_eq!(answer.last(), Some(&last));
    }
    assert_eq!(client.receive(Duration::from_millis(200)), Received::Nothing, "one answer each");
    drop(client);
    counterfoil.assert_quiescent();
}

/// A query with an OPT record with an unknown option, a TSIG-like record after it, and mixed case in the name.
fn odd_query(id: u16) -> Vec<u8> {
    let mut query = message::query(id, "MiXed.eXample.test", 65_280);
    query[11] = 2;
    query.extend_from_slice(&[0, 0, 41, 0x10, 0, 0, 0, 0x80, 0, 0, 7, 0xfd, 0xe9, 0, 3, 1, 2, 3]);
    query.extend_from_slice(&[3, b'k', b'e', b'y', 0, 0, 250, 0, 255, 0, 0, 0, 0, 0, 4, 9, 8, 7, 6]);
    query
}

#[test]
fn no_octet_but_the_id_changes() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&seen);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            record.lock().unwrap().push(query.clone());
            // An answer with octets after its last record, and some that no parser knows.
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            answer[3] |= 0x30;
            answer.extend_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
            connection.send(&answer);
        }
    });
    let counterfoil = Counterfoil::start(&Config::new(backend.address).settles_soon());
    let mut client = counterfoil.client();
    let query = odd_query(0xabcd);
    client.send_raw(&message::framed(&query)).unwrap();
    let answer = client.receive(SOON).message();
    let mut expected = message::answer_to(&query, [192, 0, 2, 53]);
    expected[3] |= 0x30;
    expected.extend_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
    assert_eq!(answer, expected);
    assert_eq!(seen.lock().unwrap()[0][2..], query[2..]);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn a_query_may_come_octet_by_octet() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&Config::new(backend.address).settles_soon());
    let mut client = counterfoil.client();
    for octet in message::framed(&message::query(3, "slow.example.test", qtype::A)) {
        client.send_raw(&[octet]).unwrap();
    }
    assert_eq!(message::id(&client.receive(SOON).message()), 3);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn the_largest_answer_passes() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            answer.resize(65_535, 0xa5);
            connection.send(&answer);
        }
    });
    // Twenty of them at once may wait for the client to read.
    let config = Config::new(backend.address).set("listener", "max_pending_answers", "\"2MiB\"");
    let counterfoil = Counterfoil::start(&config.settles_soon());
    let mut client = counterfoil.client();
    for id in 0..20 {
        client.ask(id, "large.example.test", qtype::A);
    }
    for _ in 0..20 {
        let answer = client.receive(SOON).message();
        assert_eq!((answer.len(), answer.last()), (65_535, Some(&0xa5)));
    }
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn a_client_that_half_closes_gets_all_its_answers() {
    const COUNT: usize = 20;
    // Nothing is answered before all queries are there, so the client's FIN is in before the first answer.
    let backend = FakeBackend::start(|connection| {
        let queries: Vec<_> = (0..COUNT).map_while(|_| connection.query()).collect();
        for query in &queries {
            connection.send(&message::answer_to(query, [192, 0, 2, 53]));
        }
        connection.wait_closed();
    });
    let config = Config::new(backend.address).settles_soon();
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    for id in 0..COUNT {
        client.ask(id as u16, &format!("n{id}.example.test"), qtype::A);
    }
    client.finish_sending();
    for _ in 0..COUNT {
        client.receive(SOON).message();
    }
    assert_eq!(client.receive(SOON), Received::Closed);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("queries_abandoned_total", &[]), 0.0);
}

/// The answers of clients that left go nowhere, and the shared connection they used stays good for others.
#[test]
fn a_client_that_leaves_spoils_nothing_for_others() {
    let backend = FakeBackend::answering(false);
    // On a busy machine it looks like a backend that answers one query at a time, which is given more connections.
    let config = Config::new(backend.address).backend_key("max_connections", 1).settles_soon();
    let counterfoil = Counterfoil::start(&config);
    let mut stays = counterfoil.client();
    for round in 0..50_u16 {
        let mut leaves = counterfoil.client();
        for id in 0..5 {
            leaves.ask(id, &format!("left-{round}-{id}.example.test"), qtype::A);
        }
        if round % 2 == 0 {
            leaves.reset();
        }
        let name = |n: usize| format!("stays-{round}-{n}.example.test");
        Load { count: 5, in_flight: 5, name: &name, ..Load::default() }.run(&mut stays).assert_all_answered(5);
    }
    drop(stays);
    counterfoil.assert_quiescent();
    assert_eq!(backend.accepted(), 1, "one shared connection did it all");
}

#[test]
fn a_burst_of_ten_thousand_in_one_write_is_answered() {
    const COUNT: u16 = 10_000;
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&Config::new(backend.address).settles_soon());
    let mut client = counterfoil.client();
    let burst: Vec<u8> = (0..COUNT)
        .flat_map(|id| message::framed(&message::query(id, &format!("n{id}.example.test"), qtype::A)))
        .collect();
    let mut writer = client.clone_for_writing();
    let sending = std::thread::spawn(move || writer.send_raw(&burst));
    let mut answered = vec![false; usize::from(COUNT)];
    for _ in 0..COUNT {
        let answer = client.receive(SOON).message();
        let id = message::id(&answer);
        assert_eq!(message::question_name(&answer), Some(format!("n{id}.example.test")));
        assert!(!std::mem::replace(&mut answered[usize::from(id)], true), "{id} twice");
    }
    sending.join().unwrap().unwrap();
    drop(client);
    counterfoil.assert_quiescent();
}

//! What dnsdist's own tests ask of forwarding over TCP and of the PROXY protocol towards backends, asked of this program
//! from outside. Each test is named after its counterpart; the numbers of connections are this program's.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::{Connection, FakeBackend, Header};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(5);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon().set("pool", "query_timeout", "\"2s\"")
}

fn answer(connection: &mut Connection, query: &[u8]) {
    connection.send(&message::answer_to(query, [192, 0, 2, 53]));
}

/// Opened connections, and queries that found one that had carried another before.
fn new_and_reused(counterfoil: &Counterfoil) -> (f64, f64) {
    let metrics = counterfoil.metrics();
    (metrics.sum("backend_connections_opened_total", &[]), metrics.sum("backend_connections_reused_total", &[]))
}

fn asks(client: &mut Client, count: usize, in_flight: usize) {
    Load { count, in_flight, ..Load::default() }.run(client).assert_all_answered(count);
}

/// `testProxyTCP`, `testProxyTCPWithTLVs`: addresses, transport, TLVs in order; the query as it was. (Type 255, which it has,
/// is reserved by the specification, and refused in a configuration.)
#[test]
fn proxy_tcp_and_fixed_tlvs() {
    let seen = Arc::new(Mutex::new(Vec::<(Header, Vec<u8>)>::new()));
    let record = Arc::clone(&seen);
    let backend = FakeBackend::start(move |connection| {
        let Some(header) = connection.header() else { return };
        while let Some(query) = connection.query() {
            record.lock().unwrap().push((header.clone(), query.clone()));
            answer(connection, &query);
        }
    });
    for tlvs in [&[][..], &[(0, "foo"), (42, "bar"), (1, ""), (0xef, "proxy-protocol")]] {
        let config = tlvs.iter().fold(config(backend.address).identity("connection"), |c, (kind, v)| c.tlv(*kind, v));
        let counterfoil = Counterfoil::start(&config);
        let mut client = counterfoil.client();
        let query = message::query(0x1234, "proxy.example.test", qtype::A);
        client.send_raw(&message::framed(&query)).unwrap();
        assert!(message::same_question(&query, &client.receive(SOON).message()));
        let (header, mut arrived) = seen.lock().unwrap().pop().unwrap();
        assert_eq!((header.source, header.destination), (Some(client.local_addr()), Some(counterfoil.address)));
        let expected: Vec<(u8, Vec<u8>)> = tlvs.iter().map(|(kind, v)| (*kind, v.as_bytes().to_vec())).collect();
        assert_eq!(header.tlvs, expected);
        arrived[..2].copy_from_slice(&query[..2]);
        assert_eq!(arrived, query);
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// `testProxyTCPSeveralQueriesOnSameConnection`
#[test]
fn proxy_tcp_several_queries_on_same_connection() {
    let backend = FakeBackend::answering(true);
    let counterfoil = Counterfoil::start(&config(backend.address).identity("connection"));
    let mut client = counterfoil.client();
    asks(&mut client, 10, 1);
    assert_eq!(new_and_reused(&counterfoil), (1.0, 9.0));
    assert_eq!(backend.most_open(), 1);
    drop(client);
    counterfoil.assert_quiescent();
}

/// `testProxyTCPSeveralQueriesWithRandomTLVOnSameConnection`, whose backend takes the next connection only after the last
/// one was closed: no connection is kept that stands in the way.
#[test]
fn proxy_tcp_several_queries_with_random_tlv_on_same_connection() {
    for (tlv, one_at_a_time) in [("{uuid}", false), ("{qname_label:1}", true)] {
        let turn = Mutex::new(());
        let backend = FakeBackend::start(move |connection| {
            let _turn = turn.lock().unwrap();
            let Some(_) = connection.header() else { return };
            while let Some(query) = connection.query() {
                answer(connection, &query);
            }
        });
        let mut config = config(backend.address).identity("connection").tlv(0xe0, tlv);
        if one_at_a_time {
            config = config.backend_key("max_connections", 1);
        }
        let counterfoil = Counterfoil::start(&config);
        let mut client = counterfoil.client();
        asks(&mut client, 10, 1);
        assert_eq!(new_and_reused(&counterfoil), (10.0, 0.0), "{tlv}");
        assert!(backend.most_open() <= 2, "{tlv}: {}", backend.most_open());
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// `TestOOORWithServerNotOOO`: the backend takes one query at a time on each connection.
#[test]
fn server_not_out_of_order() {
    for (count, in_flight) in [(5, 5), (100, 10)] {
        let backend = FakeBackend::answering(false);
        let counterfoil = Counterfoil::start(&config(backend.address).backend_key("max_in_flight", 1));
        let mut client = counterfoil.client();
        asks(&mut client, count, in_flight);
        assert!(backend.accepted() <= in_flight, "{} connections", backend.accepted());
        drop(client);
        counterfoil.assert_quiescent();
    }
}

/// `TestOOORWithServerOOO`: five queries, answered in reverse, on one connection.
#[test]
fn server_out_of_order_reversed() {
    let backend = FakeBackend::start(|connection| {
        let mut queries: Vec<_> = (0..5).map_while(|_| connection.query()).collect();
        while let Some(query) = queries.pop() {
            answer(connection, &query);
        }
        connection.wait_closed();
    });
    let counterfoil = Counterfoil::start(&config(backend.address).backend_key("max_in_flight", 5));
    let mut client = counterfoil.client();
    asks(&mut client, 5, 5);
    assert_eq!(backend.accepted(), 1);
    drop(client);
    counterfoil.assert_quiescent();
}

/// `TestOOORWithServerOOO`: 100 queries, 10 in flight, 5 on each backend connection: two connections.
#[test]
fn server_out_of_order_five_per_connection() {
    let read = AtomicUsize::new(0);
    let backend = FakeBackend::start(move |connection| {
        while let Some(query) = connection.query() {
            // With ten in flight each connection has five, but for the last ones.
            let mut queries = vec![query];
            while queries.len() < 5
                && let Ok(Some(query)) = connection.query_within(Duration::from_millis(300))
            {
                queries.push(query);
            }
            // Nothing is answered before the first ten are there.
            read.fetch_add(queries.len(), Ordering::SeqCst);
            let _ = wait::poll(SOON, || (read.load(Ordering::SeqCst) >= 10).then_some(()));
            while let Some(query) = queries.pop() {
                answer(connection, &query);
            }
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).backend_key("max_in_flight", 5));
    let mut client = counterfoil.client();
    asks(&mut client, 100, 10);
    assert_eq!((backend.accepted(), backend.queries()), (2, 100));
    drop(client);
    counterfoil.assert_quiescent();
}

/// `TestTCPShort`: lengths and bodies in pieces, both ways, and messages of several kilobytes.
#[test]
fn tcp_short_reads_and_writes() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut large = message::answer_to(&query, [192, 0, 2, 53]);
            large.resize(7680, 0x5a);
            let framed = message::framed(&large);
            for piece in [&framed[..1], &framed[1..2], &framed[2..700], &framed[700..]] {
                connection.send_raw(piece);
                std::thread::yield_now();
            }
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let mut query = message::query(1, "short.example.test", qtype::A);
    query.resize(7680, 0xa5);
    let framed = message::framed(&query);
    for piece in [&framed[..1], &framed[1..2], &framed[2..100], &framed[100..]] {
        client.send_raw(piece).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(client.receive(SOON).message().len(), 7680);
    drop(client);
    counterfoil.assert_quiescent();
}

/// `TestBrokenTCPFastOpen`: it reads and closes, each time; every try is one connection that died.
#[test]
fn died_reading_response_as_often_as_it_is_tried() {
    let backend = FakeBackend::start(|connection| {
        connection.query();
    });
    // As many as make no pause.
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "retries", 2));
    let mut client = counterfoil.client();
    let failed = client.exchange(1, "broken.example.test", qtype::A);
    assert_eq!(message::response_code(&failed), rcode::SERVFAIL);
    assert_eq!(backend.accepted(), 3);
    let died = counterfoil.metrics().sum("backend_connections_closed_total", &[("reason", "unanswered")]);
    assert_eq!(died, 3.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// `test_IncomingConnection_BackendNotOOOR`, "connection closed on read (or write), then OK": the query is answered in the
/// end. (There it is closed four times. Here a backend that does so three times in a row is left alone for a while, so the
/// query fails then; the next one is answered.)
#[test]
fn backend_closed_then_ok() {
    let backend = FakeBackend::start(|connection| {
        if connection.number < 2 {
            connection.query();
            return if connection.number == 0 { connection.reset() } else { connection.close() };
        }
        while let Some(query) = connection.query() {
            answer(connection, &query);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "retries", 4));
    let mut client = counterfoil.client();
    let answered = client.exchange(1, "then-ok.example.test", qtype::A);
    assert_eq!(message::response_code(&answered), rcode::NOERROR);
    assert_eq!(counterfoil.metrics().sum("pool_retries_total", &[]), 2.0);
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn backend_closed_three_times_then_ok() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            if connection.number < 3 {
                return;
            }
            answer(connection, &query);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "retries", 5));
    let mut client = counterfoil.client();
    let failed = client.exchange(1, "then-ok.example.test", qtype::A);
    assert_eq!((message::response_code(&failed), backend.accepted()), (rcode::SERVFAIL, 3));
    wait::until("it is tried again", SOON, || {
        message::response_code(&client.exchange(2, "then-ok.example.test", qtype::A)) == rcode::NOERROR
    });
    assert_eq!(backend.accepted(), 4);
    drop(client);
    counterfoil.assert_quiescent();
}

/// "Client closed before the answer": nobody gets it, and the backend's connection is used again.
#[test]
fn client_gone_before_the_answer_leaves_the_backend_connection_usable() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            if message::question_name(&query).is_some_and(|name| name.starts_with("slow")) {
                std::thread::sleep(Duration::from_millis(300));
            }
            answer(connection, &query);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut leaver = counterfoil.client();
    leaver.ask(1, "slow.example.test", qtype::A);
    wait::until("the backend has it", SOON, || backend.queries() == 1);
    leaver.reset();
    let mut client = counterfoil.client();
    asks(&mut client, 20, 1);
    assert_eq!(backend.accepted(), 1);
    assert_eq!(counterfoil.metrics().sum("queries_abandoned_total", &[]), 1.0);
    drop(client);
    counterfoil.assert_quiescent();
}

/// "PROXY, three in flight, the connection dies after the first answer": the header goes first again, and the two others
/// are asked again, each apart, as either may have brought it down.
#[test]
fn proxy_header_is_sent_again_after_a_reconnect() {
    let backend = FakeBackend::start(|connection| {
        let Some(header) = connection.header() else { return };
        assert_eq!(header.tlvs, [(0xe0, b"fixed".to_vec())]);
        if connection.number == 0 {
            let queries: Vec<_> = (0..3).map_while(|_| connection.query()).collect();
            answer(connection, &queries[0]);
            return;
        }
        while let Some(query) = connection.query() {
            answer(connection, &query);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).identity("connection").tlv(0xe0, "fixed"));
    let mut client = counterfoil.client();
    for id in 0..3 {
        client.ask(id, &format!("n{id}.example.test"), qtype::A);
    }
    for _ in 0..3 {
        assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::NOERROR);
    }
    assert_eq!(backend.accepted(), 3);
    let metrics = counterfoil.metrics();
    assert_eq!((metrics.sum("pool_repeats_total", &[]), metrics.sum("pool_retries_total", &[])), (2.0, 0.0));
    drop(client);
    counterfoil.assert_quiescent();
}

/// "Backend accepts two at a time": five queries, no more than two on a connection, all answered.
#[test]
fn five_queries_two_at_a_time_per_connection() {
    let backend = FakeBackend::start(|connection| {
        while let Some(first) = connection.query() {
            let second = connection.query_within(Duration::from_millis(50)).ok().flatten();
            assert!(connection.query_within(Duration::from_millis(50)).is_err(), "never three");
            for query in second.into_iter().chain([first]) {
                answer(connection, &query);
            }
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).backend_key("max_in_flight", 2));
    let mut client = counterfoil.client();
    asks(&mut client, 5, 5);
    assert_eq!(backend.accepted(), 3);
    drop(client);
    counterfoil.assert_quiescent();
}

/// "Endless immediate answers": thousands of queries and answers that are always there already need no depth of stack.
#[test]
fn immediate_answers_without_end() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "max_in_flight", 10_000));
    let mut client = counterfoil.client();
    asks(&mut client, 20_000, 5_000);
    drop(client);
    counterfoil.assert_quiescent();
}

/// `test-dnsdist-connections-cache`: the same connection while it is usable, another once it is not, and none after the
/// idle timeout.
#[test]
fn connections_cache() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            answer(connection, &query);
            if message::question_name(&query).is_some_and(|name| name.starts_with("last")) {
                return;
            }
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    asks(&mut client, 10, 1);
    assert_eq!(backend.accepted(), 1);
    client.exchange(1, "last.example.test", qtype::A);
    asks(&mut client, 10, 1);
    assert_eq!(backend.accepted(), 2);
    wait::until("the idle one is closed", SOON, || backend.open() == 0);
    asks(&mut client, 1, 1);
    assert_eq!(backend.accepted(), 3);
    drop(client);
    counterfoil.assert_quiescent();
}

/// "I/O error with queries that are not sent yet": all of them are asked again, none twice.
#[test]
fn queued_queries_survive_an_error_of_the_connection() {
    let backend = FakeBackend::start(|connection| {
        if connection.number == 0 {
            connection.query();
            return connection.reset();
        }
        while let Some(query) = connection.query() {
            answer(connection, &query);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).backend_key("max_in_flight", 100));
    let mut client = counterfoil.client();
    for id in 0..50 {
        client.ask(id, &format!("n{id}.example.test"), qtype::A);
    }
    let mut ids: Vec<u16> = (0..50).map(|_| message::id(&client.receive(SOON).message())).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..50).collect::<Vec<u16>>());
    assert_eq!(client.receive(Duration::from_millis(100)), Received::Nothing);
    drop(client);
    counterfoil.assert_quiescent();
}

//! Bugs that other programs had with answers that reached the wrong client, and with connections that were used for the
//! wrong query: none of them is here. docs/regressions.md tells what happened there.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::proxy_header::{raw, v2};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).set("connections", "idle_timeout", "\"500ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    )
}

/// The leftmost label of the question.
fn label(query: &[u8]) -> String {
    message::question_name(query).unwrap().split('.').next().unwrap().to_owned()
}

/// CVE-2026-33596: more queries than there are IDs, over one connection, while some wait for their answers all the time.
#[test]
fn cve_2026_33596_more_queries_than_ids_on_one_connection() {
    const HELD: u16 = 40;
    const COUNT: usize = 70_000;
    let backend = FakeBackend::start(|connection| {
        let mut held: Vec<Vec<u8>> = Vec::new();
        while let Some(query) = connection.query() {
            match label(&query).as_str() {
                "release" => {
                    for (n, query) in held.drain(..).enumerate() {
                        connection.send(&message::answer_to(&query, [192, 0, 2, n as u8]));
                    }
                    connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                }
                name if name.starts_with("held") => held.push(query),
                _ => connection.send(&message::answer_to(&query, [192, 0, 2, 53])),
            }
        }
    });
    let config = config(backend.address)
        .set("pool", "query_timeout", "\"5m\"")
        .set("listener", "max_in_flight", 1000)
        .backend_key("max_in_flight", 1000);
    let counterfoil = Counterfoil::start(&config);
    let mut holds = counterfoil.client();
    for id in 0..HELD {
        holds.ask(id, &format!("held{id}.example.test"), qtype::A);
    }
    wait::until("they are there", SOON, || backend.queries() == usize::from(HELD));
    let mut other = counterfoil.client();
    let load = Load { count: COUNT, in_flight: 500, deadline: Duration::from_secs(200), ..Load::default() };
    load.run(&mut other).assert_all_answered(COUNT);
    assert_eq!(holds.receive(Duration::from_millis(10)), Received::Nothing);
    other.exchange(1, "release.example.test", qtype::A);
    for id in 0..HELD {
        let answer = holds.receive(SOON).message();
        assert_eq!((message::id(&answer), answer.last()), (id, Some(&(id as u8))));
        assert_eq!(message::question_name(&answer), Some(format!("held{id}.example.test")));
    }
    assert_eq!(backend.accepted(), 1, "all on one connection");
    drop((holds, other));
    counterfoil.assert_quiescent();
}

/// CVE-2026-33602: an ID beside the right one, with the right question, is no answer.
#[test]
fn cve_2026_33602_an_answer_with_a_neighbouring_id() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 66]);
            let off: u16 = label(&query).parse().unwrap();
            answer[..2].copy_from_slice(&message::id(&query).wrapping_add(off).to_be_bytes());
            connection.send(&answer);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("pool", "retries", 0));
    let mut client = counterfoil.client();
    let wrong = [1, 2, 255, 256, 32_767, 32_768, 65_280, 65_534, 65_535];
    for off in wrong {
        let answer = client.exchange(9, &format!("{off}.example.test"), qtype::A);
        assert_eq!(message::response_code(&answer), rcode::SERVFAIL, "off by {off}");
    }
    assert_eq!(message::response_code(&client.exchange(9, "0.example.test", qtype::A)), rcode::NOERROR);
    let reason = [("reason", "protocol_violation")];
    assert_eq!(counterfoil.metrics().sum("backend_connections_closed_total", &reason), wrong.len() as f64);
    drop(client);
    counterfoil.assert_quiescent();
}

/// CVE-2020-25684: an answer with the ID and the question of a query that is in flight on another connection is none.
#[test]
fn cve_2020_25684_an_answer_over_another_connection() {
    let first = Arc::new(Mutex::new(Vec::new()));
    let done = Arc::new(AtomicBool::new(false));
    let backend = {
        let (first, done) = (Arc::clone(&first), Arc::clone(&done));
        FakeBackend::start(move |connection| {
            let Some(_) = connection.header() else { return };
            let Some(query) = connection.query() else { return };
            if connection.number == 0 {
                first.lock().unwrap().clone_from(&query);
                wait::poll(SOON, || done.load(Ordering::SeqCst).then_some(()));
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            } else {
                connection.send(&message::answer_to(&first.lock().unwrap(), [192, 0, 2, 66]));
            }
            connection.wait_closed();
        })
    };
    let counterfoil = Counterfoil::start(&config(backend.address).identity("connection").set("pool", "retries", 0));
    let (mut asks, mut other) = (counterfoil.client(), counterfoil.client());
    asks.ask(5, "first.example.test", qtype::A);
    wait::until("the first query is there", SOON, || !first.lock().unwrap().is_empty());
    let answer = other.exchange(5, "second.example.test", qtype::A);
    assert_eq!(message::response_code(&answer), rcode::SERVFAIL);
    assert_eq!(asks.receive(Duration::from_millis(50)), Received::Nothing);
    done.store(true, Ordering::SeqCst);
    assert_eq!(asks.receive(SOON).message().last(), Some(&53));
    drop((asks, other));
    counterfoil.assert_quiescent();
}

/// CVE-2023-28858 (redis-py): a client leaves between its query and the answer. The next one, with the same ID and the same
/// question over the same connection, gets its own answer and not the earlier one.
#[test]
fn cve_2023_28858_who_leaves_leaves_no_answer_to_the_next() {
    const ROUNDS: usize = 50;
    let backend = FakeBackend::start(|connection| {
        for round in 0.. {
            let (Some(first), Some(second)) = (connection.query(), connection.query()) else { return };
            connection.send(&message::answer_to(&first, [192, 0, 2, 66]));
            connection.send(&message::answer_to(&second, [192, 0, 2, round]));
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    for round in 0..ROUNDS {
        let mut leaves = counterfoil.client();
        leaves.ask(1, "same.example.test", qtype::A);
        wait::until("the query is there", SOON, || backend.queries() == 2 * round + 1);
        leaves.reset();
        let mut stays = counterfoil.client();
        let answer = stays.exchange(1, "same.example.test", qtype::A);
        assert_eq!(answer.last(), Some(&(round as u8)), "the answer of the client that left");
        assert_eq!(stays.receive(Duration::from_millis(1)), Received::Nothing);
    }
    counterfoil.assert_quiescent();
    assert_eq!(backend.accepted(), 1);
}

/// routedns #525, CVE-2025-5994 (Unbound): queries that look the same are not merged. Each client gets the answer to what it
/// sent, here by its client subnet.
#[test]
fn cve_2025_5994_equal_questions_are_not_merged() {
    let backend = FakeBackend::start(|connection| {
        let queries: Vec<_> = (0..20).map_while(|_| connection.query()).collect();
        // The last octet is that of the address in the option.
        for query in queries.iter().rev() {
            let mut answer = message::answer_to(&query[..query.len() - 23], [192, 0, 2, query[query.len() - 1]]);
            (answer[10], answer[11]) = (0, 0);
            connection.send(&answer);
        }
        connection.wait_closed();
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut clients: Vec<Client> = (0..20).map(|_| counterfoil.client()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        let mut query = message::query(1, "same.example.test", qtype::A);
        query[11] = 1;
        // OPT with a client subnet (RFC 7871) of 192.0.2.n/32.
        query.extend_from_slice(b"\0\0\x29\x04\xd0\0\0\0\0\0\x0c\0\x08\0\x08\0\x01\x20\0\xc0\0\x02");
        query.push(n as u8);
        client.send_raw(&message::framed(&query)).unwrap();
    }
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.receive(SOON).message().last(), Some(&(n as u8)));
    }
    assert_eq!((backend.accepted(), backend.queries()), (1, 20));
    drop(clients);
    counterfoil.assert_quiescent();
}

/// dnsdist 97e8507d46 and 1c9c001cbe: what is asked again after a connection died goes under its own header.
#[test]
fn dnsdist_97e8507d46_a_retry_has_the_header_of_its_query() {
    let died = Mutex::new(HashSet::new());
    let backend = FakeBackend::start(move |connection| {
        let Some(header) = connection.header() else { return };
        while let Some(query) = connection.query() {
            let label = label(&query);
            assert_eq!(header.tlvs, [(0xe0, label.as_bytes().to_vec())]);
            if died.lock().unwrap().insert(label) {
                return;
            }
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    for identity in ["connection", "address"] {
        let config = config(backend.address).identity(identity).tlv(0xe0, "{qname_label:1}");
        let counterfoil = Counterfoil::start(&config.backend_key("max_in_flight", 2));
        let mut client = counterfoil.client();
        for set in 0..20 {
            for id in 0..3 {
                client.ask(id, &format!("{identity}{set}.n{id}.example.test"), qtype::A);
            }
            for _ in 0..3 {
                let answer = client.receive(SOON).message();
                assert_eq!(message::response_code(&answer), rcode::NOERROR, "{identity}{set}");
            }
        }
        drop(client);
        counterfoil.assert_quiescent();
        let metrics = counterfoil.metrics();
        assert!(metrics.sum("pool_retries_total", &[]) + metrics.sum("pool_repeats_total", &[]) >= 20.0);
    }
}

/// HAProxy b5b40a984: who may share a connection is decided by every octet of the header: families, addresses, and the
/// boundaries, order, number and types of TLVs.
#[test]
fn haproxy_b5b40a984_every_octet_of_a_header_counts() {
    let backend = FakeBackend::start(|connection| {
        let Some(header) = connection.header() else { return };
        let told: String = header.bytes[12..].iter().map(|octet| format!("{octet:02x}")).collect();
        while let Some(query) = connection.query() {
            connection.send(&message::text_answer_to(&query, &told));
        }
    });
    let config = config(backend.address).identity("address").accept_proxy(&["127.0.0.1"]).set(
        "connections",
        "idle_timeout",
        "\"2s\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let service = "198.51.100.53:53";
    let v4 = |tlvs: &[(u8, &[u8])]| v2("192.0.2.1:4000", service, tlvs);
    let headers = [
        v4(&[]),
        v4(&[(0xe0, b"")]),
        v4(&[(0xe0, b""), (0xe0, b"")]),
        v4(&[(0xe0, b"abc")]),
        v4(&[(0xe1, b"abc")]),
        v4(&[(0xe0, b"ab"), (0xe1, b"c")]),
        v4(&[(0xe0, b"a"), (0xe1, b"bc")]),
        v4(&[(0xe1, b"c"), (0xe0, b"ab")]),
        v2("192.0.2.2:4000", service, &[]),
        v2("[2001:db8::1]:4000", "[2001:db8::53]:53", &[]),
        // UNIX: the connection's own address.
        raw(0x21, 0x31, &[0; 216]),
    ];
    let mut told = Vec::new();
    for _ in 0..2 {
        for header in &headers {
            let mut client = counterfoil.client();
            client.send_raw(header).unwrap();
            told.push(message::texts(&client.exchange(1, "told.example.test", qtype::TXT)).concat());
        }
    }
    let (first, second) = told.split_at(headers.len());
    assert_eq!(first, second);
    assert_eq!(first.iter().collect::<HashSet<_>>().len(), headers.len(), "{first:?}");
    assert_eq!(backend.accepted(), headers.len(), "the second time each finds its connection");
    counterfoil.assert_quiescent();
}

/// CVE-2018-14663, CVE-2026-42004 (dnsdist): octets behind a query are no second query, no part of an answer of our own, and
/// no option of it: an OPT record that the header does not count, or that is in another section, fills in no TLV.
#[test]
fn cve_2018_14663_octets_behind_a_query_are_nothing() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let headers = Arc::clone(&seen);
    let backend = FakeBackend::start(move |connection| {
        let Some(header) = connection.header() else { return };
        while let Some(query) = connection.query() {
            headers.lock().unwrap().push(header.tlvs.clone());
            if label(&query) == "fails" {
                return;
            }
            let question = message::query(message::id(&query), "asked.example.test", qtype::A);
            connection.send(&message::answer_to(&question, [192, 0, 2, 53]));
        }
    });
    let config = config(backend.address).identity("address").tlv(0xe0, "{edns:65001}").set("pool", "retries", 0);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let opt = b"\0\0\x29\x04\xd0\0\0\0\0\0\x0a\xfd\xe9\0\x06tenant";
    let second = message::framed(&message::query(2, "second.example.test", qtype::A));
    let query = |name: &str, counts: [u8; 3], behind: &[u8]| {
        let mut query = message::query(1, name, qtype::A);
        (query[7], query[9], query[11]) = counts.into();
        [&query[..], behind].concat()
    };
    for (name, counts, behind, tlv) in [
        ("asked", [0, 0, 1], &opt[..], &b"tenant"[..]),
        ("asked", [0, 0, 0], opt, b""),
        ("asked", [0, 1, 0], opt, b""),
        ("asked", [1, 0, 0], opt, b""),
        ("asked", [0, 0, 0], &second, b""),
        ("fails", [0, 0, 0], opt, b""),
        ("fails", [0, 0, 0], &second, b""),
    ] {
        let query = query(&format!("{name}.example.test"), counts, behind);
        client.send_raw(&message::framed(&query)).unwrap();
        let answer = client.receive(SOON).message();
        assert_eq!(message::id(&answer), 1);
        if name == "fails" {
            assert_eq!((message::response_code(&answer), answer.len()), (rcode::SERVFAIL, query.len() - behind.len()));
        }
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        // What fails on a connection that has carried others is asked once more, alone.
        assert!(seen.len() == 1 || name == "fails", "{counts:?}, one query: {seen:?}");
        seen.dedup();
        assert_eq!(seen, [[(0xe0, tlv.to_vec())]], "{counts:?}");
        assert_eq!(client.receive(Duration::from_millis(10)), Received::Nothing);
    }
    drop(client);
    counterfoil.assert_quiescent();
}

//! Faults of clients and of load balancers in front, each named by its row in docs/faults.md.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::proxy_header::raw;
use counterfoil_tests::{netns, wait};

const SOON: Duration = Duration::from_secs(10);
const NOTIMP: u8 = 4;
const FORMERR: u8 = 1;

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon()
}

/// Its network goes away: no FIN, no RST. Its time runs out, and the connections that it owned go with it.
#[test]
fn f03_a_client_that_vanishes() {
    let (near, far) = netns::pair();
    let vanish = Arc::new(AtomicBool::new(false));
    near.run(|| {
        let gone = Arc::clone(&vanish);
        let backend = FakeBackend::start(move |connection| {
            if connection.header().is_none() {
                return;
            }
            while let Some(query) = connection.query() {
                // The second query of each is answered when nobody can be reached any more.
                if message::id(&query) == 2 {
                    wait::poll(SOON, || gone.load(Ordering::SeqCst).then_some(()));
                }
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        });
        let config = config(backend.address)
            .listen(SocketAddr::from((near.address, 0)))
            .identity("connection")
            .set("connections", "idle_timeout", "\"60s\"")
            .set("listener", "idle_timeout", "\"1s\"")
            .set("listener", "write_timeout", "\"1s\"");
        let counterfoil = Counterfoil::start_with(&config, Options { namespace: Some(&near), ..Options::default() });
        let mut clients: Vec<Client> = far.run(|| (0..4).map(|_| Client::connect(counterfoil.address, None)).collect());
        for client in &mut clients {
            client.exchange(1, "first.example.test", qtype::A);
        }
        for client in &mut clients[..2] {
            client.ask(2, "second.example.test", qtype::A);
        }
        wait::until("the second queries are there", SOON, || backend.queries() == 6);
        assert_eq!(counterfoil.backend_sockets(backend.address).len(), 4);
        far.ip("link set veth0 down");
        vanish.store(true, Ordering::SeqCst);
        counterfoil.assert_quiescent();
        wait::until("no socket is left", SOON, || counterfoil.backend_sockets(backend.address).is_empty());
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "owner_gone")]), 4.0);
        drop((clients, backend));
    });
}

/// With a reset in the middle of a query: an owned connection closes with its client, a shared one stays and is used.
#[test]
fn f05_a_client_that_resets_while_its_query_is_in_flight() {
    for owned in [false, true] {
        let release = Arc::new(AtomicBool::new(false));
        let released = Arc::clone(&release);
        let backend = FakeBackend::start(move |connection| {
            if owned && connection.header().is_none() {
                return;
            }
            while let Some(query) = connection.query() {
                if message::id(&query) != 77 && connection.number == 0 && !released.load(Ordering::SeqCst) {
                    wait::poll(SOON, || released.load(Ordering::SeqCst).then_some(()));
                }
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        });
        let mut config = config(backend.address);
        if owned {
            config = config.identity("connection");
        }
        let counterfoil = Counterfoil::start(&config);
        let mut leaves = counterfoil.client();
        leaves.ask(1, "left.example.test", qtype::A);
        wait::until("the query is there", SOON, || backend.queries() == 1);
        leaves.reset();
        counterfoil.wait_metrics("the query is abandoned", SOON, |m| m.sum("queries_abandoned_total", &[]) == 1.0);
        if owned {
            wait::until("its connection goes, too", SOON, || counterfoil.backend_sockets(backend.address).is_empty());
        }
        release.store(true, Ordering::SeqCst);
        let mut stays = counterfoil.client();
        stays.assert_served();
        assert_eq!(backend.accepted(), if owned { 2 } else { 1 });
        drop(stays);
        counterfoil.assert_quiescent();
    }
}

/// A length and nothing behind it, half a length, half a message and then the end; and the longest that there can be.
#[test]
fn f09_lengths_and_what_follows_them() {
    let backend = FakeBackend::start(|connection| {
        while let Some(mut query) = connection.query() {
            query[2] |= 0x80;
            connection.send(&query);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "message_timeout", "\"500ms\""));
    for (bytes, ends) in
        [(&[0xff, 0xff][..], false), (&[0], false), (&[0, 40, 1, 2, 3], false), (&[0], true), (&[0, 40, 1, 2, 3], true)]
    {
        let mut client = counterfoil.client();
        expect_served_echo(&mut client);
        client.send_raw(bytes).unwrap();
        let start = Instant::now();
        if ends {
            client.finish_sending();
        }
        client.assert_closed(SOON);
        assert!(start.elapsed() < Duration::from_secs(5), "{bytes:?}: {:?}", start.elapsed());
    }
    let reason = [("reason", "message_timeout")];
    assert_eq!(counterfoil.metrics().sum("client_connections_closed_total", &reason), 3.0);
    let mut client = counterfoil.client();
    let mut longest = message::query(9, "longest.example.test", qtype::A);
    longest.resize(65_535, 0);
    client.send_raw(&message::framed(&longest)).unwrap();
    longest[2] |= 0x80;
    assert!(client.receive(SOON).message() == longest, "not the octets that were sent");
    drop(client);
    counterfoil.assert_quiescent();
}

#[track_caller]
fn expect_served_echo(client: &mut Client) {
    client.exchange(76, "echo.example.test", qtype::A);
}

/// Whatever a message holds, its client gets one answer with its ID, and the connection can be used further.
#[test]
fn f10_messages_of_all_sorts() {
    let backend = FakeBackend::start(|connection| {
        while let Some(mut query) = connection.query() {
            query[2] |= 0x80;
            connection.send(&query);
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address));
    let mut client = counterfoil.client();
    let plain = |id| message::query(id, "sort.example.test", qtype::A);
    let opcode = |id, opcode: u8| {
        let mut query = plain(id);
        query[2] = opcode << 3;
        query
    };
    let with_name = |id: u16, name: &[u8]| {
        let mut query = plain(id)[..12].to_vec();
        query.extend_from_slice(name);
        query.extend_from_slice(&[0, 1, 0, 1]);
        query
    };
    let mut no_question = plain(10)[..12].to_vec();
    no_question[5] = 0;
    let mut two_questions = plain(11);
    two_questions[5] = 2;
    two_questions.extend_from_within(12..);
    let mut dso = no_question.clone();
    (dso[1], dso[2]) = (12, 6 << 3);
    for (what, query, expected) in [
        ("NOTIFY", opcode(1, 4), rcode::NOERROR),
        ("UPDATE", opcode(2, 5), rcode::NOERROR),
        ("no question", no_question, rcode::NOERROR),
        ("two questions", two_questions, FORMERR),
        ("DSO", dso, NOTIMP),
        ("a name that points at itself", with_name(13, &[0xc0, 12]), FORMERR),
        ("names that point at each other", with_name(14, &[1, b'a', 0xc0, 16, 0xc0, 14]), FORMERR),
        ("a name without end", with_name(15, &[63; 10]), FORMERR),
    ] {
        client.send_raw(&message::framed(&query)).unwrap();
        let answer = client.receive(SOON).message();
        assert_eq!(message::id(&answer), message::id(&query), "{what}: {answer:02x?}");
        assert_eq!(message::response_code(&answer), expected, "{what}: {answer:02x?}");
        client.exchange(76, "echo.example.test", qtype::A);
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// A checksum may be there once. (A wrong one: `malformed_headers_are_refused`.)
#[test]
fn f20_two_checksums() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).accept_proxy(&["127.0.0.2"]));
    let checksum = [3, 0, 4, 0, 0, 0, 0];
    let payload = [&[9; 12][..], &checksum, &checksum].concat();
    let mut client = counterfoil.client_from("127.0.0.2");
    client.send_raw(&raw(0x21, 0x11, &payload)).unwrap();
    client.assert_closed(SOON);
    let reason = [("reason", "proxy_invalid")];
    assert_eq!(counterfoil.metrics().sum("client_connections_refused_total", &reason), 1.0);
    counterfoil.assert_quiescent();
}

/// Many half-open handshakes of the connection's own protocol: the clients say nothing, and are gone by `idle_timeout`.
#[test]
fn f03_clients_that_never_say_a_word() {
    let backend = FakeBackend::answering(false);
    let counterfoil =
        Counterfoil::start(&config(backend.address).listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).set(
            "listener",
            "idle_timeout",
            "\"700ms\"",
        ));
    let silent: Vec<Client> = (0..90).map(|_| counterfoil.client()).collect();
    let mut client = counterfoil.client_from("127.0.0.9");
    Load { count: 100, ..Load::default() }.run(&mut client).assert_all_answered(100);
    drop(client);
    counterfoil.assert_quiescent();
    drop(silent);
}

//! Limits and timeouts towards clients.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::sockets::Sampler;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(5);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon()
}

/// The server turns this client away: it closes without an answer.
#[track_caller]
fn expect_refused(counterfoil: &Counterfoil, source: &str) {
    let mut client = counterfoil.client_from(source);
    let received = client.receive(SOON);
    assert!(matches!(received, Received::Closed | Received::Reset), "{received:?}");
}

#[track_caller]
fn expect_served(client: &mut Client) {
    Load::default().run(client).assert_all_answered(1);
}

#[test]
fn max_connections_holds() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("server", "max_connections", "3"));
    let mut clients: Vec<Client> = (0..3).map(|_| counterfoil.client()).collect();
    clients.iter_mut().for_each(expect_served);
    expect_refused(&counterfoil, "127.0.0.1");
    let refused = [("reason", "max_connections")];
    assert!(counterfoil.metrics().sum("client_connections_refused_total", &refused) >= 1.0);
    clients.iter_mut().for_each(expect_served);
    clients.pop();
    counterfoil.wait_metrics("a place is free", SOON, |metrics| metrics.sum("client_connections", &[]) == 2.0);
    expect_served(&mut counterfoil.client());
    drop(clients);
    counterfoil.assert_quiescent();
}

#[test]
fn max_connections_per_client_holds_over_all_workers() {
    let backend = FakeBackend::answering(false);
    let config =
        config(backend.address).set("server", "workers", "2").set("listener", "max_connections_per_client", "2");
    let counterfoil = Counterfoil::start(&config);
    let mut clients: Vec<Client> = (0..2).map(|_| counterfoil.client_from("127.0.0.2")).collect();
    clients.iter_mut().for_each(expect_served);
    for _ in 0..4 {
        expect_refused(&counterfoil, "127.0.0.2");
    }
    let mut other = counterfoil.client_from("127.0.0.3");
    expect_served(&mut other);
    assert_eq!(counterfoil.metrics().sum("client_connections_refused_total", &[("reason", "per_client")]), 4.0);
    clients.iter_mut().for_each(expect_served);
    drop((clients, other));
    counterfoil.assert_quiescent();
    expect_served(&mut counterfoil.client_from("127.0.0.2"));
}

#[test]
fn max_in_flight_holds_and_loses_nothing() {
    const LIMIT: usize = 4;
    // Answers only when no further query came for a while: the most that were open at once is what it holds then.
    let backend = FakeBackend::start(|connection| {
        let mut held = Vec::new();
        loop {
            match connection.query_within(Duration::from_millis(50)) {
                Ok(Some(query)) => held.push(query),
                Ok(None) => return,
                Err(_) => {
                    assert!(held.len() <= LIMIT, "{} queries at once", held.len());
                    for query in held.drain(..) {
                        connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                    }
                }
            }
        }
    });
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "max_in_flight", LIMIT));
    let mut client = counterfoil.client();
    Load { count: 40, in_flight: 40, ..Load::default() }.run(&mut client).assert_all_answered(40);
    drop(client);
    counterfoil.assert_quiescent();
}

/// A client that sends far more than may be in flight, says that this was all, and reads only then.
#[test]
fn all_is_answered_after_a_half_close_beyond_max_in_flight() {
    const COUNT: u16 = 1000;
    let backend = FakeBackend::answering_at_length(5000);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "max_in_flight", "4"));
    let mut client = counterfoil.client();
    let queries: Vec<u8> = (0..COUNT)
        .flat_map(|id| message::framed(&message::query(id, &format!("n{id}.example.test"), qtype::A)))
        .collect();
    client.send_raw(&queries).unwrap();
    client.finish_sending();
    for _ in 0..COUNT {
        client.receive(SOON).message();
    }
    assert_eq!(client.receive(SOON), Received::Closed);
    counterfoil.assert_quiescent();
}

/// At a backend's cap queries wait their turn: all are answered, and the cap holds.
#[test]
fn at_the_backends_cap_queries_wait_and_are_answered() {
    let backend = FakeBackend::start(|connection| {
        let Some(_) = connection.header() else { return };
        // Slow enough that they pile up: one query a connection, 20 ms each.
        while let Ok(Some(query)) = connection.query_within(SOON) {
            std::thread::sleep(Duration::from_millis(20));
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let config = config(backend.address)
        .identity("connection")
        .set("connections", "max_wait", "\"4s\"")
        .backend_key("max_connections", 3)
        .backend_key("max_in_flight", 1);
    let counterfoil = Counterfoil::start(&config);
    let sampler = Sampler::start(counterfoil.pid(), backend.address.port());
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                let mut client = counterfoil.client();
                Load { count: 10, in_flight: 2, ..Load::default() }.run(&mut client).assert_all_answered(10);
            });
        }
    });
    let observed = sampler.finish();
    assert!(observed.most <= 3, "{observed:?}");
    counterfoil.assert_quiescent();
    assert!(counterfoil.metrics().sum("pool_acquire_total", &[("result", "wait")]) > 0.0);
}

/// Who waits too long at a cap is told so by SERVFAIL, and nobody hangs.
#[test]
fn a_wait_at_the_cap_ends_at_max_wait() {
    let backend = FakeBackend::start(|connection| connection.wait_closed());
    let config = config(backend.address)
        .identity("connection")
        .set("pool", "query_timeout", "\"3s\"")
        .set("connections", "max_wait", "\"300ms\"")
        .backend_key("max_connections", 1)
        .backend_key("max_in_flight", 1);
    let counterfoil = Counterfoil::start(&config);
    let mut holder = counterfoil.client();
    holder.ask(1, "holds.example.test", qtype::A);
    wait::until("the only place is taken", SOON, || backend.accepted() == 1);
    let mut waiter = counterfoil.client();
    let start = Instant::now();
    let answer = waiter.exchange(1, "waits.example.test", qtype::A);
    let taken = start.elapsed();
    assert_eq!(message::response_code(&answer), message::rcode::SERVFAIL);
    assert!(taken >= Duration::from_millis(250) && taken < Duration::from_secs(2), "{taken:?}");
    assert_eq!(counterfoil.metrics().sum("queries_failed_total", &[("reason", "no_capacity")]), 1.0);
    drop((holder, waiter));
    counterfoil.assert_quiescent();
}

/// From the first octet of a message to its last: more octets are no excuse.
#[test]
fn message_timeout_ends_slow_senders() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "message_timeout", "\"500ms\""));
    let mut client = counterfoil.client();
    expect_served(&mut client);
    let start = Instant::now();
    let query = message::framed(&message::query(1, &format!("{}.example.test", "s".repeat(60)), qtype::A));
    // That would take 4 s.
    let ended = client.drip(&query, Duration::from_millis(50));
    let taken = start.elapsed();
    assert!(matches!(ended, Received::Closed | Received::Reset), "{ended:?}");
    assert!(taken >= Duration::from_millis(400) && taken < Duration::from_millis(2500), "{taken:?}");
    drop(client);
    counterfoil.assert_quiescent();
    let reason = [("reason", "message_timeout")];
    assert_eq!(counterfoil.metrics().sum("client_connections_closed_total", &reason), 1.0);
}

#[test]
fn idle_timeout_ends_idle_clients_and_no_others() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "idle_timeout", "\"600ms\""));
    let mut busy = counterfoil.client();
    let mut silent = counterfoil.client();
    let start = Instant::now();
    let mut ended = None;
    // A client that asks stays; one that never said a word goes.
    while start.elapsed() < Duration::from_millis(2000) {
        expect_served(&mut busy);
        if ended.is_none() && silent.receive(Duration::from_millis(20)) == Received::Closed {
            ended = Some(start.elapsed());
        }
    }
    let ended = ended.expect("the silent one is gone");
    assert!(ended >= Duration::from_millis(500) && ended < Duration::from_millis(1900), "{ended:?}");
    assert_eq!(busy.receive(SOON), Received::Closed);
    drop(busy);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("client_connections_closed_total", &[("reason", "idle_timeout")]), 2.0);
}

/// A length too short for a DNS header is broken framing; what follows can mean nothing.
#[test]
fn a_length_below_a_header_ends_the_connection() {
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    for length in [0_u8, 1, 11] {
        let mut client = counterfoil.client();
        client.send_raw(&[0, length]).unwrap();
        client.send_raw(&vec![0; usize::from(length)]).unwrap();
        let received = client.receive(SOON);
        assert!(matches!(received, Received::Closed | Received::Reset), "length {length}: {received:?}");
    }
    assert_eq!(backend.accepted(), 0);
    counterfoil.assert_quiescent();
}

/// What was asked before the framing broke is answered, also to a client that is slow to read and sends on: a reset would
/// throw away what the kernel has not sent yet.
#[test]
fn answers_before_broken_framing_are_delivered() {
    const COUNT: u16 = 50;
    let backend = FakeBackend::answering_at_length(60_000);
    // All are kept until it reads.
    let config = config(backend.address).set("listener", "max_pending_answers", "\"8MiB\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    for id in 0..COUNT {
        client.ask(id, "large.example.test", qtype::A);
    }
    client.send_raw(&[0; 20_000]).unwrap();
    counterfoil.wait_metrics("all are answered", SOON, |metrics| metrics.sum("answers_total", &[]) == f64::from(COUNT));
    // Whatever it sends after its mistake is nobody's.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(300) && client.send_raw(&[0; 100]).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..COUNT {
        client.receive(SOON).message();
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// The same to a client that does not read at all: `write_timeout` ends it.
#[test]
fn broken_framing_from_a_client_that_never_reads() {
    const COUNT: u16 = 300;
    let backend = FakeBackend::answering_at_length(60_000);
    let config = config(backend.address)
        .set("listener", "write_timeout", "\"4s\"")
        .set("listener", "max_in_flight", COUNT)
        .set("listener", "max_pending_answers", "\"64MiB\"");
    let counterfoil = Counterfoil::start(&config);
    let mut deaf = counterfoil.client();
    let mut sent: Vec<u8> =
        (0..COUNT).flat_map(|id| message::framed(&message::query(id, "large.example.test", qtype::A))).collect();
    sent.extend([0, 3, 0, 0, 0]);
    deaf.send_raw(&sent).unwrap();
    let reason = [("reason", "write_timeout")];
    let metrics = counterfoil.wait_metrics("the deaf client is closed", SOON * 4, |metrics| {
        metrics.sum("client_connections_closed_total", &reason) == 1.0
    });
    assert_eq!(metrics.sum("queries_total", &[]), f64::from(COUNT), "all before the broken framing were read");
    drop(deaf);
    counterfoil.assert_quiescent();
}

/// A client that asks and never reads: its answers are bounded, and others are served all the while.
#[test]
fn a_client_that_never_reads_is_ended() {
    let backend = FakeBackend::answering_at_length(60_000);
    let counterfoil = Counterfoil::start(&config(backend.address).set("listener", "write_timeout", "\"1s\""));
    let before = counterfoil.process.resident_bytes();
    let mut deaf = counterfoil.client();
    let mut writer = deaf.clone_for_writing();
    let sending = std::thread::spawn(move || {
        let name = |n: usize| format!("n{n}.example.test");
        (0..20_000)
            .take_while(|n| writer.send_raw(&message::framed(&message::query(*n as u16, &name(*n), qtype::A))).is_ok())
            .count()
    });
    let mut other = counterfoil.client();
    let reason = [("reason", "write_timeout")];
    counterfoil.wait_metrics("the deaf client is closed", Duration::from_secs(20), |metrics| {
        let start = Instant::now();
        expect_served(&mut other);
        assert!(start.elapsed() < Duration::from_secs(2), "others wait for it: {:?}", start.elapsed());
        metrics.sum("client_connections_closed_total", &reason) == 1.0
    });
    let grown = counterfoil.process.resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} octets of memory");
    while matches!(deaf.receive(SOON), Received::Message(_)) {}
    // What it sent may fit into the kernel's buffers, so it may have got rid of all; how many is no matter.
    sending.join().unwrap();
    drop((deaf, other));
    counterfoil.assert_quiescent();
}

/// No descriptor left: accepting backs off and sheds, does not spin, and goes on when there are some again.
#[test]
fn the_limit_of_descriptors_sheds_and_recovers() {
    const DESCRIPTORS: u32 = 64;
    let backend = FakeBackend::answering(false);
    let config = config(backend.address).set("listener", "max_connections_per_client", "1000");
    let mut counterfoil =
        Counterfoil::start_with(&config, Options { descriptors: Some(DESCRIPTORS), ..Options::default() });
    let mut first = counterfoil.client();
    expect_served(&mut first);
    let flood: Vec<Client> = (0..200).filter_map(|_| Client::try_connect(counterfoil.address, None).ok()).collect();
    // With all descriptors gone /metrics may be out of reach, so what it did is read from outside.
    expect_served(&mut first);
    let cpu = counterfoil.process.cpu_time();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        expect_served(&mut first);
        std::thread::sleep(Duration::from_millis(50));
    }
    let spent = counterfoil.process.cpu_time() - cpu;
    assert!(spent < Duration::from_secs(1), "{spent:?} of CPU time in 2 s of waiting");
    assert!(counterfoil.process.exited().is_none());
    drop(flood);
    wait::until("new clients are served again", SOON, || {
        let Ok(mut client) = Client::try_connect(counterfoil.address, None) else { return false };
        client.ask(1, "again.example.test", qtype::A);
        matches!(client.receive(Duration::from_secs(1)), Received::Message(_))
    });
    drop(first);
    counterfoil.assert_quiescent();
    assert!(counterfoil.metrics().sum("client_connections_refused_total", &[("reason", "descriptors")]) >= 1.0);
}

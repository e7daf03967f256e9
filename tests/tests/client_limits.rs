//! Limits on clients beyond those in `limits.rs`: networks as clients, rates and bans, the times near a limit, answers that
//! nobody reads.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::proxy_header::v2;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(5);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).set("connections", "idle_timeout", "\"300ms\"").set(
        "connections",
        "cleanup_interval",
        "\"100ms\"",
    )
}

#[track_caller]
fn expect_served(client: &mut Client) {
    Load::default().run(client).assert_all_answered(1);
}

#[track_caller]
fn closed(counterfoil: &Counterfoil, reason: &str) -> f64 {
    counterfoil.metrics().sum("client_connections_closed_total", &[("reason", reason)])
}

/// A client at this address behind a load balancer at 127.0.0.1.
fn behind(counterfoil: &Counterfoil, client: &str) -> Client {
    let service = if client.starts_with('[') { "[2001:db8::53]:53" } else { "198.51.100.53:53" };
    counterfoil.client_behind("127.0.0.1", &v2(client, service, &[]))
}

#[test]
fn a_network_counts_as_one_client() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address)
        .accept_proxy(&["127.0.0.1"])
        .set("listener", "max_connections_per_client", 2)
        .set("listener", "client_mask_v4", 24)
        .set("listener", "client_mask_v6", 48);
    let counterfoil = Counterfoil::start(&config);
    let mut clients: Vec<Client> = [
        "192.0.2.1:1",
        "192.0.2.200:1",
        "192.0.3.1:1",
        "[2001:db8:0:1::1]:1",
        "[2001:db8:0:2::1]:1",
        "[2001:db8:1::1]:1",
    ]
    .map(|client| behind(&counterfoil, client))
    .into();
    clients.iter_mut().for_each(expect_served);
    behind(&counterfoil, "192.0.2.3:1").assert_closed(SOON);
    behind(&counterfoil, "[2001:db8:0:3::1]:1").assert_closed(SOON);
    assert_eq!(counterfoil.refused("per_client"), 2.0);
    drop(clients);
    counterfoil.assert_quiescent();
}

/// The rate is that of the address behind PROXY; its load balancer and other clients are not banned with it.
#[test]
fn a_ban_is_for_the_client_and_ends() {
    let backend = FakeBackend::answering(false);
    let config = config(backend.address)
        .accept_proxy(&["127.0.0.1"])
        .set("server", "workers", 2)
        .set("listener", "connection_rate_per_client", 5)
        .set("listener", "ban_duration", "\"1500ms\"");
    let counterfoil = Counterfoil::start(&config);
    let mut first = behind(&counterfoil, "192.0.2.1:1");
    expect_served(&mut first);
    let start = Instant::now();
    // More than five a second, whenever a second begins.
    let mut rest: Vec<Client> = (0..20).map(|_| behind(&counterfoil, "192.0.2.1:1")).collect();
    wait::until("the client is banned", SOON, || {
        counterfoil.refused("connection_rate") + counterfoil.refused("banned") >= 8.0
    });
    assert_eq!(counterfoil.refused("connection_rate"), 1.0, "once: then it is banned");
    expect_served(&mut behind(&counterfoil, "192.0.2.2:1"));
    expect_served(&mut first);
    rest.last_mut().unwrap().assert_closed(SOON);
    wait::until("the ban is over", SOON, || {
        let mut again = behind(&counterfoil, "192.0.2.1:1");
        again.ask(1, "again.example.test", qtype::A);
        matches!(again.receive(SOON), Received::Message(_))
    });
    assert!(start.elapsed() >= Duration::from_millis(1400), "{:?}", start.elapsed());
    drop((first, rest));
    counterfoil.assert_quiescent();
}

/// One client connects as fast as it can: it is banned, which costs little, and others are served all the while.
#[test]
fn a_flood_of_connections_hurts_nobody_else() {
    const FLOOD: usize = 5000;
    let backend = FakeBackend::answering(false);
    let config = config(backend.address).set("listener", "connection_rate_per_client", 20).set(
        "listener",
        "ban_duration",
        "\"1h\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let mut other = counterfoil.client_from("127.0.0.3");
    expect_served(&mut other);
    let before = counterfoil.process.resident_bytes();
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let source = Some("127.0.0.2".parse().unwrap());
            (0..FLOOD).filter(|_| Client::try_connect(counterfoil.address, source).is_ok()).count()
        });
        while !flood.is_finished() {
            let start = Instant::now();
            expect_served(&mut other);
            expect_served(&mut counterfoil.client_from("127.0.0.4"));
            assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
            // Not too often either.
            std::thread::sleep(Duration::from_millis(150));
        }
        assert!(flood.join().unwrap() > FLOOD / 2);
    });
    counterfoil.wait_metrics("the flood is turned away", SOON, |metrics| {
        metrics.sum("client_connections_refused_total", &[("reason", "banned")]) > FLOOD as f64 / 2.0
    });
    let grown = counterfoil.process.resident_bytes().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} octets");
    drop(other);
    counterfoil.assert_quiescent();
}

/// From 90 % of a limit on, new connections get short times; those from before keep theirs.
#[test]
fn near_a_limit_new_connections_are_short() {
    let backend = FakeBackend::answering(false);
    for (section, key) in
        [("server", "max_connections"), ("listener", "max_connections"), ("listener", "max_connections_per_client")]
    {
        let config =
            config(backend.address).set(section, key, 10).set("overload", "max_connection_duration", "\"1500ms\"");
        let counterfoil = Counterfoil::start(&config);
        let mut clients: Vec<Client> = (0..9).map(|_| counterfoil.client()).collect();
        clients.iter_mut().for_each(expect_served);
        assert_eq!(counterfoil.metrics().sum("client_connections_restricted_total", &[]), 0.0, "{key}");
        let start = Instant::now();
        counterfoil.client().assert_closed(SOON);
        let idle = start.elapsed();
        assert!(idle >= Duration::from_millis(400) && idle < Duration::from_secs(3), "{key}: {idle:?}");
        assert_eq!(counterfoil.metrics().sum("client_connections_restricted_total", &[]), 1.0, "{key}");
        // One that asks all the while ends by its duration.
        let start = Instant::now();
        let mut busy = counterfoil.client();
        let mut answered = 0;
        while let Ok(()) = busy.send_raw(&message::framed(&message::query(1, "busy.example.test", qtype::A))) {
            match busy.receive(SOON) {
                Received::Message(_) => answered += 1,
                _ => break,
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let taken = start.elapsed();
        assert!(taken >= Duration::from_millis(1400) && taken < SOON && answered > 3, "{key}: {taken:?}, {answered}");
        assert_eq!((closed(&counterfoil, "idle_timeout"), closed(&counterfoil, "max_duration")), (1.0, 1.0), "{key}");
        clients.iter_mut().for_each(expect_served);
        drop((clients, busy));
        counterfoil.assert_quiescent();
    }
}

/// How many queries of a client that does not read get to the backend.
fn asked_without_reading(max_pending_answers: &str) -> usize {
    let backend = FakeBackend::answering_at_length(60_000);
    let config = config(backend.address)
        .set("listener", "max_in_flight", 4)
        .set("listener", "write_timeout", "\"4s\"")
        .set("listener", "max_pending_answers", format!("\"{max_pending_answers}\""));
    let counterfoil = Counterfoil::start(&config);
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    // The kernel keeps little for it.
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&counterfoil.address.into()).unwrap();
    let queries: Vec<u8> = (0..1000)
        .flat_map(|id| message::framed(&message::query(id, &format!("n{id}.example.test"), qtype::A)))
        .collect();
    socket.send(&queries).unwrap();
    counterfoil.wait_metrics("the deaf client is closed", Duration::from_secs(20), |metrics| {
        metrics.sum("client_connections_closed_total", &[("reason", "write_timeout")]) == 1.0
    });
    drop(socket);
    counterfoil.assert_quiescent();
    backend.queries()
}

#[test]
fn queries_of_a_client_that_does_not_read_wait() {
    let (little, much) = (asked_without_reading("4KiB"), asked_without_reading("8MiB"));
    // 8 MiB are 139 answers; the kernel keeps some in both cases.
    assert!(much >= little + 100, "{little} queries with 4 KiB, {much} with 8 MiB");
}

/// A FORMERR each, without end: bounded. One that asks something good in between is no such client, and loses nothing.
#[test]
fn a_client_that_sends_nothing_but_malformed_messages_is_let_go() {
    const IN_A_ROW: usize = 32;
    const FORMERR: u8 = 1;
    let backend = FakeBackend::answering(false);
    let counterfoil = Counterfoil::start(&config(backend.address));
    // Two questions where one may be; the header says so, and the second is there.
    let malformed = |id: u16| {
        let mut query = message::query(id, "a.example.test", qtype::A);
        query[5] = 2;
        query.extend_from_slice(&[1, b'b', 0, 0, 1, 0, 1]);
        message::framed(&query)
    };
    // An answer is none the less worthless as a query.
    let answers =
        |id: u16| message::framed(&message::answer_to(&message::query(id, "a.example.test", qtype::A), [0; 4]));
    let mut client = counterfoil.client();
    for round in 0..3 {
        for id in 0..IN_A_ROW as u16 - 1 {
            client.send_raw(&malformed(id)).unwrap();
            let formerr = client.receive(SOON).message();
            assert_eq!((message::id(&formerr), message::response_code(&formerr)), (id, FORMERR), "{round}");
        }
        expect_served(&mut client);
    }
    // All at once, and something good before, which is answered, too.
    let good = message::framed(&message::query(7, "good.example.test", qtype::A));
    let all: Vec<u8> = good.into_iter().chain((100..200).flat_map(malformed)).collect();
    client.send_raw(&all).unwrap();
    let mut ids = Vec::new();
    let end = loop {
        match client.receive(SOON) {
            Received::Message(answer) => ids.push(message::id(&answer)),
            end => break end,
        }
    };
    assert_eq!(end, Received::Closed);
    assert_eq!(ids.len(), 1 + IN_A_ROW, "{ids:?}");
    assert!(ids.contains(&7), "{ids:?}");
    assert_eq!(closed(&counterfoil, "not_forwarded"), 1.0);
    // The same without an answer to any of them.
    let mut client = counterfoil.client();
    client.send_raw(&(0..IN_A_ROW as u16).flat_map(answers).collect::<Vec<u8>>()).unwrap();
    assert_eq!(client.receive(SOON), Received::Closed);
    assert_eq!(closed(&counterfoil, "not_forwarded"), 2.0);
    drop(client);
    counterfoil.assert_quiescent();
}

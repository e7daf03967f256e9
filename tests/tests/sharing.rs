//! Many client connections over few backend connections: no answer ever reaches another client.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::sync::Mutex;
use std::time::Duration;

use counterfoil::responder::{Order, Responder, ResponderOptions};
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::{Connection, FakeBackend};
use counterfoil_tests::message::{self, qtype};

const CLIENTS: usize = 100;

/// Client connections that each of the [`CLIENTS`] makes, one after the other.
const VISITS: usize = 10;

/// Answers in random order: keeps up to `window` queries back and lets a random one go when another comes, or when
/// none came for a moment. Every answer repeats its question, which holds the nonce of the client that asked.
fn shuffling(connection: &mut Connection, window: usize) {
    let mut random = fastrand::Rng::with_seed(connection.number as u64);
    if connection.header().is_none() {
        return;
    }
    let mut held: Vec<Vec<u8>> = Vec::new();
    loop {
        match connection.query_within(Duration::from_millis(2)) {
            Ok(Some(query)) => held.push(query),
            Ok(None) => return,
            Err(_) => {
                random.shuffle(&mut held);
                for query in held.drain(..) {
                    connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
                }
            }
        }
        if held.len() > window {
            let query = held.swap_remove(random.usize(0..held.len()));
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    }
}

/// How a client leaves.
#[derive(Clone, Copy, Debug)]
enum Leave {
    /// All answers in.
    Content,
    /// FIN with queries open, nothing read any more.
    Abruptly,
    /// RST with queries open.
    Reset,
    /// FIN for its own side, then reads what is still owed.
    HalfClosed,
}

/// One visit: some queries, all checked; then more, and away.
fn visit(counterfoil: &Counterfoil, nonce: &str, random: &mut fastrand::Rng) -> Result<(), String> {
    let mut client = Client::try_connect(counterfoil.address, None).map_err(|e| e.to_string())?;
    let name = |n: usize| format!("{nonce}-{n}.example.test");
    let count = random.usize(1..30);
    let load = Load { count, in_flight: random.usize(1..6), name: &name, ..Load::default() };
    let outcome = load.run(&mut client);
    if outcome.answered != count || !outcome.foreign.is_empty() {
        return Err(format!("{nonce}: {outcome:?}"));
    }
    let leave = *random.choice(&[Leave::Content, Leave::Abruptly, Leave::Reset, Leave::HalfClosed]).unwrap();
    if matches!(leave, Leave::Content) {
        return Ok(());
    }
    let open = random.u16(1..6);
    for id in 0..open {
        client.ask(id, &format!("{nonce}-last-{id}.example.test"), qtype::A);
    }
    // Some leave at once, some when the first answers come in.
    if random.bool() {
        check_last(&client.receive(Duration::from_secs(5)), nonce)?;
    }
    match leave {
        Leave::Reset => client.reset(),
        Leave::HalfClosed => {
            client.finish_sending();
            loop {
                match client.receive(Duration::from_secs(5)) {
                    Received::Closed => break,
                    received => check_last(&received, nonce)?,
                }
            }
        }
        Leave::Content | Leave::Abruptly => drop(client),
    }
    Ok(())
}

/// The answer must be to one of the last queries of this very visit.
fn check_last(received: &Received, nonce: &str) -> Result<(), String> {
    let Received::Message(answer) = received else { return Err(format!("{nonce}: {received:?}")) };
    let expected = format!("{nonce}-last-{}.example.test", message::id(answer));
    match message::question_name(answer) {
        Some(name) if name == expected => Ok(()),
        other => Err(format!("{nonce} got an answer to {other:?}")),
    }
}

fn no_answer_reaches_another_client(identity: &str, workers: usize) {
    let backend = FakeBackend::start(|connection| shuffling(connection, 20));
    let config = Config::new(backend.address)
        .identity(identity)
        .set("server", "workers", workers)
        .set("listener", "max_connections_per_client", 2 * CLIENTS)
        .set("connections", "idle_timeout", "\"2s\"")
        .backend_key("max_in_flight", 100);
    let counterfoil = Counterfoil::start(&config);
    let errors = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (counterfoil, errors) = (&counterfoil, &errors);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(number as u64);
                for round in 0..VISITS {
                    if let Err(error) = visit(counterfoil, &format!("c{number}-{round}"), &mut random) {
                        errors.lock().unwrap().push(error);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().unwrap();
    assert!(errors.is_empty(), "{} visits went wrong: {:#?}", errors.len(), &errors[..errors.len().min(5)]);
    println!("{} client connections, {} backend connections", CLIENTS * VISITS, backend.accepted());
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("client_connections_opened_total", &[]), (CLIENTS * VISITS) as f64);
    assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "protocol_violation")]), 0.0);
    // At most 100 clients with 5 queries each at a time, and 100 fit on one connection.
    assert!(backend.most_open() <= 10 * workers, "they share: {} open at once", backend.most_open());
}

/// A hundred clients of ten addresses: each answer holds the nonce of its query and the address of its client, as the
/// PROXY header named it to the server, and the clients of one address share their connections.
#[test]
fn every_answer_names_the_client_that_asked() {
    const QUERIES: u16 = 50;
    let options = ResponderOptions { order: Order::Reversed, ..ResponderOptions::default() };
    let responder = Responder::bind(([127, 0, 0, 1], 0).into(), options).unwrap().start().unwrap();
    let config = Config::new(responder.addr()).identity("address").tlv(0xe0, "{client_ip}").set(
        "connections",
        "idle_timeout",
        "\"2s\"",
    );
    let counterfoil = Counterfoil::start(&config);
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let counterfoil = &counterfoil;
            scope.spawn(move || {
                let address = format!("127.0.0.{}", 11 + number % 10);
                let mut client = counterfoil.client_from(&address);
                for round in 0..QUERIES / 5 {
                    for id in round * 5..round * 5 + 5 {
                        client.ask(id, &format!("c{number}-{id}.counterfoil"), qtype::TXT);
                    }
                    for _ in 0..5 {
                        let answer = client.receive(Duration::from_secs(10)).message();
                        let texts = message::texts(&answer);
                        let has = |text: &str| texts.iter().any(|have| have == text);
                        assert!(has(&format!("qname=c{number}-{}.counterfoil", message::id(&answer))), "{texts:?}");
                        assert!(
                            has(&format!("source={address}:0")) && has(&format!("tlv=0xE0:{address}")),
                            "{texts:?}"
                        );
                    }
                }
            });
        }
    });
    counterfoil.assert_quiescent();
    let counters = responder.counters();
    println!("{} backend connections, {} at once", counters.accepted(), counters.open_max());
    assert_eq!((counters.queries(), counters.bad_headers()), (CLIENTS as u64 * u64::from(QUERIES), 0));
    // Ten clients of an address have 50 queries open at most, and 32 fit on one connection.
    assert!(counters.open_max() <= 10 * 4, "{counters:?}");
}

#[test]
fn a_hundred_clients_of_one_address() {
    no_answer_reaches_another_client("address", 1);
}

#[test]
fn a_hundred_clients_over_two_workers() {
    no_answer_reaches_another_client("forwarder", 2);
}

//! Backends and clients that do all sorts of things at random: every query gets exactly one answer that is its own, or
//! SERVFAIL, and at the end nothing is left.

use std::sync::Mutex;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::{Connection, FakeBackend};
use counterfoil_tests::message::{self, qtype};
use counterfoil_tests::sockets::Sampler;

const CLIENTS: u64 = 30;
const VISITS: usize = 8;
/// Connections to both backends, and to the second of them.
const MAX_TOTAL: usize = 30;
const MAX_SECOND: usize = 20;

/// A connection with a mood: it answers, and at times does something else.
fn moody(connection: &mut Connection, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed ^ connection.number as u64);
    if random.u8(..) < 8 {
        return connection.reset();
    }
    if connection.header().is_none() {
        return;
    }
    let mut held: Vec<Vec<u8>> = Vec::new();
    loop {
        match connection.query_within(Duration::from_millis(3)) {
            Ok(None) => return,
            Err(_) if held.is_empty() => continue,
            Err(_) => {}
            Ok(Some(query)) => held.push(query),
        }
        let Some(query) = held.pop() else { continue };
        let answer = message::answer_to(&query, [192, 0, 2, 53]);
        match random.u8(..) {
            0..200 => connection.send(&answer),
            200..240 => held.insert(0, query),
            240..244 => return,
            244..247 => return connection.reset(),
            // Half an answer.
            247..249 => {
                let bytes = message::framed(&answer);
                return connection.send_raw(&bytes[..bytes.len() / 2]);
            }
            // The answer to something else, with the right ID or a wrong one.
            249..251 => connection.send(&message::answer_to(&message::query(message::id(&query), "x.test", 1), [0; 4])),
            251 => connection.send(&message::answer_to(&message::query(!message::id(&query), "x.test", 1), [0; 4])),
            252 => {
                connection.send(&answer);
                connection.send(&answer);
            }
            // Never answered.
            _ => {}
        }
    }
}

/// One client connection; what went wrong.
fn visit(counterfoil: &Counterfoil, nonce: &str, random: &mut fastrand::Rng) -> Option<String> {
    let source = format!("127.0.0.{}", random.u8(2..6));
    let mut client = Client::try_connect(counterfoil.address, source.parse().ok()).ok()?;
    let sets = random.usize(1..12);
    let name = |n: usize| format!("set{}.{nonce}-{n}.example.test", n % sets);
    let count = random.usize(1..60);
    let load =
        Load { count, in_flight: random.usize(1..20), name: &name, stall: Duration::from_secs(4), ..Load::default() };
    let outcome = load.run(&mut client);
    let answers = outcome.answered + outcome.failed.values().sum::<usize>();
    if answers != count || !outcome.foreign.is_empty() || outcome.slowest > Duration::from_secs(3) {
        return Some(format!("{nonce}: {outcome:?}"));
    }
    for id in 0..random.u16(0..10) {
        client.ask(id, &name(usize::from(id)), qtype::A);
    }
    if random.bool() {
        client.reset();
    }
    None
}

fn chaos(identity: &str, workers: usize, seed: u64) {
    let backends = [seed, !seed].map(|seed| FakeBackend::start(move |connection| moody(connection, seed)));
    let mut config =
        Config::new(backends[0].address).backend(backends[1].address, &[("max_connections", &MAX_SECOND.to_string())]);
    for (section, key, value) in [
        ("pool", "query_timeout", "\"1s\""),
        ("connections", "idle_timeout", "\"500ms\""),
        ("connections", "cleanup_interval", "\"100ms\""),
        ("connections", "max_owned_per_client", "4"),
        ("connections", "max_total", &MAX_TOTAL.to_string()),
        ("connections", "max_idle_per_backend", "5"),
    ] {
        config = config.set(section, key, value);
    }
    let config = config.set("server", "workers", workers).identity(identity).tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start(&config);
    let samplers = backends.each_ref().map(|backend| Sampler::start(counterfoil.pid(), backend.address.port()));
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (counterfoil, wrong) = (&counterfoil, &wrong);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed.wrapping_mul(number + 1));
                let visits = (0..VISITS)
                    .filter_map(|visit_number| visit(counterfoil, &format!("c{number}-{visit_number}"), &mut random));
                let found: Vec<String> = visits.collect();
                wrong.lock().into_iter().for_each(|mut wrong| wrong.extend(found.iter().cloned()));
            });
        }
    });
    let wrong = wrong.into_inner().unwrap_or_default();
    assert!(wrong.is_empty(), "{identity}, seed {seed}: {} visits: {:#?}", wrong.len(), &wrong[..wrong.len().min(3)]);
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    let [first, second] = samplers.map(|sampler| sampler.finish().most);
    println!(
        "{identity}: {} queries, {} answered, {} failed, {} abandoned; {} connections, at most {first} and {second} at once",
        metrics.sum("queries_total", &[]),
        metrics.sum("answers_total", &[]),
        metrics.sum("queries_failed_total", &[]),
        metrics.sum("queries_abandoned_total", &[]),
        metrics.sum("backend_connections_opened_total", &[]),
    );
    for (name, reason) in [("queries_failed_total", "reason"), ("backend_connections_closed_total", "reason")] {
        let by_reason = metrics.samples(name, &[]).filter(|sample| sample.value > 0.0);
        println!("  {name}: {:?}", by_reason.map(|sample| (&sample.labels[reason], sample.value)).collect::<Vec<_>>());
    }
    assert!(first <= MAX_TOTAL && second <= MAX_SECOND, "the caps hold: {first} and {second} at once");
    assert!(metrics.sum("answers_total", &[]) > metrics.sum("queries_failed_total", &[]), "most went well");
    assert_eq!(metrics.sum("discrepancy_sockets", &[]), 0.0, "and the watchdog saw nothing wrong");
}

#[test]
fn identity_connection() {
    chaos("connection", 1, 15_218);
}

#[test]
fn identity_address_on_two_workers() {
    chaos("address", 2, 15_257);
}

#[test]
fn identity_forwarder_on_two_workers() {
    chaos("forwarder", 2, 9210);
}

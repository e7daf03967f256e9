//! Connections to a backend that clients share: what one client asks does not cost others their answers, see
//! docs/isolation.md.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::metrics::Metrics;
use counterfoil_tests::servers::{Recursor, TlvOracle, Unbound};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(20);

/// Good clients.
const NEIGHBOURS: u8 = 30;
/// What the attacker asks.
const ATTACKS: usize = 40;
/// While a neighbour waits for one answer, the attacker is served no more than so often: between two of its queries the
/// neighbours together have two answers each.
const MOST: usize = 10;

/// Unbound drops queries for this zone, and closes the TCP connections on which they came. It has places for all clients'.
const DROPS: &str = "    incoming-num-tcp: 200\n    local-zone: \"drop.example.\" deny\n";

fn attacker() -> IpAddr {
    IpAddr::from(Ipv4Addr::new(127, 2, 0, 1))
}

/// The attacker says this, time after time, while the neighbours ask; none of their queries fails. `said` looks at each
/// answer. Returns the metrics at the end.
fn attack(scene: &Scene, counterfoil: &Counterfoil, say: impl Fn(u16) -> Vec<u8>, said: impl Fn(&[u8])) -> Metrics {
    let served = Arc::new(AtomicUsize::new(0));
    let neighbours = scene.neighbours(counterfoil, NEIGHBOURS, &served);
    let mut attacker = scene.connect(counterfoil.address, attacker());
    for number in 0..ATTACKS {
        // Others are in flight on the same connection.
        let due = 2 * usize::from(NEIGHBOURS) * (number + 1);
        wait::until("the neighbours are served", SOON, || neighbours.answered() >= due);
        said(&exchange(&mut attacker, &say(number as u16)));
        served.fetch_add(1, Ordering::SeqCst);
    }
    let wait = neighbours.finish();
    assert_eq!(wait.failed, 0, "{wait:?}");
    assert!(wait.answered >= 2 * usize::from(NEIGHBOURS) * ATTACKS && wait.longest <= MOST, "{wait:?}");
    let metrics = counterfoil.metrics();
    println!(
        "{wait:?}, {} asked again, {} convicted, {} connections opened",
        metrics.sum("pool_repeats_total", &[]),
        metrics.sum("backend_convictions_total", &[]),
        metrics.sum("backend_connections_opened_total", &[]),
    );
    drop(attacker);
    metrics
}

fn exchange(client: &mut Client, message: &[u8]) -> Vec<u8> {
    client.send_raw(&message::framed(message)).unwrap();
    client.receive(SOON).message()
}

fn is_servfail(answer: &[u8]) {
    assert_eq!(message::response_code(answer), rcode::SERVFAIL);
}

/// A query on which the server closes the connection.
fn poison(setting: Setting) {
    let scene = Scene::new(setting);
    let unbound = Unbound::start_with(scene.has_header(), DROPS);
    let counterfoil = Counterfoil::start(&scene.config(unbound.address));
    let poison = |number| message::query(number, &format!("n{number}.drop.example"), qtype::A);
    let metrics = attack(&scene, &counterfoil, poison, is_servfail);
    assert_eq!(metrics.sum("queries_failed_total", &[]), ATTACKS as f64, "{setting:?}");
    // Who has connections of its own, and lost three in a row, has to pause.
    if setting.identity != Some("connection") {
        assert_eq!(metrics.sum("queries_failed_total", &[("reason", "backend_closed")]), ATTACKS as f64, "{setting:?}");
        assert!(metrics.sum("backend_convictions_total", &[]) >= ATTACKS as f64, "{setting:?}");
    }
    // The first one costs the neighbours some repeats, before its client is known; those after it cost them none.
    let repeats = metrics.sum("pool_repeats_total", &[]);
    assert!(repeats <= (2 * ATTACKS + 12 * usize::from(NEIGHBOURS)) as f64, "{setting:?}: {repeats} asked again");
    counterfoil.assert_quiescent();
}

#[test]
fn a_query_on_which_the_backend_closes_fails_alone() {
    poison(Setting::SHARED);
}

#[test]
#[ignore = "soak"]
fn soak_isolation_of_queries_on_which_the_backend_closes() {
    Setting::all().for_each(poison);
}

/// PowerDNS Recursor closes the connection on which it meets an opcode that it does not know.
fn unknown_opcodes(setting: Setting) {
    let scene = Scene::new(setting);
    let recursor = Recursor::start(false);
    let counterfoil = Counterfoil::start(&scene.config(recursor.address));
    let unknown = |number| {
        let mut message = message::query(number, "n.example.test", qtype::A);
        message[2] = 7 << 3;
        message
    };
    let metrics = attack(&scene, &counterfoil, unknown, |answer| assert_ne!(message::response_code(answer), 0));
    assert_eq!(metrics.sum("pool_repeats_total", &[]), 0.0, "{setting:?}: no neighbour was on its connection");
    counterfoil.assert_quiescent();
}

#[test]
fn an_unknown_opcode_on_which_the_backend_closes_fails_alone() {
    unknown_opcodes(Setting::identity("forwarder"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_of_unknown_opcodes() {
    Setting::all().filter(|setting| setting.identity.is_some()).for_each(unknown_opcodes);
}

/// dnsdist gets messages of another opcode with two questions: whatever becomes of them, the neighbours do not notice.
#[test]
fn an_answer_with_another_question_section_to_an_unusual_message_closes_nothing() {
    let scene = Scene::new(Setting::identity("forwarder"));
    let dnsdist = TlvOracle::start();
    let counterfoil = Counterfoil::start(&scene.config(dnsdist.address));
    let two_questions = |number: u16| {
        let mut message = message::query(number, "n.example.test", qtype::A);
        message.extend_from_within(12..);
        message[2] = 4 << 3;
        message[5] = 2;
        message
    };
    let metrics = attack(&scene, &counterfoil, two_questions, |answer| assert!(message::is_response(answer)));
    let closed = |reason| metrics.sum("backend_connections_closed_total", &[("reason", reason)]);
    assert_eq!((closed("protocol_violation"), metrics.sum("pool_repeats_total", &[])), (0.0, 0.0));
    counterfoil.assert_quiescent();
}

/// Whatever the question section of an answer is, to a message that is no plain question: that query alone fails, and its
/// client's connection to the backend is kept, too.
#[test]
fn no_answer_to_an_unusual_message_closes_a_connection() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            if query[2] & 0x78 != 0 {
                match query[1] % 5 {
                    0 => answer[5] = 0,
                    1 => answer.truncate(12),
                    2 => answer[13] ^= 1,
                    3 => (answer[12], answer[13]) = (0xc0, 0),
                    _ => answer[2] = 0x80,
                }
            }
            connection.send(&answer);
        }
    });
    let scene = Scene::new(Setting::SHARED);
    let counterfoil = Counterfoil::start(&scene.config(backend.address));
    let update = |number: u16| {
        let mut message = message::query(number, "n.example.test", qtype::A);
        message[2] = 5 << 3;
        message
    };
    let metrics = attack(&scene, &counterfoil, update, |answer| assert!(message::is_response(answer)));
    assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "protocol_violation")]), 0.0);
    assert!(metrics.sum("queries_failed_total", &[("reason", "bad_answer")]) >= 1.0);
    drop(scene);
    counterfoil.assert_quiescent();
}

/// A server that answers some names with another question: its connection can't be trusted any more, but who knows such a
/// name meets others only once.
#[test]
fn a_plain_question_that_the_backend_confuses_costs_others_nothing() {
    let backend = FakeBackend::start(|connection| {
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            if message::question_name(&query).is_some_and(|name| name.starts_with("confused")) {
                answer[13] ^= 2;
            }
            connection.send(&answer);
        }
    });
    let scene = Scene::new(Setting::SHARED);
    let counterfoil = Counterfoil::start(&scene.config(backend.address));
    let confused = |number| message::query(number, &format!("confused{number}.example.test"), qtype::A);
    let metrics = attack(&scene, &counterfoil, confused, is_servfail);
    assert_eq!(metrics.sum("queries_failed_total", &[("reason", "bad_answer")]), ATTACKS as f64);
    let repeats = metrics.sum("pool_repeats_total", &[]);
    assert!(repeats <= f64::from(3 * u32::from(NEIGHBOURS)), "{repeats} asked again");
    counterfoil.assert_quiescent();
}

//! The worker as a state machine, against clients and backends that do as they please.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests panic")]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use proptest::prelude::*;

use super::sim::{Sim, answer_to, query};
use crate::client::session::SessionKey;
use crate::close::{ClientCloseReason, CloseReason};
use crate::health::State;
use crate::ledger::ConnKind;

fn configuration(proxy: &str, extra: &str) -> String {
    format!(
        r#"
[[listener]]
name = "dns"
address = "127.0.0.1:53"
pool = "p"
max_in_flight = 100
max_pending_answers = "1024MiB"
[[pool]]
name = "p"
query_timeout = "5s"
{proxy}
[[pool.backend]]
name = "b"
address = "127.0.0.1:1053"
max_in_flight = 32
{extra}
"#
    )
}

const OWNED: &str = r#"
[pool.proxy_protocol]
identity = "connection"
[[pool.proxy_protocol.tlv]]
type = 0xE0
value = "{qname_label:1}"
"#;

const ADDRESS: &str = "[pool.proxy_protocol]\nidentity = \"address\"\n";

/// Asks for these labels one after another and returns how many connections were opened.
fn sequence(sim: &mut Sim, labels: impl IntoIterator<Item = usize>) -> usize {
    let client = sim.connect_client("192.0.2.1:1000");
    let before = sim.opened;
    for (n, label) in labels.into_iter().enumerate() {
        sim.ask(client, n as u16, &format!("l{label}.test"));
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers.len(), n + 1, "each query is answered before the next");
        sim.pass(Duration::from_micros(200));
    }
    sim.opened - before
}

/// Opened connections of the best policy that knows the future (Belady), with at most `cap` connections.
fn belady(labels: &[usize], cap: usize) -> usize {
    let mut resident: Vec<usize> = Vec::new();
    let mut opened = 0;
    for (at, label) in labels.iter().enumerate() {
        if resident.contains(label) {
            continue;
        }
        opened += 1;
        if resident.len() == cap {
            let next = |label: &usize| labels[at + 1..].iter().position(|other| other == label).unwrap_or(usize::MAX);
            let furthest = (0..cap).max_by_key(|at| next(&resident[*at])).unwrap();
            resident.swap_remove(furthest);
        }
        resident.push(*label);
    }
    opened
}

fn reuse(labels: &[usize], opened: usize) -> f64 {
    (labels.len() - opened) as f64 / labels.len() as f64
}

#[test]
fn eight_headers_in_rotation_need_eight_connections() {
    let mut sim = Sim::new(&configuration(OWNED, ""));
    assert_eq!(sequence(&mut sim, (0..10_000).map(|n| n % 8)), 8);
    sim.assert_quiescent();
}

#[test]
fn nine_headers_in_rotation_do_not_thrash() {
    let labels: Vec<usize> = (0..9_000).map(|n| n % 9).collect();
    let mut sim = Sim::new(&configuration(OWNED, ""));
    let opened = sequence(&mut sim, labels.iter().copied());
    let (ours, best) = (reuse(&labels, opened), reuse(&labels, belady(&labels, 8)));
    assert!(ours >= 0.8 * best, "{ours:.3} of {best:.3}");
    sim.assert_quiescent();
}

#[test]
fn the_frequent_headers_of_many_stay() {
    let mut random = fastrand::Rng::with_seed(42);
    let weights: Vec<f64> = (1..=64).map(|rank| 1.0 / f64::from(rank)).collect();
    let total: f64 = weights.iter().sum();
    let labels: Vec<usize> = (0..10_000)
        .map(|_| {
            let mut point = random.f64() * total;
            weights
                .iter()
                .position(|weight| {
                    point -= weight;
                    point <= 0.0
                })
                .unwrap_or(63)
        })
        .collect();
    let mut sim = Sim::new(&configuration(OWNED, ""));
    let opened = sequence(&mut sim, labels.iter().copied());
    let (ours, best) = (reuse(&labels, opened), reuse(&labels, belady(&labels, 8)));
    assert!(ours >= 0.8 * best, "{ours:.3} of {best:.3}");
    sim.assert_quiescent();
}

#[test]
fn headers_that_never_return_leave_nothing_behind() {
    for in_flight in [1, 20] {
        let mut sim = Sim::new(&configuration(OWNED, ""));
        let client = sim.connect_client("192.0.2.1:1000");
        for n in 0..10_000u32 {
            sim.ask(client, n as u16, &format!("l{n}.test"));
            if (n + 1) % in_flight == 0 {
                sim.answer_all();
            }
        }
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers.len(), 10_000);
        assert!(sim.most_owned <= 8);
        sim.pass(Duration::from_millis(900));
        assert_eq!(sim.wires.len(), 0, "nothing is kept that will not be used");
        assert!(sim.closed[&CloseReason::OneShotDone] > 9_900);
        sim.assert_quiescent();
    }
}

#[test]
fn queries_whose_connection_died_are_asked_again_in_halves() {
    let mut sim = Sim::new(&configuration("", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    for n in 0..10 {
        sim.ask(client, n, "a.test");
    }
    sim.accept_all();
    let first = *sim.wires.keys().next().unwrap();
    sim.answer(first, 0);
    sim.hang_up(first);
    sim.answer_all();
    assert_eq!(sim.clients[&client].answers.len(), 10);
    assert_eq!(sim.opened, 3, "the nine went to two fresh connections");
    let repeats_and_retries = |sim: &Sim| {
        let stats = &sim.core.stats.pools[0];
        (stats.repeats.get(), stats.retries.get())
    };
    assert_eq!(repeats_and_retries(&sim), (9, 0));
    for n in 10..12 {
        sim.ask(client, n, "a.test");
    }
    // Together, each alone, and each once more as the one retry.
    for _ in 0..6 {
        sim.accept_all();
        for key in sim.wires.keys().copied().collect::<Vec<_>>() {
            if sim.wires.get(&key).is_some_and(|wire| !wire.unanswered.is_empty()) {
                sim.hang_up(key);
            }
        }
        sim.pass(Duration::from_millis(10));
    }
    assert_eq!(repeats_and_retries(&sim), (11, 2));
    let rcodes: Vec<u8> = sim.clients[&client].answers.iter().map(|answer| answer[3] & 15).collect();
    assert_eq!(rcodes[10..], [2, 2], "after one retry it is SERVFAIL");
    sim.assert_quiescent();
}

#[test]
fn an_answer_that_began_is_not_asked_for_again() {
    let mut sim = Sim::new(&configuration("", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 1, "a.test");
    sim.accept_all();
    let key = *sim.wires.keys().next().unwrap();
    let id = sim.wires[&key].unanswered[0].id;
    sim.wires.remove(&key);
    sim.core.conn_closed(key, CloseReason::PeerClosed, super::answer::Partial::Of(id), sim.now);
    sim.settle();
    assert_eq!(sim.clients[&client].answers[0][3] & 15, 2);
    sim.assert_quiescent();
}

#[test]
fn wrong_answers_reach_nobody() {
    for (break_it, what) in [
        ((|answer: &mut Vec<u8>| answer[2] ^= 0x55) as fn(&mut Vec<u8>), "ID"),
        (|answer| answer[4] &= 0x7f, "QR"),
        (|answer| answer[15] ^= 1, "question"),
        (|answer| answer[1] = 3, "framing"),
    ] {
        let mut sim = Sim::new(&configuration("", ""));
        let client = sim.connect_client("192.0.2.1:1000");
        sim.ask(client, 1, "abc.test");
        sim.accept_all();
        let key = *sim.wires.keys().next().unwrap();
        let mut answer = answer_to(&sim.wires[&key].unanswered[0].message);
        break_it(&mut answer);
        assert!(sim.core.backend_bytes(key, &answer, sim.now).is_err(), "wrong {what}");
        sim.wires.remove(&key);
        sim.core.conn_closed(key, CloseReason::ProtocolViolation, super::answer::Partial::None, sim.now);
        sim.settle();
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers.len(), 1, "wrong {what}");
        sim.assert_quiescent();
    }
}

#[test]
fn a_silent_backend_is_servfail_in_time_and_its_connection_goes() {
    let mut sim = Sim::new(&configuration(ADDRESS, ""));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 9, "a.test");
    sim.accept_all();
    sim.pass(Duration::from_millis(4_990));
    assert!(sim.clients[&client].answers.is_empty());
    sim.pass(Duration::from_millis(20));
    assert_eq!(sim.clients[&client].answers[0][..4], [0, 9, 0x81, 2]);
    assert_eq!(sim.closed.get(&CloseReason::Unresponsive), Some(&1));
    sim.assert_quiescent();
}

#[test]
fn who_waits_at_a_cap_is_served_in_turn_or_told() {
    let mut sim = Sim::new(&configuration("[pool.proxy_protocol]\nidentity = \"connection\"\n", "max_connections = 2"));
    let clients: Vec<SessionKey> = (0..5).map(|n| sim.connect_client(&format!("192.0.2.{n}:1000"))).collect();
    for client in &clients {
        sim.ask(*client, 1, "a.test");
    }
    assert_eq!(sim.wires.len(), 2);
    assert_eq!(sim.core.stats.waiting.get(), 3);
    sim.answer_all();
    for client in &clients {
        assert_eq!(sim.clients[client].answers[0][3] & 15, 0, "idle connections made way");
    }
    // Now nothing is idle for as long as max_wait.
    for client in &clients {
        sim.ask(*client, 2, "a.test");
    }
    sim.accept_all();
    sim.pass(Duration::from_millis(1_010));
    let told = clients.iter().filter(|client| sim.clients[client].answers.len() == 2).count();
    assert_eq!(told, 3, "SERVFAIL after max_wait");
    sim.answer_all();
    sim.assert_quiescent();
}

#[test]
fn clients_of_one_address_share_and_others_do_not() {
    let mut sim = Sim::new(&configuration(ADDRESS, ""));
    let clients: Vec<SessionKey> = (0..100).map(|n| sim.connect_client(&format!("192.0.2.1:{}", 1000 + n))).collect();
    for client in &clients {
        sim.ask(*client, 1, "a.test");
        sim.answer_all();
    }
    assert_eq!(sim.opened, 1);
    let other = sim.connect_client("192.0.2.2:1000");
    sim.ask(other, 1, "a.test");
    sim.answer_all();
    assert_eq!(sim.opened, 2);
    sim.close_client(clients[0], ClientCloseReason::ClientReset);
    assert_eq!(sim.wires.len(), 2, "a shared connection outlives a client");
    sim.assert_quiescent();
}

#[test]
fn idle_and_old_connections_of_every_kind_go() {
    for proxy in ["", OWNED, ADDRESS] {
        let mut sim = Sim::new(&configuration(proxy, "[connections]\nidle_timeout = \"3s\"\nmax_age = \"20s\"\n"));
        let client = sim.connect_client("192.0.2.1:1000");
        sim.ask(client, 1, "a.test");
        sim.answer_all();
        sim.pass(Duration::from_millis(2_500));
        assert_eq!(sim.wires.len(), 1);
        sim.pass(Duration::from_millis(1_600));
        assert_eq!((sim.wires.len(), sim.closed[&CloseReason::IdleTimeout]), (0, 1), "{proxy}");
        for n in 0..30 {
            sim.ask(client, n, "a.test");
            sim.answer_all();
            sim.pass(Duration::from_secs(1));
        }
        assert!(sim.closed[&CloseReason::MaxAge] >= 1, "{proxy}");
        sim.assert_quiescent();
    }
}

#[test]
fn idle_time_counts_from_the_last_byte_and_not_from_the_client_that_gave_up() {
    let mut sim = Sim::new(&configuration(ADDRESS, "[connections]\nidle_timeout = \"3s\"\n"));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 1, "a.test");
    sim.accept_all();
    sim.pass(Duration::from_millis(2_500));
    sim.close_client(client, ClientCloseReason::ClientReset);
    sim.pass(Duration::from_millis(400));
    assert_eq!(sim.wires.len(), 1, "others may still use it");
    sim.pass(Duration::from_millis(1_200));
    assert_eq!((sim.wires.len(), sim.closed[&CloseReason::IdleTimeout]), (0, 1));
    sim.assert_quiescent();
}

#[test]
fn a_backend_that_refuses_is_not_stormed() {
    let mut sim = Sim::new(&configuration("", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    for n in 0..1000 {
        sim.ask(client, n, "a.test");
        for key in sim.wires.keys().copied().collect::<Vec<_>>() {
            sim.hang_up(key);
        }
        sim.pass(Duration::from_millis(1));
    }
    assert_eq!(sim.clients[&client].answers.len(), 1000);
    assert!(sim.opened <= 12, "{} connections in a second", sim.opened);
    sim.assert_quiescent();
}

#[test]
fn a_backend_that_never_accepts_is_servfail_after_one_retry() {
    let mut sim = Sim::new(&configuration("", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 1, "a.test");
    sim.pass(Duration::from_millis(1_990));
    assert_eq!(sim.wires.len(), 1, "connect_timeout is 2 s");
    sim.pass(Duration::from_millis(2_000));
    assert!(sim.clients[&client].answers.is_empty(), "the retry has its own connect_timeout");
    sim.pass(Duration::from_millis(1_000));
    assert_eq!(sim.closed[&CloseReason::ConnectTimeout], 2);
    assert_eq!(sim.clients[&client].answers[0][3] & 15, 2);
    sim.assert_quiescent();
}

#[test]
fn a_query_goes_to_the_backend_with_the_fewest_outstanding() {
    let second = "[[pool.backend]]\nname = \"c\"\naddress = \"127.0.0.1:1054\"\n";
    let mut sim = Sim::new(&configuration("", second));
    let client = sim.connect_client("192.0.2.1:1000");
    let outstanding = |sim: &Sim| [sim.core.pool.outstanding(0), sim.core.pool.outstanding(1)];
    for n in 0..10 {
        sim.ask(client, n, "a.test");
    }
    assert_eq!(outstanding(&sim), [5, 5]);
    sim.accept_all();
    let first = *sim.wires.keys().find(|key| sim.core.pool.get(**key).unwrap().backend == 0).unwrap();
    for _ in 0..5 {
        sim.answer(first, 0);
    }
    for n in 10..14 {
        sim.ask(client, n, "a.test");
    }
    assert_eq!(outstanding(&sim), [4, 5]);
    sim.answer_all();
    assert_eq!(outstanding(&sim), [0, 0]);
    assert_eq!(sim.clients[&client].answers.len(), 14);
    sim.assert_quiescent();
}

#[derive(Clone, Debug)]
pub(super) enum Op {
    Connect(u8),
    Ask {
        client: usize,
        label: u8,
    },
    Leave(usize),
    Accept(usize),
    Answer {
        wire: usize,
        nth: usize,
    },
    HangUp(usize),
    Health {
        backend: usize,
        up: bool,
    },
    Pass(u16),
    /// Another configuration: a number for each.
    Reload(usize),
}

pub(super) fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        2 => any::<u8>().prop_map(Op::Connect),
        12 => (any::<usize>(), 0u8..12).prop_map(|(client, label)| Op::Ask { client, label }),
        1 => any::<usize>().prop_map(Op::Leave),
        5 => any::<usize>().prop_map(Op::Accept),
        10 => (any::<usize>(), any::<usize>()).prop_map(|(wire, nth)| Op::Answer { wire, nth }),
        1 => any::<usize>().prop_map(Op::HangUp),
        1 => (any::<usize>(), prop::bool::weighted(0.7)).prop_map(|(backend, up)| Op::Health { backend, up }),
        2 => (0u16..3000).prop_map(Op::Pass),
    ];
    prop::collection::vec(op, 0..400)
}

/// The naive model: what each client has asked, and whose header each connection carries.
#[derive(Default)]
struct Model {
    asked: BTreeMap<SessionKey, HashMap<u16, String>>,
    answered: BTreeMap<SessionKey, HashSet<u16>>,
    next: u16,
}

pub(super) fn run(proxy: &str, extra: &str, ops: Vec<Op>) {
    run_all(&[configuration(proxy, extra)], ops);
}

/// The same with configurations that replace each other.
pub(super) fn run_all(configurations: &[String], ops: Vec<Op>) {
    let mut sim = Sim::new(&configurations[0]);
    let mut model = Model::default();
    for op in ops {
        let clients: Vec<SessionKey> = sim.clients.keys().copied().collect();
        let wires: Vec<_> = sim.wires.keys().copied().collect();
        match op {
            Op::Connect(host) => {
                let key = sim.connect_client(&format!("192.0.2.{}:{}", host % 4, 1000 + u16::from(host)));
                model.asked.insert(key, HashMap::new());
                model.answered.insert(key, HashSet::new());
            }
            Op::Ask { client, label } if !clients.is_empty() => {
                let key = clients[client % clients.len()];
                model.next = model.next.wrapping_add(1);
                let name = format!("l{label}.n{}.s{}.test", model.next, key.0);
                model.asked.get_mut(&key).unwrap().insert(model.next, name.clone());
                sim.ask(key, model.next, &name);
            }
            Op::Leave(client) if !clients.is_empty() => {
                sim.close_client(clients[client % clients.len()], ClientCloseReason::ClientReset);
            }
            Op::Accept(wire) if !wires.is_empty() => sim.accept(wires[wire % wires.len()]),
            Op::Answer { wire, nth } if !wires.is_empty() => {
                let key = wires[wire % wires.len()];
                let unanswered = sim.wires[&key].unanswered.len();
                if unanswered > 0 {
                    sim.answer(key, nth % unanswered);
                }
            }
            Op::Health { backend, up } => {
                let health = &sim.core.shared.health;
                let place = health.get((backend % health.places().count()) as u16).unwrap();
                place.set(if up { State::Up } else { State::Down });
            }
            Op::HangUp(wire) if !wires.is_empty() => sim.hang_up(wires[wire % wires.len()]),
            Op::Reload(number) => sim.reconfigure(&configurations[number % configurations.len()]),
            Op::Pass(millis) => sim.pass(Duration::from_millis(u64::from(millis))),
            _ => {}
        }
        check(&mut sim, &mut model);
    }
    // Every query resolves within its deadline, whatever the backend does (never hang). What a blocked client has sent
    // is taken bit by bit, each with a deadline of its own.
    let asked: usize = model.asked.values().map(HashMap::len).sum();
    for _ in 0..=asked {
        sim.pass(Duration::from_millis(5_001));
        check(&mut sim, &mut model);
        if sim.core.queries.len() == 0 && sim.clients.values().all(|client| client.backlog() == 0) {
            break;
        }
    }
    assert_eq!(sim.core.queries.len(), 0, "no query outlives its deadline");
    assert!(sim.clients.values().all(|client| client.backlog() == 0), "no client is left unread");
    sim.assert_quiescent();
}

fn check(sim: &mut Sim, model: &mut Model) {
    for (key, client) in &mut sim.clients {
        for answer in client.answers.drain(..) {
            let id = u16::from_be_bytes([answer[0], answer[1]]);
            let name = model.asked[key].get(&id).expect("an answer to a query of this client");
            assert!(model.answered.get_mut(key).unwrap().insert(id), "at most one answer");
            let mut expected = query(id, name);
            expected[2] |= 0x80;
            assert_eq!(answer[12..], expected[12..], "its own question comes back");
        }
    }
    for (key, wire) in &sim.wires {
        let conn = sim.core.pool.get(*key).expect("no descriptor without a connection");
        for arrived in &wire.unanswered {
            let text = String::from_utf8_lossy(&arrived.message).into_owned();
            if conn.kind == ConnKind::Owned || conn.kind == ConnKind::OneShot {
                let label = &arrived.message[13..13 + usize::from(arrived.message[12])];
                assert!(wire.header.ends_with(label), "{text}: the header says what the query is");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn owned_connections_agree_with_the_model(ops in ops()) {
        run(OWNED, "[connections]\nmax_owned_per_client = 3\n", ops);
    }

    #[test]
    fn keyed_connections_agree_with_the_model(ops in ops()) {
        run(ADDRESS, "max_connections = 3", ops);
    }

    #[test]
    fn shared_connections_agree_with_the_model(ops in ops()) {
        run("", "max_connections = 2", ops);
    }

    #[test]
    fn owned_connections_at_the_backends_cap_agree_with_the_model(ops in ops()) {
        run(OWNED, "max_connections = 4\n[connections]\nmax_owned_per_client = 3\n", ops);
    }
}

//! Several backends in a pool: which one a query goes to, and what becomes of it when that one fails.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use super::core_tests::{ops, run};
use super::sim::Sim;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::close::ClientCloseReason;
use crate::health::State;

const OWNED: &str = "[pool.proxy_protocol]\nidentity = \"connection\"\n";

pub(super) const LABELLED: &str = "[pool.proxy_protocol]\nidentity = \"connection\"\n\
                        [[pool.proxy_protocol.tlv]]\ntype = 0xE0\nvalue = \"{qname_label:1}\"\n";

/// A pool of backends, each with these lines.
fn configuration(pool: &str, proxy: &str, backends: &[&str]) -> String {
    let mut text = format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\nmax_pending_answers = \"1024MiB\"\n[[pool]]\nname = \"p\"\n{pool}\n{proxy}\n"
    );
    for (number, keys) in backends.iter().enumerate() {
        text += &format!("[[pool.backend]]\nname = \"b{number}\"\naddress = \"127.0.0.1:{}\"\n{keys}\n", 1053 + number);
    }
    text
}

/// Queries that each backend has and has not answered.
fn outstanding(sim: &Sim, backends: u16) -> Vec<usize> {
    (0..backends).map(|backend| sim.core.pool.outstanding(backend)).collect()
}

fn ask(sim: &mut Sim, client: SessionKey, count: u16) {
    for n in 0..count {
        sim.ask(client, n, &format!("n{n}.test"));
    }
}

#[test]
fn each_policy_spreads_shared_queries_its_way() {
    for (policy, expected) in
        [("least-outstanding", vec![20, 60]), ("round-robin", vec![20, 60]), ("first-available", vec![80, 0])]
    {
        let mut sim = Sim::new(&configuration(&format!("policy = \"{policy}\""), "", &["weight = 1", "weight = 3"]));
        let client = sim.connect_client("192.0.2.1:1000");
        ask(&mut sim, client, 80);
        assert_eq!(outstanding(&sim, 2), expected, "{policy}");
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers.len(), 80);
        sim.assert_quiescent();
    }
}

#[test]
fn a_name_goes_to_its_backend_from_every_client_and_in_any_case() {
    let mut sim = Sim::new(&configuration("policy = \"consistent-hash\"", "", &["", "", ""]));
    let mut places = BTreeSet::new();
    for name in ["a.test", "b.test", "c.test", "d.test", "e.test", "f.test"] {
        let mut of_name = BTreeSet::new();
        for (client, name) in ["192.0.2.1:1", "192.0.2.2:2"].iter().zip([name.to_owned(), name.to_uppercase()]) {
            let client = sim.connect_client(client);
            sim.ask(client, 1, &name);
            of_name.insert(outstanding(&sim, 3));
            sim.answer_all();
        }
        assert_eq!(of_name.len(), 1, "{name}");
        places.extend(of_name);
    }
    assert!(places.len() > 1, "not all names on one backend");
    sim.assert_quiescent();
}

#[test]
fn a_client_keeps_the_connection_that_it_owns() {
    for (policy, connections) in [("least-outstanding", 1), ("round-robin", 1), ("weighted-random", 1)] {
        let mut sim = Sim::new(&configuration(&format!("policy = \"{policy}\""), OWNED, &["", ""]));
        let client = sim.connect_client("192.0.2.1:1000");
        for n in 0..50 {
            sim.ask(client, n, "a.test");
            sim.answer_all();
        }
        assert_eq!(sim.opened, connections, "{policy}");
        sim.assert_quiescent();
    }
}

#[test]
fn clients_with_connections_of_their_own_are_spread() {
    for policy in ["least-outstanding", "round-robin"] {
        let mut sim = Sim::new(&configuration(&format!("policy = \"{policy}\""), OWNED, &["", ""]));
        for n in 0..20 {
            let client = sim.connect_client(&format!("192.0.2.1:{}", 1000 + n));
            ask(&mut sim, client, 1);
            sim.answer_all();
        }
        assert_eq!([sim.to_backend(0).len(), sim.to_backend(1).len()], [10, 10], "{policy}");
        sim.assert_quiescent();
    }
}

#[test]
fn a_client_leaves_a_backend_that_has_far_more_outstanding() {
    let mut sim = Sim::new(&configuration("", OWNED, &["", ""]));
    let client = sim.connect_client("192.0.2.1:1000");
    ask(&mut sim, client, 40);
    assert_eq!(outstanding(&sim, 2).iter().sum::<usize>(), 40);
    assert!(outstanding(&sim, 2).iter().all(|count| *count >= 5), "{:?}", outstanding(&sim, 2));
    sim.answer_all();
    sim.assert_quiescent();
}

#[test]
fn the_header_of_the_forwarder_names_its_own_side_and_is_one_per_backend() {
    let forwarder = "[pool.proxy_protocol]\nidentity = \"forwarder\"\n";
    let mut sim = Sim::new(&configuration("policy = \"round-robin\"", forwarder, &["", ""]));
    for n in 0..10 {
        let client = sim.connect_client(&format!("192.0.2.{n}:1000"));
        ask(&mut sim, client, 2);
    }
    sim.answer_all();
    assert_eq!([sim.to_backend(0).len(), sim.to_backend(1).len()], [1, 1]);
    sim.assert_quiescent();
}

#[test]
fn a_retry_goes_to_another_backend() {
    for policy in ["least-outstanding", "round-robin", "weighted-random", "consistent-hash", "first-available"] {
        let mut sim = Sim::new(&configuration(&format!("policy = \"{policy}\""), OWNED, &["", ""]));
        let client = sim.connect_client("192.0.2.1:1000");
        for n in 0..20 {
            sim.ask(client, n, &format!("n{n}.test"));
            let bad = sim.to_backend(0);
            for key in bad {
                sim.hang_up(key);
            }
            sim.answer_all();
            assert_eq!(sim.clients[&client].answers[usize::from(n)][3] & 15, 0, "{policy}");
            sim.pass(Duration::from_millis(10));
        }
        sim.assert_quiescent();
    }
}

/// What cannot be sent to one backend goes to the next, without being a retry; what was sent is retried only so often.
#[test]
fn connects_that_fail_are_no_retries() {
    let mut sim = Sim::new(&configuration("retries = 0\npolicy = \"first-available\"", OWNED, &["", "", "", ""]));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 1, "a.test");
    for backend in 0..3 {
        let [refused] = sim.to_backend(backend)[..] else { panic!("one connection to backend {backend}") };
        sim.hang_up(refused);
    }
    assert!(sim.clients[&client].answers.is_empty());
    let [connected] = sim.to_backend(3)[..] else { panic!("one connection to the last") };
    sim.accept(connected);
    sim.hang_up(connected);
    assert_eq!(sim.clients[&client].answers[0][3] & 15, 2, "it was sent, and there is no retry");
    assert_eq!(sim.opened, 4);
    sim.assert_quiescent();
}

#[test]
fn each_backend_is_tried_once_and_then_it_is_servfail() {
    let mut sim = Sim::new(&configuration("retries = 0", OWNED, &["", "", ""]));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 1, "a.test");
    for _ in 0..3 {
        let refused = *sim.wires.keys().next().unwrap();
        sim.hang_up(refused);
    }
    assert_eq!(sim.clients[&client].answers[0][3] & 15, 2);
    assert_eq!(sim.opened, 3);
    sim.assert_quiescent();
}

/// What is in flight may still be answered; nothing new comes, not even over connections that are open.
#[test]
fn a_backend_that_is_down_gets_nothing_new() {
    for proxy in ["", OWNED] {
        let mut sim = Sim::new(&configuration("", proxy, &["", ""]));
        let client = sim.connect_client("192.0.2.1:1000");
        ask(&mut sim, client, 4);
        sim.accept_all();
        let set = |sim: &Sim, backend: u16, state| sim.core.shared.health.get(backend).unwrap().set(state);
        set(&sim, 0, State::Down);
        let before = outstanding(&sim, 2);
        for n in 10..20 {
            sim.ask(client, n, "b.test");
        }
        assert_eq!(outstanding(&sim, 2), [before[0], before[1] + 10], "{proxy}");
        set(&sim, 1, State::Down);
        sim.ask(client, 20, "c.test");
        let answers = &sim.clients[&client].answers;
        assert_eq!((answers.len(), answers[0][3] & 15), (1, 2), "no backend is up");
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers.len(), 15);
        set(&sim, 0, State::Up);
        sim.ask(client, 21, "d.test");
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers[15][3] & 15, 0);
        sim.assert_quiescent();
    }
}

/// Under `lazy` the failures in a row are counted, by all kinds of failure, and one answer ends them.
#[test]
fn failures_in_a_row_are_counted_for_lazy_checks() {
    let mut sim = Sim::new(&configuration("retries = 0", OWNED, &["health.mode = \"lazy\""]));
    let failures = |sim: &Sim| sim.core.shared.health.get(0).unwrap().failures();
    let client = sim.connect_client("192.0.2.1:1000");
    ask(&mut sim, client, 1);
    let refused = *sim.wires.keys().next().unwrap();
    sim.hang_up(refused);
    assert_eq!(failures(&sim), 1);
    ask(&mut sim, client, 1);
    sim.accept_all();
    sim.pass(Duration::from_secs(6));
    assert_eq!(failures(&sim), 2, "no answer in time");
    ask(&mut sim, client, 1);
    sim.answer_all();
    assert_eq!(failures(&sim), 0);
    sim.assert_quiescent();
}

#[test]
fn on_failure_close_ends_the_clients_connection_and_counts_everything() {
    let mut sim = Sim::new(&configuration("retries = 0\non_failure = \"close\"", "", &[""]));
    let client = sim.connect_client("192.0.2.1:1000");
    ask(&mut sim, client, 3);
    sim.accept_all();
    let connection = *sim.wires.keys().next().unwrap();
    sim.answer(connection, 1);
    sim.hang_up(connection);
    assert!(sim.clients.contains_key(&client), "the two that are left are asked again, apart");
    sim.accept_all();
    for apart in sim.to_backend(0) {
        sim.hang_up(apart);
    }
    assert!(!sim.clients.contains_key(&client), "closed");
    let stats = &sim.core.stats.listeners[0];
    assert_eq!((stats.answers.get(), stats.closed[ClientCloseReason::QueryFailed as usize].get()), (1, 1));
    sim.assert_quiescent();
}

/// Attempts in each second while every connection fails in this way and a query comes each millisecond.
fn attempts(fails: fn(&mut Sim, ConnKey), seconds: usize) -> Vec<usize> {
    let mut sim = Sim::new(&configuration("", OWNED, &[""]));
    let mut clients = Vec::new();
    let mut attempts = Vec::new();
    for second in 0..seconds {
        let before = sim.opened;
        for n in 0..1000u32 {
            if n % 20 == 0 {
                clients.push(sim.connect_client(&format!("192.0.2.1:{}", 1000 + 50 * second as u32 + n / 20)));
            }
            let client = clients[clients.len() - 1];
            sim.ask(client, n as u16, "a.test");
            for key in sim.wires.keys().copied().collect::<Vec<_>>() {
                fails(&mut sim, key);
            }
            sim.pass(Duration::from_millis(1));
        }
        attempts.push(sim.opened - before);
    }
    assert_eq!(sim.clients.values().map(|client| client.answers.len()).sum::<usize>(), 1000 * seconds);
    sim.assert_quiescent();
    attempts
}

#[test]
fn no_storm_on_a_backend_that_refuses_or_closes_at_once() {
    let refuses: fn(&mut Sim, ConnKey) = Sim::hang_up;
    let closes: fn(&mut Sim, ConnKey) = |sim, key| {
        sim.accept(key);
        sim.hang_up(key);
    };
    for fails in [refuses, closes] {
        let attempts = attempts(fails, 5);
        assert!(attempts[0] <= 10 && attempts[1..].iter().all(|attempts| *attempts <= 3), "{attempts:?}");
        assert!(attempts.iter().skip(2).sum::<usize>() >= 1, "it is tried again: {attempts:?}");
    }
}

/// A backend may not want to serve a client, and close its connections: others are served all the same, however many are
/// turned away. Only one that answers nobody is one that closes all.
#[test]
fn who_is_turned_away_costs_others_nothing() {
    let mut sim = Sim::new(&configuration("", OWNED, &[""]));
    let mut port = 1000;
    let mut asks = |sim: &mut Sim, address: &str, is_served: bool| {
        port += 1;
        let client = sim.connect_client(&format!("{address}:{port}"));
        let before = sim.opened;
        sim.ask(client, 1, "a.test");
        for _ in 0..2 {
            sim.accept_all();
            for key in sim.wires.keys().copied().collect::<Vec<_>>().into_iter().filter(|_| !is_served) {
                sim.hang_up(key);
            }
        }
        sim.answer_all();
        let code = sim.clients[&client].answers[0][3] & 15;
        sim.close_client(client, ClientCloseReason::ClientClosed);
        (code, sim.opened - before)
    };
    for _ in 0..20 {
        let tried: usize = (0..20).map(|_| asks(&mut sim, "192.0.2.66", false).1).sum();
        assert!(tried <= 6, "{tried}");
        assert_eq!(asks(&mut sim, "192.0.2.1", true), (0, 1));
    }
    for _ in 0..20 {
        let tried: usize = (0..100).map(|n| asks(&mut sim, &format!("192.0.2.{}", 100 + n), false).1).sum();
        assert!(tried <= 200, "{tried}");
        assert_eq!(asks(&mut sim, "192.0.2.1", true), (0, 1), "who is answered goes on");
        sim.pass(Duration::from_millis(250));
    }
    sim.pass(Duration::from_secs(5));
    let tried: usize = (0..200).map(|n| asks(&mut sim, &format!("198.51.100.{n}"), false).1).sum();
    assert!(tried <= 80, "{tried}: it turns everybody away");
    assert_eq!(asks(&mut sim, "198.51.100.66", true).0, 2);
    sim.assert_quiescent();
}

/// Many clients wait for a backend that comes back: one connection is tried, and only if that brings an answer more.
#[test]
fn after_a_pause_one_connection_is_tried_alone() {
    let mut sim = Sim::new(&configuration("retries = 0\nquery_timeout = \"60s\"", OWNED, &[""]));
    let clients: Vec<SessionKey> = (0..20).map(|n| sim.connect_client(&format!("192.0.2.1:{}", 1000 + n))).collect();
    for client in &clients[..3] {
        sim.ask(*client, 1, "a.test");
        let refused = *sim.wires.keys().next().unwrap();
        sim.hang_up(refused);
    }
    sim.pass(Duration::from_millis(101));
    let before = sim.opened;
    for client in &clients[3..10] {
        sim.ask(*client, 1, "a.test");
    }
    assert_eq!(sim.opened - before, 1, "alone");
    sim.answer_all();
    for client in &clients[10..] {
        sim.ask(*client, 1, "a.test");
    }
    assert_eq!(sim.opened - before, 11, "it has answered");
    sim.answer_all();
    sim.assert_quiescent();
}

/// Nothing has left before a backend is authenticated, so another one gets the query, and that is no retry.
#[test]
fn a_handshake_that_fails_sends_the_query_elsewhere() {
    use crate::close::CloseReason::{CertificateRefused, HandshakeFailed};

    for reason in [CertificateRefused, HandshakeFailed] {
        let tls = "tls.server_name = \"a.test\"";
        let mut sim = Sim::new(&configuration("retries = 0\npolicy = \"first-available\"", "", &[tls, tls]));
        let client = sim.connect_client("192.0.2.1:1000");
        for id in 0..10 {
            sim.ask(client, id, "n.test");
            for key in sim.to_backend(0) {
                sim.refuse(key, reason);
            }
            sim.answer_all();
            assert_eq!(sim.clients[&client].answers.len(), usize::from(id) + 1);
        }
        assert!(sim.clients[&client].answers.iter().all(|answer| answer[3] & 15 == 0));
        assert_eq!(sim.closed[&reason], 3, "then it is left alone");
        assert_eq!(sim.core.stats.backends[0].connect_failures.get(), 3);
        assert_eq!(sim.core.stats.pools[0].retries.get(), 0);
        sim.assert_quiescent();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Every answer to who asked, within the caps of each backend, whatever the policy and whoever owns connections.
    #[test]
    fn several_backends_agree_with_the_model(
        policy in prop::sample::select(
            vec!["least-outstanding", "round-robin", "weighted-random", "consistent-hash", "first-available"],
        ),
        proxy in prop::sample::select(vec!["", LABELLED, "[pool.proxy_protocol]\nidentity = \"forwarder\"\n"]),
        ops in ops(),
    ) {
        let second = "max_connections = 3\n[[pool.backend]]\nname = \"c\"\naddress = \"127.0.0.1:1054\"\n\
                      max_connections = 2\nweight = 3\n[connections]\nmax_owned_per_client = 3\n";
        run(&format!("policy = \"{policy}\"\n{proxy}"), second, ops);
    }
}

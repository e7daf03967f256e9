//! Queries that bring down connections, beside those that do not.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::time::Duration;

use super::sim::{Sim, query};
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::close::{CloseReason, FailReason};

fn configuration(pool: &str, backend: &str) -> String {
    format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\nrefuse = []\n[[pool]]\nname = \"p\"\n{pool}\n\
         [[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:1053\"\n{backend}\n"
    )
}

const SUBNET: &str = "[pool.proxy_protocol]\nidentity = \"subnet\"\n";

fn is_poison(message: &[u8]) -> bool {
    message.windows(6).any(|window| window == b"poison")
}

fn has_poison(sim: &Sim, key: ConnKey) -> bool {
    sim.wires[&key].unanswered.iter().any(|arrived| is_poison(&arrived.message))
}

/// The backend answers what it has, and closes connections on which it meets poison, until nothing is left to do. Returns
/// how many connections that were.
fn serve(sim: &mut Sim) -> usize {
    let mut deaths = 0;
    for _ in 0..50_000 {
        sim.accept_all();
        let Some(key) = sim.wires.iter().find(|(_, wire)| !wire.unanswered.is_empty()).map(|(key, _)| *key) else {
            if sim.core.queries.len() == 0 {
                return deaths;
            }
            sim.pass(Duration::from_millis(5));
            continue;
        };
        if has_poison(sim, key) {
            deaths += 1;
            sim.hang_up(key);
        } else {
            sim.answer(key, 0);
        }
    }
    deaths
}

fn codes(sim: &Sim, client: SessionKey) -> Vec<u8> {
    sim.clients[&client].answers.iter().map(|answer| answer[3] & 15).collect()
}

/// 30 innocents are in flight on the connection that the poison brings down.
fn round(sim: &mut Sim, innocents: &[SessionKey], attacker: SessionKey, id: u16) -> usize {
    for client in innocents {
        sim.ask(*client, id, "good.test");
    }
    sim.ask(attacker, id, "poison.test");
    serve(sim)
}

fn clients(sim: &mut Sim) -> (Vec<SessionKey>, SessionKey) {
    let innocents = (1..=30).map(|n| sim.connect_client(&format!("192.0.2.{n}:1000"))).collect();
    (innocents, sim.connect_client("192.0.2.66:1000"))
}

#[test]
fn poison_is_found_and_nobody_else_suffers() {
    for (pool, retries) in [("", 1), ("retries = 0", 0), (SUBNET, 1)] {
        let mut sim = Sim::new(&configuration(pool, ""));
        let (innocents, attacker) = clients(&mut sim);
        for round_number in 0..20 {
            let opened = sim.opened;
            let deaths = round(&mut sim, &innocents, attacker, round_number);
            if round_number == 0 {
                // 31 clients are halved five times, and the poison is asked by its retry once more.
                assert!(deaths <= 7 + retries, "{pool}: {deaths}");
            } else {
                // Its client is marked: no innocent meets it.
                assert!(deaths <= 2 + retries && sim.opened - opened <= deaths, "{pool}: {deaths}");
            }
            sim.pass(Duration::from_millis(250));
        }
        for client in &innocents {
            assert_eq!(codes(&sim, *client), [0; 20], "{pool}");
        }
        assert_eq!(codes(&sim, attacker), [2; 20], "{pool}");
        let stats = &sim.core.stats;
        assert_eq!(stats.listeners[0].failed[FailReason::BackendClosed as usize].get(), 20);
        assert!(!sim.core.backoff[0].is_failing());
        assert_eq!(stats.pools[0].retries.get(), 20 * retries as u64);
        sim.assert_quiescent();
    }
}

/// A marked client's good queries are answered, all on its own connection, and after a minute it is like all others.
#[test]
fn a_marked_client_is_served_apart_until_it_is_forgotten() {
    let mut sim = Sim::new(&configuration("", ""));
    let (innocents, attacker) = clients(&mut sim);
    round(&mut sim, &innocents, attacker, 0);
    sim.pass(Duration::from_millis(100));
    let before = sim.opened;
    for id in 1..50 {
        sim.ask(attacker, id, "good.test");
        sim.ask(innocents[0], id, "good.test");
        serve(&mut sim);
    }
    assert_eq!(sim.opened - before, 1, "a connection of its own, which is kept");
    assert_eq!(codes(&sim, attacker)[1..], [0; 49]);
    sim.pass(Duration::from_secs(61));
    let before = sim.opened;
    for address in ["192.0.2.66:1001", "192.0.2.1:1001"] {
        let client = sim.connect_client(address);
        sim.ask(client, 50, "good.test");
    }
    assert_eq!(sim.opened - before, 1, "together");
    serve(&mut sim);
    sim.assert_quiescent();
}

/// The backend's idle close crosses a query: it is asked again, whatever `retries` says, and that proves nothing.
#[test]
fn an_idle_end_that_crosses_a_query_is_none_of_its_doing() {
    let mut sim = Sim::new(&configuration("retries = 0", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    for id in 0..10 {
        sim.ask(client, id, "good.test");
        serve(&mut sim);
        let conn = sim.to_backend(0)[0];
        sim.ask(client, 100 + id, "good.test");
        sim.hang_up(conn);
        serve(&mut sim);
    }
    assert_eq!(codes(&sim, client), [0; 20]);
    assert_eq!(sim.core.stats.backends[0].convicted.get(), 0);
    assert_eq!(sim.core.stats.pools[0].repeats.get(), 10);
    sim.assert_quiescent();
}

/// Slow names that are suspect do not hold up the others.
#[test]
fn slow_suspects_do_not_keep_their_places() {
    let mut sim = Sim::new(&configuration("query_timeout = \"5s\"", ""));
    let (innocents, attacker) = clients(&mut sim);
    let slow: Vec<SessionKey> = (100..120).map(|n| sim.connect_client(&format!("192.0.2.{n}:1000"))).collect();
    for client in &slow {
        sim.ask(*client, 1, "slow.test");
    }
    for client in &innocents {
        sim.ask(*client, 1, "good.test");
    }
    sim.ask(attacker, 1, "poison.test");
    let is_slow = |message: &[u8]| message.windows(4).any(|window| window == b"slow");
    let mut answered_after = 0;
    for step in 0..200 {
        sim.accept_all();
        for key in sim.wires.keys().copied().collect::<Vec<_>>() {
            if has_poison(&sim, key) {
                sim.hang_up(key);
                continue;
            }
            while let Some(wire) = sim.wires.get(&key)
                && let Some(nth) = wire.unanswered.iter().position(|arrived| !is_slow(&arrived.message))
            {
                sim.answer(key, nth);
            }
        }
        if innocents.iter().all(|client| !sim.clients[client].answers.is_empty()) {
            answered_after = step;
            break;
        }
        sim.pass(Duration::from_millis(1));
    }
    assert!((1..=100).contains(&answered_after), "all were answered after {answered_after} ms, not seconds");
    assert!(innocents.iter().all(|client| codes(&sim, *client) == [0]));
    sim.answer_all();
    assert!(slow.iter().all(|client| codes(&sim, *client) == [0]));
    sim.assert_quiescent();
}

/// What may not be asked twice fails at the first death, and is on no connection that another client's query brings down.
#[test]
fn an_update_is_alone_and_not_asked_again() {
    let mut sim = Sim::new(&configuration("", ""));
    let (innocents, attacker) = clients(&mut sim);
    let update = |name: &str| {
        let mut message = query(1, name);
        message[2] = 5 << 3;
        message
    };
    for client in &innocents {
        sim.ask(*client, 1, "good.test");
    }
    sim.say(innocents[0], &update("good.test"));
    sim.ask(attacker, 1, "poison.test");
    serve(&mut sim);
    assert_eq!(codes(&sim, innocents[0]), [0, 0]);
    let before: BTreeSet<ConnKey> = sim.to_backend(0).into_iter().collect();
    sim.say(innocents[1], &update("poison.test"));
    sim.ask(innocents[2], 2, "good.test");
    let deaths = serve(&mut sim);
    assert_eq!((deaths, codes(&sim, innocents[1])), (1, vec![0, 2]), "once");
    assert!(before.iter().all(|key| sim.wires.contains_key(key)), "nobody else's connection");
    sim.assert_quiescent();
}

/// A backend with one place: the suspects get it from those that share it, and those get it back.
#[test]
fn with_a_single_place_all_are_served_in_turn() {
    let mut sim = Sim::new(&configuration("", "max_connections = 1"));
    let (innocents, attacker) = clients(&mut sim);
    for id in 0..10 {
        round(&mut sim, &innocents, attacker, id);
        sim.pass(Duration::from_millis(250));
    }
    assert!(innocents.iter().all(|client| codes(&sim, *client) == [0; 10]));
    assert_eq!(codes(&sim, attacker), [2; 10]);
    sim.assert_quiescent();
}

/// Many clients' poison, on a backend that answers everybody else.
#[test]
fn poison_of_many_clients_fails_alone() {
    let mut sim = Sim::new(&configuration("query_timeout = \"60s\"", ""));
    let (innocents, _) = clients(&mut sim);
    let attackers: Vec<SessionKey> = (0..40).map(|n| sim.connect_client(&format!("198.51.100.{n}:1000"))).collect();
    for id in 0..5 {
        for client in &innocents {
            sim.ask(*client, id, "good.test");
        }
        for client in &attackers {
            sim.ask(*client, id, "poison.test");
        }
        serve(&mut sim);
    }
    assert!(innocents.iter().all(|client| codes(&sim, *client) == [0; 5]));
    assert!(attackers.iter().all(|client| codes(&sim, *client) == [2; 5]));
    sim.assert_quiescent();
}

/// A second backend that answers: who is convicted at the first one is asked there, by its retry.
#[test]
fn another_backend_may_know_better() {
    let more = "[[pool.backend]]\nname = \"c\"\naddress = \"127.0.0.1:1054\"\n";
    let mut sim = Sim::new(&configuration("policy = \"first-available\"", more));
    let (innocents, attacker) = clients(&mut sim);
    for client in &innocents {
        sim.ask(*client, 1, "good.test");
    }
    sim.ask(attacker, 1, "poison.test");
    for _ in 0..100 {
        sim.accept_all();
        for key in sim.to_backend(0) {
            if has_poison(&sim, key) {
                sim.hang_up(key);
            } else {
                while sim.wires.get(&key).is_some_and(|wire| !wire.unanswered.is_empty()) {
                    sim.answer(key, 0);
                }
            }
        }
        sim.pass(Duration::from_millis(5));
    }
    assert_eq!(sim.to_backend(1).len(), 1);
    sim.answer_all();
    assert!(innocents.iter().chain([&attacker]).all(|client| codes(&sim, *client) == [0]));
    assert_eq!(sim.core.stats.pools[0].retries.get(), 1);
    sim.assert_quiescent();
}

/// No descriptor, no memory or no port: that is not the backend's doing. One connection is tried after the other, and who
/// waits gets it as soon as there is one.
#[test]
fn a_shortage_of_this_host_is_waited_out() {
    for pool in ["", "[pool.proxy_protocol]\nidentity = \"connection\"\n"] {
        let mut sim = Sim::new(&configuration(pool, "health.mode = \"lazy\"\nhealth.fall = 1"));
        let (innocents, _) = clients(&mut sim);
        let mut tried = 0;
        for client in &innocents {
            sim.ask(*client, 1, "good.test");
        }
        for _ in 0..50 {
            for key in sim.wires.keys().copied().collect::<Vec<_>>() {
                tried += 1;
                sim.starve(key);
            }
            sim.pass(Duration::from_millis(10));
        }
        assert!((10..=30 + 30).contains(&tried), "{pool}: {tried} in half a second");
        assert!(innocents.iter().all(|client| sim.clients[client].answers.is_empty()));
        serve(&mut sim);
        assert!(innocents.iter().all(|client| codes(&sim, *client) == [0]), "{pool}");
        let stats = &sim.core.stats;
        assert_eq!(stats.backends[0].connect_failures.get() + stats.pools[0].retries.get(), 0);
        assert_eq!(sim.core.shared.health.get(0).unwrap().failures(), 0);
        assert!(!sim.core.backoff[0].is_failing());
        assert_eq!(sim.closed[&CloseReason::HostShortage], tried);
        sim.assert_quiescent();
    }
}

#[test]
fn a_shortage_that_lasts_has_a_reason_of_its_own() {
    let mut sim = Sim::new(&configuration("", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 1, "good.test");
    for _ in 0..210 {
        for key in sim.wires.keys().copied().collect::<Vec<_>>() {
            sim.starve(key);
        }
        sim.pass(Duration::from_millis(10));
    }
    assert_eq!(codes(&sim, client), [2]);
    assert_eq!(sim.core.stats.listeners[0].failed[FailReason::HostShortage as usize].get(), 1);
    sim.assert_quiescent();
}

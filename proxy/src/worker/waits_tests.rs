//! Queries that wait at a cap: whatever makes room for one, it is served, and in turn.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::Duration;

use super::sim::Sim;
use crate::client::session::SessionKey;
use crate::close::{ClientCloseReason, CloseReason};
use crate::ledger::caps::AtCap;

const CONNECTION: &str = "[pool.proxy_protocol]\nidentity = \"connection\"";
const ADDRESS: &str = "[pool.proxy_protocol]\nidentity = \"address\"";

/// A pool of backends with room for one connection each.
fn configuration(pool: &str, backends: &[&str], connections: &str) -> String {
    let mut text = format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\n[connections]\n{connections}\n\
         [[pool]]\nname = \"p\"\n{pool}\n"
    );
    for (number, keys) in backends.iter().enumerate() {
        let address = format!("127.0.0.1:{}", 1053 + number);
        let one = if keys.contains("max_connections") { "" } else { "max_connections = 1" };
        text += &format!("[[pool.backend]]\nname = \"b{number}\"\naddress = \"{address}\"\n{one}\n{keys}\n");
    }
    text
}

/// Clients of different addresses, each with a query.
fn askers(sim: &mut Sim, count: u8) -> Vec<SessionKey> {
    let asks = |n| {
        let client = sim.connect_client(&format!("192.0.2.{n}:1000"));
        sim.ask(client, 1, "a.test");
        sim.accept_all();
        client
    };
    (0..count).map(asks).collect()
}

#[test]
fn a_place_that_comes_free_elsewhere_is_found() {
    let mut sim = Sim::new(&configuration(ADDRESS, &[""], ""));
    // A connection of another worker, or a health check.
    sim.elsewhere.push(sim.core.shared.caps.acquire(0).unwrap());
    let clients = askers(&mut sim, 2);
    assert_eq!(sim.core.stats.waiting.get(), 2);
    assert_eq!(sim.core.wakes.ask_for_room, [(0, AtCap::Backend, 1)]);
    // However much happens here, others are not asked at every turn, or they would give up all that they have.
    for _ in 0..1000 {
        sim.core.serve_waiting(0, sim.now);
    }
    assert_eq!(sim.core.wakes.ask_for_room, [(0, AtCap::Backend, 1)]);
    sim.pass(Duration::from_millis(100));
    assert!((3..=6).contains(&sim.core.wakes.ask_for_room.len()), "{:?}", sim.core.wakes.ask_for_room);
    // Nobody tells.
    sim.elsewhere.clear();
    sim.pass(Duration::from_millis(20));
    assert_eq!(sim.opened, 1);
    sim.answer_all();
    assert!(clients.iter().all(|client| sim.clients[client].answers[0][3] & 15 == 0));
    sim.assert_quiescent();
}

/// Who hears that another worker has made room may ask for more at once.
#[test]
fn one_place_after_the_other_is_asked_for() {
    let mut sim = Sim::new(&configuration(ADDRESS, &["max_connections = 9"], ""));
    for _ in 0..9 {
        sim.elsewhere.push(sim.core.shared.caps.acquire(0).unwrap());
    }
    askers(&mut sim, 5);
    for made in 1..=5 {
        assert_eq!((sim.core.wakes.ask_for_room.len(), sim.opened), (made, made - 1));
        sim.elsewhere.pop();
        sim.core.capacity_freed(sim.now);
        sim.settle();
    }
    assert_eq!((sim.opened, sim.core.stats.waiting.get()), (5, 0));
    sim.answer_all();
    sim.elsewhere.clear();
    sim.assert_quiescent();
}

/// Others are told of a place that is left over here, even if somebody waits here for something else.
#[test]
fn a_place_that_nobody_here_waits_for_is_told_of() {
    let mut sim = Sim::new(&configuration(&format!("policy = \"consistent-hash\"\n{ADDRESS}"), &["", ""], ""));
    let client = sim.connect_client("192.0.2.1:1000");
    let mut of_first = None;
    for n in 0..20 {
        let (name, before) = (format!("n{n}.test"), sim.core.pool.outstanding(0));
        sim.ask(client, n, &name);
        of_first = of_first.or(Some(name).filter(|_| sim.core.pool.outstanding(0) > before));
    }
    sim.accept_all();
    let other = sim.connect_client("192.0.2.2:1000");
    sim.ask(other, 1, &of_first.unwrap());
    assert_eq!((sim.opened, sim.core.stats.waiting.get()), (2, 1));
    let second = sim.to_backend(1)[0];
    while !sim.wires[&second].unanswered.is_empty() {
        sim.answer(second, 0);
    }
    sim.waiting_elsewhere(1);
    assert!(!sim.core.wakes.tell_capacity);
    sim.hang_up(second);
    assert!(sim.core.wakes.tell_capacity);
    sim.waiting_elsewhere(0);
    sim.answer_all();
    sim.assert_quiescent();
}

#[test]
fn a_client_that_leaves_makes_room() {
    let mut sim = Sim::new(&configuration(ADDRESS, &[""], ""));
    let clients = askers(&mut sim, 2);
    assert_eq!((sim.opened, sim.core.stats.waiting.get()), (1, 1));
    sim.close_client(clients[0], ClientCloseReason::ClientReset);
    assert_eq!((sim.opened, sim.closed.get(&CloseReason::Evicted)), (2, Some(&1)));
    sim.answer_all();
    assert_eq!(sim.clients[&clients[1]].answers[0][3] & 15, 0);
    sim.assert_quiescent();
}

/// The first in line goes to another backend's line, where it waits no longer than it would have here.
#[test]
fn who_changes_lines_leaves_the_place_to_the_next() {
    let pool = format!("policy = \"round-robin\"\n{CONNECTION}");
    let mut sim = Sim::new(&configuration(&pool, &["weight = 1", "weight = 3"], ""));
    // Their backends: 1, 0, 1, 1, 1. Then it is the turn of 0.
    let clients = askers(&mut sim, 5);
    assert_eq!((sim.opened, sim.core.stats.waiting.get()), (2, 3));
    let second = sim.to_backend(1)[0];
    sim.answer(second, 0);
    assert_eq!((sim.opened, sim.core.stats.waiting.get()), (3, 2), "the idle connection has made way");
    sim.pass(Duration::from_millis(1_001));
    let failed = clients.iter().filter(|client| sim.clients[client].answers.first().is_some_and(|it| it[3] & 15 == 2));
    assert_eq!(failed.count(), 2, "max_wait");
    sim.answer_all();
    sim.assert_quiescent();
}

/// To wait is not to open.
#[test]
fn tries_in_vain_are_no_connections_of_a_client() {
    let mut sim = Sim::new(&configuration(CONNECTION, &[""], "max_opens_per_client = 1"));
    let first = sim.connect_client("192.0.2.1:1000");
    for id in 0..10 {
        sim.ask(first, id, "a.test");
    }
    sim.accept_all();
    let waits = sim.connect_client("192.0.2.2:1000");
    sim.ask(waits, 1, "a.test");
    for _ in 0..10 {
        let only = sim.to_backend(0)[0];
        sim.answer(only, 0);
        sim.pass(Duration::from_millis(25));
    }
    sim.answer_all();
    assert_eq!(sim.clients[&waits].answers[0][3] & 15, 0);
    sim.assert_quiescent();
}

//! Backends that are too slow, and clients that do not read: neither gets more than it may.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::Duration;

use super::sim::Sim;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::close::{ClientCloseReason, CloseReason, FailReason};

const MOST: usize = 4;

fn configuration(listener: &str, pool: &str, connections: &str) -> String {
    format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\n{listener}\n[connections]\n{connections}\n\
         [[pool]]\nname = \"p\"\n{pool}\n[[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:1053\"\n\
         max_in_flight = {MOST}\n"
    )
}

/// What the backend has on each connection and has not answered.
fn unanswered(sim: &Sim) -> Vec<usize> {
    sim.wires.values().map(|wire| wire.unanswered.len()).collect()
}

fn ask(sim: &mut Sim, client: SessionKey, ids: std::ops::Range<u16>) {
    for id in ids {
        sim.ask(client, id, "a.test");
    }
    sim.accept_all();
}

fn failed(sim: &Sim, reason: FailReason) -> u64 {
    sim.core.stats.listeners[0].failed[reason as usize].get()
}

#[test]
fn what_timed_out_counts_until_it_is_answered() {
    let mut sim = Sim::new(&configuration("", "", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    ask(&mut sim, client, 0..4);
    let first: Vec<ConnKey> = sim.to_backend(0);
    // It lives: one of four is answered, later than all were sent.
    sim.pass(Duration::from_millis(1));
    sim.answer(first[0], 0);
    sim.pass(Duration::from_secs(5));
    assert_eq!(failed(&sim, FailReason::Timeout), 3);
    assert_eq!(unanswered(&sim), [3]);
    ask(&mut sim, client, 4..6);
    assert_eq!(unanswered(&sim), [4, 1], "one more had room, the other got a connection of its own");
    // Late answers make room again.
    for _ in 0..3 {
        sim.answer(first[0], 0);
    }
    assert_eq!(unanswered(&sim), [1, 1]);
    ask(&mut sim, client, 6..12);
    assert_eq!(unanswered(&sim), [4, 4]);
    assert_eq!(sim.opened, 2);
    sim.answer_all();
    assert_eq!(sim.clients[&client].answers.len(), 12);
    sim.assert_quiescent();
}

#[test]
fn what_a_client_left_behind_counts_too() {
    let mut sim = Sim::new(&configuration("", "", ""));
    let leaver = sim.connect_client("192.0.2.1:1000");
    ask(&mut sim, leaver, 0..4);
    sim.close_client(leaver, ClientCloseReason::ClientReset);
    let client = sim.connect_client("192.0.2.2:1000");
    ask(&mut sim, client, 0..1);
    assert_eq!(unanswered(&sim), [4, 1]);
    sim.answer_all();
    assert_eq!(sim.clients[&client].answers.len(), 1, "those that nobody waits for go to nobody");
    // One that can take nothing more is idle all the same, and goes when it is that for long.
    ask(&mut sim, client, 1..5);
    sim.close_client(client, ClientCloseReason::ClientReset);
    sim.pass(Duration::from_secs(32));
    assert_eq!(sim.closed.get(&CloseReason::IdleTimeout), Some(&2));
    sim.assert_quiescent();
}

/// Answers of 60,000 octets for a client that has asked 50 times and then does not read.
#[test]
fn a_client_that_does_not_read_has_no_more_than_is_kept_for_it() {
    const LONG: usize = 60_000;
    const KEPT: usize = 256 * 1024;
    let mut sim = Sim::new(&configuration("", "", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    ask(&mut sim, client, 0..50);
    assert_eq!(unanswered(&sim).iter().sum::<usize>(), 4, "as long as it is not known how long answers are");
    sim.pass(Duration::from_millis(50));
    sim.accept_all();
    assert_eq!(unanswered(&sim).iter().sum::<usize>(), 50, "it is late");
    sim.clients.get_mut(&client).unwrap().deaf = true;
    let mut most = 0;
    while let Some((key, _)) = sim.wires.iter().find(|(_, wire)| !wire.unanswered.is_empty()) {
        let key = *key;
        sim.answer_at_length(key, 0, LONG);
        most = most.max(sim.core.sessions[client.0].out.len());
    }
    let servfails = 50 * 64;
    assert!((KEPT - LONG..KEPT + servfails).contains(&most), "{most} octets");
    let slow = failed(&sim, FailReason::ClientSlow);
    assert_eq!(slow, 50 - 4, "four answers fit");
    // Nothing more is taken from it, not even a query whose answer might be short.
    ask(&mut sim, client, 50..60);
    assert_eq!(unanswered(&sim).iter().sum::<usize>(), 0);
    assert!(sim.clients[&client].backlog() > 0);
    // It reads: it gets what was kept, what was not is SERVFAIL, and the rest as ever.
    sim.clients.get_mut(&client).unwrap().deaf = false;
    ask(&mut sim, client, 60..61);
    sim.answer_all();
    let answers = &sim.clients[&client].answers;
    assert_eq!(answers.len(), 61);
    assert_eq!(answers.iter().filter(|answer| answer.len() > LONG).count(), 4);
    assert_eq!(answers.iter().filter(|answer| answer[3] & 15 == 2).count() as u64, slow);
    sim.assert_quiescent();
}

/// One that reads slowly gets all of its long answers: only so many queries are taken at a time as their answers will fit.
#[test]
fn a_slow_client_gets_all_of_its_long_answers() {
    const LONG: usize = 60_000;
    let mut sim = Sim::new(&configuration("", "", ""));
    let client = sim.connect_client("192.0.2.1:1000");
    let answer = |sim: &mut Sim| {
        while let Some((key, _)) = sim.wires.iter().find(|(_, wire)| !wire.unanswered.is_empty()) {
            let key = *key;
            sim.answer_at_length(key, 0, LONG);
        }
    };
    ask(&mut sim, client, 0..1);
    sim.clients.get_mut(&client).unwrap().deaf = true;
    answer(&mut sim);
    ask(&mut sim, client, 1..30);
    assert_eq!(sim.core.sessions[client.0].in_flight(), 3, "with the one that is kept those are 240,000 octets");
    answer(&mut sim);
    for round in 0..40 {
        // Reads everything there is, then nothing for a while.
        sim.clients.get_mut(&client).unwrap().deaf = round % 2 == 1;
        ask(&mut sim, client, 30 + round..31 + round);
        answer(&mut sim);
        sim.pass(Duration::from_millis(10));
    }
    sim.clients.get_mut(&client).unwrap().deaf = false;
    ask(&mut sim, client, 70..71);
    sim.answer_all();
    assert_eq!(failed(&sim, FailReason::ClientSlow), 0);
    assert_eq!(sim.clients[&client].answers.len(), 71);
    sim.assert_quiescent();
}

/// Who a client is, the listener's masks say, as they do for the other limits.
#[test]
fn new_connections_are_counted_by_network() {
    let listener = "client_mask_v4 = 24\nclient_mask_v6 = 56";
    let proxy = "[pool.proxy_protocol]\nidentity = \"connection\"";
    let mut sim = Sim::new(&configuration(listener, proxy, "max_opens_per_client = 2"));
    for (address, served) in [
        ("192.0.2.1:1", true),
        ("192.0.2.2:1", true),
        ("192.0.2.3:1", false),
        ("[::ffff:192.0.2.4]:1", false),
        ("192.0.3.1:1", true),
        ("[2001:db8::1]:1", true),
        ("[2001:db8:0:1::1]:1", true),
        ("[2001:db8:0:ff::1]:1", false),
        ("[2001:db8:0:100::1]:1", true),
    ] {
        let client = sim.connect_client(address);
        ask(&mut sim, client, 0..1);
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers[0][3] & 15 == 0, served, "{address}");
    }
    assert_eq!(failed(&sim, FailReason::NoCapacity), 3);
    sim.assert_quiescent();
}

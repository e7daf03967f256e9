//! Client connections that end by a limit: what they asked is answered, and nothing more is taken.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::rc::Rc;
use std::time::Duration;

use super::plan::Plan;
use super::sim::Sim;
use super::turn::Turn;
use crate::client::session::{Pace, Session};
use crate::close::ClientCloseReason;
use crate::config::from_str;

fn configuration(listener: &str) -> String {
    format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\n{listener}\n[[pool]]\nname = \"p\"\n\
         [[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:1053\"\n"
    )
}

fn closed(sim: &Sim, reason: ClientCloseReason) -> u64 {
    sim.core.stats.listeners[0].closed[reason as usize].get()
}

#[test]
fn the_last_query_is_answered_and_no_other_is_taken() {
    let mut sim = Sim::new(&configuration("max_queries_per_connection = 3"));
    let client = sim.connect_client("192.0.2.1:1000");
    for id in 0..3 {
        sim.ask(client, id, "a.test");
    }
    sim.ask(client, 3, "too.many.test");
    assert!(sim.clients[&client].backlog() > 0, "the fourth is not taken");
    assert_eq!(sim.core.sessions[client.0].in_flight(), 3);
    assert_eq!(closed(&sim, ClientCloseReason::MaxQueries), 0);
    sim.answer_all();
    assert_eq!(closed(&sim, ClientCloseReason::MaxQueries), 1);
    assert_eq!(sim.core.stats.listeners[0].answers.get(), 3);
    sim.assert_quiescent();
}

#[test]
fn a_connection_ends_after_its_time_once_all_is_answered() {
    let mut sim = Sim::new(&configuration("max_connection_duration = \"5s\"\nidle_timeout = \"3s\""));
    let busy = sim.connect_client("192.0.2.1:1000");
    let quiet = sim.connect_client("192.0.2.1:1001");
    for id in 0..4 {
        sim.ask(busy, id, "a.test");
        sim.ask(quiet, id, "a.test");
        sim.answer_all();
        sim.pass(Duration::from_secs(1));
    }
    sim.pass(Duration::from_millis(900));
    sim.ask(busy, 9, "in.flight.test");
    assert_eq!(sim.clients.len(), 2, "idle_timeout has not come");
    sim.pass(Duration::from_millis(101));
    assert!(sim.clients.contains_key(&busy) && !sim.clients.contains_key(&quiet));
    sim.ask(busy, 10, "too.late.test");
    assert!(sim.clients[&busy].backlog() > 0);
    sim.answer_all();
    assert!(sim.clients.is_empty());
    assert_eq!(closed(&sim, ClientCloseReason::MaxDuration), 2);
    assert_eq!(sim.core.stats.listeners[0].answers.get(), 9);
    sim.assert_quiescent();
}

/// There may be very many idle clients: what is rare is in a box.
#[test]
fn a_session_is_small() {
    let size = size_of::<Session>();
    assert!(size <= 320, "{size} octets");
}

#[test]
fn the_shorter_times_hold_near_a_limit() {
    let times = |listener: &str, overload: &str| {
        let config = from_str("test", &(configuration(listener) + overload)).unwrap();
        let plan = Plan::new(&config, |address, _| address);
        [Pace::Normal, Pace::Restricted].map(|pace| {
            let limits = plan.listeners[0].limits(pace);
            (limits.idle_timeout.as_millis(), limits.max_duration.as_millis())
        })
    };
    assert_eq!(times("", ""), [(10_000, 0), (500, 5_000)]);
    let shorter = "idle_timeout = \"400ms\"\nmax_connection_duration = \"4s\"";
    assert_eq!(times(shorter, ""), [(400, 4_000); 2], "the listener's own are shorter");
    let endless = "[overload]\nidle_timeout = \"1s\"\nmax_connection_duration = \"0s\"";
    assert_eq!(times("", endless), [(10_000, 0), (1_000, 0)]);
    assert_eq!(times("max_connection_duration = \"9s\"", endless), [(10_000, 9_000), (1_000, 9_000)]);
    let plan = Plan::new(&from_str("test", &configuration("")).unwrap(), |address, _| address);
    let [one, other] = [(); 2].map(|()| plan.listeners[0].limits(Pace::Normal));
    assert!(Rc::ptr_eq(&one, &other), "all sessions of a listener share them");
}

/// What was asked before the framing broke is still delivered, to a client that reads; who does not read has no more time
/// for it than others, and the end of draining is the end.
#[test]
fn broken_framing_leaves_the_limits_in_force() {
    for (drains, reason) in [(false, ClientCloseReason::WriteTimeout), (true, ClientCloseReason::Drained)] {
        let mut sim = Sim::new(&configuration("write_timeout = \"2s\""));
        let clients = [1000, 1001].map(|port| sim.connect_client(&format!("192.0.2.1:{port}")));
        let [deaf, reader] = clients;
        sim.clients.get_mut(&deaf).unwrap().deaf = true;
        for client in clients {
            sim.ask(client, 1, "a.test");
            sim.say(client, &[0; 3]);
            sim.ask(client, 2, "after.it.test");
            assert_eq!(sim.core.sessions[client.0].in_flight(), 1, "what follows is not taken");
        }
        sim.answer_all();
        assert!(sim.clients.contains_key(&deaf) && !sim.clients.contains_key(&reader));
        assert_eq!(closed(&sim, ClientCloseReason::Malformed), 1);
        assert_eq!(sim.core.stats.listeners[0].answers.get(), 2);
        sim.pass(Duration::from_millis(1900));
        let deadline = sim.core.sessions[deaf.0].deadline();
        assert!(deadline > sim.now, "its timer would come again and again");
        if drains {
            sim.core.drain_is_over();
            sim.settle();
        } else {
            sim.pass(Duration::from_millis(101));
        }
        assert_eq!((closed(&sim, reason), closed(&sim, ClientCloseReason::Malformed)), (1, 1));
        sim.assert_quiescent();
    }
}

/// Part of a message and then FIN: nothing more can come, and what was asked before is answered all the same.
#[test]
fn a_part_of_a_message_before_the_clients_end_costs_it_no_answer() {
    let mut sim = Sim::new(&configuration("message_timeout = \"1s\""));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.ask(client, 1, "a.test");
    sim.accept_all();
    let part = [0, 20, 1];
    assert_eq!(sim.core.client_bytes(client, &part, &mut Turn::default(), sim.now), 0);
    sim.core.client_finished(client);
    // Its task looks at the part again each time that it runs.
    assert_eq!(sim.core.client_bytes(client, &part, &mut Turn::default(), sim.now), 0);
    sim.core.settle_session(client);
    sim.pass(Duration::from_secs(2));
    assert!(sim.clients.contains_key(&client));
    sim.answer_all();
    assert_eq!((sim.core.stats.listeners[0].answers.get(), closed(&sim, ClientCloseReason::ClientClosed)), (1, 1));
    sim.assert_quiescent();
}

/// A client that always has something in flight is never quiet: what it asked is answered before draining is over, and no
/// more is taken.
#[test]
fn draining_ends_for_a_client_that_is_always_busy() {
    let mut sim = Sim::new(&configuration(""));
    let client = sim.connect_client("192.0.2.1:1000");
    sim.core.drain(Duration::from_secs(1), sim.now);
    sim.ask(client, 0, "a.test");
    sim.accept_all();
    let conn = sim.to_backend(0)[0];
    for id in 1..200 {
        sim.ask(client, id, "a.test");
        sim.answer(conn, 0);
        sim.pass(Duration::from_millis(10));
    }
    assert_eq!(sim.core.sessions[client.0].in_flight(), 1);
    sim.core.drain_is_nearly_over();
    sim.ask(client, 200, "too.late.test");
    sim.answer(conn, 0);
    let stats = &sim.core.stats.listeners[0];
    assert_eq!((stats.answers.get(), stats.abandoned.get()), (200, 0));
    assert_eq!(closed(&sim, ClientCloseReason::Drained), 1);
    sim.assert_quiescent();
}

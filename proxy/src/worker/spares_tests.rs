//! Connections that are ready before anybody needs them.

#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::Duration;

use proptest::prelude::*;

use super::core_tests::{ops, run};
use super::sim::Sim;
use crate::backend::pool::{ConnKey, Phase};
use crate::client::session::SessionKey;
use crate::close::CloseReason;
use crate::ledger::ConnKind;
use crate::ledger::caps::AtCap;
use crate::stats::Acquired;

const OWNED: &str = "[pool.proxy_protocol]\nidentity = \"connection\"\n";
const ADDRESS: &str = "[pool.proxy_protocol]\nidentity = \"address\"\n";

fn configuration(proxy: &str, backend: &str, connections: &str) -> String {
    format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\n[[pool]]\nname = \"p\"\n{proxy}\n\
         [[pool.backend]]\nname = \"b\"\naddress = \"127.0.0.1:1053\"\n{backend}\n\
         [connections]\nspares_per_backend = 2\n{connections}\n"
    )
}

fn spares(sim: &Sim) -> Vec<ConnKey> {
    sim.core.pool.iter().filter(|(_, conn)| conn.kind == ConnKind::Spare).map(|(key, _)| key).collect()
}

fn acquired(sim: &Sim, how: Acquired) -> u64 {
    sim.core.stats.pools[0].acquired[how as usize].get()
}

/// A client's only query, answered.
fn ask_once(sim: &mut Sim, port: u16) -> SessionKey {
    let client = sim.connect_client(&format!("192.0.2.1:{port}"));
    sim.ask(client, port, "a.test");
    sim.answer_all();
    assert_eq!(sim.clients[&client].answers.len(), 1);
    client
}

#[test]
fn need_opens_them_and_the_next_query_finds_one() {
    for proxy in ["", ADDRESS, OWNED] {
        let mut sim = Sim::new(&configuration(proxy, "", ""));
        sim.pass(Duration::from_secs(3));
        assert_eq!(sim.opened, 0, "nobody asked");
        ask_once(&mut sim, 1000);
        assert_eq!((sim.opened, spares(&sim).len()), (3, 2), "{proxy}");
        assert_eq!((acquired(&sim, Acquired::New), acquired(&sim, Acquired::Spare)), (1, 0));
        sim.assert_quiescent();
    }
}

#[test]
fn each_kind_is_made_from_a_spare_one() {
    for (proxy, kind) in [(ADDRESS, ConnKind::Keyed), (OWNED, ConnKind::Owned)] {
        let mut sim = Sim::new(&configuration(proxy, "", ""));
        ask_once(&mut sim, 1000);
        let spare = spares(&sim)[0];
        let client = sim.connect_client("192.0.2.2:1000");
        sim.ask(client, 1, "b.test");
        let conn = sim.core.pool.get(spare).unwrap();
        assert_eq!((conn.kind, conn.pending.in_flight()), (kind, 1));
        assert!(sim.wires[&spare].header.len() >= 28, "its first write begins with the header");
        sim.answer_all();
        assert_eq!((acquired(&sim, Acquired::Spare), spares(&sim).len()), (1, 2), "and another takes its place");
        sim.assert_quiescent();
    }
}

#[test]
fn they_go_when_nobody_needs_them() {
    let mut sim = Sim::new(&configuration(OWNED, "", "spare_idle_timeout = \"2s\"\nidle_timeout = \"30s\""));
    ask_once(&mut sim, 1000);
    sim.pass(Duration::from_millis(1_900));
    assert_eq!(spares(&sim).len(), 2);
    sim.pass(Duration::from_millis(1_200));
    assert_eq!((spares(&sim).len(), sim.wires.len()), (0, 1));
    assert_eq!(sim.closed[&CloseReason::IdleTimeout], 2);
    sim.pass(Duration::from_secs(10));
    assert_eq!(sim.opened, 3, "no others come without need");
    sim.assert_quiescent();
}

#[test]
fn they_stay_below_the_caps_and_make_room_first() {
    let mut sim = Sim::new(&configuration(OWNED, "max_connections = 3", ""));
    let first = ask_once(&mut sim, 1000);
    assert_eq!(sim.wires.len(), 3);
    for port in 1001..1003 {
        ask_once(&mut sim, port);
    }
    assert_eq!((sim.wires.len(), spares(&sim).len()), (3, 0), "no place is left for spare ones");
    // The total is reached by another backend's: a spare one here makes room for it.
    sim.close_client(first, crate::close::ClientCloseReason::ClientClosed);
    ask_once(&mut sim, 1010);
    sim.pass(Duration::from_secs(31));
    ask_once(&mut sim, 1011);
    let before = spares(&sim);
    assert!(!before.is_empty());
    sim.core.asked_for_room(0, AtCap::Total, None, sim.now);
    sim.settle();
    assert_eq!(spares(&sim).len(), before.len() - 1);
    assert_eq!(sim.closed[&CloseReason::Evicted], 1);
    sim.assert_quiescent();
}

/// The backend closes what is idle at once. Spare connections are then not worth their while: fewer and fewer come.
#[test]
fn a_backend_that_closes_them_unused_is_not_stormed() {
    let mut sim = Sim::new(&configuration(OWNED, "", ""));
    let mut by_second = Vec::new();
    for second in 0..5u16 {
        let before = sim.opened;
        for n in 0..100 {
            let client = ask_once(&mut sim, 1000 + 100 * second + n);
            for spare in spares(&sim) {
                sim.hang_up(spare);
            }
            sim.close_client(client, crate::close::ClientCloseReason::ClientClosed);
            sim.pass(Duration::from_millis(10));
        }
        by_second.push(sim.opened - before - 100);
    }
    assert!(by_second[0] <= 16 && by_second[1..].iter().all(|spares| *spares <= 4), "{by_second:?}");
    sim.assert_quiescent();
}

/// The peer's FIN and the query cross: the query is asked again, on a connection that was not waiting for it.
#[test]
fn a_spare_one_that_dies_as_it_is_taken_costs_a_retry_only() {
    let mut sim = Sim::new(&configuration(OWNED, "", ""));
    ask_once(&mut sim, 1000);
    let taken = spares(&sim)[0];
    let client = sim.connect_client("192.0.2.2:1000");
    sim.ask(client, 1, "b.test");
    assert_eq!(sim.core.pool.get(taken).unwrap().pending.in_flight(), 1);
    let others = spares(&sim);
    sim.hang_up(taken);
    assert_eq!(sim.closed.get(&CloseReason::Unanswered), None, "it says nothing against the backend");
    assert_eq!(spares(&sim), others, "no spare one was taken for the retry");
    sim.answer_all();
    assert_eq!(sim.clients[&client].answers[0][3] & 15, 0);
    sim.assert_quiescent();
}

/// Where the header goes before the TLS handshake, who gets a spare connection waits for the handshake, and has the whole
/// time to connect for it.
#[test]
fn a_handshake_that_comes_after_the_header_is_connecting() {
    for (outside, phase) in [(true, Phase::Connecting), (false, Phase::Open)] {
        let tls = format!("connect_timeout = \"2s\"\ntls.server_name = \"a.test\"\ntls.proxy_outside_tls = {outside}");
        let mut sim = Sim::new(&configuration(ADDRESS, &tls, "spare_idle_timeout = \"30s\""));
        ask_once(&mut sim, 1000);
        sim.pass(Duration::from_millis(1_900));
        let spare = spares(&sim)[0];
        let client = sim.connect_client("192.0.2.2:1000");
        sim.ask(client, 1, "b.test");
        let conn = sim.core.pool.get(spare).unwrap();
        assert_eq!((conn.kind, conn.phase, conn.pending.in_flight()), (ConnKind::Keyed, phase, 1));
        assert!(conn.header_left > 0, "TLS has to treat it apart");
        sim.pass(Duration::from_millis(1_900));
        assert_eq!(sim.core.pool.get(spare).unwrap().phase, phase);
        if outside {
            sim.pass(Duration::from_millis(200));
            // It, and the one that was opened in its place.
            assert_eq!(sim.closed[&CloseReason::ConnectTimeout], 2);
        }
        sim.answer_all();
        assert_eq!(sim.clients[&client].answers[0][3] & 15, 0);
        sim.assert_quiescent();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn spare_connections_agree_with_the_model(
        proxy in prop::sample::select(vec!["", ADDRESS, super::backends_tests::LABELLED]),
        tls in prop::sample::select(vec!["", "tls.server_name = \"a.test\"\n"]),
        cap in 2..6u8,
        ops in ops(),
    ) {
        let extra = format!(
            "{tls}max_connections = {cap}\n[connections]\nspares_per_backend = 2\nmax_owned_per_client = 3\n\
             max_idle_per_backend = 1\n"
        );
        run(proxy, &extra, ops);
    }
}

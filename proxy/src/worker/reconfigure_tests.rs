//! Other configurations at any moment: against the naive model of queries and headers, and what exactly is kept.
#![expect(clippy::expect_used, reason = "tests panic")]

use proptest::prelude::*;

use super::core_tests::{Op, ops, run_all};
use super::sim::Sim;
use crate::close::CloseReason;

/// A pool of one backend; the header ends with the label that is asked for.
fn configuration(pool: &str, backend: &str, port: u16, keys: &str, tlv: &str, connections: &str) -> String {
    format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"{pool}\"\n[[pool]]\nname = \"{pool}\"\n\
         query_timeout = \"5s\"\n[pool.proxy_protocol]\nidentity = \"connection\"\n\
         [[pool.proxy_protocol.tlv]]\ntype = 0xE0\nvalue = \"{tlv}\"\n\
         [[pool.proxy_protocol.tlv]]\ntype = 0xE1\nvalue = \"{{qname_label:1}}\"\n\
         [[pool.backend]]\nname = \"{backend}\"\naddress = \"127.0.0.1:{port}\"\n{keys}\n[connections]\n{connections}\n"
    )
}

fn configurations() -> Vec<String> {
    vec![
        configuration("p", "a", 1001, "", "A", "max_owned_per_client = 3"),
        configuration("p", "a", 1001, "max_connections = 2\nmax_in_flight = 1", "A", "max_owned_per_client = 3"),
        configuration("p", "a", 1002, "", "A", "max_owned_per_client = 1"),
        configuration("q", "b", 1001, "max_connections = 4", "B{uuid}", "max_total = 3"),
    ]
}

fn ask(sim: &mut Sim, count: u16) {
    let client = *sim.clients.keys().next().expect("a client");
    for n in 0..count {
        sim.ask(client, n, "name.test");
    }
}

#[test]
fn a_connection_that_is_still_right_goes_on() {
    let all = configurations();
    let mut sim = Sim::new(&all[0]);
    sim.connect_client("192.0.2.1:1000");
    ask(&mut sim, 3);
    sim.accept_all();
    sim.reconfigure(&all[1]);
    sim.answer_all();
    assert_eq!((sim.opened, sim.closed.len()), (1, 0));
    ask(&mut sim, 1);
    sim.answer_all();
    assert_eq!(sim.opened, 1, "it is used on");
    sim.assert_quiescent();
}

#[test]
fn a_connection_that_is_wrong_now_ends_with_its_last_answer() {
    let all = configurations();
    let mut sim = Sim::new(&all[0]);
    sim.connect_client("192.0.2.1:1000");
    ask(&mut sim, 3);
    sim.accept_all();
    let old: Vec<_> = sim.wires.keys().copied().collect();
    sim.reconfigure(&all[2]);
    assert_eq!(sim.wires.keys().copied().collect::<Vec<_>>(), old, "what is in flight is answered there");
    sim.answer_all();
    assert_eq!(sim.closed.get(&CloseReason::Reconfigured), Some(&1));
    ask(&mut sim, 1);
    sim.accept_all();
    sim.answer_all();
    assert_eq!(sim.opened, 2);
    sim.assert_quiescent();
}

/// The ops of the other models, and configurations in between.
fn ops_and_reloads() -> impl Strategy<Value = Vec<Op>> {
    let reloads = prop::collection::vec((any::<prop::sample::Index>(), 0..4usize), 0..12);
    (ops(), reloads).prop_map(|(mut ops, reloads)| {
        for (place, number) in reloads {
            ops.insert(place.index(ops.len() + 1), Op::Reload(number));
        }
        ops
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn reloads_agree_with_the_model(ops in ops_and_reloads()) {
        run_all(&configurations(), ops);
    }
}

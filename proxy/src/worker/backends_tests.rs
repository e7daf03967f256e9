//! Several backends in a pool: which one a query goes to, and what becomes of it when that one fails.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use super::core_tests::{ops, run};
use super::sim::Sim;
use crate::client::session::SessionKey;

const OWNED: &str = "[pool.proxy_protocol]\nidentity = \"connection\"\n";

const LABELLED: &str = "[pool.proxy_protocol]\nidentity = \"connection\"\n\
                        [[pool.proxy_protocol.tlv]]\ntype = 0xE0\nvalue = \"{qname_label:1}\"\n";

/// A pool of backends, each with these lines.
fn configuration(pool: &str, proxy: &str, backends: &[&str]) -> String {
    let mut text = format!(
        "[[listener]]\nname = \"dns\"\naddress = \"127.0.0.1:53\"\npool = \"p\"\n[[pool]]\nname = \"p\"\n{pool}\n{proxy}\n"
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

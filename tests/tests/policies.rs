//! Several backends in a pool: which one gets a query, with real servers behind and several workers in front.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::holding::Holding;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::process;
use counterfoil_tests::servers::{Recursor, Unbound};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);
const BACKENDS: [&str; 2] = ["backend-0", "backend-1"];

/// Queries that each backend got.
fn queries(counterfoil: &Counterfoil) -> [usize; 2] {
    let metrics = counterfoil.metrics();
    BACKENDS.map(|name| metrics.sum("backend_queries_total", &[("backend", name)]) as usize)
}

fn settle(config: Config) -> Config {
    config.settles_soon()
}

#[test]
fn round_robin_gives_two_servers_their_shares() {
    let (unbound, recursor) = (Unbound::start(false), Recursor::start(false));
    let config = Config::new(unbound.address)
        .backend_key("weight", 3)
        .backend(recursor.address, &[("weight", "1")])
        .identity("address")
        .set("pool", "policy", "\"round-robin\"");
    let counterfoil = Counterfoil::start(&settle(config));
    let mut client = counterfoil.client();
    Load { count: 400, in_flight: 8, ..Load::default() }.run(&mut client).assert_all_answered(400);
    assert_eq!(queries(&counterfoil), [300, 100]);
    drop(client);
    counterfoil.assert_quiescent();
}

/// What two backends of weights 3 and 1 get of 4,000 queries, one after the other, for other names each.
fn shares_of_three_to_one(policy: &str) -> [usize; 2] {
    const QUERIES: usize = 4000;
    let backends = [FakeBackend::answering(false), FakeBackend::answering(false)];
    let config = Config::new(backends[0].address)
        .backend_key("weight", 3)
        .backend(backends[1].address, &[("weight", "1")])
        .set("pool", "policy", format!("\"{policy}\""));
    let counterfoil = Counterfoil::start(&settle(config));
    let mut client = counterfoil.client();
    let name = |n: usize| format!("host{n}.example.test");
    Load { count: QUERIES, in_flight: 16, name: &name, ..Load::default() }
        .run(&mut client)
        .assert_all_answered(QUERIES);
    let shares = queries(&counterfoil);
    assert_eq!(shares.iter().sum::<usize>(), QUERIES, "{policy}");
    drop(client);
    counterfoil.assert_quiescent();
    shares
}

#[test]
fn weights_hold_at_random_and_for_names() {
    for policy in ["weighted-random", "consistent-hash"] {
        // 3,000, give or take more than seven standard deviations of a random choice.
        let [first, second] = shares_of_three_to_one(policy);
        assert!((2800..=3200).contains(&first), "{policy}: {first}, {second}");
    }
}

#[test]
fn the_first_available_gets_all_whatever_its_weight() {
    let backends = [FakeBackend::answering(false), FakeBackend::answering(false)];
    let config = Config::new(backends[0].address).backend(backends[1].address, &[("weight", "100")]).set(
        "pool",
        "policy",
        "\"first-available\"",
    );
    let counterfoil = Counterfoil::start(&settle(config));
    let mut client = counterfoil.client();
    Load { count: 100, in_flight: 16, ..Load::default() }.run(&mut client).assert_all_answered(100);
    assert_eq!(queries(&counterfoil), [100, 0]);
    drop(client);
    counterfoil.assert_quiescent();
}

/// Nothing is answered, so that all of them are outstanding.
#[test]
fn outstanding_queries_are_divided_by_weight() {
    const IN_FLIGHT: u16 = 40;
    let backends = [Holding::start(), Holding::start()];
    let config = Config::new(backends[0].backend.address)
        .backend_key("weight", 3)
        .backend(backends[1].backend.address, &[("weight", "1")])
        .set("pool", "policy", "\"least-outstanding\"");
    let counterfoil = Counterfoil::start(&settle(config));
    let mut client = counterfoil.client();
    for id in 0..IN_FLIGHT {
        client.ask(id, &format!("held{id}.example.test"), qtype::A);
    }
    let there = || [0, 1].map(|at: usize| backends[at].backend.queries());
    wait::until("all are there", SOON, || there().iter().sum::<usize>() == usize::from(IN_FLIGHT));
    assert_eq!(there(), [30, 10]);
    backends.iter().for_each(Holding::release);
    for _ in 0..IN_FLIGHT {
        client.receive(SOON).message();
    }
    drop(client);
    counterfoil.assert_quiescent();
}

/// Workers do not talk to each other, and a restarted process knows nothing of the one before.
#[test]
fn a_name_has_its_backend_for_all_workers_and_after_a_restart() {
    let backends = [FakeBackend::start(answering(0)), FakeBackend::start(answering(1))];
    let config = Config::new(backends[0].address).backend(backends[1].address, &[]).set("server", "workers", 2).set(
        "pool",
        "policy",
        "\"consistent-hash\"",
    );
    let mut places: Option<Vec<u8>> = None;
    for _ in 0..2 {
        let counterfoil = Counterfoil::start(&settle(config.clone()));
        for _ in 0..6 {
            let mut client = counterfoil.client();
            let of = |n: u16| *client.exchange(n, &format!("host{n}.example.test"), qtype::A).last().unwrap();
            let now: Vec<u8> = (0..30).map(of).collect();
            assert!(now.contains(&0) && now.contains(&1), "{now:?}");
            assert_eq!(*places.get_or_insert_with(|| now.clone()), now);
        }
        counterfoil.assert_quiescent();
    }
}

/// Answers whose last octet says who gave them.
fn answering(number: u8) -> impl Fn(&mut counterfoil_tests::fake_backend::Connection) + Send + Sync {
    move |connection| {
        while let Some(query) = connection.query() {
            connection.send(&message::answer_to(&query, [192, 0, 2, number]));
        }
    }
}

#[test]
fn the_second_takes_over_when_the_first_available_goes() {
    let (first, second) = (FakeBackend::answering(false), FakeBackend::answering(false));
    let config = Config::new(first.address).backend(second.address, &[]).set("pool", "policy", "\"first-available\"");
    let counterfoil = Counterfoil::start(&settle(config));
    let mut client = counterfoil.client();
    Load { count: 50, ..Load::default() }.run(&mut client).assert_all_answered(50);
    assert_eq!(queries(&counterfoil), [50, 0]);
    first.refuse();
    assert_eq!(first.accepted(), 1);
    // Ends its connections, and is gone.
    drop(first);
    Load { count: 50, ..Load::default() }.run(&mut client).assert_all_answered(50);
    let [before, after] = queries(&counterfoil);
    assert!(after >= 45, "{before}, {after}");
    drop(client);
    counterfoil.assert_quiescent();
}

#[test]
fn every_policy_answers_all_while_one_of_two_is_gone() {
    for policy in ["least-outstanding", "round-robin", "weighted-random", "consistent-hash", "first-available"] {
        let good = FakeBackend::answering(true);
        let nobody = process::nobody();
        let config = Config::new(nobody)
            .backend(good.address, &[])
            .identity("connection")
            .tlv(0xe0, "{qname_label:1}")
            .set("pool", "policy", format!("\"{policy}\""));
        let counterfoil = Counterfoil::start(&settle(config));
        let mut client = counterfoil.client();
        let name = |n: usize| format!("n{}.example.test", n % 5);
        Load { count: 200, in_flight: 4, name: &name, ..Load::default() }.run(&mut client).assert_all_answered(200);
        let answer = client.exchange(1, "last.example.test", qtype::A);
        assert_eq!(message::response_code(&answer), rcode::NOERROR, "{policy}");
        drop(client);
        counterfoil.assert_quiescent();
    }
}

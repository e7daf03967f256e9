//! Backends that cannot keep up: what they are given to do is bounded, and no wire ID is used while it is in use.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::holding::Holding;
use counterfoil_tests::message::{self, rcode};
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);
/// For 70,000 queries, on a busy machine.
const LATER: Duration = Duration::from_secs(60);

fn config(holding: &Holding) -> Config {
    Config::new(holding.backend.address).settles_soon()
}

/// All wire IDs of a connection are in use, most of them for queries whose client has left: what comes then goes over
/// another connection, and each answer to whom it belongs.
#[test]
fn f37_all_wire_ids_in_use() {
    const IDS: usize = 65_535;
    const LEFT_BEHIND: usize = 40_000;
    const ASKED: usize = 30_000;
    let holding = Holding::start();
    let config = config(&holding)
        .set("listener", "max_in_flight", 65_536)
        .set("listener", "max_pending_answers", "\"64MiB\"")
        .set("pool", "query_timeout", "\"120s\"")
        .backend_key("max_in_flight", 65_536);
    let counterfoil = Counterfoil::start(&config);
    let name = |n: usize| format!("held{n}.example.test");
    let mut leaver = counterfoil.client();
    let queries: Vec<u8> =
        (0..LEFT_BEHIND).flat_map(|n| message::framed(&message::query(n as u16, &name(n), 1))).collect();
    leaver.send_raw(&queries).unwrap();
    wait::until("the first client's queries are there", LATER, || holding.held(0) == LEFT_BEHIND);
    leaver.reset();
    counterfoil
        .wait_metrics("it has left", SOON, |metrics| metrics.sum("queries_abandoned_total", &[]) == LEFT_BEHIND as f64);

    let address = counterfoil.address;
    let asking = std::thread::spawn(move || {
        let name = |n: usize| format!("held-too{n}.example.test");
        let load =
            Load { count: ASKED, in_flight: ASKED, name: &name, stall: LATER, deadline: LATER * 2, ..Load::default() };
        load.run(&mut Client::connect(address, None))
    });
    let rest = LEFT_BEHIND + ASKED - IDS;
    wait::until("the second client's are there", LATER, || (holding.held(0), holding.held(1)) == (IDS, rest));
    assert_eq!(holding.backend.accepted(), 2);
    holding.release();
    asking.join().unwrap().assert_all_answered(ASKED);
    // All IDs are free again.
    Load { count: 1000, in_flight: 100, ..Load::default() }.run(&mut counterfoil.client()).assert_all_answered(1000);
    assert_eq!(holding.backend.accepted(), 2);
    counterfoil.assert_quiescent();
}

/// A backend that answers three of four queries too late: what it still has to do never exceeds what it may have, however
/// many clients have given up, and when it has done it, it is used as ever.
#[test]
fn a_slow_backend_has_no_more_to_do_than_it_may() {
    const IN_FLIGHT: usize = 8;
    const AT_ONCE: usize = 2;
    let holding = Holding::start();
    let config = config(&holding)
        .set("pool", "query_timeout", "\"300ms\"")
        .set("connections", "max_wait", "\"100ms\"")
        .backend_key("max_in_flight", IN_FLIGHT)
        .backend_key("max_connections", AT_ONCE);
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    let name =
        |n: usize| if n.is_multiple_of(4) { format!("n{n}.example.test") } else { format!("held{n}.example.test") };
    let load = Load { count: 400, in_flight: 40, rate: Some(200.0), name: &name, ..Load::default() };
    let outcome = load.run(&mut client);
    assert!(outcome.ended.is_none() && outcome.foreign.is_empty(), "{outcome:?}");
    assert!(outcome.failed[&rcode::SERVFAIL] >= 300, "{outcome:?}");
    assert_eq!(holding.most(), IN_FLIGHT, "on one connection");
    assert!(holding.backend.most_open() <= AT_ONCE + 1, "one may have closed without the backend having seen it");
    holding.release();
    wait::until("it has done everything", SOON, || holding.is_done());
    let accepted = holding.backend.accepted();
    Load { count: 100, in_flight: 8, ..Load::default() }.run(&mut client).assert_all_answered(100);
    assert!(holding.backend.accepted() <= accepted + 1, "open connections are used");
    drop(client);
    counterfoil.assert_quiescent();
}

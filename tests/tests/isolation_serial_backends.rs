//! Queries in flight on one connection: a backend that works on one at a time for each connection, as dnsdist does, lets
//! nobody wait for the others of that connection where it would take another one.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::sync::Arc;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::isolation::{Neighbours, Scene, Setting};
use counterfoil_tests::servers::SerialFront;
use counterfoil_tests::stepping::{Stepping, Works};
use counterfoil_tests::wait;

const LATER: Duration = Duration::from_secs(120);

/// Clients that have one query in flight each.
const CLIENTS: usize = 10;

/// Steps in which it must be known how the backend works, also where the first answer has taken long (until all clients have
/// come none is given) and the machine is busy, so that times say little.
const NOTICED: usize = 30 * CLIENTS;

/// In these steps the best there is are as many answers as clients.
const MEASURED: usize = 50;

fn ask(scene: &Scene, counterfoil: &Counterfoil) -> Neighbours {
    scene.neighbours(counterfoil, CLIENTS as u8, &Arc::default())
}

/// No more is expected from those who leave.
fn finish(stepping: &Stepping, neighbours: Neighbours) {
    stepping.expect(1);
    let wait = neighbours.finish();
    assert_eq!(wait.failed, 0, "{wait:?}");
}

/// Waits for so many answers in [`MEASURED`] steps in a row.
#[track_caller]
fn assert_reached(stepping: &Stepping, answers: usize) {
    let reached = || (MEASURED..=stepping.steps()).any(|end| stepping.answers(end - MEASURED..end) >= answers);
    wait::until("the steps are made", LATER, || stepping.steps() > NOTICED || reached());
    assert!(reached(), "not {answers} answers in {MEASURED} steps: {:?}", course(stepping));
}

/// Answers in each ten steps.
fn course(stepping: &Stepping) -> Vec<usize> {
    (10..=stepping.steps()).step_by(10).map(|end| stepping.answers(end - 10..end)).collect()
}

fn is_spread_where_it_helps(setting: Setting) {
    let stepping = Stepping::start(Works::OneByOne, setting.identity.is_some());
    let scene = Scene::new(setting);
    let counterfoil = Counterfoil::start(&scene.config(stepping.backend.address));
    stepping.expect(CLIENTS);
    let neighbours = ask(&scene, &counterfoil);
    assert_reached(&stepping, 8 * CLIENTS * MEASURED / 10);
    assert!(stepping.backend.most_open() <= CLIENTS + 1, "{} connections", stepping.backend.most_open());
    finish(&stepping, neighbours);
    counterfoil.assert_quiescent();
}

/// The issue of one connection for all: as many answers as with a connection for each, but for a fifth.
#[test]
fn a_backend_that_works_on_one_query_for_each_connection_gets_more_of_them() {
    is_spread_where_it_helps(Setting::SHARED);
}

#[test]
#[ignore = "soak"]
fn soak_isolation_serial_backends() {
    Setting::all().for_each(is_spread_where_it_helps);
}

/// A client that owns its connections has what it may: queries of its own do not wait for each other while it may have one
/// more. The last place is kept for another header.
#[test]
fn a_client_that_owns_connections_spreads_its_queries_over_them() {
    const OWNED: usize = 7;
    let stepping = Stepping::start(Works::OneByOne, true);
    let scene = Scene::new(Setting::identity("connection"));
    let counterfoil = Counterfoil::start(&scene.config(stepping.backend.address));
    stepping.expect(CLIENTS);
    let address = counterfoil.address;
    let load = std::thread::spawn(move || {
        let load = Load { count: 2200, in_flight: CLIENTS, stall: LATER, deadline: 2 * LATER, ..Load::default() };
        load.run(&mut Client::connect(address, None))
    });
    assert_reached(&stepping, 8 * OWNED * MEASURED / 10);
    assert!(stepping.backend.most_open() <= OWNED, "{} connections", stepping.backend.most_open());
    stepping.expect(1);
    load.join().unwrap().assert_all_answered(2200);
    counterfoil.assert_quiescent();
}

/// Others need no more connections than before, but for one on which it was tried.
#[test]
fn a_backend_that_works_side_by_side_keeps_few_connections() {
    let stepping = Stepping::start(Works::SideBySide, false);
    let scene = Scene::new(Setting::SHARED);
    let counterfoil = Counterfoil::start(&scene.config(stepping.backend.address));
    stepping.expect(CLIENTS);
    let neighbours = ask(&scene, &counterfoil);
    wait::until("the steps are made", LATER, || stepping.steps() > 3 * MEASURED);
    assert!(stepping.answers(0..3 * MEASURED) >= 3 * MEASURED * CLIENTS);
    // One is enough; where the machine is busy it can take some time to see that.
    assert!(2 * stepping.backend.most_open() <= CLIENTS, "{} connections", stepping.backend.most_open());
    finish(&stepping, neighbours);
    counterfoil.assert_quiescent();
}

/// At the limit nobody waits for a place or is refused for it: the connections that there are carry all.
#[test]
fn at_the_limit_the_connections_are_shared_evenly() {
    const LIMIT: usize = 4;
    let stepping = Stepping::start(Works::OneByOne, false);
    let scene = Scene::new(Setting::SHARED);
    let config = scene.config(stepping.backend.address).backend_key("max_connections", LIMIT);
    let counterfoil = Counterfoil::start(&config);
    stepping.expect(CLIENTS);
    let neighbours = ask(&scene, &counterfoil);
    assert_reached(&stepping, 9 * LIMIT * MEASURED / 10);
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("pool_acquire_total", &[("result", "wait")]), 0.0);
    assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "evicted")]), 0.0);
    finish(&stepping, neighbours);
    counterfoil.assert_quiescent();
}

/// dnsdist as it is without any setting, in front of a backend that takes its time: so many queries come through at a time
/// as there are clients, but for a fifth.
#[test]
fn a_stock_dnsdist_is_given_a_connection_for_each_query() {
    let stepping = Stepping::start(Works::SideBySide, false);
    let dnsdist = SerialFront::start(stepping.backend.address);
    let counterfoil = Counterfoil::start(&Config::new(dnsdist.address).settles_soon());
    stepping.expect(1);
    let scene = Scene::new(Setting::SHARED);
    let neighbours = ask(&scene, &counterfoil);
    let most = || (0..stepping.steps()).map(|step| stepping.answers(step..step + 1)).max().unwrap_or(0);
    wait::until("it works on eight of ten queries at a time", LATER, || 10 * most() >= 8 * CLIENTS);
    finish(&stepping, neighbours);
    counterfoil.assert_quiescent();
}

/// What it brings there, within one run: packed, spread, and the best fixed setting, in turn.
#[test]
#[ignore = "soak"]
fn soak_isolation_stock_dnsdist() {
    const ASKED: usize = 400;
    let stepping = Stepping::start(Works::SideBySide, false);
    stepping.expect(1);
    let dnsdist = SerialFront::start(stepping.backend.address);
    let scene = Scene::new(Setting::SHARED);
    // Steps that it takes: each is as long as any other.
    let steps = |config: Config| {
        let counterfoil = Counterfoil::start(&config);
        let neighbours = ask(&scene, &counterfoil);
        wait::until("it is warm", LATER, || neighbours.answered() >= 200);
        let (answered, begun) = (neighbours.answered(), stepping.steps());
        wait::until("they have asked", LATER, || neighbours.answered() >= answered + ASKED);
        let steps = stepping.steps() - begun;
        assert_eq!(neighbours.finish().failed, 0);
        counterfoil.assert_quiescent();
        steps
    };
    let config = || Config::new(dnsdist.address).settles_soon();
    for _ in 0..3 {
        let best = steps(config().backend_key("max_in_flight", 1));
        let ours = steps(config());
        println!("{ASKED} queries took {ours} steps, {best} with max_in_flight = 1");
        assert!(8 * ours <= 10 * best, "{ours} steps, {best} with max_in_flight = 1");
    }
}

//! The failure that Counterfoil exists to end: one client connection, another TLV on each query. The same driver finds it
//! in dnsdist 1.7.3, see `oracle.rs`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::servers::{Recursor, Unbound};
use counterfoil_tests::sockets::{self, Sampler};
use counterfoil_tests::{netns, wait};

/// The program's default.
const MAX_OWNED_PER_CLIENT: usize = 8;

const QUERIES: usize = 10_000;

fn another_tlv_on_each_query(backend: SocketAddr, in_flight: usize) {
    // No key of `[connections]` is set: the defaults must do.
    let counterfoil = Counterfoil::start(&Config::new(backend).identity("connection").tlv(0xe0, "{qname_label:1}"));
    let sampler = Sampler::start(counterfoil.pid(), backend.port());
    let mut client = counterfoil.client();
    let outcome = Load { count: QUERIES, in_flight, ..Load::default() }.run(&mut client);
    let answered = Instant::now();
    wait::until("no socket towards the backend 1 s after the last answer", Duration::from_secs(1), || {
        counterfoil.backend_sockets(backend).is_empty()
    });
    let released = answered.elapsed();
    let observed = sampler.finish();
    println!("{backend}, {in_flight} in flight: {:?}, released after {released:?}, {observed:?}", outcome.elapsed);
    outcome.assert_all_answered(QUERIES);
    assert!(observed.samples >= 10, "{observed:?}");
    assert!(observed.most <= MAX_OWNED_PER_CLIENT, "{observed:?}");
    assert!(observed.longest_close_wait <= Duration::from_secs(1), "{observed:?}");
    // The client is still there, and still served.
    Load { count: 3, ..Load::default() }.run(&mut client).assert_all_answered(3);
    drop(client);
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("answers_total", &[]), (QUERIES + 3) as f64);
    assert_eq!(metrics.sum("queries_failed_total", &[]), 0.0);
}

#[test]
fn unbound_one_in_flight() {
    let unbound = Unbound::start(false);
    another_tlv_on_each_query(unbound.address, 1);
}

#[test]
fn unbound_twenty_in_flight() {
    let unbound = Unbound::start(false);
    another_tlv_on_each_query(unbound.address, 20);
}

#[test]
fn recursor_one_in_flight() {
    let recursor = Recursor::start(false);
    another_tlv_on_each_query(recursor.address, 1);
}

#[test]
fn recursor_twenty_in_flight() {
    let recursor = Recursor::start(false);
    another_tlv_on_each_query(recursor.address, 20);
}

/// Two minutes at 2,000 queries a second, each on a connection of its own, over a veth pair: 240,000 connections from
/// one address to one port, where 28,000 ports last a minute in TIME_WAIT.
#[test]
#[ignore = "soak"]
fn soak_namespaces_no_port_is_left_in_time_wait() {
    const RATE: f64 = 2000.0;
    const SECONDS: usize = 120;
    let (near, far) = netns::pair();
    let unbound = Unbound::start_in(&far, far.address);
    let config = Config::new(unbound.address).identity("connection").tlv(0xe0, "{qname_label:1}");
    let counterfoil = Counterfoil::start_with(&config, Options { namespace: Some(&near), ..Options::default() });
    let sampler = Sampler::start(counterfoil.pid(), unbound.address.port());
    let (outcome, mut client) = near.run(|| {
        let mut client = Client::connect(counterfoil.address, None);
        let (count, deadline) = (RATE as usize * SECONDS, Duration::from_secs(2 * SECONDS as u64));
        (Load { count, in_flight: 20, rate: Some(RATE), deadline, ..Load::default() }.run(&mut client), client)
    });
    let time_wait = sockets::time_wait_towards(counterfoil.pid(), unbound.address.port());
    wait::until("no socket towards the backend 1 s after the last answer", Duration::from_secs(1), || {
        counterfoil.backend_sockets(unbound.address).is_empty()
    });
    let observed = sampler.finish();
    println!("{:?}, slowest {:?}, TIME_WAIT at the end {time_wait}, {observed:?}", outcome.elapsed, outcome.slowest);
    outcome.assert_all_answered(RATE as usize * SECONDS);
    assert!(outcome.elapsed < Duration::from_secs_f64(SECONDS as f64 * 1.1), "the rate holds: {:?}", outcome.elapsed);
    assert!(observed.most <= MAX_OWNED_PER_CLIENT, "{observed:?}");
    assert!(observed.longest_close_wait <= Duration::from_secs(1), "{observed:?}");
    assert!(time_wait < 100, "{time_wait} in TIME_WAIT: each holds a port for a minute");
    near.run(|| {
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("backend_connect_failures_total", &[]), 0.0, "EADDRNOTAVAIL would be one");
        Load { count: 3, ..Load::default() }.run(&mut client).assert_all_answered(3);
        drop(client);
        counterfoil.assert_quiescent();
    });
}

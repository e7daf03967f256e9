//! Local addresses and ports of backend connections: who keeps TIME_WAIT, and where connections come from.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message;
use counterfoil_tests::sockets;

const QUERIES: usize = 300;

/// One query a connection; how many sockets of ours are in TIME_WAIT after that.
fn time_wait_after(one_shot_close: &str) -> usize {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address)
        .identity("connection")
        .tlv(0xe0, "{uuid}")
        .backend_key("one_shot_close", format!("\"{one_shot_close}\""));
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    Load { count: QUERIES, in_flight: 3, ..Load::default() }.run(&mut client).assert_all_answered(QUERIES);
    drop(client);
    counterfoil.assert_quiescent();
    assert_eq!(backend.accepted(), QUERIES);
    sockets::time_wait_towards(counterfoil.pid(), backend.address.port())
}

#[test]
fn one_shot_by_reset_leaves_no_port_behind() {
    assert_eq!(time_wait_after("reset"), 0);
}

/// The counterpart: with FIN whoever closes first keeps the port for a minute, and here that is us.
#[test]
fn one_shot_by_fin_keeps_its_port() {
    let kept = time_wait_after("fin");
    assert!(kept > QUERIES / 2, "{kept} in TIME_WAIT");
}

#[test]
fn source_addresses_are_used_in_turn() {
    let peers = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&peers);
    let backend = FakeBackend::start(move |connection| {
        record.lock().into_iter().for_each(|mut peers| peers.push(connection.peer.ip()));
        let Some(_) = connection.header() else { return };
        while let Some(query) = connection.query() {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    let config = Config::new(backend.address)
        .identity("connection")
        .tlv(0xe0, "{uuid}")
        .backend_key("source", "[\"127.0.0.5\", \"127.0.0.6\"]");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    Load { count: 20, ..Load::default() }.run(&mut client).assert_all_answered(20);
    drop(client);
    counterfoil.assert_quiescent();
    let peers: Vec<IpAddr> = peers.lock().map(|peers| peers.clone()).unwrap_or_default();
    assert_eq!(peers.len(), 20);
    assert!(peers.windows(2).all(|pair| pair[0] != pair[1]), "in turn: {peers:?}");
    let expected = ["127.0.0.5", "127.0.0.6"].map(|address| address.parse::<IpAddr>().ok());
    assert_eq!(peers.into_iter().map(Some).collect::<BTreeSet<_>>(), BTreeSet::from(expected));
}

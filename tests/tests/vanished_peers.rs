//! Peers that vanish without a word, while nobody has anything to say: TCP finds out, however long connections may be idle.

use std::net::SocketAddr;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::netns::{self, Namespace};
use counterfoil_tests::wait;

/// Far more than the probes take, and far less than a connection may be idle.
const SOON: Duration = Duration::from_secs(60);

/// Connections may be idle for an hour; a silent peer is probed each second.
fn config(backend: SocketAddr) -> Config {
    Config::new(backend)
        .set("listener", "idle_timeout", "\"1h\"")
        .set("listener", "write_timeout", "\"3s\"")
        .set("listener", "tcp_keepalive", "\"1s\"")
        .set("connections", "idle_timeout", "\"1h\"")
        .set("connections", "max_age", "\"1h\"")
        .set("connections", "tcp_keepalive", "\"1s\"")
}

fn start(config: &Config, near: &Namespace) -> Counterfoil {
    Counterfoil::start_with(config, Options { namespace: Some(near), ..Options::default() })
}

#[test]
fn an_idle_client_that_vanished_is_noticed() {
    let (near, far) = netns::pair();
    near.run(|| {
        let backend = FakeBackend::answering(false);
        let mut counterfoil = start(&config(backend.address).listen(SocketAddr::from((near.address, 0))), &near);
        let mut clients: Vec<Client> = far.run(|| (0..3).map(|_| Client::connect(counterfoil.address, None)).collect());
        clients.iter_mut().for_each(Client::assert_served);
        far.ip("link set veth0 down");
        counterfoil.wait_metrics("they are given up", SOON, |metrics| {
            metrics.sum("client_connections_closed_total", &[("reason", "client_reset")]) == 3.0
        });
        assert_eq!(counterfoil.metrics().sum("client_connections", &[]), 0.0);
        assert!(counterfoil.terminate(SOON).success());
        drop(clients);
    });
}

/// One that answers the probes is kept, however silent.
#[test]
fn an_idle_client_that_is_there_is_kept() {
    let backend = FakeBackend::answering(false);
    let mut counterfoil = Counterfoil::start(&config(backend.address));
    let (mut client, mut other) = (counterfoil.client(), counterfoil.client());
    client.assert_served();
    // As long as a peer that is not there would be given.
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(6) {
        other.assert_served();
        std::thread::sleep(Duration::from_millis(200));
    }
    client.assert_served();
    assert_eq!(counterfoil.metrics().sum("client_connections_closed_total", &[]), 0.0);
    assert_eq!(backend.accepted(), 1, "nor is the backend's connection closed");
    drop((client, other));
    assert!(counterfoil.terminate(SOON).success());
}

#[test]
fn an_idle_backend_that_vanished_is_noticed() {
    let (near, far) = netns::pair();
    near.run(|| {
        let backend = FakeBackend::answering_in(&far, false);
        let counterfoil = start(&config(backend.address), &near);
        counterfoil.client().assert_served();
        assert_eq!(counterfoil.backend_sockets(backend.address).len(), 1);
        far.ip("link set veth0 down");
        wait::until("its connection is given up", SOON, || counterfoil.backend_sockets(backend.address).is_empty());
        counterfoil.assert_quiescent();
        far.ip("link set veth0 up");
        drop(backend);
    });
}

//! Handshakes and PROXY headers in progress: silent ones make room, and whoever holds many makes room first.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::proxy_header::v2;

const SOON: Duration = Duration::from_secs(30);
const PLACES: usize = 200;

fn address(last: u8) -> IpAddr {
    IpAddr::from(Ipv4Addr::new(127, 0, 0, last))
}

/// So many wait for this.
fn wait_pending(counterfoil: &Counterfoil, stage: &str, count: usize) {
    counterfoil.wait_metrics("they wait", SOON, |metrics| {
        metrics.sum("client_connections_pending", &[("stage", stage)]) == count as f64
    });
}

/// Two addresses take all places and come again and again; eight good clients are served, one after the other, and one that
/// began before and takes its time.
fn silent_handshakes(setting: Setting) {
    let scene = Scene::new(setting.over_tls());
    let backend = FakeBackend::answering(scene.has_header());
    let config = scene
        .config(backend.address)
        .set("listener", "max_connections_per_client", 1000)
        .set("listener.tls", "max_handshakes", PLACES)
        .set("listener.tls", "handshake_timeout", "\"2m\"");
    let counterfoil = Counterfoil::start(&config);
    let served = Arc::new(AtomicUsize::new(0));
    let neighbours = scene.neighbours(&counterfoil, 2, &served);
    let silent = |number: usize| Client::connect(counterfoil.address, Some(address(2 + (number % 2) as u8)));

    let patient = Client::connect(counterfoil.address, Some(address(9)));
    wait_pending(&counterfoil, "tls_handshake", 1);
    let mut attackers: Vec<Client> = (1..PLACES).map(silent).collect();
    wait_pending(&counterfoil, "tls_handshake", PLACES);
    for number in 0..8 {
        scene.connect(counterfoil.address, address(20 + number)).assert_served();
        // The place that it left is taken again.
        attackers.push(silent(0));
        wait_pending(&counterfoil, "tls_handshake", PLACES);
    }
    assert_eq!(counterfoil.refused("handshake_evicted"), 8.0, "one silent one for each");
    // They go on to come: each takes the place of one of its own.
    attackers.extend((0..PLACES).map(silent));
    counterfoil.wait_metrics("they have all come", SOON, |metrics| {
        let evicted = metrics.sum("client_connections_refused_total", &[("reason", "handshake_evicted")]);
        evicted == (8 + PLACES) as f64
    });
    wait_pending(&counterfoil, "tls_handshake", PLACES);
    let mut patient = scene.shake_hands(patient).unwrap();
    patient.assert_served();
    let wait = neighbours.finish();
    assert!(wait.failed == 0 && wait.answered > 0, "{wait:?}");
    let failures = counterfoil.metrics().sum("tls_handshake_failures_total", &[]);
    assert_eq!(failures, 0.0, "who loses its place has not failed");
    drop((attackers, patient));
    counterfoil.assert_quiescent();
}

#[test]
fn silent_handshakes_make_room_for_clients_that_come() {
    silent_handshakes(Setting::identity("connection"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_handshakes() {
    Setting::all().filter(|setting| setting.tls).for_each(silent_handshakes);
}

/// The header comes behind the handshake: until then the peer is all that is known. One that is silent takes all places of
/// both; a load balancer with many clients at once is not cut short for that.
#[test]
fn silent_peers_make_room_for_a_load_balancer() {
    const MOST: usize = 300;
    for inside_tls in [false, true] {
        let setting = Setting { identity: Some("address"), tls: inside_tls };
        let scene = Scene::new(setting);
        let backend = FakeBackend::answering(true);
        let config = scene
            .config(backend.address)
            .accept_proxy(&["127.0.0.0/8"])
            .set("listener.accept_proxy", "max_pending", MOST)
            .set("listener.accept_proxy", "timeout", "\"2m\"")
            .set("listener.accept_proxy", "outside_tls", !inside_tls);
        let counterfoil = Counterfoil::start(&config);
        // Over TLS they have shaken hands, and then say nothing.
        let silent: Vec<Client> = (0..MOST).map(|_| scene.connect(counterfoil.address, address(2))).collect();
        wait_pending(&counterfoil, "proxy_header", MOST);
        let mut clients: Vec<Client> = (0..MOST)
            .map(|number| {
                let mut client = scene.connect(counterfoil.address, address(9));
                let source = format!("192.0.2.{}:{}", number % 250 + 1, 1000 + number);
                client.send_raw(&v2(&source, "198.51.100.53:53", &[])).unwrap();
                client
            })
            .collect();
        clients.iter_mut().for_each(Client::assert_served);
        let evicted = counterfoil.refused("proxy_evicted");
        assert!((1.0..=MOST as f64).contains(&evicted), "{evicted}");
        assert_eq!(counterfoil.metrics().sum("client_connections_opened_total", &[]), MOST as f64, "nobody else");
        drop((silent, clients));
        counterfoil.assert_quiescent();
    }
}

/// Places run out, and somebody has more than its part: it has less time, others have theirs.
#[test]
fn whoever_holds_many_places_must_be_quick() {
    let scene = Scene::new(Setting::SHARED.over_tls());
    let backend = FakeBackend::answering(false);
    let config = scene.config(backend.address).set("listener.tls", "max_handshakes", 8).set(
        "listener.tls",
        "handshake_timeout",
        "\"20s\"",
    );
    let counterfoil = Counterfoil::start(&config);
    let one = Client::connect(counterfoil.address, Some(address(9)));
    wait_pending(&counterfoil, "tls_handshake", 1);
    let many: Vec<Client> = (0..7).map(|_| Client::connect(counterfoil.address, Some(address(2)))).collect();
    wait_pending(&counterfoil, "tls_handshake", 8);
    // Those that came when more than half was taken: four of eight, after a quarter of the time.
    counterfoil.wait_metrics("the quick ones are over", SOON, |metrics| {
        metrics.sum("tls_handshake_failures_total", &[("reason", "timeout")]) == 4.0
    });
    let mut one = scene.shake_hands(one).unwrap();
    one.assert_served();
    drop((one, many));
    counterfoil.assert_quiescent();
}

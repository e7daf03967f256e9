//! Places at a backend: the limits count what the backend sees, at the address where it is.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use counterfoil_tests::certificates::Authority;
use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::{FakeBackend, server_config, tls_versions};
use counterfoil_tests::holding::Holding;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::sockets;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);

/// What one client connection may own.
const OWNED: usize = 8;

/// What each client asks.
const QUERIES: usize = 100;

/// Backends with as few places as the limits say. Each of their connections begins with a look at what the kernel has of
/// ours towards them: that one has been opened, so whatever made way for it must be closed.
#[derive(Clone, Default)]
struct Looks {
    pid: Arc<OnceLock<u32>>,
    most: Arc<AtomicUsize>,
    taken: Arc<AtomicUsize>,
}

impl Looks {
    fn look(&self, port: u16) {
        if let Some(pid) = self.pid.get() {
            self.most.fetch_max(sockets::towards(*pid, port).len(), Ordering::SeqCst);
            self.taken.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// So many clients with 20 queries in flight each, all with another header for each query; the most connections that were
/// open at once.
fn most_open(clients: u8, tlv: &str, dot: bool, change: impl Fn(Config) -> Config) -> usize {
    let looks = Looks::default();
    let authority = Authority::new();
    let tls = dot.then(|| server_config(&authority.issue("dot", &["dot.example"]), &tls_versions()));
    let (looking, address) = (looks.clone(), Arc::new(OnceLock::<SocketAddr>::new()));
    let at = Arc::clone(&address);
    let backend = FakeBackend::start(move |connection| {
        looking.look(at.get().map_or(0, SocketAddr::port));
        if connection.header().is_none() || tls.as_ref().is_some_and(|tls| !connection.secure(tls)) {
            return;
        }
        while let Some(query) = connection.query() {
            connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
        }
    });
    address.set(backend.address).unwrap();
    let config = Config::new(backend.address)
        .settles_soon()
        .identity("connection")
        .tlv(0xe0, tlv)
        // Four clients want 80 places of 11, and each handshake takes its time.
        .set("pool", "query_timeout", "\"20s\"")
        .set("connections", "max_wait", "\"10s\"")
        .set("connections", "max_owned_per_client", OWNED);
    let config = if dot { config.dot("dot.example", &authority.ca) } else { config };
    let counterfoil = Counterfoil::start(&change(config));
    looks.pid.set(counterfoil.pid()).unwrap();
    std::thread::scope(|scope| {
        for number in 1..=clients {
            let mut client = counterfoil.client_from(&Ipv4Addr::new(127, 1, 0, number).to_string());
            scope.spawn(move || {
                let name = |n: usize| format!("c{number}-{n}.example.test");
                let load = Load { count: QUERIES, in_flight: 20, name: &name, ..Load::default() };
                load.run(&mut client).assert_all_answered(QUERIES);
            });
        }
    });
    counterfoil.assert_quiescent();
    assert!(looks.taken.load(Ordering::SeqCst) > QUERIES / 2, "{tlv}: hardly any connection was opened");
    looks.most.load(Ordering::SeqCst)
}

/// Whatever makes room for a connection is closed before that is opened: at the cap of a client connection, and at the cap
/// of a backend.
#[test]
fn a_place_is_free_when_its_descriptor_is_closed() {
    for (tlv, close, dot) in [
        ("{qname_label:1}", "reset", false),
        ("{uuid}", "reset", false),
        ("{uuid}", "fin", false),
        ("{qname_label:1}", "fin", true),
    ] {
        let close = |config: Config| config.backend_key("one_shot_close", format!("{close:?}"));
        let most = most_open(1, tlv, dot, close);
        assert!((OWNED / 2..=OWNED).contains(&most), "{tlv}, DoT {dot}: {most} connections for one client");
        let most = most_open(4, tlv, dot, |config| close(config).backend_key("max_connections", 11));
        assert!((6..=11).contains(&most), "{tlv}, DoT {dot}: {most} connections to one backend");
    }
}

/// A backend whose places are all taken is moved to another address under the same name: that has all of them, while what is
/// in flight at the former one is answered there.
#[test]
fn a_full_backend_that_is_moved_has_all_its_places_at_once() {
    const PLACES: u8 = 4;
    let (old, new) = (Holding::start(), Holding::start());
    let at = |backend: &Holding| {
        Config::new(backend.backend.address)
            .settles_soon()
            .backend_key("max_connections", PLACES)
            .backend_key("max_in_flight", 1)
    };
    let counterfoil = Counterfoil::start(&at(&old));
    let client = |number| counterfoil.client_from(&Ipv4Addr::new(127, 1, 0, number).to_string());
    let mut asked: Vec<_> = (1..=PLACES).map(client).collect();
    asked.iter_mut().for_each(|client| client.ask(1, "held.example.test", qtype::A));
    wait::until("the old address is full", SOON, || old.backend.queries() == usize::from(PLACES));
    counterfoil.rewrite_with(&at(&new));
    let (ok, output) = counterfoil.ctl(&["reload"], 3 * SOON);
    assert!(ok, "{output}");
    let mut moved: Vec<_> = (11..11 + PLACES).map(client).collect();
    moved.iter_mut().for_each(|client| client.ask(1, "held.example.test", qtype::A));
    // None of them is answered: each has a place of its own.
    wait::until("the new address is full", SOON, || new.backend.queries() == usize::from(PLACES));
    assert_eq!((old.backend.open(), new.backend.open()), (usize::from(PLACES), usize::from(PLACES)));
    let waiting = counterfoil.metrics().sum("queries_waiting", &[]);
    assert_eq!(waiting, 0.0);
    old.release();
    new.release();
    for client in asked.iter_mut().chain(&mut moved) {
        let answer = client.receive(SOON).message();
        assert_eq!(message::response_code(&answer), rcode::NOERROR);
    }
    drop((asked, moved));
    counterfoil.assert_quiescent();
}

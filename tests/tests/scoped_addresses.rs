//! Addresses of one link, with the zone that says which (RFC 4007 section 11.2): for a listener, a backend and the source
//! towards it.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener};
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message;
use counterfoil_tests::netns::{self, Namespace};

const SOON: Duration = Duration::from_secs(10);
const NEAR: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const FAR: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// The number of the pair's interface in this namespace.
fn index(namespace: &Namespace) -> u32 {
    namespace.run(|| {
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET6, rustix::net::SocketType::DGRAM, None);
        rustix::net::netdevice::name_to_index(socket.unwrap(), "veth0").unwrap()
    })
}

fn at(address: Ipv6Addr, port: u16, index: u32) -> SocketAddr {
    SocketAddr::V6(SocketAddrV6::new(address, port, 0, index))
}

#[test]
fn rfc4007_11_2_listener_backend_and_source_of_one_link() {
    let (near, far) = netns::pair();
    near.ip(&format!("address add {NEAR}/64 dev veth0 nodad"));
    far.ip(&format!("address add {FAR}/64 dev veth0 nodad"));
    let (near_index, far_index) = (index(&near), index(&far));
    near.run(|| {
        let socket = far.run(|| TcpListener::bind(at(FAR, 0, far_index)).unwrap());
        let port = socket.local_addr().unwrap().port();
        let backend = FakeBackend::start_on(socket, |connection| {
            if connection.header().is_none() {
                return;
            }
            while let Some(query) = connection.query() {
                connection.send(&message::answer_to(&query, [192, 0, 2, 53]));
            }
        });
        // By number for the backend, by name for the others.
        let config = Config::new(at(FAR, port, near_index))
            .settles_soon()
            .guarded()
            .identity("address")
            .set("listener", "address", format!("\"[{NEAR}%veth0]:0\""))
            .backend_key("source", format!("[\"{NEAR}%veth0\"]"))
            .backend_key("health.mode", "\"auto\"");
        let counterfoil = Counterfoil::start_with(&config, Options { namespace: Some(&near), ..Options::default() });
        assert_eq!(counterfoil.address.ip(), NEAR);
        let mut client = far.run(|| Client::connect(at(NEAR, counterfoil.address.port(), far_index), None));
        Load { count: 20, in_flight: 5, ..Load::default() }.run(&mut client).assert_all_answered(20);
        counterfoil.wait_metrics("checks pass", SOON, |metrics| {
            metrics.sum("backend_health_checks_total", &[("result", "pass")]) > 0.0
                || metrics.sum("backend_up", &[]) == 1.0
        });
        let (ok, shown) = counterfoil.ctl(&["show", "backends"], SOON);
        assert!(ok && shown.contains(&FAR.to_string()), "{shown}");
        counterfoil.assert_no_leak_was_seen();
        drop(client);
        drop((counterfoil, backend));
    });
}

//! The trust that a backend has in this host is not every client's: who may come, and what is forwarded for them.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::Client;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::isolation::{Scene, Setting};
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::proxy_header::v2;
use counterfoil_tests::servers::PowerDns;
use counterfoil_tests::{wait, zone};

const SOON: Duration = Duration::from_secs(10);
const REFUSED: u8 = 5;
const SOA: u16 = 6;

/// A message of this opcode with a question for the zone's SOA, as NOTIFY and UPDATE have it.
fn of_opcode(id: u16, opcode: u8) -> Vec<u8> {
    let mut message = message::query(id, zone::NAME, SOA);
    message[2] = opcode << 3;
    message
}

/// What a backend may do for those whom it trusts by their address, by the name that `refuse` has for it.
fn privileged() -> [(&'static str, Vec<u8>); 4] {
    [
        ("axfr", zone::query(1, None)),
        ("ixfr", zone::query(2, Some(1))),
        ("notify", of_opcode(3, 4)),
        ("update", of_opcode(4, 5)),
    ]
}

/// What this client gets for it: a response code.
#[track_caller]
fn answer(client: &mut Client, message: &[u8]) -> u8 {
    client.send_raw(&message::framed(message)).unwrap();
    let answer = client.receive(SOON).message();
    assert_eq!(message::id(&answer), message::id(message));
    message::response_code(&answer)
}

/// A primary lets this host transfer its zone, and no PROXY header tells it that others ask: nothing of that reaches it,
/// while neighbours are served. Where the header names the client it is for the primary to say.
fn what_a_backend_does_for_its_friends(setting: Setting) {
    let scene = Scene::new(setting);
    let backend = FakeBackend::answering(scene.has_header());
    let counterfoil = Counterfoil::start(&scene.config(backend.address).guarded());
    let served = Arc::new(AtomicUsize::new(0));
    let neighbours = scene.neighbours(&counterfoil, 2, &served);
    let hidden = matches!(setting.identity, None | Some("forwarder"));
    let mut attacker = scene.connect(counterfoil.address, "127.0.0.66".parse().unwrap());
    for (name, message) in privileged().into_iter().filter(|(name, _)| hidden || !name.ends_with("xfr")) {
        let expected = if hidden { REFUSED } else { rcode::NOERROR };
        assert_eq!(answer(&mut attacker, &message), expected, "{setting:?} {name}");
    }
    let refused = counterfoil.metrics().sum("queries_failed_total", &[("reason", "refused")]);
    assert_eq!(refused, if hidden { 4.0 } else { 0.0 }, "{setting:?}");
    if hidden {
        // Whoever can read it is told why: an OPT record in the query, and in the answer an extended error (RFC 8914), 18.
        let mut query = zone::query(5, None);
        query[11] = 1;
        query.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        attacker.send_raw(&message::framed(&query)).unwrap();
        let answer = attacker.receive(SOON).message();
        assert_eq!(message::response_code(&answer), REFUSED);
        let told = answer.windows(6).any(|octets| octets[..2] == [0, 15] && octets[4..] == [0, 18]);
        assert!(told, "{answer:02x?}");
    }
    // Neither ends its connection.
    attacker.assert_served();
    let wait = neighbours.finish();
    assert!(wait.failed == 0 && wait.answered > 0, "{wait:?}");
    drop(attacker);
    counterfoil.assert_quiescent();
}

#[test]
fn what_a_backend_does_for_this_host_it_does_not_do_for_its_clients() {
    what_a_backend_does_for_its_friends(Setting::SHARED);
    what_a_backend_does_for_its_friends(Setting::identity("forwarder"));
    what_a_backend_does_for_its_friends(Setting::identity("address"));
}

#[test]
#[ignore = "soak"]
fn soak_isolation_trust() {
    Setting::all().for_each(what_a_backend_does_for_its_friends);
}

/// PowerDNS lets 127.0.0.3 transfer, which is where Counterfoil connects from: only a configuration that says so gives
/// the zone to its clients.
#[test]
fn a_zone_that_this_host_may_have_is_not_given_to_others() {
    let primary = PowerDns::start(2026, 10);
    let config = Config::new(primary.address).settles_soon().guarded().backend_key("source", "[\"127.0.0.3\"]");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client_from("127.0.0.66");
    assert_eq!(answer(&mut client, &zone::query(1, None)), REFUSED);
    // Its names are for everybody.
    let host = client.exchange(2, &format!("host1.{}", zone::NAME), qtype::A);
    assert_eq!(message::response_code(&host), rcode::NOERROR);
    drop(client);
    counterfoil.assert_quiescent();

    let open = Counterfoil::start(&config.set("listener", "refuse", "[\"update\"]"));
    let mut client = open.client_from("127.0.0.66");
    assert!(zone::fetch(&mut client, &zone::query(1, None), 2).iter().all(|m| message::response_code(m) == 0));
    assert_eq!(answer(&mut client, &of_opcode(3, 5)), REFUSED);
    drop(client);
    open.assert_quiescent();
}

/// The address behind PROXY is what counts where there is one, and else the peer's own; loopback, private and local
/// networks by default.
#[test]
fn only_those_who_may_come_are_let_in() {
    let backend = FakeBackend::answering(false);
    let config = || Config::new(backend.address).settles_soon().guarded();
    let counterfoil = Counterfoil::start(&config().accept_proxy(&["127.0.0.1"]));
    let behind = |client: &str| {
        let service = if client.starts_with('[') { "[2001:db8::53]:53" } else { "198.51.100.53:53" };
        counterfoil.client_behind("127.0.0.1", &v2(client, service, &[]))
    };
    for client in ["10.1.2.3:4", "100.127.0.1:4", "172.31.0.1:4", "192.168.1.1:4", "169.254.1.1:4", "127.0.0.9:4"] {
        behind(client).assert_served();
    }
    for client in ["[fd00::1]:4", "[fe80::1]:4", "[::1]:4"] {
        behind(client).assert_served();
    }
    counterfoil.client_from("127.0.0.7").assert_served();
    let others = ["203.0.113.1:4", "11.0.0.1:4", "100.128.0.1:4", "172.32.0.1:4", "[2001:db8::1]:4", "[fec0::1]:4"];
    for client in others {
        behind(client).assert_closed(SOON);
    }
    assert_eq!(counterfoil.refused("not_allowed"), others.len() as f64);
    assert_eq!(backend.queries(), 10);
    counterfoil.assert_quiescent();

    let mut counterfoil = Counterfoil::start(&config().set("listener", "allow_from", "[\"127.0.0.8/29\"]"));
    counterfoil.client_from("127.0.0.9").assert_served();
    counterfoil.client_from("127.0.0.1").assert_ended(SOON);
    assert_eq!(counterfoil.refused("not_allowed"), 1.0);
    // Who is in stays in when the networks change, who comes is judged by the new ones.
    let mut inside = counterfoil.client_from("127.0.0.9");
    inside.assert_served();
    counterfoil.rewrite_with(&config().set("listener", "allow_from", "[\"127.0.0.1\"]"));
    counterfoil.process.signal(rustix::process::Signal::HUP);
    wait::until("the new networks hold", SOON, || {
        let mut client = counterfoil.client_from("127.0.0.1");
        client.ask(1, "a.example.test", qtype::A);
        matches!(client.receive(SOON), counterfoil_tests::driver::Received::Message(_))
    });
    counterfoil.client_from("127.0.0.9").assert_ended(SOON);
    inside.assert_served();
    drop(inside);
    counterfoil.assert_quiescent();
}

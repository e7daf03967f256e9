//! Faults of the host and its network, and those of backends that need a network of the test's own, each named by its row
//! in docs/faults.md.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::netns::{self, Namespace};
use counterfoil_tests::sockets::State;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);

fn config(backend: SocketAddr) -> Config {
    Config::new(backend).settles_soon()
}

fn start_in(namespace: &Namespace, config: &Config) -> Counterfoil {
    Counterfoil::start_with(config, Options { namespace: Some(namespace), ..Options::default() })
}

/// A SYN that nobody answers is a socket of ours in both views, until it is given up.
#[test]
fn f30_a_connect_without_answer_is_seen() {
    let (near, far) = netns::pair();
    // In the network, and nobody's; a neighbour that is known, so that the SYN is sent.
    let absent = SocketAddr::from((Ipv4Addr::from(u32::from(far.address) + 1), 53));
    near.ip(&format!("neighbour add {} lladdr 02:00:00:00:00:09 dev veth0", absent.ip()));
    let config = config(absent).backend_key("connect_timeout", "\"4s\"").set("pool", "retries", 0);
    let counterfoil = start_in(&near, &config);
    near.run(|| {
        let mut client = counterfoil.client();
        client.ask(1, "n.example.test", qtype::A);
        counterfoil.wait_metrics("both views have it", Duration::from_secs(4), |metrics| {
            let kernel = metrics.sum("kernel_backend_sockets", &[("tcp_state", "syn_sent")]);
            (kernel, metrics.sum("backend_connections", &[])) == (1.0, 1.0)
        });
        let states: Vec<State> = counterfoil.backend_sockets(absent).iter().map(|socket| socket.state).collect();
        assert_eq!(states, [State::SynSent]);
        assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::SERVFAIL);
        drop(client);
        counterfoil.assert_quiescent();
        assert!(counterfoil.backend_sockets(absent).is_empty());
    });
}

/// No descriptor is left for a new connection to the backend: SERVFAIL, nothing leaks, and it is well again when there are
/// some.
#[test]
fn f47_no_descriptor_for_a_backend_connection() {
    const DESCRIPTORS: u32 = 64;
    let backend = FakeBackend::answering(true);
    let config = config(backend.address)
        .identity("connection")
        .tlv(0xe0, "{uuid}")
        .set("connections", "max_wait", "\"300ms\"")
        .set("pool", "query_timeout", "\"1s\"")
        .set("listener", "max_connections_per_client", 1000);
    let mut counterfoil =
        Counterfoil::start_with(&config, Options { descriptors: Some(DESCRIPTORS), ..Options::default() });
    let mut clients: Vec<Client> = Vec::new();
    let mut failed = 0;
    // Every query needs a connection of its own. With more and more clients there comes one for which there is none.
    for _ in 0..DESCRIPTORS {
        let Ok(mut client) = Client::try_connect(counterfoil.address, None) else { break };
        client.ask(1, "n.example.test", qtype::A);
        clients.push(client);
        let Some(first) = clients.first_mut() else { break };
        if let counterfoil_tests::driver::Received::Message(answer) = first.receive(Duration::from_millis(200)) {
            failed += usize::from(message::response_code(&answer) == rcode::SERVFAIL);
        }
        first.ask(2, "again.example.test", qtype::A);
    }
    println!("{} clients, {failed} times SERVFAIL for the first", clients.len());
    // Those who hold a place keep it: nothing is left for a connection to the backend.
    wait::until("a query fails for want of a descriptor", SOON, || {
        let Some(first) = clients.first_mut() else { return false };
        let received = first.receive(Duration::from_millis(200));
        first.ask(4, "more.example.test", qtype::A);
        matches!(received, counterfoil_tests::driver::Received::Message(answer)
            if message::response_code(&answer) == rcode::SERVFAIL)
    });
    assert!(counterfoil.process.exited().is_none());
    drop(clients);
    wait::until("new clients are served again", SOON, || {
        let Ok(mut client) = Client::try_connect(counterfoil.address, None) else { return false };
        client.ask(3, "after.example.test", qtype::A);
        matches!(client.receive(Duration::from_secs(2)), counterfoil_tests::driver::Received::Message(answer)
            if message::response_code(&answer) == rcode::NOERROR)
    });
    counterfoil.assert_quiescent();
    let metrics = counterfoil.metrics();
    let short = [("reason", "host_shortage")];
    assert!(metrics.sum("queries_failed_total", &short) >= 1.0);
    assert!(metrics.sum("backend_shortages_total", &[]) >= 1.0);
    assert_eq!(metrics.sum("backend_connect_failures_total", &[]), 0.0, "it was not the backend's doing");
    wait::until("every connection that was opened is closed", SOON, || backend.open() == 0);
}

/// All local ports towards the backend are in TIME_WAIT: SERVFAIL without a spin, and well again when there are more.
#[test]
fn f48_no_port_left_towards_the_backend() {
    const PORTS: usize = 20;
    let (near, far) = netns::pair();
    let backend = FakeBackend::answering_in(&far, true);
    // With FIN the ports stay with us for a minute.
    let config = config(backend.address)
        .identity("connection")
        .tlv(0xe0, "{uuid}")
        .backend_key("one_shot_close", "\"fin\"")
        .set("connections", "max_wait", "\"100ms\"")
        .set("pool", "query_timeout", "\"1s\"");
    let counterfoil = start_in(&near, &config);
    near.sysctl("ipv4/tcp_tw_reuse", "0");
    near.sysctl("ipv4/ip_local_port_range", &format!("40000 {}", 40_000 + PORTS - 1));
    near.run(|| {
        let mut client = counterfoil.client();
        let mut codes = Vec::new();
        let (cpu, start) = (counterfoil.process.cpu_time(), Instant::now());
        for id in 0..2 * PORTS as u16 {
            let answer = client.exchange(id, &format!("n{id}.example.test"), qtype::A);
            codes.push(message::response_code(&answer));
        }
        let (spent, taken) = (counterfoil.process.cpu_time() - cpu, start.elapsed());
        let served = codes.iter().filter(|code| **code == rcode::NOERROR).count();
        println!("{served} of {} served in {taken:?}, {spent:?} of CPU time", codes.len());
        assert!((PORTS / 2..=PORTS).contains(&served), "{codes:?}");
        assert!(codes[PORTS..].iter().all(|code| *code == rcode::SERVFAIL), "{codes:?}");
        assert!(spent < Duration::from_secs(2), "{spent:?} of CPU time");
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("backend_connect_failures_total", &[]), 0.0, "it is not the backend's doing");
        assert!(metrics.sum("queries_failed_total", &[("reason", "host_shortage")]) >= PORTS as f64);
        near.sysctl("ipv4/ip_local_port_range", "40000 41000");
        wait::until("it is well again", SOON, || {
            let answer = client.exchange(500, "after.example.test", qtype::A);
            message::response_code(&answer) == rcode::NOERROR
        });
        drop(client);
        counterfoil.assert_quiescent();
    });
}

/// Small packets, and a link that goes away for moments: what is lost is sent again, and every query has its end.
#[test]
fn f52_a_narrow_link_that_flaps() {
    const QUERIES: usize = 300;
    let (near, far) = netns::pair();
    for end in [&near, &far] {
        end.ip("link set veth0 mtu 576");
    }
    let backend = FakeBackend::answering_in(&far, true);
    let config = config(backend.address)
        .identity("address")
        .tlv(0xe0, "{qname_label:2}")
        .set("pool", "query_timeout", "\"8s\"")
        .set("connections", "idle_timeout", "\"3s\"");
    let counterfoil = start_in(&near, &config);
    let (near, far_end, counterfoil_ref) = (&near, &far, &counterfoil);
    std::thread::scope(|scope| {
        let load = scope.spawn(move || {
            near.run(|| {
                let label = "x".repeat(60);
                let name = move |n: usize| format!("{label}.k{}.n{n}.example.test", n % 5);
                let mut client = Client::connect(counterfoil_ref.address, None);
                let load = Load { count: QUERIES, in_flight: 20, rate: Some(75.0), name: &name, ..Load::default() };
                load.run(&mut client)
            })
        });
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(400));
            far_end.ip("link set veth0 down");
            std::thread::sleep(Duration::from_millis(300));
            far_end.ip("link set veth0 up");
        }
        let outcome = load.join().unwrap();
        println!("{outcome:?}");
        assert!(outcome.foreign.is_empty() && outcome.missing.is_empty() && outcome.ended.is_none(), "{outcome:?}");
        assert!(outcome.answered >= QUERIES * 9 / 10, "{outcome:?}");
    });
    near.run(|| {
        counterfoil.assert_quiescent();
        assert!(counterfoil.backend_sockets(backend.address).is_empty());
    });
}

//! Faults that need a kernel with modules that not every one has: for the emulated machines of
//! `cargo xtask kernels`. Each is named by its row in docs/faults.md.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, message as logged};
use counterfoil_tests::driver::{Client, Load, Outcome};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::netem::{Netem, Trouble};
use counterfoil_tests::{snmp, wait};

const SOON: Duration = Duration::from_secs(20);

/// Connections to the backend come and go, and the watchdog finds what is wrong for two seconds, and reaps it.
fn config(backend: SocketAddr) -> Config {
    Config::new(backend)
        .backend_key("connect_timeout", "\"6s\"")
        .identity("address")
        .tlv(0xe0, "{qname_label:2}")
        .set("pool", "query_timeout", "\"8s\"")
        .set("listener", "idle_timeout", "\"20s\"")
        .set("listener", "message_timeout", "\"20s\"")
        .set("connections", "idle_timeout", "\"500ms\"")
        .set("connections", "cleanup_interval", "\"100ms\"")
        .set("watchdog", "interval", "\"500ms\"")
        .set("watchdog", "grace", "\"2s\"")
        .set("watchdog", "crosscheck_interval", "\"1s\"")
        .set("watchdog", "reap", "\"on\"")
}

/// All is well again, and over; at no time anything was taken for a leak.
fn assert_ends_well(counterfoil: &mut Counterfoil, backend: &FakeBackend, mut client: Client) {
    wait::until("it is well again", SOON, || {
        let answer = client.exchange(1, "x.after.n.example.test", qtype::A);
        message::response_code(&answer) == rcode::NOERROR
    });
    drop(client);
    counterfoil.assert_quiescent();
    assert!(counterfoil.process.exited().is_none());
    assert!(counterfoil.backend_sockets(backend.address).is_empty());
    let metrics = counterfoil.metrics();
    for name in ["reaped_total", "kernel_witness_disagreements_total", "kernel_view_uncertain"] {
        assert_eq!(metrics.sum(name, &[]), 0.0, "{name}");
    }
    let found = counterfoil.process.lines().into_iter().find(|line| logged(line, "finding").is_some());
    assert!(found.is_none(), "{found:?}");
}

/// On both sides of Counterfoil: what is corrupt is sent again, what comes out of order is put in order, and every query has
/// its end.
#[test]
#[ignore = "for the emulated machines of `cargo xtask kernels`"]
fn f52_delay_reordering_and_corruption() {
    const CLIENTS: usize = 4;
    /// Of each client.
    const QUERIES: usize = 100;
    /// So many have one TLV, and so a connection, in common.
    const TOGETHER: usize = 10;
    const TROUBLE: Trouble =
        Trouble { delay: Duration::from_millis(40), jitter: Duration::from_millis(20), reorder: 20, corrupt: 3 };
    let backend = FakeBackend::answering(true);
    let mut counterfoil = Counterfoil::start(&config(backend.address));
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| counterfoil.client()).collect();
    let counts =
        || [("TcpExt", "TCPOFOQueue"), ("Tcp", "InCsumErrors")].map(|(group, name)| snmp::counter(group, name));
    let before = counts();
    let netem = Netem::on_loopback(TROUBLE);
    let start = Instant::now();
    clients.iter_mut().for_each(Client::assert_served);
    // There and back, on both sides; one packet in five is not delayed.
    let mean = start.elapsed() / CLIENTS as u32;
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let ask = |(number, mut client): (usize, Client)| {
            let name = move |n: usize| format!("x.k{number}-{}.n{n}.example.test", n / TOGETHER);
            let load = Load { count: QUERIES, in_flight: 20, rate: Some(50.0), name: &name, ..Load::default() };
            // The client leaves while packets are late.
            load.run(&mut client)
        };
        let loads: Vec<_> = clients.into_iter().enumerate().map(|it| scope.spawn(move || ask(it))).collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    });
    let after = counts();
    drop(netem);
    let [reordered, corrupted] = [after[0] - before[0], after[1] - before[1]];
    println!("a query takes {mean:?}; {reordered} segments out of order, {corrupted} corrupt; {outcomes:#?}");
    for outcome in &outcomes {
        assert!(outcome.foreign.is_empty() && outcome.missing.is_empty() && outcome.ended.is_none(), "{outcome:?}");
        assert!(outcome.failed.keys().all(|code| *code == rcode::SERVFAIL), "{outcome:?}");
        assert!(outcome.answered >= QUERIES / 2, "{outcome:?}");
    }
    assert!(mean >= TROUBLE.delay, "{mean:?}");
    assert!(reordered > 0 && corrupted > 0, "{reordered} {corrupted}");
    let opened = counterfoil.metrics().sum("backend_connections_opened_total", &[]);
    assert!(opened >= (CLIENTS * QUERIES / TOGETHER) as f64, "{opened}");
    let client = counterfoil.client();
    assert_ends_well(&mut counterfoil, &backend, client);
}

//! A link that loses packets and brings some twice, by chance, and a firewall that forgets: faults of the network, named by
//! their row in docs/faults.md.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options, message as logged};
use counterfoil_tests::driver::{Client, Load, Outcome};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::netns::{self, Namespace};
use counterfoil_tests::{netlink, snmp, wait};

/// Of a hundred packets that arrive at either end, and as many again come twice. A query or an answer is late by 15 s, where
/// the clients would call it a hang, if it is lost seven times in a row: once in ten million.
const PERCENT: u32 = 10;

const CLIENTS: usize = 4;

/// Of each client.
const QUERIES: usize = 120;

/// So many have one TLV, and so a connection, in common.
const TOGETHER: usize = 8;

/// Makes what comes in at this end be lost, and what leaves it for `peer` come twice, by chance.
fn spoil(end: &Namespace, peer: &Namespace) {
    end.nft(&format!(
        "table ip chance {{
            chain arriving {{
                type filter hook input priority 0;
                iifname veth0 meta l4proto tcp numgen random mod 100 < {PERCENT} counter drop
            }}
            chain leaving {{
                type filter hook output priority 0;
                oifname veth0 meta l4proto tcp numgen random mod 100 < {PERCENT} counter dup to {} device veth0
            }}
        }}",
        peer.address
    ));
}

/// Makes it a good end again; how many packets were lost, and how many came twice.
fn mend(end: &Namespace) -> [u64; 2] {
    let rules = end.nft("list table ip chance");
    end.nft("delete table ip chance");
    let counts = rules.split("counter packets ").skip(1).filter_map(|rest| rest.split(' ').next()?.parse().ok());
    counts.collect::<Vec<u64>>().try_into().unwrap()
}

/// Segments that TCP has sent again in this namespace (RFC 4022, tcpRetransSegs).
fn sent_again(end: &Namespace) -> u64 {
    end.run(|| snmp::counter("Tcp", "RetransSegs"))
}

fn ask_all(mut client: Client, number: usize) -> Outcome {
    let name = move |n: usize| format!("x.k{number}-{}.n{n}.example.test", n / TOGETHER);
    let load = Load { count: QUERIES, in_flight: 10, rate: Some(30.0), name: &name, ..Load::default() };
    // The client leaves while packets are lost.
    load.run(&mut client)
}

/// On both sides of Counterfoil, whose connections to the backend come and go all the while.
#[test]
fn f52_packets_lost_and_doubled_by_chance() {
    let (near, far) = netns::pair();
    let backend = FakeBackend::answering_in(&far, true);
    // Its watchdog finds what is wrong for a second.
    let config = Config::new(backend.address)
        .listen(SocketAddr::from((near.address, 0)))
        .over_a_bad_link()
        .set("watchdog", "interval", "\"200ms\"")
        .set("watchdog", "grace", "\"1s\"");
    let counterfoil = Counterfoil::start_with(&config, Options { namespace: Some(&near), ..Options::default() });
    let connect = || Client::connect(counterfoil.address, Some(IpAddr::from(far.address)));
    let clients: Vec<Client> = far.run(|| (0..CLIENTS).map(|_| connect()).collect());
    spoil(&near, &far);
    spoil(&far, &near);
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let loads: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(number, client)| scope.spawn(move || ask_all(client, number)))
            .collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    });
    let counts = [mend(&near), mend(&far)];
    let again = [sent_again(&near), sent_again(&far)];
    println!("{outcomes:#?}; lost and doubled {counts:?}, sent again {again:?}");
    for outcome in &outcomes {
        assert!(outcome.foreign.is_empty() && outcome.missing.is_empty() && outcome.ended.is_none(), "{outcome:?}");
        assert!(outcome.failed.keys().all(|code| *code == rcode::SERVFAIL), "{outcome:?}");
        assert!(outcome.answered >= QUERIES / 2, "{outcome:?}");
    }
    assert!(counts.as_flattened().iter().chain(&again).all(|count| *count > 0), "{counts:?}, {again:?}");
    let mut client = far.run(connect);
    wait::until("it is well again", Duration::from_secs(10), || {
        message::response_code(&client.exchange(1, "x.after.n.example.test", qtype::A)) == rcode::NOERROR
    });
    drop(client);
    near.run(|| {
        counterfoil.assert_quiescent();
        assert!(counterfoil.backend_sockets(backend.address).is_empty());
        let metrics = counterfoil.metrics();
        assert!(metrics.sum("backend_connections_opened_total", &[]) >= (CLIENTS * QUERIES / TOGETHER) as f64);
        counterfoil.assert_no_leak_was_seen();
    });
}

/// A firewall in between forgets its connections: from then on their packets are dropped without a word, in both directions
/// and on both sides of Counterfoil. New connections pass.
#[test]
fn f52_a_firewall_that_forgets_its_connections() {
    const QUERY_TIMEOUT: Duration = Duration::from_secs(1);
    const RULE: &str = "meta l4proto tcp ct state new tcp flags & (fin | syn | rst | ack) != syn counter drop";
    let (near, far) = netns::pair();
    let backend = FakeBackend::answering_in(&far, true);
    let config = Config::new(backend.address)
        .listen(SocketAddr::from((near.address, 0)))
        .identity("connection")
        .set("pool", "query_timeout", format!("\"{}s\"", QUERY_TIMEOUT.as_secs()))
        .set("listener", "idle_timeout", "\"3s\"")
        .set("watchdog", "interval", "\"200ms\"")
        .set("watchdog", "grace", "\"1s\"")
        .set("watchdog", "crosscheck_interval", "\"1s\"");
    let counterfoil = Counterfoil::start_with(&config, Options { namespace: Some(&near), ..Options::default() });
    near.nft(&format!(
        "table ip firewall {{
            chain arriving {{
                type filter hook input priority 0
                iifname veth0 {RULE}
            }}
            chain leaving {{
                type filter hook output priority 0
                oifname veth0 {RULE}
            }}
        }}"
    ));
    let mut beyond = far.run(|| Client::connect(counterfoil.address, Some(IpAddr::from(far.address))));
    beyond.assert_served();
    // Nothing is between it and Counterfoil.
    let mut beside = near.run(|| counterfoil.client());
    beside.assert_served();
    near.run(netlink::forget_connections);
    beyond.ask(1, "beyond.example.test", qtype::A);
    let start = Instant::now();
    let answer = beside.exchange(1, "beside.example.test", qtype::A);
    assert_eq!(message::response_code(&answer), rcode::SERVFAIL, "it was sent, and nobody has answered");
    assert!(start.elapsed() < QUERY_TIMEOUT + Duration::from_secs(1), "{:?}", start.elapsed());
    wait::until("over a connection that the firewall knows it is served", Duration::from_secs(10), || {
        message::response_code(&beside.exchange(2, "beside.example.test", qtype::A)) == rcode::NOERROR
    });
    drop(beside);
    let rules = near.nft("list table ip firewall");
    let counts = rules.split("counter packets ").skip(1).filter_map(|rest| rest.split(' ').next()?.parse().ok());
    let dropped: Vec<u64> = counts.collect();
    assert!(dropped.len() == 2 && dropped.iter().all(|count| *count > 0), "{rules}");
    near.run(|| {
        counterfoil.assert_quiescent();
        assert!(counterfoil.backend_sockets(backend.address).is_empty());
    });
    let found = counterfoil.process.lines().into_iter().find(|line| logged(line, "finding").is_some());
    assert!(found.is_none(), "{found:?}");
    drop(beyond);
}

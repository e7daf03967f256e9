//! TCP fast open (RFC 7413), in network namespaces of the test's own where the kernel allows it: by the kernel's counters.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::netns::{self, Namespace};
use counterfoil_tests::process;
use counterfoil_tests::servers::Unbound;

const SOON: Duration = Duration::from_secs(10);

/// Clients and servers may (1 and 2), and every listener does (0x400): a scripted backend sets no option.
const EVERYBODY: &str = "1027";
/// Clients and servers may, if they ask for it.
const WHO_ASKS: &str = "3";

/// One of the kernel's counters `TcpExt` in a namespace.
fn counter(namespace: &Namespace, name: &str) -> u64 {
    let text = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap());
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    pairs.find(|(known, _)| *known == name).map(|(_, value)| value.parse().unwrap()).unwrap()
}

/// Two namespaces: in the first one who asks may send data with a SYN, in the other every server takes it.
fn open_pair() -> (Namespace, Namespace) {
    let (near, far) = netns::pair();
    near.sysctl("ipv4/tcp_fastopen", WHO_ASKS);
    far.sysctl("ipv4/tcp_fastopen", EVERYBODY);
    (near, far)
}

fn start_in(namespace: &Namespace, config: &Config) -> Counterfoil {
    Counterfoil::start_with(config, Options { namespace: Some(namespace), ..Options::default() })
}

/// Every query takes a connection of its own.
fn one_shot(backend: SocketAddr, fast_open: bool) -> Config {
    Config::new(backend).identity("connection").tlv(0xe0, "{uuid}").backend_key("tcp_fast_open", fast_open)
}

/// The first connection brings the cookie; from then on header and query go with the SYN. The watchdog, with reaping on,
/// finds nothing wrong with that.
#[test]
fn rfc7413_3_the_first_query_goes_with_the_syn() {
    const QUERIES: usize = 50;
    let (near, far) = open_pair();
    let backend = FakeBackend::answering_in(&far, true);
    let counterfoil = start_in(&near, &one_shot(backend.address, true));
    near.run(|| {
        let mut client = counterfoil.client();
        Load { count: QUERIES, ..Load::default() }.run(&mut client).assert_all_answered(QUERIES);
        drop(client);
        counterfoil.assert_quiescent();
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("reaped_total", &[]) + metrics.sum("discrepancy_sockets", &[]), 0.0);
        assert_eq!(metrics.sum("backend_connect_failures_total", &[]), 0.0);
    });
    let (sent, taken) = (counter(&near, "TCPFastOpenActive"), counter(&far, "TCPFastOpenPassive"));
    println!("of {QUERIES} connections {sent} were opened with data in the SYN, {taken} accepted so");
    assert!(sent >= QUERIES as u64 / 2 && sent == taken, "{sent} {taken}");
    assert_eq!(backend.accepted(), QUERIES);
}

/// The counterpart, without which the test above would prove nothing.
#[test]
fn without_the_key_nothing_goes_with_a_syn() {
    let (near, far) = open_pair();
    let backend = FakeBackend::answering_in(&far, true);
    let counterfoil = start_in(&near, &one_shot(backend.address, false));
    near.run(|| {
        let mut client = counterfoil.client();
        Load { count: 10, ..Load::default() }.run(&mut client).assert_all_answered(10);
        drop(client);
        counterfoil.assert_quiescent();
    });
    assert_eq!(counter(&near, "TCPFastOpenActive"), 0);
}

/// Data in a SYN may arrive twice, so nothing goes with it that must not be asked twice.
#[test]
fn rfc7413_2_1_only_questions_go_with_the_syn() {
    let (near, far) = open_pair();
    let backend = FakeBackend::answering_in(&far, true);
    let counterfoil = start_in(&near, &one_shot(backend.address, true));
    near.run(|| {
        let mut client = counterfoil.client();
        Load { count: 5, ..Load::default() }.run(&mut client).assert_all_answered(5);
        let before = counter(&near, "TCPFastOpenActive");
        assert!(before > 0, "the kernel has a cookie");
        for opcode in [4_u8, 5, 9] {
            let mut query = message::query(7, "zone.example.test", qtype::A);
            query[2] = opcode << 3;
            client.send_raw(&message::framed(&query)).unwrap();
            assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::NOERROR);
        }
        assert_eq!(counter(&near, "TCPFastOpenActive"), before);
        client.exchange(8, "n.example.test", qtype::A);
        assert_eq!(counter(&near, "TCPFastOpenActive"), before + 1);
        drop(client);
        counterfoil.assert_quiescent();
    });
}

/// A SYN with data that nobody answers is given up after `connect_timeout`, as any other, and both views have it until then.
#[test]
fn a_syn_with_data_and_without_an_answer_is_given_up_in_time() {
    let (near, far) = open_pair();
    let backend = FakeBackend::answering_in(&far, true);
    let config = one_shot(backend.address, true)
        .backend_key("connect_timeout", "\"2s\"")
        .set("pool", "retries", 0)
        .set("pool", "query_timeout", "\"20s\"");
    let counterfoil = start_in(&near, &config);
    near.run(|| {
        let mut client = counterfoil.client();
        Load { count: 5, ..Load::default() }.run(&mut client).assert_all_answered(5);
        let mac = process::run("ip", &["-n", far.name(), "-br", "link", "show", "veth0"], SOON).1;
        let mac = mac.split_whitespace().find(|word| word.matches(':').count() == 5).unwrap().to_owned();
        near.ip(&format!("neighbour replace {} lladdr {mac} dev veth0 nud permanent", far.address));
        let before = counter(&near, "TCPFastOpenActive");
        far.ip("link set veth0 down");
        let begin = Instant::now();
        client.ask(9, "lost.example.test", qtype::A);
        counterfoil.wait_metrics("both views have it", Duration::from_secs(2), |metrics| {
            let kernel = metrics.sum("kernel_backend_sockets", &[("tcp_state", "syn_sent")]);
            (kernel, metrics.sum("backend_connections", &[])) == (1.0, 1.0)
        });
        assert_eq!(message::response_code(&client.receive(SOON).message()), rcode::SERVFAIL);
        let gave_up = begin.elapsed();
        assert!(gave_up >= Duration::from_millis(1900) && gave_up < Duration::from_secs(10), "{gave_up:?}");
        println!("given up after {gave_up:?}; {} with data before", before);
        drop(client);
        counterfoil.assert_quiescent();
        let metrics = counterfoil.metrics();
        assert_eq!(metrics.sum("backend_connections_closed_total", &[("reason", "connect_timeout")]), 1.0);
        assert_eq!(metrics.sum("reaped_total", &[]), 0.0);
    });
    far.ip("link set veth0 up");
}

/// kdig +fastopen in one namespace, the listener in the other, Unbound behind it.
#[test]
fn rfc7413_4_a_listener_takes_data_from_a_syn() {
    let (near, far) = netns::pair();
    near.sysctl("ipv4/tcp_fastopen", WHO_ASKS);
    far.sysctl("ipv4/tcp_fastopen", WHO_ASKS);
    let unbound = Unbound::start_in(&near, near.address);
    let config = Config::new(unbound.address)
        .identity("connection")
        .set("listener", "tcp_fast_open", 16)
        .listen(SocketAddr::from((near.address, 5300)));
    let counterfoil = start_in(&near, &config);
    let server = format!("@{}", near.address);
    let name = format!("kdig.{}", counterfoil_tests::servers::ZONE);
    for _ in 0..5 {
        let command = far.wrap(&["kdig", &server, "-p", "5300", "+tcp", "+fastopen", "+retry=0", &name, "A"]);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let (ok, output) = process::run(command[0], &command[1..], Duration::from_secs(20));
        assert!(ok && output.contains("NOERROR"), "{output}");
    }
    let (sent, taken) = (counter(&far, "TCPFastOpenActive"), counter(&near, "TCPFastOpenPassive"));
    println!("of 5 connections {sent} were opened with data in the SYN, {taken} accepted so");
    assert!(taken >= 3 && sent == taken, "{sent} {taken}");
    near.run(|| counterfoil.assert_quiescent());
}

/// Neither side would notice that the kernel ignores it, so the log says so.
#[test]
fn a_kernel_that_does_not_allow_it_is_named_in_the_log() {
    let (near, far) = netns::pair();
    near.sysctl("ipv4/tcp_fastopen", "0");
    let backend = FakeBackend::answering_in(&far, true);
    let config = one_shot(backend.address, true).set("listener", "tcp_fast_open", 16);
    let mut counterfoil = start_in(&near, &config);
    for key in ["listener.tcp_fast_open", "pool.backend.tcp_fast_open"] {
        counterfoil.process.wait_for_line(SOON, key, |line| {
            (line.contains(key) && line.contains("net.ipv4.tcp_fastopen is 0")).then_some(())
        });
    }
    near.run(|| {
        let mut client = counterfoil.client();
        Load { count: 3, ..Load::default() }.run(&mut client).assert_all_answered(3);
        drop(client);
        counterfoil.assert_quiescent();
    });
}

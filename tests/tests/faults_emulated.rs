//! Faults that need a machine of their own, or a kernel with modules that not every one has: for the emulated machines of
//! `cargo xtask kernels`. Each is named by its row in docs/faults.md.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::Counterfoil;
use counterfoil_tests::driver::{Client, Load, Outcome};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::{self, qtype, rcode};
use counterfoil_tests::netem::{Netem, Trouble};
use counterfoil_tests::{snmp, wait};

const SOON: Duration = Duration::from_secs(20);

/// The watchdog finds what is wrong for two seconds, and reaps it.
fn config(backend: SocketAddr) -> Config {
    Config::new(backend)
        .over_a_bad_link()
        .set("watchdog", "interval", "\"500ms\"")
        .set("watchdog", "grace", "\"2s\"")
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
    counterfoil.assert_no_leak_was_seen();
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

/// The machine's limit of memory in the buffers of TCP (`net.ipv4.tcp_mem`, tcp(7)), set below what is used until this is
/// dropped.
struct Limit {
    before: String,
}

impl Limit {
    const FILE: &str = "/proc/sys/net/ipv4/tcp_mem";

    fn none_left() -> Self {
        let before = std::fs::read_to_string(Self::FILE).unwrap();
        std::fs::write(Self::FILE, "1 1 1").unwrap();
        Self { before }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(Self::FILE, &self.before) {
            eprintln!("{} stays as it is: {error}", Self::FILE);
        }
    }
}

/// Connections with as much in their buffers as goes in.
fn hoard() -> Vec<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let fill = |_| {
        let mut full = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        full.set_nonblocking(true).unwrap();
        while full.write(&[0; 1 << 16]).is_ok() {}
        (full, listener.accept().unwrap().0)
    };
    (0..4).map(fill).collect()
}

/// All of the machine's memory for TCP is taken. The kernel grants each socket a little all the same, so short messages pass;
/// long ones stall, and go on when there is memory again. Nobody spins meanwhile, and every query has its end.
#[test]
#[ignore = "for the emulated machines of `cargo xtask kernels`"]
fn f49_the_memory_of_tcp_is_used_up() {
    const SPELL: Duration = Duration::from_secs(4);
    const IDLE: Duration = Duration::from_secs(2);
    const LONG: usize = 20;
    let backend = FakeBackend::start(|connection| {
        if connection.header().is_none() {
            return;
        }
        while let Some(query) = connection.query() {
            let mut answer = message::answer_to(&query, [192, 0, 2, 53]);
            if message::same_question(&message::query(0, "x.long.n.example.test", qtype::TXT), &query) {
                answer.resize(60_000, 0);
            }
            connection.send(&answer);
        }
    });
    let config = config(backend.address).set("listener", "write_timeout", "\"20s\"").set(
        "listener",
        "max_connections_per_client",
        1000,
    );
    let mut counterfoil = Counterfoil::start(&config);
    let (mut settled, mut greedy) = (counterfoil.client(), counterfoil.client());
    settled.assert_served();
    greedy.assert_served();
    let counts = || ["TCPMemoryPressures", "TCPRcvQDrop"].map(|name| snmp::counter("TcpExt", name));
    let before = counts();
    let hoard = hoard();
    let used = snmp::tcp_memory();
    let limit = Limit::none_left();
    // More than the kernel grants; nobody reads the answers yet.
    (0..LONG as u16).for_each(|id| greedy.ask(id, "x.long.n.example.test", qtype::TXT));
    let (start, mut new) = (Instant::now(), Vec::new());
    while start.elapsed() < SPELL {
        let id = new.len() as u16;
        settled.ask(id, &format!("x.k{id}.n.example.test"), qtype::A);
        let mut client = counterfoil.client();
        client.ask(id, "x.new.n.example.test", qtype::A);
        new.push(client);
        std::thread::sleep(Duration::from_millis(20));
    }
    // Now there is nothing to be done but to wait.
    let cpu = counterfoil.process.cpu_time();
    std::thread::sleep(IDLE);
    let idle = counterfoil.process.cpu_time() - cpu;
    let after = counts();
    drop(limit);
    let mut ends: BTreeMap<(&str, u8), usize> = BTreeMap::new();
    let mut count = |who, client: &mut Client| {
        *ends.entry((who, message::response_code(&client.receive(SOON).message()))).or_default() += 1;
    };
    new.iter_mut().for_each(|client| count("new", client));
    new.iter().for_each(|_| count("settled", &mut settled));
    (0..LONG).for_each(|_| count("greedy", &mut greedy));
    let [pressures, dropped] = [after[0] - before[0], after[1] - before[1]];
    println!(
        "{used} pages used, under pressure {pressures} times, {dropped} segments dropped; {ends:?}; idle, {idle:?}"
    );
    drop(hoard);
    assert!(used > 1 && pressures > 0 && dropped > 0, "there was memory");
    assert!(ends.keys().all(|(_, code)| [rcode::NOERROR, rcode::SERVFAIL].contains(code)), "{ends:?}");
    assert!(idle < IDLE * 3 / 4, "{idle:?} of CPU time in {IDLE:?} of waiting");
    drop((new, greedy, settled));
    let client = counterfoil.client();
    assert_ends_well(&mut counterfoil, &backend, client);
}

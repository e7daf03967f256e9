//! Socket activation: the service manager holds the listening socket while the program is started again.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{self, Counterfoil, Options};
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::message::qtype;
use counterfoil_tests::process::Process;
use counterfoil_tests::tempdir::TempDir;
use counterfoil_tests::wait;

const SOON: Duration = Duration::from_secs(10);

fn start(config: &Config, listener: &TcpListener) -> Counterfoil {
    let config = config.clone().listen(listener.local_addr().unwrap()).set("connections", "idle_timeout", "\"1s\"");
    Counterfoil::start_with(&config, Options { listener: Some(listener), ..Options::default() })
}

/// What a client saw that connects for each query, as stub resolvers do.
#[derive(Debug, Default)]
struct Seen {
    connected: usize,
    answered: usize,
    /// The connection ended before the answer came: the client asks again.
    ended: usize,
    refused: Vec<String>,
    slowest: Duration,
}

fn reconnect_until(over: &AtomicBool, server: SocketAddr, number: usize) -> Seen {
    let mut seen = Seen::default();
    let mut id = 0;
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        let mut client = match Client::try_connect(server, None) {
            Ok(client) => client,
            Err(error) => {
                seen.refused.push(error.to_string());
                continue;
            }
        };
        seen.connected += 1;
        id += 1;
        let query = counterfoil_tests::message::query(id, &format!("c{number}-{id}.example.test"), qtype::A);
        let asked = client.send_raw(&counterfoil_tests::message::framed(&query));
        match asked.map(|()| client.receive(Duration::from_secs(30))) {
            Ok(Received::Message(answer)) => {
                assert!(counterfoil_tests::message::same_question(&query, &answer));
                seen.answered += 1;
                seen.slowest = seen.slowest.max(began.elapsed());
            }
            Ok(Received::Closed | Received::Reset) | Err(_) => seen.ended += 1,
            Ok(Received::Nothing | Received::Cut) => panic!("neither an answer nor an end: {seen:?}"),
        }
    }
    seen
}

/// Clients that reconnect all the time, while the program is started again and again with the same socket: not one is
/// refused, and what a connection was not answered on, it was told by its end.
#[test]
fn restarting_refuses_nobody() {
    const CLIENTS: usize = 8;
    let backend = FakeBackend::answering(true);
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let config = Config::new(backend.address).identity("address").set("server", "workers", 2);
    let mut running = start(&config, &socket);
    let over = AtomicBool::new(false);
    let seen: Vec<Seen> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                scope.spawn({
                    let over = &over;
                    move || reconnect_until(over, address, number)
                })
            })
            .collect();
        for _ in 0..3 {
            let before = backend.queries();
            wait::until("load runs", SOON, || backend.queries() > before + 200);
            let began = Instant::now();
            assert_eq!(running.terminate(SOON).code(), Some(0), "{}", running.process.tail());
            println!("drained in {:?}", began.elapsed());
            running = start(&config, &socket);
            println!("served again after {:?}", began.elapsed());
        }
        let before = backend.queries();
        wait::until("load runs", SOON, || backend.queries() > before + 200);
        over.store(true, Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    println!("{seen:#?}");
    for client in &seen {
        assert!(client.refused.is_empty(), "{client:?}");
        // One connection per client and restart can meet the end.
        assert!(client.ended <= 3 && client.answered + client.ended == client.connected, "{client:?}");
    }
    running.assert_quiescent();
}

/// Idle clients are let go at once, as whoever comes back is not refused; nothing that is in flight is lost.
#[test]
fn draining_is_short_and_leaves_the_queue_to_the_next_process() {
    let backend = FakeBackend::answering(false);
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = Config::new(backend.address).set("server", "drain_timeout", "\"60s\"");
    let mut first = start(&config, &socket);
    let mut idle: Vec<Client> = (0..20).map(|_| first.client()).collect();
    for client in &mut idle {
        Load::default().run(client).assert_all_answered(1);
    }
    let began = Instant::now();
    assert_eq!(first.terminate(SOON).code(), Some(0), "{}", first.process.tail());
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    for client in &mut idle {
        assert_eq!(client.receive(SOON), Received::Closed);
    }
    // Nobody runs now: who connects waits, and what it asks is answered when somebody does.
    let mut early = first.client();
    early.ask(7, "early.example.test", qtype::A);
    let second = start(&config, &socket);
    early.receive(SOON).message();
    drop(early);
    second.assert_quiescent();
}

#[test]
fn a_socket_of_no_listener_is_an_error_at_the_start() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let dir = TempDir::new("activation");
    let text =
        Config::new(SocketAddr::from(([127, 0, 0, 1], 53))).listen(SocketAddr::from(([127, 0, 0, 1], 1))).text("");
    let file = dir.write("counterfoil.toml", &text).display().to_string();
    let program = counterfoil::program().display().to_string();
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 </dev/null";
    let arguments = ["-c", script, "sh", &program, "run", "--config", &file];
    let mut process = Process::start_with("counterfoil", "sh", &arguments, std::os::fd::OwnedFd::from(socket).into());
    assert_eq!(process.wait_exit(SOON).code(), Some(1));
    process.stop();
    let output = process.lines().join("\n");
    assert!(output.contains(&address.to_string()) && output.contains("no listener has this address"), "{output}");
}

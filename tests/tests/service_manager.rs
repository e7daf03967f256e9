//! What a service manager is told: sd_notify(3) and sd_watchdog_enabled(3), with a manager of the tests' own.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options};
use counterfoil_tests::driver::{Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::holding::Holding;
use counterfoil_tests::message::qtype;
use counterfoil_tests::tempdir::TempDir;
use counterfoil_tests::wait;
use rustix::process::Signal;
use serde_json::json;

const SOON: Duration = Duration::from_secs(10);

/// What came by now, each message's lines.
fn told(manager: &UnixDatagram) -> Vec<Vec<String>> {
    manager.set_nonblocking(true).unwrap();
    let mut bytes = [0; 4096];
    std::iter::from_fn(|| manager.recv(&mut bytes).ok().map(|length| bytes[..length].to_vec()))
        .map(|message| String::from_utf8(message).unwrap().lines().map(str::to_owned).collect())
        .collect()
}

fn signs_of_life(messages: &[Vec<String>]) -> usize {
    messages.iter().filter(|lines| lines.iter().any(|line| line == "WATCHDOG=1")).count()
}

#[test]
fn it_is_told_of_start_and_end_and_hears_no_more_of_a_process_that_hangs() {
    let dir = TempDir::new("manager");
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let path = path.display().to_string();
    let backend = FakeBackend::answering(false);
    let environment = [("NOTIFY_SOCKET", path.as_str()), ("WATCHDOG_USEC", "2000000")];
    let options = Options { environment: &environment, ..Options::default() };
    let config = Config::new(backend.address).set("server", "workers", 2);
    let mut counterfoil = Counterfoil::start_with(&config, options);

    let mut messages = Vec::new();
    wait::until("signs of life", SOON, || {
        messages.extend(told(&manager));
        signs_of_life(&messages) >= 3
    });
    assert_eq!(messages[0][0], "READY=1", "{messages:?}");
    assert!(messages[0][1].starts_with("STATUS=serving on 1 listeners with 2 workers"), "{messages:?}");

    // Half of the time is the patience with a worker; then nothing more may come, for as long as it hangs.
    counterfoil.admin(&json!({"cmd": "hang", "worker": 1, "millis": 8000}), SOON);
    let hangs = Instant::now();
    std::thread::sleep(Duration::from_millis(2000));
    told(&manager);
    std::thread::sleep(Duration::from_millis(2000));
    let meanwhile = told(&manager);
    assert!(hangs.elapsed() < Duration::from_secs(8), "this machine is too busy for the test: {:?}", hangs.elapsed());
    assert_eq!(signs_of_life(&meanwhile), 0, "{meanwhile:?}");
    wait::until("signs of life again", SOON, || signs_of_life(&told(&manager)) > 0);

    assert_eq!(counterfoil.terminate(SOON).code(), Some(0), "{}", counterfoil.process.tail());
    let last = told(&manager);
    assert!(last.iter().any(|lines| lines[0] == "STOPPING=1"), "{last:?}");
}

#[test]
fn a_manager_in_the_abstract_namespace_is_told_too() {
    let name = format!("counterfoil-manager-{}", std::process::id());
    let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let backend = FakeBackend::answering(false);
    let name = format!("@{name}");
    let environment = [("NOTIFY_SOCKET", name.as_str())];
    let options = Options { environment: &environment, ..Options::default() };
    let _counterfoil = Counterfoil::start_with(&Config::new(backend.address), options);
    let mut messages = Vec::new();
    wait::until("it is ready", SOON, || {
        messages.extend(told(&manager));
        messages.iter().any(|lines| lines[0] == "READY=1")
    });
    assert_eq!(signs_of_life(&messages), 0, "nobody wanted any");
}

/// As an operator does it: what is in flight is answered, and the command returns when all is done.
#[test]
fn ctl_drain_answers_what_is_in_flight_and_ends_the_process() {
    const IN_FLIGHT: u16 = 20;
    let holding = Holding::start();
    let config = Config::new(holding.backend.address).set("server", "drain_timeout", "\"5s\"");
    let mut counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    for id in 0..IN_FLIGHT {
        client.ask(id, &format!("held{id}.example.test"), qtype::A);
    }
    wait::until("all queries are at the backend", SOON, || holding.backend.queries() == usize::from(IN_FLIGHT));
    let (ended, output) = std::thread::scope(|scope| {
        let operator = scope.spawn(|| counterfoil.ctl(&["drain"], Duration::from_secs(20)));
        wait::until("it is not ready any more", SOON, || {
            let (head, _) = counterfoil_tests::metrics::get(counterfoil.admin.unwrap(), "/readyz").unwrap();
            head.contains(" 503 ")
        });
        holding.release();
        for _ in 0..IN_FLIGHT {
            client.receive(SOON).message();
        }
        assert_eq!(client.receive(SOON), Received::Closed);
        operator.join().unwrap()
    });
    assert!(ended, "{output}");
    assert!(output.contains("draining  client_connections: 1  queries_in_flight: 20"), "{output}");
    assert!(output.trim_end().ends_with("done  message: drained  ok: true"), "{output}");
    let status = counterfoil.process.wait_exit(SOON);
    assert_eq!(status.code(), Some(0), "{}", counterfoil.process.tail());
    wait::until("its backend connection is closed", SOON, || holding.backend.open() == 0);
}

/// `systemctl stop` after `ctl drain` must not cut it short; a second signal does.
#[test]
fn the_second_signal_ends_what_drains_at_once() {
    let backend = FakeBackend::answering(false);
    let config = Config::new(backend.address).set("server", "drain_timeout", "\"60s\"");
    let mut counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    Load::default().run(&mut client).assert_all_answered(1);
    let mut draining = counterfoil.begin(&json!({"cmd": "drain"}));
    assert_eq!(draining.wait(), json!({"event": "draining", "client_connections": 1, "queries_in_flight": 0}));
    counterfoil.process.signal(Signal::TERM);
    assert_eq!(draining.wait()["event"], "draining", "it goes on");
    assert_eq!(draining.wait()["event"], "draining", "it goes on");
    assert!(counterfoil.process.exited().is_none());
    counterfoil.process.signal(Signal::TERM);
    assert_eq!(counterfoil.process.wait_exit(SOON).code(), Some(1), "{}", counterfoil.process.tail());
}

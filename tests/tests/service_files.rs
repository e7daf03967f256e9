//! The units in `deploy/systemd/`, as systemd's own tools see them.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{field, message, program};
use counterfoil_tests::driver::{Client, Load, Received};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::process::{self, Process};
use counterfoil_tests::tempdir::TempDir;
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(20);

/// The units that ours build on: they need only be there.
const TARGETS: [&str; 7] = ["sysinit", "basic", "shutdown", "sockets", "network-online", "multi-user", "umount"];

/// Our units, with the program that was built, and nothing of this machine's.
fn units() -> TempDir {
    let units = TempDir::new("units");
    for target in TARGETS {
        units.write(&format!("{target}.target"), "[Unit]\nDefaultDependencies=no\n");
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd");
    let program = program().display().to_string();
    for unit in ["counterfoil.service", "counterfoil.socket"] {
        let text = std::fs::read_to_string(source.join(unit)).unwrap();
        units.write(unit, &text.replace("/usr/bin/counterfoil", &program));
    }
    units
}

/// Runs `systemd-analyze`: whether it was content, and all that it said.
fn analyze(units: &TempDir, arguments: &[&str]) -> (bool, Vec<String>) {
    let path = format!("SYSTEMD_UNIT_PATH={}", units.path().display());
    let mut command = vec![path.as_str(), "SYSTEMD_LOG_LEVEL=info", "systemd-analyze"];
    command.extend(arguments);
    let mut process = Process::start("systemd-analyze", "env", &command);
    let good = process.wait_exit(SOON).success();
    (good, process.lines())
}

#[test]
fn the_units_have_no_mistake() {
    let units = units();
    let unit = |name: &str| units.path().join(name).display().to_string();
    let (service, socket) = (unit("counterfoil.service"), unit("counterfoil.socket"));
    let verify = |service: &str| analyze(&units, &["verify", "--man=no", service, &socket]);
    assert_eq!(verify(&service), (true, Vec::new()));
    // What it finds, it finds in the text.
    let text = std::fs::read_to_string(&service).unwrap();
    units.write("counterfoil.service", &text.replace("WatchdogSec=", "WatchdogSeconds="));
    let (_, said) = verify(&service);
    assert!(said.iter().any(|line| line.contains("WatchdogSeconds")), "{said:?}");
}

/// systemd looks at the exit status of the main process alone (systemd.service(5)): a check before it would have the service
/// started again and again with a configuration that is refused.
#[test]
fn a_bad_configuration_is_refused_by_the_main_process_and_not_tried_again() {
    let units = units();
    let text = std::fs::read_to_string(units.path().join("counterfoil.service")).unwrap();
    let values = |key: &str| text.lines().filter_map(|line| line.strip_prefix(key)).collect::<Vec<_>>();
    let [command] = values("ExecStart=")[..] else { unreachable!("one command: {text}") };
    assert!(values("ExecStartPre=").is_empty() && values("ExecCondition=").is_empty(), "{text}");
    let bad = units.write("bad.toml", "[server]\nworker = 1\n").display().to_string();
    let command = command.replace("/etc/counterfoil/counterfoil.toml", &bad);
    let (program, arguments) = command.split_once(' ').unwrap();
    let mut process = Process::start("counterfoil", program, &arguments.split(' ').collect::<Vec<_>>());
    let status = process.wait_exit(SOON).code().unwrap().to_string();
    assert!(
        process.lines().iter().any(|line| line.contains("bad.toml:2:1: key `server.worker`")),
        "{}",
        process.tail()
    );
    assert_eq!(values("RestartPreventExitStatus="), [status]);
}

/// README.md says 1.9 of 10, less being better.
#[test]
fn the_service_is_well_locked_in() {
    let units = units();
    let service = units.path().join("counterfoil.service").display().to_string();
    let (good, said) = analyze(&units, &["security", "--offline=true", "--threshold=19", &service]);
    let overall = said.iter().find(|line| line.contains("Overall exposure level")).unwrap();
    assert!(good && overall.contains("1.9 OK"), "{overall}");
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    assert!(readme.contains("`systemd-analyze security` gives it 1.9"), "README.md says something else");
}

/// systemd's own activator holds the socket and starts the program when somebody connects: who came first is answered. The
/// socket is known by its address, or, where the configuration leaves the port open, by its name.
#[test]
fn systemd_opens_the_socket_and_starts_the_program() {
    for by_name in [false, true] {
        let backend = FakeBackend::answering(false);
        let address = SocketAddr::from(([127, 0, 0, 1], process::free_port()));
        let dir = TempDir::new("activated");
        let admin = dir.path().join("admin.sock").display().to_string();
        let config = Config::new(backend.address).set("server", "drain_timeout", "\"10s\"");
        let config = if by_name { config } else { config.listen(address) };
        let file = dir.write("counterfoil.toml", &config.text(&admin)).display().to_string();
        let (listen, program) = (address.to_string(), program().display().to_string());
        let name = if by_name { "dns" } else { "of-no-listener" };
        let arguments =
            ["--listen", &listen, "--fdname", name, &program, "run", "--config", &file, "--log-format", "json"];
        let mut process = Process::start("counterfoil", "systemd-socket-activate", &arguments);
        process.wait_for_line(SOON, "that it listens", |line| line.contains("Listening on").then_some(()));
        let mut client = Client::connect(address, None);
        Load::default().run(&mut client).assert_all_answered(1);
        let listening = process.find_line(Duration::ZERO, |line| field(&message(line, "listening")?, "address"));
        assert_eq!(listening.unwrap(), listen, "the socket that it was passed");
        // The manager goes on listening, so who is idle is let go at once.
        process.signal(Signal::TERM);
        assert_eq!(client.receive(Duration::from_secs(5)), Received::Closed);
        assert_eq!(process.wait_exit(SOON).code(), Some(0), "{}", process.tail());
    }
}

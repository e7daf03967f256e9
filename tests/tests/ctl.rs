//! `counterfoil ctl` as an operator runs it: what it shows is what is there, and what it reaps is gone.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, program};
use counterfoil_tests::driver::{Client, Load};
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::wait;

/// For one command on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// The documentation, which has to name every field.
const DOCS: &str = include_str!("../../docs/ctl.md");

/// A command's output as JSON.
fn json(counterfoil: &Counterfoil, command: &[&str]) -> Value {
    let (ok, output) = counterfoil.ctl(&[command, &["-o", "json"]].concat(), SOON);
    assert!(ok, "{command:?}: {output}");
    let shown = serde_json::from_str(&output).unwrap_or_else(|e| panic!("{e}: {output}"));
    documented(&shown, command);
    shown
}

/// Every field of an answer is in the documentation. The keys of counts are kinds, states, classes and names.
fn documented(value: &Value, command: &[&str]) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| documented(value, command)),
        Value::Object(fields) => {
            for (name, value) in fields {
                assert!(DOCS.contains(&format!("`{name}`")), "{command:?}: docs/ctl.md does not have `{name}`");
                if !matches!(name.as_str(), "ledger" | "kernel" | "unheld" | "findings" | "states" | "backends")
                    || value.is_array()
                {
                    documented(value, command);
                }
            }
        }
        _ => {}
    }
}

fn rows(shown: &Value, key: &str) -> Vec<Value> {
    shown[key].as_array().unwrap_or_else(|| panic!("no {key} in {shown}")).clone()
}

/// Two clients with one connection each.
fn two_clients(counterfoil: &Counterfoil) -> [Client; 2] {
    let mut clients = [counterfoil.client(), counterfoil.client()];
    for client in &mut clients {
        Load { count: 3, ..Load::default() }.run(client).assert_all_answered(3);
    }
    clients
}

#[test]
fn it_shows_what_is_there() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("connection").tlv(0xe0, "{listener}").tlv(0xea, "{qtype}");
    let counterfoil = Counterfoil::start(&config);
    let clients = two_clients(&counterfoil);

    let connections = rows(&json(&counterfoil, &["show", "connections"]), "connections");
    assert_eq!(connections.len(), 2, "{connections:?}");
    let kernel = counterfoil.backend_sockets(backend.address);
    for connection in &connections {
        assert_eq!(connection["backend"], "backend-0");
        assert_eq!(connection["remote"], backend.address.to_string());
        assert!(
            kernel.iter().any(|socket| connection["local"] == format!("127.0.0.1:{}", socket.local_port)),
            "{connection} {kernel:?}"
        );
        assert_eq!((&connection["tcp_state"], &connection["held"]), (&"established".into(), &true.into()));
        assert_eq!((&connection["kind"], &connection["ledger_state"]), (&"owned".into(), &"idle".into()));
        assert_eq!((&connection["carried"], &connection["in_flight"]), (&3.into(), &0.into()));
        let seconds = |name: &str| connection[name].as_f64().unwrap();
        // The kernel's time is exact to one tick.
        assert!(seconds("age_seconds") + 0.02 > seconds("kernel_last_byte_seconds"), "{connection}");
        assert!((seconds("kernel_last_byte_seconds") - seconds("ledger_last_byte_seconds")).abs() < 1.0);
        assert!(connection["header"].is_string() && connection["owner"].is_u64() && connection["finding"].is_null());
    }

    let backends = json(&counterfoil, &["show", "backends"]);
    let first = &rows(&backends, "backends")[0];
    assert_eq!((&first["backend"], &first["used"], &first["limit"]), (&"backend-0".into(), &2.into(), &512.into()));
    assert_eq!((&first["health"], &first["state"]), (&"up".into(), &"up".into()));
    let drill = &rows(&backends, "backends")[1];
    assert_eq!((&drill["backend"], &drill["health"], &drill["state"]), (&"drill".into(), &Value::Null, &Value::Null));
    assert_eq!(first["ledger"]["owned"]["idle"], 2);
    assert_eq!((&first["kernel"]["established"], &first["sockets"]), (&2.into(), &2.into()));
    assert_eq!((&backends["total"]["used"], &backends["total"]["sockets"]), (&2.into(), &2.into()));

    let shown = json(&counterfoil, &["show", "clients"]);
    assert_eq!((&shown["listeners"][0]["connections"], &shown["listeners"][0]["queries"]), (&2.into(), &6.into()));
    let owners = rows(&shown, "clients");
    assert_eq!(owners.len(), 2);
    assert!(owners.iter().all(|owner| owner["connections"] == 1 && owner["carried"] == 3), "{owners:?}");
    assert!(owners.iter().all(|owner| owner["tls"] == Value::Null), "in the clear: {owners:?}");

    let tlvs = &rows(&json(&counterfoil, &["show", "tlvs"]), "tlvs")[0];
    let types: Vec<_> = rows(tlvs, "tlvs").iter().map(|tlv| tlv["type"].clone()).collect();
    assert_eq!(types, ["0xE0", "0xEA"]);
    assert_eq!((&tlvs["distinct_headers"], &tlvs["identity"]), (&2.into(), &"connection".into()));
    assert_eq!((&tlvs["queries"], &tlvs["reused"]), (&6.into(), &4.into()));

    let view = json(&counterfoil, &["show", "view"]);
    assert_eq!((&view["source"], &view["view"]["source"]), (&"ebpf".into(), &"ebpf".into()));
    assert_eq!((&view["view"]["sockets"], &view["view"]["uncertain"]), (&2.into(), &Value::Null));
    assert!(!view["view"]["reason"].as_str().unwrap().is_empty());

    let leaks = json(&counterfoil, &["show", "leaks"]);
    assert!(rows(&leaks, "findings").is_empty() && rows(&leaks, "reaps").is_empty(), "{leaks}");

    // The same for people.
    for (what, wanted) in [
        ("backends", "owned idle 2"),
        ("connections", "established"),
        ("clients", "Client connections that own backend connections:"),
        ("tlvs", "0xEA"),
        ("leaks", "none"),
        ("view", "source"),
    ] {
        let (ok, output) = counterfoil.ctl(&["show", what], SOON);
        println!("{output}");
        assert!(ok && output.contains(wanted), "{what}: {output}");
    }
    drop(clients);
    counterfoil.assert_quiescent();
}

/// A healthy connection can't be reaped; what the reaper reaped is remembered with all that its log line says.
#[test]
fn leaks_are_remembered_and_healthy_connections_are_not_reaped() {
    let backend = FakeBackend::answering(true);
    let config = Config::new(backend.address).identity("connection").set("watchdog", "reap", "\"on\"");
    let counterfoil = Counterfoil::start(&config);
    let mut clients = two_clients(&counterfoil);
    let healthy = rows(&json(&counterfoil, &["show", "connections"]), "connections")[0]["cookie"].to_string();
    let (ok, output) = counterfoil.ctl(&["reap", &healthy], SOON);
    assert!(!ok && output.contains("nothing is wrong with it"), "{output}");

    let (ok, output) = counterfoil.ctl(&["drill", "zombie"], Duration::from_secs(60));
    assert!(ok, "{output}");
    println!("{}", counterfoil.ctl(&["show", "leaks"], SOON).1);
    let leaks = json(&counterfoil, &["show", "leaks"]);
    let reap = rows(&leaks, "reaps").pop().expect("the drill's");
    assert_eq!((&reap["class"], &reap["backend"]), (&"zombie".into(), &"drill".into()));
    assert_eq!((&reap["outcome"], &reap["rung"]), (&"released".into(), &"ask_owner".into()));
    assert_eq!((&reap["ordered"], &reap["serial"]), (&false.into(), &1.into()));
    assert!(reap["evidence"].as_str().unwrap().contains("kernel: close_wait"), "{reap}");
    let states: Vec<_> = rows(&reap, "changes").iter().map(|change| change["tcp_state"].clone()).collect();
    assert!(states.contains(&"close_wait".into()) && states.last() == Some(&Value::Null), "{reap}");

    // Both clients still have their first connection.
    for client in &mut clients {
        Load { count: 1, ..Load::default() }.run(client).assert_all_answered(1);
    }
    assert_eq!(backend.accepted(), 2);
    drop(clients);
    counterfoil.assert_quiescent();
}

/// An operator's order counts although the reaper only rehearses, and although its rate is used up.
#[test]
fn an_operator_reaps_a_finding_in_dry_run() {
    let backend = FakeBackend::answering(true);
    let config =
        Config::new(backend.address).set("watchdog", "reap", "\"dry-run\"").set("watchdog", "max_reaps_per_minute", 1);
    let counterfoil = Counterfoil::start(&config);
    // The first one takes the only place of this minute, so the second stays a finding until somebody acts.
    let (ok, output) = counterfoil.drill("zombie", Duration::from_secs(60));
    assert!(ok && output.contains("dry run"), "{output}");
    std::thread::scope(|scope| {
        let drill = scope.spawn(|| counterfoil.drill("zombie", Duration::from_secs(60)));
        let mut found = Vec::new();
        wait::until("the finding is shown", SOON, || {
            found = rows(&json(&counterfoil, &["show", "leaks"]), "findings");
            found.len() == 1
        });
        assert_eq!((&found[0]["class"], &found[0]["held_back"]), (&"zombie".into(), &Value::Null));
        let (ok, output) = counterfoil.ctl(&["reap", &found[0]["cookie"].to_string()], SOON);
        assert!(ok && output.contains("outcome: released"), "{output}");
        let (ok, output) = drill.join().expect("the drill ends");
        assert!(ok && output.contains("outcome: released"), "{output}");
    });
    let reaps = rows(&json(&counterfoil, &["show", "leaks"]), "reaps");
    let ends: Vec<_> = reaps.iter().map(|reap| (reap["outcome"].clone(), reap["ordered"] == true)).collect();
    assert_eq!(ends, [("dry_run".into(), false), ("released".into(), true)]);
    counterfoil.assert_quiescent();
}

/// A worker hangs while its backend closes. All can be looked at meanwhile, and nothing of it can be reaped.
#[test]
fn a_hanging_worker_hides_nothing_and_is_protected() {
    const HANG: Duration = Duration::from_secs(15);
    let (close, closing) = std::sync::mpsc::channel::<()>();
    let closing = std::sync::Mutex::new(closing);
    let backend = FakeBackend::start(move |connection| {
        if connection.header().is_none() {
            return;
        }
        let Some(query) = connection.query() else { return };
        connection.send(&counterfoil_tests::message::answer_to(&query, [192, 0, 2, 53]));
        // The sender's end, whether it sends or not.
        let _ = closing.lock().unwrap().recv_timeout(SOON);
    });
    let config = Config::new(backend.address)
        .identity("connection")
        .tlv(0xe0, "x")
        .tlv(0xea, "y")
        .set("watchdog", "reap", "\"on\"");
    let counterfoil = Counterfoil::start(&config);
    let mut client = counterfoil.client();
    Load { count: 1, ..Load::default() }.run(&mut client).assert_all_answered(1);
    let established = rows(&json(&counterfoil, &["show", "connections"]), "connections");
    let cookie = established[0]["cookie"].clone();
    counterfoil.wait_metrics("a sweep has seen it", SOON, |metrics| metrics.sum("kernel_backend_sockets", &[]) == 1.0);
    let hang = serde_json::json!({"cmd": "hang", "worker": 0, "millis": HANG.as_millis() as u64});
    assert_eq!(counterfoil.admin(&hang, SOON).last().unwrap()["ok"], true);
    // Only a worker that hangs already does not see that its backend closes.
    counterfoil.wait_metrics("the worker hangs", SOON, |metrics| metrics.sum("worker_stalled", &[]) == 1.0);
    drop(close);
    let mut found = Vec::new();
    wait::until("the zombie is found", HANG, || {
        found = rows(&json(&counterfoil, &["show", "leaks"]), "findings");
        !found.is_empty()
    });
    let zombie = &found[0];
    assert_eq!((&zombie["cookie"], &zombie["class"]), (&cookie, &"zombie".into()));
    assert_eq!((&zombie["tlv_types"], &zombie["owner"]), (&"0xE0,0xEA".into(), &1.into()));
    assert_eq!(zombie["header"], established[0]["header"]);
    assert!(zombie["held_back"].as_str().is_some_and(|reason| reason.contains("worker 0")), "{zombie}");
    let states: Vec<_> = rows(zombie, "changes").iter().map(|change| change["tcp_state"].clone()).collect();
    assert!(states.ends_with(&["established".into(), "close_wait".into()]), "{states:?}");
    let (ok, output) = counterfoil.ctl(&["reap", &cookie.to_string()], SOON);
    assert!(!ok && output.contains("held back: worker 0"), "{output}");
    let view = json(&counterfoil, &["show", "view"]);
    assert_eq!(view["view"]["workers"][0]["stalled"], true);
    drop(client);
    counterfoil.wait_metrics("the worker is back", HANG * 2, |metrics| metrics.sum("worker_stalled", &[]) == 0.0);
    counterfoil.assert_quiescent();
    assert_eq!(counterfoil.metrics().sum("reaped_total", &[]), 0.0);
}

#[test]
fn errors_say_which_socket_and_usage_is_64() {
    let program = counterfoil_tests::counterfoil::program().display().to_string();
    let run = |args: &[&str]| counterfoil_tests::process::run(&program, args, SOON);
    let (ok, output) = run(&["ctl", "show", "view", "--socket", "/nonexistent/admin.sock"]);
    assert!(!ok && output.contains("/nonexistent/admin.sock: is counterfoil running"), "{output}");
    let mut usage = counterfoil_tests::process::Process::start("usage", &program, &["ctl", "show", "everything"]);
    assert_eq!(usage.wait_exit(SOON).code(), Some(64));
}

/// How a command ends, and what it says of errors, when nobody reads its output (`reader` is gone, as `head` is when it has
/// seen enough) or the disk is full.
fn ended(arguments: &[&str], output: Stdio) -> (Option<i32>, String) {
    let mut command = Command::new(program());
    let output = command.args(arguments).stdin(Stdio::null()).stdout(output).stderr(Stdio::piped()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// Every command that prints does what it does, says nothing of its reader, and ends with the status that it has anyway.
#[test]
fn a_reader_that_has_seen_enough_changes_nothing() {
    let backend = FakeBackend::answering(false);
    let mut counterfoil = Counterfoil::start(&Config::new(backend.address).settles_soon());
    let (socket, file) = (counterfoil.socket().display().to_string(), counterfoil.file().display().to_string());
    let server = counterfoil.address.to_string();
    let silent = (Some(0), String::new());
    let ctl = |arguments: &[&str]| ended(&[&["ctl", "--socket", &socket], arguments].concat(), unread());
    for list in ["backends", "connections", "clients", "tlvs", "leaks", "view"] {
        assert_eq!(ctl(&["show", list]), silent, "{list}");
        assert_eq!(ctl(&["show", list, "-o", "json"]), silent, "{list}");
    }
    assert_eq!(ctl(&["reload"]), silent);
    assert_eq!(ctl(&["reap", "1"]).0, Some(1), "there is no such socket");
    assert_eq!(ctl(&["drill", "zombie"]), silent, "followed to its end");
    assert_eq!(ended(&["drill", "zombie", "--socket", &socket], unread()), silent);
    assert_eq!(ended(&["query", "a.example.test", "A", "--server", &server], unread()), silent);
    assert_eq!(ended(&["--help"], unread()), silent);
    let (status, said) = ended(&["check-config", &file], unread());
    assert!(status == Some(0) && said.lines().all(|line| line.starts_with("warning: ")), "{status:?} {said}");
    // A disk that is full is another thing.
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let no_space = "error: standard output: No space left on device (os error 28)\n";
    for arguments in [&["check-config", &file][..], &["ctl", "--socket", &socket, "show", "view"]] {
        let (status, said) = ended(arguments, full());
        assert!(status == Some(1) && said.ends_with(no_space), "{arguments:?}: {status:?} {said}");
    }
    counterfoil.rewrite("nonsense");
    assert_eq!(ctl(&["reload"]), (Some(1), String::new()));
    let (status, said) = ended(&["check-config", &file], unread());
    assert!(status == Some(64) && said.starts_with(&format!("error: {file}:1:")), "{status:?} {said}");
    counterfoil.assert_quiescent();
    assert_eq!(ctl(&["drain"]), silent, "waited for to the end");
    assert_eq!(counterfoil.process.wait_exit(SOON).code(), Some(0));
}

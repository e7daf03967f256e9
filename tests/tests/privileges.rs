//! As an ordinary user: what each capability is good for, which threads still have one, and what is said where one is
//! missing.
#![expect(clippy::expect_used, clippy::panic, reason = "tests panic")]

use std::collections::BTreeMap;
use std::time::Duration;

use counterfoil_tests::config::Config;
use counterfoil_tests::counterfoil::{Counterfoil, Options, field, message};
use counterfoil_tests::driver::Load;
use counterfoil_tests::fake_backend::FakeBackend;
use counterfoil_tests::wait;

const CAP_NET_ADMIN: u64 = 1 << 12;
const DRILL: Duration = Duration::from_secs(60);

fn start(backend: &FakeBackend, reap: &str, capabilities: &[&str]) -> Counterfoil {
    start_as(backend, reap, Some(capabilities))
}

fn start_as(backend: &FakeBackend, reap: &str, capabilities: Option<&[&str]>) -> Counterfoil {
    let config = Config::new(backend.address).identity("connection").set("server", "workers", 2).set(
        "watchdog",
        "reap",
        format!("\"{reap}\""),
    );
    Counterfoil::start_with(&config, Options { capabilities, ..Options::default() })
}

/// A field of `/proc/PID/task/TID/status`.
fn status<'a>(text: &'a str, name: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim()
}

/// All capabilities that each thread has or could get back, by its name; and none may get new ones. A thread that has not
/// run yet has its creator's name.
fn threads(counterfoil: &Counterfoil) -> BTreeMap<String, u64> {
    let threads =
        wait::poll(Duration::from_secs(10), || named_threads(counterfoil)).expect("threads have their own names");
    for name in ["worker-0", "worker-1", "watchdog", "admin"] {
        assert!(threads.contains_key(name), "{threads:?}");
    }
    assert!(threads.len() > 4, "the main thread: {threads:?}");
    threads
}

/// None if two have the same name.
fn named_threads(counterfoil: &Counterfoil) -> Option<BTreeMap<String, u64>> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", counterfoil.pid())).expect("it runs");
    let mut threads = BTreeMap::new();
    for task in tasks {
        let text = std::fs::read_to_string(task.expect("it runs").path().join("status")).expect("no thread ends");
        let sets = ["CapInh", "CapPrm", "CapEff", "CapAmb"]
            .map(|set| u64::from_str_radix(status(&text, set), 16).expect("the kernel writes hex"));
        assert_eq!(status(&text, "NoNewPrivs"), "1", "{text}");
        let all = sets.iter().fold(0, |all, set| all | set);
        if threads.insert(status(&text, "Name").to_owned(), all).is_some() {
            return None;
        }
    }
    Some(threads)
}

fn assert_none_but_the_watchdog(counterfoil: &Counterfoil, watchdog: u64) {
    for (name, capabilities) in threads(counterfoil) {
        let wanted = if name == "watchdog" { watchdog } else { 0 };
        assert_eq!(capabilities, wanted, "{name}: {capabilities:#x}");
    }
}

/// The fields of the line with this message.
fn said(counterfoil: &Counterfoil, wanted: &str) -> serde_json::Value {
    let lines = counterfoil.process.lines();
    lines.iter().find_map(|line| message(line, wanted)).unwrap_or_else(|| panic!("not said: {wanted}: {lines:#?}"))
}

fn assert_view(counterfoil: &Counterfoil, source: &str) {
    assert_eq!(counterfoil.metrics().sum("kernel_view_info", &[("source", source)]), 1.0);
}

fn assert_serves(counterfoil: &Counterfoil) {
    let mut client = counterfoil.client();
    Load { count: 100, in_flight: 10, ..Load::default() }.run(&mut client).assert_all_answered(100);
    let labels = [("backend", "backend-0"), ("tcp_state", "established")];
    counterfoil.wait_metrics("the view shows the connection", Duration::from_secs(10), |metrics| {
        metrics.sum("kernel_backend_sockets", &labels) == 1.0
    });
    assert_eq!(counterfoil.metrics().sum("kernel_view_uncertain", &[]), 0.0);
}

/// The eBPF view takes two capabilities to begin with and none to go on. All but orphans are reaped without more.
#[test]
fn with_bpf_and_perfmon_there_is_ebpf_and_zombies_are_reaped() {
    let backend = FakeBackend::answering(true);
    let counterfoil = start(&backend, "on", &["bpf", "perfmon"]);
    assert_view(&counterfoil, "ebpf");
    assert_none_but_the_watchdog(&counterfoil, 0);
    let privileges = said(&counterfoil, "privileges");
    assert_eq!(field(&privileges, "kept").as_deref(), Some("none"), "{privileges}");
    assert_eq!(privileges["user"], 65534);
    assert_serves(&counterfoil);

    let (ok, output) = counterfoil.drill("zombie", DRILL);
    assert!(ok, "{output}");
    assert_eq!(counterfoil.metrics().sum("reaped_total", &[("class", "zombie"), ("outcome", "released")]), 1.0);

    let warned = counterfoil.process.lines().into_iter().any(|line| {
        line.contains("\"WARN\"")
            && line.contains("\"lacks\":\"CAP_NET_ADMIN\"")
            && line.contains("AmbientCapabilities=")
    });
    assert!(warned, "{}", counterfoil.process.tail());
    let (_, output) = counterfoil.drill("orphan", DRILL);
    assert!(output.contains("CAP_NET_ADMIN is missing"), "{output}");
    let metrics = counterfoil.metrics();
    assert_eq!(metrics.sum("reaped_total", &[("class", "orphan"), ("outcome", "ineffective")]), 1.0, "{output}");
    let reaped = said_of(&counterfoil, "orphan");
    assert!(field(&reaped, "note").is_some_and(|note| note.contains("CAP_NET_ADMIN is missing; grant it")), "{reaped}");
    counterfoil.assert_quiescent();
}

/// The line that the reaping of this class left.
fn said_of(counterfoil: &Counterfoil, class: &str) -> serde_json::Value {
    let lines = counterfoil.process.lines();
    let reaped = lines.iter().filter_map(|line| message(line, "reaped"));
    reaped.into_iter().find(|fields| fields["class"] == class).unwrap_or_else(|| panic!("{class}: {lines:#?}"))
}

/// SOCK_DESTROY's capability stays, with the watchdog's thread alone.
#[test]
fn with_net_admin_orphans_are_severed() {
    let backend = FakeBackend::answering(true);
    let counterfoil = start(&backend, "on", &["bpf", "perfmon", "net_admin", "net_bind_service"]);
    assert_view(&counterfoil, "ebpf");
    assert_none_but_the_watchdog(&counterfoil, CAP_NET_ADMIN);
    assert_eq!(field(&said(&counterfoil, "privileges"), "kept").as_deref(), Some("CAP_NET_ADMIN"));
    let (ok, output) = counterfoil.drill("orphan", DRILL);
    assert!(ok, "{output}");
    assert_eq!(counterfoil.metrics().sum("reaped_total", &[("class", "orphan"), ("outcome", "severed")]), 1.0);
    assert_serves(&counterfoil);
    counterfoil.assert_quiescent();
}

/// A dry run destroys nothing, so nothing is kept for it.
#[test]
fn a_dry_run_keeps_nothing() {
    let backend = FakeBackend::answering(true);
    let counterfoil = start(&backend, "dry-run", &["bpf", "perfmon", "net_admin"]);
    assert_view(&counterfoil, "ebpf");
    assert_none_but_the_watchdog(&counterfoil, 0);
    assert_serves(&counterfoil);
}

/// Root gives up its capabilities, too.
#[test]
fn root_keeps_no_more() {
    let backend = FakeBackend::answering(true);
    let counterfoil = start_as(&backend, "on", None);
    assert_view(&counterfoil, "ebpf");
    assert_none_but_the_watchdog(&counterfoil, CAP_NET_ADMIN);
    assert_eq!(said(&counterfoil, "privileges")["user"], 0);
    assert_serves(&counterfoil);
    counterfoil.assert_quiescent();
}

/// Without both capabilities the view is the fallback, which serves and reaps zombies, and the log says what is missing
/// and what to do.
#[test]
fn what_is_missing_is_named() {
    for (capabilities, lacks, grant) in [
        (&[][..], "lacks CAP_BPF and CAP_PERFMON,", "--cap-add BPF --cap-add PERFMON"),
        (&["bpf"], "lacks CAP_PERFMON,", "`AmbientCapabilities=` with CAP_PERFMON in"),
        (&["perfmon", "net_admin"], "lacks CAP_BPF,", "`AmbientCapabilities=` with CAP_BPF in"),
    ] {
        let backend = FakeBackend::answering(true);
        let counterfoil = start(&backend, "on", capabilities);
        assert_view(&counterfoil, "sock_diag");
        let reason = field(&said(&counterfoil, "kernel view"), "reason").expect("a reason");
        println!("{reason}");
        assert!(reason.contains(lacks) && reason.contains(grant), "{reason}");
        let kept = if capabilities.contains(&"net_admin") { CAP_NET_ADMIN } else { 0 };
        assert_none_but_the_watchdog(&counterfoil, kept);
        let (ok, output) = counterfoil.drill("zombie", DRILL);
        assert!(ok, "{output}");
        counterfoil.assert_quiescent();
    }
}

/// The unit grants what the program can use, no more, and lets it through its own sandbox.
#[test]
fn the_unit_grants_what_is_needed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/systemd/counterfoil.service");
    let unit = std::fs::read_to_string(path).expect("the unit");
    let words = |key: &str| -> Vec<&str> {
        let values = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        values.flat_map(str::split_whitespace).collect()
    };
    let granted = ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"];
    assert_eq!(words("CapabilityBoundingSet"), granted);
    assert_eq!(words("AmbientCapabilities"), granted);
    assert!(words("RestrictAddressFamilies").contains(&"AF_NETLINK"));
    assert!(["bpf", "capset"].iter().all(|call| words("SystemCallFilter").contains(call)));
    assert!(words("PrivateUsers").is_empty(), "capabilities of a user namespace are none");
}

//! HTTP and the unix socket from outside, and drills with the real fallback view of this very process.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests panic, and are clients")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;
use crate::app::order;
use crate::clock;
use crate::config::{Class, ReapMode, View};
use crate::drill;
use crate::kernel;
use crate::metrics::{self, Format};
use crate::watchdog::{self, Observed, Watchdog, fixture};

/// Fields are dropped in this order.
struct Running {
    admin: Admin,
    observed: Observed,
    inbox: Option<order::Inbox>,
    _watchdog: Watchdog,
    _worker: tokio::sync::mpsc::UnboundedReceiver<crate::control::Control>,
    directory: PathBuf,
}

impl Running {
    /// Connections of drills.
    fn drills(&self) -> usize {
        let drill = self.observed.policy.drill();
        self.observed.ledger.caps().backend(drill).unwrap().1
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn start_with(reap: ReapMode, name: &str) -> Running {
    let directory = std::env::temp_dir().join(format!("counterfoil-admin-{}-{name}", std::process::id()));
    let socket = directory.join("below").join("counterfoil.sock");
    let (observed, setup, worker) = fixture::observed(fixture::config(reap, Some(socket)));
    let listeners = [setup.address().unwrap()];
    let (view, ..) = kernel::open(View::SockDiag, &listeners, 1000).unwrap();
    let watchdog = watchdog::start(observed.subject(), view).unwrap();
    let metrics = Arc::new(metrics::registry(Live::new(observed.clone()), watchdog.handle()));
    let doors = Doors::bind(&observed.config.admin).unwrap();
    let (orders, inbox) = order::channel();
    let served = Served { live: Live::new(observed.clone()), watchdog: watchdog.handle(), metrics, orders };
    let admin = start(served, setup, doors).unwrap();
    Running { admin, observed, inbox: Some(inbox), _watchdog: watchdog, _worker: worker, directory }
}

fn get(running: &Running, path: &str) -> String {
    let mut stream = TcpStream::connect(running.admin.http().unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn ask(running: &Running, request: &str) -> Vec<serde_json::Value> {
    let mut stream = UnixStream::connect(running.admin.socket().unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    writeln!(stream, "{request}").unwrap();
    BufReader::new(stream).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
}

#[test]
fn http_says_how_it_is() {
    let running = start_with(ReapMode::Off, "http");
    assert!(get(&running, "/healthz").starts_with("HTTP/1.1 200 "));
    assert!(get(&running, "/readyz").starts_with("HTTP/1.1 503 "), "no listener is open yet");
    running.observed.set_serving(true);
    assert!(get(&running, "/readyz").starts_with("HTTP/1.1 200 "));
    let metrics = get(&running, "/metrics");
    let (head, body) = metrics.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(Format::Text.content_type()), "{head}");
    assert!(!body.contains("# EOF"));
    assert!(get(&running, "/nothing").starts_with("HTTP/1.1 404 "));
}

#[test]
fn the_unix_socket_is_its_owners_and_goes_away() {
    let running = start_with(ReapMode::Off, "socket");
    let path = running.admin.socket().unwrap().to_owned();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let taken = socket::Bound::new(&path).unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    let unknown = [
        r#"{"cmd":"reload","x":1}"#,
        r#"{"cmd":"drain","x":1}"#,
        r#"{"x":null,"cmd":"drain"}"#,
        r#"{"cmd":"show","what":"view","x":1}"#,
        r#"{"cmd":"reap","cookie":1,"x":1}"#,
        r#"{"cmd":"drill","class":"zombie","x":1}"#,
    ];
    for bad in unknown {
        let events = ask(&running, bad);
        let message = events[0]["message"].as_str().unwrap();
        assert!(events.len() == 1 && message.contains("unknown field `x`"), "{bad}: {events:?}");
    }
    for bad in ["", "no json", "{\"cmd\":\"drill\"}", "{\"cmd\":\"drill\",\"class\":\"leak\"}", "{\"cmd\":\"other\"}"] {
        let events = ask(&running, bad);
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!((&events[0]["event"], &events[0]["ok"]), (&"done".into(), &false.into()), "{events:?}");
    }
    drop(running);
    assert!(!path.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_errors_name_the_path() {
    let directory = std::env::temp_dir().join(format!("counterfoil-stale-{}", std::process::id()));
    let path = directory.join("a.sock");
    drop(socket::Bound::new(&path).unwrap());
    assert!(!path.exists());
    // A process that was killed leaves its file.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(socket::Bound::new(&path).unwrap());
    std::fs::write(&path, "no socket").unwrap();
    assert_eq!(
        socket::Bound::new(&path).unwrap_err().kind(),
        io::ErrorKind::AlreadyExists,
        "only sockets are replaced"
    );
    let below = path.join("b.sock");
    let config = fixture::config(ReapMode::Off, Some(below.clone()));
    let error = Doors::bind(&config.admin).unwrap_err().to_string();
    assert!(error.contains(&below.display().to_string()), "{error}");
    std::fs::remove_dir_all(&directory).unwrap();
}

/// The steps of a drill over the fallback view, which finds every class but reaps zombies only.
#[test]
fn a_zombie_is_drilled_found_and_released() {
    let running = start_with(ReapMode::On, "zombie");
    let mut output = Vec::new();
    let order = drill::Order { class: "zombie".to_owned(), deaf: false };
    let ok = drill::client(&order, running.admin.socket().unwrap(), &mut output).unwrap();
    let output = String::from_utf8(output).unwrap();
    assert!(ok, "{output}");
    for step in ["leaked", "condition", "finding", "alarm", "rung: ask_owner", "outcome: released", "clear", "done"] {
        assert!(output.contains(step), "{step} is missing: {output}");
    }
    assert_eq!(running.drills(), 0, "nothing is left");
}

#[test]
fn every_class_is_found_and_leaves_nothing() {
    let running = start_with(ReapMode::DryRun, "all");
    for (class, events) in Class::ALL.map(Class::name).into_iter().zip(drill_all(&running)) {
        let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
        assert_eq!(names[..5], ["start", "leaked", "condition", "finding", "alarm"], "{events:?}");
        assert!(names.contains(&"clear"), "{events:?}");
        // Without eBPF the others are held back, and the drill says so instead of success.
        let done = events.last().unwrap();
        assert_eq!(done["ok"], class == "zombie", "{events:?}");
    }
    assert_eq!(running.drills(), 0, "nothing is left");
}

/// A drill of each class, all at once.
fn drill_all(running: &Running) -> Vec<Vec<serde_json::Value>> {
    std::thread::scope(|scope| {
        let drill = |class: Class| {
            scope.spawn(move || ask(running, &format!("{{\"cmd\":\"drill\",\"class\":\"{}\"}}", class.name())))
        };
        let drills = Class::ALL.map(drill);
        drills.into_iter().map(|drill| drill.join().unwrap()).collect()
    })
}

/// An owner that does nothing when it is asked: `shutdown(2)` has to do, and what is left of it is still a finding.
#[test]
fn a_deaf_owner_is_climbed_past() {
    let running = start_with(ReapMode::On, "deaf");
    let events = ask(&running, "{\"cmd\":\"drill\",\"class\":\"zombie\",\"deaf\":true}");
    let step = |name: &str| events.iter().find(|event| event["event"] == name).unwrap();
    assert_eq!((&step("reaping")["rung"], &step("outcome")["outcome"]), (&"shutdown".into(), &"severed".into()));
    assert_eq!((&step("remains")["class"], &step("done")["ok"]), (&"zombie".into(), &true.into()));
    for class in ["orphan", "ghost"] {
        let refused = ask(&running, &format!("{{\"cmd\":\"drill\",\"class\":\"{class}\",\"deaf\":true}}"));
        assert_eq!((refused.len(), &refused[0]["ok"]), (1, &false.into()), "nobody is asked: {refused:?}");
    }
    assert_eq!(running.drills(), 0, "nothing is left");
}

#[test]
fn drills_are_bounded_and_end_with_their_clients() {
    let running = start_with(ReapMode::Off, "gone");
    let request = "{\"cmd\":\"drill\",\"class\":\"hoard\"}";
    let clients: Vec<UnixStream> = (0..drill::AT_ONCE)
        .map(|_| {
            let mut stream = UnixStream::connect(running.admin.socket().unwrap()).unwrap();
            writeln!(stream, "{request}").unwrap();
            stream
        })
        .collect();
    wait_until(|| running.drills() == drill::AT_ONCE);
    let refused = ask(&running, request);
    assert_eq!((refused.len(), &refused[0]["ok"]), (1, &false.into()), "{refused:?}");
    assert!(refused[0]["message"].as_str().unwrap().ends_with("are running, more are not made at once"), "{refused:?}");
    drop(clients);
    wait_until(|| running.drills() == 0);
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let deadline = clock::now().after(Duration::from_secs(10));
    while !condition() {
        assert!(clock::now() < deadline);
        std::thread::yield_now();
    }
}

#[test]
fn what_there_is_can_be_shown() {
    let running = start_with(ReapMode::DryRun, "show");
    for what in ["backends", "connections", "clients", "tlvs", "findings", "reaps", "view"] {
        let events = ask(&running, &format!("{{\"cmd\":\"show\",\"what\":\"{what}\"}}"));
        let done = events.last().unwrap();
        assert_eq!((&done["ok"], &done["source"], &done["next"]), (&true.into(), &"sock-diag".into(), &().into()));
        // Sockets of other tests in this process are connections, too, and may be findings.
        match what {
            "reaps" => assert_eq!(events.len(), 1, "{events:?}"),
            "connections" | "findings" => {}
            _ => assert!(events.len() > 1, "{what}: {events:?}"),
        }
    }
    let refused = ask(&running, "{\"cmd\":\"reap\",\"cookie\":1}");
    assert_eq!(refused.len(), 1);
    assert_eq!(
        (&refused[0]["ok"], &refused[0]["message"]),
        (&false.into(), &"not reaped: neither view has a socket 1".into())
    );
    assert_eq!(ask(&running, "{\"cmd\":\"show\",\"what\":\"all\"}")[0]["ok"], false);
}

#[test]
fn draining_is_reported_to_its_end_even_if_the_admin_side_ends_with_it() {
    let mut running = start_with(ReapMode::Off, "drain");
    let inbox = running.inbox.take().unwrap();
    let socket = running.admin.socket().unwrap().to_owned();
    let operator = std::thread::spawn(move || {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        writeln!(stream, r#"{{"cmd":"drain"}}"#).unwrap();
        let lines = BufReader::new(stream).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap());
        lines.collect::<Vec<serde_json::Value>>()
    });
    inbox.pretend_to_drain();
    drop(running);
    let events = operator.join().unwrap();
    assert_eq!(events[0], serde_json::json!({"event": "draining", "client_connections": 0, "queries_in_flight": 0}));
    assert_eq!(events.last().unwrap()["ok"], true, "{events:?}");
}

#[test]
fn a_process_that_ends_takes_no_order() {
    let mut running = start_with(ReapMode::Off, "late");
    drop(running.inbox.take());
    let events = ask(&running, r#"{"cmd":"drain"}"#);
    assert_eq!((events.len(), &events[0]["ok"]), (1, &serde_json::Value::Bool(false)), "{events:?}");
}

//! The program under test, as a process of its own.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::config::Config;
use crate::driver::Client;
use crate::metrics::Metrics;
use crate::netns::Namespace;
use crate::process::Process;
use crate::sockets::{self, Socket};
use crate::tempdir::TempDir;
use crate::wait;

/// How long it may take from start to "ready" (it loads BPF programs) on a busy machine.
const START: Duration = Duration::from_secs(120);

/// How long it may take to come to rest once nothing is asked any more.
const REST: Duration = Duration::from_secs(10);

/// A running Counterfoil.
#[derive(Debug)]
pub struct Counterfoil {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub address: SocketAddr,
    /// Where `/metrics` is; `None` if the configuration turns it off.
    pub admin: Option<SocketAddr>,
    socket: PathBuf,
    dir: TempDir,
}

/// How to start it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// In this network namespace.
    pub namespace: Option<&'a Namespace>,
    /// With this RLIMIT_NOFILE.
    pub descriptors: Option<u32>,
    /// As the ordinary user [`NOBODY`] with exactly these capabilities, by their names in setpriv(1), as a systemd unit would.
    pub capabilities: Option<&'a [&'a str]>,
    /// With these variables of the environment, as a service manager sets them.
    pub environment: &'a [(&'a str, &'a str)],
    /// With this listening socket, as a service manager passes it (sd_listen_fds(3)). Not in a namespace.
    pub listener: Option<&'a TcpListener>,
}

/// Makes the standard input the first descriptor that is passed. The shell becomes the program, so its id is right.
const PASS: &str = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 </dev/null";

/// The user and group `nobody` of Debian.
const NOBODY: u32 = 65534;

impl Counterfoil {
    /// Starts it with `config` and waits until it is ready.
    ///
    /// # Panics
    /// With its log if it does not get ready.
    #[track_caller]
    pub fn start(config: &Config) -> Self {
        Self::start_with(config, Options::default())
    }

    /// Like [`Self::start`].
    ///
    /// # Panics
    /// With its log if it does not get ready.
    #[track_caller]
    pub fn start_with(config: &Config, options: Options<'_>) -> Self {
        let dir = TempDir::new("counterfoil");
        let socket = dir.path().join("admin.sock");
        let file = dir.write("counterfoil.toml", &config.text(&socket.display().to_string())).display().to_string();
        let mut program = program().display().to_string();
        let mut command = Vec::new();
        let ordinary = options.capabilities.map(ordinary_user).unwrap_or_default();
        if options.capabilities.is_some() {
            // An ordinary user may not reach the directory that it was built in, and must be able to make the socket.
            let copy = dir.path().join("counterfoil-under-test");
            std::fs::copy(&program, &copy).unwrap_or_else(|e| panic!("cannot copy {program}: {e}"));
            program = copy.display().to_string();
            std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).expect("root may give a directory away");
        }
        let limit = options.descriptors.map(|limit| format!("--nofile={limit}"));
        if let Some(limit) = &limit {
            command.extend(["prlimit", limit.as_str(), "--"]);
        }
        command.extend(ordinary.iter().map(String::as_str));
        let variables: Vec<String> =
            options.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if !variables.is_empty() {
            command.push("env");
            command.extend(variables.iter().map(String::as_str));
        }
        if options.listener.is_some() {
            command.extend(["sh", "-c", PASS, "sh"]);
        }
        command.extend([program.as_str(), "run", "--config", &file, "--log-format", "json"]);
        let mut process = match options.namespace {
            Some(namespace) => namespace.start("counterfoil", &command),
            None => {
                let listener = options.listener.map(|listener| listener.try_clone().expect("a descriptor is left"));
                let input = listener.map_or_else(Stdio::null, |listener| Stdio::from(OwnedFd::from(listener)));
                Process::start_with("counterfoil", command[0], &command[1..], input)
            }
        };
        let address = process
            .wait_for_line(START, "its listener", |line| field(&message(line, "listening")?, "address")?.parse().ok());
        process.wait_for_line(START, "that it is ready", |line| message(line, "ready"));
        let admin = process
            .find_line(Duration::ZERO, |line| message(line, "admin"))
            .and_then(|fields| field(&fields, "http")?.parse().ok());
        Self { process, address, admin, socket, dir }
    }

    /// Writes another configuration to its file, which it reads when it is told to.
    pub fn rewrite(&self, text: &str) {
        self.dir.write("counterfoil.toml", text);
    }

    /// Its configuration's file.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("counterfoil.toml")
    }

    /// Replaces the configuration's file by this one's.
    pub fn rewrite_with(&self, config: &Config) {
        self.rewrite(&config.text(&self.socket.display().to_string()));
    }

    /// Its admin socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where the listener of this name accepts clients.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn listener(&self, name: &str) -> SocketAddr {
        let lines = self.process.lines();
        let mut listening = lines.iter().filter_map(|line| message(line, "listening"));
        let found = listening.find(|fields| fields["listener"] == name).and_then(|fields| field(&fields, "address"));
        found.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no listener {name}: {lines:#?}"))
    }

    /// Connects a client.
    ///
    /// # Panics
    /// If it does not accept.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect(self.address, None)
    }

    /// Connects a client from `source`, an address of 127.0.0.0/8.
    ///
    /// # Panics
    /// If it does not accept or `source` is no address.
    #[track_caller]
    pub fn client_from(&self, source: &str) -> Client {
        Client::connect(self.address, Some(source.parse().expect("an address")))
    }

    /// Connects a client from `source` that begins with these octets, as a load balancer does with a PROXY header.
    ///
    /// # Panics
    /// If it does not accept or `source` is no address.
    #[track_caller]
    pub fn client_behind(&self, source: &str, header: &[u8]) -> Client {
        let mut client = self.client_from(source);
        client.send_raw(header).expect("the connection is new");
        client
    }

    /// Scrapes its metrics.
    ///
    /// # Panics
    /// If they cannot be had or read.
    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        let admin = self.admin.expect("the configuration has an admin address");
        Metrics::fetch(admin).unwrap_or_else(|e| panic!("{e}\n{}", self.process.tail()))
    }

    /// How many client connections it has refused for this reason.
    ///
    /// # Panics
    /// As [`metrics`](Self::metrics).
    #[track_caller]
    pub fn refused(&self, reason: &str) -> f64 {
        self.metrics().sum("client_connections_refused_total", &[("reason", reason)])
    }

    /// Waits until its metrics satisfy `condition`.
    ///
    /// # Panics
    /// If they do not by the deadline.
    #[track_caller]
    pub fn wait_metrics(&self, what: &str, deadline: Duration, mut condition: impl FnMut(&Metrics) -> bool) -> Metrics {
        match wait::poll(deadline, || Some(self.metrics()).filter(|metrics| condition(metrics))) {
            Some(metrics) => metrics,
            None => panic!("not within {deadline:?}: {what}; its log:\n{}", self.process.tail()),
        }
    }

    /// The sockets that it holds towards `backend`, by the kernel's own table.
    pub fn backend_sockets(&self, backend: SocketAddr) -> Vec<Socket> {
        sockets::towards(self.pid(), backend.port())
    }

    /// Sends a command to the admin socket and returns the events that come back.
    ///
    /// # Panics
    /// If the socket does not answer, or an event is not JSON.
    #[track_caller]
    pub fn admin(&self, command: &Value, deadline: Duration) -> Vec<Value> {
        let mut events = Vec::new();
        for line in self.send(command, deadline).lines() {
            let line = line.unwrap_or_else(|e| panic!("{command} after {events:?}: {e}\n{}", self.process.tail()));
            events.push(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}")));
        }
        events
    }

    /// Sends a command to the admin socket; its events are read one by one.
    ///
    /// # Panics
    /// If the socket does not take it.
    #[track_caller]
    pub fn begin(&self, command: &Value) -> Events {
        Events(self.send(command, REST))
    }

    fn send(&self, command: &Value, deadline: Duration) -> BufReader<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket).expect("the admin socket accepts");
        stream.set_read_timeout(Some(deadline)).expect("a timeout that is not zero");
        stream.write_all(format!("{command}\n").as_bytes()).expect("the admin socket reads");
        BufReader::new(stream)
    }

    /// Runs `counterfoil drill CLASS` as an operator would; `true` and its output if it succeeded.
    ///
    /// # Panics
    /// If it does not end in time.
    #[track_caller]
    pub fn drill(&self, class: &str, deadline: Duration) -> (bool, String) {
        let socket = self.socket.display().to_string();
        let program = program().display().to_string();
        crate::process::run(&program, &["drill", class, "--socket", &socket], deadline)
    }

    /// Runs `counterfoil ctl` as an operator would; `true` and its output if it succeeded.
    ///
    /// # Panics
    /// If it does not end in time.
    #[track_caller]
    pub fn ctl(&self, arguments: &[&str], deadline: Duration) -> (bool, String) {
        let socket = self.socket.display().to_string();
        let program = program().display().to_string();
        crate::process::run(&program, &[&["ctl", "--socket", &socket], arguments].concat(), deadline)
    }

    /// At no time anything was taken for a leak, nor the kernel's view doubted.
    ///
    /// # Panics
    /// If something was.
    #[track_caller]
    pub fn assert_no_leak_was_seen(&self) {
        let metrics = self.metrics();
        for name in ["reaped_total", "kernel_witness_disagreements_total", "kernel_view_uncertain"] {
            assert_eq!(metrics.sum(name, &[]), 0.0, "{name}");
        }
        let found = self.process.lines().into_iter().find(|line| message(line, "finding").is_some());
        assert!(found.is_none(), "{found:?}");
    }

    /// Waits until everything is at rest: no client, no backend connection, no query, no socket (by its own word and by the
    /// kernel's to us), and every query that came in was answered, failed or abandoned. Backend connections must be on their way out (idle timeout, or their
    /// client gone) before this is called.
    ///
    /// # Panics
    /// If it is not by the deadline, with the metrics in question.
    #[track_caller]
    pub fn assert_quiescent(&self) {
        let mut restless = Vec::new();
        let rested = wait::poll(REST, || {
            restless = unrest(&self.metrics());
            let scraped: Vec<u16> = self.admin.iter().map(SocketAddr::port).collect();
            let held = sockets::connected(self.pid(), &scraped);
            if !held.is_empty() {
                restless.push(format!("it holds {held:?}"));
            }
            restless.is_empty().then_some(())
        });
        if rested.is_none() {
            let connections = self.admin(&json!({"cmd": "show", "what": "connections"}), REST);
            panic!("not at rest: {restless:?}; {connections:#?}; its log:\n{}", self.process.tail());
        }
        let panicked = self.process.lines().into_iter().find(|line| line.contains("panicked at"));
        assert!(panicked.is_none(), "{panicked:?}");
    }

    /// Ends it with SIGTERM and returns how it ended.
    ///
    /// # Panics
    /// If it does not end by the deadline.
    #[track_caller]
    pub fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.process.signal(Signal::TERM);
        self.process.wait_exit(deadline)
    }
}

/// The events that answer a command.
#[derive(Debug)]
pub struct Events(BufReader<UnixStream>);

impl Events {
    /// The next one.
    ///
    /// # Panics
    /// If there is none soon, or it is no JSON.
    #[track_caller]
    pub fn wait(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an event");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }
}

/// The command that makes what follows it run as [`NOBODY`] with exactly these capabilities.
pub(crate) fn ordinary_user(capabilities: &[&str]) -> Vec<String> {
    let set: String =
        ["-all".to_owned()].into_iter().chain(capabilities.iter().map(|name| format!(",+{name}"))).collect();
    let mut command = vec!["setpriv".to_owned(), format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
    command.extend(["--clear-groups".to_owned(), "--pdeathsig=KILL".to_owned()]);
    command.extend(["bounding-set", "inh-caps", "ambient-caps"].map(|kind| format!("--{kind}={set}")));
    command.push("--".to_owned());
    command
}

/// Gauges that are not zero, and sums that do not come out.
fn unrest(metrics: &Metrics) -> Vec<String> {
    let gauges = [
        "client_connections",
        "client_connections_pending",
        "listener_connections",
        "backend_connections",
        "queries_in_flight",
        "queries_waiting",
        "kernel_backend_sockets",
    ];
    let mut found: Vec<String> = gauges
        .iter()
        .map(|name| (name, metrics.sum(name, &[])))
        .filter(|(_, value)| *value != 0.0)
        .map(|(name, value)| format!("{name} = {value}"))
        .collect();
    let sum = |name: &str| metrics.sum(name, &[]);
    let (queries, answered) = (sum("queries_total"), sum("answers_total"));
    let (failed, abandoned) = (sum("queries_failed_total"), sum("queries_abandoned_total"));
    if queries != answered + failed + abandoned {
        found.push(format!("{queries} queries, {answered} answered, {failed} failed, {abandoned} abandoned"));
    }
    let connections = |change: &str| {
        (sum(&format!("client_connections_{change}_total")), sum(&format!("backend_connections_{change}_total")))
    };
    if connections("opened") != connections("closed") {
        let (opened, closed) = (connections("opened"), connections("closed"));
        found.push(format!("(client, backend) connections opened {opened:?}, closed {closed:?}"));
    }
    for change in ["client_connections_closed_total", "backend_connections_closed_total"] {
        if metrics.sum(change, &[("reason", "dropped")]) != 0.0 {
            found.push(format!("{change} without a reason: a bug"));
        }
    }
    found
}

/// The fields of a JSON log line whose message is `wanted`.
pub fn message(line: &str, wanted: &str) -> Option<Value> {
    let mut event: Value = serde_json::from_str(line).ok()?;
    let fields = event.get_mut("fields")?.take();
    (fields.get("message")? == wanted).then_some(fields)
}

/// A field as text.
pub fn field(fields: &Value, name: &str) -> Option<String> {
    fields.get(name)?.as_str().map(str::to_owned)
}

/// The test binary: the program with feature `test-hooks`. Cargo builds it for the scenarios and puts it one directory
/// above theirs.
///
/// # Panics
/// If it is not there.
pub fn program() -> PathBuf {
    let own = std::env::current_exe().expect("a process has a program");
    let built = own.ancestors().skip(1).map(|dir| dir.join("counterfoil-under-test")).find(|path| path.is_file());
    built.unwrap_or_else(|| panic!("no counterfoil-under-test beside {}", Path::display(&own)))
}

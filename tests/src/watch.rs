//! `counterfoil watch`, as a process of its own.

use std::net::SocketAddr;
use std::process::ExitStatus;
use std::time::Duration;

use crate::counterfoil::{field, message, ordinary_user, program};
use crate::metrics::Metrics;
use crate::process::Process;
use crate::tempdir::TempDir;
use crate::wait;

/// How long it may take from start to "ready" (it loads BPF programs) on a busy machine.
const START: Duration = Duration::from_secs(120);

/// A running watch.
#[derive(Debug)]
pub struct Watch {
    /// The process.
    pub process: Process,
    /// Where `/metrics` is.
    pub address: SocketAddr,
    _dir: Option<TempDir>,
}

impl Watch {
    /// Starts it with these flags and waits until it is ready. Its metrics are on a port that the kernel chose.
    ///
    /// # Panics
    /// With its log if it does not get ready.
    #[track_caller]
    pub fn start(flags: &str) -> Self {
        Self::ready(run(flags), None)
    }

    /// Like [`Self::start`], as an ordinary user with exactly these capabilities.
    ///
    /// # Panics
    /// With its log if it does not get ready.
    #[track_caller]
    pub fn start_as(capabilities: &[&str], flags: &str) -> Self {
        let (process, dir) = run_as(capabilities, flags);
        Self::ready(process, Some(dir))
    }

    #[track_caller]
    fn ready(mut process: Process, dir: Option<TempDir>) -> Self {
        let address = process
            .wait_for_line(START, "that it is ready", |line| field(&message(line, "ready")?, "http")?.parse().ok());
        Self { process, address, _dir: dir }
    }

    /// Scrapes its metrics.
    ///
    /// # Panics
    /// If they cannot be had or read.
    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        Metrics::fetch(self.address).unwrap_or_else(|e| panic!("{e}\n{}", self.process.tail()))
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

    /// Waits until it has swept `count` times more.
    ///
    /// # Panics
    /// If it does not in time.
    #[track_caller]
    pub fn wait_sweeps(&self, count: f64) -> Metrics {
        let from = self.metrics().sum("watchdog_sweeps_total", &[]);
        self.wait_metrics("sweeps", START, |metrics| metrics.sum("watchdog_sweeps_total", &[]) >= from + count)
    }

    /// The fields of all log lines with this message.
    pub fn said(&self, wanted: &str) -> Vec<serde_json::Value> {
        self.process.lines().iter().filter_map(|line| message(line, wanted)).collect()
    }
}

/// Starts it with these flags, whatever comes of it.
pub fn run(flags: &str) -> Process {
    let arguments = arguments(flags);
    Process::start("counterfoil watch", program(), &arguments)
}

/// The same as an ordinary user with exactly these capabilities. The directory holds the program.
///
/// # Panics
/// If the program cannot be copied.
pub fn run_as(capabilities: &[&str], flags: &str) -> (Process, TempDir) {
    let dir = TempDir::new("watch");
    let copy = dir.path().join("counterfoil-under-test");
    std::fs::copy(program(), &copy).expect("a directory that can be written");
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).expect("root may give a directory away");
    let mut command = ordinary_user(capabilities);
    command.push(copy.display().to_string());
    command.extend(arguments(flags));
    (Process::start("counterfoil watch", &command[0], &command[1..]), dir)
}

/// Runs it with flags that make it end, and returns how it ended and what it said.
///
/// # Panics
/// If it does not end.
#[track_caller]
pub fn refused(mut process: Process) -> (ExitStatus, String) {
    let status = process.wait_exit(START);
    process.stop();
    (status, process.lines().join("\n"))
}

fn arguments(flags: &str) -> Vec<String> {
    let fixed = ["watch", "--log-format", "json"];
    let http: &[&str] = if flags.contains("--http ") { &[] } else { &["--http", "127.0.0.1:0"] };
    fixed.into_iter().chain(http.iter().copied()).chain(flags.split_ascii_whitespace()).map(str::to_owned).collect()
}

//! Child processes: output captured from the first byte, stopped by their own process id.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal, kill_process};

use crate::sockets;
use crate::wait;

/// How long a child may take to end after SIGTERM before it gets SIGKILL.
const TERM_TIMEOUT: Duration = Duration::from_secs(3);

/// Lines of a log shown when something fails.
const TAIL: usize = 60;

/// Says that we run in the root that xtask unpacks, where the programs are those that the tests are written for.
const ROOT: (&str, &str) = ("/etc/debian_chroot", "counterfoil-tests");

/// Everything a child wrote, line by line, both streams in the order of arrival.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

/// One of a child's streams, and how many octets of it are in the log.
#[derive(Debug)]
struct Stream {
    pipe: File,
    logged: AtomicUsize,
    ended: AtomicBool,
}

impl Stream {
    fn new(pipe: impl Into<OwnedFd>) -> Arc<Self> {
        let pipe = File::from(pipe.into());
        Arc::new(Self { pipe, logged: AtomicUsize::new(0), ended: AtomicBool::new(false) })
    }

    /// How many octets the child has written by now, to a reader whom nobody disturbs.
    fn written(&self) -> usize {
        let waiting = rustix::io::ioctl_fionread(&self.pipe).unwrap_or(0);
        self.logged.load(Ordering::SeqCst) + usize::try_from(waiting).expect("less than a pipe holds")
    }
}

impl Log {
    fn read_from(self: &Arc<Self>, stream: &Arc<Stream>) -> JoinHandle<()> {
        let (log, stream) = (Arc::clone(self), Arc::clone(stream));
        std::thread::spawn(move || {
            let (mut pending, mut buffer) = (Vec::new(), vec![0; 65536]);
            loop {
                // An error shows when it is read.
                let _ = rustix::event::poll(&mut [PollFd::new(&stream.pipe, PollFlags::IN)], None);
                // Under the lock nothing is on its way: it is in the pipe or in the log.
                let mut lines = log.lines.lock().unwrap();
                let Ok(read @ 1..) = (&stream.pipe).read(&mut buffer) else { break };
                pending.extend_from_slice(&buffer[..read]);
                while let Some(end) = pending.iter().position(|octet| *octet == b'\n') {
                    lines.push(text(&pending.drain(..=end).collect::<Vec<_>>()));
                }
                stream.logged.fetch_add(read, Ordering::SeqCst);
                log.grown.notify_all();
            }
            if !pending.is_empty() {
                log.lines.lock().unwrap().push(text(&pending));
            }
            stream.ended.store(true, Ordering::SeqCst);
            log.grown.notify_all();
        })
    }

    /// The lines, once all is among them that was written before this call: what a child has said is there as soon as
    /// anything else shows that it has said it.
    fn caught_up(&self, streams: &[Arc<Stream>]) -> MutexGuard<'_, Vec<String>> {
        let mut lines = self.lines.lock().unwrap();
        let written: Vec<usize> = streams.iter().map(|stream| stream.written()).collect();
        let is_there = |(stream, written): (&Arc<Stream>, &usize)| {
            stream.logged.load(Ordering::SeqCst) >= *written || stream.ended.load(Ordering::SeqCst)
        };
        while !streams.iter().zip(&written).all(is_there) {
            lines = self.grown.wait_timeout(lines, Duration::from_millis(50)).unwrap().0;
        }
        lines
    }

    fn tail(&self) -> String {
        let lines = self.lines.lock().unwrap();
        lines[lines.len().saturating_sub(TAIL)..].join("\n")
    }
}

fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_end().to_owned()
}

/// A running child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    status: Option<ExitStatus>,
    log: Arc<Log>,
    streams: [Arc<Stream>; 2],
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts `program` with `args`; `name` is what failures call it.
    ///
    /// Programs are found in the root that the tests run in, never on the machine.
    ///
    /// The child gets SIGKILL when the thread that started it dies, so that an interrupted test leaves nothing behind:
    /// start a child from the test's own thread.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start<S: AsRef<std::ffi::OsStr>>(name: &str, program: impl AsRef<std::ffi::OsStr>, args: &[S]) -> Self {
        Self::start_with(name, program, args, Stdio::null())
    }

    /// Like [`Self::start`], with this as its standard input.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_with<S: AsRef<std::ffi::OsStr>>(
        name: &str,
        program: impl AsRef<std::ffi::OsStr>,
        args: &[S],
        input: Stdio,
    ) -> Self {
        assert_in_root();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(args);
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        let log = Arc::new(Log::default());
        let streams = [
            Stream::new(child.stdout.take().expect("stdout is piped")),
            Stream::new(child.stderr.take().expect("stderr is piped")),
        ];
        let readers = streams.iter().map(|stream| log.read_from(stream)).collect();
        Self { name: name.to_owned(), child, status: None, log, streams, readers }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status if it has ended.
    ///
    /// # Panics
    /// If the kernel does not know the child.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("our own child can be waited for");
        }
        self.status
    }

    /// Waits for the child to end.
    ///
    /// # Panics
    /// With the log if it is alive at the deadline.
    #[track_caller]
    pub fn wait_exit(&mut self, deadline: Duration) -> ExitStatus {
        match wait::poll(deadline, || self.exited()) {
            Some(status) => status,
            None => panic!("{} still runs after {deadline:?}; its log:\n{}", self.name, self.log.tail()),
        }
    }

    /// Sends a signal to the child, if it is still there. After SIGSTOP none of its threads runs when this returns.
    ///
    /// # Panics
    /// If it does not stop.
    #[track_caller]
    pub fn signal(&mut self, signal: Signal) {
        if self.exited().is_some() {
            return;
        }
        // The child is not reaped yet, so the id is still its own. It may end at any moment: an error is no news.
        let _ = kill_process(Pid::from_child(&self.child), signal);
        if signal == Signal::STOP {
            let tasks = format!("/proc/{}/task", self.child.id());
            let stopped = |task: std::fs::DirEntry| {
                std::fs::read_to_string(task.path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
            };
            let all = || std::fs::read_dir(&tasks).is_ok_and(|mut tasks| tasks.all(|task| task.is_ok_and(stopped)));
            wait::until("all its threads are stopped", Duration::from_secs(10), all);
        }
    }

    /// Waits for a line of output that `wanted` accepts, and returns what `wanted` made of it; lines that came before
    /// the call count.
    ///
    /// # Panics
    /// With the log if there is none by the deadline or the child ends.
    #[track_caller]
    pub fn wait_for_line<T>(&mut self, deadline: Duration, what: &str, wanted: impl Fn(&str) -> Option<T>) -> T {
        match self.find_line(deadline, wanted) {
            Some(found) => found,
            None => {
                let status = self.exited();
                panic!("{} did not log {what} within {deadline:?} ({status:?}):\n{}", self.name, self.log.tail())
            }
        }
    }

    /// Like [`Self::wait_for_line`], but `None` instead of a panic.
    pub fn find_line<T>(&mut self, deadline: Duration, wanted: impl Fn(&str) -> Option<T>) -> Option<T> {
        let end = Instant::now() + deadline;
        let log = Arc::clone(&self.log);
        let mut lines = log.caught_up(&self.streams);
        let mut seen = 0;
        loop {
            if let Some(found) = lines[seen..].iter().find_map(|line| wanted(line)) {
                return Some(found);
            }
            seen = lines.len();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || (self.exited().is_some() && self.readers.iter().all(JoinHandle::is_finished)) {
                return None;
            }
            lines = log.grown.wait_timeout(lines, left.min(Duration::from_millis(50))).unwrap().0;
        }
    }

    /// Waits until the child listens on TCP port `port`, as the kernel sees it (so no connection is spent on it).
    /// `false` if the child ends or the deadline passes first.
    pub fn listens(&mut self, port: u16, deadline: Duration) -> bool {
        wait::poll(deadline, || {
            if self.exited().is_some() {
                return Some(false);
            }
            sockets::listens(self.pid(), port).then_some(true)
        })
        .unwrap_or(false)
    }

    /// CPU time it has used so far, user and system.
    ///
    /// # Panics
    /// If it has ended.
    #[track_caller]
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("a running process");
        // Fields 14 and 15 of proc(5), counted after the command's closing bracket, which is the second.
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    /// Its resident memory, octets.
    ///
    /// # Panics
    /// If it has ended.
    #[track_caller]
    pub fn resident_bytes(&self) -> usize {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid())).expect("a running process");
        let pages: usize = statm.split(' ').nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
        pages * rustix::param::page_size()
    }

    /// Everything logged so far: all that it wrote before this call.
    ///
    /// # Panics
    /// Never in practice: only if a reader thread panicked.
    pub fn lines(&self) -> Vec<String> {
        self.log.caught_up(&self.streams).clone()
    }

    /// The end of the log, for messages.
    pub fn tail(&self) -> String {
        self.log.tail()
    }

    /// Ends the child: SIGTERM, then SIGKILL.
    pub fn stop(&mut self) -> Option<ExitStatus> {
        self.signal(Signal::TERM);
        if wait::poll(TERM_TIMEOUT, || self.exited()).is_none() {
            self.signal(Signal::KILL);
            self.status = self.child.wait().ok();
        }
        for reader in self.readers.drain(..) {
            // Ends with the pipe; a grandchild that kept it would show as a hang here, and nothing we start forks one.
            let _ = reader.join();
        }
        self.status
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let early = self.exited();
        self.stop();
        if std::thread::panicking() {
            eprintln!("--- {} (pid {}, {early:?} before it was stopped):\n{}", self.name, self.pid(), self.log.tail());
        }
    }
}

/// # Panics
/// If this test would start what happens to be installed on this machine.
#[track_caller]
fn assert_in_root() {
    let name = std::fs::read_to_string(ROOT.0).unwrap_or_default();
    assert_eq!(
        name.trim_end(),
        ROOT.1,
        "{}: this test runs outside of the root with its programs. `cargo xtask tools` unpacks it, and `cargo test` and \
         `cargo xtask test` start tests in it",
        ROOT.0
    );
}

/// Runs a command to its end and returns its output (both streams) and whether it succeeded.
///
/// # Panics
/// If it cannot be started, or does not end by the deadline.
#[track_caller]
pub fn run(program: &str, args: &[&str], deadline: Duration) -> (bool, String) {
    let mut process = Process::start(program, program, args);
    let status = process.wait_exit(deadline);
    for reader in process.readers.drain(..) {
        let _ = reader.join();
    }
    (status.success() && status.signal().is_none(), process.lines().join("\n"))
}

/// A TCP port of 127.0.0.1 that was free a moment ago. Another process may take it: starters try again.
///
/// # Panics
/// If the kernel has none.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// An address at which connections are refused: the next of loopback's, at the port of tcpmux, which nobody serves. A port
/// that was free a moment ago may be another server's by now, or the one that the last call gave.
pub fn nobody() -> SocketAddr {
    static LAST: AtomicU16 = AtomicU16::new(0);
    let [high, low] = LAST.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    SocketAddr::from(([127, 111, high, low], 1))
}

/// Starts a server on a free port, again on another one if the port was taken in between.
///
/// # Panics
/// If it does not listen after four attempts.
#[track_caller]
pub fn start_on_free_port<T>(name: &str, mut start: impl FnMut(u16) -> (Process, T)) -> (Process, u16, T) {
    let mut logs = String::new();
    for _ in 0..4 {
        let port = free_port();
        let (mut process, rest) = start(port);
        if process.listens(port, Duration::from_secs(20)) {
            return (process, port, rest);
        }
        process.stop();
        logs.push_str(&process.tail());
    }
    panic!("{name} does not start:\n{logs}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A child says something and then does something: who sees what it did has what it said.
    #[test]
    fn what_was_said_is_there_once_its_effect_is_seen() {
        let dir = crate::tempdir::TempDir::new("said");
        for round in 0..200 {
            let done = dir.path().join(round.to_string());
            let script = format!("echo before; echo >{}; exec sleep 60", done.display());
            let process = Process::start("sh", "sh", &["-c", &script]);
            while !done.exists() {
                std::hint::spin_loop();
            }
            assert_eq!(process.lines(), ["before"], "{round}");
        }
    }
}

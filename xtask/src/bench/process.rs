//! Processes of a benchmark: started, watched from outside, and stopped by process id.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde::de::DeserializeOwned;

use crate::command::say;
use crate::privilege;

/// Descriptors that the largest scenario needs in one process, with room.
const DESCRIPTORS: u64 = 100_000;
/// How long a program may take to listen, or to end.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two looks at whether it does.
const POLL: Duration = Duration::from_millis(10);

/// Raises the limit of open descriptors for all that is started here, above the machine's own if we may.
pub(super) fn raise_descriptor_limit() -> Result<()> {
    let Some(maximum) = getrlimit(Resource::Nofile).maximum.filter(|maximum| *maximum < DESCRIPTORS) else {
        return privilege::raise_descriptor_limit();
    };
    let wanted = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    if setrlimit(Resource::Nofile, wanted).is_err() {
        say(format_args!("only {maximum} descriptors per process here, long runs of E with dnsdist may need more"));
        return privilege::raise_descriptor_limit();
    }
    Ok(())
}

/// A running program. Dropping it kills it.
pub(super) struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Process {
    /// Starts a program whose input and output are ours; what it says on stderr goes to a file in `directory`.
    pub(super) fn start(name: &str, command: &mut Command, directory: &Path) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("no pipe to its output")?);
        Ok(Self { name: name.to_owned(), child, stdin, stdout, log })
    }

    /// The next line of its output, as JSON.
    pub(super) fn read<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).with_context(|| format!("cannot read what {} says", self.name))?;
        serde_json::from_str(&line).with_context(|| format!("{} said {line:?}; {}", self.name, self.last_words()))
    }

    /// Writes a line to its input.
    pub(super) fn write(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().with_context(|| format!("the input of {} is closed", self.name))?;
        writeln!(stdin, "{line}").with_context(|| format!("cannot write to {}", self.name))
    }

    /// Closes its input, on which our own programs end, and returns how it ended.
    pub(super) fn finish(&mut self) -> Result<ExitStatus> {
        self.stdin = None;
        self.wait_for_end()
    }

    /// Asks it to end by SIGTERM, and returns how it ended.
    pub(super) fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)
    }

    /// The same by SIGINT, as from a keyboard.
    pub(super) fn interrupt(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::INT)
    }

    fn signal(&mut self, signal: Signal) -> Result<ExitStatus> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))?;
        self.wait_for_end()
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `condition` gives something; fails if the program ends before, or takes too long.
    pub(super) fn wait_for<T>(&mut self, what: &str, mut condition: impl FnMut(&Path) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = condition(&self.log) {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status} before {what}; {}", self.name, self.last_words());
            }
            if Instant::now() > deadline {
                bail!("{} took too long: {what}; {}", self.name, self.last_words());
            }
            std::thread::sleep(POLL);
        }
    }

    fn wait_for_end(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} does not end; {}", self.name, self.last_words());
            }
            std::thread::sleep(POLL);
        }
    }

    /// CPU time of all its threads so far, in nanoseconds.
    pub(super) fn cpu(&self) -> Result<u64> {
        self.cpu_of(|_| true)
    }

    /// The same of the threads with this name.
    pub(super) fn thread_cpu(&self, name: &str) -> Result<u64> {
        self.cpu_of(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim_end() == name))
    }

    fn cpu_of(&self, counts: impl Fn(&Path) -> bool) -> Result<u64> {
        let tasks = self.proc("task");
        let mut sum = 0;
        for task in fs::read_dir(&tasks).with_context(|| tasks.display().to_string())? {
            let task = task?.path();
            if !counts(&task) {
                continue;
            }
            // A thread may end between the two calls.
            let Ok(schedstat) = fs::read_to_string(task.join("schedstat")) else { continue };
            sum += first_number(&schedstat).with_context(|| format!("schedstat of {}: {schedstat:?}", self.name))?;
        }
        Ok(sum)
    }

    /// Resident memory in KiB.
    pub(super) fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(self.proc("status")).with_context(|| format!("status of {}", self.name))?;
        status.lines().find_map(|line| first_number(line.strip_prefix("VmRSS:")?)).context("no VmRSS")
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.child.id()))
    }

    /// The end of what it said on stderr.
    fn last_words(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(8)..].join("\n    ");
        if last.is_empty() { "it logged nothing".to_owned() } else { format!("it logged:\n    {last}") }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; either way there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time that the whole machine has spent on work so far, in nanoseconds, in steps of 10 ms.
pub(super) fn machine_cpu() -> Result<u64> {
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    busy(&stat).context("no cpu line in /proc/stat")
}

/// user, nice, system, (not idle, iowait), irq and softirq (proc_stat(5)), in units of 1/100 s.
fn busy(stat: &str) -> Option<u64> {
    const NANOS_PER_TICK: u64 = 10_000_000;
    let fields: Vec<u64> =
        stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields.as_slice() else { return None };
    Some((user + nice + system + irq + softirq) * NANOS_PER_TICK)
}

/// A port of 127.0.0.1 that is free now. Another may take it before it is used: try again then.
pub(super) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot bind a port of 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

/// Whether somebody listens there. Asks the kernel's table: a connection would be counted.
pub(super) fn listens(address: SocketAddrV4) -> bool {
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    is_listening(&table, address)
}

fn is_listening(table: &str, address: SocketAddrV4) -> bool {
    const TCP_LISTEN: &str = "0A";
    // The kernel prints an address as a number of the machine's byte order.
    let wanted = format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port());
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .any(|fields| matches!(fields.as_slice(), [_, local, _, state, ..] if *local == wanted && *state == TCP_LISTEN))
}

fn first_number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// A folder below the machine's temporary one. Dropping it removes it.
pub(super) struct TempDir(PathBuf);

impl TempDir {
    pub(super) fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("counterfoil-bench-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn write(&self, name: &str, contents: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::write(&path, contents).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn a_listener_is_found_in_the_kernel_s_table() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
        assert!(listens(address));
        drop(listener);
        // A child that another test is just starting holds a copy until it calls exec.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while listens(address) {
            assert!(std::time::Instant::now() < deadline, "still listens");
            std::thread::yield_now();
        }
    }

    #[test]
    fn idle_time_is_no_work() {
        assert_eq!(busy("cpu  1 2 3 1000 500 4 5 0 0 0\ncpu0 1 2 3\n"), Some(150_000_000));
        assert_eq!(busy("intr 1"), None);
        assert!(machine_cpu().unwrap() > 0);
    }

    #[test]
    fn a_program_that_ends_early_is_reported_with_its_words() {
        let directory = TempDir::new().unwrap();
        let mut shell = Command::new("sh");
        let mut process =
            Process::start("early", shell.args(["-c", "echo no such key >&2; exit 64"]), directory.path()).unwrap();
        let error = process.wait_for("it listened", |_| None::<()>).unwrap_err().to_string();
        assert!(error.contains("exit status: 64") && error.contains("no such key"), "{error}");
    }

    #[test]
    fn cpu_and_memory_of_a_running_program_are_read() {
        let directory = TempDir::new().unwrap();
        let mut process = Process::start("cat", &mut Command::new("cat"), directory.path()).unwrap();
        process.write("{\"awake\": true}").unwrap();
        let said: serde_json::Value = process.read().unwrap();
        assert_eq!(said["awake"], true);
        assert!(process.cpu().unwrap() > 0 && process.resident().unwrap() > 0);
        assert!(process.thread_cpu("cat").unwrap() > 0);
        assert_eq!(process.thread_cpu("dog").unwrap(), 0);
        assert!(process.finish().unwrap().success());
    }
}

//! Reading what the eBPF programs know: the only file that touches aya's maps and the iterators.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use aya::maps::MapError;
use counterfoil_common::{ABI_VERSION, Counter, PassHeader, SocketRecord, Walk as Whom};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use rustix::time::{ClockId, clock_getres, clock_gettime};

use super::convert::Ticks;
use super::error::chain;
use super::loader::{self, Loaded, Subject};
use super::sys::{self, Walk};
use super::{ViewError, capability};

/// As much as the kernel gives in one read.
const ITERATOR_BUFFER: usize = 32 * 1024;

/// One sweep over the tagged sockets.
pub(super) struct Sweep {
    pub(super) taken_ns: u64,
    pub(super) records: Vec<SocketRecord>,
    /// Sockets that found no room.
    pub(super) overflowed: u32,
    pub(super) ticks: Ticks,
}

impl Sweep {
    /// Adds sockets that were found after it. What was open before and after the sweep has a tag and is in it, or has none
    /// and is among these.
    pub(super) fn add(&mut self, late: impl IntoIterator<Item = SocketRecord>) {
        let swept: HashSet<u64> = self.records.iter().map(|record| record.cookie).collect();
        self.records.extend(late.into_iter().filter(|record| !swept.contains(&record.cookie)));
    }
}

/// What the programs did not do, since they were attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Misses {
    /// Runs of both tag programs that the kernel skipped, and tags that they could not store. A socket stays without a tag
    /// only if both programs missed it, so such a socket accounts for two.
    pub(super) tags: u64,
    /// Tags that a descriptor pass could not store.
    pub(super) adoptions: u64,
}

/// The loaded programs.
pub(super) struct Reader {
    loaded: Loaded,
    tick_ns: u64,
    max_sockets: u32,
}

impl Reader {
    /// Loads and attaches the programs.
    pub(super) fn open(subject: Subject<'_>, max_sockets: u32) -> Result<Self, ViewError> {
        Ok(Self { loaded: loader::load(subject, max_sockets)?, tick_ns: tick_ns(), max_sockets })
    }

    /// How many sockets a sweep has room for.
    pub(super) const fn max_sockets(&self) -> u32 {
        self.max_sockets
    }

    /// Hands the programs' own messages on to the log.
    pub(super) fn flush_log(&mut self) {
        self.loaded.logger.flush();
    }

    /// Walks all tagged sockets, in one system call if the kernel has a walk for them.
    pub(super) fn sweep(&mut self) -> Result<Sweep, ViewError> {
        let map = map_error("the header");
        let taken_ns = now_ns();
        self.loaded.pass.set(0, PassHeader::default(), 0).map_err(&map)?;
        let mut output = 0;
        for sweep in &self.loaded.sweeps {
            // The walk happens inside this one read, which has nothing to return: the records are in the array.
            output += sys::iterator_open(sweep.as_fd())
                .and_then(|mut iterator| iterator.read(&mut [0; 8]))
                .map_err(ViewError::io("sweeping the sockets"))?;
        }
        let pass = self.loaded.pass.get(&0, 0).map_err(map)?;
        let incomplete = |detail: &str| ViewError::Incomplete { what: "the sockets", detail: detail.to_owned() };
        if pass.complete as usize != self.loaded.sweeps.len() {
            return Err(incomplete("the walk did not reach its end"));
        }
        if pass.abi != ABI_VERSION {
            return Err(ViewError::Abi { object: pass.abi.to_string(), program: ABI_VERSION });
        }
        if output != 0 {
            return Err(incomplete("the walk was interrupted"));
        }
        let mut records = self.loaded.records.copy(pass.records as usize);
        // A walk can meet a socket again: tagged anew, or behind another descriptor. One record is as good as the other.
        let mut seen = HashSet::with_capacity(records.len());
        records.retain(|record| seen.insert(record.cookie));
        #[cfg(feature = "test-hooks")]
        super::lies::hide(super::Witness::Ebpf, &mut records);
        let ticks = Ticks::of_pass(&pass, self.tick_ns);
        Ok(Sweep { taken_ns, records, overflowed: pass.overflowed, ticks })
    }

    /// Reads the TCP sockets behind this process's descriptors, each once.
    pub(super) fn descriptors(&mut self) -> Result<Vec<SocketRecord>, ViewError> {
        // All threads share the first one's descriptors.
        self.behind(std::process::id())
    }

    /// Reads the sockets towards the peers that are behind another process's descriptors, each once, and the process's id in
    /// the initial pid namespace (0 if it has no descriptor). `thread` is one of its threads, which nearly always share them.
    pub(super) fn descriptors_of(&mut self, pid: u32, thread: u32) -> Result<(u32, Vec<SocketRecord>), ViewError> {
        let map = map_error("whose descriptors were walked");
        // Before Linux 6.1 all processes are walked, and the program leaves out the others: by the id in the initial pid
        // namespace, which is known here only if it is this one.
        let wanted = if self.loaded.walks_one { 0 } else { initial_pid(pid)? };
        self.loaded.walk.set(0, Whom { wanted, tgid: 0 }, 0).map_err(&map)?;
        let records = self.behind(thread)?;
        Ok((self.loaded.walk.get(&0, 0).map_err(map)?.tgid, records))
    }

    /// Tags the sockets towards the peers that a process connects from now on, by its id in the initial pid namespace.
    pub(super) fn watch(&mut self, tgid: u32) -> Result<(), ViewError> {
        self.loaded.targets.insert(tgid, 1, 0).map_err(map_error("the processes to watch"))
    }

    /// Ends what [`watch`](Self::watch) began.
    pub(super) fn unwatch(&mut self, tgid: u32) -> Result<(), ViewError> {
        self.loaded.targets.remove(&tgid).map_err(map_error("the processes to watch"))
    }

    fn behind(&self, task: u32) -> Result<Vec<SocketRecord>, ViewError> {
        if self.loaded.by_cookie {
            ask_cookies(task);
        }
        let mut records =
            self.walk_descriptors(task).map_err(ViewError::io("walking the descriptors"))?.ok_or_else(|| {
                ViewError::Incomplete { what: "the descriptors", detail: "the walk did not reach its end".to_owned() }
            })?;
        let mut seen = HashSet::with_capacity(records.len());
        records.retain(|record| seen.insert(record.cookie));
        Ok(records)
    }

    /// The records up to the one that marks the end; `None` if the output ends without it.
    fn walk_descriptors(&self, task: u32) -> io::Result<Option<Vec<SocketRecord>>> {
        let walk = if self.loaded.walks_one { Walk::Task(task) } else { Walk::Everything };
        let link = sys::iterator_link(self.loaded.descriptors.as_fd(), walk)?;
        let mut iterator = sys::iterator_open(link.as_fd())?;
        let mut output = Vec::new();
        let mut buffer = [0; ITERATOR_BUFFER];
        loop {
            let len = iterator.read(&mut buffer)?;
            output.extend_from_slice(&buffer[..len]);
            // The kernel ends a read after the mark. Linux 6.1 would begin anew in the next one.
            let tail = output.len().saturating_sub(size_of::<SocketRecord>());
            let last = sys::records(&output[tail..]).and_then(|mut last| last.pop());
            if last.is_some_and(|last| last.cookie == 0) {
                return Ok(sys::records(&output[..tail]));
            }
            if len == 0 {
                return Ok(None);
            }
        }
    }

    /// Tags the sockets with these cookies, as far as they are still behind a descriptor.
    pub(super) fn adopt(&mut self, cookies: &[u64]) -> Result<(), ViewError> {
        self.adopt_in(cookies, |reader| reader.descriptors().map(drop))
    }

    /// The same behind another process's descriptors; from then on they are its own.
    pub(super) fn adopt_of(&mut self, pid: u32, thread: u32, cookies: &[u64]) -> Result<(), ViewError> {
        self.adopt_in(cookies, |reader| reader.descriptors_of(pid, thread).map(drop))
    }

    fn adopt_in(
        &mut self,
        cookies: &[u64],
        pass: impl Fn(&mut Self) -> Result<(), ViewError>,
    ) -> Result<(), ViewError> {
        let map = map_error("the cookies");
        for cookies in cookies.chunks(self.max_sockets as usize) {
            for cookie in cookies {
                self.loaded.adopt.insert(cookie, 1, 0).map_err(&map)?;
            }
            let result = pass(self);
            for cookie in cookies {
                self.loaded.adopt.remove(cookie).map_err(&map)?;
            }
            result?;
        }
        Ok(())
    }

    /// Skipped runs and tags that could not be stored.
    pub(super) fn misses(&self) -> Result<Misses, ViewError> {
        let mut tags = self.counter(Counter::FailedFirst)? + self.counter(Counter::FailedSecond)?;
        for program in self.loaded.tag_programs {
            let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{program}"));
            tags += recursion_misses(&fdinfo.map_err(ViewError::io("reading /proc/self/fdinfo"))?);
        }
        Ok(Misses { tags, adoptions: self.counter(Counter::FailedAdopt)? })
    }

    /// Sum of a counter over all processors.
    fn counter(&self, counter: Counter) -> Result<u64, ViewError> {
        let per_cpu = self.loaded.counters.get(&(counter as u32), 0).map_err(map_error("the counters"))?;
        Ok(per_cpu.iter().sum())
    }
}

/// Has the kernel choose the cookies of a process's sockets that have none yet, as the programs cannot where tags are kept by
/// cookie. What may not be asked, or is closed meanwhile, stays without.
fn ask_cookies(task: u32) {
    let Some(pid) = i32::try_from(task).ok().and_then(Pid::from_raw) else { return };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let descriptors = fs::read_dir(format!("/proc/{task}/fd")).into_iter().flatten().flatten();
    for entry in descriptors {
        let is_socket = fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
        let number = entry.file_name().to_string_lossy().parse();
        if is_socket
            && let Ok(number) = number
            && let Ok(socket) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())
        {
            // It is for the kernel to remember.
            let _ = rustix::net::sockopt::socket_cookie(socket);
        }
    }
}

/// The same id, if this process is in the initial pid namespace.
fn initial_pid(pid: u32) -> Result<u32, ViewError> {
    /// `PROC_PID_INIT_INO` of the kernel's interface.
    const INITIAL: u64 = 0xEFFF_FFFC;
    let namespace = fs::metadata("/proc/self/ns/pid").map_err(ViewError::io("reading /proc/self/ns/pid"))?;
    if namespace.ino() == INITIAL {
        return Ok(pid);
    }
    Err(ViewError::Incomplete {
        what: "the descriptors of another process",
        detail: format!(
            "inside a pid namespace this takes Linux 6.1, and this is {}; start the watch outside of it",
            capability::release()
        ),
    })
}

fn map_error(what: &'static str) -> impl Fn(MapError) -> ViewError {
    move |error| ViewError::Incomplete { what, detail: chain(&error) }
}

/// `CLOCK_MONOTONIC` now, nanoseconds.
pub(super) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Nanoseconds of a kernel tick: the resolution of the coarse clock, which advances once per tick.
fn tick_ns() -> u64 {
    let tick = clock_getres(ClockId::MonotonicCoarse);
    tick.tv_sec.unsigned_abs() * 1_000_000_000 + tick.tv_nsec.unsigned_abs()
}

/// Runs that the kernel skipped, from a program's `fdinfo`; kernels before 5.12 do not count them.
fn recursion_misses(fdinfo: &str) -> u64 {
    let value = fdinfo.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_misses_of_a_program() {
        assert_eq!(recursion_misses("prog_type:\t26\nrecursion_misses:\t17\nverified_insns:\t5\n"), 17);
        assert_eq!(recursion_misses("prog_type:\t26\n"), 0);
    }

    #[test]
    fn a_tick_is_between_one_and_ten_milliseconds() {
        assert!((999_000..=10_000_001).contains(&tick_ns()), "{}", tick_ns());
    }
}

//! The eBPF view: the only file that reads aya's maps and iterators.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use counterfoil_common::{ABI_VERSION, Counter, PassHeader, SocketRecord};
use rustix::time::{ClockId, clock_getres, clock_gettime};

use super::convert::{self, Ticks};
use super::listeners::Listeners;
use super::loader::{self, Loaded};
use super::netlink::SockDiag;
use super::{Crosscheck, KernelSnapshot, KernelSocket, KernelView, Source, TcpState, ViewError, sys};

/// As much as the kernel gives in one read.
const ITERATOR_BUFFER: usize = 32 * 1024;

/// One sweep over the tagged sockets.
pub(super) struct Sweep {
    pub(super) taken_ns: u64,
    pub(super) records: Vec<SocketRecord>,
    /// Sockets that found no room.
    pub(super) overflowed: u32,
    ticks: Ticks,
}

/// The kernel's view through eBPF.
pub(super) struct EbpfView {
    loaded: Loaded,
    pub(super) listeners: Listeners,
    /// The second witness, if this kernel has one.
    pub(super) diag: Option<SockDiag>,
    /// The network namespace that `diag` sees.
    pub(super) netns: u32,
    tick_ns: u64,
    max_sockets: u32,
    /// Sockets that only cross-checks found.
    found: u64,
    /// What was missed, at the last cross-check.
    checked_at: u64,
    /// Verdict of the last cross-check.
    uncertain: Option<String>,
}

impl EbpfView {
    /// Loads the programs and takes up the sockets that are open already.
    pub(super) fn open(listeners: &[SocketAddr], max_sockets: u32) -> Result<Self, ViewError> {
        let loaded = loader::load(max_sockets)?;
        let diag = SockDiag::open().inspect_err(|error| tracing::info!(%error, "no second witness")).ok();
        let netns =
            fs::metadata("/proc/thread-self/ns/net").map_err(ViewError::io("reading /proc/thread-self/ns/net"))?.ino();
        let mut view = Self {
            loaded,
            listeners: Listeners::new(listeners),
            diag,
            // Namespace inodes are 32 bits wide in the kernel.
            netns: netns as u32,
            tick_ns: tick_ns(),
            max_sockets,
            found: 0,
            checked_at: 0,
            uncertain: None,
        };
        // Nobody could have tagged what was open before: finding it now is no miss.
        let (seed, _) = view.compare()?;
        view.settle(Crosscheck { found: Vec::new(), ..seed })?;
        Ok(view)
    }

    /// Walks all tagged sockets in one system call.
    pub(super) fn sweep(&mut self) -> Result<Sweep, ViewError> {
        let map = |error: aya::maps::MapError| ViewError::Incomplete { what: "the header", detail: error.to_string() };
        let taken_ns = now_ns();
        self.loaded.pass.set(0, PassHeader::default(), 0).map_err(map)?;
        // The walk happens inside this one read, which has nothing to return: the records are in the array.
        let output = sys::iterator_open(self.loaded.sweep.as_fd())
            .and_then(|mut iterator| iterator.read(&mut [0; 8]))
            .map_err(ViewError::io("sweeping the sockets"))?;
        let pass = self.loaded.pass.get(&0, 0).map_err(map)?;
        let incomplete = |detail: &str| ViewError::Incomplete { what: "the sockets", detail: detail.to_owned() };
        if pass.complete != 1 {
            return Err(incomplete("the walk did not reach its end"));
        }
        if pass.abi != ABI_VERSION {
            return Err(ViewError::Abi { object: pass.abi.to_string(), program: ABI_VERSION });
        }
        if output != 0 {
            return Err(incomplete("the walk was interrupted"));
        }
        let mut records = self.loaded.records.copy(pass.records as usize);
        // The walk can meet a socket again if it is tagged anew during it; the later record is as good.
        let mut seen = HashSet::with_capacity(records.len());
        records.retain(|record| seen.insert(record.cookie));
        let ticks = Ticks::of_pass(&pass, self.tick_ns);
        Ok(Sweep { taken_ns, records, overflowed: pass.overflowed, ticks })
    }

    /// Reads the TCP sockets behind this process's descriptors, each once.
    pub(super) fn descriptors(&mut self) -> Result<Vec<SocketRecord>, ViewError> {
        let mut records =
            self.walk_descriptors().map_err(ViewError::io("walking the descriptors"))?.ok_or_else(|| {
                ViewError::Incomplete { what: "the descriptors", detail: "the walk did not reach its end".to_owned() }
            })?;
        let mut seen = HashSet::with_capacity(records.len());
        records.retain(|record| seen.insert(record.cookie));
        Ok(records)
    }

    /// The records up to the one that marks the end; `None` if the output ends without it.
    fn walk_descriptors(&self) -> io::Result<Option<Vec<SocketRecord>>> {
        let mut iterator = sys::iterator_open(self.loaded.descriptors.as_fd())?;
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
    pub(super) fn adopt(&mut self, cookies: impl Iterator<Item = u64>) -> Result<(), ViewError> {
        let map = |error: aya::maps::MapError| ViewError::Incomplete { what: "the cookies", detail: error.to_string() };
        let mut given = Vec::new();
        for cookie in cookies {
            self.loaded.adopt.insert(cookie, 1, 0).map_err(map)?;
            given.push(cookie);
        }
        let result = self.descriptors().map(drop);
        for cookie in given {
            self.loaded.adopt.remove(&cookie).map_err(map)?;
        }
        result
    }

    /// Skipped runs, tags that could not be stored, and sockets found late.
    fn missed(&self) -> Result<u64, ViewError> {
        let mut sum = self.found;
        for program in self.loaded.tag_programs {
            sum += recursion_misses(
                &fs::read_to_string(format!("/proc/self/fdinfo/{program}"))
                    .map_err(ViewError::io("reading a program's statistics in /proc/self/fdinfo"))?,
            );
        }
        for counter in [Counter::FailedFirst, Counter::FailedSecond, Counter::FailedAdopt] {
            let per_cpu = self
                .loaded
                .counters
                .get(&(counter as u32), 0)
                .map_err(|error| ViewError::Incomplete { what: "the counters", detail: error.to_string() })?;
            sum += per_cpu.iter().sum::<u64>();
        }
        Ok(sum)
    }

    /// Remembers a cross-check's verdict.
    fn settle(&mut self, check: Crosscheck) -> Result<Crosscheck, ViewError> {
        self.found += check.found.len() as u64;
        self.checked_at = self.missed()?;
        self.uncertain = match (&check.disagreement, check.found.len()) {
            (Some(reason), _) => Some(reason.clone()),
            (None, 0) => None,
            (None, found) => Some(format!("{found} connected sockets had been missed; taken up, to be confirmed")),
        };
        if let Some(reason) = &self.uncertain {
            tracing::warn!(reason, "the kernel view is uncertain");
        }
        Ok(check)
    }

    fn finish(&self, sweep: Sweep) -> Result<KernelSnapshot, ViewError> {
        let sockets = sweep.records.iter().map(|record| convert::socket(record, sweep.ticks));
        // A socket taken up before it was connected may have become a listener.
        let outgoing =
            |socket: &Result<KernelSocket, _>| socket.as_ref().map_or(true, |socket| socket.state != TcpState::Listen);
        let overflow = (sweep.overflowed > 0).then(|| {
            format!("{} sockets more than `kernel.max_sockets` = {} allows", sweep.overflowed, self.max_sockets)
        });
        Ok(KernelSnapshot {
            taken_ns: sweep.taken_ns,
            sockets: sockets.filter(outgoing).collect::<Result<_, _>>()?,
            missed: self.missed()?,
            uncertain: overflow.or_else(|| self.uncertain.clone()),
        })
    }
}

impl KernelView for EbpfView {
    fn source(&self) -> Source {
        Source::Ebpf
    }

    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
        self.loaded.logger.flush();
        let sweep = if self.uncertain.is_some() || self.missed()? != self.checked_at {
            let (check, sweep) = self.compare()?;
            self.settle(check)?;
            sweep
        } else {
            self.sweep()?
        };
        self.finish(sweep)
    }

    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
        let (check, _) = self.compare()?;
        self.settle(check)
    }
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

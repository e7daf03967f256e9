//! Other processes through eBPF: their sockets are tagged when they connect, whatever namespaces they live in.
//!
//! The program knows a process by its id in the initial pid namespace. A watcher in another one learns that id from a walk
//! over the descriptors of the process, which the kernel finds by the id that the watcher knows.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;

use counterfoil_common::{SocketRecord, flags};

use super::super::loader::Subject;
use super::super::peers::Peers;
use super::super::reader::{Misses, Reader, Sweep};
use super::super::view::{is_listening, verdict};
use super::super::{
    Crosscheck, Destroyed, KernelSnapshot, KernelSocket, KernelView, Source, TcpState, ViewError, convert,
};
use super::namespace::Namespaces;
use super::process::{self, Process};
use super::who::{Finder, Who};

/// The view of other processes through eBPF.
pub(in super::super) struct EbpfBeside {
    pub(super) reader: Reader,
    finder: Finder,
    pub(super) namespaces: Namespaces,
    pub(super) peers: Peers,
    /// How often each witness was named as the liar, by [`Witness`](super::super::Witness).
    pub(super) named: [u64; 3],
    /// The processes that are there, the oldest first, with their ids in the initial pid namespace; 0 until it is known.
    pub(super) watched: BTreeMap<Process, u32>,
    /// Tagged sockets whose owner has ended, and that no watched process holds.
    strangers: HashSet<u64>,
    /// Sockets that were found without a tag, in all.
    found: u64,
    /// Those of the last time, so that one that cannot be tagged counts once.
    last_found: HashSet<u64>,
    /// What was missed when the descriptors were last searched for sockets without a tag.
    searched_at: Misses,
    /// Why the view is not to be acted on.
    uncertain: Option<String>,
}

impl EbpfBeside {
    /// Loads the programs and takes up the sockets that are open already.
    ///
    /// # Errors
    /// eBPF cannot be had, or there is no such process.
    pub(in super::super) fn open(who: &Who, peers: &[SocketAddr], max_sockets: u32) -> Result<Self, ViewError> {
        let finder = Finder::new(who)?;
        let peers = Peers::new(peers);
        let reader = Reader::open(Subject::Others(&peers), max_sockets)?;
        let mut view = Self {
            reader,
            finder,
            namespaces: Namespaces::new()?,
            peers,
            named: [0; 3],
            watched: BTreeMap::new(),
            strangers: HashSet::new(),
            found: 0,
            last_found: HashSet::new(),
            searched_at: Misses::default(),
            uncertain: None,
        };
        view.crosscheck()?;
        Ok(view)
    }

    /// Takes up the processes that have come, with the sockets that they have open, and leaves those that have gone.
    pub(super) fn follow(&mut self) -> Result<(), ViewError> {
        let now = self.finder.find()?;
        let gone: Vec<Process> = self.watched.keys().filter(|process| !now.contains(process)).copied().collect();
        for process in gone {
            self.leave(process)?;
            // Opened again when they are needed: each keeps its namespace alive.
            self.namespaces.keep(&HashSet::new());
        }
        // One without any descriptor is asked again: its id is not known yet.
        let new: Vec<Process> =
            now.into_iter().filter(|process| self.watched.get(process).is_none_or(|tgid| *tgid == 0)).collect();
        for process in new {
            let Some((tgid, _)) = self.walk(process)? else { continue };
            self.watched.insert(process, tgid);
            if tgid != 0 {
                self.reader.watch(tgid)?;
                // What was connected before has no tag and was not missed; what is connected from now on gets one.
                self.take_up(process)?;
                self.strangers.clear();
            }
        }
        Ok(())
    }

    fn leave(&mut self, process: Process) -> Result<(), ViewError> {
        match self.watched.remove(&process) {
            // Another one may have got the same id since.
            Some(tgid) if tgid != 0 && !self.watched.values().any(|other| *other == tgid) => self.reader.unwatch(tgid),
            _ => Ok(()),
        }
    }

    /// The process's id in the initial pid namespace and its sockets towards the peers; `None` if it has ended.
    pub(super) fn walk(&mut self, process: Process) -> Result<Option<(u32, Vec<SocketRecord>)>, ViewError> {
        let mut of_all: HashMap<u64, SocketRecord> = HashMap::new();
        let mut id = 0;
        for thread in process::threads(process.pid)? {
            let (tgid, records) = self.reader.descriptors_of(process.pid, thread)?;
            id = tgid.max(id);
            of_all.extend(records.into_iter().map(|record| (record.cookie, record)));
        }
        Ok(process::is_alive(process)?.then(|| (id, of_all.into_values().collect())))
    }

    /// Makes sockets the process's own, as far as it still has a descriptor of them.
    fn adopt(&mut self, process: Process, cookies: &[u64]) -> Result<(), ViewError> {
        for thread in process::threads(process.pid)? {
            self.reader.adopt_of(process.pid, thread, cookies)?;
        }
        Ok(())
    }

    /// Tags the process's sockets that have no tag, and returns them.
    fn take_up(&mut self, process: Process) -> Result<Vec<SocketRecord>, ViewError> {
        let Some((tgid, records)) = self.walk(process)? else { return Ok(Vec::new()) };
        let untagged = records.into_iter().filter(|record| record.flags & flags::TAGGED == 0 && !is_listening(record));
        let found: Vec<_> = untagged.map(|record| SocketRecord { owner: tgid, ..record }).collect();
        if !found.is_empty() {
            self.adopt(process, &found.iter().map(|record| record.cookie).collect::<Vec<_>>())?;
        }
        Ok(found)
    }

    /// Searches the descriptors of all processes for sockets without a tag, and judges what that means.
    ///
    /// `doubt` is what speaks against the view already.
    pub(super) fn search(&mut self, began: Misses, doubt: Option<&str>) -> Result<Vec<SocketRecord>, ViewError> {
        let mut found = Vec::new();
        for process in self.processes() {
            found.extend(self.take_up(process)?);
        }
        let cookies: HashSet<u64> = found.iter().map(|record| record.cookie).collect();
        let new = cookies.difference(&self.last_found).count() as u64;
        let ended = self.reader.misses()?;
        let before = std::mem::replace(&mut self.uncertain, verdict(new, self.searched_at, began, ended, doubt));
        self.found += new;
        self.last_found = cookies;
        self.searched_at = began;
        // Once, not with each sweep.
        if let Some(reason) = self.uncertain.as_ref().filter(|reason| before.as_ref() != Some(*reason)) {
            tracing::warn!(reason, "the kernel view is uncertain");
        }
        Ok(found)
    }

    /// Events missed since the descriptors were last searched for sockets without a tag.
    pub(super) fn missed_since_search(&self) -> Result<u64, ViewError> {
        Ok(self.reader.misses()?.tags.saturating_sub(self.searched_at.tags))
    }

    pub(super) fn processes(&self) -> Vec<Process> {
        self.watched.keys().copied().collect()
    }

    /// Held sockets whose owner has ended go to the oldest watched process that has a descriptor of them.
    fn inherit(&mut self, sweep: &mut Sweep) -> Result<(), ViewError> {
        let owners: BTreeSet<u32> = self.watched.values().copied().collect();
        let swept: HashSet<u64> = sweep.records.iter().map(|record| record.cookie).collect();
        self.strangers.retain(|cookie| swept.contains(cookie));
        let is_left = |record: &SocketRecord| is_held(record) && !owners.contains(&record.owner);
        let mut left: HashSet<u64> =
            sweep.records.iter().filter(|record| is_left(record)).map(|record| record.cookie).collect();
        left.retain(|cookie| !self.strangers.contains(cookie));
        if left.is_empty() {
            return Ok(());
        }
        let mut heirs: HashMap<u64, u32> = HashMap::new();
        for process in self.processes() {
            let Some((tgid, records)) = self.walk(process)? else { continue };
            let inherited: Vec<u64> =
                records.iter().map(|record| record.cookie).filter(|cookie| left.remove(cookie)).collect();
            if !inherited.is_empty() {
                self.adopt(process, &inherited)?;
                heirs.extend(inherited.into_iter().map(|cookie| (cookie, tgid)));
            }
        }
        self.strangers.extend(left);
        for record in &mut sweep.records {
            record.owner = heirs.get(&record.cookie).copied().unwrap_or(record.owner);
        }
        Ok(())
    }

    fn finish(&self, sweep: &Sweep) -> Result<KernelSnapshot, ViewError> {
        let pids: HashMap<u32, u32> = self.watched.iter().map(|(process, tgid)| (*tgid, process.pid)).collect();
        let mut sockets = Vec::new();
        for record in &sweep.records {
            let owner = pids.get(&record.owner).copied().unwrap_or(0);
            // Without an owner it is somebody else's, or the kernel is finishing what a process that has ended left.
            if owner != 0 || !is_held(record) {
                sockets.push(KernelSocket { owner, ..convert::socket(record, sweep.ticks)? });
            }
        }
        sockets.retain(|socket| socket.state != TcpState::Listen);
        let (overflowed, max) = (sweep.overflowed, self.reader.max_sockets());
        let overflow =
            (overflowed > 0).then(|| format!("{overflowed} sockets more than the {max} that there is room for"));
        let misses = self.reader.misses()?;
        Ok(KernelSnapshot {
            taken_ns: sweep.taken_ns,
            sockets,
            processes: self.processes(),
            missed: misses.tags + misses.adoptions + self.found,
            uncertain: overflow.or_else(|| self.uncertain.clone()),
        })
    }
}

impl KernelView for EbpfBeside {
    fn source(&self) -> Source {
        Source::Ebpf
    }

    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
        self.reader.flush_log();
        if self.uncertain.is_some() {
            self.crosscheck()?;
        }
        self.follow()?;
        let mut sweep = self.reader.sweep()?;
        // After the sweep: a socket that it lacks because it was missed is counted by now.
        let misses = self.reader.misses()?;
        if misses != self.searched_at {
            sweep.add(self.search(misses, None)?);
        }
        self.inherit(&mut sweep)?;
        self.finish(&sweep)
    }

    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
        self.compare()
    }

    fn destroy(&mut self, socket: &KernelSocket) -> Result<Destroyed, ViewError> {
        for process in self.processes() {
            if self.namespaces.of(process.pid)? == Some(socket.netns) {
                break;
            }
        }
        self.namespaces.destroy(socket)
    }
}

fn is_held(record: &SocketRecord) -> bool {
    record.flags & flags::HELD != 0
}

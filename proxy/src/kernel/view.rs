//! The eBPF view: when a snapshot may be trusted, and what to do when not.

use std::collections::HashSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;

use counterfoil_common::{SocketRecord, flags};

use super::listeners::Listeners;
use super::loader::Subject;
use super::netlink::SockDiag;
use super::reader::{Misses, Reader, Sweep, now_ns};
use super::{Crosscheck, KernelSnapshot, KernelView, Source, TcpState, ViewError, convert};

/// The kernel's view through eBPF.
pub(super) struct EbpfView {
    pub(super) reader: Reader,
    pub(super) listeners: Listeners,
    /// How often each witness was named as the liar, by [`Witness`](super::Witness).
    pub(super) named: [u64; 3],
    /// The second witness, if this kernel has one.
    pub(super) diag: Option<SockDiag>,
    /// The network namespace that `diag` sees.
    pub(super) netns: u32,
    /// Sockets that were found without a tag, in all.
    found: u64,
    /// Those of the last time, so that one that cannot be tagged counts once.
    last_found: HashSet<u64>,
    /// What was missed when the descriptors were last searched for sockets without a tag.
    searched_at: Misses,
    /// Why the view is not to be acted on.
    uncertain: Option<String>,
}

/// Sockets without a tag, read before they were tagged.
pub(super) struct TakenUp {
    /// Connected: they were missed.
    pub(super) found: Vec<SocketRecord>,
    /// Never connected.
    pub(super) unconnected: Vec<SocketRecord>,
}

impl EbpfView {
    /// Loads the programs and takes up the sockets that are open already.
    pub(super) fn open(listeners: &[SocketAddr], max_sockets: u32) -> Result<Self, ViewError> {
        let reader = Reader::open(Subject::Itself, max_sockets)?;
        let diag = SockDiag::open().inspect_err(|error| tracing::info!(%error, "no second witness")).ok();
        let netns =
            fs::metadata("/proc/thread-self/ns/net").map_err(ViewError::io("reading /proc/thread-self/ns/net"))?.ino();
        let mut view = Self {
            reader,
            listeners: Listeners::new(listeners),
            named: [0; 3],
            diag,
            // Namespace inodes are 32 bits wide in the kernel.
            netns: netns as u32,
            found: 0,
            last_found: HashSet::new(),
            searched_at: Misses::default(),
            uncertain: None,
        };
        // Nobody could have tagged what was open before, so what is found now was not missed.
        let descriptors = view.reader.descriptors()?;
        view.take_up(&descriptors)?;
        view.crosscheck()?;
        Ok(view)
    }

    /// Tags the outgoing sockets among `descriptors` that have no tag.
    ///
    /// A connected socket without a tag was missed, whenever it is seen: the tag is stored before the state changes.
    pub(super) fn take_up(&mut self, descriptors: &[SocketRecord]) -> Result<TakenUp, ViewError> {
        let listening = descriptors.iter().filter(|record| is_listening(record)).map(convert::local);
        self.listeners.saw(listening, now_ns());
        let untagged = descriptors.iter().filter(|record| record.flags & flags::TAGGED == 0);
        let (unconnected, found) = untagged.filter(|record| self.is_outgoing(record)).partition(|record| {
            TcpState::from_kernel(record.state) == Some(TcpState::Close) && record.remote_port == 0
        });
        let taken_up = TakenUp { found, unconnected };
        let cookies = taken_up.cookies();
        if !cookies.is_empty() {
            self.reader.adopt(&cookies)?;
        }
        Ok(taken_up)
    }

    /// Closes a search of the descriptors that began when `began` had been missed.
    pub(super) fn settle(&mut self, taken_up: &TakenUp, began: Misses, doubt: Option<&str>) -> Result<(), ViewError> {
        let now = self.reader.misses()?;
        let found: HashSet<u64> = taken_up.found.iter().map(|record| record.cookie).collect();
        let new = found.difference(&self.last_found).count() as u64;
        let before = std::mem::replace(&mut self.uncertain, verdict(new, self.searched_at, began, now, doubt));
        self.found += new;
        self.last_found = found;
        self.searched_at = began;
        // Once, not with each sweep.
        if let Some(reason) = self.uncertain.as_ref().filter(|reason| before.as_ref() != Some(*reason)) {
            tracing::warn!(reason, "the kernel view is uncertain");
        }
        Ok(())
    }

    /// Events missed since the descriptors were last searched for sockets without a tag.
    pub(super) fn missed_since_search(&self) -> Result<u64, ViewError> {
        Ok(self.reader.misses()?.tags.saturating_sub(self.searched_at.tags))
    }

    /// Whether this process opened the socket to connect it. One with a tag it did; without, it must be no listener and
    /// not accepted by one.
    pub(super) fn is_outgoing(&self, record: &SocketRecord) -> bool {
        record.flags & flags::TAGGED != 0 || !is_listening(record) && !self.listeners.accepted(convert::local(record))
    }

    fn finish(&self, sweep: &Sweep) -> Result<KernelSnapshot, ViewError> {
        // Room for all at once: a list that grows by doubling would take three times the memory.
        let mut sockets = Vec::with_capacity(sweep.records.len());
        for record in &sweep.records {
            let socket = convert::socket(record, sweep.ticks)?;
            // A socket taken up before it was connected may have become a listener.
            if socket.state != TcpState::Listen {
                sockets.push(socket);
            }
        }
        let (overflowed, max) = (sweep.overflowed, self.reader.max_sockets());
        let overflow =
            (overflowed > 0).then(|| format!("{overflowed} sockets more than `kernel.max_sockets` = {max} allows"));
        let misses = self.reader.misses()?;
        Ok(KernelSnapshot {
            taken_ns: sweep.taken_ns,
            sockets,
            processes: Vec::new(),
            missed: misses.tags + misses.adoptions + self.found,
            uncertain: overflow.or_else(|| self.uncertain.clone()),
        })
    }
}

impl TakenUp {
    fn cookies(&self) -> Vec<u64> {
        self.found.iter().chain(&self.unconnected).map(|record| record.cookie).collect()
    }
}

impl KernelView for EbpfView {
    fn source(&self) -> Source {
        Source::Ebpf
    }

    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
        self.reader.flush_log();
        if self.uncertain.is_some() {
            self.crosscheck()?;
        }
        let mut sweep = self.reader.sweep()?;
        // After the sweep: a socket that it lacks because it was missed is counted by now.
        let misses = self.reader.misses()?;
        if misses != self.searched_at {
            let descriptors = self.reader.descriptors()?;
            let taken_up = self.take_up(&descriptors)?;
            self.settle(&taken_up, misses, None)?;
            sweep.add(taken_up.found.into_iter().chain(taken_up.unconnected));
        }
        self.finish(&sweep)
    }

    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
        self.compare()
    }
}

/// Why a view is not to be acted on after a search that found `found` connected sockets without a tag.
///
/// One that was missed by both programs, and counted by both, is in order: the view knew of the miss and has the socket
/// now. One that nothing accounts for says that the view does not know what it misses.
pub(super) fn verdict(
    found: u64,
    last_search: Misses,
    began: Misses,
    ended: Misses,
    doubt: Option<&str>,
) -> Option<String> {
    let missed = ended.tags.saturating_sub(last_search.tags);
    match doubt {
        Some(reason) => Some(reason.to_owned()),
        None if ended.adoptions != began.adoptions => Some("the kernel has no memory for tags".to_owned()),
        None if missed < 2 * found => {
            Some(format!("{found} connected sockets without a tag, which {missed} missed events do not explain"))
        }
        None => None,
    }
}

pub(super) fn is_listening(record: &SocketRecord) -> bool {
    TcpState::from_kernel(record.state) == Some(TcpState::Listen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn misses(tags: u64) -> Misses {
        Misses { tags, adoptions: 0 }
    }

    #[test]
    fn a_found_socket_must_have_been_missed_twice() {
        let verdict = |found, missed: u64| verdict(found, misses(10), misses(10 + missed), misses(10 + missed), None);
        assert_eq!(verdict(0, 0), None);
        assert_eq!(verdict(0, 5), None, "most misses are of other events");
        assert_eq!(verdict(2, 4), None);
        let reason = "2 connected sockets without a tag, which 3 missed events do not explain";
        assert_eq!(verdict(2, 3).as_deref(), Some(reason));
    }

    #[test]
    fn misses_during_the_search_explain_too() {
        assert_eq!(verdict(1, misses(0), misses(0), misses(2), None), None);
    }

    #[test]
    fn memory_and_witnesses_weigh_more() {
        let full = Misses { tags: 9, adoptions: 1 };
        assert_eq!(verdict(1, misses(0), misses(9), full, None).as_deref(), Some("the kernel has no memory for tags"));
        let doubt = "they disagree";
        assert_eq!(verdict(0, misses(0), misses(0), full, Some(doubt)).as_deref(), Some(doubt));
    }
}

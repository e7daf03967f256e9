//! From what the witnesses were read to say, one after the other while connections come and go, to what it proves.
//!
//! Nothing is stopped for a comparison, so each rule needs no clock but only order. The readings are nested: descriptors
//! (by the eBPF iterator), `/proc`, sweep, dump and descriptors, sweep, `/proc`, descriptors. Whoever is read twice speaks
//! for the time between.
//!
//! * A socket that the sweeps around the dump have in a hashed state was hashed during it: the dump must have it, or the
//!   look-up of exactly this socket. So must it have one that `/proc` shows connected before and after.
//! * A connected socket behind a descriptor before the first sweep and after the second was held during both, and tagged:
//!   both must have it.
//! * A descriptor that the iterator meets before the first reading of `/proc` and after the second was there during both.
//! * A socket held in both sweeps, with no descriptor between them, is held by somebody else.
//!
//! What a witness cannot know counts neither for nor against it: `sock_diag` has no socket in state CLOSE and none of
//! another network namespace, `/proc` none that another process holds, eBPF none that was never connected.

use std::collections::{BTreeMap, HashMap, HashSet};

use counterfoil_common::{SocketRecord, flags};

use super::TcpState;
use super::witness::{Says, Testimony, Witness};

/// Sockets by cookie.
pub(super) type Records = HashMap<u64, SocketRecord>;

/// Everything that was read for one comparison. Pairs are before and after.
#[derive(Clone, Debug, Default)]
pub(super) struct Readings {
    /// Outgoing sockets behind descriptors of the process, by the eBPF iterator.
    pub(super) descriptors: [Records; 2],
    /// Outgoing sockets behind descriptors, with their states, by `/proc`; none: it could not be read.
    pub(super) proc_fd: Option<[HashMap<u64, TcpState>; 2]>,
    /// Sockets behind descriptors of the process, by the iterator between the two sweeps.
    pub(super) between: HashSet<u64>,
    /// Tagged sockets.
    pub(super) sweeps: [Records; 2],
    /// What `sock_diag` has, and whether some descriptor holds it; none: it could not be asked.
    pub(super) dump: Option<HashMap<u64, bool>>,
    /// Sockets that were looked up one by one, as the dump steps over some while others come and go. Answers are in `dump`.
    pub(super) looked_up: HashSet<u64>,
    /// The network namespaces that `sock_diag` sees.
    pub(super) netns: HashSet<u32>,
}

impl Readings {
    /// What each witness says of each socket, as far as it is proven.
    pub(super) fn testimonies(&self) -> BTreeMap<u64, Testimony> {
        let [first, second] = &self.sweeps;
        let swept = first.keys().filter(|cookie| second.contains_key(cookie));
        let listed = self.proc_fd.iter().flat_map(|[before, _]| before.keys());
        swept.chain(listed).map(|cookie| (*cookie, self.testimony(*cookie))).collect()
    }

    /// Sockets that somebody else holds: held in both sweeps, and between them without a descriptor of this process.
    pub(super) fn held_elsewhere(&self) -> Vec<u64> {
        let swept = self.sweeps[0].keys().copied().filter(|cookie| self.is_swept(*cookie));
        swept.filter(|cookie| !self.between.contains(cookie)).collect()
    }

    /// What `sock_diag` should have by what was read before the dump, or be asked for.
    pub(super) fn due(&self) -> Vec<SocketRecord> {
        let [swept, _] = &self.sweeps;
        let listed = self.proc_fd.iter().flat_map(|[before, _]| before.keys());
        let unswept = listed.filter(|cookie| !swept.contains_key(cookie));
        let records = swept.values().chain(unswept.filter_map(|cookie| self.descriptors[0].get(cookie)));
        records
            .filter(|record| {
                is_connected(record) && self.netns.contains(&record.netns) && !self.is_dumped(record.cookie)
            })
            .copied()
            .collect()
    }

    fn testimony(&self, cookie: u64) -> Testimony {
        let mut testimony = Testimony::default();
        testimony[Witness::Ebpf as usize] = self.ebpf(cookie);
        testimony[Witness::SockDiag as usize] = self.sock_diag(cookie);
        testimony[Witness::ProcFd as usize] = self.proc_fd(cookie);
        testimony
    }

    fn ebpf(&self, cookie: u64) -> Says {
        match self.states_listed(cookie) {
            _ if self.is_swept(cookie) => Says::Present,
            // Connected before the sweeps, and open after them.
            Some([before, _]) if before.is_hashed() => Says::Absent,
            _ => Says::Unknown,
        }
    }

    fn sock_diag(&self, cookie: u64) -> Says {
        if self.dump.is_none() {
            return Says::Unknown;
        }
        if self.is_dumped(cookie) {
            return Says::Present;
        }
        let hashed = self.was_hashed(cookie);
        if hashed && self.looked_up.contains(&cookie) { Says::Absent } else { Says::Unknown }
    }

    fn proc_fd(&self, cookie: u64) -> Says {
        let Some(listed) = &self.proc_fd else { return Says::Unknown };
        if listed.iter().all(|sockets| sockets.contains_key(&cookie)) {
            return Says::Present;
        }
        let has_descriptor = self.descriptors.iter().all(|records| records.contains_key(&cookie));
        if has_descriptor { Says::Absent } else { Says::Unknown }
    }

    /// Held in both sweeps.
    fn is_swept(&self, cookie: u64) -> bool {
        let held = |records: &Records| records.get(&cookie).is_some_and(|record| record.flags & flags::HELD != 0);
        self.sweeps.iter().all(held)
    }

    /// A row without inode is of a socket that nobody holds.
    fn is_dumped(&self, cookie: u64) -> bool {
        self.dump.as_ref().is_some_and(|dump| dump.get(&cookie) == Some(&true))
    }

    /// In the kernel's table from before the dump until after it.
    fn was_hashed(&self, cookie: u64) -> bool {
        let swept = || {
            let [before, after] = [self.sweeps[0].get(&cookie)?, self.sweeps[1].get(&cookie)?];
            // The same connection: a socket may be connected again after the first one failed.
            Some(is_connected(before) && is_hashed(after) && before.opened_ns == after.opened_ns)
        };
        let listed = || {
            let [before, after] = self.states_listed(cookie)?;
            Some(before != TcpState::SynSent && before.is_hashed() && after.is_hashed())
        };
        self.is_swept(cookie) && swept() == Some(true) || listed() == Some(true)
    }

    fn states_listed(&self, cookie: u64) -> Option<[TcpState; 2]> {
        let [before, after] = self.proc_fd.as_ref()?;
        Some([*before.get(&cookie)?, *after.get(&cookie)?])
    }
}

/// Takes back what eBPF says of as many sockets that it lacks as it says itself that it missed: a socket without a tag was
/// missed by both tag programs, and counted by both. First those of which `sock_diag` says anything, since they could get
/// somebody named.
pub(super) fn excuse(testimonies: &mut BTreeMap<u64, Testimony>, missed: u64) {
    let mut lacking: Vec<&mut Testimony> =
        testimonies.values_mut().filter(|testimony| testimony[Witness::Ebpf as usize] == Says::Absent).collect();
    lacking.sort_by_key(|testimony| testimony[Witness::SockDiag as usize] == Says::Unknown);
    let admitted = usize::try_from(missed / 2).unwrap_or(usize::MAX);
    for testimony in lacking.into_iter().take(admitted) {
        testimony[Witness::Ebpf as usize] = Says::Unknown;
    }
}

/// Hashed for certain: `connect()` changes the state to SYN_SENT a little before it puts the socket into the table.
fn is_connected(record: &SocketRecord) -> bool {
    is_hashed(record) && TcpState::from_kernel(record.state) != Some(TcpState::SynSent)
}

fn is_hashed(record: &SocketRecord) -> bool {
    TcpState::from_kernel(record.state).is_some_and(TcpState::is_hashed)
}

#[cfg(test)]
#[path = "evidence_tests.rs"]
mod tests;

//! Comparing the eBPF view of other processes with its two witnesses.
//!
//! It is the comparison of `evidence.rs`, over all watched processes together: their `/proc/PID/fd`, and `sock_diag` in each
//! of their network namespaces. Nobody else's descriptors can be asked, so `/proc` names inodes, and whose cookies they are
//! and in which state is what any other reading says; that alone cannot make `/proc` agree with it, as the inode must be
//! behind a descriptor.

use std::collections::{HashMap, HashSet};

use counterfoil_common::SocketRecord;

use super::super::crosscheck::{Gathered, by_cookie, find, heard, judge, look_up};
use super::super::evidence::{Readings, Records};
use super::super::netlink::Row;
use super::super::{Crosscheck, TcpState, ViewError};
use super::ebpf::EbpfBeside;
use super::process;

impl EbpfBeside {
    /// One comparison, and its verdict.
    pub(super) fn compare(&mut self) -> Result<Crosscheck, ViewError> {
        self.follow()?;
        let misses = self.reader.misses()?;
        let gathered = self.gather()?;
        let mut named = self.named;
        let mut check = judge(&gathered, &mut named, || Ok((self.gather()?.readings, self.missed_since_search()?)))?;
        self.named = named;
        // Only now: the vote is about what the view knew by itself.
        let found = self.search(misses, check.doubt())?;
        check.found = found.iter().map(|record| record.cookie).collect();
        Ok(check)
    }

    /// One round of readings, in the order that `evidence.rs` relies on.
    fn gather(&mut self) -> Result<Gathered, ViewError> {
        let netns = self.enter();
        let connected = self.dump();
        let before = self.descriptors()?;
        let listed_before = self.list();
        let first = self.reader.sweep()?;
        let dump = self.dump();
        let mut inodes: HashMap<u64, u64> =
            before.values().chain(&first.records).map(|record| (u64::from(record.inode), record.cookie)).collect();
        inodes.extend(connected.iter().chain(&dump).flatten().map(|row| (u64::from(row.inode), row.cookie)));
        inodes.remove(&0);

        let was: HashMap<u64, TcpState> = connected.iter().flatten().map(|row| (row.cookie, row.state)).collect();
        let states = |listed: HashSet<u64>| -> HashMap<u64, TcpState> {
            let cookies = listed.iter().filter_map(|inode| inodes.get(inode));
            // A state is proof of what was before it, and CLOSE of nothing.
            cookies.map(|cookie| (*cookie, was.get(cookie).copied().unwrap_or(TcpState::Close))).collect()
        };
        let mut readings = Readings { netns, ..Readings::default() };
        readings.dump = dump.as_ref().map(|rows| rows.iter().map(|row| (row.cookie, row.inode != 0)).collect());
        readings.descriptors[0] = before.clone();
        readings.sweeps[0] = by_cookie(self.of_watched(&first.records));
        readings.proc_fd = listed_before.map(|listed| [states(listed), HashMap::new()]);
        look_up(&mut readings, |record| self.namespaces.get(record.netns).and_then(|diag| find(diag, record)));
        readings.between = self.descriptors()?.into_keys().collect();

        let second = self.reader.sweep()?;
        let listed_after = self.list();
        let compared =
            [second.records.len(), listed_after.as_ref().map_or(0, HashSet::len), dump.as_ref().map_or(0, Vec::len)];
        readings.sweeps[1] = by_cookie(self.of_watched(&second.records));
        readings.descriptors[1] = self.descriptors()?;
        let after = |listed| states(listed).into_keys().map(|cookie| (cookie, TcpState::Close)).collect();
        readings.proc_fd = readings.proc_fd.zip(listed_after).map(|([before, _], listed)| [before, after(listed)]);
        let overflowed = first.overflowed.max(second.overflowed);
        Ok(Gathered { readings, descriptors: before.into_values().collect(), compared, overflowed })
    }

    /// The records of sockets whose owner is watched.
    fn of_watched<'a>(&self, records: &'a [SocketRecord]) -> impl Iterator<Item = &'a SocketRecord> {
        let owners: HashSet<u32> = self.watched.values().copied().collect();
        records.iter().filter(move |record| owners.contains(&record.owner))
    }

    /// The sockets behind descriptors of all watched processes.
    fn descriptors(&mut self) -> Result<Records, ViewError> {
        let mut descriptors = Records::new();
        for process in self.processes() {
            if let Some((_, records)) = self.walk(process)? {
                descriptors.extend(records.into_iter().map(|record| (record.cookie, record)));
            }
        }
        Ok(descriptors)
    }

    /// Inodes of the sockets in `/proc/PID/fd` of all watched processes; none, with a line in the log, if one may not be read.
    fn list(&self) -> Option<HashSet<u64>> {
        let mut inodes = HashSet::new();
        for process in self.processes() {
            let sockets = process::sockets(process).inspect_err(|error| tracing::warn!(%error, "/proc cannot witness"));
            inodes.extend(sockets.ok()?.unwrap_or_default());
        }
        Some(inodes)
    }

    /// Prepares `sock_diag` in the network namespaces of the watched processes, as far as they may be entered.
    fn enter(&mut self) -> HashSet<u32> {
        let mut netns = HashSet::new();
        for process in self.processes() {
            netns.extend(heard(self.namespaces.of(process.pid)).flatten());
        }
        self.namespaces.keep(&netns);
        netns
    }

    /// The sockets towards the peers in these namespaces, whoever holds them.
    fn dump(&mut self) -> Option<Vec<Row>> {
        let mut all = Vec::new();
        for (_, diag) in self.namespaces.each() {
            let rows = heard(diag.dump_to(self.peers.port()))?;
            all.extend(rows.into_iter().filter(|row| self.peers.contains(row.remote)));
        }
        Some(all)
    }
}

//! Comparing the eBPF view of other processes with the descriptors that they have.
//!
//! A descriptor that is there before and after a sweep was there during it: the sweep must have its socket.

use std::collections::{HashMap, HashSet};

use counterfoil_common::SocketRecord;

use super::super::{Crosscheck, ViewError};
use super::ebpf::{EbpfBeside, is_held};

/// Sockets by cookie.
type Records = HashMap<u64, SocketRecord>;

impl EbpfBeside {
    pub(super) fn compare(&mut self) -> Result<Crosscheck, ViewError> {
        self.follow()?;
        let misses = self.reader.misses()?;
        let found = self.search(misses)?;
        let before = self.descriptors()?;
        let sweep = self.reader.sweep()?;
        let after = self.descriptors()?;
        let swept: HashSet<u64> = sweep.records.iter().map(|record| record.cookie).collect();
        let escaped: Vec<u64> =
            before.keys().filter(|cookie| after.contains_key(cookie) && !swept.contains(cookie)).copied().collect();
        Ok(Crosscheck {
            compared: [swept.len(), after.len(), 0],
            held_elsewhere: self.held_elsewhere(&sweep.records, &before, &after),
            found: found.iter().map(|record| record.cookie).collect(),
            disagreement: (!escaped.is_empty() && sweep.overflowed == 0)
                .then(|| format!("descriptors that eBPF does not see: {}", escaped.len())),
            ..Crosscheck::default()
        })
    }

    /// Held sockets of a watched process that no watched process has a descriptor of.
    fn held_elsewhere(&self, swept: &[SocketRecord], before: &Records, after: &Records) -> Vec<u64> {
        let owners: HashSet<u32> = self.watched.values().copied().collect();
        let has_descriptor = |cookie: &u64| before.contains_key(cookie) || after.contains_key(cookie);
        let held = swept.iter().filter(|record| is_held(record) && owners.contains(&record.owner));
        held.map(|record| record.cookie).filter(|cookie| !has_descriptor(cookie)).collect()
    }

    /// The sockets behind descriptors of all watched processes.
    fn descriptors(&mut self) -> Result<Records, ViewError> {
        let mut descriptors = HashMap::new();
        for process in self.watched.keys().copied().collect::<Vec<_>>() {
            if let Some((_, records)) = self.walk(process)? {
                descriptors.extend(records.into_iter().map(|record| (record.cookie, record)));
            }
        }
        Ok(descriptors)
    }
}

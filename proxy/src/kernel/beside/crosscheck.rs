//! Comparing the eBPF view of other processes with the descriptors that they have.
//!
//! A descriptor that is there before and after a sweep was there during it: the sweep must have its socket.

use std::collections::{HashMap, HashSet};

use counterfoil_common::SocketRecord;

use super::super::{Crosscheck, ViewError};
use super::ebpf::EbpfBeside;

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
            found: found.iter().map(|record| record.cookie).collect(),
            disagreement: (!escaped.is_empty() && sweep.overflowed == 0)
                .then(|| format!("descriptors that eBPF does not see: {}", escaped.len())),
            ..Crosscheck::default()
        })
    }

    /// The sockets behind descriptors of all watched processes.
    fn descriptors(&mut self) -> Result<HashMap<u64, SocketRecord>, ViewError> {
        let mut descriptors = HashMap::new();
        for process in self.watched.keys().copied().collect::<Vec<_>>() {
            if let Some((_, records)) = self.walk(process)? {
                descriptors.extend(records.into_iter().map(|record| (record.cookie, record)));
            }
        }
        Ok(descriptors)
    }
}

//! Comparing the eBPF view with its two witnesses, while connections come and go.
//!
//! Nothing is stopped for it, so each rule needs no clock but only order:
//!
//! * A descriptor that is there before and after a sweep was there during it: the sweep must have it.
//! * A socket that two sweeps saw in a hashed state was hashed between them: the dump between them must have it, or the
//!   look-up of exactly this socket must.
//! * A socket held in two sweeps, with no descriptor between them, is held by somebody else.

use std::collections::HashSet;

use counterfoil_common::{SocketRecord, flags};

use super::view::EbpfView;
use super::{Crosscheck, TcpState, ViewError, convert};

/// How many of the sockets in question a message names.
const NAMED: usize = 3;

impl EbpfView {
    /// One comparison, and its verdict.
    pub(super) fn compare(&mut self) -> Result<Crosscheck, ViewError> {
        let misses = self.reader.misses()?;
        let before = self.reader.descriptors()?;
        let taken_up = self.take_up(&before)?;
        let mut check = Crosscheck {
            found: taken_up.found.iter().map(|record| record.cookie).collect(),
            unconnected: taken_up.unconnected.iter().map(|record| record.cookie).collect(),
            ..Crosscheck::default()
        };
        self.compare_witnesses(&before, &mut check)?;
        self.settle(&taken_up, misses, check.disagreement.as_ref())?;
        Ok(check)
    }

    fn compare_witnesses(&mut self, before: &[SocketRecord], check: &mut Crosscheck) -> Result<(), ViewError> {
        let first = self.reader.sweep()?;
        let between = self.reader.descriptors()?;
        let dump = match &mut self.diag {
            Some(diag) => diag.dump().inspect_err(|error| tracing::warn!(%error, "sock_diag cannot witness")).ok(),
            None => None,
        };
        let second = self.reader.sweep()?;
        check.compared = [second.records.len(), between.len(), dump.as_ref().map_or(0, Vec::len)];
        if second.overflowed > 0 {
            // Sockets are missing, that is known already, and a comparison would only repeat it.
            return Ok(());
        }

        let held = cookies(first.records.iter().filter(|record| is_held(record)));
        let before = cookies(before.iter().filter(|record| self.is_outgoing(record)));
        let between = cookies(&between);
        let escaped: Vec<u64> =
            before.iter().filter(|cookie| between.contains(cookie) && !held.contains(cookie)).copied().collect();
        if !escaped.is_empty() {
            check.disagreement = Some(format!("descriptors that eBPF does not see: {}", name(&escaped)));
        }

        let both: Vec<&SocketRecord> = {
            let first: HashSet<u64> = cookies(&first.records);
            second.records.iter().filter(|record| first.contains(&record.cookie)).collect()
        };
        check.held_elsewhere = both
            .iter()
            .filter(|record| is_held(record) && held.contains(&record.cookie) && !between.contains(&record.cookie))
            .map(|record| record.cookie)
            .collect();

        if let Some(dump) = dump {
            let hashed_before = cookies(first.records.iter().filter(|record| is_hashed(record)));
            let dumped: HashSet<u64> = dump.iter().map(|row| row.cookie).collect();
            let mut unseen = Vec::new();
            for record in both {
                let expected = is_hashed(record)
                    && hashed_before.contains(&record.cookie)
                    && record.netns == self.netns
                    && !dumped.contains(&record.cookie);
                if expected && !self.still_hashed(record)? {
                    unseen.push(record.cookie);
                }
            }
            if !unseen.is_empty() && check.disagreement.is_none() {
                check.disagreement = Some(format!("sockets that sock_diag does not see: {}", name(&unseen)));
            }
        }
        Ok(())
    }

    /// Asks `sock_diag` for exactly this socket, since a dump steps over some while others come and go. True as well if the
    /// socket has left its hashed state by now.
    fn still_hashed(&mut self, record: &SocketRecord) -> Result<bool, ViewError> {
        let Some(diag) = &mut self.diag else { return Ok(true) };
        match diag.find(convert::local(record), convert::remote(record), record.cookie) {
            Ok(None) => {}
            Ok(Some(_)) => return Ok(true),
            Err(error) => {
                tracing::warn!(%error, "sock_diag cannot witness");
                return Ok(true);
            }
        }
        let now = self.reader.sweep()?;
        Ok(!now.records.iter().any(|other| other.cookie == record.cookie && is_hashed(other)))
    }
}

fn cookies<'a>(records: impl IntoIterator<Item = &'a SocketRecord>) -> HashSet<u64> {
    records.into_iter().map(|record| record.cookie).collect()
}

fn is_held(record: &SocketRecord) -> bool {
    record.flags & flags::HELD != 0
}

fn is_hashed(record: &SocketRecord) -> bool {
    TcpState::from_kernel(record.state).is_some_and(TcpState::is_hashed)
}

/// Some of the cookies, for a message.
fn name(cookies: &[u64]) -> String {
    let some: Vec<String> = cookies.iter().take(NAMED).map(u64::to_string).collect();
    let more = if cookies.len() > NAMED { ", ..." } else { "" };
    format!("{} (cookies {}{more})", cookies.len(), some.join(", "))
}

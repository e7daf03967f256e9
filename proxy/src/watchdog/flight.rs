//! The flight recorder: for each live socket, the last changes of its state in either view.
//!
//! Sampled, not traced: what came and went between two sweeps is not in it. Bounded by the sockets that are held or
//! in the ledger; a socket that is in neither is forgotten.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::reconcile::{Joined, Pair};
use crate::clock::Mono;
use crate::kernel::TcpState;
use crate::ledger::RowState;

/// Changes kept per socket.
pub const CHANGES: usize = 8;

/// From this time on both views said this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// When the kernel was read that showed it.
    pub at: Mono,
    /// The kernel's state; none: no held socket.
    pub tcp: Option<TcpState>,
    /// The ledger's state; none: no row.
    pub row: Option<RowState>,
}

impl Change {
    /// What both views say of one socket.
    pub(super) fn of(pair: &Pair<'_>, at: Mono) -> Self {
        Self { at, tcp: pair.socket.map(|socket| socket.state), row: pair.row.map(|row| row.state) }
    }

    /// Whether it says the same, at whatever time.
    fn is_like(&self, other: &Self) -> bool {
        (self.tcp, self.row) == (other.tcp, other.row)
    }
}

/// The last changes of one socket. It takes no more memory than it has changes.
#[derive(Clone, Debug, Default)]
pub struct Flight {
    changes: Vec<Change>,
}

impl Flight {
    /// Oldest first.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Keeps it if it is another state than the last one.
    pub(super) fn record(&mut self, change: Change) {
        if self.changes.last().is_some_and(|last| change.is_like(last)) {
            return;
        }
        if self.changes.len() == CHANGES {
            self.changes.remove(0);
        }
        self.changes.reserve_exact(1);
        self.changes.push(change);
    }
}

/// The recorders of all live sockets.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    flights: HashMap<u64, Seen, RandomState>,
    sweep: u64,
}

/// Most live sockets are as they were first seen: that takes no allocation.
#[derive(Debug)]
struct Seen {
    last: Change,
    before: Option<Box<Flight>>,
    sweep: u64,
}

impl Recorder {
    /// Takes up one sweep, and forgets the sockets that it lacks.
    pub(super) fn record(&mut self, joined: &Joined<'_>) {
        self.sweep += 1;
        for (cookie, pair) in joined.pairs().filter(|(_, pair)| pair.exists()) {
            let change = Change::of(pair, joined.taken());
            let seen = self.flights.entry(cookie).or_insert(Seen { last: change, before: None, sweep: 0 });
            seen.sweep = self.sweep;
            if !change.is_like(&seen.last) {
                seen.before.get_or_insert_default().record(std::mem::replace(&mut seen.last, change));
            }
        }
        let sweep = self.sweep;
        self.flights.retain(|_, seen| seen.sweep == sweep);
    }

    /// The changes of one socket.
    pub(super) fn flight(&self, cookie: u64) -> Flight {
        let Some(seen) = self.flights.get(&cookie) else { return Flight::default() };
        let mut flight = seen.before.as_deref().cloned().unwrap_or_default();
        flight.record(seen.last);
        flight
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{KernelSnapshot, KernelSocket};
    use crate::ledger::LedgerSnapshot;
    use crate::watchdog::reconcile::Trust;

    fn change(at: u64, tcp: TcpState) -> Change {
        Change { at: Mono(at), tcp: Some(tcp), row: Some(RowState::Idle) }
    }

    #[test]
    fn only_changes_are_kept_and_the_last_eight_of_them() {
        let mut flight = Flight::default();
        assert!(flight.changes().is_empty());
        flight.record(change(1, TcpState::Established));
        flight.record(change(2, TcpState::Established));
        assert_eq!(flight.changes(), [change(1, TcpState::Established)], "since when, not until when");
        for at in 3..20 {
            flight.record(change(at, if at % 2 == 0 { TcpState::Established } else { TcpState::CloseWait }));
        }
        assert_eq!(flight.changes().len(), CHANGES);
        let times: Vec<u64> = flight.changes().iter().map(|change| change.at.0).collect();
        assert_eq!(times, [12, 13, 14, 15, 16, 17, 18, 19]);
    }

    fn socket(cookie: u64, state: TcpState, held: bool) -> KernelSocket {
        KernelSocket {
            cookie,
            state,
            held,
            opened: None,
            local: ([127, 0, 0, 1], 1).into(),
            remote: ([127, 0, 0, 1], 2).into(),
            last_received_ns: None,
            last_sent_ns: None,
            bytes_sent: None,
            bytes_received: None,
            unread: None,
            owner: 0,
            netns: 0,
        }
    }

    #[test]
    fn the_recorder_is_bounded_by_the_live_sockets() {
        let mut recorder = Recorder::default();
        let ledger = LedgerSnapshot::default();
        let mut sweep = |taken_ns: u64, sockets: Vec<KernelSocket>| {
            let kernel = KernelSnapshot { taken_ns, sockets, ..KernelSnapshot::default() };
            recorder.record(&Joined::new(&kernel, Trust::Full, &ledger));
            (recorder.flights.len(), recorder.flight(1).changes().to_vec())
        };
        let established = (0..100).map(|cookie| socket(cookie, TcpState::Established, true)).collect();
        assert_eq!(sweep(10, established).0, 100);
        let (live, changes) = sweep(20, vec![socket(1, TcpState::CloseWait, true), socket(2, TcpState::Close, false)]);
        assert_eq!(live, 1, "what nobody holds is forgotten");
        let of = |at, tcp| Change { at: Mono(at), tcp: Some(tcp), row: None };
        assert_eq!(changes, [of(10, TcpState::Established), of(20, TcpState::CloseWait)]);
        assert_eq!(sweep(30, Vec::new()), (0, Vec::new()));
    }
}

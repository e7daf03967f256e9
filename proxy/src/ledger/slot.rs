//! A shard's slots: what is written by one worker and read by anybody.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use socket2::Socket;

use super::{BackendIndex, BackendTotals, LedgerRow, LedgerSnapshot, OpenInfo, Pause, RowId, Tombstone};
use crate::clock::{Mono, nanos};
use crate::close::CloseReason;
use crate::table::Table;
use crate::tls::Version;

/// Who may share a connection (section 2 of the design).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ConnKind {
    /// No header: multiplexed between all clients.
    Shared,
    /// A header without the client's port: shared by all clients that map to it.
    Keyed,
    /// A header with the client's address and port: ends with that client connection.
    Owned,
    /// A header that cannot be used again: one query, then closed.
    OneShot,
    /// A health check: the forwarder's own query, then closed.
    Check,
    /// Connected, nothing sent: becomes one of the first four with its first write.
    Spare,
}

impl ConnKind {
    /// How many kinds there are.
    pub const COUNT: usize = 6;
    /// All kinds.
    pub const ALL: [Self; Self::COUNT] =
        [Self::Shared, Self::Keyed, Self::Owned, Self::OneShot, Self::Check, Self::Spare];

    /// Whether any client may come to use it.
    pub const fn is_common(self) -> bool {
        matches!(self, Self::Shared | Self::Keyed)
    }

    /// The label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Keyed => "keyed",
            Self::Owned => "owned",
            Self::OneShot => "one_shot",
            Self::Check => "check",
            Self::Spare => "spare",
        }
    }
}

/// What the owner believes the connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RowState {
    /// `connect(2)` has not finished.
    Connecting,
    /// Queries in flight.
    Busy,
    /// Nothing in flight.
    Idle,
    /// No new query is given to it.
    Draining,
    /// A zone transfer whose client does not read: nothing is read from it either, until the client does.
    Paused,
}

impl RowState {
    /// All states.
    pub const ALL: [Self; 5] = [Self::Connecting, Self::Busy, Self::Idle, Self::Draining, Self::Paused];

    /// The state with this number.
    fn from_u32(number: u32) -> Self {
        Self::ALL.get(number as usize).copied().unwrap_or(Self::Draining)
    }

    /// The label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Busy => "busy",
            Self::Idle => "idle",
            Self::Draining => "draining",
            Self::Paused => "paused",
        }
    }
}

/// Closed connections remembered per shard. The oldest is overwritten: then a socket that outlives its row shows as an
/// orphan without its history, which is reported all the same.
const TOMBSTONES: usize = 16_384;

/// Between two signs of life; more is a pause. Owners beat four times a second.
const LATE: Duration = Duration::from_millis(500);

/// Pauses remembered per shard; of more, the oldest become one.
const PAUSES: usize = 16;

#[derive(Debug, Default)]
struct Slot {
    /// Odd while the slot changes hands. Half of it is the generation.
    sequence: AtomicU64,
    /// Zero: free.
    cookie: AtomicU64,
    /// backend << 16 | kind << 8 | the client's version of TLS
    what: AtomicU32,
    state: AtomicU32,
    opened: AtomicU64,
    last_byte: AtomicU64,
    in_flight: AtomicU32,
    queries: AtomicU64,
    owner: AtomicU64,
    header: AtomicU64,
    socket: Mutex<Weak<Socket>>,
}

#[derive(Debug, Default)]
struct Grave {
    cookie: AtomicU64,
    closed: AtomicU64,
    /// backend << 8 | reason
    what: AtomicU32,
}

#[derive(Debug, Default)]
struct Counters {
    opened: [AtomicU64; ConnKind::COUNT],
    closed: [AtomicU64; CloseReason::ALL.len()],
}

/// One worker's part of the ledger.
#[derive(Debug)]
pub(super) struct Shard {
    index: usize,
    slots: Table<Slot>,
    /// How many of them are in use or free.
    len: AtomicUsize,
    graves: Box<[Grave]>,
    next_grave: AtomicUsize,
    counters: Table<Counters>,
    heartbeat: AtomicU64,
    pauses: Mutex<VecDeque<Pause>>,
}

/// Adds to a counter that only the calling thread writes.
fn bump(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

impl Shard {
    pub(super) fn new(index: usize, slots: usize, backends: usize) -> Self {
        Self {
            index,
            slots: Table::new(slots),
            len: AtomicUsize::new(slots),
            graves: (0..TOMBSTONES).map(|_| Grave::default()).collect(),
            next_grave: AtomicUsize::new(0),
            counters: Table::new(backends),
            heartbeat: AtomicU64::new(0),
            pauses: Mutex::default(),
        }
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Makes room for this many rows at least, of this many backends. Which rows are free is the writer's business.
    pub(super) fn grow(&self, slots: usize, backends: usize) {
        self.slots.grow(slots);
        self.counters.grow(backends);
        self.len.fetch_max(slots, Ordering::Release);
    }

    /// Shows that the owner runs. Only the shard's writer calls this.
    pub(super) fn beat(&self, now: Mono) {
        let before = Mono(self.heartbeat.load(Ordering::Relaxed));
        if before != Mono::ZERO && now != Mono::MAX && now.since(before) > LATE {
            // What came shortly before its last sign of life it may not have read any more.
            let from = Mono(before.0.saturating_sub(nanos(LATE)));
            let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
            if pauses.len() == PAUSES
                && let Some(oldest) = pauses.pop_front()
                && let Some(next) = pauses.front_mut()
            {
                next.from = oldest.from;
            }
            pauses.push_back(Pause { from, to: now });
        }
        self.heartbeat.store(now.0, Ordering::Release);
    }

    pub(super) fn heartbeat(&self) -> Mono {
        Mono(self.heartbeat.load(Ordering::Acquire))
    }

    /// Fills a free slot. Only the shard's writer calls this.
    pub(super) fn fill(&self, slot: u32, cookie: u64, info: &OpenInfo, now: Mono, socket: &Arc<Socket>) -> u64 {
        let Some(row) = self.slots.get(slot as usize) else { return 0 };
        let sequence = row.sequence.load(Ordering::Relaxed);
        row.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        row.cookie.store(cookie, Ordering::Relaxed);
        row.what.store(what(info), Ordering::Relaxed);
        row.state.store(RowState::Connecting as u32, Ordering::Relaxed);
        row.opened.store(now.0, Ordering::Relaxed);
        row.last_byte.store(now.0, Ordering::Relaxed);
        row.in_flight.store(0, Ordering::Relaxed);
        row.queries.store(0, Ordering::Relaxed);
        row.owner.store(info.owner, Ordering::Relaxed);
        row.header.store(info.header, Ordering::Relaxed);
        *row.socket.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(socket);
        row.sequence.store(sequence.wrapping_add(2), Ordering::Release);
        if let Some(counters) = self.counters.get(usize::from(info.backend)) {
            bump(&counters.opened[info.kind as usize]);
        }
        sequence.wrapping_add(2)
    }

    /// Empties a slot after its descriptor was closed, and leaves a tombstone. Only the shard's writer calls this.
    pub(super) fn retire(&self, id: RowId, reason: CloseReason, now: Mono) {
        let Some(row) = self.slots.get(id.slot as usize) else { return };
        let what = row.what.load(Ordering::Relaxed);
        let backend = (what >> 16) as BackendIndex;
        if let Some(counters) = self.counters.get(usize::from(backend)) {
            bump(&counters.closed[reason as usize]);
        }
        let cookie = row.cookie.load(Ordering::Relaxed);
        if cookie != 0 {
            // The tombstone before the row: a reader may see both, never neither.
            let grave = &self.graves[self.next_grave.fetch_add(1, Ordering::Relaxed) % TOMBSTONES];
            grave.cookie.store(0, Ordering::Relaxed);
            fence(Ordering::Release);
            grave.closed.store(now.0, Ordering::Relaxed);
            grave.what.store(u32::from(backend) << 8 | reason as u32, Ordering::Relaxed);
            grave.cookie.store(cookie, Ordering::Release);
        }
        self.clear(row);
    }

    fn clear(&self, row: &Slot) {
        let sequence = row.sequence.load(Ordering::Relaxed);
        row.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        row.cookie.store(0, Ordering::Relaxed);
        *row.socket.lock().unwrap_or_else(PoisonError::into_inner) = Weak::new();
        row.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// Hides the row of a socket that does not exist. The slot stays its owner's, who retires it when it lets the entry go.
    pub(super) fn strike(&self, id: RowId, cookie: u64) -> bool {
        let Some(row) = self.slots.get(id.slot as usize) else { return false };
        // The owner may use the slot again between any two looks at it: no other cookie than this one may go, or a healthy
        // connection would be without its row, and an orphan. No two sockets have the same.
        cookie != 0
            && row.sequence.load(Ordering::Acquire) == id.generation
            && row.cookie.compare_exchange(cookie, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    pub(super) fn socket(&self, id: RowId) -> Option<Arc<Socket>> {
        let row = self.slots.get(id.slot as usize)?;
        let handle = row.socket.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: the owner replaces the handle under it when the slot changes hands.
        (row.sequence.load(Ordering::Acquire) == id.generation).then(|| handle.upgrade()).flatten()
    }

    /// A spare connection gets its header.
    pub(super) fn assign(&self, slot: u32, info: &OpenInfo) {
        if let Some(row) = self.slots.get(slot as usize) {
            row.what.store(what(info), Ordering::Relaxed);
            row.owner.store(info.owner, Ordering::Relaxed);
            row.header.store(info.header, Ordering::Relaxed);
        }
    }

    pub(super) fn set_state(&self, slot: u32, state: RowState) {
        if let Some(row) = self.slots.get(slot as usize) {
            row.state.store(state as u32, Ordering::Relaxed);
        }
    }

    pub(super) fn set_activity(&self, slot: u32, last_byte: Mono, in_flight: u32, queries: u64) {
        if let Some(row) = self.slots.get(slot as usize) {
            row.last_byte.store(last_byte.0, Ordering::Relaxed);
            row.in_flight.store(in_flight, Ordering::Relaxed);
            row.queries.store(queries, Ordering::Relaxed);
        }
    }

    pub(super) fn read(&self, snapshot: &mut LedgerSnapshot) {
        // First the sign, then the pause that it may have ended.
        snapshot.heartbeats.push(self.heartbeat());
        snapshot.pauses.push(self.pauses.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect());
        for (index, row) in self.slots.iter().enumerate() {
            if let Some(row) = self.read_slot(index, row) {
                snapshot.rows.push(row);
            }
        }
        // Rows first, tombstones second: a row that is retired in between is found as a tombstone.
        for grave in &self.graves {
            if let Some(tombstone) = read_grave(grave) {
                snapshot.tombstones.push(tombstone);
            }
        }
    }

    fn read_slot(&self, index: usize, row: &Slot) -> Option<LedgerRow> {
        // A writer needs nanoseconds. One that was stopped in the middle leaves its slot unread, which is one row
        // that is missing until it goes on; its worker is then known to be stalled.
        for _ in 0..64 {
            let sequence = row.sequence.load(Ordering::Acquire);
            if sequence % 2 == 1 {
                std::hint::spin_loop();
                continue;
            }
            let cookie = row.cookie.load(Ordering::Relaxed);
            if cookie == 0 {
                return None;
            }
            let what = row.what.load(Ordering::Relaxed);
            let read = LedgerRow {
                id: RowId { shard: self.index, slot: u32::try_from(index).unwrap_or(u32::MAX), generation: sequence },
                cookie,
                backend: (what >> 16) as BackendIndex,
                kind: ConnKind::ALL.get((what >> 8 & 0xff) as usize).copied().unwrap_or(ConnKind::Shared),
                state: RowState::from_u32(row.state.load(Ordering::Relaxed)),
                opened: Mono(row.opened.load(Ordering::Relaxed)),
                last_byte: Mono(row.last_byte.load(Ordering::Relaxed)),
                in_flight: row.in_flight.load(Ordering::Relaxed),
                queries: row.queries.load(Ordering::Relaxed),
                owner: row.owner.load(Ordering::Relaxed),
                header: row.header.load(Ordering::Relaxed),
                client_tls: version(what),
            };
            fence(Ordering::Acquire);
            if row.sequence.load(Ordering::Relaxed) == sequence {
                return Some(read);
            }
        }
        None
    }

    pub(super) fn retire_tombstones(&self, gone: &impl Fn(&Tombstone) -> bool) {
        for grave in &self.graves {
            if let Some(tombstone) = read_grave(grave)
                && gone(&tombstone)
            {
                // Only if the owner has not dug it again meanwhile.
                let _ = grave.cookie.compare_exchange(tombstone.cookie, 0, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn reset_totals(&self, backend: BackendIndex) {
        if let Some(Counters { opened, closed }) = self.counters.get(usize::from(backend)) {
            opened.iter().chain(closed).for_each(|counter| counter.store(0, Ordering::Relaxed));
        }
    }

    pub(super) fn add_totals(&self, totals: &mut Vec<BackendTotals>) {
        for (index, counters) in self.counters.iter().enumerate() {
            if totals.len() <= index {
                totals.push(BackendTotals::default());
            }
            let total = &mut totals[index];
            for (sum, counter) in total.opened.iter_mut().zip(&counters.opened) {
                *sum += counter.load(Ordering::Relaxed);
            }
            for (sum, counter) in total.closed.iter_mut().zip(&counters.closed) {
                *sum += counter.load(Ordering::Relaxed);
            }
        }
    }
}

fn what(info: &OpenInfo) -> u32 {
    // Zero: in the clear.
    let version = info.client_tls.map_or(0, |version| 1 + version as u32);
    u32::from(info.backend) << 16 | (info.kind as u32) << 8 | version
}

/// The version of TLS in what [`what`] has made.
fn version(what: u32) -> Option<Version> {
    (what as usize & 0xff).checked_sub(1).and_then(|at| Version::ALL.get(at)).copied()
}

fn read_grave(grave: &Grave) -> Option<Tombstone> {
    let cookie = grave.cookie.load(Ordering::Acquire);
    if cookie == 0 {
        return None;
    }
    let closed = Mono(grave.closed.load(Ordering::Relaxed));
    let what = grave.what.load(Ordering::Relaxed);
    fence(Ordering::Acquire);
    if grave.cookie.load(Ordering::Relaxed) != cookie {
        return None;
    }
    let reason = CloseReason::from_u8((what & 0xff) as u8)?;
    Some(Tombstone { cookie, backend: (what >> 8) as BackendIndex, closed, reason })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::net::TcpListener;

    use super::*;

    /// What the slot holds by now may be another connection than the one that was read: even of one generation only the
    /// cookie that is meant goes.
    #[test]
    fn a_row_is_struck_by_its_cookie() {
        let shard = Shard::new(0, 1, 1);
        let socket = Arc::new(Socket::from(TcpListener::bind("127.0.0.1:0").unwrap()));
        let info = OpenInfo { backend: 0, kind: ConnKind::Shared, owner: 0, header: 0, client_tls: None };
        let fill = |cookie| RowId { shard: 0, slot: 0, generation: shard.fill(0, cookie, &info, Mono(1), &socket) };
        let live = || shard.slots.get(0).and_then(|slot| shard.read_slot(0, slot)).map(|row| row.cookie);
        let first = fill(7);
        assert!(!shard.strike(first, 6) && !shard.strike(first, 0));
        shard.retire(first, CloseReason::Checked, Mono(2));
        let second = fill(8);
        assert!(!shard.strike(first, 7) && !shard.strike(first, 8) && !shard.strike(second, 7));
        assert_eq!(live(), Some(8));
        assert!(shard.strike(second, 8) && !shard.strike(second, 8));
        assert_eq!(live(), None);
    }

    /// What a shard remembers of an owner that beats at these times, milliseconds.
    fn pauses(beats: impl IntoIterator<Item = u64>) -> Vec<(u64, u64)> {
        const MILLI: u64 = 1_000_000;
        let shard = Shard::new(0, 1, 1);
        for beat in beats {
            shard.beat(Mono(beat * MILLI));
        }
        shard.beat(Mono::MAX);
        let mut snapshot = LedgerSnapshot::default();
        shard.read(&mut snapshot);
        snapshot.pauses[0].iter().map(|pause| (pause.from.0 / MILLI, pause.to.0 / MILLI)).collect()
    }

    #[test]
    fn a_late_sign_of_life_is_a_pause() {
        assert_eq!(pauses([9000, 9250, 9750]), []);
        assert_eq!(pauses([9000, 9250, 9751, 10_000, 40_000]), [(8750, 9751), (9500, 40_000)]);
    }

    #[test]
    fn the_oldest_of_many_pauses_become_one() {
        let found = pauses((1..=20).map(|beat| beat * 1000));
        assert_eq!((found.len(), found[0], found[15]), (PAUSES, (500, 5000), (18_500, 20_000)));
    }
}

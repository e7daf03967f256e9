//! The ledger: the forwarder's own record of each backend socket (I1 to I4).
//!
//! One shard per worker. A shard is a set of preallocated slots of atomics, written only by its worker and readable
//! while that worker hangs. A row is made before `connect(2)`, keyed by `SO_COOKIE`, and retired after the descriptor
//! was closed: so whatever a kernel snapshot shows is in a ledger snapshot that is taken after it, as a row or as a
//! tombstone. What is in neither is an orphan.
//!
//! # Tearing
//!
//! A slot changes hands under a sequence number (odd while it is written), so a reader never mixes two connections.
//! The fields that change during a connection's life are single atomics of their own: a reader may see a new
//! `in_flight` with an old `last_byte`, which no rule of the watchdog depends on.

pub mod caps;
mod entry;
mod slot;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use entry::{Entry, OpenInfo, Reservation, ReserveError, ShardWriter, Tracked};
pub use slot::{ConnKind, RowState};

use crate::clock::Mono;
use crate::close::CloseReason;
use crate::tls::Version;
use caps::Caps;
use slot::Shard;

/// Index of a backend over all pools, in the order of the configuration.
pub type BackendIndex = u16;

/// The ledger of the process.
#[derive(Debug)]
pub struct Ledger {
    shards: Box<[Arc<Shard>]>,
    taken: Box<[AtomicBool]>,
    caps: Arc<Caps>,
}

impl Ledger {
    /// A ledger with `shards` shards (one per worker, and one for drills) of `slots` rows each, whose counters know
    /// `backends` backends (the drill's peer included).
    pub fn new(shards: usize, slots: usize, backends: usize, caps: Arc<Caps>) -> Self {
        Self {
            shards: (0..shards).map(|index| Arc::new(Shard::new(index, slots, backends))).collect(),
            taken: (0..shards).map(|_| AtomicBool::new(false)).collect(),
            caps,
        }
    }

    /// The right to write a shard, which can be given only once; none if it was.
    pub fn claim(&self, shard: usize) -> Option<Claim> {
        let taken = self.taken.get(shard)?;
        if taken.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(Claim { shard: Arc::clone(self.shards.get(shard)?), caps: Arc::clone(&self.caps) })
    }

    /// The writing end of a shard, on this thread; none if it was claimed before.
    pub fn writer(&self, shard: usize) -> Option<ShardWriter> {
        self.claim(shard).map(Claim::writer)
    }

    /// Makes room for this many rows per shard, of this many backends, at least. A writer uses them when it is told:
    /// [`ShardWriter::use_new_slots`].
    pub fn grow(&self, slots: usize, backends: usize) {
        for shard in &self.shards {
            shard.grow(slots, backends);
        }
    }

    /// The limits of connections, and their use.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// How many shards there are, the drill's included.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Per shard, when its owner last showed that it runs; zero: it never started.
    pub fn heartbeats(&self) -> Vec<Mono> {
        self.shards.iter().map(|shard| shard.heartbeat()).collect()
    }

    /// Everything the ledger knows, without stopping anybody.
    pub fn snapshot(&self, now: Mono) -> LedgerSnapshot {
        let mut snapshot = LedgerSnapshot { taken: now, ..LedgerSnapshot::default() };
        // About as many as there will be: a list that grows by doubling would take three times the memory.
        snapshot.rows.reserve_exact(self.caps.total().1);
        for shard in &self.shards {
            shard.read(&mut snapshot);
        }
        snapshot
    }

    /// Forgets the tombstones for which `gone` is true: a kernel snapshot taken after the close lacks the cookie.
    pub fn retire_tombstones(&self, gone: impl Fn(&Tombstone) -> bool) {
        for shard in &self.shards {
            shard.retire_tombstones(&gone);
        }
    }

    /// Forgets the row of this socket, which does not exist (the answer to a ghost). False if the slot has moved on.
    pub fn retire_row(&self, id: RowId, cookie: u64) -> bool {
        self.shards.get(id.shard).is_some_and(|shard| shard.strike(id, cookie))
    }

    /// Runs `action` on the socket of a row, if its owner still has it. The owner's descriptor cannot be closed
    /// meanwhile, as the weak handle is upgraded for this one call (I4).
    pub fn with_socket<T>(&self, id: RowId, action: impl FnOnce(&socket2::Socket) -> T) -> Option<T> {
        let socket = self.shards.get(id.shard)?.socket(id)?;
        Some(action(&socket))
    }

    /// Counts from zero, for another backend; only while nobody has a connection to this one.
    pub fn reset_totals(&self, backend: BackendIndex) {
        self.shards.iter().for_each(|shard| shard.reset_totals(backend));
    }

    /// Connections opened and closed per backend, summed over all shards.
    pub fn totals(&self) -> Vec<BackendTotals> {
        let mut totals: Vec<BackendTotals> = Vec::new();
        for shard in &self.shards {
            shard.add_totals(&mut totals);
        }
        totals
    }
}

/// The right to write a shard, on its way to the thread that will.
#[derive(Debug)]
pub struct Claim {
    shard: Arc<Shard>,
    caps: Arc<Caps>,
}

impl Claim {
    /// The writing end, which stays on this thread.
    pub fn writer(self) -> ShardWriter {
        ShardWriter::new(self.shard, self.caps)
    }
}

/// Counters of one backend.
#[derive(Clone, Debug, Default)]
pub struct BackendTotals {
    /// By [`ConnKind`].
    pub opened: [u64; ConnKind::COUNT],
    /// By [`CloseReason`].
    pub closed: [u64; CloseReason::ALL.len()],
}

/// One row at one time: the slot may be used again, under another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId {
    /// The shard, which is the worker's number; the last shard is the drill's.
    pub shard: usize,
    /// The slot in the shard.
    pub slot: u32,
    /// How often the slot has changed hands.
    pub generation: u64,
}

/// A live connection, as the ledger has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerRow {
    /// Where the row is.
    pub id: RowId,
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Which backend.
    pub backend: BackendIndex,
    /// Shared, keyed, owned or one-shot.
    pub kind: ConnKind,
    /// Connecting, busy, idle or draining.
    pub state: RowState,
    /// When the socket was made.
    pub opened: Mono,
    /// When a byte was last read or written.
    pub last_byte: Mono,
    /// Queries in flight.
    pub in_flight: u32,
    /// Queries carried so far.
    pub queries: u64,
    /// Serial number of the client connection that owns it; zero: nobody's alone.
    pub owner: u64,
    /// Digest of the PROXY header's bytes; zero: none.
    pub header: u64,
    /// What the owning client connection has agreed on; none: it is in the clear, or there is no owner.
    pub client_tls: Option<Version>,
}

/// A connection that was closed, until the kernel agrees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tombstone {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Which backend.
    pub backend: BackendIndex,
    /// When the descriptor had been closed.
    pub closed: Mono,
    /// Why.
    pub reason: CloseReason,
}

/// A time in which the owner of a shard did not run: it was stopped, starved or stuck. What came in it was read after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Shortly before its last sign of life.
    pub from: Mono,
    /// Its next sign of life.
    pub to: Mono,
}

/// The ledger at one time.
#[derive(Clone, Debug, Default)]
pub struct LedgerSnapshot {
    /// When reading began.
    pub taken: Mono,
    /// The live connections.
    pub rows: Vec<LedgerRow>,
    /// The closed ones that no kernel snapshot has confirmed yet.
    pub tombstones: Vec<Tombstone>,
    /// Per shard, when its owner last showed that it runs; zero: it never started.
    pub heartbeats: Vec<Mono>,
    /// Per shard, when its owner did not run for a while, oldest first. A pause is known when it is over.
    pub pauses: Vec<Vec<Pause>>,
}

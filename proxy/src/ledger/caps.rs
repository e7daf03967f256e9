//! The limits on backend connections: process-wide counters, touched at open and close and by who waits, never per query.
//!
//! Places are shared between the workers. A worker that wants one and was refused has a claim, for [`CLAIM`] at a time:
//! while it has, who holds more gets none, and of those that hold as many who got one last waits for the others. So a
//! place that comes free goes to who holds least, and one place alone goes round.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::BackendIndex;
use crate::clock::Mono;
use crate::table::Table;

/// For so long a claim stands that is not renewed: a worker that hangs takes nothing from the others. Who waits renews its
/// claim more often than this.
const CLAIM: Duration = Duration::from_millis(50);

/// Who has used a place of a backend within this time is there still: something is left for it.
pub(crate) const RECENTLY: Duration = Duration::from_secs(1);

/// Which limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtCap {
    /// `[[pool.backend]] max_connections`
    Backend,
    /// `[connections] max_total`
    Total,
}

/// The limits and their use. A limit that is set below its use closes nothing by itself, and lets nothing new in.
#[derive(Debug)]
pub struct Caps {
    backends: Table<Places>,
    total: Places,
    /// This backend's connections are not part of the total.
    beside: Option<usize>,
    workers: usize,
}

/// The places under one limit.
#[derive(Debug, Default)]
struct Places {
    limit: AtomicUsize,
    /// What the backend was found to take, if that is less; zero: not known.
    found: AtomicUsize,
    used: Count,
    /// Connections that have ended.
    ended: AtomicU64,
    /// Where the backend is.
    address: Mutex<Option<SocketAddr>>,
    workers: OnceLock<Box<[Share]>>,
    /// The last turn that was given.
    turn: AtomicU64,
}

/// What one worker has of them.
#[derive(Debug, Default)]
struct Share {
    held: Count,
    /// Until when it claims another one.
    claim: AtomicU64,
    /// When it got one last, counted in turns.
    turn: AtomicU64,
    /// The same by the clock.
    took: AtomicU64,
}

/// Connections to where a backend is now: below, how many; above, how often it has moved. Those from before a move are of
/// no more account.
#[derive(Debug, Default)]
struct Count(AtomicU64);

const MOVE: u64 = 1 << 32;

impl Count {
    /// How often the backend had moved, and how many there are.
    fn read(&self) -> (u32, usize) {
        let value = self.0.load(Ordering::Acquire);
        ((value / MOVE) as u32, (value % MOVE) as usize)
    }

    /// How many there are since so many moves.
    fn since(&self, moves: u32) -> usize {
        let (at, count) = self.read();
        if at == moves { count } else { 0 }
    }

    /// One more, as long as there are fewer than `limit`, and the backend is where it was after so many moves.
    fn take(&self, moves: u32, limit: usize) -> bool {
        let room = |value: u64| {
            let fits = value / MOVE == u64::from(moves) && ((value % MOVE) as usize) < limit;
            fits.then_some(value + 1)
        };
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_ok()
    }

    /// One more, whatever there was.
    fn add(&self, moves: u32) {
        let more =
            |value: u64| Some(if value / MOVE == u64::from(moves) { value } else { u64::from(moves) * MOVE } + 1);
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
    }

    /// One less, if it still counts.
    fn give(&self, moves: u32) {
        let less = |value: u64| (value / MOVE == u64::from(moves) && !value.is_multiple_of(MOVE)).then(|| value - 1);
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
    }

    /// The backend has moved.
    fn moved(&self) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |value| Some((value / MOVE + 1) * MOVE));
    }
}

impl Places {
    fn set(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    fn read(&self) -> (usize, usize) {
        (self.limit(), self.used.read().1)
    }

    fn limit(&self) -> usize {
        let limit = self.limit.load(Ordering::Relaxed);
        match self.found.load(Ordering::Relaxed) {
            0 => limit,
            found => limit.min(found),
        }
    }

    fn shares(&self, workers: usize) -> &[Share] {
        self.workers.get_or_init(|| (0..workers).map(|_| Share::default()).collect())
    }

    /// Whether there is a place for this worker beside those that are for others.
    fn has_place_for(&self, worker: usize, workers: usize, now: Mono) -> bool {
        let (limit, used) = self.read();
        let free = limit.saturating_sub(used);
        if workers == 1 || free == 0 {
            return free > 0;
        }
        let (moves, _) = self.used.read();
        let shares = self.shares(workers);
        let rank = |at: usize| (shares[at].held.since(moves), shares[at].turn.load(Ordering::Relaxed), at);
        let claims = |at: &usize| *at != worker && shares[*at].claim.load(Ordering::Relaxed) > now.0;
        let mine = rank(worker);
        free > (0..workers).filter(claims).filter(|at| rank(*at) < mine).count()
    }

    /// A worker has got one.
    fn taken(&self, moves: u32, worker: usize, workers: usize) {
        let share = &self.shares(workers)[worker];
        share.held.add(moves);
        if workers > 1 {
            share.turn.store(self.turn.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }

    fn give(&self, moves: u32, worker: Option<usize>, workers: usize) {
        if let Some(worker) = worker {
            self.shares(workers)[worker].held.give(moves);
        }
        self.ended.fetch_add(1, Ordering::Relaxed);
        self.used.give(moves);
    }

    /// How many a worker has to give up for this other one. Only who holds most gives: what it has more than the other, by
    /// half; and its last one, in turn, if the other has none at all.
    fn due(&self, worker: usize, to: usize, workers: usize) -> Due {
        let (moves, _) = self.used.read();
        let shares = self.shares(workers);
        let held = |at: usize| shares.get(at).map_or(0, |share| share.held.since(moves));
        let richest = (0..workers).filter(|at| *at != to).max_by_key(|at| (held(*at), usize::MAX - at));
        if richest != Some(worker) {
            return Due::default();
        }
        let (mine, theirs) = (held(worker), held(to));
        Due { excess: mine.saturating_sub(theirs) / 2, in_turn: usize::from(theirs == 0 && mine == 1) }
    }
}

/// Places that a worker has to give up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// At once: it has more than its share.
    pub excess: usize,
    /// When their connections have had their turn.
    pub in_turn: usize,
}

impl Caps {
    /// Limits per backend, in the order of the backend indexes, and in total; for one worker.
    pub fn new(backends: impl IntoIterator<Item = usize>, total: usize) -> Self {
        let caps = Self { backends: Table::new(0), total: Places::default(), beside: None, workers: 1 };
        for (index, limit) in backends.into_iter().enumerate() {
            caps.backends[index].set(limit);
        }
        caps.total.set(total);
        caps
    }

    /// With the backends at these addresses, in order.
    #[must_use]
    pub fn at(self, addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        (0..).zip(addresses).for_each(|(backend, address)| self.place(backend, address));
        self
    }

    /// For so many workers, which share them.
    #[must_use]
    pub fn shared_by(self, workers: usize) -> Self {
        Self { workers: workers.max(1), ..self }
    }

    /// With a backend whose connections are not part of the total: drills must not take what is the clients', nor leave
    /// them more.
    #[must_use]
    pub fn with_drill(self, backend: BackendIndex, limit: usize) -> Self {
        self.set_backend(backend, limit);
        Self { beside: Some(usize::from(backend)), ..self }
    }

    /// Changes the limit of a backend.
    pub fn set_backend(&self, backend: BackendIndex, limit: usize) {
        self.backends[usize::from(backend)].set(limit);
    }

    /// The backend is at this address from now on. If it was at another one, connections to that count in the total only.
    pub fn place(&self, backend: BackendIndex, address: SocketAddr) {
        let places = &self.backends[usize::from(backend)];
        let before = places.address.lock().unwrap_or_else(PoisonError::into_inner).replace(address);
        if before.is_some_and(|before| before != address) {
            places.used.moved();
            places.found.store(0, Ordering::Relaxed);
        }
    }

    /// How often the backend has moved.
    pub fn moves(&self, backend: BackendIndex) -> u32 {
        self.backends.get(usize::from(backend)).map_or(0, |places| places.used.read().0)
    }

    /// Changes the limit in total.
    pub fn set_total(&self, limit: usize) {
        self.total.set(limit);
    }

    /// How many workers share the places.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// So many connections a backend was found to take, which counts if it is less than its limit; none: it is not known.
    pub fn find(&self, backend: BackendIndex, takes: Option<usize>) {
        self.backends[usize::from(backend)].found.store(takes.unwrap_or(0), Ordering::Relaxed);
    }

    /// Connections to a backend that have ended.
    pub fn ended(&self, backend: BackendIndex) -> u64 {
        self.backends.get(usize::from(backend)).map_or(0, |places| places.ended.load(Ordering::Relaxed))
    }

    /// Counts one more connection, which is no worker's, or says which limit forbids it.
    pub fn acquire(self: &Arc<Self>, backend: BackendIndex) -> Result<Permit, AtCap> {
        self.take(backend, self.moves(backend), None, Places::limit)
    }

    /// The same for a connection that is to find out what the backend takes.
    pub fn acquire_to_find(self: &Arc<Self>, backend: BackendIndex) -> Result<Permit, AtCap> {
        self.take(backend, self.moves(backend), None, |places| places.limit.load(Ordering::Relaxed))
    }

    /// Counts one more connection of a worker, for which the backend is where it was after so many moves, or says which
    /// limit forbids it: because it is reached, or because what is left is for other workers.
    pub fn acquire_for(
        self: &Arc<Self>,
        worker: usize,
        backend: BackendIndex,
        moves: u32,
        now: Mono,
    ) -> Result<Permit, AtCap> {
        self.is_free_for(worker, backend, now)?;
        let permit = self.take(backend, moves, Some(worker), Places::limit)?;
        self.withdraw(worker, backend);
        if self.workers > 1 {
            self.backends[usize::from(backend)].shares(self.workers)[worker].took.store(now.0, Ordering::Relaxed);
        }
        Ok(permit)
    }

    fn take(
        self: &Arc<Self>,
        backend: BackendIndex,
        moves: u32,
        worker: Option<usize>,
        limit: impl Fn(&Places) -> usize,
    ) -> Result<Permit, AtCap> {
        let places = self.backends.get(usize::from(backend)).ok_or(AtCap::Backend)?;
        if !places.used.take(moves, limit(places)) {
            return Err(AtCap::Backend);
        }
        if !self.is_beside(backend) && !self.total.used.take(0, self.total.limit()) {
            places.used.give(moves);
            return Err(AtCap::Total);
        }
        if let Some(worker) = worker {
            places.taken(moves, worker, self.workers);
            self.total.taken(0, worker, self.workers);
        }
        let worker = worker.and_then(|worker| u16::try_from(worker).ok()).unwrap_or(NOBODY);
        Ok(Permit { caps: Arc::clone(self), backend, moves, worker })
    }

    /// Whether a place is free that is not for another worker, or which limit forbids one.
    fn is_free_for(&self, worker: usize, backend: BackendIndex, now: Mono) -> Result<(), AtCap> {
        let places = self.backends.get(usize::from(backend)).ok_or(AtCap::Backend)?;
        if !places.has_place_for(worker, self.workers, now) {
            return Err(AtCap::Backend);
        }
        if !self.is_beside(backend) && !self.total.has_place_for(worker, self.workers, now) {
            return Err(AtCap::Total);
        }
        Ok(())
    }

    /// Whether a worker would get one more connection to this backend now.
    pub fn has_place_for(&self, worker: usize, backend: BackendIndex, now: Mono) -> bool {
        self.is_free_for(worker, backend, now).is_ok()
    }

    /// A worker was refused and wants a place still: until the claim is over or [withdrawn](Self::withdraw), none goes to
    /// who holds more.
    pub fn claim(&self, worker: usize, backend: BackendIndex, cap: AtCap, now: Mono) {
        let places = match cap {
            AtCap::Backend => &self.backends[usize::from(backend)],
            AtCap::Total => &self.total,
        };
        if self.workers > 1 {
            places.shares(self.workers)[worker].claim.store(now.after(CLAIM).0, Ordering::Relaxed);
        }
    }

    /// A worker wants no other place of this backend for now.
    pub fn withdraw(&self, worker: usize, backend: BackendIndex) {
        if self.workers > 1 {
            for places in [&self.backends[usize::from(backend)], &self.total] {
                places.shares(self.workers)[worker].claim.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Whether a worker other than this one wants a place of this backend, or has got one not long ago.
    pub fn others_want(&self, worker: usize, backend: BackendIndex, now: Mono) -> bool {
        if self.workers == 1 {
            return false;
        }
        let shares = self.backends[usize::from(backend)].shares(self.workers).iter().enumerate();
        let wants = |share: &Share| {
            let took = share.took.load(Ordering::Relaxed);
            share.claim.load(Ordering::Relaxed) > now.0 || (took > 0 && Mono(took).after(RECENTLY) > now)
        };
        shares.filter(|(at, _)| *at != worker).any(|(_, share)| wants(share))
    }

    /// What this worker has to give up for the other one, of a backend's places or, if none, of all.
    pub fn due(&self, worker: usize, to: usize, backend: Option<BackendIndex>) -> Due {
        let places = backend.map_or(&self.total, |backend| &self.backends[usize::from(backend)]);
        places.due(worker, to, self.workers)
    }

    /// Whether a worker holds three quarters of a backend's places: then it takes what is idle from no other.
    pub fn has_most(&self, worker: usize, backend: BackendIndex) -> bool {
        let places = &self.backends[usize::from(backend)];
        let (moves, _) = places.used.read();
        let held = places.shares(self.workers).get(worker).map_or(0, |share| share.held.since(moves));
        let (limit, _) = places.read();
        limit > 1 && 4 * held >= 3 * limit
    }

    fn is_beside(&self, backend: BackendIndex) -> bool {
        self.beside == Some(usize::from(backend))
    }

    /// Whether one more connection to this backend is allowed now.
    pub fn has_place(&self, backend: BackendIndex) -> bool {
        let has_place = |(limit, used): (usize, usize)| used < limit;
        let in_total = self.is_beside(backend) || has_place(self.total());
        in_total && self.backend(backend).is_some_and(has_place)
    }

    /// Limit and use of a backend.
    pub fn backend(&self, backend: BackendIndex) -> Option<(usize, usize)> {
        self.backends.get(usize::from(backend)).map(Places::read)
    }

    /// Limit and use in total.
    pub fn total(&self) -> (usize, usize) {
        self.total.read()
    }
}

/// One counted connection; dropping it gives the place back.
#[derive(Debug)]
pub struct Permit {
    caps: Arc<Caps>,
    backend: BackendIndex,
    /// How often the backend had moved.
    moves: u32,
    /// [`NOBODY`]: a health check's, or a drill's.
    worker: u16,
}

/// More workers than there can be: each has a thread and a shard of the ledger.
const NOBODY: u16 = u16::MAX;

impl Permit {
    /// The backend that it was given for.
    pub fn backend(&self) -> BackendIndex {
        self.backend
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let workers = self.caps.workers;
        let worker = (self.worker != NOBODY).then_some(usize::from(self.worker));
        if let Some(places) = self.caps.backends.get(usize::from(self.backend)) {
            places.give(self.moves, worker, workers);
        }
        if !self.caps.is_beside(self.backend) {
            self.caps.total.give(0, worker, workers);
        }
    }
}

#[cfg(test)]
#[path = "caps_tests.rs"]
mod tests;

//! The limits on backend connections: process-wide counters, touched at open and close only.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::BackendIndex;
use crate::table::Table;

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
    backends: Table<Counted>,
    total: Counted,
    /// This backend's connections are not part of the total.
    beside: Option<usize>,
}

#[derive(Debug, Default)]
struct Counted {
    limit: AtomicUsize,
    /// What the backend was found to take, if that is less; zero: not known.
    found: AtomicUsize,
    used: AtomicUsize,
    /// Connections that have ended.
    ended: AtomicU64,
}

impl Counted {
    fn set(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    fn read(&self) -> (usize, usize) {
        (self.limit(), self.used.load(Ordering::Relaxed))
    }

    fn limit(&self) -> usize {
        let limit = self.limit.load(Ordering::Relaxed);
        match self.found.load(Ordering::Relaxed) {
            0 => limit,
            found => limit.min(found),
        }
    }

    fn take(&self, limit: usize) -> bool {
        let room = |used| (used < limit).then_some(used + 1);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_ok()
    }

    fn give(&self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
        self.used.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Caps {
    /// Limits per backend, in the order of the backend indexes, and in total.
    pub fn new(backends: impl IntoIterator<Item = usize>, total: usize) -> Self {
        let caps = Self { backends: Table::new(0), total: Counted::default(), beside: None };
        for (index, limit) in backends.into_iter().enumerate() {
            caps.backends[index].set(limit);
        }
        caps.total.set(total);
        caps
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

    /// Changes the limit in total.
    pub fn set_total(&self, limit: usize) {
        self.total.set(limit);
    }

    /// So many connections a backend was found to take, which counts if it is less than its limit; none: it is not known.
    pub fn find(&self, backend: BackendIndex, takes: Option<usize>) {
        self.backends[usize::from(backend)].found.store(takes.unwrap_or(0), Ordering::Relaxed);
    }

    /// Connections to a backend that have ended.
    pub fn ended(&self, backend: BackendIndex) -> u64 {
        self.backends.get(usize::from(backend)).map_or(0, |counted| counted.ended.load(Ordering::Relaxed))
    }

    /// Counts one more connection, or says which limit forbids it.
    pub fn acquire(self: &Arc<Self>, backend: BackendIndex) -> Result<Permit, AtCap> {
        self.take(backend, Counted::limit)
    }

    /// The same for a connection that is to find out what the backend takes.
    pub fn acquire_to_find(self: &Arc<Self>, backend: BackendIndex) -> Result<Permit, AtCap> {
        self.take(backend, |counted| counted.limit.load(Ordering::Relaxed))
    }

    fn take(self: &Arc<Self>, backend: BackendIndex, limit: impl Fn(&Counted) -> usize) -> Result<Permit, AtCap> {
        let counted = self.backends.get(usize::from(backend)).ok_or(AtCap::Backend)?;
        if !counted.take(limit(counted)) {
            return Err(AtCap::Backend);
        }
        if self.beside != Some(usize::from(backend)) && !self.total.take(self.total.limit()) {
            counted.give();
            return Err(AtCap::Total);
        }
        Ok(Permit { caps: Arc::clone(self), backend })
    }

    /// Whether one more connection to this backend is allowed now.
    pub fn has_place(&self, backend: BackendIndex) -> bool {
        let has_place = |(limit, used): (usize, usize)| used < limit;
        let in_total = self.beside == Some(usize::from(backend)) || has_place(self.total());
        in_total && self.backend(backend).is_some_and(has_place)
    }

    /// Limit and use of a backend.
    pub fn backend(&self, backend: BackendIndex) -> Option<(usize, usize)> {
        self.backends.get(usize::from(backend)).map(Counted::read)
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
}

impl Permit {
    /// The backend that it was given for.
    pub fn backend(&self) -> BackendIndex {
        self.backend
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(counted) = self.caps.backends.get(usize::from(self.backend)) {
            counted.give();
        }
        if self.caps.beside != Some(usize::from(self.backend)) {
            self.caps.total.give();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_and_places_come_back() {
        let caps = Arc::new(Caps::new([2, 5], 3));
        let first = caps.acquire(0);
        let second = caps.acquire(0);
        assert!(first.is_ok() && second.is_ok());
        assert_eq!(caps.acquire(0).err(), Some(AtCap::Backend));
        let third = caps.acquire(1);
        assert!(third.is_ok());
        assert_eq!(caps.acquire(1).err(), Some(AtCap::Total));
        assert!(!caps.has_place(0) && !caps.has_place(1));
        assert_eq!(caps.backend(1), Some((5, 1)), "a refusal by the total leaves the backend's count alone");
        drop(first);
        assert!(caps.has_place(0) && caps.has_place(1) && !caps.has_place(7));
        assert!(caps.acquire(1).is_ok());
        drop((second, third));
        assert_eq!(caps.total(), (3, 0));
        assert_eq!(caps.acquire(7).err(), Some(AtCap::Backend));
    }

    #[test]
    fn limits_change_while_they_are_in_use() {
        let caps = Arc::new(Caps::new([2], 9));
        let held = [caps.acquire(0), caps.acquire(0)];
        caps.set_backend(0, 1);
        assert_eq!((caps.backend(0), caps.acquire(0).err()), (Some((1, 2)), Some(AtCap::Backend)));
        drop(held);
        let held = caps.acquire(0);
        assert!(held.is_ok() && caps.acquire(0).is_err());
        caps.set_backend(0, 2);
        caps.set_total(1);
        assert_eq!(caps.acquire(0).err(), Some(AtCap::Total));
        caps.set_backend(40, 1);
        caps.set_total(2);
        assert!(caps.acquire(40).is_ok(), "a backend that came later");
    }

    #[test]
    fn what_a_backend_takes_counts_if_it_is_less() {
        let caps = Arc::new(Caps::new([3], 9));
        let first = caps.acquire(0);
        caps.find(0, Some(1));
        assert_eq!((caps.backend(0), caps.has_place(0)), (Some((1, 1)), false));
        assert_eq!(caps.acquire(0).err(), Some(AtCap::Backend));
        let check = caps.acquire_to_find(0);
        assert!(first.is_ok() && check.is_ok());
        drop(check);
        assert_eq!(caps.ended(0), 1);
        for takes in [Some(7), None] {
            caps.find(0, takes);
            assert_eq!(caps.backend(0), Some((3, 1)));
        }
    }

    #[test]
    fn drills_are_beside_the_total() {
        let caps = Arc::new(Caps::new([5], 2).with_drill(1, 1));
        let drill = caps.acquire(1);
        assert!(drill.is_ok());
        assert_eq!(caps.acquire(1).err(), Some(AtCap::Backend));
        let kept = [caps.acquire(0), caps.acquire(0)];
        assert_eq!(caps.acquire(0).err(), Some(AtCap::Total));
        assert_eq!(caps.total(), (2, 2));
        drop(kept);
        drop(drill);
        assert_eq!((caps.total(), caps.backend(1)), ((2, 0), Some((1, 0))));
    }
}

//! The limits on backend connections: process-wide counters, touched at open and close only.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::BackendIndex;

/// Which limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtCap {
    /// `[[pool.backend]] max_connections`
    Backend,
    /// `[connections] max_total`
    Total,
}

/// The limits and their use.
#[derive(Debug)]
pub struct Caps {
    backends: Box<[Counted]>,
    total: Counted,
    /// Backends from this index on are not part of the total.
    beside: usize,
}

#[derive(Debug)]
struct Counted {
    limit: usize,
    used: AtomicUsize,
}

impl Counted {
    fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0) }
    }

    fn take(&self) -> bool {
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| (used < self.limit).then_some(used + 1))
            .is_ok()
    }

    fn give(&self) {
        self.used.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Caps {
    /// Limits per backend, in the order of the backend indexes, and in total.
    pub fn new(backends: impl IntoIterator<Item = usize>, total: usize) -> Self {
        let backends: Box<[Counted]> = backends.into_iter().map(Counted::new).collect();
        let beside = backends.len();
        Self { backends, total: Counted::new(total), beside }
    }

    /// One more backend, the last, whose connections are not part of the total: drills must not take what is the
    /// clients', nor leave them more.
    #[must_use]
    pub fn with_drill(self, limit: usize) -> Self {
        let backends = self.backends.into_iter().chain([Counted::new(limit)]).collect();
        Self { backends, ..self }
    }

    /// Counts one more connection, or says which limit forbids it.
    pub fn acquire(self: &Arc<Self>, backend: BackendIndex) -> Result<Permit, AtCap> {
        let counted = self.backends.get(usize::from(backend)).ok_or(AtCap::Backend)?;
        if !counted.take() {
            return Err(AtCap::Backend);
        }
        if usize::from(backend) < self.beside && !self.total.take() {
            counted.give();
            return Err(AtCap::Total);
        }
        Ok(Permit { caps: Arc::clone(self), backend })
    }

    /// Limit and use of a backend.
    pub fn backend(&self, backend: BackendIndex) -> Option<(usize, usize)> {
        self.backends.get(usize::from(backend)).map(|counted| (counted.limit, counted.used.load(Ordering::Relaxed)))
    }

    /// Limit and use in total.
    pub fn total(&self) -> (usize, usize) {
        (self.total.limit, self.total.used.load(Ordering::Relaxed))
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
        if usize::from(self.backend) < self.caps.beside {
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
        assert_eq!(caps.backend(1), Some((5, 1)), "a refusal by the total leaves the backend's count alone");
        drop(first);
        assert!(caps.acquire(1).is_ok());
        drop((second, third));
        assert_eq!(caps.total(), (3, 0));
        assert_eq!(caps.acquire(7).err(), Some(AtCap::Backend));
    }

    #[test]
    fn drills_are_beside_the_total() {
        let caps = Arc::new(Caps::new([5], 2).with_drill(1));
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

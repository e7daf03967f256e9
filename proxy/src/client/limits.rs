//! The limits on client connections: touched when one is accepted and when it ends.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::stats::Refusal;

/// Client connections in total and per client address.
#[derive(Debug)]
pub struct ClientLimits {
    max: usize,
    open: AtomicUsize,
    per_client: Mutex<HashMap<(u16, IpAddr), usize>>,
}

impl ClientLimits {
    /// At most `max` in total.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, open: AtomicUsize::new(0), per_client: Mutex::default() })
    }

    /// Counts one more connection in total, whoever its client is, or says which limit forbids it.
    pub fn enter(self: &Arc<Self>) -> Result<Place, Refusal> {
        let room = |open: usize| (open < self.max).then_some(open + 1);
        self.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).map_err(|_| Refusal::MaxConnections)?;
        Ok(Place { limits: Arc::clone(self) })
    }

    /// Limit and use.
    pub fn total(&self) -> (usize, usize) {
        (self.max, self.open.load(Ordering::Relaxed))
    }
}

/// One connection that counts in total; dropping it gives the place back.
#[derive(Debug)]
pub struct Place {
    limits: Arc<ClientLimits>,
}

impl Place {
    /// Counts the connection as this client's, or says which limit forbids it; then the place is given back. An IPv4
    /// address is the same client whether or not a dual-stack listener mapped it.
    pub fn admit(self, listener: u16, client: IpAddr, max_per_client: usize) -> Result<Admitted, Refusal> {
        let who = (listener, client.to_canonical());
        let mut per_client = self.limits.per_client.lock().unwrap_or_else(PoisonError::into_inner);
        let open = per_client.entry(who).or_default();
        if *open >= max_per_client {
            return Err(Refusal::PerClient);
        }
        *open += 1;
        drop(per_client);
        Ok(Admitted { place: self, who })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.limits.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One counted client connection; dropping it gives the place back.
#[derive(Debug)]
pub struct Admitted {
    place: Place,
    who: (u16, IpAddr),
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut per_client = self.place.limits.per_client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = per_client.get_mut(&self.who) {
            *open -= 1;
            if *open == 0 {
                per_client.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn limits_hold_and_places_come_back() {
        let limits = ClientLimits::new(3);
        let one: IpAddr = "192.0.2.1".parse().unwrap();
        let mapped: IpAddr = "::ffff:192.0.2.1".parse().unwrap();
        let other: IpAddr = "192.0.2.2".parse().unwrap();
        let a = limits.enter().unwrap().admit(0, one, 2).unwrap();
        let b = limits.enter().unwrap().admit(0, mapped, 2).unwrap();
        assert_eq!(limits.enter().unwrap().admit(0, one, 2).err(), Some(Refusal::PerClient));
        assert_eq!(limits.total(), (3, 2), "a refusal is not counted");
        let c = limits.enter().unwrap().admit(0, other, 2).unwrap();
        assert_eq!(limits.enter().err(), Some(Refusal::MaxConnections));
        drop(a);
        assert!(limits.enter().unwrap().admit(0, one, 2).is_ok());
        drop((b, c));
        assert_eq!(limits.total(), (3, 0));
        assert!(limits.per_client.lock().unwrap().is_empty(), "nothing is kept of clients that left");
    }
}

//! The limits on client connections: touched when one is accepted and when it ends.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::rate::{Rates, Verdict};
use crate::clock::Mono;
use crate::config::network::masked;
use crate::config::{Config, Listener};
use crate::stats::Refusal;

/// Client connections in total, per listener and per client, of all workers together.
#[derive(Debug)]
pub struct ClientLimits {
    total: Count,
    listeners: Box<[OfListener]>,
    /// Percent of a limit above which new connections are restricted.
    threshold: usize,
}

#[derive(Debug)]
struct OfListener {
    all: Count,
    per_client: usize,
    mask_v4: u8,
    mask_v6: u8,
    clients: Mutex<Clients>,
}

#[derive(Debug)]
struct Clients {
    open: HashMap<IpAddr, usize, foldhash::fast::RandomState>,
    rates: Option<Rates>,
}

/// Connections that are open, and how many may be.
#[derive(Debug)]
struct Count {
    open: AtomicUsize,
    max: usize,
}

impl Count {
    fn new(max: usize) -> Self {
        Self { open: AtomicUsize::new(0), max }
    }

    /// One more, if there is room; how many there were before.
    fn enter(&self) -> Option<usize> {
        let room = |open: usize| (open < self.max).then_some(open + 1);
        self.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).ok()
    }

    fn leave(&self) {
        self.open.fetch_sub(1, Ordering::AcqRel);
    }
}

impl ClientLimits {
    /// Those of a configuration.
    pub fn new(config: &Config) -> Arc<Self> {
        let of_listener = |listener: &Listener| OfListener {
            all: Count::new(if listener.max_connections == 0 { usize::MAX } else { listener.max_connections }),
            per_client: listener.max_connections_per_client,
            mask_v4: listener.client_mask_v4,
            mask_v6: listener.client_mask_v6,
            clients: Mutex::new(Clients {
                open: HashMap::default(),
                rates: (listener.connection_rate_per_client > 0)
                    .then(|| Rates::new(listener.connection_rate_per_client, listener.ban_duration)),
            }),
        };
        Arc::new(Self {
            total: Count::new(config.server.max_connections),
            listeners: config.listeners.iter().map(of_listener).collect(),
            threshold: usize::from(config.overload.threshold),
        })
    }

    /// Counts one more connection in total and on this listener, whoever its client is, or says which limit forbids it.
    pub fn enter(self: &Arc<Self>, listener: u16) -> Result<Place, Refusal> {
        let of_listener = &self.listeners[usize::from(listener)].all;
        let total = self.total.enter().ok_or(Refusal::MaxConnections)?;
        let Some(here) = of_listener.enter() else {
            self.total.leave();
            return Err(Refusal::PerListener);
        };
        let near = self.is_near(total, self.total.max) || self.is_near(here, of_listener.max);
        Ok(Place { limits: Arc::clone(self), listener, near })
    }

    /// Whether so many open connections are `threshold` percent of this limit, or more.
    fn is_near(&self, open: usize, max: usize) -> bool {
        open.saturating_mul(100) >= max.saturating_mul(self.threshold)
    }
}

/// One connection that counts in total and on its listener; dropping it gives the place back.
#[derive(Debug)]
pub struct Place {
    limits: Arc<ClientLimits>,
    listener: u16,
    near: bool,
}

impl Place {
    fn of_listener(&self) -> &OfListener {
        &self.limits.listeners[usize::from(self.listener)]
    }

    /// Counts the connection as this client's, or says which limit forbids it; then the place is given back. A client is
    /// an address, or the network of the listener's masks. An IPv4 address is the same client whether or not a
    /// dual-stack listener mapped it.
    pub fn admit(self, client: IpAddr, now: Mono) -> Result<Admitted, Refusal> {
        let here = self.of_listener();
        let client = masked(client.to_canonical(), here.mask_v4, here.mask_v6);
        let mut clients = here.clients.lock().unwrap_or_else(PoisonError::into_inner);
        match clients.rates.as_mut().map_or(Verdict::Welcome, |rates| rates.connects(client, now)) {
            Verdict::Welcome => {}
            Verdict::TooOften => return Err(Refusal::ConnectionRate),
            Verdict::Banned => return Err(Refusal::Banned),
        }
        let open = clients.open.get(&client).copied().unwrap_or(0);
        if open >= here.per_client {
            return Err(Refusal::PerClient);
        }
        clients.open.insert(client, open + 1);
        drop(clients);
        let restricted = self.near || self.limits.is_near(open, here.per_client);
        Ok(Admitted { place: self, client, restricted })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of_listener().all.leave();
        self.limits.total.leave();
    }
}

/// One counted client connection; dropping it gives the place back.
#[derive(Debug)]
pub struct Admitted {
    place: Place,
    client: IpAddr,
    restricted: bool,
}

impl Admitted {
    /// Whether a limit was nearly reached when it came: it gets the times of `[overload]`.
    pub fn is_restricted(&self) -> bool {
        self.restricted
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut clients = self.place.of_listener().clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = clients.open.get_mut(&self.client) {
            *open -= 1;
            if *open == 0 {
                clients.open.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;

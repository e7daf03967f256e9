//! The limits on client connections: touched when one is accepted and when it ends.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::rate::{Rates, Verdict};
use super::shares::{Entered, Shares, Ticket};
use crate::clock::Mono;
use crate::config::network::masked;
use crate::config::{Config, Listener};
use crate::stats::{Refusal, Stage};

/// Client connections in total, per listener and per client, of all workers together.
#[derive(Debug)]
pub struct ClientLimits {
    total: Count,
    listeners: Box<[OfListener]>,
    /// Percent of a limit above which new connections are restricted.
    threshold: AtomicUsize,
}

#[derive(Debug)]
struct OfListener {
    all: Count,
    /// By [`Stage`]: those that wait for it to end.
    pending: [Mutex<Shares<Arc<Notify>>>; Stage::ALL.len()],
    clients: Mutex<Clients>,
}

#[derive(Debug)]
struct Clients {
    /// How many connections each may have.
    max: usize,
    mask_v4: u8,
    mask_v6: u8,
    open: HashMap<IpAddr, usize, foldhash::fast::RandomState>,
    rates: Option<Rates>,
}

/// Connections that are open, and how many may be.
#[derive(Debug)]
struct Count {
    open: AtomicUsize,
    max: AtomicUsize,
}

impl Count {
    fn new(max: usize) -> Self {
        Self { open: AtomicUsize::new(0), max: AtomicUsize::new(max) }
    }

    fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// One more, if there is room; how many there were before.
    fn enter(&self) -> Option<usize> {
        let room = |open: usize| (open < self.max()).then_some(open + 1);
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
            all: Count::new(max_connections(listener)),
            pending: Stage::ALL.map(|stage| Mutex::new(Shares::new(max_pending(config, listener, stage)))),
            clients: Mutex::new(Clients::new(listener)),
        };
        Arc::new(Self {
            total: Count::new(config.server.max_connections),
            listeners: config.listeners.iter().map(of_listener).collect(),
            threshold: AtomicUsize::new(usize::from(config.overload.threshold)),
        })
    }

    /// Takes those of another configuration with the same listeners. Nobody who is in is sent away.
    pub fn adopt(&self, config: &Config) {
        self.total.max.store(config.server.max_connections, Ordering::Relaxed);
        self.threshold.store(usize::from(config.overload.threshold), Ordering::Relaxed);
        for (ours, listener) in self.listeners.iter().zip(&config.listeners) {
            ours.all.max.store(max_connections(listener), Ordering::Relaxed);
            for (stage, pending) in Stage::ALL.into_iter().zip(&ours.pending) {
                pending.lock().unwrap_or_else(PoisonError::into_inner).resize(max_pending(config, listener, stage));
            }
            let mut clients = ours.clients();
            let same = |rates: &Rates| rates.is(listener.connection_rate_per_client, listener.ban_duration);
            let rates = clients.rates.take().filter(same);
            let open = std::mem::take(&mut clients.open);
            let new = Clients::new(listener);
            *clients = Clients { open, rates: rates.or(new.rates), ..new };
        }
    }

    /// Counts one more connection in total and on this listener, whoever its client is, or says which limit forbids it.
    pub fn enter(self: &Arc<Self>, listener: u16) -> Result<Place, Refusal> {
        let of_listener = &self.listeners[usize::from(listener)].all;
        let total = self.total.enter().ok_or(Refusal::MaxConnections)?;
        let Some(here) = of_listener.enter() else {
            self.total.leave();
            return Err(Refusal::PerListener);
        };
        let near = self.is_near(total, self.total.max()) || self.is_near(here, of_listener.max());
        Ok(Place { limits: Arc::clone(self), listener, near })
    }

    /// The connections that count on a listener, whatever they wait for, and how many may; none: no limit of its own.
    pub fn on_listener(&self, listener: usize) -> Option<(usize, Option<usize>)> {
        let all = &self.listeners.get(listener)?.all;
        let max = all.max();
        Some((all.open.load(Ordering::Relaxed), (max < usize::MAX).then_some(max)))
    }

    /// One more connection of this listener waits for something before its session begins. `client` is whoever holds the
    /// place: a client as [`client`](Self::client) has it, or a peer that speaks for clients. If no place is free,
    /// another connection loses its own.
    pub fn wait_for(self: &Arc<Self>, listener: u16, stage: Stage, client: IpAddr) -> Waiting {
        let told_by = Arc::new(Notify::new());
        let mut shares = self.pending(listener, stage);
        let Entered { ticket, hurries, evicted } = shares.enter(client, Arc::clone(&told_by));
        drop(shares);
        if let Some(evicted) = evicted {
            evicted.notify_one();
        }
        Waiting { limits: Arc::clone(self), listener, stage, ticket, hurries, told_by }
    }

    fn pending(&self, listener: u16, stage: Stage) -> MutexGuard<'_, Shares<Arc<Notify>>> {
        self.listeners[usize::from(listener)].pending[stage as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What counts as one client on this listener. An IPv4 address is the same client whether or not a dual-stack listener
    /// mapped it.
    pub fn client(&self, listener: u16, address: IpAddr) -> IpAddr {
        self.listeners[usize::from(listener)].clients().of(address)
    }

    /// Whether so many open connections are `threshold` percent of this limit, or more.
    fn is_near(&self, open: usize, max: usize) -> bool {
        open.saturating_mul(100) >= max.saturating_mul(self.threshold.load(Ordering::Relaxed))
    }
}

/// On a listener; 0 in the configuration is no limit.
fn max_connections(listener: &Listener) -> usize {
    if listener.max_connections == 0 { usize::MAX } else { listener.max_connections }
}

/// At once; 0 where nobody waits for that. Those who wait never have more than half of the places for connections, so that
/// they don't keep out the others.
fn max_pending(config: &Config, listener: &Listener, stage: Stage) -> usize {
    let configured = match stage {
        Stage::ProxyHeader => listener.accept_proxy.as_ref().map_or(0, |proxy| proxy.max_pending),
        Stage::TlsHandshake => listener.tls.as_ref().map_or(0, |tls| tls.max_handshakes),
    };
    let places = max_connections(listener).min(config.server.max_connections);
    configured.min((places / 2).max(1))
}

impl OfListener {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clients {
    fn new(listener: &Listener) -> Self {
        let rate = listener.connection_rate_per_client;
        Self {
            max: listener.max_connections_per_client,
            mask_v4: listener.client_mask_v4,
            mask_v6: listener.client_mask_v6,
            open: HashMap::default(),
            rates: (rate > 0).then(|| Rates::new(rate, listener.ban_duration)),
        }
    }

    /// What counts as one client.
    fn of(&self, address: IpAddr) -> IpAddr {
        masked(address.to_canonical(), self.mask_v4, self.mask_v6)
    }
}

/// A place of one of those who wait for a [`Stage`] to end; dropping it gives the place back.
#[derive(Debug)]
pub struct Waiting {
    limits: Arc<ClientLimits>,
    listener: u16,
    stage: Stage,
    ticket: Ticket,
    hurries: bool,
    told_by: Arc<Notify>,
}

impl Waiting {
    /// How long it may take of this time. Places run out: whoever has more than an equal part of them gets a quarter.
    pub fn time(&self, timeout: Duration) -> Duration {
        if self.hurries { timeout / 4 } else { timeout }
    }

    /// Ends when the place is lost to another.
    pub async fn evicted(&self) {
        self.told_by.notified().await;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.limits.pending(self.listener, self.stage).leave(self.ticket);
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
    /// an address, or the network of the listener's masks.
    pub fn admit(self, client: IpAddr, now: Mono) -> Result<Admitted, Refusal> {
        let here = self.of_listener();
        let mut clients = here.clients();
        let client = clients.of(client);
        match clients.rates.as_mut().map_or(Verdict::Welcome, |rates| rates.connects(client, now)) {
            Verdict::Welcome => {}
            Verdict::TooOften => return Err(Refusal::ConnectionRate),
            Verdict::Banned => return Err(Refusal::Banned),
        }
        let open = clients.open.get(&client).copied().unwrap_or(0);
        let max = clients.max;
        if open >= max {
            return Err(Refusal::PerClient);
        }
        clients.open.insert(client, open + 1);
        drop(clients);
        let restricted = self.near || self.limits.is_near(open, max);
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
        let mut clients = self.place.of_listener().clients();
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

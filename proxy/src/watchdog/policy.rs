//! The thresholds of the watchdog's decisions, taken from the configuration.

use std::net::SocketAddr;
use std::time::Duration;

use crate::config::{self, Config, Numbers};
use crate::kernel::KernelSocket;
use crate::ledger::BackendIndex;

/// The backend label of the drill's own peer.
pub const DRILL: &str = "drill";

/// Idle timeout of the drill's connections. Short, so that a drilled hoard need not wait for the configured one; the
/// kernel's time of the last byte decides all the same.
pub const DRILL_IDLE_TIMEOUT: Duration = Duration::from_millis(500);

/// A worker that has not shown for this long that it runs is stalled. Workers beat at least once a second.
pub const STALLED_AFTER: Duration = Duration::from_secs(3);

/// Addresses remembered that a backend had before.
const MAX_FORMER: usize = 16;

/// What the pure join decides by.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Backends by index; beside a ledger one is the drill's peer.
    pub backends: Vec<BackendPolicy>,
    /// Which one that is.
    pub drill: BackendIndex,
    /// Shards that must show a heartbeat: the workers'. The drill's comes after them and has none.
    pub workers: usize,
    /// How long a condition must have held.
    pub grace: Duration,
    /// In how many consecutive sweeps it must have been seen.
    pub sweeps: u32,
    /// Age of a heartbeat at which its worker is stalled.
    pub stalled_after: Duration,
    /// Sweeps further apart than this are not consecutive: the process was stopped, or the machine slept, and nobody
    /// had the chance to put anything right.
    pub max_pause: Duration,
}

/// What is expected of the connections to one backend.
#[derive(Clone, Debug)]
pub struct BackendPolicy {
    /// The label in metrics and logs; empty: the number is vacant.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Where it was before a reload: connections from then may still be there.
    pub former: Vec<SocketAddr>,
    /// The configuration has it; else it had it before a reload.
    pub configured: bool,
    /// Without a byte for this long, a connection with nothing in flight should have been closed: the longer of idle
    /// timeout and query timeout (it may have had a query until then that nobody answered), and clean-up interval.
    pub hoard_after: Duration,
    /// The same for a connection that can never be used again.
    pub spent_after: Duration,
    /// The same for a spare connection: nothing was ever sent on it.
    pub spare_after: Duration,
    /// Without a byte for this long, one with queries in flight should have been closed: longer than every timeout.
    pub stuck_after: Duration,
    /// For `connect(2)`, and one clean-up.
    pub embryo_after: Duration,
    /// The same for a health check, whose own time is for all of it: connecting, TLS, the answer.
    pub check_after: Duration,
    /// A zone transfer may wait for so long since its client has last read something, whatever its backend does
    /// meanwhile: the longest of the listeners' write timeouts, and one clean-up.
    pub paused_after: Duration,
}

impl Policy {
    /// The thresholds of a configuration. `drill` is where the drill's peer listens.
    pub fn new(config: &Config, drill: SocketAddr) -> Self {
        let numbers = Numbers::new(config);
        let mut policy = Self {
            backends: Vec::new(),
            drill: numbers.drill().unwrap_or(BackendIndex::MAX),
            workers: config.server.workers,
            grace: config.watchdog.grace,
            sweeps: config.watchdog.sweeps,
            stalled_after: STALLED_AFTER,
            max_pause: max_pause(&config.watchdog),
        };
        policy.backends.resize(numbers.backends(), BackendPolicy::drill(drill, &config.connections));
        policy.set_backends(config, &numbers);
        policy
    }

    /// The thresholds of another configuration that replaces this one's.
    #[must_use]
    pub fn next(&self, config: &Config, numbers: &Numbers) -> Self {
        let mut policy = Self {
            grace: config.watchdog.grace,
            sweeps: config.watchdog.sweeps,
            max_pause: max_pause(&config.watchdog),
            ..self.clone()
        };
        let Some(drill) = self.backend(self.drill).map(|drill| drill.address) else { return policy };
        let drill = BackendPolicy::drill(drill, &config.connections);
        if let Some(old) = policy.backends.get_mut(usize::from(self.drill)) {
            old.clone_from(&drill);
        }
        for (index, backend) in policy.backends.iter_mut().enumerate() {
            backend.configured = index == usize::from(self.drill);
        }
        policy.backends.resize(numbers.backends(), drill);
        policy.set_backends(config, numbers);
        policy.without_vacant(numbers)
    }

    /// Without the names that are forgotten: what has their numbers is nobody.
    #[must_use]
    pub fn without_vacant(mut self, numbers: &Numbers) -> Self {
        for (_, backend) in self.backends.iter_mut().enumerate().filter(|(index, _)| numbers.is_vacant(*index)) {
            backend.name.clear();
            backend.former.clear();
            backend.configured = false;
        }
        self
    }

    /// The names of the backends with their numbers, the drill's peer and those that went lately included.
    pub fn names(&self) -> impl Iterator<Item = (usize, &str)> {
        let names = self.backends.iter().map(|backend| backend.name.as_str()).enumerate();
        names.filter(|(_, name)| !name.is_empty())
    }

    fn set_backends(&mut self, config: &Config, numbers: &Numbers) {
        let known = self.backends.len();
        let write_timeout = config.listeners.iter().map(|listener| listener.write_timeout).max().unwrap_or_default();
        for (pool, backend) in config.pools.iter().flat_map(|pool| pool.backends.iter().map(move |it| (pool, it))) {
            let Some(index) = numbers.backend(&backend.name).map(usize::from).filter(|index| *index < known) else {
                continue;
            };
            let old = &self.backends[index];
            let mut former = if old.name == backend.name { old.former.clone() } else { Vec::new() };
            if old.name == backend.name && old.address != backend.address && !former.contains(&old.address) {
                former.push(old.address);
                former.drain(..former.len().saturating_sub(MAX_FORMER));
            }
            let new = BackendPolicy::new(pool, backend, &config.connections);
            self.backends[index] = BackendPolicy { former, paused_after: write_timeout + new.paused_after, ..new };
        }
    }

    /// As patient as both, for the time in which there are connections of before a reload.
    #[must_use]
    pub fn as_patient_as(&self, other: &Self) -> Self {
        let mut policy = self.clone();
        for (ours, theirs) in policy.backends.iter_mut().zip(&other.backends) {
            ours.hoard_after = ours.hoard_after.max(theirs.hoard_after);
            ours.spent_after = ours.spent_after.max(theirs.spent_after);
            ours.spare_after = ours.spare_after.max(theirs.spare_after);
            ours.stuck_after = ours.stuck_after.max(theirs.stuck_after);
            ours.embryo_after = ours.embryo_after.max(theirs.embryo_after);
            ours.check_after = ours.check_after.max(theirs.check_after);
            ours.paused_after = ours.paused_after.max(theirs.paused_after);
        }
        policy
    }

    /// The longest time for which a healthy connection may be silent.
    pub fn longest(&self) -> Duration {
        self.backends.iter().map(|backend| backend.hoard_after.max(backend.stuck_after)).max().unwrap_or_default()
    }

    /// For the connections of another process to these backends, which are called by their addresses: silent for longer
    /// than `idle` they are not used any more, and connecting for longer than `connect` is in vain.
    pub fn beside(settings: &config::Watchdog, backends: &[SocketAddr], idle: Duration, connect: Duration) -> Self {
        let backend = |address: &SocketAddr| BackendPolicy {
            name: address.to_string(),
            address: *address,
            former: Vec::new(),
            configured: true,
            hoard_after: idle,
            spent_after: idle,
            spare_after: Duration::from_secs(2),
            stuck_after: idle,
            embryo_after: connect,
            check_after: connect,
            paused_after: Duration::ZERO,
        };
        Self {
            backends: backends.iter().map(backend).collect(),
            drill: BackendIndex::MAX,
            workers: 0,
            grace: settings.grace,
            sweeps: settings.sweeps,
            stalled_after: STALLED_AFTER,
            max_pause: max_pause(settings),
        }
    }

    /// The index of the drill's peer.
    pub fn drill(&self) -> BackendIndex {
        self.drill
    }

    /// The backend at an index.
    pub fn backend(&self, index: BackendIndex) -> Option<&BackendPolicy> {
        self.backends.get(usize::from(index))
    }

    /// The backend that is a socket's peer, if one is or was. Two backends with one address are told apart by the ledger
    /// only.
    pub fn backend_of(&self, socket: &KernelSocket) -> Option<BackendIndex> {
        self.backend_at(socket.remote)
    }

    fn backend_at(&self, address: SocketAddr) -> Option<BackendIndex> {
        let is = |backend: &BackendPolicy| backend.configured && backend.address == address;
        let was = |backend: &BackendPolicy| {
            !backend.name.is_empty() && (backend.address == address || backend.former.contains(&address))
        };
        let index = self.backends.iter().position(is).or_else(|| self.backends.iter().position(was))?;
        BackendIndex::try_from(index).ok()
    }

    /// The label of a backend, `unknown` without one.
    pub fn label(&self, backend: Option<BackendIndex>) -> &str {
        let name = backend.and_then(|index| self.backend(index)).map(|backend| backend.name.as_str());
        name.filter(|name| !name.is_empty()).unwrap_or("unknown")
    }
}

impl BackendPolicy {
    fn new(pool: &config::Pool, backend: &config::Backend, connections: &config::Connections) -> Self {
        let longest = [pool.query_timeout, backend.connect_timeout, backend.write_timeout, backend.health.timeout]
            .into_iter()
            .fold(connections.idle_timeout, Duration::max);
        // In a TLS handshake the kernel shows an established connection, and it may be silent until the time is over.
        let handshake = if backend.tls.is_some() { backend.connect_timeout } else { Duration::ZERO };
        let hoard = pool.query_timeout.max(connections.idle_timeout).max(handshake);
        Self {
            name: backend.name.clone(),
            address: backend.address,
            former: Vec::new(),
            configured: true,
            hoard_after: hoard + connections.cleanup_interval,
            spent_after: handshake + connections.cleanup_interval,
            spare_after: connections.spare_idle_timeout.max(handshake) + connections.cleanup_interval,
            stuck_after: longest + connections.cleanup_interval,
            embryo_after: backend.connect_timeout + connections.cleanup_interval,
            check_after: backend.health.timeout + connections.cleanup_interval,
            paused_after: connections.cleanup_interval,
        }
    }

    fn drill(address: SocketAddr, connections: &config::Connections) -> Self {
        Self {
            name: DRILL.to_owned(),
            address,
            former: Vec::new(),
            configured: true,
            hoard_after: DRILL_IDLE_TIMEOUT + connections.cleanup_interval,
            spent_after: connections.cleanup_interval,
            spare_after: connections.spare_idle_timeout + connections.cleanup_interval,
            stuck_after: DRILL_IDLE_TIMEOUT + connections.cleanup_interval,
            embryo_after: DRILL_IDLE_TIMEOUT + connections.cleanup_interval,
            check_after: DRILL_IDLE_TIMEOUT + connections.cleanup_interval,
            paused_after: Duration::ZERO,
        }
    }
}

fn max_pause(settings: &config::Watchdog) -> Duration {
    (settings.interval * 5).max(Duration::from_secs(2))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use crate::config::ReapMode;
    use crate::watchdog::fixture;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_check_may_take_its_own_time() {
        let mut config = fixture::config(ReapMode::Off, None);
        let backend = &mut config.pools[0].backends[0];
        (backend.connect_timeout, backend.health.timeout) = (Duration::from_secs(2), Duration::from_secs(20));
        let policy = Policy::new(&config, at("127.0.0.1:7"));
        let (embryo, check) = (policy.backends[0].embryo_after, policy.backends[0].check_after);
        assert_eq!((embryo, check), (Duration::from_millis(2100), Duration::from_millis(20_100)));
    }

    #[test]
    fn a_reload_keeps_numbers_remembers_addresses_and_is_patient() {
        let old = fixture::config(ReapMode::Off, None);
        let numbers = Numbers::new(&old);
        let policy = Policy::new(&old, at("127.0.0.1:7"));
        let (a, drill) = (policy.backends[0].address, policy.drill());
        let mut new = old.clone();
        new.connections.idle_timeout /= 10;
        new.pools[0].backends[0].address = at("127.0.0.1:10");
        let mut another = new.pools[0].backends[0].clone();
        (another.name, another.address) = ("another".to_owned(), a);
        new.pools[0].backends.push(another);
        let numbers = numbers.with(&new, crate::clock::Mono::ZERO).unwrap();
        let next = policy.next(&new, &numbers);
        assert_eq!((next.drill(), next.label(Some(drill)), next.backends.len()), (drill, DRILL, 3));
        assert_eq!(next.backend_at(at("127.0.0.1:10")), Some(0));
        assert_eq!(next.backend_at(a), Some(2), "who has the address now comes before who had it");

        let last = next.next(&old, &numbers);
        assert_eq!(last.backend_at(at("127.0.0.1:10")), Some(0), "connections from then may still be there");
        assert!(!last.backends[2].configured && last.backends[0].configured);

        assert!(next.backends[0].hoard_after < policy.backends[0].hoard_after);
        assert_eq!(next.as_patient_as(&policy).backends[0].hoard_after, policy.backends[0].hoard_after);
    }
}

//! The thresholds of the watchdog's decisions, taken from the configuration once.

use std::net::SocketAddr;
use std::time::Duration;

use crate::config::{self, Config};
use crate::kernel::KernelSocket;
use crate::ledger::BackendIndex;

/// The backend label of the drill's own peer.
pub const DRILL: &str = "drill";

/// Idle timeout of the drill's connections. Short, so that a drilled hoard need not wait for the configured one; the
/// kernel's time of the last byte decides all the same.
pub const DRILL_IDLE_TIMEOUT: Duration = Duration::from_millis(500);

/// A worker that has not shown for this long that it runs is stalled. Workers beat at least once a second.
pub const STALLED_AFTER: Duration = Duration::from_secs(3);

/// What the pure join decides by.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Backends by index; beside a ledger the last one is the drill's peer.
    pub backends: Vec<BackendPolicy>,
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
    /// The label in metrics and logs.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
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
}

impl Policy {
    /// The thresholds of a configuration. `drill` is where the drill's peer listens.
    pub fn new(config: &Config, drill: SocketAddr) -> Self {
        let connections = &config.connections;
        let mut backends: Vec<BackendPolicy> = config
            .pools
            .iter()
            .flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend)))
            .map(|(pool, backend)| {
                let longest =
                    [pool.query_timeout, backend.connect_timeout, backend.write_timeout, backend.health.timeout]
                        .into_iter()
                        .fold(connections.idle_timeout, Duration::max);
                BackendPolicy {
                    name: backend.name.clone(),
                    address: backend.address,
                    hoard_after: pool.query_timeout.max(connections.idle_timeout) + connections.cleanup_interval,
                    spent_after: connections.cleanup_interval,
                    spare_after: connections.spare_idle_timeout + connections.cleanup_interval,
                    stuck_after: longest + connections.cleanup_interval,
                    embryo_after: backend.connect_timeout + connections.cleanup_interval,
                }
            })
            .collect();
        backends.push(BackendPolicy {
            name: DRILL.to_owned(),
            address: drill,
            hoard_after: DRILL_IDLE_TIMEOUT + connections.cleanup_interval,
            spent_after: connections.cleanup_interval,
            spare_after: connections.spare_idle_timeout + connections.cleanup_interval,
            stuck_after: DRILL_IDLE_TIMEOUT + connections.cleanup_interval,
            embryo_after: DRILL_IDLE_TIMEOUT + connections.cleanup_interval,
        });
        Self {
            backends,
            workers: config.server.workers,
            grace: config.watchdog.grace,
            sweeps: config.watchdog.sweeps,
            stalled_after: STALLED_AFTER,
            max_pause: max_pause(&config.watchdog),
        }
    }

    /// For the connections of another process to these backends, which are called by their addresses: silent for longer
    /// than `idle` they are not used any more, and connecting for longer than `connect` is in vain.
    pub fn beside(settings: &config::Watchdog, backends: &[SocketAddr], idle: Duration, connect: Duration) -> Self {
        let backend = |address: &SocketAddr| BackendPolicy {
            name: address.to_string(),
            address: *address,
            hoard_after: idle,
            spent_after: idle,
            spare_after: Duration::from_secs(2),
            stuck_after: idle,
            embryo_after: connect,
        };
        Self {
            backends: backends.iter().map(backend).collect(),
            workers: 0,
            grace: settings.grace,
            sweeps: settings.sweeps,
            stalled_after: STALLED_AFTER,
            max_pause: max_pause(settings),
        }
    }

    /// The index of the drill's peer.
    pub fn drill(&self) -> BackendIndex {
        BackendIndex::try_from(self.backends.len().saturating_sub(1)).unwrap_or(BackendIndex::MAX)
    }

    /// The backend at an index.
    pub fn backend(&self, index: BackendIndex) -> Option<&BackendPolicy> {
        self.backends.get(usize::from(index))
    }

    /// The backend that is a socket's peer, if one is. Two backends with one address are told apart by the ledger only.
    pub fn backend_of(&self, socket: &KernelSocket) -> Option<BackendIndex> {
        let index = self.backends.iter().position(|backend| backend.address == socket.remote)?;
        BackendIndex::try_from(index).ok()
    }

    /// The label of a backend, `unknown` without one.
    pub fn label(&self, backend: Option<BackendIndex>) -> &str {
        backend.and_then(|index| self.backend(index)).map_or("unknown", |backend| backend.name.as_str())
    }
}

fn max_pause(settings: &config::Watchdog) -> Duration {
    (settings.interval * 5).max(Duration::from_secs(2))
}

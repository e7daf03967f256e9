//! The watchdog: reads the kernel view, then the ledger, joins them socket by socket, and acts on what is unhealthy.
//!
//! ```text
//! KernelView::snapshot ─┐
//!                       ├─ reconcile (pure) ─ findings ─ reaper ─ ladder (pure) ─ owner | shutdown(2) | SOCK_DESTROY
//! Ledger::snapshot ─────┘                        └─ report ─ metrics, admin, drill
//! ```

mod beside;
pub mod finding;
#[cfg(test)]
pub(crate) mod fixture;
pub mod flight;
pub mod ladder;
pub mod policy;
pub mod reaper;
pub mod reconcile;
pub mod report;
mod task;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

pub use finding::{Finding, HeldBack};
pub use ladder::{Outcome, Rung};
pub use policy::Policy;
pub use report::Report;

use crate::client::limits::ClientLimits;
use crate::clock;
use crate::config::{self, Config, Numbers, Pool};
use crate::control::Controls;
use crate::health::Board;
use crate::kernel::{KernelSnapshot, KernelView};
use crate::ledger::caps::Caps;
use crate::ledger::{Ledger, LedgerSnapshot};
use crate::stats::{Reloads, WorkerStats};
use report::Published;
use task::{Request, Task};

/// What is observed, as of the configuration in force.
#[derive(Clone, Debug)]
pub struct Live(Arc<Mutex<Observed>>);

impl Live {
    /// Begins with the first configuration.
    pub fn new(observed: Observed) -> Self {
        Self(Arc::new(Mutex::new(observed)))
    }

    /// As it is now, for one answer or one scrape.
    pub fn now(&self) -> Observed {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Another configuration is in force from now on.
    pub fn put(&self, observed: Observed) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = observed;
    }
}

/// What watchdog, metrics and admin look at, with one configuration. They change nothing in it but the ledger's
/// tombstones and ghosts.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The configuration.
    pub config: Arc<Config>,
    /// The numbers of its pools and backends, and of those before.
    pub numbers: Arc<Numbers>,
    /// The thresholds taken from it.
    pub policy: Arc<Policy>,
    /// How often the configuration was changed.
    pub reloads: Arc<Reloads>,
    /// The ledger, with one shard per worker and the drill's last.
    pub ledger: Arc<Ledger>,
    /// The counters of each worker.
    pub stats: Arc<[Arc<WorkerStats>]>,
    /// To the owner of each shard, the drill's included.
    pub controls: Controls,
    /// Clients are being served: set when all listeners are open, cleared when the process drains.
    pub serving: Arc<AtomicBool>,
    /// Why the kernel view is the one that it is.
    pub view_reason: Arc<str>,
    /// Which backends are up.
    pub health: Arc<Board>,
    /// The limits on client connections, and what counts towards them.
    pub clients: Arc<ClientLimits>,
}

impl Observed {
    /// `drill` is where the drill's peer listens.
    pub fn new(
        config: Arc<Config>,
        ledger: Arc<Ledger>,
        stats: Vec<Arc<WorkerStats>>,
        controls: Controls,
        drill: SocketAddr,
    ) -> Self {
        let numbers = Arc::new(Numbers::new(&config));
        let policy = Arc::new(Policy::new(&config, drill));
        let serving = Arc::new(AtomicBool::new(false));
        let reloads = Arc::new(Reloads::new(clock::unix_seconds()));
        let health = Arc::new(Board::new(&config));
        let clients = ClientLimits::new(&config);
        Self {
            config,
            numbers,
            policy,
            reloads,
            ledger,
            stats: stats.into(),
            controls,
            serving,
            view_reason: Arc::from(""),
            health,
            clients,
        }
    }

    /// With the board that the workers read, instead of one of its own.
    #[must_use]
    pub fn with_health(self, health: Arc<Board>) -> Self {
        Self { health, ..self }
    }

    /// With the limits that the workers hold, instead of ones of its own.
    #[must_use]
    pub fn with_clients(self, clients: Arc<ClientLimits>) -> Self {
        Self { clients, ..self }
    }

    /// With the reason why the kernel view is the one that it is.
    #[must_use]
    pub fn with_view_reason(self, reason: &str) -> Self {
        Self { view_reason: Arc::from(reason), ..self }
    }

    /// Per backend index, the types of the TLVs that its pool's headers carry, in order.
    pub fn tlv_types(&self) -> Vec<Vec<u8>> {
        let types = |pool: &Pool| -> Vec<u8> {
            pool.proxy_protocol.iter().flat_map(|proxy| proxy.tlvs.iter()).map(|(kind, _)| kind).collect()
        };
        let mut by_number = vec![Vec::new(); self.numbers.backends()];
        for (pool, backend) in self.config.pools.iter().flat_map(|pool| pool.backends.iter().map(move |it| (pool, it)))
        {
            if let Some(of) = self.numbers.backend(&backend.name).and_then(|it| by_number.get_mut(usize::from(it))) {
                *of = types(pool);
            }
        }
        by_number
    }

    /// What the watchdog works with.
    pub fn subject(&self) -> Subject {
        Subject {
            settings: self.config.watchdog.clone(),
            policy: Arc::clone(&self.policy),
            ledger: Arc::clone(&self.ledger),
            controls: self.controls.clone(),
            tlv_types: self.tlv_types(),
            has_ledger: true,
        }
    }

    /// Whether a pool of its configuration has a backend that is known to be up.
    pub fn is_up(&self, pool: &Pool) -> bool {
        let up = |name: &str| self.numbers.backend(name).is_some_and(|number| self.health.is_up(number));
        pool.backends.iter().any(|backend| up(&backend.name))
    }

    /// Says whether clients are being served, for `/readyz`.
    pub fn set_serving(&self, serving: bool) {
        self.serving.store(serving, Ordering::Relaxed);
    }
}

/// What the watchdog works with: the part of [`Observed`] that is there without a forwarder, too.
#[derive(Clone, Debug)]
pub struct Subject {
    /// When it sweeps, and what it may do.
    pub settings: config::Watchdog,
    /// Thresholds.
    pub policy: Arc<Policy>,
    /// The other half of the count.
    pub ledger: Arc<Ledger>,
    /// To the owner of each of its shards.
    pub controls: Controls,
    /// Types of the TLVs in the headers to each backend.
    pub tlv_types: Vec<Vec<u8>>,
    /// The connections have a ledger. Those of another process have none: the kernel's word alone counts.
    pub has_ledger: bool,
}

impl Subject {
    /// Another process, which has no ledger: the one here is empty.
    pub fn beside(settings: config::Watchdog, policy: Policy) -> Self {
        let backends = policy.backends.len();
        let caps = Arc::new(Caps::new(std::iter::repeat_n(0, backends), 0));
        Self {
            settings,
            policy: Arc::new(policy),
            ledger: Arc::new(Ledger::new(0, 0, backends, caps)),
            controls: Controls::new(Vec::new()),
            tlv_types: Vec::new(),
            has_ledger: false,
        }
    }
}

/// The running watchdog; ends when it is stopped or dropped.
#[derive(Debug)]
pub struct Watchdog {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

/// Asks the watchdog for sweeps and for what it found.
#[derive(Clone)]
pub struct Handle {
    requests: Sender<Request>,
    published: Arc<Published>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    /// The state after the last sweep.
    pub fn report(&self) -> Arc<Report> {
        self.published.get()
    }

    /// Sweeps at once, without waiting for it.
    pub fn sweep_now(&self) {
        // It has ended: then there is nothing to sweep either.
        let _ = self.requests.send(Request::Sweep);
    }

    /// From now on it works with this; what it has seen so far counts on.
    pub fn adopt(&self, subject: Subject) {
        let _ = self.requests.send(Request::Adopt(Box::new(subject)));
    }

    /// Reads both halves now, without counting as a sweep. Nothing comes if the watchdog has ended.
    pub fn look(&self) -> oneshot::Receiver<Look> {
        let (answer, look) = oneshot::channel();
        let _ = self.requests.send(Request::Look(answer));
        look
    }

    /// Orders the reaping of one finding, whatever `watchdog.reap` says. What comes is the serial number from which on
    /// the records may tell its end, or why it is refused.
    pub fn order(&self, cookie: u64) -> oneshot::Receiver<Result<Ordered, String>> {
        let (answer, ordered) = oneshot::channel();
        let _ = self.requests.send(Request::Reap { cookie, answer });
        ordered
    }
}

/// Both halves at one moment, for who looks on.
#[derive(Debug)]
pub struct Look {
    /// Read first. An error says why nothing is known of any socket.
    pub kernel: Result<KernelSnapshot, String>,
    /// Read second.
    pub ledger: LedgerSnapshot,
    /// The state after the last sweep.
    pub report: Arc<Report>,
}

/// A reaping that an operator ordered, and that has begun.
#[derive(Debug)]
pub struct Ordered {
    /// What is reaped.
    pub finding: Finding,
    /// Its record's number is not smaller.
    pub serial: u64,
}

/// Starts the watchdog on a thread of its own.
///
/// # Errors
/// The thread cannot be started.
pub fn start(subject: Subject, view: Box<dyn KernelView>) -> io::Result<Watchdog> {
    let published = Arc::new(Published::new(Report::new(view.source(), subject.policy.workers)));
    let (requests, received) = channel();
    let task = Task::new(subject, view, Arc::clone(&published));
    let thread = std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || task.run(&received))?;
    Ok(Watchdog { handle: Handle { requests, published }, thread: Some(thread) })
}

impl Watchdog {
    /// For metrics, admin and drills.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.handle.requests.send(Request::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watchdog's thread has panicked");
        }
    }
}

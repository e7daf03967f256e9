//! The watchdog: reads the kernel view, then the ledger, joins them socket by socket, and acts on what is unhealthy.
//!
//! ```text
//! KernelView::snapshot ─┐
//!                       ├─ reconcile (pure) ─ findings ─ reaper ─ ladder (pure) ─ owner | shutdown(2) | SOCK_DESTROY
//! Ledger::snapshot ─────┘                        └─ report ─ metrics, admin, drill
//! ```

pub mod finding;
#[cfg(test)]
pub(crate) mod fixture;
pub mod ladder;
pub mod policy;
pub mod reaper;
pub mod reconcile;
pub mod report;
mod task;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

pub use finding::{Finding, HeldBack};
pub use ladder::{Outcome, Rung};
pub use policy::Policy;
pub use report::Report;

use crate::config::Config;
use crate::control::Controls;
use crate::kernel::KernelView;
use crate::ledger::Ledger;
use crate::stats::WorkerStats;
use report::Published;
use task::{Request, Task};

/// What watchdog, metrics and admin look at. They change nothing in it but the ledger's tombstones and ghosts.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The configuration.
    pub config: Arc<Config>,
    /// The thresholds taken from it.
    pub policy: Arc<Policy>,
    /// The ledger, with one shard per worker and the drill's last.
    pub ledger: Arc<Ledger>,
    /// The counters of each worker.
    pub stats: Arc<[Arc<WorkerStats>]>,
    /// To the owner of each shard, the drill's included.
    pub controls: Controls,
    /// Clients are being served: set when all listeners are open, cleared when the process drains.
    pub serving: Arc<AtomicBool>,
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
        let policy = Arc::new(Policy::new(&config, drill));
        Self { config, policy, ledger, stats: stats.into(), controls, serving: Arc::new(AtomicBool::new(false)) }
    }

    /// Says whether clients are being served, for `/readyz`.
    pub fn set_serving(&self, serving: bool) {
        self.serving.store(serving, Ordering::Relaxed);
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
}

/// Starts the watchdog on a thread of its own.
///
/// # Errors
/// The thread cannot be started.
pub fn start(observed: Observed, view: Box<dyn KernelView>) -> io::Result<Watchdog> {
    let published = Arc::new(Published::new(Report::new(view.source(), observed.policy.workers)));
    let (requests, received) = channel();
    let task = Task::new(observed, view, Arc::clone(&published));
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

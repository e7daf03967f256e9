//! What other threads may ask of the owner of a shard: a worker, or the drill's holder.
//!
//! Requests are rare (never per query) and one-way; whether one was carried out shows in the ledger and in the kernel.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::close::CloseReason;
use crate::config::{Config, Numbers};
use crate::ledger::caps::AtCap;
use crate::ledger::{BackendIndex, RowId};

/// A request to the owner of a shard.
#[derive(Debug)]
pub enum Control {
    /// Close this connection if it is still the one that is meant (the first rung of the reaper's ladder).
    Close {
        /// Which one.
        row: RowId,
        /// Why.
        reason: CloseReason,
    },
    /// Somebody waits at a cap: close an idle connection of yours, or give up busy ones if another worker waits and you have
    /// more than your share.
    MakeRoom {
        /// The backend at which it waits.
        backend: BackendIndex,
        /// The cap.
        cap: AtCap,
        /// Which worker waits, and for how many clients; none: a health check.
        worker: Option<(usize, usize)>,
    },
    /// More queries wait than may, and another worker has less than its share of them: give up what you have more.
    Shed,
    /// A place under a cap became free: serve who waits.
    CapacityFreed,
    /// Another configuration is in force.
    Reconfigure {
        /// The configuration.
        config: Arc<Config>,
        /// The numbers of its pools and backends, and of all before.
        numbers: Arc<Numbers>,
        /// Hears of it when it is done.
        done: mpsc::UnboundedSender<()>,
    },
    /// Stop accepting, answer what is in flight, close what is idle, end.
    Drain {
        /// After this time client connections are closed, whatever is in flight on them.
        over: Duration,
        /// The time over which idle client connections are closed.
        spread: Duration,
    },
    /// Block the thread, as a bug would.
    #[cfg(feature = "test-hooks")]
    Hang(Duration),
    /// Never clean up again, as a bug would: what is idle stays open.
    #[cfg(feature = "test-hooks")]
    Neglect,
    /// From now on leave every `nth` row out of the ledger, as a bug would.
    #[cfg(feature = "test-hooks")]
    ForgetRows {
        /// Zero: none.
        nth: u32,
    },
}

/// The senders to all owners, by shard.
#[derive(Clone, Debug)]
pub struct Controls {
    senders: Vec<mpsc::UnboundedSender<Control>>,
}

impl Controls {
    /// One per shard, in order.
    pub fn new(senders: Vec<mpsc::UnboundedSender<Control>>) -> Self {
        Self { senders }
    }

    /// Sends to one owner. False if it has ended.
    pub fn send(&self, shard: usize, control: Control) -> bool {
        self.senders.get(shard).is_some_and(|sender| sender.send(control).is_ok())
    }

    /// How many owners there are.
    pub fn len(&self) -> usize {
        self.senders.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.senders.is_empty()
    }
}

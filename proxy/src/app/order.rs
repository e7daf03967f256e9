//! What an operator may order of the whole process, over the admin socket: carried out by the main thread.

use tokio::sync::{mpsc, oneshot, watch};

/// An order.
#[derive(Debug)]
pub enum Order {
    /// Drain and end, as SIGTERM does.
    Drain,
    /// Read the configuration again, as SIGHUP does.
    Reload(oneshot::Sender<Reloaded>),
}

/// What the operator should know of the new configuration; or everything that is wrong with it, and nothing was changed.
pub type Reloaded = Result<Vec<String>, Vec<String>>;

/// How far the process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It serves, or is about to.
    Serving,
    /// It accepts no client any more and finishes what it has begun.
    Draining,
    /// Every worker has ended in order.
    Drained,
}

/// Where orders are given.
#[derive(Clone, Debug)]
pub struct Orders {
    orders: mpsc::UnboundedSender<Order>,
    phase: watch::Receiver<Phase>,
}

/// Where they arrive.
#[derive(Debug)]
pub struct Inbox {
    pub(super) orders: mpsc::UnboundedReceiver<Order>,
    pub(super) phase: watch::Sender<Phase>,
}

/// Both ends.
pub fn channel() -> (Orders, Inbox) {
    let (sender, orders) = mpsc::unbounded_channel();
    let (phase, shown) = watch::channel(Phase::Serving);
    (Orders { orders: sender, phase: shown }, Inbox { orders, phase })
}

impl Orders {
    /// Gives an order. False if the process is past taking any.
    pub fn give(&self, order: Order) -> bool {
        self.orders.send(order).is_ok()
    }

    /// Waits until every worker has ended. False if the process ends without that.
    pub async fn drained(&mut self) -> bool {
        self.phase.wait_for(|phase| *phase == Phase::Drained).await.is_ok()
    }
}

#[cfg(test)]
impl Inbox {
    /// Takes an order to drain as a process does that has nothing to do.
    pub(crate) fn pretend_to_drain(mut self) {
        assert!(matches!(self.orders.blocking_recv(), Some(Order::Drain)));
        let _ = self.phase.send(Phase::Drained);
    }
}

//! The owner of the drills' shard of the ledger: holds what was leaked, and closes what it is asked to.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use socket2::Socket;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::close::CloseReason;
use crate::control::Control;
use crate::ledger::{Entry, RowId, Tracked};

/// What is leaked.
#[derive(Debug)]
pub(super) enum Held {
    /// Socket and row, as they should be.
    Both(Tracked<Arc<Socket>>),
    /// A socket that the ledger never heard of.
    Orphan(Socket),
    /// A row whose socket is closed.
    Ghost(Entry),
}

impl Held {
    fn release(self, reason: CloseReason) {
        match self {
            Self::Both(tracked) => tracked.close(reason),
            Self::Orphan(socket) => drop(socket),
            Self::Ghost(entry) => entry.retire(reason),
        }
    }
}

#[derive(Debug)]
struct Kept {
    held: Held,
    /// Its owner does nothing when it is asked.
    deaf: bool,
}

impl Kept {
    fn closes(&self, row: RowId) -> bool {
        !self.deaf && matches!(&self.held, Held::Both(tracked) if tracked.entry().id() == row)
    }
}

/// Holds each drill's leak, by cookie, and closes it when it is asked to, as a worker would.
#[derive(Debug, Default)]
pub(super) struct Holder {
    kept: RefCell<HashMap<u64, Kept>>,
}

impl Holder {
    /// Answers requests until nobody can send any.
    pub(super) async fn answer(self: Rc<Self>, mut controls: UnboundedReceiver<Control>) {
        while let Some(control) = controls.recv().await {
            let Control::Close { row, reason } = control else { continue };
            let asked = self.kept.borrow().iter().find(|(_, kept)| kept.closes(row)).map(|(cookie, _)| *cookie);
            if let Some(cookie) = asked {
                self.release(cookie, reason);
            }
        }
    }

    pub(super) fn keep(&self, cookie: u64, held: Held, deaf: bool) {
        self.kept.borrow_mut().insert(cookie, Kept { held, deaf });
    }

    /// Ends one leak. False if its owner had let it go before.
    pub(super) fn release(&self, cookie: u64, reason: CloseReason) -> bool {
        let kept = self.kept.borrow_mut().remove(&cookie);
        let had = kept.is_some();
        if let Some(kept) = kept {
            kept.held.release(reason);
        }
        had
    }
}

//! What the tasks of a worker share: the state machine, the wakers of all tasks, the scratch buffer, the ledger.
//!
//! Everything here belongs to one thread. Tasks wake each other by key, without channels: a session puts a query into a
//! connection's buffer and wakes that connection's task, which sends what all sessions have put there in one write.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::sync::Notify;

use super::core::{Core, ROOM};
use crate::backend::conn::ConnTask;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::control::{Control, Controls};
use crate::ledger::{RowId, ShardWriter};
use crate::stats::WorkerStats;
use crate::tls::CIPHER;

/// No shard has so many slots.
const NO_ROW: (u32, u32) = (u32::MAX, 0);
/// Octets read at once.
pub(crate) const SCRATCH: usize = 64 * 1024;
/// The longest incomplete message that can be kept from the read before.
const LONGEST_REST: usize = 2 + u16::MAX as usize;
/// Deadlines that are closer to each other than this are seen to at one go: each waking of the housekeeper costs a
/// system call.
pub(crate) const GRAIN: Duration = Duration::from_millis(5);

/// What the tasks of a worker share.
pub(crate) struct Shell {
    pub(crate) core: RefCell<Core>,
    pub(crate) stats: Arc<WorkerStats>,
    pub(crate) ledger: ShardWriter,
    pub(crate) scratch: RefCell<Box<[u8]>>,
    /// What comes over TLS, before it is decrypted into `scratch`.
    pub(crate) cipher: RefCell<Box<[u8]>>,
    /// Woken when a deadline is armed that is earlier than the housekeeper's.
    pub(crate) nudge: Notify,
    pub(crate) sleeps_until: Cell<Mono>,
    /// Woken when somebody waits for the next round.
    pub(crate) round_over: Notify,
    index: usize,
    controls: Controls,
    workers: usize,
    sessions: RefCell<Vec<Option<Waker>>>,
    conns: RefCell<Vec<Option<Waker>>>,
    /// By connection: slot and generation of its row, which is in this worker's shard, or [`NO_ROW`]. Of the generation the
    /// low half: it comes again after 2^30 connections in one slot, and no request is so late.
    rows: RefCell<Vec<(u32, u32)>>,
    sources: Cell<usize>,
    leaving: Cell<usize>,
    this: std::rc::Weak<Shell>,
}

/// A client connection that takes its leave.
pub(crate) struct Leaving(Rc<Shell>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.leaving.set(self.0.leaving.get() - 1);
        // The worker may wait for it to end.
        self.0.nudge.notify_one();
    }
}

impl Shell {
    pub(crate) fn new(
        core: Core,
        stats: Arc<WorkerStats>,
        ledger: ShardWriter,
        index: usize,
        workers: usize,
        controls: Controls,
    ) -> Rc<Self> {
        Rc::new_cyclic(|this| Self {
            core: RefCell::new(core),
            stats,
            ledger,
            scratch: RefCell::new(vec![0; SCRATCH + LONGEST_REST].into_boxed_slice()),
            cipher: RefCell::new(vec![0; CIPHER].into_boxed_slice()),
            nudge: Notify::new(),
            sleeps_until: Cell::new(Mono::ZERO),
            round_over: Notify::new(),
            index,
            controls,
            workers,
            sessions: RefCell::new(Vec::with_capacity(ROOM)),
            conns: RefCell::new(Vec::with_capacity(ROOM)),
            rows: RefCell::new(Vec::with_capacity(ROOM)),
            sources: Cell::new(0),
            leaving: Cell::new(0),
            this: this.clone(),
        })
    }

    /// A session's task runs: it can be woken through this context from now on.
    pub(crate) fn session_runs(&self, key: SessionKey, cx: &Context<'_>) {
        remember(&mut self.sessions.borrow_mut(), key.0, cx);
    }

    /// A connection's task runs: it can be woken through this context from now on.
    pub(crate) fn conn_runs(&self, key: ConnKey, cx: &Context<'_>) {
        remember(&mut self.conns.borrow_mut(), key.0, cx);
        if let Some(conn) = self.core.borrow_mut().pool.get_mut(key) {
            conn.woken = false;
        }
    }

    /// Where the ledger has a connection.
    pub(crate) fn note_row(&self, key: ConnKey, row: RowId) {
        let mut rows = self.rows.borrow_mut();
        if rows.len() <= key.0 {
            rows.resize(key.0 + 1, NO_ROW);
        }
        rows[key.0] = (row.slot, row.generation as u32);
    }

    /// The connection is closed: a late request for its row must not meet the next connection in its place.
    pub(crate) fn forget_row(&self, key: ConnKey) {
        if let Some(row) = self.rows.borrow_mut().get_mut(key.0) {
            *row = NO_ROW;
        }
    }

    /// The connection that the ledger has there.
    pub(crate) fn conn_at(&self, row: RowId) -> Option<ConnKey> {
        self.rows.borrow().iter().position(|noted| *noted == (row.slot, row.generation as u32)).map(ConnKey)
    }

    /// Counts a client connection as leaving until the result is dropped.
    pub(crate) fn leaving(self: &Rc<Self>) -> Leaving {
        self.leaving.set(self.leaving.get() + 1);
        Leaving(Rc::clone(self))
    }

    /// Whether client connections are open of which only the farewell is left.
    pub(crate) fn is_anybody_leaving(&self) -> bool {
        self.leaving.get() > 0
    }

    /// The configured local addresses, in turn.
    pub(crate) fn next_source(&self, sources: &[SocketAddr]) -> Option<SocketAddr> {
        if sources.is_empty() {
            return None;
        }
        let turn = self.sources.get();
        self.sources.set(turn.wrapping_add(1));
        sources.get(turn % sources.len()).copied()
    }

    /// Wakes the tasks that have something to do, and opens the connections that were decided on.
    pub(crate) fn flush(&self) {
        let mut core = self.core.borrow_mut();
        core.tell_closing();
        let core = &mut *core;
        wake(&self.sessions.borrow(), core.wakes.sessions.drain(..).map(|key| key.0));
        wake(&self.conns.borrow(), core.wakes.conns.drain(..).map(|key| key.0));
        for key in core.wakes.open.drain(..) {
            if let Some(waker) = self.conns.borrow_mut().get_mut(key.0) {
                // Left by a connection that had the same place in the table.
                *waker = None;
            }
            if let Some(shell) = self.this.upgrade() {
                tokio::task::spawn_local(ConnTask::new(shell, key));
            }
        }
        for (backend, cap, clients) in core.wakes.ask_for_room.drain(..) {
            self.tell_others(|| Control::MakeRoom { backend, cap, worker: Some((self.index, clients)) });
        }
        if std::mem::take(&mut core.wakes.ask_to_shed) {
            self.tell_others(|| Control::Shed);
        }
        if std::mem::take(&mut core.wakes.tell_capacity) {
            self.tell_others(|| Control::CapacityFreed);
        }
        if core.round.is_over() {
            self.round_over.notify_one();
        }
        if core.next_deadline().after(GRAIN) < self.sleeps_until.get() {
            self.nudge.notify_one();
        }
    }

    fn tell_others(&self, message: impl Fn() -> Control) {
        for worker in (0..self.workers).filter(|worker| *worker != self.index) {
            self.controls.send(worker, message());
        }
    }

    /// Logs trouble with a backend: on a connection with this cookie, or before there is one.
    pub(crate) fn complain(&self, backend: &str, address: SocketAddr, conn: Option<u64>, trouble: &str) {
        tracing::warn!(conn, backend, %address, trouble, "backend connection");
    }

    /// Logs that no descriptor or no memory is left.
    pub(crate) fn complain_accept(&self, error: &std::io::Error) {
        tracing::error!(%error, "no descriptor or no memory left: no client connections are accepted");
    }

    /// Logs that a peer and the listener do not agree on PROXY headers; `session` is the client connection's number if it
    /// has one already.
    pub(crate) fn complain_client(&self, peer: SocketAddr, session: Option<u64>, trouble: &str) {
        tracing::warn!(session, %peer, trouble, "client connection refused");
    }
}

fn remember(wakers: &mut Vec<Option<Waker>>, at: usize, cx: &Context<'_>) {
    if wakers.len() <= at {
        wakers.resize(at + 1, None);
    }
    match &mut wakers[at] {
        Some(waker) => waker.clone_from(cx.waker()),
        empty => *empty = Some(cx.waker().clone()),
    }
}

fn wake(wakers: &[Option<Waker>], keys: impl Iterator<Item = usize>) {
    for key in keys {
        // A task that has not run yet has no waker, and will run anyway.
        if let Some(Some(waker)) = wakers.get(key) {
            waker.wake_by_ref();
        }
    }
}

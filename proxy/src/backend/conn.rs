//! The task of one backend connection: it alone reads, writes and closes the descriptor (I4). What the bytes mean is
//! decided by [`Core`](crate::worker::core::Core).
//!
//! # Cancel safety
//!
//! The task is never dropped before it has ended, except with its whole runtime. It waits for nobody: a client that
//! leaves changes the pending table, not the reading.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use slab::Slab;
use socket2::SockRef;
use tokio::io::Interest;

use super::conn_tls::Secure;
use super::connect::{self, FastOpen, Handshake, Io, OpenError, is_shortage};
use super::pool::{Conn, ConnKey, Phase};
use crate::client::session::Session;
use crate::clock::{self, Mono};
use crate::close::CloseReason;
use crate::config::OneShotClose;
use crate::dns::message::{OPCODE_QUERY, peek};
use crate::ledger::{ConnKind, OpenInfo, RowState, Tracked};
use crate::tcp::Keepalive;
use crate::worker::answer::Partial;
use crate::worker::core::Core;
use crate::worker::queries::Queries;
use crate::worker::shell::{SCRATCH, Shell};
use crate::worker::turn::after_others;

/// Reads per wake-up before others get their turn.
const TURNS: usize = 8;
/// Reads of what has come before a connection broke: more than the kernel keeps for one.
const LAST_TURNS: usize = 256;

/// How a task's turn ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing can be done until it is woken.
    Waits,
    /// Something is left to be done, after others have had their turn.
    Goes,
    /// Nothing is left but to close, after the client has got its answer.
    Closes,
}

/// A backend connection's task.
pub(crate) struct ConnTask {
    pub(super) shell: Rc<Shell>,
    pub(super) key: ConnKey,
    pub(super) io: Option<Tracked<Io>>,
    /// The answer that has begun to come.
    pub(super) rest: Vec<u8>,
    /// Messages can be sent.
    pub(super) connected: bool,
    /// What is between the messages and the socket; none: nothing.
    pub(super) tls: Option<Box<Secure>>,
}

impl ConnTask {
    pub(crate) fn new(shell: Rc<Shell>, key: ConnKey) -> Self {
        Self { shell, key, io: None, rest: Vec::new(), connected: false, tls: None }
    }

    /// Connects, and writes at once what there is to write: towards a near backend the handshake is over when
    /// `connect(2)` returns, so that nobody need be woken to write. Towards any other the attempt says EAGAIN. With TCP
    /// fast open it may go with the SYN, and says nothing of the handshake.
    fn open(&mut self, now: Mono) -> Result<(), CloseReason> {
        let mut core = self.shell.core.borrow_mut();
        let plan = Rc::clone(&core.plan);
        let Core { pool, spares, queries, sessions, .. } = &mut *core;
        let Some(conn) = pool.get_mut(self.key) else { return Err(CloseReason::Dropped) };
        let Some(permit) = conn.permit.take() else { return Err(CloseReason::Dropped) };
        let backend = &plan.backends[usize::from(conn.backend)];
        let info = info(conn, sessions);
        self.tls = Secure::new(backend);
        let source = self.shell.next_source(&backend.source);
        let fast_open = if backend.tcp_fast_open && self.tls.is_none() && may_come_twice(conn, queries) {
            FastOpen::WithFirstWrite
        } else {
            FastOpen::Off
        };
        let opened = connect::connect(&self.shell.ledger, permit, info, backend.address, source, fast_open, now)
            .and_then(|(socket, handshake)| {
                // The others are closed before the first probe, when they are idle or their queries have timed out.
                if conn.kind != ConnKind::OneShot
                    && plan.connections.idle_timeout > plan.connections.tcp_keepalive
                    && let Some(keepalive) = Keepalive::new(plan.connections.tcp_keepalive, backend.write_timeout)
                {
                    // It does not fail on a socket of our own.
                    let _ = keepalive.apply(&SockRef::from(&**socket.io()));
                }
                if !conn.out.is_empty() && self.tls.is_none() {
                    match socket.io().send(conn.out.pending()) {
                        Ok(sent) => {
                            conn.last_byte = now;
                            conn.out.advance(sent, spares);
                            self.connected = handshake == Handshake::Begun;
                        }
                        Err(error) if is_transient(&error) => {}
                        Err(error) => {
                            let error = OpenError::Connect(error);
                            socket.close(error.reason());
                            return Err(error);
                        }
                    }
                }
                // One write was all that a one-shot connection has to say.
                let done = self.connected && conn.kind == ConnKind::OneShot && conn.out.is_empty();
                let interest = if done { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
                connect::register(socket, interest)
            });
        match opened {
            Ok(io) => {
                let (cookie, session) = (io.entry().cookie(), info.owner);
                tracing::debug!(conn = cookie, session, backend = backend.name, "backend connection opened");
                self.io = Some(io);
                core.conn_opened(self.key, now);
                if self.connected {
                    core.conn_connected(self.key, now);
                }
                Ok(())
            }
            Err(error) => {
                self.shell.complain(&backend.name, backend.address, None, &error.to_string());
                // What was written may have arrived.
                Err(if self.connected { CloseReason::PeerReset } else { error.reason() })
            }
        }
    }

    /// Does what can be done now. `Err` is the reason to close.
    fn work(&mut self, cx: &mut Context<'_>, now: Mono) -> Result<Turn, CloseReason> {
        if self.io.is_none() {
            if let (Phase::Closing(reason), _) = self.phase() {
                return Err(reason);
            }
            self.open(now)?;
        }
        for turn in 0..TURNS {
            let (phase, is_transfer) = self.phase();
            if let Phase::Closing(reason) = phase {
                if turn > 0 && reason == CloseReason::OneShotDone {
                    return Ok(Turn::Closes);
                }
                return Err(reason);
            }
            if self.tls.is_some() {
                if self.turn_over_tls(cx, now)?.is_pending() {
                    return Ok(Turn::Waits);
                }
                continue;
            }
            if !self.connected {
                if self.finish_connect(cx, now)?.is_pending() {
                    return Ok(Turn::Waits);
                }
                continue;
            }
            if let Err(reason) = self.write(cx, now) {
                return Err(self.read_the_last(reason, now, |task| task.read(cx, now)));
            }
            if is_transfer && !self.shell.core.borrow_mut().transfer_reads(self.key) {
                // It is woken when its client has read.
                return Ok(Turn::Waits);
            }
            if self.read(cx, now)?.is_pending() {
                return Ok(Turn::Waits);
            }
        }
        Ok(Turn::Goes)
    }

    /// How far the connection is, and whether it carries a zone transfer.
    fn phase(&self) -> (Phase, bool) {
        let core = self.shell.core.borrow();
        let conn = core.pool.get(self.key);
        conn.map_or((Phase::Closing(CloseReason::Dropped), false), |conn| (conn.phase, conn.transfer.is_some()))
    }

    /// A connection that did not come about says so to the first write, so there is no need to ask before it.
    fn finish_connect(&mut self, cx: &mut Context<'_>, now: Mono) -> Result<Poll<()>, CloseReason> {
        let Some(io) = self.io.as_ref().map(Tracked::io) else { return Ok(Poll::Pending) };
        let mut ready = match io.poll_write_ready(cx) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(ready) => ready.map_err(|_| CloseReason::ConnectFailed)?,
        };
        let mut core = self.shell.core.borrow_mut();
        let Core { pool, spares, .. } = &mut *core;
        let Some(conn) = pool.get_mut(self.key) else { return Ok(Poll::Pending) };
        let failed = if conn.out.is_empty() {
            // A spare one, or its only query has been given up meanwhile. One that failed is closed for writing, too.
            let closed = ready.ready().is_write_closed();
            closed.then(|| ready.get_inner().take_error().unwrap_or_else(Some)).flatten()
        } else {
            match ready.try_io(|io| io.get_ref().send(conn.out.pending())) {
                Ok(Ok(sent)) => {
                    conn.last_byte = now;
                    conn.out.advance(sent, spares);
                    None
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => return Ok(Poll::Ready(())),
                Ok(Err(error)) => Some(error),
                // Woken too early.
                Err(_would_block) => return Ok(Poll::Ready(())),
            }
        };
        drop(core);
        if let Some(error) = failed {
            self.complain(&error);
            return Err(OpenError::Connect(error).reason());
        }
        self.connected = true;
        self.shell.core.borrow_mut().conn_connected(self.key, now);
        Ok(Poll::Ready(()))
    }

    /// Nothing can be sent any more: the peer has closed, and not read everything. What it answered before that has come,
    /// and is not to be asked again, or called failed. Then the connection closes for the reason that is returned.
    pub(super) fn read_the_last(
        &mut self,
        reason: CloseReason,
        now: Mono,
        mut read: impl FnMut(&mut Self) -> Result<Poll<()>, CloseReason>,
    ) -> CloseReason {
        self.shell.core.borrow_mut().pool.retire(self.key, reason, now);
        for _ in 0..LAST_TURNS {
            if self.phase().1 && !self.shell.core.borrow_mut().transfer_reads(self.key) {
                break;
            }
            match read(self) {
                Ok(Poll::Ready(())) => {}
                Err(CloseReason::ProtocolViolation) => return CloseReason::ProtocolViolation,
                Ok(Poll::Pending) | Err(_) => break,
            }
        }
        reason
    }

    fn write(&mut self, cx: &mut Context<'_>, now: Mono) -> Result<(), CloseReason> {
        let Some(io) = self.io.as_ref().map(Tracked::io) else { return Ok(()) };
        let mut core = self.shell.core.borrow_mut();
        let Core { pool, spares, .. } = &mut *core;
        let Some(conn) = pool.get_mut(self.key) else { return Ok(()) };
        while !conn.out.is_empty() {
            let mut ready = match io.poll_write_ready(cx) {
                Poll::Pending => {
                    if conn.unwritable_since == Mono::ZERO {
                        conn.unwritable_since = now;
                    }
                    return Ok(());
                }
                Poll::Ready(ready) => ready.map_err(|_| CloseReason::PeerReset)?,
            };
            let pending = conn.out.pending();
            match ready.try_io(|io| io.get_ref().send(pending)) {
                Ok(Ok(sent)) => {
                    conn.last_byte = now;
                    conn.unwritable_since = Mono::ZERO;
                    conn.out.advance(sent, spares);
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(broken(&error)),
                Err(_would_block) => {}
            }
        }
        conn.unwritable_since = Mono::ZERO;
        Ok(())
    }

    fn read(&mut self, cx: &mut Context<'_>, now: Mono) -> Result<Poll<()>, CloseReason> {
        let Some(io) = self.io.as_ref().map(Tracked::io) else { return Ok(Poll::Pending) };
        let mut ready = match io.poll_read_ready(cx) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(ready) => ready.map_err(|_| CloseReason::PeerReset)?,
        };
        let mut scratch = self.shell.scratch.borrow_mut();
        let kept = self.rest.len();
        scratch[..kept].copy_from_slice(&self.rest);
        let room = &mut scratch[kept..kept + SCRATCH];
        let read = match ready.try_io(|io| {
            rustix::net::recv(io.get_ref(), &mut *room, rustix::net::RecvFlags::empty()).map_err(io::Error::from)
        }) {
            Ok(Ok((0, _))) => return Err(CloseReason::PeerClosed),
            Ok(Ok((read, _))) => read,
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => return Ok(Poll::Ready(())),
            Ok(Err(error)) => return Err(broken(&error)),
            Err(_would_block) => return Ok(Poll::Ready(())),
        };
        if read < SCRATCH {
            // The socket is empty: without this another read would only learn that. New bytes are a new event, and a
            // close that came with these bytes stays visible.
            ready.clear_ready();
        }
        let bytes = &scratch[..kept + read];
        let taken = self.shell.core.borrow_mut().backend_bytes(self.key, bytes, now);
        match taken {
            Ok(taken) => {
                self.rest.clear();
                self.rest.extend_from_slice(&bytes[taken..]);
                Ok(Poll::Ready(()))
            }
            Err(violation) => {
                self.rest.clear();
                self.complain(&violation);
                Err(CloseReason::ProtocolViolation)
            }
        }
    }

    pub(super) fn complain(&self, trouble: &dyn std::fmt::Display) {
        let core = self.shell.core.borrow();
        if let Some(conn) = core.pool.get(self.key) {
            let backend = &core.plan.backends[usize::from(conn.backend)];
            let cookie = self.io.as_ref().map(|io| io.entry().cookie());
            self.shell.complain(&backend.name, backend.address, cookie, &trouble.to_string());
        }
    }

    /// The sole close path (I3): the descriptor, then the row, then what was in flight.
    fn close(&mut self, reason: CloseReason) {
        let reason = self.shell.core.borrow().pool.get(self.key).map_or(reason, |conn| conn.precisely(reason));
        if reason == CloseReason::Unanswered {
            self.complain(
                &"it closed the connection before any answer: does it take what is sent, the PROXY header too?",
            );
        }
        if let Some(io) = self.io.take() {
            if self.resets(reason) {
                // Everything was answered, so nothing can be lost, and no side keeps TIME_WAIT.
                let _ = io.io().get_ref().set_linger(Some(Duration::ZERO));
            } else if let Some(tls) = &mut self.tls {
                tls.say_goodbye(io.io().get_ref(), reason);
            }
            tracing::debug!(conn = io.entry().cookie(), reason = reason.label(), "backend connection closed");
            io.close(reason);
            self.shell.forget_row(self.key);
        }
        let partial = Partial::new(&self.rest);
        let mut core = self.shell.core.borrow_mut();
        core.conn_closed(self.key, reason, partial, clock::now());
    }

    fn resets(&self, reason: CloseReason) -> bool {
        let core = self.shell.core.borrow();
        let Some(conn) = core.pool.get(self.key) else { return false };
        matches!(reason, CloseReason::OneShotDone | CloseReason::Evicted)
            && conn.pending.in_flight() + conn.pending.quarantined() == 0
            && core.plan.backends[usize::from(conn.backend)].one_shot_close == OneShotClose::Reset
    }

    /// Shows in the ledger what the connection does now, and arms its deadline.
    fn settle(&self) {
        let mut core = self.shell.core.borrow_mut();
        core.settle_conn(self.key);
        let (Some(io), Some(conn)) = (&self.io, core.pool.get(self.key)) else { return };
        let state = match conn.phase {
            Phase::Connecting => RowState::Connecting,
            Phase::Closing(_) => RowState::Draining,
            Phase::Open if conn.pending.in_flight() == 0 => RowState::Idle,
            Phase::Open if conn.paused => RowState::Paused,
            Phase::Open if conn.retire.is_some() => RowState::Draining,
            Phase::Open => RowState::Busy,
        };
        if io.entry().info().kind != conn.kind {
            io.entry().assign(info(conn, &core.sessions));
        }
        io.entry().set_state(state);
        // Below 65,536: there are no more wire IDs.
        io.entry().set_activity(conn.last_byte, conn.pending.in_flight() as u32, conn.carried);
        self.shell.note_row(self.key, io.entry().id());
    }
}

/// What the ledger is told of a connection.
fn info(conn: &Conn, sessions: &Slab<Session>) -> OpenInfo {
    let tls = conn.owner().and_then(|owner| sessions.get(owner.0)?.tls());
    OpenInfo {
        backend: conn.backend,
        kind: conn.kind,
        owner: conn.owner_serial,
        header: conn.header_digest,
        client_tls: tls.map(|tls| tls.version),
    }
}

/// Why a connection is closed over which nothing can be sent, or received, for this error.
pub(super) fn broken(error: &io::Error) -> CloseReason {
    if is_shortage(error) { CloseReason::HostShortage } else { CloseReason::PeerReset }
}

/// The handshake is not over yet, or a signal came.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
        || error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error())
}

/// Whether what is to be written first may reach the backend twice, as data in a SYN may (RFC 7413 section 2.1): there is
/// something, and all of it are questions.
fn may_come_twice(conn: &Conn, queries: &Queries) -> bool {
    let is_question = |query| {
        let opcode = queries.get(query).and_then(|entry| peek(&entry.message)).map(|peek| peek.opcode);
        opcode == Some(OPCODE_QUERY)
    };
    !conn.out.is_empty() && conn.pending.quarantined() == 0 && conn.pending.queries().all(is_question)
}

impl Future for ConnTask {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let task = self.get_mut();
        let now = clock::now();
        task.shell.conn_runs(task.key, cx);
        let ended = task.work(cx, now);
        match ended {
            Ok(Turn::Waits | Turn::Goes) => task.settle(),
            Ok(Turn::Closes) => {}
            Err(reason) => task.close(reason),
        }
        task.shell.flush();
        match ended {
            Ok(Turn::Waits) => Poll::Pending,
            Ok(Turn::Goes) => {
                after_others(cx);
                Poll::Pending
            }
            Ok(Turn::Closes) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Err(_) => Poll::Ready(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An idle connection is its task: with tokio's part of it, 256 bytes. One field more makes it 384.
    #[test]
    fn a_task_is_small() {
        assert!(size_of::<ConnTask>() <= 152, "{} bytes", size_of::<ConnTask>());
    }
}

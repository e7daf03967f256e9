//! A connection's task while TLS is between it and the backend: the handshake, then records instead of octets.
//!
//! No octet of DNS leaves before the backend is authenticated: until then queries wait in the connection's buffer, and its
//! phase is `Connecting`, so that `connect_timeout` covers the handshake, too.

use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};

use rustix::net::{RecvFlags, recv};
use socket2::Socket;

use super::conn::{ConnTask, broken};
use super::connect::OpenError;
use super::tls::Trouble;
use crate::clock::Mono;
use crate::close::CloseReason;
use crate::config::BackendTls;
use crate::ledger::{ConnKind, Tracked};
use crate::tls::{TlsFault, TlsStream};
use crate::worker::core::Core;
use crate::worker::plan::BackendPlan;

/// What TLS needs beside the connection.
#[derive(Debug)]
pub(super) struct Secure {
    /// As the connection was opened by: a reload changes them for others only.
    settings: Rc<BackendTls>,
    /// The handshake begins after a PROXY header, so not before somebody has the connection.
    header_first: bool,
    /// None until the handshake begins.
    stream: Option<TlsStream>,
    /// The PROXY header in clear, if there is one, and ClientHello: one write.
    first: Vec<u8>,
    sent: usize,
}

impl Secure {
    /// For a connection to this backend; none if it is asked in clear.
    pub(super) fn new(backend: &BackendPlan) -> Option<Box<Self>> {
        let settings = Rc::clone(backend.tls.as_ref()?);
        let header_first = backend.header_in_clear();
        Some(Box::new(Self { settings, header_first, stream: None, first: Vec::new(), sent: 0 }))
    }

    fn is_handshaking(&self) -> bool {
        self.stream.as_ref().is_none_or(TlsStream::is_handshaking)
    }

    /// The peer need not guess whether that was all (RFC 8446 section 6.1). Where it would take waiting, it is left out.
    pub(super) fn say_goodbye(&mut self, socket: &Socket, reason: CloseReason) {
        let in_order = !matches!(
            reason,
            CloseReason::PeerReset | CloseReason::ProtocolViolation | CloseReason::WriteTimeout | CloseReason::Reaped
        );
        if let Some(stream) = self.stream.as_mut().filter(|stream| in_order && !stream.is_handshaking()) {
            stream.close();
            let _ = stream.flush(&mut &*socket);
        }
    }
}

impl ConnTask {
    /// Does what can be done now on a connection that has TLS.
    pub(super) fn turn_over_tls(&mut self, cx: &mut Context<'_>, now: Mono) -> Result<Poll<()>, CloseReason> {
        let Some(mut secure) = self.tls.take() else { return Ok(Poll::Pending) };
        let turn = self.turn(&mut secure, cx, now);
        self.tls = Some(secure);
        turn
    }

    fn turn(&mut self, secure: &mut Secure, cx: &mut Context<'_>, now: Mono) -> Result<Poll<()>, CloseReason> {
        if secure.stream.is_none() && self.begin(secure, cx, now)?.is_pending() {
            return Ok(Poll::Pending);
        }
        if let Err(reason) = self.send(secure, cx, now) {
            if !self.connected {
                return Err(reason);
            }
            return Err(self.read_the_last(reason, now, |task| task.receive(secure, cx, now)));
        }
        if self.connected && !self.shell.core.borrow_mut().transfer_reads(self.key) {
            // It is woken when its client has read.
            return Ok(Poll::Pending);
        }
        self.receive(secure, cx, now)
    }

    /// Waits for the connection, then begins the handshake, unless that is for later.
    fn begin(&mut self, secure: &mut Secure, cx: &mut Context<'_>, now: Mono) -> Result<Poll<()>, CloseReason> {
        let Some(io) = self.io.as_ref().map(Tracked::io) else { return Ok(Poll::Pending) };
        let ready = match io.poll_write_ready(cx) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(ready) => ready.map_err(|_| CloseReason::ConnectFailed)?,
        };
        let closed = ready.ready().is_write_closed();
        if let Some(error) = closed.then(|| ready.get_inner().take_error().unwrap_or_else(Some)).flatten() {
            self.complain(&error);
            return Err(OpenError::Connect(error).reason());
        }
        let mut core = self.shell.core.borrow_mut();
        let Core { pool, spares, .. } = &mut *core;
        let Some(conn) = pool.get_mut(self.key) else { return Ok(Poll::Pending) };
        if secure.header_first && conn.kind == ConnKind::Spare {
            if !self.connected {
                self.connected = true;
                core.conn_connected(self.key, now);
            }
            return Ok(Poll::Ready(()));
        }
        // Not, or not any more: a spare connection was, until somebody got it.
        self.connected = false;
        if secure.header_first {
            let header = std::mem::take(&mut conn.header_left) as usize;
            secure.first.extend(conn.out.pending().iter().take(header));
            conn.out.advance(header, spares);
        }
        if conn.kind == ConnKind::OneShot {
            // It writes more than once: the second write must not wait for the first one's acknowledgement.
            let _ = io.get_ref().set_tcp_nodelay(true);
        }
        drop(core);
        let mut stream = secure.settings.begin().map_err(|fault| self.fail(secure, &fault))?;
        // Into memory: it cannot fail.
        let _ = stream.flush(&mut secure.first);
        secure.stream = Some(stream);
        Ok(Poll::Ready(()))
    }

    fn send(&mut self, secure: &mut Secure, cx: &mut Context<'_>, now: Mono) -> Result<(), CloseReason> {
        let Some(io) = self.io.as_ref().map(Tracked::io) else { return Ok(()) };
        let Secure { stream: Some(stream), first, sent, .. } = secure else { return Ok(()) };
        let mut core = self.shell.core.borrow_mut();
        let Core { pool, spares, .. } = &mut *core;
        let Some(conn) = pool.get_mut(self.key) else { return Ok(()) };
        let error = loop {
            let begins = *sent < first.len();
            let has_messages = self.connected && !conn.out.is_empty();
            if !begins && !has_messages && !stream.has_outgoing() {
                conn.unwritable_since = Mono::ZERO;
                return Ok(());
            }
            let mut ready = match io.poll_write_ready(cx) {
                Poll::Pending => {
                    if conn.unwritable_since == Mono::ZERO {
                        conn.unwritable_since = now;
                    }
                    return Ok(());
                }
                Poll::Ready(ready) => ready.map_err(|_| CloseReason::PeerReset)?,
            };
            // A header inside TLS is a record of its own: Unbound 1.17 does not see what comes in the same one behind it.
            let messages = match (conn.out.pending(), conn.header_left as usize) {
                (pending, 0) => pending,
                (pending, header) => pending.get(..header).unwrap_or(pending),
            };
            let written = ready.try_io(|io| {
                let socket = &mut &**io.get_ref();
                if begins {
                    socket.send(first.get(*sent..).unwrap_or_default())
                } else if has_messages {
                    stream.push(messages, socket)
                } else {
                    stream.flush(socket).map(|()| 0)
                }
            });
            match written {
                Ok(Ok(written)) => {
                    conn.last_byte = now;
                    conn.unwritable_since = Mono::ZERO;
                    if !begins {
                        // What was written is no more than there was: the messages, or the header alone.
                        conn.header_left = conn.header_left.saturating_sub(written as u32);
                        conn.out.advance(written, spares);
                    } else if *sent + written == first.len() {
                        (*first, *sent) = (Vec::new(), 0);
                    } else {
                        *sent += written;
                    }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => break error,
                Err(_would_block) => {}
            }
        };
        drop(core);
        Err(self.broken(secure, &error))
    }

    fn receive(&mut self, secure: &mut Secure, cx: &mut Context<'_>, now: Mono) -> Result<Poll<()>, CloseReason> {
        let Some(io) = self.io.as_ref().map(Tracked::io) else { return Ok(Poll::Pending) };
        let mut ready = match io.poll_read_ready(cx) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(ready) => ready.map_err(|_| CloseReason::PeerReset)?,
        };
        let shell = Rc::clone(&self.shell);
        let mut cipher = shell.cipher.borrow_mut();
        let read =
            match ready.try_io(|io| recv(io.get_ref(), &mut **cipher, RecvFlags::empty()).map_err(io::Error::from)) {
                Ok(Ok((0, _))) => return Err(self.ended(secure)),
                Ok(Ok((read, _))) => read,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => return Ok(Poll::Ready(())),
                Ok(Err(error)) => return Err(self.broken(secure, &error)),
                Err(_would_block) => return Ok(Poll::Ready(())),
            };
        if read < cipher.len() {
            ready.clear_ready();
        }
        let Some(stream) = &mut secure.stream else {
            self.complain(&"it spoke before TLS began");
            return Err(CloseReason::ProtocolViolation);
        };
        let mut scratch = shell.scratch.borrow_mut();
        let kept = self.rest.len();
        scratch[..kept].copy_from_slice(&self.rest);
        let received = stream.receive(&cipher[..read], &mut scratch[kept..]);
        let has_closed = stream.peer_has_closed();
        if let Some(conn) = shell.core.borrow_mut().pool.get_mut(self.key) {
            conn.last_byte = now;
        }
        let filled = received.map_err(|fault| self.fail(secure, &fault))?;
        if !self.connected && !secure.is_handshaking() {
            self.agreed(secure, now);
        }
        if filled > 0 {
            let bytes = &scratch[..kept + filled];
            let taken = shell.core.borrow_mut().backend_bytes(self.key, bytes, now);
            self.rest.clear();
            match taken {
                Ok(taken) => self.rest.extend_from_slice(&bytes[taken..]),
                Err(violation) => {
                    self.complain(&violation);
                    return Err(CloseReason::ProtocolViolation);
                }
            }
        }
        if has_closed { Err(self.ended(secure)) } else { Ok(Poll::Ready(())) }
    }

    /// The backend is who it should be.
    fn agreed(&mut self, secure: &Secure, now: Mono) {
        self.connected = true;
        let mut core = self.shell.core.borrow_mut();
        let negotiated = secure.stream.as_ref().and_then(TlsStream::negotiated);
        if let (Some(agreed), Some(conn)) = (negotiated, core.pool.get(self.key)) {
            core.stats.backends[usize::from(conn.backend)].handshakes[usize::from(agreed.resumed)].add(1);
            let cookie = self.io.as_ref().map(|io| io.entry().cookie());
            tracing::debug!(conn = cookie, version = agreed.version.label(), resumed = agreed.resumed, "TLS");
        }
        core.conn_connected(self.key, now);
    }

    /// TLS has failed: the peer is told by an alert, if that does not take waiting.
    fn fail(&self, secure: &mut Secure, fault: &TlsFault) -> CloseReason {
        let handshaking = secure.is_handshaking();
        if let (Some(stream), Some(io)) = (&mut secure.stream, &self.io) {
            let _ = stream.flush(&mut &**io.io().get_ref());
        }
        let trouble = Trouble { server_name: &secure.settings.server_name, fault };
        self.complain(&trouble);
        trouble.reason(handshaking)
    }

    /// The backend has closed the connection, with `close_notify` or without.
    fn ended(&self, secure: &Secure) -> CloseReason {
        if !secure.is_handshaking() || self.connected {
            return CloseReason::PeerClosed;
        }
        self.complain(&"it closed the connection during the TLS handshake");
        CloseReason::HandshakeFailed
    }

    /// The connection is broken.
    fn broken(&self, secure: &Secure, error: &io::Error) -> CloseReason {
        let reason = broken(error);
        if reason == CloseReason::HostShortage || !secure.is_handshaking() || self.connected {
            return reason;
        }
        self.complain(&format_args!("during the TLS handshake: {error}"));
        CloseReason::HandshakeFailed
    }
}

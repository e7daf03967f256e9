//! The task of one client connection: it carries bytes between the socket and the session.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use rustix::net::RecvFlags;
use tokio::net::TcpStream;

use super::farewell;
use super::handshake::Link;
use super::limits::Admitted;
use super::session::{Session, SessionKey};
use super::socket::{Now, Polled};
use crate::clock::{self, Mono};
use crate::close::ClientCloseReason;
use crate::dns::frame::first_frame;
use crate::tls::{self, Channel};
use crate::worker::buffer::InBuf;
use crate::worker::core::Core;
use crate::worker::shell::{SCRATCH, Shell};
use crate::worker::turn::{Turn, after_others};

/// Reads per wake-up before others get their turn.
const TURNS: usize = 8;

/// A client connection's task.
pub(crate) struct SessionTask {
    shell: Rc<Shell>,
    key: SessionKey,
    stream: Option<TcpStream>,
    channel: Channel,
    /// What was read and not taken: part of a message, or messages that can't be taken yet.
    rest: InBuf,
    admitted: Option<Admitted>,
}

impl SessionTask {
    /// Of a session that begins.
    pub(super) fn new(shell: Rc<Shell>, key: SessionKey, link: Link, admitted: Admitted) -> Self {
        let Link { stream, channel, rest, .. } = link;
        Self { shell, key, stream: Some(stream), channel, rest: rest.into(), admitted: Some(admitted) }
    }

    /// Does what can be done now. `Err` is the reason to close.
    fn work(&mut self, cx: &mut Context<'_>, now: Mono) -> Result<(), ClientCloseReason> {
        self.shell.core.borrow_mut().resume(self.key, now);
        let Some((client, before)) = self.shell.core.borrow_mut().begin_turn(self.key) else {
            return self.write(cx, now);
        };
        let mut turn = before;
        let done = self.have_turn(&mut turn, cx, now);
        if turn != before {
            self.shell.core.borrow_mut().end_turn(self.key, client, turn);
        }
        done
    }

    /// Reads, takes and writes until there is nothing to do, or the turn of this connection's client is over.
    fn have_turn(&mut self, turn: &mut Turn, cx: &mut Context<'_>, now: Mono) -> Result<(), ClientCloseReason> {
        for _ in 0..TURNS {
            self.take_rest(turn, now);
            self.write(cx, now)?;
            if turn.is_over() {
                return Ok(());
            }
            if self.has_takeable_message() {
                // Writing made room for it. What is read comes after it, and so does the client's end.
                continue;
            }
            if let Some(reason) = self.session(Session::finished).unwrap_or(Some(ClientCloseReason::Dropped)) {
                if self.looks_once_more() {
                    continue;
                }
                return Err(reason);
            }
            if !self.session(Session::reads).unwrap_or(false) || self.read(cx, turn, now)?.is_pending() {
                return Ok(());
            }
        }
        after_others(cx);
        Ok(())
    }

    /// A quiet connection is about to be closed by us. A query that came in this very moment must not be lost with it:
    /// true if something is there to be read, of which the event loop has not told yet.
    fn looks_once_more(&self) -> bool {
        let mut core = self.shell.core.borrow_mut();
        let (Some(session), Some(stream)) = (core.sessions.get_mut(self.key.0), &self.stream) else { return false };
        let Some(reason) = session.reconsider() else { return false };
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let there = matches!(rustix::net::recv(stream, &mut [0u8; 1], flags), Ok((1.., _)));
        if !there {
            session.close = Some(reason);
        }
        there
    }

    fn session<T>(&self, ask: impl FnOnce(&Session) -> T) -> Option<T> {
        self.shell.core.borrow().sessions.get(self.key.0).map(ask)
    }

    /// Messages that could not be taken before may be taken now.
    fn take_rest(&mut self, turn: &mut Turn, now: Mono) {
        if self.rest.is_empty() {
            return;
        }
        let taken = self.shell.core.borrow_mut().client_bytes(self.key, self.rest.pending(), turn, now);
        self.rest.take(taken);
    }

    /// Whether the rest begins with a whole message (or a malformed one) and the session takes messages.
    fn has_takeable_message(&self) -> bool {
        !matches!(first_frame(self.rest.pending()), Ok(None)) && self.session(Session::takes_messages).unwrap_or(false)
    }

    fn write(&mut self, cx: &mut Context<'_>, now: Mono) -> Result<(), ClientCloseReason> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let mut core = self.shell.core.borrow_mut();
        let Core { sessions, spares, .. } = &mut *core;
        let Some(session) = sessions.get_mut(self.key.0) else { return Ok(()) };
        let mut socket = Polled { stream, cx };
        let (serial, before, mut blocked) = (session.serial, session.out.len(), false);
        while !session.out.is_empty() {
            match self.channel.write(session.out.pending(), &mut socket) {
                Ok(written) => {
                    session.out.advance(written, spares);
                    session.wrote(true, now);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    session.wrote(false, now);
                    blocked = true;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(&error, Some(serial))),
            }
        }
        if session.paused && session.out.len() < before {
            core.client_took(self.key, now);
        }
        if blocked {
            return Ok(());
        }
        // What TLS says for itself, new keys for instance.
        match self.channel.flush(&mut socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(broken(&error, Some(serial))),
            _ => Ok(()),
        }
    }

    /// Closes the connection, at once or after a farewell.
    fn end(&mut self, reason: ClientCloseReason) {
        if reason == ClientCloseReason::ProxyUntrusted
            && let Some((client, serial)) = self.session(|session| (session.client, session.serial))
        {
            self.shell.complain_client(client, Some(serial), reason.label());
        }
        let (stream, admitted) = (self.stream.take(), self.admitted.take());
        let (Some(stream), Some(admitted)) = (stream, admitted) else { return };
        if matches!(reason, ClientCloseReason::NoDsoSession | ClientCloseReason::WriteTimeout) {
            // To "forcibly abort" a connection is to reset it (RFC 8490 section 3), and what a client does not read is not
            // kept for it.
            return farewell::reset(&stream);
        }
        let asked = self.session(|session| (session.out.is_empty(), session.limits.write_timeout));
        let (written, patience) = asked.unwrap_or_default();
        if written {
            self.channel.close();
        }
        // At the end of a connection that TLS has broken, the alert.
        let flushed = self.channel.flush(&mut Now(&stream));
        if reason != ClientCloseReason::ClientReset
            && (written && farewell::is_due(reason) || farewell::has_untaken(&stream))
        {
            let rest = flushed.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
            let channel = if rest { std::mem::take(&mut self.channel) } else { Channel::Plain };
            let leave = farewell::take_leave(Rc::clone(&self.shell), stream, channel, admitted, patience);
            tokio::task::spawn_local(leave);
        }
    }

    fn read(&mut self, cx: &mut Context<'_>, turn: &mut Turn, now: Mono) -> Result<Poll<()>, ClientCloseReason> {
        let Some(stream) = &mut self.stream else { return Ok(Poll::Pending) };
        let mut scratch = self.shell.scratch.borrow_mut();
        let room = &mut scratch[..SCRATCH];
        let read = match self.channel.read(room, &mut self.shell.cipher.borrow_mut(), &mut Polled { stream, cx }) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Poll::Pending),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Poll::Ready(())),
            Err(error) => return Err(broken(&error, self.session(|session| session.serial))),
        };
        if read == 0 {
            self.shell.core.borrow_mut().client_finished(self.key);
            return Ok(Poll::Ready(()));
        }
        let came = &scratch[..read];
        if self.rest.is_empty() {
            let taken = self.shell.core.borrow_mut().client_bytes(self.key, came, turn, now);
            self.rest.append(&came[taken..]);
        } else {
            // Behind the part of a message that came before.
            self.rest.append(came);
            drop(scratch);
            self.take_rest(turn, now);
        }
        Ok(Poll::Ready(()))
    }
}

/// Why a connection ends on which reading or writing fails.
fn broken(error: &io::Error, session: Option<u64>) -> ClientCloseReason {
    match tls::fault(error) {
        Some(fault) => {
            tracing::debug!(session, %fault, "TLS");
            ClientCloseReason::TlsError
        }
        None => ClientCloseReason::ClientReset,
    }
}

impl Future for SessionTask {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let task = self.get_mut();
        let now = clock::now();
        task.shell.session_runs(task.key, cx);
        let ended = task.work(cx, now);
        match ended {
            Ok(()) => task.shell.core.borrow_mut().settle_session(task.key),
            Err(reason) => {
                task.end(reason);
                task.shell.core.borrow_mut().session_closed(task.key, reason, now);
            }
        }
        task.shell.flush();
        if ended.is_ok() { Poll::Pending } else { Poll::Ready(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An idle client is its task: with tokio's part of it, 256 bytes. Above this size it would be 384.
    #[test]
    fn a_task_is_small() {
        assert!(size_of::<SessionTask>() <= 152, "{} bytes", size_of::<SessionTask>());
    }
}

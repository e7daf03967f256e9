//! The bytes of a check: in clear, or over TLS.

use std::io;

use rustix::net::{RecvFlags, recv};
use socket2::Socket;

use super::check::Failure;
use super::task::Target;
use crate::backend::connect::Io;
use crate::backend::tls::Trouble;
use crate::clock;
use crate::ledger::{RowState, Tracked};
use crate::tls::stream::SLACK;
use crate::tls::{TlsFault, TlsStream};

/// Octets read at once.
const READ: usize = 4096;

/// A connection for one query.
pub(super) struct Wire<'a> {
    io: &'a Tracked<Io>,
    target: &'a Target,
    tls: Option<TlsStream>,
}

impl<'a> Wire<'a> {
    /// On this connection, which may not be there yet.
    pub(super) fn new(io: &'a Tracked<Io>, target: &'a Target) -> Self {
        Self { io, target, tls: None }
    }

    /// Sends a check: the header, if there is one, and the query. The TLS handshake comes first, if there is one, or
    /// between the two.
    pub(super) async fn ask(&mut self, check: &[u8]) -> Result<(), Failure> {
        let Some(tls) = &self.target.tls else { return self.send(check).await };
        let (header, query) = check.split_at_checked(self.target.query).unwrap_or((&[], check));
        if tls.proxy_outside_tls {
            self.send(header).await?;
        }
        self.tls = Some(tls.begin().map_err(|fault| self.failed(&fault, true))?);
        while self.tls.as_ref().is_some_and(TlsStream::is_handshaking) {
            self.flush().await?;
            self.receive(&mut Vec::new()).await?;
        }
        if !tls.proxy_outside_tls {
            self.send(header).await?;
        }
        self.send(query).await
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let mut sent = 0;
        while sent < bytes.len() {
            let rest = bytes.get(sent..).unwrap_or_default();
            sent += self
                .write(|tls, mut socket| match tls {
                    Some(tls) => tls.push(rest, &mut socket),
                    None => socket.send(rest),
                })
                .await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        while self.tls.as_ref().is_some_and(TlsStream::has_outgoing) {
            self.write(|tls, mut socket| tls.map_or(Ok(()), |tls| tls.flush(&mut socket)).map(|()| 0)).await?;
        }
        Ok(())
    }

    async fn write(
        &mut self,
        mut write: impl FnMut(Option<&mut TlsStream>, &Socket) -> io::Result<usize>,
    ) -> Result<usize, Failure> {
        loop {
            let mut ready = self.io.io().writable().await.map_err(Failure::Io)?;
            match ready.try_io(|io| write(self.tls.as_mut(), io.get_ref())) {
                Ok(Ok(count)) => {
                    self.moved();
                    return Ok(count);
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(Failure::Io(error)),
                Err(_would_block) => {}
            }
        }
    }

    /// Waits for octets, and appends those that are for us.
    pub(super) async fn receive(&mut self, into: &mut Vec<u8>) -> Result<(), Failure> {
        let mut buffer = [0; READ];
        let read = loop {
            let mut ready = self.io.io().readable().await.map_err(Failure::Io)?;
            match ready.try_io(|io| recv(io.get_ref(), &mut buffer, RecvFlags::empty()).map_err(io::Error::from)) {
                Ok(Ok((read, _))) => break read,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(Failure::Io(error)),
                Err(_would_block) => {}
            }
        };
        self.moved();
        let bytes = buffer.get(..read).unwrap_or_default();
        let Some(tls) = &mut self.tls else {
            into.extend_from_slice(bytes);
            return if read == 0 { Err(Failure::Closed) } else { Ok(()) };
        };
        let handshaking = tls.is_handshaking();
        let mut room = vec![0; READ + SLACK];
        match tls.receive(bytes, &mut room) {
            Ok(filled) => into.extend_from_slice(room.get(..filled).unwrap_or_default()),
            Err(fault) => {
                // The alert that says why.
                let _ = tls.flush(&mut &**self.io.io().get_ref());
                return Err(self.failed(&fault, handshaking));
            }
        }
        if read > 0 && !tls.peer_has_closed() {
            Ok(())
        } else if handshaking {
            Err(Failure::Handshake)
        } else {
            Err(Failure::Closed)
        }
    }

    fn failed(&self, fault: &TlsFault, handshaking: bool) -> Failure {
        let Some(tls) = &self.target.tls else { return Failure::Handshake };
        let trouble = Trouble { server_name: &tls.server_name, fault };
        Failure::Tls { reason: trouble.reason(handshaking), words: trouble.to_string() }
    }

    fn moved(&self) {
        let is_up = self.tls.as_ref().is_none_or(|tls| !tls.is_handshaking());
        self.io.entry().set_state(if is_up { RowState::Busy } else { RowState::Connecting });
        self.io.entry().set_activity(clock::now(), 1, 1);
    }
}

//! The TLS handshake of a client: read, think, write, until it is over.

use std::fmt;
use std::io;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustls::{Error, PeerIncompatible};
use tokio::net::TcpStream;

use super::preface::{self, Opening};
use super::socket::Now;
use crate::tls::{self, Channel, TlsFault, TlsStream, Version};
use crate::worker::shell::{SCRATCH, Shell};

/// Octets that are read at a time before TLS begins.
const AT_A_TIME: usize = 2048;

/// Why a handshake did not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HandshakeFailure {
    /// What came is not TLS: a query in the clear, for instance.
    NotTls,
    /// The client offers no version from 1.2 on (RFC 8310 section 9, RFC 8996).
    Version,
    /// The client offers other protocols than `dot`, and not that.
    Alpn,
    /// They have no cipher, group or signature in common.
    Incompatible,
    /// The client said what it does not like: the certificate, for instance.
    Alert,
    /// The client does not keep to the protocol.
    Protocol,
    /// The client closed the connection.
    Closed,
    /// It took longer than `handshake_timeout`.
    Timeout,
}

impl HandshakeFailure {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::NotTls,
        Self::Version,
        Self::Alpn,
        Self::Incompatible,
        Self::Alert,
        Self::Protocol,
        Self::Closed,
        Self::Timeout,
    ];

    /// The label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::NotTls => "not_tls",
            Self::Version => "version",
            Self::Alpn => "alpn",
            Self::Incompatible => "incompatible",
            Self::Alert => "alert",
            Self::Protocol => "protocol",
            Self::Closed => "closed",
            Self::Timeout => "timeout",
        }
    }

    fn of(fault: &TlsFault) -> Self {
        match fault {
            TlsFault::Tls(Error::InvalidMessage(_)) => Self::NotTls,
            TlsFault::Tls(Error::PeerIncompatible(
                PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::SupportedVersionsExtensionRequired,
            )) => Self::Version,
            TlsFault::Tls(Error::PeerIncompatible(_)) => Self::Incompatible,
            TlsFault::Tls(Error::NoApplicationProtocol) => Self::Alpn,
            TlsFault::Tls(Error::AlertReceived(_)) => Self::Alert,
            TlsFault::Tls(_) | TlsFault::NoRoom => Self::Protocol,
        }
    }
}

impl fmt::Display for HandshakeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// A kind of TLS session, as metrics tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionKind {
    /// Its version.
    pub version: Version,
    /// It went on from an earlier one, without certificates.
    pub resumed: bool,
}

impl SessionKind {
    /// All of them, in the order of [`index`](Self::index).
    pub const ALL: [Self; 4] = [
        Self { version: Version::Tls12, resumed: false },
        Self { version: Version::Tls12, resumed: true },
        Self { version: Version::Tls13, resumed: false },
        Self { version: Version::Tls13, resumed: true },
    ];

    /// Where it is in [`ALL`](Self::ALL).
    pub const fn index(self) -> usize {
        self.version as usize * 2 + self.resumed as usize
    }
}

/// A connection on its way to become a session, and what was read from it and not used yet.
pub(super) struct Link {
    pub(super) stream: TcpStream,
    pub(super) channel: Channel,
    pub(super) rest: Vec<u8>,
    /// The number that the session will have, for the log.
    pub(super) session: u64,
    /// Nothing was read yet.
    fresh: bool,
}

impl Link {
    pub(super) fn new(stream: TcpStream, session: u64) -> Self {
        Self { stream, channel: Channel::Plain, rest: Vec::new(), session, fresh: true }
    }

    /// Waits for octets of the client and gives them to `take`. Zero octets are its end.
    ///
    /// # Errors
    ///
    /// Those of the socket and of TLS.
    pub(super) async fn read<T>(&mut self, shell: &Shell, take: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
        if std::mem::take(&mut self.fresh) {
            // What came with the connection: the event loop has not told of it yet, and until it does, others who come may
            // have taken this one's place.
            let mut scratch = shell.scratch.borrow_mut();
            let room = scratch.get_mut(..AT_A_TIME).unwrap_or_default();
            match rustix::net::recv(&self.stream, &mut *room, RecvFlags::DONTWAIT) {
                Ok((count, _)) => return Ok(take(room.get(..count).unwrap_or_default())),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        loop {
            self.stream.readable().await?;
            let mut scratch = shell.scratch.borrow_mut();
            let most = if matches!(self.channel, Channel::Plain) { AT_A_TIME } else { SCRATCH };
            let room = scratch.get_mut(..most).unwrap_or_default();
            let read = self.channel.read(room, &mut shell.cipher.borrow_mut(), &mut Now(&self.stream));
            match read {
                Ok(count) => return Ok(take(room.get(..count).unwrap_or_default())),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads until it can be told what the client begins with; what was read is in `rest` then.
    ///
    /// # Errors
    ///
    /// The client has closed the connection before.
    pub(super) async fn opening(&mut self, shell: &Shell) -> Result<Opening, HandshakeFailure> {
        loop {
            if let Some(opening) = preface::opening(&self.rest) {
                return Ok(opening);
            }
            let came = self.read(shell, <[u8]>::to_vec).await.map_err(|_| HandshakeFailure::Closed)?;
            if came.is_empty() {
                return Err(HandshakeFailure::Closed);
            }
            self.rest.extend_from_slice(&came);
        }
    }

    /// The server's side of a handshake, which a client has begun like this. What comes with its last message is in `rest`
    /// then.
    pub(super) async fn shake_hands(
        &mut self,
        shell: &Shell,
        tls: TlsStream,
        opening: Opening,
    ) -> Result<(), HandshakeFailure> {
        let done = self.negotiate(shell, tls).await;
        done.map_err(|error| {
            // The alert that says what is wrong, if the socket takes it now.
            let _ = self.channel.flush(&mut Now(&self.stream));
            tls::fault(&error).map_or(HandshakeFailure::Closed, |fault| {
                tracing::debug!(session = self.session, %fault, "TLS handshake");
                match (HandshakeFailure::of(fault), opening) {
                    // rustls looks first for extensions that these versions don't know.
                    (HandshakeFailure::Incompatible, Opening::OldHello) => HandshakeFailure::Version,
                    (failure, _) => failure,
                }
            })
        })
    }

    async fn negotiate(&mut self, shell: &Shell, mut tls: TlsStream) -> io::Result<()> {
        let early = std::mem::take(&mut self.rest);
        let received = {
            // What was read already: hardly more than is read at a time.
            let mut scratch = shell.scratch.borrow_mut();
            tls.receive(&early, &mut scratch).map(|count| scratch.get(..count).unwrap_or_default().to_vec())
        };
        self.channel = Channel::Tls(Box::new(tls));
        self.rest = received?;
        loop {
            match self.channel.flush(&mut Now(&self.stream)) {
                Ok(()) if !self.channel.is_handshaking() => return Ok(()),
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stream.writable().await?;
                    continue;
                }
                Err(error) => return Err(error),
            }
            let Some(came) = self.step(shell)? else {
                self.stream.readable().await?;
                continue;
            };
            if came == 0 && self.channel.is_handshaking() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// One read; none if there is nothing to be read now, else how many octets of plaintext it brought.
    fn step(&mut self, shell: &Shell) -> io::Result<Option<usize>> {
        let mut scratch = shell.scratch.borrow_mut();
        let room = scratch.get_mut(..SCRATCH).unwrap_or_default();
        match self.channel.read(room, &mut shell.cipher.borrow_mut(), &mut Now(&self.stream)) {
            Ok(count) => {
                self.rest.extend_from_slice(room.get(..count).unwrap_or_default());
                Ok(Some(count))
            }
            // Something came that brought the handshake on.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(1)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

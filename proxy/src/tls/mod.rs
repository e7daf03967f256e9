//! DNS over TLS (RFC 7858, RFC 8310), towards clients and towards backends: rustls, without I/O and clock of its own.
//!
//! A connection's task reads and writes through a [`Channel`], which is plain or TLS and is handed the socket for each
//! call, as something that implements [`Read`] and [`Write`] and never blocks:
//!
//! - [`Channel::read`] gives plaintext. `Ok(0)` is the end: `close_notify`, or the end of the connection without it.
//!   `WouldBlock` means that the socket is empty, `Interrupted` that something was read and there is nothing to show for
//!   it yet: ask again.
//! - [`Channel::write`] takes plaintext, and says how much of it has *left*: until then it stays in the caller's buffer,
//!   so what a connection owes its peer is counted in one place. After `WouldBlock` the next call must begin with the same
//!   octets.
//! - [`Channel::flush`] sends what TLS has to say for itself: the handshake, alerts, new keys. [`Channel::close`] adds
//!   `close_notify`.
//!
//! Errors of TLS are [`io::Error`]s of the kind `InvalidData`, in which [`fault`] finds the [`TlsFault`]; the alert that
//! tells the peer is queued by then and wants a last [`Channel::flush`].
//!
//! [`stream`] is the state machine below it, [`pem`] reads certificates and keys, [`x509`] what certificates say, [`verify`] looks at
//! those of backends.

use std::io::{self, Read, Write};
use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;

#[cfg(test)]
pub(crate) mod fixture;
pub mod pem;
pub mod server;
pub mod stream;
pub mod verify;
pub mod x509;

pub use stream::{Negotiated, TlsFault, TlsStream, Version, fault};

/// The name of DNS over TLS in ALPN (IANA's registry of protocol IDs; RFC 9103 section 7.1 asks for it).
pub const ALPN_DOT: &[u8] = b"dot";

/// Octets of ciphertext that a task reads at once: its worker has one buffer of this size for it.
pub const CIPHER: usize = 32 * 1024;

/// What encrypts, and makes random numbers: *ring*, the same for all connections.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())))
}

/// How octets become messages on a connection.
#[derive(Debug, Default)]
pub enum Channel {
    /// As they are.
    #[default]
    Plain,
    /// By TLS.
    Tls(Box<TlsStream>),
}

impl Channel {
    /// Reads into `room`; over TLS by way of `cipher`, which should have [`CIPHER`] octets, and `room` must have
    /// [`stream::SLACK`] more than that, so that whatever comes out of one read finds its place.
    ///
    /// # Errors
    ///
    /// Those of the socket, and `InvalidData` for what is no TLS.
    #[inline]
    pub fn read(&mut self, room: &mut [u8], cipher: &mut [u8], from: &mut impl Read) -> io::Result<usize> {
        match self {
            Self::Plain => from.read(room),
            Self::Tls(tls) => tls.pull(room, cipher, from),
        }
    }

    /// Writes, and returns how many octets of `bytes` have left.
    ///
    /// # Errors
    ///
    /// Those of the socket. `WouldBlock` also while the handshake goes on.
    #[inline]
    pub fn write(&mut self, bytes: &[u8], to: &mut impl Write) -> io::Result<usize> {
        match self {
            Self::Plain => to.write(bytes),
            Self::Tls(tls) => tls.push(bytes, to),
        }
    }

    /// Sends what TLS itself has to say.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    #[inline]
    pub fn flush(&mut self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Plain => Ok(()),
            Self::Tls(tls) => tls.flush(to),
        }
    }

    /// Whether there is something to [`flush`](Self::flush).
    #[inline]
    pub fn has_outgoing(&self) -> bool {
        match self {
            Self::Plain => false,
            Self::Tls(tls) => tls.has_outgoing(),
        }
    }

    /// Says `close_notify`: nothing will be written any more.
    pub fn close(&mut self) {
        if let Self::Tls(tls) = self {
            tls.close();
        }
    }

    /// Whether messages cannot be read and written yet.
    #[inline]
    pub fn is_handshaking(&self) -> bool {
        match self {
            Self::Plain => false,
            Self::Tls(tls) => tls.is_handshaking(),
        }
    }

    /// What was agreed on, once the handshake is over.
    pub fn negotiated(&self) -> Option<Negotiated> {
        match self {
            Self::Plain => None,
            Self::Tls(tls) => tls.negotiated(),
        }
    }
}

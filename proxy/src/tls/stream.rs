//! One TLS connection as a state machine (I13): ciphertext in, plaintext out, and the reverse. rustls does the work; here
//! it gets bounds, and errors that say who is to blame.

use std::io::{self, Read, Write};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{CipherSuite, ClientConfig, ClientConnection, Connection, HandshakeKind, ProtocolVersion};
use rustls::{ServerConfig, ServerConnection};
use thiserror::Error;

/// Plaintext of one record, octets (RFC 8446 section 5.1). What is written is cut into such pieces: one is on its way at a
/// time.
pub const RECORD: usize = 1 << 14;

/// Plaintext can be longer than the ciphertext that was read last by the record whose beginning came before, octets.
pub const SLACK: usize = RECORD + 2048 + 5;

/// One end of a TLS connection.
#[derive(Debug)]
pub struct TlsStream {
    conn: Connection,
    /// Octets of plaintext that are encrypted and have not left yet.
    unsent: usize,
    /// The peer has said `close_notify`.
    ended: bool,
}

/// What went wrong, besides the socket.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum TlsFault {
    /// The peer did not keep to TLS, or wants what is not to be had here, or says the same of us.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// More was read than there was room for: a bug here.
    #[error("no room for what was decrypted")]
    NoRoom,
}

impl From<TlsFault> for io::Error {
    fn from(fault: TlsFault) -> Self {
        Self::new(io::ErrorKind::InvalidData, fault)
    }
}

/// What TLS says in an error of a [`Channel`](super::Channel); none if it is the socket's.
pub fn fault(error: &io::Error) -> Option<&TlsFault> {
    error.get_ref()?.downcast_ref()
}

/// The versions that are spoken (RFC 8310 section 9: not below 1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// RFC 5246.
    Tls12,
    /// RFC 8446.
    Tls13,
}

impl Version {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Tls12, Self::Tls13];

    /// The label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tls12 => "1.2",
            Self::Tls13 => "1.3",
        }
    }

    /// The name in PROXY headers: that of OpenSSL, which HAProxy sends.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tls12 => "TLSv1.2",
            Self::Tls13 => "TLSv1.3",
        }
    }
}

/// What both ends have agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The version.
    pub version: Version,
    /// The cipher suite, by OpenSSL's name.
    pub cipher: &'static str,
    /// The application protocol, if one was chosen.
    pub alpn: Option<Vec<u8>>,
    /// The name that the client asked for (SNI). Only a server is told.
    pub server_name: Option<String>,
    /// The session is the continuation of another one.
    pub resumed: bool,
}

impl TlsStream {
    /// The server's end of a connection on which nothing was read yet.
    ///
    /// # Errors
    ///
    /// If the configuration cannot be used.
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, TlsFault> {
        Ok(Self::new(ServerConnection::new(config)?.into()))
    }

    /// The client's end of a connection on which nothing was sent yet.
    ///
    /// # Errors
    ///
    /// If the configuration cannot be used.
    pub fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, TlsFault> {
        Ok(Self::new(ClientConnection::new(config, name)?.into()))
    }

    fn new(conn: Connection) -> Self {
        Self { conn, unsent: 0, ended: false }
    }

    /// Whether the handshake goes on.
    pub fn is_handshaking(&self) -> bool {
        self.conn.is_handshaking()
    }

    /// Whether there is something to send.
    pub fn has_outgoing(&self) -> bool {
        self.conn.wants_write()
    }

    /// Whether the peer has said `close_notify`.
    pub fn peer_has_closed(&self) -> bool {
        self.ended
    }

    /// Takes ciphertext, all of it, and returns how many octets of plaintext are in `room` now. What comes after
    /// `close_notify` is ignored (RFC 8446 section 6.1).
    ///
    /// # Errors
    ///
    /// The connection is of no use any more; an alert is queued. Also if `room` has less than `cipher.len()` and [`SLACK`].
    pub fn receive(&mut self, mut cipher: &[u8], room: &mut [u8]) -> Result<usize, TlsFault> {
        let mut filled = 0;
        while !cipher.is_empty() {
            match self.conn.read_tls(&mut cipher) {
                Ok(0) => break,
                Ok(_) => {}
                Err(_) => return Err(TlsFault::NoRoom),
            }
            self.ended = self.conn.process_new_packets()?.peer_has_closed();
            filled += self.take(room.get_mut(filled..).unwrap_or_default());
        }
        Ok(filled)
    }

    /// Takes plaintext that is there already: what came with the last message of the handshake.
    pub fn take(&mut self, room: &mut [u8]) -> usize {
        // Errors here say that there is nothing, for one reason or another, which others are asked for.
        self.conn.reader().read(room).unwrap_or(0)
    }

    /// Reads plaintext from a socket, at most one read of it: see [`Channel::read`](super::Channel::read).
    ///
    /// # Errors
    ///
    /// Those of the socket, `Interrupted` if there is no plaintext yet, `InvalidData` for what is no TLS.
    pub fn pull(&mut self, room: &mut [u8], cipher: &mut [u8], from: &mut impl Read) -> io::Result<usize> {
        let there = self.take(room);
        if there > 0 || self.peer_has_closed() {
            return Ok(there);
        }
        let most = cipher.len().min(room.len().saturating_sub(SLACK));
        let cipher = cipher.get_mut(..most).unwrap_or_default();
        let read = from.read(cipher)?;
        if read == 0 {
            return Ok(0);
        }
        match self.receive(cipher.get(..read).unwrap_or_default(), room)? {
            0 if !self.peer_has_closed() => Err(io::ErrorKind::Interrupted.into()),
            filled => Ok(filled),
        }
    }

    /// Writes plaintext to a socket: see [`Channel::write`](super::Channel::write).
    ///
    /// # Errors
    ///
    /// Those of the socket, `WouldBlock` also during the handshake.
    pub fn push(&mut self, bytes: &[u8], to: &mut impl Write) -> io::Result<usize> {
        if self.unsent == 0 {
            self.flush(to)?;
            if self.is_handshaking() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.unsent = self.conn.writer().write(bytes.get(..RECORD).unwrap_or(bytes))?;
        }
        self.flush(to)?;
        Ok(std::mem::take(&mut self.unsent))
    }

    /// Sends what there is to send.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn flush(&mut self, to: &mut impl Write) -> io::Result<()> {
        while self.conn.wants_write() {
            match self.conn.write_tls(to) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Queues `close_notify`, once.
    pub fn close(&mut self) {
        self.conn.send_close_notify();
    }

    /// What was agreed on; none during the handshake.
    pub fn negotiated(&self) -> Option<Negotiated> {
        if self.is_handshaking() {
            return None;
        }
        let version = match self.conn.protocol_version()? {
            ProtocolVersion::TLSv1_3 => Version::Tls13,
            _ => Version::Tls12,
        };
        let server_name = match &self.conn {
            Connection::Server(server) => server.server_name().map(str::to_owned),
            Connection::Client(_) => None,
        };
        Some(Negotiated {
            version,
            cipher: cipher_name(self.conn.negotiated_cipher_suite()?.suite()),
            alpn: self.conn.alpn_protocol().map(<[u8]>::to_vec),
            server_name,
            resumed: self.conn.handshake_kind() == Some(HandshakeKind::Resumed),
        })
    }
}

/// OpenSSL's name of a suite: what PROXY headers have (PP2_SUBTYPE_SSL_CIPHER). For all that *ring* has.
fn cipher_name(suite: CipherSuite) -> &'static str {
    match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
        CipherSuite::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 => "ECDHE-ECDSA-AES128-GCM-SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 => "ECDHE-ECDSA-AES256-GCM-SHA384",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 => "ECDHE-ECDSA-CHACHA20-POLY1305",
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => "ECDHE-RSA-AES128-GCM-SHA256",
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => "ECDHE-RSA-AES256-GCM-SHA384",
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => "ECDHE-RSA-CHACHA20-POLY1305",
        _ => "unknown",
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;

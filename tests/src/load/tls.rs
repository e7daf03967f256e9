//! One end of a TLS connection: octets in, octets out; the socket is the caller's.

use std::io::{self, Read as _, Write as _};

use rustls::Connection;

/// What IANA has registered as the ALPN identifier of DNS over TLS (RFC 7858).
pub const ALPN: &[u8] = b"dot";

/// A connection with room for what its last call made.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    sealed: Vec<u8>,
    opened: Vec<u8>,
}

impl Session {
    /// Neither has anything been sent yet, nor received.
    #[must_use]
    pub fn new(connection: impl Into<Connection>) -> Self {
        let mut connection = connection.into();
        // What is sent before the handshake is done waits in there.
        connection.set_buffer_limit(None);
        Self { connection, sealed: Vec::new(), opened: Vec::new() }
    }

    /// What the handshake has come to.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Takes octets to be sent, in a record of their own, with the next call of [`Session::seal`].
    ///
    /// # Errors
    /// As [`Session::seal`].
    pub fn add(&mut self, octets: &[u8]) -> io::Result<()> {
        self.connection.writer().write_all(octets)
    }

    /// Takes octets to be sent and returns the records that can go out now, those of the handshake included.
    ///
    /// # Errors
    /// If rustls refuses the octets, which it does without a limit only for want of memory.
    pub fn seal(&mut self, octets: &[u8]) -> io::Result<&[u8]> {
        self.sealed.clear();
        self.add(octets)?;
        while self.connection.wants_write() {
            self.connection.write_tls(&mut self.sealed)?;
        }
        Ok(&self.sealed)
    }

    /// Whether [`Session::seal`] would return something by itself.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// The last record, after which nothing can be sent (RFC 8446 section 6.1).
    ///
    /// # Errors
    /// As [`Session::seal`].
    pub fn end(&mut self) -> io::Result<&[u8]> {
        self.connection.send_close_notify();
        self.seal(&[])
    }

    /// Takes octets that were received; what was in them is in [`Session::opened`] then.
    ///
    /// # Errors
    /// If they are no correct TLS. An alert for the peer may be left to [`Session::seal`].
    pub fn open(&mut self, mut octets: &[u8]) -> io::Result<()> {
        self.opened.clear();
        while !octets.is_empty() {
            // 0: the peer's last record has come.
            if self.connection.read_tls(&mut octets)? == 0 {
                break;
            }
            let state = self.connection.process_new_packets().map_err(io::Error::other)?;
            let start = self.opened.len();
            self.opened.resize(start + state.plaintext_bytes_to_read(), 0);
            self.connection.reader().read_exact(&mut self.opened[start..])?;
        }
        Ok(())
    }

    /// What was in the octets of the last call of [`Session::open`].
    #[must_use]
    pub fn opened(&self) -> &[u8] {
        &self.opened
    }
}

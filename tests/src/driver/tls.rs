//! The client's end of DNS over TLS.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};

/// Longest handshake; a server that does not go on with it has hung.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// How clients speak TLS. Those that share one share the tickets by which sessions are resumed.
#[derive(Clone, Debug)]
pub struct Tls {
    config: ClientConfig,
    name: ServerName<'static>,
}

impl Tls {
    /// Only a server of this name will do, with a certificate of the authority in this file. No protocol is offered (ALPN).
    ///
    /// # Panics
    /// If the name or the file is of no use.
    #[track_caller]
    pub fn new(ca: &Path, name: &str) -> Self {
        Self::with_versions(ca, name, rustls::ALL_VERSIONS)
    }

    /// Like [`Self::new`], with these versions.
    ///
    /// # Panics
    /// If the name or the file is of no use.
    #[track_caller]
    pub fn with_versions(ca: &Path, name: &str, versions: &[&'static SupportedProtocolVersion]) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca).expect("a certificate")).expect("an authority");
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { config, name: ServerName::try_from(name.to_owned()).expect("a name") }
    }

    /// What a client says first.
    ///
    /// # Panics
    /// Never in practice: there are random numbers.
    pub fn hello(&self) -> Vec<u8> {
        let mut octets = Vec::new();
        let mut conn = self.begin().expect("a client");
        conn.write_tls(&mut octets).expect("memory");
        octets
    }

    fn begin(&self) -> io::Result<ClientConnection> {
        ClientConnection::new(Arc::new(self.config.clone()), self.name.clone()).map_err(io::Error::other)
    }

    /// Offers these protocols.
    #[must_use]
    pub fn offering(mut self, protocols: &[&str]) -> Self {
        self.config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        self
    }
}

/// What a client reads and writes.
#[derive(Debug)]
pub enum Wire {
    /// The connection itself.
    Plain(TcpStream),
    /// TLS on it.
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Wire {
    pub(super) fn shake_hands(mut stream: TcpStream, tls: &Tls) -> io::Result<Self> {
        let mut conn = tls.begin()?;
        stream.set_read_timeout(Some(HANDSHAKE))?;
        while conn.is_handshaking() {
            conn.complete_io(&mut stream)?;
        }
        Ok(Self::Tls(Box::new(StreamOwned::new(conn, stream))))
    }

    pub(super) fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(tls) => &tls.sock,
        }
    }
}

impl Read for Wire {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(room),
            Self::Tls(tls) => tls.read(room),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(tls) => tls.flush(),
        }
    }
}

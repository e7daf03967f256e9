//! TLS 1.3 towards the server under test: what clients offer, and which handshakes they insist on.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, ensure};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientConfig, ClientConnection, ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, HandshakeKind, NamedGroup, SignatureScheme};

use super::super::certificate::SERVER_NAME;
use super::super::tls::{ALPN, Session};

/// Tickets that a client keeps at most.
const TICKETS: usize = 8;

/// Handshakes of one run.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    /// Full ones.
    pub(super) new: u64,
    /// Those that took up an earlier session.
    pub(super) resumed: u64,
}

/// What all clients begin with. One cipher suite and one group, so that every server does the same work for them.
///
/// # Errors
/// If there is no certificate in the file.
pub(super) fn configure(certificate: &Path) -> anyhow::Result<ClientConfig> {
    let certificate = CertificateDer::from_pem_file(certificate)
        .with_context(|| format!("read the server's certificate from {}", certificate.display()))?;
    let provider = CryptoProvider {
        cipher_suites: vec![ring::cipher_suite::TLS13_AES_256_GCM_SHA384],
        kx_groups: vec![ring::kx_group::X25519],
        ..ring::default_provider()
    };
    let verifier = Pinned { certificate, algorithms: provider.signature_verification_algorithms };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("TLS 1.3")?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// TLS of one client: its present connection, and the sessions of the earlier ones.
#[derive(Debug)]
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    server: ServerName<'static>,
    session: Session,
    tickets: Arc<Tickets>,
    /// Whether the handshake must be a resumed one: there was a ticket.
    resumes: bool,
}

impl Tls {
    /// With `resume` it keeps the tickets that it is given, for itself.
    ///
    /// # Errors
    /// None with a configuration of [`configure`].
    pub(super) fn new(config: &ClientConfig, resume: bool) -> anyhow::Result<Self> {
        let mut config = config.clone();
        let tickets = Arc::new(Tickets::default());
        config.resumption = if resume { Resumption::store(Arc::clone(&tickets) as _) } else { Resumption::disabled() };
        let (config, server) = (Arc::new(config), ServerName::try_from(SERVER_NAME)?);
        let session = Session::new(ClientConnection::new(Arc::clone(&config), server.clone())?);
        Ok(Self { config, server, session, tickets, resumes: false })
    }

    /// Begins a new connection. Its ClientHello goes out with the first query.
    ///
    /// # Errors
    /// None with a configuration of [`configure`].
    pub(super) fn connect(&mut self) -> io::Result<()> {
        self.resumes = self.tickets.count() > 0;
        let connection = ClientConnection::new(Arc::clone(&self.config), self.server.clone());
        self.session = Session::new(connection.map_err(io::Error::other)?);
        Ok(())
    }

    /// As [`Session::seal`].
    pub(super) fn seal(&mut self, octets: &[u8]) -> io::Result<&[u8]> {
        self.session.seal(octets)
    }

    /// As [`Session::wants_write`].
    pub(super) fn wants_write(&self) -> bool {
        self.session.wants_write()
    }

    /// As [`Session::end`].
    pub(super) fn end(&mut self) -> io::Result<&[u8]> {
        self.session.end()
    }

    /// Takes octets that were received and returns what was in them. Counts the handshake if it is done now.
    ///
    /// # Errors
    /// On anything but correct TLS 1.3 with the right certificate and ALPN `dot`, and if a ticket was not honoured.
    pub(super) fn open(&mut self, octets: &[u8], handshakes: &mut Handshakes) -> anyhow::Result<&[u8]> {
        let was_handshaking = self.session.connection().is_handshaking();
        self.session.open(octets)?;
        let connection = self.session.connection();
        if was_handshaking && !connection.is_handshaking() {
            let expected = if self.resumes { HandshakeKind::Resumed } else { HandshakeKind::Full };
            let kind = connection.handshake_kind().context("a handshake of no kind")?;
            ensure!(kind == expected, "the handshake was {kind:?} instead of {expected:?}");
            ensure!(connection.alpn_protocol() == Some(ALPN), "the server has not chosen ALPN dot");
            match kind {
                HandshakeKind::Resumed => handshakes.resumed += 1,
                HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest => handshakes.new += 1,
            }
        }
        Ok(self.session.opened())
    }
}

/// Tickets of one client. Each is used once (RFC 8446 appendix C.4), the newest first.
#[derive(Default)]
struct Tickets(Mutex<Vec<Tls13ClientSessionValue>>);

impl Tickets {
    fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tickets", self.count())
    }
}

impl ClientSessionStore for Tickets {
    fn insert_tls13_ticket(&self, _server: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tickets.len() == TICKETS {
            tickets.remove(0);
        }
        tickets.push(ticket);
    }

    fn take_tls13_ticket(&self, _server: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    // There is one group to choose from, and no TLS 1.2.
    fn set_kx_hint(&self, _server: ServerName<'static>, _group: NamedGroup) {}
    fn kx_hint(&self, _server: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }
    fn set_tls12_session(&self, _server: ServerName<'static>, _session: Tls12ClientSessionValue) {}
    fn tls12_session(&self, _server: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }
    fn remove_tls12_session(&self, _server: &ServerName<'static>) {}
}

/// Accepts one certificate, octet by octet and whatever it says: no chain is built, and it is the server's signature
/// alone that the clients spend their time on.
#[derive(Debug)]
struct Pinned {
    certificate: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if *end_entity == self.certificate {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 was not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

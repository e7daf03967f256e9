//! TLS towards backends: whom we trust, whom we expect, and what it means when they do not fit. Queries go to an
//! authenticated backend or nowhere (RFC 8310 section 5, the strict profile).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{ClientConfig, Resumption};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CertificateError, RootCertStore};

use crate::close::CloseReason;
use crate::config::BackendTls;
use crate::tls::pem::{self, PemError};
use crate::tls::verify::{self, Verifier};
use crate::tls::{ALPN_DOT, TlsFault, TlsStream, provider};

/// Sessions that are remembered for a backend: as many TLS 1.3 tickets as rustls keeps for one name, or one session of
/// TLS 1.2.
const SESSIONS: usize = 8;

/// Those who may issue a backend's certificate, and the sessions that were had with it.
///
/// Each backend has its own, so that a session is never offered to another backend, nor to one with another name or CA.
/// Two are equal if the same certificates are in them.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    issuers: Arc<[CertificateDer<'static>]>,
    /// None: nobody is trusted.
    config: Option<Arc<ClientConfig>>,
}

impl PartialEq for Trust {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.issuers, &other.issuers) || self.issuers == other.issuers
    }
}

impl Eq for Trust {}

/// Why a file of issuers cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// It cannot be read, or has no certificates.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// A certificate that cannot have issued others.
    #[error("certificate {number} of {} is damaged, or none that can be trusted: it cannot be read", file.display())]
    Unusable {
        /// Where it is.
        file: PathBuf,
        /// Counted from 1.
        number: usize,
    },
    /// What encrypts does not go with any version of TLS.
    #[error("there is no version of TLS that goes with what encrypts")]
    Tls,
}

/// The certificates of a file of issuers.
#[derive(Clone, Debug)]
pub struct Issuers {
    certificates: Arc<[CertificateDer<'static>]>,
    verifier: Arc<Verifier>,
}

impl Issuers {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// The file cannot be read, has none, or one is broken.
    pub fn load(file: &Path) -> Result<Self, TrustError> {
        let certificates = pem::certificates(file)?;
        let mut roots = RootCertStore::empty();
        for (index, issuer) in certificates.iter().enumerate() {
            let unusable = |_| TrustError::Unusable { file: file.to_owned(), number: index + 1 };
            roots.add(issuer.clone()).map_err(unusable)?;
        }
        let verifier = Verifier::new(roots).ok_or(TrustError::Tls)?;
        Ok(Self { certificates: certificates.into(), verifier: Arc::new(verifier) })
    }
}

impl Trust {
    /// Trusts these certificates, and those that they have issued.
    ///
    /// # Errors
    ///
    /// What encrypts does not go with TLS.
    pub fn new(issuers: &Issuers) -> Result<Self, TrustError> {
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let mut config = builder
            .map_err(|_| TrustError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&issuers.verifier) as _)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN_DOT.to_vec()];
        config.resumption = Resumption::in_memory_sessions(SESSIONS);
        Ok(Self { issuers: Arc::clone(&issuers.certificates), config: Some(Arc::new(config)) })
    }
}

impl BackendTls {
    /// Begins a session.
    pub(crate) fn begin(&self) -> Result<TlsStream, TlsFault> {
        match &self.trust.config {
            Some(config) => TlsStream::client(Arc::clone(config), self.server_name.clone()),
            None => Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer).into()),
        }
    }
}

/// What went wrong with TLS, in the words of the log.
#[derive(Debug)]
pub(crate) struct Trouble<'a> {
    pub(crate) server_name: &'a ServerName<'static>,
    pub(crate) fault: &'a TlsFault,
}

impl Trouble<'_> {
    /// The reason to close the connection: before the handshake was over, no query has left.
    pub(crate) fn reason(&self, handshaking: bool) -> CloseReason {
        match self.fault {
            TlsFault::Tls(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
                CloseReason::CertificateRefused
            }
            _ if handshaking => CloseReason::HandshakeFailed,
            TlsFault::Tls(rustls::Error::AlertReceived(_)) => CloseReason::PeerClosed,
            _ => CloseReason::ProtocolViolation,
        }
    }
}

impl fmt::Display for Trouble<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.server_name.to_str();
        match self.fault {
            TlsFault::Tls(rustls::Error::InvalidCertificate(error)) => {
                write!(f, "certificate refused, expected one for {name:?}: ")?;
                f.write_str(&verify::words(error))
            }
            TlsFault::Tls(rustls::Error::AlertReceived(alert)) => {
                write!(f, "the backend ended TLS (server name {name:?}) with the alert {alert:?}")
            }
            fault => write!(f, "TLS with server name {name:?}: {fault}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn without_a_file_nobody_is_trusted() {
        let server_name = ServerName::try_from("dot.example.test").unwrap();
        let tls = BackendTls { server_name, ca: None, proxy_outside_tls: true, trust: Trust::default() };
        let fault = tls.begin().unwrap_err();
        let trouble = Trouble { server_name: &tls.server_name, fault: &fault };
        assert_eq!(trouble.reason(true), CloseReason::CertificateRefused);
    }

    #[test]
    fn the_reason_says_whether_a_query_had_left() {
        let server_name = ServerName::try_from("dot.example.test").unwrap();
        let reasons = |error: rustls::Error| {
            let fault = TlsFault::Tls(error);
            let trouble = Trouble { server_name: &server_name, fault: &fault };
            assert!(trouble.to_string().contains("\"dot.example.test\""), "{trouble}");
            [true, false].map(|handshaking| trouble.reason(handshaking))
        };
        let expired = CertificateError::Expired;
        assert_eq!(reasons(rustls::Error::InvalidCertificate(expired)), [CloseReason::CertificateRefused; 2]);
        let alert = rustls::AlertDescription::HandshakeFailure;
        assert_eq!(
            reasons(rustls::Error::AlertReceived(alert)),
            [CloseReason::HandshakeFailed, CloseReason::PeerClosed]
        );
        assert_eq!(
            reasons(rustls::Error::DecryptError),
            [CloseReason::HandshakeFailed, CloseReason::ProtocolViolation]
        );
    }
}

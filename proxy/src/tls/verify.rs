//! Whether a backend's certificate is one to trust (RFC 5280 section 6, by webpki), and what is wrong if not, in words for
//! whoever can do something about it.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme};

use super::{provider, x509};

/// webpki's, which says in addition which certificate of a chain is out of date.
#[derive(Debug)]
pub struct Verifier(Arc<WebPkiServerVerifier>);

impl Verifier {
    /// Trusts what these have issued; none if they are no issuers at all.
    pub fn new(roots: RootCertStore) -> Option<Self> {
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build().ok().map(Self)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.0.verify_server_cert(own, others, server_name, ocsp_response, now);
        let out_of_date = |error: &Error| {
            use CertificateError::{ExpiredContext, NotValidYetContext};
            matches!(error, Error::InvalidCertificate(ExpiredContext { .. } | NotValidYetContext { .. }))
        };
        match verified {
            Err(error) if out_of_date(&error) => Err(which(own, others, now).unwrap_or(error)),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// A certificate behind the backend's own is out of date.
#[derive(Debug)]
struct OfChain(String);

impl fmt::Display for OfChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OfChain {}

/// The first behind the server's own that is not valid now; none if its own is not, which the error says already.
fn which(own: &CertificateDer<'_>, others: &[CertificateDer<'_>], now: UnixTime) -> Option<Error> {
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if x509::validity(own).is_some_and(|valid| !valid.contains(&now)) {
        return None;
    }
    let (index, valid) = others
        .iter()
        .enumerate()
        .filter_map(|(index, other)| Some((index, x509::validity(other)?)))
        .find(|(_, valid)| !valid.contains(&now))?;
    let what = x509::called(index + 2, others.get(index)?);
    let when = match now - valid.end() {
        since if since > 0 => format!("expired {since} s ago"),
        _ => format!("is not valid for {} s yet: is the clock right?", valid.start() - now),
    };
    let words = format!("{what}, which the backend sends behind its own, {when}; it is to send a chain that is valid");
    Some(CertificateError::Other(OtherError(Arc::new(OfChain(words)))).into())
}

/// What is wrong with a backend's certificate, and what to do.
pub fn words(error: &CertificateError) -> String {
    use CertificateError as E;
    match error {
        E::UnknownIssuer => {
            "its issuer is not one of those that are trusted: `ca` names the file with its issuers, and the \
                             backend is to send the certificates between"
                .to_owned()
        }
        E::ExpiredContext { time, not_after } => {
            let since = time.as_secs().saturating_sub(not_after.as_secs());
            format!("it expired {since} s ago: the backend needs a new one")
        }
        E::NotValidYetContext { time, not_before } => {
            let until = not_before.as_secs().saturating_sub(time.as_secs());
            format!("it is not valid for {until} s yet: is the clock of this host right?")
        }
        E::NotValidForNameContext { presented, .. } => {
            let names: Vec<String> = presented.iter().map(|name| format!("{name:?}")).collect();
            let names = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
            format!("it is for {names}: it must have the name of `server_name` among its subjectAltNames")
        }
        E::InvalidPurposeContext { .. } | E::InvalidPurpose => {
            "it is not for servers: issue it with the extended key usage serverAuth".to_owned()
        }
        E::BadSignature => {
            "its signature is wrong: it was damaged, or another authority of that name has issued it".to_owned()
        }
        E::BadEncoding => "it cannot be read: it is damaged, or no X.509 certificate".to_owned(),
        E::UnhandledCriticalExtension => "it has a critical extension that is not known here".to_owned(),
        E::UnsupportedSignatureAlgorithmContext { .. } | E::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "it is signed by an algorithm that is not used here: RSA or ECDSA with SHA-256 to SHA-512, or Ed25519, are"
                .to_owned()
        }
        E::Other(OtherError(error)) => other(&**error),
        error => format!("{error:?}"),
    }
}

/// What webpki says beside that, which rustls hands on as it is.
fn other(error: &(dyn std::error::Error + Send + Sync + 'static)) -> String {
    if let Some(OfChain(words)) = error.downcast_ref() {
        return words.clone();
    }
    let name = error.to_string();
    match name.as_str() {
        "CaUsedAsEndEntity" => "it is that of an authority (CA:TRUE): issue it with CA:FALSE".to_owned(),
        "EndEntityUsedAsCa" => {
            "a certificate that may not issue others (CA:FALSE) has issued it: issue that with CA:TRUE".to_owned()
        }
        "UnsupportedCertVersion" => "it is not of version 3 of X.509: issue it with extensions".to_owned(),
        "NameConstraintViolation" => "its authority may not issue one for that name (name constraints)".to_owned(),
        "PathLenConstraintViolated" => {
            "there are more authorities between it and the trusted one than that allows".to_owned()
        }
        _ => name,
    }
}

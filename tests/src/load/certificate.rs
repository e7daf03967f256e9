//! The certificate that all programs of a benchmark over TLS show.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::tls::ALPN;

/// Whom it names.
pub const SERVER_NAME: &str = "dns.example.test";

/// Writes a self-signed certificate with a key on P-256: `certificate.pem`, `key.pem`, and as HAProxy wants them, both in
/// `both.pem`.
///
/// # Errors
/// If the directory cannot be written to, or for want of random numbers.
pub fn write(directory: &Path) -> anyhow::Result<()> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("make a key")?;
    let certificate = CertificateParams::new([SERVER_NAME.to_owned()]).and_then(|params| params.self_signed(&key));
    let certificate = certificate.context("make a certificate")?.pem();
    let key = key.serialize_pem();
    for (name, content) in
        [("certificate.pem", &certificate), ("key.pem", &key), ("both.pem", &[&*certificate, &*key].concat())]
    {
        let path = directory.join(name);
        std::fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// TLS 1.3 of a server that shows the certificate in this directory, with tickets.
///
/// # Errors
/// If there is no certificate, or no key that belongs to it.
pub fn server(directory: &Path) -> anyhow::Result<ServerConfig> {
    let (certificate, key) = (directory.join("certificate.pem"), directory.join("key.pem"));
    let certificate = CertificateDer::from_pem_file(&certificate).with_context(|| certificate.display().to_string())?;
    let key = PrivateKeyDer::from_pem_file(&key).with_context(|| key.display().to_string())?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ticketer = ring::Ticketer::new()?;
    Ok(config)
}

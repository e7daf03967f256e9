//! The certificate that all programs of a benchmark over TLS show.

use std::path::Path;

use anyhow::Context as _;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};

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

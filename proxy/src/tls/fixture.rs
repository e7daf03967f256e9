//! Certificates for tests.

#![expect(clippy::unwrap_used, reason = "tests panic")]

/// A certificate that signs itself, and its key, in PEM.
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// One for this name.
pub(crate) fn pair(name: &str) -> Pair {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    Pair { certificate: made.cert.pem(), key: made.signing_key.serialize_pem() }
}

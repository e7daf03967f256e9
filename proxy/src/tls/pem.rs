//! Certificates and keys from PEM files (RFC 7468).

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use thiserror::Error;

use super::provider;

/// The longest file that is read, bytes: the roots that browsers trust are a quarter of it.
const MAX_FILE: u64 = 1 << 20;

/// Why a file cannot be used. Each names the file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PemError {
    /// The file cannot be opened or read.
    #[error("{} cannot be read: {reason}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// It is longer than any such file.
    #[error("{} is longer than {MAX_FILE} bytes", .0.display())]
    TooLong(PathBuf),
    /// It begins a section and does not keep to the format.
    #[error("{} is no PEM file: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The parser's words.
        reason: String,
    },
    /// It has no section CERTIFICATE.
    #[error("{} holds no certificate", .0.display())]
    NoCertificate(PathBuf),
    /// It has no section PRIVATE KEY, RSA PRIVATE KEY or EC PRIVATE KEY.
    #[error("{} holds no private key; one with a password cannot be read", .0.display())]
    NoKey(PathBuf),
    /// Certificate and key are of no use, or not of one pair.
    #[error("{} and {}: {reason}", certificate.display(), key.display())]
    Unfit {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl PemError {
    /// The file that is to blame: where two do not fit, the key's.
    pub fn file(&self) -> &Path {
        match self {
            Self::Unreadable { file, .. }
            | Self::TooLong(file)
            | Self::Malformed { file, .. }
            | Self::NoCertificate(file)
            | Self::NoKey(file)
            | Self::Unfit { key: file, .. } => file,
        }
    }
}

/// All certificates of a file, in order.
///
/// # Errors
///
/// It cannot be read, or has none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let found: Vec<_> = sections(path)?;
    if found.is_empty() { Err(PemError::NoCertificate(path.to_owned())) } else { Ok(found) }
}

/// The first private key of a file.
///
/// # Errors
///
/// It cannot be read, or has none.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, PemError> {
    let found: Vec<PrivateKeyDer<'static>> = sections(path)?;
    found.into_iter().next().ok_or_else(|| PemError::NoKey(path.to_owned()))
}

/// A chain of certificates, the server's first, with the key of that one.
///
/// # Errors
///
/// A file cannot be read or has nothing of the kind, or the key is another certificate's.
pub fn certified_key(certificate: &Path, key: &Path) -> Result<CertifiedKey, PemError> {
    let chain = certificates(certificate)?;
    CertifiedKey::from_der(chain, private_key(key)?, &provider()).map_err(|error| {
        let reason = match error {
            rustls::Error::InconsistentKeys(_) => "the key is not that of the first certificate".to_owned(),
            error => error.to_string(),
        };
        PemError::Unfit { certificate: certificate.to_owned(), key: key.to_owned(), reason }
    })
}

fn sections<T: PemObject>(path: &Path) -> Result<Vec<T>, PemError> {
    let mut octets = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut octets))
        .map_err(|error| PemError::Unreadable { file: path.to_owned(), reason: error.to_string() })?;
    if octets.len() as u64 > MAX_FILE {
        return Err(PemError::TooLong(path.to_owned()));
    }
    let malformed =
        |error: rustls::pki_types::pem::Error| PemError::Malformed { file: path.to_owned(), reason: error.to_string() };
    T::pem_slice_iter(&octets).map(|section| section.map_err(malformed)).collect()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::super::fixture::{Pair, pair};
    use super::*;

    /// A directory that is gone at the end.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("counterfoil-pem-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, text).unwrap();
            path
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn a_pair_is_read_and_what_is_wrong_is_named() {
        let directory = Directory::new("pair");
        let (Pair { certificate, key }, other) = (pair("dns.example"), pair("other.example"));
        let good = directory.file("cert.pem", &certificate);
        let good_key = directory.file("key.pem", &key);
        assert_eq!(certified_key(&good, &good_key).unwrap().cert.len(), 1);
        let both = directory.file("both.pem", &format!("{key}{certificate}{}", other.certificate));
        assert_eq!(
            certified_key(&both, &both).unwrap().cert.len(),
            2,
            "one file for all, the rest of the chain behind"
        );

        let said = |certificate: &Path, key: &Path| certified_key(certificate, key).unwrap_err().to_string();
        let place = directory.0.display();
        let missing = directory.0.join("none.pem");
        let unreadable = format!("{place}/none.pem cannot be read: No such file or directory (os error 2)");
        assert_eq!(said(&missing, &good_key), unreadable);
        assert_eq!(said(&good, &missing), unreadable);
        assert_eq!(said(&good_key, &good_key), format!("{place}/key.pem holds no certificate"));
        assert_eq!(
            said(&good, &good),
            format!("{place}/cert.pem holds no private key; one with a password cannot be read")
        );
        let other_key = directory.file("other.pem", &other.key);
        assert_eq!(
            said(&good, &other_key),
            format!("{place}/cert.pem and {place}/other.pem: the key is not that of the first certificate")
        );
        let cut = directory.file("cut.pem", &certificate[..certificate.len() / 2]);
        assert!(said(&cut, &good_key).starts_with(&format!("{place}/cut.pem is no PEM file: ")));
        let long = directory.file("long.pem", &"\n".repeat(1 << 21));
        assert_eq!(said(&long, &good_key), format!("{place}/long.pem is longer than 1048576 bytes"));
        assert!(said(&directory.0, &good_key).contains("cannot be read: Is a directory"));
    }

    #[test]
    fn octets_that_are_no_certificate_do_not_pass_for_one() {
        let directory = Directory::new("octets");
        let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let path = directory.file("cert.pem", nonsense);
        let key = directory.file("key.pem", &pair("dns.example").key);
        assert!(certified_key(&path, &key).is_err());
    }
}

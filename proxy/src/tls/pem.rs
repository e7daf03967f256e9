//! Certificates and keys from PEM files (RFC 7468).

use std::fmt;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::{self, PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use thiserror::Error;

use super::provider;
use crate::file::{self, FileFault};

/// The longest file that is read, bytes: the roots that browsers trust are a quarter of it.
const MAX_FILE: u64 = 1 << 20;

/// The keys that *ring* signs with.
const KEYS: &str = "keys that work are RSA with 2048 to 4096 bits, ECDSA on P-256 or P-384, and Ed25519";

/// Why a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PemError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub fault: PemFault,
}

impl fmt::Display for PemError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, fault } = self;
        match file.to_string_lossy().contains("-----BEGIN") {
            true => f.write_str("the name of a file belongs here, not what is in it"),
            false => write!(f, "{} {fault}", file.display()),
        }
    }
}

impl std::error::Error for PemError {}

/// What is wrong with a file. It is `Copy`, so that it carries nothing of what is in the file: parsers quote what they do
/// not understand, and here that is a key.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PemFault {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileFault),
    /// Everything is in one line, or in fewer than there must be.
    #[error(
        "is no PEM file any more, its line breaks are lost: `-----BEGIN ...-----` and `-----END ...-----` each have a line \
         of their own"
    )]
    LineBreaks,
    /// A section begins like one, and does not go on so.
    #[error("is no PEM file: a line with `-----BEGIN` does not end with five dashes")]
    BadBegin,
    /// Its last line is gone, or names something else than its first.
    #[error("is cut off, or damaged: the line `-----END ...-----` that its `-----BEGIN ...-----` asks for is missing")]
    NoEnd,
    /// Between these lines there must be base64.
    #[error("is damaged: what is between its `-----BEGIN ...-----` and `-----END ...-----` is not base64")]
    NotBase64,
    /// The mark is there, behind something else.
    #[error("is no PEM file: its `-----BEGIN` is not at the beginning of a line, as in quotes or indented")]
    Indented,
    /// Two octets for each character.
    #[error("is UTF-16, and PEM is ASCII: save it so")]
    Utf16,
    /// What PEM is made from.
    #[error("is DER, not PEM: `openssl x509 -inform DER` or `openssl pkey -inform DER` makes PEM of it")]
    Der,
    /// Certificate and key in one file with a password.
    #[error("is PKCS#12, which is encrypted: `openssl pkcs12 -noenc` makes PEM of it")]
    Pkcs12,
    /// A key with a password, in whatever form.
    #[error("holds an encrypted private key, and nobody is there to enter its password: `openssl pkey` decrypts it")]
    Encrypted,
    /// Of OpenSSH, with a password.
    #[error(
        "holds an encrypted private key of OpenSSH, which is none for TLS: `ssh-keygen -p -N '' -m PKCS8` decrypts and \
         converts it in place"
    )]
    EncryptedSsh,
    /// Of OpenSSH, without one.
    #[error("holds a private key of OpenSSH, which is none for TLS: `ssh-keygen -p -m PKCS8` converts it in place")]
    Ssh,
    /// It has no section CERTIFICATE.
    #[error("holds no certificate")]
    NoCertificate,
    /// It has no section PRIVATE KEY, RSA PRIVATE KEY or EC PRIVATE KEY.
    #[error("holds no private key")]
    NoKey,
    /// A section CERTIFICATE with something else in it.
    #[error("is damaged: its certificate {0} cannot be read")]
    BadCertificate(usize),
    /// A key of another kind or length, or what is none.
    #[error("holds no private key of a kind that works, or a damaged one: {KEYS}")]
    UnsupportedKey,
    /// Certificate and key are not of one pair.
    #[error("is not the key of the first certificate in `certificate`; the server's own comes first there")]
    OtherKey,
}

impl PemFault {
    fn of(self, path: &Path) -> PemError {
        PemError { file: path.to_owned(), fault: self }
    }

    /// Whether the key is to blame, and not the certificate, if both are in one file.
    pub fn is_of_key(self) -> bool {
        matches!(self, Self::NoKey | Self::UnsupportedKey | Self::OtherKey)
    }
}

/// All certificates of a file, in order.
///
/// # Errors
///
/// It cannot be read, or has none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    sections(path, PemFault::NoCertificate)
}

/// The first private key of a file.
///
/// # Errors
///
/// It cannot be read, or has none.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, PemError> {
    let found: Vec<PrivateKeyDer<'static>> = sections(path, PemFault::NoKey)?;
    found.into_iter().next().ok_or_else(|| PemFault::NoKey.of(path))
}

/// A chain of certificates, the server's first, with the key of that one.
///
/// # Errors
///
/// A file cannot be read or has nothing of the kind, or the key is another certificate's.
pub fn certified_key(certificate: &Path, key: &Path) -> Result<CertifiedKey, PemError> {
    let chain = certificates(certificate)?;
    let loaded = provider().key_provider.load_private_key(private_key(key)?);
    let pair = CertifiedKey::new(chain, loaded.map_err(|_| PemFault::UnsupportedKey.of(key))?);
    match pair.keys_match() {
        // Of such a key nobody can tell.
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(pair),
        Err(rustls::Error::InconsistentKeys(_)) => Err(PemFault::OtherKey.of(key)),
        Err(_) => Err(PemFault::BadCertificate(1).of(certificate)),
    }
}

/// The sections of a kind; `none` is what is wrong with a file that has none, unless it is seen what it is instead.
fn sections<T: PemObject>(path: &Path, none: PemFault) -> Result<Vec<T>, PemError> {
    let octets = file::read(path, MAX_FILE).map_err(|fault| PemFault::File(fault).of(path))?;
    let found: Result<Vec<(SectionKind, Vec<u8>)>, _> = PemObject::pem_slice_iter(&octets).collect();
    let fault = match found {
        Ok(found) => {
            let found: Vec<T> = found.into_iter().filter_map(|(kind, der)| T::from_pem(kind, der)).collect();
            if !found.is_empty() {
                return Ok(found);
            }
            none
        }
        // Nothing of the parser's words: they quote.
        Err(pem::Error::IllegalSectionStart { .. }) => PemFault::BadBegin,
        Err(pem::Error::MissingSectionEnd { .. }) => PemFault::NoEnd,
        Err(_) => PemFault::NotBase64,
    };
    Err(seen(&octets, fault).unwrap_or(fault).of(path))
}

/// What a file is that is not what it should be, if it has the marks of it. `fault`: what is known of it.
fn seen(octets: &[u8], fault: PemFault) -> Option<PemFault> {
    const BEGIN: &[u8] = b"-----BEGIN";
    /// "openssh-key-v1", a zero, and "none" for the cipher with its length, in base64.
    const SSH_IN_CLEAR: &[u8] = b"b3BlbnNzaC1rZXktdjEAAAAABG5vbmU";
    /// The beginning of the object identifiers of PKCS#5 (RFC 8018) and of the ciphers of PKCS#12 (RFC 7292).
    const BY_PASSWORD: [&[u8]; 2] = [b"\x2a\x86\x48\x86\xf7\x0d\x01\x05", b"\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x01"];
    let has = |mark: &[u8]| holds(octets, mark);
    if fault != PemFault::NoCertificate {
        if has(b"BEGIN OPENSSH PRIVATE KEY") {
            return Some(if has(SSH_IN_CLEAR) { PemFault::Ssh } else { PemFault::EncryptedSsh });
        }
        if has(b"BEGIN ENCRYPTED PRIVATE KEY") || has(b"Proc-Type: 4,ENCRYPTED") || has(b"DEK-Info:") {
            return Some(PemFault::Encrypted);
        }
    }
    if octets.starts_with(b"\xff\xfe") || octets.starts_with(b"\xfe\xff") || has(b"-\0-\0-\0-\0-\0") {
        return Some(PemFault::Utf16);
    }
    let lines = || octets.split(|octet| matches!(octet, b'\n' | b'\r'));
    let has_more = |line: &[u8]| holds(line, b"-----END") || holds(line.trim_ascii_end(), b"----- ");
    if lines().any(|line| line.starts_with(BEGIN) && has_more(line)) {
        return Some(PemFault::LineBreaks);
    }
    if has(BEGIN) {
        return lines().all(|line| !line.starts_with(BEGIN)).then_some(PemFault::Indented);
    }
    // A SEQUENCE whose length has a form of more than one octet (X.690 section 8.1.3.5), as each of these has.
    let [0x30, 0x81..=0x84, ..] = octets else { return None };
    let first = &octets[..octets.len().min(64)];
    match () {
        // PFX (RFC 7292 section 4): version 3, then ContentInfo.
        () if holds(&first[..first.len().min(9)], b"\x02\x01\x03\x30") => Some(PemFault::Pkcs12),
        () if BY_PASSWORD.iter().any(|mark| holds(first, mark)) => Some(PemFault::Encrypted),
        () => Some(PemFault::Der),
    }
}

fn holds(octets: &[u8], mark: &[u8]) -> bool {
    octets.windows(mark.len()).any(|window| window == mark)
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
        assert_eq!(said(&good, &good), format!("{place}/cert.pem holds no private key"));
        let other_key = directory.file("other.pem", &other.key);
        assert_eq!(said(&good, &other_key), format!("{place}/other.pem {}", PemFault::OtherKey));
        let cut = directory.file("cut.pem", &certificate[..certificate.len() / 2]);
        assert_eq!(said(&cut, &good_key), format!("{place}/cut.pem {}", PemFault::NoEnd));
        let long = directory.file("long.pem", &"\n".repeat(1 << 21));
        assert_eq!(said(&long, &good_key), format!("{place}/long.pem is longer than 1048576 bytes"));
        assert!(said(&directory.0, &good_key).ends_with("is a directory, where a regular file must be"));
    }

    #[test]
    fn octets_that_are_no_certificate_do_not_pass_for_one() {
        let directory = Directory::new("octets");
        let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let path = directory.file("cert.pem", nonsense);
        let key = directory.file("key.pem", &pair("dns.example").key);
        assert_eq!(certified_key(&path, &key).unwrap_err().fault, PemFault::BadCertificate(1));
    }

    /// What people have instead of a key in PEM, as openssl and ssh-keygen write it; here but the beginnings.
    #[test]
    fn what_is_no_key_in_clear_is_called_what_it_is() {
        let directory = Directory::new("instead");
        let section = |label: &str, body: &str| format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n");
        let key = pair("dns.example").key;
        let flat = key.replace('\n', " ");
        let traditional = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA";
        // What PBES2 begins with, ... a PFX, a key in PKCS#8.
        let by_password = [0x30, 0x81, 0xec, 0x30, 0x57, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 5, 0x0d];
        let pfx = [0x30, 0x82, 5, 0x42, 2, 1, 3, 0x30, 0x82, 4, 0xf8];
        let der = [0x30, 0x81, 0x87, 2, 1, 0, 0x30, 0x13];
        let utf16: Vec<u8> = std::iter::once(0xfeff).chain(key.encode_utf16()).flat_map(u16::to_le_bytes).collect();
        for (what, expected) in [
            (section("ENCRYPTED PRIVATE KEY", "AAAA").as_bytes(), PemFault::Encrypted),
            (section("RSA PRIVATE KEY", traditional).as_bytes(), PemFault::Encrypted),
            (section("EC PRIVATE KEY", traditional).as_bytes(), PemFault::Encrypted),
            (&by_password, PemFault::Encrypted),
            (&pfx, PemFault::Pkcs12),
            (&der, PemFault::Der),
            (
                section("OPENSSH PRIVATE KEY", "b3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHI").as_bytes(),
                PemFault::EncryptedSsh,
            ),
            (section("OPENSSH PRIVATE KEY", "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAE").as_bytes(), PemFault::Ssh),
            (&utf16, PemFault::Utf16),
            (flat.as_bytes(), PemFault::LineBreaks),
            (key.replace('\n', "").as_bytes(), PemFault::LineBreaks),
            (key.replace('\n', "\\n").as_bytes(), PemFault::LineBreaks),
            (key.replacen('\n', " ", 1).as_bytes(), PemFault::LineBreaks),
            (key.replacen("KEY-----", "KEY----", 1).as_bytes(), PemFault::BadBegin),
            (key.replace("END PRIVATE", "END RSA PRIVATE").as_bytes(), PemFault::NoEnd),
            (key.replacen('\n', "\n!", 1).as_bytes(), PemFault::NotBase64),
            (format!("\"{key}\"").as_bytes(), PemFault::Indented),
            (section("PRIVATE KEY", "AAAA").as_bytes(), PemFault::UnsupportedKey),
            (b"", PemFault::NoKey),
        ] {
            let file = directory.0.join("key.pem");
            std::fs::write(&file, what).unwrap();
            let certificate = directory.file("cert.pem", &pair("dns.example").certificate);
            let error = certified_key(&certificate, &file).unwrap_err();
            assert_eq!(error.fault, expected, "{}", String::from_utf8_lossy(what));
            let says_so = error.to_string().contains("encrypted");
            let is = matches!(expected, PemFault::Encrypted | PemFault::EncryptedSsh | PemFault::Pkcs12);
            assert_eq!(says_so, is, "{error}");
        }
    }

    #[test]
    fn a_key_in_place_of_its_files_name_is_not_said() {
        let key = pair("dns.example").key;
        let error = private_key(Path::new(&key)).unwrap_err();
        assert_eq!(error.to_string(), "the name of a file belongs here, not what is in it");
    }
}

//! Certificates for TLS, made when a scenario begins: none is kept that could expire.

use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd,
};

use crate::tempdir::TempDir;

/// An authority with a directory for its certificates.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    dir: TempDir,
    /// Its own certificate, in PEM: what clients trust.
    pub ca: PathBuf,
}

/// A certificate and its key, each a file in PEM.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

impl Authority {
    /// A new one, which nobody else trusts.
    ///
    /// # Panics
    /// If its files cannot be written.
    #[expect(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        let dir = TempDir::new("certificates");
        let mut params = CertificateParams::default();
        // A name of its own, by which issuers are found.
        params.distinguished_name.push(DnType::CommonName, format!("authority {}", dir.path().display()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a random number");
        let ca = dir.write("ca.pem", &params.self_signed(&key).expect("a certificate").pem());
        Self { issuer: Issuer::new(params, key), dir, ca }
    }

    /// A server's certificate for these names and addresses, in files `STEM.pem` and `STEM.key`. They replace those that
    /// are there, as who renews a certificate does.
    ///
    /// # Panics
    /// If a name is none, or its files cannot be written.
    pub fn issue(&self, stem: &str, names: &[&str]) -> Certificate {
        self.sign(stem, Self::params(names))
    }

    /// The same, but it was valid in the year 2000 only.
    ///
    /// # Panics
    /// If a name is none, or its files cannot be written.
    pub fn issue_expired(&self, stem: &str, names: &[&str]) -> Certificate {
        let mut params = Self::params(names);
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(2000, 12, 31);
        self.sign(stem, params)
    }

    /// The same, signed by its own key.
    ///
    /// # Panics
    /// If a name is none, or its files cannot be written.
    pub fn issue_self_signed(&self, stem: &str, names: &[&str]) -> Certificate {
        let key = KeyPair::generate().expect("a random number");
        let certificate = Self::params(names).self_signed(&key).expect("a certificate");
        self.keep(stem, &certificate.pem(), &key)
    }

    /// The same, but as an authority has one.
    ///
    /// # Panics
    /// If a name is none, or its files cannot be written.
    pub fn issue_for_authority(&self, stem: &str, names: &[&str]) -> Certificate {
        let mut params = Self::params(names);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        self.sign(stem, params)
    }

    /// The same by an authority between, named `between`, whose certificate comes behind it and was valid in the year 2000
    /// only.
    ///
    /// # Panics
    /// If a name is none, or its files cannot be written.
    pub fn issue_below_expired(&self, stem: &str, names: &[&str]) -> Certificate {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "between");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (params.not_before, params.not_after) = (date_time_ymd(2000, 1, 1), date_time_ymd(2000, 12, 31));
        let key = KeyPair::generate().expect("a random number");
        let between = params.signed_by(&key, &self.issuer).expect("a certificate").pem();
        let (issuer, key) = (Issuer::new(params, key), KeyPair::generate().expect("a random number"));
        let own = Self::params(names).signed_by(&key, &issuer).expect("a certificate").pem();
        self.keep(stem, &(own + &between), &key)
    }

    fn params(names: &[&str]) -> CertificateParams {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names or addresses");
        params.distinguished_name.push(DnType::CommonName, "server of a test");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params
    }

    fn sign(&self, stem: &str, params: CertificateParams) -> Certificate {
        let key = KeyPair::generate().expect("a random number");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        self.keep(stem, &certificate.pem(), &key)
    }

    fn keep(&self, stem: &str, certificate: &str, key: &KeyPair) -> Certificate {
        Certificate {
            certificate: self.dir.write(&format!("{stem}.pem"), certificate),
            key: self.dir.write(&format!("{stem}.key"), &key.serialize_pem()),
        }
    }

    /// Writes a file beside the certificates, one file for both for instance, as HAProxy wants it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        self.dir.write(name, text)
    }
}

impl Certificate {
    /// Both in one text: certificate, then key.
    ///
    /// # Panics
    /// If they cannot be read.
    pub fn both(&self) -> String {
        let read = |path| std::fs::read_to_string(path).expect("a file that was written");
        read(&self.certificate) + &read(&self.key)
    }
}

//! The certificate of the scenarios with TLS, made anew for each benchmark.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::process::TempDir;
use crate::command;

/// Whom it names, in the DNS.
pub(super) const SERVER_NAME: &str = "dns.example.test";

/// A self-signed one with an ECDSA key on P-256, as PEM files.
pub(super) struct Certificate(TempDir);

impl Certificate {
    /// Has `program` make it.
    pub(super) fn make(program: &mut Command) -> Result<Self> {
        let directory = TempDir::new()?;
        command::run(program.arg(directory.path())).context("make a certificate")?;
        Ok(Self(directory))
    }

    pub(super) fn directory(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn certificate(&self) -> PathBuf {
        self.0.path().join("certificate.pem")
    }

    pub(super) fn key(&self) -> PathBuf {
        self.0.path().join("key.pem")
    }

    /// Certificate and key in one file, as HAProxy wants them.
    pub(super) fn both(&self) -> PathBuf {
        self.0.path().join("both.pem")
    }
}

//! The files that a configuration names: each is read once, however often it is named.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;
use std::path::{Path, PathBuf};

use crate::backend::tls::{Issuers, TrustError};
use crate::tls::pem::PemError;
use crate::tls::server::Identity;

/// What was read.
pub(super) struct Files<'t> {
    /// Where relative paths begin.
    directory: &'t Path,
    /// By the paths of certificate and key.
    identities: Memory<(PathBuf, PathBuf), Result<Identity, PemError>>,
    issuers: Memory<PathBuf, Result<Issuers, TrustError>>,
}

type Memory<K, V> = RefCell<HashMap<K, V>>;

impl<'t> Files<'t> {
    pub(super) fn new(directory: &'t Path) -> Self {
        Self { directory, identities: Memory::default(), issuers: Memory::default() }
    }

    /// Where a file is that is named.
    pub(super) fn path(&self, named: &str) -> PathBuf {
        self.directory.join(named)
    }

    /// A certificate and its key.
    pub(super) fn identity(&self, certificate: &str, key: &str) -> Result<Identity, PemError> {
        let paths = (self.path(certificate), self.path(key));
        once(&self.identities, paths, |(certificate, key)| Identity::read(certificate, key))
    }

    /// Those who may have issued certificates.
    pub(super) fn issuers(&self, file: PathBuf) -> Result<Issuers, TrustError> {
        once(&self.issuers, file, |file| Issuers::load(file))
    }
}

fn once<K: Eq + Hash, V: Clone>(memory: &Memory<K, V>, key: K, read: impl FnOnce(&K) -> V) -> V {
    if let Some(known) = memory.borrow().get(&key) {
        return known.clone();
    }
    let value = read(&key);
    memory.borrow_mut().insert(key, value.clone());
    value
}

//! What will be wrong with the files once the process serves.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use super::super::Config;
use super::Warning;
use crate::{file, privilege};

/// Files that could be read now and will not be at a reload: before it serves, the process gives up the capabilities by which
/// root reads files that are not its own.
pub fn unreadable_later(file: &Path, config: &Config) -> Vec<Warning> {
    let named = named(file, config);
    let unreadable = || named.iter().filter_map(|(key, path)| Some((key, path, file::readable(path).err()?))).collect();
    let Ok(unreadable): Result<Vec<_>, _> = privilege::without(unreadable) else { return Vec::new() };
    let user = geteuid().as_raw();
    let warning = |(key, path, fault): (&String, &PathBuf, file::FileFault)| Warning {
        key: key.clone(),
        message: format!(
            "{} {fault} without the capabilities that `run` gives up when it has started, so that every reload will be \
             refused: let user {user}, as whom this runs, read it and its directories by owner or group (`chown`, `chgrp`)",
            path.display()
        ),
    };
    unreadable.into_iter().map(warning).collect()
}

/// The configuration, and what it names, each file once.
fn named(file: &Path, config: &Config) -> Vec<(String, PathBuf)> {
    let directory = file.parent().unwrap_or(Path::new(""));
    let listeners = config.listeners.iter().filter_map(|listener| listener.tls.as_ref());
    let of_listeners =
        listeners.flat_map(|tls| [("listener.tls.certificate", &tls.certificate), ("listener.tls.key", &tls.key)]);
    let backends = config.pools.iter().flat_map(|pool| &pool.backends);
    let of_backends = backends.filter_map(|backend| Some(("pool.backend.tls.ca", backend.tls.as_ref()?.ca.as_ref()?)));
    let of_admin = config.admin.token_file.iter().map(|path| ("admin.token_file", path));
    let all = of_listeners.chain(of_backends).chain(of_admin).map(|(key, path)| (key, directory.join(path)));
    let mut seen = HashSet::new();
    let all = std::iter::once(("", file.to_owned())).chain(all);
    all.filter(|(_, path)| seen.insert(path.clone())).map(|(key, path)| (key.to_owned(), path)).collect()
}

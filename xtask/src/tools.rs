//! The programs that the tests and benchmarks run: a Debian of their own, unpacked below `target/`.
//!
//! Whatever this machine has installed is neither asked for nor used, so that all machines are alike, and so no service
//! starts, no user is added and nothing needs root. Programs are started in it as themselves (see the script `enter`), and
//! find their libraries and their data where Debian has them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::command::{self, say};
use crate::debian::{self, Unpacked, With};
use crate::workspace;

/// The list, one package a line, with the reason behind it.
const PACKAGES: &str = include_str!("../packages.txt");

/// Where they are unpacked, below `target/`. The scripts know it, too.
const FOLDER: &str = "test-tools";

/// In the root, as `login` and shells know it: the name of a root that is not a machine's. The tests look for it.
const NAME: (&str, &str) = ("etc/debian_chroot", "counterfoil-tests\n");

/// What a package makes of what it brings when it is installed: the users that every Debian has.
const CONFIGURED: [(&str, &str); 2] =
    [("usr/share/base-passwd/passwd.master", "etc/passwd"), ("usr/share/base-passwd/group.master", "etc/group")];

/// The names on the list.
pub(crate) fn packages() -> Vec<&'static str> {
    entries().filter_map(|line| line.split_whitespace().next()).collect()
}

fn entries() -> impl Iterator<Item = &'static str> {
    PACKAGES.lines().filter(|line| !line.starts_with('#'))
}

/// The root with all of the programs.
pub(crate) struct Root {
    target: PathBuf,
    root: PathBuf,
}

impl Root {
    /// The root, if it is there and has all that the list has.
    pub(crate) fn cached(target: &Path) -> Option<Self> {
        let unpacked = Unpacked::cached(&target.join(FOLDER), &packages())?;
        let root = Self { target: target.to_owned(), root: unpacked.root() };
        root.path(NAME.0).exists().then_some(root)
    }

    /// The root, gotten if it is not there.
    pub(crate) fn get(target: &Path) -> Result<Self> {
        let _lock = workspace::lock(target)?;
        if let Some(root) = Self::cached(target) {
            return Ok(root);
        }
        if !debian::is_available() {
            bail!("the tests' programs are Debian's ({}), and there is no apt here to get them", packages().join(", "));
        }
        say(
            "tests and benchmarks need what follows: it is unpacked below target/, with all that it depends on, and not \
             installed:",
        );
        for line in entries() {
            say(format_args!("    {line}"));
        }
        let unpacked = Unpacked::get(&target.join(FOLDER), &packages(), With::Everything)?;
        let root = Self { target: target.to_owned(), root: unpacked.root() };
        for (from, to) in CONFIGURED {
            fs::copy(root.path(from), root.path(to)).with_context(|| format!("cannot write {to}"))?;
        }
        fs::write(root.path(NAME.0), NAME.1).with_context(|| format!("cannot write {}", NAME.0))?;
        Ok(root)
    }

    /// A program of the root, to be started in it.
    pub(crate) fn program(&self, name: &str) -> Command {
        let mut command = command::program(workspace::root().join("xtask/enter"));
        command.arg(&self.target).arg(name);
        command
    }

    /// Where a file of the root is, as seen from outside.
    pub(crate) fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        self.root.join(inside.strip_prefix("/").unwrap_or(inside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_names_and_reasons() {
        let packages = packages();
        assert!(packages.contains(&"unbound") && packages.contains(&"knot-dnsutils"), "{packages:?}");
        for line in entries() {
            assert!(line.split_whitespace().count() > 1, "no reason: {line}");
        }
    }
}

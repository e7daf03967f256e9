//! The servers and clients that the tests and benchmarks run against.
//!
//! Packages that are installed are used as they are. The others are unpacked below `target/`: so no service starts, no
//! user is added, nothing needs root.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::command::say;
use crate::debian::{self, Unpacked};
use crate::workspace;

/// The list, one package a line, with the reason behind it.
const PACKAGES: &str = include_str!("../packages.txt");

/// Where those are unpacked, below `target/`.
const FOLDER: &str = "test-tools";

/// Programs are found in `PATH`; these are often not in a user's.
const SYSTEM: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The names on the list.
pub(crate) fn packages() -> Vec<&'static str> {
    names(PACKAGES)
}

fn names(list: &str) -> Vec<&str> {
    let lines = list.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_whitespace().next()).collect()
}

/// Those of the list that are neither installed nor unpacked.
pub(crate) fn missing(target: &Path) -> Vec<&'static str> {
    let absent = not_installed(packages());
    if Unpacked::cached(&directory(target), &absent).is_some() { Vec::new() } else { absent }
}

/// A `PATH` that has all the tools, getting those that are missing.
pub(crate) fn search_path(target: &Path) -> Result<OsString> {
    search_path_for(target, FOLDER, PACKAGES, "the tests need")
}

/// The same for another list of the same form, unpacked in a folder of its own below `target`; `need` begins the
/// sentence that says what is missing.
pub(crate) fn search_path_for(target: &Path, folder: &str, list: &str, need: &str) -> Result<OsString> {
    let mut directories: Vec<PathBuf> = Vec::new();
    let absent = not_installed(names(list));
    if !absent.is_empty() {
        let _lock = workspace::lock(target)?;
        directories.push(unpack(&target.join(folder), list, &absent, need)?);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    directories.extend(std::env::split_paths(&path));
    directories.extend(SYSTEM.map(PathBuf::from));
    std::env::join_paths(directories).context("PATH")
}

fn directory(target: &Path) -> PathBuf {
    target.join(FOLDER)
}

fn not_installed(wanted: Vec<&str>) -> Vec<&str> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${Package} ${db:Status-Status}\n"]).args(&wanted);
    // It fails if one of the packages is unknown, and lists the others all the same.
    let listed = query.output().map(|output| output.stdout).unwrap_or_default();
    let listed = String::from_utf8_lossy(&listed);
    let is_installed = |package: &str| listed.lines().any(|line| line == format!("{package} installed"));
    wanted.into_iter().filter(|package| !is_installed(package)).collect()
}

/// Unpacks `packages` and returns a folder with a wrapper for each of their programs.
fn unpack(directory: &Path, list: &str, packages: &[&str], need: &str) -> Result<PathBuf> {
    if !debian::is_available() {
        bail!("{need} {}, and there is no apt here to get them", packages.join(", "));
    }
    if Unpacked::cached(directory, packages).is_none() {
        say(format_args!("{need} what follows: it is unpacked below target/ and not installed:"));
        for line in
            list.lines().filter(|line| packages.iter().any(|&name| line.split_whitespace().next() == Some(name)))
        {
            say(format_args!("    {line}"));
        }
    }
    let unpacked = Unpacked::get(directory, packages)?;
    let wrappers = directory.join("bin");
    for folder in SYSTEM.iter().rev() {
        let folder = unpacked.root().join(folder.trim_start_matches('/'));
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let program = entry?.path();
            let executable =
                fs::metadata(&program).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0);
            if let (true, Some(name)) = (executable, program.file_name()) {
                workspace::write_wrapper(&wrappers.join(name), &program, &unpacked.library_path())?;
            }
        }
    }
    Ok(wrappers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_names_and_reasons() {
        let packages = packages();
        assert!(packages.contains(&"unbound") && packages.contains(&"knot-dnsutils"), "{packages:?}");
        for line in PACKAGES.lines().filter(|line| !line.starts_with('#')) {
            assert!(line.split_whitespace().count() > 1, "no reason: {line}");
        }
    }
}

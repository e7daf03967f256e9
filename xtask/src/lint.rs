//! `cargo xtask lint`: what a change must pass before its tests are run.

use std::path::Path;

use anyhow::{Result, bail};

use crate::command::{self, EBPF_OBJECT, say};
use crate::{ebpf, tidy, workspace};

/// Linted one by one: together, Cargo would unify their features, and `test-hooks` of the tests would be on in the
/// program itself.
const PACKAGES: &[&str] = &["counterfoil-common", "counterfoil", "counterfoil-tests", "xtask"];

/// The eBPF program and the fuzz targets have other compilers, and so workspaces of their own.
const WORKSPACES: &[&str] = &["Cargo.toml", "proxy-ebpf/Cargo.toml", "proxy/fuzz/Cargo.toml"];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only this part
    part: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// rustfmt, all packages
    Format,
    /// What no lint of the compiler checks: where `unsafe` and exceptions may be, length of files, lock files
    Conventions,
    /// Clippy for all user-space packages, with all targets; every warning is an error
    UserSpace,
    /// Clippy for the eBPF program, of the compiler that builds it; every warning is an error
    Ebpf,
}

/// All parts are run, whatever becomes of those before.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let wanted = |part| arguments.part.is_none_or(|it| it == part);
    let mut results: Vec<(String, Result<()>)> = Vec::new();
    if wanted(Part::Format) {
        say("lint: format");
        results.extend(WORKSPACES.iter().map(|it| (format!("format of {it}"), format(it))));
    }
    if wanted(Part::Conventions) {
        say("lint: conventions");
        results.push(("conventions".to_owned(), tidy::run()));
        results.extend(WORKSPACES.iter().map(|it| (format!("lock file of {it}"), locked(it))));
    }
    if wanted(Part::UserSpace) {
        // With the object, so that the code that loads it is linted too.
        match ebpf::object() {
            Ok(object) => {
                results.extend(PACKAGES.iter().map(|it| (format!("clippy of {it}"), clippy(it, &object))));
            }
            Err(error) => results.push(("clippy of user space".to_owned(), Err(error))),
        }
    }
    if wanted(Part::Ebpf) {
        results.push(("clippy of the eBPF program".to_owned(), ebpf::lint()));
    }
    let mut failed = Vec::new();
    for (name, result) in results {
        if let Err(error) = result {
            say(format_args!("lint: {name}: {error:#}"));
            failed.push(name);
        }
    }
    if failed.is_empty() {
        say("lint: all good");
        return Ok(());
    }
    bail!("lint failed: {}", failed.join(", "))
}

fn format(manifest: &str) -> Result<()> {
    let mut fmt = command::cargo();
    fmt.args(["fmt", "--all", "--check", "--manifest-path", manifest]).current_dir(workspace::root());
    command::run(&mut fmt)
}

/// Whether the lock file that is checked in is that of the manifest. Builds of other workspaces would not notice.
fn locked(manifest: &str) -> Result<()> {
    let mut metadata = command::cargo();
    metadata.args(["metadata", "--locked", "--format-version", "1", "--manifest-path", manifest]);
    command::output(metadata.current_dir(workspace::root())).map(drop)
}

fn clippy(package: &str, object: &Path) -> Result<()> {
    say(format_args!("lint: {package}"));
    let mut clippy = command::cargo();
    clippy
        .env(EBPF_OBJECT, object)
        .args(["clippy", "--quiet", "--locked", "--all-targets", "--package", package, "--", "--deny", "warnings"])
        .current_dir(workspace::root());
    command::run(&mut clippy)
}

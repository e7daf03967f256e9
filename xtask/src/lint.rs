//! `cargo xtask lint`: what a change must pass before its tests are run.

use anyhow::Result;

use crate::command::{self, say};
use crate::{ebpf, tidy, workspace};

/// Linted one by one: together, Cargo would unify their features, and `test-hooks` of the tests would be on in the
/// program itself.
const PACKAGES: &[&str] = &["counterfoil-common", "counterfoil", "counterfoil-tests", "xtask"];

pub(crate) fn run() -> Result<()> {
    say("lint: format");
    for manifest in ["Cargo.toml", "proxy-ebpf/Cargo.toml"] {
        let mut fmt = command::cargo();
        fmt.args(["fmt", "--all", "--check", "--manifest-path", manifest]).current_dir(workspace::root());
        command::run(&mut fmt)?;
    }
    say("lint: conventions");
    tidy::run()?;
    for package in PACKAGES {
        say(format_args!("lint: {package}"));
        let mut clippy = command::cargo();
        clippy
            .args(["clippy", "--quiet", "--locked", "--all-targets", "--package", package, "--", "--deny", "warnings"])
            .current_dir(workspace::root());
        command::run(&mut clippy)?;
    }
    ebpf::lint()
}

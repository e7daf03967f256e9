//! `cargo xtask audit`: cargo-deny with deny.toml.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::command::{self, say};
use crate::workspace;

const RELEASE: &str = "0.20.2";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Check for known vulnerabilities too. Their database is fetched from github.com
    #[arg(long)]
    advisories: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let deny = cargo_deny()?;
    // The eBPF program and the fuzz targets are workspaces of their own.
    for manifest in ["Cargo.toml", "proxy-ebpf/Cargo.toml", "proxy/fuzz/Cargo.toml"] {
        say(format_args!("audit: {manifest}"));
        let mut command = command::program(&deny);
        command.args(["--locked", "--manifest-path", manifest, "--config", "deny.toml", "check"]);
        command.args(["--hide-inclusion-graph", "--allow", "unmatched-skip", "licenses", "bans", "sources"]);
        if arguments.advisories {
            command.arg("advisories");
        }
        command::run(command.current_dir(workspace::root()))?;
    }
    Ok(())
}

/// cargo-deny, built below `target/` unless an earlier run did.
fn cargo_deny() -> Result<PathBuf> {
    let directory = workspace::target()?.join("cargo-deny").join(RELEASE);
    let program = directory.join("bin").join("cargo-deny");
    if !program.exists() {
        say(format_args!("building cargo-deny {RELEASE} below {}", directory.display()));
        let mut cargo = command::cargo();
        command::without_compiler_settings(&mut cargo)
            .args(["install", "--locked", "--debug", "cargo-deny", "--version", RELEASE])
            .args(["--no-track", "--root"])
            .arg(&directory)
            .arg("--target-dir")
            .arg(directory.join("build"))
            .current_dir("/");
        command::run(&mut cargo).context("cannot build cargo-deny")?;
        std::fs::remove_dir_all(directory.join("build")).context("cannot remove cargo-deny's build folder")?;
    }
    Ok(program)
}

//! `cargo xtask build-and-run`: from a clone to a running forwarder.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::command::{self, EBPF_OBJECT, say};
use crate::{ebpf, privilege, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Build without the eBPF program: the kernel view then comes from sock_diag
    #[arg(long)]
    no_ebpf: bool,
    /// Build only
    #[arg(long)]
    no_run: bool,
    /// For `counterfoil`: options of `run`, or another of its commands. Without any it runs the demo
    #[arg(last = true)]
    args: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut cargo = command::cargo();
    cargo.args(["build", "--locked", "--release", "--package", "counterfoil"]).current_dir(workspace::root());
    if arguments.no_ebpf {
        say("eBPF object: left out (--no-ebpf)");
    } else {
        cargo.env(EBPF_OBJECT, ebpf::object()?);
    }
    say("program: building in release mode");
    command::run(&mut cargo)?;

    let program = workspace::target()?.join("release").join("counterfoil");
    if arguments.no_run {
        say(format_args!("built {}", program.display()));
        return Ok(());
    }
    if !arguments.no_ebpf && !privilege::is_root() {
        say("not root: the kernel refuses eBPF programs without CAP_BPF and CAP_PERFMON, the kernel view will come \
             from sock_diag. To see it with eBPF:");
        say(format_args!("    sudo {} run", program.display()));
    }
    let mut counterfoil: Command = command::program(&program);
    counterfoil.args(program_arguments(&arguments.args));
    // Replaces this process, so that signals reach the program.
    Err(counterfoil.exec()).with_context(|| format!("cannot start {}", program.display()))
}

/// `run` unless the arguments name another command.
fn program_arguments(arguments: &[String]) -> Vec<&str> {
    let given = arguments.iter().map(String::as_str);
    match arguments.first() {
        Some(first) if !first.starts_with('-') => given.collect(),
        _ => std::iter::once("run").chain(given).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_is_the_default_command() {
        let of = |arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
            program_arguments(&arguments).join(" ")
        };
        assert_eq!(of(&[]), "run");
        assert_eq!(of(&["--config", "a.toml"]), "run --config a.toml");
        assert_eq!(of(&["run", "--config", "a.toml"]), "run --config a.toml");
        assert_eq!(of(&["check-config", "a.toml"]), "check-config a.toml");
    }
}

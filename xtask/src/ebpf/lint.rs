//! Clippy for the eBPF program.

use anyhow::Result;

use super::{Compiler, Linker, cargo};
use crate::command::{self, say};
use crate::workspace;

/// Clippy, by the driver that belongs to the eBPF compiler: rustup's knows another `core`.
pub(crate) fn lint() -> Result<()> {
    let target = workspace::target()?;
    let _lock = workspace::lock(&target)?;
    let compiler = Compiler::find_or_get(&target)?;
    let linker = Linker::get(&target, &compiler)?;
    let driver = compiler.clippy_driver()?;
    say(format_args!("lint: eBPF program, clippy of {compiler}"));
    let mut check = cargo(&compiler, &linker, &target.join("ebpf"), "check");
    check.env("RUSTC_WORKSPACE_WRAPPER", driver);
    check.env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
    command::run(&mut check)
}

//! The eBPF object: another target, another compiler, another linker than the program's.

mod compiler;
mod linker;
mod lint;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

pub(crate) use compiler::Compiler;
pub(crate) use linker::Linker;
pub(crate) use lint::lint;

use crate::command::{self, EBPF_OBJECT, say};
use crate::workspace;

/// Rust's name of little-endian BPF. All of the program's kernels are little-endian.
const TARGET: &str = "bpfel-unknown-none";
const BINARY: &str = "counterfoil-ebpf";

/// The object, built if anything it depends on has changed. Gets compiler and linker if they are missing.
///
/// `COUNTERFOIL_EBPF_OBJECT` in the environment names one that is already built.
pub(crate) fn object() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os(EBPF_OBJECT) {
        let given = fs::canonicalize(&given).with_context(|| format!("{EBPF_OBJECT}={}", given.display()))?;
        say(format_args!("eBPF object: {} (from {EBPF_OBJECT})", given.display()));
        return Ok(given);
    }
    let target = workspace::target()?;
    let _lock = workspace::lock(&target)?;
    let compiler = Compiler::find_or_get(&target)?;
    let linker = Linker::get(&target, &compiler)?;
    say(format_args!("eBPF object: building with {compiler} and {linker}"));

    let directory = target.join("ebpf");
    command::run(cargo(&compiler, &linker, &directory, "build").args(["--bin", BINARY]))?;

    // Cargo renews the file's time whenever it links; the program's build follows the contents.
    let built = directory.join(TARGET).join("release").join(BINARY);
    let contents = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    if !is_bpf(&contents) {
        bail!("{} is not an eBPF object", built.display());
    }
    let object = built_object(&target);
    workspace::write_if_changed(&object, &contents)?;
    Ok(object)
}

/// Where [`object`] leaves what it built.
pub(crate) fn built_object(target: &Path) -> PathBuf {
    target.join("ebpf").join(format!("{BINARY}.o"))
}

/// `cargo SUBCOMMAND` for the eBPF workspace.
fn cargo(compiler: &Compiler, linker: &Linker, directory: &Path, subcommand: &str) -> Command {
    // Flags in an array, as a path in the user's own flags may hold spaces: separated by U+001F.
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        // BTF is made from debug information, and is what types the maps' values.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ];
    let mut command = compiler.cargo();
    command
        .arg(subcommand)
        .args(["--locked", "--release", "--target", TARGET, "--target-dir"])
        .arg(directory)
        .current_dir(workspace::root().join("proxy-ebpf"))
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker.path())
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    command
}

/// ELF, machine 247 (EM_BPF).
fn is_bpf(object: &[u8]) -> bool {
    object.starts_with(b"\x7fELF") && object.get(18..20) == Some(&247_u16.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bpf_is_bpf() {
        let mut header = [0_u8; 64];
        header[..4].copy_from_slice(b"\x7fELF");
        header[18] = 62;
        assert!(!is_bpf(&header), "x86-64");
        header[18] = 247;
        assert!(is_bpf(&header));
        assert!(!is_bpf(b"\x7fELF"));
        assert!(!is_bpf(b""));
    }
}

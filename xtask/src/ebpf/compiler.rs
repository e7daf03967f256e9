//! A compiler that can compile for BPF.
//!
//! BPF is a tier 3 target: rustup has no `core` for it. So the compiler is one of
//! 1. rustup's nightly with the component rust-src, which compiles `core` itself;
//! 2. Debian's `rustc-web`, whose package `libstd-rust-web-dev-bpf` has `core` compiled: unpacked by an earlier run,
//!    or installed on this machine (any compiler with such a `core` will do), or else downloaded.
//!
//! `rustc-web` conflicts with Debian's `rustc` and `rustup`, so it is unpacked and never installed.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{TARGET, linker};
use crate::command::{self, say};
use crate::debian::{self, Unpacked, With};
use crate::workspace;

/// `rust-web-clippy` is for `cargo xtask lint`: clippy must be of the compiler's own version.
const PACKAGES: &[&str] = &["rustc-web", "libstd-rust-web-dev-bpf", "rust-web-clippy"];

/// A compiler with a `core` for BPF, or with the source of one.
#[derive(Debug)]
pub(crate) struct Compiler {
    origin: Origin,
    rustc: PathBuf,
    /// `LD_LIBRARY_PATH` that the compiler and its LLVM need beside the system's; may be empty.
    library_path: String,
    version: String,
    llvm: Llvm,
}

/// Where a compiler comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// rustup's nightly with rust-src.
    Nightly,
    /// Debian's, unpacked below `target/`.
    Unpacked,
    /// Found on this machine.
    Installed,
}

/// The LLVM inside the compiler. The linker must load this very library: bitcode has no stable format.
#[derive(Debug)]
pub(crate) struct Llvm {
    pub(crate) major: u32,
    pub(crate) library: PathBuf,
}

impl Compiler {
    /// The first usable compiler of those that are here.
    pub(crate) fn find(target: &Path) -> Option<Self> {
        nightly().or_else(|| Self::unpacked(&Unpacked::cached(&directory(target), PACKAGES)?).ok()).or_else(installed)
    }

    /// The first usable compiler, Debian's if there is none.
    pub(crate) fn find_or_get(target: &Path) -> Result<Self> {
        if let Some(found) = Self::find(target) {
            return Ok(found);
        }
        if !debian::is_available() {
            bail!(
                "no compiler for eBPF here, and no apt to get Debian's. Install rustup's nightly with its sources \
                 (`rustup toolchain install nightly --component rust-src`), or build without eBPF (`--no-ebpf`): \
                 the kernel view then comes from sock_diag"
            );
        }
        let directory = directory(target);
        say(format_args!(
            "no compiler for eBPF here (neither rustup's nightly with rust-src nor a rustc with `core` for {TARGET}): \
             getting Debian's packages {}, about 120 MB, unpacked below {} and not installed",
            PACKAGES.join(" "),
            directory.display()
        ));
        let unpacked = Unpacked::get(&directory, PACKAGES, With::Missing).context(
            "cannot get Debian's compiler for eBPF; `rustup toolchain install nightly --component rust-src` gives \
             another one, and `--no-ebpf` builds without",
        )?;
        Self::unpacked(&unpacked)
    }

    /// Cargo driving this compiler for the eBPF workspace: the project's own, but nightly's for nightly, as the way to
    /// compile `core` changes between releases.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = match self.origin {
            Origin::Nightly => command::program(self.rustc.with_file_name("cargo")),
            Origin::Unpacked | Origin::Installed => command::cargo(),
        };
        command::without_compiler_settings(&mut command)
            .env("RUSTC", &self.rustc)
            // aya-ebpf uses `asm_experimental_arch`.
            .env("RUSTC_BOOTSTRAP", "1")
            // An empty wrapper overrides one from the user's configuration: a cache may mix up the two compilers.
            .env("RUSTC_WRAPPER", "");
        if self.origin == Origin::Nightly {
            command.env("CARGO_UNSTABLE_BUILD_STD", "core");
        }
        command
    }

    pub(crate) fn llvm(&self) -> &Llvm {
        &self.llvm
    }

    pub(crate) fn library_path(&self) -> &str {
        &self.library_path
    }

    /// A clippy of exactly this version, and where it is.
    pub(crate) fn clippy_driver(&self) -> Result<PathBuf> {
        let driver = self.rustc.with_file_name("clippy-driver");
        command::output(Command::new(&driver).arg("--version")).context("no clippy beside the eBPF compiler")?;
        Ok(driver)
    }

    fn unpacked(unpacked: &Unpacked) -> Result<Self> {
        let (root, library_path) = (unpacked.root(), unpacked.library_path());
        let wrappers = root.with_file_name("bin");
        for tool in ["rustc", "clippy-driver"] {
            workspace::write_wrapper(&wrappers.join(tool), &root.join("usr/bin").join(tool), &library_path)?;
        }
        Self::inspect(Origin::Unpacked, wrappers.join("rustc"), library_path)
    }

    /// Asks a compiler what it is. Fails if it has no `core` for BPF, or an LLVM that no linker can use.
    fn inspect(origin: Origin, rustc: PathBuf, library_path: String) -> Result<Self> {
        let sysroot = PathBuf::from(command::output(rustc_command(&rustc).args(["--print", "sysroot"]))?.trim_end());
        let core = match origin {
            Origin::Nightly => sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists(),
            Origin::Unpacked | Origin::Installed => has_compiled_core(&sysroot),
        };
        if !core {
            bail!("{} has no `core` for {TARGET}", rustc.display());
        }
        let verbose = command::output(rustc_command(&rustc).arg("-vV"))?;
        let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let major = field("LLVM version:").and_then(|version| version.split('.').next()?.parse().ok());
        let major: u32 = major.with_context(|| format!("{} -vV names no LLVM", rustc.display()))?;
        linker::release_for(major)?;
        let library = find_llvm(&sysroot, major)?;
        let version = field("release:").unwrap_or_default().to_owned();
        Ok(Self { origin, rustc, library_path, version, llvm: Llvm { major, library } })
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = match self.origin {
            Origin::Nightly => "rustup's nightly",
            Origin::Unpacked => "Debian's, unpacked",
            Origin::Installed => "installed",
        };
        write!(f, "rustc {} ({origin}, LLVM {})", self.version, self.llvm.major)
    }
}

fn directory(target: &Path) -> PathBuf {
    target.join("ebpf-toolchain")
}

fn rustc_command(rustc: &Path) -> Command {
    let mut command = command::program(rustc);
    command::without_compiler_settings(&mut command);
    command
}

/// A nightly of rustup's that has rust-src. Only toolchains that are listed are asked: rustup installs others on demand.
fn nightly() -> Option<Compiler> {
    let toolchains = command::output(Command::new("rustup").args(["toolchain", "list"])).ok()?;
    let names = toolchains.lines().filter_map(|line| line.split_whitespace().next());
    names.filter(|name| name.starts_with("nightly")).find_map(|toolchain| {
        let mut which = Command::new("rustup");
        let rustc = command::output(which.args(["which", "--toolchain", toolchain, "rustc"])).ok()?;
        Compiler::inspect(Origin::Nightly, PathBuf::from(rustc.trim_end()), String::new()).ok()
    })
}

/// A `rustc` in `PATH` or beside it that has a compiled `core`: Debian's installed, or a private build.
fn installed() -> Option<Compiler> {
    let path = std::env::var_os("PATH")?;
    let directories = std::env::split_paths(&path).chain([PathBuf::from("/usr/bin")]);
    directories
        .map(|directory| directory.join("rustc"))
        .filter(|rustc| rustc.exists())
        .find_map(|rustc| Compiler::inspect(Origin::Installed, rustc, String::new()).ok())
}

fn has_compiled_core(sysroot: &Path) -> bool {
    let directory = sysroot.join("lib/rustlib").join(TARGET).join("lib");
    let Ok(entries) = fs::read_dir(directory) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

/// The shared LLVM library of the compiler with this `sysroot`.
fn find_llvm(sysroot: &Path, major: u32) -> Result<PathBuf> {
    let directories = [sysroot.join("lib"), sysroot.join(format!("lib/{}-linux-gnu", std::env::consts::ARCH))];
    for directory in &directories {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        for entry in entries.flatten() {
            // rustup has a linker script of a similar name beside the library.
            let (name, path) = (entry.file_name(), entry.path());
            if is_llvm(&name.to_string_lossy(), major) && is_elf(&path) {
                return fs::canonicalize(&path).with_context(|| path.display().to_string());
            }
        }
    }
    bail!("no shared library of LLVM {major} in {} or {}", directories[0].display(), directories[1].display())
}

/// `libLLVM-22.so`, `libLLVM.so.22.1`, `libLLVM.so.22.1-rust-1.95.0-stable`, `libLLVM-22-rust-1.95.0-stable.so`.
fn is_llvm(name: &str, major: u32) -> bool {
    let version = name.strip_prefix("libLLVM-").or_else(|| name.strip_prefix("libLLVM.so."));
    let digits = version.and_then(|version| version.split(|c: char| !c.is_ascii_digit()).next());
    digits.and_then(|digits| digits.parse().ok()) == Some(major)
}

fn is_elf(path: &Path) -> bool {
    use std::io::Read as _;
    let mut magic = [0; 4];
    fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_is_told_by_its_name() {
        for name in ["libLLVM-22.so", "libLLVM.so.22.1", "libLLVM.so.22.1-rust-1.95.0-stable", "libLLVM-22-rust-1.so"] {
            assert!(is_llvm(name, 22), "{name}");
            assert!(!is_llvm(name, 2), "{name}");
        }
        for name in ["libLLVM-14.so.1", "libLLVM-14.0.6.so", "libLLVMSupport.a", "libLLVM.so", "libLTO.so.22"] {
            assert!(!is_llvm(name, 22), "{name}");
        }
    }
}

//! `bpf-linker`: the linker of the BPF target, which is LLVM's own code generator behind a command line.
//!
//! It reads the compiler's bitcode, so it must use an LLVM of the same major version. Releases up to 0.10 can load the
//! compiler's own LLVM at run time and need no other; that is the kind used here.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::compiler::Compiler;
use crate::command::{self, say};
use crate::workspace;

/// A bpf-linker that matches a compiler.
#[derive(Debug)]
pub(crate) struct Linker {
    release: &'static str,
    llvm_major: u32,
    path: PathBuf,
}

impl Linker {
    /// The linker for `compiler`, if it has been built before.
    pub(crate) fn cached(target: &Path, compiler: &Compiler) -> Option<Self> {
        let linker = Self::for_compiler(target, compiler).ok()?;
        linker.binary().exists().then_some(linker)
    }

    /// The linker for `compiler`, built if it is missing.
    pub(crate) fn get(target: &Path, compiler: &Compiler) -> Result<Self> {
        let linker = Self::for_compiler(target, compiler)?;
        if !linker.binary().exists() {
            linker.install(target)?;
        }
        linker.write_wrapper(compiler)?;
        Ok(linker)
    }

    /// What to give to the compiler as its linker.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn for_compiler(target: &Path, compiler: &Compiler) -> Result<Self> {
        let llvm_major = compiler.llvm().major;
        let release = release_for(llvm_major)?;
        let directory = target.join("bpf-linker").join(format!("{release}-llvm-{llvm_major}"));
        Ok(Self { release, llvm_major, path: directory.join("bpf-linker") })
    }

    /// What cargo installs. It appears there complete or not at all, so it is its own stamp.
    fn binary(&self) -> PathBuf {
        self.path.with_file_name("bin").join("bpf-linker")
    }

    fn install(&self, target: &Path) -> Result<()> {
        say(format_args!("building {self}, the linker of the BPF target, below {}", self.directory().display()));
        let build = target.join("bpf-linker").join("build");
        let mut cargo = command::cargo();
        // Without optimisation it is built in less than half the time; the work is done by LLVM, which is ready-made.
        command::without_compiler_settings(&mut cargo)
            .args(["install", "--locked", "--debug", "bpf-linker", "--version", self.release])
            .args(["--no-default-features", "--features", &format!("rust-llvm-{}", self.llvm_major)])
            .args(["--no-track", "--root"])
            .arg(self.directory())
            .arg("--target-dir")
            .arg(&build)
            .env("CARGO_PROFILE_DEV_DEBUG", "false")
            // Away from our own workspace, whose configuration is not meant for it.
            .current_dir("/");
        command::run(&mut cargo).context("cannot build bpf-linker")?;
        fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))
    }

    /// The linker loads the first `libLLVM*` on its library path, whatever its version: so that has one only.
    fn write_wrapper(&self, compiler: &Compiler) -> Result<()> {
        let libraries = self.path.with_file_name("lib");
        let link = libraries.join("libLLVM.so");
        let library = &compiler.llvm().library;
        if fs::read_link(&link).ok().as_ref() != Some(library) {
            fs::create_dir_all(&libraries).with_context(|| format!("cannot create {}", libraries.display()))?;
            if link.is_symlink() {
                fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
            }
            symlink(library, &link).with_context(|| format!("cannot create {}", link.display()))?;
        }
        // Behind it, what that library itself needs.
        let beside = library.parent().unwrap_or(&libraries);
        let library_path = format!("{}:{}:{}", libraries.display(), beside.display(), compiler.library_path());
        workspace::write_wrapper(&self.path, &self.binary(), library_path.trim_end_matches(':'))
    }

    fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }
}

impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bpf-linker {} (LLVM {})", self.release, self.llvm_major)
    }
}

/// The newest release of bpf-linker that can load a compiler's LLVM of this major version.
pub(super) fn release_for(llvm_major: u32) -> Result<&'static str> {
    match llvm_major {
        19 => Ok("0.9.15"),
        20..=22 => Ok("0.10.3"),
        _ => bail!("no release of bpf-linker is known that loads a compiler's LLVM {llvm_major}"),
    }
}

//! Takes the eBPF object into the program.
//!
//! The object is built apart, for another target by another compiler (by xtask), and named by
//! `COUNTERFOIL_EBPF_OBJECT`. Without it the program is built without eBPF, and says so when it runs.

#![expect(clippy::disallowed_methods, reason = "a build script is steered by its environment")]

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

const VARIABLE: &str = "COUNTERFOIL_EBPF_OBJECT";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed={VARIABLE}");
    println!("cargo:rustc-check-cfg=cfg(ebpf_object)");
    let Some(object) = env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from) else {
        return Ok(());
    };
    println!("cargo:rerun-if-changed={}", object.display());
    let out = env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    fs::copy(&object, Path::new(&out).join("counterfoil-ebpf.o"))
        .map_err(|error| format!("{VARIABLE}={}: {error}", object.display()))?;
    println!("cargo:rustc-cfg=ebpf_object");
    Ok(())
}

//! `cargo xtask kernels`: Debian's kernels, each booted in an emulated machine that runs the tests of the kernel view.
//!
//! Nothing is installed and nothing needs root: kernels are unpacked below `target/`, the machine is QEMU's (without
//! KVM), and its whole file system is an archive in memory made of the programs that cargo has built.

mod archive;
mod guest;
mod image;
mod machine;

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use self::guest::{Programs, Suite, Transcript};
use self::image::Image;
use crate::command::say;
use crate::tools::Root;
use crate::{ebpf, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Which kernels; all if none is named
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(KERNELS.map(|kernel| kernel.name)))]
    names: Vec<String>,
    /// Ask Debian for newer packages than those that are here
    #[arg(long)]
    update: bool,
}

/// One kernel of the matrix.
struct Kernel {
    name: &'static str,
    /// Lines of apt's sources.list after the keyring: archive, suite, components.
    sources: &'static [&'static str],
    /// QEMU's processor. What TCG of QEMU 7.2 claims to have is more than some kernels get along with.
    processor: &'static str,
    suites: &'static [Suite],
}

const KERNELS: [Kernel; 4] = [
    Kernel {
        name: "5.10",
        sources: &[
            "http://deb.debian.org/debian bullseye main",
            "http://deb.debian.org/debian-security bullseye-security main",
        ],
        processor: "max",
        suites: guest::FALLBACK,
    },
    Kernel {
        name: "6.1",
        sources: &[
            "http://deb.debian.org/debian bookworm main",
            "http://deb.debian.org/debian-security bookworm-security main",
        ],
        processor: "max",
        suites: guest::EBPF,
    },
    Kernel {
        name: "6.12",
        sources: &[
            "http://deb.debian.org/debian trixie main",
            "http://deb.debian.org/debian-security trixie-security main",
        ],
        // With CMPXCHG16B its slab allocator uses a form of it that this emulation gets wrong: it panics while booting.
        processor: "max,-cx16",
        suites: guest::EBPF,
    },
    Kernel {
        name: "newest",
        sources: &["http://deb.debian.org/debian sid main"],
        // Without CMPXCHG16B its allocator for eBPF refuses: no tag can be stored.
        processor: "max",
        suites: guest::EBPF,
    },
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let names: Vec<&str> = arguments.names.iter().map(String::as_str).collect();
    boot(&names, arguments.update)
}

/// Boots the kernels with these names, all if there are none, and fails if any expected test fails in any of them.
pub(crate) fn boot(names: &[&str], update: bool) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the emulated machine runs this machine's programs, and is an x86-64 one");
    }
    let wanted = KERNELS.iter().filter(|kernel| names.is_empty() || names.contains(&kernel.name));
    let target = workspace::target()?;
    let directory = target.join("kernels");
    let root = Root::get(&target)?;
    let programs = Programs::build(&ebpf::object()?, &root, &directory.join("programs"))?;
    let mut failed = Vec::new();
    for kernel in wanted {
        let start = Instant::now();
        let outcome = try_kernel(kernel, &directory.join(kernel.name), update, &root, &programs);
        let took = start.elapsed().as_secs();
        match outcome {
            Ok((release, tests)) => {
                say(format_args!("{}: {tests} tests passed on Linux {release}, {took} s", kernel.name))
            }
            Err(error) => {
                say(format_args!("{}: FAILED after {took} s: {error:#}", kernel.name));
                failed.push(kernel.name);
            }
        }
    }
    if !failed.is_empty() {
        bail!("not all tests passed on: {}", failed.join(", "));
    }
    Ok(())
}

/// The kernel's release and how many tests passed on it.
fn try_kernel(
    kernel: &Kernel,
    directory: &Path,
    update: bool,
    root: &Root,
    programs: &Programs,
) -> Result<(String, usize)> {
    let image = Image::get(directory, kernel, update, root)?;
    say(format_args!("{}: booting {}", kernel.name, image.package));
    let initrd = directory.join("initrd");
    let archive = guest::file_system(kernel.suites, programs, &image, root)?;
    fs::write(&initrd, archive).with_context(|| format!("cannot write {}", initrd.display()))?;
    let mut transcript = Transcript::default();
    machine::run(root, kernel.processor, &image.vmlinuz, &initrd, |line| {
        if let Some(line) = transcript.read(line) {
            println!("{:>6} | {line}", kernel.name);
        }
    })?;
    transcript.verdict(kernel.suites)
}

//! `cargo xtask kernels`: Debian's kernels, each booted in an emulated machine that runs the tests of the kernel view.
//!
//! Nothing is installed and nothing needs root: kernels are unpacked below `target/`, the machine is QEMU's (without
//! KVM), and its whole file system is an archive in memory made of the programs that cargo has built.

mod archive;
mod guest;
mod image;
mod machine;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use self::guest::{Programs, Suite, Transcript};
use self::image::Image;
use crate::command::say;
use crate::{ebpf, tools, workspace};

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

/// What an emulated machine needs on this one.
const TOOLS: &str = "\
qemu-system-x86   the emulated machine
busybox-static    its shell, and what mounts and powers off in it
xz-utils          newer kernels' modules are compressed
binutils          strip: programs without their debugging information";

/// Where they are unpacked if they are not installed, below `target/`.
const FOLDER: &str = "kernel-tools";

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
    let host = Host::get(&target)?;
    let programs = Programs::build(&ebpf::object()?, &host, &directory.join("programs"))?;
    let mut failed = Vec::new();
    for kernel in wanted {
        let start = Instant::now();
        let outcome = try_kernel(kernel, &directory.join(kernel.name), update, &host, &programs);
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
    host: &Host,
    programs: &Programs,
) -> Result<(String, usize)> {
    let image = Image::get(directory, kernel, update, host)?;
    say(format_args!("{}: booting {}", kernel.name, image.package));
    let initrd = directory.join("initrd");
    let archive = guest::file_system(kernel.suites, programs, &image, host)?;
    fs::write(&initrd, archive).with_context(|| format!("cannot write {}", initrd.display()))?;
    let mut transcript = Transcript::default();
    machine::run(host, kernel.processor, &image.vmlinuz, &initrd, |line| {
        if let Some(line) = transcript.read(line) {
            println!("{:>6} | {line}", kernel.name);
        }
    })?;
    transcript.verdict(kernel.suites)
}

/// Programs of this machine that the emulated one is made and run with.
struct Host {
    target: PathBuf,
    path: OsString,
    /// A static one: it goes into the guest as it is.
    busybox: PathBuf,
}

impl Host {
    fn get(target: &Path) -> Result<Self> {
        let path = tools::search_path_for(target, FOLDER, TOOLS, "an emulated machine needs")?;
        let directory = target.join(FOLDER);
        let places = [directory.join("root/bin"), directory.join("root/usr/bin"), "/bin".into(), "/usr/bin".into()];
        let busybox = places.iter().map(|place| place.join("busybox")).find(|path| path.is_file());
        Ok(Self {
            target: target.to_owned(),
            path,
            busybox: busybox.context("busybox-static is here, but not its program")?,
        })
    }

    /// A program that is found where [`TOOLS`] are.
    fn program(&self, name: &str) -> std::process::Command {
        // `env` searches the new PATH; our own would be searched otherwise.
        let mut command = crate::command::program("env");
        command.env("PATH", &self.path).arg(name);
        command
    }
}

//! `cargo xtask doctor`: what is here, what is missing, what the kernel allows.

mod kernel;

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::command;
use crate::ebpf::{self, Compiler, Linker};
use crate::tools::{self, Root};
use crate::{debian, privilege, workspace};

/// One line of the report.
pub(crate) enum Line {
    /// Here, and good.
    Good(String),
    /// Missing, but xtask gets it, or it only narrows what can be done.
    Note(String),
    /// Missing and needed; what to do.
    Bad(String),
}

/// Prints the report on stdout.
pub(crate) fn run() -> ExitCode {
    let mut good = true;
    for (title, lines) in report() {
        println!("{title}");
        for line in lines {
            good &= !matches!(line, Line::Bad(_));
            match line {
                Line::Good(text) => println!("  ok       {text}"),
                Line::Note(text) => println!("  note     {text}"),
                Line::Bad(text) => println!("  MISSING  {text}"),
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn report() -> Vec<(&'static str, Vec<Line>)> {
    let mut report = vec![("build", vec![rust(), host_linker()])];
    match workspace::target() {
        Ok(target) => {
            report.push(("eBPF toolchain", toolchain(&target)));
            report.push(("tests", test_tools(&target)));
            report.push(("kernel", kernel::report(&target)));
        }
        Err(error) => report.push(("cargo", vec![Line::Bad(format!("{error:#}"))])),
    }
    report.push(("this process", process()));
    report
}

fn rust() -> Line {
    match command::output(command::cargo().arg("--version")) {
        Ok(version) => Line::Good(format!("{} (1.95 or later is needed, and Cargo checks it)", version.trim())),
        Err(error) => Line::Bad(format!("cargo: {error:#}; see https://rustup.rs")),
    }
}

fn host_linker() -> Line {
    match command::output(Command::new("cc").arg("-dumpversion")) {
        Ok(version) => Line::Good(format!("cc {}, Rust's linker on this host", version.trim())),
        Err(_) => Line::Bad("cc: Rust links with it; `apt-get install gcc libc6-dev`".to_owned()),
    }
}

fn toolchain(target: &Path) -> Vec<Line> {
    let mut lines = Vec::new();
    match Compiler::find(target) {
        Some(compiler) => {
            lines.push(Line::Good(format!("compiler: {compiler}")));
            lines.push(match Linker::cached(target, &compiler) {
                Some(linker) => Line::Good(format!("linker: {linker}, the compiler's LLVM")),
                None => Line::Note("linker: bpf-linker will be built by the next command that needs it".to_owned()),
            });
        }
        None if debian::is_available() => lines.push(Line::Note(
            "no compiler for eBPF yet: the next command that needs one unpacks Debian's below target/".to_owned(),
        )),
        None => lines.push(Line::Bad(
            "no compiler for eBPF, and no apt to get Debian's: `rustup toolchain install nightly --component rust-src`, \
             or `--no-ebpf`"
                .to_owned(),
        )),
    }
    let object = ebpf::built_object(target);
    lines.push(match fs::metadata(&object) {
        Ok(metadata) => Line::Good(format!("object: {}, {} bytes", object.display(), metadata.len())),
        Err(_) => Line::Note("object: not built yet".to_owned()),
    });
    lines
}

fn test_tools(target: &Path) -> Vec<Line> {
    let packages = tools::packages().join(" ");
    vec![if Root::cached(target).is_some() {
        Line::Good(format!("unpacked below target/, with all that they depend on: {packages}"))
    } else if debian::is_available() {
        Line::Note(format!("not here yet, `cargo xtask test` unpacks them below target/: {packages}"))
    } else {
        Line::Bad(format!("the tests need these packages of Debian's, and there is no apt: {packages}"))
    }]
}

fn process() -> Vec<Line> {
    let mut lines = Vec::new();
    match privilege::effective_capabilities() {
        Ok(held) => {
            for (bit, name, without) in privilege::CAPABILITIES {
                lines.push(if held >> bit & 1 == 1 {
                    Line::Good((*name).to_owned())
                } else {
                    Line::Note(format!("no {name}: {without}. Root has it"))
                });
            }
        }
        Err(error) => lines.push(Line::Note(format!("capabilities: {error:#}"))),
    }
    let show = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let (soft, hard) = privilege::descriptor_limit();
    let text = format!("RLIMIT_NOFILE: {} (hard limit {})", show(soft), show(hard));
    lines.push(if hard.is_none_or(|hard| hard >= 16384) {
        Line::Good(text)
    } else {
        Line::Note(format!("{text}: the tests open about 10,000 descriptors; `ulimit -Hn 20000`"))
    });
    lines
}

//! The project's own commands: `cargo xtask COMMAND`. One file per command.

mod audit;
mod bench;
mod build_and_run;
mod command;
mod debian;
mod doctor;
mod ebpf;
mod fuzz;
mod kernels;
mod lint;
mod privilege;
mod soak;
mod test;
mod tidy;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own commands", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the eBPF object and the program in release mode, getting the tools that are missing, and run it
    BuildAndRun(build_and_run::Arguments),
    /// Say what is here, what is missing and what the kernel allows; exit code 1 if something needed is missing
    Doctor,
    /// Check format, conventions and lints: user space and the eBPF program, each with its own compiler
    Lint(lint::Arguments),
    /// Get the programs that tests and benchmarks run: a Debian of their own, unpacked below target/. `test` does it, too
    Tools,
    /// Run all tests, unit and end-to-end, with real BPF; gets the servers they run against
    Test(test::Arguments),
    /// Run what takes too long for CI, in parts: tests marked `#[ignore = "soak"]`, the fuzz targets, kernels
    Soak(soak::Arguments),
    /// Run the fuzz targets under libFuzzer, or one of them on one input
    Fuzz(fuzz::Arguments),
    /// Boot Debian's kernels in emulated machines, and run the tests of the kernel view and the drills in each
    Kernels(kernels::Arguments),
    /// Check licences, sources and duplicates of all dependencies with cargo-deny
    Audit(audit::Arguments),
    /// Measure throughput, latency and cost beside other programs
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::BuildAndRun(arguments) => build_and_run::run(&arguments),
        Command::Doctor => return doctor::run(),
        Command::Lint(arguments) => lint::run(&arguments),
        Command::Tools => workspace::target().and_then(|target| tools::Root::get(&target).map(drop)),
        Command::Test(arguments) => test::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Kernels(arguments) => kernels::run(&arguments),
        Command::Audit(arguments) => audit::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

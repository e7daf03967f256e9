//! `cargo xtask fuzz`: the targets of `proxy/fuzz` under libFuzzer.
//!
//! libFuzzer needs no nightly compiler: instrumenting for coverage is `-C passes`, which is stable; only the sanitizers
//! of memory are not, and the code has `unsafe` in one file alone. Its own source is C++, in the crate `libfuzzer-sys`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::command::{self, say};
use crate::workspace;

/// What `cargo fuzz` passes, too; `cfg(fuzzing)` makes the library show what the targets call.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares";

/// How long `soak` gives each target.
const SOAK: Duration = Duration::from_secs(60);

/// One input may take this long, seconds. The machine may be busy.
const INPUT_TIMEOUT: u32 = 20;

/// Targets at once, at most: as many as the smallest machine has cores.
const AT_ONCE: usize = 2;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only this target
    target: Option<String>,
    /// Run this input once instead of looking for others, such as one that a run has left
    #[arg(requires = "target")]
    input: Option<PathBuf>,
    /// How long to run each target
    #[arg(long, default_value_t = SOAK.as_secs(), value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let built = Built::new()?;
    let targets = match &arguments.target {
        Some(target) if !built.targets.contains(target) => {
            bail!("no fuzz target {target:?}; there are {}", built.targets.join(", "))
        }
        Some(target) => vec![target.clone()],
        None => built.targets.clone(),
    };
    match (&arguments.input, targets.first()) {
        (Some(input), Some(target)) => command::run(built.program(target).arg(input)),
        _ => built.run(&targets, Duration::from_secs(arguments.seconds)),
    }
}

/// All targets, for as long as `soak` gives them.
pub(crate) fn soak() -> Result<()> {
    let built = Built::new()?;
    built.run(&built.targets, SOAK)
}

/// The instrumented targets.
struct Built {
    targets: Vec<String>,
    /// Below Cargo's target directory.
    directory: PathBuf,
}

impl Built {
    fn new() -> Result<Self> {
        let directory = workspace::target()?.join("fuzz");
        // With a target named, the flags are not for build scripts.
        let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let manifest = workspace::root().join("proxy/fuzz/Cargo.toml");
        let mut cargo = command::cargo();
        command::without_compiler_settings(&mut cargo)
            .env("RUSTFLAGS", FLAGS)
            .args(["build", "--locked", "--release", "--bins", "--target", &host, "--manifest-path"])
            .arg(manifest)
            .arg("--target-dir")
            .arg(&directory);
        command::run(&mut cargo)
            .context("building the fuzz targets takes a C++ compiler (Debian's package g++), too")?;
        let mut targets = Vec::new();
        let sources = workspace::root().join("proxy/fuzz/fuzz_targets");
        for entry in fs::read_dir(&sources).with_context(|| sources.display().to_string())? {
            targets.extend(entry?.path().file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
        targets.sort();
        Ok(Self { targets, directory: directory.join(host).join("release") })
    }

    fn program(&self, target: &str) -> Command {
        command::program(self.directory.join(target))
    }

    /// Runs the targets, some at once, each on a thread that waits for it. Those that failed are all named.
    fn run(&self, targets: &[String], time: Duration) -> Result<()> {
        let mut failed = Vec::new();
        for some in targets.chunks(AT_ONCE) {
            let mut running = Vec::new();
            for target in some {
                running.push(Running::start(self, target, time)?);
            }
            for running in running {
                failed.extend(running.finish()?);
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        bail!("{}", failed.join("\n"))
    }
}

/// A target that looks for inputs.
struct Running {
    target: String,
    child: Child,
    log: PathBuf,
    artifacts: PathBuf,
}

impl Running {
    fn start(built: &Built, target: &str, time: Duration) -> Result<Self> {
        let place = |kind: &str| -> Result<PathBuf> {
            let directory = built.directory.join(kind).join(target);
            fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
            Ok(directory)
        };
        let (corpus, artifacts) = (place("corpus")?, place("artifacts")?);
        let log = artifacts.with_extension("log");
        let output = fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let seeds = workspace::root().join("proxy/fuzz/corpus").join(target);
        say(format_args!("fuzz target {target}: {} s, log {}", time.as_secs(), log.display()));
        let child = built
            .program(target)
            .arg(format!("-max_total_time={}", time.as_secs()))
            .arg(format!("-timeout={INPUT_TIMEOUT}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .args(["-print_final_stats=1", "-rss_limit_mb=2048"])
            // What is found goes to the first folder and is there for the next run; the seeds stay as they are.
            .args([&corpus, &seeds])
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("a second handle of the log")?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start fuzz target {target}"))?;
        Ok(Self { target: target.to_owned(), child, log, artifacts })
    }

    /// What was found, if anything: where the input is, and how to run it again.
    fn finish(mut self) -> Result<Option<String>> {
        let status = self.child.wait().with_context(|| format!("waiting for fuzz target {}", self.target))?;
        let log = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        if status.success() {
            say(format_args!("fuzz target {}: {}", self.target, summary(&log)));
            return Ok(None);
        }
        let tail: Vec<&str> = log.lines().rev().take(40).collect();
        for line in tail.iter().rev() {
            eprintln!("{line}");
        }
        Ok(Some(failure(&self.target, &log, &self.artifacts, &self.log)))
    }
}

/// The end of a log that ended well.
fn summary(log: &str) -> String {
    let stat = |name: &str| log.lines().rev().find_map(|line| line.strip_prefix(name)).map_or("?", str::trim);
    let coverage = log.lines().rev().find_map(|line| line.split("cov: ").nth(1)?.split_whitespace().next());
    format!(
        "{} inputs, {} new ones kept, {} places of the code reached",
        stat("stat::number_of_executed_units:"),
        stat("stat::new_units_added:"),
        coverage.unwrap_or("?")
    )
}

fn failure(target: &str, log: &str, artifacts: &Path, path: &Path) -> String {
    match log.lines().find_map(|line| line.split("Test unit written to ").nth(1)) {
        Some(input) => format!(
            "fuzz target {target} fails. Its input is {input}; again: `cargo xtask fuzz {target} {input}`. Once mended, \
             keep the input in proxy/fuzz/corpus/{target}/: the tests replay it"
        ),
        None => {
            format!("fuzz target {target} fails without an input in {}: see {}", artifacts.display(), path.display())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_how_to_see_it_again() {
        let log = "thread panicked\nartifact_prefix='/t/a/'; Test unit written to /t/a/crash-1\nBase64: AA==\n";
        let said = failure("frame", log, Path::new("/t/a"), Path::new("/t/a.log"));
        assert!(said.contains("`cargo xtask fuzz frame /t/a/crash-1`"), "{said}");
        assert!(failure("frame", "killed", Path::new("/t/a"), Path::new("/t/a.log")).contains("/t/a.log"));
    }

    #[test]
    fn the_summary_counts() {
        let log = "#1\tINITED cov: 5 ft: 6\n#9\tDONE   cov: 12 ft: 30 corp: 4/9b\nstat::number_of_executed_units: 9\n\
                   stat::new_units_added:          3\n";
        assert_eq!(summary(log), "9 inputs, 3 new ones kept, 12 places of the code reached");
    }
}

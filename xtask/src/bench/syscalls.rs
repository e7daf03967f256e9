//! System calls of a process, counted by perf from outside.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::process::{Process, TempDir};
use crate::command;

/// A count that is under way.
pub(super) struct Counter {
    perf: Process,
    output: PathBuf,
}

impl Counter {
    /// Starts to count the system calls of all threads of `process`.
    pub(super) fn start(process: &Process, directory: &TempDir) -> Result<Self> {
        let output = directory.path().join("perf.csv");
        let mut command = command::program("perf");
        command.args(["stat", "--field-separator=,", "--event=raw_syscalls:sys_enter", "--output"]).arg(&output);
        let mut perf = Process::start("perf", command.args(["--pid", &process.id().to_string()]), directory.path())
            .context("--syscalls needs perf; Debian has it in the package linux-perf")?;
        let descriptors = PathBuf::from(format!("/proc/{}/fd", perf.id()));
        perf.wait_for("it had attached", |_| has_events(&descriptors).then_some(()))?;
        Ok(Self { perf, output })
    }

    /// Ends the count.
    pub(super) fn finish(mut self) -> Result<u64> {
        self.perf.interrupt()?;
        let output = fs::read_to_string(&self.output).with_context(|| self.output.display().to_string())?;
        count(&output).with_context(|| format!("perf said {output:?}"))
    }
}

fn has_events(descriptors: &Path) -> bool {
    let Ok(entries) = fs::read_dir(descriptors) else { return false };
    entries
        .flatten()
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == Path::new("anon_inode:[perf_event]")))
}

fn count(output: &str) -> Option<u64> {
    output.lines().find(|line| line.contains("raw_syscalls:sys_enter"))?.split(',').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_first_field() {
        let output = "# started on Sun Nov 22 12:30:55 2026\n\n89047,,raw_syscalls:sys_enter,401012329,100.00,,\n";
        assert_eq!(count(output), Some(89047));
        assert_eq!(count("<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n"), None);
    }
}

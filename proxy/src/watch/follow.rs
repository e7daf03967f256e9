//! The kernel view with an eye on the processes themselves: which there are, that one has ended or come back, and how
//! many descriptors they have left.
//!
//! It is read on the watchdog's thread, which alone has the privileges to look into other processes.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use super::watched::{Descriptors, Processes, Watched};
use crate::clock::{self, Mono};
use crate::kernel::{Crosscheck, Destroyed, KernelSnapshot, KernelSocket, KernelView, Process, Source, ViewError};

/// Descriptors are not counted more often.
const COUNTED_FOR: Duration = Duration::from_secs(1);

/// The view, and what was last seen of the processes.
pub(super) struct Followed {
    view: Box<dyn KernelView>,
    processes: BTreeSet<Process>,
    /// Ended, and nobody has taken their place yet.
    vacant: u64,
    seen: Processes,
    counted: Option<Mono>,
    watched: Arc<Watched>,
}

impl Followed {
    pub(super) fn new(view: Box<dyn KernelView>, watched: Arc<Watched>) -> Self {
        let (processes, seen) = (BTreeSet::new(), Processes::default());
        Self { view, processes, vacant: 0, seen, counted: None, watched }
    }

    fn follow(&mut self, now: &[Process]) {
        let now: BTreeSet<Process> = now.iter().copied().collect();
        let changed = now != self.processes;
        for ended in self.processes.difference(&now) {
            tracing::warn!(pid = ended.pid, "a watched process has ended");
            self.vacant += 1;
        }
        for begun in now.difference(&self.processes) {
            let restart = self.vacant > 0;
            if restart {
                self.vacant -= 1;
                self.seen.restarts += 1;
            }
            tracing::info!(pid = begun.pid, restart, "watching");
        }
        if changed && now.is_empty() {
            tracing::warn!("there is no process to watch");
        }
        self.processes = now;
        let time = clock::now();
        if changed || self.counted.is_none_or(|at| time.since(at) >= COUNTED_FOR) {
            self.counted = Some(time);
            self.seen.count = self.processes.len();
            let each = self.processes.iter().filter_map(|process| descriptors(process.pid));
            self.seen.descriptors = each.max_by(|one, other| one.utilization().total_cmp(&other.utilization()));
            self.watched.set_processes(self.seen);
        }
    }
}

impl KernelView for Followed {
    fn source(&self) -> Source {
        self.view.source()
    }

    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
        let snapshot = self.view.snapshot()?;
        self.follow(&snapshot.processes);
        Ok(snapshot)
    }

    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
        self.view.crosscheck()
    }

    fn destroy(&mut self, socket: &KernelSocket) -> Result<Destroyed, ViewError> {
        self.view.destroy(socket)
    }
}

/// Of one process; none if it has ended or may not be looked at.
fn descriptors(pid: u32) -> Option<Descriptors> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64;
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    Some(Descriptors { open, limit: soft_limit(&limits)? })
}

/// `Max open files            1024                 4096                 files`
fn soft_limit(limits: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_ascii_whitespace().next()? {
        "unlimited" => Some(f64::INFINITY),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::fs::File;

    use super::*;

    struct Nothing;

    impl KernelView for Nothing {
        fn source(&self) -> Source {
            Source::None
        }

        fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
            Err(ViewError::Off)
        }

        fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
            Err(ViewError::Off)
        }
    }

    #[test]
    fn a_restart_is_a_process_in_the_place_of_another() {
        let watched = Arc::new(Watched::default());
        let mut followed = Followed::new(Box::new(Nothing), Arc::clone(&watched));
        // No process has such an id.
        let process = |started| Process { pid: u32::MAX, started };
        let mut see = |now: &[Process]| {
            followed.follow(now);
            let seen = watched.processes();
            (seen.count, seen.restarts)
        };
        assert_eq!(see(&[]), (0, 0), "not there yet");
        assert_eq!(see(&[process(1), process(2)]), (2, 0), "the first ones are no restarts");
        assert_eq!(see(&[process(1), process(2), process(3)]), (3, 0), "nor is one more");
        assert_eq!(see(&[process(2), process(3), process(4)]), (3, 1), "between two sweeps");
        assert_eq!(see(&[process(4)]), (1, 1));
        assert_eq!(see(&[]), (0, 1));
        assert_eq!(see(&[process(5)]), (1, 2), "after a while");
    }

    #[test]
    fn descriptors_are_counted_and_limits_read() {
        let pid = std::process::id();
        let _open = File::open("/dev/null").unwrap();
        let descriptors = descriptors(pid).unwrap();
        assert!(descriptors.open >= 4, "{descriptors:?}");
        assert!(descriptors.utilization() < 1.0, "{descriptors:?}");
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024      4096      files\n";
        assert_eq!(soft_limit(limits), Some(1024.0));
        assert_eq!(soft_limit(&limits.replace("1024", "unlimited")), Some(f64::INFINITY));
        assert_eq!(soft_limit("Max processes  1 1 processes\n"), None);
        assert!(super::descriptors(u32::MAX).is_none());
    }
}

//! What the watch knows of the processes: written by the watchdog's thread and the reader of metrics, read by scrapes.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The state of a watch beside its report on sockets.
#[derive(Debug, Default)]
pub struct Watched {
    processes: Mutex<Processes>,
    /// None: no metric of theirs is read.
    userspace: Mutex<Option<Userspace>>,
}

/// The processes at the last sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Processes {
    /// How many there are.
    pub count: usize,
    /// How many have taken the place of one that ended.
    pub restarts: u64,
    /// Of the process that is nearest to its limit; none: no process, or not readable.
    pub descriptors: Option<Descriptors>,
}

/// A process's descriptors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Descriptors {
    /// Open now.
    pub open: u64,
    /// Its soft limit (RLIMIT_NOFILE), infinite without one.
    pub limit: f64,
}

impl Descriptors {
    /// From 0 to 1.
    pub(super) fn utilization(&self) -> f64 {
        self.open as f64 / self.limit
    }
}

/// The other half of the count, as the watched process tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Userspace {
    /// The last value; none: it could not be read.
    pub value: Option<f64>,
    /// How often it could not be read.
    pub failures: u64,
}

impl Watched {
    /// With a metric that is read.
    pub(super) fn with_userspace() -> Self {
        Self { userspace: Mutex::new(Some(Userspace::default())), ..Self::default() }
    }

    /// The processes at the last sweep.
    pub fn processes(&self) -> Processes {
        *lock(&self.processes)
    }

    /// The metric as it was last read; none: there is none to read.
    pub fn userspace(&self) -> Option<Userspace> {
        *lock(&self.userspace)
    }

    pub(super) fn set_processes(&self, processes: Processes) {
        *lock(&self.processes) = processes;
    }

    /// None: it could not be read.
    pub(super) fn set_userspace(&self, value: Option<f64>) {
        let mut userspace = lock(&self.userspace);
        let failures = userspace.map_or(0, |userspace| userspace.failures) + u64::from(value.is_none());
        *userspace = Some(Userspace { value, failures });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values: a panic elsewhere leaves nothing half-written.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

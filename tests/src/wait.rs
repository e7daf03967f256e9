//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);

/// Looks at `condition` until it yields a value; `None` once `deadline` has passed.
pub fn poll<T>(deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(POLL);
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// With `what` if it does not hold within `deadline`.
#[track_caller]
pub fn until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let held = poll(deadline, || condition().then_some(()));
    assert!(held.is_some(), "not within {deadline:?}: {what}");
}

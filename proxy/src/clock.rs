//! The one clock: nanoseconds of `CLOCK_MONOTONIC`, the same scale as the kernel's `bpf_ktime_get_ns`.
//!
//! State machines take a [`Mono`] and never ask for the time themselves (I13). The tasks around them read it here, once
//! per wake-up. It follows tokio's clock, so a test that pauses tokio's time pauses this one as well.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::Instant;

/// A point in time: nanoseconds of `CLOCK_MONOTONIC`. Zero means "never".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mono(pub u64);

impl Mono {
    /// "Never": before every other point in time.
    pub const ZERO: Self = Self(0);
    /// Later than every other point in time.
    pub const MAX: Self = Self(u64::MAX);

    /// The time between an earlier point and this one, zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This point moved into the future; saturates.
    pub const fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

/// A duration as nanoseconds, saturating at 584 years.
pub const fn nanos(duration: Duration) -> u64 {
    let nanos = duration.as_nanos();
    if nanos > u64::MAX as u128 { u64::MAX } else { nanos as u64 }
}

struct Base {
    instant: Instant,
    mono: u64,
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        // CLOCK_MONOTONIC starts at boot: neither field can be negative.
        let mono = now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs();
        Base { instant: Instant::now(), mono }
    })
}

/// The present.
pub fn now() -> Mono {
    let base = base();
    Mono(base.mono.saturating_add(nanos(Instant::now().saturating_duration_since(base.instant))))
}

/// The same point on tokio's clock, for its timers.
pub fn instant(at: Mono) -> Instant {
    let base = base();
    let ahead = Duration::from_nanos(at.0.saturating_sub(base.mono));
    // A century is as good as never, and does not overflow tokio's timer.
    base.instant + ahead.min(Duration::from_secs(3600 * 24 * 365 * 100))
}

/// Wall clock time, seconds since 1970: for people and for Prometheus, never for decisions.
pub fn unix_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn follows_a_paused_clock() {
        let before = now();
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(now().since(before), Duration::from_secs(7));
        assert_eq!(instant(now()), Instant::now());
    }
}

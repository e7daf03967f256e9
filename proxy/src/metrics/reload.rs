//! The configuration: whether it could be taken when it was read last, and since when it is in force.

use std::fmt;
use std::sync::atomic::Ordering;

use super::encode::Families;
use crate::watchdog::Observed;

pub(super) fn encode(observed: &Observed, families: &mut Families<'_>) -> fmt::Result {
    let reloads = &observed.reloads;
    families.counter(
        "config_reloads",
        "Times that a new configuration was taken",
        reloads.successes.load(Ordering::Relaxed),
    )?;
    families.counter(
        "config_reload_failures",
        "Times that a new configuration was refused, and nothing was changed",
        reloads.failures.load(Ordering::Relaxed),
    )?;
    families.gauge(
        "config_last_reload_successful",
        "0 if the last new configuration was refused",
        f64::from(u8::from(!reloads.refused.load(Ordering::Relaxed))),
    )?;
    families.gauge(
        "config_last_success_timestamp_seconds",
        "When the configuration in force was taken",
        reloads.taken.load(Ordering::Relaxed) as f64,
    )
}

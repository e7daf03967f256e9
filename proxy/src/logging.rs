//! The log: its filter, its two formats, and a limit on lines that repeat.
//!
//! A line that the same place in the code writes too often is held back, so that a storm fills no disk; how many there
//! were is told in a line of its own. One client or backend has a tenth of that, so that none hides what is said of the
//! others. What an operator asks for with `debug` or `trace` is never held back, nor are
//! reapings: their number has a limit of its own, and each must be accounted for.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use clap::ValueEnum;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::clock::{self, Mono};
use crate::config::network::masked;
use crate::stderr::{self, Stderr};

/// Lines that one place in the code may write at once.
const BURST: u32 = 100;
/// And then one each time this has passed.
const PACE: Duration = Duration::from_millis(100);
/// Of which one client (IPv6: its network), or one backend, may cause so many.
const SHARE: u32 = BURST / 10;
/// And then one each time this has passed.
const SHARE_PACE: Duration = Duration::from_secs(1);
/// How often to ask for [`tell_held_back`].
pub const LOOK: Duration = Duration::from_secs(1);
/// Never held back.
const EXEMPT: &str = "counterfoil::watchdog::reaper";

/// How lines are written.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One object per line.
    Json,
}

/// The filter of the configuration, which a reload may change.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();
/// What was held back.
static LIMITER: Limiter = Limiter::new();

/// Starts the log of the process, on standard error. `ordered` is the filter of the command line, `configured` that of the
/// configuration, which counts without the other and can be changed then.
///
/// # Errors
/// The filter cannot be read.
pub fn start(ordered: Option<&str>, configured: &str, format: Format) -> Result<(), ParseError> {
    let (filter, handle) = reload::Layer::new(EnvFilter::try_new(ordered.unwrap_or(configured))?);
    let lines = fmt::layer().with_writer(|| Stderr).with_ansi(std::io::stderr().is_terminal());
    let lines = match format {
        Format::Text => lines.boxed(),
        Format::Json => lines.json().boxed(),
    };
    // Nothing else in the program installs a subscriber, so this can't fail.
    let _ = tracing_subscriber::registry().with(filter).with(&LIMITER).with(lines).try_init();
    if ordered.is_none() {
        let _ = FILTER.set(handle);
    }
    Ok(())
}

/// Another filter from now on.
///
/// # Errors
/// It cannot be read, or is not the one that counts.
pub fn set_filter(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
    let handle = FILTER.get().ok_or("the filter of the command line (`--log`) goes before it")?;
    handle.reload(filter).map_err(|error| error.to_string())
}

/// Tells of the lines that were held back and of which no more come, or that have been held back for long, and of those that
/// were lost.
pub fn tell_held_back() {
    for (metadata, lines) in LIMITER.held_back(clock::now()) {
        let place = format!("{}:{}", metadata.target(), metadata.line().unwrap_or_default());
        tracing::warn!(place, lines, level = metadata.level().as_str(), "log lines held back");
    }
    if let Some(lines) = stderr::lost() {
        tracing::warn!(lines, "log lines lost: standard error did not take them");
    }
}

/// Limits the lines of each place in the code.
#[derive(Debug)]
struct Limiter(OnceLock<Mutex<HashMap<Identifier, Site>>>);

#[derive(Debug)]
struct Site {
    metadata: &'static Metadata<'static>,
    /// When the place has its whole burst again.
    full: Mono,
    held_back: u64,
    /// When that was told last, or began.
    told: Mono,
    /// When each of those who caused lines has its whole share again. Only written lines count, so there are not many.
    shares: HashMap<u64, Mono>,
}

/// Who caused a line: the client in its field `peer`, or the backend in `backend`.
#[derive(Debug, Default)]
struct Cause(Option<u64>);

impl Cause {
    fn of(event: &Event<'_>) -> Option<u64> {
        let mut cause = Self::default();
        event.record(&mut cause);
        cause.0
    }
}

impl Visit for Cause {
    fn record_str(&mut self, field: &Field, value: &str) {
        if !matches!(field.name(), "peer" | "backend") {
            return;
        }
        let mut hasher = DefaultHasher::new();
        match value.parse().map(|address: SocketAddr| masked(address.ip().to_canonical(), MASK_V4, MASK_V6)) {
            Ok(network) => network.hash(&mut hasher),
            Err(_) => value.hash(&mut hasher),
        }
        self.0 = Some(hasher.finish());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if matches!(field.name(), "peer" | "backend") {
            self.record_str(field, &format!("{value:?}"));
        }
    }
}

/// What counts as one client here, whatever the listeners say: bits of its address.
const MASK_V4: u8 = 32;
const MASK_V6: u8 = 56;

/// Between two lines about what is held back at one place.
const TELL: Duration = Duration::from_secs(5);

impl Limiter {
    const fn new() -> Self {
        Self(OnceLock::new())
    }

    fn sites(&self) -> std::sync::MutexGuard<'_, HashMap<Identifier, Site>> {
        self.0.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the line that this one caused may be written.
    fn passes(&self, metadata: &'static Metadata<'static>, cause: Option<u64>, now: Mono) -> bool {
        let mut sites = self.sites();
        let vacant = || Site { metadata, full: now, held_back: 0, told: now, shares: HashMap::new() };
        let site = sites.entry(metadata.callsite()).or_insert_with(vacant);
        let full = site.full.max(now);
        let share = cause.and_then(|cause| site.shares.get(&cause)).copied().unwrap_or(now).max(now);
        if full.since(now) > PACE * (BURST - 1) || share.since(now) > SHARE_PACE * (SHARE - 1) {
            if site.held_back == 0 {
                site.told = now;
            }
            site.held_back += 1;
            return false;
        }
        site.full = full.after(PACE);
        if let Some(cause) = cause {
            if site.shares.len() >= BURST as usize {
                site.shares.retain(|_, full| *full > now);
            }
            site.shares.insert(cause, share.after(SHARE_PACE));
        }
        true
    }

    /// What is to be told now.
    fn held_back(&self, now: Mono) -> Vec<(&'static Metadata<'static>, u64)> {
        let mut sites = self.sites();
        let due = sites.values_mut().filter(|site| site.held_back > 0 && now.since(site.told) >= TELL);
        due.map(|site| {
            site.told = now;
            (site.metadata, std::mem::take(&mut site.held_back))
        })
        .collect()
    }
}

impl<S: Subscriber> Layer<S> for &'static Limiter {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        let is_limited = *metadata.level() <= Level::INFO && metadata.target() != EXEMPT;
        !is_limited || self.passes(metadata, Cause::of(event), clock::now())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts what gets through.
    struct Count(&'static AtomicUsize);

    impl<S: Subscriber> Layer<S> for Count {
        fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn storm(lines: usize) {
        for _ in 0..lines {
            tracing::warn!("the same line");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_storm_is_held_back_and_counted_and_others_go_on() {
        static LIMITER: Limiter = Limiter::new();
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let written = || WRITTEN.swap(0, Ordering::Relaxed);
        let _guard = tracing_subscriber::registry().with(&LIMITER).with(Count(&WRITTEN)).set_default();
        storm(1000);
        assert_eq!(written(), BURST as usize);
        tracing::warn!("another line");
        assert_eq!(written(), 1, "each place has its own limit");
        for _ in 0..1000 {
            tracing::debug!("asked for");
            tracing::warn!(target: "counterfoil::watchdog::reaper", "reaped");
        }
        assert_eq!(written(), 2000, "these are never held back");
        assert!(LIMITER.held_back(clock::now()).is_empty(), "not yet");
        tokio::time::advance(TELL).await;
        let told = LIMITER.held_back(clock::now());
        assert_eq!(
            told.iter().map(|(metadata, lines)| (metadata.target(), *lines)).collect::<Vec<_>>(),
            [(module_path!(), 1000 - u64::from(BURST))]
        );
        assert!(LIMITER.held_back(clock::now()).is_empty(), "told once");
        storm(1000);
        assert_eq!(written() as u128, TELL.as_nanos() / PACE.as_nanos(), "one for each time that has passed");
    }

    /// One client's lines leave room for those of others, which leave it for the backends'.
    #[tokio::test(start_paused = true)]
    async fn nobody_has_more_than_a_share_of_a_place() {
        static LIMITER: Limiter = Limiter::new();
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let written = || WRITTEN.swap(0, Ordering::Relaxed);
        let _guard = tracing_subscriber::registry().with(&LIMITER).with(Count(&WRITTEN)).set_default();
        let refused = |peer: &str| tracing::warn!(peer, "refused");
        let trouble = |backend: &str| tracing::warn!(backend, "trouble");
        for port in 0..1000 {
            refused(&format!("192.0.2.1:{port}"));
            refused(&format!("[2001:db8:0:12::{port:x}]:53"));
            trouble("one");
        }
        assert_eq!(written(), 3 * SHARE as usize, "by address or network, and by name");
        refused("192.0.2.2:1");
        refused("[2001:db8:0:112::1]:53");
        trouble("two");
        assert_eq!(written(), 3);
        tokio::time::advance(SHARE_PACE).await;
        (0..9).for_each(|_| refused("192.0.2.1:1"));
        assert_eq!(written(), 1);
        // Those of many together are bounded as before, and so is what is known of them.
        for (high, low) in (0..100).flat_map(|high| (0..100).map(move |low| (high, low))) {
            refused(&format!("198.18.{high}.{low}:53"));
        }
        assert!(written() <= BURST as usize);
        let most = LIMITER.sites().values().map(|site| site.shares.len()).max();
        assert!(most <= Some(2 * BURST as usize), "{most:?}");
        for second in 0..60 {
            tokio::time::advance(Duration::from_secs(1)).await;
            (0..100).for_each(|low| refused(&format!("198.19.{second}.{low}:53")));
        }
        let most = LIMITER.sites().values().map(|site| site.shares.len()).max();
        assert!(most <= Some(2 * BURST as usize), "{most:?}");
    }

    #[test]
    fn only_the_configured_filter_can_be_changed() {
        assert!(set_filter("counterfoil=nonsense").is_err_and(|error| !error.contains("--log")));
        assert!(set_filter("info").is_err_and(|error| error.contains("--log")));
    }
}

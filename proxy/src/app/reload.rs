//! Reading the configuration again: all of it is checked before any of it counts, and then all of it counts, or nothing.
//!
//! Files are read on a thread of their own, with a limit: whatever file system they are on, the main thread goes on to hear
//! signals and to tell that it is alive.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::order::Reloaded;
use crate::clock;
use crate::config::check::{self, warnings};
use crate::config::choices::Choice as _;
use crate::config::error::Problem;
use crate::config::{Config, ConfigErrors, Listener, Numbered, Numbers, Place, ReapMode, Text};
use crate::control::Control;
use crate::drill;
use crate::file;
use crate::kernel::Source;
use crate::ledger::BackendIndex;
use crate::logging;
use crate::stats::{BackendStats, PoolStats, WorkerStats};
use crate::tls::server::ServerTls;
use crate::watchdog::{Handle, Live, Observed, Policy};

/// For the configuration and the files that it names to be read and checked.
const READING: Duration = Duration::from_secs(10);

/// For the workers to take a configuration: one that takes longer hangs, and takes it when it goes on.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who changes the configuration of the running process.
#[derive(Debug)]
pub(super) struct Reloader {
    /// Where the configuration comes from; none: it is the demo's.
    file: Option<PathBuf>,
    live: Live,
    watchdog: Handle,
    tls: Arc<ServerTls>,
    /// The watchdog has CAP_NET_ADMIN, as the reaper was to act when the process started.
    may_sever: bool,
    /// The watchdog's thresholds, and from when on they count: connections of before are measured by the old ones, too.
    stricter: Option<(Instant, Arc<Policy>)>,
    stage: Stage,
    /// Who has yet to take the configuration: each sends once, or drops its end.
    taken: Option<mpsc::UnboundedReceiver<()>>,
}

/// How far a reload is.
#[derive(Debug, Default)]
enum Stage {
    /// None is under way.
    #[default]
    Idle,
    /// A thread reads the files.
    Reading { outcome: oneshot::Receiver<Checked>, deadline: Instant },
    /// It did not come to an end in time, and the reload was refused.
    Hanging { outcome: oneshot::Receiver<Checked> },
    /// The configuration is in force, and so many threads have not taken it yet.
    Taking { missing: usize, deadline: Instant, notes: Vec<String> },
}

/// A configuration that can be taken, with the numbers of its names; or all that is wrong with it.
type Checked = Result<(Config, Numbers), Vec<String>>;

impl Reloader {
    pub(super) fn new(
        file: Option<PathBuf>,
        live: Live,
        watchdog: Handle,
        tls: Arc<ServerTls>,
        may_sever: bool,
    ) -> Self {
        Self { file, live, watchdog, tls, may_sever, stricter: None, stage: Stage::Idle, taken: None }
    }

    /// Begins a reload; [`over`](Self::over) tells what came of it.
    ///
    /// # Errors
    /// The one before still reads its files.
    pub(super) fn begin(&mut self) -> Result<(), Vec<String>> {
        if let Stage::Hanging { outcome } = &mut self.stage
            && matches!(outcome.try_recv(), Err(oneshot::error::TryRecvError::Empty))
        {
            let outcome = Err(vec![hangs()]);
            self.tell(&outcome);
            return outcome.map(drop);
        }
        let (answer, outcome) = oneshot::channel();
        let (file, before) = (self.file.clone(), self.live.now());
        // Nobody waits for one that takes too long.
        let read = move || drop(answer.send(check(file.as_deref(), &before)));
        // Where no thread can be started the answer is gone, which says so.
        drop(std::thread::Builder::new().name("reload".to_owned()).spawn(read));
        self.stage = Stage::Reading { outcome, deadline: Instant::now() + READING };
        Ok(())
    }

    /// Whether one is under way, of which [`over`](Self::over) will tell.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.stage, Stage::Reading { .. } | Stage::Taking { .. })
    }

    /// When a reload is over, what came of it: what the operator should know, or everything that is wrong with the
    /// configuration, each with its place, and nothing was changed. Nothing is lost if this is dropped and called again.
    pub(super) async fn over(&mut self) -> Reloaded {
        let outcome = loop {
            match &mut self.stage {
                Stage::Idle | Stage::Hanging { .. } => std::future::pending().await,
                Stage::Reading { outcome, deadline } => match timeout_at(*deadline, outcome).await {
                    Ok(Ok(Ok((config, numbers)))) => self.stage = self.apply(config, numbers),
                    Ok(Ok(Err(errors))) => break Err(errors),
                    Ok(Err(_)) => break Err(vec!["no thread can be started to read the configuration".to_owned()]),
                    Err(_) => {
                        if let Stage::Reading { outcome, .. } = std::mem::take(&mut self.stage) {
                            self.stage = Stage::Hanging { outcome };
                        }
                        break Err(vec![hangs()]);
                    }
                },
                Stage::Taking { missing, deadline, notes } => {
                    if let Some(taken) = &mut self.taken
                        && let Ok(Some(())) = timeout_at(*deadline, taken.recv()).await
                    {
                        *missing -= 1;
                        continue;
                    }
                    // All have answered, or those who have not take too long.
                    if *missing > 0 {
                        notes.push(format!("{missing} threads hang: they take the configuration when they go on"));
                    }
                    break Ok(std::mem::take(notes));
                }
            }
        };
        if !matches!(self.stage, Stage::Hanging { .. }) {
            self.stage = Stage::Idle;
        }
        self.tell(&outcome);
        outcome
    }

    fn tell(&self, outcome: &Reloaded) {
        let reloads = self.live.now().reloads;
        reloads.refused.store(outcome.is_err(), Ordering::Relaxed);
        match outcome {
            Ok(notes) => {
                reloads.successes.fetch_add(1, Ordering::Relaxed);
                reloads.taken.store(clock::unix_seconds() as u64, Ordering::Relaxed);
                notes.iter().for_each(|note| tracing::warn!(note, "configuration"));
                tracing::info!("reloaded");
            }
            Err(errors) => {
                reloads.failures.fetch_add(1, Ordering::Relaxed);
                errors.iter().for_each(|error| tracing::error!(error, "configuration refused, nothing is changed"));
            }
        }
    }

    /// From counters and limits to those who use them, so that nobody meets a number that is not there yet.
    fn apply(&mut self, config: Config, numbers: Numbers) -> Stage {
        let before = self.live.now();
        let mut notes: Vec<String> =
            warnings(&config, check::Limits::read()).iter().map(|warning| warning.to_string()).collect();
        if !self.may_sever && self.watchdog.report().source == Source::Ebpf {
            notes.extend(cannot_sever(before.config.watchdog.reap, config.watchdog.reap));
        }
        if config.server.log != before.config.server.log
            && let Err(error) = logging::set_filter(&config.server.log)
        {
            notes.push(format!("key `server.log`: {error}"));
        }
        let slots = config.connections.max_total + drill::AT_ONCE;
        before.ledger.grow(slots, numbers.backends());
        for stats in before.stats.iter() {
            stats.pools.grow(numbers.pool_count());
            stats.backends.grow(numbers.backends());
        }
        numbers.taken_since(&before.numbers).into_iter().for_each(|number| begin_anew(&before, number));
        let caps = before.ledger.caps();
        for backend in config.pools.iter().flat_map(|pool| &pool.backends) {
            if let Some(number) = numbers.backend(&backend.name) {
                caps.set_backend(number, backend.max_connections);
                caps.place(number, backend.address);
            }
        }
        caps.set_total(config.connections.max_total);
        before.clients.adopt(&config);
        if let Err(fault) = self.tls.adopt(&config) {
            // All that can be wrong with the files was found when they were read.
            notes.push(format!("TLS towards clients is as it was: {fault}"));
        }

        let policy = Arc::new(before.policy.next(&config, &numbers));
        let patient = Arc::new(policy.as_patient_as(&before.policy));
        let settled = Instant::now() + before.policy.longest() + before.policy.grace;
        self.stricter = Some((settled, policy));
        let (config, numbers) = (Arc::new(config), Arc::new(numbers));
        before.health.adopt(&before.config, &config, &numbers);
        self.publish(Observed {
            config: Arc::clone(&config),
            numbers: Arc::clone(&numbers),
            policy: patient,
            ..before.clone()
        });

        let (done, taken) = mpsc::unbounded_channel();
        // The workers, and who has the shard after theirs: the health checks.
        let owners = config.server.workers + 1;
        for owner in 0..owners {
            let (config, numbers, done) = (Arc::clone(&config), Arc::clone(&numbers), done.clone());
            before.controls.send(owner, Control::Reconfigure { config, numbers, done });
        }
        drop(done);
        self.taken = Some(taken);
        Stage::Taking { missing: owners, deadline: Instant::now() + PATIENCE, notes }
    }

    /// Everybody goes by the configuration in force, those too that hung when it came.
    fn all_have_taken(&mut self) -> bool {
        let Some(taken) = &mut self.taken else { return true };
        while taken.try_recv().is_ok() {}
        taken.is_closed() && taken.is_empty()
    }

    /// Forgets the names that have had their time and where nothing is under way any more. Called once a second or so.
    pub(super) fn forget(&mut self) {
        if self.is_under_way() {
            // What it counts with must not change, and it waits itself for those who have yet to take it.
            return;
        }
        let before = self.live.now();
        let mut due = before.numbers.due(clock::now());
        if due.is_empty() || !self.all_have_taken() {
            return;
        }
        let used = Used::now(&before);
        due.retain(|number| !used.has(*number));
        if due.is_empty() {
            return;
        }
        let numbers = Arc::new(before.numbers.without(due));
        let policy = Arc::new(Policy::clone(&before.policy).without_vacant(&numbers));
        if let Some((_, stricter)) = &mut self.stricter {
            *stricter = Arc::new(Policy::clone(stricter).without_vacant(&numbers));
        }
        self.publish(Observed { numbers, policy, ..before });
    }

    fn publish(&self, observed: Observed) {
        self.watchdog.adopt(observed.subject());
        self.live.put(observed);
    }

    /// When no connection of before can be there any more that is healthy.
    pub(super) fn settled(&self) -> impl Future<Output = ()> + use<> {
        let at = self.stricter.as_ref().map(|(at, _)| *at);
        async move {
            match at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }

    /// From now on the new thresholds count for all connections.
    pub(super) fn settle(&mut self) {
        if let Some((_, policy)) = self.stricter.take() {
            self.publish(Observed { policy, ..self.live.now() });
        }
    }
}

/// What is under way, by number.
struct Used<'a> {
    observed: &'a Observed,
    backends: HashSet<BackendIndex>,
}

impl<'a> Used<'a> {
    fn now(observed: &'a Observed) -> Self {
        let ledger = observed.ledger.snapshot(clock::now());
        let rows = ledger.rows.iter().map(|row| row.backend);
        // The kernel may have the socket of a connection that is closed.
        let backends = rows.chain(ledger.tombstones.iter().map(|grave| grave.backend)).collect();
        Self { observed, backends }
    }

    fn has(&self, number: Numbered) -> bool {
        match number {
            Numbered::Pool(pool) => {
                let under_way =
                    |stats: &Arc<WorkerStats>| stats.pools.get(usize::from(pool)).map(|it| it.under_way.get());
                self.observed.stats.iter().filter_map(under_way).any(|count| count > 0)
            }
            Numbered::Backend(backend) => {
                let places = self.observed.ledger.caps().backend(backend).map_or(0, |(_, used)| used);
                places > 0 || self.backends.contains(&backend)
            }
        }
    }
}

/// A vacant number goes to another name: nothing that was counted under it is that one's.
fn begin_anew(observed: &Observed, number: Numbered) {
    match number {
        Numbered::Pool(pool) => {
            observed.stats.iter().filter_map(|it| it.pools.get(usize::from(pool))).for_each(PoolStats::reset);
        }
        Numbered::Backend(backend) => {
            observed.stats.iter().filter_map(|it| it.backends.get(usize::from(backend))).for_each(BackendStats::reset);
            observed.ledger.reset_totals(backend);
            observed.health.reset(backend);
        }
    }
}

/// Reads the configuration again. Everything in it counts, or nothing.
fn check(file: Option<&Path>, before: &Observed) -> Checked {
    let Some(file) = file else {
        return Err(vec!["there is no file to read again: the process runs the demo's configuration".to_owned()]);
    };
    let lines = |errors: ConfigErrors| errors.iter().map(ToString::to_string).collect::<Vec<_>>();
    let text = Text::read(file).map_err(lines)?;
    let mut config = text.parse().map_err(lines)?;
    text.refuse(needs_restart(&before.config, &config)).map_err(lines)?;
    config.keep_sessions_of(&before.config);
    // Listeners are numbered as at the start; they are the same ones.
    let places: HashMap<_, _> = before.config.listeners.iter().map(|it| it.name.as_str()).zip(0..).collect();
    config.listeners.sort_by_key(|listener| places.get(listener.name.as_str()).copied().unwrap_or(usize::MAX));
    // While this goes on nothing is forgotten.
    let numbers = before.numbers.with(&config, clock::now());
    let numbers = numbers.map_err(|error| vec![format!("{}: {error}", file.display())])?;
    Ok((config, numbers))
}

/// What is said of files that cannot be read in time.
fn hangs() -> String {
    let file = file::under_way().map_or_else(|| "a file".to_owned(), |file| file.display().to_string());
    format!(
        "{file} could not be read within {} s, so nothing is changed: its file system hangs, or this host has too much to do",
        READING.as_secs()
    )
}

/// What cannot be changed while the process runs: sockets that only a start can bind (it gives up its privileges then),
/// threads, and the kernel view.
fn needs_restart<'a>(old: &'a Config, new: &'a Config) -> Vec<(Place, Problem)> {
    let mut found = Vec::new();
    let mut changed = |place: Place, old: &dyn Display, new: &dyn Display| {
        let (from, to) = (old.to_string(), new.to_string());
        if from != to {
            found.push((place, Problem::TakesRestart { from, to }));
        }
    };
    let key = |table, key| Place::Key { table, key };
    changed(key("server", "workers"), &old.server.workers, &new.server.workers);
    changed(key("kernel", "view"), &old.kernel.view.word(), &new.kernel.view.word());
    changed(key("kernel", "max_sockets"), &old.kernel.max_sockets, &new.kernel.max_sockets);
    let off = || "off".to_owned();
    let http = |config: &Config| config.admin.http.map_or_else(off, |address| address.to_string());
    changed(key("admin", "http"), &http(old), &http(new));
    let socket = |config: &Config| config.admin.socket.as_ref().map_or_else(off, |path| path.display().to_string());
    changed(key("admin", "socket"), &socket(old), &socket(new));
    let token = |config: &Config| config.admin.token_file.as_ref().map_or_else(off, |path| path.display().to_string());
    changed(key("admin", "token_file"), &token(old), &token(new));
    let by_name = |config: &'a Config| -> HashMap<&'a str, &'a Listener> {
        config.listeners.iter().map(|listener| (listener.name.as_str(), listener)).collect()
    };
    let (before, after) = (by_name(old), by_name(new));
    for (index, listener) in new.listeners.iter().enumerate() {
        match before.get(listener.name.as_str()) {
            None => {
                let place = Place::Listener { index, key: "name" };
                found.push((place, Problem::ListenerIsNew(listener.name.clone())));
            }
            Some(old) if old.address != listener.address => {
                let (from, to) = (old.address.to_string(), listener.address.to_string());
                found.push((Place::Listener { index, key: "address" }, Problem::TakesRestart { from, to }));
            }
            Some(old) if old.tcp_fast_open != listener.tcp_fast_open => {
                let (from, to) = (old.tcp_fast_open.to_string(), listener.tcp_fast_open.to_string());
                found.push((Place::Listener { index, key: "tcp_fast_open" }, Problem::TakesRestart { from, to }));
            }
            Some(_) => {}
        }
    }
    let gone = old.listeners.iter().filter(|old| !after.contains_key(old.name.as_str()));
    found.extend(gone.map(|old| (Place::Listeners, Problem::ListenerIsGone(old.name.clone()))));
    found
}

/// The reaper may act from now on, but the capability for its last step was given up at the start.
fn cannot_sever(before: ReapMode, now: ReapMode) -> Option<String> {
    (before != ReapMode::On && now == ReapMode::On).then(|| {
        "key `watchdog.reap`: the reaper closes what a worker owns from now on; to sever orphans it needs CAP_NET_ADMIN, \
         which was given up at the start: that takes a restart"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::View;
    use crate::watchdog::fixture;

    #[test]
    fn what_takes_a_restart_is_named_with_both_values() {
        let old = fixture::config(ReapMode::Off, None);
        assert!(needs_restart(&old, &old).is_empty());
        let mut new = old.clone();
        new.server.workers += 1;
        new.admin.http = None;
        new.kernel.max_sockets += 1;
        new.kernel.view = View::Ebpf;
        let change = |from: &str, to: &str| Problem::TakesRestart { from: from.to_owned(), to: to.to_owned() };
        let key = |table, key| Place::Key { table, key };
        assert_eq!(
            needs_restart(&old, &new),
            [
                (key("server", "workers"), change("1", "2")),
                (key("kernel", "view"), change("sock-diag", "ebpf")),
                (key("kernel", "max_sockets"), change("1000", "1001")),
                (key("admin", "http"), change("127.0.0.1:0", "off")),
            ]
        );

        let mut new = old.clone();
        new.listeners[0].name = "other".to_owned();
        let gone = old.listeners[0].name.clone();
        assert_eq!(
            needs_restart(&old, &new),
            [
                (Place::Listener { index: 0, key: "name" }, Problem::ListenerIsNew("other".to_owned())),
                (Place::Listeners, Problem::ListenerIsGone(gone)),
            ]
        );
        let mut new = old.clone();
        new.listeners[0].address.set_port(54);
        let place = Place::Listener { index: 0, key: "address" };
        assert_eq!(needs_restart(&old, &new), [(place, change("127.0.0.1:0", "127.0.0.1:54"))]);
        let mut new = old.clone();
        new.listeners[0].tcp_fast_open = 7;
        let place = Place::Listener { index: 0, key: "tcp_fast_open" };
        assert_eq!(needs_restart(&old, &new), [(place, change("0", "7"))]);
    }

    #[test]
    fn what_can_be_changed_takes_none() {
        let old = fixture::config(ReapMode::Off, None);
        let mut new = old.clone();
        new.server.max_connections += 1;
        new.server.drain_timeout *= 2;
        new.listeners[0].max_in_flight += 1;
        new.listeners[0].edns_tcp_keepalive = true;
        new.pools[0].backends[0].name = "another".to_owned();
        new.connections.max_total += 1000;
        new.watchdog.reap = ReapMode::On;
        assert_eq!(needs_restart(&old, &new), []);
    }
}

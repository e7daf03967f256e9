//! Reading the configuration again: all of it is checked before any of it counts, and then all of it counts, or nothing.

use std::collections::HashSet;
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::order::Reloaded;
use crate::clock;
use crate::config::check::{self, warnings};
use crate::config::choices::Choice as _;
use crate::config::error::Problem;
use crate::config::{Config, ConfigErrors, Numbered, Numbers, Place, ReapMode, Text};
use crate::control::Control;
use crate::drill;
use crate::kernel::Source;
use crate::ledger::BackendIndex;
use crate::logging;
use crate::stats::{BackendStats, PoolStats, WorkerStats};
use crate::tls::server::ServerTls;
use crate::watchdog::{Handle, Live, Observed, Policy};

/// For the workers to take a configuration: one that takes longer hangs, and takes it when it goes on.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who changes the configuration of the running process.
#[derive(Debug)]
pub(super) struct Reloader {
    /// Where the configuration comes from; none: it is the demo's.
    pub(super) file: Option<PathBuf>,
    pub(super) live: Live,
    pub(super) watchdog: Handle,
    pub(super) tls: Arc<ServerTls>,
    /// The watchdog has CAP_NET_ADMIN, as the reaper was to act when the process started.
    pub(super) may_sever: bool,
    /// The watchdog's thresholds, and from when on they count: connections of before are measured by the old ones, too.
    pub(super) stricter: Option<(Instant, Arc<Policy>)>,
    /// Who has yet to take the configuration: each sends once, or drops its end.
    pub(super) taken: Option<mpsc::UnboundedReceiver<()>>,
}

impl Reloader {
    /// Reads the file, and changes what can be changed if nothing is wrong. Returns what the operator should know.
    ///
    /// # Errors
    /// Everything that is wrong, each with its place; nothing was changed.
    pub(super) async fn reload(&mut self) -> Reloaded {
        let before = self.live.now();
        let reloads = Arc::clone(&before.reloads);
        let outcome = self.check(&before);
        let outcome = match outcome {
            Ok((config, numbers)) => Ok(self.apply(before, config, numbers).await),
            Err(errors) => Err(errors),
        };
        reloads.refused.store(outcome.is_err(), Ordering::Relaxed);
        match &outcome {
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
        outcome
    }

    fn check(&self, before: &Observed) -> Result<(Config, Numbers), Vec<String>> {
        let Some(file) = &self.file else {
            return Err(vec!["there is no file to read again: the process runs the demo's configuration".to_owned()]);
        };
        let lines = |errors: ConfigErrors| errors.iter().map(ToString::to_string).collect::<Vec<_>>();
        let text = Text::read(file).map_err(lines)?;
        let mut config = text.parse().map_err(lines)?;
        text.refuse(needs_restart(&before.config, &config)).map_err(lines)?;
        config.keep_sessions_of(&before.config);
        // Listeners are numbered as at the start; they are the same ones.
        let place = |name: &str| before.config.listeners.iter().position(|listener| listener.name == name);
        config.listeners.sort_by_key(|listener| place(&listener.name));
        let numbers = before.numbers.with(&config, clock::now());
        let numbers = numbers.map_err(|error| vec![format!("{}: {error}", file.display())])?;
        Ok((config, numbers))
    }

    /// From counters and limits to those who use them, so that nobody meets a number that is not there yet.
    async fn apply(&mut self, before: Observed, config: Config, numbers: Numbers) -> Vec<String> {
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

        let (done, mut taken) = mpsc::unbounded_channel();
        // The workers, and who has the shard after theirs: the health checks.
        let owners = config.server.workers + 1;
        for owner in 0..owners {
            let (config, numbers, done) = (Arc::clone(&config), Arc::clone(&numbers), done.clone());
            before.controls.send(owner, Control::Reconfigure { config, numbers, done });
        }
        drop(done);
        let deadline = Instant::now() + PATIENCE;
        let mut missing = owners;
        while let Ok(Some(())) = timeout_at(deadline, taken.recv()).await {
            missing -= 1;
        }
        self.taken = Some(taken);
        if missing > 0 {
            notes.push(format!("{missing} threads hang: they take the configuration when they go on"));
        }
        notes
    }

    /// Everybody goes by the configuration in force, those too that hung when it came.
    fn all_have_taken(&mut self) -> bool {
        let Some(taken) = &mut self.taken else { return true };
        while taken.try_recv().is_ok() {}
        taken.is_closed() && taken.is_empty()
    }

    /// Forgets the names that have had their time and where nothing is under way any more. Called once a second or so.
    pub(super) fn forget(&mut self) {
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
    pub(super) async fn settled(&self) {
        match &self.stricter {
            Some((at, _)) => sleep_until(*at).await,
            None => std::future::pending().await,
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

/// What cannot be changed while the process runs: sockets that only a start can bind (it gives up its privileges then),
/// threads, and the kernel view.
fn needs_restart(old: &Config, new: &Config) -> Vec<(Place, Problem)> {
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
    for (index, listener) in new.listeners.iter().enumerate() {
        match old.listeners.iter().find(|old| old.name == listener.name) {
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
    let gone = old.listeners.iter().filter(|old| !new.listeners.iter().any(|new| new.name == old.name));
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

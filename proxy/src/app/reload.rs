//! Reading the configuration again: all of it is checked before any of it counts, and then all of it counts, or nothing.

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
use crate::config::{self, Config, Numbers, ReapMode};
use crate::control::Control;
use crate::drill;
use crate::kernel::Source;
use crate::logging;
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
    /// The watchdog's thresholds, and from when on they count: connections of before are measured by the old ones, too.
    pub(super) stricter: Option<(Instant, Arc<Policy>)>,
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
        let mut config =
            config::load(file).map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let errors = needs_restart(&before.config, &config);
        if !errors.is_empty() {
            return Err(errors.into_iter().map(|error| format!("{}: {error}", file.display())).collect());
        }
        // Listeners are numbered as at the start; they are the same ones.
        let place = |name: &str| before.config.listeners.iter().position(|listener| listener.name == name);
        config.listeners.sort_by_key(|listener| place(&listener.name));
        let numbers = before.numbers.with(&config).map_err(|error| vec![format!("{}: {error}", file.display())])?;
        Ok((config, numbers))
    }

    /// From counters and limits to those who use them, so that nobody meets a number that is not there yet.
    async fn apply(&mut self, before: Observed, config: Config, numbers: Numbers) -> Vec<String> {
        let mut notes: Vec<String> =
            warnings(&config, check::Limits::read()).iter().map(|warning| warning.to_string()).collect();
        notes.extend(cannot_sever(&before, &config, self.watchdog.report().source));
        if config.server.log != before.config.server.log
            && let Err(error) = logging::set_filter(&config.server.log)
        {
            notes.push(format!("key `server.log`: {error}"));
        }
        let slots = config.connections.max_total + drill::AT_ONCE;
        before.ledger.grow(slots, numbers.backends());
        for stats in before.stats.iter() {
            stats.pools.grow(numbers.pools().len());
            stats.backends.grow(numbers.backends());
        }
        let caps = before.ledger.caps();
        for backend in config.pools.iter().flat_map(|pool| &pool.backends) {
            if let Some(number) = numbers.backend(&backend.name) {
                caps.set_backend(number, backend.max_connections);
            }
        }
        caps.set_total(config.connections.max_total);
        before.clients.adopt(&config);

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
        if missing > 0 {
            notes.push(format!("{missing} threads hang: they take the configuration when they go on"));
        }
        notes
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

/// What cannot be changed while the process runs: sockets that only a start can bind (it gives up its privileges then),
/// threads, and the kernel view.
fn needs_restart(old: &Config, new: &Config) -> Vec<String> {
    let mut found = Vec::new();
    let mut key = |key: &str, old: &dyn Display, new: &dyn Display| {
        let (old, new) = (old.to_string(), new.to_string());
        if old != new {
            found.push(format!("key `{key}`: a change from {old} to {new} takes a restart; nothing is changed"));
        }
    };
    key("server.workers", &old.server.workers, &new.server.workers);
    key("kernel.view", &format_args!("{:?}", old.kernel.view), &format_args!("{:?}", new.kernel.view));
    key("kernel.max_sockets", &old.kernel.max_sockets, &new.kernel.max_sockets);
    let off = || "off".to_owned();
    let http = |config: &Config| config.admin.http.map_or_else(off, |address| address.to_string());
    key("admin.http", &http(old), &http(new));
    let socket = |config: &Config| config.admin.socket.as_ref().map_or_else(off, |path| path.display().to_string());
    key("admin.socket", &socket(old), &socket(new));
    for listener in &new.listeners {
        match old.listeners.iter().find(|old| old.name == listener.name) {
            None => found.push(format!("listener `{}` is new: it takes a restart; nothing is changed", listener.name)),
            Some(old) if old.address != listener.address => found.push(format!(
                "listener `{}`: a change from {} to {} takes a restart; nothing is changed",
                listener.name, old.address, listener.address
            )),
            Some(_) => {}
        }
    }
    for listener in &old.listeners {
        if !new.listeners.iter().any(|new| new.name == listener.name) {
            found.push(format!("listener `{}` is gone: that takes a restart; nothing is changed", listener.name));
        }
    }
    found
}

/// The reaper may act from now on, but the capability for its last step was given up at the start.
fn cannot_sever(before: &Observed, config: &Config, source: Source) -> Option<String> {
    let began = before.config.watchdog.reap != ReapMode::On && config.watchdog.reap == ReapMode::On;
    (began && source == Source::Ebpf).then(|| {
        "key `watchdog.reap`: the reaper closes what a worker owns from now on; to sever orphans it needs CAP_NET_ADMIN, \
         which was given up at the start: that takes a restart"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watchdog::fixture;

    #[test]
    fn what_takes_a_restart_is_named_with_both_values() {
        let old = fixture::config(ReapMode::Off, None);
        assert!(needs_restart(&old, &old).is_empty());
        let mut new = old.clone();
        new.server.workers += 1;
        new.admin.http = None;
        new.kernel.max_sockets += 1;
        let said = needs_restart(&old, &new);
        assert_eq!(said.len(), 3, "{said:?}");
        assert_eq!(said[0], "key `server.workers`: a change from 1 to 2 takes a restart; nothing is changed");
        assert!(said[2].contains("from 127.0.0.1:0 to off"), "{said:?}");

        let mut new = old.clone();
        new.listeners[0].name = "other".to_owned();
        let said = needs_restart(&old, &new);
        assert!(said[0].starts_with("listener `other` is new") && said[1].contains("is gone"), "{said:?}");
        let mut new = old.clone();
        new.listeners[0].address.set_port(54);
        let said = needs_restart(&old, &new);
        assert!(said[0].contains("from 127.0.0.1:0 to 127.0.0.1:54 takes a restart"), "{said:?}");
    }

    #[test]
    fn what_can_be_changed_takes_none() {
        let old = fixture::config(ReapMode::Off, None);
        let mut new = old.clone();
        new.server.max_connections += 1;
        new.server.drain_timeout *= 2;
        new.listeners[0].max_in_flight += 1;
        new.pools[0].backends[0].name = "another".to_owned();
        new.connections.max_total += 1000;
        new.watchdog.reap = ReapMode::On;
        assert_eq!(needs_restart(&old, &new), Vec::<String>::new());
    }
}

//! Following a leak from its making to its end, step by step.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use super::leak::{Leak, Site};
use crate::clock::{self, Mono};
use crate::config::{Class, ReapMode};
use crate::metrics::Metrics;
use crate::watchdog::reaper::ReapRecord;
use crate::watchdog::{Finding, Handle, HeldBack, Observed, Outcome, Rung};

/// Between two looks at the watchdog's report.
const LOOK: Duration = Duration::from_millis(50);

/// What is added to each expected time before a step has failed.
const MARGIN: Duration = Duration::from_secs(5);

/// The classes that can be drilled.
const DRILLED: [Class; 4] = [Class::Orphan, Class::Ghost, Class::Zombie, Class::Hoard];

/// The drills of this process; one at a time.
#[derive(Debug)]
pub(crate) struct Drill {
    pub(super) observed: Observed,
    pub(super) watchdog: Handle,
    pub(super) metrics: Arc<Metrics>,
    pub(super) site: Site,
    pub(super) busy: Cell<bool>,
}

/// Why a drill did not succeed.
#[derive(Debug)]
enum Failed {
    /// As the operator is told.
    Because(String),
    /// Nobody listens any more.
    ClientGone,
}

struct Course<'a> {
    drill: &'a Drill,
    class: Class,
    started: Mono,
    events: &'a UnboundedSender<Value>,
}

impl Drill {
    /// Runs one drill and sends its events; the last one is `done`.
    pub(crate) async fn run(self: Rc<Self>, class: &str, events: &UnboundedSender<Value>) {
        let done = |ok: bool, message: String| {
            // The client is gone: then nobody needs to know.
            let _ = events.send(json!({"event": "done", "ok": ok, "message": message}));
        };
        let Some(class) = DRILLED.into_iter().find(|drilled| drilled.name() == class) else {
            let names: Vec<_> = DRILLED.iter().map(|class| class.name()).collect();
            return done(false, format!("there is no drill for {class:?}, only {}", names.join(", ")));
        };
        if self.busy.replace(true) {
            return done(false, "another drill is running".to_owned());
        }
        let _busy = Busy(&self.busy);
        let course = Course { drill: &self, class, started: clock::now(), events };
        match course.run().await {
            Ok(message) => done(true, message),
            Err(Failed::Because(message)) => done(false, message),
            Err(Failed::ClientGone) => {
                tracing::info!(class = class.name(), "the drill's client is gone, the leak is ended")
            }
        }
    }
}

/// Ends the exclusion, also when the task is dropped.
struct Busy<'a>(&'a Cell<bool>);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl Course<'_> {
    async fn run(&self) -> Result<String, Failed> {
        let watchdog = &self.drill.observed.config.watchdog;
        self.say(
            "start",
            json!({
                "class": self.class.name(),
                "reap": mode(watchdog.reap),
                "view": self.drill.watchdog.report().source.as_str(),
            }),
        )?;
        tracing::info!(class = self.class.name(), "drill");
        let leak = self.drill.site.leak(self.class).await;
        let leak = leak.map_err(|error| Failed::Because(format!("no leak could be made: {error}")))?;
        self.say(
            "leaked",
            json!({
                "cookie": leak.cookie,
                "local": leak.local.to_string(),
                "remote": self.drill.site.address.to_string(),
                "message": what(self.class),
            }),
        )?;
        self.drill.watchdog.sweep_now();
        let condition = self.wait_for_condition().await?;
        let finding = self.wait_for_finding(&leak, condition).await?;
        self.show_alarm()?;
        let verdict = self.follow_reaping(&leak, &finding).await?;
        if leak.release() {
            self.say("released", json!({"message": "the drill closed what was left of it"}))?;
        }
        self.wait_until_clear(&leak).await?;
        verdict
    }

    /// Sends one event with the time since the start.
    fn say(&self, event: &str, mut fields: Value) -> Result<(), Failed> {
        if let Some(fields) = fields.as_object_mut() {
            fields.insert("event".to_owned(), json!(event));
            fields.insert("after_seconds".to_owned(), json!(clock::now().since(self.started).as_secs_f64()));
        }
        self.events.send(fields).map_err(|_| Failed::ClientGone)
    }

    /// When the class's condition holds, grace included for a hoard, whose definition has it in.
    async fn wait_for_condition(&self) -> Result<Mono, Failed> {
        let policy = &self.drill.observed.policy;
        let condition = match (self.class, policy.backend(policy.drill())) {
            (Class::Hoard, Some(backend)) => self.started.after(backend.hoard_after + policy.grace),
            _ => clock::now(),
        };
        while clock::now() < condition {
            self.check_client()?;
            tokio::time::sleep(LOOK.min(condition.since(clock::now()))).await;
        }
        self.say("condition", json!({"message": "the class's condition holds"}))?;
        Ok(condition)
    }

    async fn wait_for_finding(&self, leak: &Leak, condition: Mono) -> Result<Finding, Failed> {
        let watchdog = &self.drill.observed.config.watchdog;
        let limit = watchdog.grace.max(watchdog.interval * watchdog.sweeps) + watchdog.interval + MARGIN;
        let finding = self
            .until(condition.after(limit), || {
                let report = self.drill.watchdog.report();
                report.findings.iter().find(|found| found.cookie == leak.cookie && found.class == self.class).cloned()
            })
            .await?
            .ok_or_else(|| Failed::Because(format!("not found within {limit:?} of the condition")))?;
        let now = clock::now();
        self.say(
            "finding",
            json!({
                "after_condition_seconds": now.since(condition).as_secs_f64(),
                "sweeps": finding.sweeps,
                "evidence": finding.evidence(now),
                "held_back": finding.held_back.map(|held_back| held_back.to_string()),
            }),
        )?;
        Ok(finding)
    }

    /// The alarm is the metric that the rules look at, as a scrape would read it now.
    fn show_alarm(&self) -> Result<(), Failed> {
        let policy = &self.drill.observed.policy;
        let label = policy.label(Some(policy.drill()));
        let class = self.class.name();
        let series = format!("counterfoil_discrepancy_sockets{{backend=\"{label}\",class=\"{class}\"}}");
        let text = self.drill.metrics.render();
        let value = text.lines().find_map(|line| line.strip_prefix(series.as_str())?.trim().parse::<f64>().ok());
        self.say("alarm", json!({"metric": series, "value": value}))?;
        match value {
            Some(value) if value >= 1.0 => Ok(()),
            _ => Err(Failed::Because(format!("{series} is not up: {value:?}"))),
        }
    }

    /// Until the reaping is over; the verdict of the drill.
    async fn follow_reaping(&self, leak: &Leak, finding: &Finding) -> Result<Result<String, Failed>, Failed> {
        let watchdog = &self.drill.observed.config.watchdog;
        let reap = if watchdog.classes.contains(&self.class) { watchdog.reap } else { ReapMode::Off };
        if reap == ReapMode::Off {
            self.say("reaping", json!({"message": "off for this class: found and reported only"}))?;
            return Ok(Ok("found and reported; reaping is off".to_owned()));
        }
        if let Some(held_back @ (HeldBack::Fallback | HeldBack::ForeignPeer)) = finding.held_back {
            self.say("reaping", json!({"message": format!("held back: {held_back}")}))?;
            return Ok(Err(Failed::Because(format!("found and reported, not reaped: {held_back}"))));
        }
        let record = self
            .until(clock::now().after(MARGIN * 2), || {
                let report = self.drill.watchdog.report();
                report.recent.iter().rev().find(|record| record.cookie == leak.cookie).cloned()
            })
            .await?;
        let Some(record) = record else {
            return Ok(Err(Failed::Because("found, but no reaping came to its end".to_owned())));
        };
        self.say("reaping", json!({"rung": record.rung.map(Rung::name), "note": record.note}))?;
        self.say("outcome", json!({"outcome": record.outcome.map_or("withdrawn", Outcome::label)}))?;
        Ok(self.judge(&record))
    }

    fn judge(&self, record: &ReapRecord) -> Result<String, Failed> {
        // SOCK_DESTROY takes an orphan's connection away; its descriptor is the drill's.
        let wanted = if self.class == Class::Orphan { Outcome::Severed } else { Outcome::Released };
        match record.outcome {
            Some(Outcome::DryRun) => Ok("found and reported; dry run: nothing was done about it".to_owned()),
            Some(outcome) if outcome == wanted => Ok(format!("found, reported and {}", outcome.label())),
            Some(outcome) => Err(Failed::Because(format!("the reaping was {}: {}", outcome.label(), record.note))),
            None => Err(Failed::Because(format!("the reaping was withdrawn: {}", record.note))),
        }
    }

    /// Until neither view has anything of it left.
    async fn wait_until_clear(&self, leak: &Leak) -> Result<(), Failed> {
        let released = clock::now();
        let drill = Some(self.drill.observed.policy.drill());
        self.drill.watchdog.sweep_now();
        let clear = self
            .until(clock::now().after(self.drill.observed.config.watchdog.interval + MARGIN), || {
                let report = self.drill.watchdog.report();
                let finding = report.findings.iter().any(|finding| finding.cookie == leak.cookie);
                let socket = report.sockets.keys().any(|(backend, _)| *backend == drill);
                (report.taken > released && !finding && !socket).then_some(())
            })
            .await?;
        clear.ok_or_else(|| Failed::Because("something of the leak is still there".to_owned()))?;
        self.say("clear", json!({"message": "nothing of it is left in either view"}))
    }

    /// Looks until there is something, or the deadline has passed, or the client is gone.
    async fn until<T>(&self, deadline: Mono, mut look: impl FnMut() -> Option<T>) -> Result<Option<T>, Failed> {
        loop {
            if let Some(found) = look() {
                return Ok(Some(found));
            }
            if clock::now() >= deadline {
                return Ok(None);
            }
            self.check_client()?;
            tokio::time::sleep(LOOK).await;
        }
    }

    fn check_client(&self) -> Result<(), Failed> {
        if self.events.is_closed() { Err(Failed::ClientGone) } else { Ok(()) }
    }
}

fn mode(reap: ReapMode) -> &'static str {
    match reap {
        ReapMode::Off => "off",
        ReapMode::DryRun => "dry-run",
        ReapMode::On => "on",
    }
}

fn what(class: Class) -> &'static str {
    match class {
        Class::Orphan => "connected without a ledger entry",
        Class::Ghost => "its descriptor is closed, its ledger entry kept",
        Class::Zombie => "its peer has closed, its owner does nothing",
        Class::Hoard => "its owner keeps it idle past the idle timeout",
        Class::Stuck | Class::Embryo | Class::Lingering => "",
    }
}

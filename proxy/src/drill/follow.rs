//! Following a leak from its making to its end, step by step.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use super::leak::{Leak, Site};
use super::{AT_ONCE, Order};
use crate::clock::{self, Mono};
use crate::config::{Class, ReapMode};
use crate::metrics::{Format, Metrics};
use crate::watchdog::reaper::ReapRecord;
use crate::watchdog::{Finding, Handle, HeldBack, Live, Look, Observed, Outcome, Rung};

/// Between two looks at the watchdog's report.
const LOOK: Duration = Duration::from_millis(50);

/// What is added to each expected time before a step has failed.
const MARGIN: Duration = Duration::from_secs(5);

/// The drills of this process. Each follows its own socket, by its cookie.
#[derive(Debug)]
pub(crate) struct Drill {
    pub(super) live: Live,
    pub(super) watchdog: Handle,
    pub(super) metrics: Arc<Metrics>,
    pub(super) site: Site,
    pub(super) running: Cell<usize>,
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
    /// As of its start.
    observed: Observed,
    class: Class,
    deaf: bool,
    started: Mono,
    events: &'a UnboundedSender<Value>,
}

impl Drill {
    /// Runs one drill and sends its events; the last one is `done`.
    pub(crate) async fn run(self: Rc<Self>, order: &Order, events: &UnboundedSender<Value>) {
        let done = |ok: bool, message: String| {
            // The client is gone: then nobody needs to know.
            let _ = events.send(json!({"event": "done", "ok": ok, "message": message}));
        };
        let Some(class) = Class::ALL.into_iter().find(|class| class.name() == order.class) else {
            let names: Vec<_> = Class::ALL.iter().map(|class| class.name()).collect();
            return done(false, format!("there is no class {:?}, only {}", order.class, names.join(", ")));
        };
        if order.deaf && matches!(class, Class::Orphan | Class::Ghost) {
            return done(false, format!("no owner is asked to close the leak of class {}", class.name()));
        }
        let Some(_place) = Place::take(&self.running) else {
            return done(false, format!("{AT_ONCE} drills are running, more are not made at once"));
        };
        let course =
            Course { drill: &self, observed: self.live.now(), class, deaf: order.deaf, started: clock::now(), events };
        match course.run().await {
            Ok(message) => done(true, message),
            Err(Failed::Because(message)) => done(false, message),
            Err(Failed::ClientGone) => {
                tracing::info!(class = class.name(), "the drill's client is gone, the leak is ended")
            }
        }
    }

    /// Sweeps at once, so that one drill by hand takes no longer than it must. Not if there are others: sweeps that
    /// follow each other at once would cut short the interval for which each of their findings is published.
    fn hurry(&self) {
        if self.running.get() == 1 {
            self.watchdog.sweep_now();
        }
    }
}

/// One of the drills at once; given back also when the task is dropped.
struct Place<'a>(&'a Cell<usize>);

impl<'a> Place<'a> {
    fn take(running: &'a Cell<usize>) -> Option<Self> {
        (running.get() < AT_ONCE).then(|| {
            running.set(running.get() + 1);
            Self(running)
        })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

impl Course<'_> {
    async fn run(&self) -> Result<String, Failed> {
        let watchdog = &self.observed.config.watchdog;
        self.say(
            "start",
            json!({
                "class": self.class.name(),
                "deaf": self.deaf,
                "reap": mode(watchdog.reap),
                "view": self.drill.watchdog.report().source.as_str(),
            }),
        )?;
        tracing::info!(class = self.class.name(), "drill");
        let leak = self.drill.site.leak(self.class, self.deaf).await;
        let leak = leak.map_err(|error| Failed::Because(format!("no leak could be made: {error}")))?;
        self.say(
            "leaked",
            json!({
                "cookie": leak.cookie,
                "local": leak.local.to_string(),
                "remote": leak.remote.to_string(),
                "message": what(self.class),
            }),
        )?;
        self.drill.hurry();
        let condition = self.wait_for_condition(&leak).await?;
        let finding = self.wait_for_finding(&leak, condition).await?;
        self.show_alarm(&leak)?;
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
    async fn wait_for_condition(&self, leak: &Leak) -> Result<Mono, Failed> {
        let policy = &self.observed.policy;
        let after = policy.backend(policy.drill()).map_or(Duration::ZERO, |backend| match self.class {
            Class::Hoard => backend.hoard_after + policy.grace,
            Class::Stuck => backend.stuck_after,
            Class::Embryo => backend.embryo_after,
            Class::Orphan | Class::Ghost | Class::Zombie | Class::Lingering => Duration::ZERO,
        });
        let condition = leak.quiet_since.after(after);
        while clock::now() < condition {
            self.check_client()?;
            tokio::time::sleep(LOOK.min(condition.since(clock::now()))).await;
        }
        self.say("condition", json!({"message": "the class's condition holds"}))?;
        Ok(condition)
    }

    async fn wait_for_finding(&self, leak: &Leak, condition: Mono) -> Result<Finding, Failed> {
        let watchdog = &self.observed.config.watchdog;
        let limit = watchdog.grace.max(watchdog.interval * watchdog.sweeps) + watchdog.interval + MARGIN;
        let finding = self
            .until(condition.after(limit), || {
                let report = self.drill.watchdog.report();
                let now = report.findings.iter().find(|found| found.cookie == leak.cookie && found.class == self.class);
                // Where this thread was held up for long, the reaping may be over already.
                let reaped = || report.recent.iter().rev().find(|record| record.cookie == leak.cookie);
                now.or_else(|| reaped().map(|record| &record.finding)).cloned()
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
    fn show_alarm(&self, leak: &Leak) -> Result<(), Failed> {
        let policy = &self.observed.policy;
        let label = policy.label(Some(policy.drill()));
        let class = self.class.name();
        let series = format!("counterfoil_discrepancy_sockets{{backend=\"{label}\",class=\"{class}\"}}");
        let text = self.drill.metrics.render(Format::OpenMetrics);
        let value = text.lines().find_map(|line| line.strip_prefix(series.as_str())?.trim().parse::<f64>().ok());
        // After the metrics: what is a finding still was one when they were read.
        let over = !self.drill.watchdog.report().findings.iter().any(|finding| finding.cookie == leak.cookie);
        let up = value.is_some_and(|value| value >= 1.0);
        let late = (over && !up).then_some("the finding was over before this could be read");
        self.say("alarm", json!({"metric": series, "value": value, "message": late}))?;
        if up || over { Ok(()) } else { Err(Failed::Because(format!("{series} is not up: {value:?}"))) }
    }

    /// Until the reaping is over; the verdict of the drill.
    async fn follow_reaping(&self, leak: &Leak, finding: &Finding) -> Result<Result<String, Failed>, Failed> {
        let watchdog = &self.observed.config.watchdog;
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
            .until(clock::now().after(watchdog.interval + MARGIN * 2), || {
                let report = self.drill.watchdog.report();
                report.recent.iter().rev().find(|record| record.cookie == leak.cookie).cloned()
            })
            .await?;
        let Some(record) = record else {
            return Ok(Err(Failed::Because("found, but no reaping came to its end".to_owned())));
        };
        self.say("reaping", json!({"rung": record.rung.map(Rung::name), "note": record.note}))?;
        self.say("outcome", json!({"outcome": record.outcome.map_or("withdrawn", Outcome::label)}))?;
        if record.outcome == Some(Outcome::Severed) {
            self.wait_for_remains(leak, &record).await?;
        }
        Ok(self.judge(&record))
    }

    /// A descriptor still holds a socket that was severed, so there must be a finding of it after as before.
    async fn wait_for_remains(&self, leak: &Leak, record: &ReapRecord) -> Result<(), Failed> {
        let watchdog = &self.observed.config.watchdog;
        let limit = watchdog.grace.max(watchdog.interval * watchdog.sweeps) + watchdog.interval + MARGIN;
        let found = self
            .until(record.at.after(limit), || {
                let report = self.drill.watchdog.report();
                let finding = report.findings.iter().find(|finding| finding.cookie == leak.cookie);
                finding.filter(|_| report.taken > record.at).cloned()
            })
            .await?;
        let found = found.ok_or_else(|| Failed::Because("severed and still held, but not a finding".to_owned()))?;
        let fields = json!({"class": found.class.name(), "evidence": found.evidence(clock::now())});
        self.say("remains", fields)
    }

    fn judge(&self, record: &ReapRecord) -> Result<String, Failed> {
        // Nobody closes the descriptor of an orphan, nor a deaf owner its own: more than the connection can't be had.
        let wanted = if self.class == Class::Orphan || self.deaf { Outcome::Severed } else { Outcome::Released };
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
        let limit = self.observed.config.watchdog.interval + MARGIN;
        self.drill.hurry();
        let over = self
            .until(released.after(limit), || {
                let report = self.drill.watchdog.report();
                let found = report.findings.iter().any(|finding| finding.cookie == leak.cookie);
                (report.taken > released && !found).then_some(())
            })
            .await?;
        over.ok_or_else(|| Failed::Because("what was leaked is still a finding".to_owned()))?;
        let look = tokio::time::timeout(limit, self.drill.watchdog.look()).await;
        let Ok(Ok(Look { kernel: Ok(kernel), ledger, .. })) = look else {
            return Err(Failed::Because("the watchdog cannot say whether something of it is left".to_owned()));
        };
        let socket = kernel.sockets.iter().any(|socket| socket.held && socket.cookie == leak.cookie);
        if socket || ledger.rows.iter().any(|row| row.cookie == leak.cookie) {
            return Err(Failed::Because("something of the leak is still there".to_owned()));
        }
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
        Class::Stuck => "a query is in flight on it, its peer says nothing",
        Class::Embryo => "its peer does not answer the connect",
        Class::Lingering => "it is shut down for writing, its peer does not close, its owner does nothing",
    }
}

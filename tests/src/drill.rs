//! Drills by the admin socket, several at once, and what their steps say.

use std::time::Duration;

use serde_json::{Value, json};

use crate::counterfoil::Counterfoil;

/// All classes of the watchdog.
pub const CLASSES: [&str; 7] = ["orphan", "ghost", "zombie", "hoard", "stuck", "embryo", "lingering"];

/// Longer than any drill takes.
const END: Duration = Duration::from_secs(120);

/// A drill that is over.
#[derive(Debug)]
pub struct Drilled {
    /// The class that was asked for.
    pub class: &'static str,
    /// Its steps, in order.
    pub events: Vec<Value>,
}

impl Drilled {
    /// Runs one drill; `deaf`: its owner does nothing when it is asked to close.
    ///
    /// # Panics
    /// If it does not end.
    #[track_caller]
    pub fn run(counterfoil: &Counterfoil, class: &'static str, deaf: bool) -> Self {
        let events = counterfoil.admin(&json!({"cmd": "drill", "class": class, "deaf": deaf}), END);
        Self { class, events }
    }

    /// Runs all of them at once.
    ///
    /// # Panics
    /// If one does not end.
    #[track_caller]
    pub fn all(counterfoil: &Counterfoil, drills: &[(&'static str, bool)]) -> Vec<Self> {
        std::thread::scope(|scope| {
            let run = |(class, deaf)| scope.spawn(move || Self::run(counterfoil, class, deaf));
            let running: Vec<_> = drills.iter().copied().map(run).collect();
            running.into_iter().map(|drill| drill.join().expect("the drill ends")).collect()
        })
    }

    /// The step of this name.
    ///
    /// # Panics
    /// If the drill did not come to it.
    #[track_caller]
    pub fn step(&self, name: &str) -> &Value {
        let found = self.events.iter().find(|event| event["event"] == name);
        found.unwrap_or_else(|| panic!("no step {name}: {self:#?}"))
    }

    /// A field of a step, as text; empty if it is none.
    ///
    /// # Panics
    /// If the drill did not come to it.
    #[track_caller]
    pub fn text(&self, step: &str, field: &str) -> &str {
        self.step(step)[field].as_str().unwrap_or_default()
    }

    /// Whether it did all that it was to do.
    pub fn succeeded(&self) -> bool {
        self.events.last().is_some_and(|event| event["event"] == "done" && event["ok"] == true)
    }

    /// The socket's cookie.
    ///
    /// # Panics
    /// If nothing was leaked.
    #[track_caller]
    pub fn cookie(&self) -> u64 {
        self.step("leaked")["cookie"].as_u64().expect("a number")
    }

    /// From the moment that the class's condition held to its finding.
    ///
    /// # Panics
    /// If it was not found.
    #[track_caller]
    pub fn detection(&self) -> Duration {
        Duration::from_secs_f64(self.step("finding")["after_condition_seconds"].as_f64().expect("a number"))
    }

    /// From the finding to the outcome of its reaping.
    ///
    /// # Panics
    /// If it was not reaped.
    #[track_caller]
    pub fn reaping(&self) -> Duration {
        let after = |step: &str| Duration::from_secs_f64(self.step(step)["after_seconds"].as_f64().expect("a number"));
        after("outcome").saturating_sub(after("finding"))
    }
}

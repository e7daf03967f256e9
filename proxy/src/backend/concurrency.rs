//! Whether a backend works on one query at a time for each connection, as dnsdist does. A pure state machine: it is told
//! of every answer, in constant time, and says whether a query should rather have a connection without others on it.
//!
//! Two figures are held against each other: how long an answer takes to a query that is alone on its connection, and how
//! long after the answer before it one comes to a query that had to wait behind others. Where queries are worked on side by
//! side a connection brings several answers in the time of one. Where they are worked on one after the other it brings one,
//! so another connection brings as many again. Both are averages of logarithms, so that a few slow names do not decide.
//!
//! An answer that overtakes another one proves that they are worked on side by side. While it looks as if they were not,
//! connections are added slowly: each answer to a query that was alone allows one more. A backend that has just no more
//! computing power takes longer then, alone or not, and gets no more of them. Now and then a query is placed the other way,
//! so that neither figure gets old.

use std::time::Duration;

use crate::clock::Mono;

/// An octave, the factor two, in the unit of the averages.
const OCTAVE: i32 = 256;

/// How much of what a new sample says goes into an average: one in so many parts.
const WEIGHT: i32 = 12;

/// Answers in order, in a row, that it takes to call a backend serial: twice as many after each that was not, up to many.
const ENOUGH: u32 = 2;
const MOST_NEEDED: u32 = 128;

/// A connection that brings answers faster than one in this time is not worth another one.
const WORTHWHILE: Duration = Duration::from_micros(500);

/// Connections that may be added at once, after as many answers to queries that were alone.
const MOST_AT_ONCE: u32 = 64;

/// Queries after which one is placed the other way: at first, and where that has changed nothing for long.
const FIRST_TRIAL: u32 = 8;
const RAREST_TRIAL: u32 = 1024;

/// Below this time no query is placed alone to try it: there is nothing to be gained.
const WORTH_A_TRIAL: Duration = Duration::from_millis(5);

/// How an answer came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// Nothing else was on the connection when its query was sent, and it took so long.
    Alone(Duration),
    /// Its query was sent `waited` before the answer that came before it on the connection, and it came `gap` after that.
    Behind {
        /// From the query to the answer before.
        waited: Duration,
        /// From the answer before to this one.
        gap: Duration,
    },
    /// Before that of a query that was sent earlier on the same connection, or after that of one that was sent later.
    OutOfOrder,
}

/// The answers of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answers {
    /// When the last one came.
    last: Mono,
    /// The latest query of those that were answered, by their order on the connection, from 1.
    turn: u64,
}

impl Answers {
    /// An answer has come to the query that was the `turn`th on the connection. None: it says nothing, as the answer to one
    /// before it is still to come, or not waited for any more.
    pub fn came(&mut self, turn: u64, sent: Mono, now: Mono) -> Option<Came> {
        let Self { last, turn: latest } = *self;
        *self = Self { last: now, turn: turn.max(latest) };
        if turn < latest {
            Some(Came::OutOfOrder)
        } else if turn != latest + 1 {
            None
        } else if sent < last {
            Some(Came::Behind { waited: last.since(sent), gap: now.since(last) })
        } else {
            Some(Came::Alone(now.since(sent)))
        }
    }
}

/// What is known of a backend.
#[derive(Clone, Debug, Default)]
pub struct Concurrency {
    /// How long an answer takes alone, as a logarithm.
    alone: Option<i32>,
    /// How long one comes after the one before, as a logarithm.
    gap: Option<i32>,
    /// Answers behind others that came in order, in a row.
    in_order: u32,
    /// So many it takes, beside [`ENOUGH`].
    needed: u32,
    is_serial: bool,
    /// Connections that may be added.
    credit: u32,
    /// Queries since one was added for which none was.
    refused: u32,
    /// Answers or queries since one was placed the other way.
    since_trial: u32,
    /// After so many it is done again, beside [`FIRST_TRIAL`].
    trial_after: u32,
    /// The next query is to be alone, to see what that brings.
    trial: bool,
}

impl Concurrency {
    /// An answer has come.
    pub fn answered(&mut self, came: Came) {
        match came {
            Came::Alone(latency) => {
                let latency = log(latency);
                average(&mut self.alone, latency);
                let gap = self.gap.unwrap_or(i32::MIN);
                if self.is_serial && gap >= latency - OCTAVE {
                    self.credit = (self.credit + 1).min(MOST_AT_ONCE);
                } else if !self.is_serial && is_as_long(gap, latency) {
                    // The average is of another time, of a cold cache for instance.
                    self.alone = self.alone.map(|alone| alone.midpoint(latency));
                    self.trial_after = 0;
                }
            }
            Came::Behind { waited, gap } => {
                let Some(alone) = self.alone else { return };
                // However long it took alone when that was seen last, it is not longer than it has taken now.
                let alone = alone.min(log(waited + gap));
                if !self.is_serial {
                    self.alone = Some(alone);
                }
                // Side by side the rest of the time is all that is left after waiting. To tell that from the whole of it
                // takes to have waited for long enough.
                if log(waited) < alone - OCTAVE {
                    return;
                }
                let gap = log(gap).max(alone - 4 * OCTAVE);
                average(&mut self.gap, gap);
                self.in_order = self.in_order.saturating_add(1);
                if self.is_serial && !is_as_long(gap, alone) {
                    self.trial_after = 0;
                } else if !self.is_serial
                    && self.in_order >= self.needed.max(FIRST_TRIAL)
                    && alone >= log(WORTH_A_TRIAL)
                {
                    self.trial |= self.is_trial_due();
                }
            }
            Came::OutOfOrder => {
                (self.in_order, self.gap, self.trial) = (0, None, false);
                self.needed = (2 * self.needed.max(ENOUGH)).min(MOST_NEEDED);
                self.decide(false);
                return;
            }
        }
        let (Some(alone), Some(gap)) = (self.alone, self.gap) else { return };
        if !self.is_serial
            && self.in_order >= self.needed.max(ENOUGH)
            && gap >= log(WORTHWHILE)
            && is_as_long(gap, alone)
        {
            self.decide(true);
        } else if self.is_serial && gap < alone - 2 * OCTAVE {
            self.in_order = 0;
            self.decide(false);
        }
    }

    /// Whether a query that would be put behind others should rather be alone on a connection.
    pub fn prefers_alone(&mut self) -> bool {
        if self.is_serial {
            return !self.is_trial_due();
        }
        std::mem::take(&mut self.trial)
    }

    /// Whether a connection may be added for a query that should be alone; if so, it is.
    pub fn takes_credit(&mut self) -> bool {
        if self.is_serial && self.credit == 0 {
            // Where all have to wait, no answer tells how long one takes alone.
            self.refused += 1;
            if self.refused < FIRST_TRIAL {
                return false;
            }
        }
        self.refused = 0;
        self.credit = self.credit.saturating_sub(1);
        true
    }

    fn decide(&mut self, is_serial: bool) {
        if self.is_serial != is_serial {
            self.is_serial = is_serial;
            (self.credit, self.since_trial, self.trial_after, self.trial) = (1, 0, 0, false);
        }
    }

    fn is_trial_due(&mut self) -> bool {
        self.since_trial += 1;
        let is_due = self.since_trial >= self.trial_after.max(FIRST_TRIAL);
        if is_due {
            self.since_trial = 0;
            self.trial_after = (2 * self.trial_after.max(FIRST_TRIAL)).min(RAREST_TRIAL);
        }
        is_due
    }
}

/// Whether an answer comes as long after the one before as one takes alone.
fn is_as_long(gap: i32, alone: i32) -> bool {
    gap >= alone - OCTAVE / 2
}

fn average(average: &mut Option<i32>, sample: i32) {
    *average = Some(average.map_or(sample, |old| old + (sample - old) / WEIGHT));
}

/// The logarithm of a time, straight between powers of two: at most a tenth of an octave too low.
fn log(time: Duration) -> i32 {
    // A time of 584 years is not meant to be told from a longer one.
    let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
    let zeros = nanos.leading_zeros();
    let fraction = nanos << zeros << 1 >> 56;
    // Below 64 octaves.
    (63 - zeros as i32) * OCTAVE + fraction as i32
}

#[cfg(test)]
#[path = "concurrency_tests.rs"]
mod tests;

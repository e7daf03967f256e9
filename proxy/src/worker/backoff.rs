//! When a backend is given no new connections for a while: because it fails those that it gets, or because this host has
//! no means for any. Pure state machines.

use std::net::IpAddr;
use std::time::Duration;

use super::by_client::ByClient;
use crate::clock::Mono;

/// Failures in a row that make no pause: one lost connection must not fail the queries after it.
const TOLERATED: u32 = 2;
/// The first pause after connections failed; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A backend that has answered anybody for so long is not one that turns everybody away. A server that works and is asked
/// by many answers somebody in this time, even if all names are new to it.
const QUIET: Duration = Duration::from_secs(1);
/// Connections that clients share may die one after the other without any answer in between until the backend is taken
/// for one that turns everybody away. Where queries brought them down, others are answered between two deaths, as they are
/// asked apart from them.
const DEATHS: u32 = 32;
/// So many clients have to be turned away, and nobody answered, before those suffer who were not.
const TURNED_AWAY: u32 = 16;
/// Clients of which nothing bad is known that may try during each pause that others have brought about.
const STRANGERS: u32 = 16;

/// After so long one connection is tried when there was no descriptor, no memory or no port for another one.
const SHORT: Duration = Duration::from_millis(20);

/// After a few failures in a row nothing is tried for a while, longer and longer; then one connection is, and what becomes
/// of it decides.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pause {
    until: Mono,
    length: Duration,
    /// Failures since the last success.
    failures: u32,
    failed: Mono,
}

impl Pause {
    /// Whether no connection should be tried now.
    pub(crate) fn holds(&self, now: Mono) -> bool {
        now < self.until
    }

    /// Whether it has failed too often, and has not been seen to work since.
    pub(crate) fn is_failing(&self) -> bool {
        self.failures > TOLERATED
    }

    /// A connection is being tried. The first one after a pause is tried alone.
    pub(crate) fn tries(&mut self, now: Mono) {
        if self.is_failing() {
            self.until = now.after(self.length);
        }
    }

    /// A connection that was opened at this time has failed. `jitter` is between 0 and 1.
    pub(crate) fn failed(&mut self, opened: Mono, now: Mono, jitter: f64) {
        if opened < self.failed {
            // One of several that were under way together.
            return;
        }
        self.failed = now;
        self.failures = self.failures.saturating_add(1);
        if self.failures <= TOLERATED {
            return;
        }
        self.length = (self.length * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.until = now.after(self.length.mul_f64(0.75 + 0.25 * jitter.clamp(0.0, 1.0)));
    }

    /// A connection has brought an answer.
    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }
}

/// Whose connection it was that was closed without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// One client's: nobody else could have had anything on it.
    Own,
    /// Whoever comes next's.
    Shared,
    /// It was for suspects, of which one was likely to bring it down.
    Suspects,
}

/// Keeps a backend that refuses connections, or closes them without an answer, from being stormed with them.
///
/// A connection that does not come about says the same to everybody. One that is closed without an answer may say that its
/// client is not wanted: then that client is held back, and nobody else, however many there are of its kind. Everybody is
/// only if the backend answers nobody at all, and even then some of whom nothing bad is known may try. What is known of
/// clients is bounded ([`ByClient`]).
#[derive(Clone, Debug, Default)]
pub(crate) struct Backoff {
    all: Pause,
    /// Not connections that failed have brought about the pause, but clients that were turned away.
    by_clients: bool,
    /// Those who tried during this pause.
    strangers: u32,
    clients: ByClient<Pause>,
    /// When anything came last over any connection.
    heard: Mono,
    /// Since then: connections that clients share and that died, and clients that were turned away for the first time.
    deaths: u32,
    turned_away: u32,
}

impl Backoff {
    /// Whether no connection should be tried now for this client.
    pub(crate) fn holds_back(&self, client: impl FnOnce() -> IpAddr, now: Mono) -> bool {
        let all = self.all.holds(now);
        if self.clients.is_unused() {
            return all;
        }
        match self.clients.get(client()) {
            Some(pause) => all || pause.holds(now),
            None => all && !(self.by_clients && self.strangers < STRANGERS),
        }
    }

    /// Whether it has failed too often, and has not been seen to work since.
    pub(crate) fn is_failing(&self) -> bool {
        self.all.is_failing()
    }

    /// Whether it has answered anybody lately.
    pub(crate) fn has_answered_lately(&self, now: Mono) -> bool {
        now < self.heard.after(QUIET)
    }

    /// A connection is being tried for this client.
    pub(crate) fn tries(&mut self, client: IpAddr, now: Mono) {
        if self.all.holds(now) {
            self.strangers += 1;
        } else if self.all.is_failing() {
            self.all.tries(now);
            self.strangers = 0;
        }
        if let Some(pause) = self.clients.get_mut(client) {
            pause.tries(now);
        }
    }

    /// A connection that was opened at this time did not come about. `jitter` is between 0 and 1.
    pub(crate) fn failed(&mut self, opened: Mono, now: Mono, jitter: f64) {
        self.all.failed(opened, now, jitter);
        self.by_clients = false;
    }

    /// A connection that was opened at this time was closed without an answer. `client` is the only one that had something
    /// on it, if there was one.
    pub(crate) fn turned_away(&mut self, client: Option<IpAddr>, whose: Whose, opened: Mono, now: Mono, jitter: f64) {
        let owned = whose == Whose::Own;
        let shared = whose == Whose::Shared;
        let quiet = !self.has_answered_lately(now) || (shared && self.deaths >= DEATHS);
        self.deaths = self.deaths.saturating_add(u32::from(shared));
        if !quiet && !owned {
            // One of its queries may have brought it down: that is found out, and says nothing of the backend.
            return;
        }
        if let Some(client) = client {
            match self.clients.get_mut(client) {
                Some(pause) => pause.failed(opened, now, jitter),
                None => {
                    let mut pause = Pause::default();
                    pause.failed(opened, now, jitter);
                    self.clients.insert(client, pause, now);
                    self.turned_away = self.turned_away.saturating_add(1);
                }
            }
            if !quiet || self.turned_away <= TURNED_AWAY {
                return;
            }
        }
        self.all.failed(opened, now, jitter);
        self.by_clients = client.is_some();
    }

    /// Something came over a connection.
    pub(crate) fn heard(&mut self, now: Mono) {
        self.heard = now;
        (self.deaths, self.turned_away) = (0, 0);
    }

    /// A connection has brought its first answer. `client` is the only one that has something on it, if there is one.
    pub(crate) fn succeeded(&mut self, client: impl FnOnce() -> Option<IpAddr>) {
        self.all.succeeded();
        self.strangers = 0;
        if !self.clients.is_unused()
            && let Some(client) = client()
        {
            self.clients.remove(client);
        }
    }
}

/// This host has no descriptor, no memory or no port for a connection to a backend, which says nothing of the backend: who
/// needs one waits, and one is tried after a while, alone.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shortage {
    /// Zero: there is none.
    until: Mono,
}

impl Shortage {
    /// Whether there is one.
    pub(crate) fn is_felt(self) -> bool {
        self.until != Mono::ZERO
    }

    /// Whether no connection should be tried now.
    pub(crate) fn holds(self, now: Mono) -> bool {
        now < self.until
    }

    /// There were no means for a connection.
    pub(crate) fn felt(&mut self, now: Mono) {
        self.until = now.after(SHORT);
    }

    /// A connection is being tried.
    pub(crate) fn tries(&mut self, now: Mono) {
        if self.is_felt() {
            self.felt(now);
        }
    }

    /// There were means for a connection. True if there had not been before.
    pub(crate) fn ends(&mut self) -> bool {
        std::mem::take(self).is_felt()
    }
}

#[cfg(test)]
#[path = "backoff_tests.rs"]
mod tests;

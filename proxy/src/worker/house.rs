//! What only time brings about: deadlines, and the one clean-up that walks every connection of every kind.

use std::sync::Arc;
use std::time::Duration;

use super::core::Core;
use super::queries::Place;
use super::timers::TimerKey;
use crate::backend::pool::{ConnKey, Phase};
use crate::clock::Mono;
use crate::close::{CloseReason, FailReason};
use crate::ledger::{BackendIndex, ConnKind};

impl Core {
    /// When [`Self::tick`] has something to do next.
    pub(crate) fn next_deadline(&self) -> Mono {
        let others = [self.timers.next(), self.queries.next_deadline()];
        let next = others.into_iter().flatten().fold(self.next_cleanup, Mono::min);
        let of_suspects = self.suspected.iter().filter_map(|at| self.suspects[usize::from(*at)].next_deadline());
        let next = of_suspects.fold(next, Mono::min);
        if self.stats.waiting.get() == 0 {
            // There may be many backends, and each task that has run asks.
            return next;
        }
        self.pool.lines().filter_map(crate::backend::wait::WaitQueue::next_deadline).fold(next, Mono::min)
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Mono) {
        while let Some(query) = self.queries.expired(now) {
            self.timed_out(query, now);
        }
        // As many as there are backends in the configuration, which are fewer than 65,535.
        for backend in 0..self.plan.backends.len() as u16 {
            while let Some(query) = self.pool.line_mut(backend).expired(now) {
                if self.queries.get(query).is_some_and(|entry| entry.place == Place::Waiting) {
                    self.stop_waiting(query);
                    let short = self.shortages[usize::from(backend)].is_felt();
                    self.fail(query, if short { FailReason::HostShortage } else { FailReason::NoCapacity });
                }
            }
            if self.pool.line(backend).is_due(now) {
                self.serve_waiting(backend, now);
            }
        }
        for at in (0..self.suspected.len()).rev() {
            let backend = self.suspected.get(at).copied();
            let due = |at: &BackendIndex| self.suspects[usize::from(*at)].next_deadline().is_some_and(|at| at <= now);
            if let Some(backend) = backend.filter(due) {
                self.try_suspects(backend, now);
            }
        }
        while let Some((deadline, key)) = self.timers.pop(now) {
            match key {
                TimerKey::Session(key) => self.session_timer(key, deadline, now),
                TimerKey::Conn(key) => self.conn_timer(key, deadline, now),
            }
        }
        if now >= self.next_cleanup {
            self.next_cleanup = now.after(self.plan.connections.cleanup_interval);
            self.clean_up(now);
        }
    }

    fn timed_out(&mut self, query: super::queries::QueryKey, now: Mono) {
        let Some(entry) = self.queries.get(query) else { return };
        match entry.place {
            // Its client has to read first, and has `write_timeout` for that.
            Place::Sent { conn, .. } if self.pool.get(conn).is_some_and(|conn| conn.paused) => {
                self.queries.renew(query, now);
            }
            Place::Sent { conn, id } => {
                let sent = entry.sent;
                self.pool.abandon(conn, id, now);
                if let Some(conn) = self.pool.get(conn) {
                    self.shared.health.query_failed(conn.backend);
                }
                // Nothing at all has come since the query was sent: the connection is given no other.
                if self.pool.get(conn).is_some_and(|conn| conn.last_received < sent) {
                    self.pool.retire(conn, CloseReason::Unresponsive, now);
                }
                self.fail(query, FailReason::Timeout);
                self.after_conn(conn, now);
            }
            Place::Waiting => {
                self.stop_waiting(query);
                self.fail(query, FailReason::Timeout);
            }
            Place::Nowhere => self.fail(query, FailReason::Timeout),
        }
    }

    fn session_timer(&mut self, key: crate::client::session::SessionKey, deadline: Mono, now: Mono) {
        let Some(session) = self.sessions.get_mut(key.0) else { return };
        if session.armed != deadline {
            return;
        }
        session.armed = Mono::ZERO;
        let guessed = session.is_guessing();
        session.check(now);
        if session.close.is_some() || session.ending.is_some() || (guessed && !session.is_guessing()) {
            self.wake_session(key);
        } else {
            self.settle_session(key);
        }
    }

    fn conn_timer(&mut self, key: ConnKey, deadline: Mono, now: Mono) {
        let Some(conn) = self.pool.get_mut(key) else { return };
        if conn.armed != deadline {
            return;
        }
        conn.armed = Mono::ZERO;
        let plan = &self.plan.backends[usize::from(conn.backend)];
        if conn.phase == Phase::Connecting && conn.phase_since.after(plan.connect_timeout) <= now {
            self.pool.close(key, CloseReason::ConnectTimeout, now);
        } else if conn.unwritable_since != Mono::ZERO && conn.unwritable_since.after(plan.write_timeout) <= now {
            self.pool.close(key, CloseReason::WriteTimeout, now);
        } else {
            self.settle_conn(key);
        }
    }

    /// Walks all connections: closes those that are idle too long or too old. One that is too old and busy closes when
    /// it is next idle. Idle time counts from the last byte, as the watchdog counts it, not from the moment at which a
    /// query without an answer was given up.
    fn clean_up(&mut self, now: Mono) {
        self.stats.pools.iter().for_each(|pool| pool.headers.turn(now));
        self.recount_under_way();
        let connections = &self.plan.connections;
        let idle_timeout = |kind: ConnKind| match kind {
            ConnKind::Spare => connections.spare_idle_timeout,
            _ => connections.idle_timeout,
        };
        // Before the peer does, which is at the clean-up before.
        let kept = |conn: &crate::backend::pool::Conn| conn.kept_for().saturating_sub(connections.cleanup_interval);
        let due = |conn: &crate::backend::pool::Conn| {
            if conn.is_closing() || conn.phase == Phase::Connecting {
                None
            } else if conn.expires <= now {
                Some(CloseReason::MaxAge)
            } else if conn.is_idle() && conn.last_byte.after(idle_timeout(conn.kind).min(kept(conn))) <= now {
                Some(CloseReason::IdleTimeout)
            } else {
                None
            }
        };
        let due: Vec<(ConnKey, CloseReason)> =
            self.pool.iter().filter_map(|(key, conn)| due(conn).map(|reason| (key, reason))).collect();
        for (key, reason) in due {
            self.pool.retire(key, reason, now);
        }
        self.keep_caps(now);
    }

    /// A limit may have been set below its use: idle connections go until it is kept.
    fn keep_caps(&mut self, now: Mono) {
        let caps = Arc::clone(&self.shared.caps);
        let excess = |(limit, used): (usize, usize)| used.saturating_sub(limit);
        for backend in 0..self.plan.backends.len() as u16 {
            let excess = caps.backend(backend).map_or(0, excess).saturating_sub(self.pool.closing(backend));
            for _ in 0..excess {
                let Some(idle) = self.pool.longest_idle(backend) else { break };
                self.pool.close(idle, CloseReason::Evicted, now);
            }
        }
        for _ in 0..excess(caps.total()).saturating_sub(self.pool.all_closing()) {
            let Some(idle) = self.pool.longest_idle_of_all() else { break };
            self.pool.close(idle, CloseReason::Evicted, now);
        }
    }

    /// The process drains: no client connection is accepted any more, and those that are idle are closed one by one
    /// over the given time, so that their clients do not all come back at once.
    pub(crate) fn drain(&mut self, over: Duration, now: Mono) {
        self.draining = true;
        let keys: Vec<usize> = self.sessions.iter().map(|(key, _)| key).collect();
        for key in keys {
            let at = now.after(over.mul_f64(self.random.f64()));
            self.sessions[key].drain_at = at;
            self.settle_session(crate::client::session::SessionKey(key));
        }
    }

    /// The time to drain is nearly over. Who has had something in flight all the time is asked for no more of it: what was
    /// taken can still be answered before the connections are closed.
    pub(crate) fn drain_is_nearly_over(&mut self) {
        let keys: Vec<usize> = self.sessions.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.sessions[key].ending.get_or_insert(crate::close::ClientCloseReason::Drained);
            self.wake_session(crate::client::session::SessionKey(key));
        }
    }

    /// The time to drain is over: every client connection is closed, and every query on it is abandoned.
    pub(crate) fn drain_is_over(&mut self) {
        let keys: Vec<usize> = self.sessions.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.sessions[key].close.get_or_insert(crate::close::ClientCloseReason::Drained);
            self.sessions[key].forced = true;
            self.wake_session(crate::client::session::SessionKey(key));
        }
    }

    /// All client connections are gone: the backend connections go too.
    pub(crate) fn close_all(&mut self, now: Mono) {
        let keys: Vec<ConnKey> = self.pool.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.pool.close(key, CloseReason::Drained, now);
        }
    }

    /// The watchdog asks for a connection to be closed. What is in flight on it is retried or failed.
    pub(crate) fn close_conn(&mut self, key: ConnKey, reason: CloseReason, now: Mono) {
        self.pool.close(key, reason, now);
    }
}

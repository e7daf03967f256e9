//! Another configuration is in force: what is under way ends as it began, what comes goes by the new one.

use std::rc::Rc;

use super::backoff::{Backoff, Pause, Shortage};
use super::core::Core;
use super::plan::{Plan, PoolPlan};
use super::suspects::Suspects;
use crate::backend::choose::Chooser;
use crate::backend::concurrency::Concurrency;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::close::CloseReason;
use crate::ledger::ConnKind;

impl Core {
    /// Takes another plan, in which every pool and backend of the old one has its place.
    ///
    /// Connections that the new plan would not open like this get no query any more, and close when they have none in
    /// flight. Queries that wait look for a connection again. The limits on clients count at once, for all of them.
    pub(crate) fn reconfigure(&mut self, plan: Rc<Plan>, now: Mono) {
        let old = std::mem::replace(&mut self.plan, Rc::clone(&plan));
        let backends = plan.backends.len();
        self.pool.grow(backends);
        // As many as there are backends in the configuration, which are fewer than 65,535.
        self.moves = (0..backends as u16).map(|backend| self.shared.caps.moves(backend)).collect();
        self.backoff.resize_with(backends, Backoff::default);
        self.spare_backoff.resize_with(backends, Pause::default);
        self.shortages.resize_with(backends, Shortage::default);
        self.suspects.resize_with(backends, Suspects::default);
        self.concurrency.resize_with(backends, Concurrency::default);
        self.choosers = plan.pools.iter().map(|pool| Chooser::new(pool.policy, pool.backends.len())).collect();
        self.lines = self.queries.lines(plan.pools.iter().map(|pool| pool.query_timeout));
        for (backend, (old, new)) in old.backends.iter().zip(&plan.backends).enumerate() {
            if old.address != new.address {
                self.backoff[backend] = Backoff::default();
                self.spare_backoff[backend] = Pause::default();
                self.shortages[backend] = Shortage::default();
                self.suspects[backend].forget_marks();
                self.concurrency[backend] = Concurrency::default();
            }
        }
        self.queries.forget_tries();
        self.change_conns(&old, now);
        self.change_sessions();
        for backend in 0..backends {
            self.requeue(backend, now);
            // Fewer than 65,535, as all backends have numbers.
            self.try_suspects(backend as u16, now);
        }
        self.count_under_way();
        // What is idle for too long by the new limits goes now.
        self.next_cleanup = now;
    }

    /// A pool's number goes to no other while there are queries of it.
    fn count_under_way(&self) {
        for (pool, count) in self.queries.by_pool(self.plan.pools.len()).into_iter().enumerate() {
            self.stats.pools[pool].under_way.set(count);
        }
    }

    /// Counts again where there were some, in pools that get no more.
    pub(super) fn recount_under_way(&self) {
        let ends = |(pool, plan): (usize, &PoolPlan)| {
            plan.backends.is_empty() && self.stats.pools.get(pool).is_some_and(|stats| stats.under_way.get() > 0)
        };
        if self.plan.pools.iter().enumerate().any(ends) {
            self.count_under_way();
        }
    }

    fn change_conns(&mut self, old: &Plan, now: Mono) {
        let plan = Rc::clone(&self.plan);
        let conns: Vec<ConnKey> = self.pool.iter().map(|(key, _)| key).collect();
        for key in conns {
            let Some(conn) = self.pool.get(key) else { continue };
            let (at, unopened) = (usize::from(conn.backend), conn.permit.is_some());
            // A one-shot connection has one query, a spare one none until it is given to somebody.
            let is_fixed = matches!(conn.kind, ConnKind::OneShot | ConnKind::Spare);
            let is_right = old.backends.get(at).is_some_and(|old| old.opens_like(&plan.backends[at]));
            match (is_right, unopened) {
                (true, _) if is_fixed => {}
                (true, _) => self.pool.allow(key, plan.backends[at].max_in_flight, now),
                // Nothing was sent yet, and it must not connect to another address with the header of the old one.
                (false, true) => self.pool.close(key, CloseReason::Reconfigured, now),
                (false, false) => self.pool.retire(key, CloseReason::Reconfigured, now),
            }
        }
    }

    fn change_sessions(&mut self) {
        let keys: Vec<usize> = self.sessions.iter().map(|(key, _)| key).collect();
        for key in keys {
            let session = &mut self.sessions[key];
            let listener = &self.plan.listeners[usize::from(session.listener)];
            session.pool = listener.pool;
            session.limits = listener.limits(session.pace);
            session.headers.clear();
            session.blocked = false;
            self.settle_session(SessionKey(key));
            self.wake_session(SessionKey(key));
        }
    }

    /// Those who wait at a backend's cap ask again: it may be in no use any more, or have another cap.
    fn requeue(&mut self, backend: usize, now: Mono) {
        // Fewer than 65,535, as all backends have numbers.
        let number = backend as u16;
        self.serve_waiting(number, now);
        // Each round moves one at least: no route leads to a backend that is in no use.
        while !self.plan.backends[backend].in_use && !self.pool.line(number).is_empty() {
            self.serve_waiting(number, now);
        }
    }
}

//! Acting on a route: opening a connection under the caps, sending, waiting at a cap, and trying again.

use std::sync::atomic::Ordering;

use super::core::Core;
use super::queries::{Place, QueryKey};
use super::route::{How, Route, Wanted};
use crate::backend::pool::{ConnKey, NewConn, Phase};
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::close::{CloseReason, FailReason};
use crate::ledger::caps::AtCap;
use crate::ledger::{BackendIndex, ConnKind};
use crate::stats::Acquired;

impl Core {
    /// Decides to open a connection, if the caps allow.
    pub(super) fn open(
        &mut self,
        key: SessionKey,
        pool: u16,
        backend: BackendIndex,
        wanted: Wanted,
        how: How,
        now: Mono,
    ) -> Route {
        if self.backoff[usize::from(backend)].holds(now) {
            return Route::Fail(FailReason::ConnectFailed);
        }
        // Who came later does not overtake who waits.
        if !matches!(how, How::FromQueue { .. }) && !self.waits[usize::from(backend)].is_empty() {
            return Route::Wait(backend);
        }
        if !self.may_open(key, now) {
            return Route::Fail(FailReason::NoCapacity);
        }
        let permit = match self.shared.caps.acquire(backend) {
            Ok(permit) => permit,
            Err(cap) => {
                self.evict(backend, cap, now);
                return Route::Wait(backend);
            }
        };
        let session = &mut self.sessions[key.0];
        let owner = matches!(wanted.kind, ConnKind::Owned) || (wanted.kind == ConnKind::OneShot);
        let conn = self.pool.open(
            NewConn {
                backend,
                kind: wanted.kind,
                owner: owner.then_some(key),
                owner_serial: if owner { session.serial } else { 0 },
                header_digest: wanted.digest,
                header: wanted.header,
                permit,
                max_in_flight: if wanted.kind == ConnKind::OneShot {
                    1
                } else {
                    self.plan.backends[usize::from(backend)].max_in_flight
                },
                seed: self.random.u32(..),
                max_age: self.plan.connections.max_age,
            },
            now,
        );
        if owner {
            session.owned.push(conn);
            if session.owned.len() == self.plan.connections.max_owned_per_client {
                session.probation = Some(conn);
            }
        }
        if self.plan.pools[usize::from(pool)].proxy.is_some()
            && let Some(opened) = self.pool.get_mut(conn)
        {
            opened.out.append(&mut self.spares).extend_from_slice(&self.header);
        }
        self.wakes.open.push(conn);
        self.settle_conn(conn);
        Route::Use(conn)
    }

    /// Holds `max_opens_per_client`.
    fn may_open(&mut self, key: SessionKey, now: Mono) -> bool {
        let limit = self.plan.connections.max_opens_per_client;
        if limit == 0 {
            return true;
        }
        if now.since(self.opens_since) >= std::time::Duration::from_secs(1) {
            self.opens.clear();
            self.opens_since = now;
        }
        let opened = self.opens.entry(self.sessions[key.0].client.ip().to_canonical()).or_default();
        *opened += 1;
        *opened <= limit
    }

    /// A cap is reached: an idle connection of this worker goes, or another worker is asked for one of its own.
    fn evict(&mut self, backend: BackendIndex, cap: AtCap, now: Mono) {
        if self.pool.closing(backend) > 0 {
            // A place is about to come free; whoever else waits then asks again.
            return;
        }
        let (victim, scope) = match cap {
            AtCap::Backend => (self.pool.longest_idle(backend), Some(backend)),
            AtCap::Total => (self.pool.longest_idle_of_all(), None),
        };
        match victim {
            Some(victim) => {
                self.pool.close(victim, CloseReason::Evicted, now);
            }
            None => self.wakes.ask_eviction.push(scope),
        }
    }

    /// Another worker waits for a place.
    pub(crate) fn evict_for_other(&mut self, backend: Option<BackendIndex>, now: Mono) {
        let victim = match backend {
            Some(backend) => self.pool.longest_idle(backend),
            None => self.pool.longest_idle_of_all(),
        };
        if let Some(victim) = victim {
            self.pool.close(victim, CloseReason::Evicted, now);
        }
    }

    /// Sends a query where its route leads.
    pub(crate) fn follow(&mut self, query: QueryKey, route: Route, now: Mono) {
        match route {
            Route::Use(conn) => self.send(query, conn, now),
            Route::Wait(backend) => self.wait(query, backend, now),
            Route::Blocked => {
                if let Some(entry) = self.queries.get(query) {
                    let session = entry.session;
                    self.sessions[session.0].stalled.push(query);
                }
            }
            Route::Fail(reason) => {
                if let Some(entry) = self.queries.get(query) {
                    self.count_acquired(entry.pool, Acquired::Refused);
                }
                self.fail(query, reason);
            }
        }
    }

    fn send(&mut self, query: QueryKey, key: ConnKey, now: Mono) {
        let Some(id) = self.pool.assign(key, query, now) else {
            // The route was found in this very step: only a connection without IDs left can refuse.
            self.fail(query, FailReason::NoCapacity);
            return;
        };
        let (Some(entry), Some(conn)) = (self.queries.get_mut(query), self.pool.get_mut(key)) else { return };
        entry.place = Place::Sent { conn: key, id };
        entry.sent = now;
        conn.out.push_message(&mut self.spares, &entry.message, id);
        let acquired = match (conn.carried, conn.kind) {
            (1, ConnKind::OneShot) => Acquired::OneShot,
            (1, _) => Acquired::New,
            _ => Acquired::Hit,
        };
        let pool = entry.pool;
        let stats = &self.stats.backends[usize::from(conn.backend)];
        stats.queries.add(1);
        if acquired == Acquired::Hit {
            stats.reused.add(1);
        }
        self.count_acquired(pool, acquired);
        if self.pool.get(key).is_some_and(|conn| conn.phase == Phase::Open) {
            self.wake_conn(key);
        }
    }

    fn wait(&mut self, query: QueryKey, backend: BackendIndex, now: Mono) {
        let limit = self.plan.connections.max_waiting;
        let counted = self
            .shared
            .waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| (waiting < limit).then_some(waiting + 1));
        let Some(entry) = self.queries.get_mut(query) else {
            if counted.is_ok() {
                self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
            }
            return;
        };
        let pool = entry.pool;
        if counted.is_err() {
            self.count_acquired(pool, Acquired::Refused);
            self.fail(query, FailReason::NoCapacity);
            return;
        }
        entry.place = Place::Waiting;
        let session = entry.session;
        self.waits[usize::from(backend)].push(session, query, now.after(self.plan.connections.max_wait));
        self.stats.waiting.add(1);
        self.count_acquired(pool, Acquired::Wait);
    }

    /// A place may have become free: serves those that wait for this backend, in turn.
    pub(crate) fn serve_waiting(&mut self, backend: BackendIndex, now: Mono) {
        while let Some((session, query)) = self.waits[usize::from(backend)].pop() {
            let Some((message, pool, how)) = self.queries.get_mut(query).map(|entry| {
                let how = How::FromQueue { fresh_only: entry.fresh_only, avoid: entry.avoid };
                (std::mem::take(&mut entry.message), entry.pool, how)
            }) else {
                continue;
            };
            let question = crate::dns::message::first_question(&message).and_then(Result::ok);
            let route = self.route(session, pool, question, how, now);
            let Some(entry) = self.queries.get_mut(query) else { continue };
            entry.message = message;
            if let Route::Wait(still) = route {
                if still == backend {
                    self.waits[usize::from(backend)].put_back(session, query);
                } else {
                    // Another backend has become the better choice, and is at its cap as well.
                    let until = entry.deadline;
                    self.waits[usize::from(still)].push(session, query, until);
                }
                return;
            }
            entry.place = Place::Nowhere;
            self.waited();
            self.follow(query, route, now);
        }
    }

    /// Looks for another connection for a query that has none any more.
    pub(crate) fn reroute(&mut self, query: QueryKey, now: Mono) {
        let Some(entry) = self.queries.get_mut(query) else { return };
        entry.place = Place::Nowhere;
        let (session, pool) = (entry.session, entry.pool);
        let how = if entry.fresh_only {
            How::Again { avoid: entry.avoid }
        } else {
            How::FromQueue { fresh_only: false, avoid: None }
        };
        let message = std::mem::take(&mut entry.message);
        let question = crate::dns::message::first_question(&message).and_then(Result::ok);
        let route = self.route(session, pool, question, how, now);
        if let Some(entry) = self.queries.get_mut(query) {
            entry.message = message;
        }
        self.follow(query, route, now);
    }
}

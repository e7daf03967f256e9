//! Acting on a route: opening a connection under the caps, sending, waiting at a cap, and trying again.

use std::net::IpAddr;
use std::rc::Rc;

use super::core::Core;
use super::links::Maybe;
use super::queries::{Place, QueryKey};
use super::route::{How, Route, Wanted};
use crate::backend::pool::{Assigned, ConnKey, NewConn, Phase};
use crate::backend::wait::{WaitQueue, Waiter};
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::close::FailReason;
use crate::ledger::caps::{AtCap, Permit};
use crate::ledger::{BackendIndex, ConnKind};
use crate::proxy_protocol::seal;
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
        if self.backoff[usize::from(backend)].holds_back(|| self.client_of(key), now) {
            return Route::Fail(FailReason::ConnectFailed);
        }
        // Who came later does not overtake who waits, unless it holds less: then it would be served next anyway.
        let has_turn = matches!(how, How::FromQueue { .. } | How::Apart { .. });
        if !has_turn && !self.pool.line(backend).is_next(self.party_of(key)) {
            self.gives_own_idle(key, backend, now);
            return Route::Wait(backend);
        }
        if self.shortages[usize::from(backend)].holds(now) {
            return Route::Wait(backend);
        }
        if !how.is_apart() && !self.may_open(key, now) {
            return Route::Fail(FailReason::NoCapacity);
        }
        if !how.is_apart() && !self.leaves_room(key, backend, now) {
            self.find_own_place(key, wanted.digest, backend, now);
            return Route::Wait(backend);
        }
        let session = &self.sessions[key.0];
        let owner = matches!(wanted.kind, ConnKind::Owned | ConnKind::OneShot);
        let digest = wanted.digest;
        let assigned = Assigned {
            kind: wanted.kind,
            owner: owner.then_some(key),
            owner_serial: if owner { session.serial } else { 0 },
            holder: self.holder_of(key, wanted.kind),
            header_digest: wanted.digest,
            header: wanted.header,
            apart: how.is_apart(),
            max_in_flight: if wanted.kind == ConnKind::OneShot {
                1
            } else {
                self.plan.backends[usize::from(backend)].max_in_flight
            },
        };
        let conn = match self.obtain(backend, assigned, wanted.fresh || how.fresh_only(), now) {
            Ok(conn) => conn,
            Err(cap) => {
                self.find_place((key, digest), backend, cap, now);
                return Route::Wait(backend);
            }
        };
        let client = self.client_of(key);
        self.backoff[usize::from(backend)].tries(client, now);
        self.count_open(key);
        let session = &mut self.sessions[key.0];
        if owner {
            if session.owned.is_empty() {
                // Most clients own one.
                session.owned.reserve_exact(1);
            }
            session.owned.push(conn);
            if session.owned.len() == self.plan.connections.max_owned_per_client {
                session.probation = Maybe::new(Some(conn.0));
            }
        }
        self.write_first(conn, pool);
        self.keep_spares(backend, now);
        Route::Use(conn)
    }

    /// Puts the header, complete for this connection, in front of all that goes over it.
    fn write_first(&mut self, key: ConnKey, pool: u16) {
        let Some(proxy) = &self.plan.pools[usize::from(pool)].proxy else { return };
        let Some(conn) = self.pool.get_mut(key) else { return };
        let out = conn.out.append(&mut self.spares);
        let start = out.len();
        out.extend_from_slice(&self.header);
        if !proxy.seal.is_empty() || proxy.tlvs.has_ids() {
            let id = seal::identifier(self.random.u128(..));
            proxy.seal.apply(out, start, &proxy.tlvs, &id);
            let id = String::from_utf8_lossy(&id);
            tracing::debug!(backend = self.plan.backends[usize::from(conn.backend)].name, %id, "unique ID of a connection");
        }
        if self.plan.backends[usize::from(conn.backend)].tls.is_some() {
            // A header is at most 64 KiB long.
            conn.header_left = (out.len() - start) as u32;
        }
    }

    /// A spare connection, or a new one if the caps allow. One that must be fresh is never spare: its peer may have
    /// closed it already.
    fn obtain(&mut self, backend: BackendIndex, assigned: Assigned, fresh: bool, now: Mono) -> Result<ConnKey, AtCap> {
        if !fresh && let Some(spare) = self.pool.ready_spare(backend) {
            self.pool.give_spare(spare, assigned, now);
            if self.plan.backends[usize::from(backend)].header_in_clear() {
                // It knows now what goes before the handshake.
                self.pool.reconnects(spare, now);
                self.settle_conn(spare);
                self.wake_conn(spare);
            }
            return Ok(spare);
        }
        let permit = self.permit(backend, now)?;
        self.shortages[usize::from(backend)].tries(now);
        Ok(self.begin(backend, assigned, permit, now))
    }

    /// Decides to open a connection.
    fn begin(&mut self, backend: BackendIndex, assigned: Assigned, permit: Permit, now: Mono) -> ConnKey {
        let Assigned { kind, owner, owner_serial, holder, header_digest, header, apart, max_in_flight } = assigned;
        let seed = self.random.u32(..);
        let max_age = self.plan.connections.max_age;
        let new = NewConn {
            backend,
            kind,
            owner,
            owner_serial,
            holder,
            header_digest,
            header,
            apart,
            permit,
            max_in_flight,
            seed,
            max_age,
        };
        let conn = self.pool.open(new, now);
        // Its task arms the deadline of connecting, unless that is over at once.
        self.wakes.open.push(conn);
        conn
    }

    /// A new connection was needed, so others will be: has as many ready as configured, as far as the caps leave places
    /// that nobody waits for. Without need none is opened, so a backend that is not asked is left alone.
    fn keep_spares(&mut self, backend: BackendIndex, now: Mono) {
        let at = usize::from(backend);
        let fails = self.backoff[at].is_failing() || self.shortages[at].is_felt();
        if self.draining || fails || self.spare_backoff[at].holds(now) {
            return;
        }
        while self.pool.spares(backend) < self.plan.connections.spares_per_backend {
            let Ok(permit) = self.permit(backend, now) else { return };
            self.spare_backoff[at].tries(now);
            let spare = Assigned {
                kind: ConnKind::Spare,
                owner: None,
                owner_serial: 0,
                holder: None,
                header_digest: 0,
                header: Rc::default(),
                apart: false,
                max_in_flight: 1,
            };
            self.begin(backend, spare, permit, now);
            if self.spare_backoff[at].holds(now) {
                return;
            }
        }
    }

    /// Whether one more connection could be opened for this client without making room for it. Where the client owns its
    /// connections, the last place is for another header.
    pub(super) fn may_add(&mut self, key: SessionKey, backend: BackendIndex, now: Mono) -> bool {
        let at = usize::from(backend);
        let is_free = self.shared.caps.has_place_for(self.worker, backend, now);
        let has_place = is_free || self.pool.ready_spare(backend).is_some();
        has_place
            && self.pool.line(backend).is_empty()
            && self.leaves_room(key, backend, now)
            && self.sessions[key.0].owned.len() + 1 < self.plan.connections.max_owned_per_client
            && !self.shortages[at].is_felt()
            && !self.backoff[at].holds_back(|| self.client_of(key), now)
            && self.may_open(key, now)
    }

    /// Holds `max_opens_per_client`, by what [`Self::count_open`] has counted.
    fn may_open(&mut self, key: SessionKey, now: Mono) -> bool {
        let limit = self.plan.connections.max_opens_per_client;
        if limit == 0 {
            return true;
        }
        if now.since(self.opens_since) >= std::time::Duration::from_secs(1) {
            self.opens.clear();
            self.opens_since = now;
        }
        self.opens.get(&self.client_of(key)).is_none_or(|opened| *opened < limit)
    }

    /// A connection was opened, or a spare one taken. To have tried in vain does not count: who waits tries often.
    fn count_open(&mut self, key: SessionKey) {
        if self.plan.connections.max_opens_per_client > 0 {
            let client = self.client_of(key);
            *self.opens.entry(client).or_default() += 1;
        }
    }

    /// Who counts as one client with this one.
    pub(super) fn client_of(&self, key: SessionKey) -> IpAddr {
        let session = &self.sessions[key.0];
        self.plan.listeners[usize::from(session.listener)].client(session.client.ip())
    }

    /// Sends a query where its route leads.
    pub(crate) fn follow(&mut self, query: QueryKey, route: Route, now: Mono) {
        match route {
            Route::Use(conn) => self.send(query, conn, now),
            Route::Wait(backend) => self.wait(query, backend, now),
            Route::Apart(backend) => self.set_apart(query, backend, now),
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

    pub(super) fn send(&mut self, query: QueryKey, key: ConnKey, now: Mono) {
        let Some(id) = self.pool.assign(key, query, now) else {
            // The route was found in this very step: only a connection without IDs left can refuse.
            self.fail(query, FailReason::NoCapacity);
            return;
        };
        let (Some(entry), Some(conn)) = (self.queries.get_mut(query), self.pool.get_mut(key)) else { return };
        entry.place = Place::Sent { conn: key, id };
        (entry.sent, entry.turn) = (now, conn.carried);
        conn.transfer = entry.transfer.is_some().then_some(query);
        conn.out.push_message(&mut self.spares, &entry.message, id);
        let acquired = match (conn.carried, conn.kind) {
            (1, _) if conn.was_spare => Acquired::Spare,
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
        let Some((session, pool)) = self.queries.get(query).map(|entry| (entry.session, entry.pool)) else { return };
        let client = self.party_of(session);
        if !self.may_wait(client, backend) {
            self.count_acquired(pool, Acquired::Refused);
            self.fail(query, FailReason::NoCapacity);
            return;
        }
        if let Some(entry) = self.queries.get_mut(query) {
            entry.place = Place::Waiting;
        }
        let until = now.after(self.plan.connections.max_wait);
        self.pool.line_mut(backend).push(Waiter { client, session, query, until }, now);
        self.stats.waiting.add(1);
        self.count_acquired(pool, Acquired::Wait);
    }

    /// Another worker has closed a connection, or a health check is over: serves those that wait.
    pub(crate) fn capacity_freed(&mut self, now: Mono) {
        self.pool.lines_mut().for_each(WaitQueue::was_heard);
        self.serve_all_waiting(now);
    }

    /// A place may have become free: serves those that wait, in turn; of the backends, too, each is the first in turn.
    pub(super) fn serve_all_waiting(&mut self, now: Mono) {
        if self.stats.waiting.get() == 0 {
            return;
        }
        let backends = self.plan.backends.len();
        let first = self.first_line;
        for backend in (first..backends).chain(0..first.min(backends)) {
            // As many as there are backends in the configuration, which are fewer than 65,535.
            let number = backend as u16;
            if !self.pool.line(number).is_empty() {
                self.first_line = backend + 1;
                self.serve_waiting(number, now);
            }
        }
    }

    /// The same for this backend.
    pub(crate) fn serve_waiting(&mut self, backend: BackendIndex, now: Mono) {
        while let Some(next) = self.pool.line_mut(backend).pop() {
            if !self.serve(backend, next, now) {
                return;
            }
        }
        self.shared.caps.withdraw(self.worker, backend);
    }

    /// Serves a query that waited, with the turn that its client had. False: it waits on.
    pub(super) fn serve(&mut self, backend: BackendIndex, next: (Waiter, u64), now: Mono) -> bool {
        let (waiter, _) = next;
        let Waiter { session, query, .. } = waiter;
        let Some((message, pool, alone, how)) = self.queries.get_mut(query).map(|entry| {
            let how = How::FromQueue { fresh_only: entry.fresh_only, tried: entry.tried };
            // A reload may have given its listener another pool.
            entry.pool = self.sessions[session.0].pool;
            (std::mem::take(&mut entry.message), entry.pool, entry.transfer.is_some(), how)
        }) else {
            return true;
        };
        let question = crate::dns::message::first_question(&message).and_then(Result::ok);
        let route = self.route(session, pool, question, alone, how, now);
        let Some(entry) = self.queries.get_mut(query) else { return true };
        entry.message = message;
        if let Route::Wait(still) = route {
            if still == backend {
                self.pool.line_mut(backend).put_back(next, now);
                return false;
            }
            // Another backend has become the better choice, and is at its cap as well. The place is for the next one.
            self.pool.line_mut(still).push(waiter, now);
            return true;
        }
        entry.place = Place::Nowhere;
        self.waited();
        self.follow(query, route, now);
        true
    }

    /// Looks for another connection for a query that has none any more.
    pub(crate) fn reroute(&mut self, query: QueryKey, now: Mono) {
        let Some(entry) = self.queries.get_mut(query) else { return };
        entry.place = Place::Nowhere;
        // A reload may have given its listener another pool.
        entry.pool = self.sessions[entry.session.0].pool;
        let (session, pool, alone) = (entry.session, entry.pool, entry.transfer.is_some());
        let how = if entry.fresh_only {
            How::Again { tried: entry.tried }
        } else {
            How::FromQueue { fresh_only: false, tried: entry.tried }
        };
        let message = std::mem::take(&mut entry.message);
        let question = crate::dns::message::first_question(&message).and_then(Result::ok);
        let route = self.route(session, pool, question, alone, how, now);
        if let Some(entry) = self.queries.get_mut(query) {
            entry.message = message;
        }
        self.follow(query, route, now);
    }
}

//! Asking suspects apart: what [`Suspects`](super::suspects::Suspects) decides is done here.

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use super::core::Core;
use super::queries::QueryKey;
use super::route::{How, Route};
use super::suspects::{Class, Group};
use crate::backend::pool::ConnKey;
use crate::clock::Mono;
use crate::close::{CloseReason, FailReason};
use crate::dns::message::{OPCODE_QUERY, Peek, peek};
use crate::ledger::{BackendIndex, ConnKind};

/// A connection that its peer brought to an end, with queries in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Death {
    pub(super) backend: BackendIndex,
    /// It was for suspects.
    pub(super) apart: bool,
    /// The query was the only one that it has carried, so there is no doubt.
    pub(super) certain: bool,
    pub(super) opened: Mono,
    /// What a query fails with that is not asked again.
    pub(super) failed: FailReason,
}

/// Where a suspect can be tried.
enum Spot {
    At(ConnKey),
    /// There is no place under the limits.
    NotNow,
    /// It has failed, or went to another backend.
    Gone,
}

/// Whether a message is put on no connection of others: what a server makes of it is less sure than of a question, and
/// if it may not be asked twice it could not be saved where another one brings the connection down.
pub(super) fn is_unusual(peek: &Peek) -> bool {
    peek.opcode != OPCODE_QUERY || peek.qdcount != 1
}

impl Core {
    /// Whether a query of this client is asked apart from those of others.
    pub(super) fn is_asked_apart(&self, client: impl FnOnce() -> IpAddr, backend: BackendIndex, now: Mono) -> bool {
        self.suspects[usize::from(backend)].is_marked(client, now)
    }

    /// Whether this query may be asked a second time (RFC 7766 section 6.2.4).
    fn may_be_asked_again(&self, query: QueryKey) -> bool {
        let entry = self.queries.get(query);
        entry.is_some_and(|entry| {
            entry.transfer.is_none() && peek(&entry.message).is_some_and(|peek| peek.opcode == OPCODE_QUERY)
        })
    }

    /// A connection has died with these in flight. One that was alone is convicted, if there is no doubt; others are asked
    /// again, apart.
    pub(super) fn accuse(&mut self, death: &Death, queries: &[QueryKey], now: Mono) {
        let mut suspects = Vec::with_capacity(queries.len());
        let mut sent = death.opened;
        for query in queries.iter().copied() {
            let Some(entry) = self.queries.get(query) else { continue };
            let client = self.client_of(entry.session);
            sent = sent.max(entry.sent);
            suspects.push((query, client));
        }
        let took = now.since(sent);
        let at = usize::from(death.backend);
        let (again, lost): (Vec<_>, Vec<_>) =
            suspects.into_iter().partition(|(query, _)| self.may_be_asked_again(*query));
        let alone = queries.len() == 1 && death.certain;
        for (query, client) in lost {
            if alone {
                self.convict(death, client, took, now);
            }
            self.shared.health.query_failed(death.backend);
            self.fail(query, death.failed);
        }
        match &again[..] {
            [] => {}
            [(query, client)] if alone => {
                self.convict(death, *client, took, now);
                if self.tries_again(*query, death.backend, false, false, death.failed, now) {
                    self.ask_apart(vec![*query], took, now);
                }
            }
            _ => {
                for (query, _) in &again {
                    if let Some(entry) = self.queries.get(*query) {
                        self.stats.pools[usize::from(entry.pool)].repeats.add(1);
                    }
                }
                for group in self.suspects[at].split(&again, took, now).into_iter().flatten() {
                    self.suspects[at].push(group);
                }
            }
        }
        self.try_suspects(death.backend, now);
    }

    /// A query of this client was alone on a connection that died. A backend that answers nobody proves nothing.
    fn convict(&mut self, death: &Death, client: IpAddr, took: Duration, now: Mono) {
        self.stats.backends[usize::from(death.backend)].convicted.add(1);
        if death.apart && self.backoff[usize::from(death.backend)].has_answered_lately(now) {
            self.suspects[usize::from(death.backend)].convict(client, took, now);
        }
    }

    /// Suspects look for a backend: the best one that has not failed the first of them, if there is one.
    pub(super) fn ask_apart(&mut self, queries: Vec<QueryKey>, took: Duration, now: Mono) {
        let Some((first, session, pool, tried)) = queries.iter().find_map(|query| {
            let entry = self.queries.get(*query)?;
            Some((*query, entry.session, entry.pool, entry.tried))
        }) else {
            return;
        };
        let message = self.queries.get_mut(first).map(|entry| std::mem::take(&mut entry.message)).unwrap_or_default();
        let question = crate::dns::message::first_question(&message).and_then(Result::ok);
        let how = How::FromQueue { fresh_only: false, tried };
        let chosen = self.choose_backend(session, pool, question, how, now);
        if let Some(entry) = self.queries.get_mut(first) {
            entry.message = message;
        }
        let Some(backend) = chosen else {
            for query in queries {
                self.fail(query, FailReason::NoBackend);
            }
            return;
        };
        let marked = self.is_asked_apart(|| self.client_of(session), backend, now);
        let class = if marked { Class::Marked } else { Class::Clear };
        self.suspects[usize::from(backend)].push(Group { queries, class, took, of: None });
        self.try_suspects(backend, now);
    }

    /// A query that just came is to be asked apart.
    pub(super) fn set_apart(&mut self, query: QueryKey, backend: BackendIndex, now: Mono) {
        let Some(session) = self.queries.get(query).map(|entry| entry.session) else { return };
        let client = self.client_of(session);
        if self.suspects[usize::from(backend)].push_fresh(query, client, now) {
            self.try_suspects(backend, now);
        } else {
            self.fail(query, FailReason::NoCapacity);
        }
    }

    /// Tries the suspects whose turn it is, as far as there are places for them.
    pub(super) fn try_suspects(&mut self, backend: BackendIndex, now: Mono) {
        let at = usize::from(backend);
        self.try_groups(backend, now);
        let listed = self.suspected.iter().position(|listed| *listed == backend);
        match (self.suspects[at].waiting(), listed) {
            (0, Some(listed)) => drop(self.suspected.swap_remove(listed)),
            (1.., None) => self.suspected.push(backend),
            _ => {}
        }
    }

    fn try_groups(&mut self, backend: BackendIndex, now: Mono) {
        let at = usize::from(backend);
        if self.suspects[at].waiting() == 0 {
            return;
        }
        while let Some(mut group) = self.suspects[at].next(now) {
            group.queries.retain(|query| self.queries.get(*query).is_some());
            if !group.queries.is_empty() && !self.try_group(backend, group, now) {
                return;
            }
        }
    }

    /// Opens a connection for a group. False: there is no place for it now, and it waits.
    fn try_group(&mut self, backend: BackendIndex, mut group: Group, now: Mono) -> bool {
        let at = usize::from(backend);
        let mut rest = group.queries.split_off(1);
        let Some((conn, first)) =
            group.queries.first().copied().and_then(|first| match self.spot_apart(first, backend, now) {
                Spot::At(conn) => Some((Some(conn), first)),
                Spot::NotNow => Some((None, first)),
                Spot::Gone => None,
            })
        else {
            // The first one is elsewhere; the others are still here.
            if !rest.is_empty() {
                group.queries = rest;
                self.suspects[at].push(group);
            }
            return true;
        };
        let Some(conn) = conn else {
            group.queries.append(&mut rest);
            self.suspects[at].put_back(group, now);
            self.make_way(backend, now);
            return false;
        };
        self.suspects[at].began(conn, &group, now);
        self.send(first, conn, now);
        for query in rest {
            if self.fits(query, conn) {
                self.send(query, conn, now);
            } else {
                self.suspects[at].push(Group { queries: vec![query], ..group.clone() });
            }
        }
        true
    }

    /// A connection for this query and those that are asked with it.
    fn spot_apart(&mut self, query: QueryKey, backend: BackendIndex, now: Mono) -> Spot {
        let Some(entry) = self.queries.get_mut(query) else { return Spot::Gone };
        // A reload may have given its listener another pool.
        entry.pool = self.sessions[entry.session.0].pool;
        let (session, pool, tried) = (entry.session, entry.pool, entry.tried);
        let has_backend = self.plan.pools[usize::from(pool)].backends.contains(&backend);
        let held_back = self.backoff[usize::from(backend)].holds_back(|| self.client_of(session), now);
        if !has_backend || !self.shared.health.is_usable(backend) || held_back {
            if has_backend && !self.has_another_backend(session, pool, tried, now) {
                let reason = if held_back { FailReason::ConnectFailed } else { FailReason::NoBackend };
                self.fail(query, reason);
            } else {
                // It does not come back here before it was tried there.
                let place = self.plan.pools[usize::from(pool)].backends.iter().position(|other| *other == backend);
                if let Some(entry) = self.queries.get_mut(query) {
                    entry.tried.add(place.unwrap_or(usize::MAX));
                }
                self.ask_apart(vec![query], Duration::ZERO, now);
            }
            return Spot::Gone;
        }
        let Some(entry) = self.queries.get_mut(query) else { return Spot::Gone };
        let message = std::mem::take(&mut entry.message);
        let question = crate::dns::message::first_question(&message).and_then(Result::ok);
        let route = self.route(session, pool, question, false, How::Apart { backend }, now);
        if let Some(entry) = self.queries.get_mut(query) {
            entry.message = message;
        }
        match route {
            Route::Use(conn) => Spot::At(conn),
            Route::Wait(_) | Route::Blocked | Route::Apart(_) => Spot::NotNow,
            Route::Fail(reason) => {
                self.fail(query, reason);
                Spot::Gone
            }
        }
    }

    /// Whether a query can go over this connection, too: the same header, and there is room.
    fn fits(&mut self, query: QueryKey, key: ConnKey) -> bool {
        let Some(entry) = self.queries.get_mut(query) else { return true };
        entry.pool = self.sessions[entry.session.0].pool;
        let (session, pool) = (entry.session, entry.pool);
        let plan = Rc::clone(&self.plan);
        let Some((backend, owner)) =
            self.pool.get(key).filter(|conn| conn.has_room()).map(|conn| (conn.backend, conn.owner()))
        else {
            return false;
        };
        if owner.is_some_and(|owner| owner != session) || !plan.pools[usize::from(pool)].backends.contains(&backend) {
            return false;
        }
        let Some(proxy) = &plan.pools[usize::from(pool)].proxy else {
            return self.pool.get(key).is_some_and(|conn| conn.kind == ConnKind::Shared);
        };
        let Some(entry) = self.queries.get_mut(query) else { return true };
        let message = std::mem::take(&mut entry.message);
        let question = crate::dns::message::first_question(&message).and_then(Result::ok);
        let digest = self.write_header(session, backend, proxy, question);
        if let Some(entry) = self.queries.get_mut(query) {
            entry.message = message;
        }
        let same = |digest| {
            self.pool.get(key).is_some_and(|conn| conn.header_digest == digest && *conn.header == *self.header)
        };
        digest.is_ok_and(same)
    }

    /// Suspects find no place under the limits, and no idle connection could be closed for them: one that others share is
    /// closed when its queries are answered, and those that come wait for their turn as they would at a cap.
    fn make_way(&mut self, backend: BackendIndex, now: Mono) {
        let is_full = self.shared.caps.backend(backend).is_none_or(|(limit, used)| used >= limit);
        if is_full
            && self.pool.closing(backend) == 0
            && let Some(shared) = self.pool.shared(backend)
        {
            self.pool.retire(shared, CloseReason::Evicted, now);
        }
    }

    /// All that was on this connection is answered.
    pub(super) fn trial_is_over(&mut self, key: ConnKey, now: Mono) {
        let Some(backend) = self.pool.get(key).map(|conn| conn.backend) else { return };
        if self.suspects[usize::from(backend)].survived(key) {
            self.pool.release(key, now);
        }
        self.try_suspects(backend, now);
    }
}

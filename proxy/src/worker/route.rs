//! Finding a connection for a query: section 3 of the design.

use std::rc::Rc;

use super::core::Core;
use super::plan::{BackendPlan, Plan, ProxyPlan};
use super::queries::Tried;
use crate::backend::choose::{Candidate, digest};
use crate::backend::pool::{Conn, ConnKey, Phase, Pool};
use crate::client::session::{Header, SessionKey};
use crate::clock::Mono;
use crate::close::{CloseReason, FailReason};
use crate::dns::message::Question;
use crate::health::Board;
use crate::ledger::{BackendIndex, ConnKind};
use crate::proxy_protocol::encode::HeaderWriter;
use crate::proxy_protocol::template::Context;
use crate::proxy_protocol::tlv;

/// Where a query goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// On this connection.
    Use(ConnKey),
    /// Into the queue of this backend.
    Wait(BackendIndex),
    /// Apart from the queries of others, at this backend.
    Apart(BackendIndex),
    /// Nowhere until one of its client's connections is idle.
    Blocked,
    /// Nowhere.
    Fail(FailReason),
}

/// The circumstances of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// A query that just came; what is `unusual` goes on no connection of others.
    First { unusual: bool },
    /// A query that comes from the queue of a cap: those behind it do not matter.
    FromQueue { fresh_only: bool, tried: Tried },
    /// A query whose connection died: only a connection that has carried nothing yet will do.
    Again { tried: Tried },
    /// A suspect: only a new connection to this backend will do, which nobody else gets.
    Apart { backend: BackendIndex },
}

impl How {
    /// The backend that the connection must be to.
    fn backend(self) -> Option<BackendIndex> {
        match self {
            Self::Apart { backend } => Some(backend),
            _ => None,
        }
    }

    pub(super) fn is_apart(self) -> bool {
        matches!(self, Self::Apart { .. })
    }

    pub(super) fn fresh_only(self) -> bool {
        matches!(self, Self::Again { .. } | Self::Apart { .. } | Self::FromQueue { fresh_only: true, .. })
    }

    fn tried(self) -> Tried {
        match self {
            Self::First { .. } | Self::Apart { .. } => Tried::default(),
            Self::FromQueue { tried, .. } | Self::Again { tried } => tried,
        }
    }
}

/// What a new connection would be.
pub(super) struct Wanted {
    pub(super) kind: ConnKind,
    pub(super) digest: u64,
    pub(super) header: Rc<[u8]>,
    /// Its query is never retried: no spare connection will do, as its peer may just have closed it.
    pub(super) fresh: bool,
}

impl Core {
    /// Finds a connection, or decides to open one. A zone transfer gets one for itself: `alone`.
    pub(crate) fn route(
        &mut self,
        session: SessionKey,
        pool: u16,
        question: Option<Question<'_>>,
        alone: bool,
        how: How,
        now: Mono,
    ) -> Route {
        if alone && !self.may_transfer(session) {
            return Route::Fail(FailReason::NoCapacity);
        }
        let plan = Rc::clone(&self.plan);
        let proxy = plan.pools[usize::from(pool)].proxy.as_ref();
        if let Some(proxy) = proxy.filter(|proxy| proxy.owned) {
            return self.route_owned(session, (pool, proxy), question, alone, how, now);
        }
        let Some(backend) = how.backend().or_else(|| self.choose_backend(session, pool, question, how, now)) else {
            return Route::Fail(FailReason::NoBackend);
        };
        let apart = !alone && self.goes_apart(session, backend, how, now);
        let Some(proxy) = proxy else {
            if apart {
                return self.own_survivor(session, backend, None, now);
            }
            let found = self.pool.shared(backend).filter(|_| !alone && !how.is_apart());
            let least = |core: &Self| core.pool.least_shared(backend);
            return match self.place(session, found, least, how, now) {
                Some(conn) => Route::Use(conn),
                None => {
                    let kind = if alone { ConnKind::OneShot } else { ConnKind::Shared };
                    let wanted = Wanted { kind, digest: 0, header: Rc::default(), fresh: alone };
                    self.open(session, pool, backend, wanted, how, now)
                }
            };
        };
        let digest = match self.write_header(session, backend, proxy, question) {
            Ok(digest) => digest,
            Err(reason) => return Route::Fail(reason),
        };
        let one_shot = proxy.unique || alone;
        if apart && !one_shot {
            return self.own_survivor(session, backend, Some(digest), now);
        }
        let found = self.pool.keyed(backend, digest, &self.header).filter(|_| !one_shot && !how.is_apart());
        let least = |core: &Self| core.pool.least_keyed(backend, digest, &core.header);
        match self.place(session, found, least, how, now) {
            Some(conn) => Route::Use(conn),
            None => {
                let kind = if one_shot { ConnKind::OneShot } else { ConnKind::Keyed };
                let wanted = Wanted { kind, digest, header: Rc::from(self.header.as_slice()), fresh: alone };
                self.open(session, pool, backend, wanted, how, now)
            }
        }
    }

    /// The connection for a query of those that it may share: `packed`, the fullest, unless the backend works on one query
    /// at a time for each. Then one without others, even a new one if there is a place for it, else that with the fewest.
    fn place(
        &mut self,
        session: SessionKey,
        packed: Option<ConnKey>,
        least: impl Fn(&Self) -> Option<ConnKey>,
        how: How,
        now: Mono,
    ) -> Option<ConnKey> {
        let packed = packed?;
        let conn = self.pool.get(packed)?;
        if how.fresh_only() {
            return (conn.phase == Phase::Connecting).then_some(packed);
        }
        let backend = conn.backend;
        if conn.unanswered() == 0 || !self.concurrency[usize::from(backend)].prefers_alone() {
            return Some(packed);
        }
        let least = least(self)?;
        let is_busy = self.pool.get(least).is_some_and(|conn| conn.unanswered() > 0);
        let adds =
            is_busy && self.may_add(session, backend, now) && self.concurrency[usize::from(backend)].takes_credit();
        (!adds).then_some(least)
    }

    /// Whether a query may not be on a connection of others: its client was convicted, or it is unusual itself.
    fn goes_apart(&self, session: SessionKey, backend: BackendIndex, how: How, now: Mono) -> bool {
        match how {
            How::First { unusual: true } => true,
            How::First { .. } | How::FromQueue { .. } => self.is_asked_apart(|| self.client_of(session), backend, now),
            How::Again { .. } | How::Apart { .. } => false,
        }
    }

    /// A connection that only this client's queries are on, with the header that has just been written, if there is one.
    fn own_survivor(&self, session: SessionKey, backend: BackendIndex, digest: Option<u64>, now: Mono) -> Route {
        let fits = |key: &ConnKey| {
            let conn = self.pool.get(*key).filter(|conn| conn.has_room());
            conn.is_some_and(|conn| match digest {
                Some(digest) => conn.header_digest == digest && *conn.header == *self.header,
                None => conn.kind == ConnKind::Shared,
            })
        };
        let mut survivors = self.suspects[usize::from(backend)].survivors(self.client_of(session), now);
        survivors.find(fits).map_or(Route::Apart(backend), Route::Use)
    }

    /// The backend that the pool's policy chooses.
    pub(super) fn choose_backend(
        &mut self,
        session: SessionKey,
        pool: u16,
        question: Option<Question<'_>>,
        how: How,
        now: Mono,
    ) -> Option<BackendIndex> {
        let Self { plan, pool: conns, sessions, backoff, shortages, choosers, random, shared, .. } = self;
        let session = &sessions[session.0];
        let client = || plan.listeners[usize::from(session.listener)].client(session.client.ip());
        let backends = plan.pools[usize::from(pool)].backends.as_slice();
        let chooser = &mut choosers[usize::from(pool)];
        let name = question.filter(|_| chooser.needs_question()).map_or(0, |question| digest(question.name_wire));
        let of = |at: usize| {
            let backend = usize::from(backends[at]);
            let held_back = shortages[backend].holds(now) || backoff[backend].holds_back(client, now);
            candidate(plan, conns, &shared.health, (at, backends[at]), held_back, how)
        };
        let chosen = chooser.choose(of, name, random)?;
        backends.get(chosen).copied()
    }

    /// Whether the client that owns a connection to this backend stays there, by its pool's policy.
    fn keeps_backend(&self, session: SessionKey, pool: u16, backend: BackendIndex, how: How, now: Mono) -> bool {
        let backends = self.plan.pools[usize::from(pool)].backends.as_slice();
        let of = |at: usize| {
            let held_back = self.backoff[usize::from(backends[at])].holds_back(|| self.client_of(session), now);
            candidate(&self.plan, &self.pool, &self.shared.health, (at, backends[at]), held_back, how)
        };
        let place = backends.iter().position(|other| *other == backend);
        place.is_some_and(|at| self.choosers[usize::from(pool)].keeps(at, of))
    }

    /// Writes the query's header into `self.header`; returns its digest. A header that is the same for all queries of
    /// the client connection is rendered once.
    pub(super) fn write_header(
        &mut self,
        key: SessionKey,
        backend: BackendIndex,
        proxy: &ProxyPlan,
        question: Option<Question<'_>>,
    ) -> Result<u64, FailReason> {
        use std::hash::BuildHasher as _;

        let session = &mut self.sessions[key.0];
        self.header.clear();
        if !proxy.per_query
            && let Some((_, header)) = session.headers.iter().find(|(of, _)| *of == backend)
        {
            self.header.extend_from_slice(&header.bytes);
            self.stats.pools[usize::from(session.pool)].headers.record(header.digest);
            return Ok(header.digest);
        }
        let listener = &self.plan.listeners[usize::from(session.listener)];
        let own_side = self.plan.backends[usize::from(backend)].own_side;
        // A connection's header names the very address that it reached; one that is shared names the listener's.
        let local = if proxy.identity.is_per_connection() || listener.address.port() == 0 {
            session.local
        } else {
            listener.address
        };
        let (source, destination) = proxy.identity.endpoints(session.client, local, own_side);
        let random = if proxy.unique { self.random.u128(..) } else { 0 };
        let incoming = session.incoming();
        let (client, tls) = (session.client, session.tls());
        let sni = tls.map_or("", |tls| &*tls.sni);
        let context = Context { client, listener: &listener.name, question, incoming, sni, random };
        let mut header = HeaderWriter::proxy(&mut self.header, source, destination);
        if proxy.pass_incoming {
            for tlv in tlv::passable(incoming, proxy.owned && !proxy.seal.unique_id) {
                header = header.raw_tlvs(tlv);
            }
        }
        if let Some(tls) = tls.filter(|_| proxy.advertise_tls) {
            // Who speaks for the client knows better how it came.
            let said = |kind: u8| proxy.pass_incoming && tlv::iter(incoming).any(|(of, _)| of == kind);
            for tlv in tlv::passable(&tls.tlvs, true).filter(|tlv| !tlv.first().copied().is_some_and(said)) {
                header = header.raw_tlvs(tlv);
            }
        }
        let written = header.tlvs(&proxy.tlvs, &context).finish(proxy.max_header);
        if let Err(error) = written {
            tracing::debug!(session = session.serial, client = %session.client, %error, "PROXY header");
            return Err(FailReason::HeaderTooLong);
        }
        let digest = self.shared.digests.hash_one(self.header.as_slice()).max(1);
        self.stats.pools[usize::from(session.pool)].headers.record(digest);
        if !proxy.per_query {
            // Most clients meet one backend: a list of four, which is what a first push makes, is memory for nothing.
            session.headers.reserve_exact(1);
            session.headers.push((backend, Header { digest, bytes: Rc::from(self.header.as_slice()) }));
        }
        Ok(digest)
    }

    fn route_owned(
        &mut self,
        key: SessionKey,
        (pool, proxy): (u16, &ProxyPlan),
        question: Option<Question<'_>>,
        alone: bool,
        how: How,
        now: Mono,
    ) -> Route {
        let backends = &self.plan.pools[usize::from(pool)].backends;
        let Some(first) = backends.first().copied() else { return Route::Fail(FailReason::NoBackend) };
        // Where the header does not depend on the backend, what the client has already decides.
        let stays =
            !how.is_apart() && backends.len() > 1 && !proxy.per_backend && self.choosers[usize::from(pool)].is_sticky();
        let mut chosen = how.backend();
        if !stays && chosen.is_none() {
            chosen = self.choose_backend(key, pool, question, how, now);
            if chosen.is_none() {
                return Route::Fail(FailReason::NoBackend);
            }
        }
        let digest = match self.write_header(key, chosen.unwrap_or(first), proxy, question) {
            Ok(digest) => digest,
            Err(reason) => return Route::Fail(reason),
        };
        let session = &mut self.sessions[key.0];
        let mut seen = 1;
        if proxy.per_query && !proxy.unique {
            let history = session.history.get_or_insert_default();
            seen = if matches!(how, How::First { .. }) && !session.recorded {
                history.record(digest)
            } else {
                history.frequency(digest).saturating_sub(1)
            };
        }
        let here = |conn: &Conn| match chosen {
            Some(backend) => conn.backend == backend,
            None => self.keeps_backend(key, pool, conn.backend, how, now),
        };
        let fits = |core: &Self, conn: &Conn| {
            conn.header_digest == digest
                && conn.has_room()
                && conn.kind == ConnKind::Owned
                && *conn.header == *core.header
                && (!how.fresh_only() || conn.phase == Phase::Connecting)
                && !conn.apart
        };
        if !proxy.unique && !alone && !how.is_apart() {
            let mut owned = self.sessions[key.0].owned.iter().filter_map(|key| Some((*key, self.pool.get(*key)?)));
            if let Some((found, conn)) = owned.find(|(_, conn)| fits(self, conn) && here(conn)) {
                let backend = conn.backend;
                let least = |core: &Self| {
                    let owned = core.sessions[key.0].owned.iter().filter_map(|key| Some((*key, core.pool.get(*key)?)));
                    let fitting = owned.filter(|(_, conn)| conn.backend == backend && fits(core, conn));
                    fitting.min_by_key(|(_, conn)| conn.unanswered()).map(|(key, _)| key)
                };
                if let Some(placed) = self.place(key, Some(found), least, how, now) {
                    return Route::Use(placed);
                }
                chosen = Some(backend);
            }
        }
        let Some(backend) = chosen.or_else(|| self.choose_backend(key, pool, question, how, now)) else {
            return Route::Fail(FailReason::NoBackend);
        };
        if self.backoff[usize::from(backend)].holds_back(|| self.client_of(key), now) {
            // Before room is made for a connection that will not be opened.
            return Route::Fail(FailReason::ConnectFailed);
        }
        let session = &self.sessions[key.0];
        let hopeless = session.history.as_ref().is_some_and(|history| history.is_hopeless());
        let one_shot = proxy.unique || alone || (hopeless && seen == 0);
        if one_shot && hopeless {
            self.give_up_unused(key, now);
        }
        if self.sessions[key.0].owned.len() >= self.plan.connections.max_owned_per_client {
            self.make_room(key, digest, now);
            return Route::Blocked;
        }
        let (kind, header) = if one_shot {
            (ConnKind::OneShot, Rc::default())
        } else {
            // The bytes that the client connection keeps, if it keeps them, are this connection's as well.
            let kept = self.sessions[key.0].headers.iter().find(|(_, header)| *header.bytes == *self.header);
            let header = kept.map_or_else(|| Rc::from(self.header.as_slice()), |(_, header)| Rc::clone(&header.bytes));
            (ConnKind::Owned, header)
        };
        self.open(key, pool, backend, Wanted { kind, digest, header, fresh: alone }, how, now)
    }

    /// A client whose headers do not come back needs none of the connections that were used once.
    fn give_up_unused(&mut self, key: SessionKey, now: Mono) {
        for at in 0..self.sessions[key.0].owned.len() {
            let conn = self.sessions[key.0].owned[at];
            if self.pool.get(conn).is_some_and(|conn| conn.kind == ConnKind::Owned && conn.carried <= 1) {
                self.pool.retire(conn, CloseReason::OneShotDone, now);
            }
        }
    }

    /// The client owns as many connections as it may: gives up an idle one, if that does not push out one that is used
    /// more. The place that was taken last is on probation: it is given up first, unless its header has become more
    /// frequent than that of another.
    fn make_room(&mut self, key: SessionKey, digest: u64, now: Mono) {
        let session = &self.sessions[key.0];
        let history = session.history.as_deref();
        let conn = |key: &ConnKey| self.pool.get(*key);
        if session.owned.iter().filter_map(conn).any(|conn| conn.is_closing() || conn.retire.is_some()) {
            return;
        }
        let seen = |digest| history.map_or(0, |history| history.frequency(digest));
        let frequency = |key: &ConnKey| conn(key).map_or(0, |conn| seen(conn.header_digest));
        let idle = |key: &&ConnKey| conn(key).is_some_and(Conn::is_idle);
        let on_probation = session.probation.get().map(ConnKey).filter(|probation| session.owned.contains(probation));
        let rarest = session
            .owned
            .iter()
            .filter(|key| Some(**key) != on_probation)
            .filter(idle)
            .min_by_key(|key| frequency(key))
            .copied();
        let victim = match on_probation {
            Some(probation) if conn(&probation).is_some_and(Conn::is_idle) => {
                rarest.filter(|rarest| frequency(&probation) > frequency(rarest)).or(Some(probation))
            }
            Some(_) => rarest.filter(|rarest| frequency(rarest) <= 1 || frequency(rarest) < seen(digest)),
            None => rarest,
        };
        if let Some(victim) = victim {
            self.pool.close(victim, CloseReason::Evicted, now);
        }
    }

    /// A query could not be sent, as no connection came about: whether there is a backend that has not failed it yet.
    pub(super) fn has_another_backend(&self, session: SessionKey, pool: u16, tried: Tried, now: Mono) -> bool {
        let untried = |(place, backend): (usize, &BackendIndex)| {
            let at = usize::from(*backend);
            let held_back = || self.backoff[at].holds_back(|| self.client_of(session), now);
            !tried.has(place) && self.shared.health.is_usable(*backend) && !held_back()
        };
        self.plan.pools[usize::from(pool)].backends.iter().enumerate().any(untried)
    }
}

/// What the choice of a backend goes by. One that is down is not chosen. One that just refused connections comes last, as
/// it may have open ones; before it those that have failed the query already.
fn candidate(
    plan: &Plan,
    conns: &Pool,
    health: &Board,
    (place, backend): (usize, BackendIndex),
    held_back: bool,
    how: How,
) -> Candidate {
    let at = usize::from(backend);
    let rank = 2 * u8::from(held_back) + u8::from(how.tried().has(place));
    let BackendPlan { weight, digest, .. } = plan.backends[at];
    let rank = health.is_usable(backend).then_some(rank);
    Candidate { weight, outstanding: conns.outstanding(backend), rank, name: digest }
}

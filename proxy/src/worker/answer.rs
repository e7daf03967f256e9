//! What comes back: answers, and connections that died with queries in flight.

use std::net::IpAddr;
use std::time::Duration;

use slab::Slab;

use super::apart::{Death, is_unusual};
use super::backoff::Whose;
use super::core::Core;
use super::links::Maybe;
use super::plan::Plan;
use super::queries::{Place, Queries, QueryKey};
use crate::backend::pending::Answered;
use crate::backend::pool::{Conn, ConnKey, Phase};
use crate::client::session::Session;
use crate::clock::Mono;
use crate::close::{ClientCloseReason, CloseReason, FailReason, TransferEnd};
use crate::config::OnFailure;
use crate::dns::frame::{PREFIX_LEN, first_frame};
use crate::dns::message::{self, OPCODE_DSO};
use crate::dns::transfer::StreamError;
use crate::ledger::{BackendIndex, ConnKind};

/// What a backend did that it must not (RFC 7766 section 7: answers are matched by ID, and by question where there is
/// one). Its connection is closed: what else comes over it can't be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("a length too short for a DNS message")]
    Framing,
    #[error("a message without QR set")]
    NotAnAnswer,
    #[error("an answer with an ID that is not in flight")]
    UnknownId,
    #[error("an answer to another question")]
    WrongQuestion,
    #[error("a DSO message, which nobody has asked for")]
    Dso,
    #[error(transparent)]
    Transfer(StreamError),
}

impl Core {
    /// `connect(2)` has succeeded, and the TLS handshake if there is one.
    pub(crate) fn conn_connected(&mut self, key: ConnKey, now: Mono) {
        self.pool.connected(key, now);
        if let Some(conn) = self.pool.get(key).filter(|conn| conn.apart) {
            self.suspects[usize::from(conn.backend)].connected(key, now);
        }
        self.after_conn(key, now);
    }

    /// Bytes came from a backend. Returns how many octets the whole messages at their front were.
    pub(crate) fn backend_bytes(&mut self, key: ConnKey, bytes: &[u8], now: Mono) -> Result<usize, Violation> {
        if let Some(conn) = self.pool.get_mut(key) {
            let first = conn.last_received == Mono::ZERO;
            conn.last_received = now;
            conn.last_byte = now;
            let backend = usize::from(conn.backend);
            self.backoff[backend].heard(now);
            if first {
                self.answers_first(key);
            }
        }
        let mut taken = 0;
        loop {
            let rest = bytes.get(taken..).unwrap_or_default();
            match first_frame(rest) {
                Ok(Some(end)) => {
                    self.backend_message(key, rest.get(PREFIX_LEN..end).unwrap_or_default(), now)?;
                    taken += end;
                }
                Ok(None) => break,
                Err(_) => return Err(Violation::Framing),
            }
        }
        self.after_conn(key, now);
        Ok(taken)
    }

    /// Only an answer shows that the backend wants our connections.
    fn answers_first(&mut self, key: ConnKey) {
        let Self { pool, backoff, spare_backoff, queries, sessions, plan, shared, .. } = self;
        let Some(conn) = pool.get(key) else { return };
        let backend = usize::from(conn.backend);
        backoff[backend].succeeded(|| only_client(conn, queries, sessions, plan));
        shared.health.connection_taken(conn.backend);
        if conn.was_spare {
            spare_backoff[backend].succeeded();
        }
    }

    fn backend_message(&mut self, key: ConnKey, answer: &[u8], now: Mono) -> Result<(), Violation> {
        let peek = message::peek(answer).ok_or(Violation::NotAnAnswer)?;
        if peek.opcode == OPCODE_DSO {
            // None is ever forwarded, so there is no session (RFC 8490 sections 5.1 and 9.4).
            return Err(Violation::Dso);
        }
        if !peek.qr {
            return Err(Violation::NotAnAnswer);
        }
        let Some((backend, transfer)) = self.pool.get(key).map(|conn| (conn.backend, conn.transfer)) else {
            return Ok(());
        };
        if let Some(query) = transfer {
            return self.transfer_message(key, query, &peek, answer, now);
        }
        match self.pool.answered(key, peek.id, now) {
            Answered::Unknown => Err(Violation::UnknownId),
            Answered::Late => Ok(()),
            Answered::Query(query) => {
                let kept_for = self.deliver(query, (key, backend), (answer, peek.rcode), now)?;
                if let Some(timeout) = kept_for {
                    self.pool.keeps(key, timeout, now);
                }
                Ok(())
            }
        }
    }

    /// What the backend tells by edns-tcp-keepalive, if it does and somebody looks.
    fn deliver(
        &mut self,
        query: QueryKey,
        (key, backend): (ConnKey, BackendIndex),
        (answer, rcode): (&[u8], u8),
        now: Mono,
    ) -> Result<Option<u16>, Violation> {
        // A query leaves the table only together with its ID in the pending table, so it is there.
        let Some(entry) = self.queries.get_mut(query) else { return Ok(None) };
        entry.place = Place::Nowhere;
        if !message::question_matches(&entry.message, answer) {
            // What a server makes of a message that is no plain question says nothing of its other answers.
            let plain = message::peek(&entry.message).is_some_and(|asked| !is_unusual(&asked));
            let session = entry.session;
            self.fail(query, FailReason::BadAnswer);
            if !plain {
                return Ok(None);
            }
            // Whoever knows a question that the backend fails at could close connections of others at will.
            let client = self.client_of(session);
            self.suspects[usize::from(backend)].convict(client, Duration::ZERO, now);
            return Err(Violation::WrongQuestion);
        }
        let (session, pool, listener, arrived) = (entry.session, entry.pool, entry.listener, entry.arrived);
        self.shared.health.query_answered(backend, entry.sent, rcode);
        let came = self.pool.get_mut(key).and_then(|conn| {
            // Connecting is no part of how long an answer takes.
            conn.answers.came(entry.turn, entry.sent.max(conn.phase_since), now)
        });
        if let Some(came) = came {
            self.concurrency[usize::from(backend)].answered(came);
        }
        let client = &mut self.sessions[session.0];
        if !client.keeps(answer.len()) {
            self.fail(query, FailReason::ClientSlow);
            return Ok(None);
        }
        client.out.push_message(&mut self.spares, answer, entry.client_id);
        let kept_for = client.treat(entry.treatment, answer.len(), now);
        self.queries.remove(query, Some(&mut client.queries));
        self.stats.pools[usize::from(pool)].latency.record(now.since(arrived));
        let stats = &self.stats.listeners[usize::from(listener)];
        stats.answers.add(1);
        stats.in_flight.sub(1);
        self.wake_session(session);
        Ok(kept_for)
    }

    /// Something on a connection has ended: it may be done for, or useful to somebody else.
    pub(crate) fn after_conn(&mut self, key: ConnKey, now: Mono) {
        let Some(conn) = self.pool.get(key) else { return };
        let (backend, kind, owner, apart) = (conn.backend, conn.kind, conn.owner(), conn.apart);
        let idle = conn.is_idle();
        if idle && kind == ConnKind::OneShot && conn.carried > 0 {
            self.pool.retire(key, CloseReason::OneShotDone, now);
        } else if idle
            && matches!(kind, ConnKind::Shared | ConnKind::Keyed)
            && self.pool.idle_common(backend) > self.plan.connections.max_idle_per_backend
        {
            self.pool.retire(key, CloseReason::ExcessIdle, now);
        }
        if let Some(owner) = owner {
            self.unblock(owner);
        }
        if idle && apart {
            self.trial_is_over(key, now);
        }
        self.share_places(key, backend, now);
    }

    /// A connection of a session has room again, or a place for another one.
    fn unblock(&mut self, key: crate::client::session::SessionKey) {
        if let Some(session) = self.sessions.get_mut(key.0)
            && (session.blocked || !session.stalled.is_empty())
        {
            session.blocked = false;
            self.wake_session(key);
        }
    }

    /// The session's task runs: queries that found no connection before try again, ahead of new ones.
    pub(crate) fn resume(&mut self, key: crate::client::session::SessionKey, now: Mono) {
        let Some(session) = self.sessions.get_mut(key.0) else { return };
        session.woken = false;
        if session.stalled.is_empty() || session.blocked {
            return;
        }
        for query in session.stalled.take() {
            self.reroute(query, now);
        }
    }

    /// A connection's descriptor is closed. `partial` is the ID of the answer that had begun to come, if any.
    pub(crate) fn conn_closed(&mut self, key: ConnKey, reason: CloseReason, partial: Partial, now: Mono) {
        let unopened = self.pool.get(key).is_some_and(|conn| conn.phase == Phase::Connecting);
        let Some(mut conn) = self.pool.remove(key) else { return };
        conn.out.give_back(&mut self.spares);
        let backend = conn.backend;
        if conn.last_received != Mono::ZERO {
            self.shared.health.connection_left(backend);
        }
        self.suspects[usize::from(backend)].closed(key);
        // None of its queries was sent, but perhaps with the SYN: those that may be asked twice.
        let unsent = reason.is_before_queries();
        self.book(&conn, reason, now);
        if let Some(owner) = conn.owner() {
            if let Some(session) = self.sessions.get_mut(owner.0) {
                session.owned.retain(|owned| *owned != key);
                if session.probation.get() == Some(key.0) {
                    session.probation = Maybe::NONE;
                }
            }
            self.unblock(owner);
        }
        let failed = match reason {
            reason if reason.is_before_queries() => FailReason::ConnectFailed,
            CloseReason::HostShortage => FailReason::HostShortage,
            CloseReason::ProtocolViolation => FailReason::BadAnswer,
            _ => FailReason::BackendClosed,
        };
        // By its peer: any of its queries may have brought that about.
        let died = reason.is_by_peer() && !unsent;
        // It was not even opened: that was no try.
        let untried = reason == CloseReason::Reconfigured || reason == CloseReason::HostShortage && unopened;
        let (alone, certain) = (conn.pending.in_flight() == 1, is_certain(&conn, reason));
        let (mut suspects, mut again) = (Vec::new(), Vec::new());
        for (id, query) in conn.pending.drain() {
            let Some(entry) = self.queries.get_mut(query) else { continue };
            entry.place = Place::Nowhere;
            // A reload may have given its listener another pool.
            entry.pool = self.sessions[entry.session.0].pool;
            let answer_began = match partial {
                Partial::None => false,
                // Which one it was is unknown; if only one was in flight, it was that one.
                Partial::Unknown => alone,
                Partial::Of(partial) => partial == id,
            };
            // It waits as at a cap, and no longer: each try in vain is no new beginning.
            let waited =
                reason == CloseReason::HostShortage && entry.arrived.after(self.plan.connections.max_wait) <= now;
            if untried && waited {
                self.fail(query, failed);
            } else if untried {
                again.push(query);
            } else if died && !answer_began {
                suspects.push(query);
            } else if self.tries_again(query, backend, unsent, answer_began, failed, now) {
                again.push(query);
            }
        }
        if conn.apart {
            self.ask_apart(again, Duration::ZERO, now);
        } else {
            for query in again {
                self.reroute(query, now);
            }
        }
        let death = Death { backend, apart: conn.apart, certain: certain && alone, opened: conn.opened, failed };
        self.accuse(&death, &suspects, now);
        // The place under the caps is free: for who waits here, else for who waits elsewhere.
        self.serve_all_waiting(now);
        let waiting = self.shared.waiting.load(std::sync::atomic::Ordering::Relaxed) as u64;
        if waiting > self.stats.waiting.get() && self.shared.caps.has_place(backend) {
            self.wakes.tell_capacity = true;
        }
    }

    /// What the end of a connection says of its backend, and of this host.
    fn book(&mut self, conn: &Conn, reason: CloseReason, now: Mono) {
        let at = usize::from(conn.backend);
        let jitter = self.random.f64();
        let client = only_client(conn, &self.queries, &self.sessions, &self.plan);
        let unsent = reason.is_before_queries();
        let left = matches!(reason, CloseReason::PeerClosed | CloseReason::PeerReset);
        if conn.was_spare && conn.last_received == Mono::ZERO && (unsent || left) {
            self.spare_backoff[at].failed(conn.opened, now, jitter);
        }
        let whose = match conn.kind {
            ConnKind::Owned | ConnKind::OneShot => Whose::Own,
            _ if conn.apart => Whose::Suspects,
            _ => Whose::Shared,
        };
        if unsent {
            self.stats.backends[at].connect_failures.add(1);
        }
        match reason {
            CloseReason::HostShortage => {
                self.stats.backends[at].shortages.add(1);
                self.shortages[at].felt(now);
            }
            CloseReason::Unanswered => self.backoff[at].turned_away(client, whose, conn.opened, now, jitter),
            // It knows the client before the handshake, and may not want it.
            CloseReason::HandshakeFailed if self.plan.backends[at].header_in_clear() => {
                self.backoff[at].turned_away(client, whose, conn.opened, now, jitter);
            }
            _ if unsent => self.backoff[at].failed(conn.opened, now, jitter),
            _ => {}
        }
    }

    /// A query whose connection ended. Whether it is asked again, on a fresh one; else it has failed.
    pub(super) fn tries_again(
        &mut self,
        query: QueryKey,
        backend: BackendIndex,
        unsent: bool,
        answer_began: bool,
        failed: FailReason,
        now: Mono,
    ) -> bool {
        let Some(entry) = self.queries.get_mut(query) else { return false };
        if failed != FailReason::HostShortage {
            self.shared.health.query_failed(backend);
        }
        let pool = entry.pool;
        let place = self.plan.pools[usize::from(pool)].backends.iter().position(|other| *other == backend);
        entry.tried.add(place.unwrap_or(usize::MAX));
        let (session, tried, retries_left) = (entry.session, entry.tried, entry.retries_left);
        // What was not sent may be sent to another backend, whatever it is and however often.
        let moves_on = unsent && self.has_another_backend(session, pool, tried, now);
        if !moves_on && (retries_left == 0 || answer_began) {
            self.fail(query, failed);
            return false;
        }
        if let Some(entry) = self.queries.get_mut(query).filter(|_| !moves_on) {
            entry.retries_left -= 1;
            entry.fresh_only = true;
            self.stats.pools[usize::from(pool)].retries.add(1);
        }
        true
    }

    /// There was a descriptor, memory and a port for a connection.
    pub(crate) fn conn_opened(&mut self, key: ConnKey, now: Mono) {
        let Some(backend) = self.pool.get(key).map(|conn| conn.backend) else { return };
        if self.shortages[usize::from(backend)].ends() {
            self.serve_waiting(backend, now);
            self.try_suspects(backend, now);
        }
    }

    /// A query gets an answer of our own, or its connection ends, by `on_failure`.
    /// A zone transfer of which something has come already can have no other answer: its client's connection ends.
    pub(crate) fn fail(&mut self, query: QueryKey, reason: FailReason) {
        let Some(entry) = self.queries.get(query) else { return };
        let (session, listener, id) = (entry.session, entry.listener, entry.client_id);
        let on_failure = self.plan.pools[usize::from(entry.pool)].on_failure;
        let broken = entry.transfer.as_ref().is_some_and(|transfer| transfer.has_begun());
        let (treatment, latest) = (entry.treatment, entry.deadline);
        self.transfer_ended(query, if broken { TransferEnd::Broken } else { TransferEnd::Failed });
        let (Some(client), Some(entry)) = (self.sessions.get_mut(session.0), self.queries.get(query)) else { return };
        let stats = &self.stats.listeners[usize::from(listener)];
        if broken {
            client.ending = Some(ClientCloseReason::TransferBroken);
        } else if on_failure == OnFailure::Servfail {
            client.answer(&entry.message, id, reason, treatment, (&mut self.spares, stats), latest);
        } else {
            client.close.get_or_insert(ClientCloseReason::QueryFailed);
        }
        client.stalled.remove(query);
        self.queries.remove(query, Some(&mut client.queries));
        stats.failed[reason as usize].add(1);
        stats.in_flight.sub(1);
        self.wake_session(session);
        if broken {
            self.stop_transfers(session);
        }
    }
}

/// The client of all queries in flight on a connection, if it is one.
fn only_client(conn: &Conn, queries: &Queries, sessions: &Slab<Session>, plan: &Plan) -> Option<IpAddr> {
    let mut clients = conn.pending.queries().filter_map(|query| {
        let session = &sessions[queries.get(query)?.session.0];
        Some(plan.listeners[usize::from(session.listener)].client(session.client.ip()))
    });
    let first = clients.next()?;
    clients.all(|client| client == first).then_some(first)
}

/// Whether the only query in flight on a connection must be what brought it down. Not if others were on it: a peer may
/// close one that was idle for too long in the very moment in which it is used again, or after so many queries.
fn is_certain(conn: &Conn, reason: CloseReason) -> bool {
    reason == CloseReason::ProtocolViolation || (conn.carried == 1 && !conn.was_spare)
}

/// How much of an answer had come when a connection closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Partial {
    /// Nothing.
    None,
    /// A byte or more, but not its ID.
    Unknown,
    /// At least its wire ID.
    Of(u16),
}

impl Partial {
    /// From the bytes that are left over.
    pub(crate) fn new(rest: &[u8]) -> Self {
        match rest {
            [] => Self::None,
            [_, _, high, low, ..] => Self::Of(u16::from_be_bytes([*high, *low])),
            _ => Self::Unknown,
        }
    }
}

//! What comes back: answers, and connections that died with queries in flight.

use std::net::IpAddr;

use super::core::Core;
use super::links::Maybe;
use super::queries::{Place, QueryKey};
use crate::backend::pending::Answered;
use crate::backend::pool::{Conn, ConnKey};
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
        self.after_conn(key, now);
    }

    /// Bytes came from a backend. Returns how many octets the whole messages at their front were.
    pub(crate) fn backend_bytes(&mut self, key: ConnKey, bytes: &[u8], now: Mono) -> Result<usize, Violation> {
        if let Some(conn) = self.pool.get_mut(key) {
            if conn.last_received == Mono::ZERO {
                // Only an answer shows that the backend wants our connections.
                self.backoff[usize::from(conn.backend)].succeeded();
                self.shared.health.connection_taken(conn.backend);
                if conn.was_spare {
                    self.spare_backoff[usize::from(conn.backend)].succeeded();
                }
            }
            conn.last_received = now;
            conn.last_byte = now;
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
            self.fail(query, FailReason::BadAnswer);
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
        let (backend, kind, owner) = (conn.backend, conn.kind, conn.owner());
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
        if !self.waits[usize::from(backend)].is_empty() {
            self.serve_waiting(backend, now);
        }
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
        let Some(mut conn) = self.pool.remove(key) else { return };
        conn.out.give_back(&mut self.spares);
        let backend = conn.backend;
        if conn.last_received != Mono::ZERO {
            self.shared.health.connection_left(backend);
        }
        // None of its queries was sent, but perhaps with the SYN: those that may be asked twice.
        let unsent = reason.is_before_queries();
        if unsent {
            self.stats.backends[usize::from(backend)].connect_failures.add(1);
        }
        let left = matches!(reason, CloseReason::PeerClosed | CloseReason::PeerReset);
        if conn.was_spare && conn.last_received == Mono::ZERO && (unsent || left) {
            self.spare_backoff[usize::from(backend)].failed(conn.opened, now, self.random.f64(), None);
        }
        if unsent || reason == CloseReason::Unanswered {
            let client = self.only_client(&conn).filter(|_| !unsent);
            self.backoff[usize::from(backend)].failed(conn.opened, now, self.random.f64(), client);
        }
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
            CloseReason::ProtocolViolation => FailReason::BadAnswer,
            _ => FailReason::BackendClosed,
        };
        let alone = conn.pending.in_flight() == 1;
        for (id, query) in conn.pending.drain() {
            let Some(entry) = self.queries.get_mut(query) else { continue };
            entry.place = Place::Nowhere;
            // A reload may have given its listener another pool.
            entry.pool = self.sessions[entry.session.0].pool;
            if reason == CloseReason::Reconfigured {
                // It was not even opened: that was no try.
                self.reroute(query, now);
                continue;
            }
            self.shared.health.query_failed(backend);
            let answer_began = match partial {
                Partial::None => false,
                // Which one it was is unknown; if only one was in flight, it was that one.
                Partial::Unknown => alone,
                Partial::Of(partial) => partial == id,
            };
            let pool = entry.pool;
            let place = self.plan.pools[usize::from(pool)].backends.iter().position(|other| *other == backend);
            entry.tried.add(place.unwrap_or(usize::MAX));
            let (tried, retries_left) = (entry.tried, entry.retries_left);
            // What was not sent may be sent to another backend, whatever it is and however often.
            let session = entry.session;
            let moves_on = unsent && self.has_another_backend(session, pool, tried, now);
            if !moves_on && (retries_left == 0 || answer_began) {
                self.fail(query, failed);
                continue;
            }
            let Some(entry) = self.queries.get_mut(query) else { continue };
            if !moves_on {
                entry.retries_left -= 1;
                entry.fresh_only = true;
                self.stats.pools[usize::from(pool)].retries.add(1);
            }
            self.reroute(query, now);
        }
        // The place under the caps is free: for who waits here, else for who waits elsewhere.
        self.serve_all_waiting(now);
        let waiting = self.shared.waiting.load(std::sync::atomic::Ordering::Relaxed) as u64;
        if waiting > self.stats.waiting.get() && self.shared.caps.has_place(backend) {
            self.wakes.tell_capacity = true;
        }
    }

    /// The client of all queries in flight on a connection, if it is one.
    fn only_client(&self, conn: &Conn) -> Option<IpAddr> {
        let session = |query| self.queries.get(query).map(|entry| entry.session);
        let mut clients = conn.pending.queries().filter_map(session).map(|session| self.client_of(session));
        let first = clients.next()?;
        clients.all(|client| client == first).then_some(first)
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

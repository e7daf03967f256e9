//! Zone transfers on their way to the client.
//!
//! Each has a backend connection of its own (RFC 9103 section 6.4 and RFC 7766 section 6.2.2 want one for transfers), so
//! that a client that reads slowly stops that connection and no other: above a quarter of `max_pending_answers` nothing
//! more is read from it until the client has read; the rest is for the answers to other queries, among which its messages
//! are put as they come.

use super::answer::Violation;
use super::core::Core;
use super::queries::QueryKey;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::close::{CloseReason, TransferEnd};
use crate::dns::message::{self, Peek};
use crate::dns::transfer::{End, Request, Step, Stream};
use crate::stats::TransferKind;

/// What has come of a zone transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    stream: Stream,
    /// When the first message came.
    began: Mono,
}

impl Transfer {
    pub(crate) fn new(request: Request) -> Self {
        Self { stream: Stream::new(request), began: Mono::ZERO }
    }

    /// Whether a message was passed on, so that nothing else can be the answer.
    pub(crate) fn has_begun(&self) -> bool {
        self.stream.messages() > 0
    }
}

impl Core {
    /// Whether the client may have another transfer now. They leave one of its places for other queries (RFC 9103
    /// section 6.3.3: SERVFAIL beyond a limit).
    pub(super) fn may_transfer(&self, session: SessionKey) -> bool {
        let transfers = |key: &&ConnKey| self.pool.get(**key).is_some_and(|conn| conn.transfer.is_some());
        let limit = self.plan.connections.max_owned_per_client.saturating_sub(1).max(1);
        self.sessions[session.0].owned.iter().filter(transfers).count() < limit
    }

    /// A message came over the connection of a transfer.
    pub(super) fn transfer_message(
        &mut self,
        key: ConnKey,
        query: QueryKey,
        peek: &Peek,
        answer: &[u8],
        now: Mono,
    ) -> Result<(), Violation> {
        let Some(conn) = self.pool.get(key).filter(|conn| !conn.is_closing()) else {
            // What comes after the end is nobody's.
            return Ok(());
        };
        let backend = conn.backend;
        if conn.pending.get(peek.id) != Some(query) {
            return Err(Violation::UnknownId);
        }
        let Some(entry) = self.queries.get_mut(query) else { return Ok(()) };
        let (session, client_id, pool) = (entry.session, entry.client_id, entry.pool);
        let (listener, arrived, sent, treatment) = (entry.listener, entry.arrived, entry.sent, entry.treatment);
        // RFC 5936 section 2.2.2: the question may be missing, in later messages.
        if !message::question_matches(&entry.message, answer) {
            return Err(Violation::WrongQuestion);
        }
        let question = message::first_question(&entry.message).and_then(Result::ok);
        let (Some(question), Some(transfer)) = (question, entry.transfer.as_mut()) else { return Ok(()) };
        let step = transfer.stream.message(&question, answer).map_err(Violation::Transfer)?;
        if transfer.stream.messages() == 1 {
            transfer.began = now;
            self.shared.health.query_answered(backend, sent, peek.rcode);
        }
        let began = transfer.began;
        let client = &mut self.sessions[session.0];
        client.out.push_message(&mut self.spares, answer, client_id);
        // What the backend tells of this connection does not matter: it ends with the transfer.
        let _ = client.treat(treatment, answer.len(), now);
        self.stats.listeners[usize::from(listener)].transfer_messages.add(1);
        match step {
            Step::More => {
                self.queries.renew(query, now);
            }
            Step::Done(end) => {
                let stats = &self.stats.listeners[usize::from(listener)];
                stats.answers.add(1);
                stats.in_flight.sub(1);
                self.stats.pools[usize::from(pool)].latency.record(began.since(arrived));
                self.transfer_ended(query, TransferEnd::from(end));
                let client = &mut self.sessions[session.0];
                self.queries.remove(query, Some(&mut client.queries));
                self.pool.answered(key, peek.id, now);
                self.pool.retire(key, CloseReason::OneShotDone, now);
            }
        }
        self.wake_session(session);
        Ok(())
    }

    /// Whether more is to be read from the connection of a transfer. If not, it waits until the client has read.
    pub(crate) fn transfer_reads(&mut self, key: ConnKey) -> bool {
        let Some(conn) = self.pool.get_mut(key) else { return true };
        if conn.paused || conn.transfer.is_none() {
            return !conn.paused;
        }
        let Some(session) = conn.owner().and_then(|owner| self.sessions.get_mut(owner.0)) else { return true };
        if session.is_busy_reading() {
            conn.paused = true;
            session.paused = true;
        }
        !conn.paused
    }

    /// The client has read something while transfers wait for that.
    pub(crate) fn client_took(&mut self, key: SessionKey, now: Mono) {
        let Some(session) = self.sessions.get_mut(key.0) else { return };
        let resumes = !session.is_busy_reading();
        session.paused = !resumes;
        for at in 0..session.owned.len() {
            let Some(key) = self.sessions.get(key.0).and_then(|session| session.owned.get(at)).copied() else { break };
            let Some(conn) = self.pool.get_mut(key).filter(|conn| conn.paused) else { continue };
            // The client moves, so what is in the kernel for it is not forgotten.
            conn.last_byte = now;
            conn.paused = !resumes;
            if let Some(query) = conn.transfer.filter(|_| resumes) {
                self.queries.renew(query, now);
            }
            self.wake_conn(key);
        }
    }

    /// The client's connection ends once what came is delivered: nothing more may come of its other transfers.
    pub(super) fn stop_transfers(&mut self, key: SessionKey) {
        let Some(session) = self.sessions.get_mut(key.0) else { return };
        // They do not wait for the client any more, but for its end.
        session.paused = false;
        for conn in &session.owned {
            if let Some(conn) = self.pool.get_mut(*conn).filter(|conn| conn.transfer.is_some()) {
                conn.paused = true;
            }
        }
    }

    /// Counts the end of a transfer; nothing for other queries.
    pub(super) fn transfer_ended(&self, query: QueryKey, end: TransferEnd) {
        let Some(entry) = self.queries.get(query) else { return };
        let Some(transfer) = &entry.transfer else { return };
        let kind = TransferKind::from(transfer.stream.request());
        self.stats.listeners[usize::from(entry.listener)].transfers[kind as usize][end as usize].add(1);
        let session = self.sessions.get(entry.session.0).map(|session| session.serial);
        let messages = transfer.stream.messages();
        tracing::debug!(session, kind = kind.label(), outcome = end.label(), messages, "zone transfer ended");
    }
}

impl From<End> for TransferEnd {
    fn from(end: End) -> Self {
        match end {
            End::Complete => Self::Complete,
            End::UpToDate => Self::UpToDate,
            End::Declined => Self::Declined,
        }
    }
}

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;

//! The worker's state, and what the tasks tell it. A pure state machine (I13): events in, wake-ups out, no I/O and no
//! clock. `route.rs` finds a connection for a query, `place.rs` acts
//! on what it found, `answer.rs` brings answers and failures back, `apart.rs` asks again what a connection died with, `transfer.rs` the messages of zone transfers,
//! `house.rs` sees to what only time brings about.

use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use slab::Slab;

use super::backoff::{Backoff, Pause, Shortage};
use super::buffer::Spares;
use super::plan::Plan;
use super::queries::{NewQuery, Place, Queries, QueryKey};
use super::suspects::Suspects;
use super::timers::{TimerKey, Timers};
use super::turn::{Round, Turn};
use crate::backend::choose::Chooser;
use crate::backend::concurrency::Concurrency;
use crate::backend::pool::{ConnKey, Pool};
use crate::client::preface;
use crate::client::session::{Addresses, Origin, Pace, Session, SessionKey};
use crate::clock::Mono;
use crate::close::{ClientCloseReason, CloseReason, FailReason, TransferEnd};
use crate::config::Refusable;
use crate::dns::hop::{self, Keepalive};
use crate::dns::message::{self, OPCODE_DSO, OPCODE_QUERY, Peek};
use crate::dns::{records, transfer};
use crate::health::Board;
use crate::ledger::BackendIndex;
use crate::ledger::caps::{AtCap, Caps};
use crate::stats::{Acquired, WorkerStats};

/// Entries for which a worker's tables have room from the beginning. That takes addresses and no memory until they are
/// used. A table that grows by being copied leaves as much memory behind as it needs.
pub(crate) const ROOM: usize = 16_384;

/// What all workers share: touched when connections are opened and closed and when queries wait, never per query.
#[derive(Debug)]
pub struct Shared {
    /// The limits of backend connections.
    pub caps: Arc<Caps>,
    /// Queries of all workers that wait at a cap.
    pub waiting: AtomicUsize,
    /// Which backends are up.
    pub health: Arc<Board>,
    /// What digests of headers are made with: the same in all workers, so that they can be compared.
    pub digests: foldhash::fast::RandomState,
    /// The last client connection's serial number.
    pub serial: AtomicU64,
}

/// Which tasks have something to do.
#[derive(Debug, Default)]
pub(crate) struct Wakes {
    pub(crate) sessions: Vec<SessionKey>,
    pub(crate) conns: Vec<ConnKey>,
    /// Connections to open: each needs a task.
    pub(crate) open: Vec<ConnKey>,
    /// Other workers are asked to make room at this backend, at this cap, for so many clients.
    pub(crate) ask_for_room: Vec<(BackendIndex, AtCap, usize)>,
    /// Other workers are asked to have no more wait than is their share.
    pub(crate) ask_to_shed: bool,
    /// Other workers may have somebody who waits for the place that became free.
    pub(crate) tell_capacity: bool,
}

/// Whether a message could be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Yes,
    /// Not now: the session is blocked until one of its connections is idle.
    Blocked,
}

/// The state of a worker.
#[derive(Debug)]
pub struct Core {
    pub(crate) plan: Rc<Plan>,
    pub(crate) stats: Arc<WorkerStats>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) sessions: Slab<Session>,
    pub(crate) pool: Pool,
    pub(crate) queries: Queries,
    /// By pool: where its queries wait for their deadlines.
    pub(crate) lines: Vec<u16>,
    pub(crate) timers: Timers,
    pub(crate) backoff: Vec<Backoff>,
    /// The same for spare connections that backends close unused.
    pub(crate) spare_backoff: Vec<Pause>,
    pub(crate) shortages: Vec<Shortage>,
    pub(crate) suspects: Vec<Suspects>,
    /// The backends at which suspects wait.
    pub(crate) suspected: Vec<BackendIndex>,
    /// By backend: whether it works on the queries of one connection side by side.
    pub(crate) concurrency: Vec<Concurrency>,
    /// By pool.
    pub(crate) choosers: Vec<Chooser>,
    /// Connections opened for a client (by its listener's masks) in the current second, if `max_opens_per_client` limits them.
    pub(crate) opens: HashMap<IpAddr, u32, foldhash::fast::RandomState>,
    pub(crate) opens_since: Mono,
    pub(crate) spares: Spares,
    /// The header of the query that is being routed.
    pub(crate) header: Vec<u8>,
    pub(crate) wakes: Wakes,
    pub(crate) next_cleanup: Mono,
    pub(crate) random: fastrand::Rng,
    pub(crate) draining: bool,
    /// Its number, which its places are counted by.
    pub(crate) worker: usize,
    /// By backend: how often it had moved when it came to where the plan has it.
    pub(crate) moves: Vec<u32>,
    /// The backend whose line was served first.
    pub(crate) first_line: usize,
    /// Whose turn it is.
    pub(crate) round: Round,
}

impl Core {
    /// A worker without connections.
    pub fn new(plan: Rc<Plan>, stats: Arc<WorkerStats>, shared: Arc<Shared>, seed: u64, now: Mono) -> Self {
        let backends = plan.backends.len();
        let mut queries = Queries::default();
        Self {
            lines: queries.lines(plan.pools.iter().map(|pool| pool.query_timeout)),
            queries,
            choosers: plan.pools.iter().map(|pool| Chooser::new(pool.policy, pool.backends.len())).collect(),
            next_cleanup: now.after(plan.connections.cleanup_interval),
            plan,
            stats,
            sessions: Slab::with_capacity(ROOM),
            pool: Pool::new(backends),
            timers: Timers::default(),
            spare_backoff: (0..backends).map(|_| Pause::default()).collect(),
            shortages: vec![Shortage::default(); backends],
            suspects: (0..backends).map(|_| Suspects::default()).collect(),
            suspected: Vec::new(),
            backoff: (0..backends).map(|_| Backoff::default()).collect(),
            concurrency: vec![Concurrency::default(); backends],
            opens: HashMap::default(),
            opens_since: now,
            spares: Spares::default(),
            header: Vec::new(),
            wakes: Wakes::default(),
            random: fastrand::Rng::with_seed(seed),
            draining: false,
            worker: 0,
            moves: (0..backends).map(|backend| shared.caps.moves(backend as BackendIndex)).collect(),
            first_line: 0,
            round: Round::default(),
            shared,
        }
    }

    /// The same as the worker of this number, of those that share the places.
    pub(crate) fn numbered(self, worker: usize) -> Self {
        Self { worker, ..self }
    }

    /// A number for a client connection, which no other has.
    pub(crate) fn next_serial(&self) -> u64 {
        self.shared.serial.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A client connection was accepted; `serial` is its [number](Self::next_serial).
    pub(crate) fn session_opened(
        &mut self,
        listener: u16,
        serial: u64,
        addresses: Addresses,
        origin: Origin,
        pace: Pace,
        now: Mono,
    ) -> SessionKey {
        let plan = &self.plan.listeners[usize::from(listener)];
        let mut session = Session::new(serial, listener, plan.pool, addresses, plan.limits(pace), now);
        session.pace = pace;
        if let Some(via) = &origin.via {
            tracing::debug!(session = serial, client = %session.client, peer = %via.peer, "client behind PROXY");
        }
        session.origin = origin;
        tracing::debug!(session = serial, client = %session.client, listener = plan.name, "client connection opened");
        let key = SessionKey(self.sessions.insert(session));
        let stats = &self.stats.listeners[usize::from(listener)];
        stats.opened.add(1);
        stats.connections.add(1);
        stats.restricted.add(u64::from(pace == Pace::Restricted));
        if self.draining {
            self.sessions[key.0].drain_at = now;
        }
        self.settle_session(key);
        key
    }

    /// Whole messages at the front of `bytes` came from a client. Takes as many as may be taken now, in this turn, and
    /// returns how many octets those were.
    pub(crate) fn client_bytes(&mut self, key: SessionKey, bytes: &[u8], turn: &mut Turn, now: Mono) -> usize {
        let mut taken = 0;
        if let Some(session) = self.sessions.get_mut(key.0)
            && session.messages == 0
            && preface::is_header(bytes)
        {
            // A trusted peer's header was read before the session began.
            tracing::debug!(session = session.serial, client = %session.client, "PROXY header where none may be");
            session.close = Some(ClientCloseReason::ProxyUntrusted);
            return bytes.len();
        }
        while !turn.is_over() && self.sessions.get(key.0).is_some_and(Session::takes_messages) {
            let rest = bytes.get(taken..).unwrap_or_default();
            match crate::dns::frame::first_frame(rest) {
                Ok(Some(end)) => {
                    let message = rest.get(crate::dns::frame::PREFIX_LEN..end).unwrap_or_default();
                    if self.client_message(key, message, now) == Taken::Blocked {
                        break;
                    }
                    taken += end;
                    turn.took(end);
                }
                Ok(None) => break,
                Err(error) => {
                    if let Some(session) = self.sessions.get_mut(key.0) {
                        tracing::debug!(session = session.serial, client = %session.client, %error, "malformed message");
                        // Whatever was asked before it is still answered.
                        session.ending = Some(ClientCloseReason::Malformed);
                    }
                    // Nothing after a broken length can be understood.
                    taken = bytes.len();
                }
            }
        }
        if let Some(session) = self.sessions.get_mut(key.0) {
            session.bytes_left(bytes.len() - taken, now);
        }
        taken
    }

    /// A connection's client, and what it has had of its turn; none: all of it, and the connection goes on in another round.
    pub(crate) fn begin_turn(&mut self, key: SessionKey) -> Option<(IpAddr, Turn)> {
        self.sessions.get(key.0)?;
        let client = self.client_of(key);
        let turn = self.round.turn(client);
        if turn.is_over() {
            self.wait_for_round(key, client, false);
            return None;
        }
        Some((client, turn))
    }

    /// A connection has taken messages in its client's turn.
    pub(crate) fn end_turn(&mut self, key: SessionKey, client: IpAddr, turn: Turn) {
        self.round.had(client, turn);
        if turn.is_over() {
            self.wait_for_round(key, client, true);
        }
    }

    fn wait_for_round(&mut self, key: SessionKey, client: IpAddr, had_some: bool) {
        let Some(session) = self.sessions.get_mut(key.0) else { return };
        if !std::mem::replace(&mut session.waits_for_round, true) {
            self.round.waits(client, key, had_some);
        }
    }

    /// All who had something to do have had their turns.
    pub(crate) fn next_round(&mut self) {
        let mut round = std::mem::take(&mut self.round);
        round.next(|key| {
            // Another one may have its place in the table: that one looks, and finds nothing to do.
            if let Some(session) = self.sessions.get_mut(key.0) {
                session.waits_for_round = false;
            }
            self.wake_session(key);
        });
        self.round = round;
    }

    fn client_message(&mut self, key: SessionKey, message: &[u8], now: Mono) -> Taken {
        let Some(peek) = message::peek(message) else { return Taken::Yes };
        let (listener, pool) = {
            let session = &self.sessions[key.0];
            (session.listener, session.pool)
        };
        let stats = Arc::clone(&self.stats);
        let stats = &stats.listeners[usize::from(listener)];
        if peek.qr || (peek.opcode == OPCODE_DSO && peek.id == 0) {
            stats.ignored.add(1);
            self.take_unanswered(key, peek, now);
            return Taken::Yes;
        }
        let question = message::first_question(message);
        let requested = match &question {
            Some(Ok(question)) if peek.opcode == OPCODE_QUERY && transfer::is_transfer(question.qtype) => {
                Some(transfer::request(message, question))
            }
            _ => None,
        };
        let unreadable = matches!(question, Some(Err(_))) || matches!(requested, Some(Err(_)));
        let read = question.as_ref().and_then(|question| question.as_ref().ok());
        let odd = !self.may_be_odd(pool) && !records::are_readable(message, read);
        let treatment = hop::asked(message, self.sessions[key.0].scope());
        let refused = |refusable: &Refusable| refusable.covers(peek.opcode, read.map(|question| question.qtype));
        let refusal = match self.sessions[key.0].limits.refuse.iter().any(refused) {
            true => Some(FailReason::Refused),
            false => refusal(&peek, unreadable, odd || treatment.is_err()),
        };
        if let Some(reason) = refusal {
            stats.queries.add(1);
            stats.failed[reason as usize].add(1);
            let session = &mut self.sessions[key.0];
            session.message_came(false, now);
            session.answer(message, peek.id, reason, treatment.unwrap_or_default(), (&mut self.spares, stats), now);
            return Taken::Yes;
        }

        let treatment = treatment.unwrap_or_default();
        let question = question.and_then(Result::ok);
        let requested = requested.and_then(Result::ok);
        let unusual = super::apart::is_unusual(&peek);
        let route = self.route(key, pool, question, requested.is_some(), super::route::How::First { unusual }, now);
        if route == super::route::Route::Blocked {
            let session = &mut self.sessions[key.0];
            session.blocked = true;
            session.recorded = true;
            return Taken::Blocked;
        }
        let plan = &self.plan.pools[usize::from(pool)];
        // Only a QUERY may be asked twice (RFC 7766 section 6.2.4 leaves it to the client what can be retried). A zone
        // transfer may have cost its primary much already, and its client asks again by itself (RFC 1035 section 3.3.13).
        let retries = if peek.opcode == OPCODE_QUERY && requested.is_none() { plan.retries } else { 0 };
        let session = &mut self.sessions[key.0];
        session.message_came(true, now);
        session.recorded = false;
        let query = self.queries.insert(
            NewQuery {
                session: key,
                client_id: peek.id,
                pool,
                line: self.lines[usize::from(pool)],
                listener,
                arrived: now,
                deadline: now.after(plan.query_timeout),
                retries,
                treatment,
                transfer: requested,
                message,
            },
            &mut session.queries,
        );
        if treatment.keepalive == Keepalive::Tell
            && let Some(entry) = self.queries.get_mut(query)
        {
            hop::take_out(&mut entry.message);
        }
        stats.queries.add(1);
        stats.in_flight.add(1);
        self.follow(query, route, now);
        Taken::Yes
    }

    /// Whether messages may pass that cannot be read, as far as that does not matter here: they may cost the client its own
    /// connections, as some servers close one for it. Where others ask on it, too, it is not for one of them to end it.
    fn may_be_odd(&self, pool: u16) -> bool {
        self.plan.pools[usize::from(pool)].proxy.as_ref().is_some_and(|proxy| proxy.owned)
    }

    /// A message gets no answer. An answer where a query belongs: two programs that answer it could go on for ever. A DSO
    /// message that is a response, or wants none, belongs to a session (RFC 8490 sections 5.1 and 5.4.1), which there
    /// never is: the connection is aborted.
    fn take_unanswered(&mut self, key: SessionKey, peek: Peek, now: Mono) {
        let session = &mut self.sessions[key.0];
        session.message_came(false, now);
        if peek.opcode == OPCODE_DSO {
            session.close = Some(ClientCloseReason::NoDsoSession);
        }
    }

    /// The client has sent FIN.
    pub(crate) fn client_finished(&mut self, key: SessionKey) {
        if let Some(session) = self.sessions.get_mut(key.0) {
            session.read_closed = true;
            session.partial_since = Mono::ZERO;
        }
    }

    /// A client connection's descriptor is closed.
    pub(crate) fn session_closed(&mut self, key: SessionKey, reason: ClientCloseReason, now: Mono) {
        let Some(session) = self.sessions.get_mut(key.0) else { return };
        let listener = usize::from(session.listener);
        session.out.give_back(&mut self.spares);
        let mut queries = std::mem::take(&mut session.queries);
        let owned = std::mem::take(&mut session.owned);
        let stats = Arc::clone(&self.stats);
        let stats = &stats.listeners[listener];
        while let Some(query) = self.queries.first_of(&queries) {
            match self.queries.get(query).map(|query| query.place) {
                Some(Place::Sent { conn, id }) => self.pool.abandon(conn, id, now),
                Some(Place::Waiting) => self.stop_waiting(query),
                Some(Place::Nowhere) | None => {}
            }
            self.transfer_ended(query, TransferEnd::Abandoned);
            self.queries.remove(query, Some(&mut queries));
            stats.abandoned.add(1);
            stats.in_flight.sub(1);
        }
        for conn in owned {
            if let Some(conn) = self.pool.get_mut(conn) {
                conn.disown();
            }
            self.pool.close(conn, CloseReason::OwnerGone, now);
        }
        let serial = self.sessions.remove(key.0).serial;
        tracing::debug!(session = serial, reason = reason.label(), "client connection closed");
        stats.connections.sub(1);
        stats.closed[reason as usize].add(1);
        // Connections on which only this client had something in flight are idle now, and may make way.
        self.serve_all_waiting(now);
    }

    /// The session's task has done what it could: when to look at it again.
    pub(crate) fn settle_session(&mut self, key: SessionKey) {
        if let Some(session) = self.sessions.get_mut(key.0) {
            let deadline = session.deadline();
            if deadline != Mono::MAX {
                self.timers.arm(TimerKey::Session(key), deadline, &mut session.armed);
            }
        }
    }

    /// The connection's task has done what it could: when to look at it again.
    pub(crate) fn settle_conn(&mut self, key: ConnKey) {
        let Some(conn) = self.pool.get_mut(key) else { return };
        let plan = &self.plan.backends[usize::from(conn.backend)];
        let deadline = if conn.phase == crate::backend::pool::Phase::Connecting {
            conn.phase_since.after(plan.connect_timeout)
        } else if conn.unwritable_since != Mono::ZERO {
            conn.unwritable_since.after(plan.write_timeout)
        } else {
            return;
        };
        self.timers.arm(TimerKey::Conn(key), deadline, &mut conn.armed);
    }

    /// Marks a session's task as one that has something to do.
    pub(crate) fn wake_session(&mut self, key: SessionKey) {
        if let Some(session) = self.sessions.get_mut(key.0)
            && !session.woken
        {
            session.woken = true;
            self.wakes.sessions.push(key);
        }
    }

    /// Marks a connection's task as one that has something to do.
    pub(crate) fn wake_conn(&mut self, key: ConnKey) {
        if let Some(conn) = self.pool.get_mut(key)
            && !conn.woken
        {
            conn.woken = true;
            self.wakes.conns.push(key);
        }
    }

    /// The pool has decided that connections must close: their tasks are told. Once per step of the worker, by whoever
    /// carries out the wakes.
    pub(crate) fn tell_closing(&mut self) {
        while let Some(key) = self.pool.next_closing() {
            self.wake_conn(key);
        }
    }

    /// A query leaves the queue of a cap without having been served by it.
    pub(crate) fn stop_waiting(&mut self, query: QueryKey) {
        let Some(entry) = self.queries.get_mut(query) else { return };
        if entry.place != Place::Waiting {
            return;
        }
        entry.place = Place::Nowhere;
        let session = entry.session;
        self.pool.lines_mut().for_each(|line| line.remove(session, query));
        self.waited();
    }

    /// One query waits less.
    pub(crate) fn waited(&mut self) {
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        self.stats.waiting.sub(1);
    }

    pub(crate) fn count_acquired(&self, pool: u16, how: Acquired) {
        self.stats.pools[usize::from(pool)].acquired[how as usize].add(1);
    }
}

/// Why a message gets an answer of our own: no backend is to see it.
fn refusal(peek: &Peek, unreadable: bool, odd: bool) -> Option<FailReason> {
    if peek.opcode == OPCODE_DSO {
        Some(FailReason::NotSupported)
    } else if odd || peek.opcode == OPCODE_QUERY && (peek.qdcount > 1 || unreadable) {
        // RFC 9619 section 4. A QUERY without any question is none of a middlebox's business: a backend answers it.
        Some(FailReason::Malformed)
    } else {
        None
    }
}

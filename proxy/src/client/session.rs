//! One client connection: what it may still send, what it is owed, when it ends. A pure state machine (I13); the task
//! around it only carries bytes.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use crate::backend::history::History;
use crate::backend::pool::ConnKey;
use crate::clock::Mono;
use crate::close::{ClientCloseReason, FailReason};
use crate::config::Refusable;
use crate::dns::hop::{self, Scope, TIMEOUT_UNIT, Treatment};
use crate::dns::synth;
use crate::proxy_protocol::client_tls;
use crate::stats::ListenerStats;
use crate::tls::{Negotiated, Version};
use crate::worker::buffer::{OutBuf, Spares};
use crate::worker::links::{List, Maybe};
use crate::worker::queries::QueryKey;

/// Index of a session in its worker's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey(pub usize);

/// Whether a session has the listener's times or the shorter ones of `[overload]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// The listener's.
    Normal,
    /// It came when a limit was nearly reached.
    Restricted,
}

/// The limits of a listener, as a session needs them.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Queries in flight; more are not read yet.
    pub max_in_flight: usize,
    /// Messages in all, 0: no limit.
    pub max_queries: u32,
    /// From its beginning to its end, zero: no limit.
    pub max_duration: Duration,
    /// Bytes of answers that are kept for a client that does not read. More queries are not read than have answers of so
    /// many bytes, as far as the last ones tell; an answer too many is replaced by SERVFAIL if the client does not read.
    pub max_pending_answers: usize,
    /// Between messages.
    pub idle_timeout: Duration,
    /// From the first byte of a message to its last.
    pub message_timeout: Duration,
    /// For a client that does not read.
    pub write_timeout: Duration,
    /// Clients are told `idle_timeout` if they ask (RFC 7828).
    pub edns_tcp_keepalive: bool,
    /// What is answered by REFUSED.
    pub refuse: Vec<Refusable>,
}

/// A new connection's first answer is taken for the longest that there can be, so that few queries are taken before it is known
/// how long answers are. Where it is late, nobody waits for longer than this.
const GUESS: Duration = Duration::from_millis(50);

/// Messages in a row that are not forwarded, after which a connection ends: more than any mistake takes.
pub const MAX_NOT_FORWARDED: u8 = 32;

/// A header that stays the same for a client connection, per backend.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) digest: u64,
    pub(crate) bytes: Rc<[u8]>,
}

/// Queries of a session, in order. It hardly ever has any: an empty one takes no more than a pointer.
#[expect(clippy::box_collection, reason = "a third of the size, per client, of something that is nearly never there")]
#[derive(Debug, Default)]
pub(crate) struct Stalled(Option<Box<VecDeque<QueryKey>>>);

impl Stalled {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(|queries| queries.is_empty())
    }

    pub(crate) fn push(&mut self, query: QueryKey) {
        self.0.get_or_insert_default().push_back(query);
    }

    pub(crate) fn remove(&mut self, query: QueryKey) {
        if let Some(queries) = &mut self.0
            // Most are given up in the order in which they came: the first one is found, and taken out, at once.
            && let Some(at) = queries.iter().position(|stalled| *stalled == query)
        {
            queries.remove(at);
        }
    }

    /// Takes them all out.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = QueryKey> + use<> {
        self.0.take().into_iter().flat_map(|queries| *queries)
    }
}

/// A client connection.
#[derive(Debug)]
pub struct Session {
    /// Unique in the process; the owner in the ledger.
    pub(crate) serial: u64,
    pub(crate) listener: u16,
    pub(crate) pool: u16,
    pub(crate) client: SocketAddr,
    pub(crate) local: SocketAddr,
    /// What is known of how it came.
    pub(crate) origin: Origin,
    pub(crate) limits: Rc<Limits>,
    /// Which of the listener's limits those are.
    pub(crate) pace: Pace,
    /// Its queries, waiting or in flight.
    pub(crate) queries: List,
    /// Queries that came back from a dead connection and found no other yet.
    pub(crate) stalled: Stalled,
    /// Answers on their way to the client.
    pub(crate) out: OutBuf,
    /// The connections that carry this client's address and port.
    pub(crate) owned: Vec<ConnKey>,
    /// Zone transfers on connections of its own wait until it has read.
    pub(crate) paused: bool,
    /// The owned connection that is given up first.
    pub(crate) probation: Maybe,
    pub(crate) history: Option<Box<History>>,
    pub(crate) headers: Vec<(u16, Header)>,
    /// All its owned connections are busy and it may have no more: nothing is read until one is idle.
    pub(crate) blocked: bool,
    /// The message at which it is blocked was counted in the history.
    pub(crate) recorded: bool,
    /// The client has sent FIN.
    pub(crate) read_closed: bool,
    /// It closes for this reason, whatever it owes the client.
    pub(crate) close: Option<ClientCloseReason>,
    /// It takes no more messages, and closes for this reason once it owes the client nothing.
    pub(crate) ending: Option<ClientCloseReason>,
    /// It must close whether or not it is quiet: the time to drain is over.
    pub(crate) forced: bool,
    /// When it began.
    pub(crate) opened: Mono,
    /// When the last whole message came or the last answer left.
    pub(crate) last_message: Mono,
    /// Since when a message is incomplete.
    pub(crate) partial_since: Mono,
    /// Since when the client does not read.
    pub(crate) unwritable_since: Mono,
    /// When it is closed if idle, because the process drains.
    pub(crate) drain_at: Mono,
    pub(crate) armed: Mono,
    /// Its task has been woken and has not run yet.
    pub(crate) woken: bool,
    /// Whole messages that have come.
    pub(crate) messages: u32,
    /// How many of them, since the last one that was forwarded, were not.
    not_forwarded: u8,
    /// The longest of its last answers, octets; one that is long past counts less and less. Those to come are taken for as
    /// long. Before the first one, the most that there can be.
    pub(crate) long_answer: u32,
    /// Until then the first answer is waited for, to know how long answers are here.
    guess_until: Mono,
    /// Its client has had its turn ([`Round`](crate::worker::turn::Round)).
    pub(crate) waits_for_round: bool,
}

impl Session {
    pub(crate) fn new(
        serial: u64,
        listener: u16,
        pool: u16,
        addresses: Addresses,
        limits: Rc<Limits>,
        now: Mono,
    ) -> Self {
        Self {
            serial,
            listener,
            pool,
            client: addresses.client,
            local: addresses.local,
            origin: Origin::default(),
            limits,
            pace: Pace::Normal,
            queries: List::default(),
            stalled: Stalled::default(),
            out: OutBuf::default(),
            owned: Vec::new(),
            paused: false,
            probation: Maybe::NONE,
            history: None,
            headers: Vec::new(),
            blocked: false,
            recorded: false,
            read_closed: false,
            close: None,
            ending: None,
            forced: false,
            opened: now,
            last_message: now,
            partial_since: Mono::ZERO,
            unwritable_since: Mono::ZERO,
            drain_at: Mono::ZERO,
            armed: Mono::ZERO,
            woken: false,
            messages: 0,
            not_forwarded: 0,
            waits_for_round: false,
            long_answer: u32::from(u16::MAX),
            guess_until: Mono::ZERO,
        }
    }

    /// The TLVs of its own header.
    pub(crate) fn incoming(&self) -> &[u8] {
        self.origin.via.as_ref().map_or(&[], |via| &via.tlvs)
    }

    /// What it agreed on, if it came over TLS.
    pub(crate) fn tls(&self) -> Option<&ClientTls> {
        self.origin.tls.as_deref()
    }

    /// Queries that have no answer yet.
    pub fn in_flight(&self) -> usize {
        self.queries.len()
    }

    /// Whether the next message may be taken.
    pub fn takes_messages(&self) -> bool {
        !self.blocked
            && self.close.is_none()
            && self.ending.is_none()
            && self.stalled.is_empty()
            && self.in_flight() < self.limits.max_in_flight
            && self.out.len() < self.limits.max_pending_answers
            && (self.owes_nothing() || self.fits_one_more())
    }

    /// Whether every query has its answer, and the client has them all.
    fn owes_nothing(&self) -> bool {
        self.in_flight() == 0 && self.out.is_empty()
    }

    /// Whether it has asked something, and it is not known how long its answers are.
    pub(crate) fn is_guessing(&self) -> bool {
        self.guess_until != Mono::ZERO
    }

    /// Whether the answers to all queries, and to one more, may be kept if they are as long as the last ones.
    fn fits_one_more(&self) -> bool {
        self.fits((self.in_flight() + 1) * self.long_answer as usize)
    }

    /// Whether so many octets more may be kept for the client.
    fn fits(&self, more: usize) -> bool {
        self.out.len() + more <= self.limits.max_pending_answers
    }

    /// An answer of so many octets came: whether it is kept until the client reads.
    pub(crate) fn keeps(&mut self, length: usize) -> bool {
        let faded = if self.is_guessing() { 0 } else { self.long_answer - self.long_answer / 8 };
        self.guess_until = Mono::ZERO;
        self.long_answer = faded.max(u32::try_from(length).unwrap_or(u32::MAX));
        self.unwritable_since == Mono::ZERO || self.fits(length)
    }

    /// Whether the client has so much to read that no more of zone transfers may be added: the rest is for the answers
    /// to other queries.
    pub(crate) fn is_busy_reading(&self) -> bool {
        self.out.len() >= self.limits.max_pending_answers / 4
    }

    /// Whether the task should read from the socket.
    pub fn reads(&self) -> bool {
        !self.read_closed && self.takes_messages()
    }

    /// A whole message came, and was forwarded or not. A client all of whose messages are not is let go: what it costs to
    /// answer them is never any use.
    pub(crate) fn message_came(&mut self, forwarded: bool, now: Mono) {
        self.not_forwarded = if forwarded { 0 } else { self.not_forwarded + 1 };
        if self.not_forwarded >= MAX_NOT_FORWARDED {
            self.ending.get_or_insert(ClientCloseReason::NotForwarded);
        }
        if self.messages == 0 {
            self.guess_until = now.after(GUESS);
        }
        self.messages = self.messages.saturating_add(1);
        if self.limits.max_queries > 0 && self.messages >= self.limits.max_queries {
            self.ending.get_or_insert(ClientCloseReason::MaxQueries);
        }
        self.last_message = now;
        self.partial_since = Mono::ZERO;
    }

    /// What is left after the whole messages were taken: part of a message, or messages that can't be taken yet. A part
    /// that the client's end cut off is waited for by nobody.
    pub(crate) fn bytes_left(&mut self, left: usize, now: Mono) {
        if left == 0 || self.read_closed || !self.takes_messages() {
            self.partial_since = Mono::ZERO;
        } else if self.partial_since == Mono::ZERO {
            self.partial_since = now;
        }
    }

    /// Something was written, or nothing is left to write; or the client did not take it.
    pub(crate) fn wrote(&mut self, progress: bool, now: Mono) {
        if self.out.is_empty() {
            self.unwritable_since = Mono::ZERO;
            self.last_message = now;
        } else if progress || self.unwritable_since == Mono::ZERO {
            self.unwritable_since = now;
        }
    }

    /// When to look at it again.
    pub fn deadline(&self) -> Mono {
        let mut deadline = self.expiry();
        if self.is_guessing() && !self.fits_one_more() {
            deadline = deadline.min(self.guess_until);
        }
        if self.unwritable_since != Mono::ZERO {
            deadline = deadline.min(self.unwritable_since.after(self.limits.write_timeout));
        }
        if self.partial_since != Mono::ZERO {
            deadline = deadline.min(self.partial_since.after(self.limits.message_timeout));
        }
        if self.is_quiet() {
            deadline = deadline.min(self.last_message.after(self.limits.idle_timeout));
            if self.drain_at != Mono::ZERO {
                deadline = deadline.min(self.drain_at);
            }
        }
        deadline
    }

    /// For how long the connection will be kept from now on if it is idle, in units of 100 ms, rounded down: what
    /// edns-tcp-keepalive tells (RFC 7828 section 3.3.2). Zero: the client should close it once it has all answers.
    pub(crate) fn keepalive(&self, now: Mono) -> u16 {
        if self.ending.is_some() || self.close.is_some() || self.drain_at != Mono::ZERO {
            return 0;
        }
        let time = self.limits.idle_timeout.min(self.expiry().since(now));
        u16::try_from(time.as_millis() / TIMEOUT_UNIT.as_millis()).unwrap_or(u16::MAX)
    }

    /// What is looked at in its queries and their answers.
    pub(crate) fn scope(&self) -> Scope {
        Scope { keepalive: self.limits.edns_tcp_keepalive, padding: self.origin.tls.is_some() }
    }

    /// An answer of this length was appended: it is treated as its query asks for. What the backend tells there of how long
    /// it keeps its own connection, if it does and somebody looks.
    pub(crate) fn treat(&mut self, treatment: Treatment, length: usize, now: Mono) -> Option<u16> {
        if treatment == Treatment::default() {
            return None;
        }
        let timeout = self.keepalive(now);
        let (out, start) = self.out.last_message(length);
        hop::treat(out, start, timeout, treatment)
    }

    /// Appends an answer of our own to `query`, which had this ID and is answered for this reason.
    pub(crate) fn answer(
        &mut self,
        query: &[u8],
        id: u16,
        reason: FailReason,
        treatment: Treatment,
        (spares, stats): (&mut Spares, &ListenerStats),
        now: Mono,
    ) {
        let (rcode, error) = reason.answer();
        let own = synth::answer(query, rcode, Some(error));
        self.out.push_message(spares, &own.message, id);
        self.treat(treatment, own.message.len(), now);
        if let Some(code) = own.error {
            stats.extended_errors[code.index()].add(1);
        }
    }

    /// When it has been open for long enough.
    fn expiry(&self) -> Mono {
        if self.limits.max_duration.is_zero() || self.ending.is_some() {
            return Mono::MAX;
        }
        self.opened.after(self.limits.max_duration)
    }

    /// Time has passed: sets the reason to close, or to end, if a limit is over.
    pub(crate) fn check(&mut self, now: Mono) {
        if self.close.is_some() {
            return;
        }
        if self.is_guessing() && self.guess_until <= now {
            (self.long_answer, self.guess_until) = (0, Mono::ZERO);
        }
        if self.expiry() <= now {
            self.ending = Some(ClientCloseReason::MaxDuration);
        }
        let over = |since: Mono, limit: Duration| since != Mono::ZERO && since.after(limit) <= now;
        let quiet = self.is_quiet();
        self.close = if over(self.unwritable_since, self.limits.write_timeout) {
            Some(ClientCloseReason::WriteTimeout)
        } else if over(self.partial_since, self.limits.message_timeout) {
            Some(ClientCloseReason::MessageTimeout)
        } else if quiet && self.drain_at != Mono::ZERO && self.drain_at <= now {
            Some(ClientCloseReason::Drained)
        } else if quiet && over(self.last_message, self.limits.idle_timeout) {
            Some(ClientCloseReason::IdleTimeout)
        } else {
            None
        };
    }

    /// Whether the connection has nothing more to do, and why it ends. A client that closed its side still gets every
    /// answer it is owed (RFC 7766 section 6.2.4 speaks of clients that closed; half-closing is not closing).
    pub fn finished(&self) -> Option<ClientCloseReason> {
        match self.close {
            Some(reason) => Some(reason),
            // Whatever came of the transfer is still delivered; other answers may be long in coming.
            None if self.ending == Some(ClientCloseReason::TransferBroken) && self.out.is_empty() => self.ending,
            None if self.ending.is_some() && self.in_flight() == 0 && self.out.is_empty() => self.ending,
            None if self.read_closed && self.is_quiet() => Some(ClientCloseReason::ClientClosed),
            None => None,
        }
    }

    /// Whether it owes the client nothing and has taken everything that was read.
    fn is_quiet(&self) -> bool {
        self.owes_nothing() && !self.blocked
    }

    /// It was to be closed because it is quiet. If so, its task looks once more whether something has come meanwhile.
    pub(crate) fn reconsider(&mut self) -> Option<ClientCloseReason> {
        match self.close {
            Some(ClientCloseReason::IdleTimeout | ClientCloseReason::Drained) if !self.read_closed && !self.forced => {
                self.close.take()
            }
            _ => None,
        }
    }
}

/// How a client came, besides by TCP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Behind a peer that speaks for it.
    pub via: Option<Box<Via>>,
    /// Over TLS.
    pub tls: Option<Box<ClientTls>>,
}

/// A client that came over TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// The version that was agreed on.
    pub version: Version,
    /// The name of the server that it asked for; empty if it did not say.
    pub sni: Box<str>,
    /// What it agreed on, as TLVs of a header.
    pub tlvs: Box<[u8]>,
}

impl ClientTls {
    /// With what was agreed on.
    pub fn new(negotiated: &Negotiated) -> Self {
        let sni = negotiated.server_name.as_deref().unwrap_or_default().into();
        Self { version: negotiated.version, sni, tlvs: client_tls::tlvs(negotiated).into_boxed_slice() }
    }
}

/// A client that a trusted peer speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Via {
    /// The other end of the connection.
    pub peer: SocketAddr,
    /// The TLVs of its header, as a header holds them.
    pub tlvs: Box<[u8]>,
}

/// The two ends of a client connection.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The client.
    pub client: SocketAddr,
    /// Where it connected to.
    pub local: SocketAddr,
}

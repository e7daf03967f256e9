//! The backend connections of one worker: which may be given to a query (I5), which are idle, which must go. A pure
//! state machine: it decides, the connections' tasks act.
//!
//! A connection is given to a query only while it is open or being opened, not about to close, and has room. Connections
//! that have room are found in constant time: shared ones per backend, keyed ones by the digest of their header, owned
//! ones in their session's short list.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZero;
use std::rc::Rc;
use std::time::Duration;

use slab::Slab;

use super::concurrency::Answers;
use super::pending::{IDS, Pending};
use super::wait::WaitQueue;
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::close::CloseReason;
use crate::dns::hop::TIMEOUT_UNIT;
use crate::ledger::caps::Permit;
use crate::ledger::{BackendIndex, ConnKind};
use crate::worker::buffer::OutBuf;
use crate::worker::core::ROOM;
use crate::worker::links::{Links, List, Maybe};
use crate::worker::queries::QueryKey;

mod places;

/// Index of a connection in its worker's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnKey(pub usize);

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// `connect(2)` has not finished, or the TLS handshake after it; queries may be queued already.
    Connecting,
    /// Connected.
    Open,
    /// To be closed by its task, for this reason.
    Closing(CloseReason),
}

/// A connection to a backend, from the decision to open it until its descriptor is closed.
#[derive(Debug)]
pub struct Conn {
    /// Which backend.
    pub backend: BackendIndex,
    /// Who may share it.
    pub kind: ConnKind,
    /// How far it is.
    pub phase: Phase,
    /// The queries in flight on it.
    pub pending: Pending,
    owner: Maybe,
    pub(crate) owner_serial: u64,
    pub(crate) header_digest: u64,
    pub(crate) header: Rc<[u8]>,
    /// Bytes on their way to the backend; begins with the header.
    pub(crate) out: OutBuf,
    /// So many of these are a PROXY header that TLS has to treat apart.
    pub(crate) header_left: u32,
    /// The place under the caps, until the task takes it to the ledger.
    pub(crate) permit: Option<Permit>,
    /// No new query is given to it; it closes for this reason when the last one is answered.
    pub(crate) retire: Option<CloseReason>,
    pub(crate) opened: Mono,
    /// Since when it has been connecting, or connected.
    pub(crate) phase_since: Mono,
    pub(crate) expires: Mono,
    pub(crate) idle_since: Mono,
    pub(crate) last_received: Mono,
    /// How its answers came.
    pub(crate) answers: Answers,
    pub(crate) last_byte: Mono,
    /// The peer keeps it for so long while it is idle, in units of 100 ms (RFC 7828); none: it did not say.
    pub(crate) kept_for: Option<NonZero<u16>>,
    pub(crate) unwritable_since: Mono,
    /// It was opened in advance.
    pub(crate) was_spare: bool,
    /// For suspects: nobody else finds it.
    pub(crate) apart: bool,
    /// Queries that it has carried.
    pub(crate) carried: u64,
    pub(crate) max_in_flight: u32,
    /// The zone transfer that it was opened for. Its one ID is taken until the last message.
    pub(crate) transfer: Option<QueryKey>,
    /// Nothing is read from it until the transfer's client has taken what there is.
    pub(crate) paused: bool,
    pub(crate) armed: Mono,
    pub(crate) woken: bool,
    /// Place in its group's list of connections with room.
    at: Option<u32>,
    idle: Links,
    /// The client that its place counts for; none: it is of use to everybody.
    pub(crate) holder: Option<IpAddr>,
    /// It is not on its way to be closed.
    stays: bool,
    turn: Links,
    turn_began: Mono,
}

/// So many queries at a time, as far as there are IDs.
fn at_most(max_in_flight: usize) -> u32 {
    max_in_flight.min(IDS) as u32
}

/// What a new connection is for.
#[derive(Debug)]
pub(crate) struct NewConn {
    pub(crate) backend: BackendIndex,
    pub(crate) kind: ConnKind,
    pub(crate) owner: Option<SessionKey>,
    pub(crate) owner_serial: u64,
    pub(crate) holder: Option<IpAddr>,
    pub(crate) header_digest: u64,
    pub(crate) header: Rc<[u8]>,
    pub(crate) apart: bool,
    pub(crate) permit: Permit,
    pub(crate) max_in_flight: usize,
    pub(crate) seed: u32,
    pub(crate) max_age: Duration,
}

/// What a spare connection becomes.
#[derive(Debug)]
pub(crate) struct Assigned {
    pub(crate) kind: ConnKind,
    pub(crate) owner: Option<SessionKey>,
    pub(crate) owner_serial: u64,
    pub(crate) holder: Option<IpAddr>,
    pub(crate) header_digest: u64,
    pub(crate) header: Rc<[u8]>,
    pub(crate) apart: bool,
    pub(crate) max_in_flight: usize,
}

impl Conn {
    /// Whether another query may be put on it (I5). A query that nobody waits for any more counts until it is answered
    /// all the same: the backend may still be working on it, and one that is too slow must not get ever more to do.
    pub fn has_room(&self) -> bool {
        !matches!(self.phase, Phase::Closing(_))
            && self.retire.is_none()
            && self.unanswered() < self.max_in_flight as usize
    }

    /// Queries that the backend has not answered, those too that nobody waits for any more.
    pub fn unanswered(&self) -> usize {
        self.pending.in_flight() + self.pending.quarantined()
    }

    /// The session that owns it; none when shared, or when the owner has gone.
    pub(crate) fn owner(&self) -> Option<SessionKey> {
        self.owner.get().map(SessionKey)
    }

    /// The owner has gone.
    pub(crate) fn disown(&mut self) {
        self.owner = Maybe::NONE;
    }

    /// Whether it is open with nothing in flight.
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Open && self.pending.in_flight() == 0
    }

    /// The reason to close it that says more: a peer that leaves without ever having answered does not want what it got.
    pub(crate) fn precisely(&self, reason: CloseReason) -> CloseReason {
        let left = matches!(reason, CloseReason::PeerClosed | CloseReason::PeerReset);
        // A peer may leave a spare connection in the very moment in which it is taken.
        if left && !self.was_spare && self.last_received == Mono::ZERO && self.pending.in_flight() > 0 {
            CloseReason::Unanswered
        } else {
            reason
        }
    }

    /// For how long it may be idle before its peer closes it.
    pub(crate) fn kept_for(&self) -> Duration {
        self.kept_for.map_or(Duration::MAX, |units| TIMEOUT_UNIT * u32::from(units.get()))
    }

    /// Whether its owner's words for it are over: it is about to close.
    pub fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing(_))
    }
}

/// The connections of a worker.
#[derive(Debug)]
pub struct Pool {
    conns: Slab<Conn>,
    backends: Vec<PerBackend>,
    /// Keyed connections with room, by digest of header and backend.
    keyed: HashMap<u64, Vec<ConnKey>, foldhash::fast::FixedState>,
    /// Connections whose tasks have not been told yet that they must close.
    closing: Vec<ConnKey>,
}

#[derive(Debug, Default)]
struct PerBackend {
    /// Shared connections with room, the one used last at the end.
    shared: Vec<ConnKey>,
    /// Idle connections of every kind, the longest idle first.
    idle: List,
    /// Idle connections that are shared or keyed.
    idle_common: usize,
    /// Spare connections, the oldest first.
    spares: Vec<ConnKey>,
    outstanding: usize,
    /// Connections that are about to close: their places come free soon.
    closing: usize,
    conns: usize,
    /// Those that are neither about to close nor to close when all is answered.
    staying: usize,
    /// Those whose places can be had while they are busy, the one whose turn began first in front.
    turns: List,
    /// Who has places, and who waits for one.
    line: WaitQueue,
}

impl Pool {
    /// No connections yet, for so many backends.
    pub fn new(backends: usize) -> Self {
        Self {
            conns: Slab::with_capacity(ROOM),
            backends: (0..backends).map(|_| PerBackend::default()).collect(),
            keyed: HashMap::default(),
            closing: Vec::new(),
        }
    }

    /// From now on there are so many backends; none goes away.
    pub(crate) fn grow(&mut self, backends: usize) {
        self.backends.resize_with(backends.max(self.backends.len()), PerBackend::default);
    }

    /// From now on so many queries may be in flight on a connection.
    pub(crate) fn allow(&mut self, key: ConnKey, max_in_flight: usize, now: Mono) {
        if let Some(conn) = self.conns.get_mut(key.0) {
            conn.max_in_flight = at_most(max_in_flight);
            self.update(key, now);
        }
    }

    /// The connection.
    pub fn get(&self, key: ConnKey) -> Option<&Conn> {
        self.conns.get(key.0)
    }

    pub(crate) fn get_mut(&mut self, key: ConnKey) -> Option<&mut Conn> {
        self.conns.get_mut(key.0)
    }

    /// All connections.
    pub fn iter(&self) -> impl Iterator<Item = (ConnKey, &Conn)> {
        self.conns.iter().map(|(at, conn)| (ConnKey(at), conn))
    }

    /// How many connections there are, closing ones included.
    pub fn len(&self) -> usize {
        self.conns.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.conns.is_empty()
    }

    /// Queries of this worker that a backend has not answered.
    pub fn outstanding(&self, backend: BackendIndex) -> usize {
        self.backends[usize::from(backend)].outstanding
    }

    /// A connection is to be opened.
    pub(crate) fn open(&mut self, new: NewConn, now: Mono) -> ConnKey {
        // Spread by 10 %, so that connections opened together do not expire together.
        let spread = new.max_age.as_nanos() as u64 / 10 / 256 * u64::from(new.seed & 0xff);
        let key = ConnKey(self.conns.insert(Conn {
            backend: new.backend,
            kind: new.kind,
            phase: Phase::Connecting,
            pending: Pending::new(new.seed),
            owner: Maybe::new(new.owner.map(|owner| owner.0)),
            owner_serial: new.owner_serial,
            header_digest: new.header_digest,
            header: new.header,
            out: OutBuf::default(),
            header_left: 0,
            permit: Some(new.permit),
            retire: None,
            opened: now,
            phase_since: now,
            expires: Mono(now.after(new.max_age).0 - spread),
            idle_since: Mono::ZERO,
            last_received: Mono::ZERO,
            answers: Answers::default(),
            last_byte: now,
            kept_for: None,
            unwritable_since: Mono::ZERO,
            was_spare: new.kind == ConnKind::Spare,
            apart: new.apart,
            carried: 0,
            max_in_flight: at_most(new.max_in_flight),
            transfer: None,
            paused: false,
            armed: Mono::ZERO,
            woken: false,
            at: None,
            idle: Links::default(),
            holder: new.holder,
            stays: true,
            turn: Links::default(),
            turn_began: now,
        }));
        let per_backend = &mut self.backends[usize::from(new.backend)];
        per_backend.conns += 1;
        per_backend.staying += 1;
        if let Some(holder) = new.holder {
            per_backend.line.took(holder, now);
        }
        if new.kind == ConnKind::Spare {
            self.backends[usize::from(new.backend)].spares.push(key);
        }
        self.update(key, now);
        key
    }

    /// A spare connection is given to somebody.
    pub(crate) fn give_spare(&mut self, key: ConnKey, to: Assigned, now: Mono) {
        let Some(conn) = self.conns.get_mut(key.0).filter(|conn| conn.kind == ConnKind::Spare) else { return };
        let per_backend = &mut self.backends[usize::from(conn.backend)];
        per_backend.spares.retain(|spare| *spare != key);
        // From now on it counts among those that are kept idle, if it is of those.
        per_backend.idle_common += usize::from(conn.idle.is_linked() && to.kind.is_common());
        conn.kind = to.kind;
        conn.owner = Maybe::new(to.owner.map(|owner| owner.0));
        conn.owner_serial = to.owner_serial;
        conn.holder = to.holder;
        if let Some(holder) = to.holder {
            per_backend.line.took(holder, now);
        }
        conn.header_digest = to.header_digest;
        conn.header = to.header;
        conn.max_in_flight = at_most(to.max_in_flight);
        self.update(key, now);
    }

    /// It is connected, but there is a TLS handshake to come: the time to connect begins again.
    pub(crate) fn reconnects(&mut self, key: ConnKey, now: Mono) {
        if let Some(conn) = self.conns.get_mut(key.0)
            && conn.phase == Phase::Open
        {
            conn.phase = Phase::Connecting;
            conn.phase_since = now;
            self.update(key, now);
        }
    }

    /// `connect(2)` has succeeded, and the TLS handshake if there is one.
    pub(crate) fn connected(&mut self, key: ConnKey, now: Mono) {
        if let Some(conn) = self.conns.get_mut(key.0)
            && conn.phase == Phase::Connecting
        {
            conn.phase = Phase::Open;
            conn.phase_since = now;
            self.update(key, now);
        }
    }

    /// A query is put on a connection: its wire ID, or none if it has no room after all.
    pub(crate) fn assign(&mut self, key: ConnKey, query: QueryKey, now: Mono) -> Option<u16> {
        let conn = self.conns.get_mut(key.0)?;
        if !conn.has_room() {
            return None;
        }
        let id = conn.pending.insert(query)?;
        conn.carried += 1;
        self.backends[usize::from(conn.backend)].outstanding += 1;
        self.update(key, now);
        Some(id)
    }

    /// An answer came: what its ID means.
    pub(crate) fn answered(&mut self, key: ConnKey, id: u16, now: Mono) -> super::pending::Answered {
        let Some(conn) = self.conns.get_mut(key.0) else { return super::pending::Answered::Unknown };
        let answered = conn.pending.answered(id);
        if let super::pending::Answered::Query(_) = answered {
            self.backends[usize::from(conn.backend)].outstanding -= 1;
        }
        self.update(key, now);
        answered
    }

    /// Nobody waits for this query's answer any more.
    pub(crate) fn abandon(&mut self, key: ConnKey, id: u16, now: Mono) {
        let Some(conn) = self.conns.get_mut(key.0) else { return };
        if conn.pending.quarantine(id) {
            self.backends[usize::from(conn.backend)].outstanding -= 1;
            self.update(key, now);
        }
    }

    /// It was for suspects, and is one like all others from now on.
    pub(crate) fn release(&mut self, key: ConnKey, now: Mono) {
        if let Some(conn) = self.conns.get_mut(key.0) {
            conn.apart = false;
            self.update(key, now);
        }
    }

    /// No new query may be given to it; it closes when it has none in flight, which may be at once.
    pub(crate) fn retire(&mut self, key: ConnKey, reason: CloseReason, now: Mono) {
        if let Some(conn) = self.conns.get_mut(key.0) {
            conn.retire.get_or_insert(reason);
            self.update(key, now);
        }
    }

    /// The peer has told for how long it keeps the connection while it is idle, in units of 100 ms. Zero asks for an end:
    /// no more queries, and the close when all answers are in (RFC 7828 section 3.2.2).
    pub(crate) fn keeps(&mut self, key: ConnKey, timeout: u16, now: Mono) {
        match (NonZero::new(timeout), self.conns.get_mut(key.0)) {
            (None, _) => self.retire(key, CloseReason::AskedToClose, now),
            (told, Some(conn)) => conn.kept_for = told,
            (Some(_), None) => {}
        }
    }

    /// It must close now, whatever is in flight.
    pub(crate) fn close(&mut self, key: ConnKey, reason: CloseReason, now: Mono) {
        if let Some(conn) = self.conns.get_mut(key.0)
            && !conn.is_closing()
        {
            conn.phase = Phase::Closing(reason);
            self.backends[usize::from(conn.backend)].closing += 1;
            self.closing.push(key);
            self.update(key, now);
        }
    }

    /// A connection whose task must be told that it has to close.
    pub(crate) fn next_closing(&mut self) -> Option<ConnKey> {
        self.closing.pop()
    }

    /// Its descriptor is closed: forgets it. What was in flight is the caller's to retry or fail.
    pub(crate) fn remove(&mut self, key: ConnKey) -> Option<Conn> {
        let conn = self.conns.get_mut(key.0)?;
        let backend = usize::from(conn.backend);
        if conn.is_closing() {
            self.backends[backend].closing -= 1;
        }
        conn.phase = Phase::Closing(CloseReason::Dropped);
        self.backends[backend].conns -= 1;
        if let Some(holder) = conn.holder {
            self.backends[backend].line.gave(holder);
        }
        self.backends[backend].outstanding -= conn.pending.in_flight();
        self.update(key, Mono::ZERO);
        self.conns.try_remove(key.0)
    }

    /// A shared connection with room: the fullest, which is the one that got room last.
    pub(crate) fn shared(&self, backend: BackendIndex) -> Option<ConnKey> {
        self.backends[usize::from(backend)].shared.last().copied()
    }

    /// A keyed connection with room and exactly this header.
    pub(crate) fn keyed(&self, backend: BackendIndex, digest: u64, header: &[u8]) -> Option<ConnKey> {
        let group = self.keyed.get(&group(backend, digest))?;
        group
            .iter()
            .rev()
            .copied()
            .find(|key| self.conns.get(key.0).is_some_and(|conn| conn.backend == backend && *conn.header == *header))
    }

    /// Of the shared connections with room the one with the fewest queries. Looks at each, so not for every query: where one
    /// without any is wanted, there are no more of them than queries in flight.
    pub fn least_shared(&self, backend: BackendIndex) -> Option<ConnKey> {
        self.least(self.backends[usize::from(backend)].shared.iter())
    }

    /// The same for keyed connections with exactly this header.
    pub fn least_keyed(&self, backend: BackendIndex, digest: u64, header: &[u8]) -> Option<ConnKey> {
        let group = self.keyed.get(&group(backend, digest))?;
        let fits = |conn: &Conn| conn.backend == backend && *conn.header == *header;
        self.least(group.iter().filter(|key| self.conns.get(key.0).is_some_and(fits)))
    }

    fn least<'a>(&self, keys: impl Iterator<Item = &'a ConnKey>) -> Option<ConnKey> {
        keys.copied().min_by_key(|key| self.conns.get(key.0).map_or(usize::MAX, Conn::unanswered))
    }

    /// Idle connections to a backend that any client could use.
    pub fn idle_common(&self, backend: BackendIndex) -> usize {
        self.backends[usize::from(backend)].idle_common
    }

    /// Puts the connection into the lists where it belongs now, and closes it if it retires and has nothing in flight.
    fn update(&mut self, key: ConnKey, now: Mono) {
        let Some(conn) = self.conns.get_mut(key.0) else { return };
        if let Some(reason) = conn.retire
            && conn.pending.in_flight() == 0
            && !conn.is_closing()
        {
            conn.phase = Phase::Closing(reason);
            self.backends[usize::from(conn.backend)].closing += 1;
            self.closing.push(key);
        }
        if conn.stays && (conn.is_closing() || conn.retire.is_some()) {
            conn.stays = false;
            self.backends[usize::from(conn.backend)].staying -= 1;
        }
        let (idle, room, takes_turns) = (conn.is_idle(), conn.has_room(), conn.takes_turns());
        let (backend, common, apart) = (usize::from(conn.backend), conn.kind.is_common(), conn.apart);
        if conn.kind == ConnKind::Spare && conn.is_closing() {
            self.backends[backend].spares.retain(|spare| *spare != key);
        }
        let Some(conn) = self.conns.get_mut(key.0) else { return };
        if idle != conn.idle.is_linked() {
            let per_backend = &mut self.backends[backend];
            if let Some(holder) = conn.holder.filter(|_| !conn.is_closing()) {
                per_backend.line.used(holder, now);
            }
            if idle {
                conn.idle_since = now;
                per_backend.idle_common += usize::from(common);
                per_backend.idle.push_back(&mut self.conns, key.0, |conn: &mut Conn| &mut conn.idle);
            } else {
                per_backend.idle_common -= usize::from(common);
                per_backend.idle.remove(&mut self.conns, key.0, |conn: &mut Conn| &mut conn.idle);
            }
        }
        let Some(conn) = self.conns.get_mut(key.0) else { return };
        if takes_turns != conn.turn.is_linked() {
            let turns = &mut self.backends[backend].turns;
            if takes_turns {
                conn.turn_began = now;
                turns.push_back(&mut self.conns, key.0, |conn: &mut Conn| &mut conn.turn);
            } else {
                turns.remove(&mut self.conns, key.0, |conn: &mut Conn| &mut conn.turn);
            }
        }
        if common {
            self.list_room(key, room && !apart);
        }
    }

    fn list_room(&mut self, key: ConnKey, room: bool) {
        let Some(conn) = self.conns.get_mut(key.0) else { return };
        if room == conn.at.is_some() {
            return;
        }
        let group = group(conn.backend, conn.header_digest);
        let shared = conn.kind == ConnKind::Shared;
        let list = if shared {
            &mut self.backends[usize::from(conn.backend)].shared
        } else {
            self.keyed.entry(group).or_default()
        };
        if room {
            conn.at = Some(list.len() as u32);
            list.push(key);
            return;
        }
        let Some(at) = conn.at.take() else { return };
        list.swap_remove(at as usize);
        let empty = list.is_empty();
        if let Some(moved) = list.get(at as usize) {
            self.conns[moved.0].at = Some(at);
        }
        if empty && !shared {
            self.keyed.remove(&group);
        }
    }
}

fn group(backend: BackendIndex, digest: u64) -> u64 {
    digest ^ u64::from(backend).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_the_model(events in prop::collection::vec(any::<u8>(), 0..1500)) {
            crate::fuzzing::pool(&events);
        }
    }
}

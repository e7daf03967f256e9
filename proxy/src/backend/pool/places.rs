//! Which connections make way where places are short.

use std::net::IpAddr;
use std::time::Duration;

use super::{Conn, ConnKey, PerBackend, Phase, Pool};
use crate::backend::wait::WaitQueue;
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::ledger::{BackendIndex, ConnKind};

/// A connection whose place somebody else wants is left to whom it is for until it has carried so many queries, or
const TURN_QUERIES: u64 = 16;
/// has been open for so long: each handover costs a connection.
const TURN_TIME: Duration = Duration::from_millis(2);
/// A connection that is idle for less than this is in use by its client, which only thinks.
const IN_USE: Duration = Duration::from_millis(100);
/// So many of those that have been idle longest are looked at for one of a client that holds much.
const LONGEST_IDLE: usize = 16;

impl Conn {
    /// Whose queries it has room for, if not everybody's: a client's, or one connection's of that client.
    pub(crate) fn room_for(&self) -> Option<(IpAddr, Option<SessionKey>)> {
        self.holder.filter(|_| self.has_room()).map(|holder| (holder, self.owner()))
    }

    /// Whether it has had its turn, if somebody else wants its place.
    pub(crate) fn had_its_turn(&self, now: Mono) -> bool {
        self.carried >= TURN_QUERIES || self.turn_began.after(TURN_TIME) <= now
    }

    /// Whether its place can be had while it is busy: it is given no more queries then.
    pub(super) fn takes_turns(&self) -> bool {
        self.stays
            && !self.apart
            && self.phase == Phase::Open
            && matches!(self.kind, ConnKind::Shared | ConnKind::Keyed | ConnKind::Owned)
    }
}

impl Pool {
    /// Who has places at a backend, and who waits for one.
    pub(crate) fn line(&self, backend: BackendIndex) -> &WaitQueue {
        &self.backends[usize::from(backend)].line
    }

    pub(crate) fn line_mut(&mut self, backend: BackendIndex) -> &mut WaitQueue {
        &mut self.backends[usize::from(backend)].line
    }

    /// The lines of all backends.
    pub(crate) fn lines(&self) -> impl Iterator<Item = &WaitQueue> {
        self.backends.iter().map(|backend| &backend.line)
    }

    pub(crate) fn lines_mut(&mut self) -> impl Iterator<Item = &mut WaitQueue> {
        self.backends.iter_mut().map(|backend| &mut backend.line)
    }

    /// Spare connections to a backend, connected or on their way.
    pub fn spares(&self, backend: BackendIndex) -> usize {
        self.backends[usize::from(backend)].spares.len()
    }

    /// A spare connection that can be given to somebody: one that is connected if there is one.
    pub(crate) fn ready_spare(&self, backend: BackendIndex) -> Option<ConnKey> {
        let spares = &self.backends[usize::from(backend)].spares;
        let conn = |key: &&ConnKey| self.conns.get(key.0).filter(|conn| conn.has_room());
        let open = spares.iter().find(|key| conn(key).is_some_and(|conn| conn.phase == Phase::Open));
        open.or_else(|| spares.iter().find(|key| conn(key).is_some())).copied()
    }

    /// Connections to a backend whose places come free soon.
    pub(crate) fn closing(&self, backend: BackendIndex) -> usize {
        self.backends[usize::from(backend)].closing
    }

    /// The same, to all backends.
    pub(crate) fn all_closing(&self) -> usize {
        self.backends.iter().map(|backend| backend.closing).sum()
    }

    /// Connections to a backend, or to all, whose places come free: now, or when all is answered.
    pub(crate) fn leaving(&self, backend: Option<BackendIndex>) -> usize {
        let leaving = |backend: &PerBackend| backend.conns - backend.staying;
        backend.map_or_else(|| self.backends.iter().map(leaving).sum(), |at| leaving(&self.backends[usize::from(at)]))
    }

    /// Connections to a backend, or to all, whose places are neither idle nor about to come free.
    pub(crate) fn occupied(&self, backend: Option<BackendIndex>) -> usize {
        let occupied = |backend: &PerBackend| backend.conns - backend.idle.len() - backend.closing;
        backend.map_or_else(|| self.backends.iter().map(occupied).sum(), |at| occupied(&self.backends[usize::from(at)]))
    }

    /// The backend with most connections.
    pub(crate) fn fullest(&self) -> Option<BackendIndex> {
        let fullest = (0..self.backends.len()).max_by_key(|at| self.backends[*at].staying);
        // As many as there are backends in the configuration, which are fewer than 65,535.
        fullest.map(|at| at as BackendIndex)
    }

    /// The connection to this backend that is missed least: a spare one, else the one that has been idle longest.
    pub(crate) fn longest_idle(&self, backend: BackendIndex) -> Option<ConnKey> {
        let backend = &self.backends[usize::from(backend)];
        let closing = |key: &&ConnKey| self.conns.get(key.0).is_none_or(Conn::is_closing);
        backend.spares.iter().find(|key| !closing(key)).copied().or_else(|| backend.idle.front().map(ConnKey))
    }

    /// The same for any backend.
    pub(crate) fn longest_idle_of_all(&self) -> Option<ConnKey> {
        let mut spares = self.backends.iter().flat_map(|backend| &backend.spares);
        if let Some(spare) = spares.find(|key| self.conns.get(key.0).is_some_and(|conn| !conn.is_closing())) {
            return Some(*spare);
        }
        let fronts = self.backends.iter().filter_map(|backend| backend.idle.front());
        fronts.min_by_key(|at| self.conns[*at].idle_since).map(ConnKey)
    }

    /// The idle connection to this backend that makes way for a client: a spare one; one of its own if it holds more than its
    /// share; of those that have been idle longest, one of who holds most. From who holds no more than it does itself it
    /// takes what has been idle for a while, or else one of its own; who holds three quarters of all takes nothing from others.
    pub(crate) fn makes_way(&self, backend: BackendIndex, client: IpAddr, now: Mono) -> Option<ConnKey> {
        let per_backend = &self.backends[usize::from(backend)];
        let holders = per_backend.line.holders();
        let held = holders.of(client) as usize;
        if held * holders.clients() > per_backend.conns
            && let Some(own) = self.own_idle(backend, client)
        {
            return Some(own);
        }
        let others = per_backend.conns - held;
        if others > 0 && held >= 3 * others {
            return None;
        }
        let longest = self.longest_idle_of_fullest(backend)?;
        let in_use = self.conns.get(longest.0).is_some_and(|conn| {
            let holds_less = |holder| holder != client && holders.of(holder) as usize <= held;
            conn.holder.is_some_and(holds_less) && conn.idle_since.after(IN_USE) > now
        });
        if in_use { self.own_idle(backend, client) } else { Some(longest) }
    }

    /// Of a client's idle connections to this backend the one that has been so for longest.
    pub(crate) fn own_idle(&self, backend: BackendIndex, client: IpAddr) -> Option<ConnKey> {
        let per_backend = &self.backends[usize::from(backend)];
        if per_backend.line.holders().of(client) == 0 {
            return None;
        }
        let mut idle = per_backend.idle.iter(|at| self.conns[at].idle);
        idle.find(|at| self.conns[*at].holder == Some(client)).map(ConnKey)
    }

    /// A spare connection; else, of those that have been idle longest, the first of who holds most.
    pub(crate) fn longest_idle_of_fullest(&self, backend: BackendIndex) -> Option<ConnKey> {
        let per_backend = &self.backends[usize::from(backend)];
        let held = |at: &usize| self.conns[*at].holder.map_or(0, |holder| per_backend.line.holders().of(holder));
        let idle = per_backend.idle.iter(|at| self.conns[at].idle).take(LONGEST_IDLE);
        let fullest = idle.min_by_key(|at| u32::MAX - held(at)).map(ConnKey);
        let longest = self.longest_idle(backend)?;
        let is_spare = self.conns.get(longest.0).is_some_and(|conn| conn.kind == ConnKind::Spare);
        fullest.filter(|_| !is_spare).or(Some(longest))
    }

    /// The first connection to this backend, busy or not, that makes way, in the order in which their turns began; or how
    /// many were looked at in vain.
    pub(crate) fn in_turn(&self, backend: BackendIndex, wanted: impl Fn(&Conn) -> bool) -> Result<ConnKey, usize> {
        let turns = &self.backends[usize::from(backend)].turns;
        let mut turns_of = turns.iter(|at| self.conns[at].turn);
        turns_of.find(|at| wanted(&self.conns[*at])).map(ConnKey).ok_or(turns.len())
    }
}

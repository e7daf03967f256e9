//! Whose turn it is where places are short: who makes way for whom, and who may wait.
//!
//! A place counts for the client that it was taken for. Where others want one, who holds more gives way: with what is idle
//! first, then with busy connections, which get no more queries and close when all is answered. So it goes between the
//! clients of a worker, and between workers, which count as one each.
//!
//! What is busy for long cannot be had back soon. So a client that holds places leaves some to others as long as there are
//! others: the more it holds, the more must be left for it to get one more (a dynamic threshold, as Choudhury and Hahne give
//! for the buffers of a switch, IEEE/ACM Transactions on Networking 6.2, 1998).

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use super::core::Core;
use super::plan::ProxyPlan;
use crate::backend::pool::{Conn, ConnKey};
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::close::{CloseReason, FailReason};
use crate::config::network::masked;
use crate::ledger::caps::{AtCap, Permit};
use crate::ledger::{BackendIndex, ConnKind};
use crate::proxy_protocol::identity::Identity;

/// While there are others, a client that holds places gets one more only as long as it holds fewer than so many times what
/// is left beside that: one client has four fifths at most, and whatever clients there are do not take the last place.
pub(super) const TIMES_LEFT: usize = 4;

impl Core {
    /// Who counts as one where places are shared: the client, or its network where headers name that.
    pub(super) fn party_of(&self, key: SessionKey) -> IpAddr {
        let client = self.client_of(key);
        match self.proxy_of(key).map(|proxy| (proxy.identity, proxy.per_query)) {
            Some((Identity::Subnet { v4, v6 }, false)) => masked(client, v4, v6),
            _ => client,
        }
    }

    /// Whom a connection's place counts for; none: it is of use to everybody.
    pub(super) fn holder_of(&self, key: SessionKey, kind: ConnKind) -> Option<IpAddr> {
        let is_common = match kind {
            ConnKind::Keyed => self.proxy_of(key).is_some_and(is_for_all),
            kind => kind == ConnKind::Shared,
        };
        (!is_common).then(|| self.party_of(key))
    }

    fn proxy_of(&self, key: SessionKey) -> Option<&ProxyPlan> {
        self.plan.pools.get(usize::from(self.sessions[key.0].pool))?.proxy.as_ref()
    }

    /// A place under the caps, if one is free that is not for another worker.
    pub(super) fn permit(&self, backend: BackendIndex, now: Mono) -> Result<Permit, AtCap> {
        let moves = self.moves.get(usize::from(backend)).copied().unwrap_or(0);
        self.shared.caps.acquire_for(self.worker, backend, moves, now)
    }

    /// Whether a client connection leaves enough to others if it gets one more place. What is idle makes way, so it is left
    /// to others; and of places that other workers have nothing is known but that the limit counts them.
    pub(super) fn leaves_room(&self, key: SessionKey, backend: BackendIndex, now: Mono) -> bool {
        if self.proxy_of(key).is_none_or(is_for_all) {
            return true;
        }
        let client = self.party_of(key);
        let (line, caps) = (self.pool.line(backend), &self.shared.caps);
        let held = line.holders().of(client) as usize;
        if held == 0 {
            return true;
        }
        let occupied = self.pool.occupied(Some(backend));
        let of_backend = caps.backend(backend).map_or(0, |(limit, _)| limit.saturating_sub(occupied));
        let left = of_backend.min(caps.total().0.saturating_sub(self.pool.occupied(None)));
        let is_alone = || {
            let is_busy_alone = occupied <= held;
            is_busy_alone && !line.others_want(client, now) && !caps.others_want(self.worker, backend, now)
        };
        held < TIMES_LEFT * left.saturating_sub(1) || is_alone()
    }

    /// A client connection that must leave what there is to others needs a connection with a header of this digest: an idle
    /// one of its client makes way, or a busy one, of who holds two places more or of another connection of the client's.
    pub(super) fn find_own_place(&mut self, key: SessionKey, digest: u64, backend: BackendIndex, now: Mono) {
        if !self.gives_own_idle(key, backend, now)
            && let Some(victim) = self.busy_for(key, digest, (backend, AtCap::Backend), now)
        {
            self.pool.retire(victim, CloseReason::Evicted, now);
        }
    }

    /// An idle connection of a client makes way for another one of the same client, which then holds less than those in
    /// the line that hold as much now. False: it has none, and no place is about to come free.
    pub(super) fn gives_own_idle(&mut self, key: SessionKey, backend: BackendIndex, now: Mono) -> bool {
        let client = self.party_of(key);
        if self.pool.leaving(Some(backend)) >= self.in_line_with(client, backend) {
            return true;
        }
        let own = self.pool.own_idle(backend, client);
        own.inspect(|own| self.pool.retire(*own, CloseReason::Evicted, now)).is_some()
    }

    /// How many clients are in the line with the one that asks, which will be if it has nothing in there yet.
    fn in_line_with(&self, client: IpAddr, backend: BackendIndex) -> usize {
        let line = self.pool.line(backend);
        line.clients() + usize::from(line.waiting().of(client) == 0)
    }

    /// A cap is reached, and a client connection needs a connection with a header of this digest: somebody makes way, here
    /// or in another worker.
    pub(super) fn find_place(
        &mut self,
        (key, digest): (SessionKey, u64),
        backend: BackendIndex,
        cap: AtCap,
        now: Mono,
    ) {
        self.shared.caps.claim(self.worker, backend, cap, now);
        let client = self.party_of(key);
        let clients = self.in_line_with(client, backend);
        let closing = match cap {
            AtCap::Backend => self.pool.closing(backend),
            AtCap::Total => self.pool.all_closing(),
        };
        if closing >= clients {
            // Places are about to come free; whoever else waits then asks again.
            return;
        }
        let idle = match cap {
            AtCap::Backend => self.pool.makes_way(backend, client, now),
            AtCap::Total => self.pool.longest_idle_of_all(),
        };
        let busy = || {
            // Those that make way already close when all is answered.
            let enough = self.pool.leaving((cap == AtCap::Backend).then_some(backend)) >= clients;
            if enough { None } else { self.busy_for(key, digest, (backend, cap), now) }
        };
        match idle.or_else(busy) {
            Some(victim) => self.pool.retire(victim, CloseReason::Evicted, now),
            None if self.pool.line_mut(backend).asks(now) => self.wakes.ask_for_room.push((backend, cap, clients)),
            None => {}
        }
    }

    /// The busy connection that makes way for a client: of one that holds two places more; where the client has none, any
    /// that has had its turn; else one of another connection of the same client's.
    fn busy_for(
        &mut self,
        key: SessionKey,
        digest: u64,
        (at, cap): (BackendIndex, AtCap),
        now: Mono,
    ) -> Option<ConnKey> {
        if !self.pool.line(at).searches(now) {
            return None;
        }
        let client = self.party_of(key);
        let backend = match cap {
            AtCap::Backend => at,
            AtCap::Total => self.pool.fullest()?,
        };
        let holders = self.pool.line(backend).holders();
        let held = self.pool.line(at).holders().of(client);
        let most = holders.most();
        let wanted = |conn: &Conn| {
            let Some(holder) = conn.holder else { return false };
            if conn.kind == ConnKind::Keyed && conn.header_digest == digest {
                // There will be room on this very one.
                return false;
            }
            if holder == client {
                return held > 0 && conn.owner() != Some(key) && conn.had_its_turn(now);
            }
            (most >= held + 2 && holders.of(holder) >= held + 2) || (held == 0 && conn.had_its_turn(now))
        };
        let found = if most == 0 { Err(0) } else { self.pool.in_turn(backend, wanted) };
        found.map_err(|among| self.pool.line_mut(at).searched(among, now)).ok()
    }

    /// Somebody waits at a cap: another worker, for so many clients, or a health check.
    pub(crate) fn asked_for_room(
        &mut self,
        backend: BackendIndex,
        cap: AtCap,
        worker: Option<(usize, usize)>,
        now: Mono,
    ) {
        let of_all = cap == AtCap::Total;
        let Some(at) = (if of_all { self.pool.fullest() } else { Some(backend) }) else { return };
        if let Some((worker, clients)) = worker {
            self.pool.line_mut(at).ask(worker, clients, of_all, now);
            self.give_up(at, now);
            if self.shared.caps.has_most(worker, backend) {
                return;
            }
        }
        // It costs nobody here much, whatever the shares.
        let (closing, idle) = if of_all {
            (self.pool.all_closing(), self.pool.longest_idle_of_all())
        } else {
            (self.pool.closing(backend), self.pool.longest_idle_of_fullest(backend))
        };
        if let Some(idle) = idle.filter(|_| closing == 0) {
            self.pool.close(idle, CloseReason::Evicted, now);
        }
    }

    /// Gives up connections that another worker wants, and has a right to.
    fn give_up(&mut self, backend: BackendIndex, now: Mono) {
        let Some(asked) = self.pool.line_mut(backend).asked(now) else { return };
        let scope = (!asked.of_all).then_some(backend);
        let due = self.shared.caps.due(self.worker, asked.worker, scope);
        let wanted = (due.excess + due.in_turn).min(asked.clients);
        while self.pool.closing(backend) < wanted
            && let Some(idle) = self.pool.longest_idle_of_fullest(backend)
        {
            self.pool.retire(idle, CloseReason::Evicted, now);
        }
        for _ in self.pool.leaving(scope)..wanted {
            let holders = self.pool.line(backend).holders();
            let most = holders.most();
            let has_most = |conn: &Conn| conn.holder.is_none_or(|holder| holders.of(holder) == most);
            let gives = |conn: &Conn| (due.excess > 0 && has_most(conn)) || conn.had_its_turn(now);
            let Ok(victim) = self.pool.in_turn(backend, gives) else { return };
            self.pool.retire(victim, CloseReason::Evicted, now);
        }
    }

    /// Something has ended on a connection: its place, or room on it, may be of use to somebody else.
    pub(super) fn share_places(&mut self, key: ConnKey, backend: BackendIndex, now: Mono) {
        self.give_up(backend, now);
        if self.pool.line(backend).is_empty() {
            return;
        }
        self.serve_waiting(backend, now);
        // Where the first in line has to wait on, what room there is may be good for those alone whose connection it is.
        while let Some((holder, owner)) = self.pool.get(key).and_then(Conn::room_for)
            && let Some(next) = self.pool.line_mut(backend).pop_of(holder, owner)
        {
            if !self.serve(backend, next, now) {
                return;
            }
        }
    }

    /// Counts one more query that waits. If `max_waiting` do, whose client has most of them here gives up its newest for one
    /// that has fewer; and a worker that has less than its share of all takes it from the others.
    pub(super) fn may_wait(&mut self, client: IpAddr, backend: BackendIndex) -> bool {
        let limit = self.plan.connections.max_waiting;
        let waiting = &self.shared.waiting;
        let room = |waiting| (waiting < limit).then_some(waiting + 1);
        if waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_ok() {
            return true;
        }
        let here = self.pool.line(backend).waiting().of(client);
        let takes = self.shed(backend, here + 1) || {
            let below_share = self.stats.waiting.get() < self.share_of_waiting();
            self.wakes.ask_to_shed |= below_share;
            below_share
        };
        if takes {
            self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        }
        takes
    }

    /// So many queries may wait in each worker if all have some.
    fn share_of_waiting(&self) -> u64 {
        (self.plan.connections.max_waiting / self.shared.caps.workers()) as u64
    }

    /// The client that has most queries in a line of this worker gives up the newest, if it has more than so many.
    fn shed(&mut self, backend: BackendIndex, more_than: u32) -> bool {
        let most = |at: BackendIndex| self.pool.line(at).waiting().most();
        let mut at = backend;
        if most(at) <= more_than {
            // As many as there are backends in the configuration, which are fewer than 65,535.
            let fullest = (0..self.plan.backends.len() as u16).max_by_key(|at| most(*at));
            let Some(fullest) = fullest.filter(|at| most(*at) > more_than) else { return false };
            at = fullest;
        }
        let Some(query) = self.pool.line(at).last() else { return false };
        self.stop_waiting(query);
        self.fail(query, FailReason::NoCapacity);
        true
    }

    /// Another worker has less than its share of the queries that wait, and there are too many.
    pub(crate) fn shed_excess(&mut self) {
        let limit = self.plan.connections.max_waiting;
        while self.shared.waiting.load(Ordering::Relaxed) > limit
            && self.stats.waiting.get() > self.share_of_waiting()
            && self.shed(0, 0)
        {}
    }
}

/// Whether connections with this header are of use to all clients.
fn is_for_all(proxy: &ProxyPlan) -> bool {
    proxy.identity == Identity::Forwarder && !proxy.per_query
}

//! The queries of a worker: table entries, never tasks. Entries and their buffers are used again, so a query in steady
//! state allocates nothing.

use std::time::Duration;

use super::core::ROOM;
use super::links::{Links, List};
use super::transfer::Transfer;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::dns::hop::Treatment;
use crate::dns::transfer::Request;

/// A query, and proof against its slot being used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueryKey {
    /// Slot in the table.
    pub index: u32,
    /// How often the slot has been used.
    pub generation: u32,
}

/// Where a query is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In no connection: just arrived, or between two tries.
    Nowhere,
    /// In the queue of a cap.
    Waiting,
    /// On a connection, with this wire ID.
    Sent { conn: ConnKey, id: u16 },
}

/// The places of a pool's backends that failed a query. Places from 64 on count as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tried(u64);

impl Tried {
    pub(crate) fn add(&mut self, place: usize) {
        self.0 |= 1 << place.min(63);
    }

    pub(crate) fn has(self, place: usize) -> bool {
        self.0 & (1 << place.min(63)) != 0
    }
}

/// A query from its arrival to its answer.
#[derive(Debug)]
pub(crate) struct Query {
    generation: u32,
    live: bool,
    pub(crate) session: SessionKey,
    /// The client's ID, put back into the answer (I12).
    pub(crate) client_id: u16,
    pub(crate) pool: u16,
    /// The line of its deadline.
    line: u16,
    pub(crate) listener: u16,
    pub(crate) arrived: Mono,
    pub(crate) deadline: Mono,
    /// When it was put on a connection last.
    pub(crate) sent: Mono,
    /// The how manieth it was on that connection, from 1.
    pub(crate) turn: u64,
    pub(crate) place: Place,
    pub(crate) retries_left: u8,
    /// Must go to a connection that has carried nothing yet.
    pub(crate) fresh_only: bool,
    /// The backends that failed it, a bit for each place in the pool.
    pub(crate) tried: Tried,
    /// What is done with the EDNS options of its answer.
    pub(crate) treatment: Treatment,
    /// What has come of a zone transfer; none: one message answers it.
    pub(crate) transfer: Option<Box<Transfer>>,
    /// The message as it came, without the length.
    pub(crate) message: Vec<u8>,
    by_deadline: Links,
    by_session: Links,
}

/// A buffer above this size is not kept for the next query, bytes.
const KEEP: usize = 512;

/// The table. Among queries with the same timeout the order of arrival is the order of deadlines: they stand in line.
#[derive(Debug)]
pub(crate) struct Queries {
    slots: Vec<Query>,
    free: Vec<u32>,
    lines: Vec<(Duration, List)>,
}

impl Default for Queries {
    fn default() -> Self {
        Self { slots: Vec::with_capacity(ROOM), free: Vec::with_capacity(ROOM), lines: Vec::new() }
    }
}

impl Queries {
    /// The line for each of these timeouts.
    pub(crate) fn lines(&mut self, timeouts: impl Iterator<Item = Duration>) -> Vec<u16> {
        let mut lines = Vec::new();
        for timeout in timeouts {
            let line = self.line(timeout, &lines);
            lines.push(line);
        }
        lines
    }

    /// The line of the queries with this timeout. A line in which nobody stands is taken over, unless it is one of
    /// `in_use`.
    fn line(&mut self, timeout: Duration, in_use: &[u16]) -> u16 {
        let same = self.lines.iter().position(|(of, _)| *of == timeout);
        let vacant = |at: &usize| self.lines[*at].1.len() == 0 && !in_use.iter().any(|line| usize::from(*line) == *at);
        let at = same.or_else(|| (0..self.lines.len()).find(vacant)).unwrap_or_else(|| {
            self.lines.push((timeout, List::default()));
            self.lines.len() - 1
        });
        self.lines[at].0 = timeout;
        // One per pool, and those in which queries of before a reload stand: fewer than 65,536.
        at as u16
    }

    /// Enters a query, under its session's list.
    pub(crate) fn insert(&mut self, new: NewQuery<'_>, of_session: &mut List) -> QueryKey {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Query::vacant());
            (self.slots.len() - 1) as u32
        });
        let at = index as usize;
        let slot = &mut self.slots[at];
        slot.live = true;
        slot.session = new.session;
        slot.client_id = new.client_id;
        slot.pool = new.pool;
        slot.line = new.line;
        slot.listener = new.listener;
        slot.arrived = new.arrived;
        slot.deadline = new.deadline;
        slot.sent = Mono::ZERO;
        slot.place = Place::Nowhere;
        slot.retries_left = new.retries;
        slot.fresh_only = false;
        slot.tried = Tried::default();
        slot.treatment = new.treatment;
        slot.transfer = new.transfer.map(|request| Box::new(Transfer::new(request)));
        slot.message.clear();
        slot.message.extend_from_slice(new.message);
        let generation = slot.generation;
        let line = &mut self.lines[usize::from(new.line)].1;
        line.push_back(&mut self.slots, at, |query: &mut Query| &mut query.by_deadline);
        of_session.push_back(&mut self.slots, at, |query: &mut Query| &mut query.by_session);
        QueryKey { index, generation }
    }

    /// Takes a query out. Its session's list must be given if the session still exists.
    pub(crate) fn remove(&mut self, key: QueryKey, of_session: Option<&mut List>) {
        let at = key.index as usize;
        if self.get(key).is_none() {
            return;
        }
        let line = usize::from(self.slots[at].line);
        self.lines[line].1.remove(&mut self.slots, at, |query: &mut Query| &mut query.by_deadline);
        if let Some(list) = of_session {
            list.remove(&mut self.slots, at, |query: &mut Query| &mut query.by_session);
        } else {
            self.slots[at].by_session = Links::default();
        }
        let slot = &mut self.slots[at];
        slot.live = false;
        slot.transfer = None;
        slot.generation = slot.generation.wrapping_add(1);
        if slot.message.capacity() > KEEP {
            slot.message = Vec::new();
        }
        self.free.push(key.index);
    }

    /// The next message of a zone transfer is due one timeout from now: it goes to the end of its line, where the latest
    /// deadlines are.
    pub(crate) fn renew(&mut self, key: QueryKey, now: Mono) {
        if self.get(key).is_none() {
            return;
        }
        let at = key.index as usize;
        let (timeout, line) = &mut self.lines[usize::from(self.slots[at].line)];
        line.remove(&mut self.slots, at, |query: &mut Query| &mut query.by_deadline);
        self.slots[at].deadline = now.after(*timeout);
        line.push_back(&mut self.slots, at, |query: &mut Query| &mut query.by_deadline);
    }

    /// The backends of the pools have changed: what the queries have tried tells nothing any more.
    pub(crate) fn forget_tries(&mut self) {
        self.slots.iter_mut().for_each(|query| query.tried = Tried::default());
    }

    /// How many there are of each pool, of so many.
    pub(crate) fn by_pool(&self, pools: usize) -> Vec<u64> {
        let mut counts = vec![0; pools];
        for query in self.slots.iter().filter(|query| query.live) {
            if let Some(count) = counts.get_mut(usize::from(query.pool)) {
                *count += 1;
            }
        }
        counts
    }

    pub(crate) fn get(&self, key: QueryKey) -> Option<&Query> {
        self.slots.get(key.index as usize).filter(|query| query.live && query.generation == key.generation)
    }

    pub(crate) fn get_mut(&mut self, key: QueryKey) -> Option<&mut Query> {
        self.slots.get_mut(key.index as usize).filter(|query| query.live && query.generation == key.generation)
    }

    /// The earliest deadline of all queries.
    pub(crate) fn next_deadline(&self) -> Option<Mono> {
        self.lines.iter().filter_map(|(_, line)| line.front()).map(|at| self.slots[at].deadline).min()
    }

    /// A query whose deadline has come.
    pub(crate) fn expired(&self, now: Mono) -> Option<QueryKey> {
        self.lines
            .iter()
            .filter_map(|(_, line)| line.front())
            .find(|at| self.slots[*at].deadline <= now)
            .map(|at| QueryKey { index: at as u32, generation: self.slots[at].generation })
    }

    /// The first query of a session.
    pub(crate) fn first_of(&self, of_session: &List) -> Option<QueryKey> {
        of_session.front().map(|at| QueryKey { index: at as u32, generation: self.slots[at].generation })
    }

    /// How many queries there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// What is known of a query when it arrives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewQuery<'a> {
    pub(crate) session: SessionKey,
    pub(crate) client_id: u16,
    pub(crate) pool: u16,
    pub(crate) line: u16,
    pub(crate) listener: u16,
    pub(crate) arrived: Mono,
    pub(crate) deadline: Mono,
    pub(crate) retries: u8,
    pub(crate) treatment: Treatment,
    pub(crate) transfer: Option<Request>,
    pub(crate) message: &'a [u8],
}

impl Query {
    fn vacant() -> Self {
        Self {
            generation: 0,
            live: false,
            session: SessionKey(usize::MAX),
            client_id: 0,
            pool: 0,
            line: 0,
            listener: 0,
            arrived: Mono::ZERO,
            deadline: Mono::ZERO,
            sent: Mono::ZERO,
            turn: 0,
            place: Place::Nowhere,
            retries_left: 0,
            fresh_only: false,
            tried: Tried::default(),
            treatment: Treatment::default(),
            transfer: None,
            message: Vec::new(),
            by_deadline: Links::default(),
            by_session: Links::default(),
        }
    }
}

//! Who has places at a backend, and who waits for one. A pure state machine.
//!
//! A place counts for the client (an address, or the network of the listener's masks) for which it was taken. Of those who
//! wait, the client that holds least is next, and of clients that hold as many each in turn; of a client's connections, too,
//! each in turn.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use foldhash::fast::{FixedState, RandomState};

use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::ledger::caps::RECENTLY;
use crate::worker::queries::QueryKey;

/// Whose turn it is tries again after this time, whatever happens here: a place may have become free of which this worker
/// is not told, by a health check or by a connection of another worker that is idle only now.
const AGAIN: Duration = Duration::from_millis(20);

/// After a search for a connection that makes way was in vain, the next one is not before this time has passed,
const SEARCH: Duration = Duration::from_millis(1);
/// and this one for each connection that it had to look at: however many there are, it takes little of a worker's time.
const SEARCH_OF_ONE: Duration = Duration::from_micros(1);

/// A query that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Whose it is: an address or a network.
    pub client: IpAddr,
    /// The client's connection.
    pub session: SessionKey,
    /// Which.
    pub query: QueryKey,
    /// When it has waited long enough.
    pub until: Mono,
}

/// How many of something each client has.
#[derive(Debug, Default)]
pub struct Tally {
    // Random: who could choose addresses that fall together would make each look-up long.
    counts: HashMap<IpAddr, u32, RandomState>,
    /// How many clients have so many, from one on.
    with: Vec<u32>,
}

impl Tally {
    /// What this client has.
    pub fn of(&self, client: IpAddr) -> u32 {
        if self.counts.is_empty() { 0 } else { self.counts.get(&client).copied().unwrap_or(0) }
    }

    /// The most that one client has.
    pub fn most(&self) -> u32 {
        // Nobody has 2^32.
        self.with.len() as u32
    }

    /// How many clients have any.
    pub fn clients(&self) -> usize {
        self.counts.len()
    }

    /// A client with the most.
    fn first(&self) -> Option<IpAddr> {
        let most = self.most();
        self.counts.iter().find(|(_, count)| **count == most).map(|(client, _)| *client)
    }

    fn set(&mut self, client: IpAddr, to: u32) {
        let before = if to == 0 { self.counts.remove(&client) } else { self.counts.insert(client, to) }.unwrap_or(0);
        if let Some(at) = before.checked_sub(1) {
            self.with[at as usize] -= 1;
        }
        if let Some(at) = to.checked_sub(1) {
            let at = at as usize;
            self.with.resize(self.with.len().max(at + 1), 0);
            self.with[at] += 1;
        }
        while self.with.last() == Some(&0) {
            self.with.pop();
        }
    }
}

/// Which two clients have used a place last, and when.
#[derive(Debug, Default)]
struct Users {
    last: Option<(IpAddr, Mono)>,
    /// Of all others the one that was last.
    other: Option<(IpAddr, Mono)>,
}

impl Users {
    fn used(&mut self, client: IpAddr, now: Mono) {
        match &mut self.last {
            Some((last, at)) if *last == client => *at = now,
            last => self.other = last.replace((client, now)),
        }
    }

    /// When a client other than this one was here last.
    fn another_than(&self, client: IpAddr) -> Option<Mono> {
        let last = self.last.filter(|(last, _)| *last != client);
        last.or(self.other).map(|(_, at)| at)
    }
}

/// What another worker wants of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Which worker.
    pub worker: usize,
    /// For how many clients.
    pub clients: usize,
    /// It counts the places of all backends.
    pub of_all: bool,
    until: Mono,
}

/// The queue of one backend.
#[derive(Debug, Default)]
pub struct WaitQueue {
    /// How many places each client holds.
    holders: Tally,
    users: Users,
    /// How many queries of each client wait.
    waiting: Tally,
    /// The clients that wait: how many places they hold, and their turn.
    order: BTreeSet<(u32, u64, IpAddr)>,
    clients: HashMap<IpAddr, Client, RandomState>,
    queries: HashMap<SessionKey, (IpAddr, VecDeque<Waiter>), FixedState>,
    /// The last turn that was given.
    turn: u64,
    /// All in the order in which they have waited long enough. May hold queries that left meanwhile.
    ends: VecDeque<(Mono, QueryKey)>,
    /// When whose turn it is tries again.
    again: Mono,
    /// Before this other workers are not asked once more.
    asks: Mono,
    /// Before this nobody looks for a connection that makes way once more.
    searches: Mono,
    asked: Option<Asked>,
}

/// A client that waits.
#[derive(Debug)]
struct Client {
    turn: u64,
    /// Its connections in the order of their turns; each is in here once.
    sessions: VecDeque<SessionKey>,
}

impl WaitQueue {
    /// A query begins to wait.
    pub fn push(&mut self, waiter: Waiter, now: Mono) {
        if self.is_empty() {
            self.again = now.after(AGAIN);
        }
        self.line_up(waiter, None);
        // Nearly always the last one: all wait equally long, but for one that has waited elsewhere before.
        let at = self.ends.partition_point(|(until, _)| *until <= waiter.until);
        self.ends.insert(at, (waiter.until, waiter.query));
    }

    /// At the end of its line, or, with the turn that it had, in front.
    fn line_up(&mut self, waiter: Waiter, first: Option<u64>) {
        let Waiter { client, session, .. } = waiter;
        // A reload may have made another client of it, by other masks: as long as some of its queries wait, it is the one
        // that it was.
        let client = self.queries.get(&session).map_or(client, |(client, _)| *client);
        let held = self.holders.of(client);
        let of_client = self.clients.entry(client).or_insert_with(|| {
            self.turn += 1;
            self.order.insert((held, self.turn, client));
            Client { turn: self.turn, sessions: VecDeque::new() }
        });
        self.waiting.set(client, self.waiting.of(client) + 1);
        let (_, waiting) = self.queries.entry(session).or_insert_with(|| (client, VecDeque::new()));
        let Some(turn) = first else {
            if waiting.is_empty() {
                of_client.sessions.push_back(session);
            }
            waiting.push_back(waiter);
            return;
        };
        if !waiting.is_empty() {
            of_client.sessions.retain(|other| *other != session);
        }
        of_client.sessions.push_front(session);
        waiting.push_front(waiter);
        self.order.remove(&(held, of_client.turn, client));
        of_client.turn = turn;
        self.order.insert((held, turn, client));
    }

    /// The query whose turn it is, and the turn. Its client goes to the end of the line, and so does its connection among
    /// those of the client.
    pub fn pop(&mut self) -> Option<(Waiter, u64)> {
        let Some((_, _, client)) = self.order.first().copied() else {
            self.ends.clear();
            return None;
        };
        let session = self.clients.get(&client)?.sessions.front().copied()?;
        self.take(client, session)
    }

    /// The next query of this client's, or of this very connection of its, if it waits.
    pub fn pop_of(&mut self, client: IpAddr, session: Option<SessionKey>) -> Option<(Waiter, u64)> {
        let first = self.clients.get(&client)?.sessions.front().copied()?;
        self.take(client, session.unwrap_or(first))
    }

    /// The query that [`Self::pop`] gave could not be served: it is first again.
    pub fn put_back(&mut self, (waiter, turn): (Waiter, u64), now: Mono) {
        self.line_up(waiter, Some(turn));
        self.again = now.after(AGAIN);
    }

    /// The first one of a client's connection.
    fn take(&mut self, client: IpAddr, session: SessionKey) -> Option<(Waiter, u64)> {
        let held = self.holders.of(client);
        let of_client = self.clients.get_mut(&client)?;
        let (of, waiting) = self.queries.get_mut(&session)?;
        if *of != client {
            return None;
        }
        let waiter = waiting.pop_front()?;
        let turn = of_client.turn;
        self.waiting.set(client, self.waiting.of(client) - 1);
        of_client.sessions.retain(|other| *other != session);
        if waiting.is_empty() {
            self.queries.remove(&session);
        } else {
            of_client.sessions.push_back(session);
        }
        self.order.remove(&(held, turn, client));
        if of_client.sessions.is_empty() {
            self.clients.remove(&client);
        } else {
            self.turn += 1;
            of_client.turn = self.turn;
            self.order.insert((held, self.turn, client));
        }
        Some((waiter, turn))
    }

    /// A query leaves without being served.
    pub fn remove(&mut self, session: SessionKey, query: QueryKey) {
        let Some((client, waiting)) = self.queries.get_mut(&session) else { return };
        let (client, before) = (*client, waiting.len());
        waiting.retain(|other| other.query != query);
        // Fewer than 2^32.
        let (gone, is_empty) = ((before - waiting.len()) as u32, waiting.is_empty());
        if is_empty {
            self.queries.remove(&session);
        }
        let Some(of_client) = self.clients.get_mut(&client) else { return };
        self.waiting.set(client, self.waiting.of(client) - gone);
        if is_empty {
            of_client.sessions.retain(|other| *other != session);
        }
        if of_client.sessions.is_empty() {
            self.order.remove(&(self.holders.of(client), of_client.turn, client));
            self.clients.remove(&client);
        }
    }

    /// How many queries of each client wait.
    pub fn waiting(&self) -> &Tally {
        &self.waiting
    }

    /// The query that is missed least: of the client with most of them, the last one of its connection with most.
    pub fn last(&self) -> Option<QueryKey> {
        let sessions = self.clients.get(&self.waiting.first()?)?.sessions.iter();
        let lines = sessions.filter_map(|session| self.queries.get(session));
        lines.max_by_key(|(_, line)| line.len())?.1.back().map(|waiter| waiter.query)
    }

    /// How many clients wait.
    pub fn clients(&self) -> usize {
        self.order.len()
    }

    /// What each client holds.
    pub fn holders(&self) -> &Tally {
        &self.holders
    }

    /// A client has a place more.
    pub(super) fn took(&mut self, client: IpAddr, now: Mono) {
        self.holds(client, |held| held + 1);
        self.used(client, now);
    }

    /// One of a client's places has become idle, or busy.
    pub(super) fn used(&mut self, client: IpAddr, now: Mono) {
        self.users.used(client, now);
    }

    /// When a client other than this one has used a place last.
    pub fn used_by_another(&self, client: IpAddr) -> Option<Mono> {
        self.users.another_than(client)
    }

    /// Whether anybody but this client waits, or has used a place not long ago.
    pub fn others_want(&self, client: IpAddr, now: Mono) -> bool {
        let others_wait = self.clients() > usize::from(self.clients.contains_key(&client));
        others_wait || self.used_by_another(client).is_some_and(|at| at.after(RECENTLY) > now)
    }

    /// Whether a query of this client's that comes now is before all that wait.
    pub fn is_next(&self, client: IpAddr) -> bool {
        self.order.first().is_none_or(|(held, _, _)| self.holders.of(client) < *held)
    }

    /// A client has a place less.
    pub(super) fn gave(&mut self, client: IpAddr) {
        self.holds(client, |held| held.saturating_sub(1));
    }

    fn holds(&mut self, client: IpAddr, change: impl Fn(u32) -> u32) {
        let before = self.holders.of(client);
        let now = change(before);
        self.holders.set(client, now);
        if let Some(Client { turn, .. }) = self.clients.get(&client) {
            self.order.remove(&(before, *turn, client));
            self.order.insert((now, *turn, client));
        }
    }

    /// A query that has waited long enough, or that has left.
    pub fn expired(&mut self, now: Mono) -> Option<QueryKey> {
        let (until, _) = self.ends.front()?;
        if *until > now {
            return None;
        }
        self.ends.pop_front().map(|(_, query)| query)
    }

    /// Whether it is time to try again.
    pub fn is_due(&self, now: Mono) -> bool {
        !self.is_empty() && self.again <= now
    }

    /// Whether other workers should be asked to make room: not as often as something happens here.
    pub fn asks(&mut self, now: Mono) -> bool {
        let asks = self.asks <= now;
        if asks {
            self.asks = now.after(AGAIN);
        }
        asks
    }

    /// Another worker has made room: it may be asked for more.
    pub fn was_heard(&mut self) {
        self.asks = Mono::ZERO;
    }

    /// Whether to look for a connection that makes way.
    pub fn searches(&self, now: Mono) -> bool {
        self.searches <= now
    }

    /// A search among so many connections was in vain.
    pub fn searched(&mut self, among: usize, now: Mono) {
        self.searches = now.after(SEARCH + SEARCH_OF_ONE * u32::try_from(among).unwrap_or(u32::MAX));
    }

    /// Another worker wants places for so many clients. It asks again as long as it does.
    pub fn ask(&mut self, worker: usize, clients: usize, of_all: bool, now: Mono) {
        self.asked = Some(Asked { worker, clients, of_all, until: now.after(2 * AGAIN) });
    }

    /// What another worker wants of this one.
    pub fn asked(&mut self, now: Mono) -> Option<Asked> {
        self.asked.take_if(|asked| asked.until <= now);
        self.asked
    }

    /// When the first of them has waited long enough, or is to try again; none if nobody waits.
    pub fn next_deadline(&self) -> Option<Mono> {
        let ends = self.ends.front().map_or(Mono::MAX, |(until, _)| *until);
        (!self.is_empty()).then(|| ends.min(self.again))
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

#[cfg(test)]
#[path = "wait_tests.rs"]
mod tests;

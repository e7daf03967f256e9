//! The queries that wait at a cap, served round-robin between clients. A pure state machine.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::worker::queries::QueryKey;

/// Whose turn it is tries again after this time, whatever happens here: a place may have become free of which this worker
/// is not told, by a health check or by a connection of another worker that is idle only now.
const AGAIN: Duration = Duration::from_millis(20);

/// A query that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Whose it is.
    pub session: SessionKey,
    /// Which.
    pub query: QueryKey,
    /// When it has waited long enough.
    pub until: Mono,
}

/// The queue of one backend.
#[derive(Debug, Default)]
pub struct WaitQueue {
    /// Clients in the order of their turns; each is in here once.
    turns: VecDeque<SessionKey>,
    queries: HashMap<SessionKey, VecDeque<Waiter>, foldhash::fast::FixedState>,
    /// All in the order in which they have waited long enough. May hold queries that left meanwhile.
    ends: VecDeque<(Mono, QueryKey)>,
    /// When whose turn it is tries again.
    again: Mono,
    /// Before this other workers are not asked once more.
    asks: Mono,
}

impl WaitQueue {
    /// A query begins to wait.
    pub fn push(&mut self, waiter: Waiter, now: Mono) {
        if self.turns.is_empty() {
            self.again = now.after(AGAIN);
        }
        let waiting = self.queries.entry(waiter.session).or_default();
        if waiting.is_empty() {
            self.turns.push_back(waiter.session);
        }
        waiting.push_back(waiter);
        // Nearly always the last one: all wait equally long, but for one that has waited elsewhere before.
        let at = self.ends.partition_point(|(until, _)| *until <= waiter.until);
        self.ends.insert(at, (waiter.until, waiter.query));
    }

    /// The query whose turn it is. Its client goes to the end of the line.
    pub fn pop(&mut self) -> Option<Waiter> {
        while let Some(session) = self.turns.pop_front() {
            let Some(waiting) = self.queries.get_mut(&session) else { continue };
            let waiter = waiting.pop_front();
            if waiting.is_empty() {
                self.queries.remove(&session);
            } else {
                self.turns.push_back(session);
            }
            if waiter.is_some() {
                return waiter;
            }
        }
        self.ends.clear();
        None
    }

    /// The query that [`Self::pop`] gave could not be served: it is first again.
    pub fn put_back(&mut self, waiter: Waiter, now: Mono) {
        let waiting = self.queries.entry(waiter.session).or_default();
        if !waiting.is_empty() {
            self.turns.retain(|turn| *turn != waiter.session);
        }
        waiting.push_front(waiter);
        self.turns.push_front(waiter.session);
        self.again = now.after(AGAIN);
    }

    /// A query leaves without being served.
    pub fn remove(&mut self, session: SessionKey, query: QueryKey) {
        if let Some(waiting) = self.queries.get_mut(&session) {
            waiting.retain(|other| other.query != query);
            if waiting.is_empty() {
                self.queries.remove(&session);
                self.turns.retain(|turn| *turn != session);
            }
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

    /// When the first of them has waited long enough, or is to try again; none if nobody waits.
    pub fn next_deadline(&self) -> Option<Mono> {
        let ends = self.ends.front().map_or(Mono::MAX, |(until, _)| *until);
        (!self.is_empty()).then(|| ends.min(self.again))
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    fn key(index: u32) -> QueryKey {
        QueryKey { index, generation: 0 }
    }

    fn waiter(session: usize, query: u32, until: u64) -> Waiter {
        Waiter { session: SessionKey(session), query: key(query), until: Mono(until) }
    }

    fn queue(waiters: impl IntoIterator<Item = Waiter>) -> WaitQueue {
        let mut queue = WaitQueue::default();
        waiters.into_iter().for_each(|waiter| queue.push(waiter, Mono(1)));
        queue
    }

    #[test]
    fn a_client_with_many_does_not_starve_one_with_few() {
        let mut queue = queue((0..5).map(|n| waiter(1, n, 10)).chain([waiter(2, 100, 10)]));
        let order: Vec<u32> = std::iter::from_fn(|| queue.pop()).map(|waiter| waiter.query.index).collect();
        assert_eq!(order, [0, 100, 1, 2, 3, 4]);
        assert!(queue.is_empty());
    }

    #[test]
    fn what_could_not_be_served_keeps_its_turn() {
        let mut queue = queue([waiter(1, 0, 10), waiter(1, 1, 10), waiter(2, 2, 10)]);
        let first = queue.pop().unwrap();
        queue.put_back(first, Mono(2));
        let order: Vec<u32> = std::iter::from_fn(|| queue.pop()).map(|waiter| waiter.query.index).collect();
        assert_eq!(order, [0, 2, 1]);
    }

    #[test]
    fn who_leaves_is_not_served() {
        let mut queue = queue([waiter(1, 0, 10), waiter(2, 1, 20)]);
        queue.remove(SessionKey(1), key(0));
        assert_eq!(queue.pop(), Some(waiter(2, 1, 20)));
        assert_eq!(queue.pop(), None);
    }

    /// One that waits only a little longer, as it has waited elsewhere before, does not have those before it wait.
    #[test]
    fn waiting_ends_when_it_has_been_long_enough_for_each() {
        let mut queue = queue([waiter(1, 0, 10), waiter(2, 1, 30), waiter(3, 2, 20)]);
        assert_eq!(queue.expired(Mono(9)), None);
        let order: Vec<u32> = std::iter::from_fn(|| queue.expired(Mono(25))).map(|query| query.index).collect();
        assert_eq!(order, [0, 2]);
        assert_eq!(queue.next_deadline(), Some(Mono(30)));
    }

    #[test]
    fn whose_turn_it_is_tries_again_and_others_are_asked_no_more_often() {
        let mut queue = queue([waiter(1, 0, u64::MAX)]);
        let due = Mono(1).after(AGAIN);
        assert_eq!((queue.next_deadline(), queue.is_due(Mono(1)), queue.is_due(due)), (Some(due), false, true));
        assert!(queue.asks(Mono(1)) && !queue.asks(Mono(2)) && queue.asks(due));
        queue.was_heard();
        assert!(queue.asks(due));
        let first = queue.pop().unwrap();
        assert_eq!((queue.next_deadline(), queue.is_due(Mono::MAX)), (None, false));
        queue.put_back(first, due);
        assert_eq!(queue.next_deadline(), Some(due.after(AGAIN)));
    }
}

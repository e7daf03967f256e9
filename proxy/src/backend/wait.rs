//! The queries that wait at a cap, served round-robin between clients. A pure state machine.

use std::collections::{HashMap, VecDeque};

use crate::client::session::SessionKey;
use crate::clock::Mono;
use crate::worker::queries::QueryKey;

/// The queue of one backend.
#[derive(Debug, Default)]
pub struct WaitQueue {
    /// Clients in the order of their turns; each is in here once.
    turns: VecDeque<SessionKey>,
    queries: HashMap<SessionKey, VecDeque<QueryKey>, foldhash::fast::FixedState>,
    /// All in the order of arrival, for `max_wait`. May hold queries that left meanwhile.
    arrivals: VecDeque<(Mono, QueryKey)>,
}

impl WaitQueue {
    /// A query begins to wait.
    pub fn push(&mut self, session: SessionKey, query: QueryKey, until: Mono) {
        let waiting = self.queries.entry(session).or_default();
        if waiting.is_empty() {
            self.turns.push_back(session);
        }
        waiting.push_back(query);
        self.arrivals.push_back((until, query));
    }

    /// The query whose turn it is. Its client goes to the end of the line.
    pub fn pop(&mut self) -> Option<(SessionKey, QueryKey)> {
        while let Some(session) = self.turns.pop_front() {
            let Some(waiting) = self.queries.get_mut(&session) else { continue };
            let query = waiting.pop_front();
            if waiting.is_empty() {
                self.queries.remove(&session);
            } else {
                self.turns.push_back(session);
            }
            if let Some(query) = query {
                return Some((session, query));
            }
        }
        self.arrivals.clear();
        None
    }

    /// The query that [`Self::pop`] gave could not be served: it is first again.
    pub fn put_back(&mut self, session: SessionKey, query: QueryKey) {
        let waiting = self.queries.entry(session).or_default();
        if !waiting.is_empty() {
            self.turns.retain(|turn| *turn != session);
        }
        waiting.push_front(query);
        self.turns.push_front(session);
    }

    /// A query leaves without being served.
    pub fn remove(&mut self, session: SessionKey, query: QueryKey) {
        if let Some(waiting) = self.queries.get_mut(&session) {
            waiting.retain(|other| *other != query);
            if waiting.is_empty() {
                self.queries.remove(&session);
                self.turns.retain(|turn| *turn != session);
            }
        }
    }

    /// A query that has waited long enough, or that has left.
    pub fn expired(&mut self, now: Mono) -> Option<QueryKey> {
        let (until, _) = self.arrivals.front()?;
        if *until > now {
            return None;
        }
        self.arrivals.pop_front().map(|(_, query)| query)
    }

    /// When the first of them has waited long enough.
    pub fn next_deadline(&self) -> Option<Mono> {
        self.arrivals.front().map(|(until, _)| *until)
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

    #[test]
    fn a_client_with_many_does_not_starve_one_with_few() {
        let mut queue = WaitQueue::default();
        for n in 0..5 {
            queue.push(SessionKey(1), key(n), Mono(10));
        }
        queue.push(SessionKey(2), key(100), Mono(10));
        let order: Vec<u32> = std::iter::from_fn(|| queue.pop()).map(|(_, query)| query.index).collect();
        assert_eq!(order, [0, 100, 1, 2, 3, 4]);
        assert!(queue.is_empty());
    }

    #[test]
    fn what_could_not_be_served_keeps_its_turn() {
        let mut queue = WaitQueue::default();
        queue.push(SessionKey(1), key(0), Mono(10));
        queue.push(SessionKey(1), key(1), Mono(10));
        queue.push(SessionKey(2), key(2), Mono(10));
        let (session, query) = queue.pop().unwrap();
        queue.put_back(session, query);
        let order: Vec<u32> = std::iter::from_fn(|| queue.pop()).map(|(_, query)| query.index).collect();
        assert_eq!(order, [0, 2, 1]);
    }

    #[test]
    fn who_leaves_is_not_served() {
        let mut queue = WaitQueue::default();
        queue.push(SessionKey(1), key(0), Mono(10));
        queue.push(SessionKey(2), key(1), Mono(20));
        queue.remove(SessionKey(1), key(0));
        assert_eq!(queue.pop(), Some((SessionKey(2), key(1))));
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn waiting_ends_in_the_order_of_arrival() {
        let mut queue = WaitQueue::default();
        queue.push(SessionKey(1), key(0), Mono(10));
        queue.push(SessionKey(2), key(1), Mono(20));
        assert_eq!(queue.expired(Mono(9)), None);
        assert_eq!(queue.expired(Mono(10)), Some(key(0)));
        assert_eq!(queue.next_deadline(), Some(Mono(20)));
    }
}

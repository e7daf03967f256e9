//! Places for the connections of the admin side, and which of them gives way when a new one comes and there is none left.
//!
//! A connection is *idle* until a whole request has been read, and again when its answer is out, and *stuck* while its peer
//! does not take the answer: those two give way. One whose request is being carried out does not. Of the peer (by address)
//! that has the most connections goes the one that has been at its request for longest, by the order in which requests
//! began and ended: octets that drip in or out do not count.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

/// A limited number of places.
#[derive(Clone, Debug)]
pub(super) struct Places {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    /// Somebody left, or may give way now.
    changed: Notify,
}

#[derive(Debug)]
struct Table {
    limit: usize,
    /// Counts what happens: the smaller, the earlier.
    now: u64,
    taken: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    /// None: by the unix socket.
    peer: Option<IpAddr>,
    doing: Doing,
    since: u64,
    /// Dropped with the entry, which tells the connection.
    _gone: oneshot::Sender<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Idle,
    Answering,
    Stuck,
}

/// A place that is taken, until this is dropped or the place is given to another.
#[derive(Debug)]
pub(super) struct Place {
    shared: Arc<Shared>,
    id: u64,
}

/// Resolves when the place has been given to another: the connection is to be closed.
pub(super) type Gone = oneshot::Receiver<()>;

impl Places {
    pub(super) fn new(limit: usize) -> Self {
        let table = Table { limit, now: 0, taken: Vec::with_capacity(limit) };
        Self { shared: Arc::new(Shared { table: Mutex::new(table), changed: Notify::new() }) }
    }

    /// Takes a place. Waits only while all are taken by requests that are being carried out.
    pub(super) async fn enter(&self, peer: Option<IpAddr>) -> (Place, Gone) {
        loop {
            let changed = self.shared.changed.notified();
            if let Some((id, gone)) = self.shared.lock().enter(peer) {
                return (Place { shared: Arc::clone(&self.shared), id }, gone);
            }
            changed.await;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing in there panics halfway.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// A whole request has been read.
    pub(super) fn begins(&self) {
        self.shared.lock().turn(self.id, Doing::Answering);
    }

    /// The answer is out.
    pub(super) fn ends(&self) {
        self.shared.lock().turn(self.id, Doing::Idle);
        self.shared.changed.notify_waiters();
    }

    /// The peer does not take what is written, or does so again.
    pub(super) fn stuck(&self, stuck: bool) {
        self.shared.lock().stuck(self.id, stuck);
        self.shared.changed.notify_waiters();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.lock().taken.retain(|entry| entry.id != self.id);
        self.shared.changed.notify_waiters();
    }
}

impl Table {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn enter(&mut self, peer: Option<IpAddr>) -> Option<(u64, Gone)> {
        if self.taken.len() >= self.limit {
            let gives_way = self.gives_way()?;
            let entry = self.taken.swap_remove(gives_way);
            tracing::debug!(peer = ?entry.peer, doing = ?entry.doing, "admin: a connection gives way to a new one");
        }
        let id = self.tick();
        let (sender, gone) = oneshot::channel();
        self.taken.push(Entry { id, peer, doing: Doing::Idle, since: id, _gone: sender });
        Some((id, gone))
    }

    fn turn(&mut self, id: u64, doing: Doing) {
        let since = self.tick();
        if let Some(entry) = self.taken.iter_mut().find(|entry| entry.id == id) {
            (entry.doing, entry.since) = (doing, since);
        }
    }

    fn stuck(&mut self, id: u64, stuck: bool) {
        if let Some(entry) = self.taken.iter_mut().find(|entry| entry.id == id && entry.doing != Doing::Idle) {
            entry.doing = if stuck { Doing::Stuck } else { Doing::Answering };
        }
    }

    fn gives_way(&self) -> Option<usize> {
        let mut connections = HashMap::<_, usize>::new();
        for entry in &self.taken {
            *connections.entry(entry.peer).or_default() += 1;
        }
        let can = self.taken.iter().enumerate().filter(|(_, entry)| entry.doing != Doing::Answering);
        can.min_by_key(|(_, entry)| (std::cmp::Reverse(connections[&entry.peer]), entry.since)).map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    fn table(limit: usize) -> Table {
        Table { limit, now: 0, taken: Vec::new() }
    }

    fn peer(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([127, 0, 0, last]))
    }

    fn has_gone(gone: &mut Gone) -> bool {
        gone.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn the_oldest_without_a_request_gives_way() {
        let mut table = table(3);
        let mut held: Vec<_> = (0..3).map(|_| table.enter(peer(1)).unwrap()).collect();
        // The first one's request is being carried out; the second has just had its answer.
        table.turn(held[0].0, Doing::Answering);
        table.turn(held[1].0, Doing::Answering);
        table.turn(held[1].0, Doing::Idle);
        held.push(table.enter(peer(1)).unwrap());
        let gone: Vec<bool> = held.iter_mut().map(|(_, gone)| has_gone(gone)).collect();
        assert_eq!(gone, [false, false, true, false]);
    }

    #[test]
    fn who_does_not_take_the_answer_gives_way_and_a_drop_now_and_then_does_not_help() {
        let mut table = table(2);
        let mut slow = table.enter(peer(1)).unwrap();
        let other = table.enter(peer(1)).unwrap();
        table.turn(slow.0, Doing::Answering);
        table.turn(other.0, Doing::Answering);
        assert!(table.enter(peer(2)).is_none(), "both are served");
        table.stuck(other.0, true);
        for _ in 0..5 {
            table.stuck(slow.0, true);
            table.stuck(slow.0, false);
            table.stuck(slow.0, true);
        }
        let _new = table.enter(peer(2)).unwrap();
        assert!(has_gone(&mut slow.1), "its request is the older one");
    }

    #[test]
    fn a_peer_with_many_gives_way_before_one_with_few() {
        let mut table = table(4);
        let mut good = table.enter(peer(1)).unwrap();
        let attacker: Vec<_> = (0..3).map(|_| table.enter(peer(2)).unwrap()).collect();
        let mut later: Vec<_> = (0..100).map(|_| table.enter(peer(2)).unwrap()).collect();
        assert!(!has_gone(&mut good.1), "it is the oldest, and alone");
        assert_eq!(later.iter_mut().filter_map(|(_, gone)| (!has_gone(gone)).then_some(())).count(), 3);
        drop(attacker);
    }

    #[tokio::test]
    async fn a_place_is_free_when_it_is_dropped() {
        let places = Places::new(1);
        let (first, _gone) = places.enter(None).await;
        first.begins();
        let entered = std::pin::pin!(places.enter(None));
        let second = async {
            tokio::task::yield_now().await;
            drop(first);
        };
        let ((_place, mut gone), ()) = tokio::join!(entered, second);
        assert!(!has_gone(&mut gone));
    }
}

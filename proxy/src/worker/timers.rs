//! Deadlines of sessions and connections. A deadline that moves later costs nothing: the old one fires, and the owner
//! says when to look again. So a busy connection touches this once per timeout, not once per query.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::core::ROOM;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::clock::Mono;

/// Whose deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TimerKey {
    Session(SessionKey),
    Conn(ConnKey),
}

/// The armed deadlines.
#[derive(Debug)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Mono, TimerKey)>>,
}

impl Default for Timers {
    fn default() -> Self {
        Self { heap: BinaryHeap::with_capacity(ROOM) }
    }
}

impl Timers {
    /// Arms `deadline` for `key`, unless an earlier one is armed already. `armed` is the key's own note of that.
    pub(crate) fn arm(&mut self, key: TimerKey, deadline: Mono, armed: &mut Mono) {
        if *armed == Mono::ZERO || deadline < *armed {
            *armed = deadline;
            self.heap.push(Reverse((deadline, key)));
        }
    }

    /// A deadline that has come. The key may have ended meanwhile, or have another deadline armed.
    pub(crate) fn pop(&mut self, now: Mono) -> Option<(Mono, TimerKey)> {
        let Reverse((deadline, _)) = self.heap.peek()?;
        if *deadline > now {
            return None;
        }
        self.heap.pop().map(|Reverse(fired)| fired)
    }

    pub(crate) fn next(&self) -> Option<Mono> {
        self.heap.peek().map(|Reverse((deadline, _))| *deadline)
    }
}

//! Deadlines of sessions and connections. A deadline that moves later costs nothing: the old one fires, and the owner
//! says when to look again. So a busy connection touches this once per timeout, not once per query.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::core::ROOM;
use crate::backend::pool::ConnKey;
use crate::client::session::SessionKey;
use crate::clock::Mono;

/// Whose deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimerKey {
    Session(SessionKey),
    Conn(ConnKey),
}

impl TimerKey {
    /// In as many octets as a deadline: every idle client has two of these.
    fn pack(self) -> u64 {
        match self {
            Self::Session(key) => (key.0 as u64) << 1,
            Self::Conn(key) => (key.0 as u64) << 1 | 1,
        }
    }

    /// Of what [`Self::pack`] made, so the index fits.
    fn unpack(packed: u64) -> Self {
        let index = (packed >> 1) as usize;
        if packed & 1 == 0 { Self::Session(SessionKey(index)) } else { Self::Conn(ConnKey(index)) }
    }
}

/// The armed deadlines.
#[derive(Debug)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Mono, u64)>>,
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
            self.heap.push(Reverse((deadline, key.pack())));
        }
    }

    /// A deadline that has come. The key may have ended meanwhile, or have another deadline armed.
    pub(crate) fn pop(&mut self, now: Mono) -> Option<(Mono, TimerKey)> {
        let Reverse((deadline, _)) = self.heap.peek()?;
        if *deadline > now {
            return None;
        }
        self.heap.pop().map(|Reverse((deadline, key))| (deadline, TimerKey::unpack(key)))
    }

    pub(crate) fn next(&self) -> Option<Mono> {
        self.heap.peek().map(|Reverse((deadline, _))| *deadline)
    }
}

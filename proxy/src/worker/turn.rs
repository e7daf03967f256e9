//! A client connection's share of its worker's time. A worker does one thing after the other, so nobody may keep it busy for
//! long at one go: after its turn a connection waits until all others that have something to do have had theirs, and until
//! the event loop has looked for more of those.

use std::task::Context;

/// Messages that are taken in one turn: more than a client may have in flight by default.
const MESSAGES: usize = 128;
/// Octets of messages that are taken in one turn, but one message at least.
const OCTETS: usize = 64 * 1024;

/// What a connection has had of its turn.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    messages: usize,
    octets: usize,
}

impl Turn {
    /// A message of so many octets was taken.
    pub(crate) fn took(&mut self, octets: usize) {
        self.messages += 1;
        self.octets += octets;
    }

    /// Whether no more may be taken.
    pub(crate) fn is_over(&self) -> bool {
        self.messages >= MESSAGES || self.octets >= OCTETS
    }
}

/// The task that is polled goes on when the others have had their turn.
pub(crate) fn after_others(cx: &mut Context<'_>) {
    // A task that wakes itself runs before those of whom the event loop has not told yet: it looks once in 61 tasks. One that
    // yields runs after they were looked for.
    let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_so_many_messages_or_octets_and_one_message_at_least() {
        let count = |octets: usize| {
            let mut turn = Turn::default();
            let mut count = 0;
            while !turn.is_over() {
                turn.took(octets);
                count += 1;
            }
            count
        };
        assert_eq!((count(14), count(512), count(1024), count(65_537)), (128, 128, 64, 1));
    }
}

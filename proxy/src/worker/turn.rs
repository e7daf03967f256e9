//! A client's share of its worker's time. A worker does one thing after the other, so nobody may keep it busy for long at
//! one go: after its turn a client, whatever connections it has, waits until all others that have something to do have had
//! theirs, and until the event loop has looked for more of those. A pure state machine (I13): the worker's tasks carry out
//! what it decides.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::task::Context;

use foldhash::fast::RandomState;

use crate::client::session::SessionKey;

/// Messages that are taken in one turn: more than a connection may have in flight by default.
const MESSAGES: usize = 128;
/// Octets of messages that are taken in one turn, but one message at least.
const OCTETS: usize = 64 * 1024;
/// When so many clients have had part of their turns, a new round begins, so that the table stays small.
const CLIENTS: usize = 1024;

/// What a client has had of its turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// The turns since the last round began, by client. A round is over when somebody has more to do than its turn is long, and
/// all others have had theirs.
#[derive(Debug, Default)]
pub(crate) struct Round {
    // Random: who could choose addresses that fall together would make each look-up long.
    clients: HashMap<IpAddr, Share, RandomState>,
    is_over: bool,
}

#[derive(Debug, Default)]
struct Share {
    turn: Turn,
    /// The connections that go on in rounds to come, each in its turn.
    waiting: VecDeque<SessionKey>,
    /// So many of them, the first ones, have had nothing in this round.
    first: usize,
}

impl Round {
    /// What a client has had of its turn.
    pub(crate) fn turn(&self, client: IpAddr) -> Turn {
        self.clients.get(&client).map(|share| share.turn).unwrap_or_default()
    }

    /// A client has had so much of its turn.
    pub(crate) fn had(&mut self, client: IpAddr, turn: Turn) {
        self.clients.entry(client).or_default().turn = turn;
        self.is_over |= self.clients.len() >= CLIENTS;
    }

    /// A client's turn is over, and this connection of it goes on in another round: before the others, if it has had nothing
    /// of this turn.
    pub(crate) fn waits(&mut self, client: IpAddr, connection: SessionKey, had_some: bool) {
        let share = self.clients.entry(client).or_default();
        if had_some {
            share.waiting.push_back(connection);
        } else {
            share.waiting.insert(share.first, connection);
            share.first += 1;
        }
        self.is_over = true;
    }

    /// Whether the next round is to begin once all others that have something to do have had their turns. Says so once.
    pub(crate) fn is_over(&mut self) -> bool {
        std::mem::take(&mut self.is_over)
    }

    /// The next round begins: `go_on` is told of the connections that go on. However many a client has, no more go on than
    /// can take a message each.
    pub(crate) fn next(&mut self, mut go_on: impl FnMut(SessionKey)) {
        self.clients.retain(|_, share| {
            (share.turn, share.first) = (Turn::default(), 0);
            let count = share.waiting.len().min(MESSAGES);
            share.waiting.drain(..count).for_each(&mut go_on);
            self.is_over |= !share.waiting.is_empty();
            // Those that go on now may wait again at once.
            count > 0
        });
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

    fn client(number: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, number])
    }

    /// Takes as many messages as the connection's client may; with more, it goes on in another round. How many were taken.
    fn take(round: &mut Round, client: IpAddr, connection: SessionKey, messages: &mut usize) -> usize {
        let mut turn = round.turn(client);
        let mut taken = 0;
        while *messages > 0 && !turn.is_over() {
            turn.took(50);
            *messages -= 1;
            taken += 1;
        }
        round.had(client, turn);
        if *messages > 0 {
            round.waits(client, connection, taken > 0);
        }
        taken
    }

    /// However many connections a client has, between two messages of another one it has one turn.
    #[test]
    fn connections_of_one_client_share_its_turn() {
        const CONNECTIONS: usize = 300;
        let (greedy, good) = (client(1), client(2));
        let mut round = Round::default();
        let mut left = vec![1_000; CONNECTIONS];
        let mut ready: Vec<SessionKey> = (0..CONNECTIONS).map(SessionKey).collect();
        let mut first: Vec<usize> = Vec::new();
        for _ in 0..1_000 {
            assert!(ready.len() <= CONNECTIONS);
            let mut taken = 0;
            for key in std::mem::take(&mut ready) {
                let count = take(&mut round, greedy, key, &mut left[key.0]);
                if count > 0 && first.len() < CONNECTIONS {
                    first.push(key.0);
                }
                taken += count;
            }
            assert_eq!(taken, MESSAGES);
            assert_eq!(take(&mut round, good, SessionKey(CONNECTIONS), &mut 1), 1, "it is never made to wait");
            assert!(round.is_over() && !round.is_over());
            round.next(|key| ready.push(key));
            assert!(!ready.is_empty() && (ready.len() <= MESSAGES));
        }
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), CONNECTIONS, "each has its turn");
    }

    #[test]
    fn who_has_no_more_to_do_is_forgotten() {
        let mut round = Round::default();
        let mut ended = 0;
        for number in 0..10 * CLIENTS as u32 {
            round.had(IpAddr::from(number.to_be_bytes()), Turn::default());
            if round.is_over() {
                round.next(|_| unreachable!("nobody waits"));
                ended += 1;
            }
            assert!(round.clients.len() < CLIENTS);
        }
        assert_eq!(ended, 10);
    }
}

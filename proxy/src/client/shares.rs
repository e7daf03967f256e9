//! Places that are few and held for a short time, such as those for TLS handshakes: who gets one, and who gives one up. A
//! pure state machine (I13): the tasks that hold places carry out what it decides.
//!
//! Nobody is refused. When all places are taken, whoever comes next gets the place of another: of those who hold the most
//! of them, the one that came first. So a client that holds many makes room for itself and for all others, and one that
//! holds a single place keeps it as long as anybody holds more. Age decides, not silence: an octet now and then costs
//! an attacker nothing, while a client that has just come has not had the time to send one.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

/// A place that somebody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    client: IpAddr,
    /// Earlier tickets have lower numbers.
    number: u64,
}

/// What became of one who came.
#[derive(Debug, PartialEq, Eq)]
pub struct Entered<T> {
    /// To be given back by [`Shares::leave`].
    pub ticket: Ticket,
    /// It holds more than an equal part of places that run out, and shall be quick.
    pub hurries: bool,
    /// The one that must go, by what it came with.
    pub evicted: Option<T>,
}

/// The places, and by whom they are held: each with something by which its holder is told to go.
#[derive(Debug)]
pub struct Shares<T> {
    max: usize,
    held: usize,
    last: u64,
    clients: HashMap<IpAddr, BTreeMap<u64, T>, foldhash::fast::RandomState>,
    /// The last one has most places, and of those who have as many the oldest.
    by_weight: BTreeSet<(usize, Reverse<u64>, IpAddr)>,
}

impl<T> Shares<T> {
    /// So many places, all of them free.
    pub fn new(max: usize) -> Self {
        Self { max, held: 0, last: 0, clients: HashMap::default(), by_weight: BTreeSet::new() }
    }

    /// There are so many places from now on. Who has one keeps it.
    pub fn resize(&mut self, max: usize) {
        self.max = max;
    }

    /// How many places are taken.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Somebody comes, and gets a place.
    pub fn enter(&mut self, client: IpAddr, told_by: T) -> Entered<T> {
        self.last += 1;
        let ticket = Ticket { client, number: self.last };
        // Before the new one is in: it is not itself the one that goes.
        let evicted = if self.held >= self.max { self.evict(client) } else { None };
        self.change(client, |places| places.insert(ticket.number, told_by));
        let own = self.clients.get(&client).map_or(0, BTreeMap::len);
        let hurries = self.held * 2 > self.max && own * self.clients.len() > self.held;
        Entered { ticket, hurries, evicted }
    }

    /// A place is given back; nothing happens if its holder has lost it.
    pub fn leave(&mut self, ticket: Ticket) {
        self.change(ticket.client, |places| places.remove(&ticket.number));
    }

    /// Takes a place from whoever has most, counting the one that `newcomer` is about to have.
    fn evict(&mut self, newcomer: IpAddr) -> Option<T> {
        let own = self.clients.get(&newcomer).map_or(0, BTreeMap::len);
        let (most, _, heaviest) = *self.by_weight.last()?;
        let client = if own + 1 > most { newcomer } else { heaviest };
        let oldest = *self.clients.get(&client)?.first_key_value()?.0;
        self.change(client, |places| places.remove(&oldest))
    }

    /// Changes the places of a client, and with them its rank.
    fn change<R>(&mut self, client: IpAddr, with: impl FnOnce(&mut BTreeMap<u64, T>) -> R) -> R {
        let places = self.clients.entry(client).or_default();
        let (before, old) = (places.len(), rank(client, places));
        let result = with(places);
        let (after, new) = (places.len(), rank(client, places));
        if let Some(old) = old {
            self.by_weight.remove(&old);
        }
        match new {
            Some(new) => {
                self.by_weight.insert(new);
            }
            None => {
                self.clients.remove(&client);
            }
        }
        self.held = self.held + after - before;
        result
    }
}

/// Where a client stands among those who hold places; none if it holds none.
fn rank<T>(client: IpAddr, places: &BTreeMap<u64, T>) -> Option<(usize, Reverse<u64>, IpAddr)> {
    let (oldest, _) = places.first_key_value()?;
    Some((places.len(), Reverse(*oldest), client))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use proptest::prelude::*;

    use super::*;

    fn client(number: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, number])
    }

    /// What the one that came is told by: whose it is, and when it came.
    type Told = (u8, u64);

    fn enter(shares: &mut Shares<Told>, number: u8, at: u64) -> Entered<Told> {
        shares.enter(client(number), (number, at))
    }

    #[test]
    fn the_oldest_of_who_has_most_goes_first() {
        let mut shares = Shares::new(4);
        for (at, number) in [1, 2, 2, 2].into_iter().enumerate() {
            assert_eq!(enter(&mut shares, number, at as u64).evicted, None);
        }
        assert_eq!(enter(&mut shares, 3, 4).evicted, Some((2, 1)));
        assert_eq!(enter(&mut shares, 4, 5).evicted, Some((2, 2)));
        // All have one: then the oldest of all.
        assert_eq!(enter(&mut shares, 5, 6).evicted, Some((1, 0)));
        // One that would have most itself makes room for itself.
        assert_eq!(enter(&mut shares, 3, 7).evicted, Some((3, 4)));
        assert_eq!(shares.held(), 4);
    }

    /// However one client floods, another one that holds one place keeps it, and gets one.
    #[test]
    fn a_flood_makes_room_for_itself() {
        let mut shares = Shares::new(200);
        let kept = enter(&mut shares, 9, 0).ticket;
        for at in 1..10_000 {
            let entered = enter(&mut shares, (at % 2) as u8, at);
            assert!(entered.evicted.is_none_or(|(number, _)| number < 2), "{entered:?}");
            assert_eq!(entered.hurries, shares.held() > 100, "{at}");
        }
        assert_eq!(shares.held(), 200);
        let good = enter(&mut shares, 8, 10_000);
        assert!(!good.hurries && good.evicted.unwrap().0 < 2);
        for ticket in [kept, good.ticket] {
            let before = shares.held();
            shares.leave(ticket);
            assert_eq!(shares.held(), before - 1, "it was in");
        }
    }

    #[test]
    fn with_fewer_places_nobody_is_sent_away_at_once() {
        let mut shares = Shares::new(3);
        let tickets: Vec<Ticket> = (0..3).map(|at| enter(&mut shares, 1, at).ticket).collect();
        shares.resize(1);
        assert_eq!(shares.held(), 3);
        assert_eq!(enter(&mut shares, 2, 3).evicted, Some((1, 0)));
        // The one that was evicted gives nothing back.
        shares.leave(tickets[0]);
        assert_eq!(shares.held(), 3);
        tickets.into_iter().for_each(|ticket| shares.leave(ticket));
        assert_eq!(shares.held(), 1);
    }

    proptest! {
        /// Against a list that is searched from front to back.
        #[test]
        fn as_a_naive_list(max in 1..6_usize, steps in proptest::collection::vec((0..5_u8, any::<bool>()), 0..80)) {
            let mut shares = Shares::new(max);
            let mut naive: Vec<(Told, Ticket)> = Vec::new();
            for (at, (number, leaves)) in steps.into_iter().enumerate() {
                if leaves {
                    if let Some(index) = naive.iter().position(|((of, _), _)| *of == number) {
                        shares.leave(naive.remove(index).1);
                    }
                } else {
                    let count = |of: u8| naive.iter().filter(|((held, _), _)| *held == of).count();
                    let most = (0..5).map(count).max().unwrap_or(0);
                    let goes = |of: u8| if count(number) == most { of == number } else { count(of) == most };
                    let goes = naive.iter().position(|((of, _), _)| goes(*of)).filter(|_| naive.len() >= max);
                    let expected = goes.map(|index| naive.remove(index).0);
                    let told = (number, at as u64);
                    let entered = shares.enter(client(number), told);
                    prop_assert_eq!(entered.evicted, expected);
                    naive.push((told, entered.ticket));
                }
                prop_assert_eq!(shares.held(), naive.len());
                prop_assert!(naive.len() <= max);
            }
            naive.into_iter().for_each(|(_, ticket)| shares.leave(ticket));
            prop_assert!(shares.held() == 0 && shares.clients.is_empty() && shares.by_weight.is_empty());
        }
    }
}

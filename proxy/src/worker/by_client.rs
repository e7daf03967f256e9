//! A table by client that does not grow: what is remembered of clients can be as much as an attacker has addresses.

use std::hash::BuildHasher as _;
use std::net::IpAddr;

use crate::clock::Mono;

/// Groups of [`WAYS`] places: 1,024 clients. Memory is taken when the first one is entered.
const GROUPS: usize = 256;
/// Places in which one client may be.
const WAYS: usize = 4;

/// What is known of clients. Looking one up looks at [`WAYS`] places; where they are all taken, who was entered first is
/// forgotten.
#[derive(Clone, Debug)]
pub(crate) struct ByClient<T> {
    places: Box<[Option<Known<T>>]>,
    /// With a seed of its own, so that no client can choose its place.
    hasher: foldhash::quality::RandomState,
}

#[derive(Clone, Debug)]
struct Known<T> {
    client: IpAddr,
    entered: Mono,
    value: T,
}

impl<T> Default for ByClient<T> {
    fn default() -> Self {
        Self { places: Box::default(), hasher: foldhash::quality::RandomState::default() }
    }
}

impl<T> ByClient<T> {
    fn group(&self, client: IpAddr) -> std::ops::Range<usize> {
        // The remainder is below `GROUPS`.
        let group = (self.hasher.hash_one(client) % GROUPS as u64) as usize;
        group * WAYS..(group + 1) * WAYS
    }

    /// What is known of a client.
    pub(crate) fn get(&self, client: IpAddr) -> Option<&T> {
        if self.places.is_empty() {
            return None;
        }
        let group = self.places.get(self.group(client))?;
        group.iter().flatten().find(|known| known.client == client).map(|known| &known.value)
    }

    /// The same, to change it.
    pub(crate) fn get_mut(&mut self, client: IpAddr) -> Option<&mut T> {
        if self.places.is_empty() {
            return None;
        }
        let group = self.group(client);
        let group = self.places.get_mut(group)?;
        group.iter_mut().flatten().find(|known| known.client == client).map(|known| &mut known.value)
    }

    /// Enters a client, or puts this in the place of what was known of it.
    pub(crate) fn insert(&mut self, client: IpAddr, value: T, now: Mono) {
        if self.places.is_empty() {
            self.places = std::iter::repeat_with(|| None).take(GROUPS * WAYS).collect();
        }
        let group = self.group(client);
        let Some(group) = self.places.get_mut(group) else { return };
        let is_it = |place: &Option<Known<T>>| place.as_ref().is_some_and(|known| known.client == client);
        let oldest = |(_, place): &(usize, &Option<Known<T>>)| place.as_ref().map(|known| known.entered);
        let at = group.iter().position(is_it);
        let at = at.or_else(|| group.iter().enumerate().min_by_key(oldest).map(|(at, _)| at));
        if let Some(place) = at.and_then(|at| group.get_mut(at)) {
            *place = Some(Known { client, entered: now, value });
        }
    }

    /// Forgets a client.
    pub(crate) fn remove(&mut self, client: IpAddr) {
        if self.places.is_empty() {
            return;
        }
        let group = self.group(client);
        if let Some(group) = self.places.get_mut(group) {
            let is_it = |place: &&mut Option<Known<T>>| place.as_ref().is_some_and(|known| known.client == client);
            if let Some(place) = group.iter_mut().find(is_it) {
                *place = None;
            }
        }
    }

    /// Whether nobody has ever been entered.
    pub(crate) fn is_unused(&self) -> bool {
        self.places.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u32) -> IpAddr {
        IpAddr::from(std::net::Ipv4Addr::from_bits(number))
    }

    #[test]
    fn who_is_entered_is_found_and_who_is_removed_is_not() {
        let mut table = ByClient::default();
        assert!(table.is_unused() && table.get(client(1)).is_none());
        for number in 0..100 {
            table.insert(client(number), number, Mono(u64::from(number)));
        }
        let found = (0..100).filter(|number| table.get(client(*number)) == Some(number)).count();
        assert!(found >= 90, "{found}: 256 groups of four have room for 100");
        table.insert(client(99), 7, Mono(100));
        assert_eq!(table.get_mut(client(99)), Some(&mut 7));
        table.remove(client(99));
        assert_eq!(table.get(client(99)), None);
        assert_eq!(table.get(client(1_000)), None);
    }

    /// However many there are, the table stays as large as it is, and who came last is known.
    #[test]
    fn it_does_not_grow() {
        let mut table = ByClient::default();
        for number in 0..100_000 {
            table.insert(client(number), (), Mono(u64::from(number)));
            assert!(table.get(client(number)).is_some());
        }
        assert_eq!(table.places.len(), GROUPS * WAYS);
        let known = (0..100_000).filter(|number| table.get(client(*number)).is_some()).count();
        assert_eq!(known, GROUPS * WAYS);
        let old = (0..90_000).filter(|number| table.get(client(*number)).is_some()).count();
        assert_eq!(old, 0, "who was entered first is forgotten first");
    }
}

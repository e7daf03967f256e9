//! The queries in flight on one backend connection, by wire ID (I6). A pure state machine.
//!
//! An ID is taken for each query that is written and is free again when its answer came. The ID of a query that nobody
//! waits for any more (it timed out, or its client left) is *quarantined*: still taken, until its late answer comes or
//! the connection closes. So an answer can never be taken for that of another query. Among free IDs the one that was
//! freed first is used first, never-used ones before all others.
//!
//! The table grows with the IDs in use, not with the 65,536 that exist: an idle connection costs a few bytes. IDs are
//! a permutation of table indexes, different on each connection, so that they are not guessable by counting.

use crate::worker::queries::QueryKey;

/// IDs that are used before a freed one is used again, as long as fewer than these are in flight. A duplicate of an
/// answer must come later than this many queries to meet its ID in use again.
pub(crate) const SPREAD: usize = 256;

/// Queries that a connection can have IDs for: of the 65,536 (RFC 1035 section 4.1.1: 16 bits) one is never used.
pub(crate) const IDS: usize = (1 << 16) - 1;

const NONE: u16 = u16::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// Free; the next free one in order of freeing.
    Free {
        next: u16,
    },
    InFlight(QueryKey),
    Quarantined,
}

/// What an answer's ID means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// It answers this query.
    Query(QueryKey),
    /// It answers a query that nobody waits for any more. The ID is free again.
    Late,
    /// No query with this ID is in flight.
    Unknown,
}

/// The queries in flight on one connection.
#[derive(Debug)]
pub struct Pending {
    slots: Vec<Slot>,
    /// The freed slots, a queue linked through the slots; [`NONE`] when empty. Slot 65535 is never used, so that the
    /// marker is unambiguous.
    first_free: u16,
    last_free: u16,
    free: u32,
    in_flight: u32,
    quarantined: u32,
    /// ID = slot * factor + offset (mod 65536); the factor is odd, so this is a permutation.
    factor: u16,
    inverse: u16,
    offset: u16,
}

impl Pending {
    /// An empty table whose order of IDs is chosen by `seed`.
    pub fn new(seed: u32) -> Self {
        let factor = (seed >> 16) as u16 | 1;
        Self {
            slots: Vec::new(),
            first_free: NONE,
            last_free: NONE,
            free: 0,
            in_flight: 0,
            quarantined: 0,
            factor,
            inverse: inverse(factor),
            offset: seed as u16,
        }
    }

    /// Takes an ID for a query, or none if all are in flight or quarantined.
    pub fn insert(&mut self, query: QueryKey) -> Option<u16> {
        let grow = self.slots.len() < SPREAD || self.free == 0;
        let slot = if grow && self.slots.len() < IDS {
            if self.slots.is_empty() {
                // Many connections never carry more than a query or two.
                self.slots.reserve_exact(1);
            }
            self.slots.push(Slot::InFlight(query));
            // Below 65,535 by the condition above.
            (self.slots.len() - 1) as u16
        } else {
            let slot = self.pop_free()?;
            self.slots[usize::from(slot)] = Slot::InFlight(query);
            slot
        };
        self.in_flight += 1;
        Some(self.id(slot))
    }

    /// An answer with this ID came: takes its query out.
    pub fn answered(&mut self, id: u16) -> Answered {
        let slot = self.slot(id);
        match self.slots.get(usize::from(slot)) {
            Some(Slot::InFlight(query)) => {
                let query = *query;
                self.in_flight -= 1;
                self.push_free(slot);
                Answered::Query(query)
            }
            Some(Slot::Quarantined) => {
                self.quarantined -= 1;
                self.push_free(slot);
                Answered::Late
            }
            Some(Slot::Free { .. }) | None => Answered::Unknown,
        }
    }

    /// The query in flight with this ID.
    pub fn get(&self, id: u16) -> Option<QueryKey> {
        match self.slots.get(usize::from(self.slot(id))) {
            Some(Slot::InFlight(query)) => Some(*query),
            _ => None,
        }
    }

    /// Nobody waits for this ID's answer any more. True if a query was in flight with it.
    pub fn quarantine(&mut self, id: u16) -> bool {
        let slot = usize::from(self.slot(id));
        match self.slots.get_mut(slot) {
            Some(entry @ Slot::InFlight(_)) => {
                *entry = Slot::Quarantined;
                self.in_flight -= 1;
                self.quarantined += 1;
                true
            }
            _ => false,
        }
    }

    /// The queries in flight.
    pub fn queries(&self) -> impl Iterator<Item = QueryKey> {
        self.slots.iter().filter_map(|slot| match slot {
            Slot::InFlight(query) => Some(*query),
            Slot::Free { .. } | Slot::Quarantined => None,
        })
    }

    /// How many queries are in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight as usize
    }

    /// IDs whose answer nobody waits for.
    pub fn quarantined(&self) -> usize {
        self.quarantined as usize
    }

    /// Takes out all queries in flight: the connection has closed.
    pub fn drain(&mut self) -> impl Iterator<Item = (u16, QueryKey)> + use<> {
        let (factor, offset) = (self.factor, self.offset);
        let slots = std::mem::take(&mut self.slots);
        (self.first_free, self.last_free, self.free) = (NONE, NONE, 0);
        (self.in_flight, self.quarantined) = (0, 0);
        slots.into_iter().enumerate().filter_map(move |(slot, entry)| match entry {
            Slot::InFlight(query) => Some(((slot as u16).wrapping_mul(factor).wrapping_add(offset), query)),
            Slot::Free { .. } | Slot::Quarantined => None,
        })
    }

    fn id(&self, slot: u16) -> u16 {
        slot.wrapping_mul(self.factor).wrapping_add(self.offset)
    }

    fn slot(&self, id: u16) -> u16 {
        id.wrapping_sub(self.offset).wrapping_mul(self.inverse)
    }

    fn push_free(&mut self, slot: u16) {
        self.slots[usize::from(slot)] = Slot::Free { next: NONE };
        if self.last_free == NONE {
            self.first_free = slot;
        } else {
            self.slots[usize::from(self.last_free)] = Slot::Free { next: slot };
        }
        self.last_free = slot;
        self.free += 1;
    }

    fn pop_free(&mut self) -> Option<u16> {
        let slot = self.first_free;
        if slot == NONE {
            return None;
        }
        if let Some(Slot::Free { next }) = self.slots.get(usize::from(slot)) {
            self.first_free = *next;
        }
        if self.first_free == NONE {
            self.last_free = NONE;
        }
        self.free -= 1;
        Some(slot)
    }
}

/// The inverse of an odd number modulo 65,536, by Newton's iteration: each step doubles the bits that are right.
fn inverse(odd: u16) -> u16 {
    let mut inverse = odd; // right in 3 bits
    for _ in 0..4 {
        inverse = inverse.wrapping_mul(2u16.wrapping_sub(odd.wrapping_mul(inverse)));
    }
    inverse
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use proptest::prelude::*;

    use super::*;

    fn key(n: u32) -> QueryKey {
        QueryKey { index: n, generation: 0 }
    }

    #[test]
    fn every_odd_number_has_its_inverse() {
        for odd in (1..=u16::MAX).step_by(2) {
            assert_eq!(odd.wrapping_mul(inverse(odd)), 1);
        }
    }

    #[test]
    fn exhaustion_is_an_answer_not_a_wrap() {
        let mut pending = Pending::new(0xdead_beef);
        let mut ids = std::collections::HashSet::new();
        for n in 0..65_535 {
            assert!(ids.insert(pending.insert(key(n)).unwrap()));
        }
        assert_eq!(pending.insert(key(0)), None);
        let id = *ids.iter().next().unwrap();
        assert!(pending.quarantine(id));
        assert_eq!(pending.insert(key(0)), None, "a quarantined ID is still taken");
        assert_eq!(pending.answered(id), Answered::Late);
        assert_eq!(pending.insert(key(7)), Some(id));
    }

    proptest! {
        #[test]
        fn agrees_with_the_model(
            seed: [u8; 4],
            at_first in prop_oneof![60 => 0..=300u16, 1 => 65_500..=u16::MAX],
            events in prop::collection::vec(any::<u8>(), 0..3000),
        ) {
            crate::fuzzing::pending(&[&seed[..], &at_first.to_be_bytes(), &events].concat());
        }
    }
}

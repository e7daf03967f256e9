//! The pending table against a naive model: a map of what is taken, and the order in which IDs were freed.

use std::collections::{HashMap, HashSet, VecDeque};

use super::Script;
use crate::backend::pending::{Answered, IDS, Pending, SPREAD};
use crate::worker::queries::QueryKey;

/// Queries from which on it does not take many more until all IDs are in use.
const NEARLY_ALL: u16 = 65_400;

#[derive(Default)]
struct Model {
    /// What each ID in use stands for: a query, or none any more.
    taken: HashMap<u16, Option<QueryKey>>,
    /// The IDs in use, in some order.
    order: Vec<u16>,
    freed: VecDeque<u16>,
    used: HashSet<u16>,
    in_flight: usize,
    next: u32,
}

impl Model {
    fn insert(&mut self, pending: &mut Pending) {
        self.next += 1;
        let query = QueryKey { index: self.next, generation: 0 };
        let Some(id) = pending.insert(query) else {
            assert_eq!(self.taken.len(), IDS, "an ID is free");
            return;
        };
        assert!(!self.taken.contains_key(&id), "an ID in use is never given");
        if !self.used.insert(id) {
            assert_eq!(self.freed.pop_front(), Some(id), "the ID freed first is used first");
            assert!(self.taken.len() + self.freed.len() + 1 >= SPREAD);
        }
        assert_eq!(pending.get(id), Some(query));
        self.taken.insert(id, Some(query));
        self.order.push(id);
        self.in_flight += 1;
    }

    fn answer(&mut self, pending: &mut Pending, at: usize) {
        let id = self.order.swap_remove(at);
        let expected = match self.taken.remove(&id).expect("it is in use") {
            Some(query) => {
                self.in_flight -= 1;
                Answered::Query(query)
            }
            None => Answered::Late,
        };
        assert_eq!(pending.answered(id), expected);
        assert_eq!(pending.answered(id), Answered::Unknown, "once");
        self.freed.push_back(id);
    }

    fn quarantine(&mut self, pending: &mut Pending, id: u16) {
        let was = self.taken.insert(id, None).expect("it is in use");
        self.in_flight -= usize::from(was.is_some());
        assert_eq!(pending.quarantine(id), was.is_some());
        assert_eq!(pending.get(id), None);
    }

    fn check(&self, pending: &Pending) {
        assert_eq!(pending.in_flight(), self.in_flight);
        assert_eq!(pending.quarantined(), self.taken.len() - self.in_flight);
    }
}

/// Any sequence of queries, answers, late and stray ones, up to the last ID: the table is what the model says.
pub fn pending(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let seed = u32::from(script.short()) << 16 | u32::from(script.short());
    let (mut pending, mut model) = (Pending::new(seed), Model::default());
    // A short input can use up all IDs; few do, as they take long.
    let at_first = match script.short() {
        many @ NEARLY_ALL.. => many,
        some => some % 512,
    };
    (0..at_first).for_each(|_| model.insert(&mut pending));
    while let Some(event) = script.octet() {
        match event % 8 {
            0..=3 => model.insert(&mut pending),
            4 | 5 if !model.order.is_empty() => {
                let at = usize::from(script.short()) % model.order.len();
                model.answer(&mut pending, at);
            }
            6 if !model.order.is_empty() => {
                let id = model.order[usize::from(script.short()) % model.order.len()];
                model.quarantine(&mut pending, id);
            }
            7 => {
                let id = script.short();
                if !model.taken.contains_key(&id) {
                    assert_eq!(pending.answered(id), Answered::Unknown);
                    assert!(!pending.quarantine(id));
                }
            }
            _ => {}
        }
        model.check(&pending);
    }
    let drained: HashMap<u16, Option<QueryKey>> = pending.drain().map(|(id, query)| (id, Some(query))).collect();
    model.taken.retain(|_, query| query.is_some());
    assert_eq!(drained, model.taken);
    assert_eq!(pending.in_flight() + pending.quarantined(), 0);
}

//! The queries that one client has in flight, by ID.

use super::super::message::{self, Label};

/// A fixed number of places for queries in flight. A place's number is the low part of the ID, and the high part
/// changes with every use, so that a late or doubled answer does not pass for the next one.
#[derive(Debug)]
pub(super) struct Window {
    places: Vec<Place>,
    free: Vec<u16>,
    place_bits: u32,
}

#[derive(Debug, Clone, Default)]
struct Place {
    uses: u16,
    in_flight: bool,
    label: Label,
    since: u64,
}

/// Why an answer was not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// No query in flight has this ID.
    Unexpected(u16),
    /// The answer to a query in flight differs from what it must be, in the named part.
    Wrong(&'static str),
}

impl Window {
    /// Room for `size` queries, 1 to 32,768.
    pub(super) fn new(size: u16) -> Self {
        let place_bits = u32::from(size).next_power_of_two().trailing_zeros();
        Self { places: vec![Place::default(); size.into()], free: (0..size).rev().collect(), place_bits }
    }

    /// How many more queries may be sent.
    pub(super) fn room(&self) -> usize {
        self.free.len()
    }

    /// How many queries are in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Notes a query that is due at `since` (nanoseconds) and returns its ID, or `None` without room.
    pub(super) fn take(&mut self, label: Label, since: u64) -> Option<u16> {
        let number = self.free.pop()?;
        let place = &mut self.places[usize::from(number)];
        *place = Place { uses: place.uses.wrapping_add(1), in_flight: true, label, since };
        Some(place.id(number, self.place_bits))
    }

    /// Frees the place of the query that this is the answer to, and returns when that was due.
    ///
    /// # Errors
    /// If no query in flight has the ID (nothing is freed), or if the answer is wrong (its query is done with).
    pub(super) fn answered(&mut self, answer: &[u8]) -> Result<u64, Fault> {
        let id = message::id(answer).ok_or(Fault::Wrong("length"))?;
        let number = id & ((1 << self.place_bits) - 1) as u16;
        let place = self.places.get_mut(usize::from(number)).ok_or(Fault::Unexpected(id))?;
        if !place.in_flight || place.id(number, self.place_bits) != id {
            return Err(Fault::Unexpected(id));
        }
        place.in_flight = false;
        self.free.push(number);
        message::check_answer(answer, &place.label).map_err(Fault::Wrong)?;
        Ok(place.since)
    }

    /// Gives up all queries in flight and says how many those were.
    pub(super) fn clear(&mut self) -> usize {
        let lost = self.in_flight();
        for (number, place) in self.places.iter_mut().enumerate() {
            if std::mem::take(&mut place.in_flight) {
                self.free.push(number as u16);
            }
        }
        lost
    }
}

impl Place {
    fn id(&self, number: u16, place_bits: u32) -> u16 {
        self.uses.unbounded_shl(place_bits) | number
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    fn answer(id: u16, label: &Label) -> Vec<u8> {
        let (mut query, mut answer) = (Vec::new(), Vec::new());
        message::push_query(&mut query, id, label);
        message::push_answer(&mut answer, &query[2..]).unwrap();
        answer.split_off(2)
    }

    #[test]
    fn answers_in_any_order_are_accepted_once() {
        let mut window = Window::new(3);
        let ids: Vec<u16> = (0..3).map(|n| window.take(message::label(1, n), n).unwrap()).collect();
        assert_eq!(window.take(message::label(1, 3), 3), None);
        for n in [2, 0, 1] {
            let answer = answer(ids[n], &message::label(1, n as u64));
            assert_eq!(window.answered(&answer), Ok(n as u64));
            assert_eq!(window.answered(&answer), Err(Fault::Unexpected(ids[n])), "a second time");
        }
        assert_eq!((window.room(), window.in_flight()), (3, 0));
    }

    #[test]
    fn the_answer_of_a_place_s_last_query_is_unexpected() {
        let mut window = Window::new(1);
        let old = window.take(message::label(1, 0), 0).unwrap();
        window.answered(&answer(old, &message::label(1, 0))).unwrap();
        let new = window.take(message::label(1, 1), 1).unwrap();
        assert_ne!(old, new);
        assert_eq!(window.answered(&answer(old, &message::label(1, 0))), Err(Fault::Unexpected(old)));
    }

    #[test]
    fn the_right_id_with_another_question_is_wrong() {
        let mut window = Window::new(1);
        let id = window.take(message::label(1, 0), 0).unwrap();
        let swapped = answer(id, &message::label(2, 0));
        assert_eq!(window.answered(&swapped), Err(Fault::Wrong("question of another query")));
        assert_eq!(window.in_flight(), 0);
    }

    #[test]
    fn lost_queries_are_counted() {
        let mut window = Window::new(4);
        for n in 0..3 {
            window.take(message::label(1, n), 0).unwrap();
        }
        assert_eq!((window.clear(), window.room(), window.clear()), (3, 4, 0));
    }
}

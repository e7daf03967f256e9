//! From the results of checks to a backend's state. A pure state machine (I13).

use super::State;

/// Counts the checks in a row that speak against the present state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Judge {
    state: State,
    /// `pool.backend.health.rise`
    rise: u32,
    /// `pool.backend.health.fall`
    fall: u32,
    against: u32,
}

impl Judge {
    /// Begins with `state`.
    pub(super) fn new(state: State, rise: u32, fall: u32) -> Self {
        Self { state, rise, fall, against: 0 }
    }

    /// The state now.
    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Takes the result of a check. Returns the new state if that changes it. The first check of a backend of which
    /// nothing is known decides alone: it must not take queries, nor be kept from them, for longer than that.
    pub(super) fn checked(&mut self, passed: bool) -> Option<State> {
        let (other, needed) = match (self.state, passed) {
            (State::Unknown, true) => (State::Up, 1),
            (State::Unknown, false) => (State::Down, 1),
            (State::Up, false) => (State::Down, self.fall),
            (State::Down, true) => (State::Up, self.rise),
            (State::Up, true) | (State::Down, false) => {
                self.against = 0;
                return None;
            }
        };
        self.against += 1;
        if self.against < needed {
            return None;
        }
        self.against = 0;
        self.state = other;
        Some(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_check_decides() {
        for (passed, state) in [(true, State::Up), (false, State::Down)] {
            assert_eq!(Judge::new(State::Unknown, 5, 5).checked(passed), Some(state));
        }
    }

    #[test]
    fn only_checks_in_a_row_count() {
        let mut judge = Judge::new(State::Up, 2, 3);
        let mut after =
            |results: &[bool]| -> Vec<Option<State>> { results.iter().map(|r| judge.checked(*r)).collect() };
        assert_eq!(after(&[false, false, true, false, false]), [None; 5]);
        assert_eq!(after(&[false, true, false, true]), [Some(State::Down), None, None, None]);
        assert_eq!(after(&[true]), [Some(State::Up)]);
    }

    proptest! {
        /// The state is the other one exactly if the last `rise` (or `fall`) results all spoke for that, and since the
        /// last change.
        #[test]
        fn agrees_with_the_naive_model(
            rise in 1..5u32,
            fall in 1..5u32,
            results in prop::collection::vec(any::<bool>(), 0..60),
        ) {
            let mut judge = Judge::new(State::Up, rise, fall);
            let (mut state, mut since) = (State::Up, Vec::new());
            for passed in results {
                since.push(passed);
                let (needed, good) = if state == State::Up { (fall, false) } else { (rise, true) };
                let last = since.iter().rev().take(needed as usize);
                let expected = if last.clone().count() == needed as usize && last.clone().all(|r| *r == good) {
                    state = if good { State::Up } else { State::Down };
                    since.clear();
                    Some(state)
                } else {
                    None
                };
                prop_assert_eq!(judge.checked(passed), expected);
                prop_assert_eq!(judge.state(), state);
            }
        }
    }
}

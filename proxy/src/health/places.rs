//! How many connections a backend takes, as far as checks show it. A pure state machine (I13).
//!
//! Connections that a backend does not take are established all the same: they wait in its kernel's queue, in which the
//! first comes first, and nothing comes back over them. A check without an answer, while others are served, waits there,
//! too. So the backend takes as many as have brought an answer while the check waited, and the limit is set to that: from
//! then on queries wait here, where each client has its turn and idle connections make room, instead of there, where none
//! does. A check that passes has been taken, and before it all that were opened earlier: if these are more, the limit rises.
//! Checks are not held by it, so they find out.

use super::CheckResult;

/// What has become of the connections to a backend; those of checks are not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Connections that there are.
    pub(super) used: usize,
    /// Connections that have ended, ever.
    pub(super) ended: u64,
    /// Connections that have brought an answer, ever.
    pub(super) taken: u64,
    /// Of these, those that have ended.
    pub(super) left: u64,
}

/// What the checks of a backend have shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// Checks pass if there is a place for them.
    passes: bool,
    /// So many connections it takes; none: more than there have been.
    limit: Option<usize>,
}

impl Places {
    /// So many connections it takes, as far as is known.
    pub(super) fn limit(&self) -> Option<usize> {
        self.limit
    }

    /// A check has ended. Returns the limit that holds from now on.
    pub(super) fn checked(&mut self, result: CheckResult, before: Counts, after: Counts) -> Option<usize> {
        match result {
            CheckResult::Passed => {
                self.passes = true;
                // Those that have been there all the time, and the check's own.
                let ended = usize::try_from(after.ended.saturating_sub(before.ended)).unwrap_or(usize::MAX);
                let taken = before.used.saturating_sub(ended) + 1;
                self.limit = self.limit.map(|limit| limit.max(taken));
            }
            CheckResult::Contradicted => {
                let waiting = (before.used as u64).saturating_sub(before.taken.saturating_sub(before.left));
                let freed = after.left.saturating_sub(before.left);
                if freed > waiting {
                    // There was a place for the check: it is something else that it finds no answer.
                    *self = Self::default();
                } else if self.passes {
                    let taken = after.taken.saturating_sub(before.left);
                    let taken = usize::try_from(taken).unwrap_or(usize::MAX).max(1);
                    if taken < after.used {
                        self.limit = Some(self.limit.map_or(taken, |limit| limit.min(taken)));
                    }
                }
            }
            CheckResult::Failed | CheckResult::Skipped => {}
        }
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSED: CheckResult = CheckResult::Passed;
    const CONTRADICTED: CheckResult = CheckResult::Contradicted;

    fn counts(used: usize, ended: u64, taken: u64, left: u64) -> Counts {
        Counts { used, ended, taken, left }
    }

    /// Twelve clients at ten places.
    fn full() -> Places {
        let mut places = Places::default();
        assert_eq!(places.checked(PASSED, counts(0, 0, 0, 0), counts(0, 0, 0, 0)), None);
        assert_eq!(places.checked(CONTRADICTED, counts(12, 0, 10, 0), counts(12, 0, 10, 0)), Some(10));
        places
    }

    #[test]
    fn as_many_as_were_served_while_a_check_was_not() {
        full();
    }

    /// One makes room for another, again and again, and the check gets in between.
    #[test]
    fn a_check_that_took_a_place_that_came_free_shows_no_other_one() {
        let mut places = full();
        assert_eq!(places.checked(PASSED, counts(10, 20, 30, 20), counts(10, 21, 30, 21)), Some(10));
        assert_eq!(places.checked(PASSED, counts(3, 30, 40, 37), counts(3, 30, 40, 37)), Some(10));
    }

    #[test]
    fn a_check_beyond_the_limit_shows_that_there_is_more() {
        let mut places = full();
        assert_eq!(places.checked(PASSED, counts(10, 0, 10, 0), counts(10, 0, 10, 0)), Some(11));
        assert_eq!(places.checked(PASSED, counts(11, 0, 11, 0), counts(11, 0, 11, 0)), Some(12));
        assert_eq!(places.checked(CONTRADICTED, counts(12, 0, 11, 0), counts(12, 0, 11, 0)), Some(11));
    }

    /// Somebody has nine connections that wait for an answer, beside one: that it takes ten is seen when one ends.
    #[test]
    fn connections_that_were_silent_count_once_a_check_has_come_behind_them() {
        let mut places = Places::default();
        places.checked(PASSED, Counts::default(), Counts::default());
        assert_eq!(places.checked(CONTRADICTED, counts(10, 0, 1, 0), counts(10, 0, 1, 0)), Some(1));
        assert_eq!(places.checked(PASSED, counts(9, 1, 1, 1), counts(9, 1, 1, 1)), Some(10));
    }

    #[test]
    fn where_checks_never_pass_they_say_nothing_of_places() {
        let mut places = Places::default();
        assert_eq!(places.checked(CONTRADICTED, counts(12, 0, 10, 0), counts(12, 0, 10, 0)), None);
        let mut places = full();
        let (before, after) = (counts(10, 2, 12, 2), counts(10, 6, 16, 6));
        assert_eq!(places.checked(CONTRADICTED, before, after), None, "places came free, and it was not taken");
        assert_eq!(places.checked(CONTRADICTED, counts(12, 0, 10, 0), counts(12, 0, 10, 0)), None);
    }

    /// One connection for each query: they come and go while the check waits.
    #[test]
    fn of_short_connections_all_count_that_were_served_meanwhile() {
        let mut places = Places::default();
        places.checked(PASSED, Counts::default(), Counts::default());
        assert_eq!(places.checked(CONTRADICTED, counts(50, 0, 2, 0), counts(50, 40, 42, 40)), Some(42));
    }

    #[test]
    fn checks_that_were_not_made_or_found_nobody_served_say_nothing() {
        let mut places = full();
        for result in [CheckResult::Skipped, CheckResult::Failed] {
            assert_eq!(places.checked(result, Counts::default(), Counts::default()), Some(10));
        }
    }
}

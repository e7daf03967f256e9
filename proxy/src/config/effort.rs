//! Counts what reading a configuration takes, so that tests and fuzzers see that it grows with the length of the text and not
//! faster. Elsewhere nothing is counted.

#[cfg(any(test, fuzzing))]
std::thread_local! {
    static STEPS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// So many more: characters looked at, tables, keys and elements visited, errors made.
#[inline]
pub(super) fn spend(steps: usize) {
    #[cfg(any(test, fuzzing))]
    STEPS.with(|all| all.set(all.get() + steps as u64));
    #[cfg(not(any(test, fuzzing)))]
    let _ = steps;
}

/// What this thread has spent.
#[cfg(any(test, fuzzing))]
pub(crate) fn spent() -> u64 {
    STEPS.with(std::cell::Cell::get)
}

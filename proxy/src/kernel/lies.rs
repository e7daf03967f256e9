//! Makes a witness lie, for the scenarios: it hides every socket that it would have shown.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::Witness;

/// The number of [`Witness::ALL`]: nobody.
static LIAR: AtomicUsize = AtomicUsize::new(Witness::ALL.len());

/// From now on this witness lies and no other one does.
pub(crate) fn lie(liar: Option<Witness>) {
    LIAR.store(liar.map_or(Witness::ALL.len(), |witness| witness as usize), Ordering::SeqCst);
}

/// Hides what `witness` has to show, if it is the one that lies.
pub(super) fn hide<T>(witness: Witness, shown: &mut Vec<T>) {
    if LIAR.load(Ordering::SeqCst) == witness as usize {
        shown.clear();
    }
}

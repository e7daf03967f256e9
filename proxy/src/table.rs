//! A table that grows while others read it: entries never move and are never taken away.

use std::ops::Index;
use std::sync::OnceLock;

/// Entries in the first chunk; each next one is twice as large.
const FIRST: usize = 16;
/// Enough for 2^28 entries.
const CHUNKS: usize = 24;

/// Entries by index. Whoever looks for one that is not there yet makes it, with the others of its chunk.
#[derive(Debug)]
pub struct Table<T> {
    chunks: [OnceLock<Box<[T]>>; CHUNKS],
}

impl<T: Default> Table<T> {
    /// With this many entries, at least.
    pub fn new(entries: usize) -> Self {
        let table = Self { chunks: [const { OnceLock::new() }; CHUNKS] };
        table.grow(entries);
        table
    }

    /// Makes this many entries, at least.
    pub fn grow(&self, entries: usize) {
        for chunk in 0..=entries.checked_sub(1).map_or(0, |last| place(last).0) {
            self.chunk(chunk);
        }
    }

    /// An entry, if it is there.
    pub fn get(&self, index: usize) -> Option<&T> {
        let (chunk, at) = place(index);
        self.chunks.get(chunk)?.get()?.get(at)
    }

    /// All that are there, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().map_while(OnceLock::get).flatten()
    }

    fn chunk(&self, chunk: usize) -> &[T] {
        self.chunks[chunk].get_or_init(|| (0..FIRST << chunk).map(|_| T::default()).collect())
    }
}

impl<T: Default> Index<usize> for Table<T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        let (chunk, at) = place(index);
        &self.chunk(chunk)[at]
    }
}

/// The chunk, and the place in it.
fn place(index: usize) -> (usize, usize) {
    let shifted = index + FIRST;
    let chunk = (shifted.ilog2() - FIRST.ilog2()) as usize;
    (chunk, shifted - (FIRST << chunk))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn places_follow_one_another() {
        let mut next = (0, 0);
        for index in 0..100_000 {
            assert_eq!(place(index), next);
            next = if next.1 + 1 == FIRST << next.0 { (next.0 + 1, 0) } else { (next.0, next.1 + 1) };
        }
    }

    #[test]
    fn it_grows_under_its_readers_and_keeps_what_it_has() {
        let table: Table<AtomicUsize> = Table::new(3);
        assert!(table.get(2).is_some() && table.get(16).is_none());
        table[2].store(7, Ordering::Relaxed);
        let kept = table.get(2).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let table = &table;
                scope.spawn(move || {
                    for index in 0..5000 {
                        table[index].fetch_add(thread, Ordering::Relaxed);
                    }
                });
            }
        });
        assert!(std::ptr::eq(kept, table.get(2).unwrap()));
        assert_eq!(kept.load(Ordering::Relaxed), 7 + 6);
        assert_eq!(table.iter().take(5000).map(|entry| entry.load(Ordering::Relaxed)).sum::<usize>(), 7 + 6 * 5000);
    }

    #[test]
    fn it_grows_without_gaps() {
        let table: Table<AtomicUsize> = Table::new(0);
        table.grow(1000);
        assert!(table.iter().count() >= 1000 && table.get(999).is_some());
    }
}

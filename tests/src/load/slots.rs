//! A table whose keys are never mistaken for an earlier entry of the same place.

/// Entries by key. A key is also an epoll token; one that is no longer valid finds nothing.
#[derive(Debug)]
pub struct Slots<T> {
    entries: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }

    /// Adds an entry and returns its key.
    pub fn insert(&mut self, value: T) -> u64 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.entries.push((0, None));
            (self.entries.len() - 1) as u32
        });
        let entry = &mut self.entries[place as usize];
        entry.1 = Some(value);
        (u64::from(entry.0) << 32) | u64::from(place)
    }

    /// The entry of a key that is still valid.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (generation, value) = self.entries.get_mut(key as u32 as usize)?;
        if u64::from(*generation) == key >> 32 { value.as_mut() } else { None }
    }

    /// Takes the entry out and makes its key invalid.
    pub fn remove(&mut self, key: u64) -> Option<T> {
        let (generation, value) = self.entries.get_mut(key as u32 as usize)?;
        if u64::from(*generation) != key >> 32 {
            return None;
        }
        let taken = value.take()?;
        // 30 bits: the two highest key bits stay free for the owner's own marks.
        *generation = (*generation + 1) & 0x3FFF_FFFF;
        self.free.push(key as u32);
        Some(taken)
    }
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_does_not_find_the_new_entry() {
        let mut slots = Slots::new();
        let first = slots.insert('a');
        assert_eq!(slots.remove(first), Some('a'));
        let second = slots.insert('b');
        assert_ne!(first, second);
        assert_eq!(slots.get_mut(first), None);
        assert_eq!(slots.remove(first), None);
        assert_eq!(slots.get_mut(second), Some(&mut 'b'));
    }
}

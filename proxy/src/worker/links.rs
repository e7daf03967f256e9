//! Doubly linked lists through the entries of a slab: constant time, no allocation.

use std::ops::IndexMut;

const NONE: u32 = u32::MAX;

/// An entry's place in one list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Links {
    prev: u32,
    next: u32,
    linked: bool,
}

impl Default for Links {
    fn default() -> Self {
        Self { prev: NONE, next: NONE, linked: false }
    }
}

impl Links {
    /// Whether the entry is in the list.
    pub(crate) fn is_linked(&self) -> bool {
        self.linked
    }
}

/// The index of an entry of a slab, or none, in four octets: each idle client has some of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Maybe(u32);

impl Maybe {
    pub(crate) const NONE: Self = Self(NONE);

    /// Of a slab that has, as those of [`List`], fewer than 2^32 - 1 entries.
    pub(crate) fn new(index: Option<usize>) -> Self {
        Self(index.map_or(NONE, |index| index as u32))
    }

    pub(crate) fn get(self) -> Option<usize> {
        (self.0 != NONE).then_some(self.0 as usize)
    }
}

/// A list, linked through the `links` of entries that are found by index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl Default for List {
    fn default() -> Self {
        Self { head: NONE, tail: NONE, len: 0 }
    }
}

impl List {
    pub(crate) fn front(&self) -> Option<usize> {
        (self.head != NONE).then_some(self.head as usize)
    }

    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    /// From the front to the back, given the `links` of an entry.
    pub(crate) fn iter(&self, links: impl Fn(usize) -> Links) -> impl Iterator<Item = usize> {
        std::iter::successors(self.front(), move |at| {
            Some(links(*at).next).filter(|next| *next != NONE).map(|next| next as usize)
        })
    }

    /// Appends an entry that is not in the list.
    pub(crate) fn push_back<S, T>(&mut self, slab: &mut S, index: usize, links: impl Fn(&mut T) -> &mut Links)
    where
        S: IndexMut<usize, Output = T>,
    {
        // Slabs here hold far fewer than 2^32 entries: the limits of connections and queries see to that.
        let at = index as u32;
        let entry = links(&mut slab[index]);
        debug_assert!(!entry.linked);
        *entry = Links { prev: self.tail, next: NONE, linked: true };
        if self.tail == NONE {
            self.head = at;
        } else {
            links(&mut slab[self.tail as usize]).next = at;
        }
        self.tail = at;
        self.len += 1;
    }

    /// Takes an entry out, if it is in.
    pub(crate) fn remove<S, T>(&mut self, slab: &mut S, index: usize, links: impl Fn(&mut T) -> &mut Links)
    where
        S: IndexMut<usize, Output = T>,
    {
        let Links { prev, next, linked } = std::mem::take(links(&mut slab[index]));
        if !linked {
            return;
        }
        if prev == NONE {
            self.head = next;
        } else {
            links(&mut slab[prev as usize]).next = next;
        }
        if next == NONE {
            self.tail = prev;
        } else {
            links(&mut slab[next as usize]).prev = prev;
        }
        self.len -= 1;
    }
}

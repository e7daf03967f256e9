//! Bytes on their way out. Buffers are lent by the worker and come back when they are empty: an idle connection has none.

/// Buffers kept for reuse.
const KEEP: usize = 256;
/// A buffer above this size is not kept, bytes.
const KEEP_SIZE: usize = 64 * 1024;

/// The worker's empty buffers.
#[derive(Debug, Default)]
pub(crate) struct Spares {
    free: Vec<Vec<u8>>,
}

/// Bytes that wait to be written.
#[derive(Debug, Default)]
pub struct OutBuf {
    bytes: Vec<u8>,
    written: usize,
}

impl OutBuf {
    /// What is to be written.
    pub(crate) fn pending(&self) -> &[u8] {
        self.bytes.get(self.written..).unwrap_or_default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// The buffer to append to.
    pub(crate) fn append(&mut self, spares: &mut Spares) -> &mut Vec<u8> {
        if self.bytes.capacity() == 0
            && let Some(spare) = spares.free.pop()
        {
            self.bytes = spare;
        }
        // A peer that reads, but never all of it, must not make it grow without end. Each octet is moved at most once for
        // one that was written.
        if self.written > 0 && self.written >= self.bytes.len() / 2 {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
        &mut self.bytes
    }

    /// Appends a DNS message with its length (RFC 1035 section 4.2.2) and another ID.
    pub(crate) fn push_message(&mut self, spares: &mut Spares, message: &[u8], id: u16) {
        let bytes = self.append(spares);
        // A message came with a 16-bit length, or was made by hickory for TCP: it fits.
        let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&id.to_be_bytes());
        bytes.extend_from_slice(message.get(2..).unwrap_or_default());
    }

    /// The buffer, at the end of which is a message of this length, and where that message's length octets begin.
    pub(crate) fn last_message(&mut self, length: usize) -> (&mut Vec<u8>, usize) {
        let start = self.bytes.len().saturating_sub(length + 2);
        (&mut self.bytes, start)
    }

    /// So many bytes were written. An empty buffer goes back.
    pub(crate) fn advance(&mut self, written: usize, spares: &mut Spares) {
        self.written = (self.written + written).min(self.bytes.len());
        if self.is_empty() {
            self.give_back(spares);
        }
    }

    /// Forgets what was not written.
    pub(crate) fn give_back(&mut self, spares: &mut Spares) {
        let mut bytes = std::mem::take(&mut self.bytes);
        self.written = 0;
        if bytes.capacity() > 0 && bytes.capacity() <= KEEP_SIZE && spares.free.len() < KEEP {
            bytes.clear();
            spares.free.push(bytes);
        }
    }
}

/// Bytes that came and are not taken yet: part of a message, or messages that have to wait. What is taken is not moved for
/// each message, so that many small ones do not cost more than their octets.
#[derive(Debug, Default)]
pub(crate) struct InBuf {
    bytes: Vec<u8>,
    taken: usize,
}

/// A buffer of this size is kept when it is empty, bytes.
const KEEP_EMPTY: usize = 512;

impl InBuf {
    /// What is not taken yet.
    pub(crate) fn pending(&self) -> &[u8] {
        self.bytes.get(self.taken..).unwrap_or_default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }

    /// More came.
    pub(crate) fn append(&mut self, more: &[u8]) {
        // Each octet is moved at most once for one that was taken.
        if self.taken >= self.bytes.len() / 2 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(more);
    }

    /// So many octets at the front were taken.
    pub(crate) fn take(&mut self, taken: usize) {
        self.taken = (self.taken + taken).min(self.bytes.len());
        if self.is_empty() {
            self.taken = 0;
            self.bytes.clear();
            self.bytes.shrink_to(KEEP_EMPTY);
        }
    }
}

impl From<Vec<u8>> for InBuf {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, taken: 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A peer that reads all the time, and never everything, against a queue of octets.
    #[test]
    fn it_holds_little_more_than_what_is_to_be_written() {
        const MOST: usize = 100_000;
        let (mut spares, mut out, mut model) = (Spares::default(), OutBuf::default(), VecDeque::new());
        let mut random = fastrand::Rng::with_seed(5);
        for round in 0..20_000_u32 {
            if model.len() < MOST {
                let message: Vec<u8> = (0..random.usize(12..2000)).map(|_| random.u8(..)).collect();
                out.push_message(&mut spares, &message, round as u16);
                model.extend((message.len() as u16).to_be_bytes());
                model.extend((round as u16).to_be_bytes());
                model.extend(&message[2..]);
            }
            let written = random.usize(0..1500).min(model.len().saturating_sub(1));
            out.advance(written, &mut spares);
            model.drain(..written);
            assert_eq!((out.len(), out.is_empty()), (model.len(), false));
            assert!(out.bytes.capacity() <= 8 * MOST, "{} octets for {}", out.bytes.capacity(), out.len());
            if round % 500 == 0 {
                assert!(out.pending().iter().eq(&model));
            }
        }
        assert!(out.pending().iter().eq(&model));
        out.advance(model.len(), &mut spares);
        assert!(out.is_empty() && out.bytes.capacity() == 0);
    }

    /// Whatever comes and is taken in whatever portions, what is pending is what a queue would hold.
    #[test]
    fn what_is_pending_is_what_came_and_was_not_taken() {
        let (mut rest, mut model) = (InBuf::default(), VecDeque::new());
        let (mut random, mut most) = (fastrand::Rng::with_seed(7), KEEP_EMPTY);
        for _ in 0..20_000 {
            let more: Vec<u8> = (0..random.usize(0..200)).map(|_| random.u8(..)).collect();
            rest.append(&more);
            model.extend(more);
            let taken = random.usize(0..=model.len().min(250));
            rest.take(taken);
            model.drain(..taken);
            assert!(rest.pending().iter().eq(&model));
            assert_eq!(rest.is_empty(), model.is_empty());
            most = most.max(model.len() + taken);
            assert!(rest.bytes.capacity() <= 4 * most, "{} octets for {most}", rest.bytes.capacity());
        }
    }
}

//! What a client connection's headers were so far: whether they come back, and which come back most. A pure state machine.
//!
//! A TLV that depends on the question can be the same for every query or different for each; the template can't tell.
//! Two decisions rest on this experience. A client whose headers never come back gets one-shot connections, so that
//! nothing is kept that will not be used. And when a client's headers are more than it may own connections, the
//! connection of a header that is seen often is not given up for one that is seen rarely (the idea of TinyLFU: admission
//! by frequency, with all counts halved now and then so that old fame fades).

/// Headers remembered per client connection.
const REMEMBERED: usize = 256;
/// Headers that are compared at one go.
const BLOCK: usize = 16;
/// Counts are halved after this many queries.
const FADE: u32 = 2048;
/// The share of headers seen before, in 1/256, is a moving average over about this many queries.
const WINDOW: u32 = 16;
/// Where the average starts: some 20 new headers in a row are needed to call a client one that does not reuse.
const START: u32 = 40;
/// Below this share a header that is new is expected not to come back.
const HOPELESS: u32 = 12;

/// The headers that one client connection has used.
#[derive(Debug)]
pub struct History {
    /// Digests, by themselves: all are looked through for each query.
    seen: Vec<u64>,
    /// How often each was seen.
    counts: Vec<u32>,
    /// Next place to look for one to forget.
    hand: usize,
    /// Share of queries whose header was seen before, in 1/256.
    familiar: u32,
    queries: u32,
}

impl Default for History {
    fn default() -> Self {
        Self { seen: Vec::new(), counts: Vec::new(), hand: 0, familiar: START, queries: 0 }
    }
}

impl History {
    /// A query with this header came. Returns how often the header was seen before, as far as remembered.
    pub fn record(&mut self, header: u64) -> u32 {
        self.queries += 1;
        if self.queries >= FADE {
            self.queries = 0;
            for count in &mut self.counts {
                *count /= 2;
            }
        }
        let before = match self.place(header) {
            Some(at) => {
                self.counts[at] += 1;
                self.counts[at] - 1
            }
            None => {
                self.remember(header);
                0
            }
        };
        let target = if before > 0 { 256 } else { 0 };
        self.familiar = (self.familiar * (WINDOW - 1) + target) / WINDOW;
        before
    }

    /// How often a header was seen lately.
    pub fn frequency(&self, header: u64) -> u32 {
        self.place(header).map_or(0, |at| self.counts[at])
    }

    /// Whether headers that come up for the first time are expected not to come back.
    pub fn is_hopeless(&self) -> bool {
        self.familiar < HOPELESS
    }

    /// Where a header is remembered. Block by block without a branch inside, which the compiler turns into vector
    /// instructions.
    fn place(&self, header: u64) -> Option<usize> {
        let block =
            self.seen.chunks(BLOCK).position(|block| block.iter().fold(false, |any, seen| any | (*seen == header)))?;
        let start = block * BLOCK;
        self.seen.iter().skip(start).position(|seen| *seen == header).map(|at| start + at)
    }

    fn remember(&mut self, header: u64) {
        if self.seen.len() < REMEMBERED {
            self.seen.push(header);
            self.counts.push(1);
            return;
        }
        // A clock hand that skips the well known. If all are, the one it ends at gives way.
        for _ in 0..REMEMBERED {
            self.hand = (self.hand + 1) % REMEMBERED;
            if self.counts[self.hand] <= 1 {
                break;
            }
        }
        self.seen[self.hand] = header;
        self.counts[self.hand] = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_never_return_are_hopeless_soon() {
        let mut history = History::default();
        let turned = (1..=100).find(|header| {
            history.record(*header);
            history.is_hopeless()
        });
        assert!(turned.is_some_and(|after| (9..=32).contains(&after)), "after {turned:?}");
    }

    #[test]
    fn a_rotation_of_eight_is_never_hopeless() {
        let mut history = History::default();
        for query in 0..10_000 {
            history.record(1 + query % 8);
            assert!(!history.is_hopeless());
        }
    }

    #[test]
    fn a_client_that_starts_to_reuse_is_believed() {
        let mut history = History::default();
        for header in 1..=1000 {
            history.record(header);
        }
        assert!(history.is_hopeless());
        for query in 0..16 {
            history.record(5000 + query % 4);
        }
        assert!(!history.is_hopeless());
    }

    #[test]
    fn fame_fades_and_memory_is_bounded() {
        let mut history = History::default();
        for _ in 0..500 {
            history.record(7);
        }
        for header in 0..100_000u64 {
            history.record(1000 + header);
        }
        assert!(history.frequency(7) < 20);
        assert_eq!(history.seen.len(), REMEMBERED);
    }
}

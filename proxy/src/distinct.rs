//! How many different things there were lately, estimated in little memory (HyperLogLog, Flajolet et al. 2007).
//!
//! Two banks that take turns by the minute: an estimate covers the last full minute and the present one. One writer;
//! anybody reads. To write is a load, and rarely a store.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::{Mono, nanos};

/// Registers of a bank: the standard error is 1.04 / √1024, 3 %.
const REGISTERS: usize = 1024;
const INDEX_BITS: u32 = REGISTERS.trailing_zeros();
const MINUTE: u64 = nanos(Duration::from_secs(60));

type Bank = [AtomicU8; REGISTERS];

/// What one writer has seen.
#[derive(Debug)]
pub struct Distinct {
    banks: [Bank; 2],
    /// The minute whose bank is written.
    minute: AtomicU64,
}

impl Default for Distinct {
    fn default() -> Self {
        let bank = || std::array::from_fn(|_| AtomicU8::new(0));
        Self { banks: [bank(), bank()], minute: AtomicU64::new(0) }
    }
}

impl Distinct {
    /// Something with this digest was seen; only the owner may call this.
    pub fn record(&self, digest: u64) {
        let digest = mix(digest);
        let bank = &self.banks[(self.minute.load(Ordering::Relaxed) & 1) as usize];
        let register = &bank[(digest >> (u64::BITS - INDEX_BITS)) as usize];
        // The first one of the other bits, counted from 1; a guard bit ends the count.
        let rank = ((digest << INDEX_BITS) | (1 << (INDEX_BITS - 1))).leading_zeros() as u8 + 1;
        if register.load(Ordering::Relaxed) < rank {
            register.store(rank, Ordering::Relaxed);
        }
    }

    /// As if nothing had been seen.
    pub fn reset(&self) {
        self.banks.iter().flatten().for_each(|register| register.store(0, Ordering::Relaxed));
    }

    /// Time has passed; only the owner may call this, once a minute or more often.
    pub fn turn(&self, now: Mono) {
        let minute = now.0 / MINUTE;
        let before = self.minute.load(Ordering::Relaxed);
        for stale in (before + 1..=minute).rev().take(2) {
            self.banks[(stale & 1) as usize].iter().for_each(|register| register.store(0, Ordering::Relaxed));
        }
        self.minute.store(minute.max(before), Ordering::Relaxed);
    }
}

/// How many different things all writers together have seen. They must have used the same digests.
pub fn estimate<'a>(seen: impl IntoIterator<Item = &'a Distinct>) -> f64 {
    let mut merged = [0u8; REGISTERS];
    for bank in seen.into_iter().flat_map(|distinct| &distinct.banks) {
        for (most, register) in merged.iter_mut().zip(bank) {
            *most = (*most).max(register.load(Ordering::Relaxed));
        }
    }
    let count = REGISTERS as f64;
    let empty = merged.iter().filter(|register| **register == 0).count();
    let sum: f64 = merged.iter().map(|register| (-f64::from(*register)).exp2()).sum();
    let raw = 0.7213 / (1.0 + 1.079 / count) * count * count / sum;
    // Few of them are counted better by the registers that none has met.
    if raw <= 2.5 * count && empty > 0 { (count * (count / empty as f64).ln()).round() } else { raw.round() }
}

/// Spreads all bits over all bits (the finalizer of SplitMix64): digests may be weak in some.
fn mix(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minutes(count: u64) -> Mono {
        Mono(count * MINUTE + 1)
    }

    #[test]
    fn estimates_are_near() {
        for count in [0u64, 1, 8, 100, 1_000, 5_000, 100_000] {
            let (one, other) = (Distinct::default(), Distinct::default());
            for digest in 1..=count {
                // Seen by one of two, or by both, once or more often.
                [&one, &other][(digest % 2) as usize].record(digest);
                one.record(digest);
            }
            let estimate = estimate([&one, &other]);
            let error = (estimate - count as f64).abs() / (count as f64).max(1.0);
            assert!(error < 0.1, "{estimate} for {count}");
        }
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let seen = Distinct::default();
        seen.turn(minutes(10));
        (1..=100).for_each(|digest| seen.record(digest));
        seen.turn(minutes(11));
        let near = |expected: f64| (estimate([&seen]) - expected).abs() < 5.0;
        assert!(near(100.0), "the minute before still counts");
        (101..=150).for_each(|digest| seen.record(digest));
        assert!(near(150.0));
        seen.turn(minutes(12));
        assert!(near(50.0));
        seen.turn(minutes(20));
        assert!(near(0.0));
    }
}

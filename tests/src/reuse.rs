//! What reuse a cap allows at best: Belady's optimum for a known sequence, and the sequences to try it on.

use std::collections::HashMap;

/// How many requests of `sequence` can find their key among at most `cap` kept ones, when the future is known: at
/// each miss the kept key that is used latest again (or never) goes, or the new one itself is not kept.
pub fn best_hits(sequence: &[usize], cap: usize) -> usize {
    let mut next_use = vec![usize::MAX; sequence.len()];
    let mut later: HashMap<usize, usize> = HashMap::new();
    for (position, key) in sequence.iter().enumerate().rev() {
        next_use[position] = later.insert(*key, position).unwrap_or(usize::MAX);
    }
    let mut kept: HashMap<usize, usize> = HashMap::new();
    let mut hits = 0;
    for (position, key) in sequence.iter().enumerate() {
        if kept.contains_key(key) {
            hits += 1;
        }
        kept.insert(*key, next_use[position]);
        if kept.len() > cap {
            let latest = kept.iter().max_by_key(|(_, next)| **next).map(|(key, _)| *key);
            if let Some(latest) = latest {
                kept.remove(&latest);
            }
        }
    }
    hits
}

/// `count` keys from 0 to `kinds` - 1, in rotation.
pub fn rotation(kinds: usize, count: usize) -> Vec<usize> {
    (0..count).map(|n| n % kinds).collect()
}

/// `count` keys from 0 to `kinds` - 1 with Zipf's distribution (exponent 1): key k is as likely as 1 / (k + 1).
pub fn zipf(kinds: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut random = fastrand::Rng::with_seed(seed);
    let weights: Vec<f64> = (1..=kinds).map(|rank| 1.0 / rank as f64).collect();
    let total: f64 = weights.iter().sum();
    (0..count)
        .map(|_| {
            let mut left = random.f64() * total;
            weights.iter().position(|weight| {
                left -= weight;
                left <= 0.0
            })
        })
        .map(|found| found.unwrap_or(kinds - 1))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The best of all decisions, by trying every one.
    fn exhaustive(sequence: &[usize], kept: &[usize], cap: usize) -> usize {
        let Some((key, rest)) = sequence.split_first() else { return 0 };
        if kept.contains(key) {
            return 1 + exhaustive(rest, kept, cap);
        }
        let mut best = exhaustive(rest, kept, cap);
        if kept.len() < cap {
            best = best.max(exhaustive(rest, &[kept, &[*key]].concat(), cap));
        } else {
            for evicted in 0..kept.len() {
                let mut with = kept.to_vec();
                with[evicted] = *key;
                best = best.max(exhaustive(rest, &with, cap));
            }
        }
        best
    }

    #[test]
    fn no_strategy_beats_it() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let sequence: Vec<usize> = (0..9).map(|_| random.usize(0..4)).collect();
            let cap = random.usize(1..3);
            assert_eq!(best_hits(&sequence, cap), exhaustive(&sequence, &[], cap), "{sequence:?} cap {cap}");
        }
    }

    #[test]
    fn rotation_within_the_cap_misses_only_first_uses() {
        assert_eq!(best_hits(&rotation(8, 800), 8), 792);
        let nine = best_hits(&rotation(9, 9000), 8);
        assert!((7800..8000).contains(&nine), "{nine}: about 7 of 8 in the long run");
    }

    #[test]
    fn zipf_prefers_low_keys_and_repeats_with_its_seed() {
        let keys = zipf(64, 10_000, 1);
        let count = |key| keys.iter().filter(|k| **k == key).count();
        assert!(count(0) > count(7) && count(7) > count(63) && keys.iter().all(|k| *k < 64));
        assert_eq!(keys, zipf(64, 10_000, 1));
    }
}

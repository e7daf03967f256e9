//! A histogram of durations with logarithmic buckets: 64 per power of two, so a quantile is exact to 1.6 %.

/// Linear buckets per power of two, as a power of two itself.
const PRECISION_BITS: u32 = 6;
const PER_POWER: usize = 1 << PRECISION_BITS;
const BUCKETS: usize = (64 - PRECISION_BITS as usize + 1) * PER_POWER;

/// Counts of durations in nanoseconds. Recording never allocates.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum: u128,
    max: u64,
}

impl Histogram {
    /// An empty histogram.
    #[must_use]
    pub fn new() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0, sum: 0, max: 0 }
    }

    /// Adds one duration, in nanoseconds.
    pub fn record(&mut self, nanos: u64) {
        if let Some(count) = self.counts.get_mut(bucket(nanos)) {
            *count += 1;
        }
        self.total += 1;
        self.sum += u128::from(nanos);
        self.max = self.max.max(nanos);
    }

    /// How many durations were recorded.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The mean in nanoseconds, 0 when empty.
    #[must_use]
    pub fn mean(&self) -> u64 {
        if self.total == 0 { 0 } else { u64::try_from(self.sum / u128::from(self.total)).unwrap_or(u64::MAX) }
    }

    /// The largest duration, in nanoseconds.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The smallest bucket's upper bound, in nanoseconds, below or at which `fraction` (0 to 1) of all durations lie.
    #[must_use]
    pub fn quantile(&self, fraction: f64) -> u64 {
        // Counts stay far below 2^52, where the conversion is exact.
        let wanted = ((self.total as f64) * fraction).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper_bound(index).min(self.max);
            }
        }
        self.max
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

/// Below 64 the value is its own bucket; above, the leading bit selects a group of 64 and the next six bits the bucket.
fn bucket(nanos: u64) -> usize {
    let leading = 63 - (nanos | 1).leading_zeros();
    let shift = leading.saturating_sub(PRECISION_BITS);
    if leading < PRECISION_BITS { nanos as usize } else { shift as usize * PER_POWER + (nanos >> shift) as usize }
}

/// The largest value that falls into the bucket.
fn upper_bound(index: usize) -> u64 {
    if index < 2 * PER_POWER {
        return index as u64;
    }
    let shift = index / PER_POWER - 1;
    let mantissa = (index - shift * PER_POWER) as u128;
    u64::try_from(((mantissa + 1) << shift) - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_hold_their_bounds() {
        for index in 0..BUCKETS {
            let top = upper_bound(index);
            assert_eq!(bucket(top), index, "upper bound {top} of bucket {index}");
            if top < u64::MAX {
                assert_eq!(bucket(top + 1), index + 1, "first value after bucket {index}");
            }
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_within_two_percent() {
        let mut histogram = Histogram::new();
        for value in 1..=100_000 {
            histogram.record(value * 10);
        }
        for (fraction, exact) in [(0.5, 500_000.0), (0.99, 990_000.0), (0.999, 999_000.0), (1.0, 1_000_000.0)] {
            let found = histogram.quantile(fraction) as f64;
            assert!((found / exact - 1.0).abs() < 0.02, "quantile {fraction}: {found}, exact {exact}");
        }
        assert_eq!(histogram.max(), 1_000_000);
        assert_eq!(histogram.mean(), 500_005);
    }

    #[test]
    fn an_empty_histogram_says_zero() {
        let histogram = Histogram::new();
        assert_eq!((histogram.quantile(0.99), histogram.mean(), histogram.total()), (0, 0, 0));
    }
}

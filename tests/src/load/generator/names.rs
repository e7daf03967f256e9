//! Which name a query asks for.

use std::str::FromStr;

/// A sequence of names, given as `constant`, `unique`, `rotate:K` or `zipf:K`.
#[derive(Debug, Clone, PartialEq)]
pub enum Names {
    /// Always the same.
    Constant,
    /// A new one for each query.
    Unique,
    /// So many in turn.
    Rotate(u64),
    /// So many at random, the n-th with a weight of 1/n. Holds the cumulated weights.
    Zipf(Vec<f64>),
}

impl Names {
    /// The number in the name of a client's query number `sequence`.
    #[must_use]
    pub fn number(&self, sequence: u64) -> u64 {
        match self {
            Self::Constant => 0,
            Self::Unique => sequence,
            Self::Rotate(count) => sequence % count,
            Self::Zipf(cumulated) => {
                let total = cumulated.last().copied().unwrap_or_default();
                let point = fastrand::f64() * total;
                cumulated.partition_point(|weight| *weight <= point) as u64
            }
        }
    }
}

impl FromStr for Names {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let counted = |count: &str| match count.parse() {
            Ok(0) | Err(_) => Err(format!("'{count}' is not a positive number of names")),
            Ok(count) => Ok::<u64, String>(count),
        };
        match text.split_once(':') {
            None if text == "constant" => Ok(Self::Constant),
            None if text == "unique" => Ok(Self::Unique),
            Some(("rotate", count)) => Ok(Self::Rotate(counted(count)?)),
            Some(("zipf", count)) => {
                let mut sum = 0.0;
                let weights = (1..=counted(count)?).map(|rank| {
                    sum += 1.0 / rank as f64;
                    sum
                });
                Ok(Self::Zipf(weights.collect()))
            }
            _ => Err(format!("'{text}' is not one of constant, unique, rotate:K, zipf:K")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn patterns_give_the_numbers_they_promise() {
        let numbers = |text: &str| (0..5).map(|n| text.parse::<Names>().unwrap().number(n)).collect::<Vec<_>>();
        assert_eq!(numbers("constant"), [0; 5]);
        assert_eq!(numbers("unique"), [0, 1, 2, 3, 4]);
        assert_eq!(numbers("rotate:3"), [0, 1, 2, 0, 1]);
        for wrong in ["rotate", "rotate:0", "zipf:x", "random"] {
            assert!(wrong.parse::<Names>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn zipf_prefers_low_numbers() {
        let names: Names = "zipf:4".parse().unwrap();
        let mut counts = [0_u32; 4];
        for _ in 0..10_000 {
            counts[names.number(0) as usize] += 1;
        }
        // Weights 1, 1/2, 1/3, 1/4: 48 %, 24 %, 16 % and 12 %.
        for (count, expected) in counts.into_iter().zip([4800, 2400, 1600, 1200]) {
            assert!(count.abs_diff(expected) < expected / 5, "{counts:?}");
        }
    }
}

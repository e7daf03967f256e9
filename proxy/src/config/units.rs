//! Durations ("250ms", "10s", "5m", "1h") and sizes ("512B", "64KiB") as the configuration writes them: a whole number
//! and a unit, nothing between them.

use std::time::Duration;

use thiserror::Error;

/// The longest duration, one year: far above any use, and far below where sums of times overflow.
pub const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The largest size, 1 GiB, in bytes.
pub const MAX_SIZE: usize = 1 << 30;

/// Units of time, in milliseconds, the largest first.
const TIMES: &[(&str, u64)] = &[("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Units of size, in bytes, the largest first.
const SIZES: &[(&str, u64)] = &[("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// A duration or size that cannot be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum UnitError {
    /// Something other than digits before the unit, such as a sign, a fraction or a space.
    #[error("{text:?} does not start with a whole number; write {example}")]
    Number {
        /// What was given.
        text: String,
        /// What would be right.
        example: &'static str,
    },
    /// Digits only.
    #[error("{text:?} has no unit; the units are {units}")]
    NoUnit {
        /// What was given.
        text: String,
        /// What would be right.
        units: &'static str,
    },
    /// A unit that does not exist, such as "KB".
    #[error("there is no unit {unit:?}; the units are {units}")]
    UnknownUnit {
        /// What was given.
        unit: String,
        /// What would be right.
        units: &'static str,
    },
    /// More than [`MAX_DURATION`] or [`MAX_SIZE`].
    #[error("{text:?} is more than {limit}")]
    TooLarge {
        /// What was given.
        text: String,
        /// What would be right.
        limit: &'static str,
    },
}

/// What tells durations and sizes apart.
struct Quantity {
    scale: &'static [(&'static str, u64)],
    units: &'static str,
    example: &'static str,
    max: u64,
    limit: &'static str,
}

const TIME: Quantity = Quantity {
    scale: TIMES,
    units: "ms, s, m and h",
    example: "\"250ms\", \"10s\", \"5m\" or \"1h\"",
    max: MAX_DURATION.as_secs() * 1_000,
    limit: "a year (\"8760h\")",
};

const SIZE: Quantity = Quantity {
    scale: SIZES,
    units: "B, KiB and MiB",
    example: "\"512B\" or \"64KiB\"",
    max: MAX_SIZE as u64,
    limit: "\"1024MiB\"",
};

/// Reads a duration such as "250ms".
///
/// # Errors
///
/// If there is no whole number, no known unit, or more than [`MAX_DURATION`].
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    TIME.parse(text).map(Duration::from_millis)
}

/// Reads a size such as "64KiB", in bytes.
///
/// # Errors
///
/// If there is no whole number, no known unit, or more than [`MAX_SIZE`].
pub fn parse_size(text: &str) -> Result<usize, UnitError> {
    // At most MAX_SIZE, a usize.
    SIZE.parse(text).map(|bytes| usize::try_from(bytes).unwrap_or(MAX_SIZE))
}

/// Writes a duration in the largest unit that divides it. Parts of a millisecond are left out.
pub fn format_duration(duration: Duration) -> String {
    TIME.format(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX), "s")
}

/// Writes a size in bytes in the largest unit that divides it.
pub fn format_size(bytes: usize) -> String {
    SIZE.format(u64::try_from(bytes).unwrap_or(u64::MAX), "B")
}

impl Quantity {
    fn parse(&self, text: &str) -> Result<u64, UnitError> {
        let digits = text.len() - text.trim_start_matches(|character: char| character.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(UnitError::Number { text: text.to_owned(), example: self.example });
        }
        if unit.is_empty() {
            return Err(UnitError::NoUnit { text: text.to_owned(), units: self.units });
        }
        let Some((_, factor)) = self.scale.iter().find(|(name, _)| *name == unit) else {
            return Err(UnitError::UnknownUnit { unit: unit.to_owned(), units: self.units });
        };
        // Digits only, so a number that does not parse is one that does not fit.
        let value = number.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor));
        value
            .filter(|value| *value <= self.max)
            .ok_or_else(|| UnitError::TooLarge { text: text.to_owned(), limit: self.limit })
    }

    fn format(&self, value: u64, unit_of_zero: &str) -> String {
        if value == 0 {
            return format!("0{unit_of_zero}");
        }
        let exact = self.scale.iter().find(|(_, factor)| value.is_multiple_of(*factor));
        let (unit, factor) = exact.copied().unwrap_or((unit_of_zero, 1));
        format!("{}{unit}", value / factor)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [("0s", 0), ("250ms", 250), ("10s", 10_000), ("5m", 300_000), ("1h", 3_600_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)));
            assert_eq!(format_duration(Duration::from_millis(millis)), text);
        }
        assert_eq!(parse_duration("8760h"), Ok(MAX_DURATION));
        assert_eq!(format_duration(Duration::from_millis(90_000)), "90s");
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("0B", 0), ("512B", 512), ("64KiB", 65_536), ("3MiB", 3 << 20)] {
            assert_eq!(parse_size(text), Ok(bytes));
            assert_eq!(format_size(bytes), text);
        }
        assert_eq!(parse_size("1024MiB"), Ok(MAX_SIZE));
    }

    #[test]
    fn errors_say_what_to_write_instead() {
        let duration = |text| parse_duration(text).unwrap_err().to_string();
        let write = "write \"250ms\", \"10s\", \"5m\" or \"1h\"";
        for text in ["", "s", "-1s", " 1s", "+1s", "½s"] {
            assert_eq!(duration(text), format!("{text:?} does not start with a whole number; {write}"));
        }
        assert_eq!(duration("10"), "\"10\" has no unit; the units are ms, s, m and h");
        assert_eq!(duration("1d"), "there is no unit \"d\"; the units are ms, s, m and h");
        assert_eq!(duration("1.5s"), "there is no unit \".5s\"; the units are ms, s, m and h");
        assert_eq!(duration("8761h"), "\"8761h\" is more than a year (\"8760h\")");
        assert_eq!(
            duration("99999999999999999999999h"),
            "\"99999999999999999999999h\" is more than a year (\"8760h\")"
        );
        let size = |text| parse_size(text).unwrap_err().to_string();
        assert_eq!(size("64KB"), "there is no unit \"KB\"; the units are B, KiB and MiB");
        assert_eq!(size("512"), "\"512\" has no unit; the units are B, KiB and MiB");
        assert_eq!(size("x"), "\"x\" does not start with a whole number; write \"512B\" or \"64KiB\"");
        assert_eq!(size("1025MiB"), "\"1025MiB\" is more than \"1024MiB\"");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(millis in 0..=TIME.max, bytes in 0..=MAX_SIZE) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn any_text_is_read_or_refused(text in any::<String>()) {
            drop((parse_duration(&text), parse_size(&text)));
        }
    }
}

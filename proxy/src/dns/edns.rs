//! EDNS options of a query, found in place.

use super::message::MAX_LABEL;

/// Type of the OPT record (RFC 6891, section 6.1.1).
pub(super) const OPT: u16 = 41;
/// Octets of a record between its name and its data: TYPE, CLASS, TTL, RDLENGTH (RFC 1035, section 4.1.3).
pub(super) const FIXED: usize = 10;

/// The value of the first option of this code in the first OPT record of the additional section. `records` are the octets
/// behind the question, `count` says how many records come before that section, and how many are in it: octets that the
/// header does not announce are nothing, whatever they look like. None if there is no such option, or a record before it
/// cannot be read.
pub(crate) fn option(records: &[u8], count: (u32, u16), code: u16) -> Option<&[u8]> {
    let mut options = opt(records, count)?;
    while let [c1, c0, l1, l0, rest @ ..] = options {
        let (value, after) = rest.split_at_checked(usize::from(u16::from_be_bytes([*l1, *l0])))?;
        if u16::from_be_bytes([*c1, *c0]) == code {
            return Some(value);
        }
        options = after;
    }
    None
}

/// The data of the first OPT record of the additional section.
fn opt(records: &[u8], (before, additional): (u32, u16)) -> Option<&[u8]> {
    let mut rest = records;
    for index in 0..before + u32::from(additional) {
        let (name, after) = rest.split_at_checked(name_len(rest)?)?;
        let (fixed, after) = after.split_first_chunk::<FIXED>()?;
        let (data, after) = after.split_at_checked(usize::from(u16::from_be_bytes([fixed[8], fixed[9]])))?;
        if index >= before && name == [0] && u16::from_be_bytes([fixed[0], fixed[1]]) == OPT {
            return Some(data);
        }
        rest = after;
    }
    None
}

/// Octets of the name at the front, its end or a pointer included. Pointers are not followed.
pub(super) fn name_len(octets: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match *octets.get(at)? {
            0 => return Some(at + 1),
            label @ 1..=MAX_LABEL => at += 1 + usize::from(label),
            0xc0.. => return Some(at + 2),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OPTIONS: &[u8] = b"\0\x0a\0\x02co\xfd\xe9\0\x03abc\xfd\xe9\0\x01x\0\0\0\0";

    fn record(name: &[u8], kind: u16, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(data.len()).unwrap_or(u16::MAX);
        [name, &kind.to_be_bytes(), &[4, 0, 0, 0, 0, 0], &length.to_be_bytes(), data].concat()
    }

    #[test]
    fn the_first_option_of_its_code_behind_other_records() {
        let records =
            [record(b"\x03key\xc0\x0c", 1, b"1234"), record(b"\0", OPT, OPTIONS), record(b"\0", 250, b"")].concat();
        assert_eq!(option(&records, (0, 3), 0xfde9), Some(&b"abc"[..]));
        assert_eq!(option(&records, (1, 2), 10), Some(&b"co"[..]));
        assert_eq!(option(&records, (0, u16::MAX), 0), Some(&b""[..]));
        assert_eq!(option(&records, (0, 3), 8), None);
        assert_eq!(option(&[], (0, 1), 10), None);
        assert_eq!(option(&record(b"\x01a\0", OPT, OPTIONS), (0, 1), 10), None, "OPT belongs to the root");
    }

    #[test]
    fn what_is_not_announced_or_elsewhere_is_not_there() {
        let records = [record(b"\x01a\0", 1, b"1234"), record(b"\0", OPT, OPTIONS)].concat();
        for count in [(0, 0), (0, 1), (1, 0), (2, 0), (2, 5)] {
            assert_eq!(option(&records, count, 10), None, "{count:?}");
        }
        assert_eq!(option(&records, (1, 1), 10), Some(&b"co"[..]));
    }

    #[test]
    fn what_is_cut_off_is_not_there() {
        let records = record(b"\0", OPT, OPTIONS);
        for cut in 0..records.len() {
            assert_eq!(option(&records[..cut], (0, 1), 10), None, "{cut}");
        }
        let short = record(b"\0", OPT, b"\0\x0a\0\x05abc");
        assert_eq!(option(&short, (0, 1), 10), None);
    }

    proptest! {
        #[test]
        fn any_octets_are_read_without_a_panic(records in prop::collection::vec(any::<u8>(), 0..200), code: u16, count: (u8, u8)) {
            if let Some(value) = option(&records, (count.0.into(), count.1.into()), code) {
                prop_assert!(value.len() < records.len());
            }
        }
    }
}

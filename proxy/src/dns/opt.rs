//! The OPT record of a message (RFC 6891), found in place: for those who read an option, answer it, or change what is in it.
//!
//! Names are not followed and nothing is decoded, so a change keeps every other octet as it was sent (RFC 6891, section
//! 6.2.6; RFC 5625, section 4).

use std::ops::Range;

use super::records::{OPT, Record, Records, Section, work};

/// Type of the record that signs a transaction by a shared key (RFC 8945, section 4.2).
const TSIG: u16 = 250;
/// Type of the record that signs a transaction by a public key, if it covers type 0 (RFC 2931, section 3).
const SIG: u16 = 24;
/// Octets of an option's code and length (RFC 6891, section 6.1.2).
pub(super) const OPTION_HEAD: usize = 4;
/// DO in an OPT record's TTL (RFC 3225, section 3).
const DNSSEC_OK: u32 = 0x8000;

/// Where the one OPT record of a message is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Opt {
    /// Its data, the options. The two octets of RDLENGTH stand before it.
    pub(super) data: Range<usize>,
    /// Nothing comes after it, so nothing moves if its data become longer or shorter, and no compression pointer
    /// (RFC 1035, section 4.1.4) leads astray.
    pub(super) is_last: bool,
    /// Its flag DO.
    pub(super) dnssec_ok: bool,
}

/// An option in an OPT record's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EdnsOption {
    pub(super) code: u16,
    /// Its value, from the start of the message.
    pub(super) value: Range<usize>,
}

/// The message is nobody's to change: it is signed (TSIG, SIG(0)), or not understood to its last octet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Untouchable;

/// The OPT record of a message that may be changed, if it has one.
///
/// # Errors
///
/// It may not be changed.
pub(super) fn find(message: &[u8]) -> Result<Option<Opt>, Untouchable> {
    let looked = Looked::at(message).ok_or(Untouchable)?;
    if looked.is_signed || looked.end != message.len() {
        return Err(Untouchable);
    }
    Ok(looked.opt)
}

/// The OPT record of a query that is to be answered. None if there is no such record, more than one, or one that is not in
/// the additional section, or if a record or option cannot be read.
pub(super) fn of_query(query: &[u8]) -> Option<Opt> {
    Looked::at(query)?.opt
}

/// What is seen of a message whose records, and options, can all be read.
struct Looked {
    opt: Option<Opt>,
    is_signed: bool,
    /// Where the last record ends.
    end: usize,
}

impl Looked {
    fn at(message: &[u8]) -> Option<Self> {
        let mut records = Records::of(message)?;
        let mut looked = Self { opt: None, is_signed: false, end: records.at() };
        for record in records.by_ref() {
            let record = record?;
            match record.rtype {
                OPT if !is_opt(message, &record) || looked.opt.is_some() => return None,
                OPT => {
                    let dnssec_ok = record.ttl & DNSSEC_OK != 0;
                    looked.opt = Some(Opt { data: record.data, is_last: false, dnssec_ok });
                }
                TSIG => looked.is_signed = true,
                SIG => looked.is_signed |= message.get(record.data)?.starts_with(&[0, 0]),
                _ => {}
            }
        }
        looked.end = records.at();
        if let Some(opt) = &mut looked.opt {
            opt.is_last = opt.data.end == message.len();
            let mut at = opt.data.start;
            while at < opt.data.end {
                at = option_at(message, at, opt.data.end)?.value.end;
            }
        }
        Some(looked)
    }
}

/// Whether a record of this type is where one has a meaning (RFC 6891, section 6.1.1).
fn is_opt(message: &[u8], record: &Record) -> bool {
    record.section == Section::Additional && message.get(record.owner.clone()) == Some(&[0])
}

/// The option that begins at `at`. None if there is no whole one before `end`, where the OPT record's data end.
pub(super) fn option_at(message: &[u8], at: usize, end: usize) -> Option<EdnsOption> {
    work::count(1);
    let head = message.get(at..end)?.first_chunk::<OPTION_HEAD>()?;
    let start = at + OPTION_HEAD;
    let value = start..start + usize::from(u16::from_be_bytes([head[2], head[3]]));
    (value.end <= end).then(|| EdnsOption { code: u16::from_be_bytes([head[0], head[1]]), value })
}

/// The value of the first option of this code in the first OPT record of a query's additional section. None if there is no
/// such option, or a record before it cannot be read. What the header does not announce is nothing, whatever it looks like.
pub(super) fn value(query: &[u8], code: u16) -> Option<&[u8]> {
    let mut records = Records::of(query)?.map_while(|record| record);
    let data = records.find(|record| record.rtype == OPT && is_opt(query, record))?.data;
    let mut at = data.start;
    while let Some(option) = option_at(query, at, data.end) {
        if option.code == code {
            return query.get(option.value);
        }
        at = option.value.end;
    }
    None
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

    /// The option of a query for `a.` with so many records announced before the additional section and in it.
    fn option(records: &[u8], (before, additional): (u8, u8), code: u16) -> Option<Vec<u8>> {
        let head = [0, 1, 1, 0, 0, 1, 0, before, 0, 0, 0, additional, 1, b'a', 0, 0, 1, 0, 1];
        value(&[&head, records].concat(), code).map(<[u8]>::to_vec)
    }

    #[test]
    fn the_first_option_of_its_code_behind_other_records() {
        let records =
            [record(b"\x03key\xc0\x0c", 1, b"1234"), record(b"\0", OPT, OPTIONS), record(b"\0", 250, b"")].concat();
        assert_eq!(option(&records, (0, 3), 0xfde9).as_deref(), Some(&b"abc"[..]));
        assert_eq!(option(&records, (1, 2), 10).as_deref(), Some(&b"co"[..]));
        assert_eq!(option(&records, (0, u8::MAX), 0).as_deref(), Some(&b""[..]));
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
        assert_eq!(option(&records, (1, 1), 10).as_deref(), Some(&b"co"[..]));
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
            if let Some(value) = option(&records, count, code) {
                prop_assert!(value.len() < records.len());
            }
        }
    }
}

//! What certificates say (RFC 5280 section 4.1) that people must be told: from when to when they are valid, whose they are,
//! whether they are those of an authority. Whether one is good, TLS says.

use std::ops::RangeInclusive;

/// Tags of DER (X.690 section 8).
mod tag {
    pub(super) const BOOLEAN: u8 = 0x01;
    pub(super) const INTEGER: u8 = 0x02;
    pub(super) const OCTET_STRING: u8 = 0x04;
    pub(super) const OID: u8 = 0x06;
    pub(super) const UTC_TIME: u8 = 0x17;
    pub(super) const GENERALIZED_TIME: u8 = 0x18;
    pub(super) const SEQUENCE: u8 = 0x30;
    pub(super) const SET: u8 = 0x31;
    /// `[0]`, explicit.
    pub(super) const VERSION: u8 = 0xa0;
    /// `[3]`, explicit.
    pub(super) const EXTENSIONS: u8 = 0xa3;
}

/// id-at-commonName and id-at-organizationName (appendix A.1), id-ce-basicConstraints (section 4.2.1.9).
const COMMON_NAME: &[u8] = &[0x55, 4, 3];
const ORGANIZATION: &[u8] = &[0x55, 4, 10];
const BASIC_CONSTRAINTS: &[u8] = &[0x55, 29, 19];

/// `notAfter` of a certificate in DER: the last second in which it is valid, unix time. None if it is not to be read.
pub fn not_after(certificate: &[u8]) -> Option<i64> {
    validity(certificate).map(|valid| *valid.end())
}

/// The seconds in which a certificate is valid, unix time.
pub fn validity(certificate: &[u8]) -> Option<RangeInclusive<i64>> {
    let fields = after_issuer(certificate)?;
    let (validity, _) = element(tag::SEQUENCE, fields)?;
    let (not_before, validity) = time(validity)?;
    time(validity).map(|(not_after, _)| not_before..=not_after)
}

/// The certificate of a chain with this number, counted from 1, for people: with its common name, or its organization's.
pub fn called(number: usize, certificate: &[u8]) -> String {
    match subject(certificate) {
        Some(name) => format!("certificate {number} ({name:?})"),
        None => format!("certificate {number}"),
    }
}

/// Whether it is the certificate of an authority (cA in its basic constraints).
pub fn is_authority(certificate: &[u8]) -> bool {
    extension(certificate, BASIC_CONSTRAINTS)
        .and_then(|value| element(tag::SEQUENCE, value))
        .and_then(|(constraints, _)| element(tag::BOOLEAN, constraints))
        .is_some_and(|(ca, _)| ca != [0])
}

fn subject(certificate: &[u8]) -> Option<String> {
    let (_validity, fields) = element(tag::SEQUENCE, after_issuer(certificate)?)?;
    let (names, _) = element(tag::SEQUENCE, fields)?;
    attribute(names, COMMON_NAME).or_else(|| attribute(names, ORGANIZATION))
}

/// An attribute of a name. Strings of other than one octet a character come out odd.
fn attribute(mut names: &[u8], kind: &[u8]) -> Option<String> {
    while let Some((set, rest)) = element(tag::SET, names) {
        let (found, value) = element(tag::SEQUENCE, set).and_then(|(pair, _)| element(tag::OID, pair))?;
        if found == kind {
            let (text, _) = element(*value.first()?, value)?;
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        names = rest;
    }
    None
}

fn extension<'a>(certificate: &'a [u8], kind: &[u8]) -> Option<&'a [u8]> {
    let mut fields = after_issuer(certificate)?;
    // Validity, subject, key; two identifiers that nobody uses any more.
    while let Some((&tag, _)) = fields.split_first().filter(|(tag, _)| **tag != tag::EXTENSIONS) {
        (_, fields) = element(tag, fields)?;
    }
    let (extensions, _) = element(tag::EXTENSIONS, fields)?;
    let (mut extensions, _) = element(tag::SEQUENCE, extensions)?;
    while let Some((extension, rest)) = element(tag::SEQUENCE, extensions) {
        let (found, value) = element(tag::OID, extension)?;
        let value = element(tag::BOOLEAN, value).map_or(value, |(_critical, value)| value);
        if found == kind {
            return element(tag::OCTET_STRING, value).map(|(value, _)| value);
        }
        extensions = rest;
    }
    None
}

/// What comes behind the issuer: validity, subject, key, extensions.
fn after_issuer(certificate: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = element(tag::SEQUENCE, certificate)?;
    let (fields, _) = element(tag::SEQUENCE, certificate)?;
    // Those of version 1 do not say so.
    let fields = element(tag::VERSION, fields).map_or(fields, |(_, rest)| rest);
    let (_serial_number, fields) = element(tag::INTEGER, fields)?;
    let (_signature, fields) = element(tag::SEQUENCE, fields)?;
    let (_issuer, fields) = element(tag::SEQUENCE, fields)?;
    Some(fields)
}

/// What is in the element at the beginning, if it has this tag, and what comes behind it.
fn element(tag: u8, der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&[found, first], rest) = der.split_first_chunk()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        // So many octets with the length: no certificate takes more.
        0x81..=0x83 => {
            let (octets, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (octets.iter().fold(0, |length, octet| length << 8 | usize::from(*octet)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length).filter(|_| found == tag)
}

/// A `Time`, and what comes behind it.
fn time(der: &[u8]) -> Option<(i64, &[u8])> {
    if let Some((text, rest)) = element(tag::UTC_TIME, der) {
        let (year, text) = text.split_at_checked(2)?;
        let year = number(year)?;
        // From 1950 to 2049.
        let century = if year < 50 { 2000 } else { 1900 };
        return Some((seconds(century + year, text)?, rest));
    }
    let (text, rest) = element(tag::GENERALIZED_TIME, der)?;
    let (year, text) = text.split_at_checked(4)?;
    Some((seconds(number(year)?, text)?, rest))
}

/// Unix time of `MMDDHHMMSSZ` in this year.
fn seconds(year: i64, text: &[u8]) -> Option<i64> {
    let (parts, []) = text.strip_suffix(b"Z")?.as_chunks::<2>() else { return None };
    let [month, day, hour, minute, second] = parts else { return None };
    let of = |part: &[u8], range: RangeInclusive<i64>| number(part).filter(|number| range.contains(number));
    let days = days(year, of(month, 1..=12)?, of(day, 1..=31)?);
    Some(((days * 24 + of(hour, 0..=23)?) * 60 + of(minute, 0..=59)?) * 60 + of(second, 0..=59)?)
}

/// Days since 1970 (proleptic Gregorian, by the algorithm of Howard Hinnant's `days_from_civil`).
fn days(year: i64, month: i64, day: i64) -> i64 {
    // Years that begin in March have the leap day at their end.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn number(digits: &[u8]) -> Option<i64> {
    let digit = |octet: &u8| octet.is_ascii_digit().then(|| i64::from(octet - b'0'));
    digits.iter().try_fold(0, |number, octet| Some(number * 10 + digit(octet)?))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::sync::LazyLock;

    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, date_time_ymd};

    use super::*;

    /// A certificate that ends with this second of this day, in DER.
    fn certificate(year: i32, month: u8, day: u8) -> Vec<u8> {
        let mut params = CertificateParams::new(["dns.example".to_owned()]).unwrap();
        params.not_before = date_time_ymd(1970, 1, 1);
        params.not_after = date_time_ymd(year, month, day);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn the_end_is_that_of_the_certificate() {
        // From 2050 on the year has four digits. As `date -u -d DAY +%s` prints them.
        for ((year, month, day), expected) in [
            ((1970, 1, 2), 86_400),
            ((1999, 12, 31), 946_598_400),
            ((2000, 2, 29), 951_782_400),
            ((2000, 3, 1), 951_868_800),
            ((2026, 11, 22), 1_795_305_600),
            ((2049, 12, 31), 2_524_521_600),
            ((2050, 1, 1), 2_524_608_000),
            ((2100, 3, 1), 4_107_542_400),
            ((4096, 1, 1), 67_090_118_400),
        ] {
            assert_eq!(not_after(&certificate(year, month, day)), Some(expected), "{year}-{month}-{day}");
        }
    }

    #[test]
    fn times_are_read_to_the_second() {
        let of = |tag, text: &str| time(&[&[tag, text.len() as u8][..], text.as_bytes()].concat()).map(|(at, _)| at);
        let utc = |text| of(tag::UTC_TIME, text);
        assert_eq!(utc("700101000000Z"), Some(0));
        assert_eq!(utc("261122220915Z"), Some(1_795_385_355));
        assert_eq!(utc("500101000000Z"), Some(-631_152_000), "1950");
        for wrong in [
            "",
            "Z",
            "261122220915",
            "2611222209Z",
            "261122220915+0100",
            "26112222091xZ",
            "261322220915Z",
            "260022220915Z",
        ] {
            assert_eq!(utc(wrong), None, "{wrong}");
        }
        let last = of(tag::GENERALIZED_TIME, "99991231235959Z");
        assert_eq!(last, Some(253_402_300_799), "no end that is known (RFC 5280 section 4.1.2.5)");
    }

    #[test]
    fn names_and_authorities() {
        let certificate = |names: &[(DnType, &str)], is_ca| {
            let mut params = CertificateParams::new(["dns.example".to_owned()]).unwrap();
            params.distinguished_name = DistinguishedName::new();
            for (kind, name) in names {
                params.distinguished_name.push(kind.clone(), *name);
            }
            params.is_ca = is_ca;
            params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
        };
        let ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let (organization, name) = ((DnType::OrganizationName, "Some \"Inc\""), (DnType::CommonName, "Root \u{e9}"));
        let both = certificate(&[organization.clone(), name], ca);
        assert_eq!((called(2, &both).as_str(), is_authority(&both)), ("certificate 2 (\"Root \u{e9}\")", true));
        let one = certificate(&[organization], IsCa::ExplicitNoCa);
        assert_eq!((called(1, &one).as_str(), is_authority(&one)), ("certificate 1 (\"Some \\\"Inc\\\"\")", false));
        let none = certificate(&[], IsCa::NoCa);
        assert_eq!((called(1, &none).as_str(), is_authority(&none)), ("certificate 1", false));
    }

    proptest! {
        #[test]
        fn no_octets_make_it_panic(cut in 0..500usize, at in 0..500usize, octet: u8) {
            static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| certificate(2030, 1, 1));
            let mut der = WHOLE.clone();
            der.truncate(cut);
            if let Some(place) = der.get_mut(at) {
                *place = octet;
            }
            let _ = (not_after(&der), called(1, &der), is_authority(&der));
        }
    }
}

//! Reading PROXY headers of version 1, the line of text (section 2.1 of the specification).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::parse::{Command, Invalid, ParseError, Parsed};

/// Octets of the longest line, CR LF included (section 2.1).
pub const MAX_LINE: usize = 107;

/// What every line begins with.
pub const PREFIX: &[u8] = b"PROXY ";

/// How lines begin, after [`PREFIX`].
const PROTOCOLS: [&[u8]; 3] = [b"TCP4 ", b"TCP6 ", b"UNKNOWN"];

/// Reads the line that `bytes` begins with, of at most `max` octets and never more than [`MAX_LINE`].
///
/// # Errors
///
/// [`ParseError::NeedMore`] while `bytes` is a proper beginning of a line, else [`ParseError::Invalid`].
pub fn parse_v1(bytes: &[u8], max: usize) -> Result<Parsed, ParseError> {
    let max = max.min(MAX_LINE);
    if !begins(bytes, PREFIX) {
        return Err(Invalid::Signature.into());
    }
    let protocol = bytes.get(PREFIX.len()..).unwrap_or_default();
    if !PROTOCOLS.iter().any(|known| begins(protocol, known)) {
        return Err(Invalid::Line("the protocol is none of TCP4, TCP6 and UNKNOWN").into());
    }
    let window = bytes.get(..max).unwrap_or(bytes);
    let Some(end) = window.windows(2).position(|pair| pair == b"\r\n") else {
        if bytes.len() < max {
            return Err(ParseError::NeedMore);
        }
        return Err(Invalid::TooLong { len: bytes.len(), max }.into());
    };
    let line = bytes.get(..end).unwrap_or_default();
    let ends = endpoints(line)?;
    let (source, destination) = ends.map_or((None, None), |(source, destination)| (Some(source), Some(destination)));
    Ok(Parsed { command: Command::Proxy, source, destination, tlvs: Vec::new(), len: end + 2 })
}

/// Whether one of them is the beginning of the other.
fn begins(bytes: &[u8], known: &[u8]) -> bool {
    bytes.iter().zip(known).all(|(a, b)| a == b)
}

/// Source and destination; none for UNKNOWN, where whatever follows is ignored.
fn endpoints(line: &[u8]) -> Result<Option<(SocketAddr, SocketAddr)>, Invalid> {
    let line = line.get(PREFIX.len()..).unwrap_or_default();
    if let Some(rest) = line.strip_prefix(b"UNKNOWN") {
        let alone = rest.first().is_none_or(|octet| *octet == b' ');
        return if alone { Ok(None) } else { Err(Invalid::Line("something stands against UNKNOWN")) };
    }
    let text = std::str::from_utf8(line).map_err(|_| Invalid::Line("not text"))?;
    let mut words = text.split(' ');
    let (Some(protocol), Some(source), Some(destination), Some(from), Some(to), None) =
        (words.next(), words.next(), words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Invalid::Line("not two addresses and two ports with one space between them"));
    };
    let address = |word: &str| -> Option<IpAddr> {
        match protocol {
            "TCP4" => word.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            _ => word.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        }
    };
    let wrong_address = Invalid::Line("an address that is none of its family");
    let source = address(source).ok_or_else(|| wrong_address.clone())?;
    let destination = address(destination).ok_or(wrong_address)?;
    let wrong_port = Invalid::Line("a port that is no number from 0 to 65535");
    let from = port(from).ok_or_else(|| wrong_port.clone())?;
    let to = port(to).ok_or(wrong_port)?;
    Ok(Some((SocketAddr::new(source, from), SocketAddr::new(destination, to))))
}

/// A decimal number without sign and leading zeros.
fn port(word: &str) -> Option<u16> {
    let plain = word.bytes().all(|octet| octet.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
    word.parse().ok().filter(|_| plain)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests panic")]

    use super::*;

    fn invalid(line: &str) -> Invalid {
        match parse_v1(line.as_bytes(), 536) {
            Err(ParseError::Invalid(reason)) => reason,
            other => unreachable!("{line:?}: {other:?}"),
        }
    }

    #[test]
    fn a_line_with_a_query_behind_it() {
        for (line, source, destination) in [
            ("PROXY TCP4 192.0.2.1 198.51.100.2 4000 53\r\n", "192.0.2.1:4000", "198.51.100.2:53"),
            ("PROXY TCP6 2001:db8::1 2001:DB8::2 65535 0\r\n", "[2001:db8::1]:65535", "[2001:db8::2]:0"),
            ("PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", "[::ffff:192.0.2.1]:1", "[::1]:2"),
        ] {
            let parsed = parse_v1(format!("{line}\r\nmore").as_bytes(), 536).expect("valid");
            assert_eq!((parsed.source, parsed.destination), (source.parse().ok(), destination.parse().ok()));
            assert_eq!((parsed.command, parsed.len), (Command::Proxy, line.len()));
            for cut in 0..line.len() {
                assert_eq!(parse_v1(&line.as_bytes()[..cut], 536), Err(ParseError::NeedMore), "{cut}");
            }
        }
    }

    #[test]
    fn unknown_ignores_what_follows() {
        for line in ["PROXY UNKNOWN\r\n", "PROXY UNKNOWN ffff:f \u{e9} \n \r x\r\n", "PROXY UNKNOWN \r\n"] {
            let parsed = parse_v1(line.as_bytes(), 536).expect("valid");
            assert_eq!((parsed.source, parsed.destination, parsed.len), (None, None, line.len()));
        }
        assert_eq!(invalid("PROXY UNKNOWNS\r\n"), Invalid::Line("something stands against UNKNOWN"));
    }

    #[test]
    fn no_line_is_longer_than_107_octets() {
        let of = |len: usize| format!("PROXY UNKNOWN {}\r\n", "x".repeat(len - 16));
        assert_eq!(parse_v1(of(107).as_bytes(), 536).map(|parsed| parsed.len), Ok(107));
        assert_eq!(invalid(&of(108)), Invalid::TooLong { len: 108, max: 107 });
        assert_eq!(parse_v1(&of(108).as_bytes()[..106], 536), Err(ParseError::NeedMore));
        assert_eq!(parse_v1(of(40).as_bytes(), 39), Err(Invalid::TooLong { len: 40, max: 39 }.into()));
    }

    #[test]
    fn what_is_no_line_is_refused_as_soon_as_it_is_known() {
        assert_eq!(invalid("Q"), Invalid::Signature);
        assert_eq!(invalid("PROXI"), Invalid::Signature);
        for line in ["PROXY T", "PROXY UDP4", "PROXY TCP5", "PROXY tcp4", "PROXY  "] {
            if line != "PROXY T" {
                assert_eq!(invalid(line), Invalid::Line("the protocol is none of TCP4, TCP6 and UNKNOWN"), "{line}");
            }
        }
        for line in [
            "PROXY TCP4 192.0.2.1 198.51.100.2 4000\r\n",
            "PROXY TCP4 192.0.2.1  198.51.100.2 4000 53\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.2 4000 53 \r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.2 4000 53 9\r\n",
        ] {
            assert_eq!(
                invalid(line),
                Invalid::Line("not two addresses and two ports with one space between them"),
                "{line}"
            );
        }
        for address in ["192.0.2.01", "192.0.2", "2001:db8::1", "192.0.2.1\t", "\u{661}.0.0.1", "256.0.0.1", "a"] {
            let line = format!("PROXY TCP4 {address} 198.51.100.2 4000 53\r\n");
            assert_eq!(invalid(&line), Invalid::Line("an address that is none of its family"), "{line}");
        }
        assert_eq!(invalid("PROXY TCP6 192.0.2.1 ::1 1 1\r\n"), Invalid::Line("an address that is none of its family"));
        for port in ["65536", "+80", "-1", "080", "00", "", "8 0"] {
            let line = format!("PROXY TCP4 192.0.2.1 198.51.100.2 {port} 53\r\n");
            assert!(matches!(invalid(&line), Invalid::Line(_)), "{line}");
        }
        assert_eq!(parse_v1(b"PROXY TCP4 \xff 198.51.100.2 1 1\r\n", 536), Err(Invalid::Line("not text").into()));
    }
}

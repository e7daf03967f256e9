//! A domain name as a configuration has it.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::message::{MAX_LABEL, MAX_NAME};

/// A domain name, in text and as it goes on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainName {
    text: String,
    wire: Vec<u8>,
}

/// Why a text is no domain name.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NameError {
    /// Two dots in a row, or one at the front; the root is a single dot.
    #[error("a label is empty")]
    EmptyLabel,
    /// RFC 1035, section 2.3.4.
    #[error("a label has more than 63 octets")]
    LongLabel,
    /// RFC 1035, section 2.3.4.
    #[error("the name has more than 255 octets")]
    TooLong,
    /// Neither letters nor digits nor printable signs; no escapes are known here.
    #[error("{0:?} cannot be in the name of a check")]
    Octet(char),
}

impl DomainName {
    /// Uncompressed, with its closing zero.
    pub fn wire(&self) -> &[u8] {
        &self.wire
    }
}

impl FromStr for DomainName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let mut wire = Vec::with_capacity(text.len() + 2);
        let labels = text.strip_suffix('.').unwrap_or(text);
        if let Some(odd) = labels.chars().find(|c| !c.is_ascii_graphic() || matches!(c, '\\' | '"')) {
            return Err(NameError::Octet(odd));
        }
        // The root alone has no labels.
        for label in labels.split('.').filter(|_| text != ".") {
            match u8::try_from(label.len()) {
                Ok(0) => return Err(NameError::EmptyLabel),
                Ok(length) if length <= MAX_LABEL => wire.push(length),
                _ => return Err(NameError::LongLabel),
            }
            wire.extend_from_slice(label.as_bytes());
        }
        wire.push(0);
        if wire.len() > MAX_NAME { Err(NameError::TooLong) } else { Ok(Self { text: text.to_owned(), wire }) }
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn names() {
        let wire = |text: &str| text.parse::<DomainName>().map(|name| name.wire().to_vec());
        assert_eq!(wire(".").unwrap(), b"\0");
        assert_eq!(wire("a.root-servers.net.").unwrap(), b"\x01a\x0croot-servers\x03net\0");
        assert_eq!(wire("_dns.Example"), wire("_dns.Example."));
        for (text, error) in [
            ("", NameError::EmptyLabel),
            ("..", NameError::EmptyLabel),
            ("a..b", NameError::EmptyLabel),
            (".a", NameError::EmptyLabel),
            ("a b", NameError::Octet(' ')),
            ("a\\.b", NameError::Octet('\\')),
            ("\u{e9}", NameError::Octet('\u{e9}')),
        ] {
            assert_eq!(wire(text), Err(error), "{text:?}");
        }
        assert_eq!(wire(&"a".repeat(63)).unwrap().len(), 65);
        assert_eq!(wire(&"a".repeat(64)), Err(NameError::LongLabel));
        assert_eq!(wire(&vec!["a".repeat(63); 4].join(".")), Err(NameError::TooLong));
    }
}

//! The token of those who may change something over HTTP.

use std::fmt;
use std::fs::Metadata;
use std::hint::black_box;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::file::{self, FileFault};

/// A shorter token could be guessed, characters.
const SHORTEST: usize = 16;
/// A longer file is none, bytes.
const LONGEST: usize = 4096;

/// A secret that is compared in constant time and never shown.
pub(crate) struct Token(Box<[u8]>);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// Why a file holds no token that can be relied on. Who reports it names the file. It is `Copy`, so that it carries nothing
/// of the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileFault),
    /// Everybody on the machine may read or change it.
    #[error("others may access it (mode {0:04o}): `chmod o=` it")]
    Open(u32),
    /// It is not one line of what a header can carry.
    #[error("it must hold one line of {SHORTEST} to {LONGEST} printable ASCII characters without spaces")]
    Form,
}

impl Token {
    /// Reads a file with the token in its only line.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub(crate) fn read(path: &Path) -> Result<Self, TokenError> {
        let closed = |metadata: &Metadata| match metadata.mode() & 0o7777 {
            mode if mode & 0o007 != 0 => Err(TokenError::Open(mode)),
            _ => Ok(()),
        };
        let octets = file::read_if(path, LONGEST as u64 + 1, closed)?;
        let token = octets.strip_suffix(b"\n").unwrap_or(&octets);
        let has_form = (SHORTEST..=LONGEST).contains(&token.len()) && token.iter().all(u8::is_ascii_graphic);
        if has_form { Ok(Self(token.into())) } else { Err(TokenError::Form) }
    }

    /// Whether the value of an `Authorization` header has it: `Bearer TOKEN` (RFC 6750 section 2.1). How long that takes
    /// tells nothing of the token but its length.
    pub(super) fn is_in(&self, header: &[u8]) -> bool {
        let Some((scheme, given)) = header.split_at_checked(b"Bearer ".len()) else { return false };
        scheme.eq_ignore_ascii_case(b"Bearer ") && is_same(given, &self.0)
    }
}

/// Looks at every octet, whichever differ.
fn is_same(given: &[u8], expected: &[u8]) -> bool {
    let different = given.iter().zip(expected).fold(0, |different, (one, other)| black_box(different | (one ^ other)));
    given.len() == expected.len() && different == 0
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::*;

    /// A file with this in it and this mode, gone with the value.
    struct Written(PathBuf);

    impl Written {
        fn new(name: &str, text: &str, mode: u32) -> Self {
            let path = std::env::temp_dir().join(format!("counterfoil-token-{}-{name}", std::process::id()));
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            Self(path)
        }
    }

    impl Drop for Written {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn only_the_whole_token_will_do() {
        let file = Written::new("good", "0123456789abcdef\n", 0o640);
        let token = Token::read(&file.0).unwrap();
        assert!(token.is_in(b"Bearer 0123456789abcdef"));
        assert!(token.is_in(b"bEARER 0123456789abcdef"), "the scheme's case is free (RFC 9110 section 11.1)");
        for wrong in [
            &b""[..],
            b"Bearer",
            b"Bearer ",
            b"Bearer 0123456789abcde",
            b"Bearer 0123456789abcdeF",
            b"Bearer 0123456789abcdef0",
            b"Bearer  0123456789abcdef",
            b"Basic 0123456789abcdef",
            b"0123456789abcdef",
        ] {
            assert!(!token.is_in(wrong), "{}", String::from_utf8_lossy(wrong));
        }
        assert_eq!(format!("{token:?}"), "Token", "a secret is not logged");
    }

    #[test]
    fn a_file_that_others_may_access_is_refused() {
        for mode in [0o644, 0o604, 0o602, 0o601, 0o666] {
            let file = Written::new("open", "0123456789abcdef\n", mode);
            let error = Token::read(&file.0).unwrap_err();
            assert!(matches!(error, TokenError::Open(found) if found == mode), "{mode:o}: {error}");
        }
        assert!(Token::read(&Written::new("own", "0123456789abcdef", 0o600).0).is_ok());
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let long = "x".repeat(LONGEST + 1);
        for text in
            ["", "\n", "0123456789abcde", "0123456789 abcdef", "0123456789abcdef\n\n", "0123456789abcd\u{e9}", &long]
        {
            let file = Written::new("form", text, 0o600);
            assert!(matches!(Token::read(&file.0), Err(TokenError::Form)), "{text:?}");
        }
        assert!(matches!(Token::read(Path::new("/no/such/file")), Err(TokenError::File(FileFault::Unreadable(_)))));
        assert!(matches!(Token::read(Path::new("/")), Err(TokenError::File(FileFault::Irregular(_)))));
    }
}

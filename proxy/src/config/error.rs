//! What can be wrong with a configuration, and how it is said: `FILE:LINE:COLUMN: key `pool.retries`: ...`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use thiserror::Error;

use super::network::NetworkError;
use super::units::UnitError;
use crate::admin::TokenError;
use crate::backend::tls::TrustError;
use crate::dns::name::NameError;
use crate::file::FileFault;
use crate::proxy_protocol::template::{TemplateError, TlvTypeError};
use crate::scope::ScopeError;
use crate::tls::pem::PemError;

/// How many errors are told one by one. Nobody reads on, and a text can have a hundred thousand.
pub const MOST: usize = 100;

/// How much is said of one error, characters: it may quote a value, which can be as long as the text.
const LONGEST: usize = 1000;

/// Everything that is wrong with a configuration, in the order of the file; at least one error. Beyond [`MOST`] the last one
/// tells how many more there are.
///
/// Its text has one line per error. The caller puts `error: ` before each: see [`ConfigErrors::iter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    errors: Vec<ConfigError>,
}

impl ConfigErrors {
    /// Sorts by position. Two problems of one key stay in the order in which they were found.
    pub(super) fn new(mut errors: Vec<ConfigError>, more: usize) -> Self {
        errors.sort_by_key(|error| error.position);
        if let Some(first) = errors.first().filter(|_| more > 0) {
            let (file, problem) = (first.file.clone(), Problem::More(more));
            errors.push(ConfigError { file, position: None, key: None, problem });
        }
        Self { errors }
    }

    /// The errors in the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.errors.iter()
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            write!(f, "{newline}{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file as the caller named it.
    pub file: String,
    /// Where in the file; none if it could not be read, or if it stands for many.
    pub position: Option<Position>,
    /// The full path of the key, such as `pool[1].backend[0].address`; an index is given only where a list has more
    /// than one element. None where the error belongs to no key.
    pub key: Option<String>,
    /// What is wrong.
    pub problem: Problem,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file)?;
        if let Some(Position { line, column }) = self.position {
            write!(f, "{line}:{column}:")?;
        }
        if let Some(key) = &self.key {
            write!(f, " key `{}`:", Cut(key))?;
        }
        write!(f, " {}", Cut(&self.problem.to_string()))
    }
}

/// The beginning of a long text.
struct Cut<'a>(&'a str);

impl fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(LONGEST) {
            Some((end, _)) => write!(f, "{}...", self.0.get(..end).unwrap_or_default()),
            None => f.write_str(self.0),
        }
    }
}

/// A place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
}

/// The kinds of errors.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Problem {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileFault),
    /// TOML is UTF-8.
    #[error("is not UTF-8 from here on")]
    NotUtf8,
    /// Not TOML; the words are those of the TOML parser, which are its own: it quotes nothing here.
    #[error("{0}")]
    Syntax(String),
    /// A key twice in one table.
    #[error("is given twice")]
    GivenTwice,
    /// Another file than was meant, such as one with a key: nothing of it is quoted.
    #[error("is no configuration of this program, which has the tables {0}")]
    Foreign(String),
    /// Those that are not told.
    #[error("{0} more errors; they are not listed")]
    More(usize),
    /// A key that the format does not have.
    #[error("unknown key{}", hint(suggestion.as_deref()))]
    UnknownKey {
        /// What might have been meant.
        suggestion: Option<String>,
    },
    /// A string where a number must be, and the like.
    #[error("expected {expected}, found {found}")]
    WrongType {
        /// What must be there.
        expected: &'static str,
        /// The TOML type that is there.
        found: &'static str,
    },
    /// A key or table without a default is not there.
    #[error("is missing")]
    Missing,
    /// A duration or size.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// A number, duration or size outside its range.
    #[error("must be from {min} to {max}")]
    OutOfRange {
        /// The least.
        min: String,
        /// The most.
        max: String,
    },
    /// None of the words that the key knows.
    #[error("expected {choices}, found {value:?}")]
    NotAChoice {
        /// What was given.
        value: String,
        /// What works.
        choices: String,
    },
    /// Not an IP address with a port.
    #[error("{0:?} is not an address with a port, such as \"127.0.0.1:53\" or \"[::1]:53\"")]
    NotASocketAddress(String),
    /// Not an IP address.
    #[error("{0:?} is not an IP address, such as \"192.0.2.1\" or \"2001:db8::1\"")]
    NotAnIpAddress(String),
    /// An address with a zone that is not here, or is none, or without one.
    #[error(transparent)]
    Scope(ScopeError),
    /// Not a network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// An address that nothing can be sent to, or from.
    #[error("{0} is not the address of one host")]
    NotUnicast(IpAddr),
    /// Port 853 of a listener without TLS.
    #[error("port 853 is for DNS over TLS, never in the clear (RFC 7858 section 3.1): [listener.tls] is missing")]
    ListensInClearOnDotPort,
    /// Port 53 of a listener with TLS.
    #[error("port 53 is for DNS in the clear, never over TLS (RFC 7858 section 3.1): [listener.tls] has another port")]
    ListensForTlsOnPort53,
    /// Port 0 where the kernel cannot choose.
    #[error("port 0 cannot be connected to")]
    PortZero,
    /// Port 853 of a backend without TLS.
    #[error("port 853 is for DNS over TLS, never in the clear (RFC 7858 section 3.1): [pool.backend.tls] is missing")]
    AsksInClearOnDotPort,
    /// Port 53 of a backend with TLS.
    #[error(
        "port 53 is for DNS in the clear, never over TLS (RFC 7858 section 3.1): [pool.backend.tls] has another port"
    )]
    AsksOverTlsOnPort53,
    /// A source address of the other family.
    #[error("{source_ip} and the backend's address {address} are of different families")]
    FamilyMismatch {
        /// The source.
        source_ip: IpAddr,
        /// The backend.
        address: SocketAddr,
    },
    /// A backend that is one of the listeners: its queries would come back for ever.
    #[error("{0} is where listener {1:?} listens: every query would come back")]
    Loop(SocketAddr, String),
    /// A name that cannot be a label.
    #[error("{0:?} is no name: 1 to 64 letters, digits, '.', '_', '-' are")]
    BadName(String),
    /// A name that metrics use for something else.
    #[error("the name {0:?} is taken: metrics use it")]
    ReservedName(&'static str),
    /// Two of the same, where there must be one.
    #[error("{value} is already at line {line}")]
    Duplicate {
        /// Which.
        value: String,
        /// Where the first is.
        line: usize,
    },
    /// A listener's pool.
    #[error("there is no pool {name:?}; the pools are {pools}")]
    UnknownPool {
        /// What was given.
        name: String,
        /// What there is.
        pools: String,
    },
    /// A list that must not be.
    #[error("must not be empty{0}")]
    Empty(&'static str),
    /// A long log filter.
    #[error("is longer than any log filter must be: {0} bytes")]
    LongLogFilter(usize),
    /// A log filter.
    #[error("{value:?} is no log filter: {reason}")]
    LogFilter {
        /// What was given.
        value: String,
        /// The words of the parser of filters.
        reason: String,
    },
    /// The path of a Unix socket.
    #[error("the path has {length} bytes; the kernel takes at most {max}")]
    SocketPath {
        /// Bytes given.
        length: usize,
        /// Bytes that fit `sun_path`.
        max: usize,
    },
    /// A file of issuers.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// `ca` is not given, and the system has no store.
    #[error("is missing, and the system has no trust store: there is none of {0}")]
    NoTrustStore(String),
    /// The name of a TLS server.
    #[error("{0:?} is neither a host name nor an IP address")]
    NotAServerName(String),
    /// The name that checks ask for.
    #[error("is no domain name: {0}")]
    DomainName(NameError),
    /// The type of a TLV.
    #[error(transparent)]
    TlvType(#[from] TlvTypeError),
    /// The value of a TLV.
    #[error("{0}")]
    Template(TemplateError),
    /// The file of the token.
    #[error("{}: {fault}", file.display())]
    Token {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        fault: TokenError,
    },
    /// A file of certificates or keys.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// `max_header` refuses each and every header.
    #[error("the shortest header of this pool has {shortest} bytes, more than {max}: every query would fail")]
    HeaderTooLong {
        /// Bytes of the shortest header there can be.
        shortest: usize,
        /// The limit as written.
        max: String,
    },
    /// A key that cannot be changed while the process runs.
    #[error("a change from {from} to {to} takes a restart; nothing is changed")]
    TakesRestart {
        /// What is in force.
        from: String,
        /// What the file says.
        to: String,
    },
    /// A listener that the running process does not have.
    #[error("listener `{0}` is new: it takes a restart; nothing is changed")]
    ListenerIsNew(String),
    /// A listener that the file does not have any more.
    #[error("listener `{0}` is gone: that takes a restart; nothing is changed")]
    ListenerIsGone(String),
}

/// The end of a sentence that guesses what was meant.
fn hint(suggestion: Option<&str>) -> String {
    suggestion.map(|suggestion| format!("; did you mean {suggestion}?")).unwrap_or_default()
}

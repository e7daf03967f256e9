//! TLVs whose values are written per query, from templates that are parsed once.
//!
//! A template is text with fields in braces (`dns-{listener}/{qname_label:1}`), `{{` and `}}` standing for the braces
//! themselves, or `hex:` and an even number of hexadecimal digits for bytes.

use std::fmt;
use std::io::Write as _;
use std::net::SocketAddr;
use std::str::FromStr;

use thiserror::Error;

use super::seal::ID_LEN;
use super::{FIXED_LEN, IPV4_ADDRESSES, IPV6_ADDRESSES, TLV_OVERHEAD, tlv, tlv_type};
use crate::dns::message::Question;
use crate::dns::rtype;

/// What a value depends on, from what changes least to what changes most. A set is of its worst member's class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The configuration and the listener only: the same for every query.
    #[default]
    Static,
    /// The client's address or port, or what its own header says.
    PerClient,
    /// The question. The next query may have the same value or not; only experience can tell.
    PerQuery,
    /// Different for every query by construction: a connection opened with it can never be used again.
    Unique,
}

/// What the fields of a template are taken from.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The name of the listener in the configuration.
    pub listener: &'a str,
    /// The first question of the query. Without one `{qname}`, `{qname_label:N}` and `{qtype}` are empty.
    pub question: Option<Question<'a>>,
    /// The TLVs of the client's own header, as a header holds them.
    pub incoming: &'a [u8],
    /// The name that the client asked for by SNI; empty without TLS, and if it did not say.
    pub sni: &'a str,
    /// 128 random bits for `{uuid}`, new for each query. Read only by templates of [`Class::Unique`].
    pub random: u128,
}

/// A value of a TLV, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Bytes(Vec<u8>),
    ClientIp,
    ClientPort,
    Listener,
    Qname,
    QnameLabel(usize),
    Qtype,
    Edns(u16),
    Incoming(u8),
    Sni,
    Uuid,
    UniqueId,
}

/// A template that cannot be parsed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{kind} (at character {at})")]
pub struct TemplateError {
    /// Where the error is, in characters of the template, counted from 1.
    pub at: usize,
    /// What is wrong there.
    pub kind: TemplateErrorKind,
}

/// What is wrong with a template.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TemplateErrorKind {
    /// `{` without `}`.
    #[error("this field has no closing brace; a brace itself is written {{{{")]
    Unclosed,
    /// `}` without `{`.
    #[error("this brace closes nothing; a brace itself is written }}}}")]
    LoneBrace,
    /// A field that nobody knows.
    #[error(
        "there is no field {{{0}}}; the fields are client_ip, client_port, listener, qname, qname_label:N, qtype, \
         edns:N, incoming:TYPE, sni, uuid and unique_id"
    )]
    Unknown(String),
    /// `{edns:N}` without the code of an option, 0 to 65535.
    #[error("{{edns:N}} needs the code of an option from 0 to 65535, not {0:?}")]
    Edns(String),
    /// `{unique_id}` beside something else.
    #[error("{{unique_id}} must be the whole value: it is filled in when a connection is opened")]
    NotAlone,
    /// `{qname_label:N}` without a number from 1 to 127, as many labels as a name can have.
    #[error("{{qname_label:N}} needs a number from 1 (the leftmost label) to 127, not {0:?}")]
    Label(String),
    /// `{incoming:TYPE}` without a type from 0 to 255.
    #[error("{{incoming:TYPE}} needs a type of TLVs from 0x00 to 0xFF, not {0:?}")]
    Incoming(String),
    /// An argument for a field that takes none.
    #[error("the field {{{0}}} takes no argument")]
    Argument(String),
    /// Something other than a hexadecimal digit after `hex:`.
    #[error("not a hexadecimal digit")]
    HexDigit,
    /// Half a byte at the end.
    #[error("an odd number of hexadecimal digits")]
    HexOdd,
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        match text.strip_prefix("hex:") {
            Some(digits) => parse_hex(digits, "hex:".len()),
            None => parse_text(text),
        }
    }
}

fn parse_hex(digits: &str, skipped: usize) -> Result<Template, TemplateError> {
    let fail = |index: usize, kind| TemplateError { at: skipped + index + 1, kind };
    let mut nibbles = Vec::with_capacity(digits.len());
    for (index, character) in digits.chars().enumerate() {
        let digit = character.to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        nibbles.push(digit.ok_or_else(|| fail(index, TemplateErrorKind::HexDigit))?);
    }
    let (pairs, odd) = nibbles.as_chunks::<2>();
    if !odd.is_empty() {
        return Err(fail(nibbles.len() - 1, TemplateErrorKind::HexOdd));
    }
    let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
    Ok(Template { parts: if bytes.is_empty() { Vec::new() } else { vec![Part::Bytes(bytes)] } })
}

fn parse_text(text: &str) -> Result<Template, TemplateError> {
    let mut parts = Vec::new();
    let mut literal = Vec::new();
    let mut rest = text;
    // Characters before `rest`, for the position in errors.
    let mut at = 0;
    while let Some(brace) = rest.find(['{', '}']) {
        let (before, from) = rest.split_at(brace);
        literal.extend_from_slice(before.as_bytes());
        at += before.chars().count();
        let fail = |kind| TemplateError { at: at + 1, kind };
        let (taken, after) = if let Some(after) = from.strip_prefix("{{") {
            literal.push(b'{');
            (2, after)
        } else if let Some(after) = from.strip_prefix("}}") {
            literal.push(b'}');
            (2, after)
        } else if let Some(field) = from.strip_prefix('{') {
            let (field, after) = field.split_once('}').ok_or_else(|| fail(TemplateErrorKind::Unclosed))?;
            if field.contains('{') {
                return Err(fail(TemplateErrorKind::Unclosed));
            }
            let part = parse_field(field).map_err(fail)?;
            if !literal.is_empty() {
                parts.push(Part::Bytes(std::mem::take(&mut literal)));
            }
            parts.push(part);
            (field.chars().count() + 2, after)
        } else {
            return Err(fail(TemplateErrorKind::LoneBrace));
        };
        at += taken;
        rest = after;
    }
    literal.extend_from_slice(rest.as_bytes());
    if !literal.is_empty() {
        parts.push(Part::Bytes(literal));
    }
    if parts.len() > 1 && parts.contains(&Part::UniqueId) {
        let before = text.find("{unique_id").unwrap_or_default();
        let at = text.get(..before).unwrap_or_default().chars().count() + 1;
        return Err(TemplateError { at, kind: TemplateErrorKind::NotAlone });
    }
    Ok(Template { parts })
}

fn parse_field(field: &str) -> Result<Part, TemplateErrorKind> {
    let (name, argument) = match field.split_once(':') {
        Some((name, argument)) => (name, Some(argument)),
        None => (field, None),
    };
    let part = match name {
        "client_ip" => Part::ClientIp,
        "client_port" => Part::ClientPort,
        "listener" => Part::Listener,
        "qname" => Part::Qname,
        "qtype" => Part::Qtype,
        "sni" => Part::Sni,
        "uuid" => Part::Uuid,
        "unique_id" => Part::UniqueId,
        "edns" => {
            let argument = argument.unwrap_or_default();
            let plain = argument.bytes().all(|octet| octet.is_ascii_digit());
            let code = argument.parse().ok().filter(|_| plain);
            return code.map(Part::Edns).ok_or_else(|| TemplateErrorKind::Edns(argument.to_owned()));
        }
        "qname_label" => {
            let argument = argument.unwrap_or_default();
            let plain = argument.bytes().all(|octet| octet.is_ascii_digit());
            let number = argument.parse().ok().filter(|number| plain && (1..=127).contains(number));
            return number.map(Part::QnameLabel).ok_or_else(|| TemplateErrorKind::Label(argument.to_owned()));
        }
        "incoming" => {
            let argument = argument.unwrap_or_default();
            return tlv_kind(argument)
                .map(Part::Incoming)
                .ok_or_else(|| TemplateErrorKind::Incoming(argument.to_owned()));
        }
        _ => return Err(TemplateErrorKind::Unknown(field.to_owned())),
    };
    if argument.is_some() { Err(TemplateErrorKind::Argument(name.to_owned())) } else { Ok(part) }
}

/// A type of TLVs, `0xE1` or `225`.
fn tlv_kind(text: &str) -> Option<u8> {
    let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
    // A sign would be read too.
    u8::from_str_radix(digits, radix).ok().filter(|_| digits.bytes().all(|octet| octet.is_ascii_hexdigit()))
}

impl Template {
    /// What the value depends on.
    pub fn class(&self) -> Class {
        self.parts.iter().map(Part::class).max().unwrap_or(Class::Static)
    }

    /// Whether the value names one client connection (`{client_port}`).
    pub fn is_per_connection(&self) -> bool {
        self.parts.contains(&Part::ClientPort)
    }

    /// Whether the value is the identifier of the connection, which is not known when the template is rendered.
    fn is_unique_id(&self) -> bool {
        self.parts == [Part::UniqueId]
    }

    /// Appends the value. `{unique_id}` takes its place only. Allocates only if `out` has no room.
    pub fn render(&self, context: &Context<'_>, out: &mut Vec<u8>) {
        for part in &self.parts {
            part.render(context, out);
        }
    }
}

impl Part {
    fn class(&self) -> Class {
        match self {
            // The same for all who share a connection: it is not part of what decides that.
            Self::Bytes(_) | Self::Listener | Self::UniqueId => Class::Static,
            Self::ClientIp | Self::ClientPort | Self::Incoming(_) | Self::Sni => Class::PerClient,
            Self::Qname | Self::QnameLabel(_) | Self::Qtype | Self::Edns(_) => Class::PerQuery,
            Self::Uuid => Class::Unique,
        }
    }

    fn render(&self, context: &Context<'_>, out: &mut Vec<u8>) {
        match self {
            Self::Bytes(bytes) => out.extend_from_slice(bytes),
            // Writing to a Vec cannot fail.
            Self::ClientIp => drop(write!(out, "{}", context.client.ip().to_canonical())),
            Self::ClientPort => drop(write!(out, "{}", context.client.port())),
            Self::Listener => out.extend_from_slice(context.listener.as_bytes()),
            Self::Qname => {
                if let Some(question) = &context.question {
                    question.write_name(out);
                }
            }
            Self::QnameLabel(n) => {
                let label = context.question.as_ref().and_then(|question| question.label(*n));
                out.extend_from_slice(label.unwrap_or_default());
            }
            Self::Qtype => {
                if let Some(question) = &context.question {
                    rtype::write(question.qtype, out);
                }
            }
            Self::Incoming(kind) => {
                // Of several of one type the first: no header has many.
                let found = tlv::iter(context.incoming).find(|(of, _)| of == kind);
                out.extend_from_slice(found.map_or(&[], |(_, value)| value));
            }
            Self::Sni => out.extend_from_slice(context.sni.as_bytes()),
            Self::Edns(code) => {
                let value = context.question.as_ref().and_then(|question| question.edns_option(*code));
                out.extend_from_slice(value.unwrap_or_default());
            }
            Self::UniqueId => out.extend_from_slice(&[b'0'; ID_LEN]),
            Self::Uuid => {
                let uuid = uuid::Builder::from_random_bytes(context.random.to_be_bytes()).into_uuid();
                let mut text = uuid::Uuid::encode_buffer();
                out.extend_from_slice(uuid.hyphenated().encode_lower(&mut text).as_bytes());
            }
        }
    }
}

/// A type that a configured TLV may not have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TlvTypeError {
    /// The program writes it itself, or the specification gives it a meaning that a text cannot have.
    #[error("TLV type {0:#04x} ({1}) cannot be set here; types for private use are 0xE0 to 0xEF")]
    Reserved(u8, &'static str),
    /// Kept for later versions of the protocol.
    #[error("TLV type {0:#04x} is reserved for later versions of the protocol; types for private use are 0xE0 to 0xEF")]
    Future(u8),
}

/// Checks that a configured TLV may have this type.
///
/// # Errors
///
/// For CRC32C, NOOP, UNIQUE_ID, SSL, and 0xF8 and above (section 2.2).
pub fn check_type(kind: u8) -> Result<(), TlvTypeError> {
    match kind {
        tlv_type::CRC32C => Err(TlvTypeError::Reserved(kind, "CRC32C")),
        tlv_type::NOOP => Err(TlvTypeError::Reserved(kind, "NOOP")),
        tlv_type::UNIQUE_ID => Err(TlvTypeError::Reserved(kind, "UNIQUE_ID")),
        tlv_type::SSL => Err(TlvTypeError::Reserved(kind, "SSL")),
        tlv_type::FUTURE_MIN.. => Err(TlvTypeError::Future(kind)),
        _ => Ok(()),
    }
}

/// The TLVs of a pool, in the order of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlvSet {
    tlvs: Vec<(u8, Template)>,
    class: Class,
    per_connection: bool,
}

impl TlvSet {
    /// Adds a TLV behind the others. Types may repeat.
    ///
    /// # Errors
    ///
    /// If `kind` is not free to use: see [`check_type`].
    pub fn push(&mut self, kind: u8, template: Template) -> Result<(), TlvTypeError> {
        check_type(kind)?;
        self.class = self.class.max(template.class());
        self.per_connection |= template.is_per_connection();
        self.tlvs.push((kind, template));
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tlvs.is_empty()
    }

    /// Types and templates in order.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &Template)> {
        self.tlvs.iter().map(|(kind, template)| (*kind, template))
    }

    /// The class of the member that changes most; [`Class::Static`] for an empty set.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Whether a member is `{unique_id}`.
    pub fn has_ids(&self) -> bool {
        self.tlvs.iter().any(|(_, template)| template.is_unique_id())
    }

    /// Fills in `{unique_id}` in the header that `out` holds from `start` on, whose last TLVs are those of this set.
    pub(super) fn fill_in_ids(&self, out: &mut [u8], start: usize, id: &[u8; ID_LEN]) {
        if !self.has_ids() {
            return;
        }
        let family = out.get(start + FIXED_LEN - 3).map(|octet| octet >> 4);
        let first = start + FIXED_LEN + if family == Some(1) { IPV4_ADDRESSES } else { IPV6_ADDRESSES };
        let others = tlv::iter(out.get(first..).unwrap_or_default()).count().saturating_sub(self.tlvs.len());
        let mut at = first;
        for place in 0.. {
            let Some([_, high, low]) = out.get(at..).and_then(<[u8]>::first_chunk::<TLV_OVERHEAD>) else { return };
            let value = at + TLV_OVERHEAD..at + TLV_OVERHEAD + usize::from(u16::from_be_bytes([*high, *low]));
            at = value.end;
            let own: Option<&(u8, Template)> = usize::checked_sub(place, others).and_then(|own| self.tlvs.get(own));
            if own.is_some_and(|(_, template)| template.is_unique_id())
                && let Some(value) = out.get_mut(value).filter(|value| value.len() == ID_LEN)
            {
                value.copy_from_slice(id);
            }
        }
    }

    /// Whether a member names one client connection.
    pub fn is_per_connection(&self) -> bool {
        self.per_connection
    }

    /// Appends type, length and value of each TLV. Allocates only if `out` has no room.
    ///
    /// A value above 65,535 octets cannot be expressed. It makes the header longer than any header can be, so
    /// [`HeaderWriter::finish`](super::encode::HeaderWriter::finish) refuses it, and no length is cut off here.
    pub fn render(&self, context: &Context<'_>, out: &mut Vec<u8>) {
        for (kind, template) in &self.tlvs {
            out.extend_from_slice(&[*kind, 0, 0]);
            let start = out.len();
            template.render(context, out);
            let length = u16::try_from(out.len() - start).unwrap_or(u16::MAX);
            if let Some(field) = out.get_mut(start - 2..start) {
                field.copy_from_slice(&length.to_be_bytes());
            }
        }
    }
}

/// The template as a configuration writes it: parsed again, it is equal.
impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [Part::Bytes(bytes)] = self.parts.as_slice() {
            let text = std::str::from_utf8(bytes).ok();
            if text.is_none_or(|text| text.starts_with("hex:") || text.contains(char::is_control)) {
                f.write_str("hex:")?;
                return bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"));
            }
        }
        self.parts.iter().try_for_each(|part| write!(f, "{part}"))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Beside fields these come from text, so nothing is lost.
            Self::Bytes(bytes) => f.write_str(&String::from_utf8_lossy(bytes).replace('{', "{{").replace('}', "}}")),
            Self::ClientIp => f.write_str("{client_ip}"),
            Self::ClientPort => f.write_str("{client_port}"),
            Self::Listener => f.write_str("{listener}"),
            Self::Qname => f.write_str("{qname}"),
            Self::QnameLabel(n) => write!(f, "{{qname_label:{n}}}"),
            Self::Qtype => f.write_str("{qtype}"),
            Self::Incoming(kind) => write!(f, "{{incoming:{kind:#04X}}}"),
            Self::Edns(code) => write!(f, "{{edns:{code}}}"),
            Self::Sni => f.write_str("{sni}"),
            Self::Uuid => f.write_str("{uuid}"),
            Self::UniqueId => f.write_str("{unique_id}"),
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Static => "the same for every query",
            Self::PerClient => "differs per client",
            Self::PerQuery => "may differ per query",
            Self::Unique => "differs per query",
        })
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;

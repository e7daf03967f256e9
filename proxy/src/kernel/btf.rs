//! Where the fields of kernel structures are on the running kernel, from its own type information (BTF).
//!
//! The eBPF program reads kernel structures whose layout differs between kernels. Rust has no CO-RE relocations, so the
//! offsets are looked up here once, at load time, and handed to the program as constants.
//! Format: `Documentation/bpf/btf.rst` of the kernel.

use std::collections::HashMap;

use thiserror::Error;

/// Where the kernel describes its types.
pub(super) const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const TYPE_LEN: usize = 12;
const POINTER_LEN: u32 = 8;
/// Deeper nesting of anonymous members or of typedefs than any kernel has: the data is damaged.
const MAX_DEPTH: u32 = 16;

/// Why a field cannot be found.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BtfError {
    /// Not BTF, or cut short.
    #[error("damaged at byte {0}")]
    Damaged(usize),
    /// A kind of type that this reader does not know the length of.
    #[error("unknown kind {kind} of type {id}")]
    UnknownKind {
        /// BTF kind.
        kind: u32,
        /// Type number.
        id: u32,
    },
    /// No such structure on this kernel.
    #[error("there is no `struct {0}` on this kernel")]
    NoStruct(String),
    /// No such member.
    #[error("`struct {structure}` has no member `{member}` on this kernel")]
    NoMember {
        /// Structure.
        structure: String,
        /// Path of the member.
        member: String,
    },
    /// The member is not what the eBPF program reads there.
    #[error("member `{member}` of `struct {structure}` has {found} on this kernel, not {expected} bytes")]
    Size {
        /// Structure.
        structure: String,
        /// Path of the member.
        member: String,
        /// Size or "a bit field".
        found: String,
        /// Bytes that the eBPF program reads.
        expected: u32,
    },
}

mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const FWD: u32 = 7;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const FLOAT: u32 = 16;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// The kernel's types, indexed.
pub(super) struct KernelTypes<'a> {
    data: &'a [u8],
    strings: &'a [u8],
    /// Offset into `data` of each type; number 0 is `void`.
    types: Vec<usize>,
    /// Structures by name: the first of that name.
    structures: HashMap<&'a [u8], u32>,
}

/// One type's head: twelve bytes.
#[derive(Clone, Copy)]
struct Head {
    name: u32,
    kind: u32,
    members: u32,
    /// Whether members carry bit-field sizes (structures and unions).
    bit_fields: bool,
    /// Size in bytes, or the type referred to.
    size_or_type: u32,
    /// Where what follows the head begins.
    body: usize,
}

/// A member found: bytes from the start of the structure searched, its type, and whether it is a bit field.
struct Found {
    bits: u32,
    bit_field: bool,
    type_id: u32,
}

impl<'a> KernelTypes<'a> {
    /// Indexes raw BTF data.
    ///
    /// # Errors
    /// The data is not BTF of this machine's byte order, or is cut short.
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, BtfError> {
        if u16_at(data, 0)? != MAGIC {
            return Err(BtfError::Damaged(0));
        }
        let header = u32_at(data, 4)? as usize;
        let part = |at: usize| -> Result<(usize, usize), BtfError> {
            let start = header.saturating_add(u32_at(data, at)? as usize);
            let end = start.saturating_add(u32_at(data, at + 4)? as usize);
            if end > data.len() { Err(BtfError::Damaged(at)) } else { Ok((start, end)) }
        };
        let (types_start, types_end) = part(8)?;
        let (strings_start, strings_end) = part(16)?;
        let data_types = data.get(..types_end).ok_or(BtfError::Damaged(8))?;
        let strings = data.get(strings_start..strings_end).ok_or(BtfError::Damaged(16))?;
        let mut this = Self { data: data_types, strings, types: vec![usize::MAX], structures: HashMap::new() };
        let mut at = types_start;
        while at < types_end {
            let id = u32::try_from(this.types.len()).map_err(|_| BtfError::Damaged(at))?;
            this.types.push(at);
            let head = this.head(id)?;
            if head.kind == kind::STRUCT {
                this.structures.entry(this.name(head.name)?).or_insert(id);
            }
            at = head.body + body_len(head, id)?;
        }
        Ok(this)
    }

    /// Bytes from the start of `structure` to `member`, which must be `size` bytes long.
    ///
    /// `member` is a dotted path; anonymous structures and unions on the way are looked through.
    ///
    /// # Errors
    /// There is no such structure or member, or it has another size.
    pub(super) fn offset(&self, structure: &str, member: &str, size: u32) -> Result<u32, BtfError> {
        let no_member = || BtfError::NoMember { structure: structure.to_owned(), member: member.to_owned() };
        let mut id =
            *self.structures.get(structure.as_bytes()).ok_or_else(|| BtfError::NoStruct(structure.to_owned()))?;
        let mut bits = 0u32;
        let mut bit_field = false;
        for name in member.split('.') {
            let found = self.member(self.resolve(id)?, name.as_bytes(), 0)?.ok_or_else(no_member)?;
            bits = bits.checked_add(found.bits).ok_or_else(no_member)?;
            bit_field = found.bit_field || !bits.is_multiple_of(8);
            id = found.type_id;
        }
        let found = if bit_field { "a bit field".to_owned() } else { format!("{} bytes", self.size(id, 0)?) };
        if bit_field || self.size(id, 0)? != size {
            let (structure, member) = (structure.to_owned(), member.to_owned());
            return Err(BtfError::Size { structure, member, found, expected: size });
        }
        Ok(bits / 8)
    }

    /// Searches a structure or union, anonymous members included.
    fn member(&self, id: u32, wanted: &[u8], depth: u32) -> Result<Option<Found>, BtfError> {
        let head = self.head(id)?;
        if depth > MAX_DEPTH || !matches!(head.kind, kind::STRUCT | kind::UNION) {
            return Ok(None);
        }
        for index in 0..head.members as usize {
            let at = head.body + index * TYPE_LEN;
            let name = self.name(u32_at(self.data, at)?)?;
            let type_id = u32_at(self.data, at + 4)?;
            let raw = u32_at(self.data, at + 8)?;
            let (bits, bit_field) = if head.bit_fields { (raw & 0x00ff_ffff, raw >> 24 != 0) } else { (raw, false) };
            if name == wanted {
                return Ok(Some(Found { bits, bit_field, type_id }));
            }
            if name.is_empty()
                && let Some(inner) = self.member(self.resolve(type_id)?, wanted, depth + 1)?
            {
                let bits = bits.checked_add(inner.bits).ok_or(BtfError::Damaged(at))?;
                return Ok(Some(Found { bits, ..inner }));
            }
        }
        Ok(None)
    }

    /// Looks through typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Result<u32, BtfError> {
        for _ in 0..MAX_DEPTH {
            let head = self.head(id)?;
            match head.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = head.size_or_type;
                }
                _ => return Ok(id),
            }
        }
        Err(BtfError::Damaged(id as usize))
    }

    /// Size of a type in bytes.
    fn size(&self, id: u32, depth: u32) -> Result<u32, BtfError> {
        let head = self.head(self.resolve(id)?)?;
        match head.kind {
            kind::PTR => Ok(POINTER_LEN),
            kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::FLOAT | kind::ENUM64 => Ok(head.size_or_type),
            kind::ARRAY if depth < MAX_DEPTH => {
                let element = self.size(u32_at(self.data, head.body)?, depth + 1)?;
                element.checked_mul(u32_at(self.data, head.body + 8)?).ok_or(BtfError::Damaged(head.body))
            }
            _ => Ok(0),
        }
    }

    fn head(&self, id: u32) -> Result<Head, BtfError> {
        let at = *self.types.get(id as usize).ok_or(BtfError::Damaged(self.data.len()))?;
        if at == usize::MAX {
            return Ok(Head { name: 0, kind: 0, members: 0, bit_fields: false, size_or_type: 0, body: 0 });
        }
        let info = u32_at(self.data, at + 4)?;
        Ok(Head {
            name: u32_at(self.data, at)?,
            kind: (info >> 24) & 0x1f,
            members: info & 0xffff,
            bit_fields: info >> 31 != 0,
            size_or_type: u32_at(self.data, at + 8)?,
            body: at + TYPE_LEN,
        })
    }

    fn name(&self, offset: u32) -> Result<&'a [u8], BtfError> {
        let tail = self.strings.get(offset as usize..).ok_or(BtfError::Damaged(offset as usize))?;
        Ok(tail.split(|byte| *byte == 0).next().unwrap_or_default())
    }
}

/// Bytes that follow a type's head.
fn body_len(head: Head, id: u32) -> Result<usize, BtfError> {
    let members = head.members as usize;
    match head.kind {
        kind::INT | kind::VAR | kind::DECL_TAG => Ok(4),
        kind::PTR
        | kind::FWD
        | kind::TYPEDEF
        | kind::VOLATILE
        | kind::CONST
        | kind::RESTRICT
        | kind::FUNC
        | kind::FLOAT
        | kind::TYPE_TAG => Ok(0),
        kind::ARRAY => Ok(12),
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => Ok(members * 12),
        kind::ENUM | kind::FUNC_PROTO => Ok(members * 8),
        kind => Err(BtfError::UnknownKind { kind, id }),
    }
}

fn u16_at(data: &[u8], at: usize) -> Result<u16, BtfError> {
    let bytes = data.get(at..).and_then(|tail| tail.first_chunk()).ok_or(BtfError::Damaged(at))?;
    Ok(u16::from_ne_bytes(*bytes))
}

fn u32_at(data: &[u8], at: usize) -> Result<u32, BtfError> {
    let bytes = data.get(at..).and_then(|tail| tail.first_chunk()).ok_or(BtfError::Damaged(at))?;
    Ok(u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests;

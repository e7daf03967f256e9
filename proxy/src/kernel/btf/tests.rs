#![expect(clippy::unwrap_used, reason = "tests panic")]

use super::*;

/// Writes BTF: types are numbered from 1 in the order of the calls.
#[derive(Default)]
struct Writer {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

struct Member {
    name: &'static str,
    type_id: u32,
    bits: u32,
    bit_field: u32,
}

fn member(name: &'static str, type_id: u32, byte: u32) -> Member {
    Member { name, type_id, bits: byte * 8, bit_field: 0 }
}

impl Writer {
    fn new() -> Self {
        Self { strings: vec![0], ..Self::default() }
    }

    fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(name.as_bytes());
        self.strings.push(0);
        at
    }

    fn head(&mut self, name: &str, kind: u32, members: usize, bit_fields: bool, size_or_type: u32) -> u32 {
        let name = self.name(name);
        self.words(&[name, u32::from(bit_fields) << 31 | kind << 24 | members as u32, size_or_type]);
        self.count += 1;
        self.count
    }

    fn words(&mut self, words: &[u32]) {
        self.types.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    }

    fn int(&mut self, bytes: u32) -> u32 {
        let id = self.head("int", kind::INT, 0, false, bytes);
        self.words(&[bytes * 8]);
        id
    }

    fn group(&mut self, name: &str, kind: u32, size: u32, members: &[Member]) -> u32 {
        let bit_fields = members.iter().any(|member| member.bit_field != 0);
        let id = self.head(name, kind, members.len(), bit_fields, size);
        for member in members {
            let name = self.name(member.name);
            self.words(&[name, member.type_id, member.bit_field << 24 | member.bits]);
        }
        id
    }

    fn finish(self) -> Vec<u8> {
        let mut data = Vec::new();
        data.extend(MAGIC.to_ne_bytes());
        data.extend([1, 0]);
        let types = self.types.len() as u32;
        for word in [24, 0, types, types, self.strings.len() as u32] {
            data.extend(word.to_ne_bytes());
        }
        data.extend(self.types);
        data.extend(self.strings);
        data
    }
}

/// `struct outer { u64 first; const union { struct inner { u16 a; u16 b; } in; u32 whole; }; u8 *pointer; u16 list[3]; u32 bit : 3; }`
fn sample() -> Vec<u8> {
    let mut btf = Writer::new();
    let (u64_, u32_, u16_) = (btf.int(8), btf.int(4), btf.int(2));
    let inner = btf.group("inner", kind::STRUCT, 4, &[member("a", u16_, 0), member("b", u16_, 2)]);
    let union = btf.group("", kind::UNION, 4, &[member("in", inner, 0), member("whole", u32_, 0)]);
    let union = btf.head("", kind::CONST, 0, false, union);
    let union = btf.head("alias", kind::TYPEDEF, 0, false, union);
    let pointer = btf.head("", kind::PTR, 0, false, u16_);
    let list = btf.head("", kind::ARRAY, 0, false, 0);
    btf.words(&[u16_, u32_, 3]);
    let bit = Member { name: "bit", type_id: u32_, bits: 30 * 8 + 1, bit_field: 3 };
    let members =
        [member("first", u64_, 0), member("", union, 8), member("pointer", pointer, 16), member("list", list, 24), bit];
    // Some types with bodies that must be stepped over.
    let proto = btf.head("", kind::FUNC_PROTO, 2, false, u32_);
    btf.words(&[0, u32_, 0, u32_]);
    btf.head("f", kind::FUNC, 1, false, proto);
    btf.head("e", kind::ENUM, 1, false, 4);
    btf.words(&[0, 1]);
    btf.head("e64", kind::ENUM64, 1, false, 8);
    btf.words(&[0, 1, 0]);
    btf.head("v", kind::VAR, 0, false, u32_);
    btf.words(&[1]);
    btf.head("tag", kind::DECL_TAG, 0, false, u32_);
    btf.words(&[0]);
    btf.group("outer", kind::STRUCT, 32, &members);
    btf.finish()
}

#[test]
fn finds_members_through_names_typedefs_and_anonymous_unions() {
    let data = sample();
    let types = KernelTypes::parse(&data).unwrap();
    assert_eq!(types.offset("outer", "first", 8), Ok(0));
    assert_eq!(types.offset("outer", "whole", 4), Ok(8));
    assert_eq!(types.offset("outer", "in.b", 2), Ok(10));
    assert_eq!(types.offset("outer", "in", 4), Ok(8));
    assert_eq!(types.offset("outer", "pointer", 8), Ok(16));
    assert_eq!(types.offset("outer", "list", 6), Ok(24));
}

#[test]
fn says_what_is_not_there_or_different() {
    let data = sample();
    let types = KernelTypes::parse(&data).unwrap();
    let error = |structure, member, size| types.offset(structure, member, size).unwrap_err().to_string();
    assert_eq!(error("other", "a", 1), "there is no `struct other` on this kernel");
    assert_eq!(error("outer", "in.c", 1), "`struct outer` has no member `in.c` on this kernel");
    assert_eq!(error("outer", "first.x", 1), "`struct outer` has no member `first.x` on this kernel");
    assert_eq!(error("outer", "first", 4), "member `first` of `struct outer` has 8 bytes on this kernel, not 4 bytes");
    assert_eq!(error("outer", "bit", 4), "member `bit` of `struct outer` has a bit field on this kernel, not 4 bytes");
}

#[test]
fn damaged_data_is_an_error_and_never_a_panic() {
    let data = sample();
    for len in 0..data.len() {
        if let Ok(types) = KernelTypes::parse(&data[..len]) {
            let _ = types.offset("outer", "in.b", 2);
        }
    }
    for at in 0..data.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut data = data.clone();
            data[at] = value;
            if let Ok(types) = KernelTypes::parse(&data) {
                let _ = types.offset("outer", "in.b", 2);
            }
        }
    }
    assert_eq!(KernelTypes::parse(&[]).err(), Some(BtfError::Damaged(0)));
    assert_eq!(KernelTypes::parse(&[0; 24]).err(), Some(BtfError::Damaged(0)));
}

#[test]
fn reads_the_running_kernel() {
    let data = std::fs::read(VMLINUX).unwrap();
    let types = KernelTypes::parse(&data).unwrap();
    // The head of `struct sock_common` is part of what eBPF programs rely on: it does not move.
    assert_eq!(types.offset("sock", "__sk_common.skc_daddr", 4), Ok(0));
    assert_eq!(types.offset("sock", "__sk_common.skc_rcv_saddr", 4), Ok(4));
    assert_eq!(types.offset("sock", "__sk_common.skc_dport", 2), Ok(12));
    assert_eq!(types.offset("sock", "__sk_common.skc_family", 2), Ok(16));
    assert_eq!(types.offset("sock", "__sk_common.skc_state", 1), Ok(18));
}

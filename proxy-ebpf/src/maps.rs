//! Every map and constant: who writes, who reads, what happens when it is full.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use counterfoil_common::{
    COUNTERS as COUNTER_SLOTS, Counter, FieldOffsets, Owner, PassHeader, Peer, SocketRecord, SocketTag, Walk,
};

/// How many processes can be watched at once.
const MAX_TARGETS: u32 = 4096;

/// The tag of each socket. Written by the tag programs and by `descriptors` for the cookies in [`ADOPT`]; has no size of
/// its own. When the kernel has no memory for a tag, a counter says so.
#[btf_map]
pub static TAGS: SkStorage<SocketTag> = SkStorage::new();

/// The tags by cookie, in place of [`TAGS`] where the kernel lets no program walk socket storage. Written by the tag programs
/// and by `descriptors`; `forget` takes out what is destroyed. Resized when loaded; when it is full, a counter says so.
#[map]
pub static COOKIES: HashMap<u64, SocketTag> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// What a sweep found. Written by `sweep`, mapped and read by user space between sweeps. Resized when loaded; sockets
/// without room are counted in the header.
///
/// An array and not the iterator's own output, because that is handed out in pieces of 32 KiB, and the kernel finds its
/// place again by counting entries: a socket closed between two pieces makes it step over another one. With no output the
/// whole walk is one system call under one RCU read lock, which a living socket cannot escape.
#[map]
pub static RECORDS: Array<SocketRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// The header of the sweep. Zeroed by user space before, written by `sweep`.
#[map]
pub static PASS: Array<PassHeader> = Array::with_max_entries(1, 0);

/// Cookies of sockets that shall be tagged by the next `descriptors` pass. Written by user space, read by `descriptors`.
#[map]
pub static ADOPT: HashMap<u64, u8> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// Processes that are watched, by their ids in the initial pid namespace. Written by user space as they come and go; when it
/// is full, user space says so.
#[map]
pub static TARGETS: HashMap<u32, u8> = HashMap::with_max_entries(MAX_TARGETS, BPF_F_NO_PREALLOC);

/// Peers whose connections are counted. Written by user space once; resized when loaded.
#[map]
pub static PEERS: HashMap<Peer, u8> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// Whose descriptors the next pass walks. Written by user space, answered by `descriptors`.
#[map]
pub static WALK: Array<Walk> = Array::with_max_entries(1, 0);

/// [`Counter`]s; never reset.
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_SLOTS, 0);

/// Layout of this kernel's structures; set when loaded, then frozen.
#[unsafe(no_mangle)]
pub static FIELD_OFFSETS: FieldOffsets = FieldOffsets::UNSET;

/// Whose sockets these programs tag; set when loaded, then frozen.
#[unsafe(no_mangle)]
pub static OWNER: Owner = Owner::UNSET;

/// Reads one field of a constant. Volatile, because what the compiler sees here is only the value before loading; field by
/// field, so that the verifier knows each one's value.
macro_rules! constant {
    ($global:ident . $field:ident) => {
        // SAFETY: a field of a static of this program.
        unsafe { (&raw const $crate::maps::$global.$field).read_volatile() }
    };
}
pub(crate) use constant;

/// Adds one to a counter of this CPU, and returns its new value; zero if there is no such counter.
#[inline(always)]
pub fn count(counter: Counter) -> u64 {
    let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) else { return 0 };
    // SAFETY: the kernel returned this element. No other program writes it, and this one does not nest on a CPU.
    unsafe {
        *slot += 1;
        *slot
    }
}

//! Reading the TCP sockets behind the descriptors of one process: the own one, or one that is watched.

use aya_ebpf::bindings::{file, seq_file};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::{bpf_seq_write, bpf_sock_from_file};
use counterfoil_common::{Counter, SocketRecord, SocketTag, flags};

use crate::maps::{ADOPT, WALK, constant, count};
use crate::sock::Sock;

/// `struct bpf_iter__task_file`.
#[repr(C)]
struct Context {
    meta: *const Meta,
    task: *const u8,
    _fd: u32,
    file: *mut file,
}

/// The beginning of `struct bpf_iter_meta`.
#[repr(C)]
struct Meta {
    seq: *mut seq_file,
}

/// What marks the end. A static, as a constant of zeros may be taken for one that user space fills in when it loads the
/// program: to the compiler [`FIELD_OFFSETS`](crate::maps::FIELD_OFFSETS) are zeros, too.
static END: SocketRecord = SocketRecord::EMPTY;

#[inline(always)]
pub fn on_descriptor(ctx: *mut c_void) {
    let ctx = ctx.cast::<Context>();
    // SAFETY: the kernel calls iterators with this structure.
    let (seq, task, file) = unsafe { ((*(*ctx).meta).seq, (*ctx).task, (*ctx).file) };
    if task.is_null() || file.is_null() {
        // The end, which a record without a cookie marks: without it user space would take a part for the whole.
        write(seq, &END);
        return;
    }
    let beside = constant!(OWNER.beside) != 0;
    let tgid_offset = constant!(FIELD_OFFSETS.task_tgid);
    // SAFETY: `task` is a live task.
    let tgid = unsafe { task.add(tgid_offset as usize).cast::<u32>().read_volatile() };
    // Kernels from 6.1 walk only the process that is meant.
    let meant = if beside { is_meant(tgid) } else { tgid == (bpf_get_current_pid_tgid() >> 32) as u32 };
    if !meant {
        return;
    }
    // SAFETY: `file` is a live file; null if it is no socket.
    let socket = unsafe { bpf_sock_from_file(file) }.cast::<u8>().cast_const();
    if socket.is_null() {
        return;
    }
    let Some(sock) = Sock::of_socket(socket) else { return };
    if !sock.is_tcp() {
        return;
    }
    if beside && !sock.is_tagged() && !sock.is_towards_a_peer() {
        return;
    }
    let mut record = sock.record();
    if record.cookie == 0 {
        // Nobody has asked for it yet, nor can this program on such a kernel.
        return;
    }
    let adopted = ADOPT.get_ptr(record.cookie).is_some();
    let owner = if beside { tgid } else { 0 };
    if adopted {
        // Its owner may have ended.
        sock.set_owner(owner);
    }
    match sock.tag() {
        Some(tag) => {
            record.opened_ns = tag.opened_ns;
            record.owner = tag.owner;
            record.flags |= flags::TAGGED | tag.flags;
        }
        None if adopted => {
            let tag = SocketTag {
                remote: record.remote,
                remote_port: record.remote_port,
                flags: flags::ADOPTED,
                owner,
                ..SocketTag::EMPTY
            };
            if sock.put_tag(tag) {
                record.owner = owner;
                record.flags |= flags::TAGGED | flags::ADOPTED;
            } else {
                count(Counter::FailedAdopt);
            }
        }
        None => {}
    }
    write(seq, &record);
}

/// Whether the watched process with this id (in the initial pid namespace) is the one that the pass is for; user space,
/// which may be in another pid namespace, learns the id from it.
#[inline(always)]
fn is_meant(tgid: u32) -> bool {
    let Some(walk) = WALK.get_ptr_mut(0) else { return false };
    // SAFETY: an element of a map; only one pass runs at a time, and user space waits for its end.
    let walk = unsafe { &mut *walk };
    if walk.wanted != 0 && walk.wanted != tgid {
        return false;
    }
    walk.tgid = tgid;
    true
}

#[inline(always)]
fn write(seq: *mut seq_file, record: &SocketRecord) {
    // A full buffer makes the kernel call again for the same descriptor: nothing is lost, and adoption is idempotent.
    // SAFETY: `seq` is the iterator's own file.
    let _ = unsafe { bpf_seq_write(seq, core::ptr::from_ref(record).cast(), size_of::<SocketRecord>() as u32) };
}

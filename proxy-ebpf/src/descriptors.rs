//! Reading the TCP sockets behind this process's descriptors.

use aya_ebpf::bindings::{file, seq_file};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::{bpf_seq_write, bpf_sock_from_file};
use counterfoil_common::{Counter, SocketRecord, SocketTag, flags};

use crate::maps::{ADOPT, constant, count};
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

#[inline(always)]
pub fn on_descriptor(ctx: *mut c_void) {
    let ctx = ctx.cast::<Context>();
    // SAFETY: the kernel calls iterators with this structure.
    let (seq, task, file) = unsafe { ((*(*ctx).meta).seq, (*ctx).task, (*ctx).file) };
    if task.is_null() || file.is_null() {
        // The end, which a record without a cookie marks: without it user space would take a part for the whole.
        write(seq, &SocketRecord::EMPTY);
        return;
    }
    // The reader of the iterator is the process itself. Kernels from 6.1 walk only its descriptors anyway.
    let tgid_offset = constant!(FIELD_OFFSETS.task_tgid);
    // SAFETY: `task` is a live task.
    let tgid = unsafe { task.add(tgid_offset as usize).cast::<u32>().read_volatile() };
    if tgid != (bpf_get_current_pid_tgid() >> 32) as u32 {
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
    let mut record = sock.record();
    match sock.tag() {
        Some(tag) => {
            record.opened_ns = tag.opened_ns;
            record.flags |= flags::TAGGED | tag.flags;
        }
        None if ADOPT.get_ptr(record.cookie).is_some() => {
            let tag = SocketTag {
                remote: record.remote,
                remote_port: record.remote_port,
                flags: flags::ADOPTED,
                ..SocketTag::EMPTY
            };
            if sock.put_tag(tag) {
                record.flags |= flags::TAGGED | flags::ADOPTED;
            } else {
                count(Counter::FailedAdopt);
            }
        }
        None => {}
    }
    write(seq, &record);
}

#[inline(always)]
fn write(seq: *mut seq_file, record: &SocketRecord) {
    // A full buffer makes the kernel call again for the same descriptor: nothing is lost, and adoption is idempotent.
    // SAFETY: `seq` is the iterator's own file.
    let _ = unsafe { bpf_seq_write(seq, core::ptr::from_ref(record).cast(), size_of::<SocketRecord>() as u32) };
}

//! Reading all tagged sockets.
//!
//! The kernel's own walk over a map of socket storage is the way: one call, each socket once. Where the kernel refuses such
//! programs, as hardened ones do, tags are kept by cookie, and two walks together find the same sockets: over all
//! descriptors for those that somebody holds, whatever their state, and over the TCP tables of this network namespace for
//! those that nobody does.

use aya_ebpf::bindings::file;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns, bpf_sock_from_file};
use counterfoil_common::{ABI_VERSION, PassHeader, SocketTag, flags};

use crate::maps::{PASS, RECORDS, constant};
use crate::sock::Sock;

/// `struct bpf_iter__bpf_sk_storage_map`; each pointer is null where there is nothing.
#[repr(C)]
struct Stored {
    _meta: *const c_void,
    _map: *const c_void,
    sk: *const u8,
    value: *const SocketTag,
}

/// `struct bpf_iter__task_file`.
#[repr(C)]
struct Descriptor {
    _meta: *const c_void,
    _task: *const c_void,
    _fd: u32,
    file: *mut file,
}

/// The beginning of `struct bpf_iter__tcp`.
#[repr(C)]
struct Hashed {
    _meta: *const c_void,
    sk_common: *const u8,
}

#[inline(always)]
pub fn on_socket(ctx: *mut c_void) {
    let ctx = ctx.cast::<Stored>();
    // SAFETY: the kernel calls iterators with this structure.
    let (sk, value) = unsafe { ((*ctx).sk, (*ctx).value) };
    let Some(pass) = pass() else { return };
    let Some(sock) = Sock::new(sk) else {
        pass.complete += 1;
        return;
    };
    if !value.is_null() {
        // SAFETY: the kernel gives the tag's value for reading.
        keep(pass, sock, unsafe { *value });
    }
}

#[inline(always)]
pub fn on_descriptor(ctx: *mut c_void) {
    let ctx = ctx.cast::<Descriptor>();
    // SAFETY: the kernel calls iterators with this structure.
    let file = unsafe { (*ctx).file };
    let Some(pass) = pass() else { return };
    if file.is_null() {
        pass.complete += 1;
        return;
    }
    // SAFETY: `file` is a live file; null if it is no socket.
    let socket = unsafe { bpf_sock_from_file(file) }.cast::<u8>().cast_const();
    if socket.is_null() {
        return;
    }
    let Some(sock) = Sock::of_socket(socket) else { return };
    if sock.is_tcp()
        && let Some(tag) = sock.tag()
    {
        keep(pass, sock, tag);
    }
}

#[inline(always)]
pub fn on_hashed(ctx: *mut c_void) {
    let ctx = ctx.cast::<Hashed>();
    // SAFETY: the kernel calls iterators with this structure.
    let sk = unsafe { (*ctx).sk_common };
    let Some(pass) = pass() else { return };
    if sk.is_null() {
        pass.complete += 1;
        return;
    }
    // What is in TIME_WAIT, or not accepted yet, is no whole socket.
    if let Some(sock) = Sock::of_common(sk)
        && !sock.is_held()
        && let Some(tag) = sock.tag()
    {
        keep(pass, sock, tag);
    }
}

/// The header, begun if this is the first call.
#[inline(always)]
fn pass() -> Option<&'static mut PassHeader> {
    let pass = PASS.get_ptr_mut(0)?;
    // SAFETY: an element of a map, and only one sweep runs at a time: user space owns the only links.
    let pass = unsafe { &mut *pass };
    if pass.started_ns == 0 {
        // SAFETY: no preconditions.
        (pass.started_ns, pass.started_ticks) = unsafe { (bpf_ktime_get_ns(), bpf_jiffies64()) };
        pass.abi = ABI_VERSION;
    }
    Some(pass)
}

#[inline(always)]
fn keep(pass: &mut PassHeader, sock: Sock, tag: SocketTag) {
    if pass.records >= constant!(OWNER.max_records) {
        pass.overflowed += 1;
        return;
    }
    let Some(slot) = RECORDS.get_ptr_mut(pass.records) else {
        pass.overflowed += 1;
        return;
    };
    let mut record = sock.record();
    record.opened_ns = tag.opened_ns;
    record.owner = tag.owner;
    record.flags |= flags::TAGGED | tag.flags;
    if tag.remote_port != 0 {
        // What `connect()` was given: a refused or reset socket may have lost it.
        record.remote = tag.remote;
        record.remote_port = tag.remote_port;
    }
    // SAFETY: an element of the map, as in `pass`.
    unsafe { *slot = record }
    pass.records += 1;
}

//! Reading all tagged sockets.

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};
use counterfoil_common::{ABI_VERSION, SocketTag, flags};

use crate::maps::{PASS, RECORDS, constant};
use crate::sock::Sock;

/// `struct bpf_iter__bpf_sk_storage_map`; each pointer is null where there is nothing.
#[repr(C)]
struct Context {
    _meta: *const c_void,
    _map: *const c_void,
    sk: *const u8,
    value: *const SocketTag,
}

#[inline(always)]
pub fn on_socket(ctx: *mut c_void) {
    let ctx = ctx.cast::<Context>();
    let Some(pass) = PASS.get_ptr_mut(0) else { return };
    // SAFETY: the kernel calls iterators with this structure. `pass` is an element of a map, and only one sweep runs at a
    // time: user space owns the only link.
    let (sk, value, pass) = unsafe { ((*ctx).sk, (*ctx).value, &mut *pass) };
    if pass.started_ns == 0 {
        // SAFETY: no preconditions.
        (pass.started_ns, pass.started_ticks) = unsafe { (bpf_ktime_get_ns(), bpf_jiffies64()) };
        pass.abi = ABI_VERSION;
    }
    let Some(sock) = Sock::new(sk) else {
        pass.complete = 1;
        return;
    };
    if value.is_null() {
        return;
    }
    if pass.records >= constant!(OWNER.max_records) {
        pass.overflowed += 1;
        return;
    }
    let Some(slot) = RECORDS.get_ptr_mut(pass.records) else {
        pass.overflowed += 1;
        return;
    };
    // SAFETY: the kernel gives the tag's value for reading.
    let tag = unsafe { *value };
    let mut record = sock.record();
    record.opened_ns = tag.opened_ns;
    record.owner = tag.owner;
    record.flags |= flags::TAGGED | tag.flags;
    if tag.remote_port != 0 {
        // What `connect()` was given: a refused or reset socket may have lost it.
        record.remote = tag.remote;
        record.remote_port = tag.remote_port;
    }
    // SAFETY: an element of the map, as above.
    unsafe { *slot = record }
    pass.records += 1;
}

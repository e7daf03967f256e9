//! Tagging a socket when the own process connects it, or a watched one towards one of the peers.

use aya_ebpf::bindings::bpf_pidns_info;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::helpers::generated::{bpf_get_ns_current_pid_tgid, bpf_ktime_get_ns};
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::warn;
use counterfoil_common::{Counter, SocketTag, TCP_SYN_SENT};

use crate::maps::{TARGETS, constant, count};
use crate::sock::Sock;

/// `inet_sock_set_state(sk, old, new)`. SYN_SENT is entered inside `connect()`, so the current task is the caller; in most
/// other transitions it is whatever task the packet interrupted.
#[inline(always)]
pub fn on_set_state(ctx: &BtfTracePointContext, tagged: Counter, failed: Counter) {
    let new: i32 = ctx.arg(2);
    if new != TCP_SYN_SENT {
        return;
    }
    let Some(sock) = Sock::new(ctx.arg(0)) else { return };
    if !sock.is_tcp() {
        return;
    }
    let owner = if constant!(OWNER.beside) == 0 {
        if !current_is_owner() {
            return;
        }
        0
    } else {
        // In the initial pid namespace, as the targets are.
        let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
        if TARGETS.get_ptr(tgid).is_none() || !sock.is_towards_a_peer() {
            return;
        }
        tgid
    };
    // SAFETY: no preconditions.
    let opened_ns = unsafe { bpf_ktime_get_ns() };
    let tag =
        SocketTag { opened_ns, remote: sock.remote(), remote_port: sock.remote_port(), owner, ..SocketTag::EMPTY };
    if sock.put_first_tag(tag) {
        count(tagged);
    } else if count(failed).is_power_of_two() {
        // The first failure on a CPU, the second, the fourth: the log must not fill up when memory is short.
        warn!(ctx, "no memory to tag the socket with cookie {}", sock.cookie());
    }
}

/// Whether the current task belongs to the process that loaded the program. Compared inside that process's pid namespace:
/// the plain helper speaks of the initial one.
#[inline(always)]
fn current_is_owner() -> bool {
    let mut ids = bpf_pidns_info { pid: 0, tgid: 0 };
    let (device, inode) = (constant!(OWNER.pidns_device), constant!(OWNER.pidns_inode));
    // SAFETY: `ids` has the size given.
    let result =
        unsafe { bpf_get_ns_current_pid_tgid(device, inode, &raw mut ids, size_of::<bpf_pidns_info>() as u32) };
    result == 0 && ids.tgid == constant!(OWNER.tgid)
}

//! Counterfoil's kernel side.
//!
//! * `tag_first`, `tag_second`: when the process that loaded them, or one that it watches, connects a TCP socket, a tag is
//!   stored on that socket. The tag dies with the socket, so that there is no event of closing to miss, no table to fill up
//!   and no address to be reused.
//! * `sweep`: reads all tagged sockets, each with its live state; `sweep_files`, `sweep_tables` and `forget` where the kernel
//!   does not let it.
//! * `descriptors`: reads the TCP sockets behind the descriptors of a process: the witness, and the way to sockets that were
//!   opened before the programs were attached.
//!
//! Nothing here decides anything: the programs report, user space judges. Structure layouts come from the running kernel's
//! type information as constants ([`maps::FIELD_OFFSETS`]); the verifier checks every access again.
#![no_std]
#![no_main]

mod descriptors;
mod maps;
mod sock;
mod sweep;
mod tag;

use aya_ebpf::cty::c_void;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use counterfoil_common::Counter;

/// First of the two copies. The kernel skips a run when the same program is already running on that CPU; a second program
/// that does the same thing may run where the first did not, and storing a tag twice changes nothing.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn tag_first(ctx: BtfTracePointContext) -> i32 {
    tag::on_set_state(&ctx, Counter::TaggedFirst, Counter::FailedFirst);
    0
}

/// Second copy.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn tag_second(ctx: BtfTracePointContext) -> i32 {
    tag::on_set_state(&ctx, Counter::TaggedSecond, Counter::FailedSecond);
    0
}

// aya-ebpf has no macro for iterators: a section named `iter/KIND` is all that it takes.

/// One call for each tagged socket, and a last one without a socket.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn sweep(ctx: *mut c_void) -> i32 {
    sweep::on_socket(ctx);
    0
}

/// Where tags are kept by cookie: one call for each descriptor, and a last one without a file.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn sweep_files(ctx: *mut c_void) -> i32 {
    sweep::on_descriptor(ctx);
    0
}

/// With `sweep_files`: one call for each socket in the TCP tables, and a last one without a socket.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn sweep_tables(ctx: *mut c_void) -> i32 {
    sweep::on_hashed(ctx);
    0
}

/// Where tags are kept by cookie: a socket is destroyed. A run that the kernel skips leaves a tag that nobody looks for.
#[btf_tracepoint(function = "tcp_destroy_sock")]
pub fn forget(ctx: BtfTracePointContext) -> i32 {
    if let Some(sock) = sock::Sock::new(ctx.arg(0)) {
        sock.forget();
    }
    0
}

/// One call for each descriptor, and a last one without a file.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn descriptors(ctx: *mut c_void) -> i32 {
    descriptors::on_descriptor(ctx);
    0
}

/// The verifier refuses a program from which this can be reached.
#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

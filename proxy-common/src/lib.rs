//! Plain data shared by the eBPF program and user space.
//!
//! Rules of this boundary: `repr(C)`, integers and arrays of integers only, no implicit padding, zero means "absent", and
//! host byte order throughout (both sides run on the same machine). The asserts in [`layout`] hold the layout still;
//! whoever changes it changes [`ABI_VERSION`].
#![no_std]
#![deny(unsafe_code)]

pub mod layout;
pub mod names;
#[cfg(feature = "user")]
mod pod;

pub use layout::{COUNTERS, Counter, FieldOffsets, Owner, PassHeader, Peer, SocketRecord, SocketTag, Walk, flags};

/// Version of everything in this crate. The eBPF program writes its own into every [`PassHeader`], and user space refuses
/// another one.
pub const ABI_VERSION: u32 = 3;

/// `AF_INET`, as in [`SocketRecord::family`].
pub const AF_INET: u16 = 2;
/// `AF_INET6`, as in [`SocketRecord::family`].
pub const AF_INET6: u16 = 10;
/// `TCP_SYN_SENT`: the state that a socket enters inside `connect()`.
pub const TCP_SYN_SENT: i32 = 2;
/// `IPPROTO_TCP`.
pub const IPPROTO_TCP: u16 = 6;

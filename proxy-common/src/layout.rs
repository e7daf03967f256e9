//! The structures, and the asserts that hold their layout.

use core::mem::{align_of, offset_of, size_of};

/// Bits of [`SocketRecord::flags`] and [`SocketTag::flags`].
pub mod flags {
    /// Some descriptor refers to the socket (`sk_socket != NULL`).
    pub const HELD: u8 = 1;
    /// The tag was put on by a descriptor pass, not by `connect()`: the time of opening is not known.
    pub const ADOPTED: u8 = 2;
    /// The socket has a tag.
    pub const TAGGED: u8 = 4;
}

/// Value of the socket storage: what only `connect()` knows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketTag {
    /// `bpf_ktime_get_ns()` (`CLOCK_MONOTONIC`) when `connect()` began; 0 if adopted.
    pub opened_ns: u64,
    /// The peer as `connect()` was given it; the kernel forgets it when the connection is refused.
    pub remote: [u8; 16],
    /// Its port, host byte order.
    pub remote_port: u16,
    /// [`flags::ADOPTED`] or 0.
    pub flags: u8,
    /// Zero.
    pub _pad: u8,
    /// The watched process that connected it, or that held it when it was adopted: its id in the initial pid namespace; 0 in
    /// a view of the own process.
    pub owner: u32,
}

/// One socket as an iterator read it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketRecord {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// As [`SocketTag::opened_ns`].
    pub opened_ns: u64,
    /// `tcp_sock.bytes_sent`.
    pub bytes_sent: u64,
    /// `tcp_sock.bytes_received`.
    pub bytes_received: u64,
    /// Local address: IPv4 in the first four bytes, or IPv6.
    pub local: [u8; 16],
    /// Peer address in the same form.
    pub remote: [u8; 16],
    /// `tcp_sock.lsndtime`: low half of the kernel's tick counter when payload was last sent, 0 for never.
    pub sent_ticks: u32,
    /// `inet_connection_sock.icsk_ack.lrcvtime`: the same for payload received.
    pub received_ticks: u32,
    /// `rcv_nxt - copied_seq`: bytes not read yet, plus one for a FIN not read yet.
    pub unread: u32,
    /// Inode of the network namespace.
    pub netns: u32,
    /// Local port, host byte order.
    pub local_port: u16,
    /// Peer port, host byte order.
    pub remote_port: u16,
    /// `AF_INET` or `AF_INET6`.
    pub family: u16,
    /// Kernel number of the TCP state.
    pub state: u8,
    /// See [`flags`].
    pub flags: u8,
    /// As [`SocketTag::owner`]; 0 without a tag.
    pub owner: u32,
    /// Inode of the socket's file, 0 if nobody holds it.
    pub inode: u32,
}

/// What a sweep says of itself. User space zeroes it before each sweep.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassHeader {
    /// `bpf_ktime_get_ns()` at the first socket.
    pub started_ns: u64,
    /// The kernel's tick counter (`jiffies64`) at the first socket.
    pub started_ticks: u64,
    /// [`ABI_VERSION`](crate::ABI_VERSION) of the eBPF program.
    pub abi: u32,
    /// Records written.
    pub records: u32,
    /// Sockets that found no room.
    pub overflowed: u32,
    /// How many walks have come to their end: the kernel said that there are no more sockets.
    pub complete: u32,
}

/// Whose sockets are counted: constant of the eBPF program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Device of the process's pid namespace, in the kernel's encoding (major << 20 | minor).
    pub pidns_device: u64,
    /// Inode of the pid namespace.
    pub pidns_inode: u64,
    /// Process id inside that namespace.
    pub tgid: u32,
    /// Capacity of the array of records.
    pub max_records: u32,
    /// 1: not this process, but those in the map of targets, and their sockets towards the peers only.
    pub beside: u32,
    /// 1: tags are kept by cookie, as this kernel lets no program walk the storage of sockets.
    pub by_cookie: u32,
}

/// A peer of watched processes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// IPv6; IPv4 as `::ffff:a.b.c.d`.
    pub address: [u8; 16],
    /// Host byte order.
    pub port: u16,
    /// Zero.
    pub _pad: [u8; 2],
}

/// Of which watched process a descriptor pass is, and what it learns of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Its id in the initial pid namespace, where the kernel cannot leave out the others (before Linux 6.1); else 0.
    pub wanted: u32,
    /// Written by the pass: its id in the initial pid namespace; 0 if it has no descriptor at all.
    pub tgid: u32,
}

/// Bytes from the start of a kernel structure to a field: constant of the eBPF program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FieldOffsets {
    /// `sock.__sk_common.skc_family`
    pub family: u32,
    /// `sock.__sk_common.skc_state`
    pub state: u32,
    /// `sock.__sk_common.skc_dport`
    pub remote_port: u32,
    /// `sock.__sk_common.skc_daddr`
    pub remote_v4: u32,
    /// `sock.__sk_common.skc_rcv_saddr`
    pub local_v4: u32,
    /// `sock.__sk_common.skc_v6_daddr`
    pub remote_v6: u32,
    /// `sock.__sk_common.skc_v6_rcv_saddr`
    pub local_v6: u32,
    /// `sock.__sk_common.skc_net`
    pub net: u32,
    /// `sock.sk_protocol`
    pub protocol: u32,
    /// `sock.sk_socket`
    pub socket: u32,
    /// `socket.file`
    pub socket_file: u32,
    /// `file.f_inode`
    pub file_inode: u32,
    /// `inode.i_ino`
    pub inode_number: u32,
    /// `net.ns.inum`
    pub net_inode: u32,
    /// `socket.sk`
    pub socket_sk: u32,
    /// `task_struct.tgid`
    pub task_tgid: u32,
    /// `tcp_sock.inet_conn.icsk_inet.inet_sport`: unlike `skc_num` it survives the end of the connection.
    pub local_port: u32,
    /// `tcp_sock.inet_conn.icsk_ack.lrcvtime`
    pub received_ticks: u32,
    /// `tcp_sock.lsndtime`
    pub sent_ticks: u32,
    /// `tcp_sock.bytes_sent`
    pub bytes_sent: u32,
    /// `tcp_sock.bytes_received`
    pub bytes_received: u32,
    /// `tcp_sock.rcv_nxt`
    pub rcv_nxt: u32,
    /// `tcp_sock.copied_seq`
    pub copied_seq: u32,
    /// `sock.__sk_common.skc_cookie`
    pub cookie: u32,
}

/// Index of a counter. Each program has its own: two programs can interleave on one CPU, and an unsynchronised
/// increment of a shared slot would then be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Sockets that `tag_first` tagged.
    TaggedFirst,
    /// Sockets that `tag_second` tagged.
    TaggedSecond,
    /// Tags that `tag_first` could not store.
    FailedFirst,
    /// Tags that `tag_second` could not store.
    FailedSecond,
    /// Tags that the descriptor pass could not store.
    FailedAdopt,
}

/// How many counters there are.
pub const COUNTERS: u32 = 5;

macro_rules! layout {
    ($type:ty, size $size:expr, $($field:ident @ $offset:expr),+ $(,)?) => {
        const _: () = {
            assert!(size_of::<$type>() == $size);
            assert!(align_of::<$type>() <= 8);
            $(assert!(offset_of!($type, $field) == $offset);)+
        };
    };
}

impl SocketTag {
    /// All zero.
    pub const EMPTY: Self = Self { opened_ns: 0, remote: [0; 16], remote_port: 0, flags: 0, _pad: 0, owner: 0 };
}

impl SocketRecord {
    /// All zero.
    pub const EMPTY: Self = Self {
        cookie: 0,
        opened_ns: 0,
        bytes_sent: 0,
        bytes_received: 0,
        local: [0; 16],
        remote: [0; 16],
        sent_ticks: 0,
        received_ticks: 0,
        unread: 0,
        netns: 0,
        local_port: 0,
        remote_port: 0,
        family: 0,
        state: 0,
        flags: 0,
        owner: 0,
        inode: 0,
    };
}

impl Owner {
    /// Before loading: nobody.
    pub const UNSET: Self = Self { pidns_device: 0, pidns_inode: 0, tgid: 0, max_records: 0, beside: 0, by_cookie: 0 };
}

impl FieldOffsets {
    /// Before loading.
    pub const UNSET: Self = Self {
        family: 0,
        state: 0,
        remote_port: 0,
        remote_v4: 0,
        local_v4: 0,
        remote_v6: 0,
        local_v6: 0,
        net: 0,
        protocol: 0,
        socket: 0,
        socket_file: 0,
        file_inode: 0,
        inode_number: 0,
        net_inode: 0,
        socket_sk: 0,
        task_tgid: 0,
        local_port: 0,
        received_ticks: 0,
        sent_ticks: 0,
        bytes_sent: 0,
        bytes_received: 0,
        rcv_nxt: 0,
        copied_seq: 0,
        cookie: 0,
    };
}

layout!(SocketTag, size 32, opened_ns @ 0, remote @ 8, remote_port @ 24, flags @ 26, _pad @ 27, owner @ 28);
layout!(SocketRecord, size 96,
    cookie @ 0, opened_ns @ 8, bytes_sent @ 16, bytes_received @ 24, local @ 32, remote @ 48, sent_ticks @ 64,
    received_ticks @ 68, unread @ 72, netns @ 76, local_port @ 80, remote_port @ 82, family @ 84, state @ 86, flags @ 87,
    owner @ 88, inode @ 92);
layout!(PassHeader, size 32, started_ns @ 0, started_ticks @ 8, abi @ 16, records @ 20, overflowed @ 24, complete @ 28);
layout!(Owner, size 32,
    pidns_device @ 0, pidns_inode @ 8, tgid @ 16, max_records @ 20, beside @ 24, by_cookie @ 28);
layout!(Peer, size 20, address @ 0, port @ 16, _pad @ 18);
layout!(Walk, size 8, wanted @ 0, tgid @ 4);
layout!(FieldOffsets, size 96, family @ 0, copied_seq @ 88, cookie @ 92);
const _: () = assert!(Counter::FailedAdopt as u32 + 1 == COUNTERS);

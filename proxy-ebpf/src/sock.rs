//! Reading the kernel's `struct sock`.

use aya_ebpf::bindings::BPF_SK_STORAGE_GET_F_CREATE;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_sk_storage_get, bpf_skc_to_tcp_sock};
use counterfoil_common::{AF_INET, AF_INET6, IPPROTO_TCP, Peer, SocketRecord, SocketTag, flags};

use crate::maps::{PEERS, TAGS, constant};

/// A `struct sock *` that is not null, given by the kernel for this run of the program.
#[derive(Clone, Copy)]
pub struct Sock(*const u8);

/// One load from a kernel structure; the verifier checks that it stays inside.
#[inline(always)]
fn load<T: Copy>(base: *const u8, offset: u32) -> T {
    // SAFETY: `base` is a pointer of a type that the verifier knows, the offset is this kernel's own, and a faulting
    // load yields zero. Volatile, so that the compiler neither merges nor widens loads past a field's end.
    unsafe { base.add(offset as usize).cast::<T>().read_volatile() }
}

impl Sock {
    /// `None` for a null pointer.
    #[inline(always)]
    pub fn new(pointer: *const u8) -> Option<Self> {
        if pointer.is_null() { None } else { Some(Self(pointer)) }
    }

    /// The socket of a `struct socket *` that is not null.
    #[inline(always)]
    pub fn of_socket(socket: *const u8) -> Option<Self> {
        Self::new(load(socket, constant!(FIELD_OFFSETS.socket_sk)))
    }

    /// Whether this is a TCP socket over IPv4 or IPv6.
    #[inline(always)]
    pub fn is_tcp(self) -> bool {
        let family = self.family();
        (family == AF_INET || family == AF_INET6)
            && load::<u16>(self.0, constant!(FIELD_OFFSETS.protocol)) == IPPROTO_TCP
    }

    /// `SO_COOKIE`.
    #[inline(always)]
    pub fn cookie(self) -> u64 {
        // SAFETY: a live socket.
        unsafe { bpf_get_socket_cookie(self.raw()) }
    }

    /// The peer's address: IPv4 in the first four bytes, or IPv6.
    #[inline(always)]
    pub fn remote(self) -> [u8; 16] {
        self.address(constant!(FIELD_OFFSETS.remote_v4), constant!(FIELD_OFFSETS.remote_v6))
    }

    /// The peer's port.
    #[inline(always)]
    pub fn remote_port(self) -> u16 {
        u16::from_be(load(self.0, constant!(FIELD_OFFSETS.remote_port)))
    }

    /// Whether its peer is one of those whose connections are counted.
    #[inline(always)]
    pub fn is_towards_a_peer(self) -> bool {
        let mut peer = Peer { address: self.remote(), port: self.remote_port(), ..Peer::default() };
        if self.family() == AF_INET {
            let [a, b, c, d, ..] = peer.address;
            peer.address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d];
        }
        PEERS.get_ptr(peer).is_some()
    }

    /// Stores a tag; false if the kernel has no memory for it. An older tag is overwritten.
    #[inline(always)]
    pub fn put_tag(self, mut tag: SocketTag) -> bool {
        // SAFETY: a live socket, the map that the tag's type belongs to, and a tag on the stack.
        let stored = unsafe {
            bpf_sk_storage_get(
                (&raw const TAGS).cast_mut().cast(),
                self.raw(),
                (&raw mut tag).cast(),
                u64::from(BPF_SK_STORAGE_GET_F_CREATE),
            )
        }
        .cast::<SocketTag>();
        if stored.is_null() {
            return false;
        }
        // SAFETY: the kernel returned this value of the map; it stays valid until the program ends.
        unsafe { *stored = tag }
        true
    }

    /// The socket's tag, if it has one.
    #[inline(always)]
    pub fn tag(self) -> Option<SocketTag> {
        let stored = self.stored_tag();
        if stored.is_null() {
            return None;
        }
        // SAFETY: as in `put_tag`.
        Some(unsafe { *stored })
    }

    /// Whether it has a tag.
    #[inline(always)]
    pub fn is_tagged(self) -> bool {
        !self.stored_tag().is_null()
    }

    /// Changes the owner in the socket's tag, if it has one.
    #[inline(always)]
    pub fn set_owner(self, owner: u32) {
        let stored = self.stored_tag();
        if !stored.is_null() {
            // SAFETY: as in `put_tag`.
            unsafe { (*stored).owner = owner }
        }
    }

    #[inline(always)]
    fn stored_tag(self) -> *mut SocketTag {
        // SAFETY: as in `put_tag`; without a value and flags the kernel only looks.
        unsafe { bpf_sk_storage_get((&raw const TAGS).cast_mut().cast(), self.raw(), core::ptr::null_mut(), 0) }.cast()
    }

    /// Everything that the socket itself knows.
    #[inline(always)]
    pub fn record(self) -> SocketRecord {
        let net: *const u8 = load(self.0, constant!(FIELD_OFFSETS.net));
        let socket: *const u8 = load(self.0, constant!(FIELD_OFFSETS.socket));
        let held = !socket.is_null();
        let inode: u64 = if held {
            let file: *const u8 = load(socket, constant!(FIELD_OFFSETS.socket_file));
            let inode: *const u8 = load(file, constant!(FIELD_OFFSETS.file_inode));
            load(inode, constant!(FIELD_OFFSETS.inode_number))
        } else {
            0
        };
        let mut record = SocketRecord {
            cookie: self.cookie(),
            local: self.address(constant!(FIELD_OFFSETS.local_v4), constant!(FIELD_OFFSETS.local_v6)),
            remote: self.remote(),
            remote_port: self.remote_port(),
            netns: load(net, constant!(FIELD_OFFSETS.net_inode)),
            family: self.family(),
            state: load(self.0, constant!(FIELD_OFFSETS.state)),
            flags: if held { flags::HELD } else { 0 },
            // Sockets have inodes of 32 bits, as `sock_diag` says them.
            inode: inode as u32,
            ..SocketRecord::EMPTY
        };
        // SAFETY: a live socket; null if it is no full TCP socket.
        let tcp = unsafe { bpf_skc_to_tcp_sock(self.raw()) }.cast::<u8>().cast_const();
        if !tcp.is_null() {
            record.local_port = u16::from_be(load(tcp, constant!(FIELD_OFFSETS.local_port)));
            record.received_ticks = load(tcp, constant!(FIELD_OFFSETS.received_ticks));
            record.sent_ticks = load(tcp, constant!(FIELD_OFFSETS.sent_ticks));
            record.bytes_sent = load(tcp, constant!(FIELD_OFFSETS.bytes_sent));
            record.bytes_received = load(tcp, constant!(FIELD_OFFSETS.bytes_received));
            // Two loads while packets come in: the later one can be ahead, so the difference is clamped in user space.
            let read: u32 = load(tcp, constant!(FIELD_OFFSETS.copied_seq));
            record.unread = load::<u32>(tcp, constant!(FIELD_OFFSETS.rcv_nxt)).wrapping_sub(read);
        }
        record
    }

    #[inline(always)]
    fn family(self) -> u16 {
        load(self.0, constant!(FIELD_OFFSETS.family))
    }

    #[inline(always)]
    fn address(self, v4: u32, v6: u32) -> [u8; 16] {
        let mut words = [0u32; 4];
        if self.family() == AF_INET6 {
            words[0] = load(self.0, v6);
            words[1] = load(self.0, v6 + 4);
            words[2] = load(self.0, v6 + 8);
            words[3] = load(self.0, v6 + 12);
        } else {
            words[0] = load(self.0, v4);
        }
        // SAFETY: same size, and any bytes are valid.
        unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) }
    }

    #[inline(always)]
    fn raw(self) -> *mut c_void {
        self.0.cast_mut().cast()
    }
}

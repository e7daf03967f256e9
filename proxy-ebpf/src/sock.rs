//! Reading the kernel's `struct sock`.

use aya_ebpf::bindings::BPF_SK_STORAGE_GET_F_CREATE;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_sk_storage_get, bpf_skc_to_tcp_sock};
use counterfoil_common::{AF_INET, AF_INET6, IPPROTO_TCP, Peer, SocketRecord, SocketTag, flags};

use crate::maps::{COOKIES, PEERS, TAGS, constant};

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

/// The same by the helper for reading any address: for a field behind the end of the type by which the verifier knows the
/// pointer. Zero where there is none.
#[inline(always)]
fn peek<T: Copy + Default>(base: *const u8, offset: u32) -> T {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) }.unwrap_or_default()
}

/// Whether tags are kept by cookie. The verifier knows the answer, and leaves out the other way.
#[inline(always)]
fn by_cookie() -> bool {
    constant!(OWNER.by_cookie) != 0
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

    /// The whole socket of a `struct sock_common *` that is not null, if it is one of TCP.
    #[inline(always)]
    pub fn of_common(common: *const u8) -> Option<Self> {
        // SAFETY: a live socket of some kind; null if it is no full TCP socket.
        Self::new(unsafe { bpf_skc_to_tcp_sock(common.cast_mut().cast()) }.cast::<u8>().cast_const())
    }

    /// Whether somebody holds it: it has a `struct socket`.
    #[inline(always)]
    pub fn is_held(self) -> bool {
        !load::<*const u8>(self.0, constant!(FIELD_OFFSETS.socket)).is_null()
    }

    /// `SO_COOKIE`. Where tags are kept by it, zero if nobody has asked for it yet: such kernels take only some pointers to
    /// sockets as arguments, and not those that come from descriptors.
    #[inline(always)]
    pub fn cookie(self) -> u64 {
        if by_cookie() { load(self.0, constant!(FIELD_OFFSETS.cookie)) } else { self.ask_cookie() }
    }

    /// The same; the kernel chooses it now if need be.
    #[inline(always)]
    fn ask_cookie(self) -> u64 {
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
        if by_cookie() {
            return COOKIES.insert(self.cookie(), tag, 0).is_ok();
        }
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

    /// The same for a socket that may have no cookie yet, by a program that the kernel lets ask for it.
    #[inline(always)]
    pub fn put_first_tag(self, tag: SocketTag) -> bool {
        if by_cookie() {
            // From now on the socket has it.
            self.ask_cookie();
        }
        self.put_tag(tag)
    }

    /// It is destroyed.
    #[inline(always)]
    pub fn forget(self) {
        // Most sockets have no tag.
        let _ = COOKIES.remove(self.cookie());
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
        if by_cookie() {
            return COOKIES.get_ptr_mut(self.cookie()).unwrap_or(core::ptr::null_mut());
        }
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
        if by_cookie() {
            self.read_tcp(&mut record, peek, peek);
            return record;
        }
        // SAFETY: a live socket; null if it is no full TCP socket.
        let tcp = unsafe { bpf_skc_to_tcp_sock(self.raw()) }.cast::<u8>().cast_const();
        if let Some(tcp) = Self::new(tcp) {
            tcp.read_tcp(&mut record, load, load);
        }
        record
    }

    /// What only TCP sockets have, of a `struct tcp_sock`.
    #[inline(always)]
    fn read_tcp(
        self,
        record: &mut SocketRecord,
        small: impl Fn(*const u8, u32) -> u32,
        large: impl Fn(*const u8, u32) -> u64,
    ) {
        // The port alone has 16 bits; what stands behind it is cut off.
        let port = small(self.0, constant!(FIELD_OFFSETS.local_port)).to_ne_bytes();
        record.local_port = u16::from_be_bytes([port[0], port[1]]);
        record.received_ticks = small(self.0, constant!(FIELD_OFFSETS.received_ticks));
        record.sent_ticks = small(self.0, constant!(FIELD_OFFSETS.sent_ticks));
        record.bytes_sent = large(self.0, constant!(FIELD_OFFSETS.bytes_sent));
        record.bytes_received = large(self.0, constant!(FIELD_OFFSETS.bytes_received));
        // Two loads while packets come in: the later one can be ahead, so the difference is clamped in user space.
        let read = small(self.0, constant!(FIELD_OFFSETS.copied_seq));
        record.unread = small(self.0, constant!(FIELD_OFFSETS.rcv_nxt)).wrapping_sub(read);
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

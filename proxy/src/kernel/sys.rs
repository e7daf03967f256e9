//! The system calls that no safe crate offers: the only `unsafe` of this crate.
//!
//! * an iterator link with its parameters, and its file (`aya` cannot pass the parameters),
//! * the array of records, mapped,
//! * `getsockopt` on a descriptor that another thread owns,
//! * descriptors that the process was started with,
//! * socket options and a question about a socket that no crate knows, and the registration of a shared socket with tokio,
//! * memory without huge pages.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Arc;

use counterfoil_common::SocketRecord;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdRegisterError};

const BPF_LINK_CREATE: c_int = 28;
const BPF_ITER_CREATE: c_int = 33;
const BPF_TRACE_ITER: u32 = 28;

/// What an iterator walks: `union bpf_iter_link_info`.
#[derive(Clone, Copy)]
pub(super) enum Walk<'a> {
    /// The entries of a map.
    Map(BorrowedFd<'a>),
    /// One task, by its id in this pid namespace (Linux 6.1 and later).
    Task(u32),
    /// Everything: all that kernels before 6.1 can do for tasks.
    Everything,
}

/// `union bpf_attr` for `BPF_LINK_CREATE` of an iterator.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_len: u32,
    pad: u32,
}

/// `union bpf_attr` for `BPF_ITER_CREATE`.
#[repr(C)]
struct IteratorCreate {
    link: u32,
    flags: u32,
}

/// `bpf(2)` with a command that returns a descriptor.
fn bpf<T>(command: c_int, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of `attr`, all of them initialised integers without padding.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_ref(attr), size_of::<T>()) };
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Binds an iterator program to what it shall walk.
pub(super) fn iterator_link(program: BorrowedFd<'_>, walk: Walk<'_>) -> io::Result<OwnedFd> {
    // `map.map_fd`, or `task.{tid, pid, pid_fd}`.
    let info = match walk {
        Walk::Map(map) => [map.as_raw_fd().cast_unsigned(), 0, 0],
        Walk::Task(tid) => [tid, 0, 0],
        Walk::Everything => [0; 3],
    };
    let info_len = match walk {
        Walk::Map(_) => 4,
        Walk::Task(_) => 12,
        Walk::Everything => 0,
    };
    let attr = LinkCreate {
        program: program.as_raw_fd().cast_unsigned(),
        target: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        info: if info_len == 0 { 0 } else { info.as_ptr().expose_provenance() as u64 },
        info_len,
        pad: 0,
    };
    bpf(BPF_LINK_CREATE, &attr)
}

/// Starts one walk; it happens while the file is read.
pub(super) fn iterator_open(link: BorrowedFd<'_>) -> io::Result<File> {
    bpf(BPF_ITER_CREATE, &IteratorCreate { link: link.as_raw_fd().cast_unsigned(), flags: 0 }).map(File::from)
}

/// The records in an iterator's output; `None` if the last one is cut short.
pub(super) fn records(bytes: &[u8]) -> Option<Vec<SocketRecord>> {
    let chunks = bytes.chunks_exact(size_of::<SocketRecord>());
    if !chunks.remainder().is_empty() {
        return None;
    }
    // SAFETY: each chunk has the record's size; the record is integers only, any bytes are a value of it.
    Some(chunks.map(|chunk| unsafe { chunk.as_ptr().cast::<SocketRecord>().read_unaligned() }).collect())
}

/// The array of records, mapped for reading.
pub(super) struct RecordArray {
    start: *const SocketRecord,
    len: usize,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone and is not bound to a thread.
unsafe impl Send for RecordArray {}

impl RecordArray {
    /// Maps an array map (`BPF_F_MMAPABLE`) of `len` records.
    pub(super) fn new(map: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        let bytes = len.saturating_mul(size_of::<SocketRecord>());
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_SHARED, map.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast_const().cast(), len, bytes })
    }

    /// Copies the first `count` records, or all if there are fewer. Only while no sweep runs.
    pub(super) fn copy(&self, count: usize) -> Vec<SocketRecord> {
        // SAFETY: inside the mapping, which is page-aligned and readable as long as `self` lives. Volatile: the memory is
        // the kernel's, which writes it only during a sweep; the caller, who runs the sweeps, is not in one.
        (0..count.min(self.len)).map(|index| unsafe { self.start.add(index).read_volatile() }).collect()
    }
}

impl Drop for RecordArray {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no reference into it outlives a call of `copy`. It cannot fail.
        unsafe { libc::munmap(self.start.cast_mut().cast(), self.bytes) };
    }
}

/// Reads a socket option of a descriptor that some other thread owns. The number may be closed or reused meanwhile: the answer is
/// then an error or that of another socket of this process, so the caller asks for `SO_COOKIE` first and last.
fn option<const N: usize>(fd: RawFd, level: c_int, name: c_int) -> io::Result<([u8; N], usize)> {
    let mut value = [0u8; N];
    let mut len = N as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`. It changes nothing, whatever the number refers to.
    let result = unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast::<c_void>(), &raw mut len) };
    if result == 0 { Ok((value, len as usize)) } else { Err(io::Error::last_os_error()) }
}

/// `SO_COOKIE` of a descriptor that some other thread owns.
pub(super) fn cookie(fd: RawFd) -> io::Result<u64> {
    option::<8>(fd, libc::SOL_SOCKET, libc::SO_COOKIE).map(|(value, _)| u64::from_ne_bytes(value))
}

/// Whether it is a TCP socket.
pub(super) fn is_tcp(fd: RawFd) -> io::Result<bool> {
    let (domain, _) = option::<4>(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    let (protocol, _) = option::<4>(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
    let inet = [libc::AF_INET, libc::AF_INET6].contains(&c_int::from_ne_bytes(domain));
    Ok(inet && c_int::from_ne_bytes(protocol) == libc::IPPROTO_TCP)
}

/// `TCP_INFO`, as many bytes of it as this kernel has.
pub(super) fn tcp_info(fd: RawFd) -> io::Result<Vec<u8>> {
    option::<256>(fd, libc::IPPROTO_TCP, libc::TCP_INFO).map(|(value, len)| value[..len.min(256)].to_vec())
}

/// `getsockname`; an address of zeros before the socket has one.
pub(super) fn local_address(fd: RawFd) -> io::Result<SocketAddr> {
    // SAFETY: all zeros are a value of this plain structure.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `storage`.
    if unsafe { libc::getsockname(fd, (&raw mut storage).cast(), &raw mut len) } != 0 {
        return Err(io::Error::last_os_error());
    }
    match c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: `sockaddr_storage` is large and aligned enough for every address, and the family says which.
            let v4 = unsafe { (&raw const storage).cast::<libc::sockaddr_in>().read() };
            let address = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Ok(SocketAddr::from((address, u16::from_be(v4.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { (&raw const storage).cast::<libc::sockaddr_in6>().read() };
            Ok(SocketAddr::from((Ipv6Addr::from(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port))))
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Another descriptor of what this number stands for in this process, closed by `execve(2)`.
pub(crate) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: an integer is all that is passed; if it is no open descriptor, the kernel says so.
    let result = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

/// `IP_BIND_ADDRESS_NO_PORT` (ip(7)): `bind(2)` with port 0 leaves the choice of a port to `connect(2)`, which may then
/// use a port again that is in use towards another destination.
pub(crate) fn bind_address_no_port(socket: &socket2::Socket) -> io::Result<()> {
    let on: c_int = 1;
    let len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of `on`, and the descriptor is open while `socket` is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            len,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Memory comes in pages of the usual size from now on (PR_SET_THP_DISABLE, prctl(2)), in threads made later too. With huge
/// pages a table takes all the memory that it has room for, 2 MiB at a time, used or not.
pub(crate) fn forbid_huge_pages() -> io::Result<()> {
    let (on, unused): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: integers are all that is passed.
    let result = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, on, unused, unused, unused) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An option of the TCP level with a number as its value.
fn set_tcp_option(socket: &socket2::Socket, name: c_int, value: c_int) -> io::Result<()> {
    let len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of `value`, and the descriptor is open while `socket` is borrowed.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, name, (&raw const value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `TCP_FASTOPEN_CONNECT` (tcp(7)): if there is a cookie of the peer, `connect(2)` returns at once and the SYN goes with
/// the first write.
pub(crate) fn fast_open_connect(socket: &socket2::Socket) -> io::Result<()> {
    set_tcp_option(socket, libc::TCP_FASTOPEN_CONNECT, 1)
}

/// `TCP_FASTOPEN` (tcp(7)): data in a SYN are taken, on as many connections at once whose handshake is not over.
pub(crate) fn fast_open_listen(socket: &socket2::Socket, queue: u32) -> io::Result<()> {
    set_tcp_option(socket, libc::TCP_FASTOPEN, c_int::try_from(queue).unwrap_or(c_int::MAX))
}

/// `SIOCOUTQ` (tcp(7)): octets that were written and that the peer has not acknowledged, its FIN as one more.
pub(crate) fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut octets: c_int = 0;
    // SAFETY: the kernel writes one `int` to `octets`, and the descriptor is open while it is borrowed. The number is that
    // of `SIOCOUTQ`, too (linux/sockios.h).
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut octets) };
    if result == 0 { Ok(usize::try_from(octets).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// Registers a socket with the runtime of this thread.
pub(crate) fn register(
    socket: Arc<socket2::Socket>,
    interest: Interest,
) -> Result<AsyncFd<Arc<socket2::Socket>>, AsyncFdRegisterError<Arc<socket2::Socket>>> {
    // SAFETY: an `Arc` of a socket gives the same descriptor for as long as it lives, and the descriptor stays open.
    unsafe { AsyncFd::register_with_interest(socket, interest) }
}

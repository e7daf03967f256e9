//! Brings the eBPF program into the kernel: constants, maps, programs, links.

use std::error::Error;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::{fs, io};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use aya::programs::{BtfTracePoint, Iter, ProgramError};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use aya_log::EbpfLogger;
use counterfoil_common::{ABI_VERSION, FieldOffsets, Owner, PassHeader, Peer, Walk as Whom, names};

use super::btf::{KernelTypes, VMLINUX};
use super::error::chain;
use super::log::ToTracing;
use super::peers::Peers;
use super::sys::{self, RecordArray, Walk};
use super::{ViewError, capability};

/// The object, aligned for the ELF parser.
#[cfg(ebpf_object)]
const OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/counterfoil-ebpf.o")));
#[cfg(not(ebpf_object))]
const OBJECT: Option<&[u8]> = None;

/// Whose sockets the programs tag.
#[derive(Clone, Copy)]
pub(super) enum Subject<'a> {
    /// This process.
    Itself,
    /// Other processes, which come and go, and their sockets towards these peers.
    Others(&'a Peers),
}

/// The loaded program with everything that user space touches. Dropping it detaches the programs and frees the maps.
pub(super) struct Loaded {
    /// Keeps the programs attached.
    _ebpf: Ebpf,
    pub(super) logger: EbpfLogger<ToTracing>,
    /// The walks that find the tagged sockets: one, or several that only together do.
    pub(super) sweeps: Vec<OwnedFd>,
    /// Tags are kept by cookie.
    pub(super) by_cookie: bool,
    /// The program that walks descriptors.
    pub(super) descriptors: OwnedFd,
    /// The kernel can walk the descriptors of one task only (Linux 6.1), and need not walk those of all.
    pub(super) walks_one: bool,
    pub(super) records: RecordArray,
    pub(super) pass: Array<MapData, PassHeader>,
    pub(super) adopt: HashMap<MapData, u64, u8>,
    pub(super) targets: HashMap<MapData, u32, u8>,
    pub(super) walk: Array<MapData, Whom>,
    pub(super) counters: PerCpuArray<MapData, u64>,
    /// Descriptors of the tag programs, for their statistics.
    pub(super) tag_programs: [RawFd; 2],
}

/// Loads and attaches.
///
/// # Errors
/// Each says which privilege or which feature of the kernel is missing.
pub(super) fn load(subject: Subject<'_>, max_sockets: u32) -> Result<Loaded, ViewError> {
    match load_with(subject, max_sockets, Tags::InStorage) {
        // Some hardened kernels let no program walk the storage of sockets, whatever its privileges.
        Err(refused @ ViewError::NotOffered { .. }) => match load_with(subject, max_sockets, Tags::ByCookie) {
            Ok(loaded) => {
                tracing::info!(%refused, "tags are kept by cookie, and found by walking all descriptors, which costs more");
                Ok(loaded)
            }
            Err(error) => {
                tracing::debug!(%error, "keeping tags by cookie is not possible either");
                Err(refused)
            }
        },
        loaded => loaded,
    }
}

/// Where the programs keep the tags of sockets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tags {
    /// With the socket itself: they die with it.
    InStorage,
    /// In a table of their own.
    ByCookie,
}

/// Room for tags: more than a sweep has for sockets, as one too many there is counted, and one too many here is lost.
fn cookies(max_sockets: u32) -> u32 {
    const AT_LEAST: u32 = 4096;
    max_sockets.saturating_mul(2).max(AT_LEAST)
}

fn load_with(subject: Subject<'_>, max_sockets: u32, tags: Tags) -> Result<Loaded, ViewError> {
    let object = OBJECT.ok_or(ViewError::NotBuilt)?;
    let raw = fs::read(VMLINUX).map_err(|cause| ViewError::NoBtf { path: VMLINUX, cause })?;
    let offsets = field_offsets(&KernelTypes::parse(&raw)?)?;
    let btf = Btf::parse(&raw, Default::default())
        .map_err(|error| failed("reading the kernel's type information", &error))?;
    drop(raw);
    let owner = owner(subject, max_sockets, tags)?;
    let peers = match subject {
        Subject::Itself => 1,
        // A map of none is refused.
        Subject::Others(peers) => u32::try_from(peers.len()).unwrap_or(u32::MAX).max(1),
    };
    let mut ebpf = EbpfLoader::new()
        .btf(Some(&btf))
        .override_global(names::FIELD_OFFSETS, &offsets, true)
        .override_global(names::OWNER, &owner, true)
        .map_max_entries(names::RECORDS, max_sockets)
        .map_max_entries(names::ADOPT, max_sockets)
        .map_max_entries(names::COOKIES, if tags == Tags::ByCookie { cookies(max_sockets) } else { 1 })
        .map_max_entries(names::PEERS, peers)
        .load(object)
        .map_err(object_error)?;
    // The logger's map must be taken before the programs are loaded, and live as long as they do.
    let logger = EbpfLogger::init_with_logger(&mut ebpf, ToTracing).map_err(|error| abi(&error))?;
    let sweeps: &[(&str, &str)] = match tags {
        Tags::InStorage => &[(names::SWEEP_PROGRAM, names::SWEEP_ITERATOR)],
        Tags::ByCookie => &names::SWEEP_IN_PARTS,
    };
    for (name, iterator) in sweeps {
        load_iterator(&mut ebpf, name, iterator, &btf)?;
    }
    let descriptors = load_iterator(&mut ebpf, names::DESCRIPTORS_PROGRAM, names::DESCRIPTORS_ITERATOR, &btf)?;
    // Before the programs that read them are attached.
    if let Subject::Others(peers) = subject {
        let map = ebpf.map_mut(names::PEERS).ok_or_else(|| abi(&format!("no map {}", names::PEERS)))?;
        let mut map: HashMap<_, Peer, u8> = HashMap::try_from(map).map_err(|error| abi(&error))?;
        for peer in peers.keys() {
            map.insert(peer, 1, 0).map_err(|error| abi(&chain(&error)))?;
        }
    }
    let by_cookie = tags == Tags::ByCookie;
    if by_cookie {
        attach_tracepoint(&mut ebpf, names::FORGET_PROGRAM, names::FORGET_TRACEPOINT, &btf)?;
    }
    let mut tag = |name| attach_tracepoint(&mut ebpf, name, names::TAG_TRACEPOINT, &btf);
    let tag_programs = [tag(names::TAG_PROGRAMS[0])?, tag(names::TAG_PROGRAMS[1])?];

    let storage = take(&mut ebpf, names::TAGS)?;
    let Map::SkStorage(storage) = storage else { return Err(abi(&"TAGS is no socket storage")) };
    let walk = if by_cookie { Walk::Everything } else { Walk::Map(storage.fd().as_fd()) };
    let sweeps = sweeps.iter().map(|(name, _)| iterator_link(&ebpf, name, walk)).collect::<Result<_, _>>()?;
    let walks_one = iterator_link(&ebpf, descriptors, Walk::Task(std::process::id())).is_ok();
    if !walks_one {
        iterator_link(&ebpf, descriptors, Walk::Everything)?;
    }
    let descriptors = iterator(&ebpf, descriptors)?
        .try_clone_to_owned()
        .map_err(ViewError::io("duplicating the descriptor of a program"))?;

    let records = take(&mut ebpf, names::RECORDS)?;
    let Map::Array(records) = records else { return Err(abi(&"RECORDS is no array")) };
    let records = RecordArray::new(records.fd().as_fd(), max_sockets as usize)
        .map_err(ViewError::io("mapping the array of sockets"))?;
    Ok(Loaded {
        logger,
        sweeps,
        by_cookie,
        descriptors,
        walks_one,
        records,
        pass: Array::try_from(take(&mut ebpf, names::PASS)?).map_err(|error| abi(&error))?,
        adopt: HashMap::try_from(take(&mut ebpf, names::ADOPT)?).map_err(|error| abi(&error))?,
        targets: HashMap::try_from(take(&mut ebpf, names::TARGETS)?).map_err(|error| abi(&error))?,
        walk: Array::try_from(take(&mut ebpf, names::WALK)?).map_err(|error| abi(&error))?,
        counters: PerCpuArray::try_from(take(&mut ebpf, names::COUNTERS)?).map_err(|error| abi(&error))?,
        tag_programs,
        _ebpf: ebpf,
    })
}

/// Looks up every field that the eBPF program reads, with the size that it reads.
fn field_offsets(types: &KernelTypes<'_>) -> Result<FieldOffsets, ViewError> {
    let common = |member: &str, size| types.offset("sock", &format!("__sk_common.{member}"), size);
    let tcp = |member, size| types.offset("tcp_sock", member, size);
    Ok(FieldOffsets {
        family: common("skc_family", 2)?,
        state: common("skc_state", 1)?,
        remote_port: common("skc_dport", 2)?,
        remote_v4: common("skc_daddr", 4)?,
        local_v4: common("skc_rcv_saddr", 4)?,
        remote_v6: common("skc_v6_daddr", 16)?,
        local_v6: common("skc_v6_rcv_saddr", 16)?,
        net: common("skc_net", 8)?,
        protocol: types.offset("sock", "sk_protocol", 2)?,
        socket: types.offset("sock", "sk_socket", 8)?,
        socket_file: types.offset("socket", "file", 8)?,
        file_inode: types.offset("file", "f_inode", 8)?,
        inode_number: types.offset("inode", "i_ino", 8)?,
        net_inode: types.offset("net", "ns.inum", 4)?,
        socket_sk: types.offset("socket", "sk", 8)?,
        task_tgid: types.offset("task_struct", "tgid", 4)?,
        local_port: tcp("inet_conn.icsk_inet.inet_sport", 2)?,
        received_ticks: tcp("inet_conn.icsk_ack.lrcvtime", 4)?,
        sent_ticks: tcp("lsndtime", 4)?,
        bytes_sent: tcp("bytes_sent", 8)?,
        bytes_received: tcp("bytes_received", 8)?,
        rcv_nxt: tcp("rcv_nxt", 4)?,
        copied_seq: tcp("copied_seq", 4)?,
        cookie: common("skc_cookie", 8)?,
    })
}

/// Whose sockets these are, as the eBPF program recognises them: this process by its id in its own pid namespace.
fn owner(subject: Subject<'_>, max_records: u32, tags: Tags) -> Result<Owner, ViewError> {
    let namespace = fs::metadata("/proc/self/ns/pid").map_err(ViewError::io("reading /proc/self/ns/pid"))?;
    let (major, minor) = (rustix::fs::major(namespace.dev()), rustix::fs::minor(namespace.dev()));
    Ok(Owner {
        // The kernel's own encoding of a device differs from that of stat(2).
        pidns_device: u64::from(major) << 20 | u64::from(minor),
        pidns_inode: namespace.ino(),
        tgid: std::process::id(),
        max_records,
        beside: u32::from(matches!(subject, Subject::Others(_))),
        by_cookie: u32::from(tags == Tags::ByCookie),
    })
}

fn attach_tracepoint(
    ebpf: &mut Ebpf,
    name: &'static str,
    tracepoint: &'static str,
    btf: &Btf,
) -> Result<RawFd, ViewError> {
    let program: &mut BtfTracePoint = ebpf
        .program_mut(name)
        .ok_or_else(|| abi(&format!("no program {name}")))?
        .try_into()
        .map_err(|error: ProgramError| abi(&error))?;
    program.load(tracepoint, btf).map_err(|error| program_error(name, &error))?;
    program.attach().map_err(|error| program_error(name, &error))?;
    Ok(program.fd().map_err(|error| program_error(name, &error))?.as_fd().as_raw_fd())
}

fn load_iterator(
    ebpf: &mut Ebpf,
    name: &'static str,
    iterator: &'static str,
    btf: &Btf,
) -> Result<&'static str, ViewError> {
    let program: &mut Iter = ebpf
        .program_mut(name)
        .ok_or_else(|| abi(&format!("no program {name}")))?
        .try_into()
        .map_err(|error: ProgramError| abi(&error))?;
    program.load(iterator, btf).map_err(|error| program_error(name, &error))?;
    Ok(name)
}

fn iterator<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<BorrowedFd<'a>, ViewError> {
    let program: &Iter = ebpf
        .program(name)
        .ok_or_else(|| abi(&format!("no program {name}")))?
        .try_into()
        .map_err(|error: ProgramError| abi(&error))?;
    Ok(program.fd().map_err(|error| program_error(name, &error))?.as_fd())
}

fn iterator_link(ebpf: &Ebpf, name: &'static str, walk: Walk<'_>) -> Result<OwnedFd, ViewError> {
    sys::iterator_link(iterator(ebpf, name)?, walk)
        .map_err(|error| failed(&format!("attaching the iterator `{name}`"), &error))
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map, ViewError> {
    ebpf.take_map(name).ok_or_else(|| abi(&format!("no map {name}")))
}

fn abi(detail: &dyn std::fmt::Display) -> ViewError {
    ViewError::Abi { object: detail.to_string(), program: ABI_VERSION }
}

/// Maps are created and the object's own types are loaded here; the programs are not.
fn object_error(error: EbpfError) -> ViewError {
    match &error {
        // A global or a section of another version of the object.
        EbpfError::ParseError(_) | EbpfError::MapError(MapError::InvalidValueSize { .. }) => abi(&chain(&error)),
        _ => failed("creating the eBPF maps", &error),
    }
}

fn program_error(name: &str, error: &ProgramError) -> ViewError {
    let what = format!("loading the eBPF program `{name}`");
    match error {
        // The verifier refuses with EACCES as well; only its log tells a refused program from a missing privilege.
        ProgramError::LoadError { io_error, verifier_log } if !verifier_log.to_string().trim().is_empty() => {
            ViewError::NotOffered { what, detail: format!("{io_error}; verifier: {}", tail(&verifier_log.to_string())) }
        }
        error => failed(&what, error),
    }
}

/// A missing privilege if the kernel said so anywhere down the chain, else a missing feature.
fn failed(what: &str, error: &(dyn Error + 'static)) -> ViewError {
    let mut source = Some(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::PermissionDenied
        {
            return ViewError::NotPermitted { what: what.to_owned(), obstacle: capability::obstacle() };
        }
        source = cause.source();
    }
    ViewError::NotOffered { what: what.to_owned(), detail: chain(error) }
}

/// The last lines of a verifier's log: the reason is there.
fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(4)..].join(" | ")
}

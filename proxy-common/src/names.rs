//! Names of programs, maps and globals in the eBPF object.
//!
//! A static's name is fixed by the source that defines it; `proxy-ebpf` asserts nothing about these, but loading fails at
//! once if one is wrong.

/// The two identical programs on `inet_sock_set_state`. If the kernel skips a run of one (it does so when the same program is
/// already running on that CPU), the other may still run.
pub const TAG_PROGRAMS: [&str; 2] = ["tag_first", "tag_second"];
/// The tracepoint they attach to.
pub const TAG_TRACEPOINT: &str = "inet_sock_set_state";
/// Iterator over all tagged sockets.
pub const SWEEP_PROGRAM: &str = "sweep";
/// Its kind, without the kernel's prefix `bpf_iter_`.
pub const SWEEP_ITERATOR: &str = "bpf_sk_storage_map";
/// Iterators that together find the tagged sockets where tags are kept by cookie, and their kinds: over all descriptors, and
/// over the TCP tables.
pub const SWEEP_IN_PARTS: [(&str, &str); 2] = [("sweep_files", "task_file"), ("sweep_tables", "tcp")];
/// The program that forgets the tag of a socket that is no more, where tags are kept by cookie.
pub const FORGET_PROGRAM: &str = "forget";
/// The tracepoint that it attaches to.
pub const FORGET_TRACEPOINT: &str = "tcp_destroy_sock";
/// Iterator over the descriptors of one process.
pub const DESCRIPTORS_PROGRAM: &str = "descriptors";
/// Its kind.
pub const DESCRIPTORS_ITERATOR: &str = "task_file";

/// Socket storage: a [`SocketTag`](crate::SocketTag) on each socket that the process, or a watched one, connected.
pub const TAGS: &str = "TAGS";
/// Hash map of the same tags by cookie, where the kernel lets no program walk socket storage.
pub const COOKIES: &str = "COOKIES";
/// Array that a sweep fills with [`SocketRecord`](crate::SocketRecord)s.
pub const RECORDS: &str = "RECORDS";
/// Array of one [`PassHeader`](crate::PassHeader).
pub const PASS: &str = "PASS";
/// Hash set of cookies that the next descriptor pass shall tag.
pub const ADOPT: &str = "ADOPT";
/// Hash set of the ids (in the initial pid namespace) of the processes that are watched; empty in a view of the own process.
pub const TARGETS: &str = "TARGETS";
/// Hash set of the [`Peer`](crate::Peer)s whose connections are counted; empty in a view of the own process.
pub const PEERS: &str = "PEERS";
/// Array of one [`Walk`](crate::Walk).
pub const WALK: &str = "WALK";
/// Per-CPU array of [`Counter`](crate::Counter)s.
pub const COUNTERS: &str = "COUNTERS";

/// Constant: [`FieldOffsets`](crate::FieldOffsets) of the running kernel.
pub const FIELD_OFFSETS: &str = "FIELD_OFFSETS";
/// Constant: [`Owner`](crate::Owner).
pub const OWNER: &str = "OWNER";

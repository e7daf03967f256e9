//! The kernel view of other processes: beside them, without their help.
//!
//! A watcher counts only connections towards the peers that it was given, and only of the processes that it was told to
//! watch. They may live in other network and pid namespaces, end, and come back.
//!
//! Whose a socket is, if several processes hold it, because they were forked or were handed it: it is one socket. To eBPF
//! its owner is the process that connected it, as long as that lives, whoever else holds it. Once that has ended, or if eBPF
//! did not see the connecting, it is the oldest watched process that has a descriptor of it. A socket that only others hold,
//! after its owner has ended, is not counted any more. Without eBPF only descriptors tell: a socket that a watched process
//! has connected, and that only others still hold, is not seen.

mod crosscheck;
mod diag;
mod ebpf;
mod namespace;
mod process;
mod who;

pub use process::Process;
pub use who::Who;

pub(super) use diag::DiagBeside;
pub(super) use ebpf::EbpfBeside;
pub(super) use who::holder_of;

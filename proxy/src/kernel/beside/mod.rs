//! The kernel view of other processes: beside them, without their help.
//!
//! A watcher counts only connections towards the peers that it was given, and only of the processes that it was told to
//! watch. They may live in other network and pid namespaces, end, and come back.
//!
//! Whose a socket is: it is watched as long as a watched process holds a descriptor of it. If several do, because they were
//! forked or were handed it, it is one socket, and the oldest of them is named as its owner.

mod diag;
mod namespace;
mod process;
mod who;

pub use process::Process;
pub use who::Who;

pub(super) use diag::DiagBeside;

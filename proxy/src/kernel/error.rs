//! What can go wrong with a kernel view, each with what to do about it.

use std::error::Error;
use std::io;

use thiserror::Error as ThisError;

/// Why a kernel view cannot be had or read.
#[derive(Debug, ThisError)]
pub enum ViewError {
    /// `[kernel] view = "none"`.
    #[error("the kernel view is off (`kernel.view = \"none\"`)")]
    Off,
    /// The program holds no eBPF object.
    #[error("this program was built without its eBPF object; build it with `cargo xtask build-and-run`")]
    NotBuilt,
    /// The kernel describes its types nowhere.
    #[error(
        "the kernel's type information {path} cannot be read: {cause}; eBPF needs Linux 5.15 or later (this is {}) with \
         CONFIG_DEBUG_INFO_BTF=y, and sysfs mounted on /sys",
        super::capability::release()
    )]
    NoBtf {
        /// The file.
        path: &'static str,
        /// Why.
        cause: io::Error,
    },
    /// The type information is damaged, or lacks what the eBPF program reads.
    #[error("the kernel's type information: {0}")]
    Btf(super::btf::BtfError),
    /// A capability is missing, or something else forbids eBPF.
    #[error("{what}: not permitted: {obstacle}")]
    NotPermitted {
        /// What was tried.
        what: String,
        /// What is in the way, and what to do about it.
        obstacle: String,
    },
    /// The kernel does not offer something or refuses the program.
    #[error(
        "{what}: {detail}; eBPF needs Linux 5.15 or later (this is {}) with CONFIG_BPF_SYSCALL=y, CONFIG_BPF_EVENTS=y and \
         CONFIG_NET=y: boot such a kernel, or set `kernel.view = \"sock-diag\"`",
        super::capability::release()
    )]
    NotOffered {
        /// What was tried.
        what: String,
        /// The kernel's words, with the end of the verifier's log if there is one.
        detail: String,
    },
    /// The object and this program were not built together.
    #[error(
        "the eBPF object has ABI {object}, this program {program}; build both together with `cargo xtask build-and-run`"
    )]
    Abi {
        /// Version that the object reports, or what does not fit.
        object: String,
        /// Version of this program.
        program: u32,
    },
    /// A pass of the iterator did not come to its end.
    #[error("reading {what}: {detail}")]
    Incomplete {
        /// What was read.
        what: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// `sock_diag` cannot be asked.
    #[error("{what}: {cause}; {remedy}")]
    NoSockDiag {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        cause: io::Error,
        /// What is missing, and what to do about it.
        remedy: &'static str,
    },
    /// There is no process to watch.
    #[error(
        "there is no process with id {pid}; it has ended, or this process cannot see it (another pid namespace; /proc \
         mounted with `hidepid`, which CAP_SYS_PTRACE overcomes)"
    )]
    NoProcess {
        /// Its id.
        pid: u32,
    },
    /// Another process may not be looked at.
    #[error(
        "the {what} of process {pid} cannot be read: {cause}; unless it runs as the same user with no more capabilities, \
         this takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH: grant them by `AmbientCapabilities=CAP_SYS_PTRACE \
         CAP_DAC_READ_SEARCH` in a systemd unit, or `setcap cap_sys_ptrace,cap_dac_read_search+ep PROGRAM`"
    )]
    Unreadable {
        /// Its id.
        pid: u32,
        /// What of it.
        what: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// Another network namespace may not be entered.
    #[error(
        "the network namespace of process {pid} cannot be entered: {cause}; that takes CAP_SYS_ADMIN: grant it by \
         `AmbientCapabilities=CAP_SYS_ADMIN` in a systemd unit, or start the watch inside that namespace (`nsenter --net \
         --target {pid}`)"
    )]
    NotEntered {
        /// A process that lives there.
        pid: u32,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// No cgroup version 2.
    #[error(
        "no cgroup2 file system is mounted, so no cgroup can be watched; mount one (`mount -t cgroup2 none \
         /sys/fs/cgroup/unified`), or watch by name or process id"
    )]
    NoCgroups,
    /// A system call failed.
    #[error("{what}: {cause}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// Netlink's answer makes no sense.
    #[error("sock_diag: {0}")]
    Netlink(String),
}

impl From<super::btf::BtfError> for ViewError {
    fn from(error: super::btf::BtfError) -> Self {
        Self::Btf(error)
    }
}

impl ViewError {
    pub(super) const fn unreadable(pid: u32, what: &'static str, cause: io::Error) -> Self {
        Self::Unreadable { pid, what, cause }
    }

    pub(super) const fn not_entered(pid: u32, cause: io::Error) -> Self {
        Self::NotEntered { pid, cause }
    }

    /// For `map_err` on a system call.
    pub(super) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { what, cause }
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

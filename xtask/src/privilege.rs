//! What this process may do.

use std::process::Command;

use anyhow::{Context as _, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::command;

/// Capabilities that matter here: bit in `CapEff` (capabilities(7)), name, and what there is not without it.
pub(crate) const CAPABILITIES: &[(u32, &str, &str)] = &[
    (39, "CAP_BPF", "no eBPF: the kernel view comes from sock_diag"),
    (38, "CAP_PERFMON", "no eBPF: the kernel view comes from sock_diag"),
    (12, "CAP_NET_ADMIN", "no SOCK_DESTROY: the reaper's last rung is missing"),
    (21, "CAP_SYS_ADMIN", "no mounts, and so no root for the tests to run in, and no network namespaces"),
];

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub(crate) fn has_sudo() -> bool {
    command::output(Command::new("sudo").arg("--version")).is_ok()
}

/// The effective capabilities as the bit set that the kernel shows.
pub(crate) fn effective_capabilities() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    parse_effective_capabilities(&status).context("no CapEff in /proc/self/status")
}

fn parse_effective_capabilities(status: &str) -> Option<u64> {
    let field = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(field.trim(), 16).ok()
}

/// Soft and hard limit of open descriptors; `None` is unlimited.
pub(crate) fn descriptor_limit() -> (Option<u64>, Option<u64>) {
    let limit = getrlimit(Resource::Nofile);
    (limit.current, limit.maximum)
}

/// Raises the soft limit of open descriptors to the hard one, for us and all that we start.
pub(crate) fn raise_descriptor_limit() -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).context("cannot raise the limit of descriptors")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_as_the_kernel_writes_them() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t000001fffeffffff\nCapBnd:\t0\n";
        assert_eq!(parse_effective_capabilities(status), Some(0x1ff_feff_ffff));
        assert_eq!(parse_effective_capabilities("Name:\tx\n"), None);
        assert_eq!(parse_effective_capabilities("CapEff:\tx\n"), None);
    }
}

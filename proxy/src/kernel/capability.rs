//! Which of the capabilities that eBPF needs this process lacks.

use std::fs;

const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;
const CAP_SYS_ADMIN: u32 = 21;

/// In words for an error message.
pub(super) fn missing_for_ebpf() -> String {
    match fs::read_to_string("/proc/thread-self/status") {
        Ok(status) => match effective(&status) {
            Some(set) => missing(set),
            None => "an unknown set".to_owned(),
        },
        Err(error) => format!("an unknown set: /proc/thread-self/status: {error}"),
    }
}

fn effective(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

fn missing(set: u64) -> String {
    let has = |capability: u32| set >> capability & 1 == 1;
    if has(CAP_SYS_ADMIN) {
        return "neither".to_owned();
    }
    match (has(CAP_BPF), has(CAP_PERFMON)) {
        (true, true) => "neither".to_owned(),
        (false, true) => "CAP_BPF".to_owned(),
        (true, false) => "CAP_PERFMON".to_owned(),
        (false, false) => "both".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_effective_set() {
        assert_eq!(effective("Name:\tx\nCapPrm:\t0\nCapEff:\t000000c000000000\n"), Some(0xc0_0000_0000));
        assert_eq!(effective("Name:\tx\n"), None);
    }

    #[test]
    fn names_what_is_missing() {
        assert_eq!(missing(0), "both");
        assert_eq!(missing(1 << CAP_BPF), "CAP_PERFMON");
        assert_eq!(missing(1 << CAP_PERFMON), "CAP_BPF");
        assert_eq!(missing(1 << CAP_PERFMON | 1 << CAP_BPF), "neither");
        assert_eq!(missing(1 << CAP_SYS_ADMIN), "neither");
    }
}

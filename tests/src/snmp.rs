//! What the kernel counts of a network namespace: `/proc/net/snmp` and `/proc/net/netstat`.

/// The counter of this name in the calling thread's network namespace; its group is what its lines begin with, such as `Tcp` or
/// `TcpExt`.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn counter(group: &str, name: &str) -> u64 {
    let read =
        |file: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).expect("the kernel's counts");
    let text = read("snmp") + &read("netstat");
    let ours = |line| str::strip_prefix(line, group)?.strip_prefix(": ");
    let mut lines = text.lines().filter_map(ours).map(str::split_whitespace);
    let found =
        lines.next().zip(lines.next()).and_then(|(names, values)| names.zip(values).find(|(it, _)| *it == name));
    found.and_then(|(_, value)| value.parse().ok()).unwrap_or_else(|| panic!("no counter {group} {name}"))
}

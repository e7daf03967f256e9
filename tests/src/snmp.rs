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

/// Pages of memory that all TCP sockets of the machine have in their buffers.
///
/// # Panics
/// If the kernel does not say.
pub fn tcp_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/net/sockstat").expect("the kernel's counts");
    let line = text.lines().find_map(|line| line.strip_prefix("TCP: ")).unwrap_or_default();
    let value = line.split_whitespace().skip_while(|word| *word != "mem").nth(1);
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no memory of TCP in {text}"))
}

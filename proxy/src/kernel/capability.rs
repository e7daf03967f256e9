//! Why the kernel does not permit eBPF, in a sentence that says what to do.

use std::fs;

/// The capabilities that loading and attaching the programs takes, by their bits (capabilities(7)).
const NEEDED: [(u32, &str); 2] = [(39, "CAP_BPF"), (38, "CAP_PERFMON")];
/// Includes both.
const CAP_SYS_ADMIN: u32 = 21;

/// What the kernel says of this thread and of itself; a text that cannot be read is empty.
struct Facts {
    /// `/proc/thread-self/status`
    status: String,
    /// `/proc/self/uid_map`
    uid_map: String,
    /// `/sys/kernel/security/lockdown`
    lockdown: String,
}

/// What is in the way, and what to do about it.
pub(super) fn obstacle() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    Facts {
        status: read("/proc/thread-self/status"),
        uid_map: read("/proc/self/uid_map"),
        lockdown: read("/sys/kernel/security/lockdown"),
    }
    .obstacle()
}

/// The release of the running kernel, such as `6.1.0-28-amd64`.
pub(super) fn release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if release.is_empty() { "an unknown one".to_owned() } else { release.trim().to_owned() }
}

impl Facts {
    fn obstacle(&self) -> String {
        let lacks = self.lacking("CapEff:");
        if !lacks.is_empty() {
            return self.how_to_get(&lacks);
        }
        if self.in_user_namespace() {
            return "this process has CAP_BPF and CAP_PERFMON in a user namespace only, and the kernel asks for them in the \
                    initial one; start it outside (systemd: no `PrivateUsers=`; containers: no user namespace)"
                .to_owned();
        }
        if self.lockdown.contains("[confidentiality]") {
            return "the kernel is in lockdown mode `confidentiality`, in which eBPF may not read its memory; boot it with \
                    `lockdown=integrity`"
                .to_owned();
        }
        if self.field("Seccomp:") == Some("2") {
            return "this process has CAP_BPF and CAP_PERFMON, but is under a seccomp filter; let that allow bpf(2) (systemd: \
                    `SystemCallFilter=bpf`; containers: their seccomp profile)"
                .to_owned();
        }
        "this process has CAP_BPF and CAP_PERFMON; a security module (SELinux, AppArmor) forbids it all the same, and the \
         audit log says which rule"
            .to_owned()
    }

    fn how_to_get(&self, lacks: &[&str]) -> String {
        let spaced = lacks.join(" ");
        let these = format!("eBPF needs CAP_BPF and CAP_PERFMON, and this process lacks {}", lacks.join(" and "));
        // What is not in the bounding set cannot be had by any means from inside.
        if self.lacking("CapBnd:").is_empty() {
            let files = lacks.join(",").to_lowercase();
            format!(
                "{these}; grant it by `AmbientCapabilities={spaced}` in a systemd unit, or `setcap {files}+ep PROGRAM`"
            )
        } else {
            let docker: Vec<_> = lacks.iter().map(|name| name.replace("CAP_", "--cap-add ")).collect();
            format!(
                "{these}, and may not get it, as its bounding set is without; let whoever starts it grant it \
                 (`CapabilityBoundingSet=` and `AmbientCapabilities=` with {spaced} in a systemd unit, `{}` for a container)",
                docker.join(" ")
            )
        }
    }

    /// Which of the needed capabilities are not in this set.
    fn lacking(&self, set: &str) -> Vec<&'static str> {
        let bits = self.field(set).and_then(|value| u64::from_str_radix(value, 16).ok()).unwrap_or(0);
        let has = |bit: u32| bits >> bit & 1 == 1 || bits >> CAP_SYS_ADMIN & 1 == 1;
        NEEDED.iter().filter(|(bit, _)| !has(*bit)).map(|(_, name)| *name).collect()
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
    }

    /// The initial user namespace maps every user to itself.
    fn in_user_namespace(&self) -> bool {
        let fields: Vec<_> = self.uid_map.split_whitespace().collect();
        !fields.is_empty() && fields != ["0", "0", "4294967295"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INITIAL: &str = "         0          0 4294967295\n";
    const ALL: &str = "000001ffffffffff";

    fn facts(effective: &str, bounding: &str) -> Facts {
        let status = format!("Name:\tx\nCapPrm:\t0\nCapEff:\t{effective}\nCapBnd:\t{bounding}\nSeccomp:\t0\n");
        Facts { status, uid_map: INITIAL.to_owned(), lockdown: "none [integrity] confidentiality\n".to_owned() }
    }

    fn says(facts: &Facts, all: &[&str]) {
        let text = facts.obstacle();
        assert!(all.iter().all(|part| text.contains(part)), "{text}");
    }

    #[test]
    fn names_what_is_missing_and_how_to_get_it() {
        says(
            &facts("0", ALL),
            &[
                "lacks CAP_BPF and CAP_PERFMON;",
                "`AmbientCapabilities=CAP_BPF CAP_PERFMON`",
                "`setcap cap_bpf,cap_perfmon+ep ",
            ],
        );
        says(&facts("0000004000000000", ALL), &["lacks CAP_BPF;"]);
        says(&facts("0000008000000000", ALL), &["lacks CAP_PERFMON;"]);
        says(
            &facts("0000008000000000", "0000008000000000"),
            &["lacks CAP_PERFMON,", "`--cap-add PERFMON`", "Bounding"],
        );
    }

    #[test]
    fn with_both_something_else_is_in_the_way() {
        for set in ["000000c000000000", "0000000000200000"] {
            says(&facts(set, ALL), &["security module"]);
        }
        let confidential = Facts { lockdown: "none integrity [confidentiality]\n".to_owned(), ..facts(ALL, ALL) };
        says(&confidential, &["lockdown=integrity"]);
        let namespace = Facts { uid_map: "         0       1000          1\n".to_owned(), ..facts(ALL, ALL) };
        says(&namespace, &["user namespace only"]);
        let mut filtered = facts(ALL, ALL);
        filtered.status = filtered.status.replace("Seccomp:\t0", "Seccomp:\t2");
        says(&filtered, &["seccomp filter", "bpf(2)"]);
    }

    #[test]
    fn unreadable_files_say_nothing_wrong() {
        let nothing = Facts { status: String::new(), uid_map: String::new(), lockdown: String::new() };
        says(&nothing, &["lacks CAP_BPF and CAP_PERFMON"]);
        assert!(!nothing.in_user_namespace());
    }

    #[test]
    fn the_release_is_that_of_this_kernel() {
        assert!(release().starts_with(|first: char| first.is_ascii_digit()), "{}", release());
    }
}

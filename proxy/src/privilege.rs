//! The capabilities of this process: it starts with what binding its sockets and loading the eBPF programs takes, and
//! gives up all that it can before it serves anybody.
//!
//! Capabilities belong to a thread, and the threads that it starts inherit them. So the main thread first keeps what the
//! watchdog needs ([`keep_for_watchdog`]), starts the watchdog's thread, and then gives up the rest ([`drop_all`]): every
//! thread that comes later has none.

use anyhow::{Context as _, Result};
use rustix::process::geteuid;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

use crate::config::ReapMode;
use crate::kernel::{KernelView, Source};

/// What reading the view may take, from nothing to all that loading it took: Linux asks for CAP_BPF in every call of bpf(2)
/// before 5.19, and not any more since then. CAP_SYS_ADMIN includes the others.
const VIEW: [CapabilitySet; 3] = [
    CapabilitySet::empty(),
    CapabilitySet::BPF,
    CapabilitySet::BPF.union(CapabilitySet::PERFMON).union(CapabilitySet::SYS_ADMIN),
];

/// Looking into processes of other users: into `/proc/PID/fd` (CAP_DAC_READ_SEARCH), and at what is behind its links
/// (CAP_SYS_PTRACE).
const OTHERS: CapabilitySet = CapabilitySet::SYS_PTRACE.union(CapabilitySet::DAC_READ_SEARCH);

/// Those that can be kept, by their names of capabilities(7).
const NAMES: [(CapabilitySet, &str); 6] = [
    (CapabilitySet::DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
    (CapabilitySet::BPF, "CAP_BPF"),
    (CapabilitySet::PERFMON, "CAP_PERFMON"),
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
];

/// No program that this process starts can have more privileges than itself (PR_SET_NO_NEW_PRIVS, prctl(2)): not by set-uid
/// bits, not by file capabilities, nor by being root. Threads that are started later inherit it.
///
/// # Errors
/// The kernel or a seccomp filter refuses.
pub fn forbid_new() -> Result<()> {
    set_no_new_privs(true).context("prctl(PR_SET_NO_NEW_PRIVS) is refused; a seccomp filter must allow prctl(2)")
}

/// Gives up, in this thread, all capabilities but those that the watchdog needs from now on. What the view needs is tried
/// with the view itself: it is the kernel's word that counts.
///
/// # Errors
/// The kernel or a seccomp filter refuses.
pub fn keep_for_watchdog(view: &mut dyn KernelView, reap: ReapMode) -> Result<()> {
    let permitted = capabilities(None).context("capget(2)")?.permitted;
    let source = view.source();
    let for_view = match source {
        Source::Ebpf => needed_to_read(view, permitted, CapabilitySet::empty())?,
        Source::SockDiag | Source::None => CapabilitySet::empty(),
    };
    let for_reaper = needed_to_reap(source, reap);
    if !permitted.contains(for_reaper) {
        tracing::warn!(
            lacks = "CAP_NET_ADMIN",
            "the reaper has no SOCK_DESTROY: it closes what a worker owns, but cannot sever an orphan nor what withstands \
             shutdown(2); grant CAP_NET_ADMIN (systemd: `AmbientCapabilities=`), or set `watchdog.reap = \"dry-run\"`"
        );
    }
    let kept = (for_view | for_reaper) & permitted;
    let user = geteuid().as_raw();
    tracing::info!(user, kept = words(kept), why = why(for_view & kept, for_reaper & kept), "privileges");
    limit(kept, kept)
}

/// Like [`keep_for_watchdog`], for a watch beside other processes. `elsewhere`: one of them lives in another network
/// namespace, so the next one may as well, and has to be followed there (CAP_SYS_ADMIN).
///
/// # Errors
/// The kernel or a seccomp filter refuses.
pub fn keep_for_watch(view: &mut dyn KernelView, reap: ReapMode, elsewhere: bool) -> Result<()> {
    let permitted = capabilities(None).context("capget(2)")?.permitted;
    let source = view.source();
    let follow = if elsewhere { OTHERS | CapabilitySet::SYS_ADMIN } else { OTHERS };
    let for_view = match source {
        Source::Ebpf => needed_to_read(view, permitted, follow)?,
        Source::SockDiag | Source::None => follow & permitted,
    };
    let for_reaper = needed_to_reap(source, reap);
    if !permitted.contains(for_reaper) {
        tracing::warn!(
            lacks = "CAP_NET_ADMIN",
            "nothing can be severed, as SOCK_DESTROY is not permitted; grant CAP_NET_ADMIN (systemd: \
             `AmbientCapabilities=`), or watch without --reap"
        );
    }
    let kept = (for_view | for_reaper) & permitted;
    let user = geteuid().as_raw();
    tracing::info!(user, kept = words(kept), why = "for the watchdog's thread only", "privileges");
    limit(kept, kept)
}

/// Gives up, in this thread, all capabilities.
///
/// # Errors
/// The kernel or a seccomp filter refuses.
pub fn drop_all() -> Result<()> {
    limit(CapabilitySet::empty(), CapabilitySet::empty())
}

/// Does something as a thread does that has given up all capabilities.
///
/// # Errors
/// No thread can be started, or the kernel or a seccomp filter refuses.
pub fn without<T: Send>(done: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || drop_all().map(|()| done()))?;
        thread.join().map_err(|_| anyhow::anyhow!("a thread without capabilities has panicked"))?
    })
}

/// The least of [`VIEW`], with `always`, with which the view can be read.
fn needed_to_read(view: &mut dyn KernelView, permitted: CapabilitySet, always: CapabilitySet) -> Result<CapabilitySet> {
    let mut needed = CapabilitySet::empty();
    for set in VIEW {
        needed = (set | always) & permitted;
        limit(needed, permitted)?;
        match view.crosscheck() {
            Ok(_) => return Ok(needed),
            Err(error) => tracing::debug!(%error, with = words(needed), "reading the kernel view"),
        }
    }
    // It is not for lack of capabilities that it fails; the watchdog will say what is wrong.
    Ok(needed)
}

/// Without a view nothing is reaped, and otherwise only if that is configured.
fn needed_to_reap(source: Source, reap: ReapMode) -> CapabilitySet {
    if reap == ReapMode::On && source != Source::None { CapabilitySet::NET_ADMIN } else { CapabilitySet::empty() }
}

/// Sets what this thread may do now and may ever do again. Nothing is left to inherit, the ambient set included.
fn limit(effective: CapabilitySet, permitted: CapabilitySet) -> Result<()> {
    let wanted = CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() };
    if capabilities(None).context("capget(2)")? == wanted {
        return Ok(());
    }
    set_capabilities(None, wanted).context("capabilities cannot be given up; a seccomp filter must allow capset(2)")
}

fn words(set: CapabilitySet) -> String {
    let names: Vec<_> = NAMES.iter().filter(|(one, _)| set.contains(*one)).map(|(_, name)| *name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(" ") }
}

fn why(for_view: CapabilitySet, for_reaper: CapabilitySet) -> String {
    let mut reasons = Vec::new();
    if !for_view.is_empty() {
        reasons.push(format!("{}: this kernel asks for it when the view is read", words(for_view)));
    }
    if !for_reaper.is_empty() {
        reasons.push(format!("{}: SOCK_DESTROY, as `watchdog.reap` is \"on\"", words(for_reaper)));
    }
    match reasons.is_empty() {
        true => "nothing that is left to do takes one".to_owned(),
        false => format!("for the watchdog's thread only; {}", reasons.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;
    use crate::kernel::{Crosscheck, KernelSnapshot, ViewError};

    /// A view that can be read with certain capabilities only.
    struct Strict(CapabilitySet);

    impl KernelView for Strict {
        fn source(&self) -> Source {
            Source::Ebpf
        }

        fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
            Err(ViewError::Off)
        }

        fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
            let effective = capabilities(None).unwrap().effective;
            if effective.contains(self.0) { Ok(Crosscheck::default()) } else { Err(ViewError::Off) }
        }
    }

    /// On a thread of its own, as what is given up never comes back. The tests run with these capabilities or with none.
    fn kept(mut view: Strict, reap: ReapMode) -> (CapabilitySet, CapabilitySets, CapabilitySets) {
        std::thread::spawn(move || {
            let before = capabilities(None).unwrap().permitted;
            keep_for_watchdog(&mut view, reap).unwrap();
            let after = capabilities(None).unwrap();
            let later = std::thread::spawn(|| capabilities(None).unwrap()).join().unwrap();
            assert_eq!(after, later, "threads inherit it");
            drop_all().unwrap();
            (before, after, capabilities(None).unwrap())
        })
        .join()
        .unwrap()
    }

    #[test]
    fn the_least_that_works_is_kept() {
        for (needs, reap, keeps) in [
            (CapabilitySet::empty(), ReapMode::DryRun, CapabilitySet::empty()),
            (CapabilitySet::empty(), ReapMode::On, CapabilitySet::NET_ADMIN),
            (CapabilitySet::BPF, ReapMode::Off, CapabilitySet::BPF),
            (CapabilitySet::PERFMON, ReapMode::On, VIEW[2] | CapabilitySet::NET_ADMIN),
        ] {
            let (before, after, last) = kept(Strict(needs), reap);
            let none = CapabilitySet::empty();
            let keeps = keeps & before;
            assert_eq!(after, CapabilitySets { effective: keeps, permitted: keeps, inheritable: none });
            assert_eq!(last, CapabilitySets { effective: none, permitted: none, inheritable: none });
        }
    }

    #[test]
    fn what_is_done_without_capabilities_leaves_them_to_others() {
        let before = capabilities(None).unwrap();
        let meanwhile = without(|| capabilities(None).unwrap()).unwrap();
        assert!(meanwhile.effective.is_empty() && meanwhile.permitted.is_empty());
        assert_eq!(capabilities(None).unwrap(), before);
    }

    #[test]
    fn a_watch_keeps_what_it_takes_to_look_into_others() {
        for (needs, reap, elsewhere, keeps) in [
            (CapabilitySet::empty(), ReapMode::DryRun, false, OTHERS),
            (CapabilitySet::BPF, ReapMode::On, false, OTHERS | CapabilitySet::BPF | CapabilitySet::NET_ADMIN),
            (CapabilitySet::empty(), ReapMode::DryRun, true, OTHERS | CapabilitySet::SYS_ADMIN),
        ] {
            let (before, after) = std::thread::spawn(move || {
                let before = capabilities(None).unwrap().permitted;
                keep_for_watch(&mut Strict(needs), reap, elsewhere).unwrap();
                (before, capabilities(None).unwrap())
            })
            .join()
            .unwrap();
            let keeps = keeps & before;
            let inheritable = CapabilitySet::empty();
            assert_eq!(after, CapabilitySets { effective: keeps, permitted: keeps, inheritable });
        }
    }

    #[test]
    fn what_is_kept_is_said_with_its_reason() {
        let (none, bpf, net) = (CapabilitySet::empty(), CapabilitySet::BPF, CapabilitySet::NET_ADMIN);
        assert_eq!(words(none), "none");
        assert_eq!(words(bpf | net), "CAP_BPF CAP_NET_ADMIN");
        assert_eq!(why(none, none), "nothing that is left to do takes one");
        assert!(why(bpf, net).contains("CAP_BPF: ") && why(bpf, net).contains("CAP_NET_ADMIN: SOCK_DESTROY"));
    }

    #[test]
    fn nothing_is_kept_for_a_reaper_that_does_nothing() {
        assert!(needed_to_reap(Source::Ebpf, ReapMode::DryRun).is_empty());
        assert!(needed_to_reap(Source::None, ReapMode::On).is_empty());
        assert_eq!(needed_to_reap(Source::SockDiag, ReapMode::On), CapabilitySet::NET_ADMIN);
    }
}

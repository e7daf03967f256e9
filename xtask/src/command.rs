//! Starting other programs: what they inherit, and what is said when they fail.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The variable by which the program's build finds the compiled eBPF object.
pub(crate) const EBPF_OBJECT: &str = "COUNTERFOIL_EBPF_OBJECT";

/// What `cargo run` tells xtask about xtask. It must not reach another cargo: build scripts would see it.
const OF_XTASK: &[&str] = &["CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_CRATE_NAME", "CARGO_BIN_", "LD_LIBRARY_PATH"];

/// What steers a compiler. None of it is meant for another compiler and another target.
const OF_COMPILER: &[&str] = &[
    "RUSTC",
    "RUSTDOC",
    "RUSTFLAGS",
    "CLIPPY_",
    "CARGO_BUILD_",
    "CARGO_ENCODED_",
    "CARGO_INCREMENTAL",
    "CARGO_PROFILE_",
    "CARGO_TARGET_",
    "CARGO_UNSTABLE_",
];

/// The cargo that runs xtask, for the user-space workspace: the user's compiler settings hold.
pub(crate) fn cargo() -> Command {
    let mut command = program(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.env_remove(EBPF_OBJECT);
    command
}

/// A program that does not see what cargo set for xtask.
pub(crate) fn program(name: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(name);
    remove_prefixed(&mut command, OF_XTASK);
    command
}

/// Hides the user's compiler settings from `command`.
pub(crate) fn without_compiler_settings(command: &mut Command) -> &mut Command {
    remove_prefixed(command, OF_COMPILER);
    command
}

fn remove_prefixed(command: &mut Command, prefixes: &[&str]) {
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| prefixes.iter().any(|prefix| name.starts_with(prefix))) {
            command.env_remove(&name);
        }
    }
}

/// Says what is being done. Everything xtask says goes to stderr; stdout is the program's.
pub(crate) fn say(message: impl std::fmt::Display) {
    eprintln!("xtask: {message}");
}

/// Runs `command` with our own stdio. Fails with the command line if it does not exit with 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", line(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", line(command));
    }
    Ok(())
}

/// Runs `command` and returns its stdout. Its stderr is in the error if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", line(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}: {}", line(command), output.status, stderr.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} answered in other than UTF-8", line(command)))
}

/// The command line, for messages.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    format!("`{}`", words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::collections::BTreeSet;

    use super::*;
    use crate::{tidy, workspace};

    /// Programs of this machine that are started by name, and why they may be: a Debian with nothing but what README.md asks
    /// for has them, or the command that wants them says so. All others are those of the root in tools.rs.
    const OF_THIS_MACHINE: &[(&str, &str)] = &[
        ("apt-cache", "apt, which every Debian has: kernels"),
        ("apt-get", "apt"),
        ("cat", "coreutils, which is essential: a unit test"),
        ("cc", "asked for: gcc"),
        ("dpkg", "essential"),
        ("dpkg-deb", "dpkg, which is essential"),
        ("git", "for the name of what is measured; may be missing"),
        ("perf", "for bench; may be missing"),
        ("printf", "coreutils, which is essential: a unit test"),
        ("rustup", "asked for; may be missing"),
        ("sh", "dash, which is essential: unit tests"),
        ("sudo", "only where the user is not root"),
        ("tar", "essential"),
    ];

    /// What xtask and the tests of the program name behind one of these; `root.program("...")` is another matter.
    #[test]
    fn programs_of_this_machine_are_few() {
        const BEHIND: [&str; 4] = ["Command::new(\"", "command::program(\"", "apt.command(\"", "self.command(\""];
        let mut named = BTreeSet::new();
        for path in tidy::sources().unwrap() {
            let place = path.strip_prefix(workspace::root()).unwrap();
            // Of those, the tests of the harness say more.
            if place.starts_with("tests") {
                continue;
            }
            let source = std::fs::read_to_string(&path).unwrap();
            for behind in BEHIND {
                let names = source.split(behind).skip(1).filter_map(|rest| rest.split('"').next());
                named.extend(names.map(str::to_owned));
            }
        }
        let listed: BTreeSet<String> = OF_THIS_MACHINE.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(named, listed);
    }

    #[test]
    fn failure_names_the_command_and_its_stderr() {
        let error = output(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains("exit status: 3") && error.contains("broken"), "{error}");
    }

    #[test]
    fn success_returns_stdout() {
        assert_eq!(output(Command::new("printf").arg("a b")).unwrap(), "a b");
    }

    #[test]
    fn compiler_settings_are_hidden() {
        // `cargo test` sets CARGO_MANIFEST_DIR for this very process.
        let listed = output(&mut program("env")).unwrap();
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        assert!(!listed.lines().any(|line| line.starts_with("CARGO_MANIFEST_DIR=")), "{listed}");
    }
}

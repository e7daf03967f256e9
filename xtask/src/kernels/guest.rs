//! What runs inside an emulated machine, and what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::archive::Archive;
use super::image::Image;
use crate::command::{self, EBPF_OBJECT, say};
use crate::tools::Root;
use crate::workspace;

/// Tests of one test program, by their full names. Each must pass.
pub(super) struct Suite {
    program: &'static str,
    tests: &'static [&'static str],
}

/// On kernels with all that the eBPF view needs.
pub(super) const EBPF: &[Suite] = &[
    Suite {
        program: "kernel_view",
        tests: &[
            "ebpf_sees_every_state",
            "sock_diag_sees_the_same_states",
            "both_views_agree",
            "accepted_sockets_are_not_outgoing",
            "an_unheld_socket_is_told_from_a_held_one",
            "a_socket_that_was_never_connected_is_taken_up",
            "destroying_severs_exactly_that_socket",
        ],
    },
    Suite {
        program: "kernel_beside",
        tests: &[
            "ebpf_sees_into_other_namespaces",
            "a_restart_is_followed_by_name_and_not_by_id",
            "states::ebpf_sees_every_state_and_family",
        ],
    },
    Suite {
        program: "exactness",
        tests: &["emulated_ledger_and_kernel_agree", "emulated_forgetful_ledger_is_found_out"],
    },
    Suite {
        program: "drills",
        tests: &[
            "each_class_is_found_and_reaped",
            "a_deaf_owner_is_climbed_past",
            "a_neglected_connection_is_reaped_by_its_worker",
            "in_dry_run_nothing_is_touched",
            "a_hanging_worker_is_reported_and_nothing_of_it_is_reaped",
        ],
    },
    Suite {
        program: "faults_emulated",
        tests: &["f49_the_memory_of_tcp_is_used_up", "f52_delay_reordering_and_corruption"],
    },
];

/// On kernels that are too old for it.
pub(super) const FALLBACK: &[Suite] = &[
    Suite { program: "kernel_view", tests: &["sock_diag_sees_the_same_states", "the_view_that_is_off_knows_nothing"] },
    Suite {
        program: "kernel_beside",
        tests: &["sock_diag_sees_into_other_namespaces", "states::sock_diag_sees_every_state_and_family"],
    },
    Suite {
        program: "fallback",
        tests: &[
            "an_old_kernel_gets_the_fallback_and_the_reason",
            "sock_diag_sees_the_same_sockets",
            "sock_diag_reaps_a_zombie",
            "sock_diag_reports_an_orphan_and_leaves_it",
            "no_view_is_said_and_forwards",
        ],
    },
];

/// What the tests start. The scenarios find it beside themselves.
const UNDER_TEST: &str = "counterfoil-under-test";

/// Of the root that the tests run in elsewhere: the shell and the like, what tests start children with, and what they know
/// such a root by.
const BUSYBOX: &str = "/bin/busybox";
const SETPRIV: &str = "/usr/bin/setpriv";
const NAME: &str = "/etc/debian_chroot";
/// The loader, which tells what a program needs.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// Begins what our own init says; everything else is the tests' or the kernel's.
const MARK: &str = "counterfoil-guest: ";

/// The test programs and what they test, without debugging information: with it they are ten times as large.
pub(super) struct Programs(BTreeMap<String, PathBuf>);

impl Programs {
    /// Builds all that any suite needs and leaves it in `directory`.
    pub(super) fn build(object: &Path, root: &Root, directory: &Path) -> Result<Self> {
        let tests: BTreeSet<_> = EBPF.iter().chain(FALLBACK).map(|suite| suite.program).collect();
        let mut cargo = command::cargo();
        // The whole workspace, as `cargo xtask test` builds it: else Cargo would build it twice, with other features.
        cargo
            .args(["test", "--locked", "--workspace", "--no-run", "--message-format=json"])
            .current_dir(workspace::root());
        cargo.args(tests.iter().flat_map(|test| ["--test", test])).env(EBPF_OBJECT, object);
        say("building the tests");
        let built = executables(&command::output(&mut cargo)?);
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let mut programs = BTreeMap::new();
        for name in tests.into_iter().chain([UNDER_TEST]) {
            let program = built.get(name).with_context(|| format!("cargo built no {name}"))?;
            let stripped = directory.join(name);
            let mut strip = root.program("strip");
            command::output(strip.args(["--strip-debug", "-o"]).arg(&stripped).arg(program))?;
            programs.insert(name.to_owned(), stripped);
        }
        Ok(Self(programs))
    }
}

/// Name and path of each program in what `cargo --message-format=json` says.
fn executables(messages: &str) -> BTreeMap<String, PathBuf> {
    #[derive(serde::Deserialize)]
    struct Message {
        target: Target,
        executable: Option<PathBuf>,
    }
    #[derive(serde::Deserialize)]
    struct Target {
        name: String,
    }
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    artifacts.filter_map(|artifact| Some((artifact.target.name, artifact.executable?))).collect()
}

/// The whole file system of a guest that runs `suites`.
pub(super) fn file_system(suites: &[Suite], programs: &Programs, image: &Image, root: &Root) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["/dev", "/proc", "/sys", "/tmp", "/run"] {
        archive.directory(directory);
    }
    archive.executable(BUSYBOX, &read(&root.path(BUSYBOX))?);
    archive.link("/bin/sh", "busybox");
    archive.executable(NAME, &read(&root.path(NAME))?);
    archive.executable("/bin/setpriv", &read(&root.path(SETPRIV))?);
    for (name, program) in &programs.0 {
        archive.executable(Path::new("/bin").join(name), &read(program)?);
    }
    for program in programs.0.values().map(PathBuf::as_path).chain([Path::new(SETPRIV)]) {
        for library in libraries(program, root)? {
            archive.executable(&library, &read(&root.path(&library))?);
        }
    }
    for module in &image.modules {
        let name = module.file_name().context("a module has a name")?;
        archive.executable(Path::new("/modules").join(name), &read(module)?);
    }
    archive.executable("/init", init(suites, image).as_bytes());
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The shared libraries of a program and its loader, where the loader looks for them in the root.
fn libraries(program: &Path, root: &Root) -> Result<Vec<PathBuf>> {
    let listed = command::output(root.program(LOADER).arg("--list").arg(program))?;
    let words = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(words.map(PathBuf::from).collect())
}

/// The guest's first process: prepares what every Linux has, runs the suites, switches off.
fn init(suites: &[Suite], image: &Image) -> String {
    let mut script = "#!/bin/sh
export PATH=/bin RUST_BACKTRACE=0
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t tmpfs tmp /tmp
busybox mount -t tmpfs run /run
busybox ip link set lo up
"
    .to_owned();
    for name in image.modules.iter().filter_map(|module| module.file_name()) {
        script += &format!("busybox insmod /modules/{}\n", name.display());
    }
    script += &format!("ulimit -n 65536\necho \"{MARK}release $(busybox uname -r)\"\n");
    for Suite { program, tests } in suites {
        // One at a time, as the tests wait for things that a busy processor delays. --include-ignored: some are for
        // these machines only.
        let _ = write!(
            script,
            "echo '{MARK}run {program}'\n{program} --test-threads=1 --show-output --include-ignored --exact {}\n\
             echo \"{MARK}end {program} $?\"\n",
            tests.join(" ")
        );
    }
    script += &format!("echo '{MARK}done'\nbusybox poweroff -f\n");
    script
}

/// What a guest has said so far.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    release: Option<String>,
    running: Option<String>,
    passed: BTreeSet<(String, String)>,
    /// Exit codes of the test programs.
    ended: BTreeMap<String, String>,
    done: bool,
}

impl Transcript {
    /// Takes the next line of the console; what of it is worth showing.
    pub(super) fn read<'a>(&mut self, line: &'a str) -> Option<&'a str> {
        // What the BIOS said last stands in front of our first line.
        if let Some((_, said)) = line.split_once(MARK) {
            let mut words = said.split_whitespace().map(str::to_owned);
            match (words.next().as_deref(), words.next(), words.next()) {
                (Some("release"), release, _) => self.release = release,
                (Some("run"), program, _) => self.running = program,
                (Some("end"), Some(program), Some(code)) => {
                    self.running = None;
                    self.ended.insert(program, code);
                }
                (Some("done"), ..) => self.done = true,
                _ => {}
            }
            return Some(said);
        }
        let program = self.running.as_ref()?;
        if let Some(test) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... ok")) {
            self.passed.insert((program.clone(), test.to_owned()));
        }
        (!line.trim().is_empty()).then_some(line)
    }

    /// The kernel's release and the number of tests, if all of `suites` passed.
    pub(super) fn verdict(&self, suites: &[Suite]) -> Result<(String, usize)> {
        let Some(release) = &self.release else { bail!("the kernel did not come as far as our init") };
        let mut wrong = Vec::new();
        for Suite { program, tests } in suites {
            match self.ended.get(*program).map(String::as_str) {
                Some("0") => {}
                Some(code) => wrong.push(format!("{program} ended with {code}")),
                None => wrong.push(format!("{program} did not end")),
            }
            let passed = |test: &str| self.passed.contains(&((*program).to_owned(), test.to_owned()));
            wrong.extend(
                tests.iter().filter(|test| !passed(test)).map(|test| format!("{program}: {test} did not pass")),
            );
        }
        if !self.done {
            wrong.push("the machine stopped before the end".to_owned());
        }
        if !wrong.is_empty() {
            bail!("Linux {release}: {}", wrong.join("; "));
        }
        Ok((release.clone(), self.passed.len()))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    const SUITES: &[Suite] = &[Suite { program: "drills", tests: &["zombie", "hoard"] }];

    fn verdict(lines: &[&str]) -> Result<(String, usize)> {
        let mut transcript = Transcript::default();
        for line in lines {
            transcript.read(line);
        }
        transcript.verdict(SUITES)
    }

    #[test]
    fn every_expected_test_must_pass() {
        let good = [
            "SeaBIOS",
            "oc[2Jcounterfoil-guest: release 6.1.0",
            "counterfoil-guest: run drills",
            "test zombie ... ok",
            "test hoard ... ok",
            "counterfoil-guest: end drills 0",
            "counterfoil-guest: done",
        ];
        assert_eq!(verdict(&good).unwrap(), ("6.1.0".to_owned(), 2));
        for left_out in 1..good.len() {
            let lines: Vec<_> =
                good.iter().enumerate().filter(|(at, _)| *at != left_out).map(|(_, line)| *line).collect();
            assert!(verdict(&lines).is_err(), "without {:?}", good[left_out]);
        }
        for (at, bad) in
            [(3, "test zombie ... FAILED"), (4, "test hoard ... ignored"), (5, "counterfoil-guest: end drills 101")]
        {
            let mut lines = good;
            lines[at] = bad;
            let error = verdict(&lines).unwrap_err().to_string();
            assert!(error.contains("drills"), "{error}");
        }
    }

    #[test]
    fn cargo_s_messages_name_the_programs() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"drills","kind":["test"]},"executable":"/t/drills-1"}
{"reason":"compiler-artifact","target":{"name":"serde","kind":["lib"]},"executable":null}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executables(messages), BTreeMap::from([("drills".to_owned(), PathBuf::from("/t/drills-1"))]));
    }
}

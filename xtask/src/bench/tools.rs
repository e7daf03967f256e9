//! The programs of a benchmark: ours, built in release mode, and the peers from Debian.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::Arguments;
use super::certificate::Certificate;
use super::subject::Subject;
use crate::command::{self, EBPF_OBJECT, say};
use crate::tools::Root;
use crate::{ebpf, workspace};

/// Our own, of the package `counterfoil-tests`.
const OWN: [&str; 5] = ["loadgen", "relay", "answerer", "attacker", "certificate"];

pub(super) struct Tools {
    target: PathBuf,
    counterfoil: PathBuf,
    /// An older build of it.
    before: Option<PathBuf>,
    /// Has HAProxy and dnsdist, if they are among the subjects.
    root: Option<Root>,
    certificate: Certificate,
}

impl Tools {
    /// Builds and gets what `subjects` need.
    pub(super) fn get(arguments: &Arguments, subjects: &[Subject], cost: bool) -> Result<Self> {
        let (given, no_ebpf) = (arguments.counterfoil.as_deref(), arguments.no_ebpf);
        let target = workspace::target()?;
        let release = target.join("release");
        let wants_ours = cost || subjects.contains(&Subject::Counterfoil);
        let object = if cost || wants_ours && given.is_none() && !no_ebpf { Some(ebpf::object()?) } else { None };
        let build = |arguments: &[&str]| {
            let mut cargo = command::cargo();
            cargo.args(["build", "--quiet", "--locked", "--release"]).args(arguments).current_dir(workspace::root());
            if let Some(object) = &object {
                cargo.env(EBPF_OBJECT, object);
            }
            command::run(&mut cargo)
        };
        say("load generator, relay and answerer: building in release mode");
        let own = OWN.map(|name| ["--bin", name]);
        build(&[&["--package", "counterfoil-tests"], own.as_flattened()].concat())?;
        let certificate = Certificate::make(&mut Command::new(release.join("certificate")))?;
        if cost {
            say("the eBPF view's cost: building");
            build(&["--package", "counterfoil-tests", "--bin", "kernel_cost"])?;
        }
        let absolute = |program: &Path| fs::canonicalize(program).with_context(|| program.display().to_string());
        let counterfoil = given.map_or_else(|| Ok(release.join("counterfoil")), absolute)?;
        let before = arguments.before.as_deref().map(absolute).transpose()?;
        if wants_ours && given.is_none() {
            say(if no_ebpf { "Counterfoil: building in release mode, without eBPF" } else { "Counterfoil: building" });
            build(&["--package", "counterfoil", "--bin", "counterfoil"])?;
        }
        let wants_peers = subjects.iter().any(|subject| matches!(subject, Subject::Haproxy | Subject::Dnsdist));
        let root = wants_peers.then(|| Root::get(&target)).transpose()?;
        Ok(Self { target, counterfoil, before, root, certificate })
    }

    /// The same for every subject that speaks TLS.
    pub(super) fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Counterfoil, of the build that `subject` names.
    pub(super) fn counterfoil(&self, subject: Subject) -> Command {
        let before = self.before.as_ref().filter(|_| subject == Subject::Before);
        Command::new(before.unwrap_or(&self.counterfoil))
    }

    /// `loadgen`, `relay`, `answerer`, `attacker` or `kernel_cost`.
    pub(super) fn own(&self, name: &str) -> Command {
        Command::new(self.target.join("release").join(name))
    }

    /// A peer's program.
    pub(super) fn peer(&self, name: &str) -> Result<Command> {
        Ok(self.root.as_ref().context("no scenario asks for this program")?.program(name))
    }

    /// The first line of what a peer says of its version.
    pub(super) fn version(&self, name: &str, option: &str) -> String {
        let said = self.peer(name).and_then(|mut peer| command::output(peer.arg(option)));
        let said = said.unwrap_or_else(|error| format!("{error:#}"));
        said.lines().next().unwrap_or_default().to_owned()
    }
}

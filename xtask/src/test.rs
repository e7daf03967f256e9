//! `cargo xtask test`.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::command::{self, EBPF_OBJECT, say};
use crate::tools::Root;
use crate::{ebpf, kernels, privilege, workspace};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run only the tests whose name contains this
    filter: Option<String>,
    /// Leave the eBPF program out; tests that need it fail
    #[arg(long)]
    no_ebpf: bool,
    /// Test only this package
    #[arg(long, short)]
    package: Option<String>,
    /// For the test programs, such as `--test-threads=1` or `--nocapture`
    #[arg(last = true)]
    args: Vec<String>,
}

impl Arguments {
    /// Nothing was left out, so the emulated machines belong to it.
    fn is_all(&self) -> bool {
        self.filter.is_none() && self.package.is_none() && !self.no_ebpf
    }
}

/// Kernels that `cargo xtask test` boots; the others take `cargo xtask soak`.
const KERNELS_IN_CI: [&str; 1] = ["6.1"];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let cargo = Cargo::prepare(arguments.no_ebpf, arguments.package.clone())?;
    let filter = arguments.filter.as_deref();
    if let Some(filter) = filter {
        cargo.require_a_test(filter, &[])?;
    }
    let here = command::run(cargo.test().args(["--no-fail-fast", "--"]).args(filter).args(&arguments.args));
    // Whatever became of those.
    if arguments.is_all() { kernels::boot(&KERNELS_IN_CI, false).and(here) } else { here }
}

/// How to call cargo once everything that the tests need is here.
pub(crate) struct Cargo {
    environment: Vec<(String, std::ffi::OsString)>,
    package: Option<String>,
}

impl Cargo {
    /// For one package, or for all of them.
    pub(crate) fn prepare(no_ebpf: bool, package: Option<String>) -> Result<Self> {
        let root = Root::get(&workspace::target()?)?;
        let mut environment = Vec::new();
        if no_ebpf {
            say("eBPF object: left out (--no-ebpf)");
        } else {
            environment.push((EBPF_OBJECT.to_owned(), ebpf::object()?.into()));
        }
        privilege::raise_descriptor_limit()?;
        if privilege::is_root() {
            command::output(&mut root.program("true")).context(
                "the tests run in a root of their own, for which mounts are made: a container needs CAP_SYS_ADMIN for it",
            )?;
        } else if privilege::has_sudo() {
            say("not root: the test programs are started by sudo");
        } else {
            bail!("the tests load eBPF programs and make network namespaces: run them as root, or install sudo");
        }
        Ok(Self { environment, package })
    }

    pub(crate) fn test(&self) -> Command {
        let mut command = command::cargo();
        command.args(["test", "--locked"]).current_dir(workspace::root()).envs(self.environment.iter().cloned());
        match &self.package {
            Some(package) => command.args(["--package", package]),
            None => command.arg("--workspace"),
        };
        command
    }

    /// A run of no test passes, says cargo. Not here.
    pub(crate) fn require_a_test(&self, filter: &str, options: &[&str]) -> Result<()> {
        let listed = command::output(self.test().args(["--quiet", "--", "--list", filter]).args(options))?;
        if !listed.lines().any(|line| line.ends_with(": test")) {
            bail!("no test has `{filter}` in its name");
        }
        Ok(())
    }
}

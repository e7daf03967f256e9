//! A kernel of Debian's: found by what apt offers in a suite, unpacked, not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::Kernel;
use crate::command::{self, say};
use crate::tools::Root;
use crate::workspace;

/// The package that depends on a suite's newest kernel for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";

/// Packages that a kernel consists of: one until Debian 13, split in several after it.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];

/// What `sock_diag` of TCP needs, in the order of loading, and netem, for links in trouble.
const MODULES: [&str; 3] = ["inet_diag", "tcp_diag", "sch_netem"];

/// Debian's keys. Where the file is missing, apt's own are used.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What a machine boots.
pub(super) struct Image {
    /// Name and version of Debian's package.
    pub(super) package: String,
    pub(super) vmlinuz: PathBuf,
    /// In the order of loading.
    pub(super) modules: Vec<PathBuf>,
}

impl Image {
    /// The kernel in `directory`; fetched if it is not there, or if an update is asked for.
    pub(super) fn get(directory: &Path, kernel: &Kernel, update: bool, tools: &Root) -> Result<Self> {
        let stamp = directory.join("package");
        let modules = MODULES.map(|name| directory.join(format!("{name}.ko"))).to_vec();
        // One that was fetched before a module was wanted lacks it.
        if update || !stamp.exists() || !modules.iter().all(|module| module.exists()) {
            let _lock = workspace::lock(&workspace::target()?)?;
            let package = fetch(directory, kernel, tools).with_context(|| format!("no kernel {}", kernel.name))?;
            fs::write(&stamp, package).with_context(|| format!("cannot write {}", stamp.display()))?;
        }
        let package = fs::read_to_string(&stamp).with_context(|| format!("cannot read {}", stamp.display()))?;
        Ok(Self { package, vmlinuz: directory.join("vmlinuz"), modules })
    }
}

/// Fills `directory` with a kernel and its modules; its package's name and version.
fn fetch(directory: &Path, kernel: &Kernel, tools: &Root) -> Result<String> {
    say(format_args!("{}: getting the kernel from Debian, below target/", kernel.name));
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    let (apt, root) = (Apt::new(&directory.join("apt"), kernel.sources)?, directory.join("root"));
    command::output(apt.command("apt-get").arg("update"))?;
    let (packages, version) = apt.kernel()?;
    command::output(apt.command("apt-get").arg("download").args(&packages).current_dir(apt.archives()))?;
    for archive in fs::read_dir(apt.archives()).with_context(|| apt.archives().display().to_string())? {
        let archive = archive?.path();
        if archive.extension().is_some_and(|extension| extension == "deb") {
            command::run(Command::new("dpkg").arg("-x").arg(&archive).arg(&root))?;
        }
    }
    // Of several copies of the same file any will do.
    let vmlinuz = find(&root, &|name| name.starts_with("vmlinuz"))?.context("no vmlinuz in its packages")?;
    fs::copy(&vmlinuz, directory.join("vmlinuz")).with_context(|| format!("cannot copy {}", vmlinuz.display()))?;
    for name in MODULES {
        let plain = format!("{name}.ko");
        let module =
            find(&root, &|file| file.strip_prefix(&plain).is_some_and(|rest| rest.is_empty() || rest == ".xz"))?;
        let module = module.with_context(|| format!("no module {name} in its packages"))?;
        let contents = if module.extension().is_some_and(|it| it == "xz") {
            decompress(&module, tools)
        } else {
            Ok(fs::read(&module)?)
        };
        fs::write(directory.join(&plain), contents?).with_context(|| format!("cannot write {plain}"))?;
    }
    for spent in [apt.0, root] {
        fs::remove_dir_all(&spent).with_context(|| format!("cannot remove {}", spent.display()))?;
    }
    Ok(format!("{} {version}", packages.first().map_or("", String::as_str)))
}

fn decompress(path: &Path, tools: &Root) -> Result<Vec<u8>> {
    let output = tools.program("xz").arg("-dc").arg(path).stdin(Stdio::null()).output().context("cannot start xz")?;
    if !output.status.success() {
        bail!("xz -dc {}: {}", path.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// A regular file below `directory` whose name is `wanted`.
fn find(directory: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry?;
        // Links are not followed: they may lead out of the folder.
        let kind = entry.file_type()?;
        let found = if kind.is_dir() {
            find(&entry.path(), wanted)?
        } else {
            (kind.is_file() && entry.file_name().to_str().is_some_and(wanted)).then(|| entry.path())
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// apt with sources, lists and caches of its own in a folder, and with nothing installed.
struct Apt(PathBuf);

impl Apt {
    fn new(directory: &Path, sources: &[&str]) -> Result<Self> {
        let apt = Self(directory.to_owned());
        for folder in ["lists/partial", "archives/partial"] {
            let folder = directory.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let options = if Path::new(KEYRING).exists() {
            format!("arch=amd64 signed-by={KEYRING}")
        } else {
            "arch=amd64".to_owned()
        };
        let sources: String = sources.iter().map(|source| format!("deb [{options}] {source}\n")).collect();
        for (file, contents) in [("sources.list", sources.as_str()), ("status", "")] {
            let file = directory.join(file);
            fs::write(&file, contents).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(apt)
    }

    fn archives(&self) -> PathBuf {
        self.0.join("archives")
    }

    fn command(&self, tool: &str) -> Command {
        let place = |name: &str| self.0.join(name).display().to_string();
        let mut command = command::program(tool);
        command.env("LC_ALL", "C").args(["--quiet", "--quiet"]);
        for option in [
            format!("Dir::Etc::SourceList={}", place("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State={}", self.0.display()),
            format!("Dir::State::lists={}", place("lists")),
            format!("Dir::State::status={}", place("status")),
            format!("Dir::Cache={}", self.0.display()),
            format!("Dir::Cache::archives={}", place("archives")),
            "Acquire::Languages=none".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            // A suite whose lists cannot be had is an error, not a warning.
            "APT::Update::Error-Mode=any".to_owned(),
            "Debug::NoLocking=true".to_owned(),
            // As root apt would fetch as `_apt`, who may not write below our target directory.
            "APT::Sandbox::User=root".to_owned(),
            // Docker's images clean the machine's cache after each call, which only root may.
            "APT::Update::Post-Invoke::=".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }

    /// The packages of the suites' newest kernel, the one with its name first, and its version.
    fn kernel(&self) -> Result<(Vec<String>, String)> {
        let mut packages = vec![NEWEST.to_owned()];
        let mut version = None;
        let mut next = 0;
        while let Some(package) = packages.get(next) {
            let shown = command::output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
            // The first package only points at the kernel, and its version may be another.
            if next == 1 {
                version = field(&shown, "Version").map(str::to_owned);
            }
            for part in parts(&shown) {
                if !packages.contains(&part) {
                    packages.push(part);
                }
            }
            next += 1;
        }
        packages.remove(0);
        let version = version.with_context(|| format!("{NEWEST} names no kernel"))?;
        Ok((packages, version))
    }
}

/// A field of what `apt-cache show` prints.
fn field<'a>(shown: &'a str, name: &str) -> Option<&'a str> {
    shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// The parts of a kernel that a package depends on.
fn parts(shown: &str) -> Vec<String> {
    let depends = field(shown, "Depends").unwrap_or_default();
    let names = depends.split(',').filter_map(|entry| entry.split_whitespace().next());
    names.filter(|name| PARTS.iter().any(|part| name.starts_with(part))).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_followed_to_its_parts() {
        let shown = "Package: linux-image-7.2.13+deb14-cloud-amd64\nVersion: 7.2.13-1\nDepends: dracut | initramfs-tools (>= 0.120), \
                     linux-base-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), linux-binary-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), \
                     linux-modules-7.2.13+deb14-cloud-amd64 (= 7.2.13-1)\nDescription: Linux\n";
        assert_eq!(field(shown, "Version"), Some("7.2.13-1"));
        assert_eq!(parts(shown), ["linux-binary-7.2.13+deb14-cloud-amd64", "linux-modules-7.2.13+deb14-cloud-amd64"]);
        assert!(parts("Package: linux-base\nDepends: libc6\n").is_empty());
    }
}

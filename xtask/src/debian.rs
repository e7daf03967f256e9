//! Debian packages without installing them: apt downloads, dpkg unpacks below `target/`.
//!
//! Needs no root and changes nothing on the machine: even package lists that must be fresher than the machine's are
//! fetched into a folder of our own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::command::{self, say};

/// What is unpacked besides the packages that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum With {
    /// Those of their dependencies that are not installed: programs that run among this machine's.
    Missing,
    /// All of their dependencies, as on a machine where nothing is installed: a root to run programs in.
    Everything,
}

/// What nobody reads below `target/`.
const LEFT_OUT: [&str; 3] = ["./usr/share/doc", "./usr/share/man", "./usr/share/locale"];

/// A folder with unpacked packages.
#[derive(Debug)]
pub(crate) struct Unpacked {
    directory: PathBuf,
}

/// Whether this machine has what [`Unpacked::get`] uses.
pub(crate) fn is_available() -> bool {
    ["apt-get", "dpkg"].iter().all(|tool| command::output(Command::new(tool).arg("--version")).is_ok())
}

impl Unpacked {
    /// The folder, if `packages` have been unpacked there before.
    pub(crate) fn cached(directory: &Path, packages: &[&str]) -> Option<Self> {
        let unpacked = Self { directory: directory.to_owned() };
        let stamp = fs::read_to_string(unpacked.stamp()).ok()?;
        (stamp == packages.join("\n")).then_some(unpacked)
    }

    /// Downloads and unpacks `packages` and what they depend on.
    pub(crate) fn get(directory: &Path, packages: &[&str], with: With) -> Result<Self> {
        if let Some(cached) = Self::cached(directory, packages) {
            return Ok(cached);
        }
        let unpacked = Self { directory: directory.to_owned() };
        if directory.exists() {
            fs::remove_dir_all(directory).with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        let archives = unpacked.download(packages, with)?;
        if with == With::Everything {
            merge_usr(&unpacked.root())?;
        }
        for archive in &archives {
            unpack(archive, &unpacked.root())?;
            fs::remove_file(archive).with_context(|| format!("cannot remove {}", archive.display()))?;
        }
        let apt = unpacked.apt_directory();
        fs::remove_dir_all(&apt).with_context(|| format!("cannot remove {}", apt.display()))?;
        let stamp = unpacked.stamp();
        fs::write(&stamp, packages.join("\n")).with_context(|| format!("cannot write {}", stamp.display()))?;
        Ok(unpacked)
    }

    /// What would be `/` had the packages been installed.
    pub(crate) fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Where the unpacked shared libraries are, as `LD_LIBRARY_PATH` wants it.
    pub(crate) fn library_path(&self) -> String {
        let root = self.root();
        self.library_directories()
            .into_iter()
            .map(|directory| root.join(directory).to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(":")
    }

    /// Debian's library directories, relative to a root. systemd has one of its own.
    pub(crate) fn library_directories(&self) -> [String; 4] {
        let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
        let systemd = format!("usr/lib/{triplet}/systemd");
        [format!("usr/lib/{triplet}"), format!("lib/{triplet}"), "usr/lib".to_owned(), systemd]
    }

    fn stamp(&self) -> PathBuf {
        self.directory.join("stamp")
    }

    fn apt_directory(&self) -> PathBuf {
        self.directory.join("apt")
    }

    /// The downloaded archives. Tries the machine's package lists first: they may be missing or stale.
    fn download(&self, packages: &[&str], with: With) -> Result<Vec<PathBuf>> {
        let (lists, archives) = (self.apt_directory().join("lists"), self.apt_directory().join("archives"));
        for directory in [&lists, &archives] {
            let partial = directory.join("partial");
            fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
        }
        fs::create_dir_all(self.root()).with_context(|| format!("cannot create {}", self.root().display()))?;

        let mut download = self.apt_get();
        if with == With::Everything {
            let status = self.apt_directory().join("status");
            fs::write(&status, "").with_context(|| format!("cannot write {}", status.display()))?;
            download.args(["-o", &format!("Dir::State::status={}", status.display())]);
        }
        download.args(["install", "--yes", "--download-only", "--no-install-recommends"]).args(packages);
        if command::output(&mut download).is_err() {
            say("this machine's package lists are missing or stale: fetching fresh ones, below target/ too");
            let own_lists = format!("Dir::State::lists={}", lists.display());
            command::output(self.apt_get().args(["-o", &own_lists, "update"]))?;
            command::output(download.args(["-o", &own_lists]))?;
        }
        let mut found = Vec::new();
        for entry in fs::read_dir(&archives).with_context(|| format!("cannot read {}", archives.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                found.push(path);
            }
        }
        if found.is_empty() {
            bail!("apt-get downloaded nothing for {}", packages.join(" "));
        }
        Ok(found)
    }

    /// apt-get with all that it writes below our own folder, and with no lock, as it installs nothing.
    fn apt_get(&self) -> Command {
        let apt = self.apt_directory();
        let mut command = command::program("apt-get");
        command.env("LC_ALL", "C").args(["--quiet", "--quiet"]);
        for option in [
            "Debug::NoLocking=true".to_owned(),
            // As root apt would fetch as `_apt`, who may not write below our target directory.
            "APT::Sandbox::User=root".to_owned(),
            format!("Dir::Cache={}", apt.display()),
            format!("Dir::Cache::archives={}", apt.join("archives").display()),
            // Docker's images clean the machine's cache after each call, which only root may.
            "APT::Update::Post-Invoke::=".to_owned(),
            "DPkg::Post-Invoke::=".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

/// Debian has /bin, /sbin and the like below /usr. The package that sees to it does so while it is configured.
fn merge_usr(root: &Path) -> Result<()> {
    for folder in ["bin", "sbin", "lib", "lib64"] {
        let (link, place) = (root.join(folder), Path::new("usr").join(folder));
        fs::create_dir_all(root.join(&place)).with_context(|| format!("cannot create {}", place.display()))?;
        symlink(&place, &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    Ok(())
}

/// As `dpkg -x` does, which replaces links to folders by folders.
fn unpack(archive: &Path, root: &Path) -> Result<()> {
    let mut packed = command::program("dpkg-deb");
    let mut packed = packed.arg("--fsys-tarfile").arg(archive).stdout(Stdio::piped()).spawn().context("dpkg-deb")?;
    let contents = packed.stdout.take().context("its output is piped")?;
    let mut tar = command::program("tar");
    tar.arg("--directory").arg(root).args(["--extract", "--keep-directory-symlink", "--no-same-owner"]);
    // Modes as in the package, for whoever unpacks it.
    tar.arg("--preserve-permissions").args(LEFT_OUT.map(|place| format!("--exclude={place}")));
    let unpacked = command::run(tar.stdin(contents)).with_context(|| format!("cannot unpack {}", archive.display()));
    let status = packed.wait().context("dpkg-deb")?;
    if !status.success() {
        bail!("dpkg-deb --fsys-tarfile {} ended with {status}", archive.display());
    }
    unpacked
}

//! Which processes are watched, and finding them.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::super::ViewError;
use super::process::{self, Process, Stat, is_gone};

/// Longest name that the kernel keeps of a program, bytes (TASK_COMM_LEN without its end).
const LONGEST_NAME: usize = 15;

/// Whom to watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// One process. When it ends, the watch ends: the id may be another's later.
    Pid(u32),
    /// Every process with this name, as in `/proc/PID/comm`: the kernel keeps the first 15 bytes of a program's name, and
    /// so many are compared. Never the watcher itself.
    Name(String),
    /// Every process of this cgroup (version 2) and of those below it: a path of the file system, or one as in
    /// `/proc/PID/cgroup`. Never the watcher itself.
    Cgroup(PathBuf),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "process {pid}"),
            Self::Name(name) => write!(f, "processes named `{name}`"),
            Self::Cgroup(path) => write!(f, "processes of cgroup {}", path.display()),
        }
    }
}

/// Finds the processes; they come and go.
#[derive(Debug)]
pub(super) enum Finder {
    /// This one only.
    One(Process),
    Named(Vec<u8>),
    /// A directory of a cgroup2 file system.
    In(PathBuf),
}

impl Finder {
    /// # Errors
    /// There is no such process, or no cgroup of version 2 at all.
    pub(super) fn new(who: &Who) -> Result<Self, ViewError> {
        Ok(match who {
            Who::Pid(pid) => Self::One(Stat::read(*pid)?.ok_or(ViewError::NoProcess { pid: *pid })?.process),
            Who::Name(name) => Self::Named(name.as_bytes().iter().copied().take(LONGEST_NAME).collect()),
            Who::Cgroup(path) => Self::In(cgroup_directory(path)?),
        })
    }

    /// All that are there now, the oldest first.
    pub(super) fn find(&self) -> Result<BTreeSet<Process>, ViewError> {
        let itself = std::process::id();
        match self {
            Self::One(process) => {
                let now = Stat::read(process.pid)?.map(|stat| stat.process);
                Ok(now.filter(|now| now == process).into_iter().collect())
            }
            Self::Named(name) => {
                let stats = all_pids()?.into_iter().filter(|pid| *pid != itself).map(Stat::read);
                let named = stats.filter_map(|stat| match stat {
                    Ok(Some(stat)) if stat.name == *name => Some(Ok(stat.process)),
                    Ok(_) => None,
                    Err(error) => Some(Err(error)),
                });
                named.collect()
            }
            Self::In(directory) => {
                let mut pids = BTreeSet::new();
                let what = "reading the cgroup's processes (cgroup.procs)";
                members(directory, &mut pids).map_err(ViewError::io(what))?;
                let stats = pids.into_iter().filter(|pid| *pid != itself).map(Stat::read);
                stats.filter_map(|stat| stat.map(|stat| stat.map(|stat| stat.process)).transpose()).collect()
            }
        }
    }
}

fn all_pids() -> Result<Vec<u32>, ViewError> {
    let what = "reading /proc";
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").map_err(ViewError::io(what))? {
        let name = entry.map_err(ViewError::io(what))?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(pids)
}

/// A process that has a descriptor of one of these sockets, and its name; of several the one with the smallest id.
pub(in crate::kernel) fn holder_of(inodes: &[u64]) -> Option<(u32, String)> {
    let mut pids = if inodes.is_empty() { Vec::new() } else { all_pids().ok()? };
    pids.sort_unstable();
    pids.into_iter().find_map(|pid| {
        let stat = Stat::read(pid).ok()??;
        let held = process::sockets(stat.process).ok()??;
        let name = || String::from_utf8_lossy(&stat.name).into_owned();
        inodes.iter().any(|inode| held.contains(inode)).then(|| (pid, name()))
    })
}

/// The processes of a cgroup and of all below it. One that is removed meanwhile, or not there yet, has none.
fn members(directory: &Path, pids: &mut BTreeSet<u32>) -> io::Result<()> {
    match fs::read_to_string(directory.join("cgroup.procs")) {
        // 0 stands for a process of another pid namespace.
        Ok(list) => pids.extend(list.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0)),
        Err(error) if is_vacant(&error) => return Ok(()),
        // A cgroup for threads: its processes are in the list of the nearest ordinary one above.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    let below = match fs::read_dir(directory) {
        Ok(below) => below,
        Err(error) if is_vacant(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in below {
        match entry.and_then(|entry| Ok((entry.file_type()?, entry.path()))) {
            Ok((kind, path)) if kind.is_dir() => members(&path, pids)?,
            Ok(_) => {}
            Err(error) if is_vacant(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_vacant(error: &io::Error) -> bool {
    is_gone(error) || error.raw_os_error() == Some(libc::ENODEV)
}

/// The directory of a cgroup, which need not exist yet.
fn cgroup_directory(path: &Path) -> Result<PathBuf, ViewError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(ViewError::io("reading /proc/self/mountinfo"))?;
    resolve(path, &cgroup_mounts(&mounts)).ok_or(ViewError::NoCgroups)
}

/// `None` if no cgroup2 file system is mounted.
fn resolve(path: &Path, mounts: &[PathBuf]) -> Option<PathBuf> {
    if mounts.iter().any(|mount| path.starts_with(mount)) {
        return Some(path.to_owned());
    }
    Some(mounts.first()?.join(path.strip_prefix("/").unwrap_or(path)))
}

/// Where cgroup2 is mounted (proc_pid_mountinfo(5)).
fn cgroup_mounts(mountinfo: &str) -> Vec<PathBuf> {
    let mount = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let is_cgroup2 = back.split(' ').next()? == "cgroup2";
        // Spaces are written as octal numbers.
        is_cgroup2.then(|| front.split(' ').nth(4).map(|path| PathBuf::from(path.replace("\\040", " "))))?
    };
    mountinfo.lines().filter_map(mount).collect()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn finds_where_cgroups_are() {
        let mountinfo = "\
23 31 0:21 / /proc rw,relatime shared:5 - proc proc rw
30 23 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:9 master:3 - cgroup2 cgroup2 rw
";
        let mounts = cgroup_mounts(mountinfo);
        assert_eq!(mounts, [PathBuf::from("/sys/fs/cgroup/uni fied")]);
        let at = |path: &str| resolve(Path::new(path), &mounts).unwrap().to_str().unwrap().to_owned();
        assert_eq!(at("/sys/fs/cgroup/uni fied/a/b"), "/sys/fs/cgroup/uni fied/a/b");
        assert_eq!(at("/system.slice/a.service"), "/sys/fs/cgroup/uni fied/system.slice/a.service");
        assert_eq!(at("a.slice"), "/sys/fs/cgroup/uni fied/a.slice");
        assert_eq!(resolve(Path::new("/a"), &[]), None);
    }

    #[test]
    fn a_process_is_found_by_its_id_and_never_by_its_own_name() {
        let itself = std::process::id();
        let found = Finder::new(&Who::Pid(itself)).unwrap().find().unwrap();
        assert_eq!(found.iter().map(|process| process.pid).collect::<Vec<_>>(), [itself]);
        let stat = Stat::read(itself).unwrap().unwrap();
        let name = String::from_utf8(stat.name).unwrap();
        let found = Finder::new(&Who::Name(name + "-that is longer")).unwrap().find().unwrap();
        assert!(found.iter().all(|process| process.pid != itself), "{found:?}");
    }

    #[test]
    fn no_such_process_is_an_error() {
        // Beyond the kernel's largest.
        let error = Finder::new(&Who::Pid(4_194_305)).unwrap_err().to_string();
        assert!(error.contains("no process with id 4194305"), "{error}");
    }
}

//! Another process, as `/proc/PID` shows it.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::{fs, io};

use super::super::ViewError;

/// A process that is watched. A process id may be given out again, the two together are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Process {
    /// When it was started, in clock ticks after the machine's start (`starttime` of proc(5)).
    pub started: u64,
    /// Its id in the pid namespace of the watcher.
    pub pid: u32,
}

/// What `/proc/PID/stat` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) process: Process,
    /// Up to 15 bytes.
    pub(super) name: Vec<u8>,
}

impl Stat {
    /// `None` if there is no such process, or all of its threads have ended.
    pub(super) fn read(pid: u32) -> Result<Option<Self>, ViewError> {
        match fs::read(format!("/proc/{pid}/stat")) {
            Ok(line) => Ok(Self::parse(pid, &line)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(cause) => Err(ViewError::Io { what: "reading /proc/PID/stat", cause }),
        }
    }

    fn parse(pid: u32, line: &[u8]) -> Option<Self> {
        // The name may hold anything, parentheses too.
        let open = line.iter().position(|byte| *byte == b'(')?;
        let close = line.iter().rposition(|byte| *byte == b')')?;
        let name = line.get(open + 1..close)?.to_vec();
        let rest = std::str::from_utf8(line.get(close + 1..)?).ok()?;
        // The third field is the first here.
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let (state, threads, started) = (*fields.first()?, *fields.get(17)?, *fields.get(19)?);
        // Its first thread may have ended before the others: then it is a zombie with threads.
        let ended = state == "X" || state == "Z" && threads.parse::<u64>().ok()? <= 1;
        (!ended).then_some(Self { process: Process { started: started.parse().ok()?, pid }, name })
    }
}

/// Inodes of the sockets in its table of descriptors; `None` if it has ended.
pub(super) fn sockets(process: Process) -> Result<Option<HashSet<u64>>, ViewError> {
    let mut sockets = HashSet::new();
    for thread in threads(process.pid)? {
        match read_table(&format!("/proc/{}/task/{thread}/fd", process.pid)) {
            Ok(inodes) => sockets.extend(inodes),
            Err(error) if is_gone(&error) => {}
            Err(source) => return Err(ViewError::unreadable(process.pid, "descriptors (/proc/PID/fd)", source)),
        }
    }
    // What was read is this process's only if it is there still.
    Ok(is_alive(process)?.then_some(sockets))
}

/// Whether it has not ended: what was read of its id before is of this process.
pub(super) fn is_alive(process: Process) -> Result<bool, ViewError> {
    Ok(Stat::read(process.pid)?.is_some_and(|stat| stat.process == process))
}

/// The threads whose descriptors are those of the process: the first one, which nearly always shares them with all others,
/// or all of them if that has ended.
pub(super) fn threads(pid: u32) -> Result<Vec<u32>, ViewError> {
    if !fs::read(format!("/proc/{pid}/task/{pid}/stat")).is_ok_and(|line| is_zombie(&line)) {
        return Ok(vec![pid]);
    }
    match fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(threads) => Ok(threads.filter_map(|thread| thread.ok()?.file_name().to_str()?.parse().ok()).collect()),
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(source) => Err(ViewError::unreadable(pid, "threads (/proc/PID/task)", source)),
    }
}

fn is_zombie(stat: &[u8]) -> bool {
    let close = stat.iter().rposition(|byte| *byte == b')');
    close.and_then(|close| stat.get(close + 2)) == Some(&b'Z')
}

fn read_table(directory: &str) -> io::Result<Vec<u64>> {
    let mut inodes = Vec::new();
    for entry in fs::read_dir(directory)? {
        match fs::read_link(entry?.path()) {
            Ok(target) => inodes.extend(socket_inode(target.as_os_str())),
            // Closed meanwhile.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(inodes)
}

/// `socket:[INODE]`
fn socket_inode(target: &OsStr) -> Option<u64> {
    let inode = target.as_bytes().strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(inode).ok()?.parse().ok()
}

/// A process or thread ended between two looks.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    fn line(name: &str, state: &str, threads: u32) -> String {
        format!("7 ({name}) {state} 1 7 7 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 {threads} 0 123456 1 1\n")
    }

    fn parse(line: &str) -> Option<Stat> {
        Stat::parse(7, line.as_bytes())
    }

    #[test]
    fn a_name_may_look_like_the_rest_of_the_line() {
        let process = Process { pid: 7, started: 123_456 };
        for name in ["dnsdist", "a) Z 1 (b", "", ") X"] {
            assert_eq!(parse(&line(name, "S", 3)), Some(Stat { process, name: name.into() }), "{name}");
        }
    }

    #[test]
    fn a_process_has_ended_when_all_its_threads_have() {
        assert_eq!(parse(&line("x", "Z", 1)), None);
        assert_eq!(parse(&line("x", "X", 1)), None);
        assert!(parse(&line("x", "Z", 2)).is_some());
        assert_eq!(parse("7 (x) S 1"), None);
        assert_eq!(parse(""), None);
        assert!(is_zombie(line("a) S", "Z", 2).as_bytes()));
        assert!(!is_zombie(line("a) Z", "S", 2).as_bytes()));
    }

    #[test]
    fn this_process_has_the_sockets_that_it_opened() {
        use std::os::unix::fs::MetadataExt;
        let this = Stat::read(std::process::id()).unwrap().unwrap().process;
        let (socket, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let inode = |socket: &std::os::unix::net::UnixStream| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(socket);
            fs::metadata(format!("/proc/self/fd/{fd}")).unwrap().ino()
        };
        let expected = HashSet::from([inode(&socket), inode(&other)]);
        assert!(sockets(this).unwrap().unwrap().is_superset(&expected));
        let restarted = Process { started: this.started + 1, ..this };
        assert_eq!(sockets(restarted).unwrap(), None, "another process with that id");
    }
}

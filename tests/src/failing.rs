//! System calls that fail as the kernel lets them fail when it has no memory: strace(1) traces one thread of a process and
//! answers its calls in the kernel's place.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::process::Process;
use crate::wait;

const DEADLINE: Duration = Duration::from_secs(10);

/// What strace writes behind a call that it has answered itself.
const INJECTED: &str = "(INJECTED)";

/// System calls of one thread that fail until this is dropped. They are not made.
#[derive(Debug)]
pub struct Failing(Process);

impl Failing {
    /// Each of `calls` fails with `error`, such as `ENOMEM`, in the thread of `pid` of this name.
    ///
    /// # Panics
    /// If there is no such thread, or strace may not trace it.
    #[track_caller]
    pub fn every(pid: u32, thread: &str, calls: &[&str], error: &str) -> Self {
        let calls = calls.join(",");
        Self::attach(pid, thread, &calls, &format!("{calls}:error={error}"))
    }

    /// The `nth` time from now, counted from 1, that this call is made it fails with `error`; all others are made.
    ///
    /// # Panics
    /// If there is no such thread, or strace may not trace it.
    #[track_caller]
    pub fn nth(pid: u32, thread: &str, call: &str, nth: usize, error: &str) -> Self {
        Self::attach(pid, thread, call, &format!("{call}:error={error}:when={nth}"))
    }

    #[track_caller]
    fn attach(pid: u32, thread: &str, calls: &str, fault: &str) -> Self {
        let id = thread_id(pid, thread).to_string();
        let (trace, inject) = (format!("trace={calls}"), format!("inject={fault}"));
        let mut strace = Process::start("strace", "strace", &["-p", &id, "-e", &trace, "-e", &inject]);
        // Then the thread is stopped, or will be before its next call.
        strace.wait_for_line(DEADLINE, "that it has attached", |line| line.ends_with("attached").then_some(()));
        Self(strace)
    }

    /// Ends it: how often each call has failed. Those that did not are left out.
    pub fn end(mut self) -> BTreeMap<String, usize> {
        // Without it the thread goes on as ever.
        self.0.stop();
        let mut failed = BTreeMap::new();
        for line in self.0.lines().iter().filter(|line| line.ends_with(INJECTED)) {
            let call = line.split('(').next().unwrap_or_default();
            *failed.entry(call.to_owned()).or_default() += 1;
        }
        failed
    }
}

/// A thread names itself, some time after it was started.
#[track_caller]
fn thread_id(pid: u32, thread: &str) -> u32 {
    let is_it = |path: &PathBuf| std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim_end() == thread);
    let find = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap_or_else(|e| panic!("process {pid}: {e}"));
        tasks.flatten().map(|task| task.path()).find(is_it)
    };
    let path = wait::poll(DEADLINE, find).unwrap_or_else(|| panic!("process {pid} has no thread {thread}"));
    path.file_name().and_then(|name| name.to_str()?.parse().ok()).expect("tasks are named by number")
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::sync::mpsc;

    use super::*;

    /// A thread that reads a pipe, an octet for each message.
    #[test]
    fn calls_fail_while_it_lasts() {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        let (ask, asked) = mpsc::channel::<()>();
        let (answer, answers) = mpsc::channel();
        let read = move || asked.iter().for_each(|()| answer.send(reader.read(&mut [0])).unwrap());
        std::thread::Builder::new().name("failing-test".to_owned()).spawn(read).unwrap();
        writer.write_all(&[0; 8]).unwrap();
        let read = || {
            ask.send(()).unwrap();
            answers.recv().unwrap().map_err(|error| error.raw_os_error())
        };
        let memory = Err(Some(rustix::io::Errno::NOMEM.raw_os_error()));
        assert_eq!(read(), Ok(1));
        let failing = Failing::every(std::process::id(), "failing-test", &["read"], "ENOMEM");
        assert_eq!([read(), read()], [memory, memory]);
        assert_eq!(failing.end(), [("read".to_owned(), 2)].into());
        assert_eq!(read(), Ok(1));
        let failing = Failing::nth(std::process::id(), "failing-test", "read", 2, "ENOMEM");
        assert_eq!([read(), read(), read()], [Ok(1), memory, Ok(1)]);
        assert_eq!(failing.end(), [("read".to_owned(), 1)].into());
        let failing = Failing::nth(std::process::id(), "failing-test", "read", 2, "ENOMEM");
        assert_eq!((read(), failing.end().len()), (Ok(1), 0));
    }
}

//! Standard error, which may hold up nobody: a line that it does not take soon is lost, and counted. (A pipe whose reader
//! has stopped takes nothing, a disk that is full neither.)

use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Whoever says that it can be written to takes so many octets without a wait (PIPE_BUF of pipe(7)).
const AT_A_TIME: usize = 4096;
/// How long a line waits for its reader. Once one has waited in vain none does, until one is taken again.
const PATIENCE: Duration = Duration::from_millis(100);

static STUCK: AtomicBool = AtomicBool::new(false);
static LOST: AtomicU64 = AtomicU64::new(0);

/// Where lines are written to, each in one call of `write`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        let patience = if STUCK.load(Ordering::Relaxed) { Duration::ZERO } else { PATIENCE };
        let taken = line.chunks(AT_A_TIME).all(|part| takes_more(patience) && stderr.write_all(part).is_ok());
        STUCK.store(!taken, Ordering::Relaxed);
        if !taken {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines that were lost, or cut short, since this was asked last; none as long as it could not be told.
pub(crate) fn lost() -> Option<u64> {
    (LOST.load(Ordering::Relaxed) > 0 && takes_more(Duration::ZERO)).then(|| LOST.swap(0, Ordering::Relaxed))
}

fn takes_more(patience: Duration) -> bool {
    let stderr = io::stderr();
    let mut asked = [PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::OUT)];
    let timeout = Timespec { tv_sec: 0, tv_nsec: patience.subsec_nanos().into() };
    poll(&mut asked, Some(&timeout)).is_ok_and(|ready| ready == 1) && asked[0].revents().contains(PollFlags::OUT)
}

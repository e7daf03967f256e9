//! A thin layer over epoll and the monotonic clock.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

/// Events that one call of [`Poller::wait`] may return.
const EVENTS: usize = 1024;

/// Interest in input.
pub const READ: epoll::EventFlags = epoll::EventFlags::IN;
/// Interest in room for output only: no more is read from a stream whose other side does not take it.
pub const WRITE: epoll::EventFlags = epoll::EventFlags::OUT;

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A level-triggered epoll set.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

/// Room for the events of one wait, kept between calls.
pub struct Events(Vec<epoll::Event>);

impl Events {
    /// Room for 1,024 events.
    #[must_use]
    pub fn new() -> Self {
        Self(Vec::with_capacity(EVENTS))
    }

    /// The tokens that are ready, in the order the kernel gave them, and what for.
    pub fn iter(&self) -> impl Iterator<Item = (u64, epoll::EventFlags)> + '_ {
        self.0.iter().map(|event| (event.data.u64(), event.flags))
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

impl Poller {
    /// A new, empty set.
    ///
    /// # Errors
    /// As `epoll_create1(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Adds a descriptor; it leaves the set when it is closed.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), interest)?)
    }

    /// Changes what a descriptor is watched for.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token), interest)?)
    }

    /// Waits until something is ready or the time is over (`None`: for ever), and replaces the content of `events`.
    ///
    /// # Errors
    /// As `epoll_pwait2(2)`; an interrupted call is no error and returns no events.
    pub fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        events.0.clear();
        let timeout = timeout.and_then(|duration| Timespec::try_from(duration).ok());
        match epoll::wait(&self.epoll, spare_capacity(&mut events.0), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

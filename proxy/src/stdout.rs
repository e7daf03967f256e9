//! Standard output, as all commands write to it. Who reads it may have seen enough before the end, as `head` does: the rest
//! goes nowhere then, and the command does what it does and ends as it would have.

use std::io::{self, StdoutLock, Write};

/// Where commands write to. Whoever has written everything must flush it, or does not hear of a disk that is full.
#[derive(Debug)]
pub(crate) struct Stdout {
    out: StdoutLock<'static>,
    is_read: bool,
}

impl Stdout {
    /// For this command alone.
    #[expect(clippy::disallowed_methods, reason = "what everybody else writes to")]
    pub(crate) fn lock() -> Self {
        Self { out: io::stdout().lock(), is_read: true }
    }

    fn unless_gone<T>(&mut self, none: T, done: io::Result<T>) -> io::Result<T> {
        match done {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.is_read = false;
                Ok(none)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            done => done.map_err(|error| io::Error::new(error.kind(), format!("standard output: {error}"))),
        }
    }
}

impl Write for Stdout {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        if !self.is_read {
            return Ok(octets.len());
        }
        let written = self.out.write(octets);
        self.unless_gone(octets.len(), written)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.is_read {
            return Ok(());
        }
        let flushed = self.out.flush();
        self.unless_gone((), flushed)
    }
}

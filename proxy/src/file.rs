//! The files that an operator names: the configuration, and what it names itself. Each must be a regular one (opening a
//! FIFO waits for its other end, a device does whatever it does) and has a bounded size.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Why a file is not read. It is `Copy`, so that it carries nothing of what is in the file, which may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileFault {
    /// The system does not open or read it.
    #[error("cannot be read: {}", io::Error::from_raw_os_error(.0.raw_os_error()))]
    Unreadable(Errno),
    /// It is something else.
    #[error("is {0}, where a regular file must be")]
    Irregular(&'static str),
    /// It is longer than any such file, bytes.
    #[error("is longer than {0} bytes")]
    TooLong(u64),
}

impl From<io::Error> for FileFault {
    fn from(error: io::Error) -> Self {
        Self::Unreadable(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

/// What is being opened or read, so that it can be named if that takes for ever (as on a file system whose server is
/// gone). The configuration and what it names are read by one thread at a time.
static UNDER_WAY: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The file that is being opened or read, if one is.
pub(crate) fn under_way() -> Option<PathBuf> {
    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// All of a regular file.
///
/// # Errors
/// It is none, cannot be read, or has more than `max` bytes.
pub(crate) fn read(path: &Path, max: u64) -> Result<Vec<u8>, FileFault> {
    read_if(path, max, |_| Ok(()))
}

/// The same, if it `fits` by what the file system says of it.
///
/// # Errors
/// It does not fit, is no regular file, cannot be read, or has more than `max` bytes.
pub(crate) fn read_if<E: From<FileFault>>(
    path: &Path,
    max: u64,
    fits: impl FnOnce(&Metadata) -> Result<(), E>,
) -> Result<Vec<u8>, E> {
    let note = |path: Option<&Path>| {
        *UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner) = path.map(Path::to_owned);
    };
    note(Some(path));
    let read = open(path).map_err(E::from).and_then(|(file, metadata)| {
        fits(&metadata)?;
        Ok(contents(file, max)?)
    });
    note(None);
    read
}

/// Whether this thread may read it, at this moment.
///
/// # Errors
/// Why not.
pub(crate) fn readable(path: &Path) -> Result<(), FileFault> {
    open(path).map(drop)
}

fn open(path: &Path) -> Result<(File, Metadata), FileFault> {
    // Without a wait for the other end, if it is a FIFO.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(path)?;
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    let what = match () {
        () if kind.is_file() => return Ok((file, metadata)),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO (named pipe)",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(FileFault::Irregular(what))
}

fn contents(file: File, max: u64) -> Result<Vec<u8>, FileFault> {
    let mut octets = Vec::new();
    file.take(max + 1).read_to_end(&mut octets)?;
    if octets.len() as u64 > max { Err(FileFault::TooLong(max)) } else { Ok(octets) }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn only_regular_files_are_read_and_nothing_waits() {
        let directory = std::env::temp_dir().join(format!("counterfoil-file-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (file, fifo) = (directory.join("file"), directory.join("fifo"));
        std::fs::write(&file, "12345").unwrap();
        assert_eq!(read(&file, 5), Ok(b"12345".to_vec()));
        assert_eq!(read(&file, 4), Err(FileFault::TooLong(4)));
        let refused = |_: &Metadata| Err(FileFault::Irregular("no"));
        assert_eq!(read_if(&file, 5, refused), Err(FileFault::Irregular("no")));
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let said = |path: &Path| read(path, 5).unwrap_err().to_string();
        assert_eq!(said(&fifo), "is a FIFO (named pipe), where a regular file must be");
        assert_eq!(said(&directory), "is a directory, where a regular file must be");
        assert_eq!(said(Path::new("/dev/null")), "is a device, where a regular file must be");
        let _listener = std::os::unix::net::UnixListener::bind(directory.join("socket")).unwrap();
        assert_eq!(said(&directory.join("socket")), "cannot be read: No such device or address (os error 6)");
        assert_eq!(said(&directory.join("none")), "cannot be read: No such file or directory (os error 2)");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}

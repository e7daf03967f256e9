//! A guest's file system in the form that a kernel unpacks while it boots: cpio, "newc"
//! (`Documentation/driver-api/early-userspace/buffer-format.rst` of Linux).

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const TRAILER: &str = "TRAILER!!!";
/// Headers and contents begin at multiples of it.
const ALIGNMENT: usize = 4;

/// An archive that grows.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    have: BTreeSet<PathBuf>,
}

impl Archive {
    /// Adds a folder and those above it. Paths are absolute, as in the guest.
    pub(super) fn directory(&mut self, path: impl AsRef<Path>) {
        let mut folder = PathBuf::from("/");
        for part in path.as_ref().components().filter(|part| matches!(part, Component::Normal(_))) {
            folder.push(part);
            if self.have.insert(folder.clone()) {
                self.entry(&folder.to_string_lossy(), DIRECTORY, &[]);
            }
        }
    }

    /// Adds a file that may be run; the first of a name counts.
    pub(super) fn executable(&mut self, path: impl AsRef<Path>, contents: &[u8]) {
        self.file(path.as_ref(), EXECUTABLE, contents);
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, path: impl AsRef<Path>, target: &str) {
        self.file(path.as_ref(), LINK, target.as_bytes());
    }

    fn file(&mut self, path: &Path, mode: u32, contents: &[u8]) {
        self.directory(path.parent().unwrap_or(path));
        if self.have.insert(path.to_owned()) {
            self.entry(&path.to_string_lossy(), mode, contents);
        }
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) {
        let name = path.trim_start_matches('/');
        self.entries += 1;
        // Inode, mode, owner, group, links, time, size, device and its own device (two numbers each), length of the
        // name with its zero, checksum (none in this form).
        let (size, length) = (contents.len(), name.len() + 1);
        let fields = [self.entries as usize, mode as usize, 0, 0, 1, 0, size, 0, 0, 0, 0, length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(contents);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_as_the_kernel_reads_them() {
        let mut archive = Archive::default();
        archive.executable("/bin/a", b"abc");
        archive.executable("/bin/a", b"again");
        archive.link("/bin/sh", "a");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        let names = text.match_indices("070701").map(|(at, _)| {
            assert_eq!(at % ALIGNMENT, 0);
            text[at + 110..].split('\0').next().unwrap_or_default().to_owned()
        });
        assert_eq!(names.collect::<Vec<_>>(), ["bin", "bin/a", "bin/sh", TRAILER]);
        assert!(text.starts_with("07070100000001000041ed0000000000000000000000010000000000000000"), "{text}");
        // 110 octets of header, the name with its zero, then the contents at the next multiple of four.
        let file = text.find("bin/a\0").map(|at| &bytes[at - 110..]).unwrap_or_default();
        assert_eq!(&file[54..62], b"00000003");
        assert_eq!(&file[116..120], b"abc\0");
    }
}

//! The text of a configuration: read from its file, and asked where something in it is that cannot count.

use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::Config;
use super::error::{ConfigErrors, Problem};
use super::parse::parse;
use super::section::Section;
use super::source::Source;
use crate::file;

/// The longest file that is read, bytes: a hundred times what a large one has. It also bounds the number of listeners,
/// pools and backends, each of which takes more than 20 bytes: below 65,534, so that their indexes fit 16 bits.
pub(super) const MAX_FILE: u64 = 1 << 20;

/// What a file says, and what errors call it.
#[derive(Clone, Debug)]
pub struct Text {
    name: String,
    text: String,
    /// Where the files are that it names by relative paths.
    directory: PathBuf,
}

/// Where something is, by the tables and keys of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A key of a table that exists once.
    Key {
        /// Such as `server`.
        table: &'static str,
        /// Such as `workers`.
        key: &'static str,
    },
    /// A key of a `[[listener]]`.
    Listener {
        /// Which one, in the order of the file.
        index: usize,
        /// Such as `address`.
        key: &'static str,
    },
    /// All `[[listener]]` together.
    Listeners,
}

impl Text {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is not UTF-8; then all else that is wrong before that is not looked for.
    pub fn read(path: &Path) -> Result<Self, ConfigErrors> {
        let name = path.display().to_string();
        let directory = path.parent().unwrap_or(Path::new("")).to_owned();
        let refused = |text: &str, at, problem| {
            let source = Source::new(&name, text);
            source.push(at, None, || problem);
            source.result()
        };
        let bytes = match file::read(path, MAX_FILE) {
            Ok(bytes) => bytes,
            Err(fault) => {
                refused("", None, Problem::File(fault))?;
                Vec::new()
            }
        };
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Self { name, text, directory }),
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(error.as_bytes().get(..valid).unwrap_or_default()).into_owned();
                refused(&text, Some(text.len()), Problem::NotUtf8)?;
                Ok(Self { name, text, directory })
            }
        }
    }

    /// The configuration.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn parse(&self) -> Result<Config, ConfigErrors> {
        parse(&self.name, &self.text, Some(&self.directory))
    }

    /// Says of each of these problems where it is.
    ///
    /// # Errors
    /// All of them, in the order of the file, if there are any.
    pub fn refuse(&self, problems: impl IntoIterator<Item = (Place, Problem)>) -> Result<(), ConfigErrors> {
        let text = without_mark(&self.text);
        let source = Source::new(&self.name, text);
        let (root, _) = DeTable::parse_recoverable(text);
        let root = Section::root(&source, root.get_ref());
        let listeners = root.tables("listener");
        for (place, problem) in problems {
            match place {
                Place::Key { table, key } => root.table(table).fail(key, problem),
                Place::Listener { index, key } => match listeners.get(index) {
                    Some(listener) => listener.fail(key, problem),
                    None => root.fail("listener", problem),
                },
                Place::Listeners => root.fail("listener", problem),
            }
        }
        source.result()
    }
}

/// The text without the byte order mark that some editors put in front.
pub(super) fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_said_with_its_place() {
        let text = "\u{feff}[server]\nworkers = 2\n[[listener]]\nname = \"a\"\n[[listener]]\nname = \"b\"\n";
        let text = Text { name: "f.toml".to_owned(), text: text.to_owned(), directory: PathBuf::new() };
        let said = |place| text.refuse([(place, Problem::Missing)]).map_err(|errors| errors.to_string());
        for (place, expected) in [
            (Place::Key { table: "server", key: "workers" }, "f.toml:2:11: key `server.workers`: is missing"),
            // A key that is not given is missed in its table, a table in the file.
            (Place::Key { table: "server", key: "log" }, "f.toml:1:1: key `server.log`: is missing"),
            (Place::Key { table: "admin", key: "http" }, "f.toml:1:1: key `admin.http`: is missing"),
            (Place::Listener { index: 1, key: "name" }, "f.toml:6:8: key `listener[1].name`: is missing"),
            (Place::Listener { index: 1, key: "address" }, "f.toml:5:1: key `listener[1].address`: is missing"),
            (Place::Listeners, "f.toml:3:1: key `listener`: is missing"),
        ] {
            assert_eq!(said(place), Err(expected.to_owned()));
        }
        assert_eq!(text.refuse([]), Ok(()));
    }
}

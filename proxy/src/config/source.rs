//! The text of a configuration, the places in it, and the errors found so far.

use std::cell::RefCell;
use std::fmt;
use std::path::{self, PathBuf};

use super::error::{ConfigError, ConfigErrors, Position, Problem};

/// A text that is being read. Errors are collected, so that one run reports all of them.
pub(super) struct Source<'t> {
    name: &'t str,
    text: &'t str,
    /// Where the files are that it names by relative paths; none: such files are not read.
    directory: Option<&'t path::Path>,
    errors: RefCell<Vec<ConfigError>>,
}

impl<'t> Source<'t> {
    /// `name` is what errors call it.
    pub(super) fn new(name: &'t str, text: &'t str) -> Self {
        Self { name, text, directory: None, errors: RefCell::new(Vec::new()) }
    }

    /// From now on the files that it names are read; relative paths begin at this directory.
    pub(super) fn reading_from(self, directory: Option<&'t path::Path>) -> Self {
        Self { directory, ..self }
    }

    /// Where a file is that it names; none if no files are read.
    pub(super) fn file(&self, named: &str) -> Option<PathBuf> {
        Some(self.directory?.join(named))
    }

    /// Adds an error of a key at an offset in bytes.
    pub(super) fn fail(&self, at: usize, key: &Path, problem: Problem) {
        self.push(Some(at), Some(key.to_string()), problem);
    }

    /// Adds an error that belongs to no key, or to a key whose path is not known.
    pub(super) fn push(&self, at: Option<usize>, key: Option<String>, problem: Problem) {
        let position = at.map(|at| self.position(at));
        self.errors.borrow_mut().push(ConfigError { file: self.name.to_owned(), position, key, problem });
    }

    /// Line and column of an offset in bytes.
    pub(super) fn position(&self, at: usize) -> Position {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.bytes().filter(|octet| *octet == b'\n').count() + 1;
        let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
        Position { line, column }
    }

    /// The errors found so far, if there are any.
    pub(super) fn result(&self) -> Result<(), ConfigErrors> {
        let errors = self.errors.take();
        if errors.is_empty() { Ok(()) } else { Err(ConfigErrors::new(errors)) }
    }
}

/// The full name of a key.
#[derive(Clone, Debug)]
pub(super) struct Path(String);

impl Path {
    /// Of the whole file.
    pub(super) fn root() -> Self {
        Self(String::new())
    }

    /// Of a key in this table. One that needs quotes in TOML has them here, so that it cannot garble the terminal.
    pub(super) fn key(&self, name: &str) -> Self {
        let bare =
            !name.is_empty() && name.bytes().all(|octet| octet.is_ascii_alphanumeric() || b"_-".contains(&octet));
        let name = if bare { name.to_owned() } else { format!("{name:?}") };
        if self.0.is_empty() { Self(name) } else { Self(format!("{}.{name}", self.0)) }
    }

    /// Of an element of this list of `length` elements. The only element of a list goes without index.
    pub(super) fn element(&self, index: usize, length: usize) -> Self {
        if length == 1 { self.clone() } else { Self(format!("{}[{index}]", self.0)) }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions() {
        let source = Source::new("f", "a\nbé c\n");
        for (at, line, column) in [(0, 1, 1), (1, 1, 2), (2, 2, 1), (6, 2, 4), (8, 3, 1), (3, 2, 2), (99, 3, 1)] {
            assert_eq!(source.position(at), Position { line, column }, "{at}");
        }
    }

    #[test]
    fn paths() {
        let pool = Path::root().key("pool");
        assert_eq!(pool.element(0, 1).key("name").to_string(), "pool.name");
        assert_eq!(
            pool.element(1, 2).key("backend").element(0, 3).key("a\u{1b}").to_string(),
            "pool[1].backend[0].\"a\\u{1b}\""
        );
    }
}

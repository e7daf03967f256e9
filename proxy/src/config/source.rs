//! The text of a configuration, the places in it, and the errors found so far.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::path;

use super::effort;
use super::error::{ConfigError, ConfigErrors, MOST, Position, Problem};
use super::files::Files;

/// A text that is being read. Errors are collected, so that one run reports all of them, up to a number.
pub(super) struct Source<'t> {
    name: &'t str,
    text: &'t str,
    /// Where each line begins, in bytes; the first at 0.
    lines: Vec<usize>,
    /// None: the files that it names are not read.
    files: Option<Files<'t>>,
    errors: RefCell<Vec<ConfigError>>,
    /// How many errors there were beyond.
    more: Cell<usize>,
}

impl<'t> Source<'t> {
    /// `name` is what errors call it.
    pub(super) fn new(name: &'t str, text: &'t str) -> Self {
        effort::spend(text.len());
        let ends = text.bytes().enumerate().filter(|(_, octet)| *octet == b'\n');
        let lines = std::iter::once(0).chain(ends.map(|(at, _)| at + 1)).collect();
        Self { name, text, lines, files: None, errors: RefCell::default(), more: Cell::new(0) }
    }

    /// From now on the files that it names are read; relative paths begin at this directory.
    pub(super) fn reading_from(self, directory: Option<&'t path::Path>) -> Self {
        Self { files: directory.map(Files::new), ..self }
    }

    /// The files that it names; none if they are not read.
    pub(super) fn files(&self) -> Option<&Files<'t>> {
        self.files.as_ref()
    }

    /// Adds an error of a key at an offset in bytes.
    pub(super) fn fail(&self, at: usize, key: &Path, problem: Problem) {
        self.fail_with(at, key, || problem);
    }

    /// The same, where it costs something to say what is wrong.
    pub(super) fn fail_with(&self, at: usize, key: &Path, problem: impl FnOnce() -> Problem) {
        self.push(Some(at), Some(key), problem);
    }

    /// Adds an error that may belong to no key, or to one whose path is not known. Once there are enough, only their number
    /// is kept, and nothing is looked up for them.
    pub(super) fn push(&self, at: Option<usize>, key: Option<&Path>, problem: impl FnOnce() -> Problem) {
        effort::spend(1);
        let mut errors = self.errors.borrow_mut();
        if errors.len() == MOST {
            self.more.set(self.more.get() + 1);
            return;
        }
        let (position, key) = (at.map(|at| self.position(at)), key.map(ToString::to_string));
        errors.push(ConfigError { file: self.name.to_owned(), position, key, problem: problem() });
    }

    /// The line of an offset in bytes, counted from 1.
    pub(super) fn line(&self, at: usize) -> usize {
        self.lines.partition_point(|start| *start <= at.min(self.text.len()))
    }

    /// Line and column of an offset in bytes. That takes as long as the line is.
    fn position(&self, at: usize) -> Position {
        let line = self.line(at);
        let start = self.lines.get(line - 1).copied().unwrap_or(0);
        let before = self.text.get(start..at).or_else(|| self.text.get(start..)).unwrap_or_default();
        effort::spend(before.len());
        Position { line, column: before.chars().count() + 1 }
    }

    /// The errors found so far, if there are any.
    pub(super) fn result(&self) -> Result<(), ConfigErrors> {
        let errors = self.errors.take();
        if errors.is_empty() { Ok(()) } else { Err(ConfigErrors::new(errors, self.more.take())) }
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

//! Typed access to a table and its values; what is wrong goes to the [`Source`], and reading goes on with the default.

use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::choices::{self, Choice};
use super::effort;
use super::error::Problem;
use super::files::Files;
use super::source::{Path, Source};
use super::{Network, units};
use crate::scope::{self, ScopeError};

/// A table of the file, or one that is not there and has defaults only.
pub(super) struct Section<'a, 'i> {
    source: &'a Source<'i>,
    table: Option<&'a DeTable<'i>>,
    path: Path,
    at: usize,
}

impl<'a, 'i> Section<'a, 'i> {
    /// The whole file.
    pub(super) fn root(source: &'a Source<'i>, table: &'a DeTable<'i>) -> Self {
        Self { source, table: Some(table), path: Path::root(), at: 0 }
    }

    /// `[key]`. A value of another type counts as absent: the schema has reported it.
    pub(super) fn table(&self, key: &str) -> Self {
        let path = self.path.key(key);
        match self.get(key) {
            Some(value) => self.child(value, path),
            None => Self { source: self.source, table: None, path, at: self.at },
        }
    }

    /// `[[key]]`. Elements that are no tables are left out: the schema has reported them.
    pub(super) fn tables(&self, key: &str) -> Vec<Self> {
        let path = self.path.key(key);
        let Some(DeValue::Array(elements)) = self.get(key).map(Spanned::get_ref) else { return Vec::new() };
        let children = elements.iter().enumerate().filter(|(_, element)| element.get_ref().is_table());
        children.map(|(index, element)| self.child(element, path.element(index, elements.len()))).collect()
    }

    fn child(&self, value: &'a Spanned<DeValue<'i>>, path: Path) -> Self {
        effort::spend(1);
        Self { source: self.source, table: value.get_ref().as_table(), path, at: value.span().start }
    }

    fn get(&self, key: &str) -> Option<&'a Spanned<DeValue<'i>>> {
        effort::spend(1);
        self.table?.get(key)
    }

    /// Whether the table is in the file.
    pub(super) fn is_present(&self) -> bool {
        self.table.is_some()
    }

    /// The value of a key, if it is given.
    pub(super) fn value(&self, key: &str) -> Option<Value<'a, 'i>> {
        let value = self.get(key)?;
        Some(Value { source: self.source, path: self.path.key(key), at: value.span().start, value: value.get_ref() })
    }

    /// The value of a key that must be given. In a table that is not there nothing is missing but the table.
    pub(super) fn required(&self, key: &str) -> Option<Value<'a, 'i>> {
        if self.table.is_some() && self.get(key).is_none() {
            self.fail(key, Problem::Missing);
        }
        self.value(key)
    }

    /// The files that values name; none if no files are read.
    pub(super) fn files(&self) -> Option<&'a Files<'i>> {
        self.source.files()
    }

    /// Reports a problem of a key: at its value, or at the head of the table if the key is not given.
    pub(super) fn fail(&self, key: &str, problem: Problem) {
        let at = self.get(key).map_or(self.at, |value| value.span().start);
        self.source.fail(at, &self.path.key(key), problem);
    }

    /// Reports a list that must have elements and has none.
    pub(super) fn fail_empty(&self, key: &str) {
        match self.get(key).map(Spanned::get_ref) {
            None => self.fail(key, Problem::Missing),
            Some(DeValue::Array(elements)) if elements.is_empty() => self.fail(key, Problem::Empty("")),
            // Something other than tables: the schema has reported it.
            Some(_) => {}
        }
    }

    /// A whole number.
    pub(super) fn integer<T>(&self, key: &str, default: T, range: RangeInclusive<T>) -> T
    where
        T: TryFrom<i128> + PartialOrd + Display,
    {
        self.value(key).and_then(|value| value.integer(range)).unwrap_or(default)
    }

    /// A duration, from `min` to a year.
    pub(super) fn duration(&self, key: &str, default: Duration, min: Duration) -> Duration {
        self.value(key).and_then(|value| value.duration(min)).unwrap_or(default)
    }

    /// Yes or no.
    pub(super) fn boolean(&self, key: &str, default: bool) -> bool {
        self.value(key).and_then(|value| value.boolean()).unwrap_or(default)
    }

    /// One of a few words.
    pub(super) fn choice<T: Choice>(&self, key: &str, default: T) -> T {
        self.value(key).and_then(|value| value.choice()).unwrap_or(default)
    }
}

/// A value of the file.
pub(super) struct Value<'a, 'i> {
    source: &'a Source<'i>,
    path: Path,
    at: usize,
    value: &'a DeValue<'i>,
}

impl<'a, 'i> Value<'a, 'i> {
    /// Reports a problem.
    pub(super) fn fail(&self, problem: Problem) {
        self.source.fail(self.at, &self.path, problem);
    }

    /// The same, where it costs something to say what is wrong.
    pub(super) fn fail_with(&self, problem: impl FnOnce() -> Problem) {
        self.source.fail_with(self.at, &self.path, problem);
    }

    /// The line, counted from 1.
    pub(super) fn line(&self) -> usize {
        self.source.line(self.at)
    }

    fn wrong_type<T>(&self, expected: &'static str) -> Option<T> {
        self.fail(Problem::WrongType { expected, found: self.value.type_str() });
        None
    }

    fn ok<T>(&self, result: Result<T, impl Into<Problem>>) -> Option<T> {
        result.map_err(|error| self.fail(error.into())).ok()
    }

    /// A string.
    pub(super) fn string(&self) -> Option<&'a str> {
        self.text("a string")
    }

    fn text(&self, expected: &'static str) -> Option<&'a str> {
        match self.value {
            DeValue::String(text) => Some(text),
            _ => self.wrong_type(expected),
        }
    }

    /// A whole number.
    pub(super) fn integer<T>(&self, range: RangeInclusive<T>) -> Option<T>
    where
        T: TryFrom<i128> + PartialOrd + Display,
    {
        let DeValue::Integer(number) = self.value else { return self.wrong_type("a whole number") };
        let number = wide(number).and_then(|number| T::try_from(number).ok()).filter(|number| range.contains(number));
        if number.is_none() {
            self.fail(Problem::OutOfRange { min: range.start().to_string(), max: range.end().to_string() });
        }
        number
    }

    /// A duration, from `min` to a year.
    pub(super) fn duration(&self, min: Duration) -> Option<Duration> {
        let duration = self.ok(units::parse_duration(self.text("a duration, such as \"10s\"")?))?;
        if duration < min {
            let [min, max] = [min, units::MAX_DURATION].map(|limit| format!("{:?}", units::format_duration(limit)));
            self.fail(Problem::OutOfRange { min, max });
            return None;
        }
        Some(duration)
    }

    /// A size in bytes.
    pub(super) fn size(&self, range: RangeInclusive<usize>) -> Option<usize> {
        let size = self.ok(units::parse_size(self.text("a size, such as \"512B\"")?))?;
        if !range.contains(&size) {
            let [min, max] = [range.start(), range.end()].map(|limit| format!("{:?}", units::format_size(*limit)));
            self.fail(Problem::OutOfRange { min, max });
            return None;
        }
        Some(size)
    }

    /// One of a few words.
    pub(super) fn choice<T: Choice>(&self) -> Option<T> {
        let text = self.string()?;
        let chosen = T::ALL.iter().copied().find(|choice| choice.word() == text);
        if chosen.is_none() {
            let choices = choices::list::<T>();
            self.fail(Problem::NotAChoice { value: text.to_owned(), choices });
        }
        chosen
    }

    /// An IP address with a port.
    pub(super) fn socket_address(&self) -> Option<SocketAddr> {
        let text = self.string()?;
        let reason = |error| match error {
            ScopeError::Syntax => Problem::NotASocketAddress(text.to_owned()),
            error => Problem::Scope(error),
        };
        self.ok(scope::socket_address(text).map_err(reason))
    }

    /// An IP address, with port 0.
    pub(super) fn ip_address(&self) -> Option<SocketAddr> {
        let text = self.string()?;
        let reason = |error| match error {
            ScopeError::Syntax => Problem::NotAnIpAddress(text.to_owned()),
            error => Problem::Scope(error),
        };
        self.ok(scope::ip_address(text).map_err(reason))
    }

    /// A network.
    pub(super) fn network(&self) -> Option<Network> {
        self.ok(self.string()?.parse::<Network>())
    }

    /// Yes or no.
    pub(super) fn boolean(&self) -> Option<bool> {
        match self.value {
            DeValue::Boolean(value) => Some(*value),
            _ => self.wrong_type("true or false"),
        }
    }

    /// The elements of a list.
    pub(super) fn list(&self) -> Option<Vec<Self>> {
        let DeValue::Array(elements) = self.value else { return self.wrong_type("a list") };
        effort::spend(elements.len());
        let element = |(index, element): (usize, &'a Spanned<DeValue<'i>>)| Self {
            source: self.source,
            path: self.path.element(index, elements.len()),
            at: element.span().start,
            value: element.get_ref(),
        };
        Some(elements.iter().enumerate().map(element).collect())
    }
}

/// The number, if it has at most 127 bits.
fn wide(number: &DeInteger<'_>) -> Option<i128> {
    i128::from_str_radix(number.as_str(), number.radix()).ok()
}

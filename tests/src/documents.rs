//! The documents that name tests: their tables, and whether what they name exists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What the cell of a row begins with that has no test but a reason.
const REASON: &str = "no test: ";

/// The folder of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The rows of all tables of `document`, without their heads: what stands in each cell.
///
/// # Panics
/// If a row has more or fewer cells.
pub fn rows<const CELLS: usize>(document: &str) -> Vec<[&str; CELLS]> {
    let lines: Vec<&str> = document.lines().collect();
    let is_rule = |line: &str| line.starts_with("|--");
    let is_head = |at: usize| is_rule(lines[at]) || lines.get(at + 1).is_some_and(|next| is_rule(next));
    (0..lines.len())
        .filter(|at| lines[*at].starts_with('|') && !is_head(*at))
        .map(|at| {
            let cells: Vec<&str> = lines[at].trim_matches('|').split('|').map(str::trim).collect();
            cells.try_into().unwrap_or_else(|cells| panic!("{CELLS} cells in a row, not {cells:?}"))
        })
        .collect()
}

/// The tests that a cell names.
///
/// # Panics
/// If it names none and does not say why.
#[track_caller]
pub fn tests(cell: &str) -> Vec<&str> {
    if cell.starts_with(REASON) {
        return Vec::new();
    }
    let named: Vec<&str> = quoted(cell).collect();
    assert!(!named.is_empty(), "neither a test nor a reason: {cell:?}");
    named
}

/// What stands between backticks.
pub fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The sources that a module of tests may be in, of which there is at least one.
fn sources(module: &str) -> Vec<String> {
    let root = root();
    let candidates = match module.strip_suffix("::tests") {
        Some(module) => {
            let path = root.join("proxy/src").join(module.replace("::", "/"));
            let beside = format!("{}_tests.rs", path.display());
            vec![path.with_extension("rs"), path.join("mod.rs"), path.join("tests.rs"), beside.into()]
        }
        None => vec![
            root.join(format!("tests/tests/{module}.rs")),
            root.join(format!("proxy/tests/{module}.rs")),
            root.join(format!("proxy/tests/{}.rs", module.replace("::", "/"))),
            root.join(format!("proxy/src/{}.rs", module.replace("::", "/"))),
        ],
    };
    let sources: Vec<String> = candidates.iter().filter_map(|path| std::fs::read_to_string(path).ok()).collect();
    assert!(!sources.is_empty(), "none of {candidates:?} is there");
    sources
}

/// # Panics
/// If there is no test of this name: its file and its function, or its module and its function.
#[track_caller]
pub fn assert_exists(test: &str) {
    let (module, function) = test.rsplit_once("::").unwrap_or_else(|| panic!("{test}: no file"));
    let found = sources(module).iter().any(|source| functions(source).contains(function));
    assert!(found, "{test} is no test");
}

/// The names of all tests in a source.
pub fn functions(source: &str) -> BTreeSet<&str> {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let is_test =
        |at: usize| lines[..at].iter().rev().take_while(|line| line.starts_with("#[")).any(|line| *line == "#[test]");
    let named = (0..lines.len()).filter(|at| is_test(*at)).filter_map(|at| lines[at].strip_prefix("fn "));
    named.filter_map(|line| line.split('(').next()).collect()
}

/// The functions of a source, and what is between their first line and their last.
pub fn bodies(source: &str) -> BTreeMap<&str, String> {
    let mut bodies = BTreeMap::new();
    let lines: Vec<&str> = source.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some(name) = code.strip_prefix("fn ").and_then(|rest| rest.split(['(', '<']).next()) else { continue };
        let end = format!("{}}}", &line[..line.len() - code.len()]);
        let body: Vec<&str> = lines[at + 1..].iter().copied().take_while(|line| *line != end).collect();
        bodies.insert(name, body.join("\n"));
    }
    bodies
}

/// Every test of this file is named in the cells.
///
/// # Panics
/// With the first one that is not.
#[track_caller]
pub fn assert_all_named(file: &str, named: &BTreeSet<&str>) {
    let source = std::fs::read_to_string(root().join(format!("tests/tests/{file}.rs")));
    let source = source.unwrap_or_else(|error| panic!("{file}: {error}"));
    let functions = functions(&source);
    assert!(!functions.is_empty(), "{file} has no tests");
    for function in functions {
        let test = format!("{file}::{function}");
        assert!(named.contains(test.as_str()), "{test} is in no row");
    }
}

/// All tests below `tests/tests/` whose function begins so, with their files.
///
/// # Panics
/// If the folder cannot be read.
pub fn tests_named(prefix: &str) -> Vec<String> {
    let entries = std::fs::read_dir(root().join("tests/tests")).expect("the folder of the tests");
    let mut found = Vec::new();
    for path in entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file()) {
        let source = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let functions = functions(&source).into_iter().filter(|function| function.starts_with(prefix));
        found.extend(functions.map(|function| format!("{file}::{function}")));
    }
    found
}

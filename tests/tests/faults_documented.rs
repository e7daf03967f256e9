//! docs/faults.md is true where a test can tell: every fault has its row, and the tests that a row names exist.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests panic")]

use std::collections::BTreeSet;
use std::path::Path;

const FAULTS: &str = include_str!("../../docs/faults.md");

/// The first fault and the last.
const NUMBERS: std::ops::RangeInclusive<u32> = 1..=52;

/// The rows: what stands in each cell.
fn rows() -> Vec<[&'static str; 3]> {
    let rows = FAULTS.lines().filter(|line| line.starts_with("| F"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        cells.try_into().unwrap_or_else(|cells| panic!("three cells in a row, not {cells:?}"))
    })
    .collect()
}

fn number(row: [&str; 3]) -> u32 {
    row[0].split_once(' ').and_then(|(number, _)| number.strip_prefix('F')?.parse().ok()).unwrap()
}

#[test]
fn every_fault_has_one_row_with_tests_or_a_reason() {
    assert!(rows().into_iter().map(number).eq(NUMBERS));
    for row in rows() {
        assert!(row[2].contains('`') || row[2].starts_with("not tested: "), "{row:?}");
    }
}

/// The source of a test, and its name.
fn source(root: &Path, test: &str) -> (String, String) {
    let (module, function) = test.rsplit_once("::").unwrap_or_else(|| panic!("{test}: no file"));
    let file = match module.strip_suffix("::tests") {
        Some(module) => root.join("proxy/src").join(module.replace("::", "/")).with_extension("rs"),
        None => root.join("tests/tests").join(module).with_extension("rs"),
    };
    let source = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    (source, function.to_owned())
}

#[test]
fn the_tests_that_it_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let named: BTreeSet<&str> = rows()
        .into_iter()
        .filter(|row| !row[2].starts_with("not tested"))
        .flat_map(|row| row[2].split('`').skip(1).step_by(2))
        .collect();
    assert!(named.len() > 40, "{}", named.len());
    for test in named {
        let (source, function) = source(&root, test);
        let lines: Vec<&str> = source.lines().map(str::trim).collect();
        let at = lines.iter().position(|line| line.starts_with(&format!("fn {function}(")));
        let at = at.unwrap_or_else(|| panic!("{test} does not exist"));
        assert!(lines[..at].iter().rev().take(3).any(|line| *line == "#[test]"), "{test} is no test");
    }
}

/// The tests named after a fault are in its row.
#[test]
fn every_test_named_after_a_fault_is_in_its_row() {
    for file in ["faults_client", "faults_host"] {
        let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/{file}.rs")));
        for line in source.unwrap().lines() {
            let Some(function) = line.strip_prefix("fn f").and_then(|rest| rest.split('(').next()) else { continue };
            for number in function.split('_').map_while(|word| word.trim_start_matches('f').parse::<u32>().ok()) {
                let row = rows().into_iter().find(|row| self::number(*row) == number);
                let test = format!("`{file}::f{function}`");
                assert!(row.unwrap()[2].contains(&test), "{test} is not in row F{number:02}");
            }
        }
    }
}

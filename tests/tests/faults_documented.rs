//! docs/faults.md is true where a test can tell: every fault has its row, and the tests that a row names exist.
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::path::Path;

use counterfoil_tests::documents;

const FAULTS: &str = include_str!("../../docs/faults.md");

/// The first fault and the last.
const NUMBERS: std::ops::RangeInclusive<u32> = 1..=53;

/// The rows: what stands in each cell.
fn rows() -> Vec<[&'static str; 3]> {
    documents::rows(FAULTS)
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

#[test]
fn the_tests_that_it_names_exist() {
    let named: BTreeSet<&str> = rows()
        .into_iter()
        .filter(|row| !row[2].starts_with("not tested"))
        .flat_map(|row| documents::quoted(row[2]))
        .collect();
    assert!(named.len() > 40, "{}", named.len());
    named.into_iter().for_each(documents::assert_exists);
}

/// What a test says that ends with nothing left: no connection and no query, or no process.
const ENDS: [&str; 3] = ["assert_quiescent()", ".wait_exit(", ".terminate("];

#[test]
fn every_test_that_it_names_ends_with_nothing_left() {
    let mut looked_at = 0;
    for test in
        rows().into_iter().filter(|row| !row[2].starts_with("not tested")).flat_map(|row| documents::quoted(row[2]))
    {
        // Unit tests have no sockets.
        let Some((file, function)) = test.split_once("::").filter(|(_, function)| !function.contains("::")) else {
            continue;
        };
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/{file}.rs"));
        let source = std::fs::read_to_string(path).unwrap();
        let bodies = documents::bodies(&source);
        // The test itself, and what it calls in its file.
        let mut reached = BTreeSet::from([function]);
        while let Some(more) = bodies.keys().find(|name| {
            let call = format!("{name}(");
            !reached.contains(*name) && reached.iter().any(|caller| bodies[caller].contains(&call))
        }) {
            reached.insert(more);
        }
        assert!(reached.iter().any(|name| ENDS.iter().any(|end| bodies[name].contains(end))), "{test}");
        looked_at += 1;
    }
    assert!(looked_at > 80, "{looked_at}");
}

/// The tests named after a fault are in its row.
#[test]
fn every_test_named_after_a_fault_is_in_its_row() {
    for file in ["faults_client", "faults_emulated", "faults_host", "faults_link", "faults_memory", "faults_tls"] {
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

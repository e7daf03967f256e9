//! docs/standards.md, docs/regressions.md and docs/dnsdist.md are true where a test can tell: every rule, bug and behaviour
//! has tests that exist, or a reason; and every test of one is named there.

use std::collections::BTreeSet;

use counterfoil_tests::documents;

const STANDARDS: &str = include_str!("../../docs/standards.md");
const REGRESSIONS: &str = include_str!("../../docs/regressions.md");
const DNSDIST: &str = include_str!("../../docs/dnsdist.md");

/// The tests in the last column.
fn named<const CELLS: usize>(document: &'static str) -> BTreeSet<&'static str> {
    documents::rows::<CELLS>(document).into_iter().flat_map(|row| documents::tests(row[CELLS - 1])).collect()
}

#[test]
fn every_rule_has_tests_that_exist_or_a_reason() {
    let named = named::<4>(STANDARDS);
    assert!(named.len() > 60, "{}", named.len());
    named.into_iter().for_each(documents::assert_exists);
}

#[test]
fn every_test_of_a_rule_is_named() {
    for file in ["standards_transport", "standards_transparency", "standards_proxy", "standards_edns"] {
        documents::assert_all_named(file, &named::<4>(STANDARDS));
    }
}

#[test]
fn every_bug_has_tests_that_exist_or_a_reason() {
    let named = named::<3>(REGRESSIONS);
    assert!(named.len() > 40, "{}", named.len());
    named.into_iter().for_each(documents::assert_exists);
}

#[test]
fn every_test_of_a_bug_is_named() {
    for file in ["regressions_answers", "regressions_resources", "regressions_tls"] {
        documents::assert_all_named(file, &named::<3>(REGRESSIONS));
    }
}

#[test]
fn every_behaviour_of_dnsdist_has_tests_that_exist_or_a_reason() {
    let named = named::<3>(DNSDIST);
    assert!(named.len() > 60, "{}", named.len());
    named.into_iter().for_each(documents::assert_exists);
}

#[test]
fn every_test_of_a_behaviour_of_dnsdist_is_named() {
    for file in ["dnsdist_behaviours", "dnsdist_scenarios", "dnsdist_states"] {
        documents::assert_all_named(file, &named::<3>(DNSDIST));
    }
}

/// Whatever file they are in.
#[test]
fn tests_named_after_a_rule_or_a_bug_are_in_its_row() {
    for (prefix, named) in [("rfc", named::<4>(STANDARDS)), ("cve_", named::<3>(REGRESSIONS))] {
        let tests = documents::tests_named(prefix);
        assert!(tests.len() > 8, "{tests:?}");
        let missing: Vec<_> = tests.iter().filter(|test| !named.contains(test.as_str())).collect();
        assert!(missing.is_empty(), "in no row: {missing:?}");
    }
}

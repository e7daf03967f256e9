//! docs/standards.md is true where a test can tell: every rule has tests that exist, or a reason; and every test of a rule
//! is named there.

use std::collections::BTreeSet;

use counterfoil_tests::documents;

const STANDARDS: &str = include_str!("../../docs/standards.md");

fn named() -> BTreeSet<&'static str> {
    documents::rows::<4>(STANDARDS).into_iter().flat_map(|row| documents::tests(row[3])).collect()
}

#[test]
fn every_rule_has_tests_that_exist_or_a_reason() {
    let named = named();
    assert!(named.len() > 60, "{}", named.len());
    named.into_iter().for_each(documents::assert_exists);
}

#[test]
fn every_test_of_a_rule_is_named() {
    for file in ["standards_transport", "standards_transparency", "standards_proxy"] {
        documents::assert_all_named(file, &named());
    }
}

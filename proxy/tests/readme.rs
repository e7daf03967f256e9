//! The README is true where a test can tell: the files that it names exist, and its list of metrics is that of the code.
//! (Its configuration is tested beside the configuration's code.)
#![expect(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::path::Path;

const README: &str = include_str!("../../README.md");

/// The code that writes metrics, without its tests.
fn sources_of_metrics() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/metrics");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let code = files.filter(|path| !path.to_string_lossy().ends_with("_tests.rs"));
    code.map(|path| std::fs::read_to_string(path).unwrap()).collect()
}

/// The text of a section, up to the next one.
fn section(heading: &str) -> &'static str {
    let (_, text) = README.split_once(&format!("\n## {heading}\n")).unwrap();
    text.split_once("\n## ").map_or(text, |(text, _)| text)
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn the_files_that_it_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let rows = |heading| section(heading).lines().filter(|line| line.starts_with('|'));
    let layout = rows("Layout of the code").filter_map(|row| quoted(row).next());
    let invariants = rows("Invariants").filter_map(|row| row.rsplit('|').nth(1)).flat_map(quoted);
    let mut named = 0;
    for path in layout.chain(invariants).filter(|name| name.contains('/')) {
        assert!(root.join(path).exists(), "{path}");
        named += 1;
    }
    assert!(named > 30, "{named}: the tables were not found");
}

#[test]
fn every_folder_of_the_program_is_named() {
    let layout: Vec<&str> = section("Layout of the code").lines().filter_map(|row| quoted(row).next()).collect();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap() {
        let entry = entry.unwrap();
        let folder = format!("proxy/src/{}/", entry.file_name().to_string_lossy());
        assert!(!entry.path().is_dir() || layout.contains(&folder.as_str()), "{folder}");
    }
}

#[test]
fn its_metrics_are_those_of_the_code() {
    // Names without prefix, with the suffix that their type adds.
    let mut in_code = BTreeSet::new();
    let sources = sources_of_metrics();
    for (call, suffix) in [
        ("counters", "_total"),
        ("counter", "_total"),
        ("seconds_counter", "_total"),
        ("gauges", ""),
        ("gauge", ""),
        ("histograms", ""),
        ("histogram", ""),
        ("info", "_info"),
    ] {
        for source in &sources {
            for after in source.split(&format!(".{call}(")).skip(1) {
                let Some(literal) = after.trim_start().strip_prefix('"') else { continue };
                in_code.insert(format!("{}{suffix}", literal.split('"').next().unwrap()));
            }
        }
    }
    let table = section("Metrics").lines().filter(|line| line.starts_with('|'));
    let in_readme: BTreeSet<String> = table.flat_map(quoted).map(str::to_owned).collect();
    assert!(in_code.len() > 30, "{in_code:?}");
    assert_eq!(in_readme, in_code);
}

#[test]
fn its_reasons_of_refusals_are_those_of_the_code() {
    let (_, list) = README.split_once("\nReasons in `client_connections_refused_total`: ").unwrap();
    let (refusals, closes) = list.split_once("In `client_connections_closed_total`").unwrap();
    let in_readme: Vec<&str> = quoted(refusals).collect();
    let in_code = counterfoil::stats::Refusal::ALL.map(counterfoil::stats::Refusal::label);
    assert_eq!(BTreeSet::from_iter(in_readme), BTreeSet::from(in_code));
    let (closes, _) = closes.split_once("\n\n").unwrap();
    for reason in quoted(closes) {
        assert!(counterfoil::close::ClientCloseReason::ALL.iter().any(|known| known.label() == reason), "{reason}");
    }
}

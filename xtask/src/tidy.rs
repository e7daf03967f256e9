//! Conventions that no lint of the compiler checks.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// Longer files hold more than one idea.
const MAX_LINES: usize = 600;

/// The only files that may hold `unsafe`; a folder ends in `/`.
const UNSAFE_ALLOWED: &[&str] = &["proxy/src/kernel/sys.rs", "proxy-common/src/pod.rs", "proxy-ebpf/src/"];

/// The only files that may except themselves from the architecture in clippy.toml. Tests may, too.
const EXCEPTIONS_ALLOWED: &[(&str, &str)] = &[
    ("proxy/build.rs", "reads the environment, as build scripts do"),
    ("proxy/src/app/listen.rs", "binds the listeners"),
    ("proxy/src/backend/connect.rs", "opens backend sockets"),
    ("proxy/src/churn.rs", "peers of a churn, only in the test binary"),
    ("proxy/src/drill/leak.rs", "leaks on purpose, in bounds"),
    ("proxy/src/query/mod.rs", "a client of its own"),
    ("proxy/src/scope.rs", "asks the kernel for interfaces on a socket that is never connected"),
    ("proxy/src/stdout.rs", "writes to standard output"),
    ("proxy/src/systemd/mod.rs", "reads what the service manager says in the environment"),
    ("proxy/src/watch/userspace.rs", "reads another process's metrics"),
];

const SOURCES: &[&str] = &["proxy", "proxy-common", "proxy-ebpf", "tests", "xtask"];

pub(crate) fn run() -> Result<()> {
    let mut findings = Vec::new();
    for path in sources()? {
        let source = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let name = path.strip_prefix(workspace::root()).unwrap_or(&path).to_string_lossy().into_owned();
        check(&name, &source, &mut findings);
    }
    if findings.is_empty() {
        return Ok(());
    }
    for finding in &findings {
        eprintln!("{finding}");
    }
    bail!("{} findings against the conventions", findings.len())
}

fn check(name: &str, source: &str, findings: &mut Vec<String>) {
    let lines = source.lines().count();
    if lines > MAX_LINES {
        findings.push(format!("{name}: {lines} lines, more than {MAX_LINES}: split it by idea"));
    }
    if !source.is_empty() && !source.ends_with('\n') {
        findings.push(format!("{name}:{lines}: no newline at the end"));
    }
    doubled(name, source, findings);
    let unsafe_allowed = UNSAFE_ALLOWED.iter().any(|it| name == *it || (it.ends_with('/') && name.starts_with(it)));
    let mut exceptions_allowed = is_test(name) || EXCEPTIONS_ALLOWED.iter().any(|(it, _)| name == *it);
    for (index, line) in source.lines().enumerate() {
        let (code, number) = (code_of(line), index + 1);
        if !unsafe_allowed && has_word(&code, "unsafe") {
            findings.push(format!("{name}:{number}: unsafe code is only in {}", UNSAFE_ALLOWED.join(", ")));
        }
        // By our own convention test modules stand at the end of a file.
        exceptions_allowed |= code.trim() == "#[cfg(test)]";
        if !exceptions_allowed && has_word(&code, "disallowed_methods") {
            findings.push(format!(
                "{name}:{number}: an exception from clippy.toml; xtask/src/tidy.rs lists those that are"
            ));
        }
    }
}

/// Errors whose text has that of their cause, and which hand the cause on besides: whoever prints the chain (`{:#}`) prints
/// it twice.
fn doubled(name: &str, source: &str, findings: &mut Vec<String>) {
    // In two parts, as this file is looked at, too.
    const ATTRIBUTE: &str = concat!("#[", "error(");
    for (at, _) in source.match_indices(ATTRIBUTE) {
        let Some((text, rest)) = source[at..].split_once(")]\n") else { continue };
        // Up to the next variant, or the end of the type.
        let variant = rest.split(ATTRIBUTE).next().unwrap_or_default();
        let variant = variant.split("\n}\n").next().unwrap_or_default();
        let hands_on = ["#[from]", "#[source]", " source:"].iter().any(|mark| variant.contains(mark));
        if hands_on && ["{0", "{source"].iter().any(|field| text.contains(field)) {
            let number = source[..at].lines().count();
            findings.push(format!(
                "{name}:{number}: an error says its cause and hands it on: without `source`, `#[from]` and `#[source]` \
                 it is said once"
            ));
        }
    }
}

fn is_test(name: &str) -> bool {
    name.ends_with("tests.rs") || name.split('/').any(|part| part == "tests")
}

/// `line` without the contents of its strings and its comment. Good enough for code that rustfmt wrote.
fn code_of(line: &str) -> String {
    let mut code = String::new();
    let mut characters = line.chars().peekable();
    let mut in_string = false;
    while let Some(character) = characters.next() {
        match character {
            '\\' if in_string => drop(characters.next()),
            '"' => in_string = !in_string,
            '/' if !in_string && characters.peek() == Some(&'/') => break,
            _ if in_string => {}
            _ => code.push(character),
        }
    }
    code
}

fn has_word(code: &str, word: &str) -> bool {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|it| it == word)
}

/// All of our Rust files.
pub(crate) fn sources() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for directory in SOURCES {
        let directory = workspace::root().join(directory);
        if directory.exists() {
            walk(&directory, &mut found)?;
        }
    }
    found.sort();
    Ok(found)
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            if !path.ends_with("target") {
                walk(&path, found)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(name: &str, source: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check(name, source, &mut findings);
        findings
    }

    #[test]
    fn unsafe_is_found_where_it_may_not_be() {
        let source = "fn f() {\n    unsafe { g() }\n}\n";
        assert_eq!(findings("proxy/src/pool.rs", source).len(), 1);
        assert!(findings("proxy/src/pool.rs", source)[0].starts_with("proxy/src/pool.rs:2:"));
        assert!(findings("proxy/src/kernel/sys.rs", source).is_empty());
        assert!(findings("proxy-ebpf/src/maps.rs", source).is_empty());
        assert_eq!(findings("proxy-ebpf/build.rs", source).len(), 1);
    }

    #[test]
    fn words_about_unsafe_are_not_unsafe() {
        for line in ["// unsafe", "#![forbid(unsafe_code)]", "let a = \"say \\\"unsafe\\\"\";", "f(); // unsafe {"] {
            assert!(findings("a.rs", &format!("{line}\n")).is_empty(), "{line}");
        }
        assert_eq!(findings("a.rs", "f(\"\"); unsafe { g() } // why\n").len(), 1);
    }

    #[test]
    fn exceptions_are_found_where_they_may_not_be() {
        let exception = "#[expect(clippy::disallowed_methods, reason = \"why not\")]\n";
        assert_eq!(findings("proxy/src/pool.rs", exception).len(), 1);
        assert!(findings("proxy/src/backend/connect.rs", exception).is_empty());
        assert!(findings("proxy/src/pool/tests.rs", exception).is_empty());
        assert!(findings("proxy/src/pool.rs", &format!("#[cfg(test)]\nmod tests {{\n{exception}}}\n")).is_empty());
    }

    #[test]
    fn errors_that_say_their_cause_twice_are_found() {
        let error = |text: &str, variant: &str| format!("enum E {{\n    #[error({text})]\n    {variant},\n}}\n");
        for (text, variant, count) in [
            ("\"a: {0}\"", "A(#[from] io::Error)", 1),
            ("\"a: {0}\"", "A(#[source] io::Error)", 1),
            ("\"a: {source}\"", "A { source: io::Error }", 1),
            ("\"a: {cause}\"", "A { cause: io::Error }", 0),
            ("\"a\"", "A(#[from] io::Error)", 0),
            ("transparent", "A(#[from] io::Error)", 0),
            ("\"a: {0}\"", "A(String),\n    #[error(transparent)]\n    B(#[from] io::Error)", 0),
        ] {
            assert_eq!(findings("a.rs", &error(text, variant)).len(), count, "{text} {variant}");
        }
    }

    #[test]
    fn long_files_are_found() {
        assert!(findings("a.rs", &"\n".repeat(MAX_LINES)).is_empty());
        assert_eq!(findings("a.rs", &"\n".repeat(MAX_LINES + 1)).len(), 1);
    }

    #[test]
    fn a_file_ends_with_a_newline() {
        assert_eq!(findings("a.rs", "fn f() {}").len(), 1);
    }
}

//! Running tests of this program again, inside namespaces of their own.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// A program, or the applet of busybox where that is all there is.
pub(crate) fn tool(name: &'static str) -> Vec<&'static str> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places = env::split_paths(&path).chain(["/sbin".into(), "/usr/sbin".into()]);
    if places.any(|place| place.join(name).exists()) { vec![name] } else { vec!["busybox", name] }
}

/// A command line.
pub(crate) fn words(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

/// Runs these tests in a new network namespace and a new pid namespace, with a `/proc` of its own. All must pass.
pub(crate) fn repeat_apart(tests: &[&str]) {
    let program = env::current_exe().unwrap();
    let script = format!(
        "{readlink} /proc/self/ns/net && {readlink} /proc/self/ns/pid && {ip} link set lo up && exec \"$@\"",
        readlink = tool("readlink").join(" "),
        ip = tool("ip").join(" ")
    );
    // Short options: busybox has no others.
    let unshare = ["-n", "-p", "-f", "--mount-proc", "sh", "-c", &script, "sh"];
    let program = [program.to_str().unwrap(), "--test-threads=1", "--exact"];
    let line: Vec<&str> = tool("unshare").into_iter().chain(unshare).chain(program).collect();
    let output = words(&line).args(tests).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let mut namespaces = said.lines();
    for kind in ["net", "pid"] {
        let own = fs::read_link(Path::new("/proc/self/ns").join(kind)).unwrap();
        assert_ne!(namespaces.next(), own.to_str(), "a namespace of its own");
    }
    assert!(said.contains(&format!("{} passed; 0 failed", tests.len())), "{said}");
}

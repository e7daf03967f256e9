//! What this kernel allows: what it says of itself, and what it does when it is tried.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Line;
use crate::command;
use crate::workspace;

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// The oldest kernel that has all that the program uses: socket cookies in tracing programs are its youngest part.
const OLDEST: (u32, u32) = (5, 12);

/// Types by which the kernel's BTF tells that it has what the eBPF program attaches to.
const TYPES: &[(&str, &str)] = &[
    ("btf_trace_inet_sock_set_state", "tp_btf inet_sock_set_state: tags sockets as they connect"),
    ("bpf_iter__bpf_sk_storage_map", "iterator bpf_sk_storage_map: lists the tagged sockets"),
    ("bpf_iter__task_file", "iterator task_file: lists descriptors, the cross-check"),
];

/// None of it is needed to build; without it the kernel view comes from sock_diag.
pub(super) fn report(target: &Path) -> Vec<Line> {
    let mut lines = vec![version(), bpf_syscall()];
    lines.extend(btf());
    lines.push(tried(target));
    lines
}

fn version() -> Line {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    match parse_release(release) {
        Some(version) if version >= OLDEST => Line::Good(format!("Linux {release}")),
        _ => Line::Note(format!("Linux {release:?}: eBPF needs {}.{} or later", OLDEST.0, OLDEST.1)),
    }
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn bpf_syscall() -> Line {
    // This setting exists if and only if the kernel was built with CONFIG_BPF_SYSCALL.
    match fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled") {
        Ok(value) if value.trim() == "0" => Line::Good("bpf(2), open to all users".to_owned()),
        Ok(_) => Line::Good("bpf(2), with CAP_BPF only".to_owned()),
        Err(_) => Line::Note("no bpf(2) in this kernel: no eBPF".to_owned()),
    }
}

fn btf() -> Vec<Line> {
    let types = match fs::read(BTF) {
        Ok(types) => types,
        Err(error) => return vec![Line::Note(format!("no BTF ({BTF}: {error}): no eBPF"))],
    };
    let mut lines = vec![Line::Good(format!("BTF, {} bytes", types.len()))];
    for (name, what) in TYPES {
        // Names stand in BTF's string section, each ended by a zero byte.
        let name = format!("\0{name}\0");
        lines.push(if types.windows(name.len()).any(|window| window == name.as_bytes()) {
            Line::Good((*what).to_owned())
        } else {
            Line::Note(format!("not in this kernel: {what}"))
        });
    }
    lines
}

/// Starts the program, and reads from its log which kernel view it got.
fn tried(target: &Path) -> Line {
    let program = target.join("release").join("counterfoil");
    if !program.exists() {
        return Line::Note(
            "loading the eBPF program: not tried, `cargo xtask build-and-run` builds it first".to_owned(),
        );
    }
    match kernel_view(target, &program) {
        Ok((source, _)) if source == "ebpf" => {
            Line::Good("loading and attaching the eBPF program: tried with the built program, works".to_owned())
        }
        Ok((source, reason)) => Line::Note(format!("the built program's kernel view is {source}: {reason}")),
        Err(error) => Line::Note(format!("loading the eBPF program: tried, and learned nothing: {error:#}")),
    }
}

/// How long the program may take to load its eBPF part.
const PATIENCE: Duration = Duration::from_secs(10);

/// A forwarder that nobody knows of, on a port of the kernel's choice.
const CONFIG: &str = r#"[admin]
http = ""
socket = ""

[[listener]]
name = "doctor"
address = "127.0.0.1:0"
pool = "doctor"

[[pool]]
name = "doctor"

[[pool.backend]]
name = "doctor"
address = "127.0.0.1:53"
"#;

/// Source and reason of the kernel view that the program reports at its start.
fn kernel_view(target: &Path, program: &Path) -> Result<(String, String)> {
    let config = target.join("doctor.toml");
    workspace::write_if_changed(&config, CONFIG.as_bytes())?;
    let mut command = command::program(program);
    command.args(["run", "--log", "info", "--log-format", "json", "--config"]).arg(&config);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Running(command.spawn().with_context(|| format!("cannot start {}", program.display()))?);
    let stderr = child.0.stderr.take().context("the program's stderr is not ours")?;
    let (sender, lines) = mpsc::channel();
    // Ends with the program, whose stderr it reads.
    thread::spawn(move || BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let deadline = Instant::now() + PATIENCE;
    let mut last = String::new();
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if let Some(found) = parse_kernel_view(&line) {
            return Ok(found);
        }
        last = line;
    }
    anyhow::bail!("it does not name its kernel view; its last words: {last}")
}

fn parse_kernel_view(line: &str) -> Option<(String, String)> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let fields = line.get("fields")?;
    let field = |name: &str| fields.get(name).and_then(serde_json::Value::as_str);
    (field("message")? == "kernel view")
        .then(|| (field("source").unwrap_or("unknown").to_owned(), field("reason").unwrap_or("unknown").to_owned()))
}

/// A child that does not outlive us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then both fail, and that is all right.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases() {
        assert_eq!(parse_release("6.1.0-35-amd64"), Some((6, 1)));
        assert_eq!(parse_release("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(parse_release(""), None);
    }

    #[test]
    fn the_kernel_view_is_found_in_the_log() {
        let line = r#"{"level":"INFO","fields":{"message":"kernel view","source":"ebpf","reason":"all loaded"}}"#;
        assert_eq!(parse_kernel_view(line), Some(("ebpf".to_owned(), "all loaded".to_owned())));
        assert_eq!(parse_kernel_view(r#"{"fields":{"message":"ready"}}"#), None);
        assert_eq!(parse_kernel_view("not JSON"), None);
    }
}

//! `counterfoil drill CLASS`: asks the running process for a drill and prints what happens.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

/// The server sends something at least this often: its longest wait is for a hoard's condition, then for a finding.
const SILENCE: Duration = Duration::from_secs(600);

/// Runs a drill of `class` in the process that listens on `socket`, printing each step to `output`. True if it
/// succeeded.
///
/// # Errors
/// Nobody listens on the socket, the connection broke, or the answer is no JSON.
pub fn client(class: &str, socket: &Path, output: &mut impl std::io::Write) -> anyhow::Result<bool> {
    let place = || format!("{}", socket.display());
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("{}: is counterfoil running, with this `admin.socket`?", place()))?;
    stream.set_read_timeout(Some(SILENCE)).with_context(place)?;
    writeln!(stream, "{}", json!({"cmd": "drill", "class": class})).with_context(place)?;
    for line in BufReader::new(stream).lines() {
        let line = line.with_context(place)?;
        let event: Value = serde_json::from_str(&line).with_context(|| format!("{}: {line:?}", place()))?;
        writeln!(output, "{}", describe(&event))?;
        if event["event"] == "done" {
            return Ok(event["ok"] == true);
        }
    }
    bail!("{}: the connection ended before the drill did", place())
}

/// One line for people: time, step, and the step's fields.
fn describe(event: &Value) -> String {
    let mut text = match event["after_seconds"].as_f64() {
        Some(after) => format!("{after:7.3} s  "),
        None => " ".repeat(11),
    };
    text.push_str(event["event"].as_str().unwrap_or("?"));
    let fields = event.as_object().into_iter().flatten();
    for (name, value) in fields.filter(|(name, _)| !matches!(name.as_str(), "event" | "after_seconds")) {
        // Writing to a string cannot fail.
        let _ = match value {
            Value::Null => Ok(()),
            Value::String(value) if value.is_empty() => Ok(()),
            Value::String(value) => write!(text, "  {name}: {value}"),
            value => write!(text, "  {name}: {value}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_one_line() {
        let event = json!({"event": "outcome", "after_seconds": 4.25, "outcome": "released", "note": "", "rung": null});
        assert_eq!(describe(&event), "  4.250 s  outcome  outcome: released");
    }
}

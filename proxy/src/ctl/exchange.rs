//! One request to the admin socket, and the events that answer it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::table::{cell, printable};

/// Sends a request, hands each event that comes to `each`, and returns the last one, which is `done`. `silence` is the
/// longest time without an event.
///
/// # Errors
/// Nobody listens on the socket, the connection broke or ended early, an event is no JSON, or `each` failed.
pub(crate) fn exchange(
    socket: &Path,
    request: &Value,
    silence: Duration,
    mut each: impl FnMut(&Value) -> Result<()>,
) -> Result<Value> {
    let place = || format!("{}", socket.display());
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("{}: is counterfoil running, with this `admin.socket`?", place()))?;
    stream.set_read_timeout(Some(silence)).with_context(place)?;
    writeln!(stream, "{request}").with_context(place)?;
    for line in BufReader::new(stream).lines() {
        let line = line.with_context(place)?;
        let event: Value = serde_json::from_str(&line).with_context(|| format!("{}: {line:?}", place()))?;
        each(&event)?;
        if event["event"] == "done" {
            return Ok(event);
        }
    }
    bail!("{}: the connection ended before the answer did", place())
}

/// One line for people: time, step, and the step's fields.
pub(crate) fn describe(event: &Value) -> String {
    let mut text = match event["after_seconds"].as_f64() {
        Some(after) => format!("{after:7.3} s  "),
        None => " ".repeat(11),
    };
    text.push_str(&printable(event["event"].as_str().unwrap_or("?")));
    let fields = event.as_object().into_iter().flatten();
    for (name, value) in fields.filter(|(name, _)| !matches!(name.as_str(), "event" | "after_seconds")) {
        match value {
            Value::Null => {}
            Value::String(value) if value.is_empty() => {}
            value => text.push_str(&format!("  {}: {}", printable(name), cell(value))),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_step_is_one_line() {
        let event = json!({"event": "outcome", "after_seconds": 4.25, "outcome": "released", "note": "", "rung": null});
        assert_eq!(describe(&event), "  4.250 s  outcome  outcome: released");
        assert_eq!(describe(&json!({"event": "done", "ok": true})), "           done  ok: true");
    }
}

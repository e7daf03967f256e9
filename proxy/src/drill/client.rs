//! `counterfoil drill CLASS`: asks the running process for a drill and prints what happens.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::Order;
use crate::ctl::{describe, exchange};

/// The server sends something at least this often: its longest wait is for a hoard's condition, then for a finding.
pub(crate) const SILENCE: Duration = Duration::from_secs(600);

/// The request to the admin socket.
pub(crate) fn request(order: &Order) -> Value {
    json!({"cmd": "drill", "class": order.class, "deaf": order.deaf})
}

/// Runs a drill in the process that listens on `socket`, printing each step to `output`. True if it
/// succeeded.
///
/// # Errors
/// Nobody listens on the socket, the connection broke, or the answer is no JSON.
pub fn client(order: &Order, socket: &Path, output: &mut impl std::io::Write) -> anyhow::Result<bool> {
    let done = exchange(socket, &request(order), SILENCE, |event| Ok(writeln!(output, "{}", describe(event))?))?;
    Ok(done["ok"] == true)
}

//! The tools as processes. Only tests know where cargo has put them: `env!("CARGO_BIN_EXE_loadgen")`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use serde_json::Value;

/// A relay or an answerer; it ends when its input is closed.
#[derive(Debug)]
pub struct Tool {
    child: Child,
    output: BufReader<ChildStdout>,
    /// Where it listens.
    pub address: String,
}

impl Tool {
    /// Starts it.
    ///
    /// # Panics
    /// If it does not say where it listens.
    #[track_caller]
    pub fn start(program: &str, arguments: &[&str]) -> Self {
        let mut child =
            Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        let address = said["address"].as_str().unwrap().to_owned();
        Self { child, output, address }
    }

    /// What an answerer has counted so far.
    ///
    /// # Panics
    /// If it has ended.
    #[track_caller]
    pub fn counts(&mut self) -> Value {
        writeln!(self.child.stdin.as_mut().unwrap(), "counts").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the load generator: whether all was well, and its result.
///
/// # Panics
/// If it has none.
#[track_caller]
pub fn load(loadgen: &str, target: &str, arguments: &[&str]) -> (bool, Value) {
    let Output { status, stdout, stderr } = Command::new(loadgen).arg(target).args(arguments).output().unwrap();
    let said = serde_json::from_slice(&stdout);
    (status.success(), said.unwrap_or_else(|_| panic!("no result: {}", String::from_utf8_lossy(&stderr))))
}

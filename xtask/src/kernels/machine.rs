//! An emulated machine: QEMU without KVM, so that it runs where no virtualisation is to be had.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::tools::Root;

/// From power-on to power-off. All tests together take a fraction of it on a machine that is not busy.
const TIME_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Lines of the console that are shown when something goes wrong.
const TAIL: usize = 30;

/// Boots `kernel` and gives `line` what it writes to its console, until it powers off.
pub(super) fn run(
    root: &Root,
    processor: &str,
    kernel: &Path,
    initrd: &Path,
    mut line: impl FnMut(&str),
) -> Result<()> {
    // If we are killed, the machine is too.
    let mut qemu = root.program("setpriv");
    qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    // One processor: with two this emulation stops now and then for seconds, and some kernels do not boot.
    qemu.args([
        "-accel",
        "tcg",
        "-cpu",
        processor,
        "-smp",
        "1",
        "-m",
        "1024",
        "-nographic",
        "-no-reboot",
        "-nic",
        "none",
    ]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    // A panic restarts at once, which -no-reboot makes the end. Lesser messages would tear the tests' lines apart.
    qemu.args(["-append", "console=ttyS0 panic=-1 loglevel=2"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut machine = Running(qemu.spawn().context("cannot start QEMU")?);
    let console = machine.0.stdout.take().context("the machine's console is not ours")?;
    let (sender, lines) = mpsc::channel();
    // Ends with the machine, whose console it reads.
    thread::spawn(move || {
        BufReader::new(console).split(b'\n').map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    let end = Instant::now() + TIME_LIMIT;
    let mut seen: Vec<String> = Vec::new();
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes).replace('\r', "");
                line(&text);
                seen.push(text);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                bail!("still running after {} s; its console:\n{}", TIME_LIMIT.as_secs(), tail(&seen));
            }
        }
    }
    let status = machine.0.wait().context("the machine's process")?;
    if !status.success() {
        bail!("QEMU ended with {status}; its console:\n{}", tail(&seen));
    }
    Ok(())
}

fn tail(lines: &[String]) -> String {
    lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default().join("\n")
}

/// A machine that does not outlive us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then both fail, and that is all right.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

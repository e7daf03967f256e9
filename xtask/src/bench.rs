//! `cargo xtask bench`.

use anyhow::{Result, bail};

pub(crate) fn run(_args: Vec<String>) -> Result<()> {
    bail!("there is no benchmark yet")
}

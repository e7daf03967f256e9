//! Makes the certificate of the benchmarks: `certificate DIRECTORY`; see `counterfoil_tests::load::certificate`.

use std::path::PathBuf;

use clap::Parser;
use counterfoil_tests::load::certificate;

/// Writes `certificate.pem`, `key.pem` and both together as `both.pem`.
#[derive(Debug, Parser)]
struct Options {
    /// An existing directory.
    directory: PathBuf,
}

fn main() -> anyhow::Result<()> {
    certificate::write(&Options::parse().directory)
}

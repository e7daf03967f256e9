//! The load generator of the benchmarks; see `counterfoil_tests::load::generator`.

use std::process::ExitCode;

use clap::Parser as _;
use counterfoil_tests::load::generator;

fn main() -> anyhow::Result<ExitCode> {
    let well = generator::run(&generator::Options::parse())?;
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

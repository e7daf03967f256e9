//! The `attacker` of the benchmarks; see `counterfoil_tests::load::attacker`.

use clap::Parser as _;
use counterfoil_tests::load::attacker;

fn main() -> anyhow::Result<()> {
    attacker::run(&attacker::Options::parse())
}

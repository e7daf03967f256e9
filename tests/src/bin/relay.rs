//! The `relay` of the benchmarks; see `counterfoil_tests::load::relay`.

use clap::Parser as _;
use counterfoil_tests::load::relay;

fn main() -> anyhow::Result<()> {
    relay::run(&relay::Options::parse())
}

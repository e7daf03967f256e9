//! The `answerer` of the benchmarks; see `counterfoil_tests::load::answerer`.

use clap::Parser as _;
use counterfoil_tests::load::answerer;

fn main() -> anyhow::Result<()> {
    answerer::run(&answerer::Options::parse())
}

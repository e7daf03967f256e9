//! Counterfoil: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    counterfoil::cli::main()
}

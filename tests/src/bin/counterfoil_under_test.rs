//! The program with feature `test-hooks`: what the scenarios run.

fn main() -> std::process::ExitCode {
    counterfoil::cli::main()
}

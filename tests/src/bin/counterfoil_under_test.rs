//! The program with feature `test-hooks`: what the scenarios run.

/// As in the program itself.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    counterfoil::cli::main()
}

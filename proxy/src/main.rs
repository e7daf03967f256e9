//! Counterfoil: see the library.

use std::process::ExitCode;

/// A connection is, above all, allocations that tokio aligns to 128 bytes. The C library's allocator is slow to find them and
/// leaves gaps between them. Without huge pages: with them a table takes the memory that it has room for, used or not.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    counterfoil::cli::main()
}

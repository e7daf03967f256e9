#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| counterfoil::fuzzing::proxy_in(bytes));

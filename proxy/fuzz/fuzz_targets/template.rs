#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| counterfoil::fuzzing::template(text));

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| worker::fetch::fuzz::tree(input));

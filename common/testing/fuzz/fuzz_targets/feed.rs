#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| producer::feed::fuzz::feed(input));

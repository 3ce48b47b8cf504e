#![no_main]

#[path = "../../../../worker/o200k/tests/it/compare.rs"]
mod compare;

libfuzzer_sys::fuzz_target!(|input: &[u8]| compare::compare(&String::from_utf8_lossy(input)));

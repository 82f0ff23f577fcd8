//! See `dtma_agent::fuzz`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| dtma_agent::fuzz::run("release", data));

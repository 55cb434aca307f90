#![no_main]

use std::sync::LazyLock;

static LAW: LazyLock<fn(&[u8])> = LazyLock::new(|| atoll_fuzz::law("shared"));

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| LAW(bytes));

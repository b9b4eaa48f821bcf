//! One program for all targets: `PGWEIR_FUZZ_TARGET` says which. `make fuzz` builds and runs it.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static RUN: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("PGWEIR_FUZZ_TARGET").unwrap_or_default();
    let all = || pgweir_proto_fuzz::TARGETS.iter().chain(&pgweir_config_fuzz::TARGETS).chain(&pgweir_fuzz::TARGETS);
    match all().find(|(known, _)| *known == name) {
        Some((_, run)) => *run,
        None => {
            let names: Vec<&str> = all().map(|(known, _)| *known).collect();
            eprintln!("PGWEIR_FUZZ_TARGET={name:?}: one of {} expected", names.join(", "));
            std::process::exit(2);
        }
    }
});

fuzz_target!(|input: &[u8]| RUN(input));

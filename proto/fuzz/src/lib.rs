//! What is fuzzed of [`pgweir_proto`]: functions that take any bytes and panic when a promise is broken.
//!
//! The same functions run under libFuzzer (`make fuzz`, the engine is
//! `tests/fuzz/engine`) and, with the inputs kept in
//! `corpus/` and `regressions/`, as ordinary tests. An input is the whole experiment: what is chosen (where to cut, which
//! role to play) is read from its front.
//!
//! | target | promise |
//! |---|---|
//! | [`scanner`](scanner::scanner) | any chunking gives the same messages, those that a naive reader finds |
//! | [`startup`](startup::startup) | what is read of a first packet is what is in it: written again it is the same bytes |
//! | [`views`](views::views) | the same for every message view, of both directions |
//! | [`pipeline`](pipeline::pipeline) | agrees with a naive server about what is owed, and is settled when that is |
//! | [`proxy`](proxy::proxy) | a PROXY header is what a naive reader finds, however it arrives; what is behind it is left |
//! | [`scram`](scram::scram) | nobody is let in who changed one byte; no message of a peer's panics or costs much |

#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a panic is how a broken promise is told"
)]

pub mod pipeline;
pub mod proxy;
pub mod scanner;
pub mod scram;
mod source;
pub mod startup;
pub mod views;

use std::path::Path;
use std::sync::LazyLock;

pub use source::Source;

/// A function under test; it panics when a promise is broken.
pub type Target = (&'static str, fn(&[u8]));

/// All of them, by the names of their corpora.
pub const TARGETS: [Target; 6] = [
    ("scanner", scanner::scanner),
    ("startup", startup::startup),
    ("views", views::views),
    ("pipeline", pipeline::pipeline),
    ("proxy", proxy::proxy),
    ("scram", scram::scram),
];

/// Runs every input of `corpus/NAME` and `regressions/NAME` below `root` through each target; gives the number of inputs.
///
/// # Panics
///
/// As the target does; the input's file is named on standard error first. If a corpus is missing.
pub fn replay(root: &str, targets: &[Target]) -> usize {
    let mut count = 0;
    for (name, run) in targets {
        let folder = |kind: &str| Path::new(root).join(kind).join(name);
        let corpus = std::fs::read_dir(folder("corpus")).expect("a corpus");
        let regressions = std::fs::read_dir(folder("regressions")).into_iter().flatten();
        for entry in corpus.chain(regressions) {
            let path = entry.expect("a directory entry").path();
            let input = std::fs::read(&path).expect("a readable input");
            let named = Named(&path);
            run(&input);
            std::mem::forget(named);
            count += 1;
        }
    }
    count
}

/// With `PGWEIR_FUZZ_TRACE` set, what happens is told on standard error.
pub fn trace(what: impl FnOnce() -> String) {
    static TOLD: LazyLock<bool> = LazyLock::new(|| std::env::var_os("PGWEIR_FUZZ_TRACE").is_some());
    if *TOLD {
        eprintln!("{}", what());
    }
}

/// Tells which input it was, if it is dropped: by a panic.
struct Named<'a>(&'a Path);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        eprintln!("the input is {}", self.0.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_input_of_the_corpora_breaks_a_promise() {
        assert!(replay(env!("CARGO_MANIFEST_DIR"), &TARGETS) > 100);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

        #[test]
        fn no_random_bytes_break_a_promise(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for (_, run) in TARGETS {
                run(&bytes);
            }
        }
    }
}

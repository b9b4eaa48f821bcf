//! What is fuzzed of the program: functions that take any bytes and panic when a promise is broken. See `proto/fuzz` for
//! how they are run.
//!
//! | target | promise |
//! |---|---|
//! | [`sql`](text::sql) | any text is read; nothing in front of a statement hides it; a cached answer is the same answer |
//! | [`options`](text::options) | the start-up parameter `options` is read as Postgres reads it, or refused |
//! | [`session`](session::session) | whole sessions, through pgweir: each client hears what it would hear from a server of its own |
//! | [`hostile`](hostile::hostile) | whole sessions before servers that break the protocol: nobody hears of anybody else, and all are served when those are gone |

#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a panic is how a broken promise is told"
)]

pub mod hostile;
pub mod server;
pub mod session;
pub mod text;

use pgweir_proto_fuzz::Target;

/// All of them, by the names of their corpora.
pub const TARGETS: [Target; 4] =
    [("sql", text::sql), ("options", text::options), ("session", session::session), ("hostile", hostile::hostile)];

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};
    use std::time::Duration;

    /// How long random sessions are tried, of each kind.
    const SESSIONS_FOR: Duration = Duration::from_secs(4);

    #[test]
    fn no_input_of_the_corpora_breaks_a_promise() {
        assert!(pgweir_proto_fuzz::replay(env!("CARGO_MANIFEST_DIR"), &TARGETS) > 100);
    }

    /// Seeds count from 1: a failure is of the change and not of the day. `PGWEIR_FUZZ_SEED` begins
    /// elsewhere, `PGWEIR_FUZZ_SECONDS` goes on for longer.
    #[test]
    fn random_sessions_are_answered_as_by_servers_of_their_own() {
        try_at_random(session::session);
    }

    #[test]
    fn random_servers_that_break_the_protocol_harm_only_whom_they_serve() {
        try_at_random(hostile::hostile);
    }

    fn try_at_random(target: fn(&[u8])) {
        let first = std::env::var("PGWEIR_FUZZ_SEED").map_or(1, |seed| seed.parse().unwrap());
        let lasts = std::env::var("PGWEIR_FUZZ_SECONDS")
            .map_or(SESSIONS_FOR, |text| Duration::from_secs(text.parse().unwrap()));
        let begun = std::time::Instant::now();
        for seed in first.. {
            eprintln!("PGWEIR_FUZZ_SEED={seed}");
            let mut random = SmallRng::seed_from_u64(seed);
            let len = random.random_range(40..400);
            let bytes: Vec<u8> = (0..len).map(|_| random.random()).collect();
            target(&bytes);
            if begun.elapsed() > lasts {
                break;
            }
        }
    }

    /// A scan that took time in the square of the length would take minutes.
    #[test]
    fn a_text_is_scanned_in_linear_time() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/sql");
        for entry in std::fs::read_dir(corpus).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read(&path).unwrap();
            let long = text.repeat((1 << 17) / text.len().max(1));
            let begun = std::time::Instant::now();
            text::sql(&long);
            assert!(begun.elapsed().as_secs() < 10, "{} took {:?}", path.display(), begun.elapsed());
        }
    }
}

//! The figures of the long tier: `make test-long` keeps what its tests have to tell (`tests/long.md`).

use std::fs::OpenOptions;
use std::io::Write as _;

/// Prints what a test has to tell and, if `LONG_TIER_FIGURES` names a file, adds it there as a row of a table.
pub(crate) fn record(module: &str, test: &str, figures: &str) {
    println!("{module}::{test}: {figures}");
    if let Some(path) = std::env::var_os("LONG_TIER_FIGURES") {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        // In one piece: others may write, too.
        let row = format!("| `{module}` | {} | {figures} |\n", test.replace('_', " "));
        file.write_all(row.as_bytes()).unwrap();
    }
}

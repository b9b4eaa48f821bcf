//! What `pg_query`'s build script asks of `bindgen`, answered from a committed file.
//!
//! `bindgen` reads C headers with libclang, which few machines have and which `make deps` could install only as root.
//! The header that `pg_query` has it read changes with the version of `pg_query` alone, and so do its bindings: they
//! stand in `pg_query.rs`, and the workspace's `[patch.crates-io]` puts this crate in `bindgen`'s place. A header that
//! the file was not made for is refused.

use std::path::{Path, PathBuf};

/// The version of `pg_query`'s header that the committed bindings are of.
const MADE_FOR: &str = "#define PG_VERSION_NUM 180006";

const BINDINGS: &str = include_str!("pg_query.rs");

/// `bindgen::Builder`, as far as it is used.
#[derive(Debug, Default)]
pub struct Builder {
    header: PathBuf,
}

impl Builder {
    /// The header to be bound.
    #[must_use]
    pub fn header(self, header: impl Into<String>) -> Self {
        Self { header: PathBuf::from(header.into()) }
    }

    /// The bindings.
    ///
    /// # Errors
    ///
    /// The header cannot be read, or is not the one that the bindings were made for.
    pub fn generate(self) -> Result<Bindings, String> {
        let at = self.header.display();
        let text = std::fs::read_to_string(&self.header).map_err(|error| format!("{at}: {error}"))?;
        if text.contains(MADE_FOR) {
            Ok(Bindings)
        } else {
            Err(format!("{at} is not the header that src/sql/grammar/bindings/pg_query.rs was made for: make it anew"))
        }
    }
}

/// `bindgen::Bindings`.
#[derive(Debug)]
pub struct Bindings;

impl Bindings {
    /// Writes them to `path`.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn write_to_file(&self, path: impl AsRef<Path>) -> std::io::Result<()> {
        std::fs::write(path, BINDINGS)
    }
}

//! What is kept between runs: `PGWEIR_CACHE`, else `~/.cache/pgweir`.

use std::env;
use std::path::{Path, PathBuf};

/// The folder; `None` when neither it nor a home directory is known.
pub(crate) fn directory() -> Option<PathBuf> {
    let own = env::var_os("PGWEIR_CACHE").map(PathBuf::from);
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".cache/pgweir"));
    own.or_else(home)
}

/// The folder of Postgres 18's server programs, whether it is there or not; `None` where there is no cache.
pub(crate) fn postgres_18() -> Option<PathBuf> {
    Some(directory()?.join("postgres-18/bin"))
}

/// The Python that has the drivers of `.ci/requirements.txt`; `None` before `make deps`.
#[must_use]
pub fn drivers_python() -> Option<PathBuf> {
    let python = directory()?.join("venv/bin/python");
    python.is_file().then_some(python)
}

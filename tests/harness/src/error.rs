//! What can go wrong while starting, asking or stopping something.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use crate::programs::NotFound;
use crate::wire::ServerError;

/// Something the harness was asked to start, stop or ask did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarnessError {
    /// Postgres' server programs are not on this machine.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The operating system refused.
    #[error("{doing} {path}: {source}", path = path.display())]
    Io {
        /// What was under way: a verb in its -ing form.
        doing: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A program that prepares something (`initdb`, `pg_basebackup`, `cp`) failed.
    #[error("{program} failed ({status}):\n{output}")]
    Program {
        /// The program's name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// Its standard output and standard error.
        output: String,
    },
    /// A process ended that should be running.
    #[error("{what} ended ({status}):\n{log}")]
    Ended {
        /// The process.
        what: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// A wait reached its deadline.
    #[error("{what} not within {within:?}:\n{log}")]
    Late {
        /// What was awaited.
        what: String,
        /// How long it was awaited.
        within: Duration,
        /// The end of the log of the process it concerns.
        log: String,
    },
    /// Postgres answered a statement of the harness with an error.
    #[error("{sql}: {error}")]
    Sql {
        /// The statement.
        sql: String,
        /// The server's `ErrorResponse`.
        error: ServerError,
    },
    /// No free port on 127.0.0.1 after so many attempts.
    #[error("no free port on 127.0.0.1 in {tries} tries")]
    NoPort {
        /// Ports tried.
        tries: u32,
    },
    /// The call needs a running Postgres, and this one is stopped.
    #[error("this Postgres is stopped")]
    Stopped,
    /// There is no pgweir program.
    #[error("no pgweir program at {path}; run `cargo build`, or set PGWEIR_BIN", path = path.display())]
    NoPgweir {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// An HTTP answer that is none.
    #[error("not an HTTP answer: {start:?}")]
    NotHttp {
        /// Its first bytes.
        start: String,
    },
}

/// Attaches what was under way, and to what, to an [`io::Error`].
pub(crate) trait Doing<T> {
    /// `doing` is a verb in its -ing form.
    fn doing(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T, HarnessError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T, HarnessError> {
        self.map_err(|source| HarnessError::Io { doing, path: path.as_ref().to_path_buf(), source })
    }
}

/// The last `limit` bytes of a log, at a line's start.
pub(crate) fn tail(log: &str, limit: usize) -> String {
    let from = log.len().saturating_sub(limit);
    let from = (from..log.len()).find(|at| log.is_char_boundary(*at)).unwrap_or(0);
    let cut = log.get(from..).unwrap_or(log);
    match cut.split_once('\n') {
        Some((_, rest)) if from > 0 => rest.to_owned(),
        _ => cut.to_owned(),
    }
}

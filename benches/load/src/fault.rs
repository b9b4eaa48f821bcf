//! What can go wrong in a run. Any of it ends the run: a benchmark with errors in it has no figures.

use std::path::PathBuf;
use std::time::Duration;

use crate::replies::Broken;

/// Why the benchmark could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A program could not be started or asked for its version.
    #[error("{}: {reason}", path.display())]
    Program {
        /// The program as it was named.
        path: PathBuf,
        /// What was wrong with it.
        reason: String,
    },
    /// A pooler did not come up within its time; the end of its log follows.
    #[error("{label} accepts no login within {within:?}; its log ends:\n{log}")]
    NotReady {
        /// The pooler's label.
        label: String,
        /// How long it was waited for.
        within: Duration,
        /// The last lines it wrote.
        log: String,
    },
    /// The peer refused the login.
    #[error("login refused: {0}")]
    Refused(String),
    /// The peer asked for a way to log in that the benchmark does not speak.
    #[error("authentication request {0} is not spoken here")]
    Authentication(i32),
    /// The stream of answers lost its framing.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// The peer answered a transaction with an error.
    #[error("a transaction was answered by an error: {0}")]
    Answer(String),
    /// Fewer or more rows came back than the transactions asked for.
    #[error("{transactions} transactions returned {rows} rows, {want} expected")]
    Rows {
        /// Transactions completed.
        transactions: u64,
        /// Rows received.
        rows: u64,
        /// Rows they should have returned.
        want: u64,
    },
    /// No answer came for a while although some were owed.
    #[error("{owed} clients had no answer for {for_:?}")]
    Stalled {
        /// Clients waiting for an answer.
        owed: usize,
        /// How long nothing arrived.
        for_: Duration,
    },
    /// The peer closed a connection.
    #[error("the peer closed a client's connection")]
    Closed,
    /// The generator process ended or spoke nonsense.
    #[error("load generator: {0}")]
    Generator(String),
    /// Postgres could not be started.
    #[error("postgres: {0}")]
    Postgres(String),
    /// Stopped by a signal.
    #[error("interrupted")]
    Interrupted,
}

impl Fault {
    /// Puts what was being done to an I/O error; for `map_err`.
    pub fn io(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// As [`Fault::io`], for an errno.
    pub fn errno(what: &'static str) -> impl Fn(nix::errno::Errno) -> Self {
        move |errno| Self::Io { what, source: errno.into() }
    }
}

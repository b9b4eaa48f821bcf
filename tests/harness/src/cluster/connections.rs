//! How many connections a Postgres has, now and at most over a time.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{literal, sql_error};
use crate::error::HarnessError;
use crate::sql::{APPLICATION_NAME, Session};

/// Which client connections to count. The harness's own are never among them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionFilter {
    /// Of this role.
    pub user: Option<String>,
    /// To this database.
    pub database: Option<String>,
    /// Whose `application_name` is this.
    pub application_name: Option<String>,
}

impl ConnectionFilter {
    /// Every client connection.
    #[must_use]
    pub fn any() -> Self {
        Self::default()
    }

    /// Those of a role.
    pub fn user(user: impl Into<String>) -> Self {
        Self { user: Some(user.into()), ..Self::default() }
    }

    /// Those that bear this `application_name`.
    pub fn application_name(name: impl Into<String>) -> Self {
        Self { application_name: Some(name.into()), ..Self::default() }
    }

    pub(super) fn sql(&self) -> String {
        let mut sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
             AND application_name <> {}",
            literal(APPLICATION_NAME)
        );
        for (column, wanted) in
            [("usename", &self.user), ("datname", &self.database), ("application_name", &self.application_name)]
        {
            if let Some(wanted) = wanted {
                // Writing to a String cannot fail.
                let _ = write!(sql, " AND {column} = {}", literal(wanted));
            }
        }
        sql
    }
}

pub(super) fn count(session: &mut Session, sql: &str) -> Result<u32, HarnessError> {
    let outcome =
        session.query(sql).map_err(|source| HarnessError::Io { doing: "asking Postgres", path: sql.into(), source })?;
    if let Some(error) = outcome.error {
        return Err(sql_error(sql, error));
    }
    let count = outcome.value().and_then(|count| count.parse().ok());
    Ok(count.unwrap_or(0))
}

/// Counts connections again and again on a thread and a connection of its own, until dropped.
#[derive(Debug)]
pub struct ConnectionWatch {
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    most: AtomicU32,
    samples: AtomicU64,
    stop: AtomicBool,
}

impl ConnectionWatch {
    pub(super) fn start(mut session: Session, filter: &ConnectionFilter, every: Duration) -> Self {
        let seen = Arc::new(Seen::default());
        let (shared, sql) = (Arc::clone(&seen), filter.sql());
        let thread = thread::spawn(move || {
            while !shared.stop.load(Ordering::Relaxed) {
                // The server is gone: what was seen so far stands.
                let Ok(count) = count(&mut session, &sql) else {
                    return;
                };
                shared.most.fetch_max(count, Ordering::Relaxed);
                shared.samples.fetch_add(1, Ordering::Relaxed);
                thread::sleep(every);
            }
        });
        Self { seen, thread: Some(thread) }
    }

    /// The most connections seen at once so far.
    #[must_use]
    pub fn most(&self) -> u32 {
        self.seen.most.load(Ordering::Relaxed)
    }

    /// How often it looked so far; a test should check that it did.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.seen.samples.load(Ordering::Relaxed)
    }
}

impl Drop for ConnectionWatch {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

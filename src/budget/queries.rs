//! The questions of the census, and what their rows mean.
//!
//! Each runs under a `search_path` of ours: nothing of a user's is called by it. An ordinary role may ask all of it. The view
//! `pg_stat_activity` is frozen within a transaction from the first look on: the lock comes first, as a statement of its own.

use std::time::Duration;

use super::census::{Census, Limits, Process, Row};
use super::roll::Roll;
use super::tag::NEVER;

macro_rules! rows {
    () => {
        "SET LOCAL jit TO off; \
        SELECT 'l', CASE WHEN r.rolsuper THEN '-1' ELSE r.rolconnlimit::text END, \
        CASE WHEN r.rolsuper THEN '-1' ELSE d.datconnlimit::text END, \
        (current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int \
        - coalesce(current_setting('reserved_connections', true), '0')::int)::text, a.pid::text, \
        floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint::text \
        FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid JOIN pg_database d ON d.oid = a.datid \
        WHERE a.pid = pg_backend_pid(); \
        SELECT 'r', coalesce(b.datid, 0)::text, b.datid = a.datid, coalesce(b.usesysid, 0)::text, b.usesysid = a.usesysid, b.application_name, b.backend_type, \
        floor(extract(epoch FROM clock_timestamp() - b.backend_start) * 1000)::bigint::text, b.pid::text \
        FROM pg_stat_activity b, (SELECT datid, usesysid FROM pg_stat_activity WHERE pid = pg_backend_pid()) a \
        WHERE b.datid IS NOT NULL AND b.usesysid IS NOT NULL OR b.state = 'starting'"
    };
}

/// The census as things stand.
pub const LOOK: &str =
    concat!("SET LOCAL search_path TO pg_catalog, pg_temp; SET LOCAL statement_timeout TO 2000; ", rows!());

/// The same for whoever merely wants to know: it takes no longer than half a second.
pub const GLANCE: &str =
    concat!("SET LOCAL search_path TO pg_catalog, pg_temp; SET LOCAL statement_timeout TO 500; ", rows!());

/// The census for who is alone with it, if nobody else is; the transaction stays open, for 2 s at most.
pub const ASK: &str = concat!(
    "BEGIN ISOLATION LEVEL READ COMMITTED, READ ONLY; SET LOCAL idle_in_transaction_session_timeout TO 2000; \
    SET LOCAL search_path TO pg_catalog, pg_temp; SET LOCAL statement_timeout TO 2000; \
    SELECT 'k', pg_try_advisory_xact_lock(1885828965, 26994)::text; ",
    rows!()
);

/// A command that fails when the server's clock shows `until` or more: in front of what takes a claim off, it keeps who was
/// stopped meanwhile from making a connection of a claim that others do not count any more. Nothing in it is looked up by the
/// session's `search_path`.
#[must_use]
pub fn in_time(until: u64) -> String {
    if until == NEVER {
        return String::new();
    }
    format!(
        "SELECT 1 OPERATOR(pg_catalog./) CAST(pg_catalog.clock_timestamp() OPERATOR(pg_catalog.<) \
         pg_catalog.to_timestamp({}.{:03}) AS pg_catalog.int4);",
        until / 1000,
        until % 1000
    )
}

/// The most that an answer may be; bytes. A row has some 100.
pub const ANSWER_MAX: usize = 4 << 20;

/// What was answered so far.
#[derive(Debug, Default)]
pub struct Answers {
    /// The rows of the census.
    pub census: Census,
    /// Whose they are, for whoever wants to know.
    pub roll: Roll,
    /// Nobody else has the lock.
    pub locked: bool,
    /// The process id of the server that answered.
    pub pid: Option<u32>,
}

impl Answers {
    /// No rows yet; `fleet` is `db_connections`, if there is one.
    #[must_use]
    pub fn new(fleet: Option<u32>) -> Self {
        Self { census: Census::new(Limits::default(), fleet), ..Self::default() }
    }

    /// Takes in the columns of a row.
    pub fn row<'a>(&mut self, mut columns: impl Iterator<Item = Option<&'a [u8]>>) {
        let mut next = || columns.next().flatten();
        match next() {
            Some(b"k") => self.locked = next() == Some(b"true"),
            Some(b"l") => {
                let mut limit = || text(next()).and_then(|text| text.parse().ok());
                let (role, database, server) = (limit(), limit(), limit());
                self.census.limits = Limits { role, database, server };
                self.pid = text(next()).and_then(|text| text.parse().ok());
                self.census.now = text(next()).and_then(|text| text.parse().ok()).unwrap_or_default();
            }
            Some(b"r") => {
                let id = |value| text(value).and_then(|text| text.parse().ok()).unwrap_or_default();
                let (database, here) = (id(next()), next() == Some(b"t"));
                let (role, same_role) = (id(next()), next() == Some(b"t"));
                let name = next().unwrap_or_default();
                let process = match next() {
                    None => Process::Hidden,
                    Some(b"client backend") => Process::Client,
                    Some(_) => Process::Other,
                };
                let age = text(next()).and_then(|text| text.parse().ok()).map(Duration::from_millis);
                let row = Row { name, database, here, role, same_role, process, age };
                if self.census.row(&row) {
                    self.roll.row(&row, text(next()).and_then(|text| text.parse().ok()));
                }
            }
            _ => {}
        }
    }
}

fn text(value: Option<&[u8]>) -> Option<&str> {
    std::str::from_utf8(value?).ok()
}

#[cfg(test)]
mod tests {
    use super::super::census::Scope;
    use super::*;

    #[test]
    fn rows_are_read_and_what_is_not_certain_counts() {
        let mut answers = Answers::new(Some(30));
        let rows: [&[&str]; 10] = [
            &["k", "true"],
            &["l", "20", "-1", "97", "4711", "1764342000123"],
            &["r", "5", "t", "10", "t", "[pgweir a/1#1 +1]", "client backend", "1500"],
            &["r", "5", "t", "10", "t", "[pgweir a/1#1]", "parallel worker", "5"],
            &["r", "5", "t", "11", "f", "[pgweir b/2#1]", "-", "-"],
            &["r", "5", "t", "11", "f", "[pgweir b/2#1]", "-", "-"],
            &["r", "5", "t", "12", "f", "[pgweir b/2#1]", "-", "-"],
            &["r", "6", "f", "11", "f", "psql", "-", "-"],
            &["r", "6", "f", "11", "f", "psql", "-", "-"],
            &["x", "1"],
        ];
        for row in rows {
            answers.row(row.iter().map(|value| (*value != "-").then_some(value.as_bytes())));
        }
        assert!(answers.locked);
        assert_eq!((answers.pid, answers.census.claims_until()), (Some(4711), 1_764_342_005_123));
        let limits = Limits { role: Some(20), database: None, server: Some(97) };
        assert_eq!(answers.census.limits, limits);
        let used = |scope| answers.census.account(scope, "a/1", Duration::MAX).map(|account| account.used());
        let want = [Some(2), None, Some(6), Some(6)];
        assert_eq!(Scope::ALL.map(used), want);
    }

    #[test]
    fn who_is_late_is_told_by_an_error() {
        assert_eq!(in_time(NEVER), "");
        let text = in_time(1_764_342_000_007);
        assert!(text.contains("to_timestamp(1764342000.007)") && text.ends_with("int4);"), "{text}");
    }
}

//! The census: what `pg_stat_activity` and the limits said at one moment.

use std::time::Duration;

use hashbrown::{HashMap, HashSet};

use super::account::Account;
use super::tag::{self, Mark};

/// What is claimed is logged in within this time, by the server's clock, or not at all; milliseconds.
const CLAIM: u64 = 5000;

/// Claims count so much longer: between a census' first look and its clock there is no more (`statement_timeout`);
/// milliseconds.
const CENSUS_MAX: u64 = 2000;

/// Whose connections a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// `rolconnlimit`: this role's connections, whatever their database.
    Role,
    /// `datconnlimit`: all connections to this database.
    Database,
    /// `max_connections` without what is reserved: all connections.
    Server,
    /// `db_connections`, which no server enforces: all connections.
    Fleet,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Role, Self::Database, Self::Server, Self::Fleet];

    /// The operator's word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Role => "role",
            Self::Database => "database",
            Self::Server => "server",
            Self::Fleet => "fleet",
        }
    }
}

/// The limits of each scope; none where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// See [`Scope::Role`].
    pub role: Option<u32>,
    /// See [`Scope::Database`].
    pub database: Option<u32>,
    /// See [`Scope::Server`].
    pub server: Option<u32>,
}

/// What the server tells of the kind of a row's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// A client's.
    Client,
    /// A parallel worker, a walsender or the like: no limit counts it.
    Other,
    /// It is another role's, and this one may not know.
    Hidden,
}

/// A row of `pg_stat_activity` that has a database and a role.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Its `application_name`.
    pub name: &'a [u8],
    /// The object id of its database.
    pub database: u32,
    /// That is the one of whoever asks.
    pub here: bool,
    /// The object id of its role.
    pub role: u32,
    /// That is the one of whoever asks.
    pub same_role: bool,
    /// What it is.
    pub process: Process,
    /// How long it has been there; none if this role may not know.
    pub age: Option<Duration>,
}

/// One connection, as it counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seat {
    /// Whose it is, an index of [`Census::members`]; none is a foreigner's.
    pub(super) member: Option<u32>,
    pub(super) mark: Mark,
    pub(super) database: u32,
    pub(super) here: bool,
    pub(super) same_role: bool,
    pub(super) age: Option<Duration>,
}

/// Everyone's connections and the limits, at one moment.
#[derive(Debug, Default)]
pub struct Census {
    /// What the server enforces.
    pub limits: Limits,
    /// `db_connections`; none if it is not set.
    pub fleet: Option<u32>,
    /// The server's clock: milliseconds since 1970; 0 if it did not tell.
    pub now: u64,
    pub(super) seats: Vec<Seat>,
    pub(super) members: Vec<Box<[u8]>>,
    /// What their names tell.
    pub(super) weights: Vec<u32>,
    numbers: HashMap<Box<[u8]>, u32, foldhash::fast::RandomState>,
    hidden: HashSet<(u32, u32, Box<[u8]>), foldhash::fast::RandomState>,
}

impl Census {
    /// No rows yet.
    #[must_use]
    pub fn new(limits: Limits, fleet: Option<u32>) -> Self {
        Self { limits, fleet, ..Self::default() }
    }

    /// Takes in a row. What is not certain counts. False if it does not.
    pub fn row(&mut self, row: &Row<'_>) -> bool {
        if row.process == Process::Other {
            return false;
        }
        let tag = tag::split(row.name).map(|(_, tag)| tag);
        // A parallel worker inherits the name, and of another role's rows nothing says which they are. Tags have numbers: of
        // equal ones all but one are such workers, if they have the same database and role.
        if row.process == Process::Hidden
            && tag.is_some()
            && !self.hidden.insert((row.database, row.role, row.name.into()))
        {
            return false;
        }
        let member = tag.map(|tag| self.number(tag.member));
        self.seats.push(Seat {
            member,
            mark: tag.map_or(Mark::Plain, |tag| tag.mark),
            database: row.database,
            here: row.here,
            same_role: row.same_role,
            age: row.age,
        });
        true
    }

    fn number(&mut self, member: &[u8]) -> u32 {
        if let Some(number) = self.numbers.get(member) {
            return *number;
        }
        let number = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        self.members.push(member.into());
        self.weights.push(tag::weight(member));
        self.numbers.insert(member.into(), number);
        number
    }

    /// The end of what is claimed now.
    #[must_use]
    pub fn claims_until(&self) -> u64 {
        if self.now == 0 { tag::NEVER } else { self.now.saturating_add(CLAIM) }
    }

    /// Whether claims with this end count no more: nobody can make a connection of them, whatever woke up since.
    pub(super) fn are_over(&self, until: u64) -> bool {
        self.now >= until.saturating_add(CENSUS_MAX)
    }

    /// Whether a probe was last `seen` longer ago than this. Where that is not told, the age of the connection has to do. Who
    /// was seen that far ahead of the clock was not seen by it.
    pub(super) fn is_stale(&self, seen: u64, age: Option<Duration>, stale: Duration) -> bool {
        let since = if seen == tag::NEVER { age } else { Some(Duration::from_millis(self.now.abs_diff(seen))) };
        since.is_some_and(|since| since > stale)
    }

    /// How `member` stands in a scope, where a `?` that was not seen for longer than `stale` is not heeded: its process was
    /// stopped. None where there is no limit.
    #[must_use]
    pub fn account(&self, scope: Scope, member: &str, stale: Duration) -> Option<Account> {
        let me = self.numbers.get(member.as_bytes()).copied();
        let weight = tag::weight(member.as_bytes());
        Some(Account::new(self, scope, self.limit(scope)?, (me, weight), stale))
    }

    /// The limit of a scope; none if there is none.
    #[must_use]
    pub fn limit(&self, scope: Scope) -> Option<u32> {
        match scope {
            Scope::Role => self.limits.role,
            Scope::Database => self.limits.database,
            Scope::Server => self.limits.server,
            Scope::Fleet => self.fleet,
        }
    }

    /// How `member` stands in each scope that has a limit.
    pub fn accounts<'a>(&'a self, member: &'a str, stale: Duration) -> impl Iterator<Item = Account> + 'a {
        Scope::ALL.into_iter().filter_map(move |scope| self.account(scope, member, stale))
    }
}

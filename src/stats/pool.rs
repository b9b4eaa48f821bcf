//! What a pool counts, and how it stands.

use std::sync::Arc;

use super::histogram::Histogram;
use super::reason::{CancelCounts, DiscardCounts, FollowerState, PinCounts, Role, RouteReasonCounts};
use super::sqlstate::{ErrorCounts, Sqlstate, SqlstateCounts};

/// What one pool counted since it was made.
#[derive(Clone, Debug, Default)]
pub struct PoolStats {
    /// Server connections lent to clients.
    pub leases: u64,
    /// Transactions that ended, committed or not.
    pub transactions: u64,
    /// Queries answered: one per simple query, one per `Sync`.
    pub queries: u64,
    /// Bytes received from clients, as messages (without TLS).
    pub bytes_from_clients: u64,
    /// Bytes sent to clients, as messages (without TLS).
    pub bytes_to_clients: u64,
    /// Clients that logged in to this pool.
    pub client_logins: u64,
    /// `Bind` messages.
    pub binds: u64,
    /// `Parse` messages that went to a server.
    pub server_parses: u64,
    /// `Parse` messages that were answered here, the server connection having the statement.
    pub local_parses: u64,
    /// Executions of named statements that the server was given no name for.
    pub stripped: u64,
    /// Statements closed on a server connection to make room for others.
    pub statements_closed: u64,
    /// Waits for a server connection; a lease that is granted at once is not a wait.
    pub wait: Histogram,
    /// Durations of transactions, from the lease to the release.
    pub transaction: Histogram,
    /// Durations of queries, from the first byte sent to the server to `ReadyForQuery`.
    pub query: Histogram,
    /// Errors sent to clients.
    pub errors: ErrorCounts,
    /// Server connections that logged in.
    pub server_logins: u64,
    /// Logins that the server refused, by SQLSTATE.
    pub server_login_failures: SqlstateCounts,
    /// Logins that got no answer: refused by the network, timed out, or lost on the way.
    pub server_logins_unanswered: u64,
    /// Batches sent a second time, their first server connection having been lost before a word of the answer.
    pub reruns: u64,
    /// Audits that found session state that was not known to be there: a defect.
    pub audit_failures: u64,
    /// Cancel requests for sessions of this pool.
    pub cancels: CancelCounts,
    /// Sessions that began to keep their server connection.
    pub pins: PinCounts,
    /// Server connections closed.
    pub discards: DiscardCounts,
    /// Transactions whose way was decided, where there are followers.
    pub routes: RouteReasonCounts,
    /// Of these reads that waited for a look at the primary.
    pub read_waits: u64,
}

impl PoolStats {
    /// Adds everything that `other` counted: SHOW STATS has one row per database, and a pool may
    /// live on several workers.
    pub fn merge(&mut self, other: &Self) {
        // Taken apart, so that the compiler finds a forgotten field.
        let Self {
            leases,
            transactions,
            queries,
            bytes_from_clients,
            bytes_to_clients,
            client_logins,
            binds,
            server_parses,
            local_parses,
            stripped,
            statements_closed,
            wait,
            transaction,
            query,
            errors,
            server_logins,
            server_login_failures,
            server_logins_unanswered,
            reruns,
            audit_failures,
            cancels,
            pins,
            discards,
            routes,
            read_waits,
        } = other;
        self.leases += leases;
        self.transactions += transactions;
        self.queries += queries;
        self.bytes_from_clients += bytes_from_clients;
        self.bytes_to_clients += bytes_to_clients;
        self.client_logins += client_logins;
        self.binds += binds;
        self.server_parses += server_parses;
        self.local_parses += local_parses;
        self.stripped += stripped;
        self.statements_closed += statements_closed;
        self.wait.merge(wait);
        self.transaction.merge(transaction);
        self.query.merge(query);
        self.errors.merge(errors);
        self.server_logins += server_logins;
        self.server_login_failures.merge(server_login_failures);
        self.server_logins_unanswered += server_logins_unanswered;
        self.reruns += reruns;
        self.audit_failures += audit_failures;
        self.cancels.merge(cancels);
        self.pins.merge(pins);
        self.discards.merge(discards);
        self.routes.merge(routes);
        self.read_waits += read_waits;
    }
}

/// How one pool stands at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolGauges {
    /// Clients without a server connection that want none.
    pub clients_idle: u32,
    /// Clients that hold a server connection.
    pub clients_active: u32,
    /// Clients that wait for a server connection.
    pub clients_waiting: u32,
    /// Server connections ready to lend.
    pub servers_idle: u32,
    /// Server connections lent.
    pub servers_active: u32,
    /// Of the lent ones, those kept by a pin.
    pub servers_pinned: u32,
    /// Server connections being opened.
    pub servers_logging_in: u32,
    /// Server connections being closed.
    pub servers_closing: u32,
    /// Server connections that the pool may have now.
    pub servers_limit: u32,
    /// How long the first waiter has waited, microseconds; 0 without waiters.
    pub oldest_wait_us: u64,
    /// What is known of the follower, if the pool is one's.
    pub follower: Option<FollowerGauges>,
}

/// How one follower stands at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FollowerGauges {
    /// What is known of it.
    pub state: FollowerState,
    /// How long ago the primary was where it was when both were last asked, microseconds; none if that is not known.
    pub lag_us: Option<u64>,
    /// How many bytes of the write-ahead log it was behind then.
    pub lag_bytes: Option<u64>,
    /// How long ago all that it is known to have was acknowledged at the latest, microseconds.
    pub covered_us: Option<u64>,
}

impl Default for FollowerGauges {
    fn default() -> Self {
        Self { state: FollowerState::Unknown, lag_us: None, lag_bytes: None, covered_us: None }
    }
}

/// Whether a pool's server takes logins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PoolHealth {
    /// No login was tried yet: nothing is opened before the first client asks.
    #[default]
    Untried,
    /// The last login succeeded.
    Usable,
    /// The server refuses the pool's user, password or database; the class 28 or 3D code it gave.
    WrongCredentials(Sqlstate),
    /// The last login got no answer.
    Unreachable,
}

impl PoolHealth {
    /// The operator's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Untried => "untried",
            Self::Usable => "usable",
            Self::WrongCredentials(_) => "wrong_credentials",
            Self::Unreachable => "server_unreachable",
        }
    }

    /// Whether a client of this pool can expect to be served.
    #[must_use]
    pub fn serves(self) -> bool {
        match self {
            Self::Untried | Self::Usable => true,
            Self::WrongCredentials(_) | Self::Unreachable => false,
        }
    }
}

/// What names a pool: the labels of its metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolName {
    /// The database as clients name it.
    pub database: Arc<str>,
    /// The user as clients name it.
    pub user: Arc<str>,
    /// The kind of server.
    pub role: Role,
    /// Which of several: a follower's host and port; empty for the primary.
    pub server: Arc<str>,
}

impl PoolName {
    /// The pool of a database's primary.
    #[must_use]
    pub fn primary(database: &str, user: &str) -> Self {
        Self { database: database.into(), user: user.into(), role: Role::Primary, server: Arc::default() }
    }

    /// The pool of one of its followers.
    #[must_use]
    pub fn follower(database: &str, user: &str, server: &str) -> Self {
        Self { role: Role::Follower, server: server.into(), ..Self::primary(database, user) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reason::{Blame, CancelOutcome, DiscardReason, PinReason, RouteReason};
    use super::*;

    #[test]
    fn merging_pools_adds_every_field() {
        let mut one = PoolStats {
            leases: 1,
            transactions: 2,
            queries: 3,
            bytes_from_clients: 4,
            bytes_to_clients: 5,
            client_logins: 6,
            binds: 7,
            server_parses: 8,
            local_parses: 9,
            server_logins: 10,
            server_logins_unanswered: 11,
            read_waits: 12,
            ..PoolStats::default()
        };
        one.wait.record(1);
        one.transaction.record(2);
        one.query.record(3);
        one.errors.add(Blame::Server, b"57P01");
        one.server_login_failures.add(b"28P01");
        one.cancels.add(CancelOutcome::Queued);
        one.pins.add(PinReason::Temp);
        one.discards.add(DiscardReason::Dirty);
        one.routes.add(RouteReason::Read);

        let mut sum = PoolStats::default();
        sum.merge(&one);
        assert_eq!(format!("{sum:?}"), format!("{one:?}"), "merging into nothing copies");
        sum.merge(&one);
        let got = [
            sum.leases,
            sum.transactions,
            sum.queries,
            sum.bytes_from_clients,
            sum.bytes_to_clients,
            sum.client_logins,
            sum.binds,
            sum.server_parses,
            sum.local_parses,
            sum.server_logins,
            sum.server_logins_unanswered,
            sum.read_waits,
            sum.wait.sum(),
            sum.transaction.sum(),
            sum.query.sum(),
            sum.errors.total(),
            sum.server_login_failures.total(),
            sum.cancels.total(),
            sum.pins.total(),
            sum.discards.total(),
            sum.routes.total(),
        ];
        assert_eq!(got, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 2, 4, 6, 2, 2, 2, 2, 2, 2]);
    }
}

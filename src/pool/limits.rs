//! What a pool may do, and limits that several pools share.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::Duration;

use pgweir_config::{PoolMode, SequenceValues, StatementMode};

use super::{Definitions, Pool};
use crate::backend::Count;
use crate::prepared::Budget;
use crate::stats::DiscardReason;

/// What a pool may do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// When server connections return.
    pub mode: PoolMode,
    /// Server connections, at most.
    pub pool_size: u32,
    /// Server connections kept open, once a client has logged in.
    pub min_pool_size: u32,
    /// Server connections beyond `pool_size` for waits longer than `reserve_pool_timeout`.
    ///
    /// A `reserve_pool_timeout` of zero never opens the reserve.
    pub reserve_pool_size: u32,
    /// See there.
    pub reserve_pool_timeout: Duration,
    /// The longest wait; zero waits for ever.
    pub query_wait_timeout: Duration,
    /// The age at which a server connection is replaced once it is idle; zero after its first use.
    pub server_lifetime: Duration,
    /// The idle time after which it is closed; zero never.
    pub server_idle_timeout: Duration,
    /// The longest pause between failed logins.
    pub server_login_retry: Duration,
    /// Logins under way at once.
    pub max_server_logins: u32,
    /// The longest wait for a cancel request to arrive.
    pub cancel_wait_timeout: Duration,
    /// How long its clients may do one thing.
    pub times: Rc<TimeLimits>,
    /// How prepared statements are run.
    pub statements: StatementMode,
    /// What one server connection keeps of them.
    pub budget: Budget,
    /// Pinned server connections, at most.
    pub max_pinned: u32,
    /// Whether one of them listens for all clients.
    pub shared_listener: bool,
    /// One in so many check-ins is audited with nothing to suggest it; 0 for none.
    pub audit_every: u32,
    /// How often the catalog is looked at.
    pub catalog_check_interval: Duration,
    /// What is told of the values of sequences in a later transaction.
    pub sequence_values: SequenceValues,
    /// Whether logins are tried without a client while the last one failed: not where clients make up the names.
    pub is_probed: bool,
}

/// How long a client may do one thing; zero sets no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeLimits {
    /// Nothing, outside a transaction.
    pub client_idle: Duration,
    /// Nothing, inside one.
    pub idle_transaction: Duration,
    /// One query.
    pub query: Duration,
    /// One transaction.
    pub transaction: Duration,
}

impl TimeLimits {
    /// Whether no limit is set.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
impl Limits {
    /// Those of a pool without a server.
    pub(super) fn of_nothing() -> Self {
        Self {
            mode: PoolMode::Transaction,
            pool_size: 0,
            min_pool_size: 0,
            reserve_pool_size: 0,
            reserve_pool_timeout: Duration::ZERO,
            query_wait_timeout: Duration::ZERO,
            server_lifetime: Duration::ZERO,
            server_idle_timeout: Duration::ZERO,
            server_login_retry: Duration::ZERO,
            max_server_logins: 0,
            cancel_wait_timeout: Duration::ZERO,
            times: Rc::default(),
            statements: StatementMode::Session,
            budget: Budget { count: 0, bytes: 0 },
            max_pinned: 0,
            audit_every: 0,
            catalog_check_interval: Duration::from_secs(30),
            sequence_values: SequenceValues::Learn,
            is_probed: false,
            shared_listener: false,
        }
    }
}

/// A limit that several pools share: `max_db_connections` those of a database, `max_user_connections` those of a user.
#[derive(Debug)]
pub struct SharedLimit {
    /// Server connections of all of them.
    pub count: Rc<Count>,
    /// What clients of any of them define.
    pub definitions: Definitions,
    pools: RefCell<Vec<Weak<Pool>>>,
}

impl SharedLimit {
    /// No pools yet; a `limit` of 0 is none.
    #[must_use]
    pub fn new(limit: u32) -> Rc<Self> {
        Rc::new(Self { count: Count::new(limit), definitions: Definitions::default(), pools: RefCell::default() })
    }

    /// A pool that it holds for, too. Those that are gone are forgotten.
    pub(super) fn enter(&self, pool: &Rc<Pool>) {
        let mut pools = self.pools.borrow_mut();
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Rc::downgrade(pool));
    }

    /// What sessions begin with was changed: see [`Pool::renew`].
    pub(super) fn replace_outdated(&self) {
        let pools: Vec<_> = self.pools.borrow().iter().filter_map(Weak::upgrade).collect();
        for pool in pools {
            pool.catalog.forget_settings(pool.clock.now());
            pool.replace_outdated();
        }
    }

    /// Closes the longest idle server connection of any pool, to make room for another pool's.
    pub(super) fn evict_idle(&self) -> bool {
        let pools: Vec<_> = self.pools.borrow().iter().filter_map(Weak::upgrade).collect();
        let oldest = |pool: &Rc<Pool>| pool.inner.borrow().idle.first().map(|conn| conn.idle_since);
        let Some(pool) = pools.iter().filter(|pool| oldest(pool).is_some()).min_by_key(|pool| oldest(pool)) else {
            return false;
        };
        let conn = pool.inner.borrow_mut().idle.remove(0);
        pool.discard(conn, DiscardReason::Shrink);
        true
    }
}

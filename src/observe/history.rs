//! What was, for a while: the series of the dashboard, and the use of each limit.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::forecast::{Series, Trend};
use crate::stats::{Histogram, PoolLimits, ScopeStanding, Snapshot};

/// Between two moments of the series.
pub const EVERY: Duration = Duration::from_secs(2);

/// Moments kept, at most: 15 minutes.
pub const MOMENTS_MAX: usize = 450;

/// Limits whose use is kept, at most; of further ones nothing is foretold.
const LIMITS_MAX: usize = 256;

/// What nobody has counted for so long makes room for others.
const SILENT: Duration = Duration::from_mins(80);

/// How the process stood at a moment, and what it did since the one before. Times are microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moment {
    /// Seconds since 1970.
    pub time: f64,
    /// Clients that hold a server connection.
    pub clients_active: u32,
    /// Clients that wait for one.
    pub clients_waiting: u32,
    /// Clients that want none.
    pub clients_idle: u32,
    /// Server connections lent.
    pub servers_active: u32,
    /// Server connections ready to lend.
    pub servers_idle: u32,
    /// How long the first waiter has waited.
    pub oldest_wait: u64,
    /// Transactions per second.
    pub transactions: f64,
    /// Queries per second.
    pub queries: f64,
    /// Errors per second.
    pub errors: f64,
    /// Waits for a server connection: 50, 95 and 99 % of them took no longer. None if there were none.
    pub wait: [Option<u64>; 3],
    /// Queries: the same.
    pub query: [Option<u64>; 3],
    /// Transactions: the same.
    pub transaction: [Option<u64>; 3],
}

/// What the process has counted, over all pools.
#[derive(Clone, Default)]
struct Total {
    transactions: u64,
    queries: u64,
    errors: u64,
    wait: Histogram,
    query: Histogram,
    transaction: Histogram,
}

impl Total {
    fn of(snapshot: &Snapshot) -> Self {
        let mut total = Self::default();
        for pool in &snapshot.pools {
            let stats = &pool.stats;
            total.transactions += stats.transactions;
            total.queries += stats.queries;
            total.errors += stats.errors.total();
            total.wait.merge(&stats.wait);
            total.query.merge(&stats.query);
            total.transaction.merge(&stats.transaction);
        }
        total
    }
}

/// Which limit: its server, the kind, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LimitKey {
    server: Arc<str>,
    scope: &'static str,
    subject: Arc<str>,
}

impl LimitKey {
    /// Of a pool's scope.
    #[must_use]
    pub fn new(limits: &PoolLimits, scope: &'static str) -> Self {
        Self { server: limits.server.clone(), scope, subject: subject(limits, scope) }
    }
}

/// Whose limit it is: the role's, the database's; empty for the server's.
#[must_use]
pub fn subject(limits: &PoolLimits, scope: &str) -> Arc<str> {
    match scope {
        "role" => limits.login.clone(),
        "database" => limits.dbname.clone(),
        _ => Arc::default(),
    }
}

/// The use of one limit.
#[derive(Default)]
struct Use {
    /// Of the last census that was taken in.
    seen: Option<Instant>,
    samples: Series,
    trend: Option<Trend>,
}

/// What was.
pub struct History {
    start: Instant,
    moments: VecDeque<Moment>,
    before: Option<(Instant, Total)>,
    limits: BTreeMap<LimitKey, Use>,
}

impl History {
    /// Nothing yet.
    #[must_use]
    pub fn new(start: Instant) -> Self {
        Self { start, moments: VecDeque::new(), before: None, limits: BTreeMap::new() }
    }

    /// Takes in a snapshot; `time` is that of the day when it was taken.
    pub fn record(&mut self, snapshot: &Snapshot, time: SystemTime) {
        self.record_limits(snapshot);
        let due = self.before.as_ref().is_none_or(|(at, _)| {
            // Snapshots come once a second, give or take a tick.
            snapshot.taken.saturating_duration_since(*at) + Duration::from_millis(500) >= EVERY
        });
        if !due {
            return;
        }
        let total = Total::of(snapshot);
        if let Some((at, before)) = self.before.replace((snapshot.taken, total.clone())) {
            let passed = snapshot.taken.saturating_duration_since(at).as_secs_f64();
            if self.moments.len() >= MOMENTS_MAX {
                self.moments.pop_front();
            }
            self.moments.push_back(moment(snapshot, time, &total, &before, passed));
        }
    }

    /// Takes in how the limits stand, and nothing else.
    pub fn record_limits(&mut self, snapshot: &Snapshot) {
        for pool in &snapshot.pools {
            let Some(standing) = &pool.limits.standing else { continue };
            for scope in standing.scopes.iter().filter(|scope| scope.limit.is_some()) {
                let key = LimitKey::new(&pool.limits, scope.scope);
                if self.limits.len() >= LIMITS_MAX && !self.limits.contains_key(&key) {
                    // Pools come and go by names that clients choose: only what has been silent for long makes room.
                    let silent = |kept: &Use| {
                        kept.seen.is_none_or(|seen| snapshot.taken.saturating_duration_since(seen) >= SILENT)
                    };
                    let Some(key) = self.limits.iter().find(|(_, kept)| silent(kept)).map(|(key, _)| key.clone())
                    else {
                        continue;
                    };
                    self.limits.remove(&key);
                }
                let kept = self.limits.entry(key).or_default();
                if kept.seen.is_none_or(|seen| seen < standing.taken) {
                    kept.seen = Some(standing.taken);
                    kept.samples.add(standing.taken.saturating_duration_since(self.start), scope.used);
                    kept.trend = kept.samples.trend();
                }
            }
        }
    }

    /// How the use of a limit develops; none if that is not known yet.
    #[must_use]
    pub fn trend(&self, key: &LimitKey) -> Option<Trend> {
        self.limits.get(key)?.trend
    }

    /// When there will be no room under a limit; none if that is not foreseen. `age`: of what is known of it.
    #[must_use]
    pub fn exhausted_in(&self, key: &LimitKey, scope: &ScopeStanding, age: Duration) -> Option<Duration> {
        if scope.room()? == 0 {
            return Some(Duration::ZERO);
        }
        Some(self.trend(key)?.exhausted_in(scope.usable)?.saturating_sub(age))
    }

    /// The series, the oldest moment first.
    pub fn moments(&self) -> impl Iterator<Item = &Moment> {
        self.moments.iter()
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of two seconds")]
fn moment(snapshot: &Snapshot, time: SystemTime, total: &Total, before: &Total, passed: f64) -> Moment {
    let rate = |count: fn(&Total) -> u64| {
        // Less than before: a pool is gone, with all it counted.
        let since = count(total).saturating_sub(count(before));
        if passed > 0.0 { since as f64 / passed } else { 0.0 }
    };
    let quantiles = |of: fn(&Total) -> &Histogram| {
        let since = of(total).since(of(before));
        [500, 950, 990].map(|permille| since.quantile(permille))
    };
    let mut moment = Moment {
        time: time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        transactions: rate(|total| total.transactions),
        queries: rate(|total| total.queries),
        errors: rate(|total| total.errors),
        wait: quantiles(|total| &total.wait),
        query: quantiles(|total| &total.query),
        transaction: quantiles(|total| &total.transaction),
        ..Moment::default()
    };
    for pool in &snapshot.pools {
        let gauges = &pool.gauges;
        moment.clients_active += gauges.clients_active;
        moment.clients_waiting += gauges.clients_waiting;
        moment.clients_idle += gauges.clients_idle;
        moment.servers_active += gauges.servers_active;
        moment.servers_idle += gauges.servers_idle;
        moment.oldest_wait = moment.oldest_wait.max(gauges.oldest_wait_us);
    }
    moment
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{PoolGauges, PoolHealth, PoolName, PoolSnapshot, PoolStats};

    fn snapshot(taken: Instant, stats: PoolStats) -> Snapshot {
        let gauges = PoolGauges { clients_waiting: 3, servers_active: 2, ..PoolGauges::default() };
        let (name, health, limits) = (PoolName::primary("app", "web"), PoolHealth::Usable, PoolLimits::default());
        Snapshot {
            pools: vec![PoolSnapshot { name, url: None, health, stats, gauges, limits }],
            ..Snapshot::empty(taken)
        }
    }

    #[test]
    fn a_moment_tells_what_happened_since_the_one_before_it() {
        let start = Instant::now();
        let mut history = History::new(start);
        let mut stats = PoolStats { queries: 100, ..PoolStats::default() };
        stats.query.record(1_000_000);
        history.record(&snapshot(start, stats.clone()), SystemTime::UNIX_EPOCH);
        assert_eq!(history.moments().count(), 0, "there is nothing that the first could be compared with");
        stats.queries += 20;
        stats.query.record(1024);
        history.record(&snapshot(start + Duration::from_secs(1), stats.clone()), SystemTime::UNIX_EPOCH);
        assert_eq!(history.moments().count(), 0, "it is too soon");
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(7);
        history.record(&snapshot(start + Duration::from_secs(2), stats), time);
        let moment = *history.moments().next().unwrap();
        assert!((moment.queries - 10.0).abs() < 1e-9 && (moment.time - 7.0).abs() < 1e-9, "{moment:?}");
        assert_eq!((moment.query, moment.wait), ([Some(1024); 3], [None; 3]));
        assert_eq!((moment.clients_waiting, moment.servers_active), (3, 2));
    }

    #[test]
    fn the_series_and_the_limits_are_bounded() {
        let start = Instant::now();
        let mut history = History::new(start);
        for number in 0..1000_u32 {
            let taken = start + EVERY * number;
            let mut snapshot = snapshot(taken, PoolStats::default());
            let limits = &mut snapshot.pools[0].limits;
            limits.login = format!("role {number}").into();
            limits.standing = Some(Arc::new(crate::stats::Standing { taken, scopes: vec![ScopeStanding::sample()] }));
            history.record(&snapshot, SystemTime::UNIX_EPOCH);
        }
        assert_eq!((history.moments().count(), history.limits.len()), (MOMENTS_MAX, LIMITS_MAX));
    }
}

//! What a worker counts: plain `u64` fields, added to by the one thread that owns them.
//!
//! Nothing here is shared, atomic or allocated per event: the way of a query adds to a field or a
//! bucket. Once per tick the worker copies its counters into a [`Snapshot`], and everything that
//! reads them (`metrics`, `observe`, `admin`) reads that copy.
//!
//! Counters only grow, for the life of the pool or the process; rates and averages are differences
//! of two snapshots ([`Histogram::since`]).

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

/// A closed set of reasons that things are counted under; each is a metric label's value.
pub trait Reason: Copy + 'static {
    /// Every reason, in declaration order, so that `ALL[r.index()]` is `r`.
    const ALL: &'static [Self];

    /// The position in [`Self::ALL`].
    fn index(self) -> usize;

    /// The operator's word for it: metric label, log field, console column.
    fn as_str(self) -> &'static str;
}

/// Declares a reason enum, its words, and the [`Tally`] over it.
macro_rules! reasons {
    (
        $(#[$doc:meta])*
        $name:ident, $tally:ident {
            $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)?
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant),+
        }

        impl Reason for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn index(self) -> usize {
                self as usize
            }

            fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        #[doc = concat!("One count per [`", stringify!($name), "`].")]
        pub type $tally = Tally<$name, { [$($word),+].len() }>;
    };
}

reasons! {
    /// Who is at fault for an error.
    Blame, BlameCounts {
        /// The client broke the protocol, sent wrong credentials or left.
        Client = "client",
        /// The server answered with the error, or was lost.
        Server = "server",
        /// pgweir: a limit of its own, its configuration, or a defect.
        Pooler = "pooler",
    }
}

reasons! {
    /// Why a session keeps its server connection past the end of a transaction.
    PinReason, PinCounts {
        /// A session setting that the journal cannot replay.
        Settings = "settings",
        /// `LISTEN` that could not be virtualised.
        Listen = "listen",
        /// A temporary table, view or sequence.
        Temp = "temp",
        /// A session-level advisory lock.
        AdvisoryLock = "advisory_lock",
        /// A cursor declared `WITH HOLD`.
        HoldCursor = "hold_cursor",
        /// SQL-level `PREPARE`.
        Prepare = "prepare",
        /// `LOAD` of a shared library.
        Load = "load",
        /// A start-up parameter no pooled connection has.
        Startup = "startup",
        /// More prepared statements than can be interned.
        Statements = "statements",
        /// A statement whose effect on the session is not known.
        Unknown = "unknown",
    }
}

reasons! {
    /// Why a server connection was closed instead of kept.
    DiscardReason, DiscardCounts {
        /// It reached `server_lifetime`.
        Lifetime = "lifetime",
        /// It was idle for `server_idle_timeout`.
        Idle = "idle",
        /// The server closed it, or the network did.
        Lost = "lost",
        /// The server broke the protocol.
        Protocol = "protocol",
        /// Its state was not known to be clean at the end of a lease.
        Dirty = "dirty",
        /// The pool's limit went down.
        Shrink = "shrink",
        /// pgweir is stopping.
        Shutdown = "shutdown",
    }
}

reasons! {
    /// What became of a cancel request whose key named a session of the pool.
    CancelOutcome, CancelCounts {
        /// Sent on to the server that runs the session's query.
        Forwarded = "forwarded",
        /// The session waited for a server connection; it was taken out of the queue.
        Queued = "queued",
    }
}

reasons! {
    /// Why a client was turned away before it had a session.
    RefusalReason, RefusalCounts {
        /// `max_client_conn` clients are connected.
        MaxClientConn = "max_client_conn",
        /// `max_login_clients` clients are logging in.
        MaxLoginClients = "max_login_clients",
        /// Wrong user, password or certificate.
        AuthFailed = "auth_failed",
        /// No such database is configured.
        UnknownDatabase = "unknown_database",
        /// The bytes are not a start-up of the Postgres protocol.
        Protocol = "protocol",
        /// Log-in took longer than `client_login_timeout`.
        Deadline = "deadline",
        /// pgweir drains and takes no new clients.
        Draining = "draining",
    }
}

reasons! {
    /// Which kind of server a pool's connections lead to.
    Role, RoleCounts {
        /// Takes writes.
        Primary = "primary",
        /// Takes reads; replays the primary's log.
        Follower = "follower",
    }
}

/// One count per reason of a closed set; `N` is the number of reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally<R, const N: usize> {
    counts: [u64; N],
    reasons: PhantomData<R>,
}

impl<R, const N: usize> Default for Tally<R, N> {
    fn default() -> Self {
        Self { counts: [0; N], reasons: PhantomData }
    }
}

impl<R: Reason, const N: usize> Tally<R, N> {
    /// Counts one event.
    pub fn add(&mut self, reason: R) {
        if let Some(count) = self.counts.get_mut(reason.index()) {
            *count += 1;
        }
    }

    /// How often `reason` was counted.
    #[must_use]
    pub fn get(&self, reason: R) -> u64 {
        self.counts.get(reason.index()).copied().unwrap_or(0)
    }

    /// Every reason with its count, zeros included, in declaration order.
    pub fn iter(&self) -> impl Iterator<Item = (R, u64)> + '_ {
        R::ALL.iter().copied().zip(self.counts.iter().copied())
    }

    /// The sum over all reasons.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }
}

/// A SQLSTATE: five characters out of `0-9A-Z`.
///
/// Source: `PostgreSQL` 17 docs, appendix A (error codes).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sqlstate([u8; 5]);

impl Sqlstate {
    /// Reads a code; `None` unless it is five of `0-9A-Z`.
    #[must_use]
    pub fn new(code: &[u8]) -> Option<Self> {
        let code: [u8; 5] = code.try_into().ok()?;
        let valid = |byte: &u8| byte.is_ascii_digit() || byte.is_ascii_uppercase();
        code.iter().all(valid).then_some(Self(code))
    }

    /// The code as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // `new` let only ASCII in, so the fallback is never taken.
        str::from_utf8(&self.0).unwrap_or("XX000")
    }
}

impl fmt::Debug for Sqlstate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Sqlstate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Distinct SQLSTATEs that one [`SqlstateCounts`] keeps apart. Postgres defines about 260, an
/// application meets a handful, and a function can raise any of 60 million.
pub const SQLSTATES_MAX: usize = 64;

/// Counts by SQLSTATE; past [`SQLSTATES_MAX`] distinct codes, and for malformed codes, one count
/// named `other`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SqlstateCounts {
    /// In order of first appearance; grows to at most [`SQLSTATES_MAX`].
    codes: Vec<(Sqlstate, u64)>,
    other: u64,
}

impl SqlstateCounts {
    /// Counts one error with the five bytes of its `C` field. Allocates only when the code is new.
    pub fn add(&mut self, code: &[u8]) {
        self.add_many(Sqlstate::new(code), 1);
    }

    /// How often `code` was counted by itself.
    #[must_use]
    pub fn get(&self, code: &[u8]) -> u64 {
        let of = |&&(known, _): &&(Sqlstate, u64)| known.0 == code;
        self.codes.iter().find(of).map_or(0, |&(_, count)| count)
    }

    /// Errors that no code of its own was kept for.
    #[must_use]
    pub fn other(&self) -> u64 {
        self.other
    }

    /// Every code with its count, in order of first appearance; without [`Self::other`].
    pub fn iter(&self) -> impl Iterator<Item = (Sqlstate, u64)> + '_ {
        self.codes.iter().copied()
    }

    /// The sum over all codes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.codes.iter().map(|&(_, count)| count).sum::<u64>() + self.other
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (code, count) in other.iter() {
            self.add_many(Some(code), count);
        }
        self.other += other.other;
    }

    fn add_many(&mut self, code: Option<Sqlstate>, count: u64) {
        let Some(code) = code else {
            self.other += count;
            return;
        };
        if let Some((_, total)) = self.codes.iter_mut().find(|(known, _)| *known == code) {
            *total += count;
        } else if self.codes.len() < SQLSTATES_MAX {
            self.codes.push((code, count));
        } else {
            self.other += count;
        }
    }
}

/// Errors that clients were sent, by who is at fault and by SQLSTATE.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorCounts {
    by_blame: [SqlstateCounts; Blame::ALL.len()],
}

impl ErrorCounts {
    /// Counts one error with the five bytes of its `C` field.
    pub fn add(&mut self, blame: Blame, code: &[u8]) {
        if let Some(counts) = self.by_blame.get_mut(blame.index()) {
            counts.add(code);
        }
    }

    /// The counts of each party.
    pub fn iter(&self) -> impl Iterator<Item = (Blame, &SqlstateCounts)> + '_ {
        Blame::ALL.iter().copied().zip(&self.by_blame)
    }

    /// The sum over all parties and codes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_blame.iter().map(SqlstateCounts::total).sum()
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.by_blame.iter_mut().zip(&other.by_blame) {
            mine.merge(theirs);
        }
    }
}

/// log2 of the buckets per octave.
const SUB_BITS: u32 = 4;
/// Buckets per octave: each is 1/16 of its octave wide.
const SUB: usize = 1 << SUB_BITS;
/// log2 of the longest duration told apart, microseconds.
const MAX_BITS: u32 = 31;
/// Buckets with an upper bound; one more takes what is longer.
const BOUNDED: usize = (MAX_BITS - SUB_BITS + 1) as usize * SUB;

/// A histogram of durations in microseconds, in fixed log-linear buckets.
///
/// Buckets are one microsecond wide up to 32 us and then 1/16 of their octave, up to
/// [`Histogram::MAX_US`] (36 minutes); one last bucket takes everything longer. A bucket includes its
/// upper bound, as the `le` of Prometheus does, so that every power of two from 16 us up is an exact
/// bound. 0 us counts as 1 us. 3.6 kB.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; BOUNDED + 1],
    count: u64,
    /// Microseconds.
    sum: u64,
}

const _: () = assert!(size_of::<Histogram>() <= 3616);

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BOUNDED + 1], count: 0, sum: 0 }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram")
            .field("count", &self.count)
            .field("sum_us", &self.sum)
            .field("p50_us", &self.quantile(500))
            .field("p99_us", &self.quantile(990))
            .finish_non_exhaustive()
    }
}

impl Histogram {
    /// The longest duration told apart, microseconds; longer ones are reported as this.
    pub const MAX_US: u64 = 1 << MAX_BITS;

    /// Counts one duration. A few instructions: no allocation, no floating point, no division.
    #[inline]
    pub fn record(&mut self, us: u64) {
        if let Some(bucket) = self.buckets.get_mut(bucket_of(us)) {
            *bucket += 1;
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(us);
    }

    /// How many durations were recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The sum of all durations, microseconds; exact, saturating.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The mean, microseconds, rounded down; 0 when nothing was recorded.
    #[must_use]
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }

    /// The duration that `permille`/1000 of all durations do not exceed, microseconds: the upper
    /// bound of the bucket of the sample of rank `ceil(count * permille / 1000)`.
    ///
    /// Never below that sample, and at most 1/16 (6.25 %) above it; exact up to 32 us. Samples longer
    /// than [`Self::MAX_US`] are reported as that. `None` when nothing was recorded; a `permille`
    /// above 1000 counts as 1000, and 0 asks for the shortest.
    #[must_use]
    pub fn quantile(&self, permille: u16) -> Option<u64> {
        let permille = u128::from(permille.min(1000));
        let rank = (u128::from(self.count) * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        let position = self.buckets.iter().position(|&bucket| {
            seen += u128::from(bucket);
            seen >= rank
        })?;
        Some(upper_bound(position))
    }

    /// Cumulative counts for a Prometheus histogram: for each power of two from `2^low` to `2^high`
    /// microseconds, how many durations were at most that long. Exact, not interpolated.
    ///
    /// Both ends are brought into 4..=31, where powers of two are bucket bounds.
    pub fn cumulative(&self, low: u32, high: u32) -> impl Iterator<Item = (u64, u64)> + '_ {
        let high = high.clamp(SUB_BITS, MAX_BITS);
        let mut buckets = self.buckets.iter();
        let mut taken = 0;
        let mut total = 0;
        (low.clamp(SUB_BITS, MAX_BITS)..=high).map(move |power| {
            let end = (power - SUB_BITS + 1) as usize * SUB;
            total += buckets.by_ref().take(end - taken).sum::<u64>();
            taken = end;
            (1 << power, total)
        })
    }

    /// Adds everything that `other` recorded.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
    }

    /// What was recorded since `earlier`, an older copy of this histogram. Never negative: of a copy
    /// that is not older, what it has too much is ignored.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut period = Self::default();
        let pairs = self.buckets.iter().zip(&earlier.buckets);
        for (bucket, (now, then)) in period.buckets.iter_mut().zip(pairs) {
            *bucket = now.saturating_sub(*then);
            period.count += *bucket;
        }
        period.sum = self.sum.saturating_sub(earlier.sum);
        period
    }
}

/// The bucket of a duration. Below 16 the number is its own bucket; above, the bucket is the octave
/// and the four bits under the leading one. Counts from 1 us, so that bounds are inclusive.
#[inline]
fn bucket_of(us: u64) -> usize {
    let zero_based = us.saturating_sub(1).min(Histogram::MAX_US);
    let shift = (zero_based | 1).ilog2().saturating_sub(SUB_BITS);
    // At most 2 * SUB - 1 after the shift: fits every usize.
    let within = usize::try_from(zero_based >> shift).unwrap_or(BOUNDED);
    ((shift as usize) * SUB + within).min(BOUNDED)
}

/// The longest duration of a bucket, microseconds.
fn upper_bound(bucket: usize) -> u64 {
    if bucket >= BOUNDED {
        return Histogram::MAX_US;
    }
    let shift = (bucket / SUB).saturating_sub(1);
    let within = bucket - shift * SUB;
    (within as u64 + 1) << shift
}

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
    /// Cancel requests for sessions of this pool.
    pub cancels: CancelCounts,
    /// Sessions that began to keep their server connection.
    pub pins: PinCounts,
    /// Server connections closed.
    pub discards: DiscardCounts,
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
            wait,
            transaction,
            query,
            errors,
            server_logins,
            server_login_failures,
            server_logins_unanswered,
            cancels,
            pins,
            discards,
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
        self.wait.merge(wait);
        self.transaction.merge(transaction);
        self.query.merge(query);
        self.errors.merge(errors);
        self.server_logins += server_logins;
        self.server_login_failures.merge(server_login_failures);
        self.server_logins_unanswered += server_logins_unanswered;
        self.cancels.merge(cancels);
        self.pins.merge(pins);
        self.discards.merge(discards);
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
}

impl PoolName {
    /// The pool of a database's primary.
    #[must_use]
    pub fn primary(database: &str, user: &str) -> Self {
        Self { database: database.into(), user: user.into(), role: Role::Primary }
    }
}

/// What the process counted that belongs to no pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessStats {
    /// Client connections accepted, whatever became of them.
    pub clients_accepted: u64,
    /// Client connections turned away.
    pub clients_refused: RefusalCounts,
    /// Sessions begun: clients that logged in.
    pub sessions: u64,
    /// Sessions that ended in a panic; each is a defect.
    pub sessions_panicked: u64,
    /// Broken invariants: the session was ended and its server connection discarded; each is a defect.
    pub broken_invariants: u64,
    /// Cancel requests whose key no session has.
    pub cancels_unknown_key: u64,
}

/// How the process stands at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessGauges {
    /// Client connections, those that log in included.
    pub clients: u32,
    /// Of these, the ones that have not logged in yet.
    pub clients_logging_in: u32,
    /// Server connections, in every state.
    pub servers: u32,
}

/// One pool in a [`Snapshot`].
#[derive(Clone, Debug)]
pub struct PoolSnapshot {
    /// Which pool.
    pub name: PoolName,
    /// Whether its server takes logins.
    pub health: PoolHealth,
    /// Everything it counted so far.
    pub stats: PoolStats,
    /// How it stands.
    pub gauges: PoolGauges,
}

/// A copy of everything a worker counts, taken at once.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When it was taken.
    pub taken: Instant,
    /// What belongs to no pool.
    pub process: ProcessStats,
    /// How the process stands.
    pub gauges: ProcessGauges,
    /// The pools, in the worker's order; a pool is in it once.
    pub pools: Vec<PoolSnapshot>,
}

impl Snapshot {
    /// A snapshot without pools, to be filled.
    #[must_use]
    pub fn empty(taken: Instant) -> Self {
        Self { taken, process: ProcessStats::default(), gauges: ProcessGauges::default(), pools: Vec::new() }
    }

    /// The pool of that name.
    #[must_use]
    pub fn pool(&self, name: &PoolName) -> Option<&PoolSnapshot> {
        self.pools.iter().find(|pool| pool.name == *name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Durations over every magnitude, bucket edges included.
    fn duration() -> impl Strategy<Value = u64> {
        (0..=34_u32, any::<u64>(), -2..=2_i64).prop_map(|(bits, noise, edge)| {
            let base = 1_u64 << bits;
            if noise % 3 == 0 { base.saturating_add_signed(edge) } else { base + noise % base }
        })
    }

    fn histogram_of(samples: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        for &us in samples {
            histogram.record(us);
        }
        histogram
    }

    /// The naive quantile: sort and take the sample of that rank.
    fn sorted_quantile(samples: &[u64], permille: u16) -> u64 {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let rank = (sorted.len() * usize::from(permille)).div_ceil(1000).max(1);
        sorted[rank - 1]
    }

    proptest! {
        #[test]
        fn quantiles_are_never_below_and_at_most_a_sixteenth_above_the_sorted_samples(
            samples in prop::collection::vec(duration(), 1..200),
            permille in 0..=1000_u16,
        ) {
            let want = sorted_quantile(&samples, permille).clamp(1, Histogram::MAX_US);
            let got = histogram_of(&samples).quantile(permille).unwrap();
            prop_assert!(got >= want, "{got} < {want}");
            prop_assert!(got - want <= want / 16, "{got} is more than 6.25 % above {want}");
            prop_assert!(want > 32 || got == want, "{got} != {want}, which is told apart exactly");
        }

        #[test]
        fn cumulative_counts_equal_counting_the_samples(
            samples in prop::collection::vec(duration(), 0..200),
            (low, high) in (0..40_u32, 0..40_u32),
        ) {
            let got: Vec<_> = histogram_of(&samples).cumulative(low, high).collect();
            let want: Vec<_> = (low.clamp(4, 31)..=high.clamp(4, 31))
                .map(|power| 1_u64 << power)
                .map(|le| (le, samples.iter().filter(|&&us| us <= le).count() as u64))
                .collect();
            prop_assert_eq!(got, want);
        }

        #[test]
        fn merging_equals_recording_both_and_since_takes_it_back(
            first in prop::collection::vec(duration(), 0..100),
            second in prop::collection::vec(duration(), 0..100),
        ) {
            let (a, b) = (histogram_of(&first), histogram_of(&second));
            let mut merged = a.clone();
            merged.merge(&b);
            let both: Vec<u64> = first.iter().chain(&second).copied().collect();
            prop_assert_eq!(&merged, &histogram_of(&both));
            prop_assert_eq!(merged.sum(), both.iter().sum::<u64>());
            prop_assert_eq!(merged.count(), both.len() as u64);
            prop_assert_eq!(&merged.since(&a), &b);
            prop_assert_eq!(a.since(&merged), histogram_of(&[]));
        }

        #[test]
        fn sqlstate_counts_lose_no_error_and_stay_bounded(
            codes in prop::collection::vec("[0-9A-C]{2}0{2}[0-9A-Z]{1}|[a-z]{0,6}", 0..400),
        ) {
            let mut counts = SqlstateCounts::default();
            for code in &codes {
                counts.add(code.as_bytes());
            }
            prop_assert_eq!(counts.total(), codes.len() as u64);
            prop_assert!(counts.iter().count() <= SQLSTATES_MAX);
            for (known, count) in counts.iter() {
                let want = codes.iter().filter(|code| code.as_str() == known.as_str()).count();
                prop_assert_eq!(count, want as u64);
            }
        }
    }

    #[test]
    fn every_bucket_bound_falls_into_its_bucket_and_the_next_microsecond_into_the_next() {
        for bucket in 0..BOUNDED {
            let bound = upper_bound(bucket);
            assert_eq!(bucket_of(bound), bucket, "bound {bound} of bucket {bucket}");
            assert_eq!(bucket_of(bound + 1), bucket + 1, "after bucket {bucket}");
        }
        assert_eq!(upper_bound(BOUNDED - 1), Histogram::MAX_US);
        assert_eq!(bucket_of(u64::MAX), BOUNDED);
    }

    #[test]
    fn an_empty_histogram_has_no_quantile_and_mean_zero() {
        let empty = Histogram::default();
        assert_eq!((empty.quantile(500), empty.mean()), (None, 0));
    }

    #[test]
    fn the_sum_saturates_instead_of_overflowing() {
        let histogram = histogram_of(&[u64::MAX, u64::MAX]);
        assert_eq!(histogram.sum(), u64::MAX);
        assert_eq!(histogram.quantile(1000), Some(Histogram::MAX_US));
    }

    #[test]
    fn a_sqlstate_is_five_digits_or_capitals() {
        #[rustfmt::skip]
        let table: [(&str, &[u8], bool); 6] = [
            ("unique violation", b"23505",  true),
            ("letters",          b"57P01",  true),
            ("lower case",       b"57p01",  false),
            ("short",            b"5701",   false),
            ("long",             b"57P011", false),
            ("quote",            b"57\"01", false),
        ];
        for (name, code, valid) in table {
            assert_eq!(Sqlstate::new(code).is_some(), valid, "{name}");
        }
    }

    #[test]
    fn the_65th_sqlstate_counts_as_other_and_known_ones_still_by_themselves() {
        let mut counts = SqlstateCounts::default();
        for number in 0..=SQLSTATES_MAX {
            counts.add(format!("{number:05}").as_bytes());
        }
        counts.add(b"00000");
        assert_eq!((counts.get(b"00000"), counts.get(b"00064"), counts.other()), (2, 0, 1));
    }

    #[test]
    fn errors_are_counted_apart_by_blame() {
        let mut errors = ErrorCounts::default();
        errors.add(Blame::Server, b"57P01");
        errors.add(Blame::Pooler, b"57P01");
        errors.add(Blame::Pooler, b"53300");
        let totals: Vec<_> = errors.iter().map(|(blame, counts)| (blame, counts.total())).collect();
        let want = [(Blame::Client, 0), (Blame::Server, 1), (Blame::Pooler, 2)];
        assert_eq!((totals.as_slice(), errors.total()), (want.as_slice(), 3));
    }

    /// Checks that a reason enum, its index and its words fit together.
    fn check_reasons<R: Reason + PartialEq + fmt::Debug, const N: usize>() {
        assert_eq!(R::ALL.len(), N);
        for (index, &reason) in R::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index, "{reason:?}");
            let word = reason.as_str();
            assert!(!word.is_empty() && word.bytes().all(|b| b == b'_' || b.is_ascii_lowercase()));
            let same = |other: &&R| other.as_str() == word;
            assert_eq!(R::ALL.iter().filter(same).count(), 1, "{word} names two reasons");

            let mut tally = Tally::<R, N>::default();
            tally.add(reason);
            tally.add(reason);
            assert_eq!((tally.get(reason), tally.total()), (2, 2), "{reason:?}");
            assert!(tally.iter().all(|(r, count)| (count == 2) == (r == reason)));
        }
    }

    #[test]
    fn every_reason_has_its_own_count_and_its_own_word() {
        check_reasons::<Blame, 3>();
        check_reasons::<PinReason, 10>();
        check_reasons::<DiscardReason, 7>();
        check_reasons::<CancelOutcome, 2>();
        check_reasons::<RefusalReason, 7>();
        check_reasons::<Role, 2>();
    }

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
            sum.wait.sum(),
            sum.transaction.sum(),
            sum.query.sum(),
            sum.errors.total(),
            sum.server_login_failures.total(),
            sum.cancels.total(),
            sum.pins.total(),
            sum.discards.total(),
        ];
        assert_eq!(got, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 2, 4, 6, 2, 2, 2, 2, 2]);
    }
}

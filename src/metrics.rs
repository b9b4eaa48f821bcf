//! The metrics: each named once in [`ALL`], registered once per pool, published once per tick.
//!
//! Counters and gauges go through the `metrics` crate into its Prometheus exporter. Histograms do
//! not: that crate's histograms take one sample per event, over a lock-free queue that somebody has
//! to drain, and cut it into buckets a second time. The worker has exact buckets already
//! ([`crate::stats::Histogram`]), so [`render`] writes them, from the same snapshot the counters were published
//! from, as histogram families behind the exporter's text, and behind them what is known of the servers' limits. The names of the two halves never meet:
//! one table declares them all, with their kind.
//!
//! Nothing is global: an [`Exporter`] is made, handed to the worker and asked by the HTTP server.

use crate::stats::{
    Blame, CancelOutcome, DiscardReason, FollowerGauges, FollowerState, Histogram, PinReason, PoolGauges, PoolLimits,
    PoolName, PoolSnapshot, PoolStats, ProcessGauges, ProcessStats, Reason, RefusalReason, Role, RouteReason,
    ScopeStanding, Side, SideCounts, Snapshot, Sqlstate, SqlstateCounts, Tally,
};
use ::metrics::{Counter, Gauge, Key, KeyName, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod limits;

pub use limits::Outlook;

/// What a metric's numbers do over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; starts at 0 with the process.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Cumulative counts by upper bound, with a sum.
    Histogram,
}

/// A metric: what it is called and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// As exported; ends in `_total` if it is a counter.
    pub name: &'static str,
    /// What its numbers do.
    pub kind: Kind,
    /// What its numbers count.
    pub unit: Unit,
    /// Its HELP line: what is counted, and the labels besides those of the pool.
    pub help: &'static str,
}

/// Declares the metrics as constants, and the table of all of them.
macro_rules! catalogue {
    ($($constant:ident = $kind:ident $unit:ident $name:literal $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $constant: Metric =
                Metric { name: $name, kind: Kind::$kind, unit: Unit::$unit, help: $help };
        )+

        /// Every metric that pgweir exports.
        pub const ALL: &[Metric] = &[$($constant),+];
    };
}

catalogue! {
    LEASES = Counter Count "pgweir_leases_total" "Server connections lent to clients.";
    TRANSACTIONS = Counter Count "pgweir_transactions_total" "Transactions that ended, committed or not.";
    QUERIES = Counter Count "pgweir_queries_total" "Queries answered: one per simple query, one per Sync.";
    FROM_CLIENTS = Counter Bytes "pgweir_from_clients_bytes_total" "Bytes of messages received from clients.";
    TO_CLIENTS = Counter Bytes "pgweir_to_clients_bytes_total" "Bytes of messages sent to clients.";
    CLIENT_LOGINS = Counter Count "pgweir_client_logins_total" "Clients that logged in.";
    BINDS = Counter Count "pgweir_binds_total" "Bind messages.";
    PARSES = Counter Count "pgweir_parses_total" "Parse messages, by who answered them (server, pooler).";
    STRIPPED = Counter Count "pgweir_statements_stripped_total" "Executions of named prepared statements that were parsed for this alone.";
    STATEMENTS_CLOSED = Counter Count "pgweir_statements_closed_total" "Prepared statements closed on a server connection to make room for others.";
    ERRORS = Counter Count "pgweir_errors_total" "Errors sent to clients, by who is at fault (blame) and by sqlstate.";
    SERVER_LOGINS = Counter Count "pgweir_server_logins_total" "Server connections that logged in.";
    SERVER_LOGIN_FAILURES = Counter Count "pgweir_server_login_failures_total" "Server logins that failed, by sqlstate; sqlstate=none got no answer.";
    RERUNS = Counter Count "pgweir_reruns_total" "Batches sent again because their server connection was lost before a word of the answer.";
    AUDIT_FAILURES = Counter Count "pgweir_audit_failures_total" "Audits that found session state which was not known to be there: a defect.";
    CANCELS = Counter Count "pgweir_cancels_total" "Cancel requests whose key named a session, by outcome.";
    PINS = Counter Count "pgweir_pins_total" "Sessions that began to keep their server connection, by reason.";
    DISCARDS = Counter Count "pgweir_server_discards_total" "Server connections closed, by reason.";
    CLIENTS = Gauge Count "pgweir_clients" "Clients, by state.";
    SERVERS = Gauge Count "pgweir_servers" "Server connections, by state.";
    SERVERS_PINNED = Gauge Count "pgweir_servers_pinned" "Active server connections kept by a pin.";
    SERVERS_LIMIT = Gauge Count "pgweir_servers_limit" "Server connections that the pool may have now.";
    OLDEST_WAIT = Gauge Seconds "pgweir_oldest_wait_seconds" "How long the first waiter has waited; 0 without waiters.";
    POOL_USABLE = Gauge Count "pgweir_pool_usable" "0 while the server refuses the pool's credentials or is unreachable, else 1.";
    FOLLOWER_LAG = Gauge Seconds "pgweir_follower_lag_seconds" "How long ago the primary was where the follower was when both were last asked.";
    FOLLOWER_LAG_BYTES = Gauge Bytes "pgweir_follower_lag_bytes" "Bytes of the write-ahead log that the follower was behind then.";
    FOLLOWER_STATE = Gauge Count "pgweir_follower_state" "1 for what is known of the follower, else 0, by state.";
    ROUTES = Counter Count "pgweir_routes_total" "Transactions of databases with followers, by what decided where they went (reason).";
    READ_WAITS = Counter Count "pgweir_read_waits_total" "Reads that waited until the position of the primary was looked at.";
    WAIT = Histogram Seconds "pgweir_wait_seconds" "Waits for a server connection; a lease granted at once is not a wait.";
    TRANSACTION = Histogram Seconds "pgweir_transaction_seconds" "Transactions, from lease to release.";
    QUERY = Histogram Seconds "pgweir_query_seconds" "Queries, from the first byte sent to the server until it is ready again.";
    LIMIT = Gauge Count "pgweir_limit_connections" "Connections that a limit of the server allows, by scope (role, database, server, fleet).";
    LIMIT_HEADROOM = Gauge Count "pgweir_limit_headroom" "Connections of it that pgweirs leave alone.";
    LIMIT_USED = Gauge Count "pgweir_limit_used" "Connections of it that are used or claimed, by whom (own, peers, foreign).";
    LIMIT_ROOM = Gauge Count "pgweir_limit_room" "Connections of it that pgweirs may still take.";
    LIMIT_CLAIMS = Gauge Count "pgweir_limit_claims" "Logins under way, of all pgweirs.";
    LIMIT_PROBES = Gauge Count "pgweir_limit_probes" "Connections that are to find out whether they may stay, of all pgweirs.";
    LIMIT_POOLS = Gauge Count "pgweir_limit_pools" "Pools of the fleet that share the limit.";
    LIMIT_SHARE = Gauge Count "pgweir_limit_share" "Connections that each of them is entitled to.";
    LIMIT_TREND = Gauge Count "pgweir_limit_used_per_hour" "How the use develops, connections per hour; 0 if nothing stands out of the noise.";
    LIMIT_EXHAUSTION = Gauge Seconds "pgweir_limit_exhaustion_seconds" "When there will be no room if it goes on like this; absent if that is not foreseen.";
    CENSUS_AGE = Gauge Seconds "pgweir_census_age_seconds" "How long ago the pool last looked at its server's limits.";
    LAST_REFUSAL_AGE = Gauge Seconds "pgweir_last_refusal_age_seconds" "How long ago the server last had no room for a login (53300), by scope.";
    CLIENTS_ACCEPTED = Counter Count "pgweir_clients_accepted_total" "Client connections accepted.";
    CLIENTS_REFUSED = Counter Count "pgweir_clients_refused_total" "Client connections turned away, by reason.";
    SESSIONS = Counter Count "pgweir_sessions_total" "Sessions begun.";
    SESSIONS_PANICKED = Counter Count "pgweir_sessions_panicked_total" "Sessions that ended in a panic; each is a defect.";
    BROKEN_INVARIANTS = Counter Count "pgweir_broken_invariants_total" "Sessions ended by a broken invariant; each is a defect.";
    CANCELS_IGNORED = Counter Count "pgweir_cancels_ignored_total" "Cancel requests ignored because too many keys from their address were wrong.";
    CANCELS_UNKNOWN_KEY = Counter Count "pgweir_cancels_unknown_key_total" "Cancel requests whose key no session has.";
    TEXTS = Counter Count "pgweir_texts_total" "Texts that were judged where there are followers, or that mention something suspicious, by what knew them: recent (the same was seen lately), fingerprint (one that differs in its literals was), grammar (it was parsed).";
    TLS_HANDSHAKES = Counter Count "pgweir_tls_handshakes_total" "TLS handshakes that succeeded, by side: client or server.";
    TLS_RESUMPTIONS = Counter Count "pgweir_tls_resumptions_total" "TLS handshakes that resumed an earlier session, by side.";
    TLS_FAILURES = Counter Count "pgweir_tls_failures_total" "TLS handshakes that failed, by side.";
    PROCESS_CLIENTS = Gauge Count "pgweir_process_clients" "Client connections of the process, those that log in included.";
    PROCESS_CLIENTS_LOGGING_IN = Gauge Count "pgweir_process_clients_logging_in" "Client connections that have not logged in yet.";
    PROCESS_SERVERS = Gauge Count "pgweir_process_servers" "Server connections of the process, in every state.";
    BUILD_INFO = Gauge Count "pgweir_build_info" "Always 1; its version is a label.";
}

/// Smallest and largest exported bucket bound, log2 of microseconds: 32 us to 268 s, one bound per
/// octave. The internal buckets are sixteen times finer; quantiles in log lines come from those.
const BOUND_BITS: (u32, u32) = (5, 28);

/// Where metrics are registered and read; made once, shared by the worker and the HTTP server.
pub struct Exporter {
    recorder: PrometheusRecorder,
}

impl Default for Exporter {
    fn default() -> Self {
        Self::new()
    }
}

impl Exporter {
    /// An exporter that knows every metric's description and holds no series yet.
    #[must_use]
    pub fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        for metric in ALL {
            let (name, unit) = (KeyName::from_const_str(metric.name), Some(metric.unit));
            match metric.kind {
                Kind::Counter => recorder.describe_counter(name, unit, metric.help.into()),
                Kind::Gauge => recorder.describe_gauge(name, unit, metric.help.into()),
                // Written by `render`, help included.
                Kind::Histogram => {}
            }
        }
        Self { recorder }
    }

    /// What the HTTP server reads; cheap to clone.
    #[must_use]
    pub fn handle(&self) -> PrometheusHandle {
        self.recorder.handle()
    }

    fn counter(&self, metric: Metric, labels: Vec<Label>) -> Total {
        let key = Key::from_parts(metric.name, labels);
        Total { counter: self.recorder.register_counter(&key, &METADATA), published: 0 }
    }

    fn gauge(&self, metric: Metric, labels: Vec<Label>) -> Gauge {
        let key = Key::from_parts(metric.name, labels);
        self.recorder.register_gauge(&key, &METADATA)
    }
}

/// Required by `metrics`, ignored by its exporter.
static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// Publishes snapshots: registers pools as they appear and lets them go as they vanish.
pub struct Publisher {
    exporter: Arc<Exporter>,
    process: ProcessMetrics,
    /// By name, and by the variable of the URL where there are several.
    pools: HashMap<(PoolName, Option<Arc<str>>), PoolMetrics>,
}

impl Publisher {
    /// A publisher of one worker.
    #[must_use]
    pub fn new(exporter: Arc<Exporter>) -> Self {
        let process = ProcessMetrics::register(&exporter);
        Self { exporter, process, pools: HashMap::new() }
    }

    /// Publishes everything in `snapshot`; called once per tick, never per query. Allocates only for
    /// pools and SQLSTATEs it has not seen.
    pub fn publish(&mut self, snapshot: &Snapshot) {
        self.process.publish(&snapshot.process, &snapshot.gauges);
        for pool in &snapshot.pools {
            let key = (pool.name.clone(), pool.url.clone());
            if let Some(known) = self.pools.get_mut(&key) {
                known.publish(pool);
            } else {
                let mut metrics = PoolMetrics::register(&self.exporter, &pool.name, pool.url.as_deref());
                metrics.publish(pool);
                self.pools.insert(key, metrics);
            }
        }
        // A pool is in a snapshot once, so equal lengths mean that none has vanished.
        if self.pools.len() != snapshot.pools.len() {
            let is_there = |key: &(PoolName, Option<Arc<str>>)| {
                snapshot.pools.iter().any(|pool| pool.name == key.0 && pool.url == key.1)
            };
            self.pools.retain(|key, _| is_there(key));
        }
    }
}

/// Where a series gets its number from.
type Read<From, Number> = fn(&From) -> Number;

/// A counter that is fed totals.
///
/// Remembers what it published and adds the difference, because a pool that is closed and made anew
/// counts from 0 while its series lives on; the exporter's own `absolute` would keep the larger.
struct Total {
    counter: Counter,
    published: u64,
}

impl Total {
    fn publish(&mut self, total: u64) {
        // Less than before: it started again, and everything it counted is new.
        self.counter.increment(total.checked_sub(self.published).unwrap_or(total));
        self.published = total;
    }
}

/// One counter per reason of a closed set.
struct TallyTotals {
    totals: Vec<Total>,
}

impl TallyTotals {
    fn register<R: Reason>(exporter: &Exporter, metric: Metric, labels: &[Label], key: &'static str) -> Self {
        let register = |reason: &R| exporter.counter(metric, with(labels, key, reason.as_str().into()));
        Self { totals: R::ALL.iter().map(register).collect() }
    }

    fn publish<R: Reason, const N: usize>(&mut self, tally: &Tally<R, N>) {
        for (total, (_, count)) in self.totals.iter_mut().zip(tally.iter()) {
            total.publish(count);
        }
    }
}

/// One counter per SQLSTATE that was seen, and one for the others.
struct SqlstateTotals {
    metric: Metric,
    labels: Vec<Label>,
    totals: Vec<(Sqlstate, Total)>,
    other: Option<Total>,
}

impl SqlstateTotals {
    fn new(metric: Metric, labels: Vec<Label>) -> Self {
        Self { metric, labels, totals: Vec::new(), other: None }
    }

    fn publish(&mut self, exporter: &Exporter, counts: &SqlstateCounts) {
        for (code, count) in counts.iter() {
            if let Some((_, total)) = self.totals.iter_mut().find(|(known, _)| *known == code) {
                total.publish(count);
            } else {
                let labels = with(&self.labels, "sqlstate", code.to_string());
                let mut total = exporter.counter(self.metric, labels);
                total.publish(count);
                self.totals.push((code, total));
            }
        }
        if counts.other() > 0 {
            let labels = || with(&self.labels, "sqlstate", "other".into());
            let other = self.other.get_or_insert_with(|| exporter.counter(self.metric, labels()));
            other.publish(counts.other());
        }
    }
}

/// The series of one pool. When it is dropped its gauges fall to 0; its counters stay as they are.
pub struct PoolMetrics {
    exporter: Arc<Exporter>,
    plain: [(Read<PoolStats, u64>, Total); 15],
    errors: Vec<SqlstateTotals>,
    login_failures: SqlstateTotals,
    cancels: TallyTotals,
    pins: TallyTotals,
    discards: TallyTotals,
    /// None while nothing was ever routed.
    routes: Option<(TallyTotals, Total)>,
    /// None of a primary.
    follower: Option<FollowerMetrics>,
    labels: Vec<Label>,
    gauges: [(Read<PoolGauges, u32>, Gauge); 9],
    oldest_wait: Gauge,
    usable: Gauge,
}

impl PoolMetrics {
    /// Registers every series of a pool. Cold: allocates for the labels.
    #[must_use]
    pub fn register(exporter: &Arc<Exporter>, name: &PoolName, url: Option<&str>) -> Self {
        let labels = &pool_labels(name, url);
        let total = |metric| exporter.counter(metric, labels.clone());
        let labelled = |metric, key, value: &str| exporter.counter(metric, with(labels, key, value.into()));
        let state = |metric, state: &str| exporter.gauge(metric, with(labels, "state", state.into()));
        let errors = |blame: &Blame| SqlstateTotals::new(ERRORS, with(labels, "blame", blame.as_str().into()));
        Self {
            plain: [
                (|stats| stats.leases, total(LEASES)),
                (|stats| stats.transactions, total(TRANSACTIONS)),
                (|stats| stats.queries, total(QUERIES)),
                (|stats| stats.bytes_from_clients, total(FROM_CLIENTS)),
                (|stats| stats.bytes_to_clients, total(TO_CLIENTS)),
                (|stats| stats.client_logins, total(CLIENT_LOGINS)),
                (|stats| stats.binds, total(BINDS)),
                (|stats| stats.server_parses, labelled(PARSES, "by", "server")),
                (|stats| stats.local_parses, labelled(PARSES, "by", "pooler")),
                (|stats| stats.stripped, total(STRIPPED)),
                (|stats| stats.statements_closed, total(STATEMENTS_CLOSED)),
                (|stats| stats.server_logins, total(SERVER_LOGINS)),
                (|stats| stats.reruns, total(RERUNS)),
                (|stats| stats.audit_failures, total(AUDIT_FAILURES)),
                (|stats| stats.server_logins_unanswered, labelled(SERVER_LOGIN_FAILURES, "sqlstate", "none")),
            ],
            errors: Blame::ALL.iter().map(errors).collect(),
            login_failures: SqlstateTotals::new(SERVER_LOGIN_FAILURES, labels.clone()),
            cancels: TallyTotals::register::<CancelOutcome>(exporter, CANCELS, labels, "outcome"),
            pins: TallyTotals::register::<PinReason>(exporter, PINS, labels, "reason"),
            discards: TallyTotals::register::<DiscardReason>(exporter, DISCARDS, labels, "reason"),
            routes: None,
            follower: (name.role == Role::Follower).then(|| FollowerMetrics::register(exporter, labels)),
            labels: labels.clone(),
            gauges: [
                (|gauges| gauges.clients_idle, state(CLIENTS, "idle")),
                (|gauges| gauges.clients_active, state(CLIENTS, "active")),
                (|gauges| gauges.clients_waiting, state(CLIENTS, "waiting")),
                (|gauges| gauges.servers_idle, state(SERVERS, "idle")),
                (|gauges| gauges.servers_active, state(SERVERS, "active")),
                (|gauges| gauges.servers_logging_in, state(SERVERS, "logging_in")),
                (|gauges| gauges.servers_closing, state(SERVERS, "closing")),
                (|gauges| gauges.servers_pinned, exporter.gauge(SERVERS_PINNED, labels.clone())),
                (|gauges| gauges.servers_limit, exporter.gauge(SERVERS_LIMIT, labels.clone())),
            ],
            oldest_wait: exporter.gauge(OLDEST_WAIT, labels.clone()),
            usable: exporter.gauge(POOL_USABLE, labels.clone()),
            exporter: Arc::clone(exporter),
        }
    }

    /// Publishes worker-local totals; called once per tick, never per query. The histograms are not
    /// part of it: [`render`] takes them from the snapshot.
    pub fn publish(&mut self, pool: &PoolSnapshot) {
        let PoolSnapshot { name: _, url: _, health, stats, gauges, limits: _ } = pool;
        for (read, total) in &mut self.plain {
            total.publish(read(stats));
        }
        for (totals, (_, counts)) in self.errors.iter_mut().zip(stats.errors.iter()) {
            totals.publish(&self.exporter, counts);
        }
        self.login_failures.publish(&self.exporter, &stats.server_login_failures);
        self.cancels.publish(&stats.cancels);
        self.pins.publish(&stats.pins);
        self.discards.publish(&stats.discards);
        if self.routes.is_some() || stats.routes.total() > 0 {
            let (exporter, labels) = (&self.exporter, &self.labels);
            let register = || {
                let routes = TallyTotals::register::<RouteReason>(exporter, ROUTES, labels, "reason");
                (routes, exporter.counter(READ_WAITS, labels.clone()))
            };
            let (routes, read_waits) = self.routes.get_or_insert_with(register);
            routes.publish(&stats.routes);
            read_waits.publish(stats.read_waits);
        }
        if let (Some(metrics), Some(follower)) = (&self.follower, &gauges.follower) {
            metrics.publish(follower);
        }
        for (read, gauge) in &self.gauges {
            gauge.set(f64::from(read(gauges)));
        }
        self.oldest_wait.set(seconds(gauges.oldest_wait_us));
        self.usable.set(f64::from(u8::from(health.serves())));
    }
}

impl Drop for PoolMetrics {
    fn drop(&mut self) {
        for (_, gauge) in &self.gauges {
            gauge.set(0.0);
        }
        self.oldest_wait.set(0.0);
        if let Some(metrics) = &self.follower {
            metrics.publish(&FollowerGauges::default());
        }
        // Nothing is known to be wrong with a pool that is gone.
        self.usable.set(1.0);
    }
}

/// The series of one follower.
struct FollowerMetrics {
    lag: Gauge,
    lag_bytes: Gauge,
    states: Vec<(FollowerState, Gauge)>,
}

impl FollowerMetrics {
    fn register(exporter: &Exporter, labels: &[Label]) -> Self {
        let state = |state: &FollowerState| {
            (*state, exporter.gauge(FOLLOWER_STATE, with(labels, "state", state.as_str().into())))
        };
        Self {
            lag: exporter.gauge(FOLLOWER_LAG, labels.to_vec()),
            lag_bytes: exporter.gauge(FOLLOWER_LAG_BYTES, labels.to_vec()),
            states: FollowerState::ALL.iter().map(state).collect(),
        }
    }

    fn publish(&self, follower: &FollowerGauges) {
        self.lag.set(follower.lag_us.map_or(0.0, seconds));
        let bytes = follower.lag_bytes.unwrap_or(0);
        #[expect(clippy::cast_precision_loss, reason = "a gauge is a double; it is exact below 2^53")]
        self.lag_bytes.set(bytes as f64);
        for (state, gauge) in &self.states {
            gauge.set(f64::from(u8::from(*state == follower.state)));
        }
    }
}

/// The series of the process.
pub struct ProcessMetrics {
    plain: [(Read<ProcessStats, u64>, Total); 9],
    refused: TallyTotals,
    tls: [(Read<ProcessStats, SideCounts>, TallyTotals); 3],
    gauges: [(Read<ProcessGauges, u32>, Gauge); 3],
}

impl ProcessMetrics {
    /// Registers every series of the process. Cold.
    #[must_use]
    pub fn register(exporter: &Exporter) -> Self {
        let total = |metric| exporter.counter(metric, Vec::new());
        let gauge = |metric| exporter.gauge(metric, Vec::new());
        let text = |by: &'static str| exporter.counter(TEXTS, vec![Label::from_static_parts("by", by)]);
        let by_side = |metric| TallyTotals::register::<Side>(exporter, metric, &[], "side");
        let version = Label::from_static_parts("version", env!("CARGO_PKG_VERSION"));
        exporter.gauge(BUILD_INFO, vec![version]).set(1.0);
        Self {
            plain: [
                (|stats| stats.clients_accepted, total(CLIENTS_ACCEPTED)),
                (|stats| stats.sessions, total(SESSIONS)),
                (|stats| stats.sessions_panicked, total(SESSIONS_PANICKED)),
                (|stats| stats.broken_invariants, total(BROKEN_INVARIANTS)),
                (|stats| stats.cancels_unknown_key, total(CANCELS_UNKNOWN_KEY)),
                (|stats| stats.cancels_ignored, total(CANCELS_IGNORED)),
                (|stats| stats.texts.recent, text("recent")),
                (|stats| stats.texts.fingerprint, text("fingerprint")),
                (|stats| stats.texts.grammar, text("grammar")),
            ],
            refused: TallyTotals::register::<RefusalReason>(exporter, CLIENTS_REFUSED, &[], "reason"),
            tls: [
                (|stats| stats.tls.handshakes, by_side(TLS_HANDSHAKES)),
                (|stats| stats.tls.resumptions, by_side(TLS_RESUMPTIONS)),
                (|stats| stats.tls.failures, by_side(TLS_FAILURES)),
            ],
            gauges: [
                (|gauges| gauges.clients, gauge(PROCESS_CLIENTS)),
                (|gauges| gauges.clients_logging_in, gauge(PROCESS_CLIENTS_LOGGING_IN)),
                (|gauges| gauges.servers, gauge(PROCESS_SERVERS)),
            ],
        }
    }

    /// Publishes worker-local totals; called once per tick.
    pub fn publish(&mut self, stats: &ProcessStats, gauges: &ProcessGauges) {
        for (read, total) in &mut self.plain {
            total.publish(read(stats));
        }
        self.refused.publish(&stats.clients_refused);
        for (read, totals) in &mut self.tls {
            totals.publish(&read(stats));
        }
        for (read, gauge) in &self.gauges {
            gauge.set(f64::from(read(gauges)));
        }
    }
}

/// The whole of `/metrics`: what was published, then the histograms of `snapshot`.
///
/// Source: Prometheus docs, "Exposition formats", text format 0.0.4.
#[must_use]
pub fn render(
    handle: &PrometheusHandle,
    snapshot: Option<&Snapshot>,
    now: Instant,
    outlook: impl Fn(&PoolLimits, &ScopeStanding) -> Outlook,
) -> String {
    let mut text = handle.render();
    let Some(snapshot) = snapshot else { return text };
    let pools = &snapshot.pools;
    write_family(&mut text, WAIT, pools.iter().map(|pool| (pool, &pool.stats.wait)));
    write_family(&mut text, TRANSACTION, pools.iter().map(|pool| (pool, &pool.stats.transaction)));
    write_family(&mut text, QUERY, pools.iter().map(|pool| (pool, &pool.stats.query)));
    limits::write(&mut text, pools, now, outlook);
    text
}

/// Appends one histogram family; nothing if there is no pool.
fn write_family<'a>(text: &mut String, metric: Metric, pools: impl Iterator<Item = (&'a PoolSnapshot, &'a Histogram)>) {
    let Metric { name, help, .. } = metric;
    let mut pools = pools.peekable();
    if pools.peek().is_none() {
        return;
    }
    // Writing to a String does not fail: the results below say nothing.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
    for (pool, histogram) in pools {
        let labels = text_labels(&pool.name, pool.url.as_deref());
        let (low, high) = BOUND_BITS;
        for (le, count) in histogram.cumulative(low, high) {
            let le = Seconds(le);
            let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{le}\"}} {count}");
        }
        let (count, sum) = (histogram.count(), Seconds(histogram.sum()));
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}");
        let _ = writeln!(text, "{name}_sum{{{labels}}} {sum}");
        let _ = writeln!(text, "{name}_count{{{labels}}} {count}");
    }
    text.push('\n');
}

/// Microseconds, written as decimal seconds without rounding.
struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

fn seconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64()
}

fn with(labels: &[Label], key: &'static str, value: String) -> Vec<Label> {
    labels.iter().cloned().chain([Label::new(key, value)]).collect()
}

/// A pool's labels for the exporter.
///
/// The exporter takes a pair of backslashes in a value for one that is escaped already, and drops a
/// single one in front of a quote; doubled, they come out as the text format wants them.
fn pool_labels(name: &PoolName, url: Option<&str>) -> Vec<Label> {
    let double = |value: &str| value.replace('\\', r"\\");
    let mut labels = vec![
        Label::new("database", double(&name.database)),
        Label::new("user", double(&name.user)),
        Label::from_static_parts("role", name.role.as_str()),
    ];
    if !name.server.is_empty() {
        labels.push(Label::new("server", double(&name.server)));
    }
    labels.extend(url.map(|url| Label::new("url", double(url))));
    labels
}

/// A pool's labels in the text format, without braces.
fn text_labels(name: &PoolName, url: Option<&str>) -> String {
    let escape = |value: &str| value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
    let (database, user) = (escape(&name.database), escape(&name.user));
    let mut labels = format!("database=\"{database}\",user=\"{user}\",role=\"{}\"", name.role);
    // Writing to a String cannot fail.
    if !name.server.is_empty() {
        let _ = write!(labels, ",server=\"{}\"", escape(&name.server));
    }
    if let Some(url) = url {
        let _ = write!(labels, ",url=\"{}\"", escape(url));
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{PoolHealth, Role};
    use std::collections::{BTreeMap, BTreeSet};

    type Labels<'a> = &'a [(&'a str, &'a str)];

    /// One line of a sample: name, labels, value.
    type Sample = (String, BTreeMap<String, String>, f64);

    /// Reads text format 0.0.4 strictly: every family has one HELP and one TYPE line, in front of its
    /// samples, and all of its samples together; every name and label is well-formed.
    fn parse(text: &str) -> Vec<Sample> {
        let (mut helped, mut typed) = (BTreeSet::new(), BTreeMap::new());
        let (mut family, mut samples) = (String::new(), Vec::new());
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("HELP has a text");
                assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("TYPE has a kind");
                assert!(helped.contains(name), "TYPE before HELP: {line}");
                assert!(typed.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                name.clone_into(&mut family);
            } else {
                let sample = parse_sample(line);
                let suffix = sample.0.strip_prefix(&family).unwrap_or_else(|| panic!("{line} outside {family}"));
                let histogram = typed[&family] == "histogram";
                assert_eq!(histogram, !suffix.is_empty(), "{line}");
                assert!(["", "_bucket", "_sum", "_count"].contains(&suffix), "{line}");
                samples.push(sample);
            }
        }
        assert_eq!(helped.len(), typed.len());
        samples
    }

    fn parse_sample(line: &str) -> Sample {
        let name: String = line.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
        let mut rest = &line[name.len()..];
        let mut labels = BTreeMap::new();
        if let Some(inside) = rest.strip_prefix('{') {
            rest = inside;
            while !rest.starts_with('}') {
                let (key, after) = rest.trim_start_matches(',').split_once("=\"").expect(line);
                let (value, after) = unescape(after);
                assert!(labels.insert(key.to_owned(), value).is_none(), "{key} twice: {line}");
                rest = after;
            }
            rest = &rest[1..];
        }
        let value = rest.strip_prefix(' ').expect(line).parse().expect(line);
        (name, labels, value)
    }

    /// Reads a label value up to its closing quote.
    fn unescape(quoted: &str) -> (String, &str) {
        let (mut value, mut chars) = (String::new(), quoted.chars());
        loop {
            match chars.next().expect("a closing quote") {
                '"' => return (value, chars.as_str()),
                '\\' => value.push(match chars.next() {
                    Some('n') => '\n',
                    Some(c @ ('\\' | '"')) => c,
                    other => panic!("unknown escape {other:?}"),
                }),
                c => value.push(c),
            }
        }
    }

    /// The sum of the samples of that name that have all of these labels.
    fn value(samples: &[Sample], name: &str, labels: Labels<'_>) -> Option<f64> {
        let has = |of: &BTreeMap<String, String>| labels.iter().all(|&(k, v)| of.get(k).is_some_and(|got| got == v));
        let found: Vec<f64> = samples.iter().filter(|s| s.0 == name && has(&s.1)).map(|s| s.2).collect();
        (!found.is_empty()).then(|| found.iter().sum())
    }

    fn pool(database: &str, user: &str) -> PoolSnapshot {
        PoolSnapshot {
            name: PoolName::primary(database, user),
            url: None,
            health: PoolHealth::Usable,
            stats: PoolStats::default(),
            gauges: PoolGauges::default(),
            limits: PoolLimits::default(),
        }
    }

    fn snapshot_of(pools: Vec<PoolSnapshot>) -> Snapshot {
        Snapshot { pools, ..Snapshot::empty(Instant::now()) }
    }

    /// Publishes each snapshot in turn and reads `/metrics` after the last.
    fn published(snapshots: &[Snapshot]) -> Vec<Sample> {
        let exporter = Arc::new(Exporter::new());
        let mut publisher = Publisher::new(Arc::clone(&exporter));
        for snapshot in snapshots {
            publisher.publish(snapshot);
        }
        let outlook = |_: &PoolLimits, _: &ScopeStanding| Outlook {
            per_hour: Some(1.5),
            exhausted_in: Some(Duration::from_secs(90)),
        };
        parse(&render(&exporter.handle(), snapshots.last(), Instant::now(), outlook))
    }

    #[test]
    fn names_are_unique_and_end_in_their_kind_and_unit() {
        let mut seen = BTreeSet::new();
        for metric in ALL {
            let Metric { name, kind, unit, help } = *metric;
            assert!(seen.insert(name), "{name} twice");
            assert!(name.starts_with("pgweir_") && help.ends_with('.'), "{name}");
            assert!(name.bytes().all(|b| b == b'_' || b.is_ascii_lowercase()), "{name}");
            let base = name.strip_suffix("_total");
            assert_eq!(base.is_some(), kind == Kind::Counter, "{name}");
            let base = base.unwrap_or(name);
            assert_eq!(base.ends_with("_seconds"), unit == Unit::Seconds, "{name}");
            assert_eq!(base.ends_with("_bytes"), unit == Unit::Bytes, "{name}");
            assert!(!["_count", "_sum", "_bucket"].iter().any(|end| base.ends_with(end)), "{name}");
        }
    }

    #[test]
    fn every_metric_of_the_table_is_exported_and_no_other() {
        let mut one = pool("app", "web");
        one.stats.errors.add(Blame::Client, b"42601");
        one.limits = limits::tests::known(Instant::now());
        one.stats.routes.add(RouteReason::Read);
        let mut two = pool("app", "web");
        two.name = PoolName::follower("app", "web", "b:5432");
        two.gauges.follower = Some(FollowerGauges::default());
        let text_names: BTreeSet<String> = published(&[snapshot_of(vec![one, two])])
            .into_iter()
            .map(|(name, ..)| {
                let strip = |name: &str, end: &str| name.strip_suffix(end).map(str::to_owned);
                strip(&name, "_bucket").or(strip(&name, "_sum")).or(strip(&name, "_count")).unwrap_or(name)
            })
            .collect();
        let table: BTreeSet<String> = ALL.iter().map(|metric| metric.name.to_owned()).collect();
        assert_eq!(text_names, table);
    }

    #[test]
    fn two_pools_keep_their_numbers_apart() {
        let (mut one, mut two) = (pool("app", "web"), pool("app", "batch"));
        one.stats.leases = 3;
        one.stats.pins.add(PinReason::Listen);
        one.gauges.clients_waiting = 7;
        one.gauges.oldest_wait_us = 1_500_000;
        two.stats.leases = 5;
        two.stats.errors.add(Blame::Pooler, b"53300");
        two.health = PoolHealth::Unreachable;
        let samples = published(&[snapshot_of(vec![one, two])]);
        #[rustfmt::skip]
        let table: [(&str, Labels<'_>, f64); 9] = [
            ("pgweir_leases_total", &[("user", "web")],                          3.0),
            ("pgweir_leases_total", &[("user", "batch")],                        5.0),
            ("pgweir_pins_total",   &[("user", "web"), ("reason", "listen")],    1.0),
            ("pgweir_pins_total",   &[("user", "web"), ("reason", "temp")],      0.0),
            ("pgweir_clients",      &[("user", "web"), ("state", "waiting")],    7.0),
            ("pgweir_oldest_wait_seconds", &[("user", "web")],                   1.5),
            ("pgweir_errors_total", &[("sqlstate", "53300"), ("blame", "pooler"), ("user", "batch")], 1.0),
            ("pgweir_pool_usable",  &[("user", "web")],                          1.0),
            ("pgweir_pool_usable",  &[("user", "batch")],                        0.0),
        ];
        for (name, labels, want) in table {
            assert_eq!(value(&samples, name, labels), Some(want), "{name} {labels:?}");
        }
    }

    #[test]
    fn the_pools_of_a_primary_and_a_follower_are_two_series() {
        let (mut one, mut two) = (pool("app", "web"), pool("app", "web"));
        two.name.role = Role::Follower;
        (one.stats.queries, two.stats.queries) = (2, 9);
        let samples = published(&[snapshot_of(vec![one, two])]);
        assert_eq!(value(&samples, "pgweir_queries_total", &[("role", "primary")]), Some(2.0));
        assert_eq!(value(&samples, "pgweir_queries_total", &[("role", "follower")]), Some(9.0));
    }

    #[test]
    fn hostile_names_come_through_both_halves_of_the_text_unchanged() {
        for hostile in ["a\"b", r"a\b", r"a\\b", r"\", "a\nb", "\\\nb", "\\\"", r"\n", "}", "é,x=\"1\"", ""] {
            let mut one = pool(hostile, "web");
            one.stats.leases = 1;
            one.stats.wait.record(1);
            let samples = published(&[snapshot_of(vec![one])]);
            for name in ["pgweir_leases_total", "pgweir_wait_seconds_count"] {
                assert_eq!(value(&samples, name, &[("database", hostile)]), Some(1.0), "{name} {hostile:?}");
            }
        }
    }

    #[test]
    fn followers_tell_apart_what_they_are_and_how_far_behind() {
        let follower = |server: &str, state| {
            let mut one = pool("app", "web");
            one.name = PoolName::follower("app", "web", server);
            let (lag_us, lag_bytes) = (Some(1_500_000), Some(16));
            one.gauges.follower = Some(FollowerGauges { state, lag_us, lag_bytes, covered_us: None });
            one
        };
        let two = vec![follower("b:1", FollowerState::Serving), follower("c:1", FollowerState::Lagging)];
        let samples = published(&[snapshot_of(two.clone())]);
        #[rustfmt::skip]
        let table: [(&str, Labels<'_>, f64); 5] = [
            ("pgweir_follower_state", &[("server", "b:1"), ("state", "serving")], 1.0),
            ("pgweir_follower_state", &[("server", "c:1"), ("state", "serving")], 0.0),
            ("pgweir_follower_state", &[("server", "c:1"), ("role", "follower")], 1.0),
            ("pgweir_follower_lag_seconds", &[("server", "b:1")],                 1.5),
            ("pgweir_follower_lag_bytes", &[("server", "c:1")],                   16.0),
        ];
        for (name, labels, want) in table {
            assert_eq!(value(&samples, name, labels), Some(want), "{name} {labels:?}");
        }
        // What is gone is not said to serve.
        let samples = published(&[snapshot_of(two), snapshot_of(Vec::new())]);
        assert_eq!(value(&samples, "pgweir_follower_state", &[("state", "serving")]), Some(0.0));
    }

    #[test]
    fn histograms_are_cumulative_and_their_bounds_are_exact_seconds() {
        let mut one = pool("app", "web");
        for us in [1, 32, 33, 1024, 1025, 1_048_576, 400_000_000] {
            one.stats.wait.record(us);
        }
        let samples = published(&[snapshot_of(vec![one])]);
        let buckets: Vec<(f64, f64)> = samples
            .iter()
            .filter(|(name, ..)| name == "pgweir_wait_seconds_bucket")
            .map(|(_, labels, count)| (labels["le"].parse().expect("le is a float"), *count))
            .collect();
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{buckets:?}");
        let at = |le: f64| buckets.iter().find(|bucket| bucket.0.total_cmp(&le).is_eq()).map(|bucket| bucket.1);
        #[rustfmt::skip]
        let table = [
            (0.000_032, 2.0), (0.000_064, 3.0), (0.001_024, 4.0), (0.002_048, 5.0), (1.048_576, 6.0),
            (268.435_456, 6.0), (f64::INFINITY, 7.0),
        ];
        for (le, want) in table {
            assert_eq!(at(le), Some(want), "le={le}");
        }
        assert_eq!(value(&samples, "pgweir_wait_seconds_count", &[]), Some(7.0));
        assert_eq!(value(&samples, "pgweir_wait_seconds_sum", &[]), Some(401.050_691));
    }

    #[test]
    fn counters_follow_totals_and_go_on_when_a_pool_is_made_anew() {
        let with_leases = |leases| {
            let mut one = pool("app", "web");
            one.stats.leases = leases;
            one.stats.errors.add(Blame::Server, if leases == 4 { b"57P01" } else { b"42601" });
            snapshot_of(vec![one])
        };
        #[rustfmt::skip]
        let table: [(&str, Vec<Snapshot>, f64); 3] = [
            ("grows",          vec![with_leases(10), with_leases(10), with_leases(12)],           12.0),
            ("gone and back",  vec![with_leases(10), snapshot_of(Vec::new()), with_leases(4)],    14.0),
            ("started again",  vec![with_leases(10), with_leases(4)],                             14.0),
        ];
        for (name, snapshots, want) in table {
            let samples = published(&snapshots);
            assert_eq!(value(&samples, "pgweir_leases_total", &[]), Some(want), "{name}");
            assert_eq!(value(&samples, "pgweir_errors_total", &[("sqlstate", "42601")]), Some(1.0), "{name}");
        }
    }

    #[test]
    fn the_gauges_of_a_pool_that_is_gone_fall_to_zero() {
        let mut one = pool("app", "web");
        one.gauges = PoolGauges { servers_idle: 3, servers_limit: 20, oldest_wait_us: 9, ..PoolGauges::default() };
        one.health = PoolHealth::Unreachable;
        let samples = published(&[snapshot_of(vec![one]), snapshot_of(Vec::new())]);
        assert_eq!(value(&samples, "pgweir_servers", &[]), Some(0.0));
        assert_eq!(value(&samples, "pgweir_servers_limit", &[]), Some(0.0));
        assert_eq!(value(&samples, "pgweir_oldest_wait_seconds", &[]), Some(0.0));
        assert_eq!(value(&samples, "pgweir_pool_usable", &[]), Some(1.0), "an alert on 0 must end");
    }

    #[test]
    fn sqlstates_past_the_limit_are_published_as_other() {
        let mut one = pool("app", "web");
        for number in 0..70 {
            one.stats.errors.add(Blame::Server, format!("{number:05}").as_bytes());
        }
        let samples = published(&[snapshot_of(vec![one])]);
        assert_eq!(value(&samples, "pgweir_errors_total", &[("sqlstate", "other")]), Some(6.0));
        assert_eq!(value(&samples, "pgweir_errors_total", &[]), Some(70.0));
    }
}

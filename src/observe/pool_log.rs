//! One log line per pool and statistics period, and one at the end, with keys that log drains understand; behind it a second one,
//! of the limits, if they are known: one line of both would be longer than the 1 kB that drains take.
//!
//! The keys follow l2met: `sample#` is the latest value, `count#` a sum over the period, `measure#` a
//! measurement; a unit is glued to its number. The first eight are those of Heroku's `PgBouncer`
//! add-on lines, so that parsers and dashboards made for them go on working.

use super::limits::{self, Fit};
use super::log::Excerpt;
use super::overview::Overview;
use crate::stats::{Histogram, LastRefusal, PoolGauges, PoolName, PoolSnapshot, PoolStats, ScopeStanding, Snapshot};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where the lines come from, as the platform names it; printed as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// `source`, such as `web.1`; what l2met groups by.
    pub source: Option<String>,
    /// `dyno`: differs for each start, where `source` stays.
    pub dyno: Option<String>,
    /// `variable`: that of the pools' URL, where those of several are served side by side.
    pub url: Option<Arc<str>>,
}

/// Logs the pools, period after period.
pub struct PoolLog {
    origin: Origin,
    /// When the first period began.
    start: Instant,
    before: Option<Arc<Snapshot>>,
}

impl PoolLog {
    /// A log whose first period begins at `start`.
    #[must_use]
    pub fn new(origin: Origin, start: Instant) -> Self {
        Self { origin, start, before: None }
    }

    /// Ends a period: logs each pool that has clients or server connections, or had
    /// some at the end of the period before, or did anything. Call it once per `stats_period`. `overview` knows what becomes of the
    /// limits, and who else in the process has to do with them.
    pub fn period(&mut self, now: Arc<Snapshot>, overview: &Overview) {
        let began = self.before.as_ref().map_or(self.start, |before| before.taken);
        let length = now.taken.saturating_duration_since(began);
        let fits = overview.snapshot().map(|whole| limits::fits(&whole)).unwrap_or_default();
        for pool in &now.pools {
            let before = self.before.as_ref().and_then(|before| before.pool(&pool.name));
            let period = PoolPeriod::between(before, pool, length);
            if !period.at_rest() {
                period.log(&self.origin);
                let budget = Budget::of(pool, now.taken, length, overview, fits.get(&pool.limits.server));
                if let Some(budget) = budget {
                    budget.log(&self.origin, &pool.name);
                }
            }
        }
        self.before = Some(now);
    }

    /// Ends the last period, however short it was: what was counted since the line before is told, too. Nothing, if that line
    /// has told of `now` already.
    pub fn finish(&mut self, now: Arc<Snapshot>, overview: &Overview) {
        if self.before.as_ref().is_none_or(|before| !Arc::ptr_eq(before, &now)) {
            self.period(now, overview);
        }
    }
}

/// What one pool did in one period, and how it stands at the end.
struct PoolPeriod<'a> {
    name: &'a PoolName,
    gauges: PoolGauges,
    /// How it stood at the end of the period before.
    gauges_before: PoolGauges,
    queries: u64,
    transactions: u64,
    errors: u64,
    pins: u64,
    login_failures: u64,
    /// Bytes per second.
    received: u64,
    /// Bytes per second.
    sent: u64,
    wait: Histogram,
    query: Histogram,
}

impl<'a> PoolPeriod<'a> {
    /// `before` is `None` in the first period of a pool: everything it counted is of this one.
    fn between(before: Option<&PoolSnapshot>, now: &'a PoolSnapshot, length: Duration) -> Self {
        let nothing = PoolStats::default();
        let (then, stats) = (before.map_or(&nothing, |before| &before.stats), &now.stats);
        let since = |count: fn(&PoolStats) -> u64| count(stats).saturating_sub(count(then));
        let login_failures = |stats: &PoolStats| stats.server_login_failures.total() + stats.server_logins_unanswered;
        Self {
            name: &now.name,
            gauges: now.gauges,
            gauges_before: before.map_or_else(PoolGauges::default, |before| before.gauges),
            queries: since(|stats| stats.queries),
            transactions: since(|stats| stats.transactions),
            errors: since(|stats| stats.errors.total()),
            pins: since(|stats| stats.pins.total()),
            login_failures: since(login_failures),
            received: per_second(since(|stats| stats.bytes_from_clients), length),
            sent: per_second(since(|stats| stats.bytes_to_clients), length),
            wait: stats.wait.since(&then.wait),
            query: stats.query.since(&then.query),
        }
    }

    /// Nobody is connected, nobody was, and nothing happened in between.
    fn at_rest(&self) -> bool {
        let limit = |gauges: &PoolGauges| gauges.servers_limit;
        let empty =
            |gauges: &PoolGauges| *gauges == PoolGauges { servers_limit: limit(gauges), ..PoolGauges::default() };
        let happened = self.queries + self.transactions + self.errors + self.login_failures + self.wait.count();
        empty(&self.gauges) && empty(&self.gauges_before) && happened == 0
    }

    fn log(&self, origin: &Origin) {
        let Self { name, gauges, wait, query, .. } = self;
        let quantile = |of: &Histogram, permille| Ms(of.quantile(permille).unwrap_or(0));
        tracing::info!(
            target: "pgweir::pool",
            source = origin.source.as_deref(),
            dyno = origin.dyno.as_deref(),
            pgweir = "stats",
            pool = %Excerpt::of(&name.database),
            user = %Excerpt::of(&name.user),
            role = %name.role,
            variable = origin.url.as_deref(),
            "sample#client_active" = gauges.clients_active,
            "sample#client_waiting" = gauges.clients_waiting,
            "sample#server_active" = gauges.servers_active,
            "sample#server_idle" = gauges.servers_idle,
            "sample#max_wait" = %Ms(gauges.oldest_wait_us),
            "sample#avg_query" = %Ms(query.mean()),
            "sample#avg_recv" = self.received,
            "sample#avg_sent" = self.sent,
            "sample#client_idle" = gauges.clients_idle,
            "sample#server_pinned" = gauges.servers_pinned,
            "sample#server_limit" = gauges.servers_limit,
            "count#queries" = self.queries,
            "count#transactions" = self.transactions,
            "count#errors" = self.errors,
            "count#pinned" = self.pins,
            "count#login_failures" = self.login_failures,
            "count#waits" = wait.count(),
            "measure#wait.p50" = %quantile(wait, 500),
            "measure#wait.p95" = %quantile(wait, 950),
            "measure#wait.p99" = %quantile(wait, 990),
            "measure#query.p50" = %quantile(query, 500),
            "measure#query.p95" = %quantile(query, 950),
            "measure#query.p99" = %quantile(query, 990),
        );
    }
}

/// How the limit stands that binds a pool, at the end of a period. What is not known is left out.
struct Budget<'a> {
    scope: Option<&'a ScopeStanding>,
    census_ago: Option<Duration>,
    exhausted_in: Option<Duration>,
    fit: Option<&'a Fit>,
    /// The last refusal, and how long ago it was.
    refusal: Option<(LastRefusal, Duration)>,
}

impl<'a> Budget<'a> {
    /// None if nothing is known, and nobody was refused in the period.
    fn of(
        pool: &'a PoolSnapshot,
        now: Instant,
        length: Duration,
        overview: &Overview,
        fit: Option<&'a Fit>,
    ) -> Option<Self> {
        let ago = |at: Instant| now.saturating_duration_since(at);
        let limits = &pool.limits;
        let standing = limits.fresh(now);
        let scope = standing.and_then(|standing| standing.binding());
        let census_ago = scope.and(standing).map(|standing| ago(standing.taken));
        let exhausted_in = scope.zip(census_ago).and_then(|(scope, age)| overview.exhausted_in(limits, scope, age));
        let refusal = limits.refusal.map(|refusal| (refusal, ago(refusal.at)));
        let is_refused = refusal.is_some_and(|(_, ago)| ago <= length);
        let fit = fit.filter(|_| scope.is_some());
        (scope.is_some() || is_refused).then_some(Self { scope, census_ago, exhausted_in, fit, refusal })
    }

    fn log(&self, origin: &Origin, name: &PoolName) {
        let Self { scope, census_ago, exhausted_in, fit, refusal } = self;
        let number = |of: fn(&ScopeStanding) -> u32| scope.map(of);
        let seconds = |time: Option<Duration>| time.map(|time| tracing::field::display(Seconds(time)));
        tracing::info!(
            target: "pgweir::pool",
            source = origin.source.as_deref(),
            dyno = origin.dyno.as_deref(),
            pgweir = "budget",
            pool = %Excerpt::of(&name.database),
            user = %Excerpt::of(&name.user),
            role = %name.role,
            variable = origin.url.as_deref(),
            scope = scope.map(|scope| scope.scope),
            "sample#share" = scope.and_then(|scope| scope.share),
            "sample#fleet_used" = number(|scope| scope.used),
            "sample#fleet_limit" = scope.and_then(|scope| scope.limit),
            "sample#headroom" = number(|scope| scope.headroom),
            "sample#room" = scope.and_then(ScopeStanding::room),
            "sample#own" = number(|scope| scope.own.connections + scope.own.claims),
            "sample#peers" = number(|scope| scope.peers.used),
            "sample#foreigners" = number(|scope| scope.foreigners.used),
            "sample#claims" = number(|scope| scope.claims),
            "sample#probes" = number(|scope| scope.probes),
            "sample#waiting_probes" = number(|scope| scope.waiting),
            "sample#census_ago" = seconds(*census_ago),
            "sample#exhausted_in" = seconds(*exhausted_in),
            "sample#more_sidecars" = fit.map(|fit| fit.more),
            "sample#more_sidecars_at_present_use" = fit.map(|fit| fit.more_at_present_use),
            "sample#refused_ago" = seconds(refusal.map(|(_, ago)| ago)),
            refused_scope = refusal.and_then(|(refusal, _)| refusal.scope),
        );
    }
}

/// Whole seconds with their unit.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0.as_secs())
    }
}

/// Microseconds, written as milliseconds with their unit, as l2met reads them.
struct Ms(u64);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}ms", self.0 / 1000, self.0 % 1000)
    }
}

/// Rounded down; 0 over no time.
fn per_second(count: u64, length: Duration) -> u64 {
    let rate = (u128::from(count) * 1_000_000).checked_div(length.as_micros());
    u64::try_from(rate.unwrap_or(0)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Shared;
    use crate::observe::log::tests::logged;
    use crate::stats::{Blame, Holder, Holders, PinReason, PoolHealth, PoolLimits, Standing};
    use pgweir_config::{LogFormat, LogLevel};
    use std::collections::BTreeMap;

    fn snapshot(taken: Instant, name: PoolName, stats: PoolStats, gauges: PoolGauges) -> Arc<Snapshot> {
        let limits = PoolLimits::default();
        let pool = PoolSnapshot { name, url: None, health: PoolHealth::Usable, stats, gauges, limits };
        Arc::new(Snapshot { pools: vec![pool], ..Snapshot::empty(taken) })
    }

    /// Nothing is known of what was, nor of others.
    fn nobody() -> Overview {
        Overview::new(&[])
    }

    /// The lines of these snapshots, one period each.
    fn lines(origin: &Origin, start: Instant, snapshots: &[Arc<Snapshot>]) -> Vec<String> {
        let text = logged(LogFormat::Logfmt, LogLevel::Info, |_| {
            let mut log = PoolLog::new(origin.clone(), start);
            for snapshot in snapshots {
                log.period(Arc::clone(snapshot), &nobody());
            }
        });
        text.lines().map(str::to_owned).collect()
    }

    /// A line of unquoted values as l2met splits it.
    fn fields(line: &str) -> BTreeMap<&str, &str> {
        line.split(' ').map(|pair| pair.split_once('=').expect(line)).collect()
    }

    fn counted(stats: &mut PoolStats, queries: u64, us: u64) {
        for _ in 0..queries {
            stats.queries += 1;
            stats.transactions += 1;
            stats.bytes_from_clients += 100;
            stats.bytes_to_clients += 300;
            stats.query.record(us);
        }
    }

    #[test]
    fn a_line_has_the_state_at_its_end_and_the_counts_of_its_period() {
        let start = Instant::now();
        let mut stats = PoolStats::default();
        let gauges = PoolGauges {
            clients_active: 4,
            clients_waiting: 2,
            servers_active: 4,
            servers_idle: 1,
            servers_limit: 5,
            oldest_wait_us: 12_345,
            ..PoolGauges::default()
        };
        counted(&mut stats, 1000, 9_000_000);
        stats.errors.add(Blame::Client, b"42601");
        stats.wait.record(5_000_000);
        let first = snapshot(start + Duration::from_mins(1), PoolName::primary("app", "web"), stats.clone(), gauges);
        counted(&mut stats, 100, 2_000);
        stats.wait.record(20);
        stats.pins.add(PinReason::Temp);
        let second = snapshot(start + Duration::from_secs(70), PoolName::primary("app", "web"), stats, gauges);

        let origin = Origin { source: Some("web.1".into()), dyno: Some("1-2-3".into()), url: None };
        let lines = lines(&origin, start, &[first, second]);
        assert_eq!(lines.len(), 2);
        let got = fields(&lines[1]);
        #[rustfmt::skip]
        let table = [
            ("source", "web.1"), ("dyno", "1-2-3"), ("pgweir", "stats"), ("pool", "app"), ("user", "web"),
            ("role", "primary"),
            ("sample#client_active", "4"), ("sample#client_waiting", "2"), ("sample#server_active", "4"),
            ("sample#server_idle", "1"), ("sample#max_wait", "12.345ms"), ("sample#avg_query", "2.000ms"),
            ("sample#avg_recv", "1000"), ("sample#avg_sent", "3000"), ("sample#server_limit", "5"),
            ("count#queries", "100"), ("count#errors", "0"), ("count#pinned", "1"), ("count#waits", "1"),
            ("measure#wait.p95", "0.020ms"), ("measure#query.p99", "2.048ms"),
        ];
        for (key, want) in table {
            assert_eq!(got.get(key), Some(&want), "{key} in {}", lines[1]);
        }
        let first = fields(&lines[0]);
        assert_eq!((first["count#queries"], first["count#errors"]), ("1000", "1"));
        assert_eq!(first["sample#avg_recv"], "1666", "over the 60 s from the start");
    }

    #[test]
    fn a_pool_at_rest_is_silent_after_one_line_that_says_so() {
        let start = Instant::now();
        let name = || PoolName::primary("app", "web");
        let mut stats = PoolStats::default();
        counted(&mut stats, 1, 1);
        let busy = PoolGauges { clients_active: 1, servers_active: 1, servers_limit: 20, ..PoolGauges::default() };
        let empty = PoolGauges { servers_limit: 20, ..PoolGauges::default() };
        let at = |second, gauges| snapshot(start + Duration::from_secs(second), name(), stats.clone(), gauges);
        let lines = lines(&Origin::default(), start, &[at(60, busy), at(120, empty), at(180, empty), at(240, empty)]);
        let active: Vec<&str> = lines.iter().map(|line| fields(line)["sample#client_active"]).collect();
        assert_eq!(active, ["1", "0"], "drains keep the last sample, so the 0 must be told");
    }

    #[test]
    fn the_last_line_tells_what_came_after_the_one_before_and_nothing_twice() {
        let start = Instant::now();
        let name = || PoolName::primary("app", "web");
        let busy = PoolGauges { clients_active: 1, servers_limit: 20, ..PoolGauges::default() };
        let empty = PoolGauges { servers_limit: 20, ..PoolGauges::default() };
        let mut stats = PoolStats::default();
        counted(&mut stats, 5, 1);
        let first = snapshot(start + Duration::from_mins(1), name(), stats.clone(), busy);
        counted(&mut stats, 2, 1);
        let last = snapshot(start + Duration::from_secs(61), name(), stats.clone(), empty);
        let later = snapshot(start + Duration::from_secs(62), name(), stats, empty);
        let text = logged(LogFormat::Logfmt, LogLevel::Info, |_| {
            let mut log = PoolLog::new(Origin::default(), start);
            log.period(Arc::clone(&first), &nobody());
            // Nothing was published since: a worker that was lost.
            log.finish(first, &nobody());
            log.finish(last, &nobody());
            log.finish(later, &nobody());
        });
        let counts: Vec<&str> = text.lines().map(|line| fields(line)["count#queries"]).collect();
        assert_eq!(counts, ["5", "2"]);
    }

    #[test]
    fn a_line_stays_under_a_kilobyte_with_the_longest_names_and_numbers() {
        let start = Instant::now();
        // 63 bytes is the longest identifier of a default server build.
        let name = PoolName::primary(&"d".repeat(63), &"u".repeat(63));
        let mut stats = PoolStats::default();
        counted(&mut stats, 1, 2_000_000_000);
        stats.wait.record(2_000_000_000);
        (stats.queries, stats.bytes_to_clients, stats.bytes_from_clients) = (1 << 40, 1 << 50, 1 << 50);
        let gauges = PoolGauges { oldest_wait_us: 2_000_000_000, clients_idle: 10_000, ..PoolGauges::default() };
        let origin =
            Origin { source: Some("worker.100".into()), dyno: Some("a".repeat(36)), url: Some("PINK_URL".into()) };
        let lines = lines(&origin, start, &[snapshot(start + Duration::from_secs(1), name, stats, gauges)]);
        assert!(lines[0].len() < 1024, "{} bytes: {}", lines[0].len(), lines[0]);
    }

    /// A pool under a database's limit that leaves no more room than this, and under the server's, which leaves more.
    fn limited(taken: Instant, name: PoolName, used: u32, room: u32) -> Snapshot {
        let scope = |scope, room| ScopeStanding {
            scope,
            limit: Some(used + room + 2),
            used,
            own: Holder { connections: used / 4, claims: 1, ..Holder::default() },
            peers: Holders { used: used / 2, ..Holders::default() },
            foreigners: Holders { used: used / 8, ..Holders::default() },
            claims: 3,
            probes: 2,
            waiting: 1,
            members: Some(4),
            usable: used + room,
            ..ScopeStanding::sample()
        };
        let standing = Standing { taken, scopes: vec![scope("server", room + 50), scope("database", room)] };
        let gauges = PoolGauges { clients_idle: 1, ..PoolGauges::default() };
        let mut snapshot = (*snapshot(taken, name, PoolStats::default(), gauges)).clone();
        snapshot.pools[0].limits.standing = Some(Arc::new(standing));
        snapshot
    }

    /// The line of the limits of the last snapshot, `period` after another; all of them were seen by who looks at the limits.
    fn budget(snapshots: Vec<Snapshot>, period: Duration) -> Option<String> {
        let shared = Arc::new(Shared::new(snapshots[0].taken));
        let overview = Overview::of(Arc::clone(&shared));
        let mut last = Arc::new(snapshots[0].clone());
        for snapshot in snapshots {
            last = Arc::new(snapshot);
            shared.publish(Arc::clone(&last), last.taken);
            overview.record_limits();
        }
        let origin =
            Origin { source: Some("worker.100".into()), dyno: Some("a".repeat(36)), url: Some("PINK_URL".into()) };
        let text = logged(LogFormat::Logfmt, LogLevel::Info, |_| {
            PoolLog::new(origin, last.taken.checked_sub(period).unwrap()).period(last, &overview);
        });
        let mut lines = text.lines().filter(|line| line.contains(" pgweir=budget ")).map(str::to_owned);
        let line = lines.next();
        assert_eq!(lines.next(), None, "one line per pool");
        line
    }

    #[test]
    fn a_second_line_tells_how_the_limit_stands_that_binds() {
        let start = Instant::now();
        let name = || PoolName::primary("app", "web");
        // One connection more every 5 s: what is left lasts as many times 5 s.
        let mut snapshots: Vec<Snapshot> = (0..=40)
            .map(|n| {
                limited(
                    start + 5 * Duration::from_secs(n),
                    name(),
                    u32::try_from(n).unwrap(),
                    100 - u32::try_from(n).unwrap(),
                )
            })
            .collect();
        let last = snapshots.last_mut().unwrap();
        last.pools[0].limits.refusal = Some(LastRefusal { at: last.taken, scope: Some("server") });
        last.taken += Duration::from_secs(7);
        let line = budget(snapshots, Duration::from_mins(1)).unwrap();
        let got = fields(&line);
        #[rustfmt::skip]
        let table = [
            ("source", "worker.100"), ("pgweir", "budget"), ("pool", "app"), ("user", "web"), ("role", "primary"),
            ("variable", "PINK_URL"), ("scope", "database"), ("sample#share", "5"), ("sample#fleet_used", "40"),
            ("sample#fleet_limit", "102"), ("sample#headroom", "2"), ("sample#room", "60"), ("sample#own", "11"),
            ("sample#peers", "20"), ("sample#foreigners", "5"), ("sample#claims", "3"), ("sample#probes", "2"),
            ("sample#waiting_probes", "1"), ("sample#census_ago", "7s"), ("sample#more_sidecars", "91"),
            ("sample#more_sidecars_at_present_use", "8"), ("sample#refused_ago", "7s"), ("refused_scope", "server"),
        ];
        for (key, want) in table {
            assert_eq!(got.get(key), Some(&want), "{key} in {line}");
        }
        let exhausted: u64 = got["sample#exhausted_in"].strip_suffix('s').unwrap().parse().unwrap();
        assert!((280..=300).contains(&exhausted), "60 times 5 s, less 7 s: {line}");
    }

    #[test]
    fn what_is_not_known_of_the_limits_is_left_out() {
        let start = Instant::now();
        let refused = |at| {
            let mut snapshot = limited(start, PoolName::primary("app", "web"), 8, 9);
            snapshot.taken = start + Duration::from_secs(90);
            snapshot.pools[0].limits.refusal = Some(LastRefusal { at: start + Duration::from_secs(at), scope: None });
            snapshot
        };
        let period = Duration::from_mins(1);
        assert_eq!(budget(vec![refused(20)], period), None, "the census is old, and so is the refusal");
        let line = budget(vec![refused(50)], period).unwrap();
        assert!(line.ends_with(" variable=PINK_URL sample#refused_ago=40s"), "{line}");
    }

    #[test]
    fn the_line_of_the_limits_stays_under_a_kilobyte_with_the_longest_names_and_numbers() {
        let start = Instant::now();
        let name = PoolName::primary(&"d".repeat(63), &"u".repeat(63));
        let mut snapshot = limited(start, name, 1_000_000_000, 0);
        let pool = &mut snapshot.pools[0];
        pool.limits.refusal = Some(LastRefusal { at: start, scope: Some("database") });
        let standing = Arc::make_mut(pool.limits.standing.as_mut().unwrap());
        for scope in &mut standing.scopes {
            (scope.headroom, scope.share) = (u32::MAX, Some(u32::MAX));
            (scope.claims, scope.probes, scope.waiting) = (u32::MAX, u32::MAX, u32::MAX);
        }
        snapshot.taken += Duration::from_secs(59);
        let line = budget(vec![snapshot], Duration::from_hours(1)).unwrap();
        assert!(line.contains(" sample#exhausted_in=0s ") && line.contains(" refused_scope=database"), "{line}");
        assert!(line.len() < 1024, "{} bytes: {line}", line.len());
    }

    #[test]
    fn a_name_cannot_forge_a_field_or_a_line() {
        let start = Instant::now();
        let name = PoolName::primary("app sample#client_active=99", "a\nb");
        let gauges = PoolGauges { clients_idle: 1, ..PoolGauges::default() };
        let lines = lines(&Origin::default(), start, &[snapshot(start, name, PoolStats::default(), gauges)]);
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains("pool=\"app sample#client_active=99\" user=a\\u{a}b "), "{}", lines[0]);
    }

    #[test]
    fn a_period_of_no_length_has_no_rate() {
        #[rustfmt::skip]
        let table = [(10, 0, 0), (10, 2000, 5), (u64::MAX, 1, u64::MAX)];
        for (count, length_ms, want) in table {
            assert_eq!(per_second(count, Duration::from_millis(length_ms)), want);
        }
    }
}

//! All data planes of a process, as one to whoever looks from outside.
//!
//! `pgweir serve` has one data plane, `pgweir exec` one for each group of URLs that one listener can serve; a plane that is
//! lost is replaced, and its place stays. Where there are several, every pool bears the variable of its URL: two of them may
//! well have the same database and user by name, as a primary and its follower do.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use metrics_exporter_prometheus::PrometheusHandle;

use super::history::{History, LimitKey};
use super::shared::{NotReady, Shared, Stage, Told};
use crate::cancel::Blame;
use crate::metrics::{self, Exporter, Outlook, Publisher};
use crate::stats::{PoolLimits, ProcessGauges, ProcessStats, ScopeStanding, Snapshot};

/// The place of a data plane.
struct Place {
    /// The variable of its first URL; none where there is one plane.
    url: Option<Arc<str>>,
    /// What its worker tells, or told last.
    shared: Option<Arc<Shared>>,
    /// There is a worker.
    is_up: bool,
    /// What the workers before it have counted that belongs to no pool.
    before: ProcessStats,
}

/// What the observers of a process see of its data planes.
pub struct Overview {
    places: Mutex<Vec<Place>>,
    history: Mutex<History>,
}

/// A data plane, as it is looked at.
struct Plane {
    url: Option<Arc<str>>,
    shared: Arc<Shared>,
    is_up: bool,
    before: ProcessStats,
}

impl Overview {
    /// Of planes that have not started yet; `urls` are the variables of their first URLs.
    #[must_use]
    pub fn new(urls: &[Arc<str>]) -> Self {
        let place = |url: &Arc<str>| {
            let url = (urls.len() > 1).then(|| Arc::clone(url));
            Place { url, shared: None, is_up: false, before: ProcessStats::default() }
        };
        let places = Mutex::new(urls.iter().map(place).collect());
        Self { places, history: Mutex::new(History::new(Instant::now())) }
    }

    /// Of one plane.
    #[must_use]
    pub fn of(shared: Arc<Shared>) -> Self {
        let overview = Self::new(&[Arc::default()]);
        overview.show(0, shared);
        overview
    }

    /// The plane at this place has started.
    pub fn show(&self, place: usize, shared: Arc<Shared>) {
        if let Some(place) = self.places().get_mut(place) {
            if let Some(last) = place.shared.as_ref().and_then(|old| old.snapshot()) {
                place.before.merge(&last.process);
            }
            (place.shared, place.is_up) = (Some(shared), true);
        }
    }

    /// The plane at this place was lost.
    pub fn lose(&self, place: usize) {
        if let Some(place) = self.places().get_mut(place) {
            place.is_up = false;
        }
    }

    /// Those that have started.
    fn planes(&self) -> Vec<Plane> {
        let plane = |place: &Place| {
            let (url, is_up, before) = (place.url.clone(), place.is_up, place.before.clone());
            Some(Plane { url, shared: Arc::clone(place.shared.as_ref()?), is_up, before })
        };
        self.places().iter().filter_map(plane).collect()
    }

    /// The whole process at its last tick; `None` before the first of all.
    #[must_use]
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        let planes = self.planes();
        let snapshots: Vec<(&Plane, Arc<Snapshot>)> =
            planes.iter().filter_map(|plane| Some((plane, plane.shared.snapshot()?))).collect();
        if let [(Plane { url: None, is_up: true, before, .. }, only)] = snapshots.as_slice()
            && *before == ProcessStats::default()
        {
            return Some(Arc::clone(only));
        }
        let taken = snapshots.iter().map(|(_, snapshot)| snapshot.taken).max()?;
        let mut whole = Snapshot::empty(taken);
        // What was counted before stays counted while a new worker has not said anything yet.
        for plane in &planes {
            whole.process.merge(&plane.before);
        }
        for (plane, snapshot) in snapshots {
            whole.process.merge(&snapshot.process);
            if !plane.is_up {
                // Its counts were counted. Nothing of it stands any more.
                continue;
            }
            let ProcessGauges { clients, clients_logging_in, servers } = snapshot.gauges;
            whole.gauges.clients += clients;
            whole.gauges.clients_logging_in += clients_logging_in;
            whole.gauges.servers += servers;
            let pools = snapshot.pools.iter().cloned().map(|mut pool| {
                pool.url.clone_from(&plane.url);
                pool
            });
            whole.pools.extend(pools);
        }
        Some(Arc::new(whole))
    }

    /// How long ago the worker that is silent for longest last published; `None` if one never did.
    #[must_use]
    pub fn since_tick(&self, now: Instant) -> Option<Duration> {
        let planes = self.planes();
        let since: Option<Vec<Duration>> = planes.iter().map(|plane| plane.shared.since_tick(now)).collect();
        since?.into_iter().max()
    }

    /// How far the process has come: as far as the plane that is furthest behind, unless one drains.
    #[must_use]
    pub fn stage(&self) -> Stage {
        let places = self.places();
        let stages =
            || places.iter().map(|place| place.shared.as_ref().map_or(Stage::Starting, |shared| shared.stage()));
        if stages().any(|stage| stage == Stage::Draining) {
            return Stage::Draining;
        }
        stages().min().unwrap_or(Stage::Starting)
    }

    /// Somebody wants to know how the limits stand.
    pub fn ask_limits(&self, now: Instant) {
        self.planes().iter().for_each(|plane| plane.shared.ask_limits(now));
    }

    /// Whether a worker is about to find out, for the first time, how the limits of some server stand.
    #[must_use]
    pub fn is_census_coming(&self) -> bool {
        self.planes().iter().any(|plane| plane.is_up && plane.shared.is_census_coming())
    }

    /// Asks who holds the server connections, and waits for the answers, so long at most. `None` if there is none. A plane
    /// that was lost is not asked, and counts among the silent ones.
    pub async fn blame(&self, limit: Duration) -> Option<Told> {
        let planes = self.planes();
        let asked: Vec<_> = planes.iter().map(|plane| plane.is_up.then(|| plane.shared.ask_blame())).collect();
        let answers = asked.into_iter().map(|answer| async move {
            let mut answer = answer?;
            let told = tokio::time::timeout(limit, answer.changed()).await;
            if matches!(told, Ok(Ok(()))) { answer.borrow_and_update().clone() } else { None }
        });
        let mut whole: Option<Told> = None;
        let mut silent = Vec::new();
        for (plane, told) in planes.iter().zip(join_all(answers).await) {
            let Some(told) = told else {
                silent.extend(plane.url.clone());
                continue;
            };
            let kept = whole.get_or_insert(Told::new(told.at, Blame::default()));
            kept.at = kept.at.min(told.at);
            kept.blame.unasked += told.blame.unasked;
            kept.blame.holdings.extend(told.blame.holdings.iter().cloned().map(|mut holding| {
                holding.url.clone_from(&plane.url);
                holding
            }));
        }
        if let Some(whole) = &mut whole {
            whole.silent = silent;
        }
        whole
    }

    /// Whether every worker is there and ticks.
    #[must_use]
    pub fn is_healthy(&self, now: Instant) -> bool {
        let places = self.places();
        let is_well = |place: &Place| place.is_up && place.shared.as_ref().is_some_and(|shared| shared.is_healthy(now));
        places.iter().all(is_well)
    }

    /// Everything that speaks against sending clients here; ready if empty.
    #[must_use]
    pub fn not_ready(&self, now: Instant) -> Vec<NotReady> {
        let mut reasons: Vec<NotReady> = Vec::new();
        for place in self.places().iter() {
            let mut of_it = match &place.shared {
                None => vec![NotReady::Starting],
                Some(shared) if !place.is_up => {
                    vec![NotReady::Stalled { for_s: shared.since_tick(now).map(|since| since.as_secs()) }]
                }
                Some(shared) => shared.not_ready(now),
            };
            for reason in &mut of_it {
                if let NotReady::Pool { url, .. } = reason {
                    url.clone_from(&place.url);
                }
            }
            let fresh = of_it.into_iter().filter(|reason| !reasons.contains(reason)).collect::<Vec<_>>();
            reasons.extend(fresh);
        }
        reasons
    }

    // ---- what was ----

    /// Adds how things stand to what was. `time` is that of the day.
    pub fn record(&self, time: SystemTime) {
        if let Some(snapshot) = self.snapshot() {
            self.history().record(&snapshot, time);
        }
    }

    /// Adds how the limits stand to what was, and nothing else.
    pub fn record_limits(&self) {
        for plane in self.planes() {
            if let Some(snapshot) = plane.shared.snapshot() {
                self.history().record_limits(&snapshot);
            }
        }
    }

    /// When there will be no room under a limit of a pool; none if that is not foreseen. `age`: of what is known of it.
    #[must_use]
    pub fn exhausted_in(&self, limits: &PoolLimits, scope: &ScopeStanding, age: Duration) -> Option<Duration> {
        self.history().exhausted_in(&LimitKey::new(limits, scope.scope), scope, age)
    }

    /// What was, as far as it was recorded.
    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A poisoned lock still holds whole places.
    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The metrics of a process, ready to be asked for.
pub struct Exposition {
    overview: Arc<Overview>,
    handle: PrometheusHandle,
    publisher: Mutex<Publisher>,
}

impl Exposition {
    /// With no series yet. Making the first one of a process costs 30 ms.
    #[must_use]
    pub fn new(overview: Arc<Overview>) -> Self {
        let exporter = Arc::new(Exporter::new());
        Self { overview, handle: exporter.handle(), publisher: Mutex::new(Publisher::new(exporter)) }
    }

    /// Takes in what the workers have published: often enough that no worker is replaced unseen.
    pub fn renew(&self) -> Option<Arc<Snapshot>> {
        let snapshot = self.overview.snapshot()?;
        self.publisher.lock().unwrap_or_else(PoisonError::into_inner).publish(&snapshot);
        Some(snapshot)
    }

    /// The whole of `/metrics`, as of now.
    #[must_use]
    pub fn text(&self) -> String {
        let snapshot = self.renew();
        let history = self.overview.history();
        metrics::render(&self.handle, snapshot.as_deref(), Instant::now(), |limits, scope| {
            let key = LimitKey::new(limits, scope.scope);
            let age = limits.standing.as_ref().map_or(Duration::ZERO, |known| known.taken.elapsed());
            let exhausted_in = history.exhausted_in(&key, scope, age);
            Outlook { per_hour: history.trend(&key).map(|trend| trend.per_hour), exhausted_in }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{PoolGauges, PoolHealth, PoolName, PoolSnapshot, PoolStats};

    fn publish(shared: &Shared, leases: u64, sessions: u64) {
        let pool = PoolSnapshot {
            name: PoolName::primary("app", "web"),
            url: None,
            health: PoolHealth::Unreachable,
            stats: PoolStats { leases, ..PoolStats::default() },
            gauges: PoolGauges::default(),
            limits: PoolLimits::default(),
        };
        let process = ProcessStats { sessions, ..ProcessStats::default() };
        let gauges = ProcessGauges { clients: 2, ..ProcessGauges::default() };
        let now = Instant::now();
        shared.publish(Arc::new(Snapshot { process, gauges, pools: vec![pool], ..Snapshot::empty(now) }), now);
    }

    fn plane(leases: u64, sessions: u64) -> Arc<Shared> {
        let shared = Arc::new(Shared::new(Instant::now()));
        shared.enter(Stage::Listening);
        publish(&shared, leases, sessions);
        shared
    }

    /// The values of the series whose lines begin so.
    fn values(text: &str, begin: &str) -> Vec<u64> {
        let lines = text.lines().filter(|line| line.starts_with(begin));
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap()).collect()
    }

    #[test]
    fn planes_of_one_name_are_told_apart_and_counted_together() {
        let overview = Arc::new(Overview::new(&["DATABASE_URL".into(), "PINK_URL".into()]));
        assert_eq!((overview.stage(), overview.not_ready(Instant::now())), (Stage::Starting, vec![NotReady::Starting]));
        assert!(overview.snapshot().is_none() && !overview.is_healthy(Instant::now()));
        overview.show(0, plane(1, 10));
        assert_eq!(overview.stage(), Stage::Starting);
        overview.show(1, plane(2, 20));
        let now = Instant::now();
        assert!(overview.stage() == Stage::Listening && overview.is_healthy(now));
        let whole = overview.snapshot().unwrap();
        let pools: Vec<_> = whole.pools.iter().map(|pool| (pool.url.as_deref(), pool.stats.leases)).collect();
        assert_eq!(pools, [(Some("DATABASE_URL"), 1), (Some("PINK_URL"), 2)]);
        assert_eq!((whole.process.sessions, whole.gauges.clients), (30, 4));
        let urls: Vec<Option<Arc<str>>> = overview
            .not_ready(now)
            .into_iter()
            .map(|reason| if let NotReady::Pool { url, .. } = reason { url } else { None })
            .collect();
        assert_eq!(urls, [Some("DATABASE_URL".into()), Some("PINK_URL".into())]);
        let text = Exposition::new(overview).text();
        for (url, leases) in [("DATABASE_URL", 1), ("PINK_URL", 2)] {
            let line =
                text.lines().find(|line| line.starts_with("pgweir_leases_total{") && line.contains(url)).unwrap();
            assert!(line.ends_with(&format!(" {leases}")), "{line}");
        }
    }

    #[test]
    fn one_plane_alone_is_shown_as_it_is() {
        let shared = plane(1, 10);
        let overview = Overview::of(Arc::clone(&shared));
        let (whole, own) = (overview.snapshot().unwrap(), shared.snapshot().unwrap());
        assert!(Arc::ptr_eq(&whole, &own) && whole.pools[0].url.is_none());
    }

    #[test]
    fn what_was_counted_before_a_plane_was_replaced_stays_counted() {
        let overview = Arc::new(Overview::new(&["A".into(), "B".into()]));
        overview.show(0, plane(5, 10));
        overview.show(1, plane(7, 20));
        let metrics = Exposition::new(Arc::clone(&overview));
        let sum = |text: &str| values(text, "pgweir_leases_total{").iter().sum::<u64>();
        assert_eq!(sum(&metrics.text()), 12);
        overview.lose(1);
        let now = Instant::now();
        assert!(!overview.is_healthy(now));
        assert!(overview.not_ready(now).contains(&NotReady::Stalled { for_s: Some(0) }));
        let text = metrics.text();
        assert_eq!((sum(&text), values(&text, "pgweir_process_clients ")), (12, vec![2]));
        assert_eq!(values(&text, "pgweir_sessions_total "), [30]);
        overview.show(1, plane(1, 3));
        let text = metrics.text();
        assert_eq!((sum(&text), values(&text, "pgweir_sessions_total ")), (13, vec![33]));
        assert!(overview.is_healthy(Instant::now()));
    }

    #[tokio::test]
    async fn who_holds_what_is_asked_of_all_and_one_that_is_silent_keeps_nobody() {
        let overview = Overview::new(&["A".into(), "B".into()]);
        let (one, two) = (plane(0, 0), plane(0, 0));
        overview.show(0, Arc::clone(&one));
        overview.show(1, two);
        let answer = async || {
            while !one.is_blame_asked() {
                tokio::task::yield_now().await;
            }
            one.tell_blame(Told::new(Instant::now(), Blame { unasked: 3, ..Blame::default() }));
        };
        let told = |told: Option<Told>| told.map(|told| (told.blame.unasked, told.silent));
        let want = || Some((3, vec!["B".into()]));
        let (answered, ()) = tokio::join!(overview.blame(Duration::from_millis(200)), answer());
        assert_eq!(told(answered), want());
        // One that is known to be lost is waited for no more.
        overview.lose(1);
        let (answered, ()) = tokio::join!(overview.blame(Duration::from_hours(1)), answer());
        assert_eq!(told(answered), want());
        assert!(overview.blame(Duration::from_millis(1)).await.is_none());
    }
}

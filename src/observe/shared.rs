//! What the worker and its observers share.

use crate::cancel::Blame;
use crate::stats::{PoolHealth, PoolLimits, PoolName, PoolSnapshot, Role, Sharing, Snapshot};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// A worker that published nothing for this long is stalled; it ticks every second.
pub const STALLED_AFTER: Duration = Duration::from_secs(5);

/// Who asked for the limits is taken to want to know them for so long.
const ASKED_FOR: Duration = Duration::from_millis(1500);

/// Who holds the server connections, as it was told.
#[derive(Debug)]
pub struct Told {
    /// When.
    pub at: Instant,
    /// What.
    pub blame: Blame,
    /// The variables of the data planes that did not answer.
    pub silent: Vec<Arc<str>>,
}

impl Told {
    /// What a worker tells of itself.
    #[must_use]
    pub const fn new(at: Instant, blame: Blame) -> Self {
        Self { at, blame, silent: Vec::new() }
    }
}

/// How far the process has come.
///
/// ```text
/// Starting ──▶ Listening ──▶ Draining
///     └─────────────────────────▲
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The listener is not up yet.
    Starting,
    /// Clients are served.
    Listening,
    /// No new clients; the sessions that are left come to their end.
    Draining,
}

/// Why clients should not be sent here now; the reasons of `/readyz`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// The listener is not up yet.
    Starting,
    /// The process is stopping.
    Draining,
    /// The worker has not published for [`STALLED_AFTER`].
    Stalled {
        /// Seconds since it last did; `None` if it never did.
        for_s: Option<u64>,
    },
    /// A pool's clients cannot be served.
    Pool {
        /// Which pool.
        name: PoolName,
        /// The variable of its URL, where those of several are served side by side.
        url: Option<Arc<str>>,
        /// What is wrong with it.
        health: PoolHealth,
    },
}

/// The worker writes it once per tick, the HTTP server reads it per request.
///
/// The lock is held for the copy of one pointer, on both sides.
pub struct Shared {
    /// What ticks are measured from.
    start: Instant,
    stage: AtomicU8,
    /// Milliseconds from `start` to the last tick, plus one; 0 before the first.
    last_tick: AtomicU64,
    /// Ticks that the worker has heeded.
    beats: AtomicU64,
    snapshot: Mutex<Option<Arc<Snapshot>>>,
    /// Milliseconds from `start` to when the limits were asked for last, plus one; 0 before the first time.
    limits_asked: AtomicU64,
    blame_asked: AtomicBool,
    told: watch::Sender<Option<Arc<Told>>>,
}

impl Shared {
    /// Of a process that starts at `now`: starting, with nothing published.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            start: now,
            stage: AtomicU8::new(Stage::Starting as u8),
            last_tick: AtomicU64::new(0),
            beats: AtomicU64::new(0),
            snapshot: Mutex::new(None),
            limits_asked: AtomicU64::new(0),
            blame_asked: AtomicBool::new(false),
            told: watch::Sender::new(None),
        }
    }

    /// Goes on to `stage`; a process does not go back, so an earlier stage is ignored.
    pub fn enter(&self, stage: Stage) {
        self.stage.fetch_max(stage as u8, Ordering::AcqRel);
    }

    /// How far the process has come.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Starting,
            1 => Stage::Listening,
            // Only `enter` writes, so this is 2.
            _ => Stage::Draining,
        }
    }

    /// Replaces the snapshot and counts as a tick at `now`. Called by the worker, once per tick and on
    /// demand.
    pub fn publish(&self, snapshot: Arc<Snapshot>, now: Instant) {
        let old = self.lock().replace(snapshot);
        // The larger wins: a tick that is late to write must not turn time back.
        self.last_tick.fetch_max(self.stamp(now), Ordering::AcqRel);
        // May be the last copy; freed here, with the lock open.
        drop(old);
    }

    /// The worker has heeded a tick.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// How many it has heeded.
    #[must_use]
    pub fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// The latest snapshot; `None` before the first tick.
    #[must_use]
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.lock().clone()
    }

    /// How long ago the worker last published; `None` if it never did.
    #[must_use]
    pub fn since_tick(&self, now: Instant) -> Option<Duration> {
        self.since(&self.last_tick, now)
    }

    /// Milliseconds from the start, plus one.
    fn stamp(&self, now: Instant) -> u64 {
        let since_start = now.saturating_duration_since(self.start).as_millis();
        u64::try_from(since_start).unwrap_or(u64::MAX).saturating_add(1)
    }

    fn since(&self, stamp: &AtomicU64, now: Instant) -> Option<Duration> {
        let stamp = stamp.load(Ordering::Acquire).checked_sub(1)?;
        let now = now.saturating_duration_since(self.start);
        Some(now.saturating_sub(Duration::from_millis(stamp)))
    }

    // ---- what is only found out when somebody asks ----

    /// Somebody wants to know how the limits stand.
    pub fn ask_limits(&self, now: Instant) {
        self.limits_asked.fetch_max(self.stamp(now), Ordering::AcqRel);
    }

    /// Whether somebody does.
    #[must_use]
    pub fn are_limits_asked(&self, now: Instant) -> bool {
        self.since(&self.limits_asked, now).is_some_and(|since| since < ASKED_FOR)
    }

    /// Whether the worker is about to find out, for the first time, how the limits of some server stand.
    #[must_use]
    pub fn is_census_coming(&self) -> bool {
        let snapshot = self.snapshot();
        let pools = snapshot.iter().flat_map(|snapshot| &snapshot.pools);
        let is_known =
            |limits: &PoolLimits| limits.standing.is_some() || limits.is_untold || limits.sharing == Sharing::Blind;
        let mut unknown = pools.filter(|pool| !is_known(&pool.limits));
        self.stage() != Stage::Draining && unknown.any(|pool| pool.gauges.servers_idle > 0)
    }

    /// Asks who holds the server connections. The answer is the next change of what is returned.
    #[must_use]
    pub fn ask_blame(&self) -> watch::Receiver<Option<Arc<Told>>> {
        let receiver = self.told.subscribe();
        self.blame_asked.store(true, Ordering::Release);
        receiver
    }

    /// Whether somebody asked since the last call.
    #[must_use]
    pub fn is_blame_asked(&self) -> bool {
        // Written only if it is set: this is asked ten times a second.
        self.blame_asked.load(Ordering::Acquire) && self.blame_asked.swap(false, Ordering::AcqRel)
    }

    /// Answers all who asked.
    pub fn tell_blame(&self, told: Told) {
        self.told.send_replace(Some(Arc::new(told)));
    }

    /// Whether the worker ticks: it published less than [`STALLED_AFTER`] ago.
    #[must_use]
    pub fn is_healthy(&self, now: Instant) -> bool {
        self.since_tick(now).is_some_and(|since| since < STALLED_AFTER)
    }

    /// Everything that speaks against sending clients here; ready if empty.
    #[must_use]
    pub fn not_ready(&self, now: Instant) -> Vec<NotReady> {
        let mut reasons = Vec::new();
        match self.stage() {
            Stage::Starting => reasons.push(NotReady::Starting),
            Stage::Listening => {}
            Stage::Draining => reasons.push(NotReady::Draining),
        }
        if !self.is_healthy(now) {
            let for_s = self.since_tick(now).map(|since| since.as_secs());
            reasons.push(NotReady::Stalled { for_s });
        }
        if let Some(snapshot) = self.snapshot() {
            // Without followers the primary serves what they would have.
            let serves = |pool: &PoolSnapshot| pool.health.serves() || pool.name.role == Role::Follower;
            let failed = snapshot.pools.iter().filter(|pool| !serves(pool));
            let reason = failed.map(|pool| NotReady::Pool {
                name: pool.name.clone(),
                url: pool.url.clone(),
                health: pool.health,
            });
            reasons.extend(reason);
        }
        reasons
    }

    /// A poisoned lock still holds a whole pointer.
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Snapshot>>> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{PoolGauges, PoolStats, Sqlstate};

    fn snapshot(health: &[PoolHealth]) -> Arc<Snapshot> {
        let pool = |(number, &health): (usize, &PoolHealth)| PoolSnapshot {
            limits: PoolLimits::default(),
            name: PoolName::primary("app", &format!("user{number}")),
            url: None,
            health,
            stats: PoolStats::default(),
            gauges: PoolGauges::default(),
        };
        let pools = health.iter().enumerate().map(pool).collect();
        Arc::new(Snapshot { pools, ..Snapshot::empty(Instant::now()) })
    }

    #[test]
    fn a_worker_is_healthy_until_five_seconds_after_its_last_tick() {
        let start = Instant::now();
        let shared = Shared::new(start);
        assert!(!shared.is_healthy(start), "it has never ticked");
        shared.publish(snapshot(&[]), start + Duration::from_secs(10));
        #[rustfmt::skip]
        let table = [
            ("at the tick",     10_000, true),
            ("just before",     14_999, true),
            ("at the limit",    15_000, false),
            ("a reader whose clock was read before the tick", 9_000, true),
        ];
        for (name, at_ms, want) in table {
            assert_eq!(shared.is_healthy(start + Duration::from_millis(at_ms)), want, "{name}");
        }
    }

    #[test]
    fn a_follower_that_is_down_is_no_reason_to_send_clients_elsewhere() {
        let start = Instant::now();
        let shared = Shared::new(start);
        shared.enter(Stage::Listening);
        let mut down = (*snapshot(&[PoolHealth::Unreachable])).clone();
        for (role, want) in [(Role::Primary, 1), (Role::Follower, 0)] {
            down.pools.iter_mut().for_each(|pool| pool.name.role = role);
            shared.publish(Arc::new(down.clone()), start);
            assert_eq!(shared.not_ready(start).len(), want, "{role}");
        }
    }

    #[test]
    fn a_tick_at_the_very_start_counts() {
        let start = Instant::now();
        let shared = Shared::new(start);
        shared.publish(snapshot(&[]), start);
        assert_eq!(shared.since_tick(start), Some(Duration::ZERO));
    }

    #[test]
    fn questions_are_heard_once_and_for_a_while() {
        let start = Instant::now();
        let shared = Shared::new(start);
        assert!(!shared.is_blame_asked() && !shared.are_limits_asked(start));
        let (mut one, mut two) = (shared.ask_blame(), shared.ask_blame());
        assert!(shared.is_blame_asked() && !shared.is_blame_asked(), "one answer is for both");
        shared.tell_blame(Told::new(start, Blame { unasked: 3, ..Blame::default() }));
        for receiver in [&mut one, &mut two] {
            assert!(receiver.has_changed().unwrap());
            assert_eq!(receiver.borrow_and_update().as_ref().map(|told| told.blame.unasked), Some(3));
        }
        assert!(!shared.ask_blame().has_changed().unwrap(), "what was told before is no answer");
        shared.ask_limits(start + Duration::from_secs(10));
        assert!(shared.are_limits_asked(start + Duration::from_secs(11)));
        assert!(!shared.are_limits_asked(start + Duration::from_secs(12)));
    }

    #[test]
    fn a_process_never_goes_back_to_an_earlier_stage() {
        let shared = Shared::new(Instant::now());
        assert_eq!(shared.stage(), Stage::Starting);
        for (enter, want) in [
            (Stage::Listening, Stage::Listening),
            (Stage::Draining, Stage::Draining),
            (Stage::Listening, Stage::Draining),
        ] {
            shared.enter(enter);
            assert_eq!(shared.stage(), want);
        }
    }

    #[test]
    fn readiness_names_every_reason() {
        let now = Instant::now();
        let refused = PoolHealth::WrongCredentials(Sqlstate::new(b"28P01").expect("a SQLSTATE"));
        let of_user = |user: &str, health| NotReady::Pool { name: PoolName::primary("app", user), url: None, health };
        #[rustfmt::skip]
        let table: [(&str, Stage, &[PoolHealth], Vec<NotReady>); 5] = [
            ("starting",  Stage::Starting,  &[],                                        vec![NotReady::Starting]),
            ("no pools",  Stage::Listening, &[],                                        vec![]),
            ("all well",  Stage::Listening, &[PoolHealth::Untried, PoolHealth::Usable], vec![]),
            ("draining",  Stage::Draining,  &[PoolHealth::Usable],                      vec![NotReady::Draining]),
            ("two pools", Stage::Listening, &[refused, PoolHealth::Usable, PoolHealth::Unreachable],
                vec![of_user("user0", refused), of_user("user2", PoolHealth::Unreachable)]),
        ];
        for (name, stage, health, want) in table {
            let shared = Shared::new(now);
            shared.enter(stage);
            shared.publish(snapshot(health), now);
            assert_eq!(shared.not_ready(now), want, "{name}");
        }
    }

    #[test]
    fn a_stalled_worker_is_not_ready_and_says_for_how_long() {
        let now = Instant::now();
        let shared = Shared::new(now);
        shared.enter(Stage::Listening);
        assert_eq!(shared.not_ready(now), [NotReady::Stalled { for_s: None }]);
        shared.publish(snapshot(&[]), now);
        let later = now + Duration::from_secs(7);
        assert_eq!(shared.not_ready(later), [NotReady::Stalled { for_s: Some(7) }]);
    }
}

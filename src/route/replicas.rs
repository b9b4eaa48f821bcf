//! The followers of one pool's primary: which of them may serve a read now, and the questions by which that is known.
//!
//! [`replica`](crate::replica) decides; this asks, as any client of the pools would, on their connections. It asks because
//! somebody wanted to know: a read that no follower could be shown to be fresh enough for, or one while the last look is a
//! while ago. One look is on its way at a time: at the primary, then at the followers, and once more at the primary if one of
//! them is past where the primary was.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::join_all;
use pgweir_config::{Followers, ReadFreshness, ReadRouting};
use rand::RngExt;

use crate::backend::{ServerConn, SettleError, row_columns};
use crate::clock::Moment;
use crate::pool::{Pool, micros};
use crate::replica::watermark::Watermark;
use crate::replica::{FollowerSample, Group, Incarnation, Missing, Need, Next, Policy, Position, PrimarySample, Seat};
use crate::stats::{DiscardReason, FollowerState, Reason as _, RouteReason};

/// The longest wait for a connection, and then for an answer.
const LIMIT: Duration = Duration::from_secs(1);

/// The most that an answer may be; bytes.
const ANSWER_MAX: usize = 64 * 1024;

/// After so long without a look the next read causes one, whatever it needs; microseconds.
const LOOK_EVERY: u64 = 1_000_000;

/// The same for clients that are served by followers alone, when they log in: they keep what they get.
const LOOK_FOR_LOGINS: u64 = 250_000;

/// The longest wait of a read for the look that it needs; microseconds.
const READ_WAIT: u64 = 200_000;

/// The longest wait of a client that logs in until it is known which followers there are; microseconds.
const LOGIN_WAIT: u64 = 3_000_000;

/// The pause after a primary did not answer; doubled with each time. Microseconds.
const FIRST_PAUSE: u64 = 100_000;

/// So often it is doubled, at most: to 1.6 s, well below the time for which what was heard of it is trusted.
const DOUBLED_MAX: u32 = 4;

/// What a text means depends on these, and no file of settings need be the same on two servers.
macro_rules! settings {
    () => {
        "pg_catalog.concat_ws('|', pg_catalog.current_setting('search_path'), pg_catalog.current_setting('TimeZone'), \
        pg_catalog.current_setting('DateStyle'), pg_catalog.current_setting('IntervalStyle'), \
        pg_catalog.current_setting('bytea_output'), pg_catalog.current_setting('extra_float_digits'), \
        pg_catalog.current_setting('standard_conforming_strings'), pg_catalog.current_setting('lc_monetary'), \
        pg_catalog.current_setting('lc_numeric'), pg_catalog.current_setting('lc_time'), \
        pg_catalog.current_setting('default_text_search_config'), pg_catalog.current_setting('row_security'), \
        pg_catalog.current_setting('transform_null_equals'), pg_catalog.current_setting('array_nulls'), \
        pg_catalog.current_setting('xmlbinary'), pg_catalog.current_setting('xmloption'))"
    };
}

/// Whether it is in recovery, where the next record will be, and the first digits of the file that is for it: the timeline.
///
/// Source: the Postgres manual, "System Administration Functions"; the names of the files: "WAL Internals".
pub const OF_PRIMARY: &str = concat!(
    "SELECT pg_catalog.pg_is_in_recovery(), \
    CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_current_wal_insert_lsn() END, \
    CASE WHEN NOT pg_catalog.pg_is_in_recovery() \
    THEN pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8) END, ",
    settings!()
);

/// Whether it is in recovery, what it has replayed, and the latest timeline that its control file knows of, which is behind
/// by a restartpoint at most.
pub const OF_FOLLOWER: &str = concat!(
    "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.pg_last_wal_replay_lsn(), \
    GREATEST((SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()), \
    (SELECT min_recovery_end_timeline FROM pg_catalog.pg_control_recovery())), ",
    settings!()
);

/// Where a read is to go.
#[derive(Clone, Debug)]
pub enum Choice {
    /// To this follower's pool; the seat is for [`Replicas::vouches`].
    Follower(Rc<Pool>, Seat),
    /// To the primary, and why.
    Primary(RouteReason),
}

/// What reads have to see, and how often it may be looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freshness {
    level: ReadFreshness,
    max_staleness_us: u64,
    sample_interval_us: u64,
    policy: Policy,
}

impl Freshness {
    /// That of a database.
    #[must_use]
    pub fn new(settings: &Followers, database: &pgweir_config::Database) -> Self {
        let bytes = u64::try_from(settings.follower_max_lag_bytes).unwrap_or(u64::MAX);
        Self {
            level: database.read_freshness.unwrap_or(settings.read_freshness),
            max_staleness_us: micros(database.read_max_staleness.unwrap_or(settings.read_max_staleness)),
            sample_interval_us: micros(settings.read_sample_interval),
            policy: Policy {
                max_lag_us: Some(micros(settings.follower_max_lag)).filter(|lag| *lag > 0),
                max_lag_bytes: Some(bytes).filter(|lag| *lag > 0),
            },
        }
    }

    /// The time after which the next read causes a look.
    fn look_every(&self) -> u64 {
        let every = if self.level == ReadFreshness::Bounded { self.max_staleness_us / 2 } else { LOOK_EVERY };
        every.min(LOOK_EVERY).max(self.sample_interval_us)
    }
}

/// A follower's pool, and what was last said of it.
#[derive(Debug)]
struct Member {
    pool: Rc<Pool>,
    is_asked: Cell<bool>,
    said: Cell<FollowerState>,
}

/// The followers of one pool's primary.
#[derive(Debug)]
pub struct Replicas {
    this: Weak<Self>,
    routing: ReadRouting,
    freshness: Freshness,
    home: Rc<Pool>,
    members: Vec<Member>,
    group: RefCell<Group>,
    /// When the last transaction was acknowledged that may have written, whose ever it was.
    written: Cell<Option<Moment>>,
    /// How the primary understands a text.
    settings: RefCell<Box<str>>,
    /// When the last look was begun.
    begun: Cell<Option<Moment>>,
    /// When the last look was begun that has ended.
    ended: Cell<Option<Moment>>,
    is_looking: Cell<bool>,
    /// Times in a row that the primary did not answer.
    failures: Cell<u32>,
    not_before: Cell<Moment>,
    /// Whoever waits for the next look.
    waiters: RefCell<Vec<Waker>>,
}

impl Replicas {
    /// Followers, each with its weight, of which nothing is known yet.
    #[must_use]
    pub fn new(
        routing: ReadRouting,
        freshness: Freshness,
        home: Rc<Pool>,
        followers: Vec<(Rc<Pool>, u32)>,
    ) -> Rc<Self> {
        let group = Group::new(followers.iter().map(|(_, weight)| *weight), freshness.policy);
        let member = |(pool, _)| Member { pool, is_asked: Cell::new(false), said: Cell::new(FollowerState::Unknown) };
        let members = followers.into_iter().map(member).collect();
        Rc::new_cyclic(|this| Self {
            this: this.clone(),
            routing,
            freshness,
            home,
            members,
            group: RefCell::new(group),
            written: Cell::default(),
            settings: RefCell::default(),
            begun: Cell::default(),
            ended: Cell::default(),
            is_looking: Cell::default(),
            failures: Cell::default(),
            not_before: Cell::default(),
            waiters: RefCell::default(),
        })
    }

    /// What is routed.
    #[must_use]
    pub const fn routing(&self) -> ReadRouting {
        self.routing
    }

    /// The followers' pools.
    pub fn followers(&self) -> impl Iterator<Item = &Rc<Pool>> {
        self.members.iter().map(|member| &member.pool)
    }

    /// Whether a follower has a client, or a server connection.
    #[must_use]
    pub fn is_used(&self) -> bool {
        // Who is served by followers alone holds nothing but the pool of one.
        self.followers().any(|pool| Rc::strong_count(pool) > 1 || pool.open() > 0)
    }

    /// Which follower may serve a read of a session whose last acknowledged transaction that may have written was at
    /// `stamp`; none if it had none. With `read_freshness` `fleet` none may before a look: see [`Self::poll_choose`].
    #[must_use]
    pub fn choose(&self, stamp: Option<Moment>) -> Choice {
        let now = self.home.clock().moment();
        self.decide(now, self.need(stamp, now), None)
    }

    /// The same for a read that came at `arrived`, has to see all before the `watermark`, too, and may wait for the look that it
    /// needs: for 200 ms, and a tick. Whoever polls is woken.
    pub fn poll_choose(
        &self,
        stamp: Option<Moment>,
        watermark: Option<Watermark>,
        arrived: Moment,
        cx: &Context<'_>,
    ) -> Poll<Choice> {
        let now = self.home.clock().moment();
        let choice = self.decide(now, self.need(stamp, arrived), watermark);
        let waits =
            matches!(choice, Choice::Primary(RouteReason::Stale)) && self.freshness.level == ReadFreshness::Fleet;
        if waits && now.since(arrived) < READ_WAIT && self.is_looking.get() {
            self.waiters.borrow_mut().push(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(choice)
    }

    fn need(&self, stamp: Option<Moment>, arrived: Moment) -> Need {
        match self.freshness.level {
            ReadFreshness::Session => Need::After(stamp),
            ReadFreshness::Pool => Need::After(stamp.max(self.written.get())),
            ReadFreshness::Bounded => Need::Within(self.freshness.max_staleness_us),
            ReadFreshness::Fleet => Need::After(stamp.max(Some(arrived))),
            ReadFreshness::Eventual => Need::Nothing,
        }
    }

    /// Takes out those whose servers let nobody in.
    fn take_out(&self) {
        for (at, Member { pool, .. }) in self.members.iter().enumerate() {
            if !pool.health().serves() && pool.open() == 0 && !self.group.borrow().is_out(at) {
                self.fail(at);
            }
        }
    }

    fn decide(&self, now: Moment, need: Need, watermark: Option<Watermark>) -> Choice {
        self.take_out();
        let load = |at: usize| self.members.get(at).map_or(0, |member| member.pool.load());
        let chosen = self.group.borrow_mut().choose(now, need, watermark, load);
        let chosen = chosen.map(|(at, seat)| (self.members.get(at), seat));
        match chosen {
            Ok((Some(member), seat)) => {
                if self.begun.get().is_none_or(|begun| now.since(begun) >= self.freshness.look_every()) {
                    self.look(now);
                }
                Choice::Follower(member.pool.clone(), seat)
            }
            Ok((None, _)) => Choice::Primary(RouteReason::NoFollower),
            Err(missing) => {
                self.look(now);
                Choice::Primary(match missing {
                    Missing::Usable => RouteReason::NoFollower,
                    Missing::Fresh => RouteReason::Stale,
                })
            }
        }
    }

    /// A transaction on the primary that may have written is acknowledged; it ran on `conn`.
    pub fn stamp(&self, now: Moment, conn: &ServerConn) {
        self.written.set(Some(now));
        self.group.borrow_mut().wrote_on(&conn.incarnation);
    }

    /// One that may have written is over, wherever it ran.
    pub fn stamp_moment(&self, now: Moment) {
        self.written.set(Some(now));
    }

    /// Whether `conn` leads to the very server whose position `choose` relied on.
    #[must_use]
    pub fn vouches(&self, conn: &ServerConn, seat: Seat) -> bool {
        self.group.borrow().vouches(seat, &conn.incarnation)
    }

    /// A read failed on this follower for a reason of its own.
    pub fn failed(&self, pool: &Rc<Pool>) {
        let at = self.members.iter().position(|member| Rc::ptr_eq(&member.pool, pool));
        if let Some(at) = at {
            self.fail(at);
        }
    }

    /// The follower for a client that is served by followers alone: the one with the fewest clients for its weight. Waits until
    /// it is known which there are.
    pub async fn admit(&self) -> Option<Rc<Pool>> {
        let clock = self.home.clock().clone();
        let arrived = clock.moment();
        poll_fn(|cx| {
            let now = clock.moment();
            self.take_out();
            let load = |at: usize| self.members.get(at).map_or(0, |member| member.pool.clients.get());
            let chosen = self.group.borrow_mut().choose(now, Need::Nothing, None, load);
            if let Some(member) = chosen.ok().and_then(|(at, _)| self.members.get(at)) {
                if self.begun.get().is_none_or(|begun| now.since(begun) >= LOOK_FOR_LOGINS) {
                    self.look(now);
                }
                return Poll::Ready(Some(member.pool.clone()));
            }
            let is_known = self.ended.get().is_some_and(|ended| ended >= arrived);
            self.look(now);
            if is_known || now.since(arrived) >= LOGIN_WAIT || self.home.is_draining() {
                return Poll::Ready(None);
            }
            self.waiters.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// A tenth of a second has passed.
    pub fn tick(&self) {
        let now = self.home.clock().moment();
        for (at, member) in self.members.iter().enumerate() {
            member.pool.follower.set(Some(self.group.borrow().gauges(at, now)));
        }
        self.wake();
    }

    fn wake(&self) {
        for waker in self.waiters.take() {
            waker.wake();
        }
    }

    /// Looks, unless somebody does, or it is too early.
    fn look(&self, now: Moment) {
        // Reads that wait follow each other as fast as the servers answer.
        let pause = if self.freshness.level == ReadFreshness::Fleet { 0 } else { self.freshness.sample_interval_us };
        let is_early = self.begun.get().is_some_and(|begun| now.since(begun) < pause) || self.not_before.get() > now;
        if is_early || self.is_looking.get() || self.home.is_draining() {
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        self.is_looking.set(true);
        tokio::task::spawn_local(async move {
            let begun = this.now();
            this.begun.set(Some(begun));
            this.look_around().await;
            this.is_looking.set(false);
            this.ended.set(Some(begun));
            this.wake();
        });
    }

    /// The time, read now.
    fn now(&self) -> Moment {
        self.home.clock().refresh();
        self.home.clock().moment()
    }

    async fn look_around(self: &Rc<Self>) {
        self.ask_primary().await;
        let now = self.now();
        let due = |(at, member): &(usize, &Member)| !member.is_asked.get() && self.group.borrow().is_due(*at, now);
        let due: Vec<usize> = self.members.iter().enumerate().filter(due).map(|(at, _)| at).collect();
        let (out, present): (Vec<usize>, Vec<usize>) = due.into_iter().partition(|at| self.group.borrow().is_out(*at));
        for at in out {
            // Nobody waits for one that may not answer.
            let this = self.clone();
            tokio::task::spawn_local(async move {
                let ahead = this.ask_follower(at).await;
                this.settle(ahead.into_iter()).await;
            });
        }
        let ahead = join_all(present.into_iter().map(|at| self.ask_follower(at))).await;
        self.settle(ahead.into_iter().flatten()).await;
    }

    /// Compares those that are past where the primary was with where it is now.
    async fn settle(&self, ahead: impl Iterator<Item = (usize, FollowerSample)>) {
        let mut ahead = ahead.peekable();
        if ahead.peek().is_none() {
            return;
        }
        let is_told = self.ask_primary().await;
        for (at, sample) in ahead {
            let mut group = self.group.borrow_mut();
            if !is_told || group.follower(at, &sample) == Next::AskPrimary {
                group.unconfirmed(at, &sample);
            }
            drop(group);
            self.say(at);
        }
    }

    /// False if it did not tell where it is.
    async fn ask_primary(&self) -> bool {
        let told = match lease(&self.home).await {
            Some(conn) => self.question_primary(conn).await,
            None if is_busy(&self.home) => return false,
            None => false,
        };
        if told {
            self.failures.set(0);
        } else {
            let doubled = self.failures.get().min(DOUBLED_MAX);
            self.failures.set(doubled + 1);
            let pause = (FIRST_PAUSE << doubled) * rand::rng().random_range(50..=100) / 100;
            self.not_before.set(self.now().after(pause));
        }
        told
    }

    async fn question_primary(&self, mut conn: Box<ServerConn>) -> bool {
        let life = conn.incarnation.clone();
        let sent = self.now();
        let mut told = None;
        let answered = ask(&self.home, &mut conn, OF_PRIMARY, |columns| {
            let [in_recovery, at, timeline, settings] = columns;
            let timeline = timeline.and_then(|digits| u32::from_str_radix(digits, 16).ok());
            told = Some((in_recovery == Some("t"), at.and_then(position), timeline));
            *self.settings.borrow_mut() = settings.unwrap_or_default().into();
        });
        let answered = answered.await;
        self.now();
        match (answered, told) {
            (Ok(true), Some((false, Some(position), Some(timeline)))) => {
                let sample = PrimarySample { sent, life: life.clone(), timeline, position };
                if self.group.borrow_mut().primary(&sample) {
                    self.home.release(conn);
                    return true;
                }
            }
            (Ok(true), Some((true, ..))) => {
                self.group.borrow_mut().forget();
                if self.failures.get() > 0 {
                    // It was one when it was last asked, and may be the only one that there is.
                    self.home.release(conn);
                    return false;
                }
                tracing::warn!(
                    pool = %self.home.name.database, user = %self.home.name.user,
                    "what should be the primary is in recovery: nothing is known of its followers"
                );
            }
            (Ok(_), _) => {
                self.home.release(conn);
                return false;
            }
            (Err(SettleError), _) => {
                self.home.discard_lent(conn, DiscardReason::Lost);
                return false;
            }
        }
        // Behind the same name there may be another by now, for whoever connects anew.
        self.home.discard_lent(conn, DiscardReason::Lost);
        self.home.evict(|other| *other == *life);
        false
    }

    /// What it told, if the primary has to be asked before it says anything.
    async fn ask_follower(&self, at: usize) -> Option<(usize, FollowerSample)> {
        let member = self.members.get(at)?;
        member.is_asked.set(true);
        let leased = lease(&member.pool).await;
        let may_be_well = leased.is_none() && is_busy(&member.pool);
        let sample = match leased {
            Some(conn) => question_follower(&member.pool, conn, &self.settings).await,
            None => None,
        };
        self.now();
        member.is_asked.set(false);
        let Some(sample) = sample else {
            if !may_be_well {
                self.fail(at);
            }
            return None;
        };
        let next = self.group.borrow_mut().follower(at, &sample);
        self.say(at);
        self.wake();
        (next == Next::AskPrimary).then_some((at, sample))
    }

    fn fail(&self, at: usize) {
        self.group.borrow_mut().failed(at, self.home.clock().moment(), rand::rng().random());
        self.say(at);
    }

    /// Logs what has become of it.
    fn say(&self, at: usize) {
        let now = self.home.clock().moment();
        let gauges = self.group.borrow().gauges(at, now);
        let Some(member) = self.members.get(at) else { return };
        member.pool.follower.set(Some(gauges));
        let before = member.said.replace(gauges.state);
        if before == gauges.state {
            return;
        }
        let name = &member.pool.name;
        let (state, before) = (gauges.state.as_str(), before.as_str());
        match gauges.state {
            FollowerState::OtherSystem
            | FollowerState::OtherHistory
            | FollowerState::OtherSettings
            | FollowerState::Primary
            | FollowerState::Twin => {
                tracing::warn!(
                    pool = %name.database, user = %name.user, follower = %name.server, state, before,
                    "what should be a follower cannot be used as one"
                );
            }
            _ => tracing::info!(
                pool = %name.database, user = %name.user, follower = %name.server, state, before,
                lag_ms = gauges.lag_us.map(|lag| lag / 1000), "a follower's state changed"
            ),
        }
    }
}

async fn question_follower(
    pool: &Rc<Pool>,
    mut conn: Box<ServerConn>,
    of_primary: &RefCell<Box<str>>,
) -> Option<FollowerSample> {
    let life: Rc<Incarnation> = conn.incarnation.clone();
    let mut told = None;
    let answered = ask(pool, &mut conn, OF_FOLLOWER, |columns| {
        let [in_recovery, at, timeline, settings] = columns;
        let timeline = timeline.and_then(|digits| digits.parse().ok());
        let agrees = settings.unwrap_or_default() == &**of_primary.borrow();
        told = Some((in_recovery == Some("t"), at.and_then(position), timeline, agrees));
    });
    let answered = answered.await;
    pool.clock().refresh();
    let Ok(is_well) = answered else {
        pool.discard_lent(conn, DiscardReason::Lost);
        return None;
    };
    let heard = pool.clock().moment();
    let sample = told.filter(|_| is_well).map(|(in_recovery, position, timeline, agrees)| FollowerSample {
        agrees,
        heard,
        life: life.clone(),
        in_recovery,
        timeline,
        position,
    });
    if sample.as_ref().is_none_or(|sample| sample.in_recovery) {
        pool.release(conn);
    } else {
        // It follows nobody any more: a follower may be behind the name by now.
        pool.discard_lent(conn, DiscardReason::Lost);
        pool.evict(|other| *other == *life);
    }
    sample
}

fn position(text: &str) -> Option<Position> {
    Position::parse(text.as_bytes())
}

/// Whether there is none in time because clients have all there are, which says nothing of the server.
fn is_busy(pool: &Pool) -> bool {
    pool.health().serves() && pool.open() > 0
}

/// A server connection of the pool, before all who wait for one; none if there is none in time.
async fn lease(pool: &Rc<Pool>) -> Option<Box<ServerConn>> {
    let plain = pool.profiles.plain();
    if let Some(conn) = poll_fn(|cx| Poll::Ready(pool.try_lease(&plain, cx))).await {
        return Some(conn);
    }
    let mut ticket = None;
    let granted = poll_fn(|cx| ticket.get_or_insert_with(|| pool.wait_first(cx)).poll(cx));
    pool.clock().limit(LIMIT, granted).await.ok()?.ok()
}

/// Asks a question of four columns. False if the server would not tell.
async fn ask(
    pool: &Rc<Pool>,
    conn: &mut ServerConn,
    text: &str,
    mut row: impl FnMut([Option<&str>; 4]),
) -> Result<bool, SettleError> {
    let plain = pool.profiles.plain();
    let outcome = pool.clock().limit(LIMIT, async {
        conn.apply(&plain).await?.map_err(|_| SettleError)?;
        conn.gather(text, ANSWER_MAX, |body| {
            let mut columns = row_columns(body);
            let mut next = || columns.next().flatten().and_then(|value| std::str::from_utf8(value).ok());
            row([next(), next(), next(), next()]);
        })
        .await
    });
    outcome.await.unwrap_or(Err(SettleError))
}

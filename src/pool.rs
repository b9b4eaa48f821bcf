//! The server connections of one (database, user): idle ones on a stack, waiters in a queue, new ones
//! dialled when both say so.

mod dial;
mod fleet;
mod knowledge;
mod leaving;
mod limits;
mod listener;
mod own;
mod sequences;
mod watch;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use pgweir_config::{PoolMode, SequenceValues};
use slab::Slab;

use crate::backend::{Count, Credential, Parameters, Roster, ServerConn, Standby, Target};
use crate::clock::Clock;
use crate::mutant::{Guard, lacks};
use crate::replica::Incarnation;
use crate::settings::{Profile, Profiles};
use crate::stats::{DiscardReason, FollowerGauges, PoolGauges, PoolHealth, PoolName, PoolStats, Reason as _, Role};

use dial::Backoff;
use fleet::Fleet;
pub use fleet::{FleetPolicy, fleet_name};
pub use knowledge::{Definitions, Knowledge};
use leaving::Course;
pub use limits::{Limits, SharedLimit, TimeLimits};
pub use listener::{Life, Listener};
use own::Turned;
pub use own::{Own, PinnedPlace};
pub use sequences::{Sequences, Taken};
use watch::Watch;

/// What the newest server connection of a pool told at its login, and every client is told at its own.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Learned {
    /// `ParameterStatus`es.
    pub parameters: Parameters,
    /// Bodies of its notices.
    pub notices: Vec<Box<[u8]>>,
}

/// Why a wait ended without a server connection.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// It took longer than `query_wait_timeout`.
    Timeout {
        /// The setting's value.
        limit: Duration,
        /// How the pool stood.
        picture: Box<Picture>,
    },
    /// The server will not let the pool in; its `ErrorResponse` body, if it sent one, and what to log.
    Hopeless {
        /// The server's own words.
        body: Option<Box<[u8]>>,
        /// Ours.
        reason: Rc<str>,
    },
    /// The client's own cancel request.
    Cancelled,
}

/// How a pool stands, for the error of who waited in vain.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The pool.
    pub name: PoolName,
    /// Clients waiting.
    pub waiters: usize,
    /// Server connections lent.
    pub holders: usize,
    /// How long the longest of them is lent.
    pub longest: Duration,
    /// How many of them are pinned.
    pub pinned: u32,
    /// Server connections that may be open.
    pub pool_size: u32,
    /// Why there are no more server connections, as a sentence without its end; empty if that is not known.
    pub trouble: String,
}

/// A place in the queue.
#[derive(Debug)]
enum Slot {
    Waiting { waker: Waker, since: Instant },
    Granted(Box<ServerConn>),
    Refused(Refusal),
}

/// What a pool needs to know how its server's limits stand.
#[derive(Debug)]
pub struct Census<'a> {
    /// None if the pool does not share them.
    pub fleet: Option<&'a FleetPolicy>,
    /// The time between two looks for whoever asks, at least.
    pub period: Duration,
    /// The process's own connections to the pool's server.
    pub roster: Rc<Roster>,
}

#[derive(Debug, Default)]
#[expect(clippy::vec_box, reason = "lending moves a pointer")]
struct Inner {
    /// The most recently used last.
    idle: Vec<Box<ServerConn>>,
    /// The longest waiting first, but for [`Self::ahead`].
    queue: VecDeque<usize>,
    /// Who came last and goes first, while there is one.
    ahead: Option<usize>,
    slots: Slab<Slot>,
    /// Since when each lent connection is.
    lent: Slab<Instant>,
}

impl Inner {
    /// Where in the queue the longest waiting is.
    fn eldest(&self) -> usize {
        usize::from(self.ahead.is_some() && self.queue.front() == self.ahead.as_ref() && self.queue.len() > 1)
    }
}

/// What a pool shares with others of the same clients.
struct Kin {
    id: u32,
    profiles: Rc<Profiles>,
    catalog: Rc<Knowledge>,
    clock: Rc<Clock>,
    is_surveyor: bool,
}

/// The pool of one (database, user).
#[derive(Debug)]
pub struct Pool {
    /// Distinguishes the statements of pools.
    pub id: u32,
    /// Its name in errors and metrics.
    pub name: PoolName,
    /// What it may do.
    pub limits: Limits,
    /// The settings of its clients.
    pub profiles: Rc<Profiles>,
    /// What it counted.
    pub stats: RefCell<PoolStats>,
    /// Clients logged in.
    pub clients: Cell<u32>,
    /// Server connections pinned.
    pub pinned: Cell<u32>,
    /// The lent connection that listens for all clients, if one does.
    listener: RefCell<Option<Listener>>,
    /// It is to be given up: its server is the primary no longer.
    pub listener_leaves: Cell<bool>,
    /// What is known of the database's functions, triggers and views.
    pub catalog: Rc<Knowledge>,
    /// Whether this pool is the one that asks for it: a follower has the primary's.
    is_surveyor: bool,
    /// How its server stands, if it is a follower.
    pub follower: Cell<Option<FollowerGauges>>,
    /// Its part in the fleet's budget, if there is one.
    fleet: Option<Fleet>,
    /// How its server's limits stand, for whoever asks.
    watch: Watch,
    check_ins: Cell<u32>,
    /// Which defaults sessions began with when it was last looked; see [`Knowledge::defaults`].
    defaults: Cell<u64>,
    target: Rc<Target>,
    clock: Rc<Clock>,
    counts: [Rc<Count>; 3],
    /// Its database's, then its user's.
    shared: [Rc<SharedLimit>; 2],
    inner: RefCell<Inner>,
    logging_in: Cell<u32>,
    backoff: RefCell<Backoff>,
    learned: RefCell<Option<Rc<Learned>>>,
    /// Start-up parameters that the server has refused.
    turned: RefCell<Turned>,
    /// Logins with a client's start-up parameters that are under way.
    opening_own: Cell<u32>,
    /// Server connections from which a client's limit of their own is taken off.
    disarming: Cell<u32>,
    /// When the next may be, behind one that failed.
    own_not_before: Cell<Option<Instant>>,
    /// What sessions begin with has changed since, as far as that is seen in it.
    outdated: Cell<bool>,
    /// From when on server connections could be replaced again for that, if that were done at an even pace; see [`Knowledge::defaults`].
    replaced: Cell<Option<Instant>>,
    health: Cell<PoolHealth>,
    course: Cell<Course>,
    /// The life of a standby that was left, because a write was refused there, and when.
    given_up: RefCell<Option<(Rc<Incarnation>, Instant)>>,
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(
        id: u32,
        name: PoolName,
        limits: Limits,
        target: Target,
        clock: Rc<Clock>,
        shared: [Rc<SharedLimit>; 2],
        census: Census<'_>,
    ) -> Rc<Self> {
        let sequences = Sequences::new(limits.sequence_values == SequenceValues::Always);
        let catalog = Knowledge::new(id, shared[0].clone(), limits.mode != PoolMode::Session, sequences);
        let kin = Kin { id, profiles: Rc::default(), catalog: Rc::new(catalog), clock, is_surveyor: true };
        Self::made(kin, name, limits, target, shared, census)
    }

    /// An empty pool of a follower, for the clients of `home`, whose settings and statements it knows and whose catalog it
    /// has.
    #[must_use]
    pub fn of_follower(
        home: &Self,
        name: PoolName,
        limits: Limits,
        target: Target,
        shared: [Rc<SharedLimit>; 2],
        census: Census<'_>,
    ) -> Rc<Self> {
        let kin = Kin {
            id: home.id,
            profiles: home.profiles.clone(),
            catalog: home.catalog.clone(),
            clock: home.clock.clone(),
            is_surveyor: false,
        };
        Self::made(kin, name, limits, target, shared, census)
    }

    fn made(
        kin: Kin,
        name: PoolName,
        limits: Limits,
        target: Target,
        shared: [Rc<SharedLimit>; 2],
        census: Census<'_>,
    ) -> Rc<Self> {
        let own = Count::new(limits.pool_size + limits.reserve_pool_size);
        let [database, user] = &shared;
        let fleet = census.fleet.map(|policy| Fleet::new(policy, kin.clock.now()));
        let tag = fleet.as_ref().map(Fleet::member_name).unwrap_or_default();
        let watch = Watch::new(&target, &tag, census.period, census.roster);
        let follower = (name.role == Role::Follower).then(FollowerGauges::default);
        let pool = Rc::new(Self {
            id: kin.id,
            name,
            limits,
            profiles: kin.profiles,
            stats: RefCell::default(),
            clients: Cell::new(0),
            pinned: Cell::new(0),
            listener: RefCell::default(),
            listener_leaves: Cell::new(false),
            catalog: kin.catalog,
            is_surveyor: kin.is_surveyor,
            follower: Cell::new(follower),
            fleet,
            watch,
            check_ins: Cell::new(0),
            defaults: Cell::new(0),
            target: Rc::new(target),
            clock: kin.clock,
            counts: [own, database.count.clone(), user.count.clone()],
            shared,
            inner: RefCell::default(),
            logging_in: Cell::new(0),
            backoff: RefCell::default(),
            learned: RefCell::default(),
            turned: RefCell::default(),
            opening_own: Cell::new(0),
            disarming: Cell::new(0),
            own_not_before: Cell::new(None),
            outdated: Cell::new(true),
            replaced: Cell::new(None),
            health: Cell::default(),
            course: Cell::default(),
            given_up: RefCell::default(),
        });
        for limit in &pool.shared {
            limit.enter(&pool);
        }
        pool.defaults.set(pool.catalog.defaults());
        pool
    }

    /// The worker's clock.
    #[must_use]
    pub const fn clock(&self) -> &Rc<Clock> {
        &self.clock
    }

    /// A client proved by this to be the login role: if no other credential is configured, it opens the server, too.
    pub fn give(&self, credential: Credential) {
        if self.target.credentials.give(credential) {
            // What was refused before says nothing of this one.
            *self.backoff.borrow_mut() = Backoff::default();
        }
    }

    /// Whether it is this check-in's turn to be audited.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.check_ins.set(self.check_ins.get().wrapping_add(1));
        self.limits.audit_every > 0 && self.check_ins.get().is_multiple_of(self.limits.audit_every)
    }

    /// The role that logs in to the server.
    #[must_use]
    pub fn login_user(&self) -> &str {
        &self.target.user
    }

    /// Whether something is run on each server connection at its beginning.
    #[must_use]
    pub fn has_connect_query(&self) -> bool {
        !self.target.connect_query.is_empty()
    }

    /// What the server tells at login; none before the first login, and if that may be something else by now.
    #[must_use]
    pub fn learned(&self) -> Option<Rc<Learned>> {
        if self.outdated.get() { None } else { self.learned_last() }
    }

    /// What it told last.
    #[must_use]
    pub fn learned_last(&self) -> Option<Rc<Learned>> {
        self.learned.borrow().clone()
    }

    /// Server connections that count: logging in, idle, lent and closing.
    #[must_use]
    pub fn open(&self) -> u32 {
        self.counts.first().map_or(0, |count| count.used())
    }

    /// Lends an idle server connection, if no one waits: the most recently used with the settings
    /// `want`, else the most recently used. The caller is woken when the server sends something.
    #[must_use]
    pub fn try_lease(&self, want: &Rc<Profile>, cx: &mut Context<'_>) -> Option<Box<ServerConn>> {
        loop {
            let mut conn = {
                let mut inner = self.inner.borrow_mut();
                if !inner.queue.is_empty() {
                    return None;
                }
                let last = inner.idle.len().checked_sub(1)?;
                let has_settings = |conn: &ServerConn| Rc::ptr_eq(&conn.profile, want);
                let at = if self.catalog.sequences.are_asked_for() {
                    sequences::choose(&inner.idle, self.clock.now(), has_settings)?
                } else {
                    inner.idle.iter().rposition(|conn| has_settings(conn)).unwrap_or(last)
                };
                inner.idle.remove(at)
            };
            if conn.is_alive(cx) {
                self.lend(&mut self.inner.borrow_mut(), &mut conn);
                return Some(conn);
            }
            self.discard(conn, DiscardReason::Lost);
        }
    }

    fn lend(&self, inner: &mut Inner, conn: &mut ServerConn) {
        debug_assert!(is_clean(conn) && conn.gate.in_flight.get() == 0);
        conn.used = true;
        conn.lent = inner.lent.insert(self.clock.now());
        self.stats.borrow_mut().leases += 1;
    }

    fn unlend(&self, conn: &ServerConn) {
        self.inner.borrow_mut().lent.try_remove(conn.lent);
    }

    /// Whether somebody waits for a server connection.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        !self.inner.borrow().queue.is_empty()
    }

    /// Queues up. The caller polls the ticket; dropping it leaves the queue.
    #[must_use]
    pub fn wait(self: &Rc<Self>, cx: &Context<'_>) -> Ticket {
        self.queue_up(cx, false)
    }

    /// The same for a question of ours, in front of all clients: in the longest queue it would never be asked, and what it
    /// tells may shorten that. One at a time: another one queues up behind them.
    #[must_use]
    pub fn wait_first(self: &Rc<Self>, cx: &Context<'_>) -> Ticket {
        self.queue_up(cx, true)
    }

    fn queue_up(self: &Rc<Self>, cx: &Context<'_>, ahead: bool) -> Ticket {
        if let Some(refusal) = self.standing_refusal() {
            let key = self.inner.borrow_mut().slots.insert(Slot::Refused(refusal));
            return Ticket { pool: self.clone(), key };
        }
        let key = {
            let mut inner = self.inner.borrow_mut();
            let key = inner.slots.insert(Slot::Waiting { waker: cx.waker().clone(), since: self.clock.now() });
            if ahead && inner.ahead.is_none() {
                inner.ahead = Some(key);
                inner.queue.push_front(key);
            } else {
                inner.queue.push_back(key);
            }
            key
        };
        self.dial_if_wanted();
        Ticket { pool: self.clone(), key }
    }

    /// What the last login failed for, if there is no server connection to wait for and none will be tried now.
    fn standing_refusal(&self) -> Option<Refusal> {
        let backoff = self.backoff.borrow();
        let paused = backoff.not_before.is_some_and(|at| at > self.clock.now());
        let none = self.coming() == 0 && self.serving() == 0;
        if paused && none { backoff.refusal.clone() } else { None }
    }

    /// Takes a lent server connection back. It must owe nothing and be known to be clean.
    pub fn release(self: &Rc<Self>, mut conn: Box<ServerConn>) {
        self.unlend(&conn);
        self.note_definitions(&mut conn);
        debug_assert!(is_clean(&conn));
        if !is_clean(&conn) {
            self.discard(conn, DiscardReason::Protocol);
            self.dial_if_wanted();
        } else if conn.own || conn.gate.poisoned.get() || conn.mixed || conn.littered {
            self.discard(conn, DiscardReason::Dirty);
            self.dial_if_wanted();
        } else if conn.standby == Standby::Refused && !self.is_given_up(&conn) {
            self.give_up_standby(conn);
        } else if conn.gate.in_flight.get() > 0 {
            let gate = conn.gate.clone();
            *gate.parked.borrow_mut() = Some(conn);
        } else {
            conn.idle_since = self.clock.now();
            self.offer(conn);
        }
    }

    /// Takes back a server connection whose cancel requests have all arrived.
    pub fn unpark(self: &Rc<Self>, mut conn: Box<ServerConn>) {
        let reason = if conn.own || conn.gate.poisoned.get() {
            DiscardReason::Dirty
        } else if !conn.is_alive(&mut Context::from_waker(Waker::noop())) {
            DiscardReason::Lost
        } else {
            return self.offer(conn);
        };
        self.discard(conn, reason);
        self.dial_if_wanted();
    }

    /// Takes from a free server connection what would have the server end it while it waits here, for whoever has it by then; and
    /// offers it.
    #[cold]
    fn disarm(self: &Rc<Self>, mut conn: Box<ServerConn>) {
        let pool = self.clone();
        self.disarming.set(self.disarming.get() + 1);
        tokio::task::spawn_local(async move {
            let plain = pool.profiles.plain();
            let outcome = pool.clock.limit(watch::LIMIT, conn.apply(&plain)).await;
            pool.disarming.set(pool.disarming.get().saturating_sub(1));
            match outcome {
                Ok(Ok(Ok(_))) => pool.offer(conn),
                _ => pool.discard(conn, DiscardReason::Lost),
            }
            pool.dial_if_wanted();
        });
    }

    /// Gives a free server connection to the first waiter, or to the idle stack.
    fn offer(self: &Rc<Self>, conn: Box<ServerConn>) {
        debug_assert!(!conn.own, "it is one client's alone");
        if self.is_draining() && self.inner.borrow().queue.is_empty() {
            return self.discard(conn, DiscardReason::Shutdown);
        }
        if conn.used && conn.expires.is_some_and(|at| at <= self.clock.now()) {
            self.discard(conn, DiscardReason::Lifetime);
            return self.dial_if_wanted();
        }
        if conn.defaults != self.defaults.get() {
            self.discard(conn, DiscardReason::Defaults);
            return self.dial_if_wanted();
        }
        if conn.profile.ends_idle() {
            return self.disarm(conn);
        }
        if self.is_surveyor && self.catalog.is_due(self.clock.now()) {
            return self.look_into_catalog(conn);
        }
        let Some(mut conn) = self.pass_fleet(conn) else { return };
        if self.catalog.sequences.are_asked_for() && sequences::is_held(&conn, self.clock.now()) {
            return self.hold(conn);
        }
        let mut inner = self.inner.borrow_mut();
        let Some(key) = inner.queue.pop_front() else {
            return inner.idle.push(conn);
        };
        self.lend(&mut inner, &mut conn);
        drop(inner);
        self.settle_slot(key, Slot::Granted(conn));
    }

    /// Ends a wait.
    fn settle_slot(&self, key: usize, end: Slot) {
        let previous = self.inner.borrow_mut().slots.get_mut(key).map(|slot| std::mem::replace(slot, end));
        if let Some(Slot::Waiting { waker, since }) = previous {
            let waited = self.clock.now().saturating_duration_since(since);
            self.stats.borrow_mut().wait.record(micros(waited));
            waker.wake();
        }
    }

    /// Closes a server connection.
    pub fn discard(&self, mut conn: Box<ServerConn>, reason: DiscardReason) {
        conn.discard_reason = reason;
        self.stats.borrow_mut().discards.add(reason);
        tracing::debug!(
            pool = %self.name.database, user = %self.name.user, server_pid = conn.pid, reason = reason.as_str(),
            "server connection closed"
        );
    }

    /// Closes a lent server connection, and lets a waiter have another in its place.
    pub fn discard_lent(self: &Rc<Self>, mut conn: Box<ServerConn>, reason: DiscardReason) {
        self.unlend(&conn);
        self.note_definitions(&mut conn);
        self.discard(conn, reason);
        self.dial_if_wanted();
    }

    /// Server connections that log in, or run a question of the pool's own: they will be offered soon.
    fn coming(&self) -> u32 {
        let errands = self.fleet.as_ref().map_or(0, Fleet::errands);
        self.logging_in.get() + u32::from(self.is_surveyor && self.catalog.is_asking()) + self.disarming.get() + errands
    }

    /// Why there are no more server connections, as far as that is known.
    fn trouble(&self) -> String {
        let trouble = &self.backoff.borrow().trouble;
        if trouble.is_empty() {
            return self.fleet.as_ref().map(Fleet::trouble).unwrap_or_default();
        }
        format!("The last server login failed: {trouble}")
    }

    /// Clients waiting, and how long the one has that does so for longest.
    fn waiters(&self) -> (usize, Duration) {
        let inner = self.inner.borrow();
        let since = inner.queue.get(inner.eldest()).and_then(|key| inner.slots.get(*key)).and_then(|slot| match slot {
            Slot::Waiting { since, .. } => Some(*since),
            Slot::Granted(_) | Slot::Refused(_) => None,
        });
        let waited = since.map_or(Duration::ZERO, |since| self.clock.now().saturating_duration_since(since));
        (inner.queue.len(), waited)
    }

    fn refuse_all(&self, refusal: &Refusal) {
        loop {
            let first = self.inner.borrow_mut().queue.pop_front();
            let Some(key) = first else { return };
            self.settle_slot(key, Slot::Refused(refusal.clone()));
        }
    }

    /// The pool's housekeeping, at every tick.
    pub fn tick(self: &Rc<Self>) {
        self.refuse_late();
        self.replace_outdated();
        self.close_stale();
        self.keep_catalog_fresh();
        self.keep_fleet_informed();
        let served = self.clients.get() > 0 || self.waiters().0 > 0;
        if served || self.open() > 0 || self.wants_probe() {
            self.dial_if_wanted();
        }
    }

    /// Whether a login is to find out if a server that let nobody in does so by now: whoever goes by our readiness sends
    /// no client that would. Each try is followed by the pause that any failure is followed by.
    fn wants_probe(&self) -> bool {
        let down = matches!(self.health.get(), PoolHealth::WrongCredentials(_) | PoolHealth::Unreachable);
        down && self.limits.is_probed && self.open() == self.listeners() && self.course.get() == Course::Serves
    }

    /// Ends the waits that reached their limit.
    fn refuse_late(&self) {
        let limit = self.limits.query_wait_timeout;
        if limit.is_zero() {
            return;
        }
        while self.waiters().1 >= limit {
            let refusal = Refusal::Timeout { limit, picture: Box::new(self.picture()) };
            let late = {
                let mut inner = self.inner.borrow_mut();
                let at = inner.eldest();
                inner.queue.remove(at)
            };
            let Some(key) = late else { return };
            self.settle_slot(key, Slot::Refused(refusal));
        }
    }

    /// What the pool has to do: server connections lent, and clients waiting.
    #[must_use]
    pub fn load(&self) -> u32 {
        let inner = self.inner.borrow();
        u32::try_from(inner.lent.len() + inner.queue.len()).unwrap_or(u32::MAX)
    }

    /// How the pool stands, in words' material.
    #[must_use]
    pub fn picture(&self) -> Picture {
        let inner = self.inner.borrow();
        let listener = self.listener_place();
        let oldest = inner.lent.iter().filter(|(key, _)| Some(*key) != listener).map(|(_, since)| *since).min();
        Picture {
            name: self.name.clone(),
            waiters: inner.queue.len(),
            holders: inner.lent.len().saturating_sub(usize::from(listener.is_some())),
            longest: oldest.map_or(Duration::ZERO, |since| self.clock.now().saturating_duration_since(since)),
            pinned: self.pinned.get(),
            pool_size: self.limits.pool_size,
            trouble: self.trouble(),
        }
    }

    /// How the pool stands, in numbers.
    #[must_use]
    pub fn gauges(&self) -> PoolGauges {
        let (waiters, oldest) = self.waiters();
        let inner = self.inner.borrow();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        // One that is asked for the limits is as good as idle.
        let idle = count(inner.idle.len()) + u32::from(self.watch.is_asking());
        let (lent, waiting) = (count(inner.lent.len()), count(waiters));
        let logging_in = self.coming();
        let active = lent.saturating_sub(self.listeners());
        PoolGauges {
            clients_idle: self.clients.get().saturating_sub(active + waiting),
            clients_active: active,
            clients_waiting: waiting,
            servers_idle: idle,
            servers_active: lent,
            servers_pinned: self.pinned.get(),
            servers_logging_in: logging_in,
            servers_closing: self.open().saturating_sub(idle + lent + logging_in),
            servers_limit: self.limits.pool_size + self.limits.reserve_pool_size,
            oldest_wait_us: micros(oldest),
            follower: self.follower.get(),
        }
    }

    /// Whether the server takes logins.
    #[must_use]
    pub fn health(&self) -> PoolHealth {
        self.health.get()
    }
}

/// Nothing is owed, half sent or half read: the next client finds nothing of the last one's.
fn is_clean(conn: &ServerConn) -> bool {
    lacks(Guard::Release)
        || conn.pipeline.is_free()
            && conn.pipeline.is_certain()
            && conn.unsent.is_empty()
            && conn.carry.is_empty()
            && !conn.scanner.is_inside()
}

/// A place in a pool's queue. Dropping it leaves the queue; a connection already granted goes on to the next.
#[derive(Debug)]
pub struct Ticket {
    pool: Rc<Pool>,
    key: usize,
}

impl Ticket {
    /// The end of the wait.
    ///
    /// # Errors
    ///
    /// [`Refusal`] when it ended without a server connection.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<Box<ServerConn>, Refusal>> {
        let mut inner = self.pool.inner.borrow_mut();
        let Some(slot) = inner.slots.get_mut(self.key) else {
            return Poll::Pending;
        };
        match slot {
            Slot::Waiting { waker, .. } => {
                if !waker.will_wake(cx.waker()) {
                    waker.clone_from(cx.waker());
                }
                Poll::Pending
            }
            Slot::Granted(_) | Slot::Refused(_) => match std::mem::replace(slot, Slot::Refused(Refusal::Cancelled)) {
                Slot::Granted(conn) => Poll::Ready(Ok(conn)),
                Slot::Refused(refusal) => Poll::Ready(Err(refusal)),
                Slot::Waiting { .. } => Poll::Pending,
            },
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let slot = {
            let mut inner = self.pool.inner.borrow_mut();
            let slot = inner.slots.try_remove(self.key);
            if matches!(slot, Some(Slot::Waiting { .. })) {
                inner.queue.retain(|key| *key != self.key);
            }
            if inner.ahead == Some(self.key) {
                inner.ahead = None;
            }
            slot
        };
        if let Some(Slot::Granted(conn)) = slot {
            self.pool.release(conn);
        }
    }
}

/// A duration in microseconds, as the histograms take it.
#[must_use]
pub fn micros(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000_000).saturating_add(u64::from(duration.subsec_micros()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::backend::DialError;
    use crate::clock::Pauses;

    /// A pool in session mode that dials nothing.
    fn pool(query_wait_timeout: Duration) -> Rc<Pool> {
        let name = PoolName::primary("db", "user");
        let limits =
            Limits { mode: PoolMode::Session, max_server_logins: 4, query_wait_timeout, ..Limits::of_nothing() };
        let shared = [SharedLimit::new(0), SharedLimit::new(0)];
        let census = Census { fleet: None, period: Duration::from_secs(1), roster: Rc::default() };
        Pool::new(1, name, limits, Target::nowhere(), Rc::new(Clock::new(Pauses::default())), shared, census)
    }

    #[test]
    fn a_question_of_ours_goes_before_all_clients_and_none_of_them_waits_for_longer_than_it_may() {
        let mut cx = Context::from_waker(Waker::noop());
        let limit = Duration::from_millis(1);
        let pool = pool(limit);
        let [client, other] = [pool.wait(&cx), pool.wait(&cx)];
        std::thread::sleep(limit);
        pool.clock.refresh();
        let question = pool.wait_first(&cx);
        let next = pool.wait_first(&cx);
        pool.refuse_late();
        for late in [&client, &other] {
            assert!(matches!(late.poll(&mut cx), Poll::Ready(Err(Refusal::Timeout { .. }))));
        }
        let newcomer = pool.wait(&cx);
        assert!(question.poll(&mut cx).is_pending() && next.poll(&mut cx).is_pending());
        pool.offer(ServerConn::without_socket(pool.profiles.plain()));
        assert!(newcomer.poll(&mut cx).is_pending() && next.poll(&mut cx).is_pending());
        let Poll::Ready(Ok(_lent)) = question.poll(&mut cx) else { panic!("it did not go first") };
        drop((question, next));
        // There is none now: the next is the first again.
        let question = pool.wait_first(&cx);
        pool.offer(ServerConn::without_socket(pool.profiles.plain()));
        assert!(newcomer.poll(&mut cx).is_pending());
        assert!(question.poll(&mut cx).is_ready());
    }

    #[test]
    fn logins_that_fail_side_by_side_are_one_failure() {
        let pool = pool(Duration::from_secs(1));
        let timeout = DialError::Timeout;
        let begun = pool.clock.now();
        // Three are under way when the first of four has failed.
        pool.logging_in.set(3);
        let first = pool.pause(&timeout, begun);
        assert_eq!(pool.most_logins(), 4, "one more, whatever became of the others");
        for _ in 0..3 {
            assert!(pool.pause(&timeout, begun) <= first);
        }
        assert_eq!(pool.backoff.borrow().failures, 1);
        pool.logging_in.set(0);
        std::thread::sleep(Duration::from_millis(2));
        pool.clock.refresh();
        pool.pause(&timeout, pool.clock.now());
        assert_eq!((pool.backoff.borrow().failures, pool.most_logins()), (2, 1));
    }

    #[test]
    fn a_login_for_one_client_that_hangs_keeps_nobody_from_finding_out_for_all() {
        let pool = pool(Duration::from_secs(1));
        let timeout = DialError::Timeout;
        let begun = pool.clock.now();
        pool.opening_own.set(2);
        pool.pause(&timeout, begun);
        assert!(pool.all_logins() < pool.most_logins());
        // They are over, well or with what says nothing of the server.
        for left in [1, 0] {
            pool.opening_own.set(left);
            pool.note_over(begun);
            assert_eq!(pool.most_logins(), left + 1);
        }
        pool.note_over(begun);
        assert_eq!(pool.most_logins(), 1);
    }
}

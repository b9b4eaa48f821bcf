//! What a pool knows of its database's catalog, and how it comes to know it.
//!
//! ```text
//! Unknown ──offered connection asked──▶ Known ──catalog_check_interval──▶ (asked whether it changed) ──▶ Known
//!    ▲                                    │
//!    └──────── a statement defines ───────┘
//! ```
//!
//! The questions run on a connection that is on its way to the next client or to the idle stack, one at a time. While
//! nothing is known every lease is audited.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::{Pool, Sequences, SharedLimit};
use crate::backend::{Defines, ServerConn, SettleError, row_columns};
use crate::catalog::{FINGERPRINT, ROUTES, SURVEY, Survey, Suspects};
use crate::stats::DiscardReason;

/// The longest wait for the answers.
const LIMIT: Duration = Duration::from_secs(3);

/// The most that an answer may be; bytes.
const ANSWER_MAX: usize = 32 << 20;

/// Between two looks, however often something is defined, passes so many times as much time as the first has taken: a
/// server connection has this many times as much for its clients.
const REST: u32 = 4;

/// More than will ever be defined.
const NOTHING: u64 = u64::MAX;

/// The shortest time between two looks of which the first failed.
const PAUSE_FAILED: Duration = Duration::from_secs(30);

/// The same if the server connection was lost, or the answer did not come in time.
const PAUSE_LOST: Duration = Duration::from_secs(2);

/// How often a pool's server connections are replaced, in the long run, by defaults that change without end.
const REPLACED_EVERY: Duration = Duration::from_secs(1);

/// How often they may be in a row.
const REPLACED_AT_ONCE: u32 = 8;

/// What clients define in one database, whichever of its pools they use.
#[derive(Debug, Default)]
pub struct Definitions {
    /// Grows with everything that was defined.
    made: Cell<u64>,
    /// Server connections that define something at this moment.
    in_flight: Cell<u32>,
    /// Grows with either.
    turns: Cell<u64>,
    /// Grows with everything that may have changed what sessions begin with.
    defaults: Cell<u64>,
}

impl Definitions {
    fn turn(&self) {
        self.turns.set(self.turns.get() + 1);
    }
}

/// What is known of the catalog.
#[derive(Debug)]
pub struct Knowledge {
    /// Those of the last survey.
    surveyed: RefCell<Rc<Suspects>>,
    /// For as long as these are not to be relied on.
    unknown: Rc<Suspects>,
    /// The number of the pool above the number of times that this changed.
    key: Cell<u64>,
    /// What had been defined when the last survey that went well began; [`NOTHING`] is known at first.
    known: Cell<u64>,
    /// Of the database.
    shared: Rc<SharedLimit>,
    fingerprint: RefCell<Box<[u8]>>,
    /// What sessions of the login role begin with, as the last look found it, and how often it was another than before.
    settings: RefCell<Option<Box<[u8]>>>,
    changes: Cell<u64>,
    /// When to look next; none if never.
    due: Cell<Option<Instant>>,
    /// That time has come.
    overdue: Cell<bool>,
    asking: Cell<bool>,
    not_before: Cell<Option<Instant>>,
    wanted: bool,
    /// It is also to be known what a follower may run.
    routes: Cell<bool>,
    /// What the pool's clients want to know of the values of sequences.
    pub sequences: Sequences,
}

impl Knowledge {
    /// Nothing is known yet; nothing has to be if it is not `wanted`.
    #[must_use]
    pub fn new(pool: u32, shared: Rc<SharedLimit>, wanted: bool, sequences: Sequences) -> Self {
        Self {
            surveyed: RefCell::default(),
            unknown: Rc::new(Suspects::unknown()),
            key: Cell::new((u64::from(pool) << 32) | 1),
            known: Cell::new(NOTHING),
            shared,
            fingerprint: RefCell::default(),
            settings: RefCell::default(),
            changes: Cell::new(0),
            due: Cell::new(None),
            overdue: Cell::new(false),
            asking: Cell::new(false),
            not_before: Cell::new(None),
            wanted,
            routes: Cell::new(false),
            sequences,
        }
    }

    /// From now on it has to be known, too, what a follower may run; see [`Suspects::route`].
    pub fn want_routes(&self) {
        if !self.routes.replace(true) {
            *self.fingerprint.borrow_mut() = Box::default();
            self.known.set(NOTHING);
            self.turn();
        }
    }

    /// The names that lead to more than a text shows.
    #[must_use]
    #[inline]
    pub fn suspects(&self) -> Rc<Suspects> {
        let known = !self.wanted || !self.is_behind() && self.shared.definitions.in_flight.get() == 0;
        if known { self.surveyed.borrow().clone() } else { self.unknown.clone() }
    }

    /// The last that were known, to be relied on or not.
    #[must_use]
    pub fn surveyed(&self) -> Rc<Suspects> {
        self.surveyed.borrow().clone()
    }

    /// Changes with what is known, and is never another pool's.
    #[must_use]
    #[inline]
    pub fn key(&self) -> u64 {
        self.key.get().wrapping_add(self.shared.definitions.turns.get())
    }

    /// Which defaults a session begins with: changes when `ALTER ROLE .. SET` or `ALTER DATABASE .. SET` may have changed them.
    #[must_use]
    pub fn defaults(&self) -> u64 {
        self.changes.get().wrapping_add(self.shared.definitions.defaults.get())
    }

    /// They are others than the last look found, as is known without another; that is to come soon, and is no news then.
    pub(super) fn forget_settings(&self, now: Instant) {
        self.settings.take();
        self.due.set(self.due.get().map(|at| at.min(now)));
    }

    /// A look has found these. Whether others were found before.
    fn note_settings(&self, found: &[u8]) -> bool {
        let before = self.settings.replace(Some(found.into()));
        let others = before.is_some_and(|before| *before != *found);
        self.changes.set(self.changes.get() + u64::from(others));
        others
    }

    /// Something is being defined on a server connection. It may be there for everybody long before the server's answer
    /// is read.
    #[cold]
    pub fn begins(&self, defines: &mut Defines) {
        if *defines != Defines::InFlight {
            *defines = Defines::InFlight;
            let shared = &self.shared.definitions;
            shared.in_flight.set(shared.in_flight.get() + 1);
            shared.turn();
        }
    }

    /// What was defined on a server connection is there for everybody from now on, if it ever will be.
    #[cold]
    pub fn ends(&self, defines: &mut Defines) {
        let shared = &self.shared.definitions;
        if *defines == Defines::InFlight {
            shared.in_flight.set(shared.in_flight.get().saturating_sub(1));
        }
        *defines = Defines::No;
        shared.made.set(shared.made.get() + 1);
        shared.turn();
    }

    /// Whoever was judged by what was known before may have been misjudged.
    fn turn(&self) {
        self.key.set(self.key.get() + 1);
    }

    /// Whether more may be there than is known.
    #[inline]
    fn is_behind(&self) -> bool {
        self.wanted && self.known.get() != self.shared.definitions.made.get()
    }

    /// Whether the questions are on their way.
    pub(super) fn is_asking(&self) -> bool {
        self.asking.get()
    }

    /// Whether it is time to ask.
    #[inline]
    pub(super) fn is_due(&self, now: Instant) -> bool {
        (self.is_behind() || self.overdue.get()) && self.may_ask(now)
    }

    #[cold]
    fn may_ask(&self, now: Instant) -> bool {
        !self.asking.get() && self.not_before.get().is_none_or(|at| at <= now)
    }
}

impl Pool {
    /// Asks on a connection that nobody has, and offers it then.
    #[cold]
    pub(super) fn look_into_catalog(self: &Rc<Self>, mut conn: Box<ServerConn>) {
        self.catalog.asking.set(true);
        let pool = self.clone();
        let begun = pool.clock.now();
        tokio::task::spawn_local(async move {
            let outcome = pool.clock.limit(LIMIT, pool.learn_catalog(&mut conn)).await;
            let now = pool.clock.refresh();
            let told = matches!(outcome, Ok(Ok(true)));
            pool.catalog.asking.set(false);
            let pause = match outcome {
                Ok(Ok(true)) => REST * now.saturating_duration_since(begun),
                Ok(Ok(false)) => PAUSE_FAILED,
                Ok(Err(SettleError)) | Err(_) => PAUSE_LOST,
            };
            pool.catalog.not_before.set(now.checked_add(pause));
            pool.catalog.overdue.set(false);
            pool.catalog.due.set(now.checked_add(pool.limits.catalog_check_interval));
            if !told {
                tracing::warn!(
                    pool = %pool.name.database, user = %pool.name.user,
                    "the catalog could not be read: every transaction is followed by an audit until it can"
                );
                pool.catalog.known.set(NOTHING);
                pool.catalog.turn();
            }
            match outcome {
                Ok(Ok(_)) => pool.offer(conn),
                Ok(Err(SettleError)) | Err(_) => pool.discard(conn, DiscardReason::Lost),
            }
            pool.dial_if_wanted();
        });
    }

    /// A client may have changed what sessions begin with: whoever comes next finds it so, in whichever pool of the database; soon, if
    /// that happens all the time.
    #[cold]
    pub fn renew(&self) {
        let defaults = &self.catalog.shared.definitions.defaults;
        defaults.set(defaults.get() + 1);
        self.catalog.shared.replace_outdated();
    }

    /// Closes idle server connections whose sessions began with other defaults than they would now. Those that are lent are closed
    /// when they come back.
    pub(super) fn replace_outdated(self: &Rc<Self>) {
        let defaults = self.catalog.defaults();
        if self.defaults.get() == defaults || !self.may_replace() {
            return;
        }
        self.defaults.set(defaults);
        // Who logs in is told what the next one says.
        self.outdated.set(true);
        let idle = std::mem::take(&mut self.inner.borrow_mut().idle);
        let (outdated, rest): (Vec<_>, Vec<_>) = idle.into_iter().partition(|conn| conn.defaults != defaults);
        self.inner.borrow_mut().idle = rest;
        tracing::info!(
            pool = %self.name.database, user = %self.name.user, closed = outdated.len(),
            "the server's defaults have changed: server connections are replaced"
        );
        for conn in outdated {
            self.discard(conn, DiscardReason::Defaults);
        }
        self.dial_if_wanted();
    }

    /// Any role may change its defaults as often as it likes. A few changes are followed at once, as whoever makes them expects; of
    /// more than that, each tick looks whether it is time for all of them.
    #[cold]
    fn may_replace(&self) -> bool {
        let now = self.clock.now();
        let due = self.replaced.get().map_or(now, |at| at.max(now));
        let may = due.saturating_duration_since(now) < REPLACED_EVERY * REPLACED_AT_ONCE;
        if may {
            self.replaced.set(due.checked_add(REPLACED_EVERY));
        }
        may
    }

    /// A lease is over: what was defined in it, if anything, may be there for everybody.
    #[inline]
    pub(super) fn note_definitions(&self, conn: &mut ServerConn) {
        if conn.defines != Defines::No {
            self.catalog.ends(&mut conn.defines);
        }
    }

    /// Idle pools look, too.
    pub(super) fn keep_catalog_fresh(self: &Rc<Self>) {
        if !self.is_surveyor {
            return;
        }
        let now = self.clock.now();
        self.catalog.overdue.set(self.catalog.due.get().is_some_and(|at| at <= now));
        if self.catalog.is_due(now) && !self.is_draining() {
            let conn = self.inner.borrow_mut().idle.pop();
            if let Some(conn) = conn {
                self.look_into_catalog(conn);
            }
        }
    }

    /// False if the server would not tell, or there is too much to tell.
    async fn learn_catalog(self: &Rc<Self>, conn: &mut ServerConn) -> Result<bool, SettleError> {
        let catalog = &self.catalog;
        // What is defined meanwhile may be missing in the answers.
        let made = catalog.shared.definitions.made.get();
        conn.apply(&self.profiles.plain()).await?.map_err(|_| SettleError)?;
        let (mut fingerprint, mut settings) = (Box::<[u8]>::default(), Box::<[u8]>::default());
        let told = conn.gather(FINGERPRINT, ANSWER_MAX, |row| {
            let mut columns = row_columns(row).map(|column| column.unwrap_or_default().into());
            fingerprint = columns.next().unwrap_or_default();
            settings = columns.next().unwrap_or_default();
        });
        if !told.await? || fingerprint.is_empty() {
            return Ok(false);
        }
        if catalog.note_settings(&settings) {
            self.replace_outdated();
        }
        if fingerprint != *catalog.fingerprint.borrow() {
            let routes = catalog.routes.get();
            let mut survey = if routes { Survey::with_routes() } else { Survey::default() };
            for question in [Some(SURVEY), routes.then_some(ROUTES)].into_iter().flatten() {
                if !conn.gather(question, ANSWER_MAX, |row| survey.row(row_columns(row))).await? {
                    return Ok(false);
                }
            }
            // Not on the thread that serves the clients.
            let closed = tokio::task::spawn_blocking(|| survey.close()).await;
            let Some(suspects) = closed.ok().flatten() else { return Ok(false) };
            *catalog.fingerprint.borrow_mut() = fingerprint;
            if !catalog.surveyed.borrow().judges_like(&suspects) {
                *catalog.surveyed.borrow_mut() = Rc::new(suspects);
                // Who was judged by the old ones is looked at again.
                catalog.turn();
            }
        }
        if catalog.known.replace(made) != made {
            catalog.turn();
        }
        Ok(true)
    }
}

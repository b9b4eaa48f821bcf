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

use super::Pool;
use crate::backend::{ServerConn, SettleError, row_columns};
use crate::catalog::{FINGERPRINT, SURVEY, Survey, Suspects};
use crate::stats::DiscardReason;

/// The longest wait for the answers.
const LIMIT: Duration = Duration::from_secs(3);

/// The most that an answer may be; bytes.
const ANSWER_MAX: usize = 32 << 20;

/// The shortest time between two looks, however often something is defined.
const PAUSE: Duration = Duration::from_millis(100);

/// The shortest time between two looks of which the first failed.
const PAUSE_FAILED: Duration = Duration::from_secs(30);

/// What is known of the catalog.
#[derive(Debug)]
pub struct Knowledge {
    suspects: RefCell<Rc<Suspects>>,
    /// The number of the pool above the number of times that this changed.
    key: Cell<u64>,
    known: Cell<bool>,
    /// Grows with everything that was defined.
    defined: Cell<u64>,
    fingerprint: RefCell<Box<[u8]>>,
    /// When to look next; none if never.
    due: Cell<Option<Instant>>,
    asking: Cell<bool>,
    /// Whether a look is wanted at once.
    urgent: Cell<bool>,
    not_before: Cell<Option<Instant>>,
    wanted: bool,
}

impl Knowledge {
    /// Nothing is known yet; nothing has to be if it is not `wanted`.
    pub(super) fn new(pool: u32, wanted: bool) -> Self {
        Self {
            suspects: RefCell::default(),
            key: Cell::new((u64::from(pool) << 32) | 1),
            known: Cell::new(!wanted),
            defined: Cell::new(0),
            fingerprint: RefCell::default(),
            due: Cell::new(None),
            asking: Cell::new(false),
            urgent: Cell::new(wanted),
            not_before: Cell::new(None),
            wanted,
        }
    }

    /// The names that lead to more than a text shows.
    #[must_use]
    #[inline]
    pub fn suspects(&self) -> Rc<Suspects> {
        self.suspects.borrow().clone()
    }

    /// Changes with what is known, and is never another pool's.
    #[must_use]
    #[inline]
    pub fn key(&self) -> u64 {
        self.key.get()
    }

    /// Whether what is known is to be relied on.
    #[must_use]
    #[inline]
    pub fn is_known(&self) -> bool {
        self.known.get()
    }

    /// Something was defined, and is there for everybody from now on.
    #[cold]
    pub fn changed(&self) {
        if self.wanted {
            self.defined.set(self.defined.get() + 1);
            self.known.set(false);
            self.urgent.set(true);
            self.turn();
        }
    }

    /// Whoever was judged by what was known before may have been misjudged.
    fn turn(&self) {
        self.key.set(self.key.get() + 1);
    }

    /// Whether the questions are on their way.
    pub(super) fn is_asking(&self) -> bool {
        self.asking.get()
    }

    /// Whether it is time to ask.
    #[inline]
    pub(super) fn is_due(&self, now: Instant) -> bool {
        (self.urgent.get() || self.due.get().is_some_and(|at| at <= now))
            && !self.asking.get()
            && self.not_before.get().is_none_or(|at| at <= now)
    }
}

impl Pool {
    /// Asks on a connection that nobody has, and offers it then.
    #[cold]
    pub(super) fn look_into_catalog(self: &Rc<Self>, mut conn: Box<ServerConn>) {
        self.catalog.asking.set(true);
        let pool = self.clone();
        tokio::task::spawn_local(async move {
            let outcome = pool.clock.limit(LIMIT, pool.learn_catalog(&mut conn)).await;
            let now = pool.clock.refresh();
            let told = matches!(outcome, Ok(Ok(true)));
            pool.catalog.asking.set(false);
            let pause = if told { PAUSE } else { PAUSE_FAILED };
            pool.catalog.not_before.set(now.checked_add(pause));
            pool.catalog.due.set(now.checked_add(pool.limits.catalog_check_interval));
            if !told {
                tracing::warn!(
                    pool = %pool.name.database, user = %pool.name.user,
                    "the catalog could not be read: every transaction is followed by an audit until it can"
                );
                pool.catalog.known.set(false);
                pool.catalog.turn();
                pool.catalog.urgent.set(true);
            }
            match outcome {
                Ok(Ok(_)) => pool.offer(conn),
                Ok(Err(SettleError)) | Err(_) => pool.discard(conn, DiscardReason::Lost),
            }
            pool.dial_if_wanted();
        });
    }

    /// Idle pools look, too.
    pub(super) fn keep_catalog_fresh(self: &Rc<Self>) {
        if self.catalog.is_due(self.clock.now()) && !self.draining.get() {
            let conn = self.inner.borrow_mut().idle.pop();
            if let Some(conn) = conn {
                self.look_into_catalog(conn);
            }
        }
    }

    /// False if the server would not tell, or there is too much to tell.
    async fn learn_catalog(&self, conn: &mut ServerConn) -> Result<bool, SettleError> {
        let catalog = &self.catalog;
        let defined = catalog.defined.get();
        catalog.urgent.set(false);
        conn.apply(&self.profiles.plain()).await?.map_err(|_| SettleError)?;
        let mut fingerprint: Box<[u8]> = Box::default();
        let told = conn.gather(FINGERPRINT, ANSWER_MAX, |row| {
            fingerprint = row_columns(row).flatten().next().unwrap_or_default().into();
        });
        if !told.await? || fingerprint.is_empty() {
            return Ok(false);
        }
        if fingerprint != *catalog.fingerprint.borrow() {
            let mut survey = Survey::default();
            if !conn.gather(SURVEY, ANSWER_MAX, |row| survey.row(row_columns(row))).await? {
                return Ok(false);
            }
            let Some(suspects) = survey.close() else { return Ok(false) };
            *catalog.suspects.borrow_mut() = Rc::new(suspects);
            *catalog.fingerprint.borrow_mut() = fingerprint;
            // Who was judged by the old ones is looked at again.
            catalog.turn();
        }
        // What was defined meanwhile may be missing.
        if catalog.defined.get() == defined {
            catalog.known.set(true);
        }
        Ok(true)
    }
}

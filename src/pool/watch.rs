//! How the limits of a pool's server stand, for whoever asks: `/limits`, `pgweir status`.
//!
//! A pool in the fleet's budget takes the census anyway. Any other one takes it when somebody asks, once per
//! `fleet_census_period` at most, on the connection that has been idle for longest: never on one of its own, nor on one that
//! a client waits for. Who comes meanwhile has another opened, if there may be one more.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Pool;
use crate::backend::{Roster, ServerConn, SettleError, Target, row_columns};
use crate::budget::{ANSWER_MAX, Account, Answers, GLANCE, Scope};
use crate::stats::{DiscardReason, LastRefusal, PoolLimits, Sharing, Standing};

/// The longest wait for an answer.
pub(super) const LIMIT: Duration = Duration::from_secs(3);

/// Of more pools of one server each looks more seldom.
const POOLS_PER_PERIOD: u32 = 32;

/// The pause after a census that was not given doubles so many times.
const FAILURES_MAX: u32 = 6;

/// What a pool keeps of the last census.
#[derive(Debug)]
pub(super) struct Watch {
    /// What does not change.
    place: PoolLimits,
    period: Duration,
    roster: Rc<Roster>,
    standing: RefCell<Option<Arc<Standing>>>,
    refusal: Cell<Option<LastRefusal>>,
    asking: Cell<bool>,
    /// Censuses in a row that the server would not give.
    failures: Cell<u32>,
    not_before: Cell<Option<Instant>>,
    /// Another pooler stands in between: what it would tell is of its own connections.
    is_blind: Cell<bool>,
    /// Censuses so far.
    taken: Cell<u64>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.roster.leave_tag(&self.place.tag);
    }
}

impl Watch {
    /// Of a pool with this tag, empty for none.
    pub(super) fn new(target: &Target, tag: &str, period: Duration, roster: Rc<Roster>) -> Self {
        if !tag.is_empty() {
            roster.enter_tag(tag);
        }
        let place = PoolLimits {
            server: format!("{}:{}", target.host, target.port).into(),
            login: target.user.as_str().into(),
            dbname: target.dbname.as_str().into(),
            tag: tag.into(),
            sharing: if tag.is_empty() { Sharing::Alone } else { Sharing::Shared },
            standing: None,
            refusal: None,
            is_untold: false,
        };
        Self {
            place,
            period,
            roster,
            standing: RefCell::default(),
            refusal: Cell::new(None),
            asking: Cell::new(false),
            failures: Cell::new(0),
            not_before: Cell::new(None),
            is_blind: Cell::new(false),
            taken: Cell::new(0),
        }
    }

    pub(super) const fn roster(&self) -> &Rc<Roster> {
        &self.roster
    }

    /// Whether a question is on its way.
    pub(super) fn is_asking(&self) -> bool {
        self.asking.get()
    }

    /// Notes what a census told. `account`: see [`Roll::standing`](crate::budget::Roll::standing).
    pub(super) fn note(&self, answers: &Answers, now: Instant, account: impl Fn(Scope) -> Option<Account>) {
        let is_own = |pid: Option<u32>, tag: Option<&[u8]>| self.roster.has(pid, tag);
        let standing = answers.roll.standing(&answers.census, now, is_own, account);
        *self.standing.borrow_mut() = Some(Arc::new(standing));
        self.taken.set(self.taken.get() + 1);
    }

    /// Nothing can be known.
    pub(super) fn blind(&self) {
        self.is_blind.set(true);
        *self.standing.borrow_mut() = None;
    }

    /// The server had no room for a login (53300); `routine` is the one of its own that said so.
    ///
    /// Source: `PostgreSQL`'s sources, `miscinit.c`, `postinit.c`, `proc.c` and `backend_startup.c`; the message is in the server's language.
    pub(super) fn refused(&self, at: Instant, routine: &[u8]) {
        let scope = match routine {
            b"InitializeSessionUserId" => Some(Scope::Role.as_str()),
            b"CheckMyDatabase" => Some(Scope::Database.as_str()),
            // The last two count those that are still logging in.
            b"InitPostgres" | b"InitProcess" | b"ProcessStartupPacket" | b"BackendInitialize" => {
                Some(Scope::Server.as_str())
            }
            _ => None,
        };
        self.refusal.set(Some(LastRefusal { at, scope }));
    }
}

impl Pool {
    /// What is known of its server's limits.
    #[must_use]
    pub fn server_limits(&self) -> PoolLimits {
        let watch = &self.watch;
        let (standing, refusal) = (watch.standing.borrow().clone(), watch.refusal.get());
        let sharing = if watch.is_blind.get() { Sharing::Blind } else { watch.place.sharing };
        let is_untold = watch.failures.get() > 0;
        PoolLimits { sharing, standing, refusal, is_untold, ..watch.place.clone() }
    }

    /// Censuses taken so far.
    #[must_use]
    pub fn censuses(&self) -> u64 {
        self.watch.taken.get()
    }

    /// Somebody wants to know how the limits stand.
    pub fn ask_limits(self: &Rc<Self>) {
        let (watch, now) = (&self.watch, self.clock.now());
        let is_due = !watch.asking.get() && watch.not_before.get().is_none_or(|at| at <= now);
        if self.is_budgeted() || watch.is_blind.get() || self.is_draining() || !is_due {
            return;
        }
        // Of a server with many pools one looks at a time, and each the more seldom.
        if self.inner.borrow().idle.is_empty() || !watch.roster.begin() {
            return;
        }
        let conn = self.inner.borrow_mut().idle.remove(0);
        self.look_at_limits(conn);
    }

    fn look_at_limits(self: &Rc<Self>, mut conn: Box<ServerConn>) {
        let watch = &self.watch;
        watch.asking.set(true);
        let many = u32::try_from(Rc::strong_count(&watch.roster)).unwrap_or(u32::MAX) / POOLS_PER_PERIOD;
        let pause = watch.period.saturating_mul((1 + many).saturating_mul(1 << watch.failures.get().min(FAILURES_MAX)));
        watch.not_before.set(self.clock.now().checked_add(pause));
        let pool = self.clone();
        tokio::task::spawn_local(async move {
            let mut answers = Answers::new(None);
            let told = pool.take_census(&mut conn, GLANCE, &mut answers).await;
            pool.watch.asking.set(false);
            pool.watch.roster.end();
            let failures = pool.watch.failures.get();
            pool.watch.failures.set(if matches!(told, Ok(true)) { 0 } else { failures.saturating_add(1) });
            let told = told.and_then(|told| if conn.pipeline.is_free() { Ok(told) } else { Err(SettleError) });
            match told {
                Ok(true) if answers.pid != Some(conn.pid) && conn.pid != 0 => pool.watch.blind(),
                Ok(true) => pool.watch.note(&answers, pool.clock.refresh(), |_| None),
                Ok(false) => {}
                Err(SettleError) => {
                    pool.discard(conn, DiscardReason::Lost);
                    return pool.dial_if_wanted();
                }
            }
            pool.offer(conn);
            pool.dial_if_wanted();
        });
    }

    /// Takes the census, by `LOOK` or `ASK`. False if the server would not tell: then no transaction is open.
    pub(super) async fn take_census(
        &self,
        conn: &mut ServerConn,
        text: &str,
        answers: &mut Answers,
    ) -> Result<bool, SettleError> {
        let outcome = self.clock.limit(LIMIT, async {
            conn.apply(&self.profiles.plain()).await?.map_err(|_| SettleError)?;
            let told = conn.gather_in_transaction(text, ANSWER_MAX, |row| answers.row(row_columns(row))).await?;
            if !told {
                conn.settle().await?;
            }
            Ok(told)
        });
        outcome.await.unwrap_or(Err(SettleError))
    }
}

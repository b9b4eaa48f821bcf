//! New server connections: how many are dialled, what comes of it, and the pauses after failures.

use std::rc::Rc;
use std::time::{Duration, Instant};

use pgweir_proto::error::Fields;
use rand::RngExt;

use super::{Learned, Pool, Refusal, micros};
use crate::backend::{self, DialError, Introduction, LoggedIn, Permit, ServerConn, SettleError};
use crate::net::Left;
use crate::stats::{PoolHealth, Sqlstate};

/// The first pause after a failed login; each further failure doubles it, up to `server_login_retry`.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest look at what the operator's queries have left.
pub(super) const BASELINE_LIMIT: Duration = Duration::from_secs(5);

/// The pauses between failed logins.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    /// Those of logins that ran side by side are one: what is out of reach is so for all of them.
    pub(super) failures: u32,
    failed: Option<Instant>,
    /// Logins under way that had begun by then.
    older: u32,
    pub(super) not_before: Option<Instant>,
    pub(super) trouble: String,
    /// What clients are told that come before then, if waiting is of no use.
    pub(super) refusal: Option<Refusal>,
}

impl Pool {
    /// Dials as many server connections as waiters want and limits allow.
    pub(super) fn dial_if_wanted(self: &Rc<Self>) {
        loop {
            let (waiters, oldest) = self.waiters();
            if self.wanted() == 0 || self.is_draining() && waiters == 0 || !self.may_dial(oldest) {
                return;
            }
            if self.is_budgeted() {
                return self.probe_if_allowed();
            }
            let Some(permit) = self.permit(waiters > 0) else {
                return;
            };
            self.logging_in.set(self.logging_in.get() + 1);
            tokio::task::spawn_local(self.clone().dial(permit));
        }
    }

    /// Server connections that are wanted, besides those that are on their way.
    pub(super) fn wanted(&self) -> u32 {
        let waiters = u32::try_from(self.waiters().0).unwrap_or(u32::MAX);
        let missing = self.least().saturating_sub(self.open());
        waiters.saturating_sub(self.coming()).max(missing).max(u32::from(self.wants_probe()))
    }

    /// The right to one more, if no limit of this process is in the way.
    pub(super) fn permit(&self, is_waited_for: bool) -> Option<Permit> {
        let counts = self.counts.each_ref();
        Permit::take(counts).or_else(|| {
            // Another pool of this database or user may sit on what this one needs.
            let full = self.shared.iter().find(|limit| is_waited_for && !limit.count.has_room());
            if let Some(full) = full {
                full.evict_idle();
            }
            None
        })
    }

    /// How many the pool may have, when the first client has waited so long.
    pub(super) fn size(&self, oldest_wait: Duration) -> u32 {
        let patience = self.limits.reserve_pool_timeout;
        let reserve = self.limits.reserve_pool_size > 0 && !patience.is_zero() && oldest_wait >= patience;
        self.limits.pool_size + if reserve { self.limits.reserve_pool_size } else { 0 }
    }

    pub(super) fn may_dial(&self, oldest_wait: Duration) -> bool {
        let size = self.size(oldest_wait);
        let paused = self.backoff.borrow().not_before.is_some_and(|at| at > self.clock.now());
        self.open() < size && !paused && self.all_logins() < self.most_logins()
    }

    /// Logins that are under way.
    pub(super) fn all_logins(&self) -> u32 {
        self.logging_in.get() + self.opening_own.get()
    }

    /// Logins that may be under way at once. Behind a failure one finds out for all, whatever older ones hang in.
    pub(super) fn most_logins(&self) -> u32 {
        let (backoff, most) = (self.backoff.borrow(), self.limits.max_server_logins);
        if backoff.failures == 0 { most } else { most.min(backoff.older + 1) }
    }

    async fn dial(self: Rc<Self>, permit: Permit) {
        if let Ok(conn) = self.log_in(permit, Box::default()).await {
            self.offer(conn);
        }
        self.dial_if_wanted();
    }

    /// One login, which is counted among `logging_in` until it is over, and what has to be noted of it.
    pub(super) async fn log_in(&self, permit: Permit, tag: Box<str>) -> Result<Box<ServerConn>, DialError> {
        let (plain, begun) = (self.profiles.plain(), self.clock.now());
        // What is changed from here on may be missing in it.
        let defaults = self.defaults.get();
        let intro = Introduction { tag, start: None };
        let outcome = backend::dial(self.target.clone(), self.clock.clone(), plain, permit, intro).await;
        let outcome = match outcome {
            Ok(mut logged_in) => {
                let learned = self.learn_baseline(&mut logged_in.conn, "").await;
                learned.map_or(Err(DialError::Timeout), |()| Ok(logged_in))
            }
            outcome => outcome,
        };
        self.logging_in.set(self.logging_in.get().saturating_sub(1));
        match outcome {
            Ok(mut logged_in) => {
                logged_in.conn.defaults = defaults;
                Ok(self.welcome(logged_in))
            }
            Err(error) => {
                self.mourn(&error, begun);
                Err(error)
            }
        }
    }

    /// What the operator's queries have left on a server connection, `reset_query` among them, is known from here on, if it
    /// is ever to be asked for.
    ///
    /// # Errors
    ///
    /// [`SettleError`]: also if that takes too long.
    pub async fn learn_baseline(&self, conn: &mut ServerConn, reset_query: &str) -> Result<(), SettleError> {
        if self.limits.audit_every == 0 {
            return Ok(());
        }
        self.clock.limit(BASELINE_LIMIT, conn.learn_baseline(reset_query)).await.map_err(|_| SettleError)?
    }

    fn welcome(&self, LoggedIn { mut conn, parameters, notices }: LoggedIn) -> Box<ServerConn> {
        *self.backoff.borrow_mut() = Backoff::default();
        self.health.set(PoolHealth::Usable);
        self.stats.borrow_mut().server_logins += 1;
        conn.enroll(self.watch.roster());
        let is_told = conn.defaults == self.defaults.get();
        if is_told || self.outdated.get() {
            let learned = Learned { parameters, notices };
            if self.learned.borrow().as_deref() != Some(&learned) {
                *self.learned.borrow_mut() = Some(Rc::new(learned));
            }
            self.outdated.set(!is_told);
        }
        // Up to a tenth sooner, so that connections made together do not end together.
        let share = rand::rng().random_range(0.9..=1.0);
        conn.expires = conn.born.checked_add(self.limits.server_lifetime.mul_f64(share));
        tracing::debug!(
            pool = %self.name.database, user = %self.name.user, server_pid = conn.pid,
            tls = conn.tls().map(tracing::field::display), "server login"
        );
        self.note_login();
        conn
    }

    /// Counts a connection of this pool that has outlived its worker until the server has ended it.
    pub fn bury(&self, left: Left) {
        let pid = left.server.pid;
        let Some(permit) = Permit::take(self.counts.each_ref()) else {
            tracing::error!(
                pool = %self.name.database, user = %self.name.user, server_pid = pid,
                "a server connection of a worker that is gone is beyond the pool's limits, and not counted"
            );
            return;
        };
        backend::bury(left, self.target.clone(), self.clock.clone(), permit, self.watch.roster());
    }

    /// Notes a failure of a login that began then.
    pub(super) fn mourn(&self, error: &DialError, begun: Instant) {
        let hopeless = error.is_hopeless();
        {
            let mut stats = self.stats.borrow_mut();
            match error {
                DialError::Refused { code, .. } => stats.server_login_failures.add(code.as_bytes()),
                _ => stats.server_logins_unanswered += 1,
            }
        }
        self.health.set(match error {
            DialError::Refused { code, .. } if hopeless => {
                Sqlstate::new(code.as_bytes()).map_or(PoolHealth::Unreachable, PoolHealth::WrongCredentials)
            }
            error if error.is_about_credentials() => {
                Sqlstate::new(b"28000").map_or(PoolHealth::Unreachable, PoolHealth::WrongCredentials)
            }
            // The server is there, and full.
            DialError::Refused { code, body, .. } if code == "53300" => {
                let routine = Fields::parse(body).unwrap_or_default().routine;
                self.watch.refused(self.clock.now(), routine);
                self.note_refusal();
                self.health.get()
            }
            _ => PoolHealth::Unreachable,
        });
        let pause = self.pause(error, begun);
        tracing::warn!(
            pool = %self.name.database, user = %self.name.user, host = %self.target.host, port = self.target.port,
            error = %error, retry_ms = micros(pause) / 1000, "server login failed"
        );
        if hopeless {
            let body = if let DialError::Refused { body, .. } = error { Some(body.clone()) } else { None };
            let refusal = Refusal::Hopeless { body, reason: error.for_client().into() };
            self.backoff.borrow_mut().refusal = Some(refusal.clone());
            // Whoever is served by the connections that are there is better off waiting for those.
            if self.serving() == 0 {
                self.refuse_all(&refusal);
            }
        }
    }

    /// A login that began then is over, and says nothing of the server's health.
    pub(super) fn note_over(&self, begun: Instant) {
        let mut backoff = self.backoff.borrow_mut();
        if backoff.failed.is_some_and(|failed| begun <= failed) {
            backoff.older = backoff.older.saturating_sub(1);
        }
    }

    /// Notes a failure of a login that began then; the next one waits for the pause returned.
    pub(super) fn pause(&self, error: &DialError, begun: Instant) -> Duration {
        let (mut backoff, now) = (self.backoff.borrow_mut(), self.clock.now());
        if let (Some(failed), Some(until)) = (backoff.failed, backoff.not_before)
            && begun <= failed
        {
            backoff.older = backoff.older.saturating_sub(1);
            return until.saturating_duration_since(now);
        }
        backoff.trouble = error.for_client();
        backoff.refusal = None;
        let doubled = FIRST_PAUSE.saturating_mul(1 << backoff.failures.min(16));
        backoff.failures += 1;
        backoff.older = self.all_logins();
        let longest = self.limits.server_login_retry.max(FIRST_PAUSE);
        let pause = doubled.min(longest).mul_f64(rand::rng().random_range(0.5..=1.0));
        (backoff.failed, backoff.not_before) = (Some(now), now.checked_add(pause));
        pause
    }
}

//! New server connections: how many are dialled, what comes of it, and the pauses after failures.

use std::rc::Rc;
use std::time::{Duration, Instant};

use rand::RngExt;

use super::{Learned, Pool, Refusal, micros};
use crate::backend::{self, DialError, LoggedIn, Permit};
use crate::stats::{PoolHealth, Sqlstate};

/// The first pause after a failed login; each further failure doubles it, up to `server_login_retry`.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The pauses between failed logins.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    pub(super) failures: u32,
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
            let missing = self.limits.min_pool_size.saturating_sub(self.open());
            let coming = self.logging_in.get() + u32::from(self.catalog.is_asking());
            let wanted = u32::try_from(waiters).unwrap_or(u32::MAX).saturating_sub(coming).max(missing);
            let wanted = wanted.max(u32::from(self.wants_probe()));
            if wanted == 0 || self.draining.get() && waiters == 0 || !self.may_dial(oldest) {
                return;
            }
            let counts = self.counts.each_ref();
            let permit = Permit::take(counts).or_else(|| {
                // Another pool of this database or user may sit on what this one needs.
                let full = self.shared.iter().find(|limit| waiters > 0 && !limit.count.has_room());
                if let Some(full) = full {
                    full.evict_idle();
                }
                None
            });
            let Some(permit) = permit else {
                return;
            };
            self.logging_in.set(self.logging_in.get() + 1);
            tokio::task::spawn_local(self.clone().dial(permit));
        }
    }

    fn may_dial(&self, oldest_wait: Duration) -> bool {
        let patience = self.limits.reserve_pool_timeout;
        let reserve = self.limits.reserve_pool_size > 0 && !patience.is_zero() && oldest_wait >= patience;
        let size = self.limits.pool_size + if reserve { self.limits.reserve_pool_size } else { 0 };
        let paused = self.backoff.borrow().not_before.is_some_and(|at| at > self.clock.now());
        self.open() < size && !paused && self.logging_in.get() < self.limits.max_server_logins
    }

    async fn dial(self: Rc<Self>, permit: Permit) {
        let outcome = backend::dial(self.target.clone(), self.clock.clone(), self.profiles.plain(), permit).await;
        self.logging_in.set(self.logging_in.get().saturating_sub(1));
        match outcome {
            Ok(logged_in) => self.welcome(logged_in),
            Err(error) => self.mourn(&error),
        }
        self.dial_if_wanted();
    }

    fn welcome(self: &Rc<Self>, LoggedIn { mut conn, parameters, notices }: LoggedIn) {
        *self.backoff.borrow_mut() = Backoff::default();
        self.health.set(PoolHealth::Usable);
        self.stats.borrow_mut().server_logins += 1;
        if self.learned.borrow().as_ref().is_none_or(|known| known.parameters != parameters) {
            *self.learned.borrow_mut() = Some(Rc::new(Learned { parameters, notices }));
        }
        // Up to a tenth sooner, so that connections made together do not end together.
        let share = rand::rng().random_range(0.9..=1.0);
        conn.expires = conn.born.checked_add(self.limits.server_lifetime.mul_f64(share));
        tracing::debug!(
            pool = %self.name.database, user = %self.name.user, server_pid = conn.pid,
            tls = conn.tls().map(tracing::field::display), "server login"
        );
        self.offer(conn);
    }

    fn mourn(&self, error: &DialError) {
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
            DialError::Refused { code, .. } if code == "53300" => self.health.get(),
            _ => PoolHealth::Unreachable,
        });
        let pause = self.pause(error);
        tracing::warn!(
            pool = %self.name.database, user = %self.name.user, host = %self.target.host, port = self.target.port,
            error = %error, retry_ms = micros(pause) / 1000, "server login failed"
        );
        if hopeless {
            let body = if let DialError::Refused { body, .. } = error { Some(body.clone()) } else { None };
            let refusal = Refusal::Hopeless { body, reason: error.for_client().into() };
            self.backoff.borrow_mut().refusal = Some(refusal.clone());
            // Whoever is served by the connections that are there is better off waiting for those.
            if self.inner.borrow().lent.is_empty() {
                self.refuse_all(&refusal);
            }
        }
    }

    /// Notes a failure; the next login waits for the pause returned.
    fn pause(&self, error: &DialError) -> Duration {
        let mut backoff = self.backoff.borrow_mut();
        let doubled = FIRST_PAUSE.saturating_mul(1 << backoff.failures.min(16));
        backoff.failures += 1;
        let longest = self.limits.server_login_retry.max(FIRST_PAUSE);
        let pause = doubled.min(longest).mul_f64(rand::rng().random_range(0.5..=1.0));
        backoff.not_before = self.clock.now().checked_add(pause);
        backoff.trouble = error.for_client();
        backoff.refusal = None;
        pause
    }
}

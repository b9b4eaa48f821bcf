//! Server connections that are opened with the start-up parameters of one client, and are that client's alone.
//!
//! Such a client waits in the queue as any other. What it is given is closed, and what is opened in its place has its permit: so
//! no limit knows of another way to a server connection, neither ours nor the fleet's.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use pgweir_config::PoolMode;
use tokio::sync::oneshot;

use super::Pool;
use super::dial::BASELINE_LIMIT;
use crate::backend::{self, DialError, Introduction, LoggedIn, Parameters, ServerConn, Start, describe_error};
use crate::stats::DiscardReason;

/// How long a refusal is remembered: who tries again and again is told the same without the server. And how long one that a grant,
/// or a file, may put right.
const REMEMBERED: Duration = Duration::from_secs(10);
const REMEMBERED_BRIEFLY: Duration = Duration::from_secs(1);

/// The pause of a pool behind such a login that failed: each has cost it a server connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Refusals remembered of one pool, and the longest parameters of one; bytes.
const TURNED_MAX: usize = 32;
const START_MAX: usize = 1024;

/// What is refused for the parameters themselves, and not for rights that may be granted: a syntax error, a name, a value, what
/// cannot be set at all.
const LASTING: [&str; 5] = ["22023", "42601", "42602", "42704", "55P02"];

/// What is refused for want of rights, or of a file.
const BRIEF: [&str; 2] = ["42501", "58P01"];

/// One among the pool's pinned server connections.
#[derive(Debug)]
pub struct PinnedPlace {
    pool: Rc<Pool>,
    counts: bool,
}

impl PinnedPlace {
    /// Whoever has the server connection from here on takes it off.
    fn pass_on(mut self) {
        self.counts = false;
    }
}

impl Drop for PinnedPlace {
    fn drop(&mut self) {
        if self.counts {
            self.pool.pinned.set(self.pool.pinned.get().saturating_sub(1));
        }
    }
}

/// A server connection that is one client's alone. Dropped, it is closed.
#[derive(Debug)]
pub struct Own {
    place: Option<PinnedPlace>,
    conn: Option<Box<ServerConn>>,
    /// Its `ParameterStatus`es.
    pub parameters: Parameters,
    /// Bodies of its notices.
    pub notices: Vec<Box<[u8]>>,
}

impl Own {
    /// The server's process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.conn.as_ref().map(|conn| conn.pid)
    }

    /// The connection, for a session. It counts as pinned until that says otherwise.
    #[must_use]
    pub fn into_conn(mut self) -> Option<Box<ServerConn>> {
        let conn = self.conn.take()?;
        if let Some(place) = self.place.take() {
            place.pass_on();
        }
        Some(conn)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let (Some(conn), Some(place)) = (self.conn.take(), &self.place) {
            place.pool.discard_lent(conn, DiscardReason::Dirty);
        }
    }
}

/// Start-up parameters that the server has refused, the latest last; until when that is remembered, and its error.
#[derive(Debug, Default)]
pub(super) struct Turned(VecDeque<(Start, Instant, Box<[u8]>)>);

impl Turned {
    fn get(&mut self, start: &Start, now: Instant) -> Option<Box<[u8]>> {
        self.0.retain(|(_, until, _)| now < *until);
        self.0.iter().find(|(known, ..)| known == start).map(|(.., body)| body.clone())
    }

    /// What `lasts` is not to be otherwise soon: a role that is not there may be made.
    fn remember(&mut self, start: Start, now: Instant, body: &[u8], lasts: bool) {
        let len: usize = start.parameters.iter().map(|(name, value)| name.len() + value.len()).sum();
        let (code, _) = describe_error(body);
        let (is_lasting, is_brief) = (LASTING.contains(&&*code), BRIEF.contains(&&*code));
        if len + start.options.len() > START_MAX || !(is_brief || is_lasting && lasts) {
            return;
        }
        if self.0.len() >= TURNED_MAX {
            self.0.pop_front();
        }
        self.0.push_back((start, now + if is_brief { REMEMBERED_BRIEFLY } else { REMEMBERED }, body.into()));
    }
}

impl Pool {
    /// Whether there may be one more pinned server connection. In session mode every client has one, and none is counted.
    #[must_use]
    pub fn may_pin(&self) -> bool {
        self.limits.mode == PoolMode::Session || self.pinned.get() < self.limits.max_pinned
    }

    /// One more pinned server connection, if there may be one.
    #[must_use]
    pub fn pinned_place(self: &Rc<Self>) -> Option<PinnedPlace> {
        let counts = self.limits.mode != PoolMode::Session;
        self.may_pin().then(|| {
            self.pinned.set(self.pinned.get() + u32::from(counts));
            PinnedPlace { pool: self.clone(), counts }
        })
    }

    /// What the server said of these parameters not long ago, if it refused them: the body of its error.
    #[must_use]
    pub fn turned_away(&self, start: &Start) -> Option<Box<[u8]>> {
        self.turned.borrow_mut().get(start, self.clock.now())
    }

    /// Settings were refused on a server connection that any client may have: what the server says against them is remembered
    /// if it `lasts`.
    pub fn turn_away(&self, start: Start, body: &[u8], lasts: bool) {
        self.turned.borrow_mut().remember(start, self.clock.now(), body, lasts);
    }

    /// Whether such a login has failed just now.
    #[must_use]
    pub fn is_wary(&self) -> bool {
        self.own_not_before.get().is_some_and(|at| at > self.clock.now())
    }

    /// Whether one more may be under way. It counts among all logins, and waits for the pause behind any that failed.
    #[must_use]
    pub fn may_open_own(&self) -> bool {
        let paused = self.backoff.borrow().not_before.is_some_and(|at| at > self.clock.now());
        !paused && !self.is_wary() && self.all_logins() < self.most_logins()
    }

    /// Opens a server connection with a client's start-up parameters, in the place of one that was lent to it. What the server
    /// says against them is remembered if it `lasts`.
    ///
    /// # Errors
    ///
    /// [`DialError`]; it says nothing against the pool, unless it [is of the moment](DialError::is_of_the_moment).
    pub async fn open_own(
        self: &Rc<Self>,
        lent: Box<ServerConn>,
        start: Start,
        lasts: bool,
        place: PinnedPlace,
    ) -> Result<Own, DialError> {
        let (tell, told) = oneshot::channel();
        let pool = self.clone();
        self.opening_own.set(self.opening_own.get() + 1);
        tokio::task::spawn_local(async move {
            // Its client may be gone by now: then what was opened is closed.
            drop(tell.send(pool.replace(lent, start, lasts, place).await));
        });
        told.await.unwrap_or(Err(DialError::Timeout))
    }

    async fn replace(
        self: Rc<Self>,
        mut lent: Box<ServerConn>,
        start: Start,
        lasts: bool,
        place: PinnedPlace,
    ) -> Result<Own, DialError> {
        let key = lent.lent;
        self.note_definitions(&mut lent);
        lent.discard_reason = DiscardReason::Dirty;
        self.stats.borrow_mut().discards.add(DiscardReason::Dirty);
        let defaults = self.defaults.get();
        let begun = self.clock.now();
        let is_told = lent.incarnation.is_told();
        let outcome = match lent.hang_up().await {
            None => Err(DialError::Timeout),
            Some(permit) => {
                let intro = Introduction { tag: Box::default(), start: Some(start.clone()) };
                backend::dial(self.target.clone(), self.clock.clone(), self.profiles.plain(), permit, intro).await
            }
        };
        let outcome = match outcome {
            // The client's own settings may have kept it from telling (its time limit). What is written there would be taken for
            // written elsewhere.
            Ok(logged_in) if is_told && !logged_in.conn.incarnation.is_told() => Err(DialError::Untold),
            Ok(mut logged_in) => {
                let preferred = self.clock.limit(BASELINE_LIMIT, logged_in.conn.prefer_start(&start.names)).await;
                if let Ok(Ok(reported)) = preferred {
                    logged_in.parameters.retain(|(known, _)| reported.iter().all(|(name, _)| name != known));
                    logged_in.parameters.extend(reported);
                    Ok(logged_in)
                } else {
                    Err(DialError::Timeout)
                }
            }
            outcome => outcome,
        };
        self.opening_own.set(self.opening_own.get().saturating_sub(1));
        if !outcome.as_ref().is_err_and(DialError::is_of_the_moment) {
            self.note_over(begun);
        }
        let outcome = match outcome {
            Ok(LoggedIn { mut conn, parameters, notices }) => {
                (conn.lent, conn.defaults, conn.used) = (key, defaults, true);
                conn.enroll(self.watch.roster());
                self.stats.borrow_mut().server_logins += 1;
                tracing::debug!(
                    pool = %self.name.database, user = %self.name.user, server_pid = conn.pid,
                    tls = conn.tls().map(tracing::field::display), "server login with a client's start-up parameters"
                );
                Ok(Own { place: Some(place), conn: Some(conn), parameters, notices })
            }
            Err(error) => {
                self.inner.borrow_mut().lent.try_remove(key);
                let now = self.clock.now();
                self.own_not_before.set(now.checked_add(PAUSE));
                if error.is_of_the_moment() {
                    self.mourn(&error, begun);
                } else if let DialError::Refused { body, .. } = &error {
                    self.turned.borrow_mut().remember(start, now, body, lasts);
                } else {
                    self.stats.borrow_mut().server_logins_unanswered += 1;
                }
                tracing::debug!(
                    pool = %self.name.database, user = %self.name.user, %error,
                    "server login with a client's start-up parameters failed"
                );
                Err(error)
            }
        };
        self.dial_if_wanted();
        outcome
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
mod tests {
    use super::*;

    fn start(options: &str) -> Start {
        Start { options: options.as_bytes().into(), ..Start::default() }
    }

    fn body(code: &str) -> Vec<u8> {
        format!("SFATAL\0C{code}\0Mno\0\0").into_bytes()
    }

    #[test]
    fn what_is_refused_for_itself_is_remembered_for_a_while_and_what_is_refused_for_want_of_rights_for_a_moment() {
        let now = Instant::now();
        let mut turned = Turned::default();
        for code in ["22023", "42601", "42704", "55P02", "42501", "58P01", "28P01", "53300", "57P03"] {
            turned.remember(start(code), now, &body(code), true);
        }
        turned.remember(start("a role"), now, &body("22023"), false);
        let known = |code: &str, turned: &mut Turned, at| turned.get(&start(code), at).is_some();
        #[rustfmt::skip]
        let table = [
            ("22023", true, true), ("55P02", true, true), ("42501", true, false), ("58P01", true, false), ("28P01", false, false),
            ("53300", false, false), ("a role", false, false), ("other", false, false),
        ];
        for (code, at_once, _) in table {
            assert_eq!(known(code, &mut turned, now), at_once, "{code}");
        }
        for (code, _, want) in table {
            assert_eq!(known(code, &mut turned, now + REMEMBERED_BRIEFLY), want, "{code}");
        }
        assert!(!known("22023", &mut turned, now + REMEMBERED));
    }

    #[test]
    fn refusals_are_remembered_of_a_few_short_ones() {
        let now = Instant::now();
        let mut turned = Turned::default();
        turned.remember(start(&"x".repeat(START_MAX + 1)), now, &body("22023"), true);
        assert!(turned.0.is_empty());
        for number in 0..=TURNED_MAX {
            turned.remember(start(&number.to_string()), now, &body("22023"), true);
        }
        assert_eq!(turned.0.len(), TURNED_MAX);
        assert!(turned.get(&start("0"), now).is_none() && turned.get(&start("1"), now).is_some());
    }
}

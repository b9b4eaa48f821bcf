//! What sequences gave: `currval` and `lastval` tell it to the session that called `nextval`, which is a server connection.
//!
//! ```text
//! Unasked ──a client asks, or may where it would be told a stranger's, or `sequence_values = always`──▶ Asked
//! ```
//!
//! Before, nothing is done but for the one that asks. Behind it each lease of another client's server connection begins with a
//! `DISCARD SEQUENCES`, and a client whose transaction may have called `nextval` finds the same server connection again: it is
//! the last to be given to others for [`KEEP`], and is not given to them at all for [`HOLD`] if the client is likely to ask.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::Pool;
use crate::backend::{ServerConn, Values};
use crate::stats::DiscardReason;

/// How long a server connection is the last one to be given to others, for the sake of the values on it.
pub const KEEP: Duration = Duration::from_millis(250);

/// How long it is not given to others, if its client is likely to ask: a round trip, and some work between two statements.
pub const HOLD: Duration = Duration::from_millis(25);

/// Questions remembered, at most, each of which lets one client more be taken for one that will ask.
const QUESTIONS_MAX: u32 = 16;

/// What a lease has taken from sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Nothing.
    None,
    /// Perhaps something.
    Some,
    /// Its client has asked what: it will hardly ask again at once.
    Told,
}

/// What a pool's clients want to know of their values.
#[derive(Debug)]
pub struct Sequences {
    asked: Cell<bool>,
    questions: Cell<u32>,
    leases: Cell<u64>,
}

impl Sequences {
    /// Nobody has asked, unless that is taken for granted.
    #[must_use]
    pub const fn new(asked: bool) -> Self {
        Self { asked: Cell::new(asked), questions: Cell::new(0), leases: Cell::new(0) }
    }

    /// Whether anybody has asked: every lease has to begin without what strangers' `nextval` gave.
    #[must_use]
    #[inline]
    pub fn are_asked_for(&self) -> bool {
        self.asked.get()
    }

    /// A client asks for `currval` or `lastval`.
    #[cold]
    pub fn ask(&self) {
        self.asked.set(true);
        self.questions.set(QUESTIONS_MAX.min(self.questions.get() + 1));
    }

    /// A client may ask, by what nobody sees, and what strangers' `nextval` gave may be on its server connection. That is once
    /// enough; whether it will come back for its own is not known.
    #[cold]
    pub fn may_ask(&self) {
        self.asked.set(true);
    }

    /// Whether a client of which nothing is known is likely to ask: as many as have asked lately.
    fn takes_question(&self) -> bool {
        let questions = self.questions.get();
        self.questions.set(questions.saturating_sub(1));
        questions > 0
    }

    /// The number of a lease that ends, and the values on its server connection as its client leaves them: they are its own,
    /// and `taken` is whether there may be more than `before`. `asked` is whether the client has asked since a server
    /// connection was held for it: holding one more uses that up.
    #[must_use]
    pub fn leave(&self, before: Values, taken: Taken, asked: &mut bool) -> (u64, Values) {
        let lease = self.leases.get() + 1;
        self.leases.set(lease);
        let any = taken != Taken::None || matches!(before, Values::Own { any: true, .. });
        *asked |= taken == Taken::Told;
        let asks = taken == Taken::Some && (std::mem::take(asked) || self.takes_question());
        (lease, Values::Own { lease, any, asks })
    }
}

/// Whether somebody may come back for the values on an idle server connection.
fn is_kept(conn: &ServerConn, now: Instant) -> bool {
    matches!(conn.values, Values::Own { any: true, .. }) && now.saturating_duration_since(conn.idle_since) < KEEP
}

/// Whether somebody is likely to.
pub(super) fn is_held(conn: &ServerConn, now: Instant) -> bool {
    matches!(conn.values, Values::Own { asks: true, .. }) && now.saturating_duration_since(conn.idle_since) < HOLD
}

/// Which of the `idle` server connections, the most recently used last, others than the owners of the values on them are to get:
/// one that is `preferred` before any other, one that nobody may come back for before those. None if all are held.
pub(super) fn choose(idle: &[Box<ServerConn>], now: Instant, preferred: impl Fn(&ServerConn) -> bool) -> Option<usize> {
    let free = || idle.iter().rposition(|conn| !is_kept(conn, now));
    let best = idle.iter().rposition(|conn| !is_kept(conn, now) && preferred(conn));
    best.or_else(free).or_else(|| idle.iter().position(|conn| !is_held(conn, now)))
}

impl Pool {
    /// Lends the server connection that was released by a client's last lease, of this number, if nobody has had it since. The
    /// client goes in front of those who wait: it may be one for whom it is held, and does so no longer than `HOLD`.
    #[cold]
    #[must_use]
    pub fn lend_again(&self, lease: u64, cx: &mut std::task::Context<'_>) -> Option<Box<ServerConn>> {
        let mut conn = {
            let mut inner = self.inner.borrow_mut();
            let at = inner.idle.iter().rposition(|conn| conn.values.are_of(lease))?;
            inner.idle.remove(at)
        };
        if conn.is_alive(cx) {
            self.lend(&mut self.inner.borrow_mut(), &mut conn);
            return Some(conn);
        }
        self.discard(conn, DiscardReason::Lost);
        None
    }

    /// A server connection that its client is likely to come back for: those who wait get it when it is late.
    #[cold]
    pub(super) fn hold(self: &Rc<Self>, conn: Box<ServerConn>) {
        self.inner.borrow_mut().idle.push(conn);
        let pool = self.clone();
        tokio::task::spawn_local(async move {
            pool.clock.sleep(HOLD).await;
            pool.clock.refresh();
            pool.serve_waiters();
        });
    }

    /// A client will not come back for its values.
    #[cold]
    pub fn give_up_values(self: &Rc<Self>, lease: u64) {
        for conn in &mut self.inner.borrow_mut().idle {
            if conn.values.are_of(lease) {
                conn.values = Values::Anyones;
            }
        }
        self.serve_waiters();
    }

    /// Gives those who wait what is held no longer.
    fn serve_waiters(self: &Rc<Self>) {
        loop {
            let mut conn = {
                let mut inner = self.inner.borrow_mut();
                if inner.queue.is_empty() {
                    return;
                }
                let Some(at) = choose(&inner.idle, self.clock.now(), |_| true) else { return };
                inner.idle.remove(at)
            };
            // It was held once: not again if who gets it is gone before it begins.
            if let Values::Own { asks, .. } = &mut conn.values {
                *asks = false;
            }
            self.unpark(conn);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
mod tests {
    use super::*;
    use crate::settings::Profiles;

    /// A name, the values on the idle server connections and how long these have been so, and which is lent.
    type Row = (&'static str, Vec<(Values, Duration)>, Option<usize>);

    #[test]
    fn others_get_what_nobody_comes_back_for_first_and_nothing_that_is_held() {
        let profiles = Profiles::default();
        let now = Instant::now();
        let conn = |values, age: Duration| {
            let mut conn = ServerConn::without_socket(profiles.plain());
            conn.values = values;
            conn.idle_since = now.checked_sub(age).unwrap();
            conn
        };
        let own = |any, asks| Values::Own { lease: 1, any, asks };
        let (no, brief, long, longer) = (Duration::ZERO, HOLD / 2, KEEP / 2, 2 * KEEP);
        #[rustfmt::skip]
        let table: [Row; 7] = [
            ("none",              vec![],                                                                    None),
            ("the last used",     vec![(Values::Anyones, no), (Values::None, no)],                           Some(1)),
            ("nobody's",          vec![(Values::Anyones, no), (own(true, false), no)],                       Some(0)),
            ("none's that count", vec![(own(true, false), no), (own(false, false), no)],                     Some(1)),
            ("whose is late",     vec![(own(true, false), longer), (own(true, true), brief)],                Some(0)),
            ("the eldest",        vec![(own(true, true), long), (own(true, false), brief)],                  Some(0)),
            ("held",              vec![(own(true, true), brief), (own(true, true), no)],                     None),
        ];
        for (name, idle, want) in table {
            let idle: Vec<_> = idle.into_iter().map(|(values, age)| conn(values, age)).collect();
            assert_eq!(choose(&idle, now, |_| true), want, "{name}");
        }
    }

    #[test]
    fn a_question_lets_its_client_and_one_more_be_taken_for_one_that_asks() {
        let sequences = Sequences::new(false);
        let mut asked = false;
        let asks = |taken, asked: &mut bool| match sequences.leave(Values::Anyones, taken, asked).1 {
            Values::Own { asks, .. } => asks,
            Values::None | Values::Anyones => false,
        };
        assert!(!sequences.are_asked_for() && !asks(Taken::Some, &mut asked));
        sequences.ask();
        assert!(sequences.are_asked_for() && !asks(Taken::Told, &mut asked) && asked);
        assert!(!asks(Taken::None, &mut asked) && asked);
        assert_eq!([(); 3].map(|()| asks(Taken::Some, &mut asked)), [true, true, false]);
        let (lease, values) = sequences.leave(Values::Anyones, Taken::None, &mut asked);
        assert!(
            values == Values::Own { lease, any: false, asks: false }
                && values.are_of(lease)
                && !values.are_of(lease + 1)
        );
    }
}

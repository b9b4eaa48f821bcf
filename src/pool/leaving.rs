//! What leaves a pool without being asked for: server connections that are too old or idle for too long, those of a server that is
//! not the right one any more, and all of them towards the end.

use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use super::Pool;
use crate::backend::ServerConn;
use crate::replica::Incarnation;
use crate::stats::DiscardReason;

/// A pool that gives way to its fleet closes what is idle for so long: who asks again and again needs no login each time.
const LINGER: Duration = Duration::from_secs(1);

/// A standby that refuses writes is left once in so long, if its address leads to it again.
const LOOK_AGAIN: Duration = Duration::from_mins(1);

/// How far a pool is from its end.
///
/// ```text
/// Serves ──give_way──▶ GivesWay ──drain──▶ Drains
///    └──────────────drain───────────────────▲
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Course {
    #[default]
    Serves,
    /// The process will end, and clients may come until then: it has the server connections that these need, and leaves the rest
    /// to the fleet.
    GivesWay,
    /// Server connections are closed when they are no longer needed.
    Drains,
}

impl Pool {
    /// How many server connections are kept open when idle.
    pub(super) fn least(&self) -> u32 {
        if self.course.get() == Course::Serves { self.limits.min_pool_size } else { 0 }
    }

    /// Closes idle server connections that are dead, too old, or idle too long.
    pub(super) fn close_stale(self: &Rc<Self>) {
        let now = self.clock.now();
        let gives_way = self.course.get() == Course::GivesWay;
        let idle_limit = self.limits.server_idle_timeout;
        let mut at = 0;
        loop {
            let surplus = self.open() > self.least();
            let mut inner = self.inner.borrow_mut();
            let Some(conn) = inner.idle.get_mut(at) else { return };
            let idle = now.saturating_duration_since(conn.idle_since);
            let reason = if self.is_draining() {
                DiscardReason::Shutdown
            } else if gives_way && idle >= LINGER {
                DiscardReason::Shrink
            } else if conn.used && conn.expires.is_some_and(|expires| expires <= now) {
                DiscardReason::Lifetime
            } else if surplus && !idle_limit.is_zero() && idle >= idle_limit {
                DiscardReason::Idle
            } else if !conn.is_alive(&mut Context::from_waker(Waker::noop())) {
                DiscardReason::Lost
            } else {
                at += 1;
                continue;
            };
            let conn = inner.idle.remove(at);
            drop(inner);
            self.discard(conn, reason);
        }
    }

    /// The process will end before long: if the pool is one of a fleet, what its clients do not need is for the others from now
    /// on. Idle server connections are closed at once, and later ones soon.
    pub fn give_way(self: &Rc<Self>) {
        if self.course.get() != Course::Serves || !self.is_budgeted() {
            return;
        }
        self.course.set(Course::GivesWay);
        self.note_leaving();
        let idle = std::mem::take(&mut self.inner.borrow_mut().idle);
        tracing::info!(
            pool = %self.name.database, user = %self.name.user, closed = idle.len(), "gives way to the rest of the fleet"
        );
        for conn in idle {
            self.discard(conn, DiscardReason::Shrink);
        }
    }

    /// From now on server connections are closed when they are no longer needed.
    pub fn drain(self: &Rc<Self>) {
        self.course.set(Course::Drains);
        self.note_leaving();
        self.close_stale();
    }

    /// Whether server connections are closed when they are no longer needed.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.course.get() == Course::Drains
    }

    /// Closes the idle server connections that lead to this life of a server, or to another one, and has the one that listens
    /// given up if it does.
    pub fn evict(&self, is_leaving: impl Fn(&Incarnation) -> bool) {
        self.evict_listener(&is_leaving);
        loop {
            let conn = {
                let mut inner = self.inner.borrow_mut();
                let at = inner.idle.iter().position(|conn| is_leaving(&conn.incarnation));
                let Some(at) = at else { return };
                inner.idle.remove(at)
            };
            self.discard(conn, DiscardReason::Lost);
        }
    }

    /// What was the primary is a standby now: nobody is to write there who could reach another by the same name.
    #[cold]
    pub(super) fn give_up_standby(self: &Rc<Self>, conn: Box<ServerConn>) {
        tracing::warn!(
            pool = %self.name.database, user = %self.name.user,
            "a write was refused: the server is a standby; its address is looked up anew"
        );
        let life = conn.incarnation.clone();
        self.given_up.replace(Some((life.clone(), self.clock.now())));
        self.discard(conn, DiscardReason::Lost);
        self.evict(|other| *other == *life);
        self.dial_if_wanted();
    }

    /// Whether the name led to the same standby again when it was looked up anew, not long ago: it may be what it is to lead to.
    #[cold]
    pub(super) fn is_given_up(&self, conn: &ServerConn) -> bool {
        let is_soon = |at: Instant| self.clock.now().saturating_duration_since(at) < LOOK_AGAIN;
        self.given_up.borrow().as_ref().is_some_and(|(life, at)| **life == *conn.incarnation && is_soon(*at))
    }
}

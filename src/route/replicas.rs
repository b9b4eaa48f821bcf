//! The followers of one pool's primary: which of them may serve a read now.

use std::rc::Rc;
use std::task::{Context, Poll};

use pgweir_config::ReadRouting;

use crate::backend::ServerConn;
use crate::clock::Moment;
use crate::pool::Pool;
use crate::stats::RouteReason;

/// Where a read is to go.
#[derive(Clone, Debug)]
pub enum Choice {
    /// To this follower's pool.
    Follower(Rc<Pool>, Seat),
    /// To the primary, and why.
    Primary(RouteReason),
}

/// Whose position a choice relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat(u64);

/// The followers of one pool's primary.
#[derive(Debug)]
pub struct Replicas {
    routing: ReadRouting,
}

impl Replicas {
    /// What is routed.
    #[must_use]
    pub const fn routing(&self) -> ReadRouting {
        self.routing
    }

    /// Which follower may serve a read of a session whose last acknowledged transaction that may have written was at
    /// `stamp`; none if it had none.
    #[must_use]
    pub fn choose(&self, _stamp: Option<Moment>) -> Choice {
        Choice::Primary(RouteReason::NoFollower)
    }

    /// The same, and waits if that is what it takes.
    pub fn poll_choose(&self, stamp: Option<Moment>, _arrived: Moment, _cx: &mut Context<'_>) -> Poll<Choice> {
        Poll::Ready(self.choose(stamp))
    }

    /// A transaction on the primary that may have written is acknowledged.
    pub fn stamp(&self, _now: Moment, _conn: &ServerConn) {}

    /// Whether `conn` leads to the very server whose position `choose` relied on.
    #[must_use]
    pub fn vouches(&self, _conn: &ServerConn, _seat: Seat) -> bool {
        false
    }

    /// A read failed on this follower for a reason of its own.
    pub fn failed(&self, _pool: &Rc<Pool>) {}
}

//! What takes too long. The worker sees a server at work, or a lease that lasts; which query or transaction it is, and since
//! when, is known here.

use std::task::Context as Task;
use std::time::Duration;

use pgweir_proto::encode;

use super::super::end::End;
use super::{Lease, Relay};
use crate::backend::Lost;
use crate::clock::{Moment, TICK};
use crate::pool::micros;

/// How long a server may take to heed a cancel that has reached it.
const HEED: Duration = Duration::from_secs(5);

/// A query that was found to take longer than `query_timeout`.
///
/// ```text
/// (none) ──too long──▶ cancelled ──another query──▶ (none)
///                          └──as many ticks later the same──▶ the server connection is lost
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue {
    query: Query,
    /// Ticks since: between two of them the server was asked, however late they came.
    ticks: u32,
}

/// What the server is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Query {
    begun: Option<Moment>,
    /// The settings in front of it, or those behind the one before.
    replaying: bool,
}

impl Relay {
    /// The server has been at work for longer than `query_timeout`: if it is one query that takes so long, it is cancelled. A
    /// server that goes on with it all the same is given up, and so is one that is still at the settings, which nobody
    /// cancels.
    #[cold]
    pub(super) fn end_query(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(conn), Some(active)) = (&self.lease, &mut self.active) else { return Ok(()) };
        let (clock, limits) = (&self.context.clock, &self.pool.limits);
        let query = Query { begun: active.aside.query_begun, replaying: active.aside.bars_cancel(&conn.pipeline) };
        let ran = query.begun.map_or(u64::MAX, |begun| clock.moment().since(begun));
        if ran < micros(limits.times.query) {
            // Of a pipeline each query has its time.
            self.entry.since.set(query.begun.unwrap_or_else(|| clock.moment()));
            return Ok(());
        }
        let Some(overdue) = active.overdue.as_mut().filter(|overdue| overdue.query == query) else {
            active.overdue = Some(Overdue { query, ticks: 0 });
            if !query.replaying {
                self.cancel_server(Vec::new());
            }
            return Ok(());
        };
        overdue.ticks += 1;
        if TICK * overdue.ticks < limits.cancel_wait_timeout + HEED {
            return Ok(());
        }
        tracing::warn!(
            client = self.entry.pid,
            server_pid = conn.pid,
            "a query took longer than query_timeout and was not cancelled: its server connection is given up"
        );
        self.lose(Lost::Overdue, cx)
    }

    /// Whether the client has stopped in the middle of what it sends, and for too long: the server waits for it, in a transaction
    /// of its own at least.
    #[cold]
    pub(super) fn has_stopped(&mut self) -> bool {
        let is_inside = self.scanner.is_inside();
        let now = self.context.clock.moment();
        let limit = micros(self.pool.limits.times.idle_transaction);
        let (Lease::Held(conn), Some(active)) = (&self.lease, &mut self.active) else { return false };
        if active.stalled || active.hold || active.resume || !conn.waits_for_more(is_inside) {
            active.stopped = None;
            return false;
        }
        now.since(*active.stopped.get_or_insert(now)) >= limit
    }

    /// A client that says nothing for long in the middle of a batch may have stopped there without a Flush: then the server keeps its
    /// answers to itself, and looks as if it were at work. It is asked for them, once: one that is at work reads that later.
    #[cold]
    pub(super) fn ask_for_answers(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let is_inside = self.scanner.is_inside();
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else { return Ok(()) };
        // What has stopped is known already, and for how long.
        if active.stopped.is_some() || active.flushed || is_inside || !conn.may_keep_answers() {
            return Ok(());
        }
        active.flushed = true;
        // It has no answer of its own, and nothing is to be remembered of it.
        match conn.write(cx, &encode::FLUSH, &[]) {
            Ok(()) => Ok(()),
            Err(error) => self.lose(Lost::Io(error.kind()), cx),
        }
    }

    /// Whether one transaction takes longer than `transaction_timeout`. Who keeps its server connection has many of them in
    /// one lease.
    #[cold]
    pub(super) fn is_transaction_long(&self) -> bool {
        let now = self.context.clock.moment();
        let limit = micros(self.pool.limits.times.transaction);
        self.active.as_ref().is_none_or(|active| now.since(active.begun) >= limit)
    }
}

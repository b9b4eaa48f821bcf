//! A session without a server: waits that ended in vain, lost server connections, cancel requests.

use std::task::Context as Task;
use std::time::Duration;

use pgweir_proto::backend::TxStatus;
use pgweir_proto::frontend::Tag;
use pgweir_proto::pipeline::Origin;
use pgweir_proto::scanner::{HEADER, Scanned};

use super::super::answer::{Aside, owed};
use super::super::end::{End, refused};
use super::super::local::{Failure, Local};
use super::{Lease, Relay, rerun};
use crate::backend::{Lost, last_words};
use crate::cancel::Activity;
use crate::clock::Moment;
use crate::pool::Refusal;
use crate::stats::{Blame, CancelOutcome, DiscardReason};

/// How long a cancelled query may run on before the server is told again.
const CANCEL_AGAIN: Duration = Duration::from_millis(200);

/// Cancel requests sent for one lease that are repeated if need be.
const CANCELS_MAX: u8 = 8;

/// A message that is skipped unread while no server is there; bytes.
const LOCAL_MAX: u32 = 256 * 1024;

impl Relay {
    // ---- without a server ----

    /// Answers messages alone, until the client can be served again.
    pub(super) fn answer_alone(&mut self, input: &[u8], cx: &mut Task<'_>) -> Result<usize, End> {
        let Some(active) = &mut self.active else { return Ok(0) };
        let Some(local) = &mut active.local else { return Ok(0) };
        let statements = &self.statements;
        let mut out = Vec::new();
        let used = match self.scanner.next(input).map_err(End::Malformed)? {
            Scanned::Short => return Ok(0),
            Scanned::Inside { len } => len,
            Scanned::Whole { tag, body } => {
                let tag = Tag::from_byte(tag).map_err(|_| End::Tag(tag))?;
                match tag {
                    Tag::Terminate => return Err(End::Quit),
                    Tag::Password => return Err(End::Tag(tag as u8)),
                    tag => local.message(tag, body, |name| statements.ends_transaction(name), &mut out),
                }
                HEADER + body.len()
            }
            Scanned::Part { tag, body_len, seen } => {
                if body_len <= LOCAL_MAX {
                    return Ok(0);
                }
                let tag = Tag::from_byte(tag).map_err(|_| End::Tag(tag))?;
                local.message(tag, b"", |_| false, &mut out);
                self.scanner.stream(body_len, seen.len());
                HEADER + seen.len()
            }
        };
        if local.is_over() {
            active.local = None;
        }
        self.write_client(cx, &out, &[])?;
        Ok(used)
    }

    /// A wait ended in vain: the statement that waited gets the error.
    pub(super) fn refuse(&mut self, refusal: Refusal) -> Result<(), End> {
        self.note(Activity::Idle);
        // Its client may have been told of a BEGIN that a follower ran.
        let in_transaction = self.routing.as_mut().is_some_and(|routing| routing.gives_up());
        if matches!(refusal, Refusal::Hopeless { .. }) {
            return Err(End::Hopeless(refusal));
        }
        let failure = refused(&refusal);
        let blame = if matches!(refusal, Refusal::Cancelled) { Blame::Client } else { Blame::Pooler };
        self.pool.stats.borrow_mut().errors.add(blame, failure.code.as_bytes());
        if self.context.config.log.log_pooler_errors && blame == Blame::Pooler {
            tracing::warn!(client = self.entry.pid, code = failure.code, detail = %failure.detail, "{}", failure.message);
        }
        let active = self.active();
        active.local = Some(Local::new(failure, in_transaction));
        active.resume = true;
        Ok(())
    }

    /// The server connection is lost.
    pub(super) fn lose(&mut self, lost: Lost, cx: &mut Task<'_>) -> Result<(), End> {
        if self.is_on_follower() {
            return self.lose_follower(lost, cx);
        }
        let (Lease::Held(mut conn), Some(active)) = (std::mem::replace(&mut self.lease, Lease::None), &mut self.active)
        else {
            return Err(End::Broken("a loss without a lease"));
        };
        let lost = match lost {
            // What it said before it went may not have been read yet.
            Lost::Io(_) => last_words(&mut conn, cx).unwrap_or(lost),
            lost => lost,
        };
        let mut marks = std::mem::take(&mut active.marks);
        if let Some(subscriber) = &mut self.subscriber {
            subscriber.retract();
            subscriber.inbox().server_is_silent();
        }
        // What only it was to listen to is lost with it, and so is the session.
        self.subscriber.take_if(|subscriber| subscriber.is_idle());
        let is_overdue = matches!(lost, Lost::Overdue);
        let batch = active.rerun.take_harmless().filter(|_| rerun::is_passing(&lost));
        self.statements.undo_all(&mut marks.changes);
        active.hold = false;
        active.resume = true;
        active.stalled = false;
        // State that was not read back yet is lost with the connection, as that of a pinned one is.
        let unread = marks.tainted || active.aside.audit.is_some() && active.aside.audits_client;
        // It was told already, but for that.
        let held = active.aside.held_sync();
        active.aside = Aside::default();
        let pipeline = &mut conn.pipeline;
        let in_transaction = pipeline.status() != TxStatus::Idle || marks.begin_sent;
        let (batch_open, skipping) = (pipeline.is_batch_open(), pipeline.is_skipping());
        let owed = owed(held, pipeline.abandon());
        let concerned = in_transaction || batch_open || skipping || !owed.is_empty();
        let kept = unread || self.pinned || !marks.pins.is_empty() || self.keeps;
        let mid_message = conn.scanner.is_inside();
        let batch = batch.filter(|_| !mid_message && !kept && held.is_none());
        if let Some(routing) = &mut self.routing {
            // Whoever is told that the outcome is unknown looks what became of it.
            routing.ended(self.context.clock.moment(), &conn);
        }
        self.lender.discard_lent(conn, DiscardReason::Lost);
        self.unpin();
        self.note(Activity::Idle);
        if let Some(batch) = batch {
            self.run_again(batch);
            return Ok(());
        }
        match lost {
            _ if mid_message => return Err(End::MidMessage),
            Lost::Fatal(body) if concerned || kept => return Err(End::Fatal(body)),
            Lost::Io(_) | Lost::Protocol | Lost::Overdue if kept => return Err(End::ServerLost),
            _ if !concerned => return Ok(()),
            Lost::Fatal(_) | Lost::Io(_) | Lost::Protocol | Lost::Overdue => {}
        }
        let failure = lost_failure(in_transaction, is_overdue);
        self.pool.stats.borrow_mut().errors.add(Blame::Server, failure.code.as_bytes());
        let mut local = Local::new(failure, in_transaction);
        let mut out = Vec::new();
        local.owed(owed.into_iter(), batch_open, skipping, &mut out);
        if !local.is_over() {
            self.active().local = Some(local);
        }
        self.write_client(cx, &out, &[])
    }

    /// The client's settings could not be applied: its statement was not run, and its error is this one.
    ///
    /// A reset (cancelled, say, by a request that came late) concerns the server connection alone.
    pub(super) fn replay_failed(&mut self, body: &[u8], cx: &mut Task<'_>) -> Result<(), End> {
        if let (Lease::Held(_), Some(active)) = (&self.lease, &mut self.active)
            && std::mem::take(&mut active.aside.scrubbing)
        {
            (active.aside.replaying, active.hold, active.resume) = (false, false, true);
            if let Lease::Held(conn) = std::mem::replace(&mut self.lease, Lease::None) {
                self.lender.discard_lent(conn, DiscardReason::Dirty);
            }
            self.unpin();
            self.note(Activity::Idle);
            return Ok(());
        }
        let held = self.active.as_ref().is_some_and(|active| active.hold || active.marks.listens_too);
        if !held || self.is_on_follower() {
            // Something of the client's followed already, and ran under settings that are not its own.
            return self.lose(Lost::Protocol, cx);
        }
        if let Lease::Held(conn) = std::mem::replace(&mut self.lease, Lease::None) {
            self.lender.discard_lent(conn, DiscardReason::Dirty);
        }
        self.unpin();
        Err(End::Fatal(body.into()))
    }

    pub(super) fn cancel(&mut self) -> Result<(), End> {
        if self.bars_cancel() || self.gives_way() {
            // It would hit a replay of settings; or nothing, because what it is meant for was not read yet. It waits for the answer
            // to what is ours: whatever the client has sent by then is read before it is heeded.
            return Ok(());
        }
        let waiting_for_it = self.entry.take_cancels();
        match &self.lease {
            Lease::None if !self.awaits_lease() => Ok(()),
            Lease::None | Lease::Waiting(_) => {
                self.pool.stats.borrow_mut().cancels.add(CancelOutcome::Queued);
                self.lease = Lease::None;
                self.refuse(Refusal::Cancelled)
            }
            Lease::Held(_) => {
                self.cancel_server(waiting_for_it);
                Ok(())
            }
        }
    }

    /// Whether the server is at something of ours that no cancel request may hit.
    pub(super) fn bars_cancel(&self) -> bool {
        match (&self.lease, &self.active) {
            (Lease::Held(conn), Some(active)) => active.aside.bars_cancel(&conn.pipeline),
            (_, active) => active.as_ref().is_some_and(|active| active.aside.replaying),
        }
    }

    /// Whether the query that began at `begun` still runs, and none is behind it: a request that comes late would hit that one.
    pub(super) fn is_alone_at_work(&self, begun: Moment) -> bool {
        let (Lease::Held(conn), Some(active)) = (&self.lease, &self.active) else { return false };
        let batches = conn.pipeline.ready_owed() + u32::from(conn.pipeline.is_batch_open());
        batches <= 1 && active.aside.query_begun == Some(begun)
    }

    /// Has what runs on the server cancelled. `waiting` are dropped when that is done.
    pub(super) fn cancel_server(&mut self, waiting: Vec<tokio::sync::oneshot::Sender<()>>) {
        let (Lease::Held(conn), Some(active)) = (&self.lease, &mut self.active) else { return };
        debug_assert!(!active.aside.bars_cancel(&conn.pipeline), "it would hit the replay of settings");
        // What is ours alone on the way is not the client's to cancel.
        if !conn.pipeline.iter().any(|owed| owed.origin == Origin::Client) && !conn.pipeline.is_batch_open() {
            return;
        }
        self.lender.stats.borrow_mut().cancels.add(CancelOutcome::Forwarded);
        let order = conn.cancel_order();
        let pool = self.lender.clone();
        active.cancels = active.cancels.saturating_add(1);
        let again = active.aside.query_begun.filter(|_| active.cancels < CANCELS_MAX);
        let entry = self.entry.clone();
        tokio::task::spawn_local(async move {
            let parked = order.send(pool.limits.cancel_wait_timeout).await;
            drop(waiting);
            if let Some(conn) = parked {
                return pool.unpark(conn);
            }
            if let Some(begun) = again {
                // A server that had not read the query yet has ignored the request.
                pool.clock().sleep(CANCEL_AGAIN).await;
                entry.cancel_again(begun);
            }
        });
    }
}

/// What a client is told whose statement may have run, or not.
pub(super) fn lost_failure(in_transaction: bool, is_overdue: bool) -> Failure {
    let (message, hint) = if in_transaction {
        (
            "the server connection was lost inside the transaction",
            "The transaction is lost: roll it back and begin again.",
        )
    } else {
        (
            "the server connection was lost: the outcome of the statement is unknown",
            "Find out whether it took effect before it is sent again.",
        )
    };
    let detail = if is_overdue { "It took longer than query_timeout, and the server did not cancel it." } else { "" };
    Failure { code: "08006", message: message.to_owned(), detail: detail.to_owned(), hint: hint.to_owned() }
}

//! Away from a follower: what fails there, or must not run there, runs on the primary, unseen as long as that can be.

use std::task::Context as Task;
use std::time::Duration;

use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::pipeline::Owed;

use super::super::aftermath::Orphan;
use super::super::ahead::{Ahead, Piece};
use super::super::answer::{Unserved, owed};
use super::super::end::End;
use super::super::local::{Failure, Local};
use super::loss::lost_failure;
use super::routing::{Course, Text, Unfit};
use super::{Lease, Relay};
use crate::backend::{Lost, describe_error, last_words};
use crate::cancel::Activity;
use crate::state::Pins;
use crate::stats::{Blame, DiscardReason, RouteReason};

/// How long a follower may take over what is not waited for any more.
const PATIENCE: Duration = Duration::from_secs(5);

impl Unfit {
    const fn reason(self) -> RouteReason {
        match self {
            Self::Itself => RouteReason::Lock,
            Self::Unkept => RouteReason::Session,
            Self::Behind => RouteReason::Transaction,
        }
    }

    fn failure(self) -> Failure {
        let detail = match self {
            Self::Itself => {
                "It takes an advisory lock, changes the session, or may do either; on a follower that has no effect."
            }
            Self::Unkept => {
                "It prepares a statement that no other server would have: all statements have reached max_statement_memory."
            }
            Self::Behind => "It comes behind the end of that transaction, in the same batch: it cannot run elsewhere.",
        };
        Failure {
            code: "0A000",
            message: "this statement cannot run in a transaction on a follower".to_owned(),
            detail: detail.to_owned(),
            hint: "Begin the transaction with READ WRITE, or SET pgweir.route = 'primary'.".to_owned(),
        }
    }
}

/// What a server connection owed its client when its lease ended.
struct Debt {
    owed: Vec<Owed>,
    batch_open: bool,
    skipping: bool,
}

impl Relay {
    /// A batch must not run in the transaction that is open on the follower: if nothing was done in it yet, all of it moves to
    /// the primary; else the client is told.
    pub(super) fn turn_away(&mut self, why: Unfit, cx: &mut Task<'_>) -> Result<(), End> {
        let begun = self.routing.as_ref().is_some_and(|routing| routing.course == Course::Begun);
        self.force(begun, why.reason());
        if begun {
            let mut message = Vec::new();
            encode::query(&mut message, b"ROLLBACK");
            return self.send_held(&message, cx);
        }
        self.set_course(Course::Home, 0, why.reason());
        self.abandon(why.failure(), cx)
    }

    /// The client is told a failure, and what it sends is answered here until it has ended its transaction.
    pub(super) fn tell_locally(&mut self, failure: Failure, in_transaction: bool) {
        self.pool.stats.borrow_mut().errors.add(Blame::Pooler, failure.code.as_bytes());
        let active = self.active();
        active.local = Some(Local::new(failure, in_transaction));
        active.resume = true;
    }

    fn force(&mut self, begun: bool, reason: RouteReason) {
        if let Some(routing) = &mut self.routing {
            (routing.course, routing.reason, routing.left) = (Course::Forced { begun }, reason, 0);
        }
    }

    /// What runs on the follower is of no use to anyone: it is rolled back there. The client is told why.
    fn abandon(&mut self, failure: Failure, cx: &mut Task<'_>) -> Result<(), End> {
        let dirty = self.leaves_traces();
        let mut held = None;
        let Lease::Held(conn) = std::mem::replace(&mut self.lease, Lease::None) else { return Ok(()) };
        if let Some(active) = &mut self.active {
            // What it gave and took back without being told of it is as it was.
            let mut marks = std::mem::take(&mut active.marks);
            self.statements.undo_all(&mut marks.changes);
            (active.hold, active.stalled, active.resume) = (false, false, true);
            held = std::mem::take(&mut active.aside).held_sync();
        }
        let pipeline = &conn.pipeline;
        let debt = Debt {
            owed: owed(held, pipeline.iter()),
            batch_open: pipeline.is_batch_open(),
            skipping: pipeline.is_skipping(),
        };
        self.note(Activity::Idle);
        let reset = self.context.config.pool.server_reset_query.clone();
        let (pool, cancel_after) = (self.lender.clone(), Some(PATIENCE));
        let orphan = Orphan { conn, pool, cancel_after, dirty, pinned: false, stamps: None, reset };
        tokio::task::spawn_local(orphan.settle());
        self.tell_owed(failure, Blame::Pooler, true, debt, cx)
    }

    /// The client is told a failure in the place of all that it is owed, and is answered here until it has ended its
    /// transaction.
    fn tell_owed(
        &mut self,
        failure: Failure,
        blame: Blame,
        in_transaction: bool,
        debt: Debt,
        cx: &mut Task<'_>,
    ) -> Result<(), End> {
        self.pool.stats.borrow_mut().errors.add(blame, failure.code.as_bytes());
        let mut local = Local::new(failure, in_transaction);
        let mut out = Vec::new();
        local.owed(debt.owed.into_iter(), debt.batch_open, debt.skipping, &mut out);
        if !local.is_over() {
            self.active().local = Some(local);
        }
        self.write_client(cx, &out, &[])
    }

    /// The batch failed on the follower, and nobody was told: it goes to the primary, with its BEGIN in front if there is one.
    pub(super) fn leave_follower(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let batch = self.active().rerun.take();
        let batch = batch.ok_or(End::Broken("a batch to run elsewhere that was not kept"))?;
        match (self.active().aside.unserved.take(), &self.routing) {
            (Some(Unserved::Failed(code)), _) => self.note_refusal(&batch, code),
            (Some(Unserved::Promoted), Some(routing)) => routing.replicas.failed(&self.lender),
            _ => {}
        }
        let active = self.active();
        (active.marks.begin_sent, active.marks.commit_sent) = (false, false);
        self.run_at_home(batch);
        let Lease::Held(conn) = &self.lease else { return Ok(()) };
        if conn.pipeline.status() == TxStatus::Idle {
            return Ok(());
        }
        let mut message = Vec::new();
        encode::query(&mut message, b"ROLLBACK");
        self.send_held(&message, cx)
    }

    /// The batch comes in front of what the client has sent since.
    fn run_at_home(&mut self, batch: Vec<u8>) {
        let Some(routing) = &self.routing else { return };
        let (begun, left) = (routing.course == Course::First, routing.left);
        // The rest of it that was not passed on.
        let input = &mut self.active().backlog.input;
        let rest = left.min(input.len());
        input.drain(..rest);
        self.take_back_names(&batch);
        self.force(begun, RouteReason::Rerun);
        self.run_again(batch);
    }

    /// Names that the batch gave are not given, as far as its client knows: it was told nothing.
    fn take_back_names(&mut self, batch: &[u8]) {
        let mut names: Vec<&[u8]> = Vec::new();
        let _ = Ahead::look(self.scanner, batch, usize::MAX, |piece| {
            if let Piece::Parse(name, _) = piece
                && !name.is_empty()
            {
                names.push(name);
            }
        });
        for name in names {
            self.statements.forget(name);
        }
    }

    /// The follower's server connection is lost.
    #[cold]
    pub(super) fn lose_follower(&mut self, lost: Lost, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(mut conn), Some(active), Some(routing)) =
            (std::mem::replace(&mut self.lease, Lease::None), &mut self.active, &mut self.routing)
        else {
            return Err(End::Broken("a loss without a lease"));
        };
        let lost = match lost {
            Lost::Io(_) => last_words(&mut conn, cx).unwrap_or(lost),
            lost => lost,
        };
        let mut marks = std::mem::take(&mut active.marks);
        self.statements.undo_all(&mut marks.changes);
        (active.hold, active.resume, active.stalled) = (false, true, false);
        // Settings of one client's may be impossible there: that says nothing of the follower.
        let is_well = matches!(lost, Lost::Protocol) && active.aside.replaying && active.aside.unserved.is_none();
        let held = std::mem::take(&mut active.aside).held_sync();
        let mid_message = conn.scanner.is_inside();
        // What was told but for its end does not run again.
        let kept = active.rerun.is_routed() && !mid_message && held.is_none();
        // In the way of the replay is a query only where there is one: on a follower.
        let is_conflict = matches!(&lost, Lost::Fatal(body) if describe_error(body).0 == "40001");
        let is_overdue = matches!(lost, Lost::Overdue);
        let runs_again = (active.rerun.is_harmless() || is_conflict) && !is_overdue;
        let batch = active.rerun.take().filter(|_| kept);
        let is_doubtful = batch.is_some() && !runs_again;
        let pipeline = &mut conn.pipeline;
        let in_transaction = pipeline.status() != TxStatus::Idle;
        let (batch_open, skipping) = (pipeline.is_batch_open(), pipeline.is_skipping());
        let debt = Debt { owed: owed(held, pipeline.abandon()), batch_open, skipping };
        let concerned = batch_open || skipping || !debt.owed.is_empty();
        if !is_well {
            routing.replicas.failed(&self.lender);
        }
        let (course, only_begins) = (routing.course, routing.only_begins);
        if is_doubtful {
            // Whoever is told that the outcome is unknown looks what became of it.
            routing.may_have_written_somewhere(self.context.clock.moment());
        }
        self.lender.discard_lent(conn, DiscardReason::Lost);
        self.unpin();
        self.note(Activity::Idle);
        match batch {
            Some(batch) if runs_again => {
                self.run_at_home(batch);
                return Ok(());
            }
            Some(batch) => {
                self.take_back_names(&batch);
                self.active().rerun.settle();
            }
            None => {}
        }
        if mid_message {
            return Err(End::MidMessage);
        }
        match course {
            // It was left anyway.
            Course::Forced { .. } => return Ok(()),
            // Nothing of it was done, or even sent.
            Course::Begun | Course::Opening
                if in_transaction && !concerned && (course == Course::Begun || only_begins) =>
            {
                self.force(true, RouteReason::Rerun);
                self.note(Activity::InTransaction);
                return Ok(());
            }
            _ if !concerned && !in_transaction => {
                self.force(false, RouteReason::Rerun);
                return Ok(());
            }
            _ => {}
        }
        self.set_course(Course::Home, 0, RouteReason::Rerun);
        // Drivers know what to do with a serialization failure.
        let failure = if is_doubtful {
            lost_failure(in_transaction, is_overdue)
        } else {
            lost_on_follower(if is_conflict { "40001" } else { "08006" })
        };
        self.tell_owed(failure, Blame::Server, in_transaction, debt, cx)
    }

    /// Something was found on a follower that its client would have to keep the server connection for: what that is has no
    /// effect there.
    #[cold]
    pub(super) fn give_up_follower(&mut self) {
        tracing::warn!(
            client = self.entry.pid,
            "a read left something behind on a follower: its server connection is closed"
        );
        if let Lease::Held(conn) = std::mem::replace(&mut self.lease, Lease::None) {
            self.lender.discard_lent(conn, DiscardReason::Dirty);
        }
        if let Some(active) = &mut self.active {
            active.marks.pins = Pins::default();
            active.marks.hears_nothing();
            active.resume = true;
        }
        self.note(Activity::Idle);
    }

    /// What followers refuse is not tried there again for a while. A conflict, or something that was not there yet, is no
    /// refusal.
    fn note_refusal(&mut self, batch: &[u8], code: [u8; 5]) {
        if !matches!(&code, b"25006" | b"0A000" | b"55000") {
            return;
        }
        self.texts(batch, |relay, text| {
            let context = &*relay.context;
            if let Text::Known(text) = text {
                let (database, path) = (&relay.pool.name.database, relay.search_path());
                context.refusals.borrow_mut().remember(database, &path, text, context.clock.moment());
            }
        });
    }
}

pub(super) fn lost_on_follower(code: &'static str) -> Failure {
    Failure {
        code,
        message: "the server connection to a follower was lost inside the transaction".to_owned(),
        detail: String::new(),
        hint: "The transaction only read: roll it back and begin again.".to_owned(),
    }
}

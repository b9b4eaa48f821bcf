//! The end of a session, on both sides.

use std::time::Duration;

use pgweir_config::CancelOnDisconnect;

use super::super::aftermath::{Orphan, say_goodbye};
use super::super::end::End;
use super::{Active, Lease, Relay};
use crate::net::Stream;
use crate::stats::{DiscardReason, PinReason, Reason as _};

impl Relay {
    /// Says goodbye on both sides.
    pub(super) fn finish(&mut self, end: &End) {
        self.ended = true;
        self.leave();
        self.log_end(end);
        let cut_answer = matches!(&self.lease, Lease::Held(conn) if conn.scanner.is_inside());
        let cut_client = self.scanner.is_inside();
        let reset = self.context.config.pool.server_reset_query.clone();
        if let Lease::Held(mut conn) = std::mem::replace(&mut self.lease, Lease::None) {
            conn.cut = cut_client;
            let marks = self.active.as_ref().map(|active| &active.marks);
            let commit = marks.is_some_and(|marks| marks.commit_sent);
            let dirty = self.leaves_traces();
            let loaded = marks.is_some_and(|marks| marks.pins.has(PinReason::Load));
            if let Some(routing) = &mut self.routing {
                // A COMMIT may be on its way, however the connection ends.
                routing.ended(self.context.clock.moment(), &conn);
            }
            if loaded {
                // Nothing unloads a library, or tells what `random()` will say.
                self.unpin();
                self.lender.discard_lent(conn, DiscardReason::Dirty);
            } else if cut_client
                || matches!(end, End::Broken(_) | End::MidMessage | End::Malformed(_)) && !conn.unsent.is_empty()
            {
                // The server waits for the rest of a message that will never come.
                self.unpin();
                self.lender.discard_lent(conn, DiscardReason::Protocol);
            } else {
                let at_once = match self.context.config.client.cancel_on_disconnect {
                    CancelOnDisconnect::Lost => end.is_loss(),
                    CancelOnDisconnect::Always => true,
                    CancelOnDisconnect::Never => false,
                };
                let cancel_after = match self.pool.limits.times.query {
                    _ if commit => None,
                    _ if at_once => Some(Duration::ZERO),
                    // A client that is gone does not make its query's time any longer.
                    limit => Some(limit).filter(|limit| !limit.is_zero()),
                };
                let pinned = std::mem::take(&mut self.pinned);
                let pool = self.lender.clone();
                let stamps = self.routing.as_ref().and_then(|routing| routing.stamps());
                let orphan = Orphan { conn, pool, cancel_after, dirty, pinned, stamps, reset };
                tokio::task::spawn_local(orphan.settle());
            }
        }
        self.lease = Lease::None;
        self.last_words(end, cut_answer);
    }

    /// Whether a server connection whose lease ends now may bear traces of its client.
    pub(super) fn leaves_traces(&self) -> bool {
        let traced = |active: &Active| {
            let marks = &active.marks;
            let is_marked = marks.tainted || marks.scrub || marks.listens_too || !marks.pins.is_empty();
            // What ran may have been judged by a catalog that has changed since.
            is_marked
                || active.catalog != self.pool.catalog.key()
                || active.aside.audit.is_some()
                || active.aside.scrubbing
        };
        self.keeps || self.pinned || self.active.as_deref().is_some_and(traced)
    }

    pub(super) fn last_words(&mut self, end: &End, cut_answer: bool) {
        let mut words = self.active.take().map_or_else(Vec::new, |active| active.backlog.output);
        if matches!(end, End::Gone(_)) {
            return;
        }
        // In the middle of a message nothing that is said would be understood as itself.
        if !cut_answer && !matches!(end, End::MidMessage) {
            end.write(&mut words);
        }
        if !words.is_empty() {
            let stream = std::mem::replace(&mut self.link, Stream::Closed);
            tokio::task::spawn_local(say_goodbye(self.context.clock.clone(), stream, words));
        }
    }

    pub(super) fn log_end(&self, end: &End) {
        let code = end.code();
        if !code.is_empty() {
            self.pool.stats.borrow_mut().errors.add(end.blame(), code.as_bytes());
        }
        if let End::Told(_) = end
            && !self.is_at_rest()
        {
            self.context.sessions_cut.set(self.context.sessions_cut.get() + 1);
        }
        let log = &self.context.config.log;
        if let End::Broken(what) = end {
            self.context.process.borrow_mut().broken_invariants += 1;
            tracing::error!(client = self.entry.pid, what, "broken invariant: session ended");
        } else if !code.is_empty() && log.log_pooler_errors {
            tracing::warn!(client = self.entry.pid, code, blame = end.blame().as_str(), "{}", end.reason());
        } else if log.log_disconnections {
            tracing::info!(client = self.entry.pid, reason = end.reason(), "client disconnected");
        }
    }

    pub(super) fn leave(&mut self) {
        self.open_ear();
        self.subscriber = None;
        if self.values != 0 {
            self.pool.give_up_values(self.values);
        }
        self.context.registry.leave(&self.entry);
        self.pool.clients.set(self.pool.clients.get().saturating_sub(1));
    }
}

impl Drop for Relay {
    /// A session that did not get to its goodbye: it panicked, or the worker is going down.
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if self.at_work {
            self.context.process.borrow_mut().sessions_panicked += 1;
        }
        self.leave();
        self.unpin();
        if let Lease::Held(mut conn) = std::mem::replace(&mut self.lease, Lease::None) {
            conn.cut = self.scanner.is_inside();
            if let Some(routing) = &mut self.routing {
                routing.ended(self.context.clock.moment(), &conn);
            }
            self.lender.discard_lent(conn, DiscardReason::Protocol);
        }
    }
}

//! Where a session that logs slow statements notes them. Cold: nobody comes here unless `log_slow_statements` is set.

use pgweir_proto::scanner::Scanner;

use super::super::slow::{Lease as Which, Told, Watched};
use super::super::statements::{Changes, Statements};
use super::{Lease, Relay};
use crate::clock::Moment;
use crate::settings;
use crate::stats::PoolStats;

/// How things stood before the server's messages were looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Before {
    queries: u64,
    errors: u64,
    begun: Option<Moment>,
}

impl Before {
    /// What the pool has counted, and when the query began that is answered next.
    #[cold]
    pub(super) fn of(stats: &PoolStats, begun: Option<Moment>) -> Self {
        Self { queries: stats.queries, errors: stats.errors.total(), begun }
    }
}

/// The client's messages in `sent` are on their way to the server.
#[cold]
pub(super) fn note(
    watched: &mut Option<Box<Watched>>,
    lease: Which,
    scanner: Scanner,
    sent: &[u8],
    statements: &Statements,
    changes: &Changes,
) {
    watched.get_or_insert_default().of(lease).sent(scanner, sent, statements, changes);
}

impl Relay {
    /// A wait for a server connection is over, and a lease about to begin.
    #[cold]
    pub(super) fn note_wait(&mut self) {
        let now = self.context.clock.moment();
        let waited = now.since(self.entry.since.get());
        let lease = (self.entry.pid, now);
        self.active().watched.get_or_insert_default().of(lease).waited(waited);
    }

    /// The server may have answered queries: before, there had been so many answers and errors, and the next had begun then.
    #[cold]
    pub(super) fn tell_slow(&mut self, before: Before, now: Moment) {
        let (Lease::Held(conn), Some(active)) = (&self.lease, &mut self.active) else { return };
        let (Some(slow), Some(watched)) = (&self.context.slow, &mut active.watched) else { return };
        let after = Before::of(&self.lender.stats.borrow(), None);
        if after.errors != before.errors {
            watched.refused();
        }
        for nth in 0..after.queries.saturating_sub(before.queries) {
            // What came with it was sent with it, or before.
            let run = before.begun.filter(|_| nth == 0).map_or(0, |begun| now.since(begun));
            let done = watched.answered();
            let told = Told {
                client: self.entry.pid,
                database: &self.pool.name.database,
                user: &self.pool.name.user,
                application: self.profile.get(settings::APPLICATION_NAME).unwrap_or_default(),
            };
            slow.judge(&done, run, now, &told);
        }
        if conn.pipeline.ready_owed() == 0 {
            watched.settle();
        }
    }
}

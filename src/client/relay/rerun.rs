//! Running a batch again of whose answer the client has no word yet: whose server connection was lost, if the server cannot
//! have seen it or if it is as good as run once; or that failed for want of a statement that the server had lost.

use pgweir_proto::backend::TxStatus;
use pgweir_proto::pipeline::Origin;
use pgweir_proto::scanner::HEADER;

use super::super::end::End;
use super::Relay;
use crate::backend::{Lost, ServerConn, describe_error};

/// The longest batch that is kept; bytes.
pub const RERUN_BUFFER: usize = 64 * 1024;

/// ```text
/// (empty) ──a batch that may run again is sent──▶ kept ──a word of its answer──▶ (empty)
///                                                  └──lost, or refused──▶ sent again, once
/// ```
#[derive(Debug, Default)]
pub struct Rerun {
    batch: Vec<u8>,
    /// It may also run again when it is not known whether it has run.
    harmless: bool,
    /// It is sent for the second time.
    again: bool,
    /// It is on a follower, and runs on the primary if it fails there. If the server is lost, or was promoted meanwhile, only
    /// if it is harmless: what is not proven to read may have been done.
    routed: bool,
}

impl Rerun {
    /// Whether forgetting it loses nothing.
    #[inline]
    pub const fn is_blank(&self) -> bool {
        self.batch.is_empty() && !self.again && !self.routed
    }

    /// The whole of a batch, as the client sent it, is on its way.
    #[inline]
    pub fn keep(&mut self, batch: &[u8], harmless: bool) {
        if self.routed {
            return;
        }
        self.batch.clear();
        self.harmless = harmless;
        if batch.len() <= RERUN_BUFFER && !self.again {
            self.batch.extend_from_slice(batch);
        }
    }

    /// The whole of a batch is on its way to a follower; `proven` to read, or sent there because somebody wished it.
    pub fn keep_routed(&mut self, batch: &[u8], proven: bool) {
        self.batch.clear();
        self.batch.extend_from_slice(batch);
        (self.harmless, self.again, self.routed) = (proven, false, true);
    }

    /// Whether it is on a follower, and may run on the primary.
    #[inline]
    pub const fn is_routed(&self) -> bool {
        self.routed
    }

    /// Whether the batch may also run again when it is not known whether it has run.
    #[inline]
    pub const fn is_harmless(&self) -> bool {
        self.harmless
    }

    /// More than this batch is on its way.
    #[inline]
    pub fn pass_by(&mut self) {
        if !self.routed {
            self.settle();
        }
    }

    /// The client has a word of the answer.
    #[inline]
    pub fn settle(&mut self) {
        self.batch.clear();
        (self.again, self.routed) = (false, false);
    }

    /// The first messages of the batch, so many of which have an answer, were answered by us: what is behind them can still
    /// be sent again. What they did is the client's by now, and on no server connection.
    pub fn answered(&mut self, mut answers: usize) {
        let mut at = 0;
        while answers > 0 {
            let rest = self.batch.get(at..).unwrap_or_default();
            let Some(([tag, length @ ..], _)) = rest.split_first_chunk::<HEADER>() else { return self.settle() };
            match tag {
                b'P' | b'C' => answers -= 1,
                // A Flush has none.
                b'H' => {}
                _ => return self.settle(),
            }
            at += 1 + u32::from_be_bytes(*length) as usize;
        }
        self.batch.drain(..at.min(self.batch.len()));
    }

    /// Whether the batch whose answer is waited for can be sent again, and was not yet.
    #[inline]
    pub const fn is_kept(&self) -> bool {
        !self.batch.is_empty()
    }

    /// The batch to send again, if there is one and it is not known whether it has run.
    pub fn take_harmless(&mut self) -> Option<Vec<u8>> {
        if !self.harmless {
            self.batch.clear();
        }
        self.take()
    }

    /// The batch to send again, if there is one: nothing of it was done.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let batch = std::mem::take(&mut self.batch);
        self.routed = false;
        self.again = !batch.is_empty();
        self.again.then_some(batch)
    }
}

/// Whether what is sent now is the first of a transaction: nothing of the client's went before it.
#[inline]
pub fn is_first(conn: &ServerConn, is_settled: bool) -> bool {
    let pipeline = &conn.pipeline;
    let ours = || !pipeline.is_batch_open() && pipeline.iter().all(|owed| owed.origin == Origin::Pooler);
    pipeline.status() == TxStatus::Idle && conn.unsent.is_empty() && (is_settled || ours())
}

/// Whether the server ended the connection for a reason of its own (57P01 and its like), not of the statement's.
pub fn is_passing(lost: &Lost) -> bool {
    match lost {
        Lost::Io(_) => true,
        Lost::Fatal(body) => describe_error(body).0.starts_with("57P0"),
        Lost::Protocol | Lost::Overdue => false,
    }
}

impl Relay {
    /// What failed for want of a statement goes in front of what the client has sent since.
    pub(super) fn run_healed(&mut self) -> Result<(), End> {
        let batch = self.active().rerun.take();
        self.run_again(batch.ok_or(End::Broken("a batch to run again that was not kept"))?);
        Ok(())
    }

    /// What was lost goes in front of what the client has sent since.
    pub(super) fn run_again(&mut self, mut batch: Vec<u8>) {
        self.pool.stats.borrow_mut().reruns += 1;
        let active = self.active();
        batch.append(&mut active.backlog.input);
        active.backlog.input = batch;
        active.resume = true;
    }
}

#[cfg(test)]
mod tests {
    use pgweir_harness::wire::build::{bind, close_statement, execute, flush, parse, query, sync};

    use super::*;

    #[test]
    fn what_we_answered_ourselves_is_not_sent_again_and_what_is_behind_it_is() {
        let (parse, close) = (parse("s", "SELECT 1", &[]), close_statement("t"));
        let rest = [bind("", "s", &[]), execute("", 0), sync()].concat();
        #[rustfmt::skip]
        let table: [(&str, Vec<u8>, usize, &[u8]); 7] = [
            ("nothing",              rest.clone(),                                    0, &rest),
            ("one",                  [&parse[..], &rest].concat(),                    1, &rest),
            ("several",              [&close[..], &parse, &parse, &rest].concat(),    3, &rest),
            ("not all of them",      [&parse[..], &rest].concat(),                    0, &[&parse[..], &rest].concat()),
            ("a Flush in between",   [&flush()[..], &parse, &close, &rest].concat(),  2, &rest),
            ("not one of those",     [&query("DEALLOCATE s")[..], &rest].concat(),    1, b""),
            ("more than there are",  parse.clone(),                                   2, b""),
        ];
        for (name, batch, answers, want) in table {
            let mut rerun = Rerun::default();
            rerun.keep(&batch, false);
            rerun.answered(answers);
            assert_eq!(
                rerun.take().unwrap_or_default().escape_ascii().to_string(),
                want.escape_ascii().to_string(),
                "{name}"
            );
        }
    }
}

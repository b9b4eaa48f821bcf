//! Running a batch again whose server connection was lost before a word of its answer: only if the server cannot have
//! seen it, or if it is as good as run once.

use pgweir_proto::backend::TxStatus;
use pgweir_proto::pipeline::Origin;

use super::Relay;
use crate::backend::{Lost, ServerConn, describe_error};

/// The longest batch that is kept; bytes.
pub const RERUN_BUFFER: usize = 64 * 1024;

/// ```text
/// (empty) ──a harmless batch is sent──▶ kept ──a word of its answer──▶ (empty)
///                                        └──lost──▶ sent again, once
/// ```
#[derive(Debug, Default)]
pub struct Rerun {
    batch: Vec<u8>,
    /// It is sent for the second time.
    again: bool,
}

impl Rerun {
    /// Whether forgetting it loses nothing.
    #[inline]
    pub const fn is_blank(&self) -> bool {
        self.batch.is_empty() && !self.again
    }

    /// The whole of a batch, as the client sent it, is on its way.
    #[inline]
    pub fn keep(&mut self, batch: &[u8]) {
        self.batch.clear();
        if batch.len() <= RERUN_BUFFER && !self.again {
            self.batch.extend_from_slice(batch);
        }
    }

    /// The client has a word of the answer, or more than this batch is on its way.
    #[inline]
    pub fn settle(&mut self) {
        self.batch.clear();
        self.again = false;
    }

    /// The batch to send again, if there is one.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let batch = std::mem::take(&mut self.batch);
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
        Lost::Protocol => false,
    }
}

impl Relay {
    /// What was lost goes in front of what the client has sent since.
    pub(super) fn run_again(&mut self, mut batch: Vec<u8>) {
        self.pool.stats.borrow_mut().reruns += 1;
        let active = self.active();
        batch.append(&mut active.backlog.input);
        active.backlog.input = batch;
        active.resume = true;
    }
}

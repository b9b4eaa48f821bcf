//! What happens to a server connection whose client is gone, and to the last words for a client.

use std::future::poll_fn;
use std::rc::Rc;
use std::time::Duration;

use crate::backend::ServerConn;
use crate::clock::Clock;
use crate::net::Stream;
use crate::pool::Pool;
use crate::route::Replicas;
use crate::stats::DiscardReason;

/// How often a query that nobody waits for is told to stop: of a pipeline, each request stops one.
const CANCEL_EVERY: Duration = Duration::from_secs(1);

/// How long a cancelled server connection may take to come to rest.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// How long a client may take to read its last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A server connection without its client.
#[derive(Debug)]
pub struct Orphan {
    /// The connection.
    pub conn: Box<ServerConn>,
    /// Its pool.
    pub pool: Rc<Pool>,
    /// What runs is to be cancelled when it takes this time; none never.
    pub cancel_after: Option<Duration>,
    /// Session state was left behind.
    pub dirty: bool,
    /// It counts as pinned.
    pub pinned: bool,
    /// Who is to know that what its client had under way has ended: it may have written.
    pub stamps: Option<Rc<Replicas>>,
    /// `server_reset_query`: run behind `DISCARD ALL`, which is never left out.
    pub reset: String,
}

impl Orphan {
    /// Brings the connection to rest, rolls back, cleans up, and gives it back to the pool; or closes it.
    pub async fn settle(mut self) {
        let reason = match self.rest().await {
            Ok(()) => None,
            Err(()) => Some(DiscardReason::Lost),
        };
        if let Some(replicas) = &self.stamps {
            // What a client that vanished has committed others may look for.
            let clock = self.pool.clock();
            clock.refresh();
            replicas.stamp(clock.moment(), &self.conn);
        }
        let reason = match reason {
            None if self.conn.own => Some(DiscardReason::Dirty),
            None if self.dirty => self.clean().await.err().map(|()| DiscardReason::Dirty),
            reason => reason,
        };
        if self.pinned {
            self.pool.pinned.set(self.pool.pinned.get().saturating_sub(1));
        }
        match reason {
            None => self.pool.release(self.conn),
            Some(reason) => self.pool.discard_lent(self.conn, reason),
        }
    }

    async fn rest(&mut self) -> Result<(), ()> {
        let clock = self.pool.clock().clone();
        if self.conn.pipeline.is_settled() {
            // Half a message that nobody asked for may be all that is left, and its end never come.
            let settled = clock.limit(SETTLE_LIMIT, self.conn.settle()).await.map_err(drop)?;
            return settled.map(drop).map_err(drop);
        }
        let Some(patience) = self.cancel_after else {
            return self.conn.settle().await.map(drop).map_err(drop);
        };
        let mut left = usize::MAX;
        // Of a pipeline each query has its time.
        while !patience.is_zero() && self.conn.pipeline.depth() < left {
            left = self.conn.pipeline.depth();
            if let Ok(settled) = clock.limit(patience, self.conn.settle()).await {
                return settled.map(drop).map_err(drop);
            }
        }
        let until = clock.now() + SETTLE_LIMIT;
        loop {
            let rest = until.saturating_duration_since(clock.now());
            if rest.is_zero() {
                return Err(());
            }
            let order = self.conn.cancel_order();
            // The connection is ours: nothing can be parked while it is.
            drop(order.send(rest.min(self.pool.limits.cancel_wait_timeout)).await);
            if let Ok(settled) = clock.limit(CANCEL_EVERY, self.conn.settle()).await {
                return settled.map(drop).map_err(drop);
            }
        }
    }

    /// Wipes what the client left: its settings, locks, temporary tables, channels, statements.
    async fn clean(&mut self) -> Result<(), ()> {
        let clock = self.pool.clock().clone();
        clock.limit(SETTLE_LIMIT, self.conn.reset(&self.reset)).await.map_err(drop)?.map_err(drop)?;
        self.conn.profile = self.pool.profiles.plain();
        self.pool.learn_baseline(&mut self.conn, &self.reset).await.map_err(drop)
    }
}

/// Sends a client its last words and waits a moment for it to close: a close of ours with bytes unread would
/// reset the connection and destroy them on their way.
pub async fn say_goodbye(clock: Rc<Clock>, mut stream: Stream, words: Vec<u8>) {
    let talk = async {
        let mut rest = &words[..];
        while !rest.is_empty() {
            match poll_fn(|cx| stream.poll_write(cx, rest, &[])).await {
                Ok(taken) if taken > 0 => rest = rest.get(taken..).unwrap_or_default(),
                _ => return,
            }
        }
        let _ = stream.shutdown_write();
        let mut buf = vec![0; 4096];
        while matches!(poll_fn(|cx| stream.poll_read(cx, &mut buf)).await, Ok(read) if read > 0) {
            tokio::task::consume_budget().await;
        }
    };
    let _ = clock.limit(LAST_WORDS, talk).await;
}

//! Bringing a server connection back to a known state without a client: after a client left it in the
//! middle of something, and between two clients.

use std::future::poll_fn;
use std::task::Poll;

use pgweir_proto::backend::{Tag, TxStatus};
use pgweir_proto::encode;
use pgweir_proto::error::Fields;
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::{HEADER, Scanned};

use super::ServerConn;

/// What settling a connection had to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// A transaction was rolled back.
    pub rolled_back: bool,
}

/// The connection cannot be brought to a known state: it is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server connection is lost or out of step")]
pub struct SettleError;

impl ServerConn {
    /// Reads and forgets all that is owed, ends an open batch, rolls an open transaction back.
    ///
    /// # Errors
    ///
    /// [`SettleError`].
    pub async fn settle(&mut self) -> Result<Settled, SettleError> {
        if self.pipeline.is_copy_in() {
            let mut fail = Vec::new();
            encode::message(&mut fail, b'f', |out| encode::cstr(out, b"the client is gone"));
            self.pipeline.sent(Expect::CopyEnd, Origin::Pooler, 0);
            self.send(&fail).await?;
        }
        if self.pipeline.is_batch_open() {
            self.pipeline.sent(Expect::Sync, Origin::Pooler, 0);
            self.send(&encode::SYNC).await?;
        }
        self.until_settled().await?;
        let rolled_back = self.pipeline.status() != TxStatus::Idle;
        if rolled_back {
            self.run(b"ROLLBACK").await?;
        }
        if self.pipeline.is_free() { Ok(Settled { rolled_back }) } else { Err(SettleError) }
    }

    /// Runs one simple query of our own; its rows are forgotten.
    ///
    /// # Errors
    ///
    /// [`SettleError`], also if the query fails.
    pub async fn run(&mut self, text: &[u8]) -> Result<(), SettleError> {
        let mut out = Vec::new();
        encode::query(&mut out, text);
        self.pipeline.sent(Expect::Query, Origin::Pooler, 0);
        self.send(&out).await?;
        if self.until_settled().await? { Ok(()) } else { Err(SettleError) }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), SettleError> {
        poll_fn(|cx| Poll::Ready(self.write(cx, bytes, &[]))).await.map_err(|_| SettleError)
    }

    /// Reads until nothing is owed. False if there was an error among it.
    async fn until_settled(&mut self) -> Result<bool, SettleError> {
        let mut buf = vec![0; 16 * 1024];
        let mut clean = true;
        loop {
            clean &= self.take_replies()?;
            if self.pipeline.is_settled() && self.unsent.is_empty() && !self.scanner.is_inside() && self.carry.is_empty() {
                return Ok(clean);
            }
            let read = poll_fn(|cx| {
                if !self.unsent.is_empty() && self.flush(cx).is_err() {
                    return Poll::Ready(Ok(0));
                }
                self.poll_read(cx, &mut buf)
            });
            match read.await {
                Ok(read) if read > 0 => self.carry.extend_from_slice(buf.get(..read).unwrap_or_default()),
                _ => return Err(SettleError),
            }
        }
    }

    /// Goes through the whole messages in `carry`. False if there was an error among them.
    fn take_replies(&mut self) -> Result<bool, SettleError> {
        let mut at = 0;
        let mut clean = true;
        loop {
            let rest = self.carry.get(at..).unwrap_or_default();
            let used = match self.scanner.next(rest).map_err(|_| SettleError)? {
                Scanned::Short => break,
                Scanned::Inside { len } => len,
                Scanned::Whole { tag, body } => {
                    let tag = Tag::from_byte(tag).map_err(|_| SettleError)?;
                    clean &= tag != Tag::ErrorResponse;
                    let used = HEADER + body.len();
                    match tag {
                        Tag::ErrorResponse if Fields::parse(body).map_or(true, |fields| fields.is_fatal()) => {
                            return Err(SettleError);
                        }
                        Tag::ErrorResponse => {
                            let doubtful = &mut self.doubtful;
                            self.pipeline
                                .error(|owed| {
                                    if owed.expect == Expect::Parse && owed.note != 0 {
                                        doubtful.insert(owed.note);
                                    }
                                })
                                .map_err(|_| SettleError)?;
                        }
                        Tag::ReadyForQuery => {
                            let status = TxStatus::parse(body).map_err(|_| SettleError)?;
                            self.pipeline.ready(status).map_err(|_| SettleError)?;
                        }
                        tag => drop(self.pipeline.reply(tag).map_err(|_| SettleError)?),
                    }
                    while self.pipeline.next_local().is_some() {}
                    used
                }
                Scanned::Part { tag, body_len, seen } => {
                    // Rows and data are passed over as they come; what has to be read is waited for.
                    let tag = Tag::from_byte(tag).map_err(|_| SettleError)?;
                    if !matches!(tag, Tag::DataRow | Tag::CopyData) {
                        break;
                    }
                    let seen = seen.len();
                    self.pipeline.reply(tag).map_err(|_| SettleError)?;
                    self.scanner.stream(body_len, seen);
                    HEADER + seen
                }
            };
            at += used;
        }
        self.carry.drain(..at);
        Ok(clean)
    }
}

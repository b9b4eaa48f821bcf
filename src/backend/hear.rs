//! A server connection that listens: nothing else is asked of it than to listen, and what it says is heard at any time.

use std::task::{Context, Poll};

use pgweir_proto::backend::{Tag, TxStatus};
use pgweir_proto::encode;
use pgweir_proto::error::Fields;
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::{HEADER, Scanned};

use super::{ServerConn, SettleError, Unnamed, longest};

impl ServerConn {
    /// Sends a simple query of ours, which [`Self::poll_hear`] hears the end of.
    ///
    /// # Errors
    ///
    /// [`SettleError`]: the connection is lost.
    pub async fn say(&mut self, text: &[u8]) -> Result<(), SettleError> {
        let mut out = Vec::new();
        encode::query(&mut out, text);
        self.pipeline.sent(Expect::Query, Origin::Pooler, 0);
        self.unnamed = Unnamed::Empty;
        self.send(&out).await
    }

    /// Reads once, and hands the body of each notification to `notified`. Pending as long as the server says nothing; false
    /// if a query of ours has failed.
    ///
    /// # Errors
    ///
    /// [`SettleError`]: the connection is lost or out of step.
    pub fn poll_hear(
        &mut self,
        cx: &mut Context<'_>,
        mut notified: impl FnMut(&[u8]),
    ) -> Poll<Result<bool, SettleError>> {
        if !self.unsent.is_empty() && self.flush(cx).is_err() {
            return Poll::Ready(Err(SettleError));
        }
        let mut buf = [0; 4096];
        match self.poll_read(cx, &mut buf) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(read)) if read > 0 => self.carry.extend_from_slice(buf.get(..read).unwrap_or_default()),
            Poll::Ready(_) => return Poll::Ready(Err(SettleError)),
        }
        let (mut at, mut well) = (0, true);
        loop {
            let rest = self.carry.get(at..).unwrap_or_default();
            match self.scanner.next(rest) {
                Ok(Scanned::Short) => break,
                Ok(Scanned::Part { tag, body_len, .. }) => match Tag::from_byte(tag) {
                    Ok(tag) if body_len <= longest(tag) => break,
                    _ => return Poll::Ready(Err(SettleError)),
                },
                Ok(Scanned::Whole { tag, body }) => {
                    let Ok(tag) = Tag::from_byte(tag) else { return Poll::Ready(Err(SettleError)) };
                    at += HEADER + body.len();
                    let status = if tag == Tag::ReadyForQuery { TxStatus::parse(body).ok() } else { None };
                    let is_error = tag == Tag::ErrorResponse;
                    let is_fatal = is_error && Fields::parse(body).map_or(true, |fields| fields.is_fatal());
                    well &= !is_error;
                    self.encodings.hear(tag, body);
                    if tag == Tag::NotificationResponse {
                        notified(body);
                    } else if self.take_reply(tag, status, is_fatal).is_err() {
                        return Poll::Ready(Err(SettleError));
                    }
                }
                Ok(Scanned::Inside { .. }) | Err(_) => return Poll::Ready(Err(SettleError)),
            }
        }
        self.carry.drain(..at);
        Poll::Ready(Ok(well))
    }
}

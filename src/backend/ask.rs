//! A question of our own with one parameter: by the extended protocol, so that the parameter is never part of the text.

use std::future::poll_fn;
use std::task::Poll;

use pgweir_proto::backend::{Tag, TxStatus};
use pgweir_proto::encode;
use pgweir_proto::error::Fields;
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::{HEADER, Scanned};

use super::{ServerConn, SettleError, Unnamed, describe_error, row_columns};

/// The most that an answer may be; bytes. More, and the connection is given up.
const ANSWER_MAX: usize = 64 * 1024;

/// What a question was answered with.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// How many columns there are; 0 if the question is none that has rows.
    pub columns: u16,
    /// The first rows, as many as were asked for; a NULL is none.
    pub rows: Vec<Vec<Option<Vec<u8>>>>,
    /// The error in place of an answer: SQLSTATE and message.
    pub error: Option<(String, String)>,
}

impl ServerConn {
    /// Asks an idle connection, for the first `rows` rows as text.
    ///
    /// # Errors
    ///
    /// [`SettleError`]: the connection is lost, out of step, or has said more than 64 KiB.
    pub async fn ask(&mut self, text: &str, parameter: &[u8], rows: u32) -> Result<Answer, SettleError> {
        let mut out = Vec::new();
        encode::parse(&mut out, b"", text.as_bytes(), &[0, 0]);
        encode::message(&mut out, b'B', |out| {
            // The unnamed portal and statement; no formats, one parameter, no formats: all is text.
            out.extend_from_slice(&[0, 0, 0, 0, 0, 1]);
            out.extend_from_slice(&u32::try_from(parameter.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(parameter);
            out.extend_from_slice(&[0, 0]);
        });
        encode::message(&mut out, b'D', |out| out.extend_from_slice(b"P\0"));
        encode::message(&mut out, b'E', |out| {
            out.push(0);
            out.extend_from_slice(&rows.to_be_bytes());
        });
        out.extend_from_slice(&encode::SYNC);
        for expect in [Expect::Parse, Expect::Bind, Expect::Describe, Expect::Execute, Expect::Sync] {
            self.pipeline.sent(expect, Origin::Pooler, 0);
        }
        self.unnamed = Unnamed::Unknown;
        self.send(&out).await?;
        let mut answer = Answer::default();
        let mut heard = 0;
        let mut buf = vec![0; 4096];
        loop {
            self.take_answer(&mut answer)?;
            if self.pipeline.is_settled() && self.unsent.is_empty() && self.carry.is_empty() {
                return Ok(answer);
            }
            let read = poll_fn(|cx| {
                if !self.unsent.is_empty() && self.flush(cx).is_err() {
                    return Poll::Ready(Ok(0));
                }
                self.poll_read(cx, &mut buf)
            });
            let read = read.await.unwrap_or(0);
            heard += read;
            if read == 0 || heard > ANSWER_MAX {
                return Err(SettleError);
            }
            self.carry.extend_from_slice(buf.get(..read).unwrap_or_default());
        }
    }

    /// Runs one simple query of ours on an idle connection and hands each row's body to `row`. False if it fails.
    ///
    /// # Errors
    ///
    /// [`SettleError`]: the connection is lost, out of step, or has said more than `limit` bytes.
    pub async fn gather(&mut self, text: &str, limit: usize, row: impl FnMut(&[u8])) -> Result<bool, SettleError> {
        let well = self.gather_in_transaction(text, limit, row).await?;
        if self.pipeline.is_free() { Ok(well) } else { Err(SettleError) }
    }

    /// The same, and a transaction may be open behind it.
    ///
    /// # Errors
    ///
    /// [`SettleError`]: the connection is lost, out of step, or has said more than `limit` bytes.
    pub async fn gather_in_transaction(
        &mut self,
        text: &str,
        limit: usize,
        mut row: impl FnMut(&[u8]),
    ) -> Result<bool, SettleError> {
        let mut out = Vec::new();
        encode::query(&mut out, text.as_bytes());
        self.pipeline.sent(Expect::Query, Origin::Pooler, 0);
        self.unnamed = Unnamed::Empty;
        self.send(&out).await?;
        let (mut well, mut heard, mut buf) = (true, 0, vec![0; 16 * 1024]);
        loop {
            tokio::task::consume_budget().await;
            let mut at = 0;
            while let Scanned::Whole { tag, body } =
                self.scanner.next(self.carry.get(at..).unwrap_or_default()).map_err(|_| SettleError)?
            {
                let tag = Tag::from_byte(tag).map_err(|_| SettleError)?;
                at += HEADER + body.len();
                let (mut status, mut fatal) = (None, false);
                match tag {
                    Tag::DataRow => row(body),
                    Tag::ErrorResponse => {
                        fatal = Fields::parse(body).map_or(true, |fields| fields.is_fatal());
                        well = false;
                    }
                    Tag::ReadyForQuery => status = TxStatus::parse(body).ok(),
                    _ => {}
                }
                self.encodings.hear(tag, body);
                self.take_reply(tag, status, fatal)?;
            }
            self.carry.drain(..at);
            if self.pipeline.is_settled() && self.unsent.is_empty() && self.carry.is_empty() {
                return Ok(well);
            }
            let read = poll_fn(|cx| {
                if !self.unsent.is_empty() && self.flush(cx).is_err() {
                    return Poll::Ready(Ok(0));
                }
                self.poll_read(cx, &mut buf)
            });
            let read = read.await.unwrap_or(0);
            heard += read;
            if read == 0 || heard > limit {
                return Err(SettleError);
            }
            self.carry.extend_from_slice(buf.get(..read).unwrap_or_default());
        }
    }

    /// Goes through the whole messages in `carry`.
    fn take_answer(&mut self, answer: &mut Answer) -> Result<(), SettleError> {
        let mut at = 0;
        loop {
            let rest = self.carry.get(at..).unwrap_or_default();
            let Scanned::Whole { tag, body } = self.scanner.next(rest).map_err(|_| SettleError)? else {
                break;
            };
            let tag = Tag::from_byte(tag).map_err(|_| SettleError)?;
            let used = HEADER + body.len();
            let (mut status, mut fatal) = (None, false);
            match tag {
                Tag::RowDescription => {
                    answer.columns = body.first_chunk().map_or(0, |count| u16::from_be_bytes(*count));
                }
                Tag::DataRow => answer.rows.push(row_columns(body).map(|value| value.map(<[u8]>::to_vec)).collect()),
                Tag::ErrorResponse => {
                    fatal = Fields::parse(body).map_or(true, |fields| fields.is_fatal());
                    answer.error.get_or_insert_with(|| describe_error(body));
                }
                Tag::ReadyForQuery => status = TxStatus::parse(body).ok(),
                _ => {}
            }
            self.encodings.hear(tag, body);
            self.take_reply(tag, status, fatal)?;
            at += used;
        }
        self.carry.drain(..at);
        Ok(())
    }
}

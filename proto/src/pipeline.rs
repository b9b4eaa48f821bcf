//! What a server still owes: the replies to everything sent to it, in order.

use std::collections::VecDeque;

use crate::backend::{Tag, TxStatus};

/// What was sent, named for the reply it earns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// `Query`: anything up to `ReadyForQuery`.
    Query,
    /// `Sync`: `ReadyForQuery`, perhaps after an error of the commit.
    Sync,
    /// `FunctionCall`: anything up to `ReadyForQuery`.
    FunctionCall,
    /// `Parse`: `ParseComplete`.
    Parse,
    /// `Bind`: `BindComplete`.
    Bind,
    /// `Describe` of a statement or portal: `RowDescription` or `NoData` at its end.
    Describe,
    /// `Execute`: up to `CommandComplete`, `EmptyQueryResponse` or `PortalSuspended`.
    Execute,
    /// `Close`: `CloseComplete`.
    Close,
    /// `CopyDone` or `CopyFail`: nothing; it marks where a COPY FROM STDIN ended.
    CopyEnd,
}

/// Who asked, and so who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The client sent it: replies are forwarded.
    Client,
    /// The pooler put it in: replies are swallowed, an error is the client's next one.
    Pooler,
    /// Nothing was sent: the pooler answers itself, when the turn comes.
    Local,
}

/// One entry of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owed {
    /// What it waits for.
    pub expect: Expect,
    /// Who asked.
    pub origin: Origin,
    /// The caller's own remark, given back when the entry leaves the queue.
    pub note: u64,
}
const _: () = assert!(size_of::<Owed>() <= 16);

/// A reply that fits nothing the server was asked: the connection must be closed, not pooled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server sent message type {tag:#04x} out of turn")]
pub struct Unexpected {
    /// The message's tag.
    pub tag: u8,
}

/// What a reply means to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Whose answer it is. Only [`Origin::Client`]'s go on to the client.
    pub origin: Origin,
    /// The entry that this reply settled.
    pub done: Option<Owed>,
}

/// The pipeline of one server connection.
///
/// ```text
/// Running ──ErrorResponse to an extended message──▶ Skipping (until a Sync is sent)
///    ▲                                                 │
///    └──────────────── Sync sent ◀─────────────────────┘
/// ```
///
/// While skipping, the server discards everything but `Sync`, and so nothing else is entered. During
/// COPY FROM STDIN the server discards `Flush` and `Sync`, and so those that were sent behind the
/// statement are taken out when `CopyInResponse` tells of it.
///
/// If the COPY fails, nothing tells whether it had read these `Sync`s already: each that it had not
/// is answered after all. So a `ReadyForQuery` too many is [taken](Pipeline::ready) for one of
/// them, until an answer to something sent later shows that all have come; and until then the
/// connection is not [certain](Pipeline::is_certain).
///
/// Source: `PostgreSQL` 17 docs, §54.2.3 "Extended Query", §54.2.4 "Pipelining", §54.2.6 "COPY
/// Operations".
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "facts that the state drawn above does not tell")]
pub struct Pipeline {
    owed: VecDeque<Owed>,
    /// `ReadyForQuery`s among `owed`.
    ready_owed: u32,
    /// Entries among `owed` that are the pooler's to answer: while there are none, nothing has to be looked at for one.
    locals: u32,
    /// The last `ReadyForQuery`'s word.
    status: TxStatus,
    /// Extended-protocol messages were sent since the last message that earns a `ReadyForQuery`.
    batch_open: bool,
    /// The server discards messages until the next `Sync`.
    skipping: bool,
    /// The server reads COPY data, and its end was not sent yet.
    copy_in: bool,
    /// The `Query` or `FunctionCall` at the front has had an answer: its `ReadyForQuery` may come.
    answered: bool,
    /// `Sync`s that the present COPY reads and discards, unless it fails before.
    eaten: u32,
    /// `Sync`s of a COPY that failed: each may be answered or not.
    stray: u32,
    /// While skipping and with strays, something was sent that the server may not skip: nothing that
    /// comes from now on can be told apart.
    lost: bool,
}

impl Pipeline {
    /// Nothing is owed, no batch is open: the next message starts afresh. Whether a transaction is
    /// open is another question: see [`Self::is_free`].
    #[must_use]
    #[inline]
    pub fn is_settled(&self) -> bool {
        self.owed.is_empty() && !self.batch_open && !self.skipping && !self.copy_in
    }

    /// Nothing is owed and no transaction is open: the connection may be lent on.
    #[must_use]
    #[inline]
    pub fn is_free(&self) -> bool {
        self.is_settled() && self.status == TxStatus::Idle
    }

    /// Whether no `ReadyForQuery` may come that nothing in the queue stands for. If one may, a query
    /// of the pooler's own makes it certain; before, the connection must not be lent on.
    #[must_use]
    #[inline]
    pub const fn is_certain(&self) -> bool {
        self.stray == 0 && !self.lost
    }

    /// The transaction status of the last `ReadyForQuery`.
    #[must_use]
    #[inline]
    pub const fn status(&self) -> TxStatus {
        self.status
    }

    /// Entries in the queue.
    #[must_use]
    #[inline]
    pub fn depth(&self) -> usize {
        self.owed.len()
    }

    /// `ReadyForQuery`s still to come.
    #[must_use]
    pub const fn ready_owed(&self) -> u32 {
        self.ready_owed
    }

    /// Whether messages sent now are discarded by the server until a `Sync`.
    #[must_use]
    #[inline]
    pub const fn is_skipping(&self) -> bool {
        self.skipping
    }

    /// Whether extended-protocol messages wait for their `Sync`.
    #[must_use]
    #[inline]
    pub const fn is_batch_open(&self) -> bool {
        self.batch_open
    }

    /// Whether the server reads COPY data.
    #[must_use]
    pub const fn is_copy_in(&self) -> bool {
        self.copy_in
    }

    /// What the status will be for a message sent now, if that is certain: no `ReadyForQuery` is
    /// on its way, and nothing is being skipped.
    #[must_use]
    #[inline]
    pub const fn certain_status(&self) -> Option<TxStatus> {
        if self.ready_owed == 0 && !self.skipping { Some(self.status) } else { None }
    }

    /// A message was sent (or, for [`Origin::Local`], will be answered here). False if the server
    /// discards it: then nothing was entered and nothing will come back.
    #[inline]
    pub fn sent(&mut self, expect: Expect, origin: Origin, note: u64) -> bool {
        match expect {
            Expect::Sync if self.copy_in => {
                self.eaten += 1;
                return false;
            }
            Expect::Sync => {
                self.skipping = false;
                self.batch_open = false;
                self.ready_owed += 1;
            }
            Expect::CopyEnd if self.copy_in => {
                self.copy_in = false;
                return true;
            }
            // Data after a failed COPY is ignored by the server; ahead of a `CopyInResponse` that
            // is still on its way it is what ends it.
            Expect::CopyEnd if self.skipping || self.owed.is_empty() => return false,
            Expect::CopyEnd => {}
            _ if self.skipping => {
                self.lost |= self.stray > 0;
                return false;
            }
            Expect::Query | Expect::FunctionCall => {
                self.batch_open = false;
                self.ready_owed += 1;
            }
            _ => self.batch_open = true,
        }
        if origin == Origin::Local {
            self.locals += 1;
        } else {
            // Not a message that a COPY reads: it has ended, or its connection ends with this.
            self.copy_in = false;
        }
        self.owed.push_back(Owed { expect, origin, note });
        true
    }

    /// A message other than `ErrorResponse` and `ReadyForQuery` arrived.
    ///
    /// # Errors
    ///
    /// [`Unexpected`]: the server answers what it was not asked.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "once for every message of every answer")]
    pub fn reply(&mut self, tag: Tag) -> Result<Reply, Unexpected> {
        let unexpected = Unexpected { tag: tag as u8 };
        if matches!(tag, Tag::NoticeResponse | Tag::ParameterStatus | Tag::NotificationResponse) {
            let origin = self.owed.front().map_or(Origin::Client, |owed| owed.origin);
            return Ok(Reply { origin, done: None });
        }
        let front = *self.owed.front().filter(|_| !self.lost).ok_or(unexpected)?;
        let settles = match front.expect {
            Expect::Query | Expect::FunctionCall => match tag {
                Tag::DataRow
                | Tag::CommandComplete
                | Tag::RowDescription
                | Tag::EmptyQueryResponse
                | Tag::CopyData
                | Tag::CopyDone
                | Tag::CopyOutResponse => false,
                Tag::FunctionCallResponse if front.expect == Expect::FunctionCall => false,
                Tag::CopyInResponse => {
                    self.begin_copy_in();
                    false
                }
                _ => return Err(unexpected),
            },
            Expect::Execute => match tag {
                Tag::DataRow | Tag::CopyData | Tag::CopyDone | Tag::CopyOutResponse => false,
                Tag::CommandComplete | Tag::EmptyQueryResponse | Tag::PortalSuspended => true,
                Tag::CopyInResponse => {
                    self.begin_copy_in();
                    false
                }
                _ => return Err(unexpected),
            },
            Expect::Parse if tag == Tag::ParseComplete => true,
            Expect::Bind if tag == Tag::BindComplete => true,
            Expect::Close if tag == Tag::CloseComplete => true,
            Expect::Describe => match tag {
                Tag::RowDescription | Tag::NoData => true,
                Tag::ParameterDescription => false,
                _ => return Err(unexpected),
            },
            _ => return Err(unexpected),
        };
        self.stray = 0;
        self.answered = true;
        if tag == Tag::CommandComplete {
            self.eaten = 0;
        }
        let done = if settles { self.pop() } else { None };
        Ok(Reply { origin: front.origin, done })
    }

    /// A `ReadyForQuery` arrived. One that answers a `Sync` of a failed COPY settles no entry.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] if none was due.
    #[inline]
    pub fn ready(&mut self, status: TxStatus) -> Result<Reply, Unexpected> {
        let front = match self.owed.front() {
            Some(sync) if sync.expect == Expect::Sync => *sync,
            Some(query) if query.earns_ready() && self.answered => *query,
            _ => return self.stray_ready(status),
        };
        self.status = status;
        self.ready_owed = self.ready_owed.saturating_sub(1);
        self.copy_in = false;
        let done = self.pop();
        Ok(Reply { origin: front.origin, done })
    }

    #[cold]
    fn stray_ready(&mut self, status: TxStatus) -> Result<Reply, Unexpected> {
        if self.lost {
            return Err(Unexpected { tag: b'Z' });
        }
        self.stray = self.stray.checked_sub(1).ok_or(Unexpected { tag: b'Z' })?;
        self.status = status;
        self.skipping = false;
        if self.owed.is_empty() {
            self.batch_open = false;
        }
        Ok(Reply { origin: Origin::Client, done: None })
    }

    /// An `ErrorResponse` that leaves the connection alive arrived. Entries that will now never be
    /// answered are given to `undone` in their order, the failed one first.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] if nothing was owed; or if it is not certain what the server makes of the rest,
    /// because it is that of a COPY, and neither data nor its end.
    pub fn error(&mut self, mut undone: impl FnMut(Owed)) -> Result<Reply, Unexpected> {
        let front = *self.owed.front().filter(|_| !self.lost).ok_or(Unexpected { tag: b'E' })?;
        self.copy_in = false;
        self.stray = std::mem::take(&mut self.eaten);
        self.answered = front.earns_ready();
        if self.answered {
            return Ok(Reply { origin: front.origin, done: None });
        }
        let mut behind = self.owed.iter().skip(1).take_while(|owed| owed.expect != Expect::Sync);
        if self.stray > 0 && behind.any(|owed| owed.expect != Expect::CopyEnd && owed.origin != Origin::Local) {
            return Err(Unexpected { tag: b'E' });
        }
        while let Some(owed) = self.owed.front().copied() {
            if owed.expect == Expect::Sync {
                return Ok(Reply { origin: front.origin, done: None });
            }
            if matches!(owed.expect, Expect::Query | Expect::FunctionCall) {
                self.ready_owed = self.ready_owed.saturating_sub(1);
            }
            self.owed.pop_front();
            self.forget(owed);
            undone(owed);
        }
        self.skipping = true;
        self.batch_open = true;
        Ok(Reply { origin: front.origin, done: None })
    }

    /// The next entry if it is the pooler's to answer, taken out. To be called, until it gives
    /// nothing, whenever an entry was made or settled.
    #[inline]
    pub fn next_local(&mut self) -> Option<Owed> {
        if self.locals == 0 {
            return None;
        }
        match self.owed.front() {
            Some(Owed { origin: Origin::Local, .. }) => self.pop(),
            _ => None,
        }
    }

    /// Whether any answer is the pooler's to give.
    #[must_use]
    #[inline]
    pub const fn has_locals(&self) -> bool {
        self.locals > 0
    }

    /// The entry whose answer is on its way.
    #[must_use]
    pub fn front(&self) -> Option<Owed> {
        self.owed.front().copied()
    }

    /// The connection is lost: all that was owed, in order. Afterwards nothing is owed.
    pub fn abandon(&mut self) -> impl Iterator<Item = Owed> + '_ {
        self.ready_owed = 0;
        self.locals = 0;
        self.copy_in = false;
        (self.answered, self.eaten, self.stray, self.lost) = (false, 0, 0, false);
        self.owed.drain(..)
    }

    /// All that is owed, in order.
    pub fn iter(&self) -> impl Iterator<Item = Owed> + '_ {
        self.owed.iter().copied()
    }

    #[inline]
    fn forget(&mut self, gone: Owed) {
        if gone.origin == Origin::Local {
            self.locals = self.locals.saturating_sub(1);
        }
    }

    #[inline]
    fn pop(&mut self) -> Option<Owed> {
        let done = self.owed.pop_front();
        if let Some(owed) = done {
            self.forget(owed);
        }
        self.answered = false;
        // The end of a COPY that never began (its statement failed or was none) earns nothing.
        while matches!(self.owed.front(), Some(Owed { expect: Expect::CopyEnd, .. })) {
            self.owed.pop_front();
        }
        done
    }

    /// `CopyInResponse`: what was sent behind the statement up to the end of its data was read by
    /// the COPY, which ignores `Sync`.
    fn begin_copy_in(&mut self) {
        let mut at = 1;
        self.copy_in = true;
        while let Some(owed) = self.owed.get(at) {
            match owed.expect {
                Expect::Sync => {
                    self.owed.remove(at);
                    self.eaten += 1;
                    self.ready_owed = self.ready_owed.saturating_sub(1);
                }
                Expect::CopyEnd => {
                    self.owed.remove(at);
                    self.copy_in = false;
                    break;
                }
                _ if owed.origin == Origin::Local => at += 1,
                // The COPY ends the connection when it reads this.
                _ => {
                    self.copy_in = false;
                    break;
                }
            }
        }
        // What came behind is counted as it was entered: it runs, should the COPY fail.
        let behind = self.owed.iter().rev().take_while(|o| !o.earns_ready()).any(|o| o.expect != Expect::CopyEnd);
        let of_batch = self.copy_in && self.owed.front().is_some_and(|front| !front.earns_ready());
        self.batch_open = behind || of_batch;
    }
}

impl Owed {
    /// Whether a `ReadyForQuery` ends its answer.
    #[must_use]
    pub const fn earns_ready(&self) -> bool {
        matches!(self.expect, Expect::Query | Expect::Sync | Expect::FunctionCall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Expect::*;
    use Origin::*;

    fn sent(pipeline: &mut Pipeline, all: &[Expect]) {
        for (n, expect) in all.iter().enumerate() {
            pipeline.sent(*expect, Client, u64::try_from(n).unwrap());
        }
    }

    #[test]
    fn a_simple_query_frees_the_connection_at_its_ready() {
        let mut p = Pipeline::default();
        assert!(p.is_free());
        sent(&mut p, &[Query]);
        assert!(!p.is_settled());
        for tag in [Tag::RowDescription, Tag::DataRow, Tag::CommandComplete] {
            assert_eq!(p.reply(tag).unwrap().done, None);
        }
        p.ready(TxStatus::Open).unwrap();
        assert!(p.is_settled() && !p.is_free());
        sent(&mut p, &[Query]);
        p.reply(Tag::CommandComplete).unwrap();
        p.ready(TxStatus::Idle).unwrap();
        assert!(p.is_free());
    }

    #[test]
    fn an_unsynced_batch_keeps_the_connection_whatever_was_answered() {
        let mut p = Pipeline::default();
        sent(&mut p, &[Parse]);
        p.reply(Tag::ParseComplete).unwrap();
        assert!(!p.is_settled());
        sent(&mut p, &[Sync]);
        p.ready(TxStatus::Idle).unwrap();
        assert!(p.is_free());
    }

    #[test]
    fn an_error_takes_everything_up_to_the_sync() {
        let mut p = Pipeline::default();
        sent(&mut p, &[Parse, Bind, Execute, Sync, Bind, Execute, Sync]);
        p.reply(Tag::ParseComplete).unwrap();
        let mut undone = Vec::new();
        p.error(|o| undone.push(o.expect)).unwrap();
        assert_eq!(undone, [Bind, Execute]);
        p.ready(TxStatus::Idle).unwrap();
        assert!(!p.is_settled());
        p.reply(Tag::BindComplete).unwrap();
        p.reply(Tag::CommandComplete).unwrap();
        p.ready(TxStatus::Idle).unwrap();
        assert!(p.is_free());
    }

    #[test]
    fn after_an_error_without_a_sync_the_server_skips_to_it() {
        let mut p = Pipeline::default();
        sent(&mut p, &[Parse]);
        p.error(|_| {}).unwrap();
        assert!(p.is_skipping() && !p.is_settled());
        assert!(!p.sent(Bind, Client, 0));
        assert!(!p.sent(Query, Client, 0));
        assert!(p.sent(Sync, Client, 0));
        p.ready(TxStatus::Idle).unwrap();
        assert!(p.is_free());
    }

    #[test]
    fn a_sync_sent_ahead_of_copy_data_is_not_waited_for() {
        let mut p = Pipeline::default();
        sent(&mut p, &[Parse, Bind, Execute, Sync]);
        p.reply(Tag::ParseComplete).unwrap();
        p.reply(Tag::BindComplete).unwrap();
        p.reply(Tag::CopyInResponse).unwrap();
        assert!(p.is_copy_in() && p.ready_owed() == 0);
        assert!(!p.sent(Sync, Client, 0));
        sent(&mut p, &[CopyEnd, Sync]);
        p.reply(Tag::CommandComplete).unwrap();
        p.ready(TxStatus::Idle).unwrap();
        assert!(p.is_free());
    }

    #[test]
    fn copy_data_sent_blindly_before_its_response_is_counted_right() {
        let mut p = Pipeline::default();
        sent(&mut p, &[Query, CopyEnd, Query]);
        p.reply(Tag::CopyInResponse).unwrap();
        assert!(!p.is_copy_in());
        p.reply(Tag::CommandComplete).unwrap();
        p.ready(TxStatus::Idle).unwrap();
        p.reply(Tag::CommandComplete).unwrap();
        p.ready(TxStatus::Idle).unwrap();
        assert!(p.is_free());
    }

    #[test]
    fn a_failed_copy_forgets_that_its_data_has_an_end() {
        let mut p = Pipeline::default();
        sent(&mut p, &[Query]);
        p.reply(Tag::CopyInResponse).unwrap();
        p.error(|_| {}).unwrap();
        p.ready(TxStatus::Idle).unwrap();
        assert!(p.is_free());
        assert!(!p.sent(CopyEnd, Client, 0));
        assert!(p.is_free());
    }

    #[test]
    fn a_sync_that_a_failed_copy_had_not_read_is_answered_after_all() {
        let mut p = Pipeline::default();
        // Data with a fault in it goes between the first two.
        sent(&mut p, &[Execute, Sync, CopyEnd, Sync]);
        p.reply(Tag::CopyInResponse).unwrap();
        assert!(p.is_certain());
        p.error(|_| {}).unwrap();
        p.ready(TxStatus::Idle).unwrap();
        assert!(p.is_free() && !p.is_certain(), "one more may come");
        p.sent(Query, Pooler, 7);
        assert_eq!(p.ready(TxStatus::Idle), Ok(Reply { origin: Client, done: None }));
        assert!(p.ready(TxStatus::Idle).is_err(), "two more are too many");
        assert_eq!(p.reply(Tag::EmptyQueryResponse).map(|reply| reply.origin), Ok(Pooler));
        assert_eq!(p.ready(TxStatus::Idle).unwrap().done.map(|owed| owed.note), Some(7));
        assert!(p.is_free() && p.is_certain());
    }

    #[test]
    fn a_query_is_not_over_before_it_was_answered() {
        let mut p = Pipeline::default();
        sent(&mut p, &[Query]);
        assert!(p.ready(TxStatus::Idle).is_err());
    }

    #[test]
    fn local_answers_wait_their_turn_and_die_with_an_error() {
        let mut p = Pipeline::default();
        sent(&mut p, &[Bind]);
        p.sent(Parse, Local, 7);
        assert_eq!(p.next_local(), None);
        p.reply(Tag::BindComplete).unwrap();
        assert_eq!(p.next_local().map(|o| o.note), Some(7));
        sent(&mut p, &[Bind]);
        p.sent(Parse, Local, 8);
        p.error(|_| {}).unwrap();
        assert_eq!(p.next_local(), None);
    }

    #[test]
    fn a_reply_out_of_turn_is_an_error() {
        #[rustfmt::skip]
        let table: [(&str, &[Expect], Tag); 5] = [
            ("nothing owed",        &[],        Tag::DataRow),
            ("row for a parse",     &[Parse],   Tag::DataRow),
            ("bind for a parse",    &[Parse],   Tag::BindComplete),
            ("login word",          &[Query],   Tag::Authentication),
            ("copy for a describe", &[Describe],Tag::CopyInResponse),
        ];
        for (name, all, tag) in table {
            let mut p = Pipeline::default();
            sent(&mut p, all);
            assert!(p.reply(tag).is_err(), "{name}");
        }
        let mut p = Pipeline::default();
        assert!(p.ready(TxStatus::Idle).is_err());
        sent(&mut p, &[Bind, Sync]);
        assert!(p.ready(TxStatus::Idle).is_err());
    }
}

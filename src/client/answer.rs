//! From server to client: what becomes of each message. Pure: bytes in, decisions out.

mod reported;
mod spliced;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

use pgweir_proto::backend::{self, Tag, TxStatus};
use pgweir_proto::encode;
use pgweir_proto::error::Fields;
use pgweir_proto::pipeline::{Expect, Origin, Owed, Pipeline, Reply};
use pgweir_proto::scanner::{HEADER, Scanned};

use super::local::Failure;
use super::plan::Plan;
use super::request::Marks;
use super::statements::Statements;
use super::verdict::may_do_elsewhere;
use crate::backend::{Lost, ServerConn, longest, row_columns};
use crate::clock::Moment;
use crate::prepared::{
    AUDIT, CHANGES, DESCRIBES, Described, LENT, Leavings, MARK, NAMED, NAMES, NO_MEMORY, ORIGINAL, Prefix, REFUSED,
    REPLAY, RESTORE, SPLICED, STALE, STRIPPED, UNNAMED, named_id, notes, statement_id,
};
use crate::settings::{self, Entry, Profile};
use crate::state::{Findings, Subscriber, channel};
use crate::stats::{Blame, PinReason, PoolStats};

/// A row that tells a name is no longer than this; bytes.
const NAME_ROW_MAX: u32 = 4096;

/// Cancelled audits in a row after which the connection stays with its client.
const AUDIT_TRIES: u8 = 3;

/// Why reading the server's messages stopped.
#[derive(Clone, Debug)]
pub enum Heard {
    /// At the end of the input, or in front of an incomplete message.
    Short,
    /// The server is lost to us.
    Lost(Lost),
    /// The settings could not be replayed; the body of the server's error.
    ReplayFailed(Box<[u8]>),
    /// A transaction block was opened in statement mode.
    TransactionBlock,
    /// The batch failed for want of a statement that the server had lost, and nobody was told: it is to run again.
    Again,
}

/// Why a batch that went to a follower is to run on the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unserved {
    /// The server said that it is no follower any more.
    Promoted,
    /// A statement of the batch is not what it was on that server connection: any server may say so.
    Stale,
    /// It failed with this SQLSTATE.
    Failed([u8; 5]),
}

/// The pooler's own conversation with the server, between the client's.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
pub struct Aside {
    /// An audit is on its way, and found this so far.
    pub audit: Option<Findings>,
    /// It only asks whether the server connection is as it is known to be.
    pub samples: bool,
    /// The audit is complete.
    pub audited: bool,
    /// It is because of what the client sent, not only because its server connection listens too.
    pub audits_client: bool,
    /// Audits in a row that were cancelled: by a cancel request of the client's that came late, or by its own
    /// `statement_timeout`.
    pub cancelled: u8,
    /// A replay of settings is on its way.
    pub replaying: bool,
    /// What is on its way is the reset of all settings behind an audit: nothing of the client's is.
    pub scrubbing: bool,
    /// The client's `ReadyForQuery` waits for that of a query of ours, which puts its start-up values back.
    pub ready_held: bool,
    /// What the server has reported meanwhile: the client is told with it.
    pub held: Vec<Entry>,
    /// What a client with start-up values was told of its settings in this lease.
    pub told: Vec<Entry>,
    /// The mark that was sent last has come: what follows it the hub brings, too.
    pub marked: bool,
    /// The client was told of a notification.
    pub notified: bool,
    /// The batch failed for want of a statement that the server had lost: it runs again when its `ReadyForQuery` has come.
    pub healing: bool,
    /// Why it runs again, if it was on a follower.
    pub unserved: Option<Unserved>,
    /// The first part of a description that is kept.
    pub described: Described,
    /// When the query that is answered next was sent.
    pub query_begun: Option<Moment>,
}

impl Aside {
    /// A lease begins: of what was told in others nobody knows whether it is still so.
    #[inline]
    pub fn begin_reports(&mut self) {
        if !(self.held.is_empty() && self.told.is_empty()) {
            (self.held, self.told) = (Vec::new(), Vec::new());
        }
    }

    /// Whether the server is at something of ours that no cancel request may hit, as far as it has said. What puts start-up values
    /// back stands behind a query of the client's: until that is answered a request is for that.
    #[must_use]
    pub fn bars_cancel(&self, pipeline: &Pipeline) -> bool {
        self.replaying || pipeline.front().is_some_and(|owed| owed.note == RESTORE)
    }

    /// A `ReadyForQuery` of the client's that was held back: it is owed still.
    #[must_use]
    pub fn held_sync(&self) -> Option<Owed> {
        self.ready_held.then_some(Owed { expect: Expect::Sync, origin: Origin::Client, note: 0 })
    }

    /// Whether an audit that nobody has looked at yet found that the server connection does not listen to a channel. What it brings
    /// of that is behind another LISTEN, of which the hub knows nothing.
    fn finds_left(&self, channel: &[u8]) -> bool {
        let found = self.audit.as_ref().filter(|_| self.audited);
        found.is_some_and(|found| !found.channels.iter().any(|name| **name == *channel))
    }
}

/// What a client is owed: what was held back of it first.
#[must_use]
pub fn owed(held: Option<Owed>, all: impl Iterator<Item = Owed>) -> Vec<Owed> {
    held.into_iter().chain(all.filter(|owed| owed.origin != Origin::Pooler)).collect()
}

/// What the client was told, in one turn, besides what the server answers to its batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Answers of ours.
    pub answers: usize,
    /// Bytes of these, and of what the server said on its own account.
    pub bytes: usize,
}

/// Everything that a server's message is judged by.
#[derive(Debug)]
pub struct Answer<'a> {
    /// The server connection.
    pub conn: &'a mut ServerConn,
    /// The client's statements.
    pub statements: &'a mut Statements,
    /// What the client's messages changed.
    pub marks: &'a mut Marks,
    /// What the pooler asked itself.
    pub aside: &'a mut Aside,
    /// What the pool counts.
    pub stats: &'a mut PoolStats,
    /// The client, if it listens by the hub.
    pub subscriber: Option<&'a Subscriber>,
    /// What the client began with.
    pub startup: &'a Profile,
    /// What holds for every message of this turn.
    pub rules: &'a Rules,
    /// Nothing yet.
    pub told: Told,
}

/// What holds for every message of one turn.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
pub struct Rules {
    /// The time.
    pub now: Moment,
    /// What the server-side names begin with.
    pub prefix: Prefix,
    /// A transaction block is an error.
    pub statement_mode: bool,
    /// `max_client_statements`, for the error of who is above it.
    pub statements_max: usize,
    /// The batch that is answered can be sent again, if nothing of it was done.
    pub heals: bool,
    /// It runs on a follower, and will on the primary if it fails here: nothing of its answer was told.
    pub elsewhere: bool,
    /// It may also run on the primary when it is not known whether it has run.
    pub harmless: bool,
    /// The server is a follower.
    pub follower: bool,
    /// The client was told of a BEGIN that the server has not run yet.
    pub owes_begin: bool,
    /// The process id that the client was told.
    pub pid: u32,
}

impl Answer<'_> {
    /// Goes through the input and plans what the client gets.
    pub fn inspect(&mut self, plan: &mut Plan<'_>) -> Heard {
        if self.rules.elsewhere {
            self.answer_late(plan);
        }
        loop {
            match self.conn.scanner.next(plan.rest()) {
                Ok(Scanned::Short) => return Heard::Short,
                Ok(Scanned::Inside { len }) => plan.forward(len),
                Ok(Scanned::Whole { tag, body }) => {
                    if let Err(heard) = self.whole(tag, body, plan) {
                        return heard;
                    }
                }
                Ok(Scanned::Part { tag, body_len, seen }) => match self.part(tag, body_len, seen.len(), plan) {
                    Ok(true) => {}
                    Ok(false) => return Heard::Short,
                    Err(heard) => return heard,
                },
                Err(_) => return Heard::Lost(Lost::Protocol),
            }
        }
    }

    /// Rows and data pass as they come; whatever has to be read is waited for.
    fn part(&mut self, tag: u8, body_len: u32, seen: usize, plan: &mut Plan<'_>) -> Result<bool, Heard> {
        let tag = Tag::from_byte(tag).map_err(|_| Heard::Lost(Lost::Protocol))?;
        let streams = matches!(tag, Tag::DataRow | Tag::CopyData | Tag::FunctionCallResponse);
        let may_be_ours = |owed: Owed| matches!(owed.note, NAMED | SPLICED) && body_len <= NAME_ROW_MAX;
        let is_read = |owed: Owed| owed.origin != Origin::Client || may_be_ours(owed);
        if !streams || self.conn.pipeline.front().is_some_and(is_read) {
            return if body_len > longest(tag) { Err(Heard::Lost(Lost::Protocol)) } else { Ok(false) };
        }
        self.conn.pipeline.reply(tag).map_err(|_| Heard::Lost(Lost::Protocol))?;
        self.conn.scanner.stream(body_len, seen);
        plan.forward(HEADER + seen);
        Ok(true)
    }

    #[inline]
    fn whole(&mut self, tag: u8, body: &[u8], plan: &mut Plan<'_>) -> Result<(), Heard> {
        let len = HEADER + body.len();
        let protocol = || Heard::Lost(Lost::Protocol);
        let tag = Tag::from_byte(tag).map_err(|_| protocol())?;
        let origin = match tag {
            Tag::ReadyForQuery => {
                let status = TxStatus::parse(body).map_err(|_| protocol())?;
                if std::mem::take(&mut self.aside.healing) {
                    self.conn.pipeline.ready(status).map_err(|_| protocol())?;
                    self.marks.changes.end_query();
                    plan.skip(len);
                    return Err(Heard::Again);
                }
                let held = std::mem::take(&mut self.aside.ready_held);
                let origin = self.ready(status)?;
                if held {
                    self.tell_reports(plan);
                    plan.insert(|out| encode::ready_for_query(out, status));
                }
                self.settled(origin, len, plan);
                return Ok(());
            }
            Tag::ErrorResponse => return self.error(body, len, plan),
            Tag::ParameterStatus | Tag::NotificationResponse | Tag::NoticeResponse => {
                return self.unasked(tag, body, len, plan);
            }
            tag => {
                let reply = self.conn.pipeline.reply(tag).map_err(|_| protocol())?;
                if let Some(done) = reply.done {
                    if notes(done.note, DESCRIBES) {
                        self.described(done, tag, body);
                    }
                    self.done(done);
                    self.settled(reply.origin, len, plan);
                    return Ok(());
                }
                if tag == Tag::ParameterDescription {
                    self.parameters(body);
                }
                if reply.origin == Origin::Pooler || self.marks.placing.tells {
                    self.look_at(tag, reply.origin, body, plan)
                } else {
                    reply.origin
                }
            }
        };
        if origin == Origin::Client {
            plan.forward(len);
        } else {
            plan.skip(len);
        }
        Ok(())
    }

    /// What a server may say at any time. A notice in front of the answer may be a part of it; what comes behind an error that
    /// nobody is told is not.
    #[cold]
    fn unasked(&mut self, tag: Tag, body: &[u8], len: usize, plan: &mut Plan<'_>) -> Result<(), Heard> {
        let before = plan.planned();
        let origin = match tag {
            Tag::ParameterStatus => {
                self.hear_encoding(tag, body);
                let origin = if self.rules.follower && self.is_followers_own(body, plan)? {
                    Origin::Pooler
                } else {
                    self.parameter()
                };
                let is_told = origin == Origin::Client
                    && (self.holds_report(body) || !self.conn.tag.is_empty() && self.untagged(body, plan));
                if is_told { Origin::Pooler } else { origin }
            }
            Tag::NotificationResponse if self.marks.listening => {
                self.notification(body, plan);
                self.told.bytes += plan.planned() - before;
                return Ok(());
            }
            // Not this client's: it never listened.
            Tag::NotificationResponse => Origin::Pooler,
            tag => {
                let origin = self.conn.pipeline.reply(tag).map_err(|_| Heard::Lost(Lost::Protocol))?.origin;
                if origin == Origin::Client && self.tells_spliced_notice(body, plan) { Origin::Pooler } else { origin }
            }
        };
        if origin == Origin::Client {
            plan.forward(len);
        } else {
            plan.skip(len);
        }
        if self.aside.healing {
            // Nothing, if all was forgotten.
            self.told.bytes += plan.planned().saturating_sub(before);
        }
        Ok(())
    }

    /// Nothing of what was decided so far is told.
    fn forget(&mut self, plan: &mut Plan<'_>) {
        plan.forget();
        self.told = Told::default();
    }

    /// A message that settled an entry: an answer of ours may be next.
    #[inline]
    fn settled(&mut self, origin: Origin, len: usize, plan: &mut Plan<'_>) {
        if origin == Origin::Client {
            plan.forward(len);
        } else {
            plan.skip(len);
        }
        self.answer_locally(plan);
    }

    /// Answers whose turn has come.
    #[inline]
    pub fn answer_locally(&mut self, plan: &mut Plan<'_>) {
        while let Some(owed) = self.conn.pipeline.next_local() {
            let message = if owed.expect == Expect::Close { encode::CLOSE_COMPLETE } else { encode::PARSE_COMPLETE };
            plan.insert(|out| out.extend_from_slice(&message));
            self.told.answers += 1;
            self.told.bytes += message.len();
            self.done(owed);
        }
    }

    /// What was not told at once.
    #[cold]
    fn answer_late(&mut self, plan: &mut Plan<'_>) {
        self.answer_locally(plan);
    }

    /// Something of a query that may deallocate statements of the client's has come to its end.
    #[cold]
    fn deallocated(&mut self, tag: Tag, body: &[u8]) {
        if tag == Tag::CommandComplete && self.conn.pipeline.front().is_some_and(|owed| owed.note == NAMES) {
            self.statements.deallocated(body.strip_suffix(b"\0").unwrap_or(body), &mut self.marks.changes);
        }
    }

    /// The same, and a query that may deallocate statements may have come to its end.
    #[cold]
    fn ready_by_name(&mut self, status: TxStatus) -> Result<Reply, Heard> {
        let reply = self.conn.pipeline.ready(status).map_err(|_| Heard::Lost(Lost::Protocol))?;
        if reply.done.is_some_and(|owed| owed.note == NAMES) {
            self.marks.changes.end_query();
        }
        Ok(reply)
    }

    fn ready(&mut self, status: TxStatus) -> Result<Origin, Heard> {
        let reply = if self.marks.changes.awaits_query() {
            self.ready_by_name(status)?
        } else {
            self.conn.pipeline.ready(status).map_err(|_| Heard::Lost(Lost::Protocol))?
        };
        if reply.origin == Origin::Client {
            if self.rules.statement_mode && status != TxStatus::Idle {
                return Err(Heard::TransactionBlock);
            }
            self.stats.queries += 1;
            let begun = self.aside.query_begun.replace(self.rules.now).unwrap_or(self.rules.now);
            self.stats.query.record(self.rules.now.since(begun));
            if status == TxStatus::Idle {
                self.stats.transactions += 1;
            }
            self.rests(status);
            if reply.done.is_some() && self.conn.pipeline.front().is_some_and(|next| next.note == RESTORE) {
                self.aside.ready_held = true;
                return Ok(Origin::Pooler);
            }
            return Ok(Origin::Client);
        }
        match reply.done.map(|owed| owed.note) {
            // Without findings it was cancelled, and is to be done again.
            Some(AUDIT) => self.aside.audited = self.aside.audit.is_some(),
            // Settings take several queries, and more of ours may be behind them.
            Some(MARK | REPLAY | ORIGINAL) => {
                let mut rest = self.conn.pipeline.iter();
                self.aside.replaying = rest.any(|owed| matches!(owed.note, MARK | REPLAY | ORIGINAL));
            }
            // They may be behind what the client was told last.
            Some(LENT | RESTORE) => self.rests(status),
            _ => {}
        }
        Ok(Origin::Pooler)
    }

    /// A batch was answered, and it may have been the last.
    #[inline]
    fn rests(&mut self, status: TxStatus) {
        if self.conn.pipeline.ready_owed() == 0 {
            self.marks.commit_sent = false;
            self.marks.begin_sent = false;
            if status == TxStatus::Idle && !self.conn.pipeline.is_batch_open() {
                self.marks.placing.end_portals();
            }
        }
    }

    /// The first part of a description.
    fn parameters(&mut self, body: &[u8]) {
        let described = Described::parameters(body);
        self.aside.described = described;
        let note = self.conn.pipeline.front().map_or(0, |owed| owed.note);
        if notes(note, DESCRIBES)
            && let Some(id) = statement_id(note)
        {
            self.statements.resolve(id, described, body);
        }
    }

    /// A statement of the client's was described: to it, or to us for its sake.
    fn described(&mut self, done: Owed, tag: Tag, body: &[u8]) {
        let parameters = std::mem::take(&mut self.aside.described);
        let Some(id) = statement_id(done.note) else { return };
        let described = parameters.with(Described::rows((tag == Tag::RowDescription).then_some(body)));
        if notes(done.note, STRIPPED) {
            // If something of a later batch replaced it meanwhile, that was described to nobody.
            if !self.marks.changes.describe_replaced(id, described) {
                self.conn.unnamed.describe(id, described);
            }
        } else {
            self.conn.shelf.describe(id, described);
        }
        if done.origin == Origin::Client {
            self.statements.told(id, described, &mut self.marks.changes);
        } else {
            self.marks.placing.asked = false;
        }
    }

    /// An entry was answered.
    #[inline]
    fn done(&mut self, owed: Owed) {
        if owed.note != 0 {
            self.noted(owed);
        }
    }

    /// One with a remark was.
    fn noted(&mut self, owed: Owed) {
        if owed.note == LENT && owed.expect == Expect::Parse {
            self.marks.changes.end_lent();
        }
        if changes(owed) {
            self.statements.confirm(&mut self.marks.changes);
        }
        if is_unnamed(owed) {
            self.marks.changes.end_unnamed();
            if replaces_held(owed) {
                self.marks.changes.confirm_held();
            }
        }
        if let (Some(id), false) = (named_id(owed.note), owed.origin == Origin::Local) {
            if owed.expect == Expect::Parse {
                // An error of an earlier batch may have struck it off meanwhile.
                self.conn.shelf.confirm(id);
            }
            if owed.origin == Origin::Pooler && owed.expect != Expect::Describe {
                self.marks.changes.end_named();
            }
        }
    }

    /// What is not merely passed on: the answer to a question of ours, or one that may tell a name, or may be to a statement of
    /// ours in a query of the client's, or takes names of the client's. Whose it is.
    #[cold]
    fn look_at(&mut self, tag: Tag, origin: Origin, body: &[u8], plan: &mut Plan<'_>) -> Origin {
        if self.marks.changes.awaits_query() {
            self.deallocated(tag, body);
        }
        if origin == Origin::Pooler {
            if tag == Tag::DataRow {
                self.own_row(body);
            }
            return origin;
        }
        let is_told =
            self.is_spliced_in(tag) || tag == Tag::DataRow && self.marks.placing.tells && self.named_row(body, plan);
        if is_told { Origin::Pooler } else { origin }
    }

    fn own_row(&mut self, body: &[u8]) {
        if self.conn.pipeline.front().is_some_and(|owed| owed.note == AUDIT)
            && let Some(findings) = &mut self.aside.audit
        {
            findings.row(body);
        }
    }

    /// A setting changed: by a replay of the client's own, which it knows; or by its statement, at the end of its
    /// transaction, or from outside.
    fn parameter(&mut self) -> Origin {
        if self.conn.pipeline.front().is_some_and(|owed| matches!(owed.note, REPLAY | ORIGINAL)) {
            return Origin::Pooler;
        }
        self.marks.tainted = true;
        (self.marks.unsettled, self.marks.reads_otherwise) = (true, true);
        Origin::Client
    }

    /// The client's own server connection hears something.
    #[cold]
    fn notification(&mut self, body: &[u8], plan: &mut Plan<'_>) {
        let len = HEADER + body.len();
        if let Some(subscriber) = self.subscriber {
            if let Some(awaited) = subscriber.is_mark(body) {
                self.aside.marked |= awaited;
                return plan.skip(len);
            }
            if self.rules.owes_begin {
                subscriber.files(body);
                return plan.skip(len);
            }
            let mut earlier = Vec::new();
            // What the client did may end that it listens, or change its encoding.
            let unread = self.marks.tainted || self.aside.audit.is_some() && self.aside.audits_client;
            let is_left = self.aside.finds_left(channel(body)) && !self.marks.pins.has(PinReason::Unknown);
            let told = is_left || subscriber.comes(body, self.aside.marked, unread, &mut earlier);
            if !earlier.is_empty() {
                plan.insert(|out| out.append(&mut earlier));
            }
            if !told {
                return plan.skip(len);
            }
        }
        self.aside.notified = true;
        match body.split_first_chunk() {
            // Its own: by this a client knows itself.
            Some((sender, rest)) if u32::from_be_bytes(*sender) == self.conn.pid && self.rules.pid != self.conn.pid => {
                let pid = self.rules.pid;
                plan.insert(|out| {
                    encode::message(out, b'A', |out| {
                        out.extend_from_slice(&pid.to_be_bytes());
                        out.extend_from_slice(rest);
                    });
                });
                plan.skip(len);
            }
            _ => plan.forward(len),
        }
    }

    /// What a follower says of itself, and not of the client's session: a change that no statement of its client's made.
    #[cold]
    fn is_followers_own(&mut self, body: &[u8], plan: &mut Plan<'_>) -> Result<bool, Heard> {
        let (name, value) = backend::parameter_status(body).unwrap_or_default();
        let tells_of_recovery = name == b"in_hot_standby";
        if tells_of_recovery && value == b"off" {
            self.promoted(plan)?;
        }
        // Since 14 a reload is told in the answer of whatever comes next.
        let sets = self.marks.tainted || self.marks.unsettled;
        Ok(tells_of_recovery || !sets || self.conn.pipeline.front().is_none())
    }

    /// The follower says that it is none any more. It says so once: nobody else is lent the server connection.
    #[cold]
    fn promoted(&mut self, plan: &mut Plan<'_>) -> Result<(), Heard> {
        self.conn.littered = true;
        let is_clients = self.conn.pipeline.front().is_some_and(|owed| owed.origin != Origin::Pooler);
        if is_clients && !self.rules.elsewhere {
            // The client was told something: its transaction, which only reads, ends there.
            return Ok(());
        }
        self.aside.unserved = Some(Unserved::Promoted);
        if is_clients && self.aside.healing {
            return Ok(());
        }
        // It was promoted before it had answered: what it said is of another history.
        self.forget(plan);
        if !is_clients || !self.rules.harmless {
            // In the answer to a query of ours, that to the client's is still to come; and what it did may be there to stay.
            return Err(Heard::Lost(Lost::Protocol));
        }
        self.aside.healing = true;
        Ok(())
    }

    /// Where nobody has set one, the server has another default now.
    fn hear_encoding(&mut self, tag: Tag, body: &[u8]) {
        let is_known = !self.marks.tainted && !self.marks.unsettled;
        let is_plain = self.conn.profile.get(settings::ENCODING).is_none() && is_known;
        if self.conn.encodings.hear(tag, body) && is_plain {
            self.conn.encodings.begin();
        }
    }

    /// A name is told without the tag. True if that was it.
    #[cold]
    fn untagged(&self, body: &[u8], plan: &mut Plan<'_>) -> bool {
        let Ok((name, told)) = backend::parameter_status(body) else { return false };
        if name != settings::APPLICATION_NAME.as_bytes() {
            return false;
        }
        let shown = self.conn.shown(told, self.conn.profile.get(settings::APPLICATION_NAME));
        plan.insert(|out| encode::parameter_status(out, name, shown));
        true
    }

    /// The same of a row that tells it. What the client has made of the name in its transaction has no tag.
    #[cold]
    fn named_row(&self, body: &[u8], plan: &mut Plan<'_>) -> bool {
        let is_tagged = |value: &[u8]| value.ends_with(self.conn.tag.as_bytes());
        if self.conn.pipeline.front().is_none_or(|owed| owed.note != NAMED)
            || !row_columns(body).flatten().any(is_tagged)
        {
            return false;
        }
        let own = self.conn.profile.get(settings::APPLICATION_NAME);
        plan.insert(|out| {
            encode::message(out, b'D', |out| {
                out.extend_from_slice(body.get(..2).unwrap_or_default());
                for value in row_columns(body) {
                    let value = value.map(|value| if is_tagged(value) { self.conn.shown(value, own) } else { value });
                    let length = value.map_or(u32::MAX, |value| u32::try_from(value.len()).unwrap_or(u32::MAX));
                    out.extend_from_slice(&length.to_be_bytes());
                    out.extend_from_slice(value.unwrap_or_default());
                }
            });
        });
        true
    }

    #[cold]
    fn error(&mut self, body: &[u8], len: usize, plan: &mut Plan<'_>) -> Result<(), Heard> {
        let fields = Fields::parse(body).map_err(|_| Heard::Lost(Lost::Protocol))?;
        if fields.is_fatal() {
            if self.rules.elsewhere && self.conn.pipeline.ready_owed() > 0 {
                // What came in front of it, in the same breath, is not told: the batch runs elsewhere.
                self.forget(plan);
            }
            return Err(Heard::Lost(Lost::Fatal(body.into())));
        }
        let Some(front) = self.conn.pipeline.front() else {
            return Err(Heard::Lost(Lost::Protocol));
        };
        if front.note == REPLAY {
            return Err(Heard::ReplayFailed(body.into()));
        }
        if self.is_of_the_original(front) {
            if front.expect == Expect::Query {
                // Nobody knows how it stands with the settings, nor what was read by them.
                self.conn.littered = true;
                self.marks.placing.original.inspect(|id| self.conn.shelf.doubt(*id));
            }
            self.fail(front, fields.code)?;
            plan.skip(len);
            return Ok(());
        }
        if std::mem::take(&mut self.marks.forgets_values) {
            // It may have been skipped.
            self.marks.own_values = false;
        }
        if front.note == AUDIT {
            self.audit_failed(fields.code);
        }
        if fields.code == b"25006" {
            self.conn.refused_write();
        }
        let renamed = self.rename(fields.code, body);
        let renamed = match self.shifted(&renamed) {
            Some(shifted) => Cow::Owned(shifted),
            None => renamed,
        };
        let stale = is_stale(fields.code, body, self.rules.prefix);
        if stale {
            // A plan that DDL made void, or a statement that is not there: what is shared is parsed anew.
            if let Some(id) = statement_id(front.note) {
                self.statements.outdate(id);
            }
        }
        let ours = front.note >= LENT || front.origin == Origin::Pooler && front.earns_ready();
        let elsewhere = self.rules.elsewhere && !ours && may_do_elsewhere(fields.code);
        let heals = elsewhere || stale && self.heals(front, plan);
        self.fail(front, fields.code)?;
        if stale {
            self.conn.doubt_all();
            self.marks.changes.doubt_held();
        }
        if heals {
            self.aside.healing = true;
            if self.rules.elsewhere {
                self.aside.unserved = match fields.code.first_chunk() {
                    Some(code) if !stale => Some(Unserved::Failed(*code)),
                    // Another table by now, or a lost statement: the primary would have said the same.
                    _ => Some(Unserved::Stale),
                };
                self.forget(plan);
            }
            plan.skip(len);
            return Ok(());
        }
        let is_of_lent = matches!(front.note, LENT | NAMES) && self.is_of_refused(front.note, fields.code, body, plan);
        if is_of_lent || matches!(front.note, AUDIT | RESTORE | MARK) {
            plan.skip(len);
            return Ok(());
        }
        if let REFUSED | NO_MEMORY | STALE = front.note {
            let mut told = Vec::new();
            let (blame, code) = match front.note {
                REFUSED => {
                    too_many_statements(self.rules.statements_max).write("ERROR", &mut told);
                    (Blame::Pooler, b"53200")
                }
                NO_MEMORY => {
                    no_memory().write("ERROR", &mut told);
                    (Blame::Pooler, b"53200")
                }
                _ => {
                    encode::message(&mut told, b'E', |out| out.extend_from_slice(CHANGED));
                    (Blame::Server, b"0A000")
                }
            };
            self.stats.errors.add(blame, code);
            plan.insert(|out| out.append(&mut told));
            plan.skip(len);
            self.answer_locally(plan);
            return Ok(());
        }
        self.stats.errors.add(Blame::Server, fields.code);
        match renamed {
            Cow::Borrowed(_) => plan.forward(len),
            Cow::Owned(renamed) => {
                plan.insert(|out| encode::message(out, b'E', |out| out.extend_from_slice(&renamed)));
                plan.skip(len);
            }
        }
        self.answer_locally(plan);
        Ok(())
    }

    /// Whether what failed was to have a statement parsed as it was prepared.
    fn is_of_the_original(&self, front: Owed) -> bool {
        let is_parsed = || self.conn.pipeline.iter().any(|owed| owed.note == ORIGINAL);
        front.note == ORIGINAL || front.origin == Origin::Pooler && front.note < ORIGINAL && is_parsed()
    }

    /// Whether an error refuses what a query executes, in front of it, which is told where the query gets there; or says there that
    /// it was refused: the client is told why.
    #[cold]
    fn is_of_refused(&mut self, note: u64, code: &[u8], body: &[u8], plan: &mut Plan<'_>) -> bool {
        if note == LENT {
            self.marks.changes.refused_lent(body);
            return true;
        }
        let Some(refusal) = self.marks.changes.take_refusal(code, body) else { return false };
        let code = Fields::parse(&refusal).map_or(&b""[..], |fields| fields.code);
        self.stats.errors.add(Blame::Server, code);
        plan.insert(|out| encode::message(out, b'E', |out| out.extend_from_slice(&refusal)));
        true
    }

    /// Whether the batch that failed can run again, unseen: nothing of it was done, told (but by us), or is in a transaction of
    /// the client's own, and nothing but its end is on its way.
    fn heals(&self, front: Owed, plan: &Plan<'_>) -> bool {
        let pipeline = &self.conn.pipeline;
        self.rules.heals
            && plan.planned() == self.told.bytes
            && !front.earns_ready()
            && front.expect != Expect::Execute
            && pipeline.status() == TxStatus::Idle
            && pipeline.ready_owed() == 1
            && !pipeline.is_batch_open()
    }

    /// What cannot be known must not be lent on.
    fn audit_failed(&mut self, code: &[u8]) {
        if self.aside.samples {
            self.aside.audit = None;
            // Cancelled, it has said nothing. That it fails of itself is nothing to be lent on, and nothing to keep it for.
            self.conn.littered |= code != b"57014";
        } else if code == b"57014" && self.aside.cancelled < AUDIT_TRIES {
            self.aside.cancelled += 1;
            self.aside.audit = None;
            self.marks.tainted = true;
        } else {
            self.marks.pins.add(PinReason::Unknown);
        }
    }

    /// Takes back everything that the failed batch was to do and did not.
    fn fail(&mut self, front: Owed, code: &[u8]) -> Result<(), Heard> {
        let conn = &mut *self.conn;
        let kept = &mut conn.shelf;
        let (mut undone, mut leavings) = (0, Leavings::default());
        let (pending, placing) = (&mut self.marks.changes, &mut self.marks.placing);
        // What failed itself is not there, unless for being there already; what was skipped may be.
        let mut is_gone = code != b"42P05";
        let undo = |owed: Owed| {
            undone += usize::from(changes(owed)) + usize::from(replaces_held(owed));
            leavings.undone(owed);
            if owed.note == NAMES {
                pending.end_query();
            }
            let ours = owed.origin == Origin::Pooler;
            if ours && owed.expect != Expect::Describe && named_id(owed.note).is_some() {
                pending.end_named();
            }
            if is_unnamed(owed) {
                pending.end_unnamed();
            }
            match (owed.expect, named_id(owed.note)) {
                (Expect::Parse, Some(id)) if owed.origin != Origin::Local && is_gone => kept.remove(id),
                (Expect::Parse, Some(id)) if owed.origin != Origin::Local => kept.doubt(id),
                (Expect::Close, Some(id)) if ours => kept.doubt(id),
                (Expect::Describe, Some(_)) if ours => placing.asked = false,
                _ => {}
            }
            is_gone = false;
        };
        conn.pipeline.error(undo).map_err(|_| Heard::Lost(Lost::Protocol))?;
        // A DEALLOCATE that was cancelled, say: what stands in for the client's statement is not closed behind it.
        conn.littered |= leavings.any;
        // A query of ours has to come before the next client's.
        self.marks.tainted |= !conn.pipeline.is_certain();
        let failed = front.expect == Expect::Parse && is_unnamed(front);
        self.statements.undo(undone, failed, &mut self.marks.changes, &mut conn.unnamed);
        if front.expect == Expect::Query {
            self.marks.changes.doubt_destroyed(&mut conn.unnamed);
        }
        Ok(())
    }

    /// The error with the client's own names in it.
    fn rename<'b>(&self, code: &[u8], body: &'b [u8]) -> Cow<'b, [u8]> {
        let front = self.conn.pipeline.front();
        if let Some(front) = front.filter(|front| code == b"08P01" && notes(front.note, STRIPPED)) {
            return self.name_stripped(front, body);
        }
        let prefix = self.rules.prefix.as_bytes();
        let Some(at) = memchr::memmem::find(body, prefix) else {
            return Cow::Borrowed(body);
        };
        let (head, tail) = body.split_at(at);
        let digits = tail.get(prefix.len()..).unwrap_or_default();
        let count = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (number, rest) = digits.split_at(count);
        let id = std::str::from_utf8(number).ok().and_then(|number| number.parse().ok());
        let refused =
            if self.conn.pipeline.front().is_some_and(changes) { self.marks.changes.refused_name() } else { None };
        match refused.or_else(|| id.and_then(|id| self.statements.name_of(id, &self.marks.changes))) {
            Some(name) => Cow::Owned([head, name, rest].concat()),
            None => Cow::Borrowed(body),
        }
    }

    /// The error with the client's name in the place of none: in the quotes of the server's language.
    fn name_stripped<'b>(&self, front: Owed, body: &'b [u8]) -> Cow<'b, [u8]> {
        const QUOTES: [&str; 5] = ["\"\"", "»«", "«»", "„“", "“”"];
        let name = statement_id(front.note).and_then(|id| self.statements.name_of(id, &self.marks.changes));
        let quotes = QUOTES.iter().find_map(|pair| {
            let at = memchr::memmem::find(body, pair.as_bytes())?;
            Some(at + pair.len() / 2)
        });
        match (name, quotes.and_then(|at| body.split_at_checked(at))) {
            (Some(name), Some((head, tail))) => Cow::Owned([head, name, tail].concat()),
            _ => Cow::Borrowed(body),
        }
    }
}

/// Whether an entry stands for a change of the client's statements.
#[inline]
fn changes(owed: Owed) -> bool {
    notes(owed.note, CHANGES)
}

/// Whether an entry stands for a change of the server connection's unnamed statement.
#[inline]
fn is_unnamed(owed: Owed) -> bool {
    notes(owed.note, UNNAMED)
}

/// Whether that change is of ours: the client's own unnamed statement has no part in it.
#[inline]
fn replaces_held(owed: Owed) -> bool {
    is_unnamed(owed) && (owed.origin == Origin::Pooler || notes(owed.note, STRIPPED))
}

/// What Postgres says of a statement whose rows are others than when it was prepared. Its line in the source differs
/// from version to version, and is left out.
///
/// Source: `PostgreSQL` 17, `RevalidateCachedQuery` in plancache.c.
const CHANGED: &[u8] = b"SERROR\0VERROR\0C0A000\0Mcached plan must not change result type\0Fplancache.c\0\
    RRevalidateCachedQuery\0\0";

/// Whether an error says that a statement of ours is not what it was, or not there.
///
/// Source: `PostgreSQL` 17, `RevalidateCachedQuery` in plancache.c, and measured.
fn is_stale(code: &[u8], body: &[u8], prefix: Prefix) -> bool {
    let has = |part: &[u8]| memchr::memmem::find(body, part).is_some();
    match code {
        b"0A000" => has(b"RevalidateCachedQuery"),
        b"XX000" => has(b"cache lookup failed"),
        b"26000" | b"42P05" => has(prefix.as_bytes()),
        _ => false,
    }
}

fn no_memory() -> Failure {
    Failure {
        code: "53200",
        message: "no server connection can be pinned for this prepared statement (max_pinned)".to_owned(),
        detail: "It needs one: prepared_statements is session, or all statements have reached max_statement_memory."
            .to_owned(),
        hint: "Raise the setting that is in the way, or let clients close what they no longer use.".to_owned(),
    }
}

fn too_many_statements(limit: usize) -> Failure {
    Failure {
        code: "53200",
        message: format!("this client has {limit} prepared statements already (max_client_statements)"),
        detail: String::new(),
        hint: "Raise max_client_statements, or let the client close what it no longer uses.".to_owned(),
    }
}

//! Bringing a server connection back to a known state without a client: after a client left it in the
//! middle of something, and between two clients.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use pgweir_proto::backend::{self, Tag, TxStatus};
use pgweir_proto::encode;
use pgweir_proto::error::Fields;
use pgweir_proto::pipeline::{Expect, Origin, Owed};
use pgweir_proto::scanner::{HEADER, Scanned};

use super::{ServerConn, Unnamed, Values, longest};
use crate::audit::{Baseline, Findings};
use crate::budget::tag;
use crate::prepared::{Leavings, ORIGINAL, REPLAY, named_id};
use crate::settings::{self, APPLICATION_NAME, Entry, NAME_MAX, Profile};

/// The most that is heard of what the operator's queries have left; bytes.
const BASELINE_MAX: usize = 1 << 20;

/// Notices that are kept of what was heard, and the longest of them; bytes.
const NOTICES_MAX: usize = 4;
const NOTICE_MAX: usize = 4096;

/// What the server told when settings were applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Names and values that it reported.
    pub reported: Vec<Entry>,
    /// Bodies of its notices.
    pub notices: Vec<Box<[u8]>>,
}

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
        if self.pipeline.is_batch_open() && !self.pipeline.is_copy_in() && !self.pipeline.is_skipping() {
            // A Sync alone would commit what its client never ended: the batch has to fail first.
            let mut fail = Vec::new();
            encode::parse(&mut fail, b"", b"abandoned", &[0, 0]);
            self.pipeline.sent(Expect::Parse, Origin::Pooler, 0);
            self.unnamed = Unnamed::Unknown;
            self.send(&fail).await?;
        }
        if self.pipeline.is_batch_open() && !self.pipeline.is_copy_in() {
            self.pipeline.sent(Expect::Sync, Origin::Pooler, 0);
            self.send(&encode::SYNC).await?;
        }
        self.until_settled().await?;
        let rolled_back = self.pipeline.status() != TxStatus::Idle;
        if rolled_back {
            self.run(b"ROLLBACK").await?;
        }
        if !self.pipeline.is_certain() {
            self.run(b"").await?;
        }
        if self.pipeline.is_free() { Ok(Settled { rolled_back }) } else { Err(SettleError) }
    }

    /// Makes the connection as good as new: whatever a client left goes, and what the operator wants done on new
    /// connections is done again.
    ///
    /// # Errors
    ///
    /// [`SettleError`], also if a query fails.
    pub async fn reset(&mut self, reset_query: &str) -> Result<(), SettleError> {
        self.run(b"DISCARD ALL").await?;
        self.values = Values::None;
        self.shelf.clear();
        self.unnamed = Unnamed::Empty;
        self.run(&settings::reseed().ok_or(SettleError)?).await?;
        let connect_query = self.target.connect_query.clone();
        for query in [reset_query, &connect_query] {
            if !query.is_empty() && query != "DISCARD ALL" {
                self.run(query.as_bytes()).await?;
            }
        }
        if self.pipeline.is_free() { Ok(()) } else { Err(SettleError) }
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
        // A simple query destroys it.
        self.unnamed = Unnamed::Empty;
        self.send(&out).await?;
        if self.until_settled().await? { Ok(()) } else { Err(SettleError) }
    }

    /// Makes the settings of an idle connection those of `to`. Returns what the server reported meanwhile, or the
    /// body of its error; then its settings are not known any more.
    ///
    /// # Errors
    ///
    /// [`SettleError`].
    pub async fn apply(&mut self, to: &Rc<Profile>) -> Result<Result<Vec<Entry>, Box<[u8]>>, SettleError> {
        Ok(self.apply_hearing(to).await?.map(|applied| applied.reported))
    }

    /// The same, with all that a client is told to whom the server itself applies them at its start.
    ///
    /// # Errors
    ///
    /// [`SettleError`].
    pub async fn prove(&mut self, to: &Rc<Profile>) -> Result<Result<Applied, Box<[u8]>>, SettleError> {
        let name = to.get(APPLICATION_NAME).filter(|name| name.len() > NAME_MAX && !self.tag.is_empty());
        let mut first = Heard::default();
        if let Some(name) = name {
            // With the tag it is cut here, and the server would say nothing of that.
            self.ask_hearing(&settings::name(name), &mut first).await?;
        }
        let mut applied = self.apply_hearing(to).await?;
        if let Ok(applied) = &mut applied {
            applied.notices.splice(..0, first.notices);
        }
        Ok(applied)
    }

    async fn apply_hearing(&mut self, to: &Rc<Profile>) -> Result<Result<Applied, Box<[u8]>>, SettleError> {
        let mut texts = Vec::new();
        self.replay(to, |text| texts.push(text.to_vec()));
        let mut heard = Heard::default();
        for text in texts {
            self.ask_hearing(&text, &mut heard).await?;
            if let Some(body) = heard.error {
                return Ok(Err(body));
            }
        }
        self.profile = to.clone();
        to.prove_in(self.incarnation.number());
        for (name, value) in heard.parameters.iter_mut().filter(|(name, _)| **name == *APPLICATION_NAME) {
            *value = self.shown(value, to.get(name)).into();
        }
        Ok(Ok(Applied { reported: heard.parameters, notices: heard.notices }))
    }

    /// Puts the values back that the session was opened with, where `connect_query` may have set others. Returns what the server
    /// reported meanwhile.
    ///
    /// # Errors
    ///
    /// [`SettleError`].
    pub async fn prefer_start(&mut self, names: &[Box<str>]) -> Result<Vec<Entry>, SettleError> {
        let mut heard = Heard::default();
        if !self.has_connect_query() {
            return Ok(heard.parameters);
        }
        for name in names {
            let mut text = Vec::new();
            settings::reset(&mut text, name);
            // What cannot be reset was not set either.
            self.ask_hearing(&text, &mut heard).await?;
        }
        Ok(heard.parameters)
    }

    async fn ask_hearing(&mut self, text: &[u8], heard: &mut Heard) -> Result<(), SettleError> {
        let mut query = Vec::new();
        encode::query(&mut query, text);
        self.pipeline.sent(Expect::Query, Origin::Pooler, 0);
        self.unnamed = Unnamed::Empty;
        self.send(&query).await?;
        self.until_settled_hearing(heard).await
    }

    /// Hands to `send` the texts of the simple queries that make its settings those of `to`; see [`settings::replay`].
    pub fn replay(&self, to: &Profile, send: impl FnMut(&[u8])) {
        settings::replay(&self.profile, to, &self.tag, &self.target.connect_query, send);
    }

    /// Whether something was run on it at its beginning.
    #[must_use]
    pub fn has_connect_query(&self) -> bool {
        !self.target.connect_query.is_empty()
    }

    /// Looks what the operator's queries, of which `reset_query` is one if it was run, have left: nothing else has run.
    ///
    /// # Errors
    ///
    /// [`SettleError`].
    pub async fn learn_baseline(&mut self, reset_query: &str) -> Result<(), SettleError> {
        self.baseline = None;
        let target = self.target.clone();
        let leaves = |query: &&str| !query.is_empty() && *query != "DISCARD ALL";
        let queries: Vec<&str> = [reset_query, &target.connect_query].into_iter().filter(leaves).collect();
        if queries.is_empty() {
            return Ok(());
        }
        let question = Baseline::question(&target.user, &queries);
        let mut findings = Findings::default();
        let text = String::from_utf8_lossy(&question);
        if self.gather(&text, BASELINE_MAX, |row| findings.row(row)).await? {
            self.baseline = Some(Box::new(Baseline::new(&queries, findings)));
        }
        Ok(())
    }

    /// Hands to `send` the texts of the simple queries that take back all settings, whatever they are, and seed `random()` anew.
    /// What a client may have set of the name goes with them: it is to be tagged again. None if the system gives no random bytes.
    #[must_use]
    pub fn scrub(&mut self, mut send: impl FnMut(&[u8])) -> Option<()> {
        let resets = [b"RESET SESSION AUTHORIZATION;RESET ROLE;RESET ALL;", &settings::reseed()?[..]].concat();
        send(&resets);
        if self.has_connect_query() {
            send(self.target.connect_query.as_bytes());
        }
        self.untagged = !self.tag.is_empty();
        Some(())
    }

    /// Takes back all settings of an idle connection, whatever they are.
    ///
    /// # Errors
    ///
    /// [`SettleError`], also if a query fails: then its settings are not known.
    pub async fn clear(&mut self, plain: &Rc<Profile>) -> Result<(), SettleError> {
        let mut texts = Vec::new();
        self.scrub(|text| texts.push(text.to_vec())).ok_or(SettleError)?;
        for text in texts {
            self.run(&text).await?;
        }
        self.profile = plain.clone();
        Ok(())
    }

    /// An `application_name` that the server told, without the tag: `own`, if it is what was made of that.
    #[must_use]
    pub fn shown<'a>(&self, told: &'a [u8], own: Option<&'a [u8]>) -> &'a [u8] {
        if self.tag.is_empty() {
            return told;
        }
        own.filter(|own| settings::tagged(own, &self.tag) == told).unwrap_or_else(|| tag::without(told))
    }

    /// Puts the tag back, or a new one, behind the name of a client.
    ///
    /// # Errors
    ///
    /// [`SettleError`].
    pub async fn retag(&mut self) -> Result<(), SettleError> {
        let name = settings::tagged(self.profile.get(APPLICATION_NAME).unwrap_or_default(), &self.tag);
        self.run(&settings::name(&name)).await?;
        self.untagged = false;
        Ok(())
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), SettleError> {
        poll_fn(|cx| Poll::Ready(self.write(cx, bytes, &[]))).await.map_err(|_| SettleError)
    }

    /// Reads until nothing is owed. False if there was an error among it.
    async fn until_settled(&mut self) -> Result<bool, SettleError> {
        let mut heard = Heard::default();
        self.until_settled_hearing(&mut heard).await?;
        Ok(heard.error.is_none())
    }

    /// The server waits for COPY data that will never come, and after its end for the Sync that the COPY has eaten.
    async fn fail_copy(&mut self) -> Result<(), SettleError> {
        let mut end = Vec::new();
        encode::message(&mut end, b'f', |out| encode::cstr(out, b"the client is gone"));
        self.pipeline.sent(Expect::CopyEnd, Origin::Pooler, 0);
        if self.pipeline.is_batch_open() {
            end.extend_from_slice(&encode::SYNC);
            self.pipeline.sent(Expect::Sync, Origin::Pooler, 0);
        }
        self.send(&end).await
    }

    async fn until_settled_hearing(&mut self, heard: &mut Heard) -> Result<(), SettleError> {
        let mut buf = vec![0; 16 * 1024];
        loop {
            // A server that never stops talking must not keep the worker from everybody else.
            tokio::task::consume_budget().await;
            self.take_replies(heard)?;
            if self.pipeline.is_copy_in() {
                self.fail_copy().await?;
            } else if self.pipeline.is_skipping() {
                // An error of a batch that had no Sync yet: until one comes the server says nothing more.
                self.pipeline.sent(Expect::Sync, Origin::Pooler, 0);
                self.send(&encode::SYNC).await?;
            }
            if self.pipeline.is_settled()
                && self.unsent.is_empty()
                && !self.scanner.is_inside()
                && self.carry.is_empty()
            {
                return Ok(());
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

    /// Goes through the whole messages in `carry`.
    fn take_replies(&mut self, heard: &mut Heard) -> Result<(), SettleError> {
        let mut at = 0;
        loop {
            let rest = self.carry.get(at..).unwrap_or_default();
            let used = match self.scanner.next(rest).map_err(|_| SettleError)? {
                Scanned::Short => break,
                Scanned::Inside { len } => len,
                Scanned::Whole { tag, body } => {
                    let tag = Tag::from_byte(tag).map_err(|_| SettleError)?;
                    let used = HEADER + body.len();
                    // The body is in `carry`: what is kept of it is copied.
                    heard.note(tag, body);
                    self.encodings.hear(tag, body);
                    let status = if tag == Tag::ReadyForQuery { TxStatus::parse(body).ok() } else { None };
                    self.take_reply(tag, status, heard.fatal)?;
                    used
                }
                Scanned::Part { tag, body_len, seen } => {
                    // Rows and data are passed over as they come; what has to be read is waited for.
                    let tag = Tag::from_byte(tag).map_err(|_| SettleError)?;
                    if !matches!(tag, Tag::DataRow | Tag::CopyData) {
                        if body_len > longest(tag) {
                            return Err(SettleError);
                        }
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
        Ok(())
    }

    pub(super) fn take_reply(&mut self, tag: Tag, status: Option<TxStatus>, fatal: bool) -> Result<(), SettleError> {
        if fatal {
            return Err(SettleError);
        }
        match (tag, status) {
            (Tag::ErrorResponse, _) => {
                let kept = &mut self.shelf;
                // Whether a statement that was to be parsed is there is of no interest to anyone now.
                let mut leavings = Leavings::default();
                let undone = |owed: Owed| {
                    leavings.undone(owed);
                    let changes = matches!(owed.expect, Expect::Parse | Expect::Close) && owed.origin != Origin::Local;
                    if let Some(id) = named_id(owed.note).filter(|_| changes) {
                        kept.doubt(id);
                    }
                };
                // Settings that were not put on, or not taken back, are not those that are known.
                let sets = self.pipeline.front().is_some_and(|owed| matches!(owed.note, REPLAY | ORIGINAL));
                self.pipeline.error(undone).map_err(|_| SettleError)?;
                self.littered |= leavings.any || sets;
                self.unnamed = Unnamed::Unknown;
            }
            (Tag::ReadyForQuery, Some(status)) => drop(self.pipeline.ready(status).map_err(|_| SettleError)?),
            (Tag::ReadyForQuery, None) => return Err(SettleError),
            (tag, _) => drop(self.pipeline.reply(tag).map_err(|_| SettleError)?),
        }
        while self.pipeline.next_local().is_some() {}
        Ok(())
    }
}

/// What the server said while it came to rest.
#[derive(Debug, Default)]
struct Heard {
    /// The first error's body.
    error: Option<Box<[u8]>>,
    /// It ends the connection.
    fatal: bool,
    /// `ParameterStatus`es.
    parameters: Vec<Entry>,
    /// Bodies of notices, the first few.
    notices: Vec<Box<[u8]>>,
}

impl Heard {
    fn note(&mut self, tag: Tag, body: &[u8]) {
        match tag {
            Tag::ErrorResponse => {
                self.fatal |= Fields::parse(body).map_or(true, |fields| fields.is_fatal());
                self.error.get_or_insert_with(|| body.into());
            }
            Tag::NoticeResponse if self.notices.len() < NOTICES_MAX && body.len() <= NOTICE_MAX => {
                self.notices.push(body.into());
            }
            Tag::ParameterStatus => {
                if let Ok((name, value)) = backend::parameter_status(body) {
                    let name: Box<str> = String::from_utf8_lossy(name).into();
                    self.parameters.retain(|(known, _)| *known != name);
                    self.parameters.push((name, value.into()));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prepared::{CHANGES, TAKEN};
    use crate::settings::Profiles;

    #[test]
    fn what_stands_in_for_a_clients_statement_and_is_not_taken_back_is_never_lent_on() {
        for (name, replies, is_littered) in [
            ("all of it was skipped", &[][..], false),
            ("it is there, and its Close was skipped", &[Tag::ParseComplete], true),
            ("it is there no more", &[Tag::ParseComplete, Tag::CommandComplete, Tag::CloseComplete], false),
        ] {
            let mut conn = ServerConn::without_socket(Profiles::default().intern(std::iter::empty()));
            conn.pipeline.sent(Expect::Parse, Origin::Pooler, TAKEN);
            conn.pipeline.sent(Expect::Execute, Origin::Client, CHANGES);
            conn.pipeline.sent(Expect::Close, Origin::Pooler, TAKEN);
            conn.pipeline.sent(Expect::Bind, Origin::Client, 0);
            for reply in replies {
                conn.take_reply(*reply, None, false).unwrap();
            }
            conn.take_reply(Tag::ErrorResponse, None, false).unwrap();
            assert_eq!(conn.littered, is_littered, "{name}");
        }
    }
}

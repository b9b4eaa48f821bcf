//! From client to server: what becomes of each message. Pure: bytes in, decisions out.

mod listen;
mod names;
mod original;
mod place;
mod resets;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::rc::Rc;

use pgweir_config::StatementMode;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::frontend::{Bind, Parse, Tag, Target, query_text};
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};
use pgweir_proto::{Malformed, encode};

use names::Renaming;
pub use place::Placing;
use place::Use;

use super::plan::Plan;
use super::statements::{Changes, Look, Named, Statements, Unnamed};
use crate::backend::{ServerConn, Unnamed as Held};
use crate::mutant::{Guard, lacks};
use crate::pool::Knowledge;
use crate::prepared::{
    Budget, CHANGES, DESCRIBES, Described, Interner, MARK, NAMED, NO_MEMORY, Parsed, Prefix, REFUSED,
};
use crate::prepared::{STRIPPED, Statement, UNNAMED};
use crate::replica::watermark;
use crate::settings::{Profile, Profiles};
use crate::sql::{self, Bound, EffectSet, Effects, FirstWord};
use crate::state::{self, Pins};
use crate::stats::{PinReason, PoolStats};

/// Replies that may be owed before reading from the client stops.
pub const PIPELINE_MAX: usize = 16 * 1024;

/// What nobody is to be told by `currval` and `lastval` any more.
pub const FORGET: &[u8] = b"DISCARD SEQUENCES";

/// Effects of a simple query that may ask for more than to pass it on.
const APART: EffectSet = names::BY_NAME.union(EffectSet::SETTINGS).union(EffectSet::LOCAL).union(EffectSet::OPAQUE);

/// The longest name of a statement or portal; bytes.
const NAME_MAX: usize = 16 * 1024;

/// What of a session the messages of its client change.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "a set of independent marks, not a state")]
pub struct Marks {
    /// The lease has to be audited before it is released.
    pub tainted: bool,
    /// Settings may differ from the profile, or temporary objects be in front of others: texts parsed now are private.
    pub unsettled: bool,
    /// Among them, settings by which prepared texts are read. Always with `unsettled`.
    pub reads_otherwise: bool,
    /// Settings that no one can list may have been set: all are to be reset before another client comes.
    pub scrub: bool,
    /// The client may have listened: notifications are its own.
    pub listening: bool,
    /// The server connection listens to all that the client listens to by the hub. Always with `listening`.
    pub listens_too: bool,
    /// The channels that the server connection was found to listen to.
    pub channels: Vec<Box<[u8]>>,
    /// They stay there, until more is found.
    pub keeps_channels: bool,
    /// What was sent since the mark was set is [harmless](Effects::harmless).
    pub harmless: bool,
    /// A COMMIT is on its way.
    pub commit_sent: bool,
    /// A BEGIN is on its way.
    pub begin_sent: bool,
    /// Why the server connection is kept.
    pub pins: Pins,
    /// What sequences gave on the server connection is the client's own.
    pub own_values: bool,
    /// They may have given something in this lease.
    pub takes_values: bool,
    /// The client asked what they gave.
    pub asks_values: bool,
    /// What they gave to others is on its way to be forgotten.
    pub forgets_values: bool,
    /// Custom settings that the client may have set.
    pub custom: Vec<Box<str>>,
    /// Functions may have set more of them: those that functions of the database are known to set.
    pub hidden: bool,
    /// The catalog may be another when the transaction is over.
    pub defines: bool,
    /// What sessions begin with may be another when the transaction is over.
    pub redefaults: bool,
    /// Start-up values may be reset: they are to be put back behind the portal bound last, or the batch. Or something was lent
    /// until the end of the batch.
    pub resets: bool,
    /// Behind the batch. Always with `resets`.
    pub resets_late: bool,
    /// How the answer to a query is read that has statements of ours in it: the latest, and never another is owed.
    pub spliced: Option<sql::Splice>,
    /// With what is put back behind the batch, a list is spelled as at the start.
    pub respells: bool,
    /// Something of these may be left when the session ends.
    pub remembers: bool,
    /// The role of the start is to be put back likewise.
    pub resets_role: bool,
    /// The client itself has taken another role than that of its start, or none: it is not to be put back.
    pub leaves_role: bool,
    /// Start-up settings that are the client's own again: not to be put back, however empty they are.
    pub own: Vec<Box<str>>,
    /// The latest batch of messages with something in it that reads data of the client's, if there was one.
    pub copies: Option<u32>,
    /// Changes of the client's statements that the server has not confirmed yet.
    pub changes: Changes,
    /// What is remembered from one message to the next of the statements that they name.
    pub placing: Placing,
}

/// Custom settings remembered of one client, at most.
const CUSTOM_MAX: usize = 100;

impl Marks {
    /// Whether nothing is marked.
    #[must_use]
    #[inline]
    pub fn is_blank(&self) -> bool {
        let Self {
            own_values: _,
            takes_values: _,
            asks_values: _,
            forgets_values: _,
            harmless: _,
            tainted,
            unsettled,
            // With it.
            reads_otherwise: _,
            scrub,
            listening,
            // Where it is listening.
            listens_too: _,
            channels,
            // Of the channels.
            keeps_channels: _,
            commit_sent,
            begin_sent,
            pins,
            custom,
            hidden,
            defines,
            redefaults,
            resets,
            // With it.
            resets_late: _,
            respells: _,
            remembers: _,
            // Of what is owed.
            spliced: _,
            // With `resets`.
            resets_role: _,
            leaves_role,
            // Of those that may have been reset.
            own: _,
            // Of a batch.
            copies: _,
            changes,
            placing: _,
        } = self;
        let any =
            *tainted || *unsettled || *scrub || *listening || *commit_sent || *begin_sent || *resets || *leaves_role;
        let none = pins.is_empty() && channels.is_empty() && custom.is_empty() && changes.is_empty();
        none && !any && !*hidden && !*defines && !*redefaults
    }

    /// The server connection listens to nothing that concerns the client.
    #[cold]
    pub fn hears_nothing(&mut self) {
        (self.listening, self.listens_too, self.keeps_channels) = (false, false, false);
        self.channels.clear();
    }

    /// A transaction is over, and what it left is known: texts mean what they mean to others, unless the client has temporary
    /// objects, which come before those that others see.
    #[inline]
    pub fn settle(&mut self) {
        self.unsettled = self.pins.has(PinReason::Temp);
        self.reads_otherwise = false;
    }

    /// A lease begins. What sequences gave on its server connection is the client's `own`.
    #[inline]
    pub fn begin_values(&mut self, own: bool) {
        (self.own_values, self.takes_values, self.asks_values, self.forgets_values) = (own, false, false, false);
    }

    /// A text with these effects is about to run.
    #[inline]
    pub fn runs(&mut self, effects: Effects, text: &[u8]) {
        self.harmless &= effects.harmless;
        self.takes_values |= effects.takes_values;
        if !effects.set.is_empty() || self.defines {
            self.runs_more(effects, text);
        }
    }

    fn runs_more(&mut self, effects: Effects, text: &[u8]) {
        self.commit_sent |= effects.set.intersects(EffectSet::COMMIT);
        self.begin_sent |= effects.set.intersects(EffectSet::BEGIN);
        // Where nothing is listened to there is nothing to be found.
        self.tainted |= self.listening && effects.set.intersects(EffectSet::UNLISTEN);
        // Until the end of the transaction.
        if effects.set.intersects(EffectSet::LOCAL) {
            self.unsettled = true;
            self.reads_otherwise = self.reads_otherwise || sql::may_read_otherwise(text);
        }
        if state::taints(effects) {
            self.taints(effects, text);
        }
        if self.defines || effects.set.intersects(EffectSet::DDL) {
            self.may_define(effects, text);
        }
    }

    #[cold]
    fn may_define(&mut self, effects: Effects, text: &[u8]) {
        self.redefaults |= sql::changes_defaults(text);
        let multi = effects.set.intersects(EffectSet::MULTI);
        let spells = if multi { sql::mentions_definition } else { sql::defines };
        let defines =
            state::defines(effects) && spells(text) || effects.set.contains(EffectSet::SUSPECT.union(EffectSet::DDL));
        if self.defines && !state::only_ends(effects) || defines && multi {
            // What was just defined may be called before the catalog is read again.
            self.runs_unjudged();
        }
        if defines {
            self.defines = true;
            // The settings of what it defines are carried along until the catalog tells of them.
            self.set_custom(sql::hidden_names(text).into_iter());
        }
    }

    #[cold]
    fn taints(&mut self, effects: Effects, text: &[u8]) {
        const HIDES: EffectSet = EffectSet::SUSPECT.union(EffectSet::OPAQUE);
        self.tainted = true;
        self.unsettled |= effects.set.intersects(EffectSet::SETTINGS.union(EffectSet::TEMP).union(HIDES));
        self.reads_otherwise |= effects.set.intersects(HIDES)
            || effects.set.intersects(EffectSet::SETTINGS) && sql::may_read_otherwise(text);
        self.listening |= effects.set.intersects(EffectSet::LISTEN.union(HIDES));
        self.hidden |= effects.set.intersects(HIDES);
        if effects.set.contains(EffectSet::OPAQUE.union(EffectSet::CUSTOM)) {
            // A custom setting whose name is not spelled out: the catalog lists no such settings.
            self.pins.add(PinReason::Unknown);
        }
        self.scrub |= effects.set.intersects(EffectSet::OPAQUE);
        if effects.set.intersects(EffectSet::LOAD) {
            self.pins.add(PinReason::Load);
        }
        if effects.set.intersects(EffectSet::CUSTOM) {
            self.set_custom(sql::custom_names(text).map(|name| Box::from(&*name)));
        }
        if effects.set.intersects(EffectSet::UNJUDGED) {
            self.runs_unjudged();
        }
        if effects.set.intersects(EffectSet::OPAQUE.union(EffectSet::UNJUDGED)) {
            self.set_custom(sql::hidden_names(text).into_iter());
            if sql::mentions_seed(text) {
                self.pins.add(PinReason::Load);
            }
            // It may define something, too.
            self.defines |= sql::mentions_definition(text);
        }
    }

    fn set_custom(&mut self, names: impl Iterator<Item = Box<str>>) {
        for name in names {
            if self.custom.contains(&name) {
                continue;
            }
            if self.custom.len() >= CUSTOM_MAX {
                // Too many to ask for: the server connection stays with its client instead.
                self.pins.add(PinReason::Settings);
                break;
            }
            self.custom.push(name);
        }
    }

    /// A text that cannot be read runs.
    pub fn runs_unknown(&mut self) {
        self.harmless = false;
        self.takes_values = true;
        self.runs_unjudged();
    }

    /// What runs may set anything in motion.
    #[cold]
    pub fn runs_unjudged(&mut self) {
        self.tainted = true;
        self.scrub = true;
        (self.unsettled, self.reads_otherwise) = (true, true);
        self.listening = true;
        self.hidden = true;
    }
}

/// Why reading the client's messages stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// At the end of the input, or in front of an incomplete message.
    Short,
    /// Too much is owed: go on when some of it has come.
    Full,
    /// What a name stands for depends on answers still to come: go on when they have.
    Unsettled,
    /// The same, and nothing of the client's is on its way: it is to keep the server connection all the same.
    Held,
    /// The client said goodbye.
    Quit,
    /// The client broke the protocol.
    Malformed(Malformed),
    /// A tag that no client may send here.
    Tag(u8),
}

/// Everything that a client's message is judged by.
#[derive(Debug)]
pub struct Request<'a> {
    /// Frames the client's messages.
    pub scanner: &'a mut Scanner,
    /// The server connection lent to it.
    pub conn: &'a mut ServerConn,
    /// Its statements.
    pub statements: &'a mut Statements,
    /// What its messages change.
    pub marks: &'a mut Marks,
    /// All statements.
    pub interner: &'a Interner,
    /// What is known of the texts that clients send.
    pub scans: &'a mut sql::Cache,
    /// What the grammar says of them.
    pub library: &'a RefCell<sql::Library>,
    /// The names that lead to more than a text shows.
    pub catalog: &'a Knowledge,
    /// Which catalog these are of.
    pub catalog_key: u64,
    /// What the pool counts.
    pub stats: &'a mut PoolStats,
    /// The pool's number.
    pub pool: u32,
    /// The client's parse-time settings.
    pub parse_key: u32,
    /// Where a key comes from that no one shares, for when they are not known.
    pub profiles: &'a Profiles,
    /// What RESET goes back to.
    pub startup: &'a Profile,
    /// The longest text that is read; bytes.
    pub inspect_max: usize,
    /// Statements that a client may name.
    pub statements_max: usize,
    /// How the pool's statements are run.
    pub mode: StatementMode,
    /// What a server connection may keep of them.
    pub budget: Budget,
    /// The client may keep its server connection.
    pub may_pin: bool,
    /// What the client listens to by the hub, if it does.
    pub channels: Option<&'a [Box<[u8]>]>,
    /// A query of ours is on its way that no cancel request may hit.
    pub replaying: &'a mut bool,
}

impl Request<'_> {
    /// Goes through the input and plans what the server gets.
    pub fn inspect(&mut self, plan: &mut Plan<'_>) -> Stop {
        loop {
            // Never inside a message: a Flush of ours is about to follow.
            if self.conn.pipeline.depth() >= PIPELINE_MAX && !self.scanner.is_inside() {
                return Stop::Full;
            }
            match self.scanner.next(plan.rest()) {
                Ok(Scanned::Short) => return Stop::Short,
                Ok(Scanned::Inside { len }) => plan.forward(len),
                Ok(Scanned::Whole { tag, body }) => match self.whole(tag, body, plan) {
                    Ok(()) => {}
                    Err(stop) => return stop,
                },
                Ok(Scanned::Part { tag, body_len, seen }) => match self.part(tag, body_len, seen, plan) {
                    Ok(true) => {}
                    Ok(false) => return Stop::Short,
                    Err(stop) => return stop,
                },
                Err(malformed) => return Stop::Malformed(malformed),
            }
        }
    }

    /// A whole message.
    #[inline]
    fn whole(&mut self, tag: u8, body: &[u8], plan: &mut Plan<'_>) -> Result<(), Stop> {
        let len = HEADER + body.len();
        let tag = Tag::from_byte(tag).map_err(|_| Stop::Tag(tag))?;
        if self.channels.is_some() {
            self.listen_if_needed(tag, body, plan)?;
        }
        match tag {
            Tag::Query => {
                let (text, effects) = self.judge(body).map_err(Stop::Malformed)?;
                #[cfg(debug_assertions)]
                panic_if_told(text);
                if effects.set.intersects(APART) && self.query_apart(effects, text, body, plan)? {
                    return Ok(());
                }
                self.forget_sequences(effects, plan);
                self.query(effects, text);
                if effects.first == FirstWord::Show && sql::shows_watermark(text) {
                    plan.insert(|out| encode::query(out, watermark::QUERY.as_bytes()));
                    plan.skip(len);
                } else {
                    plan.forward(len);
                }
                self.restore(Tag::Query, body, plan);
            }
            Tag::Parse => self.parse(body, plan)?,
            Tag::Bind => {
                let bind = Bind::parse(body).map_err(Stop::Malformed)?;
                self.bind(bind, body.len(), plan)?;
            }
            Tag::Describe => self.describe(body, plan)?,
            Tag::Close => self.close(body, plan)?,
            Tag::Execute if self.marks.placing.may_drop(is_of(b"", body)) => {
                self.execute_dropping(body, plan)?;
                self.restore(tag, body, plan);
            }
            tag => {
                if !body.is_empty() && matches!(tag, Tag::Sync | Tag::Flush | Tag::CopyDone) {
                    return Err(too_long(tag, body.len(), NAME_MAX));
                }
                self.note_plain(tag, body)?;
                plan.forward(len);
                self.restore(tag, body, plan);
            }
        }
        Ok(())
    }

    /// The text in the body of a `Query`, what it does to its session, and what it sets in motion there.
    #[inline]
    fn judge<'b>(&mut self, body: &'b [u8]) -> Result<(&'b [u8], Effects), Malformed> {
        if lacks(Guard::Inspection) {
            return query_text(body).map(|text| (text, Effects::default()));
        }
        let (catalog, library) = (self.catalog, self.library);
        let through = |text: &[u8], own| catalog.suspects().judge(text, own, &mut library.borrow_mut());
        self.scans.judge(body, self.catalog_key, through)
    }

    /// Behind a RESET: the client's start-up values, which the server does not know for such.
    #[inline]
    fn restore(&mut self, tag: Tag, body: &[u8], plan: &mut Plan<'_>) {
        if self.marks.resets {
            self.put_back(tag, body, plan);
        }
    }

    /// Messages that pass as they are.
    fn note_plain(&mut self, tag: Tag, body: &[u8]) -> Result<(), Stop> {
        let pipeline = &mut self.conn.pipeline;
        match tag {
            Tag::Execute => {
                let note = self.marks.placing.shown_by(body);
                pipeline.sent(Expect::Execute, Origin::Client, note);
            }
            Tag::Sync => {
                pipeline.sent(Expect::Sync, Origin::Client, 0);
                self.conn.shelf.end_batch();
                self.marks.changes.next_batch();
            }
            Tag::CopyDone | Tag::CopyFail => drop(pipeline.sent(Expect::CopyEnd, Origin::Client, 0)),
            Tag::FunctionCall => {
                self.conn.mixed |= pipeline.is_batch_open();
                // What was lent is not taken back behind this.
                self.conn.littered |= !self.marks.placing.lent.is_empty();
                self.marks.placing.lent.clear();
                pipeline.sent(Expect::FunctionCall, Origin::Client, 0);
                self.marks.changes.next_batch();
                self.runs_unknown();
            }
            // A Flush earns nothing, and opens no batch of its own.
            Tag::CopyData | Tag::Flush => {}
            Tag::Terminate => return Err(Stop::Quit),
            tag => return Err(Stop::Tag(tag as u8)),
        }
        Ok(())
    }

    /// Whether the front of a message is passed on: else its end, which may never come, is waited for.
    #[cold]
    fn streams(&self, tag: Tag, body_len: u32, seen: &[u8]) -> bool {
        let is_long = body_len as usize > self.inspect_max;
        match tag {
            Tag::Query => is_long,
            Tag::Parse => is_long && memchr::memchr(0, seen).is_some(),
            Tag::Bind => Bind::parse(seen).is_ok(),
            Tag::FunctionCall => true,
            _ => false,
        }
    }

    /// The front of a message whose end has not arrived. False: wait for more of it.
    fn part(&mut self, tag: u8, body_len: u32, seen: &[u8], plan: &mut Plan<'_>) -> Result<bool, Stop> {
        let tag = Tag::from_byte(tag).map_err(|_| Stop::Tag(tag))?;
        if self.channels.is_some() && self.streams(tag, body_len, seen) {
            self.listen_if_needed(tag, b"", plan)?;
        }
        match tag {
            Tag::CopyData | Tag::FunctionCall => self.note_plain(tag, seen)?,
            Tag::Query if body_len as usize > self.inspect_max => {
                self.conn.littered |= !self.marks.placing.lent.is_empty();
                self.marks.placing.lent.clear();
                self.query(Effects::default(), b"");
                self.runs_unknown();
                self.marks.defines = true;
            }
            Tag::Parse if body_len as usize > self.inspect_max => return self.long_parse(body_len, seen, plan),
            Tag::Query | Tag::Parse => return Ok(false),
            Tag::Bind => {
                let Ok(bind) = Bind::parse(seen) else {
                    return if seen.len() > 2 * NAME_MAX {
                        Err(too_long(tag, body_len as usize, NAME_MAX))
                    } else {
                        Ok(false)
                    };
                };
                let seen = seen.len();
                self.bind(bind, body_len as usize, plan)?;
                self.scanner.stream(body_len, seen);
                return Ok(true);
            }
            tag if body_len as usize > NAME_MAX => return Err(too_long(tag, body_len as usize, NAME_MAX)),
            _ => return Ok(false),
        }
        self.scanner.stream(body_len, seen.len());
        plan.forward(HEADER + seen.len());
        Ok(true)
    }

    /// `currval` or `lastval` would tell what a stranger's statement left: the server is to say that there is nothing yet
    /// (55000). From the next lease on each of the pool's begins with nothing, or with what is the client's own.
    #[inline]
    fn forget_sequences(&mut self, effects: Effects, plan: &mut Plan<'_>) {
        if effects.set.intersects(EffectSet::CURRVAL.union(EffectSet::OPAQUE)) {
            self.forget_strangers(effects, plan);
        }
    }

    /// A text is about to be bound. What it does, as far as only its parameters tell that.
    #[inline]
    fn before_bind(
        &mut self,
        effects: Effects,
        named: Option<&Rc<Statement>>,
        purpose: Use<'_>,
        plan: &mut Plan<'_>,
    ) -> Result<Effects, Stop> {
        let any = EffectSet::CURRVAL.union(EffectSet::OPAQUE);
        if effects.set.intersects(any) || effects.by_values {
            self.before_opaque(effects, named, purpose, plan)
        } else {
            Ok(effects)
        }
    }

    #[cold]
    fn before_opaque(
        &mut self,
        effects: Effects,
        named: Option<&Rc<Statement>>,
        purpose: Use<'_>,
        plan: &mut Plan<'_>,
    ) -> Result<Effects, Stop> {
        self.forget_strangers(effects, plan);
        let statement = match (named, &self.statements.unnamed) {
            (Some(statement), _) | (None, Unnamed::Holds(statement, _)) => statement.clone(),
            (None, _) => return Ok(effects),
        };
        self.lend_executed(&statement, plan)?;
        if !statement.effects.set.contains(EffectSet::OPAQUE.union(EffectSet::CUSTOM)) && !statement.effects.by_values {
            return Ok(effects);
        }
        // What is here of the message.
        let rest = plan.rest();
        let body = rest.get(HEADER..purpose.len.min(rest.len())).unwrap_or_default();
        let Ok(bind) = Bind::parse(body) else { return Ok(effects) };
        let bound = Bound::new(&statement.text, &statement.types, bind);
        let filled = bound.read();
        self.marks.set_custom(filled.names.into_iter().map(|name| Box::from(&*name)));
        if filled.resets && filled.set.intersects(EffectSet::SETTINGS) && !self.startup.entries().is_empty() {
            (self.marks.resets, self.marks.resets_late, self.marks.remembers) = (true, true, true);
            self.marks.own.clear();
        }
        Ok(Effects { set: filled.set | statement.through(), ..effects })
    }

    /// A text is about to be parsed.
    #[inline]
    fn before_parse(
        &mut self,
        effects: Effects,
        statement: &mut Rc<Statement>,
        plan: &mut Plan<'_>,
    ) -> Result<(), Stop> {
        let any = EffectSet::CURRVAL.union(EffectSet::OPAQUE);
        if effects.set.intersects(any) { self.before_opaque_parse(effects, statement, plan) } else { Ok(()) }
    }

    #[cold]
    fn before_opaque_parse(
        &mut self,
        effects: Effects,
        statement: &mut Rc<Statement>,
        plan: &mut Plan<'_>,
    ) -> Result<(), Stop> {
        self.forget_strangers(effects, plan);
        if self.lend_executed(statement, plan)? && statement.twin == 0 {
            // What it is described as hangs on what the client has under the name.
            *statement = self.interner.twin(statement);
        }
        Ok(())
    }

    #[cold]
    fn forget_strangers(&mut self, effects: Effects, plan: &mut Plan<'_>) {
        let asks = effects.set.intersects(EffectSet::CURRVAL);
        if asks && !std::mem::replace(&mut self.marks.asks_values, true) {
            self.catalog.sequences.ask();
        }
        let pipeline = &self.conn.pipeline;
        let may_be_told = !self.marks.own_values && (asks || may_ask(effects));
        if !may_be_told || pipeline.is_skipping() || pipeline.is_copy_in() || lacks(Guard::Sequences) {
            return;
        }
        // What this lease itself may have taken must not be forgotten; and in a batch, what commits would be refused behind ours.
        // This is all that a stranger's value may hide behind, and the last time that it does.
        let commits = matches!(effects.first, FirstWord::Call | FirstWord::Do)
            && pipeline.is_batch_open()
            && pipeline.status() == TxStatus::Idle;
        if self.marks.takes_values || commits {
            self.catalog.sequences.may_ask();
            return;
        }
        (self.marks.own_values, self.marks.forgets_values) = (true, true);
        if pipeline.is_batch_open() {
            self.run_in_batch(FORGET, plan);
        } else {
            self.conn.pipeline.sent(Expect::Query, Origin::Pooler, MARK);
            self.destroy_held();
            *self.replaying = true;
            plan.insert(|out| encode::query(out, FORGET));
        }
    }

    /// Where a query would end the batch: by the extended protocol, and a portal of our own, beside the client's.
    fn run_in_batch(&mut self, text: &[u8], plan: &mut Plan<'_>) {
        self.conn.pipeline.sent(Expect::Parse, Origin::Pooler, UNNAMED);
        for expect in [Expect::Bind, Expect::Execute, Expect::Close] {
            self.conn.pipeline.sent(expect, Origin::Pooler, 0);
        }
        self.replace_held(Held::Unknown);
        let portal = self.interner.prefix;
        plan.insert(|out| {
            encode::parse(out, b"", text, &[0, 0]);
            encode::message(out, b'B', |out| {
                encode::cstr(out, portal.as_bytes());
                out.extend_from_slice(&[0; 7]);
            });
            encode::message(out, b'E', |out| {
                encode::cstr(out, portal.as_bytes());
                out.extend_from_slice(&[0; 4]);
            });
            encode::message(out, b'C', |out| {
                out.push(b'P');
                encode::cstr(out, portal.as_bytes());
            });
        });
    }

    #[inline]
    fn query(&mut self, effects: Effects, text: &[u8]) {
        let note = if effects.first == FirstWord::Show && self.tells_name(text) { NAMED } else { 0 };
        self.noted_query(note, effects, text);
    }

    #[inline]
    fn noted_query(&mut self, note: u64, effects: Effects, text: &[u8]) {
        self.conn.mixed |= self.conn.pipeline.is_batch_open();
        if !self.conn.pipeline.sent(Expect::Query, Origin::Client, note) {
            return;
        }
        self.marks.changes.next_batch();
        self.conn.shelf.end_batch();
        // A simple query destroys the unnamed statement.
        self.marks.changes.unnamed_destroyed();
        self.statements.unnamed = Unnamed::Empty;
        self.conn.unnamed = self.destroyed();
        self.runs(effects, text, None);
    }

    /// Whether a text tells the client its `application_name`, where a tag of ours is in it.
    #[cold]
    fn tells_name(&mut self, text: &[u8]) -> bool {
        let tells = !self.conn.tag.is_empty() && sql::shows_name(text);
        self.marks.placing.tells |= tells;
        tells
    }

    /// What a simple query leaves of the server's unnamed statement; one behind messages that may fail may be skipped.
    #[inline]
    fn destroyed(&self) -> Held {
        if self.conn.mixed { Held::Unknown } else { Held::Empty }
    }

    /// A query of ours destroys it.
    fn destroy_held(&mut self) {
        self.marks.changes.held_destroyed();
        self.conn.unnamed = self.destroyed();
    }

    /// Something of ours that makes this the server's unnamed statement is on its way.
    fn replace_held(&mut self, held: Held) {
        let before = std::mem::replace(&mut self.conn.unnamed, held);
        self.marks.changes.replaced_held(before);
    }

    #[inline]
    fn runs(&mut self, effects: Effects, text: &[u8], portal: Option<&[u8]>) {
        self.marks.runs(effects, text);
        if !effects.set.is_empty() {
            self.runs_more(effects, text, portal);
        }
    }

    /// A text that may change the session is about to run: of a portal, or at once.
    fn runs_more(&mut self, effects: Effects, text: &[u8], portal: Option<&[u8]>) {
        if effects.set.intersects(EffectSet::SETTINGS.union(EffectSet::LOCAL)) && !self.startup.entries().is_empty() {
            self.resets(effects, text, portal.is_some());
        }
        if effects.set.intersects(EffectSet::DISCARD_ALL.union(EffectSet::DEALLOCATE).union(EffectSet::OPAQUE)) {
            // The server may be about to drop statements of ours, or may refuse to.
            self.conn.doubt_all();
            self.marks.placing.drops = true;
        }
        self.marks.placing.copies |= effects.set.intersects(EffectSet::COPY);
        if effects.set.intersects(names::BY_NAME.union(EffectSet::OPAQUE)) {
            self.runs_by_name(effects, text, portal);
        }
    }

    /// A text that nobody has read is about to run: it may drop statements of ours, too.
    #[cold]
    fn runs_unknown(&mut self) {
        self.marks.runs_unknown();
        self.conn.shelf.doubt_all();
        self.marks.placing.drops = true;
        self.marks.placing.copies = true;
    }

    fn parse(&mut self, body: &[u8], plan: &mut Plan<'_>) -> Result<(), Stop> {
        let len = HEADER + body.len();
        if self.conn.pipeline.is_skipping() {
            plan.forward(len);
            return Ok(());
        }
        let parse = Parse::parse(body).map_err(Stop::Malformed)?;
        if self.marks.unsettled && self.is_audited() && sql::is_read_by_settings(parse.query) {
            // What it is prepared under is known in a moment.
            return Err(Stop::Unsettled);
        }
        let key = self.present_key();
        if parse.statement.is_empty() {
            let (mut statement, is_ours) = self.intern(key, &parse);
            let effects = self.effects(&statement);
            self.before_parse(effects, &mut statement, plan)?;
            // By its number an error of it is read.
            let number = if statement.put.is_some() { statement.id } else { 0 };
            self.conn.pipeline.sent(Expect::Parse, Origin::Client, CHANGES | UNNAMED | number);
            let before = std::mem::replace(&mut self.conn.unnamed, Held::parsed(statement.clone()));
            let unnamed = Unnamed::Holds(statement.clone(), Described::default());
            self.statements.parsed_unnamed(unnamed, before, &mut self.marks.changes);
            self.stats.server_parses += 1;
            forward_parse(parse, is_ours.then_some(&*statement.text), len, plan);
            return Ok(());
        }
        match self.statements.look(parse.statement, &self.marks.changes) {
            Look::Unsettled => return Err(Stop::Unsettled),
            Look::Named(existing) => self.parse_again(&existing, parse, plan, len),
            Look::Unknown if self.statements.is_full(self.statements_max) => {
                self.refuse(REFUSED, plan);
                plan.skip(len);
            }
            Look::Unknown if parse.statement.len() > NAME_MAX => {
                return Err(too_long(Tag::Parse, body.len(), NAME_MAX));
            }
            Look::Unknown if self.mode != StatementMode::Session && self.interner.has_room() => {
                if self.marks.placing.prepares {
                    self.try_name(parse, plan);
                }
                let (mut statement, _) = self.intern(key, &parse);
                if self.statements.name_of(statement.id, &self.marks.changes).is_some() {
                    // Two names of one client for one text: each its own, so that errors bear the right one.
                    statement = self.interner.twin(&statement);
                }
                let effects = self.effects(&statement);
                self.before_parse(effects, &mut statement, plan)?;
                let named = Named::Shared(statement.clone(), Described::default());
                self.statements.parsed(parse.statement, named, &mut self.marks.changes);
                // What is described now has to be as it is now.
                let is_described = place::is_described_next(parse.statement, len, plan);
                self.parse_shared(&statement, is_described, plan);
                plan.skip(len);
            }
            Look::Unknown if !self.may_pin => {
                self.refuse(NO_MEMORY, plan);
                plan.skip(len);
            }
            Look::Unknown => {
                // Kept by no one but the server: the client keeps this server connection.
                self.marks.pins.add(PinReason::Statements);
                self.marks.tainted = true;
                self.take_back_early(parse.statement, plan);
                self.statements.parsed(parse.statement, Named::Raw, &mut self.marks.changes);
                self.conn.pipeline.sent(Expect::Parse, Origin::Client, CHANGES);
                let is_ours = sql::shows_watermark(parse.query);
                forward_parse(parse, is_ours.then_some(watermark::QUERY.as_bytes()), len, plan);
            }
        }
        Ok(())
    }

    /// The statement that a client parses; and whether it is not the client's text, but what answers it: nobody but a server
    /// knows the watermark, nor does one know the client's start-up values.
    #[inline]
    fn intern(&self, key: u32, parse: &Parse<'_>) -> (Rc<Statement>, bool) {
        let statement = self.interner.intern(self.pool, key, parse.query, parse.types, sql::scan);
        let is_ours = statement.effects.first == FirstWord::Show && sql::shows_watermark(parse.query);
        if is_ours {
            let text = watermark::QUERY.as_bytes();
            return (self.interner.intern(self.pool, key, text, parse.types, sql::scan), true);
        }
        if statement.effects.set.intersects(EffectSet::SETTINGS.union(EffectSet::LOCAL))
            && let Some(filled) = self.filled(key, parse)
        {
            return (filled, true);
        }
        (statement, false)
    }

    /// What running a statement may do, with what it sets in motion.
    #[inline]
    fn effects(&mut self, statement: &Statement) -> Effects {
        judge(self.catalog_key, self.catalog, self.library, statement)
    }

    /// The parse-time settings as they are now.
    fn present_key(&self) -> u32 {
        if self.marks.unsettled { self.profiles.private_key() } else { self.parse_key }
    }

    /// The server is given a statement that it must refuse, so that the transaction fails as it would for any other
    /// error; `note` says which the client is told.
    fn refuse(&mut self, note: u64, plan: &mut Plan<'_>) {
        self.conn.pipeline.sent(Expect::Parse, Origin::Client, note);
        self.marks.changes.held_destroyed();
        self.conn.unnamed = Held::Unknown;
        plan.insert(|out| encode::parse(out, b"", b"refused", &[0, 0]));
    }

    /// A new name for a statement: answered here if the server has it and no error can come of it, else sent.
    fn parse_shared(&mut self, statement: &Rc<Statement>, is_described: bool, plan: &mut Plan<'_>) {
        let place = self.conn.shelf.get(statement.id);
        // What was parsed with the types that another client was told is not what this one would get.
        let is_own = |parsed: &Parsed| is_described || !parsed.spelled;
        let present = place.is_some_and(|place| place.parsed.epoch == statement.epoch() && is_own(&place.parsed));
        let status = self.conn.pipeline.certain_status();
        let is_sound = status.is_some_and(|status| status != TxStatus::Failed);
        if present && is_sound && !is_described {
            self.conn.pipeline.sent(Expect::Parse, Origin::Local, CHANGES | statement.id);
            self.stats.local_parses += 1;
            return;
        }
        if !(present && is_described)
            && self.goes_by_name(statement, false)
            && self.make_room(statement, self.cold(), plan)
        {
            self.send_parse(statement, Origin::Client, CHANGES, false, plan);
        } else {
            self.parse_stripped(statement, Origin::Client, CHANGES | STRIPPED, false, plan);
        }
    }

    /// A `Parse` for a name in use: the server itself is to refuse it, or whatever else is wrong with it first.
    fn parse_again(&mut self, existing: &Named, parse: Parse<'_>, plan: &mut Plan<'_>, len: usize) {
        let Named::Shared(statement, _) = existing else {
            self.conn.pipeline.sent(Expect::Parse, Origin::Client, 0);
            return plan.forward(len);
        };
        if self.conn.pipeline.certain_status().is_some_and(|status| status != TxStatus::Failed) {
            // Parsed anew, so that it is there for certain: what is refused must not take its place. It takes room, if there
            // is any that is not in use.
            self.make_room(statement, None, plan);
        }
        self.ensure(statement, plan);
        self.conn.pipeline.sent(Expect::Parse, Origin::Client, CHANGES);
        self.marks.changes.refused(parse.statement);
        let prefix = self.interner.prefix;
        plan.insert(|out| {
            let mut name = Vec::new();
            prefix.write_name(statement.id, &mut name);
            encode::parse(out, &name, parse.query, parse.types);
        });
        plan.skip(len);
    }

    /// A `Parse` of the statement under our name; `spelled` with the types that a client was told.
    fn send_parse(&mut self, statement: &Statement, origin: Origin, note: u64, spelled: bool, plan: &mut Plan<'_>) {
        if self.conn.pipeline.sent(Expect::Parse, origin, note | statement.id) {
            self.conn.shelf.put(statement.id, statement.text.len() + statement.types.len(), statement.epoch());
            if let Some(place) = self.conn.shelf.get(statement.id) {
                (place.parsed.described, place.parsed.spelled) = statement.resolved.certain(spelled);
            }
            self.stats.server_parses += 1;
            if origin == Origin::Pooler {
                self.marks.changes.begin_named();
            }
        }
        let prefix = self.interner.prefix;
        plan.insert(|out| {
            statement.with_types(spelled, |types| {
                let name_len = prefix.name_len(statement.id);
                encode::header(out, b'P', name_len + 1 + statement.text.len() + 1 + types.len());
                prefix.write_name(statement.id, out);
                out.push(0);
                out.extend_from_slice(&statement.text);
                out.push(0);
                out.extend_from_slice(types);
            });
        });
    }

    fn send_close(&mut self, id: u64, plan: &mut Plan<'_>) {
        self.conn.shelf.remove(id);
        self.conn.pipeline.sent(Expect::Close, Origin::Pooler, id);
        self.marks.changes.begin_named();
        self.renamed(b'C', &Renamed::To(id), plan);
    }

    /// Makes sure that the server has the statement under our name when the next message arrives.
    fn ensure(&mut self, statement: &Statement, plan: &mut Plan<'_>) {
        if !self.conn.shelf.has(statement.id) {
            if self.conn.shelf.may_have(statement.id) {
                self.send_close(statement.id, plan);
            }
            self.send_parse(statement, Origin::Pooler, 0, false, plan);
        }
    }

    /// Makes the server's unnamed statement the client's.
    #[inline]
    fn ensure_unnamed(&mut self, purpose: Use<'_>, plan: &mut Plan<'_>) -> Result<Renamed, Stop> {
        match (&self.statements.unnamed, &self.conn.unnamed) {
            (Unnamed::Holds(mine, told), Held::Holds(theirs, _)) if Rc::ptr_eq(mine, theirs) && !told.is_known() => {}
            (Unnamed::Empty, Held::Empty) | (Unnamed::Raw, _) => {}
            (Unnamed::Holds(mine, told), theirs) => {
                let (mut statement, told) = (mine.clone(), *told);
                let held = matches!(theirs, Held::Holds(theirs, _) if Rc::ptr_eq(mine, theirs));
                let is_other = statement.parse_key != self.parse_key || self.marks.unsettled;
                let reads_otherwise = statement.parse_key != self.parse_key || self.marks.reads_otherwise;
                self.conn.strays |= reads_otherwise && statement.is_read();
                if !held && is_other {
                    let key = self.present_key();
                    statement = self.interner.intern_again(mine, (key, key));
                    statement.resolved.learn_from(&mine.resolved);
                    self.statements.unnamed = Unnamed::Holds(statement.clone(), told);
                }
                return self.strip(&statement, told, purpose, plan).map(|()| Renamed::Same);
            }
            (Unnamed::Empty, _) => {
                self.conn.pipeline.sent(Expect::Close, Origin::Pooler, UNNAMED);
                self.replace_held(Held::Empty);
                plan.insert(|out| encode::close_statement(out, b""));
            }
        }
        Ok(Renamed::Same)
    }

    /// What the server calls a statement that the client names.
    #[inline]
    fn resolve(&mut self, name: &[u8], purpose: Use<'_>, plan: &mut Plan<'_>) -> Result<Renamed, Stop> {
        let runs = purpose.runs;
        self.marks.placing.bound = 0;
        if self.conn.pipeline.is_skipping() {
            return Ok(Renamed::Same);
        }
        if name.is_empty() {
            if self.marks.changes.is_own_unsettled() || self.marks.changes.is_unnamed_unsettled() {
                return Err(Stop::Unsettled);
            }
            let effects = match (runs, &self.statements.unnamed) {
                (true, Unnamed::Holds(statement, _)) => {
                    Some(judge(self.catalog_key, self.catalog, self.library, statement))
                }
                _ => None,
            };
            let effects = match effects {
                Some(effects) => Some(self.before_bind(effects, None, purpose, plan)?),
                None => None,
            };
            self.ensure_unnamed(purpose, plan)?;
            if let (Some(effects), Unnamed::Holds(statement, _)) = (effects, &self.statements.unnamed) {
                let statement = statement.clone();
                self.binds(effects, &statement.text, purpose.portal);
            } else if runs {
                self.runs_unknown();
            }
            return Ok(Renamed::Same);
        }
        Ok(match self.statements.look(name, &self.marks.changes) {
            Look::Unsettled => return Err(Stop::Unsettled),
            Look::Named(Named::Shared(statement, told)) => {
                let statement = self.under_its_settings(name, statement, plan)?;
                let mut effects = if runs { self.effects(&statement) } else { Effects::default() };
                if !runs && statement.effects.set.intersects(EffectSet::EXECUTE) {
                    self.lend_executed(&statement, plan)?;
                }
                if runs {
                    effects = self.before_bind(effects, Some(&statement), purpose, plan)?;
                }
                self.statements.rename(name, &statement);
                let renamed = self.place(&statement, told, purpose, plan)?;
                if runs {
                    self.binds(effects, &statement.text, purpose.portal);
                }
                renamed
            }
            // Of a name that SQL gave nothing is known.
            Look::Named(Named::Raw) | Look::Unknown => {
                if runs {
                    self.runs_unknown();
                }
                self.as_it_is(name)
            }
        })
    }

    /// A text that is about to run as a portal.
    #[inline]
    fn binds(&mut self, effects: Effects, text: &[u8], portal: &[u8]) {
        self.marks.placing.shows = effects.first == FirstWord::Show && self.tells_name(text);
        if effects.set.intersects(EffectSet::COPY) && sql::reads_copy(text) {
            self.marks.copies = Some(self.marks.changes.batch());
        }
        self.runs(effects, text, Some(portal));
    }

    /// A name that is not of our making goes to the server as it is, for its own error; unless it is one of ours.
    fn as_it_is(&self, name: &[u8]) -> Renamed {
        if name.starts_with(self.interner.prefix.as_bytes()) { Renamed::Unknown } else { Renamed::Same }
    }

    /// `bind` may lack the end of the message; `body_len` is its whole length.
    #[inline]
    fn bind(&mut self, bind: Bind<'_>, body_len: usize, plan: &mut Plan<'_>) -> Result<(), Stop> {
        let purpose = Use { runs: true, portal: bind.portal, len: HEADER + body_len };
        self.marks.placing.binds(bind.portal);
        let renamed = self.resolve(bind.statement, purpose, plan)?;
        self.conn.pipeline.sent(Expect::Bind, Origin::Client, renamed.note());
        self.marks.placing.bound_to(bind.portal.is_empty());
        self.marks.placing.portal.clear();
        self.marks.placing.portal.extend_from_slice(bind.portal);
        self.stats.binds += 1;
        let names = bind.portal.len() + 1 + bind.statement.len() + 1;
        let prefix = self.interner.prefix;
        match renamed {
            Renamed::Same => plan.forward(HEADER + names + bind.rest.len()),
            renamed => {
                plan.insert(|out| {
                    encode::header(out, b'B', body_len - bind.statement.len() + renamed.len(prefix));
                    out.extend_from_slice(bind.portal);
                    out.push(0);
                    renamed.write(prefix, out);
                    out.push(0);
                });
                plan.skip(HEADER + names);
                plan.forward(bind.rest.len());
            }
        }
        Ok(())
    }

    fn describe(&mut self, body: &[u8], plan: &mut Plan<'_>) -> Result<(), Stop> {
        let (renamed, note) = match Target::parse(body).map_err(Stop::Malformed)? {
            Target::Statement(name) => {
                let bound = self.marks.placing.bound;
                let renamed = self.resolve(name, Use::DESCRIBED, plan)?;
                // The portal is still that of what was bound to it.
                self.marks.placing.bound = bound;
                let note = match &self.statements.unnamed {
                    Unnamed::Holds(statement, _) if name.is_empty() => STRIPPED | statement.id,
                    _ => renamed.note(),
                };
                (renamed, note)
            }
            Target::Portal(name) if *name == *self.marks.placing.portal => (Renamed::Same, self.marks.placing.bound),
            Target::Portal(_) => (Renamed::Same, 0),
        };
        let describes = if note == 0 { 0 } else { DESCRIBES };
        self.conn.pipeline.sent(Expect::Describe, Origin::Client, note | describes);
        self.forward_as(b'D', &renamed, HEADER + body.len(), plan);
        Ok(())
    }

    fn close(&mut self, body: &[u8], plan: &mut Plan<'_>) -> Result<(), Stop> {
        let len = HEADER + body.len();
        let name = match Target::parse(body).map_err(Stop::Malformed)? {
            Target::Statement(name) if !self.conn.pipeline.is_skipping() => name,
            target => {
                if let Target::Portal(name) = target {
                    self.marks.placing.closes(name);
                }
                self.conn.pipeline.sent(Expect::Close, Origin::Client, 0);
                plan.forward(len);
                return Ok(());
            }
        };
        if name.is_empty() {
            self.conn.pipeline.sent(Expect::Close, Origin::Client, CHANGES | UNNAMED);
            let before = std::mem::take(&mut self.conn.unnamed);
            self.statements.parsed_unnamed(Unnamed::Empty, before, &mut self.marks.changes);
            plan.forward(len);
            return Ok(());
        }
        match self.statements.look(name, &self.marks.changes) {
            Look::Unsettled => return Err(Stop::Unsettled),
            Look::Named(Named::Shared(..)) => {
                // The server keeps it, for the others.
                self.statements.closed(name, &mut self.marks.changes);
                self.conn.pipeline.sent(Expect::Close, Origin::Local, CHANGES);
                plan.skip(len);
            }
            Look::Named(Named::Raw) => {
                self.statements.closed(name, &mut self.marks.changes);
                self.conn.pipeline.sent(Expect::Close, Origin::Client, CHANGES);
                plan.forward(len);
            }
            Look::Unknown => {
                let renamed = self.as_it_is(name);
                self.conn.pipeline.sent(Expect::Close, Origin::Client, 0);
                self.forward_as(b'C', &renamed, len, plan);
            }
        }
        Ok(())
    }

    /// Passes a `Describe` or `Close` on, under the server's name for the statement.
    fn forward_as(&self, tag: u8, renamed: &Renamed, len: usize, plan: &mut Plan<'_>) {
        if matches!(renamed, Renamed::Same) {
            return plan.forward(len);
        }
        self.renamed(tag, renamed, plan);
        plan.skip(len);
    }

    /// A `Describe` or `Close` of a statement.
    fn renamed(&self, tag: u8, renamed: &Renamed, plan: &mut Plan<'_>) {
        let prefix = self.interner.prefix;
        plan.insert(|out| {
            encode::header(out, tag, 1 + renamed.len(prefix) + 1);
            out.push(b'S');
            renamed.write(prefix, out);
            out.push(0);
        });
    }

    /// A `Parse` too long to be kept. It passes under the client's name, and the client keeps the connection.
    fn long_parse(&mut self, body_len: u32, seen: &[u8], plan: &mut Plan<'_>) -> Result<bool, Stop> {
        let Some(end) = memchr::memchr(0, seen) else {
            return if seen.len() > NAME_MAX {
                Err(too_long(Tag::Parse, body_len as usize, NAME_MAX))
            } else {
                Ok(false)
            };
        };
        let name = seen.get(..end).unwrap_or_default();
        if !self.conn.pipeline.is_skipping() {
            self.marks.pins.add(PinReason::Statements);
            self.marks.tainted = true;
            self.marks.defines = true;
            if name.is_empty() {
                self.conn.pipeline.sent(Expect::Parse, Origin::Client, CHANGES | UNNAMED);
                let before = std::mem::replace(&mut self.conn.unnamed, Held::Unknown);
                self.statements.parsed_unnamed(Unnamed::Raw, before, &mut self.marks.changes);
            } else {
                match self.statements.look(name, &self.marks.changes) {
                    Look::Unsettled => return Err(Stop::Unsettled),
                    Look::Named(Named::Shared(..)) => return Err(too_long(Tag::Parse, body_len as usize, NAME_MAX)),
                    // One that is refused would have to be kept as it is.
                    Look::Unknown if self.statements.is_full(self.statements_max) => {
                        return Err(too_long(Tag::Parse, body_len as usize, self.inspect_max));
                    }
                    Look::Named(Named::Raw) => {
                        self.conn.pipeline.sent(Expect::Parse, Origin::Client, 0);
                    }
                    Look::Unknown => {
                        self.take_back_early(name, plan);
                        self.statements.parsed(name, Named::Raw, &mut self.marks.changes);
                        self.conn.pipeline.sent(Expect::Parse, Origin::Client, CHANGES);
                    }
                }
            }
        }
        self.scanner.stream(body_len, seen.len());
        plan.forward(HEADER + seen.len());
        Ok(true)
    }
}

/// Whether a text whose effects are not all known may ask for `currval` or `lastval`.
const fn may_ask(effects: Effects) -> bool {
    effects.set.contains(EffectSet::SUSPECT.union(EffectSet::OPAQUE))
        || matches!(effects.first, FirstWord::Do | FirstWord::Call | FirstWord::Execute)
}

/// What running a statement may do: see [`Request::effects`].
#[inline]
fn judge(key: u64, catalog: &Knowledge, library: &RefCell<sql::Library>, statement: &Statement) -> Effects {
    statement.judge(key, |text, own| catalog.suspects().judge(text, own, &mut library.borrow_mut()))
}

/// Passes a `Parse` of so many bytes on under the client's name: its own text, or one in its place.
#[inline]
fn forward_parse(parse: Parse<'_>, text: Option<&[u8]>, len: usize, plan: &mut Plan<'_>) {
    let Some(text) = text else { return plan.forward(len) };
    plan.insert(|out| encode::parse(out, parse.statement, text, parse.types));
    plan.skip(len);
}

/// Whether an `Execute` is of this portal.
#[cold]
fn is_of(portal: &[u8], body: &[u8]) -> bool {
    body.strip_prefix(portal).is_some_and(|rest| rest.first() == Some(&0))
}

/// For the test that a panic in one session ends just that one. Never in a release build.
#[cfg(debug_assertions)]
#[allow(clippy::panic, reason = "it is the point")]
fn panic_if_told(text: &[u8]) {
    assert!(
        !(text.starts_with(b"/* pgweir test: panic */") && std::env::var_os("PGWEIR_TEST_PANIC").is_some()),
        "told to panic by a test"
    );
}

/// The server's name for a statement.
enum Renamed {
    /// The client's own.
    Same,
    /// That of one of ours.
    To(u64),
    /// None: one of ours is its unnamed statement.
    Stripped(u64),
    /// One that no statement has.
    Unknown,
}

impl Renamed {
    /// What the pipeline is to remember of it.
    const fn note(&self) -> u64 {
        match self {
            Self::Same | Self::Unknown => 0,
            Self::To(id) => *id,
            Self::Stripped(id) => STRIPPED | *id,
        }
    }

    fn len(&self, prefix: Prefix) -> usize {
        match self {
            Self::Same | Self::Stripped(_) => 0,
            Self::To(id) => prefix.name_len(*id),
            Self::Unknown => prefix.as_bytes().len(),
        }
    }

    fn write(&self, prefix: Prefix, out: &mut Vec<u8>) {
        match self {
            Self::Same | Self::Stripped(_) => {}
            Self::To(id) => prefix.write_name(*id, out),
            Self::Unknown => out.extend_from_slice(prefix.as_bytes()),
        }
    }
}

fn too_long(tag: Tag, body_len: usize, limit: usize) -> Stop {
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    let length = u32::try_from(body_len + 4).unwrap_or(u32::MAX);
    Stop::Malformed(Malformed::Length { tag: tag as u8, length, limit })
}

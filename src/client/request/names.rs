//! SQL's `PREPARE`, `EXECUTE` and `DEALLOCATE` of what the client has prepared by the protocol: to Postgres it is the same name.
//!
//! The server keeps such a statement, for others, under a name of ours or not at all. For a text that is about it the server is
//! *lent* one under the client's own name, in front of the text, and it is taken back behind it: so every answer is the server's
//! own.
//!
//! ```text
//! DEALLOCATE s, PREPARE s AS ..   Close s, Parse s (a stand-in), Sync    │ the query   │ Close s, Sync
//! EXECUTE s                       Close s, Parse s (its own text), Sync  │ the query   │ Close s, Sync
//! DEALLOCATE s; PREPARE s AS ..   Close s, Parse s (a stand-in), Sync    │ the query   │ nothing
//! DEALLOCATE s, as a portal       Close s, Parse s (a stand-in)          │ its Execute │ Close s
//! PREPARE s AS .., as a portal                                           │ a Parse that is refused, in place of its Execute
//! EXECUTE s, by messages          Close s, Parse s (its own text), once  │ its Parse, Bind, Execute .. Sync │ Close s, Sync
//! a Parse of p, behind a PREPARE  Parse p, Close p                       │ the Parse, as always
//! ```
//!
//! A stand-in is an empty text, which is never refused, not even in a transaction that has failed; and it cannot be executed. The
//! first `Close` is for a name that only a function can have given to another statement, so that nothing else is refused, and
//! that statement is not run.
//!
//! A statement's own text may be refused: its table is gone, say. In front of a query nobody is told. The query runs, as far as it
//! would on Postgres, up to its `EXECUTE`, which says that there is no such statement; or, in a transaction that the refusal has
//! failed, up to its first statement. In the place of that error the client is told why. (So nothing is lent where that would
//! turn a `COMMIT` into a `ROLLBACK`.)
//!
//! What cannot be taken back behind a text, because the name may be another statement's by then (SQL has given it anew) or because a
//! `COPY` would read it, is left there: it is on that server connection, which nobody else is lent.

use std::rc::Rc;

use hashbrown::HashMap;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::frontend::{Parse, Tag};
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::HEADER;

use super::super::plan::Plan;
use super::super::statements::{Look, Named};
use super::{Request, Stop, is_of};
use crate::prepared::{CHANGES, LENT, NAMES, Statement, TAKEN};
use crate::sql::{self, EffectSet, Effects, FirstWord, Naming};

/// Statements lent for one text, at most. What else it names is not found.
const LENT_MAX: usize = 64;

/// Names that are looked at in one text, at most.
const NAMES_MAX: usize = 4 * LENT_MAX;

/// Effects of texts that are about prepared statements by their names.
pub(super) const BY_NAME: EffectSet = EffectSet::PREPARE.union(EffectSet::EXECUTE).union(FORGETS);

/// Effects of those that may deallocate some.
const FORGETS: EffectSet = EffectSet::DEALLOCATE.union(EffectSet::DISCARD_ALL);

/// Effects of those that may deallocate all.
const FORGETS_ALL: EffectSet = EffectSet::DEALLOCATE_ALL.union(EffectSet::DISCARD_ALL);

/// Effects of what ends a transaction that has failed.
const ENDS_FAILED: EffectSet = EffectSet::COMMIT.union(EffectSet::ROLLBACK).union(EffectSet::ROLLBACK_TO);

/// The types of a stand-in's parameters: one that is `internal`. No argument can be one, and none is no number of arguments that
/// it takes: it may be executed where the text does not show, and must not seem to have been.
///
/// Source: `PostgreSQL` 17, `pg_type.dat` and `EvaluateParams` in prepare.c.
const UNEXECUTABLE: &[u8] = &[0, 1, 0, 0, 8, 233];

/// What executing a portal does to names of the client's, or with them.
#[derive(Debug)]
pub enum Renaming {
    /// It deallocates all.
    None,
    /// It deallocates this one.
    Without(Box<[u8]>),
    /// It gives this one.
    With(Box<[u8]>),
    /// It may execute what these stand for.
    Executes(Vec<Box<[u8]>>),
}

impl Renaming {
    /// What executing `text` does. Nothing, if it cannot be read or is about no names.
    #[cold]
    pub(super) fn of(effects: Effects, text: &[u8]) -> Option<Self> {
        if effects.set.intersects(FORGETS_ALL) {
            return Some(Self::None);
        }
        match sql::prepared_names(text).pop()? {
            Naming::Deallocates(name) => Some(Self::Without(name)),
            Naming::Prepares(name) => Some(Self::With(name)),
            Naming::Executes(name) => Some(Self::Executes(vec![name])),
        }
    }
}

/// A statement of the client's that a text is about.
struct Loan {
    name: Box<[u8]>,
    /// What is lent; none, if all that matters is that it is there.
    statement: Option<Rc<Statement>>,
    /// It is not taken back behind the text.
    is_left: bool,
}

impl Request<'_> {
    /// Whether a text may make SQL, when it runs, that executes something of the client's.
    #[cold]
    pub(super) fn may_make(&self, effects: Effects, text: &[u8]) -> bool {
        effects.set.intersects(EffectSet::OPAQUE) && !self.made(text).is_empty()
    }

    /// The names of the client's that SQL which is made when `text` runs may execute: those that it spells out.
    fn made(&self, text: &[u8]) -> Vec<Box<[u8]>> {
        let mut made: Vec<Box<[u8]>> = Vec::new();
        if !self.statements.has_names() {
            return made;
        }
        let is_known = |name: &[u8]| !matches!(self.statements.look(name, &self.marks.changes), Look::Unknown);
        for name in sql::spelled_executions(text).take(NAMES_MAX) {
            if made.len() < LENT_MAX && is_known(&name) && !made.contains(&name) {
                made.push(name);
            }
        }
        made
    }

    /// A simple query that is about prepared statements by their names.
    #[cold]
    pub(super) fn query_by_name(
        &mut self,
        effects: Effects,
        text: &[u8],
        len: usize,
        plan: &mut Plan<'_>,
    ) -> Result<(), Stop> {
        let is_read = !self.conn.pipeline.is_skipping() && !self.conn.pipeline.is_copy_in();
        if is_read && self.marks.changes.awaits_query() {
            return Err(Stop::Unsettled);
        }
        let names = if is_read { self.names_in(effects, text)? } else { Vec::new() };
        let loans = if is_read { self.loans(effects, text, &names)? } else { Vec::new() };
        self.forget_sequences(effects, plan);
        for statement in loans.iter().filter_map(|loan| loan.statement.as_ref()) {
            // Under an EXPLAIN, say.
            let effects = self.effects(statement);
            self.forget_sequences(effects, plan);
        }
        for (at, Loan { name, statement, .. }) in loans.iter().enumerate() {
            self.lend(name, statement.as_deref(), LENT, plan);
            // What is refused is refused by itself.
            if statement.is_some() || at + 1 == loans.len() {
                self.end_loan(plan);
            }
        }
        let notes = is_read && (effects.set.intersects(FORGETS) || !loans.is_empty());
        if notes {
            let deallocates = names.into_iter().filter_map(|naming| match naming {
                Naming::Deallocates(name) => Some(name),
                Naming::Prepares(_) | Naming::Executes(_) => None,
            });
            let lent = loans.iter().map(|loan| loan.name.clone());
            self.marks.placing.tells = true;
            self.marks.changes.begin_query(deallocates.collect(), lent.collect());
        }
        let is_plain = effects.set == EffectSet::DEALLOCATE && !loans.is_empty();
        // Nothing but what was lent is deallocated by that: what is shared stays.
        let effects = if is_plain { Effects { set: EffectSet::NONE, harmless: false, ..effects } } else { effects };
        self.noted_query(if notes { NAMES } else { 0 }, effects, text);
        for statement in loans.iter().filter_map(|loan| loan.statement.as_ref()) {
            let effects = self.effects(statement);
            self.runs(effects, &statement.text, None);
        }
        plan.forward(len);
        self.restore(Tag::Query, text, plan);
        self.conn.littered |= loans.iter().any(|loan| loan.is_left);
        let mut taken = loans.iter().filter(|loan| !loan.is_left).peekable();
        if taken.peek().is_some() {
            for Loan { name, .. } in taken {
                self.take_back(name, plan);
            }
            self.end_loan(plan);
        }
        Ok(())
    }

    /// A text that is about statements by their names, or may make such SQL, is about to run: of a portal, or at once.
    #[cold]
    pub(super) fn runs_by_name(&mut self, effects: Effects, text: &[u8], portal: Option<&[u8]>) {
        self.marks.placing.prepares |= effects.set.intersects(EffectSet::PREPARE);
        let Some(portal) = portal else { return };
        let what = if effects.set.intersects(BY_NAME) { Renaming::of(effects, text) } else { None };
        let made = || Some(Renaming::Executes(self.made(text))).filter(|_| effects.set.intersects(EffectSet::OPAQUE));
        let is_empty = |what: &Renaming| matches!(what, Renaming::Executes(names) if names.is_empty());
        if let Some(what) = what.or_else(made).filter(|what| !is_empty(what)) {
            self.marks.placing.drops = true;
            self.marks.placing.renames(portal, what);
        }
    }

    /// What a text is about, in its order: in front, what SQL that it makes may execute. What it executes may itself be about others.
    fn names_in(&self, effects: Effects, text: &[u8]) -> Result<Vec<Naming>, Stop> {
        let prepared = if effects.set.intersects(BY_NAME) { sql::prepared_names(text) } else { Vec::new() };
        if !self.may_lend(effects) {
            return Ok(prepared);
        }
        let made = if effects.set.intersects(EffectSet::OPAQUE) { self.made(text) } else { Vec::new() };
        let mut names: Vec<Naming> = made.into_iter().map(Naming::Executes).collect();
        for naming in prepared {
            if let Naming::Executes(name) = &naming
                && names.len() < NAMES_MAX
                && let Some(statement) = self.own(name)?
                && statement.effects.set.intersects(BY_NAME)
            {
                names.extend(sql::prepared_names(&statement.text));
            }
            names.push(naming);
        }
        Ok(names)
    }

    /// Whether something can be put in front of a query at all, and that is not refused anyway.
    fn may_lend(&self, effects: Effects) -> bool {
        let pipeline = &self.conn.pipeline;
        let is_refused = pipeline.certain_status() == Some(TxStatus::Failed) && !effects.set.intersects(ENDS_FAILED);
        !pipeline.is_batch_open() && !is_refused
    }

    /// Whether a text in an open transaction may say what snapshot that has, or wait for a lock before it has one: what is lent in
    /// front of it would take it before.
    fn sets_snapshot(&self, text: &[u8]) -> bool {
        self.conn.pipeline.status() == TxStatus::Open && sql::spells_words(text, &[b"transaction", b"lock"])
    }

    /// What has to be lent for a text that is about `names`.
    fn loans(&self, effects: Effects, text: &[u8], names: &[Naming]) -> Result<Vec<Loan>, Stop> {
        let mut loans: Vec<Loan> = Vec::new();
        if !self.may_lend(effects) {
            return Ok(loans);
        }
        let mut reads = effects.set.intersects(EffectSet::COPY) && sql::reads_copy(text);
        let mut left = Used::all(effects, names);
        for naming in names.iter().take(NAMES_MAX) {
            let name = naming.name();
            let Some(used) = left.remove(name) else { continue };
            if loans.len() == LENT_MAX {
                break;
            }
            let Some(statement) = self.own(name)? else { continue };
            if used.is_executed && (self.sets_snapshot(text) || !self.may_execute(effects)?) {
                continue;
            }
            // What would be taken back behind a text that gives the name anew is what that made.
            let is_first =
                |naming: &Naming| effects.set.intersects(FORGETS_ALL) || !matches!(naming, Naming::Prepares(_));
            let is_left = used.is_prepared && used.is_deallocated && is_first(naming);
            let is_executed = matches!(naming, Naming::Executes(_));
            reads |= is_executed && reads_copy(&statement);
            loans.push(Loan { name: name.into(), statement: is_executed.then_some(statement), is_left });
        }
        if reads {
            // What stands behind the text would be read as data, and end it.
            for loan in &mut loans {
                loan.is_left = true;
            }
        }
        Ok(loans)
    }

    /// Whether a text with these `effects` may execute what is lent in front of it, and what may be refused. A transaction that
    /// this fails must not be told to commit by the text's first words; and one that has failed already takes nothing.
    fn may_execute(&self, effects: Effects) -> Result<bool, Stop> {
        let commits = match effects.first {
            FirstWord::Commit | FirstWord::End => true,
            FirstWord::Prepare => !effects.set.intersects(EffectSet::PREPARE),
            _ => false,
        };
        // What is ours in front of it is no reason to wait: a lease in which nothing was passed on yet would end meanwhile.
        if !self.conn.pipeline.is_settled() && !self.is_first_of_lease() {
            return Err(Stop::Unsettled);
        }
        Ok(match self.conn.pipeline.status() {
            TxStatus::Idle => true,
            TxStatus::Open => !commits,
            TxStatus::Failed => false,
        })
    }

    /// The statement of the client's that `name` stands for, if the server does not keep it under that name anyway.
    fn own(&self, name: &[u8]) -> Result<Option<Rc<Statement>>, Stop> {
        if name.is_empty() || name.starts_with(self.interner.prefix.as_bytes()) {
            return Ok(None);
        }
        match self.statements.look(name, &self.marks.changes) {
            Look::Unsettled => Err(Stop::Unsettled),
            Look::Named(Named::Shared(statement, _)) => Ok(Some(statement)),
            Look::Named(Named::Raw) | Look::Unknown => Ok(None),
        }
    }

    /// What `name` stands for, unless it is one that may be ours. Names have to be settled.
    fn named(&self, name: &[u8]) -> Option<Named> {
        match self.statements.look(name, &self.marks.changes) {
            Look::Named(named) if !name.starts_with(self.interner.prefix.as_bytes()) => Some(named),
            _ => None,
        }
    }

    /// An `Execute` of what may drop statements, or give one a name.
    #[cold]
    pub(super) fn execute_dropping(&mut self, body: &[u8], plan: &mut Plan<'_>) -> Result<(), Stop> {
        let len = HEADER + body.len();
        if self.conn.pipeline.is_skipping() {
            plan.forward(len);
            return Ok(());
        }
        if self.marks.changes.are_names_unsettled() {
            return Err(Stop::Unsettled);
        }
        let renaming = self.marks.placing.take_renaming(|portal| is_of(portal, body));
        if let Some(Renaming::With(name) | Renaming::Without(name)) = &renaming {
            self.take_back_early(name, plan);
        }
        if let Some(Renaming::With(name)) = &renaming
            && let Some(named @ Named::Shared(..)) = self.named(name)
        {
            let again = Parse { statement: name, query: b"", types: &[0, 0] };
            self.parse_again(&named, again, plan, len);
            return Ok(());
        }
        let gives = matches!(renaming, Some(Renaming::With(_)));
        let (mut lent, mut note) = (None, CHANGES);
        match renaming {
            Some(Renaming::None) => {
                self.statements.cleared(&mut self.marks.changes);
                // Also what was lent.
                for (_, id) in &mut self.marks.placing.lent {
                    *id = 0;
                }
            }
            Some(Renaming::Without(name)) if let Some(named) = self.named(&name) => {
                let is_refused = self.conn.pipeline.certain_status() == Some(TxStatus::Failed);
                if matches!(named, Named::Shared(..)) && !is_refused {
                    self.lend(&name, None, TAKEN, plan);
                    lent = Some(name.clone());
                }
                self.statements.closed(&name, &mut self.marks.changes);
            }
            Some(Renaming::Executes(names)) => {
                for name in names {
                    self.execute_lent(&name, plan)?;
                }
                note = self.marks.placing.shown_by(body);
            }
            _ => note = self.marks.placing.shown_by(body),
        }
        self.conn.pipeline.sent(Expect::Execute, Origin::Client, note);
        if !gives {
            self.conn.shelf.doubt_all();
        }
        plan.forward(len);
        if let Some(name) = lent {
            self.take_back(&name, plan);
        }
        Ok(())
    }

    /// What executes a statement of the client's is about to be parsed, bound or described: the server knows it by then. True if it
    /// is the client's.
    #[cold]
    pub(super) fn lend_executed(&mut self, executing: &Statement, plan: &mut Plan<'_>) -> Result<bool, Stop> {
        if !executing.effects.set.intersects(EffectSet::EXECUTE) {
            return Ok(false);
        }
        match sql::prepared_names(&executing.text).pop() {
            Some(Naming::Executes(name)) => self.lend_in_batch(&name, plan).map(|lent| lent.is_some()),
            _ => Ok(false),
        }
    }

    /// A portal that may execute `name` is about to run.
    fn execute_lent(&mut self, name: &[u8], plan: &mut Plan<'_>) -> Result<(), Stop> {
        if let Some(statement) = self.lend_in_batch(name, plan)? {
            let effects = self.effects(&statement);
            self.runs(effects, &statement.text, None);
        }
        Ok(())
    }

    /// The server has what `name` stands for under that name until the end of the batch; unless it refuses all, or is the only one
    /// to know.
    fn lend_in_batch(&mut self, name: &[u8], plan: &mut Plan<'_>) -> Result<Option<Rc<Statement>>, Stop> {
        let pipeline = &self.conn.pipeline;
        if pipeline.is_skipping() || pipeline.certain_status() == Some(TxStatus::Failed) {
            return Ok(None);
        }
        let Some(statement) = self.own(name)? else {
            self.take_back_early(name, plan);
            return Ok(None);
        };
        let placing = &mut self.marks.placing;
        let is_full = placing.lent.len() == LENT_MAX;
        match placing.lent.iter_mut().find(|(known, _)| **known == *name) {
            Some((_, id)) if *id == statement.id => return Ok(Some(statement)),
            Some((_, id)) => *id = statement.id,
            None if is_full => return Ok(None),
            None => placing.lent.push((name.into(), statement.id)),
        }
        placing.copies |= reads_copy(&statement);
        // Whoever is gone before the end of the batch leaves it there.
        (self.marks.resets, self.marks.tainted) = (true, true);
        let effects = self.effects(&statement);
        self.forget_sequences(effects, plan);
        self.lend_executed(&statement, plan)?;
        self.lend(name, Some(&statement), 0, plan);
        Ok(Some(statement))
    }

    /// What was lent in this batch under a name that is not what it stands for any more.
    pub(super) fn take_back_early(&mut self, name: &[u8], plan: &mut Plan<'_>) {
        let lent = &mut self.marks.placing.lent;
        if let Some(at) = lent.iter().position(|(known, _)| **known == *name) {
            lent.swap_remove(at);
            self.send_close_of(name, TAKEN, plan);
        }
    }

    /// The end of a batch was passed on: behind it, what was lent is taken back. Not in front, where an error would have it
    /// skipped; and not where it may be read as data.
    pub(super) fn end_batch_loans(&mut self, plan: &mut Plan<'_>) {
        let lent = std::mem::take(&mut self.marks.placing.lent);
        if lent.is_empty() {
            return;
        }
        // Behind a query in the middle of a batch the server may skip what comes up to the client's own Sync.
        if self.marks.placing.copies || self.conn.pipeline.is_copy_in() || self.conn.mixed {
            self.conn.littered = true;
            return;
        }
        for (name, _) in &lent {
            self.take_back(name, plan);
        }
        self.end_loan(plan);
    }

    /// The end of a batch was passed on, and nothing may stand behind it now.
    pub(super) fn leave_batch_loans(&mut self) {
        self.conn.littered |= !self.marks.placing.lent.is_empty();
        self.marks.placing.lent.clear();
    }

    /// A `Parse` of a name that SQL may have given: if it has, the server says so.
    #[cold]
    pub(super) fn try_name(&mut self, parse: Parse<'_>, plan: &mut Plan<'_>) {
        if parse.statement.starts_with(self.interner.prefix.as_bytes()) {
            return;
        }
        self.conn.pipeline.sent(Expect::Parse, Origin::Pooler, TAKEN);
        self.stats.server_parses += 1;
        plan.insert(|out| encode::parse(out, parse.statement, parse.query, parse.types));
        self.take_back(parse.statement, plan);
    }

    /// The server gets a statement under the client's own name.
    fn lend(&mut self, name: &[u8], statement: Option<&Statement>, note: u64, plan: &mut Plan<'_>) {
        self.send_close_of(name, 0, plan);
        self.conn.pipeline.sent(Expect::Parse, Origin::Pooler, note);
        self.stats.server_parses += 1;
        plan.insert(|out| match statement {
            Some(statement) => encode::parse(out, name, &statement.text, &statement.types),
            None => encode::parse(out, name, b"", UNEXECUTABLE),
        });
    }

    /// It has it no more.
    fn take_back(&mut self, name: &[u8], plan: &mut Plan<'_>) {
        self.send_close_of(name, TAKEN, plan);
    }

    fn send_close_of(&mut self, name: &[u8], note: u64, plan: &mut Plan<'_>) {
        self.conn.pipeline.sent(Expect::Close, Origin::Pooler, note);
        plan.insert(|out| encode::close_statement(out, name));
    }

    /// A `Sync` behind what is lent or taken back.
    fn end_loan(&mut self, plan: &mut Plan<'_>) {
        self.conn.pipeline.sent(Expect::Sync, Origin::Pooler, LENT);
        self.conn.shelf.end_batch();
        self.marks.changes.next_batch();
        plan.insert(|out| out.extend_from_slice(&encode::SYNC));
    }
}

/// Whether executing a statement may read what the client sends.
fn reads_copy(statement: &Statement) -> bool {
    statement.effects.set.intersects(EffectSet::COPY) && sql::reads_copy(&statement.text)
}

/// What a text does to what a name stands for.
#[derive(Clone, Copy, Default)]
struct Used {
    is_executed: bool,
    is_prepared: bool,
    is_deallocated: bool,
}

impl Used {
    /// The same of each of its names.
    fn all(effects: Effects, names: &[Naming]) -> HashMap<&[u8], Self, foldhash::fast::RandomState> {
        let is_deallocated = effects.set.intersects(FORGETS_ALL);
        let mut all: HashMap<&[u8], Self, foldhash::fast::RandomState> = HashMap::default();
        for naming in names {
            let used = all.entry(naming.name()).or_insert(Self { is_deallocated, ..Self::default() });
            match naming {
                Naming::Executes(_) => used.is_executed = true,
                Naming::Prepares(_) => used.is_prepared = true,
                Naming::Deallocates(_) => used.is_deallocated = true,
            }
        }
        all
    }
}

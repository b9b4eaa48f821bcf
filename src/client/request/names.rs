//! SQL's `PREPARE`, `EXECUTE` and `DEALLOCATE` of what the client has prepared by the protocol: to Postgres it is the same name.
//!
//! The server keeps such a statement, for others, under a name of ours or not at all. For a text that is about it the server is
//! *lent* one under the client's own name, in front of the text, and it is taken back behind it: so every answer is the server's
//! own.
//!
//! ```text
//! DEALLOCATE s, PREPARE s AS ..   Close s, Parse s (a stand-in), Sync    │ the query   │ Close s, Sync
//! EXECUTE s                       Close s, Parse s (its own text), Sync  │ the query   │ Close s, Sync
//! DEALLOCATE s, as a portal       Close s, Parse s (a stand-in)          │ its Execute │ Close s
//! PREPARE s AS .., as a portal                                           │ a Parse that is refused, in place of its Execute
//! a Parse of p, behind a PREPARE  Parse p, Close p                       │ the Parse, as always
//! ```
//!
//! A stand-in is an empty text, which is never refused, not even in a transaction that has failed; and it cannot be executed. If
//! a statement's own text is refused, that is the answer to its `EXECUTE`, which then fails, too: nobody is told. The first
//! `Close` is for a name that only a function can have given to another statement, so that nothing else is refused, and that
//! statement is not run.

use std::rc::Rc;

use hashbrown::HashMap;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::frontend::{Parse, Tag};
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::HEADER;

use super::super::plan::Plan;
use super::super::statements::{Look, Named};
use super::{Request, Stop, is_of, judge};
use crate::prepared::{CHANGES, LENT, NAMES, Statement, TAKEN};
use crate::settings;
use crate::sql::{self, EffectSet, Effects, Naming};

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

/// Effects of those in which a transaction may end.
const ENDS: EffectSet =
    EffectSet::BEGIN.union(EffectSet::COMMIT).union(EffectSet::ROLLBACK).union(EffectSet::ROLLBACK_TO);

/// Effects of what ends a transaction that has failed.
const ENDS_FAILED: EffectSet = EffectSet::COMMIT.union(EffectSet::ROLLBACK).union(EffectSet::ROLLBACK_TO);

/// The types of a stand-in's parameters: one that is `internal`. No argument can be one, and none is no number of arguments that
/// it takes: it may be executed where the text does not show, and must not seem to have been.
///
/// Source: `PostgreSQL` 17, `pg_type.dat` and `EvaluateParams` in prepare.c.
const UNEXECUTABLE: &[u8] = &[0, 1, 0, 0, 8, 233];

/// What executing a portal does to names of the client's.
#[derive(Debug)]
pub enum Renaming {
    /// It deallocates all.
    None,
    /// It deallocates this one.
    Without(Box<[u8]>),
    /// It gives this one.
    With(Box<[u8]>),
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
            Naming::Executes(_) => None,
        }
    }
}

/// A statement of the client's that a text is about.
struct Loan {
    name: Box<[u8]>,
    /// What is lent; none, if all that matters is that it is there.
    statement: Option<Rc<Statement>>,
}

impl Request<'_> {
    /// A simple query that is about prepared statements by their names.
    #[cold]
    pub(super) fn query_by_name(
        &mut self,
        effects: Effects,
        text: &[u8],
        len: usize,
        plan: &mut Plan<'_>,
    ) -> Result<(), Stop> {
        let names = sql::prepared_names(text);
        let is_read = !self.conn.pipeline.is_skipping() && !self.conn.pipeline.is_copy_in();
        if is_read && self.marks.changes.awaits_query() {
            return Err(Stop::Unsettled);
        }
        let loans = if is_read { self.loans(effects, &names)? } else { Vec::new() };
        self.forget_sequences(effects, plan);
        for statement in loans.iter().filter_map(|loan| loan.statement.as_ref()) {
            // Under an EXPLAIN, say.
            let effects = self.effects(statement);
            self.forget_sequences(effects, plan);
        }
        for Loan { name, statement } in &loans {
            self.lend(name, statement.as_deref(), LENT, plan);
        }
        if !loans.is_empty() {
            self.end_loan(plan);
        }
        let notes = is_read && (effects.set.intersects(FORGETS) || !loans.is_empty());
        if notes {
            let deallocates = names.into_iter().filter_map(|naming| match naming {
                Naming::Deallocates(name) => Some(name),
                Naming::Prepares(_) | Naming::Executes(_) => None,
            });
            self.marks.placing.tells = true;
            self.marks.changes.begin_query(deallocates.collect());
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
        self.restore(Tag::Query, b"", plan);
        for Loan { name, .. } in &loans {
            self.take_back(name, plan);
        }
        if !loans.is_empty() {
            self.end_loan(plan);
        }
        Ok(())
    }

    /// A text that is about statements by their names is about to run: of a portal, or at once.
    #[cold]
    pub(super) fn runs_by_name(&mut self, effects: Effects, text: &[u8], portal: Option<&[u8]>) {
        self.marks.placing.prepares |= effects.set.intersects(EffectSet::PREPARE);
        if let (Some(portal), Some(what)) = (portal, Renaming::of(effects, text)) {
            self.marks.placing.drops = true;
            self.marks.placing.renames(portal, what);
        }
    }

    /// What has to be lent for a text that is about `names`.
    fn loans(&self, effects: Effects, names: &[Naming]) -> Result<Vec<Loan>, Stop> {
        let mut loans: Vec<Loan> = Vec::new();
        let pipeline = &self.conn.pipeline;
        if pipeline.is_batch_open() || effects.set.intersects(EffectSet::COPY) {
            // Nothing can be put in front of it, or behind.
            return Ok(loans);
        }
        if pipeline.certain_status() == Some(TxStatus::Failed) && !effects.set.intersects(ENDS_FAILED) {
            // All of it is refused.
            return Ok(loans);
        }
        let mut left = Used::all(effects, names);
        for naming in names.iter().take(NAMES_MAX) {
            let name = naming.name();
            let Some(used) = left.remove(name) else { continue };
            if loans.len() == LENT_MAX {
                break;
            }
            let Some(statement) = self.own(name)? else { continue };
            // What would be taken back behind a text that gives the name anew is what that made.
            if used.is_prepared && used.is_deallocated || used.is_executed && !self.may_execute(effects, &statement)? {
                continue;
            }
            let is_first = matches!(naming, Naming::Executes(_));
            loans.push(Loan { name: name.into(), statement: is_first.then_some(statement) });
        }
        Ok(loans)
    }

    /// Whether a text with these `effects` may execute `statement` under its own name.
    fn may_execute(&self, effects: Effects, statement: &Statement) -> Result<bool, Stop> {
        let own = judge(self.catalog_key, self.catalog, self.library, statement);
        // What is in the same text must not outlast an error that is told in front of it; and what is taken back behind the data
        // of a COPY would end that.
        let never = own.set.intersects(ENDS.union(EffectSet::COPY)) || effects.set.intersects(ENDS);
        // It would be read under other settings than when it was prepared, as far as these are known.
        let is_other = statement.parse_key != self.parse_key && !settings::is_private(statement.parse_key);
        Ok(!never && !is_other && self.may_fail()?)
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

    /// Whether something that may be refused can be put in front of a query: not where the server refuses all.
    fn may_fail(&self) -> Result<bool, Stop> {
        // What is ours in front of it is no reason to wait: a lease in which nothing was passed on yet would end meanwhile.
        if !self.conn.pipeline.is_settled() && !self.is_first_of_lease() {
            return Err(Stop::Unsettled);
        }
        Ok(self.conn.pipeline.status() != TxStatus::Failed)
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
            Some(Renaming::None) => self.statements.cleared(&mut self.marks.changes),
            Some(Renaming::Without(name)) if let Some(named) = self.named(&name) => {
                let is_refused = self.conn.pipeline.certain_status() == Some(TxStatus::Failed);
                if matches!(named, Named::Shared(..)) && !is_refused {
                    self.lend(&name, None, TAKEN, plan);
                    lent = Some(name.clone());
                }
                self.statements.closed(&name, &mut self.marks.changes);
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

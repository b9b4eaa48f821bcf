//! Where a text may run: on the primary alone, or on a follower too.
//!
//! A follower refuses what writes. What it would *accept* and must not is found here: advisory locks, which lock nothing
//! there; what changes the session; what tells of the server and not of the data; and what nobody knows. So a text is a
//! read only if all that it is, calls and names is known to be one.

mod hint;
#[cfg(test)]
mod tests;

use hashbrown::HashMap;

use super::graph::worse;
use super::{Suspects, builtin};
use crate::sql::{Aside, Call, EffectSet, Facts, FirstWord, Library, Reading, Relation, first_word, opens};
use crate::stats::RouteReason;

pub use hint::Hint;

/// Where a text may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// On the primary alone, and the gravest reason for it. One that is only a write, a relation, the server or a function
    /// ([`RouteReason::Write`], [`RouteReason::Relation`], [`RouteReason::Server`], [`RouteReason::Function`]) is
    /// refused by a follower, or its answer is that server's own; anything else a follower may accept, and must not be
    /// asked, whatever a hint says.
    Primary(RouteReason),
    /// Anywhere: it is proven to read and to do nothing else.
    Read,
    /// It opens a transaction, and does nothing else: one that is read-only, if `read_only`; one that is as
    /// `default_transaction_read_only` says, if that is none.
    Begin {
        /// What the text says of it.
        read_only: Option<bool>,
    },
}

/// What is known of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judged {
    /// Where it may run.
    pub route: Route,
    /// What it wishes.
    pub hint: Option<Hint>,
}

/// What a follower may be asked for, by name; the worst of all that bear it, in whichever schema.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Routes {
    /// Users' functions, and why not.
    pub(super) functions: HashMap<Box<str>, Option<RouteReason>>,
    /// Users' tables and views, and why they are not to be read.
    pub(super) relations: HashMap<Box<str>, Option<RouteReason>>,
    /// Users' operators that are not to be used.
    pub(super) operators: HashMap<Box<str>, RouteReason>,
    /// Types that are not to be cast to.
    pub(super) types: HashMap<Box<str>, RouteReason>,
    /// What every statement may lead to.
    pub(super) all: Option<RouteReason>,
}

/// What changes the session, or hangs on it.
const SESSION: EffectSet = EffectSet::SETTINGS
    .union(EffectSet::LOCAL)
    .union(EffectSet::LISTEN)
    .union(EffectSet::UNLISTEN)
    .union(EffectSet::PREPARE)
    .union(EffectSet::EXECUTE)
    .union(EffectSet::DEALLOCATE)
    .union(EffectSet::DISCARD)
    .union(EffectSet::HOLD_CURSOR)
    .union(EffectSet::CLOSE_ALL)
    .union(EffectSet::LOAD);

/// What begins or ends a transaction.
const TRANSACTION: EffectSet = EffectSet::BEGIN
    .union(EffectSet::COMMIT)
    .union(EffectSet::ROLLBACK)
    .union(EffectSet::ROLLBACK_TO)
    .union(EffectSet::SAVEPOINT);

impl Suspects {
    /// Where `text` may run, a whole text of one `Query` or `Parse`.
    ///
    /// On the primary alone while nothing is known of the catalog, or not enough: see [`Survey::with_routes`]. What plainly
    /// writes is known to even then, lest a hint has it tried on a follower.
    ///
    /// [`Survey::with_routes`]: super::Survey::with_routes
    #[must_use]
    pub fn route(&self, text: &[u8], library: &mut Library) -> Judged {
        let known = self.routes();
        let route = match known {
            Some(known) => known.route(text, library),
            // For that nothing has to be known.
            None if writes(text) => Route::Primary(RouteReason::Write),
            None => Route::Primary(RouteReason::Unknown),
        };
        Judged { route, hint: Hint::of(text) }
    }
}

impl Routes {
    fn route(&self, text: &[u8], library: &mut Library) -> Route {
        if writes(text) {
            return Route::Primary(RouteReason::Write);
        }
        if matches!(first_word(text), FirstWord::Begin | FirstWord::Start) {
            return match opens(text) {
                None => Route::Primary(RouteReason::Transaction),
                Some(opening) if opening.serializable == Some(true) => Route::Primary(RouteReason::Serializable),
                Some(opening) => Route::Begin { read_only: opening.read_only },
            };
        }
        let mut barred = None;
        library.each(text, |reading| barred = worse(barred, self.bars(reading)));
        barred.map_or(Route::Read, Route::Primary)
    }

    /// Why a text that reads like this is not for a follower.
    fn bars(&self, reading: &Reading) -> Option<RouteReason> {
        let facts = &*reading.facts;
        let mut why = worse(self.all, itself(facts));
        if reading.asks_server && facts.statements > 0 {
            why = worse(why, Some(RouteReason::Server));
        }
        for call in &facts.calls {
            why = worse(why, self.bars_call(call));
        }
        // Who names what is written writes.
        for relation in facts.relations.iter().filter(|relation| !relation.written) {
            why = worse(why, self.bars_relation(relation, facts));
        }
        for operator in &facts.operators {
            why = worse(why, self.operators.get(operator).copied());
        }
        for name in &facts.types {
            why = worse(why, self.types.get(name).copied());
        }
        why
    }

    fn bars_call(&self, call: &Call) -> Option<RouteReason> {
        let (schema, name) = (&*call.schema, &*call.name);
        if is_temporary(schema) {
            return Some(RouteReason::Session);
        }
        let users = self.functions.get(name).copied();
        if let Some(Some(why)) = users {
            return Some(why);
        }
        // A built-in function that takes a row of any type reads it.
        if call.column || schema == "information_schema" && name.starts_with("_pg_") || builtin::reads(name) {
            return None;
        }
        match (name, builtin::bars(name)) {
            // Its argument was looked at.
            ("current_setting", _) => None,
            (_, Some(why)) => Some(why),
            (_, None) if users.is_some() => None,
            (_, None) => Some(RouteReason::Function),
        }
    }

    fn bars_relation(&self, relation: &Relation, facts: &Facts) -> Option<RouteReason> {
        let (schema, name) = (&*relation.schema, &*relation.name);
        if is_temporary(schema) {
            return Some(RouteReason::Session);
        }
        if let Some(why) = self.relations.get(name) {
            return *why;
        }
        let known = match schema {
            "information_schema" => true,
            "pg_catalog" => builtin::is_catalog(name),
            "" => builtin::is_catalog(name) || facts.expressions.iter().any(|expression| **expression == *name),
            _ => false,
        };
        match known {
            true => None,
            false if name.starts_with("pg_") && matches!(schema, "" | "pg_catalog") => Some(RouteReason::Server),
            false => Some(RouteReason::Relation),
        }
    }
}

/// Whether the first word says that it writes, whatever it names.
fn writes(text: &[u8]) -> bool {
    matches!(first_word(text), FirstWord::Insert | FirstWord::Update | FirstWord::Delete | FirstWord::Merge)
}

/// Whether what is in the schema belongs to the session.
fn is_temporary(schema: &str) -> bool {
    schema.starts_with("pg_temp")
}

/// Why statements that are by themselves like this are not for a follower, whatever they call and name.
fn itself(facts: &Facts) -> Option<RouteReason> {
    let (set, any) = (facts.set, |of: EffectSet| facts.set.intersects(of));
    if facts.statements == 0 {
        return (facts.writes || !set.is_empty()).then_some(RouteReason::Unknown);
    }
    if any(SESSION) {
        return Some(RouteReason::Session);
    }
    if facts.locks {
        return Some(RouteReason::Lock);
    }
    if any(EffectSet::OPAQUE) {
        return Some(RouteReason::Unknown);
    }
    if facts.writes || any(EffectSet::DDL.union(EffectSet::TEMP)) {
        return Some(RouteReason::Write);
    }
    if any(TRANSACTION) {
        return Some(RouteReason::Transaction);
    }
    facts.aside.map(|aside| match aside {
        Aside::Server => RouteReason::Server,
        Aside::Session => RouteReason::Session,
    })
}

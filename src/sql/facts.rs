//! What a text's statements do, as the server's own grammar reads them.

use super::effects::EffectSet;
use super::fingerprint::{Class, Literal};
use super::head::is_role;

/// What the statements of every text with one [`Fingerprint`](super::Fingerprint) do.
///
/// They are facts of the text alone: what stands behind a name, the catalog knows. So they hold in every database, for
/// every role and under every `search_path`, and a name is to be judged by the worst that bears it in any schema.
///
/// What depends on a literal's value or a parameter is a hole: [`Self::effects`] reads it in the text at hand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// What they may do to their session, the holes aside.
    pub set: EffectSet,
    /// Statements that are not empty.
    pub statements: usize,
    /// They write by themselves: data, the catalog, a file, a notification. What they call may write all the same.
    pub writes: bool,
    /// They lock rows or tables.
    pub locks: bool,
    /// What they call, each name and list of arguments once.
    pub calls: Box<[Call]>,
    /// The tables, views and sequences that they name, each once.
    pub relations: Box<[Relation]>,
    /// The operators that they name, without their schemas.
    pub operators: Box<[Box<str>]>,
    /// The types that they name, without their schemas.
    pub types: Box<[Box<str>]>,
    /// The common table expressions that they make; a relation of that name may be one of these.
    pub expressions: Box<[Box<str>]>,
    /// What those are about that are no queries, and are not told by the rest.
    pub aside: Option<Aside>,
}

/// What a statement is about that neither reads nor writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aside {
    /// The server: `SHOW`.
    Server,
    /// The session: cursors, `SET TRANSACTION`, `SET CONSTRAINTS`.
    Session,
}

/// A function, called by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its schema; empty if none is named.
    pub schema: Box<str>,
    /// Its name, as the server folds it.
    pub name: Box<str>,
    /// Its arguments; kept of those whose effect depends on them.
    pub arguments: Box<[Source]>,
    /// It is written as a column of a row, `row.name`, and is one, unless a function takes such a row.
    pub column: bool,
}

/// A table, view or sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// Its schema; empty if none is named.
    pub schema: Box<str>,
    /// Its name, as the server folds it. It may be that of a common table expression.
    pub name: Box<str>,
    /// Whether it is written, altered or locked, and not just read.
    pub written: bool,
}

/// Where an argument's value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The text's literal of this number, from 0.
    Literal(usize),
    /// The parameter of this number, from 1.
    Parameter(u32),
    /// An expression.
    Unreadable,
}

/// Functions whose arguments are kept, and those that run SQL that is handed to them as text.
const SET_CONFIG: &str = "set_config";
const CURRENT_SETTING: &str = "current_setting";
const LOCKS: [&str; 4] =
    ["pg_advisory_lock", "pg_advisory_lock_shared", "pg_try_advisory_lock", "pg_try_advisory_lock_shared"];
const UNLOCKS: [&str; 3] = ["pg_advisory_unlock", "pg_advisory_unlock_shared", "pg_advisory_unlock_all"];
const SEQUENCES: [&str; 4] = ["nextval", "setval", "currval", "lastval"];
pub(crate) const RUNNERS: [&str; 19] = [
    "connectby",
    "cursor_to_xml",
    "cursor_to_xmlschema",
    "database_to_xml",
    "database_to_xml_and_xmlschema",
    "dblink",
    "dblink_exec",
    "dblink_open",
    "dblink_send_query",
    "query_to_xml",
    "query_to_xml_and_xmlschema",
    "query_to_xmlschema",
    "schema_to_xml",
    "schema_to_xml_and_xmlschema",
    "table_to_xml",
    "table_to_xml_and_xmlschema",
    "ts_rewrite",
    "ts_stat",
    "xpath_table",
];

/// Whether the function runs SQL that it is handed as text, or reads a view that it is told by name: what it does no one can say.
#[must_use]
pub fn runs_text(function: &str) -> bool {
    // Of crosstab the manual has everybody make functions of their own ("tablefunc", `crosstabN`): in C, stable, by names like
    // crosstab_float8_6_cols.
    RUNNERS.contains(&function) || function.starts_with("crosstab")
}

/// Whether a setting of this name belongs to applications, and so comes along with its session.
#[must_use]
pub fn is_own_setting(name: &[u8]) -> bool {
    memchr::memchr(b'.', name).is_some()
}

impl Call {
    /// Whether its effect depends on its arguments.
    #[must_use]
    pub fn has_holes(name: &str) -> bool {
        name == SET_CONFIG || [&LOCKS[..], &UNLOCKS, &SEQUENCES].iter().any(|names| names.contains(&name))
    }

    /// Whether its arguments are kept.
    #[cfg(feature = "grammar")]
    #[must_use]
    pub(super) fn keeps_arguments(name: &str) -> bool {
        Self::has_holes(name) || name == CURRENT_SETTING
    }

    /// Whether it asks for a setting that may be the server's own: one without a dot in its name, or one that cannot be
    /// told.
    fn asks_server<'a>(&self, value: impl Fn(usize) -> Option<&'a [u8]>) -> bool {
        let own = |name: &[u8]| is_own_setting(name);
        *self.name == *CURRENT_SETTING
            && !matches!(self.arguments.first(), Some(Source::Literal(number)) if value(*number).is_some_and(own))
    }

    /// What it does to its session; `value` reads a literal.
    fn effects<'a>(&self, value: impl Fn(usize) -> Option<&'a [u8]>) -> EffectSet {
        let name = &*self.name;
        if LOCKS.contains(&name) {
            return EffectSet::ADVISORY_LOCK;
        }
        if UNLOCKS.contains(&name) {
            return EffectSet::ADVISORY_UNLOCK;
        }
        match name {
            "currval" | "lastval" => EffectSet::SEQUENCE | EffectSet::CURRVAL,
            "nextval" | "setval" => EffectSet::SEQUENCE,
            SET_CONFIG => self.set_config(value),
            _ => EffectSet::NONE,
        }
    }

    /// `set_config(name, value, is_local)`.
    fn set_config<'a>(&self, value: impl Fn(usize) -> Option<&'a [u8]>) -> EffectSet {
        let read = |at: usize| match self.arguments.get(at) {
            Some(Source::Literal(number)) => value(*number),
            _ => None,
        };
        if read(2).is_some_and(|local| local.eq_ignore_ascii_case(b"true") || local == b"t") {
            return EffectSet::LOCAL;
        }
        match read(0) {
            Some(name) if is_role(name) => EffectSet::SETTINGS | EffectSet::ROLE,
            Some(name) if name.contains(&b'.') => EffectSet::SETTINGS | EffectSet::CUSTOM,
            Some(_) => EffectSet::SETTINGS,
            None => EffectSet::SETTINGS | EffectSet::ROLE | EffectSet::CUSTOM | EffectSet::OPAQUE,
        }
    }
}

impl Facts {
    /// What is assumed of a text that cannot be read.
    #[must_use]
    pub fn unknown() -> Self {
        Self { set: EffectSet::OPAQUE, writes: true, locks: true, ..Self::default() }
    }

    /// What `text`, whose literals these are, may do to its session.
    #[must_use]
    pub fn effects(&self, text: &[u8], literals: &[Literal]) -> EffectSet {
        let value = |number: usize| literals.get(number).and_then(|literal| value_of(text, *literal));
        self.calls.iter().fold(self.set, |set, call| set | call.effects(value))
    }

    /// Whether `text`, whose literals these are, asks for a setting that may be the server's own.
    #[must_use]
    pub fn asks_server(&self, text: &[u8], literals: &[Literal]) -> bool {
        let value = |number: usize| literals.get(number).and_then(|literal| value_of(text, *literal));
        self.calls.iter().any(|call| call.asks_server(value))
    }

    /// Whether the text reads and does nothing else, if all that it calls and names does the same.
    #[must_use]
    pub fn reads_only(&self) -> bool {
        const OTHER: EffectSet = EffectSet::SETTINGS
            .union(EffectSet::LISTEN)
            .union(EffectSet::UNLISTEN)
            .union(EffectSet::PREPARE)
            .union(EffectSet::EXECUTE)
            .union(EffectSet::DEALLOCATE)
            .union(EffectSet::DISCARD)
            .union(EffectSet::HOLD_CURSOR)
            .union(EffectSet::TEMP)
            .union(EffectSet::LOAD)
            .union(EffectSet::OPAQUE)
            .union(EffectSet::DDL);
        !self.writes && !self.locks && !self.set.intersects(OTHER) && !self.calls.iter().any(Call::does_more)
    }
}

impl Call {
    /// Whether it is known to do more than to read.
    fn does_more(&self) -> bool {
        Self::has_holes(&self.name) || runs_text(&self.name) || self.name.contains("advisory")
    }
}

/// The value of a literal that is spelled out: no escapes, no doubled quotes.
fn value_of(text: &[u8], literal: Literal) -> Option<&[u8]> {
    let span = text.get(literal.start..literal.end)?;
    match literal.class {
        Class::Bool => Some(span),
        Class::String => {
            let body = match span {
                [b'\'', body @ .., b'\''] => body,
                [b'$', rest @ ..] => {
                    let tag = 2 + memchr::memchr(b'$', rest)?;
                    return span.get(tag..span.len().checked_sub(tag)?);
                }
                _ => return None,
            };
            memchr::memchr2(b'\'', b'\\', body).is_none().then_some(body)
        }
        Class::Int4 | Class::Int8 | Class::Numeric | Class::Bit => None,
    }
}

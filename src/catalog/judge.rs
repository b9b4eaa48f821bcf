//! Judging a text by the names that it mentions.

use aho_corasick::{AhoCorasick, AhoCorasickKind};
use hashbrown::HashMap;

use crate::sql::{EffectSet, Facts, Library, runs_text};

/// Custom settings that the functions of a database set by name, at most: these are asked for in an audit.
const NAMES_MAX: usize = 64;

/// With more patterns than this the automaton is a smaller and slower one.
const FAST_MAX: usize = 500;

/// An identifier in an escaped spelling: it may be any.
const ESCAPED: &str = "u&\"";

/// Names, by what they stand for, and what comes of mentioning them.
#[derive(Debug, Default)]
pub(super) struct Marks {
    pub(super) functions: HashMap<Box<str>, EffectSet>,
    pub(super) read: HashMap<Box<str>, EffectSet>,
    pub(super) written: HashMap<Box<str>, EffectSet>,
    pub(super) operators: HashMap<Box<str>, EffectSet>,
    pub(super) types: HashMap<Box<str>, EffectSet>,
    /// Of every command that changes the catalog.
    pub(super) ddl: EffectSet,
    /// Of every statement.
    pub(super) all: EffectSet,
}

/// The names in a database that lead to something that may leave something behind in a session.
#[derive(Debug)]
pub struct Suspects {
    marks: Marks,
    names: Vec<Box<str>>,
    finder: AhoCorasick,
    /// What each pattern of the finder may come to, where the text cannot be read.
    worst: Vec<EffectSet>,
}

/// What a function does that runs SQL as text, and what cannot be read.
const RUNS: EffectSet = EffectSet::SUSPECT.union(EffectSet::OPAQUE);

/// Built-in functions, and those of well-known extensions, that run SQL as text have this in their names.
const RUNNERS: [&str; 6] = ["query_to_xml", "cursor_to_xml", "dblink", "connectby", "crosstab", "ts_stat"];

impl Suspects {
    /// None if there are more names than can be looked for.
    pub(super) fn new(mut marks: Marks, mut names: Vec<Box<str>>) -> Option<Self> {
        if names.len() > NAMES_MAX {
            // There are too many to ask for: whoever sets one keeps the server connection.
            names.clear();
            let kinds =
                [&mut marks.functions, &mut marks.read, &mut marks.written, &mut marks.operators, &mut marks.types];
            let all = kinds.into_iter().flat_map(HashMap::values_mut);
            for set in all.filter(|set| set.contains(EffectSet::SUSPECT)) {
                *set |= EffectSet::OPAQUE | EffectSet::CUSTOM;
            }
        }
        let mut patterns: Vec<(&str, EffectSet)> = RUNNERS.iter().map(|name| (*name, RUNS)).collect();
        patterns.push((ESCAPED, RUNS));
        for kind in [&marks.functions, &marks.read, &marks.written, &marks.operators, &marks.types] {
            patterns.extend(kind.iter().map(|(name, set)| (&**name, *set)));
        }
        let kind = if patterns.len() <= FAST_MAX { AhoCorasickKind::DFA } else { AhoCorasickKind::ContiguousNFA };
        let finder = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .kind(Some(kind))
            .build(patterns.iter().map(|(name, _)| *name))
            .ok()?;
        let worst = patterns.iter().map(|(_, set)| *set).collect();
        Some(Self { marks, names, finder, worst })
    }

    /// The custom settings that functions set by name.
    #[must_use]
    pub fn names(&self) -> &[Box<str>] {
        &self.names
    }

    /// What `text` does beyond its own effects, `own`, through what it mentions.
    pub fn judge(&self, text: &[u8], own: EffectSet, library: &mut Library) -> EffectSet {
        let mut set = self.marks.all;
        if own.intersects(EffectSet::DDL) {
            set |= self.marks.ddl;
        }
        if !self.finder.is_match(text) {
            return set;
        }
        for reading in library.read(text) {
            set |= if reading.facts.writes && reading.facts.statements == 0 {
                self.mentioned(text)
            } else {
                self.of(&reading.facts)
            };
        }
        set
    }

    /// What a text that cannot be read mentions.
    fn mentioned(&self, text: &[u8]) -> EffectSet {
        let found = self.finder.find_overlapping_iter(text);
        let worst = |found: aho_corasick::Match| self.worst.get(found.pattern().as_usize()).copied();
        found.filter_map(worst).fold(EffectSet::NONE, EffectSet::union)
    }

    fn of(&self, facts: &Facts) -> EffectSet {
        let marks = &self.marks;
        let mut set = EffectSet::NONE;
        let mut add = |kind: &HashMap<Box<str>, EffectSet>, name: &str| {
            set |= kind.get(name).copied().unwrap_or_default();
        };
        for call in &facts.calls {
            add(&marks.functions, &call.name);
        }
        for relation in &facts.relations {
            // What is written is read as well, and a view's rules are of both kinds.
            add(&marks.read, &relation.name);
            if relation.written {
                add(&marks.written, &relation.name);
            }
        }
        for operator in &facts.operators {
            add(&marks.operators, operator);
        }
        for name in &facts.types {
            add(&marks.types, name);
        }
        if facts.calls.iter().any(|call| runs_text(&call.name)) {
            set |= RUNS;
        }
        set
    }
}

impl Default for Suspects {
    #[allow(clippy::expect_used, reason = "the patterns are constants")]
    fn default() -> Self {
        Self::new(Marks::default(), Vec::new()).expect("a few short patterns")
    }
}

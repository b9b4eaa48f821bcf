//! Judging a text by the names that it mentions.

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, AhoCorasickKind, packed};
use hashbrown::HashMap;

use super::route::Routes;
use crate::sql::{EffectSet, Facts, LASTS, Library, lasts, mentions_seed, runs_text};

/// Custom settings that the functions of a database set by name, at most: these are asked for in an audit.
const NAMES_MAX: usize = 64;

/// With more patterns than this the automaton is a smaller and slower one.
const FAST_MAX: usize = 100;

/// Longer texts are not copied to be looked through; bytes.
const COPY_MAX: usize = 16 * 1024;

/// An identifier in an escaped spelling: it may be any.
const ESCAPED: &str = "u&\"";

/// Names, by what they stand for, and what comes of mentioning them.
#[derive(Debug, Default, PartialEq, Eq)]
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
    /// Of the names that are spelled differently in another encoding.
    foreign: EffectSet,
    /// None while nothing is known: whatever runs may do anything.
    finder: Option<Finder>,
    /// What a follower may be asked for; none if that is not known.
    routes: Option<Routes>,
}

#[derive(Debug)]
struct Finder {
    automaton: AhoCorasick,
    /// Looks through many bytes of a text at once, in lower case; none if the names are too many, or the processor cannot.
    quick: Option<packed::Searcher>,
    /// What each pattern may come to, where the text cannot be read.
    worst: Vec<EffectSet>,
}

/// What only begins and ends transactions sets nothing in motion that was not judged before.
const ENDS: EffectSet = EffectSet::BEGIN
    .union(EffectSet::COMMIT)
    .union(EffectSet::ROLLBACK)
    .union(EffectSet::ROLLBACK_TO)
    .union(EffectSet::SAVEPOINT);

/// What a function does that runs SQL as text, and what cannot be read.
const RUNS: EffectSet = EffectSet::SUSPECT.union(EffectSet::OPAQUE);

/// What a function does whose traces only the end of the session wipes.
const STAYS: EffectSet = EffectSet::SUSPECT.union(EffectSet::LOAD);

/// Built-in functions, and those of well-known extensions, that run SQL as text have this in their names.
const RUNNERS: [&str; 11] = [
    "connectby",
    "crosstab",
    "cursor_to_xml",
    "database_to_xml",
    "dblink",
    "query_to_xml",
    "schema_to_xml",
    "table_to_xml",
    "ts_rewrite",
    "ts_stat",
    "xpath_table",
];

impl Suspects {
    /// Nothing is known.
    #[must_use]
    pub fn unknown() -> Self {
        Self { marks: Marks::default(), names: Vec::new(), foreign: EffectSet::NONE, finder: None, routes: None }
    }

    /// None if there are more names than can be looked for.
    pub(super) fn new(mut marks: Marks, mut names: Vec<Box<str>>, routes: Option<Routes>) -> Option<Self> {
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
        let fixed = RUNNERS.iter().chain([&ESCAPED]);
        let mut patterns: Vec<(Cow<'_, str>, EffectSet)> = fixed.map(|name| (Cow::Borrowed(*name), RUNS)).collect();
        patterns.extend(LASTS.iter().map(|name| (Cow::Borrowed(*name), STAYS)));
        for kind in [&marks.functions, &marks.read, &marks.written, &marks.operators, &marks.types] {
            patterns.extend(kind.iter().map(|(name, set)| (as_quoted(name), *set)));
        }
        let foreign = patterns.iter().filter(|(name, _)| !name.is_ascii());
        let foreign = foreign.fold(EffectSet::NONE, |all, (_, set)| all | *set);
        let kind = if patterns.len() <= FAST_MAX { AhoCorasickKind::DFA } else { AhoCorasickKind::ContiguousNFA };
        let automaton = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .kind(Some(kind))
            .build(patterns.iter().map(|(name, _)| &**name))
            .ok()?;
        let quick =
            packed::Config::new().builder().extend(patterns.iter().map(|(name, _)| name.to_ascii_lowercase())).build();
        let worst = patterns.iter().map(|(_, set)| *set).collect();
        Some(Self { marks, names, foreign, finder: Some(Finder { automaton, quick, worst }), routes })
    }

    /// Whether every text is judged alike by both.
    #[must_use]
    pub fn judges_like(&self, other: &Self) -> bool {
        let known = self.finder.is_some() == other.finder.is_some();
        known && self.marks == other.marks && self.names == other.names && self.routes == other.routes
    }

    /// What a follower may be asked for.
    pub(super) const fn routes(&self) -> Option<&Routes> {
        self.routes.as_ref()
    }

    /// The custom settings that functions set by name.
    #[must_use]
    pub fn names(&self) -> &[Box<str>] {
        &self.names
    }

    /// What `text` does beyond its own effects, `own`, through what it mentions.
    pub fn judge(&self, text: &[u8], own: EffectSet, library: &mut Library) -> EffectSet {
        let Some(finder) = &self.finder else {
            let only_ends = !own.is_empty() && ENDS.contains(own);
            return match () {
                () if only_ends => EffectSet::NONE,
                () if mentions_seed(text) => EffectSet::UNJUDGED | STAYS,
                () => EffectSet::UNJUDGED,
            };
        };
        let mut set = self.marks.all;
        if own.intersects(EffectSet::DDL) {
            set |= self.marks.ddl;
        }
        if !self.foreign.is_empty() && !text.is_ascii() {
            // Whatever encoding it is in, it is not the one that the names came in.
            set |= self.foreign;
        }
        if !finder.finds_any(text, library) {
            return set;
        }
        library.each(text, |reading| {
            set |= if reading.facts.writes && reading.facts.statements == 0 {
                finder.mentioned(text)
            } else {
                self.of(&reading.facts)
            };
        });
        set
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
        if facts.calls.iter().any(|call| lasts(call.name.as_bytes())) {
            set |= STAYS;
        }
        set
    }
}

impl Finder {
    /// Whether `text` mentions any of the names.
    fn finds_any(&self, text: &[u8], library: &mut Library) -> bool {
        match &self.quick {
            // The automaton takes a step per byte, each of which waits for the one before.
            Some(quick) if text.len() <= COPY_MAX => quick.find(library.in_lower_case(text)).is_some(),
            _ => self.automaton.is_match(text),
        }
    }

    /// What a text that cannot be read mentions.
    fn mentioned(&self, text: &[u8]) -> EffectSet {
        let found = self.automaton.find_overlapping_iter(text);
        let worst = |found: aho_corasick::Match| self.worst.get(found.pattern().as_usize()).copied();
        found.filter_map(worst).fold(EffectSet::NONE, EffectSet::union)
    }
}

/// A name as it stands in a text, but for the quotes around it.
pub(super) fn as_quoted(name: &str) -> Cow<'_, str> {
    if name.contains('"') { Cow::Owned(name.replace('"', "\"\"")) } else { Cow::Borrowed(name) }
}

/// Of a database without any.
impl Default for Suspects {
    #[allow(clippy::expect_used, reason = "the patterns are constants")]
    fn default() -> Self {
        Self::new(Marks::default(), Vec::new(), None).expect("a few short patterns")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql;

    #[test]
    fn a_text_that_calls_what_runs_text_is_read_whatever_it_is_called_by() {
        let (suspects, mut library) = (Suspects::default(), Library::default());
        for name in sql::RUNNERS.iter().chain(&["crosstab", "crosstab3", "crosstab_float8_6_cols"]) {
            for text in [format!("SELECT {name}('x')"), format!("SELECT public.{}('x')", name.to_uppercase())] {
                let set = suspects.judge(text.as_bytes(), EffectSet::NONE, &mut library);
                assert!(set.contains(RUNS), "{text}");
            }
        }
        assert!(suspects.judge(b"SELECT lower('x')", EffectSet::NONE, &mut library).is_empty());
    }

    #[test]
    fn a_name_is_found_wherever_it_stands_however_it_is_spelled_and_however_long_the_text_is() {
        let (mut library, mut quick) = (Library::default(), 0);
        for count in [0, 1, 40, 200] {
            let own =
                (0..count).map(|n| (format!("{}Größe_{n}", if n % 2 == 0 { "app_" } else { "É\"" }).into(), RUNS));
            let marks = Marks { functions: own.collect(), ..Marks::default() };
            let names: Vec<String> = marks.functions.keys().map(|name| as_quoted(name).into_owned()).collect();
            let suspects = Suspects::new(marks, Vec::new(), None).unwrap();
            let finder = suspects.finder.as_ref().unwrap();
            quick += usize::from(finder.quick.is_some());
            for name in names.iter().map(String::as_str).chain(RUNNERS).chain(LASTS).chain([ESCAPED, "crosstab3"]) {
                for spelled in [name.to_owned(), name.to_ascii_uppercase(), format!("x{name}x")] {
                    for (before, behind) in [(0, 0), (1, 0), (0, 1), (15, 17), (64, 64), (COPY_MAX, 0), (0, COPY_MAX)] {
                        let text = format!("{}{spelled}{}", "é".repeat(before), "u".repeat(behind));
                        assert!(finder.finds_any(text.as_bytes(), &mut library), "{spelled} of {count}");
                        let cut = &text.as_bytes()[..2 * before + spelled.len() - 1];
                        assert_eq!(
                            finder.finds_any(cut, &mut library),
                            finder.automaton.is_match(cut),
                            "{spelled}, cut"
                        );
                    }
                }
            }
        }
        assert!(quick < 4, "there are too many of them once");
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            assert!(quick >= 2, "{quick}");
        }
    }
}

//! The rows of a survey, and what follows from them.

use std::rc::Rc;

use aho_corasick::AhoCorasick;
use hashbrown::HashMap;

use super::judge::{Marks, Suspects};
use crate::sql::{self, EffectSet};

/// Functions and relations that are looked at, at most. With more nothing is known, and every lease is audited.
const FUNCTIONS_MAX: usize = 10_000;
const RELATIONS_MAX: usize = 20_000;

/// Extensions in C whose functions leave nothing behind in a session, so that they may be called for every row of the
/// day. What is immutable or stable in any extension is trusted in this, too.
const TRUSTED: [&str; 27] = [
    "amcheck",
    "bloom",
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "dict_int",
    "earthdistance",
    "fuzzystrmatch",
    "hstore",
    "intarray",
    "isn",
    "ltree",
    "pageinspect",
    "pg_buffercache",
    "pg_freespacemap",
    "pg_prewarm",
    "pg_stat_statements",
    "pg_trgm",
    "pg_visibility",
    "pgcrypto",
    "pgrowlocks",
    "pgstattuple",
    "postgis",
    "unaccent",
    "uuid-ossp",
    "vector",
];

/// The rows of one survey.
#[derive(Debug, Default)]
pub struct Survey {
    /// Names of functions, by node.
    functions: Vec<(Box<str>, Box<str>, sql::Body, Vec<u8>)>,
    relations: Vec<(Box<str>, Box<str>)>,
    edges: Vec<(Box<str>, Box<str>)>,
    /// A row was none of ours.
    strange: bool,
}

impl Survey {
    /// Takes in one row: its kind, and
    ///
    /// | kind | columns |
    /// |---|---|
    /// | `f` | a function: object id, name, its language, volatility and extension, its body |
    /// | `r` | a relation: object id, name |
    /// | `e` | the first node leads to the second |
    ///
    /// A node is `f` and a function's id; `r` or `w` and the id of a relation that is read or written; `o` and an
    /// operator; `t` and a type; `ddl`; or `all`, which every statement may lead to.
    pub fn row<'a>(&mut self, columns: impl Iterator<Item = Option<&'a [u8]>>) {
        let mut columns = columns.map(Option::unwrap_or_default);
        let mut bytes = || columns.next().unwrap_or_default();
        let kind = bytes();
        let mut text = || String::from_utf8_lossy(bytes()).into_owned().into_boxed_str();
        match kind {
            b"f" => {
                let (id, name, about) = (text(), text(), text());
                let source = text();
                let body = function(&about, &source);
                self.functions.push((format!("f{id}").into(), name, body, source.as_bytes().to_vec()));
            }
            b"r" => self.relations.push((text(), text())),
            b"e" => self.edges.push((text(), text())),
            _ => self.strange = true,
        }
    }

    /// What follows: the names that lead to something that leaves something behind. None if there is too much to tell.
    #[must_use]
    pub fn close(self) -> Option<Suspects> {
        if self.strange || self.functions.len() > FUNCTIONS_MAX || self.relations.len() > RELATIONS_MAX {
            return None;
        }
        let mut graph = Graph::default();
        graph.mark("f0", EffectSet::SUSPECT | EffectSet::OPAQUE);
        for (from, to) in &self.edges {
            graph.edge(from, to);
        }
        self.mentions(&mut graph)?;
        let mut names = Vec::new();
        for (node, _, body, _) in &self.functions {
            graph.mark(node, body.set);
            names.extend_from_slice(&body.names);
        }
        names.sort_unstable();
        names.dedup();
        let marks = graph.close();
        let of = |node: &str| marks.get(node).copied().unwrap_or_default();
        let mut known = Marks { all: of("all"), ddl: of("ddl"), ..Marks::default() };
        let mut add = |kind: fn(&mut Marks) -> &mut HashMap<Box<str>, EffectSet>, name: &str, set: EffectSet| {
            if !set.is_empty() {
                *kind(&mut known).entry(name.into()).or_default() |= set;
            }
        };
        for (node, name, ..) in &self.functions {
            add(|marks| &mut marks.functions, name, of(node));
        }
        for (id, name) in &self.relations {
            add(|marks| &mut marks.read, name, of(&format!("r{id}")));
            add(|marks| &mut marks.written, name, of(&format!("w{id}")));
        }
        for (from, _) in &self.edges {
            if let Some(name) = from.strip_prefix('o') {
                add(|marks| &mut marks.operators, name, of(from));
            } else if let Some(name) = from.strip_prefix('t') {
                add(|marks| &mut marks.types, name, of(from));
            }
        }
        Suspects::new(known, names)
    }

    /// A body leads to every function and relation that it mentions.
    fn mentions(&self, graph: &mut Graph) -> Option<()> {
        let mut names: HashMap<&str, Vec<Rc<str>>> = HashMap::default();
        for (node, name, ..) in &self.functions {
            names.entry(name).or_default().push(Rc::from(&**node));
        }
        for (id, name) in &self.relations {
            let nodes = names.entry(name).or_default();
            nodes.push(format!("r{id}").into());
            nodes.push(format!("w{id}").into());
        }
        let (patterns, nodes): (Vec<&str>, Vec<Vec<Rc<str>>>) = names.into_iter().unzip();
        let finder = AhoCorasick::builder().ascii_case_insensitive(true).build(&patterns).ok()?;
        for (node, _, _, source) in &self.functions {
            let mut seen = vec![];
            for found in finder.find_overlapping_iter(source) {
                let at = found.pattern().as_usize();
                let joins = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
                let whole = !joins(found.start().checked_sub(1).and_then(|before| source.get(before)))
                    && !joins(source.get(found.end()));
                if whole && !seen.contains(&at) {
                    seen.push(at);
                    for to in nodes.get(at).into_iter().flatten() {
                        graph.edge(node, to);
                    }
                }
            }
        }
        Some(())
    }
}

/// What a function does by itself.
fn function(about: &str, source: &str) -> sql::Body {
    let mut about = about.splitn(3, ' ');
    let mut next = || about.next().unwrap_or_default();
    let (language, volatility, extension) = (next(), next(), next());
    match language {
        "sql" | "plpgsql" => sql::body(source.as_bytes()),
        "internal" => sql::Body::default(),
        "c" if volatility != "v" || TRUSTED.contains(&extension) => sql::Body::default(),
        _ => sql::Body { set: EffectSet::SUSPECT | EffectSet::OPAQUE, names: Vec::new() },
    }
}

/// Who leads to whom, and what each node does.
#[derive(Default)]
struct Graph {
    /// From the end of each edge to its beginnings.
    back: HashMap<Box<str>, Vec<Box<str>>>,
    marks: HashMap<Box<str>, EffectSet>,
}

impl Graph {
    fn edge(&mut self, from: &str, to: &str) {
        self.back.entry(to.into()).or_default().push(from.into());
    }

    fn mark(&mut self, node: &str, set: EffectSet) {
        if !set.is_empty() {
            *self.marks.entry(node.into()).or_default() |= set;
        }
    }

    /// Whatever leads to a node does what it does.
    fn close(mut self) -> HashMap<Box<str>, EffectSet> {
        let mut todo: Vec<Box<str>> = self.marks.keys().cloned().collect();
        while let Some(node) = todo.pop() {
            let set = self.marks.get(&node).copied().unwrap_or_default();
            for from in self.back.get(&node).into_iter().flatten() {
                let known = self.marks.entry(from.clone()).or_default();
                if !known.contains(set) {
                    *known |= set;
                    todo.push(from.clone());
                }
            }
        }
        self.marks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::Library;

    const SUSPECT: EffectSet = EffectSet::SUSPECT;
    const NONE: EffectSet = EffectSet::NONE;

    fn suspects(rows: &[&[&str]]) -> Suspects {
        let mut survey = Survey::default();
        for row in rows {
            survey.row(row.iter().map(|column| Some(column.as_bytes())));
        }
        survey.close().unwrap()
    }

    #[test]
    fn whatever_leads_to_a_suspect_is_one() {
        let suspects = suspects(&[
            &["f", "1", "hide", "plpgsql v ", "BEGIN PERFORM set_config('app.x', 'a', false); END"],
            &["f", "2", "caller", "sql v ", "SELECT hide()"],
            &["f", "3", "plain", "plpgsql v ", "BEGIN UPDATE quiet SET a = 1; END"],
            &["f", "4", "on_change", "plpgsql v ", "BEGIN PERFORM Caller(); RETURN NEW; END"],
            &["f", "5", "writer", "plpgsql v ", "BEGIN INSERT INTO audited VALUES (1); END"],
            &["f", "6", "similarity", "c i pg_trgm", "x"],
            &["f", "7", "native", "c v mine", "x"],
            &["f", "8", "maker", "plpgsql v ", "BEGIN EXECUTE q; END"],
            &["r", "11", "audited", "", ""],
            &["r", "12", "quiet", "", ""],
            &["r", "13", "parent", "", ""],
            &["r", "14", "peek", "", ""],
            &["e", "w11", "f4", "", ""],
            &["e", "w13", "w11", "", ""],
            &["e", "r14", "f1", "", ""],
            &["e", "o===", "f2", "", ""],
        ]);
        assert_eq!(suspects.names(), [Box::<str>::from("app.x")]);
        let mut library = Library::default();
        #[rustfmt::skip]
        let table: [(&str, EffectSet); 22] = [
            ("SELECT hide()",                              SUSPECT),
            ("SELECT app.caller(1)",                       SUSPECT),
            ("SELECT plain()",                             NONE),
            ("SELECT 'hide()'",                            NONE),
            ("SELECT hidden FROM t -- hide()",             NONE),
            ("SELECT * FROM audited",                      NONE),
            ("INSERT INTO audited VALUES (1)",             SUSPECT),
            ("INSERT INTO AUDITED VALUES (1)",             SUSPECT),
            ("INSERT INTO quiet SELECT * FROM audited",    NONE),
            ("WITH x AS (DELETE FROM s.audited RETURNING 1) SELECT * FROM x", SUSPECT),
            ("UPDATE parent SET a = 1",                    SUSPECT),
            ("SELECT writer()",                            SUSPECT),
            ("SELECT * FROM peek",                         SUSPECT),
            ("SELECT similarity('a', 'b')",                NONE),
            ("SELECT native()",                            SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT maker()",                             SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT 1 === 2",                             SUSPECT),
            ("SELECT U&\"\\0068ide\"()",                   SUSPECT),
            ("SELECT x.hide FROM x",                       SUSPECT),
            ("SELECT query_to_xml('SELECT 1', true, true, '')", SUSPECT.union(EffectSet::OPAQUE)),
            ("COPY audited FROM STDIN",                    SUSPECT),
            ("EXPLAIN ANALYZE SELECT hide()",              SUSPECT),
        ];
        for (text, want) in table {
            assert_eq!(suspects.judge(text.as_bytes(), NONE, &mut library), want, "{text}");
        }
    }

    #[test]
    fn a_database_without_functions_has_no_suspects_and_one_with_too_many_is_not_known() {
        let mut library = Library::default();
        assert_eq!(suspects(&[]).judge(b"SELECT f() FROM t", NONE, &mut library), NONE);
        assert_eq!(library.parsed, 0, "what mentions no suspect is not parsed");
        let mut survey = Survey::default();
        for n in 0..=FUNCTIONS_MAX {
            survey.row([&b"f"[..], n.to_string().as_bytes(), b"f", b"sql v ", b""].into_iter().map(Some));
        }
        assert!(survey.close().is_none());
        let mut survey = Survey::default();
        survey.row([Some(&b"mock"[..])].into_iter());
        assert!(survey.close().is_none());
    }
}

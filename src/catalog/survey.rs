//! The rows of a survey, and what follows from them.

use std::rc::Rc;

use aho_corasick::AhoCorasick;
use hashbrown::{HashMap, HashSet};

use super::builtin;
use super::graph::{Graph, Way, worse};
use super::judge::{Marks, Suspects, as_quoted};
use super::route::Routes;
use crate::sql::{self, EffectSet, Mention};
use crate::stats::RouteReason;

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

/// Those of them that tell of the server's files and shared memory, of locks and of statistics, and further ones in C whose
/// functions run text, reach other servers or tell of the connection: none is for a follower.
const NO_DATA: [&str; 17] = [
    "adminpack",
    "amcheck",
    "dblink",
    "file_fdw",
    "lo",
    "pageinspect",
    "pg_buffercache",
    "pg_freespacemap",
    "pg_prewarm",
    "pg_stat_statements",
    "pg_visibility",
    "pg_walinspect",
    "pgrowlocks",
    "pgstattuple",
    "postgres_fdw",
    "sslinfo",
    "xml2",
];

/// Functions of trusted extensions that change something of their session.
const CHANGERS: [&str; 2] = ["isn_weak", "set_limit"];

/// One function.
#[derive(Debug)]
struct Function {
    node: Box<str>,
    name: Box<str>,
    /// Its language, volatility and extension.
    about: Box<str>,
    source: Box<str>,
}

/// One table or view.
#[derive(Debug)]
struct Relation {
    id: Box<str>,
    name: Box<str>,
    /// Its persistence and kind, a letter each, as in `pg_class`.
    about: Box<str>,
}

/// The rows of one survey.
#[derive(Debug, Default)]
pub struct Survey {
    functions: Vec<Function>,
    relations: Vec<Relation>,
    edges: Vec<(Box<str>, Box<str>, Way)>,
    /// A row was none of ours.
    strange: bool,
    /// It is asked for what a follower may run, too.
    routes: bool,
}

impl Survey {
    /// One that is also to tell which texts a follower may run. It keeps the name of every function and relation.
    #[must_use]
    pub fn with_routes() -> Self {
        Self { routes: true, ..Self::default() }
    }

    /// Takes in one row: its kind, and
    ///
    /// | kind | columns |
    /// |---|---|
    /// | `f` | a function: object id, name, its language, volatility and extension, its body |
    /// | `r` | a relation: object id, name, its persistence and kind |
    /// | `e` | the first node leads to the second |
    /// | `v` | reading or writing the relation with this id leads to the node; to `v` and an id: to that relation alike |
    /// | `d` | the same, but what a follower runs does not: it only reads |
    /// | `i` | reading or writing the relation with the first id does that to the one with the second |
    ///
    /// A node is `f` and a function's id; `r` or `w` and the id of a relation that is read or written; `o` and an
    /// operator; `t` and a type; `ddl`; or `all`, which every statement may lead to. `f0` stands for built-in functions that
    /// leave something behind in a session, `s0` for `currval` and `lastval` in a view, `b0` for what is built in and not for a
    /// follower, `b1` for advisory locks among that.
    pub fn row<'a>(&mut self, columns: impl Iterator<Item = Option<&'a [u8]>>) {
        let mut columns = columns.map(Option::unwrap_or_default);
        let mut bytes = || columns.next().unwrap_or_default();
        let kind = bytes();
        let mut text = || Box::<str>::from(String::from_utf8_lossy(bytes()));
        match kind {
            b"f" => {
                let (id, name, about, source) = (text(), text(), text(), text());
                self.functions.push(Function { node: format!("f{id}").into(), name, about, source });
            }
            b"r" => self.relations.push(Relation { id: text(), name: text(), about: text() }),
            b"e" => self.edges.push((text(), text(), Way::Both)),
            b"i" => {
                let (from, to) = (text(), text());
                // Nothing of the child is asked for by who reads the parent, but for its rows.
                self.edges.push((format!("w{from}").into(), format!("w{to}").into(), Way::Effects));
                self.edges.push((format!("r{from}").into(), format!("r{to}").into(), Way::Reads));
            }
            b"v" | b"d" => {
                let way = if kind == b"v" { Way::Both } else { Way::Effects };
                let (relation, to) = (text(), text());
                let edges = match to.strip_prefix('v') {
                    None => [("r", "", &*to), ("w", "", &*to), ("w", "", &*to)],
                    Some(to) => [("r", "r", to), ("w", "w", to), ("w", "r", to)],
                };
                for (from, to_way, to) in edges.into_iter().take(if to.starts_with('v') { 3 } else { 2 }) {
                    self.edges.push((format!("{from}{relation}").into(), format!("{to_way}{to}").into(), way));
                }
            }
            _ => self.strange = true,
        }
    }

    /// What follows, which takes a while for a large database: the names that lead to something that leaves something behind. None if there is too much to tell.
    #[must_use]
    pub fn close(self) -> Option<Suspects> {
        if self.strange || self.functions.len() > FUNCTIONS_MAX || self.relations.len() > RELATIONS_MAX {
            return None;
        }
        let mut graph = Graph::default();
        graph.mark("f0", EffectSet::SUSPECT | EffectSet::OPAQUE);
        graph.mark("s0", EffectSet::SEQUENCE | EffectSet::CURRVAL);
        graph.mark("b1", EffectSet::XACT_LOCK);
        for (from, to, way) in &self.edges {
            graph.edge(from, to, *way);
        }
        self.mentions(&mut graph)?;
        let mut names = Vec::new();
        for function in &self.functions {
            let body = function.body();
            graph.mark(&function.node, body.set);
            names.extend(body.names);
        }
        names.sort_unstable();
        names.dedup();
        let routes = self.routes.then(|| self.routes(&mut graph));
        let marks = graph.close();
        let of = |node: &str| marks.get(node).copied().unwrap_or_default();
        let mut known = Marks { all: of("all"), ddl: of("ddl"), ..Marks::default() };
        let mut add = |kind: fn(&mut Marks) -> &mut HashMap<Box<str>, EffectSet>, name: &str, set: EffectSet| {
            if !set.is_empty() {
                *kind(&mut known).entry(name.into()).or_default() |= set;
            }
        };
        for Function { node, name, .. } in &self.functions {
            add(|marks| &mut marks.functions, name, of(node));
        }
        for Relation { id, name, .. } in &self.relations {
            add(|marks| &mut marks.read, name, of(&format!("r{id}")));
            add(|marks| &mut marks.written, name, of(&format!("w{id}")));
        }
        for (from, ..) in &self.edges {
            if let Some(name) = from.strip_prefix('o') {
                add(|marks| &mut marks.operators, name, of(from));
            } else if let Some(name) = from.strip_prefix('t') {
                add(|marks| &mut marks.types, name, of(from));
            }
        }
        Suspects::new(known, names, routes)
    }

    /// What a follower may be asked for. Bars the nodes that it must not be.
    fn routes(&self, graph: &mut Graph) -> Routes {
        graph.bar("f0", RouteReason::Session);
        graph.bar("s0", RouteReason::Session);
        graph.bar("b0", RouteReason::Server);
        graph.bar("b1", RouteReason::Lock);
        let names: HashSet<&str> = self.functions.iter().map(|function| &*function.name).collect();
        for function in &self.functions {
            if let Some(why) = function.bars(&names) {
                graph.bar(&function.node, why);
            }
        }
        let mut stored: HashSet<Box<str>> = HashSet::default();
        for Relation { id, about, .. } in &self.relations {
            match about.as_bytes() {
                // Its rows are its own.
                [b'p', b'm'] => drop(stored.insert(format!("r{id}").into())),
                [b'u', _] | [_, b'f'] => graph.bar(&format!("r{id}"), RouteReason::Relation),
                _ => {}
            }
        }
        let bars = graph.close_bars(|node| !(node.starts_with('w') || node == "ddl" || stored.contains(node)));
        let of = |node: &str| bars.get(node).copied();
        let mut routes = Routes::default();
        for Function { node, name, .. } in &self.functions {
            let why = routes.functions.entry(name.clone()).or_default();
            *why = worse(*why, of(node));
        }
        for Relation { id, name, .. } in &self.relations {
            let why = routes.relations.entry(name.clone()).or_default();
            *why = worse(*why, of(&format!("r{id}")));
        }
        // A JSON function calls the cast of its argument's type.
        routes.all = worse(of("all"), worse(of("tjson"), of("tjsonb")));
        for (from, ..) in &self.edges {
            let Some(why) = of(from) else { continue };
            if let Some(name) = from.strip_prefix('o') {
                // These are used without being named.
                if matches!(name, "=" | "<>" | "<" | ">" | "<=" | ">=") {
                    routes.all = worse(routes.all, Some(why));
                }
                routes.operators.insert(name.into(), why);
            } else if let Some(name) = from.strip_prefix('t') {
                routes.types.insert(name.into(), why);
            }
        }
        routes
    }

    /// A body leads to every function and relation that it mentions, every operator, and every type that it may cast to.
    fn mentions(&self, graph: &mut Graph) -> Option<()> {
        let mut names: HashMap<&str, Vec<Rc<str>>> = HashMap::default();
        for Function { node, name, .. } in &self.functions {
            names.entry(name).or_default().push(Rc::from(&**node));
        }
        for Relation { id, name, .. } in &self.relations {
            let nodes = names.entry(name).or_default();
            nodes.push(format!("r{id}").into());
            nodes.push(format!("w{id}").into());
        }
        let others: HashSet<&str> =
            self.edges.iter().map(|(from, ..)| &**from).filter(|from| from.starts_with(['o', 't'])).collect();
        for node in others {
            names.entry(node.get(1..).unwrap_or_default()).or_default().push(node.into());
        }
        names.remove("");
        let (names, nodes): (Vec<&str>, Vec<Vec<Rc<str>>>) = names.into_iter().unzip();
        let patterns: Vec<_> = names.into_iter().map(as_quoted).collect();
        let finder = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .build(patterns.iter().map(|name| name.as_bytes()))
            .ok()?;
        for Function { node, source, .. } in &self.functions {
            let source = source.as_bytes();
            let mut seen = vec![];
            for found in finder.find_overlapping_iter(source) {
                let at = found.pattern().as_usize();
                let joins = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
                let is_operator = source
                    .get(found.start())
                    .is_some_and(|byte| byte.is_ascii_punctuation() && !matches!(byte, b'_' | b'"'));
                // An operator may stand next to anything, and a longer one has another name: that errs on the right side.
                let whole = is_operator
                    || !joins(found.start().checked_sub(1).and_then(|before| source.get(before)))
                        && !joins(source.get(found.end()));
                if whole && !seen.contains(&at) {
                    seen.push(at);
                    for to in nodes.get(at).into_iter().flatten() {
                        graph.edge(node, to, Way::Both);
                    }
                }
            }
        }
        Some(())
    }
}

impl Function {
    /// Why it is not for a follower by itself; `users` are the names of all functions that are not built in.
    fn bars(&self, users: &HashSet<&str>) -> Option<RouteReason> {
        let mut about = self.about.splitn(3, ' ');
        let mut next = || about.next().unwrap_or_default();
        let (language, volatility, extension) = (next(), next(), next());
        let plpgsql = language == "plpgsql";
        let known = match language {
            "sql" | "plpgsql" => {
                let mut why = None;
                sql::routine(self.source.as_bytes(), plpgsql, &mut |mention| {
                    why = worse(why, bars_mention(mention, users));
                });
                return why;
            }
            _ if CHANGERS.contains(&&*self.name) || NO_DATA.contains(&extension) => false,
            // An aggregate is of this language, and leads to the functions that it is made of.
            "internal" => volatility != "v",
            "c" => volatility != "v" && !extension.is_empty() || TRUSTED.contains(&extension),
            _ => false,
        };
        if known { builtin::bars(&self.name) } else { Some(RouteReason::Function) }
    }

    /// What it does by itself.
    fn body(&self) -> sql::Body {
        let mut about = self.about.splitn(3, ' ');
        let mut next = || about.next().unwrap_or_default();
        let (language, volatility, extension) = (next(), next(), next());
        match language {
            "sql" | "plpgsql" => sql::body(self.source.as_bytes()),
            // What it opens stays open for whoever is next, and nothing but the end of the session is sure to close it.
            "c" if self.name.starts_with("dblink_connect") => {
                sql::Body { set: EffectSet::SUSPECT | EffectSet::OPAQUE | EffectSet::LOAD, names: Vec::new() }
            }
            "internal" | "c" if CHANGERS.contains(&&*self.name) => {
                sql::Body { set: EffectSet::SUSPECT | EffectSet::OPAQUE, names: Vec::new() }
            }
            "internal" | "c" if volatility != "v" || TRUSTED.contains(&extension) => sql::Body::default(),
            // It shares variables with whoever is next, and no audit sees them.
            _ if &*self.source == "keeps" => {
                sql::Body { set: EffectSet::SUSPECT | EffectSet::OPAQUE | EffectSet::LOAD, names: Vec::new() }
            }
            _ => sql::Body { set: EffectSet::SUSPECT | EffectSet::OPAQUE, names: Vec::new() },
        }
    }
}

/// Why a function that mentions this is not for a follower.
fn bars_mention(mention: Mention<'_>, users: &HashSet<&str>) -> Option<RouteReason> {
    let folded = |name: &[u8]| String::from_utf8_lossy(name).to_ascii_lowercase();
    match mention {
        Mention::Writes => Some(RouteReason::Write),
        Mention::Locks => Some(RouteReason::Lock),
        Mention::Session => Some(RouteReason::Session),
        Mention::Opaque => Some(RouteReason::Function),
        Mention::Call { name, quoted, literal } => {
            let name = if quoted { String::from_utf8_lossy(name).replace("\"\"", "\"") } else { folded(name) };
            if builtin::reads(&name) || !quoted && builtin::is_syntax(&name) {
                return None;
            }
            match builtin::bars(&name) {
                Some(_) if name == "current_setting" && literal.is_some_and(sql::is_own_setting) => None,
                Some(why) => Some(why),
                None if users.contains(&*name) => None,
                None => Some(RouteReason::Function),
            }
        }
        Mention::Name(name) => {
            let name = folded(name);
            let rest = name.strip_prefix("pg_")?;
            if rest.starts_with("temp") {
                return Some(RouteReason::Session);
            }
            let known = matches!(rest, "catalog" | "lsn" | "node_tree" | "snapshot")
                || builtin::is_catalog(&name)
                || builtin::reads(&name);
            (!known).then_some(RouteReason::Server)
        }
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
            &["f", "9", "set_limit", "c v pg_trgm", "x"],
            &["f", "8", "maker", "plpgsql v ", "BEGIN EXECUTE q; END"],
            &["f", "20", "by_sign", "plpgsql v ", "BEGIN RETURN 1===2; END"],
            &["f", "21", "by_cast", "plpgsql v ", "BEGIN RETURN 'x'::mood; END"],
            &["f", "22", "shares", "plperl v ", "keeps"],
            &["f", "23", "perl", "plperl v ", ""],
            &["f", "24", "guards", "plpgsql v ", "BEGIN PERFORM pg_advisory_xact_lock(1); END"],
            &["e", "tmood", "f1", "", ""],
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
        let table: [(&str, EffectSet); 34] = [
            ("SELECT by_sign()",                           SUSPECT),
            ("SELECT by_cast()",                           SUSPECT),
            ("SELECT CAST('x' AS mood)",                   SUSPECT),
            ("SELECT shares()",                            SUSPECT.union(EffectSet::OPAQUE).union(EffectSet::LOAD)),
            ("SELECT perl()",                              SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT guards()",                            EffectSet::XACT_LOCK),
            ("SELECT pg_replication_origin_session_setup('x')", SUSPECT.union(EffectSet::LOAD)),
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
            ("SELECT set_limit(0.5)",                      SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT table_to_xml('peek', true, true, '')", SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT ts_rewrite('a', 'SELECT hide()')",    SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT * FROM crosstab3('SELECT hide()')",   SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT * FROM crosstab_float8_6_cols('SELECT hide()')", SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT maker()",                             SUSPECT.union(EffectSet::OPAQUE)),
            ("SELECT 1 === 2",                             SUSPECT),
            ("SELECT U&\"\\0068ide\"()",                   SUSPECT),
            ("SELECT x.hide FROM x",                       SUSPECT),
            ("SELECT query_to_xml('SELECT 1', true, true, '')", SUSPECT.union(EffectSet::OPAQUE)),
            ("COPY audited FROM STDIN",                    SUSPECT),
            ("EXPLAIN ANALYZE SELECT hide()",              SUSPECT),
        ];
        for (text, want) in table {
            let judged = suspects.judge(text.as_bytes(), NONE, &mut library);
            // Without the grammar whatever is mentioned counts.
            let fits = if cfg!(feature = "grammar") { judged == want } else { judged.contains(want) };
            assert!(fits, "{text}: {judged:?}");
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

    #[test]
    fn while_nothing_is_known_all_but_the_ends_of_transactions_may_do_anything() {
        let mut library = Library::default();
        #[rustfmt::skip]
        let table: [(&str, EffectSet); 7] = [
            ("SELECT 1",                EffectSet::UNJUDGED),
            ("",                        EffectSet::UNJUDGED),
            ("BEGIN",                   NONE),
            ("COMMIT",                  NONE),
            ("ROLLBACK TO SAVEPOINT s", NONE),
            ("BEGIN; SELECT f()",       EffectSet::UNJUDGED),
            ("SET app.x = 'a'",         EffectSet::UNJUDGED),
        ];
        for (text, want) in table {
            let own = sql::scan(text.as_bytes()).set;
            assert_eq!(Suspects::unknown().judge(text.as_bytes(), own, &mut library), want, "{text}");
        }
    }

    #[test]
    fn names_are_found_as_they_are_spelled() {
        let suspects = suspects(&[
            &["f", "1", "a\"b", "plpgsql v ", "BEGIN LISTEN c; END"],
            &["f", "2", "calls", "sql v ", "SELECT \"a\"\"b\"()"],
            &["f", "3", "größe", "sql v ", "LISTEN c"],
            &["f", "4", "raw", "internal v ", ""],
            &["f", "5", "total", "internal i ", ""],
            &["r", "11", "seen", "", ""],
            &["v", "11", "f1", "", ""],
            &["r", "12", "over", "", ""],
            &["v", "12", "v11", "", ""],
            &["r", "13", "asking", "", ""],
            &["v", "13", "s0", "", ""],
        ]);
        let mut library = Library::default();
        #[rustfmt::skip]
        let table: [(&[u8], EffectSet); 9] = [
            (b"SELECT \"a\"\"b\"()",      SUSPECT),
            (b"SELECT calls()",           SUSPECT),
            (b"SELECT 'gr\xf6\xdfe'",     SUSPECT),
            (b"SELECT 'plain'",           NONE),
            (b"SELECT raw()",             SUSPECT.union(EffectSet::OPAQUE)),
            (b"SELECT total(1)",          NONE),
            (b"SELECT * FROM seen",       SUSPECT),
            (b"UPDATE \"over\" SET a = 1", SUSPECT),
            (b"SELECT * FROM asking",     EffectSet::SEQUENCE.union(EffectSet::CURRVAL)),
        ];
        for (text, want) in table {
            assert_eq!(suspects.judge(text, NONE, &mut library), want, "{}", String::from_utf8_lossy(text));
        }
    }
}

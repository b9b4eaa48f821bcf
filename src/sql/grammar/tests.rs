//! The lexer, the effects and the fingerprint, held against the grammar over a corpus: the statements of `corpus.sql`, those
//! of the SQL files that an installed Postgres brings along, and those of Postgres' regression tests and manual, which `make deps`
//! gets into the cache.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use pg_query::protobuf::Token as Theirs;
use proptest::prelude::*;

use super::super::lexer::{Backslash, Lexer, Token};
use super::super::tests::text as soup;
use super::super::{EffectSet, Facts, Fingerprint, Library, Source, scan};
use super::facts;

/// Every statement of the corpus that the grammar reads, once.
fn corpus() -> Vec<String> {
    let mut files: Vec<PathBuf> = Vec::new();
    for version in 13..=19 {
        gather(Path::new(&format!("/usr/share/postgresql/{version}")), &mut files);
    }
    gather(&folder(), &mut files);
    let mut texts = vec![include_str!("corpus.sql").to_owned()];
    texts.extend(files.iter().filter_map(|file| std::fs::read_to_string(file).ok()));
    let mut statements = Vec::new();
    for text in texts {
        // What is psql's is not the grammar's.
        let plain: Vec<&str> = text.lines().filter(|line| !line.starts_with('\\')).collect();
        let plain = plain.join("\n");
        if let Ok(split) = pg_query::split_with_scanner(&plain) {
            statements.extend(split.into_iter().filter(|text| text.len() < 60_000).map(str::to_owned));
        }
    }
    statements.sort_unstable();
    statements.dedup();
    statements
}

/// Where `make deps` puts what is no part of the repository.
fn folder() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/pgweir"));
    let cache = std::env::var_os("PGWEIR_CACHE").map(PathBuf::from).or_else(home);
    let folder = cache.unwrap().join("corpus");
    assert!(folder.is_dir(), "{} is not there: run `make deps`", folder.display());
    folder
}

fn gather(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            gather(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "sql") {
            files.push(path);
        }
    }
}

fn of(text: &str) -> Option<(Fingerprint, Facts)> {
    let fingerprint = Fingerprint::of(text.as_bytes(), false)?;
    let facts = facts(text.as_bytes(), false, &fingerprint.literals)?;
    Some((fingerprint, facts))
}

fn effects(text: &str) -> Option<EffectSet> {
    let (fingerprint, facts) = of(text)?;
    Some(facts.effects(text.as_bytes(), &fingerprint.literals))
}

/// Spans of all tokens but operators, which the grammar's scanner joins.
fn our_spans(text: &str) -> Vec<(usize, usize)> {
    let mut lexer = Lexer::new(text.as_bytes(), Backslash::Plain);
    let mut spans = Vec::new();
    loop {
        lexer.skip_blank();
        let start = text.len() - lexer.rest().len();
        let Some(token) = lexer.token() else { return spans };
        if !matches!(token, Token::Mark(_)) {
            spans.push((start, text.len() - lexer.rest().len()));
        }
    }
}

fn their_spans(text: &str) -> Option<Vec<(usize, usize)>> {
    let tokens = pg_query::scan(text).ok()?.tokens;
    let is_mark = |token: &pg_query::protobuf::ScanToken| {
        // Single characters have their own numbers, below those of all others.
        (1..258).contains(&token.token)
            || matches!(
                Theirs::try_from(token.token),
                Ok(Theirs::Op
                    | Theirs::Typecast
                    | Theirs::DotDot
                    | Theirs::ColonEquals
                    | Theirs::EqualsGreater
                    | Theirs::LessEquals
                    | Theirs::GreaterEquals
                    | Theirs::NotEquals
                    | Theirs::SqlComment
                    | Theirs::CComment)
            )
    };
    let span = |at: i32| usize::try_from(at).unwrap();
    Some(tokens.iter().filter(|token| !is_mark(token)).map(|token| (span(token.start), span(token.end))).collect())
}

#[test]
fn tokens_are_the_servers_own_over_the_corpus() {
    let mut compared = 0;
    for text in corpus() {
        let Some(theirs) = their_spans(&text) else { continue };
        compared += 1;
        assert_eq!(our_spans(&text), theirs, "{text}");
    }
    println!("{compared} statements compared token by token");
    assert!(compared > 40_000, "{compared}");
}

#[test]
fn no_text_does_more_by_the_grammar_than_the_scan_says() {
    let (mut compared, mut faults) = (0, Vec::new());
    for text in corpus() {
        let Some(set) = effects(&text) else { continue };
        compared += 1;
        let scanned = scan(text.as_bytes()).set;
        // What CREATE SCHEMA creates with it cannot be temporary: the server says so itself.
        let missed = !scanned.contains(set) && !text.to_ascii_lowercase().contains("create schema");
        if missed {
            faults.push(format!("{text}\nscan {scanned:?}\ngrammar {set:?}"));
        }
    }
    println!("{compared} statements compared in their effects");
    assert!(faults.is_empty(), "{} of {compared}: {}", faults.len(), faults.join("\n"));
    assert!(compared > 40_000, "{compared}");
}

/// The corpus with every literal of the same class replaced by another one.
#[test]
fn one_fingerprint_has_one_set_of_facts_over_the_corpus() {
    let mut known: HashMap<Vec<u8>, (String, Facts)> = HashMap::new();
    let mut compared = 0;
    for text in corpus() {
        let Some((fingerprint, found)) = of(&text) else { continue };
        let (first, facts) = known.entry(fingerprint.tokens.clone()).or_insert_with(|| (text.clone(), found.clone()));
        assert_eq!(found, *facts, "{text}\n{first}");
        let other = with_other_literals(&text, &fingerprint);
        // A value may matter to the grammar in a way that it refuses: then nothing is cached for it.
        let Some((again, found)) = of(&other) else { continue };
        compared += 1;
        assert_eq!(again.tokens, fingerprint.tokens, "{text}\n{other}");
        assert_eq!(found, *facts, "{text}\n{other}");
    }
    println!("{compared} statements compared with their literals changed");
    assert!(compared > 40_000, "{compared}");
}

fn with_other_literals(text: &str, fingerprint: &Fingerprint) -> String {
    use super::super::Class;
    let mut other = String::new();
    let mut end = 0;
    for literal in &fingerprint.literals {
        other.push_str(&text[end..literal.start]);
        let span = &text[literal.start..literal.end];
        other.push_str(match literal.class {
            Class::String if span.starts_with('\'') || span.starts_with('$') => "'other; -- value'",
            Class::Int4 => "7",
            Class::Int8 => "70000000000",
            Class::Numeric => "7.25",
            Class::Bit => "B'0'",
            Class::Bool if span.eq_ignore_ascii_case("true") => "false",
            Class::Bool => "true",
            Class::String => span,
        });
        end = literal.end;
    }
    other.push_str(&text[end..]);
    other
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn random_text_does_no_more_by_the_grammar_than_the_scan_says(text in soup()) {
        if let Ok(text) = std::str::from_utf8(&text)
            && let Some(set) = effects(text)
        {
            let scanned = scan(text.as_bytes()).set;
            prop_assert!(scanned.contains(set), "{}\nscan {:?}\ngrammar {:?}", text, scanned, set);
        }
    }

    #[test]
    fn random_statements_are_cut_as_the_server_cuts_them(text in soup()) {
        if let Ok(text) = std::str::from_utf8(&text)
            && of(text).is_some()
            && let Some(theirs) = their_spans(text)
        {
            prop_assert_eq!(our_spans(text), theirs, "{}", text);
        }
    }
}

#[test]
fn facts_name_what_a_statement_calls_reads_and_writes() {
    type Row = (&'static str, bool, &'static str, &'static str);
    #[rustfmt::skip]
    let table: [Row; 16] = [
        ("SELECT f(a), s.g(1) FROM t",                                   true,  "f s.g",         "t"),
        ("SELECT 1",                                                     true,  "",              ""),
        ("SELECT t.col FROM t",                                          true,  "col",           "t"),
        ("SELECT * FROM t FOR UPDATE",                                   false, "",              "t"),
        ("INSERT INTO t SELECT f(b) FROM u",                             false, "f",             "t! u"),
        ("UPDATE t SET a = (SELECT max(b) FROM u)",                      false, "max",           "t! u"),
        ("WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x",        false, "",              "t! x"),
        ("SELECT * INTO x FROM t",                                       false, "",              "t x!"),
        ("TRUNCATE t",                                                   false, "",              "t!"),
        ("COPY t FROM STDIN",                                            false, "",              "t!"),
        ("COPY (SELECT f() FROM t) TO STDOUT",                           true,  "f",             "t"),
        ("EXPLAIN ANALYZE DELETE FROM t",                                false, "",              "t!"),
        ("SELECT query_to_xml('DELETE FROM t', true, true, '')",         false, "query_to_xml",  ""),
        ("SELECT nextval('s')",                                          false, "nextval",       ""),
        ("BEGIN READ ONLY; SELECT 1; COMMIT",                            true,  "",              ""),
        ("CALL p(1)",                                                    false, "p",             ""),
    ];
    for (text, reads, calls, relations) in table {
        let (_, facts) = of(text).unwrap();
        let dotted = |schema: &str, name: &str| {
            if schema.is_empty() { name.to_owned() } else { format!("{schema}.{name}") }
        };
        let mut called: Vec<String> = facts.calls.iter().map(|call| dotted(&call.schema, &call.name)).collect();
        let written = |written: bool| if written { "!" } else { "" };
        let mut named: Vec<String> =
            facts.relations.iter().map(|one| dotted(&one.schema, &one.name) + written(one.written)).collect();
        called.sort();
        named.sort();
        assert_eq!((facts.reads_only(), &*called.join(" "), &*named.join(" ")), (reads, calls, relations), "{text}");
    }
}

#[test]
fn holes_are_read_in_the_text_at_hand() {
    let mut library = Library::default();
    let mut set = |text: &str| library.read(text.as_bytes())[0].set;
    assert_eq!(set("SELECT set_config('work_mem', 'x', false)"), EffectSet::SETTINGS);
    assert_eq!(set("SELECT set_config('role', 'x', false)"), EffectSet::SETTINGS | EffectSet::ROLE);
    assert_eq!(set("SELECT set_config('app.x', 'x', false)"), EffectSet::SETTINGS | EffectSet::CUSTOM);
    assert_eq!(set("SELECT set_config('app.x', 'x', true)"), EffectSet::LOCAL);
    assert_eq!(library.parsed, 1, "one fingerprint, one question");
    let reading = library.read(b"SELECT set_config($1, $2, true)");
    assert_eq!(reading[0].set, EffectSet::LOCAL);
    let arguments = [Source::Parameter(1), Source::Parameter(2), Source::Literal(0)];
    assert_eq!(*reading[0].facts.calls[0].arguments, arguments);
    let unreadable = library.read(b"SELECT set_config($1, $2, $3)");
    assert!(unreadable[0].set.contains(EffectSet::OPAQUE | EffectSet::CUSTOM));
}

#[test]
fn what_is_too_deep_or_no_statement_is_unknown() {
    let mut library = Library::default();
    let deep = [
        format!("SELECT {}1{}", "(".repeat(30_000), ")".repeat(30_000)),
        format!("SELECT 1{}", "+1".repeat(30_000)),
        format!("SELECT {}1{}", "(SELECT ".repeat(7_000), ")".repeat(7_000)),
        format!("SELECT {} true", "NOT ".repeat(15_000)),
        "SELECT ARRAY".to_owned() + &"[".repeat(10_000) + &"]".repeat(10_000),
        "SELEKT 1".to_owned(),
        "SELECT 'a".to_owned(),
        format!("SELECT '{}'", "x".repeat(300_000)),
    ];
    for text in deep {
        let read = library.read(text.as_bytes());
        assert_eq!(*read[0].facts, Facts::unknown(), "{}", &text[..40.min(text.len())]);
    }
    // Readable either way, and not the same.
    assert_eq!(library.read(b"SELECT 'a\\' , set_config('role', ' x', false)").len(), 1);
    assert_eq!(library.read(b"SELECT 'a\\\\', f()").len(), 2);
}

#[test]
fn the_library_is_bounded() {
    let mut library = Library::default();
    for n in 0..20_000 {
        library.read(format!("SELECT column_{n} FROM t").as_bytes());
        assert_eq!(library.read(b"SELECT kept").len(), 1);
    }
    assert!(library.parsed <= 20_001, "what is asked for is kept");
    assert!(library.size() <= 2 * 512 * 1024, "{}", library.size());
}

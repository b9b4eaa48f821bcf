//! The corpus of `tests/reads` against a survey made by hand, and what holds for any text.

use std::fs;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::catalog::{Survey, builtin};
use crate::sql::{Library, scan};
#[cfg(feature = "grammar")]
use crate::stats::Reason;

/// What `tests/reads/setup.sql` makes, as a survey tells it. What is of the same name has the same number: its own name.
#[rustfmt::skip]
const ROWS: &[&str] = &[
    "f|twice|twice|sql i |SELECT n * 2",
    "f|greet|greet|plpgsql v | BEGIN RETURN format('Hello, %s!', initcap(who)); END ",
    "f|open_orders|open_orders|sql s | SELECT * FROM orders o WHERE o.user_id = who AND coalesce(status, '') = 'open' ",
    "f|spent|spent|plpgsql v | DECLARE sum_of numeric := 0; r record; BEGIN -- INSERT nothing\n FOR r IN SELECT total FROM orders \
     WHERE user_id = who ORDER BY id LOOP sum_of := sum_of + coalesce(r.total, 0); END LOOP; SELECT count(*) + sum_of INTO \
     sum_of FROM events WHERE at < now() AND what NOT IN ('none', 'DELETE'); IF sum_of > 1000 THEN RAISE NOTICE 'much: %', \
     sum_of; END IF; RETURN sum_of; END ",
    "f|tree|tree|sql v | WITH RECURSIVE down (id, level) AS (SELECT root, 0 UNION ALL SELECT u.id, d.level + 1 FROM users u \
     JOIN down d ON u.boss = d.id) SELECT id, level FROM down ",
    "f|standard|standard|sql v |CREATE OR REPLACE FUNCTION public.standard(n integer)\n RETURNS integer\n LANGUAGE sql\nBEGIN ATOMIC\n \
     SELECT (abs(standard.n) + ( SELECT (count(*))::integer AS count\n FROM public.users));\nEND\n",
    "f|tenant|tenant|sql s | SELECT current_setting('app.tenant', true) ",
    "f|score|score|sql s |SELECT length(u.name)",
    "f|half_of|half_of|sql i |SELECT n / 2",
    "f|add_up|add_up|plpgsql i | BEGIN RETURN coalesce(a, 0) + coalesce(b, 0); END ",
    "f|total_of|total_of|internal i |", "e|ftotal_of|fadd_up",
    "f|near|near|sql i |SELECT abs(a - b) < 3", "e|o~~~|fnear",
    "f|mood_number|mood_number|sql i | SELECT CASE m WHEN 'sad' THEN 0 ELSE 1 END ", "e|tint4|fmood_number",
    "f|logs|logs|plpgsql v | BEGIN INSERT INTO log VALUES (what); RETURN what; END ",
    "f|calls_logs|calls_logs|sql v |SELECT Logs(what)",
    "f|stable_liar|stable_liar|sql s |SELECT calls_logs(what)",
    "f|number|number|sql v | SELECT nextval('counter') ",
    "f|numbered|numbered|sql v |SELECT n", "e|fnumbered|b0",
    "f|locks|locks|plpgsql v | BEGIN PERFORM pg_advisory_xact_lock(1); RETURN 1; END ",
    "f|picks|picks|sql v |SELECT id FROM users ORDER BY id LIMIT 1 FOR UPDATE",
    "f|dynamic|dynamic|plpgsql v | DECLARE n int; BEGIN EXECUTE q INTO n; RETURN n; END ",
    "f|sets|sets|sql v | SELECT set_config('app.x', 'y', true) ",
    "f|tells|tells|plpgsql v | BEGIN PERFORM pg_notify('c', 'x'); END ",
    "f|server|server|sql s |SELECT pg_backend_pid()",
    "f|server_name|server_name|sql s | SELECT current_setting('cluster_name') ",
    "f|crowd|crowd|plpgsql s | BEGIN RETURN (SELECT count(*) FROM pg_stat_activity); END ",
    "f|scratches|scratches|sql s |SELECT count(*) FROM scratch",
    "f|temps|temps|plpgsql v | BEGIN CREATE TEMP TABLE x (a int) ON COMMIT DROP; RETURN 1; END ",
    "f|twofold1|twofold|sql i |SELECT a",
    "f|twofold2|twofold|sql v |SELECT logs(a)",
    "f|lower|lower|sql v | SELECT logs('lower') ",
    "f|writing_score|writing_score|sql v | SELECT logs('score') ",
    "f|atomic_number|atomic_number|sql v |CREATE OR REPLACE FUNCTION public.atomic_number()\n RETURNS bigint\n LANGUAGE sql\nBEGIN \
     ATOMIC\n SELECT nextval('counter'::regclass) AS nextval;\nEND\n",
    "f|noted|noted|sql v | SELECT logs('operator') IS NOT NULL ", "e|o!!!|fnoted",
    "f|pair_json|pair_json|sql v | SELECT length(logs('cast'))::money ", "e|tmoney|fpair_json",
    "f|work|work|plpgsql v | BEGIN NULL; END ",
    "f|on_change|on_change|plpgsql v | BEGIN PERFORM logs('trigger'); RETURN NEW; END ",
    "r|users|users|pr", "r|orders|orders|pr", "r|events|events|pp", "r|events_old|events_old|pr", "r|things|things|pr",
    "r|events_new|events_new|pr", "i|events|events_old", "i|events|events_new", "r|log|log|pr",
    "r|scratch|scratch|ur", "r|half|half|pp", "r|half_scratch|half_scratch|ur", "i|half|half_scratch", "r|remote|remote|pf",
    "r|audited|audited|pr", "e|waudited|fon_change", "r|tickets|tickets|pr", "d|tickets|fnumber",
    "r|ruled|ruled|pr", "d|ruled|flogs",
    "r|people|people|pv", "v|people|vusers", "v|people|vorders", "r|rich|rich|pv", "v|rich|vpeople", "v|rich|fspent",
    "r|today|today|pv", "r|own_setting|own_setting|pv", "r|own_catalog|own_catalog|pv",
    "r|peek|peek|pv", "v|peek|flogs", "r|over|over|pv", "v|over|vpeek", "r|busy|busy|pv", "v|busy|b0", "r|place|place|pv",
    "v|place|b0", "r|setting|setting|pv", "v|setting|b0", "r|both_settings|both_settings|pv", "v|both_settings|b0",
    "r|taking|taking|pv", "v|taking|b1", "r|scratched|scratched|pv", "v|scratched|vscratch", "r|far|far|pv", "v|far|vremote",
    "r|drawn|drawn|pv", "v|drawn|b0", "r|stored|stored|pm", "v|stored|b0", "v|stored|vscratch",
    "r|documents|documents|pr", "r|guarded|guarded|pr", "v|guarded|flogs", "r|watched|watched|pr", "v|watched|b0",
    "r|entered|entered|pr", "d|entered|flogs",
];

fn survey_of<'a>(mut survey: Survey, rows: impl IntoIterator<Item = &'a str>) -> Suspects {
    for row in rows {
        survey.row(row.splitn(5, '|').map(|column| Some(column.as_bytes())));
    }
    survey.close().unwrap()
}

static SUSPECTS: LazyLock<Suspects> = LazyLock::new(suspects);

fn suspects() -> Suspects {
    survey_of(Survey::with_routes(), ROWS.iter().copied())
}

fn corpus() -> Vec<(String, String)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reads/corpus.txt");
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let split = |line: &str| {
        let (want, statement) = line.split_once(' ').unwrap();
        (want.to_owned(), statement.trim_start().replace('⏎', "\n"))
    };
    lines.map(split).collect()
}

#[cfg(feature = "grammar")]
fn word(route: Route) -> &'static str {
    match route {
        Route::Read => "read",
        Route::Begin { read_only: None } => "begin",
        Route::Begin { read_only: Some(true) } => "begin_read_only",
        Route::Begin { read_only: Some(false) } => "begin_read_write",
        Route::Primary(reason) => reason.as_str(),
    }
}

#[test]
#[cfg(feature = "grammar")]
fn every_statement_of_the_corpus_goes_where_it_may() {
    let (suspects, mut library) = (suspects(), Library::default());
    let (mut wrong, mut found, mut missed) = (Vec::new(), 0, 0);
    for (want, text) in corpus() {
        let got = word(suspects.route(text.as_bytes(), &mut library).route);
        if got != want.trim_end_matches(['~', '*']) {
            wrong.push(format!("{text}\n    {got}, not {want}"));
        }
        found += usize::from(got == "read");
        missed += usize::from(want.ends_with('*'));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{found} reads found, {missed} missed: {} %", 100 * found / (found + missed));
    assert!(found >= 180 && 100 * found >= 95 * (found + missed), "{found}, {missed}");
}

#[test]
fn while_the_catalog_is_not_known_all_goes_to_the_primary() {
    let mut library = Library::default();
    let unknown = Route::Primary(RouteReason::Unknown);
    // Nobody asked what a follower may run.
    let not_asked = survey_of(Survey::default(), ROWS.iter().copied());
    for suspects in [Suspects::unknown(), Suspects::default(), not_asked] {
        for text in ["SELECT 1", "BEGIN READ ONLY", "WITH a AS (DELETE FROM log RETURNING 1) SELECT 1", ""] {
            assert_eq!(suspects.route(text.as_bytes(), &mut library), Judged { route: unknown, hint: None }, "{text}");
        }
        // No hint may send these to a follower, which may be none any more.
        for text in
            ["INSERT INTO log VALUES ('x')", "update log SET a = 1", "DELETE FROM log", "MERGE INTO log USING x"]
        {
            let judged = suspects.route(format!("/* pgweir.route=follower */ {text}").as_bytes(), &mut library);
            assert_eq!(judged.route, Route::Primary(RouteReason::Write), "{text}");
        }
        let hinted = suspects.route(b"/* pgweir.route=follower */ SELECT 1", &mut library);
        assert_eq!(hinted, Judged { route: unknown, hint: Some(Hint::Follower) });
    }
}

#[test]
fn asking_for_routes_changes_nothing_of_what_is_judged() {
    let (with, without) = (suspects(), survey_of(Survey::default(), ROWS.iter().copied()));
    assert!(!with.judges_like(&without) && with.judges_like(&suspects()));
    let (mut one, mut other) = (Library::default(), Library::default());
    for (_, text) in corpus() {
        let own = scan(text.as_bytes()).set;
        let judged = with.judge(text.as_bytes(), own, &mut one);
        assert_eq!(judged, without.judge(text.as_bytes(), own, &mut other), "{text}");
        let reads = with.route(text.as_bytes(), &mut one).route == Route::Read;
        assert!(!(reads && judged.intersects(EffectSet::OPAQUE)), "{text}");
    }
}

/// What a function in another language, or of an extension, is taken for.
#[test]
#[cfg(feature = "grammar")]
fn functions_in_other_languages_are_told_by_extension_and_volatility() {
    #[rustfmt::skip]
    let table: [(&str, &str); 15] = [
        ("f|1|f|c i pgvector|",          "read"),
        ("f|1|f|c v pgvector|",          "function"),
        ("f|1|f|c v uuid-ossp|",         "read"),
        ("f|1|f|c s |",                  "function"),
        ("f|1|f|c s dblink|",            "function"),
        ("f|1|crosstab4|c s tablefunc|", "function"),
        ("f|1|f|c v pg_stat_statements|", "function"),
        ("f|1|set_limit|c v pg_trgm|",   "function"),
        ("f|1|show_limit|c s pg_trgm|",  "read"),
        ("f|1|f|internal i |",           "read"),
        ("f|1|f|internal v |",           "function"),
        ("f|1|f|plpython3u i |",         "function"),
        ("f|1|f|plperl s |",             "function"),
        ("f|1|f|sql v postgis|SELECT 1", "read"),
        ("f|1|f|plpgsql v x|BEGIN EXECUTE 'x'; END", "function"),
    ];
    for (row, want) in table {
        let name = row.split('|').nth(2).unwrap();
        let route = survey_of(Survey::with_routes(), [row])
            .route(format!("SELECT {name}(1)").as_bytes(), &mut Library::default());
        assert_eq!(word(route.route), want, "{row}");
    }
}

/// What every statement leads to, and what is used without being named.
#[test]
#[cfg(feature = "grammar")]
fn what_every_statement_may_lead_to_bars_every_statement() {
    let writes = "f|1|logs|sql v |INSERT INTO log VALUES (1)";
    #[rustfmt::skip]
    let table: [(&str, &str, &str); 8] = [
        ("e|all|f1",   "SELECT 1",                   "write"),
        ("e|all|b0",   "SELECT 1",                   "server"),
        ("e|o<|f1",    "SELECT a FROM t ORDER BY a", "write"),
        ("e|o~*~|f1",  "SELECT 1",                   "read"),
        ("e|tjson|f1", "SELECT to_json(1)",          "write"),
        ("e|tx|f1",    "SELECT 1",                   "read"),
        ("e|tx|f1",    "SELECT '1'::s.x",            "write"),
        ("e|ddl|f1",   "SELECT 1",                   "read"),
    ];
    for (row, text, want) in table {
        let suspects = survey_of(Survey::with_routes(), ["r|t|t|pr", writes, row]);
        assert_eq!(word(suspects.route(text.as_bytes(), &mut Library::default()).route), want, "{row}");
    }
}

#[test]
fn the_lists_of_what_is_built_in_are_sorted_and_do_not_contradict_each_other() {
    builtin::check();
}

/// Pieces of statements; put together at random they are rarely sense, and sometimes a trap.
const PIECES: [&str; 60] = [
    "SELECT ",
    "1",
    "'x'",
    "FROM users",
    "FROM scratch",
    "FROM peek",
    ";",
    ",",
    "(",
    ")",
    " ",
    "\n",
    "--",
    "/*",
    "*/",
    "'",
    "\"",
    "$$",
    "$a$",
    "\\",
    "INSERT INTO log VALUES ('x')",
    "DELETE FROM log",
    "UPDATE users SET name = 'x'",
    "WITH x AS (",
    "RETURNING 1",
    "logs('x')",
    "twice(1)",
    "nextval('counter')",
    "pg_advisory_lock(1)",
    "set_config('a.b', 'c', false)",
    "SET a.b = 'c'",
    "BEGIN",
    "COMMIT",
    "READ ONLY",
    "FOR UPDATE",
    "FOR SHARE",
    "INTO t",
    "INTO TEMP t",
    "CREATE TABLE t (a int)",
    "DROP TABLE log",
    "COPY ",
    "TO STDOUT",
    "EXPLAIN ",
    "ANALYZE ",
    "DO $$ BEGIN END $$",
    "CALL work()",
    "LISTEN c",
    "PREPARE p AS ",
    "EXECUTE p",
    "UNION ALL ",
    "WHERE ",
    "id",
    "= ",
    "U&\"\\0061\"",
    "E'\\'",
    "pg_stat_activity",
    "AS ",
    "VALUES (1)",
    "TABLE users",
    "DISCARD ALL",
];

fn soup() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        9 => prop::sample::select(&PIECES[..]).prop_map(|piece| format!("{piece} ").into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    #[test]
    fn no_text_that_does_more_than_read_is_called_a_read(text in soup()) {
        let mut library = Library::default();
        if SUSPECTS.route(&text, &mut library).route == Route::Read {
            for reading in library.read(&text) {
                prop_assert!(reading.facts.reads_only(), "{}", String::from_utf8_lossy(&text));
            }
            // The scanner reads the text by other rules, and finds no more in it.
            let beyond = SESSION | TRANSACTION | EffectSet::DDL | EffectSet::TEMP | EffectSet::ADVISORY_LOCK | EffectSet::SEQUENCE;
            let scanned = scan(&text).set;
            prop_assert!(
                text.contains(&b'\\') || !scanned.intersects(beyond),
                "{}\n{:?}", String::from_utf8_lossy(&text), scanned
            );
        }
    }
}

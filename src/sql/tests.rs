use std::hint::black_box;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::lexer::{Backslash, Lexer, Token};
use super::{
    EffectSet, Effects, FirstWord, custom_names, is_transaction_end, prefilter, read, scan, shows_name,
    shows_watermark, statement,
};

type Set = EffectSet;

const NONE: Set = Set::NONE;
const OPAQUE: Set = Set::OPAQUE;
const SETTINGS: Set = Set::SETTINGS;
const ROLE: Set = SETTINGS.union(Set::ROLE);
const CUSTOM: Set = SETTINGS.union(Set::CUSTOM);
const UNREAD: Set = ROLE.union(CUSTOM).union(OPAQUE);
const LISTED: Set = SETTINGS.union(OPAQUE);
const MADE: Set = Set::LOCAL.union(OPAQUE);
const CURRVAL: Set = Set::SEQUENCE.union(Set::CURRVAL);
const TEMP_TABLE: Set = Set::DDL.union(Set::TEMP);

fn check(table: &[(&str, &str, Set)]) {
    for (name, text, want) in table {
        assert_eq!(scan(text.as_bytes()).set, *want, "{name}: {text}");
    }
}

#[test]
fn only_a_show_of_the_name_alone_shows_it() {
    #[rustfmt::skip]
    let table = [
        ("SHOW application_name", true), ("show APPLICATION_NAME ; ;", true), ("/* a */ SHOW \"Application_Name\" -- b", true),
        ("SHOW ALL", true), ("SHOW \"all\"", false), ("SHOW application_names", false), ("SHOW timezone", false), ("SHOW", false),
        ("SHOW application_name; SELECT 1", false), ("SELECT application_name", false), ("SHOW application_name.x", false),
        ("SHOW 'application_name'", false), ("SHOW application_name /*", false), ("", false),
    ];
    for (text, want) in table {
        assert_eq!(shows_name(text.as_bytes()), want, "{text}");
    }
}

#[test]
fn only_a_show_of_the_watermark_alone_shows_it() {
    #[rustfmt::skip]
    let table = [
        ("SHOW pgweir.watermark", true), ("show Pgweir . WATERMARK ; ;", true), ("/* a */ SHOW \"pgweir\".\"watermark\" -- b", true),
        ("SHOW pgweir.watermarks", false), ("SHOW pgweir", false), ("SHOW pgweir.", false), ("SHOW watermark", false), ("SHOW", false),
        ("SHOW pgweir.watermark; SELECT 1", false), ("SHOW pgweir.watermark.x", false), ("SHOW 'pgweir.watermark'", false),
        ("SHOW \"pgweir.watermark\"", false), ("SHOW pgweir.watermark /*", false), ("SET pgweir.watermark = ''", false), ("", false),
    ];
    for (text, want) in table {
        assert_eq!(shows_watermark(text.as_bytes()), want, "{text}");
    }
}

#[test]
fn ordinary_statements_have_no_effect() {
    check(&[
        ("select", "SELECT 1", NONE),
        ("trailing semicolon", "select * from t where a = $1 ;\n", NONE),
        ("only semicolons", " ; ;;", NONE),
        ("nothing", "", NONE),
        ("only a comment", "/* set x = 1 */ -- set y = 2", NONE),
        ("insert", "INSERT INTO t (a) VALUES ($1) RETURNING id", NONE),
        ("upsert", "INSERT INTO t VALUES (1) ON CONFLICT DO UPDATE SET a = 1", NONE),
        ("update", "UPDATE t SET role = 'x', a.b = 1", NONE),
        ("a table named temp", "INSERT INTO temp VALUES (1)", NONE),
        (
            "a table named temp, changed in passing",
            "WITH x AS (INSERT INTO temp VALUES (1) RETURNING a) SELECT a FROM x",
            NONE,
        ),
        ("merge into temp", "MERGE INTO temp USING s ON true WHEN MATCHED THEN DELETE", NONE),
        ("insert into a temporary table", "INSERT INTO pg_temp.t SELECT 1", NONE),
        ("interval", "SELECT now() - interval '1 day', employee, template FROM service", NONE),
        ("parentheses", "((SELECT 1)) UNION (SELECT 2)", NONE),
        ("show", "SHOW search_path", NONE),
        ("fetch", "FETCH ALL FROM c", NONE),
        ("notify", "NOTIFY c, 'listen'", NONE),
        ("explain", "EXPLAIN (ANALYZE, VERBOSE) SELECT 1", NONE),
        ("explained in parentheses", "EXPLAIN (SELECT 1)", NONE),
        ("a column named like a function", "SELECT set_config, t.nextval FROM t", NONE),
        ("transaction locks", "SELECT pg_advisory_xact_lock(1), pg_try_advisory_xact_lock_shared(2)", NONE),
        ("an own function", "SELECT my_pg_advisory_lock(1), xnextval('a')", NONE),
    ]);
}

#[test]
fn names_in_literals_and_comments_are_no_effect() {
    check(&[
        ("string", "SELECT 'set_config(1,2,3)'", NONE),
        ("semicolon in a string", "SELECT ';SET x = 1;'", NONE),
        ("doubled quote", "SELECT 'it''s; SET x = 1'", NONE),
        ("line comment", "SELECT 1 -- ; SET x = 1", NONE),
        ("carriage return ends a comment", "SELECT 1 -- c\r; SET x = 1", SETTINGS | Set::MULTI),
        ("comment", "SELECT 1 /* nextval('a') ; */", NONE),
        ("nested comment", "SELECT 1 /* /* */ ; SET x = 1 */", NONE),
        ("stars and slashes", "SELECT 1 /***/ /*/**/*/ ; SET x = 1", SETTINGS | Set::MULTI),
        ("operator and comment", "SELECT 1 */* ; SET x = 1 */ 2", NONE),
        ("dollar quote", "SELECT $$; SET x = 1$$", NONE),
        ("tagged dollar quote", "SELECT $a$ $b$ $$ ; SET x = 1 $a$", NONE),
        ("shared dollar sign", "SELECT $a$ $b$a$ ; SET x = 1", SETTINGS | Set::MULTI),
        ("dollar in a word", "SELECT a$$ ; SET x = 1 --$$", SETTINGS | Set::MULTI),
        ("parameter before a dollar quote", "SELECT $1$$ ; SET x = 1 $$", NONE),
        ("quoted identifier", "SELECT \"; SET x = \"\" 1\"", NONE),
        ("function text", "CREATE FUNCTION f() RETURNS int AS $$ SELECT nextval('a') $$ LANGUAGE sql", Set::DDL),
        ("escape string", r"SELECT E'\'; SET x = 1; --'", NONE),
        ("escape string goes on", "SELECT E'a'\n'\\'; SET x = 1; --'", NONE),
        ("bit string", "SELECT B'1'; SET x = 1", SETTINGS | Set::MULTI),
    ]);
}

#[test]
fn strings_are_read_for_either_setting_of_standard_conforming_strings() {
    check(&[
        ("effect when on", r"SELECT 'a\'; SET x = 1; --'", SETTINGS | Set::MULTI),
        ("effect when off", r"SELECT '\' ; SET x = 1; --' || '\'; SET x = 1; --'", SETTINGS | Set::MULTI),
        ("a windows path", r"SELECT 'C:\' || nextval('a')", Set::SEQUENCE),
        ("only one reading ends", r"LISTEN a; SELECT 'a\'", Set::LISTEN | Set::MULTI),
        ("neither reading ends", r#"SHOW a; SELECT 'a\' ""#, OPAQUE | Set::MULTI),
    ]);
    for sjis in [&b"SHOW a; SELECT E'\x95\\'; SET x = 1; --'"[..], b"SHOW a; SELECT '\x95\\', '\\', ' ; SET x = 1; --'"]
    {
        assert!(scan(sjis).has(OPAQUE), "half a character looks like a backslash");
    }
}

#[test]
fn settings_are_told_by_scope_and_name() {
    check(&[
        ("set", "SET search_path = a, b", SETTINGS),
        ("comment in front", "/* a */ -- b\n set x to 1", SETTINGS),
        ("session", "SET SESSION x = 1", SETTINGS),
        ("local", "SET LOCAL x = 1", Set::LOCAL),
        ("local custom", "SET LOCAL a.b = 1", Set::LOCAL),
        ("local role", "SET LOCAL ROLE x", Set::LOCAL),
        ("transaction", "SET TRANSACTION READ ONLY", NONE),
        ("session transaction", "SET SESSION TRANSACTION READ ONLY", NONE),
        ("constraints", "SET CONSTRAINTS ALL DEFERRED", NONE),
        ("characteristics", "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", SETTINGS),
        ("time zone", "SET TIME ZONE 'UTC'", SETTINGS),
        ("names", "SET NAMES 'latin1'", SETTINGS),
        ("role", "SET ROLE x", ROLE),
        ("session role", "SET SESSION ROLE NONE", ROLE),
        ("role as a setting", "set \"role\" = 'x'", ROLE),
        ("authorization", "SET SESSION AUTHORIZATION DEFAULT", ROLE),
        ("authorization, scope", "SET SESSION SESSION AUTHORIZATION x", ROLE),
        ("authorization as a setting", "SET session_authorization TO x", ROLE),
        ("reset", "RESET x", SETTINGS),
        ("reset all", "RESET ALL", SETTINGS),
        ("reset role", "RESET ROLE", ROLE),
        ("reset authorization", "RESET SESSION AUTHORIZATION", ROLE),
        ("custom", "SET my.var = 1", CUSTOM),
        ("custom, quoted", "SET \"my.var\" = 1", CUSTOM),
        ("custom, spaced", "SET SESSION my /* */ . \"var\" = 1", CUSTOM),
        ("local is a name", "SET local.x = 1", CUSTOM),
        ("session is a name", "SET session.x = 1", CUSTOM),
        ("transaction is a name", "SET transaction.x = 1", CUSTOM),
        ("reset custom", "RESET my.var", CUSTOM),
        ("hidden name", "SET U&\"r\\006fle\" = 'x'", ROLE | OPAQUE),
        ("second statement", "SELECT 1; SET x = 1", SETTINGS | Set::MULTI),
        ("discard", "DISCARD TEMP", Set::DISCARD),
        ("discard all", "DISCARD ALL", Set::DISCARD | Set::DISCARD_ALL | ROLE),
        ("temporary schema", "SET search_path = pg_temp, public", SETTINGS | Set::TEMP),
        ("temporary schema, quoted", "SET search_path = 'pg_temp', a", SETTINGS | Set::TEMP),
    ]);
}

/// As `PostGraphile` has it.
const PAIRS: &str = "select set_config(el->>0, el->>1, true) from json_array_elements($1::json) el";

#[test]
fn set_config_is_told_by_its_arguments() {
    check(&[
        ("session", "SELECT set_config('x', $1, false)", SETTINGS),
        ("qualified, quoted, spaced", "SELECT pg_catalog . \"set_config\" /* */ ('x', '1', FALSE)", SETTINGS),
        ("local", "SELECT set_config('x', '1', true)", Set::LOCAL),
        ("local by a literal", "SELECT set_config('x'::text, f(',', 1), 't'::boolean)", Set::LOCAL),
        ("parameter", "SELECT set_config('x', '1', $1)", SETTINGS),
        ("not true", "SELECT set_config('x', '1', NOT true)", SETTINGS),
        ("true and more", "SELECT set_config('x', '1', true AND false)", SETTINGS),
        ("role", "SELECT set_config('role', 'x', false)", ROLE),
        ("custom", "SELECT set_config('a.b', 'x', false)", CUSTOM),
        ("name in a parameter", "SELECT set_config($1, 'x', false)", UNREAD),
        ("name in an expression", "SELECT set_config('a' || '.b', 'x', false)", UNREAD),
        ("name in parentheses", "SELECT set_config(('a'), 'x', false)", UNREAD),
        ("name with an escape", r"SELECT set_config(E'\162ole', 'x', false)", ROLE),
        ("custom name with escapes", r"SELECT set_config(E'a\x2eb'::text, 'x', false)", CUSTOM),
        ("escapes or none", r"SELECT set_config('a\.b', 'x', false)", CUSTOM),
        ("escapes that none need", r"SELECT set_config(E'\a\56b', 'x', true)", Set::LOCAL),
        ("name with a Unicode escape", r"SELECT set_config(E'a\u002eb', 'x', false)", UNREAD),
        ("name with Unicode escapes", r"SELECT set_config(U&'a\002eb', 'x', false)", UNREAD),
        ("name in pieces", "SELECT set_config('a'\n'.b', 'x', false)", UNREAD),
        ("name beyond ASCII", r"SELECT set_config(E'a.\xe9', 'x', false)", UNREAD),
        ("names of settings", "SELECT set_config(name, 'off', false) FROM pg_settings WHERE name = 'jit'", LISTED),
        (
            "all settings",
            "select a, 1+length(Set_Config(NAME::text, 'x', false)) from pg_catalog . pg_settings;",
            LISTED,
        ),
        ("names of settings, locally", "SELECT set_config(name, 'off', true) FROM pg_settings", MADE),
        ("name in a parameter, locally", "SELECT set_config($1, 'x', true)", Set::LOCAL),
        ("name in a cast parameter, locally", "SELECT set_config($1::text, 'x', true)", Set::LOCAL),
        ("name in another cast, locally", "SELECT set_config($1::name, 'x', true)", MADE),
        ("name in an expression, locally", "SELECT set_config('se' || 'ed', '0.5', true)", MADE),
        ("name of a function, locally", "SELECT set_config(f('app.x'), '0.5', true)", MADE),
        ("name in parentheses, locally", "SELECT set_config(('seed'), '0.5', true)", MADE),
        ("name in pieces, locally", "SELECT set_config('se'\n'ed', '0.5', true)", MADE),
        ("custom name in an expression, locally", "SELECT set_config('app.' || f(a), '0.5', true)", Set::LOCAL),
        ("custom name in an expression", "SELECT set_config('app.' || f(a), '0.5', false)", UNREAD),
        ("names in JSON, locally", PAIRS, Set::LOCAL),
        (
            "names in other JSON, locally",
            "SELECT set_config(el->>0, el->>1, true) FROM json_array_elements($1) el",
            MADE,
        ),
        ("no custom name, locally", "SELECT set_config('{\"a.\":\"seed\"}' || j ->> 'a.', '0.5', true)", MADE),
        ("in order", "SELECT set_config(name, 'a', false) FROM pg_settings ORDER BY name LIMIT 1", LISTED),
        ("names of another table", "SELECT set_config(name, 'off', false) FROM settings", UNREAD),
        ("another column", "SELECT set_config(setting, 'off', false) FROM pg_settings", UNREAD),
        ("of another schema", "SELECT set_config(name, 'off', false) FROM a.pg_settings", UNREAD),
        ("an alias", "SELECT set_config(name, 'off', false) FROM pg_settings AS s (a)", UNREAD),
        ("a join", "SELECT set_config(name, 'off', false) FROM pg_settings, t", UNREAD),
        ("a subquery", "SELECT (SELECT set_config(name, 'off', false) FROM t) FROM pg_settings", UNREAD),
        ("another subquery", "SELECT set_config(name, '', false) FROM pg_settings WHERE 1 IN (SELECT 1)", UNREAD),
        ("no table", "SELECT set_config(name, 'off', false)", UNREAD),
        ("a common table", "WITH pg_settings AS (TABLE t) SELECT set_config(name, '', false) FROM pg_settings", UNREAD),
        ("another statement's", "SELECT set_config(name, '', false); SELECT 1 FROM pg_settings", UNREAD | Set::MULTI),
        ("named arguments", "SELECT set_config(setting_name => 'a', new_value => 'b', is_local => true)", UNREAD),
        ("two calls", "SELECT set_config('a', 'b', true), set_config('role', 'b', false)", ROLE | Set::LOCAL),
        ("one in another", "SELECT set_config('a', set_config('b', 'c', true), true)", UNREAD | Set::LOCAL),
        ("path in a parameter", "SELECT set_config('search_path', $1, true)", Set::LOCAL),
        ("path in a cast parameter", "SELECT set_config('Search_Path', $1::text, true)", Set::LOCAL),
        ("path in an expression", "SELECT set_config('search_path', 'x,' || $1, true)", Set::LOCAL | Set::TEMP),
        ("path of a function", "SELECT set_config('search_path', f(), true)", Set::LOCAL | Set::TEMP),
        ("path with escapes", r"SELECT set_config('search_path', E'PG\x5ftemp', true)", Set::LOCAL | Set::TEMP),
        ("path in pieces", "SELECT set_config('search_path', 'pg_'\n'temp', true)", Set::LOCAL | Set::TEMP),
        ("path that is plain", "SELECT set_config('search_path', E'a\x5fb, \"$user\"'::text, true)", Set::LOCAL),
        ("no path", "SELECT set_config('search_path', NULL, true)", Set::LOCAL),
        ("in a subquery", "UPDATE t SET a = 1 WHERE (SELECT set_config('x', '1', false)) = '1'", SETTINGS),
        ("temporary schema", "SELECT set_config('search_path', 'pg_temp', true)", Set::LOCAL | Set::TEMP),
        ("open", "SELECT set_config('a', 'b', true", UNREAD),
        ("hidden name", "SELECT U&\"set\\005fconfig\"('a', 'b', false)", OPAQUE),
    ]);
}

#[test]
fn what_writes_or_calls_may_take_values_from_sequences() {
    #[rustfmt::skip]
    let table = [
        ("SELECT a FROM t WHERE b = $1",       false),
        ("TABLE t",                            false),
        ("BEGIN",                              false),
        ("/* x */ SHOW a",                     false),
        ("SET a = 'b(c)'",                     false),
        ("DISCARD SEQUENCES",                  false),
        ("",                                   false),
        ("SELECT nextval('q')",                true),
        ("SELECT f()",                         true),
        ("INSERT INTO t DEFAULT VALUES",       true),
        ("UPDATE t SET a = DEFAULT",           true),
        ("DELETE FROM t",                      true),
        ("COPY t FROM STDIN",                  true),
        ("EXECUTE p",                          true),
        ("FETCH c",                            true),
        ("DO 'BEGIN END'",                     true),
        ("BEGIN; INSERT INTO t VALUES (1)",    true),
        ("WITH x AS (SELECT 1) TABLE x",       true),
    ];
    for (text, want) in table {
        assert_eq!(scan(text.as_bytes()).takes_values, want, "{text}");
    }
}

#[test]
fn functions_and_commands_are_told_by_name() {
    check(&[
        ("nextval", "SELECT nextval('a')", Set::SEQUENCE),
        ("setval", "SELECT SetVal ('a', 1)", Set::SEQUENCE),
        ("currval", "INSERT INTO t VALUES (currval('a'))", CURRVAL),
        ("lastval", "SELECT lastval()", CURRVAL),
        ("lock", "SELECT pg_advisory_lock(1)", Set::ADVISORY_LOCK),
        ("try lock shared", "SELECT PG_TRY_ADVISORY_LOCK_SHARED(1, 2)", Set::ADVISORY_LOCK),
        ("unlock", "SELECT pg_advisory_unlock(1)", Set::ADVISORY_UNLOCK),
        ("unlock all", "SELECT 1 FROM pg_catalog.pg_advisory_unlock_all()", Set::ADVISORY_UNLOCK),
        ("listen", "LISTEN a", Set::LISTEN),
        ("unlisten", "UNLISTEN *", Set::UNLISTEN),
        ("prepare", "PREPARE p AS SELECT nextval('a')", Set::PREPARE | Set::SEQUENCE),
        ("prepare a statement named transaction", "PREPARE transaction AS SELECT 1", Set::PREPARE),
        ("prepare transaction", "PREPARE TRANSACTION 'x'", Set::COMMIT),
        ("execute", "EXECUTE p(1)", Set::EXECUTE | OPAQUE),
        ("explain execute", "EXPLAIN ANALYZE VERBOSE EXECUTE p", Set::EXECUTE | OPAQUE),
        ("create as execute", "CREATE TABLE t AS EXECUTE p", Set::EXECUTE | OPAQUE | Set::DDL),
        ("trigger", "CREATE TRIGGER g AFTER INSERT ON t EXECUTE FUNCTION f()", Set::DDL),
        ("deallocate", "DEALLOCATE PREPARE p", Set::DEALLOCATE),
        ("deallocate all", "DEALLOCATE ALL", Set::DEALLOCATE | Set::DEALLOCATE_ALL),
        ("deallocate \"all\"", "DEALLOCATE \"all\"", Set::DEALLOCATE),
        ("cursor", "DECLARE c SCROLL CURSOR FOR SELECT 1", NONE),
        ("cursor without hold", "DECLARE c CURSOR WITHOUT HOLD FOR SELECT 1", NONE),
        ("cursor with hold", "DECLARE \"c\" BINARY NO SCROLL CURSOR WITH HOLD FOR SELECT 1", Set::HOLD_CURSOR),
        ("close all", "CLOSE ALL", Set::CLOSE_ALL),
        ("close", "CLOSE c", NONE),
        ("load", "LOAD 'auto_explain'", Set::LOAD),
        ("seed", "SELECT SetSeed ($1)", Set::LOAD),
        ("seed in quotes", "SELECT \"setseed\"(0.5) FROM t", Set::LOAD),
        ("seed as a setting", "SET SESSION seed TO 0.5", Set::SETTINGS | Set::LOAD),
        ("seed as a local setting", "SET LOCAL \"seed\" = 0.5", Set::LOCAL | Set::LOAD),
        ("seed by its name", "SELECT set_config('seed', '0.5', false)", Set::SETTINGS | Set::LOAD),
        ("seed by its name, locally", "SELECT set_config('seed', '0.5', true)", Set::LOCAL | Set::LOAD),
        ("no seed", "SELECT setseed, seed, itself FROM seed", NONE),
        ("do", "DO $$ BEGIN END $$", OPAQUE),
        ("call", "CALL p()", OPAQUE),
        ("unknown", "FROBNICATE x", OPAQUE),
        ("copy", "COPY t FROM STDIN", Set::COPY),
        ("copy of a query", "COPY (SELECT nextval('a')) TO STDOUT", Set::COPY | Set::SEQUENCE),
    ]);
}

#[test]
fn transactions_are_told_by_command() {
    check(&[
        ("begin", "BEGIN", Set::BEGIN),
        ("begin work", "begin isolation level serializable;", Set::BEGIN),
        ("start", "START TRANSACTION", Set::BEGIN),
        ("commit", "COMMIT;", Set::COMMIT),
        ("end", "END TRANSACTION", Set::COMMIT),
        ("commit and chain", "COMMIT WORK AND CHAIN", Set::COMMIT | Set::BEGIN),
        ("commit and no chain", "COMMIT AND NO CHAIN", Set::COMMIT),
        ("commit prepared", "COMMIT PREPARED 'x'", Set::COMMIT),
        ("rollback", "ROLLBACK", Set::ROLLBACK),
        ("abort", "ABORT", Set::ROLLBACK),
        ("rollback and chain", "ROLLBACK AND CHAIN", Set::ROLLBACK | Set::BEGIN),
        ("rollback prepared", "ROLLBACK PREPARED 'x'", Set::ROLLBACK),
        ("rollback to", "ROLLBACK TRANSACTION TO SAVEPOINT s", Set::ROLLBACK_TO),
        ("savepoint", "SAVEPOINT s", Set::SAVEPOINT),
        ("release", "RELEASE s", Set::SAVEPOINT),
        ("all of it", "BEGIN; SELECT 1; COMMIT", Set::BEGIN | Set::COMMIT | Set::MULTI),
        ("empty statements", "; ;COMMIT; ;", Set::COMMIT),
        ("case", "SELECT CASE WHEN true THEN 1 END; SHOW a", Set::MULTI),
    ]);
}

#[test]
fn temporary_objects_and_ddl_are_told_apart() {
    check(&[
        ("create", "CREATE TABLE t (temp int)", Set::DDL),
        ("create a table named temp", "CREATE TABLE temp (a int)", Set::DDL),
        ("temp", "CREATE TEMP TABLE t (a int)", TEMP_TABLE),
        ("temporary", "create global temporary table t (a int)", TEMP_TABLE),
        ("view", "CREATE OR REPLACE TEMP VIEW v AS SELECT 1", TEMP_TABLE),
        ("schema", "CREATE TABLE PG_TEMP.t (a int)", TEMP_TABLE),
        ("schema, quoted", "CREATE FUNCTION \"pg_temp\".f() RETURNS int LANGUAGE sql RETURN 1", TEMP_TABLE),
        ("explained", "EXPLAIN (ANALYZE on, FORMAT json) CREATE TEMP TABLE t AS SELECT 1", TEMP_TABLE),
        ("select into", "SELECT 1 AS a INTO TEMP t", Set::TEMP),
        ("select into local", "SELECT 1 AS a INTO/**/LOCAL TEMPORARY TABLE t", Set::TEMP),
        ("after a number", "SELECT 1INTO TEMP t", Set::TEMP),
        ("a column named like a command", "SELECT insert INTO TEMP t FROM s", Set::TEMP),
        ("a name named like a command", "SELECT (a) merge INTO TEMPORARY t FROM s", Set::TEMP),
        ("select into the schema", "WITH x AS (SELECT 1) SELECT * INTO pg_temp.t FROM x", Set::TEMP),
        ("select into", "SELECT 1 AS a INTO t; SHOW a", Set::MULTI),
        ("alter set", "ALTER ROLE r SET search_path = x", Set::DDL),
        ("drop", "DROP TABLE t", Set::DDL),
        ("truncate", "TRUNCATE t", Set::DDL),
        ("grant", "GRANT EXECUTE ON FUNCTION f() TO r", Set::DDL),
        ("vacuum", "VACUUM t", NONE),
    ]);
}

#[test]
fn semicolons_inside_a_statement_do_not_split_it() {
    check(&[
        ("rule", "CREATE RULE r AS ON INSERT TO t DO (UPDATE u SET a = 1; NOTIFY c)", Set::DDL),
        (
            "rule, then more",
            "CREATE RULE r AS ON INSERT TO t DO (NOTIFY a; NOTIFY b); END",
            Set::DDL | Set::COMMIT | Set::MULTI,
        ),
        ("body", "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END", Set::DDL),
        (
            "body with case",
            "CREATE OR REPLACE PROCEDURE p() BEGIN ATOMIC SELECT CASE WHEN a THEN 1 END AS end; SELECT t.case; END; SET x = 1",
            Set::DDL | SETTINGS | Set::MULTI,
        ),
        ("body left open", "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SET x = 1", Set::DDL | OPAQUE),
        ("no body", "CREATE FUNCTION f(begin int) RETURNS int AS 'x'; COMMIT", Set::DDL | Set::COMMIT | Set::MULTI),
        ("parenthesis too many", "SHOW a); SET x = 1", SETTINGS | Set::MULTI),
    ]);
}

#[test]
fn what_is_left_open_is_opaque() {
    for text in
        ["SHOW 'a", "SHOW \"a", "SHOW $a$ $b$", "SHOW /* /* */", "SHOW (a; SET x = 1", "SHOW U&\"a", "SHOW E'\\"]
    {
        assert_eq!(scan(text.as_bytes()).set, OPAQUE, "{text}");
    }
}

#[test]
fn first_word_is_that_of_the_first_statement_with_any() {
    let table: [(&str, FirstWord); 9] = [
        ("", FirstWord::Empty),
        (";;", FirstWord::Empty),
        ("-- a", FirstWord::Empty),
        ("; /**/ ( (sElEcT 1)); SET x = 1", FirstWord::Select),
        ("SELECT 1", FirstWord::Select),
        ("EXPLAIN SELECT 1", FirstWord::Explain),
        ("'select'", FirstWord::Other),
        ("selects", FirstWord::Other),
        ("deallocates", FirstWord::Other),
    ];
    for (text, want) in table {
        assert_eq!(scan(text.as_bytes()).first, want, "{text}");
    }
    for (word, want) in FirstWord::WORDS {
        assert_eq!(scan(word.to_ascii_uppercase().as_bytes()).first, *want, "{word}");
    }
}

#[test]
fn custom_names_are_folded_and_only_of_the_session() {
    let table: [(&str, &[&str]); 10] = [
        ("SET x = 1", &[]),
        (r"SELECT set_config(E'A\x2e\x42', 'c', false)", &["a.b", "a.b"]),
        ("SET My.Var = 1", &["my.var"]),
        ("SET a.\"B\" . c TO 1; RESET \"D.e\"", &["a.b.c", "d.e"]),
        ("SET LOCAL a.b = 1", &[]),
        ("SELECT set_config('A.b', 'c', false), set_config('c.d', 'e', true)", &["a.b"]),
        ("SELECT set_config('c', 'd.e', false)", &[]),
        ("SELECT 'set a.b = 1'", &[]),
        ("SET a.\"b\"\"c\" = 1", &[]),
        (r"SELECT 'a\'; SET a.b = 1; --'", &["a.b"]),
    ];
    for (text, want) in table {
        assert_eq!(custom_names(text.as_bytes()).collect::<Vec<_>>(), want, "{text}");
    }
    for text in [&b"SET a.\xff = 1"[..], b"SELECT set_config('a.\xff', 'x', false)", b"SET a.\"b\"\"c\" = 1"] {
        assert_eq!(custom_names(text).count(), 0);
        assert_eq!(scan(text).set, CUSTOM | OPAQUE, "a name that cannot be told is opaque");
    }
}

#[test]
fn transaction_end_is_one_bare_command() {
    let table: [(&str, bool); 20] = [
        ("COMMIT", true),
        ("end;", true),
        ("/* a */ ROLLBACK WORK ; -- b", true),
        ("ABORT TRANSACTION", true),
        ("COMMIT AND NO CHAIN", true),
        ("commit work and no chain;;", true),
        ("COMMIT AND CHAIN", false),
        ("COMMIT AND NO", false),
        ("ROLLBACK TO SAVEPOINT s", false),
        ("ROLLBACK WORK TO s", false),
        ("COMMIT PREPARED 'x'", false),
        ("ROLLBACK PREPARED 'x'", false),
        ("COMMIT; SELECT 1", false),
        ("COMMIT; COMMIT", false),
        ("BEGIN", false),
        ("\"commit\"", false),
        ("COMMIT /*", false),
        ("COMMITS", false),
        ("", false),
        ("SELECT 1", false),
    ];
    for (text, want) in table {
        assert_eq!(is_transaction_end(text.as_bytes()), want, "{text}");
    }
}

#[test]
fn effects_print_by_name() {
    assert_eq!(format!("{:?}", scan(b"SET ROLE x").set), "SETTINGS|ROLE");
    assert_eq!(format!("{:?}", scan(b"SELECT 1").set), "NONE");
}

/// Pieces whose concatenations hit the lexer where it is subtle.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let pieces: &[&[u8]] = &[
        b"select ",
        b"insert into ",
        b"update t set ",
        b"with x as (",
        b"values (",
        b"begin",
        b"commit",
        b"rollback",
        b"set ",
        b"set local ",
        b"reset ",
        b"create ",
        b"function ",
        b"explain ",
        b"(analyze) ",
        b"into ",
        b"temp ",
        b"temporary ",
        b"pg_temp.",
        b"\"pg_temp\".",
        b"local ",
        b"set_config",
        b"SET_Config(",
        b"\"set_config\"(",
        b"nextval(",
        b"currval",
        b"lastval (",
        b"setval(",
        b"setseed(",
        b"seed",
        b"pg_advisory_lock(",
        b"pg_try_advisory_lock_shared (",
        b"pg_advisory_unlock_all",
        b"atomic ",
        b"case ",
        b"end ",
        b"as ",
        b"execute ",
        b"declare c cursor with hold for ",
        b";",
        b" ",
        b"\n",
        b"\r",
        b"(",
        b")",
        b",",
        b".",
        b"'",
        b"''",
        b"\"",
        b"\\",
        b"\\'",
        b"E'",
        b"U&\"",
        b"u&'",
        b"B'",
        b"$$",
        b"$a$",
        b"$1",
        b"$",
        b"--",
        b"/*",
        b"*/",
        b"*",
        b"/",
        b"-",
        b"&",
        b"1",
        b"a",
        b"t",
        b"x.y",
        b"role",
        b"true",
        b"false",
        b"=",
        b"\x00",
        b"\xe9",
        b"\x95\\",
        b"interval",
        b"template",
        b"employee",
    ];
    prop_oneof![
        12 => prop::sample::select(pieces).prop_map(<[u8]>::to_vec),
        2 => prop::sample::select(pieces).prop_map(<[u8]>::to_ascii_uppercase),
        1 => prop::collection::vec(any::<u8>(), 0..80),
        1 => (0_usize..70).prop_map(|length| vec![b'q'; length]),
    ]
}

pub(super) fn text() -> impl Strategy<Value = Vec<u8>> {
    let body = || prop::collection::vec(piece(), 0..24).prop_map(|pieces| pieces.concat());
    prop_oneof![body(), body().prop_map(|body| [&b"select "[..], &body].concat())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn prefilter_clears_only_what_the_second_stage_finds_empty(text in text()) {
        if let Some(cleared) = prefilter::clear(&text) {
            for backslash in [Backslash::Plain, Backslash::Escape] {
                let reading = statement::read(&text, backslash, None);
                prop_assert_eq!(Effects { set: reading.set, first: reading.first, harmless: false, takes_values: false, by_values: false }, cleared);
            }
        }
    }

    #[test]
    fn a_needle_is_found_wherever_it_stands(before in "[a-z ]{0,150}", after in "[a-z ,]{0,150}") {
        for needle in ["set_config('a', 'b', false)", "NextVal('a')", "pg_advisory_lock(1)", "1 INTO TEMP t", "U&\"a\"", ";a"] {
            let text = format!("SELECT {before} {needle} {after}");
            prop_assert_eq!(prefilter::clear(text.as_bytes()), None);
        }
    }

    #[test]
    fn ordinary_text_is_cleared_without_reading(words in "([b-df-mo-su-z]{1,9}[ ,=.'\"()]{1,2}){0,60};? ?") {
        let cleared = Effects { set: NONE, first: FirstWord::Update, harmless: false, takes_values: false, by_values: false };
        prop_assert_eq!(prefilter::clear(format!("UPDATE {words}").as_bytes()), Some(cleared));
    }

    #[test]
    fn every_text_is_answered(text in prop_oneof![text(), prop::collection::vec(any::<u8>(), 0..300)]) {
        let effects = scan(&text);
        prop_assert!(!effects.has(Set::CUSTOM | Set::ROLE) || effects.has(SETTINGS));
        let names = custom_names(&text).collect::<Vec<_>>();
        prop_assert!(names.is_empty() || effects.has(Set::CUSTOM));
        prop_assert!(names.iter().all(|name| name.contains('.') && !name.bytes().any(|byte| byte.is_ascii_uppercase())));
        prop_assert!(!is_transaction_end(&text) || effects.has(Set::COMMIT | Set::ROLLBACK));
    }

    #[test]
    fn tokens_lie_in_the_text_in_order(text in text()) {
        for backslash in [Backslash::Plain, Backslash::Escape] {
            let mut lexer = Lexer::new(&text, backslash);
            let mut left = text.len();
            while let Some(token) = lexer.token() {
                prop_assert!(lexer.rest().len() < left, "a token takes at least one byte");
                prop_assert!(text.ends_with(lexer.rest()));
                let consumed = &text[..text.len() - lexer.rest().len()];
                if let Token::Word(body) | Token::Quoted(body) | Token::Text { body, .. } = token {
                    prop_assert!(consumed.windows(body.len().max(1)).any(|part| part.starts_with(body)));
                }
                left = lexer.rest().len();
            }
            prop_assert!(lexer.rest().is_empty());
        }
    }

    #[test]
    fn a_second_statement_adds_its_effects_to_the_first(one in 0..FirstWord::WORDS.len(), two in 0..FirstWord::WORDS.len()) {
        let (one, two) = (FirstWord::WORDS[one].0, FirstWord::WORDS[two].0);
        let joined = format!("{one} a; {two} b");
        let want = scan(format!("{one} a").as_bytes()).set | scan(format!("{two} b").as_bytes()).set | Set::MULTI;
        let both = scan(joined.as_bytes());
        prop_assert_eq!((both.set, both.first), (want, scan(one.as_bytes()).first));
    }
}

#[test]
fn time_is_linear_in_hostile_texts() {
    // A pass that looks back or ahead from every piece takes minutes here, a linear one milliseconds.
    const LENGTH: usize = 64 * 1024;
    let pieces = [
        ";",
        "(",
        "set_config(",
        "set_config(name,'a',false)",
        "set_config(e'\\x41",
        "select set_config('a.b',",
        "/*",
        "/**/",
        "$a$b",
        "$$",
        "''\n",
        "''--\n",
        "'\\",
        "set a.b=1;",
        "a.",
        "explain(",
        "explain(a;",
        "declare c no ",
        "\"\"",
        "e''",
        "u&\"",
        "u&\"\"",
        "nf",
        "rv",
        "&",
        "begin atomic ",
    ];
    for head in ["", "SELECT ", "SELECT a;", "SET ", "SET a.", "EXPLAIN (", "CREATE FUNCTION a "] {
        for piece in pieces {
            let text = format!("{head}{}", piece.repeat(LENGTH / piece.len()));
            let start = cpu_time();
            black_box(scan(text.as_bytes()));
            black_box(custom_names(text.as_bytes()).count());
            let took = cpu_time().saturating_sub(start);
            assert!(took.as_secs() < 5, "{head}{piece}...: {took:?}");
        }
    }
}

/// The time that this thread has worked: that of a busy machine is not the test's.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap()
}

/// Prints what a scan costs; run it with `--release -- --nocapture`.
#[test]
fn the_cost_of_hot_texts_is_told() {
    let long = "SELECT \"users\".\"id\", \"users\".\"name\", \"users\".\"email\", \"users\".\"created_at\", \"users\".\"updated_at\" \
                FROM \"users\" WHERE \"users\".\"account_id\" = $1 AND \"users\".\"deleted_at\" IS NULL ORDER BY \"id\" LIMIT 11";
    let longer = format!("{long} /* {} */", "controller=users action=index ".repeat(10));
    let hot = ["SELECT 1", long, &longer, "BEGIN", "COMMIT;", "INSERT INTO t (a, b) VALUES ($1, $2) RETURNING id"];
    let cold = ["SET search_path = a", "SELECT nextval('users_id_seq')", "SELECT set_config('role', $1, true)"];
    for text in hot.into_iter().chain(cold) {
        let rounds = 2_000_u32;
        let best = (0..10)
            .map(|_| {
                let start = Instant::now();
                for _ in 0..rounds {
                    black_box(scan(black_box(text.as_bytes())));
                }
                start.elapsed() / rounds
            })
            .min();
        println!("{:3} bytes {best:?} {}", text.len(), text.get(..40).unwrap_or(text));
        assert_eq!(prefilter::clear(text.as_bytes()).is_some(), hot.contains(&text), "{text}");
        let (scanned, read) = (scan(text.as_bytes()), read(text.as_bytes()));
        assert_eq!((scanned.set, scanned.first), (read.set, read.first), "{text}");
    }
}

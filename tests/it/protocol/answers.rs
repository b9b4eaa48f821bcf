//! Simple and extended queries, message by message the same as from Postgres.

use std::time::Duration;

use pgweir_harness::wire::build::{
    bind, bind_formats, close_portal, close_statement, describe_portal, describe_statement, execute, flush,
    function_call, parse, query, sync,
};

use crate::stage::{Stage, run, succeed, value};
use crate::transcript::{Comparison, Script, named, unnamed};

const SETUP: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v text);
    INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 50) n;
    CREATE TABLE log (what text);
    CREATE FUNCTION noisy(n int) RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
        FOR i IN 1..n LOOP RAISE NOTICE 'notice %', i USING DETAIL = 'detail', HINT = 'hint'; END LOOP;
        RAISE WARNING 'warning' USING ERRCODE = '01234';
        RETURN n;
    END $$";

#[tokio::test]
async fn simple_queries_are_answered_as_postgres_answers_them() {
    let comparison = Comparison::start(SETUP).await;
    let both = |name, first: &str, second: &str| Script::new(name).send(&[query(first), query(second)]).ready(2);
    comparison
        .check([
            Script::new("one row").queries(&["SELECT 1 AS one, 'two' AS two, NULL AS three"]),
            Script::new("many rows").queries(&["SELECT * FROM t ORDER BY id"]),
            Script::new("no rows").queries(&["SELECT * FROM t WHERE false"]),
            Script::new("empty query").queries(&["", ";", " -- nothing\n", "/* nothing */ ;;"]),
            Script::new("several statements").queries(&["SELECT 1; SELECT 2, 3; ; SELECT 4"]),
            Script::new("error in the middle").queries(&[
                "INSERT INTO log VALUES ('a'); SELECT 1/0; INSERT INTO log VALUES ('b')",
                "SELECT * FROM log",
            ]),
            Script::new("syntax error").queries(&["SELEC 1", "SELECT 1"]),
            Script::new("unknown table").queries(&["SELECT * FROM nowhere", "SELECT x FROM t"]),
            Script::new("constraint").queries(&["INSERT INTO t VALUES (1, 'again')"]),
            Script::new("two at once").send(&[query("SELECT 1"), query("SELECT 2")]).ready(2),
            both("an error and one at once", "SELECT 1/0", "SELECT 2"),
            both("begin and commit at once", "BEGIN; INSERT INTO log VALUES ('c')", "ROLLBACK"),
            Script::new("notices").queries(&["SELECT noisy(3)", "DO 'BEGIN RAISE NOTICE ''x''; END'"]),
            Script::new("warnings").queries(&["COMMIT", "ROLLBACK", "SET LOCAL work_mem = '4MB'"]),
            Script::new("transaction").queries(&[
                "BEGIN",
                "INSERT INTO log VALUES ('d')",
                "SELECT * FROM log",
                "BEGIN",
                "ROLLBACK",
                "SELECT * FROM log",
            ]),
            Script::new("failed transaction").queries(&["BEGIN", "SELECT 1/0", "SELECT 1", "COMMIT", "SELECT 1"]),
            Script::new("savepoints").queries(&[
                "BEGIN; SAVEPOINT a; INSERT INTO log VALUES ('e'); SELECT 1/0",
                "ROLLBACK TO a",
                "SELECT * FROM log",
                "ROLLBACK",
            ]),
            Script::new("begin inside").queries(&["SELECT 1; BEGIN; SELECT 2", "SELECT 3; COMMIT; SELECT 4"]),
            Script::new("commit inside").queries(&["BEGIN; SELECT 1; COMMIT; SELECT 1/0; SELECT 2"]),
            Script::new("cursor").queries(&[
                "BEGIN; DECLARE c CURSOR FOR SELECT id FROM t ORDER BY id; FETCH 3 FROM c",
                "FETCH 2 FROM c; MOVE 10 IN c; FETCH 1 FROM c; CLOSE c",
                "COMMIT",
            ]),
            Script::new("times and dates")
                .queries(&["SELECT timestamptz '2024-01-02 03:04:05 UTC', current_setting('DateStyle')"]),
            Script::new("explain").queries(&["EXPLAIN (COSTS OFF) SELECT * FROM t"]),
            Script::new("set local").queries(&[
                "BEGIN; SET LOCAL DateStyle = German",
                "SELECT date '2024-01-02'",
                "COMMIT",
                "SHOW DateStyle",
            ]),
            Script::new("set local, rolled back").queries(&[
                "BEGIN; SET LOCAL TimeZone = 'Asia/Tokyo'",
                "ROLLBACK",
                "SHOW TimeZone",
            ]),
        ])
        .await;
}

#[test]
fn what_is_reported_of_role_and_session_is_each_clients_own() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    let low = format!("{}_low", stage.name());
    stage.sql(&format!("ALTER ROLE {} SUPERUSER; CREATE ROLE {low}", stage.name()));
    run(Duration::from_mins(1), async {
        const NAMES: [&str; 5] =
            ["is_superuser", "session_authorization", "default_transaction_read_only", "application_name", "TimeZone"];
        let (mut plain, mut other) = (stage.client().await, stage.client().await);
        let known = plain.parameters.clone();
        for sql in [
            "SET default_transaction_read_only = on",
            "SET application_name = 'theirs'",
            "SET TimeZone = 'Asia/Tokyo'",
            &format!("SET ROLE {low}"),
            "RESET ROLE",
            &format!("SET SESSION AUTHORIZATION {low}"),
            "RESET SESSION AUTHORIZATION",
            &format!("BEGIN; SET SESSION AUTHORIZATION {low}"),
            "ROLLBACK",
            "RESET ALL",
        ] {
            succeed(&mut other, sql).await;
            for name in NAMES {
                // What a client is told is what holds for it, and only its own statements change that.
                for client in [&mut other, &mut plain] {
                    let is = value(client, &format!("SHOW {name}")).await;
                    assert_eq!(client.parameters.get(name), Some(&is), "{sql}: {name}");
                }
                assert_eq!(plain.parameters.get(name), known.get(name), "{sql}: {name}");
            }
        }
        assert_eq!(plain.parameters.get("is_superuser").map(String::as_str), Some("on"));
        assert_eq!(NAMES.map(|name| other.parameters.get(name)), NAMES.map(|name| known.get(name)));
    });
}

#[tokio::test]
async fn a_session_setting_is_reported_and_stays_with_its_client() {
    let comparison = Comparison::start(SETUP).await;
    comparison
        .check([
            Script::new("set").alone().queries(&[
                "SET application_name = 'mine'",
                "SHOW application_name",
                "RESET application_name",
                "SHOW application_name",
            ]),
            Script::new("set several").alone().queries(&[
                "SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'",
                "SELECT timestamptz '2024-01-02 03:04:05 UTC'",
            ]),
            Script::new("set and roll back").alone().queries(&[
                "BEGIN",
                "SET TimeZone = 'Asia/Tokyo'",
                "ROLLBACK",
                "SHOW TimeZone",
            ]),
            Script::new("set_config")
                .alone()
                .queries(&["SELECT set_config('application_name', 'mine', false)", "SHOW application_name"]),
            Script::new("reset all").alone().queries(&["SET TimeZone = 'Asia/Tokyo'", "RESET ALL", "SHOW TimeZone"]),
            Script::new("discard all").alone().queries(&[
                "SET TimeZone = 'Asia/Tokyo'",
                "DISCARD ALL",
                "SHOW TimeZone",
            ]),
            Script::new("temporary table").alone().queries(&[
                "CREATE TEMP TABLE mine (a int)",
                "INSERT INTO mine VALUES (1)",
                "SELECT a + 1 AS b FROM mine",
                "DROP TABLE mine",
            ]),
            Script::new("sql prepare").alone().queries(&[
                "PREPARE p AS SELECT 1",
                "EXECUTE p",
                "DEALLOCATE p",
                "EXECUTE p",
            ]),
            Script::new("advisory lock").alone().queries(&[
                "SELECT pg_advisory_lock(1)",
                "SELECT pg_advisory_unlock(1)",
                "SELECT pg_advisory_unlock(1)",
            ]),
            Script::new("listen").alone().queries(&[
                "LISTEN here",
                "NOTIFY here, 'hello'",
                "SELECT 1",
                "UNLISTEN here",
                "NOTIFY here",
                "SELECT 1",
            ]),
            Script::new("cursor with hold").alone().queries(&[
                "DECLARE h CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id",
                "FETCH 2 FROM h",
                "FETCH 1 FROM h",
                "CLOSE h",
            ]),
            Script::new("currval").alone().queries(&[
                "CREATE SEQUENCE IF NOT EXISTS q",
                "BEGIN; SELECT setval('q', 41); SELECT nextval('q'), currval('q')",
                "COMMIT",
                "DROP SEQUENCE q",
            ]),
        ])
        .await;
}

#[tokio::test]
async fn extended_queries_are_answered_as_postgres_answers_them() {
    let comparison = Comparison::start(SETUP).await;
    let limited = |rows| [bind("", "s", &[]), execute("", rows), execute("", rows), execute("", 0)].concat();
    comparison
        .check([
            Script::new("unnamed")
                .send(&[unnamed("SELECT $1::int + 1, $2::text", &[Some(b"1"), None]), sync()])
                .ready(1),
            Script::new("only sync").send(&[sync(), sync(), sync()]).ready(3),
            Script::new("empty").send(&[unnamed("", &[]), sync()]).ready(1),
            Script::new("named, described")
                .send(&[parse("s", "SELECT $1::int AS n", &[]), describe_statement("s"), sync()])
                .ready(1)
                .send(&[
                    bind("p", "s", &[Some(b"5")]),
                    describe_portal("p"),
                    execute("p", 0),
                    close_portal("p"),
                    close_statement("s"),
                    sync(),
                ])
                .ready(1),
            Script::new("rows in portions")
                .send(&[parse("s", "SELECT id FROM t ORDER BY id", &[]), limited(3), sync()])
                .ready(1),
            Script::new("portal over syncs")
                .queries(&["BEGIN"])
                .send(&[parse("s", "SELECT id FROM t ORDER BY id", &[]), bind("p", "s", &[]), execute("p", 2), sync()])
                .ready(1)
                .send(&[execute("p", 2), sync()])
                .ready(1)
                .queries(&["COMMIT"])
                .send(&[execute("p", 2), sync()])
                .ready(1),
            Script::new("binary")
                .send(&[
                    parse("", "SELECT $1::int8, $2::text", &[20, 25]),
                    bind_formats("", "", &[1, 0], &[Some(&7_i64.to_be_bytes()), Some(b"x")], &[1, 0]),
                    describe_portal(""),
                    execute("", 0),
                    sync(),
                ])
                .ready(1),
            Script::new("type given").send(&[parse("", "SELECT $1", &[23]), describe_statement(""), sync()]).ready(1),
            Script::new("no result")
                .send(&[
                    unnamed("INSERT INTO log VALUES ('x') RETURNING what", &[]),
                    unnamed("DELETE FROM log", &[]),
                    sync(),
                ])
                .ready(1),
            Script::new("error in parse").send(&[unnamed("SELEC", &[]), unnamed("SELECT 2", &[]), sync()]).ready(1),
            Script::new("error in bind")
                .send(&[unnamed("SELECT $1::int", &[Some(b"x")]), unnamed("SELECT 2", &[]), sync()])
                .ready(1),
            Script::new("too few parameters").send(&[unnamed("SELECT $1::int", &[]), sync()]).ready(1),
            Script::new("error in execute")
                .send(&[unnamed("SELECT 1/$1::int", &[Some(b"0")]), unnamed("SELECT 2", &[]), sync()])
                .ready(1),
            Script::new("implicit transaction")
                .send(&[unnamed("INSERT INTO log VALUES ('gone')", &[]), unnamed("SELECT 1/0", &[]), sync()])
                .ready(1)
                .queries(&["SELECT * FROM log"]),
            Script::new("unknown portal")
                .send(&[execute("nowhere", 0), sync(), describe_portal("nowhere"), sync()])
                .ready(2),
            Script::new("unknown names are closed")
                .send(&[close_portal("nowhere"), close_statement("nowhere"), sync()])
                .ready(1),
            Script::new("flush")
                .send(&[parse("", "SELECT 1 AS a", &[]), flush()])
                .until(b'1')
                .send(&[bind("", "", &[]), describe_portal(""), flush()])
                .until(b'T')
                .send(&[execute("", 0), flush()])
                .until(b'C')
                .send(&[sync()])
                .ready(1),
            Script::new("flush after an error")
                .send(&[parse("", "SELEC", &[]), flush()])
                .until(b'E')
                .send(&[unnamed("SELECT 1", &[]), flush(), sync()])
                .ready(1),
            Script::new("flush with nothing").send(&[flush(), query("SELECT 1"), flush()]).ready(1),
            Script::new("query before sync").send(&[unnamed("SELECT 1", &[]), query("SELECT 2"), sync()]).ready(2),
            Script::new("query after an error, before sync")
                .send(&[unnamed("SELECT 1/0", &[]), query("SELECT 2"), sync(), query("SELECT 3")])
                .ready(2),
            Script::new("query, extended, query")
                .send(&[query("SELECT 1"), unnamed("SELECT 2", &[]), sync(), query("SELECT 3")])
                .ready(3),
            Script::new("batches with an error in the middle")
                .send(&[
                    unnamed("SELECT 1", &[]),
                    sync(),
                    unnamed("SELECT 1/0", &[]),
                    unnamed("SELECT 2", &[]),
                    sync(),
                    unnamed("SELECT 3", &[]),
                    sync(),
                ])
                .ready(3),
            Script::new("transaction")
                .send(&[
                    unnamed("BEGIN", &[]),
                    sync(),
                    unnamed("SELECT 1", &[]),
                    sync(),
                    unnamed("COMMIT", &[]),
                    sync(),
                ])
                .ready(3),
            Script::new("transaction in one batch")
                .send(&[
                    unnamed("BEGIN", &[]),
                    unnamed("INSERT INTO log VALUES ('y')", &[]),
                    unnamed("ROLLBACK", &[]),
                    sync(),
                ])
                .ready(1)
                .queries(&["SELECT * FROM log"]),
            Script::new("failed transaction")
                .queries(&["BEGIN"])
                .send(&[
                    unnamed("SELECT 1/0", &[]),
                    sync(),
                    unnamed("SELECT 1", &[]),
                    sync(),
                    unnamed("ROLLBACK", &[]),
                    sync(),
                ])
                .ready(3),
            Script::new("several commands in parse").send(&[unnamed("SELECT 1; SELECT 2", &[]), sync()]).ready(1),
            Script::new("parse alone").send(&[parse("", "SELECT 1", &[]), sync()]).ready(1),
            Script::new("bind alone").send(&[parse("", "SELECT 1", &[]), bind("", "", &[]), sync()]).ready(1),
            Script::new("stray copy messages").send(&[build_stray(), query("SELECT 1")]).ready(1),
            Script::new("notices").send(&[unnamed("SELECT noisy(2)", &[]), sync()]).ready(1),
        ])
        .await;
}

/// `CopyData`, `CopyDone` and `CopyFail` outside of COPY are ignored. Source: `PostgreSQL` 17 docs, §54.2.6.
fn build_stray() -> Vec<u8> {
    use pgweir_harness::wire::build::{copy_data, copy_done, copy_fail};
    [copy_data(b"1\n"), copy_done(), copy_fail("late")].concat()
}

#[tokio::test]
async fn function_calls_are_answered_as_postgres_answers_them() {
    // The object ids of int4pl(int4, int4) and int4div(int4, int4) are fixed in pg_proc.dat.
    const INT4PL: u32 = 177;
    const INT4DIV: u32 = 154;
    let comparison = Comparison::start(SETUP).await;
    let call = |function, a: &'static [u8], b: Option<&'static [u8]>| function_call(function, &[Some(a), b]);
    comparison
        .check([
            Script::new("value").send(&[call(INT4PL, b"40", Some(b"2"))]).ready(1),
            Script::new("null").send(&[call(INT4PL, b"40", None)]).ready(1),
            Script::new("error").send(&[call(INT4DIV, b"1", Some(b"0")), query("SELECT 1")]).ready(2),
            Script::new("unknown function").send(&[call(1, b"1", Some(b"0"))]).ready(1),
            Script::new("pipelined")
                .send(&[call(INT4PL, b"1", Some(b"2")), call(INT4PL, b"3", Some(b"4")), query("SELECT 1")])
                .ready(3),
            Script::new("in a transaction")
                .queries(&["BEGIN"])
                .send(&[call(INT4DIV, b"1", Some(b"0"))])
                .ready(1)
                .queries(&["ROLLBACK"]),
        ])
        .await;
}

#[tokio::test]
async fn a_hundred_statements_in_one_write_are_answered_in_order() {
    let comparison = Comparison::start(SETUP).await;
    let many = |bad: Option<usize>, each: bool| {
        let mut messages: Vec<Vec<u8>> = Vec::new();
        for n in 0..100 {
            let text = if bad == Some(n) { "SELECT 1/0".to_owned() } else { format!("SELECT {n}") };
            messages.push(unnamed(&text, &[]));
            if each {
                messages.push(sync());
            }
        }
        if !each {
            messages.push(sync());
        }
        messages
    };
    let prepared: Vec<Vec<u8>> = (0..100).map(|n: u32| named("s", &[Some(n.to_string().as_bytes())])).collect();
    comparison
        .check([
            Script::new("one batch").send(&many(None, false)).ready(1),
            Script::new("one batch, an error").send(&many(Some(50), false)).ready(1),
            Script::new("a hundred batches").send(&many(None, true)).ready(100),
            Script::new("a hundred batches, an error").send(&many(Some(50), true)).ready(100),
            Script::new("a hundred queries")
                .send(&(0..100).map(|n| query(&format!("SELECT {n}"))).collect::<Vec<_>>())
                .ready(100),
            Script::new("prepared").send(&[parse("s", "SELECT $1::int", &[]), prepared.concat(), sync()]).ready(1),
        ])
        .await;
}

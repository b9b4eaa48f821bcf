//! COPY in both directions, with failures inside it and messages sent ahead.

use pgweir_harness::wire::build::{bind, copy_data, copy_done, copy_fail, execute, flush, parse, query, sync};

use crate::transcript::{Comparison, Script, unnamed};

const SETUP: &str = "CREATE TABLE t (id int PRIMARY KEY, v text);
    INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 50) n;
    CREATE TABLE sink (id int)";
const IN: &str = "COPY sink FROM STDIN";
const OUT: &str = "COPY (SELECT id, v FROM t ORDER BY id) TO STDOUT";
const COUNT: &str = "SELECT count(*) FROM sink";

/// Parse, Bind and Execute; Describe of a COPY is not what drivers send.
fn extended(sql: &str) -> Vec<u8> {
    [parse("", sql, &[]), bind("", "", &[]), execute("", 0)].concat()
}

fn rows(n: usize) -> Vec<u8> {
    (0..n).map(|n| copy_data(format!("{n}\n").as_bytes())).collect::<Vec<_>>().concat()
}

#[tokio::test]
async fn copy_by_simple_query_is_answered_as_postgres_answers_it() {
    let comparison = Comparison::start(SETUP).await;
    comparison
        .check(
            [
                Script::new("out").queries(&[OUT]),
                Script::new("out, nothing").queries(&["COPY (SELECT 1 WHERE false) TO STDOUT"]),
                Script::new("out, an error on the way")
                    .queries(&["COPY (SELECT 1/(3-n) FROM generate_series(1, 5) n) TO STDOUT"]),
                Script::new("out, twice, and more")
                    .queries(&["COPY (SELECT 1) TO STDOUT; COPY (SELECT 2) TO STDOUT; SELECT 3"]),
                Script::new("out, binary").queries(&["COPY (SELECT 1::int8) TO STDOUT (FORMAT binary)"]),
                Script::new("in")
                    .send(&[query(IN)])
                    .until(b'G')
                    .send(&[rows(10), copy_done()])
                    .ready(1)
                    .queries(&[COUNT]),
                Script::new("in, nothing").send(&[query(IN)]).until(b'G').send(&[copy_done()]).ready(1),
                Script::new("in, rows across messages")
                    .send(&[query(IN)])
                    .until(b'G')
                    .send(&[copy_data(b"1"), copy_data(b"2\n3"), copy_data(b""), copy_data(b"4\n"), copy_done()])
                    .ready(1)
                    .queries(&["SELECT max(id) FROM sink"]),
                Script::new("in, sent ahead").send(&[query(IN), rows(10), copy_done(), query(COUNT)]).ready(2),
                Script::new("in, given up")
                    .send(&[query(IN)])
                    .until(b'G')
                    .send(&[rows(3), copy_fail("changed my mind")])
                    .ready(1)
                    .queries(&[COUNT]),
                Script::new("in, given up ahead")
                    .send(&[query(IN), rows(3), copy_fail("at once"), query(COUNT)])
                    .ready(2),
                Script::new("in, bad data")
                    .send(&[query(IN)])
                    .until(b'G')
                    .send(&[copy_data(b"x\n")])
                    .until(b'E')
                    .send(&[rows(5), copy_done()])
                    .ready(1)
                    .queries(&[COUNT]),
                Script::new("in, bad data, all sent ahead")
                    .send(&[query(IN), rows(2), copy_data(b"x\n"), rows(5), copy_done(), query(COUNT)])
                    .ready(2),
                Script::new("in, bad data, then given up")
                    .send(&[query(IN), copy_data(b"x\n"), rows(2), copy_fail("too late"), query(COUNT)])
                    .ready(2),
                Script::new("in, no such table")
                    .send(&[query("COPY nowhere FROM STDIN"), rows(5), copy_done(), query("SELECT 1")])
                    .ready(2),
                Script::new("in, flush and sync inside")
                    .send(&[query(IN), rows(1), flush(), sync(), rows(1), sync(), copy_done(), query(COUNT)])
                    .ready(2),
                Script::new("in, bad data, syncs behind it")
                    .send(&[query(IN), copy_data(b"x\n"), sync(), sync(), copy_done(), query(COUNT)])
                    .ready(4),
                Script::new("in, twice, and more")
                    .send(&[
                        query("COPY sink FROM STDIN; COPY sink FROM STDIN; SELECT 1"),
                        rows(2),
                        copy_done(),
                        rows(3),
                        copy_done(),
                        query(COUNT),
                    ])
                    .ready(2),
                Script::new("in, the first of two fails")
                    .send(&[
                        query("COPY sink FROM STDIN; COPY sink FROM STDIN"),
                        copy_data(b"x\n"),
                        copy_done(),
                        rows(3),
                        copy_done(),
                        query(COUNT),
                    ])
                    .ready(2),
                Script::new("in and out")
                    .send(&[query("COPY sink FROM STDIN; COPY (SELECT 1) TO STDOUT"), rows(2), copy_done()])
                    .ready(1),
                Script::new("in, in a transaction")
                    .queries(&["BEGIN"])
                    .send(&[query(IN), rows(4), copy_done()])
                    .ready(1)
                    .queries(&[COUNT, "ROLLBACK", COUNT]),
                Script::new("in, failed in a transaction")
                    .queries(&["BEGIN"])
                    .send(&[query(IN), copy_data(b"x\n"), copy_done()])
                    .ready(1)
                    .queries(&["SELECT 1", "ROLLBACK"]),
                Script::new("done without copy").send(&[query("SELECT 1"), copy_done(), query("SELECT 2")]).ready(2),
            ]
            .map(truncating),
        )
        .await;
}

#[tokio::test]
async fn copy_by_extended_query_is_answered_as_postgres_answers_it() {
    let comparison = Comparison::start(SETUP).await;
    let select = |text: &str| unnamed(text, &[]);
    comparison
        .check(
            [
                Script::new("out").send(&[extended(OUT), sync()]).ready(1),
                Script::new("out in a pipeline")
                    .send(&[select("SELECT 1"), extended(OUT), select("SELECT 2"), sync(), select("SELECT 3"), sync()])
                    .ready(2),
                Script::new("in")
                    .send(&[extended(IN), flush()])
                    .until(b'G')
                    .send(&[rows(10), copy_done(), sync()])
                    .ready(1)
                    .queries(&[COUNT]),
                // Postgres ignores a Sync inside COPY, so the one after it is the one that is answered.
                Script::new("in, sync sent blindly ahead")
                    .send(&[extended(IN), sync()])
                    .until(b'G')
                    .send(&[rows(10), copy_done(), sync()])
                    .ready(1)
                    .queries(&[COUNT]),
                Script::new("in, everything sent blindly ahead")
                    .send(&[extended(IN), sync(), rows(10), copy_done(), sync(), query(COUNT)])
                    .ready(2),
                // Whether the COPY reads a Sync or fails in front of it: nothing but the answers tells.
                Script::new("in, bad data, and a sync before its end")
                    .send(&[extended(IN), copy_data(b"x\n"), sync(), copy_done(), sync(), query(COUNT)])
                    .ready(3),
                Script::new("in, bad data, and syncs before its end, in turns")
                    .send(&[extended(IN), sync()])
                    .until(b'G')
                    .send(&[rows(2), sync(), copy_data(b"x\n"), sync(), sync(), copy_done(), sync()])
                    .ready(3)
                    .queries(&[COUNT]),
                Script::new("in, no sync before the data")
                    .send(&[extended(IN), rows(10), copy_done(), sync(), query(COUNT)])
                    .ready(2),
                // It fails before COPY begins: this time the first Sync is answered, and so is the second.
                Script::new("in, no such table, sync ahead")
                    .send(&[extended("COPY nowhere FROM STDIN"), sync(), rows(3), copy_done(), sync(), query(COUNT)])
                    .ready(3),
                Script::new("in, bad data, sync ahead")
                    .send(&[extended(IN), sync(), copy_data(b"x\n"), rows(3), copy_done(), sync(), query(COUNT)])
                    .ready(2),
                Script::new("in, bad data")
                    .send(&[extended(IN), copy_data(b"x\n"), rows(3), copy_done(), sync(), query(COUNT)])
                    .ready(2),
                Script::new("in, bad data seen at the end, sync ahead")
                    .send(&[extended(IN), sync(), copy_data(b"x"), copy_done(), sync(), query(COUNT)])
                    .ready(2),
                Script::new("in, given up, sync ahead")
                    .send(&[extended(IN), sync(), rows(3), copy_fail("no"), sync(), query(COUNT)])
                    .ready(2),
                Script::new("in, in a pipeline")
                    .send(&[
                        select("SELECT 1"),
                        extended(IN),
                        rows(3),
                        copy_done(),
                        select("SELECT count(*) FROM sink"),
                        sync(),
                        select("SELECT 3"),
                        sync(),
                    ])
                    .ready(2),
                Script::new("in, failing in a pipeline")
                    .send(&[
                        select("SELECT 1"),
                        extended(IN),
                        copy_data(b"x\n"),
                        copy_done(),
                        select("SELECT 2"),
                        sync(),
                        select("SELECT 3"),
                        sync(),
                    ])
                    .ready(2),
                Script::new("in, bad data in a transaction")
                    .queries(&["BEGIN"])
                    .send(&[extended(IN), sync(), copy_data(b"x\n"), copy_done(), sync()])
                    .ready(1)
                    .queries(&["SELECT 1", "ROLLBACK"]),
                Script::new("twice")
                    .send(&[
                        extended(IN),
                        rows(1),
                        copy_done(),
                        extended(IN),
                        rows(2),
                        copy_done(),
                        sync(),
                        query(COUNT),
                    ])
                    .ready(2),
            ]
            .map(truncating),
        )
        .await;
}

/// Every script begins with an empty table.
fn truncating(script: Script) -> Script {
    script.before("TRUNCATE sink")
}

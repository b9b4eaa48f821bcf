//! Prepared statements in transaction mode: every client sees its own, as if it were alone.

mod changes;
mod healing;
mod modes;
mod own;

use pgweir_harness::wire::build::{
    bind, close_portal, close_statement, describe_portal, describe_statement, execute, flush, message, parse, query,
    sync,
};
use pgweir_harness::wire::{Message, Outcome, Wire};

use crate::stage::read_to_end;
use crate::support::{Site, assert_value, server_pid};
use crate::transcript::{Comparison, Script, named, unnamed};

const SETUP: &str = "CREATE TABLE log (what text); CREATE TABLE t (id int, v text)";

async fn run(client: &mut Wire, messages: &[Vec<u8>]) -> Outcome {
    client.send(&messages.concat()).await.unwrap();
    client.outcome().await.unwrap()
}

/// Prepares and awaits the answer.
async fn prepare(client: &mut Wire, name: &str, text: &str) {
    let outcome = run(client, &[parse(name, text, &[]), sync()]).await;
    assert_eq!(outcome.error, None, "{name}: {text}");
}

/// Occupies a server connection until the client commits: the one used last, so that others get another.
async fn hold(client: &mut Wire) -> i32 {
    assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
    server_pid(client).await
}

#[tokio::test]
async fn statements_are_answered_as_postgres_answers_them() {
    let comparison = Comparison::start(SETUP).await;
    let one = |n: &'static [u8]| named("s1", &[Some(n)]);
    comparison
        .check([
            Script::new("over several batches")
                .send(&[parse("s1", "SELECT $1::int + 1", &[]), sync()])
                .ready(1)
                .send(&[one(b"1"), sync()])
                .ready(1)
                .send(&[one(b"2"), one(b"3"), sync()])
                .ready(1),
            Script::new("prepared in the batch that uses it")
                .send(&[parse("s1", "SELECT $1::int", &[]), one(b"1"), sync(), one(b"2"), sync()])
                .ready(2)
                .send(&[one(b"3"), sync()])
                .ready(1),
            // What the server has of another client's is nobody else's, not even behind messages that it skips.
            Script::new("unnamed, none, behind an error")
                .send(&[bind("", "nosuch", &[]), bind("", "", &[]), sync(), bind("", "", &[]), execute("", 0), sync()])
                .ready(2),
            Script::new("unnamed, one's own, behind an error")
                .send(&[parse("", "SELECT 'mine'", &[]), sync()])
                .ready(1)
                .send(&[bind("", "nosuch", &[]), bind("", "", &[]), sync(), bind("", "", &[]), execute("", 0), sync()])
                .ready(2),
            Script::new("unnamed, parsed behind an error")
                .send(&[bind("", "nosuch", &[]), parse("", "SELECT 'mine'", &[]), sync()])
                .send(&[bind("", "", &[]), execute("", 0), sync()])
                .ready(2),
            Script::new("unnamed, a query behind an error")
                .send(&[bind("", "nosuch", &[]), query("SELECT 1"), sync(), bind("", "", &[]), execute("", 0), sync()])
                .ready(2),
            Script::new("described")
                .send(&[parse("s1", "SELECT $1::int AS a, $2::text AS b", &[]), sync()])
                .ready(1)
                .send(&[describe_statement("s1"), sync()])
                .ready(1)
                .send(&[describe_statement("s1"), describe_statement("s1"), sync()])
                .ready(1),
            Script::new("described, no rows")
                .send(&[parse("s1", "INSERT INTO log VALUES ($1)", &[]), describe_statement("s1"), sync()])
                .ready(1),
            Script::new("flushed")
                .send(&[parse("s1", "SELECT $1::int", &[]), describe_statement("s1"), flush()])
                .until(b'T')
                .send(&[bind("", "s1", &[Some(b"1")]), execute("", 0), sync()])
                .ready(1),
            Script::new("name taken")
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .send(&[parse("s1", "SELECT 2", &[]), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("name taken, same text")
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("name taken in the same batch")
                .send(&[parse("s1", "SELECT 1", &[]), parse("s1", "SELECT 2", &[]), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("unknown name")
                .send(&[named("never", &[]), sync(), describe_statement("never"), sync(), query("SELECT 1")])
                .ready(3),
            Script::new("closed")
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .send(&[close_statement("s1"), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("closed and prepared anew")
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .send(&[close_statement("s1"), parse("s1", "SELECT 2", &[]), named("s1", &[]), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("closed after use in the batch")
                .send(&[
                    parse("s1", "SELECT 1", &[]),
                    named("s1", &[]),
                    close_statement("s1"),
                    named("s1", &[]),
                    sync(),
                ])
                .ready(1),
            Script::new("bad text")
                .send(&[parse("s1", "SELEC", &[]), named("s1", &[]), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1)
                .send(&[parse("s1", "SELECT 1", &[]), named("s1", &[]), sync()])
                .ready(1),
            Script::new("parameter types that differ")
                .send(&[
                    parse("s1", "SELECT $1", &[23]),
                    parse("s2", "SELECT $1", &[25]),
                    describe_statement("s1"),
                    describe_statement("s2"),
                    sync(),
                ])
                .ready(1)
                .send(&[named("s1", &[Some(b"x")]), sync(), named("s2", &[Some(b"x")]), sync()])
                .ready(2),
            Script::new("utility statements")
                .send(&[
                    parse("s1", "SHOW server_version", &[]),
                    named("s1", &[]),
                    parse("s2", "INSERT INTO log VALUES ('x')", &[]),
                    named("s2", &[]),
                    parse("s3", "DELETE FROM log", &[]),
                    named("s3", &[]),
                    sync(),
                ])
                .ready(1),
            Script::new("long and odd names")
                .send(&[parse("näme with ' \" \\ and more", "SELECT 1", &[]), sync()])
                .ready(1)
                .send(&[named("näme with ' \" \\ and more", &[]), sync(), named("NÄME", &[]), sync()])
                .ready(2),
            Script::new("a name like the pooler's own")
                .send(&[parse("pgweir_s1", "SELECT 'mine'", &[]), sync()])
                .ready(1)
                .send(&[named("pgweir_s1", &[]), sync(), named("pgweir_s2", &[]), sync()])
                .ready(2),
            Script::new("empty text")
                .send(&[parse("s1", "", &[]), describe_statement("s1"), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("two portals")
                .queries(&["BEGIN"])
                .send(&[
                    parse("s1", "SELECT generate_series(1, $1::int)", &[]),
                    bind("a", "s1", &[Some(b"3")]),
                    bind("b", "s1", &[Some(b"2")]),
                    execute("a", 1),
                    execute("b", 1),
                    execute("a", 0),
                    execute("b", 0),
                    close_portal("a"),
                    describe_portal("b"),
                    describe_portal("a"),
                    sync(),
                ])
                .ready(1)
                .queries(&["ROLLBACK"]),
        ])
        .await;
}

#[tokio::test]
async fn errors_leave_exactly_the_statements_that_postgres_would_leave() {
    let comparison = Comparison::start(SETUP).await;
    comparison
        .check([
            // The error comes before the second Parse runs: that name must be free afterwards.
            Script::new("parse behind an error never ran")
                .send(&[unnamed("SELECT 1/0", &[]), parse("s1", "SELECT 'never'", &[]), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1)
                .send(&[parse("s1", "SELECT 'now'", &[]), named("s1", &[]), sync()])
                .ready(1),
            Script::new("parse before an error ran")
                .send(&[
                    parse("s1", "SELECT 'kept'", &[]),
                    unnamed("SELECT 1/0", &[]),
                    parse("s2", "SELECT 'never'", &[]),
                    sync(),
                ])
                .ready(1)
                .send(&[named("s1", &[]), sync(), named("s2", &[]), sync()])
                .ready(2),
            Script::new("close behind an error never ran")
                .send(&[parse("s1", "SELECT 'kept'", &[]), sync()])
                .ready(1)
                .send(&[unnamed("SELECT 1/0", &[]), close_statement("s1"), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("error, and a further batch in the same write")
                .send(&[
                    unnamed("SELECT 1/0", &[]),
                    parse("s1", "SELECT 'never'", &[]),
                    sync(),
                    parse("s1", "SELECT 'yes'", &[]),
                    named("s1", &[]),
                    sync(),
                    named("s1", &[]),
                    sync(),
                ])
                .ready(3),
            Script::new("error in its own execution")
                .send(&[parse("s1", "SELECT 1/$1::int", &[]), named("s1", &[Some(b"0")]), sync()])
                .ready(1)
                .send(&[named("s1", &[Some(b"1")]), sync()])
                .ready(1),
            Script::new("in a transaction, rolled back")
                .queries(&["BEGIN"])
                .send(&[parse("s1", "SELECT 'stays'", &[]), sync()])
                .ready(1)
                .queries(&["ROLLBACK"])
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("parse in a failed transaction")
                .queries(&["BEGIN", "SELECT 1/0"])
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .send(&[parse("s2", "ROLLBACK", &[]), named("s2", &[]), sync()])
                .ready(1)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("known text parsed in a failed transaction")
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .queries(&["BEGIN", "SELECT 1/0"])
                .send(&[parse("s2", "SELECT 1", &[]), sync()])
                .ready(1)
                .queries(&["ROLLBACK"])
                .send(&[named("s2", &[]), sync()])
                .ready(1),
            Script::new("bind in a failed transaction")
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .queries(&["BEGIN", "SELECT 1/0"])
                .send(&[named("s1", &[]), sync()])
                .ready(1)
                .send(&[describe_statement("s1"), sync()])
                .ready(1)
                .queries(&["ROLLBACK"])
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("close in a failed transaction")
                .send(&[parse("s1", "SELECT 1", &[]), sync()])
                .ready(1)
                .queries(&["BEGIN", "SELECT 1/0"])
                .send(&[close_statement("s1"), sync()])
                .ready(1)
                .queries(&["ROLLBACK"])
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("unnamed parse in a failed transaction, bound after it")
                .queries(&["BEGIN", "SELECT 1/0"])
                .send(&[parse("", "SELECT 1", &[]), sync()])
                .ready(1)
                .queries(&["ROLLBACK"])
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("unnamed parse in a failed transaction")
                .queries(&["BEGIN", "SELECT 1/0"])
                .send(&[unnamed("SELECT 1", &[]), sync()])
                .ready(1)
                .queries(&["ROLLBACK"]),
            Script::new("table gone")
                .queries(&["CREATE TABLE passing (a int)"])
                .send(&[parse("s1", "SELECT a + 0 AS b FROM passing", &[]), named("s1", &[]), sync()])
                .ready(1)
                .queries(&["DROP TABLE passing"])
                .send(&[named("s1", &[]), sync()])
                .ready(1),
        ])
        .await;
}

#[tokio::test]
async fn batches_written_at_once_see_what_errors_in_earlier_ones_left() {
    // Each was found and shrunk by `protocol::random`.
    let comparison = Comparison::start(SETUP).await;
    let too_many = |name| named(name, &[Some(b"1")]);
    comparison
        .check([
            Script::new("a text skipped under one name and parsed under another")
                .send(&[named("", &[]), parse("s2", "SELECT 'a'", &[]), sync(), parse("s1", "SELECT 'a'", &[]), sync()])
                .ready(2)
                .send(&[named("s1", &[]), sync()])
                .ready(1),
            Script::new("an error about a statement that is closed behind it")
                .send(&[parse("s1", "SAVEPOINT s", &[]), sync()])
                .ready(1)
                .send(&[too_many("s1"), sync(), close_statement("s1"), sync()])
                .ready(2),
            Script::new("a taken name whose second parse was skipped")
                .send(&[parse("s1", "SHOW TimeZone", &[]), sync()])
                .ready(1)
                .send(&[describe_statement(""), parse("s1", "", &[]), sync(), named("s1", &[]), sync()])
                .ready(2),
            Script::new("a taken name whose second parse was skipped and whose third was not")
                .send(&[parse("s1", "SAVEPOINT s", &[]), sync()])
                .ready(1)
                .send(&[named("", &[]), parse("s1", "SELECT 1", &[]), sync(), parse("s1", "SELECT 2", &[]), sync()])
                .ready(2),
            Script::new("an unnamed statement destroyed by a query behind an error")
                .send(&[parse("", "SELECT 1", &[]), named("nowhere", &[]), parse("", "SELECT 2", &[]), sync()])
                .send(&[query("SELECT 1/0")])
                .ready(2)
                .send(&[too_many(""), sync()])
                .ready(1),
            Script::new("an error about one of two names of a text")
                .send(&[parse("s2", "BEGIN", &[]), parse("s1", "BEGIN", &[]), sync()])
                .ready(1)
                .send(&[too_many("s1"), sync(), too_many("s2"), sync()])
                .ready(2),
        ])
        .await;
}

#[tokio::test]
async fn the_unnamed_statement_lives_as_long_as_in_postgres() {
    let comparison = Comparison::start(SETUP).await;
    let alone = |text| parse("", text, &[]);
    comparison
        .check([
            Script::new("over two batches")
                .send(&[alone("SELECT $1::int, 'mine'"), sync()])
                .ready(1)
                .send(&[named("", &[Some(b"1")]), sync()])
                .ready(1)
                .send(&[named("", &[Some(b"2")]), sync()])
                .ready(1),
            Script::new("described first")
                .send(&[alone("SELECT $1::int AS mine"), describe_statement(""), sync()])
                .ready(1)
                .send(&[named("", &[Some(b"1")]), sync()])
                .ready(1),
            Script::new("only described later")
                .send(&[alone("SELECT $1::int AS mine"), sync()])
                .ready(1)
                .send(&[describe_statement(""), sync()])
                .ready(1),
            Script::new("a query destroys it")
                .send(&[alone("SELECT 1"), sync()])
                .ready(1)
                .queries(&["SELECT 2"])
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("a query before sync destroys it")
                .send(&[alone("SELECT 1"), query("SELECT 2"), named("", &[]), sync()])
                .ready(2),
            Script::new("an empty query destroys it")
                .send(&[alone("SELECT 1"), sync()])
                .ready(1)
                .queries(&[""])
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("a failing query destroys it")
                .send(&[alone("SELECT 1"), sync()])
                .ready(1)
                .queries(&["SELEC"])
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("a bad parse destroys it")
                .send(&[alone("SELECT 1"), sync()])
                .ready(1)
                .send(&[alone("SELEC"), sync()])
                .ready(1)
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("a parse behind an error does not")
                .send(&[alone("SELECT 1"), sync()])
                .ready(1)
                .send(&[named("nowhere", &[]), alone("SELECT 2"), sync()])
                .ready(1)
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("closed")
                .send(&[alone("SELECT 1"), sync()])
                .ready(1)
                .send(&[close_statement(""), sync()])
                .ready(1)
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("none yet").send(&[named("", &[]), sync()]).ready(1),
            Script::new("none yet, described").send(&[describe_statement(""), sync()]).ready(1),
            Script::new("beside a named one")
                .send(&[parse("s1", "SELECT 'named'", &[]), alone("SELECT 'unnamed'"), sync()])
                .ready(1)
                .send(&[named("s1", &[]), named("", &[]), sync()])
                .ready(1)
                .send(&[named("", &[]), named("s1", &[]), sync()])
                .ready(1),
            Script::new("a portal outlives it in the batch")
                .send(&[
                    alone("SELECT 'one'"),
                    bind("p", "", &[]),
                    alone("SELECT 'two'"),
                    execute("p", 0),
                    named("", &[]),
                    sync(),
                ])
                .ready(1),
            // Others' texts that are run as the server's unnamed statement, and skipped. A failed transaction takes no Parse.
            Script::new("behind what was skipped, in a failed transaction")
                .send(&[unnamed("BEGIN", &[]), sync()])
                .ready(1)
                .send(&[execute("", 0), parse("s1", "SELECT 'skipped'", &[]), sync()])
                .ready(1)
                .send(&[describe_statement(""), parse("s1", "ROLLBACK TO s", &[]), sync()])
                .ready(1)
                .queries(&["ROLLBACK"]),
            Script::new("behind a statement that was bound and skipped, in a failed transaction")
                .send(&[parse("s1", "SELECT 'named'", &[]), sync()])
                .ready(1)
                .queries(&["BEGIN"])
                .send(&[alone("SAVEPOINT a"), sync()])
                .ready(1)
                .send(&[alone("SAVEPOINT b"), named("nowhere", &[]), named("s1", &[]), sync()])
                .ready(1)
                .send(&[describe_statement(""), close_statement(""), describe_statement(""), sync()])
                .ready(1)
                .queries(&["ROLLBACK"]),
            Script::new("behind two batches that failed at once")
                .send(&[
                    parse("s1", "SELECT 'named'", &[]),
                    parse("s2", "SELECT 'other'", &[]),
                    alone("ROLLBACK"),
                    sync(),
                ])
                .ready(1)
                .send(&[
                    named("nowhere", &[]),
                    named("s1", &[]),
                    sync(),
                    named("nowhere", &[]),
                    named("s2", &[]),
                    sync(),
                ])
                .ready(2)
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("none, behind a parse that cannot be read")
                .send(&[message(b'P', b"\0SELECT '\xff'\0\0\0"), sync(), named("", &[Some(b"1")]), sync()])
                .ready(2),
            Script::new("none, behind a query that cannot be read")
                .send(&[message(b'Q', b"SELECT '\xff'\0"), named("", &[Some(b"1")]), sync()])
                .ready(2),
            Script::new("over transactions")
                .queries(&["BEGIN"])
                .send(&[alone("SELECT 1"), sync(), named("", &[]), sync()])
                .ready(2)
                .send(&[unnamed("COMMIT", &[]), sync()])
                .ready(1)
                .send(&[named("", &[]), sync()])
                .ready(1),
        ])
        .await;
}

#[tokio::test]
async fn two_clients_use_the_same_name_for_different_texts() {
    for pool in ["1", "3"] {
        let site = Site::start(&[("default_pool_size", pool)]);
        let (mut left, mut right) = (site.client().await, site.client().await);
        let mut other = site.client().await;
        prepare(&mut left, "s1", "SELECT 'left', $1::text").await;
        prepare(&mut right, "s1", "SELECT 'right', $1::text").await;
        for n in 0..30_u32 {
            let tag = n.to_string();
            for (client, who) in [(&mut left, "left"), (&mut right, "right")] {
                if pool == "3" {
                    assert_eq!(other.query("ROLLBACK").await.unwrap().status, b'I');
                    hold(&mut other).await;
                }
                let outcome = run(client, &[named("s1", &[Some(tag.as_bytes())]), sync()]).await;
                let want = [Some(who.to_owned()), Some(tag.clone())];
                assert_eq!((outcome.rows, outcome.error), (vec![want.to_vec()], None), "pool of {pool}");
            }
        }
    }
}

#[tokio::test]
async fn statements_of_a_client_that_left_are_not_anothers() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut first = site.client().await;
    prepare(&mut first, "s1", "SELECT 'first'").await;
    first.terminate().await.unwrap();
    let mut second = site.client().await;
    let unknown = run(&mut second, &[named("s1", &[]), sync()]).await;
    assert_eq!(unknown.sqlstate(), "26000");
    assert_eq!(unknown.error.unwrap().message(), "prepared statement \"s1\" does not exist");
    prepare(&mut second, "s1", "SELECT 'second'").await;
    assert_value(&run(&mut second, &[named("s1", &[]), sync()]).await, "second");
}

#[tokio::test]
async fn the_same_text_of_many_clients_is_one_statement_on_the_server() {
    const CLIENTS: u32 = 20;
    let site = Site::start(&[("default_pool_size", "1"), ("prepared_statements", "rewrite")]);
    let mut clients = Vec::new();
    for n in 0..CLIENTS {
        let mut client = site.client().await;
        let name = format!("own{n}");
        prepare(&mut client, &name, "SELECT $1::int, 'shared'").await;
        let outcome = run(&mut client, &[named(&name, &[Some(b"7")]), sync()]).await;
        assert_eq!(outcome.rows.len(), 1, "{outcome:?}");
        clients.push(client);
    }
    let sql = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%''shared''%' AND name <> ''";
    let mut probe = site.client().await;
    assert_value(&probe.query(sql).await.unwrap(), "1");
    // One Parse reached the server; the others were answered by the pooler.
    let counted = || {
        site.metric("pgweir_parses_total", &["by=\"pooler\""]) + site.metric("pgweir_parses_total", &["by=\"server\""])
    };
    pgweir_harness::wait_until(crate::support::SOON, || counted() >= f64::from(CLIENTS));
    assert!(site.metric("pgweir_parses_total", &["by=\"pooler\""]) >= f64::from(CLIENTS - 1));
}

#[tokio::test]
async fn equal_texts_under_different_settings_are_different_statements() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut owner = site.place.direct().await;
    let setup =
        "CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE a.t AS SELECT 'a' AS v; CREATE TABLE b.t AS SELECT 'b' AS v";
    assert_eq!(owner.query(setup).await.unwrap().error, None);
    let mut in_a = site.client_with(&[("search_path", "a"), ("TimeZone", "UTC")]).await;
    let mut in_b = site.client_with(&[("search_path", "b"), ("TimeZone", "Asia/Tokyo")]).await;
    for client in [&mut in_a, &mut in_b] {
        prepare(client, "s1", "SELECT v, timestamptz '2024-01-01 00:00' = timestamptz '2024-01-01 00:00+00' FROM t")
            .await;
    }
    for _ in 0..5 {
        for (client, schema, utc) in [(&mut in_a, "a", "t"), (&mut in_b, "b", "f")] {
            let outcome = run(client, &[named("s1", &[]), sync()]).await;
            assert_eq!(outcome.rows, [[Some(schema.to_owned()), Some(utc.to_owned())]], "{outcome:?}");
        }
    }
}

#[tokio::test]
async fn statements_survive_every_change_of_the_server_connection() {
    let site = Site::start(&[("default_pool_size", "3")]);
    let mut client = site.client().await;
    let (mut one, mut two) = (site.client().await, site.client().await);
    for n in 0..10_u32 {
        prepare(&mut client, &format!("s{n}"), &format!("SELECT {n}, pg_backend_pid(), $1::text")).await;
    }
    let mut pids = std::collections::BTreeSet::new();
    for round in 0..9_u32 {
        let holder = if round % 2 == 0 { &mut one } else { &mut two };
        hold(holder).await;
        let other = if round % 2 == 0 { &mut two } else { &mut one };
        assert_eq!(other.query("ROLLBACK").await.unwrap().status, b'I');
        for n in 0..10_u32 {
            let outcome = run(&mut client, &[named(&format!("s{n}"), &[Some(b"x")]), sync()]).await;
            let row = outcome.rows.first().unwrap_or_else(|| panic!("{outcome:?}"));
            assert_eq!(row[0].as_deref(), Some(n.to_string().as_str()));
            pids.insert(row[1].clone());
        }
    }
    assert!(pids.len() >= 2, "the client never met another server connection: {pids:?}");
    // And when all that it ever met are gone.
    for holder in [&mut one, &mut two] {
        assert_eq!(holder.query("ROLLBACK").await.unwrap().status, b'I');
    }
    for pid in site.place.server_pids() {
        site.place.psql(&format!("SELECT pg_terminate_backend({pid}, 10000)"));
    }
    assert_value(&run(&mut client, &[named("s4", &[Some(b"x")]), sync()]).await, "4");
}

#[tokio::test]
async fn an_answer_the_pooler_gives_itself_waits_its_turn_behind_the_servers() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut first = site.client().await;
    prepare(&mut first, "known", "SELECT 'known'").await;
    let mut client = site.client().await;
    // The text of the second Parse is known by now, and may be answered locally.
    let messages = [
        unnamed("SELECT 'slow', pg_sleep(0.2)", &[]),
        parse("s1", "SELECT 'known'", &[]),
        close_statement("s1"),
        unnamed("SELECT 1/0", &[]),
        parse("s2", "SELECT 'known'", &[]),
        sync(),
    ];
    client.send(&messages.concat()).await.unwrap();
    let messages: Vec<Message> = client.recv_until_ready().await.unwrap();
    let tags: String = messages.iter().map(|message| char::from(message.tag)).collect();
    assert_eq!(tags, "12TDC131EZ", "{messages:?}");
    // What stood behind the error was not done.
    assert_eq!(run(&mut client, &[named("s2", &[]), sync()]).await.sqlstate(), "26000");
}

#[tokio::test]
async fn what_another_left_unnamed_is_not_run_behind_what_the_server_cannot_read() {
    for mode in ["strip", "adaptive", "rewrite"] {
        let site = Site::start(&[("default_pool_size", "1"), ("prepared_statements", mode)]);
        for unreadable in
            [[message(b'P', b"\0SELECT '\xff'\0\0\0"), sync()].concat(), message(b'Q', b"SELECT '\xff'\0")]
        {
            let (mut other, mut client) = (site.client().await, site.client().await);
            assert_value(&run(&mut other, &[unnamed("SELECT 'a stranger'", &[]), sync()]).await, "a stranger");
            client.send(&unreadable).await.unwrap();
            // It is refused before the server looks at what it has.
            assert_eq!(client.outcome().await.unwrap().sqlstate(), "22021", "{mode}");
            let told = run(&mut client, &[named("", &[]), sync()]).await;
            assert_eq!((told.sqlstate(), told.rows.len()), ("26000", 0), "{mode}: {told:?}");
        }
    }
}

#[tokio::test]
async fn what_drops_statements_unread_or_later_costs_no_other_client_its_own() {
    let site = Site::start(&[("default_pool_size", "1"), ("prepared_statements", "rewrite")]);
    let kept = "SELECT 'kept'";
    let padding = "x".repeat(300_000);
    let dropper = || [parse("d", "DEALLOCATE ALL", &[]), bind("p", "d", &[])].concat();
    let between = || parse("t", kept, &[]);
    for (name, batches) in [
        ("too long to be read", vec![query(&format!("DEALLOCATE ALL /* {padding} */"))]),
        ("the same, of everything", vec![query(&format!("DISCARD ALL /* {padding} */"))]),
        (
            "bound before it is parsed",
            vec![[parse("d", "DEALLOCATE ALL", &[]), bind("", "d", &[]), between(), execute("", 0), sync()].concat()],
        ),
        ("bound to a portal with a name", vec![[dropper(), between(), execute("p", 0), sync()].concat()]),
        (
            "in another batch",
            vec![
                query("BEGIN"),
                [dropper(), sync()].concat(),
                [between(), sync()].concat(),
                [execute("p", 0), sync()].concat(),
                query("COMMIT"),
            ],
        ),
    ] {
        let (mut first, mut other) = (site.client().await, site.client().await);
        prepare(&mut first, "s", kept).await;
        for batch in batches {
            first.send(&batch).await.unwrap();
            assert_eq!(first.outcome().await.unwrap().error, None, "{name}");
        }
        // In a transaction nothing is healed.
        assert_eq!(other.query("BEGIN").await.unwrap().status, b'T');
        prepare(&mut other, "u", kept).await;
        assert_value(&run(&mut other, &[named("u", &[]), sync()]).await, "kept");
    }
}

#[tokio::test]
async fn a_client_may_hold_no_more_statements_than_the_limit() {
    let site = Site::start(&[("default_pool_size", "1"), ("max_client_statements", "5")]);
    let mut client = site.client().await;
    for n in 0..5 {
        prepare(&mut client, &format!("s{n}"), &format!("SELECT {n}")).await;
    }
    let refused = run(&mut client, &[parse("s5", "SELECT 5", &[]), sync()]).await;
    assert_eq!((refused.sqlstate(), refused.status), ("53200", b'I'), "{refused:?}");
    assert!(format!("{refused:?}").contains("max_client_statements"), "{refused:?}");
    for n in 0..5 {
        assert_value(&run(&mut client, &[named(&format!("s{n}"), &[]), sync()]).await, &n.to_string());
    }
    // One closed makes room for another.
    assert_eq!(run(&mut client, &[close_statement("s0"), parse("s5", "SELECT 5", &[]), sync()]).await.error, None);
    assert_value(&run(&mut client, &[named("s5", &[]), sync()]).await, "5");
    // One too long to be kept would have to be passed on: its client is ended.
    let long = format!("SELECT length('{}')", "x".repeat(300_000));
    client.send(&[parse("s6", &long, &[]), sync()].concat()).await.unwrap();
    assert_eq!(read_to_end(&mut client).await.sqlstate(), "08P01");
}

#[tokio::test]
async fn a_thousand_texts_of_a_hundred_clients_are_never_mixed_up() {
    const CLIENTS: usize = 100;
    let site = Site::start(&[("default_pool_size", "3")]);
    let watch = site.place.cap_watch(3);
    let mut tasks = Vec::new();
    for who in 0..CLIENTS {
        let mut client = site.client().await;
        tasks.push(tokio::spawn(async move {
            for n in 0..10 {
                prepare(&mut client, &format!("s{n}"), &format!("SELECT '{who}.{n}', $1::int4")).await;
            }
            for round in 0..20 {
                let n = (round * 7 + who) % 10;
                let value = round.to_string();
                let outcome = run(&mut client, &[named(&format!("s{n}"), &[Some(value.as_bytes())]), sync()]).await;
                let want = vec![vec![Some(format!("{who}.{n}")), Some(value)]];
                assert_eq!((outcome.rows, outcome.error), (want, None));
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert!(watch.finish() >= 2);
}

//! Tables and types that somebody else alters between the preparation of a statement and its execution.

use pgweir_harness::wire::build::{
    bind_formats, close_statement, describe_portal, describe_statement, execute, parse, sync,
};
use pgweir_harness::wire::{Message, Wire};

use super::modes::MODES;
use super::{hold, prepare, run};
use crate::support::{Site, assert_value};

/// What is done to the table, and whether what was told of it holds still.
const CHANGES: [(&str, bool); 6] = [
    ("ALTER TABLE t ALTER a TYPE bigint", false),
    ("ALTER TABLE t ADD c text DEFAULT 'c'", false),
    ("ALTER TABLE t DROP b", false),
    ("ALTER TABLE t RENAME b TO d", false),
    ("DROP TABLE t; CREATE TABLE t AS SELECT 7 AS a, 'b'::text AS b", true),
    ("CREATE INDEX ON t (a)", true),
];

const MAKE: &str = "DROP TABLE IF EXISTS t; CREATE TABLE t AS SELECT 7 AS a, 'b'::text AS b";

/// Body of the answer's message with this tag, if there is one.
pub(super) fn body(messages: &[Message], tag: u8) -> Option<&[u8]> {
    messages.iter().find(|message| message.tag == tag).map(|message| &*message.body)
}

pub(super) async fn exchange(client: &mut Wire, messages: &[Vec<u8>]) -> Vec<Message> {
    client.send(&messages.concat()).await.unwrap();
    client.recv_until_ready().await.unwrap()
}

/// The first column of the first row, as what it was told to be: the type's id is in the description.
fn first(description: &[u8], row: &[u8], binary: bool) -> i64 {
    let name = description[2..].iter().position(|byte| *byte == 0).unwrap() + 3;
    let kind = u32::from_be_bytes(description[name + 6..name + 10].try_into().unwrap());
    let length = usize::try_from(i32::from_be_bytes(row[2..6].try_into().unwrap())).unwrap();
    let value = &row[6..6 + length];
    match (binary, kind) {
        (false, _) => std::str::from_utf8(value).unwrap().parse().unwrap(),
        (true, 23) => i32::from_be_bytes(value.try_into().expect("an int4, as told")).into(),
        (true, 20) => i64::from_be_bytes(value.try_into().expect("an int8, as told")),
        (true, other) => panic!("type {other}"),
    }
}

#[tokio::test]
async fn rows_are_never_other_than_the_client_was_told() {
    for mode in MODES {
        for pool in ["1", "3"] {
            let site = Site::start(&[mode, &[("default_pool_size", pool)]].concat());
            let moves = moves(mode, pool);
            for (change, holds) in CHANGES {
                for binary in [false, true] {
                    for before in [1, 4] {
                        site.place.psql(&format!("SET ROLE {}; {MAKE}", site.name()));
                        let what = format!("{mode:?}, pool of {pool}, {change}, binary: {binary}, {before} before");
                        alter(&site, moves, (change, holds), binary, before, &what).await;
                    }
                }
            }
        }
    }
}

/// Whether a client may get another server connection than before.
fn moves(mode: &[(&str, &str)], pool: &str) -> bool {
    pool != "1" && !mode.iter().any(|(_, value)| value.contains("session"))
}

/// In the second of three rounds the client gets another server connection, if there may be one: `third` holds the one that is there.
async fn hold_in_second(round: usize, moves: bool, third: &mut Wire) -> bool {
    let is_holding = round == 1 && moves;
    if is_holding {
        hold(third).await;
    }
    is_holding
}

/// The client had another one.
async fn let_go(site: &Site<'_>, third: &mut Wire, what: &str) {
    assert!(site.place.servers() > 1, "{what}");
    assert_eq!(third.query("ROLLBACK").await.unwrap().status, b'I');
}

async fn alter(site: &Site<'_>, moves: bool, (change, holds): (&str, bool), binary: bool, before: usize, what: &str) {
    let (mut client, mut second, mut third) = (site.client().await, site.client().await, site.client().await);
    let format: &[i16] = if binary { &[1] } else { &[] };
    let execution = || [bind_formats("", "s1", &[], &[], format), execute("", 0), sync()];
    let prepared = || [parse("s1", "SELECT * FROM t", &[]), describe_statement("s1"), sync()];
    let told = exchange(&mut client, &prepared()).await;
    let description = body(&told, b'T').expect(what).to_vec();
    for _ in 0..before {
        let answer = exchange(&mut client, &execution()).await;
        assert_eq!(first(&description, body(&answer, b'D').expect(what), binary), 7, "{what}");
    }
    site.place.psql(&format!("SET ROLE {}; {change}", site.name()));
    // Another client has the new table's statement prepared, on whichever server connection it gets.
    if !what.contains("session") {
        let told = exchange(&mut second, &prepared()).await;
        let description = body(&told, b'T').unwrap_or_else(|| panic!("{what}: {told:?}")).to_vec();
        let answer = exchange(&mut second, &execution()).await;
        if let Some(row) = body(&answer, b'D') {
            assert_eq!(first(&description, row, binary), 7, "{what}");
        } else {
            assert_eq!(code(&answer), "0A000", "{what}: {answer:?}");
        }
    }
    for round in 0..3 {
        let is_holding = hold_in_second(round, moves, &mut third).await;
        let answer = exchange(&mut client, &execution()).await;
        if let Some(row) = body(&answer, b'D') {
            assert_eq!(first(&description, row, binary), 7, "{what}, round {round}");
        } else {
            assert_eq!((code(&answer), holds && round > 0), ("0A000", false), "{what}, round {round}: {answer:?}");
            let error = String::from_utf8_lossy(body(&answer, b'E').unwrap()).into_owned();
            assert!(error.contains("RRevalidateCachedQuery"), "{what}: {error}");
        }
        if !holds {
            assert_eq!(body(&answer, b'D').map(<[u8]>::len), None, "{what}: it was told otherwise");
        }
        if is_holding {
            let_go(site, &mut third, what).await;
        }
    }
    // One attempt more, as drivers make it: it is a new statement.
    let again = exchange(&mut client, &[&[close_statement("s1")][..], &prepared()].concat()).await;
    let description = body(&again, b'T').expect(what).to_vec();
    for round in 0..3 {
        let answer = exchange(&mut client, &execution()).await;
        let row = body(&answer, b'D').unwrap_or_else(|| panic!("{what}, prepared anew, round {round}: {answer:?}"));
        assert_eq!(first(&description, row, binary), 7, "{what}, prepared anew, round {round}");
    }
    for client in [client, second, third] {
        client.terminate().await.unwrap();
    }
}

/// Drivers encode parameters as they were told that these are, by the first description of the statement, and are told of the
/// rows at each execution: pgx and libpq do.
#[tokio::test]
async fn parameters_are_never_read_as_other_than_the_client_was_told() {
    for mode in MODES {
        for pool in ["1", "3"] {
            let site = Site::start(&[mode, &[("default_pool_size", pool)]].concat());
            for (text, returns) in
                [("INSERT INTO n (a) VALUES ($1)", false), ("INSERT INTO n (a) VALUES ($1) RETURNING 'x'::text", true)]
            {
                for (before, after) in [("bigint", "double precision"), ("int", "bigint"), ("bigint", "text")] {
                    for executions in [0, 1, 4] {
                        let name = site.name();
                        let make = format!("SET ROLE {name}; DROP TABLE IF EXISTS n; CREATE TABLE n (a {before})");
                        site.place.psql(&make);
                        let what =
                            format!("{mode:?}, pool of {pool}, {text}, {before} to {after}, {executions} before");
                        insert(&site, moves(mode, pool), (text, returns), (before, after), executions, &what).await;
                    }
                }
            }
        }
    }
}

async fn insert(
    site: &Site<'_>,
    moves: bool,
    (text, returns): (&str, bool),
    (old, new): (&str, &str),
    before: usize,
    what: &str,
) {
    let (mut client, mut third) = (site.client().await, site.client().await);
    let seven: &[u8] = if old == "int" { &[0, 0, 0, 7] } else { &[0, 0, 0, 0, 0, 0, 0, 7] };
    let execution = || {
        let bind = bind_formats("", "s1", &[1], &[Some(seven)], &[]);
        [bind, describe_portal(""), execute("", 0), sync()]
    };
    let prepared = [parse("s1", text, &[]), describe_statement("s1"), sync()];
    let told = exchange(&mut client, &prepared).await;
    assert_eq!(body(&told, b'T').is_some(), returns, "{what}");
    for _ in 0..before {
        assert_eq!(code(&exchange(&mut client, &execution()).await), "", "{what}");
    }
    site.place.psql(&format!("SET ROLE {}; ALTER TABLE n ALTER a TYPE {new}", site.name()));
    for round in 0..3 {
        let is_holding = hold_in_second(round, moves, &mut third).await;
        // As on a session of Postgres, which keeps the types and casts.
        let answer = exchange(&mut client, &execution()).await;
        assert_eq!(code(&answer), "", "{what}, round {round}: {answer:?}");
        if is_holding {
            let_go(site, &mut third, what).await;
        }
    }
    let stored = site.place.psql("SELECT string_agg(DISTINCT a::text, ' '), count(*) FROM n");
    assert_eq!(stored.trim(), format!("7|{}", before + 3), "{what}");
    for client in [client, third] {
        client.terminate().await.unwrap();
    }
}

pub(super) fn code(messages: &[Message]) -> &str {
    let Some(error) = body(messages, b'E') else { return "" };
    let field = error.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"C"));
    std::str::from_utf8(field.unwrap()).unwrap()
}

#[tokio::test]
async fn a_client_that_was_told_nothing_does_not_notice_what_pooling_has_broken() {
    for mode in ["rewrite", "adaptive", "strip"] {
        let site = Site::start(&[("default_pool_size", "2"), ("prepared_statements", mode)]);
        site.place.psql(&format!("SET ROLE {}; {MAKE}", site.name()));
        let wipe = "CREATE FUNCTION wipe() RETURNS void LANGUAGE plpgsql AS 'BEGIN DEALLOCATE ALL; END'";
        site.place.psql(wipe);
        let (mut client, mut other) = (site.client().await, site.client().await);
        prepare(&mut client, "s1", "SELECT * FROM t WHERE a = 7").await;
        prepare(&mut client, "s2", "UPDATE t SET a = a + 1").await;
        let execution = |name| [bind_formats("", name, &[], &[], &[]), execute("", 0), sync()];
        for _ in 0..5 {
            assert_value(&run(&mut client, &execution("s1")).await, "7");
        }
        // The server forgets all, and nothing tells of it.
        assert_eq!(other.query("SELECT wipe()").await.unwrap().error, None);
        assert_value(&run(&mut client, &execution("s1")).await, "7");
        site.place.psql("ALTER TABLE t ALTER a TYPE bigint");
        assert_value(&run(&mut client, &execution("s1")).await, "7");
        // What writes is done once.
        for n in 8..15 {
            assert_eq!(other.query("SELECT wipe()").await.unwrap().error, None);
            assert_eq!(run(&mut client, &execution("s2")).await.error, None, "{mode}");
            assert_eq!(site.place.psql("SELECT a FROM t").trim(), n.to_string(), "{mode}");
        }
        // In a transaction of the client's own the error is its own, too; behind it all is well.
        for _ in 0..5 {
            assert_eq!(run(&mut client, &execution("s2")).await.error, None);
        }
        assert_eq!(client.query("BEGIN").await.unwrap().error, None);
        assert_eq!(run(&mut client, &execution("s2")).await.error, None);
        assert_eq!(client.query("SELECT wipe()").await.unwrap().error, None);
        let failed = run(&mut client, &execution("s2")).await;
        assert!(matches!(failed.sqlstate(), "" | "26000"), "{mode}: {failed:?}");
        assert_eq!(client.query("ROLLBACK").await.unwrap().status, b'I');
        assert_eq!(run(&mut client, &execution("s2")).await.error, None);
    }
}

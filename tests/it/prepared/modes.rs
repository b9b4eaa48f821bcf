//! The modes of `prepared_statements`: what servers keep, and that it is all the same to clients.

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{bind, close_statement, describe_statement, execute, parse, query, sync};
use pgweir_harness::{SUPERUSER, SUPERUSER_PASSWORD};

use super::{hold, prepare, run};
use crate::support::{Site, assert_value};
use crate::transcript::{Comparison, Script, named, unnamed};

/// Every mode, with settings that make it meet its limits.
pub(super) const MODES: [&[(&str, &str)]; 5] = [
    &[("prepared_statements", "rewrite")],
    &[("prepared_statements", "rewrite"), ("max_prepared_statements", "2")],
    &[("prepared_statements", "strip")],
    &[("prepared_statements", "adaptive")],
    &[("prepared_statements", "session")],
];

#[tokio::test]
async fn every_mode_answers_as_postgres_does() {
    let one = |n: &'static [u8]| named("s1", &[Some(n)]);
    let too_few = || named("s1", &[]);
    for mode in MODES {
        // Those that keep their server connection would wait for each other.
        let session = mode[0].1.contains("session");
        let comparison = Comparison::start_with("CREATE TABLE t (id int, v text)", mode).await;
        let scripts = [
            Script::new("over several batches")
                .send(&[parse("s1", "SELECT $1::int + 1", &[]), describe_statement("s1"), sync()])
                .ready(1)
                .send(&[one(b"1"), sync()])
                .ready(1)
                .send(&[one(b"2"), one(b"3"), sync()])
                .ready(1)
                .send(&[one(b"4"), sync(), one(b"5"), sync(), one(b"6"), sync()])
                .ready(3),
            Script::new("several at once")
                .send(&[
                    parse("s1", "SELECT $1::int", &[]),
                    parse("s2", "SELECT $1::text", &[]),
                    parse("s3", "SELECT 3, $1::text", &[]),
                    sync(),
                ])
                .ready(1)
                .send(&[one(b"1"), named("s2", &[Some(b"a")]), named("s3", &[Some(b"b")]), one(b"2"), sync()])
                .ready(1)
                .send(&[named("s3", &[Some(b"a")]), sync(), one(b"3"), sync(), named("s2", &[Some(b"b")]), sync()])
                .ready(3),
            Script::new("beside the unnamed one")
                .send(&[parse("", "SELECT 'unnamed'", &[]), parse("s1", "SELECT $1::int", &[]), sync()])
                .ready(1)
                .send(&[one(b"1"), named("", &[]), one(b"2"), sync()])
                .ready(1)
                .send(&[named("", &[]), sync()])
                .ready(1),
            Script::new("no unnamed one behind it")
                .send(&[parse("s1", "SELECT $1::int", &[]), one(b"1"), sync(), named("", &[]), sync()])
                .ready(2),
            Script::new("errors bear the name")
                .send(&[parse("s1", "SELECT $1::int", &[]), sync()])
                .ready(1)
                .send(&[too_few(), sync(), too_few(), sync(), one(b"x"), sync()])
                .ready(3),
            Script::new("behind an error")
                .send(&[parse("s1", "SELECT $1::int", &[]), sync()])
                .ready(1)
                .send(&[unnamed("SELECT 1/0", &[]), one(b"1"), parse("s2", "SELECT 2", &[]), sync()])
                .send(&[one(b"2"), sync(), named("s2", &[]), sync()])
                .ready(3),
            Script::new("taken, closed, taken again")
                .send(&[parse("s1", "SELECT $1::int", &[]), sync(), parse("s1", "SELECT 2", &[]), sync()])
                .ready(2)
                .send(&[one(b"1"), close_statement("s1"), parse("s1", "SELECT $1::text", &[]), one(b"a"), sync()])
                .ready(1)
                .send(&[one(b"b"), sync(), close_statement("s1"), sync(), one(b"c"), sync()])
                .ready(3),
            Script::new("a text that is wrong")
                .send(&[parse("s1", "SELEC", &[]), sync(), parse("s1", "SELECT nothing FROM nowhere", &[]), sync()])
                .ready(2)
                .send(&[parse("s1", "SELECT $1::int", &[]), one(b"1"), sync()])
                .ready(1),
            Script::new("in a transaction")
                .queries(&["BEGIN"])
                .send(&[
                    parse("s1", "INSERT INTO t VALUES ($1, 'x') RETURNING id", &[]),
                    describe_statement("s1"),
                    sync(),
                ])
                .ready(1)
                .send(&[one(b"1"), one(b"2"), sync()])
                .ready(1)
                .queries(&["ROLLBACK"])
                .send(&[one(b"3"), sync()])
                .ready(1)
                .queries(&["DELETE FROM t"]),
            Script::new("DEALLOCATE of a name of the protocol")
                .send(&[parse("s1", "SELECT $1::int", &[]), one(b"1"), sync()])
                .ready(1)
                .queries(&["DEALLOCATE s1"])
                .send(&[one(b"2"), sync(), parse("s1", "SELECT $1::text", &[]), one(b"a"), sync()])
                .ready(2)
                .send(&[
                    query("BEGIN"),
                    query("deallocate prepare \"s1\"; "),
                    query("DEALLOCATE s1"),
                    query("ROLLBACK"),
                ])
                .ready(4)
                .send(&[one(b"2"), sync()])
                .ready(1),
            Script::new("DEALLOCATE in a failed transaction")
                .send(&[parse("s1", "SELECT $1::int", &[]), one(b"1"), sync()])
                .ready(1)
                .queries(&["BEGIN", "SELECT 1/0", "DEALLOCATE s1", "DEALLOCATE ALL", "DISCARD ALL", "ROLLBACK"])
                .send(&[one(b"2"), sync()])
                .ready(1)
                .queries(&["BEGIN", "DISCARD ALL", "ROLLBACK"])
                .send(&[one(b"3"), sync()])
                .ready(1)
                .queries(&["DEALLOCATE ALL"])
                .send(&[one(b"4"), sync()])
                .ready(1),
            Script::new("DEALLOCATE by the extended protocol, in strings and in pipelines")
                .send(&[parse("s1", "SELECT $1::int", &[]), parse("s2", "SELECT 2", &[]), one(b"1"), sync()])
                .ready(1)
                .send(&[unnamed("DEALLOCATE s1", &[]), named("s2", &[]), one(b"2"), sync()])
                .send(&[one(b"3"), sync(), parse("s1", "SELECT $1::text", &[]), one(b"a"), sync()])
                .ready(3)
                .send(&[
                    unnamed("SELECT 1/0", &[]),
                    unnamed("DEALLOCATE s1", &[]),
                    unnamed("DEALLOCATE ALL", &[]),
                    sync(),
                ])
                .send(&[one(b"b"), named("s2", &[]), sync()])
                .ready(2)
                .queries(&["DEALLOCATE s2; SELECT 1/0; DEALLOCATE s1", "DEALLOCATE s2"])
                .send(&[one(b"c"), named("s2", &[]), sync()])
                .ready(1)
                .send(&[query("DEALLOCATE ALL; SELECT 1/0"), one(b"d"), sync()])
                .ready(2)
                .send(&[parse("s1", "SELECT $1::int", &[]), one(b"1"), sync()])
                .send(&[unnamed("DEALLOCATE ALL", &[]), parse("s1", "SELECT $1::text", &[]), one(b"e"), sync()])
                .send(&[one(b"f"), sync(), unnamed("DISCARD ALL", &[]), one(b"g"), sync()])
                .ready(4),
            Script::new("EXECUTE and PREPARE of a name of the protocol")
                .send(&[parse("s1", "SELECT $1::int + 1", &[]), one(b"1"), sync()])
                .ready(1)
                .queries(&["EXECUTE s1 (2)", "EXPLAIN (COSTS OFF) EXECUTE s1 (2)", "EXECUTE s1", "execute \"s1\"('x')"])
                .queries(&[
                    "PREPARE s1 AS SELECT 3",
                    "EXECUTE s1 (3)",
                    "BEGIN",
                    "EXECUTE s1 ('x')",
                    "EXECUTE s1 (4)",
                    "ROLLBACK",
                ])
                .send(&[one(b"5"), sync(), unnamed("PREPARE s1 AS SELECT 4", &[]), sync(), one(b"6"), sync()])
                .ready(3)
                .send(&[query("EXECUTE s1 (7)"), one(b"8"), sync(), query("DEALLOCATE s1"), query("EXECUTE s1 (9)")])
                .ready(4),
            Script::new("a Parse of a name that SQL gave")
                // Which keeps its server connection.
                .alone()
                .queries(&["PREPARE s1 AS SELECT 1"])
                .send(&[
                    parse("s1", "SELECT $1::int", &[]),
                    sync(),
                    parse("s1", "SELEC", &[]),
                    sync(),
                    named("s1", &[]),
                    sync(),
                ])
                .ready(3)
                .queries(&["DEALLOCATE s1"])
                .send(&[parse("s1", "SELECT $1::int", &[]), one(b"1"), sync()])
                .ready(1),
        ];
        let scripts = scripts.into_iter().map(|script| if session { script.alone() } else { script });
        comparison.check(scripts).await;
    }
}

/// Runs the statement, which gives its only parameter back.
async fn echo(client: &mut Wire, name: &str, value: &str) {
    let messages = [bind("", name, &[Some(value.as_bytes())]), execute("", 0), sync()];
    assert_value(&run(client, &messages).await, value);
}

/// Names of the protocol that the server connection has.
async fn kept(client: &mut Wire) -> usize {
    let count = client.query("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''").await.unwrap();
    count.value().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_server_connection_keeps_no_more_statements_than_it_may() {
    let settings = [("default_pool_size", "1"), ("prepared_statements", "rewrite"), ("max_prepared_statements", "5")];
    let site = Site::start(&settings);
    let mut client = site.client().await;
    for n in 0..20 {
        prepare(&mut client, &format!("s{n}"), &format!("SELECT $1::text /* {n} */")).await;
    }
    for round in 0..100_usize {
        let name = |n: usize| format!("s{}", n * 7 % 20);
        echo(&mut client, &name(round), &round.to_string()).await;
        // Three of one batch, of which none may make room for another.
        let three: Vec<Vec<u8>> =
            (0..3).flat_map(|n| [bind("", &name(round + n), &[Some(b"x")]), execute("", 0)]).chain([sync()]).collect();
        assert_eq!(run(&mut client, &three).await.rows.len(), 3);
        assert!(kept(&mut client).await <= 5, "round {round}");
    }
    // More in one batch than may be kept.
    let all: Vec<Vec<u8>> =
        (0..20).flat_map(|n| [bind("", &format!("s{n}"), &[Some(b"x")]), execute("", 0)]).chain([sync()]).collect();
    let outcome = run(&mut client, &all).await;
    assert_eq!((outcome.rows.len(), &outcome.error), (20, &None));
    assert!(kept(&mut client).await <= 5);
}

#[tokio::test]
async fn the_size_of_texts_counts_as_well() {
    let settings = [("default_pool_size", "1"), ("prepared_statements", "rewrite"), ("max_prepared_text", "10KiB")];
    let site = Site::start(&settings);
    let mut client = site.client().await;
    for n in 0..10 {
        prepare(&mut client, &format!("s{n}"), &format!("SELECT $1::text /* {n}{} */", "x".repeat(3000))).await;
        echo(&mut client, &format!("s{n}"), "x").await;
        assert!(kept(&mut client).await <= 3);
    }
    prepare(&mut client, "long", &format!("SELECT $1::text /* {} */", "x".repeat(20_000))).await;
    echo(&mut client, "long", "x").await;
    assert_eq!(kept(&mut client).await, 3, "what does not fit is not kept, and takes nobody's place");
}

#[tokio::test]
async fn what_is_not_run_often_is_never_kept_and_what_is_stays() {
    let settings = [("default_pool_size", "2"), ("max_prepared_statements", "10")];
    let site = Site::start(&settings);
    let (mut client, mut other) = (site.client().await, site.client().await);
    for n in 0..5 {
        let (name, text) = (format!("hot{n}"), format!("SELECT $1::text /* hot {n} */"));
        prepare(&mut client, &name, &text).await;
        for _ in 0..4 {
            echo(&mut client, &name, "x").await;
        }
    }
    assert_eq!(kept(&mut client).await, 5);
    let parses = || site.metric("pgweir_parses_total", &["by=\"server\""]);
    for n in 0..500_usize {
        let name = format!("cold{n}");
        prepare(&mut client, &name, &format!("SELECT $1::text /* {n} */")).await;
        echo(&mut client, &name, "x").await;
        if n % 2 == 0 {
            assert_eq!(run(&mut client, &[close_statement(&name), sync()]).await.error, None);
        }
        echo(&mut client, &format!("hot{}", n % 5), "x").await;
    }
    assert_eq!(kept(&mut client).await, 5, "of the others none was run twice");
    // A server connection that it has never met gets each of them once.
    hold(&mut other).await;
    let mut counted = -1.0;
    pgweir_harness::wait_until(crate::support::SOON, || {
        let before = counted;
        std::thread::sleep(std::time::Duration::from_millis(1100));
        counted = parses();
        (counted - before).abs() < 0.5
    });
    for n in 0..100 {
        echo(&mut client, &format!("hot{}", n % 5), "x").await;
    }
    pgweir_harness::wait_until(crate::support::SOON, || parses() > counted + 4.5);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!((parses() - counted - 5.0).abs() < 0.5, "{} for five statements", parses() - counted);
}

#[tokio::test]
async fn nothing_is_kept_when_statements_are_stripped() {
    let site = Site::start(&[("default_pool_size", "1"), ("prepared_statements", "strip")]);
    let mut client = site.client().await;
    prepare(&mut client, "s1", "SELECT $1::text").await;
    prepare(&mut client, "s2", "SELECT $1::text, 2").await;
    for n in 0..20 {
        echo(&mut client, "s1", &n.to_string()).await;
        echo(&mut client, "s2", &n.to_string()).await;
        assert_eq!(kept(&mut client).await, 0);
    }
}

#[tokio::test]
async fn with_a_server_connection_of_its_own_a_client_has_its_own_names_there() {
    let settings = [("default_pool_size", "2"), ("max_pinned", "1"), ("prepared_statements", "session")];
    let site = Site::start(&settings);
    let (mut client, mut other) = (site.client().await, site.client().await);
    prepare(&mut client, "mine", "SELECT $1::text").await;
    let name = client.query("SELECT name FROM pg_prepared_statements").await.unwrap();
    assert_value(&name, "mine");
    assert_value(&client.query("EXECUTE mine('by SQL')").await.unwrap(), "by SQL");
    // No other may keep one.
    let refused = run(&mut other, &[parse("his", "SELECT 1", &[]), sync()]).await;
    assert_eq!((refused.sqlstate(), refused.status), ("53200", b'I'), "{refused:?}");
    assert!(format!("{refused:?}").contains("max_pinned"), "{refused:?}");
    assert_value(&other.query("SELECT 'goes on'").await.unwrap(), "goes on");
    echo(&mut client, "mine", "still").await;
    client.terminate().await.unwrap();
    let mut freed = None;
    for _ in 0..100 {
        let outcome = run(&mut other, &[parse("his", "SELECT 1", &[]), sync()]).await;
        freed = Some(outcome.sqlstate().to_owned());
        if outcome.error.is_none() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_eq!(freed.as_deref(), Some(""));
    assert_value(&other.query("SELECT name FROM pg_prepared_statements").await.unwrap(), "his");
}

#[tokio::test]
async fn texts_beyond_what_the_process_may_hold_keep_their_clients_server_connection() {
    let settings = [("default_pool_size", "2"), ("max_pinned", "1"), ("max_statement_memory", "64KiB")];
    let site = Site::start(&settings);
    let (mut client, mut other) = (site.client().await, site.client().await);
    let text = |n: usize| format!("SELECT $1::text /* {n}{} */", "x".repeat(1000));
    let pins = || site.metric("pgweir_pins_total", &["reason=\"statements\""]);
    for n in 0..100 {
        prepare(&mut client, &format!("s{n}"), &text(n)).await;
    }
    pgweir_harness::wait_until(crate::support::SOON, || pins() > 0.5);
    // Those from before the limit and those from behind it, over several transactions.
    for n in (0..100).step_by(9) {
        echo(&mut client, &format!("s{n}"), &n.to_string()).await;
    }
    // The one server connection that may be pinned is; a text that is known already needs none.
    let refused = run(&mut other, &[parse("his", "SELECT 1", &[]), sync()]).await;
    assert_eq!((refused.sqlstate(), refused.status), ("53200", b'I'), "{refused:?}");
    assert!(format!("{refused:?}").contains("max_statement_memory"), "{refused:?}");
    assert_value(&other.query("SELECT 'goes on'").await.unwrap(), "goes on");
    // What the client that leaves had named makes room again.
    client.terminate().await.unwrap();
    let mut outcome = run(&mut other, &[parse("his", "SELECT $1::text", &[]), sync()]).await;
    let begun = std::time::Instant::now();
    while outcome.error.is_some() && begun.elapsed() < crate::support::SOON {
        outcome = run(&mut other, &[parse("his", "SELECT $1::text", &[]), sync()]).await;
    }
    assert_eq!(outcome.error, None);
    echo(&mut other, "his", "room").await;
    assert!((pins() - 1.0).abs() < 0.5, "{} pins", pins());
}

/// Of what is not inspected it is not known what it leaves behind: whoever prepares it keeps the server connection.
#[tokio::test]
async fn a_text_longer_than_inspect_max_is_not_shared_and_works_all_the_same() {
    let text = format!("SELECT $1::text /* {} */", "x".repeat(200_000));
    for (inspect_max, shared) in [("256KiB", true), ("64KiB", false)] {
        let site =
            Site::start(&[("default_pool_size", "1"), ("inspect_max", inspect_max), ("query_wait_timeout", "1s")]);
        let (mut client, mut other) = (site.client().await, site.client().await);
        prepare(&mut client, "long", &text).await;
        echo(&mut client, "long", "first").await;
        let outcome = other.query("SELECT 1").await.unwrap();
        assert_eq!(outcome.sqlstate(), if shared { "" } else { "53300" }, "{inspect_max}: {outcome:?}");
        echo(&mut client, "long", "second").await;
        client.terminate().await.unwrap();
        assert_value(&other.query("SELECT 1").await.unwrap(), "1");
    }
}

#[tokio::test]
async fn what_stands_in_for_a_statement_can_be_parsed_anywhere_and_executed_nowhere() {
    let site = Site::start(&[]);
    let mut direct =
        Wire::open(site.place.cluster.addr(), SUPERUSER, &site.place.name, SUPERUSER_PASSWORD).await.unwrap();
    // As it is lent: an empty text with a parameter that is `internal`.
    let lent = [parse("s", "", &[2281]), sync()];
    let arguments = ["", "(1)", "('x')", "(NULL)", "(ROW(1))", "(DEFAULT)", "(NULL::text)", "(1, 2)"];
    for begin in ["SELECT 1", "BEGIN; SELECT 1/0"] {
        direct.query(begin).await.unwrap();
        assert_eq!(run(&mut direct, &lent).await.error, None, "{begin}");
        direct.query("ROLLBACK").await.unwrap();
        for given in arguments {
            let outcome = direct.query(&format!("EXECUTE s{given}")).await.unwrap();
            assert!(outcome.error.is_some(), "EXECUTE s{given}: {outcome:?}");
        }
        assert_eq!(direct.query("DEALLOCATE s").await.unwrap().error, None);
    }
}

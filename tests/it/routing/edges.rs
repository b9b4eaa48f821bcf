//! What comes at the edge of something: of a follower's being one, of a session, of a transaction, of a batch.

use std::time::Duration;

use pgweir_harness::wire::{Outcome, Wire, build, cancel};
use pgweir_harness::{wait_until, wait_until_async};

use super::{Family, at, family};
use crate::stage::{SOON, Stage, fail, run, succeed, value};

/// A read that goes to a follower if one may serve it, by a name of the table's.
async fn number(client: &mut Wire) -> String {
    value(client, "SELECT n FROM counter").await
}

/// Where a lone read is that asks for a follower.
async fn hinted(client: &mut Wire) -> String {
    value(client, "/* pgweir.route=follower */ SELECT current_setting('cluster_name')").await
}

/// Waits until a lone read has gone to a follower. It is proven to read: one that is not is stamped when it ran at home, and
/// nobody would ever be fresh enough for the next.
async fn warm(family: &Family, client: &mut Wire, tag: &str) {
    wait_until_async(SOON, async || {
        assert_eq!(value(client, &format!("SELECT n FROM counter /* {tag} */")).await, "1");
        family.ran(tag).1 > 0
    })
    .await;
}

fn counter(stage: &Stage<'_>) {
    stage.own_sql("CREATE TABLE counter (n int); INSERT INTO counter VALUES (1)");
}

/// Some statement, bound and run.
fn runs(statement: &str) -> Vec<u8> {
    [build::bind("", statement, &[]), build::execute("", 0)].concat()
}

async fn told(client: &mut Wire, bytes: &[u8]) -> Outcome {
    client.send(bytes).await.unwrap();
    client.outcome().await.unwrap()
}

#[test]
fn a_write_that_a_hint_sends_to_a_promoted_follower_is_done_once_at_most() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql(
        "CREATE TABLE charges (id int); CREATE FUNCTION charge() RETURNS int LANGUAGE plpgsql AS \
         'BEGIN INSERT INTO charges VALUES (1); RETURN 1; END'",
    );
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        for _ in 0..4 {
            // So that both have connections of the time before.
            assert_ne!(hinted(&mut client).await, "primary");
        }
        for follower in &family.followers {
            assert_eq!(follower.psql("postgres", "SELECT pg_promote()").unwrap(), "t");
        }
        let outcome = client.query("/* pgweir.route=follower */ SELECT charge()").await.unwrap();
        assert!(matches!(outcome.sqlstate(), "" | "08006"), "{outcome:?}");
        let count = |cluster: &pgweir_harness::Cluster| -> u32 {
            cluster.psql(stage.name(), "SELECT count(*) FROM charges").unwrap().parse().unwrap()
        };
        let done: u32 = [&family.primary, &family.followers[0], &family.followers[1]].into_iter().map(count).sum();
        assert!(if outcome.sqlstate().is_empty() { done == 1 } else { done <= 1 }, "{done}: {outcome:?}");
    });
}

#[test]
fn what_is_committed_as_the_next_transaction_begins_is_seen_by_all() {
    let family = family();
    let stage = family.stage(&[]);
    counter(&stage);
    run(Duration::from_mins(1), async {
        let (mut writer, mut reader) = (stage.client().await, stage.client().await);
        for (round, commit) in ["COMMIT AND CHAIN", "COMMIT; BEGIN"].into_iter().enumerate() {
            family.until_routed(&mut reader).await;
            family.pause();
            let before = number(&mut reader).await;
            assert_eq!(before, (round + 1).to_string());
            succeed(&mut writer, "BEGIN").await;
            succeed(&mut writer, "UPDATE counter SET n = n + 1").await;
            let outcome = succeed(&mut writer, commit).await;
            assert_eq!(char::from(outcome.status), 'T');
            assert_eq!(number(&mut reader).await, (round + 2).to_string(), "{commit}");
            succeed(&mut writer, "ROLLBACK").await;
            family.resume();
        }
    });
}

#[test]
fn what_a_client_that_vanished_has_committed_is_seen_by_all() {
    let family = family();
    let stage = family.stage(&[]);
    counter(&stage);
    // A COMMIT that takes its time.
    stage.own_sql(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1); RETURN NULL; END'; \
         CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON counter DEFERRABLE INITIALLY DEFERRED FOR EACH ROW \
         EXECUTE FUNCTION dawdle()",
    );
    run(Duration::from_mins(1), async {
        let (mut writer, mut reader) = (stage.client().await, stage.client().await);
        family.until_routed(&mut reader).await;
        family.pause();
        assert_eq!(number(&mut reader).await, "1");
        succeed(&mut writer, "BEGIN").await;
        succeed(&mut writer, "UPDATE counter SET n = 2").await;
        writer.send(&build::query("COMMIT /* gone */")).await.unwrap();
        wait_until_async(SOON, async || family.ran("COMMIT /* gone */").0 == 1).await;
        writer.abort().unwrap();
        // Of a transaction under way followers may be read.
        assert_eq!(number(&mut reader).await, "1");
        let name = stage.name();
        let at_work =
            format!("SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}' AND query LIKE 'COMMIT /*%'");
        wait_until(SOON, || {
            stage.sql("SELECT n FROM counter") == "2" && {
                stage.sql(&format!("{at_work} AND state = 'active'")) == "0"
            }
        });
        // The follower's replay is paused: what it does not show now it will not show.
        wait_until_async(Duration::from_secs(5), async || number(&mut reader).await == "2").await;
        family.resume();
    });
}

#[test]
fn a_statement_that_the_server_alone_keeps_is_prepared_at_home() {
    let family = family();
    let stage = family.stage(&[("prepared_statements", "session")]);
    counter(&stage);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        warm(&family, &mut client, "warm one").await;
        let prepare =
            [build::parse("s1", "SELECT n FROM counter", &[]), build::describe_statement("s1"), build::sync()];
        assert_eq!(told(&mut client, &prepare.concat()).await.sqlstate(), "");
        let run = [runs("s1"), build::sync()].concat();
        for _ in 0..3 {
            let outcome = told(&mut client, &run).await;
            assert_eq!((outcome.value(), outcome.sqlstate()), (Some("1"), ""), "{outcome:?}");
        }
        // Drivers prepare in the middle of a transaction.
        let mut other = stage.client().await;
        warm(&family, &mut other, "warm two").await;
        succeed(&mut other, "BEGIN READ ONLY").await;
        assert_eq!(number(&mut other).await, "1");
        assert_eq!(told(&mut other, &prepare.concat()).await.sqlstate(), "");
        succeed(&mut other, "COMMIT").await;
        assert_eq!(told(&mut other, &run).await.value(), Some("1"));
    });
}

#[test]
fn what_comes_behind_a_commit_in_its_batch_runs_at_home_or_is_told() {
    let family = family();
    let stage = family.stage(&[]);
    counter(&stage);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        let end_and_write = [
            build::parse("", "COMMIT", &[]),
            runs(""),
            build::parse("", "UPDATE counter SET n = n + 1", &[]),
            runs(""),
            build::sync(),
        ]
        .concat();
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        let outcome = told(&mut client, &end_and_write).await;
        assert_eq!((outcome.tags.join(" "), outcome.sqlstate()), ("COMMIT UPDATE 1".to_owned(), ""), "{outcome:?}");
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut client).await, "primary");
        let outcome = told(&mut client, &end_and_write).await;
        assert_eq!((outcome.sqlstate(), char::from(outcome.status)), ("0A000", 'I'), "{outcome:?}");
        assert!(outcome.error.unwrap().field(b'D').unwrap().contains("same batch"));
        assert_eq!(number(&mut client).await, "2", "the second did not run");
    });
}

#[test]
fn a_transaction_on_a_follower_that_is_given_up_is_told_once_and_leaves_no_names() {
    let family = family();
    let stage = family.stage(&[]);
    counter(&stage);
    let lock = || [build::parse("", "SELECT pg_advisory_lock(1)", &[]), runs(""), build::sync()].concat();
    let named = || build::parse("s1", "SELECT n FROM counter", &[]);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut client).await, "primary");
        let outcome = told(&mut client, &[named(), build::flush(), lock()].concat()).await;
        assert_eq!((outcome.sqlstate(), char::from(outcome.status)), ("0A000", 'E'), "{outcome:?}");
        succeed(&mut client, "ROLLBACK").await;
        let again = told(&mut client, &[named(), runs("s1"), build::sync()].concat()).await;
        assert_eq!((again.value(), again.sqlstate()), (Some("1"), ""), "{again:?}");
        // What the server skips has no error of its own.
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut client).await, "primary");
        client.send(&[build::parse("", "SELECT nowhere", &[]), build::flush()].concat()).await.unwrap();
        client.recv_until(b'E').await.unwrap();
        let outcome = told(&mut client, &lock()).await;
        assert_eq!((outcome.sqlstate(), char::from(outcome.status)), ("", 'E'), "{outcome:?}");
        fail(&mut client, "SELECT 1", "25P02", b'E').await;
        succeed(&mut client, "ROLLBACK").await;
        assert_eq!(number(&mut client).await, "1");
    });
}

#[test]
fn what_a_batch_used_before_it_closed_or_replaced_it_is_there_when_it_runs_again() {
    let family = family();
    let stage = family.stage(&[]);
    counter(&stage);
    stage.own_sql("CREATE TABLE told (n int); INSERT INTO told VALUES (7)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        // It is refused by a follower, and nobody was told of it.
        let refused = |number: u32| {
            stage.own_sql(&format!("CREATE UNLOGGED TABLE unlogged_{number} (n int)"));
            [build::parse("", &format!("SELECT count(*) FROM unlogged_{number}"), &[]), runs("")].concat()
        };
        let outcome = told(&mut client, &[build::parse("s", "SELECT n FROM told", &[]), build::sync()].concat()).await;
        assert_eq!(outcome.sqlstate(), "");
        family.until_routed(&mut client).await;
        let wish = |text: &str| build::parse("", &format!("/* pgweir.route=follower */ {text}"), &[]);
        let batch = [wish("SELECT 1"), runs("s"), build::close_statement("s"), refused(1), build::sync()].concat();
        let outcome = told(&mut client, &batch).await;
        assert_eq!(outcome.sqlstate(), "", "{outcome:?}");
        // The unnamed statement of before, then another one.
        let outcome = told(&mut client, &[build::parse("", "SELECT n FROM told", &[]), build::sync()].concat()).await;
        assert_eq!(outcome.sqlstate(), "");
        family.until_routed(&mut client).await;
        let outcome = told(&mut client, &[build::parse("", "SELECT n FROM told", &[]), build::sync()].concat()).await;
        assert_eq!(outcome.sqlstate(), "");
        let outcome =
            told(&mut client, &[runs(""), wish("SELECT n FROM counter"), runs(""), refused(2), build::sync()].concat())
                .await;
        assert_eq!((outcome.value(), outcome.sqlstate()), (Some("7"), ""), "{outcome:?}");
    });
}

#[test]
fn a_read_for_which_a_follower_is_being_chosen_is_cancelled_like_one_that_waits() {
    let family = family();
    let stage = family.stage(&[("read_freshness", "fleet"), ("default_pool_size", "1")]);
    counter(&stage);
    run(Duration::from_mins(1), async {
        let (mut holder, mut reader) = (stage.client().await, stage.client().await);
        wait_until_async(SOON, async || hinted(&mut reader).await != "primary").await;
        // No look at the primary comes to its end, and no read to its turn.
        succeed(&mut holder, "BEGIN").await;
        reader.send(&build::query("SELECT n FROM counter")).await.unwrap();
        let (addr, pid, secret) = (stage.addr(), reader.pid, reader.secret.clone());
        // One that comes before the read has been read hits nothing, as with Postgres.
        let cancels = tokio::task::spawn_local(async move {
            loop {
                cancel(addr, pid, &secret).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let told = reader.outcome().await.unwrap();
        cancels.abort();
        assert_eq!((told.sqlstate(), char::from(told.status)), ("57014", 'I'), "{told:?}");
        succeed(&mut holder, "COMMIT").await;
        assert_eq!(number(&mut reader).await, "1");
    });
}

#[test]
fn what_is_sent_ahead_of_a_reset_on_a_follower_is_answered() {
    let family = family();
    let stage = family.stage(&[("read_freshness", "eventual")]);
    run(Duration::from_mins(1), async {
        let (mut client, mut other) = (stage.client().await, stage.client().await);
        for (number, set) in ["RESET statement_timeout", "SET statement_timeout = '1min'"].into_iter().enumerate() {
            family.until_routed(&mut client).await;
            succeed(&mut client, set).await;
            let slow = format!("/* pgweir.route=follower */ SELECT 'one' FROM pg_sleep(1) /* ahead {number} */");
            let both = [build::query(&slow), build::query("SELECT 'two'")].concat();
            client.send(&both).await.unwrap();
            wait_until_async(SOON, async || family.ran(&format!("ahead {number}")) != (0, 0)).await;
            while family.ran(&format!("ahead {number}")).1 == 0 {
                // No follower had a server connection for it in time.
                for _ in 0..2 {
                    client.outcome().await.unwrap();
                }
                let tried = family.ran(&format!("ahead {number}")).0;
                client.send(&both).await.unwrap();
                wait_until_async(SOON, async || family.ran(&format!("ahead {number}")) != (tried, 0)).await;
            }
            // By another catalog what ran has to be judged anew.
            succeed(&mut other, &format!("CREATE TABLE made{number} ()")).await;
            assert_eq!(client.outcome().await.unwrap().value(), Some("one"), "{set}");
            assert_eq!(client.outcome().await.unwrap().value(), Some("two"), "{set}");
        }
    });
}

#[test]
fn a_transaction_that_has_read_with_its_begin_stays_with_that_snapshot() {
    let family = family();
    let stage = family.stage(&[("read_freshness", "eventual")]);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        counter(&stage);
        warm(&family, &mut client, "with its begin").await;
        let named = |name: &str, sql: &str| [build::parse(name, sql, &[]), runs(name)].concat();
        let begin = named("begin", "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY");
        let read = named("read", "SELECT n FROM counter /* told with its begin */");
        let outcome = told(&mut client, &[begin, read, build::sync()].concat()).await;
        assert_eq!((outcome.value(), family.ran("/* told with its begin */").1), (Some("1"), 1), "{outcome:?}");
        fail(&mut client, "SELECT pg_advisory_xact_lock(1)", "0A000", b'E').await;
        succeed(&mut client, "ROLLBACK").await;
        // One that has not moves.
        told(&mut client, &[runs("begin"), build::sync()].concat()).await;
        succeed(&mut client, "SELECT pg_advisory_xact_lock(1)").await;
        assert_eq!(at(&mut client).await, "primary");
        succeed(&mut client, "ROLLBACK").await;
    });
}

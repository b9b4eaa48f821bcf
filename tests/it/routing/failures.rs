//! What goes wrong on followers, and nobody sees.

use std::time::Duration;

use pgweir_harness::wait_until_async;
use pgweir_harness::wire::build;
use tokio::time::sleep;

use super::{at, family};
use crate::stage::{SOON, fail, run, succeed, value};

#[test]
fn what_a_follower_refuses_runs_on_the_primary_once() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql(
        "CREATE TABLE counted (n int); INSERT INTO counted VALUES (0); \
         CREATE FUNCTION count_up() RETURNS int LANGUAGE plpgsql AS \
         'DECLARE m int; BEGIN UPDATE counted SET n = n + 1 RETURNING n INTO m; RETURN m; END'",
    );
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        // 25006: nobody could know that it writes, and it was asked for.
        let count_up = "/* pgweir.route=follower */ SELECT count_up()";
        for number in 1..=3 {
            family.until_routed(&mut client).await;
            assert_eq!(value(&mut client, count_up).await, number.to_string());
            let outcome =
                client.extended("/* pgweir.route=follower */ SELECT count_up() - $1", &[Some("1")]).await.unwrap();
            let want = number.to_string();
            assert_eq!((outcome.value(), outcome.sqlstate()), (Some(&*want), ""), "{outcome:?}");
            assert_eq!(value(&mut client, "UPDATE counted SET n = n - 1 RETURNING n").await, number.to_string());
        }
        // 0A000: an unlogged table that pgweir was not told of.
        stage.own_sql("CREATE UNLOGGED TABLE unlogged (n int); INSERT INTO unlogged VALUES (5)");
        family.until_routed(&mut client).await;
        assert_eq!(value(&mut client, "SELECT n FROM unlogged").await, "5");
        assert_eq!(client.extended("SELECT n FROM unlogged", &[]).await.unwrap().value(), Some("5"));
        let named = build::parse("by_name", "SELECT n FROM unlogged WHERE n > $1", &[23]);
        let run = [build::bind("", "by_name", &[Some(b"1")]), build::execute("", 0), build::sync()].concat();
        client.send(&[named, run.clone()].concat()).await.unwrap();
        assert_eq!(client.outcome().await.unwrap().value(), Some("5"), "the name is given once");
        client.send(&run).await.unwrap();
        assert_eq!(client.outcome().await.unwrap().value(), Some("5"));
        // As the first statement of a transaction, which moves with it; and told in a later one.
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_eq!(value(&mut client, "SELECT n FROM unlogged").await, "5");
        assert_eq!(at(&mut client).await, "primary");
        fail(&mut client, "DELETE FROM counted", "25006", b'E').await;
        succeed(&mut client, "ROLLBACK").await;
        // What the primary refuses as well is told as it says it.
        fail(&mut client, "SELECT n FROM nowhere", "42P01", b'I').await;
        fail(&mut client, "SELECT 1 / (n - n) FROM counted", "22012", b'I').await;
    });
}

#[test]
fn long_texts_and_values_in_a_transaction_on_a_follower_are_looked_at_to_their_end() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql("CREATE TABLE kept (id int)");
    let long = |len: usize| format!("SELECT length('{}')", "x".repeat(len));
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut client).await, "primary");
        assert_eq!(value(&mut client, &long(200_000)).await, "200000", "read whole");
        // A long value, and behind it, at once, what is no part of the transaction.
        let big = "y".repeat(300_000);
        let mut bytes = build::parse("", "SELECT length($1)", &[25]);
        bytes.extend([build::bind("", "", &[Some(big.as_bytes())]), build::execute("", 0), build::sync()].concat());
        bytes.extend([build::query("COMMIT"), build::query("INSERT INTO kept VALUES (1)")].concat());
        client.send(&bytes).await.unwrap();
        assert_eq!(client.outcome().await.unwrap().value(), Some("300000"));
        assert_eq!(client.outcome().await.unwrap().tags, ["COMMIT"]);
        assert_eq!(client.outcome().await.unwrap().tags, ["INSERT 0 1"]);
        assert_eq!(value(&mut client, "SELECT count(*) FROM kept").await, "1");
        // Longer than is ever read: it moves to the primary, if it comes first.
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_eq!(value(&mut client, &long(1_000_000)).await, "1000000");
        assert_eq!(at(&mut client).await, "primary");
        succeed(&mut client, "COMMIT").await;
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut client).await, "primary");
        fail(&mut client, &long(1_000_000), "0A000", b'E').await;
        succeed(&mut client, "ROLLBACK").await;
    });
}

#[test]
fn a_conflict_with_recovery_is_seen_by_nobody() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql("CREATE TABLE kept (id int); INSERT INTO kept SELECT generate_series(1, 1000)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        let asked = "/* pgweir.route=follower */ SELECT count(*) FROM kept, pg_sleep(1.5) /* in the way */";
        client.send(&build::query(asked)).await.unwrap();
        wait_until_async(SOON, async || family.ran("in the way").1 == 1).await;
        stage.own_sql("DELETE FROM kept WHERE id > 500");
        stage.sql("VACUUM kept");
        let outcome = client.outcome().await.unwrap();
        assert_eq!((outcome.value(), outcome.sqlstate()), (Some("500"), ""), "{outcome:?}");
        assert_eq!(family.ran("in the way"), (1, 1), "it did run on both");
    });
}

#[test]
fn a_follower_killed_at_any_phase_is_seen_by_nobody_who_has_no_word_of_it() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql("CREATE TABLE kept (id int); INSERT INTO kept SELECT generate_series(1, 100)");
    let kill_all = || family.followers.iter().for_each(pgweir_harness::Cluster::kill_hard);
    let revive = || {
        for follower in &family.followers {
            follower.restart().unwrap();
        }
    };
    run(Duration::from_mins(2), async {
        let mut client = stage.client().await;
        let mut idle = stage.client().await;
        family.until_routed(&mut client).await;
        // At work on a read.
        client
            .send(&build::query("/* pgweir.route=follower */ SELECT count(*) FROM kept, pg_sleep(1) /* cut */"))
            .await
            .unwrap();
        wait_until_async(SOON, async || family.ran("cut */").1 == 1).await;
        // In a transaction in which nothing was done.
        succeed(&mut idle, "BEGIN READ ONLY").await;
        kill_all();
        assert_eq!(client.outcome().await.unwrap().value(), Some("100"));
        assert_eq!(value(&mut idle, "SELECT count(*) FROM kept").await, "100");
        assert_eq!(at(&mut idle).await, "primary");
        fail(&mut idle, "DELETE FROM kept", "25006", b'E').await;
        succeed(&mut idle, "ROLLBACK").await;
        // All lost: everything runs on the primary.
        for number in 0..20 {
            assert_eq!(value(&mut client, &format!("SELECT count(*) + {number} - {number} FROM kept")).await, "100");
            assert_eq!(client.extended("SELECT count(*) FROM kept", &[]).await.unwrap().value(), Some("100"));
        }
        revive();
        family.until_routed(&mut client).await;
        // In a transaction of which something was told.
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut client).await, "primary");
        kill_all();
        fail(&mut client, "SELECT count(*) FROM kept", "08006", b'E').await;
        fail(&mut client, "SELECT 1", "25P02", b'E').await;
        succeed(&mut client, "ROLLBACK").await;
        assert_eq!(value(&mut client, "SELECT count(*) FROM kept").await, "100");
        revive();
        family.until_routed(&mut client).await;
    });
}

#[test]
fn a_read_that_a_follower_does_not_cancel_in_time_is_not_run_once_more_on_the_primary() {
    let family = family();
    let stage = family.stage(&[("query_timeout", "1s"), ("cancel_wait_timeout", "100ms")]);
    stage.own_sql(
        "CREATE FUNCTION deaf() RETURNS void LANGUAGE plpgsql AS $$BEGIN \
         WHILE clock_timestamp() < now() + '9s' LOOP \
         BEGIN PERFORM pg_sleep(2); EXCEPTION WHEN query_canceled THEN NULL; END; \
         END LOOP; END$$",
    );
    for follower in &family.followers {
        family.primary.await_replay(follower, SOON).unwrap();
    }
    run(Duration::from_mins(2), async {
        let (mut lone, mut open) = (stage.client().await, stage.client().await);
        let deaf = |tag: &str| build::query(&format!("/* pgweir.route=follower */ SELECT deaf(), '{tag}'"));
        for client in [&mut lone, &mut open] {
            client.set_patience(2 * SOON);
            family.until_routed(client).await;
        }
        succeed(&mut open, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut open).await, "primary");
        lone.send(&deaf("deaf alone")).await.unwrap();
        open.send(&deaf("deaf within")).await.unwrap();
        for (client, status) in [(&mut lone, b'I'), (&mut open, b'E')] {
            let outcome = client.outcome().await.unwrap();
            assert_eq!((outcome.sqlstate(), outcome.status), ("08006", status), "{outcome:?}");
        }
        succeed(&mut open, "ROLLBACK").await;
        for (client, tag) in [(&mut lone, "deaf alone"), (&mut open, "deaf within")] {
            assert_eq!(value(client, "SELECT 'on'").await, "on");
            assert_eq!(family.ran(tag), (0, 1));
        }
    });
}

#[test]
fn a_follower_that_is_promoted_takes_no_write_that_was_sent_to_a_follower() {
    let family = family();
    // Behind the first look none comes while this runs: what was a follower is taken for one.
    let stage = family.stage(&[("read_freshness", "eventual"), ("read_sample_interval", "10s")]);
    stage.own_sql("CREATE TABLE charges (n int)");
    let charges = || {
        let count = "SELECT count(*) FROM charges";
        let elsewhere = family.followers.each_ref().map(|follower| follower.psql(stage.name(), count).unwrap());
        (stage.sql(count), elsewhere)
    };
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        // pgweir has not been told of it.
        stage.own_sql(
            "CREATE FUNCTION charge() RETURNS int LANGUAGE plpgsql AS \
             'BEGIN INSERT INTO charges VALUES (1); RETURN 1; END'",
        );
        for follower in &family.followers {
            family.primary.await_replay(follower, SOON).unwrap();
            assert_eq!(follower.psql("postgres", "SELECT pg_promote()").unwrap(), "t");
        }
        let charge = "/* pgweir.route=follower */ SELECT charge()";
        assert_eq!(value(&mut client, &format!("{charge} AS n1")).await, "1");
        assert_eq!(family.ran("AS n1"), (1, 1), "it was not sent to what had been a follower");
        assert_eq!(charges(), ("1".to_owned(), ["0", "0"].map(ToOwned::to_owned)));
        // Whatever a session says of its transactions.
        let sets = ["SET default_transaction_read_only = off", "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"];
        for (number, set) in (2..).zip(sets) {
            let mut client = stage.client().await;
            succeed(&mut client, set).await;
            assert_eq!(value(&mut client, &format!("{charge} AS n{number}")).await, "1");
            assert_eq!(family.ran(&format!("AS n{number}")), (1, 0), "{set}");
            assert_eq!(charges(), (number.to_string(), ["0", "0"].map(ToOwned::to_owned)), "{set}");
        }
    });
}

#[test]
fn a_primary_with_a_long_queue_is_asked_all_the_same() {
    let family = family();
    let stage = family.stage(&[("read_freshness", "session"), ("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE kept (id int)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        let over = std::rc::Rc::new(std::cell::Cell::new(false));
        // Whoever comes last waits for longer than a look does.
        let mut busy = Vec::new();
        for _ in 0..15 {
            let (mut client, over) = (stage.client().await, over.clone());
            busy.push(tokio::task::spawn_local(async move {
                while !over.get() {
                    succeed(&mut client, "/* pgweir.route=primary */ SELECT pg_sleep(0.1)").await;
                }
            }));
        }
        succeed(&mut client, "INSERT INTO kept VALUES (1)").await;
        // What this session has to see is known to be there, though it writes nothing more and hardly reads.
        family.until_routed(&mut client).await;
        over.set(true);
        for client in busy {
            client.await.unwrap();
        }
    });
}

#[test]
fn clients_that_read_do_not_notice_that_followers_come_and_go() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql("CREATE TABLE kept (id int); INSERT INTO kept SELECT generate_series(1, 100)");
    run(Duration::from_mins(2), async {
        let mut warm = stage.client().await;
        family.until_routed(&mut warm).await;
        let over = std::rc::Rc::new(std::cell::Cell::new(false));
        let mut readers = Vec::new();
        for number in 0..8 {
            let (mut client, over) = (stage.client().await, over.clone());
            readers.push(tokio::task::spawn_local(async move {
                let mut reads = 0_u32;
                while !over.get() {
                    let outcome = if number % 2 == 0 {
                        client.query("SELECT count(*) FROM kept").await.unwrap()
                    } else {
                        client.extended("SELECT count(*) FROM kept WHERE id > $1", &[Some("0")]).await.unwrap()
                    };
                    assert_eq!((outcome.value(), outcome.sqlstate()), (Some("100"), ""), "{outcome:?}");
                    reads += 1;
                }
                reads
            }));
        }
        for round in 0..4 {
            sleep(Duration::from_millis(200)).await;
            let follower = &family.followers[round % 2];
            follower.kill_hard();
            sleep(Duration::from_millis(200)).await;
            follower.restart().unwrap();
        }
        over.set(true);
        for reader in readers {
            assert!(reader.await.unwrap() > 10);
        }
    });
}

#[test]
fn a_follower_that_is_promoted_serves_nothing_any_more() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        for follower in &family.followers {
            assert_eq!(follower.psql("postgres", "SELECT pg_promote()").unwrap(), "t");
            follower.psql(stage.name(), "INSERT INTO kept VALUES (2)").unwrap();
        }
        // A row of theirs would be none of the primary's.
        for _ in 0..200 {
            let outcome = client.query("SELECT count(*) FROM kept").await.unwrap();
            assert_eq!((outcome.value(), outcome.sqlstate()), (Some("1"), ""), "{outcome:?}");
            succeed(&mut client, "UPDATE kept SET id = id").await;
        }
    });
}

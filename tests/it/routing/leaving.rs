//! Clients that change their mind while a read of theirs runs on a follower, or go away, and pgweir that does.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgweir_harness::wait_until_async;
use pgweir_harness::wire::{Wire, build, cancel};
use tokio::task::spawn_local;

use super::{Family, at, family};
use crate::stage::{Dice, SOON, Stage, fail, read_to_end, run, succeed, value};

/// `query_canceled`.
const CANCELED: &str = "57014";

/// A read that takes so many seconds, on a follower if it may.
fn slow(tag: &str, seconds: f64) -> String {
    format!("/* pgweir.route=follower */ SELECT '{tag}' FROM pg_sleep({seconds})")
}

/// Statements with this in them that run on followers now.
fn running(family: &Family, stage: &Stage<'_>, tag: &str) -> usize {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = '{}' AND state = 'active' AND query LIKE '%{tag}%'",
        stage.name()
    );
    family.followers.iter().map(|one| one.psql("postgres", &sql).unwrap().parse::<usize>().unwrap()).sum()
}

/// Process ids of the place's server connections, of each follower.
fn backends(family: &Family, stage: &Stage<'_>) -> Vec<String> {
    let sql = format!("SELECT pid FROM pg_stat_activity WHERE usename = '{}' ORDER BY pid", stage.name());
    family.followers.iter().map(|one| one.psql("postgres", &sql).unwrap()).collect()
}

#[test]
fn a_cancel_of_a_read_on_a_follower_reaches_only_that_one() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "4")]);
    run(Duration::from_mins(1), async {
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(stage.client().await);
        }
        let mut at_home = stage.client().await;
        family.until_routed(&mut clients[0]).await;
        for client in &mut clients {
            client.send(&build::query(&slow("to be cut", 60.0))).await.unwrap();
        }
        at_home.send(&build::query("/* pgweir.route=primary */ SELECT 'at home' FROM pg_sleep(60)")).await.unwrap();
        wait_until_async(SOON, async || running(&family, &stage, "to be cut") == 4 && stage.is_running("at home"))
            .await;
        let before = backends(&family, &stage);
        for left in (0..4).rev() {
            let client = &mut clients[left];
            cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
            let outcome = client.outcome().await.unwrap();
            assert_eq!((outcome.sqlstate(), outcome.status), (CANCELED, b'I'), "{outcome:?}");
            assert_eq!(running(&family, &stage, "to be cut"), left);
            // One that has nothing to be cancelled.
            cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
        }
        assert_eq!(family.ran("to be cut"), (0, 4), "what was cancelled does not run again");
        assert!(stage.is_running("at home"));
        cancel(stage.addr(), at_home.pid, &at_home.secret).await.unwrap();
        assert_eq!(at_home.outcome().await.unwrap().sqlstate(), CANCELED);
        // In a transaction, which has failed then.
        let client = &mut clients[0];
        family.until_routed(client).await;
        succeed(client, "BEGIN READ ONLY").await;
        assert_ne!(at(client).await, "primary");
        client.send(&build::query("SELECT 'cut in a transaction' FROM pg_sleep(60)")).await.unwrap();
        wait_until_async(SOON, async || running(&family, &stage, "cut in a transaction") == 1).await;
        cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
        assert_eq!(client.outcome().await.unwrap().sqlstate(), CANCELED);
        fail(client, "SELECT 1", "25P02", b'E').await;
        succeed(client, "ROLLBACK").await;
        assert_eq!(family.ran("cut in a transaction"), (0, 1));
        for (before, after) in before.iter().zip(backends(&family, &stage)) {
            assert!(before.lines().all(|pid| after.lines().any(|other| other == pid)), "{before} then {after}");
        }
    });
}

#[test]
fn cancels_at_any_moment_hit_nobody_elses_read() {
    const CLIENTS: usize = 12;
    const CANCELS: usize = 600;
    let family = family();
    let stage = family.stage(&[("default_pool_size", "2")]);
    stage.sql(&format!("ALTER ROLE {} RESET log_statement", stage.name()));
    let seed = Dice::seed("cancels_at_any_moment_hit_nobody_elses_read");
    run(Duration::from_mins(2), async {
        let mut dice = Dice::new(seed);
        let over = std::rc::Rc::new(std::cell::Cell::new(false));
        let (mut keys, mut tasks) = (Vec::new(), Vec::new());
        for number in 0..CLIENTS {
            let mut client = stage.client().await;
            if number == 0 {
                family.until_routed(&mut client).await;
            }
            keys.push((client.pid, client.secret.clone()));
            let (over, mut dice) = (over.clone(), Dice::new(dice.next()));
            tasks.push(spawn_local(async move {
                let (mut hit, mut answered, mut counter) = (0, 0, 0);
                while !over.get() {
                    counter += 1;
                    let tag = format!("c{number}-{counter}");
                    let wish = dice.pick(&["", "/* pgweir.route=follower */", "/* pgweir.route=primary */"]);
                    let seconds = dice.time_below(Duration::from_millis(15)).as_secs_f64();
                    let sql = format!("{wish} SELECT '{tag}' FROM pg_sleep({seconds})");
                    let outcome = match dice.below(2) {
                        0 => client.query(&sql).await.unwrap(),
                        _ => client.extended(&sql, &[]).await.unwrap(),
                    };
                    match outcome.sqlstate() {
                        "" => {
                            assert_eq!(outcome.value(), Some(&*tag));
                            answered += 1;
                        }
                        CANCELED => hit += 1,
                        _ => panic!("{sql}: {outcome:?}"),
                    }
                }
                (hit, answered)
            }));
        }
        let mut sent = [0; CLIENTS];
        for _ in 0..CANCELS {
            // Those of every third are never used.
            let whom = dice.index(CLIENTS);
            if whom.is_multiple_of(3) {
                continue;
            }
            sent[whom] += 1;
            let (pid, secret) = &keys[whom];
            cancel(stage.addr(), *pid, secret).await.unwrap();
        }
        over.set(true);
        let mut hits = 0;
        for (number, (task, sent)) in tasks.into_iter().zip(sent).enumerate() {
            let (hit, answered) = task.await.unwrap();
            assert!(hit <= sent && answered > 0, "client {number}: {hit} hit by {sent}, {answered} answered");
            hits += hit;
        }
        println!("{hits} of {} cancels hit", sent.iter().sum::<usize>());
        assert!(hits > 20);
    });
}

#[test]
fn whoever_vanishes_leaves_nothing_on_a_follower_and_its_place_to_others() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)");
    family.followers.iter().for_each(|follower| family.primary.await_replay(follower, SOON).unwrap());
    run(Duration::from_mins(1), async {
        for within in [false, true] {
            let mut next = stage.client().await;
            family.until_routed(&mut next).await;
            // One on each, which is all that there is.
            let mut clients: [Wire; 2] = [stage.client().await, stage.client().await];
            for (number, client) in clients.iter_mut().enumerate() {
                if within {
                    succeed(client, "BEGIN READ ONLY").await;
                    assert_ne!(at(client).await, "primary");
                }
                client.send(&build::query(&slow("left behind", 60.0))).await.unwrap();
                wait_until_async(SOON, async || running(&family, &stage, "left behind") == number + 1).await;
            }
            let before = backends(&family, &stage);
            let [one, two] = clients;
            one.abort().unwrap();
            drop(two);
            let start = Instant::now();
            wait_until_async(SOON, async || running(&family, &stage, "left behind") == 0).await;
            println!("gone after {:?}", start.elapsed());
            family.until_routed(&mut next).await;
            assert_eq!(value(&mut next, "SELECT count(*) FROM kept /* next */").await, "1");
            assert_eq!(backends(&family, &stage), before, "the server connections live on");
        }
        // In a transaction in which nothing runs.
        let mut idle = stage.client().await;
        family.until_routed(&mut idle).await;
        let before = backends(&family, &stage);
        let mut clients = [idle, stage.client().await];
        for client in &mut clients {
            succeed(client, "BEGIN READ ONLY").await;
            assert_ne!(at(client).await, "primary");
        }
        let [one, two] = clients;
        one.abort().unwrap();
        drop(two);
        let mut next = stage.client().await;
        family.until_routed(&mut next).await;
        let idle = "SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
        wait_until_async(SOON, async || {
            family.followers.iter().all(|follower| follower.psql("postgres", idle).unwrap().is_empty())
        })
        .await;
        assert_eq!(backends(&family, &stage), before);
    });
}

#[test]
fn a_stop_lets_reads_on_followers_end() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "4"), ("shutdown_timeout", "60s")]);
    run(Duration::from_mins(2), async {
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(stage.client().await);
        }
        let [mut idle, mut lone, mut within, mut begun] = <[Wire; 4]>::try_from(clients).unwrap();
        family.until_routed(&mut idle).await;
        succeed(&mut within, "BEGIN READ ONLY").await;
        let first = at(&mut within).await;
        assert_ne!(first, "primary");
        succeed(&mut begun, "BEGIN READ ONLY").await;
        lone.send(&build::query(&slow("to its end", 1.5))).await.unwrap();
        wait_until_async(SOON, async || running(&family, &stage, "to its end") == 1).await;
        stage.pgweir.signal(libc::SIGTERM).unwrap();
        assert_eq!(read_to_end(&mut idle).await.sqlstate(), "57P01");
        assert_eq!(lone.outcome().await.unwrap().value(), Some("to its end"));
        assert_eq!(read_to_end(&mut lone).await.sqlstate(), "57P01");
        assert_eq!(at(&mut within).await, first);
        // The first of its transaction: on the follower, or moved to the primary, it is answered.
        assert_eq!(value(&mut begun, "SELECT 'begun'").await, "begun");
        let moved = value(&mut begun, "SELECT 'more'").await;
        assert_eq!(moved, "more");
        for client in [&mut within, &mut begun] {
            succeed(client, "COMMIT").await;
            assert_eq!(read_to_end(client).await.sqlstate(), "57P01");
        }
        assert_eq!(stage.pgweir.wait_exit(SOON).unwrap().code(), Some(0));
        assert_eq!(backends(&family, &stage), ["", ""], "no server connection is left");
    });
}

#[test]
fn a_stop_that_cannot_wait_cancels_what_runs_on_followers() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "4"), ("shutdown_timeout", "1s")]);
    run(Duration::from_mins(1), async {
        let mut clients = [stage.client().await, stage.client().await];
        family.until_routed(&mut clients[0]).await;
        for client in &mut clients {
            client.send(&build::query(&slow("too long", 60.0))).await.unwrap();
        }
        wait_until_async(SOON, async || running(&family, &stage, "too long") == 2).await;
        stage.pgweir.signal(libc::SIGTERM).unwrap();
        for end in join_all(clients.iter_mut().map(read_to_end)).await {
            assert_eq!(end.sqlstate(), "57P01");
        }
        assert_eq!(stage.pgweir.wait_exit(SOON).unwrap().code(), Some(1), "clients were cut off");
        wait_until_async(SOON, async || backends(&family, &stage) == ["", ""]).await;
        assert_eq!(family.ran("too long"), (0, 2));
    });
}

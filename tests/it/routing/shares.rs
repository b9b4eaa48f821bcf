//! What each follower gets of the reads: nothing if it is too far behind, more than others if it has more weight.

use std::time::Duration;

use pgweir_harness::wire::Wire;
use pgweir_harness::{Cluster, wait_until, wait_until_async};

use super::{at, family, in_state};
use crate::stage::{SOON, run, succeed, value};

/// Where a lone read is that asks for a follower.
async fn read(client: &mut Wire) -> String {
    value(client, "/* pgweir.route=follower */ SELECT current_setting('cluster_name')").await
}

/// How many of these are on each follower, and how many are on neither.
fn counted(places: &[String]) -> [usize; 3] {
    let on = |name: &str| places.iter().filter(|place| *place == name).count();
    [on("one"), on("two"), places.len() - on("one") - on("two")]
}

/// Replays nothing from here on.
fn hold_back(follower: &Cluster) {
    follower.psql("postgres", "SELECT pg_wal_replay_pause()").unwrap();
    wait_until(SOON, || follower.psql("postgres", "SELECT pg_get_wal_replay_pause_state()").unwrap() == "paused");
}

#[test]
fn a_follower_that_is_too_far_behind_serves_nothing_until_it_has_caught_up() {
    let family = family();
    let [one, two] = &family.followers;
    // Beyond the second between two looks, so that nobody is late who was asked while he replayed.
    let table = [
        [("follower_max_lag", "2s"), ("follower_max_lag_bytes", "0")],
        [("follower_max_lag", "0"), ("follower_max_lag_bytes", "65536")],
    ];
    for limits in table {
        let stage = family.stage(&[&[("read_freshness", "eventual")], &limits[..]].concat());
        stage.own_sql("CREATE TABLE kept (text text)");
        let is = |cluster: &Cluster, state: &str| in_state(&stage.pgweir, cluster, state);
        run(Duration::from_mins(2), async {
            let mut client = stage.client().await;
            family.until_routed(&mut client).await;
            wait_until_async(SOON, async || {
                read(&mut client).await;
                is(one, "serving") && is(two, "serving")
            })
            .await;
            hold_back(one);
            succeed(&mut client, "INSERT INTO kept SELECT repeat('x', 100) FROM generate_series(1, 2000)").await;
            // It is looked at because somebody reads.
            wait_until_async(SOON, async || {
                read(&mut client).await;
                is(one, "lagging") && is(two, "serving")
            })
            .await;
            let mut places = Vec::new();
            for _ in 0..100 {
                places.push(read(&mut client).await);
            }
            let [on_one, on_two, _] = counted(&places);
            assert!(on_one == 0 && on_two > 0, "{limits:?}: {places:?}");
            assert!(is(one, "lagging"), "{limits:?}");
            // The other one is behind, too: there is only the primary left.
            hold_back(two);
            succeed(&mut client, "INSERT INTO kept SELECT repeat('x', 100) FROM generate_series(1, 2000)").await;
            wait_until_async(SOON, async || {
                read(&mut client).await;
                is(one, "lagging") && is(two, "lagging")
            })
            .await;
            assert_eq!(read(&mut client).await, "primary", "{limits:?}");
            family.resume();
            let mut places = Vec::new();
            wait_until_async(SOON, async || {
                places.push(read(&mut client).await);
                let [on_one, on_two, _] = counted(&places);
                on_one > 0 && on_two > 0 && is(one, "serving") && is(two, "serving")
            })
            .await;
        });
    }
}

#[test]
fn followers_of_an_idle_primary_that_has_begun_another_file_are_not_behind_it() {
    let family = family();
    let stage = family.stage(&[("read_freshness", "fleet")]);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        wait_until_async(SOON, async || {
            stage.sql("SELECT pg_switch_wal()");
            for follower in &family.followers {
                family.primary.await_replay(follower, SOON).unwrap();
            }
            let place = read(&mut client).await;
            // The next record will be behind the header of the file's first page, and it has not been written meanwhile.
            let is_idle = stage.sql("SELECT (pg_current_wal_insert_lsn() - '0/0') % 65536") == "40";
            is_idle && place != "primary"
        })
        .await;
    });
}

#[test]
fn a_follower_of_three_times_the_weight_gets_three_times_as_much() {
    const READS: usize = 200;
    const CLIENTS: usize = 16;
    let family = family();
    let list = format!("{} weight=3", family.list());
    let settings = [("databases.PLACE.followers", &*list), ("read_freshness", "eventual"), ("default_pool_size", "20")];
    let stage = family.stage(&settings);
    run(Duration::from_mins(3), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        // One after the other. Of equal weights it would be half of them, and none of these: but one that has just been out
        // gets less, and so this may not be so at once.
        wait_until_async(2 * SOON, async || {
            let mut places = Vec::new();
            for _ in 0..READS {
                places.push(read(&mut client).await);
            }
            let [on_one, on_two, on_neither] = counted(&places);
            (READS * 3 / 20..=READS * 7 / 20).contains(&on_one) && on_two > on_one && on_neither == 0
        })
        .await;
        // All at once. The first time there are not server connections enough, and some go to the primary.
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(stage.client().await);
        }
        wait_until_async(2 * SOON, async || {
            let mut places = Vec::new();
            for client in &mut clients {
                succeed(client, "BEGIN READ ONLY").await;
                places.push(at(client).await);
            }
            for client in &mut clients {
                succeed(client, "COMMIT").await;
            }
            let [on_one, on_two, on_neither] = counted(&places);
            (CLIENTS / 8..=CLIENTS * 3 / 8).contains(&on_one) && on_two > on_one && on_neither == 0
        })
        .await;
    });
}

//! The pool: its cap at every instant, its order, its limits in time, and what becomes of broken
//! server connections.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgweir_harness::wire::build::{query, ssl_request, sync};
use pgweir_harness::wire::{Message, Wire};
use pgweir_harness::{Cluster, ClusterOptions, Direction, FaultProxy, wait_until, wait_until_async};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::stage::read_to_end;
use crate::support::{CapWatch, PASSWORD, Place, SOON, Site, assert_value, primary, server_pid};
use crate::transcript::{login_at, unnamed};

/// Returns when pgweir has handled what was sent before: it answers this later than it reads that.
async fn barrier(address: SocketAddr) {
    for _ in 0..3 {
        let mut wire = Wire::connect(address).await.unwrap();
        wire.send(&ssl_request()).await.unwrap();
        assert_eq!(wire.recv_raw(1).await.unwrap(), b"N");
    }
}

/// A client that has begun a transaction, and so holds a server connection.
async fn holder(site: &Site<'_>) -> Wire {
    let mut client = site.client().await;
    assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
    client
}

/// One of two hundred: works, fails, vanishes and comes back.
async fn churn(site: &Site<'_>, seed: u64, rounds: u32) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut client = site.client().await;
    for round in 0..rounds {
        let tag = format!("{seed}.{round}");
        match random.random_range(0..8) {
            0 => {
                client.abort().unwrap();
                client = site.client().await;
            }
            1 => {
                assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
                client.abort().unwrap();
                client = site.client().await;
            }
            2 => {
                client.send(&query("SELECT pg_sleep(0.01)")).await.unwrap();
                client.abort().unwrap();
                client = site.client().await;
            }
            3 => {
                client.terminate().await.unwrap();
                client = site.client().await;
            }
            4 => assert_eq!(client.query("SELECT 1/0").await.unwrap().sqlstate(), "22012"),
            5 => {
                assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
                assert_value(&client.query(&format!("SELECT '{tag}'")).await.unwrap(), &tag);
                assert_eq!(client.query("COMMIT").await.unwrap().status, b'I');
            }
            6 => assert_value(&client.extended("SELECT $1::text", &[Some(&tag)]).await.unwrap(), &tag),
            _ => assert_value(&client.query(&format!("SELECT '{tag}'")).await.unwrap(), &tag),
        }
    }
}

#[tokio::test]
async fn the_cap_holds_at_every_instant_under_two_hundred_clients_that_come_and_go() {
    let site = Site::start(&[("default_pool_size", "5")]);
    let watch = site.place.cap_watch(5);
    join_all((0..200).map(|seed| churn(&site, seed, 25))).await;
    assert_eq!(watch.finish(), 5, "the pool was never used to the full");
    wait_until(SOON, || site.metric("pgweir_servers", &["state=\"active\""]) < 0.5);
    assert!(
        site.metric("pgweir_sessions_panicked_total", &[]) < 0.5
            && site.metric("pgweir_broken_invariants_total", &[]) < 0.5
    );
}

#[tokio::test]
async fn the_cap_holds_while_server_connections_are_killed() {
    let site = Site::start(&[("default_pool_size", "4")]);
    let watch = site.place.cap_watch(4);
    let killing = async {
        for _ in 0..30 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let pids = site.place.server_pids();
            if let Some(pid) = pids.first() {
                site.place.psql(&format!("SELECT pg_terminate_backend({pid})"));
            }
        }
    };
    // Clients may see their server connection go; what they may not do is to make for a fifth one.
    let working = join_all((0..40).map(async |_| {
        let mut client = site.client().await;
        for _ in 0..20 {
            if client.query("SELECT pg_sleep(0.002)").await.is_err() {
                client = site.client().await;
            }
        }
    }));
    tokio::join!(killing, working);
    assert!(watch.finish() >= 3);
}

#[tokio::test]
async fn waiters_are_served_first_come_first_served_and_nobody_barges_in() {
    // Nor while the server connection is audited.
    for audit_every in ["0", "1"] {
        expect_turns(audit_every).await;
    }
}

async fn expect_turns(audit_every: &str) {
    const WAITERS: usize = 30;
    let site = Site::start(&[("default_pool_size", "1"), ("audit_every", audit_every)]);
    let mut first = site.client().await;
    assert_eq!(first.query("CREATE SEQUENCE q").await.unwrap().error, None);
    let mut clients = Vec::new();
    for _ in 0..WAITERS {
        clients.push(site.client().await);
    }
    for round in 0..3 {
        assert_eq!(first.query("SELECT setval('q', 1, false)").await.unwrap().error, None);
        assert_eq!(first.query("BEGIN").await.unwrap().status, b'T');
        for client in &mut clients {
            client.send(&query("SELECT nextval('q')")).await.unwrap();
            barrier(site.pgweir.addr()).await;
        }
        // The holder asks again at once, and must wait all the same.
        assert_eq!(first.query("COMMIT").await.unwrap().tags, ["COMMIT"], "round {round}");
        first.send(&query("SELECT nextval('q')")).await.unwrap();
        for (place, client) in clients.iter_mut().enumerate() {
            assert_value(&client.outcome().await.unwrap(), &(place + 1).to_string());
        }
        assert_value(&first.outcome().await.unwrap(), &(WAITERS + 1).to_string());
    }
}

#[tokio::test]
async fn who_never_rests_and_is_audited_every_time_does_not_keep_its_server_connection() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let (mut busy, mut waiter) = (site.client().await, site.client().await);
    let over = Arc::new(AtomicBool::new(false));
    let task = tokio::spawn({
        let over = over.clone();
        async move {
            // A DO block may do anything: what it has done is looked for each time.
            while !over.load(Ordering::Relaxed) {
                assert_eq!(busy.query("DO $$BEGIN PERFORM 1; END$$").await.unwrap().error, None);
            }
        }
    });
    for _ in 0..200 {
        assert_value(&waiter.query("SELECT 'served'").await.unwrap(), "served");
    }
    over.store(true, Ordering::Relaxed);
    task.await.unwrap();
}

#[tokio::test]
async fn a_lock_taken_several_times_keeps_its_server_connection_until_it_is_given_back_as_often() {
    const QUIET: Duration = Duration::from_millis(200);
    let site = Site::start(&[("default_pool_size", "1")]);
    let (mut owner, mut waiter) = (site.client().await, site.client().await);
    for give_back in ["SELECT pg_advisory_unlock(1)", "BEGIN; SELECT pg_advisory_unlock(1); ROLLBACK"] {
        for _ in 0..3 {
            assert_eq!(owner.query("SELECT pg_advisory_lock(1)").await.unwrap().error, None);
        }
        waiter.send(&query("SELECT 'served'")).await.unwrap();
        for _ in 0..2 {
            assert_value(&owner.query(give_back).await.unwrap(), "t");
            assert!(waiter.recv_within(QUIET).await.unwrap().is_none(), "the lock is still held");
        }
        assert_value(&owner.query(give_back).await.unwrap(), "t");
        assert_value(&waiter.outcome().await.unwrap(), "served");
        // One more is refused by the server itself, and pins nothing.
        let refused = owner.query("SELECT pg_advisory_unlock(1)").await.unwrap();
        assert_value(&refused, "f");
        assert!(refused.notices[0].field(b'M').unwrap().contains("you don't own a lock"), "{refused:?}");
        assert_value(&waiter.query("SELECT 'free'").await.unwrap(), "free");
    }
    // All at once.
    for _ in 0..3 {
        let taken = owner.query("SELECT pg_advisory_lock(1), pg_advisory_lock_shared(2, 3)").await.unwrap();
        assert_eq!(taken.error, None);
    }
    waiter.send(&query("SELECT 'served'")).await.unwrap();
    assert!(waiter.recv_within(QUIET).await.unwrap().is_none(), "the locks are held");
    assert_eq!(owner.query("SELECT pg_advisory_unlock_all()").await.unwrap().error, None);
    assert_value(&waiter.outcome().await.unwrap(), "served");
}

#[tokio::test]
async fn a_client_beyond_max_pinned_is_told_and_ended_and_leaves_nothing() {
    /// The locks of this database, whoever has them.
    const LOCKS: &str = "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database \
                         WHERE locktype = 'advisory' AND datname = current_database() AND objid";
    let (of_first, of_second) = (format!("{LOCKS} = 1"), format!("{LOCKS} = 2"));
    // What pins, and how much of it is found by another.
    #[rustfmt::skip]
    let table = [
        ("a lock",      "SELECT pg_advisory_lock(2)",                 &*of_second),
        ("a table",     "CREATE TEMPORARY TABLE mine (a int)",        "SELECT count(*) FROM pg_class WHERE relname = 'mine'"),
        ("a cursor",    "DECLARE mine CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*) FROM pg_cursors WHERE name = 'mine'"),
        ("a statement", "PREPARE mine AS SELECT 1",                   "SELECT count(*) FROM pg_prepared_statements WHERE name = 'mine'"),
    ];
    let site = Site::start(&[("default_pool_size", "2"), ("max_pinned", "1")]);
    let watch = site.place.cap_watch(2);
    let (mut first, mut other) = (site.client().await, site.client().await);
    assert_eq!(first.query("SELECT pg_advisory_lock(1)").await.unwrap().error, None);
    let pid = server_pid(&mut first).await;
    for (name, takes, finds) in table {
        let mut second = site.client().await;
        second.send(&query(takes)).await.unwrap();
        let end = read_to_end(&mut second).await;
        // The transaction was done, and is answered.
        assert!(end.messages.iter().any(|message| message.tag == b'C'), "{name}: {end:?}");
        let error = end.messages.last().and_then(Message::server_error);
        let error = error.unwrap_or_else(|| panic!("{name}: {end:?}"));
        let told = (error.severity(), error.sqlstate(), error.message(), error.field(b'H').unwrap_or_default());
        let want = (
            "FATAL",
            "53300",
            "1 server connections of this pool are pinned by their clients' session state",
            "Raise max_pinned or the pool size, or avoid session state; /blame of the HTTP listener names the reasons.",
        );
        assert_eq!(told, want, "{name}");
        // There is but one server connection for all others: the one that the second client had.
        assert_ne!(server_pid(&mut other).await, pid, "{name}");
        assert_value(&other.query(finds).await.unwrap(), "0");
        // And the first has its own, with its lock.
        assert_eq!(server_pid(&mut first).await, pid, "{name}");
        assert_value(&first.query(&format!("{of_first} AND pid = pg_backend_pid()")).await.unwrap(), "1");
    }
    let told = ["sqlstate=\"53300\"", "blame=\"pooler\""];
    wait_until(SOON, || site.metric("pgweir_errors_total", &told) >= 4.0);
    // Another may pin once the first has left and its server connection is wiped.
    first.terminate().await.unwrap();
    wait_until_async(SOON, async || {
        let mut next = site.client().await;
        let taken = next.query("SELECT pg_advisory_lock(1)").await;
        let kept = next.query(&format!("{of_first} AND pid = pg_backend_pid()")).await;
        taken.is_ok_and(|taken| taken.error.is_none()) && kept.is_ok_and(|kept| kept.value() == Some("1"))
    })
    .await;
    watch.finish();
}

#[tokio::test]
async fn a_waiter_that_leaves_gives_up_its_place() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut first = holder(&site).await;
    let mut goners = Vec::new();
    for _ in 0..10 {
        let mut client = site.client().await;
        client.send(&query("SELECT pg_sleep(60)")).await.unwrap();
        goners.push(client);
    }
    let mut last = site.client().await;
    barrier(site.pgweir.addr()).await;
    last.send(&query("SELECT 'served'")).await.unwrap();
    barrier(site.pgweir.addr()).await;
    for goner in goners {
        goner.abort().unwrap();
    }
    wait_until(SOON, || site.metric("pgweir_clients", &["state=\"waiting\""]) < 1.5);
    assert_eq!(first.query("COMMIT").await.unwrap().status, b'I');
    assert_value(&last.outcome().await.unwrap(), "served");
}

#[tokio::test]
async fn a_wait_beyond_query_wait_timeout_ends_with_an_error_that_names_pool_waiters_holders_and_setting() {
    let site = Site::start(&[("default_pool_size", "2"), ("query_wait_timeout", "2s")]);
    let (mut one, mut two) = (holder(&site).await, holder(&site).await);
    let mut client = site.client().await;
    for extended in [false, true] {
        let start = Instant::now();
        let bytes = if extended {
            [unnamed("SELECT 1", &[]), unnamed("SELECT 2", &[]), sync()].concat()
        } else {
            query("SELECT 1")
        };
        client.send(&bytes).await.unwrap();
        let outcome = client.outcome().await.unwrap();
        let took = start.elapsed();
        assert!(took > Duration::from_millis(1890) && took < SOON, "{took:?}");
        let error = outcome.error.as_ref().unwrap_or_else(|| panic!("{outcome:?}"));
        let text = error.to_string();
        assert_eq!((error.sqlstate(), error.severity(), outcome.status), ("53300", "ERROR", b'I'), "{text}");
        for part in [site.name(), "query_wait_timeout", "default_pool_size", "2.0 s"] {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
        let numbers: Vec<&str> =
            text.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty()).collect();
        assert!(numbers.contains(&"1") && numbers.contains(&"2"), "one waiter and two holders are not in: {text}");
        assert_eq!(outcome.rows, Vec::<Vec<Option<String>>>::new());
    }
    // The holders lost nothing, and the client is still good.
    for holder in [&mut one, &mut two] {
        assert_eq!(holder.query("COMMIT").await.unwrap().tags, ["COMMIT"]);
    }
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    wait_until(SOON, || site.metric("pgweir_errors_total", &["sqlstate=\"53300\"", "blame=\"pooler\""]) >= 2.0);
}

#[tokio::test]
async fn the_reserve_opens_only_for_those_who_waited_long_enough() {
    let site = Site::start(&[
        ("default_pool_size", "1"),
        ("reserve_pool_size", "1"),
        ("reserve_pool_timeout", "1500ms"),
        ("query_wait_timeout", "60s"),
    ]);
    let watch = site.place.cap_watch(2);
    let mut first = holder(&site).await;
    let (mut second, mut third) = (site.client().await, site.client().await);
    let start = Instant::now();
    assert_eq!(second.query("BEGIN").await.unwrap().status, b'T');
    let took = start.elapsed();
    assert!(took > Duration::from_millis(1390) && took < SOON, "{took:?}");
    wait_until(SOON, || watch.most() == 2);
    // Beyond the reserve there is nothing.
    third.send(&query("SELECT 3")).await.unwrap();
    assert_eq!(third.recv_within(Duration::from_millis(2500)).await.unwrap(), None);
    for client in [&mut first, &mut second] {
        assert_eq!(client.query("COMMIT").await.unwrap().status, b'I');
    }
    assert_value(&third.outcome().await.unwrap(), "3");
    assert_eq!(watch.finish(), 2);
}

#[tokio::test]
async fn min_pool_size_keeps_that_many_open_once_a_client_came() {
    let site = Site::start(&[("default_pool_size", "5"), ("min_pool_size", "3"), ("server_idle_timeout", "1s")]);
    let watch = site.place.cap_watch(5);
    assert_eq!(site.place.servers(), 0);
    let mut client = site.client().await;
    wait_until(SOON, || site.place.servers() == 3);
    let holders = [holder(&site).await, holder(&site).await, holder(&site).await, holder(&site).await];
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    wait_until(SOON, || site.place.servers() == 5);
    drop(holders);
    wait_until(SOON, || site.place.servers() == 3);
    // They stay, although idle for longer than server_idle_timeout.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(site.place.servers(), 3);
    watch.finish();
}

#[tokio::test]
async fn a_server_connection_is_replaced_at_the_end_of_its_life_but_not_inside_a_transaction() {
    let site = Site::start(&[("default_pool_size", "1"), ("server_lifetime", "1s")]);
    let watch = site.place.cap_watch(1);
    let mut client = holder(&site).await;
    let pid = server_pid(&mut client).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        assert_eq!(server_pid(&mut client).await, pid, "changed inside the transaction");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(client.query("COMMIT").await.unwrap().status, b'I');
    let next = server_pid(&mut client).await;
    assert_ne!(next, pid);
    // An idle one goes by itself.
    wait_until(SOON, || !site.place.server_pids().contains(&next));
    watch.finish();
    wait_until(SOON, || site.metric("pgweir_server_discards_total", &["reason=\"lifetime\""]) >= 2.0);
}

#[tokio::test]
async fn idle_server_connections_are_closed_after_server_idle_timeout() {
    let site = Site::start(&[("default_pool_size", "3"), ("server_idle_timeout", "1s")]);
    let holders = [holder(&site).await, holder(&site).await, holder(&site).await];
    assert_eq!(site.place.servers(), 3);
    drop(holders);
    let mut client = site.client().await;
    wait_until(SOON, || site.place.servers() == 0);
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    wait_until(SOON, || site.metric("pgweir_server_discards_total", &["reason=\"idle\""]) >= 3.0);
}

#[tokio::test]
async fn max_db_connections_holds_over_the_pools_of_two_users_and_both_get_on() {
    let place = Place::on(primary());
    let settings = [("default_pool_size", "4"), ("max_db_connections", "2"), ("users.second.password", PASSWORD)];
    let site = Site::before(place, &settings);
    let watch = site.place.cap_watch(2);
    let users = [site.name().to_owned(), "second".to_owned()];
    let work = (0..20).map(async |n: usize| {
        let mut client = Wire::open(site.pgweir.addr(), &users[n % 2], site.name(), PASSWORD).await.unwrap();
        for _ in 0..20 {
            assert_value(&client.query("SELECT 1, pg_sleep(0.001)").await.unwrap(), "1");
        }
    });
    join_all(work).await;
    assert_eq!(watch.finish(), 2);
}

#[tokio::test]
async fn max_user_connections_holds_over_the_pools_of_two_databases() {
    let place = Place::on(primary());
    let port = place.cluster.port().to_string();
    let settings = [
        ("default_pool_size", "4"),
        ("max_user_connections", "3"),
        ("databases.second.port", &port),
        ("databases.second.dbname", &place.name.clone()),
        ("databases.second.user", &place.name.clone()),
        ("databases.second.password", PASSWORD),
    ];
    let site = Site::before(place, &settings);
    let watch = site.place.cap_watch(3);
    let databases = [site.name().to_owned(), "second".to_owned()];
    let work = (0..20).map(async |n: usize| {
        let mut client = Wire::open(site.pgweir.addr(), site.name(), &databases[n % 2], PASSWORD).await.unwrap();
        for _ in 0..20 {
            assert_value(&client.query("SELECT 1, pg_sleep(0.001)").await.unwrap(), "1");
        }
    });
    join_all(work).await;
    assert_eq!(watch.finish(), 3);
}

#[tokio::test]
async fn what_idles_in_another_pool_of_the_same_user_makes_room_for_a_waiter() {
    let place = Place::on(primary());
    let port = place.cluster.port().to_string();
    let settings = [
        ("default_pool_size", "4"),
        ("max_user_connections", "2"),
        ("query_wait_timeout", "10s"),
        ("databases.second.port", &port),
        ("databases.second.dbname", &place.name.clone()),
        ("databases.second.user", &place.name.clone()),
        ("databases.second.password", PASSWORD),
    ];
    let site = Site::before(place, &settings);
    let watch = site.place.cap_watch(2);
    let databases = [site.name().to_owned(), "second".to_owned()];
    let mut clients = Vec::new();
    for number in 0..4 {
        let database = &databases[number / 2];
        // A pool's first login needs a server connection of its own: already that one is another pool's.
        clients.push(Wire::open(site.pgweir.addr(), site.name(), database, PASSWORD).await.unwrap());
    }
    for round in 0..6 {
        // Two at once, so that this pool has both; then they idle there, and the other pool asks.
        let (first, second) = clients.split_at_mut(2);
        let pair = if round % 2 == 0 { second } else { first };
        for client in &mut *pair {
            client.send(&query("SELECT 1, pg_sleep(0.05)")).await.unwrap();
        }
        for client in pair {
            assert_value(&client.outcome().await.unwrap(), "1");
        }
    }
    assert_eq!(watch.finish(), 2);
    wait_until(SOON, || site.metric("pgweir_server_discards_total", &["reason=\"shrink\""]) >= 6.0);
}

#[tokio::test]
async fn a_server_connection_that_died_while_idle_is_replaced_unseen() {
    let site = Site::start(&[("default_pool_size", "3")]);
    let watch = site.place.cap_watch(3);
    let mut clients = [site.client().await, site.client().await, site.client().await];
    for round in 0..15 {
        let work = clients.iter_mut().map(async |client| {
            for text in ["SELECT 1", "BEGIN", "SELECT 2", "COMMIT"] {
                let outcome = client.query(text).await.unwrap();
                assert_eq!(outcome.error, None, "round {round}: {text}");
            }
            assert_value(&client.extended("SELECT $1::text", &[Some("3")]).await.unwrap(), "3");
        });
        join_all(work).await;
        // One may still be logging in, for a client that was served by another meanwhile.
        wait_until(SOON, || {
            for pid in site.place.server_pids() {
                site.place.psql(&format!("SELECT pg_terminate_backend({pid}, 10000)"));
            }
            site.place.servers() == 0
        });
    }
    watch.finish();
    wait_until(SOON, || site.metric("pgweir_server_discards_total", &["reason=\"lost\""]) >= 15.0);
}

#[tokio::test]
async fn a_server_that_restarts_while_clients_are_idle_is_not_missed() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let site = Site::before(Place::on(&cluster), &[("default_pool_size", "3"), ("server_login_retry", "1s")]);
    let mut clients = [site.client().await, site.client().await, site.client().await];
    for hard in [false, true] {
        for client in &mut clients {
            assert_value(&client.query("SELECT 1").await.unwrap(), "1");
        }
        if hard {
            cluster.kill_hard();
        }
        cluster.restart().unwrap();
        for client in &mut clients {
            assert_value(&client.query("SELECT 2").await.unwrap(), "2");
        }
    }
}

#[tokio::test]
async fn a_server_that_is_down_is_tried_ever_more_rarely_and_found_again() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    // In front of a server that is down it accepts and closes, and counts.
    let proxy = FaultProxy::start(cluster.addr()).unwrap();
    let port = proxy.port().to_string();
    let place = Place::on(&cluster);
    let site = Site::before(
        place,
        &[("default_pool_size", "5"), ("databases.PLACE.port", &port), ("server_login_retry", "2s")],
    );
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(site.client().await);
    }
    cluster.stop().unwrap();
    let before = proxy.accepted();
    for client in &mut clients {
        client.set_patience(Duration::from_mins(1));
        client.send(&query("SELECT 'waited'")).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    let tries = proxy.accepted() - before;
    assert!((2..=20).contains(&tries), "{tries} logins tried in 4 s");
    wait_until(SOON, || site.pgweir.http_get("/readyz").unwrap().0 == 503);
    cluster.restart().unwrap();
    let start = Instant::now();
    for client in &mut clients {
        assert_value(&client.outcome().await.unwrap(), "waited");
    }
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    wait_until(SOON, || site.pgweir.http_get("/readyz").unwrap().0 == 200);
}

#[tokio::test]
async fn a_server_that_refuses_with_53300_makes_clients_wait_and_not_fail() {
    let place = Place::on(primary());
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 2", place.name));
    let site = Site::before(place, &[("default_pool_size", "6"), ("server_login_retry", "1s")]);
    let watch = site.place.cap_watch(2);
    let work = (0..20).map(async |_| {
        let mut client = site.client().await;
        for _ in 0..10 {
            assert_value(&client.query("SELECT 1, pg_sleep(0.01)").await.unwrap(), "1");
        }
    });
    join_all(work).await;
    assert_eq!(watch.finish(), 2);
    wait_until(SOON, || site.metric("pgweir_server_login_failures_total", &["sqlstate=\"53300\""]) >= 1.0);
    assert!(site.metric("pgweir_errors_total", &[]) < 0.5, "no client was told");
    // Being full is no reason to be sent no more clients.
    assert_eq!(site.pgweir.http_get("/readyz").unwrap().0, 200);
}

#[tokio::test]
async fn only_so_many_server_logins_are_under_way_at_once() {
    let place = Place::on(primary());
    let proxy = FaultProxy::start(place.cluster.addr()).unwrap();
    let port = proxy.port().to_string();
    let site = Site::before(
        place,
        &[("default_pool_size", "10"), ("max_server_logins", "3"), ("databases.PLACE.port", &port)],
    );
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(site.client().await);
    }
    // One server connection is there since the first login; now logins hang.
    proxy.black_hole(Direction::ToClient);
    for client in &mut clients {
        client.send(&query("BEGIN")).await.unwrap();
    }
    wait_until_async(SOON, async || proxy.open() == 4).await;
    for _ in 0..20 {
        barrier(site.pgweir.addr()).await;
        assert!(proxy.open() <= 4, "{} connections", proxy.open());
    }
    proxy.heal();
    for client in &mut clients {
        assert_eq!(client.outcome().await.unwrap().status, b'T');
    }
    assert_eq!(site.place.servers(), 10);
}

#[tokio::test]
async fn clients_that_never_stay_use_few_server_connections_again_and_again() {
    let site = Site::start(&[("default_pool_size", "3")]);
    let watch = CapWatch::start(site.place.cluster, &site.place.filter(), 3);
    let mut pids = BTreeSet::new();
    for _ in 0..50 {
        let mut client = login_at(site.pgweir.addr(), &site.place).await;
        pids.insert(server_pid(&mut client).await);
        client.abort().unwrap();
    }
    assert!(pids.len() <= 3, "{pids:?}");
    watch.finish();
}

//! Drivers where reads go to followers: they notice nothing, and what they have prepared runs on all servers.

use std::process::Command;
use std::time::Duration;

use futures_util::future::join_all;
use pgweir_harness::wire::Wire;
use pgweir_harness::{Cluster, ConnectionFilter, wait_until, wait_until_async};
use tokio::task::spawn_local;
use tokio_postgres::NoTls;

use super::family;
use crate::drivers::{finish, python, scripts};
use crate::stage::{SOON, run};
use crate::support::metric_in;

#[test]
fn psycopg_prepares_on_primary_and_followers_and_reads_its_own_writes() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "2"), ("read_freshness", "session")]);
    stage.own_sql("CREATE TABLE routed (id int PRIMARY KEY, n int); INSERT INTO routed SELECT id, 0 FROM generate_series(0, 3) id");
    family.followers.iter().for_each(|follower| family.primary.await_replay(follower, SOON).unwrap());
    run(Duration::from_mins(2), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
    });
    let (port, name) = (stage.pgweir.port(), stage.name());
    let script = |file: &str| {
        let mut script = Command::new(python());
        script.arg(scripts().join(file)).arg(format!("host=127.0.0.1 port={port} user={name} dbname={name}"));
        let output = finish(script);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "ok\n", "{file}");
    };
    script("psycopg_routing.py");
    let (at_home, elsewhere) = family.ran("psycopg reads");
    println!("{at_home} reads on the primary, {elsewhere} on followers");
    assert!(at_home > 0 && elsewhere > 100, "{at_home} {elsewhere}");
    assert_eq!(family.ran("psycopg writes"), (160, 0));
    // By a name of the pooler's: they were prepared there.
    for cluster in std::iter::once(&family.primary).chain(&family.followers) {
        let log = cluster.log_text();
        let named = |line: &str| line.contains("psycopg reads") && !line.contains("execute <unnamed>");
        assert!(log.lines().any(|line| line.contains("execute ") && named(line)), "{log}");
    }
    // All else that it does.
    stage.own_sql(
        "CREATE TABLE driver_rows (client int, n int); CREATE TABLE driver_copy (client int, n int, t text); \
         CREATE TABLE driver_unique (n int PRIMARY KEY); INSERT INTO driver_unique VALUES (1)",
    );
    script("psycopg_defaults.py");
    let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
    assert!(metric_in(&body, "pgweir_routes_total", &["reason=\"read\""]) > 100.0, "{body}");
}

#[test]
fn tokio_postgres_prepares_on_primary_and_followers() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "2"), ("read_freshness", "session")]);
    stage.own_sql("CREATE TABLE routed (id int PRIMARY KEY, n int); INSERT INTO routed SELECT id, 0 FROM generate_series(0, 3) id");
    family.followers.iter().for_each(|follower| family.primary.await_replay(follower, SOON).unwrap());
    let config = format!("host=127.0.0.1 port={} user={1} dbname={1}", stage.pgweir.port(), stage.name());
    run(Duration::from_mins(1), async {
        let mut warm = stage.client().await;
        family.until_routed(&mut warm).await;
        let clients = join_all((0..4).map(async |number: i32| {
            let (mut client, connection) = tokio_postgres::connect(&config, NoTls).await.unwrap();
            spawn_local(connection);
            let read = client.prepare("SELECT n FROM routed WHERE id = $1 /* tokio reads */").await.unwrap();
            let write = client.prepare("UPDATE routed SET n = $2 WHERE id = $1 /* tokio writes */").await.unwrap();
            for n in 0..30_i32 {
                assert_eq!(client.execute(&write, &[&number, &n]).await.unwrap(), 1);
                // Pipelined, one behind the other.
                let got =
                    join_all((0..5).map(async |_| client.query_one(&read, &[&number]).await.unwrap().get::<_, i32>(0)));
                assert_eq!(got.await, [n; 5]);
            }
            let transaction = client.build_transaction().read_only(true).start().await.unwrap();
            assert_eq!(transaction.query_one(&read, &[&number]).await.unwrap().get::<_, i32>(0), 29);
            assert!(transaction.execute(&write, &[&number, &0]).await.is_err());
            transaction.rollback().await.unwrap();
            (client, read)
        }));
        let clients = clients.await;
        wait_until_async(SOON, async || {
            for (number, (client, read)) in (0..).zip(&clients) {
                let number: i32 = number;
                assert_eq!(client.query_one(read, &[&number]).await.unwrap().get::<_, i32>(0), 29);
            }
            family.ran("tokio reads").1 > 20
        })
        .await;
        assert!(family.ran("tokio reads").0 > 0);
        // Those that read-only transactions refused may be among them.
        let (at_home, _) = family.ran("tokio writes");
        assert!((120..=124).contains(&at_home), "{at_home}");
    });
}

#[test]
fn redash_runs_each_query_on_a_connection_of_its_own_on_followers_alone() {
    let family = family();
    let stage = family.stage(&[("databases.PLACE_ro.followers_of", "PLACE"), ("databases.PLACE_ro.pool_size", "3")]);
    stage.own_sql("CREATE TABLE reported (id int PRIMARY KEY); INSERT INTO reported SELECT generate_series(0, 99)");
    family.followers.iter().for_each(|follower| family.primary.await_replay(follower, SOON).unwrap());
    let name = stage.name();
    let watch = |cluster: &Cluster| cluster.watch_connections(&ConnectionFilter::user(name)).unwrap();
    let watches = family.followers.each_ref().map(watch);
    // Nobody is led to the primary once the followers are known.
    wait_until(SOON, || {
        run(SOON, async {
            let mut client = Wire::connect(stage.addr()).await.unwrap();
            client.login_with(&[("user", name), ("database", &format!("{name}_ro"))], "").await.unwrap();
        });
        let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
        metric_in(&body, "pgweir_follower_state", &["state=\"serving\""]) > 1.5
    });
    let mut script = Command::new(python());
    let port = stage.pgweir.port();
    script
        .arg(scripts().join("redash_pattern.py"))
        .arg(format!("host=127.0.0.1 port={port} user={name} dbname={name}_ro"));
    let output = finish(script);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ok\n");
    assert_eq!(family.ran("Username: "), (0, 150), "each once, on a follower");
    let slow =
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%slow % FROM pg_sleep(120)%'";
    wait_until(SOON, || {
        family
            .followers
            .iter()
            .all(|follower| follower.psql("postgres", &format!("{slow} AND pid <> pg_backend_pid()")).unwrap() == "0")
    });
    let [one, two] = watches.map(|watch| watch.most());
    println!("at most {one} and {two} server connections");
    assert!(one <= 3 && two <= 3, "{one} {two}");
}

//! Followers: which of those that are named prove that they are, and what they do for a database that is served by them
//! alone. What goes to them of a database's own transactions is `routing`'s.

use pgweir_harness::wire::Wire;
use pgweir_harness::{Cluster, ClusterOptions, ConnectionFilter, FaultProxy, Pgweir, wait_until_async};

use crate::support::{PASSWORD, Place, SOON, metric_in, program, start_pgweir};

fn named(name: &str) -> ClusterOptions {
    ClusterOptions::default().set("cluster_name", name)
}

/// A place, and a pgweir for it with a second database of that name and `_ro`, served by these alone.
struct Readers<'a> {
    place: Place<'a>,
    pgweir: Pgweir,
}

impl<'a> Readers<'a> {
    fn start(primary: &'a Cluster, followers: &[&Cluster], settings: &[(&str, &str)]) -> Self {
        let place = Place::on(primary);
        let addresses: Vec<String> = followers.iter().map(|cluster| cluster.addr().to_string()).collect();
        let (addresses, name) = (addresses.join(", "), place.name.clone());
        let mut all = vec![
            ("databases.PLACE.followers", addresses.as_str()),
            ("databases.PLACE_ro.followers_of", name.as_str()),
            ("read_sample_interval", "5ms"),
            ("query_wait_timeout", "2s"),
        ];
        all.extend_from_slice(settings);
        let pgweir = start_pgweir(place.toml(&all));
        Self { place, pgweir }
    }

    /// A client of the second database, or the SQLSTATE of its refusal.
    async fn try_client(&self) -> Result<Wire, String> {
        let mut client = Wire::connect(self.pgweir.addr()).await.unwrap();
        let database = format!("{}_ro", self.place.name);
        let parameters = [("user", &*self.place.name), ("database", &*database)];
        match client.login_with(&parameters, PASSWORD).await {
            Ok(_) => Ok(client),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn client(&self) -> Wire {
        self.try_client().await.unwrap()
    }

    /// Where a new client is led; none if its query fails, as it may while a follower goes down.
    async fn may_be_led_to(&self) -> Option<String> {
        let mut client = self.try_client().await.ok()?;
        let outcome = client.query("SELECT current_setting('cluster_name')").await.ok()?;
        outcome.value().map(ToOwned::to_owned)
    }

    /// Where a new client is led.
    async fn led_to(&self) -> String {
        let mut client = self.client().await;
        value(&mut client, "SELECT current_setting('cluster_name')").await
    }

    fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let (status, body) = self.pgweir.http_get("/metrics").unwrap();
        assert_eq!(status, 200, "{body}");
        metric_in(&body, name, labels)
    }

    fn is(&self, cluster: &Cluster, state: &str) -> bool {
        self.is_at(&cluster.addr().to_string(), state)
    }

    fn is_at(&self, address: &str, state: &str) -> bool {
        let labels = [format!("server=\"{address}\""), format!("state=\"{state}\"")];
        self.metric("pgweir_follower_state", &[&labels[0], &labels[1]]) > 0.5
    }

    /// What `pgweir check` says of it, and what it finds fault with, which must be something.
    fn check(&self) -> (String, String) {
        let check = program().args(["check", "--config"]).arg(self.pgweir.config_path()).output().unwrap();
        let [said, faults] = [check.stdout, check.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(!check.status.success(), "{said}");
        (said, faults)
    }
}

async fn value(client: &mut Wire, sql: &str) -> String {
    let outcome = client.query(sql).await.unwrap();
    outcome.value().unwrap_or_else(|| panic!("{sql}: {outcome:?}")).to_owned()
}

#[tokio::test]
async fn only_what_is_proven_to_follow_the_primary_serves() {
    let primary = Cluster::start(named("primary")).unwrap();
    let one = primary.follower(named("one")).unwrap();
    let fork = primary.follower(named("fork")).unwrap();
    fork.psql("postgres", "SELECT pg_promote()").unwrap();
    wait_until_async(SOON, async || fork.psql("postgres", "SELECT pg_is_in_recovery()").unwrap() == "f").await;
    // A follower is copied from what has ended its recovery with a checkpoint.
    fork.psql("postgres", "CHECKPOINT").unwrap();
    let of_fork = fork.follower(named("of fork")).unwrap();
    // All clusters of the harness are copies of one, and have one system identifier; but for this one.
    let copy = Cluster::start(named("copy")).unwrap();
    let unrelated = Cluster::start(named("unrelated").own_system()).unwrap();
    let of_unrelated = unrelated.follower(named("of unrelated")).unwrap();
    let other_settings = primary.follower(named("other settings").set("timezone", "Asia/Tokyo")).unwrap();
    let all = [&fork, &of_fork, &copy, &unrelated, &of_unrelated, &other_settings, &one];
    let readers = Readers::start(&primary, &all, &[]);
    for cluster in [&one, &other_settings] {
        primary.await_replay(cluster, SOON).unwrap();
    }
    // The unrelated ones would let the role in.
    let role = format!("CREATE ROLE {0} LOGIN PASSWORD '{PASSWORD}'", readers.place.name);
    let database = format!("CREATE DATABASE {0} OWNER {0}", readers.place.name);
    for cluster in [&fork, &copy, &unrelated] {
        cluster.psql("postgres", &role).unwrap();
        cluster.psql("postgres", &database).unwrap();
    }
    fork.await_replay(&of_fork, SOON).unwrap();
    unrelated.await_replay(&of_unrelated, SOON).unwrap();

    let wanted = [
        (&one, "serving"),
        (&fork, "primary"),
        (&of_fork, "other_history"),
        (&copy, "primary"),
        (&unrelated, "primary"),
        (&of_unrelated, "other_system"),
        (&other_settings, "other_settings"),
    ];
    wait_until_async(SOON, async || {
        let at = readers.led_to().await;
        assert!(at == "one" || at == "primary", "{at}");
        wanted.iter().all(|(cluster, state)| readers.is(cluster, state))
    })
    .await;
    for _ in 0..10 {
        assert_eq!(readers.led_to().await, "one");
    }

    // The same is told without clients.
    let (said, faults) = readers.check();
    assert!(said.contains("follows the primary, "), "{said}");
    for (cluster, want) in [
        (&fork, "it follows nobody"),
        (&of_fork, "another history"),
        (&copy, "it follows nobody"),
        (&unrelated, "it follows nobody"),
        (&of_unrelated, "it is no copy of the primary"),
        (&other_settings, "TimeZone"),
    ] {
        let address = cluster.addr().to_string();
        let line = faults.lines().find(|line| line.contains(&address)).unwrap_or_else(|| panic!("{address}: {faults}"));
        assert!(line.contains(want), "{line}");
    }
    assert!(!faults.contains(&one.addr().to_string()), "{faults}");

    // One that is promoted where it is serves nobody from then on.
    one.psql("postgres", "SELECT pg_promote()").unwrap();
    wait_until_async(SOON, async || {
        readers.client().await;
        readers.is(&one, "primary")
    })
    .await;
    assert_eq!(readers.led_to().await, "primary");
}

#[tokio::test]
async fn one_follower_under_two_names_is_one() {
    let primary = Cluster::start(named("primary")).unwrap();
    let one = primary.follower(named("one")).unwrap();
    let (address, name) = (one.addr().to_string(), format!("localhost:{}", one.port()));
    let list = format!("{address}, {name}");
    let settings = [("databases.PLACE.followers", &*list), ("databases.PLACE_ro.pool_size", "2")];
    let readers = Readers::start(&primary, &[], &settings);
    primary.await_replay(&one, SOON).unwrap();
    wait_until_async(SOON, async || {
        readers.client().await;
        readers.is_at(&address, "serving") && readers.is_at(&name, "twin")
    })
    .await;
    // It has no more server connections than one may have, and one for questions under its other name.
    let watch = one.watch_connections(&ConnectionFilter::user(readers.place.name.clone())).unwrap();
    let clients = (0..8).map(async |_| {
        let mut client = readers.client().await;
        for _ in 0..10 {
            assert_eq!(value(&mut client, "SELECT current_setting('cluster_name') FROM pg_sleep(0.002)").await, "one");
        }
    });
    futures_util::future::join_all(clients).await;
    assert!(watch.samples() > 0 && watch.most() <= 3, "{} server connections", watch.most());
    assert!(readers.is_at(&name, "twin"));
    let (said, faults) = readers.check();
    assert_eq!(said.matches("follows the primary, ").count(), 1, "{said}");
    let line = faults.lines().find(|line| line.contains(&name)).unwrap_or_else(|| panic!("{faults}"));
    assert!(line.contains("it is the same server as another one of the list"), "{line}");
    assert!(!faults.contains(&address), "{faults}");
}

#[tokio::test]
async fn two_followers_behind_one_name_lend_each_other_no_position() {
    const CLIENTS: usize = 24;
    let primary = Cluster::start(named("primary")).unwrap();
    let followers = [primary.follower(named("one")).unwrap(), primary.follower(named("two")).unwrap()];
    let proxy = FaultProxy::start(followers[0].addr()).unwrap();
    let address = proxy.addr().to_string();
    let settings = [
        ("databases.PLACE.followers", &*address),
        ("read_routing", "auto"),
        ("read_freshness", "session"),
        ("default_pool_size", "24"),
    ];
    let readers = Readers::start(&primary, &[], &settings);
    let name = readers.place.name.clone();
    readers
        .place
        .psql(&format!("SET ROLE {name}; CREATE TABLE t AS SELECT id, 0 AS n FROM generate_series(1, {CLIENTS}) id"));
    for follower in &followers {
        primary.await_replay(follower, SOON).unwrap();
    }
    // One of them has nothing of what is written from now on.
    followers[1].psql("postgres", "SELECT pg_wal_replay_pause()").unwrap();
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = Wire::connect(readers.pgweir.addr()).await.unwrap();
        client.login_with(&[("user", &*name), ("database", &*name)], PASSWORD).await.unwrap();
        clients.push(client);
    }
    let on_followers = || readers.metric("pgweir_routes_total", &["reason=\"read\""]);
    wait_until_async(SOON, async || {
        value(&mut clients[0], "SELECT n FROM t WHERE id = 1").await;
        on_followers() > 0.0
    })
    .await;
    // What is asked for its position is the one, and its name leads to the other: more clients at once want more connections.
    proxy.lead_to(followers[1].addr());
    let before = on_followers();
    for round in 1..=CLIENTS {
        let turns = clients.iter_mut().take(round).enumerate().map(async |(at, client)| {
            let id = at + 1;
            let written = client.query(&format!("UPDATE t SET n = {round} WHERE id = {id}")).await.unwrap();
            assert!(written.error.is_none(), "{written:?}");
            // By the second one, the one follower has it.
            for pause in ["0", "0.05", "0.05"] {
                let seen = value(client, &format!("SELECT n FROM t, pg_sleep({pause}) WHERE id = {id}")).await;
                assert_eq!(seen, round.to_string(), "client {id}");
            }
        });
        futures_util::future::join_all(turns).await;
    }
    // How many find it fresh enough hangs on how busy the machine is.
    wait_until_async(SOON, async || on_followers() > before).await;
    // Connections did lead to the one that lags.
    let sessions = format!("SELECT sessions FROM pg_stat_database WHERE datname = '{name}'");
    wait_until_async(SOON, async || followers[1].psql("postgres", &sessions).unwrap() != "0").await;
}

#[tokio::test]
async fn followers_share_the_clients_and_the_primary_is_the_last_resort() {
    let primary = Cluster::start(named("primary")).unwrap();
    let one = primary.follower(named("one")).unwrap();
    let two = primary.follower(named("two")).unwrap();
    let readers = Readers::start(&primary, &[&one, &two], &[("databases.PLACE_ro.pool_size", "2")]);
    for cluster in [&one, &two] {
        primary.await_replay(cluster, SOON).unwrap();
    }
    wait_until_async(SOON, async || {
        readers.client().await;
        readers.is(&one, "serving") && readers.is(&two, "serving")
    })
    .await;

    // Half of them each; and no more server connections than are allowed, on each.
    let of_role = ConnectionFilter::user(readers.place.name.clone());
    let watches = [&one, &two].map(|cluster| cluster.watch_connections(&of_role).unwrap());
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(readers.client().await);
    }
    let mut at = Vec::new();
    for client in &mut clients {
        at.push(value(client, "SELECT current_setting('cluster_name')").await);
    }
    assert_eq!(at.iter().filter(|at| *at == "one").count(), 4, "{at:?}");
    let busy = clients.into_iter().map(|mut client| async move {
        for _ in 0..20 {
            value(&mut client, "SELECT 1 FROM pg_sleep(0.002)").await;
        }
    });
    futures_util::future::join_all(busy).await;
    for watch in watches {
        assert!(watch.samples() > 0);
        assert!(watch.most() <= 2, "{} server connections", watch.most());
    }

    // Transactions are read-only by themselves, and a follower takes nothing else.
    let mut client = readers.client().await;
    assert_eq!(value(&mut client, "SHOW default_transaction_read_only").await, "on");
    assert_eq!(client.query("CREATE TABLE t (a int)").await.unwrap().sqlstate(), "25006");

    // One is lost: the other has all new ones.
    one.stop_immediate().unwrap();
    wait_until_async(SOON, async || {
        readers.may_be_led_to().await.as_deref() == Some("two") && !readers.is(&one, "serving")
    })
    .await;
    for _ in 0..5 {
        assert_eq!(readers.led_to().await, "two");
    }
    // Both are lost: the primary, where transactions are read-only, too. Nobody is sent away for that.
    two.stop_immediate().unwrap();
    wait_until_async(SOON, async || readers.try_client().await.is_ok() && !readers.is(&two, "serving")).await;
    wait_until_async(SOON, async || readers.led_to().await == "primary").await;
    let mut client = readers.client().await;
    assert_eq!(client.query("CREATE TABLE t (a int)").await.unwrap().sqlstate(), "25006");
    assert_eq!(readers.pgweir.http_get("/readyz").unwrap().0, 200);
    // Where that is not wanted, they are told.
    let strict = Readers::start(&primary, &[&one, &two], &[("primary_reads", "false")]);
    let refused = strict.try_client().await.unwrap_err();
    assert!(refused.contains("57P03") && refused.contains("no follower"), "{refused}");

    // They are back.
    for cluster in [&one, &two] {
        cluster.restart().unwrap();
    }
    wait_until_async(SOON, async || {
        readers.led_to().await != "primary" && readers.is(&one, "serving") && readers.is(&two, "serving")
    })
    .await;
}

#[tokio::test]
async fn what_is_defined_is_seen_though_only_followers_have_clients() {
    let primary = Cluster::start(named("primary")).unwrap();
    let one = primary.follower(named("one")).unwrap();
    let settings =
        [("databases.PLACE_ro.pool_size", "1"), ("server_idle_timeout", "1s"), ("catalog_check_interval", "100ms")];
    let readers = Readers::start(&primary, &[&one], &settings);
    let define = |body: &str| {
        readers.place.psql(&format!("CREATE OR REPLACE FUNCTION tenant() RETURNS text LANGUAGE sql AS $$ {body} $$"));
        primary.await_replay(&one, SOON).unwrap();
    };
    define("SELECT 'none'");
    wait_until_async(SOON, async || readers.led_to().await == "one").await;
    let [mut client, mut other] = [readers.client().await, readers.client().await];
    assert_eq!(value(&mut client, "SELECT tenant()").await, "none");
    let of_role = format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{}'", readers.place.name);
    wait_until_async(SOON, async || primary.psql("postgres", &of_role).unwrap() == "0").await;
    // From now on it leaves something on the server connection, which the two clients share.
    define("SELECT set_config('app.tenant', 'leaked', false)");
    let mut leaks = async || {
        assert_eq!(value(&mut client, "SELECT tenant()").await, "leaked");
        other.query("SELECT current_setting('app.tenant', true)").await.unwrap().value() == Some("leaked")
    };
    wait_until_async(SOON, async || !leaks().await).await;
    for _ in 0..10 {
        assert!(!leaks().await);
    }
    assert_eq!(primary.psql("postgres", &of_role).unwrap(), "0", "the primary was asked");
}

#[tokio::test]
async fn one_that_comes_back_behind_is_not_trusted_for_what_it_once_had() {
    let primary = Cluster::start(named("primary")).unwrap();
    let one = primary.follower(named("one")).unwrap();
    let settings = [("read_routing", "auto"), ("read_freshness", "session")];
    let readers = Readers::start(&primary, &[&one], &settings);
    let mut client = Wire::connect(readers.pgweir.addr()).await.unwrap();
    let parameters = [("user", &*readers.place.name), ("database", &*readers.place.name)];
    client.login_with(&parameters, PASSWORD).await.unwrap();
    let read = async |client: &mut Wire| {
        let error = client.query("BEGIN READ ONLY").await.unwrap().error;
        assert!(error.is_none(), "{error:?}");
        let at = value(client, "SELECT current_setting('cluster_name')").await;
        let seen = value(client, "SELECT count(*) FROM t").await;
        client.query("COMMIT").await.unwrap();
        (at, seen)
    };
    for sql in ["CREATE TABLE t (a int)", "INSERT INTO t VALUES (1)"] {
        let outcome = client.query(sql).await.unwrap();
        assert!(outcome.error.is_none(), "{outcome:?}");
    }
    wait_until_async(SOON, async || read(&mut client).await == ("one".to_owned(), "1".to_owned())).await;
    // From here on it keeps back what it gets, once it has begun anew.
    one.psql("postgres", "CHECKPOINT").unwrap();
    one.psql("postgres", "ALTER SYSTEM SET recovery_min_apply_delay = '1h'").unwrap();
    client.query("INSERT INTO t VALUES (2)").await.unwrap();
    wait_until_async(SOON, async || read(&mut client).await == ("one".to_owned(), "2".to_owned())).await;
    one.kill_hard();
    one.restart().unwrap();
    let behind = one.psql(&readers.place.name, "SELECT count(*) FROM t").unwrap();
    assert_eq!(behind, "1", "it did not come back behind, so that this shows nothing");
    wait_until_async(SOON, async || {
        assert_eq!(read(&mut client).await, ("primary".to_owned(), "2".to_owned()));
        readers.is(&one, "serving")
    })
    .await;
    for _ in 0..100 {
        assert_eq!(read(&mut client).await, ("primary".to_owned(), "2".to_owned()));
    }
    // It has caught up.
    one.psql("postgres", "ALTER SYSTEM RESET recovery_min_apply_delay").unwrap();
    one.reload().unwrap();
    wait_until_async(SOON, async || read(&mut client).await == ("one".to_owned(), "2".to_owned())).await;
}

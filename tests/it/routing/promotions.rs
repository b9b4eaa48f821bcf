//! A follower takes the primary's place, at the primary's address or by its name, while clients write and read: whoever is between two
//! transactions waits, and sees no error.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::future::{join_all, join3};
use pgweir_harness::wire::{Outcome, Wire, build};
use pgweir_harness::{
    Cluster, ClusterOptions, FaultProxy, Pgweir, PgweirOptions, SUPERUSER, SUPERUSER_PASSWORD, wait_until,
    wait_until_async,
};
use tokio::time::sleep;

use super::in_state;
use crate::stage::{SOON, Stage, run, succeed, value};
use crate::support::{Place, metric_in, options};

/// The table that the clients write, and what was done to it: nothing twice.
const TABLES: &str = "CREATE TABLE registers (id int PRIMARY KEY, value bigint); \
                      INSERT INTO registers SELECT n, 0 FROM generate_series(0, 99) n; \
                      CREATE TABLE done (id int, value bigint)";

/// Clients of each kind; each has a register of its own.
const CLIENTS: usize = 4;

/// What the clients and whoever makes the changes know of each other.
#[derive(Default)]
struct Scene {
    over: AtomicBool,
    /// Those that can are to be between two transactions.
    pause: AtomicBool,
    paused: AtomicUsize,
    /// Statements answered, of all.
    answered: AtomicUsize,
    /// Those that wrote.
    written: AtomicUsize,
}

struct Over<'a>(&'a Scene);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, SeqCst);
        self.0.pause.store(false, SeqCst);
    }
}

/// What came of one client.
#[derive(Debug, Default)]
struct Told {
    errors: Vec<String>,
    longest: Duration,
    /// The last value that was acknowledged.
    acknowledged: i64,
}

/// A client that goes on when its connection is closed.
struct Player<'a> {
    stage: &'a Stage<'a>,
    scene: &'a Scene,
    /// The level of freshness promises that it sees its own writes.
    sees_own: bool,
    client: Wire,
    told: Told,
}

impl Player<'_> {
    /// The answer; none if it was an error.
    async fn ask(&mut self, sql: &str, id: Option<&str>) -> Option<Outcome> {
        let begun = Instant::now();
        let outcome = match id {
            None => self.client.query(sql).await,
            Some(id) => self.client.extended(sql, &[Some(id)]).await,
        };
        self.told.longest = self.told.longest.max(begun.elapsed());
        match outcome {
            Ok(outcome) if outcome.error.is_none() => {
                self.scene.answered.fetch_add(1, SeqCst);
                return Some(outcome);
            }
            Ok(outcome) => self.told.errors.push(outcome.sqlstate().to_owned()),
            Err(error) => {
                let code = error.server_error().map(|error| error.sqlstate().to_owned());
                self.told.errors.push(code.unwrap_or_else(|| error.to_string()));
                self.client = self.stage.client().await;
            }
        }
        None
    }

    async fn read(&mut self, register: usize, turn: u64) -> Option<i64> {
        let id = register.to_string();
        let outcome = if turn.is_multiple_of(2) {
            self.ask(&format!("SELECT value FROM registers WHERE id = {id}"), None).await
        } else {
            self.ask("SELECT value FROM registers WHERE id = $1", Some(&id)).await
        };
        outcome.map(|outcome| outcome.value().unwrap().parse().unwrap())
    }

    /// Writes its register again and again, and reads it back. One that is `gentle` is between two transactions when that is
    /// wanted.
    async fn write_until(mut self, register: usize, gentle: bool) -> Told {
        let (mut value, mut acknowledged) = (0, 0);
        while !self.scene.over.load(SeqCst) {
            if gentle && self.scene.pause.load(SeqCst) {
                self.scene.paused.fetch_add(1, SeqCst);
                while self.scene.pause.load(SeqCst) {
                    sleep(Duration::from_millis(1)).await;
                }
            }
            value += 1;
            let sql = format!(
                "WITH once AS (INSERT INTO done VALUES ({register}, {value})) \
                 UPDATE registers SET value = {value} WHERE id = {register}"
            );
            if self.ask(&sql, None).await.is_none() {
                continue;
            }
            acknowledged = value;
            self.scene.written.fetch_add(1, SeqCst);
            if let Some(got) = self.read(register, u64::try_from(value).unwrap()).await {
                assert!(got == value || !self.sees_own, "it does not see its own write: {got} for {value}");
            }
            sleep(Duration::from_millis(2)).await;
        }
        Told { acknowledged, ..self.told }
    }

    async fn read_until(mut self, register: usize) -> Told {
        let mut turn = 0;
        while !self.scene.over.load(SeqCst) {
            turn += 1;
            if let Some(value) = self.read(register, turn).await {
                // It would be one that was written where nobody follows any more.
                assert!(value >= 0, "{value}");
            }
            sleep(Duration::from_millis(1)).await;
        }
        self.told
    }
}

fn on_followers(pgweir: &Pgweir) -> f64 {
    let (_, body) = pgweir.http_get("/metrics").unwrap();
    metric_in(&body, "pgweir_routes_total", &["reason=\"read\""])
}

#[test]
fn a_promotion_at_the_primarys_address_is_a_wait_and_no_error_for_clients_between_transactions() {
    // Whoever only reads is on followers all the time.
    promote("session");
}

#[test]
#[ignore = "long: three more of the same"]
fn a_promotion_is_a_wait_and_no_error_at_the_other_levels_of_freshness() {
    for level in ["pool", "bounded", "fleet"] {
        promote(level);
    }
}

/// One follower takes the primary's place in order, followers are lost and come back, and the new primary crashes.
fn promote(level: &str) {
    let named = |name: &str| ClusterOptions::default().set("cluster_name", name);
    let primary = Cluster::start(named("primary")).unwrap();
    let followers = ["one", "two", "three"].map(|name| primary.follower(named(name)).unwrap());
    let [one, two, three] = &followers;
    let proxy = FaultProxy::start(primary.addr()).unwrap();
    let place = Place::on(&primary);
    let port = proxy.port().to_string();
    let addresses = followers.each_ref().map(|follower| follower.addr().to_string()).join(", ");
    let settings = [
        ("databases.PLACE.port", &*port),
        ("databases.PLACE.followers", &addresses),
        ("read_routing", "auto"),
        ("read_freshness", level),
        ("read_max_staleness", "100ms"),
        ("read_sample_interval", "5ms"),
        ("default_pool_size", "6"),
        ("query_wait_timeout", "60s"),
        ("shutdown_timeout", "5s"),
    ];
    let pgweir = Pgweir::start_with(options(place.toml(&settings))).unwrap();
    let stage = Stage { place, pgweir };
    stage.own_sql(TABLES);
    for follower in &followers {
        primary.await_replay(follower, SOON).unwrap();
    }
    let scene = Scene::default();
    let name = stage.name();
    thread::scope(|scope| {
        let play = scope.spawn(|| run(Duration::from_mins(4), play(&stage, &scene, level != "bounded")));
        // Whatever fails, the clients end.
        let _over = Over(&scene);
        let until = |what: &str, condition: &dyn Fn() -> bool| {
            let begun = Instant::now();
            while !condition() {
                assert!(!play.is_finished(), "{what}: a client failed");
                let late = begun.elapsed() > 2 * SOON;
                assert!(!late, "{what}: {}\n{}", stage.pgweir.http_get("/metrics").unwrap().1, stage.pgweir.log());
                thread::sleep(Duration::from_millis(5));
            }
        };
        let more = |what: &str| {
            let before = scene.answered.load(SeqCst);
            until(what, &|| scene.answered.load(SeqCst) > before + 100);
        };
        let serving = |follower: &Cluster| in_state(&stage.pgweir, follower, "serving");
        more("at first");
        until("all serve", &|| followers.iter().all(serving));
        until("reads on followers", &|| on_followers(&stage.pgweir) > 100.0);

        // The primary goes, in order: what it has acknowledged is on the followers.
        scene.pause.store(true, SeqCst);
        until("a pause", &|| scene.paused.load(SeqCst) == CLIENTS);
        primary.stop().unwrap();
        scene.pause.store(false, SeqCst);
        thread::sleep(Duration::from_millis(500));
        // One takes its place, as who is reached by its name.
        one.psql("postgres", "SELECT pg_promote()").unwrap();
        let before = scene.written.load(SeqCst);
        proxy.lead_to(one.addr());
        // Until it has been written to, nothing tells those that follow the old one from those that follow the new one.
        until("writes after the promotion", &|| scene.written.load(SeqCst) > before + 10);
        // Another one follows it from now on.
        let conninfo =
            format!("host={} port={} user={SUPERUSER} password={SUPERUSER_PASSWORD}", one.addr().ip(), one.port());
        two.psql("postgres", &format!("ALTER SYSTEM SET primary_conninfo = '{conninfo}'")).unwrap();
        two.reload().unwrap();
        one.psql("postgres", "CHECKPOINT").unwrap();
        one.await_replay(two, SOON).unwrap();
        // The old one is back, and one that follows it: both go on by themselves, past where the new one is.
        primary.restart().unwrap();
        primary.psql(name, "UPDATE registers SET value = -1").unwrap();
        primary.psql(name, "CREATE TABLE astray AS SELECT generate_series(1, 200000) n").unwrap();
        primary.await_replay(three, SOON).unwrap();
        // At its next restartpoint it tells its new timeline.
        two.psql("postgres", "CHECKPOINT").unwrap();
        let before = on_followers(&stage.pgweir);
        until("one serves", &|| serving(two) && on_followers(&stage.pgweir) > before + 50.0);
        more("with one follower");
        assert!(!serving(three) && !serving(one));

        // All are lost, and come back.
        for follower in [two, three] {
            follower.kill_hard();
        }
        more("without followers");
        two.restart().unwrap();
        until("it is back", &|| serving(two));
        more("with one follower again");

        // The primary crashes.
        scene.pause.store(true, SeqCst);
        until("another pause", &|| scene.paused.load(SeqCst) == 2 * CLIENTS);
        one.kill_hard();
        // Until then, whoever sends something to a connection that is no more cannot know that nobody has it.
        until("the loss of all connections", &|| proxy.open() == 0);
        scene.pause.store(false, SeqCst);
        one.restart().unwrap();
        let before = (scene.written.load(SeqCst), on_followers(&stage.pgweir));
        until("writes after the crash", &|| scene.written.load(SeqCst) > before.0 + 10);
        until("reads after the crash", &|| serving(two) && on_followers(&stage.pgweir) > before.1 + 50.0);
        more("at last");
        scene.over.store(true, SeqCst);
        let [gentle, busy, readers] = play.join().unwrap();
        println!("{gentle:#?} {busy:#?} {readers:#?}");
        for told in &gentle {
            assert!(told.errors.is_empty(), "{told:?}");
        }
        for told in busy.iter().chain(&readers) {
            // What was under way on the primary when it went.
            let lost = |code: &String| code.starts_with("57P0") || code.starts_with("08");
            assert!(told.errors.len() <= 2 && told.errors.iter().all(lost), "{told:?}");
        }
        let twice = "SELECT count(*) FROM (SELECT FROM done GROUP BY id, value HAVING count(*) > 1) AS twice";
        assert_eq!(one.psql(name, twice).unwrap(), "0", "writes that were done twice");
        for (register, told) in gentle.iter().chain(&busy).enumerate() {
            let kept = one.psql(name, &format!("SELECT value FROM registers WHERE id = {register}")).unwrap();
            assert!(kept.parse::<i64>().unwrap() >= told.acknowledged, "{register}: {kept}, {told:?}");
        }
    });
    let log = stage.pgweir.log();
    for follower in &followers {
        let address = follower.addr().to_string();
        let changes = |line: &&str| line.contains(&address) && line.contains("before=");
        let changes = log.lines().filter(changes).count();
        println!("{address}: its state changed {changes} times");
        assert!(changes <= 16, "{changes} changes: {log}");
    }
}

/// A program that runs pgweir with a file of its own in the place of `/etc/hosts`. None where no program may have a view of
/// its own of the file system.
fn with_names(folder: &Path, hosts: &Path) -> Option<PathBuf> {
    let may = Command::new("unshare").args(["--mount", "true"]).status().is_ok_and(|status| status.success());
    let script = folder.join("pgweir");
    let text = "#!/bin/sh\nexec unshare --mount sh -c 'mount --bind \"$0\" /etc/hosts && exec \"$@\"' ";
    let text = format!("{text} {} {} \"$@\"\n", hosts.display(), env!("CARGO_BIN_EXE_pgweir"));
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    may.then_some(script)
}

#[test]
fn a_name_that_leads_elsewhere_after_a_promotion_is_looked_up_anew() {
    const NAME: &str = "database.pgweir.test";
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("hosts");
    let leads_to = |address: Ipv4Addr| fs::write(&hosts, format!("127.0.0.1 localhost\n{address} {NAME}\n")).unwrap();
    let Some(bin) = with_names(folder.path(), &hosts) else {
        println!("this test needs `unshare --mount`: it shows nothing here");
        return;
    };
    let primary = Cluster::start(ClusterOptions::default()).unwrap();
    let follower = primary.follower(ClusterOptions::default()).unwrap();
    // Both at the same port, by which the name leads to them.
    let [before, after] = [Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)];
    let port = FaultProxy::start(primary.addr()).unwrap().port();
    let at =
        |address: Ipv4Addr, cluster: &Cluster| FaultProxy::start_at((address, port).into(), cluster.addr()).unwrap();
    let _proxies = [at(before, &primary), at(after, &follower)];
    leads_to(before);
    let place = Place::on(&primary);
    let (port, address) = (port.to_string(), follower.addr().to_string());
    let settings = [
        ("databases.PLACE.host", NAME),
        ("databases.PLACE.port", &*port),
        ("databases.PLACE.followers", &*address),
        ("read_routing", "auto"),
        ("read_sample_interval", "5ms"),
        ("query_wait_timeout", "60s"),
    ];
    let options = PgweirOptions { bin: Some(bin), ..options(place.toml(&settings)) };
    let stage = Stage { pgweir: Pgweir::start_with(options).unwrap(), place };
    stage.own_sql("CREATE TABLE registers (id int PRIMARY KEY, value bigint); INSERT INTO registers VALUES (1, 0)");
    primary.await_replay(&follower, SOON).unwrap();
    run(Duration::from_mins(1), async {
        let (mut one, mut two) = (stage.client().await, stage.client().await);
        succeed(&mut one, "UPDATE registers SET value = 1").await;
        wait_until_async(SOON, async || {
            assert_eq!(value(&mut two, "SELECT value FROM registers").await, "1");
            in_state(&stage.pgweir, &follower, "serving")
        })
        .await;
        primary.stop().unwrap();
        one.send(&build::query("UPDATE registers SET value = 2 RETURNING value")).await.unwrap();
        // It is tried where the name still leads.
        stage.pgweir.wait_log("server login failed", SOON).unwrap();
        follower.psql("postgres", "SELECT pg_promote()").unwrap();
        leads_to(after);
        assert_eq!(one.outcome().await.unwrap().value(), Some("2"));
        assert_eq!(value(&mut two, "SELECT value FROM registers").await, "2");
        succeed(&mut two, "UPDATE registers SET value = 3").await;
        assert_eq!(value(&mut one, "SELECT value FROM registers").await, "3");
    });
    assert_eq!(follower.psql(stage.name(), "SELECT value FROM registers").unwrap(), "3");
}

#[test]
fn a_standby_where_the_primary_was_is_left_when_it_refuses_a_write() {
    const WRITE: &str = "INSERT INTO registers VALUES (1)";
    let primary = Cluster::start(ClusterOptions::default()).unwrap();
    let standby = primary.follower(ClusterOptions::default()).unwrap();
    // A name that still leads to the server that was the primary, for whoever comes now.
    let proxy = FaultProxy::start(standby.addr()).unwrap();
    let place = Place::on(&primary);
    place.psql(&format!("SET ROLE {}; CREATE TABLE registers (id int)", place.name));
    primary.await_replay(&standby, SOON).unwrap();
    let port = proxy.port().to_string();
    let stage = Stage::at(place, &[("databases.PLACE.port", &port), ("default_pool_size", "2")], &[]);
    run(Duration::from_mins(1), async {
        let (mut one, mut two) = (stage.client().await, stage.client().await);
        // Both server connections lead there.
        succeed(&mut one, "BEGIN").await;
        assert_eq!(two.query(WRITE).await.unwrap().sqlstate(), "25006");
        succeed(&mut one, "COMMIT").await;
        // Whoever only reads is served, and a new connection that refuses is no reason for another one.
        assert_eq!(value(&mut one, "SELECT count(*) FROM registers").await, "0");
        let backends = |cluster: &Cluster| {
            let all = format!("SELECT pid FROM pg_stat_activity WHERE usename = '{}' ORDER BY 1", stage.name());
            cluster.psql("postgres", &all).unwrap()
        };
        let before = backends(&standby);
        assert_eq!(before.lines().count(), 2);
        assert_eq!(one.query(WRITE).await.unwrap().sqlstate(), "25006");
        assert_eq!(backends(&standby), before);
        proxy.lead_to(primary.addr());
        wait_until_async(SOON, async || one.query(WRITE).await.unwrap().error.is_none()).await;
        // The other one is left with it.
        wait_until(SOON, || backends(&standby).is_empty());
        succeed(&mut two, WRITE).await;
    });
}

/// What came of the gentle, of the busy, and of those that only read.
async fn play(stage: &Stage<'_>, scene: &Scene, sees_own: bool) -> [Vec<Told>; 3] {
    let mut players = Vec::new();
    for _ in 0..3 * CLIENTS {
        let client = stage.client().await;
        players.push(Player { stage, scene, sees_own, client, told: Told::default() });
    }
    let mut players = players.into_iter().enumerate();
    let gentle = join_all(players.by_ref().take(CLIENTS).map(|(at, player)| player.write_until(at, true)));
    let busy = join_all(players.by_ref().take(CLIENTS).map(|(at, player)| player.write_until(at, false)));
    let readers = join_all(players.map(|(at, player)| player.read_until(at % CLIENTS)));
    let (gentle, busy, readers) = join3(gentle, busy, readers).await;
    [gentle, busy, readers]
}

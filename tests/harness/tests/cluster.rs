//! The cluster, tested by use.
#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgweir_harness::wire::{ServerError, Wire};
use pgweir_harness::{Auth, Cluster, ClusterOptions, ConnectionFilter, HarnessError, Role, ServerPrograms, wait_until};

const SOON: Duration = Duration::from_secs(20);

fn alive(pid: u32) -> bool {
    // A zombie is dead; its parent has only not looked yet.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn processes_in(directory: &Path) -> Vec<String> {
    let needle = directory.to_string_lossy().into_owned();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok())
        .filter(|line| line.contains(&needle))
        .collect()
}

#[test]
fn a_cluster_starts_answers_and_leaves_nothing() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let version = cluster.psql("postgres", "SHOW server_version").unwrap();
    assert!(version.starts_with(cluster.programs().version()));
    assert_eq!(cluster.psql("app", "SELECT 1, NULL, 'x' UNION ALL SELECT 2, 3, 'y'").unwrap(), "1||x\n2|3|y");
    assert!(cluster.log_text().contains("ready to accept connections"));
    let (pid, home) = (cluster.pid().unwrap(), cluster.home_dir().to_path_buf());
    assert!(!processes_in(&home).is_empty());
    drop(cluster);
    assert!(!alive(pid));
    assert!(!home.exists());
    wait_until(SOON, || processes_in(&home).is_empty());
}

#[test]
fn a_second_cluster_starts_fast() {
    drop(Cluster::start(ClusterOptions::default()).unwrap());
    let took = || {
        let start = Instant::now();
        let cluster = Cluster::start(ClusterOptions::default()).unwrap();
        let took = start.elapsed();
        drop(cluster);
        println!("started in {took:?}");
        took
    };
    // Below a second on an idle machine; initdb alone takes longer than this on a busy one, which may keep it waiting now and then.
    assert!((0..5).any(|_| took() < Duration::from_secs(5)));
}

#[test]
fn a_cluster_is_a_copy_of_all_others_unless_it_is_to_have_its_own_system() {
    let options = ClusterOptions::default;
    let [one, other, own] =
        [options(), options(), options().own_system()].map(|options| Cluster::start(options).unwrap());
    let system =
        |cluster: &Cluster| cluster.psql("postgres", "SELECT system_identifier FROM pg_control_system()").unwrap();
    assert_eq!(system(&one), system(&other));
    assert_ne!(system(&one), system(&own));
    assert_eq!(own.psql("app", "SELECT 1").unwrap(), "1");
}

#[test]
fn settings_roles_and_databases_are_as_asked() {
    let cluster = Cluster::start(
        ClusterOptions::default()
            .set("max_connections", "17")
            .set("search_path", r#""it's \ odd""#)
            .role(Role::new("Odd\"one", "it's odd").with("CONNECTION LIMIT 2"))
            .database("more", "app"),
    )
    .unwrap();
    let ask = |sql| cluster.psql("more", sql).unwrap();
    assert_eq!(ask("SHOW max_connections"), "17");
    assert_eq!(ask("SHOW search_path"), r#""it's \ odd""#);
    assert_eq!(ask("SELECT rolconnlimit FROM pg_roles WHERE rolname = 'Odd\"one'"), "2");
    assert_eq!(ask("SELECT rolsuper FROM pg_roles WHERE rolname = 'app'"), "f");
    let owner = ask("SELECT datdba::regrole FROM pg_database WHERE datname = current_database()");
    assert_eq!(owner, "app");
}

#[test]
fn a_refused_setting_is_reported_with_the_log() {
    let refused = Cluster::start(ClusterOptions::default().set("max_connections", "many"));
    let error = refused.unwrap_err();
    assert!(matches!(error, HarnessError::Ended { .. }));
    assert!(error.to_string().contains("max_connections"), "{error}");
}

#[test]
fn sql_errors_keep_their_sqlstate() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    match cluster.psql("postgres", "SELECT 1/0") {
        Err(HarnessError::Sql { error, .. }) => assert_eq!(error.sqlstate(), "22012"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_stopped_cluster_restarts_on_its_port_with_its_data() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let port = cluster.port();
    cluster.psql("app", "CREATE TABLE t AS SELECT 42 AS n").unwrap();
    let any = ConnectionFilter::any();
    assert_eq!(cluster.count_connections(&any).unwrap(), 0);
    cluster.stop().unwrap();
    assert_eq!(cluster.pid(), None);
    assert!(std::net::TcpStream::connect(cluster.addr()).is_err());
    cluster.restart().unwrap();
    cluster.kill_hard();
    assert!(std::net::TcpStream::connect(cluster.addr()).is_err());
    cluster.restart().unwrap();
    assert_eq!(cluster.psql("app", "SELECT n FROM t").unwrap(), "42");
    assert_eq!(cluster.count_connections(&any).unwrap(), 0);
    assert_eq!(cluster.port(), port);
}

#[test]
fn postgres_18_has_followers_without_pg_basebackup() {
    let programs = ServerPrograms::find_18().unwrap();
    let primary = Cluster::start_with(&programs, ClusterOptions::default()).unwrap();
    assert!(primary.psql("postgres", "SHOW server_version").unwrap().starts_with("18"));
    primary.psql("app", "CREATE TABLE t AS SELECT 1 AS before").unwrap();
    let follower = primary.follower(ClusterOptions::default()).unwrap();
    primary.psql("app", "INSERT INTO t VALUES (2)").unwrap();
    primary.await_replay(&follower, SOON).unwrap();
    assert_eq!(follower.psql("app", "SELECT sum(before), pg_is_in_recovery() FROM t").unwrap(), "3|t");
}

#[test]
fn a_follower_streams_and_refuses_writes() {
    let primary = Cluster::start(ClusterOptions::default().set("max_connections", "50")).unwrap();
    let follower = primary.follower(ClusterOptions::default()).unwrap();
    primary.psql("app", "CREATE TABLE t AS SELECT 7 AS n").unwrap();
    primary.await_replay(&follower, SOON).unwrap();
    let ask = |sql| follower.psql("app", sql);
    assert_eq!(ask("SELECT n FROM t").unwrap(), "7");
    assert_eq!(ask("SELECT pg_is_in_recovery()").unwrap(), "t");
    assert_eq!(ask("SHOW max_connections").unwrap(), "50");
    match ask("CREATE TABLE u ()") {
        Err(HarnessError::Sql { error, .. }) => assert_eq!(error.sqlstate(), "25006"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn connections_are_counted_by_user_and_name() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let watch = cluster.watch_connections(&ConnectionFilter::user("app")).unwrap();
    let mut clients = Vec::new();
    for name in ["a", "a", "b"] {
        let mut wire = Wire::connect(cluster.addr()).await.unwrap();
        let parameters = [("user", "app"), ("database", "app"), ("application_name", name)];
        wire.login_with(&parameters, "app-secret").await.unwrap();
        clients.push(wire);
    }
    let count = |filter| cluster.count_connections(&filter).unwrap();
    assert_eq!(count(ConnectionFilter::user("app")), 3);
    assert_eq!(count(ConnectionFilter::user("postgres")), 0);
    assert_eq!(count(ConnectionFilter::application_name("a")), 2);
    wait_until(SOON, || watch.most() == 3);
    drop(clients);
    wait_until(SOON, || count(ConnectionFilter::any()) == 0);
    assert_eq!(watch.most(), 3, "the most, not the last");
    assert!(watch.samples() >= 2);
    let start = Instant::now();
    for _ in 0..100 {
        count(ConnectionFilter::any());
    }
    println!("one count takes {:?}", start.elapsed() / 100);
}

#[tokio::test]
async fn each_way_to_log_in_asks_for_what_it_should() {
    // What the server's first message is: §53.7, Authentication messages.
    let table = [(Auth::Trust, 0), (Auth::Cleartext, 3), (Auth::Md5, 5), (Auth::Scram, 10)];
    for (auth, kind) in table {
        let options = ClusterOptions::auth(auth).role(Role::new("more", "pass word"));
        let cluster = Cluster::start(options).unwrap();
        let mut wire = Wire::connect(cluster.addr()).await.unwrap();
        wire.startup(&[("user", "more"), ("database", "app")]).await.unwrap();
        let first = wire.recv().await.unwrap();
        assert_eq!(first.authentication().unwrap().0, kind, "{auth:?}");
        for (user, password) in [("more", "pass word"), ("app", "app-secret")] {
            let mut wire = Wire::open(cluster.addr(), user, "app", password).await.unwrap();
            let answer = wire.query("SELECT current_user").await.unwrap();
            assert_eq!(answer.value(), Some(user), "{auth:?}");
        }
        let wrong = Wire::open(cluster.addr(), "app", "app", "wrong").await;
        let refused = wrong.err().and_then(|error| error.server_error());
        let sqlstate = refused.as_ref().map(ServerError::sqlstate);
        let want = (auth != Auth::Trust).then_some("28P01");
        assert_eq!(sqlstate, want, "{auth:?}");
    }
}

#[tokio::test]
async fn the_url_logs_in() {
    let cluster = Cluster::start(ClusterOptions::default().role(Role::new("o d", "p@:/ ssword"))).unwrap();
    for (url, user) in [(cluster.url("o d", "app"), "o d"), (cluster.superuser_url(), "postgres")] {
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
        let running = tokio::spawn(connection);
        let row = client.query_one("SELECT current_user::text", &[]).await.unwrap();
        assert_eq!(row.get::<_, String>(0), user);
        drop(client);
        running.await.unwrap().unwrap();
    }
}

/// Holds a cluster until killed, when started by the test below; otherwise does nothing.
#[test]
fn holder() {
    let Some(report) = std::env::var_os("HARNESS_HOLDER_REPORT") else {
        return;
    };
    // In a thread that ends at once: the cluster must outlive it.
    let starting = std::thread::spawn(|| Cluster::start(ClusterOptions::default()).unwrap());
    let cluster = starting.join().unwrap();
    cluster.psql("postgres", "SELECT 1").unwrap();
    let text = format!("{} {}", cluster.pid().unwrap(), cluster.home_dir().display());
    let partial = Path::new(&report).with_extension("partial");
    fs::write(&partial, text).unwrap();
    fs::rename(&partial, &report).unwrap();
    std::thread::sleep(Duration::from_mins(5));
}

#[test]
fn a_killed_test_leaves_no_postgres_behind() {
    let report = std::env::temp_dir().join(format!("harness-holder-{}", std::process::id()));
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "holder"])
        .env("HARNESS_HOLDER_REPORT", &report)
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    wait_until(Duration::from_mins(1), || report.exists());
    let text = fs::read_to_string(&report).unwrap();
    fs::remove_file(&report).unwrap();
    let (pid, home) = text.split_once(' ').unwrap();
    let pid = pid.parse().unwrap();
    assert!(alive(pid));
    holder.kill().unwrap();
    holder.wait().unwrap();
    wait_until(SOON, || !alive(pid) && processes_in(Path::new(home)).is_empty());
    // The next cluster sweeps the directory.
    drop(Cluster::start(ClusterOptions::default()).unwrap());
    assert!(!Path::new(home).exists());
}

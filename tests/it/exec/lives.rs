//! A wrapper's longer life: failures of the data plane and of the server, deploys, real applications.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::query;
use pgweir_harness::{Cluster, ClusterOptions, FaultProxy, SUPERUSER, SUPERUSER_PASSWORD, wait_until};

use super::wrapped::Wrapping;
use super::{place, psql, url, url_at};
use crate::drivers::{python, scripts};
use crate::support::{PASSWORD, Place, SOON, primary};
use crate::tls::TlsPrimary;
use crate::tls::pki::self_signed;

/// An application of `tests/drivers` under a wrapper.
fn application(program: &str, file: &str, place: &Place<'_>, arguments: &[&str]) -> Wrapping {
    let path = scripts().join(file);
    let mut words = vec!["exec", "--", program, path.to_str().unwrap()];
    words.extend(arguments);
    Wrapping::new(&words).var("DATABASE_URL", &url(place))
}

/// The drivers' Python.
fn snake() -> String {
    python().to_str().unwrap().to_owned()
}

#[test]
fn a_data_plane_that_fails_is_started_anew_and_the_application_lives() {
    let (place, _, _) = place();
    // The worker panics two seconds after each start.
    let wrapped =
        application(&snake(), "exec_persistent.py", &place, &["12"]).var("PGWEIR_TEST_PANIC", "worker").start();
    let ended = wrapped.finish();
    assert!(ended.err.matches("data plane started anew").count() >= 2, "{}", ended.err);
    let out = ended.well();
    let (worked, failed) = figures(&out);
    assert!(worked > 30 && failed > 0 && failed < worked, "{out}");
    wait_until(SOON, || place.servers() == 0);
}

#[test]
fn a_data_plane_that_hangs_is_replaced_and_the_cap_holds_until_its_connections_have_ended() {
    let (place, url, psql) = place();
    let watch = place.cap_watch(1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hang");
    // The query runs on when nobody is there for it any more.
    let script = format!(
        "{psql} 'SELECT pg_sleep(600)'; echo cut; {psql} 'SELECT 5'; echo served; read line; {psql} 'SELECT 6'; exit 0"
    );
    let mut wrapped = Wrapping::sh(&url, &script)
        .var("PGBOUNCER_DEFAULT_POOL_SIZE", "1")
        .var("PGWEIR_TEST_PANIC", &format!("hang={}", file.display()))
        .start();
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)' AND state = 'active'";
    wait_until(SOON, || place.psql(asleep) == "1");
    std::fs::write(&file, "").unwrap();
    // On a busy machine its worker is hardly ever seen asleep.
    wait_until(12 * SOON, || wrapped.said().contains("cut"));
    wait_until(3 * SOON, || wrapped.said().contains("served"));
    // The thread wakes up and finds that another serves in its place.
    std::fs::write(folder.path().join("hang.over"), "").unwrap();
    wrapped.tell("go on");
    let ended = wrapped.finish();
    let log = ended.err.clone();
    assert_eq!(ended.well(), "cut\n5\nserved\n6\n");
    assert!(log.contains("worker hangs: its connections are ended") && log.contains("servers=1"), "{log}");
    assert_eq!(log.matches("data plane started anew").count(), 1, "{log}");
    wait_until(SOON, || place.servers() == 0);
    assert!(watch.finish() > 0);
}

#[tokio::test]
async fn a_login_under_way_when_a_data_plane_hangs_counts_until_its_server_has_ended_it() {
    // No process of this server gets further than its authentication while somebody has the lock.
    let options = ClusterOptions::default().set("autovacuum", "off");
    let cluster = tokio::task::spawn_blocking(|| Cluster::start(options)).await.unwrap().unwrap();
    let place = Place::on(&cluster);
    let superuser = async || Wire::open(cluster.addr(), SUPERUSER, "postgres", SUPERUSER_PASSWORD).await.unwrap();
    let (mut holder, mut eye) = (superuser().await, superuser().await);
    let mut logins = async || {
        let sql = "SELECT count(*) FROM pg_locks WHERE relation = 'pg_db_role_setting'::regclass AND NOT granted";
        eye.query(sql).await.unwrap().value().unwrap().parse::<u32>().unwrap()
    };
    let pause = async || tokio::time::sleep(Duration::from_millis(50)).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hang");
    let psql = psql(&place);
    let lock = "BEGIN; LOCK TABLE pg_catalog.pg_db_role_setting IN ACCESS EXCLUSIVE MODE";
    assert_eq!(holder.query(lock).await.unwrap().error, None);
    let script = format!("{psql} 'SELECT 1'; echo cut; {psql} 'SELECT 5'; exit 0");
    let wrapped = Wrapping::sh(&url(&place), &script)
        .var("PGBOUNCER_DEFAULT_POOL_SIZE", "1")
        .var("PGWEIR_TEST_PANIC", &format!("hang={}", file.display()))
        .start();
    let begun = Instant::now();
    while logins().await == 0 {
        assert!(begun.elapsed() < SOON, "nobody logs in");
        pause().await;
    }
    std::fs::write(&file, "").unwrap();
    while !wrapped.log().contains("data plane started anew") {
        assert!(begun.elapsed() < 5 * SOON, "{}", wrapped.log());
        pause().await;
    }
    // The second client waits: its login would be one more.
    let anew = Instant::now();
    while anew.elapsed() < Duration::from_secs(4) {
        assert!(logins().await <= 1, "{}", wrapped.log());
        pause().await;
    }
    assert_eq!(wrapped.said(), "cut\n");
    assert_eq!(holder.query("ROLLBACK").await.unwrap().error, None);
    std::fs::write(folder.path().join("hang.over"), "").unwrap();
    let ended = tokio::task::spawn_blocking(|| wrapped.finish()).await.unwrap();
    assert!(ended.err.contains("servers=1"), "{}", ended.err);
    assert_eq!(ended.well(), "cut\n5\n");
}

#[test]
fn a_worker_that_is_stuck_at_sigterm_is_cut_and_what_it_had_counts_for_the_next_one() {
    let (place, url, psql) = place();
    let watch = place.cap_watch(1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hang");
    // The application goes on.
    let script = format!(
        "trap '' TERM; {psql} 'SELECT pg_sleep(61)'; echo cut; until {psql} 'SELECT 5'; do sleep 1; done; exit 0"
    );
    let wrapped = Wrapping::sh(&url, &script)
        .var("PGBOUNCER_DEFAULT_POOL_SIZE", "1")
        .var("PGWEIR_SHUTDOWN_TIMEOUT", "1s")
        .var("PGWEIR_TEST_PANIC", &format!("hang={}", file.display()))
        .start();
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(61)' AND state = 'active'";
    wait_until(SOON, || place.psql(asleep) == "1");
    std::fs::write(&file, "").unwrap();
    wait_until(SOON, || !file.exists());
    wrapped.signal(libc::SIGTERM);
    // Within a second for transactions and five for the worker. The query runs on, for nobody.
    wait_until(2 * SOON, || wrapped.said().contains("cut"));
    assert_eq!(place.psql(asleep), "1");
    // The next one begins 15 s later, and cancels it first.
    wait_until(3 * SOON, || wrapped.said().contains('5'));
    std::fs::write(folder.path().join("hang.over"), "").unwrap();
    assert_eq!(wrapped.finish().well(), "cut\n5\n");
    wait_until(SOON, || place.servers() == 0);
    assert!(watch.finish() > 0);
}

#[tokio::test]
async fn a_server_that_vanishes_is_missed_within_30_s_whether_it_was_asked_or_was_about_to_be() {
    let place = Place::on(primary());
    let proxy = FaultProxy::start(place.cluster.addr()).unwrap();
    let script = "echo \"$DATABASE_URL\"; read line; exit 0";
    let mut wrapped = Wrapping::sh(&url_at(&place, proxy.addr()), script).start();
    wrapped.await_said("sslmode");
    let said = wrapped.said();
    let address: SocketAddr = said.split(['@', '/']).find_map(|part| part.parse().ok()).unwrap();
    let open = async || {
        let mut client = Wire::open(address, &place.name, &place.name, PASSWORD).await.unwrap();
        client.set_patience(Duration::from_mins(1));
        client
    };
    let (mut asked, mut about_to) = (open().await, open().await);
    asked.send(&query("SELECT pg_sleep(600)")).await.unwrap();
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)' AND state = 'active'";
    wait_until(SOON, || place.psql(asleep) == "1");
    assert_eq!(about_to.query("BEGIN").await.unwrap().status, b'T');
    proxy.vanish();
    let gone = Instant::now();
    about_to.send(&query("SELECT 1")).await.unwrap();
    let lost = async |client: &mut Wire| (client.outcome().await.unwrap().sqlstate().to_owned(), gone.elapsed());
    let (asked, about_to) = tokio::join!(lost(&mut asked), lost(&mut about_to));
    println!("asked: told after {:?}; about to be: after {:?}", asked.1, about_to.1);
    // 30 s, and what a busy machine needs to tell.
    for (sqlstate, after) in [asked, about_to] {
        assert!(sqlstate == "08006" && after < Duration::from_secs(32), "{sqlstate} after {after:?}");
    }
    let log = wrapped.log();
    assert_eq!(log.matches("what was sent is not acknowledged").count(), 1, "the other one was probed: {log}");
    assert_eq!(open().await.query("SELECT 2").await.unwrap().value(), Some("2"), "a new connection is whole");
    for pid in place.server_pids() {
        place.psql(&format!("SELECT pg_terminate_backend({pid})"));
    }
    wrapped.tell("go on");
    wrapped.finish().well();
}

/// What `exec_persistent.py` says: queries that worked, and those that failed.
fn figures(out: &str) -> (u32, u32) {
    let mut numbers = out.split_whitespace().map(|word| word.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

#[test]
fn a_primary_that_restarts_under_load_is_found_again() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let place = Place::on(&cluster);
    let wrapped = application(&snake(), "exec_persistent.py", &place, &["6"]).start();
    wait_until(SOON, || place.servers() > 0);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_secs(1));
        cluster.restart().unwrap();
    }
    let ended = wrapped.finish();
    assert!(!ended.err.contains("data plane"), "{}", ended.err);
    let (worked, failed) = figures(&ended.well());
    assert!(worked > 30 && failed < worked, "{worked} worked, {failed} failed");
}

#[test]
fn a_password_that_is_revoked_is_told_at_once_and_not_tried_again_and_again() {
    let (place, url, psql) = place();
    let script =
        format!("{psql} 'SELECT 1'; echo asked; read line; for n in 1 2 3; do {psql} 'SELECT 2'; done; exit 0");
    let mut wrapped = Wrapping::sh(&url, &script).start();
    wrapped.await_said("asked");
    place.cluster.psql("postgres", &format!("ALTER ROLE {} PASSWORD 'another-secret'", place.name)).unwrap();
    for pid in place.server_pids() {
        place.psql(&format!("SELECT pg_terminate_backend({pid})"));
    }
    wait_until(SOON, || place.servers() == 0);
    wrapped.tell("go on");
    let ended = wrapped.finish();
    assert!(ended.err.contains("password authentication failed"), "{}", ended.err);
    assert_eq!(ended.out, "1\nasked\n", "nobody got in");
    let log = place.cluster.log_text();
    let failed = format!("password authentication failed for user \"{}\"", place.name);
    let tries = log.lines().filter(|line| line.contains(&failed)).count();
    assert!((1..=6).contains(&tries), "{tries} logins for 3 clients");
}

#[test]
fn the_old_and_the_new_serve_side_by_side_and_the_old_leaves_nothing() {
    let (place, url, psql) = place();
    let watch = place.cap_watch(4);
    let script = format!(
        "trap 'asked=1' TERM; echo ready; while [ -z \"$asked\" ]; do {psql} 'SELECT pg_sleep(0.01)' & {psql} 'SELECT pg_sleep(0.01)' & \
         {psql} 'SELECT pg_sleep(0.01)' & wait; wait; wait; wait; echo round; done; {psql} 'SELECT 7'"
    );
    let start = || {
        let wrapped = Wrapping::sh(&url, &script).var("PGBOUNCER_DEFAULT_POOL_SIZE", "2").start();
        wrapped.await_said("round");
        wrapped
    };
    let mut old = start();
    for _ in 0..2 {
        let new = start();
        old.signal(libc::SIGTERM);
        let ended = old.finish();
        assert!(!ended.err.contains("psql: error"), "{}", ended.err);
        assert!(ended.well().ends_with("7\n"));
        wait_until(SOON, || place.servers() <= 2);
        assert!(!new.log().contains("psql: error"), "{}", new.log());
        old = new;
    }
    old.signal(libc::SIGTERM);
    old.finish().well();
    wait_until(SOON, || place.servers() == 0);
    assert!(watch.finish() > 0);
}

#[test]
fn activerecord_and_django_run_under_it_with_tls_to_a_self_signed_server() {
    let primary = TlsPrimary::take();
    primary.show(&self_signed(|_| {}));
    primary.hba("hostssl all all 127.0.0.1/32 scram-sha-256");
    let place = Place::on(&primary.0);
    place.psql(&format!("GRANT CREATE ON SCHEMA public TO {}", place.name));
    let snake = snake();
    for (program, file) in [("ruby", "exec_activerecord.rb"), (snake.as_str(), "exec_django.py")] {
        let watch = place.cap_watch(2);
        let url = format!("{}?sslmode=require", url(&place));
        let wrapping = application(program, file, &place, &[]).var("PGBOUNCER_DEFAULT_POOL_SIZE", "2");
        let ended = wrapping.var("DATABASE_URL", &url).finish();
        assert_eq!(ended.well(), "ok\n", "{file}");
        assert!(watch.finish() > 0, "{file}");
        wait_until(SOON, || place.servers() == 0);
    }
    primary.hba("host all all 127.0.0.1/32 trust");
}

/// What a server of HTTP answers.
pub(super) fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{path}: {answer}");
    body.to_owned()
}

#[test]
fn puma_serves_under_it_and_ends_in_order_when_every_process_gets_sigterm_twice() {
    let primary = TlsPrimary::take();
    primary.show(&self_signed(|_| {}));
    primary.hba("hostssl all all 127.0.0.1/32 scram-sha-256");
    let place = Place::on(&primary.0);
    place.psql(&format!(
        "CREATE TABLE visits (id serial PRIMARY KEY, path text); ALTER TABLE visits OWNER TO {}",
        place.name
    ));
    let watch = place.cap_watch(2);
    let app = scripts().join("exec_puma.ru");
    let words = ["exec", "--", "puma", "-b", "tcp://127.0.0.1:0", "-t", "3:3", "-w", "2", app.to_str().unwrap()];
    let url = format!("{}?sslmode=require", url(&place));
    let wrapping = Wrapping::new(&words).var("DATABASE_URL", &url).var("PGBOUNCER_DEFAULT_POOL_SIZE", "2");
    let wrapped = wrapping.start();
    wait_until(SOON, || wrapped.said().matches("booted").count() == 2);
    let said = wrapped.said();
    let port = said.split("http://127.0.0.1:").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let browse = |me: usize| {
        (0..15).map(move |number| {
            let path = format!("/{me}/{number}");
            let body = get(port, &path);
            let (seen, process) = body.split_once(", process ").unwrap();
            assert_eq!(seen, path);
            process.to_owned()
        })
    };
    let processes: BTreeSet<String> = std::thread::scope(|scope| {
        let all = (0..6).map(|me| scope.spawn(move || browse(me).collect::<Vec<_>>())).collect::<Vec<_>>();
        all.into_iter().flat_map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(processes.len(), 2, "both of Puma's workers serve");
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| get(port, "/slow"));
        wait_until(SOON, || place.psql("SELECT count(*) FROM visits WHERE path = '/slow'") == "1");
        wrapped.signal_group(libc::SIGTERM);
        wrapped.signal_group(libc::SIGTERM);
        assert!(slow.join().unwrap().starts_with("/slow, "), "a request under way is answered");
    });
    let ended = wrapped.finish();
    assert!(!ended.err.contains("level=error"), "{}", ended.err);
    assert_eq!(place.psql("SELECT count(*) FROM visits"), "91");
    wait_until(SOON, || place.servers() == 0);
    assert!(watch.finish() > 0);
    primary.hba("host all all 127.0.0.1/32 trust");
    assert_eq!((ended.status.code(), ended.status.signal()), (None, Some(libc::SIGTERM)), "as Puma without it");
}

#[test]
fn sigterm_to_the_whole_group_twice_lets_work_be_finished() {
    for variables in [&[][..], &[("DYNO", "web.1"), ("PGWEIR_SERVER_TLS_SSLMODE", "disable")]] {
        let (place, _, _) = place();
        place.psql(&format!("CREATE TABLE work (n int); GRANT ALL ON work TO {}", place.name));
        let mut wrapping = application(&snake(), "exec_draining.py", &place, &["work"]);
        for (name, value) in variables {
            wrapping = wrapping.var(name, value);
        }
        let wrapped = wrapping.start();
        wrapped.await_said("ready");
        wrapped.signal_group(libc::SIGTERM);
        wait_until(SOON, || place.psql("SELECT count(*) FROM work") != "0");
        wrapped.signal_group(libc::SIGTERM);
        let ended = wrapped.finish();
        assert_eq!(ended.status.code(), Some(6), "{}", ended.err);
        // From the platform, and where that is not known to send it to all, from us.
        assert!(ended.out.contains("asked 2") || variables.is_empty(), "{}", ended.out);
        assert_eq!(place.psql("SELECT count(*) FROM work"), "5");
        wait_until(SOON, || place.servers() == 0);
    }
}

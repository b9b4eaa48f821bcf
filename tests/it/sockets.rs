//! Unix-domain sockets on both sides: who may connect, whose they are, and what becomes of their files.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use pgweir_harness::wire::{Wire, build};
use pgweir_harness::{HarnessError, Pgweir, wait_until};
use tempfile::TempDir;

use crate::stage::run;
use crate::support::{PASSWORD, Place, SOON, Site, assert_value, options, primary, start_pgweir};

/// The listening settings of a pooler without TCP; its sockets bear this number.
const PORT: u16 = 6432;

fn directory() -> TempDir {
    let directory = tempfile::Builder::new().prefix("pgweir-s").tempdir_in("/tmp").unwrap();
    // Others have to pass, since some tests log in as another user of the system.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// A pooler on a Unix-domain socket in `directory` alone.
fn toml(place: &Place<'_>, directory: &str, settings: &[(&str, &str)]) -> String {
    let port = PORT.to_string();
    let own =
        [("listen_addr", ""), ("listen_port", &port), ("unix_socket_dir", directory), ("auth_type", "scram-sha-256")];
    place.toml(&own.iter().chain(settings).copied().collect::<Vec<_>>())
}

fn socket(directory: &Path) -> std::path::PathBuf {
    directory.join(format!(".s.PGSQL.{PORT}"))
}

/// psql, over the socket in `host`.
fn psql(host: &str, port: u16, user: &str, database: &str, password: &str) -> Command {
    let mut command = Command::new(primary().programs().program("psql"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    let conninfo = format!("host={host} port={port} user={user} dbname={database} password={password}");
    command.args(["-X", "-w", "-At", "-c", "SELECT 'reached ' || current_user", &conninfo]).stdin(Stdio::null());
    command
}

/// What it printed: the answer, or the complaint.
fn said(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = if output.status.success() { output.stdout } else { output.stderr };
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn refused(outcome: Result<Pgweir, HarnessError>) -> String {
    match outcome {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn psql_logs_in_over_a_socket_alone_with_its_password_and_not_without() {
    let directory = directory();
    let host = directory.path().to_str().unwrap();
    let place = Place::on(primary());
    // Another group than ours, if we may give files away.
    let data = primary().data_dir();
    let output = Command::new("stat").args(["-c", "%G"]).arg(&data).output().unwrap();
    let group = String::from_utf8(output.stdout).unwrap();
    let settings = [("unix_socket_mode", "0770"), ("unix_socket_group", group.trim())];
    let pgweir = start_pgweir(toml(&place, host, &settings));
    assert!(pgweir.addrs().is_empty(), "no TCP: {}", pgweir.log());
    let file = fs::symlink_metadata(socket(directory.path())).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!((file.mode() & 0o777, file.gid()), (0o770, fs::metadata(data).unwrap().gid()));
    let name = &place.name;
    assert_eq!(said(psql(host, PORT, name, name, PASSWORD)), format!("reached {name}"));
    let complaint = said(psql(host, PORT, name, name, "wrong"));
    assert!(complaint.contains("password authentication failed"), "{complaint}");
    let log = pgweir.log();
    assert!(
        log.contains(&format!("addr={}", socket(directory.path()).display())) && log.contains("peer=unix"),
        "{log}"
    );
}

#[test]
fn an_abstract_socket_serves_and_leads_to_servers_too() {
    let place = Place::on(primary());
    let abstract_name = format!("@pgweir-test-{}", std::process::id());
    let _pgweir = start_pgweir(toml(&place, &abstract_name, &[("auth_type", "trust")]));
    let name = &place.name;
    assert_eq!(said(psql(&abstract_name, PORT, name, name, PASSWORD)), format!("reached {name}"));
    // The kernel lets nobody else have it.
    let second = refused(Pgweir::start_with(options(toml(&place, &abstract_name, &[]))));
    assert!(second.contains("it is in use"), "{second}");
    // A pooler in front of that pooler.
    let port = PORT.to_string();
    let settings = [("databases.PLACE.host", &*abstract_name), ("databases.PLACE.port", &port)];
    let front = Site::before(place.clone(), &settings);
    let loopback = psql("127.0.0.1", front.pgweir.port(), name, name, PASSWORD);
    assert_eq!(said(loopback), format!("reached {name}"));
}

#[tokio::test]
async fn a_server_is_reached_over_its_socket_and_so_are_its_cancel_requests() {
    let directory = primary().socket_dir();
    let site = Site::start(&[("databases.PLACE.host", directory.to_str().unwrap())]);
    let mut client = site.client().await;
    assert_value(&client.query("SELECT inet_server_addr() IS NULL").await.unwrap(), "t");
    client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
    wait_until(SOON, || {
        let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND state = 'active' \
                       AND pid <> pg_backend_pid()";
        site.place.psql(running) == "1"
    });
    let mut request = Wire::connect(site.pgweir.addr()).await.unwrap();
    request.send(&build::cancel_request(client.pid, &client.secret)).await.unwrap();
    assert_eq!(client.outcome().await.unwrap().sqlstate(), "57014");
}

#[test]
fn a_socket_beside_tcp_is_named_after_its_port_and_several_directories_have_one_each() {
    let (first, second) = (directory(), directory());
    let list = format!("{}, {}", first.path().display(), second.path().display());
    let site = Site::start(&[("unix_socket_dir", &list)]);
    for directory in [&first, &second] {
        let host = directory.path().to_str().unwrap();
        let answer = said(psql(host, site.pgweir.port(), site.name(), site.name(), PASSWORD));
        assert_eq!(answer, format!("reached {}", site.name()), "{host}");
    }
}

#[test]
fn requests_for_encryption_are_declined_on_a_socket() {
    let directory = directory();
    let place = Place::on(primary());
    let settings = [("auth_type", "trust")];
    let _pgweir = start_pgweir(toml(&place, directory.path().to_str().unwrap(), &settings));
    let mut stream = UnixStream::connect(socket(directory.path())).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    for request in [build::ssl_request(), build::gss_request()] {
        stream.write_all(&request).unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, *b"N");
    }
    stream.write_all(&build::startup(&[("user", &place.name), ("database", &place.name)])).unwrap();
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"R\0\0\0\x08\0\0\0\0", "AuthenticationOk");
}

#[test]
fn a_drain_gives_the_socket_up_while_transactions_finish() {
    let directory = directory();
    let host = directory.path().to_str().unwrap();
    let site = Site::start(&[("unix_socket_dir", host), ("shutdown_timeout", "20s")]);
    let path = directory.path().join(format!(".s.PGSQL.{}", site.pgweir.port()));
    assert!(path.exists());
    run(SOON, async {
        let mut client = site.client().await;
        client.query("BEGIN").await.unwrap();
        site.pgweir.signal(libc::SIGTERM).unwrap();
        wait_until(SOON, || fs::read_dir(directory.path()).unwrap().next().is_none());
        assert!(site.pgweir.is_running());
        client.query("COMMIT").await.unwrap();
    });
    assert_eq!(site.pgweir.wait_exit(SOON).unwrap().code(), Some(0));
}

#[test]
fn a_living_pooler_keeps_its_socket_and_a_killed_one_loses_it() {
    let directory = directory();
    let host = directory.path().to_str().unwrap();
    let place = Place::on(primary());
    let first = start_pgweir(toml(&place, host, &[]));
    let name = &place.name;
    let complaint = refused(Pgweir::start_with(options(toml(&place, host, &[]))));
    assert!(complaint.contains(&format!("it is in use by process {}", first.pid())), "{complaint}");
    assert_eq!(said(psql(host, PORT, name, name, PASSWORD)), format!("reached {name}"));
    first.signal(libc::SIGKILL).unwrap();
    first.wait_exit(SOON).unwrap();
    assert!(socket(directory.path()).exists(), "what a kill leaves behind");
    let second = start_pgweir(toml(&place, host, &[]));
    assert_eq!(said(psql(host, PORT, name, name, PASSWORD)), format!("reached {name}"));
    second.signal(libc::SIGQUIT).unwrap();
    assert_eq!(second.wait_exit(SOON).unwrap().code(), Some(0));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "the socket and its lock file are gone");
}

#[test]
fn of_many_that_start_at_once_over_a_dead_socket_one_gets_it() {
    let directory = directory();
    let host = directory.path().to_str().unwrap();
    let place = Place::on(primary());
    let dead = start_pgweir(toml(&place, host, &[]));
    dead.signal(libc::SIGKILL).unwrap();
    dead.wait_exit(SOON).unwrap();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let start = || Pgweir::start_with(options(toml(&place, host, &[])));
        let starts: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    let (started, failed): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(started.len(), 1, "{failed:?}");
    assert!(failed.into_iter().all(|failure| refused(failure).contains("it is in use")));
    let name = &place.name;
    assert_eq!(said(psql(host, PORT, name, name, PASSWORD)), format!("reached {name}"));
}

#[test]
fn a_directory_that_is_not_there_and_a_group_that_is_not_there_are_named() {
    let directory = directory();
    let host = directory.path().to_str().unwrap();
    let place = Place::on(primary());
    let missing = format!("{host}/missing");
    #[rustfmt::skip]
    let table = [
        ("directory", toml(&place, &missing, &[]),                                        "opening its lock file: No such file"),
        ("group",     toml(&place, host, &[("unix_socket_group", "no-such-group")]),      "there is no group \\\"no-such-group\\\" (unix_socket_group)"),
    ];
    for (name, toml, want) in table {
        let complaint = refused(Pgweir::start_with(options(toml)));
        assert!(complaint.contains(want) && complaint.contains("unix_socket_dir"), "{name}: {complaint}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
}

/// The name of the operating system's user that this test runs as.
fn system_user() -> String {
    let output = Command::new("id").arg("-un").output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_peer_is_let_in_as_itself_and_as_nobody_else() {
    let directory = directory();
    let host = directory.path().to_str().unwrap();
    let place = Place::on(primary());
    let (name, me) = (&place.name, system_user());
    place.psql(&format!("DO $$ BEGIN CREATE ROLE \"{me}\" LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"));
    let own = format!("users.{me}.password");
    let settings = [("unix_socket_dir", host), ("auth_type", "peer"), (&*own, "never-asked-for")];
    let pgweir = start_pgweir(place.toml(&settings));
    let port = pgweir.port();
    // The server connection is the place's, whoever the client is.
    assert_eq!(said(psql(host, port, &me, name, "")), format!("reached {name}"));
    let complaint = said(psql(host, port, name, name, PASSWORD));
    assert!(complaint.contains(&format!("Peer authentication failed for user \"{name}\"")), "{complaint}");
    let complaint = said(psql(host, port, "stranger", name, PASSWORD));
    assert!(complaint.contains("Peer authentication failed for user \"stranger\""), "{complaint}");
    // By TCP nobody vouches for anyone.
    assert_eq!(said(psql("127.0.0.1", port, name, name, PASSWORD)), format!("reached {name}"));
    let complaint = said(psql("127.0.0.1", port, &me, name, "guessed"));
    assert!(complaint.contains("password authentication failed"), "{complaint}");
    let metric = || {
        let (_, body) = pgweir.http_get("/metrics").unwrap();
        crate::support::metric_in(&body, "pgweir_clients_refused_total", &["reason=\"auth_failed\""])
    };
    wait_until(SOON, || metric() >= 3.0);
    if me == "root" {
        let user = primary_account();
        let mut other = psql(host, port, &me, name, "");
        other.uid(user.0).gid(user.1);
        let complaint = said(other);
        assert!(complaint.contains("Peer authentication failed for user \"root\""), "{complaint}");
        wait_until(SOON, || pgweir.log().contains(&format!("(uid {})", user.0)));
    }
}

/// The account of the primary's processes, which is not root.
fn primary_account() -> (u32, u32) {
    let data = fs::metadata(primary().data_dir()).unwrap();
    (data.uid(), data.gid())
}

#[test]
fn a_peer_that_is_no_user_of_ours_is_not_let_in() {
    let directory = directory();
    let host = directory.path().to_str().unwrap();
    let place = Place::on(primary());
    let pgweir = start_pgweir(place.toml(&[("unix_socket_dir", host), ("auth_type", "peer")]));
    let me = system_user();
    let complaint = said(psql(host, pgweir.port(), &me, &place.name, ""));
    assert!(complaint.contains(&format!("Peer authentication failed for user \"{me}\"")), "{complaint}");
}

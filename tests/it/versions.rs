//! Protocol versions on both sides: 3.2 with its long cancel keys where both ends have it, 3.0 where one has not, and
//! whatever a client asks for beyond that negotiated as Postgres 18 does.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pgweir_harness::wire::{Message, Wire, build};
use pgweir_harness::{
    Cluster, ClusterOptions, Direction, FaultProxy, ServerPrograms, drivers_python, wait_until, wait_until_async,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{PASSWORD, Place, SOON, Site, assert_value, primary, start_pgweir};

/// Bytes of a cancel request with a key of protocol 3.0, and with one of Postgres 18's: length, code, process id, key.
const SHORT_REQUEST: u64 = 4 + 4 + 4 + 4;
const LONG_REQUEST: u64 = 4 + 4 + 4 + 32;

/// The Postgres 18 that these tests share. It lives until the process ends, and dies with it.
fn primary_18() -> &'static Cluster {
    static PRIMARY: OnceLock<Cluster> = OnceLock::new();
    PRIMARY.get_or_init(|| {
        let programs = ServerPrograms::find_18().unwrap();
        assert_eq!(programs.major(), 18);
        Cluster::start_with(&programs, ClusterOptions::default()).unwrap()
    })
}

/// Sends a greeting; the first message that comes back.
async fn greet(address: SocketAddr, greeting: &[u8]) -> Message {
    let mut wire = Wire::connect(address).await.unwrap();
    wire.send(greeting).await.unwrap();
    wire.recv().await.unwrap()
}

/// A client that has logged in with this version of the protocol.
async fn client(site: &Site<'_>, minor: u16) -> Wire {
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    let names = [("user", site.name()), ("database", site.name())];
    wire.send(&build::startup_version(3, minor, &names)).await.unwrap();
    wire.authenticate(site.name(), PASSWORD).await.unwrap();
    wire.recv_until_ready().await.unwrap();
    wire
}

#[tokio::test]
async fn versions_and_options_are_negotiated_as_postgres_18_does() {
    let site = Site::before(Place::on(primary_18()), &[("auth_type", "scram-sha-256")]);
    let names = [("user", site.name()), ("database", site.name())];
    let with =
        |more: &[(&'static str, &'static str)]| -> Vec<(&str, &str)> { names.iter().chain(more).copied().collect() };
    #[rustfmt::skip]
    let table = [
        ("3.0",                    build::startup_version(3, 0, &names)),
        ("3.1",                    build::startup_version(3, 1, &names)),
        ("3.2",                    build::startup_version(3, 2, &names)),
        ("3.3",                    build::startup_version(3, 3, &names)),
        ("3.9999",                 build::startup_version(3, 9999, &names)),
        ("3.65535",                build::startup_version(3, u16::MAX, &names)),
        ("3.0 with an option",     build::startup_version(3, 0, &with(&[("_pq_.x", "1")]))),
        ("3.2 with two options",   build::startup_version(3, 2, &with(&[("_pq_.x", "1"), ("_pq_.other", "")]))),
        ("3.9999 with an option",  build::startup_version(3, 9999, &with(&[("_pq_.test_protocol_negotiation", "")]))),
    ];
    for (name, greeting) in table {
        let want = greet(site.place.cluster.addr(), &greeting).await;
        let got = greet(site.pgweir.addr(), &greeting).await;
        if want.tag == b'v' {
            assert_eq!(got, want, "{name}");
        } else {
            // Which mechanisms are offered is not the greeting's matter.
            assert_eq!(got.tag, want.tag, "{name}: {got:?}");
        }
    }
}

#[tokio::test]
async fn a_client_of_3_2_has_a_long_key_that_cancels_whatever_the_server_speaks() {
    for cluster in [primary(), primary_18()] {
        let site = Site::before(Place::on(cluster), &[("default_pool_size", "1")]);
        for (minor, length) in [(0, 4), (1, 4), (2, 32), (9999, 32)] {
            let mut wire = client(&site, minor).await;
            assert_eq!(wire.secret.len(), length, "3.{minor}");
            wire.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
            // No other key does: not a part of it, not more, not one byte changed.
            let mut wrong = wire.secret.clone();
            wrong[length - 1] ^= 1;
            for key in [&wire.secret[..length - 1], &[&wire.secret[..], b"\0"].concat(), &wrong, &wire.secret[..4]] {
                // Fewer than four bytes are no key at all: the request is malformed.
                if key != wire.secret && key.len() >= 4 {
                    let mut request = Wire::connect(site.pgweir.addr()).await.unwrap();
                    request.send(&build::cancel_request(wire.pid, key)).await.unwrap();
                    assert!(request.eof().await);
                }
            }
            assert_eq!(wire.recv_within(Duration::from_millis(200)).await.unwrap(), None, "3.{minor}");
            let mut request = Wire::connect(site.pgweir.addr()).await.unwrap();
            request.send(&build::cancel_request(wire.pid, &wire.secret)).await.unwrap();
            assert_eq!(wire.outcome().await.unwrap().sqlstate(), "57014", "3.{minor}");
            assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
        }
    }
}

/// Bytes of the cancel request that pgweir sends to the server, and how many connections it has made by then.
async fn cancel_request(place: Place<'_>, settings: &[(&str, &str)]) -> (u64, u64) {
    let proxy = FaultProxy::start(place.cluster.addr()).unwrap();
    let port = proxy.port().to_string();
    let mut all = vec![("databases.PLACE.port", port.as_str()), ("default_pool_size", "1")];
    all.extend_from_slice(settings);
    let site = Site::before(place, &all);
    let mut wire = client(&site, 0).await;
    wire.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
    let running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(60)' \
                   AND datname = current_database()";
    wait_until(SOON, || site.place.psql(running) == "1");
    let (before, accepted) = (proxy.bytes(Direction::ToServer), proxy.accepted());
    let mut request = Wire::connect(site.pgweir.addr()).await.unwrap();
    request.send(&build::cancel_request(wire.pid, &wire.secret)).await.unwrap();
    wait_until_async(SOON, async || proxy.accepted() > accepted && proxy.bytes(Direction::ToServer) > before).await;
    let sent = proxy.bytes(Direction::ToServer) - before;
    assert_eq!(wire.outcome().await.unwrap().sqlstate(), "57014");
    (sent, accepted)
}

#[tokio::test]
async fn servers_are_asked_for_3_2_and_those_that_have_only_3_0_are_served_in_the_same_breath() {
    #[rustfmt::skip]
    let table = [
        ("18",                 primary_18(), "3.2", LONG_REQUEST),
        ("18, asked for 3.0",  primary_18(), "3.0", SHORT_REQUEST),
        ("older",              primary(),    "3.2", SHORT_REQUEST),
    ];
    for (name, cluster, newest, want) in table {
        if name == "older" && cluster.programs().major() >= 18 {
            continue;
        }
        let (sent, connections) = cancel_request(Place::on(cluster), &[("server_max_protocol_version", newest)]).await;
        assert_eq!(sent, want, "{name}");
        assert_eq!(connections, 1, "{name}: one connection was enough to agree");
    }
}

#[tokio::test]
async fn a_follower_of_version_18_is_pooled_in_3_2_too() {
    // The programs from npm have no pg_basebackup: it is a copy of the stopped data directory with standby.signal.
    let programs = ServerPrograms::find_18().unwrap();
    let primary = Cluster::start_with(&programs, ClusterOptions::default()).unwrap();
    let follower = primary.follower(ClusterOptions::default()).unwrap();
    let on_primary = Place::on(&primary);
    on_primary.psql("CREATE TABLE t AS SELECT 7 AS x; GRANT SELECT ON t TO PUBLIC");
    let place = || Place { cluster: &follower, name: on_primary.name.clone() };
    wait_until(SOON, || follower.psql(&on_primary.name, "SELECT x FROM t").is_ok());

    let (sent, connections) = cancel_request(place(), &[]).await;
    assert_eq!((sent, connections), (LONG_REQUEST, 1), "it is asked for 3.2, and has it");
    let site = Site::before(place(), &[("default_pool_size", "1")]);
    for minor in [0, 2] {
        let mut wire = client(&site, minor).await;
        assert_eq!(wire.parameters.get("in_hot_standby").map(String::as_str), Some("on"), "3.{minor}");
        assert_value(&wire.query("SELECT pg_is_in_recovery()").await.unwrap(), "t");
        assert_value(&wire.query("SELECT x FROM t").await.unwrap(), "7");
        assert_eq!(wire.query("DELETE FROM t").await.unwrap().sqlstate(), "25006", "3.{minor}");
        assert_value(&wire.query("SELECT x FROM t").await.unwrap(), "7");
    }
    assert_eq!(site.place.servers(), 1);
}

/// How a pooler of old says that it does not know 3.2.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    Error(&'static str),
    Silence,
}

/// A server that knows only 3.0, in front of a real one; counts what it refused.
async fn old_server(target: SocketAddr, refusal: Refusal, refused: &'static AtomicU32) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut front = [0; 8];
                stream.read_exact(&mut front).await.unwrap();
                if front[4..] == [0, 3, 0, 2] {
                    refused.fetch_add(1, Ordering::Relaxed);
                    if let Refusal::Error(code) = refusal {
                        let body = format!("SFATAL\0C{code}\0Munsupported frontend protocol\0\0");
                        stream.write_all(&build::message(b'E', body.as_bytes())).await.unwrap();
                    }
                    return;
                }
                let mut server = TcpStream::connect(target).await.unwrap();
                server.write_all(&front).await.unwrap();
                let _ = copy_bidirectional(&mut stream, &mut server).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn a_server_that_refuses_3_2_is_asked_for_3_0_and_never_again_for_more() {
    for refusal in [Refusal::Error("0A000"), Refusal::Error("08P01"), Refusal::Silence] {
        let refused: &'static AtomicU32 = Box::leak(Box::new(AtomicU32::new(0)));
        let place = Place::on(primary());
        let port = old_server(place.cluster.addr(), refusal, refused).await.port().to_string();
        // The old server looks at the first packet alone: it has to be the start-up message.
        let plain = ("databases.PLACE.sslmode", "disable");
        let settings =
            [("databases.PLACE.port", &*port), plain, ("default_pool_size", "3"), ("max_server_logins", "1")];
        let cap = place.cap_watch(3);
        let site = Site::before(place.clone(), &settings);
        let mut clients = Vec::new();
        for _ in 0..3 {
            let mut wire = client(&site, 2).await;
            assert_value(&wire.query("BEGIN; SELECT 1").await.unwrap(), "1");
            clients.push(wire);
        }
        assert_eq!(site.place.servers(), 3, "{refusal:?}");
        assert_eq!(refused.load(Ordering::Relaxed), 1, "{refusal:?}: it is remembered");
        cap.finish();
    }
}

#[tokio::test]
async fn a_login_that_a_server_refuses_for_another_reason_is_not_tried_twice() {
    let place = Place::on(primary());
    let proxy = FaultProxy::start(place.cluster.addr()).unwrap();
    let port = proxy.port().to_string();
    let settings = [("databases.PLACE.port", &*port), ("databases.PLACE.dbname", "nowhere")];
    let site = Site::before(place, &settings);
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    let names = [("user", site.name()), ("database", site.name())];
    let error = wire.login_with(&names, PASSWORD).await.unwrap_err();
    assert_eq!(error.server_error().unwrap().sqlstate(), "3D000", "{error}");
    assert_eq!(proxy.accepted(), 1);
}

#[tokio::test]
async fn the_search_path_that_postgres_18_reports_is_each_clients_own() {
    let site = Site::before(Place::on(primary_18()), &[("default_pool_size", "1")]);
    let direct = site.place.direct().await;
    let default = direct.parameters.get("search_path").expect("Postgres 18 reports it");
    let mut plain = site.client().await;
    assert_eq!(plain.parameters.get("search_path"), Some(default));
    let mut own = site.client_with(&[("search_path", "own, public")]).await;
    assert_eq!(own.parameters.get("search_path").map(String::as_str), Some("own, public"));
    for _ in 0..3 {
        assert_value(&own.query("SHOW search_path").await.unwrap(), "own, public");
        assert_value(&plain.query("SHOW search_path").await.unwrap(), default);
    }
    // One sets it; it is told, and nobody else is.
    own.query("SET search_path = other").await.unwrap();
    assert_eq!(own.parameters.get("search_path").map(String::as_str), Some("other"));
    plain.send(&build::query("SELECT current_setting('search_path')")).await.unwrap();
    let messages = plain.recv_until_ready().await.unwrap();
    assert!(messages.iter().all(|message| message.tag != b'S'), "{messages:?}");
    assert_eq!(plain.parameters.get("search_path"), Some(default));
    assert_value(&own.query("SHOW search_path").await.unwrap(), "other");
    own.query("RESET search_path").await.unwrap();
    assert_eq!(own.parameters.get("search_path").map(String::as_str), Some("own, public"));
    // What is rolled back never was.
    own.query("BEGIN; SET search_path = gone").await.unwrap();
    own.query("ROLLBACK").await.unwrap();
    assert_eq!(own.parameters.get("search_path").map(String::as_str), Some("own, public"));
    assert_value(&plain.query("SHOW search_path").await.unwrap(), default);
}

#[tokio::test]
async fn what_postgres_18_leaves_of_a_query_inside_a_batch_hits_nobody_else() {
    // Its ReadyForQuery says that no transaction is open, and the next statement on the connection fails with XX000.
    let site = Site::before(Place::on(primary_18()), &[("default_pool_size", "1")]);
    let extended = [build::parse("", "SELECT 1", &[]), build::bind("", "", &[]), build::execute("", 0)].concat();
    for inside in [build::query("SELECT 2"), build::function_call(1598, &[])] {
        let (mut mixing, mut other) = (site.client().await, site.client().await);
        mixing.send(&[&extended[..], &inside, &build::sync()].concat()).await.unwrap();
        for _ in 0..2 {
            assert_eq!(mixing.outcome().await.unwrap().error, None);
        }
        if inside[0] == b'F' {
            // Behind a function call comes an audit, which takes the failure: the client keeps its server connection.
            mixing.terminate().await.unwrap();
            assert_value(&other.query("SELECT 3").await.unwrap(), "3");
            continue;
        }
        for _ in 0..3 {
            assert_value(&other.query("SELECT 3").await.unwrap(), "3");
            assert_value(&mixing.query("SELECT 4").await.unwrap(), "4");
        }
    }
}

#[test]
fn libpq_18_speaks_3_2_and_cancels_through_pgweir_as_without() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers/psycopg_versions.py");
    let python = drivers_python().expect("the drivers: run `make deps`");
    let speak = |port: u16, name: &str, versions: &str| {
        let conninfo = format!("host=127.0.0.1 port={port} user={name} dbname={name} password={PASSWORD} {versions}");
        let mut command = Command::new(&python);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
            command.env_remove(name);
        }
        let output = command.arg(&script).arg(conninfo).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { out.trim().to_owned() } else { err.trim().to_owned() }
    };
    let newest = "min_protocol_version=3.2 max_protocol_version=latest";
    for cluster in [primary(), primary_18()] {
        let place = Place::on(cluster);
        let pgweir = start_pgweir(place.toml(&[("default_pool_size", "2"), ("auth_type", "scram-sha-256")]));
        let version = cluster.programs().major();
        assert_eq!(speak(pgweir.port(), &place.name, newest), "3.2", "through pgweir to {version}");
        assert_eq!(speak(pgweir.port(), &place.name, ""), "3.0", "through pgweir to {version}, by default");
        let direct = speak(cluster.port(), &place.name, newest);
        if version >= 18 {
            assert_eq!(direct, "3.2");
        } else {
            assert!(direct.contains("does not support") || direct.contains("protocol version"), "{direct}");
        }
    }
}

//! The raw client, tested against Postgres.
#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

use std::time::Duration;

use pgweir_harness::wire::{Message, Wire, WireError, build, cancel};
use pgweir_harness::{Cluster, ClusterOptions, ConnectionFilter, secrets, wait_until, wait_until_async};

const SOON: Duration = Duration::from_secs(20);

fn cluster() -> Cluster {
    Cluster::start(ClusterOptions::default()).unwrap()
}

async fn open(cluster: &Cluster) -> Wire {
    Wire::open(cluster.addr(), "app", "app", "app-secret").await.unwrap()
}

fn tags(messages: &[Message]) -> String {
    messages.iter().map(|message| char::from(message.tag)).collect()
}

#[tokio::test]
async fn a_login_keeps_parameters_and_the_key() {
    let cluster = cluster();
    let mut wire = open(&cluster).await;
    assert_eq!(wire.parameters["server_encoding"], "UTF8");
    assert_eq!(wire.secret.len(), 4);
    let pid = wire.query("SELECT pg_backend_pid()").await.unwrap();
    assert_eq!(pid.value(), Some(wire.pid.to_string().as_str()));
    wire.query("SET TimeZone = 'Asia/Kathmandu'").await.unwrap();
    assert_eq!(wire.parameters["TimeZone"], "Asia/Kathmandu");
}

#[tokio::test]
async fn outcomes_hold_rows_tags_notices_errors_and_status() {
    let cluster = cluster();
    let mut wire = open(&cluster).await;
    let sql = "BEGIN; SELECT 1, NULL; SELECT 'x' WHERE false; DROP TABLE IF EXISTS none";
    let outcome = wire.query(sql).await.unwrap();
    assert_eq!(outcome.rows, [[Some("1".to_owned()), None]]);
    assert_eq!(outcome.tags, ["BEGIN", "SELECT 1", "SELECT 0", "DROP TABLE"]);
    assert_eq!(outcome.notices[0].sqlstate(), "00000");
    assert_eq!((outcome.error, outcome.status), (None, b'T'));
    let outcome = wire.query("SELECT 1/0").await.unwrap();
    assert_eq!((outcome.sqlstate(), outcome.status), ("22012", b'E'));
    let outcome = wire.extended("ROLLBACK", &[]).await.unwrap();
    assert_eq!((outcome.tags, outcome.status), (vec!["ROLLBACK".to_owned()], b'I'));
    let parameters = [Some("2"), None];
    let outcome = wire.extended("SELECT $1::int + 1, $2::text IS NULL", &parameters).await.unwrap();
    assert_eq!(outcome.rows, [[Some("3".to_owned()), Some("t".to_owned())]]);
}

#[tokio::test]
async fn every_message_is_understood_by_postgres() {
    let cluster = cluster();
    let mut wire = open(&cluster).await;
    let bytes = [
        build::parse("s", "SELECT generate_series(1, $1)", &[23]),
        build::describe_statement("s"),
        build::bind_formats("p", "s", &[1], &[Some(&[0, 0, 0, 3])], &[1]),
        build::describe_portal("p"),
        build::execute("p", 2),
        build::execute("p", 0),
        build::close_portal("p"),
        build::close_statement("s"),
        build::flush(),
    ]
    .concat();
    wire.send(&bytes).await.unwrap();
    let mut messages = wire.recv_until(b'3').await.unwrap();
    messages.push(wire.recv().await.unwrap());
    assert_eq!(tags(&messages), "1tT2TDDsDC33");
    assert_eq!(messages[5].columns().unwrap(), [Some(vec![0, 0, 0, 1])]);
    assert_eq!(messages[2].column_names().unwrap(), ["generate_series"]);
    assert!(wire.recv_within(Duration::from_millis(50)).await.unwrap().is_none());
    wire.send(&build::sync()).await.unwrap();
    assert_eq!(tags(&wire.recv_until_ready().await.unwrap()), "Z");

    wire.query("CREATE TABLE t (n int)").await.unwrap();
    wire.send(&build::query("COPY t FROM STDIN")).await.unwrap();
    assert_eq!(wire.recv().await.unwrap().tag, b'G');
    let rows = [build::copy_data(b"1\n2"), build::copy_data(b"\n"), build::copy_done()].concat();
    wire.send(&rows).await.unwrap();
    assert_eq!(wire.outcome().await.unwrap().tags, ["COPY 2"]);
    wire.send(&build::query("COPY t FROM STDIN")).await.unwrap();
    assert_eq!(wire.recv().await.unwrap().tag, b'G');
    wire.send(&build::copy_fail("enough")).await.unwrap();
    assert_eq!(wire.outcome().await.unwrap().sqlstate(), "57014");

    let length = wire.query("SELECT 'length(text)'::regprocedure::oid").await.unwrap();
    let call = build::function_call(length.value().unwrap().parse().unwrap(), &[Some(b"four")]);
    wire.send(&call).await.unwrap();
    let answer = wire.recv_until_ready().await.unwrap();
    assert_eq!(tags(&answer), "VZ");
    assert_eq!(answer[0].body, b"\0\0\0\x014");

    wire.query("LISTEN news; NOTIFY news, 'hi'").await.unwrap();
    wire.send(&build::query("NOTIFY news, 'again'")).await.unwrap();
    let told = wire.recv_until(b'A').await.unwrap();
    let told = told.last().unwrap().notification().unwrap();
    assert_eq!(told, (wire.pid, "news".to_owned(), "again".to_owned()));
    assert_eq!(wire.recv().await.unwrap().ready_status(), Some(b'I'));
}

#[tokio::test]
async fn tls_is_declined_with_one_byte() {
    let cluster = cluster();
    let mut wire = Wire::connect(cluster.addr()).await.unwrap();
    wire.send(&build::ssl_request()).await.unwrap();
    assert_eq!(wire.recv_raw(1).await.unwrap(), b"N");
    wire.login("app", "app", "app-secret").await.unwrap();
}

#[tokio::test]
async fn a_cancel_reaches_its_query_only_with_the_secret() {
    let cluster = cluster();
    let mut wire = open(&cluster).await;
    wire.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
    let running = || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
        cluster.psql("app", &format!("{sql} AND usename = 'app'")).unwrap() == "1"
    };
    wait_until(SOON, running);
    cancel(cluster.addr(), wire.pid, b"none").await.unwrap();
    assert!(wire.recv_within(Duration::from_millis(100)).await.unwrap().is_none());
    cancel(cluster.addr(), wire.pid, &wire.secret).await.unwrap();
    assert_eq!(wire.outcome().await.unwrap().sqlstate(), "57014");
}

#[tokio::test]
async fn ends_are_told_apart() {
    let cluster = cluster();
    let count = || cluster.count_connections(&ConnectionFilter::user("app")).unwrap();
    open(&cluster).await.terminate().await.unwrap();
    open(&cluster).await.abort().unwrap();
    wait_until_async(SOON, async || count() == 0).await;
    let log = cluster.log_text();
    assert!(!log.contains("FATAL:  terminating"), "{log}");

    let mut wire = open(&cluster).await;
    wire.set_patience(Duration::from_millis(50));
    assert!(!wire.eof().await, "nothing happens");
    wire.set_patience(SOON);
    let terminate = format!("SELECT pg_terminate_backend({})", wire.pid);
    cluster.psql("app", &terminate).unwrap();
    let error = wire.recv_until_ready().await.unwrap_err();
    assert!(matches!(error, WireError::Closed { .. }), "{error}");
    assert_eq!(error.server_error().unwrap().sqlstate(), "57P01");
    assert!(wire.eof().await);
}

#[tokio::test]
async fn a_refused_login_carries_the_servers_error() {
    let cluster = cluster();
    let refused = Wire::open(cluster.addr(), "app", "nowhere", "app-secret").await;
    match refused {
        Err(WireError::Refused(error)) => assert_eq!(error.sqlstate(), "3D000"),
        other => panic!("{other:?}"),
    }
}

#[test]
#[should_panic(expected = "did not come true within 20ms")]
fn a_wait_in_vain_panics() {
    wait_until(Duration::from_millis(20), || false);
}

#[tokio::test]
#[should_panic(expected = "wire.rs")]
async fn an_async_wait_in_vain_names_its_caller() {
    wait_until_async(Duration::from_millis(20), async || false).await;
}

#[tokio::test]
async fn a_secret_in_an_error_fails_the_test() {
    let cluster = cluster();
    // Postgres names the user in its refusal.
    let refused = async |user: &str| Wire::open(cluster.addr(), user, "app", "not-the-password").await.is_err();
    assert!(refused("a-known-user").await);
    secrets::keep("a-planted-user");
    let address = cluster.addr();
    let told =
        tokio::spawn(async move { Wire::open(address, "a-planted-user", "app", "not-the-password").await.map(drop) });
    let panic = told.await.unwrap_err().into_panic();
    let told = panic.downcast_ref::<String>().unwrap();
    assert!(told.contains("\"a-planted-user\" is in what a client is told"), "{told}");
}

//! Session mode and statement mode.

use pgweir_harness::wire::build::{query, sync};

use crate::support::{SOON, Site, assert_value, server_pid};
use crate::transcript::unnamed;

#[tokio::test]
async fn in_session_mode_a_client_keeps_its_server_connection_and_knows_its_real_process_id() {
    let site = Site::start(&[("pool_mode", "session"), ("default_pool_size", "1"), ("query_wait_timeout", "60s")]);
    let watch = site.place.cap_watch(1);
    let mut first = site.client().await;
    assert_eq!(server_pid(&mut first).await, first.pid);
    for text in [
        "SET work_mem = '7MB'",
        "CREATE TEMP TABLE mine (a int)",
        "SELECT pg_advisory_lock(1)",
        "PREPARE p AS SELECT 'first'",
    ] {
        assert_eq!(first.query(text).await.unwrap().error, None, "{text}");
    }
    assert_value(&first.query("SHOW work_mem").await.unwrap(), "7MB");
    assert_value(&first.query("SELECT count(*) FROM mine").await.unwrap(), "0");
    assert_value(&first.query("EXECUTE p").await.unwrap(), "first");

    // The next one waits for its place, and finds it clean.
    let pid = first.pid;
    let (second, ()) = tokio::join!(site.client(), async {
        pgweir_harness::wait_until_async(SOON, async || site.metric("pgweir_clients", &["state=\"waiting\""]) >= 1.0)
            .await;
        first.terminate().await.unwrap();
    });
    let mut second = second;
    assert_eq!(server_pid(&mut second).await, pid, "the server connection is used again");
    assert_value(&second.query("SHOW work_mem").await.unwrap(), "4MB");
    assert_value(&second.query("SELECT count(*) FROM pg_class WHERE relname = 'mine'").await.unwrap(), "0");
    assert_value(
        &second
            .query("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
            .await
            .unwrap(),
        "0",
    );
    assert_eq!(second.query("EXECUTE p").await.unwrap().sqlstate(), "26000");
    assert_eq!(watch.finish(), 1);
}

#[tokio::test]
async fn in_session_mode_a_transaction_left_open_is_rolled_back_before_the_next_client() {
    let site = Site::start(&[("pool_mode", "session"), ("default_pool_size", "1")]);
    let mut first = site.client().await;
    assert_eq!(first.query("CREATE TABLE t (a int)").await.unwrap().error, None);
    assert_eq!(first.query("BEGIN; INSERT INTO t VALUES (1)").await.unwrap().status, b'T');
    first.terminate().await.unwrap();
    let mut second = site.client().await;
    let outcome = second.query("SELECT count(*) FROM t").await.unwrap();
    assert_value(&outcome, "0");
    assert_eq!(outcome.status, b'I');
}

#[tokio::test]
async fn a_server_connection_whose_reset_fails_is_closed_and_nobody_gets_it() {
    let settings = [("pool_mode", "session"), ("default_pool_size", "1"), ("server_reset_query", "SELECT 1/0")];
    let site = Site::start(&settings);
    let watch = site.place.cap_watch(1);
    let mut pids = Vec::new();
    for _ in 0..3 {
        let mut client = site.client().await;
        assert_value(&client.query("SELECT to_regclass('pg_temp.mine') IS NULL").await.unwrap(), "t");
        assert_value(&client.query("SHOW work_mem").await.unwrap(), "4MB");
        assert_eq!(client.query("CREATE TEMP TABLE mine (a int); SET work_mem = '7MB'").await.unwrap().error, None);
        assert!(!pids.contains(&client.pid), "{} again", client.pid);
        pids.push(client.pid);
        client.terminate().await.unwrap();
    }
    let discarded = || site.metric("pgweir_server_discards_total", &["reason=\"dirty\""]);
    pgweir_harness::wait_until(SOON, || discarded() >= 3.0);
    assert_eq!(watch.finish(), 1);
}

#[tokio::test]
async fn in_statement_mode_statements_run_and_transaction_blocks_are_refused() {
    let site = Site::start(&[("pool_mode", "statement"), ("default_pool_size", "1")]);
    let mut other = site.client().await;
    assert_eq!(other.query("CREATE TABLE t (a int)").await.unwrap().error, None);
    let mut client = site.client().await;
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    assert_eq!(client.query("BEGIN; INSERT INTO t VALUES (1); COMMIT").await.unwrap().error, None);
    client.send(&[unnamed("SELECT 2", &[]), sync()].concat()).await.unwrap();
    assert_value(&client.outcome().await.unwrap(), "2");

    for begin in [query("BEGIN; INSERT INTO t VALUES (2)"), [unnamed("BEGIN", &[]), sync()].concat()] {
        let mut client = site.client().await;
        client.send(&begin).await.unwrap();
        let (mut error, mut status) = (None, b'I');
        while let Ok(message) = client.recv().await {
            error = message.server_error().or(error);
            status = message.ready_status().unwrap_or(status);
            if message.ready_status() == Some(b'I') {
                break;
            }
        }
        // Back outside of a transaction, or disconnected.
        assert!(status == b'I' || client.eof().await, "a transaction is open");
        let error = error.expect("an error that says why");
        assert!(error.message().contains("statement"), "{error}");
        // The pool of one serves the next, and nothing is left of the transaction.
        assert_value(&other.query("SELECT count(*) FROM t").await.unwrap(), "1");
    }
}

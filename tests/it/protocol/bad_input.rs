//! Malformed and oversized messages: 08P01 and close, nothing forwarded, nobody else hurt.

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{copy_data, message, message_lying, query, sasl_initial, startup, sync};

use crate::support::{Site, assert_value, server_pid};
use crate::transcript::{Company, Script, play, unnamed};

/// What pgweir must not accept from a client that has logged in; every row is a whole write.
fn bad_messages() -> Vec<(&'static str, Vec<u8>)> {
    #[rustfmt::skip]
    let table = vec![
        ("unknown type",                   message(b'z', b"hello")),
        ("type 0",                         message(0, b"")),
        ("a backend's type",               message(b'Z', b"I")),
        ("an HTTP request",                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("length 0",                       message_lying(b'Q', 0, b"SELECT 1\0")),
        ("length 3",                       message_lying(b'Q', 3, b"SELECT 1\0")),
        ("length above 2 GiB",             message_lying(b'Q', 0x8000_0000, b"SELECT 1\0")),
        ("all length bits",                message_lying(b'Q', u32::MAX, b"SELECT 1\0")),
        ("longer than max_packet_size",    message_lying(b'Q', 100_001, b"SELECT 1\0")),
        ("Query without NUL",              message(b'Q', b"SELECT 1")),
        ("Query that is empty",            message(b'Q', b"")),
        ("Parse without name",             message(b'P', b"s")),
        ("Parse without text",             message(b'P', b"s\0SELECT 1")),
        ("Parse without types",            message(b'P', b"s\0SELECT 1\0")),
        ("Bind without names",             message(b'B', b"p")),
        ("Bind without statement",         message(b'B', b"p\0s")),
        ("Describe without name",          message(b'D', b"S")),
        ("Describe of a strange kind",     message(b'D', b"Xname\0")),
        ("Close that is empty",            message(b'C', b"")),
        ("Close of a strange kind",        message(b'C', b"Xname\0")),
        ("a password now",                 message(b'p', b"secret\0")),
    ];
    table
}

/// Malformed behind what a pooler must read. Each has the number of `ReadyForQuery`s that Postgres
/// answers it and a `Sync` with.
fn bad_bodies() -> Vec<(&'static str, Vec<u8>, usize)> {
    #[rustfmt::skip]
    let table = vec![
        ("Query with bytes after the NUL", message(b'Q', b"SELECT 1\0SELECT 2\0"),               2),
        ("Parse with too few types",       message(b'P', b"s\0SELECT 1\0\0\x02\0\0\0\x17"), 1),
        ("Bind that ends in its middle",   message(b'B', b"\0nowhere\0\0\x01\0"),              1),
        ("Execute without name",           message(b'E', b"p"),                                 1),
        ("Execute without limit",          message(b'E', b"p\0\0\0"),                           1),
        ("Sync with a body",               message(b'S', b"x"),                                 2),
        ("Flush with a body",              message(b'H', b"x"),                                 1),
        ("FunctionCall too short",         message(b'F', b"\0\0"),                              2),
    ];
    table
}

#[tokio::test]
async fn a_message_malformed_in_its_body_is_refused_or_answered_as_postgres_answers_it() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut witness = site.client().await;
    let pid = server_pid(&mut witness).await;
    for (name, bytes, answers) in bad_bodies() {
        for begin in ["SELECT 1", "BEGIN"] {
            let script = Script::new(name).queries(&[begin]).send(&[bytes.clone(), sync()]).ready(answers);
            let want = play(site.place.direct().await, script.steps(), Company::None).await;
            let got = play(site.client().await, script.steps(), Company::None).await;
            let refused = got.last().is_some_and(|line| line == "the end")
                && got.iter().any(|line| line.contains("FATAL") && line.contains("08P01"));
            assert!(refused || got == want, "{name} after {begin}: {got:#?} instead of {want:#?}");
            assert_eq!(server_pid(&mut witness).await, pid, "{name} after {begin}: the server connection was lost");
        }
    }
}

/// Asserts that the connection ends, right after a FATAL with this SQLSTATE.
async fn assert_refused(name: &str, client: &mut Wire, sqlstate: &str) {
    let error = client.recv().await.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(error.error_field(b'C').as_deref(), Some(sqlstate), "{name}: {error:?}");
    assert_eq!(error.error_field(b'V').as_deref(), Some("FATAL"), "{name}: {error:?}");
    assert!(client.eof().await, "{name}: not closed");
}

#[tokio::test]
async fn a_malformed_message_gets_08p01_and_close_and_the_server_never_sees_it() {
    let site = Site::start(&[("default_pool_size", "1"), ("max_packet_size", "100000")]);
    let mut witness = site.client().await;
    let pid = server_pid(&mut witness).await;
    let mut refused = 0.0;
    for (name, bytes) in bad_messages() {
        let mut client = site.client().await;
        client.send(&bytes).await.unwrap();
        assert_refused(name, &mut client, "08P01").await;
        refused += 1.0;
        assert_eq!(server_pid(&mut witness).await, pid, "{name}: the server connection was lost");
    }
    let complaints: Vec<String> = site
        .place
        .cluster
        .log_text()
        .lines()
        .filter(|line| line.contains(&format!("[{pid}] ")))
        .map(ToOwned::to_owned)
        .collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    // pgweir publishes its counters once a second.
    let errors = || site.metric("pgweir_errors_total", &["blame=\"client\"", "sqlstate=\"08P01\""]);
    pgweir_harness::wait_until(crate::support::SOON, || errors() >= refused);
}

#[tokio::test]
async fn a_malformed_message_in_a_transaction_rolls_it_back_and_frees_the_server_connection() {
    let site = Site::start(&[("default_pool_size", "1"), ("max_packet_size", "100000")]);
    let mut witness = site.client().await;
    assert_eq!(witness.query("CREATE TABLE t (a text)").await.unwrap().error, None);
    for (name, bytes) in bad_messages() {
        let mut client = site.client().await;
        let begun = client.query(&format!("BEGIN; INSERT INTO t VALUES ($${name}$$)")).await.unwrap();
        assert_eq!((begun.status, begun.error), (b'T', None), "{name}");
        client.send(&bytes).await.unwrap();
        assert_refused(name, &mut client, "08P01").await;
        // With a pool of one this is answered only once the transaction is over.
        let count = witness.query("SELECT count(*) FROM t").await.unwrap();
        assert_value(&count, "0");
    }
}

#[tokio::test]
async fn a_malformed_message_behind_good_ones_ends_the_session_and_hurts_nobody() {
    let site = Site::start(&[("default_pool_size", "1"), ("max_packet_size", "100000")]);
    let mut witness = site.client().await;
    assert_eq!(witness.query("CREATE TABLE t (a int)").await.unwrap().error, None);
    #[rustfmt::skip]
    let table = [
        ("query",               query("INSERT INTO t VALUES (1)")),
        ("open transaction",    query("BEGIN; INSERT INTO t VALUES (1)")),
        ("unfinished batch",    unnamed("INSERT INTO t VALUES (1)", &[])),
        ("finished batch",      [unnamed("INSERT INTO t VALUES (1)", &[]), sync()].concat()),
        ("copy",                [query("COPY t FROM STDIN"), copy_data(b"1\n")].concat()),
    ];
    for (name, good) in table {
        for bad in [message(b'z', b"bad"), message_lying(b'Q', 3, b""), message_lying(b'd', 100_001, b"")] {
            let mut client = site.client().await;
            client.send(&[good.clone(), bad].concat()).await.unwrap();
            // Whether what stood before it is still answered is left open; the last word is not.
            let (mut last, mut done) = (None, false);
            while let Ok(message) = client.recv().await {
                done |= message.command_tag().is_some_and(|tag| tag.starts_with("INSERT"));
                last = Some(message);
            }
            assert_eq!(last.and_then(|message| message.error_field(b'C')).as_deref(), Some("08P01"), "{name}");
            let rows = witness.query("DELETE FROM t").await.unwrap();
            assert_eq!((rows.error, rows.status), (None, b'I'), "{name}");
            let promised = done && name != "open transaction" && name != "unfinished batch";
            assert!(!promised || rows.tags == ["DELETE 1"], "{name}: told INSERT, and then {:?}", rows.tags);
            assert!(
                name != "open transaction" && name != "copy" || rows.tags == ["DELETE 0"],
                "{name}: {:?}",
                rows.tags
            );
        }
    }
}

#[tokio::test]
async fn a_malformed_greeting_gets_08p01_and_close() {
    let site = Site::start(&[("auth_type", "scram-sha-256"), ("default_pool_size", "1")]);
    let lying = |length: u32, rest: &[u8]| [&length.to_be_bytes()[..], rest].concat();
    let huge = "x".repeat(20_000);
    #[rustfmt::skip]
    let table: Vec<(&str, Vec<u8>)> = vec![
        ("length 0",               lying(0, b"\0\x03\0\0")),
        ("length 7",               lying(7, b"\0\x03\0")),
        ("length above the limit", lying(0x7fff_ffff, b"\0\x03\0\0")),
        ("a huge greeting",        startup(&[("user", "x"), ("application_name", &huge)])),
        ("an HTTP request",        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("TLS without asking",     b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03".to_vec()),
        ("no terminator",          lying(17, b"\0\x03\0\0user\0abc\0")),
        ("a name without value",   lying(14, b"\0\x03\0\0user\0\0")),
        ("bytes at the end",       lying(19, b"\0\x03\0\0user\0abc\0\0x\0")),
    ];
    for (name, bytes) in table {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(&bytes).await.unwrap();
        assert_refused(name, &mut wire, "08P01").await;
    }
}

#[tokio::test]
async fn a_malformed_answer_in_a_login_gets_08p01_and_close() {
    let site = Site::start(&[("auth_type", "scram-sha-256"), ("default_pool_size", "1")]);
    #[rustfmt::skip]
    let table: Vec<(&str, Vec<u8>)> = vec![
        ("a query instead of a password", query("SELECT 1")),
        ("a password of a mebibyte",      message_lying(b'p', 1 << 20, b"SCRAM-SHA-256\0")),
        ("no mechanism",                  message(b'p', b"SCRAM-SHA-256")),
        ("a length that lies",            message(b'p', b"SCRAM-SHA-256\0\x7f\xff\xff\xffn,,")),
        ("a broken first message",        sasl_initial("SCRAM-SHA-256", b"nonsense")),
        ("an empty first message",        sasl_initial("SCRAM-SHA-256", b"")),
        ("length 0",                      message_lying(b'p', 0, b"")),
    ];
    for (name, bytes) in table {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.startup(&[("user", site.name()), ("database", site.name())]).await.unwrap();
        assert_eq!(wire.recv().await.unwrap().authentication().map(|(kind, _)| kind), Some(10), "{name}");
        wire.send(&bytes).await.unwrap();
        assert_refused(name, &mut wire, "08P01").await;
    }
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
}

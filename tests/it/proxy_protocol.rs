//! The PROXY protocol: who it makes the client, who may speak it, and what becomes of everyone else.

use std::time::{Duration, Instant};

use pgweir_harness::wait_until;
use pgweir_harness::wire::{Wire, build};

use crate::support::{PASSWORD, SOON, Site, assert_value};

const ON: [(&str, &str); 2] = [("proxy_protocol", "true"), ("proxy_protocol_from", "127.0.0.0/8")];

/// A header of version 2.
fn v2(command: u8, kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    [b"\r\n\r\n\0\r\nQUIT\n", &[command, kind][..], &length, body].concat()
}

/// 203.0.113.7:4711 to 10.0.0.1:6432, and an extension that matters to nobody.
const V4: &[u8] = &[203, 0, 113, 7, 10, 0, 0, 1, 0x12, 0x67, 0x19, 0x20, 4, 0, 2, 0xff, 0xff];

fn v6() -> Vec<u8> {
    [&[0x20, 1, 0x0d, 0xb8][..], &[0; 11], &[7], &[0; 16], &[0x12, 0x67], &[0x19, 0x20]].concat()
}

fn refused(site: &Site<'_>) -> f64 {
    site.metric("pgweir_clients_refused_total", &["reason=\"proxy_protocol\""])
}

/// The peer in the last line of the log with this message.
fn last_peer(site: &Site<'_>, message: &str, from: usize) -> String {
    let line = site.pgweir.wait_log_from(from, message, SOON).unwrap();
    line.split("peer=").nth(1).unwrap().split(' ').next().unwrap().trim_matches('"').to_owned()
}

#[tokio::test]
async fn the_client_is_whom_the_header_names_in_either_version() {
    let site = Site::start(&ON);
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, Option<&str>); 8] = [
        ("v1, IPv4",       b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 6432\r\n".to_vec(),     Some("203.0.113.7:4711")),
        ("v1, IPv6",       b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 6432\r\n".to_vec(),  Some("[2001:db8::7]:4711")),
        ("v1, unknown",    b"PROXY UNKNOWN\r\n".to_vec(),                                 None),
        ("v2, IPv4",       v2(0x21, 0x11, V4),                                            Some("203.0.113.7:4711")),
        ("v2, IPv6",       v2(0x21, 0x21, &v6()),                                         Some("[2001:db8::7]:4711")),
        ("v2, unix",       v2(0x21, 0x31, &[0; 216]),                                     None),
        ("v2, local",      v2(0x20, 0x00, b""),                                           None),
        ("v2, unknown",    v2(0x21, 0x00, b"whatever"),                                   None),
    ];
    let startup = build::startup(&[("user", site.name()), ("database", site.name())]);
    for (name, header, want) in table {
        // At once, in front of the startup message; and byte by byte.
        for chunk in [usize::MAX, 1] {
            let from = site.pgweir.log().len();
            let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
            let own = wire.local_addr().unwrap().to_string();
            let bytes = [&header[..], &startup].concat();
            for part in bytes.chunks(chunk.min(bytes.len())) {
                wire.send(part).await.unwrap();
            }
            wire.authenticate(site.name(), PASSWORD).await.unwrap();
            wire.recv_until_ready().await.unwrap();
            assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
            assert_eq!(last_peer(&site, "client logged in", from), want.unwrap_or(&own), "{name}");
        }
    }
    assert!(refused(&site) < 0.5);
}

#[tokio::test]
async fn what_is_no_header_is_closed_without_a_word_and_counted() {
    let site = Site::start(&ON);
    let startup = build::startup(&[("user", site.name()), ("database", site.name())]);
    let too_long = [b"PROXY UNKNOWN ", &[b'x'; 200][..]].concat();
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, &str); 8] = [
        ("none",                startup.clone(),                                       "no PROXY header"),
        ("request for TLS",     build::ssl_request(),                                  "no PROXY header"),
        ("HTTP",                b"GET / HTTP/1.1\r\n\r\n".to_vec(),                    "no PROXY header"),
        ("another family",      b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n".to_vec(),        "protocol is malformed"),
        ("no address",          b"PROXY TCP4 localhost 1.2.3.4 1 2\r\n".to_vec(),      "source address is malformed"),
        ("v1, too long",        too_long,                                              "more than 107 bytes"),
        ("v2, too long",        v2(0x21, 0x11, &[0; 5000]),                            "more than 4112 bytes"),
        ("v2, version 3",       v2(0x31, 0x11, V4),                                    "version is malformed"),
    ];
    for (number, (name, bytes, want)) in table.into_iter().enumerate() {
        let from = site.pgweir.log().len();
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        // It may be gone before it has all.
        let _ = wire.send(&bytes).await;
        assert!(wire.eof().await, "{name}");
        let line = site.pgweir.wait_log_from(from, "login refused", SOON).unwrap();
        assert!(line.contains(want) && line.contains("reason=proxy_protocol"), "{name}: {line}");
        wait_until(SOON, || refused(&site) > f64::from(u32::try_from(number).unwrap()) + 0.5);
    }
    // Two headers are one too many: the second is no startup message.
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    wire.send(&[b"PROXY UNKNOWN\r\nPROXY UNKNOWN\r\n", &startup[..]].concat()).await.unwrap();
    assert_eq!(wire.recv().await.unwrap().error_field(b'C').as_deref(), Some("08P01"));
}

#[tokio::test]
async fn a_listener_that_does_not_ask_for_a_header_takes_none() {
    let site = Site::start(&[]);
    let startup = build::startup(&[("user", site.name()), ("database", site.name())]);
    for header in [b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 6432\r\n".to_vec(), v2(0x21, 0x11, V4)] {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(&[&header[..], &startup].concat()).await.unwrap();
        assert_eq!(wire.recv().await.unwrap().error_field(b'C').as_deref(), Some("08P01"));
        assert!(wire.eof().await);
    }
    assert!(!site.pgweir.log().contains("203.0.113.7"), "{}", site.pgweir.log());
}

#[tokio::test]
async fn a_source_that_is_no_proxy_of_ours_is_not_believed() {
    let site = Site::start(&[("proxy_protocol", "true"), ("proxy_protocol_from", "192.0.2.0/24, ::1")]);
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    let startup = build::startup(&[("user", site.name()), ("database", site.name())]);
    let _ = wire.send(&[b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 6432\r\n", &startup[..]].concat()).await;
    assert!(wire.eof().await);
    site.pgweir.wait_log("is none of proxy_protocol_from", SOON).unwrap();
    wait_until(SOON, || refused(&site) > 0.5);
}

#[tokio::test]
async fn a_header_that_does_not_come_is_not_awaited_for_ever() {
    let site = Site::start(&[ON[0], ON[1], ("client_login_timeout", "500ms")]);
    for start in [&b""[..], b"PROXY TCP4 203.0", b"\r\n\r\n\0\r\nQUIT\n\x21"] {
        let begun = Instant::now();
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(start).await.unwrap();
        while wire.recv().await.is_ok() {}
        let took = begun.elapsed();
        assert!(took > Duration::from_millis(400) && took < SOON, "{start:?}: {took:?}");
    }
}

#[tokio::test]
async fn failed_logins_are_limited_by_the_address_that_the_header_names() {
    let settings = [("auth_type", "scram-sha-256"), ("login_failure_burst", "3"), ("login_failure_rate", "1")];
    let site = Site::start(&[&ON[..], &settings].concat());
    let attempt = async |address: &str, password: &str| {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(format!("PROXY TCP4 {address} 10.0.0.1 4711 6432\r\n").as_bytes()).await.unwrap();
        let names = [("user", site.name()), ("database", site.name())];
        match wire.login_with(&names, password).await {
            Ok(_) => "in".to_owned(),
            Err(error) => error.server_error().unwrap().sqlstate().to_owned(),
        }
    };
    let mut guesses = Vec::new();
    for _ in 0..8 {
        guesses.push(attempt("203.0.113.7", "guessed").await);
    }
    assert_eq!(guesses[0], "28P01");
    assert!(guesses.contains(&"53400".to_owned()), "{guesses:?}");
    assert_eq!(attempt("203.0.113.8", PASSWORD).await, "in", "another client behind the same proxy");
}

#[tokio::test]
async fn guesses_at_cancel_keys_are_limited_by_the_address_that_the_header_names() {
    let site = Site::start(&[&ON[..], &[("login_failure_burst", "3"), ("login_failure_rate", "1")]].concat());
    let connect = async |address: &str| {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(format!("PROXY TCP4 {address} 10.0.0.1 4711 6432\r\n").as_bytes()).await.unwrap();
        wire
    };
    let mut client = connect("203.0.113.9").await;
    client.login_with(&[("user", site.name()), ("database", site.name())], PASSWORD).await.unwrap();
    client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
    let (pid, secret) = (client.pid, client.secret.clone());
    let cancel = async |address: &str, secret: &[u8]| {
        let mut wire = connect(address).await;
        wire.send(&build::cancel_request(pid, secret)).await.unwrap();
        assert!(wire.eof().await);
    };
    let wrong: Vec<u8> = secret.iter().map(|byte| !byte).collect();
    for _ in 0..30 {
        cancel("203.0.113.7", &wrong).await;
    }
    site.pgweir.wait_log("too many wrong keys from 203.0.113.7", SOON).unwrap();
    cancel("203.0.113.8", &secret).await;
    assert_eq!(client.outcome().await.unwrap().sqlstate(), "57014", "another client behind the same proxy");
    assert!(!site.pgweir.log().contains("too many wrong keys from 203.0.113.8"));
}

#[tokio::test]
async fn a_socket_beside_such_a_listener_needs_no_header() {
    let directory = tempfile::Builder::new().prefix("pgweir-p").tempdir_in("/tmp").unwrap();
    let site = Site::start(&[ON[0], ON[1], ("unix_socket_dir", directory.path().to_str().unwrap())]);
    let mut config = tokio_postgres::Config::new();
    config.host_path(directory.path()).port(site.pgweir.port());
    let (client, connection) =
        config.user(site.name()).dbname(site.name()).connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    assert_eq!(client.query_one("SELECT 1", &[]).await.unwrap().get::<_, i32>(0), 1);
}

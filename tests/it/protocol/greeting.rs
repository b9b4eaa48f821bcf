//! The first packets: versions, options, requests for encryption.

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{gss_request, ssl_request, startup, startup_version};

use crate::support::{PASSWORD, Site, assert_value};

#[tokio::test]
async fn a_client_that_asks_for_more_than_there_is_gets_what_there_is() {
    let site = Site::start(&[("auth_type", "scram-sha-256")]);
    let names = [("user", site.name()), ("database", site.name()), ("_pq_.x", "1")];
    for minor in [0, 2, 3, 9999] {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(&startup_version(3, minor, &names)).await.unwrap();
        wire.authenticate(site.name(), PASSWORD).await.unwrap();
        wire.recv_until_ready().await.unwrap();
        assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
    }
}

#[tokio::test]
async fn other_major_versions_are_refused() {
    let site = Site::start(&[]);
    for major in [0, 1, 2, 4, 1234, u16::MAX] {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(&startup_version(major, 0, &[("user", site.name())])).await.unwrap();
        let error = wire.recv().await.unwrap();
        let state = error.error_field(b'C').unwrap_or_default();
        assert!(["0A000", "08P01"].contains(&state.as_str()), "{major}: {error:?}");
        assert!(wire.eof().await, "{major}");
    }
}

#[tokio::test]
async fn encryption_that_is_not_offered_is_declined_once_each() {
    let site = Site::start(&[]);
    let names = [("user", site.name()), ("database", site.name())];
    #[rustfmt::skip]
    let orders: [(&str, &[Vec<u8>]); 4] = [
        ("ssl",          &[ssl_request()]),
        ("gss",          &[gss_request()]),
        ("ssl then gss", &[ssl_request(), gss_request()]),
        ("gss then ssl", &[gss_request(), ssl_request()]),
    ];
    for (name, requests) in orders {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        for request in requests {
            wire.send(request).await.unwrap();
            assert_eq!(wire.recv_raw(1).await.unwrap(), b"N", "{name}");
        }
        wire.login_with(&names, PASSWORD).await.unwrap();
        assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
    }
    for request in [ssl_request(), gss_request()] {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(&request).await.unwrap();
        assert_eq!(wire.recv_raw(1).await.unwrap(), b"N");
        wire.send(&request).await.unwrap();
        let error = wire.recv().await.unwrap();
        let state = error.error_field(b'C').unwrap_or_default();
        assert!(["0A000", "08P01"].contains(&state.as_str()), "{error:?}");
        assert!(wire.eof().await);
    }
}

#[tokio::test]
async fn bytes_sent_along_with_a_request_for_encryption_are_never_processed() {
    // CVE-2021-23214 and its like: whoever sits in the middle could have put them there.
    let site = Site::start(&[]);
    for request in [ssl_request(), gss_request()] {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        let names = startup(&[("user", site.name()), ("database", site.name())]);
        wire.send(&[request, names].concat()).await.unwrap();
        let mut answer = Vec::new();
        while let Ok(byte) = wire.recv_raw(1).await {
            answer.extend(byte);
        }
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert!(!answer.contains(&b'R') || text.contains("08P01"), "{text:?}");
        assert!(!text.contains("server_version"), "logged in: {text:?}");
    }
}

#[tokio::test]
async fn a_made_up_process_id_lies_above_all_real_ones_and_differs_from_client_to_client() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut seen = std::collections::BTreeSet::new();
    let mut clients = Vec::new();
    for _ in 0..20 {
        let client = site.client().await;
        assert!(client.pid > 4_194_304, "{}", client.pid);
        assert_eq!(client.secret.len(), 4);
        assert!(seen.insert((client.pid, client.secret.clone())), "given twice: {}", client.pid);
        clients.push(client);
    }
}

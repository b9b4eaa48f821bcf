//! Sessions resumed and counted, TLS without a request, versions, cancel requests, large answers.

use std::io::Read;
use std::thread;

use pgweir_harness::wait_until;
use pgweir_harness::wire::build;
use rustls::version::{TLS12, TLS13};

use super::client::{TlsClient, config, granted, open};
use super::clients::Front;
use super::show;
use crate::support::{Place, SOON, metric_in, start_pgweir};

fn metric(pgweir: &pgweir_harness::Pgweir, name: &str, label: &str) -> f64 {
    let (_, body) = pgweir.http_get("/metrics").unwrap();
    metric_in(&body, name, &[label])
}

#[test]
fn a_client_resumes_its_session_and_is_counted() {
    let front = Front::start("require", &[]);
    for (name, version, mut resumed) in [("TLS 1.2", &TLS12, 1.0), ("TLS 1.3", &TLS13, 2.0)] {
        let config = config(&[], &[version]);
        for again in [false, true] {
            let mut client = TlsClient::on(granted(front.pgweir.addr()), &config).unwrap();
            assert_eq!(client.is_resumed(), again, "{name}");
            client.log_in(&front.place.name);
            assert_eq!(client.value("SELECT 7"), "7");
        }
        resumed -= 0.5;
        wait_until(SOON, || metric(&front.pgweir, "pgweir_tls_resumptions_total", "side=\"client\"") > resumed);
    }
    let all = metric(&front.pgweir, "pgweir_tls_handshakes_total", "side=\"client\"");
    assert!((all - 4.0).abs() < 0.5, "{all}");
}

#[test]
fn sessions_with_a_server_are_resumed_and_counted() {
    // Postgres resumes none, so that the server is pgweir, too.
    let behind = Front::start("require", &[]);
    let name = &behind.place.name;
    let port = behind.pgweir.port().to_string();
    let ca = behind.folder.path("ca.pem");
    let place = Place { cluster: behind.place.cluster, name: name.clone() };
    let before = start_pgweir(place.toml(&[
        ("databases.PLACE.host", "localhost"),
        ("databases.PLACE.port", &port),
        ("databases.PLACE.sslmode", "verify-full"),
        ("databases.PLACE.sslrootcert", show(&ca)),
        ("server_lifetime", "0"),
    ]));
    let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", before.port());
    for _ in 0..4 {
        assert_eq!(super::psql(behind.place.cluster, &words, "SELECT 7"), Ok("7".to_owned()));
    }
    for (pgweir, side) in [(&before, "side=\"server\""), (&behind.pgweir, "side=\"client\"")] {
        wait_until(SOON, || metric(pgweir, "pgweir_tls_resumptions_total", side) > 1.5);
        let first =
            metric(pgweir, "pgweir_tls_handshakes_total", side) - metric(pgweir, "pgweir_tls_resumptions_total", side);
        assert!(first > 0.5, "{side}");
    }
}

#[test]
fn direct_tls_needs_the_name_of_the_protocol() {
    let front = Front::start("prefer", &[]);
    let addr = front.pgweir.addr();
    let mut client = TlsClient::on(open(addr), &config(&["postgresql"], &[&TLS13])).unwrap();
    client.log_in(&front.place.name);
    assert_eq!(client.value("SELECT 7"), "7");
    // Without one, the handshake is as far as it gets.
    let mut client = TlsClient::on(open(addr), &config(&[], &[&TLS13])).unwrap();
    assert_eq!(client.message(), None);
    front.pgweir.wait_log("direct TLS without the ALPN protocol postgresql", SOON).unwrap();
    let wrong = TlsClient::on(open(addr), &config(&["http/1.1"], &[&TLS13]));
    assert!(wrong.is_err_and(|error| error.to_string().contains("NoApplicationProtocol")));
    // Behind a request, a client without ALPN is an old one.
    let mut client = TlsClient::on(granted(addr), &config(&[], &[&TLS13])).unwrap();
    client.log_in(&front.place.name);
}

#[test]
fn direct_tls_where_there_is_no_tls_is_a_broken_packet() {
    let place = Place::on(crate::support::primary());
    let pgweir = start_pgweir(place.toml(&[]));
    let refused = TlsClient::on(open(pgweir.addr()), &config(&["postgresql"], &[&TLS13]));
    assert!(refused.is_err());
}

#[test]
fn a_server_can_be_spoken_to_without_a_request() {
    // Postgres 17 can; the one here is older, so that pgweir stands in for it.
    let behind = Front::start("require", &[]);
    let (name, port) = (&behind.place.name, behind.pgweir.port().to_string());
    let place = Place { cluster: behind.place.cluster, name: name.clone() };
    let before = start_pgweir(place.toml(&[
        ("databases.PLACE.port", &port),
        ("databases.PLACE.sslmode", "require"),
        ("databases.PLACE.sslnegotiation", "direct"),
    ]));
    let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", before.port());
    assert_eq!(super::psql(behind.place.cluster, &words, "SELECT 7"), Ok("7".to_owned()));
}

#[test]
fn only_the_versions_named_are_spoken() {
    #[rustfmt::skip]
    let table = [
        ("tlsv1.2", [("TLSv1.2", true),  ("TLSv1.3", false)]),
        ("tlsv1.3", [("TLSv1.2", false), ("TLSv1.3", true)]),
        ("secure",  [("TLSv1.2", true),  ("TLSv1.3", true)]),
    ];
    for (ours, theirs) in table {
        let front = Front::start("require", &[("client_tls_protocols", ours)]);
        for (version, want) in theirs {
            let words =
                format!("sslmode=require ssl_min_protocol_version={version} ssl_max_protocol_version={version}");
            let got = front.psql(&words, "SELECT 7");
            assert_eq!(got.is_ok(), want, "{ours}, {version}: {got:?}");
            if want {
                front.pgweir.wait_log(&format!("tls={version}/"), SOON).unwrap();
            }
        }
    }
}

#[test]
fn a_cancel_request_comes_with_tls_and_without() {
    let front = Front::start("require", &[]);
    for encrypted in [true, false] {
        let config = config(&[], &[&TLS13]);
        let mut client = TlsClient::on(granted(front.pgweir.addr()), &config).unwrap();
        let (pid, secret) = client.log_in(&front.place.name);
        client.send(&build::query("SELECT pg_sleep(60)"));
        let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active' \
                       AND datname = current_database()";
        wait_until(SOON, || front.place.psql(running) == "1");
        let request = build::cancel_request(pid, &secret);
        if encrypted {
            let mut other = TlsClient::on(granted(front.pgweir.addr()), &config).unwrap();
            other.send(&request);
            assert_eq!(other.message(), None);
        } else {
            let mut other = open(front.pgweir.addr());
            std::io::Write::write_all(&mut other, &request).unwrap();
            assert_eq!(other.read(&mut [0]).unwrap(), 0);
        }
        let messages = client.until(b'Z');
        let error = messages.iter().find(|(tag, _)| *tag == b'E').unwrap();
        assert!(String::from_utf8_lossy(&error.1).contains("57014"), "{encrypted}");
    }
}

#[test]
fn large_messages_pass_whole_in_both_directions_and_against_slow_readers() {
    let front = Front::start("require", &[]);
    for version in [&TLS12, &TLS13] {
        let mut client = TlsClient::on(granted(front.pgweir.addr()), &config(&[], &[version])).unwrap();
        client.log_in(&front.place.name);
        for size in [1, 16_000, 16_383, 16_384, 16_385, 65_536, 1_000_003] {
            let text = "x".repeat(size);
            assert_eq!(client.value(&format!("SELECT '{text}'")), text, "{size}");
        }
        // 40 MB that nobody reads for a while.
        client.send(&build::query("SELECT repeat(g::text || ' ', 1000) FROM generate_series(100000, 105999) g"));
        thread::sleep(std::time::Duration::from_millis(300));
        let rows = client.until(b'Z');
        let rows: Vec<_> = rows.iter().filter(|(tag, _)| *tag == b'D').collect();
        assert_eq!(rows.len(), 6000);
        for ((_, body), number) in rows.iter().zip(100_000..) {
            let want = format!("{number} ").repeat(1000);
            assert_eq!(&body[6..], want.as_bytes());
        }
        assert_eq!(client.value("SELECT 7"), "7");
    }
}

//! Sessions resumed and counted, TLS without a request, versions, cancel requests, large answers.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pgweir_harness::wait_until;
use pgweir_harness::wire::{Wire, build, cancel};
use rustls::version::{TLS12, TLS13};

use super::client::{TlsClient, config, granted, open};
use super::clients::Front;
use super::pki::{Authority, Folder};
use super::{TlsPrimary, show};
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
            other.write_all(&request).unwrap();
            assert_eq!(other.read(&mut [0]).unwrap(), 0);
        }
        let messages = client.until(b'Z');
        let error = messages.iter().find(|(tag, _)| *tag == b'E').unwrap();
        assert!(String::from_utf8_lossy(&error.1).contains("57014"), "{encrypted}");
    }
}

/// Passes on what pgweir and a server say, and keeps what pgweir did.
struct Tap {
    port: u16,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Tap {
    fn on(server: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (heard, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (all, stopped) = (Arc::clone(&heard), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((client, _)) => pass_on(client, TcpStream::connect(server).unwrap(), &all),
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Self { port, heard, stop, thread: Some(thread) }
    }

    /// By connection, in the order in which they came.
    fn heard(&self) -> Vec<Vec<u8>> {
        self.heard.lock().unwrap().clone()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Both threads end with the connection.
fn pass_on(mut client: TcpStream, mut server: TcpStream, heard: &Arc<Mutex<Vec<Vec<u8>>>>) {
    client.set_nonblocking(false).unwrap();
    let (mut back, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let place = {
        let mut heard = heard.lock().unwrap();
        heard.push(Vec::new());
        heard.len() - 1
    };
    let heard = Arc::clone(heard);
    thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(read @ 1..) = client.read(&mut chunk) {
            heard.lock().unwrap()[place].extend_from_slice(&chunk[..read]);
            if server.write_all(&chunk[..read]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut back, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
}

#[test]
fn a_cancel_request_goes_to_a_server_by_the_way_of_its_session() {
    let tls = TlsPrimary::take();
    let root = Authority::root("the root");
    tls.show(&root.issue(|_| {}));
    let folder = Folder::new();
    let ca = folder.write("ca.pem", &root.pem);
    let place = Place::on(&tls.0);
    for (mode, encrypted) in [("disable", false), ("require", true), ("verify-full", true)] {
        let tap = Tap::on(tls.0.addr());
        let port = tap.port.to_string();
        let pgweir = start_pgweir(place.toml(&[
            ("databases.PLACE.host", "localhost"),
            ("databases.PLACE.port", &port),
            ("databases.PLACE.sslmode", mode),
            ("databases.PLACE.sslrootcert", show(&ca)),
            ("default_pool_size", "1"),
        ]));
        let running = || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active' \
                       AND datname = current_database()";
            place.psql(sql) == "1"
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut client = Wire::open(pgweir.addr(), &place.name, &place.name, "").await.unwrap();
            client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
            wait_until(SOON, running);
            cancel(pgweir.addr(), client.pid, &client.secret).await.unwrap();
            assert_eq!(client.outcome().await.unwrap().sqlstate(), "57014", "{mode}");
        });
        let heard = tap.heard();
        // It is repeated while the query runs.
        assert!(heard.len() >= 2, "{mode}: a session, and a cancel request");
        assert_eq!(heard.iter().any(|bytes| holds_cancel_code(bytes)), !encrypted, "{mode}");
        for bytes in heard.iter().filter(|_| encrypted) {
            let request = build::ssl_request();
            assert!(bytes.is_empty() || bytes.starts_with(&request), "{mode}");
            // One that is under way may have said no more.
            assert!(
                bytes.get(request.len()).is_none_or(|next| *next == 0x16),
                "{mode}: a handshake behind the request"
            );
        }
    }
}

/// Whether a cancel request is in there that anyone can read.
fn holds_cancel_code(bytes: &[u8]) -> bool {
    bytes.windows(4).any(|code| code == 80_877_102_u32.to_be_bytes())
}

#[test]
fn what_comes_in_one_piece_with_the_last_message_of_the_handshake_is_heard() {
    let front = Front::start("require", &[]);
    let (addr, name) = (front.pgweir.addr(), &front.place.name);
    let startup = build::startup(&[("user", name), ("database", name)]);
    for (version, renewing) in [(&TLS12, false), (&TLS13, false), (&TLS13, true)] {
        let config = config(&[], &[version]);
        // In TLS 1.2 it is the server who speaks last, but for sessions that are resumed.
        for again in [false, true] {
            let mut client = TlsClient::eager(granted(addr), &config, |machine| {
                machine.writer().write_all(&startup[..5]).unwrap();
                if renewing {
                    machine.refresh_traffic_keys().unwrap();
                }
                machine.writer().write_all(&startup[5..]).unwrap();
            });
            assert_eq!(client.is_resumed(), again);
            let messages = client.until(b'Z');
            let (_, key) = messages.into_iter().find(|(tag, _)| *tag == b'K').unwrap();
            client.send(&build::query("SELECT pg_sleep(60)"));
            // One that has nothing more to say, as those have who ask for a cancel.
            let request = build::cancel_request(i32::from_be_bytes(key[..4].try_into().unwrap()), &key[4..]);
            let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' \
                           AND state = 'active' AND datname = current_database()";
            wait_until(SOON, || front.place.psql(running) == "1");
            let mut other = TlsClient::eager(granted(addr), &config, |machine| {
                machine.writer().write_all(&request).unwrap();
                machine.send_close_notify();
            });
            assert_eq!(other.message(), None);
            let messages = client.until(b'Z');
            let error = messages.iter().find(|(tag, _)| *tag == b'E').unwrap();
            assert!(String::from_utf8_lossy(&error.1).contains("57014"), "{version:?}, {renewing}");
        }
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
        thread::sleep(Duration::from_millis(300));
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

//! Peers that break off, send ahead, or say what they should not.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use pgweir_harness::{wait_until, wire::build};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use rustls::{ClientConnection, ServerConfig, ServerConnection};

use super::client::{TlsClient, config, granted, open};
use super::clients::Front;
use super::pki::{Authority, Identity};
use super::psql;
use crate::support::{Place, SOON, primary, start_pgweir};

/// All that the peer sends until it closes.
fn rest(socket: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = socket.read_to_end(&mut bytes);
    bytes
}

#[test]
fn bytes_behind_a_request_for_encryption_are_refused() {
    let front = Front::start("prefer", &[]);
    let startup = build::startup(&[("user", &front.place.name), ("database", &front.place.name)]);
    for (name, request) in [("SSL", build::ssl_request()), ("encryption", build::gss_request())] {
        let mut socket = open(front.pgweir.addr());
        socket.write_all(&[request, startup.clone()].concat()).unwrap();
        let answer = rest(&mut socket);
        assert_eq!(answer.first(), Some(&b'E'), "{name}: {}", answer.escape_ascii());
        let words = format!("received unencrypted data after {name} request");
        assert!(String::from_utf8_lossy(&answer).contains(&words), "{name}: {}", answer.escape_ascii());
    }
}

#[test]
fn a_request_for_encryption_is_made_once() {
    let front = Front::start("prefer", &[]);
    for (name, request) in [("SSL", build::ssl_request()), ("GSS", build::gss_request())] {
        let mut client = TlsClient::on(granted(front.pgweir.addr()), &config(&[], &[&TLS13])).unwrap();
        client.send(&request);
        let (tag, body) = client.message().unwrap();
        assert_eq!(tag, b'E', "{name}");
        assert!(String::from_utf8_lossy(&body).contains("08P01"), "{name}: {}", body.escape_ascii());
        assert_eq!(client.message(), None, "{name}");
    }
}

#[test]
fn gss_is_declined_and_tls_may_follow() {
    let front = Front::start("prefer", &[]);
    let mut socket = open(front.pgweir.addr());
    for (request, want) in [(build::gss_request(), b'N'), (build::ssl_request(), b'S')] {
        socket.write_all(&request).unwrap();
        let mut answer = [0];
        socket.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [want]);
    }
    let mut client = TlsClient::on(socket, &config(&[], &[&TLS13])).unwrap();
    client.log_in(&front.place.name);
    assert_eq!(client.value("SELECT 7"), "7");
}

#[test]
fn a_client_may_break_off_at_every_byte_of_its_handshake() {
    let front = Front::start("prefer", &[]);
    let mut hello = Vec::new();
    let mut machine =
        ClientConnection::new(config(&["postgresql"], &[&TLS13]), "localhost".try_into().unwrap()).unwrap();
    machine.write_tls(&mut hello).unwrap();
    for cut in (0..hello.len()).step_by(7).chain([hello.len()]) {
        let mut socket = granted(front.pgweir.addr());
        socket.write_all(&hello[..cut]).unwrap();
        drop(socket);
    }
    // Garbage in place of a handshake.
    let mut socket = granted(front.pgweir.addr());
    socket.write_all(&[0; 64]).unwrap();
    let _ = rest(&mut socket);
    let metric = |name: &str| {
        let (_, body) = front.pgweir.http_get("/metrics").unwrap();
        crate::support::metric_in(&body, name, &[])
    };
    wait_until(SOON, || metric("pgweir_tls_failures_total") > 10.0 && metric("pgweir_process_clients") < 0.5);
    assert!(metric("pgweir_sessions_panicked_total") < 0.5);
    assert_eq!(front.psql("sslmode=verify-full", "SELECT 1"), Ok("1".to_owned()));
}

#[test]
fn a_spoilt_record_right_behind_the_handshake_is_refused_and_told() {
    let front = Front::start("require", &[]);
    let startup = build::startup(&[("user", &front.place.name), ("database", &front.place.name)]);
    let mark = front.pgweir.log().len();
    let mut client = TlsClient::eager_with(
        granted(front.pgweir.addr()),
        &config(&[], &[&TLS13]),
        |machine| machine.writer().write_all(&startup).unwrap(),
        |piece| *piece.last_mut().unwrap() ^= 1,
    );
    assert_eq!(client.message(), None);
    front.pgweir.wait_log_from(mark, "could not accept SSL connection", SOON).unwrap();
}

#[test]
fn a_session_without_close_notify_ends_like_any_other() {
    let front = Front::start("require", &[]);
    let mut client = TlsClient::on(granted(front.pgweir.addr()), &config(&[], &[&TLS13])).unwrap();
    client.log_in(&front.place.name);
    assert_eq!(client.value("SELECT 7"), "7");
    client.cut();
    front.pgweir.wait_log("client closed the connection without Terminate", SOON).unwrap();
}

/// What a server with this certificate answers a hello.
fn flight(identity: &Identity, socket: &mut TcpStream) -> Vec<u8> {
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
    let config = builder.with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let mut machine = ServerConnection::new(Arc::new(config)).unwrap();
    let mut flight = Vec::new();
    while flight.is_empty() {
        machine.read_tls(socket).unwrap();
        machine.process_new_packets().unwrap();
        while machine.wants_write() {
            machine.write_tls(&mut flight).unwrap();
        }
    }
    flight
}

#[test]
fn a_server_may_break_off_at_every_point_of_the_handshake_or_inject_plaintext() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let identity = Authority::root("the root").issue(|_| {});
    // One connection a story; the last one says no, which is final.
    let stories: Vec<Box<dyn Fn(&mut TcpStream) + Send>> = vec![
        Box::new(|_| {}),
        Box::new(|socket| socket.write_all(b"S").unwrap()),
        Box::new(|socket| socket.write_all(b"Sx").unwrap()),
        Box::new(|socket| socket.write_all(b"Nx").unwrap()),
        Box::new(|socket| socket.write_all(b"E\0\0\0\x08oops").unwrap()),
        Box::new(|socket| socket.write_all(b"?").unwrap()),
    ];
    let server = thread::spawn(move || {
        let serve = |story: &dyn Fn(&mut TcpStream)| {
            let (mut socket, _) = listener.accept().unwrap();
            let mut request = [0; 8];
            socket.read_exact(&mut request).unwrap();
            assert_eq!(request.as_slice(), build::ssl_request());
            story(&mut socket);
            let _ = socket.shutdown(Shutdown::Write);
            let _ = rest(&mut socket);
        };
        for story in stories {
            serve(&*story);
        }
        for part in 1..8 {
            serve(&|socket| {
                socket.write_all(b"S").unwrap();
                let flight = flight(&identity, socket);
                let _ = socket.write_all(&flight[..flight.len() * part / 8]);
            });
        }
        serve(&|socket| socket.write_all(b"N").unwrap());
    });
    let place = Place::on(primary());
    let (host, key, mode) = ("databases.PLACE.host", "databases.PLACE.port", "databases.PLACE.sslmode");
    let settings = [(host, "127.0.0.1"), (key, &port.to_string()), (mode, "require"), ("server_login_retry", "100ms")];
    let pgweir = start_pgweir(place.toml(&settings));
    let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
    let told = psql(place.cluster, &words, "SELECT 1").unwrap_err();
    assert!(told.contains("server does not support SSL, but SSL was required"), "{told}");
    server.join().unwrap();
    for words in [
        "received unencrypted data after SSL response",
        "server sent an error response during SSL exchange",
        "received invalid response to SSL negotiation",
        "the connection was closed during the TLS handshake",
    ] {
        pgweir.wait_log(words, SOON).unwrap();
    }
    assert!(!pgweir.log().contains("panic"), "{}", pgweir.log());
}

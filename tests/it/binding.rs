//! Channel binding over TLS on both sides: whoever sits between the two ends is found out.

pub(crate) mod between;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use pgweir_harness::wait_until;
use pgweir_harness::wire::build::{self, sasl, sasl_initial};
use postgres_protocol::authentication::sasl::{ChannelBinding as Binding, ScramSha256};
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::version::{TLS12, TLS13};
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_postgres::config::{ChannelBinding, SslMode};
use tokio_postgres::tls::{ChannelBinding as Data, TlsConnect, TlsStream};
use tokio_rustls::TlsConnector;

use crate::auth::{UserFile, libpq, stored};
use crate::support::{PASSWORD, Place, SOON, Site, metric_in, primary, start_pgweir};
use crate::tls::client::{TlsClient, config, granted};
use crate::tls::pki::{Folder, Identity};
use crate::tls::{TlsPrimary, psql, show};

use between::{Between, Meddling};

const PLAIN: &str = "SCRAM-SHA-256";
const PLUS: &str = "SCRAM-SHA-256-PLUS";

/// Begins a client's exchange.
type Make<'a> = Box<dyn Fn() -> ScramSha256 + 'a>;

/// The hash that RFC 5929 wants of a certificate; none where it is undefined.
type Hash = Option<fn(&[u8]) -> Vec<u8>>;

/// A certificate that nobody else signed.
struct Shape {
    name: &'static str,
    /// How openssl makes it.
    made: &'static str,
    hash: Hash,
    /// Whether Postgres and libpq work with it: OpenSSL's security level leaves SHA-1 out.
    modern: bool,
}

#[rustfmt::skip]
const SHAPES: [Shape; 9] = [
    Shape { name: "ECDSA P-256, SHA-256", made: "ec -pkeyopt ec_paramgen_curve:P-256 -sha256", hash: Some(sha256), modern: true },
    Shape { name: "ECDSA P-384, SHA-384", made: "ec -pkeyopt ec_paramgen_curve:P-384 -sha384", hash: Some(sha384), modern: true },
    Shape { name: "ECDSA P-256, SHA-512", made: "ec -pkeyopt ec_paramgen_curve:P-256 -sha512", hash: Some(sha512), modern: true },
    Shape { name: "RSA, SHA-256",         made: "rsa:2048 -sha256",                             hash: Some(sha256), modern: true },
    Shape { name: "RSA, SHA-384",         made: "rsa:2048 -sha384",                             hash: Some(sha384), modern: true },
    Shape { name: "RSA, SHA-512",         made: "rsa:2048 -sha512",                             hash: Some(sha512), modern: true },
    Shape { name: "RSA-PSS, SHA-384",     made: "rsa:2048 -sha384 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:48", hash: Some(sha384), modern: true },
    Shape { name: "RSA, SHA-1",           made: "rsa:2048 -sha1",                               hash: Some(sha256), modern: false },
    Shape { name: "Ed25519",              made: "ed25519",                                      hash: None,         modern: true },
];

fn sha256(der: &[u8]) -> Vec<u8> {
    Sha256::digest(der).to_vec()
}

fn sha384(der: &[u8]) -> Vec<u8> {
    Sha384::digest(der).to_vec()
}

fn sha512(der: &[u8]) -> Vec<u8> {
    Sha512::digest(der).to_vec()
}

impl Shape {
    fn identity(&self, folder: &Folder) -> Identity {
        let made = self.made;
        folder.openssl(&format!(
            "req -x509 -newkey {made} -nodes -keyout new.key -out new.crt -days 2 -subj /CN=localhost"
        ));
        Identity { certificate: folder.read("new.crt"), key: folder.read("new.key") }
    }
}

fn der(identity: &Identity) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap()
}

/// A pgweir that shows this certificate to clients, and asks them for SCRAM.
fn front(folder: &Folder, identity: &Identity, settings: &[(&str, &str)]) -> Site<'static> {
    let (cert, key) = folder.identity("front", identity);
    let own = [
        ("auth_type", "scram-sha-256"),
        ("client_tls_sslmode", "allow"),
        ("client_tls_cert_file", show(&cert)),
        ("client_tls_key_file", show(&key)),
    ];
    Site::before(Place::on(primary()), &[&own[..], settings].concat())
}

fn words(name: &str, address: SocketAddr, more: &str) -> String {
    format!(
        "host=127.0.0.1 port={} user={name} dbname={name} password={PASSWORD} sslmode=require {more}",
        address.port()
    )
}

/// TLS for tokio-postgres.
struct Rustls {
    config: Arc<ClientConfig>,
    hash: Hash,
}

struct RustlsStream {
    stream: tokio_rustls::client::TlsStream<TcpStream>,
    hash: Hash,
}

impl TlsConnect<TcpStream> for Rustls {
    type Stream = RustlsStream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<RustlsStream>> + Send>>;

    fn connect(self, socket: TcpStream) -> Self::Future {
        Box::pin(async move {
            let connector = TlsConnector::from(self.config);
            let stream = connector.connect("localhost".try_into().unwrap(), socket).await?;
            Ok(RustlsStream { stream, hash: self.hash })
        })
    }
}

impl TlsStream for RustlsStream {
    fn channel_binding(&self) -> Data {
        let (_, connection) = self.stream.get_ref();
        let leaf = connection.peer_certificates().and_then(|chain| chain.first());
        let data = leaf.zip(self.hash).map(|(leaf, hash)| Data::tls_server_end_point(hash(leaf)));
        data.unwrap_or_else(Data::none)
    }
}

impl AsyncRead for RustlsStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for RustlsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// tokio-postgres over TLS: what it selects, or what it complains of.
async fn tokio_postgres(
    name: &str,
    address: SocketAddr,
    binding: ChannelBinding,
    tls: Rustls,
) -> Result<String, String> {
    let mut config = tokio_postgres::Config::new();
    config.user(name).dbname(name).password(PASSWORD).ssl_mode(SslMode::Require).channel_binding(binding);
    let socket = TcpStream::connect(address).await.unwrap();
    let told = |error: tokio_postgres::Error| {
        let source = std::error::Error::source(&error).map_or_else(String::new, ToString::to_string);
        format!("{error}: {source}")
    };
    let (client, connection) = config.connect_raw(socket, tls).await.map_err(told)?;
    let driving = tokio::spawn(connection);
    let answer = client.query_one("SELECT 'bound'", &[]).await.map_err(told);
    drop(client);
    let _ = driving.await;
    answer.map(|row| row.get(0))
}

#[tokio::test]
async fn clients_that_insist_on_it_get_in_whatever_the_certificate_where_it_is_defined() {
    let folder = Folder::new();
    for shape in SHAPES {
        let identity = shape.identity(&folder);
        let site = front(&folder, &identity, &[]);
        let (name, address) = (site.name(), site.pgweir.addr());
        for version in ["TLSv1.2", "TLSv1.3"] {
            let version = format!("ssl_min_protocol_version={version} ssl_max_protocol_version={version}");
            let conninfo = words(name, address, &format!("channel_binding=require {version}"));
            let by_psql = psql(primary(), &conninfo, "SELECT 'bound'");
            let by_psycopg = libpq(&[conninfo]).remove(0);
            if shape.hash.is_some() {
                assert_eq!(by_psql, Ok("bound".to_owned()), "{}", shape.name);
                assert_eq!(by_psycopg, format!("ok {name}"), "{}", shape.name);
            } else {
                let told = "channel binding is required, but server did not offer an authentication method that supports channel binding";
                assert!(by_psql.as_ref().is_err_and(|said| said.contains(told)), "{}: {by_psql:?}", shape.name);
                assert!(by_psycopg.contains(told), "{}: {by_psycopg}", shape.name);
            }
        }
        let wanted = if shape.hash.is_some() { ChannelBinding::Require } else { ChannelBinding::Prefer };
        // The second login resumes the first one's session, and is bound to the same certificate.
        let config = config(&[], &[&TLS13, &TLS12]);
        for _ in 0..2 {
            let tls = Rustls { config: config.clone(), hash: shape.hash };
            let got = tokio_postgres(name, address, wanted, tls).await;
            assert_eq!(got, Ok("bound".to_owned()), "{}", shape.name);
        }
        wait_until(SOON, || site.metric("pgweir_tls_resumptions_total", &["side=\"client\""]) > 0.5);
        let preferring = psql(primary(), &words(name, address, "channel_binding=prefer"), "SELECT 'bound'");
        assert_eq!(preferring, Ok("bound".to_owned()), "{}", shape.name);
        let plain = words(name, address, "channel_binding=require sslmode=disable");
        let told = psql(primary(), &plain, "SELECT 1").unwrap_err();
        assert!(told.contains("channel binding required, but SSL not in use"), "{told}");
    }
}

#[test]
fn whoever_sits_between_a_client_and_us_is_found_out() {
    let folder = Folder::new();
    let site = front(&folder, &SHAPES[0].identity(&folder), &[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    #[rustfmt::skip]
    let table = [
        (Meddling::Relays,        "disable", Ok("bound")),
        (Meddling::Relays,        "prefer",  Err("SCRAM channel binding check failed")),
        (Meddling::Relays,        "require", Err("SCRAM channel binding check failed")),
        (Meddling::HidesTheOffer, "disable", Ok("bound")),
        (Meddling::HidesTheOffer, "prefer",  Err("SCRAM channel binding negotiation error")),
        (Meddling::HidesTheOffer, "require", Err("channel binding is required")),
    ];
    let other = SHAPES[0].identity(&folder);
    for (meddling, binding, want) in table {
        let between = Between::start(site.pgweir.addr(), &other, meddling);
        let conninfo = words(site.name(), between.address, &format!("channel_binding={binding}"));
        let got = psql(primary(), &conninfo, "SELECT 'bound'");
        match (&got, want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{meddling:?} {binding}"),
            (Err(got), Err(want)) => assert!(got.contains(want), "{meddling:?} {binding}: {got}"),
            _ => panic!("{meddling:?} {binding}: {got:?}"),
        }
        let by_driver = match binding {
            "disable" => ChannelBinding::Disable,
            "prefer" => ChannelBinding::Prefer,
            _ => ChannelBinding::Require,
        };
        let tls = Rustls { config: config(&[], &[&TLS13]), hash: SHAPES[0].hash };
        let got = runtime.block_on(tokio_postgres(site.name(), between.address, by_driver, tls));
        assert_eq!(got.is_ok(), want.is_ok(), "tokio-postgres, {meddling:?} {binding}: {got:?}");
    }
}

/// A client's answers to the offer of both mechanisms: its mechanism, its first message, and whether it goes on with a
/// proof.
fn attempt(address: SocketAddr, name: &str, mechanism: &str, mut scram: ScramSha256, first: Option<&[u8]>) -> String {
    let mut client = TlsClient::on(granted(address), &config(&[], &[&TLS13])).unwrap();
    client.send(&build::startup(&[("user", name), ("database", name)]));
    let (tag, offer) = client.message().unwrap();
    assert_eq!((tag, &offer[4..]), (b'R', &b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"[..]));
    client.send(&sasl_initial(mechanism, first.unwrap_or(scram.message())));
    let mut messages = 0;
    loop {
        let (tag, body) = client.message().unwrap();
        match tag {
            b'R' if body[..4] == [0, 0, 0, 11] => {
                scram.update(&body[4..]).unwrap();
                client.send(&sasl(scram.message()));
            }
            b'E' => {
                let fields: Vec<&[u8]> = body.split(|byte| *byte == 0).collect();
                let code = fields.iter().find(|field| field.first() == Some(&b'C')).unwrap();
                return String::from_utf8(code[1..].to_vec()).unwrap();
            }
            b'Z' => return "in".to_owned(),
            _ => messages += 1,
        }
        assert!(messages < 100);
    }
}

#[test]
fn what_a_client_says_of_channel_binding_is_answered_as_postgres_answers_it() {
    let (folder, tls) = (Folder::new(), TlsPrimary::take());
    let identity = SHAPES[0].identity(&folder);
    tls.show(&identity);
    tls.hba("hostssl all all 127.0.0.1/32 scram-sha-256");
    let direct = Place::on(&tls.0);
    let site = front(&folder, &identity, &[]);
    let right = sha256(&der(&identity));
    let bound = |data: &[u8]| ScramSha256::new(PASSWORD.as_bytes(), Binding::tls_server_end_point(data.to_vec()));
    let without = || ScramSha256::new(PASSWORD.as_bytes(), Binding::unsupported());
    let unrequested = || ScramSha256::new(PASSWORD.as_bytes(), Binding::unrequested());
    #[rustfmt::skip]
    let table: [(&str, &str, Make<'_>, Option<&[u8]>, &str); 11] = [
        ("bound",                         PLUS,  Box::new(|| bound(&right)),      None, "in"),
        ("another certificate's hash",    PLUS,  Box::new(|| bound(&[7; 32])),    None, "28000"),
        ("half a hash",                   PLUS,  Box::new(|| bound(&right[..16])), None, "28000"),
        ("no hash",                       PLUS,  Box::new(|| bound(&[])),         None, "28000"),
        ("able, and saw no offer",        PLAIN, Box::new(unrequested),           None, "28000"),
        ("not able",                      PLAIN, Box::new(without),               None, "in"),
        ("bound without saying so",       PLAIN, Box::new(|| bound(&right)),      None, "08P01"),
        ("says so and is not bound",      PLUS,  Box::new(without),               None, "08P01"),
        ("says so and saw no offer",      PLUS,  Box::new(unrequested),           None, "08P01"),
        ("another type",                  PLUS,  Box::new(without), Some(b"p=tls-unique,,n=,r=abcdefgh"),   "08P01"),
        ("no type",                       PLUS,  Box::new(without), Some(b"p=,,n=,r=abcdefgh"),             "08P01"),
    ];
    for (case, mechanism, make, first, want) in table {
        for (address, name, who) in
            [(tls.0.addr(), direct.name.as_str(), "Postgres"), (site.pgweir.addr(), site.name(), "pgweir")]
        {
            assert_eq!(attempt(address, name, mechanism, make(), first), want, "{case}, {who}");
        }
    }
}

/// A pgweir in front of a Postgres with TLS; psql's answer through it.
fn through(tls: &TlsPrimary, place: &Place<'_>, settings: &[(&str, &str)]) -> Result<String, String> {
    let own = [("databases.PLACE.sslmode", "require")];
    let pgweir = start_pgweir(place.toml(&[&own[..], settings].concat()));
    let conninfo = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
    psql(&tls.0, &conninfo, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
}

#[test]
fn logins_to_a_server_are_bound_to_its_certificate_where_that_is_defined() {
    let (folder, tls) = (Folder::new(), TlsPrimary::take());
    let place = Place::on(&tls.0);
    tls.hba("hostssl all all 127.0.0.1/32 scram-sha-256");
    for shape in SHAPES.iter().filter(|shape| shape.modern) {
        tls.show(&shape.identity(&folder));
        for versions in ["tlsv1.2", "tlsv1.3"] {
            let binding = |binding| [("databases.PLACE.channel_binding", binding), ("server_tls_protocols", versions)];
            let got = through(&tls, &place, &binding("require"));
            if shape.hash.is_some() {
                assert_eq!(got, Ok("t".to_owned()), "{} {versions}", shape.name);
            } else {
                let told = got.unwrap_err();
                let want = "it is not defined for the server's certificate";
                assert!(told.contains(want), "{} {versions}: {told}", shape.name);
                assert_eq!(through(&tls, &place, &binding("prefer")), Ok("t".to_owned()), "{}", shape.name);
            }
        }
    }
}

#[test]
fn whoever_sits_between_us_and_a_server_is_found_out() {
    let (folder, tls) = (Folder::new(), TlsPrimary::take());
    let place = Place::on(&tls.0);
    tls.show(&SHAPES[0].identity(&folder));
    tls.hba("hostssl all all 127.0.0.1/32 scram-sha-256");
    let other = SHAPES[0].identity(&folder);
    #[rustfmt::skip]
    let table = [
        (Meddling::Relays,        "disable", Ok("t")),
        (Meddling::Relays,        "prefer",  Err("SCRAM channel binding check failed")),
        (Meddling::Relays,        "require", Err("SCRAM channel binding check failed")),
        (Meddling::HidesTheOffer, "disable", Ok("t")),
        (Meddling::HidesTheOffer, "prefer",  Err("SCRAM channel binding negotiation error")),
        (Meddling::HidesTheOffer, "require", Err("channel_binding = \"require\", and the server does not offer it")),
    ];
    for (meddling, binding, want) in table {
        let between = Between::start(tls.0.addr(), &other, meddling);
        let port = between.address.port().to_string();
        let got = through(&tls, &place, &[("databases.PLACE.port", &port), ("server_channel_binding", binding)]);
        match (&got, want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{meddling:?} {binding}"),
            (Err(got), Err(want)) => assert!(got.contains(want), "{meddling:?} {binding}: {got}"),
            _ => panic!("{meddling:?} {binding}: {got:?}"),
        }
    }
}

#[test]
fn what_a_client_proved_itself_by_opens_a_server_that_has_to_be_bound() {
    let (folder, tls) = (Folder::new(), TlsPrimary::take());
    tls.show(&SHAPES[1].identity(&folder));
    tls.hba("hostssl all all 127.0.0.1/32 scram-sha-256");
    let place = Place::on(&tls.0);
    let name = place.name.as_str();
    // The pooler has the verifier alone: what the client shows are the keys, with which the pooler makes a proof of its
    // own, bound to the server's certificate.
    let file = UserFile::new(&format!("\"{name}\" \"{}\"\n", stored(&place, "scram-sha-256")));
    let (cert, key) = folder.identity("front", &SHAPES[0].identity(&folder));
    let (port, path) = (place.cluster.port().to_string(), file.path());
    let settings = [
        ("auth_type", "scram-sha-256"),
        ("auth_file", path.as_str()),
        ("client_tls_sslmode", "require"),
        ("client_tls_cert_file", show(&cert)),
        ("client_tls_key_file", show(&key)),
        ("databases.PLACE.host", place.cluster.host()),
        ("databases.PLACE.port", port.as_str()),
        ("databases.PLACE.sslmode", "require"),
        ("databases.PLACE.channel_binding", "require"),
    ];
    let named: Vec<(String, &str)> = settings.iter().map(|(key, value)| (key.replace("PLACE", name), *value)).collect();
    let named: Vec<(&str, &str)> = named.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    let pgweir = start_pgweir(pgweir_harness::pgweir_toml(place.cluster, &named));
    for _ in 0..2 {
        let got = psql(&tls.0, &words(name, pgweir.addr(), "channel_binding=require"), "SELECT session_user");
        assert_eq!(got, Ok(name.to_owned()));
    }
    let wrong = words(name, pgweir.addr(), "channel_binding=require password=wrong");
    assert!(psql(&tls.0, &wrong, "SELECT 1").is_err_and(|told| told.contains("password authentication failed")));
}

#[test]
fn logins_over_resumed_sessions_are_bound_too() {
    let folder = Folder::new();
    // Postgres resumes none, so that the server is pgweir.
    let behind = front(&folder, &SHAPES[0].identity(&folder), &[]);
    let port = behind.pgweir.port().to_string();
    let place = Place { cluster: primary(), name: behind.name().to_owned() };
    let pgweir = start_pgweir(place.toml(&[
        ("databases.PLACE.host", "127.0.0.1"),
        ("databases.PLACE.port", &port),
        ("databases.PLACE.sslmode", "require"),
        ("databases.PLACE.channel_binding", "require"),
        ("server_lifetime", "0"),
    ]));
    let conninfo = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
    for _ in 0..4 {
        assert_eq!(psql(primary(), &conninfo, "SELECT 'bound'"), Ok("bound".to_owned()));
    }
    wait_until(SOON, || {
        let (_, body) = pgweir.http_get("/metrics").unwrap();
        metric_in(&body, "pgweir_tls_resumptions_total", &["side=\"server\""]) > 0.5
    });
}

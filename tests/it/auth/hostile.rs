//! Clients that do not keep to the exchange.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pgweir_harness::wire::build::{message, message_lying, password, query, sasl, sasl_initial};
use pgweir_harness::wire::{ServerError, Wire};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};

use crate::support::{PASSWORD, Site, assert_value};

const SCRAM: (&str, &str) = ("auth_type", "scram-sha-256");
const FIRST: &[u8] = b"n,,n=,r=0123456789abcdefghijklmn";

/// A client that was asked for a proof; the kind of the request and its data.
async fn asked(site: &Site<'_>) -> (Wire, i32, Vec<u8>) {
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    wire.startup(&[("user", site.name()), ("database", site.name())]).await.unwrap();
    let (kind, data) = wire.recv().await.unwrap().authentication().unwrap();
    (wire, kind, data)
}

/// The next message, which must be an error that ends the connection.
async fn error(wire: &mut Wire, case: &str) -> ServerError {
    let message = wire.recv().await.unwrap();
    let error = message.server_error().unwrap_or_else(|| panic!("{case}: {message:?}"));
    assert_eq!(error.severity(), "FATAL", "{case}: {error}");
    assert!(wire.eof().await, "{case}: not closed after {error}");
    error
}

#[tokio::test]
async fn what_has_no_place_in_the_exchange_ends_it() {
    let site = Site::start(&[SCRAM]);
    let long = [b"n,,n=,r=".to_vec(), vec![b'x'; 5000]].concat();
    #[rustfmt::skip]
    let table: Vec<(&str, Vec<u8>, &str, &str)> = vec![
        ("an unknown mechanism",   sasl_initial("SCRAM-SHA-1", FIRST),             "08P01", "client selected an invalid SASL authentication mechanism"),
        ("PLUS without TLS",       sasl_initial("SCRAM-SHA-256-PLUS", b"p=tls-server-end-point,,n=,r=abc"), "08P01", "client selected an invalid SASL authentication mechanism"),
        ("a password",             password(PASSWORD),                             "08P01", ""),
        ("binding without TLS",    sasl_initial("SCRAM-SHA-256", b"p=tls-server-end-point,,n=,r=abc"), "08P01", "malformed SCRAM message"),
        ("another binding type",   sasl_initial("SCRAM-SHA-256", b"p=tls-unique,,n=,r=abc"), "08P01", "channel-binding type"),
        ("an authorization id",    sasl_initial("SCRAM-SHA-256", b"n,a=postgres,n=,r=abc"), "0A000", "authorization identity"),
        ("an extension",           sasl_initial("SCRAM-SHA-256", b"n,,m=x,n=,r=abc"), "0A000", "extension"),
        ("no nonce",               sasl_initial("SCRAM-SHA-256", b"n,,n=,x=abc"),  "08P01", "malformed SCRAM message"),
        ("an empty nonce",         sasl_initial("SCRAM-SHA-256", b"n,,n=,r="),     "08P01", "malformed SCRAM message"),
        ("a nonce with a NUL",     sasl_initial("SCRAM-SHA-256", b"n,,n=,r=a\0b"), "08P01", "malformed SCRAM message"),
        ("a nonce of 5000 bytes",  sasl_initial("SCRAM-SHA-256", &long),           "08P01", "malformed SCRAM message"),
        ("nothing",                sasl_initial("SCRAM-SHA-256", b""),             "08P01", "malformed SCRAM message"),
        ("half a message",         message(b'p', b"SCRAM-SHA-256"),                "08P01", ""),
        ("a length that lies",     message(b'p', b"SCRAM-SHA-256\0\0\0\x01\0abc"), "08P01", ""),
        ("a negative length",      message(b'p', b"SCRAM-SHA-256\0\xff\xff\xff\xfeabc"), "08P01", ""),
        ("the largest length",     message(b'p', b"SCRAM-SHA-256\0\x7f\xff\xff\xffabc"), "08P01", ""),
        ("a query",                query("SELECT 1"),                              "08P01", "expected password response"),
        ("a huge message",         message_lying(b'p', 1 << 30, b"SCRAM-SHA-256"), "08P01", ""),
        ("65 536 bytes",           message_lying(b'p', 65_540, b"SCRAM-SHA-256"),  "08P01", ""),
    ];
    for (case, bytes, code, words) in table {
        let (mut wire, kind, _) = asked(&site).await;
        assert_eq!(kind, 10, "{case}");
        wire.send(&bytes).await.unwrap();
        let error = error(&mut wire, case).await;
        assert_eq!(error.sqlstate(), code, "{case}: {error}");
        assert!(error.message().contains(words), "{case}: {error}");
    }
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
}

#[tokio::test]
async fn a_first_message_may_come_late_as_postgres_allows() {
    let site = Site::start(&[SCRAM]);
    let (mut wire, _, _) = asked(&site).await;
    wire.send(&message(b'p', b"SCRAM-SHA-256\0\xff\xff\xff\xff")).await.unwrap();
    assert_eq!(wire.recv().await.unwrap().authentication(), Some((11, Vec::new())));
    let mut scram = ScramSha256::new(PASSWORD.as_bytes(), ChannelBinding::unsupported());
    wire.send(&sasl(scram.message())).await.unwrap();
    let (_, data) = wire.recv().await.unwrap().authentication().unwrap();
    scram.update(&data).unwrap();
    wire.send(&sasl(scram.message())).await.unwrap();
    let (kind, data) = wire.recv().await.unwrap().authentication().unwrap();
    assert_eq!(kind, 12);
    scram.finish(&data).unwrap();
    wire.recv_until_ready().await.unwrap();
}

#[tokio::test]
async fn a_proof_that_was_seen_opens_nothing() {
    let site = Site::start(&[SCRAM]);
    // A whole login, and what an eavesdropper has of it.
    let (mut wire, _, _) = asked(&site).await;
    let mut scram = ScramSha256::new(PASSWORD.as_bytes(), ChannelBinding::unsupported());
    let first = scram.message().to_vec();
    wire.send(&sasl_initial("SCRAM-SHA-256", &first)).await.unwrap();
    let (_, data) = wire.recv().await.unwrap().authentication().unwrap();
    scram.update(&data).unwrap();
    let last = scram.message().to_vec();
    wire.send(&sasl(&last)).await.unwrap();
    wire.recv_until_ready().await.unwrap();

    let (mut wire, _, _) = asked(&site).await;
    wire.send(&sasl_initial("SCRAM-SHA-256", &first)).await.unwrap();
    let (_, again) = wire.recv().await.unwrap().authentication().unwrap();
    assert_ne!(data, again, "the nonce is a fresh one");
    wire.send(&sasl(&last)).await.unwrap();
    let told = error(&mut wire, "replayed").await;
    assert_eq!((told.sqlstate(), told.message()), ("08P01", "invalid SCRAM response"));

    // The same proof under the new nonce.
    let (mut wire, _, _) = asked(&site).await;
    wire.send(&sasl_initial("SCRAM-SHA-256", &first)).await.unwrap();
    let (_, again) = wire.recv().await.unwrap().authentication().unwrap();
    let again = String::from_utf8(again).unwrap();
    let nonce = again.split(',').next().unwrap();
    let last = String::from_utf8(last).unwrap();
    let proof = last.split(",p=").nth(1).unwrap();
    wire.send(&sasl(format!("c=biws,{nonce},p={proof}").as_bytes())).await.unwrap();
    assert_eq!(error(&mut wire, "another's proof").await.sqlstate(), "28P01");
}

#[tokio::test]
async fn a_last_message_that_differs_from_the_first_is_refused() {
    let site = Site::start(&[SCRAM]);
    let zeros = STANDARD.encode([0; 32]);
    #[rustfmt::skip]
    let table: [(&str, &str, &str, &str); 7] = [
        ("another binding flag", "c=eSws,r=NONCE,p=PROOF",     "08P01", "malformed SCRAM message"),
        ("another nonce",        "c=biws,r=other,p=PROOF",     "08P01", "invalid SCRAM response"),
        ("a longer nonce",       "c=biws,r=NONCEx,p=PROOF",    "08P01", "invalid SCRAM response"),
        ("no proof",             "c=biws,r=NONCE",             "08P01", "malformed SCRAM message"),
        ("half a proof",         "c=biws,r=NONCE,p=AAAA",      "08P01", "malformed SCRAM message"),
        ("more behind it",       "c=biws,r=NONCE,p=PROOF,x=y", "08P01", "malformed SCRAM message"),
        ("a wrong proof",        "c=biws,r=NONCE,p=PROOF",     "28P01", "password authentication failed"),
    ];
    for (case, text, code, words) in table {
        let (mut wire, _, _) = asked(&site).await;
        wire.send(&sasl_initial("SCRAM-SHA-256", FIRST)).await.unwrap();
        let (_, data) = wire.recv().await.unwrap().authentication().unwrap();
        let data = String::from_utf8(data).unwrap();
        let nonce = data.split(',').next().unwrap().strip_prefix("r=").unwrap();
        wire.send(&sasl(text.replace("NONCE", nonce).replace("PROOF", &zeros).as_bytes())).await.unwrap();
        let error = error(&mut wire, case).await;
        assert_eq!(error.sqlstate(), code, "{case}: {error}");
        assert!(error.message().contains(words), "{case}: {error}");
    }
}

#[tokio::test]
async fn an_md5_answer_opens_nothing_a_second_time() {
    let site = Site::start(&[("auth_type", "md5")]);
    let (mut wire, kind, salt) = asked(&site).await;
    assert_eq!(kind, 5);
    let answer = md5_hash(site.name().as_bytes(), PASSWORD.as_bytes(), salt.clone().try_into().unwrap());
    wire.send(&password(&answer)).await.unwrap();
    wire.recv_until_ready().await.unwrap();
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, &str); 6] = [
        ("replayed",         password(&answer),                         "28P01"),
        ("the password",     password(PASSWORD),                        "28P01"),
        ("empty",            password(""),                              "28P01"),
        ("no NUL",           message(b'p', answer.as_bytes()),          "08P01"),
        ("two texts",        message(b'p', b"md5\0md5\0"),              "08P01"),
        ("SASL",             sasl_initial("SCRAM-SHA-256", FIRST),      "08P01"),
    ];
    for (case, bytes, code) in table {
        let (mut wire, _, other) = asked(&site).await;
        assert_ne!(other, salt, "{case}");
        wire.send(&bytes).await.unwrap();
        assert_eq!(error(&mut wire, case).await.sqlstate(), code, "{case}");
    }
}

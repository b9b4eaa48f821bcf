//! Servers that break the protocol, by malice or by mistake: at login, on a lent connection, and anywhere at random. A
//! clear error, nothing of it to another client, nothing kept of the connection, bounded memory.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use futures_util::future::join_all;
use pgweir_harness::mock_server::say;
use pgweir_harness::wire::build::{message, message_lying};
use pgweir_harness::wire::{ServerError, Wire};
use pgweir_harness::{MockServer, Pgweir, Step, pgweir_toml, wait_until, wait_until_async};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::support::{PASSWORD, Place, SOON, assert_value, metric_in, primary, start_pgweir};

/// One pgweir before all these servers: database `dbN` is on the Nth. Its user is `db`; clients are trusted.
fn pgweir_before(servers: &[MockServer], settings: &[(&str, &str)]) -> Pgweir {
    let mut all: Vec<(String, String)> = vec![
        ("auth_type".to_owned(), "trust".to_owned()),
        ("users.db.password".to_owned(), "client-secret".to_owned()),
    ];
    for (number, server) in servers.iter().enumerate() {
        let key = |key: &str| format!("databases.db{number}.{key}");
        all.push((key("host"), "127.0.0.1".to_owned()));
        all.push((key("port"), server.addr().port().to_string()));
        all.push((key("user"), "db".to_owned()));
        all.push((key("password"), PASSWORD.to_owned()));
    }
    all.extend(settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    let all: Vec<(&str, &str)> = all.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    start_pgweir(pgweir_toml(primary(), &all))
}

async fn login(pgweir: &Pgweir, number: usize) -> Result<Wire, ServerError> {
    let mut wire = Wire::connect(pgweir.addr()).await.unwrap();
    wire.set_patience(Duration::from_mins(1));
    match wire.login("db", &format!("db{number}"), PASSWORD).await {
        Ok(_) => Ok(wire),
        Err(error) => Err(error.server_error().unwrap_or_else(|| panic!("db{number}: {error}"))),
    }
}

/// What is told of a server that says nothing, or not enough.
const SILENCE: &str = "no answer within server_connect_timeout";

/// What a client is to see.
#[derive(Clone, Copy, Debug)]
enum Want {
    /// Nothing of it: it logs in and is served.
    Served,
    /// Our own error at once, with these words in it.
    Told(&'static str),
    /// The server's own error at once, with this SQLSTATE.
    Refused(&'static str),
    /// It may pass: the client waits for as long as it may, and is told these words then.
    Waits(&'static str),
}

impl Want {
    fn is_silence(self) -> bool {
        matches!(self, Self::Waits(SILENCE))
    }
}

/// Our part of the nonce, from a `SASLInitialResponse`.
fn nonce(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body).into_owned();
    text.split("r=").nth(1).unwrap_or_default().to_owned()
}

fn challenge(text: &str) -> Vec<u8> {
    say::auth(11, text.as_bytes())
}

/// What a hostile server says first, and what becomes of it. One row a case.
fn hostile_logins() -> Vec<(&'static str, Vec<Step>, Want)> {
    use Step::{Flood, Hang, Receive, Reply, Reset, Scram, Send, Serve, Startup};
    use Want::{Refused, Served, Told, Waits};
    let ok = || say::auth(0, b"");
    let offer = || Send(say::auth(10, b"SCRAM-SHA-256\0\0"));
    let first = |bytes: Vec<u8>| vec![Startup, Send(bytes), Hang];
    let asked = |make: fn(&[u8]) -> Vec<u8>| vec![Startup, offer(), Receive, Reply(make), Hang];
    let proven = |last: fn(Vec<u8>) -> Vec<u8>| vec![Startup, Scram { password: PASSWORD, last }, Hang];
    let then = |bytes: Vec<u8>| vec![Startup, Send([ok(), bytes].concat()), Hang];
    let after = |bytes: Vec<u8>| {
        vec![Startup, Send([ok(), say::greeting()].concat()), Receive, Send([say::answer("x"), bytes].concat()), Hang]
    };
    let served = |bytes: Vec<u8>| vec![Startup, Send([ok(), bytes].concat()), Serve];
    #[rustfmt::skip]
    let table = vec![
        ("an honest server",           vec![Startup, Scram { password: PASSWORD, last: |last| last }, Send([ok(), say::greeting()].concat()), Serve], Served),
        // Errors.
        ("CVE-2026-6666: an error without SQLSTATE", first(message(b'E', b"SFATAL\0VFATAL\0Mno code\0\0")), Waits("XX000: no code")),
        ("an error without fields",    first(message(b'E', b"\0")), Waits("XX000")),
        ("an error without a body",    first(message(b'E', b"")), Waits("XX000")),
        ("a field without an end",     first(message(b'E', b"SFATAL\0C28P01")), Waits("XX000")),
        ("a long error",               first(say::error("FATAL", "28000", &"x".repeat(60_000))), Refused("28000")),
        ("an error that is none",      first(say::error("WARNING", "28P01", "x")), Refused("28P01")),
        // Frames.
        ("an unknown message",         first(message(b'x', b"")), Told("message type has the unknown value 0x78")),
        ("length 0",                   first(message_lying(b'R', 0, b"")), Told("message 0x52 declares 0 bytes")),
        ("length 3",                   first(message_lying(b'R', 3, b"")), Told("message 0x52 declares 3 bytes")),
        ("length 2^31",                first(message_lying(b'R', 1 << 31, b"")), Told("declares 2147483648 bytes, limit 65536")),
        ("a negative length",          first(message_lying(b'S', u32::MAX, b"")), Told("declares 4294967295 bytes, limit 65536")),
        ("just too long",              first(message_lying(b'N', 65_537, b"")), Told("declares 65537 bytes, limit 65536")),
        ("another protocol",           first(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()), Told("message 0x48 declares")),
        ("half a message",             first(ok()[..5].to_vec()), Waits(SILENCE)),
        ("half a header",              first(ok()[..3].to_vec()), Waits(SILENCE)),
        ("silence",                    vec![Startup, Hang], Waits(SILENCE)),
        ("silence after the login",    then(say::greeting()), Waits(SILENCE)),
        ("the end",                    vec![Startup], Waits("end of file")),
        ("a reset",                    vec![Startup, Reset], Waits("reset")),
        // Without end.
        ("endless notices",            vec![Startup, Flood(say::notice("x"))], Told("more than 1000 messages")),
        ("endless long notices",       vec![Startup, Flood(say::notice(&"x".repeat(60_000)))], Told("more than 1048576 bytes")),
        ("endless parameters",         vec![Startup, Send(ok()), Flood(say::parameter("a", "b"))], Told("more than 1000 messages")),
        ("huge parameters",            vec![Startup, Send(ok()), Flood(say::parameter("a", &"b".repeat(40_000)))], Told("more than 65536 bytes of parameters")),
        ("endless rows",               vec![Startup, Send([ok(), say::greeting()].concat()), Flood(say::row("x"))], Told("more than 1000 messages")),
        ("a parameter without a value", then(message(b'S', b"a\0")), Told("ParameterStatus.value has no terminating NUL")),
        // Requests.
        ("an unknown request",         first(say::auth(99, b"")), Told("method number 99, which is not supported")),
        ("half a request",             first(message(b'R', b"\0\0")), Told("Authentication.kind is cut short")),
        ("half a salt",                first(say::auth(5, b"ab")), Told("Authentication.salt is cut short")),
        ("a challenge out of turn",    first(challenge("r=x,s=eA==,i=1")), Told("method SASL, which is not supported")),
        ("ready before anything",      first(say::ready()), Told("message type 0x5a out of place")),
        ("a version never asked for",  first(message(b'v', b"\0\x03\0\x09\0\0\0\0")), Told("message type 0x76 out of place")),
        ("an option never asked for",  first(message(b'v', b"\0\x03\0\0\0\0\0\x01_pq_.x\0")), Told("message type 0x76 out of place")),
        ("options that are not there", first(message(b'v', b"\0\x03\0\0\x7f\xff\xff\xff")), Told("message type 0x76 out of place")),
        ("half a version",             first(message(b'v', b"\0\x03")), Told("NegotiateProtocolVersion")),
        // SCRAM.
        ("CVE-2026-6665: a long nonce", asked(|body| challenge(&format!("r={}{},s=c2FsdA==,i=4096", nonce(body), "n".repeat(20_000)))), Told("SCRAM nonce of 20024 bytes, limit 1024")),
        ("another nonce",              asked(|_| challenge("r=0123456789abcdef0123456789,s=c2FsdA==,i=4096")), Told("SCRAM nonce differs")),
        ("our nonce, not extended",    asked(|body| challenge(&format!("r={},s=c2FsdA==,i=4096", nonce(body)))), Told("SCRAM nonce differs")),
        ("an empty nonce",             asked(|_| challenge("r=,s=c2FsdA==,i=4096")), Told("printable nonce expected")),
        ("an empty salt",              asked(|body| challenge(&format!("r={}x,s=,i=4096", nonce(body)))), Told("base64 salt expected")),
        ("a salt that is not base64",  asked(|body| challenge(&format!("r={}x,s=*,i=4096", nonce(body)))), Told("base64 salt expected")),
        ("a huge salt",                asked(|body| challenge(&format!("r={}x,s={},i=4096", nonce(body), "AAAA".repeat(9000)))), Told("SCRAM salt in base64 of 36000 bytes")),
        ("0 iterations",               asked(|body| challenge(&format!("r={}x,s=c2FsdA==,i=0", nonce(body)))), Told("iteration count expected")),
        ("CVE-2026-42198: 2^32 - 1 iterations", asked(|body| challenge(&format!("r={}x,s=c2FsdA==,i=4294967295", nonce(body)))), Told("iteration count expected")),
        ("CVE-2026-42198: 2^31 - 1 iterations", asked(|body| challenge(&format!("r={}x,s=c2FsdA==,i=2147483647", nonce(body)))), Told("2147483647 SCRAM iterations, limit 1000000")),
        ("iterations in words",        asked(|body| challenge(&format!("r={}x,s=c2FsdA==,i=many", nonce(body)))), Told("iteration count expected")),
        ("a mandatory extension",      asked(|body| challenge(&format!("m=x,r={}x,s=c2FsdA==,i=4096", nonce(body)))), Told("mandatory extension is not supported")),
        ("an error of SCRAM",          asked(|_| challenge("e=no-resources")), Told("server ended SCRAM: no-resources")),
        ("an empty challenge",         asked(|_| challenge("")), Told("server-first-message: attribute expected")),
        ("a challenge of bytes",       asked(|_| say::auth(11, &[0xff; 100])), Told("server-first-message")),
        ("a challenge with a NUL",     asked(|_| challenge("r=a\0b")), Told("text without NUL expected")),
        ("the offer twice",            asked(|_| say::auth(10, b"SCRAM-SHA-256\0\0")), Told("SASL in the middle of another")),
        ("clear inside of SCRAM",      asked(|_| say::auth(3, b"")), Told("password in the middle of another")),
        ("let in without proof",       asked(|_| say::auth(0, b"")), Told("without proving that it knows the password")),
        ("an error inside of SCRAM",   asked(|_| say::error("FATAL", "28P01", "x")), Refused("28P01")),
        ("rows inside of SCRAM",       asked(|_| say::row("x")), Told("message type 0x44 out of place")),
        ("a wrong signature",          proven(|mut last| { last[12] = if last[12] == b'A' { b'B' } else { b'A' }; last }), Told("SCRAM server signature is wrong")),
        ("half a signature",           proven(|_| say::auth(12, b"v=AAAA")), Told("32-byte server signature expected")),
        ("let in in place of the signature", proven(|_| say::auth(0, b"")), Told("without proving that it knows the password")),
        ("the signature twice",        proven(|last| [last.clone(), last].concat()), Told("SASL in the middle of another")),
        // After the authentication.
        ("rows before ready",          then(say::row("x")), Told("message type 0x44 out of place")),
        ("let in twice",               then(say::auth(0, b"")), Told("message type 0x52 out of place")),
        ("a key twice",                then([say::key(1, b"abcd"), say::key(2, b"abcd")].concat()), Told("message type 0x4b out of place")),
        ("a short key",                then(say::key(1, b"ab")), Told("BackendKeyData.secret")),
        ("a long key",                 then(say::key(1, &[1; 257])), Told("BackendKeyData.secret")),
        ("no key",                     served([say::parameter("server_version", "17"), say::ready()].concat()), Served),
        ("ready with an unknown status", then(message(b'Z', b"X")), Told("ReadyForQuery.status has the unknown value 0x58")),
        ("ready in a transaction",     then(message(b'Z', b"T")), Told("a transaction is open after the login")),
        ("COPY in place of an answer", vec![Startup, Send([ok(), say::greeting(), message(b'G', b"\0\0\0")].concat()), Hang], Told("message type 0x47 out of place")),
        ("rows behind the last answer", after(say::row("x")), Told("message type 0x44 out of place")),
        ("ready twice",                after(say::ready()), Told("message type 0x5a out of place")),
        ("half a row behind the last answer", after(say::row("xyz")[..8].to_vec()), Waits("invalid data")),
        ("a notice behind the last answer", vec![Startup, Send([ok(), say::greeting()].concat()), Receive, Send([say::answer("x"), say::notice("n")].concat()), Serve], Served),
    ];
    table
}

#[tokio::test]
async fn whatever_a_server_says_at_a_login_there_is_a_clear_error_and_no_harm() {
    // How long pgweir waits for a server must not decide what the others are told, however slow this machine is.
    let (silent, others): (Vec<_>, Vec<_>) = hostile_logins().into_iter().partition(|(_, _, want)| want.is_silence());
    let silent = told_as_wanted(&silent, &[("server_connect_timeout", "1s"), ("query_wait_timeout", "3s")]);
    let others = told_as_wanted(&others, &[("server_connect_timeout", "1min"), ("query_wait_timeout", "10s")]);
    tokio::join!(silent, others);
}

/// That a client of each of these servers is told what the table says, or served.
async fn told_as_wanted(table: &[(&'static str, Vec<Step>, Want)], settings: &[(&str, &str)]) {
    let servers: Vec<MockServer> = table
        .iter()
        .map(|(_, script, _)| {
            let script = script.clone();
            MockServer::start(move |_| script.clone()).unwrap()
        })
        .collect();
    let common = [("server_login_retry", "500ms"), ("default_pool_size", "2"), ("log_level", "debug")];
    let pgweir = pgweir_before(&servers, &[&common, settings].concat());
    let outcomes = join_all((0..table.len()).map(|number| {
        let pgweir = &pgweir;
        async move {
            let mut wire = login(pgweir, number).await?;
            Ok::<_, ServerError>(wire.query("SELECT 1").await.unwrap())
        }
    }))
    .await;
    for ((name, _, want), outcome) in table.iter().zip(outcomes) {
        match (want, outcome) {
            (Want::Served, Ok(outcome)) => assert_value(&outcome, "mock"),
            (Want::Told(words), Err(error)) => {
                assert_eq!((error.severity(), error.sqlstate()), ("FATAL", "08006"), "{name}: {error}");
                assert!(error.message().contains(words), "{name}: {error}");
            }
            (Want::Refused(code), Err(error)) => assert_eq!(error.sqlstate(), *code, "{name}: {error}"),
            (Want::Waits(words), Err(error)) => {
                assert_eq!(error.sqlstate(), "53300", "{name}: {error}");
                assert!(error.to_string().contains(words), "{name}: {error}");
            }
            (want, outcome) => panic!("{name}: {outcome:?} instead of {want:?}"),
        }
    }
    assert!(pgweir.rss_anon_kib().unwrap() < 100 * 1024, "{} KiB", pgweir.rss_anon_kib().unwrap());
    let log = pgweir.log();
    assert!(!log.contains("panicked") && !log.contains(PASSWORD), "{log}");
    // Whoever is served is served on.
    for served in (0..table.len()).filter(|number| matches!(table[*number].2, Want::Served)) {
        assert_value(&login(&pgweir, served).await.unwrap().query("SELECT 1").await.unwrap(), "mock");
    }
}

#[tokio::test]
async fn a_server_that_is_starting_up_is_waited_for() {
    let server = MockServer::start(|number| {
        let start = Step::Send(say::auth(0, b""));
        if number < 3 {
            let error = say::error("FATAL", "57P03", "the database system is starting up");
            return vec![Step::Startup, start, Step::Send(error)];
        }
        vec![Step::Startup, start, Step::Send(say::greeting()), Step::Serve]
    });
    let servers = [server.unwrap()];
    let pgweir = pgweir_before(&servers, &[("server_login_retry", "200ms")]);
    assert_value(&login(&pgweir, 0).await.unwrap().query("SELECT 1").await.unwrap(), "mock");
    assert_eq!(servers[0].accepted(), 4);
}

/// What a server says that does not know version 3.2, which is asked for first.
const OLD: &str = "unsupported frontend protocol 3.2";

#[tokio::test]
async fn a_refused_login_counts_for_as_long_as_the_server_has_it_open() {
    // It refuses the version, and closes only long after server_connect_timeout.
    let server = MockServer::start(|_| {
        let refusal = Step::Send(say::error("FATAL", "0A000", OLD));
        vec![Step::Startup, refusal, Step::Outlive(Duration::from_secs(2))]
    });
    let servers = [server.unwrap()];
    let settings = [
        ("default_pool_size", "1"),
        ("server_connect_timeout", "500ms"),
        ("server_login_retry", "100ms"),
        ("query_wait_timeout", "1min"),
    ];
    let pgweir = pgweir_before(&servers, &settings);
    let mut wire = Wire::connect(pgweir.addr()).await.unwrap();
    wire.startup(&[("user", "db"), ("database", "db0")]).await.unwrap();
    wait_until_async(SOON, async || servers[0].accepted() >= 3).await;
    assert_eq!(servers[0].most(), 1, "one is permitted");
}

#[tokio::test]
async fn a_login_that_is_cut_at_any_byte_is_tried_again() {
    const POOLS: usize = 8;
    let whole = [say::auth(0, b""), say::greeting(), say::answer("x")].concat();
    let cuts = whole.len();
    let server = MockServer::start(move |number| match whole.get(..number) {
        Some(front) => vec![Step::Startup, Step::Send(front.to_vec()), Step::Reset],
        None => vec![Step::Startup, Step::Send([say::auth(0, b""), say::greeting()].concat()), Step::Serve],
    });
    let servers = [server.unwrap()];
    let port = servers[0].addr().port().to_string();
    let keys: Vec<String> = (1..POOLS).map(|number| format!("databases.db{number}.port")).collect();
    let mut settings = vec![("server_login_retry", "100ms"), ("default_pool_size", "1")];
    settings.extend(keys.iter().map(|key| (key.as_str(), port.as_str())));
    let users: Vec<String> = (1..POOLS).map(|number| format!("databases.db{number}.user")).collect();
    settings.extend(users.iter().map(|key| (key.as_str(), "db")));
    let pgweir = pgweir_before(&servers, &settings);
    let logins = (0..POOLS).map(|number| {
        let pgweir = &pgweir;
        async move {
            // A login cut behind its last byte is none of the client's business, but its server connection is gone.
            let mut wire = loop {
                let mut wire = Wire::connect(pgweir.addr()).await.unwrap();
                wire.set_patience(Duration::from_mins(1));
                if wire.login("db", &format!("db{number}"), PASSWORD).await.is_ok() {
                    break wire;
                }
            };
            assert_value(&wire.query("SELECT 1").await.unwrap(), "mock");
        }
    });
    join_all(logins).await;
    assert!(servers[0].accepted() > cuts, "{} of {cuts}", servers[0].accepted());
    let log = pgweir.log();
    assert!(!log.contains("panicked"), "{log}");
}

/// What becomes of the client whose server connection turned hostile.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// It gets its answer.
    Answered,
    /// It gets this error, and goes on.
    Error(&'static str),
    /// Its connection is closed, in the middle of a message or with an error.
    Closed,
}

/// What a server answers to a query, what the client sees of it, and whether its connection is kept.
fn hostile_answers() -> Vec<(&'static str, Vec<Step>, Fate, bool)> {
    use Fate::{Answered, Closed, Error};
    use Step::{Flood, Hang, Reset, Send, Serve};
    let said = |bytes: Vec<u8>| vec![Send(bytes), Hang];
    let answered = |bytes: Vec<u8>| vec![Send([say::answer("mock"), bytes].concat()), Hang];
    let kept = |bytes: Vec<u8>| vec![Send([bytes, say::answer("mock")].concat()), Serve];
    let lost = Error("08006");
    #[rustfmt::skip]
    let table = vec![
        ("an honest answer",               kept(Vec::new()), Answered, true),
        ("a notice, a parameter",          kept([say::notice("n"), say::parameter("a", "b")].concat()), Answered, true),
        ("a notification nobody asked for", kept(message(b'A', b"\0\0\0\x01c\0p\0")), Answered, true),
        // Behind the answer, when nothing is owed.
        ("ready twice",                    answered(say::ready()), Answered, false),
        ("a row without a query",          answered(say::row("stray")), Answered, false),
        ("a whole answer without a query", answered(say::answer("stray")), Answered, false),
        ("an error without a query",       answered(say::error("ERROR", "XX000", "stray")), Answered, false),
        ("a fatal error without a query",  answered(say::error("FATAL", "57P01", "stray")), Answered, false),
        ("half a row without a query",     answered(say::row("stray")[..9].to_vec()), Answered, false),
        ("half a notice",                  answered(say::notice("stray")[..9].to_vec()), Answered, false),
        ("garbage",                        answered(vec![0xff; 300]), Answered, false),
        // In place of the answer.
        ("the answer to another message",  said(message(b'2', b"")), lost, false),
        ("no answer but the end of one",   said(message(b'3', b"")), lost, false),
        ("a request to log in",            said(say::auth(3, b"")), lost, false),
        ("a key",                          said(say::key(1, b"abcd")), lost, false),
        ("a version",                      said(message(b'v', b"\0\x03\0\0\0\0\0\0")), lost, false),
        ("replication",                    said(message(b'W', b"\0\0\0")), lost, false),
        ("an unknown message",             said(message(b'x', b"")), lost, false),
        ("length 0",                       said(message_lying(b'T', 0, b"")), lost, false),
        ("length 3",                       said(message_lying(b'D', 3, b"")), lost, false),
        ("a negative length",              said(message_lying(b'D', u32::MAX, b"")), lost, false),
        ("length 2^31",                    said(message_lying(b'T', 1 << 31, b"")), lost, false),
        ("ready with an unknown status",   said(message(b'Z', b"X")), lost, false),
        ("ready without a status",         said(message(b'Z', b"")), lost, false),
        ("a long ready",                   said(message(b'Z', b"II")), lost, false),
        ("an error without an end",        said(message(b'E', b"SERROR\0Mx")), lost, false),
        ("an error without SQLSTATE",      vec![Send([message(b'E', b"SERROR\0VERROR\0Mno code\0\0"), say::ready()].concat()), Serve], Error(""), true),
        ("a huge description",             vec![Send(message_lying(b'T', 1 << 30, b"")), Flood(vec![b'x'; 1 << 16])], lost, false),
        ("a huge error",                   vec![Send(message_lying(b'E', 1 << 30, b"S")), Flood(vec![b'x'; 1 << 16])], lost, false),
        ("a huge ready",                   vec![Send(message_lying(b'Z', 1 << 30, b"")), Flood(vec![b'I'; 1 << 16])], lost, false),
        ("a huge parameter",               vec![Send(message_lying(b'S', 1 << 30, b"")), Flood(vec![b'I'; 1 << 16])], lost, false),
        ("half a description, then the end", vec![Send(say::columns()[..9].to_vec())], lost, false),
        ("half a description, then a reset", vec![Send(say::columns()[..9].to_vec()), Reset], lost, false),
        ("half a header, then the end",    vec![Send(say::row("x")[..3].to_vec())], lost, false),
        ("half a row, then the end",       vec![Send([say::columns(), message_lying(b'D', 1 << 20, &[0, 1])].concat())], Closed, false),
        ("the end",                        Vec::new(), lost, false),
    ];
    table
}

#[tokio::test]
async fn a_server_that_turns_hostile_harms_the_client_it_serves_and_no_other() {
    let table = hostile_answers();
    let greeted = || vec![Step::Startup, Step::Send(say::auth(0, b"")), Step::Send(say::greeting())];
    // Who it is, and that its catalog is empty.
    let known = || {
        let answers = [say::answer("x"), say::answer("1"), say::nothing()];
        answers.into_iter().flat_map(|answer| [Step::Receive, Step::Send(answer)]).collect::<Vec<_>>()
    };
    let servers: Vec<MockServer> = table
        .iter()
        .map(|(_, script, _, _)| {
            let script = script.clone();
            MockServer::start(move |number| {
                let mut steps = greeted();
                if number == 0 {
                    steps.extend(known());
                    steps.push(Step::Receive);
                    steps.extend(script.clone());
                } else {
                    steps.push(Step::Serve);
                }
                steps
            })
            .unwrap()
        })
        .collect();
    let settings = [("default_pool_size", "1"), ("server_login_retry", "200ms"), ("log_level", "debug")];
    let pgweir = pgweir_before(&servers, &settings);
    let rows = (0..table.len()).map(|number| {
        let (pgweir, server, (name, _, fate, kept)) = (&pgweir, &servers[number], &table[number]);
        async move {
            let mut victim = login(pgweir, number).await.unwrap();
            let mut other = login(pgweir, number).await.unwrap();
            let outcome = victim.query("SELECT victim FROM hostile").await;
            match (fate, outcome) {
                (Fate::Answered, Ok(outcome)) => {
                    assert_eq!((outcome.value(), outcome.sqlstate()), (Some("mock"), ""), "{name}: {outcome:?}");
                }
                (Fate::Error(code), Ok(outcome)) => {
                    assert!(outcome.error.is_some() && outcome.sqlstate() == *code, "{name}: {outcome:?}");
                    assert_eq!(outcome.value(), None, "{name}: {outcome:?}");
                }
                (Fate::Closed, Err(_)) => {}
                (fate, outcome) => panic!("{name}: {outcome:?} instead of {fate:?}"),
            }
            // Whoever comes next has an answer of his own, and nothing else.
            for client in
                [Some(&mut other), Some(&mut victim).filter(|_| !matches!(fate, Fate::Closed))].into_iter().flatten()
            {
                // A server that does not close when told to counts against the cap for 15 s.
                client.set_patience(Duration::from_secs(40));
                let outcome = client.query("SELECT 'other'").await.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!((outcome.value(), outcome.sqlstate()), (Some("mock"), ""), "{name}: {outcome:?}");
                assert_eq!(outcome.notices, [], "{name}");
            }
            wait_until_async(SOON, async || server.open() == 1).await;
            assert_eq!(server.logins(), if *kept { 1 } else { 2 }, "{name}");
        }
    });
    join_all(rows).await;
    assert!(pgweir.rss_anon_kib().unwrap() < 200 * 1024, "{} KiB", pgweir.rss_anon_kib().unwrap());
    // Nothing drifted: one idle server connection in each pool, none lent, none waited for.
    let pools = u32::try_from(table.len()).unwrap();
    wait_until(SOON, || {
        let (_, body) = pgweir.http_get("/metrics").unwrap();
        let gauge = |state: &str| metric_in(&body, "pgweir_servers", &[&format!("state=\"{state}\"")]);
        (gauge("idle") - f64::from(pools)).abs() < 0.5
            && ["active", "logging_in", "closing"].iter().all(|state| gauge(state) < 0.5)
    });
    let log = pgweir.log();
    assert!(!log.contains("panicked") && !log.contains("broken invariant"), "{log}");
}

/// A proxy that now and then changes what the server says: a byte flipped, lost, doubled or put in.
struct Mutator {
    port: u16,
    /// One chunk in so many is changed; 0 for none.
    one_in: Arc<AtomicU64>,
    changed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Mutator {
    fn start(target: std::net::SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (one_in, changed, stop) =
            (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let own = (Arc::clone(&one_in), Arc::clone(&changed), Arc::clone(&stop));
        thread::spawn(move || {
            for (number, client) in (0..).zip(listener.incoming().flatten()) {
                if own.2.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(server) = TcpStream::connect(target) else { continue };
                let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut from_client, &mut to_server);
                    let _ = to_server.shutdown(Shutdown::Write);
                });
                let (one_in, changed) = (Arc::clone(&own.0), Arc::clone(&own.1));
                let rng = StdRng::seed_from_u64(seed.wrapping_mul(1_000_003).wrapping_add(number));
                thread::spawn(move || mutate(server, client, rng, &one_in, &changed));
            }
        });
        Self { port, one_in, changed, stop }
    }
}

impl Drop for Mutator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn mutate(mut from: TcpStream, mut to: TcpStream, mut rng: StdRng, one_in: &AtomicU64, changed: &AtomicU64) {
    let mut buf = [0; 4096];
    while let Ok(read) = from.read(&mut buf) {
        if read == 0 {
            break;
        }
        let mut chunk = buf[..read].to_vec();
        let odds = one_in.load(Ordering::SeqCst);
        if odds > 0 && rng.random_range(0..odds) == 0 {
            changed.fetch_add(1, Ordering::SeqCst);
            let at = rng.random_range(0..chunk.len());
            match rng.random_range(0..4) {
                0 => chunk[at] ^= 1 << rng.random_range(0..8),
                1 => drop(chunk.remove(at)),
                2 => chunk.insert(at, rng.random()),
                _ => chunk.extend_from_within(at..),
            }
        }
        if to.write_all(&chunk).is_err() {
            break;
        }
    }
    let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
}

#[tokio::test]
async fn bytes_changed_at_random_reach_nobody_elses_answers() {
    const CLIENTS: usize = 8;
    const POOL: u32 = 4;
    let seed = std::env::var("PGWEIR_RANDOM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let place = Place::on(primary());
    let proxy = Mutator::start(place.cluster.addr(), seed);
    let (port, size) = (proxy.port.to_string(), POOL.to_string());
    let settings = [
        ("databases.PLACE.port", port.as_str()),
        ("default_pool_size", size.as_str()),
        ("server_login_retry", "100ms"),
        ("server_connect_timeout", "2s"),
        ("query_timeout", "2s"),
        ("query_wait_timeout", "10s"),
        ("log_connections", "false"),
        ("log_disconnections", "false"),
    ];
    let pgweir = start_pgweir(place.toml(&settings));
    let watch = place.cap_watch(POOL);
    proxy.one_in.store(10, Ordering::SeqCst);
    let token = |number: usize| {
        format!("{:032x}", (number as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
    };
    let tokens: Vec<String> = (0..CLIENTS).map(token).collect();
    let clients = (0..CLIENTS).map(|number| {
        let (pgweir, place, tokens) = (&pgweir, &place, &tokens);
        async move {
            let mut answers = 0;
            let mut wire: Option<Wire> = None;
            for _ in 0..40 {
                let mut open = if let Some(open) = wire.take() {
                    open
                } else {
                    let Ok(mut fresh) = Wire::connect(pgweir.addr()).await else { continue };
                    fresh.set_patience(Duration::from_secs(5));
                    if fresh.login(&place.name, &place.name, PASSWORD).await.is_err() {
                        continue;
                    }
                    fresh
                };
                let Ok(outcome) = open.query(&format!("SELECT '{}', repeat('x', 100)", tokens[number])).await else {
                    continue;
                };
                let shown = format!("{outcome:?}");
                for (other, token) in tokens.iter().enumerate().filter(|(other, _)| *other != number) {
                    assert!(
                        !shown.contains(token.as_str()),
                        "client {number} was told what client {other} asked: {shown}"
                    );
                }
                answers += usize::from(shown.contains(tokens[number].as_str()));
                wire = Some(open);
            }
            answers
        }
    });
    let answers: usize = join_all(clients).await.into_iter().sum();
    let changed = proxy.changed.load(Ordering::SeqCst);
    assert!(changed >= 20 && answers >= CLIENTS, "seed {seed}: {changed} changes, {answers} answers");
    proxy.one_in.store(0, Ordering::SeqCst);

    // All is as before, and counts as before.
    wait_until_async(SOON, async || {
        let Ok(mut wire) = Wire::connect(pgweir.addr()).await else { return false };
        wire.login(&place.name, &place.name, PASSWORD).await.is_ok()
            && wire.query("SELECT 1").await.is_ok_and(|outcome| outcome.value() == Some("1"))
    })
    .await;
    // What hangs is cancelled for 30 s, and the end of its connection waited for another 15.
    wait_until(Duration::from_secs(90), || {
        let (_, body) = pgweir.http_get("/metrics").unwrap();
        let gauge = |state: &str| metric_in(&body, "pgweir_servers", &[&format!("state=\"{state}\"")]);
        let open = gauge("idle") + gauge("active") + gauge("logging_in") + gauge("closing");
        (open - f64::from(place.servers())).abs() < 0.5 && gauge("active") < 0.5
    });
    assert!(pgweir.is_running() && !pgweir.log().contains("panicked"), "seed {seed}: {}", pgweir.log());
    watch.finish();
}

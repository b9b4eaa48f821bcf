//! What a shared statement meets on a server connection without its client's doing: it is gone, its name is taken, a type that
//! it was parsed with is gone. The client is none the wiser, or told as the contract says, and can go on.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use pgweir_harness::mock_server::say;
use pgweir_harness::wire::build::{
    bind, bind_formats, close_statement, describe_portal, describe_statement, execute, flush, message, parse, sync,
};
use pgweir_harness::wire::{Outcome, Wire};
use pgweir_harness::{pgweir_toml, wait_until, wait_until_async};

use super::changes::{body as body_of, code, exchange};
use super::{hold, prepare, run};
use crate::support::{PASSWORD, SOON, Site, assert_value, primary, start_pgweir};

const MODES: [&str; 3] = ["rewrite", "adaptive", "strip"];

/// A server connection forgets everything, or has a name taken, and no text tells. (What runs SQL that it has made itself is known
/// for it, and whatever ran before is parsed anew.)
const HIDDEN: &str = "CREATE FUNCTION wipe() RETURNS void LANGUAGE plpgsql AS 'BEGIN DEALLOCATE ALL; END'; \
    CREATE FUNCTION take(name text) RETURNS void LANGUAGE plpgsql \
    AS 'BEGIN EXECUTE format(''PREPARE %I AS SELECT ''''a stranger''''::text'', name); END'; \
    CREATE TABLE done (what text); GRANT ALL ON done TO PUBLIC; \
    CREATE TYPE mood AS ENUM ('sad', 'glad')";

/// The type is another one under the same name.
const RENEW: &str = "DROP TYPE mood; CREATE TYPE mood AS ENUM ('glad', 'sad')";

fn site(mode: &'static str) -> Site<'static> {
    let site = Site::start(&[("default_pool_size", "2"), ("prepared_statements", mode)]);
    site.place.psql(HIDDEN);
    site
}

async fn query(client: &mut Wire, text: &str) -> Outcome {
    let outcome = client.query(text).await.unwrap();
    assert_eq!(outcome.error, None, "{text}");
    outcome
}

/// Runs the statement, whose only parameter this is.
async fn echo(client: &mut Wire, name: &str, value: &str) -> Outcome {
    run(client, &[bind("", name, &[Some(value.as_bytes())]), execute("", 0), sync()]).await
}

/// The client has a part of the answer already when what is behind it fails.
const BEYOND: [&str; 2] = ["with a Sync between", "flushed first"];

/// How drivers prepare a statement and run it for the first time.
fn shapes(text: &str, value: &'static str) -> Vec<(&'static str, Vec<Vec<Vec<u8>>>)> {
    let parse = || parse("new", text, &[]);
    let bind = || bind("", "new", &[Some(value.as_bytes())]);
    let all = || execute("", 0);
    vec![
        ("one by one", vec![vec![parse(), sync()], vec![bind(), all(), sync()]]),
        ("described first", vec![vec![parse(), describe_statement("new"), sync()], vec![bind(), all(), sync()]]),
        ("in one batch", vec![vec![parse(), bind(), all(), sync()]]),
        ("in one batch, described", vec![vec![parse(), bind(), describe_portal(""), all(), sync()]]),
        ("in one batch, told of both", vec![vec![parse(), describe_statement("new"), bind(), all(), sync()]]),
        (BEYOND[0], vec![vec![parse(), sync(), bind(), all(), sync()]]),
        ("closed in the same batch", vec![vec![parse(), bind(), all(), close_statement("new"), sync()]]),
        (
            "described and flushed first",
            vec![vec![parse(), describe_statement("new"), flush()], vec![bind(), all(), sync()]],
        ),
        (BEYOND[1], vec![vec![parse(), flush()], vec![bind(), all(), sync()]]),
    ]
}

/// Plays a shape: the statement is found at the first attempt, or, where that cannot be, at the second.
async fn find(client: &mut Wire, (shape, batches): &(&str, Vec<Vec<Vec<u8>>>), value: &str, mode: &str) {
    let mut got = play(client, batches).await;
    if BEYOND.contains(shape) && matches!(&*got.1, "26000" | "XX000") {
        run(client, &[close_statement("new"), sync()]).await;
        got = play(client, batches).await;
    }
    assert_eq!(got, (vec![value.to_owned()], String::new()), "{mode}, {shape}");
    run(client, &[close_statement("new"), sync()]).await;
}

/// Plays a shape. The rows, and the first error.
async fn play(client: &mut Wire, batches: &[Vec<Vec<u8>>]) -> (Vec<String>, String) {
    let (mut rows, mut error) = (Vec::new(), String::new());
    for batch in batches {
        client.send(&batch.concat()).await.unwrap();
        for _ in batch.iter().filter(|message| ***message == sync()) {
            let outcome = client.outcome().await.unwrap();
            rows.extend(outcome.rows.iter().map(|row| row[0].clone().unwrap_or_default()));
            if error.is_empty() {
                outcome.sqlstate().clone_into(&mut error);
            }
        }
    }
    (rows, error)
}

/// What was shown is that something was mended, and not that nothing was broken.
fn assert_healed(site: &Site<'_>, mode: &str) {
    if mode != "strip" {
        wait_until(SOON, || site.metric("pgweir_reruns_total", &[]) > 0.5);
    }
}

/// What makes the two clients different, so that something of pgweir's own goes in front of what they send: nothing; a setting;
/// the values of sequences, which the other is not to see.
const DIFFERENCES: [&str; 3] = ["SELECT 1", "SET work_mem = '5MB'", "SELECT currval('nosuch')"];

#[tokio::test]
async fn a_statement_that_the_server_has_lost_is_prepared_anew_however_a_driver_asks() {
    for (mode, difference) in MODES.into_iter().flat_map(|mode| DIFFERENCES.map(|difference| (mode, difference))) {
        let site = site(mode);
        let (mut client, mut other) = (site.client().await, site.client().await);
        client.query(difference).await.unwrap();
        let text = "SELECT $1::text /* lost */";
        prepare(&mut client, "s1", text).await;
        for shape in shapes(text, "found") {
            for _ in 0..4 {
                assert_value(&echo(&mut client, "s1", "known").await, "known");
            }
            query(&mut other, "SELECT wipe()").await;
            find(&mut other, &shape, "found", mode).await;
            // The one who had it is healed as well: it is lost to nobody.
            query(&mut other, "SELECT wipe()").await;
            assert_value(&echo(&mut client, "s1", "known").await, "known");
        }
        assert_healed(&site, mode);
    }
}

#[tokio::test]
async fn a_name_that_is_taken_on_the_server_is_made_free_unseen() {
    for mode in MODES {
        let site = site(mode);
        let (mut client, mut other) = (site.client().await, site.client().await);
        prepare(&mut client, "s1", "SELECT $1::text").await;
        prepare(&mut client, "s2", "INSERT INTO done VALUES ($1) RETURNING what").await;
        for _ in 0..5 {
            assert_value(&echo(&mut client, "s1", "mine").await, "mine");
            assert_value(&echo(&mut client, "s2", "before").await, "before");
        }
        let names = query(&mut client, "SELECT string_agg(name, ' ' ORDER BY name) FROM pg_prepared_statements").await;
        let names: Vec<String> = names.value().unwrap_or_default().split(' ').map(str::to_owned).collect();
        if mode == "strip" {
            assert_eq!(names, [""], "nothing is kept whose name could be taken");
            continue;
        }
        let taking: Vec<String> = names.iter().map(|name| format!("take('{name}')")).collect();
        let taking = format!("SELECT {}", taking.join(", "));
        // On the other server connection, where they are not yet.
        hold(&mut other).await;
        query(&mut client, &taking).await;
        // Until it is known what the function left, nothing is parsed under a name that others know. A question about the catalog may
        // be behind that one.
        let audited = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle' \
            AND (query LIKE 'SELECT CASE WHEN context OPERATOR(pg_catalog.=)%FROM pg_catalog.pg_settings %' \
            OR query LIKE 'SET LOCAL search_path TO pg_catalog, pg_temp; %') AND pid <> pg_backend_pid()";
        wait_until(SOON, || site.place.psql(audited).trim() == "1");
        assert_value(&echo(&mut client, "s1", "mine").await, "mine");
        assert_value(&echo(&mut client, "s2", "once").await, "once");
        assert_eq!(site.place.psql("SELECT count(*) FROM done WHERE what = 'once'").trim(), "1", "{mode}");
        assert_eq!(other.query("ROLLBACK").await.unwrap().status, b'I');
        // In a transaction of the client's own it is told, under the client's name, and behind it all is well.
        assert_eq!(client.query("BEGIN").await.unwrap().error, None);
        query(&mut client, "SELECT wipe()").await;
        query(&mut client, &taking).await;
        let told = echo(&mut client, "s1", "mine").await;
        assert!(!told.rows.iter().flatten().flatten().any(|value| value.contains("stranger")), "{mode}: {told:?}");
        assert!(!format!("{told:?}").contains(&names[0]), "{mode}: {told:?}");
        assert_eq!(client.query("ROLLBACK").await.unwrap().status, b'I');
        assert_value(&echo(&mut client, "s1", "mine").await, "mine");
        assert_value(&echo(&mut client, "s2", "twice").await, "twice");
        assert_healed(&site, mode);
        // And nothing keeps the server connection with its client any more.
        let (first, second) = (hold(&mut client).await, hold(&mut other).await);
        assert_ne!(first, second);
        assert_eq!(client.query("COMMIT").await.unwrap().status, b'I');
        assert_eq!(other.query("COMMIT").await.unwrap().status, b'I');
    }
}

#[tokio::test]
async fn who_was_told_nothing_of_a_type_that_is_another_now_does_not_notice() {
    for mode in MODES {
        let site = site(mode);
        let mut client = site.client().await;
        prepare(&mut client, "s1", "SELECT $1::mood").await;
        prepare(&mut client, "s2", "INSERT INTO done VALUES ($1::mood) RETURNING what").await;
        for round in 0..4_usize {
            for _ in 0..4 {
                assert_value(&echo(&mut client, "s1", "glad").await, "glad");
                assert_value(&echo(&mut client, "s2", "glad").await, "glad");
            }
            site.place.psql(RENEW);
            assert_value(&echo(&mut client, "s2", "sad").await, "sad");
            let once = site.place.psql("SELECT count(*) FROM done WHERE what = 'sad'");
            assert_eq!(once.trim(), (round + 1).to_string(), "{mode}");
            assert_value(&echo(&mut client, "s1", "sad").await, "sad");
        }
        // In a transaction of its own it is told with all its fields, and once.
        site.place.psql(RENEW);
        assert_eq!(client.query("BEGIN").await.unwrap().error, None);
        let told = echo(&mut client, "s1", "sad").await;
        assert!(matches!(told.sqlstate(), "" | "XX000"), "{mode}: {told:?}");
        assert_eq!(client.query("ROLLBACK").await.unwrap().status, b'I');
        assert_value(&echo(&mut client, "s1", "sad").await, "sad");
    }
}

#[tokio::test]
async fn a_text_prepared_for_the_first_time_means_the_types_that_are_there_now() {
    for mode in MODES {
        let site = site(mode);
        let (mut client, mut other) = (site.client().await, site.client().await);
        let text = "SELECT $1::mood /* again */";
        prepare(&mut client, "s1", text).await;
        for shape in shapes(text, "sad") {
            for _ in 0..4 {
                assert_value(&echo(&mut client, "s1", "glad").await, "glad");
            }
            site.place.psql(RENEW);
            find(&mut other, &shape, "sad", mode).await;
        }
        assert_healed(&site, mode);
    }
}

/// What drivers look up by its number in the catalog, once.
fn told_types(answer: &[pgweir_harness::wire::Message]) -> (u32, u32) {
    let parameters = body_of(answer, b't').unwrap();
    let rows = body_of(answer, b'T').unwrap();
    let name = rows[2..].iter().position(|byte| *byte == 0).unwrap() + 3;
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    (number(&parameters[2..6]), number(&rows[name + 6..name + 10]))
}

#[tokio::test]
async fn who_was_told_a_type_that_is_gone_gets_an_error_once_and_then_the_new_one() {
    for mode in MODES {
        let site = site(mode);
        let (mut client, mut other) = (site.client().await, site.client().await);
        let now = || site.place.psql("SELECT 'mood'::regtype::oid::int8").trim().parse::<u32>().unwrap();
        let prepared = || [parse("s1", "SELECT $1::mood", &[]), describe_statement("s1"), sync()];
        let execution = || [bind_formats("", "s1", &[], &[Some(b"sad")], &[1]), execute("", 0), sync()];
        for round in 0..3 {
            let told = exchange(&mut client, &prepared()).await;
            assert_eq!(told_types(&told), (now(), now()), "{mode}, round {round}");
            for _ in 0..4 {
                assert_eq!(code(&exchange(&mut client, &execution()).await), "", "{mode}");
            }
            site.place.psql(RENEW);
            let failed = exchange(&mut client, &execution()).await;
            assert_eq!(code(&failed), "0A000", "{mode}, round {round}: {failed:?}");
            let error = String::from_utf8_lossy(body_of(&failed, b'E').unwrap()).into_owned();
            assert!(error.contains("RRevalidateCachedQuery"), "{mode}: {error}");
            // Whoever asks for the first time is told what is there now, and so is this client when it asks again.
            let told = exchange(&mut other, &prepared()).await;
            assert_eq!(told_types(&told), (now(), now()), "{mode}, round {round}, another client");
            assert_eq!(code(&exchange(&mut other, &execution()).await), "", "{mode}");
            for client in [&mut client, &mut other] {
                exchange(client, &[close_statement("s1"), sync()]).await;
            }
        }
    }
}

/// A server of one connection that has the statement, and then loses it as often as it is told.
struct Forgetful {
    address: SocketAddr,
    /// Each of these is lost once; what is said between the error and its end, in pieces.
    losses: Sender<Vec<Vec<u8>>>,
    /// An error was sent.
    lost: Receiver<()>,
}

impl Forgetful {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (losses, to_lose) = channel();
        let (tell, lost) = channel();
        // Its thread ends with the connection.
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let _ = Self::serve(&stream, &to_lose, &tell);
        });
        Self { address, losses, lost }
    }

    fn serve(mut stream: &TcpStream, to_lose: &Receiver<Vec<Vec<u8>>>, tell: &Sender<()>) -> io::Result<()> {
        stream.set_nodelay(true)?;
        body(&mut stream)?;
        stream.write_all(&[say::auth(0, b""), say::greeting()].concat())?;
        let mut answer = Vec::new();
        loop {
            let mut tag = [0];
            stream.read_exact(&mut tag)?;
            let body = body(&mut stream)?;
            match tag[0] {
                // Nothing is set, and nothing hides in functions.
                b'Q' if has(&body, b"pg_settings") || has(&body, b"pg_get_functiondef") => {
                    answer.extend(say::nothing());
                }
                b'Q' => answer.extend(say::answer("mock")),
                b'P' => answer.extend(message(b'1', b"")),
                b'C' => answer.extend(message(b'3', b"")),
                b'B' if let Ok(said) = to_lose.try_recv() => {
                    let name = String::from_utf8_lossy(&body[1..]).split('\0').next().unwrap().to_owned();
                    stream.write_all(&say::error("ERROR", "26000", &format!("statement \"{name}\" does not exist")))?;
                    tell.send(()).unwrap();
                    answer.clear();
                    Self::end_batch(stream, &said)?;
                }
                b'B' => answer.extend(message(b'2', b"")),
                b'E' => answer.extend([say::row("found"), say::done("SELECT 1")].concat()),
                b'S' => answer.extend(say::ready()),
                b'X' => return Ok(()),
                _ => {}
            }
            if matches!(tag[0], b'Q' | b'S') {
                stream.write_all(&std::mem::take(&mut answer))?;
            }
        }
    }

    /// What is left of the batch is passed over; nothing may follow it before its end was told.
    fn end_batch(mut stream: &TcpStream, said: &[Vec<u8>]) -> io::Result<()> {
        let mut tag = [0];
        while tag[0] != b'S' {
            stream.read_exact(&mut tag)?;
            body(&mut stream)?;
        }
        stream.set_read_timeout(Some(Duration::from_millis(300)))?;
        let early = stream.read(&mut tag);
        assert!(early.is_err(), "{:?} in front of what is to run again", char::from(tag[0]));
        stream.set_read_timeout(None)?;
        for piece in said {
            stream.write_all(piece)?;
            thread::sleep(Duration::from_millis(20));
        }
        stream.write_all(&say::ready())
    }
}

fn has(body: &[u8], part: &[u8]) -> bool {
    body.windows(part.len()).any(|window| window == part)
}

/// The body of the message whose length comes next.
fn body(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
    stream.read_exact(&mut body)?;
    Ok(body)
}

#[tokio::test]
async fn what_a_client_sends_and_a_server_says_meanwhile_waits_for_what_runs_again() {
    let server = Forgetful::start();
    let port = server.address.port().to_string();
    let settings = [
        ("auth_type", "trust"),
        ("prepared_statements", "rewrite"),
        ("default_pool_size", "1"),
        ("server_tls_sslmode", "disable"),
        ("databases.db.host", "127.0.0.1"),
        ("databases.db.port", &port),
        ("databases.db.user", "db"),
        ("databases.db.password", PASSWORD),
        ("users.db.password", "client-secret"),
    ];
    let pgweir = start_pgweir(pgweir_toml(primary(), &settings));
    let mut client = Wire::open(pgweir.addr(), "db", "db", PASSWORD).await.unwrap();
    prepare(&mut client, "s1", "SELECT $1::text").await;
    let batch = |value: &'static [u8]| [bind("", "s1", &[Some(value)]), execute("", 0), sync()].concat();
    let said = [say::notice("a notice"), message(b'A', b"\0\0\0\x01c\0p\0"), say::parameter("TimeZone", "UTC")];
    for (ahead, pieces) in [(false, vec![]), (true, vec![]), (true, vec![said.concat()]), (true, said.to_vec())] {
        server.losses.send(pieces.clone()).unwrap();
        client.send(&batch(b"first")).await.unwrap();
        // Behind the error, while the server has not yet said that the batch is over.
        wait_until_async(SOON, async || server.lost.try_recv().is_ok()).await;
        if ahead {
            client.send(&batch(b"second")).await.unwrap();
        }
        for _ in 0..=usize::from(ahead) {
            assert_value(&client.outcome().await.unwrap(), "found");
        }
        assert_value(&client.query("SELECT 1").await.unwrap(), "mock");
    }
}

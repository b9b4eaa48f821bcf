//! Server connections that are lost, at every phase, by the server's word and without one. A transaction that lost its
//! server fails until the client ends it; nothing of it is ever committed on its own.

use std::cell::Cell;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pgweir_harness::wire::{Message, Outcome, Wire, WireError, build};
use pgweir_harness::{Cluster, ClusterOptions, Direction, FaultProxy, wait_until_async};
use tokio::task::spawn_local;
use tokio::time::sleep;

use crate::stage::{Dice, SOON, Stage, fail, read_to_end, run, succeed, value};
use crate::support::{Place, primary};

/// `connection_failure`: the server connection was lost without a word.
const LOST: &str = "08006";
/// `in_failed_sql_transaction`.
const FAILED: &str = "25P02";
/// `admin_shutdown`.
const TERMINATED: &str = "57P01";

/// How a server connection is lost.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// The server says FATAL and closes.
    Fatal,
    /// A reset.
    Reset,
    /// The end of the stream without a word.
    EndOfStream,
}

impl Loss {
    const ALL: [Self; 3] = [Self::Fatal, Self::Reset, Self::EndOfStream];
    const SILENT: [Self; 2] = [Self::Reset, Self::EndOfStream];

    fn strike(self, stage: &Stage<'_>, proxy: &FaultProxy) {
        match self {
            Self::Fatal => {
                for pid in stage.backends() {
                    stage.terminate(pid);
                }
                return;
            }
            Self::Reset => proxy.cut_all(),
            Self::EndOfStream => proxy.half_close(Direction::ToClient),
        }
        // As with a server that died: a living one would run its query to the end before it noticed.
        stage
            .sql(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{}'", stage.name()));
    }
}

/// Waits until no backend of the stage is in a transaction.
async fn until_quiet(stage: &Stage<'_>) {
    wait_until_async(SOON, async || stage.pids("state <> 'idle'").is_empty()).await;
}

#[test]
fn an_idle_server_connection_that_is_lost_is_replaced_unseen() {
    for loss in Loss::ALL {
        let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "3")]);
        // After a cut, the old backend may outlive its connection for a moment; nobody can see that from here.
        let watch = matches!(loss, Loss::Fatal).then(|| stage.place.cap_watch(3));
        run(Duration::from_mins(1), replace_unseen(loss, &stage, &proxy));
        drop(watch);
    }
}

async fn replace_unseen(loss: Loss, stage: &Stage<'_>, proxy: &FaultProxy) {
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(stage.client().await);
    }
    for round in 0..10 {
        // Three at once, so that all three connections are open.
        for client in &mut clients[..3] {
            client.send(&build::query("SELECT 'warm' FROM pg_sleep(0.02)")).await.unwrap();
        }
        for client in &mut clients[..3] {
            assert_eq!(client.outcome().await.unwrap().value(), Some("warm"), "{loss:?} {round}");
        }
        loss.strike(stage, proxy);
        // A query that crossed the server's FATAL on its way would rightly be told.
        let mut struck = Instant::now();
        wait_until_async(SOON, async || {
            if struck.elapsed() > Duration::from_secs(3) {
                // One more was being made meanwhile.
                loss.strike(stage, proxy);
                struck = Instant::now();
            }
            proxy.open() == 0
        })
        .await;
        for (number, client) in clients.iter_mut().enumerate() {
            let tag = format!("{loss:?} {round} {number}");
            let outcome = if number % 2 == 0 {
                client.query(&format!("SELECT '{tag}'")).await.unwrap()
            } else {
                client.extended("SELECT $1::text", &[Some(&tag)]).await.unwrap()
            };
            assert_eq!(outcome.value(), Some(tag.as_str()), "{outcome:?}");
        }
    }
}

/// What must be true of a client whose transaction lost its server, once it has been told.
async fn expect_failed_transaction(client: &mut Wire, end: &str) {
    fail(client, "SELECT 1", FAILED, b'E').await;
    fail(client, "INSERT INTO mark VALUES ('after')", FAILED, b'E').await;
    fail(client, "SAVEPOINT s", FAILED, b'E').await;
    fail(client, "BEGIN", FAILED, b'E').await;
    let batch = [
        build::parse("", "INSERT INTO mark VALUES ('batch')", &[]),
        build::bind("", "", &[]),
        build::execute("", 0),
        build::parse("", "INSERT INTO mark VALUES ('same batch')", &[]),
        build::bind("", "", &[]),
        build::execute("", 0),
        build::sync(),
    ];
    client.send(&batch.concat()).await.unwrap();
    let messages = client.recv_until_ready().await.unwrap();
    let tags: Vec<char> = messages.iter().map(|message| char::from(message.tag)).collect();
    assert_eq!(tags, ['E', 'Z'], "one error, then nothing up to the Sync: {messages:?}");
    assert_eq!(Outcome::of(&messages).sqlstate(), FAILED);
    assert_eq!(messages[1].ready_status(), Some(b'E'));
    let outcome = client.query(end).await.unwrap();
    assert_eq!((outcome.tags, outcome.status, outcome.error), (vec!["ROLLBACK".to_owned()], b'I', None), "{end}");
}

#[test]
fn a_transaction_that_lost_its_server_fails_until_it_is_ended() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "2")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(Duration::from_mins(2), async {
        let mut client = stage.client().await;
        for loss in Loss::SILENT {
            for end in ["ROLLBACK", "COMMIT", "end", "abort work;", "/* x */ Rollback Transaction"] {
                for while_running in [false, true] {
                    succeed(&mut client, "BEGIN; INSERT INTO mark VALUES ('before')").await;
                    let sql = "INSERT INTO mark SELECT 'during' FROM pg_sleep(30)";
                    if while_running {
                        client.send(&build::query(sql)).await.unwrap();
                        wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
                        loss.strike(&stage, &proxy);
                    } else {
                        loss.strike(&stage, &proxy);
                        client.send(&build::query(sql)).await.unwrap();
                    }
                    let outcome = client.outcome().await.unwrap();
                    let got = (outcome.sqlstate(), char::from(outcome.status));
                    assert_eq!(got, (LOST, 'E'), "{loss:?}, {end}, running {while_running}: {outcome:?}");
                    assert_eq!(outcome.error.as_ref().unwrap().severity(), "ERROR");
                    expect_failed_transaction(&mut client, end).await;
                    assert_eq!(value(&mut client, "SELECT 'on'").await, "on");
                }
            }
        }
        until_quiet(&stage).await;
        assert_eq!(value(&mut client, "SELECT count(*) FROM mark").await, "0");
    });
}

#[test]
fn a_lost_transaction_fails_in_the_extended_protocol_too() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "2")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(Duration::from_mins(1), async {
        for loss in Loss::SILENT {
            let mut client = stage.client().await;
            client
                .send(&[build::parse("ins", "INSERT INTO mark VALUES ($1)", &[]), build::sync()].concat())
                .await
                .unwrap();
            client.recv_until_ready().await.unwrap();
            assert_eq!(client.extended("BEGIN", &[]).await.unwrap().status, b'T');
            let insert = |by: &str| [build::bind("", "ins", &[Some(by.as_bytes())]), build::execute("", 0)].concat();
            client.send(&[insert("before"), build::sync()].concat()).await.unwrap();
            assert_eq!(client.outcome().await.unwrap().tags, ["INSERT 0 1"]);
            loss.strike(&stage, &proxy);
            client.send(&[insert("a"), insert("b"), build::sync()].concat()).await.unwrap();
            let messages = client.recv_until_ready().await.unwrap();
            let tags: Vec<char> = messages.iter().map(|message| char::from(message.tag)).collect();
            assert_eq!(tags, ['E', 'Z'], "{messages:?}");
            let outcome = Outcome::of(&messages);
            assert_eq!((outcome.sqlstate(), outcome.status), (LOST, b'E'), "{loss:?}");
            client.send(&[insert("c"), build::sync()].concat()).await.unwrap();
            let outcome = client.outcome().await.unwrap();
            assert_eq!((outcome.sqlstate(), outcome.status), (FAILED, b'E'), "{loss:?}");
            let end = client.extended("COMMIT", &[]).await.unwrap();
            assert_eq!((end.tags, end.status, end.error), (vec!["ROLLBACK".to_owned()], b'I', None), "{loss:?}");
            // The statement that was prepared before works on whatever server connection comes next.
            client.send(&[insert("after"), build::sync()].concat()).await.unwrap();
            let outcome = client.outcome().await.unwrap();
            assert_eq!((outcome.error, outcome.tags), (None, vec!["INSERT 0 1".to_owned()]), "{loss:?}");
        }
        until_quiet(&stage).await;
        assert_eq!(stage.sql("SELECT by, count(*) FROM mark GROUP BY by"), "after|2");
    });
}

#[test]
fn a_pipeline_in_a_lost_transaction_is_answered_query_by_query() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(SOON, async {
        let mut client = stage.client().await;
        succeed(&mut client, "BEGIN; INSERT INTO mark VALUES ('before')").await;
        let queries = [
            "INSERT INTO mark SELECT 'a' FROM pg_sleep(30)",
            "INSERT INTO mark VALUES ('b')",
            "INSERT INTO mark VALUES ('c')",
            "COMMIT",
            "SELECT 'after'",
        ];
        client.send(&queries.map(build::query).concat()).await.unwrap();
        wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
        Loss::Reset.strike(&stage, &proxy);
        let mut outcomes = Vec::new();
        for _ in queries {
            outcomes.push(client.outcome().await.unwrap());
        }
        assert_eq!((outcomes[0].sqlstate(), outcomes[0].status), (LOST, b'E'), "{outcomes:?}");
        for outcome in &outcomes[1..] {
            // The COMMIT, too: it was sent, so what became of it is not known; ROLLBACK would be a guess.
            assert!([LOST, FAILED].contains(&outcome.sqlstate()), "{outcomes:?}");
            assert_eq!((outcome.tags.len(), outcome.status), (0, b'E'), "{outcomes:?}");
        }
        assert_eq!(succeed(&mut client, "ROLLBACK").await.tags, ["ROLLBACK"]);
        assert_eq!(value(&mut client, "SELECT 'on'").await, "on");
        until_quiet(&stage).await;
        assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
    });
}

/// A point in a client's doings at which its server connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Running,
    BetweenParseAndSync,
    CopyIn,
    CopyOut,
}

impl Phase {
    const ALL: [Self; 5] = [Self::Idle, Self::Running, Self::BetweenParseAndSync, Self::CopyIn, Self::CopyOut];

    /// Brings the client there.
    async fn enter(self, client: &mut Wire, stage: &Stage<'_>) {
        match self {
            Self::Idle => {}
            Self::Running => {
                client.send(&build::query("INSERT INTO mark SELECT 'x' FROM pg_sleep(30)")).await.unwrap();
                wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
            }
            Self::BetweenParseAndSync => {
                let parse = [build::parse("", "INSERT INTO mark VALUES ('x')", &[]), build::flush()];
                client.send(&parse.concat()).await.unwrap();
                assert_eq!(client.recv().await.unwrap().tag, b'1');
            }
            Self::CopyIn => {
                client.send(&build::query("COPY mark FROM STDIN")).await.unwrap();
                assert_eq!(client.recv().await.unwrap().tag, b'G');
                client.send(&build::copy_data(b"copied\n")).await.unwrap();
            }
            Self::CopyOut => {
                // Rows longer than the server's buffer, so that each is sent when it is made.
                let rows = "SELECT repeat('x', 20000) FROM generate_series(1, 3000) n WHERE pg_sleep(0.01 + n * 0) IS NOT NULL";
                client.send(&build::query(&format!("COPY ({rows}) TO STDOUT"))).await.unwrap();
                assert_eq!(client.recv().await.unwrap().tag, b'H');
                assert_eq!(client.recv().await.unwrap().tag, b'd');
            }
        }
    }

    /// What a client would send next, not knowing of the loss.
    fn rest(self) -> Vec<u8> {
        match self {
            Self::Idle => build::query("SELECT 1"),
            Self::Running | Self::CopyOut => Vec::new(),
            Self::BetweenParseAndSync => [build::bind("", "", &[]), build::execute("", 0), build::sync()].concat(),
            Self::CopyIn => [build::copy_data(b"more\n"), build::copy_done()].concat(),
        }
    }
}

#[test]
fn a_loss_without_a_word_is_told_at_every_phase_and_the_client_lives_on() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "2")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(Duration::from_mins(2), async {
        for phase in Phase::ALL {
            for loss in Loss::SILENT {
                for transaction in [false, true] {
                    if phase == Phase::Idle && !transaction {
                        continue;
                    }
                    let what = format!("{phase:?}, {loss:?}, transaction {transaction}");
                    let mut client = stage.client().await;
                    if transaction {
                        succeed(&mut client, "BEGIN; INSERT INTO mark VALUES ('before')").await;
                    }
                    phase.enter(&mut client, &stage).await;
                    loss.strike(&stage, &proxy);
                    client.send(&phase.rest()).await.unwrap();
                    let outcome = match client.outcome().await {
                        Ok(outcome) => outcome,
                        // The server's writes end in the middle of a message, and nothing can be told there.
                        Err(WireError::Closed { .. } | WireError::Io { .. }) if phase == Phase::CopyOut => continue,
                        Err(error) => panic!("{what}: {error}"),
                    };
                    let status = if transaction { 'E' } else { 'I' };
                    assert_eq!((outcome.sqlstate(), char::from(outcome.status)), (LOST, status), "{what}: {outcome:?}");
                    if transaction {
                        expect_failed_transaction(&mut client, "ROLLBACK").await;
                    }
                    assert_eq!(value(&mut client, "SELECT 'on'").await, "on", "{what}");
                }
            }
        }
        until_quiet(&stage).await;
        assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
    });
}

#[test]
fn the_servers_own_fatal_is_forwarded_as_it_was_and_the_client_is_closed() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(Duration::from_mins(2), async {
        let mut bystander = stage.client().await;
        for phase in Phase::ALL {
            for transaction in [false, true] {
                if phase == Phase::Idle && !transaction {
                    continue;
                }
                let what = format!("{phase:?}, transaction {transaction}");
                let mut client = stage.client().await;
                succeed(&mut bystander, "BEGIN").await;
                let unharmed: i32 = value(&mut bystander, "SELECT pg_backend_pid()").await.parse().unwrap();
                if transaction {
                    succeed(&mut client, "BEGIN; INSERT INTO mark VALUES ('before')").await;
                }
                phase.enter(&mut client, &stage).await;
                let harmed: Vec<i32> = stage.backends().into_iter().filter(|pid| *pid != unharmed).collect();
                assert_eq!(harmed.len(), 1, "{what}");
                stage.terminate(harmed[0]);
                let end = read_to_end(&mut client).await;
                let error = end.messages.iter().filter_map(Message::server_error).next_back();
                let error = error.unwrap_or_else(|| panic!("{what}: no error"));
                assert_eq!((error.severity(), error.sqlstate()), ("FATAL", TERMINATED), "{what}: {error}");
                assert_eq!(error.message(), "terminating connection due to administrator command", "{what}");
                assert_eq!(error.field(b'R'), Some("ProcessInterrupts"), "{what}: every field as it was");
                assert_eq!(value(&mut bystander, "SELECT 'unharmed'").await, "unharmed", "{what}");
                succeed(&mut bystander, "COMMIT").await;
            }
        }
        until_quiet(&stage).await;
        assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
    });
}

#[test]
fn a_loss_in_the_middle_of_a_row_ends_the_client_or_is_told_cleanly() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1")]);
    run(Duration::from_mins(1), async {
        for cut in [1, 5, 6, 20, 100, 1000, 16_000, 70_000, 200_000, 299_990] {
            // On a busy machine the row may be through before the cut is made, or something of the pooler's own meets it.
            while !loses_a_row(&stage, &proxy, cut).await {}
        }
    });
}

/// Loses the server connection after so many bytes of a row. False if the whole of the answer came.
async fn loses_a_row(stage: &Stage<'_>, proxy: &FaultProxy, cut: u64) -> bool {
    const LONG: usize = 300_000;
    let mut client = stage.client().await;
    assert_eq!(value(&mut client, "SELECT 'warm'").await, "warm");
    client.send(&build::query(&format!("SELECT repeat('x', {LONG}) FROM pg_sleep(0.1)"))).await.unwrap();
    proxy.cut_after_bytes(Direction::ToClient, cut);
    let mut messages = Vec::new();
    let ready = loop {
        match client.recv().await {
            Ok(message) if message.tag == b'Z' => break true,
            Ok(message) => messages.push(message),
            Err(WireError::Closed { .. } | WireError::Io { .. }) => break false,
            Err(error) => panic!("{cut}: {error}"),
        }
    };
    let whole = messages.iter().any(|message| message.tag == b'C');
    // Whatever was forwarded, no message is other than the server's or a clean error.
    for message in &messages {
        assert!(b"TDE".contains(&message.tag) || whole && message.tag == b'C', "{cut}: {message:?}");
        if let Some(columns) = message.text_columns() {
            assert_eq!(columns[0].as_ref().unwrap().len(), LONG, "{cut}");
        }
    }
    if ready {
        assert_eq!(Outcome::of(&messages).sqlstate(), if whole { "" } else { LOST }, "{cut}");
        if !whole {
            assert_eq!(value(&mut client, "SELECT 'on'").await, "on", "{cut}");
        }
    }
    proxy.heal();
    let mut next = stage.client().await;
    assert_eq!(value(&mut next, "SELECT 'next'").await, "next", "{cut}");
    !whole
}

#[test]
fn a_server_that_is_lost_during_login_is_dialled_again() {
    let (stage, proxy) =
        Stage::behind_proxy(&[("default_pool_size", "1"), ("server_login_retry", "100ms"), ("server_lifetime", "0s")]);
    run(Duration::from_mins(2), async {
        for direction in [Direction::ToClient, Direction::ToServer] {
            for bytes in (0..700).step_by(50) {
                // server_lifetime 0: each transaction leaves no server connection behind, so each begins with a login.
                proxy.cut_after_bytes(direction, bytes);
                let mut client = match stage.try_client().await {
                    Ok(client) => client,
                    Err(error) => panic!("{direction:?} {bytes}: {error}"),
                };
                let mut outcome = client.query("SELECT 'in'").await.unwrap();
                if outcome.sqlstate() == LOST {
                    // The cut came after the login.
                    outcome = client.query("SELECT 'in'").await.unwrap();
                }
                assert_eq!(outcome.value(), Some("in"), "{direction:?} {bytes}: {outcome:?}");
                proxy.heal();
            }
        }
    });
}

#[test]
fn a_login_into_a_black_hole_is_given_up_after_server_connect_timeout() {
    let (stage, proxy) = Stage::behind_proxy(&[
        ("default_pool_size", "1"),
        ("server_connect_timeout", "1s"),
        ("server_login_retry", "100ms"),
    ]);
    run(Duration::from_mins(1), async {
        proxy.black_hole(Direction::ToClient);
        let addr = stage.addr();
        let name = stage.name().to_owned();
        let login = spawn_local(async move {
            let mut client = Wire::connect(addr).await.unwrap();
            client.set_patience(Duration::from_secs(30));
            client.login(&name, &name, "").await.map(|_| client)
        });
        let start = Instant::now();
        wait_until_async(SOON, async || proxy.accepted() >= 3).await;
        let elapsed = start.elapsed();
        assert!(elapsed > Duration::from_secs(1), "three tries in {elapsed:?}");
        proxy.heal();
        let mut client = login.await.unwrap().unwrap();
        assert_eq!(value(&mut client, "SELECT 'in'").await, "in");
        assert!(stage.backends().len() <= 1, "tries that were given up are gone");
    });
}

async fn client_with_settings(stage: &Stage<'_>, number: u32) -> Wire {
    let mut client = stage.client().await;
    succeed(&mut client, &format!("SET work_mem = '{number}MB'; SET timezone = 'Etc/GMT-{number}'")).await;
    // Another client's turn: until then, what was set is known to nobody but the server connection.
    value(&mut stage.client().await, "SELECT 1").await;
    client
}

#[test]
fn a_loss_while_settings_are_replayed_is_told_or_unseen_and_never_gives_wrong_settings() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1"), ("server_login_retry", "100ms")]);
    run(Duration::from_mins(2), async {
        let mut clients = [client_with_settings(&stage, 1).await, client_with_settings(&stage, 2).await];
        let (mut told, mut unseen) = (0, 0);
        for direction in [Direction::ToServer, Direction::ToClient] {
            for bytes in (0..240).step_by(6) {
                for (client, number) in clients.iter_mut().zip([1, 2]) {
                    proxy.cut_after_bytes(direction, bytes);
                    let sql = "SELECT current_setting('work_mem') || ' ' || current_setting('timezone')";
                    let answer = client.query(sql).await;
                    proxy.heal();
                    let outcome = match answer {
                        Ok(outcome) => outcome,
                        // Cut in the middle of the answer.
                        Err(WireError::Closed { .. } | WireError::Io { .. }) if direction == Direction::ToClient => {
                            told += 1;
                            *client = client_with_settings(&stage, number).await;
                            continue;
                        }
                        Err(error) => panic!("{direction:?} {bytes}: {error}"),
                    };
                    match outcome.sqlstate() {
                        "" => {
                            let want = format!("{number}MB Etc/GMT-{number}");
                            assert_eq!(outcome.value(), Some(want.as_str()), "{direction:?} {bytes}");
                            unseen += 1;
                        }
                        LOST => told += 1,
                        _ => panic!("{direction:?} {bytes}: {outcome:?}"),
                    }
                    assert_eq!(outcome.status, b'I');
                }
            }
        }
        println!("{told} losses were told, {unseen} queries were answered");
        assert!(unseen > 0);
    });
}

/// A transaction that a client sends without waiting, as one write or several.
struct Pipeline {
    bytes: Vec<u8>,
    /// `ReadyForQuery` messages that answer it.
    readies: usize,
}

impl Pipeline {
    fn new(dice: &mut Dice, round: u32, inserts: u64, commit: bool) -> Self {
        let mut texts = vec!["BEGIN".to_owned()];
        texts.extend((0..inserts).map(|n| format!("INSERT INTO ledger VALUES ({round}, {n})")));
        if commit {
            texts.push("COMMIT".to_owned());
        }
        let extended =
            |text: &String| [build::parse("", text, &[]), build::bind("", "", &[]), build::execute("", 0)].concat();
        match dice.below(3) {
            0 => Self { bytes: texts.iter().flat_map(|text| build::query(text)).collect(), readies: texts.len() },
            1 => Self {
                bytes: texts.iter().flat_map(|text| [extended(text), build::sync()].concat()).collect(),
                readies: texts.len(),
            },
            _ => Self { bytes: texts.iter().flat_map(extended).chain(build::sync()).collect(), readies: 1 },
        }
    }
}

#[test]
fn nothing_of_a_lost_transaction_is_committed_on_its_own() {
    const ROUNDS: u32 = 400;
    let seed = Dice::seed("nothing_of_a_lost_transaction_is_committed_on_its_own");
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "2"), ("server_login_retry", "100ms")]);
    stage.own_sql("CREATE TABLE ledger (round int, n int)");
    run(Duration::from_mins(4), async {
        let mut dice = Dice::new(seed);
        let (mut none, mut all, mut cuts) = (0, 0, 0);
        let mut client = stage.client().await;
        for round in 0..ROUNDS {
            let inserts = 1 + dice.below(6);
            let commit = !dice.once_in(3);
            let pipeline = Pipeline::new(&mut dice, round, inserts, commit);
            let length = u64::try_from(pipeline.bytes.len()).unwrap();
            let direction = if dice.once_in(2) { Direction::ToServer } else { Direction::ToClient };
            proxy.cut_after_bytes(direction, dice.below(length + length / 4));
            let outcomes = send_in_pieces(&mut client, &mut dice, &pipeline).await;
            let lost = outcomes.iter().any(|outcome| outcome.sqlstate() == LOST);
            cuts += u32::from(lost);
            let committed = outcomes.iter().any(|outcome| outcome.tags.iter().any(|tag| tag == "COMMIT"));
            let what = format!("round {round}, {direction:?}, commit {commit}, {inserts} inserts: {outcomes:?}");
            for outcome in &outcomes {
                assert!(["", LOST, FAILED].contains(&outcome.sqlstate()), "{what}");
            }
            if let Some(last) = outcomes.last().filter(|last| last.status != b'I') {
                // The client goes on as if nothing had happened.
                let sqlstate = if last.status == b'E' { FAILED } else { "" };
                let outcome = client.query(&format!("INSERT INTO ledger VALUES ({round}, 100)")).await.unwrap();
                assert!([sqlstate, LOST].contains(&outcome.sqlstate()), "{what}: {outcome:?}");
                let mut outcome = client.query("ROLLBACK").await.unwrap();
                if outcome.sqlstate() == LOST {
                    outcome = client.query("ROLLBACK").await.unwrap();
                }
                assert_eq!((outcome.tags.concat(), outcome.status), ("ROLLBACK".to_owned(), b'I'), "{what}");
            }
            proxy.heal();
            until_quiet(&stage).await;
            let found: u64 = stage.sql(&format!("SELECT count(*) FROM ledger WHERE round = {round}")).parse().unwrap();
            assert!(found == 0 || (commit && found == inserts), "{found} rows are there: {what}");
            assert!(!committed || found == inserts, "COMMIT was told, and {found} rows are there: {what}");
            none += u32::from(found == 0);
            all += u32::from(found > 0);
        }
        println!("{ROUNDS} rounds: {cuts} losses; none of the rows {none} times, all of them {all} times");
        assert!(cuts > ROUNDS / 4 && none > ROUNDS / 4 && all > ROUNDS / 20, "{cuts} {none} {all}: shows too little");
    });
}

/// Sends the pipeline in a few writes, then takes all its answers.
async fn send_in_pieces(client: &mut Wire, dice: &mut Dice, pipeline: &Pipeline) -> Vec<Outcome> {
    let mut rest = &pipeline.bytes[..];
    while !rest.is_empty() {
        let length = if dice.once_in(3) { 1 + dice.index(rest.len()) } else { rest.len() };
        let (piece, others) = rest.split_at(length);
        client.send(piece).await.unwrap();
        rest = others;
        if dice.once_in(2) {
            sleep(dice.time_below(Duration::from_millis(4))).await;
        }
    }
    let mut outcomes = Vec::new();
    for _ in 0..pipeline.readies {
        outcomes.push(client.outcome().await.unwrap_or_else(|error| panic!("{error}, after {outcomes:?}")));
    }
    outcomes
}

#[test]
fn a_restart_of_the_server_is_not_seen_between_transactions() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let stage = Stage::at(Place::on(&cluster), &[("default_pool_size", "4"), ("server_login_retry", "200ms")], &[]);
    stage.own_sql("CREATE TABLE tally (client int, n int)");
    std::thread::scope(|scope| {
        run(Duration::from_mins(2), async {
            let mut idle = Vec::new();
            for _ in 0..4 {
                let mut client = stage.client().await;
                client.set_patience(PATIENCE);
                assert_eq!(value(&mut client, "SELECT 'before'").await, "before");
                idle.push(client);
            }
            let stop = Rc::new(Cell::new(false));
            let busy: Vec<_> = (0..12)
                .map(|number| {
                    let (addr, name, stop) = (stage.addr(), stage.name().to_owned(), Rc::clone(&stop));
                    spawn_local(insert_until(addr, name, number, stop))
                })
                .collect();
            sleep(Duration::from_millis(500)).await;
            let restart = scope.spawn(|| cluster.restart().unwrap());
            wait_until_async(PATIENCE, async || restart.is_finished()).await;
            for client in &mut idle {
                assert_eq!(value(client, "SELECT 'after'").await, "after", "it never noticed");
            }
            sleep(Duration::from_millis(500)).await;
            stop.set(true);
            for (number, task) in busy.into_iter().enumerate() {
                let (answered, told) = task.await.unwrap();
                let count = format!("SELECT count(*) FROM tally WHERE client = {number}");
                let found: usize = stage.sql(&count).parse().unwrap();
                assert!(
                    (answered..=answered + told.len()).contains(&found),
                    "client {number}: {answered} answers, told {told:?}, {found} rows"
                );
                assert!(told.len() <= 2, "client {number}: one restart, told {told:?}");
            }
        });
    });
}

const PATIENCE: Duration = Duration::from_secs(40);

/// Inserts row after row, each a transaction of its own. Returns how many were answered, and what was told of the others.
async fn insert_until(addr: SocketAddr, name: String, number: usize, stop: Rc<Cell<bool>>) -> (usize, Vec<String>) {
    let mut client: Option<Wire> = None;
    let (mut answered, mut told) = (0, Vec::new());
    while !stop.get() {
        let mut wire = match client.take() {
            Some(wire) => wire,
            None => Wire::open(addr, &name, &name, "").await.unwrap(),
        };
        wire.set_patience(PATIENCE);
        wire.send(&build::query(&format!("INSERT INTO tally VALUES ({number}, {answered})"))).await.unwrap();
        match wire.outcome().await {
            Ok(outcome) if outcome.error.is_none() => {
                answered += 1;
                client = Some(wire);
            }
            Ok(outcome) => {
                assert_eq!((outcome.sqlstate(), outcome.status), (LOST, b'I'), "client {number}: {outcome:?}");
                told.push(LOST.to_owned());
                client = Some(wire);
            }
            // The server's own FATAL, and the end.
            Err(error) => {
                let sqlstate = error.server_error().unwrap_or_default().sqlstate().to_owned();
                assert_eq!(sqlstate, TERMINATED, "client {number}: {error}");
                told.push(sqlstate);
            }
        }
        sleep(Duration::from_millis(2)).await;
    }
    (answered, told)
}

/// A stage with two idle server connections, and a client that has used one.
async fn two_idle<'a>(stage: &'a Stage<'a>) -> Wire {
    let mut clients = [stage.client().await, stage.client().await];
    for client in &mut clients {
        client.send(&build::query("SELECT 'warm' FROM pg_sleep(0.05)")).await.unwrap();
    }
    for client in &mut clients {
        assert_eq!(client.outcome().await.unwrap().value(), Some("warm"));
    }
    let [client, _] = clients;
    client
}

#[test]
fn a_harmless_batch_that_is_lost_before_a_word_of_its_answer_is_run_again_unseen() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let mut client = two_idle(&stage).await;
        let extended = |sql: &str| {
            [build::parse("", sql, &[]), build::bind("", "", &[]), build::execute("", 0), build::sync()].concat()
        };
        let named = [build::parse("ping", "SELECT 1", &[]), build::describe_statement("ping"), build::sync()].concat();
        let bound = [build::bind("", "ping", &[]), build::execute("", 0), build::sync()].concat();
        #[rustfmt::skip]
        let table: [(&str, Vec<u8>, &str); 9] = [
            ("simple",             build::query("SELECT 1"),                                "TDCZ"),
            ("nothing",            build::query(""),                                        "IZ"),
            ("a setting",          build::query("SHOW search_path"),                        "TDCZ"),
            ("extended",           extended("SELECT 'a', 2"),                               "12DCZ"),
            ("named",              named,                                                   "1tTZ"),
            ("bound",              bound,                                                   "2DCZ"),
            ("a lone Sync",        build::sync(),                                           "Z"),
            ("two at once",        [build::query("SHOW port"), build::query("SELECT 1")].concat(), "TDCZTDCZ"),
            ("a transaction",      build::query("BEGIN"),                                   "CZ"),
        ];
        for (number, (name, batch, want)) in table.into_iter().enumerate() {
            proxy.cut_after_bytes(Direction::ToServer, 0);
            client.send(&batch).await.unwrap();
            let mut tags = String::new();
            while tags.len() < want.len() {
                tags.push(char::from(client.recv().await.unwrap().tag));
            }
            assert_eq!(tags, want, "{name}");
            let reruns = f64::from(u32::try_from(number).unwrap() + 1);
            wait_until_async(SOON, async || stage.metric("pgweir_reruns_total") >= reruns).await;
            assert!(stage.metric("pgweir_reruns_total") < reruns + 1.0, "{name}");
        }
        succeed(&mut client, "CREATE TEMP TABLE still (here int)").await;
        assert_eq!(succeed(&mut client, "ROLLBACK").await.status, b'I');
    });
}

#[test]
fn what_may_not_run_twice_is_not_run_again() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "2")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(Duration::from_mins(1), async {
        let mut client = two_idle(&stage).await;
        for sql in
            ["INSERT INTO mark VALUES ('a')", "SELECT now()", "SELECT 1; INSERT INTO mark VALUES ('b')", "SELECT 1 + 1"]
        {
            proxy.cut_after_bytes(Direction::ToServer, 0);
            fail(&mut client, sql, LOST, b'I').await;
            assert_eq!(value(&mut client, "SELECT 'on'").await, "on");
        }
        // Not behind anything, either: what went before may have run.
        succeed(&mut client, "BEGIN").await;
        proxy.cut_after_bytes(Direction::ToServer, 0);
        fail(&mut client, "SELECT 1", LOST, b'E').await;
        succeed(&mut client, "ROLLBACK").await;
        assert!(stage.metric("pgweir_reruns_total") < 1.0);
        assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
    });
}

#[test]
fn what_was_answered_here_of_a_batch_is_not_told_again_when_the_rest_runs_again() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let mut client = two_idle(&stage).await;
        for _ in 0..3 {
            client.send(&[build::parse("ping", "SELECT 1", &[]), build::sync()].concat()).await.unwrap();
            assert_eq!(client.outcome().await.unwrap().error, None);
            proxy.cut_after_bytes(Direction::ToServer, 0);
            // The Close is answered here, and at once.
            let select = [build::parse("", "SELECT 1", &[]), build::bind("", "", &[]), build::execute("", 0)].concat();
            client.send(&[build::close_statement("ping"), select, build::sync()].concat()).await.unwrap();
            let mut tags = String::new();
            while !tags.ends_with('Z') {
                tags.push(char::from(client.recv().await.unwrap().tag));
            }
            assert_eq!(tags, "312DCZ");
            assert_eq!(value(&mut client, "SELECT 'on'").await, "on");
        }
    });
}

#[test]
fn what_is_lost_a_second_time_is_told() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let mut client = two_idle(&stage).await;
        // Time enough to set the second cut between the first loss and the second sending.
        proxy.delay(Direction::ToServer, Duration::from_millis(500));
        proxy.cut_after_bytes(Direction::ToServer, 0);
        let begun = proxy.open();
        client.send(&build::query("SELECT 1")).await.unwrap();
        wait_until_async(SOON, async || proxy.open() < begun).await;
        proxy.cut_after_bytes(Direction::ToServer, 0);
        let outcome = client.outcome().await.unwrap();
        assert_eq!((outcome.sqlstate(), outcome.status), (LOST, b'I'), "{outcome:?}");
        proxy.heal();
        assert_eq!(value(&mut client, "SELECT 'on'").await, "on");
    });
}

/// A Unix-domain socket in front of a server. Connections through it can be made to take nothing any more: whoever writes is
/// told so, and nobody else.
struct Mouth {
    directory: tempfile::TempDir,
    taken: Arc<Mutex<Vec<(UnixStream, TcpStream)>>>,
    over: Arc<AtomicBool>,
}

impl Mouth {
    fn open(server: SocketAddr) -> Self {
        let directory = tempfile::Builder::new().prefix("pgweir-m").tempdir_in("/tmp").unwrap();
        let listener = UnixListener::bind(directory.path().join(".s.PGSQL.5432")).unwrap();
        let taken: Arc<Mutex<Vec<(UnixStream, TcpStream)>>> = Arc::default();
        let over = Arc::new(AtomicBool::new(false));
        let (all, ends) = (taken.clone(), over.clone());
        thread::spawn(move || {
            while let Ok((ours, _)) = listener.accept() {
                if ends.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(theirs) = TcpStream::connect(server) else { return };
                let clones = || (ours.try_clone().unwrap(), theirs.try_clone().unwrap());
                let ((mut up_from, mut up_to), (mut down_to, mut down_from)) = (clones(), clones());
                all.lock().unwrap().push((ours, theirs));
                thread::spawn(move || io::copy(&mut up_from, &mut up_to));
                thread::spawn(move || io::copy(&mut down_from, &mut down_to));
            }
        });
        Self { directory, taken, over }
    }

    fn shut(&self) {
        for (ours, _) in &*self.taken.lock().unwrap() {
            ours.shutdown(std::net::Shutdown::Read).unwrap();
        }
    }
}

impl Drop for Mouth {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(self.directory.path().join(".s.PGSQL.5432"));
        for (ours, theirs) in &*self.taken.lock().unwrap() {
            let _ = (ours.shutdown(std::net::Shutdown::Both), theirs.shutdown(std::net::Shutdown::Both));
        }
    }
}

#[test]
fn a_client_is_answered_by_a_second_server_connection_when_the_first_would_not_take_its_settings() {
    let place = Place::on(primary());
    let mouth = Mouth::open(place.cluster.addr());
    let directory = mouth.directory.path().to_str().unwrap();
    let host = [("databases.PLACE.host", directory), ("databases.PLACE.port", "5432"), ("default_pool_size", "2")];
    let stage = Stage::at(place, &host, &[]);
    run(Duration::from_mins(1), async {
        let zone = [("user", stage.name()), ("database", stage.name()), ("TimeZone", "Europe/Berlin")];
        let mut plain = stage.client().await;
        // The server has accepted these settings before: the next login with them needs none.
        let _known = stage.client_with(&zone[2..]).await;
        succeed(&mut plain, "SELECT 1").await;
        mouth.shut();
        // All in one piece; and nobody but the server will wake the session, for want of a Sync.
        let ask =
            [build::parse("", "SHOW timezone", &[]), build::bind("", "", &[]), build::execute("", 0), build::flush()];
        let mut wire = Wire::connect(stage.addr()).await.unwrap();
        wire.send(&[build::startup(&zone), ask.concat()].concat()).await.unwrap();
        let messages = wire.recv_until(b'C').await.unwrap();
        let row = messages.iter().find(|message| message.tag == b'D').unwrap();
        assert_eq!(row.text_columns().unwrap(), [Some("Europe/Berlin".to_owned())]);
        assert_eq!(mouth.taken.lock().unwrap().len(), 2, "the first was tried, and a second made");
        wire.send(&build::sync()).await.unwrap();
        wire.recv_until_ready().await.unwrap();
    });
}

//! How pgweir stops, and what a defect in one session does to the others.

use std::time::{Duration, Instant};

use pgweir_harness::wait_until_async;
use pgweir_harness::wire::{Message, Wire, build};
use tokio::time::sleep;

use crate::stage::{Latch, SOON, Stage, read_to_end, run, succeed, value};
use crate::support::{Place, primary};

/// `admin_shutdown`.
const TERMINATED: &str = "57P01";
/// Longest wait for what needs no drain, on a busy machine; drains may take longer in these tests.
const PROMPT: Duration = Duration::from_secs(12);

async fn expect_farewell(client: &mut Wire, who: &str) {
    let end = read_to_end(client).await;
    assert_eq!(end.sqlstate(), TERMINATED, "{who}: {:?}", end.messages);
    let error = end.messages.last().unwrap().server_error().unwrap();
    assert_eq!(error.severity(), "FATAL", "{who}: {error}");
}

#[test]
fn a_stop_tells_idle_clients_and_lets_transactions_finish() {
    let stage = Stage::new(&[("default_pool_size", "3"), ("shutdown_timeout", "60s")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(Duration::from_mins(1), async {
        let mut fresh = stage.client().await;
        let mut idle = stage.client().await;
        succeed(&mut idle, "SELECT 1").await;
        let mut inside = stage.client().await;
        succeed(&mut inside, "BEGIN; INSERT INTO mark VALUES ('inside')").await;
        let mut running = stage.client().await;
        let latch = Latch::shut(&stage).await;
        let insert = format!("INSERT INTO mark {} RETURNING by", Latch::query("running"));
        running.send(&build::query(&insert)).await.unwrap();
        wait_until_async(SOON, async || stage.is_running(Latch::CALL)).await;
        let start = Instant::now();
        stage.pgweir.signal(libc::SIGTERM).unwrap();
        expect_farewell(&mut fresh, "never used").await;
        expect_farewell(&mut idle, "idle").await;
        assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
        refuses_new_ones(&stage).await;
        // Several statements more, in both protocols, in the transaction that was open.
        assert_eq!(value(&mut inside, "SELECT 'simple'").await, "simple");
        let outcome = inside.extended("INSERT INTO mark VALUES ($1)", &[Some("extended")]).await.unwrap();
        assert_eq!(outcome.tags, ["INSERT 0 1"]);
        latch.open().await;
        let outcome = running.outcome().await.unwrap();
        assert_eq!(outcome.value(), Some("running"), "{outcome:?}");
        expect_farewell(&mut running, "running").await;
        assert!(stage.pgweir.is_running(), "it waits for the one in a transaction");
        let outcome = inside.query("COMMIT").await.unwrap();
        assert_eq!((outcome.tags, outcome.status), (vec!["COMMIT".to_owned()], b'I'));
        expect_farewell(&mut inside, "inside").await;
        let status = stage.pgweir.wait_exit(PROMPT).unwrap();
        assert_eq!(status.code(), Some(0));
    });
    assert!(stage.backends().is_empty(), "no server connection is left when the process is gone");
    assert_eq!(stage.sql("SELECT string_agg(by, ' ' ORDER BY by) FROM mark"), "extended inside running");
}

/// While it drains it either does not accept, or closes with 57P01 or 57P03.
async fn refuses_new_ones(stage: &Stage<'_>) {
    let Err(error) = stage.try_client().await else {
        panic!("a new client got in while pgweir stops");
    };
    if let Some(refusal) = error.server_error() {
        assert!(["57P01", "57P03"].contains(&refusal.sqlstate()), "{refusal}");
    }
}

#[test]
fn a_stop_with_nobody_there_is_prompt_and_clean() {
    let stage = Stage::new(&[("default_pool_size", "3"), ("min_pool_size", "2"), ("shutdown_timeout", "60s")]);
    run(SOON, async {
        let mut client = stage.client().await;
        succeed(&mut client, "SELECT 1").await;
        client.terminate().await.unwrap();
        wait_until_async(SOON, async || !stage.backends().is_empty()).await;
    });
    stage.pgweir.signal(libc::SIGTERM).unwrap();
    assert_eq!(stage.pgweir.wait_exit(PROMPT).unwrap().code(), Some(0));
    assert!(stage.backends().is_empty());
}

#[test]
fn a_stop_has_an_end_even_if_a_client_has_none() {
    let stage = Stage::new(&[("default_pool_size", "3"), ("shutdown_timeout", "1s")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(SOON, async {
        let mut inside = stage.client().await;
        succeed(&mut inside, "BEGIN; INSERT INTO mark VALUES ('inside')").await;
        let mut running = stage.client().await;
        running.send(&build::query("INSERT INTO mark SELECT 'running' FROM pg_sleep(60)")).await.unwrap();
        wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
        let start = Instant::now();
        stage.pgweir.signal(libc::SIGTERM).unwrap();
        expect_farewell(&mut inside, "inside").await;
        assert!(start.elapsed() > Duration::from_millis(900), "not before the time is up: {:?}", start.elapsed());
        expect_farewell(&mut running, "running").await;
        let status = stage.pgweir.wait_exit(PROMPT).unwrap();
        assert_eq!(status.code(), Some(1), "clients were cut off");
        assert!(!stage.pgweir.log().contains("worker did not end"), "it ended by itself");
        // What a client left running is cancelled, so nothing stays behind for long.
        wait_until_async(PROMPT, async || stage.backends().is_empty()).await;
    });
    assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for second in [libc::SIGTERM, libc::SIGINT] {
        let stage = Stage::new(&[("default_pool_size", "3"), ("shutdown_timeout", "60s")]);
        run(SOON, async {
            let mut inside = stage.client().await;
            succeed(&mut inside, "BEGIN; SELECT 1").await;
            stage.pgweir.signal(libc::SIGTERM).unwrap();
            sleep(Duration::from_millis(300)).await;
            assert!(stage.pgweir.is_running());
            let start = Instant::now();
            stage.pgweir.signal(second).unwrap();
            let status = stage.pgweir.wait_exit(PROMPT).unwrap();
            assert_ne!(status.code(), Some(0), "clients were cut off");
            assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
            let end = read_to_end(&mut inside).await;
            assert!(["", TERMINATED].contains(&end.sqlstate().as_str()), "{:?}", end.messages);
            wait_until_async(PROMPT, async || stage.backends().is_empty()).await;
        });
    }
}

#[test]
fn clients_in_the_queue_are_served_or_told_when_it_stops() {
    let stage = Stage::new(&[("default_pool_size", "1"), ("shutdown_timeout", "60s")]);
    run(Duration::from_mins(1), async {
        let mut inside = stage.client().await;
        succeed(&mut inside, "BEGIN; SELECT 1").await;
        let mut queued = stage.client().await;
        queued.send(&build::query("SELECT 'served'")).await.unwrap();
        sleep(Duration::from_millis(200)).await;
        stage.pgweir.signal(libc::SIGTERM).unwrap();
        sleep(Duration::from_millis(200)).await;
        succeed(&mut inside, "COMMIT").await;
        let end = read_to_end(&mut queued).await;
        let served = end.messages.iter().find_map(Message::text_columns);
        println!("the queued client was {}", if served.is_some() { "served" } else { "told" });
        assert_eq!(end.sqlstate(), TERMINATED, "{:?}", end.messages);
        assert_eq!(stage.pgweir.wait_exit(PROMPT).unwrap().code(), Some(0));
    });
}

#[test]
fn a_client_that_does_not_read_does_not_keep_it_from_stopping() {
    let stage = Stage::new(&[("default_pool_size", "2"), ("shutdown_timeout", "1s")]);
    run(SOON, async {
        let mut client = stage.client().await;
        client.send(&build::query("SELECT repeat('x', 1000000) FROM generate_series(1, 1000)")).await.unwrap();
        wait_until_async(SOON, async || !stage.pids("wait_event = 'ClientWrite'").is_empty()).await;
        stage.pgweir.signal(libc::SIGTERM).unwrap();
        let status = stage.pgweir.wait_exit(PROMPT).unwrap();
        assert_eq!(status.code(), Some(1));
        wait_until_async(PROMPT, async || stage.backends().is_empty()).await;
    });
}

/// The statement at which a build with debug assertions panics if it was asked to.
const PANIC: &str = "/* pgweir test: panic */ SELECT 1";

#[test]
fn a_panic_in_one_session_ends_only_that_session() {
    let stage = Stage::at(Place::on(primary()), &[("default_pool_size", "2")], &[("PGWEIR_TEST_PANIC", "1")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(Duration::from_mins(1), async {
        let mut bystander = stage.client().await;
        succeed(&mut bystander, "BEGIN; INSERT INTO mark VALUES ('bystander')").await;
        let mut idle = stage.client().await;
        assert_eq!(value(&mut idle, "SELECT 'idle'").await, "idle");
        for round in 1..=5_u32 {
            let mut victim = stage.client().await;
            succeed(&mut victim, "BEGIN; INSERT INTO mark VALUES ('victim')").await;
            let poisoned: i32 = value(&mut victim, "SELECT pg_backend_pid()").await.parse().unwrap();
            victim.send(&build::query(PANIC)).await.unwrap();
            let end = read_to_end(&mut victim).await;
            assert!(end.messages.iter().all(|message| message.tag == b'E'), "round {round}: {:?}", end.messages);
            assert_eq!(value(&mut bystander, "SELECT 'lives'").await, "lives", "round {round}");
            let used: i32 = value(&mut idle, "SELECT pg_backend_pid()").await.parse().unwrap();
            assert_ne!(used, poisoned, "round {round}: its server connection is not lent on");
            wait_until_async(SOON, async || !stage.backends().contains(&poisoned)).await;
            let panicked = || stage.metric("pgweir_sessions_panicked_total");
            wait_until_async(SOON, async || panicked() >= f64::from(round)).await;
            assert!(panicked() < f64::from(round) + 0.5, "round {round}: {}", panicked());
        }
        succeed(&mut bystander, "COMMIT").await;
    });
    assert_eq!(stage.sql("SELECT string_agg(by, ' ') FROM mark"), "bystander");
    let log = stage.pgweir.log();
    assert!(!log.contains("pgweir test: panic"), "the log holds no SQL: {log}");
    stage.pgweir.signal(libc::SIGTERM).unwrap();
    assert_eq!(stage.pgweir.wait_exit(SOON).unwrap().code(), Some(0), "it stops as ever");
}

#[test]
fn without_being_asked_to_nothing_panics() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    run(SOON, async {
        let mut client = stage.client().await;
        assert_eq!(value(&mut client, PANIC).await, "1");
    });
}

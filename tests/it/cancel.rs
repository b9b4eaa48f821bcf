//! Cancels: a client's own request, and the one that pgweir makes when a client vanishes. Neither ever reaches a
//! query of somebody else.

use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgweir_harness::wire::{Wire, build, cancel};
use pgweir_harness::{Direction, FaultProxy, SUPERUSER, SUPERUSER_PASSWORD, wait_until_async};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, timeout};

use crate::stage::{Dice, Latch, SOON, Stage, fail, read_to_end, run, succeed, value};
use crate::support::metric_in;

/// For a whole test, which may look a hundred times by psql; nothing is expected of it.
const LIMIT: Duration = Duration::from_mins(2);

/// In which time pgweir cancels what a vanished client left behind.
const PROMPT: Duration = Duration::from_secs(1);

/// [`PROMPT`], and what this machine takes now to look a few times: each look is a psql.
fn promptly(stage: &Stage<'_>) -> Duration {
    let start = Instant::now();
    stage.sql("SELECT 1");
    PROMPT + 10 * start.elapsed()
}

const QUERY_CANCELED: &str = "57014";

#[derive(Default)]
struct Tally {
    /// Cancels sent to this client's key.
    sent: Cell<u32>,
    /// Queries of this client that ended in 57014.
    hit: Cell<u32>,
    /// Queries of this client that were answered.
    answered: Cell<u32>,
}

fn add_one(count: &Cell<u32>) {
    count.set(count.get() + 1);
}

/// One client's queries, each with its own tag, until told to stop.
async fn query_until(mut wire: Wire, number: usize, mut dice: Dice, tally: Rc<Tally>, stop: Rc<Cell<bool>>) {
    let mut counter = 0;
    while !stop.get() {
        counter += 1;
        let tag = format!("c{number}-{counter}");
        let transaction = dice.once_in(3);
        if transaction {
            succeed_or_cancelled(&mut wire, "BEGIN", "BEGIN", &tally).await;
        }
        let sql = match dice.below(4) {
            0 => format!("SELECT '{tag}' FROM generate_series(1, {}) n ORDER BY -n LIMIT 1", dice.below(20_000) + 1),
            1 => format!("SELECT '{tag}'"),
            _ => format!("SELECT '{tag}' FROM pg_sleep({})", dice.time_below(Duration::from_millis(20)).as_secs_f64()),
        };
        let outcome =
            if dice.once_in(2) { wire.query(&sql).await.unwrap() } else { wire.extended(&sql, &[]).await.unwrap() };
        match outcome.sqlstate() {
            "" => {
                assert_eq!(outcome.value(), Some(tag.as_str()), "client {number}");
                add_one(&tally.answered);
            }
            QUERY_CANCELED => add_one(&tally.hit),
            // The transaction's BEGIN was what the cancel hit, or it failed earlier.
            _ => panic!("client {number}: {sql}: {outcome:?}"),
        }
        if transaction {
            let failed = outcome.status == b'E';
            let end = if dice.once_in(2) { "COMMIT" } else { "ROLLBACK" };
            let want = if failed { "ROLLBACK" } else { end };
            succeed_or_cancelled(&mut wire, end, want, &tally).await;
            if wire.query("ROLLBACK").await.unwrap().status != b'I' {
                // A cancel that hits even this ROLLBACK leaves the next one to do it.
                assert_eq!(wire.query("ROLLBACK").await.unwrap().status, b'I', "client {number}");
            }
        }
    }
}

async fn succeed_or_cancelled(wire: &mut Wire, sql: &str, tag: &str, tally: &Tally) {
    let outcome = wire.query(sql).await.unwrap();
    match outcome.sqlstate() {
        "" if outcome.tags == [tag] => {}
        // BEGIN was cancelled while it waited for a server connection: COMMIT then has no transaction to end.
        "" if outcome.tags == [sql] && outcome.status == b'I' => {}
        QUERY_CANCELED => add_one(&tally.hit),
        _ => panic!("{sql}: {outcome:?}"),
    }
}

#[test]
fn a_cancel_reaches_only_its_own_server() {
    const CLIENTS: usize = 36;
    const CANCELLERS: usize = 6;
    const CANCELS: u32 = 4000;
    let seed = Dice::seed("a_cancel_reaches_only_its_own_server");
    let stage = Stage::new(&[("default_pool_size", "4")]);
    let watch = stage.place.cap_watch(4);
    run(Duration::from_mins(3), async {
        let stop = Rc::new(Cell::new(false));
        let mut dice = Dice::new(seed);
        let mut clients: Vec<(Rc<Tally>, JoinHandle<()>)> = Vec::new();
        let mut keys = Vec::new();
        for number in 0..CLIENTS {
            let wire = stage.client().await;
            let tally = Rc::new(Tally::default());
            // Every third client's key is never used.
            if number % 3 != 0 {
                keys.push((wire.pid, wire.secret.clone(), Rc::clone(&tally)));
            }
            let task = query_until(wire, number, Dice::new(dice.next()), Rc::clone(&tally), Rc::clone(&stop));
            clients.push((tally, spawn_local(task)));
        }
        let keys = Rc::new(keys);
        let left = Rc::new(Cell::new(CANCELS));
        let cancellers: Vec<JoinHandle<()>> = (0..CANCELLERS)
            .map(|_| {
                let (keys, left, addr, mut dice) =
                    (Rc::clone(&keys), Rc::clone(&left), stage.addr(), Dice::new(dice.next()));
                spawn_local(async move {
                    while left.get() > 0 {
                        left.set(left.get() - 1);
                        let (pid, secret, tally) = dice.pick(&keys);
                        add_one(&tally.sent);
                        cancel(addr, *pid, secret).await.unwrap();
                        sleep(dice.time_below(Duration::from_millis(3))).await;
                    }
                })
            })
            .collect();
        for canceller in cancellers {
            canceller.await.unwrap();
        }
        stop.set(true);
        let (mut hits, mut answers) = (0, 0);
        for (number, (tally, task)) in clients.into_iter().enumerate() {
            task.await.unwrap();
            let (sent, hit) = (tally.sent.get(), tally.hit.get());
            assert!(hit <= sent, "client {number} had {hit} queries cancelled by {sent} cancels");
            assert!(tally.answered.get() > 0, "client {number} had answers");
            hits += hit;
            answers += tally.answered.get();
        }
        println!("{CANCELS} cancels: {hits} hit, {answers} queries were answered");
        assert!(hits > CANCELS / 20, "only {hits} of {CANCELS} cancels hit: the test shows nothing");
    });
    assert!(watch.finish() > 0);
}

#[test]
fn a_cancel_that_comes_late_does_not_hit_whoever_is_next() {
    const ROUNDS: u32 = 400;
    const LENGTHS: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(1)];
    let seed = Dice::seed("a_cancel_that_comes_late_does_not_hit_whoever_is_next");
    let stage = Stage::new(&[("default_pool_size", "1")]);
    run(Duration::from_mins(4), async {
        let mut dice = Dice::new(seed);
        let mut first = stage.client().await;
        let mut second = stage.client().await;
        let (pid, secret) = (first.pid, first.secret.clone());
        let mut hits = 0;
        // As long as a cancel is on its way, however fast this machine is now: shorter behind each hit, longer behind each miss.
        let mut length = Duration::from_millis(4);
        for round in 0..ROUNDS {
            let addr = stage.addr();
            let this = length * 3 / 4 + dice.time_below(length / 2);
            first.send(&build::query(&format!("SELECT pg_sleep({})", this.as_secs_f64()))).await.unwrap();
            // It runs still when one comes that was late.
            let behind = Duration::from_millis(4) + length / 2;
            let text = format!("SELECT {round} FROM pg_sleep({})", behind.as_secs_f64());
            second.send(&build::query(&text)).await.unwrap();
            let pause = dice.time_below(Duration::from_millis(1));
            let secret = secret.clone();
            let canceller = spawn_local(async move {
                sleep(pause).await;
                cancel(addr, pid, &secret).await.unwrap();
            });
            let is_hit = first.outcome().await.unwrap().sqlstate() == QUERY_CANCELED;
            hits += u32::from(is_hit);
            length = (length * if is_hit { 7 } else { 9 } / 8).clamp(LENGTHS[0], LENGTHS[1]);
            let outcome = second.outcome().await.unwrap();
            assert_eq!(outcome.value(), Some(round.to_string().as_str()), "round {round}: {outcome:?}");
            canceller.await.unwrap();
        }
        println!("{hits} of {ROUNDS} cancels hit the query they were meant for, in the end one of {length:?}");
        let near = ROUNDS / 10..ROUNDS - ROUNDS / 10;
        assert!(near.contains(&hits), "{hits} of {ROUNDS}: the cancels were not near the end of the query");
    });
}

#[test]
fn a_cancel_of_an_idle_client_does_nothing() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    run(LIMIT, async {
        let mut idle = stage.client().await;
        let mut busy = stage.client().await;
        assert_eq!(value(&mut idle, "SELECT 1").await, "1");
        let latch = Latch::shut(&stage).await;
        busy.send(&build::query(&Latch::query("whole"))).await.unwrap();
        wait_until_async(SOON, async || stage.is_running(Latch::CALL)).await;
        for _ in 0..20 {
            cancel(stage.addr(), idle.pid, &idle.secret).await.unwrap();
        }
        latch.open().await;
        assert_eq!(busy.outcome().await.unwrap().value(), Some("whole"));
        assert_eq!(value(&mut idle, "SELECT 2").await, "2", "nor does it hit the client's own next query");
    });
}

#[test]
fn a_queued_client_can_be_cancelled() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(LIMIT, async {
        let mut holder = stage.client().await;
        let mut simple = stage.client().await;
        let mut extended = stage.client().await;
        let mut last = stage.client().await;
        succeed(&mut holder, "BEGIN; SELECT 1").await;
        simple.send(&build::query("INSERT INTO mark VALUES ('simple')")).await.unwrap();
        let insert = [
            build::parse("s", "INSERT INTO mark VALUES ('extended')", &[]),
            build::bind("", "s", &[]),
            build::execute("", 0),
            build::sync(),
        ];
        extended.send(&insert.concat()).await.unwrap();
        last.send(&build::query("SELECT 'last'")).await.unwrap();
        assert!(simple.recv_within(Duration::from_millis(200)).await.unwrap().is_none(), "it waits");
        for client in [&mut simple, &mut extended] {
            let start = Instant::now();
            cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
            let outcome = client.outcome().await.unwrap();
            assert_eq!((outcome.sqlstate(), outcome.status), (QUERY_CANCELED, b'I'), "{outcome:?}");
            let took = start.elapsed();
            assert!(took < promptly(&stage), "{took:?}");
        }
        wait_until_async(SOON, async || stage.metric("pgweir_cancels_total") > 1.5).await;
        let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
        assert!((metric_in(&body, "pgweir_cancels_total", &["outcome=\"queued\""]) - 2.0).abs() < 0.5, "{body}");
        succeed(&mut holder, "COMMIT").await;
        assert_eq!(last.outcome().await.unwrap().value(), Some("last"), "those who left are not in its way");
        assert_eq!(value(&mut simple, "SELECT 'usable'").await, "usable");
        let outcome = extended.extended("SELECT 'usable'", &[]).await.unwrap();
        assert_eq!(outcome.value(), Some("usable"));
    });
    assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0", "what was cancelled in the queue never ran");
}

#[test]
fn a_cancel_is_not_lost_when_it_comes_as_the_client_gets_its_turn() {
    const ROUNDS: u32 = 100;
    let seed = Dice::seed("a_cancel_is_not_lost_when_it_comes_as_the_client_gets_its_turn");
    let stage = Stage::new(&[("default_pool_size", "1")]);
    run(Duration::from_mins(2), async {
        let mut dice = Dice::new(seed);
        let mut holder = stage.client().await;
        let mut queued = stage.client().await;
        for round in 0..ROUNDS {
            succeed(&mut holder, "BEGIN; SELECT 1").await;
            queued.send(&build::query("SELECT pg_sleep(10)")).await.unwrap();
            // It has been asked long before the cancel, as far as the application can tell.
            sleep(Duration::from_millis(5)).await;
            let (addr, pid, secret) = (stage.addr(), queued.pid, queued.secret.clone());
            let pause = dice.time_below(Duration::from_millis(3));
            let cancelling = spawn_local(async move {
                sleep(pause).await;
                cancel(addr, pid, &secret).await
            });
            sleep(dice.time_below(Duration::from_millis(3))).await;
            succeed(&mut holder, "COMMIT").await;
            let start = Instant::now();
            let outcome = queued.outcome().await.unwrap();
            let took = start.elapsed();
            assert_eq!(outcome.sqlstate(), QUERY_CANCELED, "round {round}, after {took:?}: {outcome:?}");
            assert!(took < SOON / 4, "round {round}: {took:?}");
            cancelling.await.unwrap().unwrap();
        }
    });
}

#[test]
fn a_wrong_secret_or_an_unknown_process_id_cancels_nothing() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(LIMIT, async {
        let mut client = stage.client().await;
        let other = stage.client().await;
        let backend: i32 = value(&mut client, "SELECT pg_backend_pid()").await.parse().unwrap();
        let latch = Latch::shut(&stage).await;
        client.send(&build::query(&Latch::query("whole"))).await.unwrap();
        wait_until_async(SOON, async || stage.is_running(Latch::CALL)).await;
        let mut wrong = client.secret.clone();
        wrong[0] ^= 1;
        let mut last = client.secret.clone();
        *last.last_mut().unwrap() ^= 0x80;
        let unknown = client.pid.wrapping_add(12_345);
        #[rustfmt::skip]
        let table: [(&str, i32, &[u8]); 9] = [
            ("first bit of the secret", client.pid,  &wrong),
            ("last bit of the secret",  client.pid,  &last),
            ("another's secret",        client.pid,  &other.secret),
            ("another's process id",    other.pid,   &client.secret),
            ("unknown process id",      unknown,     &client.secret),
            ("the backend's own",       backend,     &client.secret),
            ("zero",                    0,           &[0; 4]),
            ("a shorter secret",        client.pid,  &client.secret[..3]),
            ("no secret",               client.pid,  &[]),
        ];
        for (name, pid, secret) in table {
            // A malformed one may be answered with an error; all that counts is that nothing is cancelled.
            let _ = cancel(stage.addr(), pid, secret).await;
            assert!(stage.is_running(Latch::CALL), "{name}");
        }
        latch.open().await;
        assert_eq!(client.outcome().await.unwrap().value(), Some("whole"));
    });
}

#[test]
fn whoever_guesses_at_cancel_keys_is_not_listened_to_for_a_while() {
    let stage = Stage::new(&[("default_pool_size", "2"), ("login_failure_rate", "1"), ("login_failure_burst", "5")]);
    run(Duration::from_mins(2), async {
        let (mut client, mut other) = (stage.client().await, stage.client().await);
        let guess = async |pid: i32, secret: &[u8]| cancel(stage.addr(), pid, secret).await.unwrap();
        let mut wrong = client.secret.clone();
        wrong[0] ^= 1;
        // A session that is not there cannot be guessed at: one that has ended is asked for by mistake. Nor does it count how
        // often a right key comes.
        for _ in 0..20 {
            guess(client.pid ^ 1, &wrong).await;
            guess(client.pid, &client.secret).await;
        }
        client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
        wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
        guess(client.pid, &client.secret).await;
        assert_eq!(client.outcome().await.unwrap().sqlstate(), QUERY_CANCELED);

        // What was guessed is forgiven at a rate: on a busy machine the right key may come too late to be ignored.
        let mut ignored = false;
        for _ in 0..5 {
            client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
            wait_until_async(SOON, async || stage.is_running("pg_sleep(60)")).await;
            for _ in 0..20 {
                guess(client.pid, &wrong).await;
            }
            guess(client.pid, &client.secret).await;
            for _ in 0..10 {
                sleep(Duration::from_millis(200)).await;
                ignored = stage.is_running("pg_sleep(60)");
                if !ignored {
                    break;
                }
            }
            if ignored {
                break;
            }
            assert_eq!(client.outcome().await.unwrap().sqlstate(), QUERY_CANCELED);
        }
        assert!(ignored, "twenty wrong ones, and the right one is heeded");
        stage.pgweir.wait_log("too many wrong keys from 127.0.0.1", SOON).unwrap();
        wait_until_async(SOON, async || stage.metric("pgweir_cancels_ignored_total") > 0.5).await;
        // Other sessions are cancelled as ever, and this one again a little later.
        other.send(&build::query("SELECT pg_sleep(61)")).await.unwrap();
        wait_until_async(SOON, async || stage.is_running("pg_sleep(61)")).await;
        guess(other.pid, &other.secret).await;
        assert_eq!(other.outcome().await.unwrap().sqlstate(), QUERY_CANCELED);
        wait_until_async(SOON, async || {
            guess(client.pid, &client.secret).await;
            !stage.is_running("pg_sleep(60)")
        })
        .await;
        assert_eq!(client.outcome().await.unwrap().sqlstate(), QUERY_CANCELED);
    });
}

#[test]
fn what_cancels_a_query_waits_for_the_replay_of_settings_in_front_of_it() {
    // By the client's own request, and by the limit on a query.
    for limit in ["0", "300ms"] {
        let stage = Stage::new(&[("default_pool_size", "1"), ("query_timeout", limit)]);
        stage.sql("CREATE TEXT SEARCH CONFIGURATION public.mine (COPY = pg_catalog.simple)");
        run(Duration::from_mins(1), async {
            let mut plain = stage.client().await;
            let mut mine = stage.client_with(&[("default_text_search_config", "public.mine")]).await;
            succeed(&mut plain, "SELECT 1").await;
            let backends = stage.backends();
            // The setting is looked up in a table, which is locked.
            let rename = "ALTER TEXT SEARCH CONFIGURATION public";
            stage.sql(&format!("{rename}.mine RENAME TO his; {rename}.his RENAME TO mine"));
            let mut lock =
                Wire::open(stage.place.cluster.addr(), SUPERUSER, stage.name(), SUPERUSER_PASSWORD).await.unwrap();
            succeed(&mut lock, "BEGIN; LOCK pg_ts_config IN ACCESS EXCLUSIVE MODE").await;
            mine.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
            wait_until_async(SOON, async || !stage.pids("wait_event_type = 'Lock'").is_empty()).await;
            let (addr, pid, secret) = (stage.addr(), mine.pid, mine.secret.clone());
            let request = spawn_local(async move {
                if limit == "0" {
                    cancel(addr, pid, &secret).await.unwrap();
                }
            });
            assert!(mine.recv_within(Duration::from_secs(1)).await.unwrap().is_none(), "it hit the replay ({limit})");
            succeed(&mut lock, "COMMIT").await;
            let outcome = mine.outcome().await.unwrap();
            assert_eq!((outcome.sqlstate(), outcome.status), (QUERY_CANCELED, b'I'), "{limit}: {outcome:?}");
            request.await.unwrap();
            assert_eq!(value(&mut mine, "SHOW default_text_search_config").await, "public.mine");
            assert_eq!(stage.backends(), backends, "the server connection is none the worse ({limit})");
        });
    }
}

/// Ends a transaction that is audited, with `waiter` in the queue: from then on, for a while, `client` is the one that gives way.
async fn give_way(stage: &Stage<'_>, proxy: &FaultProxy, client: &mut Wire, waiter: &mut Wire) {
    succeed(client, "BEGIN; SELECT set_config('its.own', '1', false)").await;
    waiter.send(&build::query("SELECT 'served'")).await.unwrap();
    let waiting = || metric_in(&stage.pgweir.http_get("/metrics").unwrap().1, "pgweir_clients", &["state=\"waiting\""]);
    wait_until_async(SOON, async || waiting() > 0.5).await;
    proxy.delay(Direction::ToClient, Duration::from_secs(1));
    succeed(client, "COMMIT").await;
}

#[test]
fn a_cancel_of_what_waits_for_the_end_of_an_audit_is_not_lost_and_one_of_nothing_hits_nothing() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1")]);
    run(Duration::from_mins(1), async {
        let (mut client, mut waiter) = (stage.client().await, stage.client().await);
        for is_query in [true, false] {
            give_way(&stage, &proxy, &mut client, &mut waiter).await;
            if is_query {
                client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
            }
            cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
            if is_query {
                let outcome = client.outcome().await.unwrap();
                assert_eq!((outcome.sqlstate(), outcome.status), (QUERY_CANCELED, b'I'), "{outcome:?}");
            }
            assert_eq!(waiter.outcome().await.unwrap().value(), Some("served"), "it is nobody else's");
            proxy.heal();
            assert_eq!(value(&mut client, "SELECT 'whole' FROM pg_sleep(0.5)").await, "whole");
        }
    });
}

#[test]
fn a_cancel_that_is_sent_again_does_not_hit_the_query_behind() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    // Cancelled, and ends well all the same: as a query that a server had not read when the request came.
    let deaf = "DO $$BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END$$";
    run(LIMIT, async {
        let mut client = stage.client().await;
        let (mut round, mut ended_well) = (0, 0);
        while ended_well < 3 {
            round += 1;
            client.send(&build::query(deaf)).await.unwrap();
            wait_until_async(SOON, async || stage.is_running("PERFORM pg_sleep")).await;
            cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
            let outcome = client.outcome().await.unwrap();
            // On a busy machine it may be cancelled once more before it has ended.
            assert!(matches!(outcome.sqlstate(), "" | "57014"), "{outcome:?}");
            ended_well += usize::from(outcome.error.is_none());
            // It is sent again while this runs.
            let text = format!("SELECT 'whole{round}' FROM pg_sleep(0.7)");
            assert_eq!(value(&mut client, &text).await, format!("whole{round}"));
            assert!(round < 20, "of {round} only {ended_well} left something to hit the query behind");
        }
    });
}

#[test]
fn a_cancel_is_not_sent_again_while_another_query_is_behind() {
    const CLIENTS: u32 = 8;
    const ROUNDS: u32 = 3;
    let stage = Stage::new(&[("default_pool_size", &CLIENTS.to_string())]);
    run(LIMIT, async {
        let plays = (0..CLIENTS).map(async |number| {
            let (mut client, mut hits) = (stage.client().await, 0);
            // It takes its time to end when it is cancelled, and a second request would be heard in that time. Sent a little later, it
            // would hit the query behind.
            let nap = format!("PERFORM pg_sleep(6{number})");
            let slow = format!("DO $$BEGIN {nap}; EXCEPTION WHEN query_canceled THEN PERFORM pg_sleep(0.7); END$$");
            let behind = || build::query("SELECT 'whole' FROM pg_sleep(0.3)");
            for _ in 0..ROUNDS {
                client.send(&[build::query(&slow), behind()].concat()).await.unwrap();
                wait_until_async(SOON, async || stage.is_running(&nap)).await;
                cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
                let end = client.outcome().await.unwrap();
                assert!(matches!(end.sqlstate(), "" | QUERY_CANCELED), "{end:?}");
                hits += u32::from(end.error.is_some());
                assert_eq!(client.outcome().await.unwrap().value(), Some("whole"));
            }
            hits
        });
        // Of one request a server up to 17 makes two signals, one at once behind the other, and the second one may come in that time:
        // more often the busier the machine is.
        // Source: signal_child in postmaster.c.
        let hits: u32 = join_all(plays).await.into_iter().sum();
        println!("{hits} of {} were hit twice", CLIENTS * ROUNDS);
        assert!(hits <= CLIENTS * ROUNDS * 3 / 4, "{hits} of {} were hit twice", CLIENTS * ROUNDS);
    });
}

#[test]
fn process_ids_lie_above_any_real_one() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(LIMIT, async {
        let mut clients = Vec::new();
        for _ in 0..50 {
            clients.push(stage.client().await);
        }
        let pids: HashSet<i32> = clients.iter().map(|client| client.pid).collect();
        let secrets: HashSet<Vec<u8>> = clients.iter().map(|client| client.secret.clone()).collect();
        assert_eq!(pids.len(), clients.len(), "process ids differ");
        assert_eq!(secrets.len(), clients.len(), "secrets differ");
        for client in &clients {
            // Source: Linux' PID_MAX_LIMIT, proc_sys_kernel(5).
            assert!(client.pid > 4_194_304, "{}", client.pid);
            // Source: PostgreSQL 17 docs, §53.7, BackendKeyData.
            assert_eq!(client.secret.len(), 4, "protocol 3.0 has four bytes");
        }
        let client = &mut clients[0];
        let terminated = value(client, &format!("SELECT pg_terminate_backend({})", client.pid)).await;
        assert_eq!(terminated, "f", "no backend has that process id");
    });
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vanish {
    Reset,
    EndOfStream,
}

impl Vanish {
    const ALL: [Self; 2] = [Self::Reset, Self::EndOfStream];

    fn go(self, wire: Wire) {
        match self {
            Self::Reset => wire.abort().unwrap(),
            Self::EndOfStream => drop(wire),
        }
    }
}

#[test]
fn a_vanished_clients_query_is_cancelled_and_rolled_back() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE held (n int)");
    for vanish in Vanish::ALL {
        run(LIMIT, async {
            let mut client = stage.client().await;
            succeed(&mut client, "BEGIN; LOCK TABLE held; INSERT INTO held VALUES (1)").await;
            let before = stage.backends();
            client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
            wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
            vanish.go(client);
            let start = Instant::now();
            wait_until_async(promptly(&stage), async || !stage.is_running("pg_sleep")).await;
            wait_until_async(promptly(&stage), async || {
                stage.sql("SELECT count(*) FROM pg_locks WHERE relation = 'held'::regclass") == "0"
            })
            .await;
            println!("{vanish:?}: gone after {:?}", start.elapsed());
            let mut next = stage.client().await;
            let backend: i32 = value(&mut next, "SELECT pg_backend_pid()").await.parse().unwrap();
            assert_eq!(vec![backend], before, "{vanish:?}: the server connection lives on");
            assert_eq!(stage.backends(), before, "{vanish:?}");
            assert_eq!(value(&mut next, "SELECT count(*) FROM held").await, "0", "{vanish:?}: it was rolled back");
        });
    }
}

/// A batch of five messages.
fn batch(sql: &str) -> Vec<u8> {
    let messages = [build::parse("", sql, &[]), build::bind("", "", &[]), build::describe_portal("")];
    [messages.concat(), build::execute("", 0), build::sync()].concat()
}

#[test]
fn a_client_that_vanishes_is_missed_even_when_no_more_is_read_from_it() {
    let stage = Stage::new(&[("default_pool_size", "1"), ("query_wait_timeout", "60s")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    let slow = batch("SELECT pg_sleep(60)");
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, &[Vanish]); 4] = [
        // As many replies are owed as may be, so that no more is read; and there is no more.
        ("full to the brim",   [slow.clone(), batch("SELECT 1").repeat(3276)].concat(),   &Vanish::ALL),
        ("more unread",        [slow.clone(), batch("SELECT 1").repeat(100_000)].concat(), &[Vanish::Reset]),
        ("the server is full", [slow.clone(), batch(&format!("SELECT '{}'", "x".repeat(200_000))).repeat(60)].concat(),
            &[Vanish::Reset]),
        ("one message",        [slow, build::query(&format!("SELECT '{}'", "x".repeat(30_000_000)))].concat(),
            &[Vanish::Reset]),
    ];
    for (name, bytes, ways) in table {
        for vanish in ways {
            run(Duration::from_mins(1), async {
                let mut client = stage.client().await;
                // Not all of it can be written: it stays where it is when nobody reads.
                let _ = timeout(Duration::from_millis(500), client.send(&bytes)).await;
                wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
                let start = Instant::now();
                vanish.go(client);
                wait_until_async(5 * promptly(&stage), async || !stage.is_running("pg_sleep")).await;
                println!("{name}, {vanish:?}: gone after {:?}", start.elapsed());
                let mut next = stage.client().await;
                assert_eq!(value(&mut next, "SELECT 'next'").await, "next", "{name}, {vanish:?}");
                println!("{name}, {vanish:?}: the next after {:?}", start.elapsed());
            });
        }
    }
}

#[test]
fn a_goodbye_behind_a_pipeline_that_is_not_read_yet_is_heard() {
    const BATCHES: usize = 5000;
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        let insert = [build::parse("", "INSERT INTO mark VALUES ('it')", &[]), build::bind("", "", &[])];
        let insert = [insert.concat(), build::execute("", 0), build::sync()].concat();
        let all = [batch("SELECT pg_sleep(3)"), insert.repeat(BATCHES), build::terminate()].concat();
        client.send(&all).await.unwrap();
        wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
        // Its end, behind a goodbye that nobody has read.
        client.shutdown().await.unwrap();
        read_to_end(&mut client).await;
        let count = async || stage.sql("SELECT count(*) FROM mark");
        wait_until_async(SOON, async || count().await == BATCHES.to_string()).await;
    });
}

#[test]
fn a_vanished_clients_idle_transaction_is_rolled_back() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE held (n int)");
    for vanish in Vanish::ALL {
        run(LIMIT, async {
            let mut client = stage.client().await;
            succeed(&mut client, "BEGIN; LOCK TABLE held; INSERT INTO held VALUES (1)").await;
            let before = stage.backends();
            vanish.go(client);
            let mut next = stage.client().await;
            assert_eq!(value(&mut next, "SELECT count(*) FROM held").await, "0", "{vanish:?}");
            assert_eq!(stage.backends(), before, "{vanish:?}: the server connection lives on");
        });
    }
}

#[test]
fn a_vanished_client_leaves_the_queue() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(LIMIT, async {
        let mut holder = stage.client().await;
        succeed(&mut holder, "BEGIN; SELECT 1").await;
        for vanish in Vanish::ALL {
            let mut queued = stage.client().await;
            queued.send(&build::query("INSERT INTO mark VALUES ('queued')")).await.unwrap();
            sleep(Duration::from_millis(100)).await;
            vanish.go(queued);
        }
        // pgweir learns of it by reading; the goodbye of a client that came later is read after it.
        let mut last = stage.client().await;
        last.send(&build::query("SELECT 'last'")).await.unwrap();
        sleep(Duration::from_millis(200)).await;
        succeed(&mut holder, "COMMIT").await;
        assert_eq!(last.outcome().await.unwrap().value(), Some("last"));
    });
    assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
}

#[test]
fn what_was_sent_before_a_goodbye_runs_to_its_end() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    let extended = |by: &str| {
        [
            build::parse("", &format!("INSERT INTO mark SELECT '{by}' FROM pg_sleep(0.3)"), &[]),
            build::bind("", "", &[]),
            build::execute("", 0),
            build::sync(),
        ]
        .concat()
    };
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>); 3] = [
        ("one query",   build::query("SELECT pg_sleep(0.5); INSERT INTO mark VALUES ('one query')")),
        ("two queries", [build::query("SELECT pg_sleep(0.5)"), build::query("INSERT INTO mark VALUES ('two queries')")].concat()),
        ("extended",    extended("extended")),
    ];
    for (name, bytes) in table {
        run(LIMIT, async {
            let mut client = stage.client().await;
            client.send(&[bytes, build::terminate()].concat()).await.unwrap();
            // Closes the socket with answers unread, as a program does that exits: the kernel then sends a reset.
            drop(client);
            let count = format!("SELECT count(*) FROM mark WHERE by = '{name}'");
            wait_until_async(SOON, async || !stage.is_running("pg_sleep") && stage.sql(&count) == "1").await;
        });
    }
}

#[test]
fn a_goodbye_in_the_middle_of_a_copy_frees_the_server_connection() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE copied (n int)");
    for at_once in [true, false] {
        run(LIMIT, async {
            let mut client = stage.client().await;
            client.send(&build::query("COPY copied FROM STDIN")).await.unwrap();
            if !at_once {
                while client.recv().await.unwrap().tag != b'G' {}
            }
            client.send(&build::terminate()).await.unwrap();
            read_to_end(&mut client).await;
            assert_eq!(
                value(&mut stage.client().await, "SELECT count(*) FROM copied").await,
                "0",
                "at once: {at_once}"
            );
        });
    }
}

#[test]
fn what_was_sent_before_a_goodbye_runs_although_its_server_connection_is_lost_before_it_gets_it() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(LIMIT, async {
        // A statement_timeout is applied and awaited before anything of the client's is sent.
        let mut client = stage.client_with(&[("options", "-c statement_timeout=30s")]).await;
        assert_eq!(value(&mut client, "SHOW statement_timeout").await, "30s");
        succeed(&mut stage.client().await, "SELECT 1").await;
        proxy.cut_after_bytes(Direction::ToServer, 0);
        let bytes = [build::query("INSERT INTO mark VALUES ('before')"), build::terminate()].concat();
        client.send(&bytes).await.unwrap();
        // The end of the stream is there when the statement has to queue up once more.
        drop(client);
        wait_until_async(SOON, async || stage.sql("SELECT count(*) FROM mark") == "1").await;
    });
}

#[test]
fn a_client_that_vanishes_while_its_settings_are_applied_is_noticed() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1")]);
    for vanish in Vanish::ALL {
        run(LIMIT, async {
            let mut client = stage.client_with(&[("options", "-c statement_timeout=30s")]).await;
            let mut other = stage.client().await;
            succeed(&mut other, "SELECT 1").await;
            proxy.black_hole(Direction::ToServer);
            client.send(&build::query("SELECT 1")).await.unwrap();
            // Long enough for pgweir to have read it.
            sleep(Duration::from_millis(200)).await;
            vanish.go(client);
            wait_until_async(SOON, async || (stage.metric("pgweir_process_clients") - 1.0).abs() < 0.5).await;
            proxy.heal();
            succeed(&mut other, "SELECT 1").await;
        });
    }
}

#[test]
fn a_query_timeout_does_not_hit_the_settings_that_are_applied_before_the_query() {
    let stage = Stage::new(&[("default_pool_size", "1"), ("query_timeout", "1s")]);
    let addr = stage.place.cluster.addr();
    stage.own_sql("CREATE TEXT SEARCH CONFIGURATION public.own (COPY = pg_catalog.simple)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client_with(&[("options", "-c default_text_search_config=public.own")]).await;
        succeed(&mut stage.client().await, "SELECT 1").await;
        // What the server connection has cached of the catalog is void, and it cannot be read again for a while.
        stage.sql("ALTER TEXT SEARCH CONFIGURATION public.own OWNER TO CURRENT_USER");
        let mut holder = Wire::open(addr, SUPERUSER, stage.name(), SUPERUSER_PASSWORD).await.unwrap();
        succeed(&mut holder, "BEGIN; LOCK TABLE pg_catalog.pg_ts_config").await;
        client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap();
        wait_until_async(SOON, async || !stage.pids("wait_event_type = 'Lock'").is_empty()).await;
        sleep(Duration::from_millis(1500)).await;
        succeed(&mut holder, "ROLLBACK").await;
        let outcome = client.outcome().await.unwrap();
        assert_eq!((outcome.sqlstate(), outcome.status), (QUERY_CANCELED, b'I'), "{outcome:?}");
        assert_eq!(value(&mut client, "SHOW default_text_search_config").await, "public.own");
    });
}

#[test]
fn what_was_sent_before_a_goodbye_is_answered_as_by_postgres() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    let sleep = "SELECT 1 FROM pg_sleep(0.05)";
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>); 6] = [
        ("one query",       build::query(sleep)),
        ("many",            build::query(sleep).repeat(5)),
        ("an error",        [build::query("SELECT 1/0"), build::query(sleep)].concat()),
        ("batches",         batch(sleep).repeat(5)),
        ("in a transaction", [build::query("BEGIN"), batch(sleep), build::query(sleep)].concat()),
        ("an open batch",   [batch(sleep), build::parse("", sleep, &[]), build::bind("", "", &[]), build::execute("", 0)].concat()),
    ];
    for (name, bytes) in table {
        run(LIMIT, async {
            let mut all = Vec::new();
            for client in [stage.client().await, stage.place.direct().await] {
                let mut client = client;
                client.send(&[bytes.clone(), build::terminate()].concat()).await.unwrap();
                all.push(format!("{:?}", read_to_end(&mut client).await.messages));
            }
            assert_eq!(all[0], all[1], "{name}");
            // The server connection is as good as before, and nothing of the transaction is left on it.
            assert_eq!(value(&mut stage.client().await, "SELECT now() = statement_timestamp()").await, "t", "{name}");
        });
    }
}

/// A table whose commits take as long as a latch is shut: a deferred trigger waits for it.
fn slow_commits(stage: &Stage<'_>) {
    stage.own_sql(&format!(
        "CREATE TABLE slow (how text); \
         CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM {}; RETURN NULL; END'; \
         CREATE CONSTRAINT TRIGGER doze AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED \
         FOR EACH ROW EXECUTE FUNCTION doze()",
        Latch::CALL
    ));
}

/// Long enough for pgweir to notice that a client is gone, and to cancel what it does if it were to.
const WHILE: Duration = Duration::from_millis(700);

#[test]
fn a_commit_that_was_sent_is_never_cancelled() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    slow_commits(&stage);
    let extended = [build::parse("", "COMMIT", &[]), build::bind("", "", &[]), build::execute("", 0), build::sync()];
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>); 6] = [
        ("commit",         build::query("COMMIT")),
        ("end",            build::query("end;")),
        ("comment",        build::query("/* now */ commit -- done")),
        ("extended",       extended.concat()),
        ("with a query",   build::query("SELECT 1; COMMIT")),
        ("a query before", [build::query("SELECT 1"), build::query("COMMIT")].concat()),
    ];
    for (name, bytes) in table {
        for vanish in Vanish::ALL {
            let how = format!("{name}, {vanish:?}");
            run(LIMIT, async {
                let mut client = stage.client().await;
                let latch = Latch::shut(&stage).await;
                succeed(&mut client, &format!("BEGIN; INSERT INTO slow VALUES ('{how}')")).await;
                client.send(&bytes).await.unwrap();
                // A reset may overtake bytes that were not read yet; then the COMMIT was never sent at all.
                wait_until_async(SOON, async || !stage.pids("wait_event_type = 'Lock'").is_empty()).await;
                vanish.go(client);
                sleep(WHILE).await;
                latch.open().await;
                wait_until_async(SOON, async || stage.pids("state <> 'idle'").is_empty()).await;
            });
            let count = stage.sql(&format!("SELECT count(*) FROM slow WHERE how = '{how}'"));
            assert_eq!(count, "1", "{how}");
        }
    }
}

#[test]
fn cancel_on_disconnect_always_cancels_after_a_goodbye_too() {
    let stage = Stage::new(&[("default_pool_size", "1"), ("cancel_on_disconnect", "always")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    slow_commits(&stage);
    run(LIMIT, async {
        let mut client = stage.client().await;
        client.send(&build::query("SELECT pg_sleep(60); INSERT INTO mark VALUES ('never')")).await.unwrap();
        wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
        client.terminate().await.unwrap();
        wait_until_async(promptly(&stage), async || !stage.is_running("pg_sleep")).await;
        let mut client = stage.client().await;
        succeed(&mut client, "BEGIN; INSERT INTO slow VALUES ('commit')").await;
        let latch = Latch::shut(&stage).await;
        client.send(&[build::query("COMMIT"), build::terminate()].concat()).await.unwrap();
        drop(client);
        sleep(WHILE).await;
        latch.open().await;
        wait_until_async(SOON, async || stage.sql("SELECT count(*) FROM slow") == "1").await;
    });
    assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
}

#[test]
fn what_was_sent_before_a_goodbye_has_no_more_time_than_query_timeout_either() {
    let stage = Stage::new(&[("default_pool_size", "1"), ("query_timeout", "3s")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    run(LIMIT, async {
        let mut client = stage.client().await;
        // Each takes far less, and all of them more.
        let many = build::query("SELECT pg_sleep(1.1)").repeat(3);
        let last = build::query("INSERT INTO mark VALUES ('all ran')");
        client.send(&[many, last, build::terminate()].concat()).await.unwrap();
        drop(client);
        wait_until_async(SOON, async || stage.sql("SELECT count(*) FROM mark") == "1").await;
        let mut client = stage.client().await;
        client.send(&[build::query("SELECT pg_sleep(600)"), build::terminate()].concat()).await.unwrap();
        drop(client);
        wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
        let mut next = stage.client().await;
        assert_eq!(value(&mut next, "SELECT 'next'").await, "next");
    });
    assert!(!stage.is_running("pg_sleep"));
}

#[test]
fn cancel_on_disconnect_never_lets_a_vanished_clients_query_run() {
    let stage = Stage::new(&[("default_pool_size", "1"), ("cancel_on_disconnect", "never")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    for vanish in Vanish::ALL {
        run(LIMIT, async {
            let mut client = stage.client().await;
            let latch = Latch::shut(&stage).await;
            let sql = format!("INSERT INTO mark {}", Latch::query(&format!("{vanish:?}")));
            client.send(&build::query(&sql)).await.unwrap();
            wait_until_async(SOON, async || stage.is_running(Latch::CALL)).await;
            vanish.go(client);
            sleep(WHILE).await;
            latch.open().await;
            let count = format!("SELECT count(*) FROM mark WHERE by = '{vanish:?}'");
            wait_until_async(SOON, async || stage.sql(&count) == "1").await;
        });
    }
}

/// Bytes that a client sent before it vanished in the middle of a message, and what must have been there before.
fn halves() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let cut = |bytes: Vec<u8>, at: usize| bytes[..at].to_vec();
    let big = build::query(&format!("INSERT INTO mark VALUES ('{}')", "x".repeat(1 << 20)));
    let copy = || build::query("COPY mark FROM STDIN");
    let row = build::copy_data(b"half\n");
    let big_row = build::copy_data(&[&b"y".repeat(1 << 20)[..], b"\n"].concat());
    let parse = build::parse("half", "INSERT INTO mark VALUES ('half')", &[]);
    let bind = build::bind("", "half", &[]);
    let begin = || build::query("BEGIN; INSERT INTO mark VALUES ('half')");
    #[rustfmt::skip]
    let table = vec![
        ("Query, its tag",                 vec![],  cut(build::query("INSERT INTO mark VALUES ('half')"), 1)),
        ("Query, its header",              vec![],  cut(build::query("INSERT INTO mark VALUES ('half')"), 5)),
        ("Query, all but the NUL",         vec![],  { let q = build::query("INSERT INTO mark VALUES ('half')"); let n = q.len() - 1; cut(q, n) }),
        ("large Query, half",              vec![],  cut(big.clone(), 700_000)),
        ("Query, half in a transaction",   begin(), cut(build::query("INSERT INTO mark VALUES ('half')"), 9)),
        ("large Query in a transaction",   begin(), cut(big, 700_000)),
        ("Parse, half",                    vec![],  cut(parse.clone(), 20)),
        ("Parse whole, Bind half",         vec![],  [parse.clone(), cut(bind.clone(), 7)].concat()),
        ("no Sync",                        vec![],  [parse, bind, build::execute("", 0)].concat()),
        ("CopyData, its header",           copy(),  cut(row.clone(), 5)),
        ("CopyData, half",                 copy(),  cut(row.clone(), 8)),
        ("CopyData, large, half",          copy(),  cut(big_row, 700_000)),
        ("CopyData whole, no CopyDone",    copy(),  row),
    ];
    table
}

#[test]
fn half_a_message_of_a_vanished_client_corrupts_nothing() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE mark (by text)");
    let watch = stage.place.cap_watch(1);
    for (name, before, half) in halves() {
        for vanish in Vanish::ALL {
            run(LIMIT, async {
                let mut client = stage.client().await;
                let copies = before.windows(4).any(|four| four == b"COPY");
                if !before.is_empty() {
                    client.send(&before).await.unwrap();
                    client.recv_until(if copies { b'G' } else { b'Z' }).await.unwrap();
                }
                client.send(&half).await.unwrap();
                // Long enough for pgweir to have read, and perhaps passed on, what it got.
                sleep(Duration::from_millis(50)).await;
                vanish.go(client);
                let mut next = stage.client().await;
                for counter in 0..3 {
                    assert_eq!(value(&mut next, &format!("SELECT 'tag {counter}'")).await, format!("tag {counter}"));
                    let outcome = next.extended("SELECT $1::text", &[Some("param")]).await.unwrap();
                    assert_eq!(outcome.value(), Some("param"), "{name}, {vanish:?}: {outcome:?}");
                }
                assert_eq!(stage.backends().len(), 1, "{name}, {vanish:?}");
            });
            assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0", "{name}, {vanish:?}");
        }
    }
    assert_eq!(watch.finish(), 1);
}

#[test]
fn a_server_connection_is_not_lent_on_while_a_cancel_is_under_way() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1"), ("cancel_wait_timeout", "20s")]);
    run(Duration::from_mins(1), async {
        let mut first = stage.client().await;
        let mut second = stage.client().await;
        for round in 0..5 {
            let latch = Latch::shut(&stage).await;
            first.send(&build::query(&Latch::query("first"))).await.unwrap();
            wait_until_async(SOON, async || stage.is_running(Latch::CALL)).await;
            second.send(&build::query(&format!("SELECT {round} FROM pg_sleep(0.5)"))).await.unwrap();
            // From here on nothing reaches the server: neither the cancel nor, if it were sent, the second query.
            proxy.black_hole(Direction::ToServer);
            let before = proxy.accepted();
            let (addr, pid, secret) = (stage.addr(), first.pid, first.secret.clone());
            let canceller = spawn_local(async move { cancel(addr, pid, &secret).await });
            wait_until_async(SOON, async || proxy.accepted() > before).await;
            latch.open().await;
            assert_eq!(first.outcome().await.unwrap().value(), Some("first"), "round {round}");
            sleep(Duration::from_millis(200)).await;
            // Both, if both were sent, now arrive at once, and the cancel would find the second query.
            proxy.heal();
            let outcome = second.outcome().await.unwrap();
            assert_eq!(outcome.value(), Some(round.to_string().as_str()), "round {round}: {outcome:?}");
            let _ = canceller.await.unwrap();
        }
    });
}

#[test]
fn a_cancel_that_never_ends_is_given_up_after_cancel_wait_timeout() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1"), ("cancel_wait_timeout", "500ms")]);
    run(Duration::from_mins(1), async {
        let mut first = stage.client().await;
        let mut second = stage.client().await;
        let latch = Latch::shut(&stage).await;
        first.send(&build::query(&Latch::query("first"))).await.unwrap();
        wait_until_async(SOON, async || stage.is_running(Latch::CALL)).await;
        second.send(&build::query("SELECT 'second' FROM pg_sleep(0.2)")).await.unwrap();
        // The cancel hangs on its way, and might still arrive after pgweir has given it up.
        proxy.black_hole(Direction::ToServer);
        let before = proxy.accepted();
        let (addr, pid, secret) = (stage.addr(), first.pid, first.secret.clone());
        let canceller = spawn_local(async move { cancel(addr, pid, &secret).await });
        wait_until_async(SOON, async || proxy.accepted() > before).await;
        latch.open().await;
        assert_eq!(first.outcome().await.unwrap().value(), Some("first"));
        sleep(Duration::from_millis(1500)).await;
        proxy.heal();
        let outcome = second.outcome().await.unwrap();
        assert_eq!(outcome.value(), Some("second"), "{outcome:?}");
        let _ = canceller.await.unwrap();
        assert_eq!(value(&mut first, "SELECT 'on'").await, "on");
    });
}

#[test]
fn many_cancels_at_once_do_not_keep_clients_from_logging_in() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let mut victim = stage.client().await;
        let (pid, secret, addr) = (victim.pid, victim.secret.clone(), stage.addr());
        victim.send(&build::query("SELECT pg_sleep(30)")).await.unwrap();
        wait_until_async(SOON, async || stage.is_running("pg_sleep")).await;
        let storm: Vec<_> = (0..200)
            .map(|_| {
                let secret = secret.clone();
                spawn_local(async move { cancel(addr, pid, &secret).await })
            })
            .collect();
        let start = Instant::now();
        let mut other = stage.client().await;
        assert_eq!(value(&mut other, "SELECT 'in'").await, "in");
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        for task in storm {
            task.await.unwrap().unwrap();
        }
        assert_eq!(victim.outcome().await.unwrap().sqlstate(), QUERY_CANCELED);
        fail(&mut victim, "SELECT 1/0", "22012", b'I').await;
        victim.send(&build::terminate()).await.unwrap();
        assert!(read_to_end(&mut victim).await.messages.is_empty());
    });
}

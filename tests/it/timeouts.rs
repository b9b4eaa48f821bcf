//! What a client may not do for too long: be idle, be idle in a transaction, run a query or a transaction; for all users
//! and for one. Whoever keeps to it is left alone; a server that does not is given up.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgweir_harness::wire::{Wire, build};
use pgweir_harness::{Direction, wait_until, wait_until_async};
use tokio::time::sleep;

use crate::stage::{SOON, Stage, fail, read_to_end, run, succeed, value};
use crate::support::PASSWORD;

/// Limits in time are exact to pgweir's tick.
const TICK: Duration = Duration::from_millis(100);

/// The name of a stage's own user.
const PLACE: &str = "";

/// What a client does for too long.
#[derive(Clone, Copy, Debug)]
enum Doing {
    Idle,
    IdleInTransaction,
    Query,
    Transaction,
}

impl Doing {
    /// Does it until there is an error. Its SQLSTATE, and whether the client stays.
    async fn until_told(self, client: &mut Wire) -> (String, bool) {
        match self {
            Self::Idle => {}
            Self::IdleInTransaction => drop(succeed(client, "BEGIN; INSERT INTO mark VALUES (1)").await),
            Self::Query => client.send(&build::query("SELECT pg_sleep(60)")).await.unwrap(),
            Self::Transaction => {
                succeed(client, "BEGIN; INSERT INTO mark VALUES (1)").await;
                client.send(&build::query("SELECT pg_sleep(0.1)")).await.unwrap();
            }
        }
        loop {
            let message = client.recv().await.unwrap();
            if message.tag == b'E' {
                let code = message.server_error().unwrap().sqlstate().to_owned();
                return (code, matches!(client.recv().await, Ok(next) if next.tag == b'Z'));
            }
            if message.tag == b'Z' {
                client.send(&build::query("SELECT pg_sleep(0.1)")).await.unwrap();
            }
        }
    }
}

/// A client that has logged in as this user, whose server connections are the place's.
async fn client_of(stage: &Stage<'_>, user: &str) -> Wire {
    let user = if user == PLACE { stage.name() } else { user };
    Wire::open(stage.addr(), user, stage.name(), PASSWORD).await.unwrap()
}

/// Each client does what it should not, all at once, and is told so, not before its time.
async fn expect_told(stage: &Stage<'_>, table: &[(&str, Doing, &str, bool, Duration)]) {
    let all = table.iter().map(async |(user, doing, code, stays, limit)| {
        let mut client = client_of(stage, user).await;
        let start = Instant::now();
        let told = doing.until_told(&mut client).await;
        let (took, how) = (start.elapsed(), format!("{user} {doing:?}"));
        assert_eq!(told, ((*code).to_owned(), *stays), "{how}, after {took:?}");
        assert!(took + TICK > *limit && took < SOON, "{how}: {took:?}");
        if *stays {
            assert_eq!(value(&mut client, "SELECT 'on'").await, "on", "{how}");
        }
    });
    join_all(all).await;
    let count = u32::try_from(table.len()).unwrap();
    // What they did is undone, and the server connections are as good as before.
    wait_until_async(SOON, async || stage.pids("state <> 'idle'").is_empty()).await;
    assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
    assert_eq!(value(&mut client_of(stage, PLACE).await, "SELECT 'next'").await, "next");
    wait_until_async(SOON, async || stage.metric("pgweir_errors_total") > f64::from(count) - 0.5).await;
    assert!(stage.metric("pgweir_server_discards_total") < 0.5);
}

#[test]
fn each_limit_ends_what_takes_too_long_and_a_users_own_one_stands_in_its_place() {
    let stage = Stage::new(&[
        ("default_pool_size", "8"),
        ("client_idle_timeout", "1500ms"),
        ("idle_transaction_timeout", "1s"),
        ("query_timeout", "1s"),
        ("transaction_timeout", "4s"),
        ("users.slow.password", PASSWORD),
        ("users.slow.idle_transaction_timeout", "60s"),
        ("users.slow.query_timeout", "60s"),
        ("users.zero.password", PASSWORD),
        ("users.zero.idle_transaction_timeout", "0"),
        ("users.zero.query_timeout", "0"),
    ]);
    stage.own_sql("CREATE TABLE mark (n int)");
    let second = Duration::from_secs(1);
    #[rustfmt::skip]
    let table = [
        (PLACE,  Doing::Idle,              "57P05", false, second * 3 / 2),
        (PLACE,  Doing::IdleInTransaction, "25P03", false, second),
        (PLACE,  Doing::Query,             "57014", true,  second),
        (PLACE,  Doing::Transaction,       "25P04", false, second * 4),
        // As with PgBouncer, 0 is no limit of one's own.
        ("zero", Doing::IdleInTransaction, "25P03", false, second),
        ("zero", Doing::Query,             "57014", true,  second),
        ("slow", Doing::IdleInTransaction, "25P04", false, second * 4),
        ("slow", Doing::Query,             "25P04", false, second * 4),
    ];
    run(Duration::from_mins(1), expect_told(&stage, &table));
}

#[test]
fn a_limit_of_one_user_is_nobody_elses() {
    let stage = Stage::new(&[
        ("default_pool_size", "4"),
        ("users.quick.password", PASSWORD),
        ("users.quick.idle_transaction_timeout", "1s"),
        ("users.quick.query_timeout", "1s"),
    ]);
    stage.own_sql("CREATE TABLE mark (n int)");
    run(Duration::from_mins(1), async {
        let (mut idle, mut busy) = (stage.client().await, stage.client().await);
        succeed(&mut idle, "BEGIN").await;
        busy.send(&build::query("SELECT 'whole' FROM pg_sleep(3)")).await.unwrap();
        let limit = Duration::from_secs(1);
        let table =
            [("quick", Doing::IdleInTransaction, "25P03", false, limit), ("quick", Doing::Query, "57014", true, limit)];
        let others = async {
            assert_eq!(busy.outcome().await.unwrap().value(), Some("whole"));
            assert_eq!(succeed(&mut idle, "COMMIT").await.tags, ["COMMIT"]);
        };
        tokio::join!(expect_told(&stage, &table), others);
    });
}

/// What stops in the middle: what was sent before and its last answer, and the bytes of which no more follow.
fn stops() -> Vec<(&'static str, Vec<u8>, u8, Vec<u8>)> {
    let cut = |bytes: Vec<u8>, at: usize| bytes[..at].to_vec();
    let mut big = build::query(&format!("INSERT INTO mark VALUES (length('{}'))", "x".repeat(1 << 20)));
    big.truncate(700_000);
    let copy = || build::query("COPY mark FROM STDIN");
    let parse = || build::parse("half", "INSERT INTO mark VALUES (2)", &[]);
    let bind = || build::bind("", "half", &[]);
    // Without a Flush, Postgres keeps the answers to itself.
    let unflushed = [parse(), bind(), build::execute("", 0)].concat();
    let big_row = [&b"1".repeat(1 << 20)[..], b"\n"].concat();
    #[rustfmt::skip]
    let table = vec![
        ("large Query, half",         vec![],                                  0,    big),
        ("Bind, half",                vec![],                                  0,    [parse(), cut(bind(), 7)].concat()),
        ("Parse without Sync",        vec![],                                  0,    [parse(), bind()].concat()),
        ("Execute without Sync",      [&unflushed[..], &build::flush()].concat(), b'C', vec![]),
        ("Execute without Flush",     vec![],                                  0,    unflushed.clone()),
        ("Execute, then Bind, half",  vec![],                                  0,    [&unflushed[..], &cut(bind(), 7)].concat()),
        ("an error without Sync",     [build::parse("", "no", &[]), build::flush()].concat(), b'E', vec![]),
        ("COPY without data",         copy(),                                  b'G', vec![]),
        ("CopyData, half",            copy(),                                  b'G', cut(build::copy_data(b"1\n"), 6)),
        ("large CopyData, half",      copy(),                                  b'G', cut(build::copy_data(&big_row), 700_000)),
        ("CopyData whole",            copy(),                                  b'G', build::copy_data(b"1\n")),
    ];
    table
}

#[test]
fn who_stops_in_the_middle_of_what_it_sends_is_idle_in_a_transaction() {
    for mode in ["transaction", "session"] {
        expect_stopped(mode);
    }
}

fn expect_stopped(mode: &str) {
    let limit = ("idle_transaction_timeout", "1500ms");
    let stage = Stage::new(&[("default_pool_size", "11"), ("pool_mode", mode), limit]);
    stage.own_sql("CREATE TABLE mark (n int)");
    run(Duration::from_mins(1), async {
        let all = stops().into_iter().map(async |(name, before, answer, bytes)| {
            let mut client = stage.client().await;
            let start = Instant::now();
            if !before.is_empty() {
                client.send(&before).await.unwrap();
                client.recv_until(answer).await.unwrap();
            }
            client.send(&bytes).await.unwrap();
            assert_eq!(read_to_end(&mut client).await.sqlstate(), "25P03", "{name} ({mode})");
            let took = start.elapsed();
            assert!(took + TICK > Duration::from_millis(1500) && took < SOON, "{name} ({mode}): {took:?}");
        });
        join_all(all).await;
        wait_until_async(SOON, async || stage.pids("state <> 'idle'").is_empty()).await;
        assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
        assert_eq!(value(&mut stage.client().await, "SELECT 'next'").await, "next");
    });
}

#[test]
fn who_sends_little_by_little_or_waits_for_the_server_has_not_stopped() {
    // Each pause is far shorter, and all of them together are longer.
    let stage = Stage::new(&[("default_pool_size", "3"), ("idle_transaction_timeout", "2s")]);
    stage.own_sql("CREATE TABLE mark (n int)");
    run(Duration::from_mins(1), async {
        let (mut writer, mut waiter, mut stepper) = (stage.client().await, stage.client().await, stage.client().await);
        let copies = async {
            writer.send(&build::query("COPY mark FROM STDIN")).await.unwrap();
            writer.recv_until(b'G').await.unwrap();
            for _ in 0..10 {
                writer.send(&build::copy_data(b"1\n")).await.unwrap();
                sleep(Duration::from_millis(400)).await;
            }
            writer.send(&build::copy_done()).await.unwrap();
            assert_eq!(writer.outcome().await.unwrap().tags, ["COPY 10"]);
        };
        let waits = async {
            let parse = build::parse("", "SELECT 'slept' FROM pg_sleep(4)", &[]);
            let all = [parse, build::bind("", "", &[]), build::execute("", 0), build::flush()].concat();
            waiter.send(&all).await.unwrap();
            waiter.recv_until(b'C').await.unwrap();
            waiter.send(&build::sync()).await.unwrap();
            waiter.recv_until(b'Z').await.unwrap();
        };
        let steps = async {
            stepper.send(&[build::parse("s", "SELECT 1", &[]), build::flush()].concat()).await.unwrap();
            stepper.recv_until(b'1').await.unwrap();
            for _ in 0..10 {
                sleep(Duration::from_millis(400)).await;
                let step = [build::bind("", "s", &[]), build::execute("", 0), build::flush()].concat();
                stepper.send(&step).await.unwrap();
                stepper.recv_until(b'C').await.unwrap();
            }
            stepper.send(&build::sync()).await.unwrap();
            stepper.recv_until(b'Z').await.unwrap();
        };
        tokio::join!(copies, waits, steps);
    });
}

/// Everything that is limited, again and again, but none of it for long.
async fn work(client: &mut Wire, until: Instant) {
    let pause = Duration::from_millis(400);
    while Instant::now() < until {
        sleep(pause).await;
        succeed(client, "SELECT pg_sleep(0.4)").await;
        succeed(client, "BEGIN").await;
        sleep(pause).await;
        succeed(client, "SELECT pg_sleep(0.4)").await;
        succeed(client, "COMMIT").await;
    }
}

/// Is busy in a transaction until that has lasted for 3 s.
async fn expect_transaction_limit(client: &mut Wire) {
    let start = Instant::now();
    let told = Doing::Transaction.until_told(client).await;
    assert_eq!(told, ("25P04".to_owned(), false));
    assert!(start.elapsed() + TICK > Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn whoever_keeps_within_the_limits_is_left_alone_however_long_it_has_its_server_connection() {
    let stage = Stage::new(&[
        ("default_pool_size", "4"),
        ("client_idle_timeout", "3s"),
        ("idle_transaction_timeout", "3s"),
        ("query_timeout", "3s"),
        ("transaction_timeout", "3s"),
        ("users.keeper.password", PASSWORD),
        ("users.keeper.pool_mode", "session"),
    ]);
    stage.own_sql("CREATE TABLE mark (n int)");
    run(Duration::from_mins(1), async {
        let (mut client, mut pinned) = (stage.client().await, stage.client().await);
        let mut keeper = client_of(&stage, "keeper").await;
        succeed(&mut pinned, "SELECT pg_advisory_lock(1)").await;
        let until = Instant::now() + Duration::from_secs(7);
        tokio::join!(work(&mut client, until), work(&mut pinned, until), work(&mut keeper, until));
        // For all that, each of their transactions has its limit.
        tokio::join!(expect_transaction_limit(&mut pinned), expect_transaction_limit(&mut keeper));
    });
}

#[test]
fn of_a_pipeline_each_query_has_its_time() {
    const CLIENTS: u32 = 8;
    const ROUNDS: u32 = 3;
    let stage = Stage::new(&[("default_pool_size", &CLIENTS.to_string()), ("query_timeout", "1500ms")]);
    let sleep = |seconds: f64| build::query(&format!("SELECT 'slept' FROM pg_sleep({seconds})"));
    let nap = || sleep(0.7);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        client.send(&nap().repeat(4)).await.unwrap();
        for _ in 0..4 {
            assert_eq!(client.outcome().await.unwrap().value(), Some("slept"));
        }
        let plays = (0..CLIENTS).map(async |_| {
            let (mut client, mut hits) = (stage.client().await, 0);
            for _ in 0..ROUNDS {
                client.send(&[nap(), sleep(60.0), sleep(0.2), nap()].concat()).await.unwrap();
                assert_eq!(client.outcome().await.unwrap().value(), Some("slept"));
                assert_eq!(client.outcome().await.unwrap().sqlstate(), "57014");
                let behind = client.outcome().await.unwrap();
                assert!(behind.value() == Some("slept") || behind.sqlstate() == "57014", "{behind:?}");
                hits += u32::from(behind.error.is_some());
                assert_eq!(client.outcome().await.unwrap().value(), Some("slept"));
            }
            hits
        });
        // Of one request a server up to 17 makes two signals, one at once behind the other: the second one may hit the query behind, more
        // often the busier the machine is, and none that comes later.
        // Source: signal_child in postmaster.c.
        let hits: u32 = join_all(plays).await.into_iter().sum();
        println!("{hits} of {} hit the query behind", CLIENTS * ROUNDS);
        assert!(hits <= CLIENTS * ROUNDS * 3 / 4, "{hits} of {} hit the query behind", CLIENTS * ROUNDS);
    });
}

#[test]
fn neither_who_waits_nor_who_is_in_a_transaction_is_idle() {
    let stage = Stage::new(&[("default_pool_size", "1"), ("client_idle_timeout", "1s"), ("query_timeout", "1s")]);
    run(Duration::from_mins(1), async {
        let (mut holder, mut waiter) = (stage.client().await, stage.client().await);
        succeed(&mut holder, "BEGIN").await;
        waiter.send(&build::query("SELECT 'served'")).await.unwrap();
        assert!(holder.recv_within(Duration::from_millis(2500)).await.unwrap().is_none());
        succeed(&mut holder, "COMMIT").await;
        assert_eq!(waiter.outcome().await.unwrap().value(), Some("served"));
        for mut client in [holder, waiter] {
            assert_eq!(read_to_end(&mut client).await.sqlstate(), "57P05");
        }
    });
}

/// A query is cancelled after 1 s, and its server connection given up 5.1 s later.
const SHORT: [(&str, &str); 2] = [("query_timeout", "1s"), ("cancel_wait_timeout", "100ms")];

/// Waits until the only server connection has been idle for three times the limit of [`IDLE`]: it must still be this one.
fn outlasts(stage: &Stage<'_>, pid: &str, what: &str) {
    let longer = "state = 'idle' AND clock_timestamp() - state_change > interval '900ms'";
    wait_until(SOON, || {
        let pids = stage.backends();
        assert_eq!(pids.iter().map(i32::to_string).collect::<Vec<_>>(), [pid], "{what}");
        !stage.pids(longer).is_empty()
    });
}

const IDLE: (&str, &str) = ("idle_session_timeout", "300ms");

#[test]
fn a_clients_idle_session_timeout_ends_no_server_connection_that_nobody_has() {
    const SHOW: &str = "SHOW idle_session_timeout";
    let stage = Stage::new(&[("default_pool_size", "1")]);
    run(3 * SOON, async {
        let mut other = stage.client().await;
        let pid = value(&mut other, "SELECT pg_backend_pid()").await;
        let mut started = stage.client_with(&[IDLE]).await;
        outlasts(&stage, &pid, "logged in with it");
        for _ in 0..2 {
            assert_eq!(value(&mut started, SHOW).await, "300ms");
            outlasts(&stage, &pid, "used");
        }
        let mut client = stage.client().await;
        for set in ["SET idle_session_timeout = '300ms'", "SELECT set_config('idle_session_timeout', '300', false)"] {
            succeed(&mut client, set).await;
            outlasts(&stage, &pid, set);
            assert_eq!(value(&mut client, SHOW).await, "300ms");
            outlasts(&stage, &pid, set);
        }
        for _ in 0..20 {
            assert_eq!(value(&mut client, SHOW).await, "300ms");
            assert_eq!(value(&mut other, SHOW).await, "0");
            assert_eq!(value(&mut started, SHOW).await, "300ms");
        }
        // Who keeps its server connection is ended by its own limit.
        client.send(&build::query("SELECT pg_advisory_lock(1)")).await.unwrap();
        assert_eq!(read_to_end(&mut client).await.sqlstate(), "57P05");
        assert_eq!(value(&mut other, SHOW).await, "0");
    });
}

#[test]
fn a_query_that_the_server_never_answers_ends_with_the_loss_of_its_server_connection() {
    let own = [("default_pool_size", "3"), ("users.keeper.password", PASSWORD), ("users.keeper.pool_mode", "session")];
    let (stage, proxy) = Stage::behind_proxy(&[&SHORT[..], &own].concat());
    stage.own_sql("CREATE TABLE mark (n int)");
    let watch = stage.place.cap_watch(4);
    run(Duration::from_mins(2), async {
        let (mut lone, mut constant) = (stage.client().await, stage.client().await);
        let (mut open, mut keeper) = (stage.client().await, client_of(&stage, "keeper").await);
        // All at once, so that there is a server connection for each.
        let mut clients = [&mut lone, &mut constant, &mut open, &mut keeper];
        for client in &mut clients {
            client.set_patience(2 * SOON);
            client.send(&build::query("BEGIN; INSERT INTO mark SELECT 1 FROM pg_sleep(0.1)")).await.unwrap();
        }
        for client in &mut clients {
            assert_eq!(client.outcome().await.unwrap().error, None);
        }
        for client in [&mut lone, &mut constant] {
            succeed(client, "ROLLBACK").await;
        }
        proxy.black_hole(Direction::ToServer);
        proxy.black_hole(Direction::ToClient);
        let start = Instant::now();
        lone.send(&build::query("SELECT count(*) FROM mark")).await.unwrap();
        // But for the limit, this would be sent once more.
        constant.send(&build::query("SELECT 1")).await.unwrap();
        open.send(&build::query("SELECT 2")).await.unwrap();
        keeper.send(&build::query("SELECT 3")).await.unwrap();
        for (client, status) in [(&mut lone, b'I'), (&mut constant, b'I'), (&mut open, b'E')] {
            let outcome = client.outcome().await.unwrap();
            assert_eq!((outcome.sqlstate(), outcome.status), ("08006", status), "{outcome:?}");
            assert!(outcome.error.unwrap().field(b'D').unwrap().contains("query_timeout"));
        }
        // What it kept there is lost with it.
        assert_eq!(read_to_end(&mut keeper).await.sqlstate(), "57P01");
        assert!(start.elapsed() > Duration::from_secs(6), "{:?}", start.elapsed());
        assert_eq!(succeed(&mut open, "ROLLBACK").await.tags, ["ROLLBACK"]);
        proxy.heal();
        for client in [&mut lone, &mut constant, &mut open] {
            assert_eq!(value(client, "SELECT 'on'").await, "on");
        }
    });
    wait_until(SOON, || stage.pids("state <> 'idle'").is_empty());
    assert_eq!(stage.sql("SELECT count(*) FROM mark"), "0");
    watch.finish();
}

#[test]
fn a_query_that_waits_for_its_settings_on_a_server_that_never_answers_gets_another_server_connection() {
    let (stage, proxy) = Stage::behind_proxy(&[&SHORT[..], &[("default_pool_size", "1")]].concat());
    let watch = stage.place.cap_watch(1);
    run(Duration::from_mins(1), async {
        let mut client = stage.client_with(&[("options", "-c statement_timeout=30s")]).await;
        client.set_patience(2 * SOON);
        succeed(&mut stage.client().await, "SELECT 1").await;
        proxy.black_hole(Direction::ToServer);
        client.send(&build::query("SHOW statement_timeout")).await.unwrap();
        wait_until_async(SOON, async || stage.metric("pgweir_server_discards_total") > 0.5).await;
        assert!(client.recv_within(TICK).await.unwrap().is_none(), "nothing of it was sent");
        proxy.heal();
        assert_eq!(client.outcome().await.unwrap().value(), Some("30s"));
    });
    watch.finish();
}

#[test]
fn a_server_that_heeds_no_cancel_is_given_up_and_counts_until_it_has_ended() {
    let stage = Stage::new(&[&SHORT[..], &[("default_pool_size", "1")]].concat());
    stage.own_sql(
        "CREATE FUNCTION deaf() RETURNS void LANGUAGE plpgsql AS $$BEGIN \
         WHILE clock_timestamp() < now() + '9s' LOOP \
         BEGIN PERFORM pg_sleep(2); EXCEPTION WHEN query_canceled THEN NULL; END; \
         END LOOP; END$$",
    );
    let watch = stage.place.cap_watch(1);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        client.set_patience(2 * SOON);
        fail(&mut client, "SELECT deaf()", "08006", b'I').await;
        assert!(stage.is_running("SELECT deaf"), "it was given up too late");
        assert_eq!(value(&mut client, "SELECT 'on'").await, "on");
        assert!(!stage.is_running("SELECT deaf"));
    });
    watch.finish();
}

//! Clients that listen share one server connection: who is told what, in which order, and what becomes of it when that
//! connection, a client or the room for it is gone. (What single statements do is in `tests/scripts/notify.script`.)

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use pgweir_harness::wire::{Message, Outcome, Wire, build};
use pgweir_harness::{Cluster, ClusterOptions, Direction, wait_until};

use crate::stage::{Dice, SOON, Stage, read_to_end, run, succeed, value};
use crate::support::{self, PASSWORD};

/// Reads up to the next notification: sender, channel, payload; and the warnings before it.
async fn heard(wire: &mut Wire) -> ((i32, String, String), Vec<String>) {
    let mut warnings = Vec::new();
    loop {
        let message = wire.recv().await.unwrap();
        if let Some(notification) = message.notification() {
            return (notification, warnings);
        }
        let warning = message.server_error().unwrap_or_else(|| panic!("{message:?}"));
        assert_eq!(warning.severity(), "WARNING", "{warning}");
        warnings.push(warning.message().to_owned());
    }
}

async fn payload(wire: &mut Wire) -> String {
    heard(wire).await.0.2
}

/// The payload of the next notification, if one comes in time.
async fn payload_within(wire: &mut Wire, within: Duration) -> Option<String> {
    while let Some(message) = wire.recv_within(within).await.unwrap() {
        if let Some((_, _, payload)) = message.notification() {
            return Some(payload);
        }
    }
    None
}

/// The backends that listened for clients, the last one last.
fn hubs(stage: &Stage<'_>) -> Vec<i32> {
    let log = stage.pgweir.log();
    let lines = log.lines().filter(|line| line.contains("this server connection listens for"));
    let pid = |line: &str| {
        let digits = line.split("server_pid").nth(1)?.trim_start_matches(|c: char| !c.is_ascii_digit());
        digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    lines.map(|line| pid(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

fn clients_active(stage: &Stage<'_>) -> f64 {
    let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
    support::metric_in(&body, "pgweir_clients", &["state=\"active\""])
}

fn is_there(stage: &Stage<'_>, pid: i32) -> bool {
    stage.backends().contains(&pid)
}

fn nobody_is_pinned(stage: &Stage<'_>) {
    wait_until(SOON, || stage.metric("pgweir_servers_pinned") < 0.5);
}

/// Waits until the hub has taken over what a client listens to: it gives its server connection back.
fn is_released(stage: &Stage<'_>, hub: usize) {
    wait_until(SOON, || hubs(stage).len() >= hub);
    wait_until(SOON, || clients_active(stage) < 0.5);
    nobody_is_pinned(stage);
}

#[test]
fn two_thousand_clients_listen_on_one_server_connection() {
    const CLIENTS: usize = 2000;
    // What so many ask for at once takes its time on a busy machine.
    let settings = [("default_pool_size", "3"), ("max_client_conn", "3000"), ("query_wait_timeout", "4min")];
    let stage = Stage::new(&settings);
    run(Duration::from_mins(5), async {
        let mut clients = Vec::new();
        for number in 0..CLIENTS {
            let mut client = stage.client().await;
            client.set_patience(Duration::from_mins(4));
            client.send(&build::query(&format!("LISTEN everyone; LISTEN own{number}"))).await.unwrap();
            clients.push(client);
        }
        for client in &mut clients {
            assert_eq!(client.outcome().await.unwrap().error, None);
        }
        let mut sender = stage.client().await;
        succeed(&mut sender, "NOTIFY everyone, 'all'").await;
        for (number, client) in clients.iter_mut().enumerate() {
            assert_eq!(payload(client).await, "all", "client {number}");
        }
        for number in (0..CLIENTS).step_by(97) {
            succeed(&mut sender, &format!("NOTIFY own{number}, 'one'")).await;
            let ((_, channel, payload), _) = heard(&mut clients[number]).await;
            assert_eq!((channel, payload), (format!("own{number}"), "one".to_owned()));
        }
        is_released(&stage, 1);
        assert!(stage.backends().len() <= 3, "{:?}", stage.backends());
        let hub = hubs(&stage)[0];
        // Who unlistens is told no more, and everybody else is.
        for client in clients.iter_mut().step_by(100) {
            succeed(client, "UNLISTEN everyone").await;
        }
        succeed(&mut sender, "NOTIFY everyone, 'most'").await;
        for (number, client) in clients.iter_mut().enumerate() {
            if number % 100 == 0 {
                succeed(&mut sender, &format!("NOTIFY own{number}, 'after'")).await;
                assert_eq!(payload(client).await, "after", "client {number}");
            } else {
                assert_eq!(payload(client).await, "most", "client {number}");
            }
        }
        assert_eq!(hubs(&stage), [hub], "it was the same all the time");
        assert!(is_there(&stage, hub));
        // It goes with the last of them.
        drop(clients);
        wait_until(SOON, || !is_there(&stage, hub));
        assert_eq!(value(&mut sender, "SELECT 1").await, "1");
    });
}

/// One client notifies all the time, on two channels. Others listen and unlisten, and do other things between and meanwhile:
/// from the moment at which LISTEN is answered to that at which UNLISTEN is sent, each hears everything once, and in order but
/// for the one case that is documented;
/// and so of the other channel, which they leave and listen to again, and nothing of it that was sent outside of that.
#[test]
fn whoever_listens_hears_everything_from_then_on_once_and_in_order() {
    let stage = Stage::new(&[("default_pool_size", "4")]);
    let seed = Dice::seed("whoever_listens_hears_everything");
    let sent = Rc::new(Cell::new(0_u64));
    let done = Rc::new(Cell::new(false));
    run(Duration::from_mins(2), async {
        let mut sender = stage.client().await;
        let (counter, over) = (sent.clone(), done.clone());
        let sending = tokio::task::spawn_local(async move {
            while !over.get() {
                let next = counter.get() + 1;
                succeed(&mut sender, &format!("NOTIFY numbers, '{next}'; NOTIFY side, '{next}'")).await;
                counter.set(next);
            }
        });
        let mut listening = Vec::new();
        for number in 0..6 {
            let (mut client, sent, mut dice) = (stage.client().await, sent.clone(), Dice::new(seed ^ number));
            listening.push(tokio::task::spawn_local(async move {
                let mut heard = 0;
                for round in 0..12 {
                    heard +=
                        listen_for_a_while(&mut client, &sent, &mut dice, &format!("client {number}, round {round}"))
                            .await;
                }
                heard
            }));
        }
        let mut heard = 0;
        for listener in listening {
            heard += listener.await.unwrap();
        }
        done.set(true);
        sending.await.unwrap();
        println!("{} sent, {heard} heard", sent.get());
        assert!(heard > 100);
        nobody_is_pinned(&stage);
    });
}

fn batch(sql: &str) -> Vec<u8> {
    [build::parse("", sql, &[]), build::bind("", "", &[]), build::execute("", 0), build::sync()].concat()
}

/// What a client was told.
#[derive(Default)]
struct Told {
    /// On the channel `numbers`.
    numbers: Vec<u64>,
    /// While it listens to the channel `side`.
    side: Option<Side>,
}

/// What a client was told of the channel that it leaves and listens to again.
#[derive(Debug)]
struct Side {
    /// Only what is above this may come,
    above: u64,
    /// and what was sent later than this has to.
    from: u64,
    heard: Vec<u64>,
}

impl Told {
    fn note(&mut self, messages: &[Message], place: &str) {
        for (_, channel, number) in messages.iter().filter_map(Message::notification) {
            let number = number.parse().unwrap();
            if channel == "numbers" {
                self.numbers.push(number);
            } else {
                let Some(side) = &mut self.side else { panic!("{place}: {number} behind UNLISTEN side") };
                assert!(number > side.above, "{place}: {number} on side: {side:?}");
                assert!(!side.heard.contains(&number), "{place}: {number} on side once more: {side:?}");
                side.heard.push(number);
            }
        }
    }

    /// Runs what may begin or end that the client listens to `side`.
    async fn run(&mut self, client: &mut Wire, bytes: &[u8], sql: &str, sent: &Cell<u64>, place: &str) {
        let begins = sql == "LISTEN side" && self.side.is_none();
        if begins {
            self.side = Some(Side { above: sent.get(), from: u64::MAX, heard: Vec::new() });
        }
        client.send(bytes).await.unwrap();
        self.note(&client.recv_until_ready().await.unwrap(), place);
        if let Some(side) = self.side.as_mut().filter(|_| begins) {
            side.from = sent.get();
        }
        if sql == "UNLISTEN side" {
            self.side = None;
        }
    }

    /// Whether all has come that was sent up to this, and had to.
    fn is_whole(&self, from: u64, until: u64) -> bool {
        let side = self.side.as_ref().is_none_or(|side| is_whole(&side.heard, side.from, until));
        side && is_whole(&self.numbers, from, until)
    }
}

/// Whether all of this was heard. One was on its way when LISTEN was answered, and may have been there before.
fn is_whole(heard: &[u64], from: u64, until: u64) -> bool {
    (from + 2..=until).all(|number| heard.contains(&number))
}

/// Returns how much was heard.
async fn listen_for_a_while(client: &mut Wire, sent: &Cell<u64>, dice: &mut Dice, place: &str) -> usize {
    let mut told = Told::default();
    let listen = dice.pick(&["LISTEN numbers", "BEGIN; LISTEN numbers; COMMIT", "SELECT 1; LISTEN numbers"]);
    told.run(client, &build::query(listen), listen, sent, place).await;
    let from = sent.get();
    let (mut steps, enough) = (dice.below(6), from + dice.below(30));
    while steps > 0 || sent.get() < enough {
        steps = steps.saturating_sub(1);
        let sql = *dice.pick(&[
            "SELECT 1",
            "SELECT count(*) FROM pg_listening_channels()",
            "BEGIN; SELECT 1; COMMIT",
            "BEGIN; UNLISTEN numbers; ROLLBACK",
            "SET work_mem = '1MB'",
            "LISTEN side",
            "UNLISTEN side",
            "",
        ]);
        if sql.is_empty() {
            // Idle: what comes, comes.
            if let Some(message) = client.recv_within(Duration::from_millis(dice.below(20))).await.unwrap() {
                told.note(&[message], place);
            }
        } else if dice.once_in(3) {
            told.run(client, &batch(sql.split(';').next().unwrap()), sql, sent, place).await;
            told.run(client, &build::query("ROLLBACK"), "ROLLBACK", sent, place).await;
        } else {
            told.run(client, &build::query(sql), sql, sent, place).await;
        }
    }
    // What was sent by now has to come.
    let until = sent.get();
    while !told.is_whole(from, until) {
        let message = client.recv().await;
        let message = message.unwrap_or_else(|error| {
            panic!("{place}: {error}, after {:?} of {from}..={until}, and {:?}", told.numbers, told.side)
        });
        told.note(&[message], place);
    }
    told.run(client, &build::query("UNLISTEN *"), "UNLISTEN *", sent, place).await;
    told.side = None;
    let last = sent.get();
    // What is sent from now on never comes.
    while sent.get() < last + 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let before = told.numbers.len();
    told.run(client, &build::query("SELECT 1"), "SELECT 1", sent, place).await;
    let numbers = told.numbers;
    assert_eq!(numbers.len(), before, "{place}: heard behind UNLISTEN: {numbers:?}");
    let mut sorted = numbers.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), numbers.len(), "{place}: {numbers:?}");
    let first = sorted.first().copied().unwrap_or(until + 1);
    // One was on its way, and may have been there before LISTEN.
    assert!(first <= from + 2, "{place}: {from} were sent when LISTEN was answered, the first heard is {first}");
    // What came late and was sent while UNLISTEN was on its way may have gone with that.
    let whole: Vec<u64> = (first..=until).collect();
    sorted.retain(|number| *number <= until);
    assert_eq!(sorted, whole, "{place}");
    // In a lease that listens itself, what was sent before it began may come late, by the one that listens for all.
    let late = numbers.windows(2).filter(|pair| pair[0] > pair[1]).count();
    assert!(late <= 1 + numbers.len() / 10, "{place}: {numbers:?}");
    numbers.len()
}

/// Two begin to listen at once where nobody did: the server connection of one listens for both, and has the channel before it has
/// that of the marks. Every way takes its time, so that the other's mark would be there first.
#[test]
fn who_listens_while_the_one_that_listens_for_all_begins_to_hears_everything() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "4")]);
    run(Duration::from_mins(2), async {
        let mut clients = [stage.client().await, stage.client().await];
        // Each has a server connection.
        for client in &mut clients {
            succeed(client, "BEGIN").await;
        }
        for client in &mut clients {
            succeed(client, "COMMIT").await;
        }
        proxy.delay(Direction::ToServer, Duration::from_millis(300));
        for client in &mut clients {
            client.send(&build::query("LISTEN c")).await.unwrap();
        }
        for client in &mut clients {
            assert_eq!(client.outcome().await.unwrap().error, None);
        }
        // The other's does not listen any more.
        wait_until(SOON, || stage.pids("state = 'idle' AND query = 'UNLISTEN *'").len() == 1);
        proxy.heal();
        is_released(&stage, 1);
        stage.sql("NOTIFY c, 'x'");
        for client in &mut clients {
            assert_eq!(payload(client).await, "x");
        }
        assert_eq!(hubs(&stage).len(), 1);
    });
}

#[test]
fn a_channel_that_is_left_while_it_is_on_its_way_to_the_one_that_listens_is_left_there_too() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "4")]);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        succeed(&mut client, "LISTEN a").await;
        is_released(&stage, 1);
        let hub = hubs(&stage)[0];
        let last = || stage.sql(&format!("SELECT query FROM pg_stat_activity WHERE pid = {hub}"));
        // What the server says takes its time: it was asked to listen, and the client has not been told so.
        proxy.delay(Direction::ToClient, Duration::from_millis(500));
        succeed(&mut client, "LISTEN b").await;
        wait_until(SOON, || last() == "LISTEN \"b\";");
        succeed(&mut client, "UNLISTEN b").await;
        proxy.heal();
        wait_until(SOON, || last() == "UNLISTEN \"b\";");
        stage.sql("NOTIFY b, 'never'; NOTIFY a, 'still'");
        assert_eq!(payload(&mut client).await, "still");
    });
}

#[test]
fn the_loss_of_the_one_that_listens_is_repaired_and_told() {
    let stage = Stage::new(&[("default_pool_size", "3")]);
    run(Duration::from_mins(2), async {
        let mut clients = [stage.client().await, stage.client().await];
        for (client, channel) in clients.iter_mut().zip(["a", "b"]) {
            succeed(client, &format!("LISTEN {channel}; LISTEN shared")).await;
        }
        is_released(&stage, 1);
        // Both have it: what it was told last is not of the one whose server connection it was.
        let hub = hubs(&stage)[0];
        wait_until(SOON, || {
            stage.sql(&format!("SELECT query FROM pg_stat_activity WHERE pid = {hub}")).contains("\";")
        });
        for round in 1..3 {
            stage.terminate(*hubs(&stage).last().unwrap());
            wait_until(SOON, || hubs(&stage).len() > round);
            for client in &mut clients {
                for words in ["was lost", "again"] {
                    let warning = client.recv().await.unwrap().server_error().unwrap();
                    assert!(warning.severity() == "WARNING" && warning.message().contains(words), "{warning}");
                }
            }
            // From then on everything comes.
            stage.sql(&format!("NOTIFY a, '{round}'; NOTIFY b, '{round}'; NOTIFY shared, '{round}'"));
            for (client, channel) in clients.iter_mut().zip(["a", "b"]) {
                for channel in [channel, "shared"] {
                    let ((_, on, payload), warnings) = heard(client).await;
                    assert_eq!((on.as_str(), payload, warnings.len()), (channel, round.to_string(), 0));
                }
            }
            nobody_is_pinned(&stage);
        }
    });
}

#[test]
fn the_one_that_listens_to_a_server_that_is_the_primary_no_longer_is_replaced() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "3")]);
    let name = stage.name();
    let new = Cluster::start(ClusterOptions::default()).unwrap();
    new.psql("postgres", &format!("CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")).unwrap();
    new.psql("postgres", &format!("CREATE DATABASE {name} OWNER {name}")).unwrap();
    run(Duration::from_mins(2), async {
        let mut old = stage.client().await;
        succeed(&mut old, "LISTEN news").await;
        is_released(&stage, 1);
        let hub = hubs(&stage)[0];
        // The old server lives on, and so does the connection that listens; all others lead to the new one.
        proxy.lead_to(new.addr());
        wait_until(SOON, || {
            stage.sql(&format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{name}' AND pid <> {hub}"
            ));
            stage.backends() == [hub]
        });
        let mut other = stage.client().await;
        succeed(&mut other, "LISTEN news").await;
        wait_until(SOON, || hubs(&stage).len() > 1);
        wait_until(SOON, || stage.backends().is_empty());
        for client in [&mut old, &mut other] {
            for words in ["was lost", "again"] {
                let warning = client.recv().await.unwrap().server_error().unwrap();
                assert!(warning.severity() == "WARNING" && warning.message().contains(words), "{warning}");
            }
        }
        new.psql(name, "NOTIFY news, 'of the new one'").unwrap();
        assert_eq!([payload(&mut old).await, payload(&mut other).await], ["of the new one"; 2]);
        nobody_is_pinned(&stage);
        // And there it stays.
        for round in 0..3 {
            new.psql(name, &format!("NOTIFY news, '{round}'")).unwrap();
            for client in [&mut old, &mut other] {
                let ((_, _, payload), warnings) = heard(client).await;
                assert_eq!((payload, warnings.len()), (round.to_string(), 0));
            }
        }
        assert_eq!(hubs(&stage).len(), 2);
        // Whoever asks is told whose it is.
        let holders = || {
            let (_, body) = stage.pgweir.http_get("/blame").unwrap();
            body
        };
        wait_until(SOON, || holders().contains("\"2 listening clients\""));
    });
}

#[test]
fn who_vanishes_is_forgotten_and_the_last_one_closes_the_connection() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let (mut one, mut two) = (stage.client().await, stage.client().await);
        succeed(&mut one, "LISTEN a").await;
        is_released(&stage, 1);
        succeed(&mut two, "LISTEN b").await;
        let hub = hubs(&stage)[0];
        let last = || stage.sql(&format!("SELECT query FROM pg_stat_activity WHERE pid = {hub}"));
        wait_until(SOON, || last() == "LISTEN \"b\";");
        one.abort().unwrap();
        // What only it listened to is listened to no more.
        wait_until(SOON, || last() == "UNLISTEN \"a\";");
        stage.sql("NOTIFY b, 'still'");
        assert_eq!(payload(&mut two).await, "still");
        assert!(is_there(&stage, hub));
        two.shutdown().await.unwrap();
        wait_until(SOON, || !is_there(&stage, hub));
        // And the next one opens one again.
        let mut three = stage.client().await;
        succeed(&mut three, "LISTEN c").await;
        is_released(&stage, 2);
        stage.sql("NOTIFY a; NOTIFY c, 'mine'");
        assert_eq!(payload(&mut three).await, "mine");
    });
}

#[test]
fn a_client_knows_its_own_notifications_by_its_process_id() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let (mut one, mut other) = (stage.client().await, stage.client().await);
        stage.own_sql(
            "CREATE TABLE t (a int); CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_notify('c', 'trigger'); RETURN NULL; END $$; \
             CREATE TRIGGER t AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION tell()",
        );
        for client in [&mut one, &mut other] {
            succeed(client, "LISTEN c").await;
        }
        is_released(&stage, 1);
        let (own, foreign) = (one.pid, other.pid);
        for sql in
            ["NOTIFY c, 'x'", "SELECT pg_notify('c', 'x')", "INSERT INTO t VALUES (1)", "BEGIN; NOTIFY c; COMMIT"]
        {
            one.send(&build::query(sql)).await.unwrap();
            let messages = one.recv_until_ready().await.unwrap();
            let senders: Vec<i32> = messages.iter().filter_map(Message::notification).map(|n| n.0).collect();
            assert_eq!(senders, [own], "{sql}: in front of ReadyForQuery, as from Postgres");
            let sender = heard(&mut other).await.0.0;
            assert!(sender != own && sender != foreign, "{sql}: {sender}");
        }
        // None comes twice.
        succeed(&mut other, "NOTIFY c, 'last'").await;
        assert_eq!(payload(&mut one).await, "last");
    });
}

#[test]
fn who_listens_and_deallocates_hears_on_and_who_deallocates_behind_sequences_is_answered() {
    let stage = Stage::new(&[("default_pool_size", "3"), ("sequence_values", "off")]);
    let prepare = [build::parse("s", "SELECT 1", &[]), build::sync()].concat();
    run(Duration::from_mins(1), async {
        let (mut client, mut other) = (stage.client().await, stage.client().await);
        client.send(&prepare).await.unwrap();
        assert_eq!(client.outcome().await.unwrap().error, None);
        succeed(&mut client, "LISTEN a").await;
        is_released(&stage, 1);
        succeed(&mut client, "DEALLOCATE s").await;
        succeed(&mut other, "NOTIFY a, 'still'").await;
        assert_eq!(payload(&mut client).await, "still");
        // From now on every lease of the pool begins with a query of ours.
        assert_eq!(other.query("SELECT lastval()").await.unwrap().sqlstate(), "55000");
        other.send(&prepare).await.unwrap();
        assert_eq!(other.outcome().await.unwrap().error, None);
        succeed(&mut other, "DEALLOCATE s").await;
        succeed(&mut other, "NOTIFY a, 'and on'").await;
        assert_eq!(payload(&mut client).await, "and on");
    });
}

#[test]
fn who_does_not_take_its_notifications_is_ended_and_nobody_else() {
    let stage = Stage::new(&[("default_pool_size", "3")]);
    run(Duration::from_mins(2), async {
        let (mut busy, mut other) = (stage.client().await, stage.client().await);
        for client in [&mut busy, &mut other] {
            succeed(client, "LISTEN c").await;
        }
        is_released(&stage, 1);
        // In a transaction nothing is told.
        succeed(&mut busy, "BEGIN").await;
        for round in 10..25 {
            stage.sql(&format!(
                "SELECT pg_notify('c', n || repeat('x', 7900)) FROM generate_series({round}0, {round}9) n"
            ));
            for _ in 0..10 {
                payload(&mut other).await;
            }
        }
        let end = read_to_end(&mut busy).await;
        assert_eq!(end.sqlstate(), "53400", "{:?}", end.messages);
        succeed(&mut other, "NOTIFY c, 'well'").await;
        assert!(stage.metric("pgweir_servers_pinned") < 0.5);
    });
}

#[test]
fn without_room_for_it_who_listens_keeps_its_server_connection() {
    #[rustfmt::skip]
    let table: [(&str, &[(&str, &str)]); 3] = [
        ("a pool of one",        &[("default_pool_size", "1")]),
        ("a database's limit",   &[("default_pool_size", "5"), ("max_db_connections", "1")]),
        ("switched off",         &[("default_pool_size", "5"), ("shared_listener", "false")]),
    ];
    for (name, settings) in table {
        let stage = Stage::new(settings);
        run(Duration::from_mins(1), async {
            let mut client = stage.client().await;
            succeed(&mut client, "LISTEN c").await;
            wait_until(SOON, || stage.metric("pgweir_servers_pinned") > 0.5);
            stage.sql("NOTIFY c, 'x'");
            assert_eq!(payload(&mut client).await, "x", "{name}");
            assert_eq!(hubs(&stage), Vec::<i32>::new(), "{name}");
            succeed(&mut client, "UNLISTEN *").await;
            nobody_is_pinned(&stage);
            let mut other = stage.client().await;
            assert_eq!(value(&mut other, "SELECT count(*) FROM pg_listening_channels()").await, "0", "{name}");
        });
    }
}

#[test]
fn what_a_client_hears_is_in_its_own_encoding() {
    let stage = Stage::new(&[("default_pool_size", "3")]);
    run(Duration::from_mins(1), async {
        let mut latin = stage.client_with(&[("client_encoding", "latin1")]).await;
        let mut utf = stage.client_with(&[("client_encoding", "utf-8")]).await;
        succeed(&mut utf, "LISTEN c").await;
        is_released(&stage, 1);
        succeed(&mut latin, "LISTEN c").await;
        stage.sql("NOTIFY c, 'é'");
        assert_eq!(payload(&mut utf).await, "é");
        let message = latin.recv().await.unwrap();
        assert_eq!(message.body.get(4..), Some(&b"c\0\xe9\0"[..]), "{message:?}");
        // And when it changes later.
        succeed(&mut utf, "SET client_encoding = 'latin1'").await;
        stage.sql("NOTIFY c, 'é'");
        let message = utf.recv().await.unwrap();
        assert_eq!(message.body.get(4..), Some(&b"c\0\xe9\0"[..]), "{message:?}");
    });
}

#[test]
fn who_pins_while_its_channels_are_on_their_way_costs_no_time() {
    let stage = Stage::new(&[("default_pool_size", "4")]);
    run(Duration::from_mins(1), async {
        let mut first = stage.client().await;
        succeed(&mut first, "LISTEN a").await;
        is_released(&stage, 1);
        let mut clients = Vec::new();
        for (number, then) in
            ["SELECT pg_advisory_lock(1)", "CREATE TEMP TABLE t (a int)", "UNLISTEN *"].iter().enumerate()
        {
            let mut client = stage.client().await;
            client.send(&[build::query(&format!("LISTEN new{number}")), build::query(then)].concat()).await.unwrap();
            for _ in 0..2 {
                assert_eq!(client.outcome().await.unwrap().error, None, "{then}");
            }
            clients.push(client);
        }
        wait_until(SOON, || stage.metric("pgweir_servers_pinned") > 1.5);
        let cpu = || stage.pgweir.cpu_time().map(|(user, system)| user + system).unwrap();
        let before = cpu();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let taken = cpu().saturating_sub(before);
        assert!(taken < Duration::from_millis(300), "{taken:?} in an idle second");
        stage.sql("NOTIFY new0, 'x'; NOTIFY new1, 'x'; NOTIFY new2, 'never'");
        assert_eq!(payload(&mut clients[0]).await, "x");
        assert_eq!(payload(&mut clients[1]).await, "x");
        assert!(clients[2].recv_within(Duration::from_millis(300)).await.unwrap().is_none());
    });
}

#[test]
fn with_more_channels_than_are_shared_a_client_hears_what_it_listens_to_and_nothing_else() {
    let stage = Stage::new(&[("default_pool_size", "3")]);
    let listen = |from: usize, to: usize| (from..to).map(|n| format!("LISTEN c{n}")).collect::<Vec<_>>().join(";");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        succeed(&mut client, &listen(0, 900)).await;
        is_released(&stage, 1);
        succeed(&mut client, &listen(900, 1100)).await;
        wait_until(SOON, || stage.metric("pgweir_servers_pinned") > 0.5);
        succeed(&mut client, "UNLISTEN c1").await;
        stage.sql("NOTIFY c1, 'never'; NOTIFY c2, 'two'; NOTIFY c1099, 'last'");
        assert_eq!(payload(&mut client).await, "two");
        assert_eq!(payload(&mut client).await, "last");
    });
}

#[test]
fn where_the_only_server_connection_is_the_one_that_listens_the_others_get_it() {
    let stage = Stage::new(&[("default_pool_size", "3"), ("server_login_retry", "1s")]);
    run(Duration::from_mins(1), async {
        let (mut listener, mut other) = (stage.client().await, stage.client().await);
        succeed(&mut listener, "LISTEN c").await;
        is_released(&stage, 1);
        let hub = hubs(&stage)[0];
        // From now on the server lets nobody else in.
        stage.sql(&format!("ALTER ROLE {} CONNECTION LIMIT 1", stage.name()));
        let others = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{}' AND pid <> {hub}",
            stage.name()
        );
        wait_until(SOON, || {
            stage.sql(&others);
            stage.backends() == [hub]
        });
        assert_eq!(value(&mut other, "SELECT pg_backend_pid()").await, hub.to_string(), "the same, as good as new");
        assert_eq!(value(&mut other, "SELECT count(*) FROM pg_listening_channels()").await, "0");
        assert_eq!(read_to_end(&mut listener).await.sqlstate(), "57P01");
        // Who listens anew keeps it, as if there were no such thing.
        let mut again = stage.client().await;
        succeed(&mut again, "LISTEN c").await;
        wait_until(SOON, || stage.metric("pgweir_servers_pinned") > 0.5);
        stage.sql("NOTIFY c, 'x'");
        assert_eq!(payload(&mut again).await, "x");
        assert_eq!(hubs(&stage), [hub]);
    });
}

#[test]
fn where_all_others_are_kept_the_one_that_listens_serves_the_rest() {
    let stage = Stage::new(&[("default_pool_size", "3")]);
    run(Duration::from_mins(1), async {
        let [mut listener, mut one, mut two, mut other] =
            [stage.client().await, stage.client().await, stage.client().await, stage.client().await];
        succeed(&mut listener, "LISTEN c").await;
        is_released(&stage, 1);
        for keeper in [&mut one, &mut two] {
            succeed(keeper, "CREATE TEMP TABLE t (a int)").await;
        }
        other.set_patience(SOON);
        assert_eq!(value(&mut other, "SELECT pg_backend_pid()").await, hubs(&stage)[0].to_string());
        assert_eq!(read_to_end(&mut listener).await.sqlstate(), "57P01");
        for keeper in [&mut one, &mut two] {
            assert_eq!(value(keeper, "SELECT count(*) FROM t").await, "0");
        }
    });
}

#[test]
fn the_last_server_connection_that_serves_is_not_taken_to_listen() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let (mut holder, mut listener) = (stage.client().await, stage.client().await);
        succeed(&mut holder, "CREATE TEMP TABLE t (a int)").await;
        wait_until(SOON, || stage.metric("pgweir_servers_pinned") > 0.5);
        succeed(&mut listener, "LISTEN c").await;
        wait_until(SOON, || stage.metric("pgweir_servers_pinned") > 1.5);
        assert_eq!(hubs(&stage), Vec::<i32>::new());
        // It is shared as soon as there is room.
        succeed(&mut holder, "DROP TABLE t").await;
        wait_until(SOON, || stage.metric("pgweir_servers_pinned") < 1.5);
        succeed(&mut listener, "NOTIFY c, 'own'").await;
        is_released(&stage, 1);
        stage.sql("NOTIFY c, 'x'");
        assert_eq!(payload(&mut listener).await, "x");
    });
}

#[test]
fn a_loss_while_a_client_that_listens_works_is_that_of_any_client() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "4")]);
    run(Duration::from_mins(1), async {
        stage.own_sql("CREATE TABLE t (a int)");
        let (mut client, mut holder) = (stage.client().await, stage.place.direct().await);
        succeed(&mut client, "LISTEN c").await;
        is_released(&stage, 1);
        let waiting = || stage.pids("wait_event_type = 'Lock'");
        let insert = "INSERT INTO t VALUES (1)";
        for (round, bytes) in [build::query(insert), batch(insert)].into_iter().enumerate() {
            succeed(&mut holder, "BEGIN; LOCK TABLE t").await;
            client.send(&bytes).await.unwrap();
            wait_until(SOON, || waiting().len() == 1);
            proxy.cut_all();
            // The outcome is unknown; the client goes on, and so does its listening.
            let messages = client.recv_until_ready().await.unwrap();
            assert_eq!(Outcome::of(&messages).sqlstate(), "08006", "{messages:?}");
            succeed(&mut holder, "ROLLBACK").await;
            is_released(&stage, round + 2);
            // It may only be about to listen.
            while payload_within(&mut client, Duration::from_millis(200)).await.is_none() {
                stage.sql("NOTIFY c, 'after'");
            }
        }
    });
}

#[test]
fn what_was_heard_while_none_listened_hides_nothing_that_comes_later() {
    let stage = Stage::new(&[("default_pool_size", "3")]);
    run(Duration::from_mins(1), async {
        let (mut client, mut other) = (stage.client().await, stage.client().await);
        succeed(&mut client, "LISTEN jobs").await;
        is_released(&stage, 1);
        stage.terminate(hubs(&stage)[0]);
        // By its own server connection, whether the hub listens again or not.
        for _ in 0..5 {
            succeed(&mut client, "NOTIFY jobs").await;
        }
        wait_until(SOON, || hubs(&stage).len() > 1);
        is_released(&stage, 2);
        let heard_before = {
            client.send(&build::query("SELECT 1")).await.unwrap();
            client.recv_until_ready().await.unwrap().len()
        };
        assert!(heard_before > 0);
        for number in 0..20 {
            succeed(&mut other, "NOTIFY jobs").await;
            let (_, warnings) = heard(&mut client).await;
            assert!(warnings.len() <= 2, "{number}: {warnings:?}");
        }
    });
}

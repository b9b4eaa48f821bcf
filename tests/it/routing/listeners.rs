//! Clients that listen, and read on followers: what the primary's one listening connection hears reaches them between two
//! transactions, and they see what it is about.

use std::time::Duration;

use pgweir_harness::wire::{Message, Wire, build, cancel};
use pgweir_harness::{wait_until, wait_until_async};

use super::{Family, at, family};
use crate::stage::{SOON, Stage, run, succeed, value};
use crate::support;

/// The payload of the next notification.
async fn payload(client: &mut Wire) -> String {
    loop {
        if let Some((_, _, payload)) = client.recv().await.unwrap().notification() {
            return payload;
        }
    }
}

/// The payloads of the notifications among these.
fn payloads(messages: &[Message]) -> Vec<String> {
    messages.iter().filter_map(Message::notification).map(|(_, _, payload)| payload).collect()
}

/// A client that listens to `news` by the hub, and whose reads run on followers.
async fn listener(family: &Family, stage: &Stage<'_>) -> Wire {
    let mut client = stage.client().await;
    succeed(&mut client, "LISTEN news").await;
    wait_until(SOON, || {
        let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
        support::metric_in(&body, "pgweir_clients", &["state=\"active\""]) < 0.5
    });
    family.until_routed(&mut client).await;
    client
}

#[test]
fn who_listens_is_told_between_its_reads_on_followers_and_sees_what_it_is_told_of() {
    const ROUNDS: usize = 20;
    let family = family();
    let stage = family.stage(&[("default_pool_size", "4"), ("read_freshness", "session")]);
    stage.own_sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (0)");
    run(Duration::from_mins(2), async {
        let mut client = listener(&family, &stage).await;
        let mut sender = stage.client().await;
        for number in 1..=ROUNDS {
            if number == ROUNDS / 2 {
                // No follower is up to date from here on.
                family.pause();
            }
            if number < ROUNDS / 2 {
                family.until_routed(&mut client).await;
                assert_eq!(value(&mut client, "SELECT 'x' /* before */").await, "x");
            }
            succeed(&mut sender, &format!("UPDATE kept SET id = {number}; NOTIFY news, '{number}'")).await;
            // It reads all the time, and is told in between.
            let mut told = Vec::new();
            while told.is_empty() {
                client.send(&build::query("SELECT 'x' /* meanwhile */")).await.unwrap();
                let messages = client.recv_until_ready().await.unwrap();
                let from = messages.iter().position(|message| message.tag == b'T').unwrap();
                assert_eq!(payloads(&messages[from..]), [""; 0], "in the midst of an answer");
                told = payloads(&messages);
            }
            assert_eq!(told, [number.to_string()]);
            assert_eq!(value(&mut client, "SELECT id FROM kept /* what it is about */").await, number.to_string());
        }
        family.resume();
        let (at_home, elsewhere) = family.ran("before */");
        assert!(elsewhere > 0, "{at_home} at home, {elsewhere} elsewhere");
        family.until_routed(&mut client).await;
    });
}

#[test]
fn who_is_notified_within_a_read_on_a_follower_is_told_when_it_is_over() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "4")]);
    run(Duration::from_mins(2), async {
        let mut client = listener(&family, &stage).await;
        let mut other = listener(&family, &stage).await;
        let mut sender = stage.client().await;
        // A batch that is a transaction of its own.
        family.until_routed(&mut client).await;
        client.send(&build::query("SELECT pg_sleep(600) /* a long read */")).await.unwrap();
        wait_until(SOON, || family.ran("a long read */") != (0, 0));
        assert_eq!(family.ran("a long read */"), (0, 1));
        succeed(&mut sender, "NOTIFY news, 'within a read'").await;
        // The hub has it.
        assert_eq!(payload(&mut other).await, "within a read");
        cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
        let messages = client.recv_until_ready().await.unwrap();
        assert!(messages.iter().any(|message| message.tag == b'E'), "{messages:?}");
        assert_eq!(payloads(&messages), [""; 0]);
        assert_eq!(payload(&mut client).await, "within a read");
        // A transaction.
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut client).await, "primary");
        succeed(&mut sender, "NOTIFY news, 'within a transaction'").await;
        assert_eq!(payload(&mut other).await, "within a transaction");
        for text in ["SELECT 1", "SELECT 2", "COMMIT"] {
            client.send(&build::query(text)).await.unwrap();
            assert_eq!(payloads(&client.recv_until_ready().await.unwrap()), [""; 0], "{text}");
        }
        assert_eq!(payload(&mut client).await, "within a transaction");
    });
}

#[test]
fn a_transaction_that_moves_to_the_primary_finds_its_channels_there() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "4")]);
    run(Duration::from_mins(2), async {
        let mut client = listener(&family, &stage).await;
        let mut other = listener(&family, &stage).await;
        let mut sender = stage.client().await;
        // What is refused there, and what would be answered otherwise.
        for text in ["SELECT pg_listening_channels()", "UNLISTEN nothing; SELECT pg_listening_channels()"] {
            family.until_routed(&mut client).await;
            succeed(&mut client, "BEGIN READ ONLY").await;
            assert_eq!(value(&mut client, text).await, "news", "{text}");
            assert_eq!(at(&mut client).await, "primary");
            succeed(&mut client, "COMMIT").await;
        }
        // It goes on as before,
        succeed(&mut sender, "NOTIFY news, 'still'").await;
        assert_eq!(payload(&mut client).await, "still");
        assert_eq!(payload(&mut other).await, "still");
        // also when that was rolled back,
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        succeed(&mut client, "UNLISTEN *").await;
        succeed(&mut client, "ROLLBACK").await;
        succeed(&mut sender, "NOTIFY news, 'rolled back'").await;
        assert_eq!(payload(&mut client).await, "rolled back");
        assert_eq!(payload(&mut other).await, "rolled back");
        // and not when it was committed.
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN READ ONLY").await;
        succeed(&mut client, "UNLISTEN *").await;
        succeed(&mut client, "COMMIT").await;
        succeed(&mut sender, "NOTIFY news, 'gone'").await;
        assert_eq!(payload(&mut other).await, "gone");
        for text in ["SELECT 1", "SELECT pg_backend_pid()"] {
            client.send(&build::query(text)).await.unwrap();
            assert_eq!(payloads(&client.recv_until_ready().await.unwrap()), [""; 0], "{text}");
        }
        // Nobody keeps a server connection for it.
        wait_until_async(SOON, async || stage.metric("pgweir_servers_pinned") < 0.5).await;
    });
}

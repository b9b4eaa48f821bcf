//! What sequences gave: `currval` and `lastval` in a later transaction than their `nextval` tell the client's own value, or
//! 55000, and never a stranger's.

use std::time::{Duration, Instant};

use pgweir_harness::wire::build::{bind, execute, parse, query, sync};
use pgweir_harness::wire::{Outcome, Wire};

use crate::stage::{Dice, Stage, succeed, value};

const SETUP: &str = r"
CREATE TABLE shared (id serial PRIMARY KEY, who int); CREATE TABLE silent (a int); CREATE SEQUENCE q;
CREATE FUNCTION asks() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RETURN lastval(); END $$;
CREATE FUNCTION asks_by_text() RETURNS bigint LANGUAGE plpgsql AS $$ DECLARE v bigint;
BEGIN EXECUTE 'SELECT last' || 'val()' INTO v; RETURN v; END $$;
CREATE VIEW asking AS SELECT lastval();
";

fn stage(pool_size: &str, setting: &str) -> Stage<'static> {
    let place = crate::support::Place::on(crate::support::primary());
    let name = &place.name;
    place.psql(&format!("GRANT CREATE ON SCHEMA public TO {name}; SET ROLE {name}; {SETUP}"));
    let settings = [("default_pool_size", pool_size), ("sequence_values", setting)];
    Stage::at(place, &settings, &[])
}

/// A batch of the extended protocol: each text parsed, bound and executed, and a Sync.
fn batch(texts: &[&str]) -> Vec<u8> {
    let one = |text: &&str| [parse("", text, &[]), bind("", "", &[]), execute("", 0)].concat();
    [texts.iter().map(one).collect::<Vec<_>>().concat(), sync()].concat()
}

/// Asks in one of several ways, in a transaction of its own.
async fn ask(wire: &mut Wire, way: usize) -> Outcome {
    const ASK: &str = "SELECT lastval()";
    let before: &[&str] = match way {
        0 => return wire.query(ASK).await.unwrap(),
        1 => return wire.extended("SELECT currval($1::text::regclass)", &[Some("shared_id_seq")]).await.unwrap(),
        2 => {
            wire.send(&batch(&["SELECT who FROM shared LIMIT 0", ASK])).await.unwrap();
            return wire.outcome().await.unwrap();
        }
        3 => {
            wire.send(&[query("BEGIN"), query("SELECT 1"), query(ASK), query("ROLLBACK")].concat()).await.unwrap();
            for _ in 0..2 {
                assert_eq!(wire.outcome().await.unwrap().error, None);
            }
            let told = wire.outcome().await.unwrap();
            assert_eq!(wire.outcome().await.unwrap().error, None);
            return told;
        }
        4 => &["BEGIN"],
        _ => &["BEGIN", "SELECT who FROM shared LIMIT 0"],
    };
    for text in before {
        succeed(wire, text).await;
    }
    let told = wire.query(ASK).await.unwrap();
    succeed(wire, "ROLLBACK").await;
    told
}

/// What of a client's life may be told: the last value that it took, until the next.
async fn live(stage: &Stage<'_>, number: u64, seed: u64) -> usize {
    let mut dice = Dice::new(seed.wrapping_add(number));
    let mut wire = stage.client().await;
    let (mut last, mut own) = (None, 0);
    for round in 0..60 {
        match dice.below(8) {
            0 => drop(succeed(&mut wire, "INSERT INTO silent VALUES (1)").await),
            1 => drop(succeed(&mut wire, "SELECT count(*) FROM silent").await),
            2 => drop(succeed(&mut wire, "BEGIN; INSERT INTO silent VALUES (1); ROLLBACK").await),
            3 => {
                wire = stage.client().await;
                last = None;
            }
            _ => last = Some(value(&mut wire, "INSERT INTO shared (who) VALUES (1) RETURNING id").await),
        }
        if dice.once_in(3) {
            continue;
        }
        let way = usize::try_from(dice.below(6)).unwrap();
        let told = ask(&mut wire, way).await;
        if told.sqlstate() != "55000" {
            assert_eq!(told.value(), last.as_deref(), "client {number}, round {round}, way {way}: {told:?}");
            own += 1;
        }
    }
    own
}

#[tokio::test]
async fn clients_are_told_their_own_values_and_nobody_elses() {
    let seed = Dice::seed("clients_are_told_their_own_values_and_nobody_elses");
    for setting in ["learn", "always", "off"] {
        let stage = stage("2", setting);
        if setting != "always" {
            // What is told before the pool knows that its clients ask is another test's.
            assert_eq!(ask(&mut stage.client().await, 0).await.sqlstate(), "55000");
        }
        let all = (0..8).map(|number| live(&stage, number, seed));
        let own: usize = futures_util::future::join_all(all).await.iter().sum();
        println!("{setting}: {own} questions were answered with a value");
        assert_eq!(own > 0, setting != "off", "{setting}: {own}");
        assert!(stage.metric("pgweir_servers_pinned") < 0.5);
    }
}

#[tokio::test]
async fn the_very_first_to_ask_is_told_no_strangers_value() {
    let ask_by = |text: &'static str| vec![query(text)];
    let inside = |text: &'static str| vec![query("BEGIN"), query("SELECT 1"), query(text)];
    let ways: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("simple", ask_by("SELECT lastval()")),
        ("in a transaction", inside("SELECT lastval()")),
        ("in a transaction, by parameters", vec![query("BEGIN"), batch(&["SELECT currval('q')"])]),
        ("in a batch", vec![batch(&["SELECT 1", "SELECT currval('q')"])]),
        ("in a batch that begins", vec![batch(&["BEGIN", "SELECT lastval()"])]),
        ("a function", ask_by("SELECT asks()")),
        ("a function, in a transaction", inside("SELECT asks()")),
        ("a view", ask_by("SELECT * FROM asking")),
        ("made at run time", ask_by("SELECT asks_by_text()")),
        ("DO", ask_by("DO $$ BEGIN PERFORM lastval(); END $$")),
        ("a view, in a transaction", inside("SELECT * FROM asking")),
        ("made at run time, in a transaction", inside("SELECT asks_by_text()")),
        ("DO, in a transaction", inside("DO $$ BEGIN PERFORM lastval(); END $$")),
        ("a view, by parameters", vec![batch(&["SELECT * FROM asking"])]),
        ("a view, in a transaction, by parameters", vec![query("BEGIN"), batch(&["SELECT 1", "SELECT * FROM asking"])]),
        ("made at run time, in a batch", vec![batch(&["SELECT 1", "SELECT asks_by_text()"])]),
        ("a view, behind its BEGIN", vec![batch(&["BEGIN", "SELECT * FROM asking"])]),
    ];
    for (name, messages) in ways {
        let stage = stage("1", "learn");
        let (mut one, mut two) = (stage.client().await, stage.client().await);
        succeed(&mut one, "SELECT nextval('q')").await;
        succeed(&mut one, "INSERT INTO shared (who) VALUES (1)").await;
        let mut outcome = None;
        for message in messages {
            two.send(&message).await.unwrap();
            outcome = Some(two.outcome().await.unwrap());
        }
        let outcome = outcome.unwrap();
        assert_eq!(outcome.sqlstate(), "55000", "{name}: {outcome:?}");
        two.query("ROLLBACK").await.unwrap();
        assert_eq!(value(&mut two, "SELECT 1").await, "1", "{name}");
    }
}

/// Where nothing can be forgotten, because the transaction may have taken values of its own, it is learned that clients ask.
#[tokio::test]
async fn behind_a_write_no_question_is_answered_with_a_strangers_value_twice() {
    let do_block = "DO $$ BEGIN PERFORM lastval(); END $$";
    for text in ["SELECT lastval()", "SELECT asks()", "SELECT * FROM asking", "SELECT asks_by_text()", do_block] {
        let stage = stage("1", "learn");
        let (mut one, mut two) = (stage.client().await, stage.client().await);
        for round in 0..3 {
            succeed(&mut one, "SELECT nextval('q')").await;
            succeed(&mut two, "BEGIN").await;
            succeed(&mut two, "INSERT INTO silent VALUES (1)").await;
            let outcome = two.query(text).await.unwrap();
            assert!(round == 0 || outcome.sqlstate() == "55000", "{text}, round {round}: {outcome:?}");
            assert_eq!(two.query("ROLLBACK").await.unwrap().status, b'I');
        }
    }
}

#[tokio::test]
async fn a_client_alone_is_told_its_values_as_the_setting_says() {
    for (setting, first, later) in [("off", false, false), ("learn", false, true), ("always", true, true)] {
        let stage = stage("1", setting);
        let mut wire = stage.client().await;
        for (round, told) in [first, later, later].into_iter().enumerate() {
            let own = value(&mut wire, "SELECT nextval('q')").await;
            let outcome = wire.query("SELECT currval('q')").await.unwrap();
            let want = if told { Some(own.as_str()) } else { None };
            assert_eq!(outcome.value(), want, "{setting}, round {round}: {outcome:?}");
            assert_eq!(outcome.sqlstate() == "55000", !told, "{setting}, round {round}");
            // They are kept beside what takes none, and in a transaction everybody has them.
            succeed(&mut wire, "SELECT 1").await;
            succeed(&mut wire, "SET work_mem = '5MB'").await;
            assert_eq!(wire.query("SELECT lastval()").await.unwrap().value(), want, "{setting}, round {round}");
            succeed(&mut wire, "BEGIN; INSERT INTO shared (who) VALUES (1)").await;
            let inside = value(&mut wire, "SELECT lastval()").await;
            assert_eq!(value(&mut wire, "SELECT max(id) FROM shared").await, inside);
            succeed(&mut wire, "COMMIT").await;
        }
        succeed(&mut wire, "SELECT nextval('q')").await;
        succeed(&mut wire, "DISCARD SEQUENCES").await;
        assert_eq!(wire.query("SELECT lastval()").await.unwrap().sqlstate(), "55000", "{setting}");
    }
}

#[tokio::test]
async fn who_asks_is_waited_for_a_moment_and_nobody_waits_for_longer() {
    let stage = stage("1", "learn");
    let (mut one, mut two) = (stage.client().await, stage.client().await);
    let (mut own, mut shortest) = (0, Duration::MAX);
    for _ in 0..40 {
        // It asks, and is likely to ask again.
        ask(&mut one, 0).await;
        let taken = value(&mut one, "INSERT INTO shared (who) VALUES (1) RETURNING id").await;
        let begun = Instant::now();
        two.send(&query("SELECT 1")).await.unwrap();
        let told = ask(&mut one, 0).await;
        if told.sqlstate() != "55000" {
            assert_eq!(told.value(), Some(taken.as_str()));
            own += 1;
        }
        assert_eq!(two.outcome().await.unwrap().value(), Some("1"));
        // Now it does not come back.
        succeed(&mut one, "INSERT INTO shared (who) VALUES (1)").await;
        let late = Instant::now();
        succeed(&mut two, "SELECT 1").await;
        shortest = shortest.min(late.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
    println!("{own} of 40 were told their own beside one that waits, who waited {shortest:?} at least");
    assert!(own > 0, "never waited for");
    assert!(shortest < Duration::from_millis(150), "{shortest:?}");
}

//! What goes where.

use std::time::Duration;

use pgweir_harness::wire::{Message, Outcome, Wire, build};
use pgweir_harness::{Pgweir, wait_until, wait_until_async};

use super::{at, family};
use crate::limits::{assert_valid, limits};
use crate::stage::{SOON, fail, run, succeed, value};
use crate::support::{metric_in, options, program};

#[test]
fn reads_go_to_followers_and_writes_to_the_primary_by_every_protocol() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql("CREATE TABLE kept (id int PRIMARY KEY, text text); INSERT INTO kept VALUES (1, 'one')");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        let [simple, extended] = ["read by simple", "read by extended"];
        assert_eq!(value(&mut client, &format!("SELECT text FROM kept /* {simple} */")).await, "one");
        let outcome =
            client.extended(&format!("SELECT text FROM kept WHERE id = $1 /* {extended} */"), &[Some("1")]).await;
        assert_eq!(outcome.unwrap().value(), Some("one"));
        for tag in [simple, extended] {
            assert_eq!(family.ran(tag), (0, 1), "{tag}");
        }
        succeed(&mut client, "INSERT INTO kept VALUES (2, 'two') /* write by simple */").await;
        let outcome =
            client.extended("UPDATE kept SET text = $1 WHERE id = 2 /* write by extended */", &[Some("2")]).await;
        assert_eq!(outcome.unwrap().tags, ["UPDATE 1"]);
        for tag in ["write by simple", "write by extended"] {
            assert_eq!(family.ran(tag), (1, 0), "{tag}");
        }
    });
}

#[test]
fn what_is_pipelined_is_decided_batch_by_batch_and_answered_in_order() {
    let family = family();
    let stage = family.stage(&[("default_pool_size", "2")]);
    stage.own_sql("CREATE TABLE kept (id int)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        let mut bytes = Vec::new();
        for number in 0..50 {
            bytes.extend(build::query(&format!("INSERT INTO kept VALUES ({number}) /* piped write */")));
            bytes.extend(build::query("SELECT max(id) FROM kept /* piped read */"));
            bytes.extend(build::parse("", "SELECT count(*) FROM kept WHERE id >= $1 /* piped batch */", &[]));
            bytes.extend([build::bind("", "", &[Some(b"0")]), build::execute("", 0), build::sync()].concat());
        }
        client.send(&bytes).await.unwrap();
        for number in 0..50 {
            assert_eq!(client.outcome().await.unwrap().tags, ["INSERT 0 1"]);
            assert_eq!(client.outcome().await.unwrap().value(), Some(number.to_string().as_str()));
            assert_eq!(client.outcome().await.unwrap().value(), Some((number + 1).to_string().as_str()));
        }
        let (at_home, elsewhere) = family.ran("piped write");
        assert_eq!((at_home, elsewhere), (50, 0));
        let reads = [family.ran("piped read"), family.ran("piped batch")];
        assert_eq!(reads.map(|(at_home, elsewhere)| at_home + elsewhere), [50, 50], "each once");
    });
}

#[test]
fn a_prepared_statement_runs_on_primary_and_followers_alike() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql("CREATE TABLE kept (id int, text text); INSERT INTO kept VALUES (1, 'one'), (2, 'two')");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        let prepare = build::parse("by_id", "SELECT text FROM kept WHERE id = $1 /* prepared */", &[23]);
        client.send(&[prepare, build::describe_statement("by_id"), build::sync()].concat()).await.unwrap();
        client.recv_until_ready().await.unwrap();
        let execute = |id: &str| {
            [build::bind("", "by_id", &[Some(id.as_bytes())]), build::execute("", 0), build::sync()].concat()
        };
        for round in 0..20 {
            if round % 4 == 0 {
                // What follows within the next sample runs on the primary.
                succeed(&mut client, "UPDATE kept SET text = text").await;
            }
            for (id, text) in [("1", "one"), ("2", "two")] {
                client.send(&execute(id)).await.unwrap();
                assert_eq!(client.outcome().await.unwrap().value(), Some(text), "{round}");
            }
        }
        wait_until_async(SOON, async || {
            client.send(&execute("1")).await.unwrap();
            assert_eq!(client.outcome().await.unwrap().value(), Some("one"));
            let (at_home, elsewhere) = family.ran("prepared */");
            at_home > 0 && elsewhere > 0
        })
        .await;
    });
}

#[test]
fn a_session_reads_its_own_writes_and_a_pool_those_of_all_its_clients() {
    let family = family();
    for level in ["session", "pool"] {
        let stage = family.stage(&[("read_freshness", level)]);
        stage.own_sql("CREATE TABLE counter (n int); INSERT INTO counter VALUES (0)");
        run(Duration::from_mins(1), async {
            let mut writer = stage.client().await;
            let mut other = stage.client().await;
            family.until_routed(&mut writer).await;
            for number in 1..=300 {
                match number {
                    100 => family.pause(),
                    200 => family.resume(),
                    _ => {}
                }
                succeed(&mut writer, &format!("UPDATE counter SET n = {number}")).await;
                let reader = if level == "pool" && number % 2 == 0 { &mut other } else { &mut writer };
                let got = value(reader, &format!("SELECT n FROM counter /* own write, {level} */")).await;
                assert_eq!(got, number.to_string(), "{level}");
            }
            // And they do go to followers when these have caught up.
            family.until_routed(&mut writer).await;
        });
    }
}

#[test]
fn a_watermark_of_one_pgweir_makes_reads_by_another_as_fresh() {
    let family = family();
    let stage = family.stage(&[("read_freshness", "eventual")]);
    stage.own_sql("CREATE TABLE counter (n int); INSERT INTO counter VALUES (0)");
    // It has heard of no follower, and tells all the same.
    let elsewhere = Pgweir::start_with(options(stage.place.toml(&[]))).unwrap();
    run(Duration::from_mins(1), async {
        let mut writer = Wire::open(elsewhere.addr(), stage.name(), stage.name(), "").await.unwrap();
        let mut reader = stage.client().await;
        family.until_routed(&mut reader).await;
        family.pause();
        succeed(&mut writer, "UPDATE counter SET n = 1").await;
        // Any state of the past will do, if there is a follower to ask.
        wait_until_async(SOON, async || value(&mut reader, "SELECT n FROM counter").await == "0").await;
        // However it is asked for.
        let mut watermarks = vec![value(&mut writer, "SHOW pgweir.watermark").await];
        let outcome = writer.extended("show PGWEIR.watermark; -- unnamed", &[]).await.unwrap();
        watermarks.push(outcome.value().unwrap().to_owned());
        for _ in 0..3 {
            let parsed =
                if watermarks.len() == 2 { build::parse("w", "SHOW pgweir.watermark", &[]) } else { Vec::new() };
            let runs = [build::bind("", "w", &[]), build::describe_portal(""), build::execute("", 0), build::sync()];
            writer.send(&[parsed, runs.concat()].concat()).await.unwrap();
            let messages = writer.recv_until_ready().await.unwrap();
            let names =
                |message: &&Message| message.tag == b'T' && message.body[2..].starts_with(b"pgweir.watermark\0");
            assert_eq!(messages.iter().filter(names).count(), 1, "{messages:?}");
            watermarks.push(Outcome::of(&messages).value().unwrap().to_owned());
        }
        succeed(&mut writer, "BEGIN").await;
        watermarks.push(value(&mut writer, "SHOW pgweir.watermark").await);
        succeed(&mut writer, "COMMIT").await;
        // With it a read sees what was written before, at the primary as long as no follower has it.
        for watermark in &watermarks {
            succeed(&mut reader, &format!("SET pgweir.watermark = '{watermark}'")).await;
            assert_eq!(value(&mut reader, "SELECT n FROM counter /* marked */").await, "1", "{watermark}");
            assert_eq!(value(&mut reader, "SHOW pgweir.watermark").await, *watermark, "nothing was written meanwhile");
            succeed(&mut reader, "BEGIN READ ONLY").await;
            assert_eq!(at(&mut reader).await, "primary");
            succeed(&mut reader, "COMMIT").await;
        }
        assert_eq!(family.ran("/* marked */"), (watermarks.len(), 0));
        // Whoever asks for followers is not asking one of them for this.
        succeed(&mut reader, "SET pgweir.route = 'follower'").await;
        for asked in ["SHOW pgweir.watermark", "/* pgweir.route=follower */ SHOW pgweir.watermark"] {
            assert_eq!(value(&mut reader, asked).await, watermarks[0], "{asked}");
        }
        succeed(&mut reader, "RESET pgweir.route").await;
        succeed(&mut reader, "RESET pgweir.watermark").await;
        wait_until_async(SOON, async || value(&mut reader, "SELECT n FROM counter").await == "0").await;
        succeed(&mut reader, &format!("SET pgweir.watermark = '{}'", watermarks[0])).await;
        family.resume();
        family.until_routed(&mut reader).await;
        assert_eq!(value(&mut reader, "SELECT n FROM counter").await, "1");
        // A follower tells what it has replayed: there is no more to be seen there.
        succeed(&mut reader, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut reader).await, "primary");
        let there = value(&mut reader, "SHOW pgweir.watermark").await;
        succeed(&mut reader, "COMMIT").await;
        assert_eq!(there.rsplit_once('-').unwrap().0, watermarks[0].rsplit_once('-').unwrap().0);
        assert!(there >= watermarks[0], "{there} {}", watermarks[0]);
        // Of another timeline, of another server, or of none.
        let (front, position) = there.rsplit_once('-').unwrap();
        let (system, _) = front.split_once('-').unwrap();
        for strange in [format!("{system}-00000007-{position}"), format!("1-00000001-{position}"), position.to_owned()]
        {
            succeed(&mut reader, &format!("SET pgweir.watermark = '{strange}'")).await;
            let outcome =
                value(&mut reader, "/* pgweir.route=follower */ SELECT current_setting('cluster_name')").await;
            assert_eq!(outcome, "primary", "{strange}");
        }
    });
}

#[test]
fn a_read_only_transaction_is_on_a_follower_from_begin_to_end() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        for begin in ["BEGIN READ ONLY", "START TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"] {
            succeed(&mut client, begin).await;
            let first = at(&mut client).await;
            assert_ne!(first, "primary");
            succeed(&mut client, "SET LOCAL work_mem = '5MB'").await;
            succeed(&mut client, "SAVEPOINT s").await;
            assert_eq!(value(&mut client, "SELECT count(*) FROM kept").await, "1");
            fail(&mut client, "INSERT INTO kept VALUES (2)", "25006", b'E').await;
            succeed(&mut client, "ROLLBACK TO s").await;
            assert_eq!(
                client.extended("SELECT current_setting('cluster_name')", &[]).await.unwrap().value(),
                Some(&*first)
            );
            succeed(&mut client, "COMMIT").await;
        }
        succeed(&mut client, "INSERT INTO kept VALUES (2)").await;
        // A transaction that may write is the primary's.
        succeed(&mut client, "BEGIN").await;
        assert_eq!(at(&mut client).await, "primary");
        succeed(&mut client, "COMMIT").await;
        // What is not read-only by its text may be by its session.
        succeed(&mut client, "SET default_transaction_read_only = on").await;
        family.until_routed(&mut client).await;
        succeed(&mut client, "BEGIN").await;
        assert_ne!(at(&mut client).await, "primary");
        succeed(&mut client, "COMMIT").await;
        succeed(&mut client, "SET default_transaction_isolation = serializable").await;
        succeed(&mut client, "BEGIN").await;
        assert_eq!(at(&mut client).await, "primary");
        succeed(&mut client, "COMMIT").await;
    });
}

#[test]
fn an_advisory_lock_is_never_taken_on_a_follower() {
    let family = family();
    let stage = family.stage(&[]);
    stage.own_sql(
        "CREATE FUNCTION guarded() RETURNS int LANGUAGE plpgsql AS $$ BEGIN SET LOCAL work_mem TO '4MB'; \
         PERFORM pg_advisory_xact_lock(1); RETURN 1; END $$; CREATE VIEW guards AS SELECT pg_try_advisory_xact_lock(2) AS guards",
    );
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        for lock in ["pg_advisory_xact_lock(7)", "pg_advisory_lock_shared(7)"] {
            // First of all: the transaction moves to the primary, unseen.
            succeed(&mut client, "BEGIN READ ONLY").await;
            succeed(&mut client, &format!("SELECT {lock}")).await;
            assert_eq!(at(&mut client).await, "primary", "{lock}");
            succeed(&mut client, "COMMIT").await;
        }
        succeed(&mut client, "SELECT pg_advisory_unlock_all()").await;
        for text in ["SELECT guarded()", "SELECT guards FROM guards"] {
            family.until_routed(&mut client).await;
            succeed(&mut client, "BEGIN READ ONLY").await;
            succeed(&mut client, text).await;
            assert_eq!(at(&mut client).await, "primary", "{text}");
            succeed(&mut client, "COMMIT").await;
            family.until_routed(&mut client).await;
            succeed(&mut client, "BEGIN READ ONLY").await;
            assert_ne!(at(&mut client).await, "primary");
            fail(&mut client, text, "0A000", b'E').await;
            succeed(&mut client, "ROLLBACK").await;
        }
        family.until_routed(&mut client).await;
        // Later: it is told.
        succeed(&mut client, "BEGIN READ ONLY").await;
        assert_ne!(at(&mut client).await, "primary");
        let outcome = fail(&mut client, "SELECT pg_advisory_xact_lock(7)", "0A000", b'E').await;
        assert!(outcome.error.unwrap().field(b'H').unwrap().contains("READ WRITE"));
        fail(&mut client, "SELECT 1", "25P02", b'E').await;
        succeed(&mut client, "ROLLBACK").await;
        assert_eq!(value(&mut client, "SELECT 'on'").await, "on");
    });
}

#[test]
fn hints_are_heeded_in_comments_settings_and_startup_options() {
    let family = family();
    let stage = family.stage(&[("read_routing", "hinted")]);
    stage.own_sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client_with(&[("options", "-c pgweir.route=follower")]).await;
        family.until_routed(&mut client).await;
        assert_eq!(value(&mut client, "SELECT id FROM kept /* by option */").await, "1");
        assert_eq!(
            value(&mut client, "/* pgweir.route=primary */ SELECT id FROM kept /* by comment home */").await,
            "1"
        );
        succeed(&mut client, "SET pgweir.route = 'primary'").await;
        assert_eq!(value(&mut client, "SELECT id FROM kept /* by setting home */").await, "1");
        let mut other = stage.client().await;
        assert_eq!(value(&mut other, "SELECT id FROM kept /* unasked */").await, "1");
        let got = ["by option", "by comment home", "by setting home", "unasked"].map(|tag| family.ran(tag));
        assert_eq!(got, [(0, 1), (1, 0), (1, 0), (1, 0)]);
        // What the pool's clients do with their settings may have written, as far as anybody knows.
        wait_until_async(SOON, async || {
            let asked = "/* pgweir.route=follower */ SELECT id FROM kept /* by comment */";
            assert_eq!(value(&mut other, asked).await, "1");
            family.ran("by comment */").1 > 0
        })
        .await;
    });
}

#[test]
fn nothing_that_a_follower_says_of_itself_reaches_a_client() {
    let family = family();
    let stage = family.stage(&[]);
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        assert_eq!(client.parameters.get("in_hot_standby").map(String::as_str), Some("off"));
        for follower in &family.followers {
            follower.psql("postgres", "ALTER SYSTEM SET application_name = 'a follower'").unwrap();
            follower.reload().unwrap();
        }
        for number in 0..20 {
            client.send(&build::query(&format!("SELECT {number}"))).await.unwrap();
            let messages = client.recv_until_ready().await.unwrap();
            let told: Vec<_> = messages.iter().filter_map(pgweir_harness::wire::Message::parameter).collect();
            assert_eq!(told, []);
        }
        for follower in &family.followers {
            follower.psql("postgres", "ALTER SYSTEM RESET application_name").unwrap();
            follower.reload().unwrap();
        }
    });
}

#[test]
fn the_figures_tell_what_went_where_and_why() {
    let family = family();
    let stage = family.stage(&[("read_freshness", "fleet")]);
    stage.own_sql("CREATE TABLE kept (id int)");
    run(Duration::from_mins(1), async {
        let mut client = stage.client().await;
        family.until_routed(&mut client).await;
        for _ in 0..20 {
            value(&mut client, "SELECT count(*) FROM kept").await;
        }
        succeed(&mut client, "INSERT INTO kept VALUES (1)").await;
        value(&mut client, "SELECT version()").await;
        // Refused on a follower, and run again.
        stage.own_sql("CREATE UNLOGGED TABLE unlogged (n int)");
        family.until_routed(&mut client).await;
        wait_until_async(SOON, async || {
            succeed(&mut client, "/* pgweir.route=follower */ SELECT n FROM unlogged").await;
            let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
            metric_in(&body, "pgweir_reruns_total", &[]) > 0.0
        })
        .await;
    });
    // Told once a second.
    let told = || -> Vec<serde_json::Value> {
        let servers = limits(&stage.pgweir)["servers"].as_array().unwrap().clone();
        servers.iter().flat_map(|server| server["pools"].as_array().unwrap().clone()).collect()
    };
    let of_role = |role: &str| told().into_iter().filter(|pool| pool["role"] == role).collect::<Vec<_>>();
    wait_until(SOON, || {
        let (home, followers) = (of_role("primary"), of_role("follower"));
        let number = |pool: &serde_json::Value, key: &str| pool[key].as_u64().unwrap_or(0);
        let reads = followers.iter().map(|pool| number(pool, "transactions")).sum::<u64>();
        let routes = &home[0]["routes"];
        reads >= 20
            && number(routes, "read") >= 10
            && ["write", "server", "rerun"].iter().all(|reason| number(routes, reason) > 0)
            && number(&home[0], "reruns") > 0
            && number(&home[0], "read_waits") > 0
            && followers.len() == 2
    });
    for pool in of_role("follower") {
        let follower = &pool["follower"];
        assert!(
            follower["state"] == "serving" && follower["lag_bytes"].is_u64() && follower["lag_seconds"].is_f64(),
            "{pool}"
        );
    }
    assert_eq!(of_role("primary")[0]["follower"], serde_json::Value::Null);
    assert_valid(&stage.pgweir, &[&limits(&stage.pgweir)]);
    let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
    for (name, label) in [
        ("pgweir_routes_total", "reason=\"write\""),
        ("pgweir_routes_total", "reason=\"rerun\""),
        ("pgweir_reruns_total", ""),
        ("pgweir_read_waits_total", ""),
        ("pgweir_follower_state", "state=\"serving\""),
        ("pgweir_transactions_total", "role=\"follower\""),
    ] {
        assert!(metric_in(&body, name, &[label]) > 0.0, "{name}{{{label}}}: {body}");
    }
    let (_, body) = stage.pgweir.http_get("/blame").unwrap();
    assert_eq!(body.matches("\"role\":\"follower\"").count(), 2, "{body}");
}

#[test]
fn pgweir_route_says_where_a_statement_goes_and_why() {
    let family = family();
    let stage = family.stage(&[("databases.PLACE_ro.followers_of", "PLACE")]);
    stage.own_sql(
        "CREATE TABLE kept (id int); CREATE UNLOGGED TABLE cache (id int); \
         CREATE FUNCTION count_up() RETURNS int LANGUAGE plpgsql AS 'BEGIN DELETE FROM kept; RETURN 1; END'; \
         CREATE FUNCTION run_it() RETURNS int LANGUAGE plpgsql AS 'BEGIN EXECUTE ''SELECT 1''; RETURN 1; END'; \
         CREATE VIEW counted AS SELECT count_up()",
    );
    let route = |database: &str, text: &str| {
        let config = stage.pgweir.config_path();
        let words = ["route", "--config", config.to_str().unwrap(), database, text];
        let told = program().args(words).output().unwrap();
        (told.status.success(), String::from_utf8(told.stdout).unwrap(), String::from_utf8(told.stderr).unwrap())
    };
    #[rustfmt::skip]
    let table = [
        ("SELECT * FROM kept",                              "to a follower (read)"),
        ("BEGIN READ ONLY",                                 "to a follower (read_only)"),
        ("/* pgweir.route=follower */ SELECT version()",    "to a follower (hint)"),
        ("/* pgweir.route=follower */ SELECT run_it()",     "to the primary (session)"),
        ("/* pgweir.route=follower */ SELECT count_up()",   "to the primary (write)"),
        ("/* pgweir.route=primary */ SELECT * FROM kept",   "to the primary (hint_primary)"),
        ("INSERT INTO kept VALUES (1)",                     "to the primary (write)"),
        ("SELECT * FROM counted",                           "to the primary (write)"),
        ("SELECT * FROM cache",                             "to the primary (relation)"),
        ("SELECT * FROM kept FOR UPDATE",                   "to the primary (lock)"),
        ("/* pgweir.route=follower */ SELECT pg_advisory_lock(1)", "to the primary (lock)"),
        ("SELECT version()",                                "to the primary (server)"),
        ("BEGIN",                                           "to the primary (transaction)"),
    ];
    for (text, want) in table {
        let (is_well, said, faults) = route(stage.name(), text);
        assert!(is_well && said.starts_with(want) && faults.is_empty(), "{text}: {said}{faults}");
    }
    let (_, said, _) = route(stage.name(), "SELECT 1");
    assert_eq!(said.matches("follows the primary, ").count(), 2, "{said}");
    assert!(said.contains("While none of them is fresh enough"), "{said}");
    let (is_well, said, _) = route(&format!("{}_ro", stage.name()), "DELETE FROM kept");
    assert!(is_well && said.starts_with("to the follower of"), "{said}");
    let (is_well, _, faults) = route("nobody", "SELECT 1");
    assert!(!is_well && faults.contains("no such database is configured"), "{faults}");
    assert_eq!(stage.sql("SELECT count(*) FROM kept"), "0", "nothing was run");
    // What would be if.
    let off = family.stage(&[("read_routing", "off")]);
    let words =
        ["route", "--config", off.pgweir.config_path().to_str().unwrap(), off.name(), "SELECT 1"].map(str::to_owned);
    let told = program().args(words).output().unwrap();
    let said = String::from_utf8(told.stdout).unwrap();
    assert!(said.starts_with("to the primary: read_routing is off\n"), "{said}");
    assert!(said.contains("read_routing = auto and transaction mode: to a follower (read)"), "{said}");
}

#[test]
fn a_client_with_a_session_of_its_own_stays_there_and_what_it_writes_others_read() {
    let family = family();
    let stage = family.stage(&[("read_freshness", "pool")]);
    stage.own_sql("CREATE TABLE kept (id int)");
    run(Duration::from_mins(1), async {
        let mut other = stage.client().await;
        family.until_routed(&mut other).await;
        let mut client = stage
            .client_with(&[("ignore_system_indexes", "on"), ("TimeZone", "Asia/Tokyo"), ("DateStyle", "SQL")])
            .await;
        for number in 0..20 {
            succeed(&mut client, &format!("INSERT INTO kept VALUES ({number})")).await;
            let count = (number + 1).to_string();
            assert_eq!(value(&mut other, "SELECT count(*) FROM kept /* read by others */").await, count);
            assert_eq!(value(&mut client, "SELECT count(*) FROM kept /* read by itself */").await, count);
        }
        assert_eq!(family.ran("read by itself"), (20, 0));
    });
}

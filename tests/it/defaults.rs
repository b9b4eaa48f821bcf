//! What sessions begin with: `ALTER ROLE .. SET` and `ALTER DATABASE .. SET`, by a client or past pgweir, hold for who logs in
//! next, as on a direct connection.

use std::cell::Cell;
use std::time::{Duration, Instant};

use pgweir_harness::wait_until_async;
use pgweir_harness::wire::{Wire, build};

use crate::stage::{SOON, Stage, run, succeed, value};
use crate::support::{self, Place, primary};
use crate::transcript::unnamed;

/// Clients that hold every server connection of a pool of three between them.
async fn holders(stage: &Stage<'_>) -> Vec<Wire> {
    let mut all = Vec::new();
    for _ in 0..3 {
        let mut wire = stage.client().await;
        succeed(&mut wire, "BEGIN").await;
        all.push(wire);
    }
    all
}

/// The values that new clients find, on each server connection of a pool of three.
async fn found(stage: &Stage<'_>, setting: &str) -> Vec<String> {
    let mut values = Vec::new();
    let mut all = holders(stage).await;
    for wire in &mut all {
        values.push(value(wire, &format!("SHOW {setting}")).await);
        succeed(wire, "COMMIT").await;
    }
    values
}

#[test]
fn who_logs_in_finds_the_defaults_that_a_client_has_set_just_now() {
    let place = Place::on(primary());
    let name = place.name.clone();
    place.psql(&format!("ALTER DATABASE {name} OWNER TO {name}"));
    // Nobody looks for it: the statement itself is noticed.
    let stage = Stage::at(place, &[("default_pool_size", "3"), ("catalog_check_interval", "1h")], &[]);
    let simple = |text: String| vec![build::query(&text)];
    let ways = [
        ("simple", simple(format!("ALTER ROLE {name} SET work_mem = '1111kB'"))),
        ("by another word", simple(format!("alter user \"{name}\" set work_mem to '1112kB'"))),
        (
            "extended",
            vec![[unnamed(&format!("ALTER ROLE {name} SET work_mem = '1113kB'"), &[]), build::sync()].concat()],
        ),
        ("the database", simple(format!("ALTER ROLE {name} RESET ALL; ALTER DATABASE {name} SET work_mem = '1114kB'"))),
        (
            "in a transaction",
            ["BEGIN", &format!("ALTER ROLE {name} SET work_mem = '1115kB'"), "SELECT 1", "COMMIT"]
                .map(build::query)
                .into(),
        ),
        ("both", simple(format!("ALTER ROLE {name} IN DATABASE {name} SET work_mem = '1116kB'"))),
    ];
    run(Duration::from_mins(1), async {
        let mut one = stage.client().await;
        for (round, (way, messages)) in ways.iter().enumerate() {
            // All three are there, two of them idle, and one in use until after the change.
            let mut held = holders(&stage).await;
            let mut last = held.pop().unwrap();
            for wire in &mut held {
                succeed(wire, "COMMIT").await;
            }
            for message in messages {
                one.send(message).await.unwrap();
                let outcome = one.outcome().await.unwrap();
                assert_eq!(outcome.error, None, "{way}");
            }
            let want = format!("{}kB", 1111 + round);
            assert_eq!(value(&mut stage.client().await, "SHOW work_mem").await, want, "{way}, the next client");
            succeed(&mut last, "COMMIT").await;
            drop((held, last));
            assert_eq!(found(&stage, "work_mem").await, vec![want; 3], "{way}, on all server connections");
        }
        // What the next client is told at its login, too.
        succeed(&mut one, &format!("ALTER ROLE {name} SET TimeZone = 'Asia/Tokyo'")).await;
        let mut next = stage.client().await;
        assert_eq!(next.parameters["TimeZone"], "Asia/Tokyo");
        assert_eq!(value(&mut next, "SHOW TimeZone").await, "Asia/Tokyo");
        // What a client asked for at its start is its own, though it was the default then.
        let mut asked = stage.client_with(&[("TimeZone", "Asia/Tokyo"), ("client_encoding", "UTF8")]).await;
        assert_eq!(value(&mut asked, "SHOW TimeZone").await, "Asia/Tokyo");
        succeed(&mut one, &format!("ALTER ROLE {name} SET TimeZone = 'Asia/Seoul'")).await;
        assert_eq!(value(&mut stage.client().await, "SHOW TimeZone").await, "Asia/Seoul");
        assert_eq!(asked.parameters["TimeZone"], "Asia/Tokyo");
        assert_eq!(value(&mut asked, "SHOW TimeZone").await, "Asia/Tokyo");
        // Whoever asks for the same now is told so.
        let mut alike = stage.client_with(&[("TimeZone", "Asia/Tokyo"), ("client_encoding", "UTF8")]).await;
        assert_eq!(alike.parameters["TimeZone"], "Asia/Tokyo");
        assert_eq!(value(&mut alike, "SHOW TimeZone").await, "Asia/Tokyo");
        // What a client has set stays its own.
        succeed(&mut one, "SET work_mem = '2222kB'").await;
        succeed(&mut next, &format!("ALTER ROLE {name} RESET ALL")).await;
        assert_eq!(value(&mut one, "SHOW work_mem").await, "2222kB");
        // What is like it, and is none.
        found(&stage, "work_mem").await;
        let before = stage.backends();
        for text in ["CREATE TEMP TABLE role (a int)", "ALTER TABLE role SET (fillfactor = 50)", "DROP TABLE role"] {
            succeed(&mut one, text).await;
        }
        found(&stage, "work_mem").await;
        assert_eq!(stage.backends(), before);
    });
}

#[test]
fn who_logs_in_finds_before_long_the_defaults_that_were_set_elsewhere() {
    let stage = Stage::new(&[("default_pool_size", "3"), ("catalog_check_interval", "500ms")]);
    let name = stage.name().to_owned();
    let changes = [
        format!("ALTER ROLE {name} SET work_mem = '1111kB'"),
        format!("ALTER ROLE {name} RESET ALL; ALTER DATABASE {name} SET work_mem = '1112kB'"),
        format!("ALTER ROLE {name} IN DATABASE {name} SET work_mem = '1113kB'"),
    ];
    run(Duration::from_mins(1), async {
        for (round, change) in changes.iter().enumerate() {
            found(&stage, "work_mem").await;
            stage.sql(change);
            let want = vec![format!("{}kB", 1111 + round); 3];
            wait_until_async(SOON, async || found(&stage, "work_mem").await == want).await;
        }
        // A stranger's are nobody's business here.
        let before = stage.backends();
        stage.sql(&format!("CREATE ROLE {name}_stranger; ALTER ROLE {name}_stranger SET work_mem = '1114kB'"));
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert_eq!(found(&stage, "work_mem").await, ["1113kB"; 3]);
        assert_eq!(stage.backends(), before);
        let replaced = support::metric_in(
            &stage.pgweir.http_get("/metrics").unwrap().1,
            "pgweir_server_discards_total",
            &["reason=\"defaults\""],
        );
        assert!(replaced >= 9.0 - 0.5, "{replaced}");
        stage.sql(&format!("DROP ROLE {name}_stranger"));
    });
}

#[test]
fn a_role_that_changes_its_defaults_without_end_keeps_nobody_out_and_costs_few_logins() {
    const CHANGES: u32 = 200;
    const POOL: u32 = 4;
    let stage = Stage::new(&[("default_pool_size", "4"), ("catalog_check_interval", "1h"), ("audit_every", "0")]);
    let name = stage.name().to_owned();
    let start = Instant::now();
    run(Duration::from_mins(1), async {
        let mut one = stage.client().await;
        let over = Cell::new(false);
        let changes = async {
            for change in 1..=CHANGES {
                // What fails counts, too: whether the server has done it is not asked.
                let error = if change.is_multiple_of(2) { "; SELECT 1 / 0" } else { "" };
                let text = format!("ALTER ROLE {name} SET work_mem = '{}kB'{error}", 1000 + change);
                let outcome = one.query(&text).await.unwrap();
                assert_eq!(outcome.sqlstate(), if error.is_empty() { "" } else { "22012" });
            }
            over.set(true);
        };
        let logins = async {
            while !over.get() {
                assert_eq!(value(&mut stage.client().await, "SELECT 'in'").await, "in");
            }
        };
        tokio::join!(changes, logins);
        // The last change counts for all, all the same.
        let want = vec![format!("{}kB", 1000 + CHANGES - 1); 3];
        wait_until_async(SOON, async || found(&stage, "work_mem").await == want).await;
        // Several at once, then one a second.
        let most = f64::from(POOL) * (start.elapsed().as_secs_f64() + 10.0);
        let replaced = stage.metric("pgweir_server_discards_total");
        assert!(replaced > 0.5 && replaced < most, "{replaced} of {most}");
    });
}

//! What nobody thought of: random scripts are answered as Postgres answers them, random bytes hurt nobody.

use std::env;
use std::time::{Duration, Instant};

use pgweir_harness::wait_until;
use pgweir_harness::wire::build::{
    bind, close_portal, close_statement, copy_data, copy_done, copy_fail, describe_portal, describe_statement, execute,
    flush, message_lying, parse, query, sync,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::figures;
use crate::support::{SOON, Site, assert_value};
use crate::transcript::{Comparison, Script, unnamed};

/// How many random scripts, unless `PGWEIR_RANDOM_SCRIPTS` says otherwise.
const SCRIPTS: u64 = 200;
/// The same in the long tier.
const SCRIPTS_LONG: u64 = 5000;

/// From where a run counts its seeds: always the same, so that a failure is of the change and not of the day.
fn first_seed() -> u64 {
    number("PGWEIR_RANDOM_SEED").unwrap_or(1)
}

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// Texts with up to one parameter; some fail in one way or another.
const TEXTS: [&str; 16] = [
    "SELECT 'a'",
    "SELECT 'b', $1::text",
    "SELECT 1/$1::int",
    "SELECT 1/0",
    "SELEC",
    "",
    "BEGIN",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SELECT n FROM generate_series(1, 4) n",
    "SHOW TimeZone",
    "SET LOCAL TimeZone = 'Europe/Paris'",
    "SAVEPOINT s",
    "ROLLBACK TO s",
    "SELECT timestamptz '2024-01-01 00:00 UTC'",
];
const NAMES: [&str; 4] = ["", "s1", "s2", "pgweir_s1"];
const PORTALS: [&str; 3] = ["", "", "p"];

/// Messages that are answered with one `ReadyForQuery`.
type Batch = Vec<Vec<u8>>;

/// Batches that are written at once, in the order of the writes.
type Writes = Vec<Vec<Batch>>;

fn random_writes(random: &mut SmallRng) -> Writes {
    let mut left = false;
    let mut write = |random: &mut SmallRng| (0..random.random_range(1..4)).map(|_| batch(random, &mut left)).collect();
    (0..random.random_range(2..9)).map(|_| write(random)).collect()
}

/// Messages that end in a `Sync`, or a query.
///
/// `left`: in this session a query may have failed while it ran. Until the transaction is over Postgres keeps its portal, of which nothing but the name is
/// left: what executes the unnamed portal then and has not bound it seems to read memory that was freed, and may crash the server.
///
/// Source: `PostgreSQL` 15, measured; `exec_execute_message` in postgres.c, `AtAbort_Portals` in portalmem.c.
fn batch(random: &mut SmallRng, left: &mut bool) -> Batch {
    match random.random_range(0..10) {
        0 | 1 => {
            let text = pick(random, &TEXTS);
            match text {
                "ROLLBACK TO s" => *left = true,
                // No portal outlives its transaction.
                "COMMIT" | "ROLLBACK" => *left = false,
                _ => {}
            }
            vec![query(text)]
        }
        2 => {
            *left = true;
            vec![copy(random)]
        }
        _ => (0..random.random_range(0..7)).map(|_| message(random, *left)).chain([sync()]).collect(),
    }
}

fn script(seed: u64, writes: &Writes) -> Script {
    let name = format!("PGWEIR_RANDOM_SEED={seed}");
    writes.iter().fold(Script::new(name), |script, batches| script.send(&batches.concat()).ready(batches.len()))
}

/// Every way to leave out a little (a write, a batch, a message that is not its batch's last), or to write
/// in two goes what was written in one.
fn smaller(writes: &Writes) -> Vec<Writes> {
    let mut all = Vec::new();
    let mut but = |change: &dyn Fn(&mut Writes)| {
        let mut changed = writes.clone();
        change(&mut changed);
        all.push(changed);
    };
    for (w, batches) in writes.iter().enumerate().filter(|_| writes.len() > 1) {
        but(&|writes| drop(writes.remove(w)));
        for b in 0..batches.len() {
            but(&|writes| drop(writes[w].remove(b)));
        }
    }
    for (w, batches) in writes.iter().enumerate() {
        for b in 1..batches.len() {
            but(&|writes| {
                let rest = writes[w].split_off(b);
                writes.insert(w + 1, rest);
            });
        }
        for (b, messages) in batches.iter().enumerate() {
            for m in 1..messages.len() {
                but(&|writes| drop(writes[w][b].remove(m - 1)));
            }
        }
    }
    all.retain(|writes| writes.iter().all(|batches| !batches.is_empty()));
    all
}

/// The smallest script to be found in reasonable time that fresh pgweirs answer wrongly.
async fn shrink(comparison: &Comparison, seed: u64, mut writes: Writes) -> String {
    let end = Instant::now() + Duration::from_mins(1);
    let wrong = async |writes: &Writes| comparison.fresh().faults(&script(seed, writes)).await.concat();
    let mut fault = wrong(&writes).await;
    if fault.is_empty() {
        return format!("It takes what other clients did before. {:#?}", script(seed, &writes));
    }
    'again: loop {
        for less in smaller(&writes) {
            if Instant::now() > end {
                break 'again;
            }
            let still = wrong(&less).await;
            if !still.is_empty() {
                (writes, fault) = (less, still);
                continue 'again;
            }
        }
        break;
    }
    format!("{fault}{:#?}", script(seed, &writes))
}

/// A COPY with what belongs to it, sent ahead.
fn copy(random: &mut SmallRng) -> Vec<u8> {
    let table = pick(random, &["sink", "sink", "nowhere"]);
    let data = pick(random, &["1\n", "2\n3\n", "x\n", ""]);
    let end = if random.random_bool(0.7) { copy_done() } else { copy_fail("no") };
    [query(&format!("COPY {table} FROM STDIN")), copy_data(data.as_bytes()), end].concat()
}

fn message(random: &mut SmallRng, left: bool) -> Vec<u8> {
    let (name, portal) = (pick(random, &NAMES), pick(random, &PORTALS));
    let value: &[u8] = pick(random, &["0", "1", "x"]).as_bytes();
    let parameters: &[Option<&[u8]>] = if random.random_bool(0.3) { &[Some(value)] } else { &[] };
    match random.random_range(0..14) {
        0..4 => parse(name, pick(random, &TEXTS), &[]),
        4..7 => [bind(portal, name, parameters), execute(portal, 0)].concat(),
        7 => bind(portal, name, parameters),
        8 => execute(if left { "p" } else { portal }, random.random_range(0..3)),
        9 => describe_statement(name),
        10 => describe_portal(portal),
        11 => close_statement(name),
        12 => close_portal(portal),
        _ => flush(),
    }
}

fn pick<'a>(random: &mut SmallRng, from: &[&'a str]) -> &'a str {
    from[random.random_range(0..from.len())]
}

/// Plays scripts until one is answered wrongly, and then looks for the smallest that is.
async fn compare(first: u64, scripts: u64) {
    let comparison = Comparison::start("CREATE TABLE sink (id int)").await;
    for seed in first..first + number("PGWEIR_RANDOM_SCRIPTS").unwrap_or(scripts) {
        let writes = random_writes(&mut SmallRng::seed_from_u64(seed));
        let faults = comparison.faults(&script(seed, &writes)).await;
        if faults.is_empty() {
            continue;
        }
        panic!("{}\nshrunk to:\n{}", faults.concat(), shrink(&comparison, seed, writes).await);
    }
}

#[tokio::test]
async fn random_scripts_are_answered_as_postgres_answers_them() {
    compare(first_seed(), SCRIPTS).await;
}

#[tokio::test]
#[ignore = "long: other scripts in every run"]
async fn ever_new_random_scripts_are_answered_as_postgres_answers_them() {
    let unlike_before = rand::rng().random_range(1 << 20..1 << 40);
    let first = number("PGWEIR_RANDOM_SEED").unwrap_or(unlike_before);
    compare(first, SCRIPTS_LONG).await;
    let figures = format!("{SCRIPTS_LONG} scripts from seed {first} on, each played in three ways; differences: 0");
    figures::record("protocol::random", "ever_new_random_scripts_are_answered_as_postgres_answers_them", &figures);
}

#[tokio::test]
async fn random_bytes_neither_stop_pgweir_nor_reach_anybody_else() {
    const ROUNDS: u32 = 600;
    let site = Site::start(&[("default_pool_size", "2"), ("max_packet_size", "100000")]);
    let mut witness = site.client().await;
    let seed = first_seed();
    let mut random = SmallRng::seed_from_u64(seed);
    for round in 0..ROUNDS {
        let mut left = false;
        let mut bytes = [
            unnamed("SELECT $1::text", &[Some(b"x")]),
            sync(),
            batch(&mut random, &mut left).concat(),
            batch(&mut random, &mut left).concat(),
        ]
        .concat();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..4) {
                0 => bytes[at] = random.random_range(0..=255),
                1 => bytes.truncate(at.max(1)),
                2 => {
                    let lie = message_lying(random.random_range(0..=255), random.random_range(0..200), b"abc");
                    bytes.splice(at..at, lie);
                }
                _ => drop(bytes.remove(at)),
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
        let mut client = site.client().await;
        // It may be refused at once or wait for more of a message: both are fine.
        let _ = client.send(&bytes).await;
        let _ = client.recv_within(Duration::from_millis(2)).await;
        if random.random_bool(0.5) {
            client.abort().unwrap();
        } else {
            drop(client);
        }
        let tag = format!("{seed}.{round}");
        assert_value(&witness.extended("SELECT $1::text", &[Some(&tag)]).await.unwrap(), &tag);
    }
    // Give the counters a tick, then look whether anything broke inside.
    wait_until(SOON, || site.metric("pgweir_client_logins_total", &[]) > f64::from(ROUNDS));
    for series in ["pgweir_sessions_panicked_total", "pgweir_broken_invariants_total"] {
        let count = site.metric(series, &[]);
        assert!(count < 0.5, "PGWEIR_RANDOM_SEED={seed}: {series} is {count}");
    }
    assert!(site.place.servers() <= 2);
}

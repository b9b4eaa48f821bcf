//! Histories of registers that many clients write and read while replay is held back at random: no read sees less than its
//! level of freshness promises. And the checker is seen to find what it looks for.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgweir::mutant::Guard;
use pgweir_harness::wait_until;

use super::{Family, family};
use crate::figures;
use crate::guards;
use crate::stage::{Dice, SOON, Stage, run, succeed, value};
use crate::support::metric_in;

/// Clients of a history; each writes a register of its own, and reads those of all.
const CLIENTS: usize = 12;

/// How old a read may be at the level `bounded`.
const STALENESS: Duration = Duration::from_millis(100);

/// The levels that promise something.
const LEVELS: [&str; 4] = ["session", "pool", "bounded", "fleet"];

/// The levels whose promise hangs on where the primary was when a commit was acknowledged: an asynchronous one is in the
/// write-ahead log by then, and not yet on the disk, nor on its way to anybody.
const POSITIONED: [&str; 3] = ["session", "pool", "fleet"];

/// How a history's commits are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Commits {
    /// All as the server is set.
    Plain,
    /// Those of about half of the clients with `synchronous_commit = off`.
    Mixed,
}

impl Commits {
    /// What a client asks for when it logs in.
    fn parameters(self, dice: &mut Dice) -> &'static [(&'static str, &'static str)] {
        let is_asynchronous = self == Self::Mixed && dice.once_in(2);
        if is_asynchronous { &[("options", "-c synchronous_commit=off")] } else { &[] }
    }
}

/// What everybody knows of a history.
struct History {
    level: &'static str,
    commits: Commits,
    /// Of each register: what was acknowledged, and when.
    acknowledged: RefCell<Vec<Vec<(u64, Instant)>>>,
    reads_left: Cell<u64>,
    reads: Cell<u64>,
    stale: Cell<u64>,
    example: RefCell<String>,
}

impl History {
    /// One of how many turns of a client begins with a write. Where a read has to see what all have written, few would ever find
    /// it on a follower if somebody wrote all the time: so they are half of an ordinary history's, and more. That is enough to see
    /// by: replay is held back behind so many writes that without the check of positions more than a fourth of all reads see too
    /// little (`tests/long.md`), thousands of an ordinary history's; where it failed for one read in a thousand, some still would.
    fn turns_per_write(&self) -> u64 {
        if self.level == "pool" { 100 } else { 5 }
    }

    /// What a read of `register` by `reader` that begins now has to see at least.
    fn floor(&self, register: usize, reader: usize) -> u64 {
        let all = self.acknowledged.borrow();
        let told = &all[register];
        let last = told.last().map_or(0, |(value, _)| *value);
        match self.level {
            "session" if register != reader => 0,
            "bounded" => {
                let past = Instant::now().checked_sub(STALENESS).unwrap();
                told.iter().rev().find(|(_, at)| *at <= past).map_or(0, |(value, _)| *value)
            }
            // What nobody promises is looked for all the same.
            _ => last,
        }
    }
}

async fn play_client(stage: &Stage<'_>, history: &History, number: usize, seed: u64) {
    let mut dice = Dice::new(seed.wrapping_add(number as u64));
    let mut client = stage.client_with(history.commits.parameters(&mut dice)).await;
    let mut written = 0;
    while history.reads_left.get() > 0 {
        if dice.once_in(history.turns_per_write()) {
            written += 1;
            succeed(&mut client, &format!("UPDATE registers SET value = {written} WHERE id = {number}")).await;
            let mut all = history.acknowledged.borrow_mut();
            all[number].push((written, Instant::now()));
        }
        let register = dice.index(CLIENTS);
        let floor = history.floor(register, number);
        let sql = format!("SELECT value FROM registers WHERE id = {register}");
        let got: u64 = if dice.once_in(2) {
            value(&mut client, &sql).await.parse().unwrap()
        } else {
            let id = register.to_string();
            let outcome = client.extended("SELECT value FROM registers WHERE id = $1", &[Some(&id)]).await.unwrap();
            outcome.value().unwrap_or_else(|| panic!("{outcome:?}")).parse().unwrap()
        };
        history.reads_left.set(history.reads_left.get().saturating_sub(1));
        history.reads.set(history.reads.get() + 1);
        if got < floor {
            history.stale.set(history.stale.get() + 1);
            *history.example.borrow_mut() = format!("client {number} read {got} of register {register}, not {floor}");
        }
    }
}

/// What came of a history.
#[derive(Debug)]
struct Outcome {
    reads: u64,
    /// Of these on followers, about: what was published of them.
    elsewhere: f64,
    /// Those that saw less than was promised.
    stale: u64,
    example: String,
}

/// Plays a history of so many reads at this level.
fn play(
    family: &Family,
    level: &'static str,
    commits: Commits,
    reads: u64,
    kills: bool,
    mutant: Option<(Guard, &Path)>,
) -> Outcome {
    let seed = Dice::seed(level);
    let staleness = format!("{}ms", STALENESS.as_millis());
    let settings = [("read_freshness", level), ("read_max_staleness", &staleness)];
    let stage = family.stage_with(&settings, |options| match mutant {
        None => options,
        Some((guard, bin)) => guards::without(guard, bin, options),
    });
    stage.own_sql(&format!(
        "CREATE TABLE registers (id int PRIMARY KEY, value bigint); \
         INSERT INTO registers SELECT n, 0 FROM generate_series(0, {CLIENTS} - 1) n"
    ));
    stage.sql(&format!("ALTER ROLE {} RESET log_statement", stage.name()));
    for follower in &family.followers {
        family.primary.await_replay(follower, SOON).unwrap();
    }
    let history = History {
        level,
        commits,
        acknowledged: RefCell::new(vec![Vec::new(); CLIENTS]),
        reads_left: Cell::new(reads),
        reads: Cell::new(0),
        stale: Cell::new(0),
        example: RefCell::default(),
    };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let chaos = scope.spawn(|| disturb(family, seed, kills, &over));
        run(Duration::from_mins(20), async {
            // A quick machine would be through before a follower is known.
            family.until_routed(&mut stage.client().await).await;
            join_all((0..CLIENTS).map(|number| play_client(&stage, &history, number, seed))).await;
        });
        over.store(true, Ordering::Relaxed);
        chaos.join().unwrap();
    });
    // What followers count, they forget when they are killed. Published once a second.
    let on_followers = || {
        let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
        metric_in(&body, "pgweir_routes_total", &["reason=\"read\""])
    };
    wait_until(SOON, || on_followers() > 0.0);
    let elsewhere = on_followers();
    let example = history.example.into_inner();
    Outcome { reads: history.reads.get(), elsewhere, stale: history.stale.get(), example }
}

/// Holds replay back now and then, on one follower or the other; kills one now and then, too.
fn disturb(family: &Family, seed: u64, kills: bool, over: &AtomicBool) {
    let mut dice = Dice::new(seed ^ 0x5eed);
    while !over.load(Ordering::Relaxed) {
        let follower = dice.pick(&family.followers);
        if kills && dice.once_in(12) {
            follower.kill_hard();
            thread::sleep(dice.time_below(Duration::from_millis(50)));
            follower.restart().unwrap();
        } else {
            let act = if dice.once_in(3) { "pause" } else { "resume" };
            follower.psql("postgres", &format!("SELECT pg_wal_replay_{act}()")).unwrap();
        }
        thread::sleep(dice.time_below(Duration::from_millis(150)));
    }
    family.resume();
}

/// Each level holds what it promises; and reads do go to followers meanwhile.
fn hold(name: &str, levels: &[&'static str], commits: Commits, reads: u64, kills: bool) -> Vec<String> {
    let mut told = Vec::new();
    for &level in levels {
        let mut family = family();
        family.mend();
        let outcome = play(&family, level, commits, reads, kills, None);
        println!("{name}: {level}: {outcome:?}");
        assert_eq!(outcome.stale, 0, "{level}: {}", outcome.example);
        // What stays on the primary shows nothing. How many do not hangs on the machine: tens of percent if it has nothing else to do.
        let least = f64::from(u32::try_from(reads / 500).unwrap());
        assert!(outcome.reads >= reads && outcome.elsewhere > least, "{level}: {outcome:?}");
        told.push(format!("{level} {} reads, about {} on followers, 0 stale", outcome.reads, outcome.elsewhere));
    }
    told
}

#[test]
fn no_read_sees_less_than_its_level_of_freshness_promises() {
    hold("ordinary", &LEVELS, Commits::Plain, 10_000, true);
}

#[test]
fn no_read_misses_a_commit_that_was_acknowledged_before_it_was_on_the_disk() {
    hold("asynchronous", &POSITIONED, Commits::Mixed, 10_000, true);
}

#[test]
fn the_checker_finds_stale_reads_where_nothing_is_promised() {
    let mut family = family();
    family.mend();
    let outcome = play(&family, "eventual", Commits::Plain, 4_000, false, None);
    println!("{outcome:?}");
    assert!(outcome.stale > 0, "{outcome:?}");
}

#[test]
#[ignore = "long: 100 000 reads at each level"]
fn no_read_of_a_long_history_sees_less_than_its_level_of_freshness_promises() {
    const NAME: &str = "no_read_of_a_long_history_sees_less_than_its_level_of_freshness_promises";
    figures::record("routing", NAME, &hold(NAME, &LEVELS, Commits::Mixed, 100_000, true).join("; "));
}

#[test]
#[ignore = "long: builds pgweir once more"]
fn the_checker_catches_a_pooler_without_the_check_of_positions() {
    const NAME: &str = "the_checker_catches_a_pooler_without_the_check_of_positions";
    let bin = guards::mutant();
    let family = family();
    let outcome = play(&family, "pool", Commits::Plain, 20_000, false, Some((Guard::Freshness, &bin)));
    assert!(outcome.stale > 0, "{outcome:?}");
    figures::record(
        "routing",
        NAME,
        &format!("{} of {} reads saw too little: {}", outcome.stale, outcome.reads, outcome.example),
    );
}

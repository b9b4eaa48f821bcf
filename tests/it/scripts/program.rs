//! Random programs from a grammar: what they are answered has to be what Postgres answers, too. One that is not is shrunk
//! to the shortest that is not, in the scripts' own format.

use std::time::{Duration, Instant};

use super::Theatre;
use super::script::{Line, Notes, Script};
use crate::stage::Dice;

/// How many programs, unless `PGWEIR_RANDOM_SCRIPTS` says otherwise.
const PROGRAMS: u64 = 60;
/// Lines of one, at most.
const LINES_MAX: usize = 16;
/// How long a shorter one is looked for.
const SHRINKING: Duration = Duration::from_mins(1);

/// What may stand anywhere.
const ANYWHERE: &[&str] = &[
    "SET TimeZone = 'Asia/Kolkata'",
    "SET TimeZone = 'Europe/Paris'",
    "SET work_mem = '1MB'; SET lock_timeout = '3s'",
    "SET work_mem = 'nonsense'",
    "SET app.mine = 'one'",
    "SET LOCAL TimeZone = 'America/Lima'",
    "SET LOCAL app.mine = 'local'",
    "SELECT set_config('work_mem', '2MB', false)",
    "SELECT set_config('TimeZone', 'Asia/Tokyo', true)",
    "RESET TimeZone",
    "RESET ALL",
    "SET ROLE script_reader",
    "RESET ROLE",
    "SHOW TimeZone",
    "SELECT current_setting('work_mem'), current_setting('TimeZone'), current_user",
    "SELECT nullif(current_setting('app.mine', true), ''), current_setting('lock_timeout')",
    "BEGIN",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT s",
    "ROLLBACK TO s",
    "RELEASE s",
    "SELECT 1/0",
    "SELECT 1; SELECT 2",
    "INSERT INTO log VALUES ('x')",
    "SELECT count(*) FROM log",
    "\\prepare s1 SELECT $1::int, current_setting('TimeZone')",
    "\\prepare s2 SELECT current_user, $1::text",
    "\\exec s1 | 1",
    "\\exec s2 | x",
    "\\run SELECT $1::int + 1 | 1",
    "\\run SET work_mem = '3MB'",
    "SELECT pg_try_advisory_lock(1)",
    "SELECT pg_advisory_unlock(1)",
    "CREATE TEMP TABLE tt (a int)",
    "CREATE TEMP TABLE IF NOT EXISTS td (a int) ON COMMIT DROP",
    "INSERT INTO tt VALUES (1)",
    "SELECT count(*) FROM tt",
    "DROP TABLE tt",
    "DECLARE h CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id",
    "FETCH 2 FROM h",
    "CLOSE h",
    "DECLARE c CURSOR FOR SELECT id FROM t ORDER BY id",
    "FETCH 1 FROM c",
];

/// What may stand only outside of a transaction: inside it is refused, and what is refused is known to have effects.
const OUTSIDE: &[&str] = &["DISCARD ALL", "DEALLOCATE ALL", "DISCARD TEMP", "\\connect", "\\connect work_mem=5MB"];

/// What only one client may do: when another hears of it is a matter of time.
const ALONE: &[&str] =
    &["LISTEN here", "NOTIFY here, 'x'", "UNLISTEN here", "CLOSE ALL", "SELECT pg_advisory_xact_lock(5)"];

fn program(seed: u64) -> Script {
    let mut dice = Dice::new(seed);
    let crowded = dice.once_in(3);
    let (mut open, mut locks) = ([false; 2], false);
    let mut lines = Vec::new();
    for _ in 0..4 + dice.index(LINES_MAX - 3) {
        let client = if crowded { dice.index(2) } else { 0 };
        let kinds = match (open[client], crowded) {
            (false, false) => [ANYWHERE, OUTSIDE, ALONE].concat(),
            (false, true) => [ANYWHERE, OUTSIDE].concat(),
            (true, _) => ANYWHERE.to_vec(),
        };
        // What a session that has just left still holds is a matter of time, too.
        let leaves = |text: &str| text.starts_with("\\connect");
        let kinds: Vec<_> = kinds.into_iter().filter(|text| !(locks && leaves(text))).collect();
        let text = *dice.pick(&kinds);
        locks |= text.contains("pg_try_advisory_lock");
        match text {
            "BEGIN" => open[client] = true,
            "COMMIT" | "ROLLBACK" => open[client] = false,
            _ => {}
        }
        lines.push(Line::read(&format!("{}: {text}", ["a", "b"][client])).unwrap());
    }
    let setup = vec!["DELETE FROM log".to_owned()];
    let notes = Notes { pins: Some("it may".to_owned()), crowded, setup, ..Notes::default() };
    Script { title: format!("PGWEIR_RANDOM_SEED={seed}"), place: "random".to_owned(), notes, lines }
}

/// Leaves out one line after the other as long as what is left is still answered wrongly.
async fn shrink(theatre: &mut Theatre, mut script: Script, mut fault: String) -> String {
    let end = Instant::now() + SHRINKING;
    let mut at = 0;
    while at < script.lines.len() && script.lines.len() > 1 && Instant::now() < end {
        let mut less = script.clone();
        less.lines.remove(at);
        let still = theatre.differences(&less).await.0;
        if still.is_empty() {
            at += 1;
        } else {
            (script, fault, at) = (less, still, 0);
        }
    }
    let text: Vec<String> = script.lines.iter().map(|line| format!("{line:?}")).collect();
    format!("{}\n{}\n{fault}", script.title, text.join("\n"))
}

#[tokio::test]
async fn random_programs_are_answered_as_postgres_answers_them() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let first = number("PGWEIR_RANDOM_SEED").unwrap_or(1);
    let mut theatre = Theatre::open(&[]).await;
    for seed in first..first + number("PGWEIR_RANDOM_SCRIPTS").unwrap_or(PROGRAMS) {
        let script = program(seed);
        let (fault, _) = theatre.differences(&script).await;
        let shrunk = if fault.is_empty() { String::new() } else { shrink(&mut theatre, script, fault.clone()).await };
        assert!(fault.is_empty(), "{fault}\nshrunk to:\n{shrunk}");
    }
}

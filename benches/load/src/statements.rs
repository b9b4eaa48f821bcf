//! What an ORM's statements cost the database: thousands of texts that come once, a few that come all the time, and what
//! is left of them in the memory of the backends and of the pooler.
//!
//! Every contender gets the same: [`CLIENTS`] clients, each with its share of the texts, every one prepared under a name
//! of its own that is never closed; after each, one of the hot ones, prepared once by every client. Memory is read when
//! all clients stand still, before and after.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use pgweir_harness::Cluster;
use postgres_protocol::message::frontend;
use serde::Serialize;

use crate::fault::Fault;
use crate::login::{Account, Session};
use crate::machine::{CpuTime, anonymous_kib};
use crate::pooler::{Kind, Pooler, Program, Setup};
use crate::workload::bind;

/// Clients, and server connections of each pooler.
pub const CLIENTS: u32 = 20;

/// Texts that come once.
pub const TEXTS: u32 = 20_000;

/// Texts that come all the time.
pub const HOT: u32 = 10;

/// Literals in the list of each text.
const LIST: u32 = 30;

/// The modes of `prepared_statements`.
const MODES: [&str; 4] = ["adaptive", "rewrite", "strip", "session"];

/// Long enough for every client to get a server connection of its own.
const WARM_UP: &str = "SELECT pg_sleep(0.3)";

/// How long a pooler may take to give back what clients that left had.
const LEAVING: Duration = Duration::from_secs(2);

/// What one contender had and took.
#[derive(Clone, Debug, Serialize)]
pub struct Footprint {
    /// Who.
    pub contender: String,
    /// Server connections at the end.
    pub backends: usize,
    /// Growth of the anonymous memory of all backends, KiB.
    pub backends_kib: u64,
    /// Growth of the pooler's anonymous memory while all clients were there, KiB.
    pub pooler_kib: Option<u64>,
    /// The same when they had left.
    pub left_kib: Option<u64>,
    /// CPU time of the pooler per execution, microseconds.
    pub pooler_us: Option<f64>,
    /// CPU time of the backends per execution, microseconds.
    pub backends_us: f64,
    /// Executions per second.
    pub rate: f64,
}

/// Runs every contender, one after the other.
///
/// # Errors
///
/// The first [`Fault`].
pub fn run(
    cluster: &Cluster,
    server: &Account,
    programs: [&Program; 2],
    stop: &AtomicBool,
    tell: &mut dyn FnMut(&Footprint),
) -> Result<Vec<Footprint>, Fault> {
    let sql = format!(
        "CREATE TABLE IF NOT EXISTS items AS SELECT id, 'item ' || id AS name FROM generate_series(1, 1000) id;\
                       CREATE UNIQUE INDEX IF NOT EXISTS items_id ON items (id); GRANT SELECT ON items TO {}",
        server.user
    );
    psql(cluster, &server.database, &sql)?;
    let mut contenders: Vec<(String, Option<(&Program, Option<&str>)>)> = vec![("direct".to_owned(), None)];
    for program in programs {
        match program.kind {
            Kind::PgBouncer => contenders.push((program.version.clone(), Some((program, None)))),
            Kind::Pgweir => {
                contenders
                    .extend(MODES.map(|mode| (format!("{}, {mode}", program.version), Some((program, Some(mode))))));
            }
        }
    }
    let mut all = Vec::new();
    for (name, pooler) in contenders {
        if stop.load(Ordering::Relaxed) {
            return Err(Fault::Interrupted);
        }
        let setup = |mode| Setup { pool_size: CLIENTS, statements: mode, ..Setup::default() };
        let pooler = pooler.map(|(program, mode)| Pooler::start(program, server, setup(mode))).transpose()?;
        let footprint = measure(cluster, server, name, pooler.as_ref())?;
        tell(&footprint);
        all.push(footprint);
    }
    Ok(all)
}

fn measure(
    cluster: &Cluster,
    server: &Account,
    contender: String,
    pooler: Option<&Pooler>,
) -> Result<Footprint, Fault> {
    let account = pooler.map_or_else(|| server.clone(), |pooler| pooler.account(server));
    let mut sessions = (0..CLIENTS).map(|_| Session::open(&account)).collect::<Result<Vec<_>, _>>()?;
    together(&mut sessions, |_, session| session.exchange(&build(|out| frontend::query(WARM_UP, out))?).map(drop))?;
    let backends = backends(cluster, server)?;
    let memory = || backends.iter().map(|pid| anonymous_kib(*pid)).sum::<Result<u64, _>>();
    let pooler_memory = || pooler.map(|pooler| anonymous_kib(pooler.pid())).transpose();
    let cpu = || backends.iter().map(|pid| CpuTime::of(*pid).map(|cpu| cpu.total_ns)).sum::<Result<u64, _>>();
    let pooler_cpu = || pooler.map(|pooler| CpuTime::of(pooler.pid()).map(|cpu| cpu.total_ns)).transpose();

    let before = (memory()?, pooler_memory()?, cpu()?, pooler_cpu()?);
    let begun = Instant::now();
    together(&mut sessions, play)?;
    let took = begun.elapsed();
    let after = (memory()?, pooler_memory()?, cpu()?, pooler_cpu()?);

    let grown = |now: Option<u64>| now.zip(before.1).map(|(now, before)| now.saturating_sub(before));
    for session in sessions {
        session.terminate()?;
    }
    let left = settled(&pooler_memory)?;
    let per_execution = |ns: u64| micros(ns) / f64::from(2 * TEXTS);
    Ok(Footprint {
        contender,
        backends: backends.len(),
        backends_kib: after.0.saturating_sub(before.0),
        pooler_kib: grown(after.1),
        left_kib: grown(left),
        pooler_us: after.3.zip(before.3).map(|(after, before)| per_execution(after.saturating_sub(before))),
        backends_us: per_execution(after.2.saturating_sub(before.2)),
        rate: f64::from(2 * TEXTS) / took.as_secs_f64(),
    })
}

/// The smallest memory seen while the pooler puts away what its clients had.
fn settled(memory: &dyn Fn() -> Result<Option<u64>, Fault>) -> Result<Option<u64>, Fault> {
    let begun = Instant::now();
    let mut least = memory()?;
    while begun.elapsed() < LEAVING {
        std::thread::sleep(Duration::from_millis(50));
        least = memory()?.min(least);
    }
    Ok(least)
}

/// Lets every client do something, all at the same time, and waits for all.
fn together(
    sessions: &mut [Session],
    act: impl Fn(u32, &mut Session) -> Result<(), Fault> + Sync,
) -> Result<(), Fault> {
    std::thread::scope(|scope| {
        let act = &act;
        let numbered = (0..).zip(sessions);
        let threads: Vec<_> = numbered.map(|(number, session)| scope.spawn(move || act(number, session))).collect();
        // Each is waited for, whatever became of the others.
        let ended: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        let panicked = || Fault::Generator("a client panicked".to_owned());
        ended.into_iter().try_for_each(|end| end.map_err(|_| panicked())?)
    })
}

/// One client's part.
fn play(number: u32, session: &mut Session) -> Result<(), Fault> {
    let mut prepared = [false; HOT as usize];
    for text in (number..TEXTS).step_by(CLIENTS as usize) {
        let name = format!("text_{text}");
        prepare(session, &name, &list(text))?;
        execute(session, &name, u64::from(LIST))?;
        let hot = text / CLIENTS % HOT;
        let name = format!("hot_{hot}");
        if let Some(known) = prepared.get_mut(hot as usize).filter(|known| !**known) {
            *known = true;
            prepare(session, &name, &format!("SELECT id, name FROM items WHERE id = {}", hot + 1))?;
        }
        execute(session, &name, 1)?;
    }
    Ok(())
}

/// A text that no other number has.
fn list(number: u32) -> String {
    let mut sql = "SELECT id, name FROM items WHERE id IN (".to_owned();
    for place in 0..LIST {
        // Different ids, up to a thousand, and the number told by the first two.
        let id = match place {
            0 => number % 200,
            1 => 200 + number / 200,
            place => 400 + (place * 17 + number) % 31 * 19,
        };
        // Writing to a String cannot fail.
        let _ = write!(sql, "{}{}", if place == 0 { "" } else { ", " }, id + 1);
    }
    sql + ")"
}

/// As drivers do: Parse, Describe, Sync.
fn prepare(session: &mut Session, name: &str, sql: &str) -> Result<(), Fault> {
    let request = build(|out| {
        frontend::parse(name, sql, [], out)?;
        frontend::describe(b'S', name, out)?;
        frontend::sync(out);
        Ok(())
    })?;
    session.exchange(&request).map(drop)
}

fn execute(session: &mut Session, name: &str, rows: u64) -> Result<(), Fault> {
    let request = build(|out| {
        bind(name, out)?;
        frontend::execute("", 0, out)?;
        frontend::sync(out);
        Ok(())
    })?;
    let got = session.exchange(&request)?;
    if got == rows { Ok(()) } else { Err(Fault::Rows { transactions: 1, rows: got, want: rows }) }
}

fn build(messages: impl FnOnce(&mut BytesMut) -> std::io::Result<()>) -> Result<Vec<u8>, Fault> {
    let mut bytes = BytesMut::new();
    messages(&mut bytes).map_err(Fault::io("building a request"))?;
    Ok(bytes.to_vec())
}

/// The process ids of the backends that serve the application.
fn backends(cluster: &Cluster, server: &Account) -> Result<Vec<u32>, Fault> {
    let sql = format!("SELECT pid FROM pg_stat_activity WHERE usename = '{}'", server.user);
    let text = psql(cluster, &server.database, &sql)?;
    let read = |line: &str| line.trim().parse().map_err(|_| Fault::Postgres(format!("not a process id: {line}")));
    text.lines().filter(|line| !line.trim().is_empty()).map(read).collect()
}

fn psql(cluster: &Cluster, database: &str, sql: &str) -> Result<String, Fault> {
    cluster.psql(database, sql).map_err(|error| Fault::Postgres(error.to_string()))
}

/// The figures as a Markdown table.
#[must_use]
pub fn markdown(all: &[Footprint]) -> String {
    let direct = all.first().map_or(1, |direct| direct.backends_kib.max(1));
    let mut out = format!(
        "{TEXTS} statements with IN lists that come once, {HOT} that come as often, {CLIENTS} clients, \
         {CLIENTS} server connections:\n\n\
         | | server connections | memory of the backends, growth | of direct | memory of the pooler, growth | \
         when its clients have left | backends' CPU per execution | pooler's | executions per second |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    );
    let mib = |kib: Option<u64>| kib.map_or(String::new(), |kib| format!("{:.1} MiB", kibi(kib)));
    for one in all {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {:.1} % | {} | {} | {:.0} µs | {} | {:.0} |",
            one.contender,
            one.backends,
            mib(Some(one.backends_kib)),
            100.0 * kibi(one.backends_kib) / kibi(direct),
            mib(one.pooler_kib),
            mib(one.left_kib),
            one.backends_us,
            one.pooler_us.map_or(String::new(), |us| format!("{us:.1} µs")),
            one.rate,
        );
    }
    out
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn kibi(count: u64) -> f64 {
    count as f64 / 1024.0
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_text_is_another_and_finds_as_many_rows() {
        let texts: BTreeSet<_> = (0..TEXTS).map(list).collect();
        assert_eq!(texts.len(), TEXTS as usize);
        for text in texts.iter().step_by(97) {
            let ids: BTreeSet<u32> = text.split(['(', ')', ',', ' ']).filter_map(|word| word.parse().ok()).collect();
            assert_eq!(ids.len(), LIST as usize, "{text}");
            assert!(ids.iter().all(|id| (1..=1000).contains(id)), "{text}");
        }
    }

    #[test]
    fn the_table_holds_growth_against_direct() {
        let one = |contender: &str, kib, pooler| Footprint {
            contender: contender.to_owned(),
            backends: 20,
            backends_kib: kib,
            pooler_kib: pooler,
            left_kib: pooler,
            pooler_us: None,
            backends_us: 30.0,
            rate: 1000.0,
        };
        let table = markdown(&[one("direct", 20_480, None), one("pooler", 1024, Some(512))]);
        assert!(table.contains("| direct | 20 | 20.0 MiB | 100.0 % |  |  | 30 µs |  | 1000 |"), "{table}");
        assert!(table.contains("| pooler | 20 | 1.0 MiB | 5.0 % | 0.5 MiB | 0.5 MiB |"), "{table}");
    }
}

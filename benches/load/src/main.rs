//! `pgweir-load`: see the library's documentation.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pgweir_harness::{APP_DATABASE, APP_PASSWORD, APP_USER, Auth, Cluster, ClusterOptions};
use pgweir_load::fault::Fault;
use pgweir_load::followers;
use pgweir_load::generate::{self, Order, Spec};
use pgweir_load::login::Account;
use pgweir_load::machine::Context;
use pgweir_load::mix;
use pgweir_load::pooler::Program;
use pgweir_load::report::{Method, Report, RowReport};
use pgweir_load::rows::{self, Measure, Row};
use pgweir_load::statements::{self, Footprint};
use pgweir_load::syscalls::Tool;
use pgweir_load::trial::{Plan, postmaster};
use pgweir_load::workload::Workload;

/// Compares pgweir's CPU time per transaction with PgBouncer's, window by window on the same machine.
#[derive(Debug, Parser)]
#[allow(clippy::doc_markdown, reason = "these are the words of --help, where backticks would show")]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    inner: Option<Inner>,
    /// Rows to run; a name ending in * takes every row that begins so. Default: all
    #[arg(long, num_args = 1.., value_name = "NAME")]
    row: Vec<String>,
    /// Only list the rows
    #[arg(long)]
    list: bool,
    /// PgBouncer's program. Default: from PATH or /usr/sbin, where Debian's package puts it
    #[arg(long, env = "PGBOUNCER", value_name = "PROGRAM")]
    pgbouncer: Option<PathBuf>,
    /// pgweir's program. Default: beside this one
    #[arg(long, env = "PGWEIR_BIN", value_name = "PROGRAM")]
    pgweir: Option<PathBuf>,
    /// Two programs, each either pooler, instead of PgBouncer and pgweir: the ratio is B's to A's
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    compare: Vec<PathBuf>,
    /// Instead of the rows: what thousands of prepared statements leave in the memory of server and pooler
    #[arg(long, conflicts_with_all = ["row", "server", "compare"])]
    statements: bool,
    /// Other rows, without PgBouncer: pgweir against itself without a look at simple queries. Wants a pgweir that was built with
    /// --features mutant, which can leave that out
    #[arg(long, conflicts_with_all = ["server", "compare", "statements"])]
    inspection: bool,
    /// Other rows, without PgBouncer: reads on two followers against all on the primary
    #[arg(long, conflicts_with_all = ["server", "compare", "statements", "inspection"])]
    followers: bool,
    /// Pairs of windows per row
    #[arg(long, default_value_t = 25)]
    pairs: usize,
    /// 5 pairs per row
    #[arg(long, conflicts_with = "pairs")]
    quick: bool,
    /// Length of a window
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Load before a window, not counted
    #[arg(long, default_value_t = 0.5, value_name = "SECONDS")]
    warm_up: f64,
    /// Cores other processes may use on average in a window that counts
    #[arg(long, default_value_t = 0.25, value_name = "CORES")]
    others: f64,
    /// Per row, how long windows may be repeated in which other processes used more than that
    #[arg(long, default_value_t = 180.0, value_name = "SECONDS")]
    patience: f64,
    /// Seed of the order of windows. Default: random, told in the JSON
    #[arg(long)]
    seed: Option<u64>,
    /// A running Postgres on this machine with role, database and password of the harness, instead of a private one
    #[arg(long, value_name = "HOST:PORT")]
    server: Option<SocketAddr>,
    /// Leave something out
    #[arg(long, value_enum, value_name = "WHAT")]
    without: Vec<Extra>,
    /// Write everything there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables there; they are printed anyway
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// What a run can do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Extra {
    /// The windows of the first pairs that go straight to Postgres, for context
    Direct,
    /// System calls per transaction
    Syscalls,
}

#[derive(Debug, Subcommand)]
enum Inner {
    /// The load generator's process; the benchmark starts it itself
    #[command(hide = true, name = pgweir_load::generator::SUBCOMMAND)]
    Generate {
        /// What it does, as JSON
        spec: String,
    },
}

/// Set by SIGINT or SIGTERM; looked at between windows, so that everything started is stopped in order.
static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("pgweir-load: {fault}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Fault> {
    if let Some(Inner::Generate { spec }) = &arguments.inner {
        let spec: Spec = serde_json::from_str(spec).map_err(|error| Fault::Generator(error.to_string()))?;
        return generate::serve(&spec);
    }
    if arguments.followers {
        return run_followers(arguments);
    }
    let all = if arguments.inspection { rows::inspection() } else { rows::all() };
    let mut rows = rows::select(all, &arguments.row).map_err(|name| no_row(&name))?;
    if arguments.list {
        for row in &rows {
            println!("{}", row.name);
        }
        return Ok(());
    }
    if !arguments.compare.is_empty() {
        // The bars are pgweir's against PgBouncer.
        for row in &mut rows {
            row.bar = None;
        }
    }
    raise_file_limit()?;
    watch_signals()?;
    let (baseline, subject) = programs(arguments)?;
    if !baseline.prepares() {
        if arguments.statements {
            let reason = "has no prepared statements in transaction mode; name 1.21 or newer by PGBOUNCER".to_owned();
            return Err(Fault::Program { path: baseline.path, reason });
        }
        eprintln!("without the rows of prepared statements: {} has none in transaction mode", baseline.version);
        rows.retain(|row| row.measure != Measure::Cpu(Workload::Prepared));
    }
    let (server, cluster) = server(arguments)?;
    if let (true, Some(cluster)) = (arguments.statements, &cluster) {
        return run_statements(arguments, cluster, &server, [&baseline, &subject]);
    }
    if let (true, Some(cluster)) = (arguments.inspection, &cluster) {
        for sql in [mix::table(APP_USER).as_str(), "VACUUM ANALYZE accounts"] {
            cluster.psql(APP_DATABASE, sql).map_err(|error| Fault::Postgres(error.to_string()))?;
        }
    }
    let postmaster = postmaster(&server)?;
    let plan = Plan {
        server,
        baseline,
        subject,
        direct: !arguments.without.contains(&Extra::Direct),
        order: Order { warm_up: seconds(arguments.warm_up)?, window: seconds(arguments.seconds)? },
        pairs: if arguments.quick { 5 } else { arguments.pairs.max(1) },
        patience: seconds(arguments.patience)?,
        others_at_most: arguments.others,
        tool: if arguments.without.contains(&Extra::Syscalls) { None } else { Tool::find() },
        seed: arguments.seed.unwrap_or_else(rand::random),
        ours: [std::process::id()].into_iter().chain(postmaster).collect(),
        stop: &STOP,
    };
    let mut report = Report { context: Context::read(), method: method(&plan, cluster.as_ref()), rows: Vec::new() };
    let outcome = run_rows(&plan, &rows, &mut report);
    // What ran before a fault or a signal is told all the same.
    if !report.rows.is_empty() {
        write(arguments, &report)?;
    }
    outcome
}

fn no_row(name: &str) -> Fault {
    Fault::Program { path: PathBuf::from("--row"), reason: format!("no row is named {name}; --list lists them") }
}

fn run_rows(plan: &Plan, rows: &[Row], report: &mut Report) -> Result<(), Fault> {
    let windows = rows.iter().filter(|row| matches!(row.measure, Measure::Cpu(_))).count() * plan.pairs * 2;
    let each = plan.order.warm_up + plan.order.window;
    let estimate = each * u32::try_from(windows).unwrap_or(u32::MAX);
    eprintln!("{} against {}", plan.subject.version, plan.baseline.version);
    eprintln!("{} rows, {windows} windows, at least {} min", rows.len(), estimate.as_secs().div_ceil(60));
    for row in rows {
        let trial = plan.run(row, &mut |progress| eprintln!("{}: {progress}", row.name))?;
        let row_report = RowReport::new(row, trial, plan.others_at_most);
        eprintln!("{}: {}", row.name, Report::line(&row_report, row.measure));
        report.rows.push(row_report);
    }
    Ok(())
}

fn run_statements(
    arguments: &Arguments,
    cluster: &Cluster,
    server: &Account,
    programs: [&Program; 2],
) -> Result<(), Fault> {
    let mut tell =
        |one: &Footprint| eprintln!("{}: {} KiB in {} backends", one.contender, one.backends_kib, one.backends);
    let all = statements::run(cluster, server, programs, &STOP, &mut tell)?;
    let json = serde_json::to_string_pretty(&all).map_err(|error| Fault::Generator(error.to_string()))?;
    put(arguments, &statements::markdown(&all), &json)
}

fn run_followers(arguments: &Arguments) -> Result<(), Fault> {
    let scenarios = followers::select(&arguments.row).map_err(|name| no_row(&name))?;
    if arguments.list {
        for scenario in &scenarios {
            println!("{}", scenario.name);
        }
        return Ok(());
    }
    raise_file_limit()?;
    watch_signals()?;
    let plan = followers::Plan {
        program: Program::identify(&beside(arguments)?)?,
        order: Order { warm_up: seconds(arguments.warm_up)?, window: seconds(arguments.seconds)? },
        rounds: if arguments.quick { 5 } else { arguments.pairs.max(1) },
        patience: seconds(arguments.patience)?,
        others_at_most: arguments.others,
        seed: arguments.seed.unwrap_or_else(rand::random),
        stop: &STOP,
    };
    let mut report = plan.report();
    let outcome = plan.run(&scenarios, &mut report, &mut |progress| eprintln!("{progress}"));
    // What ran before a fault or a signal is told all the same.
    if !report.scenarios.is_empty() {
        let json = serde_json::to_string_pretty(&report).map_err(|error| Fault::Generator(error.to_string()))?;
        put(arguments, &report.markdown(), &json)?;
    }
    outcome
}

/// pgweir's program.
fn beside(arguments: &Arguments) -> Result<PathBuf, Fault> {
    if let Some(named) = &arguments.pgweir {
        return Ok(named.clone());
    }
    let here = std::env::current_exe().map_err(Fault::io("finding this program"))?;
    Ok(here.with_file_name("pgweir"))
}

fn programs(arguments: &Arguments) -> Result<(Program, Program), Fault> {
    if let [a, b] = arguments.compare.as_slice() {
        let (mut a, mut b) = (Program::identify(a)?, Program::identify(b)?);
        a.version = format!("A: {}", a.version);
        b.version = format!("B: {}", b.version);
        return Ok((a, b));
    }
    if arguments.inspection {
        let subject = Program::identify(&beside(arguments)?)?;
        let baseline = subject.without("Inspection")?;
        let baseline = Program { version: "pgweir without inspection".to_owned(), ..baseline };
        return Ok((baseline, subject));
    }
    Ok((pgbouncer(arguments.pgbouncer.as_deref())?, Program::identify(&beside(arguments)?)?))
}

fn pgbouncer(named: Option<&Path>) -> Result<Program, Fault> {
    if let Some(path) = named {
        return Program::identify(path);
    }
    let usual = ["pgbouncer", "/usr/sbin/pgbouncer"].into_iter().map(Path::new);
    usual.map(Program::identify).find(Result::is_ok).unwrap_or_else(|| {
        let reason = "not found; install the package pgbouncer, or name one by PGBOUNCER or --pgbouncer".to_owned();
        Err(Fault::Program { path: PathBuf::from("pgbouncer"), reason })
    })
}

fn server(arguments: &Arguments) -> Result<(Account, Option<Cluster>), Fault> {
    let account = |addr| Account {
        addr,
        user: APP_USER.to_owned(),
        password: APP_PASSWORD.to_owned(),
        database: APP_DATABASE.to_owned(),
        tls: false,
        options: String::new(),
    };
    if let Some(addr) = arguments.server {
        return Ok((account(addr), None));
    }
    // JIT and autovacuum would only add noise.
    let options = ClusterOptions::auth(Auth::Scram).set("jit", "off").set("autovacuum", "off");
    let cluster = Cluster::start(options).map_err(|error| Fault::Postgres(error.to_string()))?;
    Ok((account(cluster.addr()), Some(cluster)))
}

fn method(plan: &Plan, cluster: Option<&Cluster>) -> Method {
    let postgres =
        cluster.map_or("Postgres".to_owned(), |cluster| format!("Postgres {}", cluster.programs().version()));
    Method {
        baseline: plan.baseline.version.clone(),
        subject: plan.subject.version.clone(),
        postgres,
        syscalls: plan.tool.map(Tool::name),
        pairs: plan.pairs,
        window_seconds: plan.order.window.as_secs_f64(),
        others_at_most: plan.others_at_most,
        warm_up_seconds: plan.order.warm_up.as_secs_f64(),
        seed: plan.seed,
    }
}

fn write(arguments: &Arguments, report: &Report) -> Result<(), Fault> {
    let json = serde_json::to_string_pretty(report).map_err(|error| Fault::Generator(error.to_string()))?;
    put(arguments, &report.markdown(), &json)
}

/// Prints the tables, and writes what was asked for.
fn put(arguments: &Arguments, markdown: &str, json: &str) -> Result<(), Fault> {
    println!("{markdown}");
    for (path, text) in [(&arguments.markdown, markdown), (&arguments.json, json)] {
        if let Some(path) = path {
            std::fs::write(path, text).map_err(Fault::io("writing the figures"))?;
        }
    }
    Ok(())
}

fn seconds(value: f64) -> Result<Duration, Fault> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| Fault::Io { what: "reading a number of seconds", source: std::io::ErrorKind::InvalidInput.into() })
}

/// Thousands of clients need as many descriptors, here and in the poolers, which inherit the limit.
fn raise_file_limit() -> Result<(), Fault> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(Fault::errno("asking for the limit of open files"))?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(Fault::errno("raising the limit of open files"))
}

fn watch_signals() -> Result<(), Fault> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(Fault::io("watching signals"))?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        let interrupt = signal(SignalKind::interrupt()).map_err(Fault::io("watching signals"))?;
        (interrupt, signal(SignalKind::terminate()).map_err(Fault::io("watching signals"))?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        STOP.store(true, Ordering::Relaxed);
    });
    Ok(())
}

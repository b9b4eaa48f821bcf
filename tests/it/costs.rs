//! What a transaction and an idle client may cost, measured on the release build: user instructions, system calls,
//! memory. None of these depends much on how busy the machine is. Each has a bar and a committed figure in
//! `costs.toml`. And the size of the program, which has a bar.

mod scraping;

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::query;
use pgweir_harness::{Pgweir, PgweirOptions};
use tokio::sync::Mutex;

use crate::crowd::{ACCOUNTS, Crowd, Script, Way};
use crate::exec::wrapped::Wrapping;
use crate::routing::Family;
use crate::support::{PASSWORD, Place, SOON, metric_in, options, primary};
use crate::tls::client::{self, TlsClient};
use crate::tls::pki::{Authority, Folder, self_signed};
use crate::tls::{TlsPrimary, show};

/// User instructions per transaction of 16 clients with simple queries, at most: what is committed has to meet it. What is
/// measured depends by some 2 % on how much is found by each `epoll_wait`, and is held against what is committed.
const INSTRUCTIONS_BAR: f64 = 4500.0;

/// System calls per transaction at 16 clients when none waits for a server connection, at most.
const SYSCALLS_UNQUEUED_BAR: f64 = 4.2;

/// System calls per transaction at 16 clients when six wait, at most.
const SYSCALLS_QUEUED_BAR: f64 = 4.8;

/// Anonymous memory per idle client, at most; KiB.
const IDLE_KIB_BAR: f64 = 1.1;

/// Idle clients whose memory is measured.
const IDLE_CLIENTS: usize = 5000;

/// Anonymous memory per idle TLS client, at most; KiB.
const IDLE_TLS_KIB_BAR: f64 = 4.0;

/// How far that figure may be from the committed one, a share of it: what holes there are is partly luck.
const TLS_MEMORY_TOLERANCE: f64 = 0.1;

/// Idle TLS clients whose memory is measured.
const IDLE_TLS_CLIENTS: usize = 1000;

/// Rounds in which something is counted, at most; see [`Fewest`].
const ROUNDS: u32 = 8;

/// From the start of `pgweir exec` to the first word of its command, at most; milliseconds.
const EXEC_START_MS_BAR: f64 = 20.0;

/// Resident memory of a `pgweir exec` that has server connections with TLS and so many clients that have just worked, at most;
/// MiB, and of it its own (anonymous) part. The rest are pages of files, which the kernel maps around what is touched.
const EXEC_RSS_MIB_BARS: [(usize, f64, f64); 3] = [(0, 12.0, 2.0), (100, 12.0, 4.0), (500, 24.0, 8.0)];

/// The same at rest, when the pages of the program's file that nobody needs were given back.
const EXEC_IDLE_RSS_MIB_BAR: f64 = 8.0;

/// The program as it is shipped: with the grammar, without symbols and line tables; bytes, at most.
const STRIPPED_BYTES_BAR: u64 = 15_000_000;

/// What the grammar adds to it, at most: C that does not change with this program.
const GRAMMAR_BYTES: u64 = 2_850_000;

/// How far the figures may be from the committed ones; shares of these.
const INSTRUCTION_TOLERANCE: f64 = 0.05;
const SYSCALL_TOLERANCE: f64 = 0.02;
const MEMORY_TOLERANCE: f64 = 0.05;

/// These tests would be each other's disturbance.
static ALONE: Mutex<()> = Mutex::const_new(());

/// A line in the log per client is not what is measured.
const QUIET: [(&str, &str); 2] = [("log_connections", "false"), ("log_disconnections", "false")];

/// The release build: `PGWEIR_RELEASE_BIN`, else built here.
fn release() -> &'static Path {
    static RELEASE: OnceLock<PathBuf> = OnceLock::new();
    RELEASE.get_or_init(|| built("PGWEIR_RELEASE_BIN", &[]))
}

/// The same with the grammar, which takes a minute or two to build: `PGWEIR_GRAMMAR_BIN`, else built here.
fn release_with_grammar() -> &'static Path {
    static RELEASE: OnceLock<PathBuf> = OnceLock::new();
    RELEASE.get_or_init(|| built("PGWEIR_GRAMMAR_BIN", &["--features", "grammar", "--target-dir", "target/grammar"]))
}

/// The program that the variable names, else one that is built here.
fn built(variable: &str, arguments: &[&str]) -> PathBuf {
    if let Some(given) = env::var_os(variable) {
        return PathBuf::from(given);
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--release", "--locked", "-p", "pgweir", "--no-default-features", "--bin", "pgweir"]);
    cargo.args(arguments);
    cargo.args(["--message-format", "json"]).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    let built = cargo.stderr(Stdio::inherit()).output().unwrap();
    assert!(built.status.success(), "{cargo:?}: {}", built.status);
    let messages = String::from_utf8(built.stdout).unwrap();
    executable(&messages).unwrap_or_else(|| panic!("no program in {messages}"))
}

/// The program that Cargo says it has built.
///
/// Source: the Cargo book, "External tools", "Artifact messages".
fn executable(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut programs = messages.filter_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)));
    programs.next_back()
}

/// The committed figure of that name.
fn committed(name: &str) -> f64 {
    let lines = include_str!("costs.toml").lines().filter_map(|line| line.split_once('='));
    let mut found = lines.filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().parse().unwrap());
    found.next().unwrap_or_else(|| panic!("{name} is not in costs.toml"))
}

/// Tells a figure and what is wrong with it. Whoever commits new figures reads them there:
/// `cargo test -p pgweir costs:: -- --nocapture`.
fn check(name: &str, measured: f64, bar: f64, tolerance: f64) -> Vec<String> {
    eprintln!("{name} = {measured:.2}");
    let faults = faults(measured, committed(name), bar, tolerance);
    faults.into_iter().map(|fault| format!("{name} = {measured:.2} is {fault}")).collect()
}

/// What is wrong with a figure: it is above its bar, or further from the committed one than `tolerance`, a share of it.
fn faults(measured: f64, committed: f64, bar: f64, tolerance: f64) -> Vec<String> {
    let mut faults = Vec::new();
    if measured > bar {
        faults.push(format!("above its bar, {bar}"));
    }
    if (measured - committed).abs() > committed * tolerance {
        faults.push(format!("more than {:.0} % from {committed} in costs.toml", tolerance * 100.0));
    }
    faults
}

#[track_caller]
fn assert_none(faults: &[String]) {
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn ratio(count: u64, of: usize) -> f64 {
    count as f64 / of as f64
}

/// The fewest of some rounds. What can be more or less is the number of `epoll_wait`s and what goes with them: when the
/// clients do not get enough of the machine, there is less to be found by each. So the rounds end when the figure is as
/// good as the committed one, and its bar is met.
struct Fewest {
    figure: f64,
    enough: f64,
    rounds: u32,
}

impl Fewest {
    fn of(name: &str, bar: f64, tolerance: f64) -> Self {
        let committed = committed(name);
        let enough = committed * (1.0 + tolerance);
        // A bar that the committed figure misses is not going to be met by trying again.
        let enough = if committed <= bar { enough.min(bar) } else { enough };
        Self { figure: f64::INFINITY, enough, rounds: 0 }
    }

    fn wants_more(&self) -> bool {
        self.figure > self.enough && self.rounds < ROUNDS
    }

    fn add(&mut self, figure: f64) {
        self.rounds += 1;
        self.figure = self.figure.min(figure);
    }
}

/// pgweir under callgrind.
struct Callgrind<'a> {
    place: Place<'a>,
    pgweir: Pgweir,
    profiles: u32,
    _certificates: Folder,
}

impl<'a> Callgrind<'a> {
    fn start(program: &Path, place: Place<'a>, settings: &[(&str, &str)]) -> Self {
        let folder = Folder::new();
        let (cert, key) = folder.identity("server", &Authority::root("the root").issue(|_| {}));
        let own = [
            // With as many as there are clients, no login to the server falls into what is counted.
            ("default_pool_size", "16"),
            ("min_pool_size", "16"),
            ("client_tls_sslmode", "prefer"),
            ("client_tls_cert_file", show(&cert)),
            ("client_tls_key_file", show(&key)),
        ];
        let toml = place.toml(&[&QUIET[..], &own, settings].concat());
        let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/costs/callgrind");
        let program = ("PROGRAM".to_owned(), program.to_str().unwrap().to_owned());
        let pgweir = Pgweir::start_with(PgweirOptions { toml, bin: Some(bin), env: vec![program], args: Vec::new() });
        Self { place, pgweir: pgweir.unwrap(), profiles: 0, _certificates: folder }
    }

    /// The instructions since the last call.
    ///
    /// Source: the Valgrind manual, §6.5 "Callgrind Monitor Commands", and §3.4 of the format's description.
    fn instructions(&mut self) -> u64 {
        let pid = format!("--pid={}", self.pgweir.pid());
        let dump = Command::new("vgdb").args([&pid, "dump"]).output().unwrap();
        assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
        self.profiles += 1;
        let path = self.pgweir.config_path().with_file_name(format!("callgrind.{}", self.profiles));
        let profile = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let total = profile.lines().find_map(|line| line.strip_prefix("totals: ").or(line.strip_prefix("summary: ")));
        total.unwrap_or_else(|| panic!("no total in {}", path.display())).trim().parse().unwrap()
    }

    /// User instructions per transaction.
    async fn measure(&mut self, name: &str, bar: f64, way: Way, clients: usize, script: Script) -> f64 {
        let transactions = 3000;
        let mut crowd = Crowd::gather_with(way, self.pgweir.addr(), &self.place.name, clients, &script).await;
        let mut script = crowd.run(script, 500).await;
        let mut fewest = Fewest::of(name, bar, INSTRUCTION_TOLERANCE);
        while fewest.wants_more() {
            self.instructions();
            script = crowd.run(script, transactions).await;
            fewest.add(ratio(self.instructions(), transactions));
        }
        fewest.figure
    }
}

#[tokio::test]
async fn user_instructions_per_transaction_stay_within_their_bar() {
    let _alone = ALONE.lock().await;
    let mut callgrind = Callgrind::start(release(), Place::on(primary()), &[]);
    let begun = Instant::now();
    // The first client's login is what makes the pool open its server connections.
    let first = Crowd::gather(callgrind.pgweir.addr(), &callgrind.place.name, 1, &Script::simple()).await;
    while callgrind.place.servers() < 16 {
        assert!(begun.elapsed() < SOON, "{} server connections", callgrind.place.servers());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(first);
    let none = f64::INFINITY;
    let mut all = Vec::new();
    for (name, bar, way, clients, script) in [
        ("instructions_simple_1", none, Way::Plain, 1, Script::simple()),
        ("instructions_simple_16", none, Way::Plain, 16, Script::simple()),
        ("instructions_extended_16", none, Way::Plain, 16, Script::extended()),
        ("instructions_prepared_16", none, Way::Plain, 16, Script::prepared()),
        ("instructions_tls_16", none, Way::Tls, 16, Script::simple()),
    ] {
        let measured = callgrind.measure(name, bar, way, clients, script).await;
        all.extend(check(name, measured, bar, INSTRUCTION_TOLERANCE));
    }
    assert_none(&all);
    assert!(committed("instructions_simple_16") <= INSTRUCTIONS_BAR);
}

/// What it costs to know where a transaction may run: the same load with followers and without. What is read of a follower
/// needs to be of no particular time, so that how fast the machine is changes nothing.
#[test]
#[ignore = "long: builds pgweir once more"]
fn user_instructions_of_routed_transactions_stay_what_they_were() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _alone = runtime.block_on(ALONE.lock());
    // No read gives way to the replay.
    let family = Family::with_delay("-1");
    let followers = family.list();
    let (small, bare) = (stripped(release_with_grammar()), stripped(release()));
    assert!(small <= STRIPPED_BYTES_BAR && small <= bare + GRAMMAR_BYTES, "{small} bytes, {bare} without the grammar");
    let routing =
        |mode| [("databases.PLACE.followers", &*followers), ("read_routing", mode), ("read_freshness", "eventual")];
    let mut all = Vec::new();
    for (way, settings) in [("off", &[][..]), ("stays", &routing("hinted")), ("goes", &routing("auto"))] {
        let place = family.place();
        place.psql(&format!("ALTER ROLE {0} SET log_statement = 'none'; SET ROLE {0}; {ACCOUNTS}", place.name));
        let mut callgrind = Callgrind::start(release_with_grammar(), place, settings);
        for (kind, script) in [("literals", Script::literals()), ("prepared", Script::parameters())] {
            let name = format!("instructions_{way}_{kind}");
            let none = f64::INFINITY;
            let measured = runtime.block_on(callgrind.measure(&name, none, Way::Plain, 16, script));
            all.extend(check(&name, measured, none, INSTRUCTION_TOLERANCE));
        }
        let on_followers = metric(&callgrind.pgweir, "pgweir_routes_total", "reason=\"read\"");
        assert_eq!(on_followers > 0.0, way == "goes", "{way}: {on_followers} reads on followers");
    }
    assert_none(&all);
}

/// The sum of a metric's samples with this label.
fn metric(pgweir: &Pgweir, name: &str, label: &str) -> f64 {
    let (status, body) = pgweir.http_get("/metrics").unwrap();
    assert_eq!(status, 200, "{body}");
    metric_in(&body, name, &[label])
}

/// The release build before a place of its own.
fn start(place: &Place<'_>, settings: &[(&str, &str)]) -> Pgweir {
    let toml = place.toml(&[&QUIET[..], settings].concat());
    Pgweir::start_with(PgweirOptions { bin: Some(release().to_owned()), ..options(toml) }).unwrap()
}

/// `strace -f -c` on a process, which it stops at every call: the process is then what everything else waits for, and
/// each `epoll_wait` finds as much as there can be.
struct Strace {
    child: Child,
    messages: BufReader<ChildStderr>,
}

impl Strace {
    fn attach(pid: u32) -> Self {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-c", "-p", &pid.to_string()]).env("LC_ALL", "C");
        let mut child = strace.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("strace, from `make deps`");
        let mut messages = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        messages.read_line(&mut line).unwrap();
        assert!(line.contains(" attached"), "{line}");
        Self { child, messages }
    }

    /// The calls since it was attached.
    fn detach(mut self) -> u64 {
        let kill = format!("kill -INT {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        let mut table = String::new();
        self.messages.read_to_string(&mut table).unwrap();
        self.child.wait().unwrap();
        calls(&table).unwrap_or_else(|| panic!("no total in {table}"))
    }
}

/// The total of a table of `strace -c`.
fn calls(table: &str) -> Option<u64> {
    let total = table.lines().rfind(|line| line.ends_with(" total"))?;
    total.split_ascii_whitespace().nth(3)?.parse().ok()
}

/// System calls per transaction of 16 clients.
async fn syscalls(name: &str, bar: f64, pool_size: &str) -> f64 {
    let transactions = 3000;
    let place = Place::on(primary());
    let pgweir = start(&place, &[("default_pool_size", pool_size)]);
    let script = Script::simple();
    let mut crowd = Crowd::gather(pgweir.addr(), &place.name, 16, &script).await;
    let mut script = crowd.run(script, transactions).await;
    let mut fewest = Fewest::of(name, bar, SYSCALL_TOLERANCE);
    while fewest.wants_more() {
        let strace = Strace::attach(pgweir.pid());
        script = crowd.run(script, transactions).await;
        fewest.add(ratio(strace.detach(), transactions));
    }
    fewest.figure
}

#[tokio::test]
async fn system_calls_per_transaction_stay_within_their_bars() {
    let _alone = ALONE.lock().await;
    let mut all = Vec::new();
    for (name, bar, pool_size) in
        [("syscalls_pool_20", SYSCALLS_UNQUEUED_BAR, "20"), ("syscalls_pool_10", SYSCALLS_QUEUED_BAR, "10")]
    {
        let measured = syscalls(name, bar, pool_size).await;
        all.extend(check(name, measured, bar, SYSCALL_TOLERANCE));
    }
    assert_none(&all);
}

/// KiB per idle client.
async fn idle(way: Way) -> f64 {
    let place = Place::on(primary());
    let pgweir = start(&place, &[("default_pool_size", "20"), ("max_client_conn", "10000")]);
    let script = Script::simple();
    // The first clients, the server connections and what is allocated once do not count.
    let mut first = Crowd::gather_with(way, pgweir.addr(), &place.name, 20, &script).await;
    let script = first.run(script, 2000).await;
    let before = pgweir.rss_anon_kib().unwrap();
    let idle = Crowd::gather_with(way, pgweir.addr(), &place.name, IDLE_CLIENTS, &script).await;
    let grown = pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    drop(idle);
    ratio(grown, IDLE_CLIENTS)
}

#[tokio::test]
async fn an_idle_client_costs_little_memory() {
    let _alone = ALONE.lock().await;
    allow_files(IDLE_CLIENTS + 1000);
    let mut all = check("idle_kib", idle(Way::Plain).await, IDLE_KIB_BAR, MEMORY_TOLERANCE);
    all.extend(check("idle_newest_kib", idle(Way::Newest).await, IDLE_KIB_BAR, MEMORY_TOLERANCE));
    assert_none(&all);
}

#[tokio::test]
async fn an_idle_tls_client_costs_little_memory_after_a_large_transaction_too() {
    let _alone = ALONE.lock().await;
    allow_files(IDLE_TLS_CLIENTS + 1000);
    let place = Place::on(primary());
    let folder = Folder::new();
    let (cert, key) = folder.identity("server", &Authority::root("the root").issue(|_| {}));
    let tls =
        [("client_tls_sslmode", "require"), ("client_tls_cert_file", show(&cert)), ("client_tls_key_file", show(&key))];
    let pgweir = start(&place, &tls);
    let config = client::config(&["postgresql"], &[&rustls::version::TLS13]);
    let gather = |clients: usize| -> Vec<TlsClient> {
        let one = |_| {
            let mut client = TlsClient::on(client::granted(pgweir.addr()), &config).unwrap();
            client.log_in(&place.name);
            assert_eq!(client.value("SELECT repeat('x', 300000)").len(), 300_000);
            client
        };
        (0..clients).map(one).collect()
    };
    let first = gather(20);
    let before = pgweir.rss_anon_kib().unwrap();
    let idle = gather(IDLE_TLS_CLIENTS);
    let grown = pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    drop((first, idle));
    let measured = ratio(grown, IDLE_TLS_CLIENTS);
    assert_none(&check("idle_tls_kib", measured, IDLE_TLS_KIB_BAR, TLS_MEMORY_TOLERANCE));
}

/// Bytes of a program without its symbols and line tables, with which it still runs.
fn stripped(program: &Path) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("pgweir");
    let strip = Command::new("strip").arg("-o").arg(&small).arg(program).output().unwrap();
    assert!(strip.status.success(), "{}", String::from_utf8_lossy(&strip.stderr));
    let runs = Command::new(&small).arg("--version").output().unwrap();
    assert!(runs.status.success(), "{runs:?}");
    let bytes = fs::metadata(&small).unwrap().len();
    eprintln!("{} has {bytes} bytes without its symbols", program.display());
    bytes
}

#[test]
fn the_program_is_small_without_its_symbols() {
    let bytes = stripped(release());
    assert!(bytes <= STRIPPED_BYTES_BAR - GRAMMAR_BYTES, "{bytes}");
}

#[tokio::test]
async fn the_command_of_exec_starts_soon_and_its_wrapper_stays_small() {
    let _alone = ALONE.lock().await;
    let mut soonest = f64::INFINITY;
    for _ in 0..20 {
        let begun = Instant::now();
        let wrapped =
            Wrapping::of(release(), &["exec", "echo", "started"]).var("DATABASE_URL", "postgres://u:p@h/d").start();
        wrapped.await_said("started");
        soonest = soonest.min(begun.elapsed().as_secs_f64() * 1000.0);
        wrapped.finish().well();
    }
    eprintln!("exec_start_ms = {soonest:.2}");
    let primary = TlsPrimary::take();
    primary.show(&self_signed(|_| {}));
    let place = Place::on(&primary.0);
    let psql = place.cluster.programs().program("psql");
    let script =
        format!("{} -XAtqc 'SELECT 1' \"$DATABASE_URL\"; echo \"at $DATABASE_URL\"; read line; true", psql.display());
    let url = format!("postgres://{0}:{PASSWORD}@{1}/{0}?sslmode=require", place.name, place.cluster.addr());
    let wrapped = Wrapping::of(release(), &["exec", "sh", "-c", &script]).var("DATABASE_URL", &url).start();
    wrapped.await_said("at postgres://");
    let said = wrapped.said();
    let pooled: std::net::SocketAddr = said.split_once('@').unwrap().1.split('/').next().unwrap().parse().unwrap();
    let (mut clients, mut faults) = (Vec::new(), Vec::new());
    for (wanted, bar, own_bar) in EXEC_RSS_MIB_BARS {
        while clients.len() < wanted {
            clients.push(Wire::open(pooled, &place.name, &place.name, PASSWORD).await.unwrap());
        }
        // All of them at once, so that every server connection is at work.
        for _ in 0..3 {
            for client in &mut clients {
                client.send(&query("SELECT repeat('x', 1000), pg_sleep(0.001)")).await.unwrap();
            }
            for client in &mut clients {
                assert_eq!(client.outcome().await.unwrap().rows.len(), 1);
            }
        }
        let (all, own) = resident(wrapped.pid());
        eprintln!("exec_rss_mib with {wanted} clients = {all:.2} (bar {bar}), its own {own:.2}");
        if all > bar || own > own_bar {
            faults.push(format!("{all} MiB resident with {wanted} clients, {own} its own"));
        }
        if wanted == 0 {
            let since = Instant::now();
            while resident(wrapped.pid()).0 > EXEC_IDLE_RSS_MIB_BAR && since.elapsed() < SOON {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let (all, own) = resident(wrapped.pid());
            eprintln!("exec_idle_rss_mib = {all:.2} (bar {EXEC_IDLE_RSS_MIB_BAR}), its own {own:.2}");
            if all > EXEC_IDLE_RSS_MIB_BAR {
                faults.push(format!("{all} MiB resident at rest"));
            }
        }
    }
    drop(clients);
    wrapped.finish().well();
    assert!(soonest <= EXEC_START_MS_BAR, "{soonest} ms to the command's first word");
    assert_none(&faults);
}

/// Resident memory of a process, all of it and its own (anonymous) part; MiB.
fn resident(pid: i32) -> (f64, f64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mib = |key: &str| -> f64 {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
    };
    (mib("VmRSS:"), mib("RssAnon:"))
}

/// Raises this process's limit on open files if it is lower: every client has one here.
fn allow_files(files: usize) {
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let [soft, hard]: [&str; 2] = line.split_whitespace().take(2).collect::<Vec<_>>().try_into().unwrap();
    if soft.parse().is_ok_and(|soft: usize| soft < files) {
        let pid = std::process::id().to_string();
        let raise = Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={hard}:{hard}")]).status();
        assert!(raise.unwrap().success(), "open files: {soft}, at most {hard}; {files} are needed");
    }
}

#[test]
fn a_figure_is_held_against_its_bar_and_the_committed_one() {
    #[rustfmt::skip]
    let table = [
        ("the same",         100.0, f64::INFINITY, 0),
        ("within tolerance", 104.0, f64::INFINITY, 0),
        ("worse",            106.0, f64::INFINITY, 1),
        ("better",            94.0, f64::INFINITY, 1),
        ("at the bar",       100.0, 100.0,         0),
        ("above the bar",    102.0, 101.0,         1),
        ("above both",       106.0, 101.0,         2),
    ];
    for (name, measured, bar, want) in table {
        let faults = faults(measured, 100.0, bar, 0.05);
        assert_eq!(faults.len(), want, "{name}: {faults:?}");
    }
}

#[test]
fn the_total_of_strace_is_its_column_of_calls() {
    let table = "% time     seconds  usecs/call     calls    errors syscall\n\
                 ------ ----------- ----------- --------- --------- ----------------\n\
                  60.00    0.003000           3      1000           sendto\n\
                  40.00    0.002000           2      1001         5 recvfrom\n\
                 ------ ----------- ----------- --------- --------- ----------------\n\
                 100.00    0.005000           2      2001         5 total\n";
    assert_eq!(calls(table), Some(2001));
    assert_eq!(calls(&table.replace("        5 total", "          total")), Some(2001));
    assert_eq!(calls("strace: attach: ptrace(PTRACE_SEIZE, 7): Operation not permitted\n"), None);
}

//! The oracle: many clients with small pools, each of which knows what every answer must be. Every query carries the
//! client's own tag; every setting, statement name, lock, temporary table, channel and cursor that a client could
//! see of another is looked for.
//!
//! | module | what |
//! |---|---|
//! | this one | the tests, and the play: threads, kills, the accounts at the end |
//! | `actor` | one client: its connection, and how it asks |
//! | `acts` | what a client does in transaction mode |
//! | `belongings` | what a client does with state that stays in a server connection |
//! | `model` | what a client's settings must be |
//!
//! `PGWEIR_ORACLE` sets the number of transactions (with belongings: of operations) of a play, `PGWEIR_SEED` repeats the choices of an earlier run (not its timing),
//! `PGWEIR_ORACLE_WITHOUT=Set,Look` leaves acts or settings out to narrow a violation down.
//! The oracle is itself tested: it must agree with Postgres without a pooler, and it must fail on builds of pgweir that
//! lack one of the things that keep clients apart.

mod actor;
mod acts;
mod belongings;
mod model;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pgweir::mutant::Guard;
use pgweir_harness::wire::{Wire, build};
use pgweir_harness::{Auth, Cluster, ClusterOptions, Pgweir, PgweirOptions, wait_until};
use tokio::task::{JoinSet, LocalSet};

use crate::figures;
use crate::guards::{self, mutant};
use crate::stage::{Dice, SOON, Stage, read_to_end, run, succeed, value};
use crate::support::{self, PASSWORD, Place, primary};
use actor::{Account, Actor};
use acts::Act;
use model::Setting;

/// Clients of a play.
const CLIENTS: usize = 64;
/// Threads that play them.
const THREADS: usize = 2;
/// Sizes of the pools, over which the clients are spread.
const POOLS: [u32; 4] = [1, 2, 4, 8];

/// What the length of a play is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Transactions, also of several statements.
    Transactions,
    /// Statements whose answers were checked.
    Operations,
}

/// How often a long play looks whether there are too many server connections: each look costs as much as a transaction.
/// One of ordinary length looks ten times as often.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The longest plays of ordinary length; transactions, and operations.
const ORDINARY: u64 = 200_000;
const ORDINARY_OPERATIONS: u64 = 500_000;

/// Clean check-ins of which one is audited all the same, in a long play and in one of ordinary length: an audit costs as much
/// as five transactions.
const AUDIT_EVERY: [&str; 2] = ["50", "7"];

/// What every client of a play knows.
pub(crate) struct Play {
    /// Where clients connect.
    addr: SocketAddr,
    /// The role, which is also the database's real name and the prefix of the other roles.
    name: String,
    /// Databases to connect to; a client keeps to one.
    databases: Vec<String>,
    password: &'static str,
    /// What clients do, as often as it is in here.
    acts: Vec<Act>,
    /// What clients set.
    settings: Vec<Setting>,
    /// The server's own values of the settings.
    defaults: BTreeMap<Setting, String>,
    /// Whether backends are killed meanwhile, so that clients may be told so.
    kills: bool,
    /// What is counted.
    unit: Unit,
    /// How many of them are still to be done.
    left: AtomicU64,
    /// Set with the first violation: everybody stops.
    over: AtomicBool,
    violations: Mutex<Vec<String>>,
}

impl Play {
    fn new(addr: SocketAddr, place: &Place<'_>, acts: &[(Act, usize)], length: u64, unit: Unit) -> Self {
        set_the_scene(place);
        let settings: Vec<Setting> = Setting::ALL.into_iter().filter(|setting| !is_left_out(setting)).collect();
        Self {
            addr,
            name: place.name.clone(),
            databases: vec![place.name.clone()],
            password: PASSWORD,
            acts: acts
                .iter()
                .filter(|(act, _)| !is_left_out(act))
                .flat_map(|(act, times)| vec![*act; *times])
                .collect(),
            defaults: settings.iter().map(|setting| (*setting, setting.default_at(place))).collect(),
            settings,
            kills: false,
            unit,
            left: AtomicU64::new(length),
            over: AtomicBool::new(false),
            violations: Mutex::new(Vec::new()),
        }
    }

    /// Whether there is more to do.
    pub(crate) fn goes_on(&self) -> bool {
        self.left.load(Ordering::Relaxed) > 0 && !self.over.load(Ordering::Relaxed)
    }

    /// Counts an answer: whether a transaction is over with it, and to how many statements it is.
    pub(crate) fn count(&self, is_over: bool, statements: usize) {
        let done = match self.unit {
            Unit::Transactions => u64::from(is_over),
            Unit::Operations => statements as u64,
        };
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(done)));
    }

    /// Ends the play with what a client saw and must not have seen.
    pub(crate) fn violated(&self, what: String) {
        self.over.store(true, Ordering::Relaxed);
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// Plays to the end. What was played, or the violation, if there was one.
    fn perform(self, place: &Place<'_>, seed: u64) -> Result<String, String> {
        let start = Instant::now();
        let length = self.left.load(Ordering::Relaxed);
        let play = Arc::new(self);
        let killer = play.kills.then(|| {
            let (play, role) = (Arc::clone(&play), place.name.clone());
            let cluster = place.cluster;
            (play, role, cluster)
        });
        let (accounts, kills) = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|number| {
                    let play = Arc::clone(&play);
                    scope.spawn(move || play_some(&play, number, seed))
                })
                .collect();
            let killer = killer.map(|(play, role, cluster)| {
                scope.spawn(move || {
                    let mut dice = Dice::new(seed ^ 0xdead);
                    let kill = format!(
                        "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity \
                         WHERE usename = '{role}' ORDER BY random() LIMIT 1) victim"
                    );
                    let mut kills = 0_u64;
                    while play.goes_on() {
                        thread::sleep(Duration::from_millis(20 + dice.below(400)));
                        kills += cluster.psql("postgres", &kill).unwrap().parse::<u64>().unwrap();
                    }
                    kills
                })
            });
            let accounts: Vec<Account> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
            (accounts, killer.map_or(0, |killer| killer.join().unwrap()))
        });
        // The first is the clearest; the others may be its consequences.
        let violations = play.violations.lock().unwrap_or_else(PoisonError::into_inner);
        if !violations.is_empty() {
            let shown: Vec<&str> = violations.iter().take(3).map(String::as_str).collect();
            return Err(format!("PGWEIR_SEED={seed}: {} violations\n{}", violations.len(), shown.join("\n\n")));
        }
        let mut total = Account::default();
        for account in &accounts {
            check_ledger(place, account)?;
            total.add(account);
        }
        let took = start.elapsed();
        let rate = u128::from(length) * 1000 / took.as_millis().max(1);
        let unit = match play.unit {
            Unit::Transactions => "transactions",
            Unit::Operations => "operations",
        };
        let played = format!(
            "{length} {unit} in {:.0} s ({rate} a second), {kills} backends killed, {total}; violations: 0",
            took.as_secs_f64()
        );
        println!("{played}");
        Ok(played)
    }
}

/// One thread's clients, from login to the end.
fn play_some(play: &Arc<Play>, thread: usize, seed: u64) -> Vec<Account> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = LocalSet::new();
    runtime.block_on(local.run_until(async {
        let mut tasks = JoinSet::new();
        for number in (thread..CLIENTS).step_by(THREADS) {
            let seed = seed.wrapping_mul(1000).wrapping_add(u64::try_from(number).unwrap());
            let actor = Actor::new(Arc::clone(play), number, Dice::new(seed));
            tasks.spawn_local(actor.play());
        }
        tasks.join_all().await
    }))
}

/// Compares what a client knows to have committed with what is there.
fn check_ledger(place: &Place<'_>, account: &Account) -> Result<(), String> {
    let sql = format!("SELECT count(*), coalesce(sum(n), 0) FROM ledger WHERE client = {}", account.client);
    let found = place.psql(&sql);
    let (count, sum) = found.split_once('|').unwrap();
    let (count, sum): (u64, u64) = (count.parse().unwrap(), sum.parse().unwrap());
    let least = account.committed;
    let most = least + account.unknown;
    let right = (least..=most).contains(&count) && (account.unknown > 0 || sum == account.committed_sum);
    if right { Ok(()) } else { Err(format!("{account:?}: {count} rows with sum {sum} are in the ledger")) }
}

/// Schemas, tables, roles and sequences of a play.
fn set_the_scene(place: &Place<'_>) {
    place.psql("CREATE TABLE public.ledger (client int, n bigint); GRANT ALL ON public.ledger TO PUBLIC");
    for schema in model::SCHEMAS {
        let quoted = format!("\"{}\"", schema.replace('"', "\"\""));
        place.psql(&format!(
            "CREATE SCHEMA IF NOT EXISTS {quoted}; CREATE TABLE {quoted}.place (name text); \
             INSERT INTO {quoted}.place VALUES ('{schema}'); \
             GRANT USAGE ON SCHEMA {quoted} TO PUBLIC; GRANT SELECT ON {quoted}.place TO PUBLIC"
        ));
    }
    for role in model::roles(&place.name) {
        place.psql(&format!("CREATE ROLE {role}; GRANT {role} TO {}", place.name));
    }
    place.psql(&format!(
        "DO $$ BEGIN FOR client IN 0..{} LOOP \
         EXECUTE format('CREATE SEQUENCE public.sequence%s START %s', client, (client + 1) * 1000000); \
         EXECUTE format('GRANT ALL ON public.sequence%s TO PUBLIC', client); END LOOP; END $$",
        CLIENTS - 1
    ));
}

fn length(default: u64) -> u64 {
    std::env::var("PGWEIR_ORACLE").ok().and_then(|count| count.parse().ok()).unwrap_or(default)
}

/// Whether `PGWEIR_ORACLE_WITHOUT` names this act or setting: to narrow a violation down.
fn is_left_out(what: &impl fmt::Debug) -> bool {
    let without = std::env::var("PGWEIR_ORACLE_WITHOUT").unwrap_or_default();
    without.split(',').any(|name| name == format!("{what:?}"))
}

/// A stage whose clients choose between pools of [`POOLS`]' sizes.
fn several_pools(is_long: bool, change: impl FnOnce(PgweirOptions) -> PgweirOptions) -> (Stage<'static>, Vec<String>) {
    let place = Place::on(primary());
    let port = place.cluster.port().to_string();
    let [long, ordinary] = AUDIT_EVERY;
    let audit_every = if is_long { long } else { ordinary };
    let mut settings: Vec<(String, String)> =
        vec![("query_wait_timeout".into(), "20s".into()), ("audit_every".into(), audit_every.into())];
    let mut databases = Vec::new();
    for size in POOLS {
        let database = format!("{}_{size}", place.name);
        let pairs = [
            ("host", "127.0.0.1"),
            ("port", &port),
            ("dbname", &place.name),
            ("user", &place.name),
            ("password", PASSWORD),
        ];
        for (key, value) in pairs {
            settings.push((format!("databases.{database}.{key}"), value.to_owned()));
        }
        settings.push((format!("databases.{database}.pool_size"), size.to_string()));
        databases.push(database);
    }
    let settings: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let pgweir = Pgweir::start_with(change(support::options(place.toml(&settings)))).unwrap();
    (Stage { place, pgweir }, databases)
}

/// Plays transaction mode with everything that may happen to it. What was played.
fn play_transactions(test: &str, transactions: u64) -> String {
    let seed = Dice::seed(test);
    let is_long = transactions > ORDINARY;
    let (stage, databases) = several_pools(is_long, |options| options);
    let cap = POOLS.iter().sum();
    let every = if is_long { LOOK_EVERY } else { LOOK_EVERY / 10 };
    let watch = stage.place.cap_watch_every(cap, every);
    let play = Play::new(stage.addr(), &stage.place, acts::TRANSACTIONS, transactions, Unit::Transactions);
    let play = Play { kills: true, databases, ..play };
    let played = play.perform(&stage.place, seed).unwrap_or_else(|violation| panic!("{violation}"));
    let samples = watch.samples();
    format!("{played}; at most {} server connections in {samples} samples, cap {cap}", watch.finish())
}

/// Plays with state that stays in a server connection, and with everything that may happen to that. What was played.
fn play_belongings(test: &str, operations: u64) -> String {
    let seed = Dice::seed(test);
    let (stage, databases) = several_pools(operations > ORDINARY_OPERATIONS, |options| options);
    let play = Play::new(stage.addr(), &stage.place, belongings::BELONGINGS, operations, Unit::Operations);
    let play = Play { kills: true, databases, ..play };
    play.perform(&stage.place, seed).unwrap_or_else(|violation| panic!("{violation}"))
}

#[test]
fn every_answer_is_ones_own() {
    play_transactions("every_answer_is_ones_own", length(ORDINARY));
}

#[test]
#[ignore = "long: 10 million transactions"]
fn every_answer_is_ones_own_ten_million_times() {
    const NAME: &str = "every_answer_is_ones_own_ten_million_times";
    figures::record("isolation", NAME, &play_transactions(NAME, length(10_000_000)));
}

#[test]
fn what_stays_in_a_server_connection_is_nobody_elses() {
    play_belongings("what_stays_in_a_server_connection_is_nobody_elses", length(ORDINARY_OPERATIONS));
}

#[test]
#[ignore = "long: 10 million operations"]
fn what_stays_in_a_server_connection_is_nobody_elses_ten_million_times() {
    const NAME: &str = "what_stays_in_a_server_connection_is_nobody_elses_ten_million_times";
    figures::record("isolation", NAME, &play_belongings(NAME, length(10_000_000)));
}

#[test]
fn the_oracle_agrees_with_postgres_itself() {
    let seed = Dice::seed("the_oracle_agrees_with_postgres_itself");
    // Without passwords: logins after kills would take most of the time.
    let cluster = Cluster::start(ClusterOptions::auth(Auth::Trust)).unwrap();
    let place = Place::on(&cluster);
    let all: Vec<(Act, usize)> = acts::TRANSACTIONS.iter().chain(belongings::BELONGINGS).copied().collect();
    let play = Play::new(place.cluster.addr(), &place, &all, 20_000, Unit::Transactions);
    let play = Play { kills: true, ..play };
    if let Err(violation) = play.perform(&place, seed) {
        panic!("{violation}");
    }
}

#[test]
#[ignore = "long: builds pgweir once more"]
fn the_oracle_catches_a_pooler_that_lacks_any_of_its_guards() {
    const NAME: &str = "the_oracle_catches_a_pooler_that_lacks_any_of_its_guards";
    let seed = Dice::seed(NAME);
    let bin = mutant();
    let table = [
        (Guard::Release, "the check at release", acts::TRANSACTIONS),
        (Guard::Journal, "the replay of settings", acts::TRANSACTIONS),
        (Guard::Inspection, "a look at simple queries", acts::TRANSACTIONS),
        (Guard::Taint, "audits", acts::TRANSACTIONS),
        (Guard::Pins, "pins", belongings::BELONGINGS),
        (Guard::Sequences, "forgetting what sequences gave", belongings::BELONGINGS),
    ];
    let mut caught = Vec::new();
    for (guard, what, acts) in table {
        let (stage, databases) = several_pools(false, |options| guards::without(guard, &bin, options));
        stage.pgweir.audits_may_find();
        let play = Play::new(stage.addr(), &stage.place, acts, 100_000, Unit::Transactions);
        let play = Play { databases, ..play };
        let outcome = play.perform(&stage.place, seed);
        let violation = outcome.expect_err(&format!("the oracle sees nothing wrong with a build without {what}"));
        println!("without {what}: {violation}");
        let count = violation.split(' ').nth(1).unwrap_or_default();
        caught.push(format!("{what}: {count}"));
    }
    let caught =
        format!("builds without something, at most 100000 transactions each, violations of {}", caught.join(", "));
    figures::record("isolation", NAME, &caught);
}

#[test]
fn clients_with_different_roles_take_turns() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    set_the_scene(&stage.place);
    run(Duration::from_mins(1), async {
        let mut plain = stage.client().await;
        let mut others = Vec::new();
        for role in model::roles(stage.name()) {
            let mut client = stage.client().await;
            succeed(&mut client, "BEGIN; SET work_mem = '3MB'").await;
            succeed(&mut client, &format!("SET ROLE {role}; SET LOCAL app.tenant = 'mine'")).await;
            succeed(&mut client, "COMMIT").await;
            assert_eq!(value(&mut client, "SELECT current_user").await, role);
            others.push((client, role));
        }
        for _ in 0..10 {
            assert_eq!(value(&mut plain, "SELECT current_user").await, stage.name());
            for (client, role) in &mut others {
                assert_eq!(value(client, "SELECT current_user").await, *role);
                assert_eq!(value(&mut plain, "SELECT current_user").await, stage.name());
                let outcome = client.extended("SELECT current_user", &[]).await.unwrap();
                assert_eq!(outcome.value(), Some(role.as_str()), "{outcome:?}");
            }
        }
        // Now all at once, so that each waits for the server connection that another has just set up for itself.
        for _ in 0..20 {
            for (client, _) in &mut others {
                client.send(&build::query("SELECT current_user")).await.unwrap();
            }
            plain.send(&build::query("SELECT current_user")).await.unwrap();
            for (client, role) in &mut others {
                assert_eq!(client.outcome().await.unwrap().value(), Some(role.as_str()));
            }
            assert_eq!(plain.outcome().await.unwrap().value(), Some(stage.name()));
        }
        let (first, _) = &mut others[0];
        succeed(first, "RESET ROLE").await;
        assert_eq!(value(first, "SELECT current_user").await, stage.name());
    });
}

#[test]
fn a_reset_goes_back_to_what_the_client_logged_in_with() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    let wanted = [("TimeZone", "Asia/Tokyo"), ("DateStyle", "German, DMY"), ("application_name", "mine")];
    run(Duration::from_mins(1), async {
        let mut other = stage.client().await;
        let forms = [
            "RESET TimeZone",
            "SET TimeZone TO DEFAULT",
            "SET TIME ZONE DEFAULT",
            "SET SESSION timezone = DEFAULT",
            "RESET ALL",
            "DISCARD ALL",
        ];
        let mut failures = Vec::new();
        for form in forms {
            for extended in [false, true] {
                for set_before in [false, true] {
                    let mut client = stage.client_with(&wanted).await;
                    if set_before {
                        succeed(&mut client, "SET TimeZone = 'Etc/GMT-7'").await;
                        value(&mut other, "SELECT 1").await;
                    }
                    let outcome =
                        if extended { client.extended(form, &[]).await } else { client.query(form).await }.unwrap();
                    assert_eq!(outcome.error, None, "{form}");
                    for (name, want) in wanted {
                        let told = client.parameters.get(name).cloned().unwrap_or_default();
                        let is = value(&mut client, &format!("SHOW {name}")).await;
                        value(&mut other, "SELECT 1").await;
                        let later = value(&mut client, &format!("SHOW {name}")).await;
                        if [told.as_str(), &is, &later] != [want; 3] {
                            failures.push(format!(
                                "{form}, extended {extended}, set before {set_before}: {name} is {is}, told {told}, \
                                 after another's turn {later}; not {want}"
                            ));
                        }
                    }
                }
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
    });
}

#[test]
fn no_value_of_a_setting_is_read_as_sql_whatever_the_clients_encoding() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    run(SOON, async {
        // Under SJIS the last two of these four bytes are one character, that of a backslash among them.
        let trail = "\u{3043}\\";
        let evil = "SELECT count(*) FROM pg_class WHERE relname = 'evil'";
        for name in ["||chr(1),false);create temp table evil as select 1;--.x", "b.c"] {
            let mut wire = Wire::connect(stage.addr()).await.unwrap();
            let text = ",false);create temp table evil as select 1;--";
            let who = [("user", stage.name()), ("database", stage.name())];
            let settings = [("client_encoding", "SJIS"), ("app.x", trail), (name, text)];
            let _ = wire.login_with(&[&who[..], &settings].concat(), "").await;
            let _ = wire.send(&build::query("SELECT 1")).await;
            let _ = wire.outcome().await;
            drop(wire);
            let mut next = stage.client().await;
            assert_eq!(value(&mut next, evil).await, "0", "{name}");
        }
        let mut client = stage.client_with(&[("client_encoding", "SJIS"), ("app.x", trail)]).await;
        let mut other = stage.client().await;
        let bytes = "SELECT encode(convert_to(current_setting('app.x'), 'UTF8'), 'hex')";
        for _ in 0..2 {
            assert_eq!(value(&mut client, bytes).await, "e7b8bae382bd");
            assert_eq!(value(&mut other, evil).await, "0");
        }
    });
}

#[test]
fn no_name_of_a_setting_is_read_as_sql_whatever_the_clients_encoding() {
    // A name that is none in the client's encoding cannot be asked for: who has set it keeps its server connection.
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(3 * SOON, async {
        for encoding in ["SJIS", "BIG5", "GBK", "UTF8"] {
            let first = format!("SET client_encoding = '{encoding}'; SET backslash_quote = on; SET work_mem = '7MB'");
            // The last bytes of the name are a character that ends with that of a backslash: read as UTF-8 they are two.
            for name in [", $$$$ limit 0 -- a.\u{c1}\\", "a.\u{c1}\\", "a.\u{c1}\\'", "a.\u{c1}'$v$\\"] {
                let mut client = stage.client().await;
                succeed(&mut client, &first).await;
                let _ = client.query(&format!("SET \"{name}\" = 1")).await.unwrap();
                let mut next = stage.client().await;
                for (setting, want) in [("work_mem", "4MB"), ("client_encoding", "UTF8")] {
                    assert_eq!(value(&mut next, &format!("SHOW {setting}")).await, want, "{encoding}, {name}");
                }
                assert_eq!(value(&mut client, "SHOW work_mem").await, "7MB", "{encoding}, {name}");
                client.terminate().await.unwrap();
            }
        }
    });
}

#[test]
fn an_unknown_statement_costs_a_client_none_of_its_settings() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let mut clients = Vec::new();
        for number in 1..=6 {
            let (zone, timeout) = (format!("Etc/GMT-{number}"), format!("{}s", 60 + number));
            let client = stage.client_with(&[("TimeZone", &zone), ("statement_timeout", &timeout)]).await;
            clients.push((client, zone));
        }
        let bind = [build::bind("", "nobody", &[]), build::sync()].concat();
        let steps = [
            ("Bind", bind),
            ("EXECUTE", build::query("EXECUTE nobody")),
            ("DEALLOCATE", build::query("DEALLOCATE nobody")),
            ("an error", build::query("SELECT 1/0")),
        ];
        for round in 0..50 {
            for (name, bytes) in &steps {
                // All at once, so that server connections change hands at every step.
                for bytes in [bytes, &build::query("SHOW TimeZone")] {
                    for (client, _) in &mut clients {
                        client.send(bytes).await.unwrap();
                    }
                    for (client, zone) in &mut clients {
                        let outcome = client.outcome().await.unwrap();
                        let right = outcome.error.is_some() || outcome.value() == Some(zone);
                        assert!(right, "round {round}, after {name}, not {zone}: {outcome:?}");
                    }
                }
            }
        }
    });
}

#[test]
fn a_pinned_client_whose_settings_cannot_be_applied_any_more_gives_its_pin_back() {
    let stage = Stage::new(&[("default_pool_size", "2"), ("max_pinned", "1")]);
    let group = format!("{}_group", stage.name());
    stage.sql(&format!("CREATE ROLE {group}; GRANT {group} TO {}", stage.name()));
    run(3 * SOON, async {
        for round in 0..3 {
            stage.sql(&format!("GRANT {group} TO {}", stage.name()));
            let mut client = stage.client_with(&[("options", &format!("-c role={group}"))]).await;
            succeed(&mut client, "SELECT pg_advisory_lock(1)").await;
            assert_eq!(value(&mut client, "SELECT current_user").await, group);
            stage.sql(&format!("REVOKE {group} FROM {}", stage.name()));
            // Back to the role that it logged in with, which it may not have any more.
            client.send(&build::query("RESET ROLE")).await.unwrap();
            let end = read_to_end(&mut client).await;
            assert_eq!(end.sqlstate(), "42501", "round {round}: {:?}", end.messages);
        }
        // The only pin that there may be.
        let mut next = stage.client().await;
        succeed(&mut next, "SELECT pg_advisory_lock(1)").await;
        wait_until(SOON, || (stage.metric("pgweir_servers_pinned") - 1.0).abs() < 0.5);
    });
    stage.sql(&format!("DROP ROLE {group}"));
}

/// A client's statement, by either protocol, that must not run: the session ends with this error.
async fn ends_unrun(stage: &Stage<'_>, mut client: Wire, extended: bool, code: &str) {
    let insert = "INSERT INTO kept VALUES ('run')";
    let bytes = if extended {
        [build::parse("", insert, &[]), build::bind("", "", &[]), build::execute("", 0), build::sync()].concat()
    } else {
        build::query(insert)
    };
    client.send(&bytes).await.unwrap();
    let end = read_to_end(&mut client).await;
    assert_eq!(end.sqlstate(), code, "{:?}", end.messages);
    assert_eq!(stage.sql("SELECT count(*) FROM kept"), "0", "it ran under settings that are not its own");
}

#[test]
fn nothing_is_run_under_settings_that_could_not_be_applied() {
    #[rustfmt::skip]
    let table = [
        // What it names is gone.
        ("SET default_text_search_config = 'public.mine'", "DROP TEXT SEARCH CONFIGURATION public.mine", "22023"),
        // Another client loads the library whose names these are, in the same server connection.
        ("SET plpgsql.mine = '1'",                         "",                                           "42602"),
    ];
    for (set, breaks, code) in table {
        for extended in [false, true] {
            let stage = Stage::new(&[("default_pool_size", "1")]);
            stage.own_sql("CREATE TEXT SEARCH CONFIGURATION public.mine (COPY = simple)");
            stage.own_sql("CREATE TABLE kept (text text)");
            run(Duration::from_mins(1), async {
                let mut client = stage.client().await;
                let mut other = stage.client().await;
                succeed(&mut client, set).await;
                succeed(&mut other, "SELECT 1").await;
                if breaks.is_empty() {
                    succeed(&mut other, "DO $$ BEGIN END $$").await;
                } else {
                    // It was applied before.
                    succeed(&mut client, "SELECT 1").await;
                    succeed(&mut other, "SELECT 1").await;
                    stage.sql(breaks);
                }
                ends_unrun(&stage, client, extended, code).await;
                // Nobody else has to do with it.
                succeed(&mut other, "SELECT 1").await;
            });
        }
    }
}

#[test]
fn a_setting_that_one_server_connection_takes_and_another_refuses_uncovers_nobodys() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    stage.own_sql("CREATE TABLE kept (text text)");
    run(Duration::from_mins(1), async {
        let (mut client, mut other) = (stage.client().await, stage.client().await);
        let (mut owner, mut blocker) = (stage.client().await, stage.client().await);
        // One server connection knows plpgsql, and is as its last client has left it.
        succeed(&mut blocker, "BEGIN").await;
        succeed(&mut owner, "DO $$ BEGIN END $$").await;
        succeed(&mut owner, "SET app.secret = 'x'").await;
        succeed(&mut owner, "BEGIN").await;
        succeed(&mut blocker, "COMMIT").await;
        // On the other one this is taken, again and again.
        succeed(&mut client, "SET plpgsql.mine = '1'").await;
        for _ in 0..2 {
            succeed(&mut other, "SELECT 1").await;
            assert_eq!(value(&mut client, "SHOW plpgsql.mine").await, "1");
        }
        succeed(&mut other, "BEGIN").await;
        succeed(&mut owner, "COMMIT").await;
        let outcome = client.query("INSERT INTO kept SELECT current_setting('app.secret', true)").await;
        assert!(outcome.map_or(true, |outcome| outcome.error.is_some()), "it has not the settings that it should have");
        succeed(&mut other, "COMMIT").await;
        assert_eq!(
            stage.sql("SELECT count(*) FROM kept WHERE text = 'x'"),
            "0",
            "it ran under another client's settings"
        );
        assert_eq!(value(&mut owner, "SHOW app.secret").await, "x");
    });
}

#[test]
fn a_custom_setting_that_is_gone_or_may_not_be_reset_keeps_nobody_from_the_others_being_taken_back() {
    // The library that has these names to itself takes the first away, and lets superusers alone set the second.
    for custom in ["plpgsql.mine", "plpgsql.variable_conflict"] {
        let settings = [("default_pool_size", "1"), ("databases.PLACE.connect_query", "SET work_mem = '5555kB'")];
        let stage = Stage::new(&settings);
        stage.own_sql("CREATE FUNCTION harmless() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END $$");
        run(Duration::from_mins(1), async {
            let (mut client, mut other) = (stage.client().await, stage.client().await);
            let before = value(&mut other, "SHOW search_path").await;
            let sets =
                format!("SET search_path = 'elsewhere', 'public'; SET {custom} = 'use_column'; SET app.mine = '1'");
            succeed(&mut client, &sets).await;
            assert_eq!(value(&mut client, "SELECT harmless()").await, "1");
            assert_eq!(value(&mut other, "SHOW search_path").await, before, "{custom}");
            assert_eq!(value(&mut other, "SELECT current_setting('app.mine', true)").await, "", "{custom}");
            assert_eq!(value(&mut other, "SHOW work_mem").await, "5555kB", "{custom}: what connect_query set");
        });
    }
}

#[test]
fn what_connect_query_has_set_is_there_whatever_clients_set_and_reset() {
    let settings = [("default_pool_size", "1"), ("databases.PLACE.connect_query", "SET work_mem = '5555kB'")];
    let stage = Stage::new(&settings);
    run(Duration::from_mins(1), async {
        let (mut client, mut other) = (stage.client().await, stage.client().await);
        #[rustfmt::skip]
        let table = [
            ("SET timezone = 'Etc/GMT-3'", "5555kB"),
            ("SET work_mem = '6666kB'",    "6666kB"),
            ("SET app.mine = '1'",         "6666kB"),
            ("RESET timezone",             "6666kB"),
            ("RESET ALL",                  "5555kB"),
            ("SET app.mine = '1'",         "5555kB"),
            ("DISCARD ALL",                "5555kB"),
        ];
        for (sets, own) in table {
            succeed(&mut client, sets).await;
            assert_eq!(value(&mut other, "SHOW work_mem").await, "5555kB", "{sets}");
            assert_eq!(value(&mut client, "SHOW work_mem").await, own, "{sets}");
        }
    });
}

#[test]
fn a_setting_that_only_another_role_may_set_pins_and_goes_with_its_client() {
    const SHOW: &str = "SHOW session_replication_role";
    let stage = Stage::new(&[("default_pool_size", "2")]);
    let admin = format!("{}_admin", stage.name());
    stage.sql(&format!("CREATE ROLE {admin} SUPERUSER; GRANT {admin} TO {}", stage.name()));
    stage.sql(
        "CREATE FUNCTION definer() RETURNS text LANGUAGE sql SECURITY DEFINER AS \
         $$ SELECT set_config('session_replication_role', 'replica', false) $$",
    );
    run(Duration::from_mins(1), async {
        let mut other = stage.client().await;
        for sets in
            [&format!("SET ROLE {admin}; SET session_replication_role = 'replica'; RESET ROLE"), "SELECT definer()"]
        {
            let mut client = stage.client().await;
            succeed(&mut client, sets).await;
            for round in 0..4 {
                assert_eq!(value(&mut other, SHOW).await, "origin", "{sets}, round {round}");
                assert_eq!(value(&mut client, SHOW).await, "replica", "{sets}, round {round}");
            }
            wait_until(SOON, || (stage.metric("pgweir_servers_pinned") - 1.0).abs() < 0.5);
            client.terminate().await.unwrap();
            wait_until(SOON, || stage.metric("pgweir_servers_pinned") < 0.5);
            // Whichever server connection they get.
            let mut others = [stage.client().await, stage.client().await];
            for next in &mut others {
                succeed(next, "BEGIN").await;
            }
            for next in &mut others {
                assert_eq!(value(next, SHOW).await, "origin", "{sets}: left to the next");
                succeed(next, "COMMIT").await;
            }
        }
    });
    stage.sql(&format!("DROP ROLE {admin}"));
}

#[test]
fn an_empty_custom_setting_is_as_much_the_clients_as_any_other() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    #[rustfmt::skip]
    let table = [
        ("SET app.mine = ''",                        ""),
        ("RESET app.mine",                           "mine"),
        ("RESET ALL; SET app.mine = ''",             ""),
        ("SELECT set_config('app.mine', '', false)", ""),
        ("SET app.mine = ''; RESET ALL",             "mine"),
        ("SET app.mine TO DEFAULT",                  "mine"),
    ];
    run(Duration::from_mins(1), async {
        let mut client = stage.client_with(&[("options", "-c app.mine=mine")]).await;
        let mut other = stage.client_with(&[("options", "-c app.mine=other")]).await;
        for (sql, want) in table {
            succeed(&mut client, sql).await;
            assert_eq!(value(&mut client, "SHOW app.mine").await, want, "{sql}");
            assert_eq!(value(&mut other, "SHOW app.mine").await, "other", "{sql}");
            assert_eq!(value(&mut client, "SHOW app.mine").await, want, "{sql}, after another client");
        }
    });
}

#[test]
fn a_client_with_more_settings_than_are_carried_keeps_its_server_connection_and_all_of_them() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    let pinned = || {
        let (_, body) = stage.pgweir.http_get("/metrics").unwrap();
        support::metric_in(&body, "pgweir_pins_total", &["reason=\"settings\""])
    };
    run(Duration::from_mins(1), async {
        let mut other = stage.client().await;
        // Too many; and one that is too long; and many that are too long together.
        let many = (1..=150).map(|n| format!("SELECT set_config('app.s{n}', 'mine {n}', false)")).collect::<Vec<_>>();
        let long = vec!["SELECT set_config('app.s1', repeat('x', 20000), false)".to_owned()];
        let together =
            (1..=5).map(|n| format!("SELECT set_config('app.s{n}', repeat('y', 15000), false)")).collect::<Vec<_>>();
        for (round, sets) in [many, long, together].iter().enumerate() {
            let mut client = stage.client_with(&[("TimeZone", "Asia/Tokyo")]).await;
            let mut wanted = Vec::new();
            for (n, set) in sets.iter().enumerate() {
                wanted.push((format!("app.s{}", n + 1), value(&mut client, set).await));
            }
            // The other one uses whichever server connection is free.
            for (name, want) in &wanted {
                let got = value(&mut other, &format!("SELECT coalesce(current_setting('{name}', true), '')")).await;
                assert_eq!(got, "", "{name} of another client");
                assert!(value(&mut client, &format!("SHOW {name}")).await == *want, "{name}");
            }
            assert_eq!(value(&mut client, "SHOW TimeZone").await, "Asia/Tokyo");
            succeed(&mut client, "RESET ALL").await;
            assert_eq!(value(&mut client, "SHOW TimeZone").await, "Asia/Tokyo");
            assert_eq!(value(&mut client, "SHOW app.s1").await, "");
            wait_until(SOON, || pinned() >= f64::from(u32::try_from(round).unwrap() + 1) - 0.5);
            client.terminate().await.unwrap();
        }
        // What they left is gone with them.
        wait_until(SOON, || stage.metric("pgweir_servers_pinned") < 0.5);
        let mut both = [stage.client().await, stage.client().await];
        for client in &mut both {
            client.send(&build::query("SELECT current_setting('app.s1', true), pg_sleep(0.1)")).await.unwrap();
        }
        for client in &mut both {
            assert_eq!(client.outcome().await.unwrap().value().unwrap_or_default(), "");
        }
    });
}

#[test]
fn ever_new_settings_of_a_client_cost_no_more_than_those_that_are_carried() {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    run(Duration::from_mins(2), async {
        let mut client = stage.client().await;
        let set = async |client: &mut _, from: u32, to: u32| {
            for n in from..to {
                value(client, &format!("SELECT set_config('app.s{n}', repeat('x', 100), false)")).await;
            }
        };
        set(&mut client, 0, 200).await;
        let before = stage.pgweir.rss_anon_kib().unwrap();
        set(&mut client, 200, 1500).await;
        let grown = stage.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
        assert!(grown < 512, "{grown} KiB");
    });
}

//! The load generator against a real Postgres.
#![allow(clippy::expect_used, reason = "a test's helpers fail as a test does")]

use std::path::Path;
use std::time::Duration;

use pgweir_harness::{APP_DATABASE, APP_PASSWORD, APP_USER, Auth, Cluster, ClusterOptions};
use pgweir_load::fault::Fault;
use pgweir_load::generate::{Order, Spec};
use pgweir_load::generator::Generator;
use pgweir_load::login::{Account, Session};
use pgweir_load::mix;
use pgweir_load::trial::postmaster;
use pgweir_load::workload::Workload;

/// Without autovacuum, whose transactions would count as clients'.
fn cluster() -> Cluster {
    Cluster::start(ClusterOptions::auth(Auth::Scram).set("autovacuum", "off")).expect("a Postgres")
}

fn account(cluster: &Cluster) -> Account {
    let [user, password, database] = [APP_USER, APP_PASSWORD, APP_DATABASE].map(str::to_owned);
    Account { addr: cluster.addr(), user, password, database, tls: false, options: String::new() }
}

fn generator(account: Account, workload: Workload, clients: usize, watch: Option<u32>) -> Result<Generator, Fault> {
    let spec = Spec { account, workload, clients, watch, pause: Duration::ZERO, servers: Vec::new() };
    Generator::start_program(Path::new(env!("CARGO_BIN_EXE_pgweir-load")), &spec)
}

const SHORT: Order = Order { warm_up: Duration::from_millis(20), window: Duration::from_millis(500) };

#[test]
fn every_workload_runs_twice_on_the_same_connections() {
    let cluster = cluster();
    let me = std::process::id();
    let workloads = [
        Workload::Simple,
        Workload::Extended,
        Workload::Prepared,
        Workload::Begin,
        Workload::Megabyte,
        Workload::Reconnect,
    ];
    for workload in workloads {
        let mut generator = generator(account(&cluster), workload, 3, Some(me)).expect("clients logged in");
        // SCRAM without optimisation takes a good part of a second on a busy machine.
        let window = if workload == Workload::Reconnect { Duration::from_secs(5) } else { SHORT.window };
        for round in ["first", "second"] {
            let window = generator.run(Order { window, ..SHORT }).expect("a window");
            assert!(window.transactions > 0, "{workload:?}, {round}: {window:?}");
            // The warm-up and the clients' last transactions are part of the run, not of the window.
            assert!(window.total_transactions >= window.transactions + 3, "{workload:?}, {round}: {window:?}");
            assert!(window.seconds >= 0.15, "{workload:?}, {round}: {window:?}");
            assert!(window.cpu.is_some() && window.p50_ns > 0 && window.p50_ns <= window.p99_ns, "{window:?}");
        }
    }
}

/// The generator knows how many rows each has to bring, and fails if others come.
#[test]
fn transactions_that_differ_bring_the_rows_that_they_ask_for() {
    let cluster = cluster();
    cluster.psql(APP_DATABASE, &mix::table(APP_USER)).expect("a table");
    let workloads =
        [Workload::Literals, Workload::Parameters, Workload::ReadLiterals, Workload::ReadParameters, Workload::Anew];
    for workload in workloads {
        let spec = Spec { servers: cluster.pid().into_iter().collect(), ..Spec::new(account(&cluster), workload, 3) };
        let mut generator = Generator::start_program(Path::new(env!("CARGO_BIN_EXE_pgweir-load")), &spec)
            .unwrap_or_else(|fault| panic!("{workload:?}: {fault}"));
        let window = generator.run(SHORT).unwrap_or_else(|fault| panic!("{workload:?}: {fault}"));
        assert!(window.transactions > 0 && window.primary_ns > 0, "{workload:?}: {window:?}");
        assert_eq!(window.followers_ns, 0, "{workload:?}");
    }
}

/// Postgres counts its own transactions: the generator must not tell more or fewer.
#[test]
fn the_count_of_transactions_is_the_servers_own() {
    let cluster = cluster();
    let committed = || -> u64 {
        let sql = "SELECT xact_commit FROM pg_stat_database WHERE datname = 'app'";
        cluster.psql("postgres", sql).expect("statistics").trim().parse().expect("a count")
    };
    let before = committed();
    let mut generator = generator(account(&cluster), Workload::Begin, 4, None).expect("clients logged in");
    let window = generator.run(SHORT).expect("a window");
    drop(generator);
    // A backend hands its counts in at the latest when it ends; logging in is a transaction, too.
    let want = before + window.total_transactions;
    let logins = 4 * 2;
    let mut got = committed();
    for _ in 0..500 {
        if got >= want {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
        got = committed();
    }
    assert!((want..=want + logins).contains(&got), "{got} committed, {want} told and up to {logins} for logins");
}

#[test]
fn a_wrong_password_and_a_killed_server_are_told() {
    let cluster = cluster();
    let wrong = Account { password: "wrong".to_owned(), ..account(&cluster) };
    let refused = generator(wrong, Workload::Simple, 1, None).map(drop);
    assert!(matches!(&refused, Err(Fault::Generator(reason)) if reason.contains("28P01")), "{refused:?}");

    let mut generator = generator(account(&cluster), Workload::Simple, 2, None).expect("clients logged in");
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
    let killed = cluster.psql("postgres", kill).expect("backends ended");
    assert_eq!(killed.lines().count(), 2, "{killed}");
    let outcome = generator.run(SHORT);
    assert!(matches!(outcome, Err(Fault::Generator(_))), "{outcome:?}");
}

#[test]
fn the_postmaster_is_found_behind_a_login() {
    let cluster = cluster();
    assert_eq!(postmaster(&account(&cluster)).expect("a login"), cluster.pid());
    let session = Session::open(&account(&cluster)).expect("a login");
    assert!(session.backend_pid > 0);
}

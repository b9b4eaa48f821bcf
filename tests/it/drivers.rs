//! Drivers as they come: psql, pgbench, psycopg and tokio-postgres with their default settings.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt, TryStreamExt, future, pin_mut};
use pgweir_harness::secrets;
use tokio::task::spawn_local;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::stage::{Stage, run};
use crate::support::{PASSWORD, Place, primary};

/// The folder of the drivers' scripts.
pub(crate) fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers")
}

/// A client program of Postgres, without settings of the caller's.
fn program(stage: &Stage<'_>, name: &str, port: u16) -> Command {
    let mut command = Command::new(stage.place.cluster.programs().program(name));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    command
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", port.to_string())
        .env("PGUSER", stage.name())
        .env("PGDATABASE", stage.name())
        .env("PGPASSWORD", PASSWORD)
        .env("PSQLRC", "/dev/null")
        .env("LC_ALL", "C.UTF-8");
    command
}

pub(crate) fn finish(mut command: Command) -> Output {
    let what = format!("{command:?}");
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{out}\n{err}", output.status);
    secrets::assert_none_in("what a driver is told", &output.stderr);
    output
}

#[test]
fn pgbench_runs_in_every_mode_and_its_books_balance() {
    let pipeline = scripts().join("pipeline.pgbench");
    let pipeline = pipeline.to_str().unwrap();
    #[rustfmt::skip]
    let table: [(&str, &[&str]); 8] = [
        ("simple",             &["-M", "simple"]),
        ("extended",           &["-M", "extended"]),
        ("prepared",           &["-M", "prepared"]),
        ("simple, reconnects", &["-M", "simple", "-C"]),
        ("prepared, reconnects", &["-M", "prepared", "-C"]),
        ("pipeline, extended", &["-M", "extended", "-f", pipeline]),
        ("pipeline, prepared", &["-M", "prepared", "-f", pipeline]),
        ("select only",        &["-M", "prepared", "-S"]),
    ];
    pgbench("transaction", 3, 150, &table);
    // Each has a server connection for as long as it is there, and pgbench begins when all have one.
    pgbench("session", 8, 50, &table);
    // Without transactions of several statements.
    let selects: [(&str, &[&str]); 4] = [
        ("simple, select only", &["-M", "simple", "-S"]),
        ("extended, select only", &["-M", "extended", "-S"]),
        ("prepared, select only", &["-M", "prepared", "-S"]),
        ("reconnects, select only", &["-M", "prepared", "-S", "-C"]),
    ];
    pgbench("statement", 3, 150, &selects);
}

/// Runs pgbench in each of these ways.
fn pgbench(pool_mode: &str, size: u32, transactions: usize, table: &[(&str, &[&str])]) {
    const CLIENTS: usize = 8;
    let stage = Stage::new(&[("pool_mode", pool_mode), ("default_pool_size", &size.to_string())]);
    let watch = stage.place.cap_watch(CLIENTS.try_into().unwrap());
    let mut init = program(&stage, "pgbench", stage.place.cluster.port());
    init.args(["-i", "-q", "-s", "1"]);
    finish(init);
    drop(watch);
    let watch = stage.place.cap_watch(size);
    let mut rows = 0;
    for (name, arguments) in table {
        let mut bench = program(&stage, "pgbench", stage.pgweir.port());
        // A thread for each client: pgbench prepares synchronously, so a client of a shared thread could wait for a server
        // connection while it keeps another, which has one, from ending its transaction.
        let clients = CLIENTS.to_string();
        bench.args(["-n", "-j", &clients, "-c", &clients, "-t", &transactions.to_string()]).args(*arguments);
        let output = finish(bench);
        let out = String::from_utf8_lossy(&output.stdout);
        let done = format!("transactions actually processed: {0}/{0}", CLIENTS * transactions);
        assert!(out.contains(&done), "{pool_mode}, {name}: {out}");
        if !name.contains("select only") {
            rows += CLIENTS * transactions;
        }
        let books = "SELECT (SELECT count(*) FROM pgbench_history), \
                     (SELECT coalesce(sum(delta), 0) FROM pgbench_history) = (SELECT sum(abalance) FROM pgbench_accounts), \
                     (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches), \
                     (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(tbalance) FROM pgbench_tellers)";
        assert_eq!(stage.sql(books), format!("{rows}|t|t|t"), "{pool_mode}, {name}");
    }
    assert!(watch.finish() > 0);
}

/// What psql prints for the session on its two outputs, and what it copied to a file.
fn psql_session(stage: &Stage<'_>, port: u16) -> [String; 3] {
    let folder = std::env::temp_dir().join(format!("pgweir-psql-{}-{port}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let mut psql = program(stage, "psql", port);
    psql.current_dir(&folder).args(["-X", "-a", "-f"]).arg(scripts().join("session.psql")).stdin(Stdio::null());
    let output = finish(psql);
    let copied = fs::read_to_string(folder.join("zoo.txt")).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    [output.stdout, output.stderr, copied.into_bytes()].map(|bytes| {
        let text = String::from_utf8(bytes).unwrap();
        let lines = text.lines().map(|line| match line.split_once("server process with PID ") {
            // Process ids differ, by design.
            Some((before, _)) => format!("{before}server process with PID ..."),
            None => line.to_owned(),
        });
        lines.collect::<Vec<_>>().join("\n")
    })
}

#[test]
fn psql_prints_the_same_through_pgweir_as_without() {
    for (mode, size) in [("transaction", "1"), ("transaction", "3"), ("session", "1")] {
        let stage = Stage::new(&[("pool_mode", mode), ("default_pool_size", size)]);
        let want = psql_session(&stage, stage.place.cluster.port());
        let got = psql_session(&stage, stage.pgweir.port());
        for (what, want, got) in
            [("prints", &want[0], &got[0]), ("complains", &want[1], &got[1]), ("copies", &want[2], &got[2])]
        {
            for (number, (want, got)) in want.lines().zip(got.lines()).enumerate() {
                assert_eq!(got, want, "{mode} mode, pool of {size}, line {number} of what psql {what}");
            }
            assert_eq!(got.lines().count(), want.lines().count(), "{mode} mode, pool of {size}, what psql {what}");
        }
        let [printed, complained, copied] = want;
        assert!(printed.contains("zoo_pkey") && printed.contains("hello") && printed.contains("250"), "{printed}");
        assert!(complained.contains("42P01") && complained.contains("a warning"), "{complained}");
        assert_eq!(copied.lines().count(), 4, "{copied}");
    }
}

/// The Python of the virtual environment that `make deps` prepares.
pub(crate) fn python() -> PathBuf {
    let cache = std::env::var_os("PGWEIR_CACHE").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/pgweir"));
    let python = cache.or(home).unwrap().join("venv/bin/python");
    assert!(python.exists(), "{}: run `make deps`", python.display());
    python
}

#[test]
fn psycopg_works_with_its_defaults() {
    for (mode, size) in
        [("transaction", "1"), ("transaction", "3"), ("session", "6"), ("session", "3"), ("statement", "3")]
    {
        let stage = Stage::new(&[("pool_mode", mode), ("default_pool_size", size)]);
        stage.own_sql(
            "CREATE TABLE driver_rows (client int, n int); CREATE TABLE driver_copy (client int, n int, t text); \
             CREATE TABLE driver_unique (n int PRIMARY KEY); INSERT INTO driver_unique VALUES (1)",
        );
        let mut script = Command::new(python());
        let (port, name) = (stage.pgweir.port(), stage.name());
        script
            .arg(scripts().join("psycopg_defaults.py"))
            .arg(format!("host=127.0.0.1 port={port} user={name} dbname={name}"))
            .arg(mode);
        let output = finish(script);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "ok\n", "{mode} mode, pool of {size}");
    }
}

/// A tokio-postgres client, its connection driven by a task.
async fn connect(stage: &Stage<'_>) -> Client {
    let name = stage.name();
    let config = format!("host=127.0.0.1 port={} user={name} dbname={name}", stage.pgweir.port());
    let (client, connection) = tokio_postgres::connect(&config, NoTls).await.unwrap();
    spawn_local(connection);
    client
}

#[test]
fn tokio_postgres_prepares_and_pipelines() {
    for (mode, size) in [("transaction", "1"), ("transaction", "3"), ("session", "6"), ("statement", "3")] {
        let stage = Stage::new(&[("pool_mode", mode), ("default_pool_size", size)]);
        run(Duration::from_mins(1), async {
            let clients = future::join_all((0..6).map(|_| connect(&stage))).await;
            // Its statements are named s0, s1, ... on every connection.
            let statements = future::join_all(clients.iter().enumerate().map(|(number, client)| async move {
                client.prepare(&format!("SELECT '{number}:' || $1::text")).await.unwrap()
            }))
            .await;
            for round in 0..50 {
                let asked = clients.iter().zip(&statements).flat_map(|(client, statement)| {
                    // Without waiting for each other: tokio-postgres pipelines them.
                    (0..5).map(move |n| async move {
                        client.query_one(statement, &[&format!("{round}.{n}")]).await.unwrap().get::<_, String>(0)
                    })
                });
                let got = future::join_all(asked).await;
                let want: Vec<String> =
                    (0..6).flat_map(|number| (0..5).map(move |n| format!("{number}:{round}.{n}"))).collect();
                assert_eq!(got, want);
            }
            // Types of its own that it asks the catalog about, with statements of its own.
            clients[0].batch_execute("CREATE TYPE mood AS ENUM ('glad', 'sad')").await.unwrap();
            let row =
                clients[1].query_one("SELECT 'sad'::mood::text, '{1,2}'::int4[], 1.5::float8", &[]).await.unwrap();
            assert_eq!(row.get::<_, String>(0), "sad");
            assert_eq!(row.get::<_, Vec<i32>>(1), [1, 2]);
            let statement = clients[2].prepare("SELECT $1::mood").await.unwrap();
            assert_eq!(statement.params()[0].name(), "mood");
        });
    }
}

#[test]
fn tokio_postgres_runs_transactions_and_copies() {
    for mode in ["transaction", "session"] {
        transactions_and_copies(mode);
    }
}

fn transactions_and_copies(pool_mode: &str) {
    let stage = Stage::new(&[("pool_mode", pool_mode), ("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let mut client = connect(&stage).await;
        let other = connect(&stage).await;
        client.batch_execute("CREATE TABLE items (n int, name text)").await.unwrap();
        let transaction = client.transaction().await.unwrap();
        let insert = transaction.prepare("INSERT INTO items VALUES ($1, $2)").await.unwrap();
        assert_eq!(transaction.execute(&insert, &[&1, &"one"]).await.unwrap(), 1);
        assert_eq!(other.query_one("SELECT count(*) FROM items", &[]).await.unwrap().get::<_, i64>(0), 0);
        transaction.commit().await.unwrap();
        let transaction = client.transaction().await.unwrap();
        transaction.execute(&insert, &[&2, &"two"]).await.unwrap();
        drop(transaction);
        assert_eq!(other.query_one("SELECT count(*) FROM items", &[]).await.unwrap().get::<_, i64>(0), 1);
        // A portal in a transaction, read in parts.
        let transaction = client.transaction().await.unwrap();
        let portal = transaction.bind("SELECT n FROM generate_series(1, 10) n", &[]).await.unwrap();
        let first = transaction.query_portal(&portal, 4).await.unwrap();
        let rest = transaction.query_portal(&portal, 0).await.unwrap();
        assert_eq!((first.len(), rest.len()), (4, 6));
        transaction.commit().await.unwrap();

        let sink = client.copy_in("COPY items FROM STDIN").await.unwrap();
        pin_mut!(sink);
        for n in 10..2010 {
            sink.send(bytes::Bytes::from(format!("{n}\tcopied\n"))).await.unwrap();
        }
        assert_eq!(sink.finish().await.unwrap(), 2000);
        let stream = client.copy_out("COPY (SELECT n FROM items ORDER BY n) TO STDOUT").await.unwrap();
        let copied: Vec<bytes::Bytes> = stream.try_collect().await.unwrap();
        assert_eq!(copied.concat().split(|byte| *byte == b'\n').count(), 2002);
        // A copy that is dropped in the middle sends CopyFail.
        let sink = client.copy_in::<_, bytes::Bytes>("COPY items FROM STDIN").await.unwrap();
        drop(Box::pin(sink));
        assert_eq!(client.query_one("SELECT count(*) FROM items", &[]).await.unwrap().get::<_, i64>(0), 2001);
        let rows = client.query_raw("SELECT n FROM items LIMIT 3", Vec::<i32>::new()).await.unwrap();
        pin_mut!(rows);
        assert!(rows.next().await.unwrap().is_ok());
        let messages = client.simple_query("SELECT 1; SELECT 'b'").await.unwrap();
        let rows = messages.iter().filter(|message| matches!(message, SimpleQueryMessage::Row(_))).count();
        assert_eq!(rows, 2);
    });
}

#[test]
fn tokio_postgres_cancels_and_sees_errors() {
    for mode in ["transaction", "session", "statement"] {
        cancels_and_errors(mode);
    }
}

fn cancels_and_errors(pool_mode: &str) {
    let stage = Stage::new(&[("pool_mode", pool_mode), ("default_pool_size", "2")]);
    run(Duration::from_mins(1), async {
        let client = connect(&stage).await;
        let other = connect(&stage).await;
        let token = client.cancel_token();
        let sleeping = client.batch_execute("SELECT pg_sleep(30)");
        let cancelling = async {
            while !stage.is_running("pg_sleep") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            token.cancel_query(NoTls).await.unwrap();
        };
        let (slept, ()) = future::join(sleeping, cancelling).await;
        assert_eq!(slept.unwrap_err().code().unwrap().code(), "57014");
        let error = client.query("SELECT 1/0", &[]).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!((error.code().code(), error.message()), ("22012", "division by zero"));
        assert_eq!(client.query_one("SELECT 'on'", &[]).await.unwrap().get::<_, String>(0), "on");
        assert_eq!(other.query_one("SELECT 'on'", &[]).await.unwrap().get::<_, String>(0), "on");
    });
}

#[test]
fn the_place_of_a_driver_test_asks_for_a_password_without_pgweir() {
    // What pgweir is trusted with, a client of Postgres itself is not: so a driver that got in went through pgweir.
    let place = Place::on(primary());
    run(Duration::from_mins(1), async {
        let refused = pgweir_harness::wire::Wire::open(place.cluster.addr(), &place.name, &place.name, "wrong").await;
        assert_eq!(refused.err().and_then(|error| error.server_error()).unwrap().sqlstate(), "28P01");
    });
}

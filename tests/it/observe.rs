//! What operators and programs see: metrics, health, log lines; and what must never be in them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use pgweir_harness::wire::build::{copy_data, copy_done, parse, query, sync};
use pgweir_harness::wire::{Wire, cancel};
use pgweir_harness::{Cluster, ClusterOptions, HarnessError, Pgweir, PgweirOptions, wait_until, wait_until_async};
use tokio::time::sleep;

use crate::support::{PASSWORD, Place, SOON, Site, assert_value, metric_in, options, primary, start_pgweir};
use crate::transcript::{named, unnamed};

/// A number of events, which a float holds exactly.
fn count(site: &Site<'_>, name: &str, labels: &[&str]) -> u64 {
    let value = site.metric(name, labels);
    assert!(value >= 0.0 && value.fract() == 0.0, "{name} {labels:?} is {value}");
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "just checked")]
    let whole = value as u64;
    whole
}

/// Waits until a series has this value: pgweir publishes once a second.
#[track_caller]
fn wait_count(site: &Site<'_>, name: &str, labels: &[&str], want: u64) {
    wait_until(SOON, || count(site, name, labels) == want);
}

#[tokio::test]
async fn a_query_behind_the_settings_of_its_client_is_timed_from_when_it_was_sent() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut client = site.client_with(&[("options", "-c work_mem=1MB")]).await;
    let mut other = site.client().await;
    let mut took = Duration::ZERO;
    for turn in 0..3 {
        let client = if turn == 1 { &mut other } else { &mut client };
        // Nobody waits for an answer now.
        sleep(Duration::from_secs(1)).await;
        let begun = Instant::now();
        assert_value(&client.query("SELECT 1 FROM pg_sleep(0.2)").await.unwrap(), "1");
        took += begun.elapsed();
    }
    wait_until(SOON, || count(&site, "pgweir_query_seconds_count", &[]) == 3);
    let told = site.metric("pgweir_query_seconds_sum", &[]);
    assert!((0.6..=took.as_secs_f64()).contains(&told), "{told} s, and the clients waited for {took:?}");
}

#[tokio::test]
async fn metrics_count_what_happened_exactly() {
    let site = Site::start(&[("default_pool_size", "2")]);
    let pool = [format!("database=\"{}\"", site.name()), format!("user=\"{}\"", site.name())];
    let mut client = site.client().await;
    for _ in 0..7 {
        assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    }
    for text in ["BEGIN", "SELECT 1", "SELECT 2", "COMMIT"] {
        assert_eq!(client.query(text).await.unwrap().error, None);
    }
    for _ in 0..3 {
        assert_eq!(client.query("SELECT 1/0").await.unwrap().sqlstate(), "22012");
    }
    client
        .send(
            &[parse("s", "SELECT $1::int", &[]), named("s", &[Some(b"1")]), named("s", &[Some(b"2")]), sync()].concat(),
        )
        .await
        .unwrap();
    assert_eq!(client.outcome().await.unwrap().rows.len(), 2);

    // A cancel that hits, one by a wrong secret, and one of a session that is not there.
    client.send(&query("SELECT pg_sleep(60)")).await.unwrap();
    let sleeping = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND usename = '{}' AND query LIKE '%pg_sleep%'",
        site.name()
    );
    wait_until(SOON, || site.place.cluster.psql("postgres", &sleeping).unwrap() == "1");
    let wrong: Vec<u8> = client.secret.iter().map(|byte| !byte).collect();
    cancel(site.pgweir.addr(), client.pid, &wrong).await.unwrap();
    cancel(site.pgweir.addr(), client.pid ^ 1, &client.secret).await.unwrap();
    wait_count(&site, "pgweir_cancels_unknown_key_total", &[], 2);
    assert_eq!(count(&site, "pgweir_cancels_total", &[]), 0);
    cancel(site.pgweir.addr(), client.pid, &client.secret).await.unwrap();
    assert_eq!(client.outcome().await.unwrap().sqlstate(), "57014");

    let of_pool = |more: &'static str| -> Vec<String> {
        pool.iter().cloned().chain((!more.is_empty()).then(|| more.to_owned())).collect()
    };
    #[rustfmt::skip]
    let table = [
        ("pgweir_queries_total",           "",                              7 + 4 + 3 + 1 + 1),
        ("pgweir_transactions_total",      "",                              7 + 1 + 3 + 1 + 1),
        ("pgweir_client_logins_total",     "",                              1),
        ("pgweir_server_logins_total",     "",                              1),
        ("pgweir_binds_total",             "",                              2),
        ("pgweir_errors_total",            "sqlstate=\"22012\"",            3),
        ("pgweir_errors_total",            "sqlstate=\"57014\"",            1),
        ("pgweir_errors_total",            "",                              3 + 1),
        ("pgweir_errors_total",            "blame=\"server\"",              3 + 1),
        ("pgweir_cancels_total",           "outcome=\"forwarded\"",         1),
        ("pgweir_cancels_total",           "",                              1),
        ("pgweir_clients",                 "state=\"idle\"",                1),
        ("pgweir_clients",                 "state=\"active\"",              0),
        ("pgweir_servers",                 "state=\"idle\"",                1),
        ("pgweir_servers_limit",           "",                              2),
        ("pgweir_transaction_seconds_count", "",                            7 + 1 + 3 + 1 + 1),
        ("pgweir_query_seconds_count",     "",                              7 + 4 + 3 + 1 + 1),
        ("pgweir_pool_usable",             "",                              1),
    ];
    for (name, label, want) in table {
        let labels = of_pool(label);
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let seen = std::cell::Cell::new(0);
        let mut left = 3000;
        // A plain wait, so that a failure names the series.
        while count(&site, name, &labels) != want && left > 0 {
            seen.set(count(&site, name, &labels));
            std::thread::sleep(Duration::from_millis(20));
            left -= 20;
        }
        assert!(left > 0, "{name} {label}: {} instead of {want}", seen.get());
    }
    assert_eq!(count(&site, "pgweir_cancels_unknown_key_total", &[]), 2);
    assert!(count(&site, "pgweir_from_clients_bytes_total", &[]) > 200);
    assert!(count(&site, "pgweir_to_clients_bytes_total", &[]) > 400);
}

#[tokio::test]
async fn gauges_follow_clients_and_servers_from_state_to_state() {
    let site = Site::start(&[("default_pool_size", "1"), ("query_wait_timeout", "60s")]);
    let (mut holder, mut waiter, _idle) = (site.client().await, site.client().await, site.client().await);
    assert_eq!(holder.query("BEGIN").await.unwrap().status, b'T');
    waiter.send(&query("SELECT 1")).await.unwrap();
    for (state, want) in [("active", 1), ("waiting", 1), ("idle", 1)] {
        wait_count(&site, "pgweir_clients", &[&format!("state=\"{state}\"")], want);
    }
    wait_count(&site, "pgweir_servers", &["state=\"active\""], 1);
    wait_count(&site, "pgweir_process_clients", &[], 3);
    wait_count(&site, "pgweir_process_servers", &[], 1);
    wait_until(SOON, || site.metric("pgweir_oldest_wait_seconds", &[]) > 0.5);
    assert_eq!(holder.query("COMMIT").await.unwrap().status, b'I');
    assert_value(&waiter.outcome().await.unwrap(), "1");
    wait_count(&site, "pgweir_clients", &["state=\"waiting\""], 0);
    wait_count(&site, "pgweir_clients", &["state=\"idle\""], 3);
    wait_until(SOON, || site.metric("pgweir_oldest_wait_seconds", &[]) < 1e-9);
    // The first login may have waited for its server connection, too.
    let (_, body) = site.pgweir.http_get("/metrics").unwrap();
    assert!(metric_in(&body, "pgweir_wait_seconds_sum", &[]) > 0.5, "{body}");
    assert!(metric_in(&body, "pgweir_wait_seconds_count", &[]) >= 1.0, "{body}");
    holder.terminate().await.unwrap();
    wait_count(&site, "pgweir_process_clients", &[], 2);
}

#[tokio::test]
async fn metrics_are_well_formed_and_every_one_of_them_is_described() {
    let site = Site::start(&[]);
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    wait_count(&site, "pgweir_client_logins_total", &[], 1);
    let (status, body) = site.pgweir.http_get("/metrics").unwrap();
    assert_eq!(status, 200);
    let described = |word: &str| -> BTreeSet<&str> {
        body.lines().filter_map(|line| line.strip_prefix(word)?.split_whitespace().next()).collect()
    };
    let (helped, typed) = (described("# HELP "), described("# TYPE "));
    let mut series = BTreeSet::new();
    for line in body.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
        assert!(series.insert(name), "twice: {line}");
        let bare = name.split('{').next().unwrap();
        let stem = ["_bucket", "_sum", "_count"].iter().find_map(|end| bare.strip_suffix(end));
        let metric = stem.filter(|stem| typed.contains(stem)).unwrap_or(bare);
        let described = typed.contains(metric) && helped.contains(metric);
        assert!(metric.starts_with("pgweir_") && described, "{metric} is not described");
    }
    assert!(series.len() > 50, "{body}");
    // Buckets grow up to the count of all.
    let buckets: Vec<f64> = body
        .lines()
        .filter(|line| line.starts_with("pgweir_query_seconds_bucket"))
        .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
        .collect();
    assert!(buckets.len() > 10 && buckets.is_sorted(), "{buckets:?}");
    assert!(body.contains("le=\"+Inf\""), "{body}");
}

#[tokio::test]
async fn readiness_follows_the_server_and_health_does_not() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let site = Site::before(Place::on(&cluster), &[("server_login_retry", "1s"), ("query_wait_timeout", "60s")]);
    let ready = || site.pgweir.http_get("/readyz").unwrap();
    let healthy = || site.pgweir.http_get("/healthz").unwrap();
    wait_until(SOON, || ready().0 == 200 && healthy().0 == 200);
    let mut client = site.client().await;
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    assert_eq!(ready(), (200, "{\"ready\":true,\"reasons\":[]}".to_owned()));
    cluster.stop().unwrap();
    client.send(&query("SELECT 2")).await.unwrap();
    wait_until(SOON, || ready().0 == 503);
    let body: serde_json::Value = serde_json::from_str(&ready().1).unwrap();
    assert_eq!(body["ready"], false);
    assert_eq!(body["reasons"][0]["reason"], "server_unreachable", "{body}");
    assert_eq!(body["reasons"][0]["database"], site.name(), "{body}");
    assert_eq!(healthy().0, 200, "the process itself is well");
    cluster.restart().unwrap();
    assert_value(&client.outcome().await.unwrap(), "2");
    wait_until(SOON, || ready().0 == 200);
}

#[tokio::test]
async fn a_draining_pgweir_is_not_ready_and_says_so() {
    let site = Site::start(&[("shutdown_timeout", "20s")]);
    let mut client = site.client().await;
    assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
    site.pgweir.signal(libc::SIGTERM).unwrap();
    wait_until(SOON, || matches!(site.pgweir.http_get("/readyz"), Ok((503, body)) if body.contains("draining")));
    assert_eq!(site.pgweir.http_get("/healthz").unwrap().0, 200);
    assert_eq!(client.query("COMMIT").await.unwrap().tags, ["COMMIT"]);
    site.pgweir.wait_exit(SOON).unwrap();
}

#[tokio::test]
async fn unknown_paths_are_404_and_http_can_be_off() {
    let site = Site::start(&[]);
    for path in ["/nowhere", "/metrics/more", "/../etc/passwd", "//"] {
        assert_eq!(site.pgweir.http_get(path).unwrap().0, 404, "{path}");
    }
    assert_eq!(site.pgweir.http_get("/").unwrap().0, 200);
    let off = Site::start(&[("http_listen", "")]);
    assert_eq!(off.pgweir.http_port(), None);
    assert_value(&off.client().await.query("SELECT 1").await.unwrap(), "1");
}

/// Things that clients say and that no log may repeat.
const MARKERS: [&str; 9] = [
    "marker-simple",
    "marker-parse",
    "marker-bind",
    "marker-copy",
    "marker-error",
    "marker-notice",
    "marker-comment",
    "marker-setting",
    "marker-broken",
];

/// Says each marker where a client can.
async fn say_markers(client: &mut Wire) {
    let messages = [
        query("SELECT 'marker-simple' /* marker-comment */"),
        unnamed("SELECT 'marker-parse', $1::text", &[Some(b"marker-bind")]),
        sync(),
        query("SELECT 'marker-error'::int"),
        query("SELEC marker-broken"),
        query("DO 'BEGIN RAISE NOTICE ''marker-notice''; END'"),
        query("BEGIN; SET LOCAL application_name = 'marker-setting'; ROLLBACK"),
        query("CREATE TABLE IF NOT EXISTS sink (v text); COPY sink FROM STDIN"),
        copy_data(b"marker-copy\n"),
        copy_done(),
    ];
    client.send(&messages.concat()).await.unwrap();
    for _ in 0..7 {
        client.recv_until_ready().await.unwrap();
    }
}

#[tokio::test]
async fn the_log_never_repeats_what_clients_say_to_the_server() {
    for format in ["logfmt", "json"] {
        let site = Site::start(&[
            ("log_level", "trace"),
            ("log_format", format),
            ("default_pool_size", "1"),
            ("query_wait_timeout", "2s"),
            ("stats_period", "200ms"),
        ]);
        let mut client = site.client().await;
        say_markers(&mut client).await;
        // One whose statement never reaches the server, and one that leaves in the middle of its own.
        assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
        let mut late = site.client().await;
        assert_eq!(late.query("SELECT 'marker-simple'").await.unwrap().sqlstate(), "53300");
        client.send(&query("SELECT 'marker-simple', pg_sleep(60)")).await.unwrap();
        client.abort().unwrap();
        // Its server connection is free again once the query is cancelled.
        let mut next = site.client().await;
        wait_until_async(SOON, async || next.query("SELECT 1").await.unwrap().error.is_none()).await;
        let mut broken = site.client().await;
        broken.send(b"zmarker-broken").await.unwrap();
        assert!(broken.recv().await.is_ok());
        late.terminate().await.unwrap();
        wait_until(SOON, || site.pgweir.log().matches("client_active").count() >= 2);
        let log = site.pgweir.log();
        for marker in MARKERS.into_iter().chain([PASSWORD, "SELECT ", "pg_sleep"]) {
            let line = log.lines().find(|line| line.contains(marker));
            assert_eq!(line, None, "{marker} in the log ({format})");
        }
    }
}

#[tokio::test]
async fn every_log_line_is_one_well_formed_record() {
    let place = Place::on(primary());
    let site = Site::before(place, &[("log_level", "debug"), ("stats_period", "200ms")]);
    // Names that would forge a line, move the cursor, or end a quotation.
    for name in ["two\nlevel=error msg=forged", "a\" b=c \"", "\u{1b}[2Jcls", "back\\slash\\"] {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        let parameters = [("user", name), ("database", name), ("application_name", name)];
        let _ = wire.login_with(&parameters, "x").await;
    }
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    wait_until(SOON, || site.pgweir.log().contains("sample#client_active"));
    let log = site.pgweir.log();
    for line in log.lines() {
        assert!(!line.starts_with("level=error msg=forged") && !line.chars().any(char::is_control), "{line:?}");
        assert!(line.contains("level=") && is_logfmt(line), "{line:?}");
    }
    let stats = log.lines().find(|line| line.contains("sample#client_active")).unwrap();
    for key in [
        "sample#client_waiting=",
        "sample#server_active=",
        "sample#server_idle=",
        "sample#max_wait=",
        "count#queries=",
        "measure#wait.p99=",
    ] {
        assert!(stats.contains(key), "{key} is not in {stats}");
    }

    let json = Site::start(&[("log_format", "json"), ("log_level", "debug")]);
    assert_value(&json.client().await.query("SELECT 1").await.unwrap(), "1");
    for line in json.pgweir.log().lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(record["level"].is_string(), "{line}");
    }
}

/// Whether a line is `key=value` pairs, a value being bare or quoted with escapes.
fn is_logfmt(line: &str) -> bool {
    let mut rest = line;
    loop {
        let Some((key, value)) = rest.split_once('=') else { return false };
        if key.is_empty() || key.contains(['"', ' ']) {
            return false;
        }
        let end = if value.starts_with('"') {
            let mut escaped = false;
            let close = value.char_indices().skip(1).find(|(_, c)| {
                let ends = *c == '"' && !escaped;
                escaped = *c == '\\' && !escaped;
                ends
            });
            match close {
                Some((at, _)) => at + 1,
                None => return false,
            }
        } else {
            value.find(' ').unwrap_or(value.len())
        };
        match value.get(end..) {
            Some("") => return true,
            Some(more) if more.starts_with(' ') => rest = &more[1..],
            _ => return false,
        }
    }
}

#[test]
fn logfmt_is_told_from_what_only_looks_like_it() {
    #[rustfmt::skip]
    let table = [
        ("plain",              r"a=1 b=two",         true),
        ("quoted",             r#"a="x \" y" b="#,   true),
        ("no value",           r"a=1 b",             false),
        ("open quotation",     r#"a="x"#,            false),
        ("text after a quote", r#"a="x"y b=1"#,      false),
        ("empty",              "",                   false),
    ];
    for (name, line, want) in table {
        assert_eq!(is_logfmt(line), want, "{name}");
    }
}

#[tokio::test]
async fn logins_and_disconnects_are_logged_as_far_as_wanted() {
    let quiet = Site::start(&[("log_connections", "false"), ("log_disconnections", "false")]);
    quiet.client().await.terminate().await.unwrap();
    let site = Site::start(&[]);
    site.client().await.terminate().await.unwrap();
    let lines = |site: &Site<'_>, what: &str| site.pgweir.log().lines().filter(|line| line.contains(what)).count();
    for what in ["client logged in", "client disconnected"] {
        wait_until(SOON, || lines(&site, what) == 1);
    }
    wait_count(&quiet, "pgweir_client_logins_total", &[], 1);
    wait_count(&quiet, "pgweir_process_clients", &[], 0);
    assert_eq!(lines(&quiet, "client"), 0, "{}", quiet.pgweir.log());
}

#[tokio::test]
async fn errors_that_clients_are_told_are_logged_as_far_as_wanted() {
    for (wanted, lines) in [("true", 1), ("false", 0)] {
        let site = Site::start(&[
            ("auth_type", "scram-sha-256"),
            ("log_pooler_errors", wanted),
            ("default_pool_size", "1"),
            ("query_wait_timeout", "300ms"),
        ]);
        // Somebody who is refused, one whose wait is in vain, and one who breaks the protocol.
        assert!(Wire::open(site.pgweir.addr(), site.name(), site.name(), "wrong").await.is_err());
        let (mut holder, mut waiter, mut broken) = (site.client().await, site.client().await, site.client().await);
        assert_eq!(holder.query("BEGIN").await.unwrap().status, b'T');
        assert_eq!(waiter.query("SELECT 1").await.unwrap().sqlstate(), "53300");
        broken.send(b"z\0\0\0\x04").await.unwrap();
        assert_eq!(broken.recv().await.unwrap().server_error().unwrap().sqlstate(), "08P01");
        assert!(broken.eof().await);
        wait_count(&site, "pgweir_process_clients", &[], 2);
        waiter.terminate().await.unwrap();
        // What comes later in the log than all of these.
        wait_until(SOON, || site.pgweir.log().contains("client disconnected"));
        let log = site.pgweir.log();
        for what in ["login refused", "code=53300", "code=08P01"] {
            assert_eq!(log.matches(what).count(), lines, "{wanted}, {what}: {log}");
        }
    }
}

#[tokio::test]
async fn a_name_in_a_label_is_escaped() {
    let place = Place::on(primary());
    let args = vec!["--user".to_owned(), format!("odd\"\\name={PASSWORD}")];
    let pgweir = Pgweir::start_with(PgweirOptions { args, ..options(place.toml(&[])) }).unwrap();
    let site = Site { place, pgweir };
    let mut client = Wire::open(site.pgweir.addr(), "odd\"\\name", site.name(), PASSWORD).await.unwrap();
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    wait_until(SOON, || site.metric("pgweir_client_logins_total", &[r#"user="odd\"\\name""#]) >= 1.0);
}

#[tokio::test]
async fn a_pgweir_that_cannot_listen_says_why_and_ends() {
    let site = Site::start(&[]);
    let taken = site.pgweir.port().to_string();
    let toml = site.place.toml(&[("listen_port", &taken)]);
    match Pgweir::start_with(options(toml)) {
        Err(HarnessError::Ended { status, log, .. }) => {
            assert!(!status.success(), "{status}");
            assert!(log.contains(&taken), "{log}");
        }
        other => panic!("{other:?}"),
    }
    // The one that was there is not disturbed.
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    drop(start_pgweir(site.place.toml(&[])));
}

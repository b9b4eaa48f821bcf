//! `/limits`, `/blame`, `/hirefire`: how close everybody is to a server's limits, who holds what, and who may ask.

use std::fs;
use std::process::Command;
use std::time::Duration;

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::query;
use pgweir_harness::{Pgweir, secrets, wait_until};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::support::{PASSWORD, Place, SOON, Site, assert_value, metric_in, primary, server_pid, start_pgweir};

/// The form of the answers.
const SCHEMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/limits.schema.json");

/// The census of the fleet here.
const PERIOD: &str = "500ms";

/// `/limits`, which has the form that its schema says and holds no secret.
pub(crate) fn limits(pgweir: &Pgweir) -> Value {
    let (status, body) = pgweir.http_get("/limits").unwrap();
    assert_eq!(status, 200, "{body}");
    secrets::assert_none_in("/limits", &body);
    serde_json::from_str(&body).unwrap()
}

/// The limit of that scope of the first server.
pub(crate) fn scope<'a>(limits: &'a Value, scope: &str) -> &'a Value {
    let all = limits["servers"][0]["limits"].as_array().unwrap();
    all.iter().find(|limit| limit["scope"] == scope).unwrap_or_else(|| panic!("no {scope} in {limits}"))
}

/// Waits until the condition holds of what is told; the clients go on meanwhile.
async fn until(pgweir: &Pgweir, path: &str, condition: impl Fn(&Value) -> bool) -> Value {
    let begun = std::time::Instant::now();
    loop {
        let (_, body) = pgweir.http_get(path).unwrap();
        let told: Value = serde_json::from_str(&body).unwrap_or_default();
        if condition(&told) {
            return told;
        }
        assert!(begun.elapsed() < SOON, "it did not come true: {told:#}");
        sleep(Duration::from_millis(100)).await;
    }
}

/// Holds these answers against the schema that the program serves.
pub(crate) fn assert_valid(pgweir: &Pgweir, answers: &[&Value]) {
    let (status, schema) = pgweir.http_get("/limits/schema").unwrap();
    assert_eq!(status, 200);
    assert_eq!(schema, fs::read_to_string(SCHEMA).unwrap());
    assert_valid_as_shipped(answers);
}

/// Holds these answers against the schema that is shipped, with a validator that is not ours.
pub(crate) fn assert_valid_as_shipped(answers: &[&Value]) {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let script = "import json, sys, jsonschema\n\
                  schema, *answers = [json.load(open(path)) for path in sys.argv[1:]]\n\
                  check = jsonschema.Draft202012Validator\n\
                  check.check_schema(schema)\n\
                  [check(schema).validate(answer) for answer in answers]\n\
                  bad = dict(answers[0], servers=[{}])\n\
                  assert not check(schema).is_valid(bad) and not check(schema).is_valid({})\n";
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", script, SCHEMA]);
    for (number, answer) in answers.iter().enumerate() {
        python.arg(file(&number.to_string(), &answer.to_string()));
    }
    let out = python.output().unwrap();
    assert!(out.status.success(), "{} (from `make deps`)", String::from_utf8_lossy(&out.stderr));
}

#[tokio::test]
async fn the_limits_tell_what_this_one_its_peers_and_everybody_else_use() {
    let place = Place::on(primary());
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 20", place.name));
    let fleet = |name: &'static str| {
        start_pgweir(place.toml(&[
            ("fleet_budget", "true"),
            ("fleet_census_period", PERIOD),
            ("fleet_name", name),
            ("query_wait_timeout", "60s"),
        ]))
    };
    let (first, second) = (fleet("web.1"), fleet("web.2"));
    assert_eq!(limits(&first)["servers"], json!([]), "nobody has connected yet");
    let busy = async |pgweir: &Pgweir| {
        let mut client = Wire::connect(pgweir.addr()).await.unwrap();
        client.login_with(&[("user", &*place.name), ("database", &*place.name)], PASSWORD).await.unwrap();
        assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
        client
    };
    let mut clients = Vec::new();
    for pgweir in [&first, &second, &first, &second, &second] {
        clients.push(busy(pgweir).await);
    }
    let mut foreigner = Wire::connect(place.cluster.addr()).await.unwrap();
    let parameters = [("user", &*place.name), ("database", &*place.name), ("application_name", "reporting")];
    foreigner.login_with(&parameters, PASSWORD).await.unwrap();

    // Each looks when a connection is free: one more client comes and goes.
    let mut restless = Wire::connect(first.addr()).await.unwrap();
    restless.login_with(&parameters, PASSWORD).await.unwrap();
    let mut told = Value::Null;
    let begun = std::time::Instant::now();
    while told["foreigners"]["connections"] != 1 || told["peers"]["connections"] != 3 || told["claims"] != 0 {
        assert!(begun.elapsed() < SOON, "{told:#}");
        assert_value(&restless.query("SELECT 1").await.unwrap(), "1");
        sleep(Duration::from_millis(100)).await;
        let all = limits(&first);
        told = scope(&all, "role").clone();
    }
    let all = limits(&first);
    let told = scope(&all, "role");
    let own = told["own"]["connections"].as_u64().unwrap();
    assert!((2..=3).contains(&own), "{told:#}");
    assert_eq!((&told["of"], &told["limit"], &told["headroom"]), (&json!(place.name), &json!(20), &json!(2)));
    assert_eq!(told["used"], own + 4, "{told:#}");
    assert_eq!(told["room"], 18 - 4 - own);
    assert_eq!(told["used"], place.servers(), "{told:#}");
    let peer = told["peers"]["list"][0]["tag"].as_str().unwrap();
    assert!(peer.starts_with("web.2/"), "{peer}");
    assert_eq!(told["foreigners"]["list"][0]["application_name"], "reporting");
    assert_eq!((&told["pools"], &told["share"]), (&json!(2), &json!((18 - 1) / 2)));
    assert_eq!(told["trend"], Value::Null, "it is too early to tell");
    assert_eq!((&told["sidecars"]["now"], &told["sidecars"]["more"]), (&json!(2), &json!(17 - 2)));
    let server = &all["servers"][0];
    assert_eq!((&server["binds"]["scope"], &server["binds"]["of"]), (&json!("role"), &json!(place.name)));
    assert_eq!(scope(&all, "database")["limit"], Value::Null);
    assert_eq!(server["sharing"], "shared");
    assert!(server["pools"][0]["tag"].as_str().unwrap().starts_with("web.1/"));
    assert!(server["census_seconds_ago"].as_f64().unwrap() < SOON.as_secs_f64());

    // The same in the metrics.
    let (_, metrics) = first.http_get("/metrics").unwrap();
    let number = |name: &str, by: &[&str]| metric_in(&metrics, name, &[&["scope=\"role\""], by].concat());
    assert!((number("pgweir_limit_connections", &[]) - 20.0).abs() < 1e-9, "{metrics}");
    assert!((number("pgweir_limit_used", &["by=\"foreign\""]) - 1.0).abs() < 1e-9, "{metrics}");
    assert!((number("pgweir_limit_used", &["by=\"peers\""]) - 3.0).abs() < 1e-9, "{metrics}");
    let (_, hirefire) = first.http_get("/hirefire").unwrap();
    assert_eq!(
        serde_json::from_str::<Value>(&hirefire).unwrap(),
        json!([{ "name": "web", "value": 2, "quantity": 2 }])
    );

    // Foreigners take the rest: whoever comes now is refused, and tells which limit it was.
    // Idle connections may come and go, these do not.
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT {}", place.name, clients.len() + 1));
    let third = fleet("web.3");
    let mut late = Wire::connect(third.addr()).await.unwrap();
    late.startup(&[("user", &*place.name), ("database", &*place.name)]).await.unwrap();
    let refused = until(&third, "/limits", |told| !told["servers"][0]["last_refusal"].is_null()).await;
    let server = &refused["servers"][0];
    assert_eq!(
        (&server["last_refusal"]["sqlstate"], &server["last_refusal"]["scope"]),
        (&json!("53300"), &json!("role"))
    );
    assert_eq!((&server["clients_waiting"], &server["limits"]), (&json!(1), &json!([])), "{refused:#}");
    assert!(server["why_no_census"].as_str().unwrap().contains("no server connection"), "{refused:#}");
    assert_valid(&first, &[&all, &refused]);
}

#[tokio::test]
async fn without_a_fleet_the_census_is_taken_when_somebody_asks_on_a_connection_that_is_there() {
    let site = Site::start(&[("fleet_census_period", "1s"), ("default_pool_size", "1")]);
    let watch = site.place.cap_watch(1);
    let mut client = site.client().await;
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    // Nobody has asked for them, and so nobody has looked: what the server was asked last tells.
    sleep(Duration::from_millis(1500)).await;
    let (_, metrics) = site.pgweir.http_get("/metrics").unwrap();
    assert!(!metrics.contains("pgweir_limit_used{") && metrics.contains("pgweir_servers{"), "{metrics}");
    let last = format!("SELECT query FROM pg_stat_activity WHERE usename = '{}'", site.name());
    assert_eq!(site.place.psql(&last).trim(), "SELECT 1");

    // The first who asks waits for it.
    let told = limits(&site.pgweir);
    let server = scope(&told, "server");
    assert_eq!(server["own"]["connections"], 1, "{told:#}");
    assert_eq!((&server["pools"], &server["share"]), (&Value::Null, &Value::Null));
    assert_eq!(told["servers"][0]["sharing"], "alone");
    assert_eq!(scope(&told, "role")["used"], 1 + scope(&told, "role")["foreigners"]["connections"].as_u64().unwrap());

    // Once in a period at most, however often somebody asks.
    let (begun, mut before, mut censuses) = (std::time::Instant::now(), f64::MAX, 0);
    while begun.elapsed() < Duration::from_secs(3) {
        let ago = limits(&site.pgweir)["servers"][0]["census_seconds_ago"].as_f64().unwrap();
        censuses += u32::from(ago < before && before < f64::MAX);
        before = ago;
        sleep(Duration::from_millis(50)).await;
    }
    let most = u32::try_from(begun.elapsed().as_secs()).unwrap() + 1;
    assert!((1..=most).contains(&censuses), "{censuses} in {:?}", begun.elapsed());

    // None is taken from a client: what is told grows old, and says so.
    assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
    let held = until(&site.pgweir, "/limits", |told| {
        told["servers"][0]["census_seconds_ago"].as_f64().is_some_and(|ago| ago > 2.5)
    })
    .await;
    assert_eq!(scope(&held, "server")["own"]["connections"], 1);
    assert_eq!(client.query("COMMIT").await.unwrap().status, b'I');
    until(&site.pgweir, "/limits", |told| {
        told["servers"][0]["census_seconds_ago"].as_f64().is_some_and(|ago| ago < 1.0)
    })
    .await;
    let all = limits(&site.pgweir);
    assert_valid(&site.pgweir, &[&told, &all]);
    assert_eq!(watch.finish(), 1, "there never was another connection for it");
}

#[tokio::test]
async fn who_holds_a_server_connection_since_when_and_why() {
    let site = Site::start(&[("default_pool_size", "4")]);
    let named = async |name: &str| site.client_with(&[("application_name", name)]).await;
    let (mut open, mut runs, mut pinned, mut idle) =
        (named("open").await, named("runs").await, named("pinned").await, named("idle").await);
    assert_eq!(open.query("BEGIN").await.unwrap().status, b'T');
    let pid = server_pid(&mut open).await;
    assert_eq!(pinned.query("CREATE TEMP TABLE t (n int)").await.unwrap().error, None);
    runs.send(&query("SELECT 'marker', pg_sleep(30)")).await.unwrap();
    assert_value(&idle.query("SELECT 1").await.unwrap(), "1");
    let told = until(&site.pgweir, "/blame", |told| {
        let holders = told["holders"].as_array().map(Vec::len);
        holders == Some(3) && told["pools"][0]["servers_pinned"] == 1
    })
    .await;
    let of = |name: &str| {
        let all = told["holders"].as_array().unwrap();
        all.iter().find(|holder| holder["application_name"] == name).unwrap_or_else(|| panic!("{name}: {told:#}"))
    };
    #[rustfmt::skip]
    let table = [
        ("open",   &open,   "idle_in_transaction", json!(["transaction"])),
        ("runs",   &runs,   "waiting_for_answer",  json!(["query"])),
        ("pinned", &pinned, "idle",                json!(["temp"])),
    ];
    for (name, client, doing, why) in table {
        let holder = of(name);
        assert_eq!((&holder["doing"], &holder["why"]), (&json!(doing), &why), "{holder:#}");
        assert_eq!(holder["client"], client.local_addr().unwrap().to_string(), "{holder:#}");
        assert_eq!((&holder["database"], &holder["user"]), (&json!(site.name()), &json!(site.name())));
        let held = holder["held_seconds"].as_f64().unwrap();
        assert!((0.0..SOON.as_secs_f64()).contains(&held), "{holder:#}");
    }
    assert_eq!(of("open")["server_pid"], pid);
    let mut pids: Vec<i64> =
        told["holders"].as_array().unwrap().iter().filter_map(|h| h["server_pid"].as_i64()).collect();
    pids.sort_unstable();
    pids.dedup();
    let there = site.place.server_pids();
    assert!(pids.len() == 3 && pids.iter().all(|pid| there.contains(&i32::try_from(*pid).unwrap())), "{pids:?}");
    let held: Vec<f64> =
        told["holders"].as_array().unwrap().iter().filter_map(|h| h["held_seconds"].as_f64()).collect();
    assert!(held.is_sorted_by(|a, b| a >= b), "the longest first: {held:?}");
    let text = told.to_string();
    for secret in ["marker", "pg_sleep", "SELECT", PASSWORD] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
    // What is over is not told any more.
    assert_eq!(open.query("COMMIT").await.unwrap().status, b'I');
    until(&site.pgweir, "/blame", |told| told["holders"].as_array().is_some_and(|holders| holders.len() == 2)).await;

    let session = Site::start(&[("pool_mode", "session")]);
    let _client = session.client().await;
    let told = until(&session.pgweir, "/blame", |told| !told["holders"][0].is_null()).await;
    assert_eq!((&told["holders"][0]["why"], &told["holders"][0]["doing"]), (&json!(["session_mode"]), &json!("idle")));
}

#[tokio::test]
async fn whoever_has_no_token_or_calls_it_by_another_name_learns_nothing() {
    const TOKEN: &str = "a-token-that-only-this-test-has";
    let site = Site::start(&[("http_listen", "0.0.0.0:0"), ("http_token", TOKEN)]);
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    let right = format!("Authorization: Bearer {TOKEN}");
    let wrong = "Authorization: Bearer a-token-that-only-this-test-hat";
    let ask = |path: &str, lines: &[&str]| site.pgweir.http_get_with(path, lines).unwrap();
    for path in ["/limits", "/blame", "/metrics", "/series", "/hirefire", "/nowhere"] {
        for lines in [&["Host: pgweir.internal"][..], &["Host: localhost", wrong]] {
            let (status, body) = ask(path, lines);
            assert!(status == 401 && !body.contains(site.name()), "{path}: {status} {body}");
        }
        let (status, body) = ask(path, &["Host: pgweir.internal", &right]);
        assert_eq!(status == 200, path != "/nowhere", "{path}: {body}");
        secrets::assert_none_in(path, &body);
    }
    wait_until(SOON, || ask("/readyz", &["Host: pod"]) == (200, "{\"ok\":true}".to_owned()));
    assert_eq!(ask("/healthz", &["Host: pod"]).0, 200);

    let open = Site::start(&[]);
    for path in ["/limits", "/blame", "/metrics", "/", "/healthz"] {
        let (status, body) = open.pgweir.http_get_with(path, &["Host: rebound.example:80"]).unwrap();
        assert!(status == 421 && body.contains("misdirected"), "{path}: {status} {body}");
        let local = format!("Host: localhost:{}", open.pgweir.http_port().unwrap());
        assert!([200, 503].contains(&open.pgweir.http_get_with(path, &[&local]).unwrap().0), "{path}");
    }
}

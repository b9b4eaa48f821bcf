//! What goes to log drains and to receivers of OpenTelemetry, read back as they would.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{copy_data, copy_done, parse, query, sync};
use pgweir_harness::{Pgweir, PgweirOptions, wait_until};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;

use crate::exec::wrapped::Wrapping;
use crate::limits::{limits, scope};
use crate::support::{PASSWORD, Place, SOON, Site, assert_value, options, primary};
use crate::tls::pki::{Authority, Folder, address};
use crate::transcript::{named, unnamed};

/// The fields of a line of logfmt, as a parser of a drain reads them.
fn fields(line: &str) -> BTreeMap<String, String> {
    let (mut fields, mut rest) = (BTreeMap::new(), line.trim());
    while !rest.is_empty() {
        let (key, value) = rest.split_once('=').unwrap_or_else(|| panic!("{line}"));
        let (value, behind) = match value.strip_prefix('"') {
            None => value.split_once(' ').map_or((value.to_owned(), ""), |(value, behind)| (value.to_owned(), behind)),
            Some(quoted) => {
                let (mut value, mut chars) = (String::new(), quoted.chars());
                while let Some(c) = chars.next().filter(|c| *c != '"') {
                    value.push(if c == '\\' { chars.next().unwrap() } else { c });
                }
                (value, chars.as_str())
            }
        };
        assert_eq!(fields.insert(key.to_owned(), value), None, "{key} twice: {line}");
        rest = behind.trim_start();
    }
    fields
}

/// Milliseconds, as l2met writes them.
#[track_caller]
fn ms(text: &str) -> f64 {
    text.strip_suffix("ms").and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

/// The lines of slow statements so far.
fn slow(pgweir: &Pgweir) -> Vec<BTreeMap<String, String>> {
    let log = pgweir.log();
    let lines = log.lines().filter(|line| line.contains(" pgweir=slow "));
    lines.inspect(|line| assert!(line.len() < 1024, "{} bytes: {line}", line.len())).map(fields).collect()
}

/// Waits for so many of them.
fn slow_lines(pgweir: &Pgweir, wanted: usize) -> Vec<BTreeMap<String, String>> {
    wait_until(SOON, || slow(pgweir).len() >= wanted);
    slow(pgweir)
}

#[tokio::test]
async fn a_slow_statement_is_told_without_its_literals_and_its_wait_apart_from_its_run() {
    let site = Site::start(&[("log_slow_statements", "200ms"), ("default_pool_size", "1")]);
    let mut holder = site.client_with(&[("application_name", "nightly \"job\"")]).await;
    assert_value(&holder.query("SELECT 1").await.unwrap(), "1");
    let mut waiter = site.client().await;
    holder.send(&query("SELECT pg_sleep(1.5), 'of-a-client' WHERE 1 IN (1, 2, 3) /* of-a-client */")).await.unwrap();
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
    wait_until(SOON, || site.place.psql(asleep).trim() == "1");
    // Fast, but it has waited; and behind it in the same bytes one that has not.
    waiter.send(&[query("SELECT 'of-a-client'"), query("SELECT 2")].concat()).await.unwrap();
    assert_eq!(holder.outcome().await.unwrap().error, None);
    for _ in 0..2 {
        assert_eq!(waiter.outcome().await.unwrap().error, None);
    }
    let told = slow_lines(&site.pgweir, 2);
    assert_eq!(told.len(), 2, "{told:?}");
    let statement = |line: &BTreeMap<String, String>| line["statement"].replace(' ', "");
    assert_eq!(statement(&told[0]), "selectpg_sleep(?numeric),?stringwhere?int4in(?int4,…)");
    assert_eq!((&*told[0]["application_name"], &*told[0]["pool"]), ("nightly \"job\"", site.name()));
    assert_eq!((&*told[0]["user"], &*told[0]["statements"], &*told[0]["left_out"]), (site.name(), "1", "0"));
    let times =
        |line: &BTreeMap<String, String>| (ms(&line["measure#statement.wait"]), ms(&line["measure#statement.run"]));
    assert!(times(&told[0]).1 >= 1500.0 && times(&told[0]).0 < 1500.0, "{told:?}");
    assert_eq!(statement(&told[1]), "select?string");
    assert!(times(&told[1]).0 >= 200.0 && times(&told[1]).0 > times(&told[1]).1, "{told:?}");

    // By name, prepared long before; a batch of two.
    holder.send(&[parse("s", "SELECT pg_sleep($1::float8)", &[]), sync()].concat()).await.unwrap();
    holder.outcome().await.unwrap();
    let run = || named("s", &[Some(b"0.15")]);
    holder.send(&[run(), run(), sync()].concat()).await.unwrap();
    assert_eq!(holder.outcome().await.unwrap().error, None);
    let told = slow_lines(&site.pgweir, 3);
    assert_eq!((&*statement(&told[2]), &*told[2]["statements"]), ("selectpg_sleep($1::float8)", "2"));
    let log = site.pgweir.log();
    assert!(!log.contains("of-a-client") && !log.contains("0.15"), "{log}");
}

#[tokio::test]
async fn nothing_that_a_client_puts_into_its_statements_is_told() {
    let site = Site::start(&[("log_slow_statements", "1ms"), ("default_pool_size", "2")]);
    let mut client = site.client().await;
    let messages = [
        query("SELECT 'marker', $$marker$$, pg_sleep(0.02) /* marker */ -- marker"),
        [unnamed("SELECT 'marker', $1::text, pg_sleep(0.02)", &[Some(b"marker")]), sync()].concat(),
        query("DO 'BEGIN PERFORM pg_sleep(0.02); RAISE NOTICE ''marker''; END'"),
        query("SET app.secret = marker; SELECT pg_sleep(0.02)"),
        query("SELECT pg_sleep(0.02), E'\\'marker', 'marker'"),
        query("SELECT pg_sleep(0.02), 'marker\\', 'marker'"),
        query("SELECT pg_sleep(0.02); SELECT 'marker'::int"),
        query(&format!("SELECT pg_sleep(0.02), '{}'", "marker".repeat(20_000))),
        query("CREATE TABLE sink (v text); SELECT pg_sleep(0.02)"),
    ];
    for message in &messages {
        client.send(message).await.unwrap();
        client.recv_until_ready().await.unwrap();
    }
    client.send(&query("COPY sink FROM STDIN")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    client.send(&[copy_data(b"marker\n"), copy_done()].concat()).await.unwrap();
    client.recv_until_ready().await.unwrap();
    let told = slow_lines(&site.pgweir, messages.len() + 1);
    let unknown = told.iter().filter(|line| line["statement"] == "?").count();
    assert!(unknown <= 4, "the long one, the one that failed, and those whose quotes depend on a setting: {told:?}");
    // What the server will not read takes long if it has to wait; in a batch behind one that takes long, too.
    let (mut one, mut two) = (site.client().await, site.client().await);
    for holder in [&mut one, &mut two] {
        assert_eq!(holder.query("BEGIN").await.unwrap().status, b'T');
    }
    let wrong = [
        "SELECT 'O'marker's'",
        "SELECT \"marker\"",
        "SELECT 12marker34",
        "BEGIN; SELECT pg_sleep(0.02); SELECT \"marker\"",
    ];
    client.send(&wrong.map(query).concat()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    for holder in [&mut one, &mut two] {
        assert_eq!(holder.query("COMMIT").await.unwrap().status, b'I');
    }
    for _ in wrong {
        client.recv_until_ready().await.unwrap();
    }
    assert_eq!(client.query("ROLLBACK").await.unwrap().error, None);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(!site.pgweir.log().contains("marker"), "{}", site.pgweir.log());
    // A crowd of them is told at a bounded rate, and how many were not.
    let left_out =
        |pgweir: &Pgweir| slow(pgweir).iter().map(|line| line["left_out"].parse::<u64>().unwrap()).sum::<u64>();
    let before = u64::try_from(slow(&site.pgweir).len()).unwrap() + left_out(&site.pgweir);
    for _ in 0..30 {
        client.send(&query("SELECT pg_sleep(0.002)")).await.unwrap();
        client.recv_until_ready().await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(client.query("SELECT 3 FROM pg_sleep(0.002)").await.unwrap().error, None);
    wait_until(SOON, || slow(&site.pgweir).iter().any(|line| line["statement"].contains("from pg_sleep")));
    let told = u64::try_from(slow(&site.pgweir).len()).unwrap() + left_out(&site.pgweir) - before;
    assert!(left_out(&site.pgweir) > 0 && told >= 31, "{told} told or counted: {:?}", slow(&site.pgweir));
    assert!(!site.pgweir.log().contains("marker"), "{}", site.pgweir.log());
}

#[tokio::test]
async fn a_line_of_a_pool_is_what_l2met_reads() {
    let place = Place::on(primary());
    let mut with = options(place.toml(&[("stats_period", "200ms")]));
    with.env.push(("DYNO".into(), "web.7".into()));
    let site = Site { place, pgweir: Pgweir::start_with(with).unwrap() };
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    wait_until(SOON, || site.pgweir.log().contains("count#queries=1"));
    let log = site.pgweir.log();
    let line = log.lines().find(|line| line.contains("count#queries=1")).unwrap();
    assert!(line.len() < 1024, "{line}");
    let fields = fields(line);
    assert_eq!((&*fields["source"], &*fields["pool"]), ("web.7", site.name()));
    assert_eq!(l2met(&fields), BTreeSet::from(["count", "measure", "sample"]));
    for name in ["wait", "query"] {
        for percentile in ["p50", "p95", "p99"] {
            ms(&fields[&format!("measure#{name}.{percentile}")]);
        }
    }
}

/// The kinds of numbers in a line, each of which is one that l2met reads.
fn l2met(fields: &BTreeMap<String, String>) -> BTreeSet<&str> {
    let mut kinds = BTreeSet::new();
    for (key, value) in fields {
        let Some((kind, name)) = key.split_once('#') else { continue };
        kinds.insert(kind);
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || b"_.0123456789".contains(&byte)), "{key}");
        let number = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        assert!(number.parse::<f64>().is_ok(), "{key}={value}");
    }
    kinds
}

#[tokio::test]
async fn a_second_line_of_a_pool_has_the_numbers_of_limits() {
    let place = Place::on(primary());
    // So few that no other limit of the server leaves less room.
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 5", place.name));
    let settings = [("fleet_budget", "true"), ("fleet_census_period", "500ms"), ("stats_period", "200ms")];
    let site = Site::before(place, &settings);
    let mut client = site.client().await;
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    let _foreigner = site.place.direct().await;
    // Behind it nothing changes any more.
    let is_it = |line: &str| {
        [" sample#own=1 ", " sample#foreigners=1 ", " sample#probes=0 "].iter().all(|has| line.contains(has))
    };
    let budget = || {
        let log = site.pgweir.log();
        let line = log.lines().find(|line| line.contains(" pgweir=budget ") && is_it(line)).map(str::to_owned);
        line.inspect(|line| assert!(line.len() < 1024, "{line}"))
    };
    wait_until(SOON, || budget().is_some());
    let fields = fields(&budget().unwrap());
    assert_eq!(l2met(&fields), BTreeSet::from(["sample"]));
    let all = limits(&site.pgweir);
    let role = scope(&all, "role");
    assert_eq!(all["servers"][0]["binds"]["scope"], *fields["scope"], "{all:#}");
    #[rustfmt::skip]
    let table = [
        ("share", &role["share"]), ("fleet_used", &role["used"]), ("fleet_limit", &role["limit"]),
        ("headroom", &role["headroom"]), ("room", &role["room"]), ("own", &role["own"]["connections"]),
        ("peers", &role["peers"]["connections"]), ("foreigners", &role["foreigners"]["connections"]),
        ("claims", &role["claims"]), ("probes", &role["probes"]), ("waiting_probes", &role["waiting_probes"]),
        ("more_sidecars", &all["servers"][0]["sidecars"]["more"]),
        ("more_sidecars_at_present_use", &all["servers"][0]["sidecars"]["more_at_present_use"]),
    ];
    for (key, want) in table {
        assert_eq!(fields[&format!("sample#{key}")], want.to_string(), "{key}: {fields:?} {all:#}");
    }
    assert_eq!((&role["limit"], &role["used"], &role["room"]), (&5.into(), &2.into(), &1.into()), "{all:#}");
    assert!(!fields.contains_key("sample#exhausted_in") && !fields.contains_key("sample#refused_ago"), "{fields:?}");
}

/// What the pools' lines count in all.
fn counted(log: &str) -> u32 {
    let lines = log.lines().filter(|line| line.contains(" pgweir=stats "));
    lines.map(|line| fields(line)["count#queries"].parse::<u32>().unwrap()).sum()
}

#[tokio::test]
async fn what_came_after_the_last_period_is_told_at_the_end() {
    // Nothing but the end, and a period before it.
    for (period, rounds) in [("1h", 1), ("100ms", 2)] {
        let site = Site::start(&[("stats_period", period)]);
        let mut client = site.client().await;
        for round in 0..rounds {
            if round > 0 {
                site.pgweir.wait_log(" pgweir=stats ", SOON).unwrap();
            }
            for _ in 0..20 {
                assert_value(&client.query("SELECT 1 FROM pg_sleep(0.01)").await.unwrap(), "1");
            }
        }
        client.terminate().await.unwrap();
        site.pgweir.signal(libc::SIGTERM).unwrap();
        assert!(site.pgweir.wait_exit(SOON).unwrap().success());
        // Behind all the others.
        site.pgweir.wait_log("message=stopped", SOON).unwrap();
        let log = site.pgweir.log();
        assert_eq!(counted(&log), 20 * rounds, "{period}: {log}");
        let lines = log.matches(" pgweir=stats ").count();
        assert_eq!(lines > 1, rounds > 1, "{period}: {log}");
    }
}

#[test]
fn a_command_of_exec_that_is_shorter_than_a_period_leaves_a_line_all_the_same() {
    let place = Place::on(primary());
    let psql = place.cluster.programs().program("psql");
    let script = format!("{} -XAtqc 'SELECT 1' \"$DATABASE_URL\"", psql.display());
    let url = format!("postgres://{0}:{PASSWORD}@{1}/{0}", place.name, place.cluster.addr());
    let ended = Wrapping::sh(&url, &script).finish();
    assert_eq!(counted(&ended.err), 1, "{}", ended.err);
    assert_eq!(ended.err.matches(" pgweir=stats ").count(), 1, "{}", ended.err);
    assert_eq!(ended.well(), "1\n");
}

/// What was received: the head of a request, and its body.
type Received = (String, Vec<u8>);

/// A receiver of OpenTelemetry, over TLS if it has an identity.
struct Receiver {
    address: SocketAddr,
    got: Arc<Mutex<Vec<Received>>>,
    /// It takes connections, and then says nothing.
    silent: Arc<AtomicBool>,
}

impl Receiver {
    /// Its thread ends with the process.
    fn start(identity: Option<rustls::ServerConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (got, silent) = (Arc::<Mutex<Vec<Received>>>::default(), Arc::<AtomicBool>::default());
        let (kept, says_nothing, identity) = (got.clone(), silent.clone(), identity.map(Arc::new));
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                if says_nothing.load(Ordering::SeqCst) {
                    held.push(stream);
                    continue;
                }
                let received = match &identity {
                    None => receive(stream),
                    Some(config) => {
                        let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                        receive(rustls::StreamOwned::new(connection, stream))
                    }
                };
                // One that ended in the middle is none.
                kept.lock().unwrap().extend(received);
            }
        });
        Self { address, got, silent }
    }

    fn all(&self) -> Vec<Received> {
        self.got.lock().unwrap().clone()
    }
}

fn receive(mut stream: impl Read + Write) -> Option<Received> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap().parse().unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").ok()?;
    stream.flush().ok()?;
    Some((head, body))
}

/// A pgweir that tells a receiver.
fn telling(place: Place<'static>, url: &str, more: &[(&str, &str)]) -> Site<'static> {
    let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", url), ("OTEL_METRIC_EXPORT_INTERVAL", "200")];
    let env = env.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let with = PgweirOptions { env, ..options(place.toml(&[])) };
    Site { pgweir: Pgweir::start_with(with).unwrap(), place }
}

/// The metrics of a message in JSON, by name.
fn metrics(body: &[u8]) -> BTreeMap<String, Value> {
    let message: Value = serde_json::from_slice(body).unwrap();
    let scope = &message["resourceMetrics"][0]["scopeMetrics"][0];
    let metrics = scope["metrics"].as_array().unwrap().iter();
    metrics.map(|metric| (metric["name"].as_str().unwrap().to_owned(), metric.clone())).collect()
}

#[tokio::test]
async fn a_receiver_of_opentelemetry_is_told_what_metrics_tells() {
    let receiver = Receiver::start(None);
    let site = telling(
        Place::on(primary()),
        &format!("http://{}", receiver.address),
        &[
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=Bearer%20key-of-the-receiver"),
            ("OTEL_SERVICE_NAME", "shop"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "300"),
        ],
    );
    let mut client = site.client().await;
    for _ in 0..3 {
        assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    }
    let queries = |body: &[u8]| metrics(body).get("pgweir.queries")?["sum"]["dataPoints"][0]["asDouble"].as_f64();
    let has =
        |want: f64| receiver.all().iter().any(|(_, body)| queries(body).is_some_and(|got| (got - want).abs() < 1e-9));
    wait_until(SOON, || has(3.0));
    let (head, body) = receiver.all().pop().unwrap();
    assert!(head.starts_with("POST /v1/metrics HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("\r\nx-api-key: Bearer key-of-the-receiver\r\n"), "{head}");
    let message: Value = serde_json::from_slice(&body).unwrap();
    let resource = message["resourceMetrics"][0]["resource"]["attributes"].to_string();
    for part in ["\"shop\"", "deployment.environment.name", "service.instance.id"] {
        assert!(resource.contains(part), "{part}: {resource}");
    }
    // The same metrics, and the same pool.
    let told = metrics(&body);
    let (_, text) = site.pgweir.http_get("/metrics").unwrap();
    let listed = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    for (name, kind) in listed {
        let bare =
            ["_total", "_seconds", "_bytes"].iter().fold(name, |name, end| name.strip_suffix(end).unwrap_or(name));
        let metric = told.get(&bare.replacen('_', ".", 1)).unwrap_or_else(|| panic!("{name} is not told"));
        let kind = if kind == "counter" { "sum" } else { kind };
        assert!(metric[kind]["dataPoints"].as_array().is_some_and(|points| !points.is_empty()), "{metric}");
    }
    let query = &told["pgweir.query"]["histogram"]["dataPoints"][0];
    assert_eq!(query["count"], "3");
    let counts: Vec<u64> =
        query["bucketCounts"].as_array().unwrap().iter().map(|n| n.as_str().unwrap().parse().unwrap()).collect();
    assert_eq!((counts.iter().sum::<u64>(), counts.len()), (3, query["explicitBounds"].as_array().unwrap().len() + 1));
    assert!(query["attributes"].to_string().contains(site.name()));

    // A receiver that says nothing holds nobody up, and what it missed is in the next message.
    receiver.silent.store(true, Ordering::SeqCst);
    site.pgweir.wait_log("otlp: metrics not sent", SOON).unwrap();
    let begun = Instant::now();
    for _ in 0..20 {
        assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
    receiver.silent.store(false, Ordering::SeqCst);
    wait_until(SOON, || has(23.0));
    site.pgweir.wait_log("the receiver takes metrics again", SOON).unwrap();
    // The last word is said at the end.
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    client.terminate().await.unwrap();
    site.pgweir.signal(libc::SIGTERM).unwrap();
    assert!(site.pgweir.wait_exit(SOON).unwrap().success());
    assert!(has(24.0), "the end was told");
    let log = site.pgweir.log();
    assert!(!log.contains("key-of-the-receiver") && !log.contains("x-api-key"), "{log}");
}

#[tokio::test]
async fn a_receiver_is_told_by_tls_and_in_protobuf_and_must_be_vouched_for() {
    let folder = Folder::new();
    let authority = Authority::root("receivers");
    let (cert, key) =
        folder.identity("receiver", &authority.issue(|params| params.subject_alt_names.push(address("127.0.0.1"))));
    let root = folder.write("root.crt", &authority.pem);
    let chain = CertificateDer::pem_file_iter(cert).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let identity = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let receiver = Receiver::start(Some(identity.with_no_client_auth().with_single_cert(chain, key).unwrap()));
    let url = format!("https://{}", receiver.address);
    let site = telling(Place::on(primary()), &url, &[("OTEL_EXPORTER_OTLP_CERTIFICATE", root.to_str().unwrap())]);
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    let names_pool = |body: &[u8]| memchr::memmem::find(body, site.name().as_bytes()).is_some();
    wait_until(SOON, || receiver.all().iter().any(|(_, body)| names_pool(body)));
    let (head, body) = receiver.all().pop().unwrap();
    assert!(head.contains("\r\nContent-Type: application/x-protobuf\r\n"), "{head}");
    // One field, resource_metrics, which is all there is (its tag, and its length by three bytes of a varint).
    assert_eq!(body[0], 0x0a);
    let length = body[1..].iter().take_while(|byte| **byte & 0x80 != 0).count() + 1;
    let told = body[1..=length].iter().rev().fold(0_usize, |sum, byte| (sum << 7) | usize::from(byte & 0x7f));
    assert_eq!(told, body.len() - 1 - length);
    for name in ["pgweir.queries", "pgweir.wait", "pgweir.clients"] {
        assert!(memchr::memmem::find(&body, name.as_bytes()).is_some(), "{name}");
    }
    // Whom nobody vouches for gets nothing.
    let before = receiver.all().len();
    let other = folder.write("other.crt", &Authority::root("others").pem);
    drop(site);
    let wary = telling(Place::on(primary()), &url, &[("OTEL_EXPORTER_OTLP_CERTIFICATE", other.to_str().unwrap())]);
    wary.pgweir.wait_log("otlp: metrics not sent", SOON).unwrap();
    assert!(receiver.all().len() <= before + 1, "the first may have said its last word");
    // And what cannot be understood is told, and nobody is kept from working.
    let odd = telling(Place::on(primary()), &url, &[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]);
    odd.pgweir.wait_log("OTEL_EXPORTER_OTLP_PROTOCOL: neither", SOON).unwrap();
    let mut wire = Wire::open(odd.pgweir.addr(), odd.name(), odd.name(), PASSWORD).await.unwrap();
    assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
}

#[test]
fn a_receiver_that_says_nothing_keeps_three_poolers_of_one_exec_no_longer_than_one() {
    let receiver = Receiver::start(None);
    receiver.silent.store(true, Ordering::SeqCst);
    let mut wrapping = Wrapping::new(&["exec", "sh", "-c", "echo ended; exit 3"])
        .var("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{}", receiver.address))
        .var("PGWEIR_URLS", "ONE_URL TWO_URL THREE_URL");
    for name in ["ONE", "TWO", "THREE"] {
        // The same names on three servers: three listeners, three pools.
        wrapping = wrapping.var(&format!("{name}_URL"), &format!("postgres://u:of-no-use@{name}.invalid/d"));
    }
    let begun = Instant::now();
    let ended = wrapping.finish();
    assert_eq!((ended.status.code(), &*ended.out), (Some(3), "ended\n"), "{}", ended.err);
    assert_eq!(ended.err.matches("otlp: sending metrics").count(), 1, "one tells of all: {}", ended.err);
    let took = begun.elapsed();
    assert!((2.0..5.5).contains(&took.as_secs_f64()), "its farewell is 2 s at most: {took:?}");
}

#[test]
fn the_receiver_of_these_tests_takes_whole_messages_only() {
    let receiver = Receiver::start(None);
    let mut peer = TcpStream::connect(receiver.address).unwrap();
    peer.write_all(b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc").unwrap();
    drop(peer);
    let mut peer = TcpStream::connect(receiver.address).unwrap();
    peer.write_all(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc").unwrap();
    let mut answer = Vec::new();
    peer.read_to_end(&mut answer).unwrap();
    wait_until(SOON, || receiver.all().len() == 1);
    assert_eq!(receiver.all()[0].1, b"abc");
}

//! Micro-benchmarks of the hot path's parts: framing, the pipeline's bookkeeping, reading messages, scanning SQL, and a turn of
//! the relay. That one is the CPU time, system calls and all, of a `pgweir` before a real Postgres; `benches/load` compares it
//! with that of `PgBouncer`.
#![allow(clippy::expect_used, reason = "a benchmark that goes wrong may panic")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pgweir::catalog::{Route, RouteCache, Survey};
use pgweir::sql;
use pgweir_harness::wire::Wire;
use pgweir_harness::{
    APP_DATABASE, APP_PASSWORD, APP_USER, Auth, Cluster, ClusterOptions, Pgweir, PgweirOptions, pgweir_toml,
};
use pgweir_proto::backend::{Tag, TxStatus};
use pgweir_proto::encode;
use pgweir_proto::frontend::{Bind, Parse};
use pgweir_proto::pipeline::{Expect, Origin, Pipeline};
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};

/// What is read from a socket at once; bytes.
const CHUNK: usize = 64 * 1024;

/// Messages of one tag and length, back to back, until a chunk is full: the last one is cut.
fn chunk(body: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHUNK + body + HEADER);
    while out.len() < CHUNK {
        encode::message(&mut out, b'D', |out| out.resize(out.len() + body, b'x'));
    }
    out.truncate(CHUNK);
    out
}

/// The whole messages of a chunk.
fn frame(scanner: &mut Scanner, mut input: &[u8]) -> usize {
    let mut messages = 0;
    while let Ok(Scanned::Whole { body, .. }) = scanner.next(input) {
        messages += 1;
        input = input.get(HEADER + body.len()..).unwrap_or_default();
    }
    messages
}

fn scanner(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scanner, 64 KiB");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    for (name, body) in [("rows of 12 bytes", 7), ("rows of 1 KiB", 1024 - HEADER)] {
        let chunk = chunk(body);
        let mut scanner = Scanner::new(u32::MAX);
        assert!(frame(&mut scanner, &chunk) >= CHUNK / (body + HEADER));
        group.bench_function(name, |bencher| bencher.iter(|| frame(&mut scanner, black_box(&chunk))));
    }
    group.finish();
}

/// One transaction: what is sent, and what comes back before `ReadyForQuery`.
fn transaction(pipeline: &mut Pipeline, sent: &[Expect], replies: &[Tag]) {
    for expect in sent {
        black_box(pipeline.sent(*expect, Origin::Client, 0));
    }
    for tag in replies {
        black_box(pipeline.reply(*tag).expect("an answer in turn"));
    }
    black_box(pipeline.ready(TxStatus::Idle).expect("an end in turn"));
    assert!(pipeline.is_free());
}

fn pipeline(criterion: &mut Criterion) {
    use Expect::{Bind, Describe, Execute, Parse, Query, Sync};
    let simple = ([Query].as_slice(), [Tag::RowDescription, Tag::DataRow, Tag::CommandComplete].as_slice());
    let extended = (
        [Parse, Bind, Describe, Execute, Sync].as_slice(),
        [Tag::ParseComplete, Tag::BindComplete, Tag::RowDescription, Tag::DataRow, Tag::CommandComplete].as_slice(),
    );
    let prepared =
        ([Bind, Execute, Sync].as_slice(), [Tag::BindComplete, Tag::DataRow, Tag::CommandComplete].as_slice());
    let mut group = criterion.benchmark_group("pipeline, one transaction");
    for (name, (sent, replies)) in [("simple", simple), ("extended", extended), ("prepared", prepared)] {
        let mut pipeline = Pipeline::default();
        let sent = black_box(sent);
        let replies = black_box(replies);
        group.bench_function(name, |bencher| bencher.iter(|| transaction(&mut pipeline, sent, replies)));
    }
    // A failed batch leaves nothing behind but its Sync.
    group.bench_function("failed", |bencher| {
        bencher.iter_batched_ref(
            Pipeline::default,
            |pipeline| {
                for expect in [Parse, Bind, Describe, Execute, Sync] {
                    pipeline.sent(expect, Origin::Client, 0);
                }
                black_box(
                    pipeline
                        .error(|owed| {
                            black_box(owed);
                        })
                        .expect("an error in turn"),
                );
                black_box(pipeline.ready(TxStatus::Idle).expect("an end in turn"));
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn messages(criterion: &mut Criterion) {
    let mut parse = Vec::new();
    encode::parse(&mut parse, b"s0", ORM_SELECT.as_bytes(), &[0, 0]);
    // Portal, statement, no formats, one parameter of one byte, no result formats.
    let bind = b"\0s0\0\0\0\0\x01\0\0\0\x011\0\0";
    let mut group = criterion.benchmark_group("messages");
    group.bench_function("Parse", |bencher| {
        let body = parse.get(HEADER..).expect("a header");
        bencher.iter(|| Parse::parse(black_box(body)).expect("well formed").query.len());
    });
    group.bench_function("Bind", |bencher| {
        bencher.iter(|| Bind::parse(black_box(bind)).expect("well formed").statement.len());
    });
    group.finish();
}

const ORM_SELECT: &str = r#"SELECT "orders"."id", "orders"."customer_id", "orders"."state", "orders"."total", "orders"."created_at" FROM "orders" INNER JOIN "customers" ON "customers"."id" = "orders"."customer_id" WHERE "customers"."email" = $1 AND "orders"."state" IN ($2, $3) ORDER BY "orders"."created_at" DESC LIMIT 20"#;

fn scan(criterion: &mut Criterion) {
    #[rustfmt::skip]
    let texts = [
        ("SELECT 1",           "SELECT 1"),
        ("BEGIN",              "BEGIN"),
        ("COMMIT",             "COMMIT"),
        ("SELECT of an ORM",   ORM_SELECT),
        ("UPDATE",             "UPDATE accounts SET balance = balance - 100, note = 'it''s paid' WHERE id = 42 RETURNING balance"),
        ("INSERT",             "INSERT INTO events (kind, payload, at) VALUES ($1, $2, now()) ON CONFLICT DO NOTHING"),
        ("comment first",      "/* app:web,controller:orders */ SELECT * FROM orders WHERE id = 7"),
        ("SET (second stage)", "SET work_mem = '64MB'"),
    ];
    let mut group = criterion.benchmark_group("sql::scan");
    for (name, text) in texts {
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(name, |bencher| bencher.iter(|| sql::scan(black_box(text.as_bytes()))));
    }
    group.finish();
}

/// Where a text may run: cached, with new literals each time, and never seen before.
fn routes(criterion: &mut Criterion) {
    let mut survey = Survey::with_routes();
    for row in ["r|1|users|pr", "r|2|orders|pr", "f|3|score|sql s |SELECT length(a)"] {
        survey.row(row.split('|').map(|column| Some(column.as_bytes())));
    }
    let suspects = survey.close().expect("a small survey");
    let (mut library, mut cache) = (sql::Library::default(), RouteCache::default());
    let select = "SELECT u.id, u.name, count(o.id) FROM users u LEFT JOIN orders o ON o.user_id = u.id WHERE u.id = $1 GROUP BY u.id";
    let literals = |n: u32| select.replace("$1", &format!("{n} AND u.name = 'user {n}'")).into_bytes();
    let writes = |n: u32| format!("INSERT INTO orders (user_id, total) VALUES ({n}, {n}.5) RETURNING id").into_bytes();
    assert_eq!(suspects.route(select.as_bytes(), &mut library).route, Route::Read);

    let mut group = criterion.benchmark_group("routes");
    group.bench_function("the same text", |bencher| {
        bencher
            .iter(|| cache.judge(black_box(select.as_bytes()), 1, || suspects.route(select.as_bytes(), &mut library)));
    });
    for (name, make) in
        [("a read with new literals", &literals as &dyn Fn(u32) -> Vec<u8>), ("a write with new literals", &writes)]
    {
        let texts: Vec<Vec<u8>> = (0..4096).map(make).collect();
        let mut turn = texts.iter().cycle();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let text = turn.next().map_or(&[][..], Vec::as_slice);
                cache.judge(black_box(text), 1, || suspects.route(text, &mut library))
            });
        });
    }
    let mut n = 0;
    group.bench_function("a text never seen", |bencher| {
        bencher.iter_batched(
            || {
                n += 1;
                format!("SELECT u.id AS c{n}, u.name FROM users u WHERE u.id = 1").into_bytes()
            },
            |text| suspects.route(&text, &mut library),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

/// Queries after which the CPU time is read: it is counted in ticks of 10 ms.
const QUERIES: u32 = 20_000;

/// A query and its answer through pgweir. In session mode the client keeps its server connection; in transaction mode it
/// takes one from the pool for each query and gives it back: the difference is the checkout.
fn relay(criterion: &mut Criterion) {
    let cluster = Cluster::start(ClusterOptions::auth(Auth::Trust)).expect("Postgres");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("relay, CPU time of a query");
    group.sample_size(10).measurement_time(Duration::from_secs(20));
    for mode in ["session", "transaction"] {
        let toml = pgweir_toml(&cluster, &[("pool_mode", mode), ("auth_type", "trust")]);
        let bin = Some(env!("CARGO_BIN_EXE_pgweir").into());
        let pgweir = Pgweir::start_with(PgweirOptions { toml, bin, ..PgweirOptions::default() }).expect("pgweir");
        let open = Wire::open(pgweir.addr(), APP_USER, APP_DATABASE, APP_PASSWORD);
        let mut client = runtime.block_on(open).expect("a login");
        let cpu = || pgweir.cpu_time().map(|(user, system)| user + system).expect("its CPU time");
        group.bench_function(format!("pool_mode = {mode}"), |bencher| {
            bencher.iter_custom(|iterations| {
                let before = cpu();
                runtime.block_on(async {
                    for _ in 0..QUERIES {
                        client.query("SELECT 1").await.expect("an answer");
                    }
                });
                cpu().saturating_sub(before) * u32::try_from(iterations).unwrap_or(u32::MAX) / QUERIES
            });
        });
    }
    group.finish();
}

criterion_group!(benches, scanner, pipeline, messages, scan, routes, relay);
criterion_main!(benches);

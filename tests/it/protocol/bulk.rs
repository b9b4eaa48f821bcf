//! Much at once: deep pipelines and large messages pass in bounded memory, in whatever pieces they come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{bind, copy_data, copy_done, describe_portal, execute, parse, query, sync};
use pgweir_harness::{FaultProxy, Pgweir, wait_until_async};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::{Place, SOON, Site, assert_value, primary, start_pgweir};
use crate::transcript::{Company, Script, login_at, named, play, unnamed};

/// Bytes of a large value.
const LARGE: usize = 64 << 20;
/// What pgweir's anonymous memory may grow by while large things pass through; KiB.
const GROWTH: u64 = 40 << 10;

/// Samples pgweir's memory every few milliseconds until it is finished.
pub(super) struct MemoryWatch {
    before: u64,
    most: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl MemoryWatch {
    pub(super) fn start(pgweir: &Pgweir) -> Self {
        let before = pgweir.rss_anon_kib().unwrap();
        let (most, stop) = (Arc::new(AtomicU64::new(before)), Arc::new(AtomicBool::new(false)));
        let (seen, stopping, pid) = (Arc::clone(&most), Arc::clone(&stop), pgweir.pid());
        let thread = thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                seen.fetch_max(rss_anon_kib(pid), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(3));
            }
        });
        Self { before, most, stop, thread }
    }

    /// KiB that the memory grew by at most.
    pub(super) fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.most.load(Ordering::Relaxed).saturating_sub(self.before)
    }
}

fn rss_anon_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Waits until the server cannot write on, because nobody reads.
async fn stalled(site: &Site<'_>) {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'ClientWrite'";
    wait_until_async(SOON, async || site.place.psql(sql) == "1").await;
}

/// A second handle to a client's socket, to write while the first one reads.
pub(super) fn writer_of(wire: &Wire) -> TcpStream {
    use std::os::fd::AsFd;
    let fd = wire.stream().as_fd().try_clone_to_owned().unwrap();
    TcpStream::from_std(fd.into()).unwrap()
}

#[tokio::test]
async fn fifty_thousand_statements_written_without_reading_are_answered_in_order_and_in_bounded_memory() {
    const STATEMENTS: u32 = 50_000;
    let site = Site::start(&[("default_pool_size", "2")]);
    let mut client = site.client().await;
    client.set_patience(Duration::from_mins(1));
    client.send(&[parse("s", "SELECT $1::int4", &[]), sync()].concat()).await.unwrap();
    client.recv_until_ready().await.unwrap();

    let memory = MemoryWatch::start(&site.pgweir);
    let mut writer = writer_of(&client);
    let writing = tokio::spawn(async move {
        for n in 0..STATEMENTS {
            let statement = match n % 3 {
                0 => query(&format!("SELECT {n}")),
                1 => [named("s", &[Some(n.to_string().as_bytes())]), sync()].concat(),
                _ => [unnamed("SELECT $1::int4", &[Some(n.to_string().as_bytes())]), sync()].concat(),
            };
            writer.write_all(&statement).await.unwrap();
        }
    });
    for n in 0..STATEMENTS {
        let outcome = client.outcome().await.unwrap();
        assert_value(&outcome, &n.to_string());
    }
    writing.await.unwrap();
    let growth = memory.finish();
    assert!(growth < GROWTH, "{growth} KiB");
}

#[tokio::test]
async fn a_client_that_writes_all_before_it_reads_anything_is_served_too() {
    // More than all the socket buffers on the way can hold, in both directions: neither pgweir nor the
    // server may wait for the other direction.
    const STATEMENTS: usize = 20_000;
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut client = site.client().await;
    client.set_patience(Duration::from_mins(1));
    let mut writer = writer_of(&client);
    let one = query("SELECT repeat('x', 1000)");
    let memory = MemoryWatch::start(&site.pgweir);
    let writing = tokio::spawn(async move { writer.write_all(&one.repeat(STATEMENTS)).await });
    // The server cannot go on when nobody reads: that is the moment to look at the memory.
    stalled(&site).await;
    for _ in 0..STATEMENTS {
        let outcome = client.outcome().await.unwrap();
        assert_eq!(outcome.value().map(str::len), Some(1000));
    }
    writing.await.unwrap().unwrap();
    let growth = memory.finish();
    assert!(growth < GROWTH, "{growth} KiB");
}

#[tokio::test]
async fn a_row_of_64_mib_passes_in_bounded_memory_even_to_a_slow_reader() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut client = site.client().await;
    client.set_patience(Duration::from_mins(1));
    let memory = MemoryWatch::start(&site.pgweir);
    client.send(&query(&format!("SELECT repeat('x', {LARGE})"))).await.unwrap();
    stalled(&site).await;
    let messages = client.recv_until_ready().await.unwrap();
    let growth = memory.finish();
    let tags: Vec<u8> = messages.iter().map(|message| message.tag).collect();
    assert_eq!(tags, b"TDCZ");
    let value = &messages[1].body[6..];
    assert!(value.len() == LARGE && value.iter().all(|byte| *byte == b'x'));
    assert!(growth < GROWTH, "{growth} KiB");
}

#[tokio::test]
async fn copy_data_of_64_mib_passes_in_bounded_memory_both_ways() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut client = site.client().await;
    client.set_patience(Duration::from_mins(1));
    assert_eq!(client.query("CREATE TABLE t (v text)").await.unwrap().error, None);
    let mut row = vec![b'y'; LARGE];
    row.push(b'\n');
    let memory = MemoryWatch::start(&site.pgweir);
    client.send(&query("COPY t FROM STDIN")).await.unwrap();
    client.recv_until(b'G').await.unwrap();
    client.send(&[copy_data(&row), copy_done()].concat()).await.unwrap();
    let outcome = client.outcome().await.unwrap();
    assert_eq!((outcome.tags, outcome.error), (vec!["COPY 1".to_owned()], None));

    client.send(&query("COPY t TO STDOUT")).await.unwrap();
    let messages = client.recv_until_ready().await.unwrap();
    let growth = memory.finish();
    assert!(messages[1].tag == b'd' && messages[1].body == row);
    assert!(growth < GROWTH, "{growth} KiB");
}

#[tokio::test]
async fn a_bind_and_a_query_of_many_mib_pass_in_bounded_memory() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut client = site.client().await;
    client.set_patience(Duration::from_mins(1));
    let value = vec![b'z'; LARGE];
    let memory = MemoryWatch::start(&site.pgweir);
    let messages = [
        parse("s", "SELECT length($1::text)", &[]),
        bind("", "s", &[Some(&value)]),
        describe_portal(""),
        execute("", 0),
        sync(),
        query(&format!("SELECT length('{}')", "q".repeat(LARGE / 4))),
    ];
    client.send(&messages.concat()).await.unwrap();
    assert_value(&client.outcome().await.unwrap(), &LARGE.to_string());
    assert_value(&client.outcome().await.unwrap(), &(LARGE / 4).to_string());
    let growth = memory.finish();
    assert!(growth < GROWTH, "{growth} KiB");
}

#[tokio::test]
async fn bytes_that_come_one_at_a_time_on_both_sides_change_nothing() {
    let place = Place::on(primary());
    let behind = FaultProxy::start(place.cluster.addr()).unwrap();
    behind.one_byte_per_write(true);
    let port = behind.port().to_string();
    let pgweir = start_pgweir(place.toml(&[("databases.PLACE.port", &port), ("default_pool_size", "1")]));
    let before = FaultProxy::start(pgweir.addr()).unwrap();
    before.one_byte_per_write(true);
    let setup = "CREATE TABLE sink (id int)";
    assert_eq!(place.direct().await.query(setup).await.unwrap().error, None);

    let scripts = [
        Script::new("simple").queries(&["SELECT 1, 'two', NULL", "SELECT 1/0", "", "SELECT 1; SELECT 2"]),
        Script::new("extended")
            .send(&[
                parse("s1", "SELECT $1::int", &[]),
                named("s1", &[Some(b"5")]),
                sync(),
                named("s1", &[Some(b"6")]),
                sync(),
            ])
            .ready(2)
            .send(&[unnamed("SELECT 1/0", &[]), unnamed("SELECT 2", &[]), sync(), named("s1", &[Some(b"7")]), sync()])
            .ready(2),
        Script::new("copy")
            .send(&[query("COPY sink FROM STDIN"), copy_data(b"1\n2\n"), copy_done(), query("TRUNCATE sink")])
            .ready(2),
        Script::new("copy out").queries(&["COPY (SELECT generate_series(1, 20)) TO STDOUT"]),
        Script::new("transaction").queries(&["BEGIN", "SELECT 1", "ROLLBACK"]),
    ];
    for script in scripts {
        let want = play(place.direct().await, script.steps(), Company::None).await;
        let got = play(login_at(before.addr(), &place).await, script.steps(), Company::None).await;
        assert_eq!(got, want, "{}", script.name());
    }
}

#[tokio::test]
async fn one_large_copy_does_not_starve_other_clients() {
    let site = Site::start(&[("default_pool_size", "2")]);
    let mut greedy = site.client().await;
    greedy.set_patience(Duration::from_mins(1));
    let mut modest = site.client().await;
    assert_value(&modest.query("SELECT 1").await.unwrap(), "1");
    let copying = tokio::spawn(async move {
        greedy.send(&query("COPY (SELECT repeat('x', 8000) FROM generate_series(1, 20000)) TO STDOUT")).await.unwrap();
        greedy.recv_until_ready().await.unwrap().len()
    });
    let (begun, mut asked, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    while !copying.is_finished() {
        let start = Instant::now();
        assert_value(&modest.query("SELECT 1").await.unwrap(), "1");
        slowest = slowest.max(start.elapsed());
        asked += 1;
    }
    assert_eq!(copying.await.unwrap(), 1 + 20_000 + 1 + 1 + 1);
    // Who is starved waits for the end of the copy.
    let took = begun.elapsed();
    assert!(asked > 3 && slowest < took / 2, "{asked} answers in {took:?}, the slowest after {slowest:?}");
}

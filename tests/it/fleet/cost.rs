//! What the budget costs a fleet that is at rest, as the server sees it: connections, queries, bytes, and CPU on both sides.
//!
//! The figures are those of README. They are told by
//! `PGWEIR_RELEASE_BIN=target/release/pgweir cargo test -p pgweir --test it fleet::cost -- --nocapture`; without the variable
//! it is the debug build that is measured.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgweir_harness::wire::Wire;
use pgweir_harness::{Cluster, ClusterOptions, Direction, FaultProxy, Pgweir, PgweirOptions};

use super::settings;
use crate::support::{PASSWORD, Place, assert_value, options};

/// The census here.
const PERIOD: Duration = Duration::from_millis(500);

/// Connections of the pool.
const CONNECTIONS: u64 = 3;

/// Peers' connections in the census, when there are many.
const PEERS: u32 = 40;

/// The question, and what is told in any case, at most; bytes.
const QUESTION_BAR: f64 = 1800.0;
const ANSWER_BAR: f64 = 700.0;

/// What is told of each connection, at most; bytes.
const ROW_BAR: f64 = 160.0;

/// CPU of a census of some tens of connections, at most, in whatever build and on however busy a machine.
const CPU_BAR: Duration = Duration::from_millis(20);

/// A pgweir, a proxy in front of its server, and clients that have had all of its connections at once.
struct Stand<'a> {
    place: &'a Place<'a>,
    proxy: FaultProxy,
    pgweir: Pgweir,
    clients: Vec<Wire>,
    backends: Vec<i32>,
}

/// Everything that is counted, at one moment.
struct Reading {
    at: Instant,
    accepted: u64,
    sent: u64,
    told: u64,
    pooler: Duration,
    server: Duration,
    /// Bytes of the server's log.
    log: usize,
}

/// What came in between.
#[derive(Debug)]
struct Cost {
    time: Duration,
    censuses: u32,
    /// Other statements.
    others: u32,
    logins: u64,
    sent: u64,
    told: u64,
    pooler: Duration,
    server: Duration,
}

/// CPU time of a thread.
///
/// Source: the kernel's documentation, "Scheduler Statistics", "/proc/<pid>/schedstat".
pub(crate) fn cpu(schedstat: PathBuf) -> Duration {
    let text = fs::read_to_string(schedstat).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// That of all threads of a process.
fn cpu_of(pid: i64) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| cpu(task.unwrap().path().join("schedstat"))).sum()
}

impl<'a> Stand<'a> {
    async fn start(place: &'a Place<'a>, further: &[(&str, &str)]) -> Self {
        let proxy = FaultProxy::start(place.cluster.addr()).unwrap();
        let port = proxy.port().to_string();
        let own = [("databases.PLACE.port", port.as_str()), ("default_pool_size", "3")];
        let toml = place.toml(&settings(&[&own, further].concat()));
        let release = std::env::var_os("PGWEIR_RELEASE_BIN").map(PathBuf::from);
        let debug = options(toml);
        let pgweir = Pgweir::start_with(PgweirOptions { bin: release.or(debug.bin.clone()), ..debug }).unwrap();
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut client = Wire::connect(pgweir.addr()).await.unwrap();
            client.login_with(&[("user", &place.name), ("database", &place.name)], PASSWORD).await.unwrap();
            assert_eq!(client.query("BEGIN").await.unwrap().status, b'T');
            clients.push(client);
        }
        let mut stand = Self { place, proxy, pgweir, clients, backends: place.server_pids() };
        assert_eq!(stand.backends.len() as u64, CONNECTIONS);
        stand.all_say("COMMIT", b'I').await;
        stand
    }

    async fn all_say(&mut self, text: &str, status: u8) {
        for client in &mut self.clients {
            assert_eq!(client.query(text).await.unwrap().status, status, "{text}");
        }
    }

    fn read(&self) -> Reading {
        Reading {
            at: Instant::now(),
            accepted: self.proxy.accepted(),
            sent: self.proxy.bytes(Direction::ToServer),
            told: self.proxy.bytes(Direction::ToClient),
            pooler: cpu_of(i64::from(self.pgweir.pid())),
            server: self.backends.iter().map(|pid| cpu_of(i64::from(*pid))).sum(),
            log: self.place.cluster.log_text().len(),
        }
    }

    fn since(&self, before: &Reading) -> Cost {
        let now = self.read();
        let log = self.place.cluster.log_text();
        let of_us = |line: &&str| self.backends.iter().any(|pid| line.contains(&format!(" [{pid}] ")));
        let statements = log[before.log..].lines().filter(of_us).filter(|line| line.contains("statement: "));
        let (mut censuses, mut others) = (0, 0);
        for line in statements {
            *if line.contains("pg_stat_activity b,") { &mut censuses } else { &mut others } += 1;
        }
        Cost {
            time: now.at - before.at,
            censuses,
            others,
            logins: now.accepted - before.accepted,
            sent: now.sent - before.sent,
            told: now.told - before.told,
            pooler: now.pooler.saturating_sub(before.pooler),
            server: now.server.saturating_sub(before.server),
        }
    }

    /// What it costs to do nothing for so long.
    async fn rest(&self, time: Duration) -> Cost {
        let before = self.read();
        tokio::time::sleep(time).await;
        self.since(&before)
    }

    /// The budget has no connection of its own: there are those that clients have used.
    #[track_caller]
    fn assert_none_of_its_own(&self, cost: &Cost) {
        assert_eq!((cost.logins, self.proxy.open() as u64), (0, CONNECTIONS), "{cost:?}");
    }
}

impl Cost {
    /// The census is taken once in a period at most, and not given up.
    #[track_caller]
    fn assert_once_a_period(&self) {
        let periods = u32::try_from(self.time.as_millis() / PERIOD.as_millis()).unwrap();
        assert!((periods / 2..=periods + 1).contains(&self.censuses), "{self:?}");
    }

    /// Bytes of a question and an answer.
    fn bytes(&self) -> (f64, f64) {
        let each = |bytes: u64| f64::from(u32::try_from(bytes).unwrap()) / f64::from(self.censuses);
        (each(self.sent), each(self.told))
    }

    /// CPU of pgweir and of the server for a census; pgweir's is what it takes beyond that of `idle`.
    fn cpu(&self, idle: &Self) -> (Duration, Duration) {
        let base = idle.pooler.mul_f64(self.time.as_secs_f64() / idle.time.as_secs_f64());
        (self.pooler.saturating_sub(base) / self.censuses, self.server / self.censuses)
    }
}

#[tokio::test]
async fn a_fleet_at_rest_asks_once_a_period_on_connections_that_are_there_and_that_costs_little() {
    let options = ClusterOptions::default().set("max_connections", "100").set("log_statement", "all");
    let cluster = Cluster::start(options).unwrap();
    let place = Place::on(&cluster);
    let alone = Stand::start(&place, &[]).await;
    let idle = alone.rest(Duration::from_secs(2)).await;
    assert_eq!((idle.censuses, idle.others, idle.sent, idle.told), (0, 0, 0, 0), "{idle:?}");
    drop(alone);

    let period = format!("{}ms", PERIOD.as_millis());
    let mut stand = Stand::start(&place, &[("fleet_budget", "true"), ("fleet_census_period", &period)]).await;
    let few = stand.rest(Duration::from_secs(4)).await;
    few.assert_once_a_period();
    stand.assert_none_of_its_own(&few);
    assert_eq!(few.others, 0, "{few:?}");

    // Nothing is asked while clients have all connections, nor is another opened for that.
    stand.all_say("BEGIN", b'T').await;
    let held = stand.rest(PERIOD * 3).await;
    assert_eq!((held.censuses, held.others, held.sent, held.told), (0, 0, 0, 0), "{held:?}");
    stand.assert_none_of_its_own(&held);
    stand.all_say("COMMIT", b'I').await;

    // Nor more often when they come and go all the time.
    let before = stand.read();
    while before.at.elapsed() < PERIOD * 3 {
        assert_value(&stand.clients[0].query("SELECT 1").await.unwrap(), "1");
    }
    let busy = stand.since(&before);
    busy.assert_once_a_period();
    stand.assert_none_of_its_own(&busy);
    assert!(busy.others > 100, "{busy:?}");

    // With many peers.
    let mut peers = Vec::new();
    for number in 0..PEERS {
        let name = format!("puma: worker 1 [pgweir web.7/ab12cd#{number}]");
        let mut peer = Wire::connect(cluster.addr()).await.unwrap();
        let parameters = [("user", &*place.name), ("database", &*place.name), ("application_name", &*name)];
        peer.login_with(&parameters, PASSWORD).await.unwrap();
        peers.push(peer);
    }
    let many = stand.rest(Duration::from_secs(4)).await;
    many.assert_once_a_period();
    stand.assert_none_of_its_own(&many);
    assert_eq!(many.others, 0, "{many:?}");

    let ((question, answer), (_, with_peers)) = (few.bytes(), many.bytes());
    let row = (with_peers - answer) / f64::from(PEERS);
    let (small, large) = (few.cpu(&idle), many.cpu(&idle));
    println!(
        "a census: {question:.0} bytes to the server, {answer:.0} back with {CONNECTIONS} connections and the test's own, {row:.0} \
         more for each further one; CPU of pgweir {:?}, with {PEERS} more {:?}; of the server {:?}, with {PEERS} more {:?}; \
         {} and {} in {:?} each; pgweir itself {:?} a second without",
        small.0,
        large.0,
        small.1,
        large.1,
        few.censuses,
        many.censuses,
        few.time,
        idle.pooler.div_f64(idle.time.as_secs_f64())
    );
    assert!(question < QUESTION_BAR && answer < ANSWER_BAR + ROW_BAR * 8.0 && row < ROW_BAR, "{few:?} {many:?}");
    assert!(small.0 + small.1 < CPU_BAR && large.0 + large.1 < CPU_BAR, "{few:?} {many:?}");
}

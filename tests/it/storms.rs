//! Many clients at once, most of them up to no good: the others get in all the same, and what it costs is bounded.
//!
//! One address is one source for the limits on failed logins; here both sides share it, so these are off.
//!
//! Whoever attacks does so on a thread of its own, and costs itself as little as it can: what the honest wait for is pgweir, not
//! the attackers' arithmetic. And the machine, if it has other work: the kernel tells how long the two threads that a login needs
//! waited for a processor, and that is no time of pgweir's.

use std::fs;
use std::future::Future;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pgweir_harness::wire::build::{query, sasl, sasl_initial, ssl_request, startup};
use pgweir_harness::wire::{Wire, WireError};
use pgweir_harness::{Pgweir, wait_until, wait_until_async};
use pgweir_proto::scram::{ChannelBinding, ClientExchange, Keys};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::figures;
use crate::support::{PASSWORD, Place, SOON, Site, assert_value, primary, start_pgweir};

/// How long a client that does everything right may take to get in.
const IN_TIME: Duration = Duration::from_secs(1);

/// How long it may with all that the machine keeps it waiting.
const AT_MOST: Duration = Duration::from_secs(10);

/// How long it may where it is one of thousands and the build is not optimised, so that each of them costs several times as much, or
/// where all of them are to be in who prove by SCRAM who they are.
const IN_TIME_UNOPTIMISED: Duration = Duration::from_secs(3);

/// How long each storm lasts.
const STORM: Duration = Duration::from_secs(4);

/// Descriptors that this process may open.
fn descriptors() -> u64 {
    let text = fs::read_to_string("/proc/self/limits").unwrap();
    let line = text.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap_or(u64::MAX)
}

/// Whether the program under test is an optimised build: Cargo puts each profile's programs into a folder of its own.
fn is_optimised() -> bool {
    !env!("CARGO_BIN_EXE_pgweir").contains("/debug/")
}

/// The threads that a login needs: pgweir's worker and this one.
#[derive(Clone)]
pub(crate) struct Threads {
    worker: PathBuf,
}

impl Threads {
    pub(crate) fn of(pgweir: &Pgweir) -> Self {
        let tasks = fs::read_dir(format!("/proc/{}/task", pgweir.pid())).unwrap();
        let mut tasks = tasks.map(|task| task.unwrap().path());
        let is_worker = |task: &PathBuf| fs::read_to_string(task.join("comm")).unwrap_or_default() == "worker-0\n";
        Self { worker: tasks.find(is_worker).unwrap().join("schedstat") }
    }

    /// How long each has been kept waiting for a processor so far. Nothing where the kernel does not tell.
    ///
    /// Source: the kernel's documentation, "Scheduler Statistics", "/proc/<pid>/schedstat".
    pub(crate) fn kept_waiting(&self) -> [Duration; 2] {
        let waited = |path: &str| -> Duration {
            let text = fs::read_to_string(path).unwrap_or_default();
            Duration::from_nanos(text.split_whitespace().nth(1).and_then(|ns| ns.parse().ok()).unwrap_or(0))
        };
        [waited(self.worker.to_str().unwrap()), waited("/proc/thread-self/schedstat")]
    }
}

/// What a login or a query took, and how much of that one of its threads at least had no processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    all: Duration,
    waiting: Duration,
}

impl Took {
    /// Since then, when the threads had waited for so long.
    pub(crate) fn since(begun: Instant, threads: &Threads, before: [Duration; 2]) -> Self {
        let now = threads.kept_waiting();
        // Both may have waited at the same time.
        let waiting = now[0].saturating_sub(before[0]).max(now[1].saturating_sub(before[1]));
        Self { all: begun.elapsed(), waiting }
    }

    /// What is left for pgweir to answer for.
    pub(crate) fn ours(self) -> Duration {
        self.all.saturating_sub(self.waiting)
    }
}

/// Logs in again and again for as long as the storm lasts, each time in time; tells what it took.
async fn honest(site: &Site<'_>) -> String {
    let threads = Threads::of(&site.pgweir);
    let (begun, mut times) = (Instant::now(), Vec::new());
    while begun.elapsed() < STORM {
        let (one, before) = (Instant::now(), threads.kept_waiting());
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.login_with(&[("user", site.name()), ("database", site.name())], PASSWORD).await.unwrap();
        times.push(Took::since(one, &threads, before));
        assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
        wire.terminate().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    times.sort_by_key(|took| took.ours());
    let (half, last) = (times[times.len() / 2], times[times.len() - 1]);
    assert!(times.len() >= 3, "{times:?}");
    assert!(last.ours() <= IN_TIME, "{times:?}");
    let slowest = times.iter().map(|took| took.all).max().unwrap();
    assert!(slowest <= AT_MOST, "{times:?}");
    format!(
        "{} logins, half of them within {:.1?}, all within {:.1?} ({slowest:.1?} with what the machine kept them waiting)",
        times.len(),
        half.ours(),
        last.ours()
    )
}

/// Those who attack, on a thread of their own until this is dropped.
struct Mob {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mob {
    /// What each of so many does, which is told when it is over.
    fn of<A: Future<Output = ()> + Send + 'static>(
        many: usize,
        attack: impl Fn(usize, Arc<AtomicBool>) -> A + Send + 'static,
    ) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let all: JoinSet<()> = {
                let _inside = runtime.enter();
                (0..many).map(|n| attack(n, told.clone())).collect()
            };
            runtime.block_on(all.join_all());
        });
        Self { over, thread: Some(thread) }
    }

    /// They stop. Fails the test if one of them found something else than it expected.
    fn disperse(mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Mob {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Afterwards nobody is left.
fn assert_calm(site: &Site<'_>) {
    for gauge in ["pgweir_process_clients", "pgweir_process_clients_logging_in"] {
        wait_until(SOON, || site.metric(gauge, &[]) < 0.5);
    }
    assert!(site.metric("pgweir_sessions_panicked_total", &[]) < 0.5);
    assert!(site.pgweir.is_running());
}

#[tokio::test]
async fn five_thousand_clients_at_once_all_get_in() {
    const CLIENTS: u32 = 5000;
    assert!(descriptors() > u64::from(CLIENTS) + 500, "raise the limit on open files (ulimit -n) for this test");
    let site = Site::start(&[("default_pool_size", "10"), ("listen_backlog", "8192")]);
    drop(site.client().await);
    let memory = site.pgweir.rss_anon_kib().unwrap();
    let packet = startup(&[("user", site.name()), ("database", site.name())]);
    let threads = Threads::of(&site.pgweir);
    let (begun, before) = (Instant::now(), threads.kept_waiting());
    // Nobody is slow here, nor has to be: each says what it wants as soon as it is connected.
    let mut clients = JoinSet::new();
    let mut waited = before;
    for n in 0..CLIENTS {
        if n % 50 == 0 {
            waited = threads.kept_waiting();
        }
        let (came, stream, threads) = (Instant::now(), knock(site.pgweir.addr(), &packet).unwrap(), threads.clone());
        clients.spawn(async move {
            let mut stream = TcpStream::from_std(stream).unwrap();
            until_ready(&mut stream).await.unwrap();
            // While this one waited, and not all the time: or each would be excused by what others waited for.
            (Took::since(came, &threads, waited), stream)
        });
    }
    let (times, mut all): (Vec<Took>, Vec<TcpStream>) = clients.join_all().await.into_iter().unzip();
    let together = Took::since(begun, &threads, before);
    let slowest = times.iter().map(|took| took.all).max().unwrap();
    let ours = times.iter().map(|took| took.ours()).max().unwrap();
    assert_eq!(all.len(), CLIENTS as usize);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(memory);
    for stream in &mut all {
        stream.write_all(&query("SELECT 1")).await.unwrap();
    }
    for stream in &mut all {
        until_ready(stream).await.unwrap();
    }
    wait_until(SOON, || (site.metric("pgweir_process_clients", &[]) - f64::from(CLIENTS)).abs() < 0.5);
    let refused = site.metric("pgweir_clients_refused_total", &[]);
    let figures = format!(
        "{CLIENTS} clients at once: each was in within {slowest:.1?} ({ours:.1?} without what the machine kept pgweir or it waiting), \
         all together in {:.1?}; {grown} KiB, {refused} turned away",
        together.all
    );
    figures::record("storms", "five_thousand_clients_at_once_all_get_in", &figures);
    assert!(refused < 0.5, "{figures}");
    // What their logins took at the same time is free again, and still the process'.
    assert!(grown / u64::from(CLIENTS) <= 16, "{figures}");
    assert!(ours <= if is_optimised() { IN_TIME } else { IN_TIME_UNOPTIMISED }, "{figures}");
    assert!(slowest <= AT_MOST * 2, "{figures}");
    drop(all);
    assert_calm(&site);
}

/// The rest of a login by SCRAM. Stretching the password is each client's own work, on a machine of its own: it is done by
/// the first and given to the others.
async fn prove(stream: &mut TcpStream, keys: &Mutex<Option<Keys>>) -> io::Result<()> {
    let mut exchange = ClientExchange::new(rand::random(), &ChannelBinding::Unavailable);
    hear(stream, 10).await?;
    stream.write_all(&sasl_initial("SCRAM-SHA-256", &exchange.first())).await?;
    let challenge = exchange.server_first(&hear(stream, 11).await?, 4096).map_err(io::Error::other)?;
    let keys = {
        let mut known = keys.lock().unwrap();
        let derive = || Keys::derive(PASSWORD.as_bytes(), &challenge.salt, challenge.iterations);
        known.get_or_insert_with(derive).clone()
    };
    let last = exchange.client_final(&keys).map_err(io::Error::other)?;
    stream.write_all(&sasl(&last)).await?;
    exchange.server_final(&hear(stream, 12).await?).map_err(io::Error::other)
}

/// An `Authentication` message of this kind.
async fn hear(stream: &mut TcpStream, kind: u32) -> io::Result<Vec<u8>> {
    let mut head = [0; 5];
    stream.read_exact(&mut head).await?;
    let mut body = vec![0; u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize - 4];
    stream.read_exact(&mut body).await?;
    if head[0] != b'R' || body[..4] != kind.to_be_bytes() {
        return Err(io::Error::other(format!("{} {}", char::from(head[0]), body.escape_ascii())));
    }
    Ok(body.split_off(4))
}

/// As many by SCRAM, which is the default, and with the default backlog, all of them connecting at the same moment.
#[tokio::test]
async fn five_thousand_clients_at_once_all_prove_who_they_are() {
    // When so many come, each has half a second for its part, and the kernel knocks again once a second for those that found no room. Where the
    // machine keeps them waiting, who was first is rightly turned away, or who was last comes a second later: that shows nothing.
    let mut tries = 3;
    while !all_prove_who_they_are(tries == 1).await {
        tries -= 1;
    }
}

/// True if all of them did. Before the last try it is false where some were not, in time, and the machine kept them waiting.
async fn all_prove_who_they_are(is_last: bool) -> bool {
    const CLIENTS: u32 = 5000;
    assert!(descriptors() > u64::from(CLIENTS) + 500, "raise the limit on open files (ulimit -n) for this test");
    let site = Site::start(&[("default_pool_size", "10"), ("auth_type", "scram-sha-256")]);
    drop(site.client().await);
    let memory = site.pgweir.rss_anon_kib().unwrap();
    let packet: Arc<[u8]> = startup(&[("user", site.name()), ("database", site.name())]).into();
    let (address, keys) = (site.pgweir.addr(), Arc::new(Mutex::new(None)));
    let threads = Threads::of(&site.pgweir);
    let (begun, before) = (Instant::now(), threads.kept_waiting());
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (packet, keys) = (packet.clone(), keys.clone());
        clients.spawn(async move {
            let mut stream = TcpStream::connect(address).await?;
            let connected = begun.elapsed();
            stream.write_all(&packet).await?;
            prove(&mut stream, &keys).await?;
            until_ready(&mut stream).await?;
            Ok::<_, io::Error>((connected, begun.elapsed(), stream))
        });
    }
    let outcomes = clients.join_all().await;
    let together = Took::since(begun, &threads, before);
    let faults: Vec<String> = outcomes.iter().filter_map(|outcome| Some(outcome.as_ref().err()?.to_string())).collect();
    let connected = outcomes.iter().filter_map(|outcome| Some(outcome.as_ref().ok()?.0)).max().unwrap_or_default();
    let refused = site.metric("pgweir_clients_refused_total", &[]);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(memory);
    let figures = format!(
        "{CLIENTS} clients at once by SCRAM: connected within {connected:.1?}, all in within {:.1?} ({:.1?} without what the \
         machine kept pgweir or them waiting); {grown} KiB, {refused} turned away",
        together.all,
        together.ours()
    );
    let is_late = together.ours() > IN_TIME_UNOPTIMISED || together.all > AT_MOST;
    if (is_late || !faults.is_empty()) && together.waiting > Duration::from_millis(250) && !is_last {
        println!("once more: {figures}");
        return false;
    }
    figures::record("storms", "five_thousand_clients_at_once_all_prove_who_they_are", &figures);
    assert!(faults.is_empty(), "{} of them: {}; {figures}", faults.len(), faults[0]);
    assert!(refused < 0.5, "{figures}");
    assert!(grown / u64::from(CLIENTS) <= 16, "{figures}");
    assert!(together.ours() <= IN_TIME_UNOPTIMISED, "{figures}");
    assert!(together.all <= AT_MOST, "{figures}");
    drop(outcomes);
    assert_calm(&site);
    true
}

/// Connects and says what it wants.
fn knock(address: SocketAddr, packet: &[u8]) -> io::Result<std::net::TcpStream> {
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.write_all(packet)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

async fn until_ready(stream: &mut TcpStream) -> io::Result<()> {
    let (mut buf, mut heard) = ([0; 4096], Vec::new());
    while !heard.ends_with(b"Z\0\0\0\x05I") {
        let read = stream.read(&mut buf).await?;
        if read == 0 {
            return Err(io::Error::other(format!("closed after {}", heard.escape_ascii())));
        }
        heard.extend_from_slice(&buf[..read]);
    }
    Ok(())
}

/// Tries to log in with a proof that was made up, which costs nothing to make.
async fn guess(address: SocketAddr, user: &str, database: &str) -> Result<(), WireError> {
    let mut wire = Wire::connect(address).await?;
    wire.startup(&[("user", user), ("database", database)]).await?;
    wire.recv_until(b'R').await?;
    wire.send(&sasl_initial("SCRAM-SHA-256", b"n,,n=,r=0123456789abcdefghijklmn")).await?;
    let challenge = wire.recv().await?.authentication().map(|(_, data)| data).unwrap_or_default();
    let challenge = String::from_utf8(challenge).unwrap();
    let nonce = challenge.split(',').next().unwrap();
    assert!(nonce.starts_with("r=0123456789abcdefghijklmn"), "{challenge}");
    let proof = "A".repeat(43);
    wire.send(&sasl(format!("c=biws,{nonce},p={proof}=").as_bytes())).await?;
    let refused = wire.recv().await?;
    assert_eq!(refused.server_error().unwrap().sqlstate(), "28P01");
    Ok(())
}

#[tokio::test]
async fn wrong_passwords_at_a_high_rate_keep_nobody_out() {
    let site = Site::start(&[("auth_type", "scram-sha-256"), ("login_failure_rate", "0")]);
    drop(site.client().await);
    let before = site.pgweir.rss_anon_kib().unwrap();
    let tried = Arc::new(AtomicU32::new(0));
    let (count, name, address) = (tried.clone(), site.name().to_owned(), site.pgweir.addr());
    let begun = Instant::now();
    let mob = Mob::of(16, move |n, over| {
        let (count, name) = (count.clone(), name.clone());
        async move {
            while !over.load(Ordering::Relaxed) {
                guess(address, if n % 2 == 0 { &name } else { "nobody" }, &name).await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let logins = honest(&site).await;
    let (tried, took) = (tried.load(Ordering::Relaxed), begun.elapsed());
    mob.disperse();
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    let rate = f64::from(tried) / took.as_secs_f64();
    let figures = format!("{tried} wrong passwords, {rate:.0} a second; meanwhile {logins}; {grown} KiB");
    figures::record("storms", "wrong_passwords_at_a_high_rate_keep_nobody_out", &figures);
    assert!(tried > 100, "{figures}");
    assert!(grown < 16 * 1024, "{figures}");
    assert_calm(&site);
}

/// Ways not to log in.
const SLOW: [Slow; 5] = [Slow::Silent, Slow::AfterSsl, Slow::Half, Slow::Named, Slow::Drop];

#[derive(Clone, Copy, Debug)]
enum Slow {
    /// Says nothing.
    Silent,
    /// An `SSLRequest`, then nothing.
    AfterSsl,
    /// Half a start-up packet.
    Half,
    /// Who it is, and then no proof.
    Named,
    /// A byte every now and then.
    Drop,
}

impl Slow {
    /// Holds a connection until pgweir closes it.
    async fn hold(self, address: SocketAddr, packet: &[u8], over: &AtomicBool) {
        let Ok(mut stream) = TcpStream::connect(address).await else { return };
        let _ = match self {
            Self::Silent => Ok(()),
            Self::AfterSsl => stream.write_all(&ssl_request()).await,
            Self::Half => stream.write_all(&packet[..packet.len() / 2]).await,
            Self::Named => stream.write_all(packet).await,
            Self::Drop => stream.write_all(&packet[..1]).await,
        };
        let mut bytes = packet.iter().skip(1);
        let mut buf = [0; 64];
        while !over.load(Ordering::Relaxed) {
            match tokio::time::timeout(Duration::from_secs(1), stream.read(&mut buf)).await {
                Ok(Ok(1..)) => {}
                Ok(_) => return,
                Err(_) => {
                    if let (Self::Drop, Some(byte)) = (self, bytes.next()) {
                        let _ = stream.write_all(&[*byte]).await;
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn clients_that_never_finish_logging_in_keep_nobody_out() {
    const PLACES: u32 = 200;
    let places = PLACES.to_string();
    let settings = [("max_login_clients", places.as_str()), ("client_login_timeout", "30s")];
    let site = Site::start(&[&[("auth_type", "scram-sha-256")], &settings[..]].concat());
    drop(site.client().await);
    let before = site.pgweir.rss_anon_kib().unwrap();
    let packet: Arc<[u8]> = startup(&[("user", site.name()), ("database", site.name())]).into();
    let address = site.pgweir.addr();
    // Two for each place, and whoever is thrown out comes again.
    let mob = Mob::of(2 * PLACES as usize, move |n, over| {
        let packet = packet.clone();
        async move {
            while !over.load(Ordering::Relaxed) {
                SLOW[n % SLOW.len()].hold(address, &packet, &over).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    });
    wait_until_async(SOON, async || site.metric("pgweir_process_clients_logging_in", &[]) >= f64::from(PLACES) - 0.5)
        .await;
    let logins = honest(&site).await;
    let most = site.metric("pgweir_process_clients_logging_in", &[]);
    let gave_way = site.metric("pgweir_clients_refused_total", &["reason=\"max_login_clients\""]);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    let figures = format!(
        "{} clients that do not log in, {PLACES} places, {gave_way} times one gave way; meanwhile {logins}; {grown} KiB",
        2 * PLACES
    );
    figures::record("storms", "clients_that_never_finish_logging_in_keep_nobody_out", &figures);
    assert!(most <= f64::from(PLACES), "{most} at the door");
    assert!(grown < 16 * 1024, "{figures}");
    mob.disperse();
    assert_calm(&site);
}

#[tokio::test]
async fn a_login_has_its_deadline_whatever_trickles_in() {
    let site = Site::start(&[("auth_type", "scram-sha-256"), ("client_login_timeout", "1500ms")]);
    let packet = startup(&[("user", site.name()), ("database", site.name())]);
    let over = AtomicBool::new(false);
    let held = SLOW.map(async |slow: Slow| {
        let begun = Instant::now();
        slow.hold(site.pgweir.addr(), &packet, &over).await;
        (slow, begun.elapsed())
    });
    for (slow, took) in futures_util::future::join_all(held).await {
        assert!(took > Duration::from_secs(1) && took < SOON, "{slow:?} was closed after {took:?}");
    }
    assert_calm(&site);
}

/// Clients that are served all the while, in a pool of its own.
const SERVED: usize = 64;
/// Server logins, and the pools that they are spread over: each has a role, a salt and derived keys of its own.
const LOGINS: u32 = 1000;
const POOLS: u32 = 50;
/// Quiet and stormy windows, by turns.
const WINDOWS: usize = 16;
const WINDOW: Duration = Duration::from_millis(700);

/// The pools, and a client each that makes a server connection by every query: its server connections live for no time.
async fn storm(pgweir: &Pgweir, place: &Place<'_>) -> Vec<Wire> {
    let mut clients = Vec::new();
    for n in 0..POOLS {
        clients.push(Wire::open(pgweir.addr(), &place.name, &format!("storm{n}"), "").await.unwrap());
    }
    clients
}

/// Serves the 64 for one window, while `logins` make server connections as evenly as they can; the 99th percentile of
/// the time that a query took.
async fn window(served: &mut [Wire], storm: &mut [Wire], logins: u32) -> Duration {
    let end = Instant::now() + WINDOW;
    let asked = async |client: &mut Wire| {
        let mut took = Vec::new();
        while Instant::now() < end {
            let one = Instant::now();
            assert_value(&client.query("SELECT 1").await.unwrap(), "1");
            took.push(one.elapsed());
        }
        took
    };
    let calls = async {
        let between = WINDOW / logins.max(1);
        let mut due = tokio::time::interval(between);
        for n in 0..logins as usize {
            due.tick().await;
            let client = n % storm.len();
            assert_value(&storm[client].query("SELECT 1").await.unwrap(), "1");
        }
    };
    let (took, ()) = tokio::join!(futures_util::future::join_all(served.iter_mut().map(asked)), calls);
    let mut took: Vec<Duration> = took.into_iter().flatten().collect();
    took.sort();
    took[took.len() * 99 / 100]
}

#[tokio::test]
async fn a_thousand_server_logins_leave_those_that_are_served_alone() {
    let place = Place::on(primary());
    let mut settings =
        vec![("default_pool_size".to_owned(), "10".to_owned()), ("max_server_logins".into(), "8".into())];
    for n in 0..POOLS {
        let role = format!("{}_storm{n}", place.name);
        place.psql(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD '{role}-secret'; GRANT CONNECT ON DATABASE {0} TO {role}",
            place.name
        ));
        let key = |key: &str| format!("databases.storm{n}.{key}");
        settings.extend([
            (key("host"), place.cluster.host().to_owned()),
            (key("port"), place.cluster.port().to_string()),
            (key("dbname"), place.name.clone()),
            (key("password"), format!("{role}-secret")),
            (key("user"), role),
            (key("server_lifetime"), "0s".to_owned()),
        ]);
    }
    let settings: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let site = Site { pgweir: start_pgweir(place.toml(&settings)), place };
    let mut served = Vec::new();
    for _ in 0..SERVED {
        served.push(site.client().await);
    }
    let logins = || site.metric("pgweir_server_logins_total", &[]);
    // The first of each pool, which waits for its server connection, is not counted.
    let mut storm = storm(&site.pgweir, &site.place).await;
    window(&mut served, &mut storm, 0).await;
    wait_until(SOON, || logins() >= f64::from(POOLS) + 1.0);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let before = logins();
    let (mut ratios, mut told) = (Vec::new(), Vec::new());
    let each = LOGINS.div_ceil(u32::try_from(WINDOWS).unwrap());
    for _ in 0..WINDOWS {
        let quiet = window(&mut served, &mut storm, 0).await;
        let stormy = window(&mut served, &mut storm, each).await;
        ratios.push(stormy.as_secs_f64() / quiet.as_secs_f64());
        told.push((quiet, stormy));
    }
    // Counters are published once a second.
    wait_until(SOON, || logins() - before >= f64::from(LOGINS));
    ratios.sort_by(f64::total_cmp);
    let median = ratios[WINDOWS / 2];
    println!("{ratios:.2?} {told:?}");
    // Windows in which nothing else ran are told by the least of them.
    let least = |times: &mut dyn Iterator<Item = Duration>| times.min().unwrap_or_default();
    let (quiet, stormy) = (least(&mut told.iter().map(|two| two.0)), least(&mut told.iter().map(|two| two.1)));
    let figures = format!(
        "{LOGINS} server logins while {SERVED} clients run: p99 {median:.2} times the quiet one, the median of {WINDOWS} \
         pairs of windows; in the best of them {quiet:.1?} without and {stormy:.1?} with"
    );
    figures::record("storms", "a_thousand_server_logins_leave_those_that_are_served_alone", &figures);
    assert!(median <= 2.0, "p99 is {median:.2} times the quiet one: {told:?}");
    drop((served, storm));
    assert_calm(&site);
}

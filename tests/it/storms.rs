//! Many clients at once, most of them up to no good: the others get in all the same, and what it costs is bounded.
//!
//! One address is one source for the limits on failed logins; here both sides share it, so these are off.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{query, ssl_request, startup};
use pgweir_harness::{Pgweir, wait_until, wait_until_async};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::{PASSWORD, Place, SOON, Site, assert_value, primary, start_pgweir};

/// How long a client that does everything right may take to get in.
const IN_TIME: Duration = Duration::from_secs(1);

/// How long the slowest of them may, in a debug build that shares two cores with its attackers and their peers: once in a
/// storm the machine is late, not pgweir.
const AT_MOST: Duration = Duration::from_secs(2);

/// On a machine that has other work: times what a login takes when there is no storm.
const AT_MOST_TIMES: u32 = 60;

/// What 5000 clients take on a machine that has other work: on one that has not, 1.7 s.
const UNHURRIED: Duration = Duration::from_millis(2500);

/// How long each storm lasts.
const STORM: Duration = Duration::from_secs(4);

/// Descriptors that this process may open.
fn descriptors() -> u64 {
    let text = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = text.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap_or(u64::MAX)
}

/// Logs in again and again; tells what each time took, sorted.
async fn logins(site: &Site<'_>, lasts: Duration) -> Vec<Duration> {
    let (begun, mut times) = (Instant::now(), Vec::new());
    while begun.elapsed() < lasts {
        let one = Instant::now();
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.login_with(&[("user", site.name()), ("database", site.name())], PASSWORD).await.unwrap();
        times.push(one.elapsed());
        assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
        wire.terminate().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    times.sort();
    times
}

/// What a login takes before the storm, mostly.
async fn quiet(site: &Site<'_>) -> Duration {
    let times = logins(site, Duration::from_millis(500)).await;
    times[times.len() / 2]
}

/// Logs in for as long as the storm lasts, mostly in time; tells what it took and how often it got in.
async fn honest(site: &Site<'_>, quiet: Duration) -> String {
    let times = logins(site, STORM).await;
    let at_most = AT_MOST.max(quiet * AT_MOST_TIMES);
    let late = times.iter().filter(|took| **took > IN_TIME.max(at_most / 2)).count();
    assert!(times.len() > 5, "{times:?}");
    assert!(late <= 1 && times.iter().all(|took| *took < at_most), "{late} late, before it {quiet:?}: {times:?}");
    format!("{} logins, the slowest {:?}, before it {quiet:?}", times.len(), &times[times.len() - 2..])
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
    let before = site.pgweir.rss_anon_kib().unwrap();
    let packet: Arc<[u8]> = startup(&[("user", site.name()), ("database", site.name())]).into();
    let address = site.pgweir.addr();
    let mut clients = JoinSet::new();
    let begun = Instant::now();
    for _ in 0..CLIENTS {
        let packet = packet.clone();
        clients.spawn(async move {
            let mut turned_away = 0;
            loop {
                match enter(address, &packet).await {
                    Ok(stream) => return (stream, turned_away),
                    Err(error) => assert!(turned_away < 20, "turned away again and again: {error}"),
                }
                turned_away += 1;
            }
        });
    }
    let (all, turned_away): (Vec<TcpStream>, Vec<u32>) = clients.join_all().await.into_iter().unzip();
    let took = begun.elapsed();
    // Who has said nothing for half a second may have to give way to another, and comes again: so slow are these clients
    // only where they get no processor.
    let turned_away: u32 = turned_away.iter().sum();
    assert!(turned_away == 0 || took > UNHURRIED, "{turned_away} were turned away in {took:?}");
    assert_eq!(all.len(), CLIENTS as usize);
    wait_until(SOON, || (site.metric("pgweir_process_clients", &[]) - f64::from(CLIENTS)).abs() < 0.5);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    println!("{CLIENTS} clients in {took:?}, {grown} KiB");
    // What their logins took at the same time is free again, and still the process'.
    assert!(grown / u64::from(CLIENTS) <= 16, "{grown} KiB for {CLIENTS} clients");
    assert!(took < Duration::from_mins(1), "{took:?}");
    drop(all);
    assert_calm(&site);
}

/// Logs in and asks for something.
async fn enter(address: SocketAddr, packet: &[u8]) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(packet).await?;
    until_ready(&mut stream).await?;
    stream.write_all(&query("SELECT 1")).await?;
    until_ready(&mut stream).await?;
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

#[tokio::test]
async fn wrong_passwords_at_a_high_rate_keep_nobody_out() {
    let site = Site::start(&[("auth_type", "scram-sha-256"), ("login_failure_rate", "0")]);
    drop(site.client().await);
    let quiet = quiet(&site).await;
    let before = site.pgweir.rss_anon_kib().unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let tried = Arc::new(AtomicU32::new(0));
    let mut attackers = JoinSet::new();
    for n in 0..16 {
        let (over, tried, name, address) = (over.clone(), tried.clone(), site.name().to_owned(), site.pgweir.addr());
        attackers.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let mut wire = Wire::connect(address).await.unwrap();
                let user = if n % 2 == 0 { name.as_str() } else { "nobody" };
                let refused = wire.login_with(&[("user", user), ("database", &name)], "wrong").await;
                assert!(refused.is_err());
                tried.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let logins = honest(&site, quiet).await;
    over.store(true, Ordering::Relaxed);
    attackers.join_all().await;
    let tried = tried.load(Ordering::Relaxed);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    println!("{tried} wrong passwords, {logins}, {grown} KiB");
    assert!(tried > 50, "{tried}");
    assert!(grown < 16 * 1024, "{grown} KiB");
    assert_calm(&site);
}

/// Ways not to log in.
const SLOW: [Slow; 4] = [Slow::Silent, Slow::AfterSsl, Slow::Half, Slow::Drop];

#[derive(Clone, Copy, Debug)]
enum Slow {
    /// Says nothing.
    Silent,
    /// An `SSLRequest`, then nothing.
    AfterSsl,
    /// Half a start-up packet.
    Half,
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
    let quiet = quiet(&site).await;
    let before = site.pgweir.rss_anon_kib().unwrap();
    let packet: Arc<[u8]> = startup(&[("user", site.name()), ("database", site.name())]).into();
    let over = Arc::new(AtomicBool::new(false));
    let mut attackers = JoinSet::new();
    // Two for each place, and whoever is thrown out comes again.
    for n in 0..2 * PLACES as usize {
        let (over, packet, address) = (over.clone(), packet.clone(), site.pgweir.addr());
        attackers.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                SLOW[n % SLOW.len()].hold(address, &packet, &over).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
    }
    wait_until_async(SOON, async || site.metric("pgweir_process_clients_logging_in", &[]) >= f64::from(PLACES) - 0.5)
        .await;
    let logins = honest(&site, quiet).await;
    let most = site.metric("pgweir_process_clients_logging_in", &[]);
    over.store(true, Ordering::Relaxed);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    println!("{logins}, {most} at the door, {grown} KiB");
    assert!(most <= f64::from(PLACES), "{most} at the door");
    assert!(grown < 16 * 1024, "{grown} KiB");
    attackers.join_all().await;
    assert_calm(&site);
}

#[tokio::test]
async fn a_login_has_its_deadline_whatever_trickles_in() {
    let site = Site::start(&[("auth_type", "scram-sha-256"), ("client_login_timeout", "1500ms")]);
    let packet = startup(&[("user", site.name()), ("database", site.name())]);
    let over = AtomicBool::new(false);
    for slow in SLOW {
        let begun = Instant::now();
        slow.hold(site.pgweir.addr(), &packet, &over).await;
        let took = begun.elapsed();
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
    println!("{LOGINS} server logins: p99 {median:.2} times the quiet one, of {ratios:.2?} {told:?}");
    assert!(median <= 2.0, "p99 is {median:.2} times the quiet one: {told:?}");
    drop((served, storm));
    assert_calm(&site);
}

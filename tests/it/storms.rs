//! Many clients at once, most of them up to no good: the others get in all the same, and what it costs is bounded.
//!
//! One address is one source for the limits on failed logins; here both sides share it, so these are off.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{query, ssl_request, startup};
use pgweir_harness::{wait_until, wait_until_async};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::{PASSWORD, SOON, Site, assert_value};

/// How long a client that does everything right may take to get in. The bar is one second; a debug build that shares two
/// cores with its attackers and their peers gets two.
const IN_TIME: Duration = Duration::from_secs(2);

/// How long each storm lasts.
const STORM: Duration = Duration::from_secs(4);

/// Descriptors that this process may open.
fn descriptors() -> u64 {
    let text = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = text.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap_or(u64::MAX)
}

/// Logs in again and again, for as long as the storm lasts; gives the longest that it took, and how often it got in.
async fn honest(site: &Site<'_>, lasts: Duration) -> (Duration, u32) {
    let (begun, mut longest, mut count) = (Instant::now(), Duration::ZERO, 0);
    while begun.elapsed() < lasts {
        let one = Instant::now();
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.login_with(&[("user", site.name()), ("database", site.name())], PASSWORD).await.unwrap();
        longest = longest.max(one.elapsed());
        assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
        wire.terminate().await.unwrap();
        count += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (longest, count)
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
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(&packet).await.unwrap();
            until_ready(&mut stream).await;
            stream.write_all(&query("SELECT 1")).await.unwrap();
            until_ready(&mut stream).await;
            stream
        });
    }
    let all = clients.join_all().await;
    let took = begun.elapsed();
    assert_eq!(all.len(), CLIENTS as usize);
    wait_until(SOON, || (site.metric("pgweir_process_clients", &[]) - f64::from(CLIENTS)).abs() < 0.5);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    println!("{CLIENTS} clients in {took:?}, {grown} KiB");
    // What their logins took at the same time is free again, and still the process'.
    assert!(grown / u64::from(CLIENTS) <= 16, "{grown} KiB for {CLIENTS} clients");
    assert!(took < Duration::from_secs(30), "{took:?}");
    drop(all);
    assert_calm(&site);
}

async fn until_ready(stream: &mut TcpStream) {
    let (mut buf, mut heard) = ([0; 4096], Vec::new());
    while !heard.ends_with(b"Z\0\0\0\x05I") {
        let read = stream.read(&mut buf).await.unwrap();
        assert!(read > 0, "closed after {}", heard.escape_ascii());
        heard.extend_from_slice(&buf[..read]);
    }
}

#[tokio::test]
async fn wrong_passwords_at_a_high_rate_keep_nobody_out() {
    let site = Site::start(&[("auth_type", "scram-sha-256"), ("login_failure_rate", "0")]);
    drop(site.client().await);
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
    let (longest, count) = honest(&site, STORM).await;
    over.store(true, Ordering::Relaxed);
    attackers.join_all().await;
    let tried = tried.load(Ordering::Relaxed);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    println!("{tried} wrong passwords, {count} right ones in at most {longest:?}, {grown} KiB");
    assert!(tried > 50 && count > 5, "{tried} and {count}");
    assert!(longest < IN_TIME, "{longest:?}");
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
    let (longest, count) = honest(&site, STORM).await;
    let most = site.metric("pgweir_process_clients_logging_in", &[]);
    over.store(true, Ordering::Relaxed);
    let grown = site.pgweir.rss_anon_kib().unwrap().saturating_sub(before);
    println!("{count} logins in at most {longest:?}, {most} at the door, {grown} KiB");
    assert!(count > 5 && longest < IN_TIME, "{count} logins in at most {longest:?}");
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

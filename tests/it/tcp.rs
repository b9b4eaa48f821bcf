//! What the kernel is asked to do with TCP connections.

use std::fs;
use std::time::{Duration, Instant};

use pgweir_harness::wait_until;
use pgweir_harness::wire::build::query;

use crate::support::{SOON, Site, assert_value};

/// The kernel's timer of the connection between these ports of 127.0.0.1, seen from the first: what it is for, and in how
/// many hundredths of a second it is due.
///
/// Source: the kernel's documentation, "`/proc/net/tcp` and `/proc/net/tcp6` variables": 0 is none, 2 that of keepalive.
fn timer(own: u16, peer: u16) -> (u8, u64) {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let ends = format!(" 0100007F:{own:04X} 0100007F:{peer:04X} ");
    let line = table.lines().find(|line| line.contains(&ends)).unwrap_or_else(|| panic!("{ends} is not in {table}"));
    let (kind, due) = line.split_whitespace().nth(5).unwrap().split_once(':').unwrap();
    (u8::from_str_radix(kind, 16).unwrap(), u64::from_str_radix(due, 16).unwrap())
}

#[tokio::test]
async fn silent_connections_are_probed_as_far_as_wanted() {
    #[rustfmt::skip]
    let table: [(&str, &[(&str, &str)], u8, std::ops::RangeInclusive<u64>); 4] = [
        ("by default", &[],                            2, 1..=u64::MAX),
        ("soon",       &[("tcp_keepidle", "30s")],     2, 1..=3_000),
        ("late",       &[("tcp_keepidle", "20000s")],  2, 1_000_000..=2_000_000),
        ("never",      &[("tcp_keepalive", "false"), ("tcp_keepidle", "30s")], 0, 0..=0),
    ];
    for (name, settings, kind, due) in table {
        let site = Site::start(settings);
        let mut client = site.client().await;
        assert_value(&client.query("SELECT 1").await.unwrap(), "1");
        let asked = format!("SELECT client_port FROM pg_stat_activity WHERE usename = '{}'", site.name());
        let server = site.place.cluster.psql("postgres", &asked).unwrap().parse().unwrap();
        let ways = [
            ("to its client", site.pgweir.port(), client.local_addr().unwrap().port()),
            ("to its server", server, site.place.cluster.port()),
        ];
        for (way, own, peer) in ways {
            let as_wanted = |(now, left): (u8, u64)| now == kind && due.contains(&left);
            // What was sent last may not be acknowledged yet.
            let begun = Instant::now();
            while !as_wanted(timer(own, peer)) && begun.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(20));
            }
            let now = timer(own, peer);
            assert!(as_wanted(now), "{name}, {way}: {now:?}");
        }
    }
}

/// Bytes that are never acknowledged, for want of room: the peer's kernel answers every probe.
#[tokio::test]
async fn a_client_that_takes_nothing_for_tcp_user_timeout_is_dead() {
    let clients = |site: &Site<'_>| site.metric("pgweir_process_clients", &[]);
    let mut took = Duration::from_secs(2);
    for (timeout, ends) in [("1s", true), ("1h", false), ("0s", false)] {
        let site = Site::start(&[("tcp_user_timeout", timeout)]);
        let mut client = site.client().await;
        wait_until(SOON, || clients(&site) > 0.5);
        client.send(&query("SELECT repeat('x', 100000000)")).await.unwrap();
        let begun = Instant::now();
        if ends {
            wait_until(SOON, || clients(&site) < 0.5);
            took = begun.elapsed();
            assert!(took > Duration::from_millis(900), "{took:?}");
        } else {
            while begun.elapsed() < took * 2 {
                assert!(clients(&site) > 0.5, "{timeout}: gone after {:?}", begun.elapsed());
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        drop(client);
    }
}

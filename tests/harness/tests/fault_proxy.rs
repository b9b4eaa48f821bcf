//! The fault proxy, tested between a client and an echo server or Postgres.
#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use pgweir_harness::wire::{Wire, WireError};
use pgweir_harness::{Auth, Cluster, ClusterOptions, Direction, FaultProxy, wait_until, wait_until_async};

const SOON: Duration = Duration::from_secs(20);
/// Long enough to show that nothing comes, short enough to wait for.
const A_WHILE: Duration = Duration::from_millis(150);

/// A server that takes one connection after the other and hands each to the test.
struct Server {
    address: SocketAddr,
    accepted: mpsc::Receiver<TcpStream>,
}

fn server() -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (send, accepted) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            if send.send(stream.unwrap()).is_err() {
                return;
            }
        }
    });
    Server { address, accepted }
}

/// A connection through a proxy: the client's end and the server's.
fn pair() -> (FaultProxy, TcpStream, TcpStream, Server) {
    let server = server();
    let proxy = FaultProxy::start(server.address).unwrap();
    let client = TcpStream::connect(proxy.addr()).unwrap();
    let end = server.accepted.recv_timeout(SOON).unwrap();
    for stream in [&client, &end] {
        stream.set_read_timeout(Some(SOON)).unwrap();
    }
    (proxy, client, end, server)
}

fn read(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn is_silent(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(A_WHILE)).unwrap();
    let silent = stream.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    stream.set_read_timeout(Some(SOON)).unwrap();
    silent
}

fn is_reset(stream: &mut TcpStream) -> bool {
    stream.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn bytes_pass_both_ways_and_are_counted() {
    let (proxy, mut client, mut end, _server) = pair();
    client.write_all(b"hello").unwrap();
    assert_eq!(read(&mut end, 5), b"hello");
    end.write_all(b"hi").unwrap();
    assert_eq!(read(&mut client, 2), b"hi");
    let big = vec![7; 3_000_000];
    let copy = big.clone();
    let mut sender = client.try_clone().unwrap();
    let sending = thread::spawn(move || sender.write_all(&copy).unwrap());
    assert_eq!(read(&mut end, big.len()), big);
    sending.join().unwrap();
    assert_eq!(proxy.bytes(Direction::ToServer), 3_000_005);
    assert_eq!(proxy.bytes(Direction::ToClient), 2);
    assert_eq!((proxy.accepted(), proxy.open()), (1, 1));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(end.read(&mut [0]).unwrap(), 0, "the end of the stream passes");
    end.write_all(b"late").unwrap();
    assert_eq!(read(&mut client, 4), b"late");
    drop(end);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    wait_until(SOON, || proxy.open() == 0);
}

#[test]
fn a_cut_resets_both_ends() {
    let (proxy, mut client, mut end, server) = pair();
    assert_eq!(proxy.open(), 1);
    proxy.cut_all();
    assert!(is_reset(&mut client));
    assert!(is_reset(&mut end));
    assert_eq!(proxy.open(), 0);
    let mut client = TcpStream::connect(proxy.addr()).unwrap();
    let mut end = server.accepted.recv_timeout(SOON).unwrap();
    client.write_all(b"again").unwrap();
    assert_eq!(read(&mut end, 5), b"again");
}

#[test]
fn a_reset_of_one_end_is_passed_on() {
    let (_proxy, client, mut end, _server) = pair();
    client.set_nodelay(true).unwrap();
    end.write_all(b"unread").unwrap();
    // Closing with unread bytes resets (RFC 2525 §2.17).
    wait_until(SOON, || client.peek(&mut [0; 6]).is_ok_and(|n| n == 6));
    drop(client);
    assert!(is_reset(&mut end));
}

#[test]
fn a_half_close_ends_one_direction_only() {
    let (proxy, mut client, mut end, _server) = pair();
    proxy.half_close(Direction::ToServer);
    assert_eq!(end.read(&mut [0]).unwrap(), 0);
    client.write_all(b"lost").unwrap();
    end.write_all(b"still").unwrap();
    assert_eq!(read(&mut client, 5), b"still");
    end.write_all(b" here").unwrap();
    assert_eq!(read(&mut client, 5), b" here");
}

#[test]
fn a_black_hole_holds_bytes_until_healed() {
    let (proxy, mut client, mut end, _server) = pair();
    client.write_all(b"a").unwrap();
    assert_eq!(read(&mut end, 1), b"a");
    proxy.black_hole(Direction::ToServer);
    client.write_all(b"b").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert!(is_silent(&mut end));
    end.write_all(b"c").unwrap();
    assert_eq!(read(&mut client, 1), b"c", "the other direction is whole");
    proxy.heal();
    assert_eq!(read(&mut end, 1), b"b");
    assert_eq!(end.read(&mut [0]).unwrap(), 0);
}

#[test]
fn who_has_vanished_receives_and_says_nothing_and_a_new_connection_is_whole() {
    let (proxy, mut client, mut end, server) = pair();
    proxy.vanish();
    client.write_all(b"a").unwrap();
    end.write_all(b"b").unwrap();
    assert!(is_silent(&mut client) && is_silent(&mut end));
    let mut next = TcpStream::connect(proxy.addr()).unwrap();
    let mut next_end = server.accepted.recv_timeout(SOON).unwrap();
    next.write_all(b"c").unwrap();
    assert_eq!(read(&mut next_end, 1), b"c");
}

#[test]
fn a_new_connection_falls_into_the_same_black_hole() {
    let (proxy, _client, _end, server) = pair();
    proxy.black_hole(Direction::ToClient);
    let mut client = TcpStream::connect(proxy.addr()).unwrap();
    let mut end = server.accepted.recv_timeout(SOON).unwrap();
    end.write_all(b"x").unwrap();
    assert!(is_silent(&mut client));
    proxy.heal();
    assert_eq!(read(&mut client, 1), b"x");
}

#[test]
fn a_delay_shifts_bytes_without_slowing_them() {
    let (proxy, mut client, mut end, _server) = pair();
    // Longer than a busy machine keeps anybody waiting.
    let delay = Duration::from_secs(1);
    proxy.delay(Direction::ToServer, delay);
    let start = Instant::now();
    for _ in 0..20 {
        client.write_all(b"x").unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    read(&mut end, 1);
    assert!(start.elapsed() >= delay, "{:?}", start.elapsed());
    read(&mut end, 19);
    // One after the other they would take 20 delays.
    assert!(start.elapsed() < delay * 15, "{:?}", start.elapsed());
    end.write_all(b"y").unwrap();
    let back = Instant::now();
    read(&mut client, 1);
    assert!(back.elapsed() < delay, "the way back is not delayed");
}

#[test]
fn single_bytes_arrive_in_order() {
    let (proxy, mut client, mut end, _server) = pair();
    proxy.one_byte_per_write(true);
    let bytes: Vec<u8> = (0..=255).collect();
    // On a busy machine a round may arrive whole because this thread did not run meanwhile.
    let mut most_reads = 0;
    for _ in 0..50 {
        client.write_all(&bytes).unwrap();
        let (mut got, mut reads) = (Vec::<u8>::new(), 0);
        while got.len() < bytes.len() {
            let mut chunk = [0; 256];
            let read = end.read(&mut chunk).unwrap();
            got.extend(&chunk[..read]);
            reads += 1;
        }
        assert_eq!(got, bytes);
        most_reads = most_reads.max(reads);
    }
    println!("at most {most_reads} reads for 256 bytes");
    assert!(most_reads > 10, "{most_reads}");
}

#[test]
fn a_cut_after_n_bytes_delivers_exactly_n() {
    for n in [0_u32, 1, 7, 100_000] {
        let (proxy, mut client, mut end, server) = pair();
        proxy.cut_after_bytes(Direction::ToServer, n.into());
        // The reset may come while we still write.
        let _ = client.write_all(&vec![1; 200_000]);
        let mut got = 0;
        let mut buffer = vec![0; 4096];
        let error = loop {
            match end.read(&mut buffer) {
                Ok(0) => panic!("{n}: an orderly end"),
                Ok(read) => got += u32::try_from(read).unwrap(),
                Err(error) => break error,
            }
        };
        assert_eq!((got, error.kind()), (n, ErrorKind::ConnectionReset));
        assert_eq!(proxy.bytes(Direction::ToServer), n.into());
        // Spent: the next connection lives.
        let mut client = TcpStream::connect(proxy.addr()).unwrap();
        let mut end = server.accepted.recv_timeout(SOON).unwrap();
        client.write_all(&[2; 1000]).unwrap();
        assert_eq!(read(&mut end, 1000), [2; 1000]);
    }
}

#[test]
fn refusal_closes_the_port_and_spares_the_open() {
    let (proxy, mut client, mut end, _server) = pair();
    proxy.refuse_new(true);
    // What is on its way to the port at that moment may still get in.
    let is_refused =
        || TcpStream::connect(proxy.addr()).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    wait_until(SOON, is_refused);
    client.write_all(b"x").unwrap();
    assert_eq!(read(&mut end, 1), b"x");
    proxy.refuse_new(false);
    TcpStream::connect(proxy.addr()).unwrap();
}

#[test]
fn an_absent_target_resets_the_client() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = FaultProxy::start(gone).unwrap();
    let mut client = TcpStream::connect(proxy.addr()).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    assert!(is_reset(&mut client));
}

#[tokio::test]
async fn postgres_behind_a_proxy_loses_its_client() {
    let cluster = Cluster::start(ClusterOptions::auth(Auth::Scram)).unwrap();
    let proxy = FaultProxy::start(cluster.addr()).unwrap();
    proxy.one_byte_per_write(true);
    let mut wire = Wire::open(proxy.addr(), "app", "app", "app-secret").await.unwrap();
    proxy.heal();
    assert_eq!(wire.query("SELECT 1").await.unwrap().value(), Some("1"));
    let filter = pgweir_harness::ConnectionFilter::user("app");
    assert_eq!(cluster.count_connections(&filter).unwrap(), 1);
    proxy.cut_all();
    let lost = wire.query("SELECT 2").await;
    assert!(matches!(lost, Err(WireError::Io { .. } | WireError::Closed { .. })));
    wait_until_async(SOON, async || cluster.count_connections(&filter).unwrap() == 0).await;
}

#[test]
fn a_follower_behind_a_black_hole_lags_and_catches_up() {
    let primary = Cluster::start(ClusterOptions::default()).unwrap();
    let proxy = FaultProxy::start(primary.addr()).unwrap();
    let through = ClusterOptions { replicate_through: Some(proxy.addr()), ..ClusterOptions::default() };
    let follower = primary.follower(through).unwrap();
    proxy.black_hole(Direction::ToClient);
    primary.psql("app", "CREATE TABLE t ()").unwrap();
    assert!(primary.await_replay(&follower, A_WHILE).is_err());
    proxy.heal();
    primary.await_replay(&follower, SOON).unwrap();
}

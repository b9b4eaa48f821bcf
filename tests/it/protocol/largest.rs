//! Messages near the limit of 1 GiB, in every direction, pass in bounded memory: only Postgres ever holds one whole.
//!
//! Postgres makes and takes nothing that does not fit into 1 GiB less a byte, headers included. Source: `PostgreSQL` 17,
//! memutils.h, `MaxAllocSize`; postgres.c, `SocketBackend`.

use std::time::{Duration, Instant};

use pgweir_harness::wire::build::{copy_done, describe_portal, execute, parse, query, sync};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::bulk::{MemoryWatch, writer_of};
use crate::figures;
use crate::support::{Site, assert_value};

/// The longest value of a row that Postgres can make, less a few bytes.
const ROW: usize = (1 << 30) - 24;
/// A value that Postgres can take; its own copies need some room.
const VALUE: usize = 1_000_000_000;
/// A string constant that Postgres' scanner can take: its buffer doubles, and must not become 1 GiB.
const CONSTANT: usize = 500_000_000;
/// What pgweir's anonymous memory may grow by; KiB.
const GROWTH: u64 = 4 << 10;
/// Longest test: the machine may be busy, and Postgres copies each value several times.
const PATIENCE: Duration = Duration::from_mins(5);
/// Bytes written or read at once.
const PIECE: usize = 1 << 20;

/// A message of which only a short body was kept.
#[derive(Debug)]
struct Seen {
    tag: u8,
    length: usize,
    /// How many bytes of the body are the one that fills it.
    filled: usize,
    body: Vec<u8>,
}

/// Reads one message without keeping it.
async fn see(stream: &mut (impl AsyncRead + Unpin), fill: u8) -> Seen {
    let tag = stream.read_u8().await.unwrap();
    let length = usize::try_from(stream.read_u32().await.unwrap()).unwrap() - 4;
    let mut seen = Seen { tag, length, filled: 0, body: Vec::new() };
    let (mut piece, mut left) = (vec![0; PIECE], length);
    while left > 0 {
        let room = left.min(PIECE);
        let read = stream.read(&mut piece[..room]).await.unwrap();
        assert!(read > 0, "the end of the stream in {seen:?}");
        seen.filled += memchr::memchr_iter(fill, &piece[..read]).count();
        if length <= PIECE {
            seen.body.extend_from_slice(&piece[..read]);
        }
        left -= read;
    }
    seen
}

/// Reads up to `ReadyForQuery`.
async fn see_all(stream: &mut (impl AsyncRead + Unpin), fill: u8) -> Vec<Seen> {
    let mut all = Vec::new();
    loop {
        all.push(see(stream, fill).await);
        if all.last().is_some_and(|seen| seen.tag == b'Z') {
            return all;
        }
    }
}

fn tags(seen: &[Seen]) -> String {
    seen.iter().map(|seen| char::from(seen.tag)).collect()
}

/// Writes a message whose body is `before`, `count` times `fill`, and `after`, without ever holding it.
async fn pour(
    stream: &mut (impl AsyncWrite + Unpin),
    tag: u8,
    before: &[u8],
    (fill, count): (u8, usize),
    after: &[u8],
) {
    let length = u32::try_from(4 + before.len() + count + after.len()).unwrap();
    stream.write_all(&[&[tag], &length.to_be_bytes()[..], before].concat()).await.unwrap();
    let piece = vec![fill; PIECE];
    let mut left = count;
    while left > 0 {
        let written = stream.write(&piece[..left.min(PIECE)]).await.unwrap();
        left -= written;
    }
    stream.write_all(after).await.unwrap();
}

/// Runs a conversation on the socket of a client that has logged in, watches pgweir's memory meanwhile, and looks whether
/// the server connection is still good.
async fn converse(test: &str, what: &str, talk: impl AsyncFnOnce(&mut TcpStream)) {
    let site = Site::start(&[("default_pool_size", "1")]);
    site.place.psql("CREATE UNLOGGED TABLE t (v text); GRANT ALL ON t TO PUBLIC");
    let mut client = site.client().await;
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    let mut stream = writer_of(&client);
    let (begun, memory) = (Instant::now(), MemoryWatch::start(&site.pgweir));
    timeout(PATIENCE, talk(&mut stream)).await.unwrap();
    let (growth, took) = (memory.finish(), begun.elapsed());
    assert!(growth < GROWTH, "{growth} KiB");
    client.set_patience(Duration::from_mins(1));
    assert_value(&client.query("SELECT 2").await.unwrap(), "2");
    let figures = format!("{what}: pgweir's memory grew by {growth} KiB, in {:.1} s", took.as_secs_f64());
    figures::record("protocol::largest", test, &figures);
}

#[tokio::test]
#[ignore = "long: 1 GiB"]
async fn a_row_of_one_gib_passes_in_bounded_memory() {
    const NAME: &str = "a_row_of_one_gib_passes_in_bounded_memory";
    converse(NAME, &format!("a value of {ROW} bytes"), async |stream| {
        stream.write_all(&query(&format!("SELECT repeat('x', {ROW})"))).await.unwrap();
        let seen = see_all(&mut BufReader::with_capacity(PIECE, stream), b'x').await;
        assert_eq!(tags(&seen), "TDCZ", "{seen:?}");
        assert_eq!((seen[1].length, seen[1].filled), (2 + 4 + ROW, ROW));
    })
    .await;
}

#[tokio::test]
#[ignore = "long: 1 GB each way"]
async fn copy_data_of_one_gb_passes_in_bounded_memory_both_ways() {
    const NAME: &str = "copy_data_of_one_gb_passes_in_bounded_memory_both_ways";
    converse(NAME, &format!("a row of {VALUE} bytes each way"), async |stream| {
        stream.write_all(&query("COPY t FROM STDIN")).await.unwrap();
        pour(stream, b'd', b"", (b'y', VALUE), b"\n").await;
        stream.write_all(&[copy_done(), query("COPY t TO STDOUT")].concat()).await.unwrap();
        let stream = &mut BufReader::with_capacity(PIECE, stream);
        let seen = see_all(stream, b'y').await;
        assert_eq!(tags(&seen), "GCZ", "{seen:?}");
        let seen = see_all(stream, b'y').await;
        assert_eq!(tags(&seen), "HdcCZ", "{seen:?}");
        assert_eq!((seen[1].length, seen[1].filled), (VALUE + 1, VALUE));
    })
    .await;
}

#[tokio::test]
#[ignore = "long: 1 GB"]
async fn a_bind_of_one_gb_passes_in_bounded_memory() {
    const NAME: &str = "a_bind_of_one_gb_passes_in_bounded_memory";
    converse(NAME, &format!("a parameter of {VALUE} bytes, renamed statement"), async |stream| {
        stream.write_all(&parse("s", "SELECT length($1::text)", &[])).await.unwrap();
        // No formats, one parameter; behind it no formats of results.
        let length = u32::try_from(VALUE).unwrap().to_be_bytes();
        let before = [&b"\0s\0\0\0\0\x01"[..], &length].concat();
        pour(stream, b'B', &before, (b'z', VALUE), b"\0\0").await;
        stream.write_all(&[describe_portal(""), execute("", 0), sync()].concat()).await.unwrap();
        let seen = see_all(&mut BufReader::with_capacity(PIECE, stream), b'z').await;
        assert_eq!(tags(&seen), "12TDCZ", "{seen:?}");
        assert!(seen[3].body.ends_with(VALUE.to_string().as_bytes()), "{seen:?}");
    })
    .await;
}

#[tokio::test]
#[ignore = "long: 0.5 GB and 1 GiB"]
async fn a_query_text_of_half_a_gb_runs_and_one_too_long_gets_postgres_own_error() {
    const NAME: &str = "a_query_text_of_half_a_gb_runs_and_one_too_long_gets_postgres_own_error";
    let what = format!("a constant of {CONSTANT} bytes, answered; one of {VALUE}, refused by Postgres");
    converse(NAME, &what, async |stream| {
        pour(stream, b'Q', b"SELECT length('", (b'q', CONSTANT), b"')\0").await;
        let seen = see_all(stream, b'q').await;
        assert_eq!(tags(&seen), "TDCZ", "{seen:?}");
        assert!(seen[1].body.ends_with(CONSTANT.to_string().as_bytes()), "{seen:?}");
        pour(stream, b'Q', b"SELECT length('", (b'q', VALUE), b"')\0").await;
        let seen = see_all(stream, b'q').await;
        assert_eq!(tags(&seen), "EZ", "{seen:?}");
        let text = String::from_utf8_lossy(&seen[0].body);
        assert!(text.contains("CXX000\0") && text.contains("invalid memory alloc request size 1073741824"), "{text}");
    })
    .await;
}

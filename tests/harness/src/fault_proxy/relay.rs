//! One connection through the proxy.
//!
//! Each direction is a reader and a writer with a short queue between them, so that a delay
//! shifts bytes in time without slowing them down.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError};
use std::time::Duration;

use socket2::{SockFilter, SockRef};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::os;

use super::{Counts, Direction, Faults};

/// Bytes read at once.
const CHUNK: usize = 16 * 1024;
/// Chunks between reader and writer: with [`CHUNK`], 256 KiB per direction at most.
const QUEUE: usize = 16;

/// A chunk on its way; empty is the end of the stream.
struct Chunk {
    due: Instant,
    bytes: Vec<u8>,
}

/// The two sockets of a connection. Plain `TcpStream`s, since tokio's write half sends an
/// orderly end when dropped, which would come before a reset.
#[derive(Debug)]
pub(super) struct Relay {
    client: TcpStream,
    /// Set once connected.
    server: OnceLock<TcpStream>,
    closed_to_server: AtomicBool,
    closed_to_client: AtomicBool,
}

impl Relay {
    pub(super) fn new(client: TcpStream) -> Self {
        Self {
            client,
            server: OnceLock::new(),
            closed_to_server: AtomicBool::new(false),
            closed_to_client: AtomicBool::new(false),
        }
    }

    /// Connects to the target and passes bytes until both directions have ended. A failure of one
    /// side is passed on as a reset of the other.
    pub(super) async fn run(&self, target: SocketAddr, faults: watch::Receiver<Faults>, counts: &Counts) {
        let Ok(server) = connect(target).await else {
            self.reset_on_close();
            return;
        };
        let server = self.server.get_or_init(|| server);
        // Asked for while we were connecting.
        if self.closed(Direction::ToServer).load(Ordering::Relaxed) {
            self.half_close(Direction::ToServer);
        }
        // Without it single bytes would be joined again by Nagle's algorithm.
        let _ = self.client.set_nodelay(true);
        let _ = server.set_nodelay(true);
        let there = self.pass(&self.client, server, Direction::ToServer, &faults, counts);
        let back = self.pass(server, &self.client, Direction::ToClient, &faults, counts);
        if tokio::try_join!(there, back).is_err() {
            self.reset_on_close();
        }
    }

    /// Makes the close of both sockets a reset.
    pub(super) fn reset_on_close(&self) {
        let _ = self.client.set_zero_linger();
        if let Some(server) = self.server.get() {
            let _ = server.set_zero_linger();
        }
    }

    /// Ends the stream towards the receiver of `direction`.
    pub(super) fn half_close(&self, direction: Direction) {
        self.closed(direction).store(true, Ordering::Relaxed);
        let receiver = match direction {
            Direction::ToServer => self.server.get(),
            Direction::ToClient => Some(&self.client),
        };
        if let Some(receiver) = receiver {
            let _ = SockRef::from(receiver).shutdown(Shutdown::Write);
        }
    }

    /// Has the kernel drop whatever comes in on either side, before it acknowledges it: so nothing leaves either.
    pub(super) async fn vanish(&self) {
        for stream in [Some(&self.client), self.server.get()].into_iter().flatten() {
            let socket = SockRef::from(stream);
            // BPF_RET | BPF_K: of a packet keep this many bytes. Any process may filter what is its own.
            while socket.attach_filter(&[SockFilter::new(0x06, 0, 0, 0)]).is_ok() && os::unacknowledged(stream) > 0 {
                // It would be repeated, and so the peer hears of us.
                let _ = socket.detach_filter();
                sleep(Duration::from_millis(1)).await;
            }
        }
    }

    fn closed(&self, direction: Direction) -> &AtomicBool {
        match direction {
            Direction::ToServer => &self.closed_to_server,
            Direction::ToClient => &self.closed_to_client,
        }
    }

    async fn pass(
        &self,
        from: &TcpStream,
        to: &TcpStream,
        direction: Direction,
        faults: &watch::Receiver<Faults>,
        counts: &Counts,
    ) -> io::Result<()> {
        let (queue, queued) = mpsc::channel(QUEUE);
        let reading = read(from, direction, faults.clone(), queue);
        let writing = write(to, direction, faults.clone(), queued, counts);
        match tokio::try_join!(reading, writing) {
            // Writing to a stream that `half_close` ended is no failure; nothing more is read.
            Err(_) if self.closed(direction).load(Ordering::Relaxed) => Ok(()),
            done => done.map(drop),
        }
    }
}

/// Connects such that a cut in the middle of it is a reset, too: the target may already have
/// accepted what we have not yet seen connected.
async fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let socket = match target {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_zero_linger()?;
    let stream = socket.connect(target).await?;
    SockRef::from(&stream).set_linger(None)?;
    Ok(stream)
}

async fn read(
    from: &TcpStream,
    direction: Direction,
    mut faults: watch::Receiver<Faults>,
    queue: mpsc::Sender<Chunk>,
) -> io::Result<()> {
    loop {
        open_way(&mut faults, direction).await;
        tokio::select! {
            // A black hole may open while nothing is to be read.
            _ = faults.changed() => continue,
            ready = from.readable() => ready?,
        }
        let mut bytes = vec![0; CHUNK];
        match from.try_read(&mut bytes) {
            Ok(read) => bytes.truncate(read),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        let ended = bytes.is_empty();
        let due = Instant::now() + faults.borrow().way(direction).delay;
        let sent = queue.send(Chunk { due, bytes }).await;
        if ended || sent.is_err() {
            return Ok(());
        }
    }
}

async fn write(
    to: &TcpStream,
    direction: Direction,
    mut faults: watch::Receiver<Faults>,
    mut queued: mpsc::Receiver<Chunk>,
    counts: &Counts,
) -> io::Result<()> {
    while let Some(Chunk { due, bytes }) = queued.recv().await {
        sleep_until(due).await;
        if bytes.is_empty() {
            open_way(&mut faults, direction).await;
            return SockRef::from(to).shutdown(Shutdown::Write);
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let one_byte = open_way(&mut faults, direction).await.one_byte;
            let wanted = if one_byte { 1 } else { rest.len() };
            let allowed = wanted.min(before_cut(counts, direction));
            let (now, _) = rest.split_at(allowed);
            let written = write_some(to, now, counts.bytes(direction)).await?;
            rest = rest.split_at(written).1;
            if reaches_cut(counts, direction, count(written)) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if one_byte {
                // Let the receiver read it before the next one joins it in its buffer.
                std::thread::yield_now();
                tokio::task::yield_now().await;
            }
        }
    }
    Ok(())
}

/// Writes at least one byte, unless there is none to write. Counts before it writes and corrects
/// itself after, so that no receiver has more bytes than were counted.
async fn write_some(to: &TcpStream, bytes: &[u8], counter: &AtomicU64) -> io::Result<usize> {
    loop {
        if bytes.is_empty() {
            return Ok(0);
        }
        to.writable().await?;
        counter.fetch_add(count(bytes.len()), Ordering::Relaxed);
        let done = to.try_write(bytes);
        let unwritten = bytes.len() - done.as_ref().map_or(0, |written| *written);
        counter.fetch_sub(count(unwritten), Ordering::Relaxed);
        match done {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

fn count(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Waits until this direction is no black hole; then its faults.
async fn open_way(faults: &mut watch::Receiver<Faults>, direction: Direction) -> super::Way {
    let open = faults.wait_for(|faults| !faults.way(direction).black_hole);
    match open.await {
        Ok(faults) => *faults.way(direction),
        // The handle is gone; the thread is about to end.
        Err(_) => super::Way::default(),
    }
}

/// How many bytes may pass until the cut.
fn before_cut(counts: &Counts, direction: Direction) -> usize {
    let cut = counts.cut(direction).lock();
    match *cut.unwrap_or_else(PoisonError::into_inner) {
        Some(left) => usize::try_from(left).unwrap_or(usize::MAX),
        None => usize::MAX,
    }
}

/// Takes `passed` bytes off what may pass; true, once, when that was the last.
fn reaches_cut(counts: &Counts, direction: Direction, passed: u64) -> bool {
    let mut cut = counts.cut(direction).lock().unwrap_or_else(PoisonError::into_inner);
    let Some(left) = *cut else { return false };
    let left = left.saturating_sub(passed);
    *cut = (left > 0).then_some(left);
    left == 0
}

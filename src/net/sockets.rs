//! The connected sockets of a worker, known from outside: a worker that hangs cannot close them itself.
//!
//! A socket is on its worker's list from when it is connected until just before it is closed. Whoever [cuts](Sockets::cut) the
//! list ends every connection on it, and nothing gets on it any more: a worker that wakes up finds its connections ended, and
//! has no others.
//!
//! # Why nobody else's socket is hit
//!
//! A number of a descriptor is used again as soon as it is closed. A number on the list is not closed before it is taken off,
//! which needs the lock that is held while the list is cut. Then a socket that leads nowhere is put in the place of each, under
//! the same number: that the worker closes when it wakes up, whatever the number was used for before.
//!
//! # Servers that are gone
//!
//! A server that vanishes while bytes are on their way to it is missed by nobody for a quarter of an hour: the kernel repeats
//! them, and sends none of its probes meanwhile. `TCP_USER_TIMEOUT` shortens that, but ends those, too, that acknowledge and do
//! not read for so long: a client that looks at its rows, a server that waits for a lock in the middle of a COPY. So the worker
//! [looks itself](Sockets::end_unheard).

use std::fmt;
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use rustix::io::DupFlags;
use rustix::net::Shutdown;
use socket2::{Domain, SockRef};
use tokio::net::{TcpStream, UnixStream};

use super::Stream;
use crate::stats::PoolName;

/// How long the lock is waited for when the list is cut: it is held for nanoseconds, unless its holder was stopped.
const LOCK_LIMIT: Duration = Duration::from_millis(100);

/// The list of one worker.
#[derive(Clone, Default)]
pub struct Sockets(Arc<Mutex<List>>);

#[derive(Default)]
struct List {
    is_cut: bool,
    /// One bit for the descriptor of each number: whether it is on the list.
    bits: Vec<u64>,
    /// What is known of those that lead to a session of a server.
    servers: HashMap<RawFd, Server, foldhash::fast::RandomState>,
    /// Since when, at the earliest that is known, those of them have acknowledged nothing whose bytes are being repeated.
    unheard: HashMap<RawFd, Instant, foldhash::fast::RandomState>,
    /// Those of them that a worker has dropped in a panic of its own.
    left: Vec<Left>,
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets").finish_non_exhaustive()
    }
}

/// What it takes to see a server connection to its end.
#[derive(Clone)]
pub struct Server {
    /// The pool that counts it.
    pub pool: PoolName,
    /// The server's process id; 0 if it gave none.
    pub pid: u32,
    /// What cancels its query.
    pub secret: Box<[u8]>,
    /// It has TLS.
    pub encrypted: bool,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("pool", &self.pool).field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// A server connection whose worker is gone: the server was told that nothing more will come, and may not have ended yet.
#[derive(Debug)]
pub struct Left {
    /// What is known of it.
    pub server: Server,
    socket: OwnedFd,
}

impl Left {
    /// The connection in the hands of this thread's event loop, and on its worker's list. What is read is of no use: it may
    /// begin anywhere, and be encrypted. But its end is the server's.
    ///
    /// # Errors
    ///
    /// Whatever the system reports.
    pub fn into_stream(self, sockets: &Sockets) -> io::Result<Stream> {
        let stream = if SockRef::from(&self.socket).domain()? == Domain::UNIX {
            Stream::Unix(sockets.enter(UnixStream::from_std(self.socket.into())?)?)
        } else {
            Stream::Tcp(sockets.enter(TcpStream::from_std(self.socket.into())?)?)
        };
        stream.mark(self.server);
        Ok(stream)
    }
}

/// A socket that is on the list.
#[derive(Debug)]
pub struct Listed<S: AsRawFd> {
    stream: S,
    sockets: Sockets,
}

impl<S: AsRawFd> Listed<S> {
    /// The socket itself.
    #[inline]
    pub const fn socket(&self) -> &S {
        &self.stream
    }

    /// It leads to a session of a server.
    pub fn mark(&self, server: Server) {
        let mut list = self.sockets.lock();
        let fd = self.stream.as_raw_fd();
        if list.has(fd) {
            list.servers.insert(fd, server);
        }
    }
}

impl<S: AsRawFd> Drop for Listed<S> {
    /// Runs before the socket itself is dropped, and closed.
    fn drop(&mut self) {
        let mut list = self.sockets.lock();
        let fd = self.stream.as_raw_fd();
        list.set(fd, false);
        list.unheard.remove(&fd);
        let server = list.servers.remove(&fd);
        // A session that panics sees its server connection to its end. So only the worker's own end gets here.
        if let Some(server) = server.filter(|_| std::thread::panicking()) {
            list.left.extend(keep(fd, server));
        }
    }
}

impl Sockets {
    /// Puts a connected socket on the list.
    ///
    /// # Errors
    ///
    /// The list was cut: the socket is closed.
    pub fn enter<S: AsRawFd>(&self, stream: S) -> io::Result<Listed<S>> {
        let mut list = self.lock();
        if list.is_cut {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        list.set(stream.as_raw_fd(), true);
        drop(list);
        Ok(Listed { stream, sockets: self.clone() })
    }

    /// Whether the list was cut.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.lock().is_cut
    }

    /// Ends every connection on the list, for its worker as for its peer, and lets no other get on it. What is left are the
    /// servers' ends of them. None if the worker hangs with the list itself in its hands: then nothing was done.
    #[must_use]
    pub fn cut(&self) -> Option<Vec<Left>> {
        let mut list = self.lock_soon()?;
        list.is_cut = true;
        let (bits, mut servers) = (std::mem::take(&mut list.bits), std::mem::take(&mut list.servers));
        // Its peer is gone: reads are at their end, and writes fail. Without descriptors left there is none.
        let nowhere = StdUnixStream::pair().ok().map(|(one, _)| one);
        let mut left = std::mem::take(&mut list.left);
        for fd in numbers(&bits) {
            left.extend(end(fd, servers.remove(&fd), nowhere.as_ref()));
        }
        drop(list);
        Some(left)
    }

    /// Ends the server connections that have acknowledged nothing for `limit` of what was sent, although the kernel repeats it:
    /// to their worker it is as if the server had ended them. What is known of these. Call it often, compared to `limit`.
    #[must_use]
    pub fn end_unheard(&self, now: Instant, limit: Duration) -> Vec<Server> {
        let mut list = self.lock();
        let List { servers, unheard, .. } = &mut *list;
        let mut ended = Vec::new();
        for (fd, server) in &*servers {
            let Some(silence) = silence(*fd) else {
                unheard.remove(fd);
                continue;
            };
            // At the first look the last word may be long ago, for nothing was asked, and what is repeated quite new.
            let since = unheard.entry(*fd).or_insert(now);
            *since = now.checked_sub(silence).map_or(*since, |heard| heard.max(*since));
            if now.saturating_duration_since(*since) >= limit {
                unheard.remove(fd);
                shut(*fd);
                ended.push(server.clone());
            }
        }
        ended
    }

    /// A list after a panic is still one: each change of it is a single one.
    fn lock(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_soon(&self) -> Option<MutexGuard<'_, List>> {
        let until = Instant::now() + LOCK_LIMIT;
        loop {
            match self.0.try_lock() {
                Ok(list) => return Some(list),
                Err(TryLockError::Poisoned(list)) => return Some(list.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl List {
    fn set(&mut self, fd: RawFd, is_on: bool) {
        let Ok(number) = usize::try_from(fd) else { return };
        let (word, bit) = (number / 64, 1 << (number % 64));
        if is_on && word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        if let Some(bits) = self.bits.get_mut(word) {
            *bits = if is_on { *bits | bit } else { *bits & !bit };
        }
    }

    fn has(&self, fd: RawFd) -> bool {
        let number = usize::try_from(fd).unwrap_or(usize::MAX);
        self.bits.get(number / 64).is_some_and(|bits| bits & (1 << (number % 64)) != 0)
    }
}

/// The numbers on a list.
fn numbers(bits: &[u64]) -> impl Iterator<Item = RawFd> + '_ {
    let on = |(word, bits): (usize, &u64)| {
        let bits = *bits;
        (0..64).filter(move |bit| bits & (1 << bit) != 0).filter_map(move |bit| RawFd::try_from(word * 64 + bit).ok())
    };
    bits.iter().enumerate().flat_map(on)
}

/// Keeps the server's end of a connection on the list, and tells the server that nothing more will come.
#[allow(unsafe_code, reason = "the descriptor belongs to a socket elsewhere; its use carries its proof")]
fn keep(fd: RawFd, server: Server) -> Option<Left> {
    // SAFETY: the descriptor is open for as long as this borrow lasts. Its owner is either the caller's, or takes it off the
    // list before it closes it, for which it needs the lock that the caller holds.
    let socket = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().ok()?;
    // The way back stays open: whoever reads it to its end knows when the server has ended. A socket that is not connected
    // any more is at its end.
    let _ = rustix::net::shutdown(&socket, Shutdown::Write);
    Some(Left { server, socket })
}

/// For how long the peer of a connection on the list, whose lock the caller holds, has acknowledged nothing, if bytes are being
/// repeated to it for want of that. None for a Unix-domain socket.
///
/// Source: tcp(7), `TCP_INFO`.
#[allow(unsafe_code, reason = "no crate here has a safe form of this option; each use carries its proof")]
fn silence(fd: RawFd) -> Option<Duration> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).ok()?;
    // SAFETY: the descriptor is open, see `keep`. The kernel writes no more than `length` bytes to the address, which is that
    // of a live local of this size.
    let failed =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length) };
    if failed != 0 {
        return None;
    }
    // SAFETY: it is made of integers, all zero to begin with: an older kernel leaves the last of them so.
    let info = unsafe { info.assume_init() };
    (info.tcpi_retransmits > 0).then(|| Duration::from_millis(info.tcpi_last_ack_recv.into()))
}

/// Ends a connection on the list, whose lock the caller holds, in both directions.
#[allow(unsafe_code, reason = "the descriptor belongs to a socket elsewhere; its use carries its proof")]
fn shut(fd: RawFd) {
    // SAFETY: the descriptor is open for as long as this borrow lasts, see `keep`.
    let _ = rustix::net::shutdown(unsafe { BorrowedFd::borrow_raw(fd) }, Shutdown::Both);
}

/// Ends one connection on the list, whose lock the caller holds. Of a server's the other end is kept.
#[allow(unsafe_code, reason = "the descriptor is another thread's; each use carries its proof")]
fn end(fd: RawFd, server: Option<Server>, nowhere: Option<&StdUnixStream>) -> Option<Left> {
    let left = server.and_then(|server| keep(fd, server));
    if left.is_none() {
        shut(fd);
    }
    if let Some(nowhere) = nowhere {
        // SAFETY: the number stands for an open descriptor, see `keep`, before and after: the system call puts another one
        // in its place at once. Nothing is closed by us, as the value is never dropped; and its owner, which is on the
        // list for the very purpose, uses it for nothing but a stream of bytes that may end or fail at any time.
        let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(fd) });
        // Without it, the worker keeps a connection that is shut down.
        let _ = rustix::io::dup3(nowhere.as_fd(), &mut place, DupFlags::CLOEXEC);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};

    use socket2::SockFilter;

    /// The two ends of a connection.
    fn pair() -> (StdTcpStream, StdTcpStream) {
        let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
        let peer = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (listener.accept().unwrap().0, peer)
    }

    fn server(pid: u32) -> Server {
        Server { pool: PoolName::primary("app", "web"), pid, secret: Box::from(*b"hush"), encrypted: false }
    }

    #[test]
    fn what_is_cut_is_at_its_end_on_both_sides_and_nothing_else_is() {
        let sockets = Sockets::default();
        let ((own, mut peer), (other, mut stranger)) = (pair(), pair());
        let own = sockets.enter(own).unwrap();
        let gone = sockets.enter(pair().0).unwrap();
        let number = gone.socket().as_raw_fd();
        drop(gone);
        assert!(!sockets.is_cut());
        assert!(sockets.cut().unwrap().is_empty());
        assert!(sockets.is_cut());

        let mut byte = [0];
        assert_eq!(peer.read(&mut byte).unwrap(), 0, "the client sees the end");
        assert_eq!(own.socket().read(&mut byte).unwrap(), 0, "and so does the worker");
        assert!(own.socket().write(&byte).is_err());
        // One that had been closed before may have any other's number.
        assert_ne!(number, own.socket().as_raw_fd());
        (&other).write_all(b"x").unwrap();
        stranger.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");

        let (late, mut peer) = pair();
        assert!(sockets.enter(late).is_err(), "nothing new");
        assert_eq!(peer.read(&mut byte).unwrap(), 0, "it is closed");
    }

    #[test]
    fn a_worker_that_wakes_up_closes_what_it_had_and_no_more() {
        let sockets = Sockets::default();
        let (own, _peer) = pair();
        let own = sockets.enter(own).unwrap();
        let number = own.socket().as_raw_fd();
        let _ = sockets.cut();
        // Whoever is given a number now is given another one.
        let (other, mut stranger) = pair();
        assert_ne!(other.as_raw_fd(), number);
        drop(own);
        (&other).write_all(b"x").unwrap();
        stranger.read_exact(&mut [0]).unwrap();
    }

    #[tokio::test]
    async fn the_end_of_a_server_connection_is_seen_by_who_takes_it_over() {
        let sockets = Sockets::default();
        let (own, mut peer) = pair();
        own.set_nonblocking(true).unwrap();
        let own = sockets.enter(own).unwrap();
        own.mark(server(7));
        let left = sockets.cut().unwrap().pop().unwrap();
        assert_eq!(left.server.pid, 7);
        assert!(!format!("{left:?}").contains("secret"), "{left:?}");
        let mut byte = [0];
        assert_eq!(peer.read(&mut byte).unwrap(), 0, "the server sees the end");
        let next = Sockets::default();
        let mut stream = left.into_stream(&next).unwrap();
        let mut read = async || std::future::poll_fn(|cx| stream.poll_read(cx, &mut byte)).await.unwrap();
        // It has something to say, and then it goes.
        peer.write_all(b"x").unwrap();
        assert_eq!(read().await, 1);
        drop(peer);
        assert_eq!(read().await, 0);
        // Its new worker may hang as well.
        assert_eq!(next.cut().unwrap().len(), 1);
    }

    #[test]
    fn what_a_worker_drops_in_its_panic_is_kept_for_the_next_one() {
        let sockets = Sockets::default();
        let ((client, mut peer), (own, mut kept)) = (pair(), pair());
        let list = sockets.clone();
        let worker = std::thread::spawn(move || {
            let (_client, own) = (list.enter(client).unwrap(), list.enter(own).unwrap());
            own.mark(server(7));
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(worker.join().is_err());
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        assert_eq!(kept.read(&mut [0]).unwrap(), 0, "the server was told");
        let left = sockets.cut().unwrap();
        assert_eq!(left.iter().map(|left| left.server.pid).collect::<Vec<_>>(), [7]);
    }

    /// Has the kernel drop whatever comes for this end, acknowledgements among it.
    fn vanish(end: &StdTcpStream) {
        let nothing = libc::BPF_RET | libc::BPF_K;
        SockRef::from(end).attach_filter(&[SockFilter::new(u16::try_from(nothing).unwrap(), 0, 0, 0)]).unwrap();
    }

    #[test]
    fn a_server_that_is_gone_with_bytes_on_their_way_to_it_is_missed_and_one_that_does_not_read_is_not() {
        const LIMIT: Duration = Duration::from_millis(700);
        let sockets = Sockets::default();
        let ((gone, gone_peer), (busy, busy_peer), (idle, idle_peer)) = (pair(), pair(), pair());
        busy.set_nonblocking(true).unwrap();
        let [gone, busy, idle] = [(gone, 1), (busy, 2), (idle, 3)].map(|(stream, pid)| {
            let own = sockets.enter(stream).unwrap();
            own.mark(server(pid));
            own
        });
        // One has no room for more, and reads nothing; the other two are gone, and to one of these nothing is sent.
        while busy.socket().write(&vec![0; 1 << 16]).is_ok() {}
        vanish(&gone_peer);
        vanish(&idle_peer);
        gone.socket().write_all(b"x").unwrap();
        let (begun, mut ended) = (Instant::now(), Vec::new());
        while ended.is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(20), "it is not missed");
            std::thread::sleep(Duration::from_millis(50));
            ended = sockets.end_unheard(Instant::now(), LIMIT);
        }
        assert!(begun.elapsed() >= LIMIT, "{:?}", begun.elapsed());
        assert_eq!(ended.iter().map(|server| server.pid).collect::<Vec<_>>(), [1]);
        assert_eq!(gone.socket().read(&mut [0]).unwrap(), 0, "its worker sees the end");
        assert!(busy.socket().take_error().unwrap().is_none() && idle.socket().take_error().unwrap().is_none());
        assert_eq!(busy.socket().read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // What was said long ago is no silence: the first look at what is repeated does not know since when it is.
        idle.socket().write_all(b"x").unwrap();
        wait_for_repetition(&idle);
        assert!(sockets.end_unheard(Instant::now(), LIMIT).is_empty());
        drop((busy_peer, gone_peer));
    }

    /// Waits until the kernel repeats what was sent.
    fn wait_for_repetition(own: &Listed<StdTcpStream>) {
        let until = Instant::now() + Duration::from_secs(20);
        while silence(own.socket().as_raw_fd()).is_none() {
            assert!(Instant::now() < until, "nothing is repeated");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn who_holds_the_list_itself_is_not_waited_for_for_ever() {
        let sockets = Sockets::default();
        let held = sockets.lock();
        assert!(sockets.cut().is_none());
        drop(held);
        assert!(sockets.cut().is_some());
    }
}

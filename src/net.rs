//! Sockets: one stream type for both sides, listening and connecting.

mod listen;
mod peer;
mod socket;
mod socket_file;
mod sockets;
pub mod tls;

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::task::{Context, Poll};
use std::time::Duration;

use pgweir_config::{Listen, is_socket_dir, socket_path};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UnixStream};

pub use listen::{Acceptor, ListenError, Listener, listen};
pub use peer::Peer;
pub use socket_file::SocketFault;
pub use sockets::{Left, Listed, Server, Sockets};

use socket::{poll_recv, poll_send};
use tls::Tls;
pub use tls::TlsInfo;

/// A connected socket.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(Listed<TcpStream>),
    /// A Unix-domain socket.
    Unix(Listed<UnixStream>),
    /// TCP with TLS on it.
    Tls(Box<Tls>),
    /// None any more: reads are the end of the stream.
    Closed,
}

impl Stream {
    /// What the TLS under this stream says; none without TLS.
    #[must_use]
    pub const fn tls(&self) -> Option<&TlsInfo> {
        match self {
            Self::Tls(tls) => Some(tls.info()),
            Self::Tcp(_) | Self::Unix(_) | Self::Closed => None,
        }
    }

    /// Reads into `buf`; `Ready(Ok(0))` is the end of the stream. A read that does not fill `buf` leaves
    /// the socket known to be empty, so that the next call costs no system call.
    ///
    /// # Errors
    ///
    /// Whatever the socket reports.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "four times in every transaction")]
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => poll_recv(stream.socket(), cx, buf),
            Self::Unix(stream) => poll_recv(stream.socket(), cx, buf),
            Self::Tls(tls) => tls.poll_read(cx, buf),
            Self::Closed => Poll::Ready(Ok(0)),
        }
    }

    /// Writes two slices as one; returns the bytes taken. What was not taken has to be offered again: TLS may have
    /// encrypted it already.
    ///
    /// # Errors
    ///
    /// Whatever the socket reports.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "four times in every transaction")]
    pub fn poll_write(&mut self, cx: &mut Context<'_>, first: &[u8], second: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => poll_send(stream.socket(), cx, first, second),
            Self::Unix(stream) => poll_send(stream.socket(), cx, first, second),
            Self::Tls(tls) => tls.poll_write(cx, first, second),
            Self::Closed => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    /// Whether something (bytes, end or error) may wait to be read, without a system call. Whoever asks is woken
    /// when that changes, and whoever asked before is forgotten.
    #[must_use]
    pub fn is_readable(&self, cx: &mut Context<'_>) -> bool {
        let ready = match self {
            Self::Tcp(stream) => stream.socket().poll_read_ready(cx),
            Self::Unix(stream) => stream.socket().poll_read_ready(cx),
            Self::Tls(tls) => return tls.is_readable(cx),
            Self::Closed => return true,
        };
        ready.is_ready()
    }

    /// Whether the peer has closed its end and left no bytes to be read. Reads nothing; two system calls.
    ///
    /// # Errors
    ///
    /// Why the connection is broken, whatever is left to be read.
    pub fn is_at_end(&self) -> io::Result<bool> {
        let socket = match self {
            Self::Tcp(stream) => SockRef::from(stream.socket()),
            Self::Unix(stream) => SockRef::from(stream.socket()),
            // A close_notify counts as something to be read: the end of the stream behind it is what is told.
            Self::Tls(tls) => SockRef::from(tls.socket()),
            Self::Closed => return Ok(true),
        };
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        match socket.peek(&mut [std::mem::MaybeUninit::uninit()]) {
            Ok(bytes) => Ok(bytes == 0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Tells the peer that no more bytes will come.
    ///
    /// # Errors
    ///
    /// Whatever the socket reports.
    pub fn shutdown_write(&mut self) -> io::Result<()> {
        match self {
            Self::Tls(tls) => tls.shutdown_write(),
            Self::Tcp(stream) => SockRef::from(stream.socket()).shutdown(Shutdown::Write),
            Self::Unix(stream) => SockRef::from(stream.socket()).shutdown(Shutdown::Write),
            Self::Closed => Ok(()),
        }
    }

    /// Makes the close of this socket a reset, so that the peer is not left in `TIME_WAIT` or reading on.
    pub fn reset_on_close(&self) {
        if let Some(socket) = self.tcp() {
            let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }

    /// Whether nobody between the two ends can read what is sent: a Unix socket, or TLS.
    #[must_use]
    pub const fn is_private(&self) -> bool {
        matches!(self, Self::Unix(_)) || self.tls().is_some()
    }

    /// The operating system's user at the other end of a Unix-domain socket, when it connected. None for any other
    /// socket.
    ///
    /// Source: unix(7), `SO_PEERCRED`.
    #[must_use]
    pub fn peer_uid(&self) -> Option<u32> {
        match self {
            Self::Unix(stream) => stream.socket().peer_cred().ok().map(|credentials| credentials.uid()),
            Self::Tcp(_) | Self::Tls(_) | Self::Closed => None,
        }
    }

    /// The address at the other end. None over a Unix-domain socket.
    #[must_use]
    pub fn peer_address(&self) -> Option<SocketAddr> {
        self.tcp().and_then(|stream| stream.peer_addr().ok())
    }

    /// It leads to a session of a server: when its worker hangs, it is to be seen to its end.
    pub fn mark(&self, server: Server) {
        match self {
            Self::Tcp(stream) => stream.mark(server),
            Self::Unix(stream) => stream.mark(server),
            Self::Tls(tls) => tls.mark(server),
            Self::Closed => {}
        }
    }

    const fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(stream) => Some(stream.socket()),
            Self::Tls(tls) => Some(tls.socket()),
            Self::Unix(_) | Self::Closed => None,
        }
    }
}

/// Options of accepted and of dialled TCP connections, and the list that they get on.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    sockets: Sockets,
    keepalive: Option<TcpKeepalive>,
    user_timeout: Option<Duration>,
}

impl TcpOptions {
    /// What `[listen]` says of TCP, for the worker of these `sockets`.
    #[must_use]
    pub fn new(listen: &Listen, sockets: Sockets) -> Self {
        let some = |duration: Duration| (!duration.is_zero()).then_some(duration);
        let keepalive = listen.tcp_keepalive.then(|| {
            let mut keepalive = TcpKeepalive::new();
            if let Some(idle) = some(listen.tcp_keepidle) {
                keepalive = keepalive.with_time(idle);
            }
            if let Some(interval) = some(listen.tcp_keepintvl) {
                keepalive = keepalive.with_interval(interval);
            }
            if listen.tcp_keepcnt > 0 {
                keepalive = keepalive.with_retries(listen.tcp_keepcnt);
            }
            keepalive
        });
        Self { sockets, keepalive, user_timeout: some(listen.tcp_user_timeout) }
    }

    /// The list of the worker whose they are.
    #[must_use]
    pub const fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    /// Sets the options. A kernel that refuses one is no reason to refuse the connection.
    pub fn apply(&self, stream: &TcpStream) {
        let _ = stream.set_nodelay(true);
        let socket = SockRef::from(stream);
        if let Some(keepalive) = &self.keepalive {
            let _ = socket.set_tcp_keepalive(keepalive);
        }
        if let Some(timeout) = self.user_timeout {
            let _ = socket.set_tcp_user_timeout(Some(timeout));
        }
    }
}

/// Connects to a server: to the socket in a directory if `host` begins with a slash, to an abstract one if it begins
/// with `@`, else by TCP `at` an address that is known, or to the first of the host's addresses that answers.
///
/// # Errors
///
/// The last address' error.
pub async fn connect(host: &str, port: u16, at: Option<SocketAddr>, options: &TcpOptions) -> io::Result<Stream> {
    if is_socket_dir(host) {
        let mut path = socket_path(host, port);
        if let Some(name) = path.strip_prefix('@') {
            // The abstract namespace, by tokio's convention as by the kernel's: a NUL in front.
            path = format!("\0{name}");
        }
        return Ok(Stream::Unix(options.sockets.enter(UnixStream::connect(path).await?)?));
    }
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    let addresses = match at {
        Some(address) => vec![address],
        None => tokio::net::lookup_host((host, port)).await?.collect(),
    };
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                options.apply(&stream);
                return Ok(Stream::Tcp(options.sockets.enter(stream)?));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_knows_an_address_is_led_there_and_nowhere_else_by_the_name() {
        let (own, other) =
            (std::net::TcpListener::bind("127.0.0.1:0").unwrap(), std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let (own, other) = (own.local_addr().unwrap(), other.local_addr().unwrap());
        let options = TcpOptions::new(&Listen::default(), Sockets::default());
        for (name, port) in [("127.0.0.1", other.port()), ("nowhere.invalid", 1)] {
            let stream = connect(name, port, Some(own), &options).await.unwrap();
            assert_eq!(stream.peer_address(), Some(own), "{name}");
        }
        let stream = connect("127.0.0.1", other.port(), None, &options).await.unwrap();
        assert_eq!(stream.peer_address(), Some(other));
    }
}

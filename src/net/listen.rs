//! Listening: on every address of `listen_addr` and in every directory of `unix_socket_dir`.

use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{PermissionsExt, lchown};
use std::task::{Context, Poll};

use pgweir_config::{Listen, socket_path};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpListener, UnixListener};

use super::socket_file::{SocketFault, SocketFile};
use super::{Peer, Sockets, Stream, TcpOptions};

/// A socket that listens already.
#[derive(Debug)]
pub enum Listener {
    /// On an address.
    Tcp(std::net::TcpListener),
    /// In a directory or, without a file, under an abstract name.
    Unix {
        /// The socket.
        socket: std::os::unix::net::UnixListener,
        /// Its file, which goes when this goes.
        file: Option<SocketFile>,
        /// Its path; an abstract one begins with `@`.
        path: String,
    },
}

impl Listener {
    /// The same socket once more: it listens as long as one of them lives. The file stays with the first.
    ///
    /// # Errors
    ///
    /// Whatever the system reports.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
            Self::Unix { socket, path, .. } => {
                Self::Unix { socket: socket.try_clone()?, file: None, path: path.clone() }
            }
        })
    }

    /// Address and port, or path; for logs.
    ///
    /// # Errors
    ///
    /// Whatever the socket reports.
    pub fn address(&self) -> io::Result<String> {
        match self {
            Self::Tcp(socket) => socket.local_addr().map(|address| address.to_string()),
            Self::Unix { path, .. } => Ok(path.clone()),
        }
    }
}

/// A listening address that cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// By TCP.
    #[error("cannot listen on {address} (listen_addr, listen_port): {source}")]
    Tcp {
        /// The address and port.
        address: String,
        /// The system's answer.
        source: io::Error,
    },
    /// On a Unix-domain socket.
    #[error("cannot listen on {path} (unix_socket_dir, listen_port): {fault}")]
    Unix {
        /// The socket's path.
        path: String,
        /// What is in the way.
        fault: SocketFault,
    },
}

/// Listens on every address of `listen_addr` and in every directory of `unix_socket_dir`.
///
/// # Errors
///
/// The address that could not be had, and why.
pub fn listen(listen: &Listen) -> Result<Vec<Listener>, ListenError> {
    let mut listeners = Vec::new();
    let mut port = listen.listen_port;
    for name in list(&listen.listen_addr) {
        let fail = |source| ListenError::Tcp { address: format!("{name}:{}", listen.listen_port), source };
        for address in resolve(name, listen.listen_port).map_err(fail)? {
            let socket = bind(address, listen.listen_backlog).map_err(fail)?;
            if port == 0 {
                // The sockets are named after the port that clients were given.
                port = socket.local_addr().map_err(fail)?.port();
            }
            listeners.push(Listener::Tcp(socket));
        }
    }
    for directory in list(&listen.unix_socket_dir) {
        let path = socket_path(directory, port);
        let listener = bind_unix(&path, listen).map_err(|fault| ListenError::Unix { path, fault })?;
        listeners.push(listener);
    }
    Ok(listeners)
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn resolve(name: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if name == "*" {
        return Ok(vec![SocketAddr::from(([0, 0, 0, 0], port)), SocketAddr::from(([0u16; 8], port))]);
    }
    Ok((name, port).to_socket_addrs()?.collect())
}

fn bind(address: SocketAddr, backlog: u32) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

fn bind_unix(path: &str, listen: &Listen) -> Result<Listener, SocketFault> {
    let claim = if path.starts_with('@') { None } else { Some(SocketFile::claim(path.as_ref())?) };
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(SocketFault::doing("making it"))?;
    socket.set_nonblocking(true).map_err(SocketFault::doing("making it"))?;
    let name = match path.strip_prefix('@') {
        Some(name) => format!("\0{name}"),
        None => path.to_owned(),
    };
    let address = SockAddr::unix(name).map_err(SocketFault::doing("naming it"))?;
    socket.bind(&address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => SocketFault::InUse { pid: None },
        _ => SocketFault::Io { doing: "binding it", error },
    })?;
    let file = claim.map(SocketFile::bound).transpose()?;
    if file.is_some() {
        // Nobody can connect before the socket listens.
        permit(path, listen)?;
    }
    socket
        .listen(i32::try_from(listen.listen_backlog).unwrap_or(i32::MAX))
        .map_err(SocketFault::doing("listening on it"))?;
    Ok(Listener::Unix { socket: socket.into(), file, path: path.to_owned() })
}

/// Gives the socket to its group and sets its permissions.
fn permit(path: &str, listen: &Listen) -> Result<(), SocketFault> {
    let name = &listen.unix_socket_group;
    if !name.is_empty() {
        let group = group_id(name).ok_or_else(|| SocketFault::NoGroup { name: name.clone() })?;
        lchown(path, None, Some(group)).map_err(SocketFault::doing("giving it to unix_socket_group"))?;
    }
    let mode = Permissions::from_mode(listen.unix_socket_mode.bits());
    fs::set_permissions(path, mode).map_err(SocketFault::doing("setting unix_socket_mode"))
}

/// A name's group, or the number itself.
fn group_id(name: &str) -> Option<u32> {
    if name.bytes().all(|byte| byte.is_ascii_digit()) {
        return name.parse().ok();
    }
    nix::unistd::Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
}

/// A [`Listener`] that belongs to an event loop.
#[derive(Debug)]
pub enum Acceptor {
    /// On an address.
    Tcp {
        /// The socket.
        socket: TcpListener,
        /// Options of its connections.
        options: TcpOptions,
        /// Each connection begins with a header of the PROXY protocol.
        proxied: bool,
    },
    /// On a Unix-domain socket.
    Unix {
        /// The socket.
        socket: UnixListener,
        /// Its file, which goes when this goes.
        file: Option<SocketFile>,
        /// The list that its connections get on.
        sockets: Sockets,
    },
}

impl Acceptor {
    /// Needs an event loop around it: that of the worker of these `sockets`.
    ///
    /// # Errors
    ///
    /// Whatever the event loop reports.
    pub fn new(listener: Listener, listen: &Listen, sockets: Sockets) -> io::Result<Self> {
        Ok(match listener {
            Listener::Tcp(socket) => Self::Tcp {
                socket: TcpListener::from_std(socket)?,
                options: TcpOptions::new(listen, sockets),
                proxied: listen.proxy_protocol,
            },
            Listener::Unix { socket, file, .. } => {
                Self::Unix { socket: UnixListener::from_std(socket)?, file, sockets }
            }
        })
    }

    /// The next client. None comes any more once the worker's list was cut: another worker takes them.
    ///
    /// # Errors
    ///
    /// Whatever the socket reports.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Self::Tcp { socket, options, proxied } => {
                let sockets = options.sockets();
                let next = |cx: &mut Context<'_>| if sockets.is_cut() { Poll::Pending } else { socket.poll_accept(cx) };
                let (stream, address) = poll_fn(next).await?;
                let peer = if *proxied { Peer::Proxy(address) } else { Peer::Tcp(address) };
                Ok((Stream::Tcp(sockets.enter(stream)?), peer))
            }
            Self::Unix { socket, sockets, .. } => {
                let next = |cx: &mut Context<'_>| if sockets.is_cut() { Poll::Pending } else { socket.poll_accept(cx) };
                let (stream, _) = poll_fn(next).await?;
                Ok((Stream::Unix(sockets.enter(stream)?), Peer::Unix))
            }
        }
    }

    /// Sets a client connection's options.
    pub fn prepare(&self, stream: &Stream) {
        if let (Self::Tcp { options, .. }, Stream::Tcp(stream)) = (self, stream) {
            options.apply(stream.socket());
        }
    }
}

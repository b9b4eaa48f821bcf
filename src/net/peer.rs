//! Who is at the other end of a client connection, as far as the network tells.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// The other end of a client connection: carried beside its stream, since a proxy may have said who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// By TCP.
    Tcp(SocketAddr),
    /// By TCP, by way of a proxy at this address, which has yet to say whose the connection is.
    Proxy(SocketAddr),
    /// By a Unix-domain socket.
    Unix,
}

impl Peer {
    /// The source address. None on this machine's own sockets.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) | Self::Proxy(address) => Some(address.ip().to_canonical()),
            Self::Unix => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) | Self::Proxy(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

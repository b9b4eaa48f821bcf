//! Reading from and writing to a connected socket with no more than one system call each.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// What both kinds of socket can do: be asked for their readiness, and lose it.
pub(super) trait Connected: AsFd {
    fn poll_ready(&self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<()>>;
    fn try_io<T>(&self, interest: Interest, io: impl FnOnce() -> io::Result<T>) -> io::Result<T>;
}

macro_rules! connected {
    ($stream:ty) => {
        impl Connected for $stream {
            #[inline]
            fn poll_ready(&self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<()>> {
                if interest.is_readable() { self.poll_read_ready(cx) } else { self.poll_write_ready(cx) }
            }

            #[inline]
            fn try_io<T>(&self, interest: Interest, io: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
                self.try_io(interest, io)
            }
        }
    };
}
connected!(TcpStream);
connected!(UnixStream);

/// Reads if the socket is known to have something, and asks to be woken only if it is not. The system calls here are made directly: as the C library's they
/// are cancellation points, which costs every transaction.
#[inline]
pub(super) fn poll_recv(socket: &impl Connected, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
    loop {
        let mut read = None;
        let _ = socket.try_io(Interest::READABLE, || {
            let taken = rustix::net::recv(socket, &mut *buf, RecvFlags::empty()).map(|(taken, _)| taken);
            read = Some(taken);
            let empty = match taken {
                // A short read has emptied the socket: there is nothing until its readiness is reported anew.
                Ok(taken) => 0 < taken && taken < buf.len(),
                Err(error) => error == Errno::AGAIN,
            };
            if empty { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match read {
            Some(Ok(taken)) => return Poll::Ready(Ok(taken)),
            None | Some(Err(Errno::AGAIN | Errno::INTR)) => ready!(socket.poll_ready(cx, Interest::READABLE))?,
            Some(Err(error)) => return Poll::Ready(Err(error.into())),
        }
    }
}

/// Writes at once, whatever is known of the socket: it nearly always has room. Only if it has none is it waited for.
#[inline]
pub(super) fn poll_send(
    socket: &impl Connected,
    cx: &mut Context<'_>,
    first: &[u8],
    second: &[u8],
) -> Poll<io::Result<usize>> {
    loop {
        match send(socket, first, second) {
            Ok(taken) => return Poll::Ready(Ok(taken)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let full = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
                let _ = socket.try_io(Interest::WRITABLE, full);
                ready!(socket.poll_ready(cx, Interest::WRITABLE))?;
            }
            Err(error) => return Poll::Ready(Err(error.into())),
        }
    }
}

#[inline]
fn send(socket: &impl Connected, first: &[u8], second: &[u8]) -> rustix::io::Result<usize> {
    if first.is_empty() || second.is_empty() {
        let one = if first.is_empty() { second } else { first };
        return rustix::net::send(socket, one, SendFlags::NOSIGNAL);
    }
    let both = [IoSlice::new(first), IoSlice::new(second)];
    rustix::net::sendmsg(socket, &both, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)
}

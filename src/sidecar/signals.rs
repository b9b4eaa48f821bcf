//! Signals as events, with what the kernel says of their senders.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream as StdStream;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use tokio::net::UnixStream;

use super::life::Received;

/// What somebody may send to an application.
const PASSED_ON: [Signal; 9] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGWINCH,
    Signal::SIGTERM,
];

/// Those that came and were not looked at yet.
pub(super) struct Signals {
    /// Two bytes for each: its number, and whether the kernel sent it.
    come: UnixStream,
}

impl Signals {
    /// Takes them over from their default actions; those that are ignored stay so. A program that is executed gets the
    /// default actions back. Needs a runtime around it.
    ///
    /// # Errors
    ///
    /// The system refuses.
    pub(super) fn take() -> io::Result<Self> {
        let (read, write) = StdStream::pair()?;
        read.set_nonblocking(true)?;
        write.set_nonblocking(true)?;
        let end = write.as_raw_fd();
        for signal in PASSED_ON {
            if !is_ignored(signal)? {
                register(signal, end)?;
            }
        }
        // The handlers write to it for as long as the process lives.
        std::mem::forget(write);
        Ok(Self { come: UnixStream::from_std(read)? })
    }

    /// The next one. Loses none when it is dropped before it is ready.
    pub(super) async fn next(&mut self) -> Received {
        let mut pair = [0_u8; 2];
        loop {
            // Each was written whole, and so is read.
            match self.come.readable().await.and_then(|()| self.come.try_read(&mut pair)) {
                Ok(2) => return Received { number: i32::from(pair[0]), from_kernel: pair[1] != 0 },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The other end is never closed.
                _ => std::future::pending().await,
            }
        }
    }
}

/// Whether whoever started us wants a signal ignored, as nohup(1) does.
#[allow(unsafe_code, reason = "sigaction has no safe form; each call carries its proof")]
fn is_ignored(signal: Signal) -> io::Result<bool> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action runs no code of ours; between the two calls a signal does what it did all along, or what
    // its default is.
    let old = unsafe { sigaction(signal, &default) }?;
    // SAFETY: what was there before is put back.
    unsafe { sigaction(signal, &old) }?;
    Ok(matches!(old.handler(), SigHandler::SigIgn))
}

#[allow(unsafe_code, reason = "signal handlers have no safe form; the call carries its proof")]
fn register(signal: Signal, end: i32) -> io::Result<()> {
    let number = u8::try_from(signal as i32).map_err(io::Error::other)?;
    let note = move |info: &libc::siginfo_t| {
        let pair = [number, u8::from(info.si_code == libc::SI_KERNEL)];
        // SAFETY: send(2) reads two bytes of a live local; it is async-signal-safe (signal-safety(7)), and the registry
        // puts errno back. It does not block: when nobody has read some ten thousand signals, one is lost.
        unsafe { libc::send(end, pair.as_ptr().cast(), pair.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    };
    // SAFETY: `note` makes one async-signal-safe call, allocates nothing, takes no lock and does not panic; the descriptor
    // stays open for as long as the process lives.
    unsafe { signal_hook_registry::register_sigaction(signal as i32, note) }.map(drop)
}

//! TLS under a connection, by rustls' unbuffered interface: an idle connection owns no buffer.
//!
//! Ciphertext is read into the caller's buffer, decrypted there, and what came out of it moved to the front. Only an
//! incomplete record is kept. Plaintext is encrypted into a pad that the worker lends; only what the socket does not
//! take is kept. Towards clients, TLS 1.3 does without rustls' machine once the handshake is over.

mod acceptor;
mod certificate;
mod chain;
mod connector;
mod files;
mod handshake;
mod host;
mod keyring;
mod made;
mod records;
mod traffic_key;
mod verifier;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{HandshakeKind, ProtocolVersion};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::socket::{poll_recv, poll_send};
use super::{Listed, Server};
use crate::stats::TlsStats;
use records::Records;

pub use acceptor::Acceptor;
pub use connector::{ConnectError, Connector, Try};
pub use files::FileFault;
pub use handshake::HandshakeError;
pub use keyring::{Keyring, Keys, Watch};

/// The longest plaintext of one record; bytes.
///
/// Source: RFC 8446, section 5.1.
const PLAINTEXT_MAX: usize = 1 << 14;

/// The longest record, its header included; bytes.
///
/// Source: RFC 5246, section 6.2.3, whose limit is wider than that of RFC 8446, section 5.2.
const RECORD_MAX: usize = 5 + PLAINTEXT_MAX + 2048;

/// The most that encryption adds to the plaintext of one record; bytes: header, explicit nonce, content type, tag.
const OVERHEAD_MAX: usize = 64;

/// The smallest buffer that is read into directly; bytes: room for plaintext, and a record behind it.
const ROOM_MIN: usize = PLAINTEXT_MAX + RECORD_MAX;

/// Records that one write makes, at most: what is encrypted and not taken has to be kept.
const RECORDS_PER_WRITE: usize = 4;

/// The protocol's name in ALPN.
///
/// Source: the Postgres manual, "`SSL` Session Encryption"; IANA's registry of ALPN protocol IDs.
pub const ALPN: &[u8] = b"postgresql";

/// The first byte of a connection that begins with TLS itself: the type of a handshake record.
pub const HANDSHAKE_BYTE: u8 = 0x16;

/// What the TLS under a stream says of the two ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsInfo {
    /// Channel binding data `tls-server-end-point` (RFC 5929): the hash of the server's certificate. None where it is
    /// undefined for the certificate's signature algorithm.
    pub end_point: Option<Arc<[u8]>>,
    /// The common name of the peer's certificate, if it showed one and it was verified; empty if there is none in it, or
    /// none that a user could bear.
    pub peer_name: Option<Box<str>>,
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite by its IANA name, such as `TLS_AES_256_GCM_SHA384`.
    pub cipher: &'static str,
}

impl fmt::Display for TlsInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.version, self.cipher)
    }
}

/// What a worker needs for TLS: the keys in use, a pad to encrypt on, and counters.
#[derive(Debug)]
pub struct Gear {
    keyring: Arc<Keyring>,
    pad: Rc<Pad>,
    /// What was counted.
    pub stats: RefCell<TlsStats>,
}

impl Gear {
    /// A worker's, with the process' `keyring`.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>) -> Rc<Self> {
        Rc::new(Self { keyring, pad: Rc::default(), stats: RefCell::default() })
    }

    /// The keys to use for a connection that begins now.
    #[must_use]
    pub fn keys(&self) -> Arc<Keys> {
        self.keyring.current()
    }
}

/// Where a worker encrypts. Lent for one write.
#[derive(Default)]
pub(super) struct Pad(Cell<Option<Box<Sheet>>>);

impl fmt::Debug for Pad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pad").finish_non_exhaustive()
    }
}

impl Pad {
    #[expect(clippy::unnecessary_box_returns, reason = "lending moves a pointer")]
    fn lend(&self) -> Box<Sheet> {
        let length = RECORDS_PER_WRITE * (PLAINTEXT_MAX + OVERHEAD_MAX);
        self.0.take().unwrap_or_else(|| Box::new(Sheet { joined: Vec::new(), records: vec![0; length] }))
    }

    fn put_back(&self, sheet: Box<Sheet>) {
        self.0.set(Some(sheet));
    }
}

struct Sheet {
    /// Two slices made one.
    joined: Vec<u8>,
    /// Ciphertext; as long as it can get.
    records: Vec<u8>,
}

/// Which end of the connection we are.
enum Role {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
    /// The same in TLS 1.3.
    Records(Box<Records>),
}

impl Role {
    /// Decrypts every whole record of `input`, which begin at [`PLAINTEXT_MAX`]; their plaintext is at the front then.
    /// Answers of the protocol's own go to `out`, also when it fails.
    fn open(&mut self, input: &mut [u8], out: &mut Vec<u8>) -> io::Result<Opened> {
        match self {
            Self::Client(machine) => open(&mut **machine, input, out),
            Self::Server(machine) => open(&mut **machine, input, out),
            Self::Records(own) => own.open(input, out),
        }
    }
}

/// rustls' two machines, which have the same states but no type in common.
trait Machine {
    type Data;
    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Machine for UnbufferedClientConnection {
    type Data = rustls::client::ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }
}

impl Machine for UnbufferedServerConnection {
    type Data = rustls::server::ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }
}

/// A TCP connection with TLS on it, after the handshake.
pub struct Tls {
    socket: Listed<TcpStream>,
    role: Role,
    info: TlsInfo,
    pad: Rc<Pad>,
    /// The front of a record still incomplete.
    cipher: Vec<u8>,
    /// Plaintext that did not fit into the caller's buffer.
    plain: Vec<u8>,
    /// Ciphertext that the socket would not take yet.
    unsent: Vec<u8>,
    /// Bytes of plaintext that `unsent` holds the end of: they count as taken when it is sent.
    owed: usize,
    /// The peer has said its last.
    ended: bool,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("socket", &self.socket).field("info", &self.info).finish_non_exhaustive()
    }
}

/// What records held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Opened {
    /// Bytes of plaintext, now at the front of the buffer.
    plain: usize,
    /// Where in the buffer the incomplete record begins.
    rest: usize,
    /// The peer will send nothing more.
    closed: bool,
}

impl Tls {
    /// A connection whose handshake is over, and what has arrived behind that, not looked at.
    ///
    /// # Errors
    ///
    /// That is not what it has to be. The peer has been told, as far as the socket took it.
    fn begin(
        socket: Listed<TcpStream>,
        role: Role,
        info: TlsInfo,
        pad: Rc<Pad>,
        ahead: &[u8],
    ) -> Result<Self, HandshakeError> {
        let (cipher, plain, unsent) = (Vec::new(), Vec::new(), Vec::new());
        let mut tls = Self { socket, role, info, pad, cipher, plain, unsent, owed: 0, ended: false };
        if !ahead.is_empty() {
            let mut input = vec![0; PLAINTEXT_MAX];
            input.extend_from_slice(ahead);
            let opened = tls.role.open(&mut input, &mut tls.unsent);
            tls.push_unsent();
            let opened = opened.map_err(HandshakeError::Behind)?;
            tls.plain.extend_from_slice(input.get(..opened.plain).unwrap_or_default());
            tls.keep(input.get(opened.rest..).unwrap_or_default());
            tls.ended = opened.closed;
        }
        Ok(tls)
    }

    /// What the handshake agreed on.
    #[must_use]
    pub const fn info(&self) -> &TlsInfo {
        &self.info
    }

    pub(super) const fn socket(&self) -> &TcpStream {
        self.socket.socket()
    }

    /// See [`Stream::mark`](super::Stream::mark).
    pub(super) fn mark(&self, server: Server) {
        self.socket.mark(server);
    }

    #[inline(never)]
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        if !self.unsent.is_empty() && self.owed == 0 {
            // Nobody will ask for it to be written: it is no caller's.
            let _ = self.poll_flush(cx)?;
        }
        if !self.plain.is_empty() {
            return Poll::Ready(Ok(self.take_plain(buf)));
        }
        if self.ended {
            return Poll::Ready(Ok(0));
        }
        if buf.len() >= ROOM_MIN {
            return self.read_into(cx, buf);
        }
        // A small buffer: during logins, when something unexpected is looked at, or behind a long message's front.
        let pad = self.pad.clone();
        let mut sheet = pad.lend();
        let polled = self.read_into(cx, &mut sheet.records);
        if let Poll::Ready(Ok(read)) = polled {
            self.plain.extend_from_slice(sheet.records.get(..read).unwrap_or_default());
        }
        pad.put_back(sheet);
        ready!(polled)?;
        Poll::Ready(Ok(self.take_plain(buf)))
    }

    fn take_plain(&mut self, buf: &mut [u8]) -> usize {
        let len = buf.len().min(self.plain.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..len), self.plain.get(..len)) {
            to.copy_from_slice(from);
        }
        self.plain.drain(..len);
        if self.plain.is_empty() {
            self.plain = Vec::new();
        } else if self.plain.capacity() > 2 * self.plain.len() {
            self.plain.shrink_to_fit();
        }
        len
    }

    /// Reads until there is plaintext, the end, or nothing. Ciphertext is read behind a record's length of room, so that
    /// plaintext can be moved to the front record by record.
    fn read_into(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let front = PLAINTEXT_MAX + self.cipher.len();
            let room = buf.get_mut(front..).filter(|room| !room.is_empty()).ok_or_else(too_long)?;
            let read = ready!(poll_recv(self.socket(), cx, room))?;
            if read == 0 {
                // Cut or closed: what came before is all there is, and a record's front is nothing.
                self.ended = true;
                self.cipher = Vec::new();
                return Poll::Ready(Ok(0));
            }
            let input = buf.get_mut(..front + read).ok_or_else(too_long)?;
            if let Some(room) = input.get_mut(PLAINTEXT_MAX..front) {
                room.copy_from_slice(&self.cipher);
            }
            let opened = self.role.open(input, &mut self.unsent);
            if !self.unsent.is_empty() && self.owed == 0 {
                let _ = self.poll_flush(cx)?;
            }
            let opened = opened?;
            self.keep(input.get(opened.rest..).unwrap_or_default());
            self.ended = opened.closed;
            if opened.plain > 0 || opened.closed {
                return Poll::Ready(Ok(opened.plain));
            }
        }
    }

    fn keep(&mut self, rest: &[u8]) {
        if rest.is_empty() {
            if self.cipher.capacity() > 0 {
                self.cipher = Vec::new();
            }
        } else {
            self.cipher.clear();
            self.cipher.extend_from_slice(rest);
        }
    }

    /// Encrypts and writes. A byte counts as taken when the socket has taken the whole of its ciphertext: what was not
    /// taken has to be offered again, as with any socket.
    #[inline(never)]
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, first: &[u8], second: &[u8]) -> Poll<io::Result<usize>> {
        if !self.unsent.is_empty() {
            ready!(self.poll_flush(cx))?;
        }
        if self.owed > 0 {
            let owed = std::mem::take(&mut self.owed);
            debug_assert!(owed <= first.len() + second.len(), "what was not taken has to be offered again");
            return Poll::Ready(Ok(owed.min(first.len() + second.len())));
        }
        let pad = self.pad.clone();
        let mut sheet = pad.lend();
        let outcome = self.write_by(cx, first, second, &mut sheet);
        pad.put_back(sheet);
        outcome
    }

    fn write_by(
        &mut self,
        cx: &mut Context<'_>,
        first: &[u8],
        second: &[u8],
        sheet: &mut Sheet,
    ) -> Poll<io::Result<usize>> {
        let Sheet { joined, records } = sheet;
        let mut parts = [first, second];
        if !first.is_empty() && !second.is_empty() && first.len() + second.len() <= PLAINTEXT_MAX {
            joined.clear();
            joined.extend_from_slice(first);
            joined.extend_from_slice(second);
            parts = [joined, &[]];
        }
        let sealed = match &mut self.role {
            Role::Client(machine) => seal(&mut **machine, &mut self.cipher, parts, records),
            Role::Server(machine) => seal(&mut **machine, &mut self.cipher, parts, records),
            Role::Records(own) => own.seal(parts, records),
        };
        let (taken, len) = sealed?;
        let (rest, failed) =
            push(records.get(..len).unwrap_or_default(), |rest| poll_send(self.socket.socket(), cx, rest, &[]))?;
        if rest.is_empty() {
            return Poll::Ready(Ok(taken));
        }
        if failed {
            cx.waker().wake_by_ref();
        }
        self.unsent = rest.to_vec();
        self.owed = taken;
        Poll::Pending
    }

    /// Sends what is unsent.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut done = 0;
        let outcome = loop {
            let Some(rest) = self.unsent.get(done..).filter(|rest| !rest.is_empty()) else {
                break Poll::Ready(Ok(()));
            };
            match poll_send(self.socket.socket(), cx, rest, &[]) {
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(sent)) => done += sent,
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        self.unsent.drain(..done.min(self.unsent.len()));
        if self.unsent.is_empty() {
            self.unsent = Vec::new();
        }
        outcome
    }

    /// Sends what is unsent as far as the socket takes it.
    fn push_unsent(&mut self) {
        while !self.unsent.is_empty() {
            match self.socket().try_write(&self.unsent) {
                Ok(sent) if sent > 0 => drop(self.unsent.drain(..sent)),
                _ => return,
            }
        }
        self.unsent = Vec::new();
    }

    pub(super) fn is_readable(&self, cx: &mut Context<'_>) -> bool {
        !self.plain.is_empty() || self.ended || self.socket().poll_read_ready(cx).is_ready()
    }

    /// Says `close_notify` as far as the socket takes it, and closes its writing half.
    pub(super) fn shutdown_write(&mut self) -> io::Result<()> {
        let mut alert = [0; 128];
        let len = match &mut self.role {
            Role::Client(machine) => seal_end(&mut **machine, &mut self.cipher, &mut alert),
            Role::Server(machine) => seal_end(&mut **machine, &mut self.cipher, &mut alert),
            Role::Records(own) => own.seal_end(&mut alert),
        };
        self.unsent.extend_from_slice(alert.get(..len).unwrap_or_default());
        self.push_unsent();
        self.unsent = Vec::new();
        SockRef::from(self.socket()).shutdown(Shutdown::Write)
    }
}

/// Sends `records` as far as they are taken. Returns the rest, and whether an error stands behind what was taken: whole
/// records may have arrived, and the error itself would say that nothing has. The next try tells it.
#[inline]
fn push(records: &[u8], mut send: impl FnMut(&[u8]) -> Poll<io::Result<usize>>) -> io::Result<(&[u8], bool)> {
    let mut rest = records;
    while !rest.is_empty() {
        match send(rest) {
            Poll::Ready(Ok(taken)) if taken > 0 => rest = rest.get(taken..).unwrap_or_default(),
            Poll::Ready(outcome) if rest.len() == records.len() => {
                return outcome.and(Err(io::ErrorKind::WriteZero.into()));
            }
            outcome => return Ok((rest, outcome.is_ready())),
        }
    }
    Ok((rest, false))
}

/// Decrypts every whole record of `input`, which begin at [`PLAINTEXT_MAX`]; their plaintext is at the front then.
/// Answers of the protocol's own go to `out`, also when it fails: the alert that says so.
fn open<M: Machine>(machine: &mut M, input: &mut [u8], out: &mut Vec<u8>) -> io::Result<Opened> {
    let mut opened = Opened { plain: 0, rest: PLAINTEXT_MAX, closed: false };
    loop {
        let (room, records) = input.split_at_mut_checked(opened.rest).ok_or_else(too_long)?;
        let UnbufferedStatus { discard, state } = machine.process(records);
        match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    let payload = record.map_err(broken)?.payload;
                    // Ciphertext is longer than what it holds: there is always room for one record more.
                    let end = opened.plain + payload.len();
                    room.get_mut(opened.plain..end).ok_or_else(too_long)?.copy_from_slice(payload);
                    opened.plain = end;
                }
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, out)?,
            Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                opened.closed = true;
                opened.rest = input.len();
                return Ok(opened);
            }
            Ok(ConnectionState::WriteTraffic(_)) => {
                opened.rest += discard;
                return Ok(opened);
            }
            Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "TLS: unexpected state")),
            Err(error) => {
                alert(machine, out);
                return Err(broken(error));
            }
        }
        opened.rest += discard;
    }
}

/// After an error: what the peer is to be told.
fn alert<M: Machine>(machine: &mut M, out: &mut Vec<u8>) {
    for _ in 0..4 {
        match machine.process(&mut []).state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => drop(encode(&mut data, out)),
            Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
            _ => return,
        }
    }
}

fn encode<D>(data: &mut EncodeTlsData<'_, D>, out: &mut Vec<u8>) -> io::Result<()> {
    let Err(EncodeError::InsufficientSize(wanted)) = data.encode(&mut []) else {
        return Ok(());
    };
    let start = out.len();
    out.resize(start + wanted.required_size, 0);
    let room = out.get_mut(start..).unwrap_or_default();
    data.encode(room).map(drop).map_err(|error| io::Error::other(error.to_string()))
}

/// Encrypts as much of `parts` as [`RECORDS_PER_WRITE`] records hold. Returns the bytes taken and those made.
fn seal<M: Machine>(
    machine: &mut M,
    cipher: &mut [u8],
    parts: [&[u8]; 2],
    out: &mut [u8],
) -> io::Result<(usize, usize)> {
    let (mut taken, mut made) = (0, 0);
    let mut records = RECORDS_PER_WRITE;
    loop {
        // What is kept of a record is shown again, so that the machine finds its place.
        match machine.process(cipher).state {
            Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                for part in parts {
                    for chunk in part.chunks(PLAINTEXT_MAX).take(records) {
                        records -= 1;
                        let room = out.get_mut(made..).unwrap_or_default();
                        let sealed = traffic.encrypt(chunk, room);
                        made += sealed.map_err(|error| io::Error::other(error.to_string()))?;
                        taken += chunk.len();
                    }
                    if records == 0 {
                        break;
                    }
                }
                return Ok((taken, made));
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                let room = out.get_mut(made..).unwrap_or_default();
                made += data.encode(room).map_err(|error| io::Error::other(error.to_string()))?;
            }
            Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
            // The peer reads on after it has said its last.
            Ok(ConnectionState::PeerClosed) => {}
            Ok(_) => return Err(io::ErrorKind::BrokenPipe.into()),
            Err(error) => return Err(broken(error)),
        }
    }
}

/// Makes a `close_notify`. Returns its length; 0 if none can be said.
fn seal_end<M: Machine>(machine: &mut M, cipher: &mut [u8], out: &mut [u8]) -> usize {
    for _ in 0..4 {
        match machine.process(cipher).state {
            Ok(ConnectionState::WriteTraffic(mut traffic)) => return traffic.queue_close_notify(out).unwrap_or(0),
            Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
            Ok(ConnectionState::PeerClosed) => {}
            _ => return 0,
        }
    }
    0
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "TLS: a message longer than its limit")
}

/// OpenSSL's name, which is what Postgres shows.
fn version_name(version: Option<ProtocolVersion>) -> &'static str {
    match version {
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "TLS",
    }
}

/// The IANA name of a suite; rustls writes `TLS13_` for those of TLS 1.3, which have no version in their names.
fn cipher_name(suite: Option<rustls::SupportedCipherSuite>) -> &'static str {
    let name = suite.and_then(|suite| suite.suite().as_str());
    match name {
        Some("TLS13_AES_256_GCM_SHA384") => "TLS_AES_256_GCM_SHA384",
        Some("TLS13_AES_128_GCM_SHA256") => "TLS_AES_128_GCM_SHA256",
        Some("TLS13_CHACHA20_POLY1305_SHA256") => "TLS_CHACHA20_POLY1305_SHA256",
        Some(name) => name,
        None => "unknown",
    }
}

fn is_resumed(kind: Option<HandshakeKind>) -> bool {
    kind == Some(HandshakeKind::Resumed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_behind_records_that_were_taken_does_not_say_that_nothing_was() {
        type Says = Vec<Poll<io::Result<usize>>>;
        type Want = Result<(usize, bool), io::ErrorKind>;
        let reset = || Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        let took = |bytes: usize| Poll::Ready(Ok(bytes));
        #[rustfmt::skip]
        let table: [(&str, Says, Want); 8] = [
            ("at once",              vec![took(10)],                Ok((0, false))),
            ("in pieces",            vec![took(3), took(7)],        Ok((0, false))),
            ("no room",              vec![Poll::Pending],           Ok((10, false))),
            ("room for some",        vec![took(4), Poll::Pending],  Ok((6, false))),
            ("an error",             vec![reset()],                 Err(io::ErrorKind::ConnectionReset)),
            ("nothing taken",        vec![took(0)],                 Err(io::ErrorKind::WriteZero)),
            ("an error behind some", vec![took(4), reset()],        Ok((6, true))),
            ("nothing behind some",  vec![took(4), took(0)],        Ok((6, true))),
        ];
        for (name, says, want) in table {
            let mut says = says.into_iter();
            let got = push(&[0; 10], |_| says.next().unwrap());
            assert_eq!(got.map(|(rest, failed)| (rest.len(), failed)).map_err(|error| error.kind()), want, "{name}");
        }
    }
}

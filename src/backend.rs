//! One server connection: dialling, logging in, what is known of its state, and its end.

mod ask;
mod credentials;
mod farewell;
mod hear;
mod login;
mod roster;
mod settle;
mod values;

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pgweir_config::{BindingPolicy, RequireAuth};
use pgweir_proto::backend::Tag;
use pgweir_proto::error::Fields;
use pgweir_proto::pipeline::{Expect, Owed, Pipeline};
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};

use crate::audit::Baseline;
use crate::clock::Clock;
use crate::net::tls::{ConnectError, Gear, Try};
use crate::net::{Stream, TcpOptions, TlsInfo};
use crate::prepared::{Described, Parsed, Shelf, Statement};
use crate::replica::Incarnation;
use crate::settings::{Encodings, Entry, Profile};
use crate::stats::{DiscardReason, PoolName};

pub use ask::Answer;
pub use credentials::{
    Credential, CredentialError, Credentials, Derivations, Password, PasswordCommand, PasswordFile, ProvenKeys, Source,
};
pub use farewell::bury;
pub use login::{DialError, Introduction, LoggedIn, Start, WHO_ARE_YOU, dial};
pub use pgweir_proto::backend::row_columns;
pub use roster::Roster;
pub use settle::{Applied, SettleError, Settled};
pub use values::Values;

use roster::Enrolled;

/// Where a pool's server connections go, and as whom.
#[derive(Debug)]
pub struct Target {
    /// The pool that counts the connections.
    pub pool: PoolName,
    /// Host name, address, or the directory of a Unix socket.
    pub host: String,
    /// TCP port, or the number in the socket's name.
    pub port: u16,
    /// The database on the server.
    pub dbname: String,
    /// The role to log in as.
    pub user: String,
    /// What it proves itself by.
    pub credentials: Rc<Credentials>,
    /// What the server may ask for.
    pub policy: LoginPolicy,
    /// Run after each login; empty for nothing.
    pub connect_query: String,
    /// Whether transactions are read-only unless they say otherwise.
    pub is_read_only: bool,
    /// Socket options.
    pub tcp: TcpOptions,
    /// The newest version of the protocol to ask for; an older one once the server has refused it.
    pub version: Cell<u32>,
    /// What TLS needs.
    pub tls: Rc<Gear>,
    /// The name in `[databases]` that says how TLS is used.
    pub entry: String,
    /// The longest login.
    pub connect_timeout: Duration,
}

/// What a server may ask for at a login: anything else is refused before something secret is sent.
#[derive(Clone, Debug)]
pub struct LoginPolicy {
    /// The methods.
    pub require_auth: RequireAuth,
    /// Whether SCRAM is bound to TLS.
    pub channel_binding: BindingPolicy,
    /// Whether the password may be sent in clear over TCP without TLS.
    pub allow_cleartext_password: bool,
    /// Rounds of PBKDF2, at most.
    pub scram_iterations_max: u32,
}

impl Target {
    /// The ways to connect, to be tried one after the other.
    fn tries(&self) -> &'static [Try] {
        let connector = self.tls.keys().connector(&self.entry);
        connector.map_or(&[Try::Plain], |connector| connector.tries(&self.host))
    }

    /// Connects in one way, to an address if it has to be that one.
    async fn connect(&self, way: Try, at: Option<SocketAddr>) -> Result<Stream, ConnectError> {
        // An entry that is gone takes its connector with it.
        let connector = self.tls.keys().connector(&self.entry).ok_or(ConnectError::NotOffered)?;
        connector.connect(way, (&self.host, self.port, at), &self.tcp, &self.tls).await
    }
}

/// A count with a limit, shared by all that draw on it.
#[derive(Debug)]
pub struct Count {
    used: Cell<u32>,
    limit: u32,
}

impl Count {
    /// Nothing used yet; a `limit` of 0 is none.
    #[must_use]
    pub fn new(limit: u32) -> Rc<Self> {
        Rc::new(Self { used: Cell::new(0), limit: if limit == 0 { u32::MAX } else { limit } })
    }

    /// How many permits are held.
    #[must_use]
    pub fn used(&self) -> u32 {
        self.used.get()
    }

    /// Whether one more fits.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.used.get() < self.limit
    }

    /// How many more fit.
    #[must_use]
    pub fn room(&self) -> u32 {
        self.limit.saturating_sub(self.used.get())
    }
}

/// The right to one server connection, held from before it is dialled until the server is known to have
/// ended it. Dropping it gives the right back.
#[derive(Debug)]
pub struct Permit {
    counts: [Rc<Count>; 3],
    /// Until the server has ended it, the connection is known as an own one.
    enrolled: Option<Enrolled>,
}

impl Permit {
    /// Takes one of each of `counts`. None if any is at its limit; then none is taken.
    #[must_use]
    pub fn take(counts: [&Rc<Count>; 3]) -> Option<Self> {
        if !counts.iter().all(|count| count.has_room()) {
            return None;
        }
        for count in counts {
            count.used.set(count.used.get() + 1);
        }
        Some(Self { counts: counts.map(Clone::clone), enrolled: None })
    }

    /// The connection is that of the server's process `pid`; 0 if that is not known.
    fn enroll(&mut self, roster: &Rc<Roster>, pid: u32) {
        if pid != 0 {
            self.enrolled = Some(Enrolled::new(roster.clone(), pid));
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        for count in &self.counts {
            debug_assert!(count.used.get() > 0);
            count.used.set(count.used.get().saturating_sub(1));
        }
    }
}

/// Whether cancel requests are on their way to a server connection: until they have arrived it must not
/// be lent on, lest they hit somebody else's query.
#[derive(Debug, Default)]
pub struct CancelGate {
    /// Requests on their way.
    pub in_flight: Cell<u32>,
    /// One of them may arrive at any time, or never: the connection must not be lent any more.
    pub poisoned: Cell<bool>,
    /// The connection, while it waits for them.
    pub parked: RefCell<Option<Box<ServerConn>>>,
}

/// The unnamed statement a server connection holds.
#[derive(Clone, Debug, Default)]
pub enum Unnamed {
    /// None.
    #[default]
    Empty,
    /// This one.
    Holds(Rc<Statement>, Parsed),
    /// One that is not known (its message was streamed, or failed in a way that leaves it open).
    Unknown,
}

impl Unnamed {
    /// This one, parsed just now.
    #[must_use]
    pub fn parsed(statement: Rc<Statement>) -> Self {
        let epoch = statement.epoch();
        Self::Holds(statement, Parsed { epoch, ..Parsed::default() })
    }

    /// The server has told how it describes it, if it is the statement `id`.
    pub fn describe(&mut self, id: u64, described: Described) {
        if let Self::Holds(statement, parsed) = self
            && statement.id == id
        {
            parsed.described = parsed.described.with(described);
        }
    }
}

/// Whether functions, triggers, views or their like were defined on a server connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Defines {
    /// Not in this lease.
    #[default]
    No,
    /// In a transaction that nobody else sees the results of yet.
    Open,
    /// They are there for everybody now, or will be at any moment.
    InFlight,
}

/// A logged-in server connection.
///
/// Owned by the session it is lent to, else by its pool. Dropping it, for whatever reason, ends it cleanly
/// and keeps its [`Permit`] until the server has let go.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
pub struct ServerConn {
    stream: Stream,
    /// Frames what the server sends.
    pub scanner: Scanner,
    /// What the server owes.
    pub pipeline: Pipeline,
    /// Bytes for the server that its socket would not take yet.
    pub unsent: Vec<u8>,
    /// Bytes from the server that are part of a message still incomplete.
    pub carry: Vec<u8>,
    /// The settings applied.
    pub profile: Rc<Profile>,
    /// Its named statements: those that the server has, or will have when what was sent has run.
    pub shelf: Shelf,
    /// Something of what it holds was run under settings by which it may have been read anew.
    pub strays: bool,
    /// Its unnamed statement.
    pub unnamed: Unnamed,
    /// The server's process id.
    pub pid: u32,
    secret: Box<[u8]>,
    /// Which life of which server this is.
    pub incarnation: Rc<Incarnation>,
    /// When it logged in.
    pub born: Instant,
    /// When it was released last.
    pub idle_since: Instant,
    /// When it is to be replaced; with some jitter, so that not all are at once.
    pub expires: Option<Instant>,
    /// Cancel requests on their way.
    pub gate: Rc<CancelGate>,
    /// Why it is closed, when it is.
    pub discard_reason: DiscardReason,
    /// The front of a client's message was sent and its end never will be.
    pub cut: bool,
    /// A simple query or a function call was sent into a batch of the extended protocol. Postgres 18 says afterwards that
    /// no transaction is open, and yet fails the next statement with XX000, whoever's it is.
    pub mixed: bool,
    /// Something was defined on it that the pools of its database were not told of yet.
    pub defines: Defines,
    /// Something that we made for a client and could not take away may be on it.
    pub littered: bool,
    /// Whose what sequences gave on it is.
    pub values: Values,
    /// What it says of itself in `application_name`, behind the client's own; empty if nothing.
    pub tag: Box<str>,
    /// A client took the tag away: nobody sees whose connection it is.
    pub untagged: bool,
    /// It was opened with the start-up parameters of one client, and is never another's.
    pub own: bool,
    /// What the operator's queries have left on it, if somebody looked.
    pub baseline: Option<Box<Baseline>>,
    /// Whether its server is one that is written to.
    pub standby: Standby,
    /// Which defaults its session began with; see [`Knowledge::defaults`](crate::pool::Knowledge::defaults).
    pub defaults: u64,
    /// It was lent before.
    pub used: bool,
    /// What its texts are in.
    pub encodings: Encodings,
    /// Its place among the pool's lent connections.
    pub lent: usize,
    target: Rc<Target>,
    clock: Rc<Clock>,
    permit: Option<Permit>,
}

/// What a server that is written to has said of being a standby (`in_hot_standby`, since 14).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standby {
    /// Nothing.
    #[default]
    No,
    /// At the login: it is one.
    Told,
    /// And it has refused a write for it. By the same name another server may be reached by now.
    Refused,
}

/// A server connection ended or broke.
#[derive(Clone, Debug)]
pub enum Lost {
    /// End of stream or a socket error.
    Io(io::ErrorKind),
    /// The server said FATAL; its `ErrorResponse` body.
    Fatal(Box<[u8]>),
    /// The server broke the protocol.
    Protocol,
    /// The server went on with a query for too long, whatever it was told.
    Overdue,
}

/// A connection to a standby that is younger than this is kept though a write was refused there: whoever connects anew would
/// find the same.
const FRESH: Duration = Duration::from_secs(5);

impl ServerConn {
    /// A write was refused, because the server or the transaction is read-only (25006).
    #[cold]
    pub fn refused_write(&mut self) {
        if self.standby == Standby::Told && self.born.elapsed() >= FRESH {
            self.standby = Standby::Refused;
        }
    }

    /// Reads into `buf`; see [`Stream::poll_read`].
    ///
    /// # Errors
    ///
    /// Whatever the socket reports.
    #[inline]
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.stream.poll_read(cx, buf)
    }

    /// Has the connection known as one of this process's own, until the server has ended it: to whoever counts, and to
    /// whoever takes over what the worker had.
    pub fn enroll(&mut self, roster: &Rc<Roster>) {
        if let Some(permit) = &mut self.permit {
            permit.enroll(roster, self.pid);
        }
    }

    /// What TLS says of the server; none without TLS.
    #[must_use]
    pub const fn tls(&self) -> Option<&TlsInfo> {
        self.stream.tls()
    }

    /// Writes `first` and `second` behind what is still unsent, and keeps what the socket does not take.
    ///
    /// # Errors
    ///
    /// Whatever the socket reports.
    #[inline]
    pub fn write(&mut self, cx: &mut Context<'_>, first: &[u8], second: &[u8]) -> io::Result<()> {
        if !self.unsent.is_empty() {
            self.unsent.extend_from_slice(first);
            self.unsent.extend_from_slice(second);
            return self.flush(cx);
        }
        let taken = match self.stream.poll_write(cx, first, second) {
            Poll::Ready(Ok(taken)) => taken,
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Pending => 0,
        };
        if taken < first.len() + second.len() {
            self.unsent.extend_from_slice(first.get(taken..).unwrap_or_default());
            self.unsent.extend_from_slice(second.get(taken.saturating_sub(first.len())..).unwrap_or_default());
            return self.flush(cx);
        }
        Ok(())
    }

    /// Sends what is unsent, as far as the socket takes it.
    ///
    /// # Errors
    ///
    /// Whatever the socket reports.
    pub fn flush(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = self.unsent.get(done..).filter(|rest| !rest.is_empty()) {
            match self.stream.poll_write(cx, rest, &[]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(taken)) => done += taken,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        self.unsent.drain(..done);
        if self.unsent.is_empty() && self.unsent.capacity() > KEPT_CAPACITY {
            self.unsent = Vec::new();
        }
        Ok(())
    }

    /// Whether the server can do nothing before it has more of what was begun. `is_inside`: what was sent last is not whole.
    pub fn waits_for_more(&self, is_inside: bool) -> bool {
        let pipeline = &self.pipeline;
        let takes_time =
            |owed: Owed| !matches!(owed.expect, Expect::Parse | Expect::Bind | Expect::Describe | Expect::Close);
        let is_prepared = || pipeline.is_batch_open() || pipeline.is_skipping();
        self.unsent.is_empty()
            && (pipeline.is_copy_in()
                || is_inside && pipeline.depth() <= 1
                || is_prepared() && !pipeline.iter().any(takes_time))
    }

    /// Whether the server may have answers that it does not send before it is told to: what it was sent last is of a batch that goes on.
    pub fn may_keep_answers(&self) -> bool {
        let pipeline = &self.pipeline;
        pipeline.is_batch_open() && !pipeline.is_skipping() && !pipeline.is_copy_in() && self.unsent.is_empty()
    }

    /// Whether nothing is known against lending an idle connection. Costs no system call, unless the
    /// server has sent something: then it is read, and only notices are fine. Whoever asks is woken when it sends more.
    pub fn is_alive(&mut self, cx: &mut Context<'_>) -> bool {
        !self.stream.is_readable(cx) || self.is_alive_after_all(cx)
    }

    /// The server has said something to nobody, or nothing is known yet.
    #[cold]
    fn is_alive_after_all(&mut self, cx: &mut Context<'_>) -> bool {
        let mut buf = [0; 4096];
        for _ in 0..IDLE_READS_MAX {
            match self.stream.poll_read(cx, &mut buf) {
                Poll::Pending => return self.carry.is_empty(),
                Poll::Ready(Ok(read)) if read > 0 => {
                    self.carry.extend_from_slice(buf.get(..read).unwrap_or_default());
                    if !self.take_idle_messages() {
                        return false;
                    }
                }
                Poll::Ready(_) => return false,
            }
        }
        false
    }

    /// Reads the messages that a server may send to an idle connection. False for any other.
    fn take_idle_messages(&mut self) -> bool {
        let mut at = 0;
        loop {
            let rest = self.carry.get(at..).unwrap_or_default();
            match self.scanner.next(rest) {
                Ok(Scanned::Short | Scanned::Part { .. }) => break,
                Ok(Scanned::Whole { tag, body }) => {
                    match Tag::from_byte(tag) {
                        Ok(Tag::NoticeResponse | Tag::NotificationResponse) => {}
                        // A setting changed by a reload of the server: the pool's picture of it is old.
                        _ => return false,
                    }
                    at += HEADER + body.len();
                }
                Ok(Scanned::Inside { .. }) | Err(_) => return false,
            }
        }
        self.carry.drain(..at);
        true
    }

    /// Whether the server still has what it had is not certain any more: it is parsed anew before it is used.
    pub fn doubt_all(&mut self) {
        self.shelf.doubt_all();
        self.unnamed = Unnamed::Unknown;
    }

    /// Whoever comes next needs what it holds as it was parsed.
    #[cold]
    pub fn end_strays(&mut self) {
        self.strays = false;
        self.shelf.doubt_strays();
        self.unnamed = Unnamed::Unknown;
    }

    /// A cancel request for what this connection runs now, to be sent by a task of its own.
    #[must_use]
    pub fn cancel_order(&self) -> CancelOrder {
        self.gate.in_flight.set(self.gate.in_flight.get() + 1);
        CancelOrder {
            target: self.target.clone(),
            clock: self.clock.clone(),
            gate: self.gate.clone(),
            key: CancelKey::new(&self.stream, self.pid, self.secret.clone()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "the defaults name no files")]
impl Target {
    /// One that nothing is ever dialled at, for tests.
    #[must_use]
    pub fn nowhere() -> Self {
        use crate::net::Sockets;
        use crate::net::tls::Keyring;
        use std::sync::Arc;

        let config = pgweir_config::Config::default();
        Self {
            pool: PoolName::primary("", ""),
            host: String::new(),
            port: 0,
            dbname: String::new(),
            user: String::new(),
            credentials: Credentials::new(Source::None, Derivations::default()),
            policy: LoginPolicy {
                require_auth: config.server.server_require_auth.clone(),
                channel_binding: config.server.server_channel_binding,
                allow_cleartext_password: false,
                scram_iterations_max: 0,
            },
            connect_query: String::new(),
            is_read_only: false,
            tcp: TcpOptions::new(&config.listen, Sockets::default()),
            version: Cell::new(0x0003_0000),
            connect_timeout: Duration::ZERO,
            tls: Gear::new(Arc::new(Keyring::load(Arc::new(config)).unwrap())),
            entry: String::new(),
        }
    }
}

#[cfg(test)]
impl ServerConn {
    /// One that has logged in and has no socket, for tests of what passes through it.
    #[must_use]
    pub fn without_socket(profile: Rc<Profile>) -> Box<Self> {
        let now = Instant::now();
        Box::new(Self {
            stream: Stream::Closed,
            scanner: Scanner::new(u32::MAX >> 1),
            pipeline: Pipeline::default(),
            unsent: Vec::new(),
            carry: Vec::new(),
            profile,
            shelf: Shelf::default(),
            strays: false,
            unnamed: Unnamed::Empty,
            pid: 1,
            secret: Box::default(),
            incarnation: Rc::default(),
            born: now,
            idle_since: now,
            expires: None,
            gate: Rc::default(),
            discard_reason: DiscardReason::Lost,
            cut: false,
            mixed: false,
            defines: Defines::default(),
            littered: false,
            values: Values::None,
            tag: Box::default(),
            untagged: false,
            own: false,
            baseline: None,
            standby: Standby::No,
            defaults: 0,
            used: true,
            encodings: Encodings::default(),
            lent: 0,
            target: Rc::new(Target::nowhere()),
            clock: Rc::default(),
            permit: None,
        })
    }
}

/// What a server said before its connection broke, as far as it can still be read: its FATAL, if it sent one.
#[must_use]
pub fn last_words(conn: &mut ServerConn, cx: &mut Context<'_>) -> Option<Lost> {
    let mut buf = vec![0; 16 * 1024];
    while conn.carry.len() < KEPT_CAPACITY {
        match conn.stream.poll_read(cx, &mut buf) {
            Poll::Ready(Ok(read)) if read > 0 => conn.carry.extend_from_slice(buf.get(..read).unwrap_or_default()),
            _ => break,
        }
    }
    let mut rest = &conn.carry[..];
    while let Ok(scanned) = conn.scanner.next(rest) {
        let used = match scanned {
            Scanned::Short | Scanned::Part { .. } => return None,
            Scanned::Inside { len } => len,
            Scanned::Whole { tag, body } => {
                if tag == Tag::ErrorResponse as u8 && Fields::parse(body).is_ok_and(|fields| fields.is_fatal()) {
                    return Some(Lost::Fatal(body.into()));
                }
                HEADER + body.len()
            }
        };
        rest = rest.get(used..)?;
    }
    None
}

/// The longest error, notice or description that is read whole; bytes. A notice may quote a value.
const LONG_MESSAGE_MAX: u32 = 64 << 20;

/// The longest of all other messages; bytes. The longest of Postgres' own is a notification of some 8000 bytes; libpq
/// takes 30000.
const SHORT_MESSAGE_MAX: u32 = 64 << 10;

/// How long a message of a server may be that is read whole; bytes. Rows and data have no such limit, where they pass as
/// they come.
#[must_use]
pub const fn longest(tag: Tag) -> u32 {
    match tag {
        Tag::DataRow
        | Tag::CopyData
        | Tag::FunctionCallResponse
        | Tag::ErrorResponse
        | Tag::NoticeResponse
        | Tag::RowDescription
        | Tag::ParameterDescription => LONG_MESSAGE_MAX,
        _ => SHORT_MESSAGE_MAX,
    }
}

/// Reads of what an idle server connection was sent, at most, each of a page; one that says more is given up.
const IDLE_READS_MAX: u32 = 16;

/// Buffers above this many bytes are given back when they are empty.
pub const KEPT_CAPACITY: usize = 64 * 1024;

/// A cancel request on its way. While it exists, its connection is not lent on.
#[derive(Debug)]
pub struct CancelOrder {
    target: Rc<Target>,
    clock: Rc<Clock>,
    gate: Rc<CancelGate>,
    key: CancelKey,
}

/// What cancels a session's query, and where.
#[derive(Debug)]
struct CancelKey {
    /// The session's own: its name may lead to another server, or have led to several all along.
    address: Option<SocketAddr>,
    /// The connection has TLS, and so has the request.
    encrypted: bool,
    pid: u32,
    secret: Box<[u8]>,
}

impl CancelKey {
    fn new(stream: &Stream, pid: u32, secret: Box<[u8]>) -> Self {
        Self { address: stream.peer_address(), encrypted: stream.tls().is_some(), pid, secret }
    }
}

impl CancelOrder {
    /// Sends the request and waits until the server has acted on it: it closes the connection after it
    /// signalled the process. Returns the connection that waited for this, if it was the last.
    ///
    /// Source: `PostgreSQL` 17 docs, §54.2.8 "Canceling Requests in Progress".
    pub async fn send(self, limit: Duration) -> Option<Box<ServerConn>> {
        let outcome = self.clock.limit(limit, cancel(&self.target, &self.key)).await;
        let gate = self.gate.clone();
        if !matches!(outcome, Ok(Ok(()) | Err(Unsent::NotConnected(_)))) {
            gate.poisoned.set(true);
        }
        drop(self);
        if gate.in_flight.get() == 0 { gate.parked.borrow_mut().take() } else { None }
    }
}

impl Drop for CancelOrder {
    fn drop(&mut self) {
        self.gate.in_flight.set(self.gate.in_flight.get().saturating_sub(1));
    }
}

/// Why it is not certain that a cancel request was acted on.
#[derive(Debug, thiserror::Error)]
enum Unsent {
    /// It never left: it cannot arrive later.
    #[error("{0}")]
    NotConnected(io::Error),
    /// It may still arrive.
    #[error("{0}")]
    Unknown(#[from] io::Error),
}

async fn cancel(target: &Target, key: &CancelKey) -> Result<(), Unsent> {
    if key.secret.is_empty() {
        // A server that gave no key takes no such requests.
        return Err(Unsent::NotConnected(io::ErrorKind::Unsupported.into()));
    }
    let way = if key.encrypted { Try::Tls } else { Try::Plain };
    let mut stream = target.connect(way, key.address).await.map_err(|error| match error {
        ConnectError::Io(error) => Unsent::NotConnected(error),
        error => Unsent::NotConnected(io::Error::other(error)),
    })?;
    let mut request = Vec::new();
    pgweir_proto::encode::cancel_request(&mut request, key.pid, &key.secret);
    let mut rest = &request[..];
    while !rest.is_empty() {
        let sent = std::future::poll_fn(|cx| stream.poll_write(cx, rest, &[])).await?;
        rest = rest.get(sent..).unwrap_or_default();
    }
    let mut byte = [0];
    std::future::poll_fn(|cx| stream.poll_read(cx, &mut byte)).await?;
    Ok(())
}

/// The SQLSTATE and message of an `ErrorResponse` body, for logs and errors of our own.
#[must_use]
pub fn describe_error(body: &[u8]) -> (String, String) {
    let fields = Fields::parse(body).unwrap_or_default();
    (fields.sqlstate().as_str().to_owned(), String::from_utf8_lossy(fields.message).into_owned())
}

/// What a server reported at login.
pub type Parameters = Vec<Entry>;

//! Dialling and logging in, one server connection.

mod auth;

use std::borrow::Cow;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use pgweir_config::AuthMethod;
use pgweir_proto::backend::{self, Tag, TxStatus, row_columns};
use pgweir_proto::error::Fields;
use pgweir_proto::pipeline::Pipeline;
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};
use pgweir_proto::scram::ScramError;
use pgweir_proto::startup::PROTOCOL_3_0;
use pgweir_proto::{Malformed, encode};

use super::{
    CancelGate, Credential, CredentialError, Defines, Incarnation, Parameters, Permit, ServerConn, Standby, Target,
    Unnamed,
};
use crate::budget::tag;
use crate::clock::Clock;
use crate::net::tls::{ConnectError, Try};
use crate::net::{self, Stream};
use crate::prepared::Shelf;
use crate::settings::{APPLICATION_NAME, Encodings, Entry, Profile};
use crate::stats::DiscardReason;

/// The longest message accepted before a login is complete; bytes.
const LOGIN_MESSAGE_LIMIT: u32 = 64 * 1024;

/// Notices kept of a login, to be shown to the client that caused it.
const NOTICES_MAX: usize = 16;

/// The most bytes of parameters, and again of notices, that are kept of a login. Postgres reports some 15 parameters of
/// a few bytes.
const KEPT_MAX: usize = 64 * 1024;

/// How long a server is waited for that has refused a login and does not close.
const CLOSING_LIMIT: Duration = Duration::from_secs(15);

/// The most messages of a login, and the most bytes in them: a server that sends more will never be ready.
const MESSAGES_MAX: u32 = 1000;
const BYTES_MAX: usize = 1 << 20;

/// What is learnt of every server at login; sent behind the last word of the authentication. The time of its start is a number,
/// in microseconds: a session's own settings may be in effect already, and would spell it in their way.
pub const WHO_ARE_YOU: &str = "SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()), \
    (pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8, \
    pg_catalog.inet_server_addr(), pg_catalog.inet_server_port()";

/// `options` of the start-up packet: what a RESET leads back to.
const READ_ONLY: &str = "-c default_transaction_read_only=on";

/// What a server connection says of itself when it logs in, besides its role and database.
#[derive(Debug, Default)]
pub struct Introduction {
    /// Whose it is; empty for nothing, as it always is with a `start`.
    pub tag: Box<str>,
    /// The start-up parameters of the one client that it is for; none if it is for any.
    pub start: Option<Start>,
}

/// A client's start-up parameters, as it gave them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// `options`; empty for none.
    pub options: Box<[u8]>,
    /// The others, but for its role and database, in their order.
    pub parameters: Vec<(Box<[u8]>, Box<[u8]>)>,
    /// The settings that are given a value, as far as that can be read.
    pub names: Vec<Box<str>>,
}

impl Introduction {
    /// The parameters of the start-up packet, besides role and database; of a session that `is_read_only` unless the client
    /// says otherwise.
    fn parameters(&self, is_read_only: bool) -> Vec<(Cow<'_, [u8]>, Cow<'_, [u8]>)> {
        let mut options = if is_read_only { READ_ONLY.as_bytes().to_vec() } else { Vec::new() };
        let mut all = Vec::new();
        if let Some(start) = &self.start {
            if !(options.is_empty() || start.options.is_empty()) {
                options.push(b' ');
            }
            options.extend_from_slice(&start.options);
            all.extend(start.parameters.iter().map(|(name, value)| (Cow::from(&**name), Cow::from(&**value))));
        }
        if !self.tag.is_empty() {
            all.push((Cow::from(APPLICATION_NAME.as_bytes()), Cow::from(self.tag.as_bytes())));
        }
        if !options.is_empty() {
            all.push((Cow::from(&b"options"[..]), Cow::from(options)));
        }
        all
    }
}

/// A new server connection and what the server told while it logged in.
#[derive(Debug)]
pub struct LoggedIn {
    /// The connection, idle.
    pub conn: Box<ServerConn>,
    /// Its `ParameterStatus`es.
    pub parameters: Parameters,
    /// Bodies of its notices.
    pub notices: Vec<Box<[u8]>>,
}

/// Why there is no server connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The network refused or broke it.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// There is no TLS that would do.
    #[error("{0}")]
    Tls(ConnectError),
    /// It took longer than `server_connect_timeout`.
    #[error("no answer within server_connect_timeout")]
    Timeout,
    /// The server said no.
    #[error("{code}: {message}")]
    Refused {
        /// The SQLSTATE.
        code: String,
        /// The server's message.
        message: String,
        /// The whole `ErrorResponse` body.
        body: Box<[u8]>,
    },
    /// The server wants a password and none is configured.
    #[error("the server asks for a password and none is configured for user {user:?}")]
    NoPassword {
        /// The role.
        user: String,
    },
    /// The server asks for more than is known of what a client proved itself by.
    #[error(
        "the server {}, and all that is known of user {user:?} is {known}: give its password in [databases.NAME]",
        asks(*method)
    )]
    Unfit {
        /// The role.
        user: String,
        /// What the server wants.
        method: AuthMethod,
        /// What is known.
        known: &'static str,
    },
    /// The server's SCRAM verifier is not the one that a client proved itself by.
    #[error(
        "the server has another SCRAM verifier of user {user:?} than the one that the client proved itself by: store \
         the server's here, or give the password in [databases.NAME]"
    )]
    OtherVerifier {
        /// The role.
        user: String,
    },
    /// There is no password although there should be one.
    #[error("{0}")]
    Credential(#[from] CredentialError),
    /// The server wants a method that is not spoken.
    #[error("the server asks for the authentication method {method}, which is not supported")]
    Method {
        /// Its name or number.
        method: String,
    },
    /// The server wants a method that `require_auth` leaves out.
    #[error("the server {}, which require_auth = \"{required}\" does not allow", asks(*method))]
    NotAllowed {
        /// What it wants.
        method: AuthMethod,
        /// The setting.
        required: String,
    },
    /// The server wants to read the password off the network.
    #[error(
        "the server asks for the password in clear on a connection without TLS; \
         allow_cleartext_password would let it have it"
    )]
    Cleartext,
    /// `channel_binding` requires what this login cannot have.
    #[error("channel_binding = \"require\", and {reason}")]
    Unbound {
        /// Why not.
        reason: &'static str,
    },
    /// The server ends the authentication before it has proven that it knows the password, too.
    #[error("the server lets us in without proving that it knows the password")]
    Unproven,
    /// The server failed to prove that it knows the password, or broke the exchange.
    #[error("SCRAM: {0}")]
    Scram(#[from] ScramError),
    /// The server broke the protocol.
    #[error("{0}")]
    Malformed(#[from] Malformed),
    /// The server sent something that has no place in a login.
    #[error("message type {tag:#04x} out of place")]
    OutOfPlace {
        /// Its tag.
        tag: u8,
    },
    /// The server says more in one login than any server would.
    #[error("the server's login has more than {limit} {what}")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much is accepted.
        limit: usize,
    },
    /// The server does not tell which one it is, and has told before.
    #[error("the server did not tell its identity")]
    Untold,
    /// A transaction is open where none may be.
    #[error("a transaction is open after {after}")]
    InTransaction {
        /// After what.
        after: &'static str,
    },
}

fn asks(method: AuthMethod) -> &'static str {
    match method {
        AuthMethod::None => "asks for no authentication",
        AuthMethod::Password => "asks for the password in clear",
        AuthMethod::Md5 => "asks for the authentication method md5",
        AuthMethod::ScramSha256 => "asks for the authentication method scram-sha-256",
    }
}

impl DialError {
    /// Whether trying again with the same credentials is of no use: to be told to clients at once.
    #[must_use]
    pub fn is_hopeless(&self) -> bool {
        match self {
            Self::Refused { code, .. } => {
                code.starts_with("28") || code.starts_with("3D") || matches!(code.as_str(), "42501" | "55000")
            }
            Self::Tls(error) => error.is_hopeless(),
            Self::Io(_) | Self::Timeout | Self::Credential(CredentialError::Command { .. }) => false,
            _ => true,
        }
    }

    /// Whether the server may take the very same in a moment: it is full, or starts, or ends.
    #[must_use]
    pub fn is_of_the_moment(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if matches!(code.as_str(), "53300" | "57P03"))
    }

    /// Whether what the server has against us is our password, or what stands for one.
    #[must_use]
    pub fn is_about_credentials(&self) -> bool {
        match self {
            Self::Refused { code, .. } => code.starts_with("28"),
            Self::NoPassword { .. }
            | Self::Unfit { .. }
            | Self::OtherVerifier { .. }
            | Self::Credential(_)
            | Self::Method { .. }
            | Self::NotAllowed { .. }
            | Self::Cleartext
            | Self::Unbound { .. }
            | Self::Unproven
            | Self::Scram(_) => true,
            _ => false,
        }
    }

    /// What a client is told: not where we keep our secrets.
    #[must_use]
    pub fn for_client(&self) -> String {
        match self {
            Self::Credential(CredentialError::File { .. }) => "its password_file is of no use".to_owned(),
            Self::Credential(CredentialError::Command { .. }) => "its password_command failed".to_owned(),
            error => error.to_string(),
        }
    }
}

/// Connects to the server and logs in, with a newer password once if the server refuses the one that was known. The
/// permit is given back when this fails, after the server closed.
///
/// # Errors
///
/// [`DialError`].
pub async fn dial(
    target: Rc<Target>,
    clock: Rc<Clock>,
    plain: Rc<Profile>,
    permit: Permit,
    intro: Introduction,
) -> Result<LoggedIn, DialError> {
    let credential = target.credentials.current(Instant::now()).await?;
    let (error, failed) = match attempt(&target, &clock, &credential, &intro).await {
        Ok(login) => return Ok(login.into_logged_in(target, clock, plain, permit, intro)),
        Err(failed) => failed,
    };
    let newer = if matches!(&error, DialError::Refused { code, .. } if code == "28P01") {
        // What went wrong here is told by the next login.
        target.credentials.after_refusal(&credential, Instant::now()).await.ok().flatten()
    } else {
        None
    };
    let Some(newer) = newer else {
        close(failed, clock, permit);
        return Err(error);
    };
    if let Some(mut failed) = failed {
        // Two would count against the server's limits where one is permitted.
        let _ = clock.limit(CLOSING_LIMIT, failed.until_closed()).await;
    }
    match attempt(&target, &clock, &newer, &intro).await {
        Ok(login) => Ok(login.into_logged_in(target, clock, plain, permit, intro)),
        Err((error, failed)) => {
            close(failed, clock, permit);
            Err(error)
        }
    }
}

/// One login, within its time limit.
async fn attempt(
    target: &Target,
    clock: &Clock,
    credential: &Credential,
    intro: &Introduction,
) -> Result<Login, (DialError, Option<Login>)> {
    let mut login = None;
    let outcome = clock.limit(target.connect_timeout, log_in(target, credential, intro, &mut login)).await;
    match (outcome, login) {
        (Ok(Ok(())), Some(login)) => Ok(login),
        (Ok(Err(error)), login) => Err((error, login)),
        (Ok(Ok(())) | Err(_), login) => Err((DialError::Timeout, login)),
    }
}

/// Ends a login that failed. The backend may outlive the refusal by a moment, and counts until it closes; nobody has to
/// wait for that.
fn close(failed: Option<Login>, clock: Rc<Clock>, permit: Permit) {
    let Some(mut login) = failed else { return };
    tokio::task::spawn_local(async move {
        let _ = clock.limit(CLOSING_LIMIT, login.until_closed()).await;
        drop(permit);
    });
}

/// A login under way.
struct Login {
    stream: Stream,
    scanner: Scanner,
    input: Vec<u8>,
    messages: u32,
    bytes: usize,
    parameters: Parameters,
    notices: Vec<Box<[u8]>>,
    /// Bytes in them, and in the parameters so far.
    notices_len: usize,
    parameters_len: usize,
    key: Option<(u32, Box<[u8]>)>,
    incarnation: Incarnation,
    /// `connect_query` has changed the name.
    is_renamed: bool,
    encodings: Encodings,
    /// The version asked for, or the older one that the server has.
    version: u32,
}

impl From<ConnectError> for DialError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Io(error) => Self::Io(error),
            error => Self::Tls(error),
        }
    }
}

async fn log_in(
    target: &Target,
    credential: &Credential,
    intro: &Introduction,
    slot: &mut Option<Login>,
) -> Result<(), DialError> {
    let mut ways = target.tries().iter().copied();
    let mut way = ways.next().unwrap_or(Try::Plain);
    let mut version = target.version.get();
    loop {
        let Err(error) = introduce(target, (way, version), credential, intro, slot).await else { break };
        let encrypted = slot.as_ref().is_some_and(|login| login.stream.tls().is_some());
        if version > PROTOCOL_3_0 && may_be_the_version(&error, slot.as_ref()) {
            version = PROTOCOL_3_0;
        } else if let Some(next) = ways.next().filter(|next| is_worth(*next, encrypted, &error)) {
            tracing::debug!(host = target.host, port = target.port, ?way, ?next, %error, "server login: the next way");
            way = next;
        } else {
            return Err(error);
        }
        if let Some(login) = slot.as_mut() {
            // Never two at once: the first still counts on the server until it is gone.
            login.until_closed().await;
        }
        *slot = None;
    }
    target.version.set(version);
    let login = slot.as_mut().ok_or(DialError::Timeout)?;
    login.until_ready().await?;
    // From here on it can be cancelled.
    login.mark(target);
    login.learn_incarnation().await?;
    if !target.connect_query.is_empty() {
        login.run(&target.connect_query).await?;
    }
    login.rest()
}

/// Whether what the server has against us may be the version: the first thing it says is that it does not support
/// something, or that the protocol is violated, or it closes without a word, as some poolers of old do.
fn may_be_the_version(error: &DialError, login: Option<&Login>) -> bool {
    let Some(login) = login else { return false };
    match error {
        DialError::Refused { code, .. } => login.messages == 1 && matches!(code.as_str(), "0A000" | "08P01"),
        DialError::Io(_) => login.messages == 0,
        _ => false,
    }
}

/// Whether the `next` way may lead where the last one failed: the server may want TLS, or want none. A server that is
/// full, say, wants neither: what it said with TLS is final.
fn is_worth(next: Try, encrypted: bool, error: &DialError) -> bool {
    match error {
        DialError::Refused { code, .. } => code.starts_with("28") && encrypted == (next == Try::Plain),
        DialError::Tls(error) => next == Try::Plain && error.is_of_tls(),
        _ => false,
    }
}

/// Connects in one way, asks for a version of the protocol, and authenticates.
async fn introduce(
    target: &Target,
    (way, version): (Try, u32),
    credential: &Credential,
    intro: &Introduction,
    slot: &mut Option<Login>,
) -> Result<(), DialError> {
    let stream = target.connect(way, None).await?;
    let login = slot.insert(Login {
        stream,
        scanner: Scanner::new(LOGIN_MESSAGE_LIMIT),
        input: Vec::new(),
        messages: 0,
        bytes: 0,
        parameters: Vec::new(),
        notices: Vec::new(),
        notices_len: 0,
        parameters_len: 0,
        key: None,
        incarnation: Incarnation::default(),
        is_renamed: false,
        encodings: Encodings::default(),
        version,
    });
    // The server does not tell when it has let us in: it does so when its session is ready, which may take long.
    login.mark(target);
    let mut out = Vec::new();
    let who = [("user", &target.user), ("database", &target.dbname)];
    let who = who.into_iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    let more = intro.parameters(target.is_read_only);
    encode::startup(&mut out, version, who.chain(more.iter().map(|(name, value)| (&**name, &**value))));
    login.send(&out).await?;
    login.authenticate(target, credential).await
}

impl Login {
    async fn send(&mut self, mut bytes: &[u8]) -> Result<(), DialError> {
        while !bytes.is_empty() {
            let taken = poll_fn(|cx| self.stream.poll_write(cx, bytes, &[])).await?;
            bytes = bytes.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Makes known whose session it is, and what cancels its query once that is known, to whoever sees it to its end if this
    /// worker cannot.
    fn mark(&self, target: &Target) {
        let (pid, secret) = self.key.clone().unwrap_or_default();
        let encrypted = self.stream.tls().is_some();
        self.stream.mark(net::Server { pool: target.pool.clone(), pid, secret, encrypted });
    }

    /// The next message that is not a notice, a parameter or a refusal.
    async fn recv(&mut self) -> Result<(Tag, Vec<u8>), DialError> {
        loop {
            let (tag, body) = self.recv_any().await?;
            match tag {
                Tag::ErrorResponse => return Err(refused(&body)),
                Tag::NoticeResponse => self.keep_notice(body),
                Tag::ParameterStatus => self.keep_parameter(&body)?,
                Tag::NegotiateProtocolVersion => self.negotiate(&body)?,
                _ => return Ok((tag, body)),
            }
        }
    }

    /// The server has an older version. It must not have a newer one, nor name options: none was asked for.
    fn negotiate(&mut self, body: &[u8]) -> Result<(), DialError> {
        let (version, unknown) = backend::negotiate_protocol_version(body)?;
        if !(PROTOCOL_3_0..self.version).contains(&version) || unknown > 0 {
            return Err(DialError::OutOfPlace { tag: Tag::NegotiateProtocolVersion as u8 });
        }
        self.version = version;
        Ok(())
    }

    fn keep_notice(&mut self, body: Vec<u8>) {
        if self.notices.len() < NOTICES_MAX && self.notices_len + body.len() <= KEPT_MAX {
            self.notices_len += body.len();
            self.notices.push(body.into());
        }
    }

    fn keep_parameter(&mut self, body: &[u8]) -> Result<(), DialError> {
        let (name, value) = backend::parameter_status(body)?;
        self.encodings.hear(Tag::ParameterStatus, body);
        self.parameters_len += body.len();
        if self.parameters_len > KEPT_MAX {
            return Err(DialError::TooMuch { what: "bytes of parameters", limit: KEPT_MAX });
        }
        let name = String::from_utf8_lossy(name).into_owned().into_boxed_str();
        self.parameters.retain(|(known, _)| *known != name);
        self.parameters.push((name, value.into()));
        Ok(())
    }

    async fn recv_any(&mut self) -> Result<(Tag, Vec<u8>), DialError> {
        loop {
            if let Scanned::Whole { tag, body } = self.scanner.next(&self.input)? {
                let (tag, body) = (Tag::from_byte(tag)?, body.to_vec());
                self.input.drain(..HEADER + body.len());
                self.messages += 1;
                self.bytes += body.len();
                if self.bytes > BYTES_MAX {
                    return Err(DialError::TooMuch { what: "bytes", limit: BYTES_MAX });
                }
                if self.messages > MESSAGES_MAX {
                    return Err(DialError::TooMuch { what: "messages", limit: MESSAGES_MAX as usize });
                }
                return Ok((tag, body));
            }
            let mut buf = [0; 2048];
            let read = poll_fn(|cx| self.stream.poll_read(cx, &mut buf)).await?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.input.extend_from_slice(buf.get(..read).unwrap_or_default());
        }
    }

    /// Reads up to the first `ReadyForQuery`. The question that follows it is already on its way.
    async fn until_ready(&mut self) -> Result<(), DialError> {
        let mut out = Vec::new();
        encode::query(&mut out, WHO_ARE_YOU.as_bytes());
        self.send(&out).await?;
        loop {
            match self.recv().await? {
                (Tag::BackendKeyData, body) if self.key.is_none() => {
                    let (pid, secret) = backend::backend_key_data(&body)?;
                    self.key = Some((pid, secret.into()));
                }
                (Tag::ReadyForQuery, body) => return idle(&body, "the login"),
                (tag, _) => return Err(DialError::OutOfPlace { tag: tag as u8 }),
            }
        }
    }

    /// Reads the answer to [`WHO_ARE_YOU`]. A server that will not tell (another product) is served all
    /// the same, as one whose life cannot be told from another's.
    async fn learn_incarnation(&mut self) -> Result<(), DialError> {
        loop {
            match self.recv_any().await? {
                (Tag::DataRow, body) => {
                    let mut columns = row_columns(&body);
                    let mut next = || columns.next().flatten().map_or("", |c| std::str::from_utf8(c).unwrap_or(""));
                    let (system_identifier, started) = (next().into(), next().into());
                    let address = format!("{}:{}", next(), next()).into();
                    self.incarnation = Incarnation { system_identifier, started, address };
                }
                (Tag::ErrorResponse, body) if Fields::parse(&body)?.is_fatal() => return Err(refused(&body)),
                (Tag::ReadyForQuery, body) => return idle(&body, "the login"),
                (tag, _) if belongs_to_an_answer(tag) => {}
                (tag, _) => return Err(DialError::OutOfPlace { tag: tag as u8 }),
            }
        }
    }

    /// Runs `connect_query`; its error is the login's.
    async fn run(&mut self, text: &str) -> Result<(), DialError> {
        let mut out = Vec::new();
        encode::query(&mut out, text.as_bytes());
        self.send(&out).await?;
        let mut failure = None;
        loop {
            match self.recv_any().await? {
                (Tag::ErrorResponse, body) => failure = Some(refused(&body)),
                (Tag::ParameterStatus, body) => {
                    let (name, _) = backend::parameter_status(&body)?;
                    self.encodings.hear(Tag::ParameterStatus, &body);
                    self.is_renamed |= name == APPLICATION_NAME.as_bytes();
                    // Clients find it so, and are to be told.
                    self.keep_parameter(&body)?;
                }
                (Tag::ReadyForQuery, body) => return failure.map_or_else(|| idle(&body, "connect_query"), Err),
                (tag, _) if tag == Tag::DataRow || belongs_to_an_answer(tag) => {}
                (tag, _) => return Err(DialError::OutOfPlace { tag: tag as u8 }),
            }
        }
    }

    /// Nothing may follow the last answer but what a server says of its own accord; half a message is none yet.
    fn rest(&mut self) -> Result<(), DialError> {
        loop {
            match self.scanner.next(&self.input)? {
                Scanned::Short if self.input.is_empty() => return Ok(()),
                Scanned::Whole { tag, body } => {
                    match Tag::from_byte(tag)? {
                        Tag::NoticeResponse | Tag::NotificationResponse => {}
                        Tag::ErrorResponse => return Err(refused(body)),
                        _ => return Err(DialError::OutOfPlace { tag }),
                    }
                    let used = HEADER + body.len();
                    self.input.drain(..used);
                }
                // Rare enough to be dialled anew.
                _ => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
            }
        }
    }

    async fn until_closed(&mut self) {
        let _ = self.stream.shutdown_write();
        let mut buf = [0; 2048];
        while matches!(poll_fn(|cx| self.stream.poll_read(cx, &mut buf)).await, Ok(read) if read > 0) {}
    }

    fn into_logged_in(
        mut self,
        target: Rc<Target>,
        clock: Rc<Clock>,
        plain: Rc<Profile>,
        permit: Permit,
        intro: Introduction,
    ) -> LoggedIn {
        let born = clock.now();
        self.encodings.begin();
        let mut parameters = std::mem::take(&mut self.parameters);
        let is_renamed = self.is_renamed;
        // The tag is none of the clients' business, and goes before a name that `connect_query` set.
        let name = parameters.iter_mut().find(|(name, _)| **name == *APPLICATION_NAME && !intro.tag.is_empty());
        if let Some((_, value)) = name {
            *value = if is_renamed { Box::default() } else { tag::without(value).into() };
        }
        let notices = std::mem::take(&mut self.notices);
        let is_standby = |(name, value): &Entry| **name == *"in_hot_standby" && **value == *b"on";
        let standby = !target.is_read_only && parameters.iter().any(is_standby);
        let mut conn = self.into_conn(target, clock, plain, permit, born);
        conn.untagged = is_renamed && !intro.tag.is_empty();
        conn.own = intro.start.is_some();
        conn.tag = intro.tag;
        conn.standby = if standby { Standby::Told } else { Standby::No };
        LoggedIn { parameters, notices, conn: Box::new(conn) }
    }

    fn into_conn(
        self,
        target: Rc<Target>,
        clock: Rc<Clock>,
        plain: Rc<Profile>,
        permit: Permit,
        born: Instant,
    ) -> ServerConn {
        let (pid, secret) = self.key.unwrap_or_default();
        ServerConn {
            stream: self.stream,
            scanner: Scanner::new(u32::MAX >> 1),
            pipeline: Pipeline::default(),
            unsent: Vec::new(),
            carry: Vec::new(),
            profile: plain,
            shelf: Shelf::default(),
            strays: false,
            unnamed: Unnamed::Empty,
            pid,
            secret,
            incarnation: Rc::new(self.incarnation),
            born,
            idle_since: born,
            expires: None,
            gate: Rc::new(CancelGate::default()),
            discard_reason: DiscardReason::Lost,
            cut: false,
            mixed: false,
            defines: Defines::default(),
            littered: false,
            values: super::Values::None,
            tag: Box::default(),
            untagged: false,
            own: false,
            baseline: None,
            standby: Standby::No,
            defaults: 0,
            used: false,
            encodings: self.encodings,
            lent: 0,
            target,
            clock,
            permit: Some(permit),
        }
    }
}

/// A `ReadyForQuery` outside of any transaction.
fn idle(body: &[u8], after: &'static str) -> Result<(), DialError> {
    match TxStatus::parse(body)? {
        TxStatus::Idle => Ok(()),
        TxStatus::Open | TxStatus::Failed => Err(DialError::InTransaction { after }),
    }
}

/// What may come between a simple query and its `ReadyForQuery`, rows and errors apart. No COPY: it would wait for us.
fn belongs_to_an_answer(tag: Tag) -> bool {
    matches!(
        tag,
        Tag::RowDescription
            | Tag::CommandComplete
            | Tag::EmptyQueryResponse
            | Tag::ErrorResponse
            | Tag::NoticeResponse
            | Tag::ParameterStatus
            | Tag::NotificationResponse
    )
}

fn refused(body: &[u8]) -> DialError {
    let (code, message) = super::describe_error(body);
    DialError::Refused { code, message, body: body.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(intro: &Introduction, is_read_only: bool) -> String {
        let all = intro.parameters(is_read_only);
        let all = all.iter().map(|(name, value)| format!("{}={}", name.escape_ascii(), value.escape_ascii()));
        all.collect::<Vec<_>>().join(";")
    }

    #[test]
    fn a_clients_own_parameters_stand_behind_the_pools() {
        let start = |options: &str, parameters: &[(&str, &str)]| {
            let bytes = |text: &str| Box::<[u8]>::from(text.as_bytes());
            let parameters = parameters.iter().map(|(name, value)| (bytes(name), bytes(value))).collect();
            Some(Start { options: bytes(options), parameters, names: Vec::new() })
        };
        let named = [("post_auth_delay", "0"), ("Application_Name", "me"), ("work_mem", "1MB")];
        #[rustfmt::skip]
        let table = [
            ("",      None,                                 false, ""),
            ("",      None,                                 true,  "options=-c default_transaction_read_only=on"),
            ("[tag]", None,                                 false, "application_name=[tag]"),
            ("",      start("-P", &named),                  false, "post_auth_delay=0;Application_Name=me;work_mem=1MB;options=-P"),
            ("",      start("-c x=y", &[]),             true,  "options=-c default_transaction_read_only=on -c x=y"),
        ];
        for (tag, start, is_read_only, want) in table {
            let intro = Introduction { tag: tag.into(), start };
            assert_eq!(shown(&intro, is_read_only), want);
        }
    }
}

//! The connection: a client that sends what it is told and shows what it gets.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio::time::timeout;

use super::build;
use super::message::{Message, ServerError};
use crate::secrets;

/// Longest wait for the next message unless the test says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// A raw client connection.
#[derive(Debug)]
pub struct Wire {
    stream: TcpStream,
    /// Received and not yet taken.
    buffer: Vec<u8>,
    patience: Duration,
    /// The last value of each `ParameterStatus`.
    pub parameters: BTreeMap<String, String>,
    /// From `BackendKeyData`; 0 before it.
    pub pid: i32,
    /// From `BackendKeyData`; empty before it.
    pub secret: Vec<u8>,
    /// It speaks to the admin console: all that it hears is pgweir's own, and may bear no secret.
    console: bool,
}

/// What a query was answered with, up to `ReadyForQuery`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Rows of all statements, as text.
    pub rows: Vec<Vec<Option<String>>>,
    /// Command tags, one per statement.
    pub tags: Vec<String>,
    /// The error, if one came.
    pub error: Option<ServerError>,
    /// Notices.
    pub notices: Vec<ServerError>,
    /// The transaction status: `b'I'`, `b'T'` or `b'E'`.
    pub status: u8,
}

/// Why a raw client got no (whole) answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The socket failed, with a reset for example.
    #[error("{error}, after {before:?}")]
    Io {
        /// The operating system's answer.
        error: io::Error,
        /// Messages of the awaited answer that had come before.
        before: Vec<Message>,
    },
    /// End of the stream.
    #[error("the connection was closed after {before:?}")]
    Closed {
        /// Messages of the awaited answer that had come before.
        before: Vec<Message>,
    },
    /// No message in time.
    #[error("no message within {within:?}, after {before:?}")]
    Late {
        /// How long it was awaited.
        within: Duration,
        /// Messages of the awaited answer that had come before.
        before: Vec<Message>,
    },
    /// The login was refused.
    #[error("login refused: {0}")]
    Refused(ServerError),
    /// The peer broke the protocol.
    #[error("unexpected: {0}")]
    Unexpected(String),
}

impl WireError {
    /// The error that the peer had sent before this happened, if it sent one.
    #[must_use]
    pub fn server_error(&self) -> Option<ServerError> {
        match self {
            Self::Refused(error) => Some(error.clone()),
            Self::Unexpected(_) => None,
            Self::Io { before, .. } | Self::Closed { before } | Self::Late { before, .. } => {
                before.iter().filter(|message| message.tag == b'E').find_map(Message::server_error)
            }
        }
    }

    fn after(self, messages: Vec<Message>) -> Self {
        let before = messages;
        match self {
            Self::Io { error, .. } => Self::Io { error, before },
            Self::Closed { .. } => Self::Closed { before },
            Self::Late { within, .. } => Self::Late { within, before },
            other => other,
        }
    }
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        let before = Vec::new();
        Self::Io { error, before }
    }
}

impl Wire {
    /// Connects; sends nothing. Every wait of this client ends after 10 s unless
    /// [`Wire::set_patience`] says otherwise.
    ///
    /// # Errors
    ///
    /// [`WireError::Io`] or [`WireError::Late`].
    pub async fn connect(address: impl ToSocketAddrs) -> Result<Self, WireError> {
        let connecting = within(PATIENCE, async { Ok(TcpStream::connect(address).await?) });
        let stream = connecting.await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
            patience: PATIENCE,
            parameters: BTreeMap::new(),
            pid: 0,
            secret: Vec::new(),
            console: false,
        })
    }

    /// [`Wire::connect`], then [`Wire::login`].
    ///
    /// # Errors
    ///
    /// As theirs.
    pub async fn open(
        address: impl ToSocketAddrs,
        user: &str,
        database: &str,
        password: &str,
    ) -> Result<Self, WireError> {
        let mut wire = Self::connect(address).await?;
        wire.login(user, database, password).await?;
        Ok(wire)
    }

    /// Longest wait for each message from now on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Our end's address, which is how the peer knows us.
    ///
    /// # Errors
    ///
    /// [`WireError::Io`].
    pub fn local_addr(&self) -> Result<SocketAddr, WireError> {
        Ok(self.stream.local_addr()?)
    }

    /// Sends a `StartupMessage`; awaits nothing.
    ///
    /// # Errors
    ///
    /// [`WireError::Io`] or [`WireError::Late`].
    pub async fn startup(&mut self, parameters: &[(&str, &str)]) -> Result<(), WireError> {
        self.send(&build::startup(parameters)).await
    }

    /// Logs in and awaits `ReadyForQuery`. The peer chooses how: trust, a password in clear, MD5 or
    /// SCRAM-SHA-256.
    ///
    /// # Errors
    ///
    /// [`WireError::Refused`] with the peer's error, or any other.
    pub async fn login(&mut self, user: &str, database: &str, password: &str) -> Result<Vec<Message>, WireError> {
        let parameters = [("user", user), ("database", database)];
        self.login_with(&parameters, password).await
    }

    /// [`Wire::login`] with any startup parameters; `user` must be among them.
    ///
    /// # Errors
    ///
    /// As [`Wire::login`].
    pub async fn login_with(&mut self, parameters: &[(&str, &str)], password: &str) -> Result<Vec<Message>, WireError> {
        secrets::keep(password);
        self.console = parameters.contains(&("database", "pgbouncer"));
        self.startup(parameters).await?;
        let mut named = parameters.iter().filter(|(name, _)| *name == "user");
        let user = named.next().map_or("", |(_, user)| user);
        self.authenticate(user, password).await?;
        // After AuthenticationOk an error (no such database) is fatal: the peer closes.
        self.recv_until_ready().await.map_err(|error| match error.server_error() {
            Some(refusal) => WireError::Refused(refusal),
            None => error,
        })
    }

    /// Answers `Authentication` messages until `AuthenticationOk`. Call after a startup message.
    ///
    /// # Errors
    ///
    /// As [`Wire::login`].
    pub async fn authenticate(&mut self, user: &str, password: &str) -> Result<(), WireError> {
        let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        loop {
            let message = self.recv().await?;
            if message.tag == b'E' {
                let error = message.server_error().unwrap_or_default();
                return Err(WireError::Refused(error));
            }
            if message.tag == b'N' || message.tag == b'v' {
                continue;
            }
            let unexpected = || WireError::Unexpected(format!("{message:?} in a login"));
            let (kind, data) = message.authentication().ok_or_else(unexpected)?;
            // Source: PostgreSQL 17 docs, §53.7, the Authentication messages' Int32.
            match kind {
                0 => return Ok(()),
                3 => self.send(&build::password(password)).await?,
                5 => {
                    let salt = data.try_into().map_err(|_| unexpected())?;
                    let digest = md5_hash(user.as_bytes(), password.as_bytes(), salt);
                    self.send(&build::password(&digest)).await?;
                }
                10 => {
                    let first = build::sasl_initial(SCRAM_SHA_256, scram.message());
                    self.send(&first).await?;
                }
                11 => {
                    scram.update(&data)?;
                    self.send(&build::sasl(scram.message())).await?;
                }
                12 => scram.finish(&data)?,
                _ => return Err(unexpected()),
            }
        }
    }

    /// Sends these bytes.
    ///
    /// # Errors
    ///
    /// [`WireError::Io`], or [`WireError::Late`] when the peer does not take them in time.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        let stream = &mut self.stream;
        within(self.patience, async move { Ok(stream.write_all(bytes).await?) }).await
    }

    /// Takes the next message. Keeps parameters and the backend key on the way.
    ///
    /// # Errors
    ///
    /// [`WireError::Closed`] at the end of the stream, [`WireError::Late`] when none comes in time.
    pub async fn recv(&mut self) -> Result<Message, WireError> {
        let (stream, buffer) = (&mut self.stream, &mut self.buffer);
        let message = within(self.patience, async move {
            loop {
                if let Some(message) = cut(buffer)? {
                    return Ok(message);
                }
                if stream.read_buf(buffer).await? == 0 {
                    let before = Vec::new();
                    return Err(WireError::Closed { before });
                }
            }
        })
        .await?;
        if self.console || matches!(message.tag, b'E' | b'N') {
            secrets::assert_none_in("what a client is told", &message.body);
        }
        if let Some((name, value)) = message.parameter() {
            self.parameters.insert(name, value);
        }
        if let Some((pid, secret)) = message.backend_key() {
            (self.pid, self.secret) = (pid, secret);
        }
        Ok(message)
    }

    /// Takes the next message if one comes within `window`: to show that none does.
    ///
    /// # Errors
    ///
    /// As [`Wire::recv`], but none in time is `None`.
    pub async fn recv_within(&mut self, window: Duration) -> Result<Option<Message>, WireError> {
        let patience = std::mem::replace(&mut self.patience, window);
        let received = self.recv().await;
        self.patience = patience;
        match received {
            Err(WireError::Late { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Takes messages up to and with the next `ReadyForQuery`.
    ///
    /// # Errors
    ///
    /// As [`Wire::recv`], with the messages that came before.
    pub async fn recv_until_ready(&mut self) -> Result<Vec<Message>, WireError> {
        self.recv_until(b'Z').await
    }

    /// Takes messages up to and with the next one with this tag.
    ///
    /// # Errors
    ///
    /// As [`Wire::recv`], with the messages that came before.
    pub async fn recv_until(&mut self, tag: u8) -> Result<Vec<Message>, WireError> {
        let mut messages = Vec::new();
        loop {
            match self.recv().await {
                Ok(message) => messages.push(message),
                Err(error) => return Err(error.after(messages)),
            }
            if messages.last().is_some_and(|message| message.tag == tag) {
                return Ok(messages);
            }
        }
    }

    /// Takes bytes that are no message, such as the one-byte answer to `SSLRequest`.
    ///
    /// # Errors
    ///
    /// As [`Wire::recv`].
    pub async fn recv_raw(&mut self, length: usize) -> Result<Vec<u8>, WireError> {
        let (stream, buffer) = (&mut self.stream, &mut self.buffer);
        within(self.patience, async move {
            while buffer.len() < length {
                if stream.read_buf(buffer).await? == 0 {
                    let before = Vec::new();
                    return Err(WireError::Closed { before });
                }
            }
            Ok(buffer.drain(..length).collect())
        })
        .await
    }

    /// Runs `sql` as a simple query. An error that the server answers with is in the outcome.
    ///
    /// # Errors
    ///
    /// As [`Wire::recv_until_ready`].
    pub async fn query(&mut self, sql: &str) -> Result<Outcome, WireError> {
        self.send(&build::query(sql)).await?;
        self.outcome().await
    }

    /// Runs `sql` through the unnamed statement and portal, everything in text format, in one
    /// write that ends with `Sync`.
    ///
    /// # Errors
    ///
    /// As [`Wire::recv_until_ready`].
    pub async fn extended(&mut self, sql: &str, parameters: &[Option<&str>]) -> Result<Outcome, WireError> {
        let parameters: Vec<Option<&[u8]>> = parameters.iter().map(|parameter| parameter.map(str::as_bytes)).collect();
        let bytes = [
            build::parse("", sql, &[]),
            build::bind("", "", &parameters),
            build::describe_portal(""),
            build::execute("", 0),
            build::sync(),
        ]
        .concat();
        self.send(&bytes).await?;
        self.outcome().await
    }

    /// Takes messages up to `ReadyForQuery` and sorts them.
    ///
    /// # Errors
    ///
    /// As [`Wire::recv_until_ready`].
    pub async fn outcome(&mut self) -> Result<Outcome, WireError> {
        Ok(Outcome::of(&self.recv_until_ready().await?))
    }

    /// Whether the peer has closed the connection (or does so in time): true at the end of the
    /// stream or a reset, false when a byte comes or nothing happens.
    pub async fn eof(&mut self) -> bool {
        match self.recv().await {
            Err(WireError::Closed { .. }) => self.buffer.is_empty(),
            Err(WireError::Io { .. }) => true,
            _ => false,
        }
    }

    /// Says goodbye and closes.
    ///
    /// # Errors
    ///
    /// [`WireError::Io`].
    pub async fn terminate(mut self) -> Result<(), WireError> {
        self.send(&build::terminate()).await?;
        Ok(self.stream.shutdown().await?)
    }

    /// Closes our direction; the peer's stays open.
    ///
    /// # Errors
    ///
    /// [`WireError::Io`].
    pub async fn shutdown(&mut self) -> Result<(), WireError> {
        Ok(self.stream.shutdown().await?)
    }

    /// Vanishes with a TCP reset.
    ///
    /// # Errors
    ///
    /// [`WireError::Io`].
    pub fn abort(self) -> Result<(), WireError> {
        Ok(self.stream.set_zero_linger()?)
    }

    /// The socket, for a test that needs more.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

impl Outcome {
    /// Sorts the messages of an answer.
    #[must_use]
    pub fn of(messages: &[Message]) -> Self {
        let mut outcome = Self::default();
        for message in messages {
            match message.tag {
                b'D' => outcome.rows.extend(message.text_columns()),
                b'C' => outcome.tags.extend(message.command_tag()),
                b'E' => outcome.error = message.server_error(),
                b'N' => outcome.notices.extend(message.server_error()),
                b'Z' => outcome.status = message.ready_status().unwrap_or(0),
                _ => {}
            }
        }
        outcome
    }

    /// The first column of the first row.
    #[must_use]
    pub fn value(&self) -> Option<&str> {
        self.rows.first()?.first()?.as_deref()
    }

    /// The error's SQLSTATE; empty without an error.
    #[must_use]
    pub fn sqlstate(&self) -> &str {
        self.error.as_ref().map_or("", ServerError::sqlstate)
    }
}

/// Sends a `CancelRequest` on a connection of its own and awaits the peer's close.
///
/// # Errors
///
/// As [`Wire::connect`] and [`Wire::send`].
pub async fn cancel(address: impl ToSocketAddrs, pid: i32, secret: &[u8]) -> Result<(), WireError> {
    let mut wire = Wire::connect(address).await?;
    wire.send(&build::cancel_request(pid, secret)).await?;
    match wire.recv().await {
        Err(WireError::Closed { .. } | WireError::Io { .. }) => Ok(()),
        Err(error) => Err(error),
        Ok(message) => Err(WireError::Unexpected(format!("{message:?} to a cancel request"))),
    }
}

/// Cuts one whole message off the front.
fn cut(buffer: &mut Vec<u8>) -> Result<Option<Message>, WireError> {
    let Some((&[tag, a, b, c, d], _)) = buffer.split_first_chunk::<5>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([a, b, c, d]);
    let Some(body) = usize::try_from(length).ok().and_then(|l| l.checked_sub(4)) else {
        let start = buffer.escape_ascii().to_string();
        return Err(WireError::Unexpected(format!("length {length} in {start:?}")));
    };
    if buffer.len() < 5 + body {
        return Ok(None);
    }
    let body = buffer.drain(..5 + body).skip(5).collect();
    Ok(Some(Message { tag, body }))
}

async fn within<T>(patience: Duration, work: impl Future<Output = Result<T, WireError>>) -> Result<T, WireError> {
    match timeout(patience, work).await {
        Ok(result) => result,
        Err(_) => Err(WireError::Late { within: patience, before: Vec::new() }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

    use super::cut;

    #[test]
    fn messages_are_cut_whole() {
        let mut buffer = b"Z\0\0\0\x05IC\0\0\0".to_vec();
        let ready = cut(&mut buffer).unwrap().unwrap();
        assert_eq!(ready.ready_status(), Some(b'I'));
        assert_eq!(cut(&mut buffer).unwrap(), None);
        assert_eq!(buffer, b"C\0\0\0");
    }

    #[test]
    fn a_length_below_four_is_refused() {
        assert!(cut(&mut b"Z\0\0\0\x03".to_vec()).is_err());
    }
}

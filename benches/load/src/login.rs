//! A blocking login, for connections that are handed to the event loop afterwards and for those that are
//! opened over and over.

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::frontend;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::link::{Link, encrypt};
use crate::replies::{Broken, ReplyCounter, error_text};

/// Longest wait for any single answer during login and set-up.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The largest message a login may bring, bytes; what is larger is no login.
const LARGEST_MESSAGE: usize = 1 << 20;

/// Whom to log in as, and where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Account {
    /// The listener: Postgres itself or a pooler.
    pub addr: SocketAddr,
    /// The role.
    pub user: String,
    /// Its password, plain.
    pub password: String,
    /// The database.
    pub database: String,
    /// Whether clients use TLS.
    #[serde(default)]
    pub tls: bool,
    /// The start-up parameter `options`; empty for none.
    #[serde(default)]
    pub options: String,
}

/// A connection that has logged in and stands at `ReadyForQuery`.
#[derive(Debug)]
pub struct Session {
    reader: BufReader<Link<TcpStream>>,
    /// The process id the peer gave in `BackendKeyData`; 0 if it gave none.
    pub backend_pid: u32,
}

impl Session {
    /// Connects and logs in.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`], [`Fault::Refused`], or what makes the peer one we cannot talk to.
    ///
    /// Source: `PostgreSQL` docs, "Message Flow", "Start-up" and "SASL Authentication".
    pub fn open(account: &Account) -> Result<Self, Fault> {
        let stream = TcpStream::connect_timeout(&account.addr, ANSWER_WITHIN).map_err(Fault::io("connecting"))?;
        stream.set_nodelay(true).map_err(Fault::io("setting TCP_NODELAY"))?;
        stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(Fault::io("setting a read time-out"))?;
        let link = if account.tls { encrypt(stream)? } else { Link::Plain(stream) };
        let mut session = Self { reader: BufReader::new(link), backend_pid: 0 };
        session.send(|out| {
            let own = [("user", account.user.as_str()), ("database", &account.database)];
            let options = Some(("options", account.options.as_str())).filter(|(_, options)| !options.is_empty());
            frontend::startup_message(own.into_iter().chain(options), out)
        })?;
        session.authenticate(&account.password)?;
        loop {
            match session.receive()? {
                (b'K', body) => session.backend_pid = first_word(&body).unwrap_or_default(),
                (b'Z', _) => return Ok(session),
                _ => {}
            }
        }
    }

    /// Sends `request` and waits for its `ReadyForQuery`; returns the rows that came before it.
    ///
    /// # Errors
    ///
    /// [`Fault::Answer`] if an error came; else as [`Session::open`].
    pub fn exchange(&mut self, request: &[u8]) -> Result<u64, Fault> {
        self.reader.get_mut().write_all(request).map_err(Fault::io("sending a request"))?;
        let mut counter = ReplyCounter::default();
        let mut chunk = [0; 8192];
        while counter.ready() == 0 {
            let count = self.reader.read(&mut chunk).map_err(Fault::io("receiving an answer"))?;
            let Some(received) = chunk.get(..count).filter(|received| !received.is_empty()) else {
                return Err(Fault::Closed);
            };
            counter.feed(received)?;
        }
        if counter.errors() > 0 { Err(Fault::Answer(counter.first_error())) } else { Ok(counter.rows()) }
    }

    /// Says goodbye and closes.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if the goodbye cannot be sent.
    pub fn terminate(mut self) -> Result<(), Fault> {
        self.send(|out| {
            frontend::terminate(out);
            Ok(())
        })
    }

    /// The connection, for the event loop. Nothing received is lost: an idle peer has sent nothing after its
    /// `ReadyForQuery`.
    #[must_use]
    pub fn into_link(self) -> Link<TcpStream> {
        self.reader.into_inner()
    }

    fn authenticate(&mut self, password: &str) -> Result<(), Fault> {
        let bad = Fault::io("SCRAM");
        let mut scram = None;
        loop {
            let (tag, body) = self.receive()?;
            if tag != b'R' {
                continue;
            }
            let (code, data) = body.split_first_chunk::<4>().ok_or(Fault::Authentication(-1))?;
            match (i32::from_be_bytes(*code), &mut scram) {
                (0, _) => return Ok(()),
                (10, None) => {
                    let exchange = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
                    self.send(|out| frontend::sasl_initial_response(SCRAM_SHA_256, exchange.message(), out))?;
                    scram = Some(exchange);
                }
                (11, Some(exchange)) => {
                    exchange.update(data).map_err(&bad)?;
                    self.send(|out| frontend::sasl_response(exchange.message(), out))?;
                }
                (12, Some(exchange)) => exchange.finish(data).map_err(&bad)?,
                (other, _) => return Err(Fault::Authentication(other)),
            }
        }
    }

    fn send(&mut self, build: impl FnOnce(&mut BytesMut) -> std::io::Result<()>) -> Result<(), Fault> {
        let mut out = BytesMut::new();
        build(&mut out).map_err(Fault::io("building a message"))?;
        self.reader.get_mut().write_all(&out).map_err(Fault::io("sending a message"))
    }

    /// The next message that is no error; an error refuses the login.
    fn receive(&mut self) -> Result<(u8, Vec<u8>), Fault> {
        let mut header = [0; 5];
        self.reader.read_exact(&mut header).map_err(Fault::io("receiving a login message"))?;
        let [tag, a, b, c, d] = header;
        let length = u32::from_be_bytes([a, b, c, d]);
        let size = length.checked_sub(4).map(|size| size as usize).filter(|size| *size <= LARGEST_MESSAGE);
        let mut body = vec![0; size.ok_or(Broken { tag, length })?];
        self.reader.read_exact(&mut body).map_err(Fault::io("receiving a login message"))?;
        if tag == b'E' { Err(Fault::Refused(error_text(&body))) } else { Ok((tag, body)) }
    }
}

fn first_word(body: &[u8]) -> Option<u32> {
    body.first_chunk::<4>().map(|word| u32::from_be_bytes(*word))
}

//! A client's first packets: encryption requests, cancel requests, start-up, authentication.

mod admission;
mod announced;
mod auth;
mod doors;
mod encryption;

use std::future::poll_fn;
use std::io;
use std::rc::Rc;

use pgweir_proto::Malformed;
use pgweir_proto::encode::{self, Report};
use pgweir_proto::scanner::Scanner;
use pgweir_proto::startup::{First, MAX_STARTUP, PROTOCOL_3_2, Startup, first_len};

use super::relay::Relay;
use super::{Context, local::Failure};
use crate::backend::Start;
use crate::net::{Peer, Stream};
use crate::settings::{self, Entry, setting_name};
use crate::stats::{Reason as _, RefusalReason};

use admission::Admitted;
use auth::Guess;
pub use auth::{Lookups, Secrets, Throttle, Users};
use doors::{AtDoor, GaveWay, Progress};
pub use doors::{Doors, Room};

/// The longest message accepted before a client has logged in; bytes. Postgres' own limit.
const LOGIN_MESSAGE_MAX: u32 = 65_535;

/// The most startup parameters of one client: each costs a setting on every hand-over.
const PARAMETERS_MAX: usize = 100;

/// Why a login failed: what to tell the client (nothing, if there is no one to tell) and how to count it.
struct Refused {
    reason: Option<RefusalReason>,
    /// A whole message, or none.
    words: Vec<u8>,
    log: String,
}

impl Refused {
    fn silent() -> Self {
        Self { reason: None, words: Vec::new(), log: String::new() }
    }

    fn new(reason: RefusalReason, code: &'static str, message: &str) -> Self {
        Self::with_hint(reason, code, message, "")
    }

    fn with_hint(reason: RefusalReason, code: &'static str, message: &str, hint: &str) -> Self {
        let mut words = Vec::new();
        Report { severity: "FATAL", code, message, detail: "", hint }.error(&mut words);
        Self { reason: Some(reason), words, log: message.to_owned() }
    }

    fn body(reason: RefusalReason, body: &[u8]) -> Self {
        let mut words = Vec::new();
        encode::message(&mut words, b'E', |out| out.extend_from_slice(body));
        Self { reason: Some(reason), words, log: crate::backend::describe_error(body).1 }
    }

    fn failure(reason: RefusalReason, failure: &Failure) -> Self {
        let mut words = Vec::new();
        failure.write("FATAL", &mut words);
        Self { reason: Some(reason), words, log: failure.message.clone() }
    }
}

impl From<io::Error> for Refused {
    fn from(_: io::Error) -> Self {
        Self::silent()
    }
}

impl From<Malformed> for Refused {
    fn from(malformed: Malformed) -> Self {
        Self::new(RefusalReason::Protocol, "08P01", &malformed.to_string())
    }
}

/// Turns a client away before anything is read from it.
pub async fn turn_away(context: Rc<Context>, stream: Stream) {
    context.process.borrow_mut().clients_refused.add(RefusalReason::MaxLoginClients);
    let mut words = Vec::new();
    let message = "too many clients are logging in at once (max_login_clients)";
    Report {
        severity: "FATAL",
        code: "53300",
        message,
        detail: "",
        hint: "Try again later, or raise max_login_clients.",
    }
    .error(&mut words);
    super::aftermath::say_goodbye(context.clock.clone(), stream, words).await;
}

/// Runs a client's login. None if there is no session in the end; the client was told why.
pub async fn log_in(context: Rc<Context>, stream: Stream, peer: Peer, at_door: AtDoor) -> Option<Relay> {
    let mut door = Door {
        context: context.clone(),
        stream,
        peer,
        progress: at_door.progress(),
        input: Vec::new(),
        scanner: Scanner::new(LOGIN_MESSAGE_MAX),
    };
    let limit = context.config.client.client_login_timeout;
    let outcome = match at_door.run(context.clock.limit(limit, door.login(&at_door))).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => {
            Err(Refused::new(RefusalReason::Deadline, "08P01", "client_login_timeout: the login took too long"))
        }
        Err(GaveWay) => {
            context.process.borrow_mut().clients_refused.add(RefusalReason::MaxLoginClients);
            return None;
        }
    };
    drop(at_door);
    match outcome {
        Ok(Some(admitted)) => admitted.into_relay(door),
        Ok(None) => None,
        Err(refused) => {
            door.refuse(&refused).await;
            None
        }
    }
}

/// A client in front of the door.
struct Door {
    context: Rc<Context>,
    stream: Stream,
    /// Who is at the other end: for logs, and for what is counted by source.
    peer: Peer,
    /// Whoever has not got so far gives way first.
    progress: Progress,
    input: Vec<u8>,
    scanner: Scanner,
}

/// What a start-up message asks for.
struct Wish {
    database: String,
    user: String,
    start: Start,
    /// The settings in it; see [`settings_of`].
    settings: Result<Vec<Entry>, String>,
    /// Its protocol knows long cancel keys.
    long_key: bool,
}

impl Door {
    async fn login(&mut self, at_door: &AtDoor) -> Result<Option<Admitted>, Refused> {
        self.learn_origin().await?;
        let Some((mut wish, mut out)) = self.first_packets().await? else {
            return Ok(None);
        };
        let config = self.context.config.clone();
        if self.context.draining.get() {
            return Err(Refused::new(RefusalReason::Draining, "57P03", "the pooler is shutting down"));
        }
        if self.context.clients.get() > config.client.max_client_conn {
            let hint = "Raise max_client_conn.";
            let message = "sorry, too many clients already";
            return Err(Refused::with_hint(RefusalReason::MaxClientConn, "53300", message, hint));
        }
        let credential = self.authenticate(&mut wish, &mut out).await?;
        at_door.proved();
        encode::authentication(&mut out, 0, &[]);
        self.admit(wish, credential, out).await.map(Some)
    }

    // ---- first packets ----

    /// Reads up to the start-up message. None after a cancel request.
    async fn first_packets(&mut self) -> Result<Option<(Wish, Vec<u8>)>, Refused> {
        let direct = self.direct_tls().await?;
        let (mut asked_ssl, mut asked_gss) = (direct, direct);
        loop {
            let packet = self.first_packet().await?;
            match First::parse(packet.get(4..).unwrap_or_default()) {
                Ok(First::Ssl) if !asked_ssl => {
                    asked_ssl = true;
                    asked_gss |= self.requested_tls().await?;
                }
                Ok(First::GssEnc) if !asked_gss => {
                    asked_gss = true;
                    self.decline().await?;
                }
                Ok(First::Ssl | First::GssEnc) => {
                    let message = "the encryption request was sent twice";
                    return Err(Refused::new(RefusalReason::Protocol, "08P01", message));
                }
                Ok(First::Cancel { pid, secret }) => {
                    self.cancel(pid, secret).await;
                    return Ok(None);
                }
                Ok(First::Startup(startup)) => {
                    self.progress.named();
                    self.check_tls()?;
                    let mut out = Vec::new();
                    negotiate(&startup, &mut out);
                    return wish(&startup).map(|wish| Some((wish, out)));
                }
                Err(Malformed::Unknown { field: "StartupMessage.version", value }) => {
                    let message = format!("unsupported frontend protocol {value}: the server supports 3.0 to 3.2");
                    return Err(Refused::new(RefusalReason::Protocol, "0A000", &message));
                }
                Err(malformed) => return Err(malformed.into()),
            }
        }
    }

    async fn first_packet(&mut self) -> Result<Vec<u8>, Refused> {
        loop {
            if let Some(len) = first_len(&self.input)?
                && self.input.len() >= len
            {
                return Ok(self.input.drain(..len).collect());
            }
            self.read(MAX_STARTUP as usize).await?;
        }
    }

    /// A cancel request. Its connection is closed, without a word, when it was dealt with. A wrong secret counts; one that is
    /// right does not, and is not looked at where too many were wrong. A session that is not there, or not any more, cannot be
    /// guessed at.
    async fn cancel(&self, pid: u32, secret: &[u8]) {
        let (context, guess) = (&self.context, Guess::Session(pid));
        let source = self.peer.ip().filter(|_| context.registry.has(pid));
        let now = context.clock.now();
        if let Some(source) = source.filter(|source| context.throttle.borrow().is_over(*source, guess, now)) {
            context.process.borrow_mut().cancels_ignored += 1;
            if context.config.log.log_pooler_errors {
                tracing::warn!(peer = %self.peer, "cancel request ignored: too many wrong keys from {source}");
            }
            return;
        }
        if let Some(done) = context.registry.cancel(pid, secret) {
            return drop(done.await);
        }
        context.process.borrow_mut().cancels_unknown_key += 1;
        if let Some(source) = source {
            context.throttle.borrow_mut().failed(source, guess, now);
        }
    }

    async fn read(&mut self, most: usize) -> Result<(), Refused> {
        let mut buf = [0; 1024];
        let read = poll_fn(|cx| self.stream.poll_read(cx, &mut buf)).await?;
        if read == 0 {
            return Err(Refused::silent());
        }
        self.input.extend_from_slice(buf.get(..read).unwrap_or_default());
        // A whole packet is at most `most` long, and the client has to wait for our answer after each.
        if self.input.len() > most + buf.len() {
            return Err(Refused::new(RefusalReason::Protocol, "08P01", "too many bytes before the login is complete"));
        }
        Ok(())
    }

    async fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let taken = poll_fn(|cx| self.stream.poll_write(cx, bytes, &[])).await?;
            bytes = bytes.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    // ---- refusal ----

    async fn refuse(self, refused: &Refused) {
        if let Some(reason) = refused.reason {
            self.context.process.borrow_mut().clients_refused.add(reason);
            let peer = self.peer;
            if self.context.config.log.log_pooler_errors {
                tracing::warn!(%peer, reason = reason.as_str(), "login refused: {}", refused.log);
            }
        }
        if !refused.words.is_empty() {
            // Apart, so that not every login carries the room for it along.
            let words = refused.words.clone();
            Box::pin(super::aftermath::say_goodbye(self.context.clock.clone(), self.stream, words)).await;
        }
    }
}

/// Answers a newer minor version, or protocol options, with what is spoken here.
fn negotiate(startup: &Startup<'_>, out: &mut Vec<u8>) {
    if let Some(unknown) = startup.declined() {
        encode::negotiate_protocol_version(out, startup.version(), &unknown);
    }
}

fn wish(startup: &Startup<'_>) -> Result<Wish, Refused> {
    let text = |name: &str| match startup.get(name).map(std::str::from_utf8) {
        None => Ok(None),
        Some(Ok(text)) => Ok((!text.is_empty()).then(|| text.to_owned())),
        Some(Err(_)) => Err(Refused::from(Malformed::NotUtf8 { field: "StartupMessage.value" })),
    };
    let Some(user) = text("user")? else {
        let message = "no PostgreSQL user name specified in startup packet";
        return Err(Refused::new(RefusalReason::Protocol, "28000", message));
    };
    let database = text("database")?.unwrap_or_else(|| user.clone());
    let mut start = Start::default();
    for (name, value) in startup.params() {
        match name {
            b"user" | b"database" => {}
            b"replication" if matches!(value, b"false" | b"off" | b"no" | b"0") => {}
            b"replication" => {
                let hint = "Connect to the server directly for replication.";
                let message = "replication connections do not go through the pooler";
                return Err(Refused::with_hint(RefusalReason::Protocol, "0A000", message, hint));
            }
            b"options" => start.options = value.into(),
            name if name.starts_with(b"_pq_.") => {}
            name => start.parameters.push((name.into(), value.into())),
        }
    }
    let settings = settings_of(&start);
    if settings.as_ref().map_or(start.parameters.len(), Vec::len) > PARAMETERS_MAX {
        let message = format!("more than {PARAMETERS_MAX} startup parameters");
        return Err(Refused::new(RefusalReason::Protocol, "08P01", &message));
    }
    Ok(Wish { database, user, start, settings, long_key: startup.version() >= PROTOCOL_3_2 })
}

/// The settings that start-up parameters give values; of equal names the last wins: what has a name of its own comes behind
/// `options`, wherever that stands. If these hold something else, or nothing that can be read, that word of them.
fn settings_of(start: &Start) -> Result<Vec<Entry>, String> {
    let mut settings = settings::parse_options(&start.options)?;
    settings.extend(start.parameters.iter().map(|(name, value)| (setting_name(name).into(), value.clone())));
    // Postgres takes it from a running session alone, and would take ours for one.
    settings.retain(|(name, _)| **name != *settings::SEED);
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_their_own_come_behind_options_and_what_is_no_setting_is_told_apart() {
        let start = |options: &str, parameters: &[(&str, &str)]| Start {
            options: options.as_bytes().into(),
            parameters: parameters.iter().map(|(n, v)| (n.as_bytes().into(), v.as_bytes().into())).collect(),
            ..Start::default()
        };
        #[rustfmt::skip]
        let table = [
            (start("", &[]),                                              Some("")),
            (start("-c A=1 -c b-c=2", &[("A", "3"), ("Seed", "1")]),      Some("a=1 b_c=2 a=3")),
            (start("-e", &[("a", "3")]),                                  None),
            (start("-c a", &[]),                                          None),
        ];
        for (start, want) in table {
            let got = settings_of(&start).map(|settings| {
                let words = settings.iter().map(|(name, value)| format!("{name}={}", value.escape_ascii()));
                words.collect::<Vec<_>>().join(" ")
            });
            assert_eq!(got.as_deref().ok(), want);
        }
    }
}

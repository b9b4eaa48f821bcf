//! A client's first packets: encryption requests, cancel requests, start-up, authentication.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::Poll;

use pgweir_config::{AuthType, Config, PoolMode};
use pgweir_proto::Malformed;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode::{self, Report};
use pgweir_proto::frontend;
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};
use pgweir_proto::scram::{ChannelBinding, MECHANISM, ScramError, ServerExchange, Verifier};
use pgweir_proto::startup::{First, MAX_STARTUP, PROTOCOL_3_0, Startup, first_len};

use super::end::refused;
use super::relay::Relay;
use super::{Context, local::Failure};
use crate::backend::{ServerConn, SettleError};
use crate::cancel;
use crate::net::Stream;
use crate::pool::{Learned, Pool, Refusal};
use crate::route::is_verifier;
use crate::settings::{self, Entry, Profile, setting_name};
use crate::stats::{DiscardReason, Reason as _, RefusalReason};

/// The longest message accepted before a client has logged in; bytes. Postgres' own limit.
const LOGIN_MESSAGE_MAX: u32 = 65_535;

/// The most startup parameters of one client: each costs a setting on every hand-over.
const PARAMETERS_MAX: usize = 100;

/// What clients prove themselves by.
#[derive(Debug)]
pub struct Secrets {
    verifiers: BTreeMap<String, Verifier>,
    /// Makes the salt of users that do not exist.
    mock: [u8; 32],
    iterations: u32,
}

impl Secrets {
    /// Derives a verifier for every configured user. Takes half a millisecond for each with a plain password.
    ///
    /// # Errors
    ///
    /// The system gives no random bytes.
    pub fn derive(config: &Config) -> io::Result<Self> {
        let random = |_| io::Error::other("the system gives no random bytes");
        let mut mock = [0; 32];
        getrandom::fill(&mut mock).map_err(random)?;
        let iterations = config.auth.scram_iterations;
        let mut verifiers = BTreeMap::new();
        for (name, user) in &config.users {
            let Some(password) = &user.password else { continue };
            let password = password.expose();
            let verifier = if is_verifier(password) {
                Verifier::parse(password)
                    .map_err(|error| io::Error::other(format!("[users.{name}] password: {error}")))?
            } else {
                let mut salt = [0; 16];
                getrandom::fill(&mut salt).map_err(random)?;
                Verifier::derive(password.as_bytes(), &salt, iterations)
            };
            verifiers.insert(name.clone(), verifier);
        }
        Ok(Self { verifiers, mock, iterations })
    }

    /// The user's verifier, or one that nothing matches.
    fn verifier(&self, user: &str) -> Verifier {
        match self.verifiers.get(user) {
            Some(verifier) => verifier.clone(),
            None => Verifier::mock(&self.mock, user.as_bytes(), self.iterations),
        }
    }
}

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

/// A server connection lent for a moment of a login. A login may end at any await: then it is closed.
struct Loan {
    pool: Rc<Pool>,
    conn: Option<Box<ServerConn>>,
}

impl Loan {
    fn conn(&mut self) -> Result<&mut ServerConn, SettleError> {
        self.conn.as_deref_mut().ok_or(SettleError)
    }

    fn take(&mut self) -> Option<Box<ServerConn>> {
        self.conn.take()
    }

    fn release(mut self) {
        if let Some(conn) = self.conn.take() {
            self.pool.release(conn);
        }
    }

    fn discard(mut self, reason: DiscardReason) {
        if let Some(conn) = self.conn.take() {
            self.pool.discard_lent(conn, reason);
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            self.pool.discard_lent(conn, DiscardReason::Lost);
        }
    }
}

/// Counts a client that logs in, for as long as it does.
struct LoggingIn(Rc<Context>);

impl LoggingIn {
    fn enter(context: &Rc<Context>) -> Self {
        context.logging_in.set(context.logging_in.get() + 1);
        Self(context.clone())
    }
}

impl Drop for LoggingIn {
    fn drop(&mut self) {
        self.0.logging_in.set(self.0.logging_in.get().saturating_sub(1));
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
pub async fn log_in(context: Rc<Context>, stream: Stream) -> Option<Relay> {
    let guard = LoggingIn::enter(&context);
    let mut door =
        Door { context: context.clone(), stream, input: Vec::new(), scanner: Scanner::new(LOGIN_MESSAGE_MAX) };
    let limit = context.config.client.client_login_timeout;
    let outcome = match context.clock.limit(limit, door.login()).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Refused::new(RefusalReason::Deadline, "08P01", "client_login_timeout: the login took too long")),
    };
    drop(guard);
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
    input: Vec<u8>,
    scanner: Scanner,
}

/// A client let in.
///
/// Dropped on the way, it gives back what it got.
struct Admitted {
    context: Rc<Context>,
    pool: Rc<Pool>,
    profile: Rc<Profile>,
    /// Its place among the sessions, until a relay has it.
    entry: Option<Rc<cancel::Entry>>,
    /// In session mode: its server connection.
    conn: Option<Box<ServerConn>>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.context.registry.leave(&entry);
        }
        if let Some(conn) = self.conn.take() {
            self.pool.discard_lent(conn, DiscardReason::Lost);
        }
    }
}

impl Admitted {
    fn into_relay(mut self, door: Door) -> Option<Relay> {
        let entry = self.entry.take()?;
        door.context.process.borrow_mut().sessions += 1;
        self.pool.stats.borrow_mut().client_logins += 1;
        if door.context.config.log.log_connections {
            let name = &self.pool.name;
            tracing::info!(
                client = entry.pid, peer = %door.stream.peer(), database = %name.database, user = %name.user,
                "client logged in"
            );
        }
        let conn = self.conn.take();
        let (pool, profile) = (self.pool.clone(), self.profile.clone());
        Some(Relay::new(door.context, entry, pool, door.stream, profile, conn, door.input))
    }
}

/// What a start-up message asks for.
struct Wish {
    database: String,
    user: String,
    settings: Vec<Entry>,
}

impl Door {
    async fn login(&mut self) -> Result<Option<Admitted>, Refused> {
        let Some((wish, mut out)) = self.first_packets().await? else {
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
        match config.auth.auth_type {
            AuthType::Trust => {}
            AuthType::ScramSha256 => self.scram(&wish.user, &mut out).await?,
        }
        encode::authentication(&mut out, 0, &[]);
        self.admit(wish, out).await.map(Some)
    }

    // ---- first packets ----

    /// Reads up to the start-up message. None after a cancel request.
    async fn first_packets(&mut self) -> Result<Option<(Wish, Vec<u8>)>, Refused> {
        let (mut asked_ssl, mut asked_gss) = (false, false);
        loop {
            let packet = self.first_packet().await?;
            match First::parse(packet.get(4..).unwrap_or_default()) {
                Ok(First::Ssl) if !asked_ssl => {
                    asked_ssl = true;
                    self.decline().await?;
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
                    let mut out = Vec::new();
                    negotiate(&startup, &mut out);
                    return wish(&startup).map(|wish| Some((wish, out)));
                }
                Err(Malformed::Unknown { field: "StartupMessage.version", value }) => {
                    let message = format!("unsupported frontend protocol {value}: the server supports 3.0");
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

    /// No encryption here. Bytes that were sent behind the request are an attack or a defect.
    async fn decline(&mut self) -> Result<(), Refused> {
        if !self.input.is_empty() {
            let message = "received unencrypted data after an encryption request";
            return Err(Refused::new(RefusalReason::Protocol, "08P01", message));
        }
        Ok(self.write(b"N").await?)
    }

    /// A cancel request. Its connection is closed, without a word, when it was dealt with.
    async fn cancel(&self, pid: u32, secret: &[u8]) {
        match self.context.registry.cancel(pid, secret) {
            Some(done) => drop(done.await),
            None => self.context.process.borrow_mut().cancels_unknown_key += 1,
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

    // ---- authentication ----

    /// The body of the next `p` message.
    async fn password_message(&mut self) -> Result<Vec<u8>, Refused> {
        loop {
            if let Scanned::Whole { tag, body } = self.scanner.next(&self.input)? {
                if tag != frontend::Tag::Password as u8 {
                    let message = format!("expected password response, got message type {tag}");
                    return Err(Refused::new(RefusalReason::Protocol, "08P01", &message));
                }
                let body = body.to_vec();
                self.input.drain(..HEADER + body.len());
                return Ok(body);
            }
            self.read(LOGIN_MESSAGE_MAX as usize + HEADER).await?;
        }
    }

    /// SCRAM-SHA-256. `out` goes in front of the first request, and holds what goes in front of `AuthenticationOk`.
    async fn scram(&mut self, user: &str, out: &mut Vec<u8>) -> Result<(), Refused> {
        let mut nonce = [0; pgweir_proto::scram::NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|_| io::Error::other("the system gives no random bytes"))?;
        let verifier = self.context.secrets.verifier(user);
        let mut exchange = ServerExchange::new(verifier, nonce, ChannelBinding::Unavailable);

        encode::authentication(out, 10, &[MECHANISM.as_bytes(), b"\0\0"].concat());
        self.write(out).await?;
        out.clear();
        let body = self.password_message().await?;
        let (mechanism, first) = frontend::sasl_initial(&body)?;
        if mechanism != MECHANISM.as_bytes() {
            let message = "client selected an invalid SASL authentication mechanism";
            return Err(Refused::new(RefusalReason::Protocol, "08P01", message));
        }
        let late;
        let first = if let Some(first) = first {
            first
        } else {
            encode::authentication(out, 11, &[]);
            self.write(out).await?;
            out.clear();
            late = self.password_message().await?;
            &late
        };
        let reply = exchange.client_first(first).map_err(|error| scram_refused(user, error))?;
        encode::authentication(out, 11, &reply);
        self.write(out).await?;
        out.clear();
        let proof = self.password_message().await?;
        let proven = exchange.client_final(&proof).map_err(|error| scram_refused(user, error))?;
        encode::authentication(out, 12, &proven.server_final);
        Ok(())
    }

    // ---- admission ----

    async fn admit(&mut self, wish: Wish, mut out: Vec<u8>) -> Result<Admitted, Refused> {
        let pool = self.context.router.pool(&wish.database, &wish.user).map_err(|_| {
            let message = format!("database \"{}\" does not exist", wish.database);
            Refused::new(RefusalReason::UnknownDatabase, "3D000", &message)
        })?;
        let (learned, first) = match pool.learned() {
            Some(learned) => (learned, false),
            None => (self.learn(&pool).await?, true),
        };
        let wanted = wish.settings.into_iter().filter(|entry| !is_default(&learned, entry));
        let profile = pool.profiles.intern(wanted);
        if profile.reported().is_none() {
            self.prove(&pool, &profile).await?;
        }
        parameters(&learned, &profile, &mut out);
        let conn = match pool.limits.mode {
            PoolMode::Session => Some(self.keep(&pool, &profile).await?),
            PoolMode::Transaction | PoolMode::Statement => None,
        };
        let real_pid = conn.as_ref().map(|conn| conn.pid);
        let entry = self.context.registry.enter(real_pid, self.context.clock.now());
        encode::backend_key_data(&mut out, entry.pid, &entry.secret());
        if first {
            for notice in &learned.notices {
                encode::message(&mut out, b'N', |out| out.extend_from_slice(notice));
            }
        }
        let notify = &self.context.config.client.login_notify_message;
        if !notify.is_empty() {
            Report { severity: "NOTICE", code: "00000", message: notify, detail: "", hint: "" }.notice(&mut out);
        }
        encode::ready_for_query(&mut out, TxStatus::Idle);
        let admitted = Admitted { context: self.context.clone(), pool, profile, entry: Some(entry), conn };
        self.write(&out).await?;
        Ok(admitted)
    }

    /// The first login of a pool: what the server says of itself is learnt from a server connection.
    async fn learn(&self, pool: &Rc<Pool>) -> Result<Rc<Learned>, Refused> {
        self.lease(pool).await?.release();
        pool.learned()
            .ok_or_else(|| Refused::new(RefusalReason::Protocol, "XX000", "the server told nothing of itself"))
    }

    async fn lease(&self, pool: &Rc<Pool>) -> Result<Loan, Refused> {
        let plain = pool.profiles.plain();
        if let Some(conn) = poll_fn(|cx| Poll::Ready(pool.try_lease(&plain, cx))).await {
            return Ok(Loan { pool: pool.clone(), conn: Some(conn) });
        }
        let mut ticket = None;
        let granted = poll_fn(|cx| ticket.get_or_insert_with(|| pool.wait(cx)).poll(cx)).await;
        let granted = granted.map(|conn| Loan { pool: pool.clone(), conn: Some(conn) });
        granted.map_err(|refusal| match &refusal {
            Refusal::Hopeless { body: Some(body), .. } => Refused::body(RefusalReason::AuthFailed, body),
            refusal => Refused::failure(RefusalReason::Deadline, &refused(refusal)),
        })
    }

    /// Session mode: the server connection that the client has from now on, with its settings.
    async fn keep(&self, pool: &Rc<Pool>, profile: &Rc<Profile>) -> Result<Box<ServerConn>, Refused> {
        let mut loan = self.lease(pool).await?;
        let limit = self.context.config.pool.server_connect_timeout;
        let outcome = self.context.clock.limit(limit, async { loan.conn()?.apply(profile).await });
        match outcome.await {
            Ok(Ok(Ok(_))) => loan.take().ok_or_else(lost),
            Ok(Ok(Err(body))) => {
                // Half of them may be applied.
                loan.discard(DiscardReason::Dirty);
                Err(Refused::body(RefusalReason::Protocol, &fatal(&body)))
            }
            Ok(Err(_)) | Err(_) => Err(lost()),
        }
    }

    /// Settings that no client had before: applied once, so that the server itself accepts or refuses them, and
    /// tells how it spells them.
    async fn prove(&self, pool: &Rc<Pool>, profile: &Rc<Profile>) -> Result<(), Refused> {
        let mut loan = self.lease(pool).await?;
        let limit = self.context.config.pool.server_connect_timeout;
        let plain = pool.profiles.plain();
        let outcome = self.context.clock.limit(limit, async {
            let conn = loan.conn()?;
            conn.apply(&plain).await?.map_err(|_| SettleError)?;
            conn.apply(profile).await
        });
        match outcome.await {
            Ok(Ok(Ok(reported))) => {
                profile.prove(reported);
                loan.release();
                Ok(())
            }
            Ok(Ok(Err(body))) => {
                // Half of them may be applied.
                loan.discard(DiscardReason::Dirty);
                Err(Refused::body(RefusalReason::Protocol, &fatal(&body)))
            }
            Ok(Err(_)) | Err(_) => Err(lost()),
        }
    }

    // ---- refusal ----

    async fn refuse(self, refused: &Refused) {
        if let Some(reason) = refused.reason {
            self.context.process.borrow_mut().clients_refused.add(reason);
            let peer = self.stream.peer();
            if self.context.config.log.log_pooler_errors {
                tracing::warn!(%peer, reason = reason.as_str(), "login refused: {}", refused.log);
            }
        }
        if !refused.words.is_empty() {
            super::aftermath::say_goodbye(self.context.clock.clone(), self.stream, refused.words.clone()).await;
        }
    }
}

/// The `ParameterStatus`es of a fresh server connection, with the client's own settings in them.
fn parameters(learned: &Learned, profile: &Profile, out: &mut Vec<u8>) {
    let reported = profile.reported().unwrap_or_else(|| Rc::from([]));
    let same = |a: &str, b: &str| a.eq_ignore_ascii_case(b);
    for (name, value) in &learned.parameters {
        let own = reported.iter().find(|(own, _)| same(own, name));
        encode::parameter_status(out, name.as_bytes(), own.map_or(value, |(_, value)| value));
    }
}

/// Answers a newer minor version, or protocol options, with what is spoken here.
fn negotiate(startup: &Startup<'_>, out: &mut Vec<u8>) {
    let unknown: Vec<&[u8]> =
        startup.params().map(|(name, _)| name).filter(|name| name.starts_with(b"_pq_.")).collect();
    if startup.minor > 0 || !unknown.is_empty() {
        encode::negotiate_protocol_version(out, PROTOCOL_3_0, &unknown);
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
    let mut settings = Vec::new();
    for (name, value) in startup.params() {
        match name {
            b"user" | b"database" => {}
            b"replication" if matches!(value, b"false" | b"off" | b"no" | b"0") => {}
            b"replication" => {
                let hint = "Connect to the server directly for replication.";
                let message = "replication connections do not go through the pooler";
                return Err(Refused::with_hint(RefusalReason::Protocol, "0A000", message, hint));
            }
            b"options" => settings.extend(settings::parse_options(value).map_err(|argument| {
                let message = format!("invalid command-line argument for server process: {argument}");
                Refused::new(RefusalReason::Protocol, "42601", &message)
            })?),
            name if name.starts_with(b"_pq_.") => {}
            name => settings.push((setting_name(name).into(), value.into())),
        }
    }
    if settings.len() > PARAMETERS_MAX {
        let message = format!("more than {PARAMETERS_MAX} startup parameters");
        return Err(Refused::new(RefusalReason::Protocol, "08P01", &message));
    }
    Ok(Wish { database, user, settings })
}

fn lost() -> Refused {
    let message = "the server connection was lost while the start-up parameters were applied";
    Refused::new(RefusalReason::Protocol, "08006", message)
}

/// Whether a fresh server connection has this value anyway.
fn is_default(learned: &Learned, (name, value): &Entry) -> bool {
    learned.parameters.iter().any(|(known, default)| known.eq_ignore_ascii_case(name) && default == value)
}

fn scram_refused(user: &str, error: ScramError) -> Refused {
    match error {
        ScramError::WrongProof => {
            let message = format!("password authentication failed for user \"{user}\"");
            Refused::new(RefusalReason::AuthFailed, "28P01", &message)
        }
        ScramError::Unsupported { .. } => Refused::new(RefusalReason::Protocol, "0A000", &error.to_string()),
        ScramError::Downgrade | ScramError::BindingMismatch => {
            Refused::new(RefusalReason::AuthFailed, "28000", &error.to_string())
        }
        error => Refused::new(RefusalReason::Protocol, "08P01", &format!("malformed SCRAM message: {error}")),
    }
}

/// The same error, but one that ends the connection: as Postgres words it for a startup parameter.
fn fatal(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len());
    let mut rest = body;
    while let Some((kind, tail)) = rest.split_first().filter(|(kind, _)| **kind != 0) {
        let end = memchr::memchr(0, tail).unwrap_or(tail.len());
        let (value, tail) = tail.split_at(end);
        out.push(*kind);
        out.extend_from_slice(if matches!(kind, b'S' | b'V') { b"FATAL" } else { value });
        out.push(0);
        rest = tail.get(1..).unwrap_or_default();
    }
    out.push(0);
    out
}

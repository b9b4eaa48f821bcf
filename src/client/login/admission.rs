//! Admission of a client that has proven who it is: its pool, its settings, what it is greeted with.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use pgweir_config::PoolMode;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode::{self, Report};

use super::{Door, Refused, Wish, settings_of};
use crate::backend::{Applied, Credential, DialError, ServerConn, SettleError, Start, describe_error};
use crate::cancel;
use crate::client::Context;
use crate::client::end::{pin_limit, refused};
use crate::client::relay::Relay;
use crate::net::Peer;
use crate::pool::{Learned, Own, PinnedPlace, Pool, Refusal};
use crate::route::NoPool;
use crate::settings::{self, ENCODING, Entry, Profile, setting_name};
use crate::stats::{DiscardReason, PinReason, RefusalReason};

/// How long a client that asks for one more pinned server connection than there may be waits for another to leave: it may be the
/// one that it has just left itself. And how often it looks.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A server connection lent for a moment of a login. A login may end at any await: then it is closed.
pub(super) struct Loan {
    pool: Rc<Pool>,
    conn: Option<Box<ServerConn>>,
}

impl Loan {
    pub(super) fn conn(&mut self) -> Result<&mut ServerConn, SettleError> {
        self.conn.as_deref_mut().ok_or(SettleError)
    }

    fn take(&mut self) -> Option<Box<ServerConn>> {
        self.conn.take()
    }

    pub(super) fn release(mut self) {
        if let Some(conn) = self.conn.take() {
            self.pool.release(conn);
        }
    }

    pub(super) fn discard(mut self, reason: DiscardReason) {
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

/// A client let in.
///
/// Dropped on the way, it gives back what it got.
pub(super) struct Admitted {
    context: Rc<Context>,
    pool: Rc<Pool>,
    profile: Rc<Profile>,
    /// Its place among the sessions, until a relay has it.
    entry: Option<Rc<cancel::Entry>>,
    /// In session mode: its server connection.
    conn: Option<Box<ServerConn>>,
    /// The one that was opened for it alone.
    own: Option<Own>,
}

/// What a client's start-up parameters come to.
enum Terms {
    /// Settings, for whatever server connection it has.
    Shared(Rc<Profile>),
    /// A server connection that was opened with them.
    Own(Own),
}

impl Terms {
    fn profile(&self, pool: &Pool) -> Rc<Profile> {
        match self {
            Self::Shared(profile) => profile.clone(),
            // The server itself has the rest for its session's own.
            Self::Own(_) => pool.profiles.plain(),
        }
    }

    /// What the client is greeted with in front of its key: what a fresh session of its own would be.
    fn greet(&self, learned: &Learned, out: &mut Vec<u8>) {
        match self {
            Self::Shared(profile) => {
                notices(&profile.notices(), out);
                parameters(learned, profile, out);
            }
            Self::Own(own) => {
                for (name, value) in &own.parameters {
                    encode::parameter_status(out, name.as_bytes(), value);
                }
            }
        }
    }

    fn notices<'a>(&'a self, learned: &'a Learned) -> &'a [Box<[u8]>] {
        match self {
            Self::Shared(_) => &learned.notices,
            Self::Own(own) => &own.notices,
        }
    }

    fn into_own(self) -> Option<Own> {
        match self {
            Self::Shared(_) => None,
            Self::Own(own) => Some(own),
        }
    }
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
    pub(super) fn into_relay(mut self, door: Door) -> Option<Relay> {
        let entry = self.entry.take()?;
        door.context.process.borrow_mut().sessions += 1;
        self.pool.stats.borrow_mut().client_logins += 1;
        if door.context.config.log.log_connections {
            let name = &self.pool.name;
            tracing::info!(
                client = entry.pid, peer = %door.peer, database = %name.database, user = %name.user,
                tls = door.stream.tls().map(tracing::field::display),
                "client logged in"
            );
        }
        if let Peer::Tcp(address) = door.peer
            && door.context.config.listen.proxy_protocol
        {
            door.context.registry.note_origin(&entry, address);
        }
        let own = self.own.take().and_then(Own::into_conn);
        if own.is_some() && self.pool.limits.mode != PoolMode::Session {
            self.pool.stats.borrow_mut().pins.add(PinReason::Startup);
            tracing::debug!(client = entry.pid, reason = "startup", "server connection pinned");
        }
        let conn = own.or_else(|| self.conn.take());
        let (pool, profile) = (self.pool.clone(), self.profile.clone());
        Some(Relay::new(door.context, entry, pool, door.stream, profile, conn, door.input))
    }
}

impl Door {
    pub(super) async fn admit(
        &mut self,
        wish: Wish,
        credential: Credential,
        mut out: Vec<u8>,
    ) -> Result<Admitted, Refused> {
        let entered = self.context.router.enter(&wish.database, &wish.user, credential).await;
        let pool = entered.map_err(|why| no_pool(why, &wish.database))?;
        let learned = match pool.learned() {
            Some(learned) => learned,
            None => self.learn(&pool).await?,
        };
        let terms = self.agree(&pool, &learned, wish.start, wish.settings).await?;
        let profile = terms.profile(&pool);
        terms.greet(&learned, &mut out);
        let conn = match (&terms, pool.limits.mode) {
            (Terms::Shared(_), PoolMode::Session) => Some(self.keep(&pool, &profile).await?),
            _ => None,
        };
        let real_pid = match &terms {
            Terms::Shared(_) => conn.as_ref().map(|conn| conn.pid),
            Terms::Own(own) => own.pid(),
        };
        let (times, now) = (pool.limits.times.clone(), self.context.clock.moment());
        let entry = self.context.registry.enter(real_pid, wish.long_key, times, now);
        encode::backend_key_data(&mut out, entry.pid, &self.context.registry.secret(&entry));
        notices(terms.notices(&learned), &mut out);
        let notify = &self.context.config.client.login_notify_message;
        if !notify.is_empty() {
            Report { severity: "NOTICE", code: "00000", message: notify, detail: "", hint: "" }.notice(&mut out);
        }
        encode::ready_for_query(&mut out, TxStatus::Idle);
        let own = terms.into_own();
        let admitted = Admitted { context: self.context.clone(), pool, profile, entry: Some(entry), conn, own };
        self.write(&out).await?;
        Ok(admitted)
    }

    /// Finds out what the server makes of a client's start-up parameters: settings that it takes on any server connection are
    /// shared; for the rest one is opened with the parameters as they came. Then they are the session's own, or what is said
    /// against them is what a client of the server itself is told.
    ///
    /// Not where logins are the fleet's to allow: what is closed to make room may be another's by the time of the login.
    async fn agree(
        &self,
        pool: &Rc<Pool>,
        learned: &Learned,
        mut start: Start,
        settings: Result<Vec<Entry>, String>,
    ) -> Result<Terms, Refused> {
        if settings::may_delay(&start.options, &start.parameters, settings.as_deref().ok()) {
            let message = "post_auth_delay among the start-up parameters is to be 0";
            return Err(Refused::new(RefusalReason::Protocol, "22023", message));
        }
        let may_own = !pool.is_budgeted();
        let (mut profile, mut is_of_the_start) = (pool.profiles.plain(), true);
        match settings {
            Ok(settings) => {
                let unheeded = settings.iter().find(|entry| !may_own && settings::is_of_no_use_later(entry));
                if let Some((name, _)) = unheeded {
                    let message = format!("parameter \"{name}\" cannot be set after connection start");
                    return Err(Refused::new(RefusalReason::Protocol, "55P02", &message));
                }
                is_of_the_start = may_own && settings.iter().any(|(name, _)| settings::is_of_the_start(name));
                // Where the operator's query sets values a reset does not lead back to those.
                let is_plain = !pool.has_connect_query();
                let adds = |entry: &Entry| !(is_plain && is_default(learned, entry));
                profile = pool.profiles.intern(settings.into_iter().filter(adds));
            }
            Err(argument) if !may_own => {
                let message = format!("invalid command-line argument for server process: {argument}");
                return Err(Refused::new(RefusalReason::Protocol, "42601", &message));
            }
            Err(_) => {}
        }
        if !is_of_the_start && profile.reported().is_some() {
            return Ok(Terms::Shared(profile));
        }
        start.names = names(&start);
        while pool.is_wary() {
            self.context.clock.sleep(LOOK_EVERY).await;
        }
        if let Some(body) = pool.turned_away(&start) {
            return Err(Refused::body(RefusalReason::Protocol, &body));
        }
        // It may be there soon, or be allowed.
        let lasts = !profile.is_risky();
        if is_of_the_start {
            let until = self.context.clock.now() + PATIENCE;
            while !pool.may_pin() {
                if self.context.clock.now() >= until {
                    return Err(full(pool));
                }
                self.context.clock.sleep(LOOK_EVERY).await;
            }
            return self.open(pool, None, start, lasts).await.map(Terms::Own);
        }
        let Some((loan, body)) = self.prove(pool, &profile).await? else { return Ok(Terms::Shared(profile)) };
        if !may_own || !pool.may_pin() {
            self.put_back(pool, loan).await;
            if may_own && describe_error(&body).0 == "55P02" {
                // The server might take it.
                return Err(full(pool));
            }
            let body = fatal(&body);
            pool.turn_away(start, &body, lasts);
            return Err(Refused::body(RefusalReason::Protocol, &body));
        }
        self.open(pool, Some(loan), start, lasts).await.map(Terms::Own)
    }

    /// Gives a server connection back that has refused settings: half of them may be applied. Whoever tries again and again costs
    /// the pool none.
    async fn put_back(&self, pool: &Pool, mut loan: Loan) {
        let limit = self.context.config.pool.server_connect_timeout;
        let plain = pool.profiles.plain();
        let outcome = self.context.clock.limit(limit, async { loan.conn()?.clear(&plain).await }).await;
        if matches!(outcome, Ok(Ok(()))) { loan.release() } else { loan.discard(DiscardReason::Dirty) }
    }

    /// Opens a server connection with the client's own parameters, in the place of the one that is lent, or else of the next.
    /// While the server has no room, the client waits as it would for any.
    async fn open(&self, pool: &Rc<Pool>, mut first: Option<Loan>, start: Start, lasts: bool) -> Result<Own, Refused> {
        let limit = pool.limits.query_wait_timeout;
        let until = if limit.is_zero() { None } else { self.context.clock.now().checked_add(limit) };
        loop {
            let place = first.as_ref().filter(|_| pool.may_open_own()).and_then(|_| pool.pinned_place());
            let (mut loan, place) = match (first.take(), place) {
                (Some(loan), Some(place)) => (loan, place),
                (first, _) => {
                    if let Some(loan) = first {
                        // Half of what the client wants may be applied.
                        loan.discard(DiscardReason::Dirty);
                    }
                    self.turn(pool, until).await?
                }
            };
            let lent = loan.take().ok_or_else(lost)?;
            match pool.open_own(lent, start.clone(), lasts, place).await {
                Ok(own) => return Ok(own),
                Err(error) if error.is_of_the_moment() => {}
                Err(DialError::Refused { code, body, .. }) => {
                    let is_auth = code.starts_with("28");
                    let reason = if is_auth { RefusalReason::AuthFailed } else { RefusalReason::Protocol };
                    return Err(Refused::body(reason, &body));
                }
                Err(error) => {
                    let message =
                        format!("no server connection with these start-up parameters: {}", error.for_client());
                    return Err(Refused::new(RefusalReason::Deadline, "08006", &message));
                }
            }
        }
    }

    /// Waits for a server connection whose place is to be another's, and for the time at which that may log in.
    async fn turn(&self, pool: &Rc<Pool>, until: Option<Instant>) -> Result<(Loan, PinnedPlace), Refused> {
        let clock = &self.context.clock;
        loop {
            while !pool.may_open_own() {
                if until.is_some_and(|until| until <= clock.now()) {
                    return Err(late(pool));
                }
                clock.sleep(LOOK_EVERY).await;
            }
            // Zero would be no limit.
            let left = |until: Instant| until.saturating_duration_since(clock.now()).max(LOOK_EVERY);
            let loan = clock.limit(until.map_or(Duration::ZERO, left), self.lease(pool)).await;
            let loan = loan.map_err(|_| late(pool))??;
            if !pool.may_open_own() {
                loan.release();
                continue;
            }
            let Some(place) = pool.pinned_place() else {
                loan.release();
                return Err(full(pool));
            };
            return Ok((loan, place));
        }
    }

    /// The first login of a pool: what the server says of itself is learnt from a server connection.
    async fn learn(&self, pool: &Rc<Pool>) -> Result<Rc<Learned>, Refused> {
        // The first one may have begun with defaults that are others now.
        for _ in 0..3 {
            self.lease(pool).await?.release();
            if let Some(learned) = pool.learned() {
                return Ok(learned);
            }
        }
        // They change all the time: what was told last is as good as what is told next.
        let last = pool.learned_last();
        last.ok_or_else(|| Refused::new(RefusalReason::Protocol, "XX000", "the server told nothing of itself"))
    }

    async fn lease(&self, pool: &Rc<Pool>) -> Result<Loan, Refused> {
        lease(pool).await.map_err(|refusal| match &refusal {
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
    /// tells how it spells them. Of what it refuses half may be applied: the server connection is returned, with the body of the
    /// error.
    async fn prove(&self, pool: &Rc<Pool>, profile: &Rc<Profile>) -> Result<Option<(Loan, Box<[u8]>)>, Refused> {
        let mut loan = self.lease(pool).await?;
        let limit = self.context.config.pool.server_connect_timeout;
        let plain = pool.profiles.plain();
        let outcome = self.context.clock.limit(limit, async {
            let conn = loan.conn()?;
            conn.apply(&plain).await?.map_err(|_| SettleError)?;
            conn.prove(profile).await
        });
        match outcome.await {
            Ok(Ok(Ok(Applied { mut reported, notices }))) => {
                // What was so anyway is not reported, and may be otherwise when the next client comes, or on another server.
                let is_missing = |name: &str| !reported.iter().any(|(known, _)| known.eq_ignore_ascii_case(name));
                let same: Vec<Entry> = pool.learned().map_or_else(Vec::new, |learned| {
                    let own = |name: &str| profile.names().any(|known| known.eq_ignore_ascii_case(name));
                    let same = learned.parameters.iter().filter(|(name, _)| own(name) && is_missing(name));
                    same.cloned().collect()
                });
                reported.extend(same);
                profile.prove(reported, notices);
                loan.release();
                Ok(None)
            }
            Ok(Ok(Err(body))) => Ok(Some((loan, body))),
            Ok(Err(_)) | Err(_) => Err(lost()),
        }
    }
}

fn no_pool(why: NoPool, database: &str) -> Refused {
    match why {
        NoPool::UnknownDatabase => {
            let message = format!("database \"{database}\" does not exist");
            Refused::new(RefusalReason::UnknownDatabase, "3D000", &message)
        }
        NoPool::NoFollower => {
            let message = format!("no follower of database \"{database}\" can serve at the moment");
            let hint = "Try again later, or set primary_reads = true.";
            Refused::with_hint(RefusalReason::NoFollower, "57P03", &message, hint)
        }
    }
}

/// A server connection of the pool, when there is one.
pub(super) async fn lease(pool: &Rc<Pool>) -> Result<Loan, Refusal> {
    let plain = pool.profiles.plain();
    if let Some(conn) = poll_fn(|cx| Poll::Ready(pool.try_lease(&plain, cx))).await {
        return Ok(Loan { pool: pool.clone(), conn: Some(conn) });
    }
    let mut ticket = None;
    let conn = poll_fn(|cx| ticket.get_or_insert_with(|| pool.wait(cx)).poll(cx)).await?;
    Ok(Loan { pool: pool.clone(), conn: Some(conn) })
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

/// Each client is told, as by a server of its own.
fn notices(bodies: &[Box<[u8]>], out: &mut Vec<u8>) {
    for body in bodies {
        encode::message(out, b'N', |out| out.extend_from_slice(body));
    }
}

/// No further server connection may be kept for one client.
fn full(pool: &Pool) -> Refused {
    Refused::failure(RefusalReason::Deadline, &pin_limit(pool.limits.max_pinned))
}

/// There was no server connection in time.
fn late(pool: &Pool) -> Refused {
    let refusal = Refusal::Timeout { limit: pool.limits.query_wait_timeout, picture: Box::new(pool.picture()) };
    Refused::failure(RefusalReason::Deadline, &refused(&refusal))
}

/// The settings that start-up parameters give values, as far as they can be read.
fn names(start: &Start) -> Vec<Box<str>> {
    settings_of(start).map_or_else(
        |_| start.parameters.iter().map(|(name, _)| setting_name(name).into()).collect(),
        |settings| settings.into_iter().map(|(name, _)| name).collect(),
    )
}

fn lost() -> Refused {
    let message = "the server connection was lost while the start-up parameters were applied";
    Refused::new(RefusalReason::Protocol, "08006", message)
}

/// Whether a fresh server connection has this value anyway, and will have it: of all values that drivers send that of the
/// encoding alone, which is hardly ever changed. Any other would be lost with the default.
fn is_default(learned: &Learned, (name, value): &Entry) -> bool {
    let mut known = learned.parameters.iter();
    **name == *ENCODING && known.any(|(known, default)| **known == **name && default == value)
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

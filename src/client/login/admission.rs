//! Admission of a client that has proven who it is: its pool, its settings, what it is greeted with.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use pgweir_config::PoolMode;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode::{self, Report};

use super::{Door, Refused, Wish};
use crate::backend::{Credential, ServerConn, SettleError};
use crate::cancel;
use crate::client::Context;
use crate::client::end::refused;
use crate::client::relay::Relay;
use crate::net::Peer;
use crate::pool::{Learned, Pool, Refusal};
use crate::route::NoPool;
use crate::settings::{Entry, Profile};
use crate::stats::{DiscardReason, RefusalReason};

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
        let conn = self.conn.take();
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
        let (times, now) = (pool.limits.times.clone(), self.context.clock.moment());
        let entry = self.context.registry.enter(real_pid, wish.long_key, times, now);
        encode::backend_key_data(&mut out, entry.pid, &self.context.registry.secret(&entry));
        // Each client is told, as by a server of its own.
        for notice in &learned.notices {
            encode::message(&mut out, b'N', |out| out.extend_from_slice(notice));
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

fn lost() -> Refused {
    let message = "the server connection was lost while the start-up parameters were applied";
    Refused::new(RefusalReason::Protocol, "08006", message)
}

/// Whether a fresh server connection has this value anyway.
fn is_default(learned: &Learned, (name, value): &Entry) -> bool {
    learned.parameters.iter().any(|(known, default)| known.eq_ignore_ascii_case(name) && default == value)
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

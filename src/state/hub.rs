//! One server connection of a pool that listens for all of its clients.
//!
//! Postgres keeps `LISTEN` with a session and tells what comes to that session alone, so a client that listens would keep a
//! server connection for itself. Here one connection of the pool, the hub's, listens to every channel that any client of the
//! pool listens to, and what it hears is handed on to those. It belongs to the pool (a database *and* a login role): it is
//! one of the connections that the pool may have, opened with the pool's own credentials, and gone when they are. A hub
//! for all roles of a database would count against one role's limits and depend on its login for all others. Who may hear
//! what is no question of the role: Postgres tells every session of a database that listens.
//!
//! # How a client's channels come to the hub
//!
//! `LISTEN` runs where the client's statements run, on the server connection lent to it, so that its effect is Postgres'
//! own: at the commit, rolled back with the transaction or savepoint, the name folded and cut, in a function or not. When
//! the transaction is over an audit reads the channels that the connection listens to. The lease goes on meanwhile, and what
//! this connection hears goes to the client as ever: nothing sent after the client's COMMIT is missed. Then
//!
//! ```text
//! Rest ──asked the hub──▶ Asked ──it listens, too──▶ Marking ──the mark came──▶ Rest, the hub's ──UNLISTEN *──▶ released
//!   │                       └──────────── refused, or lost ──────────┴──▶ pinned, as without a hub
//!   └──the hub has no connection──▶ the client's own becomes the hub's
//! ```
//!
//! The *mark* is a notification of a channel that only pgweir knows. It stands in the server's one queue of notifications:
//! the client has what comes before it from its own server connection, and what comes behind it from the hub. None is
//! missed, none comes twice, none out of order. A mark that the hub does not hear would leave the client without its channels, and
//! the order of the others unknown. So none is sent before the hub's connection listens to them: one that was a client's has that
//! client's channels at once, and the channel of the marks some queries later.
//!
//! # What a listening client does afterwards
//!
//! A statement that cannot change what it listens to, ask for it, or notify (a plain SELECT) runs anywhere. In front of
//! any other its lease begins with a `LISTEN` for each of its channels, so that UNLISTEN, DISCARD ALL and
//! `pg_listening_channels()` do what they do in Postgres, in transactions and savepoints, too; the audit behind it tells what
//! is left. Its own notifications come from there, with its own process id and in front of `ReadyForQuery`; the
//! [`Inbox`] drops the copy that comes by the other way. What other clients send may then come in another order in one case:
//! the hub is so far behind that it has not brought what was sent before the lease began when the lease's own connection
//! brings what was sent later.
//!
//! # Reads on followers
//!
//! All of this is the primary's: no follower listens or notifies. What the hub brings while a transaction runs on a follower is
//! told when it is over, as Postgres does; and the client's later reads are at least as new as what it was told. A transaction
//! that moves from a follower to the primary finds its client's channels there.
//!
//! # What can fail
//!
//! | event | what becomes of it |
//! |---|---|
//! | a client is gone | its subscriptions with it, at once |
//! | a client does not take its notifications | above [`UNTAKEN_MAX`](super::UNTAKEN_MAX) bytes its session ends with an error; above [`TOTAL_MAX`](super::TOTAL_MAX) for all clients that of the one that has left most |
//! | the hub's connection is lost | a warning to every client, another connection, with pauses up to [`LONGEST_PAUSE`], LISTEN again, a second warning that says so; what was sent in between is lost |
//! | the pool's clients are led to another server (a failover) while its old one lives on | the same, as soon as one that listens runs something there, or a follower is found to be the primary |
//! | it is silent | a question every [`PING_AFTER`] periods; no answer within [`LIMIT`] is a loss |
//! | the pool may have but one connection beside the pinned ones (its size, a limit, the fleet's budget) | there is no hub: who listens keeps its server connection |
//! | that comes about when there is a hub: all others are pinned, or there are none, and clients have waited for 5 s | it is reset and serves them; the hub's clients are ended with 57P01, so that they listen anew and the first keep their server connections |
//! | the server will not listen (it is a standby by now) | the same |
//! | a client has more channels than [`CHANNELS_MAX`](super::CHANNELS_MAX), or another encoding than the hub | it keeps its server connection; what the hub had brought before and was not told yet is lost with another encoding |
//! | a client sends UNLISTEN and LISTEN of one channel ahead of the answers | what was sent between the two is told |
//! | the last client is gone | the connection is closed |

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::Duration;

use hashbrown::HashMap;
use pgweir_proto::encode::{self, Report};

use super::inbox::{Inbox, channel, payload};
use super::subscriptions::{Id, Subscriptions, quote};
use crate::backend::{ServerConn, SettleError};
use crate::pool::{Listener, Pool};
use crate::stats::DiscardReason;

/// The longest wait for the end of a query.
const LIMIT: Duration = Duration::from_secs(10);

/// How often it is looked whether clients wait for the hub's connection, at least.
const PERIOD: Duration = Duration::from_secs(1);

/// Periods without a word after which the server is asked for one.
const PING_AFTER: u32 = 30;

/// The first pause after a loss; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause between two attempts to have a connection again.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Clients are told so when the hub's connection is lost.
const LOST: Report<'_> = Report {
    severity: "WARNING",
    code: "01000",
    message: "the server connection that listens for this client was lost: notifications may be missed",
    detail: "",
    hint: "A warning follows when there is another.",
};

/// Clients are told so when there is another.
const REPAIRED: Report<'_> = Report {
    severity: "WARNING",
    code: "01000",
    message: "there is a server connection again that listens for this client",
    detail: "Notifications that were sent in between are lost.",
    hint: "",
};

/// The hub's connection.
///
/// ```text
/// Down ──a client gives its own──▶ Up ──lost, or clients wait for it──▶ Wanted ──given, or the pool's turn──▶ Up
///   ▲                               └──the last client goes──┐             │
///   └────────────────────────────────────────────────────────┴─────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// There is none, and nobody needs one.
    Down,
    /// It is there.
    Up,
    /// There is none, and clients wait for one.
    Wanted,
}

/// The hubs of a worker, by their pools' numbers.
#[derive(Debug, Default)]
pub struct Hubs(RefCell<HashMap<u32, Weak<Hub>>>);

impl Hubs {
    /// The hub of a pool.
    #[must_use]
    pub fn of(&self, pool: &Rc<Pool>) -> Rc<Hub> {
        let mut hubs = self.0.borrow_mut();
        if let Some(hub) = hubs.get(&pool.id).and_then(Weak::upgrade) {
            return hub;
        }
        hubs.retain(|_, hub| hub.strong_count() > 0);
        let hub = Rc::new(Hub::new(pool.clone()));
        hubs.insert(pool.id, Rc::downgrade(&hub));
        hub
    }

    /// The server connections that listen: whose, which, and for how many clients.
    #[must_use]
    pub fn listeners(&self) -> Vec<(Rc<Pool>, Listener, usize)> {
        let hubs = self.0.borrow();
        let hubs = hubs.values().filter_map(Weak::upgrade);
        let of = |hub: Rc<Hub>| Some((hub.pool.clone(), hub.pool.listener()?, hub.subscriptions.borrow().clients()));
        hubs.filter_map(of).collect()
    }
}

/// The one that listens for all clients of a pool.
#[derive(Debug)]
pub struct Hub {
    pool: Rc<Pool>,
    /// The channel of the marks.
    marker: Box<[u8]>,
    subscriptions: RefCell<Subscriptions>,
    link: Cell<Link>,
    /// A client's own server connection, to be the hub's.
    given: RefCell<Option<Box<ServerConn>>>,
    waker: RefCell<Option<Waker>>,
    /// Numbers clients and marks.
    next: Cell<u64>,
    /// Clients with smaller numbers were told of the last loss.
    warned: Cell<Id>,
}

/// Why the hub gives a connection up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    /// Nobody listens any more.
    Unused,
    /// It is lost.
    Lost,
    /// Clients wait, and it is the only one.
    Needed,
    /// The server will not listen: it is a standby, say.
    Refused,
}

impl From<SettleError> for Over {
    fn from(SettleError: SettleError) -> Self {
        Self::Lost
    }
}

impl Over {
    /// How many connections in a row were given up soon, when this one `lasted` so long and so many were before it.
    fn failures(self, before: u32, lasted: Duration) -> u32 {
        match self {
            Self::Unused => 0,
            _ if lasted >= LONGEST_PAUSE => 1,
            _ => before.saturating_add(1),
        }
    }
}

/// The pause before another connection is asked for.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.min(10)).min(LONGEST_PAUSE)
}

impl Hub {
    fn new(pool: Rc<Pool>) -> Self {
        let marker = format!("pgweir_{:032x}", rand::random::<u128>());
        Self {
            pool,
            marker: marker.into_bytes().into(),
            subscriptions: RefCell::default(),
            link: Cell::new(Link::Down),
            given: RefCell::default(),
            waker: RefCell::default(),
            next: Cell::new(1),
            warned: Cell::new(0),
        }
    }

    fn number(&self) -> u64 {
        let number = self.next.get();
        self.next.set(number + 1);
        number
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// The channel of the marks.
    #[must_use]
    pub const fn marker(&self) -> &[u8] {
        &self.marker
    }

    /// A client comes.
    pub(super) fn enter(&self) -> (Id, Rc<Inbox>) {
        let id = self.number();
        let mut subscriptions = self.subscriptions.borrow_mut();
        let inbox = subscriptions.inbox();
        subscriptions.enter(id, inbox.clone());
        (id, inbox)
    }

    /// It goes.
    pub(super) fn leave<'a>(&self, id: Id, names: impl Iterator<Item = &'a [u8]>) {
        self.subscriptions.borrow_mut().leave(id, names);
        self.wake();
    }

    /// It does not listen to these any more.
    pub(super) fn unsubscribe<'a>(&self, id: Id, names: impl Iterator<Item = &'a [u8]>) {
        self.subscriptions.borrow_mut().unsubscribe(id, names);
        self.wake();
    }

    /// Whether there is a connection, which can listen to more.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.link.get() == Link::Up
    }

    /// The hub is to listen to these; [`Self::hears`] tells when it does, and the client's inbox when to ask.
    pub(super) fn ask<'a>(&self, id: Id, names: impl Iterator<Item = &'a [u8]>) {
        let mut subscriptions = self.subscriptions.borrow_mut();
        for name in names {
            subscriptions.subscribe(id, name, false);
        }
        drop(subscriptions);
        self.wake();
    }

    /// Whether it listens to these. None if it never will: there is no connection.
    pub(super) fn hears<'a>(&self, names: impl Iterator<Item = &'a [u8]>) -> Option<bool> {
        self.is_up().then(|| !self.pool.listener_leaves.get() && self.subscriptions.borrow().hears(names))
    }

    /// The pool's clients are led to another server by now: the connection is of no use.
    pub(super) fn leaves(&self) {
        self.pool.listener_leaves.set(true);
        self.wake();
    }

    /// The client will have these channels' notifications from the mark on that it sends with this number.
    pub(super) fn mark<'a>(&self, id: Id, names: impl Iterator<Item = &'a [u8]>) -> u64 {
        let number = self.number();
        self.subscriptions.borrow_mut().mark(id, number, names);
        number
    }

    /// The mark with this number will not come.
    pub(super) fn unmark(&self, number: u64) {
        self.subscriptions.borrow_mut().unmark(number);
    }

    /// A client's own server connection, which listens to `names`, becomes the hub's, if it has none.
    pub(super) fn adopt<'a>(self: &Rc<Self>, conn: Box<ServerConn>, id: Id, names: impl Iterator<Item = &'a [u8]>) {
        let mut subscriptions = self.subscriptions.borrow_mut();
        for name in names {
            subscriptions.subscribe(id, name, true);
        }
        drop(subscriptions);
        *self.given.borrow_mut() = Some(conn);
        if self.link.replace(Link::Up) == Link::Down {
            tokio::task::spawn_local(self.clone().run());
        }
        self.wake();
    }

    async fn run(self: Rc<Self>) {
        let mut failures = 0;
        while let Some(conn) = self.connection(failures).await {
            self.link.set(Link::Up);
            self.pool.listens(Some(&conn));
            let begun = self.pool.clock().now();
            tracing::info!(
                pool = %self.pool.name.database, user = %self.pool.name.user, server_pid = conn.pid,
                "this server connection listens for the pool's clients"
            );
            let mut conn = conn;
            let over = self.serve(&mut conn, failures > 0).await;
            self.link.set(Link::Wanted);
            self.subscriptions.borrow_mut().hears_marks(false);
            self.pool.listens(None);
            failures = over.failures(failures, self.pool.clock().now().saturating_duration_since(begun));
            if failures > 0 {
                tracing::warn!(
                    pool = %self.pool.name.database, user = %self.pool.name.user, server_pid = conn.pid,
                    reason = ?over,
                    clients = self.subscriptions.borrow().clients(),
                    "the server connection that listens for the pool's clients is gone"
                );
                self.subscriptions.borrow_mut().lost();
            }
            match over {
                Over::Unused => self.pool.discard_lent(conn, DiscardReason::Idle),
                Over::Lost => {
                    self.warned.set(self.next.get());
                    self.tell(&LOST, u64::MAX);
                    self.pool.discard_lent(conn, DiscardReason::Lost);
                }
                Over::Needed | Over::Refused => {
                    // They will listen anew, each on a server connection of its own, or elsewhere.
                    self.subscriptions.borrow().end();
                    self.give_back(conn).await;
                }
            }
        }
        self.link.set(Link::Down);
    }

    /// Others get the connection, as good as new.
    async fn give_back(&self, mut conn: Box<ServerConn>) {
        let pool = &self.pool;
        if matches!(pool.clock().limit(LIMIT, conn.reset("")).await, Ok(Ok(()))) {
            conn.profile = pool.profiles.plain();
            pool.release(conn);
        } else {
            pool.discard_lent(conn, DiscardReason::Dirty);
        }
    }

    /// Tells the clients with smaller numbers than `below` something.
    fn tell(&self, report: &Report<'_>, below: Id) {
        let mut message = Vec::new();
        report.notice(&mut message);
        self.subscriptions.borrow().tell(&message.into(), below);
    }

    /// The next connection: a client's, or the pool's in its turn. None when nobody needs one.
    async fn connection(&self, failures: u32) -> Option<Box<ServerConn>> {
        let pool = &self.pool;
        let mut sleep = pin!(pool.clock().sleep(pause(failures)));
        let mut ticket = None;
        poll_fn(|cx| {
            *self.waker.borrow_mut() = Some(cx.waker().clone());
            if let Some(conn) = self.given.borrow_mut().take() {
                return Poll::Ready(Some(conn));
            }
            if self.subscriptions.borrow().is_empty() {
                return Poll::Ready(None);
            }
            loop {
                let waits = match &ticket {
                    Some(ticket) => ticket,
                    None if sleep.as_mut().poll(cx).is_pending() => return Poll::Pending,
                    None => match pool.try_lease(&pool.profiles.plain(), cx) {
                        Some(conn) => return Poll::Ready(Some(conn)),
                        None => ticket.insert(pool.wait(cx)),
                    },
                };
                match waits.poll(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(conn)) => return Poll::Ready(Some(conn)),
                    Poll::Ready(Err(_)) => {
                        ticket = None;
                        sleep.set(pool.clock().sleep(LONGEST_PAUSE));
                    }
                }
            }
        })
        .await
    }

    /// Listens until there is no reason to any more. `again`: clients know that they may have missed something.
    async fn serve(&self, conn: &mut ServerConn, again: bool) -> Over {
        let Err(over) = self.listen(conn, again).await;
        over
    }

    async fn listen(&self, conn: &mut ServerConn, mut again: bool) -> Result<Infallible, Over> {
        self.prepare(conn).await?;
        self.subscriptions.borrow_mut().hears_marks(true);
        let mut quiet = 0;
        loop {
            let work = self.subscriptions.borrow_mut().work();
            if !work.is_empty() {
                self.ask_server(conn, &work.text()).await?;
                self.subscriptions.borrow_mut().confirm(&work);
                continue;
            }
            if std::mem::take(&mut again) {
                self.tell(&REPAIRED, self.warned.get());
            }
            if self.subscriptions.borrow().is_empty() {
                return Err(Over::Unused);
            }
            if self.pool.listener_leaves.get() {
                return Err(Over::Lost);
            }
            if self.pool.needs_listener() {
                // It is of use to others only if it is there.
                self.ask_server(conn, b"").await?;
                return Err(Over::Needed);
            }
            match self.pool.clock().limit(PERIOD, self.event(conn)).await {
                Ok(heard) => {
                    heard?;
                    quiet = 0;
                }
                Err(_) => quiet += 1,
            }
            if quiet >= PING_AFTER {
                quiet = 0;
                self.ask_server(conn, b"").await?;
            }
        }
    }

    /// Puts a connection into the state of one that listens: none of a client's settings, which might end it or its queries,
    /// and the channel of the marks.
    async fn prepare(&self, conn: &mut ServerConn) -> Result<(), Over> {
        let plain = self.pool.profiles.plain();
        let mut texts = Vec::new();
        conn.replay(&plain, |text| texts.push(text.to_vec()));
        conn.profile = plain;
        // It is idle for as long as nobody notifies. Older servers have no such setting.
        texts.push(
            b"SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings \
              WHERE name OPERATOR(pg_catalog.=) 'idle_session_timeout'"
                .to_vec(),
        );
        let mut listen = b"LISTEN ".to_vec();
        quote(&self.marker, &mut listen);
        texts.push(listen);
        for text in texts {
            self.ask_server(conn, &text).await?;
        }
        Ok(())
    }

    /// Runs a query, and hands on what is heard meanwhile.
    async fn ask_server(&self, conn: &mut ServerConn, text: &[u8]) -> Result<(), Over> {
        let answered = async {
            conn.say(text).await?;
            let mut well = true;
            while !conn.pipeline.is_free() {
                // Each may be many messages for many clients: these have their turn in between.
                tokio::task::yield_now().await;
                well &= poll_fn(|cx| conn.poll_hear(cx, |body| self.hear(body))).await?;
            }
            if well { Ok(()) } else { Err(Over::Refused) }
        };
        self.pool.clock().limit(LIMIT, answered).await.unwrap_or(Err(Over::Lost))
    }

    /// Waits until there is something to do, or something was heard.
    async fn event(&self, conn: &mut ServerConn) -> Result<(), SettleError> {
        tokio::task::yield_now().await;
        poll_fn(|cx| {
            *self.waker.borrow_mut() = Some(cx.waker().clone());
            if self.subscriptions.borrow().is_restless() || self.pool.listener_leaves.get() {
                return Poll::Ready(Ok(()));
            }
            conn.poll_hear(cx, |body| self.hear(body)).map_ok(drop)
        })
        .await
    }

    /// Hands a notification on.
    fn hear(&self, body: &[u8]) {
        if let Some(number) = self.mark_of(body) {
            return self.subscriptions.borrow_mut().marked(number);
        }
        let mut message = Vec::new();
        encode::message(&mut message, b'A', |out| out.extend_from_slice(body));
        self.subscriptions.borrow().dispatch(channel(body), &message.into());
    }

    /// The number of a mark, if a notification is one.
    #[must_use]
    pub(super) fn mark_of(&self, body: &[u8]) -> Option<u64> {
        let is_mark = channel(body) == self.marker();
        is_mark.then(|| std::str::from_utf8(payload(body)).ok().and_then(|number| number.parse().ok()).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_with_losses_in_a_row_and_begin_anew_after_a_connection_that_lasted() {
        let (short, long) = (Duration::from_secs(1), LONGEST_PAUSE);
        let mut failures = 0;
        let mut pauses = Vec::new();
        for lasted in [short, short, short, short, short, short, short, short, long, short] {
            failures = Over::Lost.failures(failures, lasted);
            pauses.push(pause(failures).as_millis());
        }
        assert_eq!(pauses, [200, 400, 800, 1600, 3200, 6400, 12800, 15000, 200, 400]);
        assert_eq!(Over::Needed.failures(3, short), 4);
        assert_eq!(Over::Unused.failures(3, short), 0);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}

//! One client connection: from its first packet to its goodbye.

mod aftermath;
mod ahead;
mod answer;
#[cfg(test)]
mod desk;
mod end;
mod local;
mod login;
mod plan;
mod relay;
mod request;
mod slow;
mod statements;
mod verdict;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context as Task, Poll};

use pgweir_config::Config;
use tokio::sync::Semaphore;

use crate::cancel::Registry;
use crate::catalog::{Refusals, RouteCache};
use crate::clock::{Clock, Moment};
use crate::net::tls::{Gear, Keyring};
use crate::net::{Peer, Sockets, Stream};
use crate::prepared::Interner;
use crate::route::Router;
use crate::sql;
use crate::state::Hubs;
use crate::stats::ProcessStats;

use login::log_in;
pub use login::{Doors, Lookups, Room, Secrets, Throttle, Users, turn_away};
use relay::{Active, Relay};
use slow::Slow;
pub use verdict::route;

/// Bytes read at once. Large enough that a burst of rows costs few system calls.
const READ_SIZE: usize = 64 * 1024;

/// Working parts of sessions that are kept for the next one.
const SPARE_ACTIVES: usize = 256;

/// Passwords that are stretched at once.
const STRETCHED_MAX: usize = 2;

/// What all sessions of a worker share.
#[derive(Debug)]
pub struct Context {
    /// The settings.
    pub config: Arc<Config>,
    /// The worker's clock.
    pub clock: Rc<Clock>,
    /// The pools.
    pub router: Router,
    /// The sessions.
    pub registry: Registry,
    /// Those that listen for clients.
    pub hubs: Hubs,
    /// The prepared statements.
    pub interner: Interner,
    /// What is known of the texts that clients send.
    pub scans: RefCell<sql::Cache>,
    /// What the grammar says of them.
    pub library: RefCell<sql::Library>,
    /// Where they may run; none before somebody has to know.
    pub routes: RefCell<Option<Box<RouteCache>>>,
    /// What followers refused.
    pub refusals: RefCell<Refusals>,
    /// What belongs to no pool.
    pub process: RefCell<ProcessStats>,
    /// Client connections, those that log in included.
    pub clients: Cell<u32>,
    /// Client connections that have not logged in yet.
    pub doors: Rc<Doors>,
    /// Clients turned away that have not closed yet.
    pub turning_away: Cell<u32>,
    /// No more clients, please.
    pub draining: Cell<bool>,
    /// Sessions that were ended before they were done.
    pub sessions_cut: Cell<u32>,
    /// What clients prove themselves by.
    pub secrets: Secrets,
    /// The users that servers know.
    pub lookups: Lookups,
    /// Who failed to prove himself.
    pub throttle: RefCell<Throttle>,
    /// Turns to stretch a password that is to be compared with a verifier: each takes a thread.
    pub stretching: Semaphore,
    /// What TLS needs.
    pub tls: Rc<Gear>,
    /// Statements that take long, if they are logged.
    slow: Option<Slow>,
    scratch: ScratchPad,
    actives: Actives,
}

impl Context {
    /// Nothing yet.
    #[must_use]
    pub fn new(
        config: Arc<Config>,
        secrets: Secrets,
        keyring: Arc<Keyring>,
        clock: Clock,
        sockets: Sockets,
    ) -> Rc<Self> {
        let tls = Gear::new(keyring);
        let clock = Rc::new(clock);
        Rc::new(Self {
            clock: clock.clone(),
            router: Router::new(config.clone(), clock, tls.clone(), sockets),
            registry: Registry::default(),
            hubs: Hubs::default(),
            interner: Interner::new(config.client.max_statement_memory),
            scans: RefCell::default(),
            library: RefCell::default(),
            routes: RefCell::default(),
            refusals: RefCell::default(),
            process: RefCell::default(),
            clients: Cell::new(0),
            doors: Rc::default(),
            turning_away: Cell::new(0),
            draining: Cell::new(false),
            sessions_cut: Cell::new(0),
            secrets,
            lookups: Lookups::default(),
            throttle: RefCell::new(Throttle::new(config.client.login_failure_rate, config.client.login_failure_burst)),
            stretching: Semaphore::new(STRETCHED_MAX),
            tls,
            slow: Slow::new(config.log.log_slow_statements),
            scratch: ScratchPad::default(),
            actives: Actives::default(),
            config,
        })
    }
}

/// Buffers for one poll: what is read, and what is made of it.
#[derive(Debug)]
struct Scratch {
    input: Vec<u8>,
    made: Vec<u8>,
}

/// The worker's buffers. A session has them for one poll; a panic in it costs the buffers.
#[derive(Default)]
struct ScratchPad(Cell<Option<Box<Scratch>>>);

impl std::fmt::Debug for ScratchPad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScratchPad").finish_non_exhaustive()
    }
}

impl ScratchPad {
    #[expect(clippy::unnecessary_box_returns, reason = "lending moves a pointer")]
    fn lend(&self) -> Box<Scratch> {
        self.0.take().unwrap_or_else(|| Box::new(Scratch { input: vec![0; READ_SIZE], made: Vec::new() }))
    }

    fn put_back(&self, mut scratch: Box<Scratch>) {
        if scratch.made.capacity() > 4 * READ_SIZE {
            scratch.made = Vec::new();
        }
        self.0.set(Some(scratch));
    }
}

/// Working parts for sessions at work.
#[derive(Debug, Default)]
#[expect(clippy::vec_box, reason = "lending moves a pointer")]
struct Actives(RefCell<Vec<Box<Active>>>);

impl Actives {
    fn lend(&self, now: Moment) -> Box<Active> {
        self.0.borrow_mut().pop().unwrap_or_else(|| Box::new(Active::new(now)))
    }

    fn put_back(&self, mut active: Box<Active>) {
        active.end();
        let mut spare = self.0.borrow_mut();
        if spare.len() < SPARE_ACTIVES {
            spare.push(active);
        }
    }
}

/// A client connection as one future: logging in, then relaying.
///
/// The start-up part is boxed and freed, so that a logged-in client costs only its relay.
pub struct Session {
    stage: Stage,
    context: Rc<Context>,
}

enum Stage {
    LogIn(Pin<Box<dyn Future<Output = Option<Relay>>>>),
    Relay(Relay),
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    /// A session for a connection just accepted, from `peer`.
    #[must_use]
    pub fn new(context: Rc<Context>, stream: Stream, peer: Peer) -> Self {
        // Limits are counted from now, not from the last tick; its place is taken before the next client is let in.
        context.clock.refresh();
        let at_door = context.doors.enter();
        context.clients.set(context.clients.get() + 1);
        context.process.borrow_mut().clients_accepted += 1;
        Self { stage: Stage::LogIn(Box::pin(log_in(context.clone(), stream, peer, at_door))), context }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.context.clients.set(self.context.clients.get().saturating_sub(1));
    }
}

impl Future for Session {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<()> {
        let this = &mut *self;
        loop {
            match &mut this.stage {
                Stage::Relay(relay) => return relay.poll(cx),
                Stage::LogIn(login) => match login.as_mut().poll(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Ready(Some(relay)) => this.stage = Stage::Relay(relay),
                },
            }
        }
    }
}

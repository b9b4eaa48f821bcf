//! One thread and its event loop: owns pools and sessions.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgweir_config::Config;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{mpsc, oneshot};

use crate::cancel::{Activity, Entry, Order};
use crate::client::{Context, GRACE, Room, Secrets, Session, Users, turn_away};
use crate::clock::{Clock, Pauses};
use crate::net::tls::Keyring;
use crate::net::{Acceptor, Listener};
use crate::observe::blame::HOLDERS_MAX;
use crate::observe::{Shared, Told};
use crate::stats::{PoolSnapshot, ProcessGauges, Snapshot};

/// Ticks between two publications of the statistics.
const TICKS_PER_PUBLICATION: u32 = 10;

/// Clients turned away at once that are told why.
const TOLD_WHY_MAX: u32 = 100;

/// How long server connections may take to close at the very end.
const CLOSING_LIMIT: Duration = Duration::from_secs(3);

/// What a worker is told.
#[derive(Clone, Debug)]
pub enum Command {
    /// A tenth of a second has passed.
    Tick,
    /// No new clients; end each session when its transaction is over; then end.
    Drain,
    /// End now.
    Stop,
    /// These are the users from now on.
    Users(Arc<Users>),
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Sessions that were ended in a transaction or with an answer owed.
    pub sessions_cut: u32,
}

/// A running worker.
#[derive(Debug)]
pub struct WorkerHandle {
    /// Where to send commands.
    pub commands: mpsc::UnboundedSender<Command>,
    /// Resolves when the worker has ended.
    pub finished: oneshot::Receiver<Summary>,
    /// Its thread.
    pub thread: std::thread::JoinHandle<()>,
}

/// Starts a worker that serves `listeners`.
///
/// # Errors
///
/// The thread or its event loop cannot be made, or there are no random bytes.
pub fn start(
    config: Arc<Config>,
    users: Arc<Users>,
    listeners: Vec<Listener>,
    keyring: Arc<Keyring>,
    shared: Arc<Shared>,
) -> io::Result<WorkerHandle> {
    let secrets = Secrets::new(&config, users)?;
    let (commands, orders) = mpsc::unbounded_channel();
    let (done, finished) = oneshot::channel();
    // Made by the thread that it is for.
    let (made, outcome) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("worker-0".to_owned()).spawn(move || {
        let context = move |clock| Context::new(config, secrets, keyring, clock);
        let pauses = Pauses::default();
        let runtime = match event_loop(&pauses) {
            Ok(runtime) => runtime,
            Err(error) => return drop(made.send(Err(error))),
        };
        let _ = made.send(Ok(()));
        let worker = Worker {
            context: context(Clock::new(pauses)),
            shared,
            ticks: 0,
            stage: Stage::Serving,
            inquiring: false,
            censuses: 0,
        };
        let summary = runtime.block_on(worker.run(listeners, orders));
        let summary = summary.unwrap_or_else(|error| {
            tracing::error!(%error, "the worker's event loop failed");
            Summary::default()
        });
        let _ = done.send(summary);
    })?;
    outcome.recv().map_err(|_| io::Error::other("the worker's thread ended at once"))??;
    Ok(WorkerHandle { commands, finished, thread })
}

fn event_loop(pauses: &Pauses) -> io::Result<LocalRuntime> {
    let pause = pauses.clone();
    let mut builder = Builder::new_current_thread();
    builder.enable_io().on_thread_unpark(move || pause.over()).build_local(LocalOptions::default())
}

/// ```text
/// Serving ──Drain──▶ Draining ──no client, no server left──▶ (ends)
///    └────Stop──────────┴──▶ Closing{until} ──none left, or the time is up──▶ (ends)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Serving,
    Draining,
    Closing { until: Instant },
}

struct Worker {
    context: Rc<Context>,
    shared: Arc<Shared>,
    ticks: u32,
    stage: Stage,
    /// At the last tick the sessions were asked what they hold.
    inquiring: bool,
    /// Censuses whose outcome was published.
    censuses: u64,
}

impl Worker {
    async fn run(
        mut self,
        listeners: Vec<Listener>,
        mut orders: mpsc::UnboundedReceiver<Command>,
    ) -> io::Result<Summary> {
        let mut accepting = Vec::new();
        for listener in listeners {
            let acceptor = Acceptor::new(listener, &self.context.config.listen)?;
            accepting.push(tokio::task::spawn_local(accept(self.context.clone(), acceptor)).abort_handle());
        }
        // The publication of nothing says that the worker lives.
        self.publish();
        while let Some(command) = orders.recv().await {
            match command {
                Command::Tick => self.tick(),
                Command::Users(users) => self.context.secrets.replace(users),
                Command::Drain => {
                    accepting.drain(..).for_each(|task| task.abort());
                    self.drain();
                }
                Command::Stop => {
                    accepting.drain(..).for_each(|task| task.abort());
                    self.stop();
                }
            }
            if self.is_over() {
                break;
            }
        }
        self.publish();
        Ok(Summary { sessions_cut: self.context.sessions_cut.get() })
    }

    fn tick(&mut self) {
        self.context.clock.tick();
        self.context.registry.tick();
        self.context.interner.tick();
        self.watch();
        let limits_asked = self.shared.are_limits_asked(self.context.clock.now());
        for pool in self.context.router.pools() {
            if limits_asked {
                pool.ask_limits();
            }
            pool.tick();
        }
        self.context.router.tick();
        self.tell_who_holds_what();
        self.ticks = self.ticks.wrapping_add(1);
        #[cfg(debug_assertions)]
        panic_if_told(self.ticks);
        if self.ticks.is_multiple_of(TICKS_PER_PUBLICATION) {
            self.context.registry.wake_away();
            self.context.router.sweep();
            self.publish();
        } else if limits_asked && self.censuses() != self.censuses {
            // Whoever asked need not wait for the next publication.
            self.publish();
        }
    }

    fn censuses(&self) -> u64 {
        self.context.router.pools().iter().map(|pool| pool.censuses()).sum()
    }

    /// If somebody asked, has the sessions tell what they hold, and passes it on at the next tick.
    fn tell_who_holds_what(&mut self) {
        if std::mem::take(&mut self.inquiring) {
            let blame = self.context.registry.told();
            self.shared.tell_blame(Told { at: self.context.clock.now(), blame });
        } else if self.shared.is_blame_asked() {
            self.context.registry.inquire(HOLDERS_MAX);
            self.inquiring = true;
        }
    }

    /// Sessions that do one thing for too long.
    fn watch(&self) {
        let config = &self.context.config;
        let client = &config.client;
        let limits = [
            client.client_idle_timeout,
            client.idle_transaction_timeout,
            client.query_timeout,
            client.transaction_timeout,
        ];
        let none = limits.iter().all(Duration::is_zero);
        if none || self.stage != Stage::Serving {
            return;
        }
        let now = self.context.clock.now();
        for session in self.context.registry.sessions() {
            let order = overdue(&session, now, limits);
            if order != Order::None && session.order.get() == Order::None {
                session.tell(order);
            }
        }
    }

    fn drain(&mut self) {
        if self.stage != Stage::Serving {
            return;
        }
        self.stage = Stage::Draining;
        self.context.draining.set(true);
        self.end_sessions(Order::Drain);
    }

    fn stop(&mut self) {
        self.context.draining.set(true);
        self.stage = Stage::Closing { until: self.context.clock.refresh() + CLOSING_LIMIT };
        self.end_sessions(Order::Stop);
    }

    fn end_sessions(&self, order: Order) {
        for session in self.context.registry.sessions() {
            session.tell(order);
        }
        for pool in self.context.router.pools() {
            pool.drain();
        }
    }

    fn is_over(&self) -> bool {
        let open: u32 = self.context.router.pools().iter().map(|pool| pool.open()).sum();
        let empty = open == 0 && self.context.registry.is_empty();
        match self.stage {
            Stage::Serving => false,
            // Who has not logged in by now never will.
            Stage::Draining => empty && self.context.clients.get() <= self.context.doors.taken(),
            Stage::Closing { until } => empty || self.context.clock.now() >= until,
        }
    }

    fn publish(&mut self) {
        let now = self.context.clock.refresh();
        self.censuses = self.censuses();
        let mut snapshot = Snapshot::empty(now);
        snapshot.process = self.context.process.borrow().clone();
        snapshot.process.tls = self.context.tls.stats.borrow().clone();
        for pool in self.context.router.pools() {
            snapshot.pools.push(PoolSnapshot {
                name: pool.name.clone(),
                health: pool.health(),
                stats: pool.stats.borrow().clone(),
                gauges: pool.gauges(),
                limits: pool.server_limits(),
            });
        }
        let open = |pool: &PoolSnapshot| {
            let g = &pool.gauges;
            g.servers_idle + g.servers_active + g.servers_logging_in + g.servers_closing
        };
        snapshot.gauges = ProcessGauges {
            clients: self.context.clients.get(),
            clients_logging_in: self.context.doors.taken(),
            servers: snapshot.pools.iter().map(open).sum(),
        };
        self.shared.publish(Arc::new(snapshot), now);
    }
}

/// For the test that `pgweir exec` starts another worker. Never in a release build.
#[cfg(debug_assertions)]
#[allow(clippy::panic, reason = "it is the point")]
fn panic_if_told(ticks: u32) {
    /// Two seconds.
    const TICKS: u32 = 20;
    assert!(
        ticks != TICKS || std::env::var_os("PGWEIR_TEST_PANIC").is_none_or(|what| what != "worker"),
        "told to panic by a test"
    );
}

fn overdue(session: &Entry, now: Instant, [idle, idle_in_transaction, query, transaction]: [Duration; 4]) -> Order {
    let past = |limit: Duration, since: Instant| !limit.is_zero() && now.saturating_duration_since(since) >= limit;
    let since = session.since.get();
    let begun = session.begun.get();
    match session.activity.get() {
        Activity::Idle if past(idle, since) => Order::ClientIdle,
        Activity::InTransaction if past(idle_in_transaction, since) => Order::TransactionIdle,
        Activity::Running if past(query, since) => Order::QueryLong,
        Activity::InTransaction | Activity::Running if past(transaction, begun) => Order::TransactionLong,
        _ => Order::None,
    }
}

/// Accepts clients. Dropped, it closes its listener, and removes the file of a Unix-domain socket.
/// Waits for a place at the door. False if there will be none.
async fn room(context: &Context) -> bool {
    while context.doors.taken() >= context.config.client.max_login_clients {
        match context.doors.make_room(context.clock.refresh()) {
            Room::Made => return true,
            Room::None => return false,
            // The others wait in the listener's queue meanwhile.
            Room::Soon => drop(context.clock.limit(GRACE, context.doors.freed()).await),
        }
    }
    true
}

async fn accept(context: Rc<Context>, acceptor: Acceptor) {
    loop {
        match acceptor.accept().await {
            Ok((stream, peer)) => {
                if !room(&context).await {
                    // Whoever fills this gets little of ours: a few are told why, the rest are closed.
                    if context.turning_away.get() < TOLD_WHY_MAX {
                        context.turning_away.set(context.turning_away.get() + 1);
                        let context = context.clone();
                        tokio::task::spawn_local(async move {
                            turn_away(context.clone(), stream).await;
                            context.turning_away.set(context.turning_away.get().saturating_sub(1));
                        });
                    }
                    continue;
                }
                acceptor.prepare(&stream);
                tokio::task::spawn_local(Session::new(context.clone(), stream, peer));
            }
            Err(error) => {
                // Out of descriptors, most likely: waiting for some to be closed beats spinning.
                tracing::warn!(%error, "cannot accept a client connection");
                context.clock.sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

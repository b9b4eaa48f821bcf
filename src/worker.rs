//! One thread and its event loop: owns pools and sessions.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgweir_config::Config;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{mpsc, oneshot};

use crate::cancel::{Activity, Entry, Holding, Order};
use crate::client::{Context, Room, Secrets, Session, Users, turn_away};
use crate::clock::{Clock, Moment, Pauses};
use crate::net::tls::Keyring;
use crate::net::{Acceptor, Left, Listener, Sockets};
use crate::observe::blame::HOLDERS_MAX;
use crate::observe::{Shared, Told};
use crate::pool::{self, Pool, micros};
use crate::stats::{PoolSnapshot, ProcessGauges, Snapshot, TextStats};

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
    /// The process will end before long: what clients do not need is for the rest of the fleet, if there is one.
    GiveWay,
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
    /// The system's number of it.
    pub thread_id: i32,
    /// Its connections, for who has to end them in its place: then it ends, too, should it ever heed anything again.
    pub sockets: Sockets,
}

/// Starts a worker that serves `listeners`, and counts the server connections that one before it has `left` until they end.
///
/// # Errors
///
/// The thread or its event loop cannot be made, or there are no random bytes. What is `left` stays with the caller then.
pub fn start(
    config: Arc<Config>,
    users: Arc<Users>,
    listeners: Vec<Listener>,
    keyring: Arc<Keyring>,
    shared: Arc<Shared>,
    left: &mut Vec<Left>,
) -> io::Result<WorkerHandle> {
    let sockets = Sockets::default();
    let own = sockets.clone();
    let secrets = Secrets::new(&config, users)?;
    let (commands, orders) = mpsc::unbounded_channel();
    let (done, finished) = oneshot::channel();
    // Made by the thread that it is for.
    let (made, outcome) = std::sync::mpsc::sync_channel(1);
    let (hand_over, handed) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("worker-0".to_owned()).spawn(move || {
        let list = own.clone();
        let context = move |clock| Context::new(config, secrets, keyring, clock, list);
        let pauses = Pauses::default();
        let runtime = match event_loop(&pauses) {
            Ok(runtime) => runtime,
            Err(error) => return drop(made.send(Err(error))),
        };
        let _ = made.send(Ok(nix::unistd::gettid().as_raw()));
        let Ok(left) = handed.recv() else { return };
        let worker = Worker {
            context: context(Clock::new(pauses)),
            shared,
            sockets: own,
            ticks: 0,
            stage: Stage::Serving,
            inquiring: false,
            censuses: 0,
        };
        let summary = runtime.block_on(worker.run(listeners, left, orders));
        let summary = summary.unwrap_or_else(|error| {
            tracing::error!(%error, "the worker's event loop failed");
            Summary::default()
        });
        let _ = done.send(summary);
    })?;
    let thread_id = outcome.recv().map_err(|_| io::Error::other("the worker's thread ended at once"))??;
    let _ = hand_over.send(std::mem::take(left));
    Ok(WorkerHandle { commands, finished, thread, thread_id, sockets })
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
    /// Its connections.
    sockets: Sockets,
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
        left: Vec<Left>,
        mut orders: mpsc::UnboundedReceiver<Command>,
    ) -> io::Result<Summary> {
        // Before the first client: what it wants to be dialled has to fit beside them.
        for left in left {
            self.context.router.bury(left);
        }
        let mut accepting = Vec::new();
        for listener in listeners {
            let acceptor = Acceptor::new(listener, &self.context.config.listen, self.sockets.clone())?;
            accepting.push(tokio::task::spawn_local(accept(self.context.clone(), acceptor)).abort_handle());
        }
        // The publication of nothing says that the worker lives.
        self.publish();
        while let Some(command) = orders.recv().await {
            match command {
                Command::Tick => self.tick(),
                Command::Users(users) => self.context.secrets.replace(users),
                Command::GiveWay => self.context.router.give_way(),
                Command::Drain => {
                    accepting.drain(..).for_each(|task| task.abort());
                    self.drain();
                }
                Command::Stop => {
                    accepting.drain(..).for_each(|task| task.abort());
                    self.stop();
                }
            }
            // Somebody has ended its connections in its place, and started another worker.
            if self.is_over() || self.sockets.is_cut() {
                break;
            }
        }
        self.publish();
        Ok(Summary { sessions_cut: self.context.sessions_cut.get() })
    }

    fn tick(&mut self) {
        self.shared.beat();
        self.context.clock.tick();
        self.context.doors.tick(self.context.clock.now());
        self.context.registry.tick();
        self.context.interner.tick();
        let pools = self.context.router.pools();
        self.watch(&pools);
        let limits_asked = self.shared.are_limits_asked(self.context.clock.now());
        for pool in pools {
            if limits_asked {
                pool.ask_limits();
            }
            pool.tick();
        }
        self.context.router.tick();
        self.tell_who_holds_what();
        self.ticks = self.ticks.wrapping_add(1);
        #[cfg(debug_assertions)]
        fail_if_told(self.ticks);
        if self.ticks.is_multiple_of(TICKS_PER_PUBLICATION) {
            self.context.registry.wake_away();
            self.context.router.sweep();
            self.end_unheard();
            self.publish();
        } else if limits_asked && self.censuses() != self.censuses {
            // Whoever asked need not wait for the next publication.
            self.publish();
        }
    }

    /// Loses the server connections whose servers acknowledge nothing any more.
    fn end_unheard(&self) {
        let limit = self.context.config.pool.server_ack_timeout;
        if limit.is_zero() {
            return;
        }
        for server in self.sockets.end_unheard(self.context.clock.now(), limit) {
            tracing::warn!(
                pool = %server.pool.database, user = %server.pool.user, server_pid = server.pid, limit_s = limit.as_secs_f64(),
                "server connection lost: what was sent is not acknowledged"
            );
        }
    }

    fn censuses(&self) -> u64 {
        self.context.router.pools().iter().map(|pool| pool.censuses()).sum()
    }

    /// If somebody asked, has the sessions tell what they hold, and passes it on at the next tick.
    fn tell_who_holds_what(&mut self) {
        if std::mem::take(&mut self.inquiring) {
            let mut blame = self.context.registry.told();
            blame.holdings.extend(self.listeners());
            self.shared.tell_blame(Told::new(self.context.clock.now(), blame));
        } else if self.shared.is_blame_asked() {
            self.context.registry.inquire(HOLDERS_MAX);
            self.inquiring = true;
        }
    }

    /// The server connections that listen for clients.
    fn listeners(&self) -> Vec<Holding> {
        let listeners = self.context.hubs.listeners();
        let holding = |(pool, listener, clients): (Rc<Pool>, pool::Listener, usize)| {
            let held_us = micros(self.context.clock.now().saturating_duration_since(listener.since));
            Holding {
                pool: pool.name.clone(),
                url: None,
                server_pid: listener.server_pid,
                client_pid: 0,
                client: None,
                application_name: "pgweir".into(),
                activity: Activity::Idle,
                activity_us: held_us,
                held_us,
                in_transaction: false,
                session_mode: false,
                pins: Vec::new(),
                own_work: false,
                listens_for: Some(clients),
            }
        };
        listeners.into_iter().map(holding).collect()
    }

    /// Sessions that do one thing for too long.
    fn watch(&self, pools: &[Rc<Pool>]) {
        let none = pools.iter().all(|pool| pool.limits.times.is_none());
        if none || self.stage != Stage::Serving {
            return;
        }
        let now = self.context.clock.moment();
        for session in self.context.registry.sessions() {
            let order = overdue(&session, now);
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
        let library = self.context.library.borrow();
        snapshot.process.texts = TextStats {
            recent: self.context.routes.borrow().as_ref().map_or(0, |routes| routes.hits),
            fingerprint: library.found,
            grammar: library.parsed,
        };
        drop(library);
        for pool in self.context.router.pools() {
            snapshot.pools.push(PoolSnapshot {
                name: pool.name.clone(),
                // Who has several workers tells them apart.
                url: None,
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

/// For the tests that `pgweir exec` starts another worker. Never in a release build.
#[cfg(debug_assertions)]
#[allow(clippy::panic, reason = "it is the point")]
fn fail_if_told(ticks: u32) {
    /// Two seconds.
    const TICKS: u32 = 20;
    let Some(what) = std::env::var("PGWEIR_TEST_PANIC").ok() else { return };
    assert!(ticks != TICKS || what != "worker", "told to panic by a test");
    // Who finds the file takes it away and hangs until another one is there.
    if let Some(file) = what.strip_prefix("hang=")
        && std::fs::remove_file(file).is_ok()
    {
        while !std::path::Path::new(&format!("{file}.over")).exists() {
            // On a busy machine who wakes often is ready to run more often than asleep.
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

/// What the session does for too long, as far as can be seen from outside: of the queries in a pipeline, and of the
/// transactions in a lease, it knows itself when each began.
fn overdue(session: &Entry, now: Moment) -> Order {
    let past = |limit: Duration, since: Moment| !limit.is_zero() && now.since(since) >= micros(limit);
    let (times, since, begun) = (&session.times, session.since.get(), session.begun.get());
    match session.activity.get() {
        Activity::Idle if past(times.client_idle, since) => Order::ClientIdle,
        Activity::InTransaction if past(times.idle_transaction, since) => Order::TransactionIdle,
        Activity::Running if past(times.query, since) => Order::QueryLong,
        Activity::InTransaction | Activity::Running if past(times.transaction, begun) => Order::TransactionLong,
        Activity::Running if past(times.idle_transaction, since) => Order::Stopped,
        _ => Order::None,
    }
}

/// Waits for a place at the door. False if there will be none.
async fn room(context: &Context) -> bool {
    while context.doors.taken() >= context.config.client.max_login_clients {
        match context.doors.make_room() {
            Room::Made => return true,
            Room::None => return false,
            // The others wait in the listener's queue meanwhile.
            Room::Soon => context.doors.changed().await,
        }
    }
    true
}

/// Accepts clients. Dropped, it closes its listener, and removes the file of a Unix-domain socket.
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
mod tests {
    use std::io::Read as _;
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_worker_whose_connections_were_ended_in_its_place_ends_and_another_has_its_listener() {
        let mut config = Config::default();
        config.listen.listen_port = 0;
        let config = Arc::new(config);
        let mut listeners = crate::net::listen(&config.listen).unwrap();
        let address = listeners[0].address().unwrap();
        let keyring = Arc::new(Keyring::load(Arc::clone(&config)).unwrap());
        let launch = |listeners| {
            let (config, keyring) = (Arc::clone(&config), Arc::clone(&keyring));
            let shared = Arc::new(Shared::new(Instant::now()));
            (start(config, Arc::default(), listeners, keyring, Arc::clone(&shared), &mut Vec::new()).unwrap(), shared)
        };
        // Clients that have been accepted and have not said who they are.
        let connect = |worker: &WorkerHandle, shared: &Shared| {
            let client = TcpStream::connect(&address).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let until = Instant::now() + Duration::from_secs(20);
            while shared.snapshot().is_none_or(|snapshot| snapshot.gauges.clients == 0) {
                assert!(Instant::now() < until, "nobody accepts");
                worker.commands.send(Command::Tick).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
            client
        };
        let (first, shared) = launch(vec![listeners[0].try_clone().unwrap()]);
        let mut client = connect(&first, &shared);
        assert!(first.sockets.cut().unwrap().is_empty());
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "the client sees the end");
        let (second, shared) = launch(vec![listeners.remove(0)]);
        // It wakes up.
        let _ = first.commands.send(Command::Tick);
        first.finished.blocking_recv().unwrap();
        first.thread.join().unwrap();
        drop(connect(&second, &shared));
        second.commands.send(Command::Stop).unwrap();
        // It wakes up, unless it has ended already.
        let _ = second.commands.send(Command::Tick);
        second.finished.blocking_recv().unwrap();
    }
}

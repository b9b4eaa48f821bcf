//! The process: it listens, starts the worker, ticks, obeys signals, and comes to an end in time.
//!
//! The supervisor owns the main thread and a small runtime of its own. Whatever takes time but no part in
//! the way of a query happens here: signals, the HTTP endpoints, metrics, the pools' log lines.

mod auth_file;

use std::fmt::Display;
use std::io;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgweir_config::Config;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use crate::clock::TICK;
use crate::metrics::{Exporter, Publisher};
use crate::net;
use crate::net::tls::{Keyring, Watch};
use crate::observe::shared::STALLED_AFTER;
use crate::observe::{self, PoolLog, Shared, Stage};
use crate::stats::Snapshot;
use crate::worker::{self, Command, Summary, WorkerHandle};

use auth_file::AuthFile;

/// Longest time from [`Command::Stop`] to the worker's end; then the process ends without it.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Longest time for the worker's thread to end once it has said that it is done.
const JOIN_LIMIT: Duration = Duration::from_secs(1);

/// File descriptors that are no client's and no server's: listeners, epoll, HTTP, standard streams.
const OWN_DESCRIPTORS: u64 = 64;

/// Exit code of a faulty configuration.
const USAGE: u8 = 2;

/// How often the files of TLS are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Exit code of everything that went wrong while running.
const FAILURE: u8 = 1;

/// Runs the pooler until it is told to stop. Standard error gets the log.
///
/// Exit code 0 if every session came to its end by itself, 2 if a file that the configuration names is faulty, else 1.
#[must_use]
pub fn run(config: Config) -> ExitCode {
    let config = Arc::new(config);
    let keyring = match Keyring::load(Arc::clone(&config)) {
        Ok(keyring) => Arc::new(keyring),
        Err(faults) => {
            for fault in faults {
                eprintln!("{fault}");
            }
            return ExitCode::from(USAGE);
        }
    };
    let log = match observe::log::init(config.log.log_format, config.log.log_level) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("pgweir: {error}");
            return ExitCode::from(FAILURE);
        }
    };
    log_panics();
    let code = match start(config, keyring) {
        Ok(supervisor) => supervisor.run().report(),
        Err(error) => {
            tracing::error!(%error, "cannot start");
            ExitCode::from(FAILURE)
        }
    };
    // Flushes.
    drop(log);
    code
}

/// The process could not be set up; the configuration or the host is at fault.
#[derive(Debug, thiserror::Error)]
enum StartError {
    /// `listen_addr`, `listen_port` or `unix_socket_dir`.
    #[error(transparent)]
    Listen(#[from] net::ListenError),
    /// `http_listen`.
    #[error(transparent)]
    Http(#[from] observe::BindFailed),
    /// `auth_file`.
    #[error(transparent)]
    Users(#[from] auth_file::UsersError),
    /// The operating system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was under way: a verb in its -ing form.
        doing: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// Attaches what was under way to an [`io::Error`].
fn doing(doing: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::Io { doing, source }
}

/// How far the process is from its end.
///
/// ```text
/// Running ──terminate──▶ Draining{until} ──terminate, quit, until──▶ Stopping{until} ──until──▶ Stuck
///    └──quit; terminate with no time to drain────────────────────────────▲
///
/// The worker ends: Running ──▶ Lost;  Draining, Stopping ──▶ Done
/// The worker dies: each ──▶ Lost
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Clients are served.
    Running,
    /// No new clients; transactions may finish.
    Draining {
        /// When what is left is cut.
        until: Instant,
    },
    /// Nothing more may begin or finish.
    Stopping {
        /// When the process ends without the worker.
        until: Instant,
    },
}

/// What happens to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// A tenth of a second passed.
    Tick,
    /// SIGTERM or SIGINT.
    Terminate,
    /// SIGQUIT.
    Quit,
    /// SIGHUP.
    Hangup,
    /// The worker is done.
    Finished(Summary),
    /// The worker ended without a word.
    Died,
}

/// What the supervisor has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Nothing,
    Tick,
    Drain,
    Stop,
    Reload,
}

/// How it came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// As it was told.
    Done(Summary),
    /// The worker did not end within [`STOP_LIMIT`].
    Stuck,
    /// The worker ended although nobody had told it to.
    Lost,
}

impl Phase {
    /// What `event` leads to at `now`; `drain` is the time for transactions to finish, zero for none.
    fn on(self, event: Event, now: Instant, drain: Duration) -> ControlFlow<Ending, (Self, Order)> {
        let stopping = Self::Stopping { until: now + STOP_LIMIT };
        let next = match (self, event) {
            (Self::Running, Event::Finished(_)) | (_, Event::Died) => return ControlFlow::Break(Ending::Lost),
            (_, Event::Finished(summary)) => return ControlFlow::Break(Ending::Done(summary)),
            (Self::Stopping { until }, Event::Tick) if now >= until => return ControlFlow::Break(Ending::Stuck),
            (Self::Draining { until }, Event::Tick) if now >= until => (stopping, Order::Stop),
            (phase, Event::Tick) => (phase, Order::Tick),
            (phase, Event::Hangup) => (phase, Order::Reload),
            (Self::Running, Event::Terminate) if !drain.is_zero() => {
                (Self::Draining { until: now + drain }, Order::Drain)
            }
            (Self::Running | Self::Draining { .. }, Event::Terminate | Event::Quit) => (stopping, Order::Stop),
            (Self::Stopping { .. }, Event::Terminate | Event::Quit) => (self, Order::Nothing),
        };
        ControlFlow::Continue(next)
    }
}

impl Ending {
    /// Logs it and translates it for whoever waits for the process.
    fn report(self) -> ExitCode {
        match self {
            Self::Done(Summary { sessions_cut: 0 }) => {
                tracing::info!(sessions_cut = 0, "stopped");
                return ExitCode::SUCCESS;
            }
            Self::Done(Summary { sessions_cut }) => {
                tracing::warn!(sessions_cut, "stopped before every session came to its end");
            }
            Self::Stuck => {
                let limit_s = STOP_LIMIT.as_secs();
                tracing::error!(limit_s, "worker did not end; the process ends without it");
            }
            Self::Lost => tracing::error!("worker ended although nobody told it to"),
        }
        ExitCode::from(FAILURE)
    }
}

/// Everything that runs, as long as it runs.
struct Supervisor {
    config: Arc<Config>,
    keyring: Arc<Keyring>,
    runtime: Runtime,
    signals: Signals,
    shared: Arc<Shared>,
    publisher: Publisher,
    http: Option<HttpServer>,
    auth_file: AuthFile,
    worker: WorkerHandle,
}

/// The HTTP server's task and the way to end it.
struct HttpServer {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Listens and starts the worker; returns when clients are served.
fn start(config: Arc<Config>, keyring: Arc<Keyring>) -> Result<Supervisor, StartError> {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
    provide_descriptors(&config);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(doing("making the supervisor's runtime"))?;
    // First of all, so that a signal during the start is not the default's: death without a word.
    let signals = {
        let _inside = runtime.enter();
        Signals::new().map_err(doing("listening to signals"))?
    };
    let shared = Arc::new(Shared::new(Instant::now()));
    let exporter = Arc::new(Exporter::new());
    let auth_file = AuthFile::read(Arc::clone(&config))?;
    let listeners = net::listen(&config.listen)?;
    for listener in &listeners {
        log_listener("postgres", listener.address())?;
    }
    let http = start_http(&config, &runtime, &shared, &exporter)?;
    let worker =
        worker::start(Arc::clone(&config), auth_file.users(), listeners, Arc::clone(&keyring), Arc::clone(&shared))
            .map_err(doing("starting the worker's thread"))?;
    shared.enter(Stage::Listening);
    tracing::info!("ready");
    let publisher = Publisher::new(exporter);
    Ok(Supervisor { config, keyring, runtime, signals, shared, publisher, http, auth_file, worker })
}

fn start_http(
    config: &Config,
    runtime: &Runtime,
    shared: &Arc<Shared>,
    exporter: &Exporter,
) -> Result<Option<HttpServer>, StartError> {
    let address = &config.http.http_listen;
    if address.is_empty() {
        return Ok(None);
    }
    let listener = observe::bind(address)?;
    log_listener("http", listener.local_addr())?;
    let (stop, stopped) = oneshot::channel();
    let stopped = async {
        // A supervisor that is gone stops it, too.
        let _ = stopped.await;
    };
    let served = observe::serve(listener, Arc::clone(shared), exporter.handle(), stopped);
    let task = runtime.spawn(async {
        if let Err(error) = served.await {
            tracing::error!(%error, "http endpoints not served");
        }
    });
    Ok(Some(HttpServer { stop, task }))
}

fn log_listener(role: &'static str, addr: io::Result<impl Display>) -> Result<(), StartError> {
    let addr = addr.map_err(doing("asking for a listener's address"))?;
    tracing::info!(role, %addr, "listening");
    Ok(())
}

impl Supervisor {
    /// Serves until the end.
    fn run(self) -> Ending {
        let Self { config, keyring, runtime, mut signals, shared, publisher, http, auth_file, worker } = self;
        let WorkerHandle { commands, mut finished, thread } = worker;
        let reload = Arc::new(Notify::new());
        runtime.spawn(auth_file.watch(commands.clone(), reload.clone()));
        let mut desk = Desk::new(&config, keyring, commands, shared, publisher, reload);
        let ending = runtime.block_on(async {
            let ending = desk.serve(&mut signals, &mut finished).await;
            if let Some(HttpServer { stop, task }) = http {
                // It may have ended by itself. Its own limits bound its farewell.
                let _ = stop.send(());
                let _ = task.await;
            }
            ending
        });
        match ending {
            Ending::Done(_) if !join(thread) => Ending::Lost,
            ending => ending,
        }
    }
}

/// Waits for the thread, at most [`JOIN_LIMIT`]; whether it did not panic. One that is late has said
/// that it is done: it keeps the process no longer.
fn join(thread: std::thread::JoinHandle<()>) -> bool {
    let deadline = Instant::now() + JOIN_LIMIT;
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            tracing::warn!("worker's thread is late to end");
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    thread.join().is_ok()
}

/// Where events arrive and orders leave.
struct Desk {
    keyring: Arc<Keyring>,
    /// The files of TLS.
    watch: Watch,
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
    /// Told at SIGHUP.
    reload: Arc<Notify>,
    publisher: Publisher,
    published: Option<Arc<Snapshot>>,
    pool_log: PoolLog,
    stats_period: Duration,
    shutdown_timeout: Duration,
    /// When it began to work.
    since: Instant,
    /// The worker's stall was logged.
    stalled: bool,
}

impl Desk {
    fn new(
        config: &Config,
        keyring: Arc<Keyring>,
        commands: mpsc::UnboundedSender<Command>,
        shared: Arc<Shared>,
        publisher: Publisher,
        reload: Arc<Notify>,
    ) -> Self {
        let since = Instant::now();
        // Heroku names a dyno so; elsewhere the variable is absent.
        let origin = observe::Origin { source: std::env::var("DYNO").ok(), dyno: None };
        let watch = keyring.watch();
        Self {
            keyring,
            watch,
            commands,
            shared,
            reload,
            publisher,
            published: None,
            pool_log: PoolLog::new(origin, since),
            stats_period: config.process.stats_period,
            shutdown_timeout: config.process.shutdown_timeout,
            since,
            stalled: false,
        }
    }

    /// Answers events until one is the last.
    async fn serve(&mut self, signals: &mut Signals, finished: &mut oneshot::Receiver<Summary>) -> Ending {
        let mut ticks = interval(TICK);
        let mut periods = interval(self.stats_period);
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // After a pause of the machine one tick is as good as a hundred.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        periods.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first one is at once, when there is nothing to report.
        periods.tick().await;
        let mut phase = Phase::Running;
        loop {
            let event = tokio::select! {
                result = &mut *finished => result.map_or(Event::Died, Event::Finished),
                event = signals.next() => event,
                _ = ticks.tick() => Event::Tick,
                _ = periods.tick() => {
                    self.log_pools();
                    continue;
                }
                _ = looks.tick(), if !self.watch.is_empty() => {
                    if self.watch.look() {
                        self.reload_keys();
                    }
                    continue;
                }
            };
            match phase.on(event, Instant::now(), self.shutdown_timeout) {
                ControlFlow::Break(ending) => return ending,
                ControlFlow::Continue((next, order)) => {
                    phase = next;
                    self.carry_out(order);
                }
            }
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Nothing => {}
            Order::Tick => {
                self.observe();
                self.command(Command::Tick);
            }
            Order::Drain => {
                self.shared.enter(Stage::Draining);
                tracing::info!(limit_s = self.shutdown_timeout.as_secs_f64(), "draining");
                self.command(Command::Drain);
            }
            Order::Stop => {
                self.shared.enter(Stage::Draining);
                tracing::info!("stopping");
                self.command(Command::Stop);
            }
            Order::Reload => {
                self.reload.notify_one();
                self.reload_keys();
                tracing::warn!(
                    "SIGHUP: auth_file and the files of TLS are read again; this version cannot reload its settings; \
                     restart it for those"
                );
            }
        }
    }

    /// Reads the files of TLS again. Connections that exist keep what they have.
    fn reload_keys(&mut self) {
        if self.watch.is_empty() {
            return;
        }
        // What is written from here on is seen as a change.
        self.watch = self.keyring.watch();
        match self.keyring.reload() {
            Ok(()) => tracing::info!("certificates and keys of TLS read again"),
            Err(faults) => {
                for fault in faults {
                    tracing::error!("{fault}");
                }
                tracing::error!("certificates and keys of TLS not replaced: the old ones stay in use");
            }
        }
    }

    /// Tells the worker. One that is gone cannot be told; its end is the next event.
    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Publishes the worker's latest snapshot, once, and notices when there are no new ones.
    fn observe(&mut self) {
        let now = Instant::now();
        let latest = self.shared.snapshot();
        if let Some(latest) =
            latest.filter(|latest| !self.published.as_ref().is_some_and(|old| Arc::ptr_eq(old, latest)))
        {
            self.publisher.publish(&latest);
            self.published = Some(latest);
        }
        let silence = self.shared.since_tick(now).unwrap_or(now.saturating_duration_since(self.since));
        let stalled = silence >= STALLED_AFTER;
        if stalled && !self.stalled {
            tracing::error!(silence_s = silence.as_secs(), "worker stalled");
        } else if self.stalled && !stalled {
            tracing::info!("worker runs again");
        }
        self.stalled = stalled;
    }

    fn log_pools(&mut self) {
        if let Some(snapshot) = self.shared.snapshot() {
            self.pool_log.period(snapshot);
        }
    }
}

/// The signals that mean something to us.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes them over from their default actions. Needs a runtime around it.
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next one. Loses none when it is dropped before it is ready.
    async fn next(&mut self) -> Event {
        tokio::select! {
            _ = self.terminate.recv() => Event::Terminate,
            _ = self.interrupt.recv() => Event::Terminate,
            _ = self.quit.recv() => Event::Quit,
            _ = self.hangup.recv() => Event::Hangup,
        }
    }
}

/// Makes a panic one line of the log. Its message is left out: it may quote a client's bytes.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let at = panic.location().map_or_else(|| "?".to_owned(), ToString::to_string);
        tracing::error!(at, thread, "panic");
    }));
}

/// Raises the limit on open files as far as we may, and warns if it may not be enough.
fn provide_descriptors(config: &Config) {
    match raise_descriptor_limit() {
        Ok(limit) => {
            let wanted = descriptors_wanted(config);
            if wanted > limit {
                tracing::warn!(limit, wanted, "open files may run out: raise RLIMIT_NOFILE or lower max_client_conn");
            }
        }
        Err(error) => tracing::warn!(%error, "limit on open files unknown"),
    }
}

/// File descriptors when every client and every server connection is there. Databases and users that
/// only clients will name cannot be counted.
fn descriptors_wanted(config: &Config) -> u64 {
    let users = config.users.len().max(1);
    let users = u64::try_from(users).unwrap_or(u64::MAX);
    let servers = config.databases.values().map(|database| {
        let size = database.pool_size.unwrap_or(config.pool.default_pool_size);
        let reserve = database.reserve_pool_size.unwrap_or(config.pool.reserve_pool_size);
        let pools = users.saturating_mul(u64::from(size) + u64::from(reserve));
        match database.max_db_connections.unwrap_or(config.pool.max_db_connections) {
            0 => pools,
            limit => pools.min(u64::from(limit)),
        }
    });
    let servers = servers.fold(0, u64::saturating_add);
    servers.saturating_add(u64::from(config.client.max_client_conn) + OWN_DESCRIPTORS)
}

/// Sets the soft limit on open files to the hard one; returns the limit that holds now.
#[allow(unsafe_code, reason = "resource limits have no safe form in std; each call carries its proof")]
fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes one rlimit to the address it gets, which is that of a live local.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let raised = libc::rlimit { rlim_cur: limit.rlim_max, rlim_max: limit.rlim_max };
    // SAFETY: setrlimit only reads one rlimit from the address it gets, which is that of a live local.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
        limit = raised;
    }
    // Refused: the old limit holds, and whoever asked for too much is told by the warning.
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAIN: Duration = Duration::from_secs(25);

    #[test]
    fn every_event_is_answered_in_every_phase() {
        use ControlFlow::{Break, Continue};
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let (running, draining, stopping) =
            (Phase::Running, Phase::Draining { until: later }, Phase::Stopping { until: later });
        let (drained, stopped) = (Phase::Draining { until: now }, Phase::Stopping { until: now });
        let drain = Phase::Draining { until: now + DRAIN };
        let stop = Phase::Stopping { until: now + STOP_LIMIT };
        let clean = Summary { sessions_cut: 0 };
        let cut = Summary { sessions_cut: 3 };
        #[rustfmt::skip]
        let table = [
            (running,  Event::Tick,            Continue((running,  Order::Tick))),
            (running,  Event::Terminate,       Continue((drain,    Order::Drain))),
            (running,  Event::Quit,            Continue((stop,     Order::Stop))),
            (running,  Event::Hangup,          Continue((running,  Order::Reload))),
            (running,  Event::Finished(clean), Break(Ending::Lost)),
            (running,  Event::Died,            Break(Ending::Lost)),
            (draining, Event::Tick,            Continue((draining, Order::Tick))),
            (drained,  Event::Tick,            Continue((stop,     Order::Stop))),
            (draining, Event::Terminate,       Continue((stop,     Order::Stop))),
            (draining, Event::Quit,            Continue((stop,     Order::Stop))),
            (draining, Event::Hangup,          Continue((draining, Order::Reload))),
            (draining, Event::Finished(clean), Break(Ending::Done(clean))),
            (draining, Event::Died,            Break(Ending::Lost)),
            (stopping, Event::Tick,            Continue((stopping, Order::Tick))),
            (stopped,  Event::Tick,            Break(Ending::Stuck)),
            (stopping, Event::Terminate,       Continue((stopping, Order::Nothing))),
            (stopping, Event::Quit,            Continue((stopping, Order::Nothing))),
            (stopping, Event::Hangup,          Continue((stopping, Order::Reload))),
            (stopping, Event::Finished(cut),   Break(Ending::Done(cut))),
            (stopped,  Event::Finished(clean), Break(Ending::Done(clean))),
            (stopping, Event::Died,            Break(Ending::Lost)),
        ];
        for (phase, event, want) in table {
            assert_eq!(phase.on(event, now, DRAIN), want, "{phase:?}, {event:?}");
        }
    }

    #[test]
    fn without_time_to_drain_the_first_signal_stops() {
        let now = Instant::now();
        let want = ControlFlow::Continue((Phase::Stopping { until: now + STOP_LIMIT }, Order::Stop));
        assert_eq!(Phase::Running.on(Event::Terminate, now, Duration::ZERO), want);
    }

    #[test]
    fn the_limit_on_open_files_counts_clients_and_every_pool() {
        let args = |extra: &[&str]| -> Vec<String> {
            let common = ["--user=a=1", "--user=b=2", "--max-client-conn=1000", "--default-pool-size=10"];
            common.iter().chain(extra).map(ToString::to_string).collect()
        };
        let (x, y) = ("--database=x=postgres://h/x", "--database=y=postgres://h/y");
        #[rustfmt::skip]
        let table: [(&str, &[&str], u64); 4] = [
            ("one database, two users", &[x],                            1000 + 20),
            ("two databases",           &[x, y],                         1000 + 40),
            ("with a reserve",          &[x, "--reserve-pool-size=5"],   1000 + 30),
            ("limited",                 &[x, "--max-db-connections=15"], 1000 + 15),
        ];
        for (name, extra, want) in table {
            let args = args(extra);
            let config = Config::from_sources(pgweir_config::Sources { args: &args, ..Default::default() });
            let config = config.unwrap_or_else(|faults| panic!("{name}: {faults}"));
            assert_eq!(descriptors_wanted(&config), want + OWN_DESCRIPTORS, "{name}");
        }
    }

    #[test]
    fn the_soft_limit_on_open_files_is_raised_to_the_hard_one() {
        let limit = raise_descriptor_limit().expect("the limit can be read");
        let status = std::fs::read_to_string("/proc/self/limits").expect("a Linux");
        let line = status.lines().find(|line| line.starts_with("Max open files")).expect("a line for it");
        let numbers: Vec<&str> = line.split_whitespace().skip(3).take(2).collect();
        assert_eq!(numbers[0], numbers[1], "{line}");
        assert!(numbers[0] == limit.to_string() || numbers[0] == "unlimited", "{line}");
    }
}

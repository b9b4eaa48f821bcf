//! The data plane: listeners, the worker, and what watches it: ticks, log lines, the files of TLS.
//!
//! `pgweir serve` has one for its life, `pgweir exec` starts another when one is lost.

use std::fmt::Display;
use std::io;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgweir_config::Config;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior, interval, interval_at};

use super::auth_file::{self, AuthFile};
use super::pulse::{self, Hang, Pulse};
use crate::clock::TICK;
use crate::net::tls::{Keyring, Watch};
use crate::net::{self, Left, Listener, Sockets};
use crate::observe::shared::STALLED_AFTER;
use crate::observe::{self, Overview, PoolLog, Shared, Stage};
use crate::worker::{self, Command, Summary, WorkerHandle};

/// Longest time from [`Command::Stop`] to the worker's end; then the process ends without it.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Longest time for the worker's thread to end once it has said that it is done.
const JOIN_LIMIT: Duration = Duration::from_secs(1);

/// The nicest that a thread can be.
const LEAST_PRIORITY: i32 = 19;

/// How often the files of TLS are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The data plane could not be set up; the configuration or the host is at fault.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
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
    /// Threads of earlier planes hang, and with each of them the descriptors that it had.
    #[error("{threads} threads of earlier data planes hang; another is started when one of them has ended")]
    Hung {
        /// How many.
        threads: usize,
    },
}

/// Attaches what was under way to an [`io::Error`].
pub(super) fn doing(doing: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::Io { doing, source }
}

/// How far the data plane is from its end.
///
/// ```text
/// Running ──terminate──▶ Draining{until} ──terminate, quit, until──▶ Stopping{until} ──until──▶ Stuck
///    └──quit; terminate with no time to drain────────────────────────────▲
///
/// The worker ends: Running ──▶ Lost;  Draining, Stopping ──▶ Done
/// The worker dies: each ──▶ Lost
/// It hangs: Running ──▶ Hung;  of the others the time limits are the end
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
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

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A tenth of a second passed.
    Tick,
    /// SIGTERM or SIGINT; with `exec`, the end of the application.
    Terminate,
    /// SIGQUIT; with `exec`, the end of the time after SIGTERM.
    Quit,
    /// SIGHUP.
    Hangup,
    /// The worker is done.
    Finished(Summary),
    /// The worker ended without a word.
    Died,
    /// The worker heeds nothing any more.
    Hangs,
}

/// What has to be done next.
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
pub enum Ending {
    /// As it was told.
    Done(Summary),
    /// The worker did not end within five seconds.
    Stuck,
    /// The worker ended although nobody had told it to.
    Lost,
    /// The worker heeded nothing any more. Its connections were ended.
    Hung,
}

impl Phase {
    /// What `event` leads to at `now`; `drain` is the time for transactions to finish, zero for none.
    fn on(self, event: Event, now: Instant, drain: Duration) -> ControlFlow<Ending, (Self, Order)> {
        let stopping = Self::Stopping { until: now + STOP_LIMIT };
        let next = match (self, event) {
            (Self::Running, Event::Finished(_)) | (_, Event::Died) => return ControlFlow::Break(Ending::Lost),
            (Self::Running, Event::Hangs) => return ControlFlow::Break(Ending::Hung),
            (_, Event::Finished(summary)) => return ControlFlow::Break(Ending::Done(summary)),
            (Self::Stopping { until }, Event::Tick) if now >= until => return ControlFlow::Break(Ending::Stuck),
            (Self::Draining { until }, Event::Tick) if now >= until => (stopping, Order::Stop),
            (phase, Event::Tick) => (phase, Order::Tick),
            (phase, Event::Hangup) => (phase, Order::Reload),
            (Self::Running, Event::Terminate) if !drain.is_zero() => {
                (Self::Draining { until: now + drain }, Order::Drain)
            }
            (Self::Running | Self::Draining { .. }, Event::Terminate | Event::Quit) => (stopping, Order::Stop),
            (Self::Stopping { .. }, Event::Terminate | Event::Quit) | (_, Event::Hangs) => (self, Order::Nothing),
        };
        ControlFlow::Continue(next)
    }
}

impl Ending {
    /// Logs it and translates it for whoever waits for the process.
    #[must_use]
    pub fn report(self) -> ExitCode {
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
            Self::Hung => tracing::error!("worker hangs; the process ends without it"),
        }
        ExitCode::FAILURE
    }
}

/// Everything that runs, as long as it runs. Needs a runtime around it, on whose thread it watches the worker.
pub struct Plane {
    phase: Phase,
    shutdown_timeout: Duration,
    desk: Desk,
    finished: oneshot::Receiver<Summary>,
    thread: std::thread::JoinHandle<()>,
    /// The system's number of it.
    thread_id: i32,
    pulse: Pulse,
    /// The worker's connections.
    sockets: Sockets,
    /// What is left of them when they were ended in its place.
    left: Vec<Left>,
    /// Looks at `auth_file`.
    users: JoinHandle<()>,
    ticks: Interval,
    periods: Interval,
    looks: Interval,
}

/// What is left of a plane.
pub struct Closed {
    /// How it came to its end.
    pub ending: Ending,
    /// The server connections of a worker that was lost, for the next one: they count until their servers have ended them.
    pub left: Vec<Left>,
    /// The thread of a worker that hangs. It ends if it ever heeds anything again.
    pub hung: Option<std::thread::JoinHandle<()>>,
}

impl Plane {
    /// Starts the worker, which serves `listeners`. Server connections that an earlier one has `left` count until their servers
    /// have ended them. Of several planes each logs the `url` that its pools are told by; `overview` knows what they have to do with
    /// one another.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing is left running.
    pub fn start(
        config: &Arc<Config>,
        keyring: &Arc<Keyring>,
        listeners: Vec<Listener>,
        url: Option<Arc<str>>,
        overview: &Arc<Overview>,
        left: &mut Vec<Left>,
    ) -> Result<Self, StartError> {
        let shared = Arc::new(Shared::new(Instant::now()));
        let auth_file = AuthFile::read(Arc::clone(config))?;
        for listener in &listeners {
            log_listener("postgres", listener.address())?;
        }
        let users = auth_file.users();
        let worker =
            worker::start(Arc::clone(config), users, listeners, Arc::clone(keyring), Arc::clone(&shared), left);
        let WorkerHandle { commands, finished, thread, thread_id, sockets } =
            worker.map_err(doing("starting the worker's thread"))?;
        shared.enter(Stage::Listening);
        let reload = Arc::new(Notify::new());
        let users = tokio::spawn(auth_file.watch(commands.clone(), reload.clone()));
        let period = config.process.stats_period;
        // The first period is over when there is something to report.
        let mut periods = interval_at(tokio::time::Instant::now() + period, period);
        let (mut ticks, mut looks) = (interval(TICK), interval(LOOK_EVERY));
        for interval in [&mut ticks, &mut periods, &mut looks] {
            // After a pause of the machine one tick is as good as a hundred.
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let desk = Desk::new(Arc::clone(keyring), commands, shared, url, Arc::clone(overview), reload);
        let shutdown_timeout = config.process.shutdown_timeout;
        Ok(Self {
            phase: Phase::Running,
            shutdown_timeout,
            desk,
            finished,
            thread,
            thread_id,
            pulse: Pulse::default(),
            sockets,
            left: Vec::new(),
            users,
            ticks,
            periods,
            looks,
        })
    }

    /// What the worker tells of itself.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.desk.shared
    }

    /// Serves until the end. Loses nothing when it is dropped before, and called again.
    pub async fn serve(&mut self) -> Ending {
        loop {
            let event = tokio::select! {
                result = &mut self.finished => result.map_or(Event::Died, Event::Finished),
                _ = self.ticks.tick() => Event::Tick,
                _ = self.periods.tick() => {
                    self.desk.log_pools();
                    continue;
                }
                _ = self.looks.tick(), if !self.desk.watch.is_empty() => {
                    if self.desk.watch.look() {
                        self.desk.reload_keys();
                    }
                    continue;
                }
            };
            let event = if event == Event::Tick && self.ends_hung() { Event::Hangs } else { event };
            if let ControlFlow::Break(ending) = self.on(event, self.shutdown_timeout) {
                return ending;
            }
        }
    }

    /// At a tick: if the worker hangs, its connections are ended in its place.
    fn ends_hung(&mut self) -> bool {
        if self.phase != Phase::Running {
            return false;
        }
        let hang = self.pulse.tick(self.desk.shared.beats(), || pulse::look(self.thread_id));
        let Some(left) = hang.and_then(|_| self.sockets.cut()) else { return false };
        let why = match hang {
            Some(Hang::Loops) => "it is in a loop",
            Some(Hang::Waits) | None => "it waits for something that does not come",
        };
        tracing::error!(why, servers = left.len(), "worker hangs: its connections are ended");
        // It cannot be ended. What it burns, it takes from nobody who wants it.
        let _ = rustix::process::setpriority_process(rustix::process::Pid::from_raw(self.thread_id), LEAST_PRIORITY);
        self.left = left;
        true
    }

    /// The process will end before long, and says so; it serves all who come until then. What its clients do not need is for the
    /// rest of the fleet, if there is one.
    pub fn give_way(&self) {
        self.desk.shared.enter(Stage::Draining);
        self.desk.command(Command::GiveWay);
    }

    /// As [`Plane::drain`], within `shutdown_timeout`.
    pub fn terminate(&mut self) {
        self.drain(self.shutdown_timeout);
    }

    /// No new clients, and within `limit` each that is left ends with its transaction; asked again, or without time, it
    /// stops.
    pub fn drain(&mut self, limit: Duration) {
        let _ = self.on(Event::Terminate, limit);
    }

    /// Whatever is under way is cancelled, and server connections are closed.
    pub fn stop(&mut self) {
        let _ = self.on(Event::Quit, Duration::ZERO);
    }

    /// Files are read again.
    pub fn reload(&mut self) {
        let _ = self.on(Event::Hangup, Duration::ZERO);
    }

    /// Ends what is left once it has come to its end. Its pools have their last line in the log.
    #[must_use]
    pub fn close(mut self, ending: Ending) -> Closed {
        self.users.abort();
        // The worker has published its last counts before it said that it was done.
        self.desk.log_pools_last();
        let (mut left, mut hung) = (self.left, None);
        let ending = match ending {
            // It cannot be waited for.
            Ending::Hung => {
                hung = Some(self.thread);
                ending
            }
            // Nor can this one. Whoever serves next must not serve beside what it has.
            Ending::Stuck => {
                left.extend(self.sockets.cut().unwrap_or_default());
                hung = Some(self.thread);
                ending
            }
            Ending::Lost => {
                let _ = join(self.thread);
                left.extend(self.sockets.cut().unwrap_or_default());
                ending
            }
            Ending::Done(_) if !join(self.thread) => {
                left.extend(self.sockets.cut().unwrap_or_default());
                Ending::Lost
            }
            Ending::Done(_) => ending,
        };
        Closed { ending, left, hung }
    }

    /// Only the worker's own events are its end.
    fn on(&mut self, event: Event, drain: Duration) -> ControlFlow<Ending> {
        let (next, order) = self.phase.on(event, Instant::now(), drain)?;
        self.phase = next;
        self.desk.carry_out(order, drain);
        ControlFlow::Continue(())
    }
}

pub(super) fn log_listener(role: &'static str, addr: io::Result<impl Display>) -> Result<(), StartError> {
    let addr = addr.map_err(doing("asking for a listener's address"))?;
    tracing::info!(role, %addr, "listening");
    Ok(())
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
    pool_log: PoolLog,
    /// Of all planes of the process.
    overview: Arc<Overview>,
    /// When it began to work.
    since: Instant,
    /// The worker's stall was logged.
    stalled: bool,
}

impl Desk {
    fn new(
        keyring: Arc<Keyring>,
        commands: mpsc::UnboundedSender<Command>,
        shared: Arc<Shared>,
        url: Option<Arc<str>>,
        overview: Arc<Overview>,
        reload: Arc<Notify>,
    ) -> Self {
        let since = Instant::now();
        // Heroku names a dyno so; elsewhere the variable is absent.
        let origin = observe::Origin { source: std::env::var("DYNO").ok(), dyno: None, url };
        Self {
            watch: keyring.watch(),
            keyring,
            commands,
            shared,
            reload,
            pool_log: PoolLog::new(origin, since),
            overview,
            since,
            stalled: false,
        }
    }

    fn carry_out(&mut self, order: Order, drain: Duration) {
        match order {
            Order::Nothing => {}
            Order::Tick => {
                self.observe();
                self.command(Command::Tick);
            }
            Order::Drain => {
                self.shared.enter(Stage::Draining);
                tracing::info!(limit_s = drain.as_secs_f64(), "draining");
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

    /// Notices when the worker publishes nothing any more.
    fn observe(&mut self) {
        let now = Instant::now();
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
            self.pool_log.period(snapshot, &self.overview);
        }
    }

    /// What was counted since is told at the end.
    fn log_pools_last(&mut self) {
        if let Some(snapshot) = self.shared.snapshot() {
            self.pool_log.finish(snapshot, &self.overview);
        }
    }
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
            (running,  Event::Hangs,           Break(Ending::Hung)),
            (draining, Event::Hangs,           Continue((draining, Order::Nothing))),
            (stopping, Event::Hangs,           Continue((stopping, Order::Nothing))),
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

    #[tokio::test]
    async fn what_is_left_stays_while_no_replacement_can_start() {
        use crate::net::Server;
        use crate::stats::PoolName;
        use std::os::unix::net::UnixStream;

        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.auth.auth_file = folder.path().join("missing").to_str().unwrap().to_owned();
        let config = Arc::new(config);
        let keyring = Arc::new(Keyring::load(Arc::clone(&config)).unwrap());
        let (own, _peer) = UnixStream::pair().unwrap();
        let sockets = Sockets::default();
        let own = sockets.enter(own).unwrap();
        let pool = PoolName::primary("app", "web");
        own.mark(Server { pool, pid: 7, secret: Box::default(), encrypted: false });
        let mut left = sockets.cut().unwrap();
        let overview = Arc::new(Overview::new(&[Arc::default()]));
        for _ in 0..2 {
            let started = Plane::start(&config, &keyring, Vec::new(), None, &overview, &mut left);
            assert!(matches!(started, Err(StartError::Users(_))));
            assert_eq!(left.iter().map(|left| left.server.pid).collect::<Vec<_>>(), [7]);
        }
    }

    #[test]
    fn without_time_to_drain_the_first_signal_stops() {
        let now = Instant::now();
        let want = ControlFlow::Continue((Phase::Stopping { until: now + STOP_LIMIT }, Order::Stop));
        assert_eq!(Phase::Running.on(Event::Terminate, now, Duration::ZERO), want);
    }
}

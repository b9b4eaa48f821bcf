//! `pgweir exec -- CMD`: a pooler beside one application, found by nothing but the application's own URLs.
//!
//! One process: the main thread keeps the application (signals, its end, the zombies it leaves), and each data plane
//! ([`Plane`]) has its worker's thread. The application is a child in the same process group and session, so that a terminal
//! stays its own.
//!
//! # The life of the process
//!
//! ```text
//!                  ┌─ PGWEIR_ENABLED off ──────────────────────────────▶ becomes CMD
//! typed, environment ─ anything fails before CMD runs ─ direct (default)▶ becomes CMD, URLs as they were, one loud line
//!                  │                                   └ exit ──────────▶ exit code 1 or 2, CMD never runs
//!                  └─ listeners are up ─▶ CMD starts ─▶ Running
//!
//! Running ──SIGTERM, first──▶ Running, deadline set ──deadline──▶ Released ──15 s──▶ Running   (nobody killed us: serve on)
//!    └────────────────────────────CMD ends────────────────────────────┴──────▶ Closing ──planes off──▶ exit as CMD did
//!
//! each plane:  Up ──lost──▶ Down{until} ──until──▶ Up        while Running; pauses of 1, 2, 4, .. 30 s
//!              Up, Down ──ended──▶ Off                       while Released or Closing
//! ```
//!
//! - **Signals** that may be sent to an application are passed on to it: HUP, INT, QUIT, USR1, USR2, TTIN, TTOU, WINCH, TERM. Not
//!   those of the terminal's keys and job control, since the kernel sends them to the whole group (TTIN and TTOU of its
//!   stop us with it), but its hang-up, which goes to the session's leader alone; nor SIGTERM on a Heroku dyno, which sends it to
//!   every process itself (`PGWEIR_FORWARD_TERM`). A signal that was ignored when we were started stays ignored.
//! - **SIGTERM** ends nothing here: an application that finishes its work needs the database, and may even open new connections.
//!   But what it does not need now is for the rest of the fleet, if there is one. A second one changes nothing but that it is
//!   passed on, too. When `shutdown_timeout` has passed, what is left is cancelled and the server connections are closed in order,
//!   so that they are gone before the platform kills; the application lives on.
//! - **Its end** is ours: sessions that are left finish their transactions (what is left of `shutdown_timeout`; another SIGTERM,
//!   INT or QUIT stop them at once), server connections are closed, and we exit with its code, or die by its signal. As process 1, which no
//!   signal of its own kills, with 128 + the signal.
//! - **Process 1** inherits orphans: they are reaped with the application. Children of other threads (`password_command`) are left
//!   to those.
//! - **Our own death** (SIGKILL, out of memory) sends the application SIGTERM: without us it has no database.
//!
//! # What fails, and what it leaves
//!
//! | what fails | what is left |
//! |---|---|
//! | the command line | exit code 2, as nobody knows what to run |
//! | one URL of several | that one as it was, one loud line; the others are pooled |
//! | every URL, or there is none; a setting; a certificate; a port that is taken | CMD with its URLs as they were, one loud line; or `PGWEIR_ON_FAILURE=exit` |
//! | CMD is not there, or not executable | exit code 127, or 126, as from a shell |
//! | `http_listen` is taken | everything but the HTTP endpoints; a warning |
//! | the data plane, later | a new one on the same listeners; clients are disconnected once, the application lives. Its server connections count until their servers have ended them |
//! | it hangs (heeds nothing for some 11 s) | the same; its connections are ended in its place |
//! | the server, the password | the application's errors, as without us; no storm of logins |
//!
//! | module | what |
//! |---|---|
//! | `arguments` | what was typed: settings, command |
//! | `plan` | what the environment asks for: which URLs, pooled how, rewritten to what |
//! | `life` | the state machines above: events in, orders out |
//! | `signals` | signals as events |
//! | `child` | starting the application, its end, becoming it |
//! | `status` | `pgweir status`: a socket that tells how things stand |

mod arguments;
mod child;
mod life;
mod plan;
mod signals;
mod status;
mod trim;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::select_all;
use pgweir_config::{AuthType, Config, Secret, SslMode, Surroundings, socket_path};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::net::tls::Keyring;
use crate::net::{self, Left, Listener};
use crate::observe::{self, Overview, otlp};
use crate::stats::PoolSnapshot;
use crate::supervisor::{self, Closed, Observers, Plane, StartError};

use child::Limits;
use life::{Event, Fate, Life, Order, Rules, Upkeep};
use plan::{OnFailure, Plan, Wishes};
use signals::Signals;
use status::{Board, Listening};
use trim::Trim;

pub use plan::VARIABLES;
pub use status::run as status;

/// Exit code of a faulty command line or configuration.
const USAGE: u8 = 2;

/// Threads of planes that hang, at most, for another plane to be started.
const HUNG_MAX: usize = 4;

/// Exit code of everything else that goes wrong before the application runs.
const FAILURE: u8 = 1;

/// Where a server's Unix-domain socket is if nothing says where: as Debian builds libpq.
const SOCKET_DIR: &str = "/var/run/postgresql";

/// Why nothing is pooled: one line, and the exit code if that is to be the end.
struct Failure {
    reason: String,
    code: u8,
}

impl Failure {
    fn new(reason: impl std::fmt::Display, code: u8) -> Self {
        // One loud line is promised.
        Self { reason: reason.to_string().trim().replace('\n', "; "), code }
    }
}

/// Runs `pgweir exec` with what was typed behind it, in an environment of `variables`. `help` is what `--help` prints.
#[must_use]
pub fn exec(typed: &[OsString], variables: &[(String, String)], help: impl FnOnce() -> String) -> ExitCode {
    let (settings, command) = match arguments::split(typed) {
        Ok(arguments::Words::Help) => {
            // A reader that has gone away is no reason to fail.
            let _ = io::stdout().write_all(help().as_bytes());
            return ExitCode::SUCCESS;
        }
        Ok(arguments::Words::Run { settings, command }) => (settings, command),
        Err(problem) => {
            complain(&format!("pgweir exec: {problem}"));
            return ExitCode::from(USAGE);
        }
    };
    let (wishes, faults) = Wishes::read(variables);
    let limits = Limits::now();
    if !wishes.enabled {
        return child::replace(&command, &limits);
    }
    let faults = faults.join("; ");
    let prepared =
        if faults.is_empty() { prepare(&settings, variables, &wishes) } else { Err(Failure::new(faults, USAGE)) };
    match prepared {
        Ok(Some(prepared)) => prepared.run(&command, &limits, &wishes),
        // Another wrapper around this one has done it.
        Ok(None) => child::replace(&command, &limits),
        Err(failure) => give_up(&failure, &wishes, &command, &limits),
    }
}

/// Runs the command as if we had never been there, unless that is not wanted.
fn give_up(failure: &Failure, wishes: &Wishes, command: &[OsString], limits: &Limits) -> ExitCode {
    let Failure { reason, code } = failure;
    match wishes.on_failure {
        OnFailure::Direct => {
            complain(&format!("pgweir exec: NOT POOLED, the command runs with its URLs as they are: {reason}"));
            child::replace(command, limits)
        }
        OnFailure::Exit => {
            complain(&format!("pgweir exec: NOT STARTED, as PGWEIR_ON_FAILURE is exit: {reason}"));
            ExitCode::from(*code)
        }
    }
}

fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Everything that is known before anything runs.
struct Prepared {
    plan: Plan,
    configs: Vec<Arc<Config>>,
    keyrings: Vec<Arc<Keyring>>,
    listeners: Vec<Vec<Listener>>,
    addresses: Vec<SocketAddr>,
}

/// What the environment means: the plan, and a configuration for each of its groups. `None` if everything is pooled by
/// another wrapper already.
fn configure(
    settings: &[String],
    variables: &[(String, String)],
    wishes: &Wishes,
) -> Result<Option<(Plan, Vec<Config>)>, Failure> {
    let plan = Plan::make(wishes, variables, &surroundings(variables), made_up);
    for left in &plan.left {
        if wishes.on_failure == OnFailure::Exit {
            return Err(Failure::new(format!("{}: {}", left.name, left.reason), USAGE));
        }
    }
    if plan.pooled.is_empty() {
        if plan.already && plan.left.is_empty() {
            return Ok(None);
        }
        return Err(Failure::new(plan.nothing(wishes), USAGE));
    }
    let mut configs = Vec::new();
    for index in 0..plan.groups.len() {
        let config = plan.configure(index, settings, variables).map_err(|faults| Failure::new(faults, USAGE))?;
        if config.tls.client_tls_sslmode >= SslMode::Require || config.auth.auth_type == AuthType::Cert {
            let reason = "client_tls_sslmode or auth_type demands TLS of clients, and the rewritten URLs go without. \
                          Set client_tls_sslmode = allow, and another auth_type";
            return Err(Failure::new(reason, USAGE));
        }
        configs.push(config);
    }
    Ok(Some((plan, configs)))
}

/// The configurations that `pgweir exec` would run with in this environment; none if no URL is found there. For `pgweir check`.
///
/// # Errors
///
/// Why there are none, in one line.
pub fn configurations(settings: &[String], variables: &[(String, String)]) -> Result<Vec<Config>, String> {
    let (wishes, faults) = Wishes::read(variables);
    if let Some(fault) = faults.into_iter().next() {
        return Err(fault);
    }
    if !plan::finds_any(&wishes, variables) {
        return Ok(Vec::new());
    }
    let configured = configure(settings, variables, &wishes).map_err(|failure| failure.reason)?;
    let Some((plan, configs)) = configured else {
        return Err("the URLs lead to a pgweir already".to_owned());
    };
    match plan.left.first() {
        Some(left) => Err(format!("{}: {}", left.name, left.reason)),
        None => Ok(configs),
    }
}

/// What `pgweir urls` prints: what would be rewritten to what, without secrets. The code says whether all of them would be.
#[must_use]
pub fn urls(settings: &[String], variables: &[(String, String)]) -> ExitCode {
    let (wishes, faults) = Wishes::read(variables);
    for fault in &faults {
        complain(&format!("pgweir urls: {fault}"));
    }
    let plan = Plan::make(&wishes, variables, &surroundings(variables), made_up);
    let _ = io::stdout().write_all(plan.describe(&wishes).as_bytes());
    let configured = configure(settings, variables, &wishes);
    if let Err(failure) = &configured {
        complain(&format!("pgweir urls: {}", failure.reason));
    }
    let whole = faults.is_empty() && plan.left.is_empty() && configured.is_ok();
    if whole { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) }
}

/// What libpq would look at besides the URL.
fn surroundings(variables: &[(String, String)]) -> Surroundings {
    let is_file = |path: &String| std::path::Path::new(path).is_file();
    let port = variables.iter().find(|(name, _)| name == "PGPORT").and_then(|(_, port)| port.parse().ok());
    let socket = socket_path(SOCKET_DIR, port.unwrap_or(5432));
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
    let home = variables.iter().find(|(name, _)| name == "HOME").map(|(_, home)| home.clone());
    let home = home.or_else(|| user.as_ref().map(|user| user.dir.to_string_lossy().into_owned()));
    let at_home = |file: &str| home.as_ref().map(|home| format!("{home}/{file}")).filter(is_file);
    Surroundings {
        variables: variables.iter().filter(|(name, _)| name.starts_with("PG")).cloned().collect(),
        user: user.map(|user| user.name),
        socket_dir: std::path::Path::new(&socket).exists().then(|| SOCKET_DIR.to_owned()),
        root_certificates: at_home(".postgresql/root.crt"),
        certificate: at_home(".postgresql/postgresql.crt"),
        passwords: at_home(".pgpass"),
    }
}

/// A password for a user that has none: whoever has the rewritten URL may come, and nobody else.
fn made_up() -> Secret {
    let mut bytes = [0; 24];
    // Without random bytes nothing of TLS or SCRAM works either: the next step says so.
    let _ = getrandom::fill(&mut bytes);
    Secret::new(bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}")))
}

/// Reads the environment and listens; nothing serves yet.
fn prepare(settings: &[String], variables: &[(String, String)], wishes: &Wishes) -> Result<Option<Prepared>, Failure> {
    let Some((plan, configs)) = configure(settings, variables, wishes)? else { return Ok(None) };
    for left in &plan.left {
        complain(&format!("pgweir exec: NOT POOLED, {} stays as it is: {}", left.name, left.reason));
    }
    let (mut all, mut keyrings, mut listeners, mut addresses) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for mut config in configs {
        let makes = offer_tls(&mut config);
        let config = Arc::new(config);
        let keyring = Keyring::load_or_make(Arc::clone(&config), makes).map_err(|faults| {
            let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
            Failure::new(faults.join("; "), USAGE)
        })?;
        let own = net::listen(&config.listen).map_err(|error| Failure::new(error, FAILURE))?;
        addresses.push(address(&own).ok_or_else(|| {
            Failure::new("nothing listens on TCP, which a URL could name (listen_addr is empty)", USAGE)
        })?);
        keyrings.push(Arc::new(keyring));
        listeners.push(own);
        all.push(config);
    }
    Ok(Some(Prepared { plan, configs: all, keyrings, listeners, addresses }))
}

/// Clients that insist on TLS get it, by a certificate that is made then, unless the settings say otherwise.
fn offer_tls(config: &mut Config) -> bool {
    let is_set = config.origins.contains_key("client_tls_sslmode");
    if !is_set {
        config.tls.client_tls_sslmode = SslMode::Allow;
    }
    !is_set
}

/// Where the application connects: the first listener's address, on this machine.
fn address(listeners: &[Listener]) -> Option<SocketAddr> {
    let first = listeners.iter().find_map(|listener| match listener {
        Listener::Tcp(socket) => socket.local_addr().ok(),
        Listener::Unix { .. } => None,
    })?;
    let local: std::net::IpAddr =
        if first.is_ipv6() { std::net::Ipv6Addr::LOCALHOST.into() } else { std::net::Ipv4Addr::LOCALHOST.into() };
    let ip = if first.ip().is_unspecified() { local } else { first.ip() };
    Some(SocketAddr::new(ip, first.port()))
}

impl Prepared {
    /// Serves, runs the command, and ends as it ends.
    fn run(self, command: &[OsString], limits: &Limits, wishes: &Wishes) -> ExitCode {
        let Some(first) = self.configs.first().cloned() else { return ExitCode::from(FAILURE) };
        let log = match observe::log::init(first.log.log_format, first.log.log_level) {
            Ok(log) => log,
            Err(error) => return give_up(&Failure::new(error, FAILURE), wishes, command, limits),
        };
        supervisor::log_panics();
        tracing::info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
        supervisor::provide_descriptors(&first);
        let runtime = match supervisor::runtime() {
            Ok(runtime) => runtime,
            Err(error) => return give_up(&Failure::new(error, FAILURE), wishes, command, limits),
        };
        let outcome = runtime.block_on(async {
            let keeper = Keeper::start(self, command, limits, wishes)?;
            Ok(keeper.keep().await)
        });
        // Their threads end with the process.
        runtime.shutdown_background();
        // Flushes.
        drop(log);
        match outcome {
            Ok(fate) => child::mirror(fate),
            Err(NotStarted::Plane(error)) => give_up(&Failure::new(error, FAILURE), wishes, command, limits),
            Err(NotStarted::Child(error)) => {
                complain(&format!("pgweir exec: {error}"));
                ExitCode::from(error.code())
            }
        }
    }
}

/// The application does not run.
enum NotStarted {
    /// For want of us.
    Plane(StartError),
    /// By itself.
    Child(child::NotStarted),
}

/// One data plane, or its place.
struct Slot {
    config: Arc<Config>,
    keyring: Arc<Keyring>,
    /// Kept while planes come and go, so that clients find somebody listening.
    listeners: Vec<Listener>,
    /// What its pools are told by, if there are several slots.
    url: Option<Arc<str>>,
    plane: Option<Plane>,
    upkeep: Upkeep,
    /// The server connections of a plane that was lost: the next one counts them until they end.
    left: Vec<Left>,
    /// The threads of planes that hung.
    hung: Vec<std::thread::JoinHandle<()>>,
}

impl Slot {
    fn start(&mut self, overview: &Arc<Overview>) -> Result<(), StartError> {
        self.hung.retain(|thread| !thread.is_finished());
        if self.hung.len() >= HUNG_MAX {
            return Err(StartError::Hung { threads: self.hung.len() });
        }
        let clones: io::Result<Vec<Listener>> = self.listeners.iter().map(Listener::try_clone).collect();
        let clones = clones.map_err(|source| StartError::Io { doing: "keeping the listeners", source })?;
        let url = self.url.clone();
        self.plane = Some(Plane::start(&self.config, &self.keyring, clones, url, overview, &mut self.left)?);
        Ok(())
    }
}

/// The HTTP endpoints are the first slot's by their settings, and tell of all.
fn observers(slots: &[Slot], overview: &Arc<Overview>) -> Result<Observers, StartError> {
    let none = || StartError::Io { doing: "looking for a data plane", source: io::ErrorKind::NotFound.into() };
    let first = slots.first().ok_or_else(none)?;
    let address = &first.config.http.http_listen;
    let http = (!address.is_empty()).then(|| observe::bind(address)).and_then(|bound| {
        bound.map_err(|error| tracing::warn!(%error, "no HTTP endpoints; the application is pooled all the same")).ok()
    });
    Observers::start(&first.config, overview, http, supervisor::instance(&first.config, &first.listeners))
}

/// Keeps the application, and the planes for it.
struct Keeper {
    life: Life,
    rules: Rules,
    slots: Vec<Slot>,
    signals: Signals,
    ends: Signal,
    child: nix::unistd::Pid,
    board: Arc<Board>,
    overview: Arc<Overview>,
    /// Until the end.
    observers: Option<Observers>,
    trim: Trim,
}

impl Keeper {
    /// Starts the planes, then the command.
    fn start(prepared: Prepared, command: &[OsString], limits: &Limits, wishes: &Wishes) -> Result<Self, NotStarted> {
        let Prepared { plan, configs, keyrings, listeners, addresses } = prepared;
        let drain = configs.first().map_or(Duration::ZERO, |config| config.process.shutdown_timeout);
        let now = Instant::now();
        let urls = plan.urls();
        let overview = Arc::new(Overview::new(&urls));
        let changes = plan.changes(&addresses, &configs, wishes, |name| std::env::var_os(name).is_some());
        let mut slots = Vec::new();
        for (index, ((config, keyring), listeners)) in configs.into_iter().zip(keyrings).zip(listeners).enumerate() {
            let url = urls.get(index).filter(|_| urls.len() > 1).cloned();
            let upkeep = Upkeep::up(now);
            let (left, hung) = (Vec::new(), Vec::new());
            let mut slot = Slot { config, keyring, listeners, url, plane: None, upkeep, left, hung };
            slot.start(&overview).map_err(NotStarted::Plane)?;
            if let Some(plane) = &slot.plane {
                overview.show(index, Arc::clone(plane.shared()));
            }
            slots.push(slot);
        }
        let observers = observers(&slots, &overview).map_err(NotStarted::Plane)?;
        // From here on a signal belongs to the application.
        let signals = Signals::take().map_err(|source| StartError::Io { doing: "listening to signals", source });
        let ends = signal(SignalKind::child())
            .map_err(|source| StartError::Io { doing: "listening to the ends of processes", source });
        let (signals, ends) = (signals.map_err(NotStarted::Plane)?, ends.map_err(NotStarted::Plane)?);
        let listening = plan.pooled.iter().map(|pooled| Listening::new(pooled, &addresses)).collect();
        let child = child::start(command, &changes, limits).map_err(NotStarted::Child)?;
        tracing::info!(child = child.as_raw(), listening = slots.len(), "application started");
        let board = Arc::new(Board::new(child.as_raw(), listening, Arc::clone(&overview)));
        if let Err(error) = status::serve(Arc::clone(&board)) {
            tracing::warn!(%error, "pgweir status will not find this process");
        }
        let rules = Rules { passes_term: wishes.passes_term(std::process::id() == 1), drain };
        Ok(Self {
            life: Life::default(),
            rules,
            slots,
            signals,
            ends,
            child,
            board,
            overview,
            observers: Some(observers),
            trim: Trim::new(Instant::now()),
        })
    }

    /// Until the application has ended and everything of ours with it.
    async fn keep(mut self) -> Fate {
        // The command runs by now: what of the program only the start needed.
        trim::give_back();
        loop {
            let upkeep = self.slots.iter().filter_map(|slot| slot.upkeep.due());
            let due = upkeep.chain(self.life.due()).chain([self.trim.due()]).min();
            let event = tokio::select! {
                // A signal to every process comes before what the application does about it.
                biased;
                received = self.signals.next() => Event::Signal(received),
                _ = self.ends.recv() => match child::reap(self.child) {
                    Some(fate) => Event::Ended(fate),
                    None => continue,
                },
                (index, ending) = lost(&mut self.slots) => {
                    self.close(index, ending);
                    Event::Tick
                }
                () = sleep_until(due) => Event::Tick,
            };
            self.react(event);
            self.trim();
            if let Some(fate) = self.life.over(self.slots.iter().all(|slot| slot.upkeep.is_off())) {
                let farewell = if let Some(observers) = self.observers.take() { observers.close().await } else { None };
                otlp::Farewell::all(farewell.into_iter().collect()).await;
                return fate;
            }
        }
    }

    fn react(&mut self, event: Event) {
        let now = Instant::now();
        let (life, order) = self.life.on(event, now, &self.rules);
        if self.life.is_terminated() != life.is_terminated() {
            self.board.set_draining(life.is_terminated());
            if life.is_terminated() {
                self.planes().for_each(|plane| plane.give_way());
            }
        }
        self.life = life;
        match order {
            Order::Nothing => {}
            Order::Forward(number) => child::signal(self.child, number),
            Order::Suspend => child::suspend(),
            Order::Drain(limit) => {
                tracing::info!(limit_s = limit.as_secs_f64(), "application ended");
                self.planes().for_each(|plane| plane.drain(limit));
            }
            Order::Stop => {
                tracing::warn!("closing server connections: shutdown_timeout has passed, or a signal came");
                self.planes().for_each(Plane::stop);
            }
        }
        let wanted = self.life.wants_planes();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let (upkeep, start) = slot.upkeep.tick(now, wanted);
            slot.upkeep = upkeep;
            if start {
                match slot.start(&self.overview) {
                    Ok(()) => {
                        tracing::warn!("data plane started anew");
                        self.board.count_restart();
                        if let Some(plane) = &slot.plane {
                            self.overview.show(index, Arc::clone(plane.shared()));
                            if self.life.is_terminated() {
                                plane.give_way();
                            }
                        }
                    }
                    Err(error) => {
                        tracing::error!(%error, "data plane not started");
                        slot.upkeep = slot.upkeep.ended(now, wanted);
                    }
                }
            }
        }
    }

    /// Looks whether pages of the program can be given back.
    fn trim(&mut self) {
        let now = Instant::now();
        if now < self.trim.due() {
            return;
        }
        let snapshots = self.planes().filter_map(|plane| plane.shared().snapshot());
        let of_pool =
            |pool: &PoolSnapshot| pool.stats.queries + pool.stats.client_logins + pool.stats.bytes_from_clients;
        let asked = snapshots.map(|snapshot| snapshot.pools.iter().map(of_pool).sum::<u64>()).sum();
        let (next, now_is_it) = self.trim.tick(now, trim::Done { asked, faults: trim::faults() });
        self.trim = next;
        if now_is_it {
            trim::give_back();
        }
    }

    /// A plane has come to its end, wanted or not.
    fn close(&mut self, index: usize, ending: supervisor::Ending) {
        let wanted = self.life.wants_planes();
        let Some(slot) = self.slots.get_mut(index) else { return };
        if let Some(plane) = slot.plane.take() {
            let Closed { ending, left, hung } = plane.close(ending);
            slot.left.extend(left);
            slot.hung.extend(hung);
            if wanted {
                // At the very end its last counts are still told.
                self.overview.lose(index);
                tracing::error!(?ending, "data plane lost; it is started anew, and the application lives on");
            } else {
                let _ = ending.report();
            }
        }
        slot.upkeep = slot.upkeep.ended(Instant::now(), wanted);
    }

    fn planes(&mut self) -> impl Iterator<Item = &mut Plane> {
        self.slots.iter_mut().filter_map(|slot| slot.plane.as_mut())
    }
}

/// The first plane that comes to its end, while all of them serve.
async fn lost(slots: &mut [Slot]) -> (usize, supervisor::Ending) {
    let serving: Vec<_> = slots
        .iter_mut()
        .enumerate()
        .filter_map(|(index, slot)| {
            let plane = slot.plane.as_mut()?;
            Some(Box::pin(async move { (index, plane.serve().await) }))
        })
        .collect();
    if serving.is_empty() {
        return std::future::pending().await;
    }
    select_all(serving).await.0
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

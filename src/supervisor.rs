//! The process: it listens, starts the data plane, obeys signals, and comes to an end in time.
//!
//! The supervisor owns the main thread and a small runtime of its own. Whatever takes time but no part in
//! the way of a query happens here: signals, the HTTP endpoints, metrics, the pools' log lines.

mod auth_file;
mod observers;
mod plane;
mod pulse;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use pgweir_config::Config;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::net;
use crate::net::tls::Keyring;
use crate::observe::{self, Overview, otlp};

pub use observers::{Observers, instance};
use plane::doing;
pub use plane::{Closed, Ending, Plane, StartError};

/// File descriptors that are no client's and no server's: listeners, epoll, HTTP, standard streams.
const OWN_DESCRIPTORS: u64 = 64;

/// Exit code of a faulty configuration.
const USAGE: u8 = 2;

/// Exit code of everything that went wrong while running.
const FAILURE: u8 = 1;

/// Runs the pooler until it is told to stop. Standard error gets the log.
///
/// Exit code 0 if every session came to its end by itself, 2 if a file that the configuration names is faulty, else 1: also if
/// the worker hangs, so that whoever keeps the process starts another.
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
    tracing::info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
    provide_descriptors(&config);
    let code = match start(&config, &keyring) {
        Ok((runtime, signals, plane, observers)) => runtime.block_on(serve(plane, observers, signals)).report(),
        Err(error) => {
            tracing::error!(%error, "cannot start");
            ExitCode::from(FAILURE)
        }
    };
    // Flushes.
    drop(log);
    code
}

/// Listens and starts the worker; returns when clients are served.
fn start(config: &Arc<Config>, keyring: &Arc<Keyring>) -> Result<(Runtime, Signals, Plane, Observers), StartError> {
    let runtime = runtime()?;
    let inside = runtime.enter();
    // First of all, so that a signal during the start is not the default's: death without a word.
    let signals = Signals::new().map_err(doing("listening to signals"))?;
    let listeners = net::listen(&config.listen)?;
    let address = &config.http.http_listen;
    let http = if address.is_empty() { None } else { Some(observe::bind(address)?) };
    let overview = Arc::new(Overview::new(&[Arc::default()]));
    let observers = Observers::start(config, &overview, http, instance(config, &listeners))?;
    let plane = Plane::start(config, keyring, listeners, None, &overview, &mut Vec::new())?;
    overview.show(0, Arc::clone(plane.shared()));
    tracing::info!("ready");
    drop(inside);
    Ok((runtime, signals, plane, observers))
}

/// The event loop of the main thread.
///
/// # Errors
///
/// The system refuses.
pub fn runtime() -> Result<Runtime, StartError> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().map_err(doing("making the supervisor's runtime"))
}

/// Serves until the end.
async fn serve(mut plane: Plane, observers: Observers, mut signals: Signals) -> Ending {
    let ending = loop {
        let order = tokio::select! {
            ending = plane.serve() => break ending,
            order = signals.next() => order,
        };
        match order {
            Told::Terminate => plane.terminate(),
            Told::Quit => plane.stop(),
            Told::Hangup => plane.reload(),
        }
    };
    let Closed { ending, .. } = plane.close(ending);
    let farewell = observers.close().await;
    otlp::Farewell::all(farewell.into_iter().collect()).await;
    ending
}

/// What signals tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// SIGTERM or SIGINT.
    Terminate,
    /// SIGQUIT.
    Quit,
    /// SIGHUP.
    Hangup,
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
    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Terminate,
            _ = self.interrupt.recv() => Told::Terminate,
            _ = self.quit.recv() => Told::Quit,
            _ = self.hangup.recv() => Told::Hangup,
        }
    }
}

/// Makes a panic one line of the log. Its message is left out: it may quote a client's bytes.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let at = panic.location().map_or_else(|| "?".to_owned(), ToString::to_string);
        tracing::error!(at, thread, "panic");
    }));
}

/// Raises the limit on open files as far as we may, and warns if it may not be enough.
pub fn provide_descriptors(config: &Config) {
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

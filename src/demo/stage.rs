//! What the demo runs: a primary, its follower, and pgweir before them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pgweir_harness::{
    APP_DATABASE, APP_PASSWORD, APP_USER, Cluster, ClusterOptions, ConnectionFilter, ConnectionWatch, HarnessError,
    Pgweir, PgweirOptions, ServerPrograms,
};
use tokio_postgres::Config;

use super::clients::{ACCOUNTS, OPENING_BALANCE, TOTAL};
use super::tally::Fault;
use crate::metrics::{self, Metric};

/// Server connections of each pool, at most: one pool for the primary, one for the follower.
pub(super) const POOL_SIZE: u32 = 8;
/// The database that leads to the primary.
pub(super) const DATABASE: &str = "demo";
/// The database that leads to the follower.
pub(super) const FOLLOWER_DATABASE: &str = "demo_follower";

/// Longest time for pgweir to end; it has no clients any more.
const EXIT_LIMIT: Duration = Duration::from_secs(20);
/// Longest time for the follower to catch up.
const REPLAY_LIMIT: Duration = Duration::from_secs(20);
/// Longest time for the servers to notice that their clients are gone.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// Characters of pgweir's log that are shown when it fails.
const LOG_TAIL: usize = 4000;

/// Everything that runs. Dropping it stops it at once.
pub(super) struct Stage {
    // In the order in which they go.
    watches: [ConnectionWatch; 2],
    pgweir: Pgweir,
    follower: Cluster,
    primary: Cluster,
}

/// What the servers and pgweir say of one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// Server connections on the primary.
    pub(super) primary: u32,
    /// Server connections on the follower.
    pub(super) follower: u32,
    /// Clients that wait for a server connection.
    pub(super) waiting: u64,
    /// Waits so far.
    pub(super) waits: u64,
}

/// What was seen of the pools over the whole demo.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The most server connections at once on the primary.
    pub(super) primary: u32,
    /// The most server connections at once on the follower.
    pub(super) follower: u32,
    /// How often both were counted, together.
    pub(super) samples: u64,
    /// Waits for a server connection.
    pub(super) waits: u64,
    /// Rows that transfers left behind.
    pub(super) transfers: u64,
}

/// The end of the demo.
#[derive(Debug, Default)]
pub(super) struct Closing {
    /// What was seen.
    pub(super) seen: Seen,
    /// What was wrong.
    pub(super) faults: Vec<Fault>,
}

impl Stage {
    /// Starts it all; takes a few seconds.
    pub(super) fn set_up() -> Result<Self, HarnessError> {
        let programs = ServerPrograms::find()?;
        let primary = Cluster::start_with(&programs, ClusterOptions::default())?;
        primary.psql(APP_DATABASE, &opening())?;
        let follower = primary.follower(ClusterOptions::default())?;
        primary.await_replay(&follower, REPLAY_LIMIT)?;
        let pgweir = Pgweir::start_with(PgweirOptions {
            toml: configuration(&primary, &follower),
            bin: std::env::current_exe().ok(),
            ..PgweirOptions::default()
        })?;
        let filter = ConnectionFilter::user(APP_USER);
        let watches = [primary.watch_connections(&filter)?, follower.watch_connections(&filter)?];
        Ok(Self { watches, pgweir, follower, primary })
    }

    /// How clients connect through pgweir: to the primary, and to the follower.
    pub(super) fn client_configs(&self) -> (Config, Config) {
        let config = |database| {
            let mut config = Config::new();
            config.host(self.primary.host()).port(self.pgweir.port());
            config.user(APP_USER).password(APP_PASSWORD).dbname(database);
            config
        };
        (config(DATABASE), config(FOLLOWER_DATABASE))
    }

    /// The version of the servers.
    pub(super) fn version(&self) -> &str {
        self.primary.programs().version()
    }

    /// Where the servers listen: primary, follower.
    pub(super) fn server_ports(&self) -> (u16, u16) {
        (self.primary.port(), self.follower.port())
    }

    /// Where pgweir listens, as a URL for `psql`.
    pub(super) fn url(&self) -> String {
        self.pgweir.url(APP_USER, DATABASE)
    }

    /// pgweir's HTTP port.
    pub(super) fn http_port(&self) -> Option<u16> {
        self.pgweir.http_port()
    }

    /// Asks the servers and pgweir. Blocks for some milliseconds.
    pub(super) fn read(&self) -> Result<Reading, Fault> {
        let filter = ConnectionFilter::user(APP_USER);
        let text = self.metrics()?;
        let number = |value: Option<f64>| value.map_or(0, whole);
        Ok(Reading {
            primary: self.primary.count_connections(&filter)?,
            follower: self.follower.count_connections(&filter)?,
            waiting: number(sum(&text, metrics::CLIENTS.name, r#"state="waiting""#)),
            waits: number(sum(&text, &format!("{}_count", metrics::WAIT.name), "")),
        })
    }

    fn metrics(&self) -> Result<String, Fault> {
        match self.pgweir.http_get("/metrics")? {
            (200, text) => Ok(text),
            (status, _) => Err(Fault::Unwatched { what: format!("/metrics answers {status}") }),
        }
    }
}

/// Stops everything in order and says what was seen and what was wrong. `acknowledged` is how many
/// transfers the clients know to be committed.
pub(super) fn take_down(stage: Arc<Stage>, acknowledged: u64) -> Closing {
    let mut closing = Closing::default();
    closing.inspect(&stage, acknowledged);
    let homes = [stage.primary.home_dir().to_path_buf(), stage.follower.home_dir().to_path_buf()];
    let config = stage.pgweir.config_path();
    let pids = [stage.primary.pid(), stage.follower.pid(), Some(stage.pgweir.pid())];
    closing.stop(&stage);
    // The last one: everything that it holds is gone after this line.
    drop(stage);
    closing.look_behind(&homes, &config, &pids);
    closing
}

impl Closing {
    fn check(&mut self, result: Result<(), impl Into<Fault>>) {
        if let Err(fault) = result {
            self.faults.push(fault.into());
        }
    }

    /// While everything still runs and no client is left.
    fn inspect(&mut self, stage: &Stage, acknowledged: u64) {
        match stage.metrics() {
            Ok(text) => {
                self.seen.waits = sum(&text, &format!("{}_count", metrics::WAIT.name), "").map_or(0, whole);
                self.faults.extend(defects(&text));
            }
            Err(fault) => self.faults.push(fault),
        }
        let [primary, follower] = &stage.watches;
        self.seen.primary = primary.most();
        self.seen.follower = follower.most();
        self.seen.samples = primary.samples() + follower.samples();
        for (role, watch) in [("primary", primary), ("follower", follower)] {
            self.check(within_cap(role, watch.most(), watch.samples()));
        }
        self.check(stage.primary.await_replay(&stage.follower, REPLAY_LIMIT));
        for (role, cluster) in [("primary", &stage.primary), ("follower", &stage.follower)] {
            self.check(invariant(cluster, role, "sum of all accounts", "SELECT sum(balance) FROM accounts", TOTAL));
            let count = i64::try_from(acknowledged).unwrap_or(i64::MAX);
            let question = "SELECT count(*) FROM transfers";
            self.check(invariant(cluster, role, "transfers", question, count));
        }
        let found = stage.primary.psql(APP_DATABASE, "SELECT count(*) FROM transfers");
        self.seen.transfers = found.ok().and_then(|count| count.parse().ok()).unwrap_or(0);
    }

    /// pgweir first, by the signal that an operator would use; then the servers.
    fn stop(&mut self, stage: &Stage) {
        self.check(stage.pgweir.signal(libc::SIGTERM));
        match stage.pgweir.wait_exit(EXIT_LIMIT) {
            Ok(status) if status.success() => {}
            Ok(status) => self.faults.push(Fault::Exit { status, log: tail(&stage.pgweir.log()) }),
            Err(error) => self.faults.push(error.into()),
        }
        for (role, cluster) in [("follower", &stage.follower), ("primary", &stage.primary)] {
            self.check(connections_closed(cluster, role));
            self.check(cluster.stop());
        }
    }

    fn look_behind(&mut self, homes: &[PathBuf], config: &Path, pids: &[Option<u32>]) {
        let processes = pids.iter().flatten().map(|pid| PathBuf::from(format!("/proc/{pid}")));
        let paths = homes.iter().cloned().chain([config.to_path_buf()]).chain(processes);
        for path in paths.filter(|path| path.exists()) {
            self.faults.push(Fault::LeftBehind { what: path.display().to_string() });
        }
    }
}

/// The tables, before the first client.
fn opening() -> String {
    format!(
        "SET ROLE {APP_USER}; \
         CREATE TABLE accounts (id int PRIMARY KEY, balance int8 NOT NULL); \
         CREATE TABLE transfers (tag int8 PRIMARY KEY, amount int8 NOT NULL); \
         INSERT INTO accounts SELECT id, {OPENING_BALANCE} FROM generate_series(0, {}) id",
        ACCOUNTS - 1
    )
}

/// pgweir's configuration: any free ports, two databases, one user.
fn configuration(primary: &Cluster, follower: &Cluster) -> String {
    let (primary, follower) = (primary.url(APP_USER, APP_DATABASE), follower.url(APP_USER, APP_DATABASE));
    format!(
        "[listen]\nlisten_addr = \"127.0.0.1\"\nlisten_port = 0\n\
         [http]\nhttp_listen = \"127.0.0.1:0\"\n\
         [pool]\ndefault_pool_size = {POOL_SIZE}\n\
         [log]\nlog_connections = false\nlog_disconnections = false\n\
         [process]\nshutdown_timeout = \"5s\"\n\
         [databases]\n{DATABASE} = \"{primary}\"\n{FOLLOWER_DATABASE} = \"{follower}\"\n\
         [users.{APP_USER}]\npassword = \"{APP_PASSWORD}\"\n"
    )
}

/// Whether the pool kept to its size, and whether anybody looked.
fn within_cap(role: &'static str, most: u32, samples: u64) -> Result<(), Fault> {
    match (most, samples) {
        (_, 0) => Err(Fault::Unwatched { what: format!("server connections on the {role} were never counted") }),
        (most, _) if most > POOL_SIZE => Err(Fault::CapExceeded { role, most, cap: POOL_SIZE }),
        _ => Ok(()),
    }
}

fn invariant(
    cluster: &Cluster,
    role: &'static str,
    what: &'static str,
    question: &str,
    want: i64,
) -> Result<(), Fault> {
    let (got, want) = (cluster.psql(APP_DATABASE, question)?, want.to_string());
    if got == want { Ok(()) } else { Err(Fault::Invariant { what, role, want, got }) }
}

/// Waits until the server has no connection of pgweir's any more.
fn connections_closed(cluster: &Cluster, role: &'static str) -> Result<(), Fault> {
    let deadline = Instant::now() + CLOSE_LIMIT;
    loop {
        match cluster.count_connections(&ConnectionFilter::user(APP_USER))? {
            0 => return Ok(()),
            count if Instant::now() >= deadline => return Err(Fault::LeftConnections { count, role }),
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// The counters that stand for defects; each must be there and 0.
fn defects(text: &str) -> Vec<Fault> {
    let must_be_zero: [Metric; 2] = [metrics::SESSIONS_PANICKED, metrics::BROKEN_INVARIANTS];
    let fault = |Metric { name, .. }: Metric| match sum(text, name, "") {
        Some(0.0) => None,
        value => {
            let value = value.map_or_else(|| "absent".to_owned(), |value| value.to_string());
            Some(Fault::Defects { metric: name, value })
        }
    };
    must_be_zero.into_iter().filter_map(fault).collect()
}

/// The sum of all series of a metric with this label; `None` if there is none.
///
/// Source: Prometheus docs, "Exposition formats", text format 0.0.4.
fn sum(text: &str, name: &str, label: &str) -> Option<f64> {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // Up to the last brace: a label's value may hold anything else.
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once('}')?,
            None => ("", rest.strip_prefix(' ')?),
        };
        if labels.contains(label) { value.trim().parse::<f64>().ok() } else { None }
    });
    values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

/// A metric that counts, as a number; below 0 is 0.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast of a float saturates")]
fn whole(value: f64) -> u64 {
    value as u64
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().rev().collect();
    let mut left = LOG_TAIL;
    let fits = |line: &&&str| {
        left = left.saturating_sub(line.len());
        left > 0
    };
    let mut kept: Vec<&str> = lines.iter().take_while(fits).copied().collect();
    kept.reverse();
    kept.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP pgweir_clients Clients, by state.\n\
                        # TYPE pgweir_clients gauge\n\
                        pgweir_clients{database=\"a\",state=\"waiting\"} 3\n\
                        pgweir_clients{database=\"b}\",state=\"waiting\"} 4\n\
                        pgweir_clients{database=\"a\",state=\"idle\"} 100\n\
                        pgweir_clients_accepted_total 7\n\
                        pgweir_sessions_panicked_total 0\n";

    #[test]
    fn a_metric_is_summed_over_its_series_and_only_those() {
        #[rustfmt::skip]
        let table = [
            ("a label",       "pgweir_clients",                "state=\"waiting\"", Some(7.0)),
            ("all",           "pgweir_clients",                "",                  Some(107.0)),
            ("without label", "pgweir_clients_accepted_total", "",                  Some(7.0)),
            ("a zero",        "pgweir_sessions_panicked_total", "",                 Some(0.0)),
            ("absent",        "pgweir_servers",                "",                  None),
            ("no such label", "pgweir_clients",                "state=\"active\"",  None),
        ];
        for (name, metric, label, want) in table {
            assert_eq!(sum(TEXT, metric, label), want, "{name}");
        }
    }

    #[test]
    fn a_defect_counter_that_is_absent_is_a_fault_like_one_that_counts() {
        let found: Vec<String> = defects(TEXT).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["pgweir counts pgweir_broken_invariants_total = absent, must be 0"]);
        let counting = "pgweir_sessions_panicked_total 2\npgweir_broken_invariants_total 0\n";
        let found: Vec<String> = defects(counting).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["pgweir counts pgweir_sessions_panicked_total = 2, must be 0"]);
    }

    #[test]
    fn the_cap_is_kept_only_if_somebody_looked() {
        #[rustfmt::skip]
        let table = [
            ("below",      POOL_SIZE - 1, 9, true),
            ("at the cap", POOL_SIZE,     9, true),
            ("above",      POOL_SIZE + 1, 9, false),
            ("unwatched",  0,             0, false),
        ];
        for (name, most, samples, want) in table {
            assert_eq!(within_cap("primary", most, samples).is_ok(), want, "{name}");
        }
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_whole_lines() {
        let line = "x".repeat(999);
        let log = format!("first\n{line}\n{line}\n{line}\nlast\n");
        let want = format!("first\n{line}\n{line}\n{line}\nlast");
        assert_eq!(tail(&log), want);
        let before_it = format!("{line}\n{log}");
        assert_eq!(tail(&before_it), want);
        assert_eq!(tail(""), "");
    }
}

//! Pgweirs that have hungry clients.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgweir_harness::Pgweir;
use pgweir_harness::wire::{Wire, WireError};
use tokio::task::{JoinHandle, spawn_blocking};

use super::PERIOD;
use crate::exec::wrapped::{Wrapped, Wrapping};
use crate::support::{PASSWORD, Place, start_pgweir};

/// The variables of the URLs of one `pgweir exec`.
const VARIABLES: [&str; 2] = ["DATABASE_URL", "HEROKU_POSTGRESQL_OTHER_URL"];

/// `query_wait_timeout` of those that wrap.
const QUERY_WAIT_TIMEOUT: Duration = Duration::from_mins(1);

/// What a client saw.
#[derive(Debug, Default)]
pub(super) struct Served {
    pub(super) queries: u32,
    /// The longest time that it waited for an answer, or for its pgweir to end without one.
    pub(super) longest: Duration,
    pub(super) refused: Vec<String>,
}

/// A client that always has a query, until it is told to stop or its pgweir ends. How many were answered it counts in `answered`.
pub(super) async fn hungry(
    address: SocketAddr,
    name: String,
    database: String,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU32>,
) -> Served {
    let mut served = Served::default();
    let begun = Instant::now();
    let Ok(mut client) = Wire::connect(address).await else { return served };
    // The limit is pgweir's.
    client.set_patience(QUERY_WAIT_TIMEOUT + Duration::from_secs(10));
    let parameters = [("user", &*name), ("database", &*database), ("application_name", "hungry")];
    let login = client.login_with(&parameters, PASSWORD).await;
    served.longest = begun.elapsed();
    if let Err(error) = login {
        let text = error.to_string();
        if matches!(error, WireError::Late { .. }) || text.contains("53300") || text.contains("query_wait_timeout") {
            served.refused.push(text);
        }
        return served;
    }
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let outcome = client.query("SELECT pg_sleep(0.05)").await;
        served.longest = served.longest.max(begun.elapsed());
        match outcome {
            Ok(outcome) if outcome.sqlstate().is_empty() => {
                served.queries += 1;
                answered.store(served.queries, Ordering::Relaxed);
            }
            // Its pgweir ends.
            Ok(outcome) if outcome.sqlstate().starts_with("57") || outcome.sqlstate().starts_with("08") => break,
            Ok(outcome) => served.refused.push(format!("{outcome:?}")),
            Err(error) => {
                if matches!(error, WireError::Late { .. }) {
                    served.refused.push(error.to_string());
                }
                break;
            }
        }
    }
    served
}

/// The program, as it was started.
enum Program {
    /// `pgweir serve` with a file.
    Serves(Pgweir),
    /// `pgweir exec` with a command that waits until its standard input is closed, or for SIGTERM.
    Wraps(Wrapped),
}

/// A pgweir and its clients.
pub(super) struct Sidecar {
    program: Program,
    clients: Vec<JoinHandle<Served>>,
    /// How many queries of each were answered.
    answered: Vec<Arc<AtomicU32>>,
    since: Instant,
}

/// What is left of one.
pub(super) struct Ended {
    pub(super) served: Vec<Served>,
    pub(super) lived: Duration,
    /// How often the server had no room for a login of its, as its log has it.
    pub(super) refusals: usize,
}

impl Sidecar {
    /// One that serves, with so many clients of each of these databases.
    pub(super) async fn start(
        toml: String,
        name: &str,
        databases: &[&str],
        clients: u32,
        stop: &Arc<AtomicBool>,
    ) -> Self {
        let pgweir = spawn_blocking(|| start_pgweir(toml)).await.unwrap();
        let doors: Vec<_> = databases.iter().map(|database| (pgweir.addr(), *database)).collect();
        Self::with_clients(Program::Serves(pgweir), name, &doors, clients, stop)
    }

    /// A `pgweir exec` for these databases, with so many clients of each, and further variables. Each database has a URL, which
    /// the command says.
    pub(super) async fn wrap(
        place: &Place<'_>,
        databases: &[&str],
        further: &[(&str, &str)],
        clients: u32,
        stop: &Arc<AtomicBool>,
    ) -> Self {
        let script = "echo \"$DATABASE_URL $HEROKU_POSTGRESQL_OTHER_URL\"; read line; exit 0";
        let mut wrapping = Wrapping::new(&["exec", "--", "sh", "-c", script])
            .var("PGWEIR_FLEET_CENSUS_PERIOD", PERIOD)
            .var("PGWEIR_CATALOG_CHECK_INTERVAL", "1h")
            .var("PGWEIR_QUERY_WAIT_TIMEOUT", &format!("{}s", QUERY_WAIT_TIMEOUT.as_secs()))
            .var("PGWEIR_DEFAULT_POOL_SIZE", "5");
        for (variable, database) in VARIABLES.iter().zip(databases) {
            let url = format!("postgres://{}:{PASSWORD}@{}/{database}", place.name, place.cluster.addr());
            wrapping = wrapping.var(variable, &url);
        }
        for (name, value) in further {
            wrapping = wrapping.var(name, value);
        }
        let wrapped = spawn_blocking(|| {
            let wrapped = wrapping.start();
            wrapped.await_said("sslmode");
            wrapped
        });
        let wrapped = wrapped.await.unwrap();
        let said = wrapped.said();
        let addresses = said.split(['@', '/']).filter_map(|part| part.parse().ok());
        let doors: Vec<_> = addresses.zip(databases.iter().copied()).collect();
        assert_eq!(doors.len(), databases.len(), "{said}");
        Self::with_clients(Program::Wraps(wrapped), &place.name, &doors, clients, stop)
    }

    fn with_clients(
        program: Program,
        name: &str,
        doors: &[(SocketAddr, &str)],
        clients: u32,
        stop: &Arc<AtomicBool>,
    ) -> Self {
        let mut sidecar = Self { program, clients: Vec::new(), answered: Vec::new(), since: Instant::now() };
        for (address, database) in doors {
            for _ in 0..clients {
                let answered = Arc::new(AtomicU32::new(0));
                let (name, database) = (name.to_owned(), (*database).to_owned());
                let client = hungry(*address, name, database, stop.clone(), answered.clone());
                sidecar.clients.push(tokio::spawn(client));
                sidecar.answered.push(answered);
            }
        }
        sidecar
    }

    #[track_caller]
    pub(super) fn signal(&self, number: i32) {
        match &self.program {
            Program::Serves(pgweir) => pgweir.signal(number).unwrap(),
            Program::Wraps(wrapped) => wrapped.signal(number),
        }
    }

    /// Whether each of its clients was answered something.
    pub(super) fn has_served_everybody(&self) -> bool {
        self.answered.iter().all(|answered| answered.load(Ordering::Relaxed) > 0)
    }

    /// Its end, and what its clients saw. One that serves is killed, one that wraps ends as soon as its command does.
    pub(super) async fn end(self) -> Ended {
        let Self { program, clients, since, .. } = self;
        let log = spawn_blocking(move || match program {
            Program::Serves(pgweir) => pgweir.log(),
            Program::Wraps(wrapped) => wrapped.finish().err,
        });
        let log = log.await.unwrap();
        let mut served = Vec::new();
        for client in clients {
            served.push(client.await.unwrap());
        }
        let is_refusal = |line: &&str| line.contains("server login failed") && line.contains("too many ");
        Ended { served, lived: since.elapsed(), refusals: log.lines().filter(is_refusal).count() }
    }

    /// The same when its clients have been told to stop: they have seen what they see before it ends.
    pub(super) async fn end_quietly(mut self) -> Ended {
        let mut served = Vec::new();
        for client in std::mem::take(&mut self.clients) {
            served.push(client.await.unwrap());
        }
        Ended { served, ..self.end().await }
    }
}

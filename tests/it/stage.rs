//! A [`Stage`] is a place with a pgweir before it, with more questions to the server than [`Site`](crate::support::Site)
//! answers, and optionally a proxy in between; and the dice and the expectations of the tests that break things.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pgweir_harness::wire::{Message, Outcome, Wire, WireError};
use pgweir_harness::{FaultProxy, Pgweir, PgweirOptions, SUPERUSER, SUPERUSER_PASSWORD};

use crate::support::{self, Place, primary};

pub(crate) use crate::support::SOON;

/// A place with a pgweir before it. Clients need no password.
pub(crate) struct Stage<'a> {
    /// Where its server connections lead.
    pub(crate) place: Place<'a>,
    /// The pooler.
    pub(crate) pgweir: Pgweir,
}

impl Stage<'static> {
    /// A stage on the shared primary with these settings of pgweir.
    pub(crate) fn new(settings: &[(&str, &str)]) -> Self {
        Self::at(Place::on(primary()), settings, &[])
    }

    /// A stage on the shared primary, with a proxy between pgweir and Postgres.
    pub(crate) fn behind_proxy(settings: &[(&str, &str)]) -> (Self, FaultProxy) {
        let place = Place::on(primary());
        let proxy = FaultProxy::start(place.cluster.addr()).unwrap();
        let port = proxy.port().to_string();
        let mut all = vec![("databases.PLACE.port", port.as_str())];
        all.extend_from_slice(settings);
        (Self::at(place, &all, &[]), proxy)
    }
}

impl<'a> Stage<'a> {
    /// A stage at this place, with settings and environment of pgweir.
    pub(crate) fn at(place: Place<'a>, settings: &[(&str, &str)], env: &[(&str, &str)]) -> Self {
        // A test that hangs for want of a server connection is to say so.
        let mut all = vec![("query_wait_timeout", "30s"), ("shutdown_timeout", "5s")];
        all.extend_from_slice(settings);
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let options = PgweirOptions { env, ..support::options(place.toml(&all)) };
        Self { pgweir: Pgweir::start_with(options).unwrap(), place }
    }

    /// Where clients connect.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.pgweir.addr()
    }

    /// The name of role, user and databases.
    pub(crate) fn name(&self) -> &str {
        &self.place.name
    }

    /// A client that has logged in.
    pub(crate) async fn client(&self) -> Wire {
        self.try_client().await.unwrap()
    }

    /// A client, or why it could not log in.
    pub(crate) async fn try_client(&self) -> Result<Wire, WireError> {
        Wire::open(self.addr(), self.name(), self.name(), "").await
    }

    /// A client that logs in with further startup parameters.
    pub(crate) async fn client_with(&self, parameters: &[(&str, &str)]) -> Wire {
        let mut wire = Wire::connect(self.addr()).await.unwrap();
        let mut all = vec![("user", self.name()), ("database", self.name())];
        all.extend_from_slice(parameters);
        wire.login_with(&all, "").await.unwrap();
        wire
    }

    /// Runs `sql` in the database as the superuser, past pgweir.
    pub(crate) fn sql(&self, sql: &str) -> String {
        self.place.psql(sql)
    }

    /// Runs `sql` in the database as the place's role, past pgweir: what it creates belongs to that role.
    pub(crate) fn own_sql(&self, sql: &str) -> String {
        self.place.psql(&format!("SET ROLE {}; {sql}", self.name()))
    }

    /// Process ids of the backends that serve pgweir, lowest first.
    pub(crate) fn backends(&self) -> Vec<i32> {
        self.pids("true")
    }

    /// Process ids of those backends for which a condition on `pg_stat_activity` holds.
    pub(crate) fn pids(&self, condition: &str) -> Vec<i32> {
        let sql = format!(
            "SELECT pid FROM pg_stat_activity WHERE usename = '{}' AND ({condition}) ORDER BY pid",
            self.name()
        );
        let answer = self.place.cluster.psql("postgres", &sql).unwrap();
        answer.lines().map(|pid| pid.parse().unwrap()).collect()
    }

    /// Whether a backend runs a statement with this text in it.
    pub(crate) fn is_running(&self, text: &str) -> bool {
        !self.pids(&format!("state = 'active' AND query LIKE '%{text}%'")).is_empty()
    }

    /// Ends a backend as an operator would.
    pub(crate) fn terminate(&self, pid: i32) {
        let answer = self.place.cluster.psql("postgres", &format!("SELECT pg_terminate_backend({pid})")).unwrap();
        assert_eq!(answer, "t", "backend {pid} was there to be terminated");
    }

    /// The value of a metric, summed over its labels; 0 when it is not there.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (status, body) = self.pgweir.http_get("/metrics").unwrap();
        assert_eq!(status, 200, "{body}");
        support::metric_in(&body, name, &[])
    }
}

/// A lock in a stage's database that is held past pgweir: queries that ask for it run until it is given up, however slow the machine is.
pub(crate) struct Latch(Wire);

impl Latch {
    /// What a statement calls to be kept.
    pub(crate) const CALL: &str = "pg_advisory_xact_lock_shared(4711)";

    /// Takes the lock.
    pub(crate) async fn shut(stage: &Stage<'_>) -> Self {
        let addr = stage.place.cluster.addr();
        let mut wire = Wire::open(addr, SUPERUSER, stage.name(), SUPERUSER_PASSWORD).await.unwrap();
        succeed(&mut wire, "SELECT pg_advisory_lock(4711)").await;
        Self(wire)
    }

    /// A query that is kept, and then has this answer.
    pub(crate) fn query(text: &str) -> String {
        format!("SELECT '{text}' FROM {}", Self::CALL)
    }

    /// Gives the lock up.
    pub(crate) async fn open(mut self) {
        succeed(&mut self.0, "SELECT pg_advisory_unlock(4711)").await;
    }
}

/// How the peer ended a connection.
#[derive(Debug)]
pub(crate) struct End {
    /// What it sent before.
    pub(crate) messages: Vec<Message>,
}

impl End {
    /// The SQLSTATE of the last error before the end; empty without one.
    pub(crate) fn sqlstate(&self) -> String {
        let errors = self.messages.iter().rev().filter(|message| message.tag == b'E');
        errors.filter_map(Message::server_error).map(|error| error.sqlstate().to_owned()).next().unwrap_or_default()
    }
}

/// Reads to the end of the connection, which must come soon.
pub(crate) async fn read_to_end(wire: &mut Wire) -> End {
    let start = Instant::now();
    let mut messages = Vec::new();
    loop {
        match wire.recv().await {
            Ok(message) => messages.push(message),
            Err(WireError::Closed { .. } | WireError::Io { .. }) => return End { messages },
            Err(error) => panic!("{error}, after {messages:?}"),
        }
        assert!(start.elapsed() < SOON, "no end within {SOON:?}: {messages:?}");
    }
}

/// The value of a query that must succeed.
pub(crate) async fn value(wire: &mut Wire, sql: &str) -> String {
    let outcome = succeed(wire, sql).await;
    outcome.value().unwrap_or_default().to_owned()
}

/// A simple query that must succeed.
#[track_caller]
pub(crate) fn succeed(wire: &mut Wire, sql: &str) -> impl Future<Output = Outcome> {
    let caller = std::panic::Location::caller();
    async move {
        let outcome = match wire.query(sql).await {
            Ok(outcome) => outcome,
            Err(error) => panic!("{caller}: {sql}: {error}"),
        };
        assert_eq!(outcome.error, None, "{caller}: {sql}");
        outcome
    }
}

/// A simple query that must fail with this SQLSTATE and leave this transaction status.
#[track_caller]
pub(crate) fn fail(wire: &mut Wire, sql: &str, sqlstate: &str, status: u8) -> impl Future<Output = Outcome> {
    let caller = std::panic::Location::caller();
    async move {
        let outcome = match wire.query(sql).await {
            Ok(outcome) => outcome,
            Err(error) => panic!("{caller}: {sql}: {error}"),
        };
        assert_eq!(outcome.sqlstate(), sqlstate, "{caller}: {sql}: {outcome:?}");
        assert_eq!(char::from(outcome.status), char::from(status), "{caller}: {sql}: {outcome:?}");
        outcome
    }
}

/// A small seeded random generator (splitmix64, by Sebastiano Vigna's description): a test's choices can be repeated
/// from its seed whatever version of a library it is built with.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    /// Dice with this seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed from the environment variable `PGWEIR_SEED`, else from the clock; printed, so that a failure can be
    /// looked into.
    pub(crate) fn seed(test: &str) -> u64 {
        let given = std::env::var("PGWEIR_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            u64::try_from(now.as_nanos() & u128::from(u32::MAX)).unwrap()
        });
        println!("{test}: PGWEIR_SEED={seed}");
        seed
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which must not be 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// An index below `end`, which must not be 0.
    pub(crate) fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(u64::try_from(end).unwrap())).unwrap()
    }

    /// One of these.
    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.index(from.len())]
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// A duration below `end`.
    pub(crate) fn time_below(&mut self, end: Duration) -> Duration {
        Duration::from_micros(self.below(u64::try_from(end.as_micros()).unwrap().max(1)))
    }
}

/// Runs a test's future on a runtime of its own, with a limit that a hang does not outlive.
pub(crate) fn run<T>(limit: Duration, test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    runtime.block_on(local.run_until(async move {
        let Ok(done) = tokio::time::timeout(limit, test).await else {
            panic!("the test did not end within {limit:?}");
        };
        done
    }))
}

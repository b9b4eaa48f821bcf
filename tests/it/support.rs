//! What the tests share: one primary, a place of one's own on it, clients, and the watch over the cap.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use pgweir_harness::wire::{Outcome, Wire};
use pgweir_harness::{
    Cluster, ClusterOptions, ConnectionFilter, ConnectionWatch, Pgweir, PgweirOptions, pgweir_toml, secrets, wait_until,
};

/// Longest wait for something that should come at once; generous, since the machine may be busy.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// The password of every place's role.
pub(crate) const PASSWORD: &str = "place-secret";

/// The primary that tests share. It asks for SCRAM. It lives until the process ends, and dies with it.
pub(crate) fn primary() -> &'static Cluster {
    static PRIMARY: OnceLock<Cluster> = OnceLock::new();
    PRIMARY.get_or_init(|| {
        Cluster::start(ClusterOptions::default().set("max_connections", "300").set("max_prepared_transactions", "10"))
            .unwrap()
    })
}

/// A role and a database of the same name on a cluster, for one test alone: what it counts there is
/// its own doing.
#[derive(Clone, Debug)]
pub(crate) struct Place<'a> {
    /// The cluster.
    pub(crate) cluster: &'a Cluster,
    /// The role's and the database's name.
    pub(crate) name: String,
}

impl<'a> Place<'a> {
    /// A new role and a new database that it owns.
    pub(crate) fn on(cluster: &'a Cluster) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let name = format!("place{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        cluster.psql("postgres", &format!("CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")).unwrap();
        cluster.psql("postgres", &format!("CREATE DATABASE {name} OWNER {name}")).unwrap();
        Self { cluster, name }
    }

    /// pgweir's configuration: client and server names are the place's, so that answers are the
    /// same on both ways; clients are trusted, since SCRAM has tests of its own; then `settings`.
    /// In their keys `PLACE` is the place's name.
    pub(crate) fn toml(&self, settings: &[(&str, &str)]) -> String {
        let port = self.cluster.port().to_string();
        let fixed = [
            ("auth_type", "trust"),
            ("databases.PLACE.host", self.cluster.host()),
            ("databases.PLACE.port", &port),
            ("databases.PLACE.user", &self.name),
            ("databases.PLACE.password", PASSWORD),
            ("users.PLACE.password", PASSWORD),
        ];
        let named: Vec<(String, &str)> =
            fixed.iter().chain(settings).map(|(key, value)| (key.replace("PLACE", &self.name), *value)).collect();
        let named: Vec<(&str, &str)> = named.iter().map(|(key, value)| (key.as_str(), *value)).collect();
        pgweir_toml(self.cluster, &named)
    }

    /// Runs SQL in this database as the superuser, past pgweir.
    pub(crate) fn psql(&self, sql: &str) -> String {
        self.cluster.psql(&self.name, sql).unwrap()
    }

    /// A client of Postgres itself.
    pub(crate) async fn direct(&self) -> Wire {
        Wire::open(self.cluster.addr(), &self.name, &self.name, PASSWORD).await.unwrap()
    }

    /// Client connections of this database on the server, now.
    pub(crate) fn servers(&self) -> u32 {
        self.cluster.count_connections(&self.filter()).unwrap()
    }

    /// Watches that there are never more of them than `cap`.
    pub(crate) fn cap_watch(&self, cap: u32) -> CapWatch {
        CapWatch::start(self.cluster, &self.filter(), cap)
    }

    /// [`Place::cap_watch`] that looks more seldom, for a test that is to leave the server most of its time.
    pub(crate) fn cap_watch_every(&self, cap: u32, every: Duration) -> CapWatch {
        CapWatch::of(self.cluster.watch_connections_every(&self.filter(), every).unwrap(), cap)
    }

    /// The role's connections to this database. By the role, too: those of the harness's superuser, which it tells
    /// by their `application_name`, bear none in their first microseconds.
    pub(crate) fn filter(&self) -> ConnectionFilter {
        let (user, database) = (Some(self.name.clone()), Some(self.name.clone()));
        ConnectionFilter { user, database, ..ConnectionFilter::default() }
    }

    /// Process ids of this database's server connections, sorted.
    pub(crate) fn server_pids(&self) -> Vec<i32> {
        let sql = format!(
            "SELECT pid FROM pg_stat_activity WHERE datname = '{0}' AND usename = '{0}' ORDER BY pid",
            self.name
        );
        let pids = self.cluster.psql("postgres", &sql).unwrap();
        pids.lines().map(|pid| pid.parse().unwrap()).collect()
    }
}

/// A pgweir before a place of its own.
#[derive(Debug)]
pub(crate) struct Site<'a> {
    /// Where its server connections lead.
    pub(crate) place: Place<'a>,
    /// The program.
    pub(crate) pgweir: Pgweir,
}

impl Site<'static> {
    /// On the shared primary.
    pub(crate) fn start(settings: &[(&str, &str)]) -> Self {
        Self::before(Place::on(primary()), settings)
    }
}

impl<'a> Site<'a> {
    /// Before `place`.
    pub(crate) fn before(place: Place<'a>, settings: &[(&str, &str)]) -> Self {
        let pgweir = start_pgweir(place.toml(settings));
        Self { place, pgweir }
    }

    /// The name of role, user and databases.
    pub(crate) fn name(&self) -> &str {
        &self.place.name
    }

    /// A client that has logged in through pgweir.
    pub(crate) async fn client(&self) -> Wire {
        self.client_with(&[]).await
    }

    /// A client with further startup parameters.
    pub(crate) async fn client_with(&self, parameters: &[(&str, &str)]) -> Wire {
        let mut wire = Wire::connect(self.pgweir.addr()).await.unwrap();
        let own = [("user", self.name()), ("database", self.name())];
        let all: Vec<(&str, &str)> = own.iter().chain(parameters).copied().collect();
        wire.login_with(&all, PASSWORD).await.unwrap();
        wire
    }

    /// The value of a series at `/metrics`, 0 when there is none: `series` is the name and, in any
    /// order, some of the labels as `key="value"`. Several that match are added up.
    pub(crate) fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let (status, body) = self.pgweir.http_get("/metrics").unwrap();
        assert_eq!(status, 200, "{body}");
        metric_in(&body, name, labels)
    }
}

/// Sums the samples of `name` whose labels include all of `labels`.
pub(crate) fn metric_in(body: &str, name: &str, labels: &[&str]) -> f64 {
    let samples = body.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (found, own) = series.split_once('{').unwrap_or((series, ""));
        let matches = found == name && labels.iter().all(|label| own.contains(label));
        matches.then(|| value.parse::<f64>().unwrap())
    });
    samples.sum()
}

/// Starts the program under test.
pub(crate) fn start_pgweir(toml: String) -> Pgweir {
    Pgweir::start_with(options(toml)).unwrap()
}

/// How the program under test is started.
pub(crate) fn options(toml: String) -> PgweirOptions {
    let bin = Some(PathBuf::from(env!("CARGO_BIN_EXE_pgweir")));
    PgweirOptions { toml, bin, ..PgweirOptions::default() }
}

/// The program without the variables of this process that steer the tests: they are no settings of its.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgweir"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PGWEIR_")) {
        command.env_remove(name);
    }
    command
}

/// What `pgweir SUBCOMMAND` says of a configuration, and how it ends.
pub(crate) fn run_with(subcommand: &str, toml: &str) -> Output {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("pgweir.toml");
    std::fs::write(&file, toml).unwrap();
    secrets::keep_config(toml);
    let output = program().args([subcommand, "--config"]).arg(&file).output().unwrap();
    secrets::assert_none_in(subcommand, [&output.stdout[..], &output.stderr].concat());
    output
}

/// Samples the number of server connections again and again. When it ends, by
/// [`CapWatch::finish`] or by itself, it fails the test if there was ever one too many.
#[derive(Debug)]
pub(crate) struct CapWatch {
    watch: ConnectionWatch,
    cap: u32,
}

impl CapWatch {
    /// Watches the connections that `filter` picks on `cluster`.
    pub(crate) fn start(cluster: &Cluster, filter: &ConnectionFilter, cap: u32) -> Self {
        Self::of(cluster.watch_connections(filter).unwrap(), cap)
    }

    fn of(watch: ConnectionWatch, cap: u32) -> Self {
        wait_until(SOON, || watch.samples() > 0);
        Self { watch, cap }
    }

    /// The most connections seen at once so far.
    pub(crate) fn most(&self) -> u32 {
        self.watch.most()
    }

    /// How often it has looked.
    pub(crate) fn samples(&self) -> u64 {
        self.watch.samples()
    }

    /// Ends the watch; returns the most connections seen at once.
    pub(crate) fn finish(self) -> u32 {
        self.most()
    }
}

impl Drop for CapWatch {
    fn drop(&mut self) {
        if !thread::panicking() {
            let (most, cap, samples) = (self.watch.most(), self.cap, self.watch.samples());
            assert!(most <= cap, "{most} server connections at once in {samples} samples, cap {cap}");
        }
    }
}

/// Asserts that a query did what it should: no error and this single value.
#[track_caller]
pub(crate) fn assert_value(outcome: &Outcome, want: &str) {
    assert_eq!((outcome.value(), outcome.sqlstate()), (Some(want), ""), "{outcome:?}");
}

/// The server's process id that a client's query runs on.
pub(crate) async fn server_pid(client: &mut Wire) -> i32 {
    let outcome = client.query("SELECT pg_backend_pid()").await.unwrap();
    let pid = outcome.value().unwrap_or_else(|| panic!("{outcome:?}"));
    pid.parse().unwrap()
}

#[test]
fn samples_are_picked_by_name_and_labels() {
    let body = "# TYPE a counter\na{x=\"1\",y=\"2\"} 3\na{y=\"2\"} 4\nab{y=\"2\"} 50\nplain 6\n";
    #[rustfmt::skip]
    let table: [(&str, &str, &[&str], f64); 4] = [
        ("both match",   "a",     &["y=\"2\""],             7.0),
        ("one matches",  "a",     &["y=\"2\"", "x=\"1\""],  3.0),
        ("no labels",    "plain", &[],                      6.0),
        ("none",         "b",     &[],                      0.0),
    ];
    for (name, series, labels, want) in table {
        assert!((metric_in(body, series, labels) - want).abs() < 1e-9, "{name}");
    }
}

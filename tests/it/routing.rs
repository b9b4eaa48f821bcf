//! Reads on followers: where transactions run, that nobody sees less than was promised, and that nobody sees a follower
//! fail.
//!
//! | module | what |
//! |---|---|
//! | this one | a primary with two followers, which the tests share one after the other |
//! | `ways` | what goes where, by every protocol, and what the client asks for |
//! | `drivers` | psycopg and tokio-postgres: what is prepared runs on all servers; Redash's way on followers alone |
//! | `failures` | refusals, conflicts, followers that are lost, promoted, and all gone |
//! | `edges` | promotions under a write, clients that vanish, ends of transactions and batches, waits without a lease |
//! | `leaving` | cancels, clients that vanish and a stop, while reads run on followers |
//! | `listeners` | clients that listen, and read on followers |
//! | `promotions` | a follower takes the primary's place under load |
//! | `registers` | histories of registers, checked against each level of freshness |
//! | `shares` | followers that are too far behind, and weights |

mod drivers;
mod edges;
mod failures;
mod leaving;
mod listeners;
mod promotions;
mod registers;
mod shares;
mod ways;

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use pgweir_harness::wire::Wire;
use pgweir_harness::{Cluster, ClusterOptions, Pgweir, PgweirOptions, wait_until_async};

use crate::stage::Stage;
use crate::support::{Place, SOON, metric_in, options};

/// A primary and two streaming followers of it.
pub(crate) struct Family {
    primary: Cluster,
    followers: [Cluster; 2],
}

impl Family {
    fn start() -> Self {
        // Conflicts are told at once: what holds replay back is a pause of the test's own.
        Self::with_delay("0")
    }

    /// With this as `max_standby_streaming_delay`.
    pub(crate) fn with_delay(delay: &str) -> Self {
        let options = ClusterOptions::default().set("cluster_name", "primary").set("max_connections", "100");
        let primary = Cluster::start(options).unwrap();
        let follower = |name: &str| {
            let own = ClusterOptions::default().set("cluster_name", name).set("max_standby_streaming_delay", delay);
            primary.follower(own).unwrap()
        };
        let followers = [follower("one"), follower("two")];
        Self { primary, followers }
    }

    /// Brings everything back to where it was, whatever a test before has left.
    fn mend(&mut self) {
        for (follower, name) in self.followers.iter_mut().zip(["one", "two"]) {
            if follower.pid().is_none() {
                follower.restart().unwrap();
            }
            if follower.psql("postgres", "SELECT pg_is_in_recovery()").unwrap() == "f" {
                let own = ClusterOptions::default().set("cluster_name", name).set("max_standby_streaming_delay", "0");
                *follower = self.primary.follower(own).unwrap();
            }
            follower.psql("postgres", "SELECT pg_wal_replay_resume()").unwrap();
        }
        for follower in &self.followers {
            self.primary.await_replay(follower, SOON).unwrap();
        }
    }

    /// A place on the primary that is there on the followers, too, and whose statements are logged.
    pub(crate) fn place(&self) -> Place<'_> {
        let place = Place::on(&self.primary);
        place.psql(&format!("ALTER ROLE {} SET log_statement = 'all'", place.name));
        for follower in &self.followers {
            self.primary.await_replay(follower, SOON).unwrap();
        }
        place
    }

    /// A pgweir that knows of both followers. In keys and values `PLACE` is the place's name.
    fn stage(&self, settings: &[(&str, &str)]) -> Stage<'_> {
        self.stage_with(settings, |options| options)
    }

    /// The same, with other options.
    fn stage_with(&self, settings: &[(&str, &str)], change: impl FnOnce(PgweirOptions) -> PgweirOptions) -> Stage<'_> {
        let followers = self.list();
        let mut all = vec![
            ("databases.PLACE.followers", followers.as_str()),
            ("read_routing", "auto"),
            ("read_sample_interval", "5ms"),
            ("query_wait_timeout", "30s"),
            ("shutdown_timeout", "5s"),
        ];
        all.extend_from_slice(settings);
        let place = self.place();
        let all: Vec<_> = all.iter().map(|(key, value)| (*key, value.replace("PLACE", &place.name))).collect();
        let all: Vec<_> = all.iter().map(|(key, value)| (*key, &**value)).collect();
        let options = change(options(place.toml(&all)));
        Stage { pgweir: Pgweir::start_with(options).unwrap(), place }
    }

    /// The followers, as a setting names them.
    pub(crate) fn list(&self) -> String {
        let [one, two] = &self.followers;
        format!("127.0.0.1:{}, 127.0.0.1:{}", one.port(), two.port())
    }

    /// How often a statement with this in it has run on the primary, and on the followers.
    fn ran(&self, tag: &str) -> (usize, usize) {
        // A server logs its settings, too.
        let of = |cluster: &Cluster| {
            let log = cluster.log_text();
            log.lines()
                .filter(|line| line.contains(tag) && (line.contains("execute ") || line.contains("statement: ")))
                .count()
        };
        (of(&self.primary), self.followers.iter().map(of).sum())
    }

    /// Clients that followers have read rows of the table `accounts` for in this place, as far as they tell.
    #[cfg(feature = "grammar")]
    pub(crate) fn serving(&self, place: &Place<'_>) -> usize {
        let asks = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE usename = '{}' AND query LIKE '%FROM accounts%'",
            place.name
        );
        let of = |cluster: &Cluster| cluster.psql("postgres", &asks).unwrap().parse::<usize>().unwrap();
        self.followers.iter().map(of).sum()
    }

    fn pause(&self) {
        for follower in &self.followers {
            follower.psql("postgres", "SELECT pg_wal_replay_pause()").unwrap();
        }
    }

    fn resume(&self) {
        for follower in &self.followers {
            follower.psql("postgres", "SELECT pg_wal_replay_resume()").unwrap();
        }
    }

    /// Waits until a read goes to a follower.
    async fn until_routed(&self, client: &mut Wire) {
        wait_until_async(SOON, async || {
            let at = client.query("BEGIN READ ONLY").await.unwrap();
            assert_eq!(at.error, None);
            let outcome = client.query("SELECT current_setting('cluster_name')").await.unwrap();
            let at = outcome.value().unwrap_or_else(|| panic!("{outcome:?}")).to_owned();
            client.query("COMMIT").await.unwrap();
            at != "primary"
        })
        .await;
    }
}

/// The family, for one test at a time.
pub(crate) fn family() -> MutexGuard<'static, Family> {
    static FAMILY: OnceLock<Mutex<Family>> = OnceLock::new();
    let family = FAMILY.get_or_init(|| Mutex::new(Family::start()));
    let mut family = family.lock().unwrap_or_else(PoisonError::into_inner);
    family.mend();
    family
}

/// Where a transaction that only reads is, asked within.
async fn at(client: &mut Wire) -> String {
    crate::stage::value(client, "SELECT current_setting('cluster_name')").await
}

/// Whether this is known of a follower, as last told.
fn in_state(pgweir: &Pgweir, cluster: &Cluster, state: &str) -> bool {
    let (_, body) = pgweir.http_get("/metrics").unwrap();
    let labels = [format!("server=\"{}\"", cluster.addr()), format!("state=\"{state}\"")];
    metric_in(&body, "pgweir_follower_state", &[&labels[0], &labels[1]]) > 0.5
}

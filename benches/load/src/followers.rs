//! What a primary is spared by followers, and what it costs the pooler to know which transactions may go there: the same load
//! through pgweirs that are set up differently, window by window in random order.

pub mod figures;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgweir_harness::{APP_DATABASE, APP_PASSWORD, APP_USER, Auth, Cluster, ClusterOptions, HarnessError};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::fault::Fault;
use crate::generate::{Order, Spec, Window};
use crate::generator::Generator;
use crate::login::Account;
use crate::machine::{Context, Usage};
use crate::mix;
use crate::pooler::{Pooler, Program, Reads, Setup};
use crate::rows;
use crate::workload::Workload;
use figures::{Counts, Figures, Report};

/// Rounds after which poolers and generators start anew; see [`trial`](crate::trial).
const ROUNDS_PER_START: usize = 5;

/// Load before the first round, so that the catalog and the positions are known and every server connection is open.
const FIRST: Order = Order { warm_up: Duration::ZERO, window: Duration::from_secs(1) };

/// Metrics are published once a second.
const PUBLISHED: Duration = Duration::from_millis(1300);

/// Server connections of a pool, the primary's and each follower's.
const POOL_SIZE: u32 = 20;

/// How long a follower may take to replay what the primary has written.
const REPLAYED: Duration = Duration::from_mins(1);

/// What is run, and how long.
#[derive(Debug)]
pub struct Plan {
    /// pgweir.
    pub program: Program,
    /// The window.
    pub order: Order,
    /// Windows of each contender in each scenario.
    pub rounds: usize,
    /// Per scenario, how long windows that were disturbed may be repeated; after that they count, and are counted.
    pub patience: Duration,
    /// Cores other processes may use on average in a window that counts.
    pub others_at_most: f64,
    /// Seed of the order of windows.
    pub seed: u64,
    /// Set by a signal.
    pub stop: &'static AtomicBool,
}

/// One load.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name on the command line and in the tables.
    pub name: &'static str,
    /// What it is, for the reader of the tables.
    pub about: &'static str,
    /// What clients send.
    pub workload: Workload,
    /// How many there are.
    pub clients: usize,
    /// How long each rests between two transactions.
    pub pause: Duration,
    /// How pgweir is set up for it, the one that the others are compared with first.
    pub contenders: &'static [Contender],
    /// The highest ratio of the pooler's CPU time per transaction, routing to none, that is good enough, and of whom that is
    /// asked. None: only reported.
    pub bar: Option<(f64, &'static [Contender])>,
}

/// Who writes has positions in the log asked for, which is not part of the bar: with it these are held, who need none.
const WITHOUT_POSITIONS: &[Contender] = &[Contender::Stays, Contender::Eventual];

/// Where nobody writes every read finds followers fresh enough, whatever is promised.
const READERS: &[Contender] = &[Contender::Off, Contender::Stays, Contender::Pool];

/// The loads. Clients that never rest write so often that hardly a read finds a follower that is fresh enough, unless it need
/// not be; those that rest are more like an application's.
pub const SCENARIOS: [Scenario; 6] = [
    Scenario {
        name: "mix-literals",
        about: "16 clients that never rest, nine reads and a write of ten, texts with literals",
        workload: Workload::Literals,
        clients: 16,
        pause: Duration::ZERO,
        contenders: &Contender::ALL,
        bar: Some((1.10, WITHOUT_POSITIONS)),
    },
    Scenario {
        name: "mix-prepared",
        about: "16 clients that never rest, nine reads and a write of ten by two prepared statements",
        workload: Workload::Parameters,
        clients: 16,
        pause: Duration::ZERO,
        contenders: &Contender::ALL,
        bar: Some((1.03, WITHOUT_POSITIONS)),
    },
    Scenario {
        name: "mix-resting",
        about: "100 clients that rest for 50 ms after each transaction, nine reads and a write of ten, texts with literals",
        workload: Workload::Literals,
        clients: 100,
        pause: Duration::from_millis(50),
        contenders: &Contender::ALL,
        bar: None,
    },
    Scenario {
        name: "read-literals",
        about: "16 clients that never rest, reads alone, texts with literals",
        workload: Workload::ReadLiterals,
        clients: 16,
        pause: Duration::ZERO,
        contenders: READERS,
        bar: Some((1.10, READERS)),
    },
    Scenario {
        name: "read-prepared",
        about: "16 clients that never rest, reads alone, by a prepared statement",
        workload: Workload::ReadParameters,
        clients: 16,
        pause: Duration::ZERO,
        contenders: READERS,
        bar: Some((1.03, READERS)),
    },
    Scenario {
        name: "literal-ridden",
        about: "16 clients that never rest, reads alone, no text like another: 1 to 50 keys in a list, literals of several types, comments",
        workload: Workload::Anew,
        clients: 16,
        pause: Duration::ZERO,
        contenders: READERS,
        bar: None,
    },
];

/// The loads whose names are asked for, as [`rows::select`] does it.
///
/// # Errors
///
/// As [`rows::select`].
pub fn select(wanted: &[String]) -> Result<Vec<Scenario>, String> {
    rows::choose(SCENARIOS.to_vec(), |scenario| scenario.name, wanted)
}

impl Scenario {
    /// What is asked of a contender.
    fn bar_of(&self, contender: Contender) -> Option<f64> {
        self.bar.filter(|(_, held)| contender != Contender::Off && held.contains(&contender)).map(|(bar, _)| bar)
    }
}

/// How pgweir is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// It knows of no followers.
    Off,
    /// `read_routing = "auto"`, and each client says `pgweir.route = primary`: every transaction is judged, and none is led elsewhere.
    Stays,
    /// `read_freshness = "session"`.
    Session,
    /// `read_freshness = "pool"`, the default.
    Pool,
    /// `read_freshness = "eventual"`.
    Eventual,
}

impl Contender {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Off, Self::Stays, Self::Session, Self::Pool, Self::Eventual];

    /// Its name in the tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Stays => "auto, reads stay",
            Self::Session => "auto, session",
            Self::Pool => "auto, pool",
            Self::Eventual => "auto, eventual",
        }
    }

    const fn freshness(self) -> Option<&'static str> {
        match self {
            Self::Off => None,
            Self::Session => Some("session"),
            Self::Stays | Self::Pool => Some("pool"),
            Self::Eventual => Some("eventual"),
        }
    }
}

/// A contender with its clients logged in. The generator goes first when dropped.
struct Lane {
    contender: Contender,
    generator: Generator,
    pooler: Pooler,
    before: Counts,
}

/// A primary and two followers.
struct Family {
    primary: Cluster,
    followers: [Cluster; 2],
}

impl Family {
    fn start() -> Result<Self, Fault> {
        // Nothing but the load is to cost anything, neither here nor now and then.
        let options = ClusterOptions::auth(Auth::Scram)
            .set("jit", "off")
            .set("autovacuum", "off")
            .set("checkpoint_timeout", "1h")
            .set("max_wal_size", "8GB");
        let primary = Cluster::start(options).map_err(failed)?;
        primary.psql(APP_DATABASE, &mix::table(APP_USER)).map_err(failed)?;
        primary.psql(APP_DATABASE, "VACUUM ANALYZE accounts").map_err(failed)?;
        let follower = || primary.follower(ClusterOptions::default()).map_err(failed);
        let followers = [follower()?, follower()?];
        Ok(Self { primary, followers })
    }

    fn settle(&self) -> Result<(), Fault> {
        self.followers.iter().try_for_each(|one| self.primary.await_replay(one, REPLAYED).map_err(failed))
    }

    fn postmasters(&self) -> Vec<u32> {
        [&self.primary].into_iter().chain(&self.followers).filter_map(Cluster::pid).collect()
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: HarnessError) -> Fault {
    Fault::Postgres(error.to_string())
}

impl Plan {
    /// Nothing has run yet.
    #[must_use]
    pub fn report(&self) -> Report {
        Report {
            context: Context::read(),
            subject: self.program.version.clone(),
            postgres: "Postgres".to_owned(),
            rounds: self.rounds,
            window_seconds: self.order.window.as_secs_f64(),
            warm_up_seconds: self.order.warm_up.as_secs_f64(),
            others_at_most: self.others_at_most,
            seed: self.seed,
            scenarios: Vec::new(),
        }
    }

    /// Runs these scenarios. `tell` gets a line of progress now and then.
    ///
    /// # Errors
    ///
    /// The first [`Fault`]; what ran before is in the report.
    pub fn run(&self, scenarios: &[Scenario], report: &mut Report, tell: &mut dyn FnMut(String)) -> Result<(), Fault> {
        let family = Family::start()?;
        report.postgres = format!("Postgres {}", family.primary.programs().version());
        for scenario in scenarios {
            let figures = self.scenario(scenario, &family, tell)?;
            tell(format!("{}: {}", scenario.name, figures.line()));
            report.scenarios.push(figures);
        }
        Ok(())
    }

    fn scenario(&self, scenario: &Scenario, family: &Family, tell: &mut dyn FnMut(String)) -> Result<Figures, Fault> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut figures = Figures::new(scenario);
        let mut waited = Duration::ZERO;
        for first in (0..self.rounds).step_by(ROUNDS_PER_START) {
            let mut lanes = self.start(scenario, family)?;
            let until = self.rounds.min(first + ROUNDS_PER_START);
            for _ in first..until {
                lanes.shuffle(&mut random);
                for lane in &mut lanes {
                    let window = self.undisturbed(lane, family, &mut figures, &mut waited)?;
                    figures.add(lane.contender, window);
                }
            }
            std::thread::sleep(PUBLISHED);
            for lane in &lanes {
                figures.count(lane.contender, Counts::read(&lane.pooler.metrics()?).since(&lane.before));
            }
            tell(format!("{}: {until}/{} rounds, {} windows dropped", scenario.name, self.rounds, figures.dropped));
        }
        figures.conclude();
        Ok(figures)
    }

    fn start(&self, scenario: &Scenario, family: &Family) -> Result<Vec<Lane>, Fault> {
        let followers: Vec<SocketAddr> = family.followers.iter().map(Cluster::addr).collect();
        let server = Account {
            addr: family.primary.addr(),
            user: APP_USER.to_owned(),
            password: APP_PASSWORD.to_owned(),
            database: APP_DATABASE.to_owned(),
            tls: false,
            options: String::new(),
        };
        let mut lanes = Vec::new();
        for contender in scenario.contenders.iter().copied() {
            let reads = contender.freshness().map(|freshness| Reads { followers: &followers, freshness });
            let setup = Setup { pool_size: POOL_SIZE, reads, ..Setup::default() };
            let pooler = Pooler::start(&self.program, &server, setup)?;
            let options = if contender == Contender::Stays { "-c pgweir.route=primary" } else { "" };
            let account = Account { options: options.to_owned(), ..pooler.account(&server) };
            let spec = Spec {
                watch: Some(pooler.pid()),
                pause: scenario.pause,
                servers: family.postmasters(),
                ..Spec::new(account, scenario.workload, scenario.clients)
            };
            let mut generator = Generator::start(&spec)?;
            generator.run(FIRST)?;
            lanes.push(Lane { contender, generator, pooler, before: Counts::default() });
        }
        family.settle()?;
        std::thread::sleep(PUBLISHED);
        for lane in &mut lanes {
            lane.before = Counts::read(&lane.pooler.metrics()?);
        }
        Ok(lanes)
    }

    /// One window in which others were quiet, or any window once `waited` has used up the patience.
    fn undisturbed(
        &self,
        lane: &mut Lane,
        family: &Family,
        figures: &mut Figures,
        waited: &mut Duration,
    ) -> Result<Window, Fault> {
        let mut ours = family.postmasters();
        ours.push(std::process::id());
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Fault::Interrupted);
            }
            // What the window before has left to be replayed is not this one's.
            family.settle()?;
            let begin = Instant::now();
            let before = Usage::now(&ours)?;
            let mut window = lane.generator.run(self.order)?;
            window.others = Usage::now(&ours)?.others_since(&before);
            if window.others <= self.others_at_most {
                return Ok(window);
            }
            if *waited >= self.patience {
                figures.disturbed += 1;
                return Ok(window);
            }
            figures.dropped += 1;
            *waited += begin.elapsed();
        }
    }
}

//! Interleaves the windows of one row: contenders take turns in random order, on connections that stay open, until
//! there are enough pairs of undisturbed windows.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::fault::Fault;
use crate::generate::{Order, Spec, Window};
use crate::generator::Generator;
use crate::login::{Account, Session};
use crate::machine::{Usage, anonymous_kib, parent};
use crate::pooler::{Pooler, Program, Setup};
use crate::rows::{Measure, Queries, Row};
use crate::syscalls::Tool;
use crate::workload::Workload;

/// Pairs after which both poolers and the generators start anew: a process's luck with its addresses is then part
/// of the spread, not of the figure.
const PAIRS_PER_START: usize = 5;

/// Fresh processes of each pooler that the memory row looks at.
const MEMORY_TRIES: usize = 3;

/// What all rows share.
#[derive(Debug)]
pub struct Plan {
    /// The Postgres behind the poolers, and the account clients use.
    pub server: Account,
    /// What the subject is compared with.
    pub baseline: Program,
    /// The pooler the ratios are about.
    pub subject: Program,
    /// Whether clients also go straight to Postgres.
    pub direct: bool,
    /// The window.
    pub order: Order,
    /// Pairs of windows per row.
    pub pairs: usize,
    /// Per row, how long windows that were disturbed may be repeated; after that they are kept, and count for nothing.
    pub patience: Duration,
    /// Cores other processes may use on average in a window that counts.
    pub others_at_most: f64,
    /// Counts system calls; `None`: not counted.
    pub tool: Option<Tool>,
    /// Seed of the order of windows.
    pub seed: u64,
    /// Our processes: the benchmark itself and the postmaster.
    pub ours: Vec<u32>,
    /// Set by a signal.
    pub stop: &'static AtomicBool,
}

/// Figures of one side of the pairs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Side {
    /// Its windows, in the order of the pairs.
    pub windows: Vec<Window>,
    /// The pooler's system calls per transaction.
    pub syscalls: Option<f64>,
    /// Anonymous memory per idle client, KiB; one figure per fresh process.
    pub kib_per_client: Vec<f64>,
}

/// Figures of one row.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Trial {
    /// What the subject is compared with.
    pub baseline: Side,
    /// The pooler the ratios are about.
    pub subject: Side,
    /// Straight to Postgres; empty where that was not run.
    pub direct: Side,
    /// Windows dropped because other processes were busy.
    pub dropped: usize,
    /// Windows kept although other processes were busy, patience being at its end.
    pub disturbed: usize,
}

/// One of the three that take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Baseline,
    Subject,
    Direct,
}

/// A contender with its clients logged in. The generator goes first when dropped.
struct Lane {
    role: Role,
    generator: Generator,
    pooler: Option<Pooler>,
}

impl Plan {
    /// Runs one row. `tell` gets a line of progress now and then.
    ///
    /// # Errors
    ///
    /// The first [`Fault`]; the row then has no figures.
    pub fn run(&self, row: &Row, tell: &mut dyn FnMut(String)) -> Result<Trial, Fault> {
        match row.measure {
            Measure::Cpu(workload) => self.run_pairs(row, workload, tell),
            Measure::Memory(queries) => self.run_memory(row, queries),
        }
    }

    fn run_pairs(&self, row: &Row, workload: Workload, tell: &mut dyn FnMut(String)) -> Result<Trial, Fault> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut trial = Trial::default();
        let mut waited = Duration::ZERO;
        for first in (0..self.pairs).step_by(PAIRS_PER_START) {
            let mut lanes = self.start(row, workload, first == 0)?;
            for _ in first..self.pairs.min(first + PAIRS_PER_START) {
                lanes.shuffle(&mut random);
                for lane in &mut lanes {
                    let window = self.undisturbed(lane, &mut trial, &mut waited)?;
                    trial.side(lane.role).windows.push(window);
                }
            }
            if first == 0 {
                self.count_syscalls(&mut lanes, &mut trial)?;
            }
            let done = self.pairs.min(first + PAIRS_PER_START);
            tell(format!("{done}/{} pairs, {} windows dropped", self.pairs, trial.dropped));
        }
        Ok(trial)
    }

    fn start(&self, row: &Row, workload: Workload, with_direct: bool) -> Result<Vec<Lane>, Fault> {
        let mut roles = vec![Role::Baseline, Role::Subject];
        if with_direct && self.direct && row.runs_direct() {
            roles.push(Role::Direct);
        }
        roles.into_iter().map(|role| self.lane(role, row, workload)).collect()
    }

    fn lane(&self, role: Role, row: &Row, workload: Workload) -> Result<Lane, Fault> {
        let setup = Setup { pool_size: row.pool_size, tls: row.tls, ..Setup::default() };
        let pooler = match role {
            Role::Baseline => Some(Pooler::start(&self.baseline, &self.server, setup)?),
            Role::Subject => Some(Pooler::start(&self.subject, &self.server, setup)?),
            Role::Direct => None,
        };
        let account = pooler.as_ref().map_or_else(|| self.server.clone(), |pooler| pooler.account(&self.server));
        let watch = pooler.as_ref().map(Pooler::pid);
        let generator = Generator::start(&Spec { watch, ..Spec::new(account, workload, row.clients) })?;
        Ok(Lane { role, generator, pooler })
    }

    /// One window in which others were quiet, or any window once `waited` has used up the patience.
    fn undisturbed(&self, lane: &mut Lane, trial: &mut Trial, waited: &mut Duration) -> Result<Window, Fault> {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Fault::Interrupted);
            }
            let begin = Instant::now();
            let before = Usage::now(&self.ours)?;
            let mut window = lane.generator.run(self.order)?;
            window.others = Usage::now(&self.ours)?.others_since(&before);
            if window.others <= self.others_at_most {
                return Ok(window);
            }
            if *waited >= self.patience {
                trial.disturbed += 1;
                return Ok(window);
            }
            trial.dropped += 1;
            *waited += begin.elapsed();
        }
    }

    /// System calls of each pooler over one burst, from idle to idle, divided by all its transactions.
    fn count_syscalls(&self, lanes: &mut [Lane], trial: &mut Trial) -> Result<(), Fault> {
        let Some(tool) = self.tool else { return Ok(()) };
        for lane in lanes {
            let Some(pooler) = &lane.pooler else { continue };
            let counter = tool.attach(pooler.pid())?;
            let window = lane.generator.run(Order { warm_up: Duration::ZERO, window: self.order.window })?;
            let calls = counter.detach()?;
            trial.side(lane.role).syscalls = Some(ratio(calls, window.total_transactions));
        }
        Ok(())
    }

    /// Anonymous memory before and after thousands of clients have logged in and made a query each. A pooler's
    /// first clients, its server connections and what it allocates once are there before.
    fn run_memory(&self, row: &Row, queries: Queries) -> Result<Trial, Fault> {
        let mut trial = Trial::default();
        let once = Order { warm_up: Duration::ZERO, window: Duration::ZERO };
        let workload = if queries == Queries::InTurn { Workload::Idle } else { Workload::Simple };
        for _ in 0..MEMORY_TRIES {
            for role in [Role::Baseline, Role::Subject] {
                if self.stop.load(Ordering::Relaxed) {
                    return Err(Fault::Interrupted);
                }
                let few = Row { clients: row.pool_size as usize, ..row.clone() };
                let mut lane = self.lane(role, &few, Workload::Simple)?;
                let Some(pooler) = &lane.pooler else { continue };
                lane.generator.run(Order { warm_up: Duration::ZERO, window: Duration::from_millis(300) })?;
                let before = anonymous_kib(pooler.pid())?;
                let account = pooler.account(&self.server);
                let mut many = Generator::start(&Spec::new(account, workload, row.clients))?;
                if queries == Queries::AtOnce {
                    many.run(once)?;
                }
                let grown = anonymous_kib(pooler.pid())?.saturating_sub(before);
                let clients = u64::try_from(row.clients).unwrap_or(u64::MAX);
                trial.side(role).kib_per_client.push(ratio(grown, clients));
            }
        }
        Ok(trial)
    }
}

impl Trial {
    fn side(&mut self, role: Role) -> &mut Side {
        match role {
            Role::Baseline => &mut self.baseline,
            Role::Subject => &mut self.subject,
            Role::Direct => &mut self.direct,
        }
    }
}

/// The postmaster behind `server`: the parent of the process that serves a connection. `None` if Postgres does
/// not run on this machine.
///
/// # Errors
///
/// What the login says.
pub fn postmaster(server: &Account) -> Result<Option<u32>, Fault> {
    let session = Session::open(server)?;
    let postmaster = parent(session.backend_pid);
    session.terminate()?;
    Ok(postmaster)
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn ratio(count: u64, of: u64) -> f64 {
    count as f64 / of.max(1) as f64
}

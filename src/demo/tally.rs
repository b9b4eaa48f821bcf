//! What the demo counts, and what can be wrong.

use std::process::ExitStatus;

use hdrhistogram::{CreationError, Histogram};
use pgweir_harness::HarnessError;

use super::clients::{Kind, Problem};

/// Longest latency that is told apart from longer ones, microseconds.
const LONGEST_US: u64 = 60_000_000;
/// Faults that are kept with their text; more are only counted.
const FAULTS_KEPT: usize = 20;

/// Something that must not be; each fails the demo.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// A client got an error, no answer, or another client's.
    #[error("client {id} ({kind}): {problem}")]
    Client {
        /// What kind of client.
        kind: Kind,
        /// Which one.
        id: u32,
        /// What it met.
        problem: Problem,
    },
    /// Clients that had not logged in long after they began to.
    #[error("{count} clients did not arrive")]
    NotArrived {
        /// How many.
        count: u32,
    },
    /// Clients of one kind got nothing done, so that nothing is known of them.
    #[error("no transaction was done by any client of this kind: {kind}")]
    NothingDone {
        /// Which kind.
        kind: Kind,
    },
    /// Clients were still at work long after they were told to stop.
    #[error("{count} clients did not come to their end")]
    ClientsLate {
        /// How many.
        count: usize,
    },
    /// More server connections than the pool may have.
    #[error("{most} server connections at once on the {role}, the pool's size is {cap}")]
    CapExceeded {
        /// Which server.
        role: &'static str,
        /// The most that were seen.
        most: u32,
        /// What is allowed.
        cap: u32,
    },
    /// The numbers of a second could not be had.
    #[error("not watched: {what}")]
    Unwatched {
        /// Why.
        what: String,
    },
    /// A sum or a count in the database is not what it must be.
    #[error("{what} on the {role}: {got}, must be {want}")]
    Invariant {
        /// What was summed up.
        what: &'static str,
        /// Which server.
        role: &'static str,
        /// What must be there.
        want: String,
        /// What is there.
        got: String,
    },
    /// A counter of pgweir that stands for a defect.
    #[error("pgweir counts {metric} = {value}, must be 0")]
    Defects {
        /// The metric.
        metric: &'static str,
        /// Its value; `absent` when it is not exported.
        value: String,
    },
    /// pgweir did not end as it should.
    #[error("pgweir's exit: {status}, must be 0\n{log}")]
    Exit {
        /// How it ended.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// Server connections outlived pgweir.
    #[error("{count} server connections on the {role} after pgweir's end")]
    LeftConnections {
        /// How many.
        count: u32,
        /// Which server.
        role: &'static str,
    },
    /// A directory or a process is still there.
    #[error("left behind: {what}")]
    LeftBehind {
        /// Its path or process id.
        what: String,
    },
    /// A server or pgweir could not be asked or stopped.
    #[error(transparent)]
    Harness(#[from] HarnessError),
}

/// What all clients did.
pub(super) struct Tally {
    /// Clients connected now.
    pub(super) live: u32,
    /// The most of them at once.
    pub(super) most_live: u32,
    /// Clients that have logged in at least once.
    pub(super) arrived: u32,
    /// Client connections made.
    pub(super) connects: u64,
    /// Transactions done, single statements included, by kind of client; see [`Kind::ALL`].
    pub(super) done: [u64; Kind::ALL.len()],
    /// Transfers whose COMMIT was acknowledged.
    pub(super) transfers: u64,
    /// The first faults.
    pub(super) faults: Vec<Fault>,
    /// All of them.
    pub(super) faults_total: u64,
    /// Latencies of the whole demo, microseconds.
    pub(super) latency: Histogram<u64>,
    /// Latencies since the last [`Tally::end_period`], microseconds.
    period: Histogram<u64>,
}

/// What was done between two looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Period {
    /// Transactions.
    pub(super) count: u64,
    /// Median of their latencies, microseconds; 0 without any.
    pub(super) p50_us: u64,
    /// What 99 of 100 did not exceed, microseconds.
    pub(super) p99_us: u64,
}

impl Tally {
    /// Nothing counted yet.
    pub(super) fn new() -> Result<Self, CreationError> {
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 3)?;
        Ok(Self {
            live: 0,
            most_live: 0,
            arrived: 0,
            connects: 0,
            done: [0; Kind::ALL.len()],
            transfers: 0,
            faults: Vec::new(),
            faults_total: 0,
            latency: histogram.clone(),
            period: histogram,
        })
    }

    /// A client has logged in.
    pub(super) fn connected(&mut self) {
        self.live += 1;
        self.connects += 1;
        self.most_live = self.most_live.max(self.live);
    }

    /// A client that had logged in is gone.
    pub(super) fn disconnected(&mut self) {
        self.live = self.live.saturating_sub(1);
    }

    /// A transaction is done.
    pub(super) fn record(&mut self, kind: Kind, us: u64) {
        if let Some(done) = self.done.get_mut(kind as usize) {
            *done += 1;
        }
        self.latency.saturating_record(us);
        self.period.saturating_record(us);
    }

    /// Something is wrong.
    pub(super) fn fault(&mut self, fault: Fault) {
        self.faults_total += 1;
        if self.faults.len() < FAULTS_KEPT {
            self.faults.push(fault);
        }
    }

    /// Faults everything of which nothing is known.
    pub(super) fn demand_work_of_all(&mut self) {
        for (kind, done) in Kind::ALL.into_iter().zip(self.done) {
            if done == 0 {
                self.fault(Fault::NothingDone { kind });
            }
        }
    }

    /// What was done since the last call.
    pub(super) fn end_period(&mut self) -> Period {
        let (p50_us, p99_us) = (quantile(&self.period, 0.5), quantile(&self.period, 0.99));
        let period = Period { count: self.period.len(), p50_us, p99_us };
        self.period.reset();
        period
    }
}

/// A latency that the given part did not exceed; 0 without any.
pub(super) fn quantile(of: &Histogram<u64>, part: f64) -> u64 {
    if of.is_empty() { 0 } else { of.value_at_quantile(part) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_only_what_came_after_the_one_before() {
        let mut tally = Tally::new().unwrap();
        assert_eq!(tally.end_period(), Period { count: 0, p50_us: 0, p99_us: 0 });
        for _ in 0..99 {
            tally.record(Kind::Select, 100);
        }
        tally.record(Kind::Transfer, 500);
        assert_eq!(tally.end_period(), Period { count: 100, p50_us: 100, p99_us: 100 });
        tally.record(Kind::Select, 7);
        assert_eq!(tally.end_period(), Period { count: 1, p50_us: 7, p99_us: 7 });
        assert_eq!(tally.latency.len(), 101);
        assert_eq!(tally.done.iter().sum::<u64>(), 101);
    }

    #[test]
    fn a_kind_that_got_nothing_done_is_a_fault() {
        let mut tally = Tally::new().unwrap();
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Transfer) {
            tally.record(kind, 1);
        }
        tally.demand_work_of_all();
        let faults: Vec<String> = tally.faults.iter().map(ToString::to_string).collect();
        assert_eq!(faults, ["no transaction was done by any client of this kind: transfers"]);
    }

    #[test]
    fn faults_past_the_limit_are_counted_and_not_kept() {
        let mut tally = Tally::new().unwrap();
        for count in 0..FAULTS_KEPT + 5 {
            tally.fault(Fault::ClientsLate { count });
        }
        assert_eq!((tally.faults.len(), tally.faults_total), (FAULTS_KEPT, 25));
    }

    #[test]
    fn the_most_clients_at_once_are_kept() {
        let mut tally = Tally::new().unwrap();
        for _ in 0..3 {
            tally.connected();
        }
        tally.disconnected();
        tally.connected();
        tally.disconnected();
        assert_eq!((tally.live, tally.most_live, tally.connects), (2, 3, 4));
    }
}

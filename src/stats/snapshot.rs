//! What belongs to no pool, and the copy of everything.

use std::sync::Arc;
use std::time::Instant;

use super::pool::{PoolGauges, PoolHealth, PoolName, PoolStats};
use super::reason::{RefusalCounts, Side, SideCounts};
use super::standing::PoolLimits;

/// What the process counted that belongs to no pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessStats {
    /// Client connections accepted, whatever became of them.
    pub clients_accepted: u64,
    /// Client connections turned away.
    pub clients_refused: RefusalCounts,
    /// Sessions begun: clients that logged in.
    pub sessions: u64,
    /// Sessions that ended in a panic; each is a defect.
    pub sessions_panicked: u64,
    /// Broken invariants: the session was ended and its server connection discarded; each is a defect.
    pub broken_invariants: u64,
    /// Cancel requests whose key no session has.
    pub cancels_unknown_key: u64,
    /// Cancel requests that nobody looked at, because too many keys from there were wrong.
    pub cancels_ignored: u64,
    /// TLS, by side.
    pub tls: TlsStats,
    /// Texts that were looked up.
    pub texts: TextStats,
}

impl ProcessStats {
    /// Adds everything that `other` counted.
    pub fn merge(&mut self, other: &Self) {
        // Taken apart, so that the compiler finds a forgotten field.
        let Self {
            clients_accepted,
            clients_refused,
            sessions,
            sessions_panicked,
            broken_invariants,
            cancels_unknown_key,
            cancels_ignored,
            tls: TlsStats { handshakes, resumptions, failures },
            texts: TextStats { recent, fingerprint, grammar },
        } = other;
        self.clients_accepted += clients_accepted;
        self.clients_refused.merge(clients_refused);
        self.sessions += sessions;
        self.sessions_panicked += sessions_panicked;
        self.broken_invariants += broken_invariants;
        self.cancels_unknown_key += cancels_unknown_key;
        self.cancels_ignored += cancels_ignored;
        self.tls.handshakes.merge(handshakes);
        self.tls.resumptions.merge(resumptions);
        self.tls.failures.merge(failures);
        self.texts.recent += recent;
        self.texts.fingerprint += fingerprint;
        self.texts.grammar += grammar;
    }
}

/// What became of TLS handshakes, by side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsStats {
    /// Handshakes that succeeded.
    pub handshakes: SideCounts,
    /// Those of them that resumed an earlier session.
    pub resumptions: SideCounts,
    /// Handshakes that failed.
    pub failures: SideCounts,
}

impl TlsStats {
    /// A handshake ended: with success, and then whether it resumed a session, or without.
    pub fn add<E>(&mut self, side: Side, outcome: &Result<bool, E>) {
        match outcome {
            Ok(resumed) => {
                self.handshakes.add(side);
                if *resumed {
                    self.resumptions.add(side);
                }
            }
            Err(_) => self.failures.add(side),
        }
    }
}

/// Texts that were judged by what they call and name, by what knew them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TextStats {
    /// The same text was judged lately.
    pub recent: u64,
    /// One was read lately that differs in its literals alone.
    pub fingerprint: u64,
    /// It had to be parsed.
    pub grammar: u64,
}

/// How the process stands at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessGauges {
    /// Client connections, those that log in included.
    pub clients: u32,
    /// Of these, the ones that have not logged in yet.
    pub clients_logging_in: u32,
    /// Server connections, in every state.
    pub servers: u32,
}

/// One pool in a [`Snapshot`].
#[derive(Clone, Debug)]
pub struct PoolSnapshot {
    /// Which pool.
    pub name: PoolName,
    /// The variable of its URL, where those of several are served side by side: two of their pools may have the same name.
    pub url: Option<Arc<str>>,
    /// Whether its server takes logins.
    pub health: PoolHealth,
    /// Everything it counted so far.
    pub stats: PoolStats,
    /// How it stands.
    pub gauges: PoolGauges,
    /// How its server's limits stand.
    pub limits: PoolLimits,
}

/// A copy of everything a worker counts, taken at once.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When it was taken.
    pub taken: Instant,
    /// What belongs to no pool.
    pub process: ProcessStats,
    /// How the process stands.
    pub gauges: ProcessGauges,
    /// The pools, in the worker's order; a pool is in it once.
    pub pools: Vec<PoolSnapshot>,
}

impl Snapshot {
    /// A snapshot without pools, to be filled.
    #[must_use]
    pub fn empty(taken: Instant) -> Self {
        Self { taken, process: ProcessStats::default(), gauges: ProcessGauges::default(), pools: Vec::new() }
    }

    /// The pool of that name.
    #[must_use]
    pub fn pool(&self, name: &PoolName) -> Option<&PoolSnapshot> {
        self.pools.iter().find(|pool| pool.name == *name)
    }
}

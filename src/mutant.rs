//! What a build for the own tests of the isolation oracle and of the simulations leaves out, so that they are seen to
//! notice (`tests/it/guards.rs` says which test plays which), and for the benchmark of what inspection costs. Any other build
//! leaves out nothing, and has nothing of this.

/// One of the things that keep clients apart, the fleet within its limits, or reads fresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// The check that a server connection is free before it is lent on.
    Release,
    /// The replay of a client's settings on the server connection it gets.
    Journal,
    /// Keeping a server connection that holds something of its client's.
    Pins,
    /// The audit of what a client may have left behind.
    Taint,
    /// Forgetting what sequences gave to others.
    Sequences,
    /// The check that a claim, or a probe, fits into the fleet's limits.
    Claims,
    /// The check that a follower has replayed what a read must see.
    Freshness,
    /// The look at what a simple query does to its session.
    Inspection,
}

impl Guard {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Release,
        Self::Journal,
        Self::Pins,
        Self::Taint,
        Self::Sequences,
        Self::Claims,
        Self::Freshness,
        Self::Inspection,
    ];
}

/// Whether the guard is left out.
#[cfg(not(feature = "mutant"))]
#[must_use]
#[inline(always)]
#[expect(clippy::inline_always, reason = "a constant")]
pub const fn lacks(_: Guard) -> bool {
    false
}

/// Whether the guard is left out: `PGWEIR_TEST_MUTANT` names it.
#[cfg(feature = "mutant")]
#[must_use]
#[inline]
pub fn lacks(guard: Guard) -> bool {
    static LACKS: std::sync::OnceLock<Option<Guard>> = std::sync::OnceLock::new();
    let named = || {
        let name = std::env::var("PGWEIR_TEST_MUTANT").unwrap_or_default();
        Guard::ALL.into_iter().find(|guard| format!("{guard:?}") == name)
    };
    *LACKS.get_or_init(named) == Some(guard)
}

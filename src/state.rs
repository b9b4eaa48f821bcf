//! Virtual session state: what a client left on a server connection, found out by asking.
//!
//! A statement that may have changed session state *taints* its lease. Before a tainted connection is
//! released, one query of ours (the audit) reads what is really there: settings become the client's
//! profile, everything that cannot be carried over pins the connection to its client.

mod hub;
mod inbox;
mod subscriber;
mod subscriptions;

use crate::sql::{EffectSet, Effects, FirstWord};

pub use crate::audit::{CHANNELS_MAX, Findings, Known, Pins, audit, carried};
pub use hub::{Hub, Hubs};
pub use inbox::{Inbox, Over, UNTAKEN_MAX, channel};
pub use subscriber::{Step, Subscriber};
pub use subscriptions::{TOTAL_MAX, listen_to};

/// Effects after which the connection has to be audited before another client gets it.
const TAINTS: EffectSet = EffectSet::SETTINGS
    .union(EffectSet::ROLE)
    .union(EffectSet::LISTEN)
    .union(EffectSet::PREPARE)
    .union(EffectSet::HOLD_CURSOR)
    .union(EffectSet::TEMP)
    .union(EffectSet::ADVISORY_LOCK)
    .union(EffectSet::DISCARD)
    .union(EffectSet::LOAD)
    .union(EffectSet::SUSPECT)
    .union(EffectSet::UNJUDGED)
    .union(EffectSet::OPAQUE);

/// Whether running a text with these effects taints the lease.
#[must_use]
#[inline]
pub fn taints(effects: Effects) -> bool {
    effects.set.intersects(TAINTS)
}

/// Whether running a text with these effects may change what names lead to. Temporary objects are the session's own.
#[must_use]
#[inline]
pub fn defines(effects: Effects) -> bool {
    effects.has(EffectSet::DDL)
        && (effects.has(EffectSet::MULTI)
            || matches!(effects.first, FirstWord::Create | FirstWord::Alter | FirstWord::Import | FirstWord::Explain)
                && !effects.has(EffectSet::TEMP))
}

/// Whether a text with these effects ends or begins a transaction and does nothing else.
#[must_use]
pub fn only_ends(effects: Effects) -> bool {
    use FirstWord::{Abort, Begin, Commit, End, Rollback, Start};
    !effects.has(EffectSet::MULTI) && matches!(effects.first, Begin | Start | Commit | End | Rollback | Abort)
}

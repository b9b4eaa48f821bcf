//! What a worker counts: plain `u64` fields, added to by the one thread that owns them.
//!
//! Nothing here is shared, atomic or allocated per event: the way of a query adds to a field or a
//! bucket. Once per tick the worker copies its counters into a [`Snapshot`], and everything that
//! reads them (`metrics`, `observe`, `admin`) reads that copy.
//!
//! Counters only grow, for the life of the pool or the process; rates and averages are differences
//! of two snapshots ([`Histogram::since`]).
//!
//! | module | what |
//! |---|---|
//! | `reason` | closed sets of reasons (who is at fault, why a connection is kept or closed), and one count for each |
//! | `sqlstate` | SQLSTATEs, and errors counted by them |
//! | `histogram` | durations in fixed buckets |
//! | `pool` | what a pool counts, and how it stands |
//! | `standing` | how a pool's limits stand on its server |
//! | `snapshot` | what belongs to no pool, and the copy of everything |

mod histogram;
mod pool;
mod reason;
mod snapshot;
mod sqlstate;
mod standing;

pub use histogram::Histogram;
pub use pool::{FollowerGauges, PoolGauges, PoolHealth, PoolName, PoolStats};
pub use reason::{
    Blame, BlameCounts, CancelCounts, CancelOutcome, DiscardCounts, DiscardReason, FollowerState, FollowerStateCounts,
    PinCounts, PinReason, Reason, RefusalCounts, RefusalReason, Role, RoleCounts, RouteReason, RouteReasonCounts, Side,
    SideCounts, Tally,
};
pub use snapshot::{PoolSnapshot, ProcessGauges, ProcessStats, Snapshot, TextStats, TlsStats};
pub use sqlstate::{ErrorCounts, SQLSTATES_MAX, Sqlstate, SqlstateCounts};
pub use standing::{Holder, Holders, LastRefusal, PoolLimits, ScopeStanding, Sharing, Standing};

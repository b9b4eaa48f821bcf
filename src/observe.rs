//! What operators see from outside: the HTTP endpoints and the log.
//!
//! The worker counts and, once per tick, hands one [`Snapshot`](crate::stats::Snapshot) to
//! [`Shared`]; everything here reads that copy and never reaches into the worker. The HTTP server
//! runs on the supervisor's thread, so a scrape costs the way of a query nothing; a log line is
//! formatted where it happens and written by a thread of its own.
//!
//! - [`shared`]: what the worker and the observers share; health and readiness.
//! - [`http`]: the endpoints and their limits.
//! - [`log`]: where events go and what must never be in them.
//! - [`pool_log`]: one line per pool and period, for log drains.
//! - [`otlp`]: the metrics, sent to a receiver of OpenTelemetry.

pub mod http;
pub mod log;
pub mod otlp;
pub mod pool_log;
pub mod shared;

pub use http::{BindFailed, bind, serve};
pub use log::{Excerpt, LogHandle};
pub use pool_log::{Origin, PoolLog};
pub use shared::{NotReady, Shared, Stage};

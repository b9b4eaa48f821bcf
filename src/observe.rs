//! What operators see from outside: the HTTP endpoints and the log.
//!
//! The worker counts and, once per tick, hands one [`Snapshot`](crate::stats::Snapshot) to
//! [`Shared`]; everything here reads that copy and never reaches into the worker. What is only found out when somebody asks
//! (who holds what, how the server's limits stand) the worker looks up at its next tick, once for all who asked. The HTTP server
//! runs on the supervisor's thread, so a scrape costs the way of a query nothing; a log line is
//! formatted where it happens and written by a thread of its own.
//!
//! - [`shared`]: what a worker and the observers share; health and readiness. [`overview`]: the same of all workers.
//! - [`http`]: the endpoints and their limits; [`gate`]: who may ask what.
//! - [`limits`], [`blame`], [`history`], [`forecast`]: what `/limits`, `/blame` and the dashboard tell.
//! - [`log`]: where events go and what must never be in them.
//! - [`pool_log`]: one line per pool and period, for log drains.
//! - [`otlp`]: the metrics, sent to a receiver of OpenTelemetry.

pub mod blame;
pub mod forecast;
pub mod gate;
pub mod history;
pub mod http;
pub mod limits;
pub mod log;
pub mod otlp;
pub mod overview;
pub mod pool_log;
pub mod shared;

pub use gate::Gate;
pub use http::{BindFailed, bind, serve};
pub use log::{Excerpt, LogHandle};
pub use overview::{Exposition, Overview};
pub use pool_log::{Origin, PoolLog};
pub use shared::{NotReady, Shared, Stage, Told};

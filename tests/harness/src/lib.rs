//! Real things to test pgweir against: Postgres primaries and followers, the pgweir program, a
//! client that sends exact bytes, and a proxy that breaks connections on demand.
//!
//! | module | what it starts or offers |
//! |---|---|
//! | [`programs`] | finds Postgres' server programs ([`ServerPrograms`]) |
//! | [`cluster`] | a private Postgres primary or follower ([`Cluster`]) |
//! | [`pgweir`] | the `pgweir serve` process ([`Pgweir`]) and its configuration text |
//! | [`wire`] | a raw client of the wire protocol ([`wire::Wire`]) |
//! | [`fault_proxy`] | a TCP proxy with faults ([`FaultProxy`]) |
//! | [`mock_server`] | a server that plays a script ([`MockServer`]) |
//! | [`secrets`] | every secret that the tests use, and the search for them in what pgweir says |
//! | [`audits`] | what pgweir's own audits found, which fails the test |
//! | [`wait`] | polls a condition up to a deadline |
//! | `cache` | where the drivers' Python and the data-directory templates are ([`drivers_python`]) |
//! | [`error`] | what can go wrong ([`HarnessError`]) |
//!
//! Nothing outlives the process that asked for it: every child dies with it, even when it is killed
//! with `SIGKILL` (see `os`), and directories left by a killed process are swept by the next one
//! (see `home`). `pgweir demo` uses [`programs`] and [`cluster`], so these return errors; what only
//! tests use may panic.

pub mod audits;
mod cache;
pub mod cluster;
pub mod error;
pub mod fault_proxy;
mod home;
pub mod mock_server;
mod os;
pub mod pgweir;
pub mod programs;
pub mod secrets;
mod sql;
pub mod wait;
pub mod wire;

pub use cache::drivers_python;
pub use cluster::{
    APP_DATABASE, APP_PASSWORD, APP_USER, Auth, Cluster, ClusterOptions, ConnectionFilter, ConnectionWatch, Role,
    SUPERUSER, SUPERUSER_PASSWORD,
};
pub use error::HarnessError;
pub use fault_proxy::{Direction, FaultProxy};
pub use mock_server::{MockServer, Step};
pub use pgweir::{Pgweir, PgweirOptions, pgweir_toml};
pub use programs::{NotFound, ServerPrograms};
pub use wait::{wait_until, wait_until_async};

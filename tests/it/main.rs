//! The integration tests: pgweir between real clients and a real Postgres. `tests/README.md` says what
//! each module shows.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test's failure is a panic"
)]
#![allow(clippy::too_many_lines, reason = "tables and stories are long; a test has few branches")]

mod allocations;
mod applications;
mod auth;
mod binding;
mod cancel;
mod check;
mod costs;
mod crowd;
mod dashboard;
mod defaults;
#[cfg(feature = "demo")]
mod demo;
mod drains;
mod drivers;
mod exec;
mod figures;
mod fleet;
mod floors;
mod followers;
mod guards;
mod hidden;
mod hostile_servers;
mod isolation;
mod limits;
mod listen;
mod login;
mod loss;
mod observe;
mod pitfalls;
mod pool;
mod prepared;
mod protocol;
mod proxy_protocol;
mod reads;
mod routing;
mod scripts;
mod sequences;
mod server_auth;
mod shipped;
mod sockets;
mod stage;
mod stop;
mod storms;
mod support;
mod tcp;
mod timeouts;
mod tls;
mod transcript;
mod versions;

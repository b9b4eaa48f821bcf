//! pgweir: a Postgres connection pooler that runs as a sidecar next to the application.
//!
//! # The map of the house
//!
//! A module uses only floors below its own; modules of one floor do not use each other; going up is a
//! returned value, never a callback. A test reads the sources and enforces this.
//!
//! | floor | modules | what lives there |
//! |---|---|---|
//! | 0 | [`stats`], [`clock`], [`sql`], [`mutant`] | plain counters; one clock read per turn; the SQL scanner; what the oracle has to miss |
//! | 1 | [`net`], [`settings`], [`prepared`], [`catalog`], [`budget`], [`replica`], [`metrics`] | sockets; settings profiles; interned statements; what names lead to; the fleet's budget; which followers may serve; metric names |
//! | 2 | [`audit`] | what a server connection is asked, and what was found there |
//! | 3 | [`backend`] | one server connection: dial, log in, settle, cancel, farewell |
//! | 4 | [`pool`] | idle stack, FIFO waiters, dialling within limits |
//! | 5 | [`route`], [`cancel`], [`state`] | which pool; cancel keys; what a client left on a server connection |
//! | 6 | [`client`] | one client connection: login, relay (the hot path), inspection, aftermath |
//! | 7 | [`observe`] | HTTP endpoints, log lines |
//! | 8 | [`worker`] | one thread and its event loop: owns pools and sessions |
//! | 9 | [`supervisor`], [`check`], `demo` | start, data plane, signals, drain; checking a configuration; the demonstration |
//! | 10 | [`sidecar`] | `pgweir exec`: environment discovery, the application beside the data plane |
//!
//! The way of a query is `client/relay.rs`, read down the page. The wire protocol is the crate
//! [`pgweir_proto`], the settings are the crate [`pgweir_config`].

pub mod audit;
pub mod backend;
pub mod budget;
pub mod cancel;
pub mod catalog;
pub mod check;
pub mod client;
pub mod clock;
#[cfg(feature = "demo")]
pub mod demo;
pub mod metrics;
pub mod mutant;
pub mod net;
pub mod observe;
pub mod pool;
pub mod prepared;
pub mod replica;
pub mod route;
pub mod settings;
pub mod sidecar;
pub mod sql;
pub mod state;
pub mod stats;
pub mod supervisor;
pub mod worker;

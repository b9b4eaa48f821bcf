//! The wire protocol as raw bytes, for tests that send and expect exact messages.
//!
//! | module | what |
//! |---|---|
//! | [`build`] | every frontend message as bytes |
//! | `message` | a received message and its fields |
//! | `client` | the connection: [`Wire`] |
//!
//! Deliberately not built on `pgweir-proto`: a fault there must not hide in its own test.

pub mod build;
mod client;
mod message;

pub use client::{Outcome, Wire, WireError, cancel};
pub use message::{Message, ServerError};

//! The Postgres wire protocol (version 3), sans-IO, for a pooler.
//!
//! No tokio, no sockets, no clock. Decoding allocates nothing: views borrow from the receive buffer
//! and leave what a pooler does not act on as bytes.
//!
//! - [`frontend`] and [`backend`]: message tags and views, one enum per direction.
//! - [`scanner`]: frames any chunking of a stream; stops and resumes in the middle of a message.
//! - [`pipeline`]: what a server still owes, and so when its connection is free to lend.
//! - [`startup`]: the untagged first packets: start-up, cancel, SSL and GSS requests.
//! - [`encode`]: writers of the messages a pooler makes itself.
//! - [`error`](mod@error): `ErrorResponse` and `NoticeResponse` fields.
//! - [`md5`]: stored MD5 hashes and what they answer.
//! - [`proxy`]: the header that a proxy sends ahead of a connection.
//! - [`scram`]: SCRAM-SHA-256 in both roles.
//!
//! Source of all protocol facts: the `PostgreSQL` manual, chapter "Frontend/Backend Protocol"
//! (chapter 55 in version 15, 54 in 17).

pub mod backend;
pub mod encode;
pub mod error;
pub mod frontend;
mod malformed;
pub mod md5;
pub mod pipeline;
pub mod proxy;
pub mod scanner;
pub mod scram;
pub mod startup;

pub use malformed::Malformed;

//! The load benchmark: what a pooler's CPU time per transaction is, as a ratio to another's.
//!
//! One run puts the same load through two poolers and, for context, straight into Postgres. Windows of a few
//! seconds alternate in random order on connections that stay open, so that both see the same machine; a window
//! in which other processes were busy is dropped and repeated. The figure of a row is the median over pairs of
//! the ratio of CPU time per transaction, with a bootstrap interval.
//!
//! | module | what it is |
//! |---|---|
//! | [`rows`] | the table of rows: load, clients, pool size, bar |
//! | [`workload`] | the bytes a client sends for one transaction |
//! | [`mix`] | the same where each is another: reads and writes by primary key |
//! | [`replies`] | counts the answers in a stream of any chunking |
//! | [`link`] | a client's connection, with TLS or without |
//! | [`login`] | a blocking login (trust, SCRAM-SHA-256) |
//! | [`generate`] | the load generator, a process of its own |
//! | [`generator`] | the handle the benchmark holds on it |
//! | [`followers`] | reads on followers against all on the primary |
//! | [`statements`] | what an ORM's statements leave in memory |
//! | [`pooler`] | starts `PgBouncer` or pgweir with equal settings |
//! | [`machine`] | CPU time, memory and disturbance from the kernel |
//! | [`syscalls`] | system calls of a process, by perf or strace |
//! | [`trial`] | interleaves the windows of one row |
//! | [`statistics`] | medians and bootstrap intervals |
//! | [`report`] | the figures as JSON and Markdown |
//! | [`fault`] | what can go wrong |

pub mod fault;
pub mod followers;
pub mod generate;
pub mod generator;
pub mod link;
pub mod login;
pub mod machine;
pub mod mix;
pub mod pooler;
pub mod replies;
pub mod report;
pub mod rows;
pub mod statements;
pub mod statistics;
pub mod syscalls;
pub mod trial;
pub mod workload;

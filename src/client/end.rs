//! The end of a session: one place that says what the client is told, who is to blame, how loud the log is.

use std::io;

use pgweir_proto::Malformed;

use super::local::Failure;
use crate::backend;
use crate::cancel::Order;
use crate::pool::Refusal;
use crate::state::{Over, TOTAL_MAX, UNTAKEN_MAX};
use crate::stats::Blame;

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// The client said goodbye.
    Quit,
    /// The client's connection ended without a goodbye.
    Gone(Option<io::ErrorKind>),
    /// The client broke the protocol.
    Malformed(Malformed),
    /// The client sent a message that has no place in a session.
    Tag(u8),
    /// The server's own last word; its `ErrorResponse` body.
    Fatal(Box<[u8]>),
    /// The server connection that the client kept was lost.
    ServerLost,
    /// The server connection was lost in the middle of a message that the client had the front of.
    MidMessage,
    /// The server will not let the pool in.
    Hopeless(Refusal),
    /// Somebody told the session to end.
    Told(Order),
    /// Too many server connections are pinned.
    PinLimit {
        /// The setting's value.
        limit: u32,
    },
    /// The client is not told its notifications any more.
    Deaf(Over),
    /// A transaction block in statement mode.
    StatementMode,
    /// An invariant of ours does not hold.
    Broken(&'static str),
}

impl End {
    /// Appends what the client is told, if it is told anything.
    pub fn write(&self, out: &mut Vec<u8>) {
        if let Self::Fatal(body) | Self::Hopeless(Refusal::Hopeless { body: Some(body), .. }) = self {
            pgweir_proto::encode::message(out, b'E', |out| out.extend_from_slice(body));
        } else if let Some(failure) = self.failure() {
            failure.write("FATAL", out);
        }
    }

    /// The SQLSTATE that the client is told; empty if none.
    #[must_use]
    pub fn code(&self) -> String {
        match self {
            Self::Fatal(body) | Self::Hopeless(Refusal::Hopeless { body: Some(body), .. }) => {
                backend::describe_error(body).0
            }
            _ => self.failure().map_or_else(String::new, |failure| failure.code.to_owned()),
        }
    }

    fn failure(&self) -> Option<Failure> {
        let (code, message, hint) = match self {
            Self::Quit | Self::Gone(_) | Self::MidMessage | Self::Fatal(_) => return None,
            Self::Malformed(malformed) => {
                ("08P01", format!("invalid message from the client: {malformed}"), String::new())
            }
            Self::Tag(tag) => ("08P01", format!("invalid frontend message type {tag}"), String::new()),
            Self::ServerLost => {
                ("57P01", "terminating connection: its server connection was lost".to_owned(), String::new())
            }
            Self::Hopeless(refusal) => return Some(refused(refusal)),
            Self::Told(order) => told(*order)?,
            Self::PinLimit { limit } => return Some(pin_limit(*limit)),
            Self::Deaf(Over::Untaken) => (
                "53400",
                format!(
                    "terminating connection: its notifications were not taken, and take more than {UNTAKEN_MAX} bytes, \
                     or those of all clients more than {TOTAL_MAX}"
                ),
                "Read from the connection, and end transactions soon: in one nothing is told.".to_owned(),
            ),
            Self::Deaf(Over::NoRoom) => (
                "57P01",
                "terminating connection: no server connection is left to listen for it".to_owned(),
                "Listen anew: the session then keeps its server connection, if there is one.".to_owned(),
            ),
            Self::StatementMode => {
                ("25001", "transaction blocks are not allowed in statement pooling mode".to_owned(), String::new())
            }
            Self::Broken(what) => ("XX000", format!("broken invariant in the pooler: {what}"), String::new()),
        };
        Some(Failure { code, message, detail: String::new(), hint })
    }

    /// Who is at fault.
    #[must_use]
    pub const fn blame(&self) -> Blame {
        match self {
            Self::Quit
            | Self::Gone(_)
            | Self::Malformed(_)
            | Self::Tag(_)
            | Self::Deaf(Over::Untaken)
            | Self::StatementMode => Blame::Client,
            Self::Fatal(_) | Self::ServerLost | Self::MidMessage | Self::Hopeless(_) => Blame::Server,
            Self::Told(_) | Self::PinLimit { .. } | Self::Deaf(Over::NoRoom) | Self::Broken(_) => Blame::Pooler,
        }
    }

    /// Whether what still runs for the client is of no use any more.
    #[must_use]
    pub const fn is_loss(&self) -> bool {
        !matches!(self, Self::Quit)
    }

    /// The reason in the log.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Quit => "client closed the connection".to_owned(),
            Self::Gone(None) => "client closed the connection without Terminate".to_owned(),
            Self::Gone(Some(kind)) => format!("client connection lost: {kind}"),
            Self::MidMessage => "server connection lost in the middle of a message".to_owned(),
            Self::Fatal(body) => format!("server ended the connection: {}", backend::describe_error(body).1),
            _ => self.failure().map_or_else(String::new, |failure| failure.message),
        }
    }
}

/// What a client is told that would need a server connection for itself, where there are `limit` such.
pub fn pin_limit(limit: u32) -> Failure {
    let message = format!("{limit} server connections of this pool are pinned by their clients' session state");
    let hint =
        "Raise max_pinned or the pool size, or avoid session state; /blame of the HTTP listener names the reasons.";
    Failure { code: "53300", message, detail: String::new(), hint: hint.to_owned() }
}

fn told(order: Order) -> Option<(&'static str, String, String)> {
    let (code, message) = match order {
        Order::None | Order::QueryLong => return None,
        Order::Drain | Order::Stop => ("57P01", "terminating connection: the pooler is shutting down"),
        Order::ClientIdle => ("57P05", "terminating connection due to client_idle_timeout"),
        Order::TransactionIdle | Order::Stopped => ("25P03", "terminating connection due to idle_transaction_timeout"),
        Order::TransactionLong => ("25P04", "terminating connection due to transaction_timeout"),
    };
    Some((code, message.to_owned(), String::new()))
}

/// What a client is told that got no server connection.
#[must_use]
pub fn refused(refusal: &Refusal) -> Failure {
    match refusal {
        Refusal::Timeout { limit, picture } => {
            let name = &picture.name;
            let trouble = if picture.trouble.is_empty() { String::new() } else { format!(" {}.", picture.trouble) };
            Failure {
                code: "53300",
                message: format!(
                    "no server connection within {:.1} s (query_wait_timeout) in pool \"{}\" of user \"{}\"",
                    limit.as_secs_f64(),
                    name.database,
                    name.user
                ),
                detail: format!(
                    "{} clients wait; {} of {} server connections are lent, the longest for {:.1} s, {} are pinned.{trouble}",
                    picture.waiters,
                    picture.holders,
                    picture.pool_size,
                    picture.longest.as_secs_f64(),
                    picture.pinned
                ),
                hint: "Raise default_pool_size or query_wait_timeout, or shorten the transactions that hold the server connections."
                    .to_owned(),
            }
        }
        Refusal::Hopeless { reason, .. } => Failure {
            code: "08006",
            message: format!("the pooler cannot log in to the server: {reason}"),
            detail: String::new(),
            hint: "See the pooler's log.".to_owned(),
        },
        Refusal::Cancelled => Failure {
            code: "57014",
            message: "canceling statement due to user request".to_owned(),
            detail: "The statement was waiting for a server connection.".to_owned(),
            hint: String::new(),
        },
    }
}

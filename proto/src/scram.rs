//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS, in both roles, without I/O.
//!
//! ```text
//! client                                        server
//! ClientExchange::first        ──n,,n=,r=…──▶   ServerExchange::client_first
//! ClientExchange::server_first ◀──r=,s=,i=──
//! Keys::derive (slow; off the worker thread, or from a cache)
//! ClientExchange::client_final ──c=,r=,p=───▶   ServerExchange::client_final
//! ClientExchange::server_final ◀──────v=────
//! ```
//!
//! Bytes and entropy come in as arguments; bytes go out. The messages here are the payloads of
//! `SASLInitialResponse`, `AuthenticationSASLContinue`, `SASLResponse` and
//! `AuthenticationSASLFinal`; their framing is not ours.
//!
//! No value that lets its holder log in is shown by a `Debug`, and none has a `Display`.
//!
//! Sources: RFC 5802 (SCRAM), RFC 7677 (SCRAM-SHA-256), RFC 5929 §4 (`tls-server-end-point`);
//! `PostgreSQL` docs, "SASL Authentication" in the chapter on the frontend/backend protocol.

mod client;
mod keys;
mod message;
mod password;
mod server;
#[cfg(test)]
mod tests;
mod verifier;

pub use client::{Challenge, ClientExchange};
pub use keys::Keys;
pub use server::{ServerExchange, Verified};
pub use verifier::{BadVerifier, Verifier};

/// The mechanism without channel binding, as `AuthenticationSASL` names it. Also the first part
/// of a verifier's text.
pub const MECHANISM: &str = "SCRAM-SHA-256";

/// The mechanism with channel binding, as `AuthenticationSASL` names it.
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// Bytes of entropy in a nonce that we make; 24 characters of base64 on the wire, as in Postgres.
pub const NONCE_BYTES: usize = 18;

/// Longest SCRAM message that is read; bytes.
pub const MESSAGE_LIMIT: usize = 64 * 1024;

/// Longest nonce that is read, the client's and the server's parts together; bytes.
pub const NONCE_LIMIT: usize = 1024;

/// Longest salt that is read; bytes, after base64.
pub const SALT_LIMIT: usize = 1024;

/// The one channel binding type that Postgres knows (RFC 5929 §4).
const BINDING_TYPE: &[u8] = b"tls-server-end-point";

/// How one exchange is tied to the TLS connection under it, as one side sees it.
///
/// | | as the client | as the server |
/// |---|---|---|
/// | `Unavailable` | sends `n` | takes `n` and `y`, refuses `p` |
/// | `Unused` | sends `y`: able, but the server did not offer | takes `n`, refuses `y` as a downgrade |
/// | `EndPoint` | sends `p` | takes `p` alone, and checks its data |
///
/// A client that was offered `SCRAM-SHA-256-PLUS` and does without must say `Unavailable`: `y`
/// would be refused. A server that offered it says `EndPoint` when the client chose it, else
/// `Unused`. RFC 5802 §6.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ChannelBinding {
    /// This side cannot bind: no TLS, or a certificate for which the binding is undefined.
    #[default]
    Unavailable,
    /// This side can bind, and the exchange runs without.
    Unused,
    /// `tls-server-end-point`: the hash of the server's certificate.
    EndPoint(Vec<u8>),
}

impl ChannelBinding {
    /// The mechanism that goes with it.
    #[must_use]
    pub fn mechanism(&self) -> &'static str {
        match self {
            Self::Unavailable | Self::Unused => MECHANISM,
            Self::EndPoint(_) => MECHANISM_PLUS,
        }
    }
}

/// Why an exchange ended. The peer is at fault, except in `OutOfTurn`, where the caller is.
///
/// Each variant names the SQLSTATE that Postgres sends to a client for it. After any error the
/// exchange is over; the other messages are answered with `OutOfTurn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScramError {
    /// The bytes break the grammar of RFC 5802 §7. 08P01, "malformed SCRAM message".
    #[error("{message}: {expected} expected")]
    Malformed {
        /// The message's name in the grammar.
        message: &'static str,
        /// What should have stood there.
        expected: &'static str,
    },
    /// A message or a part of it is longer than its limit; bytes. 08P01.
    #[error("SCRAM {field} of {length} bytes, limit {limit}")]
    TooLong {
        /// Which part.
        field: &'static str,
        /// Its length; bytes.
        length: usize,
        /// The limit; bytes.
        limit: usize,
    },
    /// The peer insists on something that neither Postgres nor we implement. 0A000.
    #[error("SCRAM {feature} is not supported")]
    Unsupported {
        /// What it wants.
        feature: &'static str,
    },
    /// A channel binding type other than `tls-server-end-point`. 08P01.
    #[error("unsupported SCRAM channel-binding type")]
    BindingType,
    /// The client believes that the server cannot bind, and it can: someone between them took the
    /// offer away. 28000, "SCRAM channel binding negotiation error".
    #[error("SCRAM channel binding was offered and the client did not see it")]
    Downgrade,
    /// The client saw another server certificate than ours. 28000, "SCRAM channel binding check
    /// failed".
    #[error("SCRAM channel binding differs")]
    BindingMismatch,
    /// The nonce is not the one agreed upon: not ours in the client's last message, or not an
    /// extension of ours in the server's first. 08P01, "invalid SCRAM response".
    #[error("SCRAM nonce differs")]
    NonceMismatch,
    /// The server wants more PBKDF2 iterations than the caller pays for.
    #[error("{iterations} SCRAM iterations, limit {limit}")]
    Iterations {
        /// What the server asks for.
        iterations: u32,
        /// What the caller allows.
        limit: u32,
    },
    /// The proof is well formed and wrong: a wrong password, or a user who has none. 28P01,
    /// "password authentication failed". Never says which.
    #[error("SCRAM proof is wrong")]
    WrongProof,
    /// The server does not know the password's keys either: it is not the server it claims to be.
    #[error("SCRAM server signature is wrong")]
    WrongServerSignature,
    /// The server ended the exchange with `e=`.
    #[error("server ended SCRAM: {reason}")]
    Refused {
        /// The reason, if RFC 5802 §7 names it, else `other-error`.
        reason: &'static str,
    },
    /// A message at a moment when none of its kind is due.
    #[error("{message} out of turn")]
    OutOfTurn {
        /// The message's name in the grammar.
        message: &'static str,
    },
}

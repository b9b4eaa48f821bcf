//! The client's role: logs in to a server.

use super::keys::Keys;
use super::message::{self, Attributes, CLIENT_FINAL, SERVER_FINAL, SERVER_FIRST};
use super::{BINDING_TYPE, ChannelBinding, NONCE_BYTES, ScramError};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fmt;
use subtle::ConstantTimeEq as _;

/// One login at a server, from the client's side.
///
/// ```text
/// Start ──server_first──▶ Challenged ──client_final──▶ Proved ──server_final──▶ Done
///   └───────any error─────────┴───────────────────────────┴───────────────────▶ Done
/// ```
///
/// The login counts only when [`ClientExchange::server_final`] said `Ok`: before, the server has
/// proved nothing.
#[derive(Debug)]
pub struct ClientExchange {
    /// The GS2 header and the channel's data, in base64: our `c=`.
    binding: String,
    /// The GS2 header: `n,,`, `y,,` or `p=tls-server-end-point,,`.
    header: Vec<u8>,
    /// The client-first-message-bare.
    bare: String,
    state: State,
}

enum State {
    /// The client-first-message may have gone out.
    Start {
        /// Our part of the nonce, as text.
        nonce: String,
    },
    /// The server-first-message came.
    Challenged {
        /// Our first message without its header, a comma, the server's first: what both sides sign.
        auth_message: Vec<u8>,
        /// Our part and the server's.
        nonce: Vec<u8>,
    },
    /// The client-final-message went out.
    Proved {
        /// What the server must answer.
        signature: [u8; 32],
    },
    /// Answered, one way or the other.
    Done,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start { .. } => "Start",
            Self::Challenged { .. } => "Challenged",
            Self::Proved { .. } => "Proved",
            Self::Done => "Done",
        })
    }
}

/// What the server wants the password stretched with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Challenge {
    /// Not secret; 1 to [`SALT_LIMIT`](super::SALT_LIMIT) bytes, after base64.
    pub salt: Vec<u8>,
    /// PBKDF2 iterations, at least 1 and at most what the caller allowed.
    pub iterations: u32,
}

impl ClientExchange {
    /// An exchange for one login. `nonce` must be fresh random bytes.
    #[must_use]
    pub fn new(nonce: [u8; NONCE_BYTES], channel: &ChannelBinding) -> Self {
        // No user name: Postgres ignores it and goes by the start-up message.
        Self::with_nonce("", STANDARD.encode(nonce), channel)
    }

    /// As [`ClientExchange::new`], with a user name and the nonce as they go over the wire.
    pub(super) fn with_nonce(user: &str, nonce: String, channel: &ChannelBinding) -> Self {
        let (header, data) = match channel {
            ChannelBinding::Unavailable => (b"n,,".to_vec(), [].as_slice()),
            ChannelBinding::Unused => (b"y,,".to_vec(), [].as_slice()),
            ChannelBinding::EndPoint(data) => ([b"p=", BINDING_TYPE, b",,"].concat(), data.as_slice()),
        };
        Self {
            binding: STANDARD.encode([header.as_slice(), data].concat()),
            header,
            bare: format!("n={user},r={nonce}"),
            state: State::Start { nonce },
        }
    }

    /// The client-first-message: the payload of `SASLInitialResponse`, after the mechanism's name.
    #[must_use]
    pub fn first(&self) -> Vec<u8> {
        [self.header.as_slice(), self.bare.as_bytes()].concat()
    }

    /// Takes the payload of `AuthenticationSASLContinue`. What it asks for is what
    /// [`Keys::derive`] needs.
    ///
    /// `max_iterations` bounds the CPU that a server can make us spend; Postgres' own default count
    /// is 4096.
    ///
    /// # Errors
    ///
    /// `Malformed`, `TooLong`, `NonceMismatch`, `Iterations`, `Unsupported`, `Refused`, `OutOfTurn`.
    pub fn server_first(&mut self, message: &[u8], max_iterations: u32) -> Result<Challenge, ScramError> {
        let State::Start { nonce: ours } = std::mem::replace(&mut self.state, State::Done) else {
            return Err(ScramError::OutOfTurn { message: SERVER_FIRST });
        };
        message::check(SERVER_FIRST, message)?;
        if message.starts_with(b"m=") {
            return Err(ScramError::Unsupported { feature: "mandatory extension" });
        }
        if let Some(reason) = message.strip_prefix(b"e=") {
            return Err(refused(reason));
        }
        let mut attributes = Attributes::new(SERVER_FIRST, message);
        let nonce = attributes.named(b'r', "nonce")?;
        message::check_nonce(SERVER_FIRST, nonce)?;
        // A nonce that the server did not extend would let it replay an old exchange.
        if nonce.strip_prefix(ours.as_bytes()).is_none_or(<[u8]>::is_empty) {
            return Err(ScramError::NonceMismatch);
        }
        let salt = message::salt(attributes.named(b's', "salt")?)?.ok_or_else(|| attributes.expected("base64 salt"))?;
        let iterations = message::iterations(attributes.named(b'i', "iteration count")?)
            .ok_or_else(|| attributes.expected("iteration count"))?;
        attributes.skip_extensions()?;
        if iterations > max_iterations {
            return Err(ScramError::Iterations { iterations, limit: max_iterations });
        }
        let auth_message = [self.bare.as_bytes(), b",", message].concat();
        self.state = State::Challenged { auth_message, nonce: nonce.to_vec() };
        Ok(Challenge { salt, iterations })
    }

    /// The client-final-message: the payload of `SASLResponse`. The keys must have been derived for
    /// the [`Challenge`]; the server refuses others.
    ///
    /// # Errors
    ///
    /// `OutOfTurn` unless a server-first-message has just been taken.
    pub fn client_final(&mut self, keys: &Keys) -> Result<Vec<u8>, ScramError> {
        let State::Challenged { mut auth_message, nonce } = std::mem::replace(&mut self.state, State::Done) else {
            return Err(ScramError::OutOfTurn { message: CLIENT_FINAL });
        };
        let mut message = [b"c=", self.binding.as_bytes(), b",r=", &nonce].concat();
        auth_message.push(b',');
        auth_message.extend_from_slice(&message);
        let proof = STANDARD.encode(keys.proof(&auth_message));
        message.extend_from_slice(b",p=");
        message.extend_from_slice(proof.as_bytes());
        self.state = State::Proved { signature: keys.server_signature(&auth_message) };
        Ok(message)
    }

    /// Takes the payload of `AuthenticationSASLFinal`; `Ok` means that the server knows the
    /// verifier, too.
    ///
    /// # Errors
    ///
    /// `WrongServerSignature`, `Refused`, `Malformed`, `TooLong`, `OutOfTurn`.
    pub fn server_final(&mut self, message: &[u8]) -> Result<(), ScramError> {
        let State::Proved { signature } = std::mem::replace(&mut self.state, State::Done) else {
            return Err(ScramError::OutOfTurn { message: SERVER_FINAL });
        };
        message::check(SERVER_FINAL, message)?;
        if let Some(reason) = message.strip_prefix(b"e=") {
            return Err(refused(reason));
        }
        let mut attributes = Attributes::new(SERVER_FINAL, message);
        let claimed = message::key(attributes.named(b'v', "server signature")?)
            .ok_or_else(|| attributes.expected("32-byte server signature"))?;
        attributes.skip_extensions()?;
        if bool::from(claimed.ct_eq(&signature)) { Ok(()) } else { Err(ScramError::WrongServerSignature) }
    }
}

/// The reasons of RFC 5802 §7, `server-error-value`. Others are not repeated: they are the peer's
/// bytes, and would end up in our log.
const REASONS: [&str; 10] = [
    "invalid-encoding",
    "extensions-not-supported",
    "invalid-proof",
    "channel-bindings-dont-match",
    "server-does-support-channel-binding",
    "channel-binding-not-supported",
    "unsupported-channel-binding-type",
    "unknown-user",
    "invalid-username-encoding",
    "no-resources",
];

/// `text` is what follows `e=`.
fn refused(text: &[u8]) -> ScramError {
    let value = text.split(|&byte| byte == b',').next().unwrap_or_default();
    let reason = REASONS.into_iter().find(|reason| reason.as_bytes() == value);
    ScramError::Refused { reason: reason.unwrap_or("other-error") }
}

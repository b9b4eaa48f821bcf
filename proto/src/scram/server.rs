//! The server's role: checks a client against a verifier.

use super::keys::xor;
use super::message::{self, Attributes, CLIENT_FINAL, CLIENT_FIRST};
use super::verifier::Verifier;
use super::{BINDING_TYPE, ChannelBinding, NONCE_BYTES, ScramError};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fmt;

/// One client's login, from the server's side.
///
/// ```text
/// Start ──client_first──▶ Challenged ──client_final──▶ Done
///   └────────────any error────┴──────────────────────▶ Done
/// ```
#[derive(Debug)]
pub struct ServerExchange {
    verifier: Verifier,
    /// The server's part of the nonce, as text.
    nonce: String,
    channel: ChannelBinding,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Nothing came yet.
    Start,
    /// The server-first-message went out.
    Challenged {
        /// The client's first message without its header, a comma, the server's first: what both
        /// sides sign.
        auth_message: Vec<u8>,
        /// The client's part and ours.
        nonce: Vec<u8>,
        /// The `c=` that must come back.
        binding: String,
    },
    /// Answered, one way or the other.
    Done,
}

/// A client that proved to know the password.
pub struct Verified {
    /// The server-final-message: the payload of `AuthenticationSASLFinal`.
    pub server_final: Vec<u8>,
    /// The client's key: with the verifier's server key it makes [`Keys`](super::Keys) that open a
    /// server with the same verifier. As good as the password there.
    pub client_key: [u8; 32],
}

impl fmt::Debug for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verified").finish_non_exhaustive()
    }
}

impl ServerExchange {
    /// An exchange for one login. `nonce` must be fresh random bytes; [`ChannelBinding`] says what
    /// the server offered and the client chose.
    #[must_use]
    pub fn new(verifier: Verifier, nonce: [u8; NONCE_BYTES], channel: ChannelBinding) -> Self {
        Self::with_nonce(verifier, STANDARD.encode(nonce), channel)
    }

    /// As [`ServerExchange::new`], with the nonce as it goes over the wire.
    pub(super) fn with_nonce(verifier: Verifier, nonce: String, channel: ChannelBinding) -> Self {
        Self { verifier, nonce, channel, state: State::Start }
    }

    /// Takes the payload of `SASLInitialResponse`; returns the server-first-message, the payload of
    /// `AuthenticationSASLContinue`.
    ///
    /// The user name in it is ignored, as Postgres does: that of the start-up message counts. If
    /// the `SASLInitialResponse` had no response (length -1), Postgres sends an empty
    /// `AuthenticationSASLContinue` and takes this message from the next `SASLResponse`.
    ///
    /// # Errors
    ///
    /// `Malformed`, `TooLong`, `Unsupported`, `BindingType`, `Downgrade`, `OutOfTurn`.
    pub fn client_first(&mut self, message: &[u8]) -> Result<Vec<u8>, ScramError> {
        if !matches!(std::mem::replace(&mut self.state, State::Done), State::Start) {
            return Err(ScramError::OutOfTurn { message: CLIENT_FIRST });
        }
        let header = Header::parse(message)?;
        let binding = self.binding(&header)?;
        let mut attributes = Attributes::new(CLIENT_FIRST, header.bare);
        attributes.named(b'n', "user name")?;
        let client_nonce = attributes.named(b'r', "nonce")?;
        message::check_nonce(CLIENT_FIRST, client_nonce)?;
        attributes.skip_extensions()?;

        let nonce = [client_nonce, self.nonce.as_bytes()].concat();
        let salt = STANDARD.encode(self.verifier.salt());
        let costs = format!(",s={salt},i={}", self.verifier.iterations());
        let server_first = [b"r=", nonce.as_slice(), costs.as_bytes()].concat();
        let auth_message = [header.bare, b",", &server_first].concat();
        self.state = State::Challenged { auth_message, nonce, binding };
        Ok(server_first)
    }

    /// Takes the payload of `SASLResponse`.
    ///
    /// # Errors
    ///
    /// `WrongProof` for a wrong password; `Malformed`, `TooLong`, `BindingMismatch`,
    /// `NonceMismatch`, `OutOfTurn`.
    pub fn client_final(&mut self, message: &[u8]) -> Result<Verified, ScramError> {
        let State::Challenged { mut auth_message, nonce, binding } = std::mem::replace(&mut self.state, State::Done)
        else {
            return Err(ScramError::OutOfTurn { message: CLIENT_FINAL });
        };
        message::check(CLIENT_FINAL, message)?;
        let mut attributes = Attributes::new(CLIENT_FINAL, message);
        let claimed = attributes.named(b'c', "channel binding")?;
        if claimed != binding.as_bytes() {
            return Err(match self.channel {
                ChannelBinding::EndPoint(_) => ScramError::BindingMismatch,
                ChannelBinding::Unavailable | ChannelBinding::Unused => {
                    attributes.expected("the first message's channel binding")
                }
            });
        }
        let returned = attributes.named(b'r', "nonce")?;
        let (without_proof, proof) = loop {
            let attribute = attributes.any()?;
            if attribute.name == b'p' {
                break (attribute.before, attribute.value);
            }
        };
        let proof = message::key(proof).ok_or_else(|| attributes.expected("32-byte proof"))?;
        attributes.end()?;
        if returned != nonce {
            return Err(ScramError::NonceMismatch);
        }

        auth_message.push(b',');
        auth_message.extend_from_slice(without_proof);
        let client_key = xor(proof, &self.verifier.client_signature(&auth_message));
        if !self.verifier.matches_client_key(&client_key) {
            return Err(ScramError::WrongProof);
        }
        let signature = STANDARD.encode(self.verifier.server_signature(&auth_message));
        Ok(Verified { server_final: format!("v={signature}").into_bytes(), client_key })
    }

    /// The `c=` that the client must send later, if its flag goes with what was offered.
    fn binding(&self, header: &Header<'_>) -> Result<String, ScramError> {
        let malformed = |expected| ScramError::Malformed { message: CLIENT_FIRST, expected };
        match (header.flag, &self.channel) {
            (Flag::None, ChannelBinding::Unavailable | ChannelBinding::Unused)
            | (Flag::NotOffered, ChannelBinding::Unavailable) => Ok(STANDARD.encode(header.text)),
            (Flag::NotOffered, ChannelBinding::Unused) => Err(ScramError::Downgrade),
            (Flag::EndPoint, ChannelBinding::EndPoint(data)) => Ok(STANDARD.encode([header.text, data].concat())),
            (Flag::None | Flag::NotOffered, ChannelBinding::EndPoint(_)) => Err(malformed("channel-binding data")),
            (Flag::EndPoint, ChannelBinding::Unavailable | ChannelBinding::Unused) => {
                Err(malformed("no channel-binding data"))
            }
        }
    }
}

/// What the client says of channel binding. RFC 5802 §7, `gs2-cbind-flag`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flag {
    /// `n`: the client cannot, or does not want to.
    None,
    /// `y`: the client could, but saw no offer.
    NotOffered,
    /// `p=tls-server-end-point`.
    EndPoint,
}

/// A client-first-message, cut in two. RFC 5802 §7, `gs2-header`.
struct Header<'a> {
    flag: Flag,
    /// The header as it came, the second comma included.
    text: &'a [u8],
    /// The client-first-message-bare, which gets signed.
    bare: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(message: &'a [u8]) -> Result<Self, ScramError> {
        message::check(CLIENT_FIRST, message)?;
        let expected = |expected| ScramError::Malformed { message: CLIENT_FIRST, expected };
        let mut parts = message.splitn(3, |&byte| byte == b',');
        let flag = match parts.next().unwrap_or_default() {
            b"n" => Flag::None,
            b"y" => Flag::NotOffered,
            [b'p', b'=', name @ ..] if name == BINDING_TYPE => Flag::EndPoint,
            [b'p', b'=', ..] => return Err(ScramError::BindingType),
            _ => return Err(expected("channel-binding flag")),
        };
        match parts.next() {
            Some(b"") => {}
            Some([b'a', ..]) => {
                return Err(ScramError::Unsupported { feature: "authorization identity" });
            }
            Some(_) | None => return Err(expected("comma")),
        }
        let bare = parts.next().ok_or_else(|| expected("comma"))?;
        if bare.starts_with(b"m=") {
            return Err(ScramError::Unsupported { feature: "mandatory extension" });
        }
        let text = message.strip_suffix(bare).unwrap_or_default();
        Ok(Self { flag, text, bare })
    }
}

//! Keys and the arithmetic behind them. RFC 5802 §2.2 and §3.

use super::password;
use super::verifier::Verifier;
use hmac::digest::KeyInit as _;
use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256};
use std::fmt;

/// What a client needs to log in to a server: made from a password, or taken from a client that
/// logged in to us and the verifier that it matched.
///
/// Worth caching per (password, salt, iterations): every server connection of a role gets the same
/// salt and count from its server until the role's password changes.
#[derive(Clone)]
pub struct Keys {
    client: [u8; 32],
    /// `H(client)`, for the client's signature.
    stored: [u8; 32],
    server: [u8; 32],
}

impl Keys {
    /// Derives the keys of a password (any bytes; normalised as Postgres does).
    ///
    /// This is the slow part: PBKDF2, about 0.1 µs of CPU per iteration with SHA instructions.
    /// It holds no state and may run on any thread. A count of 0 is taken for 1.
    #[must_use]
    pub fn derive(password: &[u8], salt: &[u8], iterations: u32) -> Self {
        let salted = pbkdf2(&password::prepare(password), salt, iterations);
        Self::new(hmac(&salted, b"Client Key"), hmac(&salted, b"Server Key"))
    }

    /// Keys known from elsewhere: the client's from [`Verified`](super::Verified), the server's from
    /// [`Verifier::server_key`]. They open a server that stores that same verifier.
    #[must_use]
    pub fn new(client_key: [u8; 32], server_key: [u8; 32]) -> Self {
        Self { client: client_key, stored: hash(&client_key), server: server_key }
    }

    /// The verifier that accepts these keys; `salt` and `iterations` must be those they were
    /// derived with.
    #[must_use]
    pub fn verifier(&self, salt: &[u8], iterations: u32) -> Verifier {
        Verifier::new(iterations, salt, self.stored, self.server)
    }

    /// The client's proof of knowing the key, bound to this exchange.
    pub(super) fn proof(&self, auth_message: &[u8]) -> [u8; 32] {
        xor(self.client, &hmac(&self.stored, auth_message))
    }

    /// What the server will answer if it knows the verifier.
    pub(super) fn server_signature(&self, auth_message: &[u8]) -> [u8; 32] {
        hmac(&self.server, auth_message)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").finish_non_exhaustive()
    }
}

/// HMAC-SHA-256 of one message.
pub(super) fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    keyed(key).chain_update(message).finalize().into_bytes().into()
}

/// SHA-256 of a key.
pub(super) fn hash(key: &[u8; 32]) -> [u8; 32] {
    Sha256::digest(key).into()
}

pub(super) fn xor(mut left: [u8; 32], right: &[u8; 32]) -> [u8; 32] {
    for (left, right) in left.iter_mut().zip(right) {
        *left ^= right;
    }
    left
}

/// HMAC with its key already worked in. RFC 2104 §2: a key longer than a block is hashed first,
/// a shorter one is padded with zeros.
fn keyed(key: &[u8]) -> Hmac<Sha256> {
    let mut block = hmac::digest::Key::<Hmac<Sha256>>::default();
    let hashed: [u8; 32];
    let key = if key.len() > block.len() {
        hashed = Sha256::digest(key).into();
        &hashed
    } else {
        key
    };
    for (to, from) in block.iter_mut().zip(key) {
        *to = *from;
    }
    Hmac::new(&block)
}

/// `Hi` of RFC 5802 §2.2: PBKDF2 (RFC 8018 §5.2) of one block.
fn pbkdf2(password: &[u8], salt: &[u8], iterations: u32) -> [u8; 32] {
    // Keyed once and copied per iteration: half of the compressions of starting from the key.
    let keyed = keyed(password);
    let first = keyed.clone().chain_update(salt).chain_update(1_u32.to_be_bytes());
    let mut block: [u8; 32] = first.finalize().into_bytes().into();
    let mut sum = block;
    for _ in 1..iterations {
        block = keyed.clone().chain_update(block).finalize().into_bytes().into();
        sum = xor(sum, &block);
    }
    sum
}

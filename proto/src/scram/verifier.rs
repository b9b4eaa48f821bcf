//! What a server stores of a password.

use super::keys::{Keys, hash, hmac};
use super::{MECHANISM, message};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fmt;
use subtle::{Choice, ConstantTimeEq as _};

/// Bytes of salt in a mock verifier: as many as Postgres makes.
const MOCK_SALT_BYTES: usize = 16;

/// A SCRAM-SHA-256 verifier, as `pg_authid.rolpassword` holds it.
///
/// Enough to check a client; not enough to log in, but enough to pretend to be the server. It
/// therefore has no `Display`, and its `Debug` shows no key.
#[derive(Clone)]
pub struct Verifier {
    iterations: u32,
    salt: Box<[u8]>,
    stored_key: [u8; 32],
    server_key: [u8; 32],
    /// Accepts no proof at all; see [`Verifier::mock`].
    mock: bool,
}

/// Text that is no verifier. Carries nothing of the text, which may be a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("SCRAM verifier: {expected} expected")]
pub struct BadVerifier {
    /// What should have stood there.
    pub expected: &'static str,
}

impl Verifier {
    pub(super) fn new(iterations: u32, salt: &[u8], stored_key: [u8; 32], server_key: [u8; 32]) -> Self {
        Self { iterations, salt: salt.into(), stored_key, server_key, mock: false }
    }

    /// Reads `SCRAM-SHA-256$<iterations>:<salt>$<stored key>:<server key>`, the last three in
    /// base64.
    ///
    /// # Errors
    ///
    /// [`BadVerifier`] names the part that is wrong. Salts are limited to
    /// [`SALT_LIMIT`](super::SALT_LIMIT).
    ///
    /// Source: `PostgreSQL` docs, "`pg_authid`".
    pub fn parse(text: &str) -> Result<Self, BadVerifier> {
        let bad = |expected| BadVerifier { expected };
        let rest = text.strip_prefix(MECHANISM).and_then(|rest| rest.strip_prefix('$')).ok_or(bad("SCRAM-SHA-256$"))?;
        let (costs, keys) = rest.split_once('$').ok_or(bad("keys"))?;
        let (iterations, salt) = costs.split_once(':').ok_or(bad("salt"))?;
        let (stored_key, server_key) = keys.split_once(':').ok_or(bad("server key"))?;
        let salt = message::salt(salt.as_bytes()).ok().flatten().ok_or(bad("salt"))?;
        Ok(Self::new(
            message::iterations(iterations.as_bytes()).ok_or(bad("iterations"))?,
            &salt,
            message::key(stored_key.as_bytes()).ok_or(bad("32-byte stored key"))?,
            message::key(server_key.as_bytes()).ok_or(bad("32-byte server key"))?,
        ))
    }

    /// The text that [`Verifier::parse`] reads. Secret; named so that no `{}` writes it into a log.
    ///
    /// That of a mock verifier accepts no proof either, but only because nobody can find one.
    #[must_use]
    pub fn encode(&self) -> String {
        format!(
            "{MECHANISM}${}:{}${}:{}",
            self.iterations,
            STANDARD.encode(&self.salt),
            STANDARD.encode(self.stored_key),
            STANDARD.encode(self.server_key),
        )
    }

    /// Makes the verifier of a password; as slow as [`Keys::derive`].
    #[must_use]
    pub fn derive(password: &[u8], salt: &[u8], iterations: u32) -> Self {
        Keys::derive(password, salt, iterations).verifier(salt, iterations)
    }

    /// A verifier that no proof satisfies, for a user who does not exist or has no password.
    ///
    /// The exchange with it looks and costs the same as with a real one, and a user always gets the
    /// same salt, so that asking twice does not tell who exists. `secret` should outlive restarts
    /// for the same reason; `iterations` should be what most real verifiers have.
    #[must_use]
    pub fn mock(secret: &[u8; 32], user: &[u8], iterations: u32) -> Self {
        let part = |label: &[u8]| hmac(secret, &[label, b"\0", user].concat());
        let salt = part(b"salt");
        let salt = salt.first_chunk::<MOCK_SALT_BYTES>().map_or(salt.as_slice(), |salt| salt.as_slice());
        // The keys are not zeros, so that a copy without the flag has no known preimage either.
        let (stored_key, server_key) = (part(b"stored key"), part(b"server key"));
        Self { mock: true, ..Self::new(iterations, salt, stored_key, server_key) }
    }

    /// PBKDF2 iterations, at least 1 if it was parsed.
    #[must_use]
    pub fn iterations(&self) -> u32 {
        self.iterations
    }

    /// Sent to every client that asks; not secret.
    #[must_use]
    pub fn salt(&self) -> &[u8] {
        &self.salt
    }

    /// For [`Keys::new`], to log in to a server with the keys of a client that logged in here.
    #[must_use]
    pub fn server_key(&self) -> &[u8; 32] {
        &self.server_key
    }

    /// Whether `password` is the one, when it was sent in clear; as slow as [`Keys::derive`].
    #[must_use]
    pub fn matches_password(&self, password: &[u8]) -> bool {
        let other = Self::derive(password, &self.salt, self.iterations);
        let same = other.stored_key.ct_eq(&self.stored_key)
            & other.server_key.ct_eq(&self.server_key)
            & !Choice::from(u8::from(self.mock));
        same.into()
    }

    /// Whether `client_key` is the one; constant time.
    pub(super) fn matches_client_key(&self, client_key: &[u8; 32]) -> bool {
        let same = hash(client_key).ct_eq(&self.stored_key);
        (same & !Choice::from(u8::from(self.mock))).into()
    }

    pub(super) fn client_signature(&self, auth_message: &[u8]) -> [u8; 32] {
        hmac(&self.stored_key, auth_message)
    }

    pub(super) fn server_signature(&self, auth_message: &[u8]) -> [u8; 32] {
        hmac(&self.server_key, auth_message)
    }
}

/// Constant time in the keys.
impl PartialEq for Verifier {
    fn eq(&self, other: &Self) -> bool {
        let keys = self.stored_key.ct_eq(&other.stored_key) & self.server_key.ct_eq(&other.server_key);
        bool::from(keys) && self.iterations == other.iterations && self.salt == other.salt && self.mock == other.mock
    }
}

impl Eq for Verifier {}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not even `mock`: a log should not tell who has a password.
        f.debug_struct("Verifier").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the password `pencil`, the salt `salt` and two iterations; from Python's `hashlib`.
    #[rustfmt::skip]
    const CLIENT_KEY: [u8; 32] = [
        0x47, 0x48, 0x3f, 0x87, 0xe6, 0xb8, 0x04, 0x98, 0x8d, 0x16, 0xff, 0x25,
        0x63, 0x1c, 0x36, 0x93, 0xae, 0xd4, 0xd4, 0xee, 0x80, 0x22, 0xd9, 0x56,
        0x96, 0x85, 0x30, 0x22, 0xc1, 0xaf, 0x48, 0xe6,
    ];

    #[test]
    fn a_mock_refuses_even_the_right_keys() {
        let real = Verifier::derive(b"pencil", b"salt", 2);
        assert!(real.matches_client_key(&CLIENT_KEY));
        assert!(real.matches_password(b"pencil"));
        let mock = Verifier { mock: true, ..real };
        assert!(!mock.matches_client_key(&CLIENT_KEY));
        assert!(!mock.matches_password(b"pencil"));
    }
}

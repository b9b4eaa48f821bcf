//! The MD5 way of proving a password: older than SCRAM, weaker, and still asked for.
//!
//! ```text
//! stored  md5(password user)               as hexadecimal digits, behind the letters md5
//! asked   AuthenticationMD5Password(salt)
//! answer  md5(stored digits, salt)         likewise
//! ```
//!
//! Who knows the stored digits can log in: they are as good as the password.
//!
//! Source: `PostgreSQL` docs, "Message Flow", `AuthenticationMD5Password`; "`pg_authid`".

use std::fmt;

use md5::{Digest as _, Md5};
use subtle::ConstantTimeEq as _;

/// Letters in front of the digits.
const MARK: &str = "md5";

/// The digits of a stored hash.
#[derive(Clone)]
pub struct Hash([u8; 32]);

impl Hash {
    /// The hash that is stored for a password.
    #[must_use]
    pub fn of(password: &[u8], user: &[u8]) -> Self {
        Self(digits(&[password, user]))
    }

    /// Reads `md5` and 32 hexadecimal digits; none if that is not what the text is.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits: [u8; 32] = text.strip_prefix(MARK)?.as_bytes().try_into().ok()?;
        // Postgres hashes the digits as they are stored; it stores them in small letters.
        digits.iter().all(u8::is_ascii_hexdigit).then_some(Self(digits.map(|digit| digit.to_ascii_lowercase())))
    }

    /// The answer to a salt: what a `PasswordMessage` holds before its NUL.
    #[must_use]
    pub fn answer(&self, salt: [u8; 4]) -> Vec<u8> {
        [MARK.as_bytes(), &digits(&[&self.0, &salt])].concat()
    }

    /// Whether `answer` is the right one; constant time.
    #[must_use]
    pub fn accepts(&self, salt: [u8; 4], answer: &[u8]) -> bool {
        self.answer(salt).ct_eq(answer).into()
    }
}

/// Constant time.
impl PartialEq for Hash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Hash {}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hash").finish_non_exhaustive()
    }
}

fn digits(parts: &[&[u8]]) -> [u8; 32] {
    let mut md5 = Md5::new();
    for part in parts {
        md5.update(part);
    }
    let sum: [u8; 16] = md5.finalize().into();
    let digit = |half: u8| if half < 10 { b'0' + half } else { b'a' + half - 10 };
    let mut out = [0; 32];
    for (pair, byte) in out.chunks_exact_mut(2).zip(sum) {
        pair.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_that_of_postgres_own_client_library() {
        for (user, password, salt) in [("a", "b", [0; 4]), ("md5_user", "password", [0x2a, 0x3d, 0x8f, 0xe0])] {
            let want = postgres_protocol::authentication::md5_hash(user.as_bytes(), password.as_bytes(), salt);
            let hash = Hash::of(password.as_bytes(), user.as_bytes());
            assert_eq!(hash.answer(salt), want.as_bytes());
            assert!(hash.accepts(salt, want.as_bytes()));
            assert!(!hash.accepts([salt[0] ^ 1, 0, 0, 0], want.as_bytes()));
            assert!(!hash.accepts(salt, b"md5"));
        }
    }

    #[test]
    fn a_stored_hash_is_read_and_nothing_else() {
        let text = "md55d41402abc4b2a76b9719d911017c592";
        assert_eq!(Hash::parse(text), Some(Hash::of(b"hel", b"lo")));
        assert_eq!(Hash::parse(&text.to_uppercase()), None);
        for bad in ["", "md5", "md55d41402abc4b2a76b9719d911017c59", "md55d41402abc4b2a76b9719d911017c59g"] {
            assert_eq!(Hash::parse(bad), None, "{bad}");
        }
        assert!(!format!("{:?}", Hash::of(b"hel", b"lo")).contains("5d4"));
    }
}

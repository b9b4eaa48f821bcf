//! The grammar of SCRAM messages: attributes, `name=value`, between commas. RFC 5802 §7.

use super::{MESSAGE_LIMIT, NONCE_LIMIT, SALT_LIMIT, ScramError};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

pub(super) const CLIENT_FIRST: &str = "client-first-message";
pub(super) const SERVER_FIRST: &str = "server-first-message";
pub(super) const CLIENT_FINAL: &str = "client-final-message";
pub(super) const SERVER_FINAL: &str = "server-final-message";

/// One attribute of a message.
#[derive(Clone, Copy)]
pub(super) struct Attribute<'a> {
    /// A letter.
    pub(super) name: u8,
    /// May be empty: libpq sends `n=`.
    pub(super) value: &'a [u8],
    /// Everything in front of it, without the comma.
    pub(super) before: &'a [u8],
}

/// Reads the attributes of one message in order.
pub(super) struct Attributes<'a> {
    message: &'static str,
    whole: &'a [u8],
    /// `None` at the end of the message, `Some(b"")` after a comma with nothing behind it.
    rest: Option<&'a [u8]>,
}

impl<'a> Attributes<'a> {
    pub(super) fn new(message: &'static str, bytes: &'a [u8]) -> Self {
        Self { message, whole: bytes, rest: Some(bytes) }
    }

    /// The next attribute, whatever its name; it is an error if there is none.
    pub(super) fn any(&mut self) -> Result<Attribute<'a>, ScramError> {
        let rest = self.rest.ok_or_else(|| self.expected("attribute"))?;
        let mut halves = rest.splitn(2, |&byte| byte == b',');
        let text = halves.next().unwrap_or_default();
        self.rest = halves.next();
        let [name @ (b'A'..=b'Z' | b'a'..=b'z'), b'=', value @ ..] = text else {
            return Err(self.expected("attribute"));
        };
        let comma = self.whole.len().saturating_sub(rest.len()).saturating_sub(1);
        let before = self.whole.get(..comma).unwrap_or_default();
        Ok(Attribute { name: *name, value, before })
    }

    /// The value of the next attribute, whose name must be `name`.
    pub(super) fn named(&mut self, name: u8, expected: &'static str) -> Result<&'a [u8], ScramError> {
        match self.any() {
            Ok(attribute) if attribute.name == name => Ok(attribute.value),
            Ok(_) | Err(_) => Err(self.expected(expected)),
        }
    }

    /// Reads to the end: extensions are optional to know, but not to write correctly.
    pub(super) fn skip_extensions(&mut self) -> Result<(), ScramError> {
        while self.rest.is_some() {
            self.any()?;
        }
        Ok(())
    }

    /// The message must end here.
    pub(super) fn end(&self) -> Result<(), ScramError> {
        if self.rest.is_some() { Err(self.expected("end of message")) } else { Ok(()) }
    }

    pub(super) fn expected(&self, expected: &'static str) -> ScramError {
        ScramError::Malformed { message: self.message, expected }
    }
}

/// Checks what holds for every message: not empty, within its limit, no NUL.
pub(super) fn check(message: &'static str, bytes: &[u8]) -> Result<(), ScramError> {
    check_length("message", bytes.len(), MESSAGE_LIMIT)?;
    if bytes.is_empty() {
        return Err(ScramError::Malformed { message, expected: "attribute" });
    }
    if memchr::memchr(0, bytes).is_some() {
        return Err(ScramError::Malformed { message, expected: "text without NUL" });
    }
    Ok(())
}

/// Checks a nonce: printable ASCII, not empty, within its limit. RFC 5802 §7, `printable`.
pub(super) fn check_nonce(message: &'static str, nonce: &[u8]) -> Result<(), ScramError> {
    check_length("nonce", nonce.len(), NONCE_LIMIT)?;
    if nonce.is_empty() || !nonce.iter().all(u8::is_ascii_graphic) {
        return Err(ScramError::Malformed { message, expected: "printable nonce" });
    }
    Ok(())
}

fn check_length(field: &'static str, length: usize, limit: usize) -> Result<(), ScramError> {
    if length > limit { Err(ScramError::TooLong { field, length, limit }) } else { Ok(()) }
}

/// Decodes a salt; `Ok(None)` when it is no base64 or empty.
pub(super) fn salt(base64: &[u8]) -> Result<Option<Vec<u8>>, ScramError> {
    // Checked before decoding, so that the limit also bounds the allocation.
    check_length("salt in base64", base64.len(), SALT_LIMIT.div_ceil(3) * 4)?;
    let salt = STANDARD.decode(base64).unwrap_or_default();
    check_length("salt", salt.len(), SALT_LIMIT)?;
    Ok(Some(salt).filter(|salt| !salt.is_empty()))
}

/// Decodes 32 bytes of base64: a key, a proof or a signature.
pub(super) fn key(base64: &[u8]) -> Option<[u8; 32]> {
    // 33 bytes are what the decoder may need for 44 characters before it looks at the padding.
    let mut key = [0; 33];
    let length = STANDARD.decode_slice(base64, &mut key).ok()?;
    key.get(..length)?.try_into().ok()
}

/// Decodes an iteration count: decimal digits, 1 to 2^31 - 1, as Postgres stores it.
pub(super) fn iterations(digits: &[u8]) -> Option<u32> {
    // `u32::from_str` takes a plus sign and the grammar does not.
    if !digits.first()?.is_ascii_digit() {
        return None;
    }
    let count: u32 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (1..=i32::MAX.unsigned_abs()).contains(&count).then_some(count)
}

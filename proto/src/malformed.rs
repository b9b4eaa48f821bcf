//! What can be wrong with bytes.

/// Bytes that break the wire format; the peer is at fault and the stream is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// A C string ran to the end of its message.
    #[error("{field} has no terminating NUL")]
    MissingNul {
        /// The field, as `Message.field`.
        field: &'static str,
    },
    /// A message ended before a field of fixed size did.
    #[error("{field} is cut short")]
    Short {
        /// The field, as `Message.field`.
        field: &'static str,
    },
    /// A length word outside 4..=limit; bytes, the length word included.
    #[error("message {tag:#04x} declares {length} bytes, limit {limit}")]
    Length {
        /// The message's tag, 0 for a start-up packet.
        tag: u8,
        /// What the length word says.
        length: u32,
        /// The largest value accepted.
        limit: u32,
    },
    /// A tag the peer may not send, or a value outside its set.
    #[error("{field} has the unknown value {value:#04x}")]
    Unknown {
        /// The field, as `Message.field`.
        field: &'static str,
        /// The offending byte.
        value: u8,
    },
    /// A text field that has to be UTF-8 is not.
    #[error("{field} is not valid UTF-8")]
    NotUtf8 {
        /// The field, as `Message.field`.
        field: &'static str,
    },
}

/// Splits a C string off the front of `body`.
///
/// # Errors
///
/// [`Malformed::MissingNul`] naming `field`.
#[inline]
pub(crate) fn cstr<'a>(body: &'a [u8], field: &'static str) -> Result<(&'a [u8], &'a [u8]), Malformed> {
    // Most names have no letter, and need no search.
    if let Some((0, rest)) = body.split_first() {
        return Ok((b"", rest));
    }
    let end = memchr::memchr(0, body).ok_or(Malformed::MissingNul { field })?;
    match (body.get(..end), body.get(end + 1..)) {
        (Some(text), Some(rest)) => Ok((text, rest)),
        _ => Err(Malformed::MissingNul { field }),
    }
}

/// Splits a big-endian `u16` off the front of `body`.
pub(crate) fn u16_be<'a>(body: &'a [u8], field: &'static str) -> Result<(u16, &'a [u8]), Malformed> {
    let (head, rest) = body.split_first_chunk::<2>().ok_or(Malformed::Short { field })?;
    Ok((u16::from_be_bytes(*head), rest))
}

/// Splits a big-endian `u32` off the front of `body`.
pub(crate) fn u32_be<'a>(body: &'a [u8], field: &'static str) -> Result<(u32, &'a [u8]), Malformed> {
    let (head, rest) = body.split_first_chunk::<4>().ok_or(Malformed::Short { field })?;
    Ok((u32::from_be_bytes(*head), rest))
}

//! `ErrorResponse` and `NoticeResponse`: a list of tagged fields.

use crate::Malformed;
use crate::malformed::cstr;

/// An SQLSTATE: five characters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SqlState(pub [u8; 5]);

impl SqlState {
    /// The code as text; `?????` if a peer sent bytes that are not text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("?????")
    }
}

impl std::fmt::Debug for SqlState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::fmt::Display for SqlState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a pooler looks at in an `ErrorResponse`; the rest stays as it came.
///
/// A field that is absent is empty (a hostile server may leave out even the SQLSTATE).
///
/// Source: `PostgreSQL` 17 docs, §54.8 "Error and Notice Message Fields".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fields<'a> {
    /// `V` (9.6 on), or `S`: ERROR, FATAL, PANIC.
    pub severity: &'a [u8],
    /// `C`: the SQLSTATE as it came.
    pub code: &'a [u8],
    /// `M`: the primary message.
    pub message: &'a [u8],
    /// `R`: the routine that reported it; unlike the message it is in no human language.
    pub routine: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Reads the body of an `ErrorResponse` or `NoticeResponse`. Copies nothing.
    ///
    /// # Errors
    ///
    /// [`Malformed::MissingNul`] if a field runs past the end.
    pub fn parse(mut body: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Self::default();
        while let Some((&kind, rest)) = body.split_first() {
            if kind == 0 {
                break;
            }
            let (value, rest) = cstr(rest, "ErrorResponse.field")?;
            match kind {
                b'V' => fields.severity = value,
                b'S' if fields.severity.is_empty() => fields.severity = value,
                b'C' => fields.code = value,
                b'M' => fields.message = value,
                b'R' => fields.routine = value,
                _ => {}
            }
            body = rest;
        }
        Ok(fields)
    }

    /// The SQLSTATE; `XX000` if it is absent or not five bytes.
    #[must_use]
    pub fn sqlstate(&self) -> SqlState {
        self.code.try_into().map_or(SqlState(*b"XX000"), SqlState)
    }

    /// Whether the server ends the connection after this.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(self.severity, b"FATAL" | b"PANIC")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_found_whatever_their_order() {
        #[rustfmt::skip]
        let table: [(&str, &[u8], &str, &str, bool); 4] = [
            ("usual",       b"SFEHLER\0VERROR\0C42601\0Mm\0\0", "42601", "m", false),
            ("fatal",       b"SFATAL\0VFATAL\0C57P01\0Mx\0\0",  "57P01", "x", true),
            ("no sqlstate", b"SERROR\0Mx\0\0",                  "XX000", "x", false),
            ("odd code",    b"SERROR\0C1\0Mx\0\0",              "XX000", "x", false),
        ];
        for (name, body, code, message, fatal) in table {
            let fields = Fields::parse(body).unwrap();
            assert_eq!(fields.sqlstate().as_str(), code, "{name}");
            assert_eq!(fields.message, message.as_bytes(), "{name}");
            assert_eq!(fields.is_fatal(), fatal, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Fields::parse(&body).map(|f| (f.sqlstate(), f.is_fatal()));
        }
    }
}

//! A received message and its fields.

use std::fmt;

/// A backend message, whole.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// Its first byte.
    pub tag: u8,
    /// What follows the length word.
    pub body: Vec<u8>,
}

/// The fields of an `ErrorResponse` or a `NoticeResponse`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// Code and text, in the order received. Codes: `PostgreSQL` 17 docs, §53.8.
    pub fields: Vec<(u8, String)>,
}

impl Message {
    /// The fields of an error or a notice; `None` for any other message.
    #[must_use]
    pub fn server_error(&self) -> Option<ServerError> {
        if !matches!(self.tag, b'E' | b'N') {
            return None;
        }
        let mut fields = Vec::new();
        let mut body = Body(&self.body);
        while let Some(code) = body.byte().filter(|code| *code != 0) {
            fields.push((code, body.cstr()?));
        }
        Some(ServerError { fields })
    }

    /// The field `code` of an error or a notice: `b'C'` is the SQLSTATE, `b'M'` the message.
    #[must_use]
    pub fn error_field(&self, code: u8) -> Option<String> {
        let error = self.server_error()?;
        error.field(code).map(ToOwned::to_owned)
    }

    /// The columns of a `DataRow` as sent; `None` for any other message.
    #[must_use]
    pub fn columns(&self) -> Option<Vec<Option<Vec<u8>>>> {
        if self.tag != b'D' {
            return None;
        }
        let mut body = Body(&self.body);
        let count = body.u16()?;
        let mut columns = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            columns.push(match usize::try_from(body.i32()?) {
                Ok(length) => Some(body.take(length)?.to_vec()),
                Err(_) => None,
            });
        }
        Some(columns)
    }

    /// The columns of a `DataRow` as text, bytes that are not UTF-8 replaced.
    #[must_use]
    pub fn text_columns(&self) -> Option<Vec<Option<String>>> {
        let columns = self.columns()?.into_iter();
        Some(columns.map(|column| column.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())).collect())
    }

    /// The names of a `RowDescription`; `None` for any other message.
    #[must_use]
    pub fn column_names(&self) -> Option<Vec<String>> {
        if self.tag != b'T' {
            return None;
        }
        let mut body = Body(&self.body);
        let count = body.u16()?;
        let mut names = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            names.push(body.cstr()?);
            // Table OID, column, type OID, size, modifier, format.
            body.take(4 + 2 + 4 + 2 + 4 + 2)?;
        }
        Some(names)
    }

    /// The status of a `ReadyForQuery`: `b'I'`, `b'T'` or `b'E'`; `None` for any other message.
    #[must_use]
    pub fn ready_status(&self) -> Option<u8> {
        (self.tag == b'Z').then(|| self.body.first().copied()).flatten()
    }

    /// The tag of a `CommandComplete`, such as `SELECT 1`; `None` for any other message.
    #[must_use]
    pub fn command_tag(&self) -> Option<String> {
        (self.tag == b'C').then(|| Body(&self.body).cstr()).flatten()
    }

    /// Name and value of a `ParameterStatus`; `None` for any other message.
    #[must_use]
    pub fn parameter(&self) -> Option<(String, String)> {
        let mut body = (self.tag == b'S').then_some(Body(&self.body))?;
        Some((body.cstr()?, body.cstr()?))
    }

    /// Process id and secret of a `BackendKeyData`; `None` for any other message.
    #[must_use]
    pub fn backend_key(&self) -> Option<(i32, Vec<u8>)> {
        let mut body = (self.tag == b'K').then_some(Body(&self.body))?;
        Some((body.i32()?, body.0.to_vec()))
    }

    /// Sender, channel and payload of a `NotificationResponse`; `None` for any other message.
    #[must_use]
    pub fn notification(&self) -> Option<(i32, String, String)> {
        let mut body = (self.tag == b'A').then_some(Body(&self.body))?;
        Some((body.i32()?, body.cstr()?, body.cstr()?))
    }

    /// Kind and data of an `Authentication` message; `None` for any other message.
    #[must_use]
    pub fn authentication(&self) -> Option<(i32, Vec<u8>)> {
        let mut body = (self.tag == b'R').then_some(Body(&self.body))?;
        Some((body.i32()?, body.0.to_vec()))
    }

    /// The whole message as it was on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        super::build::message(self.tag, &self.body)
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\"{}\"", char::from(self.tag), self.body.escape_ascii())
    }
}

impl ServerError {
    /// The field `code`, if it was sent.
    #[must_use]
    pub fn field(&self, code: u8) -> Option<&str> {
        let mut fields = self.fields.iter();
        fields.find(|(found, _)| *found == code).map(|(_, text)| text.as_str())
    }

    /// The SQLSTATE; empty if none was sent.
    #[must_use]
    pub fn sqlstate(&self) -> &str {
        self.field(b'C').unwrap_or_default()
    }

    /// The primary message; empty if none was sent.
    #[must_use]
    pub fn message(&self) -> &str {
        self.field(b'M').unwrap_or_default()
    }

    /// `ERROR`, `FATAL`, `NOTICE`...; empty if none was sent.
    #[must_use]
    pub fn severity(&self) -> &str {
        self.field(b'V').or_else(|| self.field(b'S')).unwrap_or_default()
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.severity(), self.sqlstate(), self.message())?;
        for (code, name) in [(b'D', "detail"), (b'H', "hint")] {
            if let Some(text) = self.field(code) {
                write!(f, " ({name}: {text})")?;
            }
        }
        Ok(())
    }
}

/// What is left to read of a body.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn i32(&mut self) -> Option<i32> {
        Some(i32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn cstr(&mut self) -> Option<String> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let text = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

    use super::Message;

    fn message(tag: u8, body: &[u8]) -> Message {
        let body = body.to_vec();
        Message { tag, body }
    }

    #[test]
    fn a_row_has_null_empty_and_text_columns() {
        let row = message(b'D', b"\0\x03\xff\xff\xff\xff\0\0\0\0\0\0\0\x02hi");
        let want = vec![None, Some(String::new()), Some("hi".to_owned())];
        assert_eq!(row.text_columns(), Some(want));
        assert_eq!(message(b'D', b"\0\x01\0\0\0\x09x").columns(), None);
        assert_eq!(message(b'C', b"\0\0").columns(), None);
    }

    #[test]
    fn an_error_has_its_fields() {
        let error = message(b'E', b"SFEHLER\0VFATAL\0C53300\0Mtoo many\0\0").server_error().unwrap();
        assert_eq!(error.sqlstate(), "53300");
        assert_eq!(error.to_string(), "FATAL 53300: too many");
        assert_eq!(message(b'E', b"Cno end").server_error(), None);
    }
}

//! Writers of the messages that a pooler makes itself. Each appends one message to `out`.
//!
//! Source: `PostgreSQL` 17 docs, §54.7 "Message Formats".

use crate::backend::TxStatus;

/// `ParseComplete`.
pub const PARSE_COMPLETE: [u8; 5] = *b"1\0\0\0\x04";
/// `CloseComplete`.
pub const CLOSE_COMPLETE: [u8; 5] = *b"3\0\0\0\x04";
/// `Sync`.
pub const SYNC: [u8; 5] = *b"S\0\0\0\x04";
/// `Flush`.
pub const FLUSH: [u8; 5] = *b"H\0\0\0\x04";
/// `Terminate`.
pub const TERMINATE: [u8; 5] = *b"X\0\0\0\x04";
/// `SSLRequest`.
pub const SSL_REQUEST: [u8; 8] = *b"\0\0\0\x08\x04\xd2\x16\x2f";

/// Appends a message: `tag`, a length word, and what `body` writes.
pub fn message(out: &mut Vec<u8>, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    untagged(out, body);
}

/// Appends a length word and what `body` writes.
fn untagged(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    body(out);
    let length = u32::try_from(out.len() - at).unwrap_or(u32::MAX);
    if let Some(word) = out.get_mut(at..at + 4) {
        word.copy_from_slice(&length.to_be_bytes());
    }
}

/// Appends `text` and a NUL. A NUL inside `text` would begin another field: it is left out.
pub fn cstr(out: &mut Vec<u8>, text: &[u8]) {
    out.extend(text.iter().copied().filter(|byte| *byte != 0));
    out.push(0);
}

/// Appends a header for a body of `body_len` bytes.
pub fn header(out: &mut Vec<u8>, tag: u8, body_len: usize) {
    out.push(tag);
    out.extend_from_slice(&u32::try_from(body_len + 4).unwrap_or(u32::MAX).to_be_bytes());
}

/// `ReadyForQuery`.
pub fn ready_for_query(out: &mut Vec<u8>, status: TxStatus) {
    message(out, b'Z', |out| out.push(status as u8));
}

/// `ErrorResponse` (`tag` `E`) or `NoticeResponse` (`tag` `N`).
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// ERROR, FATAL, NOTICE, ...
    pub severity: &'a str,
    /// The SQLSTATE.
    pub code: &'a str,
    /// The primary message.
    pub message: &'a str,
    /// What explains it; left out if empty.
    pub detail: &'a str,
    /// How to mend it; left out if empty.
    pub hint: &'a str,
}

impl Report<'_> {
    fn write(&self, out: &mut Vec<u8>, tag: u8) {
        message(out, tag, |out| {
            let fields = [
                (b'S', self.severity),
                (b'V', self.severity),
                (b'C', self.code),
                (b'M', self.message),
                (b'D', self.detail),
                (b'H', self.hint),
            ];
            for (kind, value) in fields {
                if !value.is_empty() {
                    out.push(kind);
                    cstr(out, value.as_bytes());
                }
            }
            out.push(0);
        });
    }

    /// Appends it as an `ErrorResponse`.
    pub fn error(&self, out: &mut Vec<u8>) {
        self.write(out, b'E');
    }

    /// Appends it as a `NoticeResponse`.
    pub fn notice(&self, out: &mut Vec<u8>) {
        self.write(out, b'N');
    }
}

/// `CommandComplete`.
pub fn command_complete(out: &mut Vec<u8>, tag: &str) {
    message(out, b'C', |out| cstr(out, tag.as_bytes()));
}

/// `ParameterStatus`.
pub fn parameter_status(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    message(out, b'S', |out| {
        cstr(out, name);
        cstr(out, value);
    });
}

/// `BackendKeyData`.
pub fn backend_key_data(out: &mut Vec<u8>, pid: u32, secret: &[u8]) {
    message(out, b'K', |out| {
        out.extend_from_slice(&pid.to_be_bytes());
        out.extend_from_slice(secret);
    });
}

/// `NegotiateProtocolVersion`: the newest version spoken, major part included (as Postgres sends it and libpq reads
/// it), and the options not known.
pub fn negotiate_protocol_version(out: &mut Vec<u8>, newest: u32, unknown: &[&[u8]]) {
    message(out, b'v', |out| {
        out.extend_from_slice(&newest.to_be_bytes());
        out.extend_from_slice(&u32::try_from(unknown.len()).unwrap_or(0).to_be_bytes());
        for name in unknown {
            cstr(out, name);
        }
    });
}

/// `Authentication…` of a kind, with its data.
pub fn authentication(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    message(out, b'R', |out| {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(data);
    });
}

/// `StartupMessage` for a protocol version.
pub fn startup<'a>(out: &mut Vec<u8>, version: u32, params: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
    untagged(out, |out| {
        out.extend_from_slice(&version.to_be_bytes());
        for (name, value) in params {
            cstr(out, name);
            cstr(out, value);
        }
        out.push(0);
    });
}

/// `CancelRequest`.
pub fn cancel_request(out: &mut Vec<u8>, pid: u32, secret: &[u8]) {
    untagged(out, |out| {
        out.extend_from_slice(&crate::startup::CANCEL_REQUEST.to_be_bytes());
        out.extend_from_slice(&pid.to_be_bytes());
        out.extend_from_slice(secret);
    });
}

/// `SASLInitialResponse`.
pub fn sasl_initial(out: &mut Vec<u8>, mechanism: &str, data: &[u8]) {
    message(out, b'p', |out| {
        cstr(out, mechanism.as_bytes());
        out.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(data);
    });
}

/// `SASLResponse`.
pub fn sasl_response(out: &mut Vec<u8>, data: &[u8]) {
    message(out, b'p', |out| out.extend_from_slice(data));
}

/// `Query`.
pub fn query(out: &mut Vec<u8>, text: &[u8]) {
    message(out, b'Q', |out| cstr(out, text));
}

/// `Parse`; `types` is a count and as many object ids, as in [`crate::frontend::Parse::types`].
pub fn parse(out: &mut Vec<u8>, statement: &[u8], text: &[u8], types: &[u8]) {
    message(out, b'P', |out| {
        cstr(out, statement);
        cstr(out, text);
        out.extend_from_slice(types);
    });
}

/// `Close` of a statement.
pub fn close_statement(out: &mut Vec<u8>, statement: &[u8]) {
    message(out, b'C', |out| {
        out.push(b'S');
        cstr(out, statement);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Fields;
    use crate::frontend;
    use crate::startup::{First, PROTOCOL_3_0, first_len};

    #[test]
    fn what_is_written_reads_back() {
        let mut out = Vec::new();
        startup(&mut out, PROTOCOL_3_0, [(&b"user"[..], &b"a"[..])].into_iter());
        assert_eq!(first_len(&out), Ok(Some(out.len())));
        assert!(matches!(First::parse(&out[4..]), Ok(First::Startup(s)) if s.get("user") == Some(b"a")));

        out.clear();
        negotiate_protocol_version(&mut out, PROTOCOL_3_0, &[b"_pq_.x"]);
        assert_eq!(crate::backend::negotiate_protocol_version(&out[5..]), Ok((PROTOCOL_3_0, 1)));

        out.clear();
        cancel_request(&mut out, 7, b"abcd");
        assert_eq!(First::parse(&out[4..]), Ok(First::Cancel { pid: 7, secret: b"abcd" }));

        out.clear();
        let report = Report { severity: "FATAL", code: "53300", message: "m", detail: "", hint: "h" };
        report.error(&mut out);
        let fields = Fields::parse(&out[5..]).unwrap();
        assert!(fields.is_fatal() && fields.sqlstate().as_str() == "53300" && fields.message == b"m");

        out.clear();
        parse(&mut out, b"s", b"SELECT $1", b"\0\x01\0\0\0\x17");
        let read = frontend::Parse::parse(&out[5..]).unwrap();
        assert_eq!((read.statement, read.query, read.types.len()), (&b"s"[..], &b"SELECT $1"[..], 6));

        out.clear();
        sasl_initial(&mut out, "SCRAM-SHA-256", b"n,,");
        assert_eq!(frontend::sasl_initial(&out[5..]), Ok((&b"SCRAM-SHA-256"[..], Some(&b"n,,"[..]))));
    }

    #[test]
    fn a_nul_in_a_text_begins_no_other_field() {
        let mut out = Vec::new();
        Report { severity: "ERROR", code: "08P01", message: "a\0Cb", detail: "", hint: "" }.error(&mut out);
        assert_eq!(Fields::parse(&out[5..]).unwrap().code, b"08P01");
    }
}

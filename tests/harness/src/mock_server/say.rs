//! What servers say, as bytes.

use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;

use crate::wire::build;

fn made(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut out);
    out
}

/// `Authentication…` of a kind with its data.
#[must_use]
pub fn auth(kind: u32, data: &[u8]) -> Vec<u8> {
    made(|out| encode::authentication(out, kind, data))
}

/// `ParameterStatus`.
#[must_use]
pub fn parameter(name: &str, value: &str) -> Vec<u8> {
    made(|out| encode::parameter_status(out, name.as_bytes(), value.as_bytes()))
}

/// `BackendKeyData`.
#[must_use]
pub fn key(pid: u32, secret: &[u8]) -> Vec<u8> {
    made(|out| encode::backend_key_data(out, pid, secret))
}

/// `ReadyForQuery`, idle.
#[must_use]
pub fn ready() -> Vec<u8> {
    made(|out| encode::ready_for_query(out, TxStatus::Idle))
}

/// `ErrorResponse`.
#[must_use]
pub fn error(severity: &str, code: &str, message: &str) -> Vec<u8> {
    made(|out| encode::Report { severity, code, message, detail: "", hint: "" }.error(out))
}

/// `NoticeResponse`.
#[must_use]
pub fn notice(message: &str) -> Vec<u8> {
    made(|out| encode::Report { severity: "NOTICE", code: "00000", message, detail: "", hint: "" }.notice(out))
}

/// `RowDescription` of one column of text.
#[must_use]
pub fn columns() -> Vec<u8> {
    build::message(b'T', b"\0\x01c\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0")
}

/// `DataRow` of one column.
#[must_use]
pub fn row(value: &str) -> Vec<u8> {
    made(|out| {
        encode::message(out, b'D', |out| {
            out.extend_from_slice(&[0, 1]);
            out.extend_from_slice(&u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
            out.extend_from_slice(value.as_bytes());
        });
    })
}

/// `CommandComplete`.
#[must_use]
pub fn done(tag: &str) -> Vec<u8> {
    made(|out| encode::command_complete(out, tag))
}

/// The whole answer to a simple query that gives one row.
#[must_use]
pub fn answer(value: &str) -> Vec<u8> {
    [columns(), row(value), done("SELECT 1"), ready()].concat()
}

/// The whole answer to a simple query that gives no row.
#[must_use]
pub fn nothing() -> Vec<u8> {
    [columns(), done("SELECT 0"), ready()].concat()
}

/// All that follows an `AuthenticationOk`, up to `ReadyForQuery`.
#[must_use]
pub fn greeting() -> Vec<u8> {
    let parameters = [
        ("server_version", "17.0"),
        ("server_encoding", "UTF8"),
        ("client_encoding", "UTF8"),
        ("standard_conforming_strings", "on"),
        ("DateStyle", "ISO, MDY"),
        ("integer_datetimes", "on"),
    ];
    let parameters: Vec<u8> = parameters.iter().flat_map(|(name, value)| parameter(name, value)).collect();
    [parameters, key(4711, b"abcd"), ready()].concat()
}

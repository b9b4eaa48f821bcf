//! Every frontend message as bytes.
//!
//! Names and texts are written as given: a NUL inside makes a malformed message, on purpose if at
//! all. Source: `PostgreSQL` 17 docs, §53.7 "Message Formats".

/// `StartupMessage`, protocol 3.0.
#[must_use]
pub fn startup(parameters: &[(&str, &str)]) -> Vec<u8> {
    startup_version(3, 0, parameters)
}

/// `StartupMessage` of any protocol version.
#[must_use]
pub fn startup_version(major: u16, minor: u16, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(major.to_be_bytes());
    body.extend(minor.to_be_bytes());
    for (name, value) in parameters {
        cstr(&mut body, name);
        cstr(&mut body, value);
    }
    body.push(0);
    untagged(&body)
}

/// `SSLRequest`.
#[must_use]
pub fn ssl_request() -> Vec<u8> {
    untagged(&80_877_103_u32.to_be_bytes())
}

/// `GSSENCRequest`.
#[must_use]
pub fn gss_request() -> Vec<u8> {
    untagged(&80_877_104_u32.to_be_bytes())
}

/// `CancelRequest`.
#[must_use]
pub fn cancel_request(pid: i32, secret: &[u8]) -> Vec<u8> {
    let mut body = 80_877_102_u32.to_be_bytes().to_vec();
    body.extend(pid.to_be_bytes());
    body.extend(secret);
    untagged(&body)
}

/// `PasswordMessage`: a password in clear or as an MD5 digest.
#[must_use]
pub fn password(text: &str) -> Vec<u8> {
    tagged(b'p', |body| cstr(body, text))
}

/// `SASLInitialResponse`.
#[must_use]
pub fn sasl_initial(mechanism: &str, data: &[u8]) -> Vec<u8> {
    tagged(b'p', |body| {
        cstr(body, mechanism);
        sized(body, Some(data));
    })
}

/// `SASLResponse`.
#[must_use]
pub fn sasl(data: &[u8]) -> Vec<u8> {
    tagged(b'p', |body| body.extend(data))
}

/// `Query`.
#[must_use]
pub fn query(sql: &str) -> Vec<u8> {
    tagged(b'Q', |body| cstr(body, sql))
}

/// `Parse`; `types` are the parameters' type OIDs, 0 for unspecified.
#[must_use]
pub fn parse(statement: &str, sql: &str, types: &[u32]) -> Vec<u8> {
    tagged(b'P', |body| {
        cstr(body, statement);
        cstr(body, sql);
        count(body, types.len());
        for oid in types {
            body.extend(oid.to_be_bytes());
        }
    })
}

/// `Bind` with all parameters and results in text format.
#[must_use]
pub fn bind(portal: &str, statement: &str, parameters: &[Option<&[u8]>]) -> Vec<u8> {
    bind_formats(portal, statement, &[], parameters, &[])
}

/// `Bind` with format codes (0 text, 1 binary; see the manual for none and for one).
#[must_use]
pub fn bind_formats(
    portal: &str,
    statement: &str,
    parameter_formats: &[i16],
    parameters: &[Option<&[u8]>],
    result_formats: &[i16],
) -> Vec<u8> {
    tagged(b'B', |body| {
        cstr(body, portal);
        cstr(body, statement);
        count(body, parameter_formats.len());
        for format in parameter_formats {
            body.extend(format.to_be_bytes());
        }
        count(body, parameters.len());
        for parameter in parameters {
            sized(body, *parameter);
        }
        count(body, result_formats.len());
        for format in result_formats {
            body.extend(format.to_be_bytes());
        }
    })
}

/// `Describe` of a statement.
#[must_use]
pub fn describe_statement(statement: &str) -> Vec<u8> {
    kind_and_name(b'D', b'S', statement)
}

/// `Describe` of a portal.
#[must_use]
pub fn describe_portal(portal: &str) -> Vec<u8> {
    kind_and_name(b'D', b'P', portal)
}

/// `Execute`; `max_rows` 0 is no limit.
#[must_use]
pub fn execute(portal: &str, max_rows: i32) -> Vec<u8> {
    tagged(b'E', |body| {
        cstr(body, portal);
        body.extend(max_rows.to_be_bytes());
    })
}

/// `Close` of a statement.
#[must_use]
pub fn close_statement(statement: &str) -> Vec<u8> {
    kind_and_name(b'C', b'S', statement)
}

/// `Close` of a portal.
#[must_use]
pub fn close_portal(portal: &str) -> Vec<u8> {
    kind_and_name(b'C', b'P', portal)
}

/// `Sync`.
#[must_use]
pub fn sync() -> Vec<u8> {
    message(b'S', &[])
}

/// `Flush`.
#[must_use]
pub fn flush() -> Vec<u8> {
    message(b'H', &[])
}

/// `CopyData`.
#[must_use]
pub fn copy_data(data: &[u8]) -> Vec<u8> {
    message(b'd', data)
}

/// `CopyDone`.
#[must_use]
pub fn copy_done() -> Vec<u8> {
    message(b'c', &[])
}

/// `CopyFail`.
#[must_use]
pub fn copy_fail(reason: &str) -> Vec<u8> {
    tagged(b'f', |body| cstr(body, reason))
}

/// `FunctionCall` with arguments and result in text format.
#[must_use]
pub fn function_call(function: u32, arguments: &[Option<&[u8]>]) -> Vec<u8> {
    tagged(b'F', |body| {
        body.extend(function.to_be_bytes());
        count(body, 0);
        count(body, arguments.len());
        for argument in arguments {
            sized(body, *argument);
        }
        body.extend(0_i16.to_be_bytes());
    })
}

/// `Terminate`.
#[must_use]
pub fn terminate() -> Vec<u8> {
    message(b'X', &[])
}

/// Any message with a tag: tag, length, `body`.
///
/// # Panics
///
/// When `body` is longer than a length word can say.
#[must_use]
pub fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend(untagged(body));
    bytes
}

/// A message with a tag whose length word says `length`, whatever follows: for malformed ones.
#[must_use]
pub fn message_lying(tag: u8, length: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend(length.to_be_bytes());
    bytes.extend(body);
    bytes
}

fn tagged(tag: u8, fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut body = Vec::new();
    fill(&mut body);
    message(tag, &body)
}

#[allow(clippy::expect_used, reason = "test support: no test sends a message of 4 GiB")]
fn untagged(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("a message is shorter than 4 GiB");
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(body);
    bytes
}

fn kind_and_name(tag: u8, kind: u8, name: &str) -> Vec<u8> {
    tagged(tag, |body| {
        body.push(kind);
        cstr(body, name);
    })
}

fn cstr(body: &mut Vec<u8>, text: &str) {
    body.extend(text.as_bytes());
    body.push(0);
}

#[allow(
    clippy::expect_used,
    reason = "test support: the wire counts to 65535 (the manual's Int16, read unsigned for parameters)"
)]
fn count(body: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("at most 65535 in one message");
    body.extend(count.to_be_bytes());
}

#[allow(clippy::expect_used, reason = "test support: no test sends a value of 2 GiB")]
fn sized(body: &mut Vec<u8>, value: Option<&[u8]>) {
    let Some(value) = value else {
        body.extend((-1_i32).to_be_bytes());
        return;
    };
    let length = i32::try_from(value.len()).expect("a value is shorter than 2 GiB");
    body.extend(length.to_be_bytes());
    body.extend(value);
}

#[cfg(test)]
mod tests {
    use super::{bind, cancel_request, execute, parse, query, startup};

    #[test]
    fn messages_have_the_manuals_bytes() {
        let nul: &[Option<&[u8]>] = &[None, Some(b"ab")];
        #[rustfmt::skip]
        let table: [(&str, Vec<u8>, &[u8]); 6] = [
            ("query",   query("x"),                b"Q\0\0\0\x06x\0"),
            ("parse",   parse("s", "x", &[23]),    b"P\0\0\0\x0es\0x\0\0\x01\0\0\0\x17"),
            ("bind",    bind("", "s", nul),        b"B\0\0\0\x17\0s\0\0\0\0\x02\xff\xff\xff\xff\0\0\0\x02ab\0\0"),
            ("execute", execute("", 7),            b"E\0\0\0\x09\0\0\0\0\x07"),
            ("startup", startup(&[("user", "u")]), b"\0\0\0\x10\0\x03\0\0user\0u\0\0"),
            ("cancel",  cancel_request(1, b"abcd"), b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x01abcd"),
        ];
        for (name, got, want) in table {
            assert_eq!(got, want, "{name}");
        }
    }
}

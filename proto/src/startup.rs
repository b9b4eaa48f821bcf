//! The untagged first packet of a connection.
//!
//! Source: `PostgreSQL` 17 docs, §54.7 "`StartupMessage`", "`CancelRequest`", "`SSLRequest`",
//! "`GSSENCRequest`", "`NegotiateProtocolVersion`".

use crate::Malformed;
use crate::malformed::{cstr, u32_be};

/// The largest first packet accepted; bytes, the length word included. Postgres' own limit.
pub const MAX_STARTUP: u32 = 10_000;

/// Protocol version 3.0, the oldest spoken.
pub const PROTOCOL_3_0: u32 = 3 << 16;
/// Protocol version 3.2, the newest spoken: as 3.0, with longer cancel keys. There is no 3.1.
///
/// Source: `PostgreSQL` 18 docs, §54.1 "Protocol Versions".
pub const PROTOCOL_3_2: u32 = 3 << 16 | 2;

/// The major version that stands for a request other than a session.
const REQUESTS: u32 = 1234 << 16;
/// The code of a `CancelRequest`.
pub const CANCEL_REQUEST: u32 = REQUESTS + 5678;
const SSL_REQUEST: u32 = REQUESTS + 5679;
/// A whole `SSLRequest`.
pub const SSL_REQUEST_PACKET: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const GSSENC_REQUEST: u32 = REQUESTS + 5680;

/// A first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First<'a> {
    /// A client wants a session.
    Startup(Startup<'a>),
    /// A client wants another connection's query cancelled.
    Cancel {
        /// The process id it was told.
        pid: u32,
        /// The secret it was told.
        secret: &'a [u8],
    },
    /// TLS, please.
    Ssl,
    /// GSSAPI encryption, please.
    GssEnc,
}

/// A `StartupMessage`, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Startup<'a> {
    /// The minor version asked for; the major one is 3.
    pub minor: u16,
    /// Name, NUL, value, NUL, ...; checked to be well formed.
    params: &'a [u8],
}

impl<'a> Startup<'a> {
    /// The version that is spoken with this client: the one asked for, or the newest there is.
    #[must_use]
    pub fn version(&self) -> u32 {
        (PROTOCOL_3_0 | u32::from(self.minor)).min(PROTOCOL_3_2)
    }

    /// What goes into the `NegotiateProtocolVersion` that this client has to get: the options that are not known. None
    /// if it gets all that it asked for.
    #[must_use]
    pub fn declined(&self) -> Option<Vec<&'a [u8]>> {
        let unknown: Vec<&[u8]> =
            self.params().map(|(name, _)| name).filter(|name| name.starts_with(b"_pq_.")).collect();
        (self.version() < PROTOCOL_3_0 | u32::from(self.minor) || !unknown.is_empty()).then_some(unknown)
    }

    /// The parameters in the order they came.
    pub fn params(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let mut rest = self.params;
        std::iter::from_fn(move || {
            let (name, tail) = cstr(rest, "").ok()?;
            let (value, tail) = cstr(tail, "").ok()?;
            rest = tail;
            (!name.is_empty()).then_some((name, value))
        })
    }

    /// The value of a parameter; the last one wins, as in Postgres.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.params().filter(|(n, _)| *n == name.as_bytes()).last().map(|(_, value)| value)
    }
}

/// The length of the first packet at the front of `input`; none while its length word is incomplete.
///
/// # Errors
///
/// [`Malformed::Length`] if it is below 8 or above [`MAX_STARTUP`].
pub fn first_len(input: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(word) = input.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(*word);
    if !(8..=MAX_STARTUP).contains(&length) {
        return Err(Malformed::Length { tag: 0, length, limit: MAX_STARTUP });
    }
    Ok(Some(length as usize))
}

impl<'a> First<'a> {
    /// Reads a first packet from `body`, what follows its length word.
    ///
    /// # Errors
    ///
    /// [`Malformed`]; an unsupported major version is [`Malformed::Unknown`].
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let (code, rest) = u32_be(body, "StartupMessage.version")?;
        match code {
            CANCEL_REQUEST => {
                let (pid, secret) = u32_be(rest, "CancelRequest.pid")?;
                if secret.len() < 4 || secret.len() > 256 {
                    return Err(Malformed::Short { field: "CancelRequest.secret" });
                }
                Ok(Self::Cancel { pid, secret })
            }
            SSL_REQUEST => Ok(Self::Ssl),
            GSSENC_REQUEST => Ok(Self::GssEnc),
            _ => Self::startup(code, rest),
        }
    }

    fn startup(code: u32, params: &'a [u8]) -> Result<Self, Malformed> {
        let [_, major, minor_high, minor_low] = code.to_be_bytes();
        if code >> 16 != 3 {
            return Err(Malformed::Unknown { field: "StartupMessage.version", value: major });
        }
        let mut rest = params;
        loop {
            let (name, tail) = cstr(rest, "StartupMessage.name")?;
            if name.is_empty() {
                // Postgres wants the terminator to be the last byte of the packet.
                if !tail.is_empty() {
                    return Err(Malformed::Short { field: "StartupMessage.terminator" });
                }
                break;
            }
            rest = cstr(tail, "StartupMessage.value")?.1;
        }
        Ok(Self::Startup(Startup { minor: u16::from_be_bytes([minor_high, minor_low]), params }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(code: u32, rest: &[u8]) -> Vec<u8> {
        [&code.to_be_bytes()[..], rest].concat()
    }

    #[test]
    fn first_packets_are_told_apart() {
        #[rustfmt::skip]
        let table: [(&str, u32, &[u8], bool); 10] = [
            ("startup",            PROTOCOL_3_0,     b"user\0a\0\0",     true),
            ("newer minor",        PROTOCOL_3_0 | 9, b"user\0a\0\0",     true),
            ("no parameters",      PROTOCOL_3_0,     b"\0",              true),
            ("old major",          2 << 16,          b"user\0a\0\0",     false),
            ("no terminator",      PROTOCOL_3_0,     b"user\0a\0",       false),
            ("after terminator",   PROTOCOL_3_0,     b"user\0a\0\0x",    false),
            ("no value",           PROTOCOL_3_0,     b"user\0",          false),
            ("ssl",                SSL_REQUEST,      b"",                true),
            ("cancel",             CANCEL_REQUEST,   b"\0\0\0\x01abcd",  true),
            ("cancel, no secret",  CANCEL_REQUEST,   b"\0\0\0\x01",      false),
        ];
        for (name, code, rest, ok) in table {
            assert_eq!(First::parse(&packet(code, rest)).is_ok(), ok, "{name}");
        }
    }

    #[test]
    fn versions_above_ours_and_unknown_options_are_declined() {
        #[rustfmt::skip]
        let table: [(&str, u32, &[u8], u32, Option<usize>); 6] = [
            ("3.0",             0,    b"user\0a\0\0",              PROTOCOL_3_0,     None),
            ("3.0, an option",  0,    b"_pq_.x\0on\0user\0a\0\0", PROTOCOL_3_0,     Some(1)),
            ("3.1",             1,    b"user\0a\0\0",              PROTOCOL_3_0 | 1, None),
            ("3.2",             2,    b"user\0a\0\0",              PROTOCOL_3_2,     None),
            ("3.3",             3,    b"user\0a\0\0",              PROTOCOL_3_2,     Some(0)),
            ("3.9999",          9999, b"user\0a\0_pq_.y\0\0\0",  PROTOCOL_3_2,     Some(1)),
        ];
        for (name, minor, rest, version, declined) in table {
            let bytes = packet(PROTOCOL_3_0 | minor, rest);
            let First::Startup(startup) = First::parse(&bytes).unwrap() else { panic!("{name}: not a startup") };
            assert_eq!(startup.version(), version, "{name}");
            assert_eq!(startup.declined().map(|options| options.len()), declined, "{name}");
        }
    }

    #[test]
    fn the_last_of_equal_parameters_wins() {
        let bytes = packet(PROTOCOL_3_0, b"user\0a\0user\0b\0database\0d\0\0");
        let First::Startup(startup) = First::parse(&bytes).unwrap() else { panic!("not a startup") };
        assert_eq!(startup.get("user"), Some(&b"b"[..]));
        assert_eq!(startup.get("options"), None);
        assert_eq!(startup.params().count(), 3);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = first_len(&bytes);
            if let Ok(First::Startup(startup)) = First::parse(&bytes) {
                let _ = startup.params().count();
            }
        }
    }
}

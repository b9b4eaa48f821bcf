//! Messages from a server: tags and views.
//!
//! Source: `PostgreSQL` 17 docs, §54.7 "Message Formats".

use crate::Malformed;
use crate::malformed::{cstr, u32_be};

/// A backend message's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    /// `Authentication…`.
    Authentication = b'R',
    /// `BackendKeyData`.
    BackendKeyData = b'K',
    /// `BindComplete`.
    BindComplete = b'2',
    /// `CloseComplete`.
    CloseComplete = b'3',
    /// `CommandComplete`.
    CommandComplete = b'C',
    /// `CopyBothResponse`.
    CopyBothResponse = b'W',
    /// `CopyData`.
    CopyData = b'd',
    /// `CopyDone`.
    CopyDone = b'c',
    /// `CopyInResponse`.
    CopyInResponse = b'G',
    /// `CopyOutResponse`.
    CopyOutResponse = b'H',
    /// `DataRow`.
    DataRow = b'D',
    /// `EmptyQueryResponse`.
    EmptyQueryResponse = b'I',
    /// `ErrorResponse`.
    ErrorResponse = b'E',
    /// `FunctionCallResponse`.
    FunctionCallResponse = b'V',
    /// `NegotiateProtocolVersion`.
    NegotiateProtocolVersion = b'v',
    /// `NoData`.
    NoData = b'n',
    /// `NoticeResponse`.
    NoticeResponse = b'N',
    /// `NotificationResponse`.
    NotificationResponse = b'A',
    /// `ParameterDescription`.
    ParameterDescription = b't',
    /// `ParameterStatus`.
    ParameterStatus = b'S',
    /// `ParseComplete`.
    ParseComplete = b'1',
    /// `PortalSuspended`.
    PortalSuspended = b's',
    /// `ReadyForQuery`.
    ReadyForQuery = b'Z',
    /// `RowDescription`.
    RowDescription = b'T',
}

impl Tag {
    /// The tag of a byte.
    ///
    /// # Errors
    ///
    /// [`Malformed::Unknown`] for a byte that begins no backend message.
    #[inline]
    pub fn from_byte(byte: u8) -> Result<Self, Malformed> {
        // Each message asks: a look into a table is a third of what a chain of comparisons takes.
        static TABLE: [Option<Tag>; 256] = Tag::by_byte();
        match TABLE.get(usize::from(byte)) {
            Some(Some(tag)) => Ok(*tag),
            _ => Err(Malformed::Unknown { field: "message type", value: byte }),
        }
    }

    #[expect(clippy::indexing_slicing, reason = "a byte is always within, and all of this is done by the compiler")]
    const fn by_byte() -> [Option<Self>; 256] {
        let all = [
            Self::DataRow,
            Self::ReadyForQuery,
            Self::CommandComplete,
            Self::RowDescription,
            Self::BindComplete,
            Self::ParseComplete,
            Self::CloseComplete,
            Self::CopyData,
            Self::CopyDone,
            Self::CopyInResponse,
            Self::CopyOutResponse,
            Self::CopyBothResponse,
            Self::ErrorResponse,
            Self::NoticeResponse,
            Self::ParameterStatus,
            Self::NotificationResponse,
            Self::EmptyQueryResponse,
            Self::NoData,
            Self::PortalSuspended,
            Self::ParameterDescription,
            Self::FunctionCallResponse,
            Self::Authentication,
            Self::BackendKeyData,
            Self::NegotiateProtocolVersion,
        ];
        let mut table = [None; 256];
        let mut at = 0;
        while at < all.len() {
            table[all[at] as usize] = Some(all[at]);
            at += 1;
        }
        table
    }
}

/// The transaction status byte of `ReadyForQuery`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum TxStatus {
    /// Not in a transaction block.
    #[default]
    Idle = b'I',
    /// In a transaction block.
    Open = b'T',
    /// In a failed transaction block.
    Failed = b'E',
}

impl TxStatus {
    /// Reads the body of a `ReadyForQuery`.
    ///
    /// # Errors
    ///
    /// [`Malformed`] if it is not one known byte.
    #[inline]
    pub const fn parse(body: &[u8]) -> Result<Self, Malformed> {
        match body {
            b"I" => Ok(Self::Idle),
            b"T" => Ok(Self::Open),
            b"E" => Ok(Self::Failed),
            &[value] => Err(Malformed::Unknown { field: "ReadyForQuery.status", value }),
            _ => Err(Malformed::Short { field: "ReadyForQuery.status" }),
        }
    }
}

/// An `Authentication…` message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authentication<'a> {
    /// `AuthenticationOk`.
    Ok,
    /// `AuthenticationCleartextPassword`.
    Cleartext,
    /// `AuthenticationMD5Password`.
    Md5 {
        /// What to mix into the hash.
        salt: [u8; 4],
    },
    /// `AuthenticationSASL`: NUL-terminated mechanism names, as they came.
    Sasl {
        /// The list, ended by an empty name.
        mechanisms: &'a [u8],
    },
    /// `AuthenticationSASLContinue`.
    SaslContinue(&'a [u8]),
    /// `AuthenticationSASLFinal`.
    SaslFinal(&'a [u8]),
    /// A method that is not spoken here (Kerberos, GSSAPI, SSPI, ...).
    Other(u32),
}

impl<'a> Authentication<'a> {
    /// Reads the body of an `Authentication…` message. Copies nothing.
    ///
    /// # Errors
    ///
    /// [`Malformed::Short`].
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let (kind, rest) = u32_be(body, "Authentication.kind")?;
        Ok(match kind {
            0 => Self::Ok,
            3 => Self::Cleartext,
            5 => Self::Md5 { salt: *rest.first_chunk().ok_or(Malformed::Short { field: "Authentication.salt" })? },
            10 => Self::Sasl { mechanisms: rest },
            11 => Self::SaslContinue(rest),
            12 => Self::SaslFinal(rest),
            other => Self::Other(other),
        })
    }
}

/// The body of a `ParameterStatus`: name and value.
///
/// # Errors
///
/// [`Malformed::MissingNul`].
pub fn parameter_status(body: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let (name, rest) = cstr(body, "ParameterStatus.name")?;
    let (value, _) = cstr(rest, "ParameterStatus.value")?;
    Ok((name, value))
}

/// The body of a `BackendKeyData`: process id and secret (4 bytes in 3.0, up to 256 in 3.2).
///
/// # Errors
///
/// [`Malformed::Short`].
pub fn backend_key_data(body: &[u8]) -> Result<(u32, &[u8]), Malformed> {
    let (pid, secret) = u32_be(body, "BackendKeyData.pid")?;
    if secret.len() < 4 || secret.len() > 256 {
        return Err(Malformed::Short { field: "BackendKeyData.secret" });
    }
    Ok((pid, secret))
}

/// The body of a `NegotiateProtocolVersion`: the newest version that the server speaks, and how many of the options asked
/// for it does not know.
///
/// # Errors
///
/// [`Malformed::Short`].
pub fn negotiate_protocol_version(body: &[u8]) -> Result<(u32, u32), Malformed> {
    let (version, rest) = u32_be(body, "NegotiateProtocolVersion.version")?;
    let (unknown, _) = u32_be(rest, "NegotiateProtocolVersion.count")?;
    Ok((version, unknown))
}

/// The columns of a `DataRow`; `None` for NULL. Ends early if the row is malformed.
///
/// Source: `PostgreSQL` 17 docs, §54.7 "Message Formats".
pub fn row_columns(body: &[u8]) -> impl Iterator<Item = Option<&[u8]>> {
    let mut rest = body.get(2..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (word, tail) = rest.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*word);
        if length == u32::MAX {
            rest = tail;
            return Some(None);
        }
        let value = tail.get(..length as usize)?;
        rest = tail.get(length as usize..)?;
        Some(Some(value))
    })
}

/// The tag text of a `CommandComplete`.
///
/// # Errors
///
/// [`Malformed::MissingNul`].
pub fn command_tag(body: &[u8]) -> Result<&[u8], Malformed> {
    Ok(cstr(body, "CommandComplete.tag")?.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_tag_reads_back_from_its_own_byte() {
        let known = (0..=u8::MAX).filter_map(|b| Tag::from_byte(b).ok().map(|t| (b, t)));
        let mut count = 0;
        for (byte, tag) in known {
            assert_eq!(byte, tag as u8);
            count += 1;
        }
        assert_eq!(count, 24);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = (Authentication::parse(&body), parameter_status(&body), backend_key_data(&body));
            let _ = (command_tag(&body), TxStatus::parse(&body), negotiate_protocol_version(&body));
        }
    }
}

//! Messages from a client: tags and views.
//!
//! Source: `PostgreSQL` 17 docs, §54.7 "Message Formats".

use crate::Malformed;
use crate::malformed::{cstr, u16_be, u32_be};

/// A frontend message's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    /// `Bind`.
    Bind = b'B',
    /// `Close`.
    Close = b'C',
    /// `CopyData`.
    CopyData = b'd',
    /// `CopyDone`.
    CopyDone = b'c',
    /// `CopyFail`.
    CopyFail = b'f',
    /// `Describe`.
    Describe = b'D',
    /// `Execute`.
    Execute = b'E',
    /// `Flush`.
    Flush = b'H',
    /// `FunctionCall`.
    FunctionCall = b'F',
    /// `Parse`.
    Parse = b'P',
    /// `PasswordMessage`, `SASLInitialResponse`, `SASLResponse` or `GSSResponse`.
    Password = b'p',
    /// `Query`.
    Query = b'Q',
    /// `Sync`.
    Sync = b'S',
    /// `Terminate`.
    Terminate = b'X',
}

impl Tag {
    /// The tag of a byte.
    ///
    /// # Errors
    ///
    /// [`Malformed::Unknown`] for a byte that begins no frontend message.
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
            Self::Query,
            Self::Parse,
            Self::Bind,
            Self::Execute,
            Self::Sync,
            Self::Describe,
            Self::Close,
            Self::Flush,
            Self::CopyData,
            Self::CopyDone,
            Self::CopyFail,
            Self::FunctionCall,
            Self::Password,
            Self::Terminate,
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

/// A `Parse` message, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parse<'a> {
    /// Empty for the unnamed statement.
    pub statement: &'a [u8],
    /// The text of the statement.
    pub query: &'a [u8],
    /// Parameter types: a count and as many object ids, as they came.
    pub types: &'a [u8],
}

impl<'a> Parse<'a> {
    /// Reads a `Parse` from `body`. Copies nothing.
    ///
    /// # Errors
    ///
    /// [`Malformed::MissingNul`] or [`Malformed::Short`].
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let (statement, body) = cstr(body, "Parse.statement")?;
        let (query, types) = cstr(body, "Parse.query")?;
        let (count, oids) = u16_be(types, "Parse.types")?;
        if oids.len() != usize::from(count) * 4 {
            return Err(Malformed::Short { field: "Parse.types" });
        }
        Ok(Self { statement, query, types })
    }
}

/// A `Bind` message, borrowed from the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bind<'a> {
    /// Empty for the unnamed portal.
    pub portal: &'a [u8],
    /// Empty for the unnamed statement.
    pub statement: &'a [u8],
    /// Formats and parameters, forwarded untouched.
    pub rest: &'a [u8],
}

impl<'a> Bind<'a> {
    /// Reads a `Bind` from `body`, which may lack the end of the message as long as both names are
    /// there. Copies nothing.
    ///
    /// # Errors
    ///
    /// [`Malformed::MissingNul`] if either name runs past the end of `body`.
    #[inline]
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let (portal, body) = cstr(body, "Bind.portal")?;
        let (statement, rest) = cstr(body, "Bind.statement")?;
        Ok(Self { portal, statement, rest })
    }

    /// The value of the parameter `$number`, if that is in what is here of the message: whether it is binary, and its bytes;
    /// none for NULL. Takes time in proportion to `number`.
    #[must_use]
    pub fn parameter(&self, number: usize) -> Option<(bool, Option<&'a [u8]>)> {
        let at = number.checked_sub(1)?;
        let (formats, rest) = u16_be(self.rest, "Bind.formats").ok()?;
        let (codes, rest) = rest.split_at_checked(2 * usize::from(formats))?;
        let code = match formats {
            0 => 0,
            1 => u16_be(codes, "Bind.formats").ok()?.0,
            _ => u16_be(codes.get(2 * at..)?, "Bind.formats").ok()?.0,
        };
        let is_binary = match code {
            0 => false,
            1 => true,
            _ => return None,
        };
        let (count, mut rest) = u16_be(rest, "Bind.values").ok()?;
        if at >= usize::from(count) {
            return None;
        }
        for nth in 0..=at {
            let (length, tail) = u32_be(rest, "Bind.values").ok()?;
            let (value, tail) = match length {
                u32::MAX => (None, tail),
                length => tail.split_at_checked(length as usize).map(|(value, tail)| (Some(value), tail))?,
            };
            if nth == at {
                return Some((is_binary, value));
            }
            rest = tail;
        }
        None
    }
}

/// What a `Describe` or `Close` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// A prepared statement; empty for the unnamed one.
    Statement(&'a [u8]),
    /// A portal; empty for the unnamed one.
    Portal(&'a [u8]),
}

impl<'a> Target<'a> {
    /// Reads the body of a `Describe` or `Close`. Copies nothing.
    ///
    /// # Errors
    ///
    /// [`Malformed::Short`], [`Malformed::MissingNul`], or [`Malformed::Unknown`] for a kind that
    /// is neither `S` nor `P`.
    #[inline]
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let (&kind, rest) = body.split_first().ok_or(Malformed::Short { field: "Describe.kind" })?;
        let (name, _) = cstr(rest, "Describe.name")?;
        match kind {
            b'S' => Ok(Self::Statement(name)),
            b'P' => Ok(Self::Portal(name)),
            value => Err(Malformed::Unknown { field: "Describe.kind", value }),
        }
    }
}

/// The text of a `Query` message.
///
/// # Errors
///
/// [`Malformed::MissingNul`] if the text is not ended by the message's last byte, the only NUL.
#[inline]
pub fn query_text(body: &[u8]) -> Result<&[u8], Malformed> {
    match body.split_last() {
        Some((0, text)) if memchr::memchr(0, text).is_none() => Ok(text),
        _ => Err(Malformed::MissingNul { field: "Query.query" }),
    }
}

/// A `SASLInitialResponse`: the mechanism and its first message, if it brings one.
///
/// # Errors
///
/// [`Malformed`] if a field is cut short.
pub fn sasl_initial(body: &[u8]) -> Result<(&[u8], Option<&[u8]>), Malformed> {
    let (mechanism, body) = cstr(body, "SASLInitialResponse.mechanism")?;
    let (length, rest) = u32_be(body, "SASLInitialResponse.length")?;
    if length == u32::MAX && rest.is_empty() {
        return Ok((mechanism, None));
    }
    if length as usize != rest.len() {
        return Err(Malformed::Short { field: "SASLInitialResponse.data" });
    }
    Ok((mechanism, Some(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bind_splits_at_the_second_nul() {
        type Want = Result<(&'static str, &'static str, usize), Malformed>;
        let missing = |field| Err(Malformed::MissingNul { field });
        #[rustfmt::skip]
        let table: [(&str, &[u8], Want); 4] = [
            ("unnamed",      b"\0\0\0\0",    Ok(("", "", 2))),
            ("named",        b"p\0s1\0\0\0", Ok(("p", "s1", 2))),
            ("no NUL",       b"p",           missing("Bind.portal")),
            ("one NUL only", b"p\0s1",       missing("Bind.statement")),
        ];
        for (name, body, want) in table {
            let got = Bind::parse(body).map(|b| {
                (std::str::from_utf8(b.portal).unwrap(), std::str::from_utf8(b.statement).unwrap(), b.rest.len())
            });
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn a_parameter_is_told_if_it_is_there() {
        const VALUES: &[u8] = b"\0\x03\0\0\0\x02ab\xff\xff\xff\xff\0\0\0\0\0\0";
        type Want = Option<(bool, Option<&'static [u8]>)>;
        #[rustfmt::skip]
        let table: [(&str, &[u8], usize, usize, Want); 13] = [
            ("text",               b"\0\0",                     0,  1, Some((false, Some(b"ab")))),
            ("NULL",               b"\0\0",                     0,  2, Some((false, None))),
            ("empty",              b"\0\0",                     0,  3, Some((false, Some(b"")))),
            ("one too many",       b"\0\0",                     0,  4, None),
            ("none has this",      b"\0\0",                     0,  0, None),
            ("all binary",         b"\0\x01\0\x01",            0,  1, Some((true, Some(b"ab")))),
            ("each its own",       b"\0\x03\0\0\0\x01\0\0",  0,  2, Some((true, None))),
            ("the last",           b"\0\x03\0\0\0\x01\0\0",  0,  3, Some((false, Some(b"")))),
            ("too few formats",    b"\0\x02\0\0\0\x01",       0,  3, None),
            ("an unknown format",  b"\0\x01\0\x02",            0,  1, None),
            ("formats cut",        b"\0\x09\0\x01",            16, 1, None),
            ("in front of a cut",  b"\0\0",                     10, 1, Some((false, Some(b"ab")))),
            ("behind a cut",       b"\0\0",                     10, 3, None),
        ];
        for (name, formats, cut, number, want) in table {
            let rest = [formats, &VALUES[..VALUES.len() - cut]].concat();
            let bind = Bind { portal: b"", statement: b"", rest: &rest };
            assert_eq!(bind.parameter(number), want, "{name}");
        }
    }

    #[test]
    fn parse_wants_as_many_types_as_it_counts() {
        #[rustfmt::skip]
        let table: [(&str, &[u8], bool); 6] = [
            ("none",          b"s\0SELECT 1\0\0\0",                 true),
            ("one",           b"s\0SELECT 1\0\0\x01\0\0\0\x17",     true),
            ("one missing",   b"s\0SELECT 1\0\0\x01\0\0",           false),
            ("too many",      b"s\0SELECT 1\0\0\0\0\0\0\x17",       false),
            ("no count",      b"s\0SELECT 1\0",                     false),
            ("no query",      b"s\0SELECT 1",                       false),
        ];
        for (name, body, ok) in table {
            assert_eq!(Parse::parse(body).is_ok(), ok, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Bind::parse(&body).map(|bind| [0, 1, 2, 9].map(|number| bind.parameter(number)));
            let _ = (Parse::parse(&body), Target::parse(&body), query_text(&body), sasl_initial(&body));
        }
    }
}

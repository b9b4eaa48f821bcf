//! Which encodings the texts of a server connection are in, as far as that tells what the positions in its errors count:
//! characters, which the server counts in an encoding of its own.

use pgweir_proto::backend::{self, Tag};

use super::{ENCODING, Profile};

/// An encoding, as far as it makes a difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// Any other, or none that is known.
    #[default]
    Other,
    /// UTF-8.
    Utf8,
    /// Each byte is a character, and all that is ASCII means that.
    Bytes,
}

impl Encoding {
    /// That of a name, as the server spells it or nearly so.
    ///
    /// Source: `PostgreSQL` 17 docs, §23.3.1 "Supported Character Sets".
    fn of(name: &[u8]) -> Self {
        const BYTES: [&[u8]; 27] = [
            b"iso88595",
            b"iso88596",
            b"iso88597",
            b"iso88598",
            b"koi8r",
            b"koi8u",
            b"latin1",
            b"latin2",
            b"latin3",
            b"latin4",
            b"latin5",
            b"latin6",
            b"latin7",
            b"latin8",
            b"latin9",
            b"latin10",
            b"win866",
            b"win874",
            b"win1250",
            b"win1251",
            b"win1252",
            b"win1253",
            b"win1254",
            b"win1255",
            b"win1256",
            b"win1257",
            b"win1258",
        ];
        let letters = name.iter().filter(|byte| byte.is_ascii_alphanumeric());
        let name: Vec<u8> = letters.map(u8::to_ascii_lowercase).collect();
        match &*name {
            b"utf8" | b"unicode" => Self::Utf8,
            name if BYTES.contains(&name) => Self::Bytes,
            _ => Self::Other,
        }
    }

    /// Whether it is certain what `text` is in it.
    #[must_use]
    pub fn reads(self, text: &[u8]) -> bool {
        text.is_ascii()
            || match self {
                Self::Other => false,
                Self::Utf8 => std::str::from_utf8(text).is_ok(),
                Self::Bytes => true,
            }
    }

    /// The characters of a text that it [reads](Self::reads).
    #[must_use]
    pub fn count(self, text: &[u8]) -> usize {
        let continues = |byte: &&u8| **byte & 0xc0 == 0x80;
        let more = if self == Self::Utf8 { text.iter().filter(continues).count() } else { 0 };
        text.len() - more
    }
}

/// Those of one server connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Encodings {
    /// The database's, in which positions are counted.
    server: Encoding,
    /// That of its client, as it was reported last.
    client: Encoding,
    /// That of a client that has set none.
    plain: Encoding,
}

impl Encodings {
    /// The server has said something: true if it is the client's.
    pub fn hear(&mut self, tag: Tag, body: &[u8]) -> bool {
        if tag != Tag::ParameterStatus {
            return false;
        }
        match backend::parameter_status(body) {
            Ok((b"client_encoding", value)) => {
                self.client = Encoding::of(value);
                return true;
            }
            Ok((b"server_encoding", value)) => self.server = Encoding::of(value),
            _ => {}
        }
        false
    }

    /// What was reported last is that of who has set none.
    pub const fn begin(&mut self) {
        self.plain = self.client;
    }

    /// That of a text that is sent now; in front of which the settings `to` are on their way, if they are given.
    ///
    /// An encoding that has several bytes for a character is not converted, nor is one to one that has.
    #[must_use]
    pub fn of_text(self, to: Option<&Profile>) -> Encoding {
        let client = to.map_or(self.client, |to| to.get(ENCODING).map_or(self.plain, Encoding::of));
        match (client, self.server) {
            (Encoding::Utf8, Encoding::Utf8) | (Encoding::Bytes, Encoding::Utf8 | Encoding::Bytes) => client,
            _ => Encoding::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Profiles;
    use super::*;

    #[test]
    fn encodings_are_told_by_their_names() {
        for (name, want) in [
            ("UTF8", Encoding::Utf8),
            ("utf-8", Encoding::Utf8),
            ("LATIN1", Encoding::Bytes),
            ("ISO_8859_5", Encoding::Bytes),
            ("WIN1252", Encoding::Bytes),
            ("KOI8R", Encoding::Bytes),
            ("SJIS", Encoding::Other),
            ("EUC_JP", Encoding::Other),
            ("SQL_ASCII", Encoding::Other),
            ("MULE_INTERNAL", Encoding::Other),
            ("", Encoding::Other),
        ] {
            assert_eq!(Encoding::of(name.as_bytes()), want, "{name}");
        }
    }

    #[test]
    fn characters_are_counted_where_it_is_certain_what_they_are() {
        for (encoding, text, reads, count) in [
            (Encoding::Other, &b"abc"[..], true, 3),
            (Encoding::Other, b"\xc3\xa9", false, 2),
            (Encoding::Utf8, b"a\xc3\xa9\xf0\x9f\x98\x80", true, 3),
            (Encoding::Utf8, b"\xe9", false, 1),
            (Encoding::Utf8, b"\xed\xa0\x80", false, 1),
            (Encoding::Bytes, b"a\xc3\xa9", true, 3),
        ] {
            assert_eq!((encoding.reads(text), encoding.count(text)), (reads, count), "{encoding:?} {text:?}");
        }
    }

    #[test]
    fn the_encoding_in_force_is_that_reported_last_or_on_its_way() {
        let profiles = Profiles::default();
        let with = |name: &str| profiles.intern([(ENCODING.into(), name.as_bytes().into())]);
        let mut encodings = Encodings::default();
        let mut hear = |name: &str, value: &str| {
            encodings.hear(Tag::ParameterStatus, format!("{name}\0{value}\0").as_bytes());
            encodings
        };
        assert_eq!(hear("client_encoding", "UTF8").of_text(None), Encoding::Other, "that of the server is not known");
        assert_eq!(hear("server_encoding", "UTF8").of_text(None), Encoding::Utf8);
        let mut begun = hear("TimeZone", "LATIN1");
        begun.begin();
        for (to, want) in [("latin1", Encoding::Bytes), ("UTF8", Encoding::Utf8), ("SJIS", Encoding::Other)] {
            assert_eq!(begun.of_text(Some(&with(to))), want, "{to}");
        }
        assert_eq!(begun.of_text(Some(&profiles.plain())), Encoding::Utf8);
        assert_eq!(hear("client_encoding", "SJIS").of_text(None), Encoding::Other);
        assert_eq!(hear("client_encoding", "LATIN1").of_text(None), Encoding::Bytes);
        assert_eq!(hear("server_encoding", "LATIN1").of_text(None), Encoding::Bytes);
        assert_eq!(hear("client_encoding", "UTF8").of_text(None), Encoding::Other);
        assert_eq!(hear("server_encoding", "SQL_ASCII").of_text(None), Encoding::Other);
    }
}

//! How a server describes a statement, as a hash: what drivers remember of it, and decode its rows by for ever.

/// The parameters' and the rows' description; of each a hash, 0 if it is not known.
///
/// Only what a driver decodes by counts: of a parameter its type; of a column its name, type and modifier. The table that
/// a column comes from does not (Postgres itself lets it change), nor does the format, which is the client's own choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Described {
    parameters: u32,
    rows: u32,
}

/// What is known of a statement as a server connection has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// How often the statement had been [outdated](super::Statement::outdate) when it was parsed.
    pub epoch: u32,
    /// How the server describes it, as far as it was asked. It does not change: were it to, the server would refuse.
    pub described: Described,
    /// It was parsed to be compared with what a client was told.
    pub renewed: bool,
    /// It was parsed with the parameters' types that a client was told, where clients leave them to the server.
    pub spelled: bool,
}

/// How a description fits what a client was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It is the same.
    Same,
    /// A part that the client was told is not known.
    Unknown,
    /// It is another.
    Other,
}

impl Described {
    /// From the body of a `ParameterDescription`.
    #[must_use]
    pub fn parameters(body: &[u8]) -> Self {
        Self { parameters: Hash::new(b't').take(body).end(), rows: 0 }
    }

    /// From the body of a `RowDescription`; none for `NoData`.
    ///
    /// Source: `PostgreSQL` 17 docs, §54.7 "`RowDescription` (B)".
    #[must_use]
    pub fn rows(body: Option<&[u8]>) -> Self {
        let mut hash = Hash::new(if body.is_some() { b'T' } else { b'n' });
        let mut rest = body.and_then(|body| body.get(2..)).unwrap_or_default();
        while let Some(end) = memchr::memchr(0, rest) {
            let (name, behind) = rest.split_at(end + 1);
            // Table (4) and column number (2), type (4), its size (2) and modifier (4), format (2).
            let kind = behind.get(6..16).unwrap_or_default();
            hash = hash.take(name).take(kind);
            rest = behind.get(18..).unwrap_or_default();
        }
        Self { parameters: 0, rows: hash.end() }
    }

    /// Whether something is known.
    #[must_use]
    #[inline]
    pub const fn is_known(self) -> bool {
        self.parameters | self.rows != 0
    }

    /// Whether it is known that there are no rows.
    #[must_use]
    pub fn has_no_rows(self) -> bool {
        self.rows == Self::rows(None).rows
    }

    /// Without the rows': whoever is told of them at once reads them right.
    #[must_use]
    #[inline]
    pub const fn without_rows(self) -> Self {
        Self { parameters: self.parameters, rows: 0 }
    }

    /// Whether the parameters' types are known, and nothing else is.
    #[must_use]
    pub const fn is_of_parameters(self) -> bool {
        self.parameters != 0 && self.rows == 0
    }

    /// What is known now, of each part the later.
    #[must_use]
    pub const fn with(self, later: Self) -> Self {
        Self {
            parameters: if later.parameters == 0 { self.parameters } else { later.parameters },
            rows: if later.rows == 0 { self.rows } else { later.rows },
        }
    }

    /// How this fits what a client was `told`: whatever that is, if it was told nothing.
    #[must_use]
    #[inline]
    pub const fn fits(self, told: Self) -> Fit {
        if told.parameters != 0 && self.parameters == 0 || told.rows != 0 && self.rows == 0 {
            Fit::Unknown
        } else if told.parameters != 0 && told.parameters != self.parameters || told.rows != 0 && told.rows != self.rows
        {
            Fit::Other
        } else {
            Fit::Same
        }
    }
}

/// FNV-1a, 64 bits wide, of which 32 are kept: two descriptions of one statement are compared, not millions.
///
/// Source: RFC 9923.
struct Hash(u64);

impl Hash {
    fn new(kind: u8) -> Self {
        Self(0xCBF2_9CE4_8422_2325).take(&[kind])
    }

    fn take(self, bytes: &[u8]) -> Self {
        Self(bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3)))
    }

    fn end(self) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "the halves are folded onto each other")]
        let folded = (self.0 ^ (self.0 >> 32)) as u32;
        folded.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A column: name, table, type, modifier, format.
    fn rows(columns: &[(&str, u32, u32, i32, u8)]) -> Described {
        let mut body = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
        for (name, table, kind, modifier, format) in columns {
            body.extend_from_slice(name.as_bytes());
            body.push(0);
            body.extend_from_slice(&table.to_be_bytes());
            body.extend_from_slice(&[0, 1]);
            body.extend_from_slice(&kind.to_be_bytes());
            body.extend_from_slice(&[0, 4]);
            body.extend_from_slice(&modifier.to_be_bytes());
            body.extend_from_slice(&[0, *format]);
        }
        Described::rows(Some(&body))
    }

    #[test]
    fn descriptions_differ_where_a_driver_would_read_something_else() {
        let one = rows(&[("a", 7, 23, -1, 0), ("b", 7, 25, -1, 0)]);
        #[rustfmt::skip]
        let table = [
            ("the same",          rows(&[("a", 7, 23, -1, 0), ("b", 7, 25, -1, 0)]), Fit::Same),
            ("another table",     rows(&[("a", 8, 23, -1, 0), ("b", 9, 25, -1, 0)]), Fit::Same),
            ("binary",            rows(&[("a", 7, 23, -1, 1), ("b", 7, 25, -1, 1)]), Fit::Same),
            ("another type",      rows(&[("a", 7, 20, -1, 0), ("b", 7, 25, -1, 0)]), Fit::Other),
            ("another modifier",  rows(&[("a", 7, 23, -1, 0), ("b", 7, 25, 12, 0)]), Fit::Other),
            ("another name",      rows(&[("a", 7, 23, -1, 0), ("c", 7, 25, -1, 0)]), Fit::Other),
            ("a column more",     rows(&[("a", 7, 23, -1, 0), ("b", 7, 25, -1, 0), ("c", 7, 25, -1, 0)]), Fit::Other),
            ("a column less",     rows(&[("a", 7, 23, -1, 0)]), Fit::Other),
            ("none",              rows(&[]), Fit::Other),
            ("no rows",           Described::rows(None), Fit::Other),
            ("not known",         Described::default(), Fit::Unknown),
        ];
        for (name, other, want) in table {
            assert_eq!(other.fits(one), want, "{name}");
        }
        assert_eq!(one.fits(Described::default()), Fit::Same, "whoever was told nothing reads anything");
    }

    #[test]
    fn parameters_and_rows_are_told_apart_and_together() {
        let (int, text) = (Described::parameters(b"\0\x01\0\0\0\x17"), Described::parameters(b"\0\x01\0\0\0\x19"));
        let row = rows(&[("a", 7, 23, -1, 0)]);
        assert_eq!(row.with(int).fits(int.with(row)), Fit::Same);
        assert_eq!(row.with(text).fits(row.with(int)), Fit::Other);
        assert_eq!(row.fits(row.with(int)), Fit::Unknown);
        assert_eq!(int.with(row).fits(row), Fit::Same);
        assert_eq!(int.with(text), text, "the later counts");
        assert!(!Described::default().is_known() && row.is_known());
        assert!(Described::rows(None).with(int).has_no_rows() && !row.has_no_rows() && !int.has_no_rows());
    }
}

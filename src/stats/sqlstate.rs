//! SQLSTATEs, and errors counted by them.

use std::fmt;

use super::reason::{Blame, Reason as _};

/// A SQLSTATE: five characters out of `0-9A-Z`.
///
/// Source: `PostgreSQL` 17 docs, appendix A (error codes).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sqlstate([u8; 5]);

impl Sqlstate {
    /// Reads a code; `None` unless it is five of `0-9A-Z`.
    #[must_use]
    pub fn new(code: &[u8]) -> Option<Self> {
        let code: [u8; 5] = code.try_into().ok()?;
        let valid = |byte: &u8| byte.is_ascii_digit() || byte.is_ascii_uppercase();
        code.iter().all(valid).then_some(Self(code))
    }

    /// The code as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // `new` let only ASCII in, so the fallback is never taken.
        str::from_utf8(&self.0).unwrap_or("XX000")
    }
}

impl fmt::Debug for Sqlstate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Sqlstate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Distinct SQLSTATEs that one [`SqlstateCounts`] keeps apart. Postgres defines about 260, an
/// application meets a handful, and a function can raise any of 60 million.
pub const SQLSTATES_MAX: usize = 64;

/// Counts by SQLSTATE; past [`SQLSTATES_MAX`] distinct codes, and for malformed codes, one count
/// named `other`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SqlstateCounts {
    /// In order of first appearance; grows to at most [`SQLSTATES_MAX`].
    codes: Vec<(Sqlstate, u64)>,
    other: u64,
}

impl SqlstateCounts {
    /// Counts one error with the five bytes of its `C` field. Allocates only when the code is new.
    pub fn add(&mut self, code: &[u8]) {
        self.add_many(Sqlstate::new(code), 1);
    }

    /// How often `code` was counted by itself.
    #[must_use]
    pub fn get(&self, code: &[u8]) -> u64 {
        let of = |&&(known, _): &&(Sqlstate, u64)| known.0 == code;
        self.codes.iter().find(of).map_or(0, |&(_, count)| count)
    }

    /// Errors that no code of its own was kept for.
    #[must_use]
    pub fn other(&self) -> u64 {
        self.other
    }

    /// Every code with its count, in order of first appearance; without [`Self::other`].
    pub fn iter(&self) -> impl Iterator<Item = (Sqlstate, u64)> + '_ {
        self.codes.iter().copied()
    }

    /// The sum over all codes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.codes.iter().map(|&(_, count)| count).sum::<u64>() + self.other
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (code, count) in other.iter() {
            self.add_many(Some(code), count);
        }
        self.other += other.other;
    }

    fn add_many(&mut self, code: Option<Sqlstate>, count: u64) {
        let Some(code) = code else {
            self.other += count;
            return;
        };
        if let Some((_, total)) = self.codes.iter_mut().find(|(known, _)| *known == code) {
            *total += count;
        } else if self.codes.len() < SQLSTATES_MAX {
            self.codes.push((code, count));
        } else {
            self.other += count;
        }
    }
}

/// Errors that clients were sent, by who is at fault and by SQLSTATE.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorCounts {
    by_blame: [SqlstateCounts; Blame::ALL.len()],
}

impl ErrorCounts {
    /// Counts one error with the five bytes of its `C` field.
    pub fn add(&mut self, blame: Blame, code: &[u8]) {
        if let Some(counts) = self.by_blame.get_mut(blame.index()) {
            counts.add(code);
        }
    }

    /// The counts of each party.
    pub fn iter(&self) -> impl Iterator<Item = (Blame, &SqlstateCounts)> + '_ {
        Blame::ALL.iter().copied().zip(&self.by_blame)
    }

    /// The sum over all parties and codes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_blame.iter().map(SqlstateCounts::total).sum()
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.by_blame.iter_mut().zip(&other.by_blame) {
            mine.merge(theirs);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sqlstate_counts_lose_no_error_and_stay_bounded(
            codes in prop::collection::vec("[0-9A-C]{2}0{2}[0-9A-Z]{1}|[a-z]{0,6}", 0..400),
        ) {
            let mut counts = SqlstateCounts::default();
            for code in &codes {
                counts.add(code.as_bytes());
            }
            prop_assert_eq!(counts.total(), codes.len() as u64);
            prop_assert!(counts.iter().count() <= SQLSTATES_MAX);
            for (known, count) in counts.iter() {
                let want = codes.iter().filter(|code| code.as_str() == known.as_str()).count();
                prop_assert_eq!(count, want as u64);
            }
        }
    }

    #[test]
    fn a_sqlstate_is_five_digits_or_capitals() {
        #[rustfmt::skip]
        let table: [(&str, &[u8], bool); 6] = [
            ("unique violation", b"23505",  true),
            ("letters",          b"57P01",  true),
            ("lower case",       b"57p01",  false),
            ("short",            b"5701",   false),
            ("long",             b"57P011", false),
            ("quote",            b"57\"01", false),
        ];
        for (name, code, valid) in table {
            assert_eq!(Sqlstate::new(code).is_some(), valid, "{name}");
        }
    }

    #[test]
    fn the_65th_sqlstate_counts_as_other_and_known_ones_still_by_themselves() {
        let mut counts = SqlstateCounts::default();
        for number in 0..=SQLSTATES_MAX {
            counts.add(format!("{number:05}").as_bytes());
        }
        counts.add(b"00000");
        assert_eq!((counts.get(b"00000"), counts.get(b"00064"), counts.other()), (2, 0, 1));
    }

    #[test]
    fn errors_are_counted_apart_by_blame() {
        let mut errors = ErrorCounts::default();
        errors.add(Blame::Server, b"57P01");
        errors.add(Blame::Pooler, b"57P01");
        errors.add(Blame::Pooler, b"53300");
        let totals: Vec<_> = errors.iter().map(|(blame, counts)| (blame, counts.total())).collect();
        let want = [(Blame::Client, 0), (Blame::Server, 1), (Blame::Pooler, 2)];
        assert_eq!((totals.as_slice(), errors.total()), (want.as_slice(), 3));
    }
}

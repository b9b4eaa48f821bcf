//! Settings that are a part of what a statement means.

/// The names that the parser freezes into a prepared statement: a statement parsed under other values
/// is another statement. And how long each stays frozen. Source: measured, and `PostgreSQL` 17 docs, PREPARE, "Notes".
const FROZEN: [(&str, Frozen); 13] = [
    ("array_nulls", Frozen::Read),
    ("backslash_quote", Frozen::Spelled),
    ("client_encoding", Frozen::Spelled),
    ("datestyle", Frozen::Read),
    ("intervalstyle", Frozen::Read),
    ("lc_monetary", Frozen::Read),
    ("role", Frozen::Looked),
    ("search_path", Frozen::Looked),
    ("session_authorization", Frozen::Looked),
    ("standard_conforming_strings", Frozen::Spelled),
    ("timezone", Frozen::Read),
    ("transform_null_equals", Frozen::Read),
    ("xmloption", Frozen::Read),
];

/// How a setting is a part of a statement.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frozen {
    /// By it the text is taken apart: once.
    Spelled,
    /// By it constants are read: until names are looked up anew.
    Read,
    /// By it names are looked up: whenever it is another.
    Looked,
}

/// Whether the parser freezes the setting `name`, in any case, into a prepared statement.
#[must_use]
pub fn is_frozen(name: &[u8]) -> bool {
    FROZEN.iter().any(|(known, _)| name.eq_ignore_ascii_case(known.as_bytes()))
}

/// Whether a text may say something else under other [`Frozen::Read`] or [`Frozen::Spelled`] settings: it has strings in it, or NULL.
#[must_use]
pub fn is_read_by_settings(text: &[u8]) -> bool {
    let spells_null = || text.windows(4).any(|word| word.eq_ignore_ascii_case(b"null"));
    let is_quote = |at: usize| text.get(at + 1).is_none_or(|next| !next.is_ascii_digit());
    memchr::memchr(b'\'', text).is_some()
        || memchr::memchr_iter(b'$', text).any(is_quote)
        || !text.is_ascii()
        || spells_null()
}

/// Whether a prepared statement keeps the setting `name` (in lower case) though it is another by now; `looks_anew`: and though names
/// are looked up anew.
#[must_use]
pub fn stays_frozen(name: &[u8], looks_anew: bool) -> bool {
    let stays = |how: Frozen| how == Frozen::Spelled || how == Frozen::Read && !looks_anew;
    FROZEN.iter().any(|(known, how)| known.as_bytes() == name && stays(*how))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_constants_but_numbers_says_the_same_under_all_settings() {
        for text in ["SELECT a FROM t WHERE b = $1 AND c = $12", "SELECT 1.5, \"a\"", ""] {
            assert!(!is_read_by_settings(text.as_bytes()), "{text}");
        }
        for text in ["SELECT 'a'", "SELECT $$a$$", "SELECT $a$b$a$", "SELECT a = Null", "SELECT \u{e9}", "SELECT $"] {
            assert!(is_read_by_settings(text.as_bytes()), "{text}");
        }
    }
}

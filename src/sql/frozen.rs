//! Settings that are a part of what a statement means.

/// The names that the parser freezes into a prepared statement: a statement parsed under other values
/// is another statement. And how long each stays frozen. Source: measured, and `PostgreSQL` 17 docs, PREPARE, "Notes".
const FROZEN: [(&str, Frozen); 14] = [
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
    ("timezone_abbreviations", Frozen::Read),
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

/// Whether a prepared text may say something else under other settings by which constants or strings are read: it has strings in it,
/// or compares something with NULL.
#[must_use]
pub fn is_read_by_settings(text: &[u8]) -> bool {
    let is_quote = |at: usize| text.get(at + 1).is_none_or(|next| !next.is_ascii_digit());
    memchr::memchr(b'\'', text).is_some()
        || memchr::memchr_iter(b'$', text).any(is_quote)
        || !text.is_ascii()
        || compares_null(text)
}

fn compares_null(text: &[u8]) -> bool {
    const NULL: &[u8] = b"null";
    text.windows(NULL.len()).enumerate().any(|(at, word)| {
        let (front, behind) = (text.get(..at).unwrap_or_default(), text.get(at + NULL.len()..).unwrap_or_default());
        let is_compared = || front.trim_ascii_end().ends_with(b"=") || behind.trim_ascii_start().starts_with(b"=");
        word.eq_ignore_ascii_case(NULL) && is_compared()
    })
}

/// Whether a text that is known to change settings may change one by which prepared texts are read. It errs on one side: where it
/// does not spell what it sets, it may.
#[must_use]
pub fn may_read_otherwise(text: &[u8]) -> bool {
    const SPACED: [&[u8]; 2] = [b"time zone", b"xml option"];
    const CALL: &[u8] = b"set_config";
    let spells = |word: &[u8]| text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word));
    let reads = FROZEN.iter().filter(|(_, how)| *how != Frozen::Looked).map(|(name, _)| name.as_bytes());
    // What is quoted otherwise than it seems, or all of them.
    if reads.chain(SPACED).any(spells) || spells(b"all") || memchr::memchr(b'\\', text).is_some() {
        return true;
    }
    let names_it = |at: usize| {
        let behind = text.get(at + CALL.len()..).unwrap_or_default().trim_ascii_start();
        behind.strip_prefix(b"(").is_some_and(|behind| behind.trim_ascii_start().starts_with(b"'"))
    };
    let mut calls = text.windows(CALL.len()).enumerate().filter(|(_, word)| word.eq_ignore_ascii_case(CALL)).peekable();
    if calls.peek().is_some() {
        return !calls.all(|(at, _)| names_it(at));
    }
    !text
        .trim_ascii_start()
        .get(..3)
        .is_some_and(|word| word.eq_ignore_ascii_case(b"set") || word.eq_ignore_ascii_case(b"res"))
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
        for text in [
            "SELECT a FROM t WHERE b = $1 AND c = $12",
            "SELECT 1.5, \"a\"",
            "",
            "SELECT 1 WHERE a IS NOT NULL AND b = $1",
        ] {
            assert!(!is_read_by_settings(text.as_bytes()), "{text}");
        }
        for text in [
            "SELECT 'a'",
            "SELECT $$a$$",
            "SELECT $a$b$a$",
            "SELECT a =  Null",
            "SELECT NULL=a",
            "SELECT \u{e9}",
            "SELECT $",
        ] {
            assert!(is_read_by_settings(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn a_text_that_spells_other_settings_has_nothing_read_otherwise() {
        for text in [
            "SET LOCAL app.tenant = '1'",
            "set local work_mem to 1",
            "SELECT set_config('app.x', $1, true)",
            "RESET work_mem",
        ] {
            assert!(!may_read_otherwise(text.as_bytes()), "{text}");
        }
        for text in [
            "SET LOCAL TimeZone = 'UTC'",
            "SET TIME ZONE 'UTC'",
            "RESET ALL",
            "SELECT set_config($1, $2, true)",
            "SELECT set_config('a.b', '', true), SET_CONFIG(x, '', true)",
            "SELECT set_config ( 'DateStyle', $1, true)",
            "SELECT f()",
            "SET LOCAL U&\"\\0064atestyle\" = 'x'",
        ] {
            assert!(may_read_otherwise(text.as_bytes()), "{text}");
        }
    }
}

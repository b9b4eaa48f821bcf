//! Settings that are a part of what a statement means.

/// The names that the parser freezes into a prepared statement: a statement parsed under other values
/// is another statement. Source: measured, and `PostgreSQL` 17 docs, PREPARE, "Notes".
const FROZEN: [&str; 13] = [
    "array_nulls",
    "backslash_quote",
    "client_encoding",
    "datestyle",
    "intervalstyle",
    "lc_monetary",
    "role",
    "search_path",
    "session_authorization",
    "standard_conforming_strings",
    "timezone",
    "transform_null_equals",
    "xmloption",
];

/// Whether the parser freezes the setting `name`, in any case, into a prepared statement.
#[must_use]
pub fn is_frozen(name: &[u8]) -> bool {
    FROZEN.iter().any(|known| name.eq_ignore_ascii_case(known.as_bytes()))
}

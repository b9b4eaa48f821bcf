//! What of a password goes into the key derivation.

use std::borrow::Cow;
use stringprep::tables;

/// Prepares a password the way Postgres does: by `SASLprep` where that is possible, else as it is.
///
/// Postgres takes any bytes as a password. It normalises what is UTF-8, not plain ASCII, not empty
/// after mapping and free of prohibited characters (RFC 4013). It looks for prohibited characters,
/// unassigned code points and mixed directions *before* the normalisation, where the RFC looks
/// after it: `a ℵ` is normalised (the RFC would find mixed directions), `a🄀` is not (the RFC
/// would find `a0.`). We follow Postgres, because it made the verifiers.
///
/// Source: `PostgreSQL` docs, "SCRAM-SHA-256 Authentication"; the tests hold verifiers made by
/// Postgres 15 for every case here.
pub(super) fn prepare(password: &[u8]) -> Cow<'_, [u8]> {
    match std::str::from_utf8(password) {
        Ok(text) if !text.is_ascii() => saslprep(text).map_or(Cow::Borrowed(password), Cow::Owned),
        Ok(_) | Err(_) => Cow::Borrowed(password),
    }
}

/// `None` where Postgres falls back to the raw password.
fn saslprep(text: &str) -> Option<Vec<u8>> {
    // RFC 4013 §2.1. U+200B stands in both tables; the space wins, as in Postgres.
    let mapped = text
        .chars()
        .map(|c| if tables::non_ascii_space_character(c) { ' ' } else { c })
        .filter(|&c| !tables::commonly_mapped_to_nothing(c));
    // The space in front satisfies `normalise`.
    let padded: String = std::iter::once(' ').chain(mapped).collect();
    let mapped = padded.get(1..).filter(|mapped| !mapped.is_empty())?;
    if mapped.contains(prohibited) || mixes_directions(mapped) {
        return None;
    }
    normalise(&padded)
}

/// RFC 4013 §2.3 and §2.5.
fn prohibited(c: char) -> bool {
    tables::ascii_control_character(c)
        || tables::non_ascii_control_character(c)
        || tables::private_use(c)
        || tables::non_character_code_point(c)
        || tables::inappropriate_for_plain_text(c)
        || tables::inappropriate_for_canonical_representation(c)
        || tables::change_display_properties_or_deprecated(c)
        || tables::tagging_character(c)
        || tables::unassigned_code_point(c)
}

/// RFC 3454 §6: right-to-left text stands alone, and at both ends.
fn mixes_directions(text: &str) -> bool {
    let right_to_left = tables::bidi_r_or_al;
    text.contains(right_to_left)
        && (text.contains(tables::bidi_l) || !text.starts_with(right_to_left) || !text.ends_with(right_to_left))
}

/// NFKC of `padded` without the space it begins with. Expects mapped text without prohibited
/// characters.
///
/// `stringprep` gives NFKC only as a part of its profiles. That of X.520 does nothing else to such
/// text, if it does not begin with a combining mark: hence the space, which composes with none.
fn normalise(padded: &str) -> Option<Vec<u8>> {
    let normal = stringprep::x520prep(padded, false).ok()?;
    normal.strip_prefix(' ').map(|normal| normal.as_bytes().to_vec())
}

//! The first stage: texts that are cleared without being read.
//!
//! It does not know a quote from a comment, so it cannot be misled by one: a text is cleared only if no reading of its
//! bytes, whatever the quoting, names anything that the second stage acts on.

use super::effects::{EffectSet, Effects};
use super::head::FirstWord;
use super::lexer::{Backslash, Lexer, continues_word, is_blank};

/// The effects of `text` where they are plain from its first word and a glance at the rest; `None` where it must be read.
pub(super) fn clear(text: &[u8]) -> Option<Effects> {
    let mut lexer = Lexer::new(text, Backslash::Plain);
    let first = FirstWord::next(&mut lexer);
    let rest = lexer.rest();
    let set = match first {
        FirstWord::Select
        | FirstWord::Insert
        | FirstWord::Update
        | FirstWord::Delete
        | FirstWord::With
        | FirstWord::Values
        | FirstWord::Table
        | FirstWord::Merge
            if !has_needle(rest) =>
        {
            EffectSet::NONE
        }
        FirstWord::Begin if is_over(rest) => EffectSet::BEGIN,
        FirstWord::Commit if is_over(rest) => EffectSet::COMMIT,
        FirstWord::Rollback if is_over(rest) => EffectSet::ROLLBACK,
        _ => return None,
    };
    Some(Effects { set, first, harmless: false, takes_values: false, by_values: false })
}

/// Whether nothing but blanks and semicolons is left.
fn is_over(rest: &[u8]) -> bool {
    rest.iter().all(|byte| ends(*byte))
}

const fn ends(byte: u8) -> bool {
    byte == b';' || is_blank(byte)
}

/// Positions looked at in one step, a multiple of every vector register's size; and what is left of them, finer.
const BLOCK: usize = 64;
const FINE: usize = 16;
/// How far a mark reaches beyond its position, in bytes.
const REACH: usize = 2;

/// Whether something in `text` makes the second stage necessary. `text` is what follows the first word.
fn has_needle(text: &[u8]) -> bool {
    // Semicolons at the end begin no other statement; all others do, or are not semicolons at all.
    let Some(end) = text.iter().rposition(|byte| !ends(*byte)) else { return false };
    let text = text.get(..=end).unwrap_or_default();
    let mut at = 0;
    while let Some(window) = text.get(at..at + BLOCK + REACH) {
        if marked::<BLOCK>(window) && (at..at + BLOCK).any(|at| is_needle(text, at)) {
            return true;
        }
        at += BLOCK;
    }
    while let Some(window) = text.get(at..at + FINE + REACH) {
        if marked::<FINE>(window) && (at..at + FINE).any(|at| is_needle(text, at)) {
            return true;
        }
        at += FINE;
    }
    // What is left is shorter than a window, and ends in zeros, which are part of no needle.
    let mut padded = [0; 2 * FINE + REACH];
    for (slot, byte) in padded.iter_mut().zip(text.get(at..).unwrap_or_default()) {
        *slot = *byte;
    }
    marked::<{ 2 * FINE }>(&padded) && (at..text.len()).any(|at| is_needle(text, at))
}

/// Whether a mark begins at one of the first `N` positions of `window`, which has [`REACH`] bytes more.
///
/// A mark is the part of a needle that ordinary text rarely contains, at most three bytes of it, so that the compiler
/// makes vector instructions of this loop: no branch, no table, no early end.
fn marked<const N: usize>(window: &[u8]) -> bool {
    let (Some(first), Some(second), Some(third)) = (
        window.first_chunk::<N>(),
        window.get(1..).and_then(<[u8]>::first_chunk::<N>),
        window.get(2..).and_then(<[u8]>::first_chunk::<N>),
    ) else {
        return true;
    };
    let mut found = false;
    for ((first, second), third) in first.iter().zip(second).zip(third) {
        found |= is_mark(first | 0x20, second | 0x20, third | 0x20);
    }
    found
}

/// Whether the three bytes, letters in lower case, mark a needle; see [`is_needle`].
#[allow(clippy::needless_bitwise_bool, reason = "a branch per byte costs more than the comparisons")]
const fn is_mark(first: u8, second: u8, third: u8) -> bool {
    (first == b';')
        | (first == b'&')
        | ((first == b'n') & (second == b'f'))
        | ((first == b'e') & (second == b'm') & (third == b'p'))
        | (((first == b'd') | (first == b't') | (first == b'r')) & (second == b'v'))
        | ((first == b't') & (second == b's') & (third == b'e'))
}

/// Whether the mark at `at` is that of a whole needle.
fn is_needle(text: &[u8], at: usize) -> bool {
    let lower = |at: usize| text.get(at).map_or(0, |byte| byte | 0x20);
    // `needle` would begin `before` bytes in front of `at`.
    let spells = |needle: &[u8], before: usize| {
        at.checked_sub(before)
            .and_then(|start| text.get(start..)?.get(..needle.len()))
            .is_some_and(|bytes| bytes.eq_ignore_ascii_case(needle))
    };
    match (lower(at), lower(at + 1)) {
        // Another statement.
        (b';', _) => true,
        // An identifier that may be any of the other needles in disguise.
        (b'&', _) => spells(b"u&\"", 1),
        (b'n', b'f') => spells(b"set_config", 6),
        (b'e', b'm') => spells(b"temp", 1) && is_temporary(text, at),
        (b'd', b'v') => spells(b"advisory", 1),
        (b't', b's') => spells(b"setseed", 2),
        (b't', b'v') => spells(b"nextval", 3) || spells(b"lastval", 3) || spells(b"setval", 2),
        (b'r', b'v') => spells(b"currval", 3),
        _ => false,
    }
}

/// Whether the `temp` whose second letter is at `at` is a keyword, or part of the name of a temporary schema.
fn is_temporary(text: &[u8], at: usize) -> bool {
    let before = text.get(..at.saturating_sub(1)).unwrap_or_default();
    let behind = text.get(at + 3..).unwrap_or_default();
    if before.last_chunk().is_some_and(|schema: &[u8; 3]| schema.eq_ignore_ascii_case(b"pg_")) {
        return true;
    }
    let starts = before.last().is_none_or(|byte| byte.is_ascii_digit() || !continues_word(*byte));
    let behind = behind
        .first_chunk()
        .filter(|ending: &&[u8; 5]| ending.eq_ignore_ascii_case(b"orary"))
        .and_then(|ending| behind.get(ending.len()..))
        .unwrap_or(behind);
    starts && behind.first().is_none_or(|byte| !continues_word(*byte))
}

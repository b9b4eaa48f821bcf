//! What a statement's text may do to the session it runs in.
//!
//! In transaction mode a server connection goes to another client after every transaction, so the pooler has to know
//! which texts leave something behind: a setting, a lock, a temporary table, a listening channel. [`scan`] answers
//! that from the text alone, in two stages:
//!
//! 1. `prefilter`: one pass over the bytes that clears the ordinary text (a `SELECT`, `INSERT`, `UPDATE` or `DELETE`
//!    with none of a few rare names in it, a bare `BEGIN` or `COMMIT`) without knowing a quote from a comment;
//! 2. `statement`: a small lexer that works statement by statement over what the prefilter did not clear.
//!
//! What neither can tell (which functions a statement calls, which tables it writes) the server's own grammar does, if
//! somebody has to know: [`Library`] keeps the [`Facts`] of recent [`Fingerprint`]s.
//!
//! The answer of [`scan`] errs on one side only: a text may do less than its [`Effects`] say, never more, with two exceptions that
//! no text can show: what a *function* does that the text calls by some other name, and what a *trigger* does.
//!
//! The bytes are read as the server reads them, whatever `standard_conforming_strings` is: a text whose quotes depend
//! on it is read both ways and has the effects of both.
//!
//! Source: the `PostgreSQL` 17 docs, §4.1 "Lexical Structure", and the reference pages of the commands.

mod body;
mod bound;
mod cache;
mod effects;
mod facts;
mod fingerprint;
mod frozen;
#[cfg(feature = "grammar")]
mod grammar;
mod harmless;
mod head;
mod lexer;
mod library;
mod margins;
mod names;
mod nulls;
mod opening;
mod outline;
mod prefilter;
mod resets;
mod role;
mod routine;
mod splice;
mod statement;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

pub(crate) use body::LASTS;
pub use body::{Body, body, changes_defaults, defines, hidden_names, lasts, mentions_definition, mentions_seed};
pub use bound::{Bound, Filled, is_text};
pub use cache::Cache;
pub use effects::{EffectSet, Effects};
#[cfg(test)]
pub(crate) use facts::RUNNERS;
pub use facts::{Aside, Call, Facts, Relation, Source, is_own_setting, runs_text};
pub use fingerprint::{Class, Fingerprint, Literal};
pub use frozen::{is_frozen, is_read_by_settings, may_read_otherwise, stays_frozen};
pub use head::FirstWord;
pub use library::{Library, Reading};
pub use margins::margins;
pub use names::{Naming, prepared_names, reads_copy, spelled_executions};
pub use nulls::{Null, nulls};
pub use opening::{Opening, opens};
pub use outline::{OUTLINE_TEXT_MAX, outline};
pub use resets::{Reset, Resets, What, resets};
pub use role::{RoleWord, role_word};
pub use routine::{Mention, routine};
pub use splice::{Cut, Splice};
pub use statement::names_temp_schema;

use lexer::{Backslash, Doubt, Lexer, Token};

/// Whether one of these words stands anywhere in a text, be it in a string; but not as part of a longer one, such as a name.
#[must_use]
pub fn spells_words(text: &[u8], words: &[&[u8]]) -> bool {
    let ends =
        |byte: Option<&u8>| byte.is_none_or(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$')));
    let stands = |at: usize, word: &[u8]| {
        let before = at.checked_sub(1).and_then(|before| text.get(before));
        ends(before) && ends(text.get(at + word.len()))
    };
    words.iter().any(|word| {
        let mut parts = text.windows(word.len()).enumerate();
        parts.any(|(at, part)| part.eq_ignore_ascii_case(word) && stands(at, word))
    })
}

/// What `text` may do to its session. `text` is the body of a `Query` or `Parse`, without its NUL.
///
/// Any bytes are answered; what cannot be read to its end is [`EffectSet::OPAQUE`]. Allocates nothing but for the name of a setting
/// that is written with escapes; takes time linear in the length of `text`. A setting whose name is a parameter may be any:
/// [`Bound`] tells more.
#[must_use]
pub fn scan(text: &[u8]) -> Effects {
    let mut effects = prefilter::clear(text).unwrap_or_else(|| read(text));
    effects.harmless = harmless::is_harmless(text);
    effects.takes_values = takes_values(effects, text);
    effects.set |= by_update(text);
    effects
}

/// What `text` does if it is an `UPDATE pg_settings`.
fn by_update(text: &[u8]) -> EffectSet {
    const DOES: EffectSet = EffectSet::SETTINGS.union(EffectSet::ROLE).union(EffectSet::OPAQUE);
    if updates_settings(text) { DOES } else { EffectSet::NONE }
}

/// See [`Effects::takes_values`].
fn takes_values(effects: Effects, text: &[u8]) -> bool {
    use FirstWord::{
        Abort, Begin, Close, Commit, Deallocate, Discard, Empty, End, Listen, Lock, Notify, Release, Reset,
    };
    use FirstWord::{Rollback, Savepoint, Select, Set, Show, Start, Table, Unlisten, Values};
    let takes_none = match effects.first {
        Select | Values | Table => memchr::memchr(b'(', text).is_none(),
        Abort | Begin | Close | Commit | Deallocate | Discard | Empty | End | Listen | Lock | Notify | Release
        | Reset | Rollback | Savepoint | Set | Show | Start | Unlisten => true,
        _ => false,
    };
    !takes_none || effects.has(EffectSet::MULTI)
}

/// The command word of the first statement of `text`.
#[must_use]
pub fn first_word(text: &[u8]) -> FirstWord {
    FirstWord::next(&mut Lexer::new(text, Backslash::Plain))
}

/// Whether `text` may be an `UPDATE pg_settings`, which is a `SET` whose names the text need not spell out.
///
/// Source: `PostgreSQL` 17 docs, §52.24 "pg\_settings".
fn updates_settings(text: &[u8]) -> bool {
    const VIEW: &[u8] = b"pg_settings";
    let is_view = |at: usize| {
        let name = at.checked_sub(2).and_then(|start| text.get(start..start + VIEW.len()));
        name.is_some_and(|name| name.eq_ignore_ascii_case(VIEW))
    };
    memchr::memchr_iter(b'_', text).any(is_view) && text.windows(6).any(|word| word.eq_ignore_ascii_case(b"update"))
}

/// The custom settings (with a dot in their name) that `text` sets or resets for the session.
/// A name may come more than once.
///
/// `pg_settings` does not list such settings when no extension owns them, so their names are known from the text or not
/// at all. Upper-case ASCII is folded, because the server compares the names of settings without it. A name that the
/// text does not spell out (a parameter, an expression, bytes that are not UTF-8) is left out, and then
/// [`scan`] says [`EffectSet::OPAQUE`]. Cold: allocates.
pub fn custom_names(text: &[u8]) -> impl Iterator<Item = Cow<'_, str>> {
    let mut names = Vec::new();
    for backslash in readings(text) {
        statement::read(text, *backslash, Some(&mut names));
    }
    names.into_iter()
}

/// Whether `text` is one `COMMIT`, `END`, `ROLLBACK` or `ABORT` and nothing else.
///
/// `WORK`, `TRANSACTION`, `AND NO CHAIN`, comments and trailing semicolons are allowed. `AND CHAIN` is not (it opens
/// the next transaction), nor `ROLLBACK TO`, nor the two `PREPARED` commands.
#[must_use]
pub fn is_transaction_end(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text, Backslash::Plain);
    let ends = |word: &[u8]| {
        matches!(FirstWord::of(word), FirstWord::Commit | FirstWord::End | FirstWord::Rollback | FirstWord::Abort)
    };
    if !matches!(lexer.token(), Some(Token::Word(word)) if ends(word)) {
        return false;
    }
    let _ = lexer.take_word(b"work") || lexer.take_word(b"transaction");
    if lexer.take_word(b"and") && !(lexer.take_word(b"no") && lexer.take_word(b"chain")) {
        return false;
    }
    while let Some(token) = lexer.token() {
        if token != Token::Mark(b';') {
            return false;
        }
    }
    lexer.doubt() == Doubt::None
}

/// Whether `text` is one `SHOW application_name` or `SHOW ALL` and nothing else; comments and trailing semicolons are allowed.
#[must_use]
pub fn shows_name(text: &[u8]) -> bool {
    const NAME: &[u8] = b"application_name";
    shows(text, |lexer| match lexer.token() {
        Some(Token::Word(word)) => word.eq_ignore_ascii_case(NAME) || word.eq_ignore_ascii_case(b"all"),
        Some(Token::Quoted(name)) => name.eq_ignore_ascii_case(NAME),
        _ => false,
    })
}

/// Whether `text` is one `SHOW pgweir.watermark` and nothing else.
#[must_use]
pub fn shows_watermark(text: &[u8]) -> bool {
    shows(text, |lexer| {
        let mut is = |name: &[u8]| match lexer.token() {
            Some(Token::Word(word) | Token::Quoted(word)) => word.eq_ignore_ascii_case(name),
            Some(Token::Mark(mark)) => name == [mark],
            _ => false,
        };
        is(b"pgweir") && is(b".") && is(b"watermark")
    })
}

/// Whether `text` is one `SHOW` and nothing else, of a setting that `is_it`. Settings are found by name whatever its case, even
/// in quotes.
fn shows<'a>(text: &'a [u8], is_it: impl FnOnce(&mut Lexer<'a>) -> bool) -> bool {
    let mut lexer = Lexer::new(text, Backslash::Plain);
    if !(lexer.take_word(b"show") && is_it(&mut lexer)) {
        return false;
    }
    while let Some(token) = lexer.token() {
        if token != Token::Mark(b';') {
            return false;
        }
    }
    lexer.doubt() == Doubt::None
}

/// The second stage: the effects of every way in which `text` may be read.
fn read(text: &[u8]) -> Effects {
    read_bound(text, None, None).0
}

/// The same, with the values of its parameters, and the custom settings that it sets; and whether it may reset one by a value.
fn read_bound<'a>(
    text: &'a [u8],
    bound: Option<&'a Bound<'a>>,
    mut names: Option<&mut Vec<Cow<'a, str>>>,
) -> (Effects, bool) {
    let (mut effects, mut resets) = (Effects::default(), false);
    // A reading that the text ends in the middle of is one in which the server refuses the text: that counts only
    // where no other reading makes sense.
    let mut cut = true;
    for (nth, backslash) in readings(text).iter().enumerate() {
        let reading = statement::read_bound(text, *backslash, bound, names.as_deref_mut());
        if nth == 0 {
            effects.first = reading.first;
        }
        effects.set |= reading.set;
        effects.by_values |= reading.by_values;
        resets |= reading.resets;
        cut &= reading.doubt != Doubt::None;
        if reading.doubt == Doubt::Encoding {
            effects.set |= EffectSet::OPAQUE;
        }
    }
    if cut {
        effects.set |= EffectSet::OPAQUE;
    }
    (effects, resets)
}

/// The values of `standard_conforming_strings` that make a difference to `text`.
fn readings(text: &[u8]) -> &'static [Backslash] {
    if memchr::memchr(b'\\', text).is_some() { &[Backslash::Plain, Backslash::Escape] } else { &[Backslash::Plain] }
}

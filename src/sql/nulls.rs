//! Where a text calls `set_config` with NULL as the value, or with a parameter, which may be: that setting goes back to where its
//! session began.

use std::borrow::Cow;
use std::ops::Range;

use super::head::FirstWord;
use super::lexer::{Doubt, Lexer, Token};
use super::{Backslash, readings};

const SET_CONFIG: &[u8] = b"set_config";
const CATALOG: &[u8] = b"pg_catalog";

/// The value in such a call.
#[derive(Debug, PartialEq, Eq)]
pub struct Null {
    /// The setting, which a literal names; folded.
    pub name: String,
    /// Where the word stands, or the parameter.
    pub place: Range<usize>,
    /// The parameter's number. 0: it is the word.
    pub parameter: usize,
    /// The parameter is nowhere else in the text.
    pub alone: bool,
}

/// Those of `text`, in their order, in statements that run at once and are shown to nobody: not in what is kept to be run later, nor under an
/// EXPLAIN. None at all if it is not certain where they are.
#[must_use]
pub fn nulls(text: &[u8]) -> Vec<Null> {
    let spells = |word: &[u8]| text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word));
    let may_be = memchr::memchr(b'$', text).is_some() || spells(b"null");
    if !(may_be && spells(SET_CONFIG)) {
        return Vec::new();
    }
    let mut readings = readings(text).iter().map(|backslash| read(text, *backslash));
    let Some(Some(nulls)) = readings.next() else { return Vec::new() };
    if readings.all(|other| other.as_ref() == Some(&nulls)) { nulls } else { Vec::new() }
}

fn read(text: &[u8], backslash: Backslash) -> Option<Vec<Null>> {
    let mut lexer = Lexer::new(text, backslash);
    let (mut nulls, mut parameters) = (Vec::new(), Vec::new());
    loop {
        lexer.skip_blank();
        if lexer.rest().is_empty() {
            break;
        }
        if !lexer.take_mark(b';') {
            statement(&mut lexer, text, &mut nulls, &mut parameters)?;
        }
    }
    for null in &mut nulls {
        null.alone = parameters.iter().filter(|number| **number == null.parameter).count() == 1;
    }
    (lexer.doubt() == Doubt::None).then_some(nulls)
}

/// What stands in front of a token, as far as it says whose function that names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Behind {
    Other,
    Dot,
    Catalog,
    CatalogDot,
}

/// Moves past the statement at `lexer`, with its semicolon. None if nobody knows where it ends.
fn statement(lexer: &mut Lexer<'_>, text: &[u8], nulls: &mut Vec<Null>, parameters: &mut Vec<usize>) -> Option<()> {
    let command = FirstWord::next(&mut { *lexer });
    let (mut depth, mut behind) = (0_u32, Behind::Other);
    loop {
        let here = *lexer;
        let Some(token) = lexer.token() else { return (depth == 0).then_some(()) };
        let is = |known: &[u8]| match token {
            Token::Word(word) => word.eq_ignore_ascii_case(known),
            Token::Quoted(name) => name == known,
            _ => false,
        };
        match token {
            Token::Mark(b';') if depth == 0 => return Some(()),
            Token::Mark(b'(') => depth += 1,
            Token::Mark(b')') => depth = depth.checked_sub(1)?,
            Token::Parameter => parameters.push(here.parameter()),
            // The semicolons of its body end nothing.
            Token::Word(_) if command == FirstWord::Create && is(b"atomic") => return None,
            _ if behind != Behind::Dot && runs_at_once(command) && is(SET_CONFIG) => nulls.extend(null(*lexer, text)),
            _ => {}
        }
        behind = match (behind, token) {
            (Behind::Catalog, Token::Mark(b'.')) => Behind::CatalogDot,
            (_, Token::Mark(b'.')) => Behind::Dot,
            (Behind::Other | Behind::Catalog, _) if is(CATALOG) => Behind::Catalog,
            _ => Behind::Other,
        };
    }
}

const fn runs_at_once(command: FirstWord) -> bool {
    use FirstWord::{Copy, Delete, Insert, Merge, Select, Update, Values, With};
    matches!(command, Select | With | Values | Insert | Update | Delete | Merge | Copy)
}

/// The NULL among the arguments at `lexer`: `('name', NULL, ...` or `('name', $1, ...`, each perhaps with a cast to what it is anyway.
fn null(mut lexer: Lexer<'_>, text: &[u8]) -> Option<Null> {
    let at = |lexer: &Lexer<'_>| text.len() - lexer.rest().len();
    lexer.take_mark(b'(').then_some(())?;
    let here = lexer;
    let Some(Token::Text { body, exact }) = lexer.token() else { return None };
    let name = if exact { Cow::Borrowed(body) } else { Cow::Owned(here.unescape(body)?) };
    skip_casts(&mut lexer);
    lexer.take_mark(b',').then_some(())?;
    lexer.skip_blank();
    let start = at(&lexer);
    let parameter = match ({ lexer }).token() {
        Some(Token::Parameter) => Some(lexer.parameter()).filter(|number| *number > 0)?,
        Some(Token::Word(word)) if word.eq_ignore_ascii_case(b"null") => 0,
        _ => return None,
    };
    lexer.token();
    let place = start..at(&lexer);
    skip_casts(&mut lexer);
    lexer.take_mark(b',').then_some(())?;
    let name = std::str::from_utf8(&name).ok()?.to_ascii_lowercase();
    Some(Null { name, place, parameter, alone: false })
}

/// Moves past `::text`.
fn skip_casts(lexer: &mut Lexer<'_>) {
    let mut ahead = *lexer;
    while ahead.take_mark(b':') && ahead.take_mark(b':') && ahead.take_word(b"text") {
        *lexer = ahead;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each as its name and what stands behind it.
    fn shown(text: &str) -> String {
        let show = |null: Null| {
            let (word, rest) = (&text[null.place.clone()], &text[null.place.end..]);
            if null.parameter == 0 {
                assert!(word.eq_ignore_ascii_case("null"), "{text}");
                return format!("{}{rest}", null.name);
            }
            let also = if null.alone { "" } else { " also elsewhere" };
            format!("{} by {word} ({}{also}){rest}", null.name, null.parameter)
        };
        nulls(text.as_bytes()).into_iter().map(show).collect::<Vec<_>>().join("|")
    }

    #[test]
    fn a_null_is_found_wherever_it_is_the_value() {
        #[rustfmt::skip]
        let table: [(&str, &str); 46] = [
            ("SELECT set_config('Work_Mem', NULL, false)",                      "work_mem, false)"),
            ("SELECT SET_CONFIG ( /* a */ 'a' ,\n-- b\nnull/**/, $1)",          "a/**/, $1)"),
            ("SELECT set_config('a'::text, null::TEXT :: text, true), 1",       "a::TEXT :: text, true), 1"),
            ("SELECT pg_catalog.set_config(E'a', NULL, false)",                 "a, false)"),
            ("SELECT \"pg_catalog\" . \"set_config\"($$a$$, NULL, false)",      "a, false)"),
            ("SELECT set_config('a'\n'b', NULL, false)",                        ""),
            ("SELECT set_config(E'\\x61', NULL, false)",                        "a, false)"),
            ("SELECT set_config('it''s', NULL, false)",                         "it's, false)"),
            ("SELECT set_config('a',NULL,x), set_config('b',NULL,y)",           "a,x), set_config('b',NULL,y)|b,y)"),
            ("SELECT set_config('a', NULL, set_config('b', NULL, true) = '')",  "a, set_config('b', NULL, true) = '')|b, true) = '')"),
            ("WITH a AS (SELECT set_config('a', NULL, false)) TABLE a",         "a, false)) TABLE a"),
            ("VALUES (set_config('a', NULL, false))",                           "a, false))"),
            ("(SELECT set_config('a', NULL, false))",                           "a, false))"),
            ("INSERT INTO t SELECT set_config('a', NULL, false)",               "a, false)"),
            ("UPDATE t SET v = set_config('a', NULL, false)",                   "a, false)"),
            ("DELETE FROM t WHERE set_config('a', NULL, false) = ''",           "a, false) = ''"),
            ("COPY (SELECT set_config('a', NULL, false)) TO STDOUT",            "a, false)) TO STDOUT"),
            (";; CREATE VIEW v AS SELECT set_config('a', NULL, false); SELECT set_config('b', NULL, false)", "b, false)"),
            ("CREATE RULE r AS ON INSERT TO t DO (SELECT 1; SELECT set_config('a', NULL, false)); SELECT 1", ""),
            // Kept to be run later, shown, or not looked into.
            ("CREATE FUNCTION f() RETURNS text RETURN set_config('a', NULL, false)", ""),
            ("CREATE FUNCTION f() RETURNS text BEGIN ATOMIC SELECT 1; SELECT set_config('a', NULL, false); END", ""),
            ("CREATE TABLE t AS SELECT set_config('a', NULL, false)",           ""),
            ("ALTER TABLE t ALTER v SET DEFAULT set_config('a', NULL, false)",  ""),
            ("PREPARE p AS SELECT set_config('a', NULL, false)",                ""),
            ("EXPLAIN ANALYZE SELECT set_config('a', NULL, false)",             ""),
            ("DO $$BEGIN PERFORM set_config('a', NULL, false); END$$",          ""),
            ("SELECT 'set_config(''a'', NULL, false)'",                         ""),
            ("SELECT 1 -- set_config('a', NULL, false)",                        ""),
            // Another function, or other arguments.
            ("SELECT mine.set_config('a', NULL, false)",                        ""),
            ("SELECT db.pg_catalog.set_config('a', NULL, false)",               ""),
            ("SELECT \"Set_Config\"('a', NULL, false), reset_config('a', NULL, false)", ""),
            ("SELECT set_config($1, NULL, false)",                              ""),
            ("SELECT set_config('a' || 'b', NULL, false)",                      ""),
            ("SELECT set_config('a'::name, NULL, false)",                       ""),
            ("SELECT set_config('a', NULL || 'b', false)",                      ""),
            ("SELECT set_config('a', NULL)",                                    ""),
            // A parameter, which may be NULL.
            ("SELECT set_config('a', $1, false), $2",                           "a by $1 (1), false), $2"),
            ("SELECT set_config('a', $12 :: text, $1)",                         "a by $12 (12) :: text, $1)"),
            ("SELECT $1, set_config('a', $01, false)",                          "a by $01 (1 also elsewhere), false)"),
            ("SELECT set_config('a', $1 || 'b', false)",                        ""),
            ("SELECT set_config('a', $1::int::text, false)",                    ""),
            ("SELECT set_config('a', $0, false)",                               ""),
            ("SELECT set_config(B'1', NULL, false), set_config(N'a', NULL, false)", ""),
            // Not certain.
            ("SELECT set_config('a', NULL, false), 'open",                      ""),
            ("SELECT set_config('a', NULL, false), 'x\\', ' '",                 ""),
            ("SELECT set_config('a', NULL, false))",                            ""),
        ];
        for (text, want) in table {
            assert_eq!(shown(text), want, "{text}");
        }
    }
}

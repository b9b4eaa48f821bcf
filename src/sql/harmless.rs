//! Texts that may run twice: what is certain without knowing the catalog.

use super::lexer::{Backslash, Doubt, Lexer, Token};

/// Longer texts are not looked at; bytes.
const TEXT_MAX: usize = 200;

/// Whether `text` has no effect that outlives its transaction and calls nothing of a user's: nothing at all, a `BEGIN`, a
/// `SHOW`, or a `SELECT` of constants. Names of functions, operators, tables and types may stand for anything.
pub(super) fn is_harmless(text: &[u8]) -> bool {
    if text.len() > TEXT_MAX || memchr::memchr2(b'\\', b'$', text).is_some() {
        return false;
    }
    let mut lexer = Lexer::new(text, Backslash::Plain);
    let mode = |token: Token<'_>| matches!(token, Token::Word(_) | Token::Mark(b','));
    let start = lexer;
    let fits = if let Some(Token::Word(word)) = lexer.token() {
        let is = |known: &[u8]| word.eq_ignore_ascii_case(known);
        if is(b"select") {
            constants(&mut lexer)
        } else if is(b"begin") {
            all(&mut lexer, mode)
        } else if is(b"start") {
            lexer.take_word(b"transaction") && all(&mut lexer, mode)
        } else {
            is(b"show")
                && all(&mut lexer, |token| matches!(token, Token::Word(_) | Token::Quoted(_) | Token::Mark(b'.')))
        }
    } else {
        // What is left is nothing at all, or nothing that passes.
        lexer = start;
        true
    };
    fits && all(&mut lexer, |token| token == Token::Mark(b';')) && lexer.doubt() == Doubt::None
}

/// Moves to the end of the statement. False if a token of it is not of the kind.
fn all(lexer: &mut Lexer<'_>, kind: impl Fn(Token<'_>) -> bool) -> bool {
    loop {
        let here = *lexer;
        match lexer.token() {
            None => return true,
            Some(token) if kind(token) => {}
            Some(Token::Mark(b';')) => {
                *lexer = here;
                return true;
            }
            Some(_) => return false,
        }
    }
}

/// `1, 'a' AS b, NULL`
fn constants(lexer: &mut Lexer<'_>) -> bool {
    loop {
        let constant = match lexer.token() {
            Some(Token::Number | Token::Text { .. }) => true,
            Some(Token::Word(word)) => {
                [&b"null"[..], b"true", b"false"].iter().any(|known| word.eq_ignore_ascii_case(known))
            }
            _ => false,
        };
        let named = !lexer.take_word(b"as") || matches!(lexer.token(), Some(Token::Word(_) | Token::Quoted(_)));
        if !(constant && named) {
            return false;
        }
        if !lexer.take_mark(b',') {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certain_is_harmless() {
        #[rustfmt::skip]
        let table = [
            ("",                                              true),
            (" -- ping\n",                                    true),
            (";",                                             true),
            ("BEGIN",                                         true),
            ("begin isolation level serializable, read only;", true),
            ("START TRANSACTION READ WRITE",                  true),
            ("SHOW search_path",                              true),
            ("SHOW \"app\".tenant;;",                         true),
            ("SELECT 1",                                      true),
            ("select 1 as one, 'a''b' as \"b\", null, true;", true),
            ("/* app */ SELECT 'x'",                          true),
            ("SELECT now()",                                  false),
            ("SELECT a",                                      false),
            ("SELECT 1 + 1",                                  false),
            ("SELECT '1'::t",                                 false),
            ("SELECT 1 FROM t",                               false),
            ("SELECT 1 INTO t",                               false),
            ("SELECT $1",                                     false),
            ("SELECT 'a\\'",                                  false),
            ("SELECT 'a",                                     false),
            ("SELECT",                                        false),
            ("SELECT 1,",                                     false),
            ("SELECT 1; INSERT INTO t VALUES (1)",            false),
            ("BEGIN; DELETE FROM t",                          false),
            ("COMMIT",                                        false),
            ("SET a = 1",                                     false),
            ("START",                                         false),
        ];
        for (text, want) in table {
            assert_eq!(is_harmless(text.as_bytes()), want, "{text}");
        }
    }
}
